"""The notebooks as users run them: nbval against the stored outputs, and papermill by itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.notebooks


def run(*command: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "CLVQ_SCALE": "smoke", "PYTHONPATH": str(ROOT)}
    if "PYTEST_XDIST_WORKER" in env:  # notebooks run side by side already
        env["CLVQ_WORKERS"] = "0"
    return subprocess.run([sys.executable, "-m", *command], cwd=ROOT, env=env, capture_output=True, text=True, timeout=1500)


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "notebooks").glob("*.ipynb"))])
def test_every_notebook_runs_at_smoke_scale_and_gives_its_stored_counts(name):
    done = run("pytest", "--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout=900", "-q", "-p", "no:cacheprovider", "-p", "no:xdist",
               f"notebooks/{name}.ipynb")
    assert done.returncode == 0, done.stdout[-5000:]
    assert "passed" in done.stdout


def test_a_notebook_runs_under_papermill_alone(tmp_path):
    done = run("papermill", "notebooks/02_faithfulness.ipynb", str(tmp_path / "out.ipynb"), "--no-progress-bar",
               "-p", "seed", "1", "-p", "n_codes", "20")
    assert done.returncode == 0, done.stderr[-3000:]
    assert '"seed": 1' in (text := (tmp_path / "out.ipynb").read_text()) and "concepts that are removed most often" in text


def test_tables_of_most_notebooks_are_compared_but_for_decimals():
    """Their counts, words, names and order, which do not differ from processor to processor."""
    compared = {path.stem: path.read_text().count('"nbval-check-output"') for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert sum(compared.values()) >= 18 and sum(count > 0 for count in compared.values()) >= 6
    done = run("pytest", "--nbval-lax", "--collect-only", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "notebooks")
    assert done.returncode == 0, done.stdout[-3000:]
