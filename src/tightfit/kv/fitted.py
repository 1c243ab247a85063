"""What methods of a cache must know of a model: found once by ``tightfit fit``, kept in the user's cache folder under
the model's fingerprint and the settings.

Nothing here imports torch when it is imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from tightfit.budget.machine import cache_folder, remember
from tightfit.catalog import spec_string
from tightfit.errors import CheckpointError
from tightfit.kv.method import Method

if TYPE_CHECKING:
    import torch

    from tightfit.kernels.attention import Scoring
    from tightfit.kv.base import LayerLayout, Turn

Progress = Callable[[int, int], None]  # told how much is done, of how much


class Findings(NamedTuple):
    """``tensors`` are what the method computes with; ``report`` (JSON) what a user wants to know of them, and ``lines``
    the same as sentences."""

    tensors: dict[str, torch.Tensor]
    report: dict[str, Any]
    lines: list[str]


class Fitted(Method):
    """A method that must know something of a model; ``found`` is that, in a cache."""

    found: ClassVar[Mapping[str, Any]]  # tensors
    about: ClassVar[str] = "features"  # "features", "heads" or "layers" of the model, of which it knows something

    def fitted_by(self) -> str:
        """The settings on which what is found depends, as a spec string."""
        return spec_string(self)

    def fit(self, model: Observed, progress: Progress) -> Findings:
        """Finds it. Raises UsageError where the model or the text will not do, BudgetError where there is no room."""
        raise NotImplementedError

    computes: ClassVar[bool] = False  # with the tensors, which a cache then keeps: they are of its account

    def with_found(self, tensors: Mapping[str, torch.Tensor]) -> Fitted:
        """The same method with what was found for it in ``found``."""
        method = replace(self)  # type: ignore[type-var]
        object.__setattr__(method, "found", tensors)
        return method

    def check(self, tensors: Mapping[str, torch.Tensor], layers: int) -> bool:
        """Whether ``tensors`` can be what was found for a model of so many layers."""
        return True


class Sample(NamedTuple):
    """One layer's queries (n, heads, key_dim), keys (n, kv_heads, key_dim) and values (n, kv_heads, value_dim) in
    float32 of a text's tokens, before they are turned; the layer turns the first two by ``turn`` where it has
    positions."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    turn: Turn | None

    def turned(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries and keys as they are multiplied."""
        from tightfit.kernels.reference import rotate_

        q, k = self.q.clone(), self.k.clone()
        if self.turn is not None:
            for x in (q, k):
                a, b = (x.new_empty(*x.shape[:2], self.turn.tables[0].shape[-1]) for _ in range(2))
                rotate_(x, *self.turn.tables, self.turn.interleaved, a, b)
        return q, k


def attention_weights(products: torch.Tensor, hidden: torch.Tensor, scoring: Scoring) -> torch.Tensor:
    """Attention of each query to each key, by their ``products`` (..., heads, n, m); ``hidden`` (n, m) bool says which
    keys a query does not see."""
    import torch

    scores = products * scoring.scale
    if scoring.softcap is not None:
        scores = scoring.softcap * (scores / scoring.softcap).tanh()
    scores = scores.masked_fill(hidden, -torch.inf)
    if scoring.sinks is not None:
        scores = torch.cat([scores, scoring.sinks.view(-1, 1, 1).expand(*scores.shape[:-1], 1)], -1)
    return scores.softmax(-1)[..., : products.shape[-1]]


Attend = Callable[..., "torch.Tensor"]


class Network(Protocol):
    """The model in plain torch and float32, through which gradients flow."""

    def hidden(self, tokens: torch.Tensor, attend: Attend | None = None) -> torch.Tensor:
        """The normalised final hidden states (b, n, hidden) of ``tokens`` (b, n) int64, from position 0 on.

        ``attend(layer, q, k, v)`` computes attention instead of the model's own: q (b, n, heads, key_dim) and k (b, n,
        kv_heads, key_dim) are turned, v is (b, n, kv_heads, value_dim); it gives (b, n, heads, value_dim)."""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """(..., vocab) of final hidden states."""

    def attention(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """What the model's own attention gives for the arguments of ``attend``."""


