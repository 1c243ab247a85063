"""Slots of constant number into which learned convolutions fuse tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import spec_string, technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Fitted, Observed, Progress
from tightfit.kv.method import BLOCK, Judged, Leaving, Merger, Seen, Tokens

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Workspace
    from tightfit.kv.base import LayerLayout

SAMPLES = 64  # parts of the text that are learned from


@technique(
    seam="kv",
    name="lococo",
    paper="https://arxiv.org/abs/2406.05317",
    exact=False,
    summary="heavy hitters as they are, and a fixed number of slots into which learned convolutions fuse all others",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class LoCoCo(Fitted, Merger):
    """LoCoCo. Whenever tokens are too many, those of a head that received most attention from the last ``window``
    queries stay as they are, and the next ``slots`` ones become slots: each a learned mix (half at first) of itself and
    of all tokens that do not stay as they are, slots too, with weights softmax(relu(c)) over them. c is a convolution
    along these tokens in order, of their keys and values side by side, with a kernel of 21 and a channel for each slot;
    a layer has one for all of its heads. Keys are mixed as they were turned, as in the authors' program.

    `tightfit fit` trains the convolutions of all layers through the frozen model, with twice as many tokens as slots,
    for ``steps`` steps of eight times as many. Departures from the program: it trains by the loss of the next token,
    with gradients that end at each chunk, much longer and from wilder weights; here predictions are to be those of the
    model that keeps everything, chunks are of several lengths, down to the 32 tokens after which generated ones are
    judged. It judges by the queries of the last chunk, or the last one alone; its order is that of the cache, heavy
    tokens first, and here that of positions. A share ``recent`` of what is kept are the last tokens: none is, in the
    program, unless it is told.

    On the embedded model it does no better than dropping: after 1500 tokens, with 128 kept, KL divergence is 0.275, and
    0.280 if the same tokens stay and the others are dropped, 0.317 with h2o and 0.275 with snapkv (each within 0.09);
    none of them finds what is asked for. Training brings the divergence on an unseen text from 0.079 to 0.031 nats, and
    dropping has 0.033: half of the layers learn to mix nothing. Memory does not grow with the context, but the
    convolutions take 5.3 MiB there, as much as 1300 tokens.
    """

    keep: float = 128
    slots: int = 64
    window: int = 64  # type: ignore[misc]
    recent: float = 0.25
    steps: int = 100

    observes: ClassVar[str] = "last"
    computes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.slots < 1 or self.window < 1 or not 0 <= self.recent <= 0.5 or self.steps < 0:
            raise UsageError(
                f"lococo cannot have {self.slots} slots, a window of {self.window}, a share of {self.recent:g} recent "
                f"tokens and {self.steps} steps",
                "Give slots=1 and window=1 or more, recent from 0 to 0.5, and steps=0 or more.",
            )
        super().__post_init__()
        if self.keep < 2 * self.slots or self.budget != "uniform":
            raise UsageError(
                f"lococo cannot have {self.slots} slots among {self.keep:g} tokens with budget={self.budget}",
                f"Its slots are as many in every head and context: give keep={2 * self.slots} or more, and no budget.",
            )

    def refusal(self, layout: LayerLayout) -> str | None:
        if layout.shared:
            return "it has latent attention"
        return None if layout.window is None else "tokens that a window hides cannot be taken out of its slots"

    def protected(self, keep: int) -> tuple[int, int]:
        return 0, int(self.recent * keep)

    def scores(self, seen: Seen) -> torch.Tensor:
        return seen.mass

    def merge(
        self, staying_: Tokens, leaving: Leaving, judged: Judged, memory_: torch.Tensor, ws: Workspace
    ) -> torch.Tensor:
        import torch

        from tightfit.kv.merge.convolutions import fuse, mark

        n = len(judged.stays)
        changed = ws.empty(n, dtype=torch.bool)
        old = judged.stays[: n - self.protected(n)[1]]
        slots = judged.mass[old].argsort(descending=True, stable=True)[-self.slots :].sort().values
        found = tuple(self.found[f"{judged.layer}.{name}"] for name in ("taps", "bias", "mix"))
        fuse(staying_, slots, judged.stays[slots], leaving, found, ws)
        mark(changed, slots)
        return changed

    # ---- finding the convolutions ----

    def fitted_by(self) -> str:
        return spec_string(replace(self, keep=2 * self.slots))

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        slots = [tensors[f"{layer}.bias"].shape[0] for layer in range(layers)]
        return len(tensors) == 3 * layers and all(count == self.slots for count in slots)

    def fit(self, model: Observed, progress: Progress) -> Findings:
        import torch

        from tightfit.kv.compose import Composition
        from tightfit.kv.merge.convolutions import Training

        Composition((self,)).check(model.layouts)
        keep = 2 * self.slots
        samples = torch.tensor(model.samples(min(4 * keep, len(model.tokens) // 2), SAMPLES))
        if (
            len(samples) < 2
            or samples.shape[1] <= keep
            or any(s.softcap or s.sinks is not None for s in model.scorings)
        ):
            raise UsageError(
                f"{model.name} cannot be fitted with {len(samples)} texts of {samples.shape[1]} tokens",
                "Give a longer text; models that cap their scores or have sinks cannot be fitted.",
            )
        network = model.network()
        self._take_room(model, samples.shape[1], network.logits(network.hidden(samples[:1, :1])).shape[-1])
        chunks = BLOCK, keep, 2 * keep  # generated tokens come by the first, and those of a prompt together
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            training = Training(
                network, model.layouts, model.scorings, self.slots, self.protected(keep)[1], self.window
            )
            dropped = training.held_out(samples[-1:], chunks, mix=0.0)
            before = training.held_out(samples[-1:], chunks)
            for step in range(self.steps):
                picked, chunk = torch.randint(len(samples) - 1, (1,)), chunks[step % len(chunks)]
                training.step(samples[picked], chunk, 1 - step / self.steps)
                progress(step + 1, self.steps)
            after = training.held_out(samples[-1:], chunks)
        tensors = {
            f"{layer}.{name}": x for layer, each in enumerate(training.layers) for name, x in each.found().items()
        }
        report = {"tokens": samples.numel(), "dropped": dropped, "untrained": before, "trained": after}
        line = (
            f"divergence from the model with all tokens, with {keep} kept of a text that was not learned from: "
            f"{before:.3f} nats at first, {after:.3f} after {self.steps} steps, {dropped:.3f} without the others"
        )
        return Findings(tensors, report, [line])

    def _take_room(self, model: Observed, length: int, vocab: int) -> None:
        """For what gradients of a step need: of each token its scores and features in each layer, and predictions; and
        convolutions with their gradients and moments."""
        from tightfit.kv.merge.convolutions import KERNEL

        keep, tokens, weights = 2 * self.slots, 0, 0
        for layout in model.layouts:
            features = layout.key_dim + layout.value_dim
            chunks = -(-length // BLOCK)
            held = layout.kv_heads * chunks * (keep + BLOCK) * (6 * features + 4 * self.slots)
            tokens += 4 * layout.heads * length * (length + features) + held
            weights += self.slots * (features * KERNEL + 1)
        model.take_room(4 * (tokens + 4 * weights + 6 * length * vocab), "training")
