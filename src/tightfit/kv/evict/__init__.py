"""Methods that let go of tokens."""

from tightfit.kv.evict import h2o, snapkv, window

__all__ = ["h2o", "snapkv", "window"]
