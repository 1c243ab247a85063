"""Methods by which layers share keys and values."""

from tightfit.kv.share import kvsharer, pod

__all__ = ["kvsharer", "pod"]
