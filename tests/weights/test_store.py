"""Compressed folders: what is written is what memory holds, and whatever goes wrong leaves nothing that would open."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tests import tiny_llama, tiny_mixtures

from tightfit.budget.ledger import Arena
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.errors import CheckpointError, FileError, TightfitError, UsageError
from tightfit.model.families import model_spec
from tightfit.model.spec import ModelSpec
from tightfit.weights import store
from tightfit.weights.placement.places import check, group_of
from tightfit.weights.placement.resident import Resident

FILE = "tightfit.safetensors"
MIXED = "mixed(embed=int8,down=int6,ends=bf16,rest=int4(group=64))"


def opened(folder: Path) -> tuple[Checkpoint, ModelSpec]:
    checkpoint = open_checkpoint(str(folder))
    return checkpoint, model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)


def compress(folder: Path, weights: str, out: Path, **options: Any) -> Path:
    checkpoint, spec = opened(folder)
    with checkpoint:
        layout = store.layout(checkpoint, spec, weights)
        memory = torch.full((max(group.nbytes for group in layout),), 0xA5, dtype=torch.uint8)
        store.write(checkpoint, weights, layout, memory, out, threads=2, **options)
    return out


def loaded(folder: Path, weights: str) -> tuple[Resident, torch.Tensor]:
    """The model in memory, and all of its bytes."""
    checkpoint, spec = opened(folder)
    check(checkpoint, spec)
    arena = Arena(1 << 24)
    resident = Resident(
        checkpoint, spec, weights, dict.fromkeys(range(len(spec.layers)), weights), torch.float32, arena
    )
    resident.load()
    return resident, arena.view(0, (resident.nbytes,))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "tiny", chat=True)


@pytest.fixture(scope="module")
def compressed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress(tiny, "int4", tmp_path_factory.mktemp("models") / "small")


@pytest.mark.parametrize("weights", ["bf16", "int4", "fp8", "llm_int8(outliers=0.1)", "pruned(keep=0.3)", MIXED])
@pytest.mark.parametrize("family", sorted(tiny_mixtures.CONFIGS))
def test_a_folder_gives_the_bytes_that_quantising_while_loading_does(family: str, weights: str, tmp_path: Path) -> None:
    tiny_mixtures.write(tmp_path / "model", tiny_mixtures.config_of(family), torch.bfloat16)
    direct, expected = loaded(tmp_path / "model", weights)
    stored, found = loaded(compress(tmp_path / "model", weights, tmp_path / "out"), "of no meaning here")
    assert torch.equal(found, expected)
    assert stored.model.keys() == direct.model.keys()
    for ours, theirs in zip(stored._layers, direct._layers, strict=True):
        assert ours.keys() == theirs.keys()
        assert (ours.experts is None) == (theirs.experts is None)


def test_the_file_is_what_its_description_says(tiny: Path, compressed: Path) -> None:
    with open_checkpoint(str(tiny)) as source, open_checkpoint(str(compressed)) as model:
        assert model.compressed is not None
        assert (model.compressed.weights, model.compressed.source) == ("int4", "tiny")
        assert model.compressed.fingerprint == source.fingerprint
        assert model.compressed.types == ("F32",)
        assert list(model.tensors) == ["embeddings", "layers.0", "layers.1", "head"]  # in the order of use
        for tensor in model.tensors.values():
            assert tensor.dtype == "U8"
            assert tensor.offset % 4096 == tensor.nbytes % 4096 == 0
        for params in model.compressed.groups.values():
            assert all(param.offset % 64 == 0 for param in params)
        formats = {param.name: param.format for param in model.compressed.groups["layers.0"]}
        assert formats["q_proj"] == "int4"
        assert formats["input_layernorm"] == "f32"
        assert model.fingerprint != source.fingerprint
        assert model.tokenizer().render_chat([{"role": "user", "content": "x"}])
    # Any other reader of safetensors can read it.
    with safe_open(compressed / FILE, "pt") as file:
        assert file.metadata()["format"] == "tightfit"
        assert file.get_tensor("layers.1").dtype == torch.uint8
    assert {path.name for path in compressed.iterdir()} == {
        FILE,
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_the_same_model_gives_the_same_file(tiny: Path, compressed: Path, tmp_path: Path) -> None:
    again = compress(tiny, "int4", tmp_path / "again")
    assert (again / FILE).read_bytes() == (compressed / FILE).read_bytes()


def test_what_belongs_to_a_model_is_copied_and_nothing_else(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (folder / "notes.txt").write_text("mine")
    out = compress(folder, "int8", tmp_path / "a" / "b")
    copied = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert copied >= {"generation_config.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"}
    assert not {"notes.txt", "model.safetensors"} & copied
    assert (out / "config.json").read_text() == (folder / "config.json").read_text()


# ------------------------------------------------------------------------------------------------ what is there already


def test_something_else_is_never_replaced(tiny: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    (tmp_path / "file").write_text("text")
    for out in (mine, tmp_path / "file"):
        for force in (False, True):
            with pytest.raises(UsageError, match="there is something else at"):
                compress(tiny, "int4", out, force=force)
    assert (mine / "letter.txt").read_text() == "dear"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "mine"]


def test_a_compressed_folder_is_replaced_when_asked_to(tiny: Path, compressed: Path, tmp_path: Path) -> None:
    out = shutil.copytree(compressed, tmp_path / "out")
    with pytest.raises(UsageError, match="--force"):
        compress(tiny, "int8", out)
    compress(tiny, "int8", out, force=True)
    with open_checkpoint(str(out)) as model:
        assert model.compressed is not None
        assert model.compressed.weights == "int8"
    assert list(tmp_path.iterdir()) == [out]


def test_an_empty_folder_and_a_link_to_one_are_taken(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    compress(tiny, "int4", tmp_path / "link")
    assert (tmp_path / "real" / FILE).exists()
    assert (tmp_path / "link").is_symlink()


# --------------------------------------------------------------------------------------------------- what may go wrong


def nothing_is_left(folder: Path, *allowed: str) -> bool:
    return {path.name for path in folder.iterdir()} <= set(allowed)


def test_a_full_disk_is_found_before_anything_is_read(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage._replace(free=100_000))
    monkeypatch.setattr(store, "fill", lambda *arguments: pytest.fail("weights were read"))
    with pytest.raises(FileError, match=r"would take .*, and its disk has 97.7 KiB left"):
        compress(tiny, "int4", tmp_path / "out")
    assert nothing_is_left(tmp_path)


@pytest.mark.parametrize("limit", [1000, 100_000, 250_000])  # in the header, in the embeddings, in the tokenizer
def test_a_write_that_fails_leaves_nothing(limit: int, tiny: Path, tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(FileError, match=r"out cannot be written: File too large"):
            compress(tiny, "int4", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert nothing_is_left(tmp_path)


class FullDisk:
    """Writes as os.write does, fewer bytes than it is given, until ``room`` bytes are there."""

    def __init__(self, room: int) -> None:
        self.room, self._write = room, os.write

    def __call__(self, descriptor: int, data: Any) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = self._write(descriptor, memoryview(data)[: min(self.room, 5000)])
        self.room -= written
        return written


@pytest.mark.parametrize("room", [0, 70_000, 200_000])
def test_a_disk_that_fills_up_leaves_what_was_there(
    room: int, tiny: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(compressed, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(os, "write", FullDisk(room))
    with pytest.raises(FileError, match=r"out cannot be written: No space left on device") as refused:
        compress(tiny, "int8", out, force=True)
    assert "another disk" in refused.value.hint
    assert nothing_is_left(tmp_path, "out")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_disk_that_tells_late_that_it_is_full_leaves_what_was_there(
    call: str, tiny: Path, compressed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(compressed, tmp_path / "out")
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    rename = Path.rename

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full_for_new_names(self: Path, target: Path) -> Path:
        if target == out and self.name.endswith(f".{os.getpid()}.part"):
            full()
        return rename(self, target)

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(Path, "rename", full_for_new_names)
    with pytest.raises(FileError, match="No space left on device"):
        compress(tiny, "int8", out, force=True)
    assert nothing_is_left(tmp_path, "out")
    assert before == {path.name: path.read_bytes() for path in out.iterdir()}


def test_a_damaged_checkpoint_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny, tmp_path / "model")
    tensors = tiny_llama.tensors()
    tensors["model.layers.1.mlp.up_proj.weight"][5, 5] = float("nan")
    tiny_llama.save(folder, tensors)
    with pytest.raises(CheckpointError, match=r"rows 0 to 47 of 'model.layers.1.mlp.up_proj.weight' of model"):
        compress(folder, "int4", tmp_path / "out")
    assert nothing_is_left(tmp_path, "model")


SLOW = """
import sys, time
from pathlib import Path
from tests.weights import test_store
from tightfit.weights import store
fill = store.fill
def slow(*arguments):
    print("here", flush=True)
    time.sleep(float(sys.argv[3]))
    return fill(*arguments)
