"""Steps: what their keys hold, that a forgotten version is noticed, and that a step reads nothing that it does not declare."""

import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pandas as pd
import pytest
import torch
from fingerprints import FINGERPRINTS, fingerprints

import clvq_core as clvq

ROOT = Path(__file__).parents[1]
QUICK = dict(train_sentences=100, test_sentences=60, finetune_epochs=1, epochs=2, n_codes=20, folds=3, probe_epochs=3)
FROM_OUTSIDE = {*clvq.CorpusSettings.model_fields, "model", "finetune", "prompt", "answers", "source_layer", "target_layer", "all_layers",
                "codebook"}
"""Settings that keys hold by what they lead to: hashes of the text and of the model's files, the prompt, the layers, a step."""


@pytest.fixture(scope="module")
def pipeline():
    return clvq.Pipeline(clvq.configure("smoke", **QUICK))


# --- versions ---------------------------------------------------------------------------------------------------------


def test_a_step_whose_code_changed_has_a_new_version():
    known = json.loads(FINGERPRINTS.read_text("utf8"))
    found = fingerprints(ROOT / "clvq_core.py", clvq.step_versions())
    for name, (version, fingerprint) in found.items():
        before = known.get(name)
        assert before is not None, f"step {name} is new: run `make fingerprints`"
        changed = before[1] != fingerprint and before[0] == version
        assert not changed, f"the code of step {name} changed and its version did not: raise it, or run `make fingerprints` if results stay"
    assert known == {name: list(value) for name, value in found.items()}, "run `make fingerprints`"


def changed_fingerprints(tmp_path: Path, old: str, new: str) -> set[str]:
    """Steps whose fingerprint differs once a piece of the module's code is replaced."""
    source = (ROOT / "clvq_core.py").read_text("utf8")
    assert source.count(old) >= 1, old
    path = tmp_path / "other.py"
    path.write_text(source.replace(old, new), "utf8")
    before, after = (fingerprints(file, clvq.step_versions()) for file in (ROOT / "clvq_core.py", path))
    return {name for name in before if before[name] != after[name]}


def test_fingerprints_follow_methods_and_ignore_words(tmp_path):
    assert not changed_fingerprints(tmp_path, "PyTorch's global state is as before", "nothing else has changed")
    assert not changed_fingerprints(tmp_path, "# squares of what lies near 0 do not cancel", "# otherwise they would cancel")
    assert not changed_fingerprints(tmp_path, "operations > 1e12", "operations > 1e13")
    assert {"states", "salience_at", "classifier"} <= changed_fingerprints(
        tmp_path, "len(child) in sizes", "len(child) >= self.n_layers"
    )
    assert {"vqvae", "initial_codebook"} & changed_fingerprints(
        tmp_path, "nn.init.eye_(self.linear.weight)", "nn.init.zeros_(self.linear.weight)"
    ) == {"vqvae"}
    assert changed_fingerprints(tmp_path, '"ward": "Ward clusters"', '"ward": "clusters"') & {"cluster_vectors", "vqvae", "states"} == {
        "cluster_vectors"
    }


# --- keys -------------------------------------------------------------------------------------------------------------


@contextmanager
def no_computation(monkeypatch):
    """Inside, a step that is not cached fails instead of being computed."""
    with monkeypatch.context() as patch:
        patch.setattr(
            clvq, "cached_step", lambda folder, *_, **__: folder if folder.exists() else pytest.fail(f"{folder.name} is not cached")
        )
        yield


def test_a_second_pipeline_finds_every_step_done_and_gives_the_same_numbers(pipeline, monkeypatch):
    first = pipeline.faithfulness
    again = clvq.Pipeline(pipeline.config)
    with no_computation(monkeypatch):
        pd.testing.assert_frame_equal(again.faithfulness, first)
        pd.testing.assert_frame_equal(again.history, pipeline.history)


def test_a_key_is_known_before_anything_is_computed(tmp_path):
    fresh = clvq.Pipeline(clvq.configure("smoke", **QUICK), tmp_path)
    assert not fresh.is_cached("faithfulness") and len(fresh.call("faithfulness").stable_key) == 20
    assert not list(tmp_path.iterdir())


def keys(pipeline) -> dict[str, str]:
    """Keys of the steps without arguments, and of a few others."""
    with_arguments = {
        "classifier": (),
        "vqvae": pipeline.layers,
        "initial_codebook": pipeline.layers[:1],
        "states": ("train", *pipeline.kept_layers()),
        "salience_at": (pipeline.layers[0], ["a text"]),
        "in_model": (["CLVQ-VAE"],),
        "cluster_vectors": ("ward", pipeline.layers[0]),
    }
    names = [name for name, step in clvq.STEPS.items() if not step.signature.parameters]
    return {name: pipeline.call(name, *with_arguments.get(name, ())).stable_key for name in {*names, *with_arguments}}


