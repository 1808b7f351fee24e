"""The codebook's start, the quantiser and its moving averages."""

import numpy as np
import pytest
import scipy.stats
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from vector_quantize_pytorch import VectorQuantize

import clvq_core as clvq


def model_settings(**chosen) -> clvq.ModelSettings:
    return clvq.configure("smoke", **chosen).subset(clvq.ModelSettings)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def quantizer(k: int = 12, width: int = 8, counts: float = 10.0, **chosen) -> clvq.Quantizer:
    """A quantiser in training mode, with random codes."""
    made = clvq.Quantizer(width, model_settings(n_codes=k, **{"top_k": min(5, k), **chosen}))
    made.start(torch.randn(k, width, generator=seed(1)), torch.full((k,), counts))
    return made.train()


def exact_squares(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Squared distances in double precision, without the expansion of the square."""
    return (x.double()[:, None] - y.double()[None]).square().sum(-1)


@st.composite
def points(draw, rows=(1, 40), codes=(1, 12), width=(1, 6)):
    """Random rows and codes, with equal and far ones among them."""
    numbers = st.floats(-20, 20, width=32)
    n, k, d = (draw(st.integers(*bounds)) for bounds in (rows, codes, width))
    flat = draw(st.lists(numbers, min_size=(n + k) * d, max_size=(n + k) * d))
    both = torch.tensor(flat, dtype=torch.float32).view(n + k, d)
    return both[:n], both[n:]


def clusters(rows: int = 3000, width: int = 32, groups: int = 20) -> torch.Tensor:
    """Overlapping clusters of different sizes and lengths, away from the origin."""
    draw = np.random.default_rng(3)
    centres = draw.normal(size=(groups, width)) + 0.5
    group = draw.choice(groups, rows, p=draw.dirichlet(np.ones(groups)))
    lengths = draw.uniform(0.5, 3, size=(rows, 1))
    return torch.from_numpy((lengths * (centres[group] + 0.6 * draw.normal(size=(rows, width)))).astype(np.float32))


# --- sampling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("top_k", "temperature"), [(5, 1.0), (3, 4.0), (12, 8.0)])
def test_codes_are_drawn_as_the_softmax_over_the_nearest_ones_says(top_k, temperature):
    q, draws = quantizer(top_k=top_k, temperature=temperature), 20_000
    for number, state in enumerate(torch.randn(3, 8, generator=seed(7)) * 0.5):
        found = q.sample(state.expand(draws, -1), seed(number)).bincount(minlength=12).numpy()
        squares = exact_squares(state[None], q.codebook)[0]
        near = squares.argsort()[:top_k]
        chances = torch.softmax(-squares[near] / temperature, 0).numpy()
        assert found.sum() == found[near].sum() == draws
        enough = chances * draws >= 5  # the chi-square test's condition; the rest is pooled
        observed = np.append(found[near][enough], found[near][~enough].sum())
        expected = np.append(chances[enough], chances[~enough].sum()) * draws
        observed, expected = observed[expected > 0], expected[expected > 0]
        assert scipy.stats.chisquare(observed, expected).pvalue > 1e-3


@given(data=points(codes=(2, 12)), top_k=st.integers(1, 12), number=st.integers(0, 99))
def test_no_code_outside_the_nearest_ones_is_ever_drawn(data, top_k, number):
    z, codes = data
    top_k = min(top_k, len(codes))
    q = clvq.Quantizer(z.shape[1], model_settings(n_codes=len(codes), top_k=top_k, temperature=1e3)).train()
    q.start(codes, torch.ones(len(codes)))
    squares = exact_squares(z, codes)
    farthest = squares.sort(1).values[:, top_k - 1]
    drawn = squares.gather(1, q.sample(z, seed(number))[:, None])[:, 0]
    assert (drawn <= farthest + 1e-5 * (1 + z.square().sum(1) + codes.square().sum(1).max())).all()


def test_the_nearest_code_is_drawn_when_the_temperature_goes_to_zero():
    z = torch.randn(500, 8, generator=seed(2))
    cold, warm = (quantizer(temperature=t).sample(z, seed()) for t in (1e-4, 10.0))
    nearest = exact_squares(z, quantizer().codebook).argmin(1)
    assert torch.equal(cold, nearest) and not torch.equal(warm, nearest)


@pytest.mark.parametrize("mode", ["evaluation", "one nearest"])
def test_the_nearest_code_is_taken_in_evaluation_and_where_only_one_is_allowed(mode):
    q = quantizer(top_k=5).eval() if mode == "evaluation" else quantizer(top_k=1)
    z = torch.randn(120, 8, generator=seed(2))
    out = q(z)
    assert torch.equal(out.codes, exact_squares(z, q.codebook).argmin(1))
    torch.testing.assert_close(out.vectors, q.codebook[out.codes])


def test_draws_depend_on_the_generator_alone():
    q, z = quantizer(temperature=5.0), torch.randn(200, 8, generator=seed(2))
    assert torch.equal(q.sample(z, seed(1)), q.sample(z, seed(1)))
    assert not torch.equal(q.sample(z, seed(1)), q.sample(z, seed(2)))


def test_draws_are_the_same_wherever_the_generator_and_the_states_are():
    q, z = quantizer(temperature=5.0), torch.randn(200, 8, generator=seed(2))
    expected = (torch.softmax(-q.distances(z).topk(5, largest=False)[0] / 5, 1)
                / torch.empty(200, 5).exponential_(generator=seed(1))).argmax(1)  # fmt: skip
    near = q.distances(z).topk(5, largest=False)[1]
    assert torch.equal(q.sample(z, seed(1)), near.gather(1, expected[:, None])[:, 0])
    elsewhere = q.to("meta")  # a device whose tensors no CPU generator fills
    assert elsewhere.sample(z.to("meta"), seed(1)).device.type == "meta"


@pytest.mark.gpu
def test_codes_are_drawn_on_a_gpu_with_a_generator_of_either_device():
    q, z = quantizer(temperature=5.0), torch.randn(2000, 8, generator=seed(2))
    expected = q.sample(z, seed(1))
    q.cuda()
    drawn = q.sample(z.cuda(), seed(1)).cpu()
    assert (drawn == expected).float().mean() > 0.99  # the same noise; distances differ by rounding
    assert q.sample(z.cuda(), torch.Generator("cuda")).device.type == q.sample(z.cuda()).device.type == "cuda"


# --- what the quantiser returns -----------------------------------------------------------------------------------


def states() -> torch.Tensor:
    return torch.randn(11, 8, generator=seed(4))


@pytest.mark.parametrize("training", [True, False])
def test_every_state_gets_its_codes_vector_and_the_commitment_is_the_mean_square_between_them(training):
    z, q = states(), quantizer().train(training)
    out = q(z, seed())
    torch.testing.assert_close(out.vectors, q.codebook[out.codes])
    torch.testing.assert_close(out.commitment, (z - q.codebook[out.codes]).square().mean())
    assert all(torch.equal(a, b) for a, b in zip(out, q(z, seed()), strict=True))


def test_gradients_pass_straight_through_the_codes():
    z = states()
    weight = torch.randn(z.shape, generator=seed(5))
    z.requires_grad_()
    (quantizer()(z, seed()).vectors * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_the_commitment_pulls_states_to_their_codes_and_no_gradient_reaches_the_codes():
    z = states().requires_grad_()
    q = quantizer()
    before = q.codebook.clone()
    out = q(z, seed())
    (out.commitment + 0 * out.vectors.sum()).backward()
    gap = z.detach() - q.codebook[out.codes]
    torch.testing.assert_close(z.grad, 2 * gap / gap.numel())
    assert list(q.parameters()) == [] and q.codebook.grad is None
    assert torch.equal(q.codebook, before)  # nor does a forward pass move them


def test_the_quantiser_is_float32_whatever_autocast_says():
    z, q = states(), quantizer(top_k=1)
    with torch.autocast("cpu", torch.bfloat16):
        inside = q(z)
    outside = q(z)
    assert inside.vectors.dtype == inside.commitment.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(inside, outside, strict=True))


# --- moving averages ----------------------------------------------------------------------------------------------


def peer(q: clvq.Quantizer) -> VectorQuantize:
    """vector-quantize-pytorch's quantiser in the same state."""
    k, width = q.codebook.shape
    other = VectorQuantize(width, k, decay=q.settings.ema_decay, eps=q.settings.ema_epsilon, rotation_trick=False)
    other._codebook.embed.copy_(q.codebook[None])
    other._codebook.cluster_size.copy_(q.counts[None])
    other._codebook.embed_avg.copy_(q.sums[None])
    return other.train()


@pytest.mark.parametrize("decay", [0.99, 0.5])
def test_the_moving_averages_are_those_of_vector_quantize_pytorch(decay):
    q = quantizer(top_k=1, ema_decay=decay, ema_epsilon=1e-5)
    q.counts[3] = 0.0  # a code that nothing is assigned to
    q.start(q.codebook.clone(), q.counts.clone())
    other = peer(q)
    for step in range(8):
        z = torch.randn(100, 8, generator=seed(step)) + 0.1 * step
        out = q(z)
        q.update(z, out.codes)
        vectors, codes, _ = other(z[None])
        assert torch.equal(codes[0], out.codes)
        torch.testing.assert_close(vectors[0], out.vectors)
        torch.testing.assert_close(q.counts, other._codebook.cluster_size[0])
        torch.testing.assert_close(q.sums, other._codebook.embed_avg[0])
        torch.testing.assert_close(q.codebook, other.codebook)


def test_the_moving_averages_follow_the_codes_that_were_drawn_as_in_vector_quantize_pytorch():
    q = quantizer(top_k=5, temperature=10.0)
    other = peer(q)
    drawn_elsewhere = 0
    for step in range(5):
        z = torch.randn(100, 8, generator=seed(step))
        codes = q.sample(z, seed(step))
        drawn_elsewhere += int((codes != exact_squares(z, q.codebook).argmin(1)).sum())
        q.update(z, codes)
        other.update_indices(z[None], codes[None])
        torch.testing.assert_close(q.codebook, other.codebook)
    assert drawn_elsewhere > 100


def test_a_step_of_the_moving_averages_is_the_one_of_appendix_a1():
    q = quantizer(k=2, width=1, ema_decay=0.9, ema_epsilon=1e-5)
    q.start(torch.tensor([[1.0], [5.0]]), torch.tensor([4.0, 6.0]))
    q.update(torch.tensor([[2.0], [3.0], [10.0]]), torch.tensor([0, 0, 1]))
    torch.testing.assert_close(q.counts, torch.tensor([0.9 * 4 + 0.1 * 2, 0.9 * 6 + 0.1 * 1]))
    torch.testing.assert_close(q.sums[:, 0], torch.tensor([0.9 * 4 + 0.1 * 5, 0.9 * 30 + 0.1 * 10]), rtol=1e-5, atol=0)
    torch.testing.assert_close(q.codebook, q.sums / q.counts[:, None], rtol=1e-5, atol=0)
    assert not torch.equal(q.smoothed(), q.counts) and torch.isclose(q.smoothed().sum(), q.counts.sum())


def updates(q: clvq.Quantizer, steps: int, taken: int) -> clvq.Quantizer:
    """Steps in which states near the first ``taken`` codes are assigned to these, and none to the others."""
    places = q.codebook.clone()
    for step in range(steps):
        codes = torch.arange(60) % taken
        q.update(places[codes] + torch.randn(60, q.codebook.shape[1], generator=seed(step)), codes)
    return q


@pytest.mark.parametrize("chosen", [{}, dict(ema_decay=0.5), dict(ema_decay=0.0), dict(ema_epsilon=0.0), dict(ema_epsilon=0.1)])
def test_a_code_without_states_keeps_its_place_for_ever(chosen):
    q = quantizer(k=6, **chosen)
    places, counts = q.codebook.clone(), torch.full((6,), 10.0)
    counts[4:] = 0
    q.start(places, counts)
    updates(q, 500, taken=4)
    assert torch.equal(q.codebook[4:], places[4:]) and not torch.equal(q.codebook[:4], places[:4])
    assert q.codebook.isfinite().all()


@pytest.mark.parametrize("had", [1.0, 30.0, 1000.0])
def test_a_code_that_no_state_takes_any_more_stays_where_its_states_were(had):
    q = quantizer(k=6, counts=had)
    places = q.codebook.clone()
    updates(q, 3000, taken=5)
    assert (q.codebook[5] - places[5]).norm() < 0.002 * places[5].norm()
    resting = q.codebook[5].clone()
    assert torch.equal(updates(q, 500, taken=5).codebook[5], resting)
    state = torch.full((1, 8), 3.0)
    q.update(state, torch.tensor([5]))  # the next state takes it along
    torch.testing.assert_close(q.codebook[5:], state, rtol=2e-3, atol=0)


def test_where_averages_alone_are_started_codes_without_states_are_set_as_no_average_would_move_them():
    q = quantizer(k=6, start_in="averages")
    small, codes, counts = q.codebook.clone(), torch.randn(6, 8, generator=seed(9)), torch.tensor([10.0, 10, 10, 10, 0, 0])
    q.start(codes, counts)
    assert torch.equal(q.codebook[:4], small[:4]) and torch.equal(q.codebook[4:], codes[4:])
    q.update(codes[:1], torch.tensor([0]))
    torch.testing.assert_close(q.codebook, codes, rtol=1e-4, atol=1e-5)


def test_the_start_survives_the_first_update():
    x = clusters()
    settings = model_settings(n_codes=20, start="spherical", top_k=1)
    codes, counts = clvq.start_codebook(x, settings, seed())

    def change(zero_sums: bool) -> torch.Tensor:
        q = clvq.Quantizer(x.shape[1], settings).train()
        q.start(codes, counts)
        if zero_sums:  # what comes of a start that sets the codes alone
            q.sums.zero_()
        batch = x[:100]
        q.update(batch, q.sample(batch))
        return (q.codebook - codes).norm(dim=1) / codes.norm(dim=1)

    assert change(zero_sums=False).max() < 0.02
    assert change(zero_sums=True).min() > 0.9


def test_a_batch_gives_the_codes_losses_and_averages_of_its_sentences_one_by_one(tiny_acts):
    config = clvq.configure("smoke", n_codes=12, top_k=1, dropout=0.0, decoder_layers=2, decoder_heads=4, feedforward=64)
    settings = config.subset(clvq.ModelSettings)

    def fresh() -> clvq.CLVQVAE:
        torch.manual_seed(0)
        model = clvq.CLVQVAE(32, 32, 0, 1, "synthetic", settings)
        model.quantizer.start(*clvq.start_codebook(tiny_acts.states[0].float(), settings, seed()))
        return model.train()

    with torch.random.fork_rng():
        batched, single = fresh(), fresh()
    sentences = torch.arange(20)
    (x, y), lengths = next(tiny_acts.stream([sentences], [0, 1], torch.device("cpu")))
    assert len(lengths.unique()) > 1
    out = batched(x, lengths)
    loss, error = batched.loss(out, y)
    parts, total = [], torch.zeros(2)
    for s in sentences:
        (x1, y1), length = next(tiny_acts.stream([s[None]], [0, 1], torch.device("cpu")))
        one = single(x1, length)
        parts.append(one)
        total += torch.stack(single.loss(one, y1)).detach() * len(x1)
    torch.testing.assert_close(torch.stack([loss, error]), total / len(x), rtol=1e-5, atol=1e-6)
    for name in ("reconstruction", "encoded"):
        each = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(getattr(out, name), each, rtol=1e-4, atol=1e-5)
    z, codes = torch.cat([part.encoded for part in parts]), torch.cat([part.quantized.codes for part in parts])
    assert torch.equal(out.quantized.codes, codes)
    batched.quantizer.update(out.encoded.detach(), out.quantized.codes)
    single.quantizer.update(z.detach(), codes)
    for name, buffer in batched.quantizer.named_buffers():
        torch.testing.assert_close(buffer, dict(single.quantizer.named_buffers())[name], rtol=1e-5, atol=1e-5)


# --- k-means and the start ----------------------------------------------------------------------------------------


@given(data=points(), block=st.integers(1, 50))
def test_the_nearest_centre_is_the_one_of_least_distance_whatever_the_blocks(data, block):
    x, centres = data
    labels, squares = clvq.nearest(x, centres, rows=block)
    exact = torch.cdist(x.double(), centres.double()).square()
    slack = 1e-5 * (1 + x.square().sum(1) + centres.square().sum(1).max())
    assert (exact.gather(1, labels[:, None])[:, 0] <= exact.min(1).values + slack).all()
    assert ((squares - exact.min(1).values).abs() <= slack).all() and (squares >= 0).all()


def test_the_nearest_centre_is_torchs_where_no_two_are_equally_near():
    x, centres = clusters(1000), clusters(20)
    for block in (1, 7, 999, 16384):
        assert torch.equal(clvq.nearest(x, centres, rows=block)[0], torch.cdist(x, centres).argmin(1))


def test_spherical_centres_have_length_one_and_every_row_the_one_of_highest_cosine():
    x = clusters()
    centres, labels = clvq.kmeans(x, 20, 25, seed(), spherical=True)
    torch.testing.assert_close(centres.norm(dim=1), torch.ones(20))
    assert torch.equal(labels, (F.normalize(x, dim=1) @ centres.T).argmax(1))


def test_spherical_clusters_are_as_close_as_scikit_learns():
    x = clusters()
    unit = F.normalize(x, dim=1)

    def cosine(centres: torch.Tensor) -> float:
        return (unit @ F.normalize(centres, dim=1).T).max(1).values.mean().item()

    ours = cosine(clvq.kmeans(x, 30, 25, seed(), spherical=True)[0])
    theirs = KMeans(30, n_init=3, max_iter=25, random_state=0).fit(unit.numpy())
    assert ours > 0.995 * cosine(torch.from_numpy(theirs.cluster_centers_))
    assert ours > cosine(unit[:30]) + 0.02  # the measure tells good centres from random ones


def test_clusters_are_as_tight_as_scikit_learns():
    x = clusters()
    centres, labels = clvq.kmeans(x, 30, 50, seed())
    ours = (x - centres[labels]).square().sum().item()
    theirs = KMeans(30, n_init=3, max_iter=50, random_state=0).fit(x.numpy()).inertia_
    assert ours < 1.05 * theirs
    first = x[:30]
    assert (x - first[clvq.nearest(x, first)[0]]).square().sum() > 1.3 * theirs


def test_centres_of_a_finished_run_are_the_means_of_their_rows():
    x = clusters()
    centres, labels = clvq.kmeans(x, 10, 1000, seed())
    means = torch.stack([x[labels == k].mean(0) for k in range(10)])
    torch.testing.assert_close(centres, means, rtol=1e-4, atol=1e-4)
    assert torch.equal(labels, clvq.nearest(x, centres)[0])


def test_a_scaled_spherical_code_is_as_long_as_its_rows_are_on_average():
    x = clusters()
    codes, counts = clvq.start_codebook(x, model_settings(n_codes=20, start="spherical"), seed())
    labels = (F.normalize(x, dim=1) @ F.normalize(codes, dim=1).T).argmax(1)
    assert torch.equal(counts, labels.bincount(minlength=20).float()) and (counts > 0).all()
    expected = torch.stack([x[labels == k].norm(dim=1).mean() for k in range(20)])
    torch.testing.assert_close(codes.norm(dim=1), expected, rtol=1e-4, atol=0)
    assert expected.max() > 1.2 * expected.min()


@pytest.mark.parametrize("start", ["spherical", "kmeans++", "random"])
def test_a_code_without_rows_is_finite_and_counted_as_empty(start):
    x = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 3.0]]).repeat(4, 1)  # three points, five codes
    codes, counts = clvq.start_codebook(x, model_settings(n_codes=5, top_k=2, start=start), seed())
    assert codes.isfinite().all() and counts.sum() == len(x) and (counts == 0).sum() == 2
    if start == "spherical":
        torch.testing.assert_close(codes[counts == 0].norm(dim=1), x.norm(dim=1).mean().expand(2))
    q = clvq.Quantizer(2, model_settings(n_codes=5, top_k=2))
    q.start(codes, counts)
    q.update(x, q.sample(x, seed()))
    assert q.codebook.isfinite().all()


