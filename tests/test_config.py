"""The configuration: what a user may type, the config that results, and one clear line for each mistake."""

import functools
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from raydistill.config import RunConfig, known_keys, load_config, overlay, to_yaml
from raydistill.config.baselines import OVERLAYS
from raydistill.errors import ConfigError

PATH = "images.path=./my_images"


def loaded(*words: str) -> RunConfig:
    return load_config([PATH, *words])


def value_of(tree: object, key: str) -> object:
    return functools.reduce(operator.getitem, key.split("."), tree)


def refusal(*words: str) -> list[str]:
    """The lines of the message."""
    with pytest.raises(ConfigError) as refused:
        load_config(words)
    (message,) = refused.value.args
    lines = message.split("\n")
    assert all(line.strip() for line in lines)
    return lines


def one_refusal(*words: str) -> str:
    (line,) = refusal(PATH, *words)
    return line


@pytest.fixture
def job(tmp_path):
    def write(text: str, name: str = "job.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


def test_of_very_many_wrong_keys_the_first_are_told(job):
    lines = refusal(PATH, job("".join(f"sed{k}: 1\n" for k in range(40_000))))
    assert lines[0] == "sed0: unknown key; did you mean seed?"
    assert len(lines) == 11
    assert lines[-1] == "and 39,990 more keys"


def test_a_very_long_value_is_told_in_short(job):
    line = one_refusal(job("seed: 1" + ":1" * 10_000))
    assert line.startswith("seed='1:1:1:")
    assert line.endswith("(20,003 characters): expected: whole number ≥ 0 and < 4,294,967,296")
    assert len(line) < 500


# For every key there is a value, and for nearly all another one than the default.
OTHER_VALUES = """
name: other
workspace: s3://bucket/raydistill
seed: 4294967295
images: {path: "example:elpv", size: 96, fit: pad, classes: classes.txt, val_share: 0.2, test_share: 0.0,
  max_per_class: 9, num_labelled: 40, num_unlabelled: 7, allow_missing_val: true, max_bad_share: 1.0,
  max_pixels: 10000, max_bytes: 1000000, shard_size: 32, store: jpeg}
teacher: {model: "hf:owner/name", weights: w.safetensors, revision: 0123456789abcdef, head: native, size: 98,
  class_balanced: true, center_crop: true, batch_size: 8, allow_near_chance: true, prompts: ["a {class}"],
  fine_tune_epochs: 3, fine_tune_learning_rate: 0.1, fine_tune_batch_size: 32, precision: fp16}
student: {model: "timm:resnet18", init: pretrained, weights: null, revision: main, size: 32}
loss: {task_weight: 0.5, kd_weight: 0.0, temperature: 0.001, alignment_weight: 0.1, uniformity_weight: 0.0,
  alignment_alpha: 1.0, uniformity_t: 3.0, info_nce_weight: 1.5, crd_weight: [0.5, 1.0], crd_negatives: 8,
  crd_memory: 9, contrastive_temperature: 0.1, srrl_weight: 1.0, dkd_weight: 1.0, dkd_target_factor: 2.0,
  dkd_other_factor: 2.0, dist_weight: 1.0, standardised_kd_weight: 1.0, feature_weight: 1.0,
  feature_distance: cosine, rkd_distance_weight: 1.0, rkd_angle_weight: 1.0, projection_head: linear,
  projection_dim: 64, adapter: linear, class_weights: {cat: 2.5}, label_smoothing: 0.1}
views: {per_image: 3, min_scale: 0.5, max_ratio: 1.0, flip: 0.0, brightness: 0.4, contrast: 0.3, saturation: 0.2,
  store: compact, strength: strong, strong_share: 0.3, hue: 0.5, grey: 0.1, rotate: 180.0, posterize: 0.2,
  solarize: 0.3, blur: 0.6, erase: 0.7}
distill: {epochs: 3, batch_size: 16, labelled_share: 0.5, optimizer: sgd, learning_rate: 0.0000001, body_rate: 0.5,
  weight_decay: 0.0, momentum: 0.0, schedule: constant, warmup_epochs: 0.5, ema_decay: 0.999, precision: bf16,
  channels_last: false, clip_norm: 1.0, val_every: 1, keep: best, num_workers: [1, 4], cache: stream,
  checkpoint_seconds: 0.5, max_failures: 0, patience: 4, layer_decay: 0.75, decay_norms: true}
evaluate: {batch_size: 5, calibration_bins: 10, time_teacher: true}
export: {formats: [onnx], preprocessing: true, int8: static, int8_max_drop: 0.1, allow_useless: true, hub: me/student,
  register_as: student}
compare: {arms: [kd, crd], seeds: 2, student_weights: x.safetensors, label_shares: [0.5, 1.0]}
cluster: {address: "ray://head:10001", threads: 3, teacher_actors: [2, 2], generator_actors: [2, 9],
  generator_labels: {pool: spot}, generator_fallback: {pool: train}, spill_directory: /scratch/spill,
  grows_to: {CPU: 8.0}, price_per_hour: 1.5, prices: {spot: 0.35}}
generate: {pipeline: owner/name, revision: main, ratio: 2.0, per_class: 5, balance: false, names: names.yaml,
  templates: {"a {class}": 2.0, "{class} texture": 1.0}, negative_prompt: blurred, class_ids: {cat: 3},
  overrides: {cat: {templates: null, negative_prompt: null, steps: 3, guidance: null}}, scheduler: DDIMScheduler,
  steps: 3, guidance: 1.5, strength: 0.5, size: 64, dtype: fp16, batch_size: 3, safety_checker: false, attempts: 1,
  filter: {contrast: 1.0, duplicate_distance: null, confidence: 0.5, class_confidence: {cat: 0.7}, agreement: true,
    weigh: true},
  task_weight: 0.5, share: 0.5}
tune: {space: tune_spaces/loss.yaml, trials: 5, sampler: random, pruner: none, grace_epochs: 3, concurrent: 2,
  objectives: [val_accuracy, parameters], confirm_seeds: 0, storage: "postgresql://host/studies"}
tracking: {enabled: false, uri: "http://host:5000"}
"""
SECTIONS = {*RunConfig.model_fields, "generate.filter"} - {"name", "workspace", "seed"}
LEAVES = sorted(set(known_keys()) - SECTIONS)


def test_the_defaults_come_back_from_their_yaml(job):
    config = loaded()
    assert load_config([job(to_yaml(config))]) == config


def test_every_other_value_comes_back_from_its_yaml(job):
    config = load_config([job(OTHER_VALUES)])
    given, found = yaml.safe_load(OTHER_VALUES), config.model_dump(mode="json")
    for key in LEAVES:
        assert value_of(given, key) == value_of(found, key), key
    assert load_config([job(to_yaml(config))]) == config


texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1) | st.sampled_from(["${", "${x}", "<<", "=", "y"])


