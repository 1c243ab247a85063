"""Weight formats: how a matrix is stored and multiplied."""

from tightfit.weights.formats.base import Format, Joined, Matrix, Scheme, Split
from tightfit.weights.formats.dense import BF16, F16, F32
from tightfit.weights.formats.fp4 import FP4
from tightfit.weights.formats.fp8 import FP8
from tightfit.weights.formats.int2 import Int2
from tightfit.weights.formats.int3 import Int3
from tightfit.weights.formats.int4 import Int4
from tightfit.weights.formats.int5 import Int5
from tightfit.weights.formats.int6 import Int6
from tightfit.weights.formats.int8 import Int8
from tightfit.weights.formats.llm_int8 import LlmInt8
from tightfit.weights.formats.mixed import Mixed
from tightfit.weights.formats.nf4 import NF4
from tightfit.weights.formats.pruned import Pruned
from tightfit.weights.formats.ternary import Ternary

__all__ = [
    "BF16",
    "F16",
    "F32",
    "FP4",
    "FP8",
    "NF4",
    "Format",
    "Int2",
    "Int3",
    "Int4",
    "Int5",
    "Int6",
    "Int8",
    "Joined",
    "LlmInt8",
    "Matrix",
    "Mixed",
    "Pruned",
    "Scheme",
    "Split",
    "Ternary",
]
