"""Under the layered schedule our methods keep what those of kvpress keep (https://github.com/NVIDIA/kvpress)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from kvpress import (
    AdaKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    SnapKVPress,
    StreamingLLMPress,
    ThinKPress,
)
from kvpress.presses.base_press import BasePress
from tests.kv.driver import Tiny
from transformers import DynamicCache

LENGTH, KEEP, WINDOW = 160, 40, 8
RATIO = 1 - KEEP / LENGTH  # in kvpress: the share that is let go of


@dataclass
class Layer:
    """What a press is given of one attention layer, after a whole prompt went through it."""

    module: torch.nn.Module
    hidden: torch.Tensor
    keys: torch.Tensor  # (1, kv_heads, tokens, head_dim)
    attentions: torch.Tensor  # (1, heads, tokens, tokens)
    kwargs: dict[str, Any]

    def compress(self, press: BasePress, attentions: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys that stay, and instead of values the positions that do (kv_heads, n)."""
        places = torch.arange(LENGTH).view(1, 1, -1, 1).expand(self.keys.shape)
        given = self.attentions if attentions else None
        keys, kept = press.compress(self.module, self.hidden, self.keys.clone(), places, given, self.kwargs)
        return keys[0], kept[0, :, :, 0]


@torch.no_grad()
def prompt_through(tiny: Tiny, tokens: list[int]) -> list[Layer]:
    """What presses see of a prompt: none changes what the next layer sees of it."""
    seen: list[tuple[torch.nn.Module, dict[str, Any], torch.Tensor]] = []

    def hook(module: torch.nn.Module, _: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.append((module, kwargs, output[1]))

    cache, model = DynamicCache(), tiny.theirs
    hooks = [layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in model.model.layers]
    model(torch.tensor([tokens]), past_key_values=cache, use_cache=True)
    for each in hooks:
        each.remove()
    return [
        Layer(module, kwargs["hidden_states"], cache.layers[index].keys, attentions, kwargs)
        for index, (module, kwargs, attentions) in enumerate(seen)
    ]


@pytest.fixture(scope="module")
def llama(tiny: Callable[..., Tiny]) -> Tiny:
    return tiny("llama")


@pytest.fixture(scope="module")
def layers(llama: Tiny) -> list[Layer]:
    return prompt_through(llama, llama.tokens(LENGTH))


def ours(llama: Tiny, kv: str) -> list[list[list[int]]]:
    """The positions that each head of each layer keeps of the same prompt."""
    run = llama.run(kv, chunk=48)
    run.prefill(llama.tokens(LENGTH), layered=True)
    return [[run.positions(layer, head) for head in range(2)] for layer in range(3)]


def theirs(layers: list[Layer], press: BasePress) -> list[list[list[int]]]:
    return [[sorted(head.tolist()) for head in layer.compress(press)[1]] for layer in layers]


@pytest.mark.parametrize("kernel", [1, 5, 7])
def test_snapkv(llama: Tiny, layers: list[Layer], kernel: int) -> None:
    press = SnapKVPress(RATIO, window_size=WINDOW, kernel_size=kernel)
    kept = ours(llama, f"snapkv(keep={KEEP},window={WINDOW},kernel={kernel})")
    assert kept == theirs(layers, press)
    assert kept != ours(llama, f"snapkv(keep={KEEP},window={WINDOW},kernel=3)")


def test_streaming_llm(llama: Tiny, layers: list[Layer]) -> None:
    """Which tokens stay is the same. Ours hides the others from the prompt's own tokens too, as the paper does."""
    assert ours(llama, f"window(keep={KEEP},positions=original)") == theirs(layers, StreamingLLMPress(RATIO, n_sink=4))


def test_observed_attention(llama: Tiny, layers: list[Layer]) -> None:
    kept = ours(llama, f"h2o(keep={KEEP},recent=0,normalize=true)")
    assert kept == theirs(layers, ObservedAttentionPress(RATIO))
    assert kept != ours(llama, f"h2o(keep={KEEP},recent=0)")


def test_pyramidkv_with_the_same_numbers_of_tokens(
    llama: Tiny, layers: list[Layer], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ours(llama, f"snapkv(keep={KEEP},window={WINDOW},budget=pyramid)")
    counts = [len(heads[0]) for heads in kept]
    assert counts[0] > counts[1] > counts[2]
    monkeypatch.setattr(PyramidKVPress, "get_layer_budget", lambda _, module, length: counts[module.layer_idx])
    assert kept == theirs(layers, PyramidKVPress(RATIO, window_size=WINDOW))


def test_pyramidkv_shares_what_is_not_the_window(llama: Tiny, layers: list[Layer]) -> None:
    """The numbers differ: kvpress makes a pyramid of all tokens, so that the last layer has a twentieth of the average,
    and none at all where that is less than the window; ours is one of the tokens beside the window, which every layer
    keeps (as in the authors' program, where the pyramid comes on top of the window). Beside that they are the same."""
    window, free = 2, 60
    press = PyramidKVPress(1 - free / LENGTH, window_size=window)
    budgets = [press.get_layer_budget(layer.module, LENGTH) for layer in layers]
    assert len(set(budgets)) == 3
    kept = ours(llama, f"snapkv(keep={free + window},window={window},budget=pyramid)")
    assert [len(heads[0]) - window for heads in kept] == budgets


def test_adakv(llama: Tiny, layers: list[Layer], monkeypatch: pytest.MonkeyPatch) -> None:
    press = AdaKVPress(SnapKVPress(RATIO, window_size=WINDOW), alpha_safeguard=0.2)
    # It refuses to be used with a model that could not hide tokens later; we only ask which it would.
    monkeypatch.setattr(llama.theirs.config, "_attn_implementation_internal", "sdpa")
    found = []
    for layer in layers:
        layer.compress(press, attentions=False)
        _, heads, places = layer.module.masked_key_indices
        gone = [set(places[heads == head].tolist()) for head in range(2)]
        found.append([[place for place in range(LENGTH) if place not in gone[head]] for head in range(2)])
        layer.module.masked_key_indices = None
    kept = ours(llama, f"snapkv(keep={KEEP},window={WINDOW},budget=adakv)")
    assert kept == found
    assert any(len(a) != len(b) for a, b in kept)


@pytest.mark.parametrize("prune", [0.25, 0.4, 0.5])
def test_think(llama: Tiny, layers: list[Layer], prune: float) -> None:
    run = llama.run(f"think(prune={prune},window=32,recent=0)", chunk=48)
    run.prefill(llama.tokens(LENGTH), layered=True)
    for index, layer in enumerate(layers):
        keys, _ = layer.compress(ThinKPress(prune, window_size=32))
        channels = run.paged.layers[index].channels
        assert channels is not None
        for head in range(2):
            assert channels[0, head].tolist() == (keys[head] != 0).any(0).nonzero()[:, 0].tolist()
