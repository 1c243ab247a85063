from __future__ import annotations

import pytest
import torch

from tightfit.zoo.network import CausalLM, Experts
from tightfit.zoo.presets import PRESETS, Settings, preset
from tightfit.zoo.train import optimizers

VOCABULARY = 6144


def parameters(settings: Settings) -> int:
    with torch.device("meta"):
        model = CausalLM(settings.shape, VOCABULARY)
    return sum(parameter.numel() for parameter in model.parameters())


def test_presets_have_the_sizes_that_the_documentation_states() -> None:
    millions = {name: round(parameters(settings) / 1e6, 1) for name, settings in PRESETS.items()}
    assert millions == {"nano": 7.1, "nano-moe": 12.4, "small": 29.1, "small-moe": 30.7, "draft": 2.8}


def test_a_draft_is_a_tenth_of_the_model_that_it_drafts_for() -> None:
    assert parameters(preset("draft")) <= 0.1 * parameters(preset("small"))


@pytest.mark.parametrize("name", PRESETS)
def test_lengths_of_a_run_end_within_the_context_that_the_model_declares(name: str) -> None:
    settings = preset(name)
    lengths = [length for _, length in settings.curriculum]
    assert lengths == sorted(lengths)
    # nano declares twice what it was trained on, and its card says so; all others are trained on all they declare.
    assert lengths[-1] == settings.shape.max_position_embeddings // (2 if name == "nano" else 1)


def test_every_parameter_has_one_optimizer_and_muon_has_only_matrices() -> None:
    with torch.device("meta"):
        model = CausalLM(preset("small-moe").shape, VOCABULARY)
        muon, adamw = optimizers(model, preset("small-moe"))
    names = {parameter: name for name, parameter in model.named_parameters()}
    by_muon = {names[p] for group in muon.param_groups for p in group["params"]}
    by_adamw = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert by_muon | by_adamw == set(names.values())
    assert not by_muon & by_adamw
    assert {name.split(".")[-2] for name in by_muon} == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}


def test_the_load_balancing_loss_is_one_when_balanced_and_grows_when_experts_are_left_out() -> None:
    shape = preset("small-moe").shape
    experts = Experts(shape)
    x = torch.randn(2, 64, shape.hidden_size).abs()  # positive, so that a router's row decides for every token
    with torch.no_grad():
        experts.gate.weight.zero_()
        # All probabilities are equal, so whichever experts are chosen the loss is experts * sum(load) / experts = 1.
        assert experts(x)[1].item() == pytest.approx(1)
        experts.gate.weight[:2] = 1.0
        # Two of eight experts get all tokens, each with probability one half: 8 * (1/2 * 1/2 + 1/2 * 1/2) = 4.
        assert experts(x)[1].item() == pytest.approx(4)


def test_the_load_balancing_loss_moves_tokens_to_the_experts_that_are_left_out() -> None:
    torch.manual_seed(0)
    shape = preset("small-moe").shape
    experts = Experts(shape)
    x = torch.randn(2, 64, shape.hidden_size).abs()
    with torch.no_grad():
        experts.gate.weight[:2] += 0.01
    optimizer = torch.optim.SGD([experts.gate.weight], lr=0.02)
    before = experts(x)[1]
    for _ in range(20):
        optimizer.zero_grad()
        experts(x)[1].backward()
        optimizer.step()
    assert before > 1.5
    assert experts(x)[1] < before - 0.3
