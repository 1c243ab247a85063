"""Methods that read only some of what is kept."""

from tightfit.kv.select import clusterkv, quest, recycled, squeezed

__all__ = ["clusterkv", "quest", "recycled", "squeezed"]
