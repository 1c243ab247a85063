"""A head that streams: whatever its shape, and however much of it stays, products and rows are those of the whole."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tightfit.budget.ledger import Arena, Workspace
from tightfit.checkpoints.positioned import ALIGNMENT
from tightfit.model.spec import LayerSpec, ModelSpec, Param, Source
from tightfit.weights.formats.base import Matrix
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, group_of, layer_name
from tightfit.weights.placement.resident import Resident
from tightfit.weights.placement.streamed import Kept, Outer, Streamed, buffer_nbytes, streaming_nbytes


def spec_of(rows: int, cols: int, width: int, tied: bool) -> ModelSpec:
    """Embeddings, a head, and a layer that is a matrix of 16 by ``width``."""
    layer = LayerSpec(cast(Any, None), cast(Any, None), (Param("w", (16, width), Source("w")),))
    params = [Param("embed_tokens", (rows, cols), Source("e")), Param("norm", (cols,), Source("n"))]
    if not tied:
        params.append(Param("lm_head", (rows, cols), Source("h")))
    return ModelSpec("x", rows, cols, (layer,), tuple(params), 1, 1e-6)


@pytest.mark.parametrize("tied", [False, True])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_products_and_rows_are_those_of_the_whole_matrix(tied: bool, write: Any, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    rows, cols = data.draw(st.integers(1, 700)), data.draw(st.integers(1, 300))
    width, buffers = data.draw(st.integers(1, 9000)), data.draw(st.integers(1, 3))
    kept = data.draw(st.sampled_from([*range(0, rows, 16), rows]))
    spec = spec_of(rows, cols, width, tied)
    torch.manual_seed(0)
    shapes = {"e": (rows, cols), "h": (rows, cols), "n": (cols,), "w": (16, width)}
    checkpoint = write({name: torch.randn(shape).to(dtype) for name, shape in shapes.items()})
    around = Outer.of(checkpoint, spec, *(group_of(checkpoint, spec, name, "own") for name in (EMBEDDINGS, HEAD)))
    layers = [group_of(checkpoint, spec, layer_name(0), "own")]
    stays = Kept((0,), kept)

    room = buffer_nbytes(around, layers, stays)
    units = around.units(kept, room)
    assert sum(place.param.shape[0] for place in units) == rows - kept
    assert all(place.offset % ALIGNMENT + place.nbytes <= room for place in units)

    arena = Arena(streaming_nbytes(around, layers, stays, buffers))
    whole = Resident(checkpoint, spec, "own", {0: "own"}, torch.float32, Arena(1 << 22))
    streamed = Streamed(checkpoint, spec, "own", layers, torch.float32, arena, "float32", stays, buffers)
    x, ws, indices = torch.randn(3, cols), Workspace(Arena(1 << 22)), torch.randint(rows, (5,))
    try:
        whole.load()
        streamed.load()
        found = []
        for placement in (whole, streamed, streamed):
            with placement.layer(0) as layer:
                w = torch.empty(16, width)
                layer["w"].decode(torch.arange(16), w, ws)
            out, looked_up = torch.full((3, rows), torch.nan), torch.empty(5, cols)
            head: Matrix = placement.model["embed_tokens" if tied else "lm_head"]
            head.matmul(x, out, ws)
            placement.model["embed_tokens"].decode(indices, looked_up, ws)
            found.append((w, out, looked_up))
    finally:
        streamed.close()
        checkpoint.close()
    for other in found[1:]:
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found[0], other, strict=True))
