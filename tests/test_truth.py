"""Known truths: planted shortcuts over seeds, concepts exchanged along human edits, concepts that come back."""

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import clvq_core as clvq

QUICK = dict(
    train_sentences=100, test_sentences=40, finetune_epochs=1, epochs=1, n_codes=12, folds=3, probe_epochs=3, seeds=2, bootstrap=50
)  # fmt: skip


def write_edits(folder, train=60, test=20):
    """Human edits in the form of their authors: a dull or a fine film."""
    folder.mkdir()
    for split, n in (("train", train), ("test", test)):
        rows = [(label, f"{split} film number {i} was {word} to watch .<br /><br />Really .", i)
                for i in range(n) for label, word in (("Negative", "dull"), ("Positive", "fine"))]  # fmt: skip
        pd.DataFrame(rows, columns=["Sentiment", "Text", "batch_id"]).to_csv(folder / f"{split}_paired.tsv", sep="\t", index=False)
    return folder


# --- human edits ------------------------------------------------------------------------------------------------------


def test_human_edits_are_read_as_pairs_without_line_breaks(tmp_path, refused):
    settings = clvq.configure("smoke", dataset=f"cad:{write_edits(tmp_path / 'cad')}", test_sentences=40)
    corpus = clvq.load_corpus(settings)
    assert corpus.attrs["label_names"] == ["negative", "positive"] and corpus.attrs["name"] == "cad"
    test = corpus[corpus["split"] == "test"]
    assert test.groupby("pair").size().eq(2).all() and test["pair"].nunique() == 20
    assert test["text"].iloc[0] == "test film number 0 was dull to watch . Really ."
    with refused("cad:PATH", "train_paired.tsv"):
        clvq.load_corpus(settings.replace(dataset="cad"))
    (tmp_path / "cad" / "test_paired.tsv").unlink()
    with refused("no test_paired.tsv"):
        clvq.load_corpus(settings)


@pytest.mark.parametrize(
    ("words", "others", "expected"),
    [
        ("a b c", "a x c", [(0, 0), (1, 1), (2, 2)]),
        ("a b c", "a c", [(0, 0), (1, -1), (2, 1)]),
        ("a c", "a b c", [(0, 0), (-1, 1), (1, 2)]),
        ("", "a", [(-1, 0)]),
        ("", "", []),
    ],
)
def test_texts_are_aligned_by_what_they_share(words, others, expected):
    assert list(zip(*map(list, clvq.align_texts(words.split(), others.split())), strict=True)) == expected


@pytest.fixture(scope="module")
def edits(tmp_path_factory):
    folder = write_edits(tmp_path_factory.mktemp("edits") / "cad")
    config = clvq.configure("smoke", **QUICK | {"train_sentences": 120}, dataset=f"cad:{folder}", source_layer=0, target_layer=6)
    return clvq.Pipeline(config)


def whole_states(run):
    """Every state a concept of its own: what an exchange of concepts puts in are the other text's states."""
    states = run.activations("test").states[0].float()
    return [clvq.Concepts("whole states", 0, states, centre=states.mean(0))]


def test_exchanged_embeddings_give_the_answer_to_the_other_text_and_other_controls_do_not(edits):
    found = edits.exchanged(10, whole_states)
    assert found.groupby(["method", "put", "seed"]).size().eq(20).all() and set(found["seed"]) == {42, 43}
    exact = found[(found["method"] == "whole states") & found["put"].isin(["concept", "edited words"]) | (found["method"] == "all states")]
    assert exact["gap"].abs().min() > 1e-4
    assert np.allclose(exact["moved"], exact["gap"], atol=2e-3 + 0.02 * exact["gap"].abs().max()) and exact["answered"].all()
    one = found[found["method"] == "whole states"].set_index("put")
    assert (one["changed"] == 1).all()  # dull and fine are the only words whose embeddings differ
    for control in ("gaussian", "random code", "elsewhere"):
        assert (one.loc[control, "moved"] - one.loc[control, "gap"]).abs().max() > 5 * (exact["moved"] - exact["gap"]).abs().max()
    both = found[(found["method"] == "whole states") & (found["put"] == "concept")].groupby(["seed", "pair"])["gap"].sum()
    there = found.query("method == 'whole states' and put == 'concept' and seed == 42")["gap"].to_numpy().reshape(-1, 2)
    same = found.query("method == 'whole states' and put == 'concept' and seed == 42 and not turned")
    if len(same) == 20:  # the same answer to both: the two directions are opposite
        assert np.allclose(there[:, 0], -there[:, 1], atol=1e-5) and np.allclose(both, 0, atol=1e-5)


