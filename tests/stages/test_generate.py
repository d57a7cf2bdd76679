"""generate, whole, with a fast real pipeline: the same images however often, in whatever batches, by however many
actors and after whatever kill; and what is done with them."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import save_file

from raydistill.cluster.plan import plan_resources
from raydistill.cluster.session import RayStart, configure_ray_data
from raydistill.config import Generate, Images, RunConfig, load_config
from raydistill.data.decode import decode, encode
from raydistill.data.sample import SampleSet, decode_shard, sample_id, working_images
from raydistill.data.sources.columns import Entries
from raydistill.data.sources.listing import Listing
from raydistill.data.targets import read_all_targets, read_samples, read_targets
from raydistill.data.views import render, view_parameters
from raydistill.engine import precision
from raydistill.errors import ConfigError, StageError
from raydistill.execution import Execution
from raydistill.generation.contact_sheets import draw_sheets
from raydistill.generation.forecast import check_generate, forecast
from raydistill.generation.generator import Generator, Request
from raydistill.generation.made import MADE, Made, working_image
from raydistill.generation.pipelines import PipelineFacts, class_numbers, inspect_pipeline
from raydistill.generation.recipes import GeneratorActor, make_recipes, read_made
from raydistill.generation.selection import Chosen
from raydistill.graph import Work
from raydistill.identity import generate_directory, stage_directory, views_name
from raydistill.models.teacher import load_teacher
from raydistill.pages.report import write_report
from raydistill.pages.summary import closing_table
from raydistill.results import GeneratedImages, Outcome, Report
from raydistill.run import run_stages
from raydistill.runtime.progress import Progress
from raydistill.search.compare import _arms
from raydistill.stages import generate
from raydistill.stages.generate import label_weights
from raydistill.storage.directory import StageDirectory, check_writable
from raydistill.storage.filesystems import FileSystem
from raydistill.storage.jobs import JobRecord
from tests.processes import run_and_kill, wait_for
from tests.small_run import write_shard

# No node of the tests' cluster has the label, and any will do.
ANYWHERE = ["cluster.generator_labels={pool: spot}", "cluster.generator_fallback={}"]
NO_TEACHER = ["teacher=null", "loss.kd_weight=0", "loss.alignment_weight=0", "loss.uniformity_weight=0"]


@pytest.fixture
def generating(words, class_pipeline) -> list[str]:
    return [*words, f"generate.pipeline={class_pipeline}", "generate.steps=2", "generate.per_class=6",
            "generate.batch_size=4", "generate.dtype=fp32"]  # fmt: skip


@pytest.fixture
def unconditional(class_pipeline, tmp_path) -> Path:
    """The pipeline without its classes."""
    folder = tmp_path / "unconditional"
    shutil.copytree(class_pipeline, folder)
    (folder / "classes.json").unlink()
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "num_class_embeds": None}))
    return folder


@pytest.fixture
def in_this_process(monkeypatch, progress):
    """`generate` by one actor in this process instead of a pool of Ray's."""

    def run_units(config, samples, facts, units, plan):
        actor = GeneratorActor(config.generate, facts, samples, generate._pin(config))
        for unit in units:
            yield {key: values[0] for key, values in actor({"unit": np.array([unit["unit"]])}).items()}

    def run(config: RunConfig, samples: SampleSet) -> GeneratedImages:
        check_writable(config)
        with monkeypatch.context() as patched:
            patched.setattr(generate, "_run_units", run_units)
            plan = plan_resources(config, 2.0, 0.0, 2)
            return generate.generate_images(config, samples, None, generate_directory(config, samples), plan, progress)

    return run


@pytest.fixture
def samples(make_set) -> SampleSet:
    """Nine labelled train images, six val ones."""
    return sample_set(make_set("samples", num_train=9, labelled=9).samples)


def sample_set(made: SampleSet) -> SampleSet:
    return dataclasses.replace(
        made, ids=dict.fromkeys(("train", "val", "test"), "i"), labels=dict.fromkeys(("train", "val", "test"), "l")
    )


def raw_images(workspace: Path) -> dict[tuple[str, int, int], bytes]:
    """Everything that was made, by class, index and attempt."""
    found: dict[tuple[str, int, int], bytes] = {}
    for file in workspace.glob("generated/*/*.parquet"):
        name = json.loads((file.parent / "identity.json").read_text())["class"]
        for row in pq.read_table(file).to_pylist():
            key = (name, row["index"], row["attempt"])
            assert found.setdefault(key, row["image"]) == row["image"]
    return found


