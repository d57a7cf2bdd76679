"""Ray: joins a cluster, or starts one on this machine, while a command runs."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import psutil

from raydistill.cluster.late_nodes import late_nodes_checked
from raydistill.cluster.plan import Plan, live_plan
from raydistill.cluster.ray_private import leave_uv_alone, on_loopback, own_signals, stderr_into
from raydistill.config import RunConfig
from raydistill.errors import ConfigError, first_line_of
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.environment import private_folder
from raydistill.runtime.memory import object_store_bytes
from raydistill.storage.local import make_private

logger = logging.getLogger(__name__)

# Ray has no other way to keep its dashboard's and autoscaler's servers from starting.
_NO_METRICS = {"DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1", "RAY_enable_metrics_collection": "0"}


@contextlib.contextmanager
def ray_cluster(config: RunConfig, reserved: float = 0.0, dashboard: bool = False) -> Iterator[Plan]:
    """Ray during a `with` block, and the plan that fits it, without the `reserved` CPUs. A cluster of several nodes is
    checked first; nodes that join later are checked when they join. Raises ConfigError if a node is not fit, or the
    plan does not fit."""
    import ray

    with joined_cluster(config, dashboard), contextlib.ExitStack() as stack:
        if config.cluster.address is not None:
            if sum(node["Alive"] for node in ray.nodes()) > 1:
                from raydistill.cluster.nodes import refuse_unfit

                refuse_unfit(config)
            stack.enter_context(late_nodes_checked(config))
        yield live_plan(config, reserved)


@contextlib.contextmanager
def joined_cluster(config: RunConfig, dashboard: bool = False) -> Iterator[None]:
    """The cluster of `cluster.address`, or one on this machine, during a `with` block.

    All ports of a local one are on the loopback interface, and ask for a token. Without the `dashboard` Ray cannot free
    the resources of an ended Tune trial's train workers.
    """
    import ray

    from raydistill.cluster.first_worker import refuse_dying_workers

    configure_ray_data()
    if ray.is_initialized():  # a cluster of the caller's, which stays open
        yield
        return
    leave_uv_alone()
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    with warnings.catch_warnings(), _quiet_native_log(), own_signals():
        warnings.simplefilter("ignore", FutureWarning)
        if config.cluster.address is None:
            # Otherwise Ray shows its metrics, with the names of tasks, to everybody, on any interface, without a token.
            for name, off in _NO_METRICS.items():
                os.environ.setdefault(name, off)
            # Otherwise ray.init waits for worker processes, forever if they die at their start.
            os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
            with on_loopback():
                joined = ray.init(
                    address="local",
                    num_cpus=num_cores(),
                    dashboard_host="127.0.0.1",
                    include_dashboard=dashboard,
                    object_store_memory=object_store_bytes(),
                    object_spilling_directory=_spill_directory(config),
                    _node_ip_address="127.0.0.1",
                    _temp_dir=_ray_folder(),
                    **quiet,
                )
        else:
            try:
                joined = ray.init(address=config.cluster.address, **quiet)
            except (ConnectionError, TimeoutError) as error:
                raise ConfigError(
                    f"cluster.address={config.cluster.address}: no Ray cluster can be joined there "
                    f"({first_line_of(error)}); start one (`ray start --head`, `ray up cluster.yaml`), and give its "
                    "token if it asks for one"
                ) from None
    _protect_token()
    session = joined.address_info["session_dir"]
    try:
        if config.cluster.address is None:
            refuse_dying_workers(Path(session, "logs"))
        yield
    finally:
        workers = _workers_of_ours()
        with own_signals():
            ray.shutdown()
        for worker in workers:  # they end without their raylet, but a busy one only after ten seconds
            with contextlib.suppress(psutil.Error):
                worker.kill()
    if config.cluster.address is None:  # sessions would pile up; after an error Ray's logs stay
        shutil.rmtree(session, ignore_errors=True)


def _workers_of_ours() -> list[psutil.Process]:
    """The processes of a Ray that this process has started."""
    with contextlib.suppress(psutil.Error):
        raylets = [child for child in psutil.Process().children() if child.name() == "raylet"]
        return [worker for raylet in raylets for worker in raylet.children(recursive=True)]
    return []


def _ray_folder() -> str:
    """The folder of Ray's sessions: a private folder in RAY_TMPDIR, TMPDIR or /tmp. Ray's own folders are open to all
    users, who could put links there that redirect this user's writes. XDG_RUNTIME_DIR will not do: it is in memory, and
    Ray spills to disk. Linux limits a socket's path to 107 bytes."""
    room = 107 - len(f"/raydistill-{os.getuid()}/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store")
    own, trouble = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp", ""
    for above in dict.fromkeys((own, tempfile.gettempdir(), "/tmp")):
        for make in (private_folder, _new_folder) if len(os.fsencode(above)) <= room else ():
            try:
                folder = make(above)
            except OSError as error:
                trouble = trouble or f"{error.filename}: {error.strerror}"
                continue
            if trouble:
                logger.warning("Ray's session goes to %s (%s)", folder, trouble)
            return str(folder / "ray")
    raise ConfigError(
        f"Ray keeps its sockets in {own}, which is not writable, or has a name of more than {room} bytes; set "
        "RAY_TMPDIR to a folder with a short name"
    )


