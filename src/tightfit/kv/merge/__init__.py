"""Methods that merge tokens."""

from tightfit.kv.merge import d2o, kvmerger

__all__ = ["d2o", "kvmerger"]
