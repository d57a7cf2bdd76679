"""Watches on a spot node for the cloud's notice that the node is about to be taken, and drains the node through Ray.

    nohup python -m raydistill.cluster.preemption --cloud aws >> /tmp/preemption.log 2>&1 &

stands before `ray start` among the start commands of a spot node, with the same RAY_AUTH_MODE and token. A drained node
gets no new work, training saves at once, and Ray does not count its end as a failure; Ray asks no cloud by itself. Ends
with code 0 after draining or on SIGTERM, with 2 for wrong arguments; what else goes wrong is said and tried again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from http.client import HTTPException
from typing import TypeVar
from urllib.request import HTTPHandler, OpenerDirector, Request

from raydistill.cluster.ray_private import drain_preempted, gcs_client, raylets_here
from raydistill.errors import RaydistillError

# One poll of a cloud: gives the time (UTC) at which the node is taken, or None. Raises RaydistillError if there is no
# answer, or an unreadable one.
Notice = Callable[[], datetime | None]

# Ray counts a node's end as a preemption only if it comes after the deadline that draining gave; otherwise as a crash,
# which counts against `distill.max_failures`. So Ray is told an earlier time than the cloud's.
MARGIN_SECONDS = 10.0
# The service runs on the machine itself: it answers within milliseconds, or not at all.
_HTTP_SECONDS = 2.0
_TOKEN_SECONDS = 6 * 3600  # the longest that the service grants

Answer = TypeVar("Answer")


def say(line: str) -> None:
    """One line on stdout, with the time (UTC)."""
    print(f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ} {line}", flush=True)


class AwsNotice:
    """The interruption notice of an EC2 spot instance, from version 2 of the instance metadata service at `url`.

    A call gives the time (UTC) at which the instance is terminated, stopped or hibernated, or None while there is no
    notice. A rebalance recommendation, which may come earlier or for nothing, is only said. Raises RaydistillError.
    `clock` gives seconds, by which the session token is renewed before it expires.
    """

    def __init__(self, url: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._url, self._clock = url.rstrip("/"), clock
        # No proxies, which must not see the answers, and no redirects, which would be given the token.
        self._opener = OpenerDirector()
        self._opener.add_handler(HTTPHandler())
        self._token, self._renew_at = "", -math.inf
        self._rebalance_said = False

    def __call__(self) -> datetime | None:
        text = self._get("/latest/meta-data/spot/instance-action")
        if text is None:
            if not self._rebalance_said and (advice := self._get("/latest/meta-data/events/recommendations/rebalance")):
                say(f"the cloud recommends leaving this machine, which is not yet a notice: {advice[:200]!r}")
                self._rebalance_said = True
            return None
        try:
            fields = json.loads(text)
            action, written = str(fields["action"]), datetime.fromisoformat(fields["time"])
            taken_at = written.replace(tzinfo=UTC) if written.tzinfo is None else written.astimezone(UTC)
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            raise RaydistillError(f"the notice of {self._url} cannot be read: {text[:200]!r}") from error
        say(f"notice: {action[:20]!r} at {taken_at:%Y-%m-%dT%H:%M:%SZ}")
        return taken_at

    def _get(self, path: str) -> str | None:
        """The service's answer at `path`; None for 404, which means that there is no notice."""
        if self._clock() >= self._renew_at:
            self._renew_token()
        status, text = self._ask("GET", path, "", self._token)
        if status == 401:  # before its time: the clock stood still, or the service restarted
            self._renew_token()
            status, text = self._ask("GET", path, "", self._token)
        if status not in (200, 404):
            raise RaydistillError(f"{self._url} answers {status} to GET {path}")
        return text if status == 200 else None

    def _renew_token(self) -> None:
        status, text = self._ask("PUT", "/latest/api/token", "-ttl-seconds", str(_TOKEN_SECONDS))
        if status != 200:
            raise RaydistillError(f"{self._url} gives no token but status {status}; is IMDSv2 enabled?")
        self._token, self._renew_at = text, self._clock() + 0.9 * _TOKEN_SECONDS

    def _ask(self, method: str, path: str, header: str, value: str) -> tuple[int, str]:
        try:
            headers = {f"X-aws-ec2-metadata-token{header}": value}
            request = Request(self._url + path, None, headers, method=method)
            with self._opener.open(request, timeout=_HTTP_SECONDS) as response:
                return response.status, response.read(65_536).decode()
        except (OSError, HTTPException, ValueError) as error:
            raise RaydistillError(f"no answer from {self._url}{path} ({error}); containers need hop limit 2") from error


