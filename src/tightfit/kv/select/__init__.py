"""Methods that read only some of what is kept."""

from tightfit.kv.select import quest

__all__ = ["quest"]