def differing(one: dict[str, str], other: dict[str, str]) -> set[str]:
    return {name for name in one if one[name] != other[name]}


def test_a_raised_version_changes_the_keys_of_the_step_and_of_all_that_read_from_it(pipeline, monkeypatch):
    before = keys(pipeline)
    monkeypatch.setattr(clvq.STEPS["initial_codebook"], "version", 99)
    changed = differing(before, keys(clvq.Pipeline(pipeline.config)))
    assert {"initial_codebook", "vqvae", "concepts", "faithfulness", "effects"} <= changed
    assert not {"classifier", "states", "salience_at", "cluster_vectors"} & changed


def test_neither_the_packages_version_nor_the_file_on_disk_is_in_a_key(pipeline, monkeypatch, tmp_path):
    before = keys(pipeline)
    monkeypatch.setattr(clvq, "__version__", "9.9.9")
    monkeypatch.setattr(clvq, "__file__", str(tmp_path / "edited.py"))
    assert not differing(before, keys(clvq.Pipeline(pipeline.config)))


@pytest.mark.parametrize(
    ("setting", "value", "changes", "leaves"),
    [
        ("seed", 7, {"vqvae", "faithfulness", "effects"}, {"classifier", "states", "salience_at"}),
        ("bootstrap", 7, {"shift_test", "across_layers"}, {"faithfulness", "removal_curve", "vqvae", "training_summary"}),
        ("seeds", 5, set(), {"faithfulness", "shift_test", "effects"}),
        ("words_from", "samples", {"concepts"}, {"vqvae", "faithfulness"}),
        ("salience_steps", 3, {"salience_at", "faithfulness"}, {"vqvae", "states"}),
        ("probe_hidden", 5, {"faithfulness", "training_summary"}, {"vqvae", "effects", "concepts"}),
        ("data_seed", 5, {"classifier", "states", "vqvae"}, set()),
        ("temperature", 2.0, {"vqvae", "concepts", "faithfulness"}, {"initial_codebook", "cluster_vectors"}),
    ],
)
def test_a_setting_changes_the_keys_of_the_steps_that_read_it_and_no_others(pipeline, setting, value, changes, leaves):
    changed = differing(keys(pipeline), keys(pipeline.changed(**{setting: value})))
    assert changes <= changed and not leaves & changed, changed


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "config.json"])
def test_any_file_of_the_models_folder_that_can_change_results_changes_the_keys(tmp_path, file):
    shutil.copytree(clvq.find_model("minilm"), tmp_path / "model")
    config = clvq.configure("smoke", **QUICK, model=str(tmp_path / "model"))
    before = keys(clvq.Pipeline(config))
    path = tmp_path / "model" / file
    content = json.loads(path.read_text("utf8"))
    path.write_text(json.dumps(dict(reversed(content.items())), indent=1), "utf8")
    assert {"classifier", "states", "salience_at", "faithfulness"} <= differing(before, keys(clvq.Pipeline(config)))
    (tmp_path / "model" / "README.md").write_text("words about it")
    assert not differing(keys(clvq.Pipeline(config)), keys(clvq.Pipeline(config)))


def test_what_has_no_stable_hash_is_refused_instead_of_being_hashed_as_it_prints():
    with pytest.raises(TypeError, match="no stable hash"):
        clvq.hash_text(torch.zeros(2000))
    assert clvq.hash_text(clvq.configure("smoke")) != clvq.hash_text(clvq.configure("smoke", seed=3))


# --- what a step reads ------------------------------------------------------------------------------------------------


