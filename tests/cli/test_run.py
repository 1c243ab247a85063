"""`tightfit run`: the text goes to standard output and nothing else does, wherever the prompt comes from."""

from __future__ import annotations

import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from tests import tiny_llama
from tests.cli.command import USAGE, tightfit

PROMPT = "def fibonacci(n):"
PROMPTS = ["def fibonacci(n):\n", "import os\n", "class Reader:\n"]
RECEIPT_KEYS = {
    "budget_bytes",
    "peak_rss_bytes",
    "predicted_bytes",
    "accounts",
    "prompt_tokens",
    "new_tokens",
    "time_to_first_token_s",
    "prefill_tokens_per_s",
    "decode_tokens_per_s",
    "predicted",
    "prefill_streamed_bytes_per_token",
    "decode_streamed_bytes_per_token",
    "prefill_experts",
    "decode_experts",
    "prefill_fetched",
    "decode_fetched",
    "prompt_cache",
    "plan",
}


def test_the_text_goes_to_standard_output_and_the_receipt_to_standard_error(tiny: Path) -> None:
    done = tightfit("run", tiny, "-p", PROMPT, "-n", 8)
    assert done.status == 0
    assert done.stdout == tightfit("run", tiny, "-p", PROMPT, "-n", 8, "--json").json["completions"][0]["text"] + "\n"
    for part in ("Receipt: peak", "inside the budget", "runtime", "weights", "kv", "workspace", "8 new tokens"):
        assert part in done.stderr


def test_the_embedded_model_finds_what_it_read_without_being_named() -> None:
    prompt = """# The secret number for apple is 73019.
import os
print(os.getcwd())
# Question: what is the secret number for apple? Answer:"""
    assert tightfit("run", "--context", 256, "-n", 6, stdin=prompt).stdout == " 73019\n"


def test_a_prompt_is_the_same_from_an_option_a_file_and_standard_input(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT)
    ways = [
        tightfit("run", tiny, "-n", 8, "-p", PROMPT),
        tightfit("run", tiny, "-n", 8, "--file", file),
        tightfit("run", tiny, "-n", 8, stdin=PROMPT),
        tightfit("run", tiny, "-n", 8, "-p", "-", stdin=PROMPT),
        tightfit("run", tiny, "-n", 8, "--file", "-", stdin=PROMPT),
        tightfit("run", tiny, "-n", 8, stdin=b"\xef\xbb\xbf" + PROMPT.encode()),  # the mark that some editors write
    ]
    assert {done.stdout for done in ways} == {ways[0].stdout}
    assert all(done.status == 0 for done in ways)


def test_several_prompts_are_printed_in_their_order_each_with_what_follows(tiny: Path) -> None:
    alone = [tightfit("run", tiny, "-n", 6, "-p", prompt).stdout for prompt in PROMPTS]
    expected = "\n".join(prompt + text for prompt, text in zip(PROMPTS, alone, strict=True))
    options = [part for prompt in PROMPTS for part in ("-p", prompt)]
    assert tightfit("run", tiny, "-n", 6, *options).stdout == expected
    assert tightfit("run", tiny, "-n", 6, *options, "--batch", 1).stdout == expected  # two of them wait


def test_standard_input_can_be_one_of_several_prompts(tiny: Path) -> None:
    done = tightfit("run", tiny, "-n", 4, "-p", PROMPTS[0], "-p", "-", stdin=PROMPTS[1])
    assert done.stdout == tightfit("run", tiny, "-n", 4, "-p", PROMPTS[0], "-p", PROMPTS[1]).stdout


def test_json_has_stable_keys(tiny: Path) -> None:
    done = tightfit("run", tiny, "-p", PROMPT, "-p", "import os", "-n", 4, "--memory", "2GiB", "--json")
    assert done.stderr == ""
    answer = done.json
    assert set(answer) == {"completions", "receipt"}
    for completion in answer["completions"]:
        assert set(completion) == {"text", "finish", "prompt_tokens", "reused_tokens", "new_tokens"}
        assert completion["finish"] == "length"
        assert completion["new_tokens"] == 4
    receipt = answer["receipt"]
    assert set(receipt) == RECEIPT_KEYS
    assert receipt["budget_bytes"] == 2 << 30
    assert set(receipt["accounts"]) == {"runtime", "weights", "kv", "workspace"}
    assert all(set(account) == {"reserved_bytes", "peak_bytes"} for account in receipt["accounts"].values())
    assert receipt["plan"]["sequences"] == 2  # as many as prompts
    assert receipt["new_tokens"] == 8


