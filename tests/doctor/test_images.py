"""The dataset doctor against folders with known faults, and against what `prepare` then does."""

from __future__ import annotations

import io
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from raydistill.cli.commands import app
from raydistill.config import load_config
from raydistill.data.isolation import end_processes
from raydistill.data.sources.listing import list_images
from raydistill.doctor import images as checks
from raydistill.doctor import teachers as check_teacher
from raydistill.doctor.images import Checkup, Finding, check_images
from raydistill.doctor.teachers import check_teachers
from raydistill.errors import ConfigError
from raydistill.pages.check import findings_table, write_checkup
from tests.processes import python
from tests.small_run import painted

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def check(tmp_path, progress) -> Callable[..., Checkup]:
    def run(*words: str, strict: bool = False) -> Checkup:
        config = load_config([f"images.path={tmp_path / 'set'}", "images.size=32", *words])
        return check_images(config, progress, strict)

    return run


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three classes of twenty distinct pictures."""
    root, rng = tmp_path / "set", np.random.default_rng(5)
    for label, name in enumerate(("cat", "dog", "owl")):
        (root / name).mkdir(parents=True)
        for k in range(20):
            noise(rng, label).save(root / name / f"{k:02d}.png")
    return root


def noise(rng: np.random.Generator, label: int = 0, size: int = 48) -> Image.Image:
    """A coarse pattern, so that no two have hashes that are close."""
    coarse = painted(label, rng, 8)
    return coarse.resize((size, size), Image.Resampling.BICUBIC)


def found(checkup: Checkup) -> dict[str, Finding]:
    return {finding.what: finding for finding in checkup.findings}


def test_a_good_set_has_nothing_to_say(check, folder):
    checkup = check()
    (few,) = checkup.findings  # of which the run tells too
    assert few.what == "too few images to measure by (val 6 and test 6)"
    assert few.change == "label more images, or raise images.val_share and images.test_share"
    assert checkup.is_sound
    assert sum(sum(counts.values()) for counts in checkup.counts.values()) == 60
    assert checkup.counts["val"] == {"cat": 2, "dog": 2, "owl": 2}


def test_bad_files_are_named_and_their_neighbours_kept(check, folder):
    whole = (folder / "cat" / "00.png").read_bytes()
    noise(np.random.default_rng(9)).save(jpeg := io.BytesIO(), "JPEG")
    Image.new("1", (20000, 20000)).save(folder / "cat" / "bomb.png")
    noise(np.random.default_rng(10)).save(folder / "cat" / "really_webp.jpg", "WEBP")
    (folder / ".ipynb_checkpoints").mkdir()
    files = {
        "cat/cut.jpg": jpeg.getvalue()[: len(jpeg.getvalue()) // 2], "cat/zero.png": b"", "cat/page.jpg": b"<html>",
        "dog/copy.png": (folder / "dog" / "01.png").read_bytes(), "owl/a_cat.png": whole, "cat/.DS_Store": b"junk",
        "cat/._01.jpg": b"\0" * 80, ".ipynb_checkpoints/a.png": whole, "cat/notes.txt": b"x",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "dog" / "02.png").rename(folder / "dog" / "02.PNG")
    checkup = check("images.max_bad_share=0.1")
    things = found(checkup)
    for what, name in (("cannot be decoded", "cut"), ("empty file", "zero.png"), ("not an image", "page.jpg")):
        assert things[what].count == 1
        assert name in things[what].examples[0]
    (bomb,) = (f for what, f in things.items() if "pixels" in what and "bomb.png" in f.examples[0])
    assert bomb.severity == "loses"
    form = things["content of another format than the name says"]
    assert (form.count, form.severity) == (1, "note")
    assert "really_webp.jpg is WEBP" in form.examples[0]
    counts = {"copies of one file": 1, "one file under several labels": 2, "hidden and system files": 3,
              "files ending in .txt": 1}  # fmt: skip
    assert {what: things[what].count for what in counts} == counts
    assert checkup.is_sound
    total = {name: sum(counts.get(name, 0) for counts in checkup.counts.values()) for name in ("cat", "dog", "owl")}
    assert total == {"cat": 20, "dog": 20, "owl": 20}  # less the one under two labels, and with the WebP


def test_too_many_bad_files_stop_and_strict_stops_at_the_first(check, folder):
    for k in range(5):
        (folder / "cat" / f"bad{k}.png").write_bytes(b"no")
    stops = [f for f in check().findings if f.severity == "stop"]
    assert [f.count for f in stops] == [5]
    assert "max_bad_share" in stops[0].change
    strict = check("images.max_bad_share=1", strict=True)
    assert not strict.is_sound
    assert [f.count for f in strict.findings] == [1]
    assert check("images.max_bad_share=1").is_sound


def test_pixels_that_are_not_as_they_seem(check, folder):
    rng = np.random.default_rng(11)
    exif = Image.Exif()
    exif[0x0112] = 6
    noise(rng).save(folder / "cat" / "turned.jpg", exif=exif)
    noise(rng).convert("CMYK").save(folder / "cat" / "cmyk.jpg")
    noise(rng).convert("L").save(folder / "cat" / "grey.png")
    clear = noise(rng).convert("RGBA")
    clear.putalpha(Image.fromarray(np.tile(np.arange(48, dtype=np.uint8) * 5, (48, 1))))
    clear.save(folder / "cat" / "clear.png")
    deep = np.asarray(noise(rng).convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "cat" / "deep.png")
    frames = [noise(rng) for _ in range(3)]
    frames[0].save(folder / "cat" / "moving.gif", save_all=True, append_images=frames[1:])
    Image.new("RGB", (64, 64), (9, 9, 9)).save(folder / "dog" / "blank.png")
    noise(rng).resize((200, 40)).save(folder / "dog" / "long.png")
    noise(rng).resize((20, 20)).save(folder / "dog" / "tiny.png")
    things = found(check())
    expected = {
        "turned upright by its EXIF orientation": "turned.jpg",
        "CMYK, turned into RGB": "cmyk.jpg",
        "transparent, laid on white": "clear.png",
        "16 bits a channel, of which the upper 8 are read": "deep.png",
        "animated, its first frame is read": "moving.gif",
        "pictures that show next to nothing": "blank.png",
        "more than 3 times as long as wide": "long.png is 200x40",
        "smaller than images.size=32": "tiny.png is 20x20",
    }
    for what, example in expected.items():
        assert things[what].count == 1, what
        assert example in things[what].examples[0]
    assert things["grey, read as RGB"].count == 2
    assert "images.fit=pad" in things["more than 3 times as long as wide"].change


def test_leaks_and_near_copies(check, folder, tmp_path):
    whole, root = folder.rename(tmp_path / "whole"), folder
    for file in sorted(whole.rglob("*.png")):
        new = root / ("test" if int(file.stem) >= 15 else "train") / file.parent.name / file.name
        new.parent.mkdir(parents=True, exist_ok=True)
        file.rename(new)
    (root / "train" / "cat" / "leak.png").write_bytes((root / "test" / "cat" / "19.png").read_bytes())
    (root / "train" / "unlabelled").mkdir()
    (root / "train" / "unlabelled" / "x.png").write_bytes((root / "train" / "cat" / "00.png").read_bytes())
    Image.open(root / "test" / "dog" / "19.png").save(root / "train" / "dog" / "again.bmp")
    Image.open(root / "train" / "owl" / "03.png").save(root / "train" / "cat" / "owl.bmp")
    things = found(check())
    for what in ("one file in several splits", "one file with its label and without"):
        assert things[what].count == 1
    assert things["all but the same picture in two splits"].count == 1
    assert "again.bmp" in things["all but the same picture in two splits"].examples[0]
    assert things["all but the same picture under two labels"].count == 1


def test_what_cannot_be_read_as_a_data_set_stops(check, tmp_path):
    (tmp_path / "set" / "only").mkdir(parents=True)
    noise(np.random.default_rng(0)).save(tmp_path / "set" / "only" / "a.png")
    checkup = check()
    assert not checkup.is_sound
    assert "only the class 'only'" in checkup.findings[0].what


def test_classes_that_are_few_or_missing(check, folder):
    for file in sorted((folder / "owl").iterdir())[1:]:
        file.unlink()
    things = found(check())
    assert things["classes with a single train image"].examples == ("owl",)
    assert things["classes without a val image"].examples == ("owl",)
    (big,) = (f for what, f in things.items() if "times the train images of 'owl'" in what)
    assert big.severity == "look"


def test_the_command_writes_nothing_else_and_its_exit_code_tells(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["check", f"images.path={folder}", "images.size=32"]
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    good = CliRunner().invoke(app, words)
    assert good.exit_code == 0
    assert "and use 60 images" in good.output
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before
    for k in range(9):
        (folder / "cat" / f"<i>{k}.png").write_bytes(b"no")
    bad = CliRunner().invoke(app, [*words, "--out", "found.json"])
    assert bad.exit_code == 2
    tree = json.loads(Path("found.json").read_text())
    assert tree["is_sound"] is False
    assert {f["what"]: f["count"] for f in tree["findings"]}["not an image"] == 9


def test_the_page_shows_pictures_and_takes_names_as_text(check, folder, tmp_path):
    (folder / "dog" / "<i>copy.png").write_bytes((folder / "dog" / "01.png").read_bytes())
    config = load_config([f"images.path={folder}", "images.size=32"])
    write_checkup(config, check(), str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert "<i>" not in page
    assert "&lt;i&gt;copy.png" in page
    assert len(re.findall('src="data:image/jpeg;base64,', page)) == 2
    assert not re.search(r"""(src|href)=["'](?!data:)""", page)
    assert str(folder) not in page.split("</header>")[1].replace(f'<p class="dim">{folder}</p>', "")
    with pytest.raises(ConfigError, match=r"\.html or \.json"):
        write_checkup(config, check(), str(tmp_path / "page.pdf"))
    sink = io.StringIO()
    Console(file=sink, width=160).print(findings_table(check()))
    assert "copies of one file" in sink.getvalue()