def set_hash(outcome) -> str:
    """Of the chosen images in their order, and of the ledger."""
    folder = Path(outcome.generated.samples.path)
    digest = hashlib.sha256()
    for shard in sorted(folder.glob("train-*.parquet")):
        digest.update(shard.read_bytes())
    ledger = pq.read_table(folder / "ledger.parquet").drop_columns(["file", "seconds"])
    digest.update(json.dumps(ledger.to_pylist()).encode())
    return digest.hexdigest()


@pytest.mark.cluster
@pytest.mark.usefixtures("ray_session", "taught")
class TestWithRay:
    def test_generated_images_are_taught_and_trained_on_and_never_scored(self, generating, progress) -> None:
        generating = [*generating, "images.shard_size=32"]
        plain = run_stages(load_config([*generating, "generate=null"]), progress)
        outcome = run_stages(load_config([*generating, "generate.filter.weigh=true"]), progress)
        assert outcome.directories["teach"] == plain.directories["teach"]  # no real image was taught again
        generated = outcome.generated
        assert generated.kept == {"blue": 6, "green": 6, "red": 6}
        samples = generated.samples
        (table,) = (decode_shard(p.read_bytes()) for p in sorted(Path(samples.path).glob("*-00000.parquet")))
        rows = table.to_pylist()
        raw = {sample_id(image): (key, image) for key, image in raw_images(Path(samples.path).parent).items()}
        for row in rows:
            key, image = raw[row["sample_id"]]
            assert samples.classes[row["label"]] == key[0]
            assert (row["source"], row["split"]) == ("generated", "train")
            assert row["image"] == decode(image, 32, "crop", 10**6).tobytes()
        targets = read_targets(outcome.directories["teach_generated"], "train", 0, [row["sample_id"] for row in rows])
        assert targets.shape[:2] == (2, 18)
        weights = label_weights(load_config([*generating, "generate.filter.weigh=true"]), generated)
        assert set(weights) == {row["sample_id"] for row in rows}
        assert all(0 < weight < 1 for weight in weights.values())
        assert outcome.report.student["val"]["images"] == plain.report.student["val"]["images"]
        assert outcome.student.steps == plain.student.steps  # the same budget
        assert outcome.without_generated == plain.report
        shown = Console(width=200, record=True, file=io.StringIO())
        shown.print(closing_table(load_config(generating), outcome))
        now, then = (r.student["test"]["accuracy"] for r in (outcome.report, plain.report))
        assert f"test by generated images  {100 * (now - then):+.1f} points" in shown.export_text()
        assert outcome.directories["distill"] != plain.directories["distill"]
        for name in ("sheet-000.png", "ledger.parquet", "generate.json"):
            assert (Path(samples.path) / name).stat().st_size > 0
        page = Path(write_report(load_config(generating), outcome, "raydistill run job.yaml")).read_text()
        by_class = re.sub(r"<[^>]+>", "|", page.partition("Generated images")[2])
        assert all(re.search(rf"\|{name}\|+6\|+6\|", by_class) for name in samples.classes)
        deltas = json.loads((Path(outcome.report.path) / "deltas.json").read_text())
        assert {split: set(of_split) for split, of_split in deltas.items()} == {
            split: set(samples.classes) for split in ("val", "test")
        }
        again = run_stages(load_config([*generating, "generate.filter.weigh=true"]), progress)
        assert set(again.seconds.values()) == {0.0}
        made = {p: p.stat().st_mtime_ns for p in Path(samples.path).parent.glob("generated/*/*.parquet")}
        unjudged = run_stages(load_config(generating), progress, "generate")
        assert unjudged.generated.kept == generated.kept
        assert {p: p.stat().st_mtime_ns for p in Path(samples.path).parent.glob("generated/*/*.parquet")} == made

    @pytest.mark.slow
    def test_every_stage_sees_the_pixels_of_stored_jpegs(self, generating, progress) -> None:
        config = load_config([*generating, "images.store=jpeg", "images.shard_size=32", "generate.filter.weigh=true"])
        outcome = run_stages(config, progress, "export")
        made, backbone = outcome.generated.samples, load_teacher(config.teacher)[0]
        raw = {sample_id(image): image for image in raw_images(Path(made.path).parent).values()}
        for samples, taught in ((outcome.samples, "teach"), (made, "teach_generated")):
            file = Path(samples.path) / "train-00000.parquet"
            jpegs = decode_shard(file.read_bytes())["image"].to_pylist()
            assert all(data.startswith(b"\xff\xd8") for data in jpegs)
            table = read_samples(samples, "train", 0)
            ids, images = table["sample_id"].to_pylist(), working_images(table, 32)
            for i, image, data in zip(ids, images, jpegs, strict=True):
                np.testing.assert_array_equal(image, np.asarray(Image.open(io.BytesIO(data))))
                if samples is made:  # what the filter's teacher saw
                    np.testing.assert_array_equal(image, np.asarray(working_image(raw[i], config.images)))
            parameters = view_parameters(config.views, config.seed, ids, [1] * len(ids))
            views = render(torch.from_numpy(images.copy()), torch.from_numpy(parameters), backbone.preprocessing)
            targets = read_targets(outcome.directories[taught], "train", 0, ids)
            np.testing.assert_allclose(targets[1], backbone(views).numpy(), atol=2e-3, rtol=2e-3)

    @pytest.mark.slow
    def test_a_committee_judges_generated_images_and_teaches_them(self, generating, progress, tmp_path) -> None:
        second, alone = tmp_path / "second.safetensors", load_config(generating).teacher
        torch.manual_seed(0)
        network = timm.create_model("test_efficientnet", num_classes=0)
        save_file({name: value.contiguous() for name, value in network.state_dict().items()}, second)
        words = [
            f"teacher.model=[{alone.model}, timm:test_efficientnet]", f"teacher.weights=[{alone.weights}, {second}]",
            "teacher.size=[32, 48]", "generate.filter.weigh=true",
        ]  # fmt: skip
        outcome = run_stages(load_config([*generating, *words]), progress, "teach")
        ledger = pq.read_table(f"{outcome.generated.samples.path}/ledger.parquet").to_pylist()
        kept = [row["weight"] for row in ledger if row["verdict"] == "kept"]
        assert all(0 <= weight < 1 for weight in kept), "the committee was asked"
        shards = sorted(Path(outcome.directories["teach_generated"]).glob("train-*"))
        assert shards
        for shard in shards:
            parts = [f"{outcome.directories[f'teach_generated_{k}']}/{shard.name}" for k in (1, 2)]
            (_, together), (_, first), (_, other) = map(read_all_targets, (str(shard), *parts))
            np.testing.assert_array_equal(together, np.concatenate([first, other], axis=2))
        assert sum(outcome.generated.samples.shards["train"]) == len(kept) == 18

    @pytest.mark.slow
    def test_on_a_cluster_the_teacher_sees_images_as_they_come(self, generating, progress, tmp_path) -> None:
        workspace, words = tmp_path / "workspace", [*generating, "images.shard_size=8"]
        apart = run_stages(load_config(words), progress, "teach")
        for folder in [workspace / "generated", *workspace.glob("generate-*")]:
            shutil.rmtree(folder)
        taught = Path(apart.directories["teach_generated"])
        taught.rename(tmp_path / "apart")
        shown = Console(width=200, record=True, file=io.StringIO())
        config = load_config([*words, "cluster.address=auto"])
        streamed = run_stages(config, Progress(shown), "teach")
        assert streamed.generated.kept == apart.generated.kept
        assert Path(streamed.directories["teach_generated"]) == taught
        assert "18 done during generate" in shown.export_text()
        shards = sorted(taught.glob("train-*"))
        for shard, rows in enumerate(sorted(Path(streamed.generated.samples.path).glob("train-*.parquet"))):
            ids = pq.read_table(rows)["sample_id"].to_pylist()
            as_they_came, later = (
                read_targets(str(place), "train", shard, ids) for place in (taught, tmp_path / "apart")
            )
            np.testing.assert_allclose(as_they_came, later, atol=2e-3)
            assert np.ptp(as_they_came.astype(np.float32)) > 0.1
        assert len(shards) == 3

        written = [shard.read_bytes() for shard in shards]
        views = sorted(workspace.glob(f"generated/*/*-{views_name(config.views, config.seed)}.safetensors"))
        assert len(views) == 6  # two files of each class
        views[0].unlink()  # the actor was lost before it wrote this one
        before = {file: file.stat().st_mtime_ns for file in views[1:]}
        shutil.rmtree(taught)
        workspace.rename(tmp_path / "moved")
        run_stages(load_config([*words, "cluster.address=auto", f"workspace={tmp_path}/moved"]), progress, "teach")
        (tmp_path / "moved").rename(workspace)
        assert {file: file.stat().st_mtime_ns for file in views[1:]} == before
        assert [shard.read_bytes() for shard in shards] == written

    def test_batches_actors_order_and_more_images_change_no_image(self, generating, progress, tmp_path) -> None:
        workspace = tmp_path / "workspace"

        def run(*more: str):
            return run_stages(load_config([*generating, *NO_TEACHER, *more]), progress, "generate")

        hashes, images = set(), []
        for more in (
            ("generate.batch_size=1", "cluster.generator_actors=[1,1]"),
            ("generate.batch_size=4", "cluster.generator_actors=[2,2]", *ANYWHERE),
        ):
            hashes.add(set_hash(run(*more)))
            images.append(raw_images(workspace))
            for folder in [workspace / "generated", *workspace.glob("generate-*")]:
                shutil.rmtree(folder)
        run("generate.per_class=2", "generate.batch_size=2")
        before = {p: p.stat().st_mtime_ns for p in workspace.glob("generated/*/*.parquet")}
        hashes.add(set_hash(run("generate.batch_size=3")))
        assert {p: p.stat().st_mtime_ns for p in before} == before
        images.append(raw_images(workspace))
        assert len(hashes) == 1
        assert images[0] == images[1] == images[2]
        assert len(images[0]) == 18

    @pytest.mark.slow
    def test_all_rejected_ends_the_run_and_keeps_what_was_made(self, generating, progress, tmp_path) -> None:
        config = load_config([*generating, "generate.filter.contrast=200", "generate.attempts=2"])
        with pytest.raises(StageError, match=r"no image of 'blue', 'green', 'red' was kept \(36 near-constant\)"):
            run_stages(config, progress, "generate")
        workspace = tmp_path / "workspace"
        assert len(raw_images(workspace)) == 36
        assert not list(workspace.glob("generate-*/DONE"))
        (folder,) = workspace.glob("generate-*")
        assert set(pq.read_table(folder / "ledger.parquet")["verdict"].to_pylist()) == {"near-constant"}
        assert len(list(folder.glob("sheet-*.png"))) == 3

    @pytest.mark.slow
    def test_where_no_image_is_wanted_the_student_is_that_of_the_real_ones(self, generating, progress) -> None:
        more = ["generate.ratio=0", "generate.per_class=null"]
        without = run_stages(load_config([*generating, *more, "generate=null"]), progress)
        outcome = run_stages(load_config([*generating, *more]), progress)
        assert sum(outcome.generated.kept.values()) == 0
        assert outcome.report.student == without.report.student

    @pytest.mark.slow
    def test_a_generated_copy_of_a_test_image_is_rejected(self, generating, progress, tmp_path) -> None:
        """The test split holds what the pipeline makes, at twice the size: leakage."""
        first = run_stages(load_config([*generating, *NO_TEACHER]), progress, "generate")
        images = tmp_path / "leaky"
        for (name, index, _), image in raw_images(tmp_path / "workspace").items():
            split = "test" if index < 2 else "val" if index < 3 else "train"
            (images / split / name).mkdir(parents=True, exist_ok=True)
            (images / split / name / f"{index}.png").write_bytes(image)
        more = [f"images.path={images}", "images.size=32", "generate.attempts=1"]
        leaky = run_stages(load_config([*generating, *NO_TEACHER, *more]), progress, "generate")
        assert sum(first.generated.kept.values()) == 18
        assert leaky.generated.rejected == {"duplicate of a val or test image": 9}
        assert leaky.generated.missing == {"blue": 3, "green": 3, "red": 3}

    @pytest.mark.parametrize(
        ("more", "message"),
        [
            (["generate.pipeline=/nowhere"], "no such folder"),
            (["generate.class_ids={red: 0}", "images.path=OTHER"], "does not know the classes"),
            (["generate.scheduler=Nope"], "no such scheduler"),
            (["generate.filter.class_confidence={cyan: 0.5}", "WITH_TEACHER"], "no class 'cyan'"),
            (["cluster.generator_labels={pool: spot}"], "matches no node"),
            (["generate.size=2048", "generate.per_class=100000000"], "are free in"),
        ],
    )
    def test_what_cannot_work_is_refused_before_an_image_is_made(
        self, generating, progress, tmp_path, class_folders, more, message
    ) -> None:
        folders = {f"{split}/{name}": 3 for split in ("train", "val") for name in ("cat", "red")}
        other = f"images.path={class_folders(folders)}"
        without = [] if "WITH_TEACHER" in more else NO_TEACHER
        more = [word for word in more if word != "WITH_TEACHER"]
        words = [*generating, *without, *(other if word == "images.path=OTHER" else word for word in more)]
        with pytest.raises(ConfigError, match=message):
            run_stages(load_config(words), progress, "generate")
        assert not list(tmp_path.glob("workspace/generated/*/*.parquet"))

    @pytest.mark.slow
    def test_a_killed_generator_actor_changes_nothing(self, generating, progress, tmp_path) -> None:
        words = [*generating, *NO_TEACHER, "generate.per_class=24", "generate.batch_size=2", "generate.steps=8"]
        unbroken = run_stages(load_config([*words, f"workspace={tmp_path}/unbroken"]), progress, "generate")
        broken = run_and_kill(
            lambda: run_stages(load_config(words), progress, "generate"), "GeneratorActor",
            lambda: list(tmp_path.glob("workspace/generated/*/*.parquet")),
        )  # fmt: skip
        assert set_hash(broken) == set_hash(unbroken)

    def test_the_forecast_names_prompts_counts_and_costs(self, generating, text_pipeline) -> None:
        config = load_config(generating)
        with pytest.raises(ConfigError, match="raydistill prepare"):
            list(forecast(load_config([*generating, "seed=1"])))
        lines = "\n".join(forecast(config))
        assert "red: 6 images, 0 of them made before, 2 steps each" in lines
        assert "18 images, 36 steps" in lines
        prompted = [*generating, f"generate.pipeline={text_pipeline(True)}", "generate.templates=['a {class}']"]
        assert "100%  a red" in "\n".join(forecast(load_config(prompted)))


