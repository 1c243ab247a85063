"""The child process of :mod:`tightfit.checkpoints.hub`: asks the hub, fills the cache, and answers in JSON.

Only the files that a model is opened from are downloaded, and nothing but small files where it could not be opened.
"""

from __future__ import annotations

import base64
import json
import struct
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url, snapshot_download
from huggingface_hub import constants as hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from tightfit.checkpoints import layout
from tightfit.checkpoints.safetensors_file import MAX_HEADER_BYTES
from tightfit.errors import CheckpointError

FIRST_BYTES = 100_000  # holds the header of nearly all files, in one request
CONNECTIONS = 8


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Fetch what ``request`` names; the result is what :func:`tightfit.checkpoints.hub.fetch` reads."""
    name, revision = request["name"], request["revision"]
    path = Path(snapshot_download(name, revision=revision, allow_patterns=list(layout.SMALL_FILES)))
    commit = path.name  # the cache names the folder of a snapshot after its commit
    try:
        sizes = _sizes(name, commit)
    except Exception as error:  # offline, or whatever the trouble is: the cache may hold all that is needed
        return {"path": str(path), "headers": {}, "unreachable": _first_line(error)}
    weights = layout.weight_files(sizes, name)
    if weights == [layout.INDEX]:
        weights = sorted(set(layout.read_index(path / layout.INDEX).values()))
    headers = {}
    if request["headers_only"]:
        remote = [file for file in weights if file in sizes and not (path / file).exists()]
        with ThreadPoolExecutor(CONNECTIONS) as pool:
            contents = pool.map(lambda file: _header(hf_hub_url(name, file, revision=commit)), remote)
            headers = {
                file: {"size": sizes[file], "content": base64.b64encode(content).decode()}
                for file, content in zip(remote, contents, strict=True)
            }
    else:
        snapshot_download(name, revision=commit, allow_patterns=weights)
    return {"path": str(path), "headers": headers, "unreachable": ""}


def _sizes(name: str, commit: str) -> dict[str, int]:
    """The files of the repository and their sizes in bytes."""
    files = HfApi().model_info(name, revision=commit, files_metadata=True).siblings or []
    return {file.rfilename: file.size or 0 for file in files}


def _header(url: str) -> bytes:
    """The beginning of the safetensors file at ``url``, up to the end of its header."""
    content = _range(url, 0, FIRST_BYTES)
    end = 8 + min(struct.unpack("<Q", content[:8].ljust(8, b"\0"))[0], MAX_HEADER_BYTES)
    if end > len(content) == FIRST_BYTES:
        content += _range(url, FIRST_BYTES, end)
    return content[:end]


def _range(url: str, start: int, stop: int) -> bytes:
    """The bytes [start, stop) of the file at ``url``, or fewer where it ends earlier."""
    response = get_session().get(url, headers={**build_hf_headers(), "Range": f"bytes={start}-{stop - 1}"})
    hf_raise_for_status(response)
    content: bytes = response.content
    return content[: stop - start]


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")


def explain(error: Exception, name: str, revision: str | None) -> tuple[str, str]:
    """The message and the hint for whatever went wrong."""
    if isinstance(error, CheckpointError):
        return error.message, error.hint
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: its owner gives access on request",
            f"Ask for it at {hub.ENDPOINT}/{name}, then log in (hf auth login) or set HF_TOKEN.",
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no folder '{name}', and the hub has no model of that name that you may see",
            "Check the spelling. For a private model log in (hf auth login) or set HF_TOKEN.",
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision '{revision}'", f"See its branches and tags at {hub.ENDPOINT}/{name}/tree/main."
    if isinstance(error, HFValidationError):
        return f"'{name}' is neither a folder nor a name of the hub", "Give a folder, or a name like org/model."
    if isinstance(error, LocalEntryNotFoundError):
        if hub.HF_HUB_OFFLINE:
            return (
                f"{name} is not in the cache ({hub.HF_HUB_CACHE}), and HF_HUB_OFFLINE forbids to download it",
                "Unset HF_HUB_OFFLINE to download it, or give a folder.",
            )
        return (
            f"{name} is not in the cache ({hub.HF_HUB_CACHE}), and {hub.ENDPOINT} cannot be reached: "
            f"{_first_line(error.__cause__ if isinstance(error.__cause__, Exception) else error)}",
            "Check the connection and the proxy, or give a folder.",
        )
    return f"{name} could not be fetched from {hub.ENDPOINT}: {_first_line(error)}", "Try again, or give a folder."


def main(run: Callable[[dict[str, Any]], dict[str, Any]] = answer) -> None:
    request = json.loads(sys.argv[1])
    try:
        result = run(request)
    except Exception as error:
        message, hint = explain(error, request["name"], request["revision"])
        result = {"error": message, "hint": hint}
    json.dump(result, sys.stdout)
