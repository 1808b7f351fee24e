"""What CLVQ-VAE is compared with: clusters, sparse autoencoders, concepts found without training; and what all methods have."""

import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from sklearn.cluster import AgglomerativeClustering
from sklearn.decomposition import PCA
from sklearn.metrics import normalized_mutual_info_score as nmi
from sparsify import SparseCoder, SparseCoderConfig
from torch import nn

import clvq_core as clvq

LAYERS = (0, 1)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def settings(**chosen) -> clvq.Config:
    """Small settings; k-means, Ward and autoencoders of the 32-wide synthetic states take a second or less."""
    return clvq.configure("smoke", **{"n_codes": 12, "top_k": 3, "precision": "float32", "sae_top_k": 4, "sae_epochs": 30, "sae_batch": 128,
                                      "sae_learning_rate": 3e-3, **chosen})  # fmt: skip


def same_rows(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two sets of vectors are the same in some order."""
    distances = torch.cdist(one.double(), other.double())
    return len(one) == len(other) and bool((distances.min(1).values < 1e-3).all() and (distances.min(0).values < 1e-3).all())


def different_rows_of(vectors: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether each vector is a row, and no two the same one."""
    same = (vectors[:, None] == x).all(2)
    return bool(same.any(1).all()) and len(same.float().argmax(1).unique()) == len(vectors)


def sentences(acts: clvq.Activations, first: int, last: int) -> clvq.Activations:
    """Some of the sentences."""
    a, b = int(acts.offsets[first]), int(acts.offsets[last])
    tokens = acts.tokens.iloc[a:b].reset_index(drop=True)
    return clvq.Activations({k: x[a:b] for k, x in acts.states.items()}, acts.offsets[first : last + 1] - a, tokens, acts.source)


# --- Ward clusters ------------------------------------------------------------------------------------------------


def centroids(x: torch.Tensor, k: int) -> torch.Tensor:
    """scikit-learn's."""
    labels = AgglomerativeClustering(k, linkage="ward", metric="euclidean").fit_predict(x.numpy())
    return torch.stack([x[labels == i].mean(0) for i in range(k)])


def test_with_points_enough_ward_clusters_are_scikit_learns_of_all_states(tiny_acts):
    config = settings(n_codes=20, cluster_points=10_000)
    method = clvq.clusters(tiny_acts, 0, "ward", config)
    assert method.vectors.shape == (20, 32)
    assert same_rows(method.vectors, centroids(tiny_acts.states[0].float(), 20))


def test_with_fewer_points_ward_clusters_are_those_of_a_seeded_choice_of_so_many_states(tiny_acts):
    x = tiny_acts.states[1].float()
    # as many clusters as points: each is one state
    method = clvq.clusters(tiny_acts, 1, "ward", settings(n_codes=40, cluster_points=40, seed=5))
    assert len(method.vectors) == 40 and different_rows_of(method.vectors, x)
    chosen = x[torch.randperm(len(x), generator=seed(5))[:80]]
    few = clvq.clusters(tiny_acts, 1, "ward", settings(n_codes=10, cluster_points=80, seed=5))
    assert same_rows(few.vectors, centroids(chosen, 10)) and not same_rows(few.vectors, centroids(x, 10))


@pytest.mark.parametrize("how", ["ward", "kmeans++", "spherical"])
def test_clusters_are_the_known_concepts(synthetic, how):
    acts = synthetic(noise=0.3)
    for layer in LAYERS:
        method = clvq.clusters(acts, layer, how, settings(start_iterations=25))
        assert nmi(acts.tokens["concept"], method.assign(acts.states[layer]).numpy()) > (0.95 if how == "ward" else 0.85)


def test_what_ward_will_cost_is_said_before_it_is_spent(tiny_acts, monkeypatch, capsys):
    said, fit = [], AgglomerativeClustering.fit_predict
    monkeypatch.setattr(AgglomerativeClustering, "fit_predict", lambda *given: said.append(capsys.readouterr().err) or fit(*given))
    clvq.clusters(tiny_acts, 0, "ward", settings(cluster_points=200))
    assert len(said) == 1 and "Ward clustering of 200 states: 0.0 GiB, about " in said[0] and said[0].strip().endswith(" s")
    assert capsys.readouterr().out == ""


def test_more_codes_than_points_for_ward_are_refused(refused, tiny_acts):
    with refused("n_codes=12", "11", "cluster_points"):
        clvq.clusters(tiny_acts, 0, "ward", settings(cluster_points=11))
    with refused("n_codes=5000", str(len(tiny_acts.tokens))):
        clvq.clusters(tiny_acts, 0, "ward", settings(n_codes=5000))


# --- other clusters, and the concept of a state -------------------------------------------------------------------


@pytest.mark.parametrize("how", ["kmeans++", "spherical", "random"])
def test_other_clusters_are_where_clvqvae_starts(tiny_acts, how):
    config = settings(seed=3, start="random" if how == "spherical" else "spherical")  # the setting of CLVQ-VAE's start plays no part
    method = clvq.clusters(tiny_acts, 1, how, config)
    x = tiny_acts.states[1].float()
    start = clvq.start_codebook(x, config.subset(clvq.ModelSettings).replace(start=how), seed(3))[0]
    assert torch.equal(method.vectors, start)
    assert (method.layer, method.reads, method.directions) == (1, 1, False)
    if how == "random":
        assert len(method.vectors) == 12 and different_rows_of(method.vectors, x)


@pytest.mark.parametrize("how", ["ward", "kmeans++", "spherical", "random"])
def test_clusters_depend_on_the_seed_alone(tiny_acts, how):
    first, again, other = (clvq.clusters(tiny_acts, 0, how, settings(seed=s, cluster_points=100)) for s in (1, 1, 2))
    assert torch.equal(first.vectors, again.vectors) and not same_rows(first.vectors, other.vectors)


@pytest.mark.parametrize("rows", [1, 7, 16384])
def test_a_state_has_the_concept_of_the_nearest_vector_whatever_the_blocks(tiny_acts, rows):
    method = clvq.Concepts("some", 1, torch.randn(9, 32, generator=seed()))
    expected = torch.cdist(tiny_acts.states[1].float(), method.vectors).argmin(1)
    assert torch.equal(method.assign(tiny_acts.states[1], rows=rows), expected)  # half precision is no matter


@pytest.mark.parametrize("rows", [1, 7, 16384])
def test_a_method_with_scores_goes_by_them_and_not_by_distance(tiny_acts, rows):
    x = tiny_acts.states[0]
    method = clvq.Concepts("some", 1, torch.randn(9, 32, generator=seed()), reads=0, scores=lambda states: -states[:, :9])
    assert torch.equal(method.assign(x, rows=rows), x[:, :9].float().argmin(1))


def test_a_method_reads_the_layer_its_vectors_live_in_unless_it_says_so():
    vectors = torch.zeros(2, 3)
    assert clvq.Concepts("m", 4, vectors).reads == 4
    assert clvq.Concepts("m", 4, vectors, reads=0).reads == 0


def test_a_centre_is_the_origin_unless_it_is_given():
    assert torch.equal(clvq.Concepts("m", 0, torch.ones(2, 3)).centre, torch.zeros(3))
    assert torch.equal(clvq.Concepts("m", 0, torch.ones(2, 3), centre=torch.ones(3)).centre, torch.ones(3))


@pytest.mark.parametrize("layer", LAYERS)
def test_the_centre_of_a_method_is_the_mean_of_what_its_vectors_are_averages_of(tiny_acts, topk, halves, layer):
    x = tiny_acts.states[layer].float()
    for how in ("kmeans++", "spherical", "random"):
        torch.testing.assert_close(clvq.clusters(tiny_acts, layer, how, settings()).centre, x.mean(0), rtol=1e-4, atol=1e-5)
    chosen = x[torch.randperm(len(x), generator=seed(42))[:50]]
    few = clvq.clusters(tiny_acts, layer, "ward", settings(cluster_points=50))
    torch.testing.assert_close(few.centre, chosen.mean(0), rtol=1e-4, atol=1e-5)
    for method in clvq.reference_concepts(tiny_acts, torch.arange(60) % 2, layer, settings()):
        torch.testing.assert_close(method.centre, x.mean(0), rtol=1e-4, atol=1e-5)
    for rows in ("own", "source"):  # of the training states, at the layer where the rows live
        for part in clvq.sae_concepts(topk, LAYERS, "SAE", settings(sae_rows=rows), {}):
            torch.testing.assert_close(part.centre, halves[0].states[part.layer].float().mean(0), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_an_autoencoder_trained_on_a_gpu_is_on_the_cpu_and_as_good(halves):
    sae = clvq.train_sae(halves[0], LAYERS, 64, 4, settings())
    assert {tensor.device.type for tensor in sae.state_dict().values()} == {"cpu"}
    assert clvq.sae_facts(sae, halves[1], LAYERS)["variance_explained"] > 0.8
    for method in clvq.sae_concepts(sae, LAYERS, "SAE", settings(), {}):
        assert method.assign(halves[1].states[0]).device.type == method.vectors.device.type == "cpu"


# --- sparse autoencoders ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def halves(synthetic):
    """Synthetic states, to train on and to look at."""
    acts = synthetic(sentences=400)
    return sentences(acts, 0, 300), sentences(acts, 300, 400)


@pytest.fixture(scope="module")
def topk(halves):
    """A trained TopK autoencoder of 64 neurons, 4 active."""
    return clvq.train_sae(halves[0], LAYERS, 64, 4, settings())


@pytest.fixture(scope="module")
def relu(halves):
    """A trained ReLU autoencoder of 64 neurons with a penalty that is felt."""
    return clvq.train_sae(halves[0], LAYERS, 64, 0, settings(sae_l1=1e-2))


def states(acts: clvq.Activations) -> tuple[torch.Tensor, torch.Tensor]:
    return acts.states[0].float(), acts.states[1].float()


@torch.no_grad()
def predicted(sae: clvq.SparseAutoencoder, x: torch.Tensor) -> torch.Tensor:
    """Target states in their own units."""
    return (sae.activations(x) @ sae.decoder + sae.target_bias) * sae.target_scale + sae.target_mean


@pytest.mark.parametrize("transcode", [True, False])
@torch.no_grad()
def test_a_topk_autoencoder_predicts_and_explains_what_eleuthers_sparsify_does_with_its_weights(halves, topk, transcode):
    # Theirs takes states as they are; as an autoencoder it takes the decoder's bias off first. All that is folded into the weights.
    theirs = SparseCoder(32, SparseCoderConfig(num_latents=64, k=4, transcode=transcode, normalize_decoder=False))
    weight = topk.encoder / topk.scale
    theirs.b_dec.copy_(topk.target_bias * topk.target_scale + topk.target_mean)
    theirs.encoder.weight.copy_(weight)
    theirs.encoder.bias.copy_(topk.bias + weight @ ((0 if transcode else theirs.b_dec) - topk.mean))
    theirs.W_dec.copy_(topk.decoder * topk.target_scale)
    for part in halves:
        x, y = states(part)
        out = theirs(x, y)
        torch.testing.assert_close(predicted(topk, x), out.sae_out, rtol=1e-4, atol=1e-4)
        dense = torch.zeros(len(x), 64).scatter(1, out.latent_indices, out.latent_acts)
        torch.testing.assert_close(topk.activations(x), dense, rtol=1e-4, atol=1e-4)
        facts = clvq.sae_facts(topk, part, LAYERS)
        assert facts["variance_explained"] == pytest.approx(1 - float(out.fvu), abs=1e-5) and facts["variance_explained"] > 0.5
    # on the training states the error is the unexplained share itself, since standardised targets have variance 1
    x, y = states(halves[0])
    assert float(topk.loss(x, y, 0.0)[1]) == pytest.approx(float(theirs(x, y).fvu), abs=1e-5)


def test_loss_and_gradients_of_a_relu_autoencoder_are_those_of_plain_linear_layers_with_an_l1_loss(halves, relu):
    encoder, decoder = nn.Linear(32, 64), nn.Linear(64, 32)
    with torch.no_grad():
        for mine, given in ((encoder.weight, relu.encoder), (encoder.bias, relu.bias), (decoder.weight, relu.decoder.T),
                            (decoder.bias, relu.target_bias)):  # fmt: skip
            mine.copy_(given)
    train, l1 = states(halves[0]), 0.05
    means = [x.mean(0) for x in train]
    scales = [(x - mean).pow(2).mean().sqrt() for x, mean in zip(train, means, strict=True)]
    for part in halves:
        x, y = ((x - mean) / scale for x, mean, scale in zip(states(part), means, scales, strict=True))
        f = F.relu(encoder(x))
        error = F.mse_loss(decoder(f), y)
        expected = error + l1 * F.l1_loss(f, torch.zeros_like(f), reduction="sum") / len(x)
        found, mse, active = relu.loss(*states(part), l1)
        torch.testing.assert_close(active, f, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.stack([found, mse]), torch.stack([expected, error]), rtol=1e-4, atol=1e-6)
        gradients = torch.autograd.grad(found, [relu.encoder, relu.bias, relu.decoder, relu.target_bias])
        theirs = torch.autograd.grad(expected, [encoder.weight, encoder.bias, decoder.weight, decoder.bias])
        for mine, other in zip(gradients, theirs, strict=True):
            torch.testing.assert_close(mine, other.T if mine.shape != other.shape else other, rtol=1e-3, atol=1e-5)


def test_to_predict_the_mean_is_an_error_of_exactly_one_in_standardised_units(halves):
    x, y = (5 + 3 * part for part in states(halves[0]))
    sae = clvq.SparseAutoencoder(32, 32, 64, 4)
    sae.standardize(x, y)
    with torch.no_grad():
        sae.decoder.zero_()
        _, error, _ = sae.loss(x, y, 0.0)
    assert float(error) == pytest.approx(1, abs=1e-5)
    inside = (x - sae.mean) / sae.scale
    assert float(inside.mean(0).abs().max()) < 1e-5 and float(inside.square().mean()) == pytest.approx(1, abs=1e-5)


def test_a_neurons_row_has_length_one_after_training(topk, relu):
    for sae in (topk, relu):
        torch.testing.assert_close(sae.decoder.norm(dim=1), torch.ones(64))
        assert not torch.allclose(sae.encoder.norm(dim=1), torch.ones(64), atol=1e-2)


@torch.no_grad()
def test_of_a_state_no_more_neurons_than_allowed_are_active_and_these_are_the_most_active(halves, topk):
    x = states(halves[1])[0]
    f = topk.activations(x)
    assert ((f > 0).sum(1) <= 4).all() and (f >= 0).all() and (f > 0).any(1).all()
    every = (((x - topk.mean) / topk.scale) @ topk.encoder.T + topk.bias).clamp_min(0)
    kept = every.sort(1, descending=True).values[:, :4]
    torch.testing.assert_close(f.sort(1, descending=True).values[:, :4], kept)
    torch.testing.assert_close(f[f > 0], every[f > 0])


@pytest.mark.parametrize("rows", [64, 8192])
@torch.no_grad()
def test_facts_are_those_counted_by_hand_whatever_the_blocks(halves, topk, relu, rows):
    relu = copy.deepcopy(relu)
    relu.bias[:3] = -100.0  # neurons that nothing activates
    for sae in (topk, relu):
        for part in halves:
            x, y = states(part)
            facts, f = clvq.sae_facts(sae, part, LAYERS, rows=rows), sae.activations(x).numpy()
            assert facts["variance_explained"] == pytest.approx(clvq.variance_explained(predicted(sae, x), y), abs=1e-5)
            assert facts["l0"] == pytest.approx(np.count_nonzero(f) / len(f))
            assert facts["dead"] == pytest.approx(np.mean([not column.any() for column in f.T]))
    assert clvq.sae_facts(relu, halves[0], LAYERS)["dead"] >= 3 / 64


def test_an_autoencoder_learns_what_holds_for_new_states_and_nothing_where_there_is_nothing(synthetic, halves, topk):
    assert clvq.sae_facts(topk, halves[1], LAYERS)["variance_explained"] > 0.8
    shuffled = synthetic(sentences=400, shuffled=True)
    lost = clvq.train_sae(sentences(shuffled, 0, 300), LAYERS, 64, 4, settings())
    assert clvq.sae_facts(lost, sentences(shuffled, 300, 400), LAYERS)["variance_explained"] < 0.02


def test_a_higher_penalty_leaves_fewer_neurons_active_and_explains_less(halves):
    low, high = (clvq.sae_facts(clvq.train_sae(halves[0], LAYERS, 32, 0, settings(sae_l1=l1, sae_epochs=15)), halves[0], LAYERS)
                 for l1 in (1e-4, 0.3))  # fmt: skip
    assert high["l0"] < 0.7 * low["l0"] and high["variance_explained"] < low["variance_explained"]


def test_an_autoencoder_depends_on_the_seed_alone_and_the_global_state_stays(tiny_acts):
    before = torch.random.get_rng_state()
    first, again, other = (clvq.train_sae(tiny_acts, LAYERS, 16, 4, settings(sae_epochs=2, seed=s)) for s in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, weights in first.state_dict().items():
        assert torch.equal(weights, again.state_dict()[name])
    assert not torch.allclose(first.decoder, other.decoder, atol=1e-2)


def test_encoder_rows_live_at_the_source_and_decoder_rows_at_the_target_and_both_read_the_source(halves, topk):
    facts = clvq.sae_facts(topk, halves[0], LAYERS)
    encoder, decoder = clvq.sae_concepts(topk, LAYERS, "TopK SAE 64", settings(), facts)
    assert (encoder.layer, encoder.reads, decoder.layer, decoder.reads) == (0, 0, 1, 0)
    assert torch.equal(encoder.vectors, topk.encoder) and torch.equal(decoder.vectors, topk.decoder)
    assert encoder.directions and decoder.directions and encoder.facts == decoder.facts == facts
    assert len({encoder.name, decoder.name}) == 2 and all("TopK SAE 64" in part.name for part in (encoder, decoder))
    assert not encoder.vectors.requires_grad
    expected = topk.activations(states(halves[1])[0]).argmax(1)
    for part in (encoder, decoder):
        assert torch.equal(part.assign(halves[1].states[0], rows=50), expected)


def test_the_authors_mixture_has_decoder_rows_alone_as_if_they_lived_at_the_source(topk):
    (mixed,) = clvq.sae_concepts(topk, LAYERS, "TopK SAE 64", settings(sae_rows="source"), {})
    assert (mixed.layer, mixed.reads) == (0, 0) and torch.equal(mixed.vectors, topk.decoder)
    assert clvq.configure("authors").sae_rows == "source" and clvq.configure("paper").sae_rows == "own"


def test_layers_of_unlike_width_can_be_crossed():
    sae = clvq.SparseAutoencoder(6, 4, 10, 3)
    x, y = torch.randn(50, 6), torch.randn(50, 4)
    sae.standardize(x, y)
    loss, error, f = sae.loss(x, y, 0.0)
    assert f.shape == (50, 10) and torch.equal(loss, error) and sae.decoder.shape == (10, 4)


# --- concepts found without training -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_codes", [5, 50])
def test_principal_components_are_scikit_learns(tiny_acts, n_codes):
    x = tiny_acts.states[0].float()
    _, components, _ = clvq.reference_concepts(tiny_acts, torch.arange(60) % 2, 0, settings(n_codes=n_codes))
    theirs = torch.from_numpy(PCA(min(n_codes, 32)).fit(x.double().numpy()).components_).float()
    assert components.vectors.shape == theirs.shape and components.directions and components.layer == 0
    sign = (components.vectors * theirs).sum(1, keepdim=True).sign()
    torch.testing.assert_close(components.vectors * sign, theirs, rtol=0, atol=5e-3)


def test_a_state_has_the_component_along_which_it_deviates_most_in_standard_deviations(tiny_acts):
    x = tiny_acts.states[1].float()
    _, components, _ = clvq.reference_concepts(tiny_acts, torch.arange(60) % 2, 1, settings(n_codes=6))
    whitened = np.abs(PCA(6, whiten=True).fit_transform(x.double().numpy()))
    best = np.sort(whitened, 1)
    clear = best[:, -1] - best[:, -2] > 1e-3
    assert clear.mean() > 0.9
    assert (components.assign(tiny_acts.states[1]).numpy() == whitened.argmax(1))[clear].all()


def test_components_of_a_case_worked_by_hand(tiny_acts):
    # Deviations of 2 sqrt(2) and sqrt(2) / 2 along the axes, mean (5, 1)
    square = torch.tensor([[9.0, 1.0], [1.0, 1.0], [5.0, 2.0], [5.0, 0.0]])
    tokens = tiny_acts.tokens.iloc[:4].assign(is_summary=[True, False, True, False])
    acts = clvq.Activations({0: square}, torch.tensor([0, 2, 4]), tokens, {})
    _, components, classes = clvq.reference_concepts(acts, torch.tensor([0, 1]), 0, settings(n_codes=2, top_k=1))
    torch.testing.assert_close(components.vectors.abs(), torch.eye(2))
    # (8, 3): 3 / 3.27 along the first, 2 / 0.82 along the second; (0, 1.5): 5 / 3.27 and 0.5 / 0.82; to the left is as far as to the right
    assert components.assign(torch.tensor([[8.0, 3.0], [0.0, 1.5], [10.0, 1.5]])).tolist() == [1, 0, 0]
    # summaries: (9, 1) of class 0, (5, 2) of class 1
    torch.testing.assert_close(classes.vectors, torch.tensor([[4.0, -1.0], [-4.0, 1.0]]))
    assert classes.assign(torch.tensor([[6.0, 1.0], [4.0, 1.0], [5.0, 9.0]])).tolist() == [0, 1, 1]


def test_class_means_are_each_classs_summaries_less_those_of_the_others(tiny_acts):
    labels = torch.arange(60) % 3
    _, _, classes = clvq.reference_concepts(tiny_acts, labels, 0, settings())
    h = tiny_acts.states[0].float().numpy()[tiny_acts.tokens["is_summary"].to_numpy()]
    y = labels.numpy()
    expected = np.stack([h[y == c].mean(0) - h[y != c].mean(0) for c in range(3)])
    np.testing.assert_allclose(classes.vectors, expected, atol=1e-5)
    x = tiny_acts.states[0].float().numpy()
    along = (x - x.mean(0)) @ (expected / np.linalg.norm(expected, axis=1, keepdims=True)).T
    assert classes.assign(tiny_acts.states[0]).tolist() == along.argmax(1).tolist() and classes.directions


def test_random_codes_are_gaussian_with_the_mean_and_deviations_of_the_states(tiny_acts):
    acts = replace(tiny_acts, states={0: tiny_acts.states[0] * torch.linspace(0.1, 3, 32) + torch.linspace(-5, 5, 32)})
    x = acts.states[0].float()
    codes = clvq.reference_concepts(acts, torch.arange(60) % 2, 0, settings(n_codes=20_000))[0]
    assert not codes.directions and codes.vectors.shape == (20_000, 32)
    standard = (codes.vectors - x.mean(0)) / x.std(0)
    assert standard.mean(0).abs().max() < 4 / 20_000**0.5 and (standard.std(0) - 1).abs().max() < 0.02
    assert scipy.stats.kstest(standard.flatten()[::10].numpy(), "norm").pvalue > 1e-3
    again, other = (clvq.reference_concepts(acts, torch.arange(60) % 2, 0, settings(n_codes=9, seed=s))[0].vectors for s in (42, 1))
    assert torch.equal(again, clvq.reference_concepts(acts, torch.arange(60) % 2, 0, settings(n_codes=9))[0].vectors)
    assert not torch.allclose(again, other)


# --- all methods --------------------------------------------------------------------------------------------------


def test_every_method_has_what_the_tests_of_faithfulness_ask_of_it(tiny_acts, tiny_config, topk):
    config = tiny_config.replace(epochs=1)
    learned = [clvq.train(tiny_acts, config, layers)[0] for layers in ((0, 1), (0, 0), (1, 1))]
    clustered = [clvq.clusters(tiny_acts, 0, how, config) for how in clvq.CLUSTERS]
    references = clvq.reference_concepts(tiny_acts, torch.arange(60) % 2, 0, config)
    rows = clvq.sae_concepts(topk, LAYERS, "SAE", config, {})
    methods = [*learned, *clustered, *references, *rows]
    assert [method.name for method in learned] == ["CLVQ-VAE", "single-layer VQ-VAE, layer 0", "single-layer VQ-VAE, layer 1"]
    assert len({method.name for method in methods}) == len(methods)
    for method in methods:
        assert method.centre.shape == method.vectors.shape[1:] and method.centre.any() and not method.centre.requires_grad
        assert method.layer in LAYERS and method.reads in LAYERS and method.directions in (True, False)
        codes = method.assign(tiny_acts.states[method.reads])
        assert codes.shape == (len(tiny_acts.tokens),) and set(codes.tolist()) <= set(range(len(method.vectors)))
        assert method.vectors.shape[1] == tiny_acts.states[method.layer].shape[1]
        assert not method.vectors.requires_grad and codes.device.type == "cpu"
    assert [(method.layer, method.reads, method.directions) for method in learned] == [(0, 0, False), (0, 0, False), (1, 1, False)]


@pytest.fixture(scope="module")
def trained(tiny_acts, tiny_config):
    return clvq.train(tiny_acts, tiny_config.replace(epochs=2, temperature=8.0), LAYERS)[0]


def test_without_a_generator_a_state_has_the_code_nearest_to_its_encoding(tiny_acts, trained):
    with torch.no_grad():
        z = trained.encoder(tiny_acts.states[0].float())
    expected = torch.cdist(z, trained.vectors).argmin(1)
    for rows in (1, 50, 16384):
        assert torch.equal(trained.assign(tiny_acts.states[0], rows=rows), expected)


@torch.no_grad()
def test_with_a_generator_codes_are_sampled_as_in_training(tiny_acts, trained):
    x = tiny_acts.states[0]
    sampled = trained.assign(x, generator=seed(1))
    assert torch.equal(sampled, trained.quantizer.sample(trained.encoder(x.float()), seed(1)))
    z = trained.encoder(x.float())
    squares = torch.cdist(z.double(), trained.vectors.double()).square()
    near = squares.argsort(1)[:, : trained.settings.top_k]
    assert (sampled[:, None] == near).any(1).all() and not torch.equal(sampled, near[:, 0])
    draws = 10_000
    chances = torch.softmax(-squares.gather(1, near) / trained.settings.temperature, 1)
    for i in chances.min(1).values.topk(3).indices.tolist():  # where even the last of the nearest is drawn often
        found = trained.assign(x[i].expand(draws, -1), rows=3000, generator=seed(i)).bincount(minlength=12)[near[i]]
        assert found.sum() == draws and chances[i].min() * draws > 5
        assert scipy.stats.chisquare(found.numpy(), chances[i].numpy() * draws).pvalue > 1e-3
