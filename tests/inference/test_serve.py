"""The server as its clients see it: over HTTP, with pictures that are good, bad, huge and many at once."""

from __future__ import annotations

import io
import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from raydistill.errors import ConfigError
from raydistill.inference.command import serve_command
from raydistill.inference.predict import Predictor
from tests.stages.conftest import CLASSES, painted

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(label: int, seed: int = 0, form: str = "PNG") -> bytes:
    sink = io.BytesIO()
    painted(label, np.random.default_rng(seed), 50).save(sink, form)
    return sink.getvalue()


def ask(url: str, data: bytes | None = None) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data=data), timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture
def server(exported) -> Iterator[tuple[str, str]]:
    """The address of one in a process of its own, and the exported folder."""
    result, _ = exported(formats=["onnx"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "raydistill", "serve", result.path, "--port", str(port), "--max-megabytes", "0.05"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    for _ in range(600):
        assert process.poll() is None, process.stdout.read()
        try:
            ask(f"{url}/health")
            break
        except OSError:
            time.sleep(0.1)
    yield url, result.path
    process.terminate()
    process.wait(timeout=30)


def test_answers_are_those_of_predict_whatever_comes_at_once(server):
    url, folder = server
    pictures = [picture(k % 3, seed=k, form="JPEG" if k % 2 else "PNG") for k in range(24)]
    predictor = Predictor(folder)
    with ThreadPoolExecutor(12) as pool:
        replies = list(pool.map(lambda data: ask(f"{url}/predict?top=0", data), pictures))
    for data, (status, said) in zip(pictures, replies, strict=True):
        assert status == 200
        expected = predictor.probabilities(predictor.working_image(data)[None])[0]
        found = {one["class"]: one["probability"] for one in said["classes"]}
        np.testing.assert_allclose([found[name] for name in CLASSES], expected, atol=1e-5)
        assert said["class"] == CLASSES[int(expected.argmax())]
        assert said["number"] == said["classes"][0]["number"] == int(expected.argmax())
        assert all(CLASSES[one["number"]] == one["class"] for one in said["classes"])
    assert ask(f"{url}/health")[1]["classes"] == list(CLASSES)
    with urllib.request.urlopen(url) as page:
        assert "Drop a picture here" in page.read().decode()
    status, said = ask(f"{url}/predict", b"<html>no picture</html>")
    assert (status, said["error"]) == (422, "not an image")
    status, said = ask(f"{url}/predict", b"\0" * 60_000)
    assert status == 413
    assert "50,000 bytes" in said["error"]
    assert ask(f"{url}/predict?top=many", pictures[0])[0] == 400
    assert ask(f"{url}/predict", pictures[0])[0] == 200  # none of that took it down


def test_a_port_in_use_is_refused(exported):
    result, _ = exported(formats=["onnx"])
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another --port"):
            serve_command(result.path, "onnx", "127.0.0.1", taken.getsockname()[1], 10**6, 0.0)