@given(
    name=texts,
    path=texts,
    revision=st.sampled_from(["1e10", "0123", "1_000", "null", "off", "2024-01-01", "~", "=", "1:30"]),
)
def test_any_text_comes_back_from_its_yaml(tmp_path_factory, name, path, revision):
    config = RunConfig.model_validate({"name": name, "images": {"path": path}, "teacher": {"revision": revision}})
    job = tmp_path_factory.getbasetemp() / "any.yaml"
    job.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_config([str(job)]) == config


@given(
    rate=st.floats(1e-30, 1e30),
    seed=st.integers(0, 2**32 - 1),
    share=st.floats(0, 1, exclude_max=True),
    on=st.booleans(),
)
def test_any_number_comes_back_from_its_yaml_and_from_the_command_line(tmp_path_factory, rate, seed, share, on):
    values = {"distill.learning_rate": rate, "seed": seed, "images.val_share": share, "distill.channels_last": on}
    words = (f"{key}={str(value).lower()}" for key, value in values.items())
    config = loaded("images.test_share=0", *words)
    found = config.model_dump()
    assert {key: value_of(found, key) for key in values} == values
    job = tmp_path_factory.getbasetemp() / "numbers.yaml"
    job.write_text(to_yaml(config))
    assert load_config([str(job)]) == config


