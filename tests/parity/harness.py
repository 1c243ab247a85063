"""Parity with transformers: a tiny random model, computed along every path by both, must give the same logits.

A family's test makes a model with transformers, randomises it, saves it, and calls :func:`check_all_paths`. Then
:func:`check_edits` takes one feature after the other out of our decoder: each must be missed, else the test above
would not have noticed that it is wrong.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from tightfit.budget.ledger import Arena, Workspace
from tightfit.checkpoints.checkpoint import open_checkpoint
from tightfit.checkpoints.config import Config
from tightfit.kernels import ops
from tightfit.kv.cache import Cache
from tightfit.model.batch import Batch, Segment
from tightfit.model.decoder import Decoder, cache_layouts
from tightfit.model.families import model_spec
from tightfit.model.spec import LayerSpec, ModelSpec, Param
from tightfit.plan.schema import OWN
from tightfit.weights.placement.read import check
from tightfit.weights.placement.resident import Resident

TOLERANCE = 1e-4  # of the largest logit: float32 sums in another order
MISSED = 1e-3  # of the largest logit: ten times what two right computations may differ by
ROOM = 1 << 34  # address space of an arena, resident only where it is written

Edit = Callable[[ModelSpec], ModelSpec]


def make(config: PreTrainedConfig, seed: int = 0, auto: Any = AutoModelForCausalLM) -> PreTrainedModel:
    """A random float32 model of ``config`` with eager attention."""
    model = auto.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    randomise(model, seed)
    return model


@torch.no_grad()
def randomise(model: PreTrainedModel, seed: int, gain: float = 1.5) -> None:
    """Fills every parameter and every saved buffer: matrices so that outputs are ``gain`` times as large as inputs,
    vectors (norms, biases, sinks, router corrections) around one half with both signs."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():  # a tied matrix comes twice, which does no harm
        if tensor.dim() == 1:
            tensor.normal_(0.5, 0.7, generator=generator)
        else:
            tensor.normal_(0.0, gain / tensor.shape[-1] ** 0.5, generator=generator)


def save(model: PreTrainedModel, folder: Path, **config: Any) -> Path:
    """Saves as transformers does, then sets keys of config.json; a value of None takes the key out."""
    model.save_pretrained(folder)
    if config:
        path = folder / "config.json"
        values = json.loads(path.read_text()) | config
        path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return folder


class Ours:
    """A saved model in our decoder, in the checkpoint's own precision or another format, with a cache for ``sequences``
    sequences."""

    def __init__(
        self,
        folder: Path,
        *,
        context: int,
        chunk: int,
        sequences: int = 1,
        edit: Edit = lambda spec: spec,
        weights: str = OWN,
    ) -> None:
        checkpoint = open_checkpoint(str(folder))
        spec = model_spec(Config(checkpoint.config, checkpoint.name), checkpoint.tensors)
        check(checkpoint, spec)
        self.spec = edit(spec)
        formats = dict.fromkeys(range(len(self.spec.layers)), weights)
        placement = Resident(checkpoint, self.spec, weights, formats, torch.float32, Arena(ROOM))
        placement.load()
        checkpoint.close()
        self.decoder = Decoder(self.spec, placement)
        self.cache = Cache(cache_layouts(self.spec, context, chunk), sequences, torch.float32, Arena(ROOM))

    @torch.inference_mode()
    def step(self, *segments: Segment, ws: Workspace | None = None) -> list[torch.Tensor]:
        """The logits (n, vocab) of each segment, in the order given. A dry run must foresee the scratch, which is new
        in each step if none is given."""
        batch = Batch.of(segments)
        foreseen, ws = Workspace(Arena(ROOM)), ws or Workspace(Arena(ROOM))
        ws.high_water = 0
        with ops.dry(), foreseen.frame():
            self.decoder.logits(self.decoder.hidden(batch, self.cache, foreseen), foreseen)
        with ws.frame():
            logits = self.decoder.logits(self.decoder.hidden(batch, self.cache, ws), ws).clone()
        assert ws.high_water <= foreseen.high_water
        counts = {"none": lambda s: 0, "last": lambda s: 1, "all": lambda s: len(s.tokens)}
        parts = logits.split([counts[segment.logits](segment) for segment in batch.segments])
        by_segment = {id(segment): part for segment, part in zip(batch.segments, parts, strict=True)}
        return [by_segment[id(segment)] for segment in segments]

    def sequence(self, tokens: Sequence[int], stops: Sequence[int], slot: int = 0) -> torch.Tensor:
        """Logits of all ``tokens``, given in pieces that end at ``stops``; pieces of one token are decoded."""
        pieces = []
        for start, stop in zip([0, *stops], stops, strict=False):
            piece = Segment(slot, start, tokens[start:stop], decode=stop - start == 1, logits="all")
            pieces.extend(self.step(piece))
        return torch.cat(pieces)


