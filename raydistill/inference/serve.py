"""serve: an exported student behind HTTP on this machine, for trying it out and for products that live beside it.

`GET /` is a page to drop a picture on, `GET /health` says what is served, `POST /predict` takes a picture's bytes as
the body and answers with classes, their numbers and probabilities. Requests that come within a few milliseconds go
through the network together.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route

from raydistill.errors import DataError
from raydistill.inference.predict import Answer, Predictor, best

_LARGEST_BATCH = 64
_TOP = 5
_PAGE = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")


class Batcher:
    """Gathers working images for a moment and sends them through the network as one batch."""

    def __init__(self, predictor: Predictor, window_seconds: float) -> None:
        self._predictor, self._window = predictor, window_seconds
        self._waiting: asyncio.Queue[tuple[np.ndarray, asyncio.Future[np.ndarray]]] = asyncio.Queue()

    async def probabilities(self, image_HH3: np.ndarray) -> np.ndarray:
        """(C,) of one working image."""
        answer: asyncio.Future[np.ndarray] = asyncio.get_running_loop().create_future()
        await self._waiting.put((image_HH3, answer))
        return await answer

    async def run(self) -> None:
        """For as long as the server lives."""
        while True:
            batch = [await self._waiting.get()]
            if self._window:
                await asyncio.sleep(self._window)
            while len(batch) < _LARGEST_BATCH and not self._waiting.empty():
                batch.append(self._waiting.get_nowait())
            images = np.stack([image for image, _ in batch])
            try:
                found = await run_in_threadpool(self._predictor.probabilities, images)
            except Exception as error:  # those who wait are told; the next batch may fare better
                for _, answer in batch:
                    if not answer.done():
                        answer.set_exception(RuntimeError(str(error)))
                continue
            for (_, answer), probabilities_C in zip(batch, found, strict=True):
                if not answer.done():  # its client may have gone
                    answer.set_result(probabilities_C)


def make_app(predictor: Predictor, title: str, most_bytes: int, window_seconds: float) -> Starlette:
    """The ASGI application."""
    batcher = Batcher(predictor, window_seconds)

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    async def page(request: Request) -> HTMLResponse:
        return HTMLResponse(_PAGE)

    async def health(request: Request) -> JSONResponse:
        return JSONResponse({"status": "ok", "model": title, "classes": list(predictor.classes)})

    async def predict(request: Request) -> JSONResponse:
        data = await _body(request, most_bytes)
        if data is None:
            return _error(413, f"the picture has more than {most_bytes:,} bytes, which --max-megabytes allows")
        try:
            image = await run_in_threadpool(predictor.working_image, data)
        except DataError as error:
            return _error(422, str(error))
        try:
            top = int(request.query_params.get("top", _TOP))
        except ValueError:
            return _error(400, "top is a number of classes; 0: all")
        answer = Answer("", await batcher.probabilities(image))
        guesses = best(answer, predictor.classes, max(top, 0))
        found = [{"class": name, "number": k, "probability": p} for name, k, p in guesses]
        return JSONResponse({"class": found[0]["class"], "number": found[0]["number"], "classes": found})

    routes = [Route("/", page), Route("/health", health), Route("/predict", predict, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


async def _body(request: Request, most_bytes: int) -> bytes | None:
    """None where it is longer than allowed, of which no more than that is read."""
    if int(request.headers.get("content-length", 0)) > most_bytes:
        return None
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most_bytes:
            return None
    return bytes(data)


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


def serve(app: Starlette, host: str, port: int) -> None:
    import uvicorn

    uvicorn.run(app, host=host, port=port, log_level="warning")
