from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny_llama

from tightfit.weights.placement.resident import Resident


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random llama that opens in no time."""
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def talkative(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a chat template."""
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "talkative", chat=True)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens must happen before weights are read."""

    def load(*arguments: object) -> None:
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(Resident, "load", load)
