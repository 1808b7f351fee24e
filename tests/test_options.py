"""Options that the ablations vary: memory of the decoder, distance, dead codes, share of the sentences; and two yardsticks."""

import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from sklearn.metrics import r2_score

import clvq_core as clvq

WIDTH = 32
LAYERS = (0, 1)
MEMORIES = ("encoder", "quantized", "shuffled", "constant", "none")
DISTANCES = ("squared", "euclidean", "cosine")


def model_settings(**chosen) -> clvq.ModelSettings:
    small = dict(n_codes=12, top_k=3, decoder_layers=2, decoder_heads=4, feedforward=64)
    return clvq.configure("smoke", **{**small, **chosen}).subset(clvq.ModelSettings)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def build(acts: clvq.Activations, **chosen) -> clvq.CLVQVAE:
    """A model in evaluation mode whose codes and target statistics come from the states."""
    settings = model_settings(**chosen)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clvq.CLVQVAE(WIDTH, WIDTH, 0, 1, "synthetic", settings)
    model.quantizer.start(*clvq.start_codebook(acts.states[0].float(), settings, seed()))
    model.target_mean.copy_(acts.states[1].float().mean(0))
    model.target_scale.copy_(acts.states[1].float().std(0))
    return model.eval()


def quantizer(k: int = 12, width: int = 8, counts: float = 10.0, **chosen) -> clvq.Quantizer:
    """A quantiser in training mode, with random codes of unlike length."""
    made = clvq.Quantizer(width, model_settings(n_codes=k, **{"top_k": min(5, k), **chosen}))
    codes = torch.randn(k, width, generator=seed(1)) * torch.linspace(0.5, 3, k)[:, None]
    made.start(codes, torch.full((k,), counts))
    return made.train()


def exact_distances(x: torch.Tensor, y: torch.Tensor, distance: str) -> torch.Tensor:
    """In double precision, from the definition."""
    x, y = x.double()[:, None], y.double()[None]
    if distance == "cosine":
        return 1 - (x * y).sum(-1) / (x.norm(dim=-1) * y.norm(dim=-1))
    squares = (x - y).square().sum(-1)
    return squares if distance == "squared" else squares.sqrt()


@pytest.fixture(scope="module")
def batch(tiny_acts):
    """Source states of eight sentences of unlike length, one after the other, and the lengths."""
    (x,), lengths = next(tiny_acts.stream([torch.arange(8)], [0], torch.device("cpu")))
    assert len(lengths.unique()) > 2 and len(x) == lengths.sum()
    return x, lengths


# --- memory -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORIES)
def test_only_the_encoders_states_let_anything_pass_around_the_codes(tiny_acts, batch, memory):
    x, lengths = batch
    model = build(tiny_acts, memory=memory)
    before, after = model(x, lengths), model(x + 0.02 * torch.randn_like(x), lengths)
    assert torch.equal(before.quantized.codes, after.quantized.codes)  # too small a step to reach another code
    moved = (before.reconstruction - after.reconstruction).abs().max()
    assert moved > 1e-3 if memory == "encoder" else moved < 1e-5


@torch.no_grad()
def test_the_decoder_does_not_see_the_order_of_its_memory_within_a_sentence_but_it_sees_another_sentences(tiny_acts):
    decoder = build(tiny_acts, memory="quantized").decoder
    queries, memory, lengths = torch.randn(12, WIDTH), torch.randn(12, WIDTH), torch.tensor([7, 5])
    before = decoder(queries, memory, lengths)
    turned = torch.cat([memory[:7].flip(0), memory[7:].roll(2, 0)])
    torch.testing.assert_close(decoder(queries, turned, lengths), before, rtol=0, atol=1e-5)
    assert (decoder(queries, memory.roll(7, 0), lengths) - before).abs().max() > 1e-2


