"""Runs the notebooks of docs/notebooks, and keeps of their outputs what is small and true on any machine.

python -m tests.notebooks        # executes them, some minutes each, and writes them with their outputs
"""

from __future__ import annotations

import base64
import io
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"
NAMES = ("folder_to_student", "improve_a_student")


def read(name: str) -> Any:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def execute(notebook: Any, folder: Path) -> None:
    """Fills in the outputs. Raises CellExecutionError where a cell does."""
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1800, record_timing=False, kernel_name="python3", resources=where).execute()


def tidy(notebook: Any) -> None:
    """Of cells with the tag `progress` the result alone stays: bars and lines tell the times of one machine. Of those
    with the tag `clear` nothing stays."""
    notebook.metadata.language_info = {"name": "python"}
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        tags = cell.metadata.get("tags", [])
        cell.execution_count = None
        cell.outputs = [
            output
            for output in cell.outputs
            if "clear" not in tags and ("progress" not in tags or output.output_type == "execute_result")
        ]
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = None
            if data := output.get("data"):
                for richer in ("image/png", "text/markdown"):
                    if richer in data:
                        output.data = {richer: data[richer]}
                if "image/png" in output.data:
                    output.data["image/png"] = _small(output.data["image/png"])


def _small(png: str) -> str:
    sink = io.BytesIO()
    with Image.open(io.BytesIO(base64.b64decode(png))) as picture:
        if picture.mode == "P":  # it is small already
            return png
        picture.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(sink, "PNG", optimize=True)
    return base64.b64encode(sink.getvalue()).decode()


def main() -> None:
    for name in NAMES:
        notebook = read(name)
        with tempfile.TemporaryDirectory() as folder:
            execute(notebook, Path(folder))
        tidy(notebook)
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")


if __name__ == "__main__":
    main()