def test_defaults_of_the_loss_are_the_papers():
    loss = loaded().loss
    assert (loss.task_weight, loss.kd_weight, loss.alignment_weight, loss.uniformity_weight) == (1, 1, 1, 1)
    assert (loss.temperature, loss.alignment_alpha, loss.uniformity_t, loss.projection_dim) == (4, 2, 2, 128)


def test_files_and_words_are_merged_from_left_to_right(job):
    first = job("seed: 1\nimages: {path: a, size: 64}\ndistill: {epochs: 5, batch_size: 32}\n", "first.yaml")
    second = job("images: {path: b}\ndistill: {epochs: 7}\n", "second.yaml")
    config = load_config([first, second, "distill.epochs=9", "seed=3"])
    assert (config.seed, config.images.path, config.images.size) == (3, "b", 64)
    assert (config.distill.epochs, config.distill.batch_size) == (9, 32)
    assert load_config(["distill.epochs=9", first, second]).distill.epochs == 7
    assert load_config([second, first]).images.path == "a"


def test_a_list_is_replaced_and_not_merged(job):
    config = loaded(job("distill: {num_workers: [1, 4]}\n"), "distill.num_workers=[2,3]")
    assert config.distill.num_workers == (2, 3)
    assert loaded(job("distill: {num_workers: [1, 4]}\n"), "distill.num_workers=2").distill.num_workers == 2


def test_a_section_may_be_made_null_and_come_back(job):
    off = job("teacher: null\nloss: {kd_weight: 0, alignment_weight: 0, uniformity_weight: 0}\n")
    assert loaded(off).teacher is None
    assert loaded("teacher.size=64", off).teacher is None
    assert loaded(off, "teacher.size=64").teacher.size == 64


@pytest.mark.parametrize("weight", ["kd_weight", "alignment_weight", "uniformity_weight"])
def test_no_teacher_goes_with_no_soft_targets_only(weight):
    without = ["teacher=null", "loss.kd_weight=0", "loss.alignment_weight=0", "loss.uniformity_weight=0"]
    config = loaded(*without)
    assert not config.loss.needs_teacher
    assert not config.loss.needs_projection
    assert "teacher" in one_refusal(*without, f"loss.{weight}=0.5")


@pytest.mark.parametrize(
    "text",
    [
        "a=b", "a==", "a: b # c", "x/y=z", "2024", "1e3", "0x1F", "yes", "off", "null", "~", "2024-05-01", "12:30",
        "[a, b]", "{x}", "- a", "!tag", "&a *b", "100%", "'a'", 'it\'s "b"', "${oc.env:HOME}", "${", " a  b ",
    ],
)  # fmt: skip
def test_text_is_taken_as_it_was_typed(text):
    config = loaded(f"name={text}")
    assert config.name == overlay(config, {"seed": 7}).name == text
    assert yaml.safe_load(to_yaml(config))["name"] == text
    assert "name" in one_refusal("name=")


@pytest.mark.parametrize("path", ["/d/set #2", "day: one", "2024", "{x}", "a=b", "null", "set $HOME", "~x", "'q'"])
def test_the_folder_that_is_named_is_the_one_that_is_read(path):
    config = load_config([f"images.path={path}", f"workspace={path}", f"tune.storage={path}"])
    assert (config.images.path, config.workspace, config.tune.storage) == (path, path, None if path == "null" else path)


def test_a_folder_whose_name_is_no_text_is_refused_with_the_way_out():
    (line,) = refusal("images.path=/data/caf\udce9")
    assert line == r"images.path='/data/caf\udce9': not UTF-8; give it another name, or a link that has one"


def test_null_is_for_keys_that_need_not_be_given():
    assert loaded("teacher.revision=null", "images.classes=null", "export.int8=null") == loaded()
    assert loaded("teacher.revision=2024").teacher.revision == "2024"


def test_a_class_called_like_a_section_is_no_key():
    assert loaded("generate.pipeline=p", "generate.overrides.path.steps=3").generate.overrides["path"].steps == 3


