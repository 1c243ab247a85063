"""Plans beside the chosen one on the Pareto front of bytes, seconds and divergence, and why they were not chosen."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tightfit.budget.units import format_bytes
from tightfit.plan.program import Aim
from tightfit.plan.schema import Plan
from tightfit.plan.search import TIE, Search

SMALLER = 0.25  # of the bytes that could be saved
FASTER = 0.1  # of the seconds
MORE_PRECISE = 0.5  # of the divergence
LEAST_NATS, LEAST_RATIO = 5e-5, 1.02  # differences that are worth a word


@dataclass(frozen=True)
class Neighbour:
    """``better`` says in what it is, ``why`` what that costs."""

    better: str
    why: str
    plan: Plan
    nats: float
    seconds: float


def neighbours(search: Search, plan: Plan) -> list[Neighbour]:
    """A smaller plan, a faster one and a more precise one, as far as there are any."""
    if search.sensitivity.of_plan(plan) is None or len(search.levels()) == len(search.caches(plan.chunk)) == 1:
        return []
    nats, seconds, budget = search.nats(plan), search.seconds(plan), search.constraints.budget
    runtime = plan.accounts["runtime"]
    saved = max(plan.total - search.least(runtime).total, 0)
    precise = nats * MORE_PRECISE
    aims = {
        "smaller": Aim(nats=1.0, most_bytes=plan.total - SMALLER * saved, tie=TIE),
        "faster": Aim(nats=1.0, most_seconds=seconds * (1 - FASTER), most_bytes=budget, streams=True),
        "more precise": Aim(seconds=1.0, most_nats=precise, most_bytes=budget, streams=True),
        "more precise, in more memory": Aim(nbytes=1.0, most_nats=precise),
    }
    found = dict(zip(aims, search.solved(list(aims.values()), runtime), strict=True))
    if found["more precise"] is not None or not nats:
        del found["more precise, in more memory"]
    if not nats:
        del found["more precise"]
    return [
        Neighbour(better, _why(search, plan, other), other, search.nats(other), search.seconds(other))
        for better, other in found.items()
        if other is not None and (other.layers, other.outer, other.cache) != (plan.layers, plan.outer, plan.cache)
    ]


def _why(search: Search, plan: Plan, other: Plan) -> str:
    """What is worse about ``other``, in numbers."""
    parts = []
    nats = search.nats(other) - search.nats(plan)
    if nats > LEAST_NATS:
        parts.append(f"{nats:.4f} nats more")
    ratio = search.seconds(other) / search.seconds(plan)
    if ratio > LEAST_RATIO:
        parts.append(f"{ratio:.2g}x slower")
    over = other.total - search.constraints.budget
    if over > 0:
        parts.append(f"needs {format_bytes(over, ceil=True)} more")
    return ", ".join(parts) or "no better in what is preferred"


def described(search: Search, plan: Plan) -> list[dict[str, Any]]:
    """:func:`neighbours`, JSON-ready."""
    return [
        {
            "is": each.better,
            "why": each.why,
            "bytes": each.plan.total,
            "divergence": each.nats,
            "seconds": each.seconds if search.timed else None,
            "plan": each.plan.model_dump(),
        }
        for each in neighbours(search, plan)
    ]