def command(words: list[str], *more: str) -> subprocess.Popen:
    arguments = [sys.executable, "-c", "from raydistill.cli import main; main()", "generate", *words, *more]
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def num_files(workspace: Path) -> int:
    return len(list(workspace.glob("generated/*/*.parquet")))


@pytest.mark.slow
def test_killed_drivers_at_random_times_make_the_same_set(generating, progress, tmp_path) -> None:
    """kill -9 of the driver and all it started, up to twenty times, until nothing is left to make."""
    words = [*generating, *NO_TEACHER, "generate.per_class=40", "generate.batch_size=2", "generate.steps=10"]
    unbroken = command(words, f"workspace={tmp_path}/unbroken")
    assert unbroken.wait(300) == 0, unbroken.stdout.read()
    broken, chance, killed = tmp_path / "broken", random.Random(0), 0
    for _ in range(20):
        process = command(words, f"workspace={broken}")
        enough = num_files(broken) + chance.randint(1, 12)
        wait_for(lambda: num_files(broken) >= enough or process.poll() is not None)  # noqa: B023 - called at once
        if process.poll() is not None:  # all that was left is made
            assert process.returncode == 0, process.stdout.read()
            break
        killed += 1
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for partial in broken.glob("generated/*/*.parquet"):
            pq.read_table(partial)  # whole under its final name
    last = command(words, f"workspace={broken}")
    assert last.wait(300) == 0, last.stdout.read()
    assert killed >= 3
    assert raw_images(broken) == raw_images(tmp_path / "unbroken")
    shards = [
        [p.read_bytes() for p in sorted(folder.glob("generate-*/train-*.parquet"))]
        for folder in (broken, tmp_path / "unbroken")
    ]
    assert shards[0] == shards[1] != []