def test_paths_with_equals_signs_are_files(job, tmp_path):
    (tmp_path / "lr=1").mkdir()
    path = tmp_path / "lr=1" / "job.yaml"
    path.write_text("seed: 5\n")
    assert loaded(str(path)).seed == 5
    assert loaded("images.path=/data/a=b/c").images.path == "/data/a=b/c"


# Errors


@pytest.mark.parametrize(
    ("word", "suggestion"),
    [
        ("distill.epoch=1", "distill.epochs"), ("distil.epochs=1", "distill"),
        ("learning_rate=1", "distill.learning_rate"), ("student.learning_rate=1", "distill.learning_rate"),
        ("loss.batch_size=1", "batch_size"), ("images.sise=64", "images.size"), ("temperature=2", "loss.temperature"),
        ("loss.temprature=2", "loss.temperature"), ("views.per_imgae=2", "views.per_image"),
        ("trackin.uri=x", "tracking"), ("teachers.head=native", "teacher"),
        ("distill.lr=0", "distill.learning_rate"), ("bs=8", "distill.batch_size"),
    ],
)  # fmt: skip
def test_an_unknown_key_comes_with_the_nearest(word, suggestion):
    line = one_refusal(word)
    key = word.partition("=")[0]
    assert line.startswith((f"{key}: ", f"{key.partition('.')[0]}: "))
    assert f"did you mean {suggestion}" in line or (suggestion == "batch_size" and ".batch_size?" in line)


@pytest.mark.parametrize("word", ["zzz=1", "distill.zzz=1", "distill.zz=1", "images.zzz.yyy=1"])
def test_an_unknown_key_like_no_other_gets_no_false_advice(word):
    assert "did you mean" not in one_refusal(word)


# By section, so that a word is a key and what it refuses.
OUT_OF_BOUNDS = {
    "": "seed=-1 seed=4294967296 seed=1.5 seed=abc seed=null",
    "images": """
        size=7 size=2049 size=64.5 fit=squash val_share=-0.1 val_share=1 test_share=-0.1 test_share=1
        max_per_class=0 num_labelled=0 num_unlabelled=-1 max_bad_share=-0.1 max_bad_share=1.1
        max_pixels=0 max_pixels=178956971 max_bytes=0 shard_size=0 allow_missing_val=perhaps
    """,
    "teacher": "head=linear head=null size=0 size=4096 batch_size=0 fine_tune_batch_size=0 precision=int8",
    "student": "init=pretrain size=7 size=2049",
    "views": """
        per_image=0 per_image=stale per_image=null min_scale=0 min_scale=1.01 max_ratio=0.99
        max_ratio=.inf flip=-0.1 flip=1.1 brightness=-0.1 brightness=1.1 contrast=-0.1 contrast=1.1
        saturation=-0.1 saturation=1.1 strength=strongest strength=null strong_share=1.1 hue=-0.1 hue=0.51
        grey=1.1 rotate=-1 rotate=181 posterize=1.1 solarize=-0.1 blur=1.1 blur=true erase=1.1
    """,
    "loss": """
        task_weight=-1 task_weight=.nan task_weight=.inf kd_weight=-1 kd_weight=.nan kd_weight=heavy
        temperature=0 temperature=-1 temperature=.inf alignment_weight=-1 uniformity_weight=-1
        alignment_alpha=0 uniformity_t=0 projection_dim=1
    """,
    "distill": """
        epochs=0 epochs=1.5 batch_size=0 labelled_share=-0.1 labelled_share=1.1 optimizer=adam
        learning_rate=0 learning_rate=.nan weight_decay=-1 momentum=-0.1 momentum=1.1 schedule=linear
        warmup_epochs=-1 ema_decay=0 ema_decay=1 precision=fp8 clip_norm=0 val_every=0 num_workers=-1
        num_workers=[0,2] num_workers=[1,2,3] num_workers=[2,1] num_workers=many cache=disk
        checkpoint_seconds=-1 checkpoint_seconds=inf max_failures=-1
    """,
    "evaluate": "batch_size=0 calibration_bins=0",
    "export": "formats=[tflite] preprocessing=7 int8=int4 int8_max_drop=-0.1 int8_max_drop=1.1",
    "cluster": "teacher_actors=0 teacher_actors=[0,2] teacher_actors=[3,2] teacher_actors=[1] grows_to=8",
    "tracking": "enabled=perhaps uri=5 uri=file:./mlruns uri=./mlruns",
}
WORDS = [f"{section}.{word}".lstrip(".") for section, text in OUT_OF_BOUNDS.items() for word in text.split()]