store.fill = slow
test_store.compress(Path(sys.argv[1]), "int4", Path(sys.argv[2]))
"""


def start(model: Path, out: Path, seconds: float) -> subprocess.Popen[str]:
    """A process that compresses, and waits at each group."""
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "src")])}
    command = [sys.executable, "-c", SLOW, str(model), str(out), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment)


@pytest.mark.parametrize("groups", [1, 3, 4])
def test_a_killed_process_leaves_nothing_that_opens_and_the_next_one_cleans_up(
    groups: int, tiny: Path, tmp_path: Path
) -> None:
    process = start(tiny, tmp_path / "out", 0.3)
    assert process.stdout is not None
    for _ in range(groups):  # the embeddings, two layers, the head
        assert process.stdout.readline() == "here\n"
    process.kill()
    process.wait()
    [left] = tmp_path.iterdir()
    assert left.name.startswith(".out.")
    with pytest.raises(CheckpointError):
        open_checkpoint(str(left))
    compress(tiny, "int4", tmp_path / "other")
    assert left.exists()  # of another name, so left alone
    compress(tiny, "int4", tmp_path / "out")
    assert nothing_is_left(tmp_path, "out", "other")


def test_an_interrupt_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    process = start(tiny, tmp_path / "out", 30)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    assert len(list(tmp_path.iterdir())) == 1
    process.send_signal(signal.SIGINT)
    process.wait(timeout=20)
    assert nothing_is_left(tmp_path)


def test_what_another_process_is_writing_is_left_alone(tiny: Path, tmp_path: Path) -> None:
    process = start(tiny, tmp_path / "out", 1.0)
    assert process.stdout is not None
    assert process.stdout.readline() == "here\n"
    compress(tiny, "int8", tmp_path / "out")
    assert process.wait(timeout=30) == 1  # it finds the place taken
    with open_checkpoint(str(tmp_path / "out")) as model:
        assert model.compressed is not None
        assert model.compressed.weights == "int8"
    assert nothing_is_left(tmp_path, "out")


# ----------------------------------------------------------------------------------------------- folders that are wrong


def edit(folder: Path, change: Any) -> None:
    """Changes the description in the file's header; the data stay where they are."""
    content = (folder / FILE).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    described = json.loads(header["__metadata__"]["tightfit"])
    changed = change(described)
    header["__metadata__"]["tightfit"] = json.dumps(described if changed is None else changed)
    text = json.dumps(header, separators=(",", ":")).encode().ljust(length)
    assert len(text) == length
    (folder / FILE).write_bytes(content[:8] + text + content[8 + length :])


