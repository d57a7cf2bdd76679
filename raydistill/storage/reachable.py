"""Whether remote storage answers, before a command begins its work."""

from __future__ import annotations

from raydistill.errors import ConfigError, StorageError, reason_of
from raydistill.storage.buckets import no_bucket
from raydistill.storage.filesystems import open_filesystem
from raydistill.storage.retries import code_of


def refuse_unreachable(path: str, key: str) -> bool:
    """Ask remote storage once, so that a wrong address, a refused key or a missing bucket shows within seconds. Returns
    whether it has a file there. Raises ConfigError, which names the config key."""
    if "://" not in path:
        return False
    fs, place = open_filesystem(path, patience=0)
    bucket, _, inside = place.strip("/").partition("/")
    try:
        if not fs.has_buckets:
            return bool(fs.info(place)["type"] == "file")
        if not inside:
            fs.info(bucket)
        else:  # the answer to a request for a file says why it is refused; one for facts has no room for that
            fs.begin(place, 1)
        return bool(inside)
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):  # fsspec's error for a web server that does not answer
            raise ConfigError(f"{key}={path}: no server answers there ({error.__cause__})") from None
        code = code_of(error)
        if fs.has_buckets and (code == "NoSuchBucket" or (code != "NoSuchKey" and not fs.exists(bucket))):
            raise ConfigError(f"{key}={path}: {no_bucket(place)}") from None
    except (OSError, StorageError) as error:
        raise ConfigError(f"{key}={path}: {reason_of(error)}") from None
    return False