@pytest.mark.parametrize("word", [*WORDS, "cluster.grows_to={TPU: 4}", "cluster.grows_to={CPU: -1}"])
def test_a_value_out_of_bounds_is_named_in_one_line(word):
    assert word.partition("=")[0] in one_refusal(word)


@pytest.mark.parametrize(
    "word",
    [
        "images.size=8", "images.size=2048", "images.max_bad_share=0", "images.max_bad_share=1", "views.min_scale=1",
        "views.hue=0.5", "views.rotate=180", "views.erase=null", "views.strong_share=0",
        "views.max_ratio=1", "views.flip=0", "views.flip=1", "views.per_image=1", "views.per_image=fresh",
        "loss.projection_dim=2", "distill.labelled_share=0", "distill.labelled_share=1", "distill.num_workers=0",
        "distill.num_workers=[1,1]", "distill.num_workers=64", "cluster.teacher_actors=[1,1]", "seed=4294967295",
    ],
)  # fmt: skip
def test_the_bounds_themselves_are_allowed(word):
    key, _, value = word.partition("=")
    assert value_of(loaded(word).model_dump(mode="json"), key) == yaml.safe_load(value)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["distill.batch_size=3", "distill.num_workers=4"], "distill.batch_size"),
        (["distill.batch_size=3", "distill.num_workers=[1,4]"], "distill.num_workers"),
        (["student.weights=w.pth"], "student.init"),
        (["teacher.head=fine_tune", "teacher.center_crop=true"], "teacher.center_crop"),
        ([f"loss.{term}_weight=0" for term in ("task", "kd", "alignment", "uniformity")], "loss"),
    ],
)
def test_values_that_do_not_go_together_are_named(words, named):
    assert named in one_refusal(*words)


def test_each_wrong_value_has_its_line():
    assert len(refusal(PATH, "seed=-1", "distill.epochs=0", "distill.zzz=1", "student.size=1")) == 4


@pytest.mark.parametrize("words", [[], ["images=null"], ["images.size=64"], ["images.path="]])
def test_without_images_the_message_says_how_to_name_them(words):
    (line,) = refusal(*words)
    assert line.startswith("images.path: required")


def test_a_number_where_text_is_wanted_is_to_be_quoted_in_a_job_file(job):
    (line,) = refusal(job("images: {path: 2024}\n"))
    assert line.startswith("images.path=2024")
    assert "quotes" in line
    assert load_config([job("images: {path: '2024'}\n")]).images.path == "2024"


@pytest.mark.parametrize(
    "text",
    [
        "distill: {epochs: 3\n", "a: b: c\n", "\tseed: 1\n", "- a\n- b\n", "just words\n", "5\n", "%YAML 3\n",
        "seed: 1\nseed: 2\n", "!!python/object/apply:os.system ['true']\n", "{a: !!binary x}\n", "? [1, 2]\n: 3\n",
    ],
)  # fmt: skip
def test_a_job_file_that_is_no_mapping_is_refused_by_its_name(job, text):
    assert "job.yaml" in one_refusal(job(text)) or "unknown key" in one_refusal(job(text))


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\x00", b"\xff\xfe\x00", bytes(range(256))])
def test_a_job_file_that_is_no_text_is_refused(tmp_path, content):
    (tmp_path / "job.yaml").write_bytes(content)
    assert "job.yaml" in one_refusal(str(tmp_path / "job.yaml"))


def test_an_empty_job_file_changes_nothing(job):
    assert loaded(job("")) == loaded(job("# only a comment\n")) == loaded()


def test_missing_files_are_named():
    assert "nowhere.yaml" in one_refusal("nowhere.yaml")


