"""The cache, the pipeline, notebooks run by papermill, and the command line."""

import copy
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

import clvq_app
import clvq_core as clvq

ROOT = Path(__file__).parents[1]
FAITHFULNESS = ROOT / "notebooks" / "02_faithfulness.ipynb"
QUICK = dict(train_sentences=100, test_sentences=60, finetune_epochs=1, epochs=2, n_codes=20, folds=3, probe_epochs=3)


@pytest.fixture(scope="module")
def pipeline():
    return clvq.Pipeline(clvq.configure("smoke", **QUICK))


def write_notebook(path: Path, *sources: str, kernel: str = "python3") -> Path:
    cells = [new_code_cell('scale = "smoke"\nseed: int = 42  # seed', metadata={"tags": ["parameters"]}), *map(new_code_cell, sources)]
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": {"name": kernel, "display_name": kernel, "language": "python"}}), path)
    return path


def outputs(path: Path) -> list:
    return [output for cell in nbformat.read(path, 4).cells if cell.cell_type == "code" for output in cell.outputs]


# --- steps ------------------------------------------------------------------------------------------------------------

def test_a_run_folder_holds_what_the_design_says_and_no_pickle(pipeline):
    assert len(pipeline.concepts) == pipeline.config.n_codes
    names = {path.name for path in pipeline.run_folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "metrics.parquet", "settings.json", "environment.json", "README.md"} - (
        {"README.md"} - names)
    assert not [path for path in pipeline.cache.rglob("*") if path.suffix in {".pt", ".pth", ".bin", ".pkl", ".pickle"}]
    record = json.loads((pipeline.run_folder / "environment.json").read_text())
    assert {"clvq", "step", "commit", "torch", "device", "seed", "seconds", "peak_memory_mib", "date"} <= set(record)


def test_a_seed_shares_model_and_states_but_not_the_codebook(pipeline):
    other = clvq.Pipeline(clvq.configure("smoke", **QUICK, seed=1))
    assert other.model_folder == pipeline.model_folder
    assert other.run_folder != pipeline.run_folder
    assert not torch.equal(other.clvqvae.vectors, pipeline.clvqvae.vectors)


def test_trainings_from_the_same_states_share_their_start_and_it_is_what_training_alone_would_take(pipeline, monkeypatch):
    starts, start = [], clvq.start_codebook
    monkeypatch.setattr(clvq, "start_codebook", lambda *given, **named: starts.append(given) or start(*given, **named))
    other = pipeline.changed(temperature=3.0)
    assert other.run_folder != pipeline.run_folder
    starts.clear()
    found = pipeline.changed(commitment=0.5)
    assert found.run_folder.is_dir()
    assert not starts
    alone, history = clvq.train(pipeline.activations("train"), found.config, found.layers)
    assert all(torch.equal(value, found.clvqvae.state_dict()[name]) for name, value in alone.state_dict().items())
    assert history["validation_loss"].tolist() == found.history["validation_loss"].tolist()
    for changed in (dict(seed=9), dict(n_codes=21), dict(start="random"), dict(train_share=0.9), dict(validation_share=0.3)):
        starts.clear()
        assert pipeline.changed(**changed).run_folder.is_dir()
        assert len(starts) == 1, changed


def test_the_concepts_of_the_pipeline_add_up_to_its_states(pipeline):
    assert pipeline.concepts["size"].sum() == len(pipeline.activations("train").tokens)


def test_evaluation_states_are_not_filtered_and_line_up_with_salience(pipeline):
    acts, (tokens, logits) = pipeline.activations("test"), pipeline.salience
    pd.testing.assert_frame_equal(acts.tokens, tokens.drop(columns="salience"))
    assert len(logits) == len(pipeline.test)
    trial = pipeline.trial
    assert (tokens.loc[trial.salient.numpy(), "sentence"].to_numpy() == np.arange(len(pipeline.test))).all()
    pd.testing.assert_frame_equal(pipeline.salient, tokens.loc[trial.salient.numpy()])
    assert trial.labels.tolist() == pipeline.test["label"].tolist() and trial.predicted.tolist() == logits.to_numpy().argmax(1).tolist()


