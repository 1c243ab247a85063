"""What weight formats lose: perplexity, KL divergence and look-ups of the embedded model, beside bits per weight.

    python benchmarks/formats.py [--out FILE.md] [--plot FILE.png] [--json] [--tokens 8192] [--questions 24]

Every format of the catalog is measured as it is and with other settings (``SWEEP``), with activations in int8 and in
float32. The text is the beginnings of files that the model was not trained on. Divergence is KL(exact || format) in
nats per token, the mean over all tokens; exact is the model in float32. Text is computed as generating does, token by
token, and for "prefill" as a prompt is. Look-ups are questions about numbers in the prompt, as in
zoo_card.py, and answers come from generating. The plot needs matplotlib: pip install 'tightfit[report]'.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks.common import command, commit, held_out, machine, table
from tokenizers import Tokenizer

from tightfit import zoo
from tightfit.api import Model
from tightfit.budget.ledger import Arena, Workspace
from tightfit.catalog import all_techniques, spec_string
from tightfit.engine.engine import Engine, use_threads
from tightfit.engine.generate import Generator
from tightfit.engine.opening import Wish, open_model, plan_for
from tightfit.engine.start import start
from tightfit.errors import UsageError
from tightfit.model.batch import Batch, Segment
from tightfit.zoo import evaluate
from tightfit.zoo.tasks import TASKS, Material

# One setting at a time, where a format has it and takes that value.
SWEEP: dict[str, tuple[object, ...]] = {
    "group": (0, 64, 128),
    "symmetric": (False,),
    "exponent": (4, 5),
    "keep": (0.75,),
    "ends": ("int8",),
    "down": ("int6",),
}
ACTIVATIONS = ("int8", "float32")
EXACT = "f32"
LEAST_SHOWN = 1e-6  # in the plot: below is rounding
WINDOW = 512  # tokens of each file
CHUNK = 128  # tokens computed at once
TASK, TASK_TOKENS = "dictionary", 400  # which the exact model always answers
BUDGET = "4GiB"
CONTEXT = 2 * max(WINDOW, TASK_TOKENS)
SCRATCH = 1 << 30  # address space


@dataclass(frozen=True)
class Losses:
    """Of one type of activations; divergences in nats per token."""

    perplexity: float
    divergence_decode: float
    divergence_prefill: float
    correct: int
    asked: int


@dataclass(frozen=True)
class Result:
    """``losses`` by type of activations."""

    weights: str
    bits_per_weight: float
    losses: dict[str, Losses]


@dataclass(frozen=True)
class Questions:
    prompts: list[str]
    answers: list[str]

    @staticmethod
    def of(material: Material, count: int) -> Questions:
        """The same questions every time."""
        rng = random.Random(0)
        examples = [TASKS[TASK](rng, material, TASK_TOKENS) for _ in range(count)]
        asked = [(example.context, next(example.questions)) for example in examples]
        return Questions([context + one.prompt for context, one in asked], [one.answer for _, one in asked])

    def answered(self, model: Model) -> int:
        """How many answers greedy decoding writes exactly, their end of line included."""
        correct = 0
        for prompt, answer in zip(self.prompts, self.answers, strict=True):
            tokens = len(model.tokenizer.encode(answer, add_special_tokens=False))
            correct += model.generate(prompt, max_new_tokens=tokens, temperature=0.0, ignore_eos=True).text == answer
        return correct


def specs(names: list[str]) -> list[str]:
    """The spec strings to measure, of the techniques ``names`` or of all."""
    found: dict[str, None] = {}
    for entry in all_techniques():
        if entry.seam != "weights" or (names and entry.name not in names):
            continue
        found[entry.name] = None
        for key, values in SWEEP.items():
            for value in values if key in entry.settings else ():
                try:
                    found[spec_string(entry.cls(**{key: value}))] = None
                except UsageError:
                    continue
    return list(found)


@contextmanager
def opened(weights: str, activations: str, threads: int) -> Iterator[tuple[Model, Engine]]:
    """The embedded model, and the engine that computes it."""
    wish = Wish(zoo.DEFAULT, BUDGET, CONTEXT, weights=weights, activations=activations, threads=threads)
    model = open_model(wish)
    with model.checkpoint:
        plan = plan_for(wish, model)
        requests = model.requests(plan.context)
        engine, ledger = start(model.checkpoint, model.spec, plan, lambda nbytes: None)
        yield Model(model.checkpoint, plan, requests, Generator(engine, requests.tokenizer), ledger), engine


@torch.inference_mode()
def chunks(engine: Engine, rows: list[list[int]], decode: bool) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens (n,), natural logarithms of the probabilities (n, vocabulary) that came before them) of ``rows``.

    The latter are in scratch memory, and valid until the next ones are asked for.
    """
    ws = Workspace(Arena(SCRATCH))
    for row in rows:
        for begin in range(0, len(row) - 1, CHUNK):
            following = row[begin + 1 : begin + 1 + CHUNK]
            segment = Segment(0, begin, row[begin : begin + len(following)], decode=decode, logits="all")
            batch = Batch((segment,))
            use_threads(batch, engine.threads, engine.cache.gemm_dtype)
            with ws.frame():
                logits = engine.decoder.logits(engine.decoder.hidden(batch, engine.cache, ws), ws)
                yield torch.tensor(following), logits.log_softmax(-1)


