"""Measures what rounding costs a model: KL divergence by layer and format, and by method of the cache.

A text goes through the model once. Before each layer, the hidden states that reach it exactly also go through the layer
as each format would store it, and what comes out goes through all later layers as they are: so one pass over the
weights, in their order, gives every layer in every format, from memory or from the disk. Where there is no room for so
many hidden states there are several passes.
"""

from __future__ import annotations

import argparse
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch

from tightfit import zoo
from tightfit.budget.ledger import PAGE, Arena, Ledger, Workspace, align
from tightfit.budget.units import format_bytes
from tightfit.checkpoints.checkpoint import Checkpoint
from tightfit.engine.engine import Engine, use_threads
from tightfit.engine.opening import Opened, Wish, plan_here
from tightfit.engine.start import start
from tightfit.errors import BudgetError, CheckpointError, UsageError
from tightfit.kernels import cpu, ops
from tightfit.kv.compose import EXACT
from tightfit.model.batch import Batch, Segment
from tightfit.model.spec import ModelSpec
from tightfit.plan.schema import OWN, Plan
from tightfit.plan.search import LEVELS, SMALL_CACHE
from tightfit.plan.sensitivity import OUTER, Sensitivity, canonical, layer_group, write_sensitivity
from tightfit.weights.placement.base import Parameters, layer_parameters
from tightfit.weights.placement.fill import fill, scratch_bytes
from tightfit.weights.placement.places import EMBEDDINGS, HEAD, group_of, layer_name
from tightfit.weights.placement.resident import parameter
from tightfit.zoo import corpus

ROW = 128  # tokens that are computed together, from the first position on
TOKENS = 256
PROMPT, FOLLOWING = 1024, 32  # tokens of the text that caches are measured with
KEPT = (512, 256, 128)
CACHES = ("int8", "int4", *(SMALL_CACHE.format(keep) for keep in KEPT))
CHARACTERS, BEGINNING = 1 << 15, 1 << 11  # of a text that are used, and of each file
SHARE = 4  # of the budget, for hidden states, unless less is enough
LOGITS = 8 << 20  # bytes of logits that are compared at once, at least
MARGIN = 4 << 20  # what comparing takes beside the ledger's memory, once

Progress = Callable[[int, int], None]
Variant = tuple[str, str]  # (group, format)


