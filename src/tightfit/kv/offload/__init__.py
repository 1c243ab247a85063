"""Methods that keep pages in another tier."""

from tightfit.kv.offload import headinfer, host

__all__ = ["headinfer", "host"]
