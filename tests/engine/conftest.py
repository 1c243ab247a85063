from __future__ import annotations

from collections.abc import Iterator

import pytest

import tightfit


@pytest.fixture(scope="session")
def model() -> Iterator[tightfit.Model]:
    """The embedded model with room for three sequences of 512 tokens."""
    with tightfit.load("nano", memory="2GiB", context=512, batch=3, chunk=64) as loaded:
        yield loaded
