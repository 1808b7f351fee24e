"""Codebooks that look ahead: what they group, that they read the source layer alone, and that pages can show them."""

import numpy as np
import pandas as pd
import pytest
import torch

import clvq_core as clvq

QUICK = dict(train_sentences=150, test_sentences=60, finetune_epochs=1, epochs=1, n_codes=8, folds=3, probe_epochs=3, seeds=2)


@pytest.fixture(scope="module")
def pipeline():
    return clvq.Pipeline(clvq.configure("smoke", **QUICK))


def simulated(n: int = 1200, width: int = 12, groups: int = 4, seed: int = 0) -> tuple[clvq.Activations, torch.Tensor]:
    """Source states with a loud part that says nothing and a faint one that decides which of a few places the target lies at."""
    draw = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (n,), generator=draw)
    places = torch.eye(groups) - 1 / groups
    loud = 10 * torch.randint(2, (n, width - groups), generator=draw).float()
    x = torch.cat([loud, places[group]], 1) + 0.05 * torch.randn(n, width, generator=draw)
    y = 3 * places[group] + 0.1 * torch.randn(n, groups, generator=draw)
    tokens = pd.DataFrame({"sentence": np.arange(n), "position": 0, "word": "w", "is_summary": False})
    source = {"model": "simulated", "layers": [0, 1], "width": width}
    return clvq.Activations({0: x, 1: y}, torch.arange(n + 1), tokens, source), group


def same_groups(codes: torch.Tensor, group: torch.Tensor) -> bool:
    pairs = set(zip(codes.tolist(), group.tolist(), strict=True))
    return len(pairs) == len(set(codes.tolist())) == len(set(group.tolist()))


@pytest.mark.parametrize("name", [name for name, (how, _) in clvq.AHEAD.items() if how != "joint"])
def test_states_are_grouped_by_what_they_say_of_the_target_and_not_by_what_is_loud(name):
    acts, group = simulated()
    config = clvq.configure("smoke", n_codes=4, top_k=1)
    method = clvq.linear_concepts(name, 0, **clvq.predict_ahead(acts, (0, 1), *clvq.AHEAD[name], config))
    assert same_groups(method.assign(acts.states[0]), group)
    assert not same_groups(clvq.clusters(acts, 0, "kmeans++", config).assign(acts.states[0]), group)
    new, group = simulated(300, seed=1)
    assert same_groups(method.assign(new.states[0]), group)


def test_vectors_are_the_mean_source_states_of_their_members():
    acts, _ = simulated()
    found = clvq.predict_ahead(acts, (0, 1), "scaled", 1, clvq.configure("smoke", n_codes=4, top_k=1))
    method = clvq.linear_concepts("x", 0, **found)
    codes = method.assign(acts.states[0])
    for code in codes.unique():
        assert torch.allclose(method.vectors[code], acts.states[0][codes == code].mean(0), atol=1e-5)
    assert torch.allclose(method.centre, acts.states[0].mean(0), atol=1e-5)


def test_scaled_predictions_do_not_depend_on_the_units_of_the_target():
    acts, _ = simulated()
    units = torch.tensor([1.0, 100.0, 0.01, 5.0])
    other = clvq.Activations({0: acts.states[0], 1: acts.states[1] * units}, acts.offsets, acts.tokens, acts.source)
    config = clvq.configure("smoke", n_codes=4, top_k=1)
    one, two = (clvq.linear_concepts("x", 0, **clvq.predict_ahead(part, (0, 1), "scaled", 1, config)) for part in (acts, other))
    assert same_groups(one.assign(acts.states[0]), two.assign(acts.states[0]))


def test_the_linear_score_is_the_nearest_centre_of_the_prediction(monkeypatch):
    """Against scikit-learn's least squares, in units of the residual's deviation, and the distance to each centre."""
    from sklearn.linear_model import LinearRegression

    acts, _ = simulated()
    start, seen = clvq.start_codebook, []

    def recorded(features, *arguments):
        seen.append((features, start(features, *arguments)))
        return seen[-1][1]

    monkeypatch.setattr(clvq, "start_codebook", recorded)
    config = clvq.configure("smoke", n_codes=6, top_k=1)
    method = clvq.linear_concepts("x", 0, **clvq.predict_ahead(acts, (0, 1), "scaled", 1, config))
    features, (centres, _) = seen[0]
    assert (method.assign(acts.states[0]) == torch.cdist(features, centres).argmin(1)).all()
    x, y = acts.states[0].double().numpy(), acts.states[1].double().numpy()
    predicted = LinearRegression().fit(x, y).predict(x)
    assert np.allclose(features, (predicted - y.mean(0)) / (y - predicted).std(0, ddof=1), rtol=0.02, atol=0.02)


def test_every_page_can_show_the_other_codebook(pipeline):
    ahead = pipeline.changed(codebook="predictive")
    assert ahead.codebook.name == "predictive k-means" and pipeline.codebook is pipeline.clvqvae
    assert ahead.concepts["size"].sum() == pipeline.concepts["size"].sum() == len(pipeline.activations("train").tokens)
    assert not ahead.concepts.equals(pipeline.concepts)
    assert len(ahead.report) and len(ahead.explorer_table) and ahead.stability.between(0, 1).all()
    told = ahead.explain("A fine film, though the end is dull.")
    codes = ahead.training_codes.bincount(minlength=8)
    assert all(len(sentences) <= 3 for sentences in told.examples.values())
    assert set(told.words["concept"]) <= set(np.flatnonzero(codes))
    used = {-1, *np.flatnonzero(codes).tolist()}
    exchanges = ahead.compare("A fine film, though the end is dull.", "Shares of two banks fell on Tuesday.").exchanges
    assert len(exchanges) and {*exchanges["concept"], *exchanges["other_concept"]} <= used
    assert len(ahead.steer("A fine film.", 0)) == 7 * 2


def test_explaining_by_it_trains_no_clvq_vae(pipeline, monkeypatch):
    monkeypatch.setattr(clvq, "train", lambda *_: pytest.fail("a CLVQ-VAE was trained"))
    told = pipeline.changed(codebook="predictive", n_codes=9).explain("A fine film, though the end is dull.")
    assert len(told.words) > 5 and told.words["concept"].between(0, 8).all()


def test_its_card_has_every_ingredient_with_fair_controls(pipeline):
    card = pipeline.codebook_card(20)
    methods = {method.name for method in pipeline.ingredients()}
    assert {*clvq.AHEAD, "CLVQ-VAE", "k-means", "class means of words"} < methods == set(card["method"])
    taken = card[card["removed"] == "concept"].set_index("method")
    assert taken.loc["k-means", "over_kmeans"] == taken.loc["CLVQ-VAE", "over_clvq"] == taken.loc["CLVQ-VAE", "net_clvq"] == 0
    control = card[card["removed"] == "random code, equal norm"].set_index("method")
    assert np.allclose(taken["value"] - taken["over_control"], control.loc[taken.index, "value"])
    assert np.allclose(taken["net"], taken["over_control"]) and taken["used"].between(1, 8).all() and (taken["explained"] <= 1).all()
    with pytest.raises(ValueError, match="no codebook 'x', only CLVQ-VAE"):
        pipeline.codebook_card(20, ["x"])
    assert np.allclose(taken["net_kmeans"], taken["net"] - taken.loc["k-means", "net"])


def test_names_of_all_methods_find_one_and_its_concepts_come_back_or_not(pipeline):
    assert [method.name for method in pipeline.points(["k-means", "predictive k-means"])] == ["k-means", "predictive k-means"]
    again = pipeline.recurrence(["k-means", "predictive k-means"])
    assert set(again["method"]) == {"k-means", "predictive k-means"}
    part = again[again["method"] == "predictive k-means"]
    assert len(part) == 4 and part["value"].between(0, 1).all()
    for ask in (lambda: pipeline.source_method("nothing"), lambda: pipeline.recurrence(["nothing"])):
        with pytest.raises(ValueError, match="predictive k-means"):
            ask()


def verdicts(gains: list[float], explained: list[float], falls: list[float], edits: pd.DataFrame | None = None) -> dict[str, str]:
    """Of cells whose codebook changes so many more answers and explains so much more, and comes back by so much less."""
    base = {"removed": "concept", "right": 0.9, "classes": 2}
    rows = [{**base, "cell": "tuned", "method": name, "explained": 0.5} for name in ("k-means", "predictive k-means")]
    for i, (gain, more) in enumerate(zip(gains, explained, strict=True)):
        ends = {"": 0, "_low": -0.01, "_high": 0.01}
        sides = {f"{over}{end}": gain + shift for over in ("over_kmeans", "over_clvq") for end, shift in ends.items()}
        p = dict.fromkeys(("over_kmeans_p", "over_clvq_p"), 1e-6 if gain else 0.9)
        rows += [{**base, "cell": f"c{i}", "method": "predictive k-means", "explained": 0.5 + more, **sides, **p},
                 {**base, "cell": f"c{i}", "method": "k-means", "explained": 0.5}]
    again = pd.DataFrame([{"data": f"d{i}", "drawn": "other text", "seed": seed, "method": name, "value": 0.5 - fall * (name != "k-means")}
                          for i, fall in enumerate(falls) for seed in range(3) for name in ("k-means", "predictive k-means")])
    tests = clvq.codebook_tests(pd.DataFrame(rows), again, edits, "tuned")
    return clvq.settle(tests, {"B1": 5, "B2": 5, "B3": 5, "B4": 2, "B5": 1}).set_index("claim")["verdict"].to_dict()


def test_the_claims_of_a_better_codebook_are_settled_as_they_were_written():
    better, none = [0.1] * 4 + [0], [0] * 4 + [0.1]
    assert verdicts(better, [0.06] * 4 + [-0.1], [0.04, 0.04]) == dict.fromkeys(("B1", "B2", "B3", "B4"), "holds")
    assert verdicts(none, [0.06] * 3 + [0, 0], [0.06, 0.06]) == dict.fromkeys(("B1", "B2", "B3", "B4"), "does not hold")
    assert verdicts([0.1] * 3 + [0, 0], [0.06] * 3 + [0.04] * 2, [0.04, 0.06]) == dict.fromkeys(("B1", "B2", "B3", "B4"), "undecided")
    assert set(verdicts(better[:4], [0.06] * 4, [0.04]).values()) == {"open"}
    for gain, told in ((0.1, "holds"), (-0.1, "does not hold")):
        edits = pd.DataFrame([{"put": "concept", "method": "predictive k-means", "over_kmeans": gain, "over_kmeans_low": gain - 0.01,
                               "over_kmeans_high": gain + 0.01, "over_kmeans_p": 1e-6}])
        assert verdicts(better, [0.06] * 5, [0.04, 0.04], edits)["B5"] == told
