"""Methods that keep pages in another tier."""

from tightfit.kv.offload import host

__all__ = ["host"]
