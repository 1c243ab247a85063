"""A plan is a file: everything the engine needs to start, readable and editable. Imports nothing of this package."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

VERSION = 1


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelRef(Strict):
    """Which checkpoint a plan is for."""

    name: str
    fingerprint: str
    family: str
    parameters: int


class LayerPlan(Strict):
    """How the matrices of one layer are stored (a spec string such as ``int4(group=32)``) and where they lie."""

    format: str
    placement: str = "resident"
    nbytes: int


class Numerics(Strict):
    """What fixes the bits of a result, beside the formats."""

    gemm: str = Field(description="type that prefill multiplies in: bfloat16 or float32")
    activations: str = "float32"
    kv: str = Field(description="type of the cached keys and values")


class Plan(Strict):
    """What to run, how, and what it takes. Sizes are bytes.

    ``layers`` has one entry for each decoder layer; ``outer`` is how the embeddings and the head are stored.
    ``accounts`` is what each account may take; their sum is at most ``budget``.
    """

    version: int = VERSION
    model: ModelRef
    budget: int
    context: int = Field(description="tokens kept of each sequence")
    sequences: int = Field(description="sequences that run at once")
    accounts: dict[str, int]
    outer: LayerPlan = Field(description="embeddings, head and final norm")
    layers: tuple[LayerPlan, ...]
    cache: str = "exact"
    prefill: str = "chunked"
    chunk: int = Field(description="prompt tokens computed at once")
    threads: int
    numerics: Numerics

    @property
    def total(self) -> int:
        """Bytes that are promised in all."""
        return sum(self.accounts.values())
