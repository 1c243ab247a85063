"""Keys and values in eight bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from tightfit.catalog import technique
from tightfit.kv.method import Quantizer


@technique(
    seam="kv",
    name="int8",
    paper="https://arxiv.org/abs/2402.02750",
    exact=False,
    summary="keys by channel and values by token in eight bits, a recent window as it is",
)
@dataclass(frozen=True)
class Int8(Quantizer):
    """256 levels between the lowest and the highest number of a group: of keys one channel of 32 tokens, of values 32
    channels of one token, scales and minima in float16 (the layout of KIVI).

    KIVI lets its full-precision part of the keys grow to ``recent`` and then codes it whole; here it has ``recent`` to
    ``recent + 63`` tokens, and values likewise.
    """

    bits: ClassVar[int] = 8
