"""What a2ats is for; each of these tests fails with another selector in its place."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from tests.kv.driver import Layer
from tests.kv.test_methods import DIM, GROUPS, HEADS, KV_HEADS, LAYOUT, VALUES

from tightfit.errors import UsageError
from tightfit.kernels import cpu
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import PAGE
from tightfit.kernels.pages import Looking, Rows
from tightfit.kv.base import Turn
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known, Sample
from tightfit.kv.select.a2ats import A2ATS, turned
from tightfit.kv.select.by_codes import ByCodes

PROMPT = 400
ANGLES = 10000.0 ** -(torch.arange(DIM // 2) / (DIM // 2))


@dataclass
class Text:
    """A model of one layer whose keys are of few kinds, and whose queries look along some channels more than others."""

    seed: int = 0
    name: str = "text"
    layouts: list[object] = field(default_factory=lambda: [LAYOUT])

    def draw(self, count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Queries, keys and values before they are turned."""
        kinds = 2 * torch.randn(24, KV_HEADS, DIM, generator=torch.Generator().manual_seed(self.seed))
        drawn = torch.Generator().manual_seed(seed)
        k = kinds[torch.randint(24, (count,), generator=drawn)]
        k = k + 0.3 * torch.randn(count, KV_HEADS, DIM, generator=drawn)
        gain = torch.where(torch.arange(DIM) % 4 == 3, 2.0, 0.3)
        k[..., 1::4] += 6 * torch.randn(count, KV_HEADS, DIM // 4, generator=drawn)  # what no query looks at
        gain[1::4] = 0.02
        q = torch.randn(count, HEADS, DIM, generator=drawn) * gain
        return q, k, torch.randn(count, KV_HEADS, VALUES, generator=drawn)

    def samples(self, length: int, count: int) -> list[list[int]]:
        return [[0] * length] * 4

    def take_room(self, nbytes: int, what: str) -> None:
        assert nbytes > 0

    def layers(self, samples: list[list[int]]):  # type: ignore[no-untyped-def]
        angles = torch.arange(len(samples[0])).view(-1, 1) * ANGLES
        turn = Turn((angles.cos(), angles.sin()), False)
        yield [Sample(*self.draw(len(one), 100 + number), turn) for number, one in enumerate(samples)]


def turned_by_place(x: torch.Tensor, start: int = 0) -> torch.Tensor:
    return torch.cat([turned(x[i : i + 1], ANGLES, False, start + i) for i in range(len(x))])


def fitted(kv: str) -> Known:
    (method,) = (method for method in compose(kv).methods if isinstance(method, A2ATS))
    return Known(tensors={"a2ats": method.fit(Text(), lambda done, total: None).tensors})  # type: ignore[arg-type]


def layer_of(kv: str, start: int = 0) -> tuple[Layer, torch.Tensor]:
    """A layer that has read a prompt; and keys as they were turned."""
    layer = Layer(kv, LAYOUT, known=fitted(kv) if "a2ats" in kv else Known())
    q, k, v = Text().draw(PROMPT, 7)
    k = turned_by_place(k)
    layer.add(turned_by_place(q), k, v)
    return layer, k


def recall(layer: Layer, k: torch.Tensor, among: range) -> float:
    """Which share of the tokens that queries of a group give most is read of those ``among`` which is chosen."""
    found, wanted = 0, 0
    selecting = layer.cache.store.selecting[0]
    assert selecting is not None
    for seed in range(12):
        q = turned_by_place(Text().draw(1, 1000 + seed)[0], layer.start)
        with layer.ws.frame():
            rows = Rows(torch.tensor([[0, layer.start]], dtype=torch.int32))
            looking = selecting.look(rows, Looking(q), layer.ws, Scoring(DIM**-0.5))
            for head in range(KV_HEADS):
                if looking.listed is None:
                    pages = looking.chosen[0, head]  # type: ignore[index]
                    read = {int(page) * PAGE + i for page in pages if page >= 0 for i in range(PAGE)}
                else:
                    read = set(looking.listed[0, head].tolist())
                scores = q[0, head * GROUPS : (head + 1) * GROUPS] @ k[among.start : among.stop, head].T / DIM**0.5
                best = scores.softmax(-1).amax(0).topk(24).indices + among.start
                found += len(set(best.tolist()) & read)
                wanted += len(best)
    return found / wanted


def test_codes_find_more_of_what_matters_than_bounds_of_pages_of_as_many_bytes() -> None:
    """Codes take 4 bytes for each token here, bounds 2 * DIM / PAGE numbers of 4."""
    assert 2 * DIM / PAGE * 4 >= 4
    among = range(8, 320)
    by_codes = recall(*layer_of("a2ats(tokens=96,full=0,codes=64,distance=40,window=64,sinks=8)"), among)
    by_bounds = recall(*layer_of("quest(tokens=96,full=0)"), among)
    assert by_codes > 0.6
    assert by_codes > by_bounds + 0.2


def test_codes_do_not_depend_on_where_a_token_stands() -> None:
    """Keys are turned back before they are coded, so that a code is what a token is, and not where."""
    kv = "a2ats(tokens=96,full=0,codes=64,distance=40,window=0,sinks=0)"
    layer, _ = layer_of(kv)
    state = layer.cache.store.selecting[0]
    assert isinstance(state, ByCodes)
    _, k, _ = Text().draw(PROMPT, 7)
    book, metric = state.book, state.metric
    for head in range(KV_HEADS):
        apart = torch.cdist(k[:, head] @ metric[head], book[head] @ metric[head])
        same = (apart.argmin(1).int() == state.assigned[0, head, :PROMPT]).float().mean()
        assert same > 0.99  # two may be as near


def test_distances_are_weighed_by_what_queries_look_at() -> None:
    """A quarter of the channels varies most, and no query looks at it: codes do not tell it."""
    known = fitted("a2ats(codes=64,distance=0)").tensors["a2ats"]
    _, k, _ = Text().draw(600, 50)
    for head in range(KV_HEADS):
        metric, book = known["metric.0"][head], known["codebook.0"][head]
        nearest = book[torch.cdist(k[:, head] @ metric, book @ metric).argmin(1)]
        left = (k[:, head] - nearest).square().mean(0) / k[:, head].var(0)
        assert left[3::4].mean() < 0.3
        assert left[1::4].mean() > 0.6


def test_the_window_and_the_sinks_are_always_read() -> None:
    layer, _ = layer_of("a2ats(tokens=32,full=0,codes=64,distance=40,window=64,sinks=8)")
    selecting = layer.cache.store.selecting[0]
    assert isinstance(selecting, ByCodes)
    assert selecting.among(0) == [PROMPT - 64] * KV_HEADS
    rows, q = Rows(torch.tensor([[0, PROMPT]], dtype=torch.int32)), torch.randn(1, HEADS, DIM)
    with layer.ws.frame():
        looking = selecting.look(rows, Looking(q), layer.ws, Scoring(DIM**-0.5))
        assert looking.since is not None
        assert looking.listed is not None
        assert looking.since.tolist() == [[PROMPT - 64] * KV_HEADS]
        assert all(set(range(8)) <= set(of_head.tolist()) for of_head in looking.listed[0])


@pytest.mark.parametrize("level", cpu.supported())
def test_a_prompt_of_window_and_sinks_alone_is_read_whole(level: str) -> None:
    chosen, q = cpu.features()["chosen"], Text().draw(1, 5)
    kv = "a2ats(tokens=32,full=0,codes=64,distance=40,window=64,sinks=8)"
    try:
        cpu.use(level)
        outs = []
        for each in (kv, "h2o(keep=512)"):
            layer = Layer(each, LAYOUT, known=fitted(kv))
            layer.add(*Text().draw(70, 7))
            outs.append(layer.add(*q, decode=True))
    finally:
        cpu.use(chosen)
    torch.testing.assert_close(*outs)


def test_keys_that_stand_elsewhere_than_in_the_text_are_refused() -> None:
    with pytest.raises(UsageError, match="a2ats does not go with"):
        compose("a2ats+tim(positions=reused)")


def test_queries_look_as_if_all_tokens_were_as_far_away() -> None:
    """Scores of codes are those of the same keys at the distance, wherever the query stands."""
    layer, _ = layer_of("a2ats(tokens=32,full=0,codes=64,distance=40)")
    state = layer.cache.store.selecting[0]
    assert isinstance(state, ByCodes)
    q = Text().draw(1, 5)[0]
    for place in (PROMPT, PROMPT + 17):
        rows = Rows(torch.tensor([[0, place]], dtype=torch.int32))
        with layer.ws.frame():
            asked = state.asked(rows, turned(q, ANGLES, False, place), layer.ws)
            torch.testing.assert_close(asked, turned(q, ANGLES, False, 40), rtol=1e-3, atol=1e-3)


def test_settings_that_mean_nothing_are_refused() -> None:
    for kv in ("a2ats(codes=1)", "a2ats(distance=-1)", "a2ats(tokens=32,sinks=32)"):
        with pytest.raises(UsageError, match="a2ats"):
            compose(kv)
