"""``tightfit census``: count which experts of a mixture a text activates."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import Context, Debug, Json, Memory, Model, Threads
from tightfit.cli.output import print_json
from tightfit.cli.prompts import read_prompts

Text = Annotated[list[str] | None, typer.Option("--prompt", "-p", metavar="TEXT", help="The text.")]
File = Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the text from a file.")]


def census(
    model: Model,
    prompt: Text = None,
    file: File = None,
    memory: Memory = None,
    context: Context = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Count which experts of a mixture a text activates.

    What was counted is remembered: `tightfit run MODEL --experts static` keeps those experts in memory that the text
    activated most. The text should be like what the model will be used for; a few thousand tokens are enough.
    """
    prompts = read_prompts(prompt or [], file)

    from tightfit.api import load_opened
    from tightfit.cli.progress import counting, loading
    from tightfit.engine.opening import Wish, open_model

    wish = Wish(model, memory, context, threads=threads)
    opened = open_model(wish)
    with opened.checkpoint:
        opened.check_experts()
        with loading() as progress:
            loaded = load_opened(wish, opened, None, progress)
        with counting("counting") as progress:
            answer = loaded.census("\n".join(prompts), progress)
        answer |= {"receipt": loaded.receipt()}
    if json:
        print_json(answer)
        return
    from tightfit.cli.screen import show

    half = sum(answer["most_used_half"]) / len(answer["most_used_half"])
    show(
        f"{answer['tokens']} tokens counted: half of all choices fall on {half:.0%} of the experts of a layer",
        f"kept in {answer['file']}, for `tightfit run {model} --experts static`",
    )
