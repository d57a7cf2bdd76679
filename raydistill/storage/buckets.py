"""The addresses of buckets: which protocols have them, and which addresses name one."""

from __future__ import annotations

import re

from raydistill.errors import ConfigError

# What to install for a protocol: `pip install 'raydistill[s3]'`.
EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "az": "azure", "abfs": "azure", "abfss": "azure"}
_KEYS_IN_ADDRESS = re.compile(r"\w+://(?!arn:)[^/@:]*:[^@]*@")
# These have no folders, but buckets, which only their owner makes.
WITH_BUCKETS = frozenset({*EXTRAS, "adl", "oci", "oss", "hf"})
_BUCKET = re.compile(r"\w+://(?:arn:[\w:/.-]+|[\w.-]+(?:@[\w.-]+)?)(?:/|$)")


def refuse_odd_bucket(path: str) -> None:
    """Raises ConfigError if the address of a bucket holds keys, or names no bucket."""
    protocol = path.partition("://")[0]
    if protocol in EXTRAS and _KEYS_IN_ADDRESS.match(path):
        raise ConfigError(
            f"{path}: do not put keys into a bucket's address; set them in the environment, as AWS_… or a profile"
        )
    if protocol in WITH_BUCKETS and not _BUCKET.match(path):
        raise ConfigError(
            f"{path}: no bucket is named; write {protocol}://BUCKET/FOLDER (letters, digits, dots and dashes)"
        )


def no_bucket(place: str) -> str:
    return f"there is no bucket {place.lstrip('/').partition('/')[0]!r}; make it, or correct the name"
