"""The packaging files say one thing: what is pinned, what is required, which version this is."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf8"))
PROJECT = PYPROJECT["project"]
MODULES = PYPROJECT["tool"]["setuptools"]["py-modules"]
EXTRAS = PROJECT["optional-dependencies"]


def lock_lines(path: Path = ROOT / "requirements.lock") -> list[str]:
    lines = path.read_text("utf8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def pins(*path: Path) -> dict[str, Version]:
    return {
        canonicalize_name(name): Version(version) for name, version in (line.split("==") for line in lock_lines(*path))
    }


def tracked_files() -> list[Path]:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.run([git, "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_every_line_of_the_lock_pins_one_public_version():
    lines = lock_lines()
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.!]+", line) for line in lines), lines
    names = [line.split("==")[0].lower() for line in lines]
    assert names == sorted(set(names))


def test_torch_is_pinned_without_a_local_version():
    assert "torch==2.13.0" in lock_lines()


def test_conda_environment_installs_exactly_the_lock():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text("utf8"))
    assert environment["name"] == "clvq"
    assert environment["channels"] == ["conda-forge"]
    assert environment["dependencies"] == ["python=3.11", "pip", {"pip": lock_lines()}]


@pytest.mark.parametrize("extra", ["core", *(name for name in EXTRAS if name != "all")])
def test_lock_satisfies_what_pyproject_requires(extra):
    pinned = pins() | (pins(ROOT / "benchmarks" / "requirements.txt") if extra == "bench" else {})
    for requirement in map(Requirement, PROJECT["dependencies"] if extra == "core" else EXTRAS[extra]):
        if requirement.name == PROJECT["name"]:
            assert requirement.extras <= EXTRAS.keys()
            continue
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in the lock"
        assert version in requirement.specifier, f"the lock has {version}, pyproject.toml wants {requirement}"


def test_the_extra_all_takes_every_other_extra():
    (requirement,) = map(Requirement, EXTRAS["all"])
    assert requirement.name == PROJECT["name"]
    assert requirement.extras == EXTRAS.keys() - {"all", "bench"}  # nobody who uses it needs what it is compared with


LOCKED = {"python_version": "3.11", "python_full_version": "3.11.0"}
"""The Python that the lock was made with: others need a package less."""


def test_lock_is_closed_under_the_requirements_of_what_it_pins():
    pinned = pins()
    installed = {canonicalize_name(d.metadata["Name"]): d for d in importlib.metadata.distributions()}
    wanted = [
        Requirement(line)
        for name, lines in {"core": PROJECT["dependencies"], **EXTRAS}.items()
        for line in lines
        if name != "bench"
    ]
    seen: set[tuple[str, str]] = set()
    missing = set()
    while wanted:
        requirement = wanted.pop()
        name = canonicalize_name(requirement.name)
        if name not in pinned and name != PROJECT["name"]:
            missing.add(name)
        if name not in installed or name not in pinned:
            continue
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen:
                continue
            seen.add((name, extra))
            for child in map(Requirement, installed[name].requires or []):
                platform_only = name == "torch" and child.marker is not None  # CUDA packages, pinned by torch itself
                if not platform_only and (child.marker is None or child.marker.evaluate({**LOCKED, "extra": extra})):
                    wanted.append(child)
    assert not missing
    unneeded = (pinned.keys() & installed.keys()) - {name for name, _ in seen}
    assert not unneeded


def test_citation_names_the_software_and_the_paper():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    assert {"cff-version", "message", "title", "authors", "version", "date-released", "license"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0"
    assert citation["license"] == PROJECT["license"] == "MIT"
    (paper,) = citation["references"]
    assert paper["title"] == "Cross-Layer Discrete Concept Discovery for Interpreting Language Models"
    assert paper["authors"]


def test_pyproject_citation_and_changelog_agree_on_version_and_date():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf8"))
    changelog = (ROOT / "CHANGELOG.md").read_text("utf8")
    newest = re.search(r"^## \[(\d[^]]*)\] - (\d{4}-\d\d-\d\d)$", changelog, re.M)
    assert newest is not None
    assert newest.groups() == (PROJECT["version"], citation["date-released"])
    assert str(citation["version"]) == PROJECT["version"]


def test_no_tracked_file_has_a_name_that_make_or_a_shell_would_split():
    names = [str(path.relative_to(ROOT)) for path in tracked_files()]
    assert not [name for name in names if not re.fullmatch(r"[\w./-]+", name, re.ASCII)]


def test_make_knows_how_to_build_the_book():
    if shutil.which("make") is None:
        pytest.skip("no make")
    done = subprocess.run(["make", "--dry-run", "book"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_tracked_file_names_a_machines_path():
    folders = "|".join(["tmp", "root", "home", "work", "Users", "opt"])
    machine_path = re.compile(r"(?<![\w.~$})/-])" + "/(?:" + folders + ")" + r"/\w")
    image = re.compile(r'"image/\w+": "[^"]*"')  # a notebook's pictures are base64, where any letters may occur
    found, files = [], tracked_files()
    assert ROOT / "pyproject.toml" in files
    for path in files:
        data = path.read_bytes()
        if b"\0" in data:
            continue
        text = image.sub("", data.decode("utf8", "replace"))
        for match in machine_path.finditer(text):
            found.append(f"{path.relative_to(ROOT)}: {text[max(0, match.start() - 20) : match.end() + 30]!r}")
    assert not found, "\n".join(found)


def test_ci_runs_what_a_developer_runs():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text("utf8").splitlines()[-1] == "make test"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_alone_lists_the_targets():
    listed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for target in ("paper", "book", "smoke", "test", "lint", "lock", "clean", "distclean"):
        assert re.search(rf"^  make {target} +\S", listed, re.M), target


def test_the_wheel_has_the_two_modules_and_the_command():
    assert MODULES == ["clvq_core", "clvq_app"]
    assert PROJECT["scripts"] == {"clvq": "clvq_app:main"}


BROUGHT = {
    "tornado": "voila", "traitlets": "voila", "jupyter_server": "voila", "nbformat": "papermill",
    "IPython": "ipykernel", "jupyter_client": "nbclient", "myst_nb": "jupyter-book", "dask": "distributed", "PIL": "matplotlib",
}  # fmt: skip
"""Imported packages that come with another one, which cannot do without them."""


def test_every_package_that_the_modules_import_is_required():
    required = {
        canonicalize_name(Requirement(line).name)
        for lines in [PROJECT["dependencies"], *EXTRAS.values()]
        for line in lines
    }
    distributions, missing = importlib.metadata.packages_distributions(), set()
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / f"{module}.py").read_text("utf8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {*MODULES}:
                sources = [BROUGHT[name]] if name in BROUGHT else distributions.get(name, [name])
                if not {canonicalize_name(source) for source in sources} & required:
                    missing.add(name)
    assert not missing


@pytest.mark.parametrize("module", MODULES)
def test_no_line_of_the_modules_is_over_120_characters(module):
    lines = (ROOT / f"{module}.py").read_text("utf8").splitlines()
    assert not [number for number, line in enumerate(lines, 1) if len(line) > 120]


def test_the_core_never_imports_the_app():
    names = [node.module for node in ast.walk(ast.parse((ROOT / "clvq_core.py").read_text("utf8"))) if isinstance(node, ast.ImportFrom)]
    assert "clvq_app" not in names and "import clvq_app" not in (ROOT / "clvq_core.py").read_text("utf8")
