"""Stage directories: named by what decides the result and by nothing else (case C12), written whole or not at all (case
C20)."""

import dataclasses
import errno
import json
import os
import re
import stat
import subprocess
import sys
import threading
from pathlib import Path

import fsspec
import psutil
import pytest

from raydistill import identity
from raydistill.config import RunConfig, known_keys, load_config
from raydistill.config.views import STRENGTHS
from raydistill.data.sample import SampleSet, samples_from_json
from raydistill.data.sources.columns import Entries, Entry
from raydistill.data.sources.listing import Listing
from raydistill.errors import CheckpointError, ConfigError, StageError
from raydistill.search.directory import trained_settings
from raydistill.storage.directory import StageDirectory, check_writable, read_bill, workspace_root
from raydistill.storage.filesystems import write_bytes

ENTRIES = Entries.of([Entry("/i/a/0.png", "a", None), Entry("/i/b/0.png", "b", None)])
LISTING = Listing(ENTRIES, ("a", "b"), {}, "0123")
SAMPLES = SampleSet(
    path="/w/prepare-1",
    classes=("a", "b"),
    size=64,
    shards={"train": (4,), "val": (2,), "test": (2,)},
    num_labelled={"train": 3, "val": 2, "test": 2},
    num_refused=0,
    ids={"train": "t", "val": "v", "test": "e"},
    labels={"train": "lt", "val": "lv", "test": "le"},
)
STAGES = ("decoded", "prepare", "features", "held_out", "adapt", "teach", "distill", "evaluate", "export")
NOTHING, STUDENT = set(), {"distill", "evaluate", "export"}
HEAD, VIEWS = {"adapt", *STUDENT}, {"teach", *STUDENT}
TEACHER = {"features", "held_out", "adapt", "teach", *STUDENT}


def config_of(*words: str) -> RunConfig:
    return load_config(["images.path=./my_images", *words])


def names(*words: str, samples: SampleSet = SAMPLES, listing: Listing = LISTING) -> dict[str, str]:
    """The directory of every stage, without the workspace it lies in."""
    config = config_of(*words)
    found = {stage: getattr(identity, f"{stage}_directory")(config, listing).name for stage in STAGES[:2]}
    for stage in STAGES[2:]:
        found[stage] = getattr(identity, f"{stage}_directory")(config, samples).name
    return found


def changed(before: dict[str, str], after: dict[str, str]) -> set[str]:
    return {stage for stage in STAGES if before[stage] != after[stage]}


def by_change(*table: tuple[set[str], str]) -> dict[str, set[str]]:
    """What a row makes new, by each of its changes: these stand two spaces or a line apart."""
    return {change: stages for stages, changes in table for change in re.split(r"\s{2,}", changes.strip())}


