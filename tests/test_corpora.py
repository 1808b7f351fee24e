"""Corpora: the embedded ones, files of one's own, splits, words, and the frequency filter on the paper's own text."""

import csv
import gzip
import hashlib
import json
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

import clvq_core as clvq

SHARED = Path(__file__).parents[1].parent / "shared" / "data"
ERASER = SHARED / "eraser_movies" / "movie_train.tok.txt.gz"
WRITERS = {
    ".csv": lambda frame, path: frame.to_csv(path, index=False),
    ".tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t"),
    ".jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True, force_ascii=False),
    ".parquet": lambda frame, path: frame.to_parquet(path),
}


def reviews(rows: int = 60) -> pd.DataFrame:
    """A small corpus with columns of its own names."""
    return pd.DataFrame(
        {
            "id": range(rows),
            "body": [f'Número {i}, “quoted”, a "comma, {"good" if i % 3 else "bad"} 🙂 film' for i in range(rows)],
            "stars": ["good" if i % 3 else "bad" for i in range(rows)],
        }
    )


def load(path: Path | str, **settings) -> pd.DataFrame:
    return clvq.load_corpus(clvq.configure("paper", dataset=str(path), **settings))


def save(frame: pd.DataFrame, path: Path) -> Path:
    WRITERS[path.suffix](frame, path)
    return path


# --- embedded corpora ---------------------------------------------------------------------------------------------


def test_movies_are_8530_sentences_in_two_balanced_classes():
    corpus = clvq.load_corpus(clvq.configure("paper"))
    assert len(corpus) == 8530
    assert corpus["label"].value_counts().to_dict() == {0: 4265, 1: 4265}
    assert corpus.attrs["label_names"] == ["negative", "positive"]
    assert corpus.attrs["dropped"] == {"without text or label": 0, "repeated": 0, "too long or empty": 0}
    assert (corpus["split"] == "test").sum() == 856
    assert corpus.loc[corpus["split"] == "test", "label"].value_counts().to_dict() == {0: 428, 1: 428}


def test_movies_are_the_texts_they_always_were():
    texts = "\n".join(sorted(clvq.read_movies()["text"]))
    assert hashlib.sha256(texts.encode()).hexdigest().startswith("b0721e174e78b2ba")


def test_news_are_2225_articles_of_which_120_repeat_others():
    frame = clvq.read_news()
    assert len(frame) == 2225 and frame["text"].duplicated().sum() == 120
    corpus = clvq.load_corpus(clvq.configure("paper", dataset="news"))
    assert len(corpus) == 2105
    assert corpus.attrs["dropped"] == {"without text or label": 0, "repeated": 120, "too long or empty": 0}
    assert corpus.attrs["label_names"] == ["business", "entertainment", "politics", "sports", "tech"]


def test_news_are_the_texts_they_always_were_without_broken_letters():
    frame = clvq.read_news()
    assert hashlib.sha256("\n".join(frame["text"]).encode()).hexdigest().startswith("df69d40d4e90a0d4")
    assert not frame["text"].str.contains("�").any()


# --- splits -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dataset", ["movies", "news"])
def test_the_split_is_stratified_and_no_text_stands_on_both_sides(dataset):
    corpus = clvq.load_corpus(clvq.configure("paper", dataset=dataset))
    train, test = (corpus[corpus["split"] == split] for split in ("train", "test"))
    assert not set(train["text"]) & set(test["text"])
    assert len(train) + len(test) == len(corpus) and list(corpus["split"]) == ["train"] * len(train) + ["test"] * len(test)
    shares = [part["label"].value_counts(normalize=True).sort_index().to_numpy() for part in (train, test)]
    np.testing.assert_allclose(*shares, atol=1 / len(test))


def test_the_split_depends_on_the_data_seed_alone():
    corpora = {seeds: clvq.load_corpus(clvq.configure("smoke", data_seed=seeds[0], seed=seeds[1])) for seeds in [(1, 1), (1, 2), (2, 1)]}
    pd.testing.assert_frame_equal(corpora[1, 1], corpora[1, 2])
    assert corpora[1, 1].attrs["hash"] == corpora[1, 2].attrs["hash"] != corpora[2, 1].attrs["hash"]
    tests = [set(corpora[seeds].query("split == 'test'")["text"]) for seeds in [(1, 1), (2, 1)]]
    assert len(tests[0] & tests[1]) < 0.2 * len(tests[0])


def test_as_many_sentences_are_kept_as_are_asked_for_and_classes_stay_in_proportion():
    corpus = clvq.load_corpus(clvq.configure("paper", dataset="news", train_sentences=300, test_sentences=100))
    assert corpus["split"].value_counts().to_dict() == {"train": 300, "test": 100}
    whole = clvq.load_corpus(clvq.configure("paper", dataset="news"))["label"].value_counts(normalize=True).sort_index()
    kept = corpus.query("split == 'train'")["label"].value_counts(normalize=True).sort_index()
    np.testing.assert_allclose(kept, whole, atol=0.005)


def test_a_limit_just_below_what_there_is_holds_too(tmp_path):
    frame = reviews(100).assign(stars=lambda f: f["id"] % 5)
    path = save(frame, tmp_path / "five.csv")
    corpus = load(path, text_column="body", label_column="stars", test_sentences=20, train_sentences=78)
    assert corpus["split"].value_counts().to_dict() == {"train": 78, "test": 20}


