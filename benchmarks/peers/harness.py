"""What the scripts of this folder share: their arguments, their prompts, and what they print.

Each script measures one runtime in a process of its own, with the Python that has it:

    PYTHON benchmarks/peers/run_openvino.py MODEL [--prompt 512] [--new 128] [--batch 1] [--repeat 1] [--warm 512] ...

It generates once to warm up, then ``--repeat`` times, each time with other random prompts so that no cache of prompts
helps, and prints one line of JSON:

- ``first_token_at``: when the warm-up had its first token, the first of the process, in seconds since the epoch
- ``runs``: for each repetition ``prefill_s`` (until every prompt has its first token) and ``total_s``

Several prompts at once may have no time of a first token; it is null then. With ``--describe`` nothing is loaded, and
what is printed is ``bytes_per_token`` (the weights that are read for a token: all but the embeddings, of which that is
one row) and ``versions``.

Only the standard library is needed here: this runs in the peers' environments.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

Prompts = list[list[int]]


@dataclass
class Runtime:
    """A loaded model. ``generate(prompts, new)`` gives every prompt ``new`` tokens, greedily and without regard to end
    tokens, and returns the seconds until each prompt had its first token, or None where that is not known."""

    generate: Callable[[Prompts, int], float | None]
    vocab: int


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The command line, with the arguments that all scripts have."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of each prompt")
    parser.add_argument("--new", type=int, default=128, help="tokens after the first one")
    parser.add_argument("--batch", type=int, default=1, help="prompts generated at once")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--warm", type=int, default=512, help="tokens of the warm-up's prompts, which get 2 new ones")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--describe", action="store_true", help="load nothing; say what would be measured")
    return parser.parse_args()


def describe(bytes_per_token: int, *packages: str) -> None:
    versions = {name: version(name) for name in packages}
    print(json.dumps({"bytes_per_token": bytes_per_token, "versions": versions}))


def measure(runtime: Runtime, arguments: argparse.Namespace) -> None:
    """Warms up, measures, and prints the result."""
    rng = random.Random(0)

    def prompts(tokens: int) -> Prompts:
        return [[rng.randrange(5, runtime.vocab - 5) for _ in range(tokens)] for _ in range(arguments.batch)]

    asked = prompts(arguments.warm)
    began = time.time()
    first = runtime.generate(asked, 2)
    runs = []
    for _ in range(arguments.repeat):
        asked = prompts(arguments.prompt)
        start = time.perf_counter()
        prefill = runtime.generate(asked, arguments.new + 1)
        runs.append({"prefill_s": prefill, "total_s": time.perf_counter() - start})
    print(json.dumps({"first_token_at": None if first is None else began + first, "runs": runs}))
