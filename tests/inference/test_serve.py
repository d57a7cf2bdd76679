"""The server as its clients see it: over HTTP, with pictures that are good, bad, huge and many at once."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import jsonschema
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from raydistill.errors import ConfigError
from raydistill.inference.predict import Predictor
from raydistill.inference.serve import make_app
from raydistill.inference.sockets import ServeSettings, addresses, check_name, listen, own_names
from tests.data.test_decode import blank_png
from tests.small_run import CLASSES, painted

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = ServeSettings(10**7, 10**6, 0.0)


def picture(label: int, seed: int = 0, form: str = "PNG") -> bytes:
    sink = io.BytesIO()
    painted(label, np.random.default_rng(seed), 50).save(sink, form)
    return sink.getvalue()


def ask(url: str, data: bytes | None = None, method: str | None = None, **headers: str) -> tuple[int, dict]:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, data, named, method=method), timeout=60) as reply:
            return reply.status, json.loads(reply.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


@pytest.fixture
def server(exported) -> Iterator[tuple[str, str, subprocess.Popen]]:
    """The address of one in a process of its own, the exported folder, and the process."""
    result, _ = exported(formats=["onnx"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [sys.executable, "-m", "raydistill", "serve", result.path, "--port", str(port), "--max-megabytes", "0.05"]
    words += ["--max-megapixels", "1"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    url = f"http://127.0.0.1:{port}"
    assert any(url in line for line in iter(process.stdout.readline, ""))  # it listens now
    yield url, result.path, process
    process.terminate()
    process.wait(timeout=30)


def test_answers_are_those_of_predict_whatever_comes_at_once(server):
    url, folder, _ = server
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
    assert (status, said["error"]) == (422, "not an image: it is a web page or another text")
    status, said = ask(f"{url}/predict", b"\0" * 60_000)
    assert status == 413
    assert "50,000 bytes" in said["error"]
    assert ask(f"{url}/predict?top=many", pictures[0])[0] == 400
    assert ask(f"{url}/predict", pictures[0])[0] == 200  # none of that took it down


def form(name: str, data: bytes, more: str = "") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"%s\r\n\r\n%s\r\n--b--\r\n' % (
        name.encode(), more.encode(), data,
    )  # fmt: skip


def test_what_clients_of_other_servers_send_is_understood_or_explained(server):
    url, _, process = server
    data = picture(1)
    expected = ask(f"{url}/predict", data)[1]
    text = base64.b64encode(data).decode()
    is_form = "multipart/form-data; boundary=b"
    for body, kind in (
        (data, "image/png"),
        (data, "application/octet-stream"),
        (form("file", data, '; filename="x.png"'), is_form),
        (form("upload", data, '; filename="y"\r\nContent-Type: image/png'), is_form),
        (form("image", text.encode()), is_form),
        (form("image", text.encode()), f'{is_form}; charset="UTF-8"'),
        (json.dumps({"image": text}).encode(), "application/json"),
        (json.dumps({"image": f"data:image/png;base64,{text}"}).encode(), "application/json; charset=utf-8"),
        (json.dumps({"inputs": text.rstrip("=")}).encode(), "application/x-www-form-urlencoded"),  # curl's, if not told
        (urllib.parse.urlencode({"top": 1, "image": text}).encode(), "application/x-www-form-urlencoded"),
        (b"image=" + text.encode(), "application/x-www-form-urlencoded"),  # `+` as it is
        (json.dumps({"image": base64.urlsafe_b64encode(data).decode()}, indent=1).encode(), "application/json"),
    ):
        assert ask(f"{url}/predict", body, Content_Type=kind) == (200, expected), kind
    for several in (
        {"instances": [{"b64": text}, {"image_bytes": {"b64": text}}]},
        {"inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": [text, text]}]},
    ):
        status, said = ask(f"{url}/predict", json.dumps(several).encode(), Content_Type="application/json")
        assert (status, said) == (200, {"predictions": [expected, expected]})
    for status, words, body, headers in (
        (400, "no body", b"", {}),
        (400, "not JSON", b"{", {"Content_Type": "application/json"}),
        (400, "'picture_url'", b'{"picture_url": 1}', {"Content_Type": "application/json"}),
        (400, "not fetch", b'{"image": "http://127.0.0.1/x.png"}', {"Content_Type": "application/json"}),
        (400, "not base64", '{"image": "ä"}'.encode(), {"Content_Type": "application/json"}),
        (400, "int", b'{"instances": [[1, 2]]}', {"Content_Type": "application/json"}),
        (400, "no file", form("a", b"b"), {"Content_Type": is_form}),
        (400, "boundary", form("a", b"b"), {"Content_Type": "multipart/form-data"}),
        (415, "charset 'idna'", form("image", b"xn--" + b"a9" * 10**4), {"Content_Type": f"{is_form}; charset=idna"}),
        (415, "text/html", b"<html>", {"Content_Type": "text/html"}),
        (415, "gzip", data, {"Content_Encoding": "gzip"}),
        (400, "no picture (its fields: 'url')", b"url=x", {"Content_Type": "application/x-www-form-urlencoded"}),
        (422, "send a picture's bytes", b"GIF8\0", {"Content_Type": "application/x-www-form-urlencoded"}),
        (422, "not an image; send a picture's", b'{"image": "aGk="}', {"Content_Type": "application/json"}),
    ):
        found, said = ask(f"{url}/predict", body, "POST", **headers)
        assert found == status, said
        assert words in said["error"]
    for top in ("-3", "2.0", "many"):
        assert ask(f"{url}/predict?top={top}", data)[0] == 400
    status, said = ask(f"{url}/predict", data, "PUT")
    assert status == 405
    assert "POST to /predict" in said["error"]
    status, said = ask(f"{url}/nowhere%1b%5b2J", data)
    assert status == 404
    bomb = blank_png(5_000, 5_000, 1)
    before = peak_megabytes(process)
    with ThreadPoolExecutor(9) as pool:
        refused = [pool.submit(ask, f"{url}/predict", bomb) for _ in range(8)]
        assert ask(f"{url}/health")[0] == 200
        for one in refused:
            status, said = one.result()
            assert status == 422
            assert "--max-megapixels" in said["error"]
    assert peak_megabytes(process) - before < 100
    process.terminate()
    log = process.communicate(timeout=30)[0]
    assert "POST /predict 200 " in log
    assert "POST /nowhere%1b%5b2J 404 " in log
    assert "Traceback" not in log
    assert text[:20] not in log


def peak_megabytes(process: subprocess.Popen) -> float:
    return int(re.search(r"VmHWM:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())[1]) / 1000


# A server as `serve` runs it, but for the student and for limits that a test can wait for.
IMPATIENT = """if True:
    import numpy as np
    from raydistill.inference import request_images
    from raydistill.inference import sockets as listening
    from raydistill.inference.serve import make_app
    class Student:
        classes = ("cat", "dog")
        most_together = 64

        def working_image(self, data, most_pixels):
            return np.zeros((2, 2, 3), np.uint8)
        def probabilities(self, images):
            return np.full((len(images), 2), 0.5, np.float32)
    listening.HEAD_SECONDS, listening.GOODBYE_SECONDS, listening.MOST_CONNECTIONS = 1.0, 0.5, 80
    request_images.BODY_SECONDS = 2.0
    sockets = listening.listen("127.0.0.1", 0)
    print(*listening.addresses(sockets)[0], flush=True)
    listening.run(make_app(Student(), "a student", {"127.0.0.1"}, listening.ServeSettings(10**6, 10**6, 0.0)), sockets)
