"""From a checkpoint and a budget to an engine: plan, rehearse, load.

What a step needs in scratch is found by running the decoder dry (:func:`tightfit.kernels.ops.dry`); what the
interpreter, torch and the libraries need is measured by a rehearsal: every kind of layer, the head and the sampler run
once at their largest size on weights that nobody has written yet (reading such memory takes none), and the operating
system says what is resident. Only then are weights loaded.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from tightfit.budget import malloc
from tightfit.budget.code import drop_code_pages
from tightfit.budget.ledger import PAGE, Arena, Ledger, Workspace, align
from tightfit.budget.machine import MachineRecord, cache_folder, processor, versions
from tightfit.budget.meter import resident_set
from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.decode.params import SamplingParams
from tightfit.decode.sample import Sampler
from tightfit.engine.engine import Engine, use_threads
from tightfit.errors import BudgetError, UsageError
from tightfit.experts.store import LEAST_SLOTS, CachedExperts, on_disk
from tightfit.kernels import cpu, ops
from tightfit.kernels.layout import TILE_ROWS
from tightfit.kv.base import BaseCache
from tightfit.kv.compose import EXACT, compose, known_of
from tightfit.kv.fitted import Known
from tightfit.kv.make import entry_nbytes, make_cache
from tightfit.kv.reuse.disk import Disk
from tightfit.kv.reuse.memory import Memory, unit_of
from tightfit.kv.reuse.prompts import PromptCache
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder, cache_layouts
from tightfit.model.spec import ModelSpec
from tightfit.plan.cost import Cost
from tightfit.plan.refusal import refusal
from tightfit.plan.schema import Numerics, Plan
from tightfit.plan.search import Search
from tightfit.plan.sensitivity import read_sensitivity
from tightfit.plan.sizes import Constraints, Layout
from tightfit.plan.speeds import known_speeds
from tightfit.weights.placement.base import Placement
from tightfit.weights.placement.places import Place, check, group_of, layer_name
from tightfit.weights.placement.resident import Resident
from tightfit.weights.placement.streamed import Kept, Streamed

FIRST_GUESS = 48 << 20  # what running everything once adds to the resident set, at most
MARGIN = 8 << 20  # small temporaries, text and token lists that a long run adds after the rehearsal
ENCODING = 256  # bytes that encoding a prompt takes for each token, for a moment
NOISE = 3 << 20  # by how much the resident set of equal processes differs: a stated budget must work in the next one
PEAK_MARGIN = 1 << 20  # what importing may still add to a peak that it has already reached
ROUNDS = 4
WORTHWHILE = 1 << 20  # bytes that are left for which it is planned again
VIRTUAL = 1 << 36  # address space of an arena that is never written
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}


@dataclass(frozen=True)
class Shape:
    """What decides how much memory a step takes. ``formats`` of the layers and ``outer`` are spec strings."""

    outer: str
    formats: tuple[str, ...]
    context: int
    sequences: int
    chunk: int
    numerics: Numerics
    cache: str
    layered: bool

    @staticmethod
    def of(plan: Plan) -> Shape:
        formats = tuple(layer.format for layer in plan.layers)
        layered = plan.prefill == "layered"
        sizes = plan.context, plan.sequences, plan.chunk
        return Shape(plan.outer.format, formats, *sizes, plan.numerics, plan.cache, layered)


def different_layers(checkpoint: Checkpoint, spec: ModelSpec, formats: Sequence[str]) -> list[int]:
    """The first layer of each kind and way of storing it, and those that these read: the others run just as these
    do."""
    first: dict[tuple[object, ...], int] = {}
    for index, (layer, fmt) in enumerate(zip(spec.layers, formats, strict=True)):
        group = group_of(checkpoint, spec, layer_name(index), fmt)
        first.setdefault((layer.kind, *(place.format for place in group.places)), index)
    return sorted({*first.values(), *(spec.owners[index] for index in first.values())})


def _tried_layers(checkpoint: Checkpoint, spec: ModelSpec, shape: Shape) -> list[int]:
    """The layers with which a step is tried: one of each kind, or all where the cache tells them apart."""
    if compose(shape.cache).joined:
        return list(range(len(spec.layers)))
    return different_layers(checkpoint, spec, shape.formats)


def build(
    checkpoint: Checkpoint,
    spec: ModelSpec,
    layers: Sequence[int],
    shape: Shape,
    weights: Arena,
    kv: Arena,
    plan: Plan | None = None,
    slots: Arena | None = None,
) -> tuple[Placement, Decoder, BaseCache]:
    """Weights, decoder and cache of the given layers in their arenas; nothing is read or written. Parameters are all
    resident unless a ``plan`` for all layers says something else. ``slots`` is the arena of its experts. Layers that
    were not trained to share keys and values do so only if all are there."""
    formats = {index: shape.formats[index] for index in layers}
    gemm, kv_type = DTYPES[shape.numerics.gemm], DTYPES[shape.numerics.kv]
    activations = shape.numerics.activations
    placement: Placement
    if plan is not None and plan.streamed:
        groups = [group_of(checkpoint, spec, layer_name(index), fmt) for index, fmt in formats.items()]
        experts: list[tuple[Place, ...]] = []
        if plan.experts is not None:
            both = [on_disk(checkpoint, group) for group in groups]
            groups, experts = [group for group, _ in both], [of_layer for _, of_layer in both]
        kept = Kept(tuple(layer.resident or 0 for layer in plan.layers), head_rows(spec, plan))
        placement = Streamed(checkpoint, spec, shape.outer, groups, gemm, weights, activations, kept, plan.buffers)
        if plan.experts is not None and slots is not None:
            placement = CachedExperts(checkpoint, spec, placement, experts, slots, plan.experts, (gemm, activations))
    else:
        placement = Resident(checkpoint, spec, shape.outer, formats, gemm, weights, activations)
    spec = spec.part(layers)
    layouts = cache_layouts(spec, shape.context, shape.chunk)
    known = known_of(shape.cache, checkpoint.name, checkpoint.fingerprint, spec.owners)
    cache = make_cache(shape.cache, layouts, shape.context, shape.sequences, kv_type, kv, gemm, shape.chunk, known)
    if cache.reads:
        cache.resolve(partial(checkpoint.tokenizer().encode, add_special_tokens=False))
    return placement, Decoder(spec, placement), cache


def _known(plan: Plan, owners: list[int]) -> Known:
    """What the methods of the cache know of a model that was trained with these owners of keys and values."""
    return known_of(plan.cache, plan.model.name, plan.model.fingerprint, owners)


def head_rows(spec: ModelSpec, plan: Plan) -> int:
    """How many rows of the head stay in memory."""
    return spec.vocab_size if plan.outer.resident is None else plan.outer.resident


def largest_step(shape: Shape) -> Batch:
    """The step that needs most scratch: one whole chunk at the end of the context, all other sequences decoding."""
    length = min(shape.chunk, shape.context)
    prefill = Segment(0, shape.context - length, [0] * length)
    decode = [Segment(slot, shape.context - 1, [0], decode=True) for slot in range(1, shape.sequences)]
    return Batch.of([prefill, *decode])


@torch.inference_mode()
def workspace_bytes(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan) -> int:
    """Bytes of scratch that the largest step of ``plan`` takes, found by running it dry."""
    shape = Shape.of(plan)
    cpu.set_threads(plan.threads)  # each of them has scratch
    layers = _tried_layers(checkpoint, spec, shape)
    if spec.shares:  # what some read of others lies in scratch memory
        layers = list(range(len(spec.layers)))
    _, decoder, cache = build(checkpoint, spec, layers, shape, Arena(VIRTUAL), Arena(VIRTUAL))
    ws = Workspace(Arena(VIRTUAL))
    everyone = [Segment(slot, shape.context - 1, [0], decode=True) for slot in range(shape.sequences)]
    for step in (largest_step(shape), Batch(tuple(everyone))):  # small chunks take less than rows that decode
        with ops.dry(), ws.frame():
            decoder.logits(decoder.hidden(step, cache, ws), ws)
    if shape.layered:
        with ops.dry(), ws.frame():
            prompt = Segment(0, 0, [0] * shape.context, length=shape.context)
            decoder.logits(decoder.hidden_layered(prompt, shape.chunk, cache, ws), ws)
    cache.close()
    return align(ws.high_water, PAGE)


@torch.inference_mode()
def rehearse(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan) -> int:
    """Bytes of the ``runtime`` account: what is resident beside the arenas once everything has run.

    Runs one layer of each kind, or all where methods of the cache tell them apart, the head and the sampler at their
    largest sizes, and at the sizes of one token.
    """
    shape = Shape.of(plan)
    cpu.set_threads(plan.threads)
    gc.collect()
    drop_code_pages()
    layers = _tried_layers(checkpoint, spec, shape)
    kv, scratch = Arena(VIRTUAL), Arena(plan.accounts["workspace"])
    _, decoder, cache = build(checkpoint, spec, layers, shape, Arena(VIRTUAL), kv)
    ws = Workspace(scratch)
    length = min(shape.chunk, shape.context)
    sampler = Sampler(SamplingParams(temperature=1.0, top_p=0.9, repetition_penalty=1.1, seed=0))
    one = Batch((Segment(0, min(length, shape.context - 1), [0], decode=True),))
    # The largest last: libraries keep the code of the latest shapes, and whole chunks come first in a run.
    largest = largest_step(shape)
    if shape.cache != EXACT:  # a cache that is not full takes as much scratch as one that is
        parts = [replace(segment, start=0) for segment in largest.segments]
        largest, one = Batch(tuple(parts)), Batch((replace(one.segments[0], start=0),))
    for batch in (*_buckets(length), largest, one):
        use_threads(batch, plan.threads, cache.gemm_dtype)
        for segment in batch.segments:
            cache.begin(segment.slot, segment.start)
        with ws.frame():
            logits = decoder.logits(decoder.hidden(batch, cache, ws), ws)
            sampler.sample(logits[0], [0])
        for segment in batch.segments:
            cache.prefilled(segment.slot, segment.start, segment.stop)
    if shape.layered:
        prompt = Segment(0, 0, [0] * min(2 * shape.chunk, shape.context), length=shape.context)
        cache.begin(0, 0)
        with ws.frame():
            decoder.logits(decoder.hidden_layered(prompt, shape.chunk, cache, ws), ws)
    cache.rehearse(shape.context if shape.layered else length)
    cache.close()
    kv.release()
    scratch.release()
    return resident_set().current


@dataclass(frozen=True)
class Settled:
    """The outcome of planning: a plan, or why there is none."""

    search: Search
    plan: Plan | None
    refusal: BudgetError | None


def search_for(checkpoint: Checkpoint, spec: ModelSpec, constraints: Constraints) -> Search:
    """The search within constraints. Raises CheckpointError if the checkpoint is not what ``spec`` describes."""
    check(checkpoint, spec)
    drop_code_pages()  # torch was just imported: its peak should not be added to what planning takes
    sensitivity = read_sensitivity(checkpoint.fingerprint, len(spec.layers))
    threads, types = constraints.threads, constraints.numerics
    speeds = known_speeds(MachineRecord.open(), threads, types, checkpoint.largest_file)
    times = None if speeds is None else Cost(checkpoint, spec, speeds, threads, types)
    scratch = partial(workspace_bytes, checkpoint, spec)
    return Search(checkpoint, spec, constraints, scratch, sensitivity, times)


def smallest_runtime(search: Search) -> int:
    """The ``runtime`` account of the smallest plan as measured here, in bytes."""
    return _measured(search, search.smallest(0))


def _measured(search: Search, plan: Plan) -> int:
    """The ``runtime`` account of ``plan`` as a rehearsal measures it in this process."""
    margin = max(MARGIN, ENCODING * plan.context)
    measured = rehearse(search.checkpoint, search.spec, plan) + margin
    # Importing took its peak before anything could be given back.
    return max(measured, resident_set().peak + PEAK_MARGIN - (plan.total - plan.accounts["runtime"]))


def settle(checkpoint: Checkpoint, spec: ModelSpec, constraints: Constraints, elsewhere: int = 0) -> Settled:
    """Plans with the ``runtime`` account as a rehearsal of the plan measures it in this process.

    ``elsewhere`` is by how many bytes the process that will run the plan is larger than this one.
    """
    search = search_for(checkpoint, spec, constraints)
    guess = resident_set().current + FIRST_GUESS
    rehearsed = search.draft(guess) or search.smallest(guess)
    runtime, fitting = _measured(search, rehearsed) + elsewhere, None
    for _ in range(ROUNDS):
        plan = search.find(runtime)
        if plan is None:
            known = _alike(search.smallest(runtime), rehearsed)
            smallest = runtime if known else smallest_runtime(search) + elsewhere
            if fitting or search.smallest(smallest).total > constraints.budget:
                return Settled(search, fitting, None if fitting else refusal(search, smallest + NOISE))
            runtime = smallest
            continue
        measured = runtime if _alike(plan, rehearsed) else _measured(search, plan) + elsewhere
        if plan.total - runtime + measured <= constraints.budget:
            fitting = plan.model_copy(update={"accounts": plan.accounts | {"runtime": measured}})
            if runtime - measured < WORTHWHILE:
                return Settled(search, fitting, None)
        runtime, rehearsed = measured, plan
    return Settled(search, fitting, None if fitting else refusal(search, runtime + NOISE))


def _alike(plan: Plan, other: Plan) -> bool:
    """Whether the same is done, in as much memory beside the runtime."""
    same = {"runtime": 0}
    return plan.model_copy(update={"accounts": plan.accounts | same}) == other.model_copy(
        update={"accounts": other.accounts | same, "budget": plan.budget}
    )


def fit_plan(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan) -> Plan:
    """``plan`` with the bytes that its choices take here. Raises BudgetError if they exceed the budget it names."""
    experts = None if plan.experts is None else plan.experts.policy
    constraints = Constraints(
        plan.budget,
        plan.context,
        plan.sequences,
        plan.threads,
        plan.numerics,
        experts=experts,
        kv=plan.cache,
        prefill=plan.prefill,
        prompt_cache=plan.prompt_cache,
    )
    search = search_for(checkpoint, spec, constraints)
    no_prompts = search.no_prompts(plan.cache, plan.chunk)
    if no_prompts is not None:
        raise no_prompts
    kept = _kept(search, plan) if plan.streamed else None
    layout = Layout(plan.outer.format, tuple(layer.format for layer in plan.layers), plan.cache, plan.chunk)
    slots = 0 if plan.experts is None else plan.experts.slots
    anew = search.plan(layout, 0, kept, plan.buffers, slots)
    anew = anew.model_copy(update={"accounts": anew.accounts | {"runtime": _measured(search, anew)}})
    if anew.total > anew.budget:
        raise BudgetError(
            f"the plan needs {format_bytes(anew.total, ceil=True)} here, and names a budget of "
            f"{format_bytes(anew.budget)}",
            "Edit its 'budget', or make a new plan with `tightfit plan MODEL --memory SIZE --out FILE`.",
            smallest_bytes=anew.total,
        )
    return anew


def _kept(search: Search, plan: Plan) -> Kept:
    """What a plan keeps in memory. Raises UsageError for numbers that make no sense."""
    counts = []
    groups, experts = search.apart([layer.format for layer in plan.layers])
    if any(experts) != (plan.experts is not None) or (plan.experts is not None and plan.experts.slots < LEAST_SLOTS):
        raise UsageError(
            f"the plan names {'no' if plan.experts is None else plan.experts.slots} slots for experts",
            f"Experts that can stay on the disk take {LEAST_SLOTS} slots or more; a model without them takes none.",
        )
    for index, (layer, group) in enumerate(zip(plan.layers, groups, strict=True)):
        least, most = search.least_resident(group), len(group.places)
        count = most if layer.resident is None else layer.resident
        if not least <= count <= most or (count < most and not plan.buffers):
            raise UsageError(
                f"the plan streams layer {index} with {count} parameters in memory and {plan.buffers} buffers",
                f"Of this layer {least} to {most} parameters can stay in memory; there must be a buffer.",
            )
        counts.append(count)
    outer, rows = search.outer(plan.outer.format), head_rows(search.spec, plan)
    if not outer.least <= rows <= outer.rows or (rows % TILE_ROWS and rows < outer.rows):
        raise UsageError(
            f"the plan keeps {rows} rows of the head in memory",
            f"Of this head {outer.least} to {outer.rows} rows can stay in memory, a multiple of {TILE_ROWS} or all.",
        )
    return Kept(tuple(counts), rows)


def _buckets(length: int) -> list[Batch]:
    """A prefill of each size that gemm is padded to: a library keeps code for each."""
    sizes, size = [], 16
    while size < length:
        sizes.append(size)
        size *= 2
    return [Batch((Segment(0, 0, [0] * size),)) for size in sizes]


def start(
    checkpoint: Checkpoint, spec: ModelSpec, plan: Plan, progress: Callable[[int], None] = lambda nbytes: None
) -> tuple[Engine, Ledger]:
    """Reserves what the plan says, loads the weights, and gives an engine that is ready, with its ledger."""
    ledger = Ledger(plan.budget)
    ledger.reserve("runtime", plan.accounts["runtime"])
    weights = ledger.arena("weights", plan.accounts["weights"])
    weights.use_large_pages()
    disk = _prompts_on_disk(plan)
    kept = 0 if plan.prompt_cache is None else align(plan.prompt_cache.memory or 0, PAGE)
    kv = ledger.arena("kv", plan.accounts["kv"] - kept)
    prompts = ledger.arena("kv", kept) if kept else None
    scratch = ledger.arena("workspace", plan.accounts["workspace"])
    slots = None
    if plan.experts is not None:
        slots = ledger.arena("experts", plan.accounts["experts"])
        slots.use_large_pages()
    cpu.set_threads(plan.threads)
    shape = Shape.of(plan)
    placement, decoder, cache = build(checkpoint, spec, range(len(spec.layers)), shape, weights, kv, plan, slots)
    drop_code_pages()
    before = resident_set().peak
    torch.set_num_threads(1)  # every thread that loads converts blocks of its own
    placement.load(progress)
    malloc.trim()
    seen = resident_set()
    ledger.measure(seen.current)
    if seen.peak > before:  # what converting took, in the place of cache and scratch
        ledger.note("workspace", seen.peak - seen.current)
    drop_code_pages()
    found = None
    if plan.prompt_cache is not None:
        found = PromptCache(cache, plan.chunk, bits_of(plan), _prompts_in_memory(plan, spec, cache, prompts), disk)
    engine = Engine(decoder, cache, Workspace(scratch), plan.context, plan.chunk, plan.threads, shape.layered, found)
    return engine, ledger


def bits_of(plan: Plan) -> bytes:
    """A hash of everything that fixes the bits of keys and values beside the tokens: of the model, of what the plan
    says about how it is computed, and of what computes."""
    facts = {
        "model": plan.model.fingerprint,
        "formats": [plan.outer.format, *(layer.format for layer in plan.layers)],
        "numerics": plan.numerics.model_dump(),
        "cache": plan.cache,
        "known": _known(plan, list(range(len(plan.layers)))).digest,  # owners that it was trained with are its own
        "context": None if plan.cache == EXACT else plan.context,  # methods keep shares of it
        "prefill": plan.prefill,
        "chunk": plan.chunk,
        "threads": plan.threads,  # libraries share products out by it
        "kernels": cpu.features()["chosen"],
        "processor": processor(),  # they choose by it
        "versions": versions(),
    }
    return hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=32).digest()


def _prompts_on_disk(plan: Plan) -> Disk | None:
    """Raises UsageError for a folder that cannot be used."""
    kept = plan.prompt_cache
    if kept is None or kept.disk is None:
        return None
    folder = Path(kept.folder).expanduser() if kept.folder else cache_folder() / "prompts"
    return Disk(folder, kept.disk, bits_of(plan))


def _prompts_in_memory(plan: Plan, spec: ModelSpec, cache: BaseCache, arena: Arena | None) -> Memory | None:
    kept = plan.prompt_cache
    if arena is None or kept is None or kept.memory is None:
        return None
    layouts = cache_layouts(spec, plan.context, plan.chunk)
    known = _known(plan, spec.owners)
    largest = entry_nbytes(plan.cache, layouts, plan.context, plan.numerics.kv, plan.chunk, known)
    return Memory(arena, kept.memory, unit_of(largest, cache.whole_entries))
