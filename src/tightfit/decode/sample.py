"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, in the order of transformers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tightfit.errors import TightfitError, UsageError

COLDEST = 1e-6  # logits divided by less overflow float32
LIKELY = 1024  # how many of the largest logits are looked at first for top-p; mostly enough


@dataclass(frozen=True)
class SamplingParams:
    """How the next token is chosen. The defaults are greedy decoding.

    ``temperature`` 0 is greedy. ``top_k`` 0, ``top_p`` 1, ``min_p`` 0 and ``repetition_penalty`` 1 change nothing.
    ``seed`` makes a text repeatable; without one every run differs. Raises UsageError for values outside their range.

    Top-k: Fan et al. 2018 (arXiv:1805.04833). Top-p: Holtzman et al. 2019 (arXiv:1904.09751). Min-p: Nguyen et al. 2024
    (arXiv:2407.01082). Repetition penalty: Keskar et al. 2019 (arXiv:1909.05858).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        checks = {
            "temperature": (
                self.temperature == 0 or COLDEST <= self.temperature < math.inf,
                f"0 for greedy decoding, or {COLDEST:g} or more; 0.7 is usual",
            ),
            "top_k": (isinstance(self.top_k, int) and self.top_k >= 0, "a whole number; 0 keeps all tokens"),
            "top_p": (0 <= self.top_p <= 1, "from 0 to 1; 1 keeps all tokens"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1; 0 keeps all tokens"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0; 1 changes nothing, 1.1 is usual"),
            "seed": (
                self.seed is None or isinstance(self.seed, int) and 0 <= self.seed < 1 << 64,
                "a whole number from 0 to 2^64 - 1",
            ),
        }
        for name, (valid, range_) in checks.items():
            if not valid:
                raise UsageError(f"{name} = {getattr(self, name)} is not possible.", f"Give {range_}.")


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
