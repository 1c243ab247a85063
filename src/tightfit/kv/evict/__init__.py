"""Methods that let go of tokens."""

from tightfit.kv.evict import (
    corm,
    duo,
    h2o,
    lighttransfer,
    locret,
    morphkv,
    razor,
    scissorhands,
    scope,
    snapkv,
    tim,
    tova,
    window,
)

__all__ = [
    "corm",
    "duo",
    "h2o",
    "lighttransfer",
    "locret",
    "morphkv",
    "razor",
    "scissorhands",
    "scope",
    "snapkv",
    "tim",
    "tova",
    "window",
]