# A change of each key, by the stages that have to be done again because of it. What images.path and images.classes name
# is told by the listing.
EFFECTS = by_change(
    (NOTHING, """
        name=other  workspace=/elsewhere  images.path=elsewhere  images.classes=list.txt
        images.allow_missing_val=true  teacher.batch_size=7  teacher.allow_near_chance=true
        teacher.fine_tune_epochs=3  teacher.fine_tune_learning_rate=0.1  teacher.fine_tune_batch_size=32
        teacher.prompts=['{class}']  compare.arms=[kd]  compare.seeds=2  cluster.price_per_hour=2
        cluster.prices={"spot":2}  tune.space=space.yaml  tune.trials=3  tune.sampler=random  tune.pruner=none
        tune.grace_epochs=2  tune.objectives=[loss]  tune.concurrent=2  tune.confirm_seeds=1
        tune.storage=postgresql://host/studies  compare.student_weights=example:efficientnet-lite0
        compare.label_shares=[0.5]  distill.cache=stream  distill.checkpoint_seconds=0  distill.max_failures=0
        evaluate.batch_size=5  export.allow_useless=true  export.hub=me/student  export.register_as=student
        cluster.address=ray://head:10001  cluster.teacher_actors=[2,3]  cluster.generator_actors=[2,3]
        cluster.spill_directory=/scratch/spill  cluster.grows_to={"CPU":8}  cluster.threads=3
        cluster.generator_labels={"pool":"spot"}
        views.strength=light  views.strong_share=0.5  views.hue=0
        cluster.generator_fallback={"pool":"train"}  tracking.enabled=false  tracking.uri=http://host:5000
    """),
    ({"prepare"} | VIEWS, "seed=1"),
    ({"decoded", "prepare"} | TEACHER, "images.size=64  images.fit=pad  images.store=jpeg"),
    ({"prepare"} | TEACHER, "images.shard_size=32"),
    ({"prepare"}, """
        images.val_share=0.2  images.test_share=0.2  images.num_labelled=2  images.num_unlabelled=2
        images.max_per_class=1  images.max_bad_share=0.5
    """),
    ({"decoded", "prepare"}, "images.max_pixels=1000  images.max_bytes=1000"),
    (TEACHER, """
        teacher.model=timm:resnet18  teacher.weights=example:efficientnet-lite2  teacher.revision=abc
        teacher.size=64  teacher.center_crop=true  teacher.precision=bf16  teacher.precision=fp32
    """),
    (HEAD, "teacher.head=native  teacher.class_balanced=true"),
    (STUDENT, """
        student.model=timm:resnet18  student.init=pretrained
        student.weights=example:efficientnet-lite0 student.init=pretrained  student.size=32  loss.task_weight=2
        loss.kd_weight=2  loss.temperature=2  loss.alignment_weight=2  loss.uniformity_weight=2
        loss.alignment_alpha=1  loss.uniformity_t=1  loss.projection_dim=64  loss.info_nce_weight=1
        loss.crd_weight=1  loss.contrastive_temperature=0.1  loss.crd_negatives=8  loss.crd_memory=9
        loss.srrl_weight=1  loss.dkd_weight=1  loss.dkd_target_factor=2  loss.dkd_other_factor=2  loss.dist_weight=1
        loss.standardised_kd_weight=1  loss.feature_weight=1  loss.feature_distance=cosine
        loss.rkd_distance_weight=1  loss.rkd_angle_weight=1  loss.projection_head=linear  loss.adapter=linear
        student.revision=abc  distill.body_rate=0.5  loss.kd_weight=[1,0]  distill.epochs=3  distill.batch_size=8
        distill.labelled_share=0.5  distill.optimizer=sgd  distill.learning_rate=0.1  distill.weight_decay=0
        distill.momentum=0  distill.schedule=constant  distill.warmup_epochs=1  distill.ema_decay=0.9
        distill.precision=bf16  distill.precision=fp32  distill.channels_last=false  distill.clip_norm=1
        distill.val_every=1  distill.num_workers=2  distill.keep=last  distill.patience=3  distill.layer_decay=0.7
        distill.decay_norms=true  loss.class_weights=balanced  loss.class_weights={"a":2}  loss.label_smoothing=0.1
    """),
    (VIEWS, """
        views.per_image=9  views.min_scale=0.5  views.max_ratio=2  views.flip=0  views.brightness=0.1
        views.contrast=0.1  views.saturation=0.1  views.store=compact  views.strength=medium  views.strength=strong
        views.hue=0.1  views.grey=0.1  views.rotate=5  views.posterize=0.1  views.solarize=0.1  views.blur=0.1
        views.erase=0.1  views.hue=0.1 views.strong_share=0.5
    """),
    ({"evaluate", "export"}, "evaluate.calibration_bins=10  evaluate.time_teacher=true"),
    ({"export"}, """
        export.formats=[onnx]  export.preprocessing=true  export.int8=static  export.int8_max_drop=0.1
    """),
)  # fmt: skip


@pytest.mark.parametrize("words", EFFECTS)
def test_a_change_makes_those_stages_new_whose_result_it_changes(words):
    assert changed(names(), names(*words.split())) == EFFECTS[words]


def test_views_of_older_versions_keep_their_names() -> None:
    """These keys and no others decided their views."""
    older = {"per_image": 8, "min_scale": 0.08, "max_ratio": 4 / 3, "flip": 0.5}
    for jitter in (0.0, 0.4):
        colours = {"brightness": jitter, "contrast": 0.0, "saturation": 0.0}
        config = config_of(f"views.brightness={jitter}")
        for directory in (identity.teach_directory(config, SAMPLES), identity.distill_directory(config, SAMPLES)):
            assert json.loads(directory.identity)["views"] == older | colours
        assert trained_settings(config)["views"] == older | colours | {"store": "full"}


def test_a_preset_names_the_same_views_as_its_numbers() -> None:
    numbers = [f"views.{key}={value}" for key, value in dataclasses.asdict(STRENGTHS["strong"]).items()]
    assert names("views.strength=strong") == names(*numbers) == names("views.strength=medium", *numbers)
    assert names("views.strength=strong", "views.hue=0") != names("views.strength=strong")


def test_shards_hold_so_many_rows_as_their_pixels_allow() -> None:
    assert config_of().images.rows_per_shard == 256
    assert config_of("images.size=2048", "images.shard_size=1").images.rows_per_shard == 1
    large = "images.size=1024"
    rows, image = config_of(large).images.rows_per_shard, 3 * 1024**2
    assert rows * image <= 64 * 1024**2 < (rows + 1) * image
    # What asks for more rows than that asks for the same.
    assert names(large) == names(large, f"images.shard_size={rows}") == names(large, "images.shard_size=9999")
    assert changed(names(large), names(large, f"images.shard_size={rows - 1}")) == {"prepare"} | TEACHER


