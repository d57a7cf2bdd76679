"""submit: what is uploaded and what never is, whom it speaks to, and the exit codes of real jobs on a real head."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from PIL import Image
from ray.job_submission import JobStatus
from safetensors.torch import save_file

from raydistill import errors
from raydistill.cluster import submit as submitting
from raydistill.cluster.submit import check_address, follow, pinned, submit
from raydistill.cluster.upload import pack
from raydistill.config import load_config
from raydistill.errors import ConfigError, StageError
from tests.processes import python


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Path]:
    """A folder as users have it: images, a job file, and things that are nobody else's business."""

    def write(**more: object) -> Path:
        for name in ("red", "blue"):
            (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
            for i in range(6):
                pixels = np.random.default_rng([i, len(name)]).integers(0, 256, (16, 16, 3), np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
        for secret in (".env", "key.pem", "workspace/mlflow.db", "mlruns/meta.yaml", "weights.safetensors"):
            (tmp_path / secret).parent.mkdir(exist_ok=True)
            (tmp_path / secret).write_text("hunter2")
        tree = {
            "name": "small", "images": {"path": str(tmp_path / "images"), "size": 16}, "tracking": {"enabled": False},
            "workspace": str(tmp_path / "workspace"), **more,
        }  # fmt: skip
        (tmp_path / "job.yaml").write_text(json.dumps(tree))
        return tmp_path / "job.yaml"

    return write


def packed(folder: Path, *words: str, command: str = "run", flags: tuple[str, ...] = (), outside: bool = True):
    folder.mkdir()
    return pack(load_config(list(words)), command, flags, str(folder), send_outside=outside)


def test_the_package_and_the_job_travel_and_nothing_else(job, tmp_path, monkeypatch) -> None:
    names, space = tmp_path / "names.yaml", tmp_path / "space.yaml"
    names.write_text("red: [crimson]\n")
    space.write_text("loss.temperature: {float: [1, 8]}\n")
    path = job(generate={"pipeline": "owner/name", "names": str(names)}, tune={"space": str(space)})
    monkeypatch.chdir(tmp_path)
    package = packed(tmp_path / "upload", str(path), "workspace=./workspace", "student.size=32")
    found = {name for name, _ in package.files}
    code = {name for name in found if name.startswith("raydistill/")}
    assert "raydistill/__main__.py" in code
    assert all(name.endswith((".py", ".html", "py.typed")) for name in code)
    source = Path(errors.__file__).parent
    wanted = {str(p.relative_to(source.parent)) for p in source.rglob("*") if p.is_file() and p.suffix != ".pyc"}
    assert code == wanted  # whatever the package reads beside its code travels, too
    assert found - code == {"job.yaml", "files/generate.names.yaml", "files/tune.space.yaml"}
    assert not any("hunter2" in file.read_text() for file in (tmp_path / "upload").rglob("*") if file.is_file())
    # What the job reads there is what was meant here.
    monkeypatch.chdir(tmp_path / "upload")
    there = load_config(["job.yaml"])
    assert there.workspace == str(tmp_path / "workspace")
    assert there.cluster.address == "auto"
    assert there.student.size == 32
    assert Path(there.generate.names).read_text() == "red: [crimson]\n"
    assert Path(there.tune.space).read_text() == space.read_text()
    assert package.entrypoint == "python -m raydistill run job.yaml"
    assert package.size == sum(file.stat().st_size for file in (tmp_path / "upload").rglob("*") if file.is_file())


@pytest.fixture
def strange_package(tmp_path, monkeypatch) -> Path:
    """A copy of the package as it may lie in somebody's repository, with what must not travel in it and beside it."""
    source = tmp_path / "project" / "raydistill"
    shutil.copytree(Path(errors.__file__).parent, source, ignore=shutil.ignore_patterns("__pycache__"))
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "key.py").write_text("hunter2")
    planted = (
        ".env", ".ipynb_checkpoints/loop.py", ".hidden.py", "server.pem", "id_rsa", ".ssh/id_ed25519",
        ".aws/credentials", ".netrc", "credentials.json", "kubeconfig", ".pypirc", "notes.md", "workspace/teach-1/DONE",
        "infra/local_settings.py", "infra/token.txt", "stages/backup.py~", "data.csv", ".vscode/settings.json",
        "terraform.tfstate", "mlflow.db", ".npmrc", "infra/.htpasswd", ".git-credentials", "models/.git/hooks/x.py",
    )  # fmt: skip
    for name in planted:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("hunter2")
    (source / "pasted.py").write_text('KEY = """-----BEGIN OPENSSH PRIVATE KEY-----\nhunter2"""')
    (source / "linked.py").symlink_to(outside / "key.py")
    (source / "linked_folder").symlink_to(outside)
    (source.parent / ".gitignore").write_text("local_settings.py\n")
    subprocess.run(["git", "init", "--quiet", str(source.parent)], check=True)
    monkeypatch.setattr(errors, "__file__", str(source / "errors.py"))
    return source


def test_nothing_private_travels_with_the_package(strange_package, job, tmp_path) -> None:
    package = packed(tmp_path / "upload", str(job()))
    sent = {str(f.relative_to(tmp_path / "upload")): f for f in (tmp_path / "upload").rglob("*") if f.is_file()}
    assert [name for name, file in sent.items() if b"hunter2" in file.read_bytes()] == []
    assert not any(file.is_symlink() for file in sent.values())
    left_out = set(package.left_out)
    assert {"pasted.py", "linked.py", "linked_folder/", "infra/local_settings.py", ".env", ".ssh/"} <= left_out
    code = {name for name in sent if name.startswith("raydistill/")}
    source = Path(submitting.__file__).parents[1]
    wanted = [*source.rglob("*.py"), *source.rglob("*.html"), *source.rglob("py.typed")]
    assert code == {str(file.relative_to(source.parent)) for file in wanted}


NAMED = {
    "a link out": ("classes.txt", "red\nblue\n", True),
    "a key by its name": ("deploy.pem", "red", False),
    "a hidden file": (".env", "red", False),
    "credentials": ("gcp-credentials.json", "red", False),
    "a kubeconfig": ("kubeconfig.yaml", "red", False),
    "a key in the text": ("classes.txt", "red\n-----BEGIN RSA PRIVATE KEY-----\nMIIE\n", False),
    "a password in the text": ("classes.txt", "red\nhttps://ann:hunter2@host/x\n", False),
    "a file of ssh": (".ssh/config", "red", False),
    "a file of aws": (".aws/config", "red", False),
}


@pytest.mark.parametrize("case", NAMED)
def test_a_named_file_that_is_private_is_refused(job, tmp_path, monkeypatch, case) -> None:
    name, text, linked = NAMED[case]
    project = tmp_path / "project"
    file = project / name
    file.parent.mkdir(parents=True)
    if linked:
        (tmp_path / "elsewhere.txt").write_text(text)
        file.symlink_to(tmp_path / "elsewhere.txt")
    else:
        file.write_text(text)
    monkeypatch.chdir(project)
    with pytest.raises(ConfigError, match=r"images\.classes=.*(outside|keys or passwords)") as refused:
        packed(tmp_path / "upload", str(job()), f"images.classes={name}")
    assert "hunter2" not in str(refused.value)
    assert not any("images.classes" in file.name for file in (tmp_path / "upload").rglob("*"))


@pytest.mark.parametrize("named", ["{0}/classes.txt", "../classes.txt", "lists/../../classes.txt"])
def test_a_file_outside_is_sent_only_where_that_is_said(job, tmp_path, monkeypatch, named) -> None:
    (tmp_path / "project/lists").mkdir(parents=True)
    (tmp_path / "classes.txt").write_text("red\nblue\n")
    monkeypatch.chdir(tmp_path / "project")
    words = [str(job()), f"images.classes={named.format(tmp_path)}"]
    with pytest.raises(ConfigError, match=r"images\.classes=.*outside .*--send-outside"):
        packed(tmp_path / "refused", *words, outside=False)
    assert not list((tmp_path / "refused").rglob("*.txt"))
    assert ("files/images.classes.txt", 9) in packed(tmp_path / "upload", *words).files


def test_a_link_within_the_project_is_followed(job, tmp_path, monkeypatch) -> None:
    (tmp_path / "lists").mkdir()
    (tmp_path / "lists" / "two.txt").write_text("red\nblue\n")
    (tmp_path / "classes.txt").symlink_to("lists/two.txt")
    monkeypatch.chdir(tmp_path)
    packed(tmp_path / "upload", str(job()), "images.classes=classes.txt")
    assert (tmp_path / "upload/files/images.classes.txt").read_text() == "red\nblue\n"


def test_an_id_follows_from_what_is_run(job, tmp_path) -> None:
    path = str(job())
    ids = [
        packed(tmp_path / "1", path).id,
        packed(tmp_path / "2", path).id,
        packed(tmp_path / "3", path, "seed=1").id,
        packed(tmp_path / "4", path, command="compare").id,
        packed(tmp_path / "5", path, command="compare", flags=("--learning-curve",)).id,
    ]
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4
    assert ids[0].startswith("small-run-")


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"tracking": {"uri": "http://ann:hunter2@host:5000"}}, r"tracking\.uri holds a password"),
        ({"tune": {"storage": "postgresql+psycopg2://u:p@db/studies"}}, r"tune\.storage holds a password"),
        ({"tune": {"space": "nowhere.yaml"}}, r"tune\.space=nowhere\.yaml: no such file"),
    ],
)
def test_secrets_and_missing_files_are_refused(job, tmp_path, more, said) -> None:
    path = job(**more)
    with pytest.raises(ConfigError, match=said) as refused:
        packed(tmp_path / "upload", str(path))
    assert "hunter2" not in str(refused.value)


