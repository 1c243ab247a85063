"""`tightfit compress`, and what runs from the folder that it writes."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny_llama
from tests.cli.command import BUDGET, CHECKPOINT, USAGE, check, tightfit

import tightfit as package

FILE_TROUBLE, INTERRUPTED = 74, 130
PROMPT = ("-p", "def f(", "-n", 8, "--ignore-eos")


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The talkative model in int4."""
    folder = tmp_path_factory.mktemp("models")
    model = tiny_llama.write(folder / "talkative", chat=True)
    done = tightfit("compress", model, "--weights", "int4", "--out", folder / "small")
    assert (done.status, done.stderr) == (0, "")
    return folder / "small"


def test_it_says_what_it_wrote(tiny: Path, tmp_path: Path) -> None:
    done = tightfit("compress", tiny, "--weights", "int8(group=64)", "-o", tmp_path / "out", "-m", "2GiB")
    assert (done.status, done.stderr) == (0, "")
    first, second = done.stdout.splitlines()
    size = (tmp_path / "out" / "tightfit.safetensors").stat().st_size
    assert f"{tmp_path / 'out'}: " in first
    assert "as int8(group=64), " in first
    assert "inside the budget" in second
    receipt = tightfit(
        "compress", tiny, "--weights", "int8(group=64)", "-o", tmp_path / "out", "--force", "--json"
    ).json
    assert receipt["weights"] == "int8(group=64)"
    # 0.4 million numbers of 8 bits, and a scale of 16 bits for each 32, which is all that a row has
    assert receipt["bits_per_weight"] == pytest.approx(8 * receipt["bytes"] / 405_440, rel=0.01)
    assert 0 < size - receipt["bytes"] <= 8192  # the header
    assert receipt["peak_rss_bytes"] > receipt["bytes"]


def test_run_gives_the_text_of_quantising_while_loading(compressed: Path) -> None:
    model = compressed.parent / "talkative"
    direct = tightfit("run", model, "--weights", "int4", *PROMPT, "--json").json
    stored = tightfit("run", compressed, *PROMPT, "--json").json
    assert stored["completions"] == direct["completions"]
    plan = stored["receipt"]["plan"]
    assert {part["format"] for part in (plan["outer"], *plan["layers"])} == {"int4"}
    assert plan["numerics"] == direct["receipt"]["plan"]["numerics"]  # those of the model that it was made from
    assert plan["accounts"]["weights"] == direct["receipt"]["plan"]["accounts"]["weights"]
    assert plan["model"]["fingerprint"] != direct["receipt"]["plan"]["model"]["fingerprint"]
    assert "weights int4, " in tightfit("run", compressed, *PROMPT).stderr


def test_mixed_formats_run_as_they_are_stored(compressed: Path, tmp_path: Path) -> None:
    weights = "mixed(embed=int8,ends=int6,down=bf16)"
    model = compressed.parent / "talkative"
    assert tightfit("compress", model, "--weights", weights, "--out", tmp_path / "out").status == 0
    direct = tightfit("run", model, "--weights", weights, *PROMPT, "--json").json
    assert tightfit("run", tmp_path / "out", *PROMPT, "--json").json["completions"] == direct["completions"]


def test_a_conversation_and_the_python_interface_work(compressed: Path) -> None:
    assert tightfit("run", compressed, "--chat", "-n", 4, stdin="hello\n").status == 0
    with package.load(str(compressed), memory="2GiB") as model:
        assert model.generate("x", max_new_tokens=3, ignore_eos=True).tokens
        assert model.receipt()["plan"]["model"]["name"] == "small"


def test_plan_lists_the_one_format_that_is_there(compressed: Path) -> None:
    answer = tightfit("plan", compressed, "-m", "2GiB", "--json").json
    assert [each["format"] for each in answer["precisions"]] == ["int4"]
    assert answer["plan"]["layers"][0]["format"] == "int4"
    refused = tightfit("plan", compressed, "-m", "150MiB", "--json")
    assert refused.status == BUDGET
    assert "The runtime account is" in refused.json["hint"]
    assert "--weights" not in refused.json["hint"]


def test_other_weights_than_the_stored_are_refused(compressed: Path) -> None:
    for same in ("int4", "int4(group=32)"):  # written out or not
        assert tightfit("run", compressed, "--weights", same, *PROMPT).status == 0
    refused = tightfit("run", compressed, "--weights", "int8", *PROMPT)
    check(refused, USAGE, "small is compressed with int4, and int8 was asked for", "made from: talkative")


def test_a_plan_with_other_weights_is_refused(compressed: Path, tmp_path: Path) -> None:
    assert tightfit("plan", compressed, "-m", "2GiB", "--out", tmp_path / "plan.json").status == 0
    assert tightfit("run", compressed, "--plan", tmp_path / "plan.json", *PROMPT).status == 0
    plan = json.loads((tmp_path / "plan.json").read_text())
    plan["layers"][1]["format"] = "int8"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused = tightfit("run", compressed, "--plan", tmp_path / "plan.json", *PROMPT)
    check(refused, USAGE, "the plan has weights in int8, and small keeps int4", "tightfit plan")


def test_a_compressed_model_is_not_compressed_again(compressed: Path, tmp_path: Path) -> None:
    refused = tightfit("compress", compressed, "--weights", "int3", "--out", tmp_path / "out")
    check(refused, CHECKPOINT, "small is compressed already, with int4", "made from: talkative")
    assert not list(tmp_path.iterdir())


def test_what_cannot_work_is_refused(tiny: Path, tmp_path: Path, unloaded: None) -> None:
    out = tmp_path / "out"
    check(tightfit("compress", tiny, "--out", out), USAGE, "--weights")
    check(tightfit("compress", tiny, "--weights", "int4"), USAGE, "--out")
    check(tightfit("compress", tiny, "--weights", "int4711", "--out", out), USAGE, "int4711")
    check(tightfit("compress", tmp_path / "no", "--weights", "int4", "--out", out), CHECKPOINT, "there is no model")
    too_small = tightfit("compress", tiny, "--weights", "int4", "--out", out, "-m", "100MiB")
    check(too_small, BUDGET, "tiny cannot be compressed inside 100 MiB", "The smallest budget that works is")
    damaged = tiny_llama.write(tmp_path / "damaged", intermediate_size=64)
    for memory in ("100MiB", "2GiB"):  # found by a child process, or here
        refused = tightfit("compress", damaged, "--weights", "int4", "--out", out, "-m", memory)
        check(refused, CHECKPOINT, "gate_proj.weight", "[64, 32]")
    shutil.rmtree(damaged)
    (tmp_path / "file").write_text("mine")
    check(tightfit("compress", tiny, "--weights", "int4", "--out", tmp_path / "file"), USAGE, "something else at")
    nowhere = tightfit("compress", tiny, "--weights", "int4", "--out", tmp_path / "file" / "out")
    check(nowhere, FILE_TROUBLE, "out cannot be written: File exists")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_interrupt_ends_it_with_one_word_and_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys, time\nfrom tightfit.weights import store\n"
        "def slow(*given):\n    print('here', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "store.fill = slow\nfrom tightfit.cli.main import main\nmain()"
    )
    arguments = ["compress", str(tiny), "--weights", "int4", "--out", str(tmp_path / "out")]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (INTERRUPTED, "interrupted\n")
    assert not list(tmp_path.iterdir())
