"""check: what is wrong with a data set, and what a run would do about it, before anything is written or trained.

It uses the functions of `prepare`: what they refuse or rotate here is refused or rotated there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from posixpath import splitext

import numpy as np
from PIL import Image

from raydistill.config import Images, RunConfig
from raydistill.data.chunks import Inspection, chunks, inspect_chunk
from raydistill.data.decode import NOTES, Facts
from raydistill.data.isolation import Killed, map_isolated, start_processes
from raydistill.data.near_duplicates import near_pairs
from raydistill.data.sources.columns import Entries, Entry, entry_name
from raydistill.data.sources.listing import Listing, list_images
from raydistill.data.splits import Decoded, draw, draw_splits, lacking_classes, without_duplicates
from raydistill.errors import DataError
from raydistill.majority_baseline import few_images
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.progress import Progress
from raydistill.stages.prepare import refuse_too_many_bad

EXAMPLES = 5
_MOST_REASONS = 50
# Formats that Pillow distinguishes but file names do not: phones write MPO into .jpg.
_ALIKE = {"MPO": "JPEG", "DIB": "BMP", "BMP": "DIB"}
# Bits of 256 in which two pictures of the same thing may differ; spread of brightness below which a picture shows
# nothing; pixels above which decoding is slow; ratio of sides above which most of a picture is cropped away; images of
# the largest class for each of the smallest; labels a class below which docs/results.md has no figure.
_NEAR, _CONTRAST, _HUGE, _LONG, _IMBALANCE, _FEW = 4, 3.0, 50e6, 3.0, 10.0, 10


@dataclass(frozen=True)
class Finding:
    """One kind of finding. `stop`: a run would refuse the data; `loses`: it would leave images out; `look`: it would
    continue, but a person should look; `note`: all is well, but not as it may seem."""

    severity: str
    what: str
    count: int
    examples: tuple[str, ...]
    done: str  # what a run does about it
    change: str  # how to change that


def _found(names: Sequence[str], severity: str, what: str, done: str, change: str) -> list[Finding]:
    """The finding that this many are of a kind; none for zero."""
    return [Finding(severity, what, len(names), tuple(names[:EXAMPLES]), done, change)] if names else []


@dataclass(frozen=True)
class Checkup:
    findings: list[Finding]
    counts: dict[str, dict[str, int]]  # split -> class, or "" for none -> images that a run would use
    is_interrupted: bool = False

    @property
    def is_sound(self) -> bool:
        return all(finding.severity != "stop" for finding in self.findings)

    def _repr_markdown_(self) -> str:
        from raydistill.pages.check import findings_markdown

        return findings_markdown(self)


@dataclass(frozen=True, slots=True)
class Look:
    """The result of inspecting one image: the number of its entry, and the id of its file or the `reason` why it cannot
    be used. `facts` and `hash` are those of images that decode."""

    number: int
    id: str
    reason: str
    facts: Facts | None
    hash: bytes
    contrast: float


def check_images(config: RunConfig, progress: Progress, strict: bool = False) -> Checkup:
    """Inspect every image. `strict`: stop at the first that cannot be used. An interruption also stops it: the checkup
    then covers the images until then, and says so."""
    start_processes(inspect_chunk, num_cores())
    try:
        listing = list_images(config.images)
    except DataError as error:
        return Checkup([Finding("stop", str(error), 1, (), "a run refuses to start", "as the message says")], {})
    looks, is_interrupted = [], False
    try:
        with (
            progress.task("check", len(listing.entries), "images") as advance,
            closing(look_at(listing.entries, config.images)) as every,
        ):
            for look in every:
                looks.append(look)
                advance(1)
                if strict and look.reason:
                    break
    except KeyboardInterrupt:
        is_interrupted = True
    findings, counts = _judge(config, listing, looks, strict)
    if is_interrupted:
        total = len(listing.entries)
        seen = Finding("stop", "interrupted: the other images were not checked", total - len(looks), (),
                       f"{len(looks):,} of {total:,} images were checked", "run the command again")  # fmt: skip
        return Checkup([seen, *findings], counts, is_interrupted)
    return Checkup(findings, counts)


def look_at(entries: Entries, images: Images) -> Generator[Look]:
    """In the entries' order, as many at once as there are cores; the memory does not grow with their number."""
    with closing(map_isolated(partial(inspect_chunk, images=images), chunks(entries, images), num_cores())) as every:
        for chunk, found in every:
            for (index, _, _), seen in zip(chunk, found, strict=True):
                told = Inspection(seen) if isinstance(seen, Killed) else seen
                yield Look(index, told.id, told.reason, told.facts, told.hash, told.contrast)


