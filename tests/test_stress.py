"""Stress tests of the metric: ways of removal, controls, curves, shifts, the model's own answer, people's evidence, planted concepts."""

import gzip
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.power import NormalIndPower, TTestPower
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import clvq_core as clvq

ERASER = Path(__file__).parents[1].parent / "shared" / "data" / "eraser_movies" / "clvqvae_sentences_dev.jsonl.gz"
WAYS = ("projection", "centred", "subtraction")


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


# --- three ways of removal ----------------------------------------------------------------------------------------


@st.composite
def points(draw, shape=4):
    """Rows of ``shape`` kinds (states, concepts, means, a constant ...), in double precision and of moderate size."""
    rows, width = draw(st.integers(1, 5)), draw(st.integers(2, 6))
    flat = draw(st.lists(st.floats(-10, 10), min_size=shape * rows * width, max_size=shape * rows * width))
    return torch.tensor(flat, dtype=torch.float64).view(shape, rows, width)


@given(given_points=points(shape=5), size=st.sampled_from([0.1, 1.0, 30.0]))
def test_centred_removal_does_not_depend_on_where_the_origin_is(given_points, size):
    h, v, centre, word_mean, constant = given_points
    away = v - word_mean
    away = away + 0.1 * (away.norm(dim=1, keepdim=True) < 0.1)  # a direction of length zero has no projection
    shift = size * constant
    here = clvq.remove(h, clvq.Removal(v, away), "centred", centre)
    there = clvq.remove(h + shift, clvq.Removal(v + shift, away), "centred", centre + shift)
    torch.testing.assert_close(there - shift, here, rtol=1e-7, atol=1e-7)


@given(given_points=points(shape=3))
def test_projection_from_the_centre_is_centred_removal_for_points(given_points):
    h, v, centre = given_points
    v = v + 0.1 * ((v - centre).norm(dim=1, keepdim=True) < 0.1)
    removal = clvq.Removal(v - centre, v - centre)
    from_centre = clvq.remove(h - centre, removal, "projection", torch.full_like(centre, torch.nan))  # the centre plays no part
    torch.testing.assert_close(from_centre + centre, clvq.remove(h, removal, "centred", centre), rtol=1e-9, atol=1e-9)


def test_the_three_ways_of_a_case_worked_by_hand():
    h, centre = torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]])
    removal = clvq.Removal(torch.tensor([[1.0, 1.0]]), torch.tensor([[0.0, 2.0]]))
    # less 7/2 of (1, 1); what differs from (1, 0) is (2, 4), of which (2, 0) stays; less (0, 2)
    expected = {"projection": [[-0.5, 0.5]], "centred": [[3.0, 0.0]], "subtraction": [[3.0, 2.0]]}
    for way in WAYS:
        torch.testing.assert_close(clvq.remove(h, removal, way, centre), torch.tensor(expected[way]))


def test_far_from_the_origin_projection_tends_to_plain_subtraction_at_the_rate_that_a_hand_derives():
    # States h + c u and concepts v + c u, with u of length 1 and orthogonal to both. The factor of the projection is
    # (h.v + c^2) / (v.v + c^2) = 1 + (h.v - v.v) / c^2 + ..., so what is left is h - v - (h.v - v.v) / c u + ...
    h, v = torch.randn(2, 20, 6, generator=seed(), dtype=torch.float64)
    h, v = F.pad(h, (0, 1)), F.pad(v, (0, 1))
    u = torch.eye(7, dtype=torch.float64)[6]
    rate = ((h - v) * v).sum(1)
    for c in (1e2, 1e3, 1e4):
        left = clvq.remove(h + c * u, clvq.Removal(v + c * u, v), "projection", u)
        torch.testing.assert_close((left - (h - v)) * c, -rate[:, None] * u, rtol=1e-2, atol=100 / c)
    torch.testing.assert_close(left, clvq.remove(h, clvq.Removal(v, v), "subtraction", u), rtol=0, atol=2e-3)


def test_a_shift_of_all_states_and_points_moves_centred_and_subtracted_states_along_and_changes_projected_ones(planted, make_trial):
    trial, method = planted
    shift = 4 * torch.randn(12, generator=seed(3))
    words = trial.test.states[0][~trial.test.tokens["is_summary"].to_numpy()].view(200, 2, -1)
    moved = make_trial(trial.summaries(0) + shift, list(words + shift), trial.labels, trial.predicted)
    here, there = trial.variants(method), moved.variants(replace(method, vectors=method.vectors + shift, centre=method.centre + shift))
    for name in ("concept", "random code", "random word", "other class", "matched norm", "gaussian"):
        for way in {"centred", "subtraction"} if name != "gaussian" else {"centred"}:
            torch.testing.assert_close(there[name, way] - shift, here[name, way], rtol=0, atol=1e-4)
    assert (there["concept", "projection"] - shift - here["concept", "projection"]).norm(dim=1).min() > 0.1


# --- what is removed, and the controls ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transparent(make_trial):
    """150 sentences of one to five random words, and a method with a code for every row: what was chosen can be read off. The
    training states are others."""
    counts = torch.randint(1, 6, (150,), generator=seed(5))
    counts[:5] = 1
    h = torch.randn(150, 8, generator=seed(6))
    words = [torch.randn(n, 8, generator=seed(100 + i)) for i, n in enumerate(counts.tolist())]
    labels, predicted = torch.arange(150) % 2, torch.randint(0, 3, (150,), generator=seed(7))
    train = make_trial(1 + 2 * h.flip(0), [3 + w for w in words], labels).test
    trial = make_trial(h, words, labels, predicted, train=train, probe_epochs=2)
    return trial, clvq.Concepts("rows", 0, trial.test.states[0], centre=trial.centre(0).word)


def rows_of(removal: clvq.Removal, method: clvq.Concepts) -> torch.Tensor:
    """Which code each sentence loses."""
    same = (removal.vector[:, None] == method.vectors).all(2)
    assert (same.sum(1) == 1).all()
    return same.float().argmax(1)


def test_the_concept_is_that_of_the_most_salient_position(transparent):
    trial, method = transparent
    assert torch.equal(rows_of(trial.removals(method)["concept"], method), trial.salient)
    assert torch.equal(trial.salient, trial.test.summary_rows + 1)