def test_a_large_upload_is_refused_with_its_largest_file(job, tmp_path) -> None:
    names = tmp_path / "names.yaml"
    names.write_bytes(b"#" * 17 * 1024**2)
    path = job(generate={"pipeline": "owner/name", "names": str(names)})
    with pytest.raises(ConfigError, match=r"above 16,777,216 \(files/generate\.names\.yaml 17,825,792 bytes"):
        packed(tmp_path / "upload", str(path))


def test_only_commands_of_jobs_are_submitted(job, tmp_path) -> None:
    with pytest.raises(ConfigError, match="'show' is not a command of a job"):
        packed(tmp_path / "upload", str(job()), command="show")


@pytest.fixture
def without_token(monkeypatch, tmp_path) -> None:
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.mark.usefixtures("without_token")
@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "http://localhost:8265/", "http://[::1]:8265"])
def test_this_machine_needs_no_token(address) -> None:
    assert check_address(address) == address.rstrip("/")


@pytest.mark.parametrize("address", ["http://10.0.0.7:8265", "https://ray.example.com", "http://127.0.0.1.example.com"])
def test_any_other_machine_needs_one(address, without_token, monkeypatch, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"needs a token.*tunnel"):
        check_address(address)
    # What Ray wrote for this machine alone is not sent to another unasked.
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("t" * 64)
    with pytest.raises(ConfigError, match="RAY_AUTH_TOKEN_PATH"):
        check_address(address)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    assert check_address(address) == address
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "t" * 64)
    assert check_address(address) == address


