"""The parts of a decoder layer: projections, attention, latent attention, the gated feed-forward and the mixture."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import BaseCache, Turn
from tightfit.model.batch import Batch
from tightfit.model.rope import Tables
from tightfit.model.spec import AttentionSpec, MlpSpec
from tightfit.weights.formats.base import Split
from tightfit.weights.placement.base import Parameters


def project(
    weights: Parameters,
    names: tuple[str, ...],
    shapes: tuple[tuple[int, ...], ...],
    x: torch.Tensor,
    ws: Workspace,
    split: Split,
) -> tuple[torch.Tensor, ...]:
    """``x @ W.T + bias`` for matrices of one input: one (tokens, *shape) for each, side by side in scratch memory of
    the enclosing frame."""
    whole, *parts = ws.columns(x.shape[0], *shapes)
    weights.joined(*names).matmul(x, whole, ws, split)
    for name, part in zip(names, parts, strict=True):
        bias = weights.get(f"{name}.bias")
        if bias is not None:
            ops.add_(part.flatten(1), bias)
    return tuple(parts)


def project_into(
    weights: Parameters,
    name: str,
    x: torch.Tensor,
    out: torch.Tensor,
    ws: Workspace,
    split: Split,
    accumulate: float = 0.0,
) -> None:
    """``out = x @ W.T + bias``, or ``out += accumulate * (x @ W.T + bias)`` where that is not 0."""
    weights[name].matmul(x, out, ws, split, accumulate)
    bias = weights.get(f"{name}.bias")
    if bias is not None:
        ops.add_(out, bias, accumulate or 1.0)


def attention(
    spec: AttentionSpec,
    weights: Parameters,
    x: torch.Tensor,
    batch: Batch,
    cache: BaseCache,
    layer: int,
    tables: Tables | None,
    eps: float,
    out: torch.Tensor,
    ws: Workspace,
    accumulate: float = 0.0,
) -> None:
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) of ``x`` (tokens, hidden) into ``out``, or added to it
    ``accumulate`` times."""
    with ws.frame():
        width = spec.head_dim
        queries, keys = (spec.heads, width), (spec.kv_heads, width)
        if cache.owner(layer) == layer:
            made = project(weights, ("q_proj", "k_proj", "v_proj"), (queries, keys, keys), x, ws, batch.split)
        else:
            made = project(weights, ("q_proj",), (queries,), x, ws, batch.split)
        q, k, v = made if len(made) == 3 else (made[0], None, None)
        if spec.qk_norm == "all":
            for name, tensor in zip(("q_norm", "k_norm"), made[:2], strict=False):
                flat = tensor.flatten(1)
                ops.rms_norm(flat, weights[name], eps, flat)
        if spec.clip_qkv is not None:
            for tensor in made:
                ops.clamp_(tensor, spec.clip_qkv)
        if spec.qk_norm == "head":
            for name, tensor in zip(("q_norm", "k_norm"), made[:2], strict=False):
                ops.rms_norm(tensor, weights[name], eps, tensor)
        turn = None
        if spec.rope is not None and tables is not None:
            turn = Turn((tables.cos, tables.sin), spec.rope.interleaved, tables.anchors)
        held = cache.update(layer, batch, q, k, v, turn, ws)
        attended, heads = ws.columns(x.shape[0], (spec.heads, width))
        scoring = Scoring(spec.scale, spec.window, spec.softcap, weights.get("sinks"))
        cache.attend_step(layer, batch, held, q, heads, ws, scoring)
        project_into(weights, "o_proj", attended, out, ws, batch.split, accumulate)


def mlp(
    spec: MlpSpec,
    weights: Parameters,
    x: torch.Tensor,
    out: torch.Tensor,
    ws: Workspace,
    split: Split,
    accumulate: float = 0.0,
) -> None:
    """``out = down(act(gate(x)) * up(x))`` (https://arxiv.org/abs/2002.05202), or added to ``out`` ``accumulate``
    times."""
    with ws.frame():
        width = (spec.intermediate_size,)
        gate, up = project(weights, ("gate_proj", "up_proj"), (width, width), x, ws, split)
        ops.glu(gate, up, spec.activation, gate, split.parts)
        project_into(weights, "down_proj", gate, out, ws, split, accumulate)