def test_random_codes_are_different_training_rows():
    x = clusters()
    codes, counts = clvq.start_codebook(x, model_settings(n_codes=50, start="random"), seed())
    where = exact_squares(codes, x).min(1)
    assert (where.values == 0).all() and len(where.indices.unique()) == 50
    assert torch.equal(counts, torch.cdist(x, codes).argmin(1).bincount(minlength=50).float())


@pytest.mark.parametrize("start", ["spherical", "kmeans++", "random"])
def test_more_codes_than_states_are_refused(refused, start):
    with refused("n_codes=50", "49"):
        clvq.start_codebook(torch.randn(49, 4), model_settings(n_codes=50, start=start), seed())


@pytest.mark.parametrize("start", ["spherical", "kmeans++", "random"])
def test_the_start_depends_on_the_seed_alone(start):
    x, settings = clusters(500), model_settings(n_codes=20, start=start)
    first, again, other = (clvq.start_codebook(x, settings, seed(number))[0] for number in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("start", ["spherical", "kmeans++", "random"])
def test_the_start_of_some_rows_is_that_of_these_rows_alone(start):
    x, settings = clusters(400), model_settings(n_codes=10, start=start)
    rows = torch.arange(0, 400, 2)
    found, expected = clvq.start_codebook(x.half(), settings, seed(), rows), clvq.start_codebook(x.half()[rows], settings, seed())
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True)) and found[1].sum() == 200


