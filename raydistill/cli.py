"""The command line: one command for each stage, `run` for all of them, `show` for what would happen.

Imports that take time stand inside the commands, so that `--help` and config errors answer at once. This is the one
place that turns failures into exit codes: 2 for the config or the data, 1 for the run; 130, 143 and 129 after SIGINT,
SIGTERM and SIGHUP.
"""

from __future__ import annotations

import logging
import os
import re
import shlex
import sys
import time
import traceback
from typing import Annotated, Any

import typer

from raydistill import errors
from raydistill.errors import ConfigError, RaydistillError, UselessStudentError
from raydistill.infra import interrupts
from raydistill.infra.environment import open_streams, prepare_environment
from raydistill.secrets import RedactedStream
from raydistill.strangers import one_line, plain_console, printable

STARTED = time.time()
_GOES_ON = "the same command goes on from here"
_ADDRESS = "http://127.0.0.1:8265"
Words = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[JOB.yaml] [OVERLAY.yaml] [key=value] …",
        help="A job file, overlays and single settings, merged from left to right; the later one wins.",
    ),
]
app = typer.Typer(
    help="Distil a small image classifier on your task from a large pre-trained teacher.\n\n"
    "Start with: raydistill run images.path=./my_images",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.command()
def run(words: Words = None) -> None:
    """All stages in order: prepare, adapt, teach, distill, evaluate, export. Finished ones are skipped."""
    _run(words, "export", "run")


@app.command()
def prepare(words: Words = None) -> None:
    """Read, check, split and store the images at the working size."""
    _run(words, "prepare")


@app.command()
def adapt(words: Words = None) -> None:
    """Give the teacher a head for this task and measure it on val (prepares first, if need be)."""
    _run(words, "adapt")


@app.command()
def generate(
    words: Words = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every prompt, the counts and what it would cost; make nothing.")
    ] = False,
) -> None:
    """Make images with a diffusion pipeline and keep the good ones (with all that this needs)."""
    if not dry_run:
        _run(words, "generate")
        return

    from raydistill.config import load_config

    config = load_config(words or [])
    _announce(f"generate: {config.images.path}, a forecast")
    from raydistill.stages.generate import forecast

    console = plain_console()
    for line in forecast(config):
        console.print(line, markup=False, soft_wrap=True)


@app.command()
def teach(words: Words = None) -> None:
    """Run every view through the teacher and store its soft targets (with all that this needs)."""
    _run(words, "teach")


@app.command()
def distill(words: Words = None) -> None:
    """Train the student (with all that this needs)."""
    _run(words, "distill")


@app.command()
def evaluate(words: Words = None) -> None:
    """Measure student and teacher and draw the report (with all that this needs)."""
    _run(words, "evaluate")


@app.command()
def export(words: Words = None) -> None:
    """Write the student for timm or transformers, as ONNX and for torch.export, each compared with the checkpoint."""
    _run(words, "export")


@app.command()
def predict(
    folder: Annotated[str, typer.Argument(metavar="EXPORT", help="The folder that `export` wrote.")],
    pictures: Annotated[list[str], typer.Argument(metavar="PICTURES…", help="Files, folders, parquet files.")],
    out: Annotated[str | None, typer.Option("--out", help="A .csv, .json, .jsonl or .parquet file to write.")] = None,
    top: Annotated[int, typer.Option("--top", min=0, help="How many classes of each picture; 0: all.")] = 1,
    engine: Annotated[str, typer.Option("--engine", help="onnx, or torch with the folder's safetensors.")] = "onnx",
    skip: Annotated[int, typer.Option("--skip", min=0, help="Leave out so many, the first: to go on.")] = 0,
    address: Annotated[
        str | None, typer.Option("--address", help="A Ray cluster to join; with very many pictures Ray runs here.")
    ] = None,
) -> None:
    """The class of each picture by an exported student, from the same pixels as in training."""
    interrupts.go_on_by("no picture was answered")
    _announce(f"predict: loading {folder}", sys.stderr)  # its answers may go to a pipe
    from raydistill.models.about import check_export

    check_export(folder, engine)  # what is wrong there is said before torch is loaded, which takes seconds
    from raydistill.inference.command import predict_command

    predict_command(folder, pictures, out, top, engine, address, skip)