def with_test_split(samples: SampleSet, config: RunConfig, files: list[bytes]) -> SampleSet:
    """As `prepare` would have made them of these files."""
    working = [working_image(file, config.images).tobytes() for file in files]
    write_shard(Path(samples.path), "test-00000", working, [0] * len(files), of=files)
    return dataclasses.replace(samples, shards={**samples.shards, "test": (len(files),)})


@pytest.mark.parametrize("size", [16, 32])
def test_a_copy_of_a_test_image_is_rejected_whatever_the_working_size(
    generating, in_this_process, make_set, tmp_path, size
) -> None:
    """The pipeline makes 16 pixels."""
    samples = sample_set(make_set("samples of a size", num_train=9, labelled=9, size=size).samples)
    config = load_config([*generating, *NO_TEACHER, f"images.size={size}", "generate.attempts=1"])
    plain = in_this_process(config, samples)
    assert sum(plain.kept.values()) == 18
    files = [image for (_, index, _), image in raw_images(tmp_path / "workspace").items() if index < 2]
    leaky = with_test_split(dataclasses.replace(samples, ids={**samples.ids, "test": "other"}), config, files)
    generated = in_this_process(config, leaky)
    assert generated.rejected == {"duplicate of a val or test image": 6}
    assert generated.kept == dict.fromkeys(samples.classes, 4)


