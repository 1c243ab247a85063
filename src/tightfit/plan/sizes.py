"""The bytes of a plan, account by account, exactly: from headers, layouts and dry runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tightfit.budget.ledger import PAGE, align
from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.errors import UsageError
from tightfit.experts.store import LEAST_SLOTS, caching_nbytes, expert_count, on_disk
from tightfit.kv.compose import compose, known_of
from tightfit.kv.fitted import Known
from tightfit.kv.make import entry_nbytes, kv_nbytes
from tightfit.kv.reuse.disk import OVERHEAD
from tightfit.kv.reuse.memory import smallest_memory
from tightfit.model.decoder import cache_layouts
from tightfit.model.spec import ModelSpec, MoeSpec
from tightfit.plan.schema import (
    ExpertsPlan,
    LayerPlan,
    ModelRef,
    Numerics,
    OuterPlan,
    Plan,
    Preference,
    PromptCachePlan,
    Schedule,
)
from tightfit.weights.placement.base import EXPERT_OBJECTS
from tightfit.weights.placement.fill import scratch_bytes
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, Group, Place, group_of, layer_name
from tightfit.weights.placement.read import converted
from tightfit.weights.placement.streamed import Kept, Outer, least_resident, spread, streaming_nbytes

EXPERTS = "score+gate"  # how experts on the disk are cached, unless it is said
BUFFERS = (3, 2)  # of streamed layers: one in use, others that are read ahead
ROUTER = "router"


@dataclass(frozen=True)
class Constraints:
    """What the user asked for. ``weights``, ``chunk``, ``experts`` and ``kv`` are chosen if they are None, by what is
    preferred; ``kv`` so that the cache takes at most ``kv_bytes``, if that is said. ``budget`` is bytes."""

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
    prefer: Preference = "quality"


@dataclass(frozen=True)
class Layout:
    """What of a plan can be chosen: formats of the outer matrices and of each layer, the methods of the cache, and the
    prompt tokens that are computed at once."""

    outer: str
    formats: tuple[str, ...]
    kv: str
    chunk: int


WorkspaceBytes = Callable[[Plan], int]


class Sizes:
    """Plans for one checkpoint with all that they take, whether that fits or not.

    ``workspace`` gives the scratch of a plan's largest step in bytes (the engine's dry run), kept in
    ``scratch``.
    """

    def __init__(
        self, checkpoint: Checkpoint, spec: ModelSpec, constraints: Constraints, workspace: WorkspaceBytes
    ) -> None:
        self.checkpoint = checkpoint
        self.spec = spec
        self.constraints = constraints
        self.workspace = workspace
        self._sizes: dict[tuple[str, str], tuple[int, int]] = {}
        self._groups: dict[tuple[str, str], Group] = {}
        self._caches: dict[tuple[str, int], int] = {}
        self._entries: dict[tuple[str, int], int] = {}
        self.scratch: dict[Layout, int] = {}  # what is resident does not change them

    def plan(self, layout: Layout, runtime: int, kept: Kept | None = None, buffers: int = 0, slots: int = 0) -> Plan:
        """The plan with this layout. With ``kept`` only so much of the weights stays in memory, and ``slots`` experts
        of those that can stay on the disk."""
        spec, constraints = self.spec, self.constraints
        outer, formats, chunk = layout.outer, layout.formats, layout.chunk
        kv = self.cache_bytes(layout.kv, chunk)
        prompts = 0 if constraints.prompt_cache is None else constraints.prompt_cache.memory or 0
        outer_sizes = [self.size(group, outer) for group in (EMBEDDINGS, HEAD)]
        layer_sizes = [self.size(layer_name(index), fmt) for index, fmt in enumerate(formats)]
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
                "weights": align(weights + self.of_objects(experts), PAGE),
                **accounts,
                "kv": align(kv, PAGE) + align(prompts, PAGE),
                "workspace": 0,
            },
            outer=outer_plan,
            layers=tuple(layers),
            cache=layout.kv,
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
        if layout not in self.scratch:
            self.scratch[layout] = self.workspace(plan)
        workspace = max(self.scratch[layout], loading - plan.accounts["kv"])
        return plan.model_copy(update={"accounts": plan.accounts | {"workspace": workspace}})

    def streaming(self, layout: Layout, runtime: int) -> Plan:
        """The plan with as much in memory as the budget allows, or if that is too little, with the least that must be
        there."""
        smallest = self.least_streaming(layout, runtime)
        groups, experts = self.apart(layout.formats)
        least = [layer.resident or 0 for layer in smallest.layers]
        room = (smallest.budget - smallest.total + smallest.accounts["weights"]) // PAGE * PAGE
        outer = self.outer(layout.outer)
        for buffers in BUFFERS:
            kept = spread(outer, groups, least, buffers, room)
            if kept is not None:
                whole = [len(group.places) for group in groups] == [*kept.layers] and kept.rows == outer.rows
                buffers = 0 if whole else buffers
                found = self.plan(layout, runtime, kept, buffers, LEAST_SLOTS)
                if found.experts is None:
                    return found
                each = caching_nbytes(experts, 1) - caching_nbytes(experts, 0)
                slots = LEAST_SLOTS + (found.budget - found.total) // each
                slots = min(slots, expert_count(experts))
                return self.plan(layout, runtime, kept, buffers, slots)
        return smallest

    def least_streaming(self, layout: Layout, runtime: int) -> Plan:
        groups, _ = self.apart(layout.formats)
        least = Kept(tuple(self.least_resident(group) for group in groups), self.outer(layout.outer).least)
        return self.plan(layout, runtime, least, min(BUFFERS), LEAST_SLOTS)

    def least_resident(self, group: Group) -> int:
        """How many of the first parameters of a layer, ``group`` without its experts, must stay in memory: routers
        too, which are asked before their turn."""
        routers = [index for index, place in enumerate(group.places) if place.param.name == ROUTER]
        return max([least_resident(self.checkpoint, group), *(index + 1 for index in routers)])

    def of_objects(self, cut: Sequence[tuple[Place, ...]]) -> int:
        """Bytes of the objects through which experts in memory are used, where ``cut`` of each layer are not."""
        return EXPERT_OBJECTS * sum(
            layer.mlp.experts
            for layer, places in zip(self.spec.layers, cut, strict=True)
            # Vectors of experts stay in memory, and are used through objects too.
            if isinstance(layer.mlp, MoeSpec)
            and (not places or any(param.experts and not param.is_matrix for param in layer.params))
        )

    def size(self, group: str, stored_as: str) -> tuple[int, int]:
        """Bytes of a group of parameters, and of scratch while it is loaded."""
        key = (group, stored_as)
        if key not in self._sizes:
            found = self.group(group, stored_as)
            self._sizes[key] = found.nbytes, scratch_bytes(self.checkpoint, found, self.constraints.threads)
        return self._sizes[key]

    def cache_bytes(self, kv: str, chunk: int) -> int:
        """Bytes of keys and values. Raises UsageError for methods that the model cannot use."""
        if (kv, chunk) not in self._caches:
            c = self.constraints
            layouts = cache_layouts(self.spec, c.context, chunk)
            self._caches[kv, chunk] = kv_nbytes(kv, layouts, c.context, c.sequences, c.numerics.kv, self._known(kv))
        return self._caches[kv, chunk]

    def no_prompts(self, kv: str, chunk: int) -> UsageError | None:
        """Why there can be no prompt cache with such a cache and such chunks, if one is asked for."""
        c = self.constraints
        if c.prompt_cache is None:
            return None
        if chunk + 2 > c.context:  # a whole chunk, a token that is computed, and its answer
            return UsageError(
                f"chunks of {chunk} tokens leave nothing to find again in a context of {c.context}",
                "Prompts are kept chunk by chunk: use smaller ones (--chunk) or a longer context (--context).",
            )
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

    def outer(self, level: str) -> Outer:
        """The parameters outside of the layers, stored as ``level`` says."""
        embeddings, head = (self.group(name, level) for name in (EMBEDDINGS, HEAD))
        return Outer.of(self.checkpoint, self.spec, embeddings, head)

    def apart(self, formats: Sequence[str]) -> tuple[list[Group], list[tuple[Place, ...]]]:
        """Of each layer the parameters without those of experts that can stay on the disk, and those."""
        both = [on_disk(self.checkpoint, self.group(layer_name(index), fmt)) for index, fmt in enumerate(formats)]
        return [group for group, _ in both], [experts for _, experts in both]

    def group(self, name: str, stored_as: str) -> Group:
        key = (name, stored_as)
        if key not in self._groups:
            self._groups[key] = group_of(self.checkpoint, self.spec, name, stored_as)
        return self._groups[key]

    def _known(self, kv: str) -> Known:
        """What the methods of a cache know of the model."""
        return known_of(kv, self.checkpoint.name, self.checkpoint.fingerprint, self.spec.owners)

    def _entry_bytes(self, kv: str, chunk: int) -> int:
        """The most bytes of an entry of the prompt cache."""
        if (kv, chunk) not in self._entries:
            c = self.constraints
            layouts = cache_layouts(self.spec, c.context, chunk)
            self._entries[kv, chunk] = entry_nbytes(kv, layouts, c.context, c.numerics.kv, chunk, self._known(kv))
        return self._entries[kv, chunk]
