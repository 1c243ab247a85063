"""A mixture of experts: a router chooses a few feed-forward layers for each token (https://arxiv.org/abs/1701.06538).

Tokens that chose the same expert are served together, expert after expert in ascending order, so that each token's sum
is made in the same order whatever else is in the batch.
"""

from __future__ import annotations

import torch

from tightfit.budget.ledger import Workspace
from tightfit.kernels import ops
from tightfit.model.parts import mlp, project
from tightfit.model.spec import MlpSpec, MoeSpec
from tightfit.weights.formats.base import Split
from tightfit.weights.placement.base import Parameters


def moe(
    spec: MoeSpec,
    weights: Parameters,
    x: torch.Tensor,
    out: torch.Tensor,
    ws: Workspace,
    split: Split,
    accumulate: float = 0.0,
) -> None:
    """``out`` (tokens, hidden) = the weighted sum of the chosen experts of ``x``, and of the shared expert; or added to
    ``out`` ``accumulate`` times."""
    with ws.frame():
        total = ws.empty(*x.shape) if accumulate else out
        _moe(spec, weights, x, total, ws, split)
        if accumulate:
            ops.add_(out, total, accumulate)


def _moe(spec: MoeSpec, weights: Parameters, x: torch.Tensor, out: torch.Tensor, ws: Workspace, split: Split) -> None:
    tokens, hidden = x.shape
    with ws.frame():
        scores, chosen, gains = _route(spec, weights, x, ws, split)
        experts = weights.experts
        assert experts is not None
        groups = _by_expert(chosen)
        if not ops.is_dry():
            experts.want({expert: len(rows) for expert, rows, _ in groups}, scores)
        # In a dry run the next mixture is taken to be like this one.
        following = (spec, weights) if ops.is_dry() else experts.following
        if following is not None:
            with ws.frame():
                _, expected, _ = _route(*following, x, ws, split)
                if not ops.is_dry():
                    experts.expect(sorted(set(expected.flatten().tolist())))
        ops.zero_(out)
        each = MlpSpec(spec.intermediate_size, spec.activation)
        for expert, rows, columns in groups:
            with ws.frame(), experts.use(expert) as of_one:
                picked = ws.empty(len(rows), hidden)
                if len(rows) < tokens:
                    ops.gather_rows(x, rows, picked)
                else:
                    picked = x
                answer = ws.empty(len(rows), hidden)
                mlp(each, of_one, picked, answer, ws, split.of_rows(rows))
                ops.add_rows_(out, rows, answer, gains[rows, columns])
        if spec.shared_intermediate_size:
            with ws.frame():
                answer = ws.empty(tokens, hidden)
                shared = MlpSpec(spec.shared_intermediate_size, spec.activation)
                mlp(shared, _named(weights, "shared."), x, answer, ws, split)
                if spec.shared_gate:
                    (gate,) = project(weights, ("shared_gate",), ((1,),), x, ws, split)
                    ops.gate_(answer, gate, split.parts)
                ops.add_(out, answer)


def _route(
    spec: MoeSpec, weights: Parameters, x: torch.Tensor, ws: Workspace, split: Split
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """What the router of ``weights`` says of ``x``: scores (tokens, experts), for ``topk_softmax`` logits, and which
    experts each token chooses, and their gains, (tokens, experts_per_token) each; in scratch memory of the enclosing
    frame."""
    tokens = x.shape[0]
    (scores,) = project(weights, ("router",), ((spec.experts,),), x, ws, split)
    chosen = ws.empty(tokens, spec.experts_per_token, dtype=torch.int64)
    gains = ws.empty(tokens, spec.experts_per_token)
    ops.route(
        scores,
        spec.experts_per_token,
        spec.scoring,
        weights.get("router_correction"),
        spec.n_group,
        spec.topk_group,
        spec.group_score,
        spec.normalize,
        spec.scaling,
        chosen,
        gains,
        split.parts,
    )
    return scores, chosen, gains


def _by_expert(chosen: torch.Tensor) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(expert, rows of the tokens that chose it, in which column) for every expert that was chosen, in their order.

    In a dry run one expert is wanted by every token: that is the worst case for scratch.
    """
    if ops.is_dry():
        return [(0, torch.arange(chosen.shape[0]), torch.zeros(chosen.shape[0], dtype=torch.int64))]
    flat = chosen.flatten()
    order = flat.argsort(stable=True)
    experts, counts = flat[order].unique_consecutive(return_counts=True)
    places = [part.split(counts.tolist()) for part in (order // chosen.shape[1], order % chosen.shape[1])]
    return list(zip(experts.tolist(), *places, strict=True))


def _named(weights: Parameters, prefix: str) -> Parameters:
    """The parameters whose names start with ``prefix``, without it."""
    return Parameters({name.removeprefix(prefix): weights[name] for name in weights if name.startswith(prefix)})
