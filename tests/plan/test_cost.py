"""Predictions are what can be reckoned by hand from speeds, and rise with what is read."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path

import pytest
import torch
from tests import random_model, tiny_mixtures
from tests.plan import fake_speeds as fake

from tightfit import zoo
from tightfit.checkpoints.checkpoint import Checkpoint, open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.engine.start import workspace_bytes
from tightfit.kv.make import kv_nbytes
from tightfit.model.decoder import cache_layouts
from tightfit.model.families import model_spec
from tightfit.plan.cost import Cost
from tightfit.plan.schema import Plan
from tightfit.plan.search import Constraints, Search
from tightfit.plan.speeds import Speeds
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, layer_name

MIB = 1 << 20
RUNTIME = 200 * MIB
CONTEXT = 1024


def opened(checkpoint: Checkpoint, speeds: Speeds | None = None, **changes: object) -> tuple[Cost, Search]:
    spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
    constraints = Constraints(budget=1 << 40, context=CONTEXT, sequences=1, threads=2, numerics=fake.NUMERICS)
    constraints = dataclasses.replace(constraints, **changes)  # type: ignore[arg-type]
    cost = Cost(checkpoint, spec, fake.speeds() if speeds is None else speeds, 2, fake.NUMERICS)
    return cost, Search(checkpoint, spec, constraints, lambda plan: workspace_bytes(checkpoint, spec, plan))


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return open_checkpoint(str(zoo.path("nano")))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Headers of a model of a billion parameters."""
    settings = random_model.config(**random_model.PRESETS["1b"])
    return open_checkpoint(str(random_model.write_headers(tmp_path_factory.mktemp("models") / "1b", settings)))


def test_a_layer_decodes_in_the_time_of_its_bytes_and_its_small_operations(nano: Checkpoint) -> None:
    cost, _ = opened(nano)
    layer = cost.spec.layers[0]
    weights = sum(param.count for param in layer.params if param.is_matrix)
    assert cost.decode_seconds(layer_name(0), "bf16") == pytest.approx(fake.LAYER + 2 * weights * fake.PER_BYTE)
    assert cost.decode_seconds(layer_name(0), "bf16", rows=2) == pytest.approx(
        fake.LAYER + 2 * weights * 1.5 * fake.PER_BYTE
    )


def test_the_head_counts_once_where_it_lies(nano: Checkpoint, large: Checkpoint) -> None:
    for checkpoint in (nano, large):
        cost, _ = opened(checkpoint)
        both = [cost.decode_seconds(name, "bf16") for name in (EMBEDDINGS, HEAD)]
        matrix = cost.spec.vocab_size * cost.spec.hidden_size
        assert sum(both) == pytest.approx(2 * matrix * fake.PER_BYTE)
        assert (both[0] > 0) == cost.spec.tied


def test_a_chunk_takes_the_time_of_its_weights_and_activations(nano: Checkpoint) -> None:
    cost, _ = opened(nano)
    layer, hidden = cost.spec.layers[0], cost.spec.hidden_size
    weights = sum(param.count for param in layer.params if param.is_matrix)
    attention, mlp = layer.attention, layer.mlp
    numbers = 2 * hidden + mlp.intermediate_size + (attention.heads + 2 * attention.kv_heads) * attention.key_dim
    expected = fake.LAYER + fake.ANEW + 512 * numbers * fake.NUMBER + weights * fake.PER_WEIGHT
    assert cost.prefill_seconds(layer_name(0), "bf16", 512) == pytest.approx(expected)
    assert cost.prefill_seconds(HEAD, "bf16", 512) == 0
    padded, _ = opened(nano, fake.speeds(padded=True))
    dearer = padded.prefill_seconds(layer_name(0), "bf16", 257), padded.prefill_seconds(layer_name(0), "bf16", 512)
    assert dearer[0] == pytest.approx(dearer[1] - 255 * numbers * fake.NUMBER)


