"""Methods that store keys and values in few bits."""

from tightfit.kv.quantize import int2, int4, int8, tailor

__all__ = ["int2", "int4", "int8", "tailor"]
