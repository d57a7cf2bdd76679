"""Fills the page of every key from the config itself, when the site is built."""

import json
from typing import Any

from raydistill.config.keys import describe_keys


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri != "keys.md":
        return markdown
    lines, section = [markdown], None
    for key in describe_keys():
        head, _, _ = key.name.rpartition(".")
        if head != section:
            section = head
            lines += [f"\n## {section or 'The job'}\n", "| key | default | values | |", "|---|---|---|---|"]
        default = "required" if key.default is ... else f"`{json.dumps(key.default, default=str)}`"
        cells = (f"`{key.name}`", default, key.values, key.meaning)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"
