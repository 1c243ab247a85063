"""What is in front of a composition changes what its methods see, and so what may be fitted to the model."""

from __future__ import annotations

import pytest
from tests.kv.settings import refused


@pytest.mark.parametrize("other", ["cq", "cskv", "a2ats", "less+h2o", "lococo", "locret", "aqua", "pod"])
@pytest.mark.parametrize("projector", ["gqa", "matryoshka"])
def test_what_was_fitted_to_features_does_not_go_with_fewer(projector: str, other: str) -> None:
    assert refused(projector, other)
    assert not refused(other)


@pytest.mark.parametrize("other", ["razor", "duo", "lserve"])
def test_what_was_fitted_to_heads_goes_with_fewer_features_not_with_merged_heads(other: str) -> None:
    assert refused("gqa", other)
    assert not refused("matryoshka", other)


@pytest.mark.parametrize("other", ["tailor", "kvsharer"])
@pytest.mark.parametrize("projector", ["gqa", "matryoshka"])
def test_what_was_fitted_to_layers_goes_with_both(projector: str, other: str) -> None:
    assert not refused(projector, other)