def student_key(*words: str) -> str:
    config = config_of(*words)
    return identity.student_key(config, identity.prepare_directory(config, LISTING))


@pytest.mark.parametrize("words", EFFECTS)
def test_a_change_that_makes_a_stage_new_makes_another_student_and_no_other_does(words):
    assert (student_key() != student_key(*words.split())) == bool(EFFECTS[words])


def test_the_table_above_has_every_key():
    sections = {*RunConfig.model_fields, "generate.filter"} - {"name", "workspace", "seed"}
    tabled = {words.partition("=")[0] for words in (*EFFECTS, *EFFECTS_OF_GENERATED)}
    assert tabled == set(known_keys()) - sections


IMAGES = {"generate", "teach_generated", *STUDENT}
# With generated images, what a change of their settings does; no real image is taught again.
EFFECTS_OF_GENERATED = by_change(
    (IMAGES, """
        generate.pipeline=other/name  generate.revision=abc  generate.ratio=2  generate.per_class=3
        generate.balance=true  generate.templates=['{class}']  generate.overrides={"a":{"steps":3}}
        generate.negative_prompt=blurred  generate.class_ids={"a":3}  generate.scheduler=DDIMScheduler
        generate.steps=3  generate.guidance=1  generate.strength=0.5  generate.size=64  generate.dtype=fp16
        generate.safety_checker=false  generate.attempts=1  generate.filter.contrast=1
        generate.filter.duplicate_distance=null  generate.filter.confidence=0.5
        generate.filter.class_confidence={"a":0.5}  generate.filter.agreement=true  generate.filter.weigh=true
    """),
    (NOTHING, "generate.names=null  generate.batch_size=3"),
    (STUDENT, "generate.task_weight=0.5  generate.share=0.5"),
)  # fmt: skip


@pytest.mark.parametrize("words", EFFECTS_OF_GENERATED)
def test_a_change_of_the_generated_images_teaches_no_real_image_again(words):
    base = ["generate.pipeline=owner/name"]
    stages = (*STAGES, "generate", "teach_generated")
    before, after = ({s: n for s, n in _all_names(w).items() if s in stages} for w in (base, [*base, words]))
    assert {stage for stage in stages if before[stage] != after[stage]} == EFFECTS_OF_GENERATED[words]
    assert (student_key(*base) != student_key(*base, words)) == bool(EFFECTS_OF_GENERATED[words])


def _all_names(words: list[str]) -> dict[str, str]:
    config = config_of(*words)
    more = {s: getattr(identity, f"{s}_directory")(config, SAMPLES).name for s in ("generate", "teach_generated")}
    return names(*words) | more


def test_what_is_made_of_a_class_lies_below_one_folder_of_the_workspace():
    config = config_of("generate.pipeline=owner/name", "workspace=/data/generated-things/w")
    first, second = (identity.class_directory(config, {"class": name}).path for name in ("a", "b"))
    assert first != second
    assert Path(first).parent == Path(second).parent == Path("/data/generated-things/w/generated")


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"ids": {**SAMPLES.ids, "train": "other"}}, TEACHER - {"held_out"}),
        ({"ids": {**SAMPLES.ids, "val": "other"}}, TEACHER - {"held_out", "teach"}),
        ({"ids": {**SAMPLES.ids, "test": "other"}}, {"held_out", "evaluate", "export"}),
        ({"labels": {**SAMPLES.labels, "train": "other"}}, TEACHER - {"held_out", "teach"}),
        ({"labels": {**SAMPLES.labels, "val": "other"}}, TEACHER - {"held_out", "teach"}),
        ({"labels": {**SAMPLES.labels, "test": "other"}}, {"evaluate", "export"}),
        ({"classes": ("b", "a")}, HEAD),
        ({"path": "/elsewhere/prepare-2"}, NOTHING),
        ({"num_refused": 3}, NOTHING),
    ],
)
def test_other_samples_make_those_stages_new_that_read_what_differs(change, expected):
    """A pool of targets outlives a change of labels or of the head: it belongs to the train images alone."""
    assert changed(names(), names(samples=dataclasses.replace(SAMPLES, **change))) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"fingerprint": "other"}, {"decoded", "prepare"}),
        ({"classes": ("b", "a")}, {"prepare"}),
        ({"ignored": {"hidden and system files": 3}}, NOTHING),
    ],
)
def test_other_files_or_classes_are_prepared_anew(change, expected):
    assert changed(names(), names(listing=dataclasses.replace(LISTING, **change))) == expected


