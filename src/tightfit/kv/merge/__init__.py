"""Methods that merge tokens."""

from tightfit.kv.merge import anchor, d2o

__all__ = ["anchor", "d2o"]
