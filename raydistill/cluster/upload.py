"""The upload of a job: the package's own code, the resolved job file, and small files that are checked first."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill import errors
from raydistill.cluster.nodes import PLACES
from raydistill.config import RunConfig, overlay, to_yaml
from raydistill.config.keys import flattened
from raydistill.config.shipped import find_shipped
from raydistill.errors import ConfigError, did_you_mean, near_path
from raydistill.graph import STAGES
from raydistill.secrets import has_secret, texts_in

COMMANDS = ("run", *(stage.name for stage in STAGES), "compare", "tune")
# The package has about 1 MiB. Anything that makes an upload large is not a job file.
_MOST_BYTES = 16 * 1024**2
_JOB_FILE = "job.yaml"
# Keys that name small text files, which are uploaded with the job.
_SHIPPED = ("images.classes", "generate.names", "tune.space")

_CODE = (".py", ".html", ".css", "py.typed")  # of the package, with the templates of its pages
# Files that hold keys or passwords, by the names that tools give them.
_PRIVATE = re.compile(
    r"(?i)\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|gpg|asc|ovpn|env)$|^id_(rsa|dsa|ecdsa|ed25519)|^_?netrc$|kubeconfig"
    r"|^(auth_)?token$|credential|secret|passw|service[-_]?account.*\.json$"
)
_PRIVATE_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", ".git", "gcloud"}
_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
_LOOKED_AT = 1024**2


@dataclass(frozen=True)
class Package:
    """One upload: a folder, its files with their bytes, the command, and the id made from them."""

    folder: str
    files: list[tuple[str, int]]
    entrypoint: str
    id: str
    left_out: tuple[str, ...] = ()  # files in the package's folder that are not its code

    @property
    def size(self) -> int:
        return sum(size for _, size in self.files)


def pack(
    config: RunConfig, command: str, flags: tuple[str, ...], folder: str, python: str = "python",
    send_outside: bool = False,
) -> Package:  # fmt: skip
    """Copy what the job needs into an empty folder.

    Raises ConfigError: a secret in the config; a file that is missing, or outside the current folder without
    `send_outside`; or an upload above the limit.
    """
    if command not in COMMANDS:
        raise ConfigError(f"submit: {command!r} is not a command of a job{did_you_mean(command, COMMANDS)} "
                          f"(known: {', '.join(COMMANDS)})")  # fmt: skip
    _refuse_secrets(config)
    config = _on_the_cluster(config, folder, send_outside)
    Path(folder, _JOB_FILE).write_text(to_yaml(config))
    source = Path(errors.__file__).parent
    code, left_out = package_files(source)
    for name in code:
        target = Path(folder, "raydistill", name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target)
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    files = [(str(path.relative_to(folder)), path.stat().st_size) for path in paths]
    digest = hashlib.sha256(" ".join([command, *flags]).encode())
    for path in paths:
        digest.update(f"\n{path.relative_to(folder)}\n".encode() + path.read_bytes())
    package = Package(
        folder,
        sorted(files, key=lambda file: -file[1]),
        shlex.join([python, "-m", "raydistill", command, _JOB_FILE, *flags]),
        re.sub(r"[^A-Za-z0-9_.-]", "-", f"{config.name}-{command}-{digest.hexdigest()[:10]}"),
        tuple(left_out),
    )
    if package.size > _MOST_BYTES:
        largest = ", ".join(f"{name} {size:,} bytes" for name, size in package.files[:3])
        raise ConfigError(
            f"submit: the job would upload {package.size:,} bytes, above {_MOST_BYTES:,} ({largest}); "
            "images and weights belong where all nodes can read them"
        )
    return package


def _refuse_secrets(config: RunConfig) -> None:
    for key, value in flattened(config.model_dump(mode="json")):
        if any(map(has_secret, texts_in(value))):
            raise ConfigError(
                f"submit: {key} holds a password or a key, and everybody who reaches the cluster can read its files; "
                "leave it out, and set it in the nodes' environment (MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, AWS_… or an instance profile)"
            )


def _on_the_cluster(config: RunConfig, folder: str, send_outside: bool) -> RunConfig:
    """The config as the job reads it: small files beside it, local paths absolute, and the cluster joined."""
    tree: dict[str, Any] = {"cluster": {"address": config.cluster.address or "auto"}}
    for key in (*_SHIPPED, "workspace", *PLACES):
        section, _, name = key.rpartition(".")
        holder = getattr(config, section) if section else config
        value = None if holder is None else getattr(holder, name)
        if not isinstance(value, str) or "://" in value or value.startswith("example:"):
            continue
        if key in _SHIPPED:
            place = find_shipped(value) if key == "tune.space" else value
            if not os.path.isfile(place):
                raise ConfigError(f"{key}={value}: no such file{near_path(value)}")
            if place == value:  # the user's own file
                refuse_private(key, value, send_outside)
            new = f"files/{key}{Path(place).suffix}"
            Path(folder, "files").mkdir(exist_ok=True)
            shutil.copyfile(place, Path(folder, new))
        elif key in ("workspace", "images.path") or os.path.exists(value):
            new = os.path.abspath(os.path.expanduser(value))
        else:
            continue  # the name of a model
        (tree.setdefault(section, {}) if section else tree)[name] = new
    return overlay(config, tree)


def package_files(source: Path) -> tuple[list[str], list[str]]:
    """The package's files to upload, and those left out: files that are not code, are hidden, hold a key, are links out
    of the folder, or are ignored by the repository around it."""
    ignored, code, left_out = _ignored(source), list[str](), list[str]()
    for folder, folders, files in os.walk(source):  # does not enter links
        hidden = {name for name in folders if name.startswith(".") or Path(folder, name).is_symlink()}
        left_out += (f"{Path(folder, name).relative_to(source)}/" for name in hidden)
        folders[:] = [name for name in folders if name not in hidden and name != "__pycache__"]
        for file in (Path(folder, name) for name in files):
            name = str(file.relative_to(source))
            is_ours = file.resolve().is_relative_to(source.resolve()) and name not in ignored
            travels = is_ours and file.name.endswith(_CODE) and not name.startswith(".") and not _holds_key(file)
            (code if travels else left_out).append(name)
    return sorted(code), sorted(left_out)


def _ignored(source: Path) -> set[str]:
    """By git, if git is installed and the folder is in a repository."""
    words = ["git", "-C", str(source), "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--", "."]
    try:
        listed = subprocess.run(words, capture_output=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return set()
    return set(listed.decode(errors="surrogateescape").split("\0"))


def _holds_key(file: Path) -> bool:
    with file.open("rb") as opened:
        return _KEY.search(opened.read(_LOOKED_AT)) is not None


def refuse_private(key: str, value: str, may_lie_outside: bool = False) -> None:
    """Raises ConfigError if a file that the job names looks private or, unless it `may_lie_outside`, is not in the
    current folder."""
    named, here = Path(os.path.abspath(value)), Path.cwd()
    real = named.resolve()
    home = named.parent if may_lie_outside and not named.is_relative_to(here) else here
    if not real.is_relative_to(home.resolve()):
        raise ConfigError(
            f"{key}={value}: is {real}, outside {home}, and everybody who reaches the cluster can read it; "
            "copy it into that folder, or give --send-outside"
            + (" and name the file itself, not a link" if may_lie_outside else "")
        )
    by_name = any(_PRIVATE.search(path.name) or path.name.startswith(".") for path in (named, real))
    text = real.read_bytes()[:_LOOKED_AT].decode(errors="replace")
    if by_name or _PRIVATE_FOLDERS.intersection(real.parts) or _holds_key(real) or has_secret(text):
        raise ConfigError(
            f"{key}={value}: is, or looks like, a file of keys or passwords, and everybody who reaches the cluster "
            "can read a job's files; name a file that holds only what this setting needs"
        )
