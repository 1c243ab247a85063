"""``tightfit fit``: find what a method of the cache must know of a model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import Chunk, Context, Debug, Json, Memory, Model, Threads
from tightfit.cli.output import print_json
from tightfit.cli.prompts import read_prompts

Methods = Annotated[str, typer.Option("--kv", metavar="METHODS", help="The methods, with the settings of later runs.")]
Text = Annotated[
    Path, typer.Option("--text", metavar="FILE", help="A text that is like what the model will be used for.")
]


def fit(
    model: Model,
    kv: Methods,
    text: Text,
    memory: Memory = None,
    context: Context = None,
    chunk: Chunk = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Find what a method of the cache must know of a model.

    What was found is remembered for that method with the same settings. The text should be like what the model will be
    used for; a few thousand tokens of it are used.
    """
    from tightfit.kv.compose import fitted

    fitted(kv)
    [prompt] = read_prompts([], text)

    from tightfit.api import load_opened
    from tightfit.cli.progress import counting, loading
    from tightfit.engine.opening import Wish, open_model

    wish = Wish(model, memory, context, chunk=chunk, threads=threads)
    opened = open_model(wish)
    with opened.checkpoint:
        with loading() as progress:
            loaded = load_opened(wish, opened, None, progress)
        with counting("steps") as progress:
            answer = loaded.fit(kv, prompt, progress)
        answer |= {"receipt": loaded.receipt()}
    if json:
        print_json(answer)
        return
    from tightfit.cli.screen import show

    show(
        *answer["lines"],
        f"kept in {answer['file']}, for `tightfit run {model} --kv '{answer['kv']}'`",
    )