@app.command()
def serve(
    folder: Annotated[str, typer.Argument(metavar="EXPORT", help="The folder that `export` wrote.")],
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    host: Annotated[str, typer.Option("--host", help="Another address opens it to others, without any login.")] = (
        "127.0.0.1"
    ),
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", help="A further name by which it is reached, as a proxy's; may be repeated."),
    ] = None,
    max_megabytes: Annotated[float, typer.Option("--max-megabytes", min=0.001, help="Of one request.")] = 16,
    max_megapixels: Annotated[
        float, typer.Option("--max-megapixels", min=0.001, help="Of one picture; a larger one is refused.")
    ] = 50,
    window: Annotated[float, typer.Option("--window", min=0, help="Milliseconds in which requests gather.")] = 2,
    engine: Annotated[str, typer.Option("--engine", help="onnx, or torch with the folder's safetensors.")] = "onnx",
) -> None:
    """Answer over HTTP on this machine: POST a picture to /predict, or drop one on the page at /."""
    interrupts.go_on_by("the server has ended")
    _announce(f"serve: loading {folder}")
    from raydistill.inference.listening import check_name, listen
    from raydistill.models.about import check_export

    check_export(folder, engine)
    allowed, sockets = [check_name(name) for name in allow_host or []], listen(host, port)
    from raydistill.inference.command import serve_command  # with torch, which takes seconds

    most_bytes, most_pixels = int(max_megabytes * 1e6), int(max_megapixels * 1e6)
    serve_command(folder, engine, host, sockets, allowed, most_bytes, most_pixels, window / 1000)


@app.command()
def show(words: Words = None) -> None:
    """The resolved config, the stage directories, what is done and what would run. Writes nothing."""
    from rich.table import Table

    from raydistill.config import load_config, shown_yaml
    from raydistill.data.images import list_images
    from raydistill.infra import artifacts
    from raydistill.infra.artifacts import StageDirectory
    from raydistill.infra.node_hours import bill_words
    from raydistill.infra.stores import experiment_name, tracking_uri
    from raydistill.storage.filesystems import refuse_unreachable

    config = load_config(words or [])
    console = plain_console()
    console.print(shown_yaml(config), markup=False)
    refuse_unreachable(artifacts.workspace_root(config), "workspace")
    if config.tracking.enabled:
        (uri, named), (experiment, named_too) = tracking_uri(config), experiment_name(config)
        where = f"{uri} (by {named}), experiment {experiment} (by {named_too})" if uri else "nowhere: set tracking.uri"
        console.print(f"MLflow: {where}", markup=False, soft_wrap=True)
    listing = list_images(config.images)
    prepared = artifacts.prepare_directory(config, listing)
    directories: list[StageDirectory | str] = [prepared]
    done = prepared.done()
    fresh = config.views.per_image == "fresh"
    later = ["adapt"] if config.loss.needs_teacher else []
    later += ["generate"] if config.generate is not None else []
    if config.loss.needs_teacher and not fresh:
        later += ["teach"] if config.generate is None else ["teach", "teach_generated"]
    later += ["distill", "evaluate", "export"]
    if done is None:
        directories += later
    else:
        from raydistill.data.sample import samples_from_json

        samples = samples_from_json(done)
        if config.teacher is not None and config.teacher.head == "fine_tune" and config.loss.needs_teacher:
            directories.append(artifacts.fine_tune_directory(config, samples))
        tuned = artifacts.tuned(config, samples)
        makers = [getattr(artifacts, f"{stage}_directory") for stage in later]
        directories += later if tuned is None else [maker(tuned, samples) for maker in makers]
    table = Table("stage", "directory", "state", box=None, pad_edge=False)
    for directory in directories:
        if isinstance(directory, str):
            table.add_row(directory, "named once the stage before it is done", "would run")
        else:
            state = "would go on" if directory.started() else "would run"
            if directory.done() is not None:
                took = bill_words(artifacts.read_bill(directory.path), config.cluster.prices)
                state = f"done, {took}" if took else "done"
            table.add_row(directory.stage, directory.path, state)
    console.print(f"images: {len(listing.entries)} in {len(listing.classes)} classes")
    for what, count in listing.ignored.items():
        console.print(f"ignored: {count} {what}", markup=False, soft_wrap=True)
    for what, count in listing.notes.items():
        console.print(f"mind: {count} {what}", markup=False, soft_wrap=True)
    console.print(table, soft_wrap=True)


