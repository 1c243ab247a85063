"""Operations of a token: as torch counts them in transformers' model, and for mixtures as a hand counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import tiny_mixtures
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from tightfit import zoo
from tightfit.engine.opening import Wish, open_model
from tightfit.plan.operations import operations_per_token

TOKENS = 48


def test_a_dense_model_takes_what_torch_counts() -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.path(), attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, TOKENS, dtype=torch.int64))
    opened = open_model(Wish("nano"))
    opened.checkpoint.close()
    # Eager attention multiplies with the keys that a token must not see as well: each token with all of them.
    each = operations_per_token(opened.spec, [TOKENS] * len(opened.spec.layers))
    assert counter.get_total_flops() == TOKENS * each


# Weights that a token goes through, of sizes in tiny_mixtures: attention, router, 3 of the experts, in each of two
# layers, and the head.
MIXTRAL = 2 * (4 * 10 * 40 * 2 + 2 * 10 * 40 * 2 + 6 * 40 + 3 * 3 * 48 * 40) + 61 * 40
# The latent's projections instead; the first layer is dense, and the second has two shared experts.
LATENT = 4 * 16 * 40 + 24 * 40 + 4 * 19 * 18 + 40 * 4 * 9
DEEPSEEK = 2 * LATENT + 3 * 48 * 40 + (8 * 40 + 3 * 3 * 24 * 40 + 3 * 2 * 24 * 40) + 61 * 40


@pytest.mark.parametrize(
    ("family", "weights", "key_and_value"), [("mixtral", MIXTRAL, 10 + 10), ("deepseek_v3", DEEPSEEK, 24 + 18)]
)
def test_a_mixture_takes_what_a_token_goes_through(
    family: str, weights: int, key_and_value: int, tmp_path: Path
) -> None:
    checkpoint, spec = tiny_mixtures.write(tmp_path / family, tiny_mixtures.config_of(family))
    checkpoint.close()
    attended = [100.0, 7.5]  # methods of the cache keep another number in each layer
    assert operations_per_token(spec, attended) == 2 * weights + 2 * 4 * sum(attended) * key_and_value
