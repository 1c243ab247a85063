"""``tightfit run``: generate text, or talk with a model, inside a budget."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from tightfit.cli.output import print_json, write
from tightfit.cli.prompts import read_prompts
from tightfit.errors import UsageError

if TYPE_CHECKING:
    from tightfit import api

MOST_AT_ONCE = 8  # prompts, unless --batch says more: room is kept for each

Prompt = Annotated[
    list[str] | None,
    typer.Option(
        "--prompt",
        "-p",
        metavar="TEXT",
        help="The prompt, or - for standard input. Repeat it for several at once.",
    ),
]
File = Annotated[Path | None, typer.Option("--file", "-f", metavar="FILE", help="Read the prompt from a file.")]
Chat = Annotated[bool, typer.Option("--chat", help="Hold a conversation: each line of standard input is a turn.")]
System = Annotated[
    str | None, typer.Option("--system", metavar="TEXT", help="System message of the conversation (with --chat).")
]
Batch = Annotated[
    int | None,
    typer.Option(
        "--batch",
        "-b",
        metavar="N",
        help="Prompts computed at once; others wait. Default: all of them, at most 8.",
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--max-new-tokens", "-n", metavar="TOKENS", help="Tokens to generate at most.")
]
Temperature = Annotated[
    float | None, typer.Option(metavar="X", help="How freely to sample; 0 is greedy. Default: the model's.")
]
TopK = Annotated[int | None, typer.Option(metavar="K", help="Sample from the K most likely tokens; 0: from all.")]
TopP = Annotated[
    float | None, typer.Option(metavar="P", help="Sample from the most likely tokens that reach this probability.")
]
MinP = Annotated[
    float | None,
    typer.Option(metavar="P", help="Leave out tokens less likely than this share of the most likely one."),
]
RepetitionPenalty = Annotated[
    float | None, typer.Option(metavar="X", help="Above 1: make tokens that were there before less likely.")
]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Make sampling repeatable.")]
Stop = Annotated[
    list[str] | None, typer.Option("--stop", metavar="TEXT", help="Stop before this text; may be repeated.")
]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")]
PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Follow a plan that `tightfit plan --out FILE` wrote."),
]


def run(
    model: Model = "nano",
    prompt: Prompt = None,
    file: File = None,
    chat: Chat = False,
    system: System = None,
    memory: Memory = None,
    context: Context = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    ignore_eos: IgnoreEos = False,
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
    plan: PlanFile = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generate text, or hold a conversation.

    The prompt comes from -p, from a file, or from standard input. The text goes to standard output, and a receipt
    (memory promised and used, tokens per second) to standard error. With --json both go to standard output.
    """
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop or ()),
        "ignore_eos": ignore_eos,
    }
    if chat and (prompt or file):
        raise UsageError("--chat reads the conversation from standard input", "Leave out -p and --file.")
    if chat and json:
        raise UsageError("--chat prints text as it comes", "Leave out --json; `tightfit run -p TEXT --json` has it.")
    if system and not chat:
        raise UsageError("--system belongs to a conversation", "Add --chat, or leave it out.")
    prompts = [] if chat else read_prompts(prompt or [], file)

    # Whatever is imported before loading is part of what the plan counts with.
    from tightfit.api import load_opened
    from tightfit.cli.chat import converse
    from tightfit.cli.planfile import read_plan
    from tightfit.cli.progress import loading
    from tightfit.cli.show import show_receipt
    from tightfit.engine.following import planned
    from tightfit.engine.opening import Wish, open_model

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
    followed = None if plan is None else read_plan(plan)
    if followed is not None:
        wish = planned(wish, followed)
    elif batch is None:
        wish = replace(wish, batch=max(min(len(prompts), MOST_AT_ONCE), 1))

    opened = open_model(wish)
    with opened.checkpoint:
        # What cannot work is refused before anything is loaded.
        if chat:
            opened.check_chat(system)
        opened.requests().make(prompts or ["a"], options)
        with loading() as progress:
            loaded = load_opened(wish, opened, followed, progress)
        with loaded:
            if chat:
                converse(loaded, system, options)
            elif json:
                _print_json(loaded, prompts, options)
                return
            else:
                _print_text(loaded, prompts, options)
            show_receipt(loaded.receipt())


def _print_text(model: api.Model, prompts: list[str], options: dict[str, Any]) -> None:
    """What follows on one prompt, as it comes; of several each prompt and what follows on it, in their order."""
    several = len(prompts) > 1
    completions = [model.new_completion() for _ in prompts]
    waiting = [prompt if several else "" for prompt in prompts]
    current = 0  # of which the text is being printed

    def print_waiting() -> None:
        nonlocal current
        while current < len(prompts):
            write(waiting[current], end="")
            waiting[current] = ""
            if not completions[current].finish:
                return
            current += 1
            write("\n" * (1 + (current < len(prompts))), end="")  # an empty line between them

    try:
        for index, piece in model.stream_many(prompts, completions, **options):
            waiting[index] += piece
            print_waiting()
    except BaseException:
        write("")
        raise
    print_waiting()


def _print_json(model: api.Model, prompts: list[str], options: dict[str, Any]) -> None:
    """``{"completions", "receipt"}``"""
    completions = [
        {
            "text": completion.text,
            "finish": completion.finish,
            "prompt_tokens": completion.prompt_tokens,
            "reused_tokens": completion.reused_tokens,
            "new_tokens": len(completion.tokens),
        }
        for completion in model.generate(prompts, **options)
    ]
    print_json({"completions": completions, "receipt": model.receipt()})
