"""Makes a page of each notebook, with its outputs, when the site is built. Its links are checked like all others, and
it asks no other host, as the pages of nbconvert do."""

import json
from typing import Any

from mkdocs.structure.files import File, Files


def on_files(files: Files, config: Any) -> Files:
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        cells = json.loads(notebook.content_string)["cells"]
        parts = [part for cell in cells for part in _parts(cell)]
        download = f'<a href="../{notebook.name}.ipynb" download>Download this notebook</a>'
        parts[0] = parts[0].replace("\n", f"\n\n{download}\n", 1)  # below the title
        files.append(File.generated(config, notebook.src_uri.replace(".ipynb", ".md"), content="\n\n".join(parts)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    return markdown.replace(".ipynb)", ".md)")


def _parts(cell: dict[str, Any]) -> list[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        return [source]
    return [f"```python\n{source}\n```", *map(_shown, cell["outputs"])]


def _shown(output: dict[str, Any]) -> str:
    data = output.get("data", {"text/plain": output.get("text", "")})
    if "image/png" in data:
        return f'<img alt="What the cell shows" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    if "text/markdown" in data:
        return "".join(data["text/markdown"]).replace("\\~", "~")  # which only this Markdown takes for text
    return f"```text\n{''.join(data['text/plain']).rstrip()}\n```"