def test_codes_are_learned_from_so_many_states_a_code_and_counted_over_all(monkeypatch):
    x, settings = clusters(2000), model_settings(n_codes=20, start="spherical")
    whole = clvq.start_codebook(x, settings, seed())[0]
    seen = []
    kmeans = clvq.kmeans
    monkeypatch.setattr(clvq, "kmeans", lambda rows, *given: (seen.append(len(rows)), kmeans(rows, *given))[1])
    monkeypatch.setattr(clvq, "MAX_POINTS_PER_CODE", 30)
    codes, counts = clvq.start_codebook(x, settings, seed())
    assert seen == [600] and counts.sum() == 2000
    cosine = [(F.normalize(x) @ F.normalize(part).T).amax(1).mean() for part in (codes, whole)]
    assert cosine[0] > 0.97 * cosine[1]


@pytest.mark.gpu
@pytest.mark.parametrize("start", ["spherical", "kmeans++", "random"])
def test_a_start_on_a_gpu_is_on_the_cpu_and_as_good(start):
    x = clusters()
    codes, counts = clvq.start_codebook(x, model_settings(n_codes=20, start=start), seed())
    assert codes.device.type == counts.device.type == "cpu" and counts.sum() == len(x)
    on_gpu, on_cpu = (clvq.kmeans(part, 20, 25, seed())[0].cpu() for part in (x.cuda(), x))
    tightness = [clvq.nearest(x, centres)[1].sum() for centres in (on_gpu, on_cpu)]
    assert tightness[0] < 1.05 * tightness[1]
