"""submit and job: work on a cluster by Ray Jobs."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer

from raydistill.cli.arguments import Arguments, announce, app, tune_settings
from raydistill.errors import ConfigError
from raydistill.escaping import one_line
from raydistill.runtime import interrupts

_ADDRESS = "http://127.0.0.1:8265"
Address = Annotated[
    str,
    typer.Option(
        "--address", envvar="RAY_API_SERVER_ADDRESS", help="The cluster's dashboard, for instance a tunnel to it."
    ),
]
Name = Annotated[str, typer.Argument(metavar="NAME", help="The job's name, as `submit` printed it.")]
jobs = typer.Typer(help="Submitted jobs: show their state, follow their logs, stop them.", no_args_is_help=True)
app.add_typer(jobs, name="job")


@app.command()
def submit(
    command: Annotated[str, typer.Argument(metavar="COMMAND", help="run, prepare, …, compare or tune.")],
    words: Arguments = None,
    address: Address = _ADDRESS,
    detach: Annotated[bool, typer.Option("--detach", help="Return when the job is accepted.")] = False,
    python: Annotated[str, typer.Option("--python", help="The interpreter on the cluster.")] = "python",
    install: Annotated[
        bool, typer.Option("--install", help="Let Ray install raydistill's requirements for this job, as here.")
    ] = False,
    space: Annotated[str | None, typer.Option("--space", help="As for `tune`.")] = None,
    trials: Annotated[int | None, typer.Option("--trials", help="As for `tune`.")] = None,
    learning_curve: Annotated[bool, typer.Option("--learning-curve", help="As for `compare`.")] = False,
    send_outside: Annotated[
        bool, typer.Option("--send-outside", help="Also send files outside this folder that the job names.")
    ] = False,
) -> None:
    """Run a command on a Ray cluster, with the same words and exit codes (3: the job was stopped)."""
    import tempfile

    from raydistill.cluster import submit as jobs_api
    from raydistill.cluster.upload import pack
    from raydistill.config import load_config

    if install and python != "python":
        raise ConfigError("submit: --install makes an environment with its own interpreter; leave out --python")
    interrupts.resume_hint("raydistill job status says whether the job was submitted; the same command submits it once")
    announce(f"submit: {command} to {address}")
    given = tune_settings(space, trials)
    flags = ("--learning-curve",) if learning_curve else ()
    with tempfile.TemporaryDirectory() as folder:
        package = pack(load_config([*(words or []), *given]), command, flags, folder, python, send_outside)
        client = jobs_api.job_client(address)
        print(f"uploads {len(package.files)} files, {package.size:,} bytes:")
        for file, size in package.files:
            print(one_line(f"  {file} {size:,}"))
        for file in package.left_out:
            print(one_line(f"left out, not code of the package: {file}"))
        if told := sorted(name for name in os.environ if name.startswith("MLFLOW_")):
            print(f"not sent: {', '.join(told)}; the job uses tracking.uri and its nodes' own variables")
        name, is_new = jobs_api.submit(client, package, install)
    print(f"job {name} {'is submitted' if is_new else 'runs or is done already, so it is not started again'}")
    print(f"raydistill job logs {name}     raydistill job stop {name}")
    if not detach:
        _follow(client, name)


@jobs.command()
def status(name: Annotated[str | None, typer.Argument(metavar="NAME")] = None, address: Address = _ADDRESS) -> None:
    """Show the state of one job, or of all."""
    jobs_api, client = _ask(address)
    found = client.list_jobs() if name is None else [jobs_api.existing_job(client, name)]
    for job in sorted((job for job in found if job.submission_id), key=lambda job: job.start_time or 0):
        code = f"exit code {jobs_api.exit_code(job)}" if job.status.is_terminal() else ""
        print(f"{job.status.value:<10} {job.submission_id}  {job.entrypoint}  {code}".rstrip())


@jobs.command()
def logs(name: Name, address: Address = _ADDRESS) -> None:
    """Follow a job's log to its end, and end with the job's exit code."""
    jobs_api, client = _ask(address)
    jobs_api.existing_job(client, name)
    _follow(client, name)


@jobs.command()
def stop(name: Name, address: Address = _ADDRESS) -> None:
    """Stop a job; it has two minutes to write its last checkpoint."""
    jobs_api, client = _ask(address)
    jobs_api.existing_job(client, name)
    interrupts.resume_hint(f"{name} may still be ending; raydistill job status {name} tells")
    jobs_api.stop(client, name)
    print(f"{name} has ended; the same `raydistill submit` continues from there")


def _ask(address: str) -> tuple[Any, Any]:
    """Ray's job client for the cluster, and our module that uses it."""
    announce(f"asking {address}", sys.stderr)
    from raydistill.cluster import submit as jobs_api

    return jobs_api, jobs_api.job_client(address)


def _follow(client: Any, name: str) -> None:
    from raydistill.cluster.submit import follow

    def write(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    interrupts.resume_hint(f"the job continues; see raydistill job logs {name}, or stop it: raydistill job stop {name}")
    if code := follow(client, name, write):
        raise typer.Exit(code)