@torch.no_grad()
def test_shuffled_memory_has_the_codes_of_the_batch_at_other_places_always_by_the_same_draw(tiny_acts, batch):
    x, lengths = batch
    model = build(tiny_acts, memory="shuffled")
    out = model(x, lengths)
    before = torch.random.get_rng_state()
    memory = model.memory(out.encoded, out.quantized)
    assert torch.equal(memory, model.memory(out.encoded, out.quantized))
    assert torch.equal(torch.random.get_rng_state(), before)
    rows, codes = torch.cdist(memory, model.vectors).argmin(1), out.quantized.codes
    torch.testing.assert_close(memory, model.vectors[rows])
    assert torch.equal(rows.sort().values, codes.sort().values)
    for found, own in zip(rows.split(lengths.tolist()), codes.split(lengths.tolist()), strict=True):
        assert not torch.equal(found.sort().values, own.sort().values)  # another order within a sentence would change nothing
    plain = build(tiny_acts, memory="quantized")(x, lengths)
    assert (out.reconstruction - plain.reconstruction).abs().max() > 1e-2


@torch.no_grad()
def test_constant_memory_is_the_mean_code_and_no_memory_is_zero(tiny_acts, batch):
    x, lengths = batch
    for kind in ("constant", "none"):
        model = build(tiny_acts, memory=kind)
        out = model(x, lengths)
        memory = model.memory(out.encoded, out.quantized)
        expected = model.vectors.mean(0) if kind == "constant" else torch.zeros(WIDTH)
        torch.testing.assert_close(memory, expected.expand_as(memory))


@torch.no_grad()
@pytest.mark.parametrize("memory", MEMORIES)
def test_the_first_position_sees_later_codes_through_its_memory_alone(tiny_acts, batch, memory):
    x, lengths = batch
    model = build(tiny_acts, memory=memory, mask="causal")
    first = lengths.cumsum(0) - lengths
    other = 4 * torch.randn_like(x)
    other[first] = x[first]
    before, after = model(x, lengths), model(other, lengths)
    assert torch.equal(before.quantized.codes[first], after.quantized.codes[first])
    assert not torch.equal(before.quantized.codes, after.quantized.codes)
    moved = (before.reconstruction - after.reconstruction)[first].abs().max()
    assert moved < 1e-5 if memory in ("constant", "none") else moved > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("memory", [memory for memory in MEMORIES if memory != "shuffled"])
@pytest.mark.parametrize("mask_kind", ["causal", "none", "anticausal"])
def test_a_sentence_is_the_same_whatever_stands_beside_it(tiny_acts, batch, memory, mask_kind):
    x, lengths = batch
    model = build(tiny_acts, memory=memory, mask=mask_kind)
    before = model(x, lengths)
    after = model(
        torch.cat([100 * torch.randn(40, WIDTH), x, torch.randn(3, WIDTH)]), torch.cat([torch.tensor([40]), lengths, torch.tensor([3])])
    )
    own = slice(40, 40 + len(x))
    assert torch.equal(after.quantized.codes[own], before.quantized.codes)
    torch.testing.assert_close(after.reconstruction[own], before.reconstruction, rtol=0, atol=1e-5)


