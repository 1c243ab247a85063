"""The decoder: tokens in, hidden states out, every temporary in the workspace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import cpu, ops
from tightfit.kv.base import BaseCache, LayerLayout, Rotation
from tightfit.kv.cache import window_slots
from tightfit.model.batch import Batch, Segment
from tightfit.model.latent import latent_attention
from tightfit.model.moe import moe
from tightfit.model.parts import attention, mlp
from tightfit.model.rope import Tables, frequencies, tables
from tightfit.model.spec import AttentionSpec, LatentAttentionSpec, LayerSpec, MlpSpec, ModelSpec, RopeSpec
from tightfit.weights.formats.base import Matrix, Split
from tightfit.weights.placement.base import Parameters, Placement


def cache_layouts(spec: ModelSpec, context: int, chunk: int) -> list[LayerLayout]:
    """What each layer keeps of a sequence of ``context`` tokens that is prefilled ``chunk`` tokens at a time."""
    return [
        LayerLayout(
            attention.kv_heads,
            attention.key_dim,
            attention.value_dim,
            window_slots(context, attention.window, chunk),
            shared=not isinstance(attention, AttentionSpec),
            window=attention.window,
            heads=attention.heads,
            past=attention.past,
            rotation=_rotation(attention),
        )
        for attention in (layer.attention for layer in spec.layers)
    ]


def _rotation(attention: AttentionSpec | LatentAttentionSpec) -> Rotation | None:
    """How the keys of a layer turn with positions, whatever the length of their sequence."""
    rope = attention.rope
    if rope is None:
        return Rotation()
    if not isinstance(attention, AttentionSpec) or rope.parameters.rope_type in ("dynamic", "longrope"):
        return None
    return Rotation(tuple(frequencies(rope, 0)[0].tolist()), rope.interleaved)


@dataclass(frozen=True)
class _Repeated:
    """The operations of the layers of a step that decodes, which read its ``batch.places``."""

    step: tuple[object, ...]
    batch: Batch
    program: ops.Program


class Decoder:
    """Computes a :class:`~tightfit.model.spec.ModelSpec` with the weights that a placement hands out."""

    def __init__(self, spec: ModelSpec, weights: Placement) -> None:
        self.spec = spec
        self.weights = weights
        # Mixtures choose by what the router says, and absorbed projections are slices made at every step.
        self._repeatable = weights.fixed and all(
            isinstance(layer.attention, AttentionSpec) and isinstance(layer.mlp, MlpSpec) for layer in spec.layers
        )
        self._repeated: _Repeated | None = None

    def hidden(self, batch: Batch, cache: BaseCache, ws: Workspace) -> torch.Tensor:
        """Runs the layers; gives the normalised hidden states (n, hidden) of the rows for which logits are wanted, in
        the order of ``batch.logit_rows``, in scratch memory of the enclosing frame."""
        spec = self.spec
        self.weights.begin(logits=len(batch.logit_rows) > 0)
        _tell(cache, batch.segments)
        x = ws.empty(batch.size, spec.hidden_size)
        with ws.frame():
            self.embed(batch.tokens, x, ws)
            ropes = self._ropes((layer.attention.rope for layer in spec.layers), batch, cache, ws)
            self._layers(x, batch, cache, ropes, ws)
        # Taken after the layers' scratch was given back, so that wanting the logits of every row needs no more memory.
        return self._selected(x, batch.logit_rows, ws)

    def hidden_layered(self, segment: Segment, chunk: int, cache: BaseCache, ws: Workspace) -> torch.Tensor:
        """:meth:`hidden` for one whole prompt, layer by layer: all chunks of ``chunk`` tokens go through a layer before
        the next is asked for, and the cache sees the layer's whole prompt before it lets go of any of it."""
        spec = self.spec
        self.weights.begin(logits=segment.logits != "none")
        _tell(cache, [segment])
        count = len(segment.tokens)
        x = ws.empty(count, spec.hidden_size)
        pieces = []
        for a in range(0, count, chunk):
            b = min(a + chunk, count)
            part = replace(segment, start=segment.start + a, tokens=segment.tokens[a:b], length=segment.length)
            pieces.append((Batch((part,)), x[a:b]))
        for batch, rows in pieces:
            self.embed(batch.tokens, rows, ws)
        for index in range(len(spec.layers)):
            with self.weights.layer(index) as weights, cache.whole(index, segment, ws):
                for batch, rows in pieces:
                    self.layer(index, weights, rows, batch, cache, ws)
        return self._selected(x, Batch((segment,)).logit_rows, ws)

    def embed(self, tokens: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """What the residual stream ``out`` (n, hidden) begins with at ``tokens`` (n,) int64."""
        self.weights.model["embed_tokens"].decode(tokens, out, ws)
        if self.spec.embedding_multiplier != 1.0:
            ops.scale_(out, self.spec.embedding_multiplier)

    def layer(
        self, index: int, weights: Parameters, x: torch.Tensor, batch: Batch, cache: BaseCache, ws: Workspace
    ) -> None:
        """One layer with the parameters ``weights``, added to the residual stream ``x`` (tokens, hidden) in place."""
        with ws.frame():
            layer = self.spec.layers[index]
            ropes = self._ropes((layer.attention.rope,), batch, cache, ws)
            self._layer(index, layer, weights, x, batch, cache, ropes, ws)

    def _ropes(
        self, kinds: Iterable[RopeSpec | None], batch: Batch, cache: BaseCache, ws: Workspace
    ) -> dict[RopeSpec, Tables]:
        positions = batch.positions if ops.is_dry() else cache.standing(batch, batch.positions)
        anchors = cache.anchor_positions(positions) if cache.anchors else None
        ropes = [rope for rope in dict.fromkeys(kinds) if rope is not None]
        return {rope: tables(rope, batch, ws, positions, anchors) for rope in ropes}

    def _selected(self, x: torch.Tensor, rows: torch.Tensor, ws: Workspace) -> torch.Tensor:
        """The normalised hidden states of ``rows`` (n,) int64."""
        selected = ws.empty(len(rows), self.spec.hidden_size)
        ops.gather_rows(x, rows, selected)
        ops.rms_norm(selected, self.weights.model["norm"], self.spec.rms_norm_eps, selected)
        return selected

    def logits(self, hidden: torch.Tensor, ws: Workspace) -> torch.Tensor:
        """(n, vocab) float32 logits of hidden states (n, hidden), in scratch memory of the enclosing frame, multiplied
        row by row, as decoding does."""
        head = self.weights.model["embed_tokens" if self.spec.tied else "lm_head"]
        out = ws.empty(hidden.shape[0], self.spec.vocab_size)
        self.product(head, hidden, out, ws)
        return out

    def product(self, head: Matrix, hidden: torch.Tensor, out: torch.Tensor, ws: Workspace) -> None:
        """The logits of ``hidden`` with the matrix ``head``, in ``out`` (n, vocab)."""
        spec = self.spec
        head.matmul(hidden, out, ws)
        if spec.logit_multiplier != 1.0:
            ops.scale_(out, spec.logit_multiplier)
        if spec.logit_softcap is not None:
            ops.softcap_(out, spec.logit_softcap, Split.rows(hidden.shape[0]).parts)

    def _layers(
        self, x: torch.Tensor, batch: Batch, cache: BaseCache, ropes: dict[RopeSpec, Tables], ws: Workspace
    ) -> None:
        """All layers, added to ``x``.

        A step that only decodes repeats the operations of the one before, if that decoded as many tokens: what Python
        does between them takes as long as reading a hundred megabytes of weights.
        """
        repeatable = self._repeatable and cache.repeatable and cpu.available()
        if ops.is_dry() or batch.prefills or batch.tentative or not repeatable:
            self._compute_layers(x, batch, cache, ropes, ws)
            return
        # What decides which tensors lie where.
        step = cache, ws, ws.top, batch.size, cpu.threads(), torch.is_inference_mode_enabled()
        if self._repeated is None or self._repeated.step != step:
            with ops.recorded() as program:
                self._compute_layers(x, batch, cache, ropes, ws)
            self._repeated = _Repeated(step, batch, program)
            return
        self._repeated.batch.places.copy_(batch.places)
        self._repeated.program.run()

    def _compute_layers(
        self, x: torch.Tensor, batch: Batch, cache: BaseCache, ropes: dict[RopeSpec, Tables], ws: Workspace
    ) -> None:
        with cache.through(batch, ws):
            for layers, again in self.spec.stretches:
                passes = self._passes(batch) if again else 1
                with ws.frame():
                    entered = x
                    if passes > 1:
                        entered = ws.empty(*x.shape)
                        ops.copy_(entered, x)
                    for left in range(passes - 1, -1, -1):
                        with cache.provisional(left > 0):
                            self._stretch(layers, x, batch, cache, ropes, ws)
                        if left:
                            ops.copy_(x, entered)

    def _stretch(
        self,
        layers: range,
        x: torch.Tensor,
        batch: Batch,
        cache: BaseCache,
        ropes: dict[RopeSpec, Tables],
        ws: Workspace,
    ) -> None:
        for index in layers:
            with self.weights.layer(index) as weights:
                self._layer(index, self.spec.layers[index], weights, x, batch, cache, ropes, ws)

    def _passes(self, batch: Batch) -> int:
        """How often layers that read a later one are computed: after as many passes as a chunk has tokens nothing
        changes any more, and what decodes finds all that it reads."""
        longest = max((stop - start for _, start, stop in batch.prefills), default=1)
        return longest if self.spec.passes is None else min(longest, self.spec.passes)

    def _layer(
        self,
        index: int,
        layer: LayerSpec,
        weights: Parameters,
        x: torch.Tensor,
        batch: Batch,
        cache: BaseCache,
        ropes: dict[RopeSpec, Tables],
        ws: Workspace,
    ) -> None:
        """One layer, added to the residual stream ``x`` (tokens, hidden) in place.

        A part without a norm of its own behind it is added where it is computed.
        """
        eps, gain = self.spec.rms_norm_eps, layer.residual_multiplier
        with ws.frame():
            normed = ws.empty(*x.shape)
            source = _norm(x, weights.get("input_layernorm"), eps, normed)
            after = weights.get("post_attention_layernorm")
            with ws.frame():
                out, share = (x, gain) if after is None else (ws.empty(*x.shape), 0.0)
                if isinstance(layer.attention, AttentionSpec):
                    rope = ropes.get(layer.attention.rope) if layer.attention.rope else None
                    attention(layer.attention, weights, source, batch, cache, index, rope, eps, out, ws, share)
                else:
                    rope = ropes[layer.attention.rope]
                    latent_attention(layer.attention, weights, source, batch, cache, index, rope, out, ws, share)
                if after is not None:
                    ops.add_(x, _norm(out, after, eps, out), gain)

            source = _norm(x, weights.get("pre_feedforward_layernorm"), eps, normed)
            after = weights.get("post_feedforward_layernorm")
            with ws.frame():
                out, share = (x, gain) if after is None else (ws.empty(*x.shape), 0.0)
                if isinstance(layer.mlp, MlpSpec):
                    mlp(layer.mlp, weights, source, out, ws, batch.split, share)
                else:
                    moe(layer.mlp, weights, source, out, ws, batch.split, share)
                if after is not None:
                    ops.add_(x, _norm(out, after, eps, out), gain)


def _tell(cache: BaseCache, segments: Sequence[Segment]) -> None:
    """Tells a cache whose methods read what the next tokens are."""
    if cache.reads and not ops.is_dry():
        for segment in segments:
            cache.told(segment.slot, segment.start, segment.tokens)


def _norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float, out: torch.Tensor) -> torch.Tensor:
    """``x`` normalised into ``out``, or ``x`` itself where the layer has no such norm."""
    if weight is None:
        return x
    ops.rms_norm(x, weight, eps, out)
    return out
