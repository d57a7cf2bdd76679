"""What no module may call: readers that run what a file says. Ruff's banned-api holds those that are called by name;
here are methods, and calls that one argument makes safe."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "raydistill"
# An extension type's own scalars make Python's values, and Ray's of pickles.
OF_TABLES = {"as_py", "to_pylist", "to_pydict", "to_pandas", "open_stream", "ipc"}
SAFE_WITH = {("torch", "load"): ("weights_only", True), ("np", "load"): ("allow_pickle", False)}


def found(code: str, path: str) -> list[str]:
    lines = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and node.attr in OF_TABLES and not path.startswith("storage/tables/"):
            lines.append(f"{path}:{node.lineno}: {node.attr}; storage.tables.values reads columns")
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            key, value = SAFE_WITH.get((node.func.value.id, node.func.attr), ("", None))
            given = {k.arg: getattr(k.value, "value", None) for k in node.keywords}
            if key and given.get(key) is not value:
                lines.append(f"{path}:{node.lineno}: {node.func.attr} without {key}={value}")
    return lines


def test_no_module_calls_a_reader_that_runs_what_a_file_says():
    files = sorted(ROOT.rglob("*.py"))
    assert len(files) > 100
    assert [line for f in files for line in found(f.read_text(), f.relative_to(ROOT).as_posix())] == []


@pytest.mark.parametrize(
    "code",
    ["t['a'].to_pylist()", "t['a'][0].as_py()", "pa.ipc.open_stream(f)", "torch.load(f)",
     "torch.load(f, weights_only=x)", "np.load(f, allow_pickle=True)", "[v.as_py() for v in c]"],
)  # fmt: skip
def test_such_calls_are_found(code):
    assert found(code, "stages/some.py")
