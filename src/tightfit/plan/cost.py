"""What a plan will cost: seconds from measured speeds, and the least that this machine could take.

A product takes what the same kernel took in the profile for each byte of the matrix (decoding) or each of its weights
(prompts), attention what it took for each key; what is read from the disk is hidden behind computing as far as it was
there. Bytes are the plan's own accounts. The floor is the idealised runtime of "Cheaply Evaluating Inference Efficiency
Metrics for Autoregressive Transformer APIs" (https://arxiv.org/abs/2305.02440): bytes over bandwidth or operations over
the best rate, whichever takes longer, and nothing else; a phase is bound by that one ("AI and Memory Wall",
https://arxiv.org/abs/2403.14123). With concurrency and switching these are the four quantities of "Challenges in
Deploying Long-Context Transformers" (https://arxiv.org/abs/2405.08944).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from tightfit.catalog import spec_string
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.experts.store import on_disk
from tightfit.kernels.matmul import bucket
from tightfit.kv.base import BLOCK
from tightfit.kv.compose import Composition, compose
from tightfit.kv.method import Demoter
from tightfit.model.spec import AttentionSpec, LatentAttentionSpec, MlpSpec, ModelSpec, MoeSpec
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.speeds import AttentionSpeed, FormatSpeed, Speeds, across, at
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, LAYER, Group, group_of, layer_name
from tightfit.weights.placement.streamed import streamed_nbytes

Bound = Literal["memory", "compute", "disk"]
Attention = AttentionSpec | LatentAttentionSpec


@dataclass(frozen=True)
class Prediction:
    """Seconds of a prompt and of each step after it, at the middle of the new tokens; ``floor_`` is the least that this
    machine could take, which ``bound`` decides. Operations and bytes read (of memory and disk) are a step's, for each
    token.

    ``concurrency``: sequences of this context that would fit into what the budget leaves. ``switch_seconds``: copying
    the keys and values of one out of the cache and back, as a prompt cache in memory does.
    """

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
    """Matrices of one format that are used together: bytes and weights of one copy, and how many ``experts`` have
    some."""

    format: str
    nbytes: int
    weights: int
    experts: int


class Cost:
    """Predicts for one model on one machine.

    Of mixtures each token uses as many experts as the model says, spread evenly: a chunk of n tokens uses
    E (1 - (1 - k/E)^n) of E, and of those on the disk the share that has slots is taken to be in memory. Routers that
    prefer some experts make both a little cheaper.
    """

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, speeds: Speeds, threads: int, numerics: Numerics
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.speeds = speeds
        self.threads = threads
        self.numerics = numerics
        self._names = [layer_name(index) for index in range(len(spec.layers))]
        self._alike = Counter(layer.attention for layer in spec.layers)  # layers that look at their caches alike
        self._first = {layer.attention: index for index, layer in reversed(list(enumerate(spec.layers)))}
        self._groups: dict[tuple[str, str], Group] = {}
        self._stored: dict[tuple[str, str], tuple[Stored, ...]] = {}
        self._seconds: dict[tuple[object, ...], float] = {}
        self._read: dict[tuple[object, ...], tuple[int, int]] = {}
        self._formats: dict[str, FormatSpeed] = {}
        self._compositions: dict[str, Composition] = {}
        self.bandwidth = max(*speeds.read.values(), *(1 / at(each.vector, 1) for each in speeds.formats.values()))
        self.rate = max(2 * count / took for each in speeds.formats.values() for count, took in each.product.items())

    # ---- the parts that a search adds up ----

    def decode_seconds(self, group: str, fmt: str, rows: int = 1) -> float:
        """A step of ``rows`` tokens through a group whose matrices are in memory, without attention. The head's product
        counts where its matrix lies: with the embeddings where both are one."""
        key = (group, fmt, rows, "decode")
        if key not in self._seconds:
            small = self._small(group, False) if group.startswith(LAYER) else 0.0
            self._seconds[key] = small + sum(
                used * stored.nbytes * at(self._format(stored).vector, each)
                for stored, used, each in self._used(group, fmt, rows)
            )
        return self._seconds[key]

    def prefill_seconds(self, group: str, fmt: str, chunk: int) -> float:
        """``chunk`` prompt tokens through a group, without attention. Nothing for the head: only a prompt's last token
        goes through it, as in :meth:`decode_seconds`."""
        key = (group, fmt, chunk, "prefill")
        if key not in self._seconds:
            self._seconds[key] = self._prefill(group, fmt, chunk)
        return self._seconds[key]

    def attend_seconds(self, layer: int, kv: str, tokens: int) -> float:
        """Attention of one token over a context of ``tokens``. Caches that let go of tokens are looked at as far as
        they keep them, selectors' as far as they read."""
        attention, speed = self.spec.layers[layer].attention, self._attention(kv)
        features = _features(attention)
        each = across(speed.decode, features, attention.heads / attention.kv_heads)
        return speed.layer + self._seen(attention, kv, tokens) * attention.kv_heads * each

    def attend_prefill_seconds(self, layer: int, kv: str, start: int, count: int) -> float:
        """Attention of ``count`` prompt tokens from ``start`` on. Blocks of keys are looked at whole."""
        attention, speed = self.spec.layers[layer].attention, self._attention(kv)
        features, keys = _features(attention), self._seen(attention, kv, start) + count
        each = across(speed.query, features, count) + keys * across(speed.prefill, features, count)
        return speed.layer + count * attention.heads * each

    def step_seconds(self) -> float:
        """What a step costs outside of the layers: scheduling, sampling, Python."""
        return self.speeds.step

    def stream_seconds(self, nbytes: int) -> float:
        """Reading from the disk as streaming does, nothing being in the page cache. Raises ValueError where no disk
        was measured."""
        if self.speeds.disk is None:
            raise ValueError("no disk was measured")
        aligned = self.checkpoint.compressed is not None  # groups begin at multiples of 4 KiB there
        return nbytes / (self.speeds.disk.streamed if aligned else self.speeds.disk.copied)

    def overlapped(self, computing: float, nbytes: float) -> float:
        """Seconds of a pass that computes so long and reads so much meanwhile."""
        if not nbytes or self.speeds.disk is None:
            return computing
        reading = self.stream_seconds(round(nbytes))
        return max(computing, reading) + self.speeds.disk.overlap * min(computing, reading)

    # ---- a whole plan ----

    def predict(self, plan: Plan, prompt: int, new: int, sequences: int = 1) -> Prediction:
        """For ``sequences`` prompts of ``prompt`` tokens each, one after the other, and ``new`` tokens after each, all
        of them together. Raises ValueError where the plan streams and no disk was measured."""
        if (plan.streamed or plan.experts) and self.speeds.disk is None:
            raise ValueError("no disk was measured")
        middle = min(prompt + new // 2, plan.context)
        formats = [layer.format for layer in plan.layers]
        head = sum(self.decode_seconds(name, plan.outer.format) for name in (EMBEDDINGS, HEAD))
        in_step = sum(self.decode_seconds(name, plan.outer.format, sequences) for name in (EMBEDDINGS, HEAD))
        anew = len(formats) * self.speeds.anew if plan.streamed else 0.0
        computing = in_step + anew + sequences * self._attend(plan.cache, middle)
        computing += sum(
            self.decode_seconds(name, fmt, sequences) for name, fmt in zip(self._names, formats, strict=True)
        )
        of_layers, of_head = self._streamed(plan)
        decoded = of_layers + of_head + self._from_disk(plan, sequences)
        decode = self.overlapped(computing, decoded) + self.step_seconds()

        prefill, passes = 0.0, -(-prompt // plan.chunk)
        read: float = of_head + of_layers * (1 if plan.prefill == "layered" else passes)
        for start in range(0, prompt, plan.chunk):
            count = min(plan.chunk, prompt - start)
            seconds = self.prefill_seconds(EMBEDDINGS, plan.outer.format, count)
            seconds += sum(
                self.prefill_seconds(name, fmt, count) for name, fmt in zip(self._names, formats, strict=True)
            )
            seconds += sum(
                layers * self.attend_prefill_seconds(self._first[attention], plan.cache, start, count)
                for attention, layers in self._alike.items()
            )
            seconds += head if start + count == prompt else 0.0
            of_experts = self._from_disk(plan, count)
            read += of_experts
            prefill += self.overlapped(seconds, of_experts + of_layers * (plan.prefill == "chunked"))
            prefill += self.step_seconds()
        if plan.prefill == "layered":
            prefill = self.overlapped(prefill, of_layers)

        weights, nbytes = self._weights(plan, sequences)
        kv = plan.accounts["kv"] / plan.sequences
        looked_at = sum(
            layers * attention.heads * self._seen(attention, plan.cache, middle) * _features(attention)
            for attention, layers in self._alike.items()
        )
        operations = 2 * (weights + looked_at)  # of a token
        memory = nbytes + sequences * kv * middle / plan.context
        of_prompt = 2 * prompt * (weights + looked_at / 2)
        decoding: dict[Bound, float] = {
            "memory": memory / self.bandwidth,
            "compute": sequences * operations / self.rate,
            "disk": self.stream_seconds(round(decoded)) if decoded else 0.0,
        }
        prefilling: dict[Bound, float] = {
            "memory": passes * nbytes / self.bandwidth,
            "compute": of_prompt / self.rate,
            "disk": self.stream_seconds(round(read)) if read else 0.0,
        }
        return Prediction(
            prefill_seconds=prefill * sequences,
            decode_seconds=decode,
            floor_prefill_seconds=max(prefilling.values()) * sequences,
            floor_decode_seconds=max(decoding.values()),
            operations_per_token=operations,
            bytes_per_token=(memory + decoded) / sequences,
            prefill_bound=max(prefilling, key=prefilling.__getitem__),
            decode_bound=max(decoding, key=decoding.__getitem__),
            concurrency=plan.sequences + int((plan.budget - plan.total) // kv),
            switch_seconds=4 * kv / at(self.speeds.read, self.threads),  # each way a byte is read and written
        )

    # ---- products ----

    def _matrices(self, group: str, fmt: str) -> tuple[Stored, ...]:
        """The matrices of a group that are multiplied with, by their formats."""
        key = (group, fmt)
        if key not in self._stored:
            sums: dict[tuple[str, int], list[int]] = {}
            looked_up = group == EMBEDDINGS and not self.spec.tied
            for place in () if looked_up else self._group(group, fmt).places:
                if place.format is not None:
                    both = sums.setdefault((spec_string(place.format), place.param.experts), [0, 0])
                    both[0] += place.nbytes
                    both[1] += place.param.count // place.copies
            self._stored[key] = tuple(Stored(name, both[0], both[1], experts) for (name, experts), both in sums.items())
        return self._stored[key]

    def _used(self, group: str, fmt: str, tokens: int) -> Iterator[tuple[Stored, float, float]]:
        """Matrices, how many copies of them ``tokens`` tokens use, and how many tokens each of these sees."""
        for stored in self._matrices(group, fmt):
            if not stored.experts:
                yield stored, 1.0, tokens
                continue
            mixture = self.spec.layers[int(group.removeprefix(LAYER))].mlp
            assert isinstance(mixture, MoeSpec)
            used = _activated(mixture, tokens)
            yield stored, used, tokens * mixture.experts_per_token / used

    def _prefill(self, group: str, fmt: str, chunk: int) -> float:
        speeds, hidden = self.speeds, self.spec.hidden_size
        if group == EMBEDDINGS:
            return speeds.lookup * chunk * hidden
        if group == HEAD:
            return 0.0
        layer = self.spec.layers[int(group.removeprefix(LAYER))]
        attention, mlp = layer.attention, layer.mlp
        norms = sum(param.name.endswith("layernorm") for param in layer.params)
        seconds = self._small(group, True) + chunk * norms * hidden * speeds.norm
        if isinstance(attention, AttentionSpec):
            seconds += chunk * (attention.heads + 2 * attention.kv_heads) * attention.head_dim * speeds.rotate
        if isinstance(mlp, MlpSpec):
            seconds += chunk * mlp.intermediate_size * speeds.glu
        else:
            wide = mlp.experts_per_token * mlp.intermediate_size + mlp.shared_intermediate_size
            seconds += chunk * wide * speeds.glu
        for stored, used, tokens in self._used(group, fmt, chunk):
            rows = bucket(round(tokens)) if speeds.padded else tokens
            seconds += used * stored.weights * at(self._format(stored).product, rows)
        return seconds

    def _small(self, group: str, prompt: bool) -> float:
        """What a layer's operations take however few tokens there are. A mixture's experts are computed one by one,
        each of them half a layer."""
        layer = self.spec.layers[int(group.removeprefix(LAYER))]
        repeated = at(self.speeds.layer, self.spec.hidden_size)
        if isinstance(layer.mlp, MoeSpec):
            return (repeated + self.speeds.anew) * (1 + layer.mlp.experts_per_token / 2)
        if prompt or isinstance(layer.attention, LatentAttentionSpec):
            return repeated + self.speeds.anew
        return repeated

    def _format(self, stored: Stored) -> FormatSpeed:
        """How fast a format is. One that was not measured is as fast, for each byte when decoding and for each weight
        of a prompt, as the measured one whose weights take most nearly as many bytes."""
        if stored.format not in self._formats:
            known, width = self.speeds.formats, stored.nbytes / stored.weights
            nearest = min(known.values(), key=lambda each: abs(each.bytes_per_weight - width))
            self._formats[stored.format] = known.get(stored.format, nearest)
        return self._formats[stored.format]

    def _weights(self, plan: Plan, tokens: int) -> tuple[float, float]:
        """Weights that a token uses, and bytes of matrices that a step of so many tokens does."""
        weights, nbytes = 0.0, 0.0
        parts = [(EMBEDDINGS, plan.outer.format), (HEAD, plan.outer.format)]
        parts += [(name, layer.format) for name, layer in zip(self._names, plan.layers, strict=True)]
        for group, fmt in parts:
            weights += sum(used * stored.weights for stored, used, _ in self._used(group, fmt, 1))
            nbytes += sum(used * stored.nbytes for stored, used, _ in self._used(group, fmt, tokens))
        return weights, nbytes

    def _group(self, name: str, fmt: str) -> Group:
        key = (name, fmt)
        if key not in self._groups:
            self._groups[key] = group_of(self.checkpoint, self.spec, name, fmt)
        return self._groups[key]

    # ---- attention ----

    def _attend(self, kv: str, tokens: int) -> float:
        """Attention of a token in all layers."""
        return sum(
            layers * self.attend_seconds(self._first[attention], kv, tokens)
            for attention, layers in self._alike.items()
        )

    def _attention(self, kv: str) -> AttentionSpeed:
        """How fast a composition is looked at: as the measured codec of about as many bits, or as pages of numbers,
        which those of 8 bits stand for."""
        if kv in self.speeds.attention:
            return self.speeds.attention[kv]
        codec = self._composition(kv).key_codec
        return self.speeds.attention["int4" if codec is not None and codec.bits <= 4 else "int8"]

    def _seen(self, attention: Attention, kv: str, tokens: int) -> int:
        """How many tokens of a context are looked at."""
        seen = tokens if attention.window is None else min(tokens, attention.window)
        composition = self._composition(kv)
        for method in (composition.evictor, composition.streamer):
            if method is not None and not isinstance(method, Demoter):
                seen = min(seen, method.kept(tokens) + BLOCK // 2)
        if composition.selector is not None:
            seen = min(seen, int(composition.selector.reads(seen)) + BLOCK // 2)
        return seen

    def _composition(self, kv: str) -> Composition:
        if kv not in self._compositions:
            self._compositions[kv] = compose(kv)
        return self._compositions[kv]

    # ---- the disk ----

    def _streamed(self, plan: Plan) -> tuple[int, int]:
        """Bytes of layers and of the head that a step reads."""
        key = tuple((layer.format, layer.resident) for layer in plan.layers), plan.outer.format, plan.outer.resident
        if not plan.streamed:
            return 0, 0
        if key not in self._read:
            of_layers = 0
            for name, layer in zip(self._names, plan.layers, strict=True):
                group = self._group(name, layer.format)
                if plan.experts is not None:
                    group, _ = on_disk(self.checkpoint, group)
                of_layers += streamed_nbytes(group, len(group.places) if layer.resident is None else layer.resident)
            matrix = self._group(EMBEDDINGS if self.spec.tied else HEAD, plan.outer.format).places[-1]
            rows = matrix.param.shape[0]
            kept = rows if plan.outer.resident is None else plan.outer.resident
            self._read[key] = of_layers, matrix.nbytes * (rows - kept) // rows
        return self._read[key]

    def _from_disk(self, plan: Plan, tokens: int) -> float:
        """Bytes of experts that a step of so many tokens reads."""
        if plan.experts is None:
            return 0.0
        mixtures = [
            (layer.mlp, on_disk(self.checkpoint, self._group(name, planned.format))[1])
            for name, planned, layer in zip(self._names, plan.layers, self.spec.layers, strict=True)
            if isinstance(layer.mlp, MoeSpec)
        ]
        there = sum(moe.experts for moe, experts in mixtures if experts)
        missing = max(1 - plan.experts.slots / there, 0.0)
        return sum(_activated(moe, tokens) * missing * experts[0].stride for moe, experts in mixtures if experts)


def _activated(mixture: MoeSpec, tokens: float) -> float:
    """How many experts so many tokens use, if they are used evenly."""
    unused: float = (1 - mixture.experts_per_token / mixture.experts) ** tokens
    return mixture.experts * (1 - unused)


def _features(attention: Attention) -> int:
    """Features of a head's key and value together."""
    return attention.key_dim + attention.value_dim
