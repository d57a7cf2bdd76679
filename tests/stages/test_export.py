"""Exported students against the checkpoint they come from, each read back as somebody without raydistill reads it."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow as pa
import pytest
import timm
import torch
import transformers
from PIL import Image
from pyarrow import parquet as pq
from sklearn.linear_model import LogisticRegression
from typer.testing import CliRunner

from raydistill.cli.commands import app
from raydistill.cluster.plan import plan_resources
from raydistill.config import load_config, overlay
from raydistill.config.baselines import OVERLAYS
from raydistill.data import sample
from raydistill.data.sample import SampleSet, sample_id
from raydistill.data.targets import UNLABELLED, read_ids, read_samples
from raydistill.errors import CheckpointError, ConfigError, StageError, UselessStudentError
from raydistill.inference.predict import Predictor, find_units, predict_locally
from raydistill.models.formats import network_inputs
from raydistill.models.student import Student, read_student, split_logits
from raydistill.pages import report as report_module
from raydistill.pages.card import int8_words, snippets
from raydistill.pages.report import write_report
from raydistill.results import Exported
from raydistill.run import run_stages
from raydistill.stages import export
from raydistill.stages.evaluate import evaluate_student
from raydistill.storage.directory import StageDirectory
from tests.models.conftest import classifier
from tests.small_run import CLASSES

CLASSES_BY_NAME = sorted(CLASSES)  # as a folder gives them

pytestmark = pytest.mark.usefixtures("one_thread")


def working_images(samples, split: str = "val") -> np.ndarray:
    return sample.working_images(read_samples(samples, split, 0), samples.size)


def expected_logits(samples, checkpoint: str) -> np.ndarray:
    return split_logits(read_student(checkpoint)[0], samples, "val", torch.device("cpu"), 4)[0]


def onnx_logits(file: Path, inputs: np.ndarray) -> np.ndarray:
    return onnxruntime.InferenceSession(file).run(["logits"], {"images": inputs})[0]


class Logged:
    """A tracker that keeps what it is given."""

    def log_model(self, file: str, example: np.ndarray, about: dict, register_as: str | None) -> None:
        self.example, self.about = example, about


@pytest.mark.parametrize("in_graph", [True, False])
def test_a_model_is_recorded_at_the_jobs_size_whatever_a_shared_workspace_says(tmp_path, in_graph):
    words = [f"export.preprocessing={in_graph}", "images.size=24", "student.size=32", f"workspace={tmp_path}"]
    config, exported = load_config(["images.path=x", *words]), Exported(str(tmp_path), {}, {}, None, {})
    about = {
        "model": "timm:test_resnet", "library": "timm", "classes": ["a", "b"],
        "preprocessing": {"size": 2048, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
        "image": {"size": 2048, "fit": "crop"}, "training": {"kept_epoch": 3, "kept": "the last"}, "input": "pixels",
    }  # fmt: skip
    (tmp_path / "raydistill.json").write_text(json.dumps(about))
    export.record_model(config, exported, logged := Logged())
    assert logged.example.shape == ((1, 24, 24, 3) if in_graph else (1, 3, 32, 32))
    assert json.loads(json.dumps(logged.about)) == about
    for damaged in (about | {"image": {"size": 30_000, "fit": "crop"}}, {"classes": []}, about | {"training": [1]}):
        (tmp_path / "raydistill.json").write_text(json.dumps(damaged))
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/raydistill\.json is not what raydistill writes"):
            export.record_model(config, exported, logged)
        export.record_model(load_config(["images.path=x", "tracking.enabled=false", *words]), exported, logged)


@pytest.mark.parametrize("model", ["timm:test_resnet", "timm:test_vit"])
def test_timm_and_transformers_load_the_same_network_from_the_folder(exported, tiny_set, model):
    result, checkpoint = exported(model, size=32, formats=[])
    network = timm.create_model(f"local-dir:{result.path}", pretrained=True).eval()
    wanted = read_student(checkpoint)[0].preprocessing
    inputs = torch.from_numpy(network_inputs(working_images(tiny_set.samples), wanted, False))
    with torch.inference_mode():
        np.testing.assert_allclose(network(inputs).numpy(), expected_logits(tiny_set.samples, checkpoint), atol=1e-5)
    assert network.pretrained_cfg["label_names"] == list(CLASSES)
    data = timm.data.resolve_model_data_config(network)
    assert tuple(data["input_size"]) == (3, 32, 32)
    assert (tuple(data["mean"]), tuple(data["std"])) == (wanted.mean, wanted.std)
    assert data["interpolation"] == wanted.interpolation
    assert data["crop_pct"] == 1.0
    by_transformers = transformers.AutoModelForImageClassification.from_pretrained(result.path).eval()
    with torch.inference_mode():
        own = by_transformers(pixel_values=inputs).logits.numpy()
    np.testing.assert_allclose(own, expected_logits(tiny_set.samples, checkpoint), atol=1e-5)
    assert by_transformers.config.id2label == dict(enumerate(CLASSES))


def test_transformers_loads_the_same_network_from_the_folder(exported, tiny_set, tmp_path):
    classifier("ViT").save_pretrained(tmp_path / "vit")
    result, checkpoint = exported(f"hf:{tmp_path / 'vit'}", size=32)
    network = transformers.AutoModelForImageClassification.from_pretrained(result.path).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(result.path)
    images = [Image.fromarray(image) for image in working_images(tiny_set.samples)]
    with torch.inference_mode():
        own = network(**processor(images, return_tensors="pt")).logits.numpy()
    # The processor rounds to 8 bits between resizing and normalising.
    np.testing.assert_allclose(own, expected_logits(tiny_set.samples, checkpoint), atol=0.05)
    assert [network.config.id2label[k] for k in range(3)] == list(CLASSES)
    assert set(result.differences) == {"model.safetensors", "model.onnx", "model.pt2", "picture.onnx"}


@pytest.mark.parametrize("from_pixels", [False, True])
def test_graphs_give_the_checkpoints_logits_in_batches_of_any_size(exported, tiny_set, from_pixels):
    result, checkpoint = exported("timm:test_resnet", preprocessing=from_pixels)
    wanted, images = read_student(checkpoint)[0].preprocessing, working_images(tiny_set.samples)
    inputs, expected = network_inputs(images, wanted, from_pixels), expected_logits(tiny_set.samples, checkpoint)
    assert inputs.dtype == (np.uint8 if from_pixels else np.float32)
    program = torch.export.load(f"{result.path}/model.pt2").module()
    for size in (1, 2, 5, len(images)):
        np.testing.assert_allclose(
            onnx_logits(Path(result.path, "model.onnx"), inputs[:size]), expected[:size], atol=1e-4
        )
        with torch.inference_mode():
            own = program(torch.from_numpy(inputs[:size])).numpy()
        np.testing.assert_allclose(own, expected[:size], atol=1e-4)
    session = onnxruntime.InferenceSession(Path(result.path, "model.onnx"))
    about = json.loads(session.get_modelmeta().custom_metadata_map["raydistill"])
    assert about == json.loads(Path(result.path, "raydistill.json").read_text())
    assert about["classes"] == list(CLASSES)
    assert about["input"] == ("pixels" if from_pixels else "normalised")


def test_one_file_answers_pictures_of_any_size_as_predict_does(exported):
    """Without a line of raydistill: a picture's pixels go in."""
    result, _ = exported("timm:test_resnet")
    session, predictor = onnxruntime.InferenceSession(Path(result.path, "picture.onnx")), Predictor(result.path)
    rng = np.random.default_rng(0)
    for height, width in [
        (1, 1),
        (1, 50),
        (3, 900),
        (24, 24),
        (25, 23),
        (200, 101),
        (700, 500),
        (1300, 60),
        (2100, 3001),
    ]:
        small = rng.integers(0, 256, (max(1, height // 9), max(1, width // 9), 3), np.uint8)
        picture, sink = Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC), io.BytesIO()
        picture.save(sink, "PNG")
        (answer,) = predictor.answer_bytes([("a", sink.getvalue(), "")])
        (own,) = session.run(["probabilities"], {"image": np.asarray(picture)})[0]
        np.testing.assert_allclose(own, answer.probabilities_C, atol=0.01, err_msg=f"{height} x {width}")
    assert list(json.loads(session.get_modelmeta().custom_metadata_map["raydistill"])["classes"]) == list(CLASSES)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_int8_is_smaller_and_says_what_it_costs(exported, kind):
    result, _ = exported("timm:test_resnet", formats=["onnx"], int8=kind)
    assert result.int8 is not None
    assert result.int8["images"] == 12
    assert result.int8["agreement"] >= 0.75
    assert result.int8["accuracy_before"] is not None
    assert result.files["model_int8.onnx"] < result.files["model.onnx"]
    assert "model.pt2" not in result.files
    assert result.speed.keys() == {"student, torch", "student, onnx", "student, onnx int8"}


def learn_val(student: Student, samples: SampleSet) -> None:
    """Fit the classifier to the val images, so that there is an accuracy to lose."""
    table = read_samples(samples, "val", 0)
    images = torch.from_numpy(network_inputs(working_images(samples), student.preprocessing, False))
    with torch.no_grad():
        features = student.eval()(images)[1].numpy()
        fitted = LogisticRegression(C=100, max_iter=1000).fit(features, table["label"].to_numpy())
        student.classifier.weight.copy_(torch.from_numpy(fitted.coef_))
        student.classifier.bias.copy_(torch.from_numpy(fitted.intercept_))


@pytest.mark.parametrize(("collapses", "max_drop", "kept"), [(False, 0.05, True), (True, 0.05, False), (True, 1, True)])
def test_an_int8_file_that_loses_too_much_is_left_out(exported, tiny_set, collapses, max_drop, kept):
    def change(student: Student) -> None:
        learn_val(student, tiny_set.samples)
        if collapses:  # the same for all classes, so no answer changes; but one INT8 scale has to hold it
            with torch.no_grad():
                student.classifier.weight[:, 0] += 1e4 * student.classifier.weight.abs().max()

    result, _ = exported(formats=["onnx"], change=change, int8="dynamic", int8_max_drop=max_drop)
    assert result.int8["accuracy_before"] == 1
    assert (result.int8["accuracy_after"] < 0.5) == collapses
    assert result.int8["kept"] == kept
    assert ("model_int8.onnx" in result.files) == ("student, onnx int8" in result.speed) == kept
    there = {file.name for file in Path(result.path).iterdir()}
    assert {"model.onnx", "model.safetensors", "README.md"} <= there
    assert ("model_int8.onnx" in there) == kept
    assert json.loads(Path(result.path, "DONE").read_text())["int8"] == result.int8
    words = int8_words(result.int8)
    assert ("left out" in words) == ("raise that" in words) == (not kept)
    after = result.int8["accuracy_after"]
    assert f"1.000 before and {after:.3f} after" in words


def test_without_labels_int8_may_change_no_more_answers_than_accuracy_may_drop():
    logits_NC, unlabelled_N = np.eye(10, dtype=np.float32), np.full(10, UNLABELLED)
    rough_NC = logits_NC[[1, *range(1, 10)]]
    for max_drop, kept in ((0.09, False), (0.11, True)):
        int8 = export._compare_roughly(logits_NC, rough_NC, unlabelled_N, max_drop)
        assert (int8["agreement"], int8["accuracy_before"], int8["kept"]) == (pytest.approx(0.9), None, kept)
        assert ("left out" in int8_words(int8)) == ("changed answers" in int8_words(int8)) == (not kept)


def test_int8_needs_onnx(tiny_set):
    with pytest.raises(ValueError, match=r"put onnx into export\.formats"):
        tiny_set.job("job", export={"formats": ["torch_export"], "int8": "dynamic"})


def test_a_form_that_differs_is_refused_and_nothing_is_exported(exported, tmp_path, monkeypatch):
    file, write, read = export._FORMATS["onnx"]

    def write_another(network, example, about, file):
        with torch.no_grad():
            network.network.get_classifier().weight[0] *= 1.01
        write(network, example, about, file)

    monkeypatch.setitem(export._FORMATS, "onnx", (file, write_another, read))
    with pytest.raises(StageError, match=r"the logits of model\.onnx differ from the checkpoint's by up to"):
        exported("timm:test_resnet")
    assert {file.name for file in (tmp_path / "export").iterdir()} == {"identity.json"}


def test_a_set_with_a_single_image_is_exported(exported, monkeypatch):
    monkeypatch.setattr(export, "_MOST_IMAGES", 1)
    assert "model.pt2" in exported(formats=["torch_export"])[0].differences


def test_a_form_that_gives_no_number_is_refused(tiny_set):
    images = np.zeros((3, 2), np.float32)
    with pytest.raises(StageError, match=r"logits of model\.onnx differ"):
        export._compare(lambda x: np.full((len(x), 2), np.nan, np.float32), images, images + 1, "model.onnx")


def test_a_run_ends_in_a_folder_with_a_card(finished, progress):
    config, outcome, _ = finished
    assert outcome.exported is not None
    assert outcome.report is not None
    card = Path(outcome.exported.path, "README.md").read_text()
    test = outcome.report.student["test"]
    assert f"| test, {test['images']} images: accuracy | {test['accuracy']:.3f} |" in card
    for name in (*CLASSES, "timm:test_resnet", "teacher", "model.onnx"):
        assert name in card
    about = json.loads(Path(outcome.exported.path, "raydistill.json").read_text())
    for code in snippets(about, outcome.exported).values():
        assert f"```python\n{code}\n```" in card
    again = run_stages(config, progress, "export")
    assert again.exported == outcome.exported
    assert again.seconds["export"] == 0.0


@pytest.mark.usefixtures("taught")
def test_a_student_at_chance_is_reported_and_exported_only_when_told_to(words, tmp_path):
    words = [*words, "distill.learning_rate=1e-9", "distill.epochs=1", "export.formats=[]"]
    refused = CliRunner().invoke(app, ["run", *words, "export.allow_useless=false"])
    assert isinstance(refused.exception, UselessStudentError)
    assert "so it is not exported" in str(refused.exception)
    assert "export.allow_useless=true" in str(refused.exception)
    first = next(line for line in refused.stdout.splitlines() if line.startswith("warning:"))
    assert "The student is no better than chance: it is right for" in first
    assert "It never names" in refused.stdout
    page = next(tmp_path.glob("workspace/evaluate-*/report.html")).read_text()
    assert "The student is no better than chance" in page
    assert not list(tmp_path.glob("workspace/export-*"))
    told = CliRunner().invoke(app, ["run", *words])  # the job of tests allows it
    assert told.exit_code == 0
    card = next(tmp_path.glob("workspace/export-*/README.md")).read_text()
    assert "> **Warning.** The student is no better than chance" in card


def test_predict_is_as_accurate_on_the_files_as_was_reported(finished):
    config, outcome, _ = finished
    samples = outcome.samples
    files = {sample_id(file.read_bytes()): str(file) for file in Path(config.images.path).rglob("*.png")}
    for split in ("val", "test"):
        tables = [read_samples(samples, split, shard) for shard in range(len(samples.shards[split]))]
        names = [files[i] for table in tables for i in table["sample_id"].to_pylist()]
        answers = predict_locally(outcome.exported.path, "onnx", find_units(names))
        right = [samples.classes[a.probabilities_C.argmax()] == Path(a.name).parent.name for a in answers]
        assert len(right) == outcome.report.student[split]["images"] > 5
        assert np.mean(right) == pytest.approx(outcome.report.student[split]["accuracy"])


def test_unknown_formats_are_refused():
    with pytest.raises(ConfigError, match=r"export\.formats"):
        load_config(["images.path=x", "export.formats=[tflite]"])


def test_the_report_is_one_page_that_needs_nothing_else(finished):
    report_page = finished[2]
    page = report_page.read_text()
    assert not re.search(r"""(src|href)=["'](?!data:|#)""", page)
    assert "@import" not in page
    assert "<i>" not in page  # names of people's jobs and classes are text
    assert "&lt;i&gt;größe&lt;/i&gt; &amp; &#34;co&#34;" in page
    report = json.loads((report_page.parent / "report.json").read_text())
    for who in ("student", "teacher"):
        for split in ("val", "test"):
            assert f"{who}, {split}" in page
            assert f">{report[who][split]['accuracy']:.3f}</span>" in page
    images = report["student"]["val"]["images"]
    assert f"Val has {images} images. To tell a temperature" in page
    assert "confident" not in page.replace("is overconfident, takes", "")
    for encoded in re.findall(r'src="data:image/png;base64,([^"]+)"', page):  # on which the two disagree
        Image.open(io.BytesIO(base64.b64decode(encoded))).verify()
    assert page.count("<svg") == 1  # val was measured once, and test is too small for a chart of calibration
    for words in ("a copy of another image", "model.onnx", "torch ", "per_image: 2"):
        assert words in page
    assert "red/cut.png" in page or "red/copy.png" in page


@pytest.mark.cluster
def test_a_pool_of_actors_measures_what_this_process_did(finished, tmp_path, progress):
    config, outcome, page = finished
    samples = outcome.samples
    directory, plan = StageDirectory(str(tmp_path / "evaluate"), "evaluate", "{}"), plan_resources(config, 2.0, 0.0, 2)
    report = evaluate_student(config, samples, outcome.adapted, outcome.student, directory, plan, progress)
    rounded = ("ece", "ece_calibrated", "balanced_accuracy")
    for found, expected in ((report.student, outcome.report.student), (report.teacher, outcome.report.teacher)):
        for split, of_split in expected.items():
            near = {name: pytest.approx(of_split[name], abs=1e-4) for name in rounded if name in of_split}
            assert found[split] == of_split | near
    assert report.agreement == outcome.report.agreement
    assert report.temperature == pytest.approx(outcome.report.temperature, rel=1e-3)
    here, there = (pq.read_table(folder / "predictions.parquet") for folder in (page.parent, tmp_path / "evaluate"))
    assert here.schema == there.schema
    for name in here.column_names:
        if pa.types.is_floating(here.schema.field(name).type):
            np.testing.assert_allclose(here[name].to_numpy(), there[name].to_numpy(), atol=1e-5)
        elif pa.types.is_list(here.schema.field(name).type):
            np.testing.assert_allclose(np.stack(here[name].to_numpy()), np.stack(there[name].to_numpy()), atol=1e-4)
        else:
            assert here[name].equals(there[name])
    shards = [(split, k) for split in ("val", "test") for k in range(len(samples.shards[split]))]
    assert len(shards) >= 2
    ids = [sample for shard in shards for sample in read_ids(samples, *shard)]
    assert here["sample_id"].to_pylist() == ids


def test_a_temperature_is_told_of_where_val_can_tell_it(finished, monkeypatch):
    config, outcome, path = finished
    before = path.read_bytes()
    monkeypatch.setattr(report_module, "FEWEST_MEASURED", 1)
    page = Path(write_report(config, outcome, "")).read_text()
    path.write_bytes(before)
    assert page.count("<svg") == 2
    assert f"The temperature {outcome.report.temperature:.2f} is fitted on val" in page
    test = outcome.report.student["test"]
    assert ("so it does not help there" in page) == (test["ece_calibrated"] > test["ece"])


def test_the_report_shows_the_baselines_that_were_run(finished, progress):
    config, outcome, page = finished
    assert "run the same job with the overlay" in page.read_text()
    scratch = run_stages(overlay(config, OVERLAYS["scratch"]), progress)
    assert scratch.report is not None
    with_baseline = Path(write_report(config, outcome, "raydistill run job.yaml")).read_text()
    assert f"scratch: {100 * scratch.report.student['test']['accuracy']:.1f} %" in with_baseline
    assert "scratch, val" in with_baseline
    shown = with_baseline.split("<pre>")[0]  # the job's own text lists every method
    assert "align_uniform" not in shown  # which is the job itself


def test_the_report_names_a_stage_that_other_versions_finished(finished):
    config, outcome, page = finished
    assert "An earlier run finished" not in page.read_text()
    file = Path(outcome.directories["distill"], "seconds.json")
    bill = json.loads(file.read_text())
    try:
        file.write_text(json.dumps(bill | {"versions": bill["versions"] | {"torch": "1.13.1"}}))
        again = Path(write_report(config, outcome, "raydistill run job.yaml")).read_text()
    finally:
        file.write_text(json.dumps(bill))
    assert "An earlier run finished distill with torch 1.13.1<" in again


def test_disagreements_are_those_of_the_predictions(finished):
    report_page = finished[2]
    rows = pq.read_table(report_page.parent / "predictions.parquet").to_pylist()
    assert {row["split"] for row in rows} == {"val", "test"}
    val = [row for row in rows if row["split"] == "val"]
    differing = [row for row in val if np.argmax(row["student_logits"]) != np.argmax(row["teacher_logits"])]
    shown = re.findall(r"<br>student: (\w+) \d+&nbsp;%<br>teacher: (\w+) ", report_page.read_text())
    names = sorted(
        (CLASSES_BY_NAME[np.argmax(r["student_logits"])], CLASSES_BY_NAME[np.argmax(r["teacher_logits"])])
        for r in differing
    )
    assert sorted(shown) == names
    report = json.loads((report_page.parent / "report.json").read_text())
    right = [np.argmax(row["student_logits"]) == row["label"] for row in val]
    assert report["student"]["val"]["accuracy"] == pytest.approx(np.mean(right))
