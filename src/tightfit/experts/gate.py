"""The next layer's experts are guessed with its own router, and read ahead."""

from __future__ import annotations

from dataclasses import dataclass

from tightfit.catalog import technique
from tightfit.experts.policy import Predictor


@technique(
    seam="experts",
    name="gate",
    paper="https://arxiv.org/abs/2502.12224",
    exact=True,
    summary="reads the next layer's experts ahead, guessed by its router from this layer's input",
)
@dataclass(frozen=True)
class Gate(Predictor):
    """What a layer's router sees is much like what the next one will see, so the next router is asked now, and what it
    would choose is read while this layer computes (Fate; AdapMoE and EdgeMoE preload in the same place).

    It departs from Fate in that the cache is not biased towards the first layers, and that experts are read in the
    format in which they are used. :func:`tightfit.model.moe.moe` does it: the router belongs to the model.
    """
