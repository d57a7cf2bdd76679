"""What a job may carry off: the package's own code, and small files that are what they seem to be."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from raydistill.errors import ConfigError
from raydistill.secrets import has_secret

_CODE = (".py", ".html", "py.typed")  # of the package, with the pages that it fills in
# Files that hold keys or passwords, by the names that tools give them.
_PRIVATE = re.compile(
    r"(?i)\.(pem|key|p12|pfx|jks|keystore|kdbx|ppk|gpg|asc|ovpn|env)$|^id_(rsa|dsa|ecdsa|ed25519)|^_?netrc$|kubeconfig"
    r"|^(auth_)?token$|credential|secret|passw|service[-_]?account.*\.json$"
)
_PRIVATE_FOLDERS = {".ssh", ".aws", ".gnupg", ".kube", ".docker", ".azure", ".git", "gcloud"}
_KEY = re.compile(rb"-----BEGIN [A-Z0-9 ]*PRIVATE KEY")
_LOOKED_AT = 1024**2


def code_of(source: Path) -> tuple[list[str], list[str]]:
    """The files of the package that travel, and what else lies in its folder: what is no code, what is hidden or looks
    like a key, links that lead out of it, and what the repository that it may lie in ignores."""
    ignored, code, left_out = _ignored(source), list[str](), list[str]()
    for folder, folders, files in os.walk(source):  # it enters no link
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
    """By git, where it is there and the folder is in a repository."""
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
    """What the job names is sent as it is, so it must be what it seems to be and, unless it `may_lie_outside`, lie in
    the folder where the command was given. Raises ConfigError."""
    named, here = Path(os.path.abspath(value)), Path.cwd()
    real = named.resolve()
    home = named.parent if may_lie_outside and not named.is_relative_to(here) else here
    if not real.is_relative_to(home.resolve()):
        raise ConfigError(
            f"{key}={value}: is {real}, outside of {home}, and what is submitted can be read by all who reach the "
            "cluster; copy it into that folder, or give --send-outside"
            + (" and name the file itself, not a link" if may_lie_outside else "")
        )
    by_name = any(_PRIVATE.search(path.name) or path.name.startswith(".") for path in (named, real))
    text = real.read_bytes()[:_LOOKED_AT].decode(errors="replace")
    if by_name or _PRIVATE_FOLDERS.intersection(real.parts) or _holds_key(real) or has_secret(text):
        raise ConfigError(
            f"{key}={value}: is, or looks like, a file of keys or passwords, and a job's files can be read by all who "
            "reach the cluster; name a file that holds nothing else than what the key is for"
        )
