"""A push to a hub that speaks huggingface.co's protocol: the files that arrive are those that ship, to the byte."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from raydistill.errors import StageError
from raydistill.stages.export import push_to_hub
from tests.processes import serving

TOKEN = "hf_" + "x" * 34


class Hub(ThreadingHTTPServer):
    """Takes what `create_repo` and `create_commit` send: small files in the commit, large ones as LFS objects."""

    def __init__(self) -> None:
        self.repositories: dict[str, str] = {}  # with their visibility
        self.objects: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        super().__init__(("127.0.0.1", 0), _Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: bytes) -> Any:
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            self.repositories.setdefault(name, asked["visibility"])
            return {"url": f"{self.url}/{name}"}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            large = (".safetensors", ".onnx", ".pt2")
            modes = {f["path"]: "lfs" if f["path"].endswith(large) else "regular" for f in files}
            return {"files": [{"path": p, "uploadMode": mode, "shouldIgnore": False} for p, mode in modes.items()]}
        if path.endswith("/info/lfs/objects/batch"):
            wanted = json.loads(body)["objects"]
            actions = {o["oid"]: {"upload": {"href": f"{self.url}/lfs/{o['oid']}"}} for o in wanted}
            return {"transfer": "basic", "objects": [{**o, "actions": actions[o["oid"]]} for o in wanted]}
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.files[value["path"]] = self.objects[value["oid"]]
            (name,) = self.repositories
            return {"success": True, "commitOid": "0" * 40, "commitUrl": f"{self.url}/{name}/commit/{'0' * 40}"}
        return None


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def _reply(self, answer: Any, status: int = 200) -> None:
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._reply({"error": "Invalid username or password."}, 401)
            return
        answer = self.server.answer(self.path.partition("?")[0], body)
        self._reply({"error": "unknown"} if answer is None else answer, 404 if answer is None else 200)

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        self.server.objects[self.path.rpartition("/")[2]] = self.rfile.read(length)
        self._reply({})

    def log_message(self, *message: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch) -> Iterator[Hub]:
    server = Hub()
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", server.url)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own for large files
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with serving(server):
        yield server


def shipped(folder: str) -> dict[str, bytes]:
    own = {"DONE", "identity.json", "seconds.json"}
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name not in own]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_what_ships_arrives_to_the_byte_in_a_private_repository(hub: Hub, exported: Callable[..., Any]) -> None:
    result, _ = exported(formats=["onnx"])
    push_to_hub(result.path, "somebody/my-student")
    assert hub.repositories == {"somebody/my-student": "private"}
    assert hub.files == shipped(result.path)
    assert {"model.safetensors", "config.json", "model.onnx", "raydistill.json", "README.md"} <= hub.files.keys()
    assert hub.objects, "weights went as large files do"


def test_a_push_that_is_refused_says_what_to_do_and_where_the_folder_is(hub: Hub, tmp_path, monkeypatch) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(
        StageError, match=r"export\.hub=somebody/x: the upload failed \(.*401.*hf auth login"
    ) as refused:
        push_to_hub(str(tmp_path), "somebody/x")
    assert str(tmp_path) in str(refused.value)
    assert not hub.files
