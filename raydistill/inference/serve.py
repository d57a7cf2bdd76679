"""serve: an exported student behind HTTP on this machine, for a trial and for products on the same machine.

`GET /` is a page for trying pictures, `GET /health` gives the model and its classes, `POST /predict` takes pictures
(request_images.py) and returns classes, their numbers and probabilities. Requests within a few milliseconds share a
batch.
`GET /ready` sends a white picture through the network; `/metrics` and `/openapi.json` are for programs (metrics.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import AsyncIterator, Collection
from typing import Any

import numpy as np
from anyio import CapacityLimiter, to_thread
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from raydistill.errors import DataError
from raydistill.inference.metrics import PATHS, Metrics, openapi
from raydistill.inference.predict import Predictor
from raydistill.inference.predictions import Answer, best
from raydistill.inference.request_images import WANTED, RequestImages
from raydistill.inference.sockets import ServeSettings, host_name
from raydistill.pages.templates import page
from raydistill.runtime.cgroups import num_cores

_TOP = 5
_READY_SECONDS = 5.0
_GONE = 499  # nginx's code for a client that left before its answer
_ADVICE = {404: f"the paths are {', '.join(PATHS)}", 405: f"POST to /predict: {WANTED}"}


class Batcher:
    """Collects working images for a moment and sends them through the network as one batch."""

    def __init__(self, predictor: Predictor, window_seconds: float, metrics: Metrics) -> None:
        self._predictor, self._window, self._metrics = predictor, window_seconds, metrics
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()

    async def probabilities(self, image_HH3: np.ndarray) -> np.ndarray:
        """(C,) of one working image."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._waiting.put((image_HH3, answer))
        return await answer

    async def run(self) -> None:
        """Runs as long as the server."""
        while True:
            batch = [await self._waiting.get()]
            if self._window:
                await asyncio.sleep(self._window)
            while len(batch) < self._predictor.most_together and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([image for image, _ in batch])
            self._metrics.batch(len(images))
            try:
                found = await run_in_threadpool(self._predictor.probabilities, images)
            except Exception as error:  # the waiting requests get it; the next batch may succeed
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(RuntimeError(str(error)))
                continue
            for (_, answer), probabilities_C in zip(batch, found, strict=True):
                if not answer.done():  # the client may have left
                    answer.set_result(probabilities_C)


