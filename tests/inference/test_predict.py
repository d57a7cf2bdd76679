"""Predictions against the checkpoint: the same pixels, the same classes by name, nothing lost and nothing moved."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image, ImageOps
from starlette.testclient import TestClient

from raydistill.data.decode import decode
from raydistill.data.isolation import end_processes
from raydistill.data.views import WHOLE_IMAGE, Preprocessing, render
from raydistill.errors import CheckpointError, ConfigError, DataError
from raydistill.inference.command import predict_command
from raydistill.inference.predict import Predictor, find_units, predict_locally, predict_on_ray, without_first
from raydistill.inference.predictions import OUTPUTS, write_predictions
from raydistill.inference.serve import make_app
from raydistill.inference.sockets import ServeSettings
from raydistill.models.formats import network_inputs
from raydistill.models.student import read_student
from tests.small_run import CLASSES, SIZE, painted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten pictures of other sizes and kinds than the student's, one that is cut, and files that are no pictures."""
    folder, rng = tmp_path / "pictures", np.random.default_rng(2)
    (folder / "more").mkdir(parents=True)
    for k in range(6):
        picture = painted(k % 3, rng, 30 + 7 * k)
        picture.crop((0, 0, 30, 20 + k)).save(folder / f"{k}.JPG" if k % 2 else folder / "more" / f"{k}.png")
    painted(1, rng, 40).convert("L").convert("RGBA").save(folder / "grey.webp")
    exif = Image.Exif()
    exif[0x0112] = 6
    painted(2, rng, 40).crop((0, 0, 40, 30)).save(folder / "turned.jpg", exif=exif)
    painted(0, rng, 40).convert("CMYK").save(folder / "cmyk.jpg")
    hidden = painted(1, rng, 40).convert("RGBA")
    hidden.putalpha(Image.fromarray(np.tile(np.arange(40, dtype=np.uint8) * 6, (40, 1))))
    hidden.save(folder / "hidden.png")
    whole = (folder / "1.JPG").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "notes.txt").write_text("no picture")
    (folder / ".hidden.png").write_bytes(b"junk")
    return folder


def slow_probabilities(checkpoint: str, data: bytes, fit: str = "crop") -> np.ndarray:
    """One picture through the checkpoint by the functions that training uses."""
    student, _ = read_student(checkpoint)
    image = torch.from_numpy(np.array(decode(data, SIZE, fit, 10**7)))[None]
    with torch.inference_mode():
        logits = student(render(image, torch.from_numpy(WHOLE_IMAGE)[None], student.preprocessing))[0]
    return logits.softmax(1)[0].numpy()


@pytest.mark.parametrize(("engine", "from_pixels"), [("onnx", False), ("onnx", True), ("torch", False)])
def test_every_picture_gets_the_checkpoints_answer(exported, pictures, engine, from_pixels):
    mean, std = (0.1, 0.3, 0.6), (0.4, 0.2, 0.1)
    own = Preprocessing(SIZE - 4, mean, std, "bilinear")
    result, checkpoint = exported(
        size=SIZE - 4, preprocessing=from_pixels, change=lambda student: setattr(student, "preprocessing", own)
    )
    assert read_student(checkpoint)[0].preprocessing == own
    units = find_units([str(pictures)])
    answers = list(predict_locally(result.path, engine, units))
    assert [a.name for a in answers] == [path for path, _, _ in units]
    assert len(answers) == 11
    for answer in answers:
        if Path(answer.name).name == "cut.jpg":
            assert answer.probabilities_C is None
            assert "truncated" in answer.error.lower()
        else:
            expected = slow_probabilities(checkpoint, Path(answer.name).read_bytes())
            np.testing.assert_allclose(answer.probabilities_C, expected, atol=1e-5)


