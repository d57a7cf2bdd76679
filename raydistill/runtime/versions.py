"""Which versions of libraries are installed where this runs."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import metadata

# They decide what a stage's files hold.
PACKAGES = ("raydistill", "ray", "torch", "timm", "transformers", "diffusers", "numpy", "pyarrow")


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions by name; `none` of what is not installed. Builds of one version for CPUs and GPUs go together."""
    versions: dict[str, str] = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name).partition("+")[0]
        except metadata.PackageNotFoundError:
            versions[name] = "none"
    return versions
