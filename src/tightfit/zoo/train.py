"""Trains a model of the zoo.

``python -m tightfit.zoo.train --preset nano --data DATA --out OUT --minutes 60`` reads what
:mod:`tightfit.zoo.corpus` wrote, and writes a Hugging Face folder. Ctrl-C saves and ends; a kill loses at most the time
between two saves. The same command again goes on from there.

Matrices are trained by Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), all else by AdamW. Some
rows are tasks that need looking up what was read (:mod:`tightfit.zoo.tasks`).
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from tightfit.errors import CheckpointError, TightfitError, UsageError
from tightfit.zoo import corpus, evaluate, tasks
from tightfit.zoo.network import CausalLM
from tightfit.zoo.presets import BOS, EOS, PAD, PRESETS, SPECIAL_TOKENS, Settings, preset

STATE = "training.pt"
PROGRESS = ("step", "tokens", "seconds", "loss")
VALIDATION_ROWS = 16
VALIDATION_QUESTIONS = 12


def optimizers(model: CausalLM, settings: Settings) -> list[torch.optim.Optimizer]:
    """Muon for the matrices between layers; AdamW for norms, for the embedding, whose rows are vectors of their own,
    and for routers, whose few rows Muon would force to be orthogonal."""
    if not hasattr(torch.optim, "Muon"):
        raise UsageError(f"torch {torch.__version__} has no Muon optimizer", "Training needs torch 2.9 or newer.")
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.dim() == 2 and not name.endswith(("embed_tokens.weight", "block_sparse_moe.gate.weight"))
        (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=settings.muon_lr, weight_decay=0.01, adjust_lr_fn="original"),
        torch.optim.AdamW(rest, lr=settings.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


class Run:
    """A training run: the model, its optimizers and how far it is. Batches depend on the seed and the step alone, so
    this is all that has to be saved for the run to go on as if it had not been interrupted."""

    def __init__(self, settings: Settings, data: corpus.Corpus, device: str) -> None:
        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError("torch finds no CUDA device here", "Train with --device cpu.")
        self.settings = settings
        self.device = device
        self.data = data
        self.material = tasks.Material(data.tokenizer, data.train)
        longest = max(length for _, length in settings.curriculum)
        if len(data.train) <= longest:
            raise UsageError(
                f"{len(data.train)} training tokens do not fill one row of {longest}", "Make a larger corpus."
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.model = CausalLM(settings.shape, data.tokenizer.get_vocab_size()).to(device)
        self.optimizers = optimizers(self.model, settings)
        self.step, self.tokens, self.seconds = 0, 0, 0.0
        self.loss = float("nan")  # nats per token, the mean of the last step

    @property
    def progress(self) -> float:
        """The share of the run that is done: of the minutes if they are the measure, else of the tokens."""
        if self.settings.minutes is not None:
            return self.seconds / (self.settings.minutes * 60)
        return self.tokens / self.settings.tokens

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, torch.bfloat16)

    def batch(self, length: int) -> Tensor:
        """The rows of this step, (rows, length + 1)."""
        rows = []
        for index in range(max(1, self.settings.batch_tokens // length)):
            rng = random.Random(f"{self.settings.seed}/{self.step}/{index}")
            if rng.random() < self.settings.task_share:
                rows.append(tasks.row(rng, self.material, length + 1))
            else:
                start = rng.randrange(len(self.data.train) - length)
                rows.append(self.data.train[start : start + length + 1].tolist())
        return torch.tensor(rows)

    def advance(self) -> None:
        """One optimizer step."""
        settings, progress = self.settings, self.progress
        length = settings.length(progress)
        rows = self.batch(length)
        self.model.zero_grad(set_to_none=True)
        self.loss = 0.0
        for part in torch.split(rows, max(1, settings.micro_tokens // length)):
            part, share = part.to(self.device), len(part) / len(rows)
            with self._autocast():
                logits, balance = self.model(part[:, :-1])
            loss = functional.cross_entropy(logits.float().flatten(0, 1), part[:, 1:].flatten())
            ((loss + settings.balance * balance) * share).backward()
            self.loss += loss.item() * share
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), settings.clip_norm)
        scale = settings.lr_scale(self.step, progress)
        for optimizer, rate in zip(self.optimizers, (settings.muon_lr, settings.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
        self.step += 1
        self.tokens += len(rows) * length

    def measure(self) -> dict[str, Any]:
        """How far the run is, its loss on held-out text, and how often it finds an entry of a dictionary, both at the
        length that is now trained on."""
        length = self.settings.length(self.progress)

        @torch.no_grad()
        def logits(ids: list[int]) -> Tensor:
            with self._autocast():
                scores: Tensor = self.model(torch.tensor([ids], device=self.device))[0][0]
            return scores

        val = self.data.val[: VALIDATION_ROWS * length].tolist()
        rows = [val[start : start + length] for start in range(0, len(val) - 1, length)]
        loss = evaluate.validation_loss(logits, self.data.tokenizer, rows)
        found = evaluate.lookup_accuracy(
            logits, self.material, "dictionary", int(length * 0.9), VALIDATION_QUESTIONS, self.settings.seed
        )
        return {
            "step": self.step,
            "tokens": self.tokens,
            "minutes": round(self.seconds / 60, 2),
            "length": length,
            "loss": round(self.loss, 4),
            "val_nats_per_token": round(loss.nats_per_token, 4),
            "val_bits_per_byte": round(loss.bits_per_byte, 4),
            "dictionary_correct": found.correct,
            "dictionary_asked": found.asked,
        }

    def _identity(self) -> str:
        """What has to be the same for a saved state to be a state of this run."""
        return json.dumps({"settings": asdict(self.settings), "corpus": asdict(self.data.counts)})

    def save(self, out: Path) -> None:
        """Writes the model and the state of the run. Each file is replaced only by a complete one."""
        self.model.save(out)
        self.data.tokenizer.save(str(out / "tokenizer.json"))
        write_tokenizer_config(out, self.settings.shape.max_position_embeddings)
        state = {
            "identity": self._identity(),
            **{name: getattr(self, name) for name in PROGRESS},
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, out / f"{STATE}.partial")
        os.replace(out / f"{STATE}.partial", out / STATE)

    def restore(self, out: Path) -> None:
        """Goes on from what :meth:`save` wrote. Raises CheckpointError for another run's state or a damaged one."""
        try:
            state = torch.load(out / STATE, map_location=self.device, weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise CheckpointError(
                f"{out / STATE} cannot be read: {error}", "Delete it to start again, or choose another --out."
            ) from error
        if state["identity"] != self._identity():
            raise CheckpointError(
                f"{out / STATE} is of a run with other settings or another corpus",
                "Repeat the command that made it, or choose another --out.",
            )
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens, self.seconds, self.loss = (state[name] for name in PROGRESS)


def write_tokenizer_config(out: Path, context: int) -> None:
    """The two small files that tell other programs how to use the tokenizer and how to generate."""
    tokenizer = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[EOS],
        "pad_token": SPECIAL_TOKENS[PAD],
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    generation = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD, "do_sample": False}
    (out / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=1) + "\n")
    (out / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n")


def train(
    settings: Settings,
    data: Path,
    out: Path,
    device: str = "cpu",
    save_every_s: float = 120.0,
    stopped: Callable[[], bool] = lambda: False,
    report: Callable[[dict[str, Any]], None] | None = None,
) -> Run:
    """Trains until the run is over or ``stopped()``, going on from ``out`` if a run was begun there.

    Saves into ``out`` every ``save_every_s`` seconds and at the end; a ``report`` is then given what
    :meth:`Run.measure` says. Raises UsageError for a corpus that cannot be trained on, and CheckpointError if ``out``
    holds another run.
    """
    run = Run(settings, corpus.read(data), device)
    if (out / STATE).exists():
        run.restore(out)

    mark = saved = time.monotonic()
    while run.progress < 1:
        run.advance()
        now = time.monotonic()
        run.seconds, mark = run.seconds + now - mark, now
        over = run.progress >= 1 or stopped()
        if over or now - saved >= save_every_s:
            run.save(out)
            if report is not None:
                report(run.measure())
            saved = time.monotonic()
        if over:
            break
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tightfit.zoo.train", description="Trains a model of the zoo.")
    parser.add_argument("--preset", required=True, help=f"what to train: {', '.join(PRESETS)}")
    parser.add_argument("--data", type=Path, required=True, help="folder that tightfit.zoo.corpus wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder for the model and the state of the run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="train for this long (default: the preset's number of tokens)")
    length.add_argument("--tokens", type=int, help="train on this many tokens")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--save-every", type=float, default=120.0, metavar="SECONDS")
    options = parser.parse_args(arguments)

    received: list[int] = []

    def stop(number: int, _frame: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one ends at once

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    try:
        settings = replace(preset(options.preset), minutes=options.minutes)
        if options.tokens is not None:
            settings = replace(settings, tokens=options.tokens)
        train(
            settings,
            options.data,
            options.out,
            device=options.device,
            save_every_s=options.save_every,
            stopped=lambda: bool(received),
            report=lambda line: print(json.dumps(line), flush=True),
        )
    except TightfitError as error:
        print(error, file=sys.stderr)
        return error.exit_status
    if received:
        print(f"Stopped and saved. The same command goes on from {options.out}.", file=sys.stderr)
        return 128 + received[0]
    return 0


if __name__ == "__main__":
    sys.exit(main())
