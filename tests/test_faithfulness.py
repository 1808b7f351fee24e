"""The faithfulness protocol: the projection, the probes of all folds together, planted concepts, the summary."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

import clvq_core as clvq


def probe_settings(**chosen) -> clvq.ProbeSettings:
    return clvq.configure("smoke", **chosen).subset(clvq.ProbeSettings)


# --- projection ---------------------------------------------------------------------------------------------------


@st.composite
def pairs(draw):
    """States and directions of the same shape, in double precision, no direction near zero."""
    rows, width = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    numbers = st.floats(-100, 100)
    flat = draw(st.lists(numbers, min_size=2 * rows * width, max_size=2 * rows * width))
    h, v = torch.tensor(flat, dtype=torch.float64).view(2, rows, width)
    v[:, 0] += torch.where(v.norm(dim=1) < 1e-2, 1.0, 0.0)
    return h, v


@given(pair=pairs())
def test_what_is_left_is_orthogonal_to_the_direction_and_the_rest_lies_along_it(pair):
    h, v = pair
    left = clvq.ablate(h, v)
    scale = 1 + h.norm(dim=1) * v.norm(dim=1)
    assert ((left * v).sum(1).abs() <= 1e-9 * scale).all()
    gone = h - left
    assert (((gone * v).sum(1).abs() - gone.norm(dim=1) * v.norm(dim=1)).abs() <= 1e-9 * scale).all()


@given(pair=pairs())
def test_projecting_twice_is_projecting_once(pair):
    h, v = pair
    once = clvq.ablate(h, v)
    torch.testing.assert_close(clvq.ablate(once, v), once, rtol=1e-9, atol=1e-7)


@given(pair=pairs(), factor=st.sampled_from([-1e3, -1.0, -1e-3, 1e-3, 0.5, 7.0, 1e3]))
def test_the_length_and_sign_of_the_direction_do_not_matter(pair, factor):
    h, v = pair
    torch.testing.assert_close(clvq.ablate(h, factor * v), clvq.ablate(h, v), rtol=1e-9, atol=1e-7)


def test_the_projection_of_a_case_worked_by_hand():
    h, v = torch.tensor([[3.0, 4.0], [1.0, 2.0], [5.0, 5.0]]), torch.tensor([[1.0, 1.0], [0.0, 7.0], [0.0, 0.0]])
    # (3, 4) less 7/2 of (1, 1); (1, 2) less its second part; no direction, nothing removed
    torch.testing.assert_close(clvq.ablate(h, v), torch.tensor([[-0.5, 0.5], [1.0, 0.0], [5.0, 5.0]]))


# --- folds --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stopping", ["inner", "test"])
def test_folds_hold_out_every_sentence_once_and_the_inner_patience_never_sees_them(stopping):
    labels = np.random.default_rng(0).integers(0, 3, 103)
    folds = clvq.make_folds(labels, probe_settings(folds=5, probe_stopping=stopping, probe_validation=0.2))
    assert sorted(np.concatenate(folds.held)) == list(range(103))
    for held, kept, watched in zip(*folds, strict=True):
        assert not set(held) & set(kept)
        assert abs(np.bincount(labels[held], minlength=3) - np.bincount(labels) / 5).max() < 1
        if stopping == "inner":
            assert sorted([*held, *kept, *watched]) == list(range(103))
            assert len(watched) == pytest.approx(0.2 * (103 - len(held)), abs=1)
        else:
            assert sorted(watched) == sorted(held) and len(kept) + len(held) == 103


def test_more_folds_than_sentences_of_a_class_are_refused(refused):
    labels = np.array([0] * 30 + [1] * 4)
    clvq.make_folds(labels, probe_settings(folds=4))
    with refused("folds=5", "4"):
        clvq.make_folds(labels, probe_settings(folds=5))


# --- probes -------------------------------------------------------------------------------------------------------


def noisy_data(sentences: int = 120, width: int = 16, classes: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """States that say something of their class, but not all of it, so that probes overfit."""
    draw = torch.Generator().manual_seed(3)
    labels = torch.arange(sentences) % classes
    centres = torch.randn(classes, width, generator=draw)
    return 0.4 * centres[labels] + torch.randn(sentences, width, generator=draw), labels


def one_after_another(h: torch.Tensor, labels: torch.Tensor, folds: clvq.Folds, config: clvq.ProbeSettings):
    """The same probes as plain modules in a plain loop, fold by fold, from the same draws. Also the epochs each took."""
    generator = torch.Generator().manual_seed(config.seed)
    n_folds, width, hidden, classes = len(folds.held), h.shape[1], config.probe_hidden, int(labels.max()) + 1
    shapes = [(width, hidden), (1, hidden), (hidden, classes), (1, classes)]
    scales = [width**-0.5, width**-0.5, hidden**-0.5, hidden**-0.5]
    starts = [(torch.rand(n_folds, *shape, generator=generator) * 2 - 1) * scale for shape, scale in zip(shapes, scales, strict=True)]
    n, draws = min(map(len, folds.kept)), []
    for _ in range(config.probe_epochs):
        order = [torch.from_numpy(kept)[torch.randperm(len(kept), generator=generator)[:n]] for kept in folds.kept]
        batches = [torch.stack(order)[:, i : i + config.probe_batch] for i in range(0, n, config.probe_batch)]
        draws.append([(b, torch.rand(n_folds, b.shape[1], hidden, generator=generator) >= config.probe_dropout) for b in batches])

    probes, took = [], []
    for fold in range(n_folds):
        probe = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        for parameter, start in zip(probe.parameters(), starts, strict=True):
            parameter.data.copy_(start[fold].T.squeeze(1) if parameter.dim() == 1 else start[fold].T)
        optimizer = torch.optim.Adam(probe.parameters(), lr=config.probe_learning_rate)
        best, waited, epoch = float("inf"), 0, 0
        while waited < config.probe_patience and epoch < config.probe_epochs:
            for batch, keep in draws[epoch]:
                active = probe[1](probe[0](h[batch[fold]])) * keep[fold] / (1 - config.probe_dropout)
                optimizer.zero_grad()
                F.cross_entropy(probe[2](active), labels[batch[fold]]).backward()
                optimizer.step()
            with torch.no_grad():
                loss = F.cross_entropy(probe(h[folds.watched[fold]]), labels[folds.watched[fold]]).item()
            epoch, waited = epoch + 1, waited + 1
            if loss < best:
                best, waited = loss, 0
                weights = {name: value.clone() for name, value in probe.state_dict().items()}
        if config.probe_stopping == "inner":
            probe.load_state_dict(weights)
        probes.append(probe)
        took.append((epoch, waited))
    return probes, took


@pytest.mark.parametrize("stopping", ["inner", "test"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_probes_trained_together_are_those_trained_one_after_another(stopping, dropout):
    h, labels = noisy_data()
    config = probe_settings(folds=4, probe_hidden=8, probe_epochs=40, probe_patience=3, probe_learning_rate=1e-2, probe_batch=32,
                            probe_dropout=dropout, probe_stopping=stopping)  # fmt: skip
    made = clvq.make_folds(labels.numpy(), config)
    folds = made._replace(  # of unlike sizes
        kept=[rows[: len(rows) - 5 * fold] for fold, rows in enumerate(made.kept)],
        watched=[rows[: len(rows) - 2 * fold] for fold, rows in enumerate(made.watched)],
    )
    sets = torch.stack([h, h.roll(1, 1) + 0.5])  # two sets of states of the same sentences
    together = clvq.train_probes(sets, labels, folds, config)
    logits = together.logits(sets.repeat_interleave(4, 0)).unflatten(0, (2, 4))
    chances = clvq.score(together, sets, folds)
    patience = []
    for i, x in enumerate(sets):
        apart, took = one_after_another(x, labels, folds, config)
        patience += took
        for fold, (probe, held) in enumerate(zip(apart, folds.held, strict=True)):
            torch.testing.assert_close(logits[i, fold], probe(x), rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(chances[i, held], probe(x[held]).log_softmax(1), rtol=1e-3, atol=1e-3)
    assert len(set(patience)) > 1 and any(epochs < 40 for epochs, _ in patience)  # patience ends folds, each at its own time
    assert any(waited for _, waited in patience)  # so that best and last weights are not the same


def test_sets_of_states_do_not_meet_in_training():
    h, labels = noisy_data()
    config = probe_settings(folds=3, probe_epochs=30, probe_patience=2, probe_learning_rate=1e-2)
    folds = clvq.make_folds(labels.numpy(), config)
    sets = torch.stack([h, 3 * torch.randn(h.shape, generator=torch.Generator().manual_seed(4)), h.flip(1)])
    together = clvq.train_probes(sets, labels, folds, config)
    for i, x in enumerate(sets):
        for both, alone in zip(together, clvq.train_probes(x[None], labels, folds, config), strict=True):
            torch.testing.assert_close(both[3 * i : 3 * i + 3], alone, rtol=1e-3, atol=1e-4)


def test_dropout_acts_in_training_and_not_in_scoring():
    h, labels = noisy_data()
    config = probe_settings(folds=4, probe_dropout=0.5, probe_epochs=5)
    folds = clvq.make_folds(labels.numpy(), config)
    with_dropout, without = (clvq.train_probes(h[None], labels, folds, config.replace(probe_dropout=p)) for p in (0.5, 0.0))
    assert not torch.allclose(with_dropout.weight1, without.weight1, atol=1e-4)
    for fold, held in enumerate(folds.held):
        w1, b1, w2, b2 = (p[fold] for p in with_dropout)
        expected = F.linear(F.linear(h, w1.T, b1[0]).relu(), w2.T, b2[0]).log_softmax(1)
        torch.testing.assert_close(clvq.score(with_dropout, h[None], folds)[0, held], expected[held])


def test_probes_depend_on_the_seed_alone_and_the_global_state_stays():
    h, labels = noisy_data()
    config = probe_settings(folds=3, probe_epochs=3)
    folds = clvq.make_folds(labels.numpy(), config)
    before = torch.random.get_rng_state()
    first, again, other = (clvq.train_probes(h[None], labels, folds, config.replace(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))


def test_a_sentence_is_scored_by_the_probe_that_never_saw_it():
    h, labels = torch.randn(200, 64), torch.arange(200) % 2  # nothing to learn, and room enough to learn it by heart
    config = probe_settings(folds=4, probe_epochs=100, probe_patience=100, probe_learning_rate=1e-2, probe_dropout=0.0,
                            probe_stopping="test")  # fmt: skip
    folds = clvq.make_folds(labels.numpy(), config)
    probes = clvq.train_probes(h[None], labels, folds, config)
    on_own = (probes.logits(h.expand(4, -1, -1)).argmax(2) == labels).float()
    assert all(on_own[fold, kept].mean() > 0.95 for fold, kept in enumerate(folds.kept))
    assert 0.35 < (clvq.score(probes, h[None], folds)[0].argmax(1) == labels).float().mean() < 0.65


def test_probes_of_one_set_score_every_variant_and_probes_of_several_their_own():
    h, labels = noisy_data(sentences=60)
    config = probe_settings(folds=3, probe_epochs=5)
    folds = clvq.make_folds(labels.numpy(), config)
    variants = torch.stack([h, h.flip(1), 2 * h])
    one, own = (clvq.train_probes(x, labels, folds, config) for x in (h[None], variants))
    shared, each = clvq.score(one, variants, folds), clvq.score(own, variants, folds)
    assert shared.shape == each.shape == (3, 60, 3)
    torch.testing.assert_close(shared.exp().sum(2), torch.ones(3, 60))
    for v, x in enumerate(variants):
        alone = clvq.train_probes(x[None], labels, folds, config)
        torch.testing.assert_close(each[v], clvq.score(alone, x[None], folds)[0], rtol=1e-3, atol=1e-4)
        for fold, held in enumerate(folds.held):
            weights = clvq.Probes(*(p[fold][None] for p in one))
            torch.testing.assert_close(shared[v, held], weights.logits(x[held][None])[0].log_softmax(1))
    assert not torch.allclose(shared[1], each[1], atol=1e-3)


# --- the protocol -------------------------------------------------------------------------------------------------


def accuracy(results: pd.DataFrame) -> pd.Series:
    return results.groupby(["removed", "way", "probe"], observed=True)["correct"].mean()


@pytest.fixture(scope="module")
def results(planted):
    """What the protocol gives for the planted method, and for one that takes the salient word for the direction that says nothing."""
    trial, method = planted
    elsewhere = clvq.Concepts("elsewhere", 0, method.vectors.roll(2, 0), scores=lambda states: states @ method.vectors.T)
    ways = ("projection", "centred", "subtraction")
    return clvq.concat([clvq.faithfulness([method, elsewhere], trial), clvq.retrained([method, elsewhere], trial, ways=ways)])


@pytest.mark.parametrize("way", ["projection", "centred"])
def test_without_the_direction_that_tells_the_class_accuracy_is_chance_and_without_another_it_stays(results, way):
    found, elsewhere = (accuracy(part) for _, part in results.groupby("method", sort=False, observed=True))
    assert found["nothing", "none", "frozen"] > 0.97
    assert 0.38 < found["concept", way, "frozen"] < 0.62
    assert 0.38 < found["concept", way, "retrained"] < 0.62
    assert 0.38 < found["other class", way, "frozen"] < 0.62  # the same direction, the other way round
    assert min(found[control, way, "frozen"] for control in ("gaussian", "random word", "matched norm")) > 0.9
    assert 0.6 < found["random code", way, "frozen"] < 0.9  # the class's direction for half of the sentences
    assert min(elsewhere["concept", way]) > 0.97


def test_subtraction_of_a_concept_longer_than_the_state_gives_the_other_answer_and_a_new_probe_undoes_it(results):
    found = accuracy(results[results["method"] == "planted"])
    assert found["concept", "subtraction", "frozen"] < 0.05 and found["concept", "subtraction", "retrained"] > 0.97
    assert found["other class", "subtraction", "frozen"] > 0.85  # the model takes 10 of the 200 for the other class
    assert found["matched norm", "subtraction", "frozen"] > 0.8


def test_results_have_a_row_for_each_sentence_and_variant_with_what_was_predicted(results, planted):
    trial = planted[0]
    assert results.columns.tolist() == ["method", "layer", "removed", "way", "probe", "seed", "sentence", "fold", "label", "predicted",
                                        "correct", "flipped", "share", "distance", "p0", "p1"]  # fmt: skip
    controls = {"gaussian", "random code", "random word", "other class", "mean", "first component", "matched norm",
                "random code, equal norm"}  # fmt: skip
    left_out = {("centred", "mean"), *(("subtraction", name) for name in ("mean", "gaussian", "first component"))}
    frozen = {(way, name) for way in ("projection", "centred", "subtraction") for name in {"concept", *controls}} - left_out
    own = results[results["method"] == "planted"]
    made = {probe: set(zip(part["way"], part["removed"], strict=True)) for probe, part in own.groupby("probe", observed=True)}
    assert made["frozen"] == {("none", "nothing"), *frozen}
    assert made["retrained"] == {(way, "concept") for way in ("projection", "centred", "subtraction")}
    assert set(results["method"]) == {"planted", "elsewhere"} and (results["layer"] == 0).all()
    assert (results["seed"] == trial.config.seed).all() and (results[["p0", "p1"]].sum(axis=1) - 1).abs().max() < 1e-5
    assert ((results["predicted"] == results["label"]) == results["correct"]).all()
    assert (results["predicted"] == (results["p1"] > results["p0"])).all()
    answer = own.loc[own["removed"] == "nothing", "predicted"].to_numpy()
    for _, part in results.groupby(["method", "removed", "way", "probe"], observed=True):
        assert part["sentence"].tolist() == list(range(200)) and part["label"].tolist() == trial.labels.tolist()
        assert all((part["fold"].to_numpy()[held] == fold).all() for fold, held in enumerate(trial.folds.held))
        assert ((part["predicted"] != answer) == part["flipped"]).all()
    nothing = own[own["removed"] == "nothing"]
    assert not nothing["flipped"].any() and (nothing["share"] == 0).all() and (nothing["distance"] == 0).all()


def test_the_protocol_depends_on_the_seed_alone(planted, make_trial):
    trial, method = planted
    h, words = trial.summaries(0), trial.test.states[0][~trial.test.tokens["is_summary"].to_numpy()].view(200, 2, -1)
    same, again, other = (
        clvq.faithfulness([method], make_trial(h, list(words), trial.labels, seed=seed, probe_epochs=3)) for seed in (1, 1, 2)
    )
    pd.testing.assert_frame_equal(same, again)
    assert not same["p0"].equals(other["p0"]) and not same["fold"].equals(other["fold"])


def test_the_random_direction_is_gaussian_and_another_one_for_each_sentence(planted):
    trial, method = planted
    found = trial.removals(method)["gaussian"]
    assert len(found.vector.unique(dim=0)) == 200 and torch.linalg.matrix_rank(found.vector) == 12
    assert scipy.stats.kstest(found.vector.flatten().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(F.cosine_similarity(found.vector, found.offset), torch.ones(200))


@pytest.mark.parametrize("copy", [0.0, 2.0])
def test_a_probe_trained_anew_finds_the_class_only_where_it_was_moved_and_not_where_it_is_gone(make_trial, copy):
    # The class is 0 or 9 along one direction; with a copy, 0 or 2 along another too. To the first probe a 0 says "class 0".
    draw = torch.Generator().manual_seed(1)
    labels, axes = torch.arange(160) % 2, torch.eye(12)
    h = 0.3 * torch.randn(160, 12, generator=draw) + labels[:, None] * (9 * axes[0] + copy * axes[1])
    trial = make_trial(h, [axes[:1]] * 160, labels, probe_learning_rate=5e-3)
    methods = [clvq.Concepts("class", 0, axes[:1], directions=True)]
    found = accuracy(clvq.concat([clvq.faithfulness(methods, trial), clvq.retrained(methods, trial)]))
    assert found["nothing", "none", "frozen"] > 0.97
    assert 0.35 < found["concept", "projection", "frozen"] < 0.75
    again = found["concept", "projection", "retrained"]
    assert again > 0.95 if copy else 0.35 < again < 0.65


def test_methods_retrained_together_are_those_retrained_one_by_one(planted):
    trial, method = planted
    other = clvq.Concepts("other", 0, method.vectors.roll(1, 0))
    together = clvq.retrained([method, other], trial, removed=("concept", "random code"))
    for one in (method, other):
        alone = clvq.retrained([one], trial, removed=("concept", "random code"))
        part = together[together["method"] == one.name].reset_index(drop=True)
        for column in ("removed", "way", "sentence", "predicted"):
            assert part[column].tolist() == alone[column].tolist()
        np.testing.assert_allclose(part["p1"], alone["p1"], atol=2e-3)
    assert set(together["probe"]) == {"retrained"} and set(together["way"]) == {"projection", "centred"}


def test_a_method_of_another_layer_is_refused(refused, planted):
    trial, method = planted
    with refused("layer 4", "0"):
        clvq.faithfulness([replace(method, layer=4, reads=0)], trial)


# --- the summary --------------------------------------------------------------------------------------------------


def answers(correct: list[bool], seed: int = 0, **columns) -> pd.DataFrame:
    """Results of one variant as `faithfulness` gives them, of sentences in folds of two."""
    row = {"method": "m", "layer": 0, "removed": "concept", "way": "projection", "probe": "frozen", "seed": seed}
    if columns.get("removed") == "nothing":
        row["way"] = "none"
    n = len(correct)
    return pd.DataFrame({"sentence": range(n), "fold": np.arange(n) // 2, **row, "correct": correct, "flipped": False, **columns})


FIRST, SECOND, THIRD = ([c == "+" for c in text] for text in ("+++-++", "--+-++", "+-+---"))


def summarised(*parts: pd.DataFrame, bootstrap: int = 100, index: str = "removed", **options) -> pd.DataFrame:
    return clvq.summarise(pd.concat(parts, ignore_index=True), probe_settings(bootstrap=bootstrap), **options).set_index(index)


def test_mean_deviation_over_folds_and_change_are_those_worked_by_hand():
    summary = summarised(answers(FIRST, removed="nothing"), answers(SECOND), answers(THIRD, removed="gaussian"))
    # folds: 1, 1/2, 1 and 0, 1/2, 1 and 1/2, 1/2, 0
    assert summary["accuracy"].tolist() == pytest.approx([5 / 6, 1 / 2, 1 / 3])
    assert summary["accuracy_folds"].tolist() == pytest.approx([5 / 6, 1 / 2, 1 / 3])
    assert summary["accuracy_sd_folds"].tolist() == pytest.approx([np.sqrt(1 / 12), 1 / 2, np.sqrt(1 / 12)])
    assert summary["change"].tolist() == pytest.approx([0, -2 / 6, -3 / 6])
    assert summary.loc["nothing", ["change", "change_low", "change_high"]].tolist() == [0, 0, 0]
    assert summary["seeds"].tolist() == [1, 1, 1] and summary["accuracy_sd_seeds"].isna().all()


def test_a_sentence_counts_with_its_mean_over_seeds_and_the_deviation_over_seeds_is_that_worked_by_hand():
    summary = summarised(*(answers(given, seed, removed="nothing") for seed, given in enumerate([FIRST, SECOND])),
                         *(answers(given, seed) for seed, given in enumerate([SECOND, THIRD])))  # fmt: skip
    assert summary["seeds"].tolist() == [2, 2]
    # 5/6 and 1/2; 1/2 and 1/3
    assert summary["accuracy"].tolist() == pytest.approx([2 / 3, 5 / 12])
    assert summary["accuracy_sd_seeds"].tolist() == pytest.approx([1 / 3 / np.sqrt(2), 1 / 6 / np.sqrt(2)])
    assert summary["accuracy_sd_folds"].tolist() == pytest.approx([(np.sqrt(1 / 12) + 1 / 2) / 2, (1 / 2 + np.sqrt(1 / 12)) / 2])
    assert summary.loc["concept", "change"] == pytest.approx(5 / 12 - 2 / 3)
    # one sentence has 1/2, 1/2, 1, 0, 1, 1: two seeds are not twice the sentences, and 5/6 and 1/2 are not 2/3 twice
    within = (clvq.resamples(6, probe_settings(bootstrap=100))[1:] @ [0.5, 0.5, 1, 0, 1, 1] / 6).var()
    between = (1 / 3) ** 2 / 4  # the variance of the two, (1/3)^2 / 2, less than half as large for their mean
    half = scipy.stats.t.ppf(0.975, ((within + between) / between) ** 2) * np.sqrt(within + between)
    found = summary.loc["nothing", ["accuracy_low", "accuracy_high"]].tolist()
    assert 2 / 3 + half > 1  # where shares end
    assert found == pytest.approx([2 / 3 - half, 1.0]) and (summary["covers"] == "sentences and seeds").all()


def test_the_order_of_the_rows_does_not_matter():
    parts = [answers(given, seed, removed=name) for name in ("nothing", "concept") for seed, given in enumerate([FIRST, THIRD])]
    shuffled = pd.concat(parts).sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(summarised(shuffled).sort_index(), summarised(*parts).sort_index())


def test_the_table_for_people_has_the_summarys_numbers_with_their_signs(results):
    table = clvq.removal_table(results, probe_settings(bootstrap=100)).set_index("method").loc["planted"]
    plain, code = (
        clvq.summarise(results[results["probe"] == "frozen"], probe_settings(bootstrap=100), against=other)
        .query("method == 'planted' and removed == 'concept' and way == 'projection'")
        .iloc[0]
        for other in ("nothing", "random code")
    )
    assert table["without the concept"] == f"{plain['accuracy']:.3f} ({plain['accuracy_low']:.3f} to {plain['accuracy_high']:.3f})"
    for column, row in (("against nothing removed", plain), ("against a random code", code)):
        assert table[column] == f"{row['change']:+.3f} ({row['change_low']:+.3f} to {row['change_high']:+.3f})" and row["change"] < -0.2
    assert table["sd over seeds"] == "–"


def test_a_change_is_against_the_same_removal_of_something_else_where_that_is_asked():
    parts = [answers(FIRST, removed="nothing"), answers(SECOND), answers(THIRD, removed="gaussian"),
             answers(FIRST, removed="gaussian", way="centred"), answers(THIRD, way="centred", method="other"),
             answers(FIRST, probe="retrained")]  # fmt: skip
    against = summarised(*parts, against="gaussian", index=["method", "removed", "way", "probe"])["change"]
    assert against["m", "concept", "projection", "frozen"] == pytest.approx(1 / 6)
    assert against["m", "gaussian", "centred", "frozen"] == 0
    assert against.drop([("m", "concept", "projection", "frozen")]).dropna().eq(0).all() and against.isna().sum() == 3
    columns = {"method": "m", "way": "projection"}  # with a mapping, against what has these values and the rest alike
    assert summarised(*parts, against=columns, index=["method", "removed", "way", "probe"])["change"].dropna().to_dict() == pytest.approx({
        ("m", "concept", "projection", "frozen"): 0, ("m", "gaussian", "projection", "frozen"): 0,
        ("m", "gaussian", "centred", "frozen"): 3 / 6, ("other", "concept", "centred", "frozen"): 2 / 6 - 3 / 6,
        ("m", "concept", "projection", "retrained"): 0,
    })  # fmt: skip
    nothing = summarised(*parts, index=["method", "removed", "way", "probe"])["change"]
    assert nothing["m", "concept", "projection", "retrained"] == pytest.approx(0)  # against the states as they are
    assert nothing["m", "gaussian", "projection", "frozen"] == pytest.approx(-3 / 6)
    assert np.isnan(nothing["other", "concept", "centred", "frozen"])


def test_intervals_are_scipys_percentile_bootstrap_over_sentences():
    draw = np.random.default_rng(1)
    right = {"nothing": draw.random(400) < 0.9, "concept": draw.random(400) < 0.6}
    kl = draw.gamma(2, size=400)
    summary = summarised(*(answers(v.tolist(), removed=k, kl=kl) for k, v in right.items()), bootstrap=4000, values=("accuracy", "kl"))

    def scipys(values):
        found = scipy.stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile", rng=2).confidence_interval
        return [found.low, found.high]

    for name, values in right.items():
        found = summary.loc[name, ["accuracy_low", "accuracy_high"]].tolist()
        assert found == pytest.approx(scipys(values.astype(float)), abs=0.006)
    change = right["concept"].astype(float) - right["nothing"]
    assert summary.loc["concept", ["change_low", "change_high"]].tolist() == pytest.approx(scipys(change), abs=0.006)
    assert summary.loc["concept", "kl"] == pytest.approx(kl.mean())
    assert summary.loc["concept", ["kl_low", "kl_high"]].tolist() == pytest.approx(scipys(kl), abs=0.02)


def test_resamples_are_those_of_whole_sentences_and_depend_on_the_seed_alone():
    draws = clvq.resamples(50, probe_settings(bootstrap=2000))
    assert draws.shape == (2001, 50) and (draws[0] == 1).all() and (draws.sum(1) == 50).all()
    # a sentence is drawn 0, 1, 2, ... times as a binomial of 50 trials says
    found = np.bincount(draws[1:].astype(int).ravel(), minlength=8)[:8] / draws[1:].size
    assert np.abs(found - scipy.stats.binom.pmf(range(8), 50, 1 / 50)).max() < 0.005
    results = answers([True, False] * 50)
    first, again, other = (clvq.summarise(results, probe_settings(bootstrap=100, seed=s)) for s in (1, 1, 2))
    pd.testing.assert_frame_equal(first, again)
    assert not first["accuracy_low"].equals(other["accuracy_low"])


# --- intervals over sentences and seeds ---------------------------------------------------------------------------


def covered(seed_deviation: float, seeds: int = 3, sentences: int = 200, runs: int = 400) -> float:
    """How often the interval holds the true mean, 0, of sentences that trainings share and whose deviation is 0.4."""
    draw, hits = np.random.default_rng(0), 0
    for run in range(runs):
        values = draw.normal(0, 0.4, sentences) + draw.normal(0, 0.2, (seeds, sentences))
        values += draw.normal(0, seed_deviation, (seeds, 1))
        found = clvq.mean_interval(values, probe_settings(bootstrap=200, seed=run))
        hits += found.low <= 0 <= found.high
        assert found.covers == "sentences and seeds" and found.low < found.value < found.high
    return hits / runs


@pytest.mark.parametrize("ratio", [0.0, 1.0, 10.0])
def test_intervals_over_three_seeds_hold_the_truth_in_95_percent_whether_seeds_vary_or_not(ratio):
    # the deviation of the mean over three seeds, in deviations of the mean over sentences
    assert 0.91 <= covered(ratio * 0.4 / np.sqrt(200) * np.sqrt(3)) <= 0.98


def test_without_variance_between_trainings_the_interval_is_that_of_one_and_widens_with_it():
    values = np.random.default_rng(0).random(300)
    one = clvq.mean_interval(values, probe_settings(bootstrap=4000))
    same, apart = (clvq.mean_interval(values + np.array(gaps)[:, None], probe_settings(bootstrap=4000))
                   for gaps in ([0, 0, 0], [-0.1, 0, 0.1]))  # fmt: skip
    assert one.covers == "sentences" and same.covers == apart.covers == "sentences and seeds"
    assert (same.low, same.high) == pytest.approx((one.low, one.high), abs=2e-3)
    assert apart.low < one.low - 0.1 and apart.high > one.high + 0.1 and apart.value == pytest.approx(one.value)


def test_the_interval_of_a_share_ends_where_shares_end():
    wide = clvq.interval(np.array([[0.9], [0.99], [0.7]]))
    assert wide.high > 1 and wide.columns("x")["x_high"] == wide.high
    assert wide.columns("x", share=True) == {"x": wide.value, "x_low": wide.low, "x_high": 1}
    alone = clvq.interval(np.array([[0.5]])).columns("x", share=True)
    assert alone["x"] == 0.5 and math.isnan(alone["x_low"])


def test_values_of_whole_trainings_have_students_interval_and_one_of_them_has_none():
    values = np.array([0.3, 0.5, 0.45])
    found, test = clvq.interval(values[:, None]), scipy.stats.ttest_1samp(values, 0)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval())) and found.p == pytest.approx(test.pvalue)
    assert found.covers == "seeds"
    alone = clvq.interval(values[:1, None])
    assert alone.value == 0.3 and np.isnan([alone.low, alone.high, alone.p]).all() and alone.covers == ""


def test_the_interval_takes_any_statistic_of_resampled_sentences():
    part = chances(2)
    weights = clvq.resamples(90, probe_settings(bootstrap=100))
    areas = clvq.auc(part["p1"].to_numpy(), part["label"].to_numpy() == 1, weights)
    found = clvq.interval(areas)
    assert found.value == areas[0] and (found.low, found.high) == tuple(np.quantile(areas[1:], [0.025, 0.975]))


def test_the_summary_adjusts_the_p_values_of_all_its_changes_by_holm_and_counts_no_comparison_with_itself():
    draw = np.random.default_rng(0)
    parts = [answers((draw.random(200) < chance).tolist(), seed, removed=name)
             for name, chance in (("nothing", 0.9), ("a", 0.89), ("b", 0.8), ("c", 0.5)) for seed in range(3)]  # fmt: skip
    summary = summarised(*parts)
    assert np.isnan(summary.loc["nothing", ["change_p", "change_p_holm"]].astype(float)).all()
    p, adjusted = (summary.loc[["a", "b", "c"], name].to_numpy() for name in ("change_p", "change_p_holm"))
    assert (np.diff(p) < 0).all() and p[0] > 0.05 > p[2]
    order = np.sort(p) * [3, 2, 1]
    assert np.sort(adjusted) == pytest.approx(np.minimum(np.maximum.accumulate(order), 1))


def test_differences_are_paired_by_the_seeds_that_both_have():
    both = [answers(FIRST, 0, removed="nothing"), answers(SECOND, 0), answers(FIRST, 1)]
    summary = summarised(*both)
    assert summary.loc["concept", "change"] == pytest.approx(-2 / 6) and summary["seeds"].tolist() == [1, 2]
    none = summarised(answers(FIRST, 0, removed="nothing"), answers(SECOND, 1))["change"]
    assert none["nothing"] == 0 and np.isnan(none["concept"])


@pytest.mark.parametrize(("method", "expected"), [("holm", [0.04, 0.09, np.nan, 0.09]), ("fdr_bh", [0.03, 0.045, np.nan, 0.045])])
def test_adjusted_p_values_are_those_worked_by_hand(method, expected):
    # three of them; Holm: x 3, x 2, x 1, never less than before; Benjamini-Hochberg: x 3, x 3/2, x 1, never more than after
    p = {"holm": [0.04 / 3, 0.045, np.nan, 0.06], "fdr_bh": [0.01, 0.03, np.nan, 0.045]}[method]
    assert clvq.adjust_p_values(np.array(p), method) == pytest.approx(expected, nan_ok=True)
    assert np.isnan(clvq.adjust_p_values(np.array([np.nan]), method)).all()


# --- area under the ROC curve -------------------------------------------------------------------------------------


@st.composite
def ranked(draw):
    """Chances with many ties, both classes, and how often each sentence was drawn (both classes at least once)."""
    n = draw(st.integers(2, 30))
    chance = draw(st.lists(st.integers(0, 6), min_size=n, max_size=n))
    positive = np.array(draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    positive[:2] = [True, False]
    weights = np.array(draw(st.lists(st.integers(0, 3), min_size=n, max_size=n)))
    weights[:2] += 1
    return np.array(chance) / 6, positive, weights


@given(case=ranked())
def test_the_area_under_the_curve_is_scikit_learns_with_ties_and_for_sentences_drawn_more_than_once(case):
    chance, positive, weights = case
    found = clvq.auc(chance, positive, np.stack([np.ones(len(chance)), weights]))
    repeated = np.repeat(np.arange(len(chance)), weights)
    assert found == pytest.approx([roc_auc_score(positive, chance), roc_auc_score(positive[repeated], chance[repeated])])


def chances(classes: int, sentences: int = 90, seed: int = 0) -> pd.DataFrame:
    """Results with a label and probabilities that say something of it."""
    draw = np.random.default_rng(seed)
    label = np.arange(sentences) % classes
    p = draw.dirichlet(np.ones(classes), sentences) + 0.5 * np.eye(classes)[label] * draw.random((sentences, 1))
    p /= p.sum(1, keepdims=True)
    return answers((p.argmax(1) == label).tolist(), seed, label=label, **{f"p{c}": p[:, c] for c in range(classes)})


@pytest.mark.parametrize("classes", [2, 3])
def test_the_summary_has_scikit_learns_area_for_two_classes_and_the_mean_of_one_against_the_rest_for_more(classes):
    parts = [chances(classes, seed=seed) for seed in (0, 1)]
    given = [part["p1"] if classes == 2 else part[["p0", "p1", "p2"]] for part in parts]
    expected = [roc_auc_score(part["label"], p, multi_class="ovr", average="macro") for part, p in zip(parts, given, strict=True)]
    assert summarised(parts[0], values=["auc"])["auc"].item() == pytest.approx(expected[0])
    assert summarised(*parts, values=["auc"])["auc"].item() == pytest.approx(np.mean(expected))


def test_the_interval_of_the_area_is_that_of_the_resampled_sentences():
    part = chances(2)
    summary = summarised(part, values=["auc"]).iloc[0]
    repeated = [np.repeat(np.arange(90), weights.astype(int)) for weights in clvq.resamples(90, probe_settings(bootstrap=100))[1:]]
    areas = [roc_auc_score(part["label"].to_numpy()[rows], part["p1"].to_numpy()[rows]) for rows in repeated]
    assert summary[["auc_low", "auc_high"]].tolist() == pytest.approx(np.quantile(areas, [0.025, 0.975]))


# --- what notebooks say -------------------------------------------------------------------------------


def test_a_cell_shows_an_interval_in_any_format_and_nothing_that_is_not_there():
    row = {"change": -0.25, "change_low": -0.5, "change_high": 0.125, "flipped": 0.5, "flipped_low": math.nan, "flipped_high": math.nan,
           "auc": math.nan, "auc_low": math.nan, "auc_high": math.nan}
    assert clvq.interval_cell(row, "change", "+.2f") == "-0.25 (-0.50 to +0.12)"
    assert clvq.interval_cell(row, "flipped", ".0%") == "50%"
    assert clvq.interval_cell(row, "auc") == "–"


def test_methods_are_called_worse_or_better_only_by_adjusted_p_values(tiny_config):
    rng, parts = np.random.default_rng(0), []
    for method, accuracy in {"CLVQ-VAE": 0.6, "k-means": 0.6, "Ward clusters": 0.2, "random states": 0.95}.items():
        parts += [pd.DataFrame({"method": method, "layer": 1, "removed": "concept", "way": "projection", "probe": "frozen", "seed": seed,
                                "sentence": range(300), "correct": rng.random(300) < accuracy}) for seed in (1, 2, 3)]
    results = pd.concat(parts)
    other_way = results.assign(way="centred", correct=~results["correct"])
    table = clvq.compare_methods(pd.concat([results, other_way]), tiny_config, 1)
    told = {"k-means": "cannot be told from", "Ward clusters": "costs more than", "random states": "costs less than"}
    assert table["verdict"].to_dict() == told
    assert table["learned"].to_dict() == {"k-means": True, "Ward clusters": True, "random states": False}
    assert clvq.verdict({"change": -0.1, "change_p_holm": math.nan}) == "cannot be told from"
    assert clvq.verdict({"change": -0.1, "change_p_holm": 0.06}) == "cannot be told from"


def test_published_figures_are_found_by_our_names():
    table1 = dict(table=1, model="RoBERTa", dataset="ERASER-Movie")
    cells = clvq.published_cells(["CLVQ-VAE", "single-layer VQ-VAE, layer 4", "SAE 2048, decoder", "k-means"], (4, 6), **table1)
    assert cells == ["0.078 ± 0.045", "0.095 ± 0.046", "0.227 ± 0.055", "–"]