def test_longer_texts_of_ones_own_are_cut_counted_and_said(tmp_path, capsys):
    frame = reviews()
    frame.loc[[0, 1, 2], "body"] = ["word " * 299, "Word, " * 300, "once " * 300]
    corpus = load(path := save(frame, tmp_path / "long.csv"), text_column="body", label_column="stars")
    assert len(corpus) == 60 and max(len(clvq.split_words(text)) for text in corpus["text"]) == 299
    assert corpus.attrs["notes"] == ["2 texts cut to 299 words (max_words)"] and f"{path}: 2 texts cut" in capsys.readouterr().err
    authors = load(path, text_column="body", label_column="stars", words="whitespace", max_words=2)
    assert set(authors["text"].str.split().map(len)) == {2}


def test_longer_texts_of_the_papers_corpora_are_dropped_and_counted():
    corpus = clvq.load_corpus(clvq.configure("paper", dataset="news", max_words=30))
    assert corpus.attrs["dropped"]["too long or empty"] > 500 and max(len(clvq.split_words(text)) for text in corpus["text"]) == 30


# --- files of one's own -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITERS)
def test_a_file_with_its_own_column_names_gives_its_texts_and_labels(tmp_path, suffix):
    frame = reviews()
    corpus = load(save(frame, tmp_path / f"reviews{suffix}"), text_column="body", label_column="stars")
    assert corpus.columns.tolist() == ["text", "label", "split"] and corpus.attrs["label_names"] == ["bad", "good"]
    expected = dict(zip(frame["body"], frame["stars"], strict=True))
    found = {text: corpus.attrs["label_names"][k] for text, k in zip(corpus["text"], corpus["label"], strict=True)}
    assert found == expected
    assert (corpus["split"] == "test").sum() == 12


def test_other_columns_that_are_called_text_and_label_do_no_harm(tmp_path):
    frame = reviews().assign(text="another", label="another")
    corpus = load(save(frame, tmp_path / "both.csv"), text_column="body", label_column="stars")
    assert set(corpus["text"]) == set(frame["body"]) and corpus.attrs["label_names"] == ["bad", "good"]


def test_labels_that_are_numbers_are_classes_in_the_order_of_the_numbers(tmp_path):
    frame = reviews(200).assign(stars=lambda f: f["id"] % 11)
    corpus = load(save(frame, tmp_path / "stars.parquet"), text_column="body", label_column="stars")
    assert corpus.attrs["label_names"] == [str(k) for k in range(11)]
    stars = dict(zip(frame["body"], frame["stars"], strict=True))
    assert all(stars[text] == k for text, k in zip(corpus["text"], corpus["label"], strict=True))


def test_a_files_own_split_is_kept(tmp_path):
    frame = reviews(90).assign(split=lambda f: np.where(f["id"] < 40, "test", np.where(f["id"] < 80, "train", "other")))
    corpus = load(save(frame, tmp_path / "own.jsonl"), text_column="body", label_column="stars")
    assert corpus["split"].value_counts().to_dict() == {"test": 40, "train": 40}
    own = dict(zip(frame["body"], frame["split"], strict=True))
    assert all(own[text] == split for text, split in zip(corpus["text"], corpus["split"], strict=True))


def test_repeated_texts_are_dropped_even_across_a_files_own_split(tmp_path):
    frame = reviews(80).assign(split=lambda f: np.where(f["id"] < 40, "train", "test"))
    frame.loc[40:44, "body"] = frame.loc[0:4, "body"].to_numpy()
    corpus = load(save(frame, tmp_path / "twice.csv"), text_column="body", label_column="stars")
    assert corpus["text"].is_unique and corpus.attrs["dropped"]["repeated"] == 5 and len(corpus) == 75


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("word", ["None", "NA"])
def test_texts_and_labels_that_read_like_a_missing_value_are_texts_and_labels(tmp_path, suffix, word):
    frame = reviews().replace({"stars": {"bad": word}})
    frame.loc[1, "body"] = word
    corpus = load(save(frame, tmp_path / f"none{suffix}"), text_column="body", label_column="stars")
    assert set(corpus.attrs["label_names"]) == {word, "good"} and word in set(corpus["text"])


# --- refusals -----------------------------------------------------------------------------------------------------


def test_a_data_set_that_does_not_exist_is_refused_with_what_there_is(refused, tmp_path):
    with refused("'moovies'", "movies", "news", ".csv"):
        load(Path("moovies"))
    with refused("missing.csv"):
        load(tmp_path / "missing.csv")


def test_a_file_of_another_kind_is_refused_with_the_kinds_that_can_be_read(refused, tmp_path):
    path = tmp_path / "reviews.xlsx"
    path.write_bytes(b"")
    with refused("reviews.xlsx", *WRITERS):
        load(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [("empty.csv", b""), ("bad.csv", b"\xff\xfe\x00"), ("bad.jsonl", b'{"text": \n'), ("bad.parquet", b"no parquet")],
)
def test_a_file_that_is_broken_is_refused_with_the_readers_reason(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=rf"^\S*{name} cannot be read as {name.split('.')[1]}: [^\n]+$"):
        load(tmp_path / name)


@pytest.mark.parametrize(("column", "option"), [("body", "text_column"), ("stars", "label_column")])
def test_a_column_that_is_missing_is_refused_with_the_columns_there_are(refused, tmp_path, column, option):
    path = save(reviews().rename(columns={column: "other"}), tmp_path / "reviews.csv")
    with refused(repr(column), "other", option):
        load(path, text_column="body", label_column="stars")


