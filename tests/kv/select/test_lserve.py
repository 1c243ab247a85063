"""What lserve is for; each of these tests fails with another method in its place."""

from __future__ import annotations

import pytest
import torch
from tests.kv.driver import Layer
from tests.kv.test_methods import DIM, GROUPS, HEADS, KV_HEADS, LAYOUT, noise, unit

from tightfit.errors import UsageError
from tightfit.kernels.codec import PAGE
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known
from tightfit.kv.make import kv_nbytes

PROMPT = 300
KNOWN = Known(tensors={name: {"gates": torch.tensor([[1.0, 0.0]])} for name in ("lserve", "duo")})  # head 1 streams


def layer_of(kv: str, context: int = 512) -> Layer:
    return Layer(kv, LAYOUT, context, KNOWN)


def asking(direction: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token whose queries all look into one direction."""
    return (4 * direction).expand(1, HEADS, DIM).contiguous(), *noise(1)[1:]


def finds(layer: Layer, direction: torch.Tensor, value: torch.Tensor, head: int = 0) -> bool:
    """Whether one more token sees ``value`` (kv_heads, value_dim) above all."""
    out = layer.add(*asking(direction), decode=True)[0, head * GROUPS : (head + 1) * GROUPS]
    return bool((out - value[head]).abs().max() < 0.1 * value[head].abs().max())


def touched(layer: Layer, q: torch.Tensor) -> int:
    """How many pages of all heads a token reads: those that are not chosen are made unreadable."""
    assert layer.add(q, *noise(1)[1:], decode=True).isfinite().all()
    (selecting,), kept = layer.cache.store.selecting, layer.pages
    now = int(selecting.states.current[0])  # type: ignore[union-attr]
    count = 0
    for head in range(KV_HEADS):
        bounded, used = int(kept.bounded[0, head]), -(-(layer.length(head) + 1) // PAGE)
        chosen = selecting.chosen[0, now, head].tolist()  # type: ignore[union-attr]
        hidden = set(range(bounded)) - set(chosen)
        for page in hidden:
            kept.keys[0, int(kept.table[0, head, page])] = torch.nan
        count += used - len(hidden)
    assert layer.add(q, *noise(1)[1:], decode=True).isfinite().all()  # the same pages are read again
    return count


def test_pages_that_are_read_do_not_grow_with_the_context() -> None:
    counts = []
    for prompt in (320, 640, 1280):
        layer = layer_of("lserve(tokens=64,recent=92)", 1400)
        q, k, v = noise(prompt)
        for at in range(0, prompt, 64):
            layer.add(*(x[at : at + 64] for x in (q, k, v)))
        counts.append(touched(layer, q[:1]))
    # Two that are chosen and a new one, and of the head that streams those of 96 tokens and a new one.
    assert counts == [3 + 4] * 3


@pytest.mark.parametrize(
    ("kv", "found"),
    [("lserve(tokens=64,size=8,recent=44)", True)]
    + [(kv, False) for kv in ("lserve(tokens=64,size=32,recent=44)", "quest(tokens=64,full=0)")],
)
def test_bounds_of_parts_find_what_bounds_of_pages_hide(kv: str, found: bool) -> None:
    """In most pages two keys that the query does not look for allow together a score above the one that it does."""
    layer = layer_of(kv)
    q, k, v = noise(PROMPT)
    for page in range(6):
        apart = 10 * (unit(0) - unit(1))
        k[page * PAGE + 3], k[page * PAGE + 20] = apart, -apart
    k[6 * PAGE + 5] = 6 * (unit(0) + unit(1))
    layer.add(q, k, v)
    assert finds(layer, unit(0) + unit(1), v[6 * PAGE + 5]) == found


def test_heads_that_stream_choose_nothing() -> None:
    layer = layer_of("lserve(tokens=32,recent=44)")
    q, k, v = noise(PROMPT)
    k[70], k[PROMPT - 40] = 20 * unit(0), 20 * unit(1)
    layer.add(q, k, v)
    assert layer.cache.chosen(0) == [(288, 32), (0, 0)]
    assert finds(layer, unit(0), v[70], 0)
    layer = layer_of("lserve(tokens=32,recent=44)")
    layer.add(q, k, v)
    assert not finds(layer, unit(0), v[70], 1)
    assert finds(layer, unit(1), v[PROMPT - 40], 1)


@pytest.mark.parametrize(("every", "asked", "seen"), [(1, 1, 1), (4, 1, 4), (7, 9, 14), (7, 15, 20), (40, 1, 20)])
def test_a_choice_holds_for_some_tokens_and_until_others_are_certain(every: int, asked: int, seen: int) -> None:
    """Of pages 2 and 5 one is read; from token ``asked`` on the other one is looked for, and ``seen`` when pages are
    chosen anew: after so many tokens, or when the 20th makes the 320th certain."""
    layer = layer_of(f"lserve(tokens=32,recent=44,every={every})")
    q, k, v = noise(PROMPT)
    k[70], k[170] = 20 * unit(0), 20 * unit(1)
    layer.add(q, k, v)
    found = [finds(layer, unit(int(step >= asked)), v[170 if step >= asked else 70]) for step in range(22)]
    assert found == [step < asked or step >= seen for step in range(22)]


def test_a_prompt_that_goes_on_is_chosen_from_anew() -> None:
    layer = layer_of("lserve(tokens=32,recent=44,every=40)")
    q, k, v = noise(PROMPT)
    k[70], k[170] = 20 * unit(0), 20 * unit(1)
    layer.add(q, k, v)
    assert finds(layer, unit(0), v[70])
    assert not finds(layer, unit(1), v[170])
    layer.add(*noise(5))
    assert finds(layer, unit(1), v[170])


@pytest.mark.parametrize("size", [8, 16])
def test_bounds_are_kept_of_heads_that_keep_everything_alone(size: int) -> None:
    layouts = [LayerLayout(8, 128, 128, 0, heads=32)] * 4
    known = Known(tensors={name: {"gates": torch.rand(4, 8)} for name in ("lserve", "duo")})
    duo, lserve = (
        kv_nbytes(kv, layouts, 8192, 1, "bfloat16", known)
        for kv in ("duo(retrieval=0.5)", f"lserve(retrieval=0.5,size={size})")
    )
    bounds = 16 * (8192 // PAGE + 2) * (PAGE // size) * 2 * 128 * 2  # of half of the heads
    assert 0 <= lserve - duo - bounds <= 4 * 2 * 8 * 17 * 4 + 4 * 4096  # and what was chosen, in whole pages of memory


@pytest.mark.parametrize("other", ["quest", "kvsharer", "headinfer", "snapkv(keep=64)"])
def test_what_chooses_or_shares_in_its_place_is_refused(other: str) -> None:
    with pytest.raises(UsageError, match="lserve"):
        compose(f"lserve+{other}")


@pytest.mark.parametrize("settings", ["size=5", "size=64", "every=0", "tokens=16", "sample=100", "recent=0"])
def test_settings_that_mean_nothing_are_refused(settings: str) -> None:
    with pytest.raises(UsageError, match="lserve cannot"):
        compose(f"lserve({settings})")
