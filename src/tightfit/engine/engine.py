"""The engine: sequences in, tokens out, one step after the other."""

from __future__ import annotations

from collections import abc
from collections.abc import Iterator
from itertools import chain

import torch

from tightfit.budget.ledger import Workspace
from tightfit.engine.scheduler import Scheduler
from tightfit.engine.sequence import Sequence
from tightfit.kernels import cpu
from tightfit.kv.base import BaseCache
from tightfit.kv.reuse.prompts import PromptCache
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder
from tightfit.model.rope import dependence


class Engine:
    """Runs several sequences at once on one decoder, one cache and one workspace.

    Prompts are computed in chunks of ``chunk`` tokens, or if ``layered`` all chunks in one layer after the other.
    What ``prompts`` finds of them is not computed. ``last_prefill_tokens`` is how many prompt tokens the last step
    computed.
    """

    def __init__(
        self,
        decoder: Decoder,
        cache: BaseCache,
        ws: Workspace,
        context: int,
        chunk: int,
        threads: int,
        layered: bool = False,
        prompts: PromptCache | None = None,
    ) -> None:
        self.decoder = decoder
        self.cache = cache
        self.ws = ws
        self.context = context
        self.chunk = chunk
        self.threads = threads
        self.layered = layered
        self.prompts = prompts
        self.scheduler = Scheduler(cache.sequences, chunk, layered, self._recall)
        self.last_prefill_tokens = 0

    @torch.inference_mode()
    def step(self) -> list[tuple[Sequence, int]]:
        """Computes one batch; gives the sequences that got a token, and the token. Sequences that are done have left.

        A stop token is reported too, and is the last token of its sequence.
        """
        batch, sequences = self.scheduler.schedule()
        self.last_prefill_tokens = batch.size - batch.split.vector
        if not sequences:
            return []
        sampled = []
        with self.ws.frame():
            hidden = self.hidden(batch)
            logits = self.decoder.logits(hidden, self.ws)
            row = 0
            for segment, sequence in zip(batch.segments, sequences, strict=True):
                sequence.computed = segment.stop
                if segment.decode:
                    self.cache.commit(segment.slot, range(len(segment.tokens)), self.ws)
                elif self.prompts is not None and sequence.prefix is not None:
                    self.prompts.computed(segment.slot, sequence.prefix, segment.start, segment.stop)
                if segment.logits == "none":
                    continue
                token = sequence.sampler.sample(logits[row], sequence.tokens)
                row += 1
                sampled.append((sequence, token))
        for sequence, token in sampled:
            self._accept(sequence, token)
        return sampled

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Computes a batch; its prompt tokens are certain then. The normalised hidden states (n, hidden) of the rows
        for which logits are wanted, in scratch memory of the enclosing frame."""
        use_threads(batch, self.threads, self.cache.gemm_dtype)
        for segment, _, _ in batch.prefills:
            self.cache.begin(segment.slot, segment.start)
        if self.layered and batch.prefills:
            [segment] = batch.segments
            hidden = self.decoder.hidden_layered(segment, self.chunk, self.cache, self.ws)
        else:
            hidden = self.decoder.hidden(batch, self.cache, self.ws)
        for segment, _, _ in batch.prefills:
            self.cache.prefilled(segment.slot, segment.start, segment.stop)
        return hidden

    def _recall(self, sequence: Sequence) -> None:
        """Finds the beginning of a prompt of which nothing was computed yet."""
        if self.prompts is not None:
            # Frequencies of rotary embeddings may follow the length of the whole prompt.
            ropes = dict.fromkeys(layer.attention.rope for layer in self.decoder.spec.layers)
            kind = [dependence(rope, len(sequence.tokens)) for rope in ropes if rope is not None]
            sequence.prefix = self.prompts.prefix(sequence.tokens, repr(kind).encode())
            sequence.computed = sequence.reused = self.prompts.restore(sequence.slot, sequence.prefix)

    def _accept(self, sequence: Sequence, token: int) -> None:
        sequence.tokens.append(token)
        if token in sequence.stop_tokens:
            sequence.finish = "stop"
        elif sequence.new_tokens >= sequence.max_new_tokens or len(sequence.tokens) >= self.context:
            sequence.finish = "length"

    @torch.inference_mode()
    def follow(self, prompt: abc.Sequence[int], decoded: abc.Iterable[int]) -> Iterator[torch.Tensor]:
        """Rows of logits (vocab,) float32, after ``prompt`` and after each token of ``decoded``, which is asked for its
        next one when a row was taken: prompts are computed as they always are, what follows in decoding steps.

        The place of the first sequence must be free. A row lies in scratch memory until the next one is asked for.
        """
        count, at_once = len(prompt), len(prompt) if self.layered else self.chunk
        starts = range(0, count, at_once)
        chunks = (Segment(0, start, prompt[start : start + at_once], length=count) for start in starts)
        steps = (Segment(0, count + index, [token], decode=True) for index, token in enumerate(decoded))
        for segment in chain(chunks, steps):
            with self.ws.frame():
                hidden = self.hidden(Batch((segment,)))
                if segment.decode:
                    self.cache.commit(0, [0], self.ws)
                if segment.stop >= count:
                    yield self.decoder.logits(hidden, self.ws)[-1]

    @torch.inference_mode()
    def score(self, tokens: list[int], slot: int = 0) -> list[float]:
        """The natural logarithm of the probability of every token but the first, given those before it.

        Computed as prefill does, chunk by chunk; logits are made for a few tokens at a time, as many as the workspace
        has room for. ``slot`` must be free.
        """
        result: list[float] = []
        at_once = len(tokens) if self.layered else self.chunk
        for start in range(0, len(tokens), at_once):
            part = tokens[start : start + at_once]
            batch = Batch((Segment(slot, start, part, logits="all", length=len(tokens)),))
            with self.ws.frame():
                hidden = self.hidden(batch)
                following = torch.tensor(tokens[start + 1 : start + len(part) + 1])
                free = self.ws.arena.capacity - self.ws.top
                rows_at_once = max(1, min(SCORED_AT_ONCE, free // 2 // (4 * self.decoder.spec.vocab_size)))
                for wanted, rows in zip(following.split(rows_at_once), hidden.split(rows_at_once), strict=False):
                    with self.ws.frame():
                        logits = self.decoder.logits(rows[: len(wanted)], self.ws)
                        result += log_probabilities(logits, wanted)
        return result


SCORED_AT_ONCE = 16


def use_threads(batch: Batch, threads: int, gemm_dtype: torch.dtype) -> None:
    """Torch's threads serve prefill by torch's products only: elsewhere its operations are small, and waking and
    awaiting threads for each takes longer than the work (the kernels have a pool of their own)."""
    compiled = gemm_dtype == torch.bfloat16 and cpu.has_gemm()
    torch.set_num_threads(threads if batch.split.gemm and not compiled else 1)


def log_probabilities(logits_: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """log softmax of ``logits`` (n, vocab) at ``tokens`` (n,); logits are used as scratch."""
    chosen = logits_.gather(1, tokens[:, None])[:, 0]
    top = logits_.amax(dim=-1, keepdim=True)
    total = logits_.sub_(top).exp_().sum(dim=-1)
    result: list[float] = (chosen - top[:, 0] - total.log()).tolist()
    return result