def test_positions_are_ranked_by_falling_salience(transparent):
    trial, _ = transparent
    for sentence, part in trial.tokens.groupby("sentence"):
        there = trial.ranked[sentence][trial.ranked[sentence] >= 0].numpy()
        assert sorted(there) == part.index.tolist() and (np.diff(trial.tokens["salience"][there]) <= 0).all()
        assert (trial.ranked[sentence][len(there) :] == -1).all()


def test_a_random_code_is_drawn_as_often_as_words_have_it_and_never_one_without_words(transparent):
    trial, method = transparent
    unused = 1e3 + torch.arange(200.0)[:, None].expand(-1, 8)
    few = replace(method, vectors=torch.cat([method.vectors[:5], unused]))
    codes = [rows_of(trial.removals(few)["random code"], few)]
    codes += [trial.used_codes(few, (40, 25), seed(number)).flatten() for number in range(3)]
    words = trial.test.states[0][torch.from_numpy(~trial.tokens["is_summary"].to_numpy())]
    use = few.assign(words).bincount(minlength=205)[:5]
    assert codes[0].max() < 5 and use.max() > 2 * use.min()
    drawn = torch.cat(codes).bincount(minlength=5)
    assert scipy.stats.chisquare(drawn.numpy(), (use / use.sum() * drawn.sum()).double().numpy()).pvalue > 1e-3