"""


def test_slow_clients_are_let_go_and_keep_nobody_waiting():
    process = subprocess.Popen(
        [sys.executable, "-c", IMPATIENT], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    url = process.stdout.readline().strip().rstrip("/")
    port = int(url.rpartition(":")[2])

    def half(sent: bytes) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", port), timeout=20)
        one.sendall(sent)
        return one

    body = b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9000\r\n\r\nabc"
    assert ask(f"{url}/health")[0] == 200
    heads = [half(b"POST /predict HTTP/1.1\r\nHost") for _ in range(200)]  # more than may be open at once
    bodies = [half(body) for _ in range(20)]
    assert ask(f"{url}/predict", b"x")[0] == 200
    second = half(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\nGET /hea")  # one whole request, and half of one
    for one in bodies[:10]:
        one.close()
    for one in heads:
        with contextlib.suppress(ConnectionResetError):
            assert one.recv(100) == b""
    for one in bodies[10:]:
        assert b"408" in one.recv(1000)
    with contextlib.suppress(ConnectionResetError):
        while second.recv(1000):
            pass
    # So much of a body has come that half a minute is left for the rest of it.
    held = half(body.replace(b"9000", b"900000") + bytes(600_000))
    assert ask(f"{url}/health")[0] == 200
    began = time.monotonic()
    process.terminate()
    log = process.communicate(timeout=20)[1]
    assert time.monotonic() - began < 15
    held.close()
    assert "Traceback" not in log
    assert " 499 " in log


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "0.0.0.0", "::"])
def test_every_form_of_address_listens_and_is_told_as_it_is_typed(host):
    if ":" in host and not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    sockets = listen(host, 0)
    try:
        urls, is_open = addresses(sockets)
        assert is_open == (host in ("0.0.0.0", "::"))
        assert not any("0.0.0.0" in url or "[::]" in url for url in urls)
        where = urllib.parse.urlsplit(urls[0])
        with socket.create_connection((where.hostname, where.port), timeout=5):
            pass
        taken = sockets[0].getsockname()[1]
        with pytest.raises(ConfigError, match="choose another --port"):
            listen(host, taken)
    finally:
        for one in sockets:
            one.close()


class Student:
    classes = ("cat", "dog")

    def probabilities(self, images: np.ndarray) -> np.ndarray:
        return np.full((len(images), 2), 0.5, np.float32)


OWN = ["127.0.0.1:8000", "[::1]:8000", "[0:0::1]:8000", "LocalHost"]
OTHERS = ["", "evil.example:8000", "evil.example", "localhost.evil.example", "evil-models.example.org", "10.9.8.7",
          "sub.models.example.org", "127.0.0.1.evil.example", "127.0.0.1@evil.example", "evil.example#localhost",
          "[::1", "localhost#.evil.example", "localhost?.evil.example", "localhost/evil", "evil.example@localhost",
          "localhost:http"]  # fmt: skip
ORIGINS = ["http://evil.example", "http://localhost:3000", "http://localhost.evil.example:8000", "null", "file://",
           "https://models.example.org.evil.example", "http://["]  # fmt: skip


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        *((host, None, 200) for host in OWN),
        ("localhost:9000", "http://localhost:9000", 200),  # by ssh -L
        ("models.example.org", "https://models.example.org", 200),
        ("127.0.0.1:8000", "https://models.example.org", 200),  # a proxy that names the place behind it
        *((host, None, 421) for host in OTHERS),
        ("evil.example:8000", "http://evil.example:8000", 421),  # a name of theirs that leads here
        *(("localhost:8000", origin, 403) for origin in ORIGINS),
    ],
)
def test_only_its_own_names_and_pages_are_answered(host, origin, status):
    sockets = listen("127.0.0.1", 0)
    app = make_app(
        Student(), "a student", own_names(sockets, "127.0.0.1"), replace(SETTINGS, allowed=["models.example.org"])
    )
    sockets[0].close()
    headers = {"host": host} | ({} if origin is None else {"origin": origin})
    with TestClient(app) as client:
        reply = client.get("/health", headers=headers)
        assert reply.status_code == status
        assert status == 200 or "--allow-host" in reply.json()["error"]
        before = client.options("/predict", headers=headers | {"access-control-request-method": "POST"})
        assert before.status_code == (405 if status == 200 else status)
        assert not any(name.startswith("access-control") for name in (*reply.headers, *before.headers))


def test_one_strange_origin_of_several_is_enough():
    app = make_app(Student(), "a student", {"localhost"}, SETTINGS)
    with TestClient(app, base_url="http://localhost") as client:
        for origins in (["http://localhost", "http://evil.example"], ["", "http://evil.example"]):
            reply = client.get("/health", headers=[("Origin", one) for one in origins])
            assert reply.status_code == 403
            assert "'http://evil.example' is another site" in reply.json()["error"]


def test_bodies_of_many_small_things_are_refused_before_they_are_made(capsys):
    """Each of these held the server for seconds, or took a hundred times its bytes."""
    fields, form = "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"
    part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\nx\r\n' % (b"n" * 3_000)
    bodies = {
        "more than 10,000 values": (b'{"images": [' + b'"",' * 2_000_000 + b'""]}', "application/json"),
        "10,000 values, such as": (b"[" * 4_000_000, "application/json"),
        "more than 10,000 fields": (b"a=&" * 2_000_000, fields),
        "fields or escapes": (b"image=" + b"%41" * 2_000_000, fields),
        "no key for pictures": (b'{"' + b"k" * 4_000_000 + b'": 1}', "application/json"),
        "has no file": (part * 5 + b"--b--\r\n", form),
    }
    app = make_app(Student(), "a student", {"localhost"}, SETTINGS)
    began = time.process_time()
    with TestClient(app, base_url="http://localhost") as client:
        for said, (body, kind) in bodies.items():
            reply = client.post("/predict", content=body, headers={"Content-Type": kind})
            assert reply.status_code in (400, 413)
            assert said in reply.json()["error"]
            assert len(reply.content) < 1_000
        client.request("A" * 5_000, "/predict")
    assert time.process_time() - began < 2
    assert max(map(len, capsys.readouterr().err.splitlines())) < 300
    white, came = b"BM" + b"\xff\xfe\xfb" * 50_000, list[bytes]()  # nothing but signs that a form escapes

    class Curious(Student):
        most_together = 1

        def working_image(self, data: bytes, most_pixels: int) -> np.ndarray:
            came.append(data)
            return np.zeros((2, 2, 3), np.uint8)

    app = make_app(Curious(), "a student", {"localhost"}, SETTINGS)
    with TestClient(app, base_url="http://localhost") as client:
        reply = client.post("/predict", data={"image": base64.b64encode(white).decode()})
        assert (reply.status_code, came) == (200, [white])


def test_a_server_for_all_knows_the_machines_addresses():
    """Those that Kubernetes' probes ask for: a pod's own address."""
    sockets = listen("0.0.0.0", 0)
    names = own_names(sockets, "0.0.0.0")
    sockets[0].close()
    assert {"127.0.0.1", "localhost", socket.gethostname().lower()} <= names
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outward, contextlib.suppress(OSError):
        outward.connect(("192.0.2.1", 9))  # nothing is sent
        assert outward.getsockname()[0] in names
    assert "" not in own_names([], "")


@pytest.mark.parametrize(
    "name", ["", "http://a.example", "a.example:80", "a.example/", "*", "a b", "me@a.example", "b:80"]
)
def test_what_is_no_name_is_not_allowed(name):
    with pytest.raises(ConfigError, match="--allow-host"):
        check_name(name)
    fine = {"A.example": "a.example", "[::1]": "::1", "0:0::1": "::1", "10.0.0.1": "10.0.0.1", "bü.de": "xn--b-eha.de"}
    assert {given: check_name(given) for given in fine} == fine


def test_a_host_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="this name has no address"):
        listen("no-such-host.invalid", 0)
    with pytest.raises(ConfigError, match="--host of this machine"):
        listen("192.0.2.1", 0)


def test_programs_can_watch_it_and_make_clients_of_it(exported, monkeypatch):
    result, _ = exported(formats=["onnx"])
    predictor = Predictor(result.path)
    app = make_app(predictor, "a student", ["testserver"], SETTINGS)
    with TestClient(app) as client:
        for number in range(3):
            assert client.post("/predict", content=picture(number)).status_code == 200
        assert client.post("/predict", content=b"no picture").status_code == 422
        for number in range(50):
            assert client.get(f"/nowhere/{number}").status_code == 404
        assert client.get("/ready").json() == {"status": "ready"}
        described = client.get("/openapi.json").json()
        for path, methods in described["paths"].items():
            for method in methods:
                assert client.request(method, path).status_code not in (404, 405), path
        shape = described["paths"]["/predict"]["post"]["responses"]["200"]["content"]["application/json"]["schema"]
        jsonschema.validate(client.post("/predict", content=picture(0)).json(), shape)
        told = client.get("/metrics").text
        monkeypatch.setattr(predictor, "probabilities", Mock(side_effect=RuntimeError("out of order")))
        assert client.get("/ready").status_code == 503
    found = {
        (s.labels.get("path"), s.labels.get("status")): s.value
        for family in text_string_to_metric_families(told) for s in family.samples
        if s.name == "raydistill_request_seconds_count"
    }  # fmt: skip
    assert found["/predict", "200"] == 4
    assert found["/predict", "422"] >= 1
    assert found["other", "404"] == 50
    assert not [path for path, _ in found if "nowhere" in path]
    assert "raydistill_batch_images_count 6.0" in told
