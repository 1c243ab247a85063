"""What a method of the cache is: a dataclass of settings in one of the roles that a composition has.

Nothing here imports torch when it is imported: spec strings are read before anything heavy is loaded.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from tightfit.budget.mounts import in_memory
from tightfit.errors import UsageError
from tightfit.kernels.codec import Codec
from tightfit.kv.budgets import BUDGETS

if TYPE_CHECKING:
    import torch

    from tightfit.budget.ledger import Arena, Workspace
    from tightfit.kernels.attention import Scoring
    from tightfit.kernels.pages import Pages, Staging
    from tightfit.kv.base import LayerLayout, Step
    from tightfit.kv.fitted import Known
    from tightfit.kv.lower import LowerStore
    from tightfit.kv.select.selecting import Selecting, Where


BLOCK = 32  # tokens that become certain between two moments at which a cache lets go of tokens or codes them


class Method:
    """A method fills ``roles``, of which each is there once in a composition."""

    name: ClassVar[str]
    roles: ClassVar[tuple[str, ...]]
    joined: ClassVar[bool] = False  # whether layers need each other: then they are planned together

    def excludes(self, other: Method) -> str | None:
        """Why it does not go with another method ("it ..."), if it does not."""
        return None

    def refusal(self, layout: LayerLayout) -> str | None:
        """Why it cannot be used on such a layer, if it cannot."""
        return None

    def of_layer(self, layer: int, known: Known) -> tuple[Method, ...]:
        """What it is in one layer, where layers differ by what is known of the model."""
        return (self,)


class Reads(Method):
    """A method that goes by what tokens there are: they are told to the cache, and it acts at each with which something
    ends, not at every 32. So no token can be tentative beside others."""

    marks: ClassVar[tuple[str, ...]]  # settings that name tokens: texts of one token each, or #NUMBER, with | between

    def ends(self, marks: Mapping[str, frozenset[int]], token: int) -> bool:
        """Whether tokens are let go of when this one is certain."""
        return False


class Naming(Reads):
    """A method that reads in the text which tokens the next ones see."""

    tokens: int

    def named(self, read: Read) -> tuple[list[int], int] | None:
        """The places that the last token sees, ascending, and from which one on it sees all; None where that is all."""
        raise NotImplementedError


@dataclass(frozen=True)
class Seen:
    """What an evictor may judge tokens by, of one layer and sequence.

    ``mass`` (kv_heads, n) float32 is the attention that each token received from the queries that were observed, put
    together over them and over the heads of its group as the evictor's ``fold`` says; ``positions`` (kv_heads, n)
    int32; ``counts`` of the n are there in each head. With each query that was observed, from position ``since`` on,
    ``groups`` heads look at a token. ``tokens`` came so far, of which the first ``prompt`` are not generated: they are
    of the last prompt, or came before it. Tokens are in the order of their positions.

    ``keep`` of each head stay, on average; no query sees positions up to ``horizon`` any more. Where both kinds of
    queries are observed, ``mass`` is from all of them, and ``lately`` (kv_heads, n) from the last ones, those from
    ``since`` on. ``alike`` (kv_heads, n) float32 is the cosine of each key and the one before it, 0 for the first,
    where a merger ``compares``. ``read`` is what the tokens are, for methods that go by that.
    """

    mass: torch.Tensor
    positions: torch.Tensor
    counts: list[int]
    groups: int
    since: int
    tokens: int
    prompt: int
    keep: int
    horizon: int
    lately: torch.Tensor | None
    alike: torch.Tensor | None
    read: Read | None = None


class Read(NamedTuple):
    """``ids`` (tokens,) int32 of all tokens that came; ``marks`` are those that a method looks for, by the names of its
    settings."""

    ids: torch.Tensor
    marks: Mapping[str, frozenset[int]]


@dataclass(frozen=True)
class Evictor(Method):
    """Keeps ``keep`` tokens of each key-value head, on average of heads and layers as ``budget`` says; a number below 1
    is a share of the tokens so far. Tokens are let go whenever a chunk of the prompt has been computed, and then after
    every 32 tokens: between these moments there are up to 32 more."""

    keep: float = 512
    budget: str = "uniform"

    roles: ClassVar[tuple[str, ...]] = ("tokens",)
    observes: ClassVar[str] = "nothing"  # "all" queries, the "last" ones, `window` of them, or "both"
    window: ClassVar[int] = 0
    # How what queries give to a token is put together: its "sum", the "max" that one of them gives, or the "votes": how
    # many give it at least what they would if they looked alike at all tokens that came.
    fold: ClassVar[str] = "sum"
    anchors: ClassVar[int] = 0
    selective: ClassVar[bool] = False  # whether it may keep fewer than `keep`: it judges whenever tokens are certain

    def __post_init__(self) -> None:
        if self.budget not in BUDGETS:
            raise UsageError(f"there is no budget {self.budget!r}", f"Known ones: {', '.join(BUDGETS)}.")
        if self.budget == "dynamickv" and (self.selective or isinstance(self, Demoter | Merger | Rater)):
            raise UsageError(
                f"{self.name} is not for budget=dynamickv: layers let go of tokens there while others are judged, and "
                "all heads of as many",
                "Use budget=uniform.",
            )
        first, last = self.protected(max(int(self.keep), 1)) if self.keep >= 1 else (0, 0)
        if self.keep <= 0 or (self.keep >= 1 and self.keep < max(first + last, 2)):
            raise UsageError(
                f"{self.name} cannot keep {self.keep:g} tokens",
                f"Give keep={max(first + last, 2)} or more, or a share of the prompt such as keep=0.25.",
            )

    @property
    def joined(self) -> bool:  # type: ignore[override]
        return self.budget == "dynamickv"

    def excludes(self, other: Method) -> str | None:
        if self.budget == "dynamickv" and {"layers", "selector"} & set(other.roles):
            return "lets go of tokens of a layer while another one is computed (budget=dynamickv)"
        return None

    def kept(self, tokens: int) -> int:
        """How many tokens of each head stay of ``tokens`` that came."""
        return int(self.keep) if self.keep >= 1 else max(math.ceil(self.keep * tokens), sum(self.protected(1)), 2)

    def protected(self, keep: int) -> tuple[int, int]:
        """How many of the first and of the last tokens always stay where ``keep`` do."""
        return 0, 0

    def scores(self, seen: Seen) -> torch.Tensor:
        """(kv_heads, n) float32: those with the highest stay, and none with minus infinity. It may write to
        ``seen.mass``."""
        raise NotImplementedError


@dataclass(frozen=True)
class Streamer(Method):
    """Of some heads everything stays; the others, streaming heads, keep the first ``sinks`` tokens and the last
    ``recent``, as soon as a chunk of the prompt has been computed, and then after every 32 tokens.

    Layers in which the model has a window of its own stay as they are.
    """

    sinks: int = 4
    recent: int = 512

    roles: ClassVar[tuple[str, ...]] = ("tokens",)
    observes: ClassVar[str] = "last"
    window: ClassVar[int] = 0  # of the last queries of a prompt's chunk that are observed
    fold: ClassVar[str] = "sum"

    def __post_init__(self) -> None:
        if self.sinks < 0 or self.recent < 1:
            raise UsageError(
                f"{self.name} cannot keep {self.sinks} first and {self.recent} last tokens",
                "Give sinks=0 or more, and recent=1 or more.",
            )

    def excludes(self, other: Method) -> str | None:
        if {"layers", "selector"} & set(other.roles):
            return "gives each head of a layer tokens of its own, and layers theirs while others are computed"
        return None

    @property
    def short(self) -> int:
        """How many tokens a streaming head keeps."""
        return self.sinks + self.recent

    @property
    def streaming_share(self) -> float:
        """About how many of all heads stream."""
        raise NotImplementedError

    def streams(self, layouts: Sequence[LayerLayout], known: Known) -> list[list[bool]] | None:
        """Of each layer which key-value heads stream; None if the prompt says which layers do."""
        return None

    def lazy(self, layers: int) -> int:
        """How many of so many layers stream where the prompt says which."""
        raise NotImplementedError


@dataclass(frozen=True)
class Structured(Evictor, Reads):
    """An evictor that keeps tokens for what they are; ``keep`` is the most, then the oldest go."""

    selective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.budget != "uniform":
            raise UsageError(
                f"{self.name} has no scores that budget={self.budget} could go by", "Leave the budget out."
            )
        super().__post_init__()

    @property
    def reuses(self) -> bool:
        """Whether what comes next stands right behind what is kept, and that is turned to where it then stands."""
        return False

    def stays(self, read: Read) -> torch.Tensor:
        """(tokens,) bool: which of all tokens that came may be kept."""
        raise NotImplementedError

    def scores(self, seen: Seen) -> torch.Tensor:
        assert seen.read is not None
        stays = self.stays(seen.read)[seen.positions.long()]
        return seen.positions.float().masked_fill(~stays, -math.inf)


@dataclass(frozen=True)
class Rater(Evictor):
    """An evictor that knows what a token is worth when it comes: ``seen.mass`` is what :meth:`rate` said then."""

    observes: ClassVar[str] = "itself"

    def prepare(self, layer: int, tensors: Mapping[str, torch.Tensor], arena: Arena) -> Any:
        """What rating the tokens of a layer takes, in ``arena``; ``tensors`` is what is known of the model."""
        raise NotImplementedError

    def rate(
        self,
        prepared: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        worth: torch.Tensor,
        step: Step,
        dtype: torch.dtype,
        ws: Workspace,
    ) -> None:
        """Rates a step's tokens, ``q`` (n, heads, key_dim), ``k`` (n, kv_heads, key_dim) before they are turned and
        ``v`` (n, kv_heads, value_dim), into ``worth`` (n, kv_heads). Prompts are multiplied in ``dtype``. Computes with
        operations alone, rows that decode each by itself."""
        raise NotImplementedError


class Tokens(NamedTuple):
    """Keys (n, key_dim) and values (n, value_dim) of one head in float32. No values where they are part of the keys."""

    keys: torch.Tensor
    values: torch.Tensor | None


class Leaving(Protocol):
    """The tokens of one head that are let go of."""

    @property
    def count(self) -> int: ...

    @property
    def places(self) -> torch.Tensor:
        """(n,) int64, ascending: which of the head's tokens they are."""

    def only(self, which: torch.Tensor) -> Leaving:
        """Those of them that ``which`` (m,) int64 names, ascending."""

    def blocks(self) -> Iterator[Tokens]:
        """All of them, in order, some at a time, in scratch memory until the next ones are asked for."""


