"""Ctrl-C ends a command with one word, wherever it comes; on a terminal it ends an answer and not the conversation."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import tiny_llama

INTERRUPTED = 130
MAIN = "from tightfit.cli.main import main; main()"
# What a test waits for is printed by the process itself, so that nothing depends on how fast it is.
WAIT = "import sys, time; print('here', file=sys.stderr, flush=True); time.sleep(60)"
LONG = ["-n", "100000", "--ignore-eos"]


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with so much context that it never comes to an end here."""
    folder = tmp_path_factory.mktemp("models") / "endless"
    return tiny_llama.write(folder, chat=True, max_position_embeddings=200_000)


def start(code: str, *arguments: str | Path, ignoring: bool = False, path: Path | None = None) -> subprocess.Popen[str]:
    """``code`` in a Python of its own; ``ignoring``: with SIGINT ignored, as a shell starts jobs in the background."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    if ignoring:
        command = ["bash", "-c", 'trap "" INT; exec "$@"', "bash", *command]
    search = os.pathsep.join(filter(None, [path and str(path), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": search}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment)


def patched(function: str, *body: str) -> str:
    """The command with a function replaced, given as ``module:name``."""
    module, name = function.split(":")
    lines = "\n ".join(body or [WAIT])
    return f"import {module} as module\ndef replaced(*given, **options):\n {lines}\nmodule.{name} = replaced\n{MAIN}"


def interrupted_when_here(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    assert process.stderr is not None
    assert process.stderr.readline() == "here\n"
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    return process.returncode, stdout, stderr


def test_while_weights_are_read(tiny: Path) -> None:
    process = start(patched("tightfit.weights.placement.resident:Resident.load"), "run", tiny, "-p", "x")
    assert interrupted_when_here(process) == (INTERRUPTED, "", "interrupted\n")


def test_while_a_child_process_plans(tiny: Path) -> None:
    process = start(patched("tightfit.child:ask"), "run", tiny, "-p", "x", "-m", "200MiB")
    assert interrupted_when_here(process) == (INTERRUPTED, "", "interrupted\n")


def test_while_the_command_is_imported(tmp_path: Path) -> None:
    (tmp_path / "typer.py").write_text(WAIT)
    process = start(MAIN, "--help", path=tmp_path)
    assert interrupted_when_here(process) == (INTERRUPTED, "", "interrupted\n")


def test_while_text_is_generated(endless: Path) -> None:
    process = start(MAIN, "run", endless, "-p", "x", *LONG, "--context", "200000")
    assert process.stdout is not None
    begun = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=30)
    assert len(begun) == 20
    assert stdout.endswith("\n")  # what follows in a terminal starts in a line of its own
    assert (process.returncode, stderr) == (INTERRUPTED, "interrupted\n")


def test_where_a_library_makes_its_own_error_of_it(tiny: Path) -> None:
    swallow = ["try:", f"    {WAIT}", "except KeyboardInterrupt:", "    raise RuntimeError('the callback failed')"]
    process = start(patched("tightfit.engine.start:settle", *swallow), "run", tiny, "-p", "x")
    assert interrupted_when_here(process) == (INTERRUPTED, "", "interrupted\n")


def test_a_second_one_ends_what_the_first_one_could_not(tiny: Path) -> None:
    stubborn = ["while True:", "    try:", f"        {WAIT}", "    except KeyboardInterrupt:", "        pass"]
    process = start(patched("tightfit.engine.start:settle", *stubborn), "run", tiny, "-p", "x")
    assert process.stderr is not None
    for _ in range(2):
        assert process.stderr.readline() == "here\n"
        process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert (process.returncode, stderr) == (-signal.SIGINT, "")


HIT = ["import os, signal; os.kill(os.getpid(), signal.SIGINT); return []"]


@pytest.mark.parametrize(("ignoring", "status"), [(False, INTERRUPTED), (True, 0)])
def test_a_job_in_the_background_that_ignores_it_goes_on(ignoring: bool, status: int) -> None:
    process = start(patched("tightfit.cli.techniques:all_techniques", *HIT), "techniques", "--json", ignoring=ignoring)
    stdout, _ = process.communicate(timeout=30)
    assert process.returncode == status
    assert bool(stdout) is ignoring


class Terminal:
    """A command that believes it has a terminal, and what it shows there."""

    def __init__(self, *arguments: str | Path) -> None:
        self.screen, theirs = pty.openpty()
        command = [sys.executable, "-c", MAIN, *map(str, arguments)]
        self.process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)

    def type(self, text: str) -> None:
        os.write(self.screen, text.encode())

    def read(self, until: str = "", count: int = 0) -> str:
        """What is shown up to ``until``, or at least ``count`` characters."""
        shown, deadline = "", time.monotonic() + 30
        while (until not in shown) or len(shown) < count:
            ready, _, _ = select.select([self.screen], [], [], deadline - time.monotonic())
            assert ready, f"nothing more than {shown!r}"
            shown += os.read(self.screen, 4096).decode(errors="replace")
        return shown

    def rest(self) -> str:
        """What is shown until the end."""
        shown = b""
        try:
            while block := os.read(self.screen, 4096):
                shown += block
        except OSError:  # the other side is closed
            pass
        self.process.wait(timeout=30)
        return shown.decode(errors="replace")


@pytest.fixture
def chat(endless: Path) -> Iterator[Terminal]:
    terminal = Terminal("run", endless, "--chat", "--context", "200", *LONG)
    yield terminal
    terminal.process.kill()
    terminal.process.wait()
    os.close(terminal.screen)


def test_on_a_terminal_it_ends_an_answer_and_the_conversation_goes_on(endless: Path) -> None:
    terminal = Terminal("run", endless, "--chat", "--context", "100000", *LONG)
    terminal.read(until="> ")
    for message in ("hello", "and again"):
        terminal.type(f"{message}\n")
        terminal.read(until=message)
        terminal.read(count=50)
        terminal.process.send_signal(signal.SIGINT)
        terminal.read(until="(interrupted)\r\n\r\n> ")
    terminal.type("\x04")
    assert "Receipt" in terminal.rest()
    assert terminal.process.returncode == 0


def test_on_a_terminal_it_ends_the_conversation_between_answers(chat: Terminal) -> None:
    chat.read(until="> ")
    chat.process.send_signal(signal.SIGINT)
    assert chat.rest().strip() == "interrupted"
    assert chat.process.returncode == INTERRUPTED


def test_on_a_terminal_a_message_that_is_too_long_is_refused_and_forgotten(chat: Terminal) -> None:
    chat.read(until="> ")
    chat.type("word " * 300 + "\n")
    assert "the conversation" in chat.read(until="error: ", count=100)
    chat.type("hello\n")
    chat.read(until="hello\r\n", count=100)
    chat.type("\x04")
    assert "Receipt" in chat.rest()
    assert chat.process.returncode == 0
