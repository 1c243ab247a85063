"""What a configuration costs, counted in ways that may contradict each other: bytes, operations, parameters (after "The
Efficiency Misnomer", https://arxiv.org/abs/2110.12894). Seconds are measured beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tightfit.kv.cache import Cache
from tightfit.kv.paged import PagedCache
from tightfit.plan.operations import active, operations_per_token
from tightfit.weights.placement.places import EMBEDDINGS, LAYER, groups

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tightfit.checkpoints.checkpoint import Checkpoint
    from tightfit.kv.base import BaseCache
    from tightfit.lab.reader import Reader
    from tightfit.model.spec import ModelSpec


def indicators(reader: Reader, spec: ModelSpec) -> dict[str, float]:
    """Of the sequence that ``reader`` followed last, for the token that would come next.

    ``weights_bytes`` in memory, experts included; ``kv_bytes`` reserved, and ``kv_resident_bytes`` of them that were
    touched; ``read_bytes_per_token``: of weights, from memory or the disk, and of keys and values;
    ``operations_per_token`` (see :mod:`tightfit.plan.operations`); ``parameters`` of the model.
    """
    model = reader.model
    kv_bytes, kv_resident = reader.kv_bytes()
    formats = [layer.format for layer in model.plan.layers]
    read = weight_bytes_per_token(model.checkpoint, spec, model.plan.outer.format, formats) + reader.read_bytes()
    return {
        "weights_bytes": model.plan.weights_bytes,
        "kv_bytes": kv_bytes,
        "kv_resident_bytes": kv_resident,
        "read_bytes_per_token": read,
        "operations_per_token": operations_per_token(spec, attended(model.borrow_engine().cache)),
        "parameters": spec.parameter_count,
    }


def weight_bytes_per_token(checkpoint: Checkpoint, spec: ModelSpec, outer: str, formats: Sequence[str]) -> int:
    """Bytes of weights that a decoding step of one sequence reads, wherever they lie: one row of the embeddings, unless
    they are the head too, of a mixture the experts that are chosen, and all the others. ``outer`` is the format of the
    embeddings and the head, ``formats`` are those of the layers."""
    total, layers = 0, iter(spec.layers)
    for group in groups(checkpoint, spec, outer, dict(enumerate(formats))):
        layer = next(layers) if group.name.startswith(LAYER) else None
        for place in group.places:
            if layer is not None:
                total += active(layer, place.param) * place.nbytes
            elif group.name == EMBEDDINGS and not spec.tied:
                total += place.nbytes // place.param.shape[0]
            else:
                total += place.nbytes
    return total


def attended(cache: BaseCache, slot: int = 0) -> list[float]:
    """How many tokens the next query of a sequence sees in each layer, on average over the heads."""
    cache = cache.stored
    assert isinstance(cache, Cache | PagedCache)
    windows = [layout.window for layout in cache.layouts]
    if isinstance(cache, Cache):
        found = [float(cache.tokens[slot])] * len(windows)
    else:
        found = [_in_pages(cache, layer, slot) for layer in range(len(windows))]
    return [tokens if window is None else min(tokens, window) for tokens, window in zip(found, windows, strict=True)]


def _in_pages(cache: PagedCache, layer: int, slot: int) -> float:
    pages = cache.layers[layer]
    lengths: list[int] = pages.lengths[slot].tolist()
    hidden = sum(among - read for among, read in cache.chosen(layer, slot))
    return (sum(lengths) - hidden) / len(lengths)
