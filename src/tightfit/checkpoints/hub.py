"""Models of the Hugging Face hub, by name: fetched by a child process.

huggingface_hub, its HTTP client and its transfer buffers take memory that would count in the budget of this process
and never come back, so they live and end in a child (:mod:`tightfit.checkpoints.download`).
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tightfit import child
from tightfit.errors import CheckpointError


@dataclass(frozen=True)
class RemoteHeader:
    """The beginning of a safetensors file on the hub, up to the end of its header, and the file's ``size`` in bytes."""

    size: int
    content: bytes


@dataclass(frozen=True)
class Snapshot:
    """A model in the cache: its folder, the headers of weights that were not downloaded, and, where the hub did not
    answer and the folder is what the cache has, the reason.
    """

    path: Path
    headers: dict[str, RemoteHeader]
    unreachable: str


def fetch(name: str, revision: str | None, headers_only: bool) -> Snapshot:
    """Bring the model ``name`` (``org/name``) into huggingface_hub's cache; ``headers_only`` leaves its weights where
    they are. HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE and their like are respected.

    Raises CheckpointError where the model does not exist, needs permission, or cannot be reached and is not cached.
    """
    request = json.dumps({"name": name, "revision": revision, "headers_only": headers_only})
    environment = child.environment()
    if not sys.stderr.isatty():
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    done = subprocess.run(
        child.command("from tightfit.checkpoints.download import main; main()", request),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment,
    )
    if done.returncode != 0:
        raise CheckpointError(
            f"the download of {name} ended with exit status {done.returncode}", "Its last messages are above."
        )
    answer = json.loads(done.stdout)
    if "error" in answer:
        raise CheckpointError(answer["error"], answer["hint"])
    headers = {
        file: RemoteHeader(header["size"], base64.b64decode(header["content"]))
        for file, header in answer["headers"].items()
    }
    return Snapshot(Path(answer["path"]), headers, answer["unreachable"])
