"""Fingerprints of the code behind each step, and of what notebooks compute from their results: ``make fingerprints``.

A fingerprint is a hash of a step's method and of everything in the module that it uses, other steps aside, without comments, docstrings
and blanks, so that it is the same on every version of Python.
"""

import ast
import hashlib
import io
import json
import re
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FINGERPRINTS = Path(__file__).with_suffix(".json")


def bare(text: str, node: ast.AST, starts: list[int]) -> str:
    """The code of a node without docstrings, comments and blanks."""

    def at(line: int, column: int) -> int:  # ast counts bytes
        return starts[line - 1] + len(text[starts[line - 1] :].encode()[:column].decode())

    first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
    spans = [
        (at(n.lineno, n.col_offset), at(n.end_lineno, n.end_col_offset))
        for n in ast.walk(node)
        if isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant) and isinstance(n.value.value, str)
    ]
    begin, end = starts[first - 1], at(node.end_lineno, node.end_col_offset)
    code = text[begin:end]
    for a, b in sorted(spans, reverse=True):
        code = code[: a - begin] + "pass" + code[b - begin :]
    lines = code.splitlines()
    for token in reversed(list(comments(code))):
        row, column = token
        lines[row - 1] = lines[row - 1][:column]
    return "".join("".join(lines).split())


def comments(code: str) -> list[tuple[int, int]]:
    indent = len(code) - len(code.lstrip())
    source = "if 1:\n" + code if indent else code
    found = [t.start for t in tokenize.generate_tokens(io.StringIO(source + "\n").readline) if t.type == tokenize.COMMENT]
    return [(row - bool(indent), column) for row, column in found]


def used_names(node: ast.AST) -> set[str]:
    """Names that a definition takes from the module, and methods of the pipeline that it calls; decorators aside."""
    body = [*ast.walk(node)]
    for decorator in getattr(node, "decorator_list", []):
        inside = {id(n) for n in ast.walk(decorator)}
        body = [n for n in body if id(n) not in inside]
    names = [n for n in body if isinstance(n, ast.Name)]
    local = {n.id for n in names if isinstance(n.ctx, ast.Store)} | {n.arg for n in body if isinstance(n, ast.arg)}
    methods = {
        f"Pipeline.{n.attr}"
        for n in body
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id in ("self", "pipeline", "run", "other")
    }
    return {n.id for n in names if n.id not in local} | methods


def units(path: Path) -> dict[str, tuple[str, set[str]]]:
    """Name to bare code and the names it uses: functions, classes and constants of the module, and methods of the pipeline."""
    text = path.read_text("utf8")
    starts = [0]
    for line in text.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found = {}
    for node in ast.parse(text).body:
        if isinstance(node, ast.ClassDef) and node.name == "Pipeline":
            parts = [(f"Pipeline.{n.name}", n) for n in node.body if isinstance(n, ast.FunctionDef)]
        elif isinstance(node, ast.ClassDef) and any(ast.unparse(base).endswith(("Settings", "BaseModel")) for base in node.bases):
            parts = []  # their values are in the keys
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            parts = [(node.name, node)]
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            parts = [(target.id, node) for target in targets if isinstance(target, ast.Name)]
        else:
            parts = []
        for name, part in parts:
            found[name] = bare(text, part, starts), used_names(part)
    return found


IGNORED = {
    "__all__",
    "__version__",
    "Pipeline",
    "STEPS",
    "Step",
    "StepCall",
    "announce_cost",
    "training_speed",
    "environment",
    "peak_memory",
    "cached_step",
    "PRESETS",
    "Pipeline.provenance",
}
"""What may change without a result changing."""


def fingerprints(path: Path, versions: dict[str, int]) -> dict[str, tuple[int, str]]:
    """Step to its version and fingerprint."""
    known = units(path)
    steps = {f"Pipeline.{name}" for name in versions}
    called = set()
    for notebook in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = json.loads(notebook.read_text("utf8"))["cells"]
        code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
        called |= {
            name for match in re.findall(r"\bclvq\.(\w+)|\.(\w+)", code) for name in (match[0], f"Pipeline.{match[1]}") if name in known
        }

    def closure(start: set[str]) -> str:
        todo, seen = list(start), set()
        while todo:
            name = todo.pop()
            if name in known and name not in seen and name not in IGNORED and (name in start or name not in steps):
                seen.add(name)
                todo += known[name][1]
        return hashlib.sha256(json.dumps(sorted((name, known[name][0]) for name in seen)).encode()).hexdigest()[:16]

    return {
        name: (version, closure({f"Pipeline.{name}"} if f"Pipeline.{name}" in known else called - steps))
        for name, version in sorted(versions.items())
    }


if __name__ == "__main__":
    import clvq_core as clvq

    now = fingerprints(ROOT / "clvq_core.py", clvq.step_versions())
    FINGERPRINTS.write_text(json.dumps(now, indent=1) + "\n", "utf8")
    print(f"{len(now)} fingerprints: {FINGERPRINTS.relative_to(ROOT)}")