def test_without_soft_targets_the_teacher_does_not_decide_the_student():
    alone = ["loss.kd_weight=0", "loss.alignment_weight=0", "loss.uniformity_weight=0"]
    before, after = names(*alone), names(*alone, "teacher.model=timm:resnet18", "teacher.size=64")
    assert changed(before, after) == {"features", "held_out", "adapt", "teach"}
    others = ["loss.temperature=2", "loss.projection_head=linear", "loss.crd_memory=9"]
    assert changed(before, names(*alone, *others)) == NOTHING
    assert changed(before, names(*alone, "loss.task_weight=2")) == STUDENT


def test_names_do_not_depend_on_the_process():
    code = "import json, runpy, sys\nprint(json.dumps(runpy.run_path(sys.argv[1])['names']()))"
    found = [
        subprocess.run(
            [sys.executable, "-c", code, __file__],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert [json.loads(output) for output in found] == [names(), names()]


# Weights are known by their content


def test_weights_of_one_name_are_told_apart_by_their_content(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"first")
    word = f"teacher.weights={weights}"
    before, times = names(word), weights.stat()
    weights.write_bytes(b"other")
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed(before, names(word)) == TEACHER
    weights.write_bytes(b"first")
    assert names(word) == before
    (tmp_path / "again.safetensors").write_bytes(b"first")
    assert names(f"teacher.weights={tmp_path / 'again.safetensors'}") == before


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="reads what Linux counts of this process")
def test_however_many_stages_ask_weights_are_read_once_and_again_when_they_change(tmp_path):
    weights, size = tmp_path / "teacher.safetensors", 8_000_000
    words = [f"teacher.weights={weights}", f"student.weights={weights}", "student.init=pretrained"]
    seen = []
    for content in (b"a", b"b"):
        weights.write_bytes(content * size)
        os.utime(weights, (1e9, 1e9 + ord(content)))
        before = psutil.Process().io_counters().read_chars
        seen.append(names(*words))
        assert names(*words) == seen[-1]
        assert size <= psutil.Process().io_counters().read_chars - before < 1.5 * size
    weights.write_bytes(b"c" * size)  # a moment ago: its time alone does not tell it from what comes next
    seen.append(names(*words))
    status = weights.stat()
    weights.write_bytes(b"d" * size)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(names(*words))
    assert len({tuple(sorted(found.items())) for found in seen}) == 4


def test_weights_of_the_student_decide_the_student_alone(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"first")
    words = ["student.init=pretrained", f"student.weights={weights}"]
    before = names(*words)
    weights.write_bytes(b"other")
    assert changed(before, names(*words)) == STUDENT


@pytest.mark.parametrize("key", ["teacher", "student"])
def test_weights_that_are_not_there_are_named(tmp_path, key):
    words = [f"{key}.weights={tmp_path / 'none.pth'}", "student.init=pretrained"]
    with pytest.raises(ConfigError, match=r"none\.pth"):
        names(*words)


@pytest.fixture
def folder(tmp_path) -> Path:
    """A teacher as transformers saves it."""
    made = tmp_path / "teacher"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "preprocessor_config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    return made


@pytest.mark.parametrize("prefix", ["", "hf:", "timm:local-dir:"])
@pytest.mark.parametrize("file", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_a_teacher_in_a_folder_is_known_by_the_content_of_its_files(folder, prefix, file):
    word = f"teacher.model={prefix}{folder}"
    before, times = names(word), (folder / file).stat()
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[::-1])
    os.utime(folder / file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert changed(before, names(word)) == TEACHER
    (folder / file).write_bytes(content)
    assert names(word) == before


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_a_teacher_in_a_folder_may_move_and_be_described(folder, prefix, monkeypatch):
    before = names(f"teacher.model={prefix}{folder}")
    (folder / "README.md").write_text("A teacher.")
    (folder / ".cache").mkdir()
    (folder / ".cache" / "x.json").write_text("{}")
    moved = folder.rename(folder.with_name("moved"))
    assert names(f"teacher.model={prefix}{moved}") == before
    monkeypatch.chdir(moved.parent)
    assert names(f"teacher.model={prefix}moved") == before


def test_a_folder_of_a_timm_models_name_is_not_that_model(tmp_path, monkeypatch):
    before = names("teacher.model=timm:resnet18")
    (tmp_path / "resnet18").mkdir()
    monkeypatch.chdir(tmp_path)
    assert names("teacher.model=timm:resnet18") == before


@pytest.mark.parametrize("prefix", ["", "hf:"])
def test_the_native_head_of_a_transformers_model_may_read_other_features(folder, prefix):
    word = f"teacher.model={prefix}{folder}"
    assert changed(names(word), names(word, "teacher.head=native")) == TEACHER


@pytest.mark.parametrize("file", ["vocab.txt", "merges.txt", "spiece.model"])
def test_a_text_towers_vocabulary_decides_its_head(folder, file):
    words = [f"teacher.model={folder}", "teacher.head=zero_shot"]
    (folder / file).write_text("cat")
    before = names(*words)
    (folder / file).write_text("dog")
    assert changed(before, names(*words)) >= HEAD


@pytest.fixture
def student_folder(tmp_path) -> Path:
    """What `distill` leaves of a student from transformers."""
    made = tmp_path / "distill-0123"
    (made / "epochs").mkdir(parents=True)
    for name in ("student.json", "config.json", "identity.json", "seconds.json", "progress.json", "DONE"):
        (made / name).write_text('{"made": 1}')
    (made / "student.safetensors").write_bytes(b"weights")
    return made


@pytest.mark.parametrize("file", ["student.json", "config.json", "student.safetensors"])
def test_a_student_as_a_teacher_is_known_by_what_it_is(student_folder, file):
    word = f"teacher.model={student_folder}"
    before = names(word)
    (student_folder / file).write_bytes((student_folder / file).read_bytes()[::-1])
    assert changed(before, names(word)) == TEACHER


def test_a_student_as_a_teacher_is_not_known_by_its_making(student_folder):
    before = names(f"teacher.model={student_folder}")
    for name in ("identity.json", "seconds.json", "progress.json", "DONE"):
        (student_folder / name).write_text('{"made": 2}')
    (student_folder / "new.json").write_text("{}")
    moved = student_folder.rename(student_folder.with_name("moved"))
    assert names(f"teacher.model={moved}") == before


# Fine-tuned teachers

FINE_TUNE, TASK_ALONE = "teacher.head=fine_tune", "loss={kd_weight: 0, alignment_weight: 0, uniformity_weight: 0}"


def fine_tuned(*words: str) -> str:
    return identity.fine_tune_directory(config_of(FINE_TUNE, *words), SAMPLES).name


@pytest.mark.parametrize(
    ("words", "is_new"),
    [
        (["teacher.fine_tune_epochs=3"], True),
        (["teacher.fine_tune_learning_rate=0.1"], True),
        (["teacher.model=timm:resnet18"], True),
        (["teacher.size=64"], True),
        (["teacher.fine_tune_batch_size=32"], True),
        (["distill.batch_size=32"], False),
        (["distill.labelled_share=0.5", "distill.weight_decay=0", "distill.clip_norm=1", "distill.val_every=1"], False),
        (["views.flip=0.1"], True),
        (["seed=1"], True),
        (["loss.kd_weight=3"], False),
        (["student.model=timm:resnet18"], False),
        (["student.init=pretrained", "distill.body_rate=0"], False),
        (["distill.epochs=3"], False),
        (["distill.learning_rate=0.1"], False),
        (["distill.ema_decay=0.9"], False),
        (["views.per_image=3"], False),
        (["teacher.batch_size=3"], False),
        (["teacher.allow_near_chance=true"], False),
    ],
)
def test_a_teacher_is_fine_tuned_anew_where_its_training_would_differ(words, is_new):
    assert (fine_tuned(*words) != fine_tuned()) is is_new


def test_a_teacher_counts_as_fine_tuned_when_its_folder_is_done(student_folder, tmp_path):
    config = config_of(FINE_TUNE, f"workspace={tmp_path / 'w'}", "teacher.revision=abc", "teacher.size=64")
    directory = identity.fine_tune_directory(config, SAMPLES)
    assert directory.stage == "fine_tune"
    assert identity.tuned(config, SAMPLES) is None
    directory.begin()
    assert identity.tuned(config, SAMPLES) is None
    for name in ("student.json", "student.safetensors"):
        directory.write(name, (student_folder / name).read_bytes())
    directory.finish({})
    later = identity.tuned(config, SAMPLES)
    assert (later.teacher.model, later.teacher.head) == (directory.path, "native")
    assert (later.teacher.weights, later.teacher.revision, later.teacher.size) == (None, None, 64)
    assert identity.tuned(later, SAMPLES) == later
    stages = [make(later, SAMPLES).name for make in (identity.adapt_directory, identity.teach_directory)]
    moved = config_of(FINE_TUNE, f"workspace={tmp_path / 'v'}", "teacher.revision=abc", "teacher.size=64")
    (tmp_path / "w").rename(tmp_path / "v")
    again = identity.tuned(moved, SAMPLES)
    assert [make(again, SAMPLES).name for make in (identity.adapt_directory, identity.teach_directory)] == stages


@pytest.mark.parametrize("words", [[], ["teacher=null", TASK_ALONE], [FINE_TUNE, TASK_ALONE]])
def test_what_needs_no_fine_tuning_stays_as_it_is(words):
    config = config_of(*words)
    assert identity.tuned(config, SAMPLES) == config


# Writing


def everything_below(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_bytes_are_written_and_written_over(tmp_path):
    path = tmp_path / "deep" / "er" / "file"
    write_bytes(str(path), b"first")
    write_bytes(str(path), b"second")
    assert path.read_bytes() == b"second"
    assert everything_below(tmp_path) == ["deep/er/file"]


FULL_DISK = """
import resource, sys
import torch
from safetensors.torch import save_file
from raydistill.errors import StageError
from raydistill.storage.filesystems import write_bytes, write_file
folder, limited, writer = sys.argv[1], sys.argv[2] == "limited", sys.argv[3]
tensors = {"weights": torch.zeros(250_000)}
write = {
    "bytes": lambda path: write_bytes(path, b"x" * 1_000_000),
    "safetensors": lambda path: write_file(path, lambda temporary: save_file(tensors, temporary)),
    "torch": lambda path: write_file(path, lambda temporary: torch.save(tensors, temporary)),
}[writer]
write_bytes(f"{folder}/old", b"old")
if limited:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
for name in ("old", "new", "deep/new"):
    try:
        write(f"{folder}/{name}")
    except StageError as error:
        print(error)
"""


def test_a_file_has_its_bytes_on_disk_before_it_has_its_name(tmp_path, monkeypatch) -> None:
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda file: (done.append(os.fstat(file).st_size), fsync(file)))
    monkeypatch.setattr(os, "replace", lambda *places: (done.append("named"), replace(*places)))
    write_bytes(str(tmp_path / "file"), b"12345")
    assert done == [5, "named"]


@pytest.mark.parametrize("writer", ["bytes", "safetensors", "torch"])
@pytest.mark.parametrize("how", ["limited", "mounted"])
def test_a_full_disk_leaves_the_old_file_and_nothing_half_written(tmp_path, how, writer):
    if how == "mounted":
        options = ["-t", "tmpfs", "-o", "size=65536", "tmpfs", str(tmp_path)]
        if os.geteuid() or subprocess.run(["mount", *options], check=False, capture_output=True).returncode:
            pytest.skip("may not mount a small disk here")
    try:
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, str(tmp_path), how, writer], capture_output=True, text=True, check=True
        )
        messages = done.stdout.splitlines()
        assert len(messages) == 3
        for message, name in zip(messages, ("old", "new", "deep/new"), strict=True):
            assert str(tmp_path / name) in message
            assert "bytes are free" in message
        assert everything_below(tmp_path) == ["old"]
        assert (tmp_path / "old").read_bytes() == b"old"
    finally:
        if how == "mounted":
            subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_place_that_may_not_be_written_asks_for_the_right_and_not_for_room(tmp_path, monkeypatch, code):
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StageError, match=rf"{os.strerror(code)}\); make its folder writable and run") as refused:
        write_bytes(f"{tmp_path}/a", b"x")
    assert "bytes" not in str(refused.value)
    with pytest.raises(ConfigError) as refused:
        check_writable(config_of(f"workspace={tmp_path}"))
    assert str(refused.value) == f"workspace={tmp_path}: cannot be written ({os.strerror(code)}); choose another"
    assert not list(tmp_path.iterdir())