@pytest.mark.parametrize("workspace", ["[w]*?", "file://{root}/w"])
def test_a_workspace_may_have_any_name(generating, in_this_process, samples, tmp_path, workspace) -> None:
    place = workspace.format(root=tmp_path) if "://" in workspace else f"{tmp_path}/{workspace}"
    config = load_config([*generating, *NO_TEACHER, f"workspace={place}"])
    assert sum(in_this_process(config, samples).kept.values()) == 18
    huge = load_config([*generating, *NO_TEACHER, f"workspace={place}", "generate.per_class=1000000000"])
    with pytest.raises(ConfigError, match="are free in"):
        in_this_process(huge, samples)


def test_files_that_do_not_arrive_end_the_run(generating, samples, progress, monkeypatch) -> None:
    config = load_config([*generating, *NO_TEACHER])
    check_writable(config)
    monkeypatch.setattr(generate, "_run_units", lambda *rest: iter([]))
    with pytest.raises(StageError, match="18 new images are missing in"):
        generate.generate_images(
            config, samples, None, generate_directory(config, samples), plan_resources(config, 2.0, 0.0, 2), progress
        )


def test_ledger_and_settings_suffice_to_make_an_image_again(generating, in_this_process, samples) -> None:
    folder = Path(in_this_process(load_config([*generating, *NO_TEACHER]), samples).samples.path)
    told = json.loads((folder / "generate.json").read_text())
    settings, facts = Generate.model_validate(told["settings"]), PipelineFacts(**told["pipeline"])
    maker = Generator(settings, facts, torch.device("cpu"))
    for row in pq.read_table(folder / "ledger.parquet").to_pylist()[::7]:
        own = settings.prompt_settings(row["class"])
        class_id = class_numbers(settings, facts, [row["class"]])[row["class"]]
        for seed, is_it in ((row["seed"], True), (row["seed"] + 1, False)):
            request = Request(seed, row["prompt"], class_id, own.negative_prompt, own.steps, own.guidance)
            (picture,) = maker.pictures([request])
            assert (sample_id(encode(picture.image)) == row["id"]) == is_it


