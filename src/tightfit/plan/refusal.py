"""Why nothing fits, and what would: every number that it names was found by planning."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from tightfit.budget.units import format_bytes
from tightfit.errors import BudgetError, UsageError
from tightfit.kv.compose import EXACT
from tightfit.plan.schema import OWN, Plan
from tightfit.plan.sizes import BUFFERS, Constraints, Layout
from tightfit.weights.placement.fill import FIXED as READING
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, Group, layer_name
from tightfit.weights.placement.streamed import Kept, Outer, streaming_nbytes

if TYPE_CHECKING:
    from tightfit.plan.search import Search

FEWER_BITS = ("int4", "int4(group=128)", "int3(group=128)", "int2(group=128)")
SMALLER_CACHES = ("int8", "int4", "snapkv(keep=512)+int4", "snapkv(keep=128)+int4")
LEAST_CONTEXT = 128
# In which order accounts take what there is: what cannot be chosen first.
ORDER = ("runtime", "workspace", "kv", "weights", "experts")


def refusal(search: Search, runtime: int) -> BudgetError:
    """Which account is short and by how much, the smallest budget that works, and what would fit into this one."""
    constraints, plan = search.constraints, search.smallest(runtime)
    parts = ", ".join(f"{name} {format_bytes(nbytes)}" for name, nbytes in plan.accounts.items())
    smallest = format_bytes(plan.total, ceil=True)
    hint = [
        _short(plan, constraints.budget),
        f"The smallest budget that works is {smallest} ({parts}).",
        f"Type --memory {smallest.replace(' ', '')}" + "".join(f", or {way}" for way in _ways(search, runtime)) + ".",
    ]
    return BudgetError(
        f"{search.checkpoint.name} does not fit into {format_bytes(constraints.budget)}",
        " ".join(hint),
        smallest_bytes=plan.total,
    )


def _short(plan: Plan, budget: int) -> str:
    """The first account that does not get what it needs at least."""
    left = budget
    for name in ORDER:
        needed = plan.accounts.get(name, 0)
        if needed > left:
            rest = f"; {format_bytes(left)} are left for it" if left < budget else ""
            missing = format_bytes(needed - left, ceil=True)
            return f"The {name} account is {missing} short: it takes at least {format_bytes(needed, ceil=True)}{rest}."
        left -= needed
    raise ValueError("the plan fits")


def _ways(search: Search, runtime: int) -> Iterator[str]:
    """What would make it fit, each by itself, with what it needs then."""
    c = search.constraints

    def way(text: str, **changes: object) -> Iterator[str]:
        needed = _needed(search, replace(c, **changes), runtime)  # type: ignore[arg-type]
        if needed is not None and needed <= c.budget:
            yield f"{text} ({format_bytes(needed, ceil=True)})"

    def first(*ways: Iterator[str]) -> Iterator[str]:
        """The first that fits, which changes least."""
        found = (text for each in ways for text in each)
        text = next(found, None)
        if text is not None:
            yield text

    if search.checkpoint.compressed is None:
        if c.weights is not None:
            yield from way("leave out --weights", weights=None)
        yield from first(*(way(f"--weights {_quoted(fmt)}", weights=fmt) for fmt in FEWER_BITS))
        if not search.streams_as_stored or c.weights not in (None, OWN):
            yield from _compressed(search, runtime)
    if c.kv in (None, EXACT) and c.kv_bytes is None:
        yield from first(*(way(f"--kv {_quoted(kv)}", kv=kv) for kv in SMALLER_CACHES))
    if c.kv_bytes is not None:
        yield from way("--kv auto", kv_bytes=None)
    if c.prompt_cache is not None and c.prompt_cache.memory is not None:
        yield from way("leave out --prompt-cache", prompt_cache=None)
    shorter = [c.context >> power for power in range(1, c.context.bit_length())]
    yield from first(*(way(f"--context {context}", context=context) for context in shorter if context >= LEAST_CONTEXT))
    fewer = [c.sequences >> power for power in range(1, c.sequences.bit_length())]
    yield from first(*(way(f"--batch {count}", sequences=count) for count in fewer))
    if c.chunk is not None:
        yield from way("leave out --chunk", chunk=None)


def _quoted(spec: str) -> str:
    """As a shell takes it."""
    return f"'{spec}'" if "(" in spec else spec


def _needed(search: Search, constraints: Constraints, runtime: int) -> int | None:
    """What other constraints need; None where they cannot be met."""
    try:
        return search.within(constraints).least(runtime).total
    except (UsageError, BudgetError):
        return None


def _compressed(search: Search, runtime: int) -> Iterator[str]:
    """Whether what `tightfit compress` would write fits: all of that can be read as it is used."""
    level = OWN if search.checkpoint.holds_blocks else search.constraints.weights or "int4"
    chunk = search.chunks()[-1]
    layout = Layout(level, (level,) * len(search.spec.layers), search.caches(chunk)[-1], chunk)
    plan = search.plan(layout, runtime)
    groups = [search.group(layer_name(index), level) for index in range(len(search.spec.layers))]
    least = Kept(tuple(_unread(group) for group in groups), 0)
    embeddings, head = (search.group(name, level) for name in (EMBEDDINGS, HEAD))
    tied = search.spec.tied
    rows = (embeddings if tied else head).places[-1].param.shape[0]
    outer = Outer(embeddings, head, tied, on_disk=not tied, rows=rows, least=0)
    accounts = plan.accounts | {
        "weights": streaming_nbytes(outer, groups, least, min(BUFFERS)),
        "workspace": max(search.scratch[layout], READING - plan.accounts["kv"]),
    }
    needed = sum(accounts.values())
    if needed <= search.constraints.budget:
        weights = "" if search.checkpoint.holds_blocks else f" --weights {level}"
        yield (
            f"run what `tightfit compress MODEL{weights} --out FOLDER` writes, which is read as it is used "
            f"({format_bytes(needed, ceil=True)})"
        )


def _unread(group: Group) -> int:
    """How many of the first parameters of a compressed layer stay in memory: those that are no matrices."""
    return sum(place.format is None or place.param.exact for place in group.places)
