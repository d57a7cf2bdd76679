"""A Ray of this machine alone, as commands start it: who may reach it, and where it writes what it cannot hold."""

from __future__ import annotations

import json
import os
import re
import stat
import tempfile
from ipaddress import ip_address
from pathlib import Path

import pytest
import ray

from raydistill.cluster import session as cluster
from raydistill.cluster.session import joined_cluster
from raydistill.config import load_config
from raydistill.errors import ConfigError
from tests.processes import python

# In a process of its own, with a home of its own for the token.
_LOCAL = """
import json, os, stat, subprocess, sys, time
from http.client import HTTPException
from ipaddress import ip_address
from urllib.error import HTTPError
from urllib.request import urlopen
from pathlib import Path
import grpc, psutil, ray
from raydistill.config import load_config
from raydistill.cluster.session import joined_cluster

CALLS = {
    "gcs_server": ["NodeInfoGcsService/GetAllNodeInfo", "InternalKVGcsService/InternalKVGet"],
    "raylet/raylet": ["NodeManagerService/GetNodeStats", "ObjectManagerService/Pull"],  # a port each
    "ray::IDLE": ["CoreWorkerService/GetCoreWorkerStats"],
    "DashboardAgent": ["ReporterService/GetTraceback"],
}

with joined_cluster(load_config(["images.path=x"]), dashboard=True):
    assert ray.get(ray.remote(lambda: 1).remote()) == 1
    time.sleep(5)  # for what Ray's processes open a little later
    heard = []
    for process in psutil.Process().children(recursive=True):
        for connection in process.net_connections("inet"):
            if connection.status == psutil.CONN_LISTEN:
                heard.append([" ".join(process.cmdline()), *connection.laddr])
    told = []
    for command, address, port in heard:
        host = "127.0.0.1" if address in ("::", "0.0.0.0") else address
        for page in ("/", "/metrics", "/api/version"):
            try:
                urlopen(f"http://{host}:{port}{page}", timeout=10)
                told.append([command, address, port, page])
            except HTTPError as error:
                assert error.code == 401 or ip_address(address).is_loopback, (command, page, error.code)
            except (HTTPException, OSError):
                pass  # no HTTP: Ray's own protocol
    asked = []
    for command, _, port in heard:
        for call in next((calls for part, calls in CALLS.items() if part in command[:200]), []):
            try:
                grpc.insecure_channel(f"127.0.0.1:{port}").unary_unary("/ray.rpc." + call)(b"", timeout=20)
                asked.append([call, "OK"])
            except grpc.RpcError as error:
                asked.append([call, error.code().name])
    stranger = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False); print('LET IN')"
    address = ray.get_runtime_context().gcs_address
    entered = []
    for mode in ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, {"RAY_AUTH_MODE": "disabled"}):
        mode |= {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # or Ray takes 127.0.0.1 for the machine's other address
        tried = subprocess.run([sys.executable, "-c", stranger, address], env=os.environ | mode, capture_output=True)
        entered.append(b"LET IN" in tried.stdout)
    session = Path(ray._private.worker._global_node.get_session_dir_path())
    assert stat.S_IMODE(session.parent.parent.stat().st_mode) == 0o700, session
    token = Path.home() / ".ray" / "auth_token"
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (token, token.parent)]
    print("ANSWERS" + json.dumps([heard, asked, entered, modes, len(token.read_text().strip())]))
"""


def is_loopback(address: str) -> bool:
    """An IPv4 address of a socket for both kinds is loopback where the address is."""
    found = ip_address(address)
    return (getattr(found, "ipv4_mapped", None) or found).is_loopback


