"""Distant tokens whose attention weights layers have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Fitted, Known, Observed, Progress, Sample
from tightfit.kv.lowrank.think import ThinK
from tightfit.kv.method import Coder, Group, Grouper, Method, Rest, Seen

if TYPE_CHECKING:
    import torch

    from tightfit.kernels.attention import Scoring
    from tightfit.kv.base import LayerLayout

SAMPLE, SAMPLES = 1024, 8  # tokens of a text, and texts that are looked at
QUERIES = 32  # of each: the last ones


@technique(
    seam="kv",
    name="pod",
    paper="https://arxiv.org/abs/2412.02252",
    exact=False,
    summary="first and recent tokens whole; of distant ones consecutive layers share the keys and weights of the first",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class PoD(Grouper, Fitted):
    """Proximal tokens over Distant tokens: ``sinks`` first tokens and recent ones, ``keep`` in all, have keys and
    values of their own in all layers. Of the others only the first layer of a group of consecutive layers keeps keys
    and computes scores; the others of the group keep values, which they sum up by its weights. Both parts are joined as
    one softmax divides.

    As in the paper, each (key-value) head has groups of its own, found from the lowest layer up: a layer joins the
    group below if its attention stays ``similar``, 1 minus the Jensen-Shannon divergence (to base 2) for the least
    similar query head. Here what is compared with a layer's attention is what it becomes when it joins, for the last
    queries of texts, so it also counts how much it gives to distant tokens at all.

    The paper trains 5 billion tokens more after that, with ``similar=0.5``, and can then leave distant tokens out where
    near ones have most of the weight; here nothing is trained. (Accounts of it differ in whose queries meet the shared
    keys in the layers that follow: without training it can only be the first layer's, whose weights are then reused.)

    On the embedded model with ``keep=128``, 10 of 16 heads follow, mostly in lower layers, where attention is local: a
    cache of 4096 tokens takes 11.5 of 16 MiB, 28% less, and of 20 numbers hidden in 3700 tokens 16 are found where
    everything finds 17; with ``similar=0.7`` it takes 11.0 MiB, 31% less, and 15 are found. Of evictors that keep as
    many bytes, h2o finds 11, snapkv 9, and a plain window 17. Text diverges more than where tokens are evicted by their
    scores: by 0.006 nats (0.022 with 0.7), h2o's by 0.0005.
    """

    keep: float = 256
    sinks: int = 16
    similar: float = 0.85

    def __post_init__(self) -> None:
        if self.sinks < 0 or not 0 <= self.similar <= 1:
            raise UsageError(
                f"pod cannot keep {self.sinks} first tokens, or find layers similar to {self.similar:g}",
                "Give sinks=0 or more, and similar between 0 and 1.",
            )
        if self.keep < 1 or self.budget != "uniform":
            raise UsageError("pod keeps a number of tokens, the same in all layers", "Give for example keep=512.")
        super().__post_init__()

    # ---- which tokens are near ----

    def protected(self, keep: int) -> tuple[int, int]:
        return self.sinks, max(keep - self.sinks, 1)

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.positions.float()

    # ---- what it goes with ----

    def refusal(self, layout: LayerLayout) -> str | None:
        return "latent attention keeps no keys beside its values" if layout.shared else None

    def excludes(self, other: Method) -> str | None:
        if "selector" in other.roles:
            return "reads distant tokens whole, and there is nothing to choose from"
        if "layers" in other.roles:
            return "groups the heads of layers as the model has them"
        if isinstance(other, ThinK):
            return "keeps distant keys with all their channels"
        if isinstance(other, Rest):
            return "lets go of no token"
        if isinstance(other, Coder) and any(other.codec(64, of_keys, 16).side for of_keys in (True, False)):
            return "keeps values of several layers together, and the other has a table for those of one"
        return None

    # ---- which layers follow ----

    def groups(self, layouts: Sequence[LayerLayout], known: Known) -> list[Group]:
        found = known.of(self)
        leads = [found[f"leads.{layer}"].tolist() for layer in range(len(layouts))]
        groups: list[Group] = []
        for layer, layout in enumerate(layouts):
            for head in range(layout.kv_heads if layout.window is None else 0):
                if leads[layer][head] != layer:
                    continue
                stop = layer + 1
                while stop < len(leads) and head < len(leads[stop]) and leads[stop][head] == layer:
                    stop += 1
                last = groups[-1] if groups else None
                if last is not None and last.layers == range(layer, stop) and last.heads.stop == head:
                    groups[-1] = Group(last.layers, range(last.heads.start, head + 1))
                else:
                    groups.append(Group(range(layer, stop), range(head, head + 1)))
        return groups

    def fit(self, model: Observed, progress: Progress) -> Findings:
        import torch

        keep, layouts = int(self.keep), model.layouts
        samples = model.samples(max(SAMPLE, 3 * keep), SAMPLES)
        if len(samples[0]) < keep + QUERIES:
            raise UsageError(
                f"{model.name} sees {len(samples[0])} tokens here, of which few are distant where {keep} are kept",
                "Give a longer --context, or keep fewer.",
            )
        widest = max(layout.heads for layout in layouts)
        model.take_room(4 * 8 * len(samples) * widest * QUERIES * len(samples[0]), "comparing the attention of layers")
        tensors: dict[str, torch.Tensor] = {}
        least = 1.0
        first: list[torch.Tensor] = []  # of each head, the scores (texts, group, queries, tokens) that are shared
        leads: list[int] = []
        for layer, seen in enumerate(model.layers(samples)):
            layout, found = layouts[layer], scores_of(seen, model.scorings[layer])
            own = list(found.unflatten(1, (layout.kv_heads, -1)).unbind(1))
            joins = layer > 0 and layout.window is None and layouts[layer - 1].window is None
            joins = joins and (layout.heads, layout.kv_heads) == (layouts[layer - 1].heads, layouts[layer - 1].kv_heads)
            distant = self.distant(len(samples[0]))
            if not joins:
                first, leads = own, [layer] * layout.kv_heads
            for head in range(layout.kv_heads if joins else 0):
                reached = similarity(own[head], first[head], distant)
                if reached >= self.similar:
                    least = min(least, reached)
                else:
                    first[head], leads[head] = own[head], layer
            tensors[f"leads.{layer}"] = torch.tensor(leads)
            progress(layer + 1, len(layouts))
        owners = [tensors[f"leads.{layer}"].tolist() for layer in range(len(layouts))]
        following = sum(lead != layer for layer, each in enumerate(owners) for lead in each)
        heads = sum(layout.kv_heads for layout in layouts)
        lines = [f"{following} of {heads} heads use the keys of another layer for distant tokens"]
        for layer, each in enumerate(owners):
            if any(lead != layer for lead in each):
                lines.append(f"layer {layer}: those of layer {', '.join(map(str, each))}")
        report = {"tokens": sum(map(len, samples)), "leads": owners, "following": following / heads, "similar": least}
        return Findings(tensors, report, lines)

    def distant(self, tokens: int) -> torch.Tensor:
        """Which of ``tokens`` are distant from the last queries: (queries, tokens) bool."""
        import torch

        back = torch.arange(tokens - QUERIES, tokens)[:, None] - torch.arange(tokens)
        return (back >= int(self.keep) - self.sinks) & (torch.arange(tokens) >= self.sinks)

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        leads = [tensors[f"leads.{layer}"].tolist() for layer in range(layers)]
        return all(
            lead in (layer, leads[layer - 1][head] if layer and head < len(leads[layer - 1]) else layer)
            for layer, each in enumerate(leads)
            for head, lead in enumerate(each)
        )


def scores_of(samples: list[Sample], scoring: Scoring) -> torch.Tensor:
    """What the last queries of texts score tokens, (texts, heads, queries, tokens)."""
    import torch

    found = []
    for sample in samples:
        q, k = sample.turned()
        n, heads, _ = q.shape
        keys = k.repeat_interleave(heads // k.shape[1], 1)
        scores = torch.einsum("qhd,khd->hqk", q[-QUERIES:], keys) * scoring.scale
        if scoring.softcap is not None:
            scores = (scores / scoring.softcap).tanh() * scoring.softcap
        own = torch.arange(n - QUERIES, n)[:, None]
        found.append(scores.masked_fill(torch.arange(n) > own, -torch.inf))
    return torch.stack(found)


def similarity(own: torch.Tensor, first: torch.Tensor, distant: torch.Tensor) -> float:
    """How similar attention by scores ``own`` (texts, heads, queries, tokens) is to that where those of ``distant``
    tokens (queries, tokens) are ``first``: for the head for which it is least so."""
    import torch

    p, r = own.softmax(-1), torch.where(distant, first, own).softmax(-1)
    middle = ((p + r) / 2).clamp(min=torch.finfo(torch.float32).tiny)  # half of the smallest number would be 0
    apart = sum((torch.xlogy(x, x) - torch.xlogy(x, middle)).sum(-1) for x in (p, r))
    divergence = torch.as_tensor(apart).mean((0, 2)) / (2 * torch.tensor(2.0).log())
    return 1 - float(divergence.max())
