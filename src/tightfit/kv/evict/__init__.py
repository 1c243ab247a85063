"""Methods that let go of tokens."""

from tightfit.kv.evict import corm, h2o, locret, morphkv, scissorhands, scope, snapkv, tova, window

__all__ = ["corm", "h2o", "locret", "morphkv", "scissorhands", "scope", "snapkv", "tova", "window"]
