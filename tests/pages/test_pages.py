"""Pages: their tables against other ways to count, their charts and colours, and how a browser shows them."""

from __future__ import annotations

import io
import itertools
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from PIL import Image
from rich.console import Console
from sklearn.metrics import confusion_matrix

from raydistill.doctor.images import check_images
from raydistill.engine.measures import Answers, measures
from raydistill.escaping import for_figure
from raydistill.pages import tables
from raydistill.pages.check import write_checkup
from raydistill.pages.figures import chart, contact_sheet, curves, reliability
from raydistill.pages.report import write_report
from raydistill.pages.study import search_page
from raydistill.pages.templates import Table, page
from raydistill.results import Report
from raydistill.runtime.progress import Progress
from raydistill.search.page import comparison_page
from raydistill.search.verdict import summarise
from tests.search.test_verdict import arm

NAMES = ("a_$x_$", r"$\foo$", "100 % {x}", "<i>&")
BASE = Path(tables.__file__).with_name("base.html").read_text()


def report_of(classes: tuple[str, ...], num_images: int = 300) -> Report:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, len(classes) - 1, num_images)  # the last class has none
    found = {}
    for who in ("student", "teacher"):
        logits = rng.normal(0, 1, (num_images, len(classes))).astype(np.float32)
        logits[np.arange(num_images), labels] += 1.5
        found[who] = measures(Answers.of(logits, labels), labels, classes, 15)
    return Report("", {"test": found["student"]}, {"test": found["teacher"]}, {"test": 0.5}, None, 1, 1, 1.0, 1.0, "")


def test_the_matrix_and_the_classes_are_those_of_the_answers(make_set) -> None:
    classes = ("a", "b", "c", "d")
    rng, samples = np.random.default_rng(0), make_set("set", num_train=20, labelled=12).samples
    labels, logits = rng.integers(0, 3, 200), rng.normal(0, 1, (200, 4)).astype(np.float32)
    report = replace(report_of(classes), student={"test": measures(Answers.of(logits, labels), labels, classes, 15)})
    expected = confusion_matrix(labels, logits.argmax(1), labels=range(4))
    matrix = tables.confusion_matrix(report, "test")
    assert [[count for count, _ in row] for _, row in matrix] == expected.tolist()
    assert [sum(share for _, share in row) for _, row in matrix] == pytest.approx([1, 1, 1, 0])
    shown = tables.by_class(report, replace(samples, classes=classes), "test")
    recall = {name: expected[k, k] / max(expected[k].sum(), 1) for k, name in enumerate(classes)}
    assert [row[0] for row in shown.rows] == [*sorted("abc", key=recall.__getitem__), "d"]
    of = {row[0]: dict(zip(shown.titles, row, strict=True)) for row in shown.rows}
    assert [of[name]["train"] for name in classes] == ["4", "4", "4", "0"]
    assert [int(of[name]["test"]) for name in classes] == expected.sum(axis=1).tolist()
    assert [of[name]["recall"]["share"] for name in "abc"] == pytest.approx([recall[name] for name in "abc"])
    assert of["d"]["recall"]["share"] is None
    np.fill_diagonal(expected, 0)
    assert all(of[name]["most often taken for"].endswith(f"({expected[k].max()})") for k, name in enumerate("abc"))


@pytest.mark.parametrize(("num_classes", "shown"), [(3, False), (10, False), (11, True), (300, True)])
def test_top_5_is_shown_where_five_are_few(num_classes, shown) -> None:
    report = report_of(tuple(f"kind {k}" for k in range(num_classes)))
    measured = tables.measures(report, {"scratch": report}, num_classes)
    assert ("top-5" in measured.titles) == shown
    assert [row[0] for row in measured.rows] == ["student, test", "teacher, test", "scratch, test"]
    assert all(len(row) == len(measured.titles) for row in measured.rows)
    assert bool(tables.confusion_matrix(report, "test")) == (num_classes <= 30)
    assert len(tables.confused(report, "test").rows) <= 15


@pytest.mark.filterwarnings("error:Glyph")
def test_charts_take_their_colours_from_the_page_and_their_legends_cover_nothing() -> None:
    epochs = [{"epoch": float(k), "loss": 1 / k, "kd": 2 / k, "val_accuracy": 1 - 1 / k} for k in range(1, 9)]
    sure, right = np.linspace(0, 1, 100), np.arange(100) % 3 > 0
    drawn = [*curves(epochs, 5), reliability({"student": (sure, right), "teacher": (sure, ~right)}, 15, "test")]
    drawn.append(chart("named", lambda axes: [axes.plot([0, 1], label=for_figure(name)) for name in NAMES]))
    everything = "".join(svg for _, svg in drawn)
    assert not re.search("#[0-9a-fA-F]{6}|<script|<style|<metadata|DejaVu", everything)
    assert "currentColor" in everything
    ids = re.findall(' id="([^"]+)"', everything)
    assert len(ids) == len(set(ids))
    for words, svg in drawn:
        assert f'aria-label="{words}"' in svg
        top = min(float(y) for y in re.findall('<clipPath.*?<rect x="[^"]+" y="([^"]+)"', svg, flags=re.S))
        legend = [float(y) for y in re.findall('<text style="[^"]*: start[^"]*" x="[^"]+" y="([^"]+)"', svg)]
        assert len(legend) >= 2
        assert max(legend) < top
    assert all(name in svg for name in ("a_$x_$", r"$\foo$", "100 % {x}", "&lt;i&gt;&amp;"))


