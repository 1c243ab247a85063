"""What every task promises, and that each sees a difference between the exact model and a crippled one."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tests.lab.conftest import CONTEXT, measure, record

from tightfit.catalog import all_techniques, parse_one, spec_string
from tightfit.errors import UsageError
from tightfit.kernels.pages import PAGE
from tightfit.lab.material import Material
from tightfit.lab.reader import Reader
from tightfit.lab.tasks import Task

TEXTS = "texts=4,follow=24,tokens=400"
SMALL = {
    "perplexity": "perplexity(windows=4,tokens=32,after=400)",
    "divergence": f"divergence({TEXTS})",
    "confidence": f"confidence({TEXTS})",
    "lookup": "lookup(questions=8,tokens=400)",
    "needle": "needle(questions=2,tokens=400,needles=1/3,depths=0/50)",
    "track": "track(questions=6,tokens=200)",
    "copy": "copy(questions=16,tokens=200)",
    "generation": "generation(prompts=4,new=16,tokens=400)",
    "latency": "latency(repetitions=3,new=4,tokens=64/400)",
    "memory": "memory(new=16)",
    "energy": "energy(repetitions=1,new=2,tokens=64,root=/nowhere)",
}
CRIPPLED: dict[str, dict[str, Any]] = {
    "cache": {"kv": "window(keep=64)"},
    "weights": {"weights": "int2"},
}


def task(spec: str) -> Task:
    found: Task = parse_one("tasks", spec)
    return found


@pytest.fixture(scope="module")
def found(
    readers: Callable[..., Reader], exact: Reader, material: Material
) -> Callable[[str, str], list[dict[str, Any]]]:
    """What a task finds of the exact model or of a crippled one; measured once."""
    known: dict[tuple[str, str], list[dict[str, Any]]] = {}

    def values(name: str, configuration: str) -> list[dict[str, Any]]:
        if (name, configuration) not in known:
            one = task(SMALL[name])
            reader = exact if configuration == "exact" else readers(**CRIPPLED[configuration])
            known[name, configuration] = measure(one, reader, one.samples(material, CONTEXT, seed=0), exact)
        return known[name, configuration]

    return values


@pytest.mark.parametrize("name", SMALL)
def test_samples_depend_on_the_seed_alone_and_fit_into_the_context(name: str, material: Material) -> None:
    for one in (task(SMALL[name]), task(name)):
        for context in (CONTEXT, 4096):
            samples = one.samples(material, context, seed=1)
            assert samples == one.samples(material, context, seed=1)
            assert [s.prompt for s in samples] != [s.prompt for s in one.samples(material, context, seed=2)]
            assert len({sample.key for sample in samples}) == len(samples)
            for sample in samples:
                assert sample.prompt[0] == material.begin[0]
                assert len(sample.prompt) + len(sample.following) + sample.new_tokens <= context
                assert json.loads(json.dumps(sample.group)) == sample.group


@pytest.mark.parametrize("name", SMALL)
def test_values_have_every_metric_and_can_be_written_as_json(name: str, found: Any) -> None:
    for values in found(name, "exact"):
        assert json.loads(json.dumps(values)) == values
        assert {metric.name for metric in task(name).metrics} <= values.keys()


def test_the_exact_model_diverges_from_itself_in_nothing(found: Any) -> None:
    one = task(SMALL["divergence"]).summarise(found("divergence", "exact"))
    assert (one["kl"].value, one["kl"].high, one["agreement"].value) == (0, 0, 1)
    text = task(SMALL["generation"]).summarise(found("generation", "exact"))
    assert (text["same_tokens"].value, text["same_share"].value) == (16, 1)
    sure = task(SMALL["confidence"]).summarise(found("confidence", "exact"))
    assert (sure["shift"].value, sure["flips"].value) == (0, 0)
    assert 0 < sure["ece"].value < 0.2
    assert 0.2 < sure["true_probability"].value < 0.8


WORSE = [
    ("cache", "lookup", "log_probability"),
    ("cache", "lookup", "correct"),
    ("cache", "needle", "log_probability"),
    ("cache", "track", "log_probability"),
    ("cache", "copy", "log_probability"),
    ("cache", "divergence", "kl"),
    ("cache", "divergence", "agreement"),
    ("cache", "generation", "same_tokens"),
    ("cache", "confidence", "true_probability"),
    ("cache", "confidence", "flips"),
    ("cache", "memory", "kv"),
    ("weights", "perplexity", "bits_per_byte"),
    ("weights", "perplexity", "perplexity"),
    ("weights", "divergence", "kl"),
    ("weights", "confidence", "shift"),
    ("weights", "generation", "same_tokens"),
]


@pytest.mark.parametrize(("configuration", "name", "metric"), WORSE)
def test_crippled_models_are_worse_beyond_chance(configuration: str, name: str, metric: str, found: Any) -> None:
    one = task(SMALL[name])
    [kind] = [each for each in one.metrics if each.name == metric]
    less = one.compare(found(name, configuration), found(name, "exact"))[metric]
    if name == "memory":
        assert less.value < 0  # a cache of 64 tokens takes less
    elif kind.better == "higher":
        assert less.high is not None
        assert less.high < 0
    else:
        assert less.low is not None
        assert less.low > 0


def test_what_the_exact_model_is_unsure_of_is_told_apart(found: Any) -> None:
    one = task(SMALL["confidence"])
    summary, values = one.summarise(found("confidence", "weights")), found("confidence", "weights")
    tokens = sum(row[0] for each in values for row in each["quarters"])
    assert tokens == 4 * 24
    parts = [
        (summary[f"shift_{lowest}"].value, sum(each["quarters"][index][0] for each in values))
        for index, lowest in enumerate((0, 25, 50, 75))
        if f"shift_{lowest}" in summary
    ]
    assert len(parts) >= 3
    assert sum(shift * count for shift, count in parts) / tokens == pytest.approx(summary["shift"].value)


def test_a_model_that_is_right_as_often_as_it_says_is_calibrated() -> None:
    one = task("confidence")

    def ece(*bins: tuple[float, float, float]) -> float:
        filled = np.zeros((10, 3))
        filled[: len(bins)] = bins
        [metric] = [each for each in one.metrics if each.name == "ece"]
        return float(one.statistic(metric)(filled.reshape(1, 30)))

    assert ece((10, 2.0, 2.0), (10, 7.0, 7.0)) == 0
    assert ece((10, 9.0, 5.0), (30, 6.0, 9.0)) == pytest.approx((4 + 3) / 40)


def test_samples_give_the_same_in_any_order(readers: Callable[..., Reader], material: Material) -> None:
    # A cache that lets go of tokens has the most to leak: what it kept, and what it learned of them.
    reader = readers(kv="h2o(keep=64)+int4")
    one = task("perplexity(windows=2,tokens=48,after=16/200)")
    samples = one.samples(material, CONTEXT, seed=5)
    there = [one.measure(reader, sample, None) for sample in samples]
    back = [one.measure(reader, sample, None) for sample in reversed(samples)][::-1]
    assert there == back


@pytest.mark.parametrize("prefill", ["chunked", "layered"])
def test_prompts_go_through_the_schedule_of_the_plan(
    prefill: str, readers: Callable[..., Reader], material: Material
) -> None:
    reader = readers(kv="snapkv(keep=64)", prefill=prefill, chunk=128)
    prompt = material.ids[:400].tolist()
    generated = reader.model.generate(
        material.tokenizer.decode(prompt), max_new_tokens=40, temperature=0, ignore_eos=True
    )
    prompt = material.tokenizer.encode(material.tokenizer.decode(prompt))
    assert reader.greedy(prompt, 40) == generated.tokens


def test_rows_predict_what_follows(exact: Reader, material: Material) -> None:
    ids = [*material.begin, *material.ids[:100].tolist()]
    rows = [row.clone() for row in exact.follow(ids[:60], ids[60:])]
    by_hand = sum(float(row.double().log_softmax(-1)[token]) for row, token in zip(rows, ids[60:], strict=True))
    scored = sum(exact.model.score(ids)[59:])
    assert by_hand == pytest.approx(scored, abs=0.05)  # prefill multiplies in bfloat16 there
    [alone] = exact.follow(ids[:60])
    assert torch.equal(alone, rows[0])


def test_a_text_longer_than_the_context_is_refused(exact: Reader, material: Material) -> None:
    with pytest.raises(UsageError, match="context"):
        next(exact.follow(material.ids[:CONTEXT].tolist(), [1]))


def test_medians_of_times_are_of_repetitions(found: Any) -> None:
    one = task(SMALL["latency"])
    values = found("latency", "exact")
    summary = one.summarise(values)
    assert summary["first_token"].samples == summary["token"].samples == 2 * 3
    short, long = (value["first_token"] for value in values)
    assert 0 < short < long  # 64 tokens of a prompt against 400


def test_memory_counts_the_accounts_of_a_full_context(found: Any, exact: Reader) -> None:
    [values] = found("memory", "exact")
    receipt = exact.model.receipt()["accounts"]
    assert values["weights"] == receipt["weights"]["peak_bytes"]
    assert values["kv"] == receipt["kv"]["reserved_bytes"]  # every token of the context was written
    assert values["experts"] is None
    # 8 layers, 2 heads of 64 features, keys and values, of every token but the last, which was predicted only.
    kind = 2 if exact.model.plan.numerics.kv != "float32" else 4
    assert values["kv_read"] == (CONTEXT - 1) * 8 * 2 * 64 * 2 * kind
    assert values["peak_rss"] > values["weights"] + values["kv"]
    assert "experts" not in task("memory").summarise([values])


def test_a_selector_reads_bounds_and_the_pages_it_chooses(readers: Callable[..., Reader], material: Material) -> None:
    reader = readers(kv="quest(tokens=64)")
    for _ in reader.follow(material.ids[:400].tolist()):
        pass
    heads, token, full = 2, 2 * 64 * 2, 2  # two layers see everything; keys and values of 64 features in 2 bytes
    pages, tail = divmod(400, PAGE)
    chosen = heads * (
        pages * token + (64 + tail) * token
    )  # of each page the least and the most of each feature of keys
    assert reader.read_bytes() == full * heads * 400 * token + (8 - full) * chosen


def test_perplexity_is_of_all_tokens_together(found: Any) -> None:
    values = found("perplexity", "exact")
    summary = task("perplexity").summarise(values)
    nats = sum(each["nats"] for each in values)
    assert summary["perplexity"].value == pytest.approx(math.exp(nats / sum(each["tokens"] for each in values)))
    text = sum(each["bytes"] for each in values)
    assert summary["bits_per_byte"].value == pytest.approx(nats / math.log(2) / text)
    assert summary["bits_per_byte"].low < summary["bits_per_byte"].value < summary["bits_per_byte"].high


def test_needles_lie_where_they_are_asked_to(material: Material) -> None:
    for sample in task("needle(questions=1,tokens=1000,needles=1/4,depths=0/30/100)").samples(material, 4096, 0):
        text = material.tokenizer.decode(sample.prompt)
        body, _, question = text.rpartition("# Question:")
        word = question.split("number for ")[1].split("?")[0]
        place = body.index(f"# The secret number for {word} is {material.tokenizer.decode(sample.following).strip()}.")
        depth = 100 * place / len(body.replace(f"# The secret number for {word}", ""))
        assert abs(depth - int(sample.group["depth"])) < 8  # whole lines, and the needle's own length
        assert body.count("# The secret number for") == sample.group["needles"]


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("lookup(tokens=many)", "tokens cannot be 'many'"),
        ("lookup(tokens=0)", "tokens cannot be '0'"),
        ("lookup(questions=0)", "questions cannot be 0"),
        ("needle(depths=0/120)", "depths cannot be"),
        ("needle(needles=0)", "needles cannot be"),
        ("divergence(follow=0)", "follow cannot be 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(spec: str, said: str) -> None:
    with pytest.raises(UsageError, match="cannot be") as error:
        task(spec)
    assert said in str(error.value)
    assert error.value.hint


def test_lengths_that_do_not_fit_are_refused_and_shares_are_cut(material: Material) -> None:
    with pytest.raises(UsageError, match="512 tokens of context"):
        task("divergence(tokens=500)").samples(material, 512, 0)
    [sample] = task("divergence(texts=1,tokens=100%)").samples(material, 512, 0)
    assert len(sample.prompt) + len(sample.following) == 512
    with pytest.raises(UsageError, match="a sample takes"):
        task("divergence").samples(Material(material.tokenizer, material.ids[:100], ()), 512, 0)


def test_tasks_are_named_by_spec_strings_and_are_no_techniques() -> None:
    assert spec_string(task("lookup(questions=16,tokens=1000/2000)")) == "lookup(questions=16,tokens=1000/2000)"
    assert spec_string(task("latency")) == "latency"
    assert "tasks" not in {entry.seam for entry in all_techniques()}


def test_tasks_are_known_without_importing_torch() -> None:
    program = (
        "import sys; from tightfit.catalog import parse; parse('tasks', 'lookup'); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_the_reference_is_the_same_each_time(exact: Reader, material: Material) -> None:
    [sample, *_] = task(SMALL["generation"]).samples(material, CONTEXT, 0)
    assert record(exact, sample).tokens == record(exact, sample).tokens