@pytest.mark.parametrize("empty", [None, "", " \t"])
@pytest.mark.parametrize("suffix", WRITERS)
def test_rows_without_text_or_label_are_dropped_counted_and_said(tmp_path, capsys, suffix, empty):
    frame = reviews()
    frame.loc[[6, 9], "body"] = empty
    frame.loc[[9, 12], "stars"] = empty
    corpus = load(save(frame, tmp_path / f"gap{suffix}"), text_column="body", label_column="stars")
    assert len(corpus) == 57 and corpus.attrs["dropped"]["without text or label"] == 3
    assert "3 rows dropped as without text or label" in capsys.readouterr().err


@pytest.mark.parametrize("column", ["body", "stars"])
def test_a_column_of_gaps_is_refused(refused, tmp_path, column):
    with refused("text" if column == "body" else "label", "any of 60 rows"):
        load(save(reviews().assign(**{column: None}), tmp_path / "gap.csv"), text_column="body", label_column="stars")


TABLE = "body,stars\n" + "".join(f"text {i},{'good' if i % 2 else 'bad'}\n" for i in range(40))


@pytest.mark.parametrize(
    "name, text, note",
    [
        ("a.csv", TABLE.replace(",", ";"), "semicolons"),
        ("a.csv", TABLE.replace(",", "\t"), "tabs"),
        ("a.txt", TABLE.replace(",", "|"), "bars"),
        ("A.CSV", TABLE.replace("text", "one; two; three:"), ""),
        ("a.csv", TABLE.replace("\n", "\r\n"), ""),
        ("a.csv", "\ufeff" + TABLE, ""),
        ("a.csv", TABLE.replace("good\n", "good,\n").replace("bad\n", "bad,,\n"), ""),
        ("a.csv", TABLE.replace("text 7", '"text 7'), "quotation marks read as text"),
        ("a.csv", TABLE.replace("text 7,", '"text 7,').replace("text 12", 'text" 12'), "quotation marks read as text"),
        ("a.csv", TABLE.replace("text 7", '"text\n7, or ""7"""'), ""),
        ("a.csv", TABLE.replace("body,stars", " Body , STARS"), ""),
    ],
)
def test_separators_marks_and_headers_of_a_file_are_found(tmp_path, name, text, note):
    (tmp_path / name).write_bytes(text.encode())
    corpus = load(tmp_path / name, text_column="body", label_column="stars")
    assert len(corpus) == 40 and corpus["label"].tolist().count(1) == 20
    assert [note in line for line in corpus.attrs["notes"]] == [True] * bool(note)


@pytest.mark.parametrize(
    "encoding, said", [("utf-8-sig", []), ("utf-16", []), ("cp1252", ["read as cp1252"]), ("cp1251", ["read as cp1251"])]
)
def test_encodings_are_found_and_said(tmp_path, encoding, said):
    words = "хороший фильм, очень понравился" if encoding == "cp1251" else "naïve café – “quoted”"
    frame = reviews().assign(body=[f"{words} {i}" for i in range(60)])
    frame.to_csv(tmp_path / "a.csv", index=False, encoding=encoding)
    corpus = load(tmp_path / "a.csv", text_column="body", label_column="stars")
    assert corpus["text"].str.startswith(words).all() and corpus.attrs["notes"] == said


@pytest.mark.parametrize("compression", ["gz", "zip", "xz", "bz2"])
def test_compressed_files_are_read(tmp_path, compression):
    frame = reviews()
    frame.to_csv(tmp_path / f"a.csv.{compression}", index=False)
    frame.to_json(tmp_path / f"b.jsonl.{compression}", orient="records", lines=True)
    for path in tmp_path.iterdir():
        assert len(load(path, text_column="body", label_column="stars")) == 60


def test_json_may_be_an_array_or_lines_and_hold_objects(tmp_path, refused):
    records = [{"meta": {"body": f"text {i}"}, "label": {"name": "ab"[i % 2]}} for i in range(40)]
    for name, text in (("a.json", json.dumps(records, indent=1)), ("b.jsonl", json.dumps(records)),
                       ("c.jsonl", "\n".join(map(json.dumps, records)) + "\n\n")):  # fmt: skip
        (tmp_path / name).write_text(text)
        corpus = load(tmp_path / name, text_column="meta.body", label_column="label.name")
        assert len(corpus) == 40 and corpus.attrs["label_names"] == ["a", "b"]
    with refused("objects", "label.name"):
        load(tmp_path / "a.json", text_column="meta.body")
    with refused("no column 'title', only body"):
        load(tmp_path / "a.json", text_column="meta.title", label_column="label.name")
    (tmp_path / "d.json").write_text("[1, 2]")
    with refused("cannot be read as json", "objects"):
        load(tmp_path / "d.json")