class Judged(NamedTuple):
    """The tokens of one head as :class:`Seen` had them, (n,) each, after they were judged."""

    layer: int
    stays: torch.Tensor  # (m,) int64, ascending: the places among them of those that stay
    positions: torch.Tensor
    mass: torch.Tensor
    alike: torch.Tensor | None
    decoding: bool  # they were judged between two tokens that decode, not as part of a prompt


@dataclass(frozen=True)
class Merger(Evictor):
    """An evictor that puts something of the tokens that are let go of into those that stay. It may leave in the arrays
    of :class:`Seen` what it wants to know again when it merges."""

    remembers: ClassVar[int] = 0  # numbers of each layer, sequence and head; they are NaN when a sequence begins
    compares: ClassVar[bool] = False  # neighbouring keys, when it judges

    def merge(
        self, staying_: Tokens, leaving: Leaving, judged: Judged, memory_: torch.Tensor, ws: Workspace
    ) -> torch.Tensor:
        """Changes tokens that stay, and what is remembered (``remembers``,) float32; gives (n,) bool which of them were
        changed, in scratch memory of the enclosing frame. Computes with operations alone: in a dry run it takes its
        scratch and nothing else."""
        raise NotImplementedError


class Tabled(Method):
    """A method whose codecs may have tables beside the pages, which the first tokens of each sequence decide."""

    queries: ClassVar[int] = 0  # the last ones of a prompt, or of its first chunk, that it wants to see

    def table(self, codec: Codec, numbers: torch.Tensor, q: torch.Tensor, of_keys: bool) -> torch.Tensor:
        """(kv_heads, codec.side) float32 for keys or values ``numbers`` (kv_heads, n, dim) and queries (m, heads,
        key_dim)."""
        raise NotImplementedError


