"""Times the engine's own kernels, in a process of its own: what a decoding step and a chunk of a prompt are made of.

Matrices lie in memory that is larger than the processor's cache and are multiplied one after the other, as in a step;
attention is timed between such products, because a step's keys are no longer in the cache either. All bytes are the
same small number in every format. Each figure is the best of several repetitions, each long enough to stand for a step:
other work on the machine only makes them slower.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import torch

from tightfit import child
from tightfit.budget.ledger import Arena, Workspace, align
from tightfit.budget.meter import available_memory
from tightfit.budget.units import KiB, MiB
from tightfit.catalog import parse_one
from tightfit.checkpoints.rope import RopeParameters
from tightfit.decode.params import SamplingParams
from tightfit.decode.sample import Sampler
from tightfit.engine.engine import Engine, use_threads
from tightfit.engine.sequence import Sequence as Running
from tightfit.kernels import cpu, ops
from tightfit.kv.base import BaseCache
from tightfit.kv.compose import EXACT
from tightfit.kv.make import make_cache
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder, cache_layouts
from tightfit.model.spec import AttentionSpec, LayerSpec, MlpSpec, ModelSpec, RopeSpec
from tightfit.plan.attending import CHUNK, CONTEXT, LAYERS, LEAST_LAYER, VIRTUAL, Attending
from tightfit.plan.cold import Cold
from tightfit.plan.profile import USUAL_CACHE, last_level_cache, measure_bandwidth
from tightfit.plan.schema import Numerics
from tightfit.plan.speeds import AttentionSpeed, DiskSpeed, FormatSpeed, Speeds
from tightfit.plan.timing import typical
from tightfit.weights.formats.base import Format, Matrix, Split
from tightfit.weights.placement.base import Parameters, Placement
from tightfit.weights.placement.readers import PIECE, READERS
from tightfit.weights.placement.ring import Ring

# What plans are made of comes first, and is timed most carefully.
FORMATS = ("bf16", "int8", "int6", "int5", "int4", "int4(group=64)", "int4(group=128)")
OTHERS = ("f32", "f16", "fp8", "nf4", "int3", "int2", "ternary")
CACHES = ("none", "int8", "int4")
DECODED = (1, 2, 4, 8)  # tokens at once
CHUNKS = (16, 64, 128, CHUNK)
ROWS, COLS = 5632, 2048  # of a matrix, as in models of a billion parameters
HEADS = ((8, 1), (4, 8))  # heads of the cache, and how many share each
DIMS = (64, 128)  # features of a head
# Parts of the names of operations: those that are neither products nor attention, and products.
SMALL = {"norm": ("norm",), "glu": ("glu",), "rotate": ("rotat", "append"), "lookup": ("decode_rows",)}
PRODUCTS = {"product": ("gemm", "matmul", "multiply", "pad", "decode_block")}
TINY = 64  # hidden size of a model that is next to nothing
VOCABULARY = 32768
NUMBER = 0x3C  # every byte of a matrix: in bfloat16 numbers of 0.0115, in few bits codes from the middle
USUAL, MOST, LEAST = 256 * MiB, 768 * MiB, 64 * MiB  # bytes of matrices, which should not fit into a cache
UNIT, UNITS, BUFFERS = 24 * MiB, 12, 3  # bytes of a layer that is streamed, layers, and buffers
BLOCKS = (128 * KiB, MiB, 4 * MiB)  # bytes of requests of one thread in order
SLOWEST = 1.5  # times that products may be slower between other operations than alone
SLICE = 0.005  # seconds that a repetition takes at least
REPEATS = 5
READING = 0.6  # seconds of filling a buffer and reading it
PATIENCE = 12.0  # seconds after which each thing is timed once, and other formats not at all
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}

Progress = Callable[[int, int], None]


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: the ``speeds`` of ``threads`` and ``numerics`` if ``wanted``, and the ``disk`` that the
    file ``file`` is on, if there is one, as JSON."""
    numerics = Numerics.model_validate(asked["numerics"])
    with torch.inference_mode():
        probe = Probe(asked["threads"], numerics, asked["wanted"], child.report)
        speeds = probe.speeds().model_dump(exclude={"disk"}) if asked["wanted"] else None
        disk = None if asked["file"] is None else probe.disk(Path(asked["file"])).model_dump()
    return {"speeds": speeds, "disk": disk}


class Synthetic(Placement):
    """Layers whose parameters were made up. No step repeats the one before."""

    fixed = False

    def __init__(self, model: Parameters, layers: Sequence[Parameters]) -> None:
        self.model, self._layers = model, layers

    def load(self, progress: Callable[[int], None] = lambda nbytes: None) -> None:
        """There is nothing to read."""

    @contextmanager
    def layer(self, index: int) -> Iterator[Parameters]:
        yield self._layers[index]


