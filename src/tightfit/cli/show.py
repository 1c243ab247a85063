"""Receipts and plans as tables for people."""

from __future__ import annotations

from collections import Counter
from typing import Any

from tightfit.budget.units import format_bytes
from tightfit.cli.screen import show, show_aside, table
from tightfit.plan.schema import OWN


def show_receipt(receipt: dict[str, Any]) -> None:
    """The receipt of a run, on standard error."""
    budget, peak = receipt["budget_bytes"], receipt["peak_rss_bytes"]
    kept = "inside" if peak <= budget else "OVER"
    accounts = table("account", "planned", "used")
    for name, account in receipt["accounts"].items():
        accounts.add_row(name, format_bytes(account["reserved_bytes"]), format_bytes(account["peak_bytes"]))
    parts = [
        f"{receipt['prompt_tokens']} prompt tokens" + _speed(receipt["prefill_tokens_per_s"]),
        f"{receipt['new_tokens']} new tokens" + _speed(receipt["decode_tokens_per_s"]),
    ]
    if receipt["time_to_first_token_s"] is not None:
        parts.append(f"first token after {receipt['time_to_first_token_s']:.2f} s")
    plan = receipt["plan"]
    show_aside(
        f"\nReceipt: peak {format_bytes(peak)} of {format_bytes(budget)}, {kept} the budget",
        accounts,
        ", ".join(parts),
        f"weights {_formats(plan)}{_in_memory(plan)}{_cache(plan)}, context {plan['context']}, chunks of "
        f"{plan['chunk']}, {plan['threads']} threads",
        *_predicted(receipt["predicted"]),
        *_streamed(receipt),
        *_prompts(receipt["prompt_cache"]),
    )


def _predicted(predicted: dict[str, Any] | None) -> list[str]:
    """What was predicted beside what was measured, if this machine's speeds are known."""
    lines = []
    for phase, name in (("prefill", "prompt"), ("decode", "new token")):
        found = None if predicted is None else predicted[phase]
        if found is not None and found["measured_s"] is not None:
            lines.append(
                f"{name}: {_seconds(found['measured_s'])}, predicted {_seconds(found['predicted_s'])}; "
                f"{found['share']:.0%} of what this machine could do, bound by {found['bound']}"
            )
    return lines


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.1f} ms"


def _streamed(receipt: dict[str, Any]) -> list[str]:
    """What came from the disk, if anything did."""
    found = []
    for phase, name in (("prefill", "prompt"), ("decode", "new")):
        nbytes = receipt[f"{phase}_streamed_bytes_per_token"]
        if nbytes is not None:
            found.append(f"{format_bytes(int(nbytes))} for each {name} token")
    lines = [f"weights read from the disk: {', '.join(found)}"] if found else []
    for phase, name in (("prefill", "prompt"), ("decode", "new tokens")):
        experts = receipt[f"{phase}_experts"]
        if experts is not None:
            lines.append(
                f"experts of the {name}: {experts['hit_rate']:.1%} were in memory, {experts['late_rate']:.1%} on their "
                f"way, {experts['foreseen_rate']:.1%} foreseen"
            )
        fetched = receipt[f"{phase}_fetched"]
        if fetched is not None:
            waited = _seconds(fetched["waited_s"])
            lines.append(
                f"keys and values of the {name}: {format_bytes(fetched['bytes'])} read from the disk, "
                f"{fetched['ahead_rate']:.1%} of what was wanted had been asked for, waited {waited}"
            )
    return lines


def _prompts(kept: dict[str, Any] | None) -> list[str]:
    """What the prompt cache did, if there is one."""
    if kept is None:
        return []
    parts = [
        f"prompt cache: {kept['reused_tokens']} tokens were not computed again, from {kept['memory_hits']} entries in "
        f"memory and {kept['disk_hits']} on the disk"
    ]
    if kept["entries"]:
        parts.append(f"{kept['entries']} entries kept in {format_bytes(kept['bytes'])} of memory")
    parts += [f"{kept[name]} {name}" for name in ("damaged", "unwritten") if kept[name]]
    return [", ".join(parts)]


def show_plan(answer: dict[str, Any]) -> None:
    """What `tightfit plan` found, on standard output."""
    model, plan, budget = answer["model"], answer["plan"], format_bytes(answer["budget_bytes"])
    show(
        f"{model['name']}: {model['family']}, {model['parameters'] / 1e6:,.1f} million parameters, "
        f"context {model['context']}"
    )
    if plan is None:
        show(f"does not fit into {budget}", answer["hint"])
    else:
        accounts = table("account", "bytes")
        for name, nbytes in plan["accounts"].items():
            accounts.add_row(name, format_bytes(nbytes))
        accounts.add_row("sum", format_bytes(sum(plan["accounts"].values())))
        show(
            f"fits into {budget}, weights {_formats(plan)}{_in_memory(plan)}{_cache(plan)}, room for "
            f"{plan['sequences']} x {plan['context']} tokens, chunks of {plan['chunk']}",
            accounts,
        )
        show(*_divergence(answer["divergence"]), *_expected(answer["predicted"], plan))
        _show_neighbours(answer["neighbours"])
    needs = table("weights", "needs", "of which weights", "kv")
    for level in answer["precisions"]:
        needs.add_row(
            ("own precision" if level["format"] == OWN else level["format"])
            + (", from the disk" if level["streamed"] else ""),
            format_bytes(level["smallest_bytes"], ceil=True),
            format_bytes(level["accounts"]["weights"]),
            format_bytes(level["accounts"]["kv"]),
        )
    show("The smallest budget for each precision:", needs)