def test_the_random_code_of_equal_norm_leads_where_the_random_code_does_and_takes_away_as_much_as_the_concept(transparent):
    trial, method = transparent
    h, variants = trial.summaries(0), trial.variants(method)
    for way in WAYS:
        concept, code, equal = (h - variants[name, way] for name in ("concept", "random code", "random code, equal norm"))
        torch.testing.assert_close(equal.norm(dim=1), concept.norm(dim=1), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(F.cosine_similarity(equal, code), torch.ones(150), rtol=0, atol=1e-4)


def test_a_frequent_code_is_another_one_that_about_as_many_words_have_and_the_rest_stays(planted, make_trial):
    draw = seed(3)
    words = [torch.randn(6, 8, generator=draw) for _ in range(80)]
    trial = make_trial(torch.randn(80, 8, generator=draw), words, torch.arange(80) % 2)
    method = clvq.Concepts("some", 0, torch.randn(12, 8, generator=draw))
    plain, more = trial.removals(method), trial.removals(method, ["frequent code"])
    assert set(more) - set(plain) == {"frequent code"}
    assert all(torch.equal(plain[name].vector, more[name].vector) for name in plain)
    counts = trial.assign(method, trial.words).bincount(minlength=12)
    place = counts.argsort(stable=True).argsort()
    own, other = trial.assign(method, trial.salient), rows_of(more["frequent code"], method)
    apart = (place[own] - place[other]).abs()
    assert apart.min() >= 1 and apart.max() <= 3 and len(other.unique()) > 6


def test_a_random_word_is_another_word_of_the_same_sentence_and_each_is_as_likely(transparent):
    trial, method = transparent
    row = rows_of(trial.removals(method)["random word"], method)
    chosen = trial.tokens.iloc[row.numpy()]
    assert chosen["sentence"].tolist() == list(range(150)) and not chosen["is_summary"].any()
    several = trial.test.lengths > 2
    assert torch.equal(row[~several], trial.salient[~several])  # with one word there is no other
    assert not (row == trial.salient)[several].any()
    five = chosen[(trial.test.lengths == 6).numpy()]["position"].value_counts().reindex(range(2, 6), fill_value=0)
    assert five.sum() > 20 and scipy.stats.chisquare(five).pvalue > 1e-3


def test_where_the_summary_is_most_salient_a_random_word_is_any_word(transparent):
    trial, method = transparent
    tokens = trial.tokens.assign(salience=trial.tokens["is_summary"].astype(float))
    other = clvq.Trial(trial.train, trial.test, tokens, trial.labels, trial.predicted, trial.config)
    found = other.removals(method)
    assert torch.equal(rows_of(found["concept"], method), trial.test.summary_rows)
    chosen = tokens.iloc[rows_of(found["random word"], method).numpy()]
    assert chosen["sentence"].tolist() == list(range(150)) and (chosen["position"] > 0).all() and (chosen["position"] == 1).any()


def test_the_other_class_is_the_concept_of_a_sentence_that_the_model_puts_in_another_class(transparent):
    trial, method = transparent
    other = trial.tokens["sentence"].to_numpy()[rows_of(trial.removals(method)["other class"], method)]
    assert (trial.predicted[other] != trial.predicted).all()
    assert (trial.labels[other] == trial.labels).any()  # it is the model's class that counts
    assert len(set(other)) > 50


class LargestTensor(TorchDispatchMode):
    """How many elements the largest tensor has that is made inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        self.elements = max([self.elements, *(x.numel() for x in tree_leaves(made) if isinstance(x, torch.Tensor))])
        return made


def test_each_sentence_of_another_class_is_as_likely_and_no_table_of_pairs_is_made(make_trial):
    classes, n = torch.tensor([0] * 6 + [1] * 3 + [3] * 1), 400
    predicted = classes.repeat(n)[torch.randperm(10 * n, generator=seed(1))]
    h = torch.randn(10 * n, 2, generator=seed(2))
    trial = make_trial(h, list(h[:, None]), torch.arange(10 * n) % 2, predicted)
    method = clvq.Concepts("rows", 0, trial.test.states[0][trial.salient])
    method.assign = lambda states: torch.arange(len(states))  # a code a sentence
    with LargestTensor() as largest:
        vectors = trial.removals(method)["other class"].vector
    assert largest.elements < 40 * 10 * n
    place = {tuple(row): i for i, row in enumerate(method.vectors.tolist())}
    other = torch.tensor([place[tuple(row)] for row in vectors.tolist()])
    assert (predicted[other] != predicted).all()
    for own in (0, 1, 3):
        rest = np.bincount(predicted[predicted != own], minlength=4)
        drawn = np.bincount(predicted[other[predicted == own]], minlength=4)
        assert scipy.stats.chisquare(drawn[rest > 0], rest[rest > 0] * drawn.sum() / rest.sum()).pvalue > 1e-3
    assert len(set(other.tolist())) > 0.55 * 10 * n  # of 4,000 draws


def test_without_sentences_of_another_class_that_control_is_left_out_and_the_others_stay(transparent):
    trial, method = transparent
    alone = clvq.Trial(trial.train, trial.test, trial.tokens, trial.labels, torch.zeros_like(trial.predicted), trial.config)
    assert alone.removals(method).keys() == trial.removals(method).keys() - {"other class"}
    assert ("other class", "centred") not in alone.variants(method)


def test_means_and_first_component_are_numpys_of_the_training_states(transparent):
    trial, method = transparent
    states, summary = trial.train.states[0].numpy().astype(float), trial.train.tokens["is_summary"].to_numpy()
    mean, component, word_mean = (part.numpy() for part in trial.centre(0))
    np.testing.assert_allclose(mean, states[summary].mean(0), atol=1e-5)
    np.testing.assert_allclose(word_mean, states[~summary].mean(0), atol=1e-5)
    first = np.linalg.svd(states[summary] - states[summary].mean(0))[2][0]
    np.testing.assert_allclose(component * np.sign(component @ first), first, atol=1e-4)
    found = trial.removals(method)
    np.testing.assert_allclose(found["mean"].vector, np.tile(mean, (150, 1)))
    np.testing.assert_allclose(found["first component"].vector, np.tile(component, (150, 1)))
    np.testing.assert_allclose(found["concept"].offset, found["concept"].vector - word_mean, atol=1e-6)


def test_each_method_is_centred_on_the_mean_of_what_its_vectors_are_averages_of_and_not_on_the_words(worded):
    trial, method, _ = worded
    elsewhere = replace(method, centre=method.centre + 3)
    expected = elsewhere.vectors[elsewhere.assign(trial.test.states[0][trial.salient])] - elsewhere.centre
    torch.testing.assert_close(trial.removals(elsewhere)["concept"].offset, expected)
    trial = Watched(trial.train, trial.test, trial.tokens, trial.labels, trial.predicted, trial.config)
    clvq.removal_curve([elsewhere], trial, most=2)
    np.testing.assert_allclose(trial.seen["concept", "centred", 2], expected_left(trial, elsewhere, 2, True), atol=2e-4)


def test_of_a_direction_as_much_is_removed_as_the_word_has(transparent):
    trial, _ = transparent
    directions = torch.tensor([[2.0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0.5, 0, 0, 0, 0, 0]])
    method = clvq.Concepts("directions", 0, directions, directions=True, scores=lambda states: states[:, [0, 2]],
                           centre=trial.centre(0).word)  # fmt: skip
    found, word = trial.removals(method)["concept"], trial.test.states[0][trial.salient]
    axis = torch.where(word[:, 0] >= word[:, 2], 0, 2)
    assert torch.equal(found.vector, directions[axis // 2])
    expected = torch.zeros(150, 8).scatter(1, axis[:, None], (word - method.centre).gather(1, axis[:, None]))
    torch.testing.assert_close(found.offset, expected)


def test_a_matched_control_takes_away_exactly_as_much_as_the_concept_in_a_direction_of_its_own(transparent):
    trial, method = transparent
    h, found = trial.summaries(0), trial.variants(method)
    for way in WAYS:
        gone, matched = h - found["concept", way], h - found["matched norm", way]
        torch.testing.assert_close(matched.norm(dim=1), gone.norm(dim=1), rtol=1e-4, atol=1e-5)
        assert F.cosine_similarity(matched, gone).abs().mean() < 0.5
    torch.testing.assert_close((h - found["gaussian", "centred"]).norm(dim=1).isfinite().all(), torch.tensor(True))


def test_every_variant_is_the_removal_of_what_it_is_named_after(transparent):
    trial, method = transparent
    h, mean, found = trial.summaries(0), trial.centre(0)[0], trial.removals(method)
    variants = {key: x for key, x in trial.variants(method).items() if key[0] in found}
    assert len(variants) == 17
    for (name, way), x in variants.items():
        along, away = found[name]
        v, origin = {"projection": (along, 0 * mean), "centred": (away, mean), "subtraction": (None, None)}[way]
        expected = h - (away if v is None else ((h - origin) * v).sum(1, keepdim=True) / (v * v).sum(1, keepdim=True) * v)
        torch.testing.assert_close(x, expected, rtol=1e-4, atol=1e-5)


def test_share_and_distance_are_those_worked_by_hand(make_trial):
    h = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
    trial = make_trial(h, [torch.ones(1, 2)] * 4, torch.tensor([0, 1, 0, 1]), folds=2, probe_stopping="test", probe_epochs=1)
    method = clvq.Concepts("m", 0, torch.ones(1, 2))
    changed = h - torch.tensor([[0.0, 4.0], [0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    found = trial.results(method, {("a",): changed, ("b",): h}, ("removed",)).set_index("removed")
    # gone, squared: 16, 0, 25, 1; norms, squared: 25, 1, 4, 4; mean (1, 2), distances from it, squared: 8, 4, 1, 1
    assert found.loc["a", "share"].tolist() == pytest.approx([16 / 25, 0, 25 / 4, 1 / 4])
    assert found.loc["a", "distance"].tolist() == pytest.approx([16 / 3.5, 0, 25 / 3.5, 1 / 3.5])
    assert not found.loc["b", ["share", "distance"]].to_numpy().any()


def test_tables_of_several_methods_keep_their_names_as_categories(transparent):
    trial, method = transparent
    results = clvq.faithfulness([method, replace(method, name="again", vectors=method.vectors[:3])], trial)
    assert isinstance(results["method"].dtype, pd.CategoricalDtype) and isinstance(results["removed"].dtype, pd.CategoricalDtype)
    assert results["method"].unique().tolist() == ["rows", "again"] and not results.isna().to_numpy().any()


# --- the removal curve --------------------------------------------------------------------------------------------


class Watched(clvq.Trial):
    """A trial that remembers the changed states."""

    def results(self, method, variants, names, *rest):
        self.__dict__.setdefault("seen", {}).update(variants)
        return super().results(method, variants, names, *rest)


@pytest.fixture(scope="module")
def worded(make_trial):
    """60 sentences of one to six words of nine codes, so that many hold a word twice; the curve's states, to n = 5, and its results."""
    codes = 2 + torch.randn(9, 10, generator=seed(1))
    counts = torch.randint(1, 7, (60,), generator=seed(2)).tolist()
    counts[:2] = 1, 6
    words = [codes[torch.randint(9, (n,), generator=seed(i))] for i, n in enumerate(counts)]
    h = 2 + torch.randn(60, 10, generator=seed(3))
    trial = make_trial(h, words, torch.arange(60) % 2, kind=Watched, probe_epochs=2)
    method = clvq.Concepts("codes", 0, codes, centre=trial.centre(0).word)
    results = clvq.removal_curve([method], trial, most=5)
    return trial, method, results


def expected_left(trial, method, n: int, centred: bool) -> np.ndarray:
    """States less their part in the span of the first n concepts, by least squares in double precision."""
    mean, out = trial.centre(0).summary.double().numpy(), []
    for h, ranked in zip(trial.summaries(0).double().numpy(), trial.ranked[:, :n], strict=True):
        span = method.vectors[method.assign(trial.test.states[0][ranked[ranked >= 0]])].double().numpy()
        if centred:
            h, span = h - mean, span - method.centre.double().numpy()
        left = h - span.T @ np.linalg.lstsq(span.T, h, rcond=1e-6)[0]
        out.append(left + mean if centred else left)
    return np.stack(out)


@pytest.mark.parametrize("way", ["projection", "centred"])
def test_several_concepts_are_taken_out_as_least_squares_takes_out_their_span(worded, way):
    trial, method, _ = worded
    for n in range(1, 6):
        found = trial.seen["concept", way, n]
        np.testing.assert_allclose(found.numpy(), expected_left(trial, method, n, way == "centred"), atol=2e-4)
        if way == "projection":
            span = method.vectors[method.assign(trial.test.states[0][trial.ranked[:, n - 1].clip(0)])]
            assert ((found * span).sum(1).abs() < 1e-3)[trial.ranked[:, n - 1] >= 0].all()


@pytest.mark.parametrize("way", ["projection", "centred"])
def test_the_curve_begins_with_the_removal_of_one_concept(worded, way):
    trial, method, _ = worded
    mean = trial.centre(0)[0]
    for name in ("concept",):
        expected = clvq.remove(trial.summaries(0), trial.removals(method)[name], way, mean)
        torch.testing.assert_close(trial.seen[name, way, 1], expected, rtol=1e-4, atol=1e-4)


def test_the_same_concept_once_more_and_a_sentence_without_more_words_change_nothing(worded):
    trial, method, _ = worded
    codes = [method.assign(trial.test.states[0][ranked[ranked >= 0]]).tolist() for ranked in trial.ranked]
    repeats = [(s, n) for s, found in enumerate(codes) for n in range(2, 6) if n <= len(found) and found[n - 1] in found[: n - 1]]
    ended = [(s, n) for s, found in enumerate(codes) for n in range(2, 6) if n > len(found)]
    fresh = [(s, n) for s, found in enumerate(codes) for n in range(2, 6) if n <= len(found) and found[n - 1] not in found[: n - 1]]
    assert len(repeats) > 20 and len(ended) > 20
    for way in ("projection", "centred"):
        states = [trial.seen["concept", way, n] for n in range(1, 6)]
        assert all(torch.equal(states[n - 1][s], states[n - 2][s]) for s, n in repeats + ended)
        assert all(not torch.equal(states[n - 1][s], states[n - 2][s]) for s, n in fresh)
    assert all(torch.isfinite(x).all() for x in trial.seen.values())


def test_words_in_random_order_come_to_the_same_once_all_are_taken_out(worded):
    trial, _, _ = worded
    few = (trial.ranked >= 0).sum(1) <= 5
    for way in ("projection", "centred"):
        concept, word = trial.seen["concept", way, 5][few], trial.seen["random word", way, 5][few]
        torch.testing.assert_close(word, concept, rtol=0, atol=1e-3)
        assert (trial.seen["random word", way, 1] - trial.seen["concept", way, 1]).norm(dim=1).max() > 0.1


def test_a_curve_has_a_row_for_each_sentence_and_number_and_takes_away_ever_more(worded):
    trial, _, results = worded
    assert results.columns.tolist() == ["method", "layer", "removed", "way", "n", "seed", "sentence", "correct"]
    sizes = results.groupby(["removed", "way", "n"], observed=True).size()
    assert len(sizes) == 4 * 2 * 5 and (sizes == 60).all()
    assert set(results["removed"]) == {"concept", "random word", "random code", "gaussian"}
    gone = pd.Series({key: float((trial.summaries(0) - x).square().sum(1).mean()) for key, x in trial.seen.items()}).unstack()
    assert gone.columns.tolist() == [1, 2, 3, 4, 5] and (gone.diff(axis=1).iloc[:, 1:] > 0).to_numpy().all()
    again = clvq.removal_curve([worded[1]], trial, most=5)
    pd.testing.assert_frame_equal(results, again)


def test_a_curve_ends_where_the_longest_sentence_does(worded):
    trial, method, _ = worded
    assert clvq.removal_curve([method], trial, most=50)["n"].astype(int).max() == trial.ranked.shape[1] == trial.test.lengths.max()


def test_accuracy_falls_to_chance_once_the_concept_of_the_class_is_among_those_removed(planted, make_trial):
    trial, method = planted
    words = trial.test.states[0][~trial.test.tokens["is_summary"].to_numpy()].view(200, 2, -1)
    other_first = make_trial(trial.summaries(0), list(words.flip(1)), trial.labels)
    found = clvq.removal_curve([method], other_first).groupby(["removed", "way", "n"], observed=True)["correct"].mean()
    for way in ("projection", "centred"):
        assert found["concept", way, 1] > 0.97 and 0.38 < found["concept", way, 2] < 0.62
        assert found["gaussian", way, 2] > 0.9 and found["random word", way, 1] > 0.6


# --- the shift test -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shifted(planted, make_trial):
    """The planted trial with its mean moved far from zero, its method, one of directions, and the shift test of both."""
    trial, method = planted
    constant = 6 + torch.randn(12, generator=seed(8))
    words = trial.test.states[0][~trial.test.tokens["is_summary"].to_numpy()].view(200, 2, -1)
    moved = make_trial(trial.summaries(0) + constant, list(words + constant), trial.labels, trial.predicted)
    points = replace(method, vectors=method.vectors + constant, centre=moved.centre(0).word)
    directions = clvq.Concepts("directions", 0, method.vectors, directions=True, scores=lambda x: (x - constant) @ method.vectors.T,
                               centre=moved.centre(0).word)  # fmt: skip
    results = clvq.shift_test([points, directions], moved, sizes=(3, 300), directions=2)
    accuracy = results.set_index(["method", "removed", "way", "probe", "shift", "direction"])["accuracy"].sort_index()
    return moved, points, directions, accuracy, results


def test_a_shift_table_has_a_row_for_each_shift_and_says_how_far_it_went(shifted):
    trial, *_, results = shifted
    shifts = {("0", 0), *((size, i) for size in ("3", "300", "own") for i in (0, 1)), ("own", -1)}
    for (_, removed), part in results.groupby(["method", "removed"]):
        assert len(part) == len(shifts) * 2 * (1 if removed == "nothing" else 2)
        assert set(zip(part["shift"], part["direction"], strict=True)) == shifts
    h, mean = trial.summaries(0), trial.centre(0)[0]
    spread = (h - mean).square().sum(1).mean().sqrt()
    columns = ["method", "layer", "seed", "removed", "way", "probe", "shift", "direction", "size", "accuracy", "low", "high"]
    assert results.columns.tolist() == columns
    sizes = results.groupby("shift")["size"].agg(["min", "max"])
    assert sizes.loc["300"].tolist() == pytest.approx([300, 300], rel=1e-5) and sizes.loc["0"].tolist() == [0, 0]
    assert sizes.loc["own"].tolist() == pytest.approx([float(mean.norm() / spread)] * 2, rel=1e-5)


def test_with_probes_moved_along_neither_the_states_nor_centred_removal_know_of_the_shift(shifted):
    *_, accuracy, _ = shifted
    for method in ("planted", "directions"):
        assert accuracy[method, "nothing", "none", "moved"].nunique() == 1
        assert accuracy[method, "nothing", "none", "moved"].iloc[0] > 0.97
        for removed in ("concept", "random code", "gaussian"):
            assert accuracy[method, removed, "centred", "moved"].nunique() == 1
        assert 0.38 < accuracy[method, "concept", "centred", "moved"].iloc[0] < 0.62


def test_with_the_origin_at_the_mean_projection_and_centred_removal_agree(shifted):
    *_, accuracy, _ = shifted  # words and summaries have the same mean here
    for method in ("planted", "directions"):
        for removed in ("concept", "random code", "gaussian"):
            for probe in ("moved", "retrained"):
                assert accuracy[method, removed, "projection", probe, "0", 0] == accuracy[method, removed, "centred", probe, "0", 0]


def test_where_the_origin_lies_decides_whether_answers_are_chance_or_turned_round_though_no_information_changes(shifted):
    *_, accuracy, _ = shifted
    found = accuracy["planted", "concept", "projection"]
    assert 0.38 < found["moved", "0", 0] < 0.62 and found["moved", "own", -1] < 0.1
    assert 0.38 < found["retrained", "0", 0] < 0.62 and found["retrained", "own", -1] < 0.1


def test_a_moved_probe_is_the_probe_with_its_first_bias_less_the_shift(shifted):
    trial, points, _, accuracy, _ = shifted
    h, mean, probes = trial.summaries(0), trial.centre(0)[0], trial.probes(0)
    spread = (h - mean).square().sum(1).mean().sqrt()
    drawn = F.normalize(torch.randn(2, 12, generator=trial.draw("shift")), dim=1)
    for i, u in enumerate(drawn):
        shift = 3 * spread * u - mean  # of the states as they are
        moved = probes._replace(bias1=probes.bias1 - (shift @ probes.weight1)[:, None])
        torch.testing.assert_close(clvq.score(moved, (h + shift)[None], trial.folds), clvq.score(probes, h[None], trial.folds),
                                   rtol=0, atol=1e-3)  # fmt: skip
        along = trial.removals(points)["concept"].vector + shift
        answers = clvq.score(moved, clvq.ablate(h + shift, along)[None], trial.folds)[0].argmax(1)
        expected = float((answers == trial.labels).float().mean())
        assert accuracy["planted", "concept", "projection", "moved", "3", i] == pytest.approx(expected, abs=1e-6)


def test_at_the_models_own_mean_the_shift_test_gives_what_the_protocol_gives_intervals_too(shifted):
    trial, points, directions, accuracy, results = shifted
    protocol = clvq.faithfulness([points, directions], trial)
    intervals = clvq.summarise(protocol, trial.config).set_index(["method", "removed", "way"])
    own = results[(results["direction"] == -1) & (results["probe"] == "moved")].set_index(["method", "removed", "way"])
    for key, row in own.iterrows():
        assert row[["low", "high"]].tolist() == pytest.approx(intervals.loc[key, ["accuracy_low", "accuracy_high"]].tolist())
    protocol = protocol.groupby(["method", "removed", "way"], observed=True)["correct"].mean()
    for method in ("planted", "directions"):
        assert accuracy[method, "nothing", "none", "moved", "own", -1] == pytest.approx(protocol[method, "nothing", "none"])
        for removed in ("concept", "random code", "gaussian"):
            for way in ("projection", "centred"):
                assert accuracy[method, removed, way, "moved", "own", -1] == pytest.approx(protocol[method, removed, way])


# --- in the model -------------------------------------------------------------------------------------------------

TEXTS = [
    "a gripping , moving film .", "dull", "it's neither funny nor unbelievably clever , just long and rather untidy .", "I loved it",
    "what a waste of time !", "good", "the acting is superb and the story holds you to the end", "bad bad bad", "not for me , sorry",
    "an antidisestablishmentarian comedy", "so-so", "the best film of the year ?",
]  # fmt: skip


@pytest.fixture(scope="module")
def inside(tmp_path_factory):
    """MiniLM with a head that puts half of twelve texts in each class, its states, and a trial of them."""
    config = clvq.configure("smoke", model="minilm", batch_tokens=64, folds=2, probe_stopping="test", probe_epochs=2, salience_steps=2)
    lm = clvq.load_language_model("minilm", ["negative", "positive"], seed=0)
    with torch.no_grad():
        lm.model.classifier.weight.mul_(30)
        logits = clvq.predict(lm, clvq.encode(lm, TEXTS, config), config)
        lm.model.classifier.bias[1] -= (logits[:, 1] - logits[:, 0]).median() + 1e-3
    acts = clvq.extract(lm, TEXTS, [4, 6], config, tmp_path_factory.mktemp("states"), filtered=False)
    tokens, logits = clvq.attribute(lm, TEXTS, 4, config)
    trial = clvq.Trial(acts, acts, tokens, torch.arange(12) % 2, logits.argmax(1), config.subset(clvq.ProbeSettings))
    return trial, lm, config


def code_method(inside, layer: int) -> clvq.Concepts:
    """Some states of words as codes; at the last layer, what sits there of the same words."""
    trial = inside[0]
    rows = torch.from_numpy(np.flatnonzero(~trial.tokens["is_summary"])[::4].copy())
    return clvq.Concepts("codes", layer, trial.test.states[layer][rows].float())


def answers_with(lm, config, layer: int, change) -> torch.Tensor:
    """The model's probabilities, text by text, where ``change`` of the states after a block (sentence, states) takes their place."""
    owner, name = lm.block_list()
    found = []
    for sentence, text in enumerate(TEXTS):
        encoded = clvq.encode(lm, [text], config)

        def hook(_, __, output, sentence=sentence):
            new = change(sentence, (output[0] if isinstance(output, tuple) else output)[0])[None]
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = getattr(owner, name)[layer - 1].register_forward_hook(hook)
        try:
            with torch.no_grad():
                found.append(lm.model(input_ids=encoded.ids[None]).logits[0].softmax(0))
        finally:
            handle.remove()
    return torch.stack(found)


def as_expected(rows: pd.DataFrame, own: torch.Tensor, changed: torch.Tensor, labels: torch.Tensor) -> None:
    answer, predicted = own.argmax(1), changed.argmax(1)
    assert rows["sentence"].tolist() == list(range(12)) and rows["label"].tolist() == labels.tolist()
    assert rows["predicted"].tolist() == predicted.tolist()
    assert rows["correct"].tolist() == (predicted == labels).tolist()
    assert rows["flipped"].tolist() == (predicted != answer).tolist()
    np.testing.assert_allclose(rows["confidence"], (changed - own)[range(12), answer], atol=1e-4)
    np.testing.assert_allclose(rows["kl"], scipy.stats.entropy(own.double(), changed.double(), axis=1), atol=1e-4)


@pytest.mark.parametrize(("layer", "control"), [(4, "matched norm"), (6, "gaussian")])
def test_what_the_model_answers_is_what_a_hook_on_the_block_gives(inside, layer, control):
    trial, lm, config = inside
    method = code_method(inside, layer)
    results = clvq.in_model([method], trial, lm, TEXTS, config, ways=WAYS, controls=(control, "mean" if layer == 4 else "no such control"))
    assert (results["layer"] == layer).all() and len(results) == (3 if layer == 4 else 2) * 3 * 2 * 12
    own = answers_with(lm, config, layer, lambda _, x: x)
    assert own.argmax(1).tolist() == trial.predicted.tolist() and 3 < trial.predicted.sum() < 9
    summary_mean, _, word_mean = trial.centre(layer)
    noise = F.normalize(torch.randn(12, 384, generator=trial.draw("in model")), dim=1)
    removals = trial.removals(method)
    for (removed, way, where), rows in results.groupby(["removed", "way", "where"]):
        along, away = removals["concept" if removed == "matched norm" else removed]

        def change(sentence, x, removed=removed, way=way, where=where, along=along, away=away):
            new = torch.empty_like(x)
            for i, state in enumerate(x):
                mean, v, d = word_mean if i else summary_mean, along[sentence], away[sentence]
                if way == "projection":
                    new[i] = state - (state @ v) / (v @ v) * v
                elif way == "centred":
                    new[i] = state - ((state - mean) @ d) / (d @ d) * d if d.any() else state  # the mean differs in nothing from itself
                else:
                    new[i] = state - d
                if removed == "matched norm":
                    new[i] = state - (state - new[i]).norm() * noise[sentence]
            return torch.cat([new[:1], x[1:]]) if where == "summary" else new

        as_expected(rows, own, answers_with(lm, config, layer, change), trial.labels)
    assert results["flipped"].any() and results["kl"].max() > 0.1


def test_a_concept_is_taken_out_of_the_salient_word_alone_or_of_all_but_that(inside):
    trial, lm, config = inside
    method = code_method(inside, 4)
    places = ["its word", "elsewhere"]
    results = clvq.in_model([method], trial, lm, TEXTS, config, ways=["centred"], controls=["own state"], places=places)
    own = answers_with(lm, config, 4, lambda _, x: x)
    summary_mean, _, word_mean = trial.centre(4)
    encoded = clvq.encode(lm, TEXTS, config)
    word = trial.tokens["position"].to_numpy()[trial.salient.numpy()] - 1
    removals = trial.removals(method, ["own state"])
    assert (removals["own state"].vector == trial.test.states[4][trial.salient].float()).all()
    for (removed, where), rows in results.groupby(["removed", "where"]):

        def change(sentence, x, where=where, removed=removed):
            mine = encoded.word[encoded.offsets[sentence] : encoded.offsets[sentence + 1]] == word[sentence]
            assert mine.any()
            middle = torch.cat([summary_mean[None], word_mean.expand(len(x) - 1, -1)])
            new = middle + clvq.ablate(x - middle, removals[removed].offset[sentence])
            return torch.where((mine if where == "its word" else ~mine)[:, None], new, x)

        as_expected(rows, own, answers_with(lm, config, 4, change), trial.labels)


def test_where_nothing_is_taken_out_the_model_gives_its_own_answers(inside):
    trial, lm, config = inside
    nothing = clvq.Concepts("nothing", 4, torch.zeros(2, 384), directions=True, scores=lambda states: states[:, :2])
    results = clvq.in_model([nothing], trial, lm, TEXTS, config, ways=WAYS)
    assert not results["flipped"].any() and results["kl"].abs().max() < 1e-6 and results["confidence"].abs().max() < 1e-4
    assert results["predicted"].tolist() == trial.predicted.tolist() * 6


def test_at_the_last_layer_the_words_play_no_part(inside):
    trial, lm, config = inside
    results = clvq.in_model([code_method(inside, 6)], trial, lm, TEXTS, config)
    summary, everywhere = (results[results["where"] == where].reset_index(drop=True) for where in ("summary", "every position"))
    pd.testing.assert_frame_equal(summary.drop(columns="where"), everywhere.drop(columns="where"), atol=1e-5, rtol=0)
    results = clvq.in_model([code_method(inside, 4)], trial, lm, TEXTS, config)
    summary, everywhere = (results[results["where"] == where]["kl"].to_numpy() for where in ("summary", "every position"))
    assert np.abs(summary - everywhere).max() > 1e-3


def test_the_model_is_left_as_it_was(inside):
    trial, lm, config = inside
    before = clvq.predict(lm, clvq.encode(lm, TEXTS, config), config)
    clvq.in_model([code_method(inside, 4)], trial, lm, TEXTS, config, ways=("projection",))
    assert lm.n_layers == 6 and torch.equal(clvq.predict(lm, clvq.encode(lm, TEXTS, config), config), before)


def test_results_in_the_model_go_through_the_same_summary(inside):
    trial, lm, config = inside
    results = clvq.in_model([code_method(inside, 4)], trial, lm, TEXTS, config, controls=("gaussian",))
    summary = clvq.summarise(results, config, against="gaussian", values=("accuracy", "flipped", "confidence", "kl"))
    assert len(summary) == 2 * 2 * 2
    for row in summary.to_dict("records"):
        own = results[(results["removed"] == row["removed"]) & (results["way"] == row["way"]) & (results["where"] == row["where"])]
        assert row["kl"] == pytest.approx(own["kl"].mean()) and row["flipped"] == pytest.approx(own["flipped"].mean())
    assert (summary.loc[summary["removed"] == "gaussian", "change"] == 0).all() and summary["change"].notna().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_the_model_answers_as_on_the_cpu_and_tables_are_on_the_cpu(inside):
    trial, lm, config = inside
    config = config.replace(inference_precision="float32")
    method = replace(code_method(inside, 4), centre=trial.centre(4).word)
    controls = ("matched norm", "gaussian", "random code", "random code, equal norm", "other class")
    tokens = trial.tokens.assign(concept=method.assign(trial.test.states[4]).numpy())
    use = np.ones(len(method.vectors))

    def tables(method):
        return (clvq.in_model([method], trial, lm, TEXTS, config, ways=WAYS, controls=controls),
                clvq.concept_effects(method, lm, TEXTS, tokens, trial.centre(4), use, config))  # fmt: skip

    here = tables(method)
    on_gpu = replace(method, vectors=method.vectors.cuda(), centre=method.centre.cuda())
    on_gpu.assign = method.assign
    lm.model.cuda()
    try:
        there = tables(on_gpu)
    finally:
        lm.model.cpu()
    for cpu, gpu in zip(here, there, strict=True):
        pd.testing.assert_frame_equal(cpu.drop(columns="confidence"), gpu.drop(columns="confidence"), atol=1e-3)
        np.testing.assert_allclose(gpu["confidence"], cpu["confidence"], atol=1e-3)


# --- people's evidence --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "span", "words"),
    [
        ("a dull , dull film .", "dull film", [3, 4]),
        ("a dull , dull film .", "a dull", [0, 1]),
        ("a dull , dull film .", "film .", [4, 5]),
        ("a dull , dull film .", "dull", [1]),  # the first of two
        ("a dull , dull film .", "a dull , dull film .", [0, 1, 2, 3, 4, 5]),
        ("a dull film", "dull , film", []),
        ("a dull film", "a dull film indeed", []),
        ("a dull film", "", []),
        ("", "dull", []),
        ("dulled film", "dull", []),  # words, not letters
    ],
)
def test_the_words_of_a_span_are_those_a_reader_finds(text, span, words):
    assert list(clvq.rationale_words(text, span)) == words


