"""The report says what two files of results say: every number, who is on a front, what contradicts what."""

from __future__ import annotations

import json
import re
import sys
from html.parser import HTMLParser
from itertools import permutations
from pathlib import Path

import pytest
from tests.cli.command import USAGE, tightfit
from tests.lab import folders

from tightfit.lab.experiment import EXACT
from tightfit.lab.page import page
from tightfit.lab.report import COSTS, INDICATORS, PEAK, SECONDS, STORED, Report, separate, summarise
from tightfit.lab.results import Results
from tightfit.lab.statistics import Estimate

BAD = "kv=<script>alert('x')</script>&\"quoted\""
FEW = {"weights": {name: folders.WEIGHTS[name] for name in ("int8", "int4")}, "kv": {"none": folders.KV["none"]}}


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.write(tmp_path_factory.mktemp("lab") / "full")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few configurations and tasks: plots take their time."""
    tasks = ("divergence(texts=6)", "latency")
    return folders.write(tmp_path_factory.mktemp("lab") / "few", extra=BAD, tasks=tasks, **FEW)


@pytest.fixture(scope="module")
def report(full: Path) -> Report:
    return summarise(Results.open(full))


def width(estimate: Estimate) -> float:
    """Of the interval, which has the value inside."""
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.low <= estimate.value <= estimate.high
    return estimate.high - estimate.low


class Page(HTMLParser):
    """What a browser would make of a page: its tables, the text outside of scripts, and what it would load."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tables: list[list[list[str]]] = []
        self.loads: list[str] = []
        self.scripts = self.svgs = 0
        self.titles: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.open.append(tag)
        self.scripts += tag == "script"
        self.svgs += tag == "svg"
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        for name, value in attributes:
            loads = name in ("src", "srcset", "data", "poster", "action") or (name.endswith("href") and tag != "a")
            if loads and value and not value.startswith("#"):
                self.loads.append(value)
            self.titles += [value or ""] if name == "title" else []
        if tag in ("meta", "link", "use", "path", "br", "wbr", "input"):
            self.open.pop()

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in ("meta", "link", "use", "path", "br", "wbr", "input"):
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        if self.open[-1:] == ["title"]:
            self.titles.append(data)
        if "td" in self.open or "th" in self.open:
            self.tables[-1][-1][-1] += data


@pytest.fixture(scope="module")
def html(few: Path) -> str:
    return page(summarise(Results.open(few)))


def test_values_are_means_of_the_samples_with_intervals_around_them(full: Path, report: Report) -> None:
    lines = [json.loads(line) for line in (full / "results.jsonl").read_text().splitlines()]
    for key in ("weights=int4", "kv=snapkv", EXACT):
        for task, metric in (("divergence(texts=6)", "kl"), ("lookup", "correct")):
            values = {
                line["sample"]: line["values"][metric]
                for line in lines
                if line["kind"] == "sample" and (line["configuration"], line["task"]) == (key, task)
            }
            row = report.by_key[key]
            found = row.values[f"{task}.{metric}"]
            assert found.value == pytest.approx(sum(values.values()) / len(values))
            assert found.samples == len(values)
            assert width(found) > 0 or found.value == 0  # the exact model does not differ from itself
            part = [value for name, value in values.items() if "1024/" in name]
            assert row.groups[f"{task}.{metric}"]["tokens"]["1024"].value == pytest.approx(sum(part) / len(part))


def test_differences_are_paired_and_from_the_exact_model_and_the_same_seams_baseline(report: Report) -> None:
    rows, kl = report.by_key, "divergence(texts=6).kl"
    assert set(rows["weights=int4"].against) == {EXACT, "weights=int8"}
    assert set(rows["kv=int4"].against) == {EXACT, "kv=int8"}
    assert set(rows["kv=int8"].against) == {EXACT}
    assert rows[EXACT].against == {}
    difference = rows["weights=int4"].against["weights=int8"][kl]
    assert difference.value == pytest.approx(
        rows["weights=int4"].values[kl].value - rows["weights=int8"].values[kl].value
    )
    assert separate(difference)
    # Look-ups are as hard for both, so that the difference is known better than either.
    correct = rows["weights=int4"].against[EXACT]["lookup.correct"]
    alone = rows["weights=int4"].values["lookup.correct"]
    assert width(correct) < width(alone)


def test_a_front_has_those_that_nothing_beats(report: Report) -> None:
    kl = next(measure for measure in report.quality if measure.metric == "kl")
    for cost in COSTS:
        for tokens in (None, 1024):
            points = {
                row.key: (row.value(kl, tokens).value, report.cost(row, cost, tokens).value)  # type: ignore[union-attr]
                for row in report.rows
                if row.finished
            }
            beaten = {
                one
                for (one, (loss, price)), (_, (other, less)) in permutations(points.items(), 2)
                if other <= loss and less <= price and (other, less) != (loss, price)
            }
            [front] = [f for f in report.fronts if (f.measure, f.tokens, f.cost) == (kl.id, tokens, cost)]
            assert set(front.members) == points.keys() - beaten
            assert EXACT in front.members  # loses nothing
    assert not any("weights=ternary" in front.members for front in report.fronts)  # its memory is not known
    higher = [front for front in report.fronts if front.measure == "lookup.correct" and front.cost == STORED]
    assert all("weights=pruned" not in front.members for front in higher)  # larger and worse than int8


