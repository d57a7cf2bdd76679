"""Hides passwords, keys and tokens in every text that raydistill shows.

They are in the URIs that a job names (a tracking server, a database, signed links to images), and libraries repeat
those in their errors. So everything printed, stored, logged or raised passes through `redacted`.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO
from urllib.parse import quote, quote_plus, unquote

from raydistill.escaping import for_terminal, printable

HIDDEN = "***"
_END = r"\s'\"<>`"  # characters that end a URI in a text
# A port is no password. A raw password may hold / ? # and @, so it reaches to the last @.
_USER_INFO = (
    r"(?!\[[\d.:a-fA-F]+\])(?P<user>[^/?#:{end}]*)(?P<password>:(?!\d{{1,5}}(?:[/?#{end}]|$))[^{end}]{{0,300}})?@"
)
_IN_TEXT = re.compile(r"(?P<scheme>(?:\b[A-Za-z][A-Za-z0-9.+-]*:)?//)" + _USER_INFO.format(end=_END))
_WHOLE = re.compile(r"(?P<scheme>\b[A-Za-z][A-Za-z0-9.+-]*://)" + _USER_INFO.format(end=r"\0"))
_CONTAINERS = ("abfs://", "abfss://", "wasb://", "wasbs://")  # before their @ is a container, not a user
_NAMES = re.compile(
    r"(?i)[\w.%-]*(?:token|secret|signature|credential|passw|passphrase|pwd|auth|jwt|session)[\w.%-]*"
    r"|[\w.%-]*key(?:[-_]?(?:pair[-_]?)?id)?|sig|sas|pass|pw|psw|pin|otp|hmac|policy|googleaccessid|creds?|ticket"
    r"|(?:(?:device|user)_?)?code|code_verifier|(?:client_)?assertion|saml(?:request|response)"
)
# A URI may be the value in a query, and is then percent-quoted.
_QUERY = re.compile(
    rf"(?i)(?P<name>(?:[?&;#]|%3F|%26)(?:amp;)?(?P<key>[^\s=&;?#/]{{1,60}}?)(?:=|%3D))(?P<value>(?:(?!%26)[^&;#{_END}])+)"
)
_QUOTED = re.compile(rf"(?i)(?P<name>%3A%2F%2F)(?P<value>(?:(?!%2F|%40)[^&;#{_END}]){{1,300}})(?=%40)")
_ASSIGNED = re.compile(
    r"(?i)(?P<name>\b[\w.-]{0,60}?(?:password|passwd|secret|token|(?:access|account|api|private|shared)[_-]?key)[\w-]{0,60}"
    r"(?:\s?=\s?['\"]?|['\"]\s?:\s?['\"])|--(?:password|token|secret|api-key)\s+"
    r"|(?<![/\w])passw(?:or)?d(?: for '[^']{0,300}')?: (?!unknown|terminal|No such))"
    r"(?P<value>[^\s'\"&;,)}\]]+)"
)
# Half a URI: without the host, or without the part before the user. A port, a time, half of an IPv6 address and a
# bucket's ARN are not passwords.
_HOSTLESS = re.compile(
    rf"(?P<name>\b[A-Za-z][A-Za-z0-9.+-]*://(?!arn:)[^/?#:@{_END}]*:)"
    rf"(?P<value>(?![:$({{]|\d{{1,5}}(?!\w)|HOST|PORT)[^@{_END}]+)(?![^{_END}]*@)"
)
_BARE = re.compile(
    r"(?P<name>(?<![\w/.%+-])(?!(?:[\w-]*mail(?:to)?|xmpp|sips?|contact|author|timm|hf|hf-hub|example):)[\w.%+-]+:)"
    rf"(?P<value>(?![/\\:]|\d+[@/?#])[^{_END}]{{1,300}})(?=@(?!sha\d)[\w\[])"
)
_HEADER = re.compile(
    r"(?i)(?P<name>\b(?:authorization|(?:x-)?api-key|x-[\w-]{0,60}?token|cookie)['\"]?\s?[:=]\s?['\"]?)"
    r"(?P<value>(?:(?:basic|bearer) )?[^\s'\",}]+)"
)
_SHAPES = re.compile(r"\b(?:hf_[A-Za-z0-9]{20,}|gh[pousr]_[A-Za-z0-9]{30,}|(?:AKIA|ASIA)[0-9A-Z]{16})\b")
_VARIABLE = re.compile(r"(?:^|_)(?:TOKEN|SECRET|PASSWORD|PASSWD|KEY|CREDENTIALS?)(?:_ID)?$")
# Shorter secrets are found by their place only: a word of three letters would be hidden everywhere.
_LEAST, _LEAST_OF_ENVIRONMENT = 4, 8
_known: set[str] = set()


def redacted(text: str) -> str:
    """The text with *** for each password, key and token: found by its place, by its form, or because `remember` or the
    environment knows it."""
    for secret in sorted(_known | _of_environment(), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return without_secrets(text)


def without_secrets(text: str) -> str:
    """Like `redacted`, but from the text alone, so the result is the same in every process."""
    if "//" in text:
        text = _IN_TEXT.sub(_hide_user, text)
    text = _QUERY.sub(_hide_value, text)
    for pattern in (_QUOTED, _ASSIGNED, _HEADER, _HOSTLESS, _BARE):
        text = pattern.sub(rf"\g<name>{HIDDEN}", text)
    return _SHAPES.sub(HIDDEN, text)


def redacted_tree(value: Any, hide: Callable[[str], str] = redacted) -> Any:
    """Mappings and sequences with every text in them redacted. A text that is one URI is treated as a whole."""
    if isinstance(value, str):
        return hide(_WHOLE.sub(_hide_user, value) if _is_uri(value) else value)
    if isinstance(value, Mapping):
        return {key: redacted_tree(item, hide) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redacted_tree(item, hide) for item in value]
    return value


def for_page(value: Any) -> Any:
    """For Jinja's `finalize`: each text of a template, redacted and printable. Markup stays as it is."""
    return printable(redacted(value)) if type(value) is str else value


