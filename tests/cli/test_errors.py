"""Bad input: each ends with one clear message (what, where, what to do) and a status, before anything is loaded."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests import tiny_llama
from tests.cli.command import BUDGET, CHECKPOINT, USAGE, Result, check, tightfit

from tightfit.engine import start
from tightfit.weights.placement.resident import Resident

PROMPT = ("-p", "def f(x):", "-n", 4)


# ---------------------------------------------------------------------------------------------- damaged checkpoints


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    os.truncate(file, file.stat().st_size // 2)


def overwrite(name: str, content: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return damage


def scramble_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as file:
        file.seek(20)
        file.write(b"x" * 20)


def remove(pattern: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        sorted(folder.glob(pattern))[-1].unlink()

    return damage


def only(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        shutil.rmtree(folder)
        folder.mkdir()
        (folder / name).write_bytes(b"x")

    return damage


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def change(name: str, to: Callable[[np.ndarray], np.ndarray] | None) -> Callable[[Path], None]:
    """One tensor replaced, or left out."""

    def damage(folder: Path) -> None:
        tensors = tiny_llama.tensors()
        tensor = tensors.pop(name)
        if to is not None:
            tensors[name] = np.ascontiguousarray(to(tensor))
        tiny_llama.save(folder, tensors)

    return damage


@dataclass(frozen=True)
class Case:
    """A checkpoint that is made wrong, and what the message must hold; a file is named where one is at fault."""

    damage: Callable[[Path], None] | None
    parts: tuple[str, ...]
    config: dict[str, Any]
    shards: int = 1


def case(damage: Callable[[Path], None] | None, *parts: str, shards: int = 1, **config: Any) -> Case:
    return Case(damage, parts, config, shards)


UP = "model.layers.0.mlp.up_proj.weight"
BELONG = "Compare config.json with the weights"
AGAIN = "download it again"
DAMAGED = {
    "truncated": case(truncate, "model.safetensors is truncated: expected 16", AGAIN),
    "empty": case(overwrite("model.safetensors", b""), "model.safetensors is truncated", AGAIN),
    "corrupt header": case(scramble_header, "header of", "model.safetensors is not valid JSON", AGAIN),
    "a web page instead": case(overwrite("model.safetensors", b"<!DOCTYPE html>" * 9), "not a safetensors file", AGAIN),
    "a shard is missing": case(remove("model-*"), "1 of 3 weight files", "model-00003-of-00003", "repeat it", shards=3),
    "shapes of another size": case(None, "'model.layers.0.mlp.gate_proj.weight'", "[64, 32]", intermediate_size=64),
    "more layers than weights": case(None, "no tensor 'model.layers.2.", BELONG, num_hidden_layers=3),
    "more weights than layers": case(None, "'model.layers.1.", "describes 1 layers", BELONG, num_hidden_layers=1),
    "rows that nothing uses": case(None, "6144 rows, but config.json describes 6000", BELONG, vocab_size=6000),
    "a tensor is missing": case(change(UP, None), f"no tensor '{UP}'", BELONG),
    "a tensor is transposed": case(change(UP, np.transpose), f"'{UP}'", "[32, 48]", "[48, 32]", BELONG),
    "a tensor of integers": case(change(UP, lambda tensor: tensor.astype(np.int32)), f"'{UP}'", "type I32"),
    "unknown architecture": case(None, "'mamba', which tightfit does not know", "Known: ", model_type="mamba"),
    "no architecture": case(None, "config.json of", "has no 'model_type'", AGAIN, model_type=None),
    "a needed key is missing": case(None, "config.json of", "has no 'hidden_size'", AGAIN, hidden_size=None),
    "a key of the wrong type": case(None, "'num_hidden_layers' = many, expected an integer", num_hidden_layers="many"),
    "layers without end": case(None, "'num_hidden_layers' = 1000000000", num_hidden_layers=10**9),
    "config is not JSON": case(overwrite("config.json", b"{"), "config.json is not valid JSON", AGAIN),
    "config is a list": case(overwrite("config.json", b"[]"), "config.json holds a list", AGAIN),
    "no config": case(remove("config.json"), "has no config.json"),
    "no tokenizer": case(remove("tokenizer.json"), "tokenizer.json is missing", "Download the model again"),
    "corrupt tokenizer": case(overwrite("tokenizer.json", b"{}"), "tokenizer.json cannot be read", "again"),
    "gguf": case(only("model.gguf"), "model.gguf is not a whole GGUF file", "download it again"),
    "pickles only": case(pickled, "pytorch_model.bin", "a pickle can execute code", "convert it"),
    "nothing": case(only("notes.txt"), "holds no *.safetensors"),
    "gptq": case(None, "quantised with gptq", "unquantised", quantization_config={"quant_method": "gptq"}),
    "awq": case(None, "quantised with awq", "unquantised", quantization_config={"quant_method": "awq"}),
    "packed and undeclared": case(change(UP, None), "packed weights", "unquantised"),
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_refused_and_named(name: str, tmp_path: Path) -> None:
    wrong = DAMAGED[name]
    folder = tiny_llama.write(tmp_path / "model", shards=wrong.shards, **wrong.config)
    if name == "packed and undeclared":
        tensors = tiny_llama.tensors()
        tensors[UP.replace("weight", "qweight")] = tensors.pop(UP).astype(np.int32)
        tiny_llama.save(folder, tensors)
    elif wrong.damage is not None:
        wrong.damage(folder)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    check(tightfit("run", folder, *PROMPT), CHECKPOINT, *wrong.parts)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


def vocabulary(rows: int) -> dict[str, np.ndarray]:
    tensors = tiny_llama.tensors()
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = np.resize(tensors[name], (rows, tiny_llama.HIDDEN))
    return tensors


@pytest.mark.usefixtures("unloaded")
def test_a_token_without_an_embedding_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "model", vocab_size=100)
    tiny_llama.save(folder, vocabulary(100))
    done = tightfit("run", folder, "-p", "hello world")
    check(done, CHECKPOINT, "the vocabulary of model ends at 99", "The tokenizer belongs to another model")


def test_embeddings_that_no_token_uses_are_fine(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "model", vocab_size=tiny_llama.VOCAB + 64)
    tiny_llama.save(folder, vocabulary(tiny_llama.VOCAB + 64))
    assert tightfit("run", folder, *PROMPT).status == 0


@pytest.mark.parametrize("sampling", [(), ("--temperature", 1, "--top-p", 0.9)])
def test_weights_that_are_not_numbers_are_told_when_a_token_is_chosen(
    sampling: tuple[object, ...], tmp_path: Path
) -> None:
    folder = tiny_llama.write(tmp_path / "model")
    change(UP, lambda tensor: np.where(tensor == tensor[0, 0], np.float32("nan"), tensor))(folder)
    done = tightfit("run", folder, *PROMPT, *sampling)
    assert done.status == 1
    assert done.stdout.strip() == ""
    assert "not numbers" in done.stderr
    assert "weights may be damaged" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_checkpoint_that_shrinks_while_it_is_read_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama.write(tmp_path / "model")
    load = Resident.load
    monkeypatch.setattr(Resident, "load", lambda *arguments: (truncate(folder), load(*arguments)))
    check(tightfit("run", folder, *PROMPT), CHECKPOINT, "model.safetensors shrank while in use", AGAIN)


# ------------------------------------------------------------------------------------------------------ bad wishes


LONG = "x = 1\n" * 400
WISHES = {
    "a budget that is no size": (USAGE, ["-m", "lots"], "'lots' is not a memory budget", "600MiB"),
    "a budget of nothing": (USAGE, ["-m", "0"], "holds nothing"),
    "more than everything": (USAGE, ["-m", "101%"], "more than the machine has", "at most 100%"),
    "more than there is": (USAGE, ["-m", "999TiB"], "more than the", "Leave --memory out"),
    "a budget that cannot be met": (BUDGET, ["-m", "5MiB"], "does not fit into 5 MiB", "smallest budget that works is"),
    "a context beyond the model's": (USAGE, ["-c", "257"], "trained for 256 tokens", "--context 256"),
    "no context": (USAGE, ["-c", "0"], "a context of 0 tokens", "--context 2"),
    "no batch": (USAGE, ["-b", "0"], "0 sequences at once", "--batch 1"),
    "a batch beyond sense": (USAGE, ["-b", "1000000000"], "sequences at once", "--batch 1"),
    "no chunk": (USAGE, ["--chunk", "0"], "a chunk of 0 tokens", "--chunk 16"),
    "no threads": (USAGE, ["-t", "0"], "0 threads", "--threads 1"),
    "more threads than cores": (USAGE, ["-t", "100000"], "100000 threads", "leave it out"),
    "an unknown format": (USAGE, ["--weights", "int7"], "unknown technique 'int7'", "int4", "int8"),
    "an unknown setting": (USAGE, ["--weights", "int4(size=3)"], "no setting 'size'", "group=32"),
    "an impossible setting": (USAGE, ["--weights", "int4(group=7)"], "groups of 7", "16 to 128"),
    "two formats": (USAGE, ["--weights", "int4+int8"], "names 2 techniques", "one"),
    "a negative temperature": (USAGE, ["--temperature", "-1"], "temperature = -1", "0 for greedy"),
    "a temperature that is no number": (USAGE, ["--temperature", "nan"], "temperature = nan", "0 for greedy"),
    "a share above one": (USAGE, ["--temperature", "1", "--top-p", "2"], "top_p = 2", "from 0 to 1"),
    "a cut without effect": (USAGE, ["--top-k", "5"], "top_k has no effect", "--temperature"),
    "a negative seed": (USAGE, ["--seed", "-1"], "seed = -1", "from 0"),
    "no tokens": (USAGE, ["-n", "0"], "0 new tokens", "at least one"),
    "an empty stop string": (USAGE, ["--stop", ""], "empty stop string", "Leave it out"),
    "an empty prompt": (USAGE, ["-p", ""], "prompt 2 of 2 is empty", "Give some text"),
    "a prompt longer than the context": (USAGE, ["-p", LONG], "prompt 2 of 2 of 2,400 characters", "256"),
    "a prompt as long as the context": (USAGE, ["-c", "5"], "5 tokens, and the context of 5", "--context 256"),
    "two sources": (USAGE, ["--file", "x.txt"], "both -p and --file", "Leave one out"),
    "standard input twice": (USAGE, ["-p", "-", "-p", "-"], "can be read once", "Leave one out"),
    "chat with a prompt": (USAGE, ["--chat"], "--chat reads", "Leave out -p"),
    "a system message without a chat": (USAGE, ["--system", "x"], "--system belongs to", "Add --chat"),
    "an option that is not there": (USAGE, ["--tempo", "1"], "no such option: --tempo", "`tightfit run --help`"),
    "an option of the wrong type": (USAGE, ["-n", "x"], "'--max-new-tokens'", "`tightfit run --help`"),
    "a plan that is not there": (USAGE, ["--plan", "nowhere.json"], "nowhere.json cannot be read", "tightfit plan"),
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", WISHES)
def test_a_wish_that_makes_no_sense_is_refused_with_what_would(name: str, tiny: Path) -> None:
    status, options, *parts = WISHES[name]
    check(tightfit("run", tiny, *PROMPT, *options), status, *parts)


ALONE = {
    "an empty prompt": (["-p", ""], b"", "the prompt is empty"),
    "empty standard input": ([], b"", "the prompt is empty", "-p TEXT, --file FILE or on standard input"),
    "standard input that is not UTF-8": ([], b"abc\xff", "standard input is not UTF-8 text: byte 3 is 0xff", "iconv"),
    "too much standard input": ([], b"x" * (17 << 20), "standard input is longer than 16 MiB"),
    "a file that is not there": (["--file", "nowhere.txt"], b"", "nowhere.txt cannot be read: No such file"),
    "a file that is a folder": (["--file", "/"], b"", "/ cannot be read: Is a directory", "Name a text file"),
    "a device without end": (["--file", "/dev/zero"], b"", "/dev/zero is longer than 16 MiB"),
    "a program as a prompt": (["--file", sys.executable], b"", "is not UTF-8 text", "iconv"),
    "a chat without a template": (["--chat"], b"hello\n", "no chat template", "plain prompt"),
    "a chat in JSON": (["--chat", "--json"], b"hello\n", "--chat prints text", "Leave out --json"),
}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("name", ALONE)
def test_a_prompt_that_cannot_be_used_is_refused(name: str, tiny: Path) -> None:
    options, stdin, *parts = ALONE[name]
    done = tightfit("run", tiny, *options, stdin=stdin)
    if "--json" in options:
        done = Result(done.status, "", done.stderr)
    check(done, USAGE, *parts)


def test_a_prompt_of_special_tokens_only_is_a_prompt(tiny: Path) -> None:
    assert tightfit("run", tiny, "-p", "<|bos|>", "-n", 2).status == 0


@pytest.mark.usefixtures("unloaded")
def test_a_prompt_of_which_the_tokenizer_leaves_nothing_is_refused(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "model")
    settings = json.loads((folder / "tokenizer.json").read_text())
    settings["normalizer"] = {"type": "Strip", "strip_left": True, "strip_right": True}
    settings["post_processor"] = None
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    check(tightfit("run", folder, "-p", "  "), USAGE, "makes no token of the prompt", "Give some text")


@pytest.mark.parametrize("model", ["nowhere/at/all", "nanno", "def f(x):", "x" * 5000])
def test_a_model_that_is_not_there_is_told_with_what_there_is(model: str) -> None:
    check(tightfit("run", model, *PROMPT), CHECKPOINT, "there is no model", "nano", "A prompt is given with -p")


def test_a_model_of_the_hub_that_cannot_be_reached_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = tightfit("run", "org/model", *PROMPT)
    check(done, CHECKPOINT, "org/model is not in the cache", "HF_HUB_OFFLINE forbids", "give a folder")


@pytest.mark.parametrize("command", ["run", "plan"])
def test_a_file_is_not_a_model(command: str, tiny: Path) -> None:
    options = PROMPT if command == "run" else ()
    check(tightfit(command, tiny / "model.safetensors", *options), CHECKPOINT, "is not a folder", f"model: {tiny}")


# --------------------------------------------------------------------------------------------- how errors are told


def test_debug_shows_the_traceback(tiny: Path) -> None:
    done = tightfit("run", tiny, *PROMPT, "-m", "lots", "--debug")
    assert done.status == USAGE
    assert "Traceback" in done.stderr
    assert "error: 'lots' is not a memory budget" in done.stderr


def test_with_json_an_error_is_an_object_too(tiny: Path) -> None:
    done = tightfit("run", tiny, *PROMPT, "-m", "lots", "--json")
    assert done.status == USAGE
    assert done.json == {"error": "'lots' is not a memory budget.", "hint": done.json["hint"]}
    refused = tightfit("run", tiny, *PROMPT, "-m", "5MiB", "--json")
    assert refused.status == BUDGET
    assert set(refused.json) == {"error", "hint", "smallest_bytes"}
    assert refused.json["smallest_bytes"] > 5 << 20


def test_a_mistake_of_ours_is_called_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start, "settle", lambda *arguments: 1 // 0)
    check(tightfit("run", tiny, *PROMPT), 70, "ZeroDivisionError", "a mistake in tightfit", "--debug")


def test_an_error_of_a_file_is_not_called_a_mistake(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "listdir", refuse)
    check(tightfit("run", tiny, *PROMPT), 74, f"{tiny}: Permission denied")


# ---------------------------------------------------------------------------------------------------- the processes


def shell(command: str, **variables: str | Path) -> subprocess.CompletedProcess[str]:
    """``$tightfit`` is the command."""
    environment = os.environ | {"tightfit": f"{sys.executable} -m tightfit"} | {k: str(v) for k, v in variables.items()}
    return subprocess.run(
        ["bash", "-c", command], env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("arguments", ["run $model -p x -n 200 --ignore-eos", "plan", "techniques", "run --help"])
def test_an_output_that_nobody_reads_ends_the_command(arguments: str, tiny: Path) -> None:
    done = shell(f"set -o pipefail; $tightfit {arguments} | :", model=tiny)
    assert done.returncode == 141  # as a shell reports SIGPIPE
    assert done.stderr == "error: standard output was closed before everything was written\n"


def test_an_output_that_was_closed_before_ends_the_command(tiny: Path) -> None:
    done = shell("$tightfit run $model -p x -n 2 >&-", model=tiny)
    assert done.returncode == 141
    assert done.stderr == "error: standard output was closed before everything was written\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_an_output_that_is_full_is_told(tiny: Path) -> None:
    done = shell("$tightfit techniques > /dev/full", model=tiny)
    assert done.returncode == 74
    assert done.stderr.startswith("error: standard output cannot be written: No space left on device\n")


def test_a_standard_input_that_is_closed_is_told(tiny: Path) -> None:
    done = shell("$tightfit run $model <&-", model=tiny)
    assert done.returncode == USAGE
    assert done.stderr == "error: standard input is closed\nGive a prompt with -p TEXT or --file FILE.\n"


def test_a_closed_standard_error_changes_no_result() -> None:
    done = shell("$tightfit techniques --json 2>&-")
    assert done.returncode == 0
    assert json.loads(done.stdout)["techniques"]


def test_letters_that_the_output_does_not_have_are_question_marks(tiny: Path) -> None:
    done = shell("PYTHONIOENCODING=ascii $tightfit run $model -p 'é' -p 'ü' -n 1", model=tiny)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("?")


def test_code_that_lies_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    folder = tiny_llama.write(tmp_path / "model")
    for name in ("json.py", "signal.py", "torch.py", "tokenizers.py", "modeling_llama.py", "sitecustomize.py"):
        (folder / name).write_text("open('executed', 'w').close()\nraise SystemExit(1)\n")
    # As the installed command does, this has no current folder in its path; 200 MiB is planned in a child process.
    code = "import sys; sys.path = [p for p in sys.path if p]; from tightfit.cli.main import main; main()"
    command = [sys.executable, "-c", code, "run", ".", "-p", "x", "-m", "200MiB"]
    source = str(Path(start.__file__).parents[2])
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True)
    assert not (folder / "executed").exists()
    assert done.returncode == BUDGET, done.stderr
