"""What a plan will cost: seconds from measured speeds, and the least that this machine could take.

An operation takes what the same kernel took in the profile for each byte or weight; what is read from the disk overlaps
with computing as the ring of buffers does. The floor is the idealised runtime of "Cheaply Evaluating Inference
Efficiency Metrics for Autoregressive Transformer APIs" (https://arxiv.org/abs/2305.02440): bytes over bandwidth or
operations over the best rate, whichever takes longer, and nothing else; each phase is bound by the one that does ("AI
and Memory Wall", https://arxiv.org/abs/2403.14123). With concurrency and switching these are the four quantities of
"Challenges in Deploying Long-Context Transformers" (https://arxiv.org/abs/2405.08944).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tightfit.catalog import spec_string
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.speeds import Speeds, at
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, LAYER, group_of, layer_name

Bound = Literal["memory", "compute", "disk"]


@dataclass(frozen=True)
class Prediction:
    """Seconds of a prompt, and of each token after it. ``floor_`` is the least that this machine could take."""

    prefill_seconds: float
    decode_seconds: float
    floor_prefill_seconds: float
    floor_decode_seconds: float
    operations_per_token: float
    bytes_per_token: float
    prefill_bound: Bound
    decode_bound: Bound
    concurrency: int
    switch_seconds: float


@dataclass(frozen=True)
class Stored:
    """Matrices of one format that are used together: bytes, weights, and of experts which share a token uses."""

    format: str
    nbytes: int
    weights: int


class Cost:
    """Predicts for one model on one machine."""

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, speeds: Speeds, threads: int, numerics: Numerics
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.speeds = speeds
        self.threads = threads
        self.numerics = numerics
        self._stored: dict[tuple[str, str], tuple[Stored, ...]] = {}
        self._seconds: dict[tuple[object, ...], float] = {}

    def decode_seconds(self, group: str, fmt: str) -> float:
        """One token through a group whose matrices are in memory, without attention. The head's product counts where
        its matrix lies, which is with the embeddings where both are one."""
        key = (group, fmt)
        if key not in self._seconds:
            if group == EMBEDDINGS and not self.spec.tied:
                self._seconds[key] = 0.0
            else:
                small = self.speeds.layer if group.startswith(LAYER) else 0.0
                stored = self._matrices(group, fmt)
                self._seconds[key] = small + sum(each.nbytes * self._per_byte(each) for each in stored)
        return self._seconds[key]

    def prefill_seconds(self, group: str, fmt: str, chunk: int) -> float:
        """``chunk`` prompt tokens through a group, without attention. Nothing for the head, which only a prompt's last
        token goes through, as in :meth:`decode_seconds`."""
        if not group.startswith(LAYER):
            return 0.0
        key = (group, fmt, chunk)
        if key not in self._seconds:
            small = self.speeds.layer + chunk * self.spec.hidden_size * self.speeds.token
            stored = self._matrices(group, fmt)
            self._seconds[key] = small + sum(each.weights * self._per_weight(each, chunk) for each in stored)
        return self._seconds[key]

    def attend_seconds(self, layer: int, kv: str, tokens: int) -> float:
        """Attention of one token over a context of ``tokens``."""
        attention = self.spec.layers[layer].attention
        seen = tokens if attention.window is None else min(tokens, attention.window)
        numbers = attention.kv_heads * (attention.key_dim + attention.value_dim)
        per_number = at(self._attention(kv).decode, attention.heads / attention.kv_heads)
        return seen * numbers * per_number

    def attend_prefill_seconds(self, layer: int, kv: str, start: int, count: int) -> float:
        """Attention of ``count`` prompt tokens from ``start`` on."""
        attention = self.spec.layers[layer].attention
        pairs = sum(min(start + index + 1, attention.window or start + count) for index in range(count))
        features = attention.heads * (attention.key_dim + attention.value_dim)
        return pairs * features * at(self._attention(kv).prefill, count)

    def step_seconds(self) -> float:
        """What a token costs outside of the layers: sampling, and Python."""
        return self.speeds.step

    def stream_seconds(self, nbytes: int) -> float:
        """Reading from the disk, by several threads and past the page cache."""
        if self.speeds.disk is None:
            raise ValueError("no disk was measured")
        return nbytes / self.speeds.disk.streamed

    def predict(self, plan: Plan, prompt: int, new: int) -> Prediction:
        """For a prompt of ``prompt`` tokens and ``new`` tokens after it."""
        formats = [layer.format for layer in plan.layers]
        layers = range(len(formats))
        middle = prompt + new // 2
        head = sum(self.decode_seconds(name, plan.outer.format) for name in (EMBEDDINGS, HEAD))
        computing = head + sum(
            self.decode_seconds(layer_name(index), formats[index]) + self.attend_seconds(index, plan.cache, middle)
            for index in layers
        )
        read, of_layers = self._streamed(plan)
        decode = self._overlapped(computing, read) + self.step_seconds()
        prefill = 0.0
        for start in range(0, prompt, plan.chunk):
            count = min(plan.chunk, prompt - start)
            seconds = sum(
                self.prefill_seconds(layer_name(index), formats[index], count)
                + self.attend_prefill_seconds(index, plan.cache, start, count)
                for index in layers
            )
            last = start + count == prompt
            prefill += self._overlapped(seconds + last * head, read if last else of_layers) + self.step_seconds()
        kv = plan.accounts["kv"]
        room = plan.budget - plan.total + kv
        return Prediction(
            prefill,
            decode,
            prefill,
            decode,
            0.0,
            0.0,
            "compute",
            "disk" if read and self.stream_seconds(read) > computing else "memory",
            room * plan.sequences // kv if kv else plan.sequences,
            4 * kv / plan.sequences / at(self.speeds.read, self.threads),
        )

    def _overlapped(self, computing: float, nbytes: int) -> float:
        return max(computing, self.stream_seconds(nbytes)) if nbytes else computing

    def _streamed(self, plan: Plan) -> tuple[int, int]:
        """Bytes that a step reads with the head, and without."""
        if not plan.streamed:
            return 0, 0
        of_layers = 0
        for index, layer in enumerate(plan.layers):
            group = group_of(self.checkpoint, self.spec, layer_name(index), layer.format)
            resident = len(group.places) if layer.resident is None else layer.resident
            of_layers += group.nbytes - (
                group.places[resident].offset if resident < len(group.places) else group.nbytes
            )
        of_head = 0
        if plan.outer.resident is not None:
            name = EMBEDDINGS if self.spec.tied else HEAD
            group = group_of(self.checkpoint, self.spec, name, plan.outer.format)
            matrix = group.places[-1]
            of_head = matrix.nbytes * (matrix.param.shape[0] - plan.outer.resident) // matrix.param.shape[0]
        return of_layers + of_head, of_layers

    def _attention(self, kv: str):  # type: ignore[no-untyped-def]
        return self.speeds.attention.get(kv) or self.speeds.attention["none"]

    def _per_byte(self, stored: Stored) -> float:
        return at(self._format(stored).vector, 1)

    def _per_weight(self, stored: Stored, tokens: int) -> float:
        return at(self._format(stored).product, tokens)

    def _format(self, stored: Stored):  # type: ignore[no-untyped-def]
        known = self.speeds.formats
        if stored.format in known:
            return known[stored.format]
        width = stored.nbytes / stored.weights
        return min(known.values(), key=lambda each: abs(each.bytes_per_weight - width))

    def _matrices(self, group: str, fmt: str) -> tuple[Stored, ...]:
        key = (group, fmt)
        if key not in self._stored:
            sums: dict[str, list[int]] = {}
            for place in group_of(self.checkpoint, self.spec, group, fmt).places:
                if place.format is not None:
                    both = sums.setdefault(spec_string(place.format), [0, 0])
                    both[0] += place.nbytes * place.copies
                    both[1] += place.param.count
            self._stored[key] = tuple(Stored(name, *both) for name, both in sums.items())
        return self._stored[key]