class Probe:
    """Times kernels with ``threads`` threads in the types that ``numerics`` names, on memory for matrices and one
    workspace. ``wanted`` says whether more than the disk will be timed, for ``progress(done, total)``."""

    def __init__(self, threads: int, numerics: Numerics, wanted: bool, progress: Progress) -> None:
        self.threads, self.numerics = threads, numerics
        self.gemm, self.kv = TYPES[numerics.gemm], TYPES[numerics.kv]
        self._done = 0
        self._total = 2 + int(wanted) * (3 + 2 * len(FORMATS) + len(OTHERS) + len(CACHES) * len(DIMS))
        self._progress = progress
        self._until = time.perf_counter() + PATIENCE
        cpu.set_threads(threads)
        torch.set_num_threads(threads)
        beyond = (last_level_cache() or USUAL_CACHE) * 5 // 4
        size = max(min(max(beyond, USUAL), MOST, available_memory() // 4), LEAST)
        arena = Arena(size)
        arena.use_large_pages()
        self._bytes = arena.take(size).fill_(NUMBER)
        self.ws = Workspace(Arena(VIRTUAL))
        self._next = 0  # byte that the next matrix begins at
        self._large = [self.matrix("int8", 2 * ROWS, COLS) for _ in range(size // (24 * MiB))]
        self._row, self._product = torch.full((1, COLS), 0.5), torch.zeros(1, 2 * ROWS)
        self.step()

    def speeds(self) -> Speeds:
        rounds = [{fmt: self._format(fmt, DECODED, CHUNKS) for fmt in FORMATS}]
        attention = {kv: self._attention(kv) for kv in CACHES}
        small = self._small_operations()
        # A second time, a while later: what disturbs the machine often passes.
        rounds.append({fmt: self._format(fmt, DECODED, CHUNKS) for fmt in FORMATS})
        formats = {fmt: _better(*(found[fmt] for found in rounds)) for fmt in FORMATS}
        step = self._outside_of_layers()
        for fmt in OTHERS:
            if time.perf_counter() < self._until:  # else the bar ends early
                formats[fmt] = self._format(fmt, DECODED[::3], CHUNKS[::3])
        return Speeds(
            threads=self.threads,
            numerics=self.numerics,
            padded=not (self.gemm == torch.bfloat16 and cpu.has_gemm()),
            read={count: measure_bandwidth(count, seconds=READING).bytes_per_s for count in sorted({1, self.threads})},
            formats={fmt: _slower(speed, small["vector"], small["product"]) for fmt, speed in formats.items()},
            attention=attention,
            norm=small["norm"],
            glu=small["glu"],
            rotate=small["rotate"],
            lookup=small["lookup"],
            layer={TINY: small["tiny"], COLS: small["layer"]},
            anew=small["anew"],
            step=step,
        )

    # ---- products ----

    def matrix(self, fmt: str, rows: int, cols: int) -> Matrix:
        """A matrix in the next bytes, or in the first ones again."""
        stored = parse_one("weights", fmt)
        assert isinstance(stored, Format)
        nbytes = stored.nbytes(rows, cols)
        if self._next + nbytes > len(self._bytes):
            self._next = 0
        data = self._bytes[self._next : self._next + nbytes]
        self._next += align(nbytes)
        return stored.matrix(data, rows, cols, self.gemm, self.numerics.activations)

    def _format(self, fmt: str, decoded: Sequence[int], chunks: Sequence[int]) -> FormatSpeed:
        stored = parse_one("weights", fmt)
        nbytes, weights = stored.nbytes(ROWS, COLS), ROWS * COLS
        self._next = 0
        matrices = cycle([self.matrix(fmt, ROWS, COLS) for _ in range(len(self._bytes) // align(nbytes))])

        def seconds(tokens: int, split: Split) -> float:
            """Of one product."""
            x, out = torch.full((tokens, COLS), 0.5), torch.zeros(tokens, ROWS)
            self.prefilling(not split.vector)
            return self.best(lambda: next(matrices).matmul(x, out, self.ws, split))

        found = FormatSpeed(
            bytes_per_weight=nbytes / weights,
            vector={tokens: seconds(tokens, Split.rows(tokens)) / nbytes for tokens in decoded},
            product={tokens: seconds(tokens, Split(0, ((0, tokens),))) / weights for tokens in chunks},
        )
        self.step()
        return found

    def evict(self) -> None:
        """Reads so many matrices that the processor's caches hold nothing else, as a step of a large model does."""
        for matrix in self._large:
            matrix.matmul(self._row, self._product, self.ws)

    def compute(self) -> None:
        """About as long as a layer of a few bits."""
        self._large[0].matmul(self._row, self._product, self.ws)

    def prefilling(self, prompt: bool) -> None:
        """Lets torch use as many threads as the engine does."""
        use_threads(Batch((Segment(0, 0, [0], decode=not prompt),)), self.threads, self.gemm)

    # ---- attention ----

    def _attention(self, kv: str) -> AttentionSpeed:
        surfaces: list[dict[int, dict[int, float]]] = [{}, {}, {}]
        decode, query, prefill = surfaces
        layer = 0.0
        for dim in DIMS:
            shapes = [Attending(self, kv, kv_heads, group, dim) for kv_heads, group in HEADS]
            layer = layer or shapes[0].layer()
            decode[2 * dim] = {shape.group: shape.token(layer) for shape in shapes}
            chunks = CHUNKS if kv == EXACT else CHUNKS[1::2]
            both = {chunk: shapes[-1].prompt(chunk) for chunk in chunks}
            query[2 * dim] = {chunk: each for chunk, (each, _) in both.items()}
            prefill[2 * dim] = {chunk: each for chunk, (_, each) in both.items()}
            self.step()
        return AttentionSpeed(layer=layer, decode=decode, query=query, prefill=prefill)

    # ---- all else ----

    def _small_operations(self) -> dict[str, float]:
        """Seconds of all operations that are neither products nor attention, as :class:`Speeds` has them; and how many
        times slower than alone products are between them, whose caches others have used: of ``vector`` and ``product``
        kind."""
        attention = AttentionSpec(32, 4, 64, 64**-0.5, RopeSpec(64, RopeParameters()))
        decoder, cache, layers = self._decoder(attention, COLS, ROWS, LAYERS)
        one = Batch((Segment(0, 0, [0], decode=True),))
        tiny, cache_of_tiny, _ = self._decoder(AttentionSpec(1, 1, 64, 1.0, attention.rope), TINY, TINY, LAYERS)
        with self.ws.frame(), ops.recorded() as program:
            tiny.hidden(one, cache_of_tiny, self.ws)
        hot = typical([sum(_timed(program, SMALL).values()) for _ in range(3 * REPEATS)]) / LAYERS
        chunk = Batch((Segment(0, 0, [0] * CHUNKS[-1], logits="none"),))

        def compute(batch: Batch) -> None:
            with self.ws.frame():
                decoder.hidden(batch, cache, self.ws)

        with ops.recorded() as program:
            compute(one)
        runs = [_timed(program, SMALL | PRODUCTS) for _ in range(3 * REPEATS)]
        products = [typical([run.pop("product") for run in runs])]
        layer = typical([sum(run.values()) for run in runs]) / LAYERS
        python = (self.best(lambda: compute(one)) - self.best(program.run)) / LAYERS
        self.prefilling(True)
        with ops.recorded() as program:
            compute(chunk)
        runs = [_timed(program, SMALL | PRODUCTS) for _ in range(REPEATS - 1)]
        products.append(typical([run.pop("product") for run in runs]))
        self.prefilling(False)
        tokens, turned = chunk.size, attention.heads + 2 * attention.kv_heads
        numbers = {
            "norm": tokens * COLS * 2 * LAYERS,
            "glu": tokens * ROWS * LAYERS,
            "rotate": tokens * turned * attention.head_dim * LAYERS,
            "lookup": tokens * COLS,
        }
        self.step()
        each = {name: typical([run[name] for run in runs]) / count for name, count in numbers.items()}
        weights = LAYERS * sum(matrix.rows * matrix.cols for matrix in layers[0].values() if isinstance(matrix, Matrix))
        alone = self._format("int4", (1,), (tokens,))
        expected = weights * alone.bytes_per_weight * alone.vector[1], weights * alone.product[tokens]
        slower = [min(max(took / each, 1.0), SLOWEST) for took, each in zip(products, expected, strict=True)]
        small = {"tiny": hot, "layer": layer, "anew": max(python, LEAST_LAYER)}
        return each | small | {"vector": slower[0], "product": slower[1]}

    def _outside_of_layers(self) -> float:
        """Seconds of an engine's step of one token through a model that is next to nothing."""
        attention = AttentionSpec(1, 1, 64, 1.0, RopeSpec(64, RopeParameters()))
        decoder, cache, _ = self._decoder(attention, TINY, TINY, layers=1)
        engine = Engine(decoder, cache, self.ws, CONTEXT, CHUNKS[0], self.threads)
        engine.scheduler.add(Running([0], 1, CONTEXT, frozenset(), Sampler(SamplingParams())))
        engine.step()
        found = self.best(engine.step)
        self.step()
        return found

    def _decoder(
        self, attention: AttentionSpec, hidden: int, intermediate: int, layers: int
    ) -> tuple[Decoder, BaseCache, list[Parameters]]:
        """A made-up model in int4, with a vocabulary of the usual size, its cache and its layers."""
        queries, keys = attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim
        shapes = {"q_proj": (queries, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden)}
        shapes |= {"o_proj": (hidden, queries), "down_proj": (hidden, intermediate)}
        shapes |= dict.fromkeys(("gate_proj", "up_proj"), (intermediate, hidden))
        norms = dict.fromkeys(("input_layernorm", "pre_feedforward_layernorm"), torch.ones(hidden))
        made = [
            Parameters({name: self.matrix("int4", *shape) for name, shape in shapes.items()} | norms)
            for _ in range(layers)
        ]
        model = Parameters({"embed_tokens": self.matrix("int4", VOCABULARY, hidden), "norm": torch.ones(hidden)})
        layer = LayerSpec(attention, MlpSpec(intermediate), ())
        spec = ModelSpec("synthetic", VOCABULARY, hidden, (layer,) * layers, (), CONTEXT, 1e-5)
        layouts = cache_layouts(spec, CONTEXT, CHUNKS[-1])
        cache = make_cache(EXACT, layouts, CONTEXT, 1, self.kv, Arena(VIRTUAL), self.gemm, CHUNKS[-1])
        return Decoder(spec, Synthetic(model, made)), cache, made

    # ---- the disk ----

    def disk(self, file: Path) -> DiskSpeed:
        """Reading a file as streaming does, alone and beside products that take about as long."""
        with Cold(file) as cold:
            streamed, copied = (UNITS * UNIT / self._ring(cold, shift, 0) for shift in (0, 1000))
            alone = self.best(self.compute)
            calls = max(round(UNIT / streamed / alone), 1)
            computing, reading = calls * alone * UNITS, UNITS * UNIT / streamed
            both = self._ring(cold, 0, calls)
            hidden = (both - max(computing, reading)) / min(computing, reading)
            blocks = {nbytes: cold.in_order(nbytes) for nbytes in BLOCKS}
        self.step()
        return DiskSpeed(streamed=streamed, copied=copied, blocks=blocks, overlap=min(max(hidden, 0.0), 1.0))

    def _ring(self, cold: Cold, shift: int, calls: int) -> float:
        """Seconds of streaming ``UNITS`` units that begin ``shift`` bytes behind a multiple of 4 KiB, with so many
        calls of :meth:`compute` for each; the better of two rounds."""
        arena = Arena(BUFFERS * UNIT)
        ring = Ring(
            [UNIT] * (2 * UNITS + BUFFERS),
            [arena.take(UNIT) for _ in range(BUFFERS)],
            lambda unit, piece, out: cold.read(unit * UNIT + piece.start + shift, out.numpy().data),
            READERS,
            PIECE,
        )
        found = math.inf
        began = time.perf_counter()
        for unit in range(2 * UNITS):
            if unit == UNITS:
                found, began = time.perf_counter() - began, time.perf_counter()
            with ring.use(unit):
                for _ in range(calls):
                    self.compute()
        found = min(found, time.perf_counter() - began)
        ring.stop()
        return found

    # ---- how things are timed ----

    def step(self) -> None:
        self._done += 1
        self._progress(self._done, self._total)

    def best(self, call: Callable[[], object]) -> float:
        """Seconds of a call: repetitions of a few milliseconds each, of which :func:`typical` is taken; the first call
        is left out."""
        call()
        found = []
        for _ in range(REPEATS):
            calls, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < SLICE or not calls:
                call()
                calls += 1
            found.append(took / calls)
            if time.perf_counter() > self._until:
                break
        return typical(found)


def _slower(speed: FormatSpeed, vector: float, product: float) -> FormatSpeed:
    """So many times slower."""
    return FormatSpeed(
        bytes_per_weight=speed.bytes_per_weight,
        vector={tokens: vector * seconds for tokens, seconds in speed.vector.items()},
        product={tokens: product * seconds for tokens, seconds in speed.product.items()},
    )


def _better(one: FormatSpeed, other: FormatSpeed) -> FormatSpeed:
    """The faster of two measurements of a format, figure by figure."""
    return FormatSpeed(
        bytes_per_weight=one.bytes_per_weight,
        vector={tokens: min(seconds, other.vector[tokens]) for tokens, seconds in one.vector.items()},
        product={tokens: min(seconds, other.product[tokens]) for tokens, seconds in one.product.items()},
    )


def _timed(program: ops.Program, kinds: dict[str, tuple[str, ...]]) -> dict[str, float]:
    """Seconds of the operations of a program whose names have one of these parts in them, by their kind."""
    seconds = dict.fromkeys(kinds, 0.0)
    for function, args, kwargs in program.calls:
        began = time.perf_counter()
        function(*args, **kwargs)
        took = time.perf_counter() - began
        names = (function.__name__, *(getattr(each, "__name__", "") for each in args[:1]))
        for kind, parts in kinds.items():
            if any(part in name for name in names for part in parts):
                seconds[kind] += took
    return seconds
