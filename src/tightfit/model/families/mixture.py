"""What the mixtures share: a router, and experts in the forms in which checkpoints keep them."""

from __future__ import annotations

from collections.abc import Collection

from tightfit.checkpoints.config import Config
from tightfit.model.spec import MoeSpec, Parts, Source


def expert_count(config: Config, *keys: str) -> int:
    """The number of experts, under the first of ``keys`` that the file has."""
    return config.integer(next((key for key in keys if config.get(key) is not None), keys[0]))


def experts_per_token(config: Config, count: int) -> int:
    """``num_experts_per_tok``, of ``count`` experts."""
    return config.integer("num_experts_per_tok", maximum=count)


def router(parts: Parts, key: str, count: int, hidden: int, *, bias: bool = False) -> None:
    """The matrix that scores the experts; it stays in its own precision."""
    parts.matrix("router", key, count, hidden, bias=bias, exact=True)


def is_stacked(parts: Parts, names: Collection[str]) -> bool:
    """Whether all experts of a layer are kept in two tensors, as transformers 5 holds them in memory."""
    return f"{parts.prefix}mlp.experts.gate_up_proj" in names


def experts(
    parts: Parts,
    names: Collection[str],
    spec: MoeSpec,
    hidden: int,
    each: tuple[str, str, str] = (
        "mlp.experts.{expert}.gate_proj.weight",
        "mlp.experts.{expert}.up_proj.weight",
        "mlp.experts.{expert}.down_proj.weight",
    ),
) -> None:
    """Gate, up and down matrices of all experts: stacked, with gate and up in one or in two tensors, or else one tensor
    for ``each``."""
    if is_stacked(parts, names):
        gate = Source("mlp.experts.gate_up_proj", stacked=True)
        up = Source("mlp.experts.gate_up_proj", start=spec.intermediate_size, stacked=True)
        down = Source("mlp.experts.down_proj", stacked=True)
    elif f"{parts.prefix}mlp.experts.gate_proj" in names:
        gate, up, down = (Source(f"mlp.experts.{name}_proj", stacked=True) for name in ("gate", "up", "down"))
    else:
        gate, up, down = (Source(key) for key in each)
    parts.experts("experts.gate_proj", gate, spec.experts, spec.intermediate_size, hidden)
    parts.experts("experts.up_proj", up, spec.experts, spec.intermediate_size, hidden)
    parts.experts("experts.down_proj", down, spec.experts, hidden, spec.intermediate_size)


def shared_expert(parts: Parts, key: str, hidden: int, intermediate: int, *, bias: bool = False) -> None:
    """An expert that every token goes through."""
    parts.matrix("shared.gate_proj", f"{key}.gate_proj", intermediate, hidden, bias=bias)
    parts.matrix("shared.up_proj", f"{key}.up_proj", intermediate, hidden, bias=bias)
    parts.matrix("shared.down_proj", f"{key}.down_proj", hidden, intermediate, bias=bias)


def only(config: Config, key: str, value: object) -> None:
    """Raises CheckpointError if the file has ``key`` with another value than ``value``, the only one that is known."""
    if config.get(key) is not None and config.get(key) != value:
        raise config.wrong(key, str(value))
