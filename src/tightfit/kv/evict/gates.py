"""Gates of heads, which are learned, and tell those that look far back from those that do not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.errors import UsageError
from tightfit.kv.evict.heads import all_but
from tightfit.kv.fitted import Findings, Fitted, Known, Observed, Progress, attention_weights
from tightfit.kv.method import Streamer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from tightfit.kernels.attention import Scoring
    from tightfit.kv.base import LayerLayout

PASSKEYS, NAME, KEY = 4, 2, 8  # passkeys of a sample; random tokens by which one is asked for, and of itself
RATE = 0.05
REGULAR = 0.05  # how much the mean gate counts beside the error (the paper's)


@dataclass(frozen=True)
class Gated(Streamer, Fitted):
    """The share ``retrieval`` of all key-value heads keeps everything, the others stream (DuoAttention,
    https://arxiv.org/abs/2410.10819).

    Which ones is learned by `tightfit fit`: each head has a gate from 1 (its own attention) to 0 (first and recent
    tokens alone) and gives the mixture; ``steps`` steps of Adam make the gates small, and the final hidden states where
    passkeys are repeated at the end of a text what they were. The highest gates are those of retrieval heads. Samples
    have ``sample`` tokens of the text, in which passkeys of random tokens are hidden, and recent tokens are an eighth
    of them; the paper's are up to 32000 tokens long, in 2000 steps. The error is measured in shares of the hidden
    states' own size.
    """

    retrieval: float = 0.25
    sample: int = 512
    steps: int = 60

    about: ClassVar[str] = "heads"

    def __post_init__(self) -> None:
        least = 8 * (PASSKEYS + 1) * (NAME + KEY)
        if not 0 <= self.retrieval <= 1 or self.sample < least or self.steps < 1:
            raise UsageError(
                f"{self.name} cannot learn a share of {self.retrieval:g} of the heads in {self.steps} steps of "
                f"{self.sample} tokens",
                f"Give retrieval from 0 to 1, sample={least} or more, and steps=1 or more.",
            )
        super().__post_init__()

    @property
    def streaming_share(self) -> float:
        return 1 - self.retrieval

    def fitted_by(self) -> str:
        return f"{self.name}(sinks={self.sinks},sample={self.sample},steps={self.steps})"

    def fit(self, model: Observed, progress: Progress) -> Findings:
        """The gate of each layer and key-value head (layers, kv_heads)."""
        import torch

        texts = model.samples(self.sample, 64)
        length = len(texts[0])
        if length < 8 * PASSKEYS * (NAME + KEY):
            raise UsageError(f"{length} tokens are too few to hide passkeys in", "Load the model with more --context.")
        layouts, network = model.layouts, model.network()
        # Scores, weights and their gradients of both kinds of attention in all layers.
        model.take_room(8 * 4 * length**2 * sum(each.heads for each in layouts), f"gradients of {length} tokens")
        words, generator = torch.tensor(sorted(set(model.tokens))), torch.Generator().manual_seed(0)
        gates = torch.ones(len(layouts), max(each.kv_heads for each in layouts), requires_grad=True)
        optimizer = torch.optim.Adam([gates], RATE)

        def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            own = network.attention(layer, q, k, v)
            if layouts[layer].window is not None:
                return own
            gate = gates[layer, : k.shape[2]].repeat_interleave(q.shape[2] // k.shape[2])[:, None]
            return gate * own + (1 - gate) * _streaming(q, k, v, model.scorings[layer], self.sinks, length // 8)

        for step in range(self.steps):
            tokens, asked = _hide(torch.tensor(texts[step % len(texts)]), words, generator)
            with torch.no_grad():
                wanted = network.hidden(tokens[None])[0, asked]
            found = network.hidden(tokens[None], attend)[0, asked]
            error = (found - wanted).square().mean() / wanted.square().mean()
            optimizer.zero_grad()
            (error + REGULAR * gates.mean()).backward()
            optimizer.step()
            with torch.no_grad():
                gates.clamp_(0, 1)
            progress(step + 1, self.steps)
        result = gates.detach().clone()
        report = {"gates": result.tolist(), "error": float(error.detach())}
        open_ = int((result > 0.5).sum())
        return Findings({"gates": result}, report, [f"{open_} of {result.numel()} gates are more than half open"])

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        return tensors["gates"].ndim == 2 and len(tensors["gates"]) == layers

    def streams(self, layouts: Sequence[LayerLayout], known: Known) -> list[list[bool]]:
        return all_but(layouts, [(known.of(self)["gates"], self.retrieval)])


def _hide(text: torch.Tensor, words: torch.Tensor, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A text (n,) in which passkeys are hidden, each behind its name, and repeated at the end; and the places (m,) of
    the tokens behind which the repeated ones come."""
    import torch

    both, tokens = NAME + KEY, text.clone()
    picked = words[torch.randint(len(words), (PASSKEYS, both), generator=generator)]
    end = len(tokens) - PASSKEYS * both
    depths = torch.randperm(end * 3 // 4 // both, generator=generator)[:PASSKEYS] * both
    for passkey, depth in zip(picked, depths.tolist(), strict=True):
        tokens[depth : depth + both] = passkey
    order = torch.randperm(PASSKEYS, generator=generator)
    tokens[end:] = picked[order].flatten()
    asked = torch.arange(NAME - 1, both - 1) + torch.arange(PASSKEYS)[:, None] * both + end
    return tokens, asked.flatten()


def _streaming(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scoring: Scoring, sinks: int, recent: int
) -> torch.Tensor:
    """Attention (b, n, heads, value_dim) of queries (b, n, heads, key_dim) to first and recent tokens alone."""
    import torch

    groups, places = q.shape[2] // k.shape[2], torch.arange(q.shape[1])
    behind = places[:, None] - places
    seen = (behind >= 0) & ((behind < recent) | (places < sinks))
    products = torch.einsum("bnhd,bmhd->bhnm", q, k.repeat_interleave(groups, 2))
    return torch.einsum("bhnm,bmhd->bnhd", attention_weights(products, ~seen, scoring), v.repeat_interleave(groups, 2))
