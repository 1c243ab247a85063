"""One request: its tokens, its place in the cache, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field

from tightfit.decode.sample import Sampler
from tightfit.kv.reuse.prompts import Prefix


@dataclass
class Sequence:
    """``tokens`` is the prompt and what was generated; ``computed`` of them are in the cache, at ``slot``.

    ``finish`` is why it ended: ``stop`` (a stop token or string), ``length`` (as many tokens as were asked for, or a
    full context), or empty while it runs. ``reused`` tokens of the prompt were in a cache already; ``prefix`` is what
    the prompt cache knows it by.
    """

    tokens: list[int]
    prompt_length: int
    max_new_tokens: int
    stop_tokens: frozenset[int]
    sampler: Sampler
    slot: int = -1
    computed: int = 0
    reused: int = 0
    prefix: Prefix | None = None
    finish: str = ""
    counts: dict[int, int] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        """Whether only the newest token is not in the cache yet, and it was generated."""
        return self.new_tokens > 0 and self.computed == len(self.tokens) - 1
