"""The command line and what keeps it quick and safe: imports, exit codes, what `clvq clean` may delete."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pandas as pd
import pytest
from filelock import FileLock
from test_human import made, study  # noqa: F401 (fixtures)
from typer.testing import CliRunner

import clvq_app
import clvq_core as clvq

HEAVY = "{'torch', 'transformers', 'pandas', 'clvq_core'} & set(sys.modules)"


def in_a_process(code: str, *arguments: str) -> str:
    """What a fresh Python prints."""
    environment = {**os.environ, "PYTHONPATH": str(Path(clvq_app.__file__).parent)}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_importing_the_app_and_asking_for_help_import_nothing_that_takes_long():
    helps = "[clvq_app.main([*command, '--help']) for command in ([], ['run'], ['explain'], ['annotate'])]"
    assert in_a_process(f"import clvq_app, sys; assert {helps} == [0] * 4; print({HEAVY})").splitlines()[-1] == "set()"


def test_a_raters_process_imports_neither_the_core_nor_pytorch(study):  # noqa: F811
    cell = clvq_app.RATING_CELL.format(folder=str(study.folder), most_raters=9)
    cell = cell.replace("clvq_app.RatingPage(", "page = clvq_app.RatingPage(").removesuffix(".box")
    code = f"{cell}\nimport sys\npage.begin()\npage.move(1)\nprint({HEAVY}, page.place)"
    assert in_a_process(code) == "set() 0\n"


def test_the_scales_and_the_cache_are_those_of_the_core(monkeypatch):
    assert get_args(clvq_app.Scale) == tuple(clvq.PRESETS)
    for folder in ("", "~/somewhere", "/somewhere/else"):
        monkeypatch.setenv("CLVQ_CACHE", folder)
        assert clvq_app.cache_folder() == clvq.cache_folder()


@pytest.mark.parametrize("command", ["run", "sweep", "results", "explain", "annotate", "clean"])
def test_the_help_of_each_command_has_examples(command):
    shown = CliRunner().invoke(clvq_app.app, [command, "--help"]).output
    assert "examples:\n" in shown and f"    clvq {command} " in shown


def test_a_wrong_option_is_refused_with_exit_code_2(capsys):
    assert clvq_app.main(["run", "a.ipynb", "--scale", "huge"]) == 2
    assert "'huge'" in capsys.readouterr().err
    assert clvq_app.main(["run", "a.ipynb", "-p", "seed"]) == 2
    assert "'seed' has no value" in capsys.readouterr().err


def test_names_and_values_are_two_words_and_values_may_hold_equals_signs_and_look_like_options():
    words = ["run", "a.ipynb", "-p", "dataset", "a=b.csv", "-p", "seed", "-1", "--scale", "smoke"]
    joined = clvq_app.join_pairs(words)
    assert joined == ["run", "a.ipynb", "-p", "dataset=a=b.csv", "-p", "seed=-1", "--scale", "smoke"]
    assert clvq_app.read_pairs([joined[3], joined[5]]) == {"dataset": "a=b.csv", "seed": -1}


# --- errors -----------------------------------------------------------------------------------------------------------


def failing(monkeypatch, error) -> None:
    """`clvq results` comes upon this."""
    monkeypatch.setattr(clvq, "sweep_results", error)


def test_a_librarys_error_is_called_unexpected_and_its_traceback_is_shown_on_demand(monkeypatch, tmp_path, capsys):
    (tmp_path / "sweep.json").touch()
    failing(monkeypatch, lambda folder: pd.Series([1, 2]).to_numpy().reshape(3))
    assert clvq_app.main(["results", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "cannot reshape" in error and "--debug" in error
    assert clvq_app.main(["--debug", "results", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("CLVQ_DEBUG", "1")
    assert clvq_app.main(["results", str(tmp_path)]) == 1
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(("error", "code", "words"), [
    (OSError(28, "No space left on device"), 1, "clvq: [Errno 28] No space left on device"),
    (KeyError("x"), 1, "clvq: unexpected KeyError in test_app.py: 'x' (clvq --debug COMMAND … shows the traceback)"),
    (RuntimeError("two\nlines"), 1,
     "clvq: unexpected RuntimeError in test_app.py: two (clvq --debug COMMAND … shows the traceback)"),
])  # fmt: skip
def test_every_error_is_one_line(monkeypatch, tmp_path, capsys, error, code, words):
    def fail(_):
        raise error

    (tmp_path / "sweep.json").touch()
    failing(monkeypatch, fail)
    assert clvq_app.main(["results", str(tmp_path)]) == code
    assert capsys.readouterr().err == words + "\n"


def test_our_own_sentence_is_shown_as_it_is(tmp_path, capsys):
    assert clvq_app.main(["results", str(tmp_path)]) == 2
    assert re.fullmatch(r"clvq: .* is no folder of a sweep: [^\n]*\n", capsys.readouterr().err)


# --- the cache --------------------------------------------------------------------------------------------------------


def others(folder: Path) -> None:
    """What somebody keeps in a folder that is no cache of ours."""
    for name, record in {
        "x-y": '{"name": "conda"}',
        "a-list": "[1]",
        "broken-1": "{",
        "half-1": '{"clvq": "0.1.0"}',
    }.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "environment.json").write_text(record)
    (folder / "my-thesis").mkdir()
    (folder / "my-thesis" / "chapter-1.tex").write_text("It was a dark night")
    (folder / "notes-2026.txt").write_text("buy milk")
    (folder / "notes-2026.lock").touch()
    (folder / "draft-1.partial").mkdir()


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def make_step(folder: Path) -> Path:
    return clvq.cached_step(folder, lambda partial: (partial / "data").write_bytes(bytes(2**20)), step="train")


def test_clean_deletes_our_steps_and_nothing_of_anybody_else(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLVQ_CACHE", str(tmp_path))
    others(tmp_path)
    before = listing(tmp_path)
    assert clvq_app.main(["clean"]) == 0 and listing(tmp_path) == before
    assert "removed 0 cached steps" in capsys.readouterr().out
    make_step(tmp_path / "train-abc")
    (tmp_path / "train-def.partial").mkdir()
    (tmp_path / "train-def.partial" / ".clvq-step").touch()
    (tmp_path / "train-def.lock").touch()
    (tmp_path / "linked-1").symlink_to(make_step(tmp_path / "elsewhere" / "train-ghi"))
    before |= {"linked-1", *(f"elsewhere/{name}" for name in listing(tmp_path / "elsewhere")), "elsewhere"}
    assert clvq_app.main(["clean", "--dry-run"]) == 0 and (tmp_path / "train-abc").exists()
    assert clvq_app.main(["clean"]) == 0 and listing(tmp_path) == before
    assert "removed 2 cached steps, 1 MiB" in capsys.readouterr().out


def test_clean_leaves_a_step_that_is_being_made(tmp_path, monkeypatch):
    monkeypatch.setenv("CLVQ_CACHE", str(tmp_path))
    (tmp_path / "train-def.partial").mkdir()
    (tmp_path / "train-def.partial" / ".clvq-step").touch()
    with FileLock(tmp_path / "train-def.lock"):
        assert clvq_app.main(["clean"]) == 0 and (tmp_path / "train-def.partial").exists()
    assert clvq_app.main(["clean"]) == 0 and not any(tmp_path.iterdir())


def test_clean_needs_no_core(tmp_path):
    code = f"import clvq_app, os, sys; os.environ['CLVQ_CACHE'] = sys.argv[1]; clvq_app.main(['clean']); print({HEAVY})"
    assert in_a_process(code, str(tmp_path)).splitlines()[-1] == "set()"


# --- the rating page's command ----------------------------------------------------------------------------------------


def test_annotate_says_that_its_port_is_taken_before_anything_else(study, capsys):  # noqa: F811
    pytest.importorskip("voila")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert clvq_app.main(["annotate", str(study.folder), "--port", port, "--ip", "127.0.0.1"]) == 2
        assert f"port {port} at 127.0.0.1 cannot be used" in capsys.readouterr().err


def test_annotate_fails_when_its_server_fails(study, monkeypatch, capsys):  # noqa: F811
    app = pytest.importorskip("voila.app")
    monkeypatch.setenv("PYTHONPATH", "")
    monkeypatch.setattr(app, "Voila", SimpleNamespace(launch_instance=lambda *_, **__: sys.exit(3)))
    assert clvq_app.main(["annotate", str(study.folder), "--port", "0"]) == 1
    assert "the rating page's server stopped with exit code 3" in capsys.readouterr().err


def test_annotate_makes_no_study_again_and_counts_the_raters_who_answered(study, capsys):  # noqa: F811
    token, _ = study.join(), study.join()
    study.save(token, "0C", "positive", 5)
    content = (study.folder / "study.json").read_bytes()
    assert clvq_app.main(["annotate", str(study.folder), "--make-only"]) == 0
    assert "12 items, answers of 1 raters" in capsys.readouterr().out
    assert (study.folder / "study.json").read_bytes() == content and json.loads(content)["classes"] == [
        "negative",
        "positive",
    ]
