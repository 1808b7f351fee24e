"""The human evaluation: samples, items, the store of answers, agreement, simulated raters."""

import math
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import clvq_app
import clvq_core as clvq

GOOD, BAD = ["good", "moving", "warm"], ["bad", "dull", "cold"]


def write_study(folder: Path, sentences: int = 6, methods: tuple[str, ...] = ("CLVQ-VAE", "Ward clusters")) -> Path:
    """A study whose clouds are plainly of one class or the other."""
    rows, items = [], []
    for sentence in range(sentences):
        for method in methods:
            tag, good = f"{sentence}{method[0]}", sentence % 2 == 0
            items.append({"id": tag, "group": sentence, "words": dict.fromkeys(GOOD if good else BAD, 3)})
            predicted = "positive" if good else "negative"
            rows.append(
                dict(
                    item=tag,
                    sentence=sentence,
                    method=method,
                    concept=0,
                    predicted=predicted,
                    label="positive",
                    outcome="TP",
                )
            )
    clvq.write_study(folder, ["negative", "positive"], 1, items, pd.DataFrame(rows))
    clvq.draw_clouds(folder)
    return folder


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> Path:
    """A study that nobody answers."""
    return write_study(tmp_path_factory.mktemp("human") / "study")


@pytest.fixture
def study(made, tmp_path) -> clvq_app.AnswerStore:
    return clvq_app.AnswerStore(shutil.copytree(made, tmp_path / "study"))


# --- samples ----------------------------------------------------------------------------------------------------------


def test_outcomes_are_named_by_the_second_class_being_the_positive_one():
    labels, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    assert clvq.outcomes(labels, predicted, 2).tolist() == ["TN", "FP", "FN", "TP"]
    assert clvq.outcomes(labels, predicted, 3).tolist() == ["right", "wrong", "wrong", "right"]


@pytest.mark.parametrize(
    "n, expected", [(8, [2, 2, 2, 2]), (19, [5, 5, 5, 4]), (4, [1, 1, 1, 1]), (30, [13, 10, 5, 2])]
)
def test_a_sample_is_as_even_as_it_can_be_and_depends_on_the_seed_alone(n, expected):
    kinds = np.repeat(["TP", "TN", "FP", "FN"], [40, 10, 5, 2] if n == 30 else [40, 10, 10, 10])
    chosen = clvq.balanced_sample(kinds, n, seed=3)
    assert sorted(Counter(kinds[chosen]).values(), reverse=True) == expected and len(set(chosen)) == n
    assert np.array_equal(chosen, clvq.balanced_sample(kinds, n, seed=3))
    assert not np.array_equal(chosen, clvq.balanced_sample(kinds, n, seed=4))


def test_more_sentences_than_there_are_is_refused(refused):
    with refused("9 sentences", "8"):
        clvq.balanced_sample(np.array(["TP"] * 8), 9, 0)


# --- the store --------------------------------------------------------------------------------------------------------


def test_an_answer_is_there_for_its_rater_alone_and_a_later_one_takes_its_place(study):
    one, other = study.join(), study.join()
    study.save(one, "0C", "positive", 7)
    study.save(one, "0C", "negative", 9)
    study.save(other, "1C", "positive", 1)
    assert clvq_app.AnswerStore(study.folder).answers_of(one) == {"0C": ("negative", 9)}
    assert study.answers_of(other) == {"1C": ("positive", 1)}
    answers = clvq.study_answers(study.folder)
    assert answers[["rater", "item", "answer", "confidence", "method"]].values.tolist() == [
        [1, "0C", "negative", 9, "CLVQ-VAE"],
        [2, "1C", "positive", 1, "CLVQ-VAE"],
    ]
    assert one not in answers.to_json() and one != other and len(one) >= 20


@pytest.mark.parametrize(
    "answer", [("none", "positive", 5), ("0C", "no class", 5), ("0C", "positive", 0), ("0C", "positive", 11)]
)
def test_what_is_no_answer_is_refused_and_nothing_is_lost(study, answer):
    token = study.join()
    study.save(token, "0C", "positive", 5)
    with pytest.raises((ValueError, sqlite3.IntegrityError)):
        study.save(token, *answer)
    assert study.answers_of(token) == {"0C": ("positive", 5)}


