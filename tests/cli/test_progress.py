"""Loading shows a bar on a terminal only, on standard error, and only where it takes a while."""

from __future__ import annotations

import io
import sys

import pytest

from tightfit.cli import progress


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("stream", "patience", "shown"), [(Screen(), 0.0, True), (Screen(), 60.0, False), (io.StringIO(), 0.0, False)]
)
def test_a_bar_is_shown_on_a_terminal_after_a_while(
    stream: io.StringIO,
    patience: float,
    shown: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", stream)
    with progress.loading("reading") as report:
        report(1 << 20, 4 << 20)
        report(4 << 20, 4 << 20)
    assert ("reading" in stream.getvalue()) is shown
    assert capsys.readouterr().out == ""


def test_a_bar_of_unlike_things_shows_what_is_done_and_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", stream := Screen())
    with progress.foreseen("lab") as report:
        report("kv=[none]", 0, 40, None)
        report("kv=[int4]", 10, 40, 3723.4)
    for part in ("kv=[int4]", "10/40", "1:02:03 left"):
        assert part in stream.getvalue()