def _judge(
    config: RunConfig, listing: Listing, looks: list[Look], strict: bool
) -> tuple[list[Finding], dict[str, dict[str, int]]]:
    images, entries = config.images, listing.entries[: len(looks)]
    ids_N = np.frombuffer(bytes.fromhex("".join(look.id or "0" * 32 for look in looks)), "S16")
    known = Decoded(entries, ids_N, {look.number: look.reason for look in looks if look.reason})
    findings = list(_unusable(images, known, len(listing.entries), strict))
    if strict and known.reasons:
        return findings, {}
    findings += _copies(known)
    if len(looks) < len(listing.entries):  # others may have them
        return [*findings, *_of_pixels(config, entries, [look for look in looks if look.facts])], {}
    kept_S, _ = without_duplicates(known)
    splits = draw_splits(config, known, kept_S)
    findings += _of_classes(entries, splits)
    try:
        splits = draw(config, known, kept_S).splits
    except DataError as error:
        findings.append(Finding("stop", str(error), 1, (), "a run refuses to start", "as the message says"))
    split_of = {number: split for split, members_S in splits.items() for number in members_S.tolist()}
    used = [look for look in looks if look.number in split_of]  # of copies only one is used
    findings += _near_copies(entries, used, split_of)
    findings += _of_pixels(config, entries, used)
    rename = "rename or move them, if they are pictures to learn from"
    findings += [Finding("note", what, count, (), "ignored", rename) for what, count in listing.ignored.items()]
    meant = "write them as you mean them"
    findings += [Finding("look", what, count, (), "as it says", meant) for what, count in listing.notes.items()]
    counts = {s: _by_class(entries[members_S]) for s, members_S in splits.items() if len(members_S)}
    order = ("stop", "loses", "look", "note")
    return sorted(findings, key=lambda f: order.index(f.severity)), counts


def _by_class(entries: Entries) -> dict[str, int]:
    """Images of each class that has some, and of "" those without a label."""
    blank = len(entries) - int(entries.is_labelled.sum())
    return {**entries.label_counts(), **({"": blank} if blank else {})}


def _unusable(images: Images, known: Decoded, total: int, strict: bool) -> Iterator[Finding]:
    by_reason: dict[str, list[str]] = defaultdict(list)
    for number, reason in known.reasons.items():
        kind = reason.partition(":")[0]  # it may state sizes, so that each picture has its own reason
        if kind not in by_reason and len(by_reason) >= _MOST_REASONS:
            kind = "cannot be used, for other reasons"
        by_reason[kind].append(f"{entry_name(known.entries[number])}: {reason}")
    severity = "stop" if strict else "loses"
    done = "the look ended here" if strict else "left out, and listed in refused.json"
    for reason, names in by_reason.items():
        yield from _found(names, severity, reason, done, "repair or remove the files")
    try:
        refuse_too_many_bad(images, known.entries, known.reasons, len(known.entries), total)
    except DataError as error:
        yield Finding("stop", str(error).partition(":")[0], len(known.reasons), (), "a run refuses to start",
                      "repair them, or raise images.max_bad_share")  # fmt: skip


def _copies(known: Decoded) -> Iterator[Finding]:
    two_labels, across, pool, within = (list[list[Entry]]() for _ in range(4))
    for group in (list(known.entries[np.sort(numbers)]) for numbers in known.copies()):
        if len({entry.label for entry in group if entry.label}) > 1:
            two_labels.append(group)
        elif len({"train" if entry.split is None else entry.split for entry in group}) > 1:
            across.append(group)
        elif len({entry.label for entry in group}) > 1:
            pool.append(group)
        else:
            within.append(group)
    kinds = [
        (two_labels, "one file under several labels", "left out under each of them",
         "keep it under the label that is right"),
        (pool, "one file with its label and without", "the one with the label stays", "nothing is needed"),
        (across, "one file in several splits", "the test split keeps it, then val", "keep it in one split"),
        (within, "copies of one file", "one of them stays", "nothing is needed"),
    ]  # fmt: skip
    for found, what, done, change in kinds:
        if found:
            examples = tuple(" = ".join(map(entry_name, group[:3])) for group in found[:EXAMPLES])
            lost = sum(len(group) - (found is not two_labels) for group in found)
            yield Finding("loses", what, lost, examples, done, change)