@pytest.mark.slow
@pytest.mark.cluster
def test_a_local_ray_lets_in_nobody_without_its_token_which_is_closed_to_others(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")} | {"HOME": str(tmp_path)}
    ended = python("-c", _LOCAL, env=environment)
    assert "ANSWERS" in ended.stdout, ended.stdout + ended.stderr
    heard, asked, entered, modes, length = json.loads(ended.stdout.partition("ANSWERS")[2])
    for part in ("gcs_server", "raylet", "dashboard/dashboard.py", "DashboardAgent", "RuntimeEnvAgent", "ray::"):
        assert any(part in command for command, _, _ in heard), part
    assert [(command, address) for command, address, _ in heard if not is_loopback(address)] == []
    # Of each service, the one port that has it asks for the token; an HTTP port takes no such call.
    assert {code for _, code in asked} <= {"UNAUTHENTICATED", "UNIMPLEMENTED", "UNAVAILABLE", "INTERNAL"}
    assert len({call for call, code in asked if code == "UNAUTHENTICATED"}) == 6
    assert entered == [False, False]
    assert modes == [0o600, 0o700]
    assert length >= 32


_SPILLS = """
import sys
import numpy as np, ray
from raydistill.config import load_config
from raydistill.cluster import session as cluster

cluster.object_store_bytes = lambda: 80 * 1024**2
with cluster.joined_cluster(load_config(["images.path=x", f"cluster.spill_directory={sys.argv[1]}"])):
    kept = [ray.put(np.full(20 * 1024**2, k, np.uint8)) for k in range(8)]
    assert all((ray.get(kept[k]) == k).all() for k in range(8))
    print("SPILLED", sum(file.stat().st_size for file in cluster.Path(sys.argv[1]).rglob("*") if file.is_file()))
"""


@pytest.mark.parametrize("planted", ["nothing", "a link", "a file", "open to all", "another user's", "a long name"])
def test_sessions_of_ray_lie_in_a_folder_of_this_user_alone(tmp_path: Path, monkeypatch, planted: str) -> None:
    """Whoever may write to Ray's session has this user's files written over, by links among its logs."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as above:  # tmp_path is longer than sockets allow
        mine, victim = Path(above, f"raydistill-{os.getuid()}"), tmp_path / "victim"
        victim.mkdir()
        if planted == "a link":
            mine.symlink_to(victim)
        elif planted == "a file":
            mine.touch()
        elif planted in ("open to all", "another user's"):
            mine.mkdir()
            mine.chmod(0o777 if planted == "open to all" else 0o700)
            if planted == "another user's":
                if os.getuid() != 0:
                    pytest.skip("gives a folder away")
                os.chown(mine, 65534, 65534)
        monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 100)) if planted == "a long name" else above)
        monkeypatch.setattr(tempfile, "tempdir", above)
        folder = Path(cluster._ray_folder())
        private = folder.parent
        assert private.parent == Path(above)
        assert (private == mine) == (planted in ("nothing", "a long name"))
        found = private.lstat()
        assert (stat.S_ISDIR(found.st_mode), stat.S_IMODE(found.st_mode), found.st_uid) == (True, 0o700, os.getuid())
        assert not list(victim.iterdir())


@pytest.mark.slow
@pytest.mark.cluster
def test_what_memory_does_not_hold_is_written_where_one_says(tmp_path: Path) -> None:
    ended = python("-c", _SPILLS, str(tmp_path / "spilled"))
    assert "SPILLED" in ended.stdout, ended.stdout + ended.stderr
    assert int(ended.stdout.partition("SPILLED ")[2]) >= 4 * 20 * 1024**2


_CANCELS = """
import signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell does for a command behind which stands `&`
import ray
from raydistill.config import load_config
from raydistill.cluster.session import joined_cluster

with joined_cluster(load_config(["images.path=x"])):
    ray.get(ray.remote(lambda: 1).remote())  # or it would be cancelled before it starts
    sleeps = ray.remote(max_retries=0)(lambda: [time.sleep(0.1) for _ in range(600)]).remote()
    time.sleep(1)
    ray.cancel(sleeps)
    try:
        ray.get(sleeps, timeout=30)
    except ray.exceptions.TaskCancelledError:
        print("CANCELLED")
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_work_is_cancelled_where_the_command_ignores_ctrl_c() -> None:
    ended = python("-c", _CANCELS)
    assert "CANCELLED" in ended.stdout, ended.stdout + ended.stderr


_ENDS = """
import atexit, ctypes, os, psutil, ray, sys, time
from pathlib import Path
from raydistill.config import load_config
from raydistill.cluster.session import joined_cluster

ends = Path(sys.argv[1])

@ray.remote
class Late:
    def begin(self):
        atexit.register(ctypes.PyDLL(None).sleep, 60)
        atexit.register(ends.touch)
        return os.getpid()

with joined_cluster(load_config(["images.path=x"])):
    late = Late.remote()
    worker = psutil.Process(ray.get(late.begin.remote()))
    del late  # Ray asks it to end
    while not ends.exists():
        time.sleep(0.01)
try:
    worker.wait(10)
except psutil.TimeoutExpired:
    print("it runs on")
else:
    print("ENDED")
"""


@pytest.mark.slow
@pytest.mark.cluster
def test_no_worker_outlives_the_command(tmp_path: Path) -> None:
    ended = python("-c", _ENDS, str(tmp_path / "ends"))
    assert "ENDED" in ended.stdout, ended.stdout + ended.stderr


_IN_WORKERS = """
import os, sys
if any("default_worker.py" in word for word in sys.orig_argv):
    {}
"""


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("does", "said"),
    [
        (
            "os.write(2, b'ImportError: libgone.so.1: no such\\n'); os._exit(1)",
            "start: ImportError: libgone.so.1: no s",
        ),
        ("os.kill(os.getpid(), 9)", "start: no reason given, as when memory runs out"),
        ("sys.modules['raydistill'] = None", "cannot run raydistill: ModuleNotFoundError: .*raydistill"),
    ],
    ids=["with a reason", "killed", "another environment"],
)
def test_workers_that_die_as_they_start_are_named(does: str, said: str, class_folders, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_IN_WORKERS.format(does))
    there = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    words = [f"images.path={class_folders({'a': 8, 'b': 8})}", f"workspace={tmp_path}/runs", "tracking.enabled=false"]
    ended = python("-m", "raydistill", "prepare", *words, PYTHONPATH=there)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert len(errors) == 1
    assert re.search(said + r".*; their logs are in /\S+/logs$", errors[0])


def test_rows_come_in_order_on_a_ray_that_the_caller_began(monkeypatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    options = ray.data.DataContext.get_current().execution_options
    monkeypatch.setattr(options, "preserve_order", False)
    with joined_cluster(load_config(["images.path=x"])):
        assert options.preserve_order


def test_a_place_that_cannot_be_written_to_is_named_before_ray_starts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # another test's Ray may run in this process
    (tmp_path / "file").touch()
    config = load_config(["images.path=x", f"cluster.spill_directory={tmp_path}/file/deep"])
    with pytest.raises(ConfigError, match=r"cluster\.spill_directory=.*/file/deep cannot be written to \(Not a dir"):
        joined_cluster(config).__enter__()
