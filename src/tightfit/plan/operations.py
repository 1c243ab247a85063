"""How many operations a token takes, from the architecture alone."""

from __future__ import annotations

from collections.abc import Sequence

from tightfit.model.spec import LayerSpec, ModelSpec, MoeSpec, Param


def operations_per_token(spec: ModelSpec, attended: Sequence[float]) -> float:
    """Multiplications and additions of a decoding step for one token that sees ``attended`` tokens in each layer: two
    for each weight of the matrices that it goes through, of a mixture those of the experts that are chosen, and two for
    each product of attention's scores and sums. Norms, activations and rotations, which are none of these, do not count
    (as in https://arxiv.org/abs/2001.08361)."""
    total = 2.0 * head(spec).count
    for layer, tokens in zip(spec.layers, attended, strict=True):
        total += 2 * sum(active(layer, param) * _size(param) for param in layer.params if param.is_matrix)
        total += attention_operations(layer, tokens)
    return total


def attention_operations(layer: LayerSpec, tokens: float) -> float:
    """Of scores and of the sum of values, for one query of each head and ``tokens`` keys."""
    attention = layer.attention
    return 2 * attention.heads * tokens * (attention.key_dim + attention.value_dim)


def active(layer: LayerSpec, param: Param) -> int:
    """How many copies of a parameter of ``layer`` one token goes through: of experts as many as are chosen."""
    if not param.experts:
        return 1
    assert isinstance(layer.mlp, MoeSpec)
    return layer.mlp.experts_per_token


def head(spec: ModelSpec) -> Param:
    """The matrix that makes logits: the embeddings' where these are tied."""
    name = "embed_tokens" if spec.tied else "lm_head"
    return next(param for param in spec.params if param.name == name)


def _size(param: Param) -> int:
    """Weights of one copy."""
    return param.shape[0] * param.shape[1]
