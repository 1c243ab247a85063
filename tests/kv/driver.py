"""Tiny random models, and what drives them with a cache step by step, as the engine does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tests.parity.harness import ROOM, make, save
from transformers import DeepseekV3Config, LlamaConfig, PreTrainedModel, Qwen2Config

from tightfit.budget.ledger import Arena, Workspace
from tightfit.catalog import spec_string
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine.engine import Engine
from tightfit.engine.fit import Observing
from tightfit.kernels import pages
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import Pages
from tightfit.kv.base import LayerLayout
from tightfit.kv.cache import Cache
from tightfit.kv.compose import Composition, compose
from tightfit.kv.fitted import NOTHING, Findings, Known
from tightfit.kv.make import cache_of
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder, cache_layouts
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import OWN
from tightfit.weights.placement.resident import Resident

SIZES: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
CONFIGS = {
    # three query heads to a key-value head, and values of which the second group of 32 channels is not full
    "llama": lambda: LlamaConfig(**SIZES, head_dim=40),
    "sliding": lambda: Qwen2Config(
        **SIZES,
        use_sliding_window=True,
        sliding_window=40,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "latent": lambda: DeepseekV3Config(
        **SIZES | {"num_key_value_heads": 6},
        kv_lora_rank=36,
        q_lora_rank=None,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=9,
        moe_intermediate_size=17,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=3,  # no mixture at all
    ),
}


@dataclass
class Tiny:
    """A random model, as transformers has it and in our decoder."""

    theirs: PreTrainedModel
    spec: ModelSpec
    decoder: Decoder
    dtype: torch.dtype  # of the cache and of products in prefill

    @classmethod
    def make(cls, name: str, dtype: torch.dtype, folder: Path, seed: int = 0) -> Tiny:
        theirs = make(CONFIGS[name](), seed)
        checkpoint = open_checkpoint(str(save(theirs, folder)))
        spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
        formats = dict.fromkeys(range(len(spec.layers)), OWN)
        placement = Resident(checkpoint, spec, OWN, formats, dtype, Arena(ROOM))
        placement.load()
        checkpoint.close()
        return cls(theirs, spec, Decoder(spec, placement), dtype)

    def tokens(self, count: int, seed: int = 1) -> list[int]:
        return torch.randint(self.spec.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()

    def encode(self, text: str) -> list[int]:
        return [ord(letter) % self.spec.vocab_size for letter in text]

    def findings(self, kv: str) -> Findings:
        """What the first method of ``kv`` that must know something of the model finds in a text of random tokens."""
        method = compose(kv).fitted[0]
        cache = Cache(cache_layouts(self.spec, 512, 64), 1, self.dtype, Arena(ROOM), self.dtype, 64)
        engine = Engine(self.decoder, cache, Workspace(Arena(ROOM)), 512, 64, 1)
        observed = Observing(engine, "tiny", self.tokens(600, seed=9), self.encode, ROOM)
        return method.fit(observed, lambda done, total: None)

    def known(self, kv: str) -> Known:
        """What the methods of ``kv`` must know of the model."""
        return Known(tensors={method.name: self.findings(spec_string(method)).tensors for method in compose(kv).fitted})

    def run(self, kv: str | Composition, **settings: Any) -> Run:
        return Run(self, kv, **settings)


class Run:
    """Sequences of a model in a cache of the composition ``kv``, prefilled ``chunk`` tokens at a time."""

    def __init__(
        self,
        tiny: Tiny,
        kv: str | Composition,
        *,
        context: int = 512,
        sequences: int = 1,
        chunk: int = 64,
        tail: int = 1,
        known: Known = NOTHING,
    ) -> None:
        self.tiny, self.chunk = tiny, chunk
        self.ws, self.arena = Workspace(Arena(ROOM)), Arena(ROOM)
        layouts, common = cache_layouts(tiny.spec, context, chunk), (sequences, tiny.dtype, self.arena, tiny.dtype)
        composition = compose(kv) if isinstance(kv, str) else kv
        self.cache = cache_of(composition, layouts, context, *common, chunk, known, tail)
        self.lengths = [0] * sequences

    @property
    def paged(self) -> PagedCache:
        stored = self.cache.stored
        assert isinstance(stored, PagedCache)
        return stored

    def prefill(self, tokens: Sequence[int], slot: int = 0, layered: bool = False) -> torch.Tensor:
        """Logits (vocab,) after the last of ``tokens``, with which a sequence goes on."""
        start, count = self.lengths[slot], len(tokens)
        at_once = count if layered else self.chunk
        for a in range(0, count, at_once):
            part = Segment(slot, start + a, tokens[a : a + at_once], length=start + count)
            self.cache.begin(slot, part.start)
            logits = self.step(part, layered=layered)[-1]
            self.cache.prefilled(slot, part.start, part.stop)
        self.lengths[slot] += count
        return logits

    @torch.inference_mode()
    def step(self, *segments: Segment, layered: bool = False) -> torch.Tensor:
        """Logits of all rows for which they are wanted; what decodes is not committed."""
        decoder, batch = self.tiny.decoder, Batch.of(segments)
        with self.ws.frame():
            hidden = (
                decoder.hidden_layered(segments[0], self.chunk, self.cache, self.ws)
                if layered
                else decoder.hidden(batch, self.cache, self.ws)
            )
            return decoder.logits(hidden, self.ws).clone()

    def verify(self, tokens: Sequence[int], parents: Sequence[int] | None = None, slot: int = 0) -> torch.Tensor:
        """Logits (n, vocab) of tokens that stay tentative."""
        return self.step(Segment(slot, self.lengths[slot], tokens, decode=True, logits="all", parents=parents))

    def commit(self, path: Sequence[int], slot: int = 0) -> None:
        with torch.inference_mode():
            self.cache.commit(slot, path, self.ws)
        self.lengths[slot] += len(path)

    def decode(self, token: int, slot: int = 0) -> torch.Tensor:
        """Logits (vocab,) after one more token."""
        logits = self.verify([token], slot=slot)[0]
        self.commit([0], slot)
        return logits

    def generate(self, logits: torch.Tensor, count: int, slot: int = 0) -> tuple[list[int], list[torch.Tensor]]:
        """The next ``count`` tokens, and the logits after each."""
        tokens, after = [], []
        for _ in range(count):
            tokens.append(choose(logits, self.lengths[slot]))
            logits = self.decode(tokens[-1], slot)
            after.append(logits)
        return tokens, after

    def positions(self, layer: int, head: int, slot: int = 0) -> list[int]:
        """The positions that a head keeps."""
        kept = self.paged.layers[layer]
        length = int(kept.lengths[slot, head])
        return list(range(length)) if kept.positions is None else kept.positions[slot, head, :length].tolist()


def offset(logits: torch.Tensor, position: int) -> torch.Tensor:
    """Logits of the token at ``position`` with an offset, without which random models soon repeat one word."""
    offsets = torch.randn(logits.shape, generator=torch.Generator().manual_seed(position))
    return logits + logits.std() * offsets


def choose(logits: torch.Tensor, position: int) -> int:
    """The token at ``position``: the most likely one after the offset."""
    return int(offset(logits, position).argmax())


class Layer:
    """One layer alone, and one sequence: tokens are given as queries, keys and values."""

    def __init__(self, kv: str | Composition, layout: LayerLayout, context: int = 512, known: Known = NOTHING) -> None:
        self.arena, self.ws, self.layout = Arena(ROOM), Workspace(Arena(ROOM)), layout
        composition = compose(kv) if isinstance(kv, str) else kv
        self.cache = PagedCache([layout], composition, context, 1, torch.float32, self.arena, known=known)
        self.start = 0

    def add(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, decode: bool = False) -> torch.Tensor:
        """Attention (n, heads, value_dim) of tokens ``q`` (n, heads, key_dim), ``k`` (n, kv_heads, key_dim) and ``v``
        (n, kv_heads, value_dim): a chunk of a prompt, or tokens that decode one after the other."""
        if decode and len(q) > 1:
            return torch.cat([self.add(*(x[i : i + 1] for x in (q, k, v)), decode=True) for i in range(len(q))])
        out, stop = torch.empty(len(q), self.layout.heads, self.layout.value_dim), self.start + len(q)
        batch = Batch((Segment(0, self.start, [0] * len(q), decode),))
        if not decode:
            self.cache.begin(0, self.start)
        with self.ws.frame():
            held = self.cache.update(0, batch, q.clone(), k, v, None, self.ws)
            self.cache.attend_step(0, batch, held, q, out, self.ws, Scoring(self.layout.key_dim**-0.5))
        if decode:
            self.cache.commit(0, [0], self.ws)
        else:
            self.cache.prefilled(0, self.start, stop)
        self.start = stop
        return out

    @property
    def pages(self) -> Pages:
        return self.cache.layers[0]

    def length(self, head: int) -> int:
        return int(self.pages.lengths[0, head])

    def positions(self, head: int) -> list[int]:
        assert self.pages.positions is not None
        return self.pages.positions[0, head, : self.length(head)].tolist()

    def read(self, head: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys (n, key_dim) and values (n, value_dim) of what a head keeps, as attention sees them."""
        heads, dims = self.layout.kv_heads, (self.layout.key_dim, self.layout.value_dim)
        nothing = pages.Run(*(torch.empty(heads, 1, dim) for dim in dims), 0)
        with self.ws.frame():
            k, v = pages.read(self.pages, 0, head, nothing, 0, self.length(head), self.ws)
            return k.clone(), v.clone()
