"""The stores of MLflow and Optuna: which one a job uses, whether it is usable, and a lock while it is created."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from raydistill.config import RunConfig
from raydistill.secrets import redacted
from raydistill.storage.directory import workspace_root
from raydistill.storage.local import make_private

_ANSWER_SECONDS, _CONNECT_SECONDS = 5, 10
_REQUEST_SECONDS = "30"  # MLflow's own are 120, twice, and the end of a command would wait for them
_LOOKS, _SECONDS_BETWEEN_LOOKS = 3, 1.0
# A connection holds it, and releases it when it ends, whatever happens to its process.
_LOCKS = {
    "postgresql": "SELECT pg_advisory_lock(7261796469)",
    "mysql": "SELECT GET_LOCK('raydistill', 600)",
    "mariadb": "SELECT GET_LOCK('raydistill', 600)",
}
_DRIVERS = {"MySQLdb": "mysqlclient"}  # packages whose name differs from their module's
_REFUSED = ("UNAUTHENTICATED", "PERMISSION_DENIED", "CUSTOMER_UNAUTHORIZED")


class UnusableError(Exception):
    """The store will never accept a run; the message says why and what to do."""


def tracking_uri(config: RunConfig) -> tuple[str, str]:
    """MLflow's store, and what names it: the config, the environment, or SQLite in the workspace. A workspace that is
    not local has none: the address is empty."""
    if config.tracking.uri is not None:
        return config.tracking.uri, "tracking.uri"
    if uri := os.environ.get("MLFLOW_TRACKING_URI"):
        return uri, "MLFLOW_TRACKING_URI"
    root = workspace_root(config)
    return ("" if "://" in root else f"sqlite:///{root}/mlflow.db"), "the workspace"


@contextlib.contextmanager
def store_lock(uri: str, folder: str = "") -> Iterator[None]:
    """One process at a time uses a store: by a lock file beside SQLite's, or in `folder` for servers, if that is local.
    A file system without locks is not an error."""
    path = sqlite_file(uri)
    if path is None and "://" not in folder and folder:
        path = f"{folder}/mlflow"
    with contextlib.ExitStack() as stack:
        if path is not None:
            with contextlib.suppress(OSError):
                file = stack.enter_context(open(f"{path}.lock", "wb", opener=_without_links))
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _without_links(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)  # opening a pipe would wait


@contextlib.contextmanager
def database_lock(uri: str) -> Iterator[None]:
    """Like `store_lock`, while a database gets its tables; over all machines, if it is a server."""
    import sqlalchemy

    with store_lock(uri), contextlib.ExitStack() as stack:
        if lock := _LOCKS.get(uri.partition(":")[0].partition("+")[0]):
            stack.enter_context(engine_of(uri).connect()).execute(sqlalchemy.text(lock))
        yield


def connect(uri: str) -> Any:
    """MLflow's client of a store that answers. It creates the tables of an empty database. Raises UnusableError, and
    errors of MLflow and its libraries if the store may answer later."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # its retries would hold the writer for minutes
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", _REQUEST_SECONDS)
    if not (uri.startswith("databricks") or "://" in uri) or uri.startswith("file:"):
        raise UnusableError("is a folder, and MLflow no longer keeps runs in folders: name a database or a server")
    import mlflow  # half a second, here in the writer's thread
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_TIMEOUT
    from mlflow.exceptions import MlflowException

    for name in ("alembic", "mlflow"):
        logging.getLogger(name).setLevel(logging.WARNING)
    if uri.partition(":")[0].partition("+")[0] in ("sqlite", "postgresql", "mysql", "mariadb", "mssql"):
        _ready(uri)
    usual = MLFLOW_HTTP_REQUEST_TIMEOUT.get()
    MLFLOW_HTTP_REQUEST_TIMEOUT.set(min(usual, _ANSWER_SECONDS))
    try:
        client = mlflow.MlflowClient(tracking_uri=uri)
        client.search_experiments(max_results=1)
        return client
    except MlflowException as error:
        if words := _never(error):
            raise UnusableError(words) from None
        raise
    except ValueError as error:  # of an unreadable address
        raise UnusableError(f"is not an address ({reason(error)})") from None
    finally:
        MLFLOW_HTTP_REQUEST_TIMEOUT.set(usual)