def test_every_method_the_paper_compares_is_there_once_and_comes_back_from_the_cache_as_it_was(pipeline):
    source, target = pipeline.layers
    names = [method.name for method in pipeline.methods]
    assert len(set(names)) == len(names)
    assert {"CLVQ-VAE", f"single-layer VQ-VAE, layer {source}", f"single-layer VQ-VAE, layer {target}", *clvq.CLUSTERS.values(),
            "SAE 2048, encoder", "SAE 2048, decoder", "SAE 4096, decoder", "TopK SAE 2048, decoder", "random codes",
            "principal components", "class means"} <= set(names)
    assert [method.layer for method in pipeline.methods] == sorted(method.layer for method in pipeline.methods)
    acts = pipeline.activations("test")
    for one, other in zip(pipeline.methods, clvq.Pipeline(pipeline.config).methods, strict=True):
        assert (one.name, one.layer, one.reads, one.directions) == (other.name, other.layer, other.reads, other.directions)
        assert torch.equal(one.vectors, other.vectors)
        assert torch.equal(one.assign(acts.states[one.reads]), other.assign(acts.states[other.reads]))


def test_faithfulness_has_every_method_with_what_nothing_removed_gives(pipeline):
    results = pipeline.faithfulness
    assert set(results["method"]) == {method.name for method in pipeline.methods}
    nothing = results[results["removed"] == "nothing"].groupby(["layer", "sentence"])["predicted"].nunique()
    assert (nothing == 1).all()                                                              # the probes of a layer are the same for all
    summary = clvq.summarise(results, pipeline.config)
    assert len(summary) == len(results) / len(pipeline.test) and summary["change"].notna().all()


def test_evidence_in_a_file_is_compared_with_the_most_salient_words_of_its_own_sentences(pipeline, tmp_path, refused):
    rows = [{"text": "a gripping , moving film .", "label": 1, "rationale": "gripping , moving"},
            {"text": "it is dull", "label": 0, "rationale": "dull"}, {"text": "dull", "label": 0, "rationale": "dull"}]
    path = tmp_path / "evidence.jsonl"
    pd.DataFrame(rows).to_json(path, orient="records", lines=True)
    overlap, accuracy = pipeline.rationales(path)
    tokens, logits = clvq.attribute(pipeline.language_model, [row["text"] for row in rows], pipeline.layers[0], pipeline.config)
    words = tokens[~tokens["is_summary"]]
    top = words.loc[words.groupby("sentence")["salience"].idxmax(), "word"].tolist()
    assert overlap["sentence"].tolist() == [0, 1]
    assert overlap["hit"].tolist() == [int(top[0] in ("gripping", ",", "moving")), int(top[1] == "dull")]
    assert accuracy == pytest.approx(float((logits.argmax(1).numpy() == [1, 0, 0]).mean()))
    pd.DataFrame(rows).drop(columns="rationale").to_json(path, orient="records", lines=True)
    with refused("'rationale'"):
        pipeline.rationales(path)


def test_the_shift_test_across_layers_has_every_layer_above_the_embeddings(pipeline):
    results = pipeline.across_layers
    methods = {"random states", "random codes", "principal components", "class means"}
    assert results.groupby("layer")["method"].agg(set).to_dict() == {layer: methods for layer in range(1, 7)}
    assert set(results["shift"]) == {"0", "own"}
    own = results[(results["direction"] == -1) & (results["probe"] == "moved") & (results["method"] == "random codes")]
    frozen = pipeline.faithfulness.query("probe == 'frozen' and method == 'random codes'")
    expected = frozen.groupby(["removed", "way"], observed=True)["correct"].mean()
    for row in own[own["layer"] == pipeline.layers[0]].itertuples():
        assert row.accuracy == pytest.approx(expected[row.removed, row.way])


def test_a_failed_step_leaves_nothing_that_looks_finished(tmp_path):
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clvq.cached_step(tmp_path / "step-1", build)
    assert not (tmp_path / "step-1").exists()
    assert clvq.cached_step(tmp_path / "step-1", lambda folder: None).is_dir()


