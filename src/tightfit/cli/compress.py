"""``tightfit compress``: write a model once in few bits, so that the next start only reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.cli.options import Debug, Json, Memory, Model, Threads
from tightfit.cli.output import print_json

Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help="How weights are stored: int4, int8, int4(group=64), ..., or own: as the model has them.",
        show_default="own for quantised GGUF files",
    ),
]
Out = Annotated[Path, typer.Option("--out", "-o", metavar="FOLDER", help="Where to write: a new or empty folder.")]
Force = Annotated[bool, typer.Option("--force", help="Replace a compressed model that is there.")]


def compress(
    out: Out,
    weights: Weights = None,
    model: Model = "nano",
    memory: Memory = None,
    threads: Threads = None,
    force: Force = False,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Write a model in few bits to a folder.

    `tightfit run FOLDER` then starts as fast as the disk reads. It takes no more memory than the largest layer in its
    new form, and what an interpreter with torch does.
    """
    from tightfit.cli.progress import loading
    from tightfit.engine.compress import compress as write
    from tightfit.engine.opening import Wish, open_model

    wish = Wish(model, memory, threads=threads)
    opened = open_model(wish)
    with opened.checkpoint, loading("compressing") as progress:
        receipt = write(wish, opened, weights, out, force, progress)
    if json:
        print_json(receipt)
    else:
        _show(receipt)


def _show(receipt: dict[str, Any]) -> None:
    from tightfit.budget.units import format_bytes
    from tightfit.cli.screen import show

    peak, budget = receipt["peak_rss_bytes"], receipt["budget_bytes"]
    kept = "inside" if peak <= budget else "OVER"
    show(
        f"{receipt['folder']}: {format_bytes(receipt['bytes'])} as {receipt['weights']}, "
        f"{receipt['bits_per_weight']:.2f} bits per weight, written in {receipt['seconds']:.1f} s",
        f"peak {format_bytes(peak)} of {format_bytes(budget)}, {kept} the budget",
    )
