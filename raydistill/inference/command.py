"""The commands `raydistill predict` and `serve`, around the predictor."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import cast

from raydistill.cluster.session import joined_cluster
from raydistill.config import RunConfig
from raydistill.data.decode import working_images
from raydistill.data.isolation import start_processes
from raydistill.errors import DataError
from raydistill.escaping import most_common, one_line, plain_console
from raydistill.inference.predict import LARGE, Predictor, find_units, predict_locally, predict_on_ray, without_first
from raydistill.inference.predictions import Answer, best, check_output, write_predictions
from raydistill.inference.sockets import ServeSettings
from raydistill.models.metadata import Engine, check_export
from raydistill.runtime import interrupts
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.progress import Progress


def predict_command(
    folder: str, pictures: Sequence[str], out: str | None, top: int, engine: str, address: str | None, skip: int = 0
) -> None:
    """`skip`: leave out the first pictures.

    Raises ConfigError, DataError; the latter also if no picture could be read.
    """
    about, with_engine = check_export(folder, engine), cast(Engine, engine)
    if out is not None:
        check_output(out)
    classes, ignored = about["classes"], Counter[str]()
    units = without_first(find_units(pictures, ignored), skip)
    if out is not None:
        check_output(out, {*(path for path, _, _ in units), *(file.path for file in os.scandir(folder))})
    count = sum(number for _, _, number in units)
    start_processes(working_images, min(num_cores(), count))
    console = plain_console(stderr=True)
    for what, number in most_common(ignored).items():
        console.print(f"ignored: {number} {what}", markup=False, soft_wrap=True)
    answered, failed = 0, list[Answer]()
    with contextlib.ExitStack() as stack:
        if address is None and count <= LARGE:
            answers = predict_locally(folder, with_engine, units)
        else:
            config = RunConfig.model_validate({"images": {"path": "-"}, "cluster": {"address": address}})
            stack.enter_context(joined_cluster(config))
            answers = predict_on_ray(folder, with_engine, units)
        advance = stack.enter_context(Progress(console).task("predict", count, "pictures"))

        def counted() -> Iterator[Answer]:
            nonlocal answered
            for answer in answers:
                if answer.error:
                    failed.append(answer)
                advance(1)
                yield answer
                answered += 1

        interrupts.resume_hint("the answers so far are kept; --skip continues after them")
        try:
            if out is not None:
                write_predictions(counted(), classes, top, out)
            else:
                for answer in counted():
                    found = "  ".join(f"{name} {p:.3f}" for name, _, p in best(answer, classes, top))
                    print(one_line(f"{answer.name}  {found or f'error: {answer.error}'}"))
        except BaseException:
            how = f"{answered} of {count} pictures are answered{f', in {out}' if out else ''}; the same command with "
            how += f"--skip {skip + answered}{' and another --out' if out else ''} continues"
            interrupts.resume_hint(one_line(how))
            if not interrupts.was_interrupted():
                console.print(f"predict ended early: {how}", markup=False, soft_wrap=True)
            raise
    console.print(f"{count - len(failed)} of {count} pictures answered" + (f", in {out}" if out else ""), markup=False)
    for answer in failed[:10]:
        console.print(f"not read: {answer.name}: {answer.error}", markup=False, soft_wrap=True)
    if len(failed) > 10:
        console.print(f"… and {len(failed) - 10} more" + ("; all are in the file" if out else ""), markup=False)
    if len(failed) == count:
        raise DataError("no picture could be read")


def serve_command(folder: str, engine: str, host: str, sockets: list[socket.socket], settings: ServeSettings) -> None:
    """Serve until an interruption. Raises ConfigError: the folder is not an exported student."""
    from raydistill.inference.serve import make_app
    from raydistill.inference.sockets import addresses, own_names, run

    about, own = check_export(folder, engine), own_names(sockets, host)
    start_processes(working_images, num_cores())
    predictor = Predictor(folder, cast(Engine, engine))
    title = f"{about['model']}, {len(predictor.classes)} classes"
    app = make_app(predictor, title, own, settings)
    urls, is_open = addresses(sockets)
    plain_console().print(f"serving {folder} at {' and '.join(urls)} (Ctrl-C stops it)", soft_wrap=True)
    if is_open:
        print(
            f"warning: everyone who reaches {host} can use the server; it has no login and no encryption\n"
            f"the server answers to {', '.join(sorted({*own, *settings.allowed}))}; any other name, such as a proxy's "
            "or a service's, needs --allow-host NAME",
            file=sys.stderr,
        )
    run(app, sockets)
