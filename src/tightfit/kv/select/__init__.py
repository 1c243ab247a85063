"""Methods that read only some of what is kept."""

from tightfit.kv.select import quest, recycled

__all__ = ["quest", "recycled"]
