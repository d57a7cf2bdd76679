"""Retries calls on storage while it does not answer."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Any, TypeVar

import tenacity

from raydistill.errors import StorageError, first_line_of

logger = logging.getLogger(__name__)
Result = TypeVar("Result")
# errors of a network disk that is away, and errors that do not pass on any disk or bucket
_PASSING = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.ECONNRESET, errno.EREMOTEIO}
_FINAL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.ENAMETOOLONG, errno.EPERM, errno.ENOSYS,
          errno.EMSGSIZE, errno.ENOTEMPTY, errno.EREMCHG}  # fmt: skip
_FINAL_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
# The clients of buckets have errors of their own: some mean that there is no key, others that the client is not set up.
_CLIENTS = {"aiobotocore", "aiohttp", "azure", "botocore", "gcsfs", "google", "httpx", "huggingface_hub", "requests"}
_NO_KEY = {"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "TokenRetrievalError",
           "DefaultCredentialsError", "UnauthorizedSSOTokenError"}  # fmt: skip
_NOT_SET_UP = {"ProfileNotFound", "ParamValidationError", "NoRegionError", "InvalidRegionError", "ConfigParseError"}
# Codes of buckets that are full: of the protocol's servers, and HTTP's own.
_FULL = {"QuotaExceeded", "InsufficientStorage", "XMinioStorageFull", "507"}
_ADVICE = {
    "RequestTimeTooSkewed": "set this machine's clock", "ExpiredToken": "renew this process's token",
}  # fmt: skip
_ASK_AGAIN = {408, 425, 429}  # HTTP's codes below 500 that pass


def with_retries(call: Callable[..., Result], is_local: bool, patience: float, /, *args: Any, **kwargs: Any) -> Result:
    """The result of a call on storage, retried for `patience` seconds. Raises StorageError if storage does not answer,
    PermissionError if it refuses the key, and errors of the request itself, such as a missing file."""
    where = next((a for a in reversed(args) if isinstance(a, str)), "storage")

    def passes(error: BaseException) -> bool:
        return _passes(error, is_local)

    def warn(state: tenacity.RetryCallState) -> None:
        if state.attempt_number == 1 and state.outcome is not None:
            reason = first_line_of(state.outcome.exception())
            logger.warning("%s: storage does not answer (%s); trying again", where, reason)

    wait = tenacity.wait_random_exponential(multiplier=0.2, max=5.0)
    stop, retry = tenacity.stop_after_delay(patience), tenacity.retry_if_exception(passes)
    try:
        retrying = tenacity.Retrying(retry=retry, stop=stop, wait=wait, before_sleep=warn, reraise=True)
        return retrying(call, *args, **kwargs)
    except Exception as error:  # every client has its own errors
        reason, code = first_line_of(error), code_of(error)
        if code in _FULL:
            raise StorageError(
                f"{where}: the bucket is full ({reason}); make room there and run the same command again: finished "
                "stages stay"
            ) from None
        if type(error).__name__ in _NO_KEY or (isinstance(error, PermissionError) and not is_local):
            advice = _ADVICE.get(code, "check this process's keys and what they allow")
            raise PermissionError(f"{where}: storage refuses access ({reason}); {advice}") from None
        if not passes(error):
            raise
        raise StorageError(
            f"{where}: storage does not answer ({reason}); check the address and the network, and run the same command "
            "again: finished stages stay"
        ) from None


def _passes(error: BaseException, is_local: bool) -> bool:
    """Whether storage or the connection failed, not the request."""
    if isinstance(error, _FINAL_ERRORS) or code_of(error) in _FULL:
        return False
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(response, "status_code", None)
    if isinstance(status, int) and 400 <= status < 500 and status not in _ASK_AGAIN:
        return False
    if isinstance(error, OSError):
        return error.errno in _PASSING if is_local else error.errno not in _FINAL
    name = type(error).__name__
    return type(error).__module__.partition(".")[0] in _CLIENTS and name not in _NO_KEY and name not in _NOT_SET_UP


def code_of(error: BaseException) -> str:
    """The code of a bucket's answer, such as NoSuchKey, or else HTTP's; empty without an answer."""
    for one in (error, error.__cause__):
        answer = getattr(one, "response", None)
        if isinstance(answer, dict):
            if (status := answer.get("ResponseMetadata", {}).get("HTTPStatusCode")) == 507:
                return str(status)
            return str(answer.get("Error", {}).get("Code", ""))
    status = getattr(error, "status", None)  # aiohttp warns of its old name
    return str(getattr(error, "code", "") if status is None else status)