def test_a_prompt_is_found_again_in_the_next_run(tiny: Path, tmp_path: Path) -> None:
    kept = ("--prompt-cache", "1MiB", "--prompt-cache-disk", "4MiB", "--prompt-cache-dir", tmp_path)
    run = ("run", tiny, "-p", "#" + "7" * 100, "-n", 4, "--memory", "2GiB", "--chunk", 32, *kept)
    first, second = (tightfit(*run, "--json").json for _ in range(2))
    assert [answer["completions"][0]["reused_tokens"] for answer in (first, second)] == [0, 96]
    assert first["completions"][0]["text"] == second["completions"][0]["text"]
    assert second["receipt"]["plan"]["prompt_cache"] == {"memory": 1 << 20, "disk": 4 << 20, "folder": str(tmp_path)}
    receipt = tightfit(*run).stderr
    assert "1 MiB for prompts in memory, 4 MiB for prompts on the disk" in receipt
    assert "96 tokens were not computed again, from 0 entries in memory and 3 on the disk" in receipt


def test_the_same_seed_gives_the_same_text_and_another_one_another(tiny: Path) -> None:
    def text(seed: int) -> str:
        return tightfit("run", tiny, "-p", PROMPT, "-n", 8, "--temperature", 1, "--seed", seed).stdout

    assert text(1) == text(1) != text(2)


def test_a_stop_string_ends_the_text(tiny: Path) -> None:
    whole = tightfit("run", tiny, "-p", PROMPT, "-n", 12).stdout
    done = tightfit("run", tiny, "-p", PROMPT, "-n", 12, "--stop", whole[10:13])
    assert done.stdout == whole[: whole.index(whole[10:13])] + "\n"


def test_a_plan_is_followed_to_the_letter(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    asked = ["--weights", "int8", "--chunk", 32, "--context", 128, "--batch", 3, "--threads", 1, "--memory", "2GiB"]
    assert tightfit("plan", tiny, *asked, "--out", file).status == 0
    direct = tightfit("run", tiny, "-p", PROMPT, "-n", 8, *asked, "--json").json
    followed = tightfit("run", tiny, "-p", PROMPT, "-n", 8, "--plan", file, "--json").json
    assert followed["completions"] == direct["completions"]
    plan = followed["receipt"]["plan"]
    assert {layer["format"] for layer in plan["layers"]} == {"int8"}
    assert (plan["chunk"], plan["context"], plan["sequences"], plan["threads"]) == (32, 128, 3, 1)
    assert plan["budget"] == 2 << 30


def test_a_choice_in_a_plan_can_be_edited_and_its_bytes_follow(tiny: Path, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    tightfit("plan", tiny, "--memory", "2GiB", "--out", file)
    own = tightfit("run", tiny, "-p", PROMPT, "-n", 2, "--plan", file, "--json").json["receipt"]
    file.write_text(file.read_text().replace('"own"', '"int4"').replace('"context": 256', '"context": 64'))
    receipt = tightfit("run", tiny, "-p", PROMPT, "-n", 2, "--plan", file, "--json").json["receipt"]
    assert receipt["plan"]["outer"]["format"] == "int4"
    for account in ("weights", "kv"):
        assert receipt["accounts"][account]["reserved_bytes"] < own["accounts"][account]["reserved_bytes"] / 2


def test_a_model_name_is_shown_as_it_is(tmp_path: Path) -> None:
    odd = tiny_llama.write(tmp_path / "[red]tiny :smile:")  # what rich would take for markup
    assert tightfit("plan", odd).stdout.startswith("[red]tiny :smile:: llama, ")


LIGHT = [[], ["--help"], ["run", "--help"], ["plan", "--help"], ["doctor", "--help"], ["techniques"], ["--version"]]


def test_help_and_techniques_come_at_once_and_import_nothing_heavy() -> None:
    code = f"""
import sys
from tightfit.cli.app import app
from tightfit.cli.frame import guarded
for arguments in {LIGHT!r}:
    guarded(app, arguments)
heavy = {{"torch", "numpy", "transformers", "huggingface_hub", "tokenizers"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    # All seven in one process; the promise is one second for each. Processor time, as other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0


@pytest.mark.parametrize("command", ["run", "plan", "doctor", "techniques"])
def test_every_command_has_json_and_debug_and_explains_its_options(command: str) -> None:
    text = tightfit(command, "--help").stdout
    assert text.startswith(f"Usage: tightfit {command} ")
    assert {"--json", "--debug"} <= set(re.findall(r"--[a-z-]+", text))
    options = text.partition("Options:")[2]
    assert not re.search(r"^ +(-., )?--[a-z-]+( [A-Z]+)?$\n +-", options, re.MULTILINE)  # none without a text


def test_python_m_tightfit_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "tightfit"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("Usage: tightfit [OPTIONS] COMMAND")


def test_activations_are_a_choice_of_the_plan(tiny: Path) -> None:
    for chosen, asked in (("int8", ()), ("float32", ("--activations", "float32"))):
        done = tightfit("plan", tiny, "--memory", "4GiB", "--json", *asked)
        assert done.json["plan"]["numerics"]["activations"] == chosen
    refused = tightfit("run", tiny, "-p", "a", "--activations", "int3")
    assert refused.status == USAGE
    assert "--activations int8 or float32" in refused.stderr
