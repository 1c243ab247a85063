"""Layers with spread attention are quantised whole, and of the others what a token needs is fetched from a file."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from tests.kv.driver import Run, Tiny

from tightfit.errors import UsageError
from tightfit.kernels import cpu, pages
from tightfit.kernels.attention import Scoring
from tightfit.kv.fitted import Known, Sample
from tightfit.kv.quantize.tailor import DOMINANT, QUERIES, Tailor, spread_of

SPREAD, PEAKED = 0.8, 0.1
KV = "tailor(tokens=64,resident=0,recent=16)"


def known(*spread: float) -> Known:
    return Known(tensors={"tailor": {"spread": torch.tensor(spread)}})


def decoded(run: Run, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    logits = [run.prefill(prompt), *(run.decode(token) for token in tokens)]
    run.cache.close()
    return torch.stack(logits)


def test_spread_layers_are_quantised_and_peaked_ones_are_in_the_file(tiny: Callable[..., Tiny]) -> None:
    model = tiny("llama")
    run = model.run(KV, known=known(SPREAD, PEAKED, SPREAD))
    run.generate(run.prefill(model.tokens(300)), 40)
    for layer, kept in enumerate(run.paged.layers):
        quantised = layer != 1
        assert (kept.coded_keys is not None) == quantised
        assert bool((kept.coded[0] == (320 - 16) // 32).all()) == quantised  # at 320 tokens
        assert bool((kept.cold[0] >= 9).all()) == (not quantised)
        assert kept.key_codec.bits == (2 if quantised else 32)
        assert (run.paged.store.selecting[layer] is None) == quantised
    run.cache.close()


def test_each_layer_gives_what_its_method_gives_alone(tiny: Callable[..., Tiny]) -> None:
    """So with one method in the place of the other it is another cache."""
    model = tiny("llama")
    prompt, tokens = model.tokens(300), model.tokens(40, seed=4)
    run = [
        decoded(model.run(kv), prompt, tokens) for kv in ("int2(recent=16)", "quest(tokens=64,full=0)+host(resident=0)")
    ]
    alike = decoded(model.run(KV, known=known(SPREAD, SPREAD, SPREAD)), prompt, tokens)
    assert torch.equal(alike, run[0])
    alike = decoded(model.run(KV, known=known(PEAKED, PEAKED, PEAKED)), prompt, tokens)
    torch.testing.assert_close(alike, run[1], rtol=0, atol=1e-4)
    mixed = decoded(model.run(KV, known=known(SPREAD, PEAKED, PEAKED)), prompt, tokens)
    for other in run:
        assert float((mixed - other).abs().max()) > 0.02


@pytest.mark.skipif(cpu.module is None, reason="what is fetched is counted where it is staged")
def test_what_a_token_fetches_is_bounded_whatever_the_context(tiny: Callable[..., Tiny]) -> None:
    """By the tokens chosen in the layers in the file; none of it for those that are quantised."""
    model = tiny("llama")
    for layers in ((PEAKED, SPREAD, PEAKED), (SPREAD, SPREAD, SPREAD)):
        run = model.run(KV, known=known(*layers), context=1024)
        logits = run.prefill(model.tokens(700))
        page = pages.head_bytes(run.paged.layers[0]) // run.paged.layers[0].table.shape[2]
        most = layers.count(PEAKED) * 2 * (64 // 32) * page  # two heads
        for _ in range(20):
            before = run.paged.fetched
            logits = run.generate(logits, 1)[1][0]
            assert run.paged.fetched.bytes - before.bytes <= most
            assert run.paged.fetched.wanted - before.wanted == most // page
        run.cache.close()


class Looked:
    """A model of two layers: in the first every token is looked at alike, in the second one is."""

    name, layouts = "two layers", [None, None]
    scorings = (Scoring(1.0), Scoring(1.0))

    def samples(self, length: int, count: int) -> list[list[int]]:
        return [[0] * length] * count

    def layers(self, samples: Sequence[Sequence[int]]) -> Iterator[list[Sample]]:
        for peak in (0.0, 30.0):
            found = []
            for sample in samples:
                k = torch.zeros(len(sample), 2, 8)
                k[5, :, 0] = peak
                found.append(Sample(torch.ones(len(sample), 4, 8), k, k, None))
            yield found


def test_fitting_tells_spread_layers_from_peaked_ones() -> None:
    found = Tailor().fit(Looked(), lambda done, total: None)  # type: ignore[arg-type]
    assert found.tensors["spread"][0] == pytest.approx(1 - DOMINANT, abs=0.01)
    assert found.tensors["spread"][1] == pytest.approx(0, abs=1e-3)
    assert found.report["quantised"] == [0]


def test_spread_is_of_what_a_layer_shows() -> None:
    """Of a window of 16 tokens the 16th part of 256 is all."""
    n = 256
    sample = Sample(torch.ones(n, 4, 8), torch.zeros(n, 2, 8), torch.zeros(n, 2, 8), None)
    assert float(spread_of(sample, Scoring(1.0, window=16))) == pytest.approx(0, abs=1e-5)
    seen = torch.arange(n - QUERIES + 1, n + 1)
    assert float(spread_of(sample, Scoring(1.0))) == pytest.approx(float(1 - (16 / seen).mean()), abs=1e-5)


def test_impossible_settings_are_refused() -> None:
    for settings in ({"threshold": 1.5}, {"bits": 3}, {"tokens": 8}, {"recent": -1}, {"resident": -1}):
        with pytest.raises(UsageError):
            Tailor(**settings)  # type: ignore[arg-type]
