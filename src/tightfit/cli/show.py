"""Tables for people: receipts and plans, on standard error or standard output."""

from __future__ import annotations

from collections import Counter
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from tightfit.budget.units import format_bytes


def table(*columns: str) -> Table:
    """A table whose first column is text and whose others are numbers."""
    made = Table(box=box.SIMPLE, pad_edge=False)
    for index, column in enumerate(columns):
        made.add_column(column, justify="left" if index == 0 else "right")
    return made


def show_receipt(receipt: dict[str, Any]) -> None:
    """The receipt of a run, on standard error."""
    console = Console(stderr=True, highlight=False)
    budget, peak = receipt["budget_bytes"], receipt["peak_rss_bytes"]
    kept = "inside" if peak <= budget else "OVER"
    console.print(f"\nReceipt: peak {format_bytes(peak)} of {format_bytes(budget)}, {kept} the budget", soft_wrap=True)
    accounts = table("account", "planned", "used")
    for name, account in receipt["accounts"].items():
        accounts.add_row(name, format_bytes(account["reserved_bytes"]), format_bytes(account["peak_bytes"]))
    console.print(accounts)
    plan = receipt["plan"]
    first = receipt["time_to_first_token_s"]
    parts = [
        f"{receipt['prompt_tokens']} prompt tokens" + speed(receipt["prefill_tokens_per_s"]),
        f"{receipt['new_tokens']} new tokens" + speed(receipt["decode_tokens_per_s"]),
    ]
    if first is not None:
        parts.append(f"first token after {first:.2f} s")
    console.print(", ".join(parts), soft_wrap=True)
    console.print(
        f"weights {describe_weights(plan)}, chunks of {plan['chunk']}, {plan['threads']} threads", soft_wrap=True
    )


def speed(rate: float | None) -> str:
    return "" if rate is None else f" at {rate:.1f}/s"


def describe_weights(plan: dict[str, Any]) -> str:
    """``own precision``, ``int8(group=32)``, or how many layers have which format."""
    formats: Counter[str] = Counter(layer["format"] for layer in plan["layers"])
    named: dict[str, str] = {"own": "in their own precision"}
    if len(formats) == 1:
        [only] = formats
        return named.get(only, only)
    return ", ".join(f"{named.get(name, name)} in {count} layers" for name, count in formats.items())


def show_plan(answer: dict[str, Any]) -> None:
    """What `tightfit plan` found, on standard output."""
    console = Console(highlight=False)
    model = answer["model"]
    console.print(
        f"{model['name']}: {model['family']}, {model['parameters'] / 1e6:,.1f} million parameters, "
        f"context {model['context']}",
        soft_wrap=True,
    )
    plan = answer["plan"]
    if plan is None:
        console.print(f"does not fit into {format_bytes(answer['budget_bytes'])}: {answer['hint']}", soft_wrap=True)
    else:
        console.print(
            f"fits into {format_bytes(answer['budget_bytes'])}, weights {describe_weights(plan)}", soft_wrap=True
        )
        accounts = table("account", "bytes")
        for name, nbytes in plan["accounts"].items():
            accounts.add_row(name, format_bytes(nbytes))
        accounts.add_row("sum", format_bytes(sum(plan["accounts"].values())))
        console.print(accounts)
        console.print(
            f"context {plan['context']} for {plan['sequences']} sequence(s), chunks of {plan['chunk']}", soft_wrap=True
        )
    console.print("smallest budget for each precision:")
    needs = table("weights", "needs", "of which weights", "kv")
    for level in answer["precisions"]:
        name = "own precision" if level["format"] == "own" else level["format"]
        needs.add_row(
            name,
            format_bytes(level["smallest_bytes"], ceil=True),
            format_bytes(level["accounts"]["weights"]),
            format_bytes(level["accounts"]["kv"]),
        )
    console.print(needs)
