"""Methods by which layers share keys and values."""

from tightfit.kv.share import kvsharer

__all__ = ["kvsharer"]