class Coder(Tabled):
    """Codes all tokens of the (first) store but the last ``recent``."""

    bits: ClassVar[int]
    recent: int

    def codec(self, dim: int, of_keys: bool, as_they_are: int) -> Codec:
        """How it stores keys or values of ``dim`` features; a number of the cache's own type takes ``as_they_are``
        bits."""
        raise NotImplementedError


@dataclass(frozen=True)
class Selector(Method):
    """Everything that is kept stays, and a token that decodes reads about ``tokens`` of each key-value head; the first
    ``full`` layers see everything, and prompts do."""

    tokens: int = 512
    full: int = 2

    roles: ClassVar[tuple[str, ...]] = ("selector",)
    unit: ClassVar[int] = 1  # tokens that are chosen together

    def __post_init__(self) -> None:
        if self.tokens < 32 or self.full < 0:
            raise UsageError(
                f"{self.name} cannot read {self.tokens} tokens, and all of them in {self.full} layers",
                "Give tokens=32 or more, and full=0 or more.",
            )

    def selects(self, layer: int, layout: LayerLayout) -> bool:
        """Whether tokens that decode see only some of a layer."""
        return layer >= self.full and layout.window is None

    @property
    def bounds(self) -> int:
        """Of how many parts of each page it wants the bounds of the keys."""
        return 0

    def reads(self, tokens: int) -> float:
        """How many of ``tokens`` that can be chosen among one that decodes reads, on average."""
        return min(self.tokens // self.unit * self.unit, tokens)

    def excludes(self, other: Method) -> str | None:
        from tightfit.kv.evict.window import Window

        return "chooses among tokens that a window hides" if isinstance(other, Window) else None

    def select(self, where: Where) -> Selecting:
        """What selects in one layer."""
        raise NotImplementedError


@dataclass(frozen=True)
class Rest(Method):
    """What is let go of still counts: a state of constant size takes it up, and queries look at that too.

    What it gives is folded into attention by the logarithms of what both divide by, to base 2, so it is a part of the
    softmax like any stretch of tokens."""

    roles: ClassVar[tuple[str, ...]] = ("rest",)

    def remembers(self, layout: LayerLayout) -> int:
        """How many float32 numbers each sequence and head has as its state; they are 0 when a sequence begins."""
        raise NotImplementedError

    def take_up(self, layer: int, head: int, leaving: Leaving, memory_: torch.Tensor, ws: Workspace) -> None:
        """Puts the tokens that a key-value head lets go of into its state (numbers,). Computes with operations alone:
        in a dry run it takes its scratch and nothing else."""
        raise NotImplementedError

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
        """Attention of ``q`` (n, heads, key_dim) over the states (sequences, kv_heads, numbers) of their sequences
        ``slots`` (n,) int32, into ``out`` (n, heads, value_dim) and ``lse`` (n, heads), -inf where there is nothing
        yet. Computes with operations alone, each row by itself."""
        raise NotImplementedError


class Lowering(Tabled):
    """A method with a lower store (:mod:`tightfit.kv.lower`)."""

    def lower(self, layout: LayerLayout, as_they_are: int) -> tuple[Codec, Codec]:
        """How a layer's lower store keeps keys and values; numbers of the cache's own type take ``as_they_are`` bits.
        If these have fewer features than the layer's, the store's matrices say which."""
        raise NotImplementedError

    def merges(self, layout: LayerLayout) -> int:
        """How many neighbouring heads of a layer are one in its lower store: the sum of what they are projected to.
        They let go of the same tokens."""
        return 1


@dataclass(frozen=True)
class Demoter(Evictor, Lowering):
    """An evictor whose tokens are not gone when they leave: they go on in a lower store, and queries see them there.
    Layers with a sliding window have none, and keep all that it shows as it is."""

    def prepare(self, layer: int, store: LowerStore, known: Known) -> None:
        """Writes the matrices of a layer's lower store, which has some if it keeps fewer features."""

    def store(self, before: LowerStore | None, *arguments: Any) -> LowerStore:
        """A layer's lower store, of the arguments of :class:`~tightfit.kv.lower.LowerStore`; ``before`` is that of the
        last layer before it that has one."""
        from tightfit.kv.lower import LowerStore

        return LowerStore(self, *arguments)


class Group(NamedTuple):
    """Key-value ``heads`` of consecutive ``layers``, which look at distant tokens alike."""

    layers: range
    heads: range


@dataclass(frozen=True)
class Grouper(Evictor):
    """An evictor whose tokens are not gone when they leave: layers keep them together
    (:mod:`tightfit.kv.share.distant`). The same tokens leave in all heads and layers; layers with a sliding window keep
    all that it shows."""

    def groups(self, layouts: Sequence[LayerLayout], known: Known) -> list[Group]:
        """Of all heads of all layers without a window the group that each is in."""
        raise NotImplementedError


@dataclass(frozen=True)
class Quantizer(Coder):
    """Codes of few bits for all tokens but the last ``recent`` ones, which stay as they are. ``of`` says whether that
    is for keys, values or both."""

    recent: int = 128
    of: str = "both"

    def __post_init__(self) -> None:
        if self.of not in ("both", "keys", "values"):
            raise UsageError(f"{self.name} is not for {self.of!r}", "Use of=keys, of=values or of=both.")
        if self.recent < 0:
            raise UsageError(f"{self.name} cannot leave {self.recent} tokens as they are", "Give recent=0 or more.")

    def codec(self, dim: int, of_keys: bool, as_they_are: int) -> Codec:
        return Codec(self.bits, dim, per_channel=of_keys)

    @property
    def roles(self) -> tuple[str, ...]:  # type: ignore[override]
        return {"both": ("codec of keys", "codec of values"), "keys": ("codec of keys",)}.get(
            self.of, ("codec of values",)
        )


@dataclass(frozen=True)
class Tier(Method):
    """Each head's last ``resident`` tokens are in memory, in whole pages, and the others in a file without a name in
    ``folder`` (default: the system's for temporary files)."""

    resident: int = 256
    folder: str = ""

    roles: ClassVar[tuple[str, ...]] = ("tier",)
    step: ClassVar[int] = 1  # pages that go to the file at once

    def __post_init__(self) -> None:
        if self.resident < 0:
            raise UsageError(f"{self.name} cannot keep {self.resident} tokens in memory", "Give resident=0 or more.")

    def open(self) -> int:
        """A new file's descriptor. Raises UsageError if the folder is in memory or cannot be written."""
        folder = self.folder or tempfile.gettempdir()
        if in_memory(folder):
            raise UsageError(
                f"{folder} lies in memory (tmpfs): pages there would count twice",
                f"Name a folder on a disk: {self.name}(folder=...), or set TMPDIR.",
            )
        try:
            file, path = tempfile.mkstemp(prefix="tightfit-kv-", dir=folder)
        except OSError as error:
            raise UsageError(
                f"{folder} cannot hold a cache: {error.strerror}", f"Name another: {self.name}(folder=...)."
            ) from None
        os.unlink(path)
        return file

    def stage(self, layers: Sequence[Pages], selected: Sequence[bool], arena: Arena) -> list[Staging]:
        """Has pages of the file brought into memory in ``arena`` before they are wanted, if they are. ``layers`` are
        looked at in this order; of those that are ``selected`` from, tokens that decode see only some pages."""
        return []
