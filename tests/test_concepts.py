"""Concept tables, clouds, and tables for the book."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch

import clvq_core as clvq

matplotlib.use("Agg")

TOKENS = pd.DataFrame({
    "sentence": [0, 0, 0, 1, 1, 2, 2], "position": [0, 1, 2, 0, 1, 0, 1],
    "word": ["[CLS]", "good", "film", "[CLS]", "bad", "[CLS]", "good"],
    "is_summary": [True, False, False, True, False, True, False],
})
TEXTS = ["good film", "bad", "so good"]


@pytest.fixture
def table():
    return clvq.concept_table(TOKENS, torch.tensor([0, 2, 1, 0, 2, 0, 2]), TEXTS, [1, 0, 1], ["negative", "positive"], n_codes=4)


def test_the_concept_table_counts_what_a_hand_counts(table):
    good = table.set_index("concept").loc[2]
    assert (good["size"], good["words"], good["label"]) == (3, "good ×2, bad ×1", "positive")
    assert good["purity"] == pytest.approx(2 / 3) and good["summary_share"] == 0
    assert json.loads(good["word_counts"]) == {"good": 2, "bad": 1}
    assert good["examples"] == ["«good» film", "«bad»", "so «good»"]
    assert table.set_index("concept").loc[0, "summary_share"] == 1


def test_every_code_has_a_row_and_an_unused_one_is_empty(table):
    assert sorted(table["concept"]) == [0, 1, 2, 3]
    unused = table.set_index("concept").loc[3]
    assert (unused["size"], unused["words"], unused["label"], unused["examples"]) == (0, "", "", [])
    assert np.isnan(unused["purity"])


def test_the_largest_concept_comes_first(table):
    assert table["size"].is_monotonic_decreasing


def test_the_table_survives_a_parquet_file(table, tmp_path):
    table.to_parquet(tmp_path / "t.parquet")
    back = pd.read_parquet(tmp_path / "t.parquet")
    assert back["examples"].map(list).tolist() == table["examples"].tolist()


@pytest.mark.parametrize(("text", "word", "marked"), [
    ("a good film", "good", "a «good» film"), ("goodness is good", "good", "goodness is «good»"),
    ("why ? ( what )", "(", "why ? «(» what )"), (r"to \1 or \g<0>", r"\1", r"to «\1» or \g<0>"), (r"a \ b", "\\", r"a «\» b"),
    (r"a \g<0> b", r"\g<0>", r"a «\g<0>» b"),
    ("ein schöner Film", "schöner", "ein «schöner» Film"), ("100% sure", "100", "«100»% sure"),
])
def test_a_word_is_marked_where_it_stands_alone(text, word, marked):
    assert clvq.mark(text, word, False) == marked
    assert clvq.mark(text, word, True) == text


@pytest.mark.parametrize("counts", [{"good": 3, "bad": 1}, {"2024": 2, "!": 1}, {"電影": 3, "très": 2, "🎬": 1}])
def test_a_cloud_is_drawn_for_any_words(counts):
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots()
    clvq.word_cloud(counts, ax)
    assert np.asarray(ax.images[0].get_array())[..., 3].any()                               # some pixel is not transparent
    plt.close(figure)


def shown(frame: pd.DataFrame, monkeypatch) -> dict:
    bundles = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: bundles.append(data))
    clvq.show_table(frame, "A caption.", "name")
    return bundles[0]


def test_nothing_in_a_table_is_taken_for_html_or_markdown(monkeypatch):
    evil = "<script>alert(1)</script> | `x` | {cite}`y` [a](b) $z$"
    bundle = shown(pd.DataFrame({evil: [evil]}), monkeypatch)
    assert "<script>" not in bundle["text/html"] and "&lt;script&gt;" in bundle["text/html"]
    head, row = (bundle["text/markdown"].splitlines()[line] for line in (3, 5))
    assert head == row and row.count("|") - row.count("\\|") == 2 and "\\<script\\>" in row and "\\{cite\\}\\`y\\`" in row


def test_a_table_has_caption_name_and_rounded_numbers(monkeypatch):
    bundle = shown(pd.DataFrame({"n": [12345], "x": [0.123456], "gap": [np.nan]}), monkeypatch)
    assert bundle["text/markdown"].startswith("~~~{table} A caption.\n:name: name\n")
    assert "| 12,345 | 0.123 |  |" in bundle["text/markdown"]
    assert "A caption." in bundle["text/html"] and "12,345" in bundle["text/plain"]


def test_published_numbers_are_found_by_column():
    assert clvq.published(table=1, model="RoBERTa", dataset="ERASER-Movie", value="CLVQ-VAE")["mean"].item() == 0.0782
    assert set(clvq.published()["table"]) == {1, 2, 3, 4, 5, 7, 8, 9, 10, 11}


@pytest.mark.parametrize(("numbers", "options", "text"), [
    ((0.1234, 0.1, 0.15), {}, "0.123 (0.100 to 0.150)"), ((-0.02, -0.04, 0.001), {"form": "+.3f"}, "-0.020 (-0.040 to +0.001)"),
    ((0.5, np.nan, np.nan), {"form": ".2f"}, "0.50"), ((np.nan, np.nan, np.nan), {}, "–"),
    ((12.0, 10.4, 14.0), {"form": ".0f"}, "12 (10 to 14)"),
])
def test_a_number_is_shown_with_its_interval_where_it_has_one(numbers, options, text):
    assert clvq.interval_text(*numbers, **options) == text
