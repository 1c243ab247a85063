"""The parts of a decoder layer: projections, attention, latent attention, the gated feed-forward and the mixture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kv.cache import Cache
from tightfit.model.batch import Batch
from tightfit.model.rope import Tables, rotate_
from tightfit.model.spec import AttentionSpec, MlpSpec
from tightfit.weights.formats.base import Split

Weights = Mapping[str, Any]  # a layer's parameters by name: Matrix, list of Matrix for experts, or float32 vector


def project(weights: Weights, name: str, x: torch.Tensor, ws: Workspace, split: Split) -> torch.Tensor:
    """``x @ W.T + bias`` (tokens, rows) in scratch memory of the enclosing frame."""
    out = ws.empty(x.shape[0], weights[name].rows)
    project_into(weights, name, x, out, ws, split)
    return out


def project_into(weights: Weights, name: str, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split) -> None:
    """``out = x @ W.T + bias``"""
    weights[name].matmul(x, out, ws, split)
    bias = weights.get(f"{name}.bias")
    if bias is not None:
        ops.add_(out, bias)


def attention(
    spec: AttentionSpec,
    weights: Weights,
    x: torch.Tensor,
    batch: Batch,
    cache: Cache,
    layer: int,
    tables: Tables | None,
    eps: float,
    out: torch.Tensor,
    ws: Workspace,
) -> None:
    """Grouped-query attention (https://arxiv.org/abs/2305.13245) of ``x`` (tokens, hidden) into ``out``."""
    with ws.frame():
        q = project(weights, "q_proj", x, ws, batch.split)
        k = project(weights, "k_proj", x, ws, batch.split)
        v = project(weights, "v_proj", x, ws, batch.split)
        if spec.qk_norm == "all":
            ops.rms_norm(q, weights["q_norm"], eps, q)
            ops.rms_norm(k, weights["k_norm"], eps, k)
        if spec.clip_qkv is not None:
            for tensor in (q, k, v):
                ops.clamp_(tensor, spec.clip_qkv)
        heads = q.view(-1, spec.heads, spec.head_dim)
        keys, values = (tensor.view(-1, spec.kv_heads, spec.head_dim) for tensor in (k, v))
        if spec.qk_norm == "head":
            ops.rms_norm(heads, weights["q_norm"], eps, heads)
            ops.rms_norm(keys, weights["k_norm"], eps, keys)
        if spec.rope is not None and tables is not None:
            rotate_(heads, *tables, spec.rope.interleaved, ws)
            rotate_(keys, *tables, spec.rope.interleaved, ws)
        attended = ws.empty(*heads.shape)
        for segment, a, b in batch.pieces:
            cache.append(layer, segment.slot, segment.start, keys[a:b], values[a:b])
            cache.attend(
                layer,
                segment.slot,
                segment.start,
                heads[a:b],
                attended[a:b],
                ws,
                scale=spec.scale,
                window=spec.window,
                softcap=spec.softcap,
                sinks=weights.get("sinks"),
                gemm=not segment.decode,
            )
        project_into(weights, "o_proj", attended.view(x.shape[0], -1), out, ws, batch.split)


def mlp(spec: MlpSpec, weights: Weights, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split) -> None:
    """``out = down(act(gate(x)) * up(x))`` (https://arxiv.org/abs/2002.05202)."""
    with ws.frame():
        gate = project(weights, "gate_proj", x, ws, split)
        up = project(weights, "up_proj", x, ws, split)
        ops.glu(gate, up, spec.activation, gate, split.parts())
        project_into(weights, "down_proj", gate, out, ws, split)
