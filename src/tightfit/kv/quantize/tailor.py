"""Layers whose attention is spread in few bits, and the others in a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from tightfit.catalog import spec_string, technique
from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE
from tightfit.kv.fitted import Findings, Fitted, Known, Observed, Progress, attention_weights
from tightfit.kv.method import Method, Tier
from tightfit.kv.quantize.int2 import Int2
from tightfit.kv.quantize.int4 import Int4
from tightfit.kv.quantize.int8 import Int8
from tightfit.kv.select.quest import Quest

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Arena
    from tightfit.kernels.attention import Scoring
    from tightfit.kernels.pages import Pages, Staging
    from tightfit.kv.fitted import Sample

SAMPLE, SAMPLES = 512, 4  # tokens of a part of the text, and how many parts
QUERIES = 64  # the last ones of a part are looked at
DOMINANT = 1 / 16  # of the tokens: what the most looked at of them receive


@technique(
    seam="kv",
    name="tailor",
    paper="https://arxiv.org/abs/2505.19586",
    exact=False,
    summary="layers with spread attention in two bits; of the others, in a file, what a token needs is fetched",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class Tailor(Fitted, Tier):
    """Layers in which attention is spread keep all tokens in ``bits`` bits but for ``recent`` ones. The others keep the
    last ``resident`` tokens in memory and all before them in a file as they are; a token that decodes fetches those
    ``tokens`` of each head, in pages of 32, whose bounds allow the highest scores, but for those that are there still.

    `tightfit fit` tells layers apart once by a text: attention is spread where the sixteenth of the tokens that is most
    looked at leaves at least ``threshold`` of the weight to all others, on average of heads and of the last queries.

    The paper quantises to one bit too, fetches tokens rather than pages, found by a few channels of keys with the
    layer before's queries, and so can begin to fetch a layer earlier; here bounds choose (as in quest), and what was
    not there is waited for. On the embedded model attention is spread in the first of 8 layers alone (0.84, else 0.07
    and less), as in the paper's. It reads least of all that choose, 1.8 MiB of 15.4 for a token after 3900, but at
    equal bytes loses more than few bits everywhere: a KL divergence of 0.20 with 3.9 MiB in memory, ``int2`` 0.12 with
    4.1; ``quest+host``, which reads 5.8 MiB, 0.09 with 1.9.
    """

    threshold: float = 0.25
    bits: int = 2
    recent: int = 128
    tokens: int = 256
    resident: int = 64

    roles: ClassVar[tuple[str, ...]] = ("codec of keys", "codec of values", "selector", "tier")
    about: ClassVar[str] = "layers"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.threshold <= 1 or self.bits not in (2, 4, 8):
            raise UsageError(
                f"tailor knows no layers with {self.threshold:g} of attention spread, or no codes of {self.bits} bits",
                "Give a threshold from 0, where all layers are spread, to 1, and bits=2, 4 or 8.",
            )
        self._few, self._chosen  # noqa: B018 (their settings are checked)

    @property
    def _few(self) -> Method:
        return {2: Int2, 4: Int4, 8: Int8}[self.bits](recent=self.recent)

    @property
    def _chosen(self) -> Quest:
        return Quest(tokens=self.tokens, full=0)

    def of_layer(self, layer: int, known: Known) -> tuple[Method, ...]:
        return (self._few,) if bool(known.of(self)["spread"][layer] >= self.threshold) else (self._chosen, self)

    def stage(self, layers: Sequence[Pages], selected: Sequence[bool], arena: Arena) -> list[Staging]:
        from tightfit.kernels import pages

        chosen = [each for each, some in zip(layers, selected, strict=True) if some]
        return pages.stage_pages(chosen, self.tokens // PAGE, arena)

    def fitted_by(self) -> str:
        return spec_string(Tailor())  # the threshold is applied to what is found

    def fit(self, model: Observed, progress: Progress) -> Findings:
        import torch

        samples, layers = model.samples(SAMPLE, SAMPLES), len(model.layouts)
        spread = torch.empty(layers)
        for layer, each in enumerate(model.layers(samples)):
            spread[layer] = torch.stack([spread_of(sample, model.scorings[layer]) for sample in each]).mean()
            progress(layer + 1, layers)
        kept = [layer for layer in range(layers) if spread[layer] >= self.threshold]
        lines = [
            f"attention leaves {', '.join(f'{part:.2f}' for part in spread.tolist())} of the weight to the tokens that "
            "are not most looked at, from the first layer to the last",
            f"{len(kept)} of {layers} layers are spread and quantised: {', '.join(map(str, kept)) or 'none'}",
        ]
        return Findings({"spread": spread}, {"spread": spread.tolist(), "quantised": kept}, lines)

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        return tensors["spread"].shape == (layers,)


def spread_of(sample: Sample, scoring: Scoring) -> torch.Tensor:
    """The share of attention that the last queries leave to all but the ``DOMINANT`` share of tokens, each its own."""
    import torch

    q, k = sample.turned()
    n, heads, _ = q.shape
    last = min(QUERIES, n)
    keys = k.repeat_interleave(heads // k.shape[1], 1)
    back = torch.arange(n - last, n)[:, None] - torch.arange(n)  # how far before each query
    hidden = (back < 0) | (back >= (scoring.window or n))
    given = attention_weights(torch.einsum("qhd,khd->hqk", q[-last:], keys), hidden, scoring)
    dominant = given.topk(max(round(n * DOMINANT), 1), dim=2).values.sum(2)
    return 1 - dominant.mean()
