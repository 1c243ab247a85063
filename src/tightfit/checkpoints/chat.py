"""Chat templates: the jinja2 program of a checkpoint that turns messages into a prompt.

A template is untrusted, so it runs in jinja2's immutable sandbox, sees plain JSON data only, and its output is bounded.
It finds what transformers offers: trimmed blocks, loop controls, ``raise_exception``, ``strftime_now``, a ``tojson``
that does not escape, ``generation`` blocks, and the special tokens by name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tightfit.errors import CheckpointError, UsageError

MAX_PROMPT_CHARACTERS = 16 << 20  # beyond the context of any model; a template that runs away is stopped there


class ChatTemplate:
    """The named ``templates`` of model ``name`` (mostly one, ``default``), and the ``special_tokens`` they refer to."""

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str], name: str) -> None:
        self._templates = templates
        self._special_tokens = special_tokens
        self._name = name
        self._compiled: dict[str, jinja2.Template] = {}

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt for ``messages`` (each with ``role`` and ``content``), special tokens included.

        ``add_generation_prompt`` appends the beginning of the assistant's answer. With ``tools`` (JSON schemas) a
        template named ``tool_use`` is preferred. Keys of a message that are None are left out.
        Raises UsageError where the messages are malformed or the template refuses them, CheckpointError where the
        template is faulty.
        """
        template = self._compile("tool_use" if tools and "tool_use" in self._templates else "default")
        variables = _plain({**self._special_tokens, "messages": messages, "tools": tools, "documents": None})
        if not variables["messages"] or not all(isinstance(message, dict) for message in variables["messages"]):
            raise UsageError("a chat needs a list of messages", 'Give e.g. [{"role": "user", "content": "Hello"}].')
        variables["messages"] = [
            {key: value for key, value in message.items() if value is not None} for message in variables["messages"]
        ]
        pieces: list[str] = []
        length = 0
        try:
            for piece in template.generate(**variables, add_generation_prompt=add_generation_prompt):
                pieces.append(piece)
                length += len(piece)
                if length > MAX_PROMPT_CHARACTERS:
                    raise OverflowError(f"it wrote more than {MAX_PROMPT_CHARACTERS} characters")
        except _RefusalError as error:
            raise UsageError(
                f"the chat template of {self._name} refuses these messages: {error}", "Change the messages accordingly."
            ) from error
        except Exception as error:
            raise CheckpointError(
                f"the chat template of {self._name} failed: {_describe(error)}",
                "Try a plain prompt instead of a chat, or another version of the model.",
            ) from error
        return "".join(pieces)

    def _compile(self, template: str) -> jinja2.Template:
        if template not in self._templates:
            known = ", ".join(sorted(self._templates))
            raise CheckpointError(f"{self._name} has no default chat template, only: {known}", "Try a plain prompt.")
        if template not in self._compiled:
            try:
                self._compiled[template] = _environment().from_string(self._templates[template])
            except Exception as error:
                raise CheckpointError(
                    f"the chat template of {self._name} cannot be read: {_describe(error)}",
                    "Try a plain prompt instead of a chat, or download the model again.",
                ) from error
        return self._compiled[template]


class _RefusalError(Exception):
    """Raised by a template through ``raise_exception``."""


class _GenerationBlocks(jinja2.ext.Extension):
    """``{% generation %}`` marks what the assistant wrote, for training; here its content is simply rendered."""

    tags = {"generation"}  # noqa: RUF012 (as jinja2 declares it)

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    functions: dict[str, Callable[[str], str]] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(functions)
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> str:
    raise _RefusalError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _plain(variables: dict[str, Any]) -> dict[str, Any]:
    """A copy made of JSON types only: objects of other types could have methods that the sandbox does not know."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(variables))
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(
            f"the messages of a chat must be JSON data: {error}", "Use strings, lists and dicts."
        ) from error
    return plain


def _describe(error: Exception) -> str:
    if isinstance(error, jinja2.TemplateSyntaxError):
        return f"line {error.lineno}: {error.message}"
    return f"{type(error).__name__}: {error}"