@app.command()
def compare(
    words: Words = None,
    learning_curve: Annotated[
        bool, typer.Option("--learning-curve", help="Train at several shares of the labels too (compare.label_shares).")
    ] = False,
) -> None:
    """Train the student in several ways over several seeds and say which to ship (compare.arms, compare.seeds)."""
    from rich.table import Table

    from raydistill.config import load_config
    from raydistill.infra.early import refuse_early
    from raydistill.infra.progress import Progress

    interrupts.go_on_by(_GOES_ON)
    config, console = load_config(words or []), plain_console()
    _announce(f"compare: {', '.join(config.compare.arms)} on {config.images.path}, into {config.workspace}")
    refuse_early(config)
    from raydistill.search.compare import compare_arms

    comparison, path = compare_arms(config, Progress(console), learning_curve)
    titles, rows = comparison.table()
    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*row)
    wide = plain_console(width=max(console.width, 160))  # a cell that is cut tells nothing
    wide.print("", table, "")
    console.print(comparison.verdict, soft_wrap=True)
    if comparison.curve_verdict:
        console.print(comparison.curve_verdict, soft_wrap=True)
    console.print(f"table, figures and JSON: {path}", soft_wrap=True)
    console.print(f"compare is done after {time.time() - STARTED:.0f} s")


@app.command()
def tune(
    words: Words = None,
    space: Annotated[
        str | None, typer.Option("--space", help="A search space, such as tune_spaces/loss.yaml (tune.space).")
    ] = None,
    trials: Annotated[
        int | None, typer.Option("--trials", help="Trials in all; a higher number goes on (tune.trials).")
    ] = None,
) -> None:
    """Search settings with one student a trial and no pass of the teacher; ends with best.yaml."""

    from raydistill.config import load_config
    from raydistill.infra.early import refuse_early
    from raydistill.infra.progress import Progress

    interrupts.go_on_by(_GOES_ON)
    given = [f"tune.{key}={value}" for key, value in (("space", space), ("trials", trials)) if value is not None]
    config, console = load_config([*(words or []), *given]), plain_console()
    _announce(f"tune: {config.tune.space} on {config.images.path}, into {config.workspace}")
    refuse_early(config)
    from raydistill.search.tune import tune_job

    search = tune_job(config, Progress(console))
    console.print(search.verdict, soft_wrap=True)
    if search.front:
        console.print(f"on the Pareto front: trials {', '.join(map(str, search.front))}", soft_wrap=True)
    console.print(f"best settings, figures and JSON: {search.path}/best.yaml, search.html, search.json", soft_wrap=True)
    bill = "" if search.cost is None else f", {search.cost:.2f} at {config.cluster.price_per_hour:g} an hour"
    console.print(f"trials and confirmation took {search.seconds:.0f} s in all, over all commands{bill}")
    console.print(f"tune is done after {time.time() - STARTED:.0f} s")


Address = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, as through a tunnel."),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="As `submit` printed it.")]
jobs = typer.Typer(help="Jobs that were submitted: their states, logs and ends.", no_args_is_help=True)
app.add_typer(jobs, name="job")