@pytest.mark.parametrize(
    "words",
    [
        ["images=[1]", PATH],
        [PATH, "images=[1]"],
        [PATH, "images=5"],
        [PATH, "distill=fast"],
        [PATH, "teacher.model.x=1"],
    ],
)
def test_sections_that_are_no_sections_are_refused(words):
    assert len(refusal(*words)) == 1


FORMATS = "expected: list of onnx | onnx_picture | torch_export"
ROUND = "is (fewest, most); [4, 1] has them the wrong way round"


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["student=timm:resnet10t"], "student='timm:resnet10t': student is a section; for instance: student.model="),
        (["distill=5"], "distill=5: distill is a section; for instance: distill.epochs=5"),
        (["distill.epochs", "=", "5"], "distill.epochs: a setting is one word without spaces: distill.epochs=VALUE"),
        (["distill.epochs:5"], "distill.epochs:5: a setting is one word without spaces: distill.epochs=VALUE"),
        (["seed"], "seed: a setting is one word without spaces: seed=VALUE"),
        (["distill="], "distill: has no value; distill is a section; for instance: distill.epochs=60"),
        (["distill=fast"], "distill='fast': distill is a section; for instance: distill.epochs=60"),
        (["distill.batch_size="], "distill.batch_size: has no value; expected: whole number ≥ 1"),
        (["name="], "name: has no value; expected: text"),
        (
            ["views.per_image=freshh"],
            "views.per_image='freshh': expected: whole number ≥ 1 | fresh; did you mean fresh?",
        ),
        (["images.val_share=20 %"], "images.val_share='20 %': expected: number ≥ 0 and < 1; for 20 % write 0.2"),
        (["distill.epochs=10%"], "distill.epochs='10%': expected: whole number ≥ 1"),
        (["images.val_share=150%"], "images.val_share='150%': expected: number ≥ 0 and < 1"),
        (["loss.temperature=nan"], "loss.temperature='nan': expected: number > 0, and finite"),
        (["distill.optimizer=adam"], "distill.optimizer='adam': expected: adamw | sgd; did you mean adamw?"),
        (["loss.kd_weight=-1"], "loss.kd_weight=-1: expected: number ≥ 0 | [number ≥ 0, number ≥ 0]"),
        (["export.formats=onnx"], f"export.formats='onnx': {FORMATS}; write [onnx]"),
        (["export.formats=tflite"], f"export.formats='tflite': {FORMATS}"),
        (["distill.num_workers=[4,1]"], f"distill.num_workers {ROUND}; write [1, 4]"),
        (["cluster.generator_actors=[4,1]"], f"cluster.generator_actors {ROUND}; write [1, 4]"),
        (["cluster.teacher_actors=[1]"], "cluster.teacher_actors=[1]: expected: [whole number ≥ 1, whole number ≥ 1]"),
        (["distill.epochs=300", "distill.epochs.x=3"], "distill.epochs.x=3: gives a section, where what came before"),
        (["images.val_share=0.6", "images.test_share=0.5"], "images.val_share=0.6 and images.test_share=0.5 leave"),
        (["seed=true"], "seed=true: expected: a number, not true or false"),
        (["distill.warmup_epochs=yes"], "distill.warmup_epochs=true: expected: a number, not true or false"),
        (["loss.crd_weight=[true, 1]"], "loss.crd_weight=[True, 1]: expected: a number, not true or false"),
        (
            ["loss.class_weights=balancd"],
            "loss.class_weights='balancd': expected: balanced | number > 0 by name | null; did you mean balanced?",
        ),
        (["loss.class_weights={cat: 0}"], "loss.class_weights=0: cat: input should be greater than 0"),
        (["cluster.grows_to={CPU: true}"], "cluster.grows_to={'CPU': True}: expected: a number, not true or false"),
        (["workspace=s3:bucket/x"], "workspace='s3:bucket/x': an address has two slashes; did you mean s3://bucket/x?"),
        (["images.classes=gs:/x"], "images.classes='gs:/x': an address has two slashes; did you mean gs://x?"),
        (["tracking.uri=http:host"], "tracking.uri=http:host: an address has slashes; did you mean http://host?"),
        (["s3:bucket/x"], "s3:bucket/x: an address has two slashes; did you mean s3://bucket/x?"),
    ],
)  # fmt: skip
def test_a_setting_in_another_form_is_told_the_right_one(words, told):
    line = one_refusal(*words)
    assert line.startswith(told)
    assert line.endswith(told[-20:]) or "write" not in line


