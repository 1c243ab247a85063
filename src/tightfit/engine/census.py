"""Counts which experts a text activates, as prompts are computed."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tightfit.engine.generate import Generator
from tightfit.errors import UsageError
from tightfit.experts.census import Census
from tightfit.model.spec import MoeSpec
from tightfit.weights.placement.base import Experts


def take_census(
    generator: Generator, name: str, tokens: list[int], progress: Callable[[int, int], None] = lambda done, total: None
) -> Census:
    """The census of ``tokens``, which are computed one context after the other. Raises UsageError for a model without
    experts."""
    engine = generator.engine
    experts = [found for index in range(len(engine.decoder.spec.layers)) if (found := _experts(generator, index))]
    if not experts:
        raise UsageError(f"{name} has no experts", "Only mixtures of experts have any to count.")
    try:
        for of_layer, count in experts:
            of_layer.activated = torch.zeros(count, dtype=torch.int64)
        for start in range(0, len(tokens), engine.context):
            generator.score(tokens[start : start + engine.context])
            progress(min(start + engine.context, len(tokens)), len(tokens))
        counts = [of_layer.activated for of_layer, _ in experts]
    finally:
        for of_layer, _ in experts:
            of_layer.activated = None
    shares = [(count / len(tokens)).tolist() for count in counts if count is not None]
    return Census(name, len(tokens), shares)


def _experts(generator: Generator, index: int) -> tuple[Experts, int] | None:
    """The experts of a layer, and how many there are."""
    decoder = generator.engine.decoder
    moe = decoder.spec.layers[index].mlp
    if not isinstance(moe, MoeSpec):
        return None
    with decoder.weights.layer(index) as parameters:
        assert parameters.experts is not None
        return parameters.experts, moe.experts
