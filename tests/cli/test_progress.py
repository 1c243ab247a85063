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