@pytest.mark.parametrize(
    "labels, names, notes",
    [
        (["pos", "Pos ", "neg", "pos"], ["neg", "pos"], ["label 'Pos ' taken as 'pos'"]),
        ([0.0, 1.0, 1.0, 0.0], ["0", "1"], ["whole numbers"]),
        (["0.0", "1.0", "10", "2"], ["0", "1", "2", "10"], ["whole numbers"]),
        ([True, False, False, True], ["False", "True"], []),
        ([b"x", b"y", b"y", b"x"], ["x", "y"], []),
        (pd.Categorical(["x", "y", "x", "y"]), ["x", "y"], []),
        ([1.5, 2.5, 1.5, 2.5], ["1.5", "2.5"], []),
    ],
)
def test_labels_that_mean_the_same_are_one_class(tmp_path, labels, names, notes):
    label = pd.Series(labels).iloc[np.arange(80) % 4].reset_index(drop=True)
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(80)], "label": label})
    frame.to_parquet(tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet")
    assert corpus.attrs["label_names"] == names and len(corpus) == 80
    assert len(corpus.attrs["notes"]) == len(notes) and all(note in said for note, said in zip(notes, corpus.attrs["notes"], strict=True))


def test_lists_as_labels_are_refused_and_lists_of_tokens_joined(tmp_path, refused):
    frame = pd.DataFrame({"text": [["a", "text", str(i)] for i in range(40)], "label": [["a"], ["b"]] * 20, "kind": ["a", "b"] * 20})
    frame.to_parquet(tmp_path / "a.parquet")
    with refused("lists"):
        load(tmp_path / "a.parquet")
    corpus = load(tmp_path / "a.parquet", label_column="kind")
    assert corpus["text"].str.startswith("a text ").all() and corpus.attrs["notes"] == ["lists of tokens joined by blanks"]


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "empty"), ("text,label\n", "at least 10 rows"), ("text,label\na,b\nc,d,e\n", "row 2 has 3 fields"),
        ("text,text\na,b\n", "two columns named 'text'"), ("text\na\n", "no column 'label', only text"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_table_is_refused(tmp_path, refused, text, part):
    (tmp_path / "a.csv").write_text(text)
    with refused(part):
        load(tmp_path / "a.csv")


def test_hidden_labels_of_a_test_split_give_way_to_the_validation_split(tmp_path):
    names = datasets.ClassLabel(names=["bad", "good"])
    features = datasets.Features({"text": datasets.Value("string"), "label": names})
    for split, rows, known in (("train", 60, True), ("validation", 20, True), ("test", 30, False)):
        table = {"text": [f"{split} {i}" for i in range(rows)], "label": [i % 2 if known else -1 for i in range(rows)]}
        datasets.Dataset.from_dict(table, features).to_parquet(tmp_path / f"{split}.parquet")
    corpus = load(tmp_path)
    assert corpus["split"].value_counts().to_dict() == {"train": 60, "test": 20}
    assert corpus.attrs["notes"] == ["split test has no labels, so validation is evaluated"]
    assert corpus.loc[corpus["split"] == "test", "text"].str.startswith("validation").all()


def test_a_folder_that_was_saved_to_disk_is_read(tmp_path):
    whole = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(60)], "label": ["a", "b"] * 30})
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.map(lambda row: {"text": f"new {row['text']}"})).save_to_disk(tmp_path / "two")
    assert len(load(tmp_path / "one")) == 60
    assert load(tmp_path / "two")["split"].value_counts().to_dict() == {"train": 60, "test": 60}


def test_labels_of_mixed_kinds_are_classes_by_their_text(tmp_path):
    frame = reviews().assign(stars=lambda f: [1 if i % 2 else "one" for i in f["id"]])
    path = tmp_path / "mixed.jsonl"
    WRITERS[".jsonl"](frame, path)
    assert set(load(path, text_column="body", label_column="stars").attrs["label_names"]) == {"1", "one"}


def test_one_class_alone_is_refused(refused, tmp_path):
    path = save(reviews().assign(stars="good"), tmp_path / "one.csv")
    with refused("two classes", "good"):
        load(path, text_column="body", label_column="stars")


@pytest.mark.parametrize("rows", [0, 1, 3, 20])
def test_too_few_rows_are_refused(refused, tmp_path, rows):
    path = save(reviews(rows), tmp_path / "few.csv")
    with refused("needs at least"):
        load(path, text_column="body", label_column="stars")


@pytest.mark.parametrize("value", ["train", "validation"])
def test_a_split_column_without_test_rows_is_refused(refused, tmp_path, value):
    path = save(reviews().assign(split=value), tmp_path / "split.csv")
    with refused("'split'", "'test'"):
        load(path, text_column="body", label_column="stars")


@pytest.mark.parametrize("side", ["train", "test"])
def test_a_split_with_one_class_alone_on_a_side_is_refused(refused, tmp_path, side):
    frame = reviews(90).sort_values("stars", ignore_index=True)
    one = frame["stars"].eq("good") & (frame.index < 60)
    frame["split"] = np.where(one, side, {"train": "test", "test": "train"}[side])
    with refused(f"'{side}'"):
        load(save(frame, tmp_path / "side.csv"), text_column="body", label_column="stars")


def test_a_class_that_would_lose_all_its_rows_to_a_limit_is_named_with_the_limit(refused, tmp_path):
    frame = reviews(4020).assign(stars=lambda f: np.where(f["id"] < 20, "rare", np.where(f["id"] % 2, "good", "bad")))
    path = save(frame, tmp_path / "rare.csv")
    columns = dict(text_column="body", label_column="stars")
    with refused("'train'", "class rare", "train_sentences=60"):
        load(path, **columns, train_sentences=60)
    with refused("'test'", "class rare", "test_sentences=60"):
        load(path, **columns, test_sentences=60)
    corpus = load(path, **columns, train_sentences=200)
    assert corpus.groupby(["split", "label"]).size().min() >= 1 and (corpus["split"] == "train").sum() == 200


