"""The cache that a plan names."""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Arena
from tightfit.kv.base import BaseCache, LayerLayout
from tightfit.kv.cache import Cache
from tightfit.kv.compose import Composition, compose
from tightfit.kv.fitted import NOTHING, Known
from tightfit.kv.lowrank.features import Features
from tightfit.kv.paged import PagedCache

VIRTUAL = 1 << 38  # address space of an arena that is never written
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def make_cache(
    kv: str,
    layouts: list[LayerLayout],
    context: int,
    sequences: int,
    dtype: torch.dtype,
    arena: Arena,
    gemm_dtype: torch.dtype,
    chunk: int,
    known: Known = NOTHING,
) -> BaseCache:
    """The cache of the methods that ``kv`` names, for prompts of up to ``context`` tokens in chunks of ``chunk``;
    ``known`` is what they know of the model. Raises UsageError if the model cannot use one of them."""
    return cache_of(compose(kv), layouts, context, sequences, dtype, arena, gemm_dtype, chunk, known)


def cache_of(
    composition: Composition,
    layouts: list[LayerLayout],
    context: int,
    sequences: int,
    dtype: torch.dtype,
    arena: Arena,
    gemm_dtype: torch.dtype,
    chunk: int,
    known: Known = NOTHING,
    tail: int = 1,
) -> BaseCache:
    """:func:`make_cache` of a composition; ``tail`` tokens of each sequence may be tentative at once."""
    composition.check(layouts)
    projector = composition.projector
    if projector is not None:
        maps = projector.maps(layouts, known.of(projector))
        owners = range(len(layouts)) if known.owners is None else known.owners
        stored = [maps[owner].stored(layout) for owner, layout in zip(owners, layouts, strict=True)]
        rest = Composition(tuple(method for method in composition.methods if method is not projector))
        inner = cache_of(rest, stored, context, sequences, dtype, arena, gemm_dtype, chunk, known, tail)
        return Features(inner, layouts, maps, arena)
    if composition.exact:
        return Cache(layouts, sequences, dtype, arena, gemm_dtype, chunk, known.owners)
    return PagedCache(layouts, composition, context, sequences, dtype, arena, gemm_dtype, tail, known)


def kv_nbytes(
    kv: str, layouts: list[LayerLayout], context: int, sequences: int, dtype: str, known: Known = NOTHING
) -> int:
    """Bytes that such a cache takes, as its own allocation says."""
    arena = Arena(VIRTUAL)
    cache = make_cache(kv, layouts, context, sequences, TYPES[dtype], arena, torch.float32, 1, known)
    cache.close()
    return arena.used


def entry_nbytes(
    kv: str, layouts: list[LayerLayout], context: int, dtype: str, chunk: int, known: Known = NOTHING
) -> int:
    """The most bytes that what such a cache saves of a prompt takes at the end of a chunk."""
    cache = make_cache(kv, layouts, context, 1, TYPES[dtype], Arena(VIRTUAL), torch.float32, chunk, known)
    cache.close()
    return cache.largest_entry(chunk)
