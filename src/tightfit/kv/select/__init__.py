"""Methods that read only some of what is kept."""

from tightfit.kv.select import a2ats, alisa, clusterkv, lserve, quest, recycled, selfspan, squeezed

__all__ = ["a2ats", "alisa", "clusterkv", "lserve", "quest", "recycled", "selfspan", "squeezed"]
