"""Methods that merge tokens."""

from tightfit.kv.merge import anchor, d2o, elastic, ems, kvmerger, less, lococo

__all__ = ["anchor", "d2o", "elastic", "ems", "kvmerger", "less", "lococo"]
