"""Text in, text out: prompts become sequences, sampled tokens become pieces of text that can be shown."""

from __future__ import annotations

import time
from collections import Counter, abc
from dataclasses import dataclass, field

from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.decode.sample import Sampler
from tightfit.decode.text import TextStream
from tightfit.engine.engine import Engine
from tightfit.engine.request import Request
from tightfit.engine.sequence import Sequence
from tightfit.errors import UsageError


@dataclass
class Completion:
    """What came of one prompt. ``finish`` is ``stop`` or ``length``; ``tokens`` are the new ones, a stop token
    included; ``reused_tokens`` of the prompt were in the cache already; ``dropped_messages`` of a conversation no
    longer fitted."""

    text: str = ""
    tokens: list[int] = field(default_factory=list)
    prompt_tokens: int = 0
    reused_tokens: int = 0
    dropped_messages: int = 0
    finish: str = ""


@dataclass
class Timing:
    """Sums over everything that was computed. A step with prompt tokens in it counts as prefill. Seconds, bytes of
    weights that came from the disk, and what was counted by the cache of experts and by the file of keys and values."""

    requests: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    prefill_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_tokens: int = 0
    decode_seconds: float = 0.0
    prefill_streamed: int = 0
    decode_streamed: int = 0
    prefill_experts: Counter[str] = field(default_factory=Counter)
    decode_experts: Counter[str] = field(default_factory=Counter)
    prefill_fetched: Counter[str] = field(default_factory=Counter)
    decode_fetched: Counter[str] = field(default_factory=Counter)
    first_token_seconds: float | None = None


@dataclass
class Kept:
    """A finished conversation's place in the cache: ``tokens`` of it are there."""

    slot: int
    tokens: list[int]


class Generator:
    """Runs requests on an engine. One conversation's keys and values can be kept for its next turn."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self.engine = engine
        self.tokenizer = tokenizer
        self.timing = Timing()
        self._kept: Kept | None = None
        self._busy = False
        self._closed = False

    def close(self) -> None:
        """Nothing can be generated any more."""
        self._closed = True

    def run(
        self, requests: list[Request], completions: list[Completion], conversation: bool = False
    ) -> abc.Generator[tuple[int, str], None, None]:
        """Yields (index of the request, text that can be shown now); fills ``completions``, one for each request.

        With ``conversation`` the only request's keys and values are kept at the end, and what the next such request has
        in common with it from the start is not computed again. Closing the iterator early ends the requests and gives
        their places back. Raises UsageError while an earlier iterator is neither exhausted nor closed, and after
        :meth:`close`.
        """
        self._check_idle()
        started = time.perf_counter()
        kept = self._take_kept()
        if kept is not None and not conversation:
            self.engine.scheduler.release(kept.slot)
            kept = None
        active = [
            _Active(index, self._sequence(request, kept), TextStream(self.tokenizer, request.stop))
            for index, request in enumerate(requests)
        ]
        for item in active:
            completions[item.index].prompt_tokens = item.sequence.prompt_length
            self.timing.requests += 1
            self.timing.prompt_tokens += item.sequence.prompt_length
            self.engine.scheduler.add(item.sequence)
        running = {id(item.sequence): item for item in active}
        self._busy = True
        try:
            while running:
                for sequence, token in self._step():
                    item = running[id(sequence)]
                    if self.timing.first_token_seconds is None:
                        self.timing.first_token_seconds = time.perf_counter() - started
                    completion = completions[item.index]
                    completion.tokens.append(token)
                    completion.reused_tokens = sequence.reused
                    text = "" if token in sequence.stop_tokens else item.text.push(token)
                    if item.text.stopped:
                        sequence.finish = "stop"
                    if sequence.finish:
                        text += item.text.finish()
                        completion.finish = sequence.finish
                        del running[id(sequence)]
                        self._end(sequence, conversation)
                    completion.text += text
                    if text:
                        yield item.index, text
        finally:
            self._busy = False
            for item in running.values():
                self.engine.scheduler.finish(item.sequence)

    def score(self, tokens: list[int]) -> list[float]:
        """See :meth:`Engine.score`; a conversation that was kept is forgotten."""
        return self.borrow().score(tokens)

    def borrow(self) -> Engine:
        """The engine, no place of its cache being used; a conversation that was kept is forgotten. Raises UsageError as
        :meth:`run` does."""
        self._check_idle()
        kept = self._take_kept()
        if kept is not None:
            self.engine.scheduler.release(kept.slot)
        return self.engine

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this model is closed", "Load it again.")

    def _check_idle(self) -> None:
        self._check_open()
        if self._busy:
            raise UsageError(
                "this model is still generating an earlier text",
                "Take all pieces of that stream, or close it. Several prompts are generated at once by giving a list.",
            )

    def _step(self) -> list[tuple[Sequence, int]]:
        self._check_open()
        weights, cache = self.engine.decoder.weights, self.engine.cache.stored
        counted, had = Counter(weights.expert_counts), Counter(cache.fetched._asdict())
        started, before = time.perf_counter(), weights.used_bytes
        sampled = self.engine.step()
        seconds, streamed = time.perf_counter() - started, weights.used_bytes - before
        experts, fetched = weights.expert_counts - counted, Counter(cache.fetched._asdict()) - had
        timing = self.timing
        timing.new_tokens += len(sampled)
        prefilled = self.engine.last_prefill_tokens
        if prefilled:
            timing.prefill_tokens += prefilled
            timing.prefill_seconds += seconds
            timing.prefill_streamed += streamed
            timing.prefill_experts += experts
            timing.prefill_fetched += fetched
        else:
            timing.decode_tokens += len(sampled)
            timing.decode_seconds += seconds
            timing.decode_streamed += streamed
            timing.decode_experts += experts
            timing.decode_fetched += fetched
        return sampled

    def _sequence(self, request: Request, kept: Kept | None) -> Sequence:
        sequence = Sequence(
            tokens=list(request.tokens),
            prompt_length=len(request.tokens),
            max_new_tokens=request.max_new_tokens,
            stop_tokens=request.stop_tokens,
            sampler=Sampler(request.sampling),
        )
        if kept is not None:
            common = 0
            for old, new in zip(kept.tokens, request.tokens[:-1], strict=False):
                if old != new:
                    break
                common += 1
            sequence.slot = kept.slot
            sequence.computed = sequence.reused = self.engine.cache.reusable(kept.slot, common)
        return sequence

    def _end(self, sequence: Sequence, conversation: bool) -> None:
        self.engine.scheduler.finish(sequence, keep_slot=conversation)
        if conversation:
            self._kept = Kept(sequence.slot, sequence.tokens[: sequence.computed])

    def _take_kept(self) -> Kept | None:
        kept, self._kept = self._kept, None
        return kept


@dataclass
class _Active:
    index: int
    sequence: Sequence
    text: TextStream
