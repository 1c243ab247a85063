"""Finished subtasks leave their conclusions, which stand where they would if nothing else had been."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import Run, Tiny
from tests.model.families.sharing_network import VOCAB, SharingLlama
from tests.model.families.test_lckv_llama import decoder_of

from tightfit.errors import UsageError
from tightfit.kv.compose import compose
from tightfit.kv.evict.tim import TIM
from tightfit.kv.method import Read
from tightfit.model.batch import Batch, Segment

OPEN, CONCLUDE, CLOSE = 61, 62, 63
KV = f"tim(open=#{OPEN},conclude=#{CONCLUDE},close=#{CLOSE},keep=150)"


def kept(tokens: list[int], stack: int = 0) -> list[int]:
    """Places of the tokens that stay, read from left to right."""
    marks = {"open": frozenset({OPEN}), "conclude": frozenset({CONCLUDE}), "close": frozenset({CLOSE})}
    stays = TIM(stack=stack).stays(Read(torch.tensor(tokens, dtype=torch.int32), marks))
    return stays.nonzero()[:, 0].tolist()


def structured(count: int, seed: int = 0) -> list[int]:
    """A text of subtasks, some of them inside others."""
    rng, tokens, depth = random.Random(seed), [], 0
    while len(tokens) < count:
        tokens += [rng.randrange(VOCAB - 3) for _ in range(rng.randrange(1, 6))]
        if depth and rng.random() < 0.6:
            tokens += [CONCLUDE, rng.randrange(VOCAB - 3), rng.randrange(VOCAB - 3), CLOSE]
            depth -= 1
        elif depth < 3:
            tokens.append(OPEN)
            depth += 1
    return tokens[:count]


def test_only_conclusions_of_finished_subtasks_stay() -> None:
    o, c, e = OPEN, CONCLUDE, CLOSE
    assert kept([1, o, 2, c, 3, e, 4]) == [0, 3, 4, 5, 6]
    assert kept([1, o, 2, c, 3]) == [0, 1, 2, 3, 4]  # not finished
    assert kept([o, 1, o, 2, c, 3, e, 4]) == [0, 1, 4, 5, 6, 7]  # the inner one is
    assert kept([o, 1, o, 2, c, 3, e, 4, c, 5, e, 6]) == [8, 9, 10, 11]  # both: the inner conclusion was the outer's
    assert kept([o, 1, e, 2]) == [3]  # without a conclusion
    two = [o, 1, c, 2, e, o, 3, c, 4, e]
    assert [kept(two, stack) for stack in (0, 1)] == [[2, 3, 4, 7, 8, 9], [2, 3, 4, 5, 6, 7, 8, 9]]
    assert all(kept(two, stack) == list(range(10)) for stack in (2, 3, 4, 9))
    assert kept([e, c, 1]) == [0, 1, 2]  # marks alone mean nothing


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    """Its keys and values depend on tokens and where they stand alone, so that pruning can be compared with never
    having had what is pruned."""
    return decoder_of(SharingLlama("0"), tmp_path_factory.mktemp("tim"))


def after_each(run: Run, tokens: list[int], prompt: int) -> torch.Tensor:
    return torch.stack([run.prefill(tokens[:prompt]), *(run.decode(token) for token in tokens[prompt:])])


def pruned(tiny: Tiny, tokens: list[int], prompt: int, keep: int = 150) -> torch.Tensor:
    """Logits of texts from which what is pruned before a token was cut."""
    rows = []
    for stop in range(prompt, len(tokens) + 1):
        before = [tokens[at] for at in kept(tokens[: stop - 1])][-keep:]
        rows.append(tiny.run("none").prefill([*before, tokens[stop - 1]]))
    return torch.stack(rows)


@pytest.mark.parametrize("chunk", [16, 64])
def test_what_is_kept_stands_as_though_nothing_had_been_between(one_layer: Tiny, chunk: int) -> None:
    tokens = structured(110)
    found = after_each(one_layer.run(KV, chunk=chunk), tokens, 60)
    torch.testing.assert_close(found, pruned(one_layer, tokens, 60), rtol=1e-3, atol=1e-3)


def test_the_oldest_go_where_there_is_no_room(one_layer: Tiny) -> None:
    tokens = structured(90)
    assert max(len(kept(tokens[:stop])) for stop in range(90)) > 24
    run = one_layer.run(KV.replace("150", "24"), chunk=16)
    run.prefill(tokens[:64])
    assert run.positions(0, 0) == kept(tokens[:64])[-24:]
    [position] = run.cache.standing(_step(64, 5), torch.tensor([64.0])).tolist()
    assert position == len(run.positions(0, 0))


def test_nothing_may_be_left(one_layer: Tiny) -> None:
    """Where a text is a subtask without a conclusion and no more, what follows is as at its beginning."""
    tokens = [OPEN, 5, 9, CLOSE, 7, 8]
    run = one_layer.run(KV, chunk=64)
    run.prefill(tokens[:4])
    assert run.positions(0, 0) == []
    found = torch.stack([run.decode(token) for token in tokens[4:]])
    torch.testing.assert_close(found, pruned(one_layer, tokens, 5)[-2:], rtol=1e-3, atol=1e-3)


def _step(start: int, token: int) -> Batch:
    return Batch((Segment(0, start, [token], decode=True),))


def test_positions_do_not_grow_with_what_was_pruned(one_layer: Tiny) -> None:
    """480 tokens stand at 72 positions."""
    tokens: list[int] = []
    for _ in range(24):
        tokens += [OPEN, *range(1, 17), CONCLUDE, 7, CLOSE]
    run = one_layer.run(KV, chunk=64, context=512)
    run.prefill(tokens)
    assert len(run.positions(0, 0)) == 3 * 24
    assert run.cache.standing(_step(len(tokens), 5), torch.tensor([float(len(tokens))])).tolist() == [3 * 24]
    original = one_layer.run(KV[:-1] + ",positions=original)", chunk=64, context=512)
    original.prefill(tokens)
    assert original.positions(0, 0) == run.positions(0, 0)
    assert original.cache.standing(_step(len(tokens), 5), torch.tensor([480.0])).tolist() == [480]


def test_other_layers_are_pruned_alike(tiny: Callable[..., Tiny]) -> None:
    """Prompts and decoding agree, whatever the chunks, in a model of more layers."""
    small = tiny("llama")
    spec = "tim(open=#11,conclude=#23,close=#42,keep=150)"
    rng = random.Random(3)
    tokens = []
    while len(tokens) < 120:
        tokens += [11, *(rng.choice(range(43, 61)) for _ in range(rng.randrange(3, 12))), 23, 50, 51, 42]
    by_token = after_each(small.run(spec, chunk=64), tokens, 8)
    for chunk in (16, 64):
        found = after_each(small.run(spec, chunk=chunk), tokens, 100)
        torch.testing.assert_close(found, by_token[92:], rtol=1e-3, atol=1e-3 * float(by_token.abs().max()))


def test_settings_that_mean_nothing_are_refused() -> None:
    for spec, message in (
        ("tim(keep=0.5)", "cannot keep"),
        ("tim(positions=cache)", "no positions"),
        ("tim(open=|)", "needs tokens"),
        ("tim(budget=adakv)", "has no scores"),
    ):
        with pytest.raises(UsageError, match=message):
            compose(spec)
