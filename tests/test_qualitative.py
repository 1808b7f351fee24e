"""Concepts as people look at them: specificity, surface labels, alignment, what becomes of a concept, the explorer."""

import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import clvq_app
import clvq_core as clvq

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


def counts(table: dict[int, dict[str, int]]) -> pd.Series:
    return pd.Series({(concept, word): n for concept, words in table.items() for word, n in words.items()})


def test_log_odds_are_those_worked_by_hand():
    # Monroe et al. 2008 with a prior of 10 words, shared out as the 100 words together: the 40, film 60
    found = clvq.log_odds(counts({0: {"the": 20, "film": 40}, 1: {"the": 20, "film": 20}}), prior=10)
    y, other = 40 + 6, 20 + 6
    ratio = np.log(y / (60 + 10 - y)) - np.log(other / (40 + 10 - other))
    assert found[0, "film"] == pytest.approx(ratio / np.sqrt(1 / y + 1 / other))
    assert found[0, "film"] == pytest.approx(-found[1, "film"]) and found[0, "the"] < 0


def test_a_word_that_is_everywhere_as_frequent_is_specific_of_nothing():
    found = clvq.log_odds(counts({0: {"the": 50, "good": 20}, 1: {"the": 50, "bad": 20}}))
    assert found[0, "the"] == pytest.approx(0) and found[0, "good"] > 1.96 and found[1, "bad"] == found[0, "good"]


def test_a_rare_word_seen_once_is_not_specific_and_an_exclusive_one_is_more_so_than_a_shared_one():
    table = {
        0: {"love": 16, "heart": 16, "desire": 1, "film": 60},
        1: {"love": 2, "desire": 1, "film": 4000, "the": 1000},
    }
    found = clvq.log_odds(counts(table))[0]
    assert found["heart"] > found["love"] > 1.96 > found["desire"]


def test_the_words_beside_a_cloud_are_its_most_frequent_and_most_specific_ones():
    table = counts({0: {"the": 60, "love": 9, "heart": 3, "of": 50}, 1: {"the": 500, "love": 1, "of": 500}})
    found = clvq.word_table(table, clvq.log_odds(table), [0, 0], n=2).set_index("word")
    assert set(found.index) == {"the", "of", "love", "heart"} and (found["concept"] == "#0").all()
    assert found.loc["love", "times"] == 9 and found.loc["love", "share of the word's occurrences"] == 0.9


def test_words_dealt_at_random_are_not_specific_and_planted_ones_are():
    draw = np.random.default_rng(0)
    concept, word = draw.integers(0, 50, 20000), draw.zipf(1.5, 20000) % 3000
    dealt = pd.Series(1, range(20000)).groupby([concept, word]).size()
    assert (clvq.log_odds(dealt, prior=10) > 1.96).sum() > 500  # what is said of one word is not said of thousands
    assert (clvq.word_p_values(dealt) < 0.05).sum() == 0 and (clvq.log_odds(dealt) > 1.96).sum() == 0
    word[concept == 7] = np.where(draw.random((concept == 7).sum()) < 0.1, 5000, word[concept == 7])
    p = clvq.word_p_values(pd.Series(1, range(20000)).groupby([concept, word]).size())
    assert p[p < 0.05].index.tolist() == [(7, 5000)] and p.between(0, 1).all()


def test_the_p_values_of_words_are_binomial_and_adjusted_over_all_pairs():
    table = counts({0: {"the": 20, "film": 40}, 1: {"the": 20, "film": 18, "dull": 2}})
    times = table.groupby(level=1).sum()
    p = [stats.binomtest(n, times[word], [0.6, 0.4][concept], "greater").pvalue for (concept, word), n in table.items()]
    expected = stats.false_discovery_control([*p, 1])[:-1]  # "dull" is never in concept 0
    np.testing.assert_allclose(clvq.word_p_values(table), expected)
    shown = clvq.word_table(table, clvq.log_odds(table), [1]).set_index("word")
    assert shown["adjusted p"].to_dict() == clvq.word_p_values(table)[1].to_dict()


def test_one_concept_alone_has_finite_log_odds():
    assert np.isfinite(clvq.log_odds(counts({0: {"a": 3, "b": 1}}))).all()


@pytest.mark.parametrize(
    "word, form, suffix",
    [("film", "lower", ""), ("Film", "Title", ""), ("USA", "UPPER", ""), ("1999", "number", ""),
     ("!?", "punctuation", ""), ("a", "lower", ""), ("A", "Title", ""), ("moving", "lower", "ing"),
     ("thing", "lower", ""), ("eBay", "other", ""),
     ("映画", "other", ""), ("watchable", "lower", "able"), ("10th", "number", ""), ("Café", "Title", ""),
     ("so-so", "lower", "")],
)  # fmt: skip
def test_words_have_the_form_and_suffix_that_people_see(word, form, suffix):
    tokens = pd.DataFrame({"sentence": [0], "position": [1], "word": [word], "is_summary": [False]})
    assert clvq.surface_labels(tokens, ["positive"]).loc[0, ["form", "suffix"]].tolist() == [form, suffix]


