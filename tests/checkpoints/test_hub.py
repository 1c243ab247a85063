"""Models by hub name, against a hub on this machine and the cache that huggingface_hub lays out."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from tests import tiny_llama

import tightfit
from tightfit.checkpoints import open_checkpoint
from tightfit.errors import CheckpointError

NAME = "someone/tiny-llama"
MakeModel = Callable[..., Path]


def test_a_model_is_downloaded_and_reads_like_its_folder(hub, make_model: MakeModel) -> None:
    folder = make_model(shards=2)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    hub.models[NAME] = folder
    with open_checkpoint(NAME) as model, open_checkpoint(str(folder)) as original:
        assert model.name == NAME
        assert model.fingerprint == original.fingerprint
        for name, tensor in model.tensors.items():
            ours, theirs = bytearray(tensor.nbytes), bytearray(tensor.nbytes)
            model.read_into(tensor, 0, ours)
            original.read_into(original.tensors[name], 0, theirs)
            assert ours == theirs
    assert "pytorch_model.bin" not in hub.served


def test_headers_only_fetches_no_weights(hub, make_model: MakeModel) -> None:
    folder = make_model(shards=2)
    # 300 kB of data behind each header: more than the first request asks for
    header = json.dumps({"wide": {"dtype": "U8", "shape": [300_000], "data_offsets": [0, 300_000]}}).encode()
    (folder / "model-00001-of-00002.safetensors").write_bytes(
        len(header).to_bytes(8, "little") + header + bytes(300_000)
    )
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    index["weight_map"] = {
        "wide": "model-00001-of-00002.safetensors",
        "layers.1.weight": "model-00002-of-00002.safetensors",
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    hub.models[NAME] = folder
    with open_checkpoint(NAME, headers_only=True) as model, open_checkpoint(str(folder)) as original:
        assert model.tensors == original.tensors
        assert model.fingerprint == original.fingerprint
        assert model.total_bytes == original.total_bytes
        with pytest.raises(CheckpointError, match="headers only"):
            model.read_into(model.tensors["wide"], 0, bytearray(1))
    assert hub.served["model-00001-of-00002.safetensors"] == 100_000


def test_a_header_longer_than_the_first_request_is_read_whole(hub, make_model: MakeModel) -> None:
    folder = make_model()
    # 2000 tensors with an entry of over 60 bytes each make a header of more than 100,000 bytes
    header = {f"layers.{i}.weight": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(2000)}
    content = json.dumps(header).encode()
    assert len(content) > 100_000
    (folder / "model.safetensors").write_bytes(len(content).to_bytes(8, "little") + content + bytes(2000))
    hub.models[NAME] = folder
    with open_checkpoint(NAME, headers_only=True) as model:
        assert len(model.tensors) == 2000


def test_headers_only_uses_weights_that_are_cached(hub, make_model: MakeModel) -> None:
    hub.models[NAME] = make_model()
    open_checkpoint(NAME).close()
    hub.served.clear()
    with open_checkpoint(NAME, headers_only=True) as model:
        tensor = model.tensors["layers.0.weight"]
        model.read_into(tensor, 0, bytearray(tensor.nbytes))
    assert "model.safetensors" not in hub.served


def test_offline_a_cached_model_opens(hub, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.models[NAME] = make_model(shards=2)
    open_checkpoint(NAME).close()
    hub.served.clear()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with open_checkpoint(NAME) as model:
        assert len(model.tensors) == 4
    assert not hub.served


def lay_out(cache: Path, folder: Path, commit: str) -> Path:
    """Puts a model into a cache as huggingface_hub would; gives the folder of its snapshot."""
    repository = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = repository / "snapshots" / commit
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "blobs").mkdir()
    snapshot.mkdir(parents=True)
    for file in folder.iterdir():
        shutil.copy(file, repository / "blobs" / f"blob-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"blob-{file.name}")
    return snapshot


@pytest.mark.parametrize("shards", [1, 3])
def test_offline_a_cache_laid_out_by_hand_opens(
    shards: int, hub, make_model: MakeModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    snapshot = lay_out(tmp_path / "hf" / "hub", make_model(shards=shards), hub.commit)
    for headers_only in (False, True):
        with open_checkpoint(NAME, headers_only=headers_only) as model:
            assert len(model.tensors) == 4
            for tensor in model.tensors.values():
                model.read_into(tensor, 0, bytearray(tensor.nbytes))
    assert not hub.served
    first = sorted(snapshot.glob("*.safetensors"))[0]
    first.unlink()
    missing = r"no \*.safetensors" if shards == 1 else f"1 of 3 weight files of .* are missing: {first.name}"
    with pytest.raises(CheckpointError, match=missing) as caught:
        open_checkpoint(NAME)
    assert "HF_HUB_OFFLINE" in caught.value.hint


def test_offline_a_cached_model_runs_and_streams(hub, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    folder = tiny_llama.write(tmp_path / "tiny", shards=4)
    lay_out(tmp_path / "hf" / "hub", folder, hub.commit)
    texts = []
    for name in (str(folder), NAME):
        with tightfit.load(name, "2GiB", context=64) as model:
            texts.append(model.generate("import os", max_new_tokens=8, ignore_eos=True).tokens)
            plan = model.plan
    layers = [layer.model_copy(update={"placement": "streamed", "resident": 2}) for layer in plan.layers]
    outer = plan.outer.model_copy(update={"resident": 0})
    with tightfit.load(NAME, plan=plan.model_copy(update={"layers": layers, "outer": outer, "buffers": 2})) as model:
        texts.append(model.generate("import os", max_new_tokens=8, ignore_eos=True).tokens)
    assert texts[0] == texts[1] == texts[2]


def test_offline_an_unknown_model_is_refused(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CheckpointError, match="not in the cache") as caught:
        open_checkpoint(NAME)
    assert "Unset HF_HUB_OFFLINE" in caught.value.hint


def test_without_a_connection_the_cache_serves_and_the_unknown_is_refused(hub, make_model: MakeModel) -> None:
    hub.models[NAME] = make_model()
    open_checkpoint(NAME).close()
    hub.server.shutdown()
    hub.server.server_close()
    with open_checkpoint(NAME) as model:
        assert len(model.tensors) == 4
    with pytest.raises(CheckpointError, match="cannot be reached"):
        open_checkpoint("someone/else")


def test_what_the_hub_refuses_is_explained(hub, make_model: MakeModel) -> None:
    with pytest.raises(CheckpointError, match="hub has no model"):
        open_checkpoint("someone/misspelt")
    hub.models[NAME] = make_model()
    with pytest.raises(CheckpointError, match="no revision 'v9'"):
        open_checkpoint(NAME, revision="v9")
    hub.gated.add(NAME)
    with pytest.raises(CheckpointError, match="gated") as caught:
        open_checkpoint(NAME)
    assert f"{hub.url}/{NAME}" in caught.value.hint


def test_a_model_of_pickles_is_refused_before_anything_large_is_fetched(hub, make_model: MakeModel) -> None:
    folder = make_model()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    hub.models[NAME] = folder
    with pytest.raises(CheckpointError, match="pickled weights only"):
        open_checkpoint(NAME)
    assert "pytorch_model.bin" not in hub.served


def test_the_hub_client_never_enters_this_process(hub, make_model: MakeModel) -> None:
    hub.models[NAME] = make_model()
    script = f"""
import sys
from tightfit.checkpoints import open_checkpoint
open_checkpoint({NAME!r}).close()
print(sorted(name for name in sys.modules if name in ("huggingface_hub", "httpx", "torch", "numpy", "safetensors")))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_child_that_dies_is_reported(hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(CheckpointError, match="exit status 1"):
        open_checkpoint(NAME)