@dataclass(frozen=True)
class Text:
    """``rows`` of token ids, and for each of :func:`chunks` the exact log-probabilities."""

    rows: list[list[int]]
    exact: list[torch.Tensor]

    @staticmethod
    def of(rows: list[list[int]], threads: int) -> Text:
        with opened(EXACT, "float32", threads) as (_, engine):
            return Text(rows, [scores.clone() for _, scores in chunks(engine, rows, decode=True)])

    def losses(self, engine: Engine, decode: bool) -> tuple[float, float]:
        """Mean (cross-entropy, divergence from the exact model) in nats per token."""
        nats, divergence, tokens = 0.0, 0.0, 0
        for exact, (following, scores) in zip(self.exact, chunks(engine, self.rows, decode), strict=True):
            tokens += len(following)
            nats -= scores.gather(1, following[:, None]).double().sum().item()
            divergence += (exact.exp() * (exact - scores)).double().sum().item()
        return nats / tokens, divergence / tokens


def measure(weights: str, text: Text, asked: Questions, threads: int) -> Result:
    losses = {}
    for activations in ACTIVATIONS:
        with opened(weights, activations, threads) as (model, engine):
            bits = 8 * model.plan.accounts["weights"] / model.plan.model.parameters
            nats, decode = text.losses(engine, decode=True)
            _, prefill = text.losses(engine, decode=False)
            correct = asked.answered(model)
        losses[activations] = Losses(math.exp(nats), decode, prefill, correct, len(asked.prompts))
    return Result(weights, bits, losses)


def plot(results: list[Result], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.add_subplot()
    for place, name in enumerate(sorted({result.weights.partition("(")[0] for result in results})):
        found = [result for result in results if result.weights.partition("(")[0] == name]
        style = {"color": f"C{place % 10}", "marker": "os^Dvp*hX"[place % 9], "linestyle": "none"}
        for activations, more in (
            ("float32", {"label": name, "markersize": 4}),
            ("int8", {"fillstyle": "none", "markersize": 9}),
        ):
            points = [(result.bits_per_weight, result.losses[activations].divergence_decode) for result in found]
            lossy = [point for point in points if point[1] > LEAST_SHOWN]
            if lossy:
                axes.plot(*zip(*lossy, strict=True), **style, **more)
    axes.set_yscale("log")
    axes.set_xlabel("bits per weight")
    axes.set_ylabel("KL divergence from the exact model, nats per token")
    axes.set_title("What weight formats lose (filled: activations in float32, hollow: in int8)")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    figure.savefig(path, dpi=120)


def report(results: list[Result], rows: list[list[int]], threads: int, seconds: float) -> str:
    columns = ("weights", "bits per weight", "perplexity", "KL", "KL, float32 activations", "KL, prefill", "look-ups")
    lines = []
    for result in sorted(results, key=lambda result: (-result.bits_per_weight, result.weights)):
        losses = result.losses["int8"]
        cells = (
            f"`{result.weights}`",
            f"{result.bits_per_weight:.3f}",
            f"{losses.perplexity:.3f}",
            f"{losses.divergence_decode:.5f}",
            f"{result.losses['float32'].divergence_decode:.5f}",
            f"{losses.divergence_prefill:.5f}",
            f"{losses.correct} of {losses.asked}",
        )
        lines.append(cells)
    tokens = sum(len(row) - 1 for row in rows)
    return f"""# What weight formats lose

The embedded model on {tokens} tokens of {len(rows)} held-out files (the first {WINDOW} of each), and look-ups in
dictionaries of {TASK_TOKENS} tokens. Activations are rounded to int8 (the default) unless the column says otherwise. KL
divergence is from the model in float32, in nats per token, computed token by token as generating does, or as prompts
are (prefill); keys and values are in bfloat16 everywhere. Bits per weight are all bytes that the weights take, norms
included. A small model loses more than a large one in the same format.

{table(columns, lines)}

Machine: {machine(threads, "torch")} tightfit at {commit()}.
Command: `{command()}`, {seconds:.0f} s.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of text, at most")
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="techniques to measure (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print JSON instead of the table")
    parser.add_argument("--out", type=Path, help="write the table to a file")
    parser.add_argument("--plot", type=Path, help="write a plot, such as FILE.png or FILE.svg")
    arguments = parser.parse_args()
    if arguments.plot:
        try:
            import matplotlib  # noqa: F401
        except ModuleNotFoundError:
            raise SystemExit("the plot needs matplotlib: pip install 'tightfit[report]'") from None
    began = time.monotonic()
    texts, _ = held_out(zoo.path())
    tokenizer = Tokenizer.from_file(str(zoo.path() / "tokenizer.json"))
    rows = [next(evaluate.windows([text], tokenizer, WINDOW + 1)) for text in texts[: arguments.tokens // WINDOW]]
    asked = Questions.of(Material.of_text(tokenizer, "".join(texts)), arguments.questions)
    text = Text.of(rows, arguments.threads)
    results = []
    for weights in specs(arguments.only):
        results.append(measure(weights, text, asked, arguments.threads))
        print(f"{weights}: {results[-1].losses['int8'].divergence_decode:.5f}", file=sys.stderr)
    written = report(results, rows, arguments.threads, time.monotonic() - began)
    print(json.dumps([asdict(result) for result in results], indent=1) if arguments.json else written)
    if arguments.plot:
        written += f"\n![What formats lose beside their bits]({arguments.plot.name})\n"
    if arguments.out:
        arguments.out.write_text(written, encoding="utf-8")
    if arguments.plot:
        plot(results, arguments.plot)


if __name__ == "__main__":
    main()
