"""A conversation on the terminal: one line of standard input is one turn."""

from __future__ import annotations

import sys
from typing import Any

from tightfit.api import Model
from tightfit.cli.frame import say, write


def converse(model: Model, system: str | None, options: dict[str, Any]) -> None:
    """Reads turns until the end of the input. Ctrl-C ends an answer, and a second one the conversation."""
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    interactive = sys.stdin.isatty()
    while True:
        if interactive:
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.rstrip("\n")})
        completion = model.new_completion()
        answer = model.chat_stream(messages, completion, **options)
        try:
            for piece in answer:
                write(piece, end="")
        except KeyboardInterrupt:
            answer.close()
            if not interactive:
                raise
            say("\n(interrupted)")
        write("")
        if completion.dropped_messages:
            say(f"(the context is full: the oldest {completion.dropped_messages} messages were left out)")
            first = 1 if messages[0]["role"] == "system" else 0
            del messages[first : first + completion.dropped_messages]
        messages.append({"role": "assistant", "content": completion.text})