@pytest.mark.cluster
def test_prepare_uses_what_check_says_it_would(check, folder, ray_session, progress, tmp_path):
    from raydistill.run import run_stages

    (folder / "dog" / "copy.png").write_bytes((folder / "dog" / "01.png").read_bytes())
    (folder / "owl" / "a_cat.png").write_bytes((folder / "cat" / "00.png").read_bytes())
    (folder / "cat" / "zero.png").write_bytes(b"")
    checkup = check()
    config = load_config([f"images.path={folder}", "images.size=32", f"workspace={tmp_path / 'w'}"])
    samples = run_stages(config.model_copy(update={"tracking": config.tracking.model_copy(update={"enabled": False})}),
                         progress, "prepare").samples  # fmt: skip
    assert {s: sum(counts.values()) for s, counts in checkup.counts.items()} == {
        split: samples.num_rows(split) for split in samples.shards if samples.num_rows(split)
    }
    lost = {"empty file": 1, "copies of one file": 1, "one file under several labels": 2}
    assert {f.what: f.count for f in checkup.findings if f.severity == "loses"} == lost
    assert samples.num_refused == sum(lost.values())
    assert len(list_images(config.images).entries) == 63


def test_teachers_beside_each_other(folder, teacher_weights, progress, tmp_path):
    config = load_config([f"images.path={folder}", "images.size=32", "student.model=timm:test_resnet"])
    names = [f"timm:test_resnet={teacher_weights}"]
    (look,) = check_teachers(config, names, progress)
    assert look.trouble == ""
    assert look.num_scored == 15
    assert look.accuracy is not None
    assert look.accuracy > 0.5  # colours are easy
    assert look.forecast_seconds == pytest.approx(60 * 8 / look.images_per_second)
    own = ["teacher.head=native", "teacher.model=timm:test_resnet", f"teacher.weights={teacher_weights}"]
    native = load_config([f"images.path={folder}", "images.size=32", "student.model=timm:test_resnet", *own])
    (other,) = check_teachers(native, [], progress)
    assert other.accuracy is None
    assert "no head with class names" in other.trouble
    with pytest.raises(ConfigError, match="has no teacher"):
        check_teachers(native.model_copy(update={"teacher": None}), [], progress)


