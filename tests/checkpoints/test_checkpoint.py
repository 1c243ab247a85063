"""Folders: opened whole, read exactly, and refused with the name of what is wrong."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from tightfit.checkpoints import open_checkpoint
from tightfit.errors import CheckpointError, UsageError

MakeModel = Callable[..., Path]
FIRST_OF_TWO = "model-00001-of-00002.safetensors"


@pytest.mark.parametrize("shards", [1, 2, 3])
def test_every_byte_of_every_tensor_is_read(make_model: MakeModel, shards: int) -> None:
    with open_checkpoint(str(make_model(shards=shards))) as model:
        assert sorted(model.tensors) == [f"layers.{i}.weight" for i in range(4)]
        # 6, 7, 8 and 9 float32 values
        assert model.total_bytes == 4 * (6 + 7 + 8 + 9)
        for i in range(4):
            out = np.zeros(6 + i, np.float32)
            model.read_into(model.tensors[f"layers.{i}.weight"], 0, out)
            assert out.tolist() == [i + j for j in range(6 + i)]


def test_a_part_of_a_tensor_is_read_from_where_it_is_asked(make_model: MakeModel) -> None:
    with open_checkpoint(str(make_model())) as model:
        tensor = model.tensors["layers.2.weight"]
        out = bytearray(8)
        model.read_into(tensor, 4, memoryview(out)[2:6])
        assert out == b"\0\0" + np.float32(3).tobytes() + b"\0\0"
        for start, length in ((-1, 1), (tensor.nbytes, 1), (0, tensor.nbytes + 1)):
            with pytest.raises(ValueError, match="bytes"):
                model.read_into(tensor, start, bytearray(length))
        with pytest.raises(BufferError, match="not writable"):
            model.read_into(tensor, 0, bytes(4))


def test_short_reads_are_continued(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, offset: whole(fd, [buffers[0][:3]], offset))
    with open_checkpoint(str(make_model())) as model:
        out = np.zeros(9, np.float32)
        model.read_into(model.tensors["layers.3.weight"], 0, out)
        assert out.tolist() == list(range(3, 12))


def test_a_failing_disk_and_a_shrunk_file_are_named(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model()
    with open_checkpoint(str(folder)) as model:
        last = max(model.tensors.values(), key=lambda tensor: tensor.offset)
        os.truncate(folder / "model.safetensors", last.offset + 2)
        with pytest.raises(CheckpointError, match=f"model.safetensors shrank .*found {last.offset + 2}"):
            model.read_into(last, 0, bytearray(last.nbytes))

        def fail(*args: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read at byte .*Input/output error"):
            model.read_into(last, 0, bytearray(1))


def test_files_are_opened_once_and_closed(make_model: MakeModel) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    folder = make_model(shards=3)
    before = open_files()
    with open_checkpoint(str(folder)) as model:
        assert open_files() == before + 3
        for tensor in model.tensors.values():
            model.read_into(tensor, 0, bytearray(tensor.nbytes))
        assert open_files() == before + 3
    assert open_files() == before
    with pytest.raises(ValueError, match="closed"):
        model.read_into(tensor, 0, bytearray(1))
    (folder / "model-00003-of-00003.safetensors").write_bytes(b"damaged")
    with pytest.raises(CheckpointError):
        open_checkpoint(str(folder))
    assert open_files() == before


def test_the_fingerprint_follows_the_model_and_nothing_else(make_model: MakeModel, tmp_path: Path) -> None:
    def fingerprint(folder: Path) -> str:
        with open_checkpoint(str(folder)) as model:
            return model.fingerprint

    folder = make_model()
    original = fingerprint(folder)
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "README.md").write_text("notes")
    assert fingerprint(copy) == original

    content = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(content[:-4] + b"data")  # the data is not read
    assert fingerprint(copy) == original
    (copy / "model.safetensors").write_bytes(content.replace(b"layers.0", b"layers.9"))
    assert fingerprint(copy) != original
    (copy / "model.safetensors").write_bytes(content.replace(b"[6,1]", b"[1,6]"))
    assert fingerprint(copy) != original
    (copy / "model.safetensors").write_bytes(content)
    (copy / "config.json").write_text((folder / "config.json").read_text().replace("8", "16"))
    assert fingerprint(copy) != original


def test_missing_shards_are_named(make_model: MakeModel) -> None:
    folder = make_model(shards=2)
    (folder / FIRST_OF_TWO).unlink()
    with pytest.raises(CheckpointError, match=f"1 of 2 weight files of .* missing: {FIRST_OF_TWO}"):
        open_checkpoint(str(folder))
    (folder / FIRST_OF_TWO).symlink_to(folder / "blob that was deleted")
    with pytest.raises(CheckpointError, match=f"missing: {FIRST_OF_TWO}"):
        open_checkpoint(str(folder))


def test_an_index_that_disagrees_with_its_shards_is_refused(make_model: MakeModel) -> None:
    folder = make_model(shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())["weight_map"]
    second = index["layers.1.weight"]
    path.write_text(json.dumps({"weight_map": index | {"layers.0.weight": second}}))
    with pytest.raises(CheckpointError, match=f"'layers.0.weight' in {second}, which does not hold it"):
        open_checkpoint(str(folder))
    for bad in ({}, {"weight_map": []}, {"weight_map": {}}):
        path.write_text(json.dumps(bad))
        with pytest.raises(CheckpointError, match="no 'weight_map'"):
            open_checkpoint(str(folder))
    for elsewhere in ("../other/model.safetensors", "/etc/passwd", "weights.bin", 5):
        path.write_text(json.dumps({"weight_map": index | {"layers.0.weight": elsewhere}}))
        with pytest.raises(CheckpointError, match=r"'layers.0.weight' in .* same folder"):
            open_checkpoint(str(folder))


def test_several_files_without_an_index_are_one_model(make_model: MakeModel) -> None:
    folder = make_model(shards=2)
    (folder / "model.safetensors.index.json").unlink()
    with open_checkpoint(str(folder)) as model:
        assert len(model.tensors) == 4
    save_file({"layers.0.weight": np.zeros(2, np.float32)}, folder / "z.safetensors")
    with pytest.raises(CheckpointError, match=f"'layers.0.weight' is in both {FIRST_OF_TWO} and z.safetensors"):
        open_checkpoint(str(folder))


def test_the_single_file_goes_before_leftovers(make_model: MakeModel) -> None:
    folder = make_model()
    shutil.copy(folder / "model.safetensors", folder / "consolidated.safetensors")
    with open_checkpoint(str(folder)) as model:
        assert {tensor.file for tensor in model.tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["pytorch_model.bin"], "pickled weights only .pytorch_model.bin."),
        (["consolidated.00.pth", "training_args.bin"], "pickled weights only .consolidated.00.pth."),
        (["tf_model.h5"], "no \\*.safetensors"),
        ([], "no \\*.safetensors"),
    ],
)
def test_folders_of_other_kinds_are_refused_by_what_they_hold(tmp_path: Path, files: list[str], message: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"never opened")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(str(tmp_path))
    assert "safetensors" in caught.value.hint
    for name in files[:1]:
        with pytest.raises(CheckpointError, match=message if name != "tf_model.h5" else "is not a folder"):
            open_checkpoint(str(tmp_path / name))


def test_what_is_not_a_model_folder_is_refused(make_model: MakeModel, tmp_path: Path) -> None:
    folder = make_model()
    with pytest.raises(CheckpointError, match="no folder or file 'nowhere'"):
        open_checkpoint("nowhere")
    with pytest.raises(CheckpointError, match=r"no folder or file '\./no/where'"):
        open_checkpoint("./no/where")
    with pytest.raises(CheckpointError, match="is not a folder") as caught:
        open_checkpoint(str(folder / "model.safetensors"))
    assert str(folder) in caught.value.hint
    with pytest.raises(UsageError, match="has no revisions"):
        open_checkpoint(str(folder), revision="main")
    (folder / "config.json").rename(folder / "adapter_config.json")
    with pytest.raises(CheckpointError, match="holds an adapter"):
        open_checkpoint(str(folder))
    (folder / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"has no config.json"):
        open_checkpoint(str(folder))


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b"\xff\xfe{}", b"[" * 100_000, b'{"a": 1}' * 2])
def test_a_damaged_config_is_refused(make_model: MakeModel, content: bytes) -> None:
    folder = make_model()
    (folder / "config.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"config.json") as caught:
        open_checkpoint(str(folder))
    assert "download it again" in caught.value.hint


def test_an_absurdly_large_config_is_not_read(make_model: MakeModel) -> None:
    folder = make_model()
    os.truncate(folder / "config.json", 1 << 40)  # a sparse terabyte
    with pytest.raises(CheckpointError, match="larger than 64 MiB"):
        open_checkpoint(str(folder))


def test_a_pipe_is_refused_instead_of_waited_for(make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not a regular file"):
        open_checkpoint(str(folder))


def test_a_file_without_permission_is_named(make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model()

    def deny(path: object, *args: object) -> int:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)

    monkeypatch.setattr(os, "open", deny)  # the tests may run as root, who may read everything
    with pytest.raises(CheckpointError, match=r"model.safetensors cannot be read: Permission denied"):
        open_checkpoint(str(folder))


def test_opening_imports_nothing_heavy(make_model: MakeModel) -> None:
    script = f"""
import sys
from tightfit.checkpoints import open_checkpoint
from tightfit.checkpoints import config, quantization, rope
with open_checkpoint({str(make_model())!r}) as model:
    tensor = model.tensors["layers.0.weight"]
    model.read_into(tensor, 0, bytearray(tensor.nbytes))
heavy = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "jinja2", "huggingface_hub")
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
