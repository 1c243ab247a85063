"""Times attention as decoding steps and chunks of prompts compute it, in caches of a given kind."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

import torch

from tightfit.budget.ledger import Arena
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import BLOCK, LayerLayout
from tightfit.kv.compose import EXACT
from tightfit.kv.make import make_cache
from tightfit.model.batch import Batch, Segment
from tightfit.plan.timing import typical

if TYPE_CHECKING:
    from tightfit.plan.probe import Probe

CHUNK = 512  # the longest of a prompt
CONTEXT, LAYERS = 2048, 3  # tokens and layers of the attention that is timed
STARTS = (0, 1536)  # of the chunks of prompts whose attention is timed
LEAST_LAYER = 1e-6  # seconds of anything in a layer
STEPS = 4  # that are timed
VIRTUAL = 1 << 36  # bytes of address space of which little is written


class Attending:
    """A cache of a few layers, ``group`` heads sharing each of its ``kv_heads``, and steps that look at it."""

    def __init__(self, probe: Probe, kv: str, kv_heads: int, group: int, dim: int) -> None:
        self._probe, self._ws = probe, probe.ws
        self.group, self._kv_heads, self._heads, self._dim = group, kv_heads, kv_heads * group, dim
        room = CONTEXT + 2 * BLOCK
        layouts = [LayerLayout(kv_heads, dim, dim, room, heads=self._heads)] * LAYERS
        self._cache = make_cache(kv, layouts, room, 1, probe.kv, Arena(VIRTUAL), probe.gemm, CHUNK)
        self._scoring = Scoring(dim**-0.5)
        self._exact, self._filled = kv == EXACT, 0

    def layer(self) -> float:
        """Seconds of a layer of a step, however few tokens it looks at."""
        lengths = (CHUNK // 2, CHUNK)
        times = []
        for length in lengths:
            self._fill(length)
            times.append(self._decode(length))
        return max(2 * times[0] - times[1], LEAST_LAYER) + self._commit(lengths[-1])

    def token(self, layer: float) -> float:
        """Seconds for each token and head of the cache beside that."""
        self._fill(CONTEXT)
        took = self._decode(CONTEXT)
        return max(took - layer, took / 2) / CONTEXT / self._kv_heads

    def prompt(self, count: int) -> tuple[float, float]:
        """Seconds for each token and head of a chunk of ``count``, and for each key that they look at."""
        best = [math.inf, math.inf]
        for _ in range(2):
            for index, start in enumerate(STARTS):
                self._fill(start)
                best[index] = min(best[index], self._chunk(start, count))
        pairs = count * self._heads
        key = max(best[1] - best[0], 0.1 * best[1]) / (STARTS[1] - STARTS[0]) / pairs
        return max(best[0] / pairs - key * count, 1e-12), key

    def _fill(self, length: int) -> None:
        """Has the cache hold a prompt of so many tokens; what keeps all of them as they are may hold more."""
        if self._exact and length <= self._filled:
            return
        self._cache.begin(0, 0)
        for start in range(0, length, CHUNK):
            self._chunk(start, min(CHUNK, length - start))
        self._filled = length

    def _chunk(self, start: int, count: int) -> float:
        """Seconds that a layer's attention of a chunk takes."""
        batch = Batch((Segment(0, start, [0] * count),))
        took = 0.0
        self._probe.prefilling(True)
        with self._ws.frame():
            q, k, v, out = self._tensors(count)
            self._cache.begin(0, start)
            with self._cache.through(batch, self._ws):
                for layer in range(LAYERS):
                    with self._ws.frame():
                        held = self._cache.update(layer, batch, q, k, v, None, self._ws)
                        began = time.perf_counter()
                        self._cache.attend_step(layer, batch, held, q, out, self._ws, self._scoring)
                        took += time.perf_counter() - began
            began = time.perf_counter()
            self._cache.prefilled(0, start, start + count)
            took += time.perf_counter() - began
        self._probe.prefilling(False)
        return took / LAYERS

    def _decode(self, length: int) -> float:
        """Seconds of a layer: writing a token and looking at those before it, between products with matrices."""
        batch = Batch((Segment(0, length, [0], decode=True),))
        times = []
        with self._ws.frame(), self._cache.through(batch, self._ws):
            q, k, v, out = self._tensors(1)
            programs = []
            for layer in range(LAYERS):
                with ops.recorded() as program:
                    held = self._cache.update(layer, batch, q, k, v, None, self._ws)
                    self._cache.attend_step(layer, batch, held, q, out, self._ws, self._scoring)
                programs.append(program)
            for _ in range(STEPS):
                self._probe.evict()
                for program in programs:
                    began = time.perf_counter()
                    program.run()
                    times.append(time.perf_counter() - began)
        return typical(times)

    def _commit(self, length: int) -> float:
        """Seconds for each layer that a token takes to be certain, of as many tokens as are coded at once."""
        took = 0.0
        for index in range(BLOCK):
            batch = Batch((Segment(0, length + index, [0], decode=True),))
            with self._ws.frame():
                q, k, v, out = self._tensors(1)
                with self._cache.through(batch, self._ws):
                    for layer in range(LAYERS):
                        held = self._cache.update(layer, batch, q, k, v, None, self._ws)
                        self._cache.attend_step(layer, batch, held, q, out, self._ws, self._scoring)
                began = time.perf_counter()
                self._cache.commit(0, range(1), self._ws)
                took += time.perf_counter() - began
        return took / BLOCK / LAYERS

    def _tensors(self, count: int) -> list[torch.Tensor]:
        """Queries, keys, values and results of so many tokens."""
        heads = (self._heads, self._kv_heads, self._kv_heads, self._heads)
        made = [self._ws.empty(count, each, self._dim) for each in heads]
        for tensor in made:
            tensor.normal_()
        return made