def test_recovery_is_compared_with_that_of_k_means_by_name(edits):
    found = edits.exchanged(4, methods=["k-means", "predictive k-means"])
    assert set(found["method"]) == {"k-means", "predictive k-means", "all states"}
    table = clvq.recovery(found.assign(turned=True), edits.config).set_index(["method", "put"])
    gap = table.loc[("predictive k-means", "concept"), "value"] - table.loc[("k-means", "concept"), "value"]
    assert np.isclose(table.loc[("predictive k-means", "concept"), "over_kmeans"], gap)
    assert table.loc[("k-means", "concept"), "over_kmeans"] == 0


def test_texts_without_pairs_are_refused(refused):
    with refused("column 'pair'"):
        clvq.Pipeline(clvq.configure("smoke", **QUICK)).exchanged(5)


def test_recovery_is_the_ratio_of_sums_over_pairs_that_turn_the_answer():
    rows = [
        {"method": "m", "put": put, "seed": seed, "pair": pair, "turned": pair > 0, "changed": 2, "gap": 0.5 + 0.1 * pair,
         "moved": (0.5 + 0.1 * pair) * share if pair else 9.0, "answered": share > 0.4}
        for put, share in (("concept", 0.6), ("random code", 0.1)) for seed in (0, 1) for pair in range(8)
    ]  # fmt: skip
    table = clvq.recovery(pd.DataFrame(rows), clvq.configure("smoke", bootstrap=50)).set_index("put")
    assert table["value"].round(6).to_dict() == {"concept": 0.6, "random code": 0.1}
    assert table.loc["concept", "over_control"] == pytest.approx(0.5) and table.loc["concept", "pairs"] == 7
    assert table.loc["concept", "answered"] == 1 and np.isnan(table.loc["random code", "over_control"])


# --- concepts that come back ------------------------------------------------------------------------------------------


def test_chosen_sentences_bring_their_states_and_may_repeat(tiny_acts):
    chosen = tiny_acts.choose(torch.tensor([5, 2, 5]))
    rows = [tiny_acts.rows(torch.tensor([i])) for i in (5, 2, 5)]
    assert torch.equal(chosen.states[1], tiny_acts.states[1][torch.cat(rows)])
    assert chosen.lengths.tolist() == [len(part) for part in rows]
    assert chosen.tokens["sentence"].tolist() == [i for i, part in enumerate(rows) for _ in part]
    assert torch.equal(chosen.states[0][chosen.rows(torch.tensor([1]))], tiny_acts.states[0][rows[1]])


def test_the_share_that_comes_back_counts_concepts_in_use_that_share_most_of_their_words():
    codes = torch.tensor([0] * 10 + [1] * 10 + [2] * 10)
    assert clvq.recurring(codes, (codes + 1) % 5, 5) == 1
    half = codes.clone()
    half[10:20:2] = 4  # concept 1 keeps 5 of 10: a Jaccard of one half is not enough
    assert clvq.recurring(codes, half, 5) == pytest.approx(2 / 3)
    assert clvq.recurring(codes, torch.arange(30) % 5, 5) == 0


def test_concepts_come_back_more_often_on_the_same_text_and_never_by_chance(tmp_path):
    table = clvq.Pipeline(clvq.configure("smoke", **QUICK)).recurrence()
    assert set(table["method"]) == {"CLVQ-VAE", *clvq.CLUSTERS.values()} and set(table["drawn"]) == {"other text", "other seed"}
    assert len(table) == 2 * 2 * 5 and table["value"].between(0, 1).all()
    ward = table[table["method"] == "Ward clusters"].groupby("drawn")["value"].mean()
    assert ward["other seed"] >= ward["other text"]


# --- shortcuts over seeds ---------------------------------------------------------------------------------------------


def test_a_shortcut_is_planted_anew_with_each_seed_and_a_strangers_method_is_ranked_too():
    pipeline = clvq.Pipeline(clvq.configure("smoke", **QUICK | {"train_sentences": 90}))
    card = pipeline.planted_card(["tuesday"], "positive", methods=["k-means", "random codes"])
    assert not pipeline.is_cached("classifier")  # nothing is computed of the text as it was
    assert card[["method", "seed"]].to_numpy().tolist() == [[m, s] for s in (42, 43) for m in ("k-means", "random codes")]
    hidden = [run.changed(data_seed=run.config.seed).planted(["tuesday"], "positive") for run in pipeline.over_seeds]
    assert not hidden[0].test["text"].equals(hidden[1].test["text"])
    found = hidden[0].find_planted([hidden[0].clusters("kmeans++")]).iloc[0]
    pd.testing.assert_series_equal(found, card.iloc[0], check_names=False)


