"""Methods that keep pages in another tier."""

from tightfit.kv.offload import headinfer, host, specache

__all__ = ["headinfer", "host", "specache"]