@app.command()
def check(
    words: Words = None,
    teacher: Annotated[
        bool, typer.Option("--teacher", help="Look at the job's teacher too: on some of the images, here.")
    ] = False,
    teachers: Annotated[
        str | None, typer.Option("--teachers", help="Several beside each other: timm:A,hf:B,timm:C=WEIGHTS.")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first image that cannot be used.")] = False,
    out: Annotated[str | None, typer.Option("--out", help="Also write a .html page with pictures, or .json.")] = None,
    cluster: Annotated[bool, typer.Option("--cluster", help="Look at every node of the cluster that runs.")] = False,
    file: Annotated[str | None, typer.Option("--file", help="Look at a cluster.yaml, or KubeRay's.")] = None,
) -> None:
    """Would a run on these images be sound? Reads every one and writes nothing; exit code 2 where it would not.

    With --cluster or --file: would this job run on the cluster?
    """

    from raydistill.config import load_config

    console = plain_console()
    wide = plain_console(width=max(console.width, 160))
    if cluster or file is not None:
        _check_cluster(words, cluster, file, wide)
        return
    from raydistill.infra.progress import Progress

    interrupts.go_on_by("the same command looks at all images again")
    config, progress = load_config(words or []), Progress(console)
    _announce(f"check: {config.images.path}")
    from raydistill.stages.check import check_images
    from raydistill.stages.check_page import findings_table, write_checkup

    checkup = check_images(config, progress, strict)
    wide.print("", findings_table(checkup), "")
    if out is not None:
        write_checkup(config, checkup, out)
        console.print(f"written: {out}", markup=False, soft_wrap=True)
    if checkup.is_interrupted:
        raise KeyboardInterrupt
    if teacher or teachers is not None:
        from raydistill.stages.check_teacher import check_teachers, teachers_table

        names = teachers.split(",") if teachers else []
        wide.print(teachers_table(check_teachers(config, names, progress)), "")
    stops = sum(finding.severity == "stop" for finding in checkup.findings)
    used = sum(sum(counts.values()) for counts in checkup.counts.values())
    console.print(
        f"{stops} finding(s) would stop a run" if stops else f"a run would be sound: it would use {used:,} images"
    )
    if stops:
        raise typer.Exit(2)


def _check_cluster(words: list[str] | None, cluster: bool, file: str | None, console: Any) -> None:
    from rich.table import Table

    from raydistill.config import load_config
    from raydistill.infra.preflight import check_cluster, check_offers

    config = load_config(words or []) if words or cluster else None
    _announce(f"check: {file or (config and config.cluster.address) or 'this machine'}")
    findings = [] if file is None else check_offers(config, file)
    if cluster:
        assert config is not None
        findings += check_cluster(config)
    table = Table("", "what", "found", "what to do", box=None, pad_edge=False)
    for finding in findings:
        table.add_row("mend" if finding.advice else "ok", finding.about, finding.found, finding.advice or "")
    console.print(table)
    if any(finding.advice for finding in findings):
        raise typer.Exit(2)


@app.command()
def submit(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="run, prepare, …, compare or tune.")],
    words: Words = None,
    address: Address = _ADDRESS,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is accepted.")] = False,
    python: Annotated[str, typer.Option("--python", help="The interpreter on the cluster.")] = "python",
    install: Annotated[
        bool, typer.Option("--install", help="Have Ray install what raydistill requires, as here, for this job.")
    ] = False,
    space: Annotated[str | None, typer.Option("--space", help="As for `tune`.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="As for `tune`.")] = None,
    learning_curve: Annotated[bool, typer.Option("--learning-curve", help="As for `compare`.")] = False,
    send_outside: Annotated[
        bool, typer.Option("--send-outside", help="Also send files that the job names outside of this folder.")
    ] = False,
) -> None:
    """Run a command on a Ray cluster: the same words, the same exit code (3 for a job that was stopped)."""
    import tempfile

    from raydistill.config import load_config
    from raydistill.infra import submit as jobs_api

    if install and python != "python":
        raise ConfigError("submit: --install makes an environment with an interpreter of its own; leave out --python")
    interrupts.go_on_by("raydistill job status says whether the job was submitted; the same command submits it once")
    _announce(f"submit: {command} to {address}")
    given = [f"tune.{key}={value}" for key, value in (("space", space), ("trials", trials)) if value is not None]
    flags = ("--learning-curve",) if learning_curve else ()
    with tempfile.TemporaryDirectory() as folder:
        package = jobs_api.pack(load_config([*(words or []), *given]), command, flags, folder, python, send_outside)
        print(f"uploads {len(package.files)} files, {package.size:,} bytes:")
        for file, size in package.files:
            print(one_line(f"  {file} {size:,}"))
        for file in package.left_out:
            print(one_line(f"left out, as no code of the package: {file}"))
        if told := sorted(name for name in os.environ if name.startswith("MLFLOW_")):
            print(f"stay here: {', '.join(told)}; the job goes by tracking.uri and by what its nodes have set")
        client = jobs_api.job_client(address)
        name, is_new = jobs_api.submit(client, package, install)
    print(f"job {name} {'is submitted' if is_new else 'was submitted before: an equal one is not started again'}")
    print(f"raydistill job logs {name}     raydistill job stop {name}")
    if not detach:
        _follow(client, name)


@jobs.command()
def status(name: Annotated[str | None, typer.Argument(metavar="[NAME]")] = None, address: Address = _ADDRESS) -> None:
    """The state of one job, or of all."""
    _announce(f"asking {address}", sys.stderr)
    from raydistill.infra import submit as jobs_api

    client = jobs_api.job_client(address)
    found = client.list_jobs() if name is None else [jobs_api.existing_job(client, name)]
    for job in sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0):
        code = f"exit code {jobs_api.exit_code(job)}" if job.status.is_terminal() else ""
        print(f"{job.status.value:<10} {job.submission_id}  {job.entrypoint}  {code}".rstrip())


@jobs.command()
def logs(name: Name, address: Address = _ADDRESS) -> None:
    """Follow a job's log to its end; returns the job's exit code."""
    _announce(f"asking {address}", sys.stderr)
    from raydistill.infra import submit as jobs_api

    client = jobs_api.job_client(address)
    jobs_api.existing_job(client, name)
    _follow(client, name)


