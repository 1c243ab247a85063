"""Generation defaults: from generation_config.json, token ids also from config.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from tightfit.checkpoints import open_checkpoint
from tightfit.checkpoints.generation import GenerationDefaults
from tightfit.errors import CheckpointError


@pytest.fixture
def defaults(make_model: Callable[..., Path]) -> Callable[..., GenerationDefaults]:
    def read(generation: dict[str, Any] | None, config: dict[str, Any]) -> GenerationDefaults:
        folder = make_model(config=config)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        with open_checkpoint(str(folder)) as model:
            return model.generation

    return read


def test_everything_is_read_as_transformers_writes_it(defaults, tmp_path: Path) -> None:
    theirs = GenerationConfig(
        eos_token_id=[7, 9],
        bos_token_id=1,
        pad_token_id=0,
        do_sample=True,
        temperature=0.6,
        top_k=20,
        top_p=0.9,
        min_p=0.05,
        repetition_penalty=1.1,
    )
    theirs.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text())
    assert defaults(written, {"eos_token_id": 2}) == GenerationDefaults((7, 9), 1, 0, True, 0.6, 20, 0.9, 0.05, 1.1)


def test_without_the_file_token_ids_come_from_the_config_and_nothing_filters(defaults) -> None:
    found = defaults(None, {"eos_token_id": [1, 106], "bos_token_id": 2, "pad_token_id": None})
    assert found == GenerationDefaults(eos_token_ids=(1, 106), bos_token_id=2)
    assert (found.do_sample, found.temperature, found.top_k, found.top_p, found.min_p) == (False, 1.0, 0, 1.0, 0.0)
    assert found.repetition_penalty == 1.0


def test_each_token_id_falls_back_alone(defaults) -> None:
    config = {"eos_token_id": 2, "pad_token_id": -1, "text_config": {"bos_token_id": 5, "eos_token_id": 6}}
    found = defaults({"eos_token_id": None, "temperature": None}, config)
    assert found == GenerationDefaults(eos_token_ids=(2,), bos_token_id=5, pad_token_id=None)


@pytest.mark.parametrize(
    ("generation", "message"),
    [
        ({"eos_token_id": "</s>"}, "'eos_token_id' = </s>"),
        ({"eos_token_id": [1, -3]}, "'eos_token_id'"),
        ({"eos_token_id": -3}, "'eos_token_id' = -3"),
        ({"temperature": -1}, "'temperature' = -1"),
        ({"top_k": 2.5}, "'top_k' = 2.5"),
        ({"top_p": 1.5}, "'top_p' = 1.5"),
        ({"min_p": "a"}, "'min_p' = a"),
        ({"repetition_penalty": 0}, "'repetition_penalty' = 0"),
        ({"do_sample": 1}, "'do_sample' = 1"),
    ],
)
def test_values_that_cannot_be_used_are_named(defaults, generation: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=f"generation_config.json of model has {message}"):
        defaults(generation, {})


def test_a_damaged_file_is_refused(make_model: Callable[..., Path]) -> None:
    folder = make_model()
    (folder / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config.json is not valid JSON"):
        open_checkpoint(str(folder))
