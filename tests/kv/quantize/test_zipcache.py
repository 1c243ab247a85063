"""Salient tokens, found by a few probes, have more bits than the others, with few numbers beside the codes."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer

from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kernels.pages_reference import decode, encode
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.method import Coder, Seen

HEADS, GROUPS, DIM, COUNT = 2, 2, 64, 512
LAYOUT = LayerLayout(HEADS, DIM, DIM, 0, heads=HEADS * GROUPS)
SALIENT = 96  # one in so many tokens that most queries look at


def tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values; and which tokens (kv_heads, SALIENT) lie where queries look. Channels of keys and of
    values differ in size, those of keys in their middle too."""
    torch.manual_seed(1)
    q, k = torch.randn(COUNT, HEADS * GROUPS, DIM), torch.randn(COUNT, HEADS, DIM)
    salient = torch.stack([torch.randperm(COUNT)[:SALIENT].sort().values for _ in range(HEADS)])
    for head, places in enumerate(salient):
        k[places, head, :4] += 4.0
    q[..., :4] += 2.0
    sizes = torch.logspace(-0.5, 0.5, DIM)
    k, q = k * sizes + torch.randn(DIM), q / sizes
    return q, k, torch.randn(COUNT, HEADS, DIM) * sizes.flip(0), salient


def prefilled(kv: str) -> Layer:
    layer = Layer(kv, LAYOUT, COUNT + 64)
    q, k, v, _ = tokens()
    layer.add(q, k, v)
    return layer


def attention_of_all() -> torch.Tensor:
    """(kv_heads, tokens): the mean of what all queries give to each token that they can see."""
    q, k, _, _ = tokens()
    keys = k.repeat_interleave(GROUPS, 1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) / DIM**0.5
    weights = scores.masked_fill(torch.ones(COUNT, COUNT).triu(1).bool(), -torch.inf).softmax(-1)
    return weights.sum(1).view(HEADS, GROUPS, COUNT).sum(1) / torch.arange(COUNT, 0, -1)


def agreement(kv: str) -> float:
    """Of what full attention finds salient, the share that is kept above; of tokens that no method protects."""
    layer, judged = prefilled(kv), COUNT - 64
    best = attention_of_all()[:, :judged].topk(SALIENT).indices
    shares = []
    for head in range(HEADS):
        above = torch.tensor(layer.positions(head))
        shares.append(torch.isin(best[head], above).float().mean())
    return float(torch.stack(shares).mean())


def test_what_probes_find_salient_is_what_all_queries_find() -> None:
    keep = SALIENT + 64
    assert agreement(f"zipcache(keep={keep},recent=64,window=64)") > 0.8
    assert agreement(f"window(keep={keep},positions=original)") < 0.4


def test_tokens_that_fewer_probes_can_see_are_not_judged_by_how_few_they_are() -> None:
    """Queries that look alike at all tokens: none is salient."""
    probes, count = 64, 512
    rows = torch.arange(count - probes, count)
    given = (torch.arange(count) <= rows[:, None]) / (rows[:, None] + 1.0)
    seen = Seen(
        given.sum(0, keepdim=True),
        torch.arange(count)[None],
        [count],
        groups=1,
        since=count - probes,
        tokens=count,
        prompt=count,
        keep=100,
        horizon=-1,
        lately=None,
        alike=None,
    )
    of_zipcache, of_h2o = (compose(kv).evictor.scores(seen) for kv in ("zipcache", "h2o"))  # type: ignore[union-attr]
    assert float(of_zipcache.max() / of_zipcache.min()) < 1.2
    assert float(of_h2o.max() / of_h2o.min()) > 50


def test_salient_tokens_have_more_bits_and_no_token_is_gone() -> None:
    layer = prefilled("zipcache(keep=224,recent=32)")
    below = layer.cache.store.lower[0]
    assert below is not None
    _, k, _, _ = tokens()
    for head in range(HEADS):
        kept = torch.tensor(layer.positions(head))
        assert layer.length(head) + int(below.pages.lengths[0, head]) == COUNT
        coded = int(layer.pages.coded[0, head]) * PAGE
        assert coded > 0
        errors = (layer.read(head)[0] - k[kept, head])[:coded].square().mean()
        assert 0 < errors < 0.02 * k.var()
    assert (layer.pages.key_codec.bits, below.pages.key_codec.bits) == (4, 2)


def test_values_take_fewer_bits_than_in_groups_with_the_same_codes() -> None:
    for bits in (2, 4):
        [zipped] = compose(f"zipcache(bits={bits})").methods
        assert isinstance(zipped, Coder)
        ours, groups = zipped.codec(128, False, 16), Codec(bits, 128, False)
        effective = [8 * codec.page_bytes / (PAGE * 128) for codec in (ours, groups)]
        # The table of a head is shared by all of its tokens: 4096 of them here.
        assert effective[0] + 32 * ours.side / (4096 * 128) == pytest.approx(bits + 0.25 + 1 / 64)
        assert effective[1] == bits + 1


def test_normalised_channels_cost_little_where_channels_differ_in_size() -> None:
    """Without them one scale for a token rounds its small channels away."""
    method = compose("zipcache").methods[0]
    assert isinstance(method, Coder)
    v = tokens()[2][:, 0]
    codec = method.codec(DIM, False, 32)
    side = method.table(codec, v[None], torch.empty(0, 1, DIM), False)[0]
    alone = Codec(codec.bits, DIM, False, group=DIM)
    errors = []
    for each, table in ((codec, side), (alone, None)):
        back = decode(each, torch.float32, encode(each, torch.float32, v[:PAGE], table), table)
        errors.append(float(((back - v[:PAGE]).square().mean(0) / v.var(0)).mean()))
    assert errors[0] < errors[1] / 2


def test_keys_are_as_close_long_after_the_first_chunk() -> None:
    """Channels that turn slowly are elsewhere by then."""
    layer = Layer("zipcache(keep=0.99,recent=0,bits=4)", LAYOUT, 2 * COUNT)
    q, k, v, _ = tokens()
    turned = k.clone()
    turned[..., : DIM // 2] += 8 * torch.linspace(0, 3, COUNT).sin()[:, None, None]
    for start in range(0, COUNT, 64):
        layer.add(q[start : start + 64], turned[start : start + 64], v[start : start + 64])
    kept = torch.tensor(layer.positions(0))[: int(layer.pages.coded[0, 0]) * PAGE]
    missed = (layer.read(0)[0][: len(kept)] - turned[kept, 0]).square().mean(1)
    errors = [float(missed[kept < 64].mean()), float(missed[kept > 256].mean())]
    assert errors[1] < 2 * errors[0]


def test_settings_that_make_no_sense_are_refused() -> None:
    for kv in ("zipcache(bits=3)", "zipcache(window=0)", "zipcache+int4", "zipcache+h2o"):
        with pytest.raises(UsageError):
            compose(kv)