class Observed(Protocol):
    """A model that can be looked at, inside its budget.

    ``tokens`` are those of the text, ``scorings`` says how the queries of each layer look at keys, and layers whose
    ``kinds`` are equal could read each other's keys and values (None: those of no other)."""

    name: str
    tokens: list[int]
    layouts: list[LayerLayout]
    scorings: list[Scoring]
    kinds: list[object | None]

    def samples(self, length: int, count: int) -> list[list[int]]:
        """Up to ``count`` parts of the text, of ``length`` tokens each. Raises UsageError if it has not one."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without those that begin a sequence."""

    def take_room(self, nbytes: int, what: str) -> None:
        """Raises BudgetError if the budget does not leave so many bytes for ``what``."""

    def layers(self, samples: Sequence[Sequence[int]]) -> Iterator[list[Sample]]:
        """Layer after layer what it computes of each text, each from position 0 on."""

    def hidden(self, tokens: Sequence[int], owners: Sequence[int] | None = None) -> torch.Tensor:
        """The final hidden states (n, hidden) of a text, where of each layer ``owners`` says whose keys and values it
        reads."""

    def weights(self, layer: int) -> dict[str, torch.Tensor]:
        """A layer's parameters outside of mixtures, in float32: matrices (rows, cols) that multiply as ``x @ W.T`` by
        the names of :class:`~tightfit.model.spec.LayerSpec`, such as ``k_proj``."""

    def network(self) -> Network:
        """The model to be trained through. Raises UsageError for parts that it does not know, such as mixtures."""


@dataclass(frozen=True)
class Known:
    """What the methods of a cache know of the model: of each layer the one whose keys and values it reads (None: its
    own), and the tensors of each method. ``digest`` is of all of that."""

    owners: Sequence[int] | None = None
    tensors: Mapping[str, Mapping[str, torch.Tensor]] = field(default_factory=dict)
    digest: str = ""

    def of(self, method: Method) -> Mapping[str, torch.Tensor]:
        return self.tensors[method.name]


NOTHING = Known()


def findings_file(fingerprint: str, method: Fitted) -> Path:
    digest = hashlib.blake2b(method.fitted_by().encode(), digest_size=6).hexdigest()
    return cache_folder() / f"kv-{fingerprint[:32]}-{method.name}-{digest}.safetensors"


def write_findings(fingerprint: str, method: Fitted, findings: Findings) -> Path:
    """Keeps what was found, whole or not at all; gives the file. Raises FileError."""
    from safetensors.torch import save

    metadata = {"method": method.fitted_by(), "report": json.dumps(findings.report)}
    tensors = {name: tensor.contiguous() for name, tensor in findings.tensors.items()}
    return remember(findings_file(fingerprint, method), save(tensors, metadata))


def read_findings(name: str, fingerprint: str, method: Fitted, layers: int) -> dict[str, torch.Tensor]:
    """What was found for the model ``name``. Raises CheckpointError if that is nothing, or not of its layers."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    path = findings_file(fingerprint, method)
    find = f"Find it with `tightfit fit MODEL --kv '{spec_string(method)}' --text FILE`."
    try:
        tensors = load(path.read_bytes())
        fits = method.check(tensors, layers)
    except FileNotFoundError:
        raise CheckpointError(f"what {method.name} must know of {name} was never looked for", find) from None
    except (OSError, SafetensorError, KeyError, ValueError):
        fits = False
    if not fits:
        raise CheckpointError(f"{path} is not what {method.name} must know of {name}", find)
    return tensors


def known_for(methods: Sequence[Method], name: str, fingerprint: str, layers: int) -> Known:
    """What the methods of a cache know of a model. Raises CheckpointError as :func:`read_findings` does."""
    fitted = [method for method in methods if isinstance(method, Fitted)]
    if not fitted:
        return NOTHING
    import torch

    found = {method.name: read_findings(name, fingerprint, method, layers) for method in fitted}
    digest = hashlib.blake2b(digest_size=16)
    for tensors in found.values():
        for key, tensor in sorted(tensors.items()):
            digest.update(key.encode() + tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    owners = next((tensors["owners"].tolist() for tensors in found.values() if "owners" in tensors), None)
    return Known(owners, found, digest.hexdigest())
