"""The watcher of spot nodes, against a metadata service on the loopback interface that behaves as EC2's IMDSv2 does."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raydistill.cluster.preemption import MARGIN_SECONDS, AwsNotice, drain, drain_on_notice, main, poll
from raydistill.errors import RaydistillError
from tests.processes import python, serving

NOTICE, REBALANCE = "/latest/meta-data/spot/instance-action", "/latest/meta-data/events/recommendations/rebalance"
NO_SERVICE = "http://127.0.0.1:9"


class Metadata(ThreadingHTTPServer):
    """Hands out session tokens by PUT, refuses (401) what comes without one that is valid, and knows of no notice."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = ""
        # Statuses and bodies in turn, the last one for ever; None hangs until the server is closed.
        self.answers: dict[str, list[tuple[int, bytes] | None]] = {}
        self.clock: Callable[[], float] = time.monotonic
        self.expiry: dict[str, float] = {}
        self.refused = 0
        self.asked: list[str] = []
        self.polled, self.closing = threading.Event(), threading.Event()

    def give(self, *bodies: bytes | str) -> None:
        self.answers[NOTICE] = [(200, body if isinstance(body, bytes) else body.encode()) for body in bodies]


class _Handler(BaseHTTPRequestHandler):
    server: Metadata

    def do_PUT(self) -> None:
        seconds = int(self.headers.get("X-aws-ec2-metadata-token-ttl-seconds", 0))
        if self.path != "/latest/api/token" or not 1 <= seconds <= 21600:
            self._reply(400, b"")
            return
        token = f"token-{len(self.server.expiry)}=="
        self.server.expiry[token] = self.server.clock() + seconds
        self._reply(200, token.encode())

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.path)
        if server.expiry.get(self.headers.get("X-aws-ec2-metadata-token", ""), -1.0) <= server.clock():
            server.refused += 1
            self._reply(401, b"")
            return
        turns = server.answers.get(self.path, [(404, b"<html>Not Found</html>")])
        answer = turns.pop(0) if len(turns) > 1 else turns[0]
        if answer is None:
            server.closing.wait()
        else:
            self._reply(*answer)
        if self.path == NOTICE:
            server.polled.set()

    def _reply(self, status: int, body: bytes) -> None:
        self.send_response(status)
        if status == 302:
            self.send_header("Location", f"{self.server.url}/elsewhere")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        pass


@contextlib.contextmanager
def serve() -> Iterator[Metadata]:
    with serving(server := Metadata()) as server.url:
        try:
            yield server
        finally:
            server.closing.set()


@pytest.fixture
def metadata() -> Iterator[Metadata]:
    with serve() as server:
        yield server


def drained_after(metadata: Metadata, failures: int = 0) -> list[float]:
    """Watches until a notice drains, after as many failures as it is told: the seconds that Ray was given each time."""
    given = list[float]()

    def drain_here(seconds: float) -> str:
        given.append(seconds)
        if len(given) <= failures:
            raise RaydistillError("the GCS is busy")
        return "node"

    drain_on_notice(AwsNotice(metadata.url), drain_here, 0.01)
    return given


def notice_in(seconds: float, action: str = "terminate") -> str:
    when = datetime.now(UTC) + timedelta(seconds=seconds)
    return json.dumps({"action": action, "time": f"{when:%Y-%m-%dT%H:%M:%SZ}"})


def test_no_notice_drains_nothing_and_a_notice_drains_once(metadata: Metadata) -> None:
    metadata.answers[NOTICE] = [(404, b"")] * 5 + [(200, notice_in(120).encode())]
    (seconds,) = drained_after(metadata)
    assert 90 - MARGIN_SECONDS < seconds <= 120 - MARGIN_SECONDS


@pytest.mark.parametrize("action", ["terminate", "stop", "hibernate"])
@pytest.mark.parametrize("written", ["2031-05-06T07:08:09Z", "2031-05-06T07:08:09", "2031-05-06T09:08:09+02:00"])
def test_the_time_is_read_in_utc(metadata: Metadata, action: str, written: str) -> None:
    metadata.give(json.dumps({"action": action, "time": written}))
    assert AwsNotice(metadata.url)() == datetime(2031, 5, 6, 7, 8, 9, tzinfo=UTC)


