"""A model that names the parts of a text that it needs next reads those and no others."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Tiny
from tests.model.families.sharing_network import WORDS, SharingLlama, train
from tests.model.families.test_lckv_llama import decoder_of
from torch.nn.functional import cross_entropy

from tightfit.errors import UsageError
from tightfit.kv.compose import compose

SPAN, USE, DONE = 60, 61, 62
KV = f"selfspan(span=#{SPAN},use=#{USE},done=#{DONE},tokens=32)"
NAMES, LENGTH, SPANS = 20, 3, 4  # names are tokens from 20 on; a span holds its mark, its name and three words
BODY = SPANS * (LENGTH + 2)


def texts(rows: int, generator: torch.Generator) -> torch.Tensor:
    """(rows, tokens): spans of words, then twice the name of one of them and its words."""
    words = torch.randint(1, WORDS + 1, (rows, SPANS, LENGTH), generator=generator)
    names = NAMES + torch.rand(rows, 10, generator=generator).argsort(1)[:, :SPANS]
    spans = torch.cat([torch.full((rows, SPANS, 1), SPAN), names[..., None], words], 2)
    parts = [spans.flatten(1)]
    for _ in range(2):
        which = torch.randint(SPANS, (rows,), generator=generator)
        chosen = torch.arange(rows), which
        marks = torch.full((rows, 1), USE), names[chosen][:, None], torch.full((rows, 1), DONE)
        parts += [*marks, words[chosen]]
    return torch.cat(parts, 1)


STEP = LENGTH + 3
AT = torch.tensor([BODY + 3 + step * STEP + word for step in range(2) for word in range(LENGTH)])


def nats(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Of the words of spans that were named."""
    return cross_entropy(logits[:, AT - 1].flatten(0, 1), ids[:, AT].flatten())


def named(ids: torch.Tensor) -> torch.Tensor:
    """Who sees whom: what is written after names sees the spans of these names and what follows them."""
    seen = torch.ones(*ids.shape, ids.shape[1], dtype=torch.bool)
    for row, tokens in enumerate(ids.tolist()):
        for step in range((len(tokens) - BODY + STEP - 1) // STEP):
            use = BODY + step * STEP
            for at in range(use + 2, min(use + STEP, len(tokens))):
                seen[row, at, :use] = False
                for start in range(0, BODY, LENGTH + 2):
                    if tokens[start + 1] == tokens[use + 1]:
                        seen[row, at, start : start + LENGTH + 2] = True
    return seen


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[SharingLlama, Tiny]:
    network = SharingLlama("0_1")
    network.allowed = named
    assert train(network, 220, texts, nats) < 0.3
    return network, decoder_of(network, tmp_path_factory.mktemp("selfspan"))


def right(tiny: Tiny, kv: str) -> tuple[float, float]:
    """The share of words that are found, and of tokens that are read for them."""
    found, read = [], []
    for text in texts(12, torch.Generator().manual_seed(5)).tolist():
        run = tiny.run(kv, chunk=64)
        logits = run.prefill(text[:BODY])
        for at in range(BODY, len(text)):
            if at in AT.tolist():
                found.append(int(logits.argmax()) == text[at])
                names = run.paged.store.reading.names if "selfspan" in kv else None  # type: ignore[union-attr]
                if names is not None:
                    read.append((int((names.listed[0] >= 0).sum()) + at - int(names.since[0])) / at)
            logits = run.decode(text[at])
    return sum(found) / len(found), sum(read) / max(len(read), 1)


def test_what_is_named_is_enough(model: tuple[SharingLlama, Tiny]) -> None:
    """And as much by any other choice is not."""
    words, read = right(model[1], KV)
    assert words > 0.9
    assert read < 0.45
    assert right(model[1], "quest(tokens=32,full=0)")[0] < 0.7
    assert right(model[1], "window(keep=10)")[0] < 0.7


def test_every_token_sees_what_it_saw_in_training(model: tuple[SharingLlama, Tiny]) -> None:
    network, tiny = model
    tokens = texts(1, torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(tokens)[0][0]
    [text] = tokens.tolist()
    for kv in (KV, f"{KV}+host(resident=32)"):
        run = tiny.run(kv, chunk=16)
        found = [run.prefill(text[:BODY]), *(run.decode(token) for token in text[BODY:])]
        torch.testing.assert_close(torch.stack(found), expected[BODY - 1 :], rtol=1e-4, atol=1e-4)


def test_where_too_much_is_named_everything_is_seen(model: tuple[SharingLlama, Tiny]) -> None:
    exact = model[1].run("none")
    run = model[1].run(KV)
    [text] = texts(1, torch.Generator().manual_seed(2)).tolist()
    beginning = [*range(1, 13)] * 3 + text[:BODY]  # 36 tokens before the first span
    for each in (exact, run):
        each.prefill(beginning)
    for token in text[BODY : BODY + STEP]:
        torch.testing.assert_close(run.decode(token), exact.decode(token), rtol=1e-4, atol=1e-4)


def test_what_it_does_not_go_with_is_refused() -> None:
    with pytest.raises(UsageError, match="may have been let go of"):
        compose("selfspan+h2o")
    with pytest.raises(UsageError, match="needs tokens"):
        compose("selfspan(use=|)")