# --- words --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("it's a so-so film.", ["it's", "a", "so-so", "film", "."]),
        ("don’t “stop”!", ["don’t", "“", "stop", "”", "!"]),
        ("a state-of-the-art U.S.A. movie...", ["a", "state-of-the-art", "U.S.A", ".", "movie", ".", ".", "."]),
        ("rock'n'roll, 'quoted'", ["rock'n'roll", ",", "'", "quoted", "'"]),
        ("well - then--so", ["well", "-", "then", "-", "-", "so"]),
        ("café Žižek фильм, cafe\u0301", ["café", "Žižek", "фильм", ",", "cafe\u0301"]),
        ("केतली जल्दी टूट गई ।", ["केतली", "जल्दी", "टूट", "गई", "।"]),
        ("이 영화는 مَرْحَبًا", ["이", "영화는", "مَرْحَبًا"]),
        ("映画は面白い、よ!", ["映", "画", "は", "面", "白", "い", "、", "よ", "!"]),
        ("ไม่ดี", ["ไ", "ม่", "ดี"]),
        ("3.5/5 or $10", ["3.5", "/", "5", "or", "$", "10"]),
        ("great 🙂👍🏽 👩‍👩‍👧", ["great", "🙂", "👍🏽", "👩‍👩‍👧"]),
        ("\ttwo\n lines ", ["two", "lines"]),
        ("   ", []),
    ],
)
def test_words_are_letters_with_inner_marks_and_single_marks(text, words):
    assert clvq.split_words(text) == words


@given(st.text())
def test_words_hold_every_character_but_blanks_and_no_blank(text):
    words = clvq.split_words(text)
    assert "".join(words) == "".join(text.split())
    assert all(word and not any(c.isspace() for c in word) for word in words)


def test_the_authors_words_are_what_blanks_separate():
    assert clvq.split_words("it 's  a so-so film .", "whitespace") == ["it", "'s", "a", "so-so", "film", "."]


# --- the frequency filter -----------------------------------------------------------------------------------------


def table(sentences: list[list[str]]) -> pd.DataFrame:
    """A token table as `align_words` makes it, without a language model."""
    with_summary = [["<s>", *words] for words in sentences]
    lengths = np.array([len(words) for words in with_summary])
    position = np.concatenate([np.arange(n) for n in lengths])
    return pd.DataFrame({"sentence": np.repeat(np.arange(len(lengths)), lengths), "position": position,
                         "word": [word for words in with_summary for word in words], "is_summary": position == 0})  # fmt: skip


@pytest.fixture(scope="module")
def eraser() -> pd.DataFrame:
    if not ERASER.exists():
        pytest.skip("the paper's sentences are not beside the repository")
    with gzip.open(ERASER, "rt", encoding="utf8") as file:
        return table([clvq.split_words(line, "whitespace") for line in file])


def keep(tokens: pd.DataFrame, policy: str, **settings) -> pd.DataFrame:
    config = clvq.configure("paper", frequency_filter=policy, min_count=5, max_count=20, **settings)
    return tokens[clvq.frequency_filter(tokens, config)]


def words_per_sentence(kept: pd.DataFrame) -> np.ndarray:
    """Kept words a sentence in the first and in the last tenth of the corpus."""
    words = np.bincount(kept.loc[~kept["is_summary"], "sentence"], minlength=kept["sentence"].max() + 1)
    tenths = np.array_split(words, 10)
    return np.array([tenths[0].mean(), tenths[-1].mean()])


def test_the_papers_sentences_give_its_81456_vectors_and_longest_sequence_of_61(eraser):
    kept = keep(eraser, "first")
    assert kept["is_summary"].sum() == 13_878
    assert (~kept["is_summary"]).sum() == 67_578
    assert len(kept) == 81_456
    assert kept.groupby("sentence").size().max() == 61  # 60 words and the summary


def test_a_uniform_choice_keeps_as_many_of_each_word_as_the_first_ones_but_spreads_them_over_the_corpus(eraser):
    first, uniform = keep(eraser, "first"), keep(eraser, "uniform")
    counts = [kept.loc[~kept["is_summary"], "word"].value_counts().sort_index() for kept in (first, uniform)]
    pd.testing.assert_series_equal(*counts)
    assert counts[0].between(5, 20).all()
    np.testing.assert_allclose(words_per_sentence(first), [10.0, 2.7], atol=0.05)
    begin, end = words_per_sentence(uniform)
    assert abs(begin - end) < 0.1 * (begin + end)


def test_the_uniform_choice_depends_on_the_data_seed_alone():
    tokens = table([["a", "b"]] * 100)
    rows = [keep(tokens, "uniform", data_seed=data, seed=seed).index for data, seed in ((1, 1), (1, 2), (2, 1))]
    assert rows[0].equals(rows[1]) and not rows[0].equals(rows[2])
    assert not rows[0].equals(keep(tokens, "first").index)


