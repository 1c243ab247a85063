"""Processes that answer as a subject does, without a model: each takes no time, and does what a test needs of it."""

from __future__ import annotations

# Questions in, answers out; `refuse`, `crash` and `die` name the configurations (by --kv) that do so at their first
# sample, or that are refused before.
SUBJECT = """
import json, os, signal, sys
def answer(**values):
    print(json.dumps(values), flush=True)
wish = None
for line in sys.stdin:
    asked = json.loads(line)
    if "wish" in asked:
        wish = asked["wish"]
        if wish["kv"] in {refuse!r}:
            answer(kind="BudgetError", error="it does not fit", hint="Give more.", smallest_bytes=123)
            sys.exit()
        answer()
    elif "sample" in asked:
        if wish["kv"] in {crash!r}:
            raise ValueError("no such number")
        if wish["kv"] in {die!r}:
            os.kill(os.getpid(), signal.SIGKILL)
        sample = asked["sample"]
        answer(values={{"kl": len(sample["prompt"]), "same_top": 1.0}}, seconds=0.5)
    else:
        answer(
            peak_rss_bytes=2 << 20, budget_bytes=3 << 20, plan={{}}, receipt={{}},
            indicators={{"weights_bytes": 1 << 20, "kv_bytes": 2048, "kv_resident_bytes": 1024,
                         "read_bytes_per_token": 5, "operations_per_token": 6.0, "parameters": 7}},
        )
"""


def subject(refuse: tuple[str, ...] = (), crash: tuple[str, ...] = (), die: tuple[str, ...] = ()) -> str:
    return SUBJECT.format(refuse=refuse, crash=crash, die=die)
