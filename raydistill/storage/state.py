"""Reads the JSON that stages leave in a workspace. Workspaces are shared, so anybody may have written it."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import re
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError

from raydistill.errors import CheckpointError
from raydistill.escaping import one_line, shortened
from raydistill.storage.filesystems import open_filesystem, read_file
from raydistill.yaml_files import no_key_twice

T = TypeVar("T")
# Values: a million classes, and a million others. One of two bytes in the file may take 250 in memory.
MOST_BYTES, MOST_VALUES = 32 * 1024**2, 1 << 21
_QUOTED = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
# pydantic's messages about a value, and the end of a sentence that begins with the value's path.
_WORDS = (
    ("^Input should be an? valid (dictionary|instance).*", "has to be a mapping"), ("^Input should be ", "has to be "),
    ("^Field required", "is missing"), ("^Value error, ", "is wrong: "), (", unable to parse.*", ""),
    ("^(List|Tuple|Set|Dictionary|String|Data) should", "has to"), (" after validation, not .*", ""),
    ("a valid integer", "a whole number"), ("a valid string", "text"), ("a valid (list|tuple|array)", "a list"),
    ("a valid boolean", "true or false"), ("an object", "a mapping"),
)  # fmt: skip
# The system's errors for files that no stage writes: too large, not a regular file, behind odd links.
_UNUSUAL = {errno.EFBIG, errno.EINVAL, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.ENODEV}


def _of_an_epoch(record: dict[str, float]) -> dict[str, float]:
    for name, needed in (("epoch", True), ("step", True), ("kept_epoch", False)):
        if (needed or name in record) and not 0 <= record.get(name, -1) < 2**53:
            raise ValueError(f"{name} is not a count")
    return record


# The record of an epoch. Losses may be NaN: the scaler of fp16 skips some steps.
EpochRecord = Annotated[dict[str, float], AfterValidator(_of_an_epoch)]


def read_state(path: str, shape: type[T], any_float: bool = False, most_bytes: int = MOST_BYTES) -> T | None:
    """A file of the `shape`; None if it is missing. Raises CheckpointError if it has another shape, is too large or not
    a regular file."""
    fs, place = open_filesystem(path)
    try:
        data = fs.read(place, most_bytes)
    except OSError as error:
        if error.errno not in _UNUSUAL:  # the system or the connection failed: not a reason to delete anything
            raise
        raise of_another_form(path, str(error.strerror)) from None
    return None if data is None else from_json(data, path, shape, any_float)


def read_json(path: str | Path, shape: type[T], any_form: bool = False) -> T:
    """A local file that no stage wrote here; in `any_form`, with NaN and repeated keys, as other tools write them.
    Raises OSError, ValueError with the reason in one line."""
    return parsed(read_file(str(path), MOST_BYTES), shape, any_form, any_form)


def needed_state(path: str, shape: type[T], any_float: bool = False, most_bytes: int = MOST_BYTES) -> T:
    """Like `read_state`, for a file that has to exist."""
    if (state := read_state(path, shape, any_float, most_bytes)) is None:
        raise of_another_form(path, "it is not there")
    return state


def from_json(data: bytes | str, path: str, shape: type[T], any_float: bool = False) -> T:
    """The same from the file's bytes."""
    try:
        return parsed(data, shape, any_float)
    except ValueError as error:
        raise of_another_form(path, str(error)) from None


def parsed(data: bytes | str, shape: type[T], any_float: bool = False, any_keys: bool = False) -> T:
    """JSON of the `shape`: UTF-8 without half characters, no repeated key, no deeper than 200, no more than
    MOST_VALUES. A dataclass has all of its fields and no others; numbers are finite, unless `any_float`. Raises
    ValueError with the reason in one line."""
    _refuse_many_values(data if isinstance(data, bytes) else data.encode(errors="surrogatepass"))
    try:
        text = data if isinstance(data, str) else data.decode()
        hooks: dict[str, Any] = {} if any_float else {"parse_constant": _refuse_constant, "parse_float": _finite}
        value = json.loads(text, object_pairs_hook=None if any_keys else no_key_twice, **hooks)
        if dataclasses.is_dataclass(shape) and isinstance(value, dict):
            if odd := value.keys() - {field.name for field in dataclasses.fields(shape)}:
                raise ValueError(f"{sorted(odd)[0]!r:.60} does not belong to it")
        del value, text  # the tree is never held twice
        return _adapter(cast(Hashable, shape)).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = shortened(one_line(".".join(map(str, first["loc"][:4]))), 60) or "the whole"
        raise ValueError(f"{where} {_in_our_words(first['msg'])}"[:200]) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except ValueError as error:
        raise ValueError("a number has too many digits" if "digits" in str(error) else f"{error}"[:200]) from None


def _refuse_many_values(data: bytes) -> None:
    """Checked before any value is made."""
    if _count(data) > MOST_VALUES and _count(_QUOTED.sub(b"", data)) > MOST_VALUES:  # names may contain commas
        raise ValueError(f"it holds more than {MOST_VALUES:,} values")


def _count(data: bytes) -> int:
    return sum(map(data.count, (b",", b"[", b"{")))


def result_of(done: dict[str, Any], path: str, shape: type[T]) -> T:
    """The result that a stage's DONE holds, in the directory `path`."""
    return from_json(json.dumps(done), f"{path}/DONE", shape)


def of_another_form(path: str, reason: str) -> CheckpointError:
    folder = path.rpartition("/")[0]
    whole = (
        path if folder.endswith(("/runs", "/precision")) else folder
    )  # beside it are those of other runs, of other networks
    return CheckpointError(f"{path} is not what raydistill writes ({reason}); delete {whole} and run the command again")


def _in_our_words(message: str) -> str:
    for theirs, ours in _WORDS:
        message = re.sub(theirs, ours, message)
    return message


def _refuse_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text:.20} is not a finite number")
    return number


@lru_cache
def _adapter(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