def is_transient(error: Exception) -> bool:
    """Whether the store or the connection failed, rather than the request."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import OperationalError

    if isinstance(error, MlflowException):
        return error.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "DEADLINE_EXCEEDED",
                                    "REQUEST_LIMIT_EXCEEDED")  # fmt: skip
    # The errors of `requests` are OSErrors; a missing file, or one in a folder's place, stays wrong.
    stays = (FileNotFoundError, PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)
    return (isinstance(error, OSError) and not isinstance(error, stays)) or isinstance(error, OperationalError)


def reason(error: Exception) -> str:
    """The useful part of an error's text: libraries wrap the system's words in many lines of their own."""
    text = str(error).strip()
    known = (
        r"\[Errno -?\d+\] [^'\")\n]+|\[SSL: \w+\]|certificate verify failed[^)\n]*"
        r"|(?:read |connect )?timed? ?out|\d+ error responses"
    )
    found = re.findall(known, text)
    first = (text.splitlines() or [type(error).__name__])[0]
    return redacted(found[-1] if found else first)


def _never(error: Any) -> str | None:
    """The reason if a server's answer will not change; None if it may."""
    text = str(error)
    status = re.search(r"error code (\d+) != 200", text)
    if error.error_code in _REFUSED or (status and status[1] in ("401", "403", "407")):
        answer = f"HTTP {status[1]}" if status else reason(error)
        return (
            f"does not let this user in ({answer}): set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or "
            "MLFLOW_TRACKING_TOKEN"
        )
    if status or "not in a valid JSON format" in text or error.error_code in ("ENDPOINT_NOT_FOUND", "NOT_FOUND"):
        answer = f"it answers {status[1]}" if status else "it does not answer in JSON"
        return f"is not an MLflow server ({answer}): look at host, port and path"
    if error.error_code in ("INVALID_PARAMETER_VALUE", "BAD_REQUEST"):
        return f"is not an MLflow store ({reason(error)})"
    return None


def sqlite_file(uri: str) -> str | None:
    if not uri.startswith("sqlite"):
        return None
    from sqlalchemy import make_url

    database = make_url(uri).database
    return database if database and database != ":memory:" else None


def engine_of(uri: str) -> Any:
    import sqlalchemy

    patient = {} if uri.startswith(("sqlite", "mssql")) else {"connect_timeout": _CONNECT_SECONDS}
    try:
        return sqlalchemy.create_engine(uri, poolclass=sqlalchemy.NullPool, connect_args=patient)
    except ModuleNotFoundError as error:
        package = _DRIVERS.get(error.name or "", error.name)
        raise UnusableError(f"needs a driver that is not installed here: pip install {package}") from None
    except sqlalchemy.exc.ArgumentError as error:
        raise UnusableError(f"is not a database address ({reason(error)})") from None


def _ready(uri: str) -> None:
    """A database with MLflow's tables of this version. Raises UnusableError, OperationalError."""
    import sqlalchemy

    path = sqlite_file(uri)
    try:
        if path is not None:
            make_private(str(Path(path).parent))
        if not _has_tables(uri):
            with database_lock(uri):
                if not _has_tables(uri):
                    _make(uri, path)
    except OSError as error:
        raise UnusableError(f"cannot be written ({error.strerror})") from None
    except sqlalchemy.exc.DatabaseError as error:
        words = reason(error)
        passes = isinstance(error, sqlalchemy.exc.OperationalError) and "unable to open" not in words
        if passes and not re.search(r"authentication failed|Access denied|does not exist|Unknown database", str(error)):
            raise
        raise UnusableError(f"cannot be used ({words})") from None


def _make(uri: str, path: str | None) -> None:
    """Create MLflow's tables. SQLite's file appears whole or not at all, because half of the migrations would be
    useless."""
    import mlflow

    if path is None:
        mlflow.MlflowClient(tracking_uri=uri).search_experiments(max_results=1)
        return
    new, (place, mark, query) = f"{path}.new", uri.partition("?")
    Path(new).unlink(missing_ok=True)
    # Not by sqlalchemy, which escapes letters and colons: MLflow would make a folder of that name.
    mlflow.MlflowClient(tracking_uri=f"{place}.new{mark}{query}").search_experiments(max_results=1)
    os.replace(new, path)


def _has_tables(uri: str) -> bool:
    """Whether the database has MLflow's tables of this version, or none. Raises UnusableError if it has others."""
    import mlflow
    import sqlalchemy
    from alembic.migration import MigrationContext
    from alembic.script import ScriptDirectory

    script = ScriptDirectory(str(Path(mlflow.__file__).parent / "store" / "db_migrations"))
    wanted, before = script.get_current_head(), ""
    for look in range(_LOOKS):
        with engine_of(uri).connect() as connection:
            tables = set(sqlalchemy.inspect(connection).get_table_names())
            version = "".join(MigrationContext.configure(connection).get_current_heads())
        if version == wanted or not tables - {"alembic_version"}:
            return version == wanted
        if "experiments" not in tables:
            if not version:
                return False  # a schema that MLflow shares with others
            raise UnusableError(
                f"belongs to another program (it has {', '.join(sorted(tables)[:3])} …): give MLflow its own"
            )
        if (look and version == before) or not _knows(script, version):
            break
        before = version  # older, unless another process is creating it now
        time.sleep(_SECONDS_BETWEEN_LOOKS)
    if not _knows(script, version):
        raise UnusableError(
            f"was made by a newer MLflow than the {mlflow.__version__} here (its schema is {version}): install that "
            "version, or name another store in tracking.uri"
        )
    raise UnusableError(
        f"was made by an older MLflow than the {mlflow.__version__} here (its schema is {version}): make a "
        f"copy of it and run `mlflow db upgrade {redacted(uri)}`, or name another store in tracking.uri"
    )


def _knows(script: Any, version: str) -> bool:
    from alembic.util import CommandError

    try:
        return not version or script.get_revision(version) is not None
    except CommandError:
        return False
