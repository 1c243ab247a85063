from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from tightfit import zoo
from tightfit.zoo import corpus
from tightfit.zoo.tasks import Material


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The models here are so small that handing their matrices to threads takes longer than multiplying them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The tokenizer that ships."""
    return Tokenizer.from_file(str(zoo.path("nano") / "tokenizer.json"))


@pytest.fixture(scope="session")
def data(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus folder: two packages of the standard library (about 60 files), with the tokenizer that ships."""
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    folder = tmp_path_factory.mktemp("corpus")
    documents = corpus.collect([stdlib / "email", stdlib / "asyncio"])
    corpus.write(folder, documents, tokenizer, held_out=5)
    return folder


@pytest.fixture(scope="session")
def material(tokenizer: Tokenizer, data: Path) -> Material:
    return Material(tokenizer, corpus.read(data).train)
