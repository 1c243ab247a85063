"""A loaded model that is followed by hand, token by token, through its weights and its cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tightfit.api import Model
from tightfit.errors import UsageError
from tightfit.kernels.pages import PAGE, Pages
from tightfit.kv.cache import Cache
from tightfit.kv.paged import PagedCache


class Reader:
    """Takes texts through ``model``, one after the other: prompts under the plan's prefill schedule, what follows by
    decoding steps. So all tokens go through the plan's weights and its cache, as they do in a run. Each text begins
    with an empty cache."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def follow(self, prompt: Sequence[int], following: Sequence[int] = ()) -> Iterator[torch.Tensor]:
        """Rows of logits (vocab,) float32, the i-th of which predicts ``following[i]``: one after the prompt, one after
        each token that follows but the last. A row lies in scratch memory and is valid until the next one is asked for.

        Raises UsageError where these are more tokens than the context.
        """
        return self._rows(prompt, following[:-1], len(prompt) + len(following))

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """The ``count`` tokens that greedy decoding adds; an end token does not end it."""
        tokens: list[int] = []
        rows = self._rows(prompt, tokens, len(prompt) + count)  # reads what is added to `tokens`
        for _ in range(count):
            tokens.append(int(next(rows).argmax()))
        return tokens

    def _rows(self, prompt: Sequence[int], decoded: Sequence[int], total: int) -> Iterator[torch.Tensor]:
        engine = self.model.borrow_engine()
        if not 0 < len(prompt) <= total <= engine.context:
            raise UsageError(f"{total} tokens in a context of {engine.context}", "Load the model with a longer one.")
        return engine.follow(prompt, decoded)

    def kv_bytes(self) -> tuple[int, int]:
        """Of keys and values the bytes that are reserved, and the most that were resident."""
        account = self.model.receipt()["accounts"]["kv"]
        return account["reserved_bytes"], account["peak_bytes"]

    def read_bytes(self) -> int:
        """Bytes of keys and values, and of bounds of pages, that one more token would read, from memory or a file."""
        cache, total = self.model.borrow_engine().cache.stored, 0.0
        for layer in cache.own:
            readers = cache.owners.count(layer)
            if isinstance(cache, PagedCache):
                total += readers * _paged_bytes(cache, layer)
            else:
                assert isinstance(cache, Cache)
                kept = cache.layers[layer]
                token = (kept.keys.shape[3] + kept.values.shape[3]) * kept.keys.element_size()
                total += readers * kept.keys.shape[1] * min(cache.tokens[0], kept.keys.shape[2]) * token
        return int(total)


def _paged_bytes(cache: PagedCache, layer: int) -> float:
    """What one query of all heads reads of the first sequence in a layer. Of what a selector chooses among, tokens in
    few bits are chosen as often as others."""
    pages, selecting = cache.layers[layer], cache.store.selecting[layer]
    total = 0.0 if selecting is None else float(selecting.index_bytes(0))
    total += sum(_bytes_below(below) for each in cache.store.beside[layer] for below in each.stores)
    token = (pages.keys.shape[3] + pages.values.shape[3]) * pages.keys.element_size()
    code = pages.key_codec.page_bytes + pages.value_codec.page_bytes
    lists = [counts[0].tolist() for counts in (pages.lengths, pages.coded)]
    for length, coded, (among, read) in zip(*lists, cache.chosen(layer), strict=True):
        share, whole = read / max(among, 1), min(coded * PAGE, among)
        dense = (among - whole) * share + length - max(among, coded * PAGE)
        coded = (whole * share + coded * PAGE - whole) / PAGE
        total += coded * code + dense * token
    return total


def _bytes_below(pages: Pages) -> float:
    """What is read of a lower store."""
    token = (pages.keys.shape[3] + pages.values.shape[3]) * pages.keys.element_size()
    code = pages.key_codec.page_bytes + pages.value_codec.page_bytes
    coded = int(pages.coded[0].sum())
    return coded * code + (int(pages.lengths[0].sum()) - coded * PAGE) * token
