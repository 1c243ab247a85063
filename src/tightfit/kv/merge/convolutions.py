"""Convolutions that say how much of each token comes into each slot: their operations, and how they are trained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import conv1d, kl_div, relu

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kv.base import LayerLayout
from tightfit.kv.fitted import Network
from tightfit.kv.merge.tokens import READ_AT_ONCE
from tightfit.kv.method import Leaving, Tokens

HALO = 10  # neighbours on each side that a convolution sees
KERNEL = 2 * HALO + 1  # the paper's
MIX = 0.5  # of what is fused in a slot, at first
SPREAD = 4.0  # of what convolutions give at first for features of size 1: a slot then takes up few tokens
RATE, MIX_RATE = 3e-3, 3e-2  # of training

# ---- fusing the tokens of one head ----


@ops.op
def put_rows_(window_: Tensor, rows: Tensor, keys: Tensor, values: Tensor) -> None:
    """Writes ``keys`` (n, key_dim) and ``values`` (n, value_dim) side by side into ``rows`` (n,) int64."""
    window_[:, : keys.shape[1]].index_copy_(0, rows, keys)
    window_[:, keys.shape[1] :].index_copy_(0, rows, values)


@ops.op
def fold_rows(
    window_: Tensor, taps: Tensor, bias: Tensor, logits: Tensor, largest_: Tensor, total_: Tensor, sums_: Tensor
) -> None:
    """Goes on with the softmax of relu(convolution) for each of m slots, over tokens in order: ``total`` (m,) of the
    weights, over exp(``largest``) (m,), and the ``sums`` (m, features) of tokens with these weights. ``window`` (n +
    KERNEL - 1, features) are the next n tokens and their neighbours, of which the last KERNEL - 1 come to its
    beginning; ``taps`` (KERNEL, features, m) and ``bias`` (m,) are the convolution, ``logits`` (n, m) is scratch."""
    n = len(logits)
    logits.copy_(bias.expand_as(logits))
    for at, tap in enumerate(taps):
        logits.addmm_(window_[at : at + n], tap)
    logits.relu_()
    before = largest_.clone()
    torch.maximum(largest_, logits.amax(0), out=largest_)
    shrunk = before.sub_(largest_).exp_()
    logits.sub_(largest_).exp_()
    total_.mul_(shrunk).add_(logits.sum(0))
    sums_.mul_(shrunk[:, None]).addmm_(logits.T, window_[HALO : HALO + n])
    window_[: KERNEL - 1] = window_[n:].clone()


@ops.op
def fuse_(staying_: Tensor, slots: Tensor, own: Tensor, sums: Tensor, total: Tensor, mix: Tensor) -> None:
    """The rows ``slots`` (m,) int64 become a ``mix`` (1,) of the mean ``sums / total``, and of their ``own`` (m,
    features) for the rest."""
    staying_.index_copy_(0, slots, own.lerp(sums / total[:, None], mix))


@ops.op
def mark(changed: Tensor, slots: Tensor) -> None:
    """``changed`` (n,) bool is true at ``slots`` (m,) int64 alone."""
    changed.zero_().index_fill_(0, slots, 1)


class Fusing:
    """The slots of a head on their way: tokens ``own`` at ``places`` (m,) int64 of it, which stay, and others that
    leave, in one order of places. ``found`` are the taps, bias and mix of the layer."""

    def __init__(self, own: Tokens, places: Tensor, found: tuple[Tensor, Tensor, Tensor], ws: Workspace) -> None:
        assert own.values is not None
        self.own, self.places, self.found = own, places, found
        count, features = len(places), own.keys.shape[1] + own.values.shape[1]
        self.window = ws.empty(KERNEL - 1 + READ_AT_ONCE + count, features)
        self.logits = ws.empty(READ_AT_ONCE + count, count)
        self.largest, self.total, self.sums = ws.empty(count), ws.empty(count), ws.empty(count, features)
        ops.zero_(self.window[:HALO])
        for x in (self.largest, self.total, self.sums):  # relu gives no less than 0
            ops.zero_(x)
        self.filled, self.passed = HALO, 0

    def add(self, block: Tokens, places: Tensor) -> None:
        """Goes on with at most READ_AT_ONCE tokens that leave, and the slots before the last of them."""
        stop = int(torch.searchsorted(self.places, places[-1]))
        between = self.places[self.passed : stop]
        self._put(block, torch.arange(len(places)) + torch.searchsorted(between, places))
        self._put_own(stop, torch.searchsorted(places, between))
        self._fold(len(places) + len(between))

    def finish(self, staying_: Tokens, slots: Tensor) -> None:
        """Goes on to the end, and writes the ``slots`` (m,) int64 among the tokens that stay."""
        left = len(self.places) - self.passed
        self._put_own(len(self.places), torch.zeros(left, dtype=torch.int64))
        ops.zero_(self.window[self.filled + left : self.filled + left + HALO])
        self._fold(left + HALO)
        mix, width = self.found[2], self.own.keys.shape[1]
        for x_, own, sums in zip(staying_, self.own, (self.sums[:, :width], self.sums[:, width:]), strict=True):
            if x_ is not None and own is not None:
                fuse_(x_, slots, own, sums, self.total, mix)

    def _put(self, block: Tokens, rows: Tensor) -> None:
        assert block.values is not None
        put_rows_(self.window, self.filled + rows, block.keys, block.values)

    def _put_own(self, stop: int, before: Tensor) -> None:
        """Puts the slots up to ``stop`` behind ``before`` (n,) int64 others each."""
        mine = slice(self.passed, stop)
        assert self.own.values is not None
        self._put(Tokens(self.own.keys[mine], self.own.values[mine]), torch.arange(len(before)) + before)
        self.passed = stop

    def _fold(self, count: int) -> None:
        end = self.filled + count
        rows = end - (KERNEL - 1)  # that have all their neighbours
        if rows > 0:
            taps, bias, _ = self.found
            fold_rows(self.window[:end], taps, bias, self.logits[:rows], self.largest, self.total, self.sums)
        self.filled = min(end, KERNEL - 1)


def fuse(
    staying_: Tokens,
    slots: Tensor,
    places: Tensor,
    leaving: Leaving,
    found: tuple[Tensor, Tensor, Tensor],
    ws: Workspace,
) -> None:
    """Fuses the tokens of a head that leave into the ``slots`` (m,) int64 of those that stay, which are at ``places``
    (m,) int64 of all, ascending."""
    assert staying_.values is not None
    with ws.frame():
        own = Tokens(*(ws.empty(len(slots), x.shape[1]) for x in (staying_.keys, staying_.values)))
        assert own.values is not None
        ops.gather_rows(staying_.keys, slots, own.keys)
        ops.gather_rows(staying_.values, slots, own.values)
        fusing, at = Fusing(own, places, found, ws), 0
        for block in leaving.blocks():
            fusing.add(block, leaving.places[at : at + len(block.keys)])
            at += len(block.keys)
        fusing.finish(staying_, slots)


# ---- training ----


class Convolutions(torch.nn.Module):
    """Those of one layer, as they are trained; all of its heads have the same."""

    def __init__(self, layout: LayerLayout, slots: int) -> None:
        super().__init__()
        features = layout.key_dim + layout.value_dim
        self.taps = torch.nn.Parameter(torch.randn(slots, features, KERNEL) * SPREAD / math.sqrt(features * KERNEL))
        self.bias, self.mix = torch.nn.Parameter(torch.zeros(slots)), torch.nn.Parameter(torch.tensor([MIX]))

    def weights(self, x: Tensor) -> Tensor:
        """(b, slots, n) of tokens ``x`` (b, n, features), in order: what each gives to each slot."""
        return relu(conv1d(x.mT, self.taps, self.bias, padding=HALO)).softmax(-1)

    def compress(self, k: Tensor, v: Tensor, mass: Tensor, keep: int) -> tuple[Tensor, Tensor]:
        """``keep`` of the keys and values (b, kv_heads, n, dim) of n tokens in order, by the ``mass`` (b, kv_heads, n)
        that they received: the heaviest as they are, and the next ones as slots of all others."""
        x, slots = torch.cat([k, v], -1), len(self.bias)
        order = mass.argsort(dim=-1, descending=True, stable=True)
        heavy = keep - slots
        others, stays = order[..., heavy:].sort(-1).values, order[..., :keep].sort(-1).values
        at = order[..., heavy:keep].sort(-1).values
        weights = self.weights(_picked(x, others).flatten(0, 1)).unflatten(0, mass.shape[:2])
        fused = _picked(x, at).lerp(weights @ _picked(x, others), self.mix)
        kept = _picked(x.scatter(2, at[..., None].expand_as(fused), fused), stays)
        return kept[..., : k.shape[-1]], kept[..., k.shape[-1] :]

    def found(self) -> dict[str, Tensor]:
        tensors = {"taps": self.taps.permute(2, 1, 0), "bias": self.bias, "mix": self.mix}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def _picked(x: Tensor, which: Tensor) -> Tensor:
    return x.gather(2, which[..., None].expand(*which.shape, x.shape[-1]))


@dataclass(frozen=True)
class Compressed:
    """Attention over slots and the tokens behind them, a ``chunk`` of tokens after the other: ``keep`` stay, of which
    ``recent`` are the last ones, and the others are judged by the last ``window`` queries."""

    layers: Sequence[Convolutions]
    scorings: Sequence[Scoring]
    keep: int
    recent: int
    window: int
    chunk: int

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        q = q.unflatten(1, (k.shape[1], -1)) * self.scorings[layer].scale
        n, outs = q.shape[3], []
        keys, values = k[:, :, :0], v[:, :, :0]
        for start in range(0, n, self.chunk):
            stop = min(start + self.chunk, n)
            keys, values = torch.cat([keys, k[:, :, start:stop]], 2), torch.cat([values, v[:, :, start:stop]], 2)
            hidden = torch.ones(stop - start, keys.shape[2], dtype=torch.bool).triu(keys.shape[2] - stop + start + 1)
            scores = q[:, :, :, start:stop] @ keys[:, :, None].mT
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            outs.append((weights @ values[:, :, None]).flatten(1, 2))
            if keys.shape[2] > self.keep:
                mass = weights.detach()[:, :, :, -self.window :].sum((2, 3))
                mass[..., mass.shape[2] - self.recent :] = torch.inf
                keys, values = self.layers[layer].compress(keys, values, mass, self.keep)
        return torch.cat(outs, 2).transpose(1, 2)


class Training:
    """Training of the convolutions of all layers of a ``network`` that is frozen: with twice as many tokens as slots it
    is to predict what it predicts with all. ``recent`` and ``window`` are as in :class:`Compressed`."""

    def __init__(
        self,
        network: Network,
        layouts: Sequence[LayerLayout],
        scorings: Sequence[Scoring],
        slots: int,
        recent: int,
        window: int,
    ) -> None:
        self.network, self.scorings = network, scorings
        self.keep, self.recent, self.window = 2 * slots, recent, window
        self.layers = [Convolutions(layout, slots) for layout in layouts]
        convolutions = [x for each in self.layers for x in (each.taps, each.bias)]
        mixes = [each.mix for each in self.layers]
        self.optimizer = torch.optim.Adam([{"params": convolutions}, {"params": mixes}])

    def divergence(self, tokens: Tensor, chunk: int) -> Tensor:
        """Of what is predicted for ``tokens`` (b, n) behind the first ones that all fit in, in nats per token."""
        attend = Compressed(self.layers, self.scorings, self.keep, self.recent, self.window, chunk)
        with torch.no_grad():
            wanted = self.network.logits(self.network.hidden(tokens)[:, self.keep :]).log_softmax(-1)
        found = self.network.logits(self.network.hidden(tokens, attend)[:, self.keep :]).log_softmax(-1)
        return kl_div(found, wanted, log_target=True, reduction="sum") / wanted.shape[:2].numel()

    def step(self, tokens: Tensor, chunk: int, rate: float) -> None:
        """A step with ``tokens`` (b, n) that come ``chunk`` at a time, at ``rate`` of the rates of training."""
        for group, whole in zip(self.optimizer.param_groups, (RATE, MIX_RATE), strict=True):
            group["lr"] = rate * whole
        self.optimizer.zero_grad()
        self.divergence(tokens, chunk).backward()
        self.optimizer.step()

    def held_out(self, tokens: Tensor, chunks: Sequence[int], mix: float | None = None) -> float:
        """The mean divergence over several sizes of chunks, with another ``mix`` if one is given."""
        mixes = [each.mix.data for each in self.layers]
        if mix is not None:
            for each in self.layers:
                each.mix.data = torch.tensor([mix])
        with torch.no_grad():
            found = sum(float(self.divergence(tokens, chunk)) for chunk in chunks) / len(chunks)
        for each, whole in zip(self.layers, mixes, strict=True):
            each.mix.data = whole
        return found
