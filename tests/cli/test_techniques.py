"""`tightfit techniques` lists what the catalog holds, and what the lab found of it."""

from __future__ import annotations

import io
import re
import subprocess
import sys

from rich.console import Console
from tests.cli.command import USAGE, check, tightfit

from tightfit.catalog import all_techniques
from tightfit.cli import techniques
from tightfit.lab.figures import figures


def test_json_has_stable_keys_and_every_technique() -> None:
    done = tightfit("techniques", "--json")
    assert (done.status, done.stderr) == (0, "")
    listed = done.json["techniques"]
    assert [(entry["seam"], entry["name"]) for entry in listed] == [(t.seam, t.name) for t in all_techniques()]
    keys = {"seam", "name", "summary", "paper", "exact", "calibration", "roles", "composes_with", "settings"}
    for entry in listed:
        assert set(entry) == keys | {"figures", "not_measured"}
        assert (entry["figures"] is None) == bool(entry["not_measured"])
    int4 = next(entry for entry in listed if (entry["seam"], entry["name"]) == ("weights", "int4"))
    assert int4["settings"] == {"group": 32, "symmetric": True, "scales": "bf16"}
    assert int4["exact"] is False
    assert int4["composes_with"] == ["mixed"]
    assert 4.5 < int4["figures"]["bits_per_weight"]["value"] < 4.7  # a scale of 16 bits for 32 codes, and norms


def test_the_list_cuts_nothing_off_where_it_is_not_a_terminal() -> None:
    done = tightfit("techniques").stdout
    for seam in dict.fromkeys(entry.seam for entry in all_techniques()):
        lines = tightfit("techniques", "--seam", seam).stdout.splitlines()
        assert all(line in done for line in lines)
        for entry in all_techniques():
            if entry.seam == seam:
                [line] = [line for line in lines if line.split()[:1] == [entry.name]]
                paper = entry.paper.removeprefix("https://arxiv.org/abs/")
                for part in (entry.summary, paper, entry.calibration, "exact" if entry.exact else "lossy"):
                    assert part in line


def test_the_list_fits_a_terminal_of_100_columns() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    listed = [entry for entry in all_techniques() if entry.seam in ("weights", "kv", "experts")]
    for seam in dict.fromkeys(entry.seam for entry in listed):
        console.print(techniques._list(seam, [entry for entry in listed if entry.seam == seam]))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    for entry in listed:
        assert re.search(rf"^ *{entry.name} +(exact|lossy)", text, re.MULTILINE)  # names and figures are whole
    assert "4.5" in text


def test_one_seam_can_be_asked_for() -> None:
    assert {entry["seam"] for entry in tightfit("techniques", "--seam", "weights", "--json").json["techniques"]} == {
        "weights"
    }
    check(tightfit("techniques", "--seam", "wieghts"), USAGE, "no seam 'wieghts'", "weights")


def test_an_entry_has_settings_paper_companions_and_figures_with_intervals() -> None:
    text = tightfit("techniques", "snapkv").stdout
    for part in ("keep=512", "https://arxiv.org/abs/2404.14469", "int4", "fills", "tokens"):
        assert part in text
    value = figures()["techniques"]["kv"]["snapkv"]["kl"]
    assert re.search(r"KL divergence, nats +[\d.]+ \([\d.]+ to [\d.]+\)", text)
    assert value["low"] <= value["value"] <= value["high"]
    assert "tightfit fit" in tightfit("techniques", "kvsharer").stdout


def test_a_name_in_two_seams_shows_both() -> None:
    both = tightfit("techniques", "int4", "--json").json["techniques"]
    assert [entry["seam"] for entry in both] == ["kv", "weights"]
    [one] = tightfit("techniques", "int4", "--seam", "kv", "--json").json["techniques"]
    assert one["roles"] == ["codec of keys", "codec of values"]
    check(tightfit("techniques", "int44"), USAGE, "no technique 'int44'", "int4")


def test_listing_imports_nothing_heavy() -> None:
    program = "import sys; from tightfit.cli.techniques import techniques; techniques(None, None, True)"
    done = subprocess.run(
        [sys.executable, "-c", f"{program}; print({{'torch', 'numpy'}} & set(sys.modules), file=sys.stderr)"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.strip() == "set()"
