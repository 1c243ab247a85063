"""What methods see of a model when they are fitted is what the model computes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tests.parity.harness import make, save
from torch.nn.functional import scaled_dot_product_attention
from transformers import GptOssConfig

import tightfit
from tightfit import zoo
from tightfit.engine.fit import Observing
from tightfit.errors import BudgetError, UsageError

TEXT = "def area(width, height):\n    return width * height\n" * 8


@pytest.fixture(scope="module")
def model() -> tightfit.Model:
    with tightfit.load("nano", "4GiB", context=512, chunk=64, weights="f32", activations="float32") as loaded:
        yield loaded


def observed(model: tightfit.Model, budget: int = 1 << 40) -> Observing:
    tokens = model.tokenizer.encode(TEXT)
    return Observing(model.borrow_engine(), "nano", tokens, model.tokenizer.encode, budget)


def test_the_network_computes_what_the_engine_does(model: tightfit.Model) -> None:
    seen = observed(model)
    tokens = seen.tokens[:150]
    network = seen.network()
    hidden = network.hidden(torch.tensor([tokens, tokens[::-1]]))
    wanted = seen.hidden(tokens)  # with products and a cache in bfloat16
    assert (hidden[0] - wanted).norm() < 0.01 * wanted.norm()
    scores = network.logits(hidden)[0].log_softmax(-1)
    found = [float(scores[at, token]) for at, token in enumerate(tokens[1:])]
    torch.testing.assert_close(torch.tensor(found), torch.tensor(model.score(tokens)), rtol=1e-2, atol=2e-2)


def test_gradients_flow_through_what_attention_is_put_in_its_place(model: tightfit.Model) -> None:
    network = observed(model).network()
    tokens = torch.tensor([observed(model).tokens[:40]])
    gates = torch.ones(len(network.spec.layers), requires_grad=True)
    plain = network.hidden(tokens)

    def gated(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return gates[layer] * network.attention(layer, q, k, v)

    hidden = network.hidden(tokens, gated)
    torch.testing.assert_close(hidden, plain)
    hidden.square().sum().backward()
    assert gates.grad is not None
    assert (gates.grad.abs() > 0).all()


def test_layers_are_seen_as_they_are_computed(model: tightfit.Model) -> None:
    """Attention over a sample, projected, is what a layer adds: queries, keys and values are those of the network."""
    seen = observed(model)
    tokens = seen.tokens[:100]
    computed: list[tuple[torch.Tensor, ...]] = []
    network = seen.network()

    def noted(layer: int, *qkv: torch.Tensor) -> torch.Tensor:
        computed.append(tuple(x[0] for x in qkv))
        return network.attention(layer, *qkv)

    network.hidden(torch.tensor([tokens]), noted)
    layers = list(seen.layers([tokens, tokens[:30]]))
    assert len(layers) == len(computed) == len(seen.layouts)
    for (sample, shorter), expected in zip(layers, computed, strict=True):
        for found, wanted in zip((*sample.turned(), sample.v), expected, strict=True):
            assert (found - wanted).norm() < 0.01 * wanted.norm()
        assert shorter.k.shape == (30, *sample.k.shape[1:])
        torch.testing.assert_close(shorter.v, sample.v[:30], rtol=1e-3, atol=1e-3)


def test_weights_are_those_that_multiply(model: tightfit.Model) -> None:
    seen = observed(model)
    layout = seen.layouts[0]
    found = seen.weights(0)
    hidden = found["o_proj"].shape[0]
    assert found["k_proj"].shape == (layout.kv_heads * layout.key_dim, hidden)
    assert found["q_proj"].shape == (layout.heads * layout.key_dim, hidden)
    assert not found["k_proj"].is_inference()


def test_what_does_not_fit_is_refused_before_it_is_taken(model: tightfit.Model) -> None:
    for ask in (lambda seen: seen.network(), lambda seen: list(seen.layers([seen.tokens[:100]]))):
        with pytest.raises(BudgetError, match="the budget leaves 0"):
            ask(observed(model, budget=1 << 20))
    with pytest.raises(UsageError, match="tokens"):
        Observing(model.borrow_engine(), "nano", [1, 2, 3], model.tokenizer.encode, 1 << 40).samples(64, 2)


def test_looking_changes_nothing(model: tightfit.Model) -> None:
    tokens = model.tokenizer.encode(TEXT)[:100]
    before = model.score(tokens)
    seen = observed(model)
    list(seen.layers([tokens]))
    seen.hidden(tokens, owners=[0] * len(seen.layouts))
    assert model.score(tokens) == before


def test_scorings_have_the_sinks_of_a_model(tmp_path: Path) -> None:
    config = GptOssConfig(vocab_size=4096, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, head_dim=8)
    config.num_key_value_heads, config.num_local_experts, config.intermediate_size = 2, 4, 32
    reference = make(config)
    shutil.copy(zoo.path("nano") / "tokenizer.json", tmp_path)
    with tightfit.load(str(save(reference, tmp_path)), "4GiB", context=64, weights="own") as loaded:
        seen = Observing(loaded.borrow_engine(), "tiny", [1, 2, 3], lambda text: [], 1 << 40)
        for layer, scoring in zip(reference.model.layers, seen.scorings, strict=True):
            torch.testing.assert_close(scoring.sinks, layer.self_attn.sinks.data.float())


def test_scorings_are_those_of_the_model(model: tightfit.Model) -> None:
    seen = observed(model)
    [[sample], *_] = list(seen.layers([seen.tokens[:20]]))
    q, k = (x.transpose(0, 1) for x in sample.turned())
    groups = seen.layouts[0].heads // seen.layouts[0].kv_heads
    k, v = (x.repeat_interleave(groups, 0) for x in (k, sample.v.transpose(0, 1)))
    wanted = scaled_dot_product_attention(q, k, v, is_causal=True, scale=seen.scorings[0].scale)
    network = seen.network()
    found = network.attention(0, *(x[None] for x in (*sample.turned(), sample.v)))
    torch.testing.assert_close(found[0].transpose(0, 1), wanted)