@given(
    sentences=st.lists(st.lists(st.sampled_from("abcdefg"), max_size=12), min_size=1, max_size=20),
    policy=st.sampled_from(["uniform", "first"]), low=st.integers(1, 5), high=st.integers(1, 6),
)  # fmt: skip
def test_the_filter_keeps_every_summary_and_the_right_number_of_each_word(sentences, policy, low, high):
    tokens = table(sentences)
    config = clvq.configure("paper", frequency_filter=policy, min_count=low, max_count=high)
    kept = tokens[clvq.frequency_filter(tokens, config)]
    assert kept["is_summary"].sum() == len(sentences)
    seen, left = (t.loc[~t["is_summary"], "word"].value_counts() for t in (tokens, kept))
    assert left.to_dict() == {word: min(n, high) for word, n in seen.items() if n >= low}
    if policy == "first":
        for word, part in tokens[~tokens["is_summary"]].groupby("word"):
            assert kept.index[(kept["word"] == word) & ~kept["is_summary"]].equals(part.index[: left.get(word, 0)])


def test_no_filter_keeps_everything():
    tokens = table([["a", "b"], ["a"]])
    assert clvq.frequency_filter(tokens, clvq.configure("paper", frequency_filter="none")).all()


# --- the paper's corpora as they are published ----------------------------------------------------------------------

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the published corpora are not here")


def eraser_folder(folder: Path, reviews: int = 12) -> Path:
    """ERASER's own layout: reviews of five sentences; two pieces of evidence in one sentence, and one over two sentences. The first
    review says the same in both splits."""
    (folder / "docs").mkdir(parents=True)
    for name in ("train", "val"):
        lines = []
        for i in range(reviews):
            kind, word = ("POS", "fine") if i % 3 else ("NEG", "dull")
            tag = f"{name} {i}" if i else "0"
            second = f"a {word} film , with {word} actors {tag} ."
            sentences = [f"review {tag} .", second, f"it begins {tag}", f"and ends {word} .", "so it goes ."]
            (folder / "docs" / f"{name}{i}.txt").write_text("\n".join(sentences), "utf8")
            where = [(1, 2, f"{word} film"), (1, 2, f"{word} actors"), (2, 4, f"begins {tag} and ends {word}")]
            evidences = [[{"docid": f"{name}{i}.txt", "start_sentence": a, "end_sentence": b, "text": text}] for a, b, text in where]
            lines.append(json.dumps({"annotation_id": f"{name}{i}.txt", "classification": kind, "evidences": evidences}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines), "utf8")
    return folder


def kaggle(toxic: int = 40, others: int = 60) -> pd.DataFrame:
    """Rows as in Kaggle's train.csv, one of them twice."""
    rows = [(f"comment {i}, \n{'rude' if i < toxic else 'kind'}", int(i < toxic)) for i in range(toxic + others)]
    frame = pd.DataFrame([*rows, rows[-1]], columns=["comment_text", "toxic"])
    return frame.assign(id=frame.index, insult=frame["toxic"], threat=0)


@pytest.mark.parametrize("form", ["folder", "folder above", "tar", "tar.gz"])
def test_eraser_gives_the_sentences_of_each_piece_of_evidence(tmp_path, form):
    folder = eraser_folder(tmp_path / "data" / "movies")
    path = {"folder": folder, "folder above": folder.parent}.get(form, tmp_path / f"movies.{form}")
    if form.startswith("tar"):
        with tarfile.open(path, "w:gz" if form.endswith("gz") else "w") as archive:
            archive.add(folder, "movies")
    frame = clvq.read_eraser(path, clvq.configure("paper"))
    train = frame[frame["split"] == "train"]
    assert len(train) == 36 and train["label"].value_counts().to_dict() == {"positive": 24, "negative": 12}
    assert train.iloc[5].tolist() == ["it begins train 1 and ends fine .", "positive", "train", "begins train 1 and ends fine"]
    test = frame[frame["split"] == "test"]
    assert test["label"].value_counts().to_dict() == {"positive": 12, "negative": 12}


@pytest.mark.parametrize("place", ["absolute", "above", "link", "docs", "missing", "tar"])
def test_eraser_reads_no_file_outside_its_reviews(tmp_path, refused, place):
    folder, secret = eraser_folder(tmp_path / "movies"), tmp_path / "secret.txt"
    secret.write_text("a secret\n" * 5, "utf8")
    names = {"absolute": str(secret), "above": "../../secret.txt", "missing": "none.txt", "docs": "secret.txt"}
    if place in ("link", "tar"):
        (folder / "docs" / "link.txt").symlink_to(secret)
    if place == "docs":
        (folder / "docs").rename(tmp_path / "reviews")
        (folder / "docs").symlink_to(tmp_path)
    lines = (folder / "train.jsonl").read_text("utf8").replace("train3.txt", names.get(place, "link.txt"))
    (folder / "train.jsonl").write_text(lines, "utf8")
    path = folder
    if place == "tar":
        path = tmp_path / "movies.tar"
        with tarfile.open(path, "w") as archive:
            archive.add(folder, "movies")
    with refused("neither a folder nor a tar" if place == "tar" else "not a file in docs"):
        clvq.read_eraser(path, clvq.configure("paper"))


@pytest.mark.parametrize("line", ["{", "[1]", '{"evidences": [[{"docid": "train1.txt"}]]}'])
def test_what_is_not_in_erasers_format_is_refused(tmp_path, refused, line):
    folder = eraser_folder(tmp_path / "movies")
    (folder / "train.jsonl").write_text(line, "utf8")
    with refused("ERASER's format"):
        clvq.read_eraser(folder, clvq.configure("paper"))


