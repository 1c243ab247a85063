"""A llama whose layers read the keys and values of others, in plain torch: what such checkpoints are compared with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

RATE = 5e-3
VOCAB, HIDDEN, HEADS, KV_HEADS, DIM, FFN = 64, 48, 4, 2, 16, 64
Kept = dict[int, tuple[Tensor, Tensor]]  # of each layer that has some: keys and values (rows, kv_heads, tokens, dim)


class Layer(nn.Module):
    def __init__(self, has_keys: bool) -> None:
        super().__init__()
        self.self_attn, self.mlp = nn.Module(), nn.Module()
        sizes = {"q_proj": (HIDDEN, HEADS * DIM), "o_proj": (HEADS * DIM, HIDDEN)}
        if has_keys:
            sizes |= dict.fromkeys(("k_proj", "v_proj"), (HIDDEN, KV_HEADS * DIM))
        for name, (inputs, outputs) in sizes.items():
            setattr(self.self_attn, name, nn.Linear(inputs, outputs, bias=False))
        for name in ("gate_proj", "up_proj"):
            setattr(self.mlp, name, nn.Linear(HIDDEN, FFN, bias=False))
        self.mlp.down_proj = nn.Linear(FFN, HIDDEN, bias=False)
        self.input_layernorm, self.post_attention_layernorm = (nn.RMSNorm(HIDDEN, 1e-5) for _ in range(2))


class SharingLlama(nn.Module):
    """``layer_types`` as checkpoints have them; ``nodiag``: no query of any layer sees its own token."""

    def __init__(self, layer_types: str, window: int = 8, nodiag: bool = False, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layer_types, self.window, self.nodiag = layer_types, window, nodiag
        parts = layer_types.split("_")
        self.owners = [int(part.rstrip("s")) for part in parts]
        self.slides = [part.endswith("s") for part in parts]
        self.allowed: Callable[[Tensor], Tensor] | None = None  # (rows, tokens, tokens) bool of ids: who may see whom
        self._allowed: Tensor | None = None
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(VOCAB, HIDDEN)
        self.model.layers = nn.ModuleList(Layer(index in self.owners) for index in range(len(parts)))
        nn.init.normal_(self.model.embed_tokens.weight, std=0.2)
        self.model.norm = nn.RMSNorm(HIDDEN, 1e-5)

    def forward(self, ids: Tensor, passes: int = 9, kept: Kept | None = None) -> tuple[Tensor, Kept]:
        """Logits (rows, tokens, vocabulary) of tokens ``ids`` (rows, tokens) behind those of which ``kept`` is there,
        and what is kept then. Layers that read later ones are computed ``passes`` times, with zeros at first."""
        before = kept or {}
        self._allowed = None if self.allowed is None else self.allowed(ids)[:, None]
        start = next((k.shape[2] for k, _ in before.values()), 0)
        rows, count = ids.shape
        x = self.model.embed_tokens(ids)
        now: Kept = {}
        for owner in set(self.owners):
            zeros = x.new_zeros(rows, KV_HEADS, count, DIM)
            now[owner] = self._behind(before.get(owner), zeros, zeros)
        index = 0
        while index < len(self.owners):
            top = index
            if self.owners[index] > index:
                while top < max(self.owners[index : top + 1]):
                    top = max(self.owners[index : top + 1])
            entered = x
            for _ in range(passes if top > index else 1):
                x = entered
                for layer in range(index, top + 1):
                    x = self._layer(layer, x, start, before, now)
            index = top + 1
        return functional.linear(self.model.norm(x), self.model.embed_tokens.weight), now

    @staticmethod
    def _behind(before: tuple[Tensor, Tensor] | None, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return (k, v) if before is None else (torch.cat([before[0], k], 2), torch.cat([before[1], v], 2))

    def _layer(self, index: int, x: Tensor, start: int, before: Kept, now: Kept) -> Tensor:
        layer, owner, count = self.model.layers[index], self.owners[index], x.shape[1]
        normed, attention = layer.input_layernorm(x), layer.self_attn
        q = self._turned(attention.q_proj(normed), start)
        if index in self.owners:
            k = self._turned(attention.k_proj(normed), start)
            v = attention.v_proj(normed).unflatten(-1, (-1, DIM)).transpose(1, 2)
            now[index] = self._behind(before.get(index), k, v)
        k, v = (tensor.repeat_interleave(HEADS // KV_HEADS, 1) for tensor in now[owner])
        own = start + torch.arange(count)[:, None]
        there = torch.arange(start + count)
        seen = there < own if self.nodiag or owner > index else there <= own
        if self.slides[index]:
            seen = seen & (there > own - self.window)
        if self._allowed is not None:
            seen = seen & self._allowed
        weights = (q @ k.transpose(2, 3) * DIM**-0.5).masked_fill(~seen, -torch.inf).softmax(-1)
        attended = weights.nan_to_num(0.0) @ v  # the first token may see nothing
        x = x + attention.o_proj(attended.transpose(1, 2).flatten(2))
        normed, mlp = layer.post_attention_layernorm(x), layer.mlp
        return x + mlp.down_proj(functional.silu(mlp.gate_proj(normed)) * mlp.up_proj(normed))

    @staticmethod
    def _turned(x: Tensor, start: int) -> Tensor:
        x = x.unflatten(-1, (-1, DIM)).transpose(1, 2)
        frequencies = 10000.0 ** (-torch.arange(0, DIM, 2) / DIM)
        angles = (start + torch.arange(x.shape[2]))[:, None] * frequencies
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def save(self, folder: Path, **config: object) -> Path:
        """As a checkpoint."""
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().contiguous() for name, value in self.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        values = {
            "model_type": "lckv-llama",
            "layer_types": self.layer_types,
            "sliding_window": self.window,
            "force_nodiag": self.nodiag,
            "vocab_size": VOCAB,
            "hidden_size": HIDDEN,
            "intermediate_size": FFN,
            "num_hidden_layers": len(self.owners),
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV_HEADS,
            "head_dim": DIM,
            "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": True,
        }
        (folder / "config.json").write_text(json.dumps(values | config))
        return folder


WORDS = 12  # tokens 1 to 12: few are learned soon
FOLLOWS = 1 + torch.cat([torch.zeros(1).long(), torch.randperm(WORDS, generator=torch.Generator().manual_seed(7))])
TOKENS = 24
Make = Callable[[int, torch.Generator], Tensor]
Nats = Callable[[Tensor, Tensor], Tensor]


def woven(rows: int, generator: torch.Generator) -> Tensor:
    """Tokens (rows, TOKENS): two walks in turns, so that a token follows from the one before the last."""
    tokens = [torch.randint(1, WORDS + 1, (2, rows), generator=generator)]
    while len(tokens) < TOKENS // 2:
        tokens.append(FOLLOWS[tokens[-1]])
    return torch.cat(tokens).T.contiguous()


def nats(logits: Tensor, ids: Tensor) -> Tensor:
    """Per token that follows from others."""
    return functional.cross_entropy(logits[:, 1:-1].flatten(0, 1), ids[:, 2:].flatten())


def train(network: SharingLlama, steps: int, make: Make = woven, nats: Nats = nats, seed: int = 1) -> float:
    """Trains with what ``make`` gives, (rows, tokens); gives nats per token in other such."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    for step in range(steps):
        ids = make(16, generator)
        loss = nats(network(ids, 3)[0], ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] = RATE * (1 - step / steps)
    with torch.no_grad():
        ids = make(64, generator)
        return float(nats(network(ids)[0], ids))
