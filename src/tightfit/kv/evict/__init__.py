"""Methods that let go of tokens."""

from tightfit.kv.evict import h2o, lighttransfer, snapkv, window

__all__ = ["h2o", "lighttransfer", "snapkv", "window"]
