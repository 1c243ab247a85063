"""Multi-head latent attention (DeepSeek-V2, https://arxiv.org/abs/2405.04434) on the latents themselves.

The up-projection of the keys is multiplied into the queries and that of the values into the outputs (the paper's
"absorbed" form), so that the cache holds one latent and one rotated key for each token, whatever the number of heads.
"""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring, rotate_
from tightfit.kv.base import BaseCache
from tightfit.model.batch import Batch
from tightfit.model.parts import project, project_into
from tightfit.model.rope import Tables
from tightfit.model.spec import LatentAttentionSpec
from tightfit.weights.placement.base import Parameters


def latent_attention(
    spec: LatentAttentionSpec,
    weights: Parameters,
    x: torch.Tensor,
    batch: Batch,
    cache: BaseCache,
    layer: int,
    tables: Tables,
    out: torch.Tensor,
    ws: Workspace,
    accumulate: float = 0.0,
) -> None:
    """Attention of ``x`` (tokens, hidden) into ``out`` (tokens, hidden), or added to it ``accumulate`` times."""
    tokens, split = x.shape[0], batch.split
    rank, nope, width = spec.kv_lora_rank, spec.qk_nope_head_dim, spec.v_head_dim
    with ws.frame():
        per_head = (spec.heads, nope + spec.qk_rope_head_dim)
        down = ("kv_a_proj_with_mqa",), ((1, spec.key_dim),)
        if spec.q_lora_rank is None:
            heads, key = project(weights, ("q_proj", *down[0]), (per_head, *down[1]), x, ws, split)
        else:
            compressed, key = project(weights, ("q_a_proj", *down[0]), ((spec.q_lora_rank,), *down[1]), x, ws, split)
            ops.rms_norm(compressed, weights["q_a_layernorm"], spec.norm_eps, compressed)
            (heads,) = project(weights, ("q_b_proj",), (per_head,), compressed, ws, split)
        latent = key[..., :rank]
        ops.rms_norm(latent, weights["kv_a_layernorm"], spec.norm_eps, latent)
        rotate_(key[..., rank:], tables.cos, tables.sin, spec.rope.interleaved, ws)
        rotate_(heads[..., nope:], tables.cos, tables.sin, spec.rope.interleaved, ws)

        up = weights["kv_b_proj"]  # (heads * (nope + width), rank): for each head its keys' rows, then its values'
        query = ws.empty(tokens, spec.heads, spec.key_dim)
        ops.copy_(query[..., rank:], heads[..., nope:])
        for head in range(spec.heads):
            row = head * (nope + width)
            for a, b in split.parts:
                up.slice(row, row + nope).matmul_t(heads[a:b, head, :nope], query[a:b, head, :rank], ws)
        mixed = ws.empty(tokens, spec.heads, rank)
        held = cache.update(layer, batch, None, key, None, None, ws)
        cache.attend_step(layer, batch, held, query, mixed, ws, Scoring(spec.scale))
        values = ws.empty(tokens, spec.heads, width)
        for head in range(spec.heads):
            row = head * (nope + width) + nope
            up.slice(row, row + width).matmul(mixed[:, head], values[:, head], ws, split)
        project_into(weights, "o_proj", values.view(tokens, -1), out, ws, split, accumulate)