class Endpoints:
    """The functions that answer each path."""

    def __init__(self, predictor: Predictor, title: str, settings: ServeSettings) -> None:
        self._predictor, self._title, self._most_pixels = predictor, title, settings.most_pixels
        self._page = page("serve.html", name=title, kind="serve")
        self.metrics, self._intake = Metrics(), RequestImages(settings.most_bytes)
        self.batcher = Batcher(predictor, settings.window_seconds, self.metrics)
        # Not the network's thread, so that pictures that wait for memory do not delay answers.
        self._decoders = CapacityLimiter(max(2, num_cores()))

    async def page(self, request: Request) -> HTMLResponse:
        return HTMLResponse(self._page)

    async def health(self, request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": self._title, "classes": list(self._predictor.classes)})

    async def ready(self, request: Request) -> JSONResponse:
        white = np.full((self._predictor.working_size, self._predictor.working_size, 3), 255, np.uint8)
        try:
            async with asyncio.timeout(_READY_SECONDS):
                await self.batcher.probabilities(white)
        except (TimeoutError, RuntimeError) as error:
            reason = str(error) or f"no answer within {_READY_SECONDS:.0f} seconds"
            return JSONResponse({"status": "not ready", "error": reason}, 503)
        return JSONResponse({"status": "ready"})

    async def measures(self, request: Request) -> Response:
        return self.metrics.response()

    async def description(self, request: Request) -> JSONResponse:
        return JSONResponse(openapi(self._title, list(self._predictor.classes)))

    async def predict(self, request: Request) -> Response:
        top = _top(request)
        pictures, is_list = await self._intake.pictures(request)
        found = []
        for number, data in enumerate(pictures):
            image = await self._working_image(data, f"picture {number}: " if is_list else "")
            guesses = best(Answer("", await self.batcher.probabilities(image)), self._predictor.classes, top)
            classes = [{"class": name, "number": k, "probability": p} for name, k, p in guesses]
            found.append({"class": classes[0]["class"], "number": classes[0]["number"], "classes": classes})
        return JSONResponse({"predictions": found} if is_list else found[0])

    async def _working_image(self, data: bytes, where: str) -> np.ndarray:
        decode, most = self._predictor.working_image, self._most_pixels
        try:
            return await to_thread.run_sync(decode, data, most, limiter=self._decoders)
        except DataError as error:
            allowed = f"the {most / 1e6:g} million of --max-megapixels"
            reason = str(error).replace(f"images.max_pixels={most}", allowed)
            advice = f"; {WANTED}" if reason == "not an image" else ""
            raise HTTPException(422, f"{where}{reason}{advice}") from None


def make_app(predictor: Predictor, title: str, own: Collection[str], settings: ServeSettings) -> ASGIApp:
    """The ASGI application, which logs each request. It accepts its `own` names and addresses, and those that the
    settings allow; pages of the latter may send requests too."""
    to = Endpoints(predictor, title, settings)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(to.batcher.run())
        yield
        running.cancel()

    routes = [
        Route("/", to.page), Route("/health", to.health), Route("/ready", to.ready), Route("/metrics", to.measures),
        Route("/openapi.json", to.description), Route("/predict", to.predict, methods=["POST"]),
    ]  # fmt: skip
    handlers: dict[Any, Any] = {HTTPException: _say, ClientDisconnect: _gone, RuntimeError: _failed}
    app = Starlette(routes=routes, lifespan=lifespan, exception_handlers=handlers)
    return _logged(_guarded(app, own, settings.allowed), to.metrics)


async def _say(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    advice = f"; {_ADVICE[error.status_code]}" if error.status_code in _ADVICE else ""
    return JSONResponse({"error": f"{error.detail}{advice}"}, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=_GONE)  # the client has left


async def _failed(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"the student could not answer: {error}"}, 500)


def _top(request: Request) -> int:
    given = request.query_params.get("top", str(_TOP))
    if not (given.isascii() and given.isdigit() and len(given) < 10):
        raise HTTPException(400, f"top={given[:20]!r} is not a number of classes, such as 5, or 0 for all")
    return int(given)


def _guarded(app: ASGIApp, own: Collection[str], allowed: Collection[str]) -> ASGIApp:
    """Refuses requests that another site makes a browser send: under its own name that points to this machine (DNS
    rebinding), or from its page. Starlette's TrustedHostMiddleware does not check Origin, and its answer names neither
    the host nor the option that allows it."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        headers = Headers(scope=scope)
        host, origins = headers.get("host", "").lower(), [one.lower() for one in headers.getlist("origin") if one]
        strange = [one for one in origins if one.partition("://")[2] != host and host_name(one) not in allowed]
        if host_name(f"//{host}") not in {*own, *allowed}:
            wrong, status = f"the request's Host {host[:100]!r} is not a name of this server", 421
        elif strange:
            wrong, status = f"the request's Origin {strange[0][:100]!r} is another site", 403
        else:
            return await app(scope, receive, send)
        return await JSONResponse({"error": f"{wrong}; to allow it, start serve with --allow-host NAME"}, status)(
            scope, receive, send
        )

    return guarded


def _logged(app: ASGIApp, metrics: Metrics) -> ASGIApp:
    """A line for each request on stderr: client, path, status and time, without bodies and queries. It counts too."""

    async def logged(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        began, status = time.perf_counter(), _GONE

        async def noted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        try:
            await app(scope, receive, noted)
        finally:
            # As sent, escaped: no control characters.
            path = scope.get("raw_path", b"").decode("ascii", "replace")[:200].split("?")[0]
            client, took = (scope.get("client") or ["-"])[0], time.perf_counter() - began
            metrics.request(path, status, took)
            when = time.strftime("%Y-%m-%d %H:%M:%S")
            print(
                f"{when} {client} {scope['method'][:20]} {path} {status} {1000 * took:.0f} ms",
                file=sys.stderr,
                flush=True,
            )

    return logged
