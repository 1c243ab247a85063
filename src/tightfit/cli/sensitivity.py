"""``tightfit sensitivity``: measure what rounding costs a model, layer by layer."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tightfit.cli.options import Debug, Json, Memory, Model, Threads
from tightfit.cli.output import print_json
from tightfit.cli.prompts import read_prompts

Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        metavar="FILE",
        help="A text that is like what the model will be used for. Default: Python files that are installed here.",
    ),
]
Formats = Annotated[
    str | None,
    typer.Option(
        "--formats", metavar="LIST", help="Weight formats, such as int8,int4(group=64). Default: int8 to int4."
    ),
]
Tokens = Annotated[int | None, typer.Option("--tokens", metavar="N", help="Tokens of the text to measure with: 256.")]


def sensitivity(
    model: Model = "nano",
    text: Text = None,
    formats: Formats = None,
    tokens: Tokens = None,
    memory: Memory = None,
    threads: Threads = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Measure what rounding costs a model, layer by layer.

    A text is run through the model as it is, and with each layer in each format: the KL divergence of what the model
    then says of the next token. What was found is remembered, and decides how plans round this model.
    """
    given = None if text is None else read_prompts([], text)[0]

    from tightfit.catalog import split
    from tightfit.cli.progress import counting
    from tightfit.engine.opening import Wish, open_model
    from tightfit.engine.sensitivity import TOKENS, calibration_text, measure_sensitivity
    from tightfit.plan.search import LEVELS

    wish = Wish(model, memory, threads=threads)
    opened = open_model(wish)
    with opened.checkpoint, counting("layers and formats") as progress:
        answer = measure_sensitivity(
            wish,
            opened,
            calibration_text() if given is None else given,
            LEVELS[1:] if formats is None else split(formats, ",", formats),
            tokens or TOKENS,
            progress,
        )
    if json:
        print_json(answer)
    else:
        from tightfit.cli.show import show_sensitivity

        show_sensitivity(answer, opened.checkpoint.name)
