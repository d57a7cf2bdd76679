"""The JSON that stages leave in a workspace, read as something that anybody may have written: workspaces are shared."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Hashable
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from raydistill.errors import CheckpointError
from raydistill.storage.filesystems import read_bytes

T = TypeVar("T")


def read_json(path: str, shape: type[T]) -> T:
    """A file that is of the `shape`. Raises CheckpointError where it is no JSON or of another one."""
    return from_json(read_bytes(path), path, shape)


def from_json(data: bytes | str, path: str, shape: type[T]) -> T:
    """The same of its bytes. A dataclass has all of its fields and no others."""
    try:
        value = json.loads(data)
        if dataclasses.is_dataclass(shape) and isinstance(value, dict):
            if odd := value.keys() - {field.name for field in dataclasses.fields(shape)}:
                raise ValueError(f"{sorted(odd)[0]!r:.60} is no part of it")
        return shape_of(cast(Hashable, shape)).validate_json(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][:4])) or "the whole"
        raise of_another_form(path, f"{where[:60]}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise of_another_form(path, f"{error}"[:200]) from None


def result_of(done: dict[str, Any], path: str, shape: type[T]) -> T:
    """The result that a stage's DONE holds, in the directory `path`."""
    return from_json(json.dumps(done), f"{path}/DONE", shape)


def of_another_form(path: str, reason: str) -> CheckpointError:
    folder = path.rpartition("/")[0]
    return CheckpointError(
        f"{path} is not what raydistill writes ({reason}); delete {folder} and run the command again"
    )


@lru_cache
def shape_of(shape: Any) -> TypeAdapter[Any]:
    return TypeAdapter(shape)