def _divergence(found: dict[str, Any]) -> list[str]:
    """What the plan loses, as far as that is known."""
    if found["nats"] is None:
        return []
    source = "measured on this model" if found["measured"] else "assumed; `tightfit sensitivity MODEL` measures it"
    return [f"divergence from the exact model: {found['nats']:.4f} nats per token ({source})"]


def _show_neighbours(neighbours: list[dict[str, Any]]) -> None:
    """What else there is, and why it was not chosen."""
    if not neighbours:
        return
    beside = table("beside it", "needs", "nats", "why not")
    for each in neighbours:
        beside.add_row(
            f"{each['is']}: {_formats(each['plan'])}{_cache(each['plan'])}",
            format_bytes(each["bytes"], ceil=True),
            f"{each['divergence']:.4f}",
            each["why"],
        )
    show(beside)


def show_sensitivity(answer: dict[str, Any], name: str) -> None:
    """What `tightfit sensitivity` measured, on standard output."""
    weights = answer["weights"]
    formats = list(weights["outer"])
    losses = table("stored as", *formats)
    for group, of_formats in weights.items():
        losses.add_row(group, *(f"{of_formats[fmt]:.6f}" for fmt in formats))
    losses.add_row("sum", *(f"{sum(each[fmt] for each in weights.values()):.6f}" for fmt in formats))
    show(f"KL divergence from {name} as it is, in nats per token, on {answer['tokens']} tokens", losses)
    if answer["cache"]:
        caches = table("cache", "nats")
        for kv, nats in answer["cache"].items():
            caches.add_row(kv, f"{nats:.6f}")
        show(caches)
    show(f"kept in {answer['file']}: plans of {name} are chosen by it")


def _expected(predicted: dict[str, Any] | None, plan: dict[str, Any]) -> list[str]:
    """How fast the plan will be, if this machine's speeds are known."""
    if predicted is None:
        return []
    rate = 1 / predicted["decode_seconds"]
    share = predicted["floor_decode_seconds"] * rate
    return [
        f"expected: a prompt of {predicted['prompt_tokens']} tokens in {_seconds(predicted['prefill_seconds'])} "
        f"(bound by {predicted['prefill_bound']}), then {rate:.1f} tokens/s (bound by {predicted['decode_bound']}), "
        f"{share:.0%} of what this machine could do",
        f"room for {_counted(predicted['concurrency'], 'sequence')} of {plan['context']} tokens, "
        f"{_seconds(predicted['switch_seconds'])} to change from one to another",
    ]


def _in_memory(plan: dict[str, Any]) -> str:
    """How much of the weights is, where that is not all."""
    experts = plan["experts"]
    if not plan["buffers"] and experts is None:
        return ""
    whole = plan["outer"]["nbytes"] + sum(layer["nbytes"] for layer in plan["layers"])
    held = plan["accounts"]["weights"] + plan["accounts"].get("experts", 0)
    rows = plan["outer"]["resident"]
    of_head = "" if rows is None else f" (of the head {rows:,} rows)"
    slots = "" if experts is None else f" with {experts['slots']} experts ({experts['policy']})"
    return f", {format_bytes(held)} of {format_bytes(whole)} in memory{of_head}{slots}"


def _cache(plan: dict[str, Any]) -> str:
    """How the cache is kept and filled, where that is not the usual way, and what is kept of prompts."""
    kept = "" if plan["cache"] == "none" else f", cache {plan['cache']}"
    prompts = plan["prompt_cache"] or {}
    for place, where in (("memory", "in memory"), ("disk", "on the disk")):
        if prompts.get(place) is not None:
            kept += f", {format_bytes(prompts[place])} for prompts {where}"
    return kept + (", prompts layer by layer" if plan["prefill"] == "layered" else "")


def _speed(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f}/s"


def _formats(plan: dict[str, Any]) -> str:
    """``in their own precision``, ``int8``, or which format in how many layers."""
    formats: Counter[str] = Counter(layer["format"] for layer in plan["layers"])
    converted = ", ".join(plan["model"]["converted"])
    rounded = f" (scales of {converted} rounded to float16)" if converted else ""
    names = {OWN: f"in their own precision{rounded}"}
    if len(formats) == 1:
        [only] = formats
        return names.get(only, only)
    return ", ".join(f"{names.get(name, name)} in {_counted(count, 'layer')}" for name, count in formats.items())


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"
