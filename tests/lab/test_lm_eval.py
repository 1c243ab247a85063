"""lm-eval's own evaluator on the embedded model, beside transformers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval")
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightfit import zoo
from tightfit.errors import UsageError
from tightfit.lab.lm_eval import TightfitLM

QUESTIONS = [
    ("import", [" os", " zebra", "!!"], 0),
    ("def add(a, b):\n    return a", [" + b", " lambda", "\nclass"], 0),
    ("for i in range(", ["10):", ")", "import"], 0),
    ("registry = {'a': 1}\nassert registry['a'] ==", [" 1", " 2", " 3"], 2),  # counts as wrong if the model is right
]

CHOICE = """
task: tightfit_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{context}}}}"
doc_to_choice: choices
doc_to_target: label
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""


@pytest.fixture(scope="module")
def ours() -> Iterator[TightfitLM]:
    found = TightfitLM("nano", "4GiB", batch_size=2, context=128, weights="f32", activations="float32", threads=1)
    yield found
    found.model.close()


@pytest.fixture(scope="module")
def theirs() -> tuple[Any, Any]:
    folder = str(zoo.path())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model, AutoTokenizer.from_pretrained(folder)


def encode(theirs: tuple[Any, Any], context: str, continuation: str) -> tuple[list[int], list[int]]:
    tokenizer = theirs[1]
    before, both = tokenizer.encode(context), tokenizer.encode(context + continuation)
    # "(" and ")" are one token together.
    return before, both[len(before) :] or tokenizer.encode(continuation, add_special_tokens=False)


def log_probabilities(theirs: tuple[Any, Any], context: list[int], continuation: list[int]) -> tuple[float, bool]:
    model, _ = theirs
    with torch.inference_mode():
        rows = model(torch.tensor([context + continuation[:-1]])).logits[0, len(context) - 1 :].double()
    chosen = rows.log_softmax(-1)[range(len(continuation)), continuation]
    return float(chosen.sum()), rows.argmax(-1).tolist() == continuation


def instance(kind: str, *args: Any) -> Instance:
    return Instance(request_type=kind, doc={}, arguments=args, idx=0)


def test_log_likelihoods_are_those_of_transformers(ours: TightfitLM, theirs: tuple[Any, Any]) -> None:
    pairs = [(context, choice) for context, choices, _ in QUESTIONS for choice in choices]
    found = ours.loglikelihood([instance("loglikelihood", *pair) for pair in pairs], disable_tqdm=True)
    for (context, continuation), (total, greedy) in zip(pairs, found, strict=True):
        expected, expected_greedy = log_probabilities(theirs, *encode(theirs, context, continuation))
        assert total == pytest.approx(expected, abs=0.02)  # the prompt and the cache are bfloat16
        assert greedy == expected_greedy
    assert any(greedy for _, greedy in found)


def test_what_cannot_be_scored_is_refused(ours: TightfitLM) -> None:
    for continuation in ("", "x = 1\n" * 60):
        with pytest.raises(UsageError, match="can't be scored"):
            ours.loglikelihood([instance("loglikelihood", "y", continuation)], disable_tqdm=True)


def test_a_text_is_scored_once_from_its_beginning(ours: TightfitLM, theirs: tuple[Any, Any]) -> None:
    text = "def f(x):\n    return x + 1\n\n\n" * 12  # more than the context of 128
    tokens = theirs[1].encode(text, add_special_tokens=False)
    assert 128 < len(tokens) < 2 * 127
    [found] = ours.loglikelihood_rolling([instance("loglikelihood_rolling", text)], disable_tqdm=True)
    first, _ = log_probabilities(theirs, [0], tokens[:127])
    rest = tokens[127:]
    # As lm-eval cuts it: the tokens that are left are predicted from as many before them as fit.
    second, _ = log_probabilities(theirs, tokens[len(tokens) - 128 : 127], rest)
    assert found == pytest.approx(first + second, abs=0.3)


def test_texts_end_where_they_are_told_to_and_long_prompts_lose_their_beginning(
    ours: TightfitLM, theirs: tuple[Any, Any]
) -> None:
    until = {"until": ["\n"], "max_gen_toks": 12}
    contexts = ["import os\nimport ", "for i in range(", "x = 1\n" * 80 + "import "]
    asked = [instance("generate_until", context, until) for context in contexts]
    texts = ours.generate_until(asked, disable_tqdm=True)
    model, tokenizer = theirs
    for context, text in zip(contexts, texts, strict=True):
        ids = tokenizer.encode(context)[-(128 - 12) :]
        with torch.inference_mode():
            written = model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0, len(ids) :]
        assert text == tokenizer.decode(written, skip_special_tokens=True).split("\n")[0]
    with pytest.raises(UsageError, match="no room"):
        ours.generate_until([instance("generate_until", "x", {"until": [], "max_gen_toks": 200})], disable_tqdm=True)


def test_a_task_of_lm_eval_runs_on_local_data(
    ours: TightfitLM, theirs: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    file = tmp_path / "questions.jsonl"
    lines = [{"context": context, "choices": choices, "label": label} for context, choices, label in QUESTIONS]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "choice.yaml").write_text(CHOICE.format(file=file))
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    done = simple_evaluate(model=ours, tasks=["tightfit_choice"], task_manager=manager, bootstrap_iters=0)
    right = 0
    for context, choices, label in QUESTIONS:
        scores = [log_probabilities(theirs, *encode(theirs, context, choice))[0] for choice in choices]
        right += scores.index(max(scores)) == label
    assert done["results"]["tightfit_choice"]["acc,none"] == pytest.approx(right / len(QUESTIONS))
    assert 0 < right < len(QUESTIONS)


def test_the_class_is_found_by_its_name_and_keeps_the_budget() -> None:
    from lm_eval.api.registry import get_model

    options = {"pretrained": "nano", "memory": "4GiB", "kv": "window(keep=32)", "context": 128}
    found = get_model("tightfit").create_from_arg_obj(
        options, {"batch_size": "1", "device": "cuda:0"}
    )  # as its command does
    assert found.model.plan.cache == "window(keep=32)"
    assert found.model.plan.budget == 4 << 30
    [(total, _)] = found.loglikelihood([instance("loglikelihood", "", "import os\n")], disable_tqdm=True)
    assert -math.inf < total < 0
    assert found.model.receipt()["peak_rss_bytes"] <= 4 << 30
    found.model.close()
    with pytest.raises(UsageError, match="batch size"):
        TightfitLM(batch_size="auto")
