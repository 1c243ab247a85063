"""Layers of a group look at distant tokens by the keys and weights of the first one, keep values of their own, and no
keys; where they look alike nothing is lost; groups are found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from tests.kv.driver import SIZES, Run, Tiny, choose
from tests.parity.harness import ROOM, make, save
from transformers import LlamaConfig

from tightfit.budget.ledger import ALIGNMENT, Arena, Workspace
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.errors import UsageError
from tightfit.kernels import ops
from tightfit.kernels.attention import Scoring
from tightfit.kernels.codec import PAGE, Codec
from tightfit.kv.base import LayerLayout
from tightfit.kv.compose import compose
from tightfit.kv.fitted import Known
from tightfit.kv.paged import PagedCache
from tightfit.kv.share.pod import PoD
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder
from tightfit.model.families import model_spec
from tightfit.plan.schema import OWN
from tightfit.weights.placement.resident import Resident

POD = "pod(keep=40,sinks=3)"
PROMPT, DECODED, CHUNK = 110, 40, 32
LAYOUT = LayerLayout(2, 24, 20, 0, heads=6)


def known(*leads: Sequence[int]) -> Known:
    """Of each layer, which one's keys each head uses."""
    return Known(tensors={"pod": {f"leads.{layer}": torch.tensor(each) for layer, each in enumerate(leads)}})


class Layers:
    """A few layers alone, and one sequence: each token is given as queries, keys and values of every layer."""

    def __init__(self, kv: str, known: Known, layers: int = 4, context: int = 256) -> None:
        self.arena, self.ws = Arena(ROOM), Workspace(Arena(ROOM))
        layouts = [LAYOUT] * layers
        self.cache = PagedCache(layouts, compose(kv), context, 1, torch.float32, self.arena, known=known)
        self.start = 0

    def add(self, tokens: Sequence[tuple[torch.Tensor, ...]], decode: bool = False) -> list[torch.Tensor]:
        """Attention (n, heads, value_dim) of each layer, of as many tokens."""
        count, outs = len(tokens[0][0]), []
        batch = Batch((Segment(0, self.start, [0] * count, decode),))
        if not decode:
            self.cache.begin(0, self.start)
        with self.ws.frame(), self.cache.through(batch, self.ws):
            for layer, (q, k, v) in enumerate(tokens):
                out = torch.empty(count, LAYOUT.heads, LAYOUT.value_dim)
                held = self.cache.update(layer, batch, q.clone(), k, v, None, self.ws)
                self.cache.attend_step(layer, batch, held, q, out, self.ws, Scoring(LAYOUT.key_dim**-0.5))
                outs.append(out)
        if decode:
            self.cache.commit(0, [0], self.ws)
        else:
            self.cache.prefilled(0, self.start, self.start + count)
        self.start += count
        return outs

    def near(self, layer: int) -> list[int]:
        """The positions that a layer keeps whole."""
        kept = self.cache.layers[layer]
        assert kept.positions is not None
        return kept.positions[0, 0, : int(kept.lengths[0, 0])].tolist()