def first(group: str, **changes: Any) -> Any:
    return lambda described: described["groups"][group][0].update(changes)


EDITS = {
    "no description": (lambda described: [], "does not say how it was compressed"),
    "another version": (lambda described: described.update(version=2), "another version of tightfit"),
    "no weights": (lambda described: described.pop("weights") and None, "has no 'weights'"),
    "a group too few": (lambda described: described["groups"].pop("head") and None, "other tensors than it holds"),
    "a group that is no list": (lambda described: described["groups"].update(head=3), "a list of parameters"),
    "a place outside of the group": (first("layers.0", offset=1 << 30), "not the run of bytes"),
    "an odd place": (first("layers.0", offset=32), "overlaps"),
    "two at one place": (lambda described: described["groups"]["layers.0"][1].update(offset=0), "overlaps"),
    "another shape": (first("embeddings", shape=[6144, 64]), "does not belong to its config.json"),
    "another format": (first("embeddings", format="int8"), "bytes, which is not int8"),
    "an unknown format": (first("embeddings", format="int4711"), "keeps embed_tokens as 'int4711'"),
    "another parameter": (first("embeddings", name="embed"), "has no embed_tokens"),
    "copies closer than they are long": (first("layers.0", stride=1), "overlaps"),
}


EXPERT_EDITS: dict[str, dict[str, Any]] = {
    "a stride of its own": {"stride": 64},
    "longer than the room between copies": {"nbytes": 9984},
    "fewer experts": {"experts": 2},
    "in the middle of another": {"offset": 0},
}


