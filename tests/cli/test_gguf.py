"""Models in GGUF with every command that opens a model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from tests import gguf_files, tiny_llama
from tests.cli.command import USAGE, check, tightfit

RUN = ("--max-new-tokens", 8, "--ignore-eos", "--json", "--memory", "4GiB")


def text_of(model: Path, *options: object) -> str:
    done = tightfit("run", model, "-p", "Once upon a time", *RUN, *map(str, options))
    assert done.status == 0, done.stderr
    text: str = done.json["completions"][0]["text"]
    return text


def test_a_file_gives_the_tokens_of_the_folder_it_was_made_from(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "folder")
    file = gguf_files.tiny(tmp_path / "model.gguf", **{"tokenizer.ggml.add_bos_token": True})
    assert text_of(file) == text_of(folder)


def test_a_compressed_file_runs_alone(tmp_path: Path) -> None:
    """Its codes are kept, and so are its tokens; nothing of the file itself is needed."""
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    file = gguf_files.tiny(tmp_path / "model.gguf", "Q8_0", **{"tokenizer.chat_template": template})
    expected = text_of(file)
    done = tightfit("compress", file, "--out", tmp_path / "out", "--memory", "4GiB", "--json")
    assert done.status == 0, done.stderr
    assert done.json["weights"] == "own"
    file.unlink()
    assert text_of(tmp_path / "out") == expected
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "tokenizer.json", "tokenizer_config.json", "tightfit.safetensors"}
    chat = tightfit("run", tmp_path / "out", "--chat", "-n", 4, "--memory", "4GiB", stdin="Hello\n")
    assert chat.status == 0, chat.stderr


def test_other_formats_can_be_asked_for(tmp_path: Path) -> None:
    file = gguf_files.tiny(tmp_path / "model.gguf", "Q8_0")
    done = tightfit("run", file, "-p", "Once", *RUN, "--weights", "int4")
    assert done.status == 0, done.stderr
    assert {layer["format"] for layer in done.json["receipt"]["plan"]["layers"]} == {"int4"}


def test_what_is_converted_is_said(tmp_path: Path) -> None:
    for kind, said in (("Q6_K", True), ("Q8_0", False)):
        file = (
            gguf_files.large(tmp_path / "model.gguf", kind, 256, 512, 1)
            if said
            else gguf_files.tiny(tmp_path / "tiny.gguf", kind)
        )
        done = tightfit("plan", file, "--memory", "4GiB")
        assert done.status == 0, done.stderr
        assert ("(scales of Q6_K rounded to float16)" in " ".join(done.stdout.split())) == said


def test_fewer_bits_are_taken_only_where_they_save_bytes(tmp_path: Path) -> None:
    file = gguf_files.large(tmp_path / "model.gguf", "Q4_K", 256, 512, 1)
    done = tightfit("plan", file, "--memory", "4GiB", "--json")
    assert done.status == 0, done.stderr
    assert [level["format"] for level in done.json["precisions"]] == [
        "own",
        "int4",
        "int4(group=64)",
        "int4(group=128)",
    ]


def test_compress_asks_for_a_format_where_it_would_save_nothing(tmp_path: Path) -> None:
    check(tightfit("compress", tiny_llama.write(tmp_path / "m"), "--out", tmp_path / "out"), USAGE, "--weights: int4")


@pytest.mark.parametrize("name", ["model.gguf", "other.gguf"])
def test_a_folder_of_several_names_them(tmp_path: Path, name: str) -> None:
    first = gguf_files.tiny(tmp_path / "model.gguf")
    if name != first.name:
        shutil.copy(first, tmp_path / name)
    done = tightfit("plan", tmp_path, "--json", "--memory", "4GiB")
    if name == first.name:
        assert json.loads(done.stdout)["model"]["name"] == "model.gguf"
    else:
        assert "2 models: model.gguf, other.gguf" in done.stderr
