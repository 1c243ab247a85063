"""Layers that share what they keep by the scores of all their tokens (DynamicKV, https://arxiv.org/abs/2412.14838).

The paper pools the scores of the layers so far every few layers, shrinks each of them to its share of those that score
highest, and in between lets a layer have a multiple of the average. Here that happens at every layer, with what all
layers may keep together from the first one on: a token that is let go of would not be among the highest at the end
either, and no moment needs more memory than the end. In later chunks of a prompt, and when decoding, layers that were
not computed yet take part with the scores that they had before.

On the embedded model (``snapkv(keep=192,window=16)`` of 1500 tokens, ``layered``) it cannot be told from layers that
keep the same: 0.132 to 0.142 nats and 7 to 5 of 24 look-ups, for 12% more memory, as lists are made for layers with
four times the average. ``adakv`` has 0.114 nats and 5 look-ups, ``pyramid`` 0.378 and none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from tightfit.budget.ledger import Arena
from tightfit.kv.cache import as_bytes, place


class Pooled:
    """Of some ``layers`` of one shape, the scores of the tokens that each keeps: ``scores`` (sequences, layers,
    kv_heads, capacity) float32, infinite for those that stay in any case, of the first ``counts`` (sequences, layers)
    int32."""

    def __init__(self, layers: Sequence[int], sequences: int, kv_heads: int, capacity: int, arena: Arena) -> None:
        self.layers = list(layers)
        self.scores = place(arena, (sequences, len(layers), kv_heads, capacity), torch.float32)
        self.counts = place(arena, (sequences, len(layers)), torch.int32)

    def of(self, layer: int, slot: int) -> torch.Tensor:
        """The scores (kv_heads, n) of what a layer keeps."""
        index = self.layers.index(layer)
        return self.scores[slot, index, :, : int(self.counts[slot, index])]

    def note(self, layer: int, slot: int, scores: torch.Tensor) -> None:
        """``scores`` (kv_heads, n) are those of what a layer keeps from now on."""
        index, count = self.layers.index(layer), scores.shape[1]
        self.scores[slot, index, :, :count] = scores
        self.counts[slot, index] = count

    def share(self, layer: int, slot: int, scores: torch.Tensor, keep: int, most: int) -> dict[int, int]:
        """How many tokens each head of each layer keeps where layers keep ``keep`` on average and none more than
        ``most``, given new ``scores`` (kv_heads, n) of one of them.

        All heads of a layer keep the same number: its share of the scores that are highest in all layers and heads.
        """
        heads, sure, free = len(scores), [], []
        for each in self.layers:
            row = scores if each == layer else self.of(each, slot)
            sure.append(int((row[0] == torch.inf).sum()))
            others = row[row < torch.inf].view(heads, -1)
            free.append(others.topk(min(max(most - sure[-1], 0), others.shape[1])).values.flatten())
        belongs = torch.arange(len(free)).repeat_interleave(torch.tensor([len(each) for each in free]))
        wanted = min(max(keep * len(free) - sum(sure), 0), len(belongs) // heads)  # of each head
        best = torch.cat(free).topk(wanted * heads).indices
        found = torch.bincount(belongs[best], minlength=len(free))
        kept = found // heads
        rest = (found % heads).argsort(descending=True, stable=True)
        kept[rest[: wanted - int(kept.sum())]] += 1
        return {each: sure[index] + int(kept[index]) for index, each in enumerate(self.layers)}

    def rehearse(self, layer: int, scores: torch.Tensor, keep: int, most: int) -> None:
        """Does what the largest :meth:`share` costs, once."""
        self.counts[0] = self.scores.shape[3]
        self.share(layer, 0, scores, keep, most)
        self.clear(0)

    def clear(self, slot: int) -> None:
        self.counts[slot] = 0

    def parts(self, slot: int) -> Iterator[torch.Tensor]:
        """What has to be saved of a sequence, as flat uint8 tensors."""
        yield as_bytes(self.counts[slot])
        yield as_bytes(self.scores[slot])