# By the value of --cloud: what makes a Notice from the metadata service's URL.
NOTICES: dict[str, Callable[[str], Notice]] = {"aws": AwsNotice}


def find_node(node_id: str | None, address: str) -> tuple[str, str]:
    """The hex id of this machine's Ray node and the `host:port` of its GCS, from the command lines of the raylets here.
    It does not look for a value that is given. Raises RaydistillError if there is no raylet, or more than one."""
    nodes, addresses = raylets_here()
    nodes = {node_id} if node_id else nodes
    addresses = {address} if address != "auto" else addresses
    if not nodes or not addresses:
        raise RaydistillError("no raylet runs on this machine")
    if len(nodes) > 1 or len(addresses) > 1:
        raise RaydistillError("several raylets run on this machine; name one with --node-id and --address")
    return nodes.pop(), addresses.pop()


def drain(node_id: str, reason: str, seconds: float, address: str) -> None:
    """Tell Ray that the node will be taken in `seconds`. It ends nothing itself. Raises RaydistillError."""
    drain_preempted(node_id, reason, round((time.time() + seconds) * 1000), address)


def poll(ask: Callable[[], Answer | None], pause: float) -> Answer:
    """Ask until there is an answer, every `pause` seconds. An error is printed when it changes, not each time."""
    trouble = ""
    while True:
        before, trouble, answer = trouble, "", None
        try:
            answer = ask()
        except RaydistillError as error:
            trouble = str(error)
        if trouble and trouble != before:
            say(f"{trouble}; trying again every {pause:g} s")
        if before and not trouble:
            say("the error is over")
        if answer is not None:
            return answer
        time.sleep(pause)


def drain_on_notice(notice: Notice, drain_here: Callable[[float], str], poll_seconds: float) -> None:
    """Wait for a notice, then drain. `drain_here` gets the seconds that remain and gives the id of the drained node."""
    taken_at = poll(notice, poll_seconds)
    node_id = poll(
        lambda: drain_here(max(0.0, (taken_at - datetime.now(UTC)).total_seconds() - MARGIN_SECONDS)), poll_seconds
    )
    say(f"drained: node {node_id} gets no new work")


def main(words: Sequence[str] | None = None) -> int:
    """The watcher: from arguments to an exit code."""
    arguments = _parse(words)
    # Like KeyboardInterrupt, which ends a pause or a request at once, and a call to Ray as soon as it returns.
    signal.signal(signal.SIGTERM, signal.default_int_handler)

    def find_living_node() -> str:
        node_id, address = find_node(arguments.node_id, arguments.address)
        gcs_client(node_id, address)
        return f"node {node_id} of the cluster at {address}"

    def drain_here(seconds: float) -> str:  # looks again: Ray may have restarted since, under another id
        node_id, address = find_node(arguments.node_id, arguments.address)
        drain(node_id, "the cloud's notice of preemption", seconds, address)
        return node_id

    try:
        say("started: waiting for a node of Ray on this machine")
        say(f"watching for a notice of preemption: {poll(find_living_node, arguments.poll_seconds)}")
        drain_on_notice(NOTICES[arguments.cloud](arguments.metadata_url), drain_here, arguments.poll_seconds)
    except KeyboardInterrupt:
        say("ended by a signal")
    return 0


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m raydistill.cluster.preemption", description="drains a spot node in time"
    )
    parser.add_argument("--cloud", required=True, choices=sorted(NOTICES), help="whose notice to ask for")
    parser.add_argument("--metadata-url", default="http://169.254.169.254", help="of the metadata service")
    parser.add_argument("--poll-seconds", type=float, default=5.0, help="between two requests (default 5)")
    parser.add_argument("--address", default="auto", help="host:port of the GCS (default: that of the raylet here)")
    parser.add_argument("--node-id", help="of the node to drain, where several run on this machine")
    arguments = parser.parse_args(words)
    if not arguments.metadata_url.startswith("http://"):
        parser.error(f"--metadata-url begins with http://, not {arguments.metadata_url}")
    if not 0 < arguments.poll_seconds < math.inf:
        parser.error(f"--poll-seconds is more than 0, not {arguments.poll_seconds:g}")
    if not re.fullmatch(r"auto|.+:\d+", arguments.address):
        parser.error(f"--address is auto or host:port, not {arguments.address}")
    if arguments.node_id is not None and not re.fullmatch("[0-9a-f]{56}", arguments.node_id):
        parser.error(f"--node-id has 56 hexadecimal digits, as in `ray list nodes`, not {arguments.node_id}")
    return arguments


if __name__ == "__main__":
    sys.exit(main())
