"""What the layer before says of a layer's keys and values in the embedded model, and what codes miss with and without.

    .venv/bin/python benchmarks/kv_works_when/aqua.py

Maps are found with one held-out text and measured on another, as errors of what is read: shares of the mean squares of
keys, before they are turned, and of values, of all layers but the first. What each takes is the `kv` account of 4096
tokens: with maps, and with the room for one layer. What that makes of the model's answers is measured by `lowrank.py
aqua int4 int2`.
"""

from __future__ import annotations

import statistics
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from benchmarks.common import held_out, table

import tightfit
from tightfit import zoo
from tightfit.engine.fit import Observing
from tightfit.kv.fitted import Known
from tightfit.kv.make import kv_nbytes
from tightfit.kv.quantize.aqua import Aqua, Coded, LinearMap, pages_of

FITTED_WITH, SAMPLE, SAMPLES, CONTEXT = 1 << 17, 512, 8, 4096


def missed(keys: torch.Tensor, values: torch.Tensor, read: Coded) -> tuple[float, float]:
    """Shares of the squares of keys and values."""
    pairs = (keys, read.keys), (values, read.values)
    return tuple(float((x - y).square().sum() / x.square().sum()) for x, y in pairs)  # type: ignore[return-value]


def main() -> None:
    whole = "".join(held_out(zoo.path())[0])
    lines = []
    with tightfit.load("nano", "4GiB", context=1024) as model:
        engine, encode = model.borrow_engine(), model.tokenizer.encode
        fitting, measuring = (
            Observing(engine, "nano", encode(text), encode, model.plan.budget)
            for text in (whole[:FITTED_WITH], whole[FITTED_WITH:])
        )
        layouts = fitting.layouts
        for bits in (2, 4):
            method = Aqua(bits=bits)
            found = method.fit(fitting, lambda done, total: None).tensors
            said, direct = [], []
            before = None
            for layer, seen in enumerate(measuring.layers(measuring.samples(SAMPLE, SAMPLES))):
                keys, values = (pages_of([getattr(each, kind) for each in seen], method.sinks) for kind in "kv")
                of_layer = method if layer else replace(method, bits=method.first)
                maps = None
                if layer:
                    maps = tuple(
                        LinearMap(found[f"{kind}.{layer}"], found[f"{kind}.offset.{layer}"], 0.0)
                        for kind in ("keys", "values")
                    )
                before = of_layer.coded(keys, values, before, maps)
                if layer:
                    said.append(missed(keys, values, before))
                    direct.append(missed(keys, values, method.coded(keys, values, None)))
            for name, each, kv, known in (
                (f"int{bits}` of keys that are not turned", direct, f"int{bits}", Known()),
                (f"aqua(bits={bits})`", said, f"aqua(bits={bits})", Known(tensors={"aqua": found})),
            ):
                nbytes = kv_nbytes(kv, layouts, CONTEXT, 1, "bfloat16", known)
                shares = (f"{statistics.mean(of_kind):.2%}" for of_kind in zip(*each, strict=True))
                lines.append([f"`{name}", f"{nbytes / 2**20:.2f}", *shares])
    print(table(["codes", f"kv MiB of {CONTEXT} tokens", "missed of keys", "of values"], lines))


if __name__ == "__main__":
    main()