def test_a_place_that_takes_no_files_is_a_stage_error(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "below", tmp_path / "file" / "deep" / "below"):
        with pytest.raises(StageError, match="below"):
            write_bytes(str(path), b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StageError, match="folder"):
        write_bytes(str(tmp_path / "folder"), b"x")
    assert everything_below(tmp_path) == ["file"]


def test_a_reader_sees_one_whole_version_while_others_write(tmp_path):
    path = tmp_path / "file"
    versions = [bytes([value]) * 300_000 for value in (1, 2)]
    write_bytes(str(path), versions[0])

    def write(data: bytes) -> None:
        for _ in range(40):
            write_bytes(str(path), data)

    writers = [threading.Thread(target=write, args=(data,)) for data in versions]
    for writer in writers:
        writer.start()
    seen = []
    while any(writer.is_alive() for writer in writers):
        seen.append(path.read_bytes())
    for writer in writers:
        writer.join()
    assert seen
    assert all(data in versions for data in seen)
    assert everything_below(tmp_path) == ["file"]


# Directories


@pytest.fixture(params=["local", "memory"])
def directory(request, tmp_path) -> StageDirectory:
    workspace = str(tmp_path) if request.param == "local" else "memory://workspace"
    made = identity.prepare_directory(config_of(f"workspace={workspace}"), LISTING)
    yield made
    if request.param == "memory" and made.fs.exists("/workspace"):
        made.fs.rm("/workspace", recursive=True)


