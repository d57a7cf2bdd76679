"""Passwords and keys: none is shown, whatever setting, text or error it stands in."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from raydistill.config import RunConfig, known_keys, load_config, shown_yaml
from raydistill.errors import ConfigError
from raydistill.secrets import RedactedStream, has_secret, redacted, redacted_tree


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("at http://me:pw@h:5000/x, says it", "at http://***@h:5000/x, says it"),
        ("https://ghp@github.com/x", "https://***@github.com/x"),
        ("postgresql+psycopg2://me:p@ss/w0?rd#@h:5432/db", "postgresql+psycopg2://***@h:5432/db"),
        ("redis://:pw@[::1]:1/0", "redis://***@[::1]:1/0"),
        ("'http://me:@h/'", "'http://***@h/'"),
        ("https://b/x?X-Amz-Signature=ab/c%3D&X-Amz-Expires=9", "https://b/x?X-Amz-Signature=***&X-Amz-Expires=9"),
        ("https://b/x?a=1&sig=abc#token=3", "https://b/x?a=1&sig=***#token=***"),
        ("postgresql://h/db?user=me&password=x", "postgresql://h/db?user=me&password=***"),
        ("FATAL: host=h password=x port=1", "FATAL: host=h password=*** port=1"),
        ("{'aws_secret_access_key': 'abc', 'n': 1}", "{'aws_secret_access_key': '***', 'n': 1}"),
        ("Authorization: Basic bWU6cHc=", "Authorization: ***"),
        ("abfs://container:pw@account/x", "abfs://***@account/x"),
        ("https://me@x.org:pw@h/a", "https://***@h/a"),
        ("to //me:pw@h/x", "to //***@h/x"),
        ("https://b/x?pass%77ord=abc&a=1", "https://b/x?pass%77ord=***&a=1"),
        ("https://b/x?a=1;SIG=abc", "https://b/x?a=1;SIG=***"),
        ("https://b/?next=https%3A%2F%2Fme%3Apw%40h%2Fx%3Ftoken%3Dab", "https://b/?next=https%3A%2F%2F***%40h%2Fx%3Ftoken%3D***"),
        ("https://b/x?X-Goog-Credential=a&X-Goog-Date=9", "https://b/x?X-Goog-Credential=***&X-Goog-Date=9"),
        ("https://b/x?Policy=ab&Key-Pair-Id=cd&Expires=9", "https://b/x?Policy=***&Key-Pair-Id=***&Expires=9"),
        ('{"account_key": "abc", "a": 1}', '{"account_key": "***", "a": 1}'),
        ("AccountName=x;AccountKey=ab==;EndpointSuffix=y", "AccountName=x;AccountKey=***;EndpointSuffix=y"),
        ("env_vars={'HF_TOKEN': 'abc', 'A': 'b'}", "env_vars={'HF_TOKEN': '***', 'A': 'b'}"),
        ("X-Api-Key: abc", "X-Api-Key: ***"),
        ("tool --password abc --user me", "tool --password *** --user me"),
        ("https://b/cb?code=4/0AX&state=1", "https://b/cb?code=***&state=1"),
        ("cannot reach https://me:pw", "cannot reach https://me:***"),
        ("postgresql://me:pw/db?a=1", "postgresql://me:***"),
        ("redis://:123456", "redis://:***"),
        ("tune.storage=me:p@ss/w?r#d@h:5432/db", "tune.storage=me:***@h:5432/db"),
        ("(me@x.org:pw@h)", "(me@x.org:***@h)"),
        ("Password for 'https://me@h': abc", "Password for 'https://***@h': ***"),
        ("no Password for 'https://abc@h': terminal off", "no Password for 'https://***@h': terminal off"),
        ("pip: ['git+ssh://me:pw@h/a.git']", "pip: ['git+ssh://***@h/a.git']"),
    ],
)  # fmt: skip
def test_secrets_are_hidden_where_they_stand(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert has_secret(text)


@pytest.mark.parametrize(
    "text",
    [
        "http://127.0.0.1:5000/#/experiments/1", "sqlite:////home/ann@work/mlflow.db", "s3://bucket/a@2x.png",
        "abfs://container@account.dfs.core.windows.net/x", "http://[::1]:80/a@b", "give key=value or tune.trials=30",
        "set RAY_AUTH_TOKEN, or write it to ~/.ray/auth_token", "timm:resnet10t", "see: https://x.org. Mail: a@b.org",
        "folder//a:b/c.png", "https://h/x?key2=a&size=3&monkeys=2", "teacher.password: unknown key",
        "images.classes=/etc/passwd: is no file", "http://h:80/?a=1#top",
        "a server's http://HOST:PORT", "http://h:5000: refused, http://h:5000, or ray://h:10001.", "12:30@cam.png",
        "s3://arn:aws:s3:us-west-2:123:accesspoint/x", "git@github.com:org/repo.git", "python:3.11@sha256:ab",
        "mailto:ann@b.org", "hf:org/model@main", "zip://a.png::https://h/x.zip", "https://h/x?zipcode=1",
        "fatal: could not read Username for 'https://h': No such device", "C:\\ann@work", "http://fe80::1/",
    ],
)  # fmt: skip
def test_what_holds_no_secret_is_as_it_was(text: str) -> None:
    assert redacted(text) == text
    assert not has_secret(text)


URIS = (
    "http://me:{0}@127.0.0.1:9", "postgresql+psycopg2://{0}@h/db", "sftp://:{0}@h/a", "https://h/x.parquet?sig={0}&x=1",
    "s3://bucket/x?X-Amz-Security-Token={0}", "https://h/#access_token={0}", "mysql://h/db?user=me&password={0}",
    "https://h/cb?state=1&code={0}", "https://me:{0}", "postgresql://me:{0}/db", "me:{0}@h:5432/db?",
)  # fmt: skip


@given(
    key=st.sampled_from(sorted(known_keys())),
    uri=st.sampled_from(URIS),
    tail=st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, categories=("L", "N", "P", "S")), max_size=20),
    escaped=st.booleans(),
    as_list=st.booleans(),
)
@example(key="tracking.uri", uri=URIS[0], tail="p@ss/w?r#d", escaped=False, as_list=False)
@example(key="tune.storage", uri=URIS[0], tail="\"'\\${x}", escaped=False, as_list=False)
@example(key="distill.epochs", uri=URIS[0], tail="", escaped=False, as_list=False)
@example(key="images.path", uri=URIS[0], tail=": [", escaped=False, as_list=True)
def test_no_password_of_any_setting_is_shown(key: str, uri: str, tail: str, escaped: bool, as_list: bool) -> None:
    password = f"q7Zw9{tail}"
    if "user=" in uri or "?" in uri or "#" in uri:
        password = quote(password, safe="")  # else an & would end it
    value = uri.format(quote(password, safe="") if escaped else password)
    words = [f"{key}=[{value}]" if as_list else f"{key}={value}"]
    words += [] if key == "images.path" else ["images.path=x"]
    try:
        config = load_config(words)
    except ConfigError as error:
        said = str(error)
    else:
        said = shown_yaml(config) + str(redacted_tree(config.model_dump(mode="json")))
        assert RunConfig.model_validate(config.model_dump()) == config  # the run itself has the real one
    said += redacted(f"cannot connect to {value}: no host {value.partition('@')[2]} ({value!r})")
    said += str(ConfigError(f"{words[0]}: no"))
    assert "q7Zw9" not in said


def test_a_stream_hides_what_libraries_print() -> None:
    print("at http://me:pw@h", file=RedactedStream(sink := io.StringIO()))
    assert sink.getvalue() == "at http://***@h\n"


def test_secrets_of_the_environment_are_hidden(monkeypatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "q7Zw9-token")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "q7Zw9/secret+key")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://me:q7Zw9-pass@h")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/home/ann/token")
    text = redacted("server said: q7Zw9-token, q7Zw9/secret+key and q7Zw9-pass; see /home/ann/token")
    assert text == "server said: ***, *** and ***; see /home/ann/token"


def test_the_command_line_shows_no_password(tmp_path) -> None:
    words = [
        "tracking.uri=http://me:q7Zw9@h",
        "tune.storage=mysql://h/x?password=q7Zw9",
        f"images.path={tmp_path}/none",
    ]
    for extra in ([], ["distill.epochs=http://me:q7Zw9@h"]):
        command = [sys.executable, "-m", "raydistill", "show", *words, *extra]
        ended = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"RAYDISTILL_TRACEBACK": "1"})
        assert ended.returncode == 2
        assert "q7Zw9" not in ended.stdout + ended.stderr
    assert "***" in ended.stderr