def _near_copies(entries: Entries, used: list[Look], split_of: dict[int, str]) -> Iterator[Finding]:
    """For pictures that a run would use, without equal files."""
    if not used:
        return
    rows: dict[bytes, list[Look]] = defaultdict(list)
    for look in used:
        rows[look.hash].append(look)
    hashes = list(rows)
    alike = [(rank, group[0], other) for group in rows.values() for rank, other in enumerate(group[1:])]
    # One of each group first, because the first are the examples.
    pairs = [(one, other) for _, one, other in sorted(alike, key=itemgetter(0))]
    pairs += [(rows[hashes[a]][0], rows[hashes[b]][0]) for a, b in near_pairs(hashes, _NEAR)]
    across, within, labels = [], [], []
    for one, other in pairs:
        first, second = entries[one.number], entries[other.number]
        words = f"{entry_name(first)} ~ {entry_name(second)}"
        if first.label and second.label and first.label != second.label:
            labels.append(words)
        elif split_of[one.number] != split_of[other.number]:
            across.append(words)
        else:
            within.append(words)
    flatters, apart = "both stay, so val and test flatter the student", "keep what belongs together in one split"
    yield from _found(across, "look", "all but the same picture in two splits", flatters, apart)
    yield from _found(
        labels, "look", "all but the same picture under two labels", "both stay", "correct the wrong label"
    )
    yield from _found(within, "note", "all but the same picture in one split", "both stay", "remove one of the two")


def _of_classes(entries: Entries, splits: dict[str, np.ndarray]) -> Iterator[Finding]:
    train, classes = entries[splits["train"]].label_counts(), entries.labels
    lacking = [name for name in classes if not train[name]]
    yield from _found(lacking, "stop", "classes without a usable train image", "a run refuses to start",
                      "add images, or take the class out of the data")  # fmt: skip
    few = [name for name in classes if 0 < train[name] < _FEW]
    yield from _found(few, "look", f"classes with fewer than {_FEW} labelled train images", "they are used as they are",
                      f"label more: {_FEW} a class are the fewest that docs/results.md has a figure for")  # fmt: skip
    for what, names in lacking_classes(entries, splits).items():
        yield from _found(names, "look", what, "they are used as they are",
                          "add images, or name the splits in the data")  # fmt: skip
    if too_few := few_images({split: len(members) for split, members in splits.items()}):
        yield Finding("look", too_few[0], len(splits["val"]) + len(splits["test"]), (), *too_few[1:])
    for split in ("val", "test"):
        if not len(splits[split]):
            yield Finding("look", f"no {split} images", 1, (), f"nothing is measured on {split}",
                          f"add some, or raise images.{split}_share")  # fmt: skip
    most = max(classes, key=train.__getitem__)
    least = min((name for name in classes if train[name]), key=train.__getitem__, default=most)
    if train[least] and train[most] / train[least] > _IMBALANCE:
        yield Finding("look", f"{most!r} has {train[most] / train[least]:.0f} times the train images of {least!r}",
                      train[least], (), "all are used as they are",
                      "teacher.class_balanced=true, loss.class_weights=balanced, generate.balance=true, or more "
                      "images of it")  # fmt: skip


def _of_pixels(config: RunConfig, entries: Entries, used: list[Look]) -> Iterator[Finding]:
    size, fit = config.images.size, config.images.fit
    by_note: dict[str, list[str]] = defaultdict(list)
    other_form, blank, small, huge, long = [], [], [], [], []
    form_of = Image.registered_extensions()
    for look in used:
        facts, entry = look.facts, entries[look.number]
        name = entry_name(entry)
        assert facts is not None
        for note in facts.notes:
            by_note[note].append(name)
        expected = form_of.get(splitext(entry.path)[1].lower())
        if entry.row is None and expected not in (None, facts.form, _ALIKE.get(facts.form)):
            other_form.append(f"{name} is {facts.form}")
        if look.contrast < _CONTRAST:
            blank.append(name)
        short, side = sorted((facts.width, facts.height))
        if short < size if fit == "crop" else side < size:
            small.append(f"{name} is {facts.width}x{facts.height}")
        if facts.width * facts.height > _HUGE:
            huge.append(f"{name} is {facts.width}x{facts.height}")
        if side > _LONG * short:
            long.append(f"{name} is {facts.width}x{facts.height}")
    shape = "all but the central square is cut away" if fit == "crop" else "most of the square is white"
    other_fit = "images.fit=pad keeps the whole picture" if fit == "crop" else "cut out what matters beforehand"
    kinds = [
        (blank, "look", "pictures that show next to nothing", "they are used", "look at them, and take them out"),
        (long, "look", f"more than {_LONG:g} times as long as wide", shape, other_fit),
        (huge, "note", f"more than {_HUGE / 1e6:.0f} million pixels", "read, slowly", "store them smaller"),
        (small, "note", f"smaller than images.size={size}", "enlarged", "lower images.size, if most are"),
        (other_form, "note", "content of another format than the name says", "the content decides", "rename them"),
        *((by_note[note], "note", note, "as it says", "nothing is needed") for note in NOTES),
    ]  # fmt: skip
    for kind in kinds:
        yield from _found(*kind)
