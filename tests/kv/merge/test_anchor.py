"""A model that was tuned to gather segments in their last tokens does without the rest of them."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Run, Tiny
from tests.model.families.sharing_network import SharingLlama, train, woven
from tests.model.families.test_lckv_llama import decoder_of
from torch.nn.functional import cross_entropy

from tightfit.errors import UsageError
from tightfit.kv.compose import compose

AT, SEGMENT, SEGMENTS = 0, 2, 12
KV = f"anchor(at=#{AT},keep=200)"


def segments(rows: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, SEGMENTS * SEGMENT): a word that follows from the one of the segment before the last, and an anchor."""
    words = woven(rows, generator)[:, :SEGMENTS]
    return torch.stack([words, torch.full_like(words, AT)], 2).flatten(1)


def nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of words that follow from others: an anchor predicts the next one."""
    at = torch.arange(SEGMENT * 2, ids.shape[1], SEGMENT)
    return cross_entropy(logits[:, at - 1].flatten(0, 1), ids[:, at].flatten())


def anchored(ids: torch.Tensor) -> torch.Tensor:
    """Who sees whom in training: anchors, and one's own segment."""
    ends = (ids == AT).long()
    number = ends.cumsum(1) - ends  # of each token's segment
    return (number[:, :, None] == number[:, None]) | (ids == AT)[:, None]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[SharingLlama, Tiny]]:
    found = {}
    for name in ("tuned", "untuned"):
        network = SharingLlama("0_1")
        if name == "tuned":
            network.allowed = anchored
        assert train(network, 120, segments, nats) < 0.1
        found[name] = network, decoder_of(network, tmp_path_factory.mktemp(name))
    return found


def right(run: Run, tokens: list[int], prompt: int) -> float:
    """The share of words that are predicted: the rest of the text is decoded."""
    logits, hits = run.prefill(tokens[:prompt]), []
    for at in range(prompt, len(tokens)):
        if at % SEGMENT == 0:
            hits.append(int(logits.argmax()) == tokens[at])
        logits = run.decode(tokens[at])
    return sum(hits) / len(hits)


def shares(tiny: Tiny, kv: str) -> float:
    texts = segments(8, torch.Generator().manual_seed(9)).tolist()
    return sum(right(tiny.run(kv, chunk=16), text, 4 * SEGMENT) for text in texts) / len(texts)


def test_anchors_are_enough_for_a_tuned_model_alone(models: dict[str, tuple[SharingLlama, Tiny]]) -> None:
    tuned, untuned = models["tuned"][1], models["untuned"][1]
    assert shares(untuned, "none") > 0.8  # knows it as well
    assert shares(tuned, KV) > 0.8
    assert shares(untuned, KV) < 0.4
    # Nor are as many last tokens, which are not the anchors.
    assert shares(tuned, "window(keep=2,sinks=0,positions=original)") < 0.4


@pytest.mark.parametrize("chunk", [7, 64])
def test_every_token_sees_what_it_saw_in_training(models: dict[str, tuple[SharingLlama, Tiny]], chunk: int) -> None:
    """Whatever the chunks, in prompts and when decoding."""
    network, tiny = models["tuned"]
    [tokens] = segments(1, torch.Generator().manual_seed(4)).tolist()
    tokens = [*tokens[:20], 5, 6, 7, 8, *tokens[3:12]]  # a longer segment too
    with torch.no_grad():
        expected = network(torch.tensor([tokens]))[0][0]
    run = tiny.run(KV, chunk=chunk)
    found = [run.prefill(tokens[:17]), *(run.decode(token) for token in tokens[17:])]
    torch.testing.assert_close(torch.stack(found), expected[16:], rtol=1e-4, atol=1e-4)
    ends = [at for at, token in enumerate(tokens) if token == AT]
    assert run.positions(0, 0) == [*ends, *range(ends[-1] + 1, len(tokens))]


def test_marks_are_texts_or_numbers_of_one_token(models: dict[str, tuple[SharingLlama, Tiny]]) -> None:
    cache = models["tuned"][1].run("anchor(at=.|!)").cache
    cache.told(0, 0, [1])
    with pytest.raises(ValueError, match="not looked up"):
        cache.commit(0, [0], models["tuned"][1].run("none").ws)
    cache.resolve(lambda text: [3] if text == "." else [4])
    with pytest.raises(UsageError, match="'!', and that is 2 tokens"):
        cache.resolve(lambda text: [3] * (1 + (text == "!")))
    with pytest.raises(UsageError, match="needs tokens"):
        compose("anchor(at=|)")
    cache = models["tuned"][1].run("anchor(at=#|##|#5)").cache  # texts that begin as numbers do
    cache.resolve({"#": [3], "##": [4]}.__getitem__)
    cache.told(0, 0, [3, 4, 5, 6])
    reading = cache.store.reading
    assert [reading.ends(0, at) for at in range(4)] == [True, True, True, False]
