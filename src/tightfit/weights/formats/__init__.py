"""Weight formats: how a matrix is stored and multiplied."""

from tightfit.weights.formats.base import Format, Matrix, Split
from tightfit.weights.formats.dense import BF16, F16, F32
from tightfit.weights.formats.tiles import Int4, Int8

__all__ = ["BF16", "F16", "F32", "Format", "Int4", "Int8", "Matrix", "Split"]