def test_attention_takes_the_time_of_what_it_looks_at(nano: Checkpoint) -> None:
    cost, _ = opened(nano)
    attention = cost.spec.layers[0].attention
    assert cost.attend_seconds(0, "none", 1000) == pytest.approx(
        fake.ATTENTION + 1000 * attention.kv_heads * fake.PER_KEY
    )
    assert cost.attend_prefill_seconds(0, "none", 512, 256) == pytest.approx(
        fake.ATTENTION + 256 * attention.heads * (fake.PER_QUERY + 768 * fake.PER_PAIR)
    )


def test_a_cache_that_lets_go_is_looked_at_as_far_as_it_keeps(nano: Checkpoint) -> None:
    cost, _ = opened(nano)
    kept = [cost.attend_seconds(0, "snapkv(keep=128)+int4", tokens) for tokens in (64, 512, 1024)]
    assert kept[0] < kept[1] == kept[2] < cost.attend_seconds(0, "int4", 512)
    assert cost.attend_seconds(0, "quest(tokens=128)", 1024) == kept[2]


def test_heads_that_stream_are_looked_at_beside_those_that_do_not(nano: Checkpoint) -> None:
    """Half of them keep 16 tokens, and half of those that come before some are let go of; the others all, or choose."""
    cost, _ = opened(nano)
    for kv, others in (
        ("duo(retrieval=0.5,sinks=0,recent=16)", 1024),
        ("lserve(retrieval=0.5,sinks=0,recent=16,tokens=128)", 128 + 16),
    ):
        assert cost.attend_seconds(0, kv, 1024) == cost.attend_seconds(0, "int8", (32 + others) // 2)


def test_a_whole_prediction_is_the_sum_of_its_parts(nano: Checkpoint) -> None:
    cost, search = opened(nano)
    plan = search.best(RUNTIME)
    assert plan.chunk == 512
    found = cost.predict(plan, 700, 100)
    names = [layer_name(index) for index in range(len(plan.layers))]
    head = cost.decode_seconds(EMBEDDINGS, "own") + cost.decode_seconds(HEAD, "own")
    step = head + fake.STEP
    for index, name in enumerate(names):
        step += cost.decode_seconds(name, "own") + cost.attend_seconds(index, "none", 750)
    assert found.decode_seconds == pytest.approx(step)
    prompt = head + 2 * fake.STEP
    for start, count in ((0, 512), (512, 188)):
        prompt += cost.prefill_seconds(EMBEDDINGS, "own", count)
        for index, name in enumerate(names):
            prompt += cost.prefill_seconds(name, "own", count)
            prompt += cost.attend_prefill_seconds(index, "none", start, count)
    assert found.prefill_seconds == pytest.approx(prompt)
    assert json.loads(json.dumps(dataclasses.asdict(found))) == dataclasses.asdict(found)


def test_the_floor_is_never_above_the_prediction_and_names_what_binds(large: Checkpoint) -> None:
    cost, search = opened(large)
    plan = search.best(RUNTIME)
    found = cost.predict(plan, 512, 100)
    assert (found.prefill_bound, found.decode_bound) == ("compute", "memory")
    assert 0 < found.floor_decode_seconds < found.decode_seconds
    assert 0 < found.floor_prefill_seconds < found.prefill_seconds
    parameters = cost.spec.parameter_count - cost.spec.vocab_size * cost.spec.hidden_size  # embeddings are looked up
    attention = cost.spec.layers[0].attention
    looked_at = len(cost.spec.layers) * 562 * attention.heads * (attention.key_dim + attention.value_dim)
    assert found.operations_per_token == pytest.approx(2 * (parameters + looked_at), rel=0.001)  # vectors do not count
    assert found.bytes_per_token == pytest.approx(2 * parameters, rel=0.05)


def test_less_precise_weights_and_shorter_contexts_are_never_slower(large: Checkpoint) -> None:
    cost, search = opened(large)
    plans = [search.uniform(level, 512, RUNTIME) for level in ("own", "int8", "int4")]
    decoding = [cost.predict(plan, 512, 100).decode_seconds for plan in plans]
    assert decoding == sorted(decoding, reverse=True)
    lengths = [cost.predict(plans[0], prompt, 10) for prompt in (100, 500, 900)]
    assert [each.decode_seconds for each in lengths] == sorted(each.decode_seconds for each in lengths)
    assert [each.prefill_seconds for each in lengths] == sorted(each.prefill_seconds for each in lengths)


def streaming(search: Search, more: int = 0) -> Plan:
    smallest = search.smallest(RUNTIME)
    bounded = dataclasses.replace(search.constraints, budget=smallest.total + more)
    return Search(search.checkpoint, search.spec, bounded, search.workspace).best(RUNTIME)


def test_what_is_read_from_the_disk_is_hidden_as_far_as_was_measured(large: Checkpoint) -> None:
    cost, search = opened(large, weights="own")
    plan = streaming(search)
    assert plan.streamed
    found = cost.predict(plan, 512, 100)
    whole = plan.outer.nbytes // 2 + sum(layer.nbytes for layer in plan.layers)  # the head, and all layers
    assert found.bytes_per_token == pytest.approx(2 * whole, rel=0.05)  # from the disk, and from memory
    reading = whole / fake.DISK.copied  # checkpoints do not begin at multiples of 4 KiB
    computing = whole * fake.PER_BYTE
    assert found.decode_seconds == pytest.approx(reading + 0.25 * computing, rel=0.05)
    assert found.decode_bound == "disk"
    assert found.floor_decode_seconds == pytest.approx(reading, rel=0.01)
    more = cost.predict(streaming(search, 512 * MIB), 512, 100)
    assert more.decode_seconds < found.decode_seconds


def test_streaming_cannot_be_predicted_without_a_disk(large: Checkpoint) -> None:
    cost, search = opened(large, fake.speeds(disk=None), weights="own")
    with pytest.raises(ValueError, match="no disk"):
        cost.predict(streaming(search), 512, 100)


def test_the_cache_is_predicted_to_the_byte_and_says_how_many_fit(nano: Checkpoint) -> None:
    cost, search = opened(nano, kv="int4", sequences=2)
    plan = search.best(RUNTIME)
    layouts = cache_layouts(cost.spec, CONTEXT, plan.chunk)
    assert 0 <= plan.accounts["kv"] - kv_nbytes("int4", layouts, CONTEXT, 2, "bfloat16") < 4096
    each = plan.accounts["kv"] // 2
    fitting = plan.model_copy(update={"budget": plan.total + 3 * each + each // 2})
    found = cost.predict(fitting, 100, 10)
    assert found.concurrency == 5
    assert found.switch_seconds == pytest.approx(4 * each / 2e10)


def test_of_a_mixture_only_what_is_used_counts(tmp_path: Path) -> None:
    checkpoint, _ = tiny_mixtures.write(tmp_path, tiny_mixtures.config_of("mixtral"), torch.bfloat16)
    cost, _ = opened(checkpoint, context=64)
    mixture = cost.spec.layers[0].mlp
    experts = sum(param.count for param in cost.spec.layers[0].params if param.experts and param.is_matrix)
    others = sum(param.count for param in cost.spec.layers[0].params if not param.experts and param.is_matrix)
    used = experts * mixture.experts_per_token / mixture.experts
    small = (fake.LAYER + fake.ANEW) * (1 + mixture.experts_per_token / 2)
    seconds = cost.decode_seconds(layer_name(0), "bf16")
    assert seconds == pytest.approx(small + 2 * (used + others) * fake.PER_BYTE, rel=0.02)  # routers are float32
    many = cost.decode_seconds(layer_name(0), "bf16", rows=64)
    assert many > seconds + 2 * (experts - used) * fake.PER_BYTE * 0.9  # then all of them are


def test_predicting_is_quick(large: Checkpoint) -> None:
    """A search predicts thousands of plans. It takes half a millisecond; the bound is for a busy machine."""
    cost, search = opened(large)
    plan = search.best(RUNTIME)
    cost.predict(plan, 1000, 24)
    times = []
    for _ in range(20):
        began = time.perf_counter()
        cost.predict(plan, 1000, 24)
        times.append(time.perf_counter() - began)
    assert min(times) < 5e-3
