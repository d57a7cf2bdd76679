"""The versions of installed libraries."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

# they decide the content of a stage's files
PACKAGES = ("raydistill", "ray", "torch", "timm", "transformers", "diffusers", "numpy", "pyarrow")


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions by name; `none` if not installed. Builds of one version for CPUs and GPUs count as the same."""
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions
