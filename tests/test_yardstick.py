"""The yardstick: spans of several vectors, independent components, completeness, the scorecard, and verdicts of claims."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
import yaml

import clvq_app
import clvq_core as clvq

ROOT = Path(__file__).parents[1]
QUICK = dict(
    train_sentences=100, test_sentences=40, finetune_epochs=1, epochs=1, n_codes=12, folds=3, probe_epochs=3, seeds=2, bootstrap=50
)  # fmt: skip


@pytest.fixture(scope="module")
def pipeline():
    return clvq.Pipeline(clvq.configure("smoke", **QUICK))


@pytest.fixture(scope="module")
def card(pipeline):
    return pipeline.scorecard(20, lambda run: [dataclasses.replace(run.clusters("kmeans++"), name="a stranger's")])


# --- spans ------------------------------------------------------------------------------------------------------------


def test_a_span_is_taken_out_as_least_squares_takes_it_out():
    h, vectors = torch.randn(7, 16), torch.randn(7, 3, 16)
    left = clvq.ablate(h, clvq.span(vectors))
    for state, basis, rest in zip(h.numpy(), vectors.numpy(), left.numpy(), strict=True):
        weights = np.linalg.lstsq(basis.T, state, rcond=None)[0]
        assert np.allclose(rest, state - weights @ basis, atol=1e-5)
    wide = clvq.ablate(h[:, None].expand(-1, 4, -1), clvq.span(vectors)[:, None])
    assert torch.allclose(wide[:, 2], left, atol=1e-6)


def test_a_state_of_a_method_of_higher_rank_has_the_vectors_with_the_highest_scores():
    states = torch.randn(50, 8)
    method = clvq.Concepts("rows", 0, torch.eye(8), directions=True, scores=lambda x: x, rank=3)
    codes = method.assign(states, rows=7)
    assert codes.shape == (50, 3) and torch.equal(codes.sort(1).values, states.topk(3, 1).indices.sort(1).values)


def test_a_method_of_higher_rank_has_every_control_as_a_span_and_no_subtraction(planted):
    trial, _ = planted
    method = clvq.Concepts("rows", 0, torch.eye(12), directions=True, scores=lambda x: x, rank=3)
    removals = trial.removals(method)
    for name in ("concept", "gaussian", "random code", "random word", "other class"):
        basis = removals[name].offset
        assert basis.shape == (200, 3, 12)
        assert torch.allclose(basis @ basis.mT, torch.eye(3).expand(200, 3, 3), atol=1e-5), name
    assert not torch.allclose(removals["gaussian"].offset[0], removals["gaussian"].offset[1])
    variants = trial.variants(method)
    assert {way for _, way in variants} == {"none", "projection", "centred"}
    h, mean = trial.summaries(0), trial.centre(0).summary
    rows = method.assign(trial.test.states[0][trial.salient])
    gone = h - variants["concept", "centred"]
    axes = torch.zeros(200, 12).scatter(1, rows, 1.0)
    assert torch.allclose(gone, (h - mean) * axes, atol=1e-5)
    for name in ("matched norm", "random code, equal norm"):
        assert torch.allclose((h - variants[name, "centred"]).norm(dim=1), gone.norm(dim=1), rtol=1e-3)


# --- independent components, means, linear maps -----------------------------------------------------------------------


def test_independent_components_find_the_sources_of_a_mixture():
    draw = np.random.default_rng(0)
    sources, mixing = draw.laplace(size=(4000, 4)), draw.normal(size=(4, 8))
    states = {0: torch.from_numpy((sources @ mixing + 5).astype(np.float32))}
    acts = clvq.Activations(states, torch.tensor([0, 4000]), pd.DataFrame({"is_summary": [False] * 4000}), {})
    found = clvq.independent_components(acts, 0, clvq.configure("smoke", n_codes=100, top_k=1))
    strengths = (states[0] - found["centre"]) @ found["filters"].T
    alike = np.abs(np.corrcoef(strengths.numpy().T, sources.T)[:4, 4:])
    assert (alike.max(1) > 0.97).all() and len(set(alike.argmax(1))) == 4
    assert torch.allclose(strengths @ found["vectors"] + found["centre"], states[0], atol=1e-2)
    assert torch.allclose(strengths.std(0), torch.ones(4), atol=0.05)


def test_member_means_and_the_linear_map_are_numpys():
    x, y, codes = torch.randn(90, 5).double(), torch.randn(90, 3).double(), torch.arange(90) % 4
    means = clvq.member_means(y, codes, 6)
    for k in range(4):
        assert np.allclose(means[k], y.numpy()[codes.numpy() == k].mean(0))
    assert torch.allclose(means[5], y.mean(0))
    design = np.c_[x.numpy(), np.ones(90)]
    weights = np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    assert np.allclose(clvq.linear_map(x, y)(x), design @ weights, atol=1e-3)


# --- in the model -----------------------------------------------------------------------------------------------------


def test_fewer_sentences_asked_give_the_rows_of_all_of_them(pipeline):
    texts, lm, method = pipeline.test["text"].tolist(), pipeline.language_model, pipeline.clusters("kmeans++")
    controls = ["random code, equal norm", "gaussian"]
    whole, part = (
        clvq.in_model([method], pipeline.trial, lm, texts, pipeline.config, ["centred"], controls, ["every position"], n) for n in (0, 8)
    )
    assert part["sentence"].unique().tolist() == [0, 5, 10, 15, 20, 25, 30, 35] and set(whole["where"]) == {"every position"}
    both = part.merge(whole, on=["method", "removed", "sentence"], suffixes=("", "_whole"))
    assert len(both) == len(part) == 24
    assert np.allclose(both["kl"], both["kl_whole"], atol=1e-5) and (both["label"] == both["label_whole"]).all()


def test_the_mean_state_at_the_last_layer_is_the_same_whichever_test_puts_it_in(pipeline):
    target = pipeline.layers[1]
    texts, lm, labels = pipeline.test["text"].tolist(), pipeline.language_model, pipeline.labels("test")
    told = clvq.completeness([pipeline.clusters("kmeans++")], pipeline.trial, lm, texts, target, pipeline.config)
    held = clvq.without_summary(lm, texts, labels, pipeline.activations("train"), [target], pipeline.config)
    mean = told[told["method"] == "mean state"]
    assert np.allclose(mean["kl"], held["kl"], atol=1e-6) and (mean["flipped"].to_numpy() == held["flipped"].to_numpy()).all()


def test_concepts_that_tell_the_state_are_complete_and_shuffled_ones_are_not(pipeline):
    """One concept for each evaluation sentence's summary, whose only member in training has the model's own target state."""
    source, target = pipeline.layers
    trial, lm, texts = pipeline.trial, pipeline.language_model, pipeline.test["text"].tolist()
    summaries = trial.summaries(source)
    told = clvq.Trial(trial.test, trial.test, trial.tokens, trial.labels, trial.predicted, trial.config)
    method = clvq.Concepts("all", source, summaries)
    rows = trial.test.summary_rows
    states = {layer: x[rows] for layer, x in trial.test.states.items()}
    told.train = clvq.Activations(states, torch.arange(len(rows) + 1), trial.test.tokens.iloc[rows], {})
    table = clvq.completeness([method], told, lm, texts, target, pipeline.config)
    kl = table.groupby(["method", "removed"])["kl"].mean()
    assert kl["all", "concept"] < 1e-6 < kl["all", "shuffled"]


def test_a_clvqvaes_decoder_predicts_for_completeness_what_it_predicts_alone(pipeline, monkeypatch):
    source, target = pipeline.layers
    model, acts = pipeline.clvqvae, pipeline.activations("test")
    seen = {}

    def answer_edited(lm, texts, layer, centres, sentences, edit, config, places):
        states = torch.zeros(len(sentences), 1, acts.source["width"])
        seen.update({key: new[:, 0] for key, new in edit(states, states, sentences)})
        return torch.zeros(len(texts), 2), {(*key, "summary"): torch.zeros(len(texts), 2) for key in seen}

    monkeypatch.setattr(clvq, "answer_edited", answer_edited)
    clvq.completeness([model], pipeline.trial, pipeline.language_model, pipeline.test["text"].tolist(), target, pipeline.config)
    rows = acts.rows(torch.tensor([3]))
    with torch.no_grad():
        alone = model.reconstruct(model(acts.states[source][rows].float(), torch.tensor([len(rows)])))[0]
    assert torch.allclose(seen["CLVQ-VAE", source, "decoder"][3], alone, atol=2e-2 * float(alone.abs().max()))


# --- the anatomy ------------------------------------------------------------------------------------------------------


def test_the_same_partition_with_other_vectors_assigns_alike_and_has_its_members_means(pipeline):
    source, target = pipeline.layers
    acts = pipeline.activations("train")
    model, upper = pipeline.clvqvae, clvq.Concepts("upper", target, **pipeline.cluster_vectors("kmeans++", target))
    own, means, of_target = (
        clvq.with_vectors(model, acts, source, "own", model.vectors),
        clvq.with_vectors(model, acts, source, "means"),
        clvq.with_vectors(upper, acts, source, "target"),
    )
    codes = model.assign(acts.states[source])
    assert torch.equal(own.vectors, model.vectors) and (means.reads, of_target.reads, of_target.layer) == (source, target, source)
    assert torch.equal(own.assign(acts.states[source]), codes) and torch.equal(means.assign(acts.states[source]), codes)
    assert torch.equal(of_target.assign(acts.states[target]), upper.assign(acts.states[target]))
    k = int(codes.mode().values)
    assert torch.allclose(means.vectors[k], acts.states[source].float()[codes == k].mean(0), atol=1e-4)
    assert torch.allclose(own.centre, acts.states[source].float().mean(0), atol=1e-4)


def test_class_loading_of_a_concept_that_is_the_class_and_of_one_that_says_nothing(planted):
    trial, method = planted
    told = clvq.class_loading(method, trial, trial.labels)
    silent = clvq.class_loading(clvq.Concepts("one", 0, method.vectors[2:3]), trial, trial.labels)
    assert np.allclose(told["loading"], 0.5, atol=0.01) and np.allclose(silent["loading"], 0)
    assert 0.7 < told["auc"].iloc[0] < 1 and silent["auc"].iloc[0] == 0.5
    assert (told["cosine"] > 0.9).all() and (silent["cosine"].abs() < 0.5).all()
    states = trial.test.states[0][trial.words].view(200, 2, 12)
    centred = states - trial.centre(0).word
    direction = F.normalize(method.vectors[trial.assign(method, trial.salient)], dim=1)
    gone = (centred * direction[:, None]).sum(2).square().sum(1) / centred.square().sum((1, 2))
    assert np.allclose(told["gone"], gone, atol=1e-5)


def test_the_anatomy_has_every_part_and_its_differences(pipeline):
    table, tests = pipeline.anatomy_card("minilm, movies", 10)
    concept = table[(table["removed"] == "concept") & (table["where"] == "every position")].set_index("method")
    assert list(concept.index) == [method.name for method in pipeline.parted] and concept["auc"].between(0, 1).all()
    assert np.allclose(concept["over_clvq"], concept["value"] - concept.loc["CLVQ-VAE", "value"])
    at = {(r["claim"], r["test"]): r["value"] for _, r in tests.iterrows()}
    raw, means, upper = (concept.loc[name, "value"] for name in (
        "CLVQ-VAE's partition, raw means", "k-means' partition, raw means", "k-means of the target layer, raw means"))  # fmt: skip
    assert at["O3", "raw means"] == pytest.approx(raw - concept.loc["CLVQ-VAE", "value"])
    assert at["O3", "partition"] == pytest.approx(raw - means) and at["O4", "gain"] == pytest.approx(upper - means)


def answers_of(method: str, flipped, seed: int) -> pd.DataFrame:
    base = {"method": method, "layer": 4, "removed": "concept", "where": "every position", "seed": seed}
    return pd.DataFrame({**base, "sentence": range(len(flipped)), "flipped": flipped})


def test_a_gain_that_is_the_class_alone_is_gone_within_thirds():
    draw = np.random.default_rng(0)
    rows, loads = [], []
    for seed in (42, 43, 44):
        for name, strong in (("CLVQ-VAE", 0.5), ("CLVQ-VAE's partition, raw means", 0.5), ("k-means' partition, raw means", 0.3),
                             ("k-means of the target layer, raw means", 0.7)):  # fmt: skip
            load = (draw.random(2000) < strong) * 0.5 + 0.1 * draw.random(2000)
            rows.append(answers_of(name, draw.random(2000) < load, seed))
            given = {"method": name, "layer": 4, "seed": seed, "sentence": range(2000)}
            loads.append(pd.DataFrame({**given, "loading": load, "cosine": load, "auc": strong}))
    tests = clvq.reversal_tests(pd.concat(rows), pd.concat(loads), "minilm, made", clvq.configure("smoke").subset(clvq.ProbeSettings))
    at = tests.set_index("test")
    assert at.loc["gain", "value"] > 0.15 and at.loc["gain", "p"] < 0.01
    assert abs(at.loc["thirds", "value"]) < 0.1 and at.loc["thirds", "value"] < at.loc["gain", "value"] / 2  # thirds are coarse
    tests = clvq.adjust_families(pd.concat([tests, tests.assign(cell="minilm, other"), tests.assign(cell="third")]))
    assert clvq.settle(tests, {"O3": 3, "O4": 3}).set_index("claim").loc["O3", "verdict"] in ("undecided", "does not hold")


# --- the scorecard ----------------------------------------------------------------------------------------------------


def test_the_scorecard_scores_a_strangers_method_as_it_scores_the_same_built_in(card):
    values = card.set_index(["test", "method", "layer", "removed", "way"]).drop(columns="l0")
    for test in ("probe", "model", "complete"):
        own, other = (values.loc[test].xs(name, level="method") for name in ("k-means", "a stranger's"))
        pd.testing.assert_frame_equal(own, other)
        assert len(own) >= 2


def test_the_scorecard_has_every_method_in_every_test_that_suits_it(card, pipeline):
    methods = [*pipeline.methods, *pipeline.more_methods]
    of = {test: set(part["method"]) for test, part in card.groupby("test")}
    assert {method.name for method in methods} <= of["probe"]
    at_source = {method.name for method in methods if method.layer == pipeline.layers[0]}
    assert at_source <= of["model"] and of["complete"] >= {name for name in at_source if not name.endswith(" rows")}
    assert card[card["test"] == "summary"]["layer"].tolist() == [4, 5]
    assert card.set_index("method")["l0"].dropna().groupby(level=0).first()["TopK SAE 2048, encoder"] == pytest.approx(32, abs=0.1)


def test_differences_on_the_scorecard_are_those_of_its_values(card):
    rows = card.set_index(["test", "method", "layer", "removed", "way"]).sort_index()
    for way in ("projection", "centred"):
        for method in ("CLVQ-VAE", "Ward clusters"):
            at = lambda removed, name="value", method=method, way=way: rows.loc[("probe", method, 4, removed, way), name]  # noqa: E731
            assert at("concept", "over_control") == pytest.approx(at("concept") - at("random code"))
            assert at("concept", "over_random") == pytest.approx(at("concept") - at("gaussian"))
    model = rows.loc["model"].xs("concept", level="removed").droplevel(["layer", "way"])
    random = rows.loc["model"].xs("gaussian", level="removed").droplevel(["layer", "way"])["value"]
    assert np.allclose(model["over_clvq"], model["value"] - model.loc["CLVQ-VAE", "value"])
    assert np.allclose(model["over_random"], model["value"] - random)
    assert np.allclose(model["net_clvq"], model["over_random"] - model.loc["CLVQ-VAE", "over_random"])
    complete = rows.loc["complete"].droplevel(["layer", "way"])
    assert np.allclose(complete["value"], 1 - complete["kl"] / complete.loc[("mean state", "state"), "kl"])


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick():
    return [word for name, value in QUICK.items() for word in ("-p", name, str(value))]


def test_the_command_scores_vectors_of_a_file_and_of_a_function_beside_known_methods(pipeline, quick, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("mine.npy", pipeline.clusters("kmeans++").vectors.numpy())
    (tmp_path / "my_methods.py").write_text(
        "import dataclasses\ndef build(pipeline):\n    return [dataclasses.replace(pipeline.clusters('kmeans++'), name='built')]\n"
    )
    command = ["score", "mine.npy", "my_methods:build", "--beside", "k-means", "--asked", "20", "--output", "new/card.csv"]
    assert clvq_app.main([*command, "--scale", "smoke", *quick]) == 0
    out, card = capsys.readouterr().out, pd.read_csv("new/card.csv")
    model = card[(card["test"] == "model") & (card["removed"] == "concept")].set_index("method")
    assert set(model.index) == {"CLVQ-VAE", "k-means", "mine", "built"}
    assert all(name in out for name in ("mine", "built", "k-means", "2 seeds", "minilm on movies"))
    for column in ("value", "over_control", "over_clvq"):
        assert model.loc["built", column] == model.loc["k-means", column], column
    first = pipeline.scorecard(20, only=["k-means"])
    row = first[(first["test"] == "model") & (first["removed"] == "concept") & (first["method"] == "k-means")].iloc[0]
    assert row["value"] == pytest.approx(model.loc["k-means", "value"]) and row["value_low"] <= row["value"] <= row["value_high"]
    assert clvq_app.main([*command[:-1], "card.xlsx"]) == 2
    assert clvq_app.main(["score", "--beside", "class means", "--scale", "smoke", *quick]) == 2


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("short.npy", np.zeros((3, 5)), ["short.npy", "width 5", "384"]),
        ("flat.npy", np.zeros(384), ["flat.npy", "(384,)"]),
        ("empty.npy", np.full((3, 384), np.nan), ["empty.npy", "finite"]),
        ("pickled.npy", np.array([{}], dtype=object), ["pickled.npy", "row per concept"]),
        ("words.csv", "a,b\nc,d\n", ["words.csv", "row per concept"]),
        ("none.npy", None, ["none.npy", "row per concept"]),
        ("there_is_no:module", None, ["no function 'module'"]),
        ("mine.pickle", None, ["'mine.pickle'", "module:function"]),
    ],
)
def test_what_is_no_method_is_refused_in_a_sentence(name, content, parts, pipeline, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, str):
        (tmp_path / name).write_text(content)
    elif content is not None:
        np.save(name, content, allow_pickle=True)
    with refused(*parts):
        clvq_app.read_method(name)(pipeline)


@pytest.mark.parametrize("suffix", ["npy", "safetensors", "parquet", "csv"])
def test_vectors_are_read_from_each_kind_of_file(suffix, tmp_path):
    from safetensors.torch import save_file

    vectors, path = torch.randn(4, 6), tmp_path / f"v.{suffix}"
    if suffix == "npy":
        np.save(path, vectors.double().numpy())
    elif suffix == "safetensors":
        save_file({"other": torch.zeros(2), "vectors": vectors}, path)
    elif suffix == "parquet":
        pd.DataFrame(vectors.numpy(), columns=list("abcdef")).to_parquet(path)
    else:
        pd.DataFrame(vectors.numpy()).to_csv(path, header=False, index=False)
    assert torch.allclose(clvq_app.read_vectors(path), vectors, atol=1e-6)


# --- claims -----------------------------------------------------------------------------------------------------------


def cell(name: str, right: float = 0.9, classes: int = 2, **values: tuple[float, float]) -> pd.DataFrame:
    """A scorecard made by hand. ``values`` are a difference, with half the width of its interval, by claim and test."""
    given = {"P1": (0.1, 0.05), "P2": (-0.2, 0.05), "P3": (0.1, 0.05), "word": (0.1, 0.05), "P4": (-0.1, 0.05), "P5": (-0.1, 0.05),
             "Y4": (0.9, 0.01), "O5": (0.0, 0.001)} | values  # fmt: skip
    difference = lambda column, of: {  # noqa: E731
        column: given[of][0], f"{column}_low": given[of][0] - given[of][1], f"{column}_high": given[of][0] + given[of][1],
        f"{column}_p": 1e-6 if abs(given[of][0]) > given[of][1] else 0.5,
    }  # fmt: skip
    base = {"layer": 4, "removed": "concept", "way": "centred"}
    rows = [{**base, "test": "probe", "way": way, "method": "CLVQ-VAE", "value": 0.5, **difference("over_control", "P2")}
            for way in ("projection", "centred")]  # fmt: skip
    rows += [{**base, "test": "probe", "way": way, "method": other, "value": value, **difference("over_clvq", "P1")}
             for way in ("projection", "centred") for other, value in (("Ward clusters", 0.6), ("random states", 0.0))]  # fmt: skip
    rows += [
        {**base, "test": "model", "method": "CLVQ-VAE", **difference("over_control", "P3"), **difference("over_word", "word")},
        {**base, "test": "model", "method": "single-layer VQ-VAE, layer 4", **difference("over_clvq", "P4")},
        {**base, "test": "model", "method": "dense SAE, 10 rows", "l0": 900.0, "over_random": 0.5, **difference("net_clvq", "P1")},
        {**base, "test": "model", "method": "sparse SAE, 10 rows", "l0": 50.0, "over_random": 0.1, **difference("net_clvq", "P5")},
        {**base, "test": "complete", "method": "CLVQ-VAE, codes alone", "removed": "decoder", **difference("value", "Y4")},
        *({**base, "test": "summary", "removed": "summary", "layer": layer, **difference("value", "O5")} for layer in (4, 5)),
    ]
    return pd.DataFrame(rows).assign(cell=name, right=right, classes=classes)


ALL = {"P1": 9, "P2": 9, "P3": 9, "P4": 9, "P5": 9, "Y4": 9, "O5": 9}


def verdicts(*cells: pd.DataFrame) -> dict[str, str]:
    table = clvq.settle(clvq.claim_tests(pd.concat(cells, ignore_index=True)), ALL)
    return dict(zip(table["claim"], table["verdict"], strict=True))


def test_claims_that_are_met_everywhere_hold_and_those_missed_everywhere_do_not():
    assert set(verdicts(*(cell(f"c{i}") for i in range(9))).values()) == {"holds"}
    turned = dict(P1=(-0.1, 0.05), P2=(0.0, 0.01), P3=(-0.1, 0.05), P4=(0.1, 0.05), P5=(0.1, 0.05), Y4=(0.3, 0.01), O5=(0.5, 0.1))
    assert set(verdicts(*(cell(f"c{i}", **turned) for i in range(9))).values()) == {"does not hold"}


def test_between_the_two_thresholds_a_claim_is_undecided():
    vague = dict(P1=(0.1, 0.5), P2=(-0.1, 0.5), P5=(0.1, 0.5), Y4=(0.6, 0.01), O5=(0.05, 0.02))
    found = verdicts(*(cell(f"c{i}", **vague) for i in range(9)))
    assert {found[claim] for claim in ("P1", "P2", "P5", "Y4", "O5")} == {"undecided"}
    found = verdicts(*(cell(f"c{i}", **({} if i < 4 else {"P4": (-0.1, 0.5)})) for i in range(9)))
    assert found["P4"] == "undecided" and found["P3"] == "holds"
    one_below = verdicts(*(cell(f"c{i}", **({"P4": (0.1, 0.05)} if i == 0 else {})) for i in range(9)))
    assert one_below["P4"] == "undecided"


def test_the_concept_of_another_word_counts_for_p3():
    assert verdicts(*(cell(f"c{i}", word=(0.0, 0.05)) for i in range(9)))["P3"] == "undecided"


def test_a_claim_is_open_until_all_its_cells_are_measured_and_weak_classifiers_do_not_count():
    assert set(verdicts(*(cell(f"c{i}") for i in range(8))).values()) == {"open"}
    weak = [cell(f"c{i}", right=0.55 if i < 5 else 0.9) for i in range(9)]
    table = clvq.settle(clvq.claim_tests(pd.concat(weak)), ALL).set_index("claim")
    assert (table["counted"] == 4).all() and table.loc["P1", "verdict"] == "undecided"
    four = clvq.claim_tests(cell("c", right=0.45, classes=4))
    assert four["counted"].all() and not clvq.claim_tests(cell("c", right=0.45))["counted"].any()
    assert (clvq.settle(clvq.claim_tests(cell("c", right=0.1)), ALL)["verdict"] == "open").all()


def test_p_values_are_adjusted_over_all_counted_cells_of_a_family():
    tests = clvq.claim_tests(pd.concat([*(cell(f"c{i}") for i in range(3)), cell("weak", right=0.3)]))
    for _, part in tests[tests["counted"]].groupby("family"):
        expected = clvq.adjust_p_values(part["p"].to_numpy())
        assert np.allclose(part["p_holm"], expected, equal_nan=True)
    assert tests.loc[~tests["counted"], "p_holm"].isna().all()


def test_the_best_other_method_of_the_papers_table_is_compared_and_only_sparse_spans_are():
    table = clvq.claim_tests(cell("c", P1=(0.07, 0.01), P5=(-0.03, 0.01))).set_index(["claim", "test"])
    assert table.loc[("P1", "centred"), "value"] == pytest.approx(0.07)  # of Ward clusters; random states are not in the table
    assert table.loc[("P5", "span"), "value"] == pytest.approx(0.03)


def test_families_and_rules_are_those_of_the_written_claims():
    written = {claim["id"]: claim for claim in yaml.safe_load((ROOT / "book/claims.yml").read_text("utf8"))["claims"]}
    tests = clvq.claim_tests(cell("c"))
    elsewhere = {"O2", "O3", "O4", "B1", "B2", "B3", "B4", "B5", "P6", "P7", "P8", "P11"}
    assert set(tests["claim"]) | elsewhere == set(clvq.RULES) <= set(written)
    assert all(written[row["claim"]]["family"] == row["family"] for _, row in tests.iterrows())


def test_the_scorecard_of_a_real_cell_can_be_settled(card):
    tests = clvq.claim_tests(card.assign(cell="one", right=0.9, classes=2))
    assert set(tests["claim"]) >= {"P1", "P2", "P3", "P4", "Y4", "O5"} and tests["value"].notna().all()
    assert (clvq.settle(tests, ALL)["verdict"] == "open").all()


# --- cells of models and data -----------------------------------------------------------------------------------------


def test_cells_have_the_middle_scale_and_smoke_its_own_and_prompted_models_are_not_fine_tuned():
    cells = clvq.cell_settings("laptop", "minilm; smollm2", "movies; eraser-movie:x/y.tar.gz", "smollm2", seed=7, test_sentences=None)
    assert list(cells) == ["minilm, movies", "minilm, eraser-movie", "smollm2, movies", "smollm2, eraser-movie"]
    assert [config.finetune for config in cells.values()] == [True, True, False, False]
    for config in cells.values():
        assert {name: getattr(config, name) for name in clvq.MIDDLE} == clvq.MIDDLE and config.seed == 7
    assert clvq.cell_settings("smoke", "minilm", "movies", "")["minilm, movies"] == clvq.configure("smoke")


def test_a_finished_cell_is_kept_and_shown_and_one_of_other_settings_is_refused(tmp_path, refused):
    configs = {"minilm, movies": clvq.configure("smoke", **QUICK)}
    measured = []

    def measure(name, pipeline):
        measured.append(name)
        return pd.DataFrame({"value": [0.5, pipeline.config.seed]})

    first = clvq.measure_cells(configs, measure, 1000, tmp_path / "cells")
    again = clvq.measure_cells(configs, measure, 1000, tmp_path / "cells")
    assert measured == ["minilm, movies"] and [path.name for path in (tmp_path / "cells").iterdir()] == ["minilm--movies.parquet"]
    pd.testing.assert_frame_equal(first, again)
    row = first.iloc[0]
    assert (row["cell"], row["trained"], row["evaluated"], row["asked"], row["layers"]) == ("minilm, movies", 100, 40, 40, "4 → 6")
    assert json.loads(row["settings"])["n_codes"] == 12 and "commit" in json.loads(row["made"])
    other = {"minilm, news": clvq.configure("smoke", **QUICK | {"n_codes": 13})}
    with refused("minilm--movies", "n_codes 12", "not 13", "another folder"):
        clvq.measure_cells(other, measure, 1000, tmp_path / "cells")
    clvq.measure_cells(configs, measure, 1000)
    assert len(measured) == 2
