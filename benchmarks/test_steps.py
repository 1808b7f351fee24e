"""Extraction, salience, clusters, probes and sparse autoencoders beside what people would use instead."""

import copy
import json

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerIntegratedGradients
from conftest import DEVICES, RATES, WHERE
from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.sae import TrainStepInput
from sklearn.cluster import KMeans
from torch import nn

import clvq_core as clvq

LAYERS = [4, 6]


@pytest.fixture(scope="module")
def movies():
    """The embedded model and 256 sentences."""
    pipeline = clvq.Pipeline(clvq.configure("smoke"))
    return clvq.load_language_model("minilm", pipeline.label_names, seed=0), pipeline.train["text"].tolist()[:256]


# --- k-means ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_the_sphere():
    """81,456 unit vectors about 400 directions, as loosely as states of a transformer lie, and all to one side."""
    draw, k, width = torch.Generator().manual_seed(0), 400, 768
    centres = torch.randn(k, width, generator=draw) + 1.5 * torch.randn(width, generator=draw)
    return F.normalize(centres[torch.randint(k, (81_456,), generator=draw)] + 1.2 * torch.randn(81_456, width, generator=draw), dim=1)


def mean_cosine(x, centres):
    unit = F.normalize(torch.as_tensor(centres).float(), dim=1)
    return torch.cat([(part @ unit.T).amax(1) for part in x.split(8192)]).mean().item()


@pytest.mark.parametrize(("peer", "device"), [("scikit-learn KMeans on unit vectors", device) for device in DEVICES] + [("faiss Kmeans(spherical=True)", "cpu")])
def test_kmeans(beside, on_the_sphere, peer, device):
    x, k, iterations = on_the_sphere, 400, 15
    rows, placed = x.numpy(), x.to(device)

    def ours():
        return clvq.kmeans(placed, k, iterations, torch.Generator().manual_seed(0), spherical=True)[0].cpu()

    def sklearns():
        return KMeans(k, init="k-means++", n_init=1, max_iter=iterations, tol=0, random_state=0).fit(rows).cluster_centers_

    def faisss():
        method = faiss.Kmeans(x.shape[1], k, niter=iterations, spherical=True, seed=0, max_points_per_centroid=len(x))
        method.train(rows)
        return method.centroids

    def same(mine, other):
        a, b = mean_cosine(x, mine), mean_cosine(x, other)
        assert a > b * 0.995, (a, b)
        return f"mean cosine {a:.4f} and {b:.4f}"

    beside(f"spherical k-means++, 81,456 x 768, K 400{WHERE[device]}", peer, ours, sklearns if "scikit" in peer else faisss, 2 if "scikit" in peer else None, same,
           rounds=1, warm_up=0)


# --- extraction ---------------------------------------------------------------------------------------------------


def last_subwords(ids):
    """Position of the summary and of each word's last sub-word."""
    return [0, *{word: at for at, word in enumerate(ids) if word is not None}.values()]


@pytest.mark.parametrize(("peer", "goal", "precision"), [
    ("one sentence a pass, JSON out (as NeuroX)", 8, "float32"), ("one sentence a pass, JSON out (as NeuroX)", 8, "bfloat16"),
    ("one sentence a pass", 2, "float32"), ("padded batches of 32", 1.2, "float32"),
])
def test_extraction(beside, movies, tmp_path, peer, goal, precision):
    lm, texts = movies
    config = clvq.configure("smoke", inference_precision=precision)

    def states(batch):
        encoded = lm.tokenizer([clvq.split_words(text) for text in batch], is_split_into_words=True, return_tensors="pt", padding=True, truncation=True,
                               max_length=config.max_tokens)
        hidden = lm.model.base_model(**encoded, output_hidden_states=True).hidden_states
        return [[hidden[layer][i, last_subwords(encoded.word_ids(i))] for i in range(len(batch))] for layer in LAYERS]

    def ours():
        return [part.float() for part in clvq.extract(lm, texts, LAYERS, config, tmp_path, filtered=False).states.values()]

    @torch.no_grad()
    def batched(size):
        parts = [states(texts[i:i + size]) for i in range(0, len(texts), size)]
        return [torch.cat([rows for part in parts for rows in part[layer]]).half().float() for layer in range(2)]

    @torch.no_grad()
    def json_lines():
        with open(tmp_path / "theirs.json", "w") as file:
            for at, text in enumerate(texts):
                parts = [part[0].numpy().tolist() for part in states([text])]
                words = ["[CLS]", *clvq.split_words(text)]
                features = [{"token": word, "layers": [{"index": layer, "values": [round(v, 8) for v in rows[i]]} for layer, rows in zip(LAYERS, parts, strict=True)]}
                            for i, word in enumerate(words[:len(parts[0])])]
                file.write(json.dumps({"linex_index": at, "features": features}) + "\n")

    def same(mine, other):
        if other is None:
            lines = (tmp_path / "theirs.json").read_text().splitlines()
            words = [word["layers"] for line in lines for word in json.loads(line)["features"]]
            other = [torch.tensor([word[i]["values"] for word in words]) for i in range(len(LAYERS))]
        apart = max(float((a - b).norm() / b.norm()) for a, b in zip(mine, other, strict=True))
        assert apart < 0.02, apart
        return f"{len(mine[0]):,} states a layer, {apart:.2%} apart"

    theirs = json_lines if "JSON" in peer else lambda: batched(1 if peer.startswith("one") else 32)
    mine = beside(f"extraction of 2 layers, {len(texts)} sentences, {precision}", peer, ours, theirs, goal, same,
                  peer_rounds=1 if "JSON" in peer else 3, peer_warm_up=0 if "JSON" in peer else 1)
    RATES["reading"] = 2 * lm.block_weights * len(clvq.encode(lm, texts, config).ids) / mine.seconds  # float32: of the last of these