@jobs.command()
def stop(name: Name, address: Address = _ADDRESS) -> None:
    """End a job; it has two minutes to write its last checkpoint."""
    _announce(f"asking {address}", sys.stderr)
    from raydistill.infra import submit as jobs_api

    client = jobs_api.job_client(address)
    jobs_api.existing_job(client, name)
    interrupts.go_on_by(f"{name} may still be ending; raydistill job status {name} tells")
    jobs_api.stop(client, name)
    print(f"{name} has ended; the same `raydistill submit` goes on from there")


def _follow(client: Any, name: str) -> None:
    from raydistill.infra.submit import follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    interrupts.go_on_by(f"the job goes on; raydistill job logs {name} shows it, raydistill job stop {name} ends it")
    if code := follow(client, name, write):
        raise typer.Exit(code)


def _announce(words: str, stream: Any = None) -> None:
    """The first line, before anything that takes time to load."""
    print(one_line(words), file=stream, flush=True)


def _run(words: list[str] | None, until: str, command: str | None = None) -> None:

    from raydistill.config import load_config
    from raydistill.infra.artifacts import check_writable, find_work
    from raydistill.infra.cluster import RayStart
    from raydistill.infra.early import refuse_early
    from raydistill.infra.progress import Progress

    interrupts.go_on_by(_GOES_ON)
    config = load_config(words or [])
    _announce(f"{command or until}: {config.images.path}, into {config.workspace}")
    console = plain_console()
    refuse_early(config)
    work, ray = find_work(config, until), RayStart(config, of_command=True)
    if work.undone:
        check_writable(config)
    if work.needs_ray:
        ray.begin()  # it starts while torch and the models' libraries load, below
    from raydistill.stages.run import run_stages

    again, refusal = shlex.join(["raydistill", *sys.argv[1:]]), None
    try:
        outcome = run_stages(config, Progress(console), until, work, ray, again)
    except UselessStudentError as error:
        outcome, refusal = error.outcome, error
    if outcome.report is not None:
        from raydistill.stages.summary import closing_table

        console.print(closing_table(config, outcome))
        console.print(f"report: {outcome.page}", soft_wrap=True, markup=False)
    if refusal is not None:
        raise refusal
    console.print(f"{command or until} is done after {time.time() - STARTED:.0f} s")


def main() -> None:
    """Entry point of `raydistill`."""
    open_streams()
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    interrupts.begin()
    code = 1
    try:
        code = _exit_code()
    finally:  # also of an interruption, at whatever moment it came
        interrupts.leave(code)


def _exit_code() -> int:
    try:
        prepare_environment()
        logging.basicConfig(level=logging.WARNING)
        for handler in logging.getLogger().handlers:
            handler.setFormatter(_Plain("%(levelname)s %(message)s"))
        logging.getLogger("raydistill").setLevel(logging.INFO)
        app()
    except SystemExit as stop:  # how Typer ends
        if isinstance(stop.__context__, OSError):  # a pipe or a socket, of which Typer says nothing
            return _explain(stop.__context__)
        return stop.code if isinstance(stop.code, int) else 1
    except RaydistillError as error:
        if not interrupts.pressed():
            _say(str(error))
        return error.exit_code
    except Exception as error:
        return _explain(error)
    return 0


class _Plain(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def _say(message: str) -> None:
    for line in message.splitlines():
        print(f"error: {printable(line)}", file=sys.stderr)


def _explain(error: Exception) -> int:
    """Ray wraps what a task or an actor raised in its own classes; the raydistill error inside is what to say."""
    if interrupts.pressed():
        return 1  # what went wrong on the way out
    inner: BaseException | None = error
    while inner is not None:
        for candidate in (inner, getattr(inner, "cause", None)):
            if isinstance(candidate, RaydistillError):
                _say(str(candidate))
                return candidate.exit_code
        inner = inner.__cause__
    # Of what a task of Ray Data raised its text alone comes back.
    if found := re.findall(r"^raydistill\.errors\.(\w+): (.+)$", str(error), re.MULTILINE):
        name, message = found[-1]
        _say(message)
        return int(getattr(errors, name, errors.StageError).exit_code)
    if os.environ.get("RAYDISTILL_TRACEBACK"):
        traceback.print_exception(error)
    lines = [line for line in str(error).strip().splitlines() if line.strip()]
    _say(f"{type(error).__name__}: {lines[-1] if lines else ''} (RAYDISTILL_TRACEBACK=1 shows where)")
    return 1
