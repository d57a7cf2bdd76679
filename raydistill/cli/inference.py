"""predict and serve."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from raydistill.cli.arguments import announce, app
from raydistill.runtime import interrupts


@app.command()
def predict(
    folder: Annotated[str, typer.Argument(metavar="EXPORT", help="The folder that `export` wrote.")],
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURES…", help="Files, folders, parquet files.")],
    out: Annotated[str | None, typer.Option("--out", help="A .csv, .json, .jsonl or .parquet file to write.")] = None,
    top: Annotated[int, typer.Option("--top", min=0, help="How many classes to give for each picture; 0: all.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="onnx, or torch with the folder's safetensors.")] = "onnx",
    skip: Annotated[int, typer.Option("--skip", min=0, help="Skip this many pictures at the start, to continue.")] = 0,
    address: Annotated[
        str | None,
        typer.Option("--address", help="A Ray cluster to join. Without it, Ray starts here for very many pictures."),
    ] = None,
) -> None:
    """Classify pictures with an exported student, preprocessed as in training."""
    interrupts.resume_hint("no picture was answered")
    announce(f"predict: loading {folder}", sys.stderr)  # its answers may go to a pipe
    from raydistill.models.metadata import check_export

    check_export(folder, engine)  # mistakes in these are reported before torch loads, which takes seconds
    from raydistill.inference.command import predict_command

    predict_command(folder, pictures, out, top, engine, address, skip)


@app.command()
def serve(
    folder: Annotated[str, typer.Argument(metavar="EXPORT", help="The folder that `export` wrote.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option("--host", help="Any other address opens it to others, without a login.")] = (
        "127.0.0.1"
    ),
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="Another host name of requests, as a proxy's; may be repeated."),
    ] = None,
    max_megabytes: Annotated[
        float, typer.Option("--max-megabytes", min=0.001, help="The most that a request may have.")
    ] = 16,
    max_megapixels: Annotated[
        float, typer.Option("--max-megapixels", min=0.001, help="The most that a picture may have.")
    ] = 50,
    window: Annotated[
        float, typer.Option("--window", min=0, help="Milliseconds to gather requests for one batch.")
    ] = 2,
    engine: Annotated[str, typer.Option("--engine", help="onnx, or torch with the folder's safetensors.")] = "onnx",
) -> None:
    """Answer over HTTP on this machine: POST a picture to /predict, or drop one on the page at /."""
    interrupts.resume_hint("the server has ended")
    announce(f"serve: loading {folder}")
    from raydistill.inference.sockets import ServeSettings, check_name, listen
    from raydistill.models.metadata import check_export

    check_export(folder, engine)

    allowed, sockets = [check_name(name) for name in allow_host or []], listen(host, port)
    from raydistill.inference.command import serve_command  # imports torch, which takes seconds

    settings = ServeSettings(int(max_megabytes * 1e6), int(max_megapixels * 1e6), window / 1000, allowed)
    serve_command(folder, engine, host, sockets, settings)
