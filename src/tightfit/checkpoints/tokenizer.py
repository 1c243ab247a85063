"""Text to token ids and back, with the tokenizer.json of a checkpoint."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tightfit.checkpoints.files import DOWNLOAD_AGAIN, read_json, read_text
from tightfit.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import tokenizers

    from tightfit.checkpoints.chat import ChatTemplate

PIECE = 1 << 14  # characters encoded at once when tokens are only counted: at most about 4 MiB
TOKENS_PER_CUT = 16  # taken off for each piece: more than the tokens that a cut through a word or a run of spaces adds
OTHER_KINDS = ("tokenizer.model", "tekken.json", "tiktoken.model", "vocab.json", "vocab.txt", "spiece.model")


class Tokenizer:
    """The tokenizer in folder ``path`` of model ``name``.

    ``special_tokens`` maps names (``bos_token``, ``eos_token``, ``pad_token``, ...) to texts, as chat templates see
    them; ``special_token_ids`` are the ids that ``decode`` leaves out on request.
    Raises CheckpointError where tokenizer.json is missing or cannot be used.

    Reading a vocabulary of 128,000 takes 110 MiB for a moment, of which 50 MiB stay; encoding takes about 250 bytes per
    token for a moment.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._path = path
        self._name = name
        self._settings = _optional_json(path / "tokenizer_config.json")
        declared = {**self._settings, **_legacy_special_tokens(path, self._settings)}
        self.special_tokens = _special_tokens(declared, name)
        self._tokenizer = _load(path)
        # The file may carry the truncation and padding of its training.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._register([*self.special_tokens.values(), *_unnamed_special_tokens(declared)])
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_token_ids = frozenset(index for index, token in added.items() if token.special)
        # Most files add the token that begins a sequence themselves; some leave it to tokenizer_config.json (deepseek).
        self._first_ids: list[int] = []
        if self._settings.get("add_bos_token") is True and self.bos_token_id is not None:
            self._first_ids = [] if self.bos_token_id in self.encode("") else [self.bos_token_id]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``. Special tokens that are written out in it are recognised.

        ``add_special_tokens`` adds what the model expects around a plain text, mostly the token that begins a
        sequence; a rendered chat has it already. Raises UsageError for text that is not valid Unicode.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UsageError(f"the prompt is not valid Unicode: {error.reason}", "Give it as UTF-8 text.") from error
        ids = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return self._first_ids + ids if add_special_tokens else ids

    def surely_exceeds(self, text: str, tokens: int) -> bool:
        """Whether ``text`` has clearly more than ``tokens`` tokens, found piece by piece in bounded memory, so that a
        prompt that is far too long can be refused before it is encoded whole.
        """
        count = 0
        for start in range(0, len(text), PIECE):
            count += len(self.encode(text[start : start + PIECE], add_special_tokens=False)) - TOKENS_PER_CUT
            if count > tokens:
                return True
        return False

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. A character of which bytes are missing comes out as U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of exactly this token, or None."""
        return self._tokenizer.token_to_id(token)

    @property
    def backend(self) -> tokenizers.Tokenizer:
        """The library's own object."""
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        """How many tokens there are, added ones included. The model's embedding may have more rows."""
        return self._tokenizer.get_vocab_size(with_added_tokens=True)

    @property
    def bos_token_id(self) -> int | None:
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        return self._special_id("pad_token")

    @cached_property
    def chat_templates(self) -> dict[str, str]:
        """The chat templates by name, ``default`` among them, read from where transformers looks: chat_template.jinja
        and additional_chat_templates/, or else tokenizer_config.json.
        """
        return _templates(self._path, self._settings, self._name)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat_templates)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """The prompt of a chat, see :meth:`tightfit.checkpoints.chat.ChatTemplate.render`. Encode it without adding
        special tokens. Raises UsageError where the model has no chat template.
        """
        if not self.has_chat_template:
            raise UsageError(
                f"{self._name} has no chat template: it is not made for conversations",
                "Give a plain prompt, or take the instruction-tuned version of the model.",
            )
        return self._chat.render(messages, add_generation_prompt, tools)

    @cached_property
    def _chat(self) -> ChatTemplate:
        from tightfit.checkpoints.chat import ChatTemplate

        return ChatTemplate(self.chat_templates, self.special_tokens, self._name)

    def _special_id(self, token: str) -> int | None:
        text = self.special_tokens.get(token)
        return None if text is None else self.token_to_id(text)

    def _register(self, tokens: list[str]) -> None:
        """Tokens that only the other files declare special are matched whole, like those of tokenizer.json.

        A token without an id has no embedding either and is left alone.
        """
        added = {token.content for token in self._tokenizer.get_added_tokens_decoder().values()}
        self._tokenizer.add_special_tokens(
            [token for token in tokens if token not in added and self.token_to_id(token) is not None]
        )


def _load(path: Path) -> tokenizers.Tokenizer:
    file = path / "tokenizer.json"
    if not file.is_file():
        other = next((kind for kind in OTHER_KINDS if (path / kind).is_file()), None)
        raise CheckpointError(
            f"{file} is missing" + (f": {other} alone is not supported" if other else ""),
            "Download the model again, or write the file with transformers: "
            "AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
        )
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing more specific
        raise CheckpointError(
            f"{file} cannot be read by tokenizers {tokenizers.__version__}: {str(error)[:200]}",
            "Download the file again; where it is newer than the library: pip install --upgrade tokenizers",
        ) from error
    _release_freed_memory()
    return tokenizer


def _release_freed_memory() -> None:
    """Reading leaves more than half of its memory free but scattered; glibc returns it only when it is asked to."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _optional_json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.exists() else {}


def _legacy_special_tokens(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """special_tokens_map.json counts where tokenizer_config.json predates ``added_tokens_decoder``."""
    return {} if "added_tokens_decoder" in settings else _optional_json(path / "special_tokens_map.json")


def _special_tokens(declared: Mapping[str, Any], name: str) -> dict[str, str]:
    """All ``..._token`` entries that hold a text, plainly or as ``{"content": text}``."""
    more = declared.get("extra_special_tokens")
    entries = {**declared, **(more if isinstance(more, dict) else {})}
    tokens = {}
    for key, value in entries.items():
        content = value.get("content") if isinstance(value, dict) else value
        if not key.endswith("_token") or content is None or isinstance(content, bool):
            continue
        if not isinstance(content, str):
            raise CheckpointError(
                f"tokenizer_config.json of {name} has '{key}' = {str(value)[:60]}, expected a text", DOWNLOAD_AGAIN
            )
        tokens[key] = content
    return tokens


def _unnamed_special_tokens(declared: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):
        values = declared.get(key)
        for value in values if isinstance(values, list) else []:
            content = value.get("content") if isinstance(value, dict) else value
            if isinstance(content, str):
                yield content


def _templates(path: Path, settings: Mapping[str, Any], name: str) -> dict[str, str]:
    files = {file.stem: file for file in sorted(path.glob("additional_chat_templates/*.jinja"))}
    if (path / "chat_template.jinja").exists():
        files["default"] = path / "chat_template.jinja"
    if files:
        return {template: read_text(file) for template, file in files.items()}
    value = settings.get("chat_template")
    if value is None:
        return {}
    try:
        templates = {"default": value} if isinstance(value, str) else {e["name"]: e["template"] for e in value}
        if all(isinstance(template, str) for template in templates.values()):
            return templates
    except (TypeError, KeyError):
        pass
    raise CheckpointError(
        f"tokenizer_config.json of {name} has a 'chat_template' that is neither a text nor a list of named ones",
        DOWNLOAD_AGAIN,
    )