def test_a_span_is_split_as_the_text_is():
    text = "it does n't work , very well."
    assert list(clvq.rationale_words(text, "work ,", how="whitespace")) == [3, 4]
    assert list(clvq.rationale_words(text, "well", how="whitespace")) == []
    assert list(clvq.rationale_words(text, "well", how="unicode")) == [6 + (len(clvq.split_words("n't")) - 1)]


def test_hits_and_chances_are_those_worked_by_hand():
    texts = ["good , really good film", "a dull film", "bad", "no such thing here", "what a long slow evening", "unseen words"]
    spans = ["really good", "a dull", "bad", "something else", "slow evening", "unseen"]
    top = {0: 3, 1: 2, 2: 0, 3: 1, 4: 0}  # the most salient word of each; the last text has no words in the table
    rows = [(s, p, p == 0, 9.0 if p == 0 else float(p - 1 == top[s])) for s in top for p in range(len(texts[s].split()) + 1)]
    tokens = pd.DataFrame(rows, columns=["sentence", "position", "is_summary", "salience"])
    tokens = pd.concat([tokens, pd.DataFrame({"sentence": [5], "position": [0], "is_summary": [True], "salience": [1.0]})])
    found = clvq.rationale_overlap(tokens.reset_index(drop=True), texts, spans)
    # "bad" is all of its sentence, "something else" does not occur
    assert found["sentence"].tolist() == [0, 1, 4]
    assert found["hit"].tolist() == [1, 0, 0]
    assert found["chance"].tolist() == pytest.approx([2 / 5, 2 / 3, 2 / 5])
    assert found["first"].tolist() == [0, 1, 0] and found["last"].tolist() == [0, 0, 1]


