"""Heads are told apart by what they attend to."""

from __future__ import annotations

import torch

from tightfit.kernels.attention import Scoring
from tightfit.kv.base import LayerLayout
from tightfit.kv.evict.heads import all_but, weights


def test_each_score_chooses_its_share_of_heads_without_windows() -> None:
    layouts = [LayerLayout(2, 8, 8, 64, window=window) for window in (None, 16, None)]
    first, second = torch.tensor([[3.0, 1.0], [9.0, 9.0], [2.0, 0.0]]), torch.tensor([[1, 0], [9, 9], [0, 2]])
    every = [True, True]
    assert all_but(layouts, [(first, 0.25)]) == [[False, True], every, every]
    assert all_but(layouts, [(first, 0.25), (second, 0.5)]) == [[False, True], every, [True, False]]
    assert all_but(layouts, [(first, 0.0)]) == [every] * 3
    assert all_but(layouts, [(first, 1.0)]) == [[False, False], every, [False, False]]


def test_sinks_take_their_part_of_attention() -> None:
    products, hidden = torch.tensor([2.0, 4.0, 9.0]).expand(2, 1, 3), torch.tensor([[False, False, True]])
    found = weights(products, hidden, Scoring(0.5, None, 2.0, torch.tensor([-torch.inf, 1.0])))
    scores = (2.0 * (torch.tensor([1.0, 2.0]) / 2.0).tanh()).exp()
    torch.testing.assert_close(found[0, 0, :2], scores / scores.sum())
    torch.testing.assert_close(found[1, 0, :2], scores / (scores.sum() + torch.tensor(1.0).exp()))
    assert found[:, :, 2].tolist() == [[0.0], [0.0]]
