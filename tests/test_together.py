"""Several processes that train together give the model that one gives, and codebooks that are the same on all."""

import os
import socket
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import clvq_core as clvq

TRAIN = """
import sys
import torch
sys.path.insert(0, {tests!r})
torch.set_num_threads(1)
import conftest, clvq_core as clvq
acts = conftest.synthetic.__wrapped__()(sentences=60)
config = clvq.configure("smoke", n_codes=12, top_k=1, dropout=0.0, decoder_layers=1, decoder_heads=4, feedforward=64, epochs=3,
                        batch_sentences=8, learning_rate=2e-3, precision="float32", {more})
model, history = clvq.train(acts, config, (0, 1))
from safetensors.torch import save_file
losses = torch.tensor(history["train_loss"].iloc[1:].tolist(), dtype=torch.float64)
save_file(model.state_dict() | {{"loss": losses}}, {out!r} + f"-{{clvq.ranks()[0]}}.safetensors")
"""


def trained(folder, name, processes, more=""):
    """Weights and losses of each process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    code = TRAIN.format(tests=os.path.dirname(__file__), out=str(folder / name), more=more)
    together = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    running = []
    for rank in range(processes):
        own = {**os.environ, **(together if processes > 1 else {}), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        running.append(subprocess.Popen([sys.executable, "-c", code], env=own, stderr=subprocess.PIPE, text=True))
    for process in running:
        _, said = process.communicate(timeout=300)
        assert process.returncode == 0, said
    return [load_file(folder / f"{name}-{rank}.safetensors") for rank in range(processes)]


@pytest.mark.slow
@pytest.mark.parametrize("more", ["", "replace_dead=2.0"])
def test_two_processes_train_the_model_that_one_trains(tmp_path, more):
    (alone,), (one, other) = (trained(tmp_path, f"of-{n}", n, more) for n in (1, 2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    if not more:  # which states take the place of dead codes is drawn from each process's own
        for name, found in one.items():  # keys' biases change nothing, so that their gradients are rounding, which Adam makes large
            torch.testing.assert_close(found, alone[name], rtol=1e-4, atol=1e-3 if name.endswith("in_proj_bias") else 2e-5, msg=name)
    assert torch.isfinite(one["loss"]).all() and one["loss"][-1] < one["loss"][0]


@pytest.mark.parametrize("size", [None, "4"])
def test_one_process_is_alone(monkeypatch, size):
    if size:  # a cluster's, without a word of where the others are
        monkeypatch.setenv("WORLD_SIZE", size)
        monkeypatch.setenv("LOCAL_RANK", "0")
    assert clvq.ranks() == (0, 1)
    total = torch.ones(3)
    clvq.sum_over_ranks(total)
    assert torch.equal(total, torch.ones(3))


def test_more_processes_than_sentences_in_a_batch_are_refused(monkeypatch, synthetic):
    monkeypatch.setattr(clvq, "ranks", lambda: (0, 9))
    config = clvq.configure("smoke", n_codes=12, epochs=1, batch_sentences=8)
    with pytest.raises(ValueError, match="9 processes cannot share batches of 8 sentences; start at most 8"):
        clvq.train(synthetic(sentences=60), config, (0, 1))
