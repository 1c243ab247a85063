"""Different formats for different matrices of a model."""

from __future__ import annotations

from dataclasses import dataclass, fields

from tightfit.catalog import parse_one, technique
from tightfit.errors import UsageError
from tightfit.weights.formats.base import Format, Scheme


@technique(
    seam="weights",
    name="mixed",
    paper="",
    exact=False,
    summary="a format for each kind of matrix, as in mixed(down=int6,ends=int8,rest=int4(group=64))",
)
@dataclass(frozen=True)
class Mixed(Scheme):
    """Each field is the spec string of a format, or empty: those matrices are then stored as ``rest`` says.

    Of the fields that are given the first that applies is taken: ``ends`` for every matrix of the first and the last
    layer; ``embed`` for the embeddings (and the head of a model that shares them) and ``head`` for the head; ``down``
    for the projections back from a feed-forward part, of experts too; ``experts`` for the others of experts; ``mlp``
    for all of a feed-forward part; ``attention`` for those around attention. What llama.cpp's mixes such as Q4_K_M do
    with fixed rules are choices of these.
    """

    ends: str = ""
    embed: str = ""
    head: str = ""
    down: str = ""
    experts: str = ""
    mlp: str = ""
    attention: str = ""
    rest: str = "int4"

    def __post_init__(self) -> None:
        for field in fields(self):
            text = getattr(self, field.name)
            if (text or field.name == "rest") and not isinstance(parse_one("weights", text), Format):
                raise UsageError(
                    f"{field.name} of mixed cannot be {text!r}", "It is one format, such as int4(group=64)."
                )

    def of(self, param: str, layer: int | None, layers: int) -> Format:
        chosen = next(filter(None, (getattr(self, field) for field in _fields_of(param, layer, layers))))
        fmt: Format = parse_one("weights", chosen)
        return fmt


def _fields_of(param: str, layer: int | None, layers: int) -> list[str]:
    """The fields that apply to a parameter, the one that decides first."""
    if layer is None:
        return [{"embed_tokens": "embed", "lm_head": "head"}[param], "rest"]
    found = ["ends"] if layer in (0, layers - 1) else []
    part, _, projection = param.rpartition(".")
    if projection == "down_proj":
        found.append("down")
    if part == "experts":
        found.append("experts")
    found.append("mlp" if projection in ("gate_proj", "up_proj", "down_proj") else "attention")
    return [*found, "rest"]
