"""Methods that merge tokens."""

from tightfit.kv.merge import d2o, elastic, ems, kvmerger, less

__all__ = ["d2o", "elastic", "ems", "kvmerger", "less"]
