"""Methods that store fewer channels, features or heads."""

from tightfit.kv.lowrank import cskv, gqa, matryoshka, think

__all__ = ["cskv", "gqa", "matryoshka", "think"]
