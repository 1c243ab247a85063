"""Finds what methods of the cache must know of a model, with a text."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations

import torch

from tightfit.engine.engine import Engine, use_threads
from tightfit.errors import BudgetError, UsageError
from tightfit.kv.cache import Cache
from tightfit.kv.share.kvsharer import KVSharer
from tightfit.kv.share.sharing import Sharing
from tightfit.model.batch import Batch, Segment
from tightfit.model.spec import AttentionSpec, LayerSpec

SAMPLE = 64  # tokens of a part of the text, each computed from the first position on
SAMPLES = 30


@torch.inference_mode()
def find_sharing(
    engine: Engine,
    name: str,
    method: KVSharer,
    tokens: list[int],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sharing:
    """Which layers share (KVSharer, https://arxiv.org/abs/2410.18517): keys and values of each layer are averaged over
    parts of the text, pairs of layers are tried from the largest Euclidean distance to the smallest, and the later one
    reads the earlier one's if final hidden states stay similar, until as many share as are wanted.

    Raises UsageError if the text is too short, or fewer layers can share; BudgetError if scratch memory is too small.
    """
    cache = engine.cache
    if not isinstance(cache, Cache) or cache.own != list(range(len(cache.layers))):
        raise UsageError(f"{name} was loaded with methods of the cache", "Load it without any, and look for them then.")
    layers, ws = engine.decoder.spec.layers, engine.ws
    length = min(SAMPLE, engine.context, *(layout.slots for layout in cache.layouts))
    samples = [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)][:SAMPLES]
    pairs = _pairs(layers)
    wanted = method.wanted(len(layers))
    if not samples:
        raise UsageError(
            f"the text has {len(tokens)} tokens", f"Give one of {length} or more: {SAMPLES * length} are used."
        )
    try:
        with ws.frame():
            originals = ws.empty(len(samples), length, engine.decoder.spec.hidden_size)
            means = [
                [ws.empty(layout.kv_heads, length, dim) for dim in (layout.key_dim, layout.value_dim)]
                for layout in cache.layouts
            ]
            for mean in (tensor for both in means for tensor in both):
                mean.zero_()
            for index, sample in enumerate(samples):
                _hidden(engine, sample, originals[index])
                for kept, both in zip(cache.layers, means, strict=True):
                    for mean, kind in zip(both, (kept.keys, kept.values), strict=True):
                        mean.add_(kind[0, :, :length], alpha=1 / len(samples))
            pairs.sort(key=lambda pair: -_distance(means[pair[0]], means[pair[1]]))
            found, similarity = list(cache.owners), 1.0
            shared, hidden = 0, ws.empty(length, engine.decoder.spec.hidden_size)
            for tried, (earlier, later) in enumerate(pairs):
                if shared == wanted:
                    break
                if found[later] == later:
                    # Layers that read the later one's read what that reads from now on.
                    cache.owners = [found[earlier] if owner == later else owner for owner in found]
                    reached = _similarity(engine, samples, originals, hidden)
                    if reached > method.threshold:
                        found, similarity, shared = cache.owners, reached, shared + 1
                progress(tried + 1, len(pairs))
    except BudgetError as error:
        raise BudgetError(
            f"{len(samples)} parts of a text do not fit into the scratch memory of chunks of {engine.chunk} tokens",
            "Give a larger --chunk, or more --memory.",
        ) from error
    finally:
        cache.owners = list(range(len(layers)))
        cache.begin(0, 0)
    if shared < wanted:
        raise UsageError(
            f"only {shared} layers of {name} can share above a cosine of {method.threshold:g}, {wanted} are wanted",
            "Ask for a smaller share, or a lower threshold.",
        )
    return Sharing(name, len(samples) * length, found, similarity)


def _pairs(layers: tuple[LayerSpec, ...]) -> list[tuple[int, int]]:
    """Pairs of layers, the earlier one first, of which one can read the other's keys and values."""
    kinds = [
        (each.kv_heads, each.key_dim, each.value_dim, each.rope, each.window)
        if isinstance(each, AttentionSpec)
        else None
        for each in (layer.attention for layer in layers)
    ]
    both = combinations(range(len(layers)), 2)
    return [(a, b) for a, b in both if kinds[a] is not None and kinds[a] == kinds[b]]


def _distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    """Between the mean keys and values (kv_heads, tokens, dim) of two layers: the mean over tokens."""
    return sum(float(torch.linalg.vector_norm(a - b, dim=-1).mean()) for a, b in zip(one, other, strict=True)) / 2


def _similarity(engine: Engine, samples: list[list[int]], originals: torch.Tensor, hidden: torch.Tensor) -> float:
    """The mean cosine of final hidden states with the original ones, each of a whole part of the text."""
    total = 0.0
    for sample, original in zip(samples, originals, strict=True):
        _hidden(engine, sample, hidden)
        total += float(torch.cosine_similarity(hidden.flatten(), original.flatten(), dim=0))
    return total / len(samples)


def _hidden(engine: Engine, tokens: list[int], out: torch.Tensor) -> None:
    """Final hidden states of a text (tokens, hidden), computed chunk by chunk."""
    for start in range(0, len(tokens), engine.chunk):
        part = tokens[start : start + engine.chunk]
        batch = Batch((Segment(0, start, part, logits="all", length=len(tokens)),))
        use_threads(batch, engine.threads, engine.cache.gemm_dtype)
        engine.cache.begin(0, start)
        with engine.ws.frame():
            out[start : start + len(part)] = engine.decoder.hidden(batch, engine.cache, engine.ws)
        engine.cache.prefilled(0, start, start + len(part))
