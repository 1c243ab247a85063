"""``tightfit plan``: does it fit, and where do the bytes go? From the headers of a checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.frame import Batch, Chunk, Context, Debug, Json, Memory, Threads, Weights, print_json
from tightfit.errors import BudgetError, UsageError


def plan(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or an embedded model.")] = "nano",
    memory: Memory = None,
    context: Context = None,
    batch: Batch = None,
    weights: Weights = None,
    chunk: Chunk = None,
    threads: Threads = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Write the plan to a file, for `tightfit run --plan`.")
    ] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Says whether a model fits, what it would take, and what each precision would need.

    Nothing is loaded, and of a model on the hub only the headers are fetched. Exit status 4 if it does not fit.
    """
    from tightfit.engine.opening import Wish, open_model, survey

    wish = Wish(model, memory, context, batch or 1, weights, chunk, threads)
    answer = survey(wish, open_model(wish, headers_only=True))
    if out is not None and answer["plan"] is not None:
        import json as json_module

        try:
            out.write_text(json_module.dumps(answer["plan"], indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(
                f"{out} cannot be written: {error.strerror}", "Name a file in a folder of yours."
            ) from None
    if json:
        print_json(answer)
    else:
        from tightfit.cli.show import show_plan

        show_plan(answer)
    if answer["plan"] is None:
        raise typer.Exit(BudgetError.exit_status)