def test_a_committee_is_looked_at_member_by_member_and_together(folder, teacher_weights, progress):
    models = "teacher.model=[timm:test_resnet, timm:test_resnet]"
    own = [models, f"teacher.weights=[{teacher_weights}, {teacher_weights}]", "teacher.size=[32, 48]"]
    config = load_config([f"images.path={folder}", "images.size=32", "student.model=timm:test_resnet", *own])
    looks = check_teachers(config, [], progress)
    (both,) = [look for look in looks if look.model == "all as a committee"]
    alone = [look for look in looks if look is not both]
    assert [look.model for look in alone] == ["timm:test_resnet"] * 2
    assert both.num_features == sum(look.num_features for look in alone)
    assert both.forecast_seconds == pytest.approx(sum(look.forecast_seconds for look in alone))
    assert both.accuracy > 0.5
    assert both.num_scored == 15


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f + torch.rand_like(f), "the second time"),
        (lambda f: f + len(f), "alone than in a batch"),
        (lambda f: f * torch.where(torch.arange(len(f))[:, None] == 0, torch.nan, 1.0), "no finite features"),
    ],
)
def test_a_teacher_of_chance_or_without_numbers_is_found_out(
    monkeypatch, folder, teacher_weights, progress, change, words
):
    load = check_teacher.load_teacher
    config = load_config([f"images.path={folder}", "images.size=32", "student.model=timm:test_resnet"])

    def loaded(settings):
        backbone, head, outputs = load(settings)
        forward = backbone.network.forward
        backbone.network.forward = lambda images: change(forward(images))
        return backbone, head, outputs

    monkeypatch.setattr(check_teacher, "load_teacher", loaded)
    (look,) = check_teachers(config, [f"timm:test_resnet={teacher_weights}"], progress)
    assert words in look.trouble
    assert look.accuracy is None