def of_settings(claim: str, figure: str, values: list[float]) -> pd.DataFrame:
    """Two cells (P6: six) and three seeds in which the variants of a claim have these values of a figure, and 1 of others."""
    rows = []
    for cell, (name, value) in itertools.product(range(6 if claim == "P6" else 2), zip(clvq.VARIANTS[claim], values, strict=True)):
        figures = dict.fromkeys(clvq.FIGURES, 1.0) | {figure: value}
        rows += [{"claim": claim, "cell": str(cell), "variant": name, "seed": seed, **figures} for seed in range(3)]
    table = pd.DataFrame(rows)
    return table.assign(**{name: table[name] + table["seed"] / 1000 for name in clvq.FIGURES})


@pytest.mark.parametrize(
    ("claim", "figure", "holds", "refuted", "neither"),
    [
        ("P6", "accuracy concept projection", [0.5, 0.6, 0.7], [0.6, 0.6, 0.5], [0.5, 0.5, 0.7]),
        ("P7", "perplexity", [110, 100], [101, 100], [90, 100]),
        ("P8", "perplexity", [110, 1, 1, 100, 1, 1], [110, 120, 1, 100, 1, 1], [100, 1, 1, 100, 1, 1]),
        ("P11", "variance_explained", [1.2, 1.15, 1, 1], [1.4, 1.01, 1, 1], [1.2, 1.01, 1, 1]),
    ],
)
def test_the_claims_on_settings_are_settled_as_they_were_written(claim, figure, holds, refuted, neither):
    for values, verdict in ((holds, "holds"), (refuted, "does not hold"), (neither, "undecided")):
        tests = clvq.settings_tests(of_settings(claim, figure, values))
        assert clvq.settle(tests, {claim: 6 if claim == "P6" else 2})["verdict"].tolist() == [verdict]
        assert clvq.settle(tests[tests["cell"] == "0"], {claim: 6})["verdict"].tolist() == ["open"]
    written = yaml.safe_load((Path(__file__).parents[1] / "book" / "claims.yml").read_text("utf8"))["claims"]
    assert set(tests["family"]) == {row["family"] for row in written if row["id"] == claim}


def test_codes_that_say_less_than_a_linear_map_do_not_carry_the_prediction():
    tests = clvq.settings_tests(of_settings("P11", "variance_explained", [0.9, 0.9, 1, 1]))
    assert tests["value"].tolist() == pytest.approx([1, -0.1] * 2)
    assert clvq.settle(tests, {"P11": 2})["verdict"].tolist() == ["does not hold"]


def test_settings_are_compared_by_the_figures_of_their_own_trainings():
    pipeline = clvq.Pipeline(clvq.configure("smoke", **QUICK))
    card = pipeline.settings_card("P7")
    assert card["variant"].tolist() == [name for name in clvq.VARIANTS["P7"] for _ in range(pipeline.config.seeds + 1)]
    summary = pipeline.changed(seed=int(card["seed"].iloc[-1]), top_k=1).training_summary.query("epoch.isna()").set_index("metric")["value"]
    for figure in clvq.FIGURES:
        assert card[figure].iloc[-1] == summary[figure]


def test_a_table_is_kept_with_what_it_was_made_with(tmp_path, refused):
    config, folder, name = clvq.configure("smoke"), tmp_path / "new", "blue lamp $(for) positive, 50%"
    first = clvq.kept(folder, name, config, lambda: pd.DataFrame({"value": [1.5]}))
    again = clvq.kept(folder, name, config.replace(dataset="elsewhere"), lambda: pytest.fail("made anew"))
    pd.testing.assert_frame_equal(first, again)
    assert json.loads(first["settings"][0])["seed"] == config.seed and json.loads(first["made"][0])["torch"]
    assert [path.name for path in folder.iterdir()] == ["blue-lamp-for-positive--50.parquet"]
    with refused("blue-lamp-for-positive--50.parquet", "seed 42, not 7", "another folder"):
        clvq.kept(folder, name, config.replace(seed=7), lambda: None)
    with refused("blue-lamp-for-positive--50.parquet", name, "blue-lamp for positive, 50"):
        clvq.kept(folder, "blue-lamp for positive, 50", config, lambda: None)
    assert clvq.kept(folder, "blue-lamp-for-positive--50", config, lambda: None).equals(first)  # as a listing of the folder names it
    assert len(clvq.kept(None, name, config, lambda: pd.DataFrame({"value": [1]}))) == 1