def test_two_at_once_build_a_step_once(tmp_path):
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        time.sleep(0.3)

    threads = [threading.Thread(target=clvq.cached_step, args=(tmp_path / "step-1", build)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(built) == 1


def test_kill_9_in_the_middle_of_extraction_loses_nothing_cached_and_leaves_nothing_half_written(tmp_path, pipeline):
    program = ("import clvq_core as clvq, sys\n"
               f"pipeline = clvq.Pipeline(clvq.configure('smoke', batch_tokens=64, **{QUICK}))\n"
               "print(pipeline.model_folder, flush=True)\n"
               "pipeline.activations('train')\n")
    env = {**os.environ, "CLVQ_CACHE": str(tmp_path), "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program], env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    while not (found := list(tmp_path.glob("states-*.partial/layer_*.npy"))) and process.poll() is None:
        time.sleep(0.005)
    assert found and process.poll() is None, "extraction ended before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    weights = next(tmp_path.glob("classifier-*/model.safetensors"))
    made = weights.stat().st_mtime_ns
    assert not [path for path in tmp_path.glob("states-*") if path.is_dir() and path.suffix != ".partial"]

    after = clvq.Pipeline(clvq.configure("smoke", batch_tokens=64, **QUICK), cache=tmp_path).activations("train")
    assert weights.stat().st_mtime_ns == made
    assert not list(tmp_path.glob("*.partial"))
    undisturbed = pipeline.activations("train")
    pd.testing.assert_frame_equal(after.tokens, undisturbed.tokens)
    for layer, states in after.states.items():
        torch.testing.assert_close(states.float(), undisturbed.states[layer].float(), atol=0.02, rtol=0)    # half precision, other batches


def test_the_states_that_training_will_have_are_known_before_anything_long_and_too_few_are_refused(pipeline, refused):
    acts = pipeline.activations("train")
    rows = acts.rows(clvq.split_sentences(len(acts.lengths), pipeline.config)[0])
    lost = acts.source["words_lost"]                                                         # to the tokenizer
    assert len(acts.tokens) <= pipeline.expected_states.sum() <= len(acts.tokens) + lost
    assert len(rows) <= pipeline.cost["states"] <= len(rows) + lost < len(acts.tokens)       # a part is held out
    fresh = pipeline.changed(data_seed=7)
    assert fresh.changed(n_codes=fresh.cost["states"]).check()
    with refused("n_codes", "lower n_codes or take more text"):
        fresh.changed(n_codes=fresh.cost["states"] + 1).check()


def test_a_model_is_tried_once_before_it_is_explained(pipeline, monkeypatch, tmp_path):
    tried = []
    monkeypatch.setattr(clvq, "check_model", lambda lm, layers: tried.append(tuple(layers)))
    assert pipeline.language_model and not tried                                             # that it passed is cached
    again = clvq.Pipeline(pipeline.config.replace(source_layer=2))
    assert again.language_model and again.language_model and tried == [(2, 6)]


# --- notebooks --------------------------------------------------------------------------------------------------------

def test_a_kernel_that_does_not_start_is_tried_again(tmp_path, monkeypatch):
    folder = tmp_path / "jupyter" / "kernels" / "python3"  # whatever kernel a notebook names
    folder.mkdir(parents=True)
    script = tmp_path / "shy.py"
    script.write_text(f"import pathlib, runpy, sys\nmark = pathlib.Path({str(tmp_path / 'tried')!r})\n"
                      "if not mark.exists():\n    mark.touch()\n    sys.exit(1)\n"
                      "sys.argv[0] = 'ipykernel_launcher'\nrunpy.run_module('ipykernel_launcher', run_name='__main__')\n")
    (folder / "kernel.json").write_text(json.dumps({"argv": [sys.executable, str(script), "-f", "{connection_file}"],
                                                    "display_name": "shy", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    result = clvq_app.run_notebook(write_notebook(tmp_path / "n.ipynb", "6 * 7", kernel="nlp-env"), tmp_path / "out.ipynb")
    assert (tmp_path / "tried").exists()
    assert outputs(result)[0].data["text/plain"] == "42"


def test_a_long_temporary_folder_is_no_trouble(tmp_path, monkeypatch):
    """Sockets in the file system may have names of 107 characters at most."""
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", None)
    result = clvq_app.run_notebook(write_notebook(tmp_path / "n.ipynb", "6 * 7"), tmp_path / "out.ipynb")
    assert outputs(result)[0].data["text/plain"] == "42"


@pytest.mark.parametrize("metadata", [{}, {"kernelspec": {"name": "nlp-env", "display_name": "other", "language": "python"}}])
def test_a_notebook_runs_with_this_environments_kernel_whatever_it_names(tmp_path, capsys, metadata):
    path = write_notebook(tmp_path / "n.ipynb", "import sys; sys.prefix", "text: str = ''", "scale, text")
    notebook = nbformat.read(path, 4)
    notebook.metadata = metadata
    notebook.cells[0].source += '\ntext: str = ""'
    del notebook.cells[2]
    nbformat.write(notebook, path)
    assert clvq_app.main(["run", str(path), "--scale", "smoke", "-p", "text", "2012", "-o", str(tmp_path / "out.ipynb")]) == 0
    prefix, text = (output["data"]["text/plain"] for output in outputs(tmp_path / "out.ipynb"))
    assert prefix == repr(sys.prefix) and text == "('smoke', '2012')"


def test_parameters_reach_the_notebook_and_progress_bars_do_not_stay_in_it(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "import sys\nprint('bar', file=sys.stderr)\nprint(scale, seed)")
    result = clvq_app.run_notebook(path, tmp_path / "out.ipynb", scale="laptop", parameters={"scale": "smoke", "seed": 7})
    assert [output.text for output in outputs(result)] == ["smoke 7\n"]
    assert "papermill" not in result.read_text() and str(tmp_path) not in result.read_text()
    assert nbformat.read(result, 4).metadata["clvq"]["parameters"] == {"scale": "smoke", "seed": 7}


def test_a_notebook_run_in_place_keeps_its_cells(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "import os\nos.environ['CLVQ_SCALE']")
    before = [cell.source for cell in nbformat.read(path, 4).cells]
    clvq_app.run_notebook(path, path, scale="laptop")
    assert [cell.source for cell in nbformat.read(path, 4).cells] == before
    assert outputs(path)[0].data["text/plain"] == "'laptop'"
    with pytest.raises(ValueError, match="in place takes no parameters"):
        clvq_app.run_notebook(path, path, parameters={"seed": 1})


def test_a_failed_notebook_is_kept_apart_and_the_old_output_stays(tmp_path):
    path, output = write_notebook(tmp_path / "n.ipynb", "1 / 0"), tmp_path / "out.ipynb"
    output.write_text("old")
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError.*out\.failed\.ipynb"):
        clvq_app.run_notebook(path, output)
    assert output.read_text() == "old"
    assert "ZeroDivisionError" in (tmp_path / "out.failed.ipynb").read_text()


def test_a_cell_that_takes_too_long_is_ended(tmp_path):
    path = write_notebook(tmp_path / "n.ipynb", "import time\ntime.sleep(600)")
    with pytest.raises(RuntimeError):
        clvq_app.run_notebook(path, tmp_path / "out.ipynb", timeout=2)


# --- the command line -------------------------------------------------------------------------------------------------

@pytest.mark.notebooks
def test_the_faithfulness_notebook_runs_on_the_news_from_the_command_line(tmp_path):
    done = subprocess.run([sys.executable, "-m", "clvq_app", "run", str(FAITHFULNESS), "--scale", "smoke", "-p", "dataset", "news",
                           "-o", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    text = "".join(output.get("text", "") or output.data.get("text/plain", "") for output in outputs(tmp_path / FAITHFULNESS.name)
                   if output.output_type != "display_data" or "text/plain" in output.data)
    assert "concepts that are removed most often" in text
    assert "widget" not in (tmp_path / FAITHFULNESS.name).read_text()                        # no bar of a library


CSV_WITHOUT_LABELS = "text,mood\n" + "".join(f"sentence number {i},{i % 2}\n" for i in range(40))


@pytest.mark.parametrize(("parameters", "sentence"), [
    (["dataset", "moovies"], r"unknown data set 'moovies'"),
    (["dataset", "FILE"], r"has no column 'label', only text, mood"),
    (["source_layer", "9"], r"source_layer 9 and target_layer 6 must be layers of model 'minilm' \(0 to 6\)"),
    (["layer", "4"], r"has no parameter 'layer'; it has scale, dataset"),
    (["model", "no/such-model"], r"unknown model 'no/such-model'"),
    (["n_codes", "many"], r"n_codes must be a whole number, not 'many'"),
    (["scale", "huge"], r"scale must be one of smoke, laptop, paper, authors, not 'huge'"),
])
def test_what_cannot_run_is_said_in_one_sentence_with_exit_code_2(parameters, sentence, tmp_path, capsys):
    (tmp_path / "reviews.csv").write_text(CSV_WITHOUT_LABELS)
    parameters = [str(tmp_path / "reviews.csv") if text == "FILE" else text for text in parameters]
    assert clvq_app.main(["run", str(FAITHFULNESS), "--scale", "smoke", "-o", str(tmp_path / "out"), "-p", *parameters]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and re.search(sentence, error), error
    assert not (tmp_path / "out").exists()


def test_a_notebook_that_does_not_exist_gives_exit_code_2(capsys):
    assert clvq_app.main(["run", "nowhere.ipynb"]) == 2
    assert "there is no notebook 'nowhere.ipynb'" in capsys.readouterr().err


def test_the_command_is_installed_and_its_help_has_examples():
    done = subprocess.run([sys.executable, "-m", "clvq_app", "run", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "examples:" in done.stdout and "-p dataset news" in done.stdout


def test_info_and_clean_speak_of_the_cache(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CLVQ_CACHE", str(tmp_path))
    clvq.cached_step(tmp_path / "step-1", lambda folder: (folder / "data").write_bytes(bytes(3 * 2**20)), step="step")
    assert clvq_app.main(["info"]) == 0
    assert "3 MiB" in (shown := capsys.readouterr().out) and str(tmp_path) in shown and "torch" in shown
    assert clvq_app.main(["clean", "--older-than", "1"]) == 0 and (tmp_path / "step-1").exists()
    assert clvq_app.main(["clean", "--dry-run"]) == 0 and (tmp_path / "step-1").exists()
    assert clvq_app.main(["clean"]) == 0 and not (tmp_path / "step-1").exists()
    assert "removed 1 cached step, 3 MiB" in capsys.readouterr().out


# --- a model's own head -----------------------------------------------------------------------------------------------


def test_a_head_with_its_classes_in_another_order_is_matched_by_their_names(minilm, tmp_path):
    pd.DataFrame({"text": [f"film {i} is {'good' if i % 3 else 'bad'}" for i in range(60)], "label": ["positive", "negative"] * 30}).to_csv(
        tmp_path / "reviews.csv", index=False
    )
    right = []
    for names in (["negative", "positive"], ["POSITIVE", "NEGATIVE"], ["LABEL_0", "LABEL_1"]):
        model, folder = copy.deepcopy(minilm.model), tmp_path / names[0]
        model.config.id2label, model.config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
        if names[0] == "POSITIVE":
            for weights in model.classifier.parameters():
                weights.data = weights.data.flip(0)
        model.save_pretrained(folder)
        minilm.tokenizer.save_pretrained(folder)
        config = clvq.configure("smoke", model=str(folder), finetune=False, dataset=str(tmp_path / "reviews.csv"), n_codes=10, folds=2,
                                answers="label_0, label_1" if names[0] == "LABEL_0" else "")
        pipeline = clvq.Pipeline(config, tmp_path)
        assert pipeline.label_names == (["positive", "negative"] if names[0] == "POSITIVE" else ["negative", "positive"])
        logits = clvq.predict(pipeline.language_model, clvq.encode(minilm, pipeline.test["text"].tolist(), config), config)
        right.append((logits.argmax(1).numpy() == pipeline.test["label"]).tolist())
    assert right[0] == right[1] == right[2] and 0 < np.mean(right[0]) < 1


# --- what a long step takes -------------------------------------------------------------------------------------------


def test_a_long_step_says_before_it_begins_what_it_takes_and_a_short_one_nothing(monkeypatch, capsys):
    monkeypatch.setattr(clvq, "training_speed", lambda: 2e11)
    clvq.announce_cost("training", 2.4e13, 3 * 2**30, 5 * 2**20)
    assert capsys.readouterr().err == "training: 24 TFLOP, about 2.0 min on this machine, at least 3.0 GiB of memory, 5 MiB on disk\n"
    clvq.announce_cost("training", 1e11, 2**30)
    assert capsys.readouterr().err == ""


def test_every_long_step_says_what_it_takes(monkeypatch, tmp_path, minilm, tiny_acts, tiny_config):
    said = []
    monkeypatch.setattr(clvq, "announce_cost", lambda what, operations, memory, disk=0: said.append((what.split(" ")[0], operations, memory)))  # noqa: E501
    texts, config = ["a dull film", "a moving film"], clvq.configure("smoke", finetune_epochs=2, salience_steps=2)
    clvq.finetune(copy.deepcopy(minilm), texts, torch.tensor([0, 1]), config)
    clvq.extract(minilm, texts, [3], config, tmp_path)
    clvq.attribute(minilm, texts, 3, config)
    clvq.train(tiny_acts, tiny_config, (0, 1))
    clvq.train_sae(tiny_acts, (0, 1), 64, 0, tiny_config)
    assert [what for what, _, _ in said] == ["fine-tuning", "extracting", "salience", "training", "training"]
    weights, sub_words = 6 * (4 * 384**2 + 2 * 384 * 1536 + 9 * 384 + 1536), 10  # MiniLM's blocks; [CLS] a dull film [SEP], twice
    passes = [2 * 6, 1, 2 * (1 + 2 * 2)]  # over all blocks: two epochs of training; up to block 3 of 6; to 3, then 2 points there and back
    assert [operations for _, operations, _ in said[:3]] == [n * weights * sub_words for n in passes]
    assert all(memory > 0 for _, _, memory in said)