def _new_folder(above: str) -> Path:
    return Path(tempfile.mkdtemp(prefix="raydist-", dir=above))  # of mode 0700


def _spill_directory(config: RunConfig) -> str | None:
    """Make the folder: if Ray cannot write to it, Ray ends without a reason."""
    if config.cluster.spill_directory is None:
        return None
    folder = Path(config.cluster.spill_directory).expanduser().absolute()
    try:
        make_private(str(folder))
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError as error:
        raise ConfigError(f"cluster.spill_directory={folder} cannot be written to ({error.strerror})") from None


@contextlib.contextmanager
def _quiet_native_log() -> Iterator[None]:
    """Tell Ray's C++ layer not to write errors to the terminal that its Python layer raises or retries anyway. Ray
    confirms this with a line, which is removed from the output."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    with tempfile.TemporaryFile() as written:
        try:
            with stderr_into(written):
                yield
        finally:
            written.seek(0)
            os.write(2, b"".join(line for line in written if b"RAY_BACKEND_LOG_LEVEL" not in line))


class RayStart:
    """Ray, started in its own thread while the main thread loads torch and the models, or not at all. The thread lives
    as long as Ray does, because the system ends Ray's processes with the thread that started them.

    After an error, a Ray `of_command` that is still starting is left to end with the process.
    """

    def __init__(self, config: RunConfig, of_command: bool = False) -> None:
        self._config, self._of_command = config, of_command
        self._stack = contextlib.ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._starting: Future[Plan] | None = None

    def begin(self) -> None:
        if self._starting is None:
            self._starting = self._thread.submit(self._stack.enter_context, ray_cluster(self._config))

    @property
    def runs(self) -> bool:
        """Whether this command or its caller has started Ray."""
        import ray

        return self._starting is not None or ray.is_initialized()

    def plan(self) -> Plan:
        """The plan that fits the cluster, once it has started."""
        self.begin()
        assert self._starting is not None
        return self._starting.result()

    def __enter__(self) -> RayStart:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._starting is not None:
            if kind is not None and self._of_command and not self._starting.done():
                return
            wait([self._starting])
        self._stack.__exit__(kind, error, trace)
        self._thread.shutdown()


def _protect_token() -> None:
    """Ray makes the token that lets code run on this machine readable for all its users."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.parent.chmod(stat.S_IRWXU)
        token.chmod(stat.S_IRUSR | stat.S_IWUSR)


def configure_ray_data() -> None:
    """Keep rows in order, one block for each shard, without Ray's progress bars. Each process that makes a Dataset
    calls it."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # Ray would end an execution in which no block moves for half an hour. A file of generated images may take longer on
    # one CPU, and so may a spot node.
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = 1024**3  # a shard's rows stay in one block, so that one actor call sees them all
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # it also raises what it logs as an error