def test_surface_labels_are_of_words_and_not_of_summaries():
    tokens = pd.DataFrame({
        "sentence": [0, 0, 0, 0, 1, 1], "position": [0, 1, 2, 3, 0, 1],
        "word": ["[CLS]", "Great", "moving", "!", "[CLS]", "awful"],
        "is_summary": [True, False, False, False, True, False],
    })  # fmt: skip
    found = clvq.surface_labels(tokens, ["positive", "negative"])
    assert found[tokens["is_summary"]].isna().all(axis=None)
    words = found[~tokens["is_summary"]]
    assert words["form"].tolist() == ["Title", "lower", "punctuation", "lower"] and words["suffix"].tolist() == [
        "",
        "ing",
        "",
        "",
    ]
    assert words["place"].tolist() == ["first", "inside", "last", "first"]
    assert words["sentiment"].tolist() == ["positive", "", "", "negative"]
    assert words["class"].tolist() == ["positive", "positive", "positive", "negative"]


def test_concepts_that_are_the_labels_are_aligned_and_shuffled_ones_are_not():
    labels = pd.Series(np.repeat(["a", "b", "", None], 50), dtype=object)
    codes = torch.arange(200) // 10  # ten tokens each
    perfect = clvq.alignment(codes, labels)
    assert perfect["aligned"] == pytest.approx(10 / 15) and perfect["by_chance"] == 0  # those of "" have no label
    assert clvq.alignment(torch.arange(200) // 50, labels)["ami"] == pytest.approx(1)
    order = torch.randperm(150, generator=torch.Generator().manual_seed(0))
    shuffled = clvq.alignment(torch.cat([codes[:150][order], codes[150:]]), labels)
    assert shuffled["aligned"] == 0 and abs(shuffled["ami"]) < 0.1


def test_small_concepts_do_not_count():
    labels = pd.Series(["a"] * 4 + ["a", "b"] * 5, dtype=object)
    assert clvq.alignment(torch.tensor([0] * 4 + [1] * 10), labels)["aligned"] == 0


def test_transitions_have_shares_and_lifts():
    found = clvq.transitions(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 6])).set_index(["source", "target"])
    assert found.loc[(0, 5)].tolist() == pytest.approx([2, 2 / 3, 4 / 3])
    assert found.loc[(1, 6)].tolist() == pytest.approx([1, 1, 2]) and len(found) == 3 and found["count"].iloc[0] == 2


def test_the_flow_has_a_band_for_each_row_and_a_name_for_each_concept():
    from matplotlib import pyplot as plt

    flow = clvq.transitions(torch.tensor([0, 0, 0, 1]), torch.tensor([5, 5, 6, 6]))
    figure, axes = plt.subplots()
    clvq.draw_flow(flow, axes, ({0: "a", 1: "b"}, {5: "c", 6: "d"}))
    assert len(axes.collections) == 3 and {text.get_text() for text in axes.texts} == {"a", "b", "c", "d"}
    assert sorted(bar.get_height() for bar in axes.patches) == [1, 2, 2, 3]
    plt.close(figure)


def test_concepts_are_matched_one_to_one_where_agreement_may_name_one_twice():
    codes = torch.tensor([0] * 4 + [1] * 4 + [2] * 4)
    assert torch.equal(clvq.matched(codes, (codes + 1) % 3, 3), torch.ones(3, dtype=torch.double))
    others = torch.tensor([0] * 8 + [1] * 4)  # 0 and 1 have become one
    assert clvq.agreement(codes, others, 3).tolist() == [0.5, 0.5, 1]
    assert sorted(clvq.matched(codes, others, 3).tolist()) == [0, 0.5, 1]


