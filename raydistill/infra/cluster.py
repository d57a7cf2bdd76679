"""Ray: joining a cluster or starting one of this machine, for as long as a command runs."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

from raydistill.config import RunConfig
from raydistill.errors import ConfigError
from raydistill.infra.newcomers import watched
from raydistill.infra.plan import Plan, live_plan, num_cores

# Keeps a laptop's memory for the networks: blocks in flight are a few megabytes.
OBJECT_STORE_BYTES = 512 * 1024**2

# Ray has no other way to keep the servers of its dashboard and its autoscaler from starting.
_NO_METRICS = {"DASHBOARD_METRIC_PORT": "-1", "AUTOSCALER_METRIC_PORT": "-1", "RAY_enable_metrics_collection": "0"}


@contextlib.contextmanager
def ray_cluster(config: RunConfig, reserved: float = 0.0, dashboard: bool = False) -> Iterator[Plan]:
    """Ray for the time of a `with` block, and the plan that fits it, less the `reserved` CPUs.

    A cluster of several nodes is looked at first, and nodes that join later when they come. Raises ConfigError where it
    is not fit, or the plan does not fit.
    """
    import ray

    with joined_cluster(config, dashboard), contextlib.ExitStack() as stack:
        if config.cluster.address is not None:
            if sum(node["Alive"] for node in ray.nodes()) > 1:
                from raydistill.infra.preflight import refuse_unfit

                refuse_unfit(config)
            stack.enter_context(watched(config))
        yield live_plan(config, reserved)


@contextlib.contextmanager
def joined_cluster(config: RunConfig, dashboard: bool = False) -> Iterator[None]:
    """The cluster of `cluster.address`, or one of this machine, for the time of a `with` block.

    A local one has its dashboard on the loopback interface only; Ray's other ports, which it opens on all interfaces,
    ask for a token as that does. Without the `dashboard` Ray cannot free what an ended Tune trial's train workers held.
    """
    import ray

    if ray.is_initialized():  # a cluster of the caller's, which stays
        yield
        return
    quiet = {"logging_level": logging.ERROR, "log_to_driver": False, "configure_logging": True}
    with warnings.catch_warnings(), _quiet_native_log(), _own_handler_kept():
        warnings.simplefilter("ignore", FutureWarning)
        if config.cluster.address is None:
            # Else whoever asks, on any interface and without a token, is told Ray's metrics, tasks by name among them.
            for name, off in _NO_METRICS.items():
                os.environ.setdefault(name, off)
            ray.init(
                address="local",
                num_cpus=num_cores(),
                dashboard_host="127.0.0.1",
                include_dashboard=dashboard,
                object_store_memory=OBJECT_STORE_BYTES,
                object_spilling_directory=_spill_directory(config),
                **quiet,
            )
        else:
            try:
                ray.init(address=config.cluster.address, **quiet)
            except (ConnectionError, TimeoutError) as error:
                reason = (str(error).strip().splitlines() or ["no answer"])[0]
                raise ConfigError(
                    f"cluster.address={config.cluster.address}: no Ray cluster can be joined there ({reason}); start "
                    "one (`ray start --head`, `ray up cluster.yaml`), and give its token where it asks for one"
                ) from None
    _protect_token()
    configure_ray_data()
    try:
        yield
    finally:
        ray.shutdown()


def _spill_directory(config: RunConfig) -> str | None:
    """Made here: where Ray cannot write to it, Ray itself ends without a word of why."""
    if config.cluster.spill_directory is None:
        return None
    folder = Path(config.cluster.spill_directory).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return str(folder)
    except OSError as error:
        raise ConfigError(f"cluster.spill_directory={folder} cannot be written to ({error.strerror})") from None


@contextlib.contextmanager
def _quiet_native_log() -> Iterator[None]:
    """Ray's C++ layer writes to the terminal of what its Python layer raises or retries anyway. It is told not to; the
    line in which it says that it was told is left out of what is written to the terminal meanwhile."""
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    sys.stderr.flush()
    terminal = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)
            written.seek(0)
            os.write(2, b"".join(line for line in written if b"RAY_BACKEND_LOG_LEVEL" not in line))


@contextlib.contextmanager
def _own_handler_kept() -> Iterator[None]:
    """Where Ray starts, it puts a handler of SIGTERM of its own in Python's place, which exits with code 15, and a
    native one, which would end the process on the spot; this puts back what was there. Only the main thread can."""
    own = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, own or signal.SIG_DFL)


class RayStart:
    """Ray, started in a thread of its own while the main one loads torch and the models, or not at all.

    The thread lives as long as Ray does: the system ends Ray's processes with the thread that started them.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config
        self._stack = contextlib.ExitStack()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="ray")
        self._starting: Future[Plan] | None = None

    def begin(self) -> None:
        if self._starting is None:
            self._starting = self._thread.submit(self._stack.enter_context, ray_cluster(self._config))

    def plan(self) -> Plan:
        """The plan that fits the cluster, once it is there."""
        self.begin()
        assert self._starting is not None
        with _own_handler_kept():  # its thread has touched the native one alone
            return self._starting.result()

    def __enter__(self) -> RayStart:
        return self

    def __exit__(self, *error: object) -> None:
        if self._starting is not None:
            wait([self._starting])
        self._stack.close()
        self._thread.shutdown()


def _protect_token() -> None:
    """Ray writes the token that lets code run on this machine readable by all its users."""
    token = Path.home() / ".ray" / "auth_token"
    if token.exists():
        token.parent.chmod(stat.S_IRWXU)
        token.chmod(stat.S_IRUSR | stat.S_IWUSR)


def configure_ray_data() -> None:
    """Rows in order, one block a shard, and no bars beside ours. For each process that makes a Dataset."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = True
    # Ray would end an execution in which no block moves for half an hour. A block of ours may take longer, as a file of
    # images that a slow pipeline makes on one CPU does, and so may a spot node that is waited for.
    context.execution_no_progress_timeout_s = -1
    context.target_max_block_size = 1024**3  # a shard's rows stay in one block, so that one actor call sees them all
    logging.getLogger("ray.data").setLevel(logging.ERROR)
