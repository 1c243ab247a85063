"""How numbers become tiles."""

from __future__ import annotations

from tightfit.kernels.encode_reference import encode

__all__ = ["encode"]
