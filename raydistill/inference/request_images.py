"""Pictures from requests to `serve`: raw bytes, a form with files, or JSON with base64."""

from __future__ import annotations

import asyncio
import base64
import json
import re
from collections.abc import AsyncGenerator, Iterable
from itertools import islice
from urllib.parse import parse_qsl

from python_multipart.multipart import parse_options_header
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

WANTED = "send a picture's bytes as the body, a form with a file, or JSON with base64 under `image`"
MOST_PICTURES, _MOST_VALUES = 64, 10_000
# The keys in which clients of common servers put a picture, or a list of them.
_KEYS = (
    "instances", "inputs", "images", "image", "b64", "base64", "data", "file", "picture", "image_bytes", "image_base64",
    "content", "body",
)  # fmt: skip
_RAW = ("", "application/octet-stream", "application/x-www-form-urlencoded", "binary/octet-stream")  # the third: curl's
_FIELDS = re.compile(rb"[\w.%\[\]-]{1,64}=[!-~\r\n]*")
_CHARSETS = ("utf-8", "utf8", "us-ascii", "ascii", "iso-8859-1", "latin-1", "windows-1252")
# A body may take this long, and one second more for each of these many bytes.
BODY_SECONDS, BYTES_A_SECOND = 20, 20_000


class RequestImages:
    """Reads bodies. Open requests hold at most `most_held` bytes together."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes, self._most_held, self._held = most_bytes, max(256_000_000, 4 * most_bytes), 0

    async def pictures(self, request: Request) -> tuple[list[bytes], bool]:
        """The pictures, at least one, and whether they came as a list. Raises HTTPException with the reason, and
        ClientDisconnect."""
        encoding = request.headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise HTTPException(415, f"Content-Encoding {encoding[:60]!r} is not supported; send the body uncompressed")
        data = await self._body(request)
        if not data:
            raise HTTPException(400, f"the request has no body; {WANTED}")
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind == "multipart/form-data":
            return await _from_form(request, data)
        if kind == "application/json" or kind.endswith("+json") or (kind in _RAW and data[:1] in b'{["'):
            return _from_json(data)
        if kind == "application/x-www-form-urlencoded" and _FIELDS.fullmatch(data):  # curl's name for pictures too
            return _from_fields(data)
        if kind.startswith(("text/", "audio/", "video/", "multipart/")) or kind.endswith(("xml", "yaml")):
            raise HTTPException(415, f"Content-Type {kind[:60]!r} is not supported; {WANTED}")
        return [data], False

    async def _body(self, request: Request) -> bytes:
        too_long = HTTPException(
            413,
            f"the body has more than {self._most_bytes:,} bytes, the limit of --max-megabytes",
            {"Connection": "close"},
        )
        if int(request.headers.get("content-length", 0)) > self._most_bytes:
            raise too_long
        data, loop = bytearray(), asyncio.get_running_loop()
        began = loop.time()
        try:
            async with asyncio.timeout(BODY_SECONDS) as limit:
                async for part in request.stream():
                    self._held += len(part)
                    data += part
                    if len(data) > self._most_bytes:
                        raise too_long
                    if self._held > self._most_held:
                        raise HTTPException(503, "too many pictures at once; try again later", {"Retry-After": "1"})
                    limit.reschedule(began + BODY_SECONDS + len(data) / BYTES_A_SECOND)
        except TimeoutError:
            raise HTTPException(408, "the body came too slowly; send it again", {"Connection": "close"}) from None
        finally:
            self._held -= len(data)
        return bytes(data)


async def _from_form(request: Request, data: bytes) -> tuple[list[bytes], bool]:
    async def stream() -> AsyncGenerator[bytes, None]:
        for first in range(0, len(data), 1 << 16):  # some forms take seconds; other requests run in between
            yield data[first : first + (1 << 16)]
            await asyncio.sleep(0)

    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8").decode("latin-1")
    if charset.lower() not in _CHARSETS:  # Python decodes some, as idna and punycode, in quadratic time
        raise HTTPException(415, f"charset {charset[:60]!r} is not supported; use utf-8")
    try:
        parser = MultiPartParser(request.headers, stream(), max_files=MOST_PICTURES, max_part_size=len(data))
        form = await parser.parse()
    except (MultiPartException, KeyError, ValueError) as error:
        raise HTTPException(400, f"the form cannot be read: {getattr(error, 'message', error)}") from None
    found = [await value.read() for _, value in form.multi_items() if isinstance(value, UploadFile)]
    texts = [value for name, value in form.multi_items() if isinstance(value, str) and name in _KEYS]
    await form.close()
    found += [_from_base64(text) for text in texts]
    if not found:
        names = _shown(form)
        raise HTTPException(400, f"the form has no file (its fields: {names}); {WANTED}")
    return found, len(found) > 1


def _from_fields(data: bytes) -> tuple[list[bytes], bool]:
    for escape, sign in ((b"%2F", b"/"), (b"%2f", b"/"), (b"%2B", b"+"), (b"%2b", b"+"), (b"%3D", b"=")):
        data = data.replace(escape, sign)  # base64 has many; Python's parser takes a hundred bytes for each
    if data.count(b"&") + data.count(b"%") > _MOST_VALUES:
        raise HTTPException(413, f"the form has more than {_MOST_VALUES:,} fields or escapes; {WANTED}")
    fields = parse_qsl(data.decode("ascii"))
    found = [_from_base64(text.replace(" ", "+")) for name, text in fields if name in _KEYS]  # a + that was not escaped
    if not found:
        names = _shown(name for name, _ in fields)
        raise HTTPException(400, f"the form has no picture (its fields: {names}); {WANTED}")
    return found, len(found) > 1


def _shown(names: Iterable[str]) -> str:
    return ", ".join(repr(name)[:60] for name in islice(names, 5)) or "none"


def _from_json(data: bytes) -> tuple[list[bytes], bool]:
    # Count before parsing: values of a few bytes each would block other requests for seconds.
    if sum(map(data.count, (b",", b"[", b"{"))) > _MOST_VALUES:
        raise HTTPException(413, f"the JSON holds more than {_MOST_VALUES:,} values, such as pixels; {WANTED}")
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        raise HTTPException(400, f"the body is not JSON; {WANTED}") from None
    texts, is_list = _texts(tree)
    if not texts:
        raise HTTPException(400, f"the JSON holds no picture; {WANTED}")
    if len(texts) > MOST_PICTURES:
        raise HTTPException(413, f"{len(texts)} pictures in one request; send at most {MOST_PICTURES}")
    return [_from_base64(text) for text in texts], is_list


def _texts(tree: object, depth: int = 6) -> tuple[list[str], bool]:
    """Every text that may hold a picture, and whether they are in a list."""
    if isinstance(tree, str):
        return [tree], False
    if isinstance(tree, list) and depth:
        return [text for one in tree for text in _texts(one, depth - 1)[0]], True
    if isinstance(tree, dict) and depth:
        for key in _KEYS:
            if key in tree:
                return _texts(tree[key], depth - 1)
        names = _shown(tree)
        raise HTTPException(400, f"the JSON has no key for pictures (it has {names}); {WANTED}")
    raise HTTPException(400, f"the JSON holds {type(tree).__name__} instead of a picture's base64; {WANTED}")


def _from_base64(text: str) -> bytes:
    if text.startswith(("http://", "https://", "file:", "s3://", "gs://")):
        raise HTTPException(400, f"the server does not fetch addresses; {WANTED}")
    if text.startswith("data:"):
        head, _, text = text.partition(",")
        if not head.endswith(";base64"):
            raise HTTPException(400, "the data: URL is not base64; write data:image/png;base64,…")
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except ValueError:
        raise HTTPException(400, f"not base64: {text[:20]!r}; {WANTED}") from None
