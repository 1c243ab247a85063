"""Gates that are learned tell heads that look far back from those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kernels.pages import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.evict.duo import Duo
from tightfit.kv.fitted import Known
from tightfit.kv.make import kv_nbytes

WORDS = 100


class Synthetic:
    """A model of two layers with two key-value heads each that are known, and its own network: head 1 of layer 0 looks
    at what came behind earlier occurrences of a token, the others at the last few tokens and at the first one."""

    layouts = (LayerLayout(2, 2 * WORDS + 400, 16, 400, heads=2),) * 2
    scorings = (Scoring(1.0),) * 2
    tokens = tuple(range(WORDS)) * 8

    def samples(self, length: int, count: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(WORDS, (4, min(length, 400)), generator=generator).tolist()

    def take_room(self, nbytes: int, what: str) -> None:
        assert 0 < nbytes < 1 << 30

    def network(self) -> Synthetic:
        return self

    def hidden(self, tokens: Tensor, attend: Any = None) -> Tensor:
        (words,) = tokens
        word, place = torch.eye(WORDS)[words], torch.eye(400)[: len(words)]
        before, behind = (torch.cat([x[:1] * 0, x[:-1]]) for x in (word, place))
        nowhere = torch.zeros_like(word)
        k = torch.cat([word, before, place], 1)
        far = torch.cat([nowhere, 12 * word, place * 0], 1)
        near, first = (torch.cat([nowhere, nowhere, 12 * x], 1) for x in (behind, place[:1].expand(len(words), -1)))
        v = torch.randn(WORDS, 16, generator=torch.Generator().manual_seed(0))[words]
        heads = [(near, far), (first, near)]
        out = []
        for layer, queries in enumerate(heads):
            q = torch.stack(queries, 1)[None]
            keys, values = (x[None, :, None].expand(-1, -1, 2, -1) for x in (k, v))
            out.append((attend or self.attention)(layer, q, keys, values))
        return torch.cat(out, 2).flatten(2)

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k)
        hidden = torch.ones(scores.shape[-2:]).triu(1).bool()
        return torch.einsum("bhnm,bmhd->bnhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def test_gates_stay_open_where_passkeys_are_found() -> None:
    model: Any = Synthetic()
    method = compose("duo(tokens=400,steps=25,retrieval=0.25)").streamer
    assert isinstance(method, Duo)
    found = method.fit(model, lambda done, total: None)
    gates = found.tensors["gates"]
    assert float(gates[0, 1]) > 0.8
    assert max(float(gates[0, 0]), float(gates[1].max())) < 0.1
    streams = method.streams(list(model.layouts), Known(tensors={"duo": found.tensors}))
    assert streams == [[True, False], [True, True]]


@pytest.mark.parametrize("retrieval", [0.25, 0.5])
def test_bytes_are_a_share_of_the_context_and_a_constant(retrieval: float) -> None:
    layouts = [LayerLayout(8, 128, 128, 0, heads=32)] * 4
    known = Known(tensors={"duo": {"gates": torch.rand(4, 8)}})
    lengths = [4096, 8192, 16384]
    short, long, longest = (kv_nbytes(f"duo(retrieval={retrieval})", layouts, n, 1, "bfloat16", known) for n in lengths)
    heads = round(32 * retrieval)
    numbers = 4 * (32 + heads) * 4096 // PAGE  # at most: places in the tables, and of free pages
    assert 0 <= long - short - heads * 4096 * 512 <= numbers
    assert longest - long == 2 * (long - short)


def test_settings_that_hide_nothing_are_refused() -> None:
    with pytest.raises(UsageError, match="duo cannot learn"):
        compose("duo(tokens=100)")
