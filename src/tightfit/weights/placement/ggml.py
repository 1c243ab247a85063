"""The quantised types of GGUF files (https://github.com/ggml-org/ggml): runs of blocks, each with its codes and scales.

A number is ``code * scale + offset``. Blocks of 32 have a float16 for each of the two (no offset where codes lie around
zero). The K types have 256 inputs to a block, and for each 32 (Q6_K: 16) of them a scale and an offset that are a
float16 of the block times a whole number. MXFP4 has codes that are floats, e2m1, and scales that are powers of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tightfit.checkpoints.checkpoint import Checkpoint, TensorInfo
from tightfit.errors import CheckpointError
from tightfit.weights.placement.blockscaled import E2M1, POWERS

LEVELS = torch.tensor(E2M1)


@dataclass(frozen=True)
class Block:
    """A type's blocks: of how many inputs, in how many bytes, and which inputs of it share a scale. The lowest code
    means ``zero`` steps below zero where there is no offset."""

    inputs: int
    nbytes: int
    group: int
    zero: int = 0


TYPES = {
    "Q8_0": Block(32, 34, 32, 128),
    "Q4_0": Block(32, 18, 32, 8),
    "Q4_1": Block(32, 20, 32),
    "Q5_0": Block(32, 22, 32, 16),
    "Q5_1": Block(32, 24, 32),
    "Q4_K": Block(256, 144, 32),
    "Q5_K": Block(256, 176, 32),
    "Q6_K": Block(256, 210, 16, 32),
    "MXFP4": Block(32, 17, 32),
}


@dataclass(frozen=True)
class Codes:
    """Of n rows of some inputs: ``codes`` (n, inputs) uint8, the lowest one 0, and float32 ``scales`` and ``offsets``
    (n, groups), exactly as the file means them. Codes of MXFP4 are those of e2m1."""

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None


def row_nbytes(info: TensorInfo) -> int:
    block = TYPES[info.dtype]
    return info.shape[-1] // block.inputs * block.nbytes


def read_rows(checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, step: int, out: torch.Tensor) -> None:
    """Fills ``out`` (n, cols), float32 and contiguous, with every ``step``-th row from ``start`` of the ``expert``-th
    matrix of a tensor. Scratch beside ``out``: at most twice as much."""
    raw = read_blocks(checkpoint, info, expert, start, (len(out) - 1) * step + 1)[::step]
    block, found = TYPES[info.dtype], unpack(raw.contiguous(), info.dtype)
    grouped = out.view(len(out), -1, block.group)
    if info.dtype == "MXFP4":
        torch.index_select(LEVELS, 0, found.codes.int().flatten(), out=out.view(-1))
    else:
        out.copy_(found.codes)
        out.sub_(block.zero)
    grouped.mul_(found.scales.unsqueeze(-1))
    if found.offsets is not None:
        grouped.add_(found.offsets.unsqueeze(-1))


def read_blocks(checkpoint: Checkpoint, info: TensorInfo, expert: int, start: int, count: int) -> torch.Tensor:
    """(count, bytes of a row) uint8: rows from ``start`` of the ``expert``-th matrix, as they are stored."""
    nbytes = row_nbytes(info)
    rows = info.shape[-2] if len(info.shape) > 1 else 1
    raw = torch.empty(count, nbytes, dtype=torch.uint8)
    checkpoint.read_into(info, (expert * rows + start) * nbytes, raw.view(-1).numpy().data)
    return raw


def unpack(raw: torch.Tensor, dtype: str) -> Codes:
    """The codes of rows (n, bytes of a row) as they are stored."""
    blocks = raw.view(-1, TYPES[dtype].nbytes)
    codes, scales, offsets = UNPACK[dtype](blocks)
    rows = len(raw)
    return Codes(codes.view(rows, -1), scales.view(rows, -1), None if offsets is None else offsets.view(rows, -1))


Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # codes, scales and offsets of each block


def _halves(stored: torch.Tensor) -> torch.Tensor:
    return stored.contiguous().view(torch.float16).float()


def _nibbles(stored: torch.Tensor, run: int) -> torch.Tensor:
    """(blocks, inputs): of each ``run`` bytes first the low halves, then the high ones."""
    both = stored.unflatten(1, (-1, 1, run))
    return torch.cat([both & 15, both >> 4], dim=2).flatten(1)


def _fifth_bits(stored: torch.Tensor) -> torch.Tensor:
    """(blocks, 32), 0 or 16: bit j of four bytes is that of input j."""
    return ((stored.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1) << 4).flatten(1)


def _q8_0(blocks: torch.Tensor) -> Parts:
    return blocks[:, 2:] ^ 128, _halves(blocks[:, :2]), None


def _q4_0(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 2:], 16), _halves(blocks[:, :2]), None


def _q4_1(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 4:], 16), _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _q5_0(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 6:], 16) | _fifth_bits(blocks[:, 2:6]), _halves(blocks[:, :2]), None


def _q5_1(blocks: torch.Tensor) -> Parts:
    codes = _nibbles(blocks[:, 8:], 16) | _fifth_bits(blocks[:, 4:8])
    return codes, _halves(blocks[:, :2]), _halves(blocks[:, 2:4])


def _six_bits(stored: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight scales and eight offsets in 12 bytes: four of each in the lower six bits of the first bytes, whose upper
    bits belong to the others."""
    low, middle, both = stored.unflatten(1, (3, 4)).unbind(1)
    scales = torch.cat([low & 63, both & 15 | (low >> 6 << 4)], dim=1)
    return scales.float(), torch.cat([middle & 63, both >> 4 | (middle >> 6 << 4)], dim=1).float()


def _k_scales(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    scales, offsets = _six_bits(blocks[:, 4:16])
    return scales.mul_(_halves(blocks[:, :2])), offsets.mul_(_halves(blocks[:, 2:4]).neg_())


def _q4_k(blocks: torch.Tensor) -> Parts:
    return _nibbles(blocks[:, 16:], 32), *_k_scales(blocks)


def _q5_k(blocks: torch.Tensor) -> Parts:
    # Bit j of byte i is that of input 32 * j + i.
    fifth = (blocks[:, 16:48].unsqueeze(1) >> torch.arange(8, dtype=torch.uint8).view(8, 1) & 1) << 4
    return _nibbles(blocks[:, 48:], 32) | fifth.flatten(1), *_k_scales(blocks)


def _q6_k(blocks: torch.Tensor) -> Parts:
    # Of each 128 inputs, bits 2j and 2j + 1 of byte i are those of input 32 * j + i.
    places = torch.tensor([0, 2, 4, 6], dtype=torch.uint8).view(4, 1)
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> places & 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return _nibbles(blocks[:, :128], 64) | high.flatten(1), scales.mul_(_halves(blocks[:, 208:])), None


def _mxfp4(blocks: torch.Tensor) -> Parts:
    exponents = blocks[:, :1].int()
    if int(exponents.max()) == 255:
        raise CheckpointError("a scale is not a number", "The checkpoint is damaged: download it again.")
    return _nibbles(blocks[:, 1:], 16), POWERS[exponents], None


UNPACK = {
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "MXFP4": _mxfp4,
}