@pytest.fixture
def deadly(tmp_path) -> Path:
    """To be put on PYTHONPATH: a decoder with a fault, which a picture of `segfault` inside sets off; one of `killed`
    is killed the first time."""
    (tmp_path / "fault").mkdir()
    (tmp_path / "fault" / "sitecustomize.py").write_text(f"""if True:
        import os, signal
        from pathlib import Path
        from PIL import Image
        open_soundly, once = Image.open, Path({str(tmp_path / "once")!r})
        def open_or_die(file, **options):
            if b"segfault" in file.getvalue():
                os.kill(os.getpid(), signal.SIGSEGV)
            if b"killed" in file.getvalue() and not once.exists():
                once.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return open_soundly(file, **options)
        Image.open = open_or_die
    """)
    return tmp_path / "fault"


@pytest.fixture
def two_bad(folder, deadly, monkeypatch) -> Iterator[Path]:
    """One picture that kills whatever decodes it, and one whose process somebody else kills."""
    (folder / "dog" / "03.png").write_bytes((folder / "dog" / "03.png").read_bytes() + b"segfault")
    (folder / "cat" / "05.png").write_bytes((folder / "cat" / "05.png").read_bytes() + b"killed")
    monkeypatch.setenv("PYTHONPATH", str(deadly), prepend=os.pathsep)
    end_processes()
    yield folder
    end_processes()


def test_an_image_that_kills_its_process_is_refused_by_name(check, two_bad, tmp_path):
    checkup = check()
    (finding,) = [finding for finding in checkup.findings if "kills" in finding.what]
    assert finding.count == 1
    assert "03.png: kills the process that decodes it, twice, by SIGSEGV" in finding.examples[0]
    assert sum(sum(of.values()) for of in checkup.counts.values()) == 59
    write_checkup(load_config([f"images.path={two_bad}"]), checkup, str(tmp_path / "page.html"))


@pytest.mark.slow
def test_a_run_refuses_what_kills_its_workers(two_bad, tmp_path):
    words = [f"images.path={two_bad}", "images.size=32", f"workspace={tmp_path / 'runs'}"]
    done = python("-m", "raydistill", "prepare", *words)
    assert done.returncode == 0, done.stdout + done.stderr
    (refused,) = (tmp_path / "runs").glob("prepare-*/refused.json")
    (row,) = json.loads(refused.read_text())
    assert row["path"].endswith("dog/03.png")
    assert row["reason"] == "kills the process that decodes it, twice, by SIGSEGV"


def test_examples_of_near_copies_are_of_different_pictures(check, folder):
    for name in ("cat", "dog"):
        for k in range(8):
            with Image.open(folder / name / "00.png") as picture:
                picture.save(folder / name / f"again{k}.png", compress_level=k)
    near = [f for f in check("images.val_share=0", "images.test_share=0").findings if "one split" in f.what]
    assert near[0].count > 10
    assert {f"{name}/00.png" in " ".join(near[0].examples) for name in ("cat", "dog")} == {True}


def test_an_interrupted_look_keeps_what_was_seen(check, folder, tmp_path, monkeypatch):
    (folder / "cat" / "00.png").write_bytes(b"<html>")
    whole = checks.look_at

    def ends(*arguments):
        for number, look in enumerate(whole(*arguments)):
            if number == 30:
                raise KeyboardInterrupt
            yield look

    monkeypatch.setattr(checks, "look_at", ends)
    checkup = check("images.max_bad_share=0.1")
    assert checkup.is_interrupted
    assert not checkup.is_sound
    assert found(checkup)["interrupted: the other images were not checked"].count == 30
    assert "00.png" in found(checkup)["not an image"].examples[0]
    assert not [what for what in found(checkup) if "class" in what], "dogs are not looked at, and do not lack"


def test_words_of_strangers_make_few_findings(check, tmp_path):
    noise(np.random.default_rng(0)).save(tmp_path / "a.png")
    noise(np.random.default_rng(1)).save(tmp_path / "b.png")
    rows = [f"{'ab'[k % 2]}.png,{'ab'[k % 2]}{chr(0x200B) * (k // 2)}" for k in range(400)]
    (tmp_path / "s.csv").write_text("\n".join(["path,label", *rows]), "utf-8")
    findings = check(f"images.path={tmp_path / 's.csv'}").findings
    assert len(findings) < 70
    alike = [f for f in findings if "looks the same" in f.what]
    (others,) = (f for f in findings if "further kinds" in f.what)
    assert sum(f.count for f in alike) + others.count == 398
    assert max(len(f.what) for f in findings) < 400


def test_reasons_that_tell_sizes_make_few_findings(check, folder):
    for k in range(80):
        (folder / "cat" / f"big{k}.ppm").write_bytes(f"P6 {20_000 + k} 20000 255\n".encode())
    lost = [f for f in check().findings if f.severity == "loses"]
    assert len(lost) <= 51
    assert sum(f.count for f in lost) == 80
