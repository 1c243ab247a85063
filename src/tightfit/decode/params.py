"""How tokens are to be chosen. Does not import torch: a wish is checked before anything heavy is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from tightfit.errors import UsageError

COLDEST = 1e-6  # logits divided by less overflow float32


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
                self.seed is None or (isinstance(self.seed, int) and 0 <= self.seed < 1 << 64),
                "a whole number from 0 to 2^64 - 1",
            ),
        }
        for name, (valid, range_) in checks.items():
            if not valid:
                raise UsageError(f"{name} = {getattr(self, name)} is not possible.", f"Give {range_}.")
