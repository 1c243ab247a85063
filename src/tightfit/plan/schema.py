"""A plan is a file: everything the engine needs to start, readable and editable. Imports nothing of this package."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

VERSION: Literal[1] = 1
OWN = "own"  # as a format: the precision of the checkpoint, tensor by tensor
Bytes = Annotated[int, Field(ge=0)]
GemmType = Literal["bfloat16", "float32", "int8"]
ActivationType = Literal["int8", "float32"]
KvType = Literal["bfloat16", "float16", "float32"]
Schedule = Literal["chunked", "layered"]  # all layers for each chunk of a prompt, or all chunks in each layer

Preference = Literal["quality", "balanced", "speed"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(Strict):
    """Which checkpoint a plan is for."""

    name: str
    fingerprint: str
    family: str
    parameters: int
    converted: tuple[str, ...] = Field(default=(), description="types of the file of which 'own' rounds the scales")


class Stored(Strict):
    """How some matrices are stored (a spec string such as ``int4(group=32)``), and in how many bytes."""

    format: str
    nbytes: Bytes


class OuterPlan(Stored):
    """The matrices outside of the layers: in memory, or the embeddings, read row by row, and the rows of the head but
    the first ``resident`` on the disk."""

    placement: Literal["resident", "streamed"] = "resident"
    resident: int | None = Field(default=None, ge=0, description="rows of the head that stay in memory; null: all")


class LayerPlan(Stored):
    """The matrices of one layer: in memory, or all but its first ``resident`` parameters on the disk. Where the plan
    has ``experts``, theirs do not count: they are on the disk."""

    placement: Literal["resident", "streamed"] = "resident"
    resident: int | None = Field(default=None, ge=0, description="parameters of a streamed layer that stay in memory")


class ExpertsPlan(Strict):
    """Experts that are on the disk, but for those in ``slots`` slots; ``policy`` is a spec string such as
    ``score+gate``."""

    policy: str
    slots: int = Field(ge=1)


class PromptCachePlan(Strict):
    """Beginnings of prompts that are kept: in ``memory`` bytes of the kv account, on ``disk`` in so many bytes of files
    in ``folder``, or both."""

    memory: Bytes | None = None
    disk: Bytes | None = None
    folder: str = Field(default="", description="empty: in the user's cache folder")


class Numerics(Strict):
    """What fixes the bits of a result, beside the formats."""

    gemm: GemmType = Field(
        description="type that prefill multiplies in; int8 is what decoding does, and float32 where that rounds nothing"
    )
    activations: ActivationType = Field(
        default="int8", description="what decoding multiplies low-bit weights with: float32, or rounded to int8"
    )
    kv: KvType = Field(description="type of the cached keys and values")


class Plan(Strict):
    """What to run, how, and what it takes. Sizes are bytes.

    ``layers`` has one entry for each decoder layer; ``outer`` is how the embeddings and the head are stored.
    ``accounts`` is what each account may take; their sum is at most ``budget``.
    """

    version: Literal[1] = VERSION
    model: ModelRef
    budget: Bytes
    context: int = Field(ge=2, description="tokens kept of each sequence")
    sequences: int = Field(ge=1, description="sequences that run at once")
    accounts: dict[str, Bytes]
    outer: OuterPlan = Field(description="embeddings, head and final norm")
    layers: tuple[LayerPlan, ...]
    cache: str = Field(default="none", description="methods of the cache, a spec string; none keeps everything")
    prefill: Schedule = "chunked"
    prompt_cache: PromptCachePlan | None = Field(default=None, description="beginnings of prompts that are kept")
    buffers: int = Field(default=0, ge=0, description="that streamed layers are read into, ahead of their use")
    experts: ExpertsPlan | None = Field(default=None, description="where the experts of mixtures are on the disk")
    chunk: int = Field(ge=1, description="prompt tokens computed at once")
    threads: int = Field(ge=1)
    numerics: Numerics

    @property
    def streamed(self) -> bool:
        """Whether parts of layers are read from the disk in each step."""
        return any(layer.placement == "streamed" for layer in self.layers)

    @property
    def weights_bytes(self) -> int:
        """Bytes of matrices in memory, those of experts included."""
        return self.accounts["weights"] + self.accounts.get("experts", 0)

    @property
    def total(self) -> int:
        """Bytes that are promised in all."""
        return sum(self.accounts.values())