def test_a_stage_is_done_when_its_marker_stands(directory):
    assert not directory.started()
    assert directory.done() is None
    directory.begin()
    assert directory.started()
    assert directory.done() is None
    result = {"classes": ["10", "2", "café", "a b"], "accuracy": 0.5, "none": None}
    directory.finish(result)
    assert directory.done() == result | {"path": directory.path}
    assert "café" in directory.fs.cat_file(f"{directory.path}/DONE").decode()


def test_a_directory_tells_what_it_stands_for(directory):
    directory.begin()
    identity = json.loads(directory.fs.cat_file(f"{directory.path}/identity.json"))
    assert identity["files"] == LISTING.fingerprint
    assert identity["classes"] == list(LISTING.classes)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00", b"\x00" * 20])
def test_a_marker_that_cannot_be_read_is_a_checkpoint_error(directory, content):
    directory.begin()
    directory.fs.pipe_file(f"{directory.path}/DONE", content)
    with pytest.raises(CheckpointError, match="DONE"):
        directory.done()


@pytest.mark.parametrize("place", ["/etc", "/moved/since/NAME", "/w/../../etc", "NAME", "a\0b", ["/w"], None, 3, {}])
def test_a_marker_says_what_came_of_a_stage_and_never_where_it_lies(directory, place):
    directory.begin()
    directory.finish({"path": directory.path, "steps": 3})
    marker = f"{directory.place}/DONE"
    assert json.loads(directory.fs.cat_file(marker)) == {"steps": 3}
    directory.fs.pipe_file(marker, json.dumps({"path": place, "steps": 3}).encode())
    assert directory.done() == {"path": directory.path, "steps": 3}


