"""What rounding costs: KL divergence from the exact model, in nats per token, by where and how numbers are rounded.

Divergences of parts are taken to add up. They are measured for a model once (`tightfit sensitivity`) and kept as JSON
in the user's cache folder under its fingerprint; until then :func:`prior` stands in.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tightfit.budget.machine import cache_folder, remember
from tightfit.catalog import parse_one, spec_string
from tightfit.kv.compose import compose
from tightfit.plan.schema import OWN, Plan

OUTER, LAYER = "outer", "layers."  # of the embeddings and the head, which have one format, and of each layer
VERSION = 1

# Of the embedded model, all matrices stored alike (benchmarks/results/formats.md).
WHOLE = {
    "f32": 0.0,
    "bf16": 0.0,
    "f16": 0.0,
    "fp8": 0.00025,
    "int8": 0.00047,
    "llm_int8": 0.0006,
    "int6": 0.00235,
    "int5": 0.00907,
    "nf4": 0.0302,
    "int4": 0.0358,
    "fp4": 0.0408,
    "int4(group=64)": 0.0469,
    "int4(group=128)": 0.0544,
    "int3": 0.142,
    "int2": 0.859,
    "ternary": 2.03,
}
OF_OUTER = 0.3  # the share of these that is lost outside of the layers
OF_FIRST, OF_LAST = 4.0, 2.0  # what the first and the last layer lose, by what each other layer does
# Of caches, after 1000 to 3900 tokens (benchmarks/results/kv-nano.md): of few bits, and where 512 tokens are kept.
OF_CACHE = {"int8": 0.0001, "int4": 0.0015, "int2": 0.07, "think": 0.015}
OF_KEEPING = 0.08
KEPT = 512


@dataclass(frozen=True)
class Sensitivity:
    """``weights[group][format]`` in nats per token, of ``outer`` and of each layer by its name; ``cache[methods]``.

    ``measured`` tells whether a text was run through this model, of ``tokens`` tokens.
    """

    weights: Mapping[str, Mapping[str, float]]
    cache: Mapping[str, float]
    measured: bool
    tokens: int = 0

    def of(self, group: str, fmt: str) -> float | None:
        """What a group costs that is stored as ``fmt``; None where nothing is known of that."""
        return 0.0 if fmt == OWN else self.weights[group].get(fmt)

    def of_cache(self, kv: str, tokens: int) -> float | None:
        """What the methods ``kv`` cost after ``tokens`` tokens."""
        return self.cache[kv] if kv in self.cache else cache_prior(kv, tokens)

    def of_plan(self, plan: Plan) -> float | None:
        """The sum over a plan, None where a part of it is not known."""
        known, parts = self.known_of_plan(plan), 2 + len(plan.layers)
        return sum(known) if len(known) == parts else None

    def known_of_plan(self, plan: Plan) -> list[float]:
        """The parts of the sum that are known."""
        parts = [self.of(OUTER, plan.outer.format), self.of_cache(plan.cache, reference_prompt(plan.context))]
        parts += [self.of(layer_group(index), layer.format) for index, layer in enumerate(plan.layers)]
        return [part for part in parts if part is not None]


def layer_group(index: int) -> str:
    return f"{LAYER}{index}"


def reference_prompt(context: int) -> int:
    """Tokens of the prompt that plans are compared with: three quarters of the context, at most 2048."""
    return max(min(context * 3 // 4, 2048), 1)


def prior(layers: int) -> Sensitivity:
    """What is assumed of a model with so many layers that was not measured.

    As much as the embedded model loses, which is small and loses more than most larger ones do in the same format: 0.3
    of it outside of the layers, the rest spread over them, the first counted four times and the last twice (of the
    embedded model ten and four times).
    """
    shares = [OF_FIRST if index == 0 else OF_LAST if index == layers - 1 else 1.0 for index in range(layers)]
    inner = (1 - OF_OUTER) / sum(shares)
    of_groups = {OUTER: OF_OUTER} | {layer_group(index): share * inner for index, share in enumerate(shares)}
    weights = {group: {fmt: share * nats for fmt, nats in WHOLE.items()} for group, share in of_groups.items()}
    return Sensitivity(weights, {}, measured=False)


def cache_prior(kv: str, tokens: int) -> float | None:
    """What methods of the cache are assumed to cost after ``tokens`` tokens. None for methods nothing is known of.

    What is let go of costs by the share of the tokens that it is, and twice as much where a quarter as much is kept.
    """
    composition = compose(kv)
    total = 0.0
    for method in composition.methods:
        keep = getattr(method, "keep", None)
        if isinstance(keep, (int, float)):
            kept = keep if keep >= 1 else keep * tokens
            total += OF_KEEPING * max(1 - kept / tokens, 0.0) * math.sqrt(KEPT / kept)
        elif method.name in OF_CACHE:
            total += OF_CACHE[method.name]
        elif method.name != "host":
            return None
    return total


def sensitivity_file(fingerprint: str) -> Path:
    return cache_folder() / f"sensitivity-{fingerprint[:32]}.json"


def read_sensitivity(fingerprint: str, layers: int) -> Sensitivity:
    """What was measured of a model, completed by the prior; the prior where nothing was, or what is kept cannot be
    read or is not of this model's layers."""
    assumed = prior(layers)
    try:
        content = json.loads(sensitivity_file(fingerprint).read_text(encoding="utf-8"))
        if content["version"] != VERSION:
            return assumed
        weights = {group: _numbers(content["weights"][group]) for group in assumed.weights}
        return Sensitivity(
            {group: _completed(found, assumed.weights[group]) for group, found in weights.items()},
            _numbers(content["cache"]),
            measured=True,
            tokens=int(content["tokens"]),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return assumed


def write_sensitivity(fingerprint: str, found: Sensitivity) -> Path:
    """Keeps what was measured, whole or not at all; gives the file. Raises FileError."""
    content = {"version": VERSION, "tokens": found.tokens, "weights": found.weights, "cache": found.cache}
    return remember(sensitivity_file(fingerprint), json.dumps(content))


def _numbers(values: Any) -> dict[str, float]:
    """Raises ValueError for what is no divergence."""
    found = {str(name): float(value) for name, value in values.items()}
    if not all(value >= 0 and math.isfinite(value) for value in found.values()):
        raise ValueError("a divergence is a number that is not negative")
    return found


def _completed(found: dict[str, float], assumed: Mapping[str, float]) -> dict[str, float]:
    """What was not measured of a group is what is assumed of it, times how much more the measured formats lose."""
    both = [(nats, assumed[fmt]) for fmt, nats in found.items() if assumed.get(fmt)]
    expected = sum(other for _, other in both)
    ratio = sum(nats for nats, _ in both) / expected if expected else 1.0
    return {fmt: nats * ratio for fmt, nats in assumed.items()} | found


def canonical(fmt: str) -> str:
    """The spec string of a weight format, as keys have it."""
    return fmt if fmt == OWN else spec_string(parse_one("weights", fmt))