@pytest.mark.parametrize("words", [["film", "1999", "!?"], ["фильм", "ταινία", "café"], ["映画"], ["🎬"], []])
def test_a_cloud_is_drawn_whatever_the_script_by_the_font_that_lacks_least(words):
    from matplotlib import font_manager, get_data_path
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots()
    if words:
        clvq.word_cloud(dict.fromkeys(words, 2), axes)
        assert len(axes.images) == 1 and axes.images[0].get_array()[..., 3].max() > 0
    plt.close(figure)
    needed = {ord(c) for word in words for c in word}
    fonts = [f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf", *font_manager.findSystemFonts()]
    lacking = {font: len(needed - font_manager.get_font(font).get_charmap().keys()) for font in fonts}
    assert lacking[clvq.cloud_font(words)] == min(lacking.values())


@pytest.mark.parametrize("words", [["film"], ["映画"]])
def test_a_font_that_cannot_be_read_does_not_keep_a_cloud_from_being_drawn(tmp_path, monkeypatch, words):
    from matplotlib import font_manager, get_data_path
    from matplotlib import pyplot as plt

    broken, empty = tmp_path / "Broken.ttf", tmp_path / "Empty.otf"
    broken.write_bytes(b"no font at all")
    empty.write_bytes(b"")
    monkeypatch.setattr(font_manager, "findSystemFonts", lambda: [str(broken), str(empty), str(tmp_path / "gone.ttf")])
    assert clvq.cloud_font(words) == f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    figure, axes = plt.subplots()
    clvq.word_cloud(dict.fromkeys(words, 2), axes)
    plt.close(figure)


def test_dollars_and_backslashes_in_names_are_no_formulas(tmp_path):
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2)
    clvq.word_cloud({"film": 2}, axes[0], r"class $\no$")
    flow = clvq.transitions(torch.tensor([0]), torch.tensor([5]))
    clvq.draw_flow(flow, axes[1], ({0: r"$\no$"}, {5: "$5, $6"}))
    figure.savefig(tmp_path / "figure.png")
    plt.close(figure)


def explored(n: int = 12) -> pd.DataFrame:
    return pd.DataFrame({
        "concept": range(n), "words": ["</script><b>film</b> ×2, dull ×1"] * n,
        "class": ["negative", "positive"] * (n // 2), "purity": 0.6,
        "states": range(1, n + 1), "effect": [None, *[-0.01] * (n - 1)], "effect_low": -0.02,
        "effect_high": 0.0, "flipped": 0.1,
        "stability": [0.2, *[0.9] * (n - 1)], "examples": [["a <img src=x onerror=alert(1)> «film»"]] * n,
        "near": [[1, 2, 3, 4, 5]] * n,
        "x": np.arange(n), "y": np.arange(n),
    })  # fmt: skip


def test_what_stands_in_the_data_is_no_markup_in_the_explorer():
    page = clvq_app.explorer_html(explored(), "12 concepts of <i>this</i>")
    assert "<b>film" not in page and "<img src=x" not in page and "&lt;i&gt;this" in page
    assert "(unstable)" in page and page.count("(unstable)") == 1 and "not in the evaluation sentences" in page


def test_the_names_of_classes_are_no_markup_either():
    table = explored().assign(**{"class": "</script><script>alert(1)</script><b>c</b>"})
    page = clvq_app.explorer_html(table, "<script>alert(2)</script>")
    assert "<script>alert" not in page and "<b>c" not in page


def test_a_page_is_one_file_whose_title_is_text(tmp_path):
    page = clvq_app.write_page(tmp_path / "new" / "page.html", "<i>a</i> & b", "<p>kept as it is</p>").read_text("utf8")
    assert "<title>&lt;i&gt;a&lt;/i&gt; &amp; b</title>" in page and "<p>kept as it is</p>" in page
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["page.html"]


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium on the PATH")
def test_the_explorer_is_searched_sorted_and_opened_by_mouse_and_keyboard_from_one_file_without_a_network(tmp_path):
    from playwright.sync_api import sync_playwright

    table = explored(1200).assign(words=[f"word{k} ×2, dull ×1" for k in range(1200)])
    page_file = clvq_app.write_page(
        tmp_path / "explorer.html", "Explorer", clvq_app.explorer_html(table, "1,200 concepts")
    )
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, asked, errors = browser.new_page(), [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(page_file.as_uri())
        page.locator("#concepts_wrapper tbody tr, .dt-container tbody tr").first.wait_for()
        search = page.get_by_role("searchbox").first
        search.fill("word777")
        row = page.locator("tbody tr", has_text="word777").first
        row.wait_for()
        row.click()
        page.get_by_role("heading", name="Concept #777").wait_for()
        page.locator("#concept button").first.click()  # a neighbour
        page.get_by_role("heading", name="Concept #1", exact=True).wait_for()
        row.focus()
        page.keyboard.press("Enter")
        page.get_by_role("heading", name="Concept #777").wait_for()
        assert page.url.endswith("#concept-777")
        opened = "Concept #777"
        search.fill("")
        points = page.locator("#map .points path.point")
        for point in (points.first, points.last):
            page.evaluate("scrollTo(0, 0)")  # to open a concept scrolls to it
            box = point.bounding_box()
            page.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
            page.wait_for_function("before => document.querySelector('#concept h2').textContent !== before", arg=opened)
            opened = page.locator("#concept h2").inner_text()
        page.get_by_role("columnheader", name="states").click()
        assert not [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] and not errors
        browser.close()
