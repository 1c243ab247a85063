"""Methods that read only some of what is kept."""

from tightfit.kv.select import quest, recycled, selfspan

__all__ = ["quest", "recycled", "selfspan"]
