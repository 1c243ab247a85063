"""Chooses a plan: the most precise weights that fit, then the largest chunk.

Weights stay in their own precision if they fit, or are rounded to 8, 6, 5 or 4 bits, with as many layers in the next
more precise format as there is room for. Of two plans with equal weights the one with larger chunks is faster. Where
nothing fits, layers are read from the disk in each step, as the files have them, but for as much as there is room for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tightfit.budget.ledger import PAGE, align
from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.errors import BudgetError
from tightfit.kv.cache import Cache
from tightfit.model.decoder import cache_layouts
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import OWN, LayerPlan, ModelRef, Numerics, OuterPlan, Plan
from tightfit.weights.placement.fill import scratch_bytes
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, Group, group_of, layer_name, params_of
from tightfit.weights.placement.read import converted
from tightfit.weights.placement.streamed import embeddings_on_disk, least_resident, spread, streaming_nbytes

# From the most precise to the smallest. Fewer than 4 bits lose so much that they must be asked for.
LEVELS = (OWN, "int8", "int6", "int5", "int4", "int4(group=64)", "int4(group=128)")
# What is left of a budget is spent on the next more precise level for some of the layers.
BETTER = {"int6": "int8", "int5": "int6", "int4": "int5"}
CHUNKS = (512, 256, 128, 64, 32, 16)
SMALL_CHUNK = 128
BUFFERS = (3, 2)  # of streamed layers: one in use, others that are read ahead
SHARE_OF_WORKSPACE = 4  # the scratch of a chunk is at most so many times smaller than streamed weights
ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Constraints:
    """What the user asked for. ``weights`` and ``chunk`` are chosen if they are None; ``budget`` is bytes."""

    budget: int
    context: int
    sequences: int
    threads: int
    numerics: Numerics
    weights: str | None = None
    chunk: int | None = None


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
        self._workspaces: dict[tuple[str, tuple[str, ...], int], int] = {}  # what is resident does not change them

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
                if SHARE_OF_WORKSPACE * plan.accounts["workspace"] <= plan.accounts["weights"]:
                    return plan
                fitting.append(plan)
        return fitting[0] if fitting else None

    def streamable(self) -> str | None:
        """The format in which layers can be read from the disk as they are used: that of the files."""
        level = self.constraints.weights or OWN
        groups = [self._group(layer_name(index), level) for index in range(len(self.spec.layers))]
        some = any(least_resident(self.checkpoint, group) < len(group.places) for group in groups)
        return level if some else None

    def streaming(self, chunk: int, runtime: int) -> Plan:
        """The plan with as much in memory as the budget allows, or if that is too little, with the least that must
        be there."""
        smallest = self._least_streaming(chunk, runtime)
        formats = [layer.format for layer in smallest.layers]
        groups = [self._group(layer_name(index), level) for index, level in enumerate(formats)]
        least = [layer.resident or 0 for layer in smallest.layers]
        room = (smallest.budget - smallest.total + smallest.accounts["weights"]) // PAGE * PAGE
        for buffers in BUFFERS:
            resident = spread(self._outer_kept(formats[0]), groups, least, buffers, room)
            if resident is not None:
                return self.plan(formats[0], formats, chunk, runtime, resident, buffers)
        return smallest

    def _least_streaming(self, chunk: int, runtime: int) -> Plan:
        level = self.streamable()
        assert level is not None
        groups = [self._group(layer_name(index), level) for index in range(len(self.spec.layers))]
        least = [least_resident(self.checkpoint, group) for group in groups]
        return self.plan(level, [level] * len(groups), chunk, runtime, least, min(BUFFERS))

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
        elif constraints.weights is None and self.streamable() is None:
            advice.append(
                "or write it to a folder with `tightfit compress MODEL --out FOLDER`: that is read as it is used"
            )
        elif constraints.weights is not None:
            advice.append("or leave out --weights, so that fewer bits can be chosen")
        if constraints.sequences > 1:
            advice.append("or run fewer sequences at once (--batch)")
        if plan.accounts["kv"] > plan.total // 5:
            advice.append(f"or a shorter context (--context): {constraints.context} tokens take a large part")
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
        """Chunk sizes from large to small; one that holds the whole context is enough."""
        if self.constraints.chunk is not None:
            return [self.constraints.chunk]
        useful = [chunk for chunk in CHUNKS if chunk < 2 * self.constraints.context]
        return useful or [CHUNKS[-1]]

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
        resident: Sequence[int] | None = None,
        buffers: int = 0,
    ) -> Plan:
        """The plan with embeddings and head in ``outer`` and each layer in its own of ``formats``, whether it fits or
        not. With ``resident`` only so many of each layer's first parameters stay in memory."""
        spec, constraints = self.spec, self.constraints
        layouts = cache_layouts(spec, constraints.context, chunk)
        kv = Cache.nbytes(layouts, constraints.sequences, ITEMSIZE[constraints.numerics.kv])
        outer_sizes = [self._size(group, outer) for group in (EMBEDDINGS, HEAD)]
        layer_sizes = [self._size(layer_name(index), fmt) for index, fmt in enumerate(formats)]
        outer_bytes, layer_bytes = sum(size for size, _ in outer_sizes), [size for size, _ in layer_sizes]
        weights = outer_bytes + sum(layer_bytes)
        outer_placement: Literal["resident", "streamed"] = "resident"
        layers = [LayerPlan(format=fmt, nbytes=nbytes) for fmt, nbytes in zip(formats, layer_bytes, strict=True)]
        if resident is not None:
            groups = [self._group(layer_name(index), fmt) for index, fmt in enumerate(formats)]
            weights = streaming_nbytes(self._outer_kept(outer), groups, resident, buffers)
            if embeddings_on_disk(self.checkpoint, spec, self._group(EMBEDDINGS, outer)):
                outer_placement = "streamed"
            layers = [
                layer.model_copy(update={"placement": "streamed", "resident": count})
                for layer, count in zip(layers, resident, strict=True)
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
                "weights": align(weights, PAGE),
                "kv": align(kv, PAGE),
                "workspace": 0,
            },
            outer=OuterPlan(format=outer, nbytes=outer_bytes, placement=outer_placement),
            layers=tuple(layers),
            buffers=buffers,
            chunk=chunk,
            threads=constraints.threads,
            numerics=constraints.numerics,
        )
        # While loading, cache and scratch are not in use yet: they leave room for what converting takes.
        loading = max(scratch for _, scratch in (*outer_sizes, *layer_sizes))
        shape = outer, tuple(formats), chunk
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

    def _outer_kept(self, level: str) -> int:
        """Bytes of the matrices outside of the layers that are in memory where layers are streamed."""
        head, embeddings = self._group(HEAD, level), self._group(EMBEDDINGS, level)
        on_disk = embeddings_on_disk(self.checkpoint, self.spec, embeddings)
        return head.nbytes + (0 if on_disk else embeddings.nbytes)

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
