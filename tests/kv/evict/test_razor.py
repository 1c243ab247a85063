"""Retrieval heads are those that repetition shows, and what others let go of counts as its mean does, as often."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from tests.parity.harness import ROOM

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.evict.razor import Razor
from tightfit.kv.fitted import Known, Sample
from tightfit.kv.make import kv_nbytes
from tightfit.kv.paged import PagedCache
from tightfit.model.batch import Batch, Segment

KV_HEADS, GROUPS, DIM, VALUES = 2, 2, 16, 12
LAYOUT = LayerLayout(KV_HEADS, DIM, VALUES, 512, heads=KV_HEADS * GROUPS)


def known(streams: list[list[bool]]) -> Known:
    """Of each layer the heads that stream, as if they had been found."""
    scores = 1.0 - torch.tensor(streams).float()
    return Known(tensors={"razor": {"echo": scores, "induction": scores}})


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Of queries (n, groups, dim) over all keys (m, dim) and values (m, value_dim) of a head."""
    return (q @ k.T * DIM**-0.5).softmax(-1) @ v


def test_a_compensation_token_is_as_many_copies_of_the_mean() -> None:
    """Head 0 keeps everything; head 1 sees its sinks, its window, and n times the mean of the n others."""
    sinks, recent, count = 2, 10, 90
    kv = compose(f"razor(sinks={sinks},recent={recent},echo=0,induction=0.5)")
    cache = PagedCache([LAYOUT], kv, 128, 1, torch.float32, Arena(ROOM), known=known([[False, True]]))
    ws, start = Workspace(Arena(ROOM)), 0
    q, k, v = (torch.randn(count + 1, heads, dim) for heads, dim in ((4, DIM), (2, DIM), (2, VALUES)))
    out = torch.empty(1, 4, VALUES)
    for size in (50, 40, 1):  # two chunks and a token that decodes
        one = slice(start, start + size)
        out = torch.empty(size, 4, VALUES)
        batch = Batch((Segment(0, start, [0] * size, decode=size == 1),))
        if size > 1:
            cache.begin(0, start)
        with ws.frame():
            held = cache.update(0, batch, q[one].clone(), k[one].clone(), v[one], None, ws)
            cache.attend_step(0, batch, held, q[one].clone(), out, ws, Scoring(DIM**-0.5))
        if size > 1:
            cache.prefilled(0, start, start + size)
        start += size
    expected = attention(q[-1:, :2], k[:, 0], v[:, 0])
    torch.testing.assert_close(out[:, :2], expected)
    gone, here = slice(sinks, count - recent), [*range(sinks), *range(count - recent, count + 1)]
    copies = count - recent - sinks
    keys = torch.cat([k[here, 1], k[gone, 1].mean(0).expand(copies, -1)])
    values = torch.cat([v[here, 1], v[gone, 1].mean(0).expand(copies, -1)])
    torch.testing.assert_close(out[:, 2:], attention(q[-1:, 2:], keys, values), rtol=1e-4, atol=1e-5)


WORDS = 400  # so many that a random one seldom comes twice


class Synthetic:
    """A model of one layer with four key-value heads that are known: one looks at earlier occurrences of a token, one
    at what came behind them, one at the token before, and one at everything alike. Words are one-hot vectors."""

    def __init__(self) -> None:
        self.layouts = [LayerLayout(4, 2 * WORDS + 256, 8, 256, heads=4)]
        self.scorings = [Scoring(1.0)]
        self.tokens = list(range(WORDS))

    def samples(self, length: int, count: int) -> list[list[int]]:
        return [self.tokens[: min(length, 256)]] * count

    def layers(self, samples: Sequence[Sequence[int]]) -> Iterator[list[Sample]]:
        (tokens,) = samples
        word = torch.eye(WORDS)[torch.tensor(tokens)]
        before = torch.cat([torch.zeros(1, WORDS), word[:-1]])
        place = torch.eye(256)[: len(tokens)]
        nothing, nowhere = torch.zeros_like(word), torch.zeros_like(place)
        k = torch.cat([word, before, place], 1)
        behind = torch.cat([place[:1], place[:-1]])
        q = [
            torch.cat([9 * word, nothing, nowhere], 1),
            torch.cat([nothing, 9 * word, nowhere], 1),
            torch.cat([nothing, nothing, 9 * behind], 1),
            torch.zeros_like(k),
        ]
        yield [Sample(torch.stack(q, 1), k[:, None].expand(-1, 4, -1), torch.zeros(len(tokens), 4, 8), None)]


def test_heads_that_repeat_are_found() -> None:
    model: Any = Synthetic()
    method = compose("razor(echo=0.25,induction=0.25,tokens=64)").streamer
    assert isinstance(method, Razor)
    found = method.fit(model, lambda done, total: None)
    echo, induction = found.tensors["echo"][0], found.tensors["induction"][0]
    assert int(echo.argmax()) == 0
    assert float(echo[0]) > 0.4  # the others are the query's own token
    assert int(induction.argmax()) == 1
    assert float(induction[1]) > 0.9
    assert float(echo[2:].max()) < 0.1 > float(induction[2:].max())
    assert method.streams(model.layouts, Known(tensors={"razor": found.tensors})) == [[False, False, True, True]]


@pytest.mark.parametrize("more", ["", "+int4(recent=0)"])
def test_bytes_are_those_of_retrieval_heads_and_a_constant(more: str) -> None:
    layouts = [LayerLayout(8, 128, 128, 0, heads=32)] * 4
    streams = [[head >= layer for head in range(8)] for layer in range(4)]  # 6 of 32 retrieve
    kv = f"razor(echo=0,induction={6 / 32}){more}"
    short, long, longest = (kv_nbytes(kv, layouts, n, 1, "bfloat16", known(streams)) for n in (4096, 8192, 16384))
    page = 32 * 256 * 2 if not more else 2 * 32 * 128 // 2 + 2 * (128 * 2 + 32 * 4 * 2)  # codes, scales, minima
    pages = 4096 // PAGE
    numbers = 4 * pages * (24 + 6)  # places in the tables of layers that have such heads, and of free pages
    assert long - short == pages * 6 * page + numbers
    assert longest - long == 2 * (long - short)
