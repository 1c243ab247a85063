"""Low-bit formats in the canonical tile: 16 rows by one group of inputs, ``[codes][16 scales in bfloat16]``.

Tiles lie in order of their rows, then of their group. Rows are padded to 16 and columns to a whole group, with codes
that decode to zero. A weight is ``code * scale``, symmetric around zero, one scale per row and group. The codes are
laid out so that one 64-byte line holds every row's next inputs: a vector register with a lane per row needs no
shuffles.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import CheckpointError, UsageError
from tightfit.weights.formats.base import TILE_ROWS, Format

if TYPE_CHECKING:
    import torch

SMALLEST_SCALE = 2.0**-126  # the smallest normal bfloat16; a group that would need less is stored as zeros


@dataclass(frozen=True)
class Tiled(Format):
    """``bits`` per code; ``group`` inputs share a scale (16 to 128, a multiple of 8)."""

    bits: ClassVar[int]
    group: int = 32

    def __post_init__(self) -> None:
        if not 16 <= self.group <= 128 or self.group % 8:
            raise UsageError(
                f"{self.name} cannot have groups of {self.group}",
                "A group is 16 to 128 inputs and a multiple of 8, for example group=32.",
            )

    @property
    def tile_bytes(self) -> int:
        return TILE_ROWS * (self.group * self.bits // 8 + 2)

    def nbytes(self, rows: int, cols: int) -> int:
        return -(-rows // TILE_ROWS) * -(-cols // self.group) * self.tile_bytes

    def encode(self, block: torch.Tensor, data: torch.Tensor, row: int) -> None:
        import torch

        rows, cols = block.shape
        tiles, groups = -(-rows // TILE_ROWS), -(-cols // self.group)
        padded = torch.empty(tiles * TILE_ROWS, groups * self.group)
        padded[rows:].zero_()
        padded[:, cols:].zero_()
        padded[:rows, :cols] = block
        values = padded.view(tiles, TILE_ROWS, groups, self.group)

        # (tiles, 16, groups); aminmax does the same four times slower
        scales = self._scales(values.amin(dim=-1), values.amax(dim=-1)).to(torch.bfloat16)
        if not scales.isfinite().all():
            raise CheckpointError(
                f"a weight in rows {row} to {row + rows - 1} is not a finite number",
                "The checkpoint is damaged; --weights bf16 keeps its values as they are.",
            )
        scales[scales.abs() < SMALLEST_SCALE] = 0
        divisors = scales.float().masked_fill_(scales == 0, float("inf"))  # anything / inf is code 0
        values.div_(divisors.unsqueeze(-1)).round_()

        start = self.nbytes(row, cols)
        stored = data[start : start + self.nbytes(rows, cols)].view(tiles, groups, self.tile_bytes)
        self._store(values, stored[..., : -2 * TILE_ROWS])
        stored[..., -2 * TILE_ROWS :].view(torch.bfloat16).copy_(scales.transpose(1, 2))

    @abstractmethod
    def _scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        """The scales of groups whose values lie between ``low`` and ``high``."""

    @abstractmethod
    def _store(self, codes: torch.Tensor, stored: torch.Tensor) -> None:
        """Clamp ``codes`` (tiles, 16, groups, group), whole numbers in float32, and pack them; they may be overwritten.

        ``stored`` is (tiles, groups, bytes of codes), uint8.
        """


@technique(
    seam="weights",
    name="int8",
    paper="https://arxiv.org/abs/2208.07339",
    exact=False,
    summary="8-bit codes, one scale per row and group of inputs",
)
@dataclass(frozen=True)
class Int8(Tiled):
    """Rounding to the nearest of 255 levels: the absmax quantisation of LLM.int8(), with groups instead of whole rows.

    Codes are -127 to 127; the error is at most half a step. In a tile, each run of 4 inputs takes 64 bytes: byte
    ``r * 4 + k`` is row r's input k.
    """

    kind = "int8"
    bits = 8

    def _scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return high.maximum(low.neg()).div_(127)

    def _store(self, codes: torch.Tensor, stored: torch.Tensor) -> None:
        import torch

        tiles, _, groups, group = codes.shape
        runs = codes.clamp_(-127, 127).view(tiles, TILE_ROWS, groups, group // 4, 4).permute(0, 2, 3, 1, 4)
        stored.view(torch.int8).view(tiles, groups, group // 4, TILE_ROWS, 4).copy_(runs)


@technique(
    seam="weights",
    name="int4",
    paper="https://github.com/ggml-org/llama.cpp (q4_0)",
    exact=False,
    summary="4-bit codes, one scale per row and group of inputs",
)
@dataclass(frozen=True)
class Int4(Tiled):
    """Rounding to the nearest of 16 levels, -8 to 7, where the group's value of largest magnitude is -8.

    That is llama.cpp's q4_0 with a bfloat16 scale. The error is at most half a step, except that values beyond 7.5
    steps on the other side become 7, about one step off. In a tile, each run of 8 inputs takes 64 bytes: the low half
    of byte ``r * 4 + k`` is row r's input k, the high half its input ``4 + k``, both stored as code + 8.
    """

    kind = "int4"
    bits = 4

    def _scales(self, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
        return high.where(high >= low.neg(), low).div_(-8)

    def _store(self, codes: torch.Tensor, stored: torch.Tensor) -> None:
        tiles, _, groups, group = codes.shape
        runs = codes.clamp_(-8, 7).add_(8).view(tiles, TILE_ROWS, groups, group // 8, 2, 4)
        packed = runs[..., 1, :].mul_(16).add_(runs[..., 0, :]).permute(0, 2, 3, 1, 4)
        stored.view(tiles, groups, group // 8, TILE_ROWS, 4).copy_(packed)