def test_without_any_span_the_table_is_empty_and_has_its_columns():
    tokens = pd.DataFrame({"sentence": [0, 0], "position": [0, 1], "is_summary": [True, False], "salience": [0.0, 1.0]})
    found = clvq.rationale_overlap(tokens, ["film"], ["nothing"])
    assert found.empty and found.columns.tolist() == ["sentence", "hit", "chance", "first", "last"]


@pytest.mark.skipif(not ERASER.exists(), reason="the ERASER sentences are not here")
def test_every_evidence_span_of_erasers_sentences_is_found_and_few_are_the_whole_sentence():
    with gzip.open(ERASER, "rt", encoding="utf8") as file:
        rows = [json.loads(line) for line in file]
    spans = [clvq.rationale_words(row["sentence"], row["evidence"]["text"], "whitespace") for row in rows]
    assert len(rows) == 856 and all(spans)
    assert np.mean([len(span) < len(row["sentence"].split()) for span, row in zip(spans, rows, strict=True)]) > 0.96


# --- what the test can see ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("power", "level"), [(0.8, 0.05), (0.95, 0.01), (0.6, 0.1)])
@pytest.mark.parametrize("sentences", [200, 1000])
def test_the_smallest_difference_is_statsmodels(power, level, sentences):
    found = clvq.smallest_difference(0.4, sentences, power, level)
    effect = NormalIndPower().solve_power(nobs1=sentences, alpha=level, power=power, ratio=0)  # ratio 0: one sample
    assert found == pytest.approx(0.4 * effect, rel=1e-3)
    assert TTestPower().power(found / 0.4, sentences, level) == pytest.approx(power, abs=0.01)


