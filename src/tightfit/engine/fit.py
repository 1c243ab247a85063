"""A model that methods of the cache look at, to find what they must know of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from tightfit.budget.ledger import Workspace
from tightfit.budget.meter import resident_set
from tightfit.budget.units import format_bytes
from tightfit.engine.engine import Engine, use_threads
from tightfit.engine.network import Network, matrices
from tightfit.errors import BudgetError, UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import BaseCache, LayerLayout, Step, Turn
from tightfit.kv.cache import Cache
from tightfit.kv.fitted import Sample
from tightfit.model.batch import Batch, Segment
from tightfit.model.spec import AttentionSpec
from tightfit.weights.placement.base import Parameters


class _Watching:
    """A cache, and what its ``update`` is given."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache
        self.seen: list[Sample] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(
        self,
        layer: int,
        step: Step,
        q_: torch.Tensor,
        k_: torch.Tensor,
        v: torch.Tensor,
        turn: Turn | None,
        ws: Workspace,
    ) -> None:
        copied = None
        if turn is not None:
            cos, sin = turn.tables
            copied = Turn((cos.clone(), sin.clone()), turn.interleaved)
        self.seen.append(Sample(q_.clone(), k_.clone(), v.clone(), copied))
        return self.cache.update(layer, step, q_, k_, v, turn, ws)


