"""Chooses a plan: what is preferred among all that fits.

``quality`` loses least: weights stay in their own precision if they fit; if not, which layers are rounded to how many
bits is what costs least divergence (:mod:`tightfit.plan.sensitivity`), and only where nothing fits in memory do layers
stay on the disk. ``balanced`` weighs divergence against time, and ``speed`` is the fastest that loses little
(:mod:`tightfit.plan.cost`); for them streaming is a choice like any other. What there is to choose is a mixed-integer
program (:mod:`tightfit.plan.program`); where there is nothing to choose, nothing is solved.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.errors import BudgetError, TightfitError, UsageError
from tightfit.kv.compose import compose
from tightfit.model.decoder import cache_layouts
from tightfit.model.spec import ModelSpec
from tightfit.plan.program import Aim, Answer, Choice, Table, solve
from tightfit.plan.refusal import refusal
from tightfit.plan.schema import OWN, Plan
from tightfit.plan.sensitivity import OUTER, Sensitivity, layer_group, prior, reference_prompt
from tightfit.plan.sizes import BUFFERS, Constraints, Layout, Sizes, WorkspaceBytes
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, layer_name, params_of
from tightfit.weights.placement.readers import READERS
from tightfit.weights.placement.streamed import OF_A_READER, least_resident, streamable, streamed_nbytes

# From the most precise to the smallest. Fewer than 4 bits lose so much that they must be asked for.
LEVELS = (OWN, "int8", "int6", "int5", "int4", "int4(group=64)", "int4(group=128)")
CHUNKS = (512, 256, 128, 64, 32, 16)
SMALL_CHUNK = 128  # with smaller ones prompts take several times as long: rounding more is better
SHARE_OF_WORKSPACE = 4  # the scratch of a chunk is at most so many times smaller than streamed weights
# Caches to choose from, where it is left open: from what changes results least; then few tokens in few bits.
CACHES = ("none", "int8", "int4")
SMALL_CACHE = "snapkv(keep={})+int4"
LEAST_KEPT = 128
NEW_TOKENS = 256  # that plans are compared with, after a prompt of `reference_prompt`
TIE = 0.05  # by which divergences may differ that are as good as equal: less than they are known to
NOTICED = 0.02  # nats that weigh as much as the time of the fastest plan, where both are balanced
MOST_NATS = 0.1  # that the fastest plan may lose
TRIES = 4


class Times(Protocol):
    """What of :class:`tightfit.plan.cost.Cost` decides between plans. All are seconds."""

    def decode_seconds(self, group: str, fmt: str) -> float: ...
    def prefill_seconds(self, group: str, fmt: str, chunk: int) -> float: ...
    def attend_seconds(self, layer: int, kv: str, tokens: int) -> float: ...
    def attend_prefill_seconds(self, layer: int, kv: str, start: int, count: int) -> float: ...
    def step_seconds(self) -> float: ...
    def stream_seconds(self, nbytes: int) -> float: ...


class ByBytes:
    """Times of a machine that was not measured: fewer bytes are faster, and those on the disk slower."""

    MEMORY, DISK = 10e9, 1e9  # bytes per second

    def __init__(self, sizes: Sizes) -> None:
        self._sizes = sizes

    def decode_seconds(self, group: str, fmt: str) -> float:
        return self._sizes.size(group, fmt)[0] / self.MEMORY

    def prefill_seconds(self, group: str, fmt: str, chunk: int) -> float:
        return self._sizes.size(group, fmt)[0] / self.MEMORY

    def attend_seconds(self, layer: int, kv: str, tokens: int) -> float:
        return 0.0

    def attend_prefill_seconds(self, layer: int, kv: str, start: int, count: int) -> float:
        return 0.0

    def step_seconds(self) -> float:
        return 0.0

    def stream_seconds(self, nbytes: int) -> float:
        return nbytes / self.DISK


@dataclass(frozen=True)
class Choices:
    """A chunk, and what can be chosen with it: formats of each group of matrices, and caches."""

    chunk: int
    levels: tuple[str, ...]
    caches: tuple[str, ...]
    table: Table

    def layout(self, answer: Answer) -> Layout:
        *formats, cache = answer.choices
        outer, *layers = (self.levels[choice] for choice in formats)
        return Layout(outer, tuple(layers), self.caches[cache], self.chunk)


class Search(Sizes):
    """Finds plans for one checkpoint within constraints."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        spec: ModelSpec,
        constraints: Constraints,
        workspace: WorkspaceBytes,
        sensitivity: Sensitivity | None = None,
        times: Times | None = None,
    ) -> None:
        super().__init__(checkpoint, spec, constraints, workspace)
        self.sensitivity = sensitivity or prior(len(spec.layers))
        self.times = times or ByBytes(self)
        self._candidates: dict[int, list[str]] = {}
        self._choices: dict[tuple[int, int, tuple[str, ...]], Choices] = {}

    def within(self, constraints: Constraints) -> Search:
        """The search within other constraints."""
        return Search(self.checkpoint, self.spec, constraints, self.workspace, self.sensitivity, self.times)

    def best(self, runtime: int) -> Plan:
        """The plan to run where the interpreter and its libraries take ``runtime`` bytes.

        Raises BudgetError, which names the smallest budget that would work.
        """
        found = self.find(runtime)
        if found is None:
            raise refusal(self, runtime)
        return found

    def find(self, runtime: int) -> Plan | None:
        """The plan to run; None if nothing fits."""
        plan = self.draft(runtime)
        if plan is None or plan.streamed or not self._choosable(plan):
            return plan
        aims = self.aims(plan.budget, runtime)
        found = next((found for found in self.solved(aims, runtime) if found is not None), None)
        if found is None:
            raise TightfitError("the solver found nothing where something fits", "Please report this.")
        return found

    def draft(self, runtime: int) -> Plan | None:
        """A plan that fits, with one format for all: the most precise that does. None if nothing fits."""
        for level, chunk in self._by_preference():
            for kv in self.caches(chunk):
                plan = self.uniform(level, chunk, runtime, kv)
                if plan.total <= plan.budget:
                    return plan
        return self._streamed(runtime)

    def _choosable(self, draft: Plan) -> bool:
        """Whether there may be a better plan than one in memory with a single format."""
        levels, caches = self.levels(), self.caches(draft.chunk)
        if len(levels) == len(caches) == 1:
            return False
        exact = draft.outer.format == levels[0] and draft.cache == caches[0]
        return not exact or self.constraints.prefer != "quality"

    def aims(self, budget: int, runtime: int) -> list[Aim]:
        """What is preferred, and what if that cannot be had."""
        if self.constraints.prefer == "balanced":
            return [Aim(nats=1 / NOTICED, seconds=1.0, relative=True, most_bytes=budget, streams=True)]
        if self.constraints.prefer == "speed":
            fastest = Aim(seconds=1.0, most_nats=MOST_NATS, most_bytes=budget, streams=True)
            return [fastest, Aim(nats=1.0, most_bytes=budget, streams=True)]
        uniform = [self.uniform(level, chunk, runtime) for level in self.levels() for chunk in self._useful(runtime)]
        known = [self.nats(plan) for plan in uniform if plan.total <= budget]
        return [Aim(nats=1.0, most_bytes=budget, tie=TIE, tie_below=min(known, default=None))]

    def nats(self, plan: Plan) -> float:
        """The predicted divergence of a plan. What is not known was asked for, and is the same for all plans."""
        return sum(self.sensitivity.known_of_plan(plan))

    def solved(self, aims: Sequence[Aim], runtime: int) -> list[Plan | None]:
        """The plan that meets each aim; None where there is none. Those that have a limit of bytes are in it."""
        choices = [self.choices(chunk, runtime) for chunk in self._useful(runtime)]
        wanted, missing = list(aims), 0.0
        for _ in range(TRIES):
            answers = solve([each.table for each in choices], wanted)
            plans = [
                None if answer is None else self._exact(choices[answer.table], answer, runtime) for answer in answers
            ]
            # What the program takes to add up does so but for alignment, and what scratch formats share.
            over = [
                max(plan.total - aim.most_bytes, 0)
                for plan, aim in zip(plans, aims, strict=True)
                if plan is not None and aim.most_bytes is not None
            ]
            if not any(over):
                return plans
            missing += max(over)
            wanted = [
                aim if aim.most_bytes is None else replace(aim, most_bytes=aim.most_bytes - missing) for aim in aims
            ]
        raise TightfitError("no plan is as small as it was computed to be", "Please report this.")

    def _exact(self, choices: Choices, answer: Answer, runtime: int) -> Plan:
        layout = choices.layout(answer)
        return self.streaming(layout, runtime) if answer.streamed else self.plan(layout, runtime)

    def _useful(self, runtime: int) -> list[int]:
        """The chunks to choose from: none so small that prompts take several times as long, unless nothing else
        fits."""
        chunks = [
            chunk
            for chunk in self.chunks()
            if self._smallest_uniform(self.levels()[-1], chunk, runtime).total <= self.constraints.budget
        ]
        return [chunk for chunk in chunks if chunk >= SMALL_CHUNK] or chunks or self.chunks()[-1:]

    def seconds(self, plan: Plan) -> float:
        """What the workload takes that plans are compared with, as the program adds it up."""
        choices = self.choices(plan.chunk, plan.accounts["runtime"], (plan.cache,))
        levels = [plan.outer.format, *(layer.format for layer in plan.layers)]
        table = choices.table
        chosen = [group[choices.levels.index(level)] for group, level in zip(table.groups, levels, strict=False)]
        chosen += table.groups[-1]
        stored = plan.outer.nbytes + sum(layer.nbytes for layer in plan.layers)
        on_disk = max(stored - plan.weights_bytes, 0) if plan.streamed else 0
        prefill = table.prefill + sum(choice.prefill for choice in chosen)
        decode = table.decode + sum(choice.decode for choice in chosen)
        return max(prefill, table.stream_prefill * on_disk) + max(decode, table.stream_decode * on_disk)

    @property
    def timed(self) -> bool:
        """Whether times are those of this machine."""
        return not isinstance(self.times, ByBytes)

    def choices(self, chunk: int, runtime: int, caches: tuple[str, ...] | None = None) -> Choices:
        """What can be chosen where prompts are computed in chunks of ``chunk``."""
        key = chunk, runtime, caches or tuple(self.caches(chunk))
        if key not in self._choices:
            self._choices[key] = self._choices_of(*key)
        return self._choices[key]

    def _choices_of(self, chunk: int, runtime: int, caches: tuple[str, ...]) -> Choices:
        levels = tuple(self.levels())
        layers = range(len(self.spec.layers))
        prompt = reference_prompt(self.constraints.context)
        counts = Counter(min(chunk, prompt - start) for start in range(0, prompt, chunk))
        times, middle = self.times, prompt + NEW_TOKENS // 2

        def nats(group: str, level: str) -> float:
            found = self.sensitivity.of(group, level)
            return 0.0 if found is None else found  # a format that was asked for: there is no other

        def outer(level: str) -> Choice:
            nbytes = sum(self.size(name, level)[0] for name in (EMBEDDINGS, HEAD))
            seconds = sum(times.decode_seconds(name, level) for name in (EMBEDDINGS, HEAD))
            return Choice(nbytes, nats(OUTER, level), seconds, NEW_TOKENS * seconds)

        def layer(index: int, level: str) -> Choice:
            name = layer_name(index)
            prefill = sum(times.prefill_seconds(name, level, count) * often for count, often in counts.items())
            decode = NEW_TOKENS * times.decode_seconds(name, level)
            nbytes = self.size(name, level)[0]
            return Choice(nbytes, nats(layer_group(index), level), prefill, decode, self._streamable(index, level))

        def cache(kv: str) -> Choice:
            prefill = decode = 0.0
            alike = {layer.attention: index for index, layer in enumerate(self.spec.layers)}
            often = Counter(layer.attention for layer in self.spec.layers)
            for attention, index in alike.items():
                for start in range(0, prompt, chunk):
                    count = min(chunk, prompt - start)
                    prefill += often[attention] * times.attend_prefill_seconds(index, kv, start, count)
                decode += often[attention] * NEW_TOKENS * times.attend_seconds(index, kv, middle)
            widest = [
                self.uniform(level, chunk, runtime, kv).accounts["workspace"] for level in (levels[0], levels[-1])
            ]
            lost = self.sensitivity.of_cache(kv, prompt)
            return Choice(self.cache_bytes(kv, chunk) + max(widest), lost or 0.0, prefill, decode)

        smallest = self.uniform(levels[-1], chunk, runtime, caches[0])
        groups = [tuple(outer(level) for level in levels)]
        groups += [tuple(layer(index, level) for level in levels) for index in layers]
        groups += [tuple(cache(kv) for kv in caches)]
        chosen = sum(group[-1].nbytes for group in groups[:-1]) + self.cache_bytes(caches[0], chunk)
        largest = max(self._streamable(index, levels[0]) for index in layers)
        streams = largest > 0
        table = Table(
            groups=tuple(groups),
            nbytes=smallest.total - smallest.accounts["workspace"] - chosen,
            prefill=sum(counts.values()) * times.step_seconds(),
            decode=NEW_TOKENS * times.step_seconds(),
            stream_prefill=sum(counts.values()) * times.stream_seconds(1) if streams else 0.0,
            stream_decode=NEW_TOKENS * times.stream_seconds(1) if streams else 0.0,
            buffers=max(BUFFERS) * largest,
            readers=READERS * OF_A_READER,
        )
        return Choices(chunk, levels, caches, table)

    def _streamable(self, index: int, level: str) -> int:
        """Bytes of a layer that may be on the disk where streaming is a choice among others: not of mixtures, whose
        experts are cached, and not of a disk that was not measured."""
        if level != self.levels()[0] or self._cached_experts:
            return 0
        try:
            self.times.stream_seconds(1)
        except ValueError:
            return 0
        group = self.group(layer_name(index), level)
        return streamed_nbytes(group, self.least_resident(group))

    @cached_property
    def _cached_experts(self) -> bool:
        _, experts = self.apart([self.levels()[0]] * len(self.spec.layers))
        return any(experts)

    def _by_preference(self) -> Iterator[tuple[str, int]]:
        """(format, chunk): more bits before larger chunks, but that rounding more is better than chunks so small that
        prompts take several times as long."""
        both = [(level, chunk) for level in self.levels() for chunk in self.chunks()]
        yield from sorted(both, key=lambda pair: pair[0] != OWN and pair[1] < SMALL_CHUNK)

    def _streamed(self, runtime: int) -> Plan | None:
        """The plan that streams least at the largest chunk that leaves most of the memory to the weights, or if none
        does, that fits: every chunk reads what is streamed once."""
        level, fitting = self.streamable(), []
        if level is None:
            return None
        for chunk in self.chunks():
            for kv in self.caches(chunk):
                plan = self.streaming(self._uniform(level, chunk, kv), runtime)
                if plan.total <= plan.budget:
                    if SHARE_OF_WORKSPACE * plan.accounts["workspace"] <= plan.weights_bytes:
                        return plan
                    fitting.append(plan)
                    break
        return fitting[0] if fitting else None

    def streamable(self) -> str | None:
        """The format in which layers can be read from the disk as they are used: that of the files."""
        level = self.constraints.weights or OWN
        groups, experts = self.apart([level] * len(self.spec.layers))
        some = any(least_resident(self.checkpoint, group) < len(group.places) for group in groups)
        return level if some or any(experts) else None

    @property
    def streams_as_stored(self) -> bool:
        """Whether the matrices of all layers can be used as they lie in the files, and none must be converted first."""
        level = self.constraints.weights or OWN
        groups = (self.group(layer_name(index), level) for index in range(len(self.spec.layers)))
        places = (place for group in groups for place in group.places if place.param.is_matrix)
        return all(streamable(self.checkpoint, place) for place in places)

    def smallest(self, runtime: int) -> Plan:
        """The plan that needs least; its ``budget`` is what it needs."""
        plan = min(self.smallest_of_each(runtime), key=lambda plan: plan.total)
        return plan.model_copy(update={"budget": plan.total})

    def smallest_of_each(self, runtime: int) -> list[Plan]:
        """Of each format the plan that needs least, and at the end that of streaming, where that needs still less."""
        chunk = self.chunks()[-1]
        plans = [self._smallest_uniform(level, chunk, runtime) for level in self.levels()]
        streaming = self._smallest_streaming(chunk, runtime)
        if streaming is not None and streaming.total < min(plan.total for plan in plans):
            plans.append(streaming)
        return plans

    def least(self, runtime: int) -> Plan:
        """A plan that needs little, of the smallest format or streaming: found sooner than the smallest of all."""
        chunk = self.chunks()[-1]
        streaming = self._smallest_streaming(chunk, runtime)
        smallest = self._smallest_uniform(self.levels()[-1], chunk, runtime)
        return smallest if streaming is None else min(smallest, streaming, key=lambda plan: plan.total)

    def _smallest_streaming(self, chunk: int, runtime: int) -> Plan | None:
        level = self.streamable()
        if level is None:
            return None
        both = (self.least_streaming(self._uniform(level, chunk, kv), runtime) for kv in self.caches(chunk))
        return min(both, key=lambda plan: plan.total)

    def _smallest_uniform(self, level: str, chunk: int, runtime: int) -> Plan:
        return min((self.uniform(level, chunk, runtime, kv) for kv in self.caches(chunk)), key=lambda plan: plan.total)

    def uniform(self, level: str, chunk: int, runtime: int, kv: str | None = None) -> Plan:
        """The plan with every matrix in ``level``, whether it fits or not, by default with the most exact cache."""
        return self.plan(self._uniform(level, chunk, kv or self.caches(chunk)[0]), runtime)

    def _uniform(self, level: str, chunk: int, kv: str) -> Layout:
        return Layout(level, (level,) * len(self.spec.layers), kv, chunk)

    def levels(self) -> list[str]:
        """Formats from the most precise to the smallest; those that save nothing are left out."""
        if self.constraints.weights is not None:
            return [self.constraints.weights]
        levels: list[str] = []
        smallest = math.inf
        for level in LEVELS:
            nbytes = sum(self.size(group, level)[0] for group in params_of(self.spec))
            if nbytes < smallest:
                levels.append(level)
                smallest = nbytes
        return levels

    def chunks(self) -> list[int]:
        """Chunk sizes from large to small; one that holds the whole context is enough. Raises UsageError where no
        entry of the prompt cache is as small as its limit."""
        constraints = self.constraints
        useful = [chunk for chunk in CHUNKS if chunk < 2 * constraints.context] or [CHUNKS[-1]]
        chunks = useful if constraints.chunk is None else [constraints.chunk]
        refusals = [self.no_prompts(self.caches(chunk)[-1], chunk) for chunk in chunks]
        fitting = [chunk for chunk, refusal in zip(chunks, refusals, strict=True) if refusal is None]
        if not fitting and refusals[-1] is not None:  # that of the smallest entries
            raise refusals[-1]
        return fitting

    def caches(self, chunk: int) -> list[str]:
        """What the cache can be, from what changes results least to what is smallest. Raises BudgetError if nothing
        is as small as it should be, or UsageError where nothing can be chosen for the model."""
        c = self.constraints
        if c.kv is not None:
            return [c.kv]
        if chunk not in self._candidates:
            limit = math.inf if c.kv_bytes is None else c.kv_bytes
            usable = [kv for kv in (*CACHES, *self._small_caches(chunk, limit)) if self._usable(kv)]
            found = [kv for kv in usable if self.cache_bytes(kv, chunk) <= limit]
            found = [kv for kv in found if self.no_prompts(kv, chunk) is None] or found
            if not found:
                smallest = min(self.cache_bytes(kv, chunk) for kv in usable)
                raise BudgetError(
                    f"no cache of {self.checkpoint.name} is as small as {format_bytes(c.kv_bytes or 0)}",
                    f"The smallest that is chosen takes {format_bytes(smallest, ceil=True)}: {usable[-1]}. Name one "
                    "yourself with --kv, or run fewer sequences.",
                )
            self._candidates[chunk] = found
        return self._candidates[chunk]

    def _small_caches(self, chunk: int, limit: float) -> list[str]:
        """Caches of some tokens in few bits, from large to small; with a ``limit`` the largest that keeps it too."""
        context = self.constraints.context
        keeps = [LEAST_KEPT << power for power in range(context.bit_length()) if LEAST_KEPT << power < context]
        keeps = keeps or [LEAST_KEPT]
        if limit < math.inf and self._usable(SMALL_CACHE.format(LEAST_KEPT)):
            keep, step = LEAST_KEPT, 1 << max(context.bit_length() - 1, 0)
            while step >= LEAST_KEPT:
                if self.cache_bytes(SMALL_CACHE.format(keep + step), chunk) <= limit:
                    keep += step
                step //= 2
            keeps.append(keep)
        return [SMALL_CACHE.format(keep) for keep in sorted(set(keeps), reverse=True)]

    def _usable(self, kv: str) -> bool:
        """Whether all layers can use the methods."""
        try:
            compose(kv).check(cache_layouts(self.spec, self.constraints.context, CHUNKS[0]))
        except UsageError:
            return False
        return True


def precisions(search: Search, runtime: int) -> list[dict[str, Any]]:
    """What each format of the weights needs at the smallest chunk, and streaming, JSON-ready."""
    return [
        {
            "format": plan.outer.format,
            "streamed": plan.streamed,
            "smallest_bytes": plan.total,
            "accounts": dict(plan.accounts),
        }
        for plan in search.smallest_of_each(runtime)
    ]
