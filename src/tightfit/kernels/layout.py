"""The layout of tiles, and their sizes. Does not import torch.

A tile is 16 rows by one group of inputs: ``[codes][16 scales in bfloat16][16 offsets in bfloat16, if asymmetric]``. A
weight is ``level * scale + offset``; its code tells the level. Scales and offsets of intN can be float16 instead, as
GGUF files have them: then an offset is what the lowest code stands for, so that they are held as they are. The bits of
the codes lie in planes, one after the other, the lowest bits first (r is the row, k the code's place modulo 4; 4 codes
of 16 rows are a step):

- 8 bits: 64 bytes for each step; byte ``r * 4 + k`` is code k of row r.
- 4 bits: 64 bytes for 8 codes; the low half of byte ``r * 4 + k`` is code k, the high half code ``4 + k``.
- 2 bits: 64 bytes for 16 codes; bits ``2j`` and ``2j + 1`` of byte ``r * 4 + k`` are code ``4j + k``.
- 1 bit: 8 bytes for each step; bit ``r * 4 + k`` of that 64-bit number is code k.

So one 64-byte line holds the next inputs of every row, and a register with a lane for each row needs no shuffles.

An input has a code of its own, but for ternary, where a code is three inputs: code ``4h + k`` of a run of 24 inputs
stands for the inputs ``12h + 4t + k`` (t = 0, 1, 2). With ``v = 9 * level_0 + 3 * level_1 + level_2``, its lower four
bits are the magnitude of v and its fifth is set if v is negative: bitnet.cpp's TL2 (https://arxiv.org/abs/2410.16144).
Each run is planes of its own, 80 bytes.

A pruned matrix has no tiles: its rows lie one after the other, each ``[bitmap][values in bfloat16]`` as in Endor
(https://arxiv.org/abs/2406.11674). Bit ``p % 8`` of the bitmap's byte ``p // 8`` is set if the input at place p is not
zero; the values are those inputs, one place after the other, and zeros behind them where there are fewer than the row
has room for. Place ``2i + h`` of 32 is input ``16h + i``: then a register of 16-bit numbers is two of 32-bit numbers,
their upper halves and their lower, each with inputs that follow each other. Bitmap and values are each filled up to 8
bytes.
"""

from __future__ import annotations

TILE_ROWS = 16
NUMBERS_BYTES = 2 * TILE_ROWS  # of a tile's scales or offsets
RUN = 24  # inputs of ternary codes that are planes of their own

PLANES = {
    "int8": (8,),
    "int6": (4, 2),
    "int5": (4, 1),
    "int4": (4,),
    "int3": (2, 1),
    "int2": (2,),
    "nf4": (4,),
    "fp4": (4,),
    "fp8": (8,),
    "ternary": (4, 1),
}


def code_count(kind: str, inputs: int) -> int:
    """How many codes ``inputs`` of a row have."""
    return inputs // 3 if kind == "ternary" else inputs


def code_nbytes(kind: str, inputs: int) -> int:
    """Bytes of the codes of 16 rows by ``inputs``."""
    return TILE_ROWS * code_count(kind, inputs) * sum(PLANES[kind]) // 8


def tile_nbytes(kind: str, group: int, asymmetric: bool) -> int:
    return code_nbytes(kind, group) + NUMBERS_BYTES * (2 if asymmetric else 1)


def bitmap_nbytes(cols: int) -> int:
    """Bytes of the bitmap of a pruned row."""
    return -(-cols // 64) * 8


def pruned_row_nbytes(cols: int, kept: int) -> int:
    """Bytes of a pruned row of ``cols`` inputs with room for ``kept`` values."""
    return bitmap_nbytes(cols) + -(-kept // 4) * 8


def below_zero(kind: str) -> int:
    """How many steps the lowest code of intN is below 0."""
    return 1 << (sum(PLANES[kind]) - 1)


def limits(kind: str) -> tuple[int, int]:
    """The lowest and the highest level of intN and ternary. int8 leaves out -128, so that two products with 8-bit
    numbers add up in 16 bits."""
    if kind == "ternary":
        return -1, 1
    half = below_zero(kind)
    return (-127, 127) if kind == "int8" else (-half, half - 1)


def float_bits(kind: str, exponent: int) -> tuple[int, int]:
    """How many bits of exponent and of mantissa the codes of fp4 (e2m1), or of fp8 with ``exponent``, have."""
    return (2, 1) if kind == "fp4" else (exponent, 7 - exponent)