def test_what_auto_stands_for_is_said_and_one_for_all_images(generating, in_this_process, samples, monkeypatch) -> None:
    monkeypatch.setattr(precision, "_SECONDS", 0.0)
    words = [*generating, *NO_TEACHER, "generate.dtype=auto"]
    first = in_this_process(load_config([*words, "generate.per_class=2"]), samples)
    told = json.loads((Path(first.samples.path) / "generate.json").read_text())
    (pin,) = (Path(first.samples.path).parent / "precision").iterdir()
    assert told["dtype"] == json.loads(pin.read_text())["precision"]
    assert told["settings"]["dtype"] == "auto"
    monkeypatch.setattr(precision, "measure", None)  # all later ones read it
    assert sum(in_this_process(load_config(words), samples).kept.values()) == 18
    plain = in_this_process(load_config([*generating, *NO_TEACHER, f"generate.dtype={told['dtype']}"]), samples)
    images = [raw_images(Path(first.samples.path).parent), sum(plain.kept.values())]
    assert len(images[0]) == images[1] == 18  # of equal bytes in both directories


def test_what_was_made_is_read_without_its_pixels(generating, in_this_process, samples, monkeypatch) -> None:
    config = load_config([*generating, *NO_TEACHER, "generate.per_class=2"])
    in_this_process(config, samples)
    recipe = make_recipes(config, samples, inspect_pipeline(config.generate))["red"]
    (file,) = Path(recipe.directory.path).glob("*.parquet")
    rows = pq.read_table(file)
    heavy = pa.array([b"x" * 5_000_000] * len(rows), pa.binary())
    pq.write_table(rows.set_column(rows.column_names.index("image"), "image", heavy), file, compression="none")
    read = []

    class Counting(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            data = super().read(size)
            read.append(len(data))
            return data

    monkeypatch.setattr(FileSystem, "open", lambda _, path: Counting(path))
    assert set(read_made(recipe)) == {("red", 0, 0), ("red", 1, 0)}
    assert 0 < sum(read) < 200_000


def test_a_laptop_does_not_teach_while_it_generates(generating) -> None:
    for more, streams in (
        ([], False),
        (["cluster.address=auto"], True),
        (["cluster.address=auto", "views.per_image=fresh"], False),
        (["cluster.address=auto", *NO_TEACHER], False),
        (["cluster.address=auto", "generate=null"], False),
    ):
        assert load_config([*generating, *more]).streams_generated is streams


def test_nothing_was_made_where_there_is_no_directory_yet(generating, samples) -> None:
    config = load_config([*generating, *NO_TEACHER])
    recipes = make_recipes(config, samples, inspect_pipeline(config.generate))
    assert all(read_made(recipe) == {} for recipe in recipes.values())


def test_images_count_by_all_that_decides_them(generating, samples, text_pipeline) -> None:
    """The commit of a pipeline on the hub, and the working size where they begin from train images."""

    def places(*more: str, **changes: object) -> list[str]:
        config = load_config([*generating, *NO_TEACHER, *more])
        facts = dataclasses.replace(inspect_pipeline(config.generate), **changes)
        return [recipe.directory.path for recipe in make_recipes(config, samples, facts).values()]

    assert not set(places(commit="c0ffee")) & {*places(), *places(commit="decade")}
    assert places("images.size=48") == places()
    from_images = [f"generate.pipeline={text_pipeline(True)}", "generate.strength=0.5"]
    before = places(*from_images)
    assert places(*from_images) == before
    for change in ("images.size=48", "images.fit=pad"):
        assert not set(places(*from_images, change)) & set(before)


@pytest.mark.parametrize(
    ("pipeline", "more", "message"),
    [
        ("class", ["generate.overrides={rde: {steps: 3}}"], "generate.overrides: the data has no class 'rde'"),
        ("class", ["generate.class_ids={rde: 1}"], "generate.class_ids: the data has no class 'rde'"),
        ("class", ["generate.filter.class_confidence={rde: 0.1}"], "class_confidence: the data has no class 'rde'"),
        ("none", ["generate.filter.class_confidence={rde: 0.1}"], "class_confidence: the data has no class 'rde'"),
        ("none", ["generate.overrides={rde: {steps: 3}}"], "generate.overrides: the data has no class 'rde'"),
        ("none", ["generate.overrides={red: {steps: 3}}"], "generate.overrides is by class"),
        ("none", ["generate.balance=true", "generate.per_class=null"], "generate.balance is by class"),
        ("none", ["generate.class_ids={red: 1}"], "generate.class_ids gives numbers to 'red'"),
        ("none", ["generate.steps=1001"], "has only 1000 steps"),
        ("class", ["generate.steps=1001"], "has only 1000 steps"),
        ("class", ["generate.class_ids={red: 4}"], "'red' would be class 4"),
        ("class", ["generate.class_ids={red: 1}"], "'red' and 'green' would both be class 1"),
        ("class", ["generate.scheduler=ScoreSdeVeScheduler"], "no usable step method"),
    ],
)
def test_what_would_die_in_an_actor_is_refused_before(
    generating, class_pipeline, unconditional, pipeline, more, message
) -> None:
    folder = class_pipeline if pipeline == "class" else unconditional
    config = load_config([*generating, f"generate.pipeline={folder}", *more])
    with pytest.raises(ConfigError, match=message):
        check_generate(config, ("red", "green", "blue"))


def test_what_is_right_is_not_refused(generating, unconditional) -> None:
    for more in ([], [f"generate.pipeline={unconditional}"], ["generate.class_ids={red: 1, green: 2, blue: 0}"]):
        check_generate(load_config([*generating, *more]), ("red", "green", "blue"))


def test_a_pool_that_may_be_empty_begins_with_one_actor(generating) -> None:
    none, one = (load_config([*generating, f"cluster.generator_actors=[{fewest},8]"]) for fewest in (0, 1))
    for cpus, gpus in ((2, 0), (16, 4)):
        assert plan_resources(none, cpus, gpus, cpus) == plan_resources(one, cpus, gpus, cpus)
    with pytest.raises(ConfigError, match=r"cluster\.generator_actors"):
        load_config([*generating, "cluster.generator_actors=[0,0]"])


def test_ray_data_waits_for_slow_images_and_for_nodes() -> None:
    from ray.data import DataContext

    configure_ray_data()
    assert DataContext.get_current().execution_no_progress_timeout_s == -1  # its word for never


def test_every_class_has_a_contact_sheet(tmp_path) -> None:
    names = [f"class {k}" for k in range(103)]
    picture = encode(Image.new("RGB", (8, 8)))
    pq.write_table(pa.table({"image": pa.array([picture], MADE.field("image").type)}), tmp_path / "made.parquet")
    one = Made(f"{tmp_path}/made.parquet", 0, sample_id(picture), 0, "", "", "", 0.0, b"", 0.0)
    keys = [(name, 0, 0) for name in names]
    chosen = Chosen(dict.fromkeys(keys[1:], 1.0), dict.fromkeys(keys, "kept") | {keys[0]: "not finite"}, None, [], {})
    directory = StageDirectory(str(tmp_path / "generate"), "generate", "")
    draw_sheets(directory, names, dict.fromkeys(keys, one), chosen, Images(path="x", size=8))
    assert {p.name for p in (tmp_path / "generate").iterdir()} == {f"sheet-{k:03d}.png" for k in range(103)}


class Recorded:
    """A tracker, and its run, that keep what they are to log."""

    def __init__(self) -> None:
        self.artifacts: list[str] = []
        self.parent = self

    def files(self, paths: list[str], folder: str) -> None:
        self.artifacts += paths


@pytest.mark.parametrize(("workspace", "logged"), [("w", 5), ("file://{root}/w", 0)])
def test_sheets_are_recorded(generating, in_this_process, samples, tmp_path, progress, workspace, logged) -> None:
    """Three sheets, `generate.json` and the ledger, where MLflow can read them."""
    place = workspace.format(root=tmp_path) if "://" in workspace else f"{tmp_path}/{workspace}"
    config = load_config([*generating, *NO_TEACHER, f"workspace={place}"])
    in_this_process(config, samples)
    prepared, tracker = stage_directory(config, "prepare", {}), Recorded()
    work = Work(Listing(Entries.of(()), (), {}, ""), prepared, {"generate": None}, frozenset(), False)
    with RayStart(config) as ray:
        execution = Execution(config, progress, work, ray, tracker, JobRecord(config, "0" * 12, ""))
        execution.outcome.samples = samples
        generate.generate(execution)
    names = [Path(path).name for path in tracker.artifacts]
    assert sum(name.startswith("sheet-") or name in ("generate.json", "ledger.parquet") for name in names) == logged


def measured(*recalls: float | None) -> dict[str, dict[str, object]]:
    """Of a split in which a class without a recall has no images."""
    per_class = {
        f"class {k}": {"images": 0 if recall is None else 10, "answers": 9, "recall": recall}
        for k, recall in enumerate(recalls)
    }
    accuracy = float(np.mean([recall for recall in recalls if recall is not None]))
    return {"test": {"accuracy": accuracy, "interval": [0.0, 1.0], "per_class": per_class}}


def test_every_class_is_in_the_file_of_changes_and_the_extremes_are_shown(generating, tmp_path) -> None:
    reports = [
        Report(str(tmp_path), measured(*recalls), None, None, None, 1, None, 1.0, None, "CPU")
        for recalls in ((0.5, 0.25, 0.75, None), (0.5, 0.5, 0.25, None))
    ]
    outcome = Outcome(report=reports[0], without_generated=reports[1])
    shown = Console(width=200, record=True, file=io.StringIO())
    shown.print(closing_table(load_config(generating), outcome))
    assert "+8.3 points (class 1 -25.0, class 2 +50.0)" in shown.export_text()
    deltas = json.loads((tmp_path / "deltas.json").read_text())["test"]
    assert {name: of_class["points"] for name, of_class in deltas.items()} == {
        "class 0": 0.0,
        "class 1": -25.0,
        "class 2": 50.0,
    }
    assert deltas["class 2"] == {"images": 10, "without": 0.25, "with": 0.75, "points": 50.0}


def test_a_comparison_leaves_out_arms_that_have_no_use_for_unlabelled_images(generating, unconditional) -> None:
    shown = Console(width=200, record=True, file=io.StringIO())
    config = load_config([*generating, f"generate.pipeline={unconditional}", "compare.arms=[scratch,kd]"])
    assert _arms(config, Progress(shown)) == ["scratch", "kd", "kd+generated"]
    assert "scratch+generated is left out" in shown.export_text()
    labelled = load_config([*generating, "compare.arms=[scratch,kd]"])
    assert _arms(labelled, Progress(shown)) == ["scratch", "kd", "scratch+generated", "kd+generated"]