def test_pictures_much_larger_than_the_working_image(exported, tmp_path):
    """Wide and high ones, with a texture that comes out wrong where pixels are left out instead of averaged."""
    result, checkpoint = exported(formats=["onnx"])
    file, rng = Path(result.path, "raydistill.json"), np.random.default_rng(3)
    about = json.loads(file.read_text())
    shapes = {"wide.png": (1600, 900), "high.png": (500, 2100), "wide.jpg": (2400, 700)}
    for name, (width, height) in shapes.items():
        picture = painted(1, rng, max(width, height)).crop((0, 0, width, height))
        picture.paste((250, 10, 10), (0, 0, width // 2, height // 2))
        picture.save(tmp_path / name)
    for fit, square in (("crop", ImageOps.fit), ("pad", functools.partial(ImageOps.pad, color="white"))):
        about["image"]["fit"] = fit
        file.write_text(json.dumps(about))
        predictor, paths = Predictor(result.path), [str(tmp_path / name) for name in shapes]
        for answer in predictor.answer(find_units(paths)):
            data = Path(answer.name).read_bytes()
            np.testing.assert_allclose(answer.probabilities_C, slow_probabilities(checkpoint, data, fit), atol=1e-5)
            plain = square(Image.open(answer.name), (SIZE, SIZE), Image.Resampling.BICUBIC)
            difference = np.abs(predictor.working_image(data).astype(int) - np.asarray(plain)).mean()
            assert difference < 2, answer.name


def test_the_network_sees_what_training_sees_bit_for_bit(exported, pictures):
    import torch

    result, checkpoint = exported(formats=["onnx"])
    predictor, wanted = Predictor(result.path), read_student(checkpoint)[0].preprocessing
    for file in sorted(pictures.glob("*.JPG")):
        prepared = np.array(decode(file.read_bytes(), SIZE, "crop", 10**6))
        seen = predictor.working_image(file.read_bytes())
        np.testing.assert_array_equal(seen, prepared)
        view = render(torch.from_numpy(prepared)[None], torch.from_numpy(WHOLE_IMAGE)[None], wanted)
        np.testing.assert_array_equal(network_inputs(seen[None], wanted, False), view.numpy())


def test_outputs_hold_every_picture_with_names_and_probabilities(exported, pictures, tmp_path):
    result, _ = exported(formats=["onnx"])
    units = find_units([str(pictures)])
    answers = list(predict_locally(result.path, "onnx", units))
    for suffix in ("csv", "json", "jsonl", "parquet"):
        write_predictions(answers, CLASSES, 2, str(tmp_path / f"out.{suffix}"))
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    whole = json.loads((tmp_path / "out.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    table = pq.read_table(tmp_path / "out.parquet").to_pylist()
    assert whole == lines
    assert len(rows) == len(whole) == len(table) == len(answers)
    for answer, row, item, record in zip(answers, rows, whole, table, strict=True):
        assert answer.name == row["picture"] == item["picture"] == record["picture"]
        if answer.probabilities_C is None:
            assert answer.error == row["error"] == item["error"] == record["error"]
            assert row["class"] == row["number"] == ""
            assert record["classes"] == []
            continue
        order = np.argsort(-answer.probabilities_C)
        first, second = CLASSES[order[0]], CLASSES[order[1]]
        assert (row["class"], row["class_2"]) == (first, second)
        assert (int(row["number"]), int(row["number_2"])) == tuple(order[:2])
        assert [found["number"] for found in item["classes"]] == list(order[:2])
        assert [found["number"] for found in record["classes"]] == list(order[:2])
        assert [found["class"] for found in item["classes"]] == [first, second]
        assert [found["class"] for found in record["classes"]] == [first, second]
        assert float(row["probability"]) == pytest.approx(answer.probabilities_C[order[0]], abs=1e-6)
        assert "error" not in item


def read_out(file: Path) -> list[str]:
    """The pictures' names."""
    if file.suffix == ".csv":
        return [row["picture"] for row in csv.DictReader(file.read_text(encoding="utf-8").splitlines())]
    if file.suffix == ".jsonl":
        return [json.loads(line)["picture"] for line in file.read_text(encoding="utf-8").splitlines()]
    if file.suffix == ".json":
        return [row["picture"] for row in json.loads(file.read_text(encoding="utf-8"))]
    return pq.read_table(file)["picture"].to_pylist()


def test_a_name_that_is_no_text_costs_no_answer(exported, pictures, tmp_path, capsys):
    result, _ = exported(formats=["onnx"])
    (pictures / "1.JPG").rename(pictures / os.fsdecode(b"caf\xe9.JPG"))
    (pictures / "cut.jpg").rename(pictures / os.fsdecode(b"cut\x1b[2J.jpg"))
    for suffix in OUTPUTS:
        out = tmp_path / f"out{suffix}"
        predict_command(result.path, [str(pictures)], str(out), 1, "onnx", None)
        names = read_out(out)
        assert len(names) == 11
        assert rf"$'{pictures}/caf\xe9.JPG'" in names
    predict_command(result.path, [str(pictures)], None, 1, "onnx", None)
    printed = capsys.readouterr()
    assert rf"$'{pictures}/caf\xe9.JPG'  " in printed.out
    assert rf"$'{pictures}/cut\x1b[2J.jpg'" in printed.err
    assert "\x1b" not in printed.out + printed.err


@pytest.mark.parametrize("suffix", OUTPUTS)
@pytest.mark.parametrize("end", [KeyboardInterrupt, MemoryError])
def test_what_was_answered_before_the_end_is_written_and_the_rest_can_follow(
    exported, pictures, tmp_path, capsys, monkeypatch, suffix, end
):
    result, _ = exported(formats=["onnx"])
    whole, part, rest = (tmp_path / f"{name}{suffix}" for name in ("whole", "part", "rest"))
    predict_command(result.path, [str(pictures)], str(whole), 1, "onnx", None)
    load, asked = Predictor.probabilities, list[int]()

    def ends(predictor: Predictor, images_BHH3: np.ndarray) -> np.ndarray:
        asked.append(len(images_BHH3))
        if len(asked) > 1:
            raise end
        return load(predictor, images_BHH3)

    monkeypatch.setattr(Predictor, "probabilities", ends)
    monkeypatch.setattr("raydistill.inference.predict._TOGETHER", 4)
    with pytest.raises(end):
        predict_command(result.path, [str(pictures)], str(part), 1, "onnx", None)
    said = capsys.readouterr().err
    assert f"4 of 11 pictures are answered, in {part}" in said
    skip = int(said.partition("--skip ")[2].split()[0])
    monkeypatch.setattr(Predictor, "probabilities", load)
    predict_command(result.path, [str(pictures)], str(rest), 1, "onnx", None, skip)
    assert read_out(part) + read_out(rest) == read_out(whole)
    assert not list(tmp_path.glob("*.tmp"))
    with pytest.raises(ConfigError, match="--skip leaves no picture"):
        predict_command(result.path, [str(pictures)], None, 1, "onnx", None, 11)


def test_rows_are_skipped_inside_files_of_many():
    units = [("a.png", 0, 1), ("t.tar", 0, 64), ("t.tar", 64, 10)]
    assert without_first(units, 0) == units
    assert without_first(units, 3) == [("t.tar", 2, 62), ("t.tar", 64, 10)]
    assert without_first(units, 65) == [("t.tar", 64, 10)]
    assert without_first(units, 74) == [("t.tar", 73, 1)]


def test_predict_goes_round_links_once_and_names_what_it_leaves_out(exported, pictures, capsys):
    result, _ = exported(formats=["onnx"])
    (pictures / "more" / "up").symlink_to(pictures, target_is_directory=True)
    os.mkfifo(pictures / "pipe.png")
    predict_command(result.path, [str(pictures)], None, 1, "onnx", None)
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) == 12
    assert "pipe.png: cannot be read: not a regular file" in printed.err
    for what in ("1 links to folders that are read elsewhere (more/up is .)", "1 files ending in .txt",
                 "1 hidden and system files"):  # fmt: skip
        assert f"ignored: {what}" in printed.err


def as_parquet(pictures: Path, path: Path) -> list[bytes | None]:
    images: list[bytes | None] = [file.read_bytes() for file in sorted(pictures.glob("*.JPG"))] * 40
    images[5] = None
    table = pa.table({"image": pa.array(images, pa.binary()), "label": ["red"] * len(images)})
    pq.write_table(table, path, row_group_size=50)
    return images


def test_rows_of_a_parquet_file_stay_in_order(exported, pictures, tmp_path):
    result, checkpoint = exported(formats=["onnx"])
    images = as_parquet(pictures, tmp_path / "set.parquet")
    answers = list(predict_locally(result.path, "onnx", find_units([str(tmp_path / "set.parquet")])))
    assert [a.name for a in answers] == [f"{tmp_path / 'set.parquet'} row {k}" for k in range(len(images))]
    expected = [None if data is None else slow_probabilities(checkpoint, data) for data in images[:6]]
    for answer, wanted in zip(answers[:6], expected, strict=True):
        assert (answer.probabilities_C is None) == (wanted is None)
        if wanted is not None:
            np.testing.assert_allclose(answer.probabilities_C, wanted, atol=1e-5)
    assert [k for k, a in enumerate(answers) if a.error] == [5]


@pytest.mark.cluster
def test_actors_give_the_same_answers_in_the_same_order(exported, pictures, tmp_path, ray_session):
    result, _ = exported(formats=["onnx"])
    as_parquet(pictures, tmp_path / "set.parquet")
    units = find_units([str(pictures), str(tmp_path / "set.parquet")])
    there = list(predict_on_ray(result.path, "onnx", units))
    here = list(predict_locally(result.path, "onnx", units))
    assert [(a.name, a.error) for a in there] == [(a.name, a.error) for a in here]
    for one, other in zip(there, here, strict=True):
        if one.probabilities_C is not None:
            np.testing.assert_allclose(one.probabilities_C, other.probabilities_C, atol=1e-5)


@pytest.fixture
def deadly(tmp_path, monkeypatch) -> Iterator[None]:
    """A decoder with a fault, which a picture of `segfault` inside sets off."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(
        "import os, signal\nfrom PIL import Image\nsoundly = Image.open\n"
        "def dies(file, **options):\n"
        "    if b'segfault' in file.getvalue(): os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return soundly(file, **options)\n"
        "Image.open = dies\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "fault"), prepend=os.pathsep)
    end_processes()
    yield
    end_processes()


def test_a_picture_that_kills_its_process_takes_no_other_along(exported, pictures, deadly):
    result, _ = exported(formats=["onnx"])
    predictor, units = Predictor(result.path), find_units([str(pictures)])
    sound = {answer.name: answer for answer in predictor.answer(units)}
    bad = pictures / "1.JPG"
    bad.write_bytes(bad.read_bytes() + b"segfault")
    for answer in predictor.answer(units):
        if answer.name == str(bad):
            assert answer.error == "kills the process that decodes it, twice, by SIGSEGV"
        else:
            assert answer.error == sound[answer.name].error
            np.testing.assert_array_equal(answer.probabilities_C, sound[answer.name].probabilities_C)
    app = make_app(predictor, "a student", {"testserver"}, ServeSettings(10**6, 10**6, 0.0))
    with TestClient(app) as client, ThreadPoolExecutor(4) as pool:
        files = [bad.read_bytes(), (pictures / "hidden.png").read_bytes()] * 3
        replies = list(pool.map(lambda data: client.post("/predict", content=data), files))
    assert [reply.status_code for reply in replies] == [422, 200] * 3
    assert replies[0].json() == {"error": "kills the process that decodes it, twice, by SIGSEGV"}


def test_works_in_another_folder_with_the_data_gone(exported, pictures, tmp_path, monkeypatch, capsys):
    result, _ = exported(formats=["onnx"])
    os.rename(result.path, tmp_path / "moved")
    (tmp_path / "student").rename(tmp_path / "gone")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    predict_command("../moved", ["../pictures"], None, 1, "onnx", None)
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert len(lines) == 11
    assert sum(any(f"  {name} 0." in line or f"  {name} 1." in line for name in CLASSES) for line in lines) == 10
    assert "10 of 11 pictures answered" in printed.err
    assert "not read: ../pictures/cut.jpg: " in printed.err


def test_what_cannot_be_answered_is_refused_with_the_way_out(exported, pictures, tmp_path):
    result, _ = exported(formats=[])
    picture = str(pictures / "1.JPG")
    (tmp_path / "empty").mkdir()
    pq.write_table(pa.table({"picture": [b""]}), tmp_path / "other.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1")
    for error, words, folder, names, out, engine in (
        (ConfigError, r"no model\.onnx; use --engine torch", result.path, [picture], None, "onnx"),
        (ConfigError, "is not an exported student", str(pictures), [picture], None, "onnx"),
        (ConfigError, "use onnx or torch", result.path, [picture], None, "tensorrt"),
        (ConfigError, r"ends in \.csv", result.path, [picture], f"{tmp_path}/out.txt", "torch"),
        (DataError, "no such file or folder", result.path, [f"{tmp_path}/nothing.png"], None, "torch"),
        (DataError, r"^s3://\*\*\*@b/x: predict reads local files only", result.path, ["s3://k:h@b/x"], None, "torch"),
        (DataError, "no pictures found", result.path, [f"{tmp_path}/empty"], None, "torch"),
        (DataError, "no picture could be read", result.path, [f"{pictures}/cut.jpg"], None, "torch"),
        (DataError, "no column image among", result.path, [f"{tmp_path}/other.parquet"], None, "torch"),
        (DataError, "not a parquet file", result.path, [f"{tmp_path}/cut.parquet"], None, "torch"),
    ):
        with pytest.raises(error, match=words):
            predict_command(folder, names, out, 1, engine, None)
    assert not (tmp_path / "out.txt").exists()


def test_no_output_replaces_what_is_read(exported, pictures, tmp_path):
    result, _ = exported(formats=[])
    (tmp_path / "set").mkdir()
    table = tmp_path / "set" / "x.parquet"
    pq.write_table(pa.table({"image": [(pictures / "1.JPG").read_bytes()]}), table)
    (tmp_path / "link.parquet").symlink_to(table)
    (tmp_path / "hard.parquet").hardlink_to(table)
    about = f"{result.path}/raydistill.json"
    before = table.read_bytes(), Path(about).read_bytes()
    outs = [table, tmp_path / "link.parquet", tmp_path / "hard.parquet", tmp_path / "set/../set/x.parquet", about]
    for read, out in [(table, out) for out in outs] + [(tmp_path / "link.parquet", table)]:
        with pytest.raises(ConfigError, match="which is read; write to another file"):
            predict_command(result.path, [str(read)], str(out), 1, "torch", None)
    (tmp_path / "a.csv").symlink_to(pictures / "1.JPG")
    with pytest.raises(ConfigError, match=r"1\.JPG, which is read"):
        predict_command(result.path, [str(pictures)], str(tmp_path / "a.csv"), 1, "torch", None)
    assert (table.read_bytes(), Path(about).read_bytes()) == before


def test_a_huge_picture_is_not_decoded(exported, tmp_path):
    result, _ = exported(formats=["onnx"])
    Image.new("1", (20000, 20000)).save(tmp_path / "bomb.png")
    painted(0, np.random.default_rng(0)).save(tmp_path / "good.png")
    answers = list(predict_locally(result.path, "onnx", find_units([f"{tmp_path}/bomb.png", f"{tmp_path}/good.png"])))
    assert "pixels" in answers[0].error
    assert answers[1].probabilities_C is not None


def test_large_files_are_not_all_held_at_once(exported, tmp_path):
    result, _ = exported(formats=["onnx"])
    for k in range(20):
        (tmp_path / f"{k}.png").write_bytes(b"junk")
        os.truncate(tmp_path / f"{k}.png", 50 << 20)
    tracemalloc.start()
    answers = list(predict_locally(result.path, "onnx", find_units([str(tmp_path)])))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [answer.error for answer in answers] == ["not an image"] * 20
    assert peak < 300 << 20


def test_class_names_of_any_kind_come_out_as_they_went_in(exported, pictures, tmp_path):
    names = ("10", "2", 'café, a "b"')
    result, checkpoint = exported(formats=["onnx"], classes=names)
    predict_command(result.path, [str(pictures / "1.JPG")], str(tmp_path / "out.csv"), 0, "onnx", None)
    (row,) = csv.DictReader((tmp_path / "out.csv").read_text(encoding="utf-8").splitlines())
    expected = slow_probabilities(checkpoint, (pictures / "1.JPG").read_bytes())
    found = {row[f"class{end}"]: float(row[f"probability{end}"]) for end in ("", "_2", "_3")}
    assert found == pytest.approx(dict(zip(names, expected, strict=True)), abs=1e-5)
    assert sum(found.values()) == pytest.approx(1, abs=1e-5)


def test_a_graph_for_other_images_than_the_folder_says_is_refused(exported, pictures, tmp_path):
    result, _ = exported(formats=["onnx"])
    folder = shutil.copytree(result.path, tmp_path / "changed")
    edited(folder / "raydistill.json", input="pixels")
    with pytest.raises(ConfigError, match=r"model\.onnx: does not take images of .* uint8"):
        predict_command(str(folder), [str(pictures / "1.JPG")], None, 1, "onnx", None)


def test_a_folder_that_lacks_what_is_needed_is_refused(exported, pictures):
    result, _ = exported(formats=["onnx"])
    file = Path(result.path, "raydistill.json")
    whole = json.loads(file.read_text())
    del whole["image"]["max_bytes"]  # which exports of before lack
    places = [(whole, key) for key in whole] + [(whole[s], key) for s in ("image", "preprocessing") for key in whole[s]]
    assert len(places) == 6 + 3 + 4
    for section, key in places:
        kept = section.pop(key)
        file.write_text(json.dumps(whole))
        with pytest.raises(ConfigError, match=f"lacks {key}; export the student again"):
            predict_command(result.path, [str(pictures / "1.JPG")], None, 1, "onnx", None)
        section[key] = kept
    for content in ("[]", '"text"', "{", "{}"):
        file.write_text(content)
        with pytest.raises(ConfigError, match=r"is not an exported student|lacks"):
            predict_command(result.path, [str(pictures / "1.JPG")], None, 1, "onnx", None)


def edited(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def graph_of(file: Path, *nodes: Any, initializers: Sequence[Any] = (), domain: str = "") -> None:
    """A graph from `images` to `logits`, by way of `x`, which the nodes make."""
    add = onnx.helper.make_node("Add", ["pooled", "x"], ["logits"])
    pool = onnx.helper.make_node("ReduceMean", ["images"], ["pooled"], axes=[2, 3], keepdims=0)
    images = onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
    logits = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, None)
    graph = onnx.helper.make_graph([*nodes, pool, add], "g", [images], [logits], list(initializers))
    opsets = [onnx.helper.make_opsetid("", 13), *([onnx.helper.make_opsetid(domain, 1)] if domain else [])]
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), file)


def evil_graph(kind: str, folder: Path) -> None:
    node, make = onnx.helper.make_node, onnx.numpy_helper.from_array
    file = folder / "model.onnx"
    large = make(np.array([200_000, 20_000]), "s")
    if kind == "zeros":
        graph_of(file, node("ConstantOfShape", ["s"], ["x"]), initializers=[large])
    elif kind == "expanded":
        graph_of(
            file, node("Expand", ["one", "s"], ["x"]), initializers=[large, make(np.ones((1, 1), np.float32), "one")]
        )
    elif kind == "an outer product":
        thin = [make(np.ones(shape, np.float32), name) for shape, name in (((50_000, 1), "a"), ((1, 50_000), "b"))]
        graph_of(file, node("MatMul", ["a", "b"], ["x"]), initializers=thin)
    elif kind == "elsewhere":
        (folder.parent / "outside").write_bytes(bytes(12))
        tensor = onnx.TensorProto(name="x", data_type=onnx.TensorProto.FLOAT, dims=[1, 3])
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", "../outside"), ("offset", "0"), ("length", "12")):
            tensor.external_data.add(key=key, value=value)
        graph_of(file, initializers=[tensor])
    elif kind == "another domain":
        graph_of(file, node("Run", ["images"], ["x"], domain="evil"), domain="evil")
    elif kind == "a loop":
        value = onnx.helper.make_tensor_value_info
        again = onnx.helper.make_graph(
            [node("Identity", ["go"], ["on"]), node("Identity", ["in"], ["out"])], "body",
            [value("k", 7, []), value("go", 9, []), value("in", 1, [1, 3])],
            [value("on", 9, []), value("out", 1, [1, 3])],
        )  # fmt: skip
        told = [make(np.array(2**62), "most"), make(np.array(True), "yes"), make(np.zeros((1, 3), np.float32), "zero")]
        graph_of(file, node("Loop", ["most", "yes", "zero"], ["x"], body=again), initializers=told)
    elif kind == "noise":
        file.write_bytes(np.random.default_rng(0).bytes(4096))
    elif kind == "cut off":
        file.write_bytes(file.read_bytes()[:-1000])
    elif kind == "other ends":
        onnx.save(onnx.compose.add_prefix(onnx.load(file), "a/"), file)
    elif kind == "a pipe":
        file.unlink()
        os.mkfifo(file)


GRAPHS = ["zeros", "expanded", "an outer product", "elsewhere", "another domain", "a loop", "noise", "cut off",
          "other ends", "a pipe"]  # fmt: skip
SAYS = {
    "deep": b"[" * 200_000,
    "many digits": b'{"model": ' + b"9" * 5_000 + b"}",
    "not UTF-8": b"\xff\xfe{}",
    "a device": None,
}
CHANGES: dict[str, dict[str, Any]] = {
    "no classes": {"classes": []},
    "numbers for classes": {"classes": [1, 2, 3]},
    "another library": {"library": "pickle"},
    "nothing for bytes": {"image": {"size": 32, "fit": "crop", "max_pixels": 10**6, "max_bytes": None}},
    "a giant picture": {"image": {"size": 10**6, "fit": "crop", "max_pixels": 10**6}},
    "a larger picture than a job may ask for": {"image": {"size": 2049, "fit": "crop", "max_pixels": 10**6}},
    "a side of none": {"preprocessing": {"size": 0, "mean": [0, 0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}},
    "a std of none": {"preprocessing": {"size": 32, "mean": [0, 0, 0], "std": [0, 1, 1], "interpolation": "bilinear"}},
    "two means": {"preprocessing": {"size": 32, "mean": [0, 0], "std": [1, 1, 1], "interpolation": "bilinear"}},
}


def test_folders_of_strangers_are_refused_in_one_sentence(exported, tmp_path):
    result, _ = exported(formats=["onnx"])

    def refused(what: str, engine: str, spoil: Callable[[Path], object]) -> None:
        folder = tmp_path / what / "export"
        shutil.copytree(result.path, folder)
        spoil(folder)
        with pytest.raises((ConfigError, CheckpointError)) as error:
            Predictor(str(folder), engine)
        words = str(error.value)
        assert str(folder) in words, what
        assert "\n" not in words, what
        assert "weights_only" not in words, what
        assert "trust_remote_code" not in words, what
        assert len(words) < 700 + 3 * len(str(folder)), what
        assert error.value.exit_code == 2

    about, config = "raydistill.json", "config.json"
    for kind in GRAPHS:
        refused(kind, "onnx", partial(evil_graph, kind))
    for kind, content in SAYS.items():
        for name in (about, config):

            def spoil(folder: Path, name: str = name, content: bytes | None = content) -> None:
                (folder / name).unlink()
                if content is None:
                    (folder / name).symlink_to("/dev/zero")
                else:
                    (folder / name).write_bytes(content)

            refused(f"{name} {kind}", "torch", spoil)
    for kind, change in CHANGES.items():
        refused(kind, "onnx", lambda folder, change=change: edited(folder / about, **change))
    giants = {"architecture": "vit_giant_patch14_224", "a width": "resnet10t", "a depth": "vit_tiny_patch16_224"}
    args = {"architecture": {}, "a width": {"stem_width": 10**6}, "a depth": {"depth": 10**7}}
    for kind, name in giants.items():
        change = {"architecture": name, "model_args": args[kind]}
        refused(f"giant by {kind}", "torch", lambda folder, change=change: edited(folder / config, **change))
    refused("giant by its classes", "torch", lambda folder: edited(folder / config, num_classes=2**31))
    refused("no architecture", "torch", lambda folder: edited(folder / config, architecture="exec"))
    refused("cut weights", "torch", lambda folder: os.truncate(folder / "model.safetensors", 1000))
    refused("no weights", "torch", lambda folder: (folder / "model.safetensors").unlink())

    def pickled(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        torch.save({"a": Ran(tmp_path / "RAN")}, folder / "pytorch_model.bin")

    def named_elsewhere(folder: Path) -> None:
        (folder / "model.safetensors").rename(folder.parent / "outside.safetensors")
        index = {"weight_map": {"a": "../outside.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))

    refused("a pickle", "torch", pickled)
    refused("weights outside", "torch", named_elsewhere)
    assert not (tmp_path / "RAN").exists()
    for engine in ("onnx", "torch"):
        assert Predictor(result.path, engine).classes


class Ran:
    """Unpickles to a file that is there."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.place,)


@pytest.mark.parametrize(
    "gives",
    [
        np.full((1, 3), np.nan, np.float32), np.full((1, 3), np.inf, np.float32), np.ones((2, 3), np.float32),
        np.ones((1, 4), np.float32), np.ones((1, 3), np.int64), np.array([["a", "b", "c"]]),
    ],
    ids=str,
)  # fmt: skip
def test_a_network_that_gives_no_logits_is_refused(exported, gives):
    result, _ = exported(formats=["onnx"])
    kind = onnx.helper.np_dtype_to_tensor_dtype(gives.dtype) if gives.dtype.kind != "U" else onnx.TensorProto.STRING
    values = [v.encode() for v in gives.flat] if gives.dtype.kind == "U" else gives.flatten()
    constant = onnx.helper.make_tensor("v", kind, gives.shape, values)
    ends = [
        onnx.helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["n", 3, SIZE, SIZE]),
        onnx.helper.make_tensor_value_info("logits", kind, gives.shape),
    ]
    node = onnx.helper.make_node("Constant", [], ["logits"], value=constant)
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    Path(result.path, "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match=result.path):
        Predictor(result.path).probabilities(np.zeros((1, SIZE, SIZE, 3), np.uint8))


@pytest.mark.parametrize("odd", [{"features_only": True}, {"drop_rate": float("nan")}], ids=str)
def test_a_config_whose_network_cannot_answer_is_refused(exported, odd):
    result, _ = exported(formats=[])
    config = json.loads(Path(result.path, "config.json").read_text())
    config["model_args"] = {**config.get("model_args", {}), **odd}
    Path(result.path, "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=result.path):
        Predictor(result.path, "torch").probabilities(np.zeros((1, SIZE, SIZE, 3), np.uint8))
