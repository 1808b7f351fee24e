"""What the tests share: one cache for the session, the embedded language model, synthetic states, a check of refusals."""

import atexit
import contextlib
import os
import shutil
import tempfile

# Before the module and huggingface_hub are imported, and for every notebook and command that a test starts. With
# CLVQ_TEST_CACHE a cache is named that outlives the session (and that the workers of pytest-xdist share).
os.environ["HF_HUB_OFFLINE"] = "1"
if "CLVQ_TEST_CACHE" not in os.environ:
    os.environ["CLVQ_TEST_CACHE"] = tempfile.mkdtemp(prefix="clvq-test-")
    atexit.register(shutil.rmtree, os.environ["CLVQ_TEST_CACHE"], ignore_errors=True)
os.environ["CLVQ_CACHE"] = os.path.abspath(os.environ["CLVQ_TEST_CACHE"])

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import settings

import clvq_core as clvq

if not torch.cuda.is_available():
    os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # which a CUDA build of torch brings even where there is no GPU
torch.set_num_threads(1)  # the tests' operations are small: a second thread costs more than it saves

settings.register_profile("clvq", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("clvq")


FIRST = ["test_notebooks", "test_families", "test_sweeps", "test_runs", "test_rating_page", "test_book"]
"""Files that take longest: in several processes (-n) they begin first, so that all end together."""


def pytest_collection_modifyitems(config, items):
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: [*FIRST, item.path.stem].index(item.path.stem))


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file's tests stay in one process, as they share fixtures; those that run notebooks share none."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if "test_notebooks.py" in nodeid else nodeid.partition("::")[0]

    return ByFile(config, log)


@pytest.fixture(autouse=True)
def same_draws():
    """What a test draws from PyTorch's global state does not depend on the tests before it."""
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_config():
    """Settings small enough to train in seconds, in float32 so that results are the same on every processor."""
    return clvq.configure(
        "smoke", n_codes=12, top_k=3, decoder_layers=1, decoder_heads=4, feedforward=64, epochs=6, batch_sentences=32,
        learning_rate=2e-3, validation_share=0.2, precision="float32", folds=4, probe_epochs=30,
    )  # fmt: skip


@pytest.fixture(scope="session")
def minilm():
    """The embedded language model with a new head of two classes."""
    return clvq.load_language_model("minilm", ["negative", "positive"], seed=0)


@pytest.fixture(scope="session")
def synthetic():
    """Makes states of sentences whose positions each have one of a few known concepts, column `concept` of the tokens.

    Layer 0 is the concept's centre plus noise; layer 1 a rotation of layer 0. `shuffled`: layer 1 goes to other rows,
    and the column `target_concept` says whose.
    """

    def make(sentences=240, concepts=12, width=32, noise=0.3, shuffled=False, seed=0):
        draw = np.random.default_rng(seed)
        lengths = draw.integers(2, 9, sentences)
        offsets = np.concatenate([[0], lengths.cumsum()])
        concept = draw.integers(0, concepts, offsets[-1])
        centres = draw.normal(size=(concepts, width))
        centres *= 6 / np.linalg.norm(centres, axis=1, keepdims=True)
        lower = centres[concept] + noise * draw.normal(size=(len(concept), width))
        rotation = np.linalg.qr(draw.normal(size=(width, width)))[0]
        order = draw.permutation(len(concept)) if shuffled else np.arange(len(concept))
        sentence = np.repeat(np.arange(sentences), lengths)
        position = np.arange(len(concept)) - offsets[sentence]
        tokens = pd.DataFrame(
            {
                "sentence": sentence,
                "position": position,
                "word": np.where(position == 0, "[CLS]", [f"word{k}" for k in concept]),
                "is_summary": position == 0,
                "concept": concept,
                "target_concept": concept[order],
            }
        )
        states = {0: lower, 1: (lower @ rotation)[order]}
        source = {"model": "synthetic", "layers": [0, 1], "width": width, "sentences": sentences}
        return clvq.Activations(
            {layer: torch.from_numpy(x.astype(np.float16)) for layer, x in states.items()},
            torch.from_numpy(offsets), tokens, source,
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def tiny_acts(synthetic):
    """60 synthetic sentences, layers 0 and 1, 32 wide."""
    return synthetic(sentences=60)


@pytest.fixture(scope="session")
def make_trial():
    """Makes a trial of layer 0 from summary states (S, D) and, for each sentence, its words' states, the most salient first."""

    def make(h, words, labels, predicted=None, train=None, kind=clvq.Trial, **settings):
        counts = [1 + len(states) for states in words]
        states = torch.cat([torch.cat([summary[None], own]) for summary, own in zip(h, words, strict=True)])
        position = np.concatenate([np.arange(n) for n in counts])
        tokens = pd.DataFrame(
            {
                "sentence": np.repeat(np.arange(len(h)), counts),
                "position": position,
                "word": [f"word{i}" if i else "[CLS]" for i in position],
                "is_summary": position == 0,
                "salience": np.where(position == 0, 0.0, 1 / np.maximum(position, 1)),
            }
        )
        source = {"model": "made", "layers": [0], "width": h.shape[1], "sentences": len(h)}
        acts = clvq.Activations({0: states}, torch.tensor([0, *counts]).cumsum(0), tokens.drop(columns="salience"), source)
        config = clvq.configure("smoke", **{"folds": 5, "probe_epochs": 100, **settings}).subset(clvq.ProbeSettings)
        return kind(train or acts, acts, tokens, labels, labels if predicted is None else predicted, config)

    return make


@pytest.fixture(scope="session")
def planted(make_trial):
    """A trial, and a method whose four concepts are points among its words.

    The class is where the summary lies along one direction. The most salient word has the concept of its class on that
    direction (0 or 1), the other word a concept on a second direction that says nothing (2 or 3). All means are zero.
    """
    draw = torch.Generator().manual_seed(0)
    direction, other = torch.linalg.qr(torch.randn(12, 2, generator=draw))[0].T
    labels = torch.arange(200) % 2
    sign, random = 1 - 2.0 * labels[:, None], 1 - 2.0 * (torch.arange(200) // 2 % 2)[:, None]
    noise = torch.randn(200, 12, generator=draw)
    noise = clvq.ablate(noise, direction)
    h = noise - noise.mean(0) + 3 * sign * direction
    words = torch.stack([5 * sign * direction, 5 * random * other], 1)
    predicted = labels.clone()
    predicted[:10] = 1 - predicted[:10]
    points = 5 * torch.stack([direction, -direction, other, -other])
    return make_trial(h, list(words), labels, predicted), clvq.Concepts("planted", 0, points)


@pytest.fixture(scope="session")
def refused():
    """`with refused("part", ...)`: the block raises a ValueError of one clear sentence that holds these parts."""

    @contextlib.contextmanager
    def check(*parts):
        with pytest.raises(ValueError) as caught:
            yield
        message = str(caught.value)
        assert type(caught.value) is ValueError, f"{type(caught.value).__name__}: {message}"
        assert 0 < len(message) < 400
        assert "\n" not in message and ". " not in message, message
        for part in parts:
            assert part in message, message

    return check