RESULTS = {
    "a list": [1],
    "a number": 3,
    "a field that is missing": {"size": None},
    "a field more": {"command": "rm"},
    "text for a number": {"size": "64"},
    "a number for text": {"classes": [1, 2]},
    "text for a list": {"classes": "ab"},
    "rows below none": {"shards": {"train": [-4]}},
    "half a row": {"shards": {"train": [4.5]}},
    "a list for a map": {"ids": ["t", "v", "e"]},
    "no train split": {"shards": {"val": [2]}},
    "deep": {"ids": {"train": [[[[]]]]}},
}


@pytest.mark.parametrize("case", RESULTS)
def test_a_marker_of_another_form_is_refused_in_one_sentence(directory, case):
    odd = RESULTS[case]
    result = dataclasses.asdict(dataclasses.replace(SAMPLES, path=directory.path))
    whole = {k: v for k, v in (result | odd).items() if v is not None} if isinstance(odd, dict) else odd
    directory.begin()
    directory.write_json("DONE", whole)
    with pytest.raises(CheckpointError, match="DONE is not what raydistill writes") as refused:
        samples_from_json(directory.done())
    assert "\n" not in str(refused.value)
    directory.finish(result)
    assert samples_from_json(directory.done()) == dataclasses.replace(SAMPLES, path=directory.path)


@pytest.mark.parametrize("bill", ["[]", '{"seconds": "soon"}', '{"node_seconds": 3}', '{"versions": [1]}', "{", "\xff"])
def test_a_bill_of_another_form_is_refused(directory, bill):
    directory.begin()
    directory.write("seconds.json", bill.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"seconds\.json is not what raydistill writes"):
        read_bill(directory.path)


@pytest.mark.parametrize("place", [".", "report.html", "checkpoints", "epochs/00001.json", "DONE", "nowhere"])
@pytest.mark.parametrize("call", ["done", "begin", "started"])
def test_a_link_in_a_stage_directory_is_refused_by_name(tmp_path, place, call):
    directory = StageDirectory(f"{tmp_path}/w/distill-0123456789ab", "distill", "{}")
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim/keys").write_text("secret")
    target = tmp_path / ("victim" if place in (".", "checkpoints") else "gone" if place == "nowhere" else "victim/keys")
    link = Path(directory.path, place)
    link.parent.mkdir(parents=True)
    link.symlink_to(target)
    with pytest.raises(CheckpointError, match=f"{link} is a link to {target}, .*delete the link"):
        getattr(directory, call)()
    assert (tmp_path / "victim/keys").read_text() == "secret"
    assert len(list((tmp_path / "victim").iterdir())) == 1


def test_the_folder_of_generated_classes_is_no_link_either(tmp_path):
    (tmp_path / "victim").mkdir()
    (tmp_path / "generated").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="generated is a link"):
        StageDirectory(f"{tmp_path}/generated/0123456789ab", "generated", "{}").begin()
    assert not list((tmp_path / "victim").iterdir())


def test_a_workspace_may_be_a_link_and_is_private_where_it_is_new(tmp_path, monkeypatch):
    old = os.umask(0o002)
    try:
        (tmp_path / "disk").mkdir(mode=0o775)
        (tmp_path / "w").symlink_to(tmp_path / "disk")
        (tmp_path / "generated").symlink_to(tmp_path / "disk")
        for root, mode in (("w", 0o775), ("new", 0o700), ("generated", 0o775), ("new/generated", 0o700)):
            if root != "new/generated":  # where nothing looks before
                check_writable(config_of(f"workspace={tmp_path / root}"))
            directory = StageDirectory(f"{tmp_path / root}/prepare-0123456789ab", "prepare", "{}")
            directory.begin()
            directory.finish({"a": 1})
            assert directory.done()["a"] == 1
            assert stat.S_IMODE((tmp_path / root).stat().st_mode) == mode
            assert stat.S_IMODE(Path(directory.path).stat().st_mode) == 0o775  # what is in it, as the umask says
    finally:
        os.umask(old)


