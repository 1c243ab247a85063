"""`tightfit fit`, and what a run with layers that share says without it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests import tiny_llama
from tests.cli.command import CHECKPOINT, USAGE, check, tightfit


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama.write(tmp_path_factory.mktemp("models") / "four", layers=4)


@pytest.fixture
def text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TIGHTFIT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("def f(x):\n    return x + 1\n" * 40)
    return tmp_path / "text.txt"


def test_it_finds_layers_and_runs_use_them(model: Path, text: Path) -> None:
    kv = "kvsharer(share=0.5,threshold=-1)"
    run = ("run", model, "-p", "import os\n" * 30, "-n", 40, "--ignore-eos", "--chunk", 32)
    check(tightfit(*run, "--kv", kv), CHECKPOINT, "never looked for", f"tightfit fit MODEL --kv '{kv}' --text FILE")
    done = tightfit("fit", model, "--kv", kv, "--text", text)
    assert (done.status, done.stderr) == (0, "")
    first, second, third = done.stdout.splitlines()
    assert first.startswith("2 of 4 layers read what another keeps: ")
    assert "hidden states stay similar to" in second
    assert third.endswith(f"for `tightfit run {model} --kv '{kv}'`")
    own, shared = (tightfit(*run, "--kv", each, "--json").json["receipt"] for each in ("none", kv))
    assert shared["accounts"]["kv"]["reserved_bytes"] * 2 == own["accounts"]["kv"]["reserved_bytes"]
    assert tightfit(*run, "--kv", f"{kv}+h2o(keep=40)+int4").status == 0
    check(tightfit(*run, "--kv", f"{kv}+int4", "--prefill", "layered"), USAGE, "chunk by chunk")


def test_what_cannot_be_found_is_refused(model: Path, text: Path, unloaded: None) -> None:
    check(tightfit("fit", model, "--kv", "int4", "--text", text), USAGE, "Name one of a2ats")
    check(tightfit("fit", model, "--kv", "kvsharer", "--text", text.parent / "none"), USAGE, "cannot be read")