@pytest.mark.parametrize("pattern", ["{}/out/rows.csv", "../out/rows.csv"])
def test_a_folders_readme_opens_no_file_outside_it(tmp_path, refused, pattern):
    for name in ("out", "data"):
        (tmp_path / name).mkdir()
        save(reviews(), tmp_path / name / "rows.csv")
    columns = dict(text_column="body", label_column="stars")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    assert len(load(tmp_path / "data", **columns)) == len(load(tmp_path / "link", **columns)) == 60
    readme = f'---\nconfigs:\n- config_name: default\n  data_files: "{pattern.format(tmp_path)}"\n---\n'
    (tmp_path / "data" / "README.md").write_text(readme)
    with refused("outside the folder"):
        load(tmp_path / "data", **columns)


def test_jigsaw_with_other_classes_is_refused(tmp_path, refused):
    path = save(kaggle().assign(toxic=lambda f: f["toxic"] * 2), tmp_path / "train.csv")
    with refused("'toxic'"):
        load(f"jigsaw:{path}")


def test_a_sentence_with_two_pieces_of_evidence_stays_twice_but_not_on_both_sides(tmp_path):
    corpus = load(f"eraser-movie:{eraser_folder(tmp_path / 'movies', 30)}", max_words=20)
    train, test = (corpus[corpus["split"] == split] for split in ("train", "test"))
    assert len(test) == 60 and len(train) == 87 and train["text"].duplicated().sum() == 29
    assert corpus.attrs["dropped"] == {"without text or label": 0, "repeated": 3, "too long or empty": 0}
    assert not set(train["text"]) & set(test["text"])
    assert (corpus["rationale"].str.split().str.len() < corpus["text"].str.split().str.len()).all()


