"""A conversation on the terminal: one line of standard input is one turn."""

from __future__ import annotations

import sys
from typing import Any

from tightfit.api import Model
from tightfit.cli.frame import rearm
from tightfit.cli.output import say, write
from tightfit.cli.prompts import lines
from tightfit.errors import UsageError


def converse(model: Model, system: str | None, options: dict[str, Any]) -> None:
    """Reads turns until the end of the input.

    On a terminal Ctrl-C ends an answer, and a message that cannot be used is refused and forgotten; from a file or a
    pipe both end the command.
    """
    messages: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
    kept = len(messages)  # of a full context the oldest messages after the system message are dropped
    terminal = sys.stdin.isatty()
    for line in lines():
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        completion = model.new_completion()
        answer = model.chat_stream(messages, completion, **options)
        try:
            for piece in answer:
                write(piece, end="")
        except KeyboardInterrupt:
            answer.close()
            if not terminal:
                raise
            rearm()
            say("\n(interrupted)")
        except UsageError as error:
            if not terminal:
                raise
            del messages[-1]
            say(f"error: {error.message}\n{error.hint}")
            continue
        write("")
        if completion.dropped_messages:
            say(f"(the context is full: the {completion.dropped_messages} oldest messages were left out)")
            del messages[kept : kept + completion.dropped_messages]
        messages.append({"role": "assistant", "content": completion.text})
