"""Every file under jobs/ loads and says how it is run; the recipes of the paper's data sets run on stand-in images."""

from __future__ import annotations

import functools
import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from raydistill.cli.commands import app
from raydistill.config import Loss, load_config, merged
from raydistill.yaml_files import read_mapping

ROOT = Path(__file__).parents[1]
FILES = sorted(path.relative_to(ROOT) for path in (ROOT / "jobs").rglob("*.yaml"))
OVERLAY_FILES = [path for path in FILES if path.parent.name == "overlays"]
JOBS = [path for path in FILES if path not in OVERLAY_FILES]
ON_CLUSTERS = ("cluster_big_teacher", "cluster_generate", "cluster_search")
RECIPES = ("cifar10", "cifar100", "mit_indoor", "cub2011", "caltech101", "dtd")


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def names(paths: list[Path]) -> list[str]:
    return [path.stem for path in paths]


def test_files_are_found() -> None:
    assert {"demo", *RECIPES, *ON_CLUSTERS} <= set(names(JOBS))
    assert {"smoke", "teacher_vit_b16", "student_resnet18"} <= set(names(OVERLAY_FILES))


@pytest.mark.parametrize("path", JOBS, ids=names(JOBS))
def test_a_job_loads_and_bears_the_name_of_its_file(path: Path) -> None:
    has_images = "path" in read_mapping(str(path), "").get("images", {})
    assert load_config([str(path), *([] if has_images else ["images.path=x"])]).name == path.stem


@pytest.mark.parametrize("path", OVERLAY_FILES, ids=names(OVERLAY_FILES))
def test_an_overlay_changes_the_demo(path: Path) -> None:
    """Loading the config needs no weights, so those of pre-trained students load as well."""
    demo, overlay = read_mapping("jobs/demo.yaml", ""), read_mapping(str(path), "")
    found = load_config(["jobs/demo.yaml", str(path)]).model_dump(mode="json")
    assert merged(found, overlay) == found
    assert merged(demo, overlay) != demo


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_the_first_line_is_a_command_that_names_the_file(path: Path) -> None:
    mark, program, command, *words = shlex.split(path.read_text().splitlines()[0])
    assert (mark, program) == ("#", "raydistill")
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    if command == "submit":
        command, *words = words
    assert command in commands
    assert path.as_posix() in words
    if "--space" in words:
        at = words.index("--space")
        words[at : at + 2] = [f"tune.space={words[at + 1]}"]
    load_config(words)


def test_overlays_of_compare_are_those_of_the_files() -> None:
    from raydistill.config.baselines import OVERLAYS

    arms = {arm: overlay for arm, overlay in OVERLAYS.items() if arm != "job"}
    assert OVERLAYS["job"] == {}
    assert len(arms) >= 7
    for arm, overlay in arms.items():
        assert read_mapping(f"jobs/overlays/{arm}.yaml", "") == overlay, arm


def test_recipes_have_the_papers_settings_whatever_the_data() -> None:
    configs = [load_config([f"jobs/{name}.yaml", "images.path=x"]) for name in RECIPES]
    assert len({c.model_dump_json(include={"teacher", "student", "loss", "distill"}) for c in configs}) == 1
    config = configs[0]
    assert config.teacher is not None
    assert config.teacher.size == config.student.size == 224
    assert config.student.init == "random"
    assert config.loss == Loss(projection_head="two_layer")  # all other defaults are the paper's
    settings = config.distill
    assert (settings.optimizer, settings.learning_rate, settings.weight_decay) == ("adamw", 1e-3, 1e-2)
    assert settings.decay_norms
    assert (settings.schedule, settings.batch_size, settings.epochs) == ("constant", 64, 250)
    assert all(c.views.per_image == "fresh" and c.images.val_share == 0.1 for c in configs)


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes the state dict of a timm model, once for each."""
    import timm
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("weights")

    @functools.cache
    def write(model: str) -> Path:
        path = folder / f"{model}.safetensors"
        save_file({k: v.contiguous() for k, v in timm.create_model(model).state_dict().items()}, path)
        return path

    return write


@pytest.fixture
def smoke(random_weights, class_folders, tmp_path: Path) -> Callable[..., None]:
    """Runs a job on noise with a teacher of random weights: that it runs is all that is asked here."""
    images = class_folders({"red": 12, "green": 12, "blue": 12})

    def run(job: str, command: str, *words: str) -> None:
        teacher = load_config([job, *words, "images.path=x"]).teacher
        assert teacher is not None
        weights = random_weights(teacher.model.removeprefix("timm:"))
        words = (
            job, "jobs/overlays/smoke.yaml", *words, f"images.path={images}", f"teacher.weights={weights}",
            f"workspace={tmp_path}/workspace", "tracking.enabled=false", "distill.num_workers=0",
        )  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-c", "from raydistill.cli import main; main()", command, *words],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout

    return run


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_under_smoke(recipe: str, smoke, tmp_path: Path) -> None:
    smoke(f"jobs/{recipe}.yaml", "run", "views.per_image=1")
    (report,) = (tmp_path / "workspace").glob("evaluate-*/report.json")
    measured = json.loads(report.read_text())
    assert measured["student"]["test"]["images"] == measured["teacher"]["test"]["images"] > 0


ONE_MACHINE = "jobs/overlays/one_machine.yaml"
# In the place of teachers that take minutes on a CPU.
SMALL_VIT = ("teacher.model=timm:vit_tiny_patch16_224", "teacher.size=224")


@pytest.mark.parametrize("job", ON_CLUSTERS)
def test_one_machine_leaves_nothing_of_a_cluster(job: str) -> None:
    config = load_config([f"jobs/{job}.yaml", ONE_MACHINE, "images.path=x"])
    assert config.cluster == type(config.cluster)(generator_actors=config.cluster.generator_actors)
    assert "://" not in " ".join([config.workspace, config.tracking.uri or "", config.tune.storage or ""])


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    ("job", "command", "made", "words"),
    [
        ("cluster_big_teacher", "run", "evaluate-*/report.json", [*SMALL_VIT]),
        ("cluster_generate", "run", "generate-*/ledger.parquet", ["generate.per_class=2", "generate.steps=2",
         "generate.dtype=fp32", "generate.filter.agreement=false", *SMALL_VIT]),
        ("cluster_search", "tune", "tune-*/best.yaml", ["tune.trials=2", "tune.confirm_seeds=0",
         "tune.space=tune_spaces/loss.yaml", *SMALL_VIT]),
    ],
)  # fmt: skip
def test_a_job_of_a_cluster_runs_under_smoke_on_one_machine(
    job: str, command: str, made: str, words: list[str], smoke, class_pipeline, tmp_path: Path
) -> None:
    if job == "cluster_generate":
        words = [*words, f"generate.pipeline={class_pipeline}"]
    smoke(f"jobs/{job}.yaml", command, ONE_MACHINE, *words)
    assert len(list((tmp_path / "workspace").glob(made))) == 1