@pytest.mark.parametrize("name", EXPERT_EDITS)
def test_experts_that_would_overlap_are_refused(name: str, tmp_path: Path) -> None:
    tiny_mixtures.write(tmp_path / "model", tiny_mixtures.config_of("mixtral"), torch.bfloat16)
    folder = compress(tmp_path / "model", "int4", tmp_path / "out")
    open_checkpoint(str(folder)).close()

    def change(groups: Any) -> None:
        [param] = [param for param in groups["layers.0"] if param["name"] == "experts.up_proj"]
        param |= EXPERT_EDITS[name]

    edit(folder, lambda description: change(description["groups"]))
    with pytest.raises(CheckpointError, match=r"overlaps|is not the run of bytes"):
        open_checkpoint(str(folder))


def test_an_expert_is_one_run_of_bytes(tmp_path: Path) -> None:
    checkpoint, spec = tiny_mixtures.write(tmp_path, tiny_mixtures.config_of("qwen2_moe"), torch.bfloat16)
    [*others, gate, up, down] = group_of(checkpoint, spec, "layers.1", "int4").places
    assert [place.param.name for place in (gate, up, down)] == [
        f"experts.{name}_proj" for name in ("gate", "up", "down")
    ]
    assert all(place.end <= gate.offset for place in others)
    assert gate.offset % 4096 == gate.stride % 4096 == 0
    assert gate.stride == up.stride == down.stride
    assert gate.offset + gate.nbytes <= up.offset < up.offset + up.nbytes <= down.offset
    assert down.offset + down.nbytes <= gate.offset + gate.stride


@pytest.mark.parametrize("name", EDITS)
def test_an_edited_description_is_refused_with_what_to_do(name: str, compressed: Path, tmp_path: Path) -> None:
    change, message = EDITS[name]
    folder = shutil.copytree(compressed, tmp_path / "copy")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message) as refused:
        check(*opened(folder))
    assert "ompress" in refused.value.hint


@pytest.mark.parametrize("changes", [{"hidden_size": 64}, {"num_hidden_layers": 3}, {"tie_word_embeddings": True}])
def test_a_changed_configuration_is_refused(changes: dict[str, Any], compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "copy")
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"does not belong to its config.json") as refused:
        check(*opened(folder))
    assert "compress the model again" in refused.value.hint


@pytest.mark.parametrize("kept", [10, 5000, -4096, -1])
def test_a_truncated_file_is_refused(kept: int, compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "copy")
    size = (folder / FILE).stat().st_size
    os.truncate(folder / FILE, kept if kept > 0 else size + kept)
    with pytest.raises(CheckpointError, match="truncated") as refused:
        open_checkpoint(str(folder))
    assert "compress the model again" in refused.value.hint


def test_a_file_that_shrinks_while_it_is_read_is_told(compressed: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(compressed, tmp_path / "copy")
    checkpoint, spec = opened(folder)
    arena = Arena(1 << 24)
    resident = Resident(checkpoint, spec, "int4", {0: "int4", 1: "int4"}, torch.float32, arena)
    os.truncate(folder / FILE, (folder / FILE).stat().st_size - 5000)
    with pytest.raises(TightfitError, match="shrank while in use"):
        resident.load()


def test_a_compressed_model_is_not_taken_for_another_ones(tiny: Path, compressed: Path) -> None:
    from transformers import AutoModelForCausalLM

    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        AutoModelForCausalLM.from_pretrained(compressed)
