"""Tokens to text that can be shown as they come: no broken characters, nothing of a stop string, nothing taken back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from tightfit.errors import UsageError

BROKEN = "\N{REPLACEMENT CHARACTER}"  # what decoders write for bytes that are not, or not yet, a character
LONGEST_WAIT = 16  # tokens; an unfinished character has three bytes at most, so more tokens are not waiting for one


class Decodes(Protocol):
    """A tokenizer, as far as it is needed here."""

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = ...) -> str: ...


class TextStream:
    """The text of one sequence of tokens, piece by piece.

    All pieces together are ``tokenizer.decode`` of all tokens, cut before the first of ``stop_strings`` to be complete
    (of two that end at the same place, before the longer). ``stopped`` is that string, or None.

    Tokens cannot be decoded one by one: a character may be spread over several, and many tokenizers drop the space
    before the first word only. So each is decoded after a few that came before it. Tokenizers with byte fallback
    (tokens ``<0x00>`` to ``<0xFF>``, found where there is a ``token_to_id``) decode a run of bytes as a whole, so that
    its end decides how its start is read: such a run waits for the token that ends it.
    """

    def __init__(self, tokenizer: Decodes, stop_strings: Sequence[str] = (), skip_special_tokens: bool = True) -> None:
        self.stopped: str | None = None
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._stop = _StopStrings(stop_strings)
        self._bytes = _byte_tokens(tokenizer)
        self._window: list[int] = []  # tokens that are decoded together
        self._place = 0  # how many tokens of the window are there only as what came before
        self._shown = 0  # characters of the window's text that are shown, or held for a stop string

    def push(self, token: int) -> str:
        """The text that can be shown now that ``token`` is known; nothing once a stop string is complete."""
        if self.stopped is not None or self._is_skipped(token):
            return ""
        self._window.append(token)
        if token in self._bytes:
            return ""
        text = self._decode(self._window)
        unfinished = text.endswith(BROKEN)
        piece = self._show(text[:-1] if unfinished else text)
        if not unfinished or len(self._window) - self._place > LONGEST_WAIT:
            self._settle(text)
        return piece

    def finish(self) -> str:
        """What is left, when no token follows."""
        if self.stopped is not None:
            return ""
        piece = self._show(self._decode(self._window))
        return piece if self.stopped is not None else piece + self._stop.flush()

    def _show(self, text: str) -> str:
        """Passes what is new in the window's ``text`` on, as far as stop strings allow."""
        piece, self.stopped = self._stop.push(text[self._shown :])
        self._shown = max(self._shown, len(text))
        return piece

    def _settle(self, text: str) -> None:
        """Drop the tokens before the last place from the window, whose text is ``text``; its end is the next place.

        What stays has been shown, but for a replacement character at the end, and tells only what decoding must know:
        that a word is not the first, and where an unfinished character starts.
        """
        place = len(self._window) - self._place
        self._window = self._window[self._place :]
        self._place = place
        self._shown += len(self._decode(self._window)) - len(text)

    def _is_skipped(self, token: int) -> bool:
        """Whether decoding leaves ``token`` out. A token that is a space only may have no text alone either."""
        return (
            self._skip
            and not self._decode([token])
            and self._tokenizer.decode([token], skip_special_tokens=False) != ""
        )

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip)


class _StopStrings:
    """Lets text through that is not, and cannot become, part of a stop string."""

    def __init__(self, strings: Sequence[str]) -> None:
        if "" in strings:
            raise UsageError("An empty stop string stops before anything is written.", "Leave it out.")
        self._strings = strings
        self._held = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(text that can be shown, the stop string that ``text`` completes or None)."""
        text = self._held + text
        found = [(at + len(string), at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if found:
            _, at, string = min(found)
            return text[:at], string
        longest = max((len(string) for string in self._strings), default=1)
        start = max(len(text) - longest + 1, 0)
        while not any(string.startswith(text[start:]) for string in self._strings) and start < len(text):
            start += 1
        self._held = text[start:]
        return text[:start], None

    def flush(self) -> str:
        held, self._held = self._held, ""
        return held


def _byte_tokens(tokenizer: Any) -> frozenset[int]:
    """The tokens of a byte-fallback vocabulary that stand for single bytes."""
    token_to_id = getattr(tokenizer, "token_to_id", lambda token: None)
    ids = (token_to_id(f"<0x{byte:02X}>") for byte in range(256))
    return frozenset(token for token in ids if token is not None)