def test_a_token_that_nobody_has_reads_and_writes_nothing(study, refused):
    with refused("belongs to no rater"):
        study.answers_of("' OR 1=1 --")
    with refused("belongs to no rater"):
        study.save("x", "0C", "positive", 5)
    assert clvq.study_answers(study.folder).empty


def test_twenty_raters_at_once_lose_nothing(study):
    def rate(_: int) -> str:
        own = clvq_app.AnswerStore(study.folder)
        token = own.join()
        for item in own.order(token):
            own.save(token, item, "positive", 5)
        return token

    with ThreadPoolExecutor(20) as pool:
        tokens = list(pool.map(rate, range(20)))
    assert len(set(tokens)) == 20 and len(clvq.study_answers(study.folder)) == 20 * len(study.items)
    assert all(len(study.answers_of(token)) == len(study.items) for token in tokens)


def test_what_was_saved_before_a_kill_is_there(study):
    code = (
        "import clvq_app, itertools, pathlib, sys\n"
        "study = clvq_app.AnswerStore(pathlib.Path(sys.argv[1])); token = study.join(); print(token, flush=True)\n"
        "for i in itertools.count():\n"
        "    item = list(study.items)[i % len(study.items)]\n"
        "    study.save(token, item, 'positive', i % 10 + 1); print(item, i % 10 + 1, flush=True)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(clvq.__file__).parent)}
    with subprocess.Popen(
        [sys.executable, "-c", code, str(study.folder)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout
        token, said = process.stdout.readline().strip(), {}
        for _ in range(40):
            item, confidence = process.stdout.readline().split()
            said[item] = ("positive", int(confidence))
        process.send_signal(signal.SIGKILL)
    kept = study.answers_of(token)
    assert (
        kept.keys() == said.keys() and sum(kept[item] == said[item] for item in said) >= len(said) - 1
    )  # one more may have been saved


def test_every_rater_has_every_item_once_and_methods_take_turns(study):
    firsts = Counter()
    for _ in range(6):
        order = study.order(token := study.join())
        assert sorted(order) == sorted(study.items) and order == study.order(token)
        half = len(order) // 2
        assert {study.items[item]["group"] for item in order[:half]} == set(range(half))
        firsts.update(item[-1] for item in order[:half])
        assert Counter(item[-1] for item in order[:half]) == {"C": 3, "W": 3}
    assert firsts == {"C": 18, "W": 18}


def test_a_folder_without_a_study_is_refused(refused, tmp_path):
    for read in (clvq_app.AnswerStore, clvq.read_study, clvq.study_answers):
        with refused("no study"):
            read(tmp_path)


# --- a rater's page, without a browser --------------------------------------------------------------------------------


def shown(page: clvq_app.RatingPage) -> str:
    """All texts of the page."""
    return "\n".join(str(widget.value) for widget in page.page.children if hasattr(widget, "value"))


def joined(study: clvq_app.AnswerStore) -> int:
    with study.database() as database:
        return database.execute("SELECT count(*) FROM raters").fetchone()[0]


def test_begin_pressed_again_and_again_makes_one_rater(study):
    page = clvq_app.RatingPage(study.folder)
    assert clvq_app.CONSENT in page.page.children[1].description and page.page.children[2].disabled
    begin = page.page.children[2]
    for _ in range(3):
        begin.click()
    assert joined(study) == 1 and "Practice" in shown(page) and "Word cloud: delicious 9" in shown(page)


@pytest.mark.parametrize("answered", [0, 5, 12])
def test_a_browser_that_has_a_token_goes_on_with_it_by_address_or_by_cookie(study, answered):
    token = study.join()
    for item in study.order(token)[:answered]:
        study.save(token, item, "positive", 5)
    for query, cookies in [
        (f"rater={token}", ""),
        ("", f"_xsrf=2|a; {study.name}={token}; b=c"),
        ("rater=x", f"{study.name}={token}"),
    ]:
        page = clvq_app.RatingPage(study.folder, query, cookies)
        assert page.token == token and page.place == answered and joined(study) == 1
        (script,) = (output["data"]["application/javascript"] for output in page.script.outputs)
        assert f"{study.name}={token}" in script and f"?rater={token}" in script
        assert ("Thank you" if answered == 12 else f"{answered + 1} of 12") in shown(page)


@pytest.mark.parametrize(
    "query, cookies", [("", ""), ("rater=x", ""), ("rater=", "; =; clvq"), ("rater=%00'--", '"\\;=')]
)
def test_any_other_browser_is_welcomed(study, query, cookies):
    assert (
        "What do these words tell you?" in shown(clvq_app.RatingPage(study.folder, query, cookies))
        and joined(study) == 0
    )


def test_a_study_that_has_its_raters_says_so_and_one_who_answered_nothing_does_not_count(study):
    def begun() -> str:
        page = clvq_app.RatingPage(study.folder, most_raters=2)
        page.begin()
        return shown(page)

    assert "Practice" in begun() and "Practice" in begun()
    assert "already has all the raters" in begun() and joined(study) == 2
    with study.database() as database:
        database.execute("UPDATE raters SET joined = datetime('now', '-2 hours')")
    assert study.count_raters() == 0 and clvq.study_answers(study.folder).empty
    assert "Practice" in begun()  # the two have answered nothing and gone
    for number in (1, 2):
        with study.database() as database:
            token = database.execute("SELECT token FROM raters WHERE number = ?", (number,)).fetchone()[0]
        study.save(token, "0C", "positive", 5)
    assert "already has all the raters" in begun() and study.count_raters() == 2


def test_an_answer_is_saved_once_it_is_whole_and_the_practice_is_not_saved(study):
    page = clvq_app.RatingPage(study.folder)
    page.begin()
    for _ in range(2):
        labels, degrees, buttons = page.page.children[3:6]
        labels.value = labels.options[0]
        assert buttons.children[1].disabled
        degrees.value = 7
        buttons.children[1].click()
    assert study.answers_of(page.token) == {page.order[0]: ("negative", 7)} and page.place == 1


def test_what_stands_in_a_study_is_no_markup_on_the_page(tmp_path):
    clvq.write_study(
        tmp_path, ["<b>", "b"], 0, [{"id": "a", "group": 0, "words": {'"><script>': 2}}], pd.DataFrame({"item": ["a"]})
    )
    clvq.draw_clouds(tmp_path)
    cloud = clvq_app.AnswerStore(tmp_path).cloud("a")
    assert "<script" not in cloud and "&quot;&gt;&lt;script&gt; 2" in cloud and cloud.count("<") == 1


# --- agreement --------------------------------------------------------------------------------------------------------


def rated(matrix: list[list[float]], method: str = "CLVQ-VAE") -> pd.DataFrame:
    """Answers from raters x items; NaN where there is none."""
    rows = [
        dict(
            rater=r,
            item=f"{method}{i}",
            sentence=i,
            answer=str(value),
            confidence=5,
            method=method,
            predicted="1",
            outcome="TP",
        )
        for r, line in enumerate(matrix)
        for i, value in enumerate(line)
        if not (isinstance(value, float) and math.isnan(value))
    ]
    return pd.DataFrame(rows)


def test_kappa_is_that_of_fleiss_own_example():
    # Fleiss 1971: 14 raters, 10 subjects, 5 categories, as Wikipedia has it: kappa 0.210
    table = [[0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
             [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7]]  # fmt: skip
    raters = np.array([np.repeat(np.arange(5), line) for line in table]).T.tolist()
    found = clvq.rater_agreement(rated(raters), draws=50).iloc[0]
    assert (
        found["kappa"] == pytest.approx(0.210, abs=5e-4) and found["kappa_low"] < found["kappa"] < found["kappa_high"]
    )
    assert found["items"] == 10 and found["raters"] == 14


def test_alpha_is_that_of_krippendorffs_own_example():
    # Krippendorff 2011, "Computing Krippendorff's alpha-reliability", section C: nominal, missing values, alpha 0.743
    nan = math.nan
    matrix = [[1, 2, 3, 3, 2, 1, 4, 1, 2, nan, nan, nan], [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, nan, 3],
              [nan, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, nan], [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, nan]]  # fmt: skip
    found = clvq.rater_agreement(rated(matrix), draws=20).iloc[0]
    assert found["alpha"] == pytest.approx(0.743, abs=5e-4) and math.isnan(found["kappa"])


def test_alignment_is_with_the_models_prediction_overall_and_by_outcome():
    answers = rated([["1", "1", "0", "1"], ["1", "0", "0", "1"]]).assign(outcome=["TP", "TP", "FN", "FN"] * 2)
    found = clvq.rater_agreement(answers, draws=20).iloc[0]
    assert (found["aligned"], found["aligned TP"], found["aligned FN"]) == (5 / 8, 3 / 4, 2 / 4)


def test_raters_who_all_say_one_thing_have_no_agreement_beyond_chance():
    found = clvq.rater_agreement(rated([["1"] * 5] * 3), draws=5).iloc[0]
    assert math.isnan(found["kappa"]) and math.isnan(found["alpha"]) and found["aligned"] == 1


@pytest.mark.parametrize("raters, items, spread", [(8, 30, (0.25, 0.05)), (20, 8, (0.05, 0.25)), (12, 12, (0.2, 0.2))])
def test_intervals_hold_for_other_raters_and_other_items(raters, items, spread):
    draw, covered, kappas = np.random.default_rng(0), 0, []
    for _ in range(60):
        chance = 0.6 + spread[0] * draw.uniform(-1, 1, (raters, 1)) + spread[1] * draw.uniform(-1, 1, items)
        row = clvq.rater_agreement(rated((draw.random((raters, items)) < chance).astype(int).tolist()), draws=100).iloc[
            0
        ]
        covered += row["aligned_low"] <= 0.6 <= row["aligned_high"]
        kappas.append(row[["kappa_low", "kappa", "kappa_high"]])
    assert covered >= 54
    low, kappa, high = np.mean(np.array(kappas, float), axis=0)
    assert low < kappa < high and abs((low + high) / 2 - kappa) < 0.5 * (high - low)


def test_raters_drawn_twice_do_not_raise_the_interval_of_agreement():
    draw, kappas = np.random.default_rng(0), []
    for _ in range(30):
        row = clvq.rater_agreement(rated(draw.integers(0, 2, (5, 30)).tolist()), draws=100).iloc[0]
        kappas.append(row["kappa_low"] <= 0 <= row["kappa_high"])
    assert sum(kappas) >= 26


# --- simulated raters, and how many are needed ------------------------------------------------------------------------


def test_simulated_raters_read_clouds_of_the_classes_words_and_nothing_else(made):
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(GOOD if i % 2 else BAD, 4)) for i in range(200)]
    labels = ["positive" if i % 2 else "negative" for i in range(200)]
    found = clvq.simulated_answers(made, texts, labels, raters=4)
    assert (
        (found["answer"] == found["predicted"]).all()
        and found["confidence"].between(5, 10).all()
        and len(found) == 4 * 12
    )
    pd.testing.assert_frame_equal(found, clvq.simulated_answers(made, texts, labels, raters=4))


def test_as_many_items_as_are_said_to_be_needed_show_the_difference_about_as_often_as_promised():
    draw = np.random.default_rng(1)

    def sample(n: int) -> pd.DataFrame:
        chance = {"A": draw.beta(4, 1.1, n), "B": draw.beta(2, 1.7, n)}
        return pd.concat(
            [rated((draw.random((14, n)) < chance[method]).astype(int).tolist(), method) for method in chance]
        )

    needed = clvq.items_needed(sample(400), ("A", "B"), difference=4 / 5.1 - 2 / 3.7, raters=14)
    shown = 0
    for _ in range(200):
        gap = (
            sample(needed)
            .assign(right=lambda t: t["answer"] == "1")
            .pivot_table(index="sentence", columns="method", values="right")
        )
        gap = gap["A"].astype(float) - gap["B"].astype(float)
        shown += abs(gap.mean()) > 1.96 * gap.std() / math.sqrt(needed)
    assert 8 < needed < 60 and 0.7 < shown / 200 < 0.92