def test_rows_are_in_the_order_of_their_peaks_and_what_was_refused_is_apart(report: Report) -> None:
    peaks = [row.indicators[PEAK] for row in report.rows if row.finished]
    assert peaks == sorted(peaks)
    assert [row.number for row in report.rows] == list(range(1, len(report.rows) + 1))
    assert [row.key for row in report.rows if not row.finished] == ["weights=ternary"]
    assert [each.configuration for each in report.refused] == ["kv=kvsharer", "weights=f32"]


def test_time_for_a_token_is_that_after_the_longest_prompts(report: Report) -> None:
    row = report.by_key["kv=int4"]
    assert row.indicators[SECONDS] == row.groups["latency.token"]["tokens"]["3891"].value
    near = report.cost(row, SECONDS, 1024)
    assert near == row.groups["latency.token"]["tokens"]["409"]


def test_flips_are_those_beyond_noise_and_no_others(report: Report) -> None:
    assert report.flips
    for flip in report.flips:
        one, other = report.by_key[flip.one].indicators, report.by_key[flip.other].indicators
        for name, less, more in ((flip.indicator, one, other), (flip.contradicted_by, other, one)):
            assert more[name] > less[name] * (1 + INDICATORS[name])
    pairs = {(flip.one, flip.other, flip.indicator, flip.contradicted_by) for flip in report.flips}
    # Pages in a file take few bytes and much time; a bitmap is smaller than bfloat16 and slower.
    assert ("kv=host", "kv=none", STORED, SECONDS) in pairs
    assert ("weights=pruned", "weights=bf16", STORED, SECONDS) in pairs
    # The times of these two overlap: int4 and the mix, 3% apart with noise of 5%, of nearly the same bytes.
    assert not any({flip.one, flip.other} == {"weights=bf16", "kv=none"} for flip in report.flips)
    sizes = [flip.size for flip in report.flips]
    assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(("times", "flips"), [([9, 4, 5, 3, 8], False), ([5, 5.1, 5, 5, 5.1], True)])
def test_seconds_flip_an_order_where_they_are_apart_by_more_than_noise(
    tmp_path: Path, times: list[float], flips: bool
) -> None:
    """The smaller one takes 6 ms at the median, and the larger one 5, in either case."""
    weights = {"int8": (12.0, 1.0, 0.01), "int6": (14.0, 1.0, 0.01)}
    results = Results.open(folders.write(tmp_path, weights=weights, kv={}))
    for name, taken in (("int8", [4, 5, 6, 7, 8] if not flips else [6, 6.1, 6, 6, 6.1]), ("int6", times)):
        sample = results.samples[f"weights={name}", "latency", "3891/0"]
        sample.values["repetitions"] = [[1.0, each / 1000] for each in taken]
    found = summarise(results).flips
    pairs = {(flip.one, flip.other, flip.indicator, flip.contradicted_by) for flip in found}
    assert (("weights=int8", "weights=int6", STORED, SECONDS) in pairs) == flips


def test_the_page_has_every_configuration_in_its_table(few: Path, html: str) -> None:
    report, found = summarise(Results.open(few)), Page(html)
    overview = next(table for table in found.tables if "weights and cache" in table[0])
    names = [row[1].removesuffix("unfinished") for row in overview[1:]]
    assert names == [row.key for row in report.rows]
    assert [row[0].strip() for row in overview[1:]] == [str(row.number) for row in report.rows]
    kl = overview[0].index("divergence: kl")
    assert overview[1 + names.index("weights=int4")][kl].startswith("0.05")
    assert any("it does not fit into 1 GiB" in cell for table in found.tables for row in table for cell in row)


def test_the_page_loads_nothing(html: str) -> None:
    assert Page(html).loads == []
    assert not re.search(r"@import|url\((?!#)|\bfetch\(|XMLHttpRequest|<link", html)
    # Addresses are links that a reader may follow, names of XML, and nothing else.
    addresses = set(re.findall(r"https?://[^\s\"'<>)]+", html))
    assert addresses <= {"https://arxiv.org/abs/2110.12894"}


def test_what_a_name_holds_is_text(html: str) -> None:
    found = Page(html)
    assert found.scripts == 1  # the page's own
    assert "<script>alert" not in html
    cells = {cell for table in found.tables for row in table for cell in row}
    assert any(BAD in cell for cell in cells)


