"""Tokens by codes of their keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tightfit.catalog import technique
from tightfit.errors import UsageError
from tightfit.kv.fitted import Findings, Fitted, Observed, Progress, Sample
from tightfit.kv.method import Method, Selector, Structured

if TYPE_CHECKING:
    import torch

    from tightfit.kv.base import LayerLayout
    from tightfit.kv.select.selecting import Selecting, Where

SAMPLE, SAMPLES = 256, 32  # tokens of a part of the text, and how many parts
ITERATIONS = 25


@technique(
    seam="kv",
    name="a2ats",
    paper="https://arxiv.org/abs/2502.12665",
    exact=False,
    summary="codes of keys from fitted codebooks say which tokens score highest, and those are read",
    calibration="a text (`tightfit fit`)",
)
@dataclass(frozen=True)
class A2ATS(Selector, Fitted):
    """Each key-value head has a codebook of ``codes`` keys as they are before they are turned, and each token the code
    of its key: the nearest where distances are weighed as the queries of a text look at them. A query is turned as if
    all tokens were ``distance`` behind it, so the codebook's scores stand for those of all tokens. It reads those with
    the best codes, ``tokens`` in all with the ``sinks`` first ones, and the last ``window`` in any case.

    What is read is attended to from where it really stands, by exact keys; the paper attends from that distance too.
    Heads of a group read together what any of them would give most. Codebooks are found by `tightfit fit`.

    On the embedded model 256 of 2000 tokens diverge half as much as pages of quest do (0.023 nats, 0.049), whose bounds
    take twice the bytes of codes in 32 bits, the codebook aside; but they answer 6 look-ups of 12, where quest answers
    7 and all tokens 11. At a distance of 1024 it diverges more than quest.
    """

    codes: int = 256
    distance: int = 256
    window: int = 64
    sinks: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.codes < 2 or min(self.distance, self.window, self.sinks) < 0 or self.sinks >= self.tokens:
            raise UsageError(
                f"a2ats cannot tell keys by {self.codes} codes at a distance of {self.distance}, with a window of "
                f"{self.window} and {self.sinks} sinks among {self.tokens} tokens",
                "Give codes=2 or more, no negative numbers, and fewer sinks than tokens.",
            )

    def fitted_by(self) -> str:
        return f"a2ats(codes={self.codes},distance={self.distance})"

    def refusal(self, layout: LayerLayout) -> str | None:
        return "its keys are latents, which queries do not look at as they are" if layout.shared else None

    def excludes(self, other: Method) -> str | None:
        if isinstance(other, Structured) and other.reuses:
            return "turns keys back by their positions in the text, and the other gives them others"
        return super().excludes(other)

    def share(self) -> float:
        return 0.0

    def fit(self, model: Observed, progress: Progress) -> Findings:
        import torch

        samples = model.samples(SAMPLE, SAMPLES)
        count = sum(len(sample) for sample in samples)
        if count < 2 * self.codes:
            raise UsageError(
                f"{count} tokens are too few for {self.codes} codes", f"Give a text of {2 * self.codes} tokens or more."
            )
        widest = max(layout.heads * layout.key_dim for layout in model.layouts)
        model.take_room(4 * count * (3 * widest + 2 * self.codes), "finding codebooks")
        tensors: dict[str, torch.Tensor] = {}
        errors = []
        for layer, seen in enumerate(model.layers(samples)):
            angles, interleaved = _angles(seen[0], model.name)
            q, k = torch.cat([one.q for one in seen]), torch.cat([one.k for one in seen])
            books, metrics = [], []
            for head in range(k.shape[1]):
                groups = q.shape[1] // k.shape[1]
                queries = turned(q[:, head * groups : (head + 1) * groups], angles, interleaved, self.distance)
                metric = _metric(queries.flatten(0, 1))
                book, error = _codebook(k[:, head] @ metric, self.codes)
                books.append(torch.linalg.solve_triangular(metric, book, upper=False, left=False))
                metrics.append(metric)
                errors.append(error)
            tensors[f"codebook.{layer}"], tensors[f"metric.{layer}"] = torch.stack(books), torch.stack(metrics)
            tensors[f"angles.{layer}"] = torch.cat([torch.tensor([float(interleaved)]), angles])
            progress(layer + 1, len(model.layouts))
        error = sum(errors) / len(errors)
        line = f"{self.codes} codes stand for the keys of {count} tokens; {error:.1%} of scores' energy is left out"
        return Findings(tensors, {"tokens": count, "error": error}, [line])

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        return all(tensors[f"codebook.{layer}"].shape[1] == self.codes for layer in range(layers))

    def select(self, where: Where) -> Selecting:
        from tightfit.kv.select.by_codes import ByCodes

        return ByCodes(where, self)


def turned(x: torch.Tensor, angles: torch.Tensor, interleaved: bool, by: float) -> torch.Tensor:
    """``x`` (n, heads, dim) as if it stood ``by`` tokens further on: its pairs are turned by that many ``angles``
    (half,)."""
    import torch

    from tightfit.kernels.reference import rotate_

    found = x.clone()
    tables = (by * angles).expand(len(x), -1)
    scratch = torch.empty(2, *x.shape[:2], len(angles))
    rotate_(found, tables.cos(), tables.sin(), interleaved, scratch[0], scratch[1])
    return found


def _angles(sample: Sample, name: str) -> tuple[torch.Tensor, bool]:
    """By how much (half,) each position turns pairs of features, which may be neighbours."""
    import torch

    if sample.turn is None:
        return torch.empty(0), False
    (cos, sin), positions = sample.turn.tables, torch.arange(len(sample.k)).view(-1, 1)
    angles = torch.atan2(sin[1], cos[1])
    tables = positions * angles
    if not torch.allclose(cos, tables.cos(), atol=1e-2) or not torch.allclose(sin, tables.sin(), atol=1e-2):
        raise UsageError(
            f"a2ats cannot turn keys of {name} back: its positions are not turned evenly", "Use another selector."
        )
    return angles, sample.turn.interleaved


def _metric(q: torch.Tensor) -> torch.Tensor:
    """Lower (dim, dim): the squared length of ``x @ metric`` is how much queries ``q`` (n, dim) give of x."""
    import torch

    moments = q.T @ q
    moments /= moments.square().mean().sqrt()
    lower: torch.Tensor = torch.linalg.cholesky(moments + 1e-4 * torch.eye(len(moments)))
    return lower


def _codebook(x: torch.Tensor, codes: int) -> tuple[torch.Tensor, float]:
    """The means (codes, dim) of clusters of ``x`` (n, dim), by k-means from centres that were drawn far from each other
    (k-means++), and the share of squared lengths that is lost. The same each time."""
    import torch

    generator = torch.Generator().manual_seed(0)
    centres = x[torch.randint(len(x), (1,), generator=generator)]
    nearest = torch.full((len(x),), torch.inf)
    while len(centres) < codes:
        nearest = torch.minimum(nearest, (x - centres[-1]).square().sum(1))
        drawn = torch.multinomial(nearest.clamp(min=1e-12), 1, generator=generator)
        centres = torch.cat([centres, x[drawn]])
    for _ in range(ITERATIONS):
        closest = (2 * x @ centres.T - centres.square().sum(1)).argmax(1)
        sizes = torch.bincount(closest, minlength=codes)
        sums = torch.zeros_like(centres).index_add_(0, closest, x)
        centres = torch.where(sizes[:, None] > 0, sums / sizes[:, None], centres)
    closest = (2 * x @ centres.T - centres.square().sum(1)).argmax(1)
    return centres, float((x - centres[closest]).square().sum() / x.square().sum())