def random_tokens(layers: int, count: int) -> list[tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    shapes = (LAYOUT.heads, LAYOUT.key_dim), (LAYOUT.kv_heads, LAYOUT.key_dim), (LAYOUT.kv_heads, LAYOUT.value_dim)
    return [tuple(torch.randn(count, *shape) for shape in shapes) for _ in range(layers)]


def parts(tokens: Sequence[tuple[torch.Tensor, ...]], start: int, stop: int) -> list[tuple[torch.Tensor, ...]]:
    return [tuple(x[start:stop] for x in each) for each in tokens]


def attention(
    own: Sequence[torch.Tensor], lead: Sequence[torch.Tensor], at: int, distant: list[int], head: int
) -> torch.Tensor:
    """What the token ``at`` sees with a query head: of tokens that are distant by the scores of ``lead``."""
    group = head // (LAYOUT.heads // LAYOUT.kv_heads)
    scores, by_lead = (k[: at + 1, group] @ q[at, head] / math.sqrt(LAYOUT.key_dim) for q, k, _ in (own, lead))
    scores[distant] = by_lead[distant]
    return scores.softmax(0) @ own[2][: at + 1, group]


LEADS = [
    [[0, 0], [0, 0], [0, 0], [0, 0]],
    [[0, 0], [0, 1], [0, 1], [3, 1]],  # heads have groups of their own, which overlap
    [[0, 0], [1, 0], [1, 2], [1, 2]],
    [[0, 0], [1, 1], [2, 2], [3, 3]],
]


@pytest.mark.parametrize("leads", LEADS)
def test_distant_weights_are_those_of_the_first_layer(leads: list[list[int]]) -> None:
    """Layers whose keys have nothing to do with each other: in prompts and decoding, in one softmax with what is
    near."""
    total = PROMPT + DECODED
    layers, tokens = Layers(POD, known(*leads)), random_tokens(4, total)
    seen_distant = 0
    starts = [*range(0, PROMPT, CHUNK), *range(PROMPT, total)]
    for start, stop in zip(starts, [*starts[1:], total], strict=True):
        decode = start >= PROMPT
        near = layers.near(0) if start else []
        assert all(layers.near(layer) == near for layer in range(4 if start else 0))
        distant = sorted(set(range(start)) - set(near))
        seen_distant += len(distant)
        outs = layers.add(parts(tokens, start, stop), decode)
        for layer, out in enumerate(outs):
            for head in (0, 4):
                lead = tokens[leads[layer][head // 3]]
                wanted = attention(tokens[layer], lead, start, distant, head)
                torch.testing.assert_close(out[0, head], wanted, rtol=1e-4, atol=1e-5)
    assert seen_distant > total


def test_layers_that_look_alike_lose_nothing() -> None:
    tokens = random_tokens(4, PROMPT + DECODED)
    tokens = [(tokens[0][0], tokens[0][1], v) for _, _, v in tokens]
    found = []
    for kv, of_model in ((POD, known(*LEADS[0])), ("window(keep=256,positions=original)", Known())):
        layers = Layers(kv, of_model)
        outs = [layers.add(parts(tokens, a, min(a + CHUNK, PROMPT))) for a in range(0, PROMPT, CHUNK)]
        outs += [layers.add(parts(tokens, a, a + 1), decode=True) for a in range(PROMPT, PROMPT + DECODED)]
        found.append(torch.cat([torch.stack(each) for each in outs], 1))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kv", [POD, f"{POD}+int4(recent=0)", f"{POD}+int8(recent=0,of=values)"])
@pytest.mark.parametrize("leads", LEADS)
def test_layers_that_follow_keep_no_distant_keys(kv: str, leads: list[list[int]]) -> None:
    """What is reserved beside that of a window: of each group keys once, and values of all its layers."""
    context, keep = 256, 40
    near = f"window(keep={keep},sinks=3,positions=original)" + kv.removeprefix(POD)
    layers = Layers(kv, known(*leads), context=context)
    window, wanted = Layers(near, Known(), context=context), 0
    bits = (4, 4) if "int4" in kv else (32, 8) if "int8" in kv else (32, 32)
    groups = PoD(keep=keep, sinks=3).groups([LAYOUT] * 4, known(*leads))
    assert sum(len(group.layers) * len(group.heads) for group in groups) == 4 * LAYOUT.kv_heads
    for group in groups:
        count, dims = len(group.heads), (LAYOUT.key_dim, len(group.layers) * LAYOUT.value_dim)
        whole = count * (context - keep) // PAGE
        lists = [count * -(-(context - keep) // PAGE), *[count] * 4, 1 + count, 1 + whole]
        dense = [count * PAGE * dim for dim in dims]
        coded = [
            whole * Codec(width, dim, of_keys).page_bytes
            for width, dim, of_keys in zip(bits, dims, (True, False), strict=True)
        ]
        wanted += sum(-(-nbytes // ALIGNMENT) * ALIGNMENT for nbytes in (*(4 * n for n in lists + dense), *coded))
    assert layers.arena.used - window.arena.used == pytest.approx(wanted, abs=ALIGNMENT)


def tied(folder: Path, alike: Callable[[int, int], int]) -> Tiny:
    """A model of which each head of a layer has the queries and keys of the same head of layer ``alike(layer, head)``.
    All but the last layer add nothing, so that equal matrices are equal attention."""
    theirs = make(LlamaConfig(**SIZES | {"num_hidden_layers": 4}, head_dim=8), 0)
    layers = theirs.model.layers
    with torch.no_grad():
        for index, layer in enumerate(layers):
            layer.input_layernorm.weight.copy_(layers[0].input_layernorm.weight)
            for head in range(2):
                source = layers[alike(index, head)].self_attn
                for name, rows in (("q_proj", 24), ("k_proj", 8)):
                    of_head = slice(head * rows, (head + 1) * rows)
                    matrix = getattr(layer.self_attn, name).weight
                    matrix[of_head] = getattr(source, name).weight[of_head]
            if index < len(layers) - 1:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
    checkpoint = open_checkpoint(str(save(theirs, folder)))
    spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
    placement = Resident(checkpoint, spec, OWN, dict.fromkeys(range(len(spec.layers)), OWN), torch.float32, Arena(ROOM))
    placement.load()
    checkpoint.close()
    return Tiny(theirs, spec, Decoder(spec, placement), torch.float32)


def logits_of(run: Run, tokens: Sequence[int], follow: Sequence[int]) -> torch.Tensor:
    return torch.stack([run.prefill(tokens), *(run.decode(token) for token in follow)])


def test_groups_that_are_there_are_found_and_lose_nothing(tmp_path: Path) -> None:
    leads = [[0, 0], [0, 1], [2, 1], [2, 1]]
    model = tied(tmp_path, lambda layer, head: leads[layer][head])
    for kv in ("pod(keep=40,sinks=3,similar=0.999)", "pod(keep=40,sinks=3,similar=0.999)+host(resident=0)"):
        of_model = model.known(kv)
        assert [of_model.tensors["pod"][f"leads.{layer}"].tolist() for layer in range(4)] == leads
        tokens, follow = model.tokens(150), model.tokens(40, seed=2)
        run, exact = model.run(kv, known=of_model), model.run("none")
        found, wanted = logits_of(run, tokens, follow), logits_of(exact, tokens, follow)
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("model", ["llama", "sliding"])
def test_groups_of_one_layer_are_the_exact_cache(tiny: Callable[..., Tiny], model: str) -> None:
    small = tiny(model)
    run = small.run(POD, context=256, chunk=48, known=known([0, 0], [1, 1], [2, 2]))
    exact = small.run("none", context=256, chunk=48)
    found, wanted = (each.prefill(small.tokens(150)) for each in (run, exact))
    for position in range(150, 200):
        assert torch.allclose(found, wanted, atol=2e-5 * float(wanted.abs().max()))
        token = choose(wanted, position)
        found, wanted = run.decode(token), exact.decode(token)


def test_a_layer_that_looks_elsewhere_joins_only_where_that_is_allowed(tiny: Callable[..., Tiny]) -> None:
    found = tiny("llama").findings("pod(keep=40,sinks=3,similar=0.9)").report
    assert found["leads"] == [[0, 0], [1, 1], [2, 2]]
    assert tiny("llama").findings("pod(keep=40,sinks=3,similar=0)").report["leads"] == [[0, 0]] * 3
    sliding = tiny("sliding").findings("pod(keep=20,sinks=3,similar=0)").report  # windows between, which are not joined
    assert sliding["leads"] == [[0, 0], [1, 1], [2, 2]]


def test_a_dry_run_takes_the_scratch_of_the_worst_step(tiny: Callable[..., Tiny]) -> None:
    model, of_model = tiny("llama"), known([0, 0], [0, 0], [0, 2])
    real, dry = (model.run(f"{POD}+int4", context=256, chunk=48, known=of_model) for _ in range(2))
    logits = real.prefill(model.tokens(150))
    real.generate(logits, 72)
    with ops.dry():
        dry.prefill(model.tokens(48))
        dry.decode(0)
    assert real.ws.high_water <= dry.ws.high_water


@pytest.mark.parametrize("other", ["quest", "gear", "cq", "kvsharer", "gqa", "less", "tailor", "h2o", "think"])
def test_what_it_does_not_go_with_is_named(other: str) -> None:
    with pytest.raises(UsageError, match=other):
        compose(f"pod+{other}")


def test_layers_are_not_computed_one_after_the_other(tiny: Callable[..., Tiny]) -> None:
    run = tiny("llama").run(POD, known=known([0, 0], [0, 0], [0, 0]))
    with pytest.raises(UsageError, match="chunk by chunk"):
        run.prefill(run.tiny.tokens(50), layered=True)


def test_a_context_without_distant_tokens_is_refused(tiny: Callable[..., Tiny]) -> None:
    with pytest.raises(UsageError, match="distant"):
        tiny("llama").findings("pod(keep=500)")