def has_secret(value: str) -> bool:
    """Whether a setting holds a password, a key or a token."""
    return bool(set(_secrets_of(value))) or without_secrets(value) != value


def remember(values: Iterable[str]) -> None:
    """Make `redacted` hide the secrets in these settings from now on, even if a library shows only the secret."""
    for value in values:
        for secret in _secrets_of(value):
            forms = {secret, unquote(secret), quote(secret), quote(secret, safe=""), quote_plus(secret)}
            forms |= {form for one in (secret, unquote(secret)) for form in (json.dumps(one)[1:-1], repr(one)[1:-1])}
            _known.update(form for form in forms if len(form) >= _LEAST)


def texts_in(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from texts_in(item)
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from texts_in(item)


class RedactedStream:
    """A text stream that writes text `redacted` and without escapes. The output of libraries goes through it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(for_terminal(redacted(text)))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _is_uri(value: str) -> bool:
    return re.match(r"[A-Za-z][A-Za-z0-9.+-]*://", value) is not None


def _hide_user(found: re.Match[str]) -> str:
    if found["password"] is None and found["scheme"].lower() in _CONTAINERS:
        return found[0]
    return f"{found['scheme']}{HIDDEN}@" if found["user"] or found["password"] else found[0]


def _secrets_of(value: str) -> Iterator[str]:
    for found in _WHOLE.finditer(value) if _is_uri(value) else _IN_TEXT.finditer(value):
        if found["password"] is not None:
            password = found["password"][1:]
            yield password
            if "@" in password:  # a library that reads to the first @ shows the rest as the host
                yield from password.split("@")
        elif found["scheme"].lower() not in _CONTAINERS and len(found["user"]) >= _LEAST_OF_ENVIRONMENT:
            yield found["user"]
    yield from (found["value"] for found in _QUERY.finditer(value) if _is_secret(found))
    for pattern in (_QUOTED, _ASSIGNED, _HOSTLESS, _BARE):
        yield from (found["value"] for found in pattern.finditer(value))


def _hide_value(found: re.Match[str], within: bool = True) -> str:
    """Hide the value if its key names a secret. Otherwise it may be a quoted URI that holds one."""
    value = found["value"]
    inner = _QUERY.sub(lambda part: _hide_value(part, False), value) if within else value
    return found["name"] + (HIDDEN if _is_secret(found) else inner)


def _is_secret(found: re.Match[str]) -> bool:
    return _NAMES.fullmatch(unquote(found["key"])) is not None


def _of_environment() -> set[str]:
    """The values of variables with names such as HF_TOKEN and AWS_SECRET_ACCESS_KEY."""
    found = {os.environ.get(name, "") for name in _secret_variables(tuple(os.environ))}
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        if value := os.environ.get(name):
            found.update(_secrets_of(value))
    return {value for value in found if len(value) >= _LEAST_OF_ENVIRONMENT}


@functools.lru_cache(maxsize=4)
def _secret_variables(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if _VARIABLE.search(name)]
