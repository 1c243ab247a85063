"""The model as it is trained: float32 parameters, named as in the checkpoint that it is saved to.

Training needs whole rows and gradients; running needs caches, ragged batches and a ledger. So this is not the decoder
of :mod:`tightfit.model`, and shares only the file format with it.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from tightfit.zoo.presets import Shape


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.hidden_size))
        self.eps = shape.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.weight.shape, self.weight, self.eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding of ``x`` (rows, heads, tokens, head_dim) by angles (tokens, head_dim / 2)."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.head_dim = shape.head_dim
        self.groups = shape.num_attention_heads // shape.num_key_value_heads
        queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim
        self.q_proj = _linear(shape.hidden_size, queries)
        self.k_proj = _linear(shape.hidden_size, keys)
        self.v_proj = _linear(shape.hidden_size, keys)
        self.o_proj = _linear(queries, shape.hidden_size)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # (rows, heads, tokens, head_dim)
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = (rotate(k, cos, sin).repeat_interleave(self.groups, 1), v.repeat_interleave(self.groups, 1))
        attended = functional.scaled_dot_product_attention(rotate(q, cos, sin), k, v, is_causal=True)
        return cast(Tensor, self.o_proj(attended.transpose(1, 2).flatten(2)))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = _linear(shape.hidden_size, shape.intermediate_size)
        self.up_proj = _linear(shape.hidden_size, shape.intermediate_size)
        self.down_proj = _linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class Expert(nn.Module):
    """The same SwiGLU with the names that Mixtral's checkpoints give it: ``w1`` gate, ``w2`` down, ``w3`` up."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.w1 = _linear(shape.hidden_size, shape.intermediate_size)
        self.w2 = _linear(shape.intermediate_size, shape.hidden_size)
        self.w3 = _linear(shape.hidden_size, shape.intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w2(functional.silu(self.w1(x)) * self.w3(x)))


class Experts(nn.Module):
    """A mixture of experts: each token goes to the few with the highest router probability, weighted by it."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.active = shape.num_experts_per_tok
        self.gate = _linear(shape.hidden_size, shape.num_local_experts)
        self.experts = nn.ModuleList(Expert(shape) for _ in range(shape.num_local_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The mixed output, and the load-balancing loss of Fedus et al. 2021 (https://arxiv.org/abs/2101.03961, eq. 4),
        with the share of assignments in place of the share of tokens, as more than one expert is active."""
        tokens = x.flatten(0, 1)
        probabilities = self.gate(tokens).float().softmax(-1)  # (tokens, experts)
        weights, chosen = probabilities.topk(self.active, -1)  # (tokens, active)
        weights = weights / weights.sum(-1, keepdim=True)
        mixed = torch.zeros_like(tokens)
        for index, expert in enumerate(self.experts):
            token, slot = (chosen == index).nonzero(as_tuple=True)
            mixed.index_add_(0, token, (expert(tokens[token]) * weights[token, slot, None]).to(mixed.dtype))
        experts = len(self.experts)
        load = chosen.flatten().bincount(minlength=experts) / chosen.numel()
        return mixed.view_as(x), experts * (load * probabilities.mean(0)).sum()


class Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = Norm(shape)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = Norm(shape)
        if shape.num_local_experts:
            self.block_sparse_moe = Experts(shape)
        else:
            self.mlp = MLP(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        normed = self.post_attention_layernorm(x)
        if hasattr(self, "mlp"):
            return x + self.mlp(normed), x.new_zeros(())
        mixed, balance = self.block_sparse_moe(normed)
        return x + mixed, balance


class Backbone(nn.Module):
    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = Norm(shape)


class CausalLM(nn.Module):
    """The whole model, with the embedding as its output matrix."""

    def __init__(self, shape: Shape, vocab_size: int) -> None:
        super().__init__()
        self.shape = shape
        self.vocab_size = vocab_size
        self.model = Backbone(shape, vocab_size)
        # What writes into the residual stream starts smaller, so that its variance does not grow with depth (GPT-2).
        residual = 0.02 / math.sqrt(2 * shape.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
                nn.init.normal_(parameter, std=residual if writes else 0.02)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (rows, tokens, vocabulary) of ``ids`` (rows, tokens), and the routers' mean load-balancing loss."""
        half = torch.arange(0, self.shape.head_dim, 2, device=ids.device, dtype=torch.float32)
        frequencies = self.shape.rope_theta ** (-half / self.shape.head_dim)
        angles = torch.arange(ids.shape[1], device=ids.device, dtype=torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        x = self.model.embed_tokens(ids)
        balance = x.new_zeros(())
        for layer in self.model.layers:
            x, layer_balance = layer(x, cos, sin)
            balance = balance + layer_balance / len(self.model.layers)
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight), balance

    def save(self, folder: Path) -> None:
        """Writes ``config.json`` and ``model.safetensors`` (bfloat16). A file is replaced only by a complete one."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {
            name: value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in self.state_dict().items()
        }
        temporary = folder / "model.safetensors.partial"
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.shape.config(self.vocab_size), indent=1) + "\n")
