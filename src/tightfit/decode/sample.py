"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from tightfit.decode.params import SamplingParams
from tightfit.errors import TightfitError

LIKELY = 1024  # how many of the largest logits are looked at first for top-p; mostly enough


class Sampler:
    """Chooses the tokens of one sequence. Each has its own random numbers, so batches do not change what is drawn.

    With ``logprobs``, ``logprob`` is the natural logarithm of the probability that the model itself, without penalty,
    temperature and cuts, gave to the last token.
    """

    def __init__(self, params: SamplingParams, logprobs: bool = False) -> None:
        self.params = params
        self.logprob: float | None = None
        self._logprobs = logprobs
        self._random = torch.Generator()
        if params.seed is None:
            self._random.seed()
        else:
            self._random.manual_seed(params.seed)
        self._seen: torch.Tensor | None = None  # (vocab,) bool: tokens that are penalised
        self._seen_length = 0

    def sample(self, logits: torch.Tensor, history: Sequence[int]) -> int:
        """The next token after ``history`` (prompt and output so far), given ``logits`` (vocab,) float32.

        ``logits`` may be overwritten. Between two calls ``history`` grows at its end. Of equal logits the lowest token
        wins when decoding greedily. One random number is used per token. Raises TightfitError where logits are not
        numbers.
        """
        original = logits.clone() if self._logprobs else logits
        if self.params.repetition_penalty != 1:
            self._penalise(logits, history)
        token = int(logits.argmax())
        top = float(logits[token])
        if not math.isfinite(top):
            raise TightfitError(
                f"The model computed logits that are not numbers (token {token}: {top}).",
                "Its weights may be damaged, or overflow in float16: download it again, or try another precision.",
            )
        if self.params.temperature > 0:
            token = self._draw(logits.sub_(top).div_(self.params.temperature))
        if self._logprobs:
            self.logprob = float(original[token] - original.logsumexp(0))
        return token

    def _penalise(self, logits: torch.Tensor, history: Sequence[int]) -> None:
        """Make tokens of ``history`` less likely: positive logits are divided, negative ones multiplied."""
        if self._seen is None:
            self._seen = torch.zeros(logits.numel(), dtype=torch.bool, device=logits.device)
        new = [token for token in history[self._seen_length :] if token < logits.numel()]
        self._seen[torch.tensor(new, dtype=torch.int64)] = True
        self._seen_length = len(history)
        penalty = self.params.repetition_penalty
        penalised = torch.where(logits < 0, logits * penalty, logits / penalty)
        torch.where(self._seen, penalised, logits, out=logits)

    def _draw(self, scores: torch.Tensor) -> int:
        """A token drawn from softmax(scores) after the cuts. ``scores`` (vocab,) have the maximum 0."""
        if self.params.top_k or self.params.top_p < 1:
            scores, tokens = self._most_likely(scores)
        else:
            tokens = None
        if self.params.min_p > 0:
            # p < min_p * p_max, where p_max belongs to the score 0
            scores.masked_fill_(scores < math.log(self.params.min_p), -math.inf)
        mass = _mass(scores)
        total = float(mass[-1])
        share = float(torch.rand((), generator=self._random, dtype=torch.float64)) * total
        # The first token whose cumulative mass exceeds the share has mass itself; rounding must not pass the last one.
        index = int(torch.searchsorted(mass, min(share, math.nextafter(total, 0)), right=True))
        return index if tokens is None else int(tokens[index])

    def _most_likely(self, scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(scores, tokens) that top-k, then top-p keep, the most likely first."""
        top_k, top_p = self.params.top_k, self.params.top_p
        if 0 < top_k < scores.numel():
            last = scores.topk(top_k).values[-1]
            tokens = (scores >= last).nonzero()[:, 0]  # all that are as likely as the last of the k
            scores, order = scores[tokens].sort(descending=True, stable=True)
            tokens = tokens[order]
            mass = _mass(scores)
            kept = _nucleus_size(mass, top_p, float(mass[-1]))
            return scores[:kept], tokens[:kept]
        total = float(_mass(scores)[-1])
        count = min(LIKELY, scores.numel())
        while True:  # the whole vocabulary is sorted only where the probabilities are nearly equal
            best, tokens = scores.topk(count)
            kept = _nucleus_size(_mass(best), top_p, total)
            if kept < count or count == scores.numel():
                return best[:kept], tokens[:kept]
            count = min(8 * count, scores.numel())


def _mass(scores: torch.Tensor) -> torch.Tensor:
    """Cumulative exp(scores). One thread adds in order, so the bits do not depend on the number of threads."""
    return scores.exp().cumsum(0, dtype=torch.float64)


def _nucleus_size(mass: torch.Tensor, top_p: float, total: float) -> int:
    """How many of the most likely tokens it takes to reach ``top_p`` of ``total``, at least one."""
    return min(int((mass < top_p * total).sum()) + 1, mass.numel())
