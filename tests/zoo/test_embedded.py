from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightfit import zoo
from tightfit.errors import UsageError
from tightfit.zoo import evaluate
from tightfit.zoo.network import CausalLM
from tightfit.zoo.presets import preset
from tightfit.zoo.tasks import Material
from tightfit.zoo.train import write_tokenizer_config


@pytest.mark.parametrize("name", zoo.EMBEDDED)
def test_an_embedded_model_is_complete_and_small_enough_to_ship(name: str) -> None:
    files = {file.name: file.stat().st_size for file in zoo.path(name).iterdir()}
    assert files.keys() == {
        "README.md",
        "config.json",
        "generation_config.json",
        "heldout.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(files.values()) < 32_000_000


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="Embedded models: nano"):
        zoo.path("mega")


def test_finding_the_embedded_model_imports_nothing_heavy() -> None:
    code = "import sys, tightfit.zoo; tightfit.zoo.path(); print({'torch', 'numpy', 'tokenizers'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_the_config_is_that_of_the_preset_and_of_the_tensors(tokenizer: Tokenizer) -> None:
    folder, shape = zoo.path("nano"), preset("nano").shape
    assert json.loads((folder / "config.json").read_text()) == shape.config(tokenizer.get_vocab_size())
    with torch.device("meta"):
        expected = {
            name: list(value.shape) for name, value in CausalLM(shape, tokenizer.get_vocab_size()).state_dict().items()
        }
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        assert {name: tensors.get_slice(name).get_shape() for name in tensors.keys()} == expected  # noqa: SIM118
        assert {tensors.get_slice(name).get_dtype() for name in expected} == {"BF16"}


def test_the_small_files_are_those_that_the_recipe_writes(tmp_path: Path) -> None:
    write_tokenizer_config(tmp_path, preset("nano").shape.max_position_embeddings)
    for file in tmp_path.iterdir():
        assert json.loads((zoo.path("nano") / file.name).read_text()) == json.loads(file.read_text())


def test_the_tokenizer_reads_digits_one_by_one_and_begins_a_text_as_in_training(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("x = 20245").tokens == ["<|bos|>", "x", "Ġ=", "Ġ", "2", "0", "2", "4", "5"]
    assert (
        AutoTokenizer.from_pretrained(zoo.path("nano"))("x = 20245")["input_ids"] == tokenizer.encode("x = 20245").ids
    )


def test_nano_looks_up_what_it_read(tokenizer: Tokenizer, material: Material) -> None:
    model = AutoModelForCausalLM.from_pretrained(zoo.path("nano"), dtype=torch.float32).eval()

    @torch.no_grad()
    def logits(ids: list[int]) -> torch.Tensor:
        scores: torch.Tensor = model(torch.tensor([ids])).logits[0]
        return scores

    for task in ("dictionary", "needles"):
        got = evaluate.lookup_accuracy(logits, Material(tokenizer, material.code), task, 400, questions=5)
        # The card says 24 of 24 at this length. A broken weight or a wrong rope base answers none.
        assert got.correct >= 4, got