def test_a_step_reads_only_settings_that_it_or_a_step_it_reads_from_declares(monkeypatch, tmp_path):
    """Every step is computed with settings that note who asks for them."""
    reading: list[str] = []
    read: dict[str, set[str]] = {}
    reads_from: dict[str, set[str]] = {}
    watched = []  # not settings that a step makes of them

    class Noted(clvq.Config):
        def __getattribute__(self, name):
            if reading and name in type(self).model_fields and any(self is config for config in watched):
                read.setdefault(reading[-1], set()).add(name)
            return super().__getattribute__(name)

    @contextmanager
    def inside(name):
        reading.append(name)
        yield
        reading.pop()

    def key(self):
        name = self.step.name
        if reading:
            reads_from.setdefault(reading[-1].removeprefix("key of "), set()).add(name)
        with inside(f"key of {name}"):
            return original_key.func(self)

    def folder(self):
        with inside("record of"):  # environment.json names the seed
            return original_folder(self)

    original_key, original_folder = vars(clvq.StepCall)["stable_key"], clvq.StepCall.folder
    monkeypatch.setattr(clvq.StepCall, "stable_key", property(key))
    monkeypatch.setattr(clvq.StepCall, "folder", folder)
    for step in clvq.STEPS.values():

        def method(*arguments, step=step, original=step.method, **folder):
            with inside(step.name):
                return original(*arguments, **folder)

        monkeypatch.setattr(step, "method", method)
    monkeypatch.setenv("CLVQ_WORKERS", "0")
    small = dict(
        QUICK, train_sentences=60, test_sentences=30, epochs=1, n_codes=8, start_iterations=2, salience_steps=1, cluster_points=200, seeds=1
    )
    pipeline = clvq.Pipeline(Noted(**{**clvq.PRESETS["smoke"], **small}), tmp_path)
    watched.append(pipeline.config)
    for name, step in clvq.STEPS.items():
        if not step.signature.parameters:
            assert len(getattr(pipeline, name)) if name not in ("classifier", "untrained_model") else getattr(pipeline, name)
    assert len(pipeline.retrained(["CLVQ-VAE"])) and len(pipeline.in_model(["CLVQ-VAE"]))
    assert len(pipeline.yardstick(5)) == 3 and len(pipeline.anatomy(5)) == 2 and len(pipeline.effects_of("k-means"))
    assert len(pipeline.effects_of("predictive k-means"))
    assert pipeline.planted(["tuesday"], "positive").config.finetune
    assert not set(clvq.STEPS) - set(read) - {"door"}, "a step was not computed"

    def declared(name, seen=()):
        inputs = reads_from.get(name, set()) - {name, *seen}
        return set(clvq.STEPS[name].settings).union(*(declared(other, (*seen, name)) for other in inputs))

    for name in clvq.STEPS:
        undeclared = read.get(name, set()) - declared(name) - FROM_OUTSIDE
        assert not undeclared, f"step {name} reads {', '.join(sorted(undeclared))} without declaring it"


# --- results on disk --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        pd.DataFrame({"a": [1.5, 2.5], "b": pd.Categorical(["x", "y"])}),
        {"w": torch.arange(6.0).view(2, 3).T},
        {"l0": 3.5, "n": 2},
        {},
        ({"w": torch.zeros(2)}, {"l0": 1.0}),
        (pd.DataFrame({"a": [1]}), pd.DataFrame({"b": [2]})),
    ],
    ids=["table", "tensors", "json", "empty", "both", "tables"],
)
def test_a_result_comes_back_as_it_was(tmp_path, value):
    clvq.write_result(tmp_path, value)

    def same(one, other):
        if isinstance(one, tuple):
            return len(one) == len(other) and all(map(same, one, other))
        if isinstance(one, pd.DataFrame):
            return one.equals(other) and (one.dtypes == other.dtypes).all()
        return one.keys() == other.keys() and all(
            torch.equal(v, other[k]) if isinstance(v, torch.Tensor) else v == other[k] for k, v in one.items()
        )

    assert same(value, clvq.read_result(tmp_path))


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    import threading

    errors = []

    def write(number):
        try:
            for _ in range(60):
                clvq.write_whole(tmp_path / "table.txt", lambda path: path.write_text(str(number) * 5000))
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    text = (tmp_path / "table.txt").read_text()
    assert not errors and len(text) == 5000 and len(set(text)) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["table.txt"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path):
    path = tmp_path / "table.txt"
    path.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clvq.write_whole(path, fail)
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["table.txt"]


def test_a_finished_run_is_not_written_to_again(pipeline):
    before = {path: path.stat().st_mtime_ns for path in pipeline.run_folder.iterdir()}
    assert len(pipeline.concepts) and len(pipeline.changed(words_from="samples").concepts)
    assert {path: path.stat().st_mtime_ns for path in pipeline.run_folder.iterdir()} == before
    assert not pipeline.concepts["word_counts"].equals(pipeline.changed(words_from="samples").concepts["word_counts"])


def test_a_step_keeps_nothing_of_other_seeds_in_memory(pipeline):
    assert all(other is not again for other, again in zip(pipeline.over_seeds[1:], pipeline.over_seeds[1:], strict=True))
    assert not any("clvqvae" in vars(other) for other in pipeline.over_seeds[1:])


def test_importing_the_module_or_reading_its_steps_starts_no_process_and_opens_no_port():
    program = "import clvq_core as clvq, sys; clvq.Pipeline(clvq.configure('smoke')); print('distributed' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[0] == "False"
