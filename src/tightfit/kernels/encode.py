"""How numbers become tiles."""

from __future__ import annotations

from tightfit.kernels.encode_reference import encode, not_finite

__all__ = ["encode", "not_finite"]
