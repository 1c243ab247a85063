"""Heads merged into fewer: half the bytes, closer to the model than their mean is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tests.kv import driver
from tests.kv.driver import ROOM, Tiny
from tests.parity.harness import make
from transformers import PreTrainedModel

from tightfit.budget.ledger import Arena
from tightfit.errors import UsageError
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import Composition, compose
from tightfit.kv.fitted import Known
from tightfit.kv.lowrank.features import Maps
from tightfit.kv.lowrank.projector import Projector
from tightfit.kv.make import cache_of
from tightfit.model.decoder import cache_layouts

CONTEXT = 256


@dataclass(frozen=True)
class MeanPooled(Projector):
    """Two heads become their mean, as checkpoints with grouped queries were first made."""

    name: ClassVar[str] = "mean"

    def maps(self, layouts: Sequence[LayerLayout], tensors: Mapping[str, torch.Tensor]) -> list[Maps]:
        made = []
        for layout in layouts:
            keys, values = (torch.eye(dim).repeat(1, 2, 1) / 2 for dim in (layout.key_dim, layout.value_dim))
            as_they_are = [torch.eye(dim).repeat(2, 1, 1) for dim in (layout.value_dim, layout.key_dim)]
            made.append(Maps(keys, values, as_they_are[0], torch.zeros(2, layout.value_dim), as_they_are[1]))
        return made


def alike(*arguments: Any) -> PreTrainedModel:
    """A random model whose second key-value head is a multiple of its first, before keys are turned."""
    model = make(*arguments)
    with torch.no_grad():
        for layer in model.model.layers:
            for matrix, factor in ((layer.self_attn.k_proj.weight, -1.5), (layer.self_attn.v_proj.weight, 0.5)):
                matrix[40:] = factor * matrix[:40]
    return model


def test_heads_that_are_alike_are_merged_without_loss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotation included: it turns both alike. Their mean is something else."""
    monkeypatch.setattr(driver, "make", alike)
    small = Tiny.make("llama", torch.float32, tmp_path)
    tokens = small.tokens(150)
    exact = small.run("none", context=CONTEXT).prefill(tokens)
    merged = small.run("gqa", context=CONTEXT, known=small.known("gqa"))
    torch.testing.assert_close(merged.prefill(tokens), exact, rtol=1e-3, atol=1e-3)
    after = small.run("none", context=CONTEXT)
    after.prefill(tokens)
    for token in small.tokens(10, seed=3):
        torch.testing.assert_close(merged.decode(token), after.decode(token), rtol=1e-3, atol=1e-3)
    mean = small.run(Composition((MeanPooled(),)), context=CONTEXT, known=Known(tensors={"mean": {}}))
    assert (mean.prefill(tokens) - exact).abs().max() > 0.1


def test_it_is_closer_to_the_model_than_means_of_heads(tiny: Callable[..., Tiny]) -> None:
    small, known = tiny("llama"), tiny("llama").known("gqa")
    methods = {"gqa": (compose("gqa"), known), "mean": (Composition((MeanPooled(),)), Known(tensors={"mean": {}}))}
    losses = dict.fromkeys(methods, 0.0)
    for seed in range(4):
        tokens = small.tokens(100, seed=40 + seed)
        exact = small.run("none", context=CONTEXT).prefill(tokens).log_softmax(-1)
        for name, (composition, each) in methods.items():
            other = small.run(composition, context=CONTEXT, known=each).prefill(tokens).log_softmax(-1)
            losses[name] += float((exact.exp() * (exact - other)).sum())
    assert losses["gqa"] < 0.8 * losses["mean"]


@pytest.mark.parametrize("others", ["", "+int4", "+host(resident=32)", "+snapkv(keep=64)"])
def test_keys_and_values_of_half_as_many_heads_take_half_the_bytes(tiny: Callable[..., Tiny], others: str) -> None:
    """All that is left are the matrices: of each layer three with all features of all heads, and a shift that is 0."""
    layouts, arenas = cache_layouts(tiny("llama").spec, 4096, 64), (Arena(ROOM), Arena(ROOM))
    tensors = {
        f"{kind}.{layer}": torch.zeros(1, 2 * dim, dim)
        for layer, layout in enumerate(layouts)
        for kind, dim in (("keys", layout.key_dim), ("values", layout.value_dim))
    }
    known = Known(tensors={"gqa": tensors})
    for kv, arena in zip((f"gqa{others}", others[1:] or "none"), arenas, strict=True):
        cache_of(compose(kv), layouts, 4096, 1, torch.float16, arena, torch.float32, 64, known).close()
    merged, full = (arena.used for arena in arenas)
    matrices = sum(4 * 2 * (each.key_dim**2 + 2 * each.value_dim**2) for each in layouts)
    shifts = sum(4 * each.heads * each.value_dim for each in layouts)
    tolerance = 0.03 if "int4" in others else 0.01  # of tokens that are not coded yet one page is there for all heads
    assert abs(merged - matrices - shifts - full / 2) < tolerance * full


def test_heads_that_are_no_whole_groups_are_refused(tiny: Callable[..., Tiny]) -> None:
    with pytest.raises(UsageError, match="2 key-value heads are not groups of 3"):
        tiny("llama").run("gqa(merge=3)", context=CONTEXT)
    with pytest.raises(UsageError, match="gqa cannot"):
        compose("gqa(merge=1)")