@dataclass
class Observing:
    """See :class:`tightfit.kv.fitted.Observed`. The engine must have been loaded with a cache that keeps everything,
    and ``budget`` bytes for the process."""

    engine: Engine
    name: str
    tokens: list[int]
    encode: Callable[[str], list[int]]
    budget: int

    def __post_init__(self) -> None:
        cache = self.engine.cache
        if not isinstance(cache, Cache) or cache.own != list(range(len(cache.layers))):
            raise UsageError(f"{self.name} was loaded with methods of the cache", "Load it without any, and fit then.")
        self.cache = cache
        attentions = [layer.attention for layer in self.engine.decoder.spec.layers]
        self.layouts: list[LayerLayout] = cache.layouts
        self.kinds: list[object | None] = [
            (each.kv_heads, each.key_dim, each.value_dim, each.rope, each.window)
            if isinstance(each, AttentionSpec)
            else None
            for each in attentions
        ]
        self.scorings = [self._scoring(layer) for layer in range(len(attentions))]

    def _scoring(self, layer: int) -> Scoring:
        decoder, sinks = self.engine.decoder, None
        spec = decoder.spec.layers[layer]
        if not isinstance(spec.attention, AttentionSpec):
            return Scoring(spec.attention.scale)
        if any(param.name == "sinks" for param in spec.params):
            with decoder.weights.layer(layer) as weights:
                sinks = weights["sinks"].clone()
        return Scoring(spec.attention.scale, spec.attention.window, spec.attention.softcap, sinks)

    def samples(self, length: int, count: int) -> list[list[int]]:
        length = min(length, self.engine.context, *(layout.slots for layout in self.layouts))
        starts = range(0, len(self.tokens) - length + 1, length)
        found = [self.tokens[start : start + length] for start in starts][:count]
        if not found:
            raise UsageError(
                f"the text has {len(self.tokens)} tokens", f"Give one of {length} or more: {count * length} are used."
            )
        return found

    def take_room(self, nbytes: int, what: str) -> None:
        left = self.budget - resident_set().current
        if nbytes > left:
            raise BudgetError(
                f"{what} takes {format_bytes(nbytes)}, and the budget leaves {format_bytes(max(left, 0))}",
                "Give more --memory, or a shorter --context.",
            )

    @torch.inference_mode()
    def hidden(self, tokens: Sequence[int], owners: Sequence[int] | None = None) -> torch.Tensor:
        engine, own = self.engine, self.cache.owners
        out = torch.empty(len(tokens), engine.decoder.spec.hidden_size)
        try:
            self.cache.owners = own if owners is None else list(owners)
            for start in range(0, len(tokens), engine.chunk):
                batch = self._chunk(tokens, start)
                engine.cache.begin(0, start)
                with engine.ws.frame():
                    stop = start + batch.size
                    out[start:stop] = engine.decoder.hidden(batch, engine.cache, engine.ws)
                engine.cache.prefilled(0, start, stop)
        finally:
            self.cache.owners = own
            self.cache.begin(0, 0)
        return out

    def layers(self, samples: Sequence[Sequence[int]]) -> Iterator[list[Sample]]:
        engine, spec = self.engine, self.engine.decoder.spec
        if not all(isinstance(layer.attention, AttentionSpec) for layer in spec.layers):
            raise UsageError(
                f"what latent attention computes cannot be fitted, and {self.name} has it", "Use another method."
            )
        tokens = sum(len(sample) for sample in samples)
        widest = max(
            each.heads * each.key_dim + each.kv_heads * (each.key_dim + each.value_dim) for each in self.layouts
        )
        self.take_room(4 * tokens * (spec.hidden_size + 2 * widest), f"looking at {tokens} tokens")
        engine.decoder.weights.begin(logits=False)
        streams = [self._embedded(sample) for sample in samples]
        for layer in range(len(spec.layers)):
            with torch.inference_mode(), engine.decoder.weights.layer(layer) as weights:
                seen = [self._layer(layer, weights, *each) for each in zip(samples, streams, strict=True)]
            yield [_joined(parts) for parts in seen]

    @torch.inference_mode()
    def _embedded(self, tokens: Sequence[int]) -> torch.Tensor:
        decoder, ws = self.engine.decoder, self.engine.ws
        stream = torch.empty(len(tokens), decoder.spec.hidden_size)
        decoder.embed(torch.tensor(tokens), stream, ws)
        return stream

    def _layer(self, layer: int, weights: Parameters, tokens: Sequence[int], stream: torch.Tensor) -> list[Sample]:
        """What one layer computes of a text chunk by chunk; it is added to the residual stream (n, hidden)."""
        engine, watching = self.engine, _Watching(self.cache)
        for start in range(0, len(tokens), engine.chunk):
            batch = self._chunk(tokens, start)
            rows = stream[start : start + batch.size]
            engine.cache.begin(0, start)
            engine.decoder.layer(layer, weights, rows, batch, cast(BaseCache, watching), engine.ws)
            engine.cache.prefilled(0, start, start + batch.size)
        self.cache.begin(0, 0)
        return watching.seen

    def _chunk(self, tokens: Sequence[int], start: int) -> Batch:
        part = tokens[start : start + self.engine.chunk]
        batch = Batch((Segment(0, start, part, logits="all", length=len(tokens)),))
        use_threads(batch, self.engine.threads, self.engine.cache.gemm_dtype)
        return batch

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        placement = self.engine.decoder.weights
        if not placement.fixed:
            raise UsageError(
                f"the weights of {self.name} do not fit into the budget all at once", "Give more --memory."
            )
        with torch.inference_mode(), placement.layer(layer) as parameters:
            found = matrices(parameters, self.engine.ws)
        return {name: tensor.clone() for name, tensor in found.items()}

    def network(self) -> Network:
        spec = self.engine.decoder.spec
        self.take_room(4 * sum(param.count for _, param in spec.all_params()), "the model in float32")
        return Network(self.engine.decoder, self.engine.ws)


def _joined(parts: list[Sample]) -> Sample:
    """One sample of the chunks of a text. Outside of inference mode, so that it can be computed with."""
    q, k, v = (torch.cat(each).clone() for each in list(zip(*parts, strict=True))[:3])
    turns = [part.turn for part in parts if part.turn is not None]
    if not turns:
        return Sample(q, k, v, None)
    cos, sin = (torch.cat(each).clone() for each in zip(*(turn.tables for turn in turns), strict=True))
    return Sample(q, k, v, Turn((cos, sin), turns[0].interleaved))
