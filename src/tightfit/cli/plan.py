"""``tightfit plan``: does it fit, and where do the bytes go? From the headers of a checkpoint alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import (
    Activations,
    Chunk,
    Context,
    Debug,
    Experts,
    Json,
    Kv,
    Memory,
    Model,
    Prefer,
    Prefill,
    PromptCache,
    PromptCacheDir,
    PromptCacheDisk,
    Threads,
    Weights,
)
from tightfit.cli.output import print_json, say
from tightfit.errors import BudgetError

Batch = Annotated[int | None, typer.Option("--batch", "-b", metavar="N", help="Sequences at once. Default: 1.")]
Out = Annotated[
    Path | None,
    typer.Option("--out", "-o", metavar="FILE", help="Write the plan to a file, for `tightfit run --plan FILE`."),
]


def plan(
    model: Model = "nano",
    memory: Memory = None,
    context: Context = None,
    weights: Weights = None,
    batch: Batch = None,
    chunk: Chunk = None,
    activations: Activations = None,
    experts: Experts = None,
    kv: Kv = None,
    prefill: Prefill = None,
    prompt_cache: PromptCache = None,
    prompt_cache_disk: PromptCacheDisk = None,
    prompt_cache_dir: PromptCacheDir = None,
    threads: Threads = None,
    prefer: Prefer = None,
    out: Out = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Say whether a model fits, and where the bytes go.

    Tells what each precision of the weights would need. Nothing is loaded, and of a model on the hub only the headers
    are fetched. Exit status 4 if it does not fit.
    """
    from tightfit.cli.planfile import write_plan
    from tightfit.cli.progress import counting
    from tightfit.engine.opening import Wish, is_measured, measure_machine, open_model, survey

    wish = Wish(
        model,
        memory,
        context,
        batch,
        weights,
        chunk,
        threads,
        activations,
        experts,
        kv,
        prefill,
        prompt_cache,
        prompt_cache_disk,
        prompt_cache_dir,
        prefer,
    )
    opened = open_model(wish, headers_only=True)
    with opened.checkpoint:
        if not is_measured(wish, opened):
            say("This machine is measured first, which takes up to 20 seconds and is remembered.")
            with counting("measuring") as progress:
                measure_machine(wish, opened, progress)
        answer = survey(wish, opened, followed=out is not None)
    if out is not None and answer["plan"] is not None:
        write_plan(out, answer["plan"])
    if json:
        print_json(answer)
    else:
        from tightfit.cli.show import show_plan

        show_plan(answer)
    if answer["plan"] is None:
        raise typer.Exit(BudgetError.exit_status)