@pytest.mark.parametrize("ago", [0, 5, 10**6])
def test_a_time_in_the_past_drains_at_once(metadata: Metadata, ago: int) -> None:
    metadata.give(notice_in(-ago))
    assert drained_after(metadata) == [0.0]


@pytest.mark.parametrize(
    "garbage",
    [
        b"", b"<html>", b"null", b"[1]", b"{}", b'{"action": "terminate"}', b'{"time": "2031-05-06T07:08:09Z"}',
        b'{"action": "terminate", "time": "soon"}', b'{"action": "terminate", "time": 7}', b"\xff\xfe\x00",
        b'{"action": "terminate", "time": "0001-01-01T00:00:00+23:00"}',
    ],
)  # fmt: skip
def test_a_notice_that_cannot_be_read_is_asked_for_again(metadata: Metadata, garbage: bytes) -> None:
    metadata.give(garbage)
    with pytest.raises(RaydistillError):
        AwsNotice(metadata.url)()
    metadata.give(garbage, garbage, notice_in(120))
    assert len(drained_after(metadata)) == 1


def test_the_token_is_renewed_before_it_expires(metadata: Metadata) -> None:
    now = 0.0
    metadata.clock = lambda: now
    notice = AwsNotice(metadata.url, clock=lambda: now)
    for _ in range(150):
        assert notice() is None
        now += 600
    assert metadata.refused == 0


def test_a_token_that_expired_early_is_renewed(metadata: Metadata) -> None:
    notice = AwsNotice(metadata.url)
    assert notice() is None
    metadata.expiry = dict.fromkeys(metadata.expiry, 0.0)
    metadata.give(notice_in(120))
    assert notice() is not None
    assert metadata.refused == 1


def test_a_service_that_refuses_every_token_is_an_error(metadata: Metadata) -> None:
    metadata.clock = lambda: float("inf")
    with pytest.raises(RaydistillError, match="401"):
        AwsNotice(metadata.url)()


def test_a_service_that_hangs_or_fails_is_asked_again(metadata: Metadata) -> None:
    metadata.answers[NOTICE] = [None, (500, b""), (503, b"busy"), (404, b""), (200, notice_in(120).encode())]
    assert len(drained_after(metadata)) == 1


def test_no_service_is_an_error_that_names_it() -> None:
    with pytest.raises(RaydistillError, match=NO_SERVICE):
        AwsNotice(NO_SERVICE)()


def test_a_rebalance_recommendation_drains_nothing(metadata: Metadata) -> None:
    metadata.answers[REBALANCE] = [(200, b'{"noticeTime": "2031-05-06T07:08:09Z"}')]
    notice = AwsNotice(metadata.url)
    assert [notice(), notice()] == [None, None]
    assert REBALANCE in metadata.asked


def test_neither_a_proxy_nor_a_redirect_sees_what_is_asked(metadata: Metadata, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, NO_SERVICE)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    metadata.give(notice_in(120))
    assert AwsNotice(metadata.url)() is not None
    metadata.answers[NOTICE] = [(302, b"")]
    with pytest.raises(RaydistillError, match="302"):
        AwsNotice(metadata.url)()
    assert "/elsewhere" not in metadata.asked


def test_a_drain_that_fails_is_tried_again_with_the_time_that_is_left(metadata: Metadata) -> None:
    metadata.give(notice_in(120))
    given = drained_after(metadata, failures=3)
    assert len(given) == 4
    assert given == sorted(set(given), reverse=True)


def test_trouble_is_said_when_it_changes_with_a_time_in_utc(capsys: pytest.CaptureFixture[str]) -> None:
    troubles = iter(["a"] * 50 + ["b"] * 50)

    def ask() -> str:
        for trouble in troubles:
            raise RaydistillError(trouble)
        return "answer"

    assert poll(ask, 0.0001) == "answer"
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3  # a, b, and that it is over
    for line in lines:
        said_at = datetime.fromisoformat(line.split()[0])
        assert abs(datetime.now(UTC) - said_at) < timedelta(minutes=5)


@pytest.mark.parametrize(
    "words",
    [
        [], ["--cloud", "elsewhere"], ["--cloud", "aws", "--poll-seconds", "0"],
        ["--cloud", "aws", "--poll-seconds", "nan"], ["--cloud", "aws", "--metadata-url", "https://127.0.0.1"],
        ["--cloud", "aws", "--node-id", "second"], ["--cloud", "aws", "--address", "nonsense"],
    ],
)  # fmt: skip
def test_arguments_that_cannot_be_used_end_with_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2