def test_beginning_again_keeps_what_is_there(directory):
    directory.begin()
    directory.write("train-00000.parquet", b"rows")
    directory.finish({"a": 1})
    directory.begin()
    assert directory.fs.cat_file(f"{directory.path}/train-00000.parquet") == b"rows"
    assert directory.done() == {"a": 1, "path": directory.path}


@pytest.mark.parametrize(
    ("workspace", "expected"),
    [
        ("s3://bucket/raydistill/", "s3://bucket/raydistill"),
        ("/data//runs/", "/data/runs"),
        ("~/work", os.path.expanduser("~/work")),
        ("./workspace", os.path.abspath("workspace")),
    ],
)
def test_the_workspace_is_absolute(workspace, expected):
    assert workspace_root(config_of(f"workspace={workspace}")) == expected


def test_a_workspace_that_can_be_written_is_left_clean(tmp_path):
    check_writable(config_of(f"workspace={tmp_path / 'new' / 'place'}"))
    assert (tmp_path / "new" / "place").is_dir()
    assert everything_below(tmp_path) == []
    check_writable(config_of("workspace=memory://writable"))
    assert fsspec.filesystem("memory").find("/writable") == []


def test_a_workspace_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "deep" / "workspace"):
        with pytest.raises(ConfigError, match="is a file, not a folder"):
            workspace_root(config_of(f"workspace={place}"))
    with pytest.raises(ConfigError, match="workspace"):
        check_writable(config_of(f"workspace={tmp_path / 'file' / 'below'}"))


def test_a_teacher_in_fp32_has_the_directories_of_before_other_precisions() -> None:
    """Their content is the same, so a workspace of an older version is used again."""
    configs = [config_of(f"teacher.precision={name}") for name in ("fp32", "auto", "bf16")]
    backbones = [json.loads(identity.teach_directory(one, SAMPLES).identity)["backbone"] for one in configs]
    assert [backbone.get("precision") for backbone in backbones] == [None, "auto", "bf16"]
    assert backbones[0].keys() == {"revision", "size", "model", "weights"}


ALONE = ["loss.kd_weight=0", "loss.alignment_weight=0", "loss.uniformity_weight=0"]


@pytest.mark.parametrize("words", [[], ALONE])
def test_a_student_by_the_settings_of_before_others_came_has_its_directory_of_before(words) -> None:
    """Where norms shrink too, or nothing does."""

    def trained(*more: str) -> dict[str, dict[str, object]]:
        return json.loads(identity.distill_directory(config_of(*words, *more), SAMPLES).identity)

    later = {"class_weights", "label_smoothing", "patience", "layer_decay", "decay_norms", "ema"}
    for old in ("distill.decay_norms=true", "distill.weight_decay=0"):
        assert later.isdisjoint({*trained(old)["loss"], *trained(old)["distill"]})
    assert trained()["distill"]["decay_norms"] is False
    assert trained("distill.ema_decay=0.9")["distill"]["ema"] == 2  # whose decay did not warm up before


def test_what_changes_nothing_of_the_student_changes_no_name() -> None:
    without = ["loss.task_weight=0"]
    for word in ("loss.class_weights=balanced", "loss.label_smoothing=0.1"):
        assert names(*without) == names(*without, word)
        assert changed(names(*ALONE), names(*ALONE, word)) == STUDENT
    assert names("distill.weight_decay=0") == names("distill.weight_decay=0", "distill.decay_norms=true")
    others = ["distill.decay_norms=true", "distill.patience=3", "loss.class_weights=balanced"]
    fine_tunes = [
        identity.fine_tune_directory(config_of("teacher.head=fine_tune", *more), SAMPLES).name for more in ([], others)
    ]
    assert fine_tunes[0] == fine_tunes[1]


def test_what_auto_stands_for_is_kept_by_what_every_directory_of_images_counts() -> None:
    """Or one directory might have images of two kinds of numbers."""

    def pin(*words: str) -> str:
        return identity.pipeline_pin("/w", config_of("generate.pipeline=owner/name", *words))

    same = ("generate.batch_size=2", "generate.per_class=3", "seed=1", "generate.filter.agreement=true")
    assert {pin(word) for word in same} == {pin()}
    others = {pin(word) for word in ("generate.pipeline=owner/other", "generate.revision=abc", "generate.size=64")}
    assert len(others - {pin()}) == 3
