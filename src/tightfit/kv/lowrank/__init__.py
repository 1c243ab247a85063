"""Methods that store fewer channels."""

from tightfit.kv.lowrank import think

__all__ = ["think"]
