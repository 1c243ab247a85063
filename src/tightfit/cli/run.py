"""``tightfit run``: generate text, or talk with a model, inside a budget."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from tightfit.cli.frame import Batch, Chunk, Context, Debug, Json, Memory, Threads, Weights, print_json, say, write
from tightfit.errors import UsageError

Prompt = Annotated[
    list[str] | None,
    typer.Option("--prompt", "-p", help="The prompt; several are generated at once. -: standard input."),
]


def run(
    model: Annotated[str, typer.Argument(help="A folder, a hub name, or an embedded model.")] = "nano",
    prompt: Prompt = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="A conversation: one line, one turn.")] = False,
    system: Annotated[str | None, typer.Option("--system", help="System message of the conversation.")] = None,
    memory: Memory = None,
    context: Context = None,
    batch: Batch = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", help="Tokens to generate at most.")] = 256,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Default: the model's.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Sample from so many tokens; 0: all.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Sample from the most likely tokens with this probability.")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="Leave out tokens this much less likely than the best.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repetition.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Text at which to stop; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")] = False,
    weights: Weights = None,
    chunk: Chunk = None,
    threads: Threads = None,
    plan: Annotated[Path | None, typer.Option("--plan", help="Follow a plan that `tightfit plan --out` wrote.")] = None,
    json: Json = False,
    debug: Debug = False,
) -> None:
    """Generates text and prints a receipt.

    The prompt comes from -p, a file, or standard input. The text goes to standard output, the receipt to standard
    error; with --json both go to standard output as one object.
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
        raise UsageError("--chat prints text as it comes", "Leave out --json; `tightfit run -p ... --json` gives one.")
    prompts = [] if chat else _prompts(prompt, file)

    # Whatever is imported before loading is part of what the plan counts with.
    from tightfit.api import load
    from tightfit.cli.chat import converse
    from tightfit.cli.progress import loading
    from tightfit.cli.show import show_receipt

    with loading() as progress:
        loaded = load(
            model,
            memory,
            context=context,
            batch=batch or max(len(prompts), 1),
            weights=weights,
            chunk=chunk,
            threads=threads,
            plan=_read_plan(plan),
            chat=chat,
            progress=progress,
        )

    with loaded:
        if chat:
            converse(loaded, system, options)
        elif json:
            completions = loaded.generate(prompts, **options)
            texts = [
                {
                    "text": completion.text,
                    "finish": completion.finish,
                    "prompt_tokens": completion.prompt_tokens,
                    "new_tokens": len(completion.tokens),
                }
                for completion in completions
            ]
            print_json({"completions": texts, "receipt": loaded.receipt()})
            return
        elif len(prompts) == 1:
            for piece in loaded.stream(prompts[0], **options):
                write(piece, end="")
            write("")
        else:
            for text, completion in zip(prompts, loaded.generate(prompts, **options), strict=True):
                write(f"{text}{completion.text}\n")
        show_receipt(loaded.receipt())


def _prompts(prompt: list[str] | None, file: Path | None) -> list[str]:
    """The prompts, from whichever place was named."""
    if prompt and file:
        raise UsageError("both -p and --file give a prompt", "Leave one out.")
    if file is not None:
        try:
            return [file.read_text(encoding="utf-8")]
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}", "Name a text file.") from None
        except UnicodeDecodeError:
            raise UsageError(f"{file} is not UTF-8 text", "Convert it first.") from None
    if prompt and prompt != ["-"]:
        return prompt
    if not prompt and sys.stdin.isatty():
        say("Type the prompt, then Ctrl-D:")
    try:
        text = sys.stdin.read()
    except UnicodeDecodeError:
        raise UsageError("standard input is not UTF-8 text", "Convert it first.") from None
    if not text:
        raise UsageError("the prompt is empty", "Give one with -p TEXT, --file FILE or on standard input.")
    return [text]


def _read_plan(path: Path | None) -> Any:
    if path is None:
        return None
    from pydantic import ValidationError

    from tightfit.plan.schema import Plan

    try:
        return Plan.model_validate_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}", "Write one with `tightfit plan --out`.") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UsageError(
            f"{path} is not a plan: {place}: {first['msg']}", "Write one with `tightfit plan --out`."
        ) from None
