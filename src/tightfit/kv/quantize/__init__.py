"""Methods that store keys and values in few bits."""

from tightfit.kv.quantize import aqua, cq, gear, int2, int4, int8, mikv, tailor, zipcache

__all__ = ["aqua", "cq", "gear", "int2", "int4", "int8", "mikv", "tailor", "zipcache"]
