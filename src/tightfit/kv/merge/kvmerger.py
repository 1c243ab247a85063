"""Runs of tokens with similar keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.budgets import SAFEGUARD
from tightfit.kv.method import Judged, Leaving, Merger, Seen, Tokens

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Workspace

APART = 4.0  # more than two cosines differ


@technique(
    seam="kv",
    name="kvmerger",
    paper="https://arxiv.org/abs/2407.08454",
    exact=False,
    summary="runs of consecutive tokens whose keys are similar are merged into the one with most attention",
)
@dataclass(frozen=True)
class KVMerger(Merger):
    """Adaptive merging: neighbours whose keys have a cosine above a threshold belong together, which gives runs of
    consecutive tokens. Of each run the token with most attention is the pivot; the others are merged into it, keys and
    values alike, with weights exp(-d^2 / (2 sigma^2)) for keys at the distance d from the pivot's. The last tokens, a
    share ``recent`` of what is kept, and a share ``heavy`` that received most attention are not merged (the paper's
    shares: 0.17 and 0.12 of a prompt of which half is kept).

    The threshold is found anew whenever tokens are too many, such that the runs are as many as tokens may be kept: of
    each head, or with ``budget=adakv`` the same threshold for all heads of a layer. Only where no run is left do tokens
    with much attention join one.

    The paper defines sigma by the weights, which sigma defines; here it is the mean distance of a run's other tokens
    over the square root of 2. It multiplies values by the size of their run; here not, since runs are merged again and
    again. What was merged counts as one token afterwards.

    On the embedded model it does not do what the paper says: with half of 1500 tokens kept, KL divergence is 0.038,
    0.019 if the same tokens stay and the others are dropped, and 0.011 with h2o (with 35%: 0.086, and 0.039). The
    budget is hit to the token.
    """

    recent: float = 0.34
    heavy: float = 0.24

    observes: ClassVar[str] = "all"
    compares: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.recent < 0 or self.heavy < 0 or self.recent + self.heavy >= 1:
            raise UsageError(
                f"kvmerger cannot keep a share of {self.recent:g} recent tokens and {self.heavy:g} with most attention",
                "Give recent and heavy from 0, and less than 1 together.",
            )
        super().__post_init__()

    def protected(self, keep: int) -> tuple[int, int]:
        return 0, int(self.recent * keep)

    def scores(self, seen: Seen) -> torch.Tensor:
        import torch

        from tightfit.kv.merge.runs import join, pivots

        assert seen.alike is not None
        mass, alike, tokens = seen.mass, seen.alike, []
        for head, count in enumerate(seen.counts):
            hidden = int((seen.positions[head, :count] <= seen.horizon).sum())
            last = max(count - self.protected(seen.keep)[1], 0)
            order = hidden + mass[head, hidden:last].argsort(descending=True, stable=True)
            apart = torch.zeros(count)
            apart[order[: int(self.heavy * seen.keep)]] = APART
            apart[last:] = 2 * APART
            alike[head, :count] -= apart
            alike[head, 1:count] -= apart[:-1]
            alike[head, : hidden + 1] = alike[head, count:] = -torch.inf  # nothing joins what no query sees
            tokens.append(count - hidden)
        least = max(int(SAFEGUARD * seen.keep), 1) if self.budget == "adakv" else seen.keep
        joined = join(alike.clone(), tokens, seen.keep, least)
        scores = torch.full(mass.shape, -torch.inf)
        for head, count in enumerate(seen.counts):
            stays = pivots(joined[head, :count], mass[head, :count])
            scores[head, stays] = mass[head, stays]
        return scores

    def merge(
        self, staying_: Tokens, leaving: Leaving, judged: Judged, memory_: torch.Tensor, ws: Workspace
    ) -> torch.Tensor:
        import torch

        from tightfit.kernels import ops
        from tightfit.kv.merge.merging import blend
        from tightfit.kv.merge.runs import borders, square_distances, weigh_gaussian

        assert judged.alike is not None
        pivots = borders(judged.alike, judged.stays)[leaving.places]
        n = len(staying_.keys)
        own, widths, changed = ws.empty(n), ws.empty(n), ws.empty(n, dtype=torch.bool)
        weights, at = ws.empty(leaving.count), 0
        for keys, _ in leaving.blocks():
            here = slice(at, at + len(keys))
            to = ws.empty(*keys.shape)
            ops.gather_rows(staying_.keys, pivots[here], to)
            square_distances(keys, to, weights[here])
            at = here.stop
        weigh_gaussian(weights, pivots, own, widths, changed)
        blend(staying_, leaving, pivots, (weights, weights), own)
        return changed
