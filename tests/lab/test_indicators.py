"""What a token reads and sees: counted from a model that has just read so many tokens."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests import tiny_llama, tiny_mixtures

import tightfit
from tightfit.checkpoints.config import Config
from tightfit.lab.indicators import attended, indicators, weight_bytes_per_token
from tightfit.lab.reader import Reader
from tightfit.model.families import model_spec

READ = 200


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "tiny")


@contextmanager
def reading(model: Path, kv: str = "none", weights: str = "f32") -> Iterator[Reader]:
    with tightfit.load(str(model), "4GiB", kv=kv, weights=weights, context=256) as loaded:
        reader = Reader(loaded)
        for _ in reader.follow([5] * READ):
            pass
        yield reader


@pytest.mark.parametrize(
    ("kv", "seen"),
    [
        ("none", [READ, READ]),
        ("int4", [READ, READ]),
        ("snapkv(keep=64,window=16)", [64, 64]),
        # All in the first layer; then of the 6 pages that are full 2, and the 8 tokens after these.
        ("quest(tokens=64,full=1)", [READ, 2 * 32 + READ - 6 * 32]),
    ],
)
def test_tokens_that_the_next_one_sees(tiny: Path, kv: str, seen: list[float]) -> None:
    with reading(tiny, kv) as reader:
        assert attended(reader.model.borrow_engine().cache) == seen


def test_a_method_that_keeps_less_takes_fewer_operations_and_reads_fewer_bytes(tiny: Path) -> None:
    found = {}
    for kv in ("none", "snapkv(keep=64,window=16)", "int4"):
        with reading(tiny, kv) as reader:
            checkpoint = reader.model.checkpoint
            spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
            found[kv] = indicators(reader, spec)
    exact, evicted, coded = found.values()
    t = tiny_llama
    # Two layers of queries over keys and values of 8 numbers, four heads.
    assert exact["operations_per_token"] - evicted["operations_per_token"] == 2 * 2 * t.HEADS * (READ - 64) * (8 + 8)
    assert exact["read_bytes_per_token"] - evicted["read_bytes_per_token"] == 2 * t.KV_HEADS * (READ - 64) * 16 * 4
    assert coded["operations_per_token"] == exact["operations_per_token"]
    assert coded["read_bytes_per_token"] < exact["read_bytes_per_token"]
    assert {each["parameters"] for each in found.values()} == {spec.parameter_count}


def test_weights_that_a_token_reads(tmp_path: Path) -> None:
    checkpoint, spec = tiny_mixtures.write(tmp_path / "mixtral", tiny_mixtures.config_of("mixtral"))
    with checkpoint:
        read = weight_bytes_per_token(checkpoint, spec, "f32", ["f32"] * 2)
    matrices = 2 * (4 * 10 * 40 * 2 + 2 * 10 * 40 * 2 + 6 * 40 + 3 * 3 * 48 * 40) + 61 * 40
    row_of_embeddings, norms = 40, (2 * 2 + 1) * 40
    assert read == 4 * (matrices + row_of_embeddings + norms)