@pytest.mark.parametrize("address", ["ray://127.0.0.1:10001", "127.0.0.1:8265", "auto", ""])
def test_what_is_no_dashboard_is_refused(address) -> None:
    with pytest.raises(ConfigError, match="address of the dashboard"):
        check_address(address)


def raydistill(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return python("-m", "raydistill", *words, env=environment)


def test_a_job_may_bring_its_requirements(job, tmp_path, monkeypatch) -> None:
    wanted = dict(line.split("==") for line in pinned())
    assert wanted["timm"] == timm.__version__
    assert not wanted.keys() & {"ray", "torch", "torchvision", "pytest"}
    package, asked = packed(tmp_path / "upload", str(job())), []
    client = SimpleNamespace(submit_job=lambda **given: asked.append(given["runtime_env"]))
    monkeypatch.setattr(submitting, "find_job", lambda client, name: None)
    for install in (False, True):
        assert submit(client, package, install) == (package.id, True)
    assert "pip" not in asked[0]
    assert asked[1]["pip"]["packages"] == pinned()
    assert asked[1]["working_dir"] == asked[0]["working_dir"]


@pytest.mark.parametrize(("refusals", "seconds", "started"), [(2, 60.0, True), (9, 0.0, False)])
def test_a_head_that_takes_no_job_yet_is_waited_for(job, tmp_path, monkeypatch, refusals, seconds, started) -> None:
    said = ["Request failed with status code 500: No available agent to submit job, please try again later."] * refusals

    def submit_job(**given: object) -> None:
        if said:
            raise RuntimeError(said.pop())

    monkeypatch.setattr(submitting, "_HEAD_SECONDS", seconds)
    monkeypatch.setattr(submitting, "find_job", lambda client, name: None)
    monkeypatch.setattr(submitting.time, "sleep", lambda seconds: None)
    client, package = SimpleNamespace(submit_job=submit_job), packed(tmp_path / "upload", str(job()))
    if started:
        assert submit(client, package) == (package.id, True)
        return
    with pytest.raises(StageError, match=r"the head does not accept the job \(.*No available agent.*ray logs cluster"):
        submit(client, package)


def test_a_job_is_followed_while_its_head_starts_again() -> None:
    log, said = ["one\n", "two\n"], list[str]()
    answers = iter([ConnectionError("refused"), "RUNNING", ConnectionError("refused"), "SUCCEEDED"])

    async def tail(name: str) -> AsyncIterator[str]:
        for text in log:
            yield text

    def ask(name: str) -> SimpleNamespace:
        if isinstance(answer := next(answers), Exception):
            raise answer
        return SimpleNamespace(status=JobStatus(answer))

    assert follow(SimpleNamespace(tail_job_logs=tail, get_job_info=ask), "j", said.append) == 0
    assert "".join(said) == "one\ntwo\n"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_jobs_on_a_head_with_a_token(head, job, tmp_path) -> None:
    here = ["--python", sys.executable]
    path = str(job())
    done = raydistill(head, "submit", *here, "prepare", path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "samples:" in done.stdout
    assert list((tmp_path / "workspace").glob("prepare-*/DONE"))
    again = raydistill(head, "submit", *here, "prepare", path)
    assert (again.returncode, "not started again" in again.stdout) == (0, True)
    assert again.stdout.count("samples:") == 1

    # A whole run, with a teacher, whose stages before are those of the job before.
    network = timm.create_model("test_resnet", num_classes=2)
    save_file({k: v.contiguous() for k, v in network.state_dict().items()}, tmp_path / "teacher.safetensors")
    teacher = ["teacher.model=timm:test_resnet", f"teacher.weights={tmp_path}/teacher.safetensors", "teacher.size=32",
               "teacher.allow_near_chance=true", "views.per_image=2"]  # fmt: skip
    student = ["student.model=timm:test_resnet", "student.size=16", "distill.epochs=2", "distill.num_workers=1",
               "export.allow_useless=true"]  # fmt: skip
    whole = raydistill(head, "submit", *here, "run", path, *teacher, *student)
    assert whole.returncode == 0, whole.stdout + whole.stderr
    assert {p.parent.name.partition("-")[0] for p in (tmp_path / "workspace").glob("*-*/DONE")} >= {
        "prepare", "features", "adapt", "teach", "distill", "evaluate"
    }  # fmt: skip
    (page,) = (tmp_path / "workspace").glob("evaluate-*/report.html")
    assert str(page) in whole.stdout

    # In an environment that Ray makes for the job. What it is to hold is there already, so nothing is fetched.
    fresh = raydistill(head, "submit", "--install", "prepare", path, "name=fresh")
    assert fresh.returncode == 0, fresh.stdout + fresh.stderr
    port = head["RAY_API_SERVER_ADDRESS"].rpartition(":")[2]
    assert list(Path(f"/tmp/rd{port}/session_latest/runtime_resources/pip").glob("*/virtualenv/bin/python"))
    both = raydistill(head, "submit", "--install", *here, "prepare", path)
    assert (both.returncode, "leave out --python" in both.stderr) == (2, True)

    bad = raydistill(head, "submit", *here, "prepare", path, "images.path=/nowhere")
    assert bad.returncode == 2, bad.stdout
    assert "/nowhere" in bad.stdout
    marker = next((tmp_path / "workspace").glob("prepare-*/DONE"))
    marker.write_text("{torn")
    torn = raydistill(head, "submit", *here, "prepare", path, "name=torn")
    assert torn.returncode == 1, torn.stdout
    marker.unlink()

    # A job that is stopped: nothing of it ends by itself, since its teacher takes its time.
    slow = ["views.per_image=2000", "teacher.model=timm:resnet18", "teacher.size=224", "teacher.allow_near_chance=true"]
    detached = raydistill(head, "submit", "--detach", *here, "teach", path, *slow, "images.size=224")
    assert detached.returncode == 0, detached.stdout + detached.stderr
    name = detached.stdout.partition("job logs ")[2].split()[0]
    stopped = raydistill(head, "job", "stop", name)
    assert stopped.returncode == 0, stopped.stderr
    assert raydistill(head, "job", "logs", name).returncode == 3
    states = raydistill(head, "job", "status").stdout.splitlines()
    assert [line.split()[0] for line in states] == ["SUCCEEDED"] * 3 + ["FAILED"] * 2 + ["STOPPED"]

    stranger = raydistill(head | {"RAY_AUTH_TOKEN": "f" * 64}, "job", "status")
    assert stranger.returncode == 2
    assert "token" in stranger.stderr
    unknown = raydistill(head, "job", "status", "nobody")
    assert unknown.returncode == 2
    assert name in unknown.stderr