@pytest.mark.cluster
def test_a_notice_drains_its_node_and_no_other() -> None:
    """In a process of its own, whose Ray asks for a token and keeps its files apart (by a short path, for sockets)."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        environment = os.environ | {
            "HOME": folder, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4,
            # The end of a node is noticed in seconds.
            "RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "3",
        }  # fmt: skip
        environment.pop("RAY_ADDRESS", None)
        root = Path(__file__).parents[2]
        code = f"import sys; sys.path.insert(0, {str(root)!r}); from {__name__} import drain_the_second_node as run"
        ended = python("-c", f"{code}; run(); print('drained')", env=environment)
        assert ended.stdout.endswith("drained\n"), ended.stdout + ended.stderr


def drain_the_second_node() -> None:
    import ray
    from ray._private.state import state
    from ray.cluster_utils import Cluster
    from ray.core.generated.common_pb2 import NodeDeathInfo
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    @ray.remote(num_cpus=0.1)
    def where() -> str:
        return ray.get_runtime_context().get_node_id()

    @ray.remote(num_cpus=0)
    class Worker:
        def node(self) -> str:
            return ray.get_runtime_context().get_node_id()

    small: dict = {"object_store_memory": 80 * 1024**2, "num_cpus": 1}
    cluster = Cluster(initialize_head=True, head_node_args={**small, "include_dashboard": False})
    ray.init(address=cluster.address, log_to_driver=False)
    head, second = ray.get_runtime_context().get_node_id(), ray.NodeID.from_random().hex()
    preferred = where.options(scheduling_strategy=NodeAffinitySchedulingStrategy(second, soft=True))
    with pytest.raises(RaydistillError, match=second):  # the GCS itself would call it a success
        drain(second, "test", 100, cluster.address)
    with serve() as quiet, serve() as metadata, contextlib.ExitStack() as stack:
        # Both watchers stand before what they watch: the second node is not there yet, nor is any notice.
        watchers = [_watcher(metadata.url, second, cluster.address), _watcher(quiet.url, head, cluster.address)]
        for watcher in watchers:
            stack.callback(watcher.kill)  # where a check below fails
        node = cluster.add_node(**small, resources={"spot": 1}, env_vars={"RAY_OVERRIDE_NODE_ID_FOR_TESTING": second})
        worker = Worker.options(resources={"spot": 1}).remote()  # an idle node would end as soon as it is drained
        assert ray.get([worker.node.remote(), preferred.remote()]) == [second, second]
        assert metadata.polled.wait(60)
        assert quiet.polled.wait(60)
        assert state.get_draining_nodes() == {}

        told_at = time.time()
        metadata.give(notice_in(MARGIN_SECONDS + 4))
        assert watchers[0].wait(60) == 0
        watchers[1].send_signal(signal.SIGTERM)
        assert watchers[1].wait(60) == 0

        ((drained, deadline_ms),) = state.get_draining_nodes().items()  # what Ray Train asks for, too
        assert drained == second
        assert told_at <= deadline_ms / 1000 <= time.time() + 4
        assert ray.get(worker.node.remote()) == second  # what runs there goes on
        while time.time() <= deadline_ms / 1000:
            assert ray.get(preferred.remote()) == head
        # The machine is taken: to Ray, and so to training, a preemption and no crash.
        cluster.remove_node(node, allow_graceful=False)
        while (record := _node(second))["Alive"]:
            assert ray.get(preferred.remote()) == head
        assert record["DeathReason"] == NodeDeathInfo.AUTOSCALER_DRAIN_PREEMPTED
    ray.shutdown()
    cluster.shutdown()


def _node(node_id: str) -> dict:
    import ray

    return next(node for node in ray.nodes() if node["NodeID"] == node_id)


def _watcher(url: str, node_id: str, address: str) -> subprocess.Popen:
    words = ["--cloud", "aws", "--metadata-url", url, "--poll-seconds", "0.2"]
    words += ["--node-id", node_id, "--address", address]
    return subprocess.Popen([sys.executable, "-m", "raydistill.cluster.preemption", *words])
