"""A folder of results as a run leaves it: twenty configurations of a model that was never run, five tasks, two refusals
and one that was not measured to its end. Values are drawn by seed around what a configuration's bits suggest."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tightfit.lab.experiment import EXACT, EXACT_WISH, Configuration, Experiment
from tightfit.lab.results import EXPERIMENT, RESULTS, End, Record, Refused, SampleResult, to_line

MiB = 1 << 20
TASKS = {
    "divergence(texts=6)": [(f"{n}/{i}", {"tokens": n}) for n in (245, 1024, 3891) for i in range(6)],
    "lookup": [
        (f"dictionary/{n}/{i}", {"form": "dictionary", "tokens": n}) for n in (1024, 2048, 3686) for i in range(12)
    ],
    "needle(questions=4)": [
        (f"{n}/{d}/{i}", {"tokens": n, "needles": 1, "depth": d})
        for n in (1024, 3686)
        for d in (0, 50, 100)
        for i in range(4)
    ],
    "perplexity": [(f"1024/{i}", {"after": 1024}) for i in range(16)],
    "latency": [(f"{n}/0", {"tokens": n}) for n in (409, 2048, 3891)],
}
UNFINISHED = "weights=ternary"  # of which the run was ended
# (weights, kv): MiB of weights, of the cache, of what a token reads, relative time, and how much worse than exact.
WEIGHTS = {
    "bf16": (25.0, 1.0, 0.0001), "int8": (13.3, 0.72, 0.0006), "int6": (10.2, 0.80, 0.004), "int5": (8.6, 0.78, 0.012),
    "int4": (7.0, 0.64, 0.05), "nf4": (7.0, 0.70, 0.045), "int3": (5.5, 0.83, 0.21), "int2": (3.9, 0.81, 0.9),
    "pruned": (14.0, 1.3, 0.6), "mixed": (7.1, 0.66, 0.05), "ternary": (2.9, 0.9, 2.4),
}  # fmt: skip
KV = {
    "none": (16.0, 1.0, 0.0001), "int8": (10.2, 0.95, 0.0003), "int4": (6.2, 0.92, 0.0021), "int2": (4.1, 0.97, 0.11),
    "snapkv": (2.3, 0.62, 0.071), "window": (2.3, 0.55, 0.078), "quest": (16.7, 0.7, 0.082), "host": (1.5, 1.9, 0.0001),
    "snapkv(keep=512)+int4": (1.8, 0.66, 0.074),
}  # fmt: skip


def write(
    folder: Path,
    extra: str | None = None,
    weights: dict[str, Any] = WEIGHTS,
    kv: dict[str, Any] = KV,
    tasks: Sequence[str] = tuple(TASKS),
    unfinished: str | None = UNFINISHED,
) -> Path:
    """``extra`` is one more configuration by its key, as bad as names can be."""
    configurations = [Configuration(EXACT, {}, dict(EXACT_WISH, context=4096))]
    costs = {EXACT: (50.2, 16.0, 1.6, 0.0)}
    for name, (size, time, worse) in weights.items():
        configurations.append(_varied("weights", name))
        costs[f"weights={name}"] = (size, 16.0, time, worse)
    for name, (size, time, worse) in kv.items():
        configurations.append(_varied("kv", name))
        costs[f"kv={name}"] = (25.0, size, time, worse)
    configurations.append(Configuration("chunk=64", {"chunk": 64}, {"chunk": 64}))
    costs["chunk=64"] = (25.0, 16.0, 1.1, 0.0001)
    configurations += [_varied("kv", "kvsharer"), _varied("weights", "f32")]
    if extra is not None:
        configurations.append(Configuration(extra, {"kv": extra}, {"kv": extra}))
        costs[extra] = (25.0, 9.0, 1.1, 0.02)
    experiment = Experiment(
        model="nano",
        fingerprint="f" * 64,
        tasks=list(tasks),
        seed=7,
        context=4096,
        text=[{"name": "argparse.py", "sha256": "0" * 64}],
        common={"memory": "1GiB", "threads": 2},
        configurations=configurations,
        machine={"processor": "A processor", "cores": "2", "memory": "8 GiB", "system": "Linux", "kernels": "avx2"},
        versions={"python": "3.11.2", "torch": "2.13.0", "tightfit": "0.1.0"},
        command="tightfit lab run --vary 'weights=all; kv=all' --seed 7 --out results",
    )
    records: list[Record] = []
    for key, cost in costs.items():
        records += _samples(tasks, key, *cost)
        if key != unfinished:
            records.append(_end(key, *cost))
    early = tasks[:2]  # the run was ended there
    records = [each for each in records if each.configuration != unfinished or getattr(each, "task", None) in early]
    records.append(Refused("kv=kvsharer", "layers of nano were never looked for", "Find them with `tightfit fit`."))
    records.append(Refused("weights=f32", "it does not fit into 1 GiB", "Give more.", 1_200_000_000))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / EXPERIMENT).write_text(experiment.to_json())
    (folder / RESULTS).write_text("".join(map(to_line, records)))
    return folder


def _varied(seam: str, name: str) -> Configuration:
    return Configuration(f"{seam}={name}", {seam: name}, {"memory": "1GiB", "threads": 2, seam: name})


def _samples(tasks: Sequence[str], key: str, weights: float, kv: float, time: float, worse: float) -> list[Record]:
    found: list[Record] = []
    for task in tasks:
        for name, group in TASKS[task]:
            hardness = random.Random(name).random()  # the same for all configurations
            noise = random.Random(f"{key}/{task}/{name}")
            tokens = int(group.get("tokens", 1024))  # type: ignore[call-overload]
            values = VALUES[task.partition("(")[0]](noise, hardness, tokens, time, worse)
            found.append(SampleResult(key, task, name, group, values, 0.3))  # type: ignore[arg-type]
    return found


def _divergence(noise: random.Random, hardness: float, tokens: int, time: float, worse: float) -> dict[str, Any]:
    kl = worse * (0.5 + hardness) * noise.uniform(0.8, 1.25) * (tokens / 1024) ** 0.3
    return {"kl": kl, "agreement": max(0.0, 1 - kl**0.5 / 2)}


def _asked(noise: random.Random, hardness: float, tokens: int, time: float, worse: float) -> dict[str, Any]:
    correct = hardness * (1 + tokens / 4096) < 1.5 - 1.2 * worse**0.25 + noise.uniform(-0.02, 0.02)
    return {"correct": int(correct), "log_probability": -hardness - worse}


def _perplexity(noise: random.Random, hardness: float, tokens: int, time: float, worse: float) -> dict[str, Any]:
    nats = 256 * (1.5 + hardness / 4 + worse * noise.uniform(0.8, 1.2))
    return {"bits_per_byte": nats / 700, "perplexity": 2.0, "nats": nats, "bytes": 1010, "tokens": 256}


def _latency(noise: random.Random, hardness: float, tokens: int, time: float, worse: float) -> dict[str, Any]:
    each = 0.004 * time * (1 + tokens / 8192)
    times = [(each * tokens / 6 * noise.uniform(1, 1.05), each * noise.uniform(0.99, 1.04)) for _ in range(5)]
    return {"first_token": times[0][0], "token": times[0][1], "repetitions": times}


VALUES: dict[str, Callable[..., dict[str, Any]]] = {
    "divergence": _divergence,
    "lookup": _asked,
    "needle": _asked,
    "perplexity": _perplexity,
    "latency": _latency,
}


def _end(key: str, weights: float, kv: float, time: float, worse: float) -> End:
    noise = random.Random(key)
    accounts = {"runtime": 196.0 + noise.uniform(-1, 1), "weights": weights, "kv": kv, "workspace": 9.0}
    receipt = {
        "predicted_bytes": int((sum(accounts.values()) + 16) * MiB),
        "accounts": {
            name: {"reserved_bytes": int(size * 1.1 * MiB), "peak_bytes": int(size * MiB)}
            for name, size in accounts.items()
        },
    }
    indicators = {
        "weights_bytes": int(weights * MiB),
        "kv_bytes": int(kv * MiB),
        "kv_resident_bytes": int(kv * MiB),
        "read_bytes_per_token": int((weights + (2.0 if "quest" in key else kv)) * MiB),
        "operations_per_token": 26e6 + (16 if kv > 3 else 2) * 2e5,
        "parameters": 13_000_000,
    }
    return End(key, int(sum(accounts.values()) * MiB), 1 << 30, {}, receipt, indicators, 60.0)
