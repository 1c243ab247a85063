"""Makers of small model folders, whole and damaged, and a hub on this machine."""

from __future__ import annotations

import json
import struct
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
from safetensors.numpy import save_file

CONFIG = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "bos_token_id": 1, "eos_token_id": 2}


def safetensors_bytes(header: dict[str, Any] | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with exactly this header, true or not."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content) if length is None else length) + content + data


def tensors(count: int = 4) -> dict[str, np.ndarray]:
    return {f"layers.{i}.weight": np.arange(6 + i, dtype=np.float32).reshape(-1, 1) + i for i in range(count)}


@pytest.fixture
def raw() -> Callable[..., bytes]:
    return safetensors_bytes


@pytest.fixture
def make_model(tmp_path: Path) -> Callable[..., Path]:
    """A folder with config.json and ``shards`` safetensors files (and an index, if there are several)."""

    def make(name: str = "model", shards: int = 1, config: dict[str, Any] = CONFIG) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        everything = tensors()
        if shards == 1:
            save_file(everything, folder / "model.safetensors", metadata={"format": "pt"})
            return folder
        weight_map = {}
        for shard in range(shards):
            file = f"model-{shard + 1:05d}-of-{shards:05d}.safetensors"
            part = {name: value for i, (name, value) in enumerate(everything.items()) if i % shards == shard}
            save_file(part, folder / file)
            weight_map.update(dict.fromkeys(part, file))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
        return folder

    return make


class FakeHub:
    """The part of the hub's HTTP interface that opening a model uses; counts the weight bytes that it served."""

    commit = "0123456789abcdef0123456789abcdef01234567"

    def __init__(self) -> None:
        self.models: dict[str, Path] = {}
        self.gated: set[str] = set()
        self.served: dict[str, int] = {}
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                status, headers, body = hub.respond(unquote(urlsplit(self.path).path), self.headers.get("Range"))
                self.send_response(status)
                for key, value in headers.items():
                    self.send_header(key, value)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if self.command == "GET":
                    name = self.path.rsplit("/", 1)[-1]
                    hub.served[name] = hub.served.get(name, 0) + len(body)
                    self.wfile.write(body)

            def log_message(self, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def respond(self, path: str, wanted: str | None) -> tuple[int, dict[str, str], bytes]:
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        name = "/".join(parts[2:4] if api else parts[:2])
        rest = parts[4:] if api else parts[2:]
        if name not in self.models:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if len(rest) > 1 and rest[1] not in ("main", self.commit):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        files = {file.name: file.read_bytes() for file in sorted(self.models[name].iterdir())}
        if api and rest[:1] == ["tree"]:
            listing = [{"type": "file", "path": f, "size": len(c), "oid": f"oid-{f}"} for f, c in files.items()]
            return 200, {"Content-Type": "application/json"}, json.dumps(listing).encode()
        if api:
            siblings = [{"rfilename": f, "size": len(c), "blobId": f"oid-{f}"} for f, c in files.items()]
            info = {"id": name, "modelId": name, "sha": self.commit, "siblings": siblings, "tags": []}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if name in self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if rest[2] not in files:
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        headers = {"ETag": f'"etag-{rest[2]}"', "X-Repo-Commit": self.commit, "Accept-Ranges": "bytes"}
        content = files[rest[2]]
        if wanted:
            start, stop = (int(bound) for bound in wanted.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {start}-{min(stop, len(content) - 1)}/{len(content)}"
            return 206, headers, content[start : stop + 1]
        return 200, headers, content


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub, and a cache of its own under ``tmp_path / "hf"``."""
    fake = FakeHub()
    for variable in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HTTP_PROXY", "http_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_ENDPOINT", fake.url)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
