"""Methods that merge tokens."""

from tightfit.kv.merge import d2o

__all__ = ["d2o"]
