"""The findings of `check` as a table, as JSON, and as a page with pictures."""

from __future__ import annotations

import io
import json
import os
from collections import Counter
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from markupsafe import Markup
from PIL import Image
from rich.table import Table as RichTable

from raydistill.config import Images, RunConfig
from raydistill.data.chunks import decode_isolated
from raydistill.data.sources.columns import Entry, entry_name
from raydistill.data.sources.listing import list_images
from raydistill.errors import ConfigError
from raydistill.escaping import markdown, quoted
from raydistill.pages.templates import Table, data_uri, file_name, page
from raydistill.secrets import redacted_tree
from raydistill.storage.filesystems import write_bytes
from raydistill.storage.jobs import job_name

if TYPE_CHECKING:
    from raydistill.doctor.images import Checkup

_SIGNS = {"stop": "stops", "loses": "loses", "look": "look", "note": "note"}
_THUMBNAIL = 128


def findings_table(checkup: Checkup) -> RichTable:
    table = RichTable("", "what", "images", "for instance", "what a run does", "how to change that", box=None,
                  pad_edge=False, show_header=True)  # fmt: skip
    for finding in checkup.findings:
        table.add_row(
            _SIGNS[finding.severity], finding.what, f"{finding.count:,}",
            "\n".join(map(_short, finding.examples[:2])), finding.done, finding.change,
        )  # fmt: skip
    if not checkup.findings:
        table.add_row("ok", "nothing to say", "", "", "", "")
    return table


def findings_markdown(checkup: Checkup) -> str:
    """The same table, for notebooks."""
    columns = list(findings_table(checkup).columns)
    columns.append(columns.pop(3))  # the instances, which are long
    rows = zip(*(["<br>".join(map(markdown, str(cell).split("\n"))) for cell in c.cells] for c in columns), strict=True)
    lines = [[str(column.header) for column in columns], ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_checkup(config: RunConfig, checkup: Checkup, path: str) -> None:
    """Write JSON or HTML, by the ending of the path. Raises ConfigError for any other ending."""
    suffix = Path(path).suffix.lower()
    if suffix == ".json":
        tree = redacted_tree({"is_sound": checkup.is_sound, **asdict(checkup)})
        write_bytes(path, json.dumps(tree, indent=2, ensure_ascii=False).encode())
    elif suffix in (".html", ".htm"):
        write_bytes(path, _page(config, checkup))
    else:
        raise ConfigError(f"--out {path}: use a name that ends in .html or .json")


def _page(config: RunConfig, checkup: Checkup) -> bytes:
    is_listed = checkup.counts or checkup.is_interrupted
    named = {name for finding in checkup.findings for example in finding.examples for name in _names(example)}
    every = list_images(config.images).entries if is_listed else ()
    entries = {name: e for e in every if (name := entry_name(e)) in named}
    above = os.path.commonprefix([e.path for e in every]).rpartition("/")[0]  # noqa: RUF071 - to a slash
    findings = [
        (
            finding,
            [
                (_pictures(e, entries, config.images), e.replace(f"{above}/", "") if above else e)
                for e in finding.examples
            ],
        )
        for finding in checkup.findings
    ]
    classes = sorted({name for of_split in checkup.counts.values() for name in of_split})
    rows = [[name or "no label", *(f"{n.get(name, 0):,}" for n in checkup.counts.values())] for name in classes]
    severities = Counter(finding.severity for finding in checkup.findings)
    signs = {"stop": "stopping a run", "loses": "losing images", "look": "to look at", "note": "to know of"}
    return page(
        "check.html",
        name=job_name(config),
        kind="check of the images",
        when=datetime.now(UTC),
        path=quoted(config.images.path),
        checkup=checkup,
        tiles=[
            (f"{sum(sum(of_split.values()) for of_split in checkup.counts.values()):,}", "images that a run would use"),
            (f"{len(set(classes) - {''}):,}", "classes"),
            *((str(n), f"finding{'s' * (n > 1)} {words}") for kind, words in signs.items() if (n := severities[kind])),
        ],
        findings=findings,
        signs=_SIGNS,
        images=Table(["class", *checkup.counts], rows),
    )


def _pictures(example: str, entries: dict[str, Entry], images: Images) -> list[Markup]:
    """Data URIs of the images of an example: one, two similar ones, or none if none decodes."""
    found = []
    for name in _names(example):
        entry = entries.get(name)
        if entry is None:
            continue
        small = images.model_copy(update={"size": _THUMBNAIL, "fit": "pad"})
        for one in decode_isolated([(0, entry.path, entry.row)], small):
            if one["image"]:
                sink = io.BytesIO()
                Image.frombytes("RGB", (_THUMBNAIL, _THUMBNAIL), one["image"]).save(sink, "JPEG", quality=80)
                found.append(data_uri(sink.getvalue(), "jpeg"))
    return found


def _names(example: str) -> list[str]:
    """What may be the names of the entries of an example: one, or several alike, maybe with what they are."""
    names = [name for whole in example.split(" = ") for name in whole.split(" ~ ")]
    return [*names, *(name.rpartition(" is ")[0] for name in names)]


def _short(example: str) -> str:
    """The last folder and the name of each path."""
    parts = [(word, file_name(word)) for word in example.split(" ")]
    return " ".join("$'" + short if word.startswith("$'") and word != short else short for word, short in parts)
