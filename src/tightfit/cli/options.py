"""The options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a name of the hub (org/model), or an embedded model."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        "--memory",
        "-m",
        metavar="SIZE",
        help="Budget for the whole process: 600MiB, 4GB, 50%. Default: what is available, less a margin.",
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        "--context",
        "-c",
        metavar="TOKENS",
        help="Room for each sequence, prompt and answer. Default: the model's, at most 4096.",
    ),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights",
        metavar="FORMAT",
        help="How weights are stored: bf16, int8, int4(group=64), ..., or own, as in the files. Default: chosen, layer "
        "by layer, so that they fit.",
    ),
]
Prefer = Annotated[
    str | None,
    typer.Option(
        "--prefer",
        metavar="WHAT",
        help="What is chosen among what fits: quality (loses least, the default), balanced, or speed (the fastest that "
        "loses little).",
    ),
]
Experts = Annotated[
    str | None,
    typer.Option(
        "--experts",
        metavar="POLICY",
        help="Which experts of a mixture stay in memory where not all fit: lru, lfu, score, static; with +gate the "
        "next layer's are read ahead. Default: score+gate.",
    ),
]
Kv = Annotated[
    str | None,
    typer.Option(
        "--kv",
        metavar="METHODS",
        help="How keys and values are kept: int4, snapkv(keep=512)+int4+host, ..., or bytes such as 64MiB, for which "
        "methods are chosen, or auto. Default: none, all of them as they are.",
    ),
]
Prefill = Annotated[
    str | None,
    typer.Option(
        "--prefill",
        metavar="SCHEDULE",
        help="chunked: each chunk of a prompt goes through all layers (the default); layered: the whole prompt goes "
        "through one layer after the other.",
    ),
]
PromptCache = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache",
        metavar="SIZE",
        help="Memory, part of the budget, in which beginnings of prompts are kept, for prompts that begin alike.",
    ),
]
PromptCacheDisk = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache-disk",
        metavar="SIZE",
        help="Keep beginnings of prompts in files too, for later runs; SIZE is what these take at most.",
    ),
]
PromptCacheDir = Annotated[
    str | None,
    typer.Option(
        "--prompt-cache-dir",
        metavar="FOLDER",
        help="Where these files are. Default: the folder prompts in the user's cache folder.",
    ),
]
Chunk = Annotated[
    int | None,
    typer.Option(
        "--chunk", metavar="TOKENS", help="Prompt tokens computed at once. Default: up to 512, as many as fit."
    ),
]
Activations = Annotated[
    str | None,
    typer.Option(
        "--activations",
        metavar="TYPE",
        help="What decoding multiplies low-bit weights with: int8 (rounded, the default) or float32 (exact, slower).",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-t", metavar="N", help="Cores to use. Default: all that this process may use."),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON with stable keys instead of text.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