# --- verdicts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "n"), [(0, 12), (1, 12), (0.5, 10), (0.75, 4)])
def test_an_exact_interval_is_the_one_that_statsmodels_gives(share, n):
    from statsmodels.stats.proportion import proportion_confint

    assert clvq.exact_interval(share, n) == pytest.approx(proportion_confint(share * n, n, method="beta"))


def test_a_shortcut_is_read_as_phrases_class_and_share(refused):
    assert clvq.parse_shortcut(" monday, friday > positive @ 0.9 ") == (["monday", "friday"], "positive", 0.9)
    assert clvq.parse_shortcut("blue lamp>negative") == (["blue lamp"], "negative", 1)
    with refused("'phrase > class @ 0.9'", "'tuesday'"):
        clvq.parse_shortcut("tuesday")


def shortcut_ranks(first, n=12, followed=1.0):
    """Ranks of a method that puts this share of n shortcuts first."""
    rows = [(seed, f"s{i}", 1 if i < first * n else 5) for seed in range(3) for i in range(n)]
    table = pd.DataFrame(rows, columns=["seed", "shortcut", "rank"])
    return table.assign(follows=followed, chance=0.2, agree=1.0)


def test_verdicts_of_methods_follow_what_was_written():
    planted = pd.concat([shortcut_ranks(1).assign(method="good"), shortcut_ranks(0).assign(method="bad"),
                         shortcut_ranks(0.75).assign(method="between")])  # fmt: skip
    never = shortcut_ranks(0).assign(method="good", follows=0.3, shortcut="not followed")
    alarm = shortcut_ranks(0).assign(method="good", agree=0.5, shortcut="none")
    rows = [(method, drawn, data, seed, value + 0.001 * seed) for method, value in (("good", 0.6), ("bad", 0.4), ("between", 0.5))
            for drawn in ("other text", "other seed") for data in ("a", "b") for seed in range(3)]  # fmt: skip
    again = pd.DataFrame(rows, columns=["method", "drawn", "data", "seed", "value"])
    again.loc[(again["method"] == "between") & (again["data"] == "b"), "value"] += 0.2
    edits = pd.DataFrame([{"method": "CLVQ-VAE", "put": "concept", "pairs": 90, "value": 0.3, "value_low": 0.2, "value_high": 0.4,
                           "over_control": 0.1, "over_control_p": 0.01}])  # fmt: skip
    tests = clvq.truth_tests(pd.concat([planted, never, alarm]), edits, again)
    verdicts = tests.set_index(["claim", "method", "on"])["verdict"]
    assert verdicts["Y1"].droplevel("on").to_dict() == {"good": "holds", "bad": "does not hold", "between": "undecided"}
    assert tests.query("claim == 'Y1'")["n"].eq(12).all() and verdicts["Y2", "CLVQ-VAE", "human edits"] == "holds"
    assert verdicts.sort_index()["Y6", "between"].to_dict() == {"a": "undecided", "b": "holds"}
    settled = clvq.settle_methods(tests, {"Y1": 1, "Y2": 1, "Y6": 2}).set_index("claim")
    assert settled.loc["Y6", ["counted", "met", "against"]].tolist() == [3, 1, 1] and settled.loc["Y2", "verdict"] == "holds"
    assert settled.loc["Y1", "verdict"] == "holds: good; does not hold: bad; undecided: between"
    few = clvq.truth_tests(planted[planted["shortcut"] < "s5"], edits.assign(over_control_p=0.2), again[again["data"] == "a"])
    settled = clvq.settle_methods(few, {"Y1": 1, "Y2": 1, "Y6": 2}).set_index("claim")["verdict"]
    assert settled.to_dict() == {"Y1": "open", "Y2": "does not hold", "Y6": "open"}
    low = clvq.truth_tests(planted, edits.assign(value=0.1), again).set_index("claim")["verdict"]
    assert low["Y2"] == "undecided"


# --- a shift before training ------------------------------------------------------------------------------------------