def calibration_text() -> str:
    """Text to measure with where none is given: beginnings of files that are installed here and that the embedded model
    was not trained on, or of Python's own library."""
    found, _ = corpus.held_out(zoo.path())
    beginnings = [text[:BEGINNING] for _, text in islice(found, CHARACTERS // BEGINNING)]
    return "".join(beginnings) or inspect.getsource(argparse)


def measure_sensitivity(
    wish: Wish,
    opened: Opened,
    text: str,
    formats: Sequence[str] = LEVELS[1:],
    tokens: int = TOKENS,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measures a model with ``text`` inside the budget, and keeps what was found: ``file``, ``tokens``, ``weights`` and
    ``cache`` as of :class:`~tightfit.plan.sensitivity.Sensitivity`, ``peak_rss_bytes``.

    Raises UsageError for a text that is too short, CheckpointError for a compressed model, BudgetError with the
    smallest budget that works.
    """
    checkpoint = opened.checkpoint
    if checkpoint.compressed is not None:
        raise CheckpointError(
            f"{checkpoint.name} is compressed: all of it is in {checkpoint.compressed.weights}",
            f"Measure the model that it was made from: {checkpoint.compressed.source}.",
        )
    if opened.spec.shares:
        raise UsageError(
            f"layers of {checkpoint.name} read what others keep, and are measured one after the other",
            "Plans for it go by what other models showed: nothing has to be measured.",
        )
    ids = checkpoint.tokenizer().encode(text[:CHARACTERS])
    row = min(ROW, opened.spec.context)
    rows = [ids[start : start + row] for start in range(0, min(tokens, len(ids)) - row + 1, row)]
    if not rows:
        raise UsageError(f"the text has {len(ids)} tokens", f"Give one of {row} or more: {tokens} are used.")
    wanted = [canonical(fmt) for fmt in formats]
    wish = replace(wish, weights=OWN, kv=EXACT, chunk=row)
    weights = _measure_weights(wish, opened, rows, wanted, progress)
    cache = _measure_caches(wish, opened, ids, progress)
    found = Sensitivity(weights, cache, measured=True, tokens=row * len(rows))
    file = write_sensitivity(checkpoint.fingerprint, found)
    return {"file": str(file), "tokens": found.tokens, "weights": weights, "cache": cache}


@contextmanager
def _started(wish: Wish, opened: Opened, reserved: int, context: int) -> Iterator[tuple[Engine, Ledger, Plan]]:
    """An engine in what ``reserved`` bytes leave of the budget."""
    try:
        plan = plan_here(wish, replace(opened, budget=max(opened.budget - reserved, 0), context=context))
    except BudgetError as error:
        smallest = None if error.smallest_bytes is None else error.smallest_bytes + reserved
        needed = "" if smallest is None else f" The smallest budget that works is {format_bytes(smallest, ceil=True)}."
        raise BudgetError(
            f"{opened.checkpoint.name} cannot be measured inside {format_bytes(opened.budget)}",
            f"Beside the model {format_bytes(reserved)} are taken.{needed}",
            smallest_bytes=smallest,
        ) from error
    engine, ledger = start(opened.checkpoint, opened.spec, plan.model_copy(update={"budget": opened.budget}))
    try:
        yield engine, ledger, plan
    finally:
        engine.decoder.weights.close()
        engine.cache.close()
        ledger.release()


def _measure_weights(
    wish: Wish, opened: Opened, rows: list[list[int]], formats: list[str], progress: Progress
) -> dict[str, dict[str, float]]:
    checkpoint, spec = opened.checkpoint, opened.spec
    threads = wish.threads or cpu.threads()
    groups = [group_of(checkpoint, spec, name, fmt) for name in _names(spec) for fmt in formats]
    largest = max(group.nbytes for group in groups)
    converting = max(scratch_bytes(checkpoint, group, threads) for group in groups) + MARGIN
    hidden = align(4 * sum(map(len, rows)) * spec.hidden_size)
    variants = [(group, fmt) for group in _groups(spec) for fmt in formats]
    compared = 4 * spec.vocab_size * (len(variants) + 3)
    least, most = 2 * hidden + 4 * 4 * spec.vocab_size, (len(variants) + 1) * hidden + max(compared, LOGITS)
    fixed = align(largest, PAGE) + converting
    reserved = fixed + align(max(least, min(most, opened.budget // SHARE - fixed)), PAGE)
    with _started(wish, opened, reserved, len(rows[0])) as (engine, ledger, plan):
        ledger.reserve("workspace", converting)
        room = Workspace(
            ledger.arena("workspace", (ledger.free if plan.streamed else reserved - converting) // PAGE * PAGE)
        )
        with room.frame():
            memory = room.empty(largest, dtype=torch.uint8)
            return Measuring(opened.checkpoint, engine, plan, rows, memory, room).run(variants, progress)


def _names(spec: ModelSpec) -> list[str]:
    return [EMBEDDINGS, *(layer_name(index) for index in range(len(spec.layers))), HEAD]


def _groups(spec: ModelSpec) -> list[str]:
    return [OUTER, *(layer_group(index) for index in range(len(spec.layers)))]


@dataclass
class Measuring:
    """One text, computed exactly and in variants. ``memory`` holds a group of matrices in another format, ``room``
    hidden states and logits."""

    checkpoint: Checkpoint
    engine: Engine
    plan: Plan
    rows: list[list[int]]
    memory: torch.Tensor
    room: Workspace
    done: int = 0  # layers and heads, of all passes

    @property
    def spec(self) -> ModelSpec:
        return self.engine.decoder.spec

    @torch.inference_mode()
    def run(self, variants: list[Variant], progress: Progress) -> dict[str, dict[str, float]]:
        """Nats per token of each variant, by group and format."""
        hidden = align(4 * sum(map(len, self.rows)) * self.spec.hidden_size)
        free = self.room.arena.capacity - self.room.top - hidden
        compared = 4 * self.spec.vocab_size * (len(variants) + 3)
        at_once = max((free - min(max(compared, LOGITS), free // 4)) // hidden, 1)
        found: dict[str, dict[str, float]] = {group: {} for group in _groups(self.spec)}
        passes = [variants[start : start + at_once] for start in range(0, len(variants), at_once)]
        total = len(passes) * (len(self.spec.layers) + 1)
        for part in passes:
            with self.room.frame():
                nats = self._pass(part, lambda: progress(self.done, total))
            for (group, fmt), value in zip(part, nats, strict=True):
                found[group][fmt] = value
        return found

    def _pass(self, variants: list[Variant], progress: Callable[[], None]) -> list[float]:
        """One pass over the weights."""
        decoder, spec = self.engine.decoder, self.spec
        tokens = sum(map(len, self.rows))
        x = self.room.empty(1 + len(variants), tokens, spec.hidden_size)
        decoder.weights.begin(logits=True)
        self._embed(decoder.weights.model["embed_tokens"], x[0])
        for place, (group, fmt) in enumerate(variants, 1):
            if group == OUTER:
                self._embed(self._stored(EMBEDDINGS, fmt)["embed_tokens"], x[place])
        for index in range(len(spec.layers)):
            here = layer_group(index)
            with decoder.weights.layer(index) as exact:
                for place, (group, fmt) in enumerate(variants, 1):
                    if group == here:
                        x[place].copy_(x[0])
                        self._layer(index, self._stored(layer_name(index), fmt), x[place])
                    elif self._begun(group, index):
                        self._layer(index, exact, x[place])
                self._layer(index, exact, x[0])
            self.done += 1
            progress()
        for rows in x:
            ops.rms_norm(rows, decoder.weights.model["norm"], spec.rms_norm_eps, rows)
        found = self._divergences(variants, x)
        self.done += 1
        progress()
        return found

    @staticmethod
    def _begun(group: str, index: int) -> bool:
        """Whether what reaches layer ``index`` is not exact any more."""
        return group == OUTER or int(group.rpartition(".")[2]) < index

    def _stored(self, name: str, fmt: str) -> Parameters:
        """The parameters of a group as ``fmt`` stores them, made from the checkpoint; valid until the next ones are."""
        group = group_of(self.checkpoint, self.spec, name, fmt)
        data = self.memory[: group.nbytes]
        for _ in fill(self.checkpoint, [(group, data)], self.plan.threads):
            pass
        gemm, activations = self.engine.cache.gemm_dtype, self.plan.numerics.activations
        return layer_parameters(
            {each.param.name: parameter(each, each.of(data), gemm, activations) for each in group.places}
        )

    def _embed(self, matrix: Any, x: torch.Tensor) -> None:
        tokens = torch.tensor([token for row in self.rows for token in row])
        matrix.decode(tokens, x, self.engine.ws)
        if self.spec.embedding_multiplier != 1.0:
            ops.scale_(x, self.spec.embedding_multiplier)

    def _layer(self, index: int, parameters: Parameters, x: torch.Tensor) -> None:
        """All rows of the text through a layer, as prompts are computed."""
        engine, at = self.engine, 0
        for row in self.rows:
            segment = Segment(0, 0, row, length=len(row))
            batch = Batch((segment,))
            use_threads(batch, engine.threads, engine.cache.gemm_dtype)
            engine.cache.begin(0, 0)
            with engine.cache.whole(index, segment, engine.ws):
                engine.decoder.layer(index, parameters, x[at : at + len(row)], batch, engine.cache, engine.ws)
            at += len(row)

    def _divergences(self, variants: list[Variant], x: torch.Tensor) -> list[float]:
        """Of hidden states (1 + variants, tokens, hidden), the exact ones first: the mean over tokens."""
        head = self.engine.decoder.weights.model["embed_tokens" if self.spec.tied else "lm_head"]
        exact_head = [place for place, (group, _) in enumerate(variants, 1) if group != OUTER]
        nats = self._compare(x, exact_head, head)
        for place, (group, fmt) in enumerate(variants, 1):
            if group == OUTER:
                name, param = (EMBEDDINGS, "embed_tokens") if self.spec.tied else (HEAD, "lm_head")
                nats |= self._compare(x, [place], head, self._stored(name, fmt)[param])
        return [nats[place] for place in range(1, len(variants) + 1)]

    def _compare(self, x: torch.Tensor, places: list[int], head: Any, other: Any = None) -> dict[int, float]:
        """Nats per token of the hidden states at ``places``, with the head ``other`` where that is given. As many
        logits are made at once as there is room for: of several tokens, or of some of the places."""
        tokens, vocab = x.shape[1], self.spec.vocab_size
        free = (self.room.arena.capacity - self.room.top) // (4 * (vocab + self.spec.hidden_size)) - 2
        rows = max(min(free, self.engine.chunk), 2)
        nats = dict.fromkeys(places, 0.0)
        for begin in range(0, len(places), rows - 1):
            part = places[begin : begin + rows - 1]
            for token in range(0, tokens, step := max(rows // (len(part) + 1), 1)):
                with self.room.frame():
                    chosen = x[[0, *part], token : token + step]
                    logits = self.room.empty(*chosen.shape[:2], vocab)
                    if other is None:
                        self._logits(head, chosen, logits)
                    else:
                        self._logits(head, chosen[:1], logits[:1])
                        self._logits(other, chosen[1:], logits[1:])
                    lost = divergences(logits[0], logits[1:], self.room.empty(chosen.shape[1], vocab))
                for place, value in zip(part, lost.sum(-1).tolist(), strict=True):
                    nats[place] += value / tokens
        return nats

    def _logits(self, head: Any, hidden: torch.Tensor, out: torch.Tensor) -> None:
        ws = self.engine.ws
        with ws.frame():
            self.engine.decoder.product(head, hidden.flatten(0, 1), out.view(-1, out.shape[-1]), ws)


def divergences(exact: torch.Tensor, others: torch.Tensor, scratch: torch.Tensor) -> torch.Tensor:
    """KL(exact || other) in nats (others, rows) of logits (rows, vocab) and (others, rows, vocab), which are used as
    scratch, and so is ``scratch`` (rows, vocab).

    With d = other - exact, about its mean under the exact probabilities p, that is log(sum p exp(d)) - sum p d: small
    differences are not lost in large sums.
    """
    others.sub_(exact)
    exact.sub_(exact.amax(dim=-1, keepdim=True)).exp_()
    exact.div_(exact.sum(dim=-1, keepdim=True))
    lost = []
    for difference in others:
        torch.mul(exact, difference, out=scratch)
        difference.sub_(scratch.sum(dim=-1, keepdim=True))
        torch.mul(exact, difference, out=scratch)
        mean = scratch.sum(dim=-1)  # what rounding left of it
        torch.mul(exact, difference.expm1_(), out=scratch)
        lost.append((scratch.sum(dim=-1).log1p() - mean).clamp_(min=0.0))
    return torch.stack(lost)


@torch.inference_mode()
def _measure_caches(wish: Wish, opened: Opened, ids: list[int], progress: Progress) -> dict[str, float]:
    """Nats per token of what follows a prompt, in each cache."""
    length = min(PROMPT, len(ids) - FOLLOWING, opened.spec.context - FOLLOWING)
    prompt, following = ids[:length], ids[length : length + FOLLOWING]
    candidates = [kv for kv, keep in zip(CACHES, (0, 0, *KEPT), strict=True) if keep < length]
    rows = Arena(4 * len(following) * opened.spec.vocab_size)
    exact = rows.view(0, (len(following), opened.spec.vocab_size), torch.float32)
    found: dict[str, float] = {}
    try:
        for done, kv in enumerate((EXACT, *candidates)):
            reserved = rows.capacity + 2 * 4 * opened.spec.vocab_size + MARGIN
            try:
                with _started(replace(wish, kv=kv), opened, reserved, length + len(following)) as (engine, _, _):
                    for row, logits in zip(exact, engine.follow(prompt, following[:-1]), strict=True):
                        if kv == EXACT:
                            row.copy_(logits)
                        else:
                            lost = divergences(row.clone()[None], logits[None, None], torch.empty(1, len(row)))
                            found[kv] = found.get(kv, 0.0) + float(lost) / len(following)
            except UsageError:  # the model has no use for these methods
                continue
            progress(done + 1, len(candidates) + 1)
    finally:
        rows.release()
    return found
