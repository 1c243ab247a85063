"""config.json: values of the right type come through, everything else is named."""

from __future__ import annotations

import json
import math

import pytest

from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError


def config(**values: object) -> Config:
    return Config(values, "org/model")


def test_values_come_through_with_their_types() -> None:
    read = config(size=8, eps=1e-6, theta=10_000, tied=True, kind="llama", ids=[0, 1], mixed=[1, 2.5], names=["a"])
    assert read.integer("size") == 8
    assert read.number("eps") == 1e-6
    assert isinstance(read.number("theta"), float)
    assert read.flag("tied") is True
    assert read.string("kind") == "llama"
    assert read.integers("ids", minimum=0) == (0, 1)
    assert read.numbers("mixed") == (1.0, 2.5)
    assert read.strings("names") == ("a",)
    assert read.get("size") == 8
    assert read.get("none", 3) == 3
    assert "size" in read
    assert "none" not in read


def test_a_missing_key_is_named_unless_there_is_a_default() -> None:
    for read in (config(), config(num_attention_heads=None)):  # null counts as absent
        with pytest.raises(CheckpointError, match=r"config.json of org/model has no 'num_attention_heads'"):
            read.integer("num_attention_heads")
        assert read.integer("num_attention_heads", 4) == 4
        assert read.number("num_attention_heads", 0.5) == 0.5
        assert read.flag("num_attention_heads", False) is False
        assert read.strings("num_attention_heads", ()) == ()
    with pytest.raises(CheckpointError, match="no 'model_type'"):
        config().model_type  # noqa: B018


def test_optional_values_keep_null_apart_from_absent() -> None:
    assert config(sliding_window=None).optional_integer("sliding_window", 4096) is None
    assert config().optional_integer("sliding_window", 4096) == 4096
    assert config().optional_integer("sliding_window") is None
    assert config(sliding_window=7).optional_integer("sliding_window") == 7
    assert config(cap=None).optional_number("cap", 50.0) is None
    assert config().optional_number("cap", 50.0) == 50.0
    with pytest.raises(CheckpointError, match="'sliding_window' = 0"):
        config(sliding_window=0).optional_integer("sliding_window")


@pytest.mark.parametrize("value", [-1, 0, 2.5, 4096.0, "8", True, [8], 2**31])
def test_a_size_that_is_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(
        CheckpointError, match=r"config.json of org/model has 'hidden_size' = .* an integer of at least 1"
    ):
        config(hidden_size=value).integer("hidden_size")


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", '"1"', "true", "[1]", "1" + "0" * 400])
def test_a_number_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match=r"'eps' = .* expected a number"):
        config(eps=json.loads(text)).number("eps")


def test_ranges_are_enforced_and_stated() -> None:
    with pytest.raises(CheckpointError, match=r"a number above 0$|a number above 0\n"):
        config(theta=0).number("theta", above=0.0)
    with pytest.raises(CheckpointError, match="of at least 0 and at most 1"):
        config(p=1.5).number("p", minimum=0.0, maximum=1.0)
    with pytest.raises(CheckpointError, match="at least 1 and at most 10"):
        config(n=11).integer("n", maximum=10)
    assert config(p=1).number("p", maximum=1.0) == 1.0
    assert math.isclose(config(p=-5).number("p"), -5)


@pytest.mark.parametrize(
    ("getter", "value", "expected"),
    [
        ("flag", 1, "true or false"),
        ("string", 1, "a string"),
        ("integers", 5, "a list of integers"),
        ("integers", [1, 2.5], "a list of integers"),
        ("integers", [1, -1], "a list of integers"),
        ("numbers", [1, "2"], "a number"),
        ("strings", "full_attention", "a list of strings"),
        ("strings", ["a", 1], "a list of strings"),
        ("section", [], "an object"),
    ],
)
def test_other_types_are_refused(getter: str, value: object, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        getattr(config(key=value), getter)("key")


def test_a_long_value_is_shortened_in_the_message() -> None:
    with pytest.raises(CheckpointError) as caught:
        config(key="x" * 10_000).integer("key")
    assert len(caught.value.message) < 200


def test_a_multimodal_wrapper_gives_its_language_model() -> None:
    wrapper = config(model_type="gemma3", text_config={"model_type": "gemma3_text", "hidden_size": 8})
    assert wrapper.text().model_type == "gemma3_text"
    with pytest.raises(CheckpointError, match=r"'text_config' in config.json of org/model has no 'head_dim'"):
        wrapper.text().integer("head_dim")
    plain = config(model_type="gemma3_text")
    assert plain.text() is plain
