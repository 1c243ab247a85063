"""What puts let-go tokens elsewhere takes the scratch that its dry run says."""

from __future__ import annotations

import pytest
import torch
from tests.kv.merge.layer import DIM, HEADS, LAYOUT, Driver, tokens

from tightfit.budget.ledger import Arena, Workspace
from tightfit.kernels import ops
from tightfit.kv.fitted import Known
from tightfit.kv.merge.convolutions import Convolutions
from tightfit.kv.merge.lowrank_state import Kernels


@pytest.mark.parametrize(
    "kv",
    [
        "d2o(keep=40)",
        "d2o(keep=40,budget=adakv)+int4(recent=32)",
        "d2o(keep=0.5)+think",
        "kvmerger(keep=40,budget=adakv)",
        "elastic(keep=0.5)+int4(recent=32)",
        "ems(keep=40,candidates=9)",
        "less(hidden=6)+h2o(keep=40,budget=adakv)",
        "lococo(keep=40,slots=20)+int4(recent=32)",
    ],
)
def test_a_dry_run_says_how_much_scratch_it_takes(kv: str) -> None:
    layers = {"less": Kernels(HEADS, HEADS, DIM, 6, 8), "lococo": Convolutions(LAYOUT, 20)}
    with torch.no_grad():
        found = {method: {f"0.{name}": x for name, x in each.found().items()} for method, each in layers.items()}
    known = Known(tensors=found)
    parts = [(90, False), (64, False), (64, False), *[(1, True)] * 70]
    dry = Driver(kv, known=known)
    with ops.dry():
        for count, decode in ((90, False), (1, True)):
            dry.add(*tokens(count), decode)
        dry.cache.tokens[0] = 31
        dry.commit(1)
    real = Driver(kv, ws=Workspace(Arena(dry.ws.high_water)), known=known)
    for index, (count, decode) in enumerate(parts):
        real.add(*tokens(count, index), decode)
        if decode:
            real.commit(1)
    assert real.ws.high_water <= dry.ws.high_water
