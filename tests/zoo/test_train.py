from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from tightfit.errors import CheckpointError, UsageError
from tightfit.zoo import corpus, train
from tightfit.zoo.network import CausalLM
from tightfit.zoo.presets import PRESETS, Settings, Shape

TINY = Settings(
    Shape(32, 64, 2, 2, 1, 16, 256),
    tokens=6 * 512,  # six steps
    curriculum=((0.5, 128), (1.0, 256)),
    batch_tokens=512,
    micro_tokens=256,
    warmup_steps=2,
)


def weights(folder: Path) -> dict[str, Tensor]:
    """The parameters in float32 and the optimizers' state, as saved to go on from."""
    state = torch.load(folder / train.STATE, weights_only=True)
    momenta = {
        f"{index}.{parameter}.{name}": value
        for index, optimizer in enumerate(state["optimizers"])
        for parameter, values in optimizer["state"].items()
        for name, value in values.items()
    }
    return {**state["model"], **momenta}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@pytest.fixture(scope="module")
def uninterrupted(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny run that nothing disturbed."""
    out = tmp_path_factory.mktemp("uninterrupted")
    assert train.train(TINY, data, out).step == 6
    return out


def test_a_run_that_is_stopped_and_repeated_ends_as_if_it_had_not_been(
    data: Path, tmp_path: Path, uninterrupted: Path
) -> None:
    stops = iter([False, True])  # asked after each step
    first = train.train(TINY, data, tmp_path, stopped=lambda: next(stops))
    assert first.step == 2
    assert train.train(TINY, data, tmp_path).step == 6
    assert_same(weights(tmp_path), weights(uninterrupted))


def test_a_killed_run_goes_on_from_its_last_save(
    data: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    advance = train.Run.advance

    def dies(run: train.Run) -> None:
        if run.step == 4:
            raise Killed
        advance(run)

    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "advance", dies)
        with pytest.raises(Killed):
            train.train(TINY, data, tmp_path, save_every_s=0)
    assert torch.load(tmp_path / train.STATE, weights_only=True)["step"] == 4
    train.train(TINY, data, tmp_path)
    assert_same(weights(tmp_path), weights(uninterrupted))


def test_a_finished_run_is_not_trained_further(data: Path, uninterrupted: Path) -> None:
    before = weights(uninterrupted)
    assert train.train(TINY, data, uninterrupted).step == 6
    assert_same(weights(uninterrupted), before)


def test_the_state_of_another_run_is_refused(data: Path, uninterrupted: Path) -> None:
    with pytest.raises(CheckpointError, match="other settings"):
        train.train(replace(TINY, seed=1), data, uninterrupted)


def test_a_damaged_state_is_refused_and_left_alone(data: Path, tmp_path: Path, uninterrupted: Path) -> None:
    damaged = (uninterrupted / train.STATE).read_bytes()[:-1000]
    (tmp_path / train.STATE).write_bytes(damaged)
    with pytest.raises(CheckpointError, match="cannot be read"):
        train.train(TINY, data, tmp_path)
    assert (tmp_path / train.STATE).read_bytes() == damaged


def test_the_loss_falls_and_is_reported_on_text_that_was_held_out(data: Path, tmp_path: Path) -> None:
    settings = replace(TINY, shape=replace(TINY.shape, hidden_size=64, intermediate_size=128), tokens=40 * 512)
    reports: list[dict[str, Any]] = []
    train.train(settings, data, tmp_path, report=reports.append)
    (last,) = reports
    # It starts at ln(6144) = 8.72. Knowing which tokens are common is worth a nat and a half.
    assert last["loss"] < 7.2
    assert last["val_nats_per_token"] < 7.2
    assert (last["step"], last["tokens"], last["length"]) == (40, 40 * 512, 256)


def test_passes_bound_memory_and_do_not_change_the_gradient(data: Path) -> None:
    def gradient(micro_tokens: int) -> Tensor:
        run = train.Run(replace(TINY, micro_tokens=micro_tokens, clip_norm=1e9), corpus.read(data), "cpu")
        run.advance()
        return torch.cat([parameter.grad.flatten() for parameter in run.model.parameters()])  # type: ignore[union-attr]

    whole, parts = gradient(512), gradient(128)
    # bfloat16 matrix products: 8 bits of mantissa, summed in another order.
    assert (whole - parts).norm() < 0.02 * whole.norm()


def test_minutes_end_a_run_before_its_tokens_do(data: Path, tmp_path: Path) -> None:
    assert train.train(replace(TINY, minutes=1e-6), data, tmp_path).step == 1


@pytest.mark.parametrize("nothing", [{"tokens": 0}, {"minutes": 0.0}])
def test_a_run_of_nothing_is_refused(nothing: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="trains nothing"):
        replace(TINY, **nothing)


def test_lengths_and_learning_rates_follow_the_progress_of_the_run() -> None:
    settings = PRESETS["nano"]
    assert [settings.length(progress) for progress in (0, 0.59, 0.6, 0.85, 1.0)] == [512, 512, 1024, 2048, 2048]
    assert settings.lr_scale(0, 0.0) == 1 / 40
    assert settings.lr_scale(39, 0.3) == settings.lr_scale(1000, 0.55) == 1
    assert settings.lr_scale(1000, 0.775) == pytest.approx(0.5)
    assert settings.lr_scale(1000, 1.0) == 0.02


def test_a_corpus_shorter_than_a_row_is_refused(data: Path) -> None:
    small = corpus.read(data)
    small = replace(small, train=small.train[:200])
    with pytest.raises(UsageError, match="200 training tokens do not fill one row of 256"):
        train.Run(TINY, small, "cpu")


@pytest.fixture
def _signals() -> Iterator[None]:
    """The command sets handlers for the rest of its process; here that is the tests' process."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("_signals")
def test_ctrl_c_saves_and_the_same_command_goes_on(
    data: Path, tmp_path: Path, uninterrupted: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)
    advance = train.Run.advance

    def interrupted(run: train.Run) -> None:
        advance(run)
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    command = ["--preset", "tiny", "--data", str(data), "--out", str(tmp_path), "--device", "cpu"]
    with monkeypatch.context() as patch:
        patch.setattr(train.Run, "advance", interrupted)
        assert train.main(command) == 128 + signal.SIGINT
    assert "goes on from" in capsys.readouterr().err
    assert train.main(command) == 0
    assert_same(weights(tmp_path), weights(uninterrupted))


@pytest.mark.usefixtures("_signals")
def test_an_unknown_preset_is_refused_with_the_known_ones(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--preset", "huge", "--data", str(data), "--out", "unused"]) == UsageError.exit_status
    assert "nano, nano-moe, small, small-moe, draft" in capsys.readouterr().err


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_trains_and_its_folder_opens_in_transformers_with_the_same_logits(
    data: Path, tmp_path: Path, name: str
) -> None:
    preset = PRESETS[name]
    # The preset with its proportions of heads, experts and lengths, and everything else small.
    settings = replace(
        preset,
        shape=replace(preset.shape, hidden_size=48, intermediate_size=64, num_hidden_layers=2, head_dim=16),
        tokens=3 * 512,
        curriculum=tuple((until, 128 if until < 1 else 256) for until, _ in preset.curriculum),
        batch_tokens=512,
        micro_tokens=256,
        warmup_steps=1,
    )
    run = train.train(settings, data, tmp_path)
    assert run.step == 3
    moved = CausalLM(settings.shape, run.model.vocab_size)
    moved.load_state_dict({key: value.bfloat16().float() for key, value in run.model.state_dict().items()})

    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert type(opened).__name__ == ("MixtralForCausalLM" if "moe" in name else "LlamaForCausalLM")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer("def area(radius):\n    return 3 * radius ** 2\n", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        theirs, ours = opened(ids).logits, moved(ids)[0]
    assert ours.std() > 0.05  # three steps in: small, but not what was initialised
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * theirs.abs().max().item())
    assert opened.generation_config.eos_token_id == tokenizer.eos_token_id == 1
