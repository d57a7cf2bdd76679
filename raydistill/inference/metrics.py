"""What `serve` tells programs of itself: `/metrics` for Prometheus and `/openapi.json` for tools that make clients."""

from __future__ import annotations

from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Histogram, generate_latest
from starlette.responses import Response

from raydistill.inference.request_images import WANTED

PATHS = ("/", "/health", "/ready", "/predict", "/metrics", "/openapi.json")


class Metrics:
    """The counters of one server. Unknown paths count as `other`, so that clients cannot make it grow."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Histogram(
            "raydistill_request_seconds", "Time of a request", ["path", "status"], registry=self._registry
        )
        self._batches = Histogram(
            "raydistill_batch_images", "Pictures that go through the network together", registry=self._registry,
            buckets=tuple(2**k for k in range(8)),
        )  # fmt: skip

    def request(self, path: str, status: int, seconds: float) -> None:
        self._requests.labels(path if path in PATHS else "other", str(status)).observe(seconds)

    def batch(self, images: int) -> None:
        self._batches.observe(images)

    def response(self) -> Response:
        return Response(generate_latest(self._registry), media_type=CONTENT_TYPE_LATEST)


def openapi(title: str, classes: list[str]) -> dict[str, Any]:
    """The description of the server, in the form of OpenAPI 3.1."""
    answer = {
        "type": "object",
        "properties": {
            "class": {"type": "string", "enum": classes},
            "number": {"type": "integer", "minimum": 0, "maximum": len(classes) - 1},
            "classes": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": {
                        "class": {"type": "string"}, "number": {"type": "integer"},
                        "probability": {"type": "number", "minimum": 0, "maximum": 1},
                    },
                },
            },
        },
    }  # fmt: skip
    error = {"type": "object", "properties": {"error": {"type": "string"}}}
    binary = {"type": "string", "format": "binary"}
    picture = {"image": {"type": "string", "contentEncoding": "base64"}}
    predict = {
        "summary": "The classes of a picture, the likeliest first",
        "description": WANTED,
        "parameters": [
            {"name": "top", "in": "query", "schema": {"type": "integer", "minimum": 0, "default": 5}},
        ],
        "requestBody": {
            "required": True,
            "content": {
                "image/*": {"schema": binary},
                "multipart/form-data": {"schema": {"type": "object", "properties": {"file": binary}}},
                "application/json": {"schema": {"type": "object", "properties": picture}},
            },
        },
        "responses": {
            "200": _says("The answer", answer), "422": _says("No picture that can be read", error),
            "4XX": _says("A request of another form", error),
        },
    }  # fmt: skip
    words = {
        "/": "A page to try pictures", "/health": "The model and its classes", "/metrics": "Measures for Prometheus",
        "/ready": "200 if the network answers now, else 503", "/openapi.json": "This description",
    }  # fmt: skip
    paths: dict[str, Any] = {
        path: {"get": {"summary": what, "responses": {"200": {"description": what}}}} for path, what in words.items()
    }
    about = {"title": title, "version": "1"}
    return {"openapi": "3.1.0", "info": about, "paths": {**paths, "/predict": {"post": predict}}}


def _says(what: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": what, "content": {"application/json": {"schema": schema}}}
