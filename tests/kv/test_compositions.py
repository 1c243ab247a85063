"""What every method must do that the slow reference does not define: with a file, with few bits, with drafts and from a
prompt cache it is the same method."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from tests.kv.driver import Run, Tiny
from tests.kv.settings import OTHERS, REFUSED, refused
from tests.kv.test_drafts import drafted

from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known

PROMPT, DECODED, CHUNK, CONTEXT = 150, 72, 48, 256
TOKEN_BY_TOKEN = ("anchor", "tim", "pod")  # what tokens see of a prompt is fixed, or layers look for each other
known: dict[str, Known] = {}


def run_of(tiny: Tiny, kv: str, tail: int = 1, sequences: int = 1, chunk: int = CHUNK) -> Run:
    fitted = "+".join(sorted(method.fitted_by() for method in compose(kv).fitted))
    if fitted not in known:
        known[fitted] = tiny.known(kv)
    return tiny.run(kv, context=CONTEXT, chunk=chunk, tail=tail, sequences=sequences, known=known[fitted])


def generated(tiny: Tiny, kv: str) -> tuple[list[int], torch.Tensor]:
    """Tokens after a prompt, and the logits after each and after the prompt."""
    run = run_of(tiny, kv)
    first = run.prefill(tiny.tokens(PROMPT))
    tokens, logits = run.generate(first, DECODED)
    return tokens, torch.stack([first, *logits])


def followed(tiny: Tiny, kv: str, tokens: list[int]) -> torch.Tensor:
    run = run_of(tiny, kv)
    return torch.stack([run.prefill(tiny.tokens(PROMPT)), *(run.decode(token) for token in tokens)])


def name(kv: str) -> str:
    return kv.partition("(")[0]


def pairs(other: str) -> list[str]:
    return [kv for kv in OTHERS if name(other) not in REFUSED.get(name(kv), ())]


@pytest.mark.parametrize("kv", OTHERS)
def test_what_it_does_not_go_with_is_listed(kv: str) -> None:
    for other in ("host", "int4", "int8"):
        assert refused(kv, other) == (other in REFUSED.get(name(kv), ()))


@pytest.mark.parametrize("kv", pairs("host"))
def test_in_a_file_it_is_the_same(tiny: Callable[..., Tiny], kv: str) -> None:
    small = tiny("llama")
    tokens, wanted = generated(small, kv)
    found = followed(small, f"{kv}+host(resident=32)", tokens)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("kv", [kv for kv in OTHERS if name(kv) not in TOKEN_BY_TOKEN])
def test_layer_by_layer_a_prompt_is_judged_as_one_chunk(tiny: Callable[..., Tiny], kv: str) -> None:
    small, logits = tiny("llama"), []
    for chunk, layered in ((PROMPT, False), (CHUNK, True)):
        run = run_of(small, kv, chunk=chunk)
        first = run.prefill(small.tokens(PROMPT), layered=layered)
        logits.append(torch.stack([first, *(run.decode(token) for token in range(5, 40))]))
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4 * float(logits[0].abs().max()))


@pytest.mark.parametrize("kv", pairs("int8"))
def test_in_eight_bits_it_is_nearly_the_same(tiny: Callable[..., Tiny], kv: str) -> None:
    small = tiny("llama")
    tokens, wanted = generated(small, kv)
    found = followed(small, f"{kv}+int8(recent=16)", tokens)
    apart = (found - wanted).abs().amax(1)
    assert not torch.equal(found, wanted)
    assert float(apart.median()) < 0.02 * float(wanted.abs().max())


@pytest.mark.parametrize("kv", OTHERS)
@pytest.mark.parametrize("kind", ["chain", "tree"])
def test_drafts_leave_the_same_bits_as_plain_decoding(tiny: Callable[..., Tiny], kv: str, kind: str) -> None:
    small = tiny("llama")
    plain, verified = (run_of(small, kv, tail) for tail in (1, 6))
    first, same = (run.prefill(small.tokens(PROMPT)) for run in (plain, verified))
    assert torch.equal(first, same)
    expected, expected_logits = plain.generate(first, DECODED)
    found, found_logits = drafted(verified, first, expected, kind, 0.6, random.Random(kv).randrange(1000))
    assert found == expected
    for a, b in zip(found_logits, expected_logits, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kv", OTHERS)
def test_what_is_saved_goes_on_with_the_same_bits(tiny: Callable[..., Tiny], kv: str) -> None:
    small, parts = tiny("llama"), []
    tokens = small.tokens(2 * CHUNK + 30)
    run, again = run_of(small, kv), run_of(small, kv)
    run.prefill(tokens[: 2 * CHUNK])
    run.cache.save(0, 0, 2 * CHUNK, lambda part: parts.append(part.clone()))
    largest = run.cache.largest_entry(CHUNK if run.cache.whole_entries else 2 * CHUNK)
    assert sum(part.nbytes for part in parts) == run.cache.entry_nbytes(0, 0, 2 * CHUNK) <= largest
    saved = iter(parts)
    again.prefill(small.tokens(70, seed=5))  # of another prompt, of which nothing may be left
    again.cache.restore(0, 0, 2 * CHUNK, lambda part: part.copy_(next(saved)))  # type: ignore[arg-type,return-value]
    again.lengths[0] = 2 * CHUNK
    results = [each.generate(each.prefill(tokens[2 * CHUNK :]), 40) for each in (run, again)]
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kv", OTHERS)
def test_two_sequences_do_not_touch_each_other(tiny: Callable[..., Tiny], kv: str) -> None:
    small = tiny("llama")
    _, wanted = generated(small, kv)
    both = run_of(small, kv, sequences=2)
    both.prefill(small.tokens(90, seed=6), 1)
    first = both.prefill(small.tokens(PROMPT), 0)
    _, logits = both.generate(first, DECODED, 0)
    assert torch.equal(torch.stack([first, *logits]), wanted)