def test_a_paired_test_finds_the_smallest_difference_as_often_as_it_says():
    sentences, deviation, runs = 400, 0.4, 4000
    difference = clvq.smallest_difference(deviation, sentences)
    changed = deviation**2 + difference**2  # share of sentences whose answer changes either way
    chances = [(changed - difference) / 2, 1 - changed, (changed + difference) / 2]
    counts = np.random.default_rng(0).multinomial(sentences, chances, size=runs)
    mean = (counts[:, 2] - counts[:, 0]) / sentences
    variance = (counts[:, 2] + counts[:, 0]) / sentences - mean**2
    p = 2 * scipy.stats.norm.sf(np.abs(mean) / np.sqrt(variance / sentences))
    assert (p < 0.05).mean() == pytest.approx(0.8, abs=0.02)


# --- planted concepts ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tasks():
    """Planted tasks with the mean at zero and far from it."""
    return {mean: clvq.planted_task(160, 12, 24, mean, seed=0) for mean in (0.0, 8.0)}


@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_the_class_of_a_planted_task_is_that_of_its_causal_concept(tasks, mean):
    trial, method = tasks[mean]
    words = trial.test.states[0][~trial.tokens["is_summary"].to_numpy()]
    codes = method.assign(words).view(160, 4)
    assert torch.equal(codes[:, 0], trial.labels) and (codes[:, 1:] > 1).all()
    assert all(len(set(row.tolist())) == 4 for row in codes)
    assert trial.tokens["word"][~trial.tokens["is_summary"]].tolist() == [f"w{code}" for code in codes.flatten().tolist()]
    assert torch.equal(method.assign(trial.test.states[0][trial.salient]), trial.labels)
    # a summary is the sum of its concepts, noise and the constant
    constant = words[0] - clvq.planted_task(160, 12, 24, 0.0, seed=0)[0].test.states[0][1]
    noise = trial.summaries(0) - (method.vectors - constant)[codes].sum(1) - constant
    assert float(constant.norm()) == pytest.approx(3 * mean, abs=1e-4)
    assert float(noise.square().sum(1).mean()) == pytest.approx(0.09, rel=0.1) and float(noise.mean().abs()) < 0.01