def test_plots_of_every_measure_name_each_configuration(few: Path, html: str) -> None:
    report, found = summarise(Results.open(few)), Page(html)
    # Each measure of quality against three costs, the first of each task by length too.
    views = sum(1 + len(measure.lengths) * measure.main for measure in report.measures if measure.quality)
    assert found.svgs == 3 * views
    assert len(re.findall(r"<title>\d+ weights=int8: ", html)) == 3 * views
    assert not re.search(r"#0[0-9a-f]0[0-9a-f]0[0-9a-f]", html)  # every stand-in was put in


def test_numbers_in_a_plot_do_not_overlap() -> None:
    from tightfit.lab.plots import Axis, Point, tradeoff

    crowd = [Point(i, (200 + i / 50, 200, 201), (0.5 + i / 500, 0.5, 0.6), i < 13, "kv", f"{i}") for i in range(1, 40)]
    corners = [Point(100 + i, (x, x, x), (i, i, i), False, "exact", f"{i}") for i, x in ((0, 190.0), (1, 210.0))]
    text = tradeoff([*crowd, *corners], Axis("x"), Axis("y"), "a crowd")
    labels = re.findall(r"<text style=\"font[^\"]*\" x=\"([\d.]+)\" y=\"([\d.]+)\"[^>]*>(\d+)</text>", text)
    shown = {number: (float(x), float(y)) for x, y, number in labels if int(number) < 100}
    assert {str(i) for i in range(1, 13)} <= shown.keys()  # those on the front
    for (one, (x, y)), (other, (u, v)) in permutations(shown.items(), 2):
        assert abs(x - u) >= 4.5 * min(len(one), len(other)) or abs(y - v) >= 7


def test_the_terminals_table_needs_no_matplotlib(full: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    done = tightfit("lab", "report", full, "--out", tmp_path / "page.html")
    assert done.status == USAGE
    assert "pip install 'tightfit[report]'" in done.stderr
    for name in ("weights=int4", "kv=snapkv(keep=512)+int4", "exact", "weights=ternary was not measured to its end"):
        assert name in done.stdout
    assert not (tmp_path / "page.html").exists()
    assert tightfit("lab", "report", full, "--json").json["configurations"]


def test_the_command_writes_a_page_and_marks_the_front(few: Path, tmp_path: Path) -> None:
    done = tightfit("lab", "report", few, "--out", tmp_path / "page.html")
    assert done.status == 0, done.stderr
    assert (tmp_path / "page.html").read_text().startswith("<!doctype html>")
    [exact] = [line for line in done.stdout.splitlines() if line.split()[:1] == ["exact"]]
    assert re.search(r" 0 \(0 to 0\) MBT$", exact)


def test_the_table_can_be_had_as_markdown(few: Path, tmp_path: Path) -> None:
    done = tightfit("lab", "report", few, "--out", tmp_path / "table.md")
    assert (done.status, done.stderr) == (0, f"the table is {tmp_path / 'table.md'}\n")
    report, lines = summarise(Results.open(few)), (tmp_path / "table.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| ")]
    assert {len(row) for row in rows} == {len(rows[0])}
    assert [row[0] for row in rows[2:]] == [f"| `{row.key}`" for row in report.rows]
    assert f"Command: `{report.experiment.command}`" in lines


def test_json_has_all_there_is(few: Path) -> None:
    done, report = tightfit("lab", "report", few, "--json").json, summarise(Results.open(few))
    assert [each["key"] for each in done["configurations"]] == [row.key for row in report.rows]
    assert done["configurations"][0]["values"]["divergence(texts=6).kl"].keys() == {"value", "low", "high", "samples"}
    assert len(done["flips"]) == len(report.flips)
    assert len(done["fronts"]) == len(report.fronts)
    assert done == json.loads(json.dumps(report.as_json()))


def test_a_run_without_latency_has_no_plots_of_time_and_says_so(tmp_path: Path) -> None:
    folder = folders.write(tmp_path, weights=FEW["weights"], kv={}, tasks=["divergence(texts=6)"])
    report = summarise(Results.open(folder))
    assert report.speed is None
    assert {front.cost for front in report.fronts} == {PEAK, STORED}
    html = page(report)
    assert "Speed was not measured" in html
    assert Page(html).svgs == 2 * (1 + 3 + 1)  # kl over all and by length, agreement over all


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    folder = folders.write(tmp_path)
    (folder / "results.jsonl").write_text("")
    report = summarise(Results.open(folder))
    assert report.rows == []
    assert Page(page(report)).svgs == 0
    assert tightfit("lab", "report", folder, "--json").json["configurations"] == []


def test_peaks_that_are_all_the_same_but_for_noise_are_said_to_be(tmp_path: Path) -> None:
    weights = {"int8": (13.3, 0.7, 0.001), "int6": (12.0, 0.8, 0.004)}
    report = summarise(Results.open(folders.write(tmp_path, weights=weights, kv={}, tasks=["divergence(texts=6)"])))
    assert not report.within_noise(PEAK)  # the exact model takes 37 MiB more
    for row in report.rows:
        row.indicators[PEAK] = 240 << 20
    assert report.within_noise(PEAK)
    assert not report.within_noise(STORED)
    assert "within 2% of each other" in page(report)
