"""Methods that store fewer channels, features or heads."""

from tightfit.kv.lowrank import gqa, matryoshka, think

__all__ = ["gqa", "matryoshka", "think"]
