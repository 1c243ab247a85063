"""The receipt of a run: what was promised, what was used, how fast it was."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tightfit.budget.ledger import Ledger
from tightfit.budget.meter import resident_set
from tightfit.engine.generate import Timing
from tightfit.kv.reuse.prompts import PromptCache
from tightfit.plan.cost import Cost
from tightfit.plan.schema import Plan


def receipt(
    plan: Plan, ledger: Ledger, timing: Timing, prompts: PromptCache | None = None, cost: Cost | None = None
) -> dict[str, Any]:
    """JSON-ready; keys are stable. Sizes in bytes, times in seconds; a rate is None before there is one. Without a
    ``cost`` nothing is said of what was predicted."""
    found = None if cost is None else predicted(cost, plan, timing)
    seen = resident_set()
    ledger.measure(seen.current)
    return {
        "budget_bytes": plan.budget,
        "peak_rss_bytes": seen.peak,
        "predicted_bytes": plan.total,
        "accounts": ledger.receipt(),
        "prompt_tokens": timing.prompt_tokens,
        "new_tokens": timing.new_tokens,
        "time_to_first_token_s": timing.first_token_seconds,
        "prefill_tokens_per_s": rate(timing.prefill_tokens, timing.prefill_seconds),
        "decode_tokens_per_s": rate(timing.decode_tokens, timing.decode_seconds),
        "predicted": found,
        "prefill_streamed_bytes_per_token": rate(timing.prefill_streamed, timing.prefill_tokens),
        "decode_streamed_bytes_per_token": rate(timing.decode_streamed, timing.decode_tokens),
        "prefill_experts": experts(timing.prefill_experts),
        "decode_experts": experts(timing.decode_experts),
        "prefill_fetched": fetched(timing.prefill_fetched),
        "decode_fetched": fetched(timing.decode_fetched),
        "prompt_cache": None if prompts is None else prompts.receipt(),
        "plan": plan.model_dump(),
    }


def predicted(cost: Cost, plan: Plan, timing: Timing) -> dict[str, Any] | None:
    """Seconds of all prompts that were computed and of a step of those that decoded together, as they were predicted
    (for prompts of the mean length), as they were measured, and the least that this machine could take; the
    ``share`` of that in what was measured, and what it is bound by. None before a prompt was computed."""
    if not timing.prefill_tokens:
        return None
    prompt = -(-timing.prefill_tokens // timing.requests)
    together = min(timing.requests, plan.sequences)
    found = cost.predict(plan, prompt, timing.new_tokens // timing.requests, together)
    rounds = timing.requests / together
    step = timing.decode_seconds / timing.decode_tokens * together if timing.decode_tokens else None
    return {
        "prefill": phase(
            found.prefill_seconds * rounds,
            timing.prefill_seconds,
            found.floor_prefill_seconds * rounds,
            found.prefill_bound,
        ),
        "decode": phase(found.decode_seconds, step, found.floor_decode_seconds, found.decode_bound),
    }


def phase(seconds: float, measured: float | None, floor: float, bound: str) -> dict[str, Any]:
    """Of one phase; nothing was ``measured`` where no token was decoded."""
    share = None if measured is None else floor / measured
    return {"predicted_s": seconds, "measured_s": measured, "floor_s": floor, "share": share, "bound": bound}


def experts(counts: Counter[str]) -> dict[str, float] | None:
    """How many experts steps used, and which shares of them were in memory when they were wanted (``hit_rate``), were
    being read ahead (``late_rate``), and had been foreseen (``foreseen_rate``). None where they were not cached."""
    used = counts["used"]
    if not used:
        return None
    shares = {"hit_rate": "hits", "late_rate": "late", "foreseen_rate": "foreseen"}
    return {"used": used} | {name: counts[key] / used for name, key in shares.items()}


def fetched(counts: Counter[str]) -> dict[str, float] | None:
    """How many heads or pages of keys and values were ``wanted`` of a file that is read ahead, which share of them had
    been asked for before (``ahead_rate``), the bytes that were read, and for how long attention waited. None where no
    file was, or none was wanted."""
    wanted = counts["wanted"]
    if not wanted:
        return None
    of_file = {"bytes": counts["bytes"], "waited_s": counts["waited"] / 1e9}
    return {"wanted": wanted, "ahead_rate": counts["ahead"] / wanted} | of_file


def rate(count: float, seconds: float) -> float | None:
    return count / seconds if count and seconds else None
