"""A model in plain torch and float32, through which gradients flow: what methods of the cache are trained with.

It keeps whole sequences and all that gradients need, so it is for short texts; the decoder
(:mod:`tightfit.model.decoder`) is what models run with.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from tightfit.budget.ledger import Workspace
from tightfit.errors import UsageError
from tightfit.kernels.attention import Scoring
from tightfit.kv.fitted import Attend, attention_weights
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder
from tightfit.model.rope import tables
from tightfit.model.spec import Activation, AttentionSpec, LayerSpec, MlpSpec, RopeSpec
from tightfit.weights.formats.base import Matrix
from tightfit.weights.placement.base import Parameters

Rotation = tuple[Tensor, Tensor]


def matrices(parameters: Parameters, ws: Workspace) -> dict[str, Tensor]:
    """Parameters in float32 by name: matrices (rows, cols) as ``x @ W.T`` multiplies by them, and vectors."""
    found = {}
    for name, value in parameters.items():
        if isinstance(value, Matrix):
            dense = torch.empty(value.rows, value.cols)
            for rows in torch.arange(value.rows).split(4096):
                value.decode(rows, dense[rows[0] : rows[-1] + 1], ws)
            value = dense
        found[name] = value.float().clone()
    return found


class Network:
    """See :class:`tightfit.kv.fitted.Network`. Raises UsageError for a model with latent attention or mixtures."""

    def __init__(self, decoder: Decoder, ws: Workspace) -> None:
        self.spec, self._ws = decoder.spec, ws
        for layer in self.spec.layers:
            if not isinstance(layer.attention, AttentionSpec) or not isinstance(layer.mlp, MlpSpec):
                raise UsageError(
                    "gradients do not flow through latent attention and mixtures here",
                    "Use a method that is fitted layer by layer, or none.",
                )
        with torch.inference_mode():
            self._model = matrices(decoder.weights.model, ws)
            self._layers = []
            decoder.weights.begin(logits=False)
            for index in range(len(self.spec.layers)):
                with decoder.weights.layer(index) as parameters:
                    self._layers.append(matrices(parameters, ws))
        # Tensors that were made in inference mode can take no part in gradients.
        self._model, *self._layers = (
            {name: x.clone() for name, x in each.items()} for each in (self._model, *self._layers)
        )

    def hidden(self, tokens: Tensor, attend: Attend | None = None) -> Tensor:
        x = self._model["embed_tokens"][tokens] * self.spec.embedding_multiplier
        rotations = self._rotations(tokens.shape[1])
        for index, (layer, w) in enumerate(zip(self.spec.layers, self._layers, strict=True)):
            x = self._layer(index, layer, w, x, rotations, attend or self.attention)
        return self._norm(x, self._model["norm"])

    def logits(self, hidden: Tensor) -> Tensor:
        head = self._model["embed_tokens" if self.spec.tied else "lm_head"]
        logits = hidden @ head.T * self.spec.logit_multiplier
        cap = self.spec.logit_softcap
        return logits if cap is None else cap * (logits / cap).tanh()

    def attention(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        spec = self.spec.layers[layer].attention
        assert isinstance(spec, AttentionSpec)
        n, groups = q.shape[1], spec.heads // spec.kv_heads
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        products = q @ k.repeat_interleave(groups, 1).mT
        behind = torch.arange(n)[:, None] - torch.arange(n)
        hidden = behind < 0 if spec.window is None else (behind < 0) | (behind >= spec.window)
        scoring = Scoring(spec.scale, spec.window, spec.softcap, self._layers[layer].get("sinks"))
        weights = attention_weights(products, hidden, scoring)
        return (weights @ v.repeat_interleave(groups, 1)).transpose(1, 2)

    def _layer(
        self,
        index: int,
        layer: LayerSpec,
        w: dict[str, Tensor],
        x: Tensor,
        rotations: dict[RopeSpec, Rotation],
        attend: Attend,
    ) -> Tensor:
        gain, source = layer.residual_multiplier, self._norm(x, w.get("input_layernorm"))
        q, k, v = self._projected(layer, w, source, rotations)
        attended = attend(index, q, k, v).flatten(2)
        x = x + gain * self._norm(_linear(w, "o_proj", attended), w.get("post_attention_layernorm"))
        source = self._norm(x, w.get("pre_feedforward_layernorm"))
        assert isinstance(layer.mlp, MlpSpec)
        gated = _glu(_linear(w, "gate_proj", source), _linear(w, "up_proj", source), layer.mlp.activation)
        return x + gain * self._norm(_linear(w, "down_proj", gated), w.get("post_feedforward_layernorm"))

    def _projected(
        self, layer: LayerSpec, w: dict[str, Tensor], x: Tensor, rotations: dict[RopeSpec, Rotation]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values (b, n, heads, dim), the first two turned."""
        spec = layer.attention
        assert isinstance(spec, AttentionSpec)
        q, k, v = (_linear(w, name, x) for name in ("q_proj", "k_proj", "v_proj"))
        if spec.qk_norm == "all":
            q, k = self._norm(q, w["q_norm"]), self._norm(k, w["k_norm"])
        q, k, v = (each.unflatten(-1, (-1, spec.head_dim)) for each in (q, k, v))
        if spec.clip_qkv is not None:
            q, k, v = (each.clamp(-spec.clip_qkv, spec.clip_qkv) for each in (q, k, v))
        if spec.qk_norm == "head":
            q, k = self._norm(q, w["q_norm"]), self._norm(k, w["k_norm"])
        if spec.rope is not None:
            rotation = rotations[spec.rope]
            q, k = (_turned(each, rotation, spec.rope.interleaved) for each in (q, k))
        return q, k, v

    def _rotations(self, count: int) -> dict[RopeSpec, Rotation]:
        batch, found = Batch((Segment(0, 0, [0] * count, length=count),)), {}
        for layer in self.spec.layers:
            rope = layer.attention.rope
            if rope is not None and rope not in found:
                with self._ws.frame():
                    cos, sin = tables(rope, batch, self._ws)[:2]
                    found[rope] = cos.clone(), sin.clone()
        return found

    def _norm(self, x: Tensor, weight: Tensor | None) -> Tensor:
        return x if weight is None else functional.rms_norm(x, weight.shape, weight, self.spec.rms_norm_eps)


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return functional.linear(x, w[name], w.get(f"{name}.bias"))


def _turned(x: Tensor, rotation: Rotation, interleaved: bool) -> Tensor:
    """``x`` (b, n, heads, dim) with its first features turned."""
    cos, sin = (table[:, None] for table in rotation)
    width = 2 * cos.shape[-1]
    turning, rest = x[..., :width], x[..., width:]
    if interleaved:
        a, b = turning[..., 0::2], turning[..., 1::2]
        turned = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turning.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([turned, rest], -1)


def _glu(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    if activation == "clamped_swiglu":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return gate * (1.702 * gate).sigmoid() * (up + 1.0)
    if activation.startswith("gelu"):
        return functional.gelu(gate, approximate="tanh" if activation == "gelu_pytorch_tanh" else "none") * up
    return (functional.silu(gate) if activation == "silu" else functional.relu(gate)) * up
