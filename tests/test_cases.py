"""Awkward models and files as people bring them, made by scripts beside a checkout: each works, or is refused in one sentence."""

import subprocess
import sys
from pathlib import Path

import pytest

import clvq_core as clvq

CASES = Path(__file__).parents[1].parent / "shared" / "cases"
pytestmark = pytest.mark.skipif(not CASES.is_dir(), reason="the cases are not here")
TINY = dict(
    n_codes=10, top_k=3, decoder_layers=1, decoder_heads=4, feedforward=32, epochs=1, folds=3, probe_epochs=3, max_tokens=60,
    salience_steps=2, bootstrap=20, precision="float32", finetune_epochs=1, train_sentences=60, test_sentences=45,
)  # fmt: skip
TEXT = "this kettle works well at this price ."
WORK = {
    "first": "albert bert bert_nli bert_padded_tokenizer bert_sharded_bf16 camembert roberta_130",
    "last": "gemma3_multi gpt2_cls llama_large_states llama_pad_outside qwen3 qwen3_cls",
}
MODELS = {name: summary for summary, names in WORK.items() for name in names.split()} | {
    "bart": "(bart) cannot be explained here: its head reads a decoder",
    "bert_bin": "this converts them: python -c",
    "bert_multilabel": "set label to the one to explain",
    "bert_one_output": "gives one number",
    "bert_quantized": "bitsandbytes",
    "bert_remote_code": "code of its own",
    "fnet": "the texts beside a text change its logits",
    "llama_gptq": "GPTQ",
    "longformer": "(longformer) cannot be explained here",
    "opt_projected": "(opt) cannot be explained here",
    "peft_only": "bert-base-uncased",
    "peft_with_config": "bert-base-uncased",
    "t5_cls": "(t5) cannot be explained here: its head reads a decoder",
    "xlnet": "(xlnet) cannot be explained here",
}
"""What the head reads of each model that works; a part of the sentence that refuses each other one."""


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    subprocess.run([sys.executable, str(CASES / "make_models.py"), str(folder)], check=True, capture_output=True)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for script in ("make_files.py", "make_parquet.py"):
        subprocess.run([sys.executable, str(CASES / script), str(folder)], check=True, capture_output=True)
    return folder


def pipeline(folder: Path, model: Path, data: Path, **settings) -> clvq.Pipeline:
    config = clvq.configure("smoke", **{**TINY, "model": str(model), "dataset": str(data), "finetune": False, **settings})
    return clvq.Pipeline(config, folder)


@pytest.mark.parametrize("name", [*MODELS])
def test_a_model_works_or_is_refused_before_long_work(name, models, files, tmp_path, refused):
    data = {"bert_nli": "three_names.csv", "roberta_130": "mid.csv"}.get(name, "plain.csv")
    run = pipeline(tmp_path, models / name, files / data, max_tokens=512)
    if MODELS[name] not in ("first", "last"):
        with pytest.raises(ValueError) as caught:
            run.check()
        assert MODELS[name] in str(caught.value) and "\n" not in str(caught.value)
        assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock" and not path.name.startswith(("door", "."))]
        return
    explanation = run.check().explain(TEXT)
    assert sum(explanation.chances.values()) == pytest.approx(1, abs=1e-5) and run.language_model.summary == MODELS[name]
    assert set(explanation.chances) == set(run.label_names) and run.explain(TEXT).words["change"].notna().all()
    if name == "bert_nli":  # whose third class is always ENTAILMENT
        assert explanation.chances["entailment"] > 0.999


def test_one_of_several_labels_is_explained_against_the_rest(models, files, tmp_path):
    run = pipeline(tmp_path, models / "bert_multilabel", files / "plain.csv", label="positive").check()
    assert run.label_names == ["not positive", "positive"] and set(run.explain(TEXT).chances) == set(run.label_names)
    assert run.corpus["label"].sum() == (clvq.load_corpus(run.config.subset(clvq.CorpusSettings))["label"] == 1).sum()


def test_classes_are_matched_by_name_or_not_at_all(models, files, tmp_path, refused):
    with refused("CONTRADICTION, NEUTRAL, ENTAILMENT", "c, e, n", "answers"):
        pipeline(tmp_path, models / "bert_nli", files / "short_names.csv").check()
    said = pipeline(tmp_path, models / "bert_nli", files / "short_names.csv", answers="contradiction, Entailment, NEUTRAL")
    assert said.label_names == ["c", "n", "e"] and said.check().explain(TEXT).chances["e"] > 0.999


SILENT = """array_one_line.jsonl array_pretty.jsonl bom.jsonl bom_crlf.csv bytes.parquet dictionary.parquet hindi.csv markup.csv mid.csv
newlines.csv numbered_columns.csv plain.csv saved_to_disk trailing_comma.csv trailing_comma3.csv unicode_marks.csv upper.CSV"""
FILES = dict.fromkeys(SILENT.split(), "") | {
    "all_long.csv": "240 texts cut",
    "cp1252.csv": "read as cp1252",
    "float_labels.csv": "whole numbers",
    "hidden_test": "validation is evaluated",
    "label_blanks.csv": "taken as 'negative'",
    "lone_surrogate.jsonl": "half a character",
    "one_class_long.csv": "120 texts cut",
    "semicolon.csv": "semicolons",
    "semicolon_no_comma.csv": "semicolons",
    "tokens.jsonl": "joined by blanks",
    "tokens.parquet": "joined by blanks",
}
"""A part of what is said of each file that is read."""
REFUSED = {"label_lists.jsonl": "lists", "label_lists.parquet": "lists", "label_objects.jsonl": "objects", "rare_class.csv": "4 of neutral"}


@pytest.mark.parametrize("name", [*FILES])
def test_a_file_is_read_and_what_was_guessed_is_said(name, files, capsys):
    columns = dict(text_column="0", label_column="1") if name == "numbered_columns.csv" else {}
    clvq.announce.cache_clear()
    corpus = clvq.load_corpus(clvq.configure("paper", dataset=str(files / name), **columns).subset(clvq.CorpusSettings))
    assert len(corpus) == (200 if name == "hidden_test" else 240) and len(corpus.attrs["label_names"]) == 2
    said = capsys.readouterr().err
    assert FILES[name] in said and said.count("\n") == bool(FILES[name])
    assert not corpus["text"].str.contains("[‘\\[]'?the", regex=True).any() and "\ud83d" not in "".join(corpus["text"])
    if name == "hindi.csv":
        assert {"केतली", "जल्दी"} <= set(clvq.split_words(" ".join(corpus["text"])))


@pytest.mark.parametrize("name", [*REFUSED])
def test_labels_that_are_no_classes_are_refused(name, files, refused):
    with refused(REFUSED[name]):
        clvq.load_corpus(clvq.configure("paper", dataset=str(files / name)).subset(clvq.CorpusSettings))