def test_blanks_around_an_equals_sign_and_a_folder_with_a_colon_are_as_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("s3:there").mkdir()
    config = load_config(["images.path = s3:there", " seed = 3", "name= a", "workspace=example:x"])
    assert (config.images.path, config.seed, config.name, config.workspace) == ("s3:there", 3, " a", "example:x")


keys = st.sampled_from([*known_keys(), "", ".", "a..b", "images[0]", "images.path.x", "teacher.zzz", "ÿ"])
values = st.sampled_from(
    ["", "1", "-1", "x", "null", "[1,2]", "{a: 1}", "true", "1e400", "${x}", "${", "???", "[", "'", "!!int x"]
)


@given(st.lists(st.tuples(keys, values | st.text(max_size=5)), max_size=4))
def test_whatever_is_typed_gives_a_config_or_a_config_error(pairs):
    try:
        config = loaded(*(f"{key}={value}" for key, value in pairs))
    except ConfigError:
        return
    assert RunConfig.model_validate(config.model_dump()) == config


def test_a_config_cannot_be_changed():
    config = loaded()
    with pytest.raises(ValidationError):
        config.seed = 1
    with pytest.raises(ValidationError):
        config.images.size = 64


@pytest.mark.parametrize("module", ["data.sources.listing", "graph", "preflight", "cli.commands"])
def test_help_does_not_wait_for_torch_and_ray(module):
    code = f"import sys, raydistill.{module}\n"
    code += "sys.exit(bool({'torch', 'ray', 'transformers', 'mlflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parents[1], env=os.environ)
    assert done.returncode == 0


@pytest.mark.parametrize("arm", [name for name in OVERLAYS if name != "job"])
def test_each_overlay_goes_over_a_job_with_a_pretrained_student(arm):
    words = [
        "images.path=.",
        "student.init=pretrained",
        "student.weights=example:efficientnet-lite0",
        f"jobs/overlays/{arm}.yaml",
    ]
    student = load_config(words).student
    assert (student.init == "pretrained") == (student.weights is not None)


def test_files_that_come_with_it_are_found_by_name_from_anywhere(tmp_path, monkeypatch):
    jobs = Path(__file__).parents[1] / "jobs"
    by_path = load_config([str(jobs / "fashion_mnist.yaml"), str(jobs / "overlays" / "smoke.yaml")])
    monkeypatch.chdir(tmp_path)
    assert load_config(["fashion_mnist", "smoke"]) == by_path
    assert load_config(["jobs/fashion_mnist.yaml", "./jobs/overlays/smoke.yaml"]) == by_path
    with pytest.raises(ConfigError, match=r"smok: no such file; .*; did you mean smoke\?"):
        load_config(["fashion_mnist", "smok"])
    (tmp_path / "my_images").mkdir()  # and so do files and folders that are near
    for word, near in (("./my_imagse", "./my_images"), (f"{tmp_path}/my_images2", f"{tmp_path}/my_images")):
        with pytest.raises(ConfigError, match=rf"no such file; .*; did you mean {near}\?"):
            load_config([word])
    (tmp_path / "smoke").write_text("seed: 7")  # the user's own comes first
    assert load_config(["fashion_mnist", "smoke"]).seed == 7


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("a." * 9000 + "b=1", "unknown key; `raydistill keys` lists them"),
        ("images." + "path." * 900 + "b=1", "unknown key; `raydistill keys` lists them"),
        ("name=caf\udce9", "not UTF-8, which every value but a path has to be"),
        ("seed=\udce9", "not UTF-8, which every value but a path has to be"),
    ],
)
def test_words_that_no_job_holds_are_one_sentence(word: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config([word, "images.path=x"])
