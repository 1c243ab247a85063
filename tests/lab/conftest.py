from __future__ import annotations

import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import tightfit
from tightfit import zoo
from tightfit.checkpoints.tokenizer import Tokenizer
from tightfit.lab.material import Material
from tightfit.lab.reader import Reader
from tightfit.lab.tasks import Sample, Task
from tightfit.zoo import corpus

CONTEXT = 512
EXACT = {"weights": "f32", "activations": "float32"}


@dataclass
class Recorded:
    """What the exact model gave on a sample, kept in memory."""

    rows: list[torch.Tensor]
    tokens: list[int]

    def logits(self, index: int) -> torch.Tensor:
        return self.rows[index]


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(zoo.path(), "nano")


@pytest.fixture(scope="session")
def material(tokenizer: Tokenizer) -> Material:
    documents = corpus.collect([Path(sysconfig.get_paths()["stdlib"]) / "asyncio"])
    return Material.of_texts(tokenizer, [(document.name, document.text) for document in documents])


@pytest.fixture(scope="session")
def readers() -> Iterator[Callable[..., Reader]]:
    """The embedded model in any configuration; each is loaded once."""
    loaded: dict[str, Reader] = {}

    def reader(**options: Any) -> Reader:
        key = repr(options)
        if key not in loaded:
            loaded[key] = Reader(tightfit.load("nano", "4GiB", context=CONTEXT, threads=1, **options))
        return loaded[key]

    yield reader
    for one in loaded.values():
        one.model.close()


@pytest.fixture(scope="session")
def exact(readers: Callable[..., Reader]) -> Reader:
    return readers(**EXACT)


def record(reader: Reader, sample: Sample) -> Recorded:
    rows = [row.clone() for row in reader.follow(sample.prompt, sample.following)]
    return Recorded(rows, reader.greedy(sample.prompt, sample.new_tokens))


def measure(task: Task, reader: Reader, samples: Sequence[Sample], exact: Reader) -> list[dict[str, Any]]:
    """What a task finds of a configuration, beside the exact model."""
    return [task.measure(reader, sample, record(exact, sample) if task.needs_reference else None) for sample in samples]
