"""Methods that keep pages in another tier."""

from tightfit.kv.offload import headinfer, hgca, host, specache

__all__ = ["headinfer", "hgca", "host", "specache"]