def test_what_eraser_has_on_the_hub_gives_the_same_sentences(tmp_path, monkeypatch):
    folder, hub = eraser_folder(tmp_path / "movies"), tmp_path / "hub"
    hub.mkdir()
    for name, split in (("train", "train"), ("val", "validation"), ("val", "test")):
        reviews = [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        rows = {"review": [(folder / "docs" / r["annotation_id"]).read_text() for r in reviews],
                "label": [int(r["classification"] == "POS") for r in reviews],
                "evidences": [[part["text"] for group in r["evidences"] for part in group] for r in reviews]}
        features = datasets.Features(review=datasets.Value("string"), label=datasets.ClassLabel(names=["NEG", "POS"]),
                                     evidences=datasets.List(datasets.Value("string")))
        datasets.Dataset.from_dict(rows, features).to_parquet(hub / f"{split}-00000-of-00001.parquet")
    monkeypatch.setattr(clvq, "ERASER_ON_HUB", str(hub))
    settings = clvq.configure("paper")
    pd.testing.assert_frame_equal(clvq.read_eraser(None, settings), clvq.read_eraser(folder, settings))


@needs_shared
def test_eraser_movies_are_the_papers_sentences():
    path = SHARED / "eraser_movies" / "eraser_movies.tar.gz"
    frame = clvq.read_eraser(path, clvq.configure("paper"))
    train = frame[frame["split"] == "train"]
    with gzip.open(SHARED / "eraser_movies" / "clvqvae_sentences_train.jsonl.gz", "rt") as file:
        theirs = pd.DataFrame(map(json.loads, file))
    assert len(train) == 13878
    ours = zip(train["text"], train["label"] == "positive", train["rationale"], strict=True)
    parts = theirs["evidence"].map(lambda part: part["text"])
    assert Counter(ours) == Counter(zip(theirs["sentence"].str.strip(), theirs["label"] == 1, parts, strict=True))
    corpus = load(f"eraser-movie:{path}")
    assert corpus.loc[corpus["split"] == "test", "label"].value_counts().to_dict() == {0: 428, 1: 428}
    assert (corpus["split"] == "train").sum() > 13870 and corpus.attrs["name"] == "eraser-movie"
    assert all(" ".join(r.split()) in " ".join(t.split()) for r, t in zip(corpus["rationale"], corpus["text"], strict=True))


def test_jigsaw_is_balanced_and_keeps_the_kinds_of_toxicity(tmp_path):
    path = save(kaggle(), tmp_path / "train.csv")
    corpus = load(f"jigsaw:{path}")
    assert corpus.attrs["label_names"] == ["not toxic", "toxic"] and corpus.columns.tolist()[:2] == ["text", "label"]
    assert corpus.groupby(["split", "label"]).size().to_dict() == {("train", 0): 37, ("train", 1): 37, ("test", 0): 3, ("test", 1): 3}
    assert corpus["insult"].tolist() == corpus["label"].tolist() and corpus["text"].is_unique
    own = save(kaggle().assign(split=["train", "dev"] * 50 + ["extra"]), tmp_path / "split.csv")
    assert load(f"jigsaw:{own}")["split"].value_counts().to_dict() == {"train": 50, "test": 50}


@needs_shared
def test_jigsaw_has_the_papers_9000_and_784_rows():
    corpus = load(f"jigsaw:{SHARED / 'jigsaw' / 'jigsaw_balanced_10k.csv.gz'}", words="whitespace")
    assert corpus["split"].value_counts().to_dict() == {"train": 9000 - corpus.attrs["dropped"]["repeated"], "test": 784}
    assert corpus.attrs["dropped"]["repeated"] <= 1 and corpus.attrs["dropped"]["too long or empty"] == 0


@pytest.mark.parametrize("form", ["folder", "file"])
def test_ag_news_is_title_and_description(tmp_path, form):
    rows = [(1 + i % 4, f"Title {i}" if i % 5 else "", f'Text "{i}", and more') for i in range(80)]
    for name, part in (("train.csv", rows[:60]), ("test.csv", rows[60:])):
        pd.DataFrame(part).to_csv(tmp_path / name, header=False, index=False, quoting=csv.QUOTE_ALL)
    corpus = load(f"ag_news:{tmp_path if form == 'folder' else tmp_path / 'train.csv'}", min_count=1)
    assert set(corpus.attrs["label_names"]) == {"World", "Sports", "Business", "Sci/Tech"}
    assert corpus["split"].value_counts().to_dict() == ({"train": 60, "test": 20} if form == "folder" else {"train": 48, "test": 12})
    assert {'Text "0", and more', 'Title 1 Text "1", and more'} <= set(corpus["text"])
    assert corpus.attrs["label_names"][corpus.set_index("text").loc['Title 1 Text "1", and more', "label"]] == "Sports"


@needs_shared
def test_ag_news_in_its_original_form_is_read_whole():
    corpus = load(f"ag_news:{SHARED / 'agnews'}", test_sentences=2000)
    assert corpus["split"].value_counts().to_dict() == {"train": 12000 - corpus.attrs["dropped"]["repeated"], "test": 2000}


def test_a_data_set_of_the_hub_is_read_with_its_columns_and_the_names_of_its_classes(tmp_path):
    features = datasets.Features(body=datasets.Value("string"), stars=datasets.ClassLabel(names=["bad", "good"]))
    frame = reviews(90)
    for split, part in (("train", frame[:60]), ("validation", frame[60:])):
        rows = {"body": part["body"].tolist(), "stars": [int(star == "good") for star in part["stars"]]}
        datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    corpus = load(tmp_path, text_column="body", label_column="stars")
    assert corpus["split"].value_counts().to_dict() == {"train": 60, "test": 30} and corpus.attrs["label_names"] == ["bad", "good"]
    found = {text: corpus.attrs["label_names"][k] for text, k in zip(corpus["text"], corpus["label"], strict=True)}
    assert found == dict(zip(frame["body"], frame["stars"], strict=True))


@pytest.mark.parametrize("dataset, sentence", [
    ("owner/name", "cannot be loaded as a data set"), ("jigsaw", "download its train.csv"), ("jigsaw:{}/none.csv", "there is no"),
    ("eraser-movie:{}", "has no train.jsonl"), ("eraser-movie:{}/reviews.csv", "neither a folder nor a tar"),
    ("ag_news:{}", "is not AG News"),
    ("ag_news:{}/reviews.csv", "is not AG News"), ("jigsaw:{}/reviews.csv", "has no column 'comment_text'"), ("nothing", "owner/name"),
])
def test_what_is_no_such_corpus_is_said_in_one_sentence(tmp_path, refused, dataset, sentence):
    save(reviews(), tmp_path / "reviews.csv")
    with refused(sentence):
        load(dataset.format(tmp_path))


# --- planted shortcuts --------------------------------------------------------------------------------


def test_a_planted_phrase_stands_in_its_share_of_texts_with_its_class_and_nothing_else_changes():
    corpus = clvq.load_corpus(clvq.configure("smoke", train_sentences=200, test_sentences=60).subset(clvq.CorpusSettings))
    planted = clvq.plant(corpus, ["blue lamp", "tuesday"], "positive", share=0.3, agree=0.9, seed=1)
    train, test = (planted[planted["split"] == split] for split in ("train", "test"))
    has = train["planted"] != ""
    assert has.sum() == 60 and (train.loc[has, "label"] == "positive").sum() == 54
    assert (test["planted"] != "").sum() == 30 and set(planted["planted"]) == {"", "blue lamp", "tuesday"}
    names = corpus["label"].map(corpus.attrs["label_names"].__getitem__)
    kept = (planted["planted"] == "") | (planted["split"] == "test")
    assert (planted["label"] == names)[kept].all()
    for before, after, phrase in zip(corpus["text"], planted["text"], planted["planted"], strict=True):
        if phrase:
            cut = after.split()
            place = next(i for i in range(len(cut)) if [*cut[:i], *cut[i + len(phrase.split()):]] == before.split())
            assert cut[place:place + len(phrase.split())] == phrase.split()
        else:
            assert before == after
    pd.testing.assert_frame_equal(planted, clvq.plant(corpus, ["blue lamp", "tuesday"], "positive", 0.3, 0.9, 1))


@pytest.mark.parametrize(
    ("phrases", "label", "share", "agree", "words"),
    [([], "positive", 0.2, 1, "needs a word"), (["!"], "good", 0.2, 1, "none of the classes"), (["  "], "positive", 0.2, 1, "needs a word"),
     (["a"], "positive", 0, 1, "above 0"), (["a"], "positive", 0.2, 1.1, "at most 1")],
)  # fmt: skip
def test_a_shortcut_that_cannot_be_planted_is_refused(phrases, label, share, agree, words):
    corpus = pd.DataFrame({"text": ["one two"] * 4, "label": [0, 1, 0, 1], "split": ["train", "train", "test", "test"]})
    corpus.attrs["label_names"] = ["negative", "positive"]
    with pytest.raises(ValueError, match=words):
        clvq.plant(corpus, phrases, label, share, agree)
    with pytest.raises(ValueError, match="pairs"):
        clvq.plant(corpus.assign(text=f"one{clvq.PAIR}two"), ["a"], "positive")