def test_a_name_with_the_signs_of_a_formula_is_drawn_as_it_is() -> None:
    picture = Image.new("RGB", (8, 8))
    for name in NAMES:
        sheet = contact_sheet(name, [picture], [(picture, "near duplicate"), (None, "not finite")])
        assert np.asarray(Image.open(io.BytesIO(sheet)).convert("L")).std() > 0


def luminance(colour: str) -> float:
    """Relative luminance (WCAG 2.2) of `#rrggbb` or `r g b`."""
    parts = [int(colour[k : k + 2], 16) for k in (1, 3, 5)] if "#" in colour else map(int, colour.split())
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (p / 255 for p in parts)]
    return float(np.dot([0.2126, 0.7152, 0.0722], linear))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_charts_stand_out_in_both_schemes(scheme) -> None:
    light, dark = BASE.split("@media (prefers-color-scheme: dark)")[:2]
    colours = dict(re.findall(r"--([\w-]+): ([#\w ]+);", light if scheme == "light" else dark))

    def contrast(one: str, other: str) -> float:
        low, high = sorted(luminance(colours[name]) for name in (one, other))
        return (high + 0.05) / (low + 0.05)

    texts = [*itertools.product(("ink", "dim"), ("paper", "soft")), ("ink", "heat"), ("ink", "warn-soft")]
    assert min(contrast(*pair) for pair in texts) >= 4.5
    series = [f"series-{k}" for k in range(1, 7)]
    assert min(contrast(colour, "paper") for colour in [*series, "warn"]) >= 3
    assert len({colours[name] for name in series}) == 6


@pytest.fixture(scope="module")
def all_pages(finished, tmp_path_factory) -> dict[str, Path]:
    """Each page by its name; `wide` is a report of thirty classes with long names."""
    config, outcome, own = finished
    folder = tmp_path_factory.mktemp("pages")
    shutil.copy(own, folder / "report.html")
    classes = tuple(f"{'very_' * (k % 9)}long_name_{k}" for k in range(30))
    measured = replace(report_of(classes), path=outcome.report.path)
    write_report(config, replace(outcome, report=measured, samples=replace(outcome.samples, classes=classes)), "x")
    own.rename(folder / "wide.html")
    shutil.copy(folder / "report.html", own)
    write_checkup(config, check_images(config, Progress(Console(quiet=True))), str(folder / "check.html"))
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(24):
        trial = study.ask()
        rate, weight = (
            trial.suggest_float("distill.learning_rate", 1e-4, 0.1, log=True),
            trial.suggest_float("kd", 0, 1),
        )
        trial.suggest_categorical("student", ["timm:resnet10t", "timm:vit_tiny"])
        study.tell(trial, 3 * rate + weight)
    best = Table(["trial", "val_accuracy", "took", "settings"], [["3", "0.912", "12 s", "learning_rate=0.001 kd=0.4"]])
    tiles = [("0.912", "val_accuracy of trial 3"), ("24", "trials")]
    searched = search_page(study, ["val_accuracy"], name="a job", verdict="Ship it.", tiles=tiles, best=best)
    (folder / "search.html").write_bytes(searched)
    names = ("scratch", "kd", "crd", "align_uniform+generated")
    arms = [arm(name, seed, 0.5, 0.5, train_seconds=9.0 + k) for k, name in enumerate(names) for seed in range(3)]
    curve = [arm(name, 0, 0.5, 0.5, share) for name in ("scratch", "kd") for share in (0.5, 1.0)]
    (folder / "compare.html").write_bytes(comparison_page(summarise(arms, curve, 3), "a job"))
    (folder / "serve.html").write_bytes(page("serve.html", name="resnet10t, 3 classes", kind="serve"))
    return {file.stem: file for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=shutil.which("chromium"))
        yield started
        started.close()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Debian's chromium")
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1280])
def test_a_browser_shows_every_page(all_pages, browser, width, scheme) -> None:
    from axe_playwright_python.sync_playwright import Axe

    assert set(all_pages) == {"report", "wide", "check", "search", "compare", "serve"}
    for name, file in all_pages.items():
        shown = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        shown.goto(file.as_uri())
        assert shown.evaluate("document.documentElement.scrollWidth") <= width, name
        small = shown.evaluate("[...document.querySelectorAll('img')].filter(i => i.src && !i.naturalWidth).length")
        assert small == 0, name
        found = Axe().run(shown)
        assert found.violations_count == 0, f"{name}\n{found.generate_report()}"
        shown.close()