# --- salience -----------------------------------------------------------------------------------------------------


def captums(lm, ids, mask, layer, points, at_once):
    """Attributions by captum's LayerIntegratedGradients, summed over the width and of unit length over each sentence."""
    method = LayerIntegratedGradients(lambda ids, mask: lm.model(input_ids=ids, attention_mask=mask).logits, lm.model.base_model.encoder.layer[layer - 1])
    with torch.no_grad():
        target = lm.model(input_ids=ids, attention_mask=mask).logits.argmax(1)
    parts = method.attribute(ids, baselines=torch.zeros_like(ids), target=target, additional_forward_args=(mask,), n_steps=points,
                             method="gausslegendre", internal_batch_size=at_once)
    return F.normalize(parts.sum(-1) * mask, dim=1)


def test_salience_beside_captum(beside, movies):
    lm, texts = movies
    texts, config, layer = texts[:100], clvq.configure("smoke", salience_steps=16, inference_precision="float32"), 4
    encoded = clvq.encode(lm, texts, config)
    lengths = encoded.offsets.diff()

    def ours():
        return clvq.attribute(lm, texts, layer, config)[0]

    def theirs():
        share = torch.zeros(len(encoded.ids))
        for batch in clvq.length_batches(lengths, config.batch_tokens // 4):
            ids, mask = clvq.pad_ids(lm, encoded, batch)
            rows, real = clvq.pad_rows(encoded.offsets, batch)
            share[rows[real]] = captums(lm, ids, mask.long(), layer, 16, max(1, config.batch_tokens // ids.shape[1]))[real]
        return share

    def same(mine, other):
        expected = np.array([other[first:last + 1].max().item() for first, last in zip(mine["first"], mine["last"], strict=True)])
        apart = np.abs(mine["salience"].to_numpy() - expected).max()
        assert apart < 1e-3, apart
        return f"{len(mine):,} attributions, at most {apart:.0e} apart"

    beside("integrated gradients at layer 4, 16 points, 100 sentences", "captum LayerIntegratedGradients, in batches", ours, theirs, 1.5, same,
           rounds=1)


def test_salience_beside_500_steps(beside, movies):
    lm, texts = movies
    texts, layer = texts[:16], 4
    config = clvq.configure("laptop")

    def ours():
        return clvq.attribute(lm, texts, layer, config)[0]

    def theirs():
        found = []
        for text in texts:
            encoded = lm.tokenizer([clvq.split_words(text)], is_split_into_words=True, return_tensors="pt")
            share = captums(lm, encoded["input_ids"], encoded["attention_mask"], layer, 500, 50)[0]
            words = {word: max(share[at].item() for at, other in enumerate(encoded.word_ids()) if other == word) for word in encoded.word_ids() if word is not None}
            found.append(1 + max([-1, *words], key=lambda word: share[0].item() if word < 0 else words[word]))  # 0: the summary
        return found

    def same(mine, other):
        words = [group["position"].to_numpy()[group["salience"].argmax()] for _, group in mine.groupby("sentence")]
        equal = np.mean([a == b for a, b in zip(words, other, strict=True)])
        assert equal >= 0.99, list(zip(words, other, strict=True))
        return f"most salient word the same in {equal:.0%}"

    beside(f"integrated gradients at layer 4, {config.salience_steps} points, {len(texts)} sentences", "captum, 500 points, one sentence at a time (as the authors)", ours, theirs, 15,
           same, peer_rounds=1, peer_warm_up=0)


# --- probes -------------------------------------------------------------------------------------------------------


def one_probe(x, labels, kept, watched, held, config):
    """A probe as people write it; whether it is right on the sentences held out."""
    probe = nn.Sequential(nn.Linear(x.shape[1], config.probe_hidden), nn.ReLU(), nn.Dropout(config.probe_dropout), nn.Linear(config.probe_hidden, 2))
    optimizer = torch.optim.Adam(probe.parameters(), lr=config.probe_learning_rate)
    best, waited = float("inf"), 0
    for _ in range(config.probe_epochs):
        probe.train()
        for batch in torch.from_numpy(kept)[torch.randperm(len(kept))].split(config.probe_batch):
            loss = F.cross_entropy(probe(x[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        probe.eval()
        with torch.no_grad():
            loss = F.cross_entropy(probe(x[watched]), labels[watched]).item()
        if loss < best:
            best, waited, weights = loss, 0, copy.deepcopy(probe.state_dict())
        elif (waited := waited + 1) >= config.probe_patience:
            break
    probe.load_state_dict(weights)
    with torch.no_grad():
        return (probe(x[held]).argmax(1) == labels[held]).float()


def test_probes(beside):
    draw, config = torch.Generator().manual_seed(0), clvq.configure("laptop")
    labels = torch.randint(2, (1000,), generator=draw)
    h = torch.randn(8, 1000, 384, generator=draw) + labels[None, :, None] * 0.12
    folds = clvq.make_folds(labels.numpy(), config)

    def ours():
        scores = clvq.score(clvq.train_probes(h, labels, folds, config), h, folds)
        return (scores.argmax(-1) == labels).float().mean().item()

    def theirs():
        return torch.cat([one_probe(x, labels, kept, watched, held, config) for x in h
                          for held, kept, watched in zip(folds.held, folds.kept, folds.watched, strict=True)]).mean().item()

    def same(mine, other):
        assert abs(mine - other) < 0.02, (mine, other)
        return f"accuracy held out {mine:.3f} and {other:.3f}"

    beside(f"{config.folds}-fold probes of 8 sets of 1,000 states, width 384", "one probe after another", ours, theirs, 5, same, peer_rounds=1, peer_warm_up=0)


# --- sparse autoencoder -------------------------------------------------------------------------------------------


def test_sparse_autoencoder(beside):
    width, neurons, k, rows = 768, 2048, 32, 4096
    torch.manual_seed(0)
    ours_sae = clvq.SparseAutoencoder(width, width, neurons, k)
    theirs_sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=width, d_sae=neurons, k=k, dtype="float32", device="cpu", apply_b_dec_to_input=False,
                                                       rescale_acts_by_decoder_norm=False, normalize_activations="none"))
    with torch.no_grad():
        for mine, given in ((theirs_sae.W_enc, ours_sae.encoder.T), (theirs_sae.W_dec, ours_sae.decoder), (theirs_sae.b_enc, ours_sae.bias), (theirs_sae.b_dec, ours_sae.target_bias)):
            mine.copy_(given)
    x = torch.randn(rows, width)
    optimizers = [torch.optim.Adam(part.parameters(), lr=1e-4, fused=fused) for part, fused in ((ours_sae, True), (theirs_sae, False))]
    config = clvq.configure("paper", sae_top_k=k)

    def ours():
        losses = []
        for part in x.split(config.sae_batch):
            losses.append(clvq.sae_step(ours_sae, optimizers[0], part, part, config).item())
        return losses

    def theirs():
        losses = []
        for part in x.split(config.sae_batch):
            with torch.autocast("cpu", torch.bfloat16, enabled=clvq.uses_bfloat16(part.device, config.precision)):
                out = theirs_sae.training_forward_pass(TrainStepInput(part, {"auxiliary_loss": 0.0}, None, 0, False))
            optimizers[1].zero_grad()
            out.loss.backward()
            optimizers[1].step()
            losses.append(out.loss.item() / width)  # theirs adds up over the width
        return losses

    first = ours(), theirs()

    def same(*_):
        mine, other = (np.mean(part) for part in first)
        assert abs(mine - other) < 0.01 * other, (mine, other)
        return f"loss of the first {rows // config.sae_batch} steps {mine:.4f} and {other:.4f}"

    beside(f"TopK SAE, {neurons} neurons, {rows:,} states in batches of {config.sae_batch}", "sae-lens TopKTrainingSAE", ours, theirs, 1, same, rounds=5)