def test_a_planted_task_depends_on_its_seed_alone_and_can_be_learned(tasks):
    trial, _ = tasks[0.0]
    again, other = (clvq.planted_task(160, 12, 24, 0.0, seed=number)[0] for number in (0, 1))
    assert torch.equal(again.test.states[0], trial.test.states[0]) and not torch.equal(other.test.states[0], trial.test.states[0])
    right = clvq.score(trial.probes(0), trial.summaries(0)[None], trial.folds)[0].argmax(1) == trial.labels
    assert right.float().mean() > 0.9


def test_a_causal_concept_comes_first_and_leads_when_it_is_removed_around_the_mean(tasks):
    for number in range(3):
        trial, method = tasks[0.0] if number == 0 else clvq.planted_task(160, 12, 24, 0.0, seed=number)
        ranks = clvq.causal_rank(trial, method, ways=["centred"]).set_index("value")
        assert (ranks["rank"] == 1).all() and (ranks["lead"] > 0).all() and (ranks["seed"] == number).all()


def test_concepts_in_another_order_do_not_come_first(tasks):
    trial, method = tasks[0.0]
    shuffled = replace(method, vectors=method.vectors.roll(5, 0))
    ranks = clvq.causal_rank(trial, shuffled, ways=["centred"])
    assert (ranks["rank"] > 1).all() and (ranks["lead"] < 0).all()
    moved = clvq.causal_rank(trial, shuffled, causal=(5, 6), ways=["centred"])
    assert (moved["rank"] == 1).all() and (moved["lead"] > 0).all()


@pytest.mark.parametrize("mean", [0.0, 8.0])
def test_ranks_and_leads_are_those_counted_by_hand(tasks, mean):
    trial, method = tasks[mean]
    ranks = clvq.causal_rank(trial, method).set_index(["way", "value"])
    assert len(ranks) == 6
    h, (centre, _, word_mean) = trial.summaries(0), trial.centre(0)
    for way in WAYS:
        right = []
        for v in method.vectors:
            changed = clvq.remove(h, clvq.Removal(v.expand(160, -1), (v - word_mean).expand(160, -1)), way, centre)
            right.append(int((clvq.score(trial.probes(0), changed[None], trial.folds)[0].argmax(1) == trial.labels).sum()))
        best = min(right[:2])
        assert ranks.loc[(way, "accuracy"), "rank"] == 1 + sum(count < best for count in right)
        assert ranks.loc[(way, "accuracy"), "lead"] == pytest.approx((min(right[2:]) - best) / 160)
