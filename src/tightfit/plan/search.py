"""Chooses a plan: the most precise weights that fit, then the largest chunk.

Weights stay in their own precision if they fit, or are rounded to 8, 6, 5 or 4 bits, with as many layers in the next
more precise format as there is room for. Of two plans with equal weights the one with larger chunks is faster. Where
nothing fits, weights stay on the disk, as the files have them: of mixtures first the experts, but for as many as there
is room for; then layers are read in each step, again but for as much as there is room for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tightfit.budget.ledger import PAGE, align
from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.errors import BudgetError, UsageError
from tightfit.experts.store import LEAST_SLOTS, caching_nbytes, expert_count, on_disk
from tightfit.kv.compose import compose
from tightfit.kv.make import entry_nbytes, kv_nbytes
from tightfit.kv.reuse.disk import OVERHEAD
from tightfit.kv.reuse.memory import smallest_memory
from tightfit.kv.share.sharing import owners_for
from tightfit.model.decoder import cache_layouts
from tightfit.model.spec import ModelSpec, MoeSpec
from tightfit.plan.schema import (
    OWN,
    ExpertsPlan,
    LayerPlan,
    ModelRef,
    Numerics,
    OuterPlan,
    Plan,
    PromptCachePlan,
    Schedule,
)
from tightfit.weights.placement.base import EXPERT_OBJECTS
from tightfit.weights.placement.fill import scratch_bytes
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, Group, Place, group_of, layer_name, params_of
from tightfit.weights.placement.read import converted
from tightfit.weights.placement.streamed import Kept, Outer, least_resident, spread, streamable, streaming_nbytes

# From the most precise to the smallest. Fewer than 4 bits lose so much that they must be asked for.
LEVELS = (OWN, "int8", "int6", "int5", "int4", "int4(group=64)", "int4(group=128)")
# What is left of a budget is spent on the next more precise level for some of the layers.
BETTER = {"int6": "int8", "int5": "int6", "int4": "int5"}
CHUNKS = (512, 256, 128, 64, 32, 16)
SMALL_CHUNK = 128
EXPERTS = "score+gate"  # how experts on the disk are cached, unless it is said
BUFFERS = (3, 2)  # of streamed layers: one in use, others that are read ahead
SHARE_OF_WORKSPACE = 4  # the scratch of a chunk is at most so many times smaller than streamed weights
ROUTER = "router"
# Of caches that must be small, from what changes results least; then as many tokens as fit, in few bits.
CACHES = ("none", "int8", "int4")
SMALL_CACHE = "snapkv(keep={})+int4"
LEAST_KEPT = 128


@dataclass(frozen=True)
class Constraints:
    """What the user asked for. ``weights``, ``chunk``, ``experts`` and ``kv`` are chosen if they are None, ``kv`` so
    that the cache takes at most ``kv_bytes``; ``budget`` is bytes."""

    budget: int
    context: int
    sequences: int
    threads: int
    numerics: Numerics
    weights: str | None = None
    chunk: int | None = None
    experts: str | None = None
    kv: str | None = "none"
    kv_bytes: int | None = None
    prefill: Schedule = "chunked"
    prompt_cache: PromptCachePlan | None = None


WorkspaceBytes = Callable[[Plan], int]


class Search:
    """Finds plans for one checkpoint within constraints.

    ``workspace`` gives the scratch of a plan's largest step in bytes (the engine's dry run).
    """

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, constraints: Constraints, workspace: WorkspaceBytes
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.constraints = constraints
        self._workspace = workspace
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        self._groups: dict[tuple[str, str], Group] = {}
        self._caches: dict[tuple[str, int], int] = {}
        self._entries: dict[tuple[str, int], int] = {}
        self._workspaces: dict[tuple[str, tuple[str, ...], int, str], int] = {}  # what is resident does not change them

    def best(self, runtime: int) -> Plan:
        """The plan to run where the interpreter and its libraries take ``runtime`` bytes.

        Raises BudgetError, which names the smallest budget that would work.
        """
        for level, chunk in self._by_preference():
            plan = self.uniform(level, chunk, runtime)
            if plan.total <= plan.budget:
                return plan if self.constraints.weights is not None else self._upgrade(plan)
        streamed = self._streamed(runtime)
        if streamed is not None:
            return streamed
        raise self.refusal(runtime)

    def _by_preference(self) -> list[tuple[str, int]]:
        """(format, chunk): more bits before larger chunks, but that rounding more is better than chunks so small that
        prompts take several times as long."""
        both = [(level, chunk) for level in self.levels() for chunk in self.chunks()]
        return sorted(both, key=lambda pair: pair[0] != OWN and pair[1] < SMALL_CHUNK)

    def _streamed(self, runtime: int) -> Plan | None:
        """The plan that streams least at the largest chunk that leaves most of the memory to the weights, or if none
        does, that fits: every chunk reads what is streamed once."""
        fitting = []
        for chunk in self.chunks() if self.streamable() else ():
            plan = self.streaming(chunk, runtime)
            if plan.total <= plan.budget:
                if SHARE_OF_WORKSPACE * plan.accounts["workspace"] <= plan.weights_bytes:
                    return plan
                fitting.append(plan)
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
        groups = (self._group(layer_name(index), level) for index in range(len(self.spec.layers)))
        places = (place for group in groups for place in group.places if place.param.is_matrix)
        return all(streamable(self.checkpoint, place) for place in places)

    def streaming(self, chunk: int, runtime: int) -> Plan:
        """The plan with as much in memory as the budget allows, or if that is too little, with the least that must
        be there."""
        smallest = self._least_streaming(chunk, runtime)
        formats = [layer.format for layer in smallest.layers]
        groups, experts = self.apart(formats)
        least = [layer.resident or 0 for layer in smallest.layers]
        room = (smallest.budget - smallest.total + smallest.accounts["weights"]) // PAGE * PAGE
        outer = self.outer(formats[0])
        for buffers in BUFFERS:
            kept = spread(outer, groups, least, buffers, room)
            if kept is not None:
                whole = [len(group.places) for group in groups] == [*kept.layers] and kept.rows == outer.rows
                buffers = 0 if whole else buffers
                found = self.plan(formats[0], formats, chunk, runtime, kept, buffers, LEAST_SLOTS)
                if found.experts is None:
                    return found
                each = caching_nbytes(experts, 1) - caching_nbytes(experts, 0)
                slots = LEAST_SLOTS + (found.budget - found.total) // each
                slots = min(slots, expert_count(experts))
                return self.plan(formats[0], formats, chunk, runtime, kept, buffers, slots)
        return smallest

    def _least_streaming(self, chunk: int, runtime: int) -> Plan:
        level = self.streamable()
        assert level is not None
        groups, _ = self.apart([level] * len(self.spec.layers))
        least = Kept(tuple(self.least_resident(group) for group in groups), self.outer(level).least)
        return self.plan(level, [level] * len(groups), chunk, runtime, least, min(BUFFERS), LEAST_SLOTS)

    def least_resident(self, group: Group) -> int:
        """How many of the first parameters of a layer, ``group`` without its experts, must stay in memory: routers
        too, which are asked before their turn."""
        routers = [index for index, place in enumerate(group.places) if place.param.name == ROUTER]
        return max([least_resident(self.checkpoint, group), *(index + 1 for index in routers)])

    def smallest(self, runtime: int) -> Plan:
        """The plan that needs least; its ``budget`` is what it needs."""
        plan = min(self.smallest_of_each(runtime), key=lambda plan: plan.total)
        return plan.model_copy(update={"budget": plan.total})

    def smallest_of_each(self, runtime: int) -> list[Plan]:
        """Of each format the plan that needs least, and at the end that of streaming, where that needs still less."""
        chunk = self.chunks()[-1]
        plans = [self.uniform(level, chunk, runtime) for level in self.levels()]
        if self.streamable() is not None:
            streaming = self._least_streaming(chunk, runtime)
            if streaming.total < min(plan.total for plan in plans):
                plans.append(streaming)
        return plans

    def refusal(self, runtime: int) -> BudgetError:
        """Why nothing fits, what would, and what else would help."""
        constraints, plan = self.constraints, self.smallest(runtime)
        parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in plan.accounts.items())
        advice = [f"The smallest budget that works is {format_bytes(plan.total, ceil=True)} ({parts})."]
        advice.append(f"Type --memory {format_bytes(plan.total, ceil=True).replace(' ', '')}")
        if self.checkpoint.compressed is not None:
            advice.append("or compress the model in fewer bits (`tightfit compress`)")
        elif constraints.weights is not None:
            advice.append("or leave out --weights, so that fewer bits can be chosen")
        if not self.streams_as_stored:
            weights = "" if self.checkpoint.holds_blocks else " --weights int4"
            advice.append(
                f"or run what `tightfit compress MODEL{weights} --out FOLDER` writes, which can be read as it is used"
            )
        if constraints.sequences > 1:
            advice.append("or run fewer sequences at once (--batch)")
        if plan.accounts["kv"] > plan.total // 5:
            advice.append(
                f"or a shorter context (--context) or a smaller cache (--kv int4): {constraints.context} tokens take a "
                "large part"
            )
        return BudgetError(
            f"{self.checkpoint.name} does not fit into {format_bytes(constraints.budget)}",
            " ".join([advice[0], ", ".join(advice[1:]) + "."]),
            smallest_bytes=plan.total,
        )

    def levels(self) -> list[str]:
        """Formats from the most precise to the smallest; those that save nothing are left out."""
        if self.constraints.weights is not None:
            return [self.constraints.weights]
        levels: list[str] = []
        smallest = math.inf
        for level in LEVELS:
            nbytes = sum(self._size(group, level)[0] for group in params_of(self.spec))
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
        refusals = [self.no_prompts(chunk) for chunk in chunks]
        fitting = [chunk for chunk, refusal in zip(chunks, refusals, strict=True) if refusal is None]
        if not fitting and refusals[-1] is not None:  # that of the smallest entries
            raise refusals[-1]
        return fitting

    def no_prompts(self, chunk: int) -> UsageError | None:
        """Why there can be no prompt cache with such chunks, if one is asked for."""
        c = self.constraints
        if c.prompt_cache is None:
            return None
        if chunk + 2 > c.context:  # a whole chunk, a token that is computed, and its answer
            return UsageError(
                f"chunks of {chunk} tokens leave nothing to find again in a context of {c.context}",
                "Prompts are kept chunk by chunk: use smaller ones (--chunk) or a longer context (--context).",
            )
        kv, _ = self.cache(chunk)
        exact = compose(kv).exact
        if not exact and c.prefill == "layered":
            return UsageError(
                f"of prompts that are computed layer by layer in a cache of {kv} nothing can be found again",
                "Leave out --prefill layered, or the prompt cache.",
            )
        largest = self._entry_bytes(kv, chunk)
        places = {
            "--prompt-cache": (c.prompt_cache.memory, smallest_memory(largest, whole=not exact)),
            "--prompt-cache-disk": (c.prompt_cache.disk, largest + OVERHEAD),
        }
        for option, (limit, needed) in places.items():
            if limit is not None and limit < needed:
                what = f"{chunk} tokens" if exact else f"a prompt in a cache of {kv}"
                return UsageError(
                    f"a prompt cache of {format_bytes(limit)} does not hold one entry, {what}",
                    f"The smallest that works is {option} {format_bytes(needed, ceil=True).replace(' ', '')}.",
                )
        return None

    def uniform(self, level: str, chunk: int, runtime: int) -> Plan:
        """The plan with every matrix in ``level``, whether it fits or not."""
        return self.plan(level, [level] * len(self.spec.layers), chunk, runtime)

    def _upgrade(self, plan: Plan) -> Plan:
        """Spends what is left on more bits: for the embeddings and the head first, then for layers from both ends (the
        first and last layers lose most when they are rounded)."""
        better = BETTER.get(plan.outer.format)
        if better is None:
            return plan
        if better not in self.levels():  # files of few bits: their own are no more
            better = OWN
        count = len(self.spec.layers)
        order = sorted(range(count), key=lambda index: min(index, count - 1 - index))
        outer, formats = plan.outer.format, [layer.format for layer in plan.layers]
        best = plan
        for index in (None, *order):
            if index is None:
                outer = better
            else:
                formats[index] = better
            bigger = self.plan(outer, formats, plan.chunk, plan.accounts["runtime"])
            if bigger.total > plan.budget:
                break
            best = bigger
        return best

    def plan(
        self,
        outer: str,
        formats: list[str],
        chunk: int,
        runtime: int,
        kept: Kept | None = None,
        buffers: int = 0,
        slots: int = 0,
    ) -> Plan:
        """The plan with embeddings and head in ``outer`` and each layer in its own of ``formats``, whether it fits or
        not. With ``kept`` only so much of them stays in memory, and ``slots`` experts of those that can stay on the
        disk."""
        spec, constraints = self.spec, self.constraints
        cache, kv = self.cache(chunk)
        prompts = 0 if constraints.prompt_cache is None else constraints.prompt_cache.memory or 0
        outer_sizes = [self._size(group, outer) for group in (EMBEDDINGS, HEAD)]
        layer_sizes = [self._size(layer_name(index), fmt) for index, fmt in enumerate(formats)]
        outer_bytes, layer_bytes = sum(size for size, _ in outer_sizes), [size for size, _ in layer_sizes]
        weights = outer_bytes + sum(layer_bytes)
        experts: list[tuple[Place, ...]] = [()] * len(formats)
        outer_plan = OuterPlan(format=outer, nbytes=outer_bytes)
        layers = [LayerPlan(format=fmt, nbytes=nbytes) for fmt, nbytes in zip(formats, layer_bytes, strict=True)]
        accounts: dict[str, int] = {}
        cached: ExpertsPlan | None = None
        if kept is not None:
            groups, experts = self.apart(formats)
            if any(experts):
                cached = ExpertsPlan(policy=constraints.experts or EXPERTS, slots=slots)
                accounts["experts"] = align(caching_nbytes(experts, slots), PAGE)
            around = self.outer(outer)
            weights = streaming_nbytes(around, groups, kept, buffers)
            rows = None if kept.rows == around.rows else kept.rows
            if around.on_disk or rows is not None:
                outer_plan = outer_plan.model_copy(update={"placement": "streamed", "resident": rows})
            layers = [
                layer.model_copy(update={"placement": "streamed", "resident": count})
                for layer, count in zip(layers, kept.layers, strict=True)
            ]
        weights += EXPERT_OBJECTS * sum(
            layer.mlp.experts
            for layer, cut in zip(spec.layers, experts, strict=True)
            # Vectors of experts stay in memory, and are used through objects too.
            if isinstance(layer.mlp, MoeSpec)
            and (not cut or any(param.experts and not param.is_matrix for param in layer.params))
        )
        plan = Plan(
            model=ModelRef(
                name=self.checkpoint.name,
                fingerprint=self.checkpoint.fingerprint,
                family=spec.family,
                parameters=spec.parameter_count,
                converted=converted(self.checkpoint),
            ),
            budget=constraints.budget,
            context=constraints.context,
            sequences=constraints.sequences,
            accounts={
                "runtime": runtime,
                "weights": align(weights, PAGE),
                **accounts,
                "kv": align(kv, PAGE) + align(prompts, PAGE),
                "workspace": 0,
            },
            outer=outer_plan,
            layers=tuple(layers),
            cache=cache,
            prefill=constraints.prefill,
            prompt_cache=constraints.prompt_cache,
            buffers=buffers,
            experts=cached,
            chunk=chunk,
            threads=constraints.threads,
            numerics=constraints.numerics,
        )
        # While loading, cache and scratch are not in use yet: they leave room for what converting takes.
        loading = max(scratch for _, scratch in (*outer_sizes, *layer_sizes))
        shape = outer, tuple(formats), chunk, cache
        if shape not in self._workspaces:
            self._workspaces[shape] = self._workspace(plan)
        workspace = max(self._workspaces[shape], loading - plan.accounts["kv"])
        return plan.model_copy(update={"accounts": plan.accounts | {"workspace": workspace}})

    def _size(self, group: str, stored_as: str) -> tuple[int, int]:
        """Bytes of a group of parameters, and of scratch while it is loaded."""
        key = (group, stored_as)
        if key not in self._sizes:
            found = self._group(group, stored_as)
            self._sizes[key] = found.nbytes, scratch_bytes(self.checkpoint, found, self.constraints.threads)
        return self._sizes[key]

    def cache(self, chunk: int) -> tuple[str, int]:
        """The methods of the cache, and the bytes that it takes. Raises BudgetError if none keeps it as small as it
        should be."""
        constraints = self.constraints
        if constraints.kv is not None:
            return constraints.kv, self._cache_bytes(constraints.kv, chunk)
        assert constraints.kv_bytes is not None
        for kv in CACHES:
            if self._cache_bytes(kv, chunk) <= constraints.kv_bytes:
                return kv, self._cache_bytes(kv, chunk)
        keep, smallest = LEAST_KEPT, self._cache_bytes(SMALL_CACHE.format(LEAST_KEPT), chunk)
        if smallest > constraints.kv_bytes:
            raise BudgetError(
                f"no cache of {self.checkpoint.name} is as small as {format_bytes(constraints.kv_bytes)}",
                f"The smallest that is chosen takes {format_bytes(smallest, ceil=True)}: "
                f"{SMALL_CACHE.format(LEAST_KEPT)}. Name one yourself with --kv, or run fewer sequences.",
            )
        step = 1 << max(constraints.context.bit_length() - 1, 0)
        while step >= LEAST_KEPT:  # the most tokens that fit
            if self._cache_bytes(SMALL_CACHE.format(keep + step), chunk) <= constraints.kv_bytes:
                keep += step
            step //= 2
        kv = SMALL_CACHE.format(keep)
        return kv, self._cache_bytes(kv, chunk)

    def _cache_bytes(self, kv: str, chunk: int) -> int:
        if (kv, chunk) not in self._caches:
            c = self.constraints
            layouts = cache_layouts(self.spec, c.context, chunk)
            self._caches[kv, chunk] = kv_nbytes(kv, layouts, c.context, c.sequences, c.numerics.kv, self._owners(kv))
        return self._caches[kv, chunk]

    def _owners(self, kv: str) -> list[int] | None:
        """Of each layer the one whose keys and values it reads; None where each has its own."""
        return owners_for(kv, self.checkpoint.name, self.checkpoint.fingerprint, len(self.spec.layers))

    def _entry_bytes(self, kv: str, chunk: int) -> int:
        """The most bytes of an entry of the prompt cache."""
        if (kv, chunk) not in self._entries:
            c = self.constraints
            layouts = cache_layouts(self.spec, c.context, chunk)
            self._entries[kv, chunk] = entry_nbytes(kv, layouts, c.context, c.numerics.kv, chunk, self._owners(kv))
        return self._entries[kv, chunk]

    def outer(self, level: str) -> Outer:
        """The parameters outside of the layers, stored as ``level`` says."""
        embeddings, head = (self._group(name, level) for name in (EMBEDDINGS, HEAD))
        return Outer.of(self.checkpoint, self.spec, embeddings, head)

    def apart(self, formats: Sequence[str]) -> tuple[list[Group], list[tuple[Place, ...]]]:
        """Of each layer the parameters without those of experts that can stay on the disk, and those."""
        both = [on_disk(self.checkpoint, self._group(layer_name(index), fmt)) for index, fmt in enumerate(formats)]
        return [group for group, _ in both], [experts for _, experts in both]

    def _group(self, name: str, stored_as: str) -> Group:
        key = (name, stored_as)
        if key not in self._groups:
            self._groups[key] = group_of(self.checkpoint, self.spec, name, stored_as)
        return self._groups[key]


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