# --- distance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", DISTANCES)
def test_distances_and_nearest_codes_are_those_of_the_definition(distance):
    q, z = quantizer(distance=distance), 2 * torch.randn(300, 8, generator=seed(2))
    exact = exact_distances(z, q.codebook, distance)
    torch.testing.assert_close(q.distances(z).double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(q.nearest(z), exact.argmin(1))
    assert torch.equal(q.eval()(z).codes, exact.argmin(1))


def test_euclidean_and_squared_distance_have_the_same_nearest_code_and_cosine_another():
    z = 2 * torch.randn(300, 8, generator=seed(2))
    squared, euclidean, cosine = (quantizer(distance=distance).nearest(z) for distance in DISTANCES)
    assert torch.equal(squared, euclidean)
    assert 0.05 < (squared != cosine).float().mean() < 0.95


def test_euclidean_distance_of_a_code_to_itself_is_zero_and_never_undefined():
    q = quantizer(distance="euclidean")
    q.codebook.mul_(1e3)
    found = q.distances(q.codebook)
    assert found.isfinite().all() and (found.diagonal() < 10).all()  # rounding of the squares, 1e6 times 1e-7, rooted
    assert torch.equal(found.argmin(1), torch.arange(12))


def test_cosine_distance_does_not_depend_on_how_long_a_state_is():
    q, z = quantizer(distance="cosine", temperature=0.1), torch.randn(300, 8, generator=seed(2))
    scale = torch.logspace(-2, 2, 300)[:, None]
    torch.testing.assert_close(q.distances(z * scale), q.distances(z), rtol=0, atol=1e-5)
    assert torch.equal(q.nearest(z * scale), q.nearest(z))
    squared = quantizer()
    assert not torch.equal(squared.nearest(z * scale), squared.nearest(z))


@pytest.mark.parametrize(("distance", "temperature"), [("euclidean", 1.0), ("euclidean", 3.0), ("cosine", 0.3)])
def test_codes_are_drawn_as_the_softmax_over_the_distances_says(distance, temperature):
    q, draws = quantizer(distance=distance, temperature=temperature, top_k=5), 20_000
    for number, state in enumerate(torch.randn(3, 8, generator=seed(7))):
        found = q.sample(state.expand(draws, -1), seed(number)).bincount(minlength=12).numpy()
        distances = exact_distances(state[None], q.codebook, distance)[0]
        near = distances.argsort()[:5]
        chances = torch.softmax(-distances[near] / temperature, 0).numpy()
        assert found.sum() == found[near].sum() == draws and (chances * draws >= 5).all()
        assert scipy.stats.chisquare(found[near], chances * draws).pvalue > 1e-3


@torch.no_grad()
def test_euclidean_distance_spreads_the_draws_over_more_codes(synthetic):
    acts = synthetic(noise=2.0)
    spread = {distance: clvq.sampling(build(acts, distance=distance), acts.states[0]) for distance in ("squared", "euclidean")}
    assert spread["euclidean"]["effective_k"] > 1.2 * spread["squared"]["effective_k"]
    assert spread["euclidean"]["nearest_chance"] < spread["squared"]["nearest_chance"]


@torch.no_grad()
@pytest.mark.parametrize("distance", DISTANCES)
def test_assignment_forward_pass_and_evaluation_take_the_same_codes(tiny_acts, tiny_config, distance):
    model = build(tiny_acts, distance=distance)
    model.quantizer.codebook.mul_(torch.linspace(0.2, 2, 12)[:, None])  # lengths differ, so that the distances disagree
    (x,), lengths = next(tiny_acts.stream([torch.arange(60)], [0], torch.device("cpu")))
    codes = model.assign(tiny_acts.states[0])
    assert torch.equal(codes, model(x, lengths).quantized.codes)
    assert torch.equal(codes, exact_distances(model.encoder(tiny_acts.states[0].float()), model.vectors, distance).argmin(1))
    found = clvq.evaluate(model, tiny_acts, torch.arange(60), tiny_config)
    assert found["codes_used"] == len(codes.unique())
    assert found["perplexity"] == pytest.approx(clvq.perplexity(codes.bincount(minlength=12)))


@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_training_with_another_distance_finds_the_known_concepts(synthetic, tiny_config, distance):
    acts = synthetic()
    temperature = 0.05 if distance == "cosine" else 1.0
    model, history = clvq.train(acts, tiny_config.replace(distance=distance, temperature=temperature, epochs=5), LAYERS)
    table = pd.crosstab(acts.tokens["concept"], model.assign(acts.states[0]).numpy())
    assert table.max(1).sum() / table.to_numpy().sum() > 0.95
    assert history["validation_loss"].iloc[-1] < 0.7 * history["validation_loss"].iloc[0]


# --- dead codes -------------------------------------------------------------------------------------------------------


def updated(counts: torch.Tensor, z: torch.Tensor, codes: torch.Tensor, **chosen) -> clvq.Quantizer:
    q = quantizer(**chosen)
    q.start(q.codebook.clone(), counts)
    q.update(z, codes)
    return q


def test_a_dead_code_jumps_to_a_state_of_the_batch_and_live_codes_do_not_notice():
    counts = torch.full((12,), 10.0)
    counts[[3, 7]] = 0.02
    z = 5 + torch.randn(64, 8, generator=seed(2))
    codes = torch.randint(0, 3, (64,), generator=seed(3))
    before, after = (updated(counts, z, codes, replace_dead=least) for least in (0.0, 0.5))
    live = torch.ones(12, dtype=torch.bool)
    live[[3, 7]] = False
    torch.testing.assert_close(after.codebook[live], before.codebook[live], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after.counts[live], before.counts[live])
    gap = torch.cdist(after.codebook[~live].double(), z.double()).min(1).values
    assert (gap < 1e-3).all()
    assert (after.counts >= 0.5).all() and (before.counts[~live] < 0.5).all()
    assert torch.cdist(before.codebook[~live], z).min() > 1


@pytest.mark.parametrize("least", [1e-4, 0.005, 0.5])
def test_a_dead_code_jumps_however_low_the_threshold(least):
    counts = torch.full((12,), 10.0)
    counts[7] = 0
    z = 5 + torch.randn(64, 8, generator=seed(2))
    q = updated(counts, z, torch.zeros(64, dtype=torch.long), replace_dead=least)
    assert torch.cdist(q.codebook[7:8], z).min() < 0.15 * z.norm(dim=1).mean()  # but for the smoothing of a low count


def test_a_code_that_the_batch_brings_over_the_threshold_stays():
    counts = torch.full((12,), 0.5)
    z, codes = 5 + torch.randn(64, 8, generator=seed(2)), torch.zeros(64, dtype=torch.long)
    q = updated(counts, z, codes, replace_dead=0.499)
    assert q.counts[0] > 0.5
    assert torch.cdist(q.codebook[:1], z).min() > 0.1
    assert (torch.cdist(q.codebook[1:].double(), z.double()).min(1).values < 1e-3).all()  # the moving average took the others below it


def test_without_a_threshold_nothing_is_drawn_and_counts_may_go_to_zero():
    for least in (0.0, 0.5):
        q, z = quantizer(replace_dead=least), torch.randn(8, 8)
        q.start(q.codebook.clone(), torch.full((12,), 1e-8))
        before = torch.random.get_rng_state()
        q.update(z, torch.zeros(8, dtype=torch.long))
        assert torch.equal(torch.random.get_rng_state(), before) == (least == 0)
        assert (q.counts[1:] < 1e-7).all() == (least == 0)


def epochs_from_afar(acts: clvq.Activations, config: clvq.Config, epochs: int) -> tuple[clvq.CLVQVAE, list[float]]:
    """Training by `train_epoch` from codes of which one alone is near the states; and how many codes each epoch drew."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = clvq.CLVQVAE(WIDTH, WIDTH, 0, 1, "synthetic", config.subset(clvq.ModelSettings))
    codes = acts.states[0][:12].float() + 1e3
    codes[0] -= 1e3
    model.quantizer.start(codes, torch.ones(12))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    sentences = torch.arange(len(acts.lengths))
    return model, [clvq.train_epoch(model, optimizer, acts, sentences, config, i)["train_codes_used"] for i in range(epochs)]


def test_training_from_a_bad_start_uses_more_codes_when_dead_ones_jump(synthetic, tiny_config):
    acts = synthetic()
    config = tiny_config.replace(top_k=1, ema_decay=0.8)
    used = {}
    for least in (0.0, 0.5):
        model, drawn = epochs_from_afar(acts, config.replace(replace_dead=least), 4)
        used[least] = len(model.assign(acts.states[0]).unique()), drawn[-1]
    assert used[0.0] == (1, 1)
    assert min(used[0.5]) >= 9


# --- share of the sentences -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 1.0])
def test_training_has_its_share_of_the_sentences_that_are_not_held_out(synthetic, tiny_config, share):
    acts = synthetic()
    kept, held = clvq.split_sentences(len(acts.lengths), tiny_config.replace(train_share=share, validation_share=0.25))
    assert len(held) == 60 and len(kept) == round(share * 180)
    both = torch.cat([kept, held])
    assert len(both) == len(both.unique())
    assert held.diff().gt(0).all() and kept.diff().gt(0).all()
    other = torch.cat(clvq.split_sentences(len(acts.lengths), tiny_config.replace(train_share=share, validation_share=0.25, seed=1)))
    assert torch.equal(both.sort().values, other.sort().values) == (share == 1)


def test_a_smaller_share_is_part_of_a_larger_one_and_the_same_sentences_are_held_out(synthetic, tiny_config):
    acts = synthetic()
    parts = [clvq.split_sentences(len(acts.lengths), tiny_config.replace(train_share=share)) for share in (0.1, 0.5, 1.0)]
    small, half, whole = (set(kept.tolist()) for kept, _ in parts)
    assert small < half < whole
    order = torch.randperm(240, generator=seed(tiny_config.seed))
    assert all(set(held.tolist()) == set(order[:48].tolist()) for _, held in parts)


def test_training_sees_nothing_of_the_sentences_outside_its_share(synthetic, tiny_config):
    acts = synthetic(sentences=120)
    config = tiny_config.replace(train_share=0.4, epochs=2)
    inside = acts.rows(torch.cat(clvq.split_sentences(len(acts.lengths), config)))
    outside = torch.ones(len(acts.tokens), dtype=torch.bool)
    outside[inside] = False
    assert 0.35 < outside.float().mean() < 0.6
    changed = {layer: torch.where(outside[:, None], torch.full_like(x, 100), x) for layer, x in acts.states.items()}
    (one, history), (other, again) = (clvq.train(replace(acts, states=states), config, LAYERS) for states in (acts.states, changed))
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())
    assert history.drop(columns="seconds").equals(again.drop(columns="seconds"))
    whole, _ = clvq.train(acts, config.replace(train_share=1.0), LAYERS)
    assert not torch.equal(whole.vectors, one.vectors)


def test_an_epoch_tells_how_many_codes_it_drew(tiny_acts, tiny_config):
    _, history = clvq.train(tiny_acts, tiny_config.replace(top_k=12, temperature=1e6, epochs=1), LAYERS)
    assert history.loc[history["epoch"] == 1, "train_codes_used"].tolist() == [12]


# --- how random the choice of codes is --------------------------------------------------------------------------------


def plain_model(codes: torch.Tensor, **chosen) -> clvq.CLVQVAE:
    """A model whose encoder is the identity, with these codes."""
    settings = model_settings(n_codes=len(codes), alpha="fixed", fixed_alpha=0.0, decoder_heads=1, **chosen)
    model = clvq.CLVQVAE(codes.shape[1], codes.shape[1], 0, 1, "synthetic", settings).eval()
    model.quantizer.start(codes, torch.ones(len(codes)))
    return model


CODES = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
STATES = torch.tensor([[0.0, 0.0], [0.0, 1.5], [3.0, 0.0]])  # squared distances 0 1 4, 2.25 3.25 0.25, 9 4 13


@pytest.mark.parametrize("rows", [1, 16384])
def test_sampling_is_what_one_gets_by_hand(rows):
    found = clvq.sampling(plain_model(CODES, top_k=3, temperature=2.0), STATES, rows)
    weights = np.exp(-np.array([[0, 1, 4], [0.25, 2.25, 3.25], [4, 9, 13]]) / 2)
    p = weights / weights.sum(1, keepdims=True)
    entropy = -(p * np.log(p)).sum() / 3
    assert found["sampling_entropy"] == pytest.approx(entropy, rel=1e-5)
    assert found["effective_k"] == pytest.approx(math.exp(entropy), rel=1e-5)
    assert found["nearest_chance"] == pytest.approx(p[:, 0].mean(), rel=1e-5)
    assert found["gap"] == pytest.approx(2.0, rel=1e-5)  # the middle one of 1, 2 and 5
    assert found["temperature_in_gaps"] == pytest.approx(1.0, rel=1e-5)


def test_sampling_among_two_leaves_the_third_code_out():
    found = clvq.sampling(plain_model(CODES, top_k=2, temperature=1.0), STATES[:1])
    p = 1 / (1 + math.exp(-1))
    assert found["nearest_chance"] == pytest.approx(p, rel=1e-5)
    assert found["sampling_entropy"] == pytest.approx(-p * math.log(p) - (1 - p) * math.log(1 - p), rel=1e-5)


def test_a_choice_of_one_is_no_choice_though_the_gap_is_there():
    found = clvq.sampling(plain_model(CODES, top_k=1, temperature=2.0), STATES)
    assert (found["sampling_entropy"], found["effective_k"], found["nearest_chance"]) == (0, 1, 1)
    assert found["gap"] == pytest.approx(2.0, rel=1e-5) and found["temperature_in_gaps"] == pytest.approx(1.0, rel=1e-5)


def test_a_single_code_has_no_gap():
    found = clvq.sampling(plain_model(CODES[:1], top_k=1), STATES)
    assert found["effective_k"] == found["nearest_chance"] == 1 and found["gap"] == 0 and found["temperature_in_gaps"] == math.inf


@torch.no_grad()
@pytest.mark.parametrize("distance", DISTANCES)
def test_the_chance_of_the_nearest_code_is_how_often_it_is_drawn(synthetic, distance):
    acts = synthetic(noise=2.0)
    model = build(acts, distance=distance, temperature={"squared": 20.0, "euclidean": 3.0, "cosine": 0.3}[distance])
    x = acts.states[0][:400].repeat(20, 1)
    found = clvq.sampling(model, x)
    drawn = model.assign(x, generator=seed(1)) == model.assign(x)
    assert 0.3 < found["nearest_chance"] < 0.97
    assert drawn.float().mean().item() == pytest.approx(found["nearest_chance"], abs=0.02)


# --- what simpler things explain --------------------------------------------------------------------------------------


@torch.no_grad()
def test_a_linear_map_explains_a_rotation_and_nothing_of_shuffled_targets(synthetic, tiny_config):
    rotated, shuffled = (synthetic(shuffled=mixed) for mixed in (False, True))
    assert clvq.references(build(rotated), rotated, tiny_config)["explained_by_linear_map"] > 0.999
    found = clvq.references(build(shuffled), shuffled, tiny_config)
    assert found["explained_by_linear_map"] < 0.05 and found["explained_by_code_means"] < 0.05


@torch.no_grad()
@pytest.mark.parametrize("share", [0.05, 1.0])
def test_code_means_explain_what_a_table_of_means_does(synthetic, tiny_config, share):
    acts = synthetic()
    config = tiny_config.replace(train_share=share)
    model = build(acts, n_codes=40)
    kept, held = (acts.rows(part) for part in clvq.split_sentences(len(acts.lengths), config))
    y = pd.DataFrame(acts.states[1].double().numpy())
    codes = pd.Series(model.assign(acts.states[0]).numpy())
    means = y.loc[kept.tolist()].groupby(codes[kept.tolist()]).mean()
    predicted = means.reindex(codes[held.tolist()]).fillna(y.loc[kept.tolist()].mean())
    unseen = ~codes[held.tolist()].isin(means.index)
    assert unseen.any() or share == 1  # such states get the mean of all
    expected = r2_score(y.loc[held.tolist()], predicted, multioutput="variance_weighted")
    found = clvq.references(model, acts, config)
    assert found["explained_by_code_means"] == pytest.approx(expected, abs=1e-6)
    if share == 1:
        assert 0.8 < found["explained_by_code_means"] < found["explained_by_linear_map"]  # codes do not say the noise
