"""`tightfit techniques` lists what the catalog holds."""

from __future__ import annotations

from tests.cli.command import USAGE, check, tightfit

from tightfit.catalog import all_techniques


def test_json_has_stable_keys_and_every_technique() -> None:
    done = tightfit("techniques", "--json")
    assert (done.status, done.stderr) == (0, "")
    listed = done.json["techniques"]
    assert [(entry["seam"], entry["name"]) for entry in listed] == [(t.seam, t.name) for t in all_techniques()]
    for entry in listed:
        assert set(entry) == {"seam", "name", "summary", "paper", "exact", "settings"}
    int4 = next(entry for entry in listed if (entry["seam"], entry["name"]) == ("weights", "int4"))
    assert int4["settings"] == {"group": 32, "symmetric": True, "scales": "bf16"}
    assert int4["exact"] is False


def test_the_table_cuts_nothing_off_where_it_is_not_a_terminal() -> None:
    lines = tightfit("techniques").stdout.splitlines()
    for entry in all_techniques():
        [line] = [line for line in lines if line.split()[:2] == [entry.seam, entry.name]]
        for part in (entry.seam, entry.summary, entry.paper, "exact" if entry.exact else "lossy"):
            assert part in line


def test_one_seam_can_be_asked_for() -> None:
    assert {entry["seam"] for entry in tightfit("techniques", "--seam", "weights", "--json").json["techniques"]} == {
        "weights"
    }
    check(tightfit("techniques", "--seam", "wieghts"), USAGE, "no seam 'wieghts'", "weights")
