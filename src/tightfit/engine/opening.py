"""From a user's wish to a plan: opens the checkpoint, reads the architecture, and settles what fits."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast, get_args

from tightfit import child, zoo
from tightfit.budget import malloc
from tightfit.budget.machine import MachineRecord, usable_cores
from tightfit.budget.meter import machine_memory, resident_set
from tightfit.budget.units import format_bytes, parse_budget, parse_bytes
from tightfit.catalog import parse_one, spec_string
from tightfit.checkpoints.checkpoint import HUB_NAME, Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine.request import Requests
from tightfit.errors import CheckpointError, UsageError
from tightfit.experts.census import read_census
from tightfit.experts.policy import Scheme, scheme
from tightfit.kv.compose import EXACT, compose, known_of
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec, MoeSpec
from tightfit.plan.schema import OWN, ActivationType, Plan, Preference, PromptCachePlan, Schedule

if TYPE_CHECKING:
    from tightfit.engine.start import Settled
    from tightfit.plan.cost import Cost
    from tightfit.plan.search import Search
    from tightfit.plan.sizes import Constraints

DEFAULT_CONTEXT = 4096
# Planning needs torch, and importing torch alone takes more than this. Below it a child process finds the smallest
# budget that would work, so that a refusal does not itself go over the budget.
CHILD_BELOW = 220 << 20
CHILD_IMPORTS = ("tightfit", "jinja2", "pydantic", "rich", "tokenizers", "typer")
FOLLOWING = 6 << 20  # bytes by which a process that follows a plan may be larger than the one that made it
MOST_SEQUENCES = 1024  # at once: beyond what one machine has any use for


@dataclass(frozen=True)
class Wish:
    """What was asked for, as it was written."""

    model: str
    memory: str | int | None = None
    context: int | None = None
    batch: int | None = None
    weights: str | None = None
    chunk: int | None = None
    threads: int | None = None
    activations: str | None = None
    experts: str | None = None
    kv: str | None = None
    prefill: str | None = None
    prompt_cache: str | int | None = None
    prompt_cache_disk: str | int | None = None
    prompt_cache_dir: str | None = None
    prefer: str | None = None

    @property
    def sequences(self) -> int:
        """How many run at once."""
        return 1 if self.batch is None else self.batch


@dataclass(frozen=True)
class Opened:
    """A checkpoint and its architecture; ``budget`` in bytes."""

    checkpoint: Checkpoint
    spec: ModelSpec
    budget: int
    context: int

    def requests(self, context: int | None = None) -> Requests:
        """Makes and checks requests, before or after the model is loaded."""
        return Requests(self.checkpoint, self.spec, context or self.context)

    def load_what_runs_need(self) -> None:
        """Loads what a conversation or a run needs beside the engine, so that it is measured."""
        self.checkpoint.tokenizer()
        importlib.import_module("tightfit.engine.receipt")

    def check_experts(self, how: Scheme | None = None) -> None:
        """Raises UsageError for a model without experts, CheckpointError if ``how`` asks for a census that there is
        not."""
        mixtures = [layer.mlp for layer in self.spec.layers if isinstance(layer.mlp, MoeSpec)]
        name, fingerprint = self.checkpoint.name, self.checkpoint.fingerprint
        if not mixtures:
            raise UsageError(f"{name} has no experts", "Only mixtures of experts have any: leave that out.")
        if how is not None and how.policy.needs_census:
            read_census(name, fingerprint, len(mixtures), max(moe.experts for moe in mixtures))

    def check_chat(self, system: str | None = None) -> None:
        """Raises UsageError if the model has no chat template or that refuses a ``system`` message, CheckpointError if
        it cannot be used."""
        first = [{"role": "system", "content": system}] if system else []
        self.checkpoint.tokenizer().render_chat([*first, {"role": "user", "content": "Hello"}])


def open_model(wish: Wish, headers_only: bool = False) -> Opened:
    """Opens the checkpoint, without torch. Raises UsageError for a wish that cannot be read."""
    malloc.tune_malloc()
    memory = machine_memory()
    budget = parse_budget(wish.memory, memory)
    if budget > memory.total and not headers_only:  # a plan may be for another machine
        raise UsageError(
            f"a budget of {format_bytes(budget)} is more than the {format_bytes(memory.total)} there are "
            f"({memory.limited_by})",
            "Leave --memory out to use what is available, or name less.",
        )
    if not 1 <= wish.sequences <= MOST_SEQUENCES:
        raise UsageError(f"{wish.sequences} sequences at once make no sense", f"Use --batch 1 to {MOST_SEQUENCES}.")
    if wish.chunk is not None and wish.chunk < 1:
        raise UsageError(f"a chunk of {wish.chunk} tokens makes no sense", "Use --chunk 16 or more.")
    if wish.threads is not None and not 1 <= wish.threads <= usable_cores():
        raise UsageError(
            f"{wish.threads} threads make no sense: this process may use {usable_cores()} cores",
            f"Use --threads 1 to {usable_cores()}, or leave it out.",
        )
    if wish.weights not in (None, OWN):
        parse_one("weights", wish.weights)
    if wish.prefer is not None and wish.prefer not in get_args(Preference):
        known = ", ".join(get_args(Preference))
        raise UsageError(f"there is no preference {wish.prefer!r}", f"Use --prefer {known}.")
    if wish.context is not None and wish.context < 2:
        raise UsageError(f"a context of {wish.context} tokens holds no prompt and answer", "Use --context 2 or more.")
    if wish.activations is not None and wish.activations not in get_args(ActivationType):
        known = " or ".join(get_args(ActivationType))
        raise UsageError(f"there are no activations {wish.activations!r}", f"Use --activations {known}.")
    if wish.prefill is not None and wish.prefill not in get_args(Schedule):
        known = " or ".join(get_args(Schedule))
        raise UsageError(f"there is no schedule {wish.prefill!r}", f"Use --prefill {known}.")
    kv, _ = wanted_cache(wish.kv)
    wanted_prompt_cache(wish)
    how = None if wish.experts is None else scheme(wish.experts)
    checkpoint = _open(wish.model, headers_only)
    try:
        spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
        if wish.weights not in (None, OWN):
            _check_weights(wish.weights, checkpoint)
        context = wish.context if wish.context is not None else min(spec.context, DEFAULT_CONTEXT)
        if context > spec.context:
            raise UsageError(
                f"{checkpoint.name} was trained for {spec.context} tokens of context, {context} were asked for",
                f"Use --context {spec.context} or less.",
            )
        if kv is not None:
            known_of(kv, checkpoint.name, checkpoint.fingerprint, spec.owners)
        opened = Opened(checkpoint, spec, budget, context)
        if how is not None:
            opened.check_experts(how)
        return opened
    except BaseException:
        checkpoint.close()
        raise


def _check_weights(weights: str, checkpoint: Checkpoint) -> None:
    """Raises UsageError if a compressed folder keeps other weights."""
    compressed = checkpoint.compressed
    if compressed is not None and spec_string(parse_one("weights", weights)) != compressed.weights:
        raise UsageError(
            f"{checkpoint.name} is compressed with {compressed.weights}, and {weights} was asked for",
            f"Leave --weights out, or take the model that it was made from: {compressed.source}.",
        )


def _open(model: str, headers_only: bool) -> Checkpoint:
    if model in zoo.EMBEDDED:
        return open_checkpoint(str(zoo.path(model)), headers_only=headers_only)
    if not os.path.exists(os.path.expanduser(model)) and not HUB_NAME.fullmatch(model):
        shown = model if len(model) <= 80 else model[:77] + "..."
        raise CheckpointError(
            f"there is no model '{shown}'",
            f"Give a model's folder, a GGUF file, a name of the hub such as org/model, or an embedded model: "
            f"{', '.join(zoo.EMBEDDED)}. A prompt is given with -p.",
        )
    return open_checkpoint(model, headers_only=headers_only)


def plan_for(wish: Wish, opened: Opened) -> Plan:
    """The plan for a wish. Raises BudgetError with the smallest budget that works if nothing fits."""
    if opened.budget < CHILD_BELOW and "torch" not in sys.modules:
        return _plan_in_child(wish)
    return plan_here(wish, opened)


def plan_here(wish: Wish, opened: Opened, elsewhere: int = 0) -> Plan:
    """As :func:`plan_for`, in this process whatever the budget. ``elsewhere``: how many bytes larger than this one the
    process is that would run the plan."""
    settled = _settle(wish, opened, elsewhere)
    if settled.plan is None:
        assert settled.refusal is not None
        raise settled.refusal
    return settled.plan


def _settle(wish: Wish, opened: Opened, elsewhere: int = 0) -> Settled:
    from tightfit.engine.start import settle

    _know_speeds(wish, opened)
    opened.load_what_runs_need()
    return settle(opened.checkpoint, opened.spec, _constraints(wish, opened), elsewhere)


def survey(wish: Wish, opened: Opened, followed: bool = False) -> dict[str, Any]:
    """What ``tightfit plan`` answers, JSON-ready: ``model``, ``budget_bytes``, ``plan`` (None if nothing fits, then
    with ``hint`` and ``smallest_bytes``), and ``precisions``: what each format of the weights needs at least. A plan
    that is to be ``followed`` by another process leaves a little room, if it can: that one will be a bit larger."""
    from tightfit.engine.start import NOISE, search_for, settle, smallest_runtime
    from tightfit.plan.neighbours import described
    from tightfit.plan.search import precisions

    _know_speeds(wish, opened)
    opened.load_what_runs_need()
    constraints = _constraints(wish, opened)
    # The smallest comes first: what is rehearsed after it leaves its peak behind.
    search = search_for(opened.checkpoint, opened.spec, constraints)
    runtime = smallest_runtime(search) + NOISE
    spare = FOLLOWING if followed else 0
    settled = settle(opened.checkpoint, opened.spec, replace(constraints, budget=max(constraints.budget - spare, 0)))
    if settled.plan is None and spare:
        settled = settle(opened.checkpoint, opened.spec, constraints)
    if settled.refusal is not None and settled.refusal.smallest_bytes is not None:
        runtime = settled.refusal.smallest_bytes - search.smallest(0).total
    answer: dict[str, Any] = {
        "model": {
            "name": opened.checkpoint.name,
            "family": opened.spec.family,
            "parameters": opened.spec.parameter_count,
            "context": opened.spec.context,
        },
        "budget_bytes": opened.budget,
        "plan": None if settled.plan is None else settled.plan.model_dump() | {"budget": constraints.budget},
        "predicted": None if settled.plan is None else _predicted(opened, settled.plan),
        "divergence": None if settled.plan is None else _divergence(settled.search, settled.plan),
        "neighbours": [] if settled.plan is None else described(settled.search, settled.plan),
        "precisions": precisions(search, runtime),
    }
    if settled.refusal is not None:
        answer |= {"hint": settled.refusal.hint, "smallest_bytes": settled.refusal.smallest_bytes}
    return answer


def _predicted(opened: Opened, plan: Plan) -> dict[str, Any] | None:
    """What a prompt of half the context and as much text after it will take, where this machine was measured."""
    cost = cost_of(opened.checkpoint, opened.spec, plan)
    if cost is None:
        return None
    prompt = plan.context // 2
    return {"prompt_tokens": prompt} | asdict(cost.predict(plan, prompt, plan.context - prompt))


def _divergence(search: Search, plan: Plan) -> dict[str, Any]:
    """In nats per token, None where a format is not known, and whether that was measured on this model."""
    return {"nats": search.sensitivity.of_plan(plan), "measured": search.sensitivity.measured}


def cost_of(checkpoint: Checkpoint, spec: ModelSpec, plan: Plan) -> Cost | None:
    """What predicts how fast a plan runs, or None where this machine was not measured."""
    from tightfit.plan.cost import Cost
    from tightfit.plan.speeds import known_speeds

    speeds = known_speeds(MachineRecord.open(), plan.threads, plan.numerics, checkpoint.largest_file)
    if speeds is None or (speeds.disk is None and (plan.streamed or plan.experts is not None)):
        return None
    return Cost(checkpoint, spec, speeds, plan.threads, plan.numerics)


def measure_machine(
    wish: Wish, opened: Opened, progress: Callable[[int, int], None] = lambda done, total: None
) -> None:
    """Measures what plans for this wish are predicted with, unless it is known: in a process of its own, whose peak is
    larger than that of a small run."""
    constraints, file = _constraints(wish, opened), opened.checkpoint.largest_file
    asked = {"threads": constraints.threads, "numerics": constraints.numerics.model_dump()}
    asked["file"] = None if file is None else str(file)
    child.ask("tightfit.plan.profile:measure_for_parent", asked, progress)


def is_measured(wish: Wish, opened: Opened) -> bool:
    """Whether :func:`measure_machine` has nothing to do."""
    from tightfit.plan import profile

    constraints, file = _constraints(wish, opened), opened.checkpoint.largest_file
    return profile.is_measured(MachineRecord.open(), constraints.threads, constraints.numerics, file)


def _know_speeds(wish: Wish, opened: Opened) -> None:
    """Measures the machine if that decides the plan."""
    if wish.prefer not in (None, "quality") and not is_measured(wish, opened):
        measure_machine(wish, opened)


def _constraints(wish: Wish, opened: Opened) -> Constraints:
    from tightfit.engine.numerics import numerics
    from tightfit.plan.sizes import Constraints

    compressed = opened.checkpoint.compressed
    kv, kv_bytes = wanted_cache(wish.kv)
    types = set(compressed.types if compressed else (info.dtype for info in opened.checkpoint.tensors.values()))
    return Constraints(
        budget=opened.budget,
        context=opened.context,
        sequences=wish.sequences,
        threads=wish.threads or usable_cores(),
        numerics=numerics(types, cast(ActivationType, wish.activations or "int8")),
        weights=compressed.weights if compressed else wish.weights,
        chunk=wish.chunk,
        experts=wish.experts,
        kv=kv,
        kv_bytes=kv_bytes,
        prefill=cast(Schedule, wish.prefill or "chunked"),
        prompt_cache=wanted_prompt_cache(wish),
        prefer=cast(Preference, wish.prefer or "quality"),
    )


def wanted_cache(wish: str | None) -> tuple[str | None, int | None]:
    """What ``--kv`` asks for: methods as a spec string, or how many bytes the cache may take; neither where it is to be
    chosen. Raises UsageError."""
    if wish is None:
        return EXACT, None
    if wish.strip() == "auto":
        return None, None
    if wish.strip()[:1].isdigit():
        return None, parse_bytes(wish)
    return str(compose(wish)), None


def wanted_prompt_cache(wish: Wish) -> PromptCachePlan | None:
    """Where beginnings of prompts are to be kept. Raises UsageError."""
    if wish.prompt_cache_dir is not None and wish.prompt_cache_disk is None:
        raise UsageError("how much may be kept in that folder is not said", "Add --prompt-cache-disk SIZE.")
    memory, disk = (
        parse_bytes(limit) if isinstance(limit, str) else limit for limit in (wish.prompt_cache, wish.prompt_cache_disk)
    )
    if memory is None and disk is None:
        return None
    if min(memory or 0, disk or 0) < 0:
        raise UsageError("a prompt cache of less than nothing makes no sense", "Give a size such as 64MiB.")
    return PromptCachePlan(memory=memory, disk=disk, folder=wish.prompt_cache_dir or "")


def _plan_in_child(wish: Wish) -> Plan:
    # The child becomes as large as this process is, and then plans in its place.
    modules = [name for name in sys.modules if name.partition(".")[0] in CHILD_IMPORTS]
    asked = {"wish": asdict(wish), "modules": modules, "resident_bytes": resident_set().current}
    return Plan.model_validate(child.ask("tightfit.engine.opening:plan_for_parent", asked)["plan"])


def plan_for_parent(asked: dict[str, Any]) -> dict[str, Any]:
    """Plans in a process of its own for one that holds ``resident_bytes`` and has imported ``modules``."""
    wish = Wish(**asked["wish"])
    opened = open_model(wish)
    for name in asked["modules"]:
        importlib.import_module(name)
    if "tokenizers" in asked["modules"]:
        opened.checkpoint.tokenizer()
    elsewhere = asked["resident_bytes"] - resident_set().current
    return {"plan": plan_here(wish, opened, elsewhere).model_dump()}
