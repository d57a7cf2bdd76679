"""submit: run a command on a Ray cluster by Ray Jobs, with the same words as on a laptop.

It sends the package and one resolved job file with the small files that it names; never images, outputs or secrets. The
job's own exit code comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import tenacity
from packaging.requirements import Requirement

from raydistill.cluster.upload import Package
from raydistill.errors import ConfigError, StageError, first_line_of, reason_of

STOPPED = 3  # the exit code of a job that was stopped, beside 0 (done), 1 (the run failed) and 2 (config or data)
# Ray's default is 3 s, too short to write a large checkpoint to a bucket
_STOP_SECONDS = 120
_HEAD_SECONDS = 60.0
# Packages of the nodes: the first is how they were joined, the others fit their GPUs.
_OF_THE_NODE = ("ray", "torch", "torchvision")


def check_address(address: str) -> str:
    """The address without a closing slash. Raises ConfigError: not http, or another machine without a token."""
    parts = urlsplit(address)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"--address={address}: give the address of the dashboard, as http://127.0.0.1:8265")
    # ~/.ray/auth_token may be this machine's own token; never send that to another one.
    if not _is_loopback(parts.hostname) and not _names_token():
        raise ConfigError(
            f"--address={address}: anybody who reaches this address can run code there, so raydistill needs a "
            "token; set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to the file that holds the cluster's, or open a "
            "tunnel and use http://127.0.0.1:8265"
        )
    return address.rstrip("/")


def _names_token() -> bool:
    named = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return bool(os.environ.get("RAY_AUTH_TOKEN")) or bool(named and Path(named).is_file())


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def has_token() -> bool:
    """Whether there is a token where Ray looks for one."""
    return _names_token() or (Path.home() / ".ray" / "auth_token").is_file()


def job_client(address: str) -> Any:
    """Ray's client for jobs. Raises ConfigError if nothing answers there, or the token is refused."""
    address = check_address(address)
    if has_token():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    # Ray would prefer these to the address that was given.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    os.environ.pop("RAY_ADDRESS", None)
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.getLogger("ray").setLevel(logging.WARNING)  # it tells of its uploads and sockets between the job's lines
    try:
        client = JobSubmissionClient(address)
        client.get_version()
    except AuthenticationError:
        raise ConfigError(
            f"{address} wants another token than this one; fetch the cluster's into ~/.ray/auth_token"
            if has_token()
            else f"{address} wants a token; set RAY_AUTH_TOKEN or write it to ~/.ray/auth_token"
        ) from None
    except (ConnectionError, OSError, RuntimeError) as error:
        reason = first_line_of(error)
        if "404" in reason:  # Ray's own message is about an old version of Ray
            reason = "what answers there is no Ray dashboard"
        raise ConfigError(
            f"no Ray dashboard answers at {address} ({reason}); start the cluster, open the tunnel (`ray dashboard "
            "cluster.yaml`), or give --address"
        ) from None
    return client


def pinned() -> list[str]:
    """What raydistill requires, in the versions installed here, without what a node has to bring itself."""
    wanted = [Requirement(line) for line in metadata.requires("raydistill") or []]
    names = [r.name for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})]
    return [f"{name}=={metadata.version(name)}" for name in names if name not in _OF_THE_NODE]


def _start(client: Any, entrypoint: str, name: str, environment: dict[str, Any]) -> None:
    """Raises StageError if the head does not accept the job; a head that started a moment ago accepts none yet."""
    end = time.monotonic() + _HEAD_SECONDS
    while True:
        try:
            client.submit_job(
                entrypoint=entrypoint, submission_id=name, runtime_env=environment, metadata={"raydistill": entrypoint}
            )
            return
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() >= end:
                raise StageError(
                    f"submit: the head does not accept the job ({reason_of(error)}); see its log: ray logs cluster"
                ) from None
        time.sleep(1)


def submit(client: Any, package: Package, install: bool = False) -> tuple[str, bool]:
    """Start the job, unless an equal one runs or is done. Returns its id and whether it is new.

    A job that failed or was stopped starts again under the next number. With `install` Ray first makes an environment
    for this job on each node, with the `pinned` packages.
    """
    packages = {"pip": {"packages": pinned(), "pip_check": False}} if install else {}
    for number in range(1, 1000):
        name = package.id if number == 1 else f"{package.id}-{number}"
        info = find_job(client, name)
        if info is None:
            environment = {
                "working_dir": package.folder,
                "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS), "PYTHONUNBUFFERED": "1"},
                **packages,
            }
            _start(client, package.entrypoint, name, environment)
            return name, True
        if str(info.status.value) not in ("FAILED", "STOPPED"):
            return name, False
    raise StageError(f"submit: {package.id} has failed a thousand times")


def find_job(client: Any, name: str) -> Any:
    """Ray's information about a job; None if there is no such job."""
    try:
        return client.get_job_info(name)
    except RuntimeError as error:
        if "does not exist" in str(error) or "404" in str(error):
            return None
        raise


def existing_job(client: Any, name: str) -> Any:
    info = find_job(client, name)
    if info is None:
        names = sorted(job.submission_id for job in client.list_jobs() if job.submission_id)
        raise ConfigError(f"{name}: no such job; the jobs are {', '.join(names[-10:]) or 'none'}")
    return info


def follow(client: Any, name: str, write: Callable[[str], object]) -> int:
    """Write the job's log as it grows, until it ends, and return the job's exit code. It reconnects when a connection
    breaks, and writes no text twice."""
    written = 0
    while True:
        written = asyncio.run(_tail(client, name, written, write))
        info = _asked(client, name)
        if info.status.is_terminal():
            asyncio.run(_tail(client, name, written, write))  # the text between the two
            return exit_code(info)
        time.sleep(1)


@tenacity.retry(
    retry=tenacity.retry_if_exception_type(OSError), wait=tenacity.wait_random_exponential(multiplier=0.2, max=5.0),
    stop=tenacity.stop_after_delay(_HEAD_SECONDS), reraise=True,
)  # fmt: skip
def _asked(client: Any, name: str) -> Any:
    """Ray's information about a job. A head that restarts answers after a while. Raises OSError."""
    return client.get_job_info(name)


async def _tail(client: Any, name: str, written: int, write: Callable[[str], object]) -> int:
    """Write the log from character `written` on, while the connection lasts; returns how many are written now."""
    seen = 0
    # the ways in which a connection breaks; the next one shows whether the cluster is gone
    with contextlib.suppress(RuntimeError, OSError, aiohttp.ClientError):
        async for text in client.tail_job_logs(name):
            write(text[max(written - seen, 0) :])
            seen += len(text)
            written = max(written, seen)
    return written


def exit_code(info: Any) -> int:
    """The exit code of a job that has ended."""
    status = str(info.status.value)
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        return STOPPED
    return int(info.driver_exit_code) if info.driver_exit_code and info.driver_exit_code > 0 else 1


def stop(client: Any, name: str) -> None:
    """Ask the job to end and wait until it has."""
    client.stop_job(name)
    while not client.get_job_info(name).status.is_terminal():
        time.sleep(0.5)