def test_a_shift_before_training_makes_codes_alike_and_leaves_removal_around_the_mean_as_it_was():
    pipeline = clvq.Pipeline(clvq.configure("smoke", **QUICK))
    found = pipeline.anisotropy((0, 3)).set_index(["shift", "removed", "way"]).sort_index()
    assert (found["seeds"] == 2).all() and found.loc["3", "cosine"].iloc[0] > 0.85 > found.loc["0", "cosine"].iloc[0]
    share = found["share"]  # of the squared norm that is gone: nearly all that a shift of 3 adds, 9 / 10
    assert share["3", "concept", "projection"] > 0.7 > 0.2 > share["0", "concept", "projection"]
    assert share["3", "concept", "centred"] < 0.1
    assert pipeline.clvqvae.name == "CLVQ-VAE"
    own = clvq.summarise(pipeline.of_seeds("clvq_faithfulness"), pipeline.config).set_index(["removed", "way"])
    for key in (("nothing", "none"), ("concept", "projection"), ("concept", "centred")):
        assert found.loc[("0", *key), "value"] == pytest.approx(own.loc[key, "accuracy"])


def test_a_claim_on_one_cell_is_decided_by_its_value():
    row = {"claim": "O2", "family": "origin", "cell": "m, d", "counted": True, "low": 0.0, "high": 0.1, "p": float("nan")}

    def decide(*values):
        tests = clvq.adjust_families(pd.DataFrame([row | {"test": f"shift {i}", "value": value} for i, value in enumerate(values)]))
        return clvq.settle(tests, {"O2": 1})["verdict"].item()

    assert [decide(0.1, 0.12), decide(0.1, 0.2), decide(0.4, 0.5), decide(0.2, 0.4)] == ["holds", "undecided", "does not hold", "undecided"]


# --- nothing to find --------------------------------------------------------------------------------------------------


def test_an_untrained_model_has_other_weights_and_the_same_words_and_goes_through_every_test():
    pipeline = clvq.Pipeline(clvq.configure("smoke", **QUICK))
    untrained = pipeline.untrained()
    trained, fresh = (dict(run.load_classifier().model.named_parameters()) for run in (pipeline, untrained))
    name = next(name for name in trained if "attention" in name and name.endswith("query.weight"))
    assert trained.keys() == fresh.keys() and trained[name].shape == fresh[name].shape
    assert not torch.allclose(trained[name], fresh[name]) and fresh[name].std().item() == pytest.approx(0.02, abs=0.002)
    assert untrained.label_names == pipeline.label_names and untrained.test["text"].equals(pipeline.test["text"])
    state = torch.random.get_rng_state()
    assert untrained.untrained().folder("untrained_model") and torch.equal(state, torch.random.get_rng_state())
    tests = clvq.sanity_tests(pipeline.sanity_card(20))
    assert len(tests) == 2 * len(clvq.SANITY) and set(tests["method"]) == set(clvq.SANITY) and (tests["n"] == 2).all()
    settled = clvq.settle_methods(tests, {"Y5": 2})
    assert settled["counted"].item() == 5 and settled["verdict"].item() != "open"


def sanity_numbers(**values):
    """A card in which each column has a value of `values` by weights and method, with an interval of 0.02 either side."""
    rows = []
    for test, way, name, sign in clvq.SANITY.values():
        random = "random states" if test == "again" else "random codes"
        for key, value in values.items():
            method, weights = {"own": ("CLVQ-VAE", "trained"), "untrained": ("CLVQ-VAE", "untrained"), "random": (random, "trained")}[key]
            rows.append({"test": test, "way": way, "method": method, "weights": weights, "removed": "concept", "layer": 4, "seeds": 3,
                         name: sign * value, f"{name}_low": sign * value - 0.02, f"{name}_high": sign * value + 0.02})  # fmt: skip
    return pd.DataFrame(rows)


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"own": 0.3, "untrained": 0.0, "random": 0.1}, "holds"),
        ({"own": 0.3, "untrained": 0.31, "random": 0.1}, "undecided"),
        ({"own": 0.3, "untrained": 0.5, "random": 0.3}, "does not hold"),
    ],
)
def test_a_column_that_does_not_fall_where_there_is_nothing_to_find_is_struck_out(values, verdict):
    tests = clvq.sanity_tests(sanity_numbers(**values))
    assert set(tests["verdict"]) == {verdict}
    first = tests.iloc[0]
    assert first["value"] == pytest.approx(values["own"] - values["untrained"])
    assert first["high"] - first["low"] == pytest.approx(2 * 0.02 * 2**0.5)
