"""A state of constant size that keeps what was evicted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Fitted, Observed, Progress, Sample
from tightfit.kv.method import Leaving, Merger, Method, Rest

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Workspace
    from tightfit.kernels.attention import Scoring
    from tightfit.kv.base import LayerLayout

LOOK_AT_ONCE = 64  # queries that look at states
SAMPLE, SAMPLES = 512, 10  # tokens of a text, and texts; the last is held out


@technique(
    seam="kv",
    name="less",
    paper="https://arxiv.org/abs/2402.09398",
    exact=False,
    summary="beside a method that lets go of tokens: a small state of constant size by which these still count",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class Less(Rest, Fitted):
    """Low-rank Embedding Sidekick with Sparse policy: ``less+h2o(keep=256)``. Of each token that another method lets go
    of, psi(k) and psi(k) v are added to a state of ``rank`` rows for each sequence and head, and a query finds phi(q)
    psi(k) of each of them instead of exp(q . k): one softmax over what was kept and the state. phi and psi are small
    networks with ``hidden`` units that take turned queries and keys.

    They are trained layer by layer as the paper does it, to give the layer's output of a model that keeps everything
    where H2O keeps a share ``keep`` of a text: 40 epochs over 512 tokens of a few texts here, 512 texts of 4096 tokens
    and 512 units in the paper. It trains anew for each method and share, and finds that what was trained for one serves
    others. phi is each query head's own; heads that share keys and values share psi and the state.

    On the embedded model, trained on texts of 256 tokens, layers' outputs have 0.05 (the first) to 1.00 of the square
    error that H2O alone makes, 0.75 on average; but what the model says after 1500 tokens gains nothing by that: with
    256 kept, KL divergence is 0.111 with the state and 0.104 without, with 128 0.191 and 0.188. The state takes 32 KiB
    for a sequence there, and the kernel functions 0.9 MiB once.

    What a window of the model hides could not be taken out of the state again, so layers with windows are refused, as
    is latent attention. A method that merges what it lets go of puts it somewhere else already.
    """

    rank: int = 8
    hidden: int = 64
    keep: float = 0.1

    computes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.rank < 1 or self.hidden < 1 or not 0 < self.keep < 1:
            raise UsageError(
                f"less cannot have rank {self.rank} and {self.hidden} units, trained where {self.keep:g} is kept",
                "Give rank=1 and hidden=1 or more, and keep between 0 and 1.",
            )

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, Merger):
            return "keeps what is let go of in a state, and the other merges it already"
        return None

    def refusal(self, layout: LayerLayout) -> str | None:
        if layout.shared:
            return "it has latent attention"
        return None if layout.window is None else "tokens that a window hides cannot be taken out of its state"

    # ---- finding the kernel functions ----

    def fit(self, model: Observed, progress: Progress) -> Findings:
        from tightfit.kv.compose import Composition
        from tightfit.kv.merge.lowrank_state import Texts, train

        Composition((self,)).check(model.layouts)
        samples = model.samples(min(SAMPLE, len(model.tokens) // 2), SAMPLES)
        if len(samples) < 2 or any(each.softcap or each.sinks is not None for each in model.scorings):
            raise UsageError(
                f"{model.name} cannot be fitted with {len(samples)} texts of {SAMPLE} tokens",
                "Give a longer text; models that cap their scores or have sinks cannot be fitted.",
            )
        length = len(samples[0])
        model.take_room(
            4 * 10 * len(samples) * max(layout.heads for layout in model.layouts) * length**2, "training a layer"
        )
        tensors: dict[str, torch.Tensor] = {}
        kept, lines, errors = max(int(self.keep * length), 2), [], []
        for layer, seen in enumerate(model.layers(samples)):
            project, scale = model.weights(layer)["o_proj"], model.scorings[layer].scale
            parts = [Texts(*_stacked(part), scale, project, kept) for part in (seen[:-1], seen[-1:])]
            found, without, error = train(parts[0], parts[1], self.hidden, self.rank)
            tensors |= {f"{layer}.{name}": tensor for name, tensor in found.items()}
            errors.append((without, error))
            progress(layer + 1, len(model.layouts))
            lines.append(f"layer {layer}: {error / without:.2f} of the square error that h2o alone makes")
        report = {"tokens": sum(map(len, samples)), "h2o": [a for a, _ in errors], "less": [b for _, b in errors]}
        return Findings(tensors, report, lines)

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        last = [tensors[f"{layer}.k_last"].shape[1:] for layer in range(layers)]
        return len(tensors) == 5 * layers and all(shape == (self.rank, self.rank) for shape in last)

    # ---- computing with them ----

    def remembers(self, layout: LayerLayout) -> int:
        return self.rank * (1 + layout.value_dim)

    def take_up(self, layer: int, head: int, leaving: Leaving, memory_: torch.Tensor, ws: Workspace) -> None:
        from tightfit.kv.merge.lowrank_state import absorb

        weights = tuple(self.found[f"{layer}.{name}"][head] for name in ("k_first", "k_second", "k_last"))
        for keys, values in leaving.blocks():
            assert values is not None
            n = len(keys)
            scratch = ws.empty(n, self.hidden), ws.empty(n, self.rank), ws.empty(n, self.rank)
            absorb(keys, values, weights, scratch, memory_.view(self.rank, -1))

    def recall(
        self,
        layer: int,
        memory: torch.Tensor,
        slots: torch.Tensor,
        q: torch.Tensor,
        scoring: Scoring,
        out: torch.Tensor,
        lse: torch.Tensor,
        ws: Workspace,
    ) -> None:
        from tightfit.kernels import pages
        from tightfit.kv.merge.lowrank_state import gelu_, look

        heads, kv_heads = q.shape[1], memory.shape[1]
        for at in range(0, len(q), LOOK_AT_ONCE):
            rows = slice(at, min(at + LOOK_AT_ONCE, len(q)))
            with ws.frame():
                n = rows.stop - at
                inner, phi = ws.empty(n, heads, self.hidden), ws.empty(n, heads, self.rank)
                found = ws.empty(n, kv_heads, heads // kv_heads, 1 + out.shape[2])
                pages.project(q[rows], self.found[f"{layer}.q_first"], inner)
                gelu_(inner)
                pages.project(inner, self.found[f"{layer}.q_second"], phi)
                look(phi, slots[rows], memory, found, out[rows], lse[rows])


def _stacked(samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Turned queries, turned keys, and values of texts: (texts, heads, n, dim)."""
    import torch

    turned = [(*sample.turned(), sample.v) for sample in samples]
    q, k, v = (torch.stack(each).transpose(1, 2) for each in zip(*turned, strict=True))
    return q, k, v
