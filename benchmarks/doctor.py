"""Images a second of `check` over those of a bare loop that reads and decodes them, on this machine, in one run.

    python benchmarks/doctor.py --json

The bare loop has as many threads, and does what any look at images must do: read the file, decode it, bring it to the
working size. Prints a table and, with --json, writes `doctor_ratio` and `doctor_memory_ratio`: the peak memory for all
files over that for a tenth of them. Each file is a JPEG of its own; 100,000 take 1 GB of disk and some minutes.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from raydistill.config import load_config
from raydistill.data.decode import decode
from raydistill.doctor.images import check_images
from raydistill.runtime.cgroups import num_cores
from raydistill.runtime.progress import Progress

STDOUT = 1  # its file descriptor
CLASSES, DISTINCT, SIDE, SIZE = ("ant", "bee", "cow", "dog"), 500, 256, 128


def save_images(folder: Path, count: int) -> None:
    """Some hundred pictures, each many times with other bytes behind its end, which no decoder reads."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(DISTINCT):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 12, 3), np.uint8)).resize((SIDE, SIDE), 3)
        sink = io.BytesIO()
        coarse.save(sink, "JPEG", quality=85)
        pictures.append(sink.getvalue())
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
    for k in range(count):
        (folder / CLASSES[k % len(CLASSES)] / f"{k:06d}.jpg").write_bytes(pictures[k % DISTINCT] + str(k).encode())


def bare(folder: Path) -> float:
    paths = sorted(folder.rglob("*.jpg"))
    started, todo = time.perf_counter(), iter(paths)
    with ThreadPoolExecutor(num_cores()) as pool:
        while part := list(islice(todo, 4 * num_cores())):
            list(pool.map(lambda path: decode(path.read_bytes(), SIZE, "crop", 10**8), part))
    return len(paths) / (time.perf_counter() - started)


def checked(folder: Path) -> float:
    """The whole of `check`: the listing, the looks, and what follows from them."""
    config = load_config([f"images.path={folder}", f"images.size={SIZE}"])
    started = time.perf_counter()
    check_images(config, Progress(Console(quiet=True)))
    return len(list(folder.rglob("*.jpg"))) / (time.perf_counter() - started)


def peak_megabytes(folder: Path) -> float:
    """Of a process that checks the folder and does nothing else, and of the processes that it starts."""
    words = [sys.executable, __file__, "--only-check", str(folder)]
    return float(subprocess.run(words, stdout=subprocess.PIPE, check=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", nargs="?", const=STDOUT, metavar="FILE", help="write the figures; without FILE, to stdout"
    )
    parser.add_argument("--files", type=int, default=100_000)
    parser.add_argument("--only-check", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only_check is not None:
        checked(options.only_check)
        own, largest = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        print((own + num_cores() * largest) / 1024)
        return
    with tempfile.TemporaryDirectory() as scratch:
        few, many = Path(scratch, "few"), Path(scratch, "many")
        save_images(few, options.files // 10)
        save_images(many, options.files)
        before = bare(many)
        ours = checked(many)
        after = bare(many)
        small, large = peak_megabytes(few), peak_megabytes(many)
    ratio = ours / np.mean([before, after])
    table = Table("", "images/s", "ratio", title=f"{options.files:,} files, {os.cpu_count()} cores")
    table.add_row("check, whole", f"{ours:,.0f}", "")
    table.add_row("bare loop, before and after", f"{before:,.0f} and {after:,.0f}", f"{ratio:.2f}")
    table.add_row("peak memory of check, MB: all and a tenth", f"{large:,.0f} and {small:,.0f}", f"{large / small:.2f}")
    Console(stderr=options.json == STDOUT).print(table)
    if options.json:
        with open(options.json, "w") as sink:
            json.dump({"doctor_ratio": ratio, "doctor_memory_ratio": large / small}, sink, indent=2)


if __name__ == "__main__":
    main()