@torch.no_grad()
def theirs(model: PreTrainedModel, tokens: Sequence[int], stops: Sequence[int]) -> torch.Tensor:
    """Logits (tokens, vocab) from transformers, given in pieces that end at ``stops``, with its cache."""
    model = copy.deepcopy(model)  # dynamic rope keeps the frequencies of the longest sequence that it saw
    cache, pieces = None, []
    for start, stop in zip([0, *stops], stops, strict=False):
        output = model(torch.tensor([tokens[start:stop]]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        pieces.append(output.logits[0])
    return torch.cat(pieces)


@torch.no_grad()
def theirs_ragged(model: PreTrainedModel, rows: Sequence[Sequence[int]], decoded: int) -> list[torch.Tensor]:
    """Logits of each row from one batch of transformers, padded on the left: a prefill, then ``decoded`` steps."""
    model = copy.deepcopy(model)
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    cache, pieces = None, []
    for start, stop in [(0, longest - decoded), *((at, at + 1) for at in range(longest - decoded, longest))]:
        output = model(
            ids[:, start:stop],
            attention_mask=mask[:, :stop],
            position_ids=positions[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        )
        cache = output.past_key_values
        pieces.append(output.logits)
    logits = torch.cat(pieces, dim=1)
    return [logits[index, longest - len(row) :] for index, row in enumerate(rows)]


def ours_ragged(ours: Ours, rows: Sequence[Sequence[int]], decoded: int) -> list[torch.Tensor]:
    """Logits of each row from our batches of all rows: a prefill, then ``decoded`` steps."""
    prompts = [Segment(slot, 0, row[:-decoded], logits="all") for slot, row in enumerate(rows)]
    answers = [[logits] for logits in ours.step(*prompts)]
    for left in range(decoded, 0, -1):
        at = [len(row) - left for row in rows]
        news = [Segment(slot, at[slot], [row[at[slot]]], decode=True) for slot, row in enumerate(rows)]
        for answer, logits in zip(answers, ours.step(*news), strict=True):
            answer.append(logits)
    return [torch.cat(answer) for answer in answers]


def difference(ours: torch.Tensor, reference: torch.Tensor) -> float:
    """The largest difference as a share of the largest logit."""
    return float((ours - reference).abs().max() / reference.abs().max())


def tokens_of(model: PreTrainedModel, length: int, seed: int = 1) -> list[int]:
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_all_paths(
    model: PreTrainedModel, folder: Path, *, length: int = 70, chunk: int = 16, decoded: int = 6, ragged: str = "batch"
) -> None:
    """Asserts parity along four paths: one prefill, prefill in chunks, decoding token by token, and a ragged batch
    that is prefilled and then decodes.

    ``ragged="alone"`` compares the ragged batch with transformers on each sequence alone, for models in which a
    sequence's logits depend there on the longest one of its batch.
    """
    tokens = tokens_of(model, length)
    paths = {
        "whole": [length],
        "chunks": [*range(chunk, length, chunk), length],
        "decode": [chunk, *range(chunk + 1, length + 1)],
    }
    for name, stops in paths.items():
        reference = theirs(model, tokens, stops)
        assert reference.std() >= 1.0, f"logits have a standard deviation of {reference.std():.2g}"
        ours = Ours(folder, context=length, chunk=max(stops[0], 1))
        found = difference(ours.sequence(tokens, stops), reference)
        assert found < TOLERANCE, f"{name}: {found:.2e} of the largest logit"

    rows = [tokens, tokens[: length // 3], tokens[5 : 5 + 2 * length // 3]]
    if ragged == "alone":
        references = [theirs(model, row, range(len(row) - decoded, len(row) + 1)) for row in rows]
    else:
        references = theirs_ragged(model, rows, decoded)
    ours = Ours(folder, context=length, chunk=length, sequences=len(rows))
    for answer, reference in zip(ours_ragged(ours, rows, decoded), references, strict=True):
        found = difference(answer, reference)
        assert found < TOLERANCE, f"ragged batch: {found:.2e} of the largest logit"


def check_edits(model: PreTrainedModel, folder: Path, edits: Mapping[str, Edit], *, length: int = 70) -> None:
    """Asserts that each of ``edits``, which takes a feature out of our decoder or alters it, breaks parity."""
    tokens = tokens_of(model, length)
    reference = theirs(model, tokens, [length])
    spec = Ours(folder, context=length, chunk=length).spec
    for name, edit in edits.items():
        ours = Ours(folder, context=length, chunk=length, edit=edit)
        assert ours.spec != spec, f"'{name}' changes nothing"
        found = difference(ours.sequence(tokens, [length]), reference)
        assert found > MISSED, f"'{name}' changes logits by only {found:.2e} of the largest"


def edit_layers(change: Callable[[LayerSpec], LayerSpec]) -> Edit:
    """Applies ``change`` to every layer."""
    return lambda spec: replace(spec, layers=tuple(change(layer) for layer in spec.layers))


def edit_attention(**changes: Any) -> Edit:
    """Replaces fields of every layer's attention."""
    return edit_layers(lambda layer: replace(layer, attention=replace(layer.attention, **changes)))


def edit_mlp(**changes: Any) -> Edit:
    """Replaces fields of every layer's feed-forward part that has them."""

    def change(layer: LayerSpec) -> LayerSpec:
        has = all(hasattr(layer.mlp, name) for name in changes)
        return replace(layer, mlp=replace(layer.mlp, **changes)) if has else layer

    return edit_layers(change)


def edit_rope(**changes: Any) -> Edit:
    """Replaces fields of the rotary settings of every layer that has them."""

    def change(layer: LayerSpec) -> LayerSpec:
        rope = layer.attention.rope
        if rope is None:
            return layer
        rope = replace(rope, parameters=replace(rope.parameters, **changes))
        return replace(layer, attention=replace(layer.attention, rope=rope))

    return edit_layers(change)


def edit_model(**changes: Any) -> Edit:
    """Replaces fields of the model."""
    return lambda spec: replace(spec, **changes)


def without(*names: str) -> Edit:
    """Takes parameters out of every layer: biases, norms, sinks."""
    return edit_layers(
        lambda layer: replace(layer, params=tuple(param for param in layer.params if param.name not in names))
    )


def edit_param(*names: str, **changes: Any) -> Edit:
    """Replaces fields of the parameters ``names``, in the layers and around them."""

    def change(params: tuple[Param, ...]) -> tuple[Param, ...]:
        return tuple(replace(param, **changes) if param.name in names else param for param in params)

    def edit(spec: ModelSpec) -> ModelSpec:
        layers = tuple(replace(layer, params=change(layer.params)) for layer in spec.layers)
        return replace(spec, layers=layers, params=change(spec.params))

    return edit
