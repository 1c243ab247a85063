"""Rotary embeddings: the frequencies of every kind that checkpoints name.

``default`` (RoFormer, https://arxiv.org/abs/2104.09864), ``linear`` (position interpolation,
https://arxiv.org/abs/2306.15595), ``dynamic`` (NTK-aware, grows with the sequence), ``llama3``, ``yarn``
(https://arxiv.org/abs/2309.00071) and ``longrope`` (https://arxiv.org/abs/2402.13753). Names and meaning of the
settings are those of transformers' ``rope_parameters``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from tightfit.budget.ledger import Workspace
from tightfit.errors import CheckpointError
from tightfit.kernels import ops
from tightfit.model.batch import Batch
from tightfit.model.spec import RopeSpec


class Tables(NamedTuple):
    """Cosines and sines (tokens, dim/2) of the positions of a batch; and as ``anchors``, from other positions."""

    cos: torch.Tensor
    sin: torch.Tensor
    anchors: tuple[torch.Tensor, torch.Tensor] | None = None


def frequencies(rope: RopeSpec, length: int) -> tuple[torch.Tensor, float]:
    """Inverse frequencies (dim/2,) float32, and the factor by which cosines and sines are scaled, for a sequence of
    ``length`` tokens."""
    p = rope.parameters
    exponent = torch.arange(0, rope.dim, 2, dtype=torch.float32) / rope.dim
    plain = 1.0 / p.rope_theta**exponent
    original = p.original_max_position_embeddings
    if p.rope_type == "linear":
        return plain / p.factor, 1.0
    if p.rope_type == "dynamic":
        stretch = p.factor * max(length, original) / original - (p.factor - 1)
        base = p.rope_theta * stretch ** (rope.dim / (rope.dim - 2))
        return 1.0 / base**exponent, 1.0
    if p.rope_type == "llama3":
        # Low frequencies are divided by the factor, high ones kept, those between blended.
        turns = original * plain / (2 * math.pi)  # rotations within the original context
        smooth = ((turns - p.low_freq_factor) / (p.high_freq_factor - p.low_freq_factor)).clamp(0.0, 1.0)
        return (1 - smooth) * plain / p.factor + smooth * plain, 1.0
    if p.rope_type == "yarn":
        return _yarn(rope)
    if p.rope_type == "longrope":
        factors = torch.tensor(p.long_factor if length > original else p.short_factor, dtype=torch.float32)
        if len(factors) != rope.dim // 2:
            raise CheckpointError(
                f"longrope gives {len(factors)} factors, but {rope.dim // 2} pairs of features are rotated",
                "config.json is damaged or belongs to another model: download it again.",
            )
        scaling = p.attention_factor
        if scaling is None:
            scaling = 1.0 if p.factor <= 1.0 else math.sqrt(1 + math.log(p.factor) / math.log(original))
        return 1.0 / (factors * p.rope_theta**exponent), scaling
    return plain, 1.0


def dependence(rope: RopeSpec, length: int) -> int:
    """What of a sequence's length its frequencies depend on: they are the same where this is."""
    original = rope.parameters.original_max_position_embeddings
    if rope.parameters.rope_type == "dynamic":
        return max(length, original)
    return int(rope.parameters.rope_type == "longrope" and length > original)


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """YaRN's temperature: ``0.1 * mscale * ln(factor) + 1``."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn(rope: RopeSpec) -> tuple[torch.Tensor, float]:
    p, dim = rope.parameters, rope.dim
    scaling = p.attention_factor
    if scaling is None:
        if p.mscale and p.mscale_all_dim:
            scaling = yarn_mscale(p.factor, p.mscale) / yarn_mscale(p.factor, p.mscale_all_dim)
        else:
            scaling = yarn_mscale(p.factor)

    def dimension(rotations: float) -> float:
        """The feature that rotates so often within the original context."""
        turns = p.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(p.rope_theta))

    low, high = dimension(p.beta_fast), dimension(p.beta_slow)
    if p.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
    wavelength = p.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    return ramp / (p.factor * wavelength) + (1 - ramp) / wavelength, scaling


def tables(
    rope: RopeSpec,
    batch: Batch,
    ws: Workspace,
    positions: torch.Tensor | None = None,
    anchors: torch.Tensor | None = None,
) -> Tables:
    """The tables of a batch's positions, or of others (tokens,), in scratch memory; with ``anchors`` (tokens,) those of
    them too.

    Kinds whose frequencies depend on the length use that of each segment's sequence.
    """
    found = _tables(rope, batch, batch.positions if positions is None else positions, ws)
    return Tables(*found, None if anchors is None else _tables(rope, batch, anchors, ws))


def _tables(rope: RopeSpec, batch: Batch, positions: torch.Tensor, ws: Workspace) -> tuple[torch.Tensor, torch.Tensor]:
    cos = ws.empty(batch.size, rope.dim // 2)
    sin = ws.empty(batch.size, rope.dim // 2)
    varies = rope.parameters.rope_type in ("dynamic", "longrope")
    inv_freq, scaling = frequencies(rope, 0)
    for segment, start, stop in batch.pieces:
        if varies:
            inv_freq, scaling = frequencies(rope, segment.length or segment.stop)
        ops.rotation(positions[start:stop], inv_freq, scaling, cos[start:stop], sin[start:stop])
    return cos, sin
