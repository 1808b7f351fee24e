"""Training: known concepts are recovered, runs can be killed and resumed, and what is measured is what it says."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from sklearn.metrics import normalized_mutual_info_score as nmi
from sklearn.metrics import r2_score

import clvq_core as clvq

ROOT = Path(__file__).resolve().parents[1]
LAYERS = (0, 1)


def seed(number: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(number)


def same_weights(one: clvq.CLVQVAE, other: clvq.CLVQVAE) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def same_history(one: pd.DataFrame, other: pd.DataFrame) -> bool:
    return one.drop(columns="seconds").equals(other.drop(columns="seconds"))


def held_out(acts: clvq.Activations, config: clvq.Config) -> torch.Tensor:
    """The sentences that `train` watches."""
    n = len(acts.lengths)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(config.seed))
    return order[: round(config.validation_share * n)]


def overfitting(synthetic, config: clvq.Config, **chosen) -> tuple[clvq.Activations, clvq.Config]:
    """Few states and targets that have nothing to do with them: the loss on held-out sentences soon rises."""
    return synthetic(sentences=60, shuffled=True), config.replace(learning_rate=1e-2, dropout=0.0, **chosen)


def at_best(history: pd.DataFrame, column: str) -> float:
    return history.loc[history["validation_loss"].idxmin(), f"validation_{column}"]


# --- known concepts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["encoder", "quantized"])
def test_known_concepts_are_recovered_and_the_upper_layer_is_predicted(synthetic, tiny_config, memory):
    acts = synthetic(sentences=400)
    model, history = clvq.train(acts, tiny_config.replace(memory=memory, epochs=10), LAYERS)
    assert nmi(acts.tokens["concept"], model.assign(acts.states[0])) > 0.95
    assert at_best(history, "variance_explained") > 0.88  # noise leaves 0.92 at most
    assert at_best(history, "codes_used") == 12


def test_shuffled_targets_cannot_be_predicted_though_the_codes_still_follow_the_source(synthetic, tiny_config):
    # The codes are means of source states and see no target, so shuffled targets leave their agreement with the source's
    # concepts as high as before. What must vanish is what they say of the targets: the variance they explain on sentences
    # held out, and their agreement with the concepts of the states that were put in as targets.
    acts = synthetic(sentences=400, shuffled=True)
    model, history = clvq.train(acts, tiny_config.replace(epochs=10), LAYERS)
    codes = model.assign(acts.states[0])
    assert history["validation_variance_explained"].max() < 0.05
    assert nmi(acts.tokens["target_concept"], codes) < 0.05
    assert nmi(acts.tokens["concept"], codes) > 0.95


def test_codes_of_noise_agree_with_no_concept(synthetic, tiny_config):
    acts = synthetic(sentences=400, noise=30.0)
    model, _ = clvq.train(acts, tiny_config.replace(epochs=1), LAYERS)
    assert nmi(acts.tokens["concept"], model.assign(acts.states[0])) < 0.1


def test_codes_move_to_the_means_of_the_states_that_are_assigned_to_them(tiny_acts, tiny_config):
    config = tiny_config.replace(start="random", top_k=1, learning_rate=0.0, dropout=0.0, ema_decay=0.5, commitment=1e3,
                     epochs=30, stop_patience=30, batch_sentences=60)  # fmt: skip
    model, history = clvq.train(tiny_acts, config, LAYERS)
    kept = ~tiny_acts.tokens["sentence"].isin(held_out(tiny_acts, config).tolist()).to_numpy()
    with torch.no_grad():
        z = model.encoder(tiny_acts.states[0][torch.from_numpy(kept)].float())
    codes = model.assign(tiny_acts.states[0])[torch.from_numpy(kept)]
    for k in codes.unique():
        torch.testing.assert_close(model.vectors[k], z[codes == k].mean(0), rtol=1e-3, atol=1e-3)
    assert history["validation_loss"].min() < 0.9 * history["validation_loss"][0]


# --- stop, kill and resume ----------------------------------------------------------------------------------------


def test_training_that_was_stopped_and_resumed_is_bit_for_bit_the_one_that_was_not(tiny_acts, tiny_config, tmp_path):
    straight, history = clvq.train(tiny_acts, tiny_config, LAYERS)
    clvq.train(tiny_acts, tiny_config.replace(epochs=3), LAYERS, tmp_path)
    resumed, continued = clvq.train(tiny_acts, tiny_config, LAYERS, tmp_path)
    assert history["epoch"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert same_weights(straight, resumed) and same_history(history, continued)


def test_a_run_that_was_stopped_after_every_epoch_keeps_its_patience_and_learning_rate(synthetic, tiny_config, tmp_path):
    acts, config = overfitting(synthetic, tiny_config, epochs=40, lr_patience=1, stop_patience=4)
    _, history = clvq.train(acts, config, LAYERS)
    last = int(history["epoch"].max())
    assert history["learning_rate"].min() < config.learning_rate and last < 40  # the rate fell, and patience ended
    for epochs in range(1, last + 2):
        _, continued = clvq.train(acts, config.replace(epochs=epochs), LAYERS, tmp_path)
    assert same_history(history, continued)


RUN = """
import sys
from pathlib import Path
import torch
import clvq_core as clvq
torch.set_num_threads(1)  # as in conftest: the order of sums depends on it
folder = Path(sys.argv[1])
config = clvq.Config.from_json((folder / "config.json").read_text("utf8"))
clvq.train(clvq.Activations.load(folder), config, (0, 1), folder)
"""


def epochs_done(folder: Path) -> int:
    """How far a run in another process has come, by its checkpoint."""
    try:
        with safe_open(folder / "checkpoint.safetensors", "pt") as file:
            return json.loads(file.metadata()["history"])[-1]["epoch"]
    except FileNotFoundError:
        return 0


def test_a_run_that_was_killed_goes_on_to_the_weights_of_one_that_was_not(tiny_acts, tiny_config, tmp_path):
    config = tiny_config.replace(epochs=40, stop_patience=40)
    for layer, states in tiny_acts.states.items():
        np.save(tmp_path / f"layer_{layer}.npy", states.numpy())
    tiny_acts.tokens.to_parquet(tmp_path / "tokens.parquet")
    (tmp_path / "source.json").write_text(json.dumps(tiny_acts.source))
    (tmp_path / "config.json").write_text(config.to_json())
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", RUN, str(tmp_path)], env={**os.environ, "PYTHONPATH": path},
                               stderr=subprocess.PIPE, text=True)  # fmt: skip
    while process.poll() is None and epochs_done(tmp_path) < 2:
        time.sleep(0.002)
    process.kill()
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert 2 <= epochs_done(tmp_path) < 40
    resumed, continued = clvq.train(clvq.Activations.load(tmp_path), config, LAYERS, tmp_path)
    straight, history = clvq.train(tiny_acts, config, LAYERS)
    assert same_weights(straight, resumed) and same_history(history, continued)


@pytest.mark.parametrize("name", ["model/quantizer.sums", "best/quantizer.codebook", "adam/0/exp_avg", "adam/3/step"])
def test_a_checkpoint_that_lacks_a_tensor_or_has_one_of_another_size_is_refused(refused, tiny_acts, tiny_config, tmp_path, name):
    path = tmp_path / "checkpoint.safetensors"
    clvq.train(tiny_acts, tiny_config.replace(epochs=2), LAYERS, tmp_path)
    with safe_open(path, "pt") as file:
        tensors, record = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
    for fault, changed in {"lacks": None, "wrong shape": torch.zeros(7, 7)}.items():
        rest = {key: value for key, value in tensors.items() if key != name}
        save_file(rest if changed is None else {**rest, name: changed}, path, record)
        with refused("checkpoint.safetensors", fault, name):
            clvq.train(tiny_acts, tiny_config, LAYERS, tmp_path)
    save_file(tensors, path, record)
    resumed, _ = clvq.train(tiny_acts, tiny_config, LAYERS, tmp_path)
    assert same_weights(resumed, clvq.train(tiny_acts, tiny_config, LAYERS)[0])


# --- several processes, one cache ---------------------------------------------------------------------------------


SMALL = dict(train_sentences=60, test_sentences=20, finetune_epochs=1, finetune_batch=8, min_count=1, n_codes=20, folds=2,
             epochs=15, stop_patience=15)  # fmt: skip
IN_CACHE = """
import sys
import torch
import clvq_core as clvq
torch.set_num_threads(1)
pipeline = clvq.Pipeline(clvq.Config.from_json(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
pipeline.run_folder
"""


def kept_training(config: clvq.Config) -> tuple[clvq.Activations, tuple[int, int], Path | None]:
    """What a training in the cache starts from, its layers, and the folder it ends in."""
    pipeline = clvq.Pipeline(config)
    return pipeline.activations("train"), pipeline.layers, pipeline.run_folder


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory):
    """A cache that holds the states which trainings read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLVQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        kept_training(clvq.configure("smoke", **SMALL, seed=0))
        yield Path(os.environ["CLVQ_CACHE"])


def in_cache(config: clvq.Config, **environment: str) -> subprocess.Popen:
    """A process that trains into the cache as soon as it is told to."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen([sys.executable, "-c", IN_CACHE, config.to_json()], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                               stderr=subprocess.DEVNULL, text=True, env={**os.environ, "PYTHONPATH": path, **environment})  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.slow
@pytest.mark.parametrize("survivor", [True, False])
def test_of_two_processes_one_trains_and_a_kill_changes_nothing_for_the_other_or_a_later_one(shared_cache, survivor):
    config = clvq.configure("smoke", **SMALL, seed=1 + survivor)
    of_a_launcher = [{"WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
                     for rank in range(2)]  # fmt: skip
    first, *others = (in_cache(config, **environment) for environment in of_a_launcher[: 1 + survivor])
    go(first)
    while not (done := [epochs_done(path.parent) for path in shared_cache.glob("**/checkpoint.safetensors")]) or max(done) < 2:
        assert first.poll() is None
        time.sleep(0.005)
    for other in others:
        go(other)
        time.sleep(0.2)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    for other in others:
        other.communicate(timeout=120)
        assert other.returncode == 0
    acts, layers, folder = kept_training(config)
    model, history = clvq.train(acts, config, layers)
    assert same_weights(clvq.CLVQVAE.from_pretrained(folder), model)
    assert same_history(pd.read_parquet(folder / "metrics.parquet"), history)


def test_the_best_weights_are_restored_not_the_last(synthetic, tiny_config):
    acts, config = overfitting(synthetic, tiny_config, epochs=15)
    model, history = clvq.train(acts, config, LAYERS)
    best = int(history["validation_loss"].idxmin())
    assert 0 < best < 15
    until_best, shorter = clvq.train(acts, config.replace(epochs=best), LAYERS)
    assert shorter["validation_loss"].iloc[-1] == history["validation_loss"].min()
    assert same_weights(model, until_best) and not model.training
    loss = clvq.evaluate(model, acts, held_out(acts, config), config)["loss"]
    assert loss == pytest.approx(history["validation_loss"].min(), rel=1e-5)


# --- when a loss is not finite ------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_names_its_epoch_and_leaves_the_last_good_one(tiny_acts, tiny_config, tmp_path):
    clvq.train(tiny_acts, tiny_config.replace(epochs=2), LAYERS, tmp_path)
    broken = replace(tiny_acts, states={**tiny_acts.states, 1: torch.full_like(tiny_acts.states[1], math.nan)})
    with pytest.raises(FloatingPointError, match="epoch 3"):
        clvq.train(broken, tiny_config, LAYERS, tmp_path)
    assert epochs_done(tmp_path) == 2
    resumed, continued = clvq.train(tiny_acts, tiny_config, LAYERS, tmp_path)
    straight, history = clvq.train(tiny_acts, tiny_config, LAYERS)
    assert same_weights(straight, resumed) and same_history(history, continued)


def test_weights_that_blow_up_in_the_last_step_of_an_epoch_are_not_taken_for_a_good_state(tiny_acts, tiny_config, tmp_path):
    config = tiny_config.replace(epochs=1, batch_sentences=60)  # one step an epoch: its own loss is still finite
    with pytest.raises(FloatingPointError, match="epoch 1"):
        clvq.train(tiny_acts, config.replace(learning_rate=1e30), LAYERS, tmp_path)
    _, history = clvq.train(tiny_acts, config, LAYERS, tmp_path)
    assert history["validation_loss"].notna().all()


# --- what is measured ---------------------------------------------------------------------------------------------


def tables(low: int = 2) -> st.SearchStrategy:
    """Random data of any mean and spread, in double precision."""
    numbers = st.floats(-1e6, 1e6)
    return st.tuples(st.integers(low, 12), st.integers(1, 5)).flatmap(
        lambda shape: st.lists(numbers, min_size=shape[0] * shape[1], max_size=shape[0] * shape[1]).map(
            lambda flat: torch.tensor(flat, dtype=torch.float64).view(shape)
        )
    )


@given(target=tables())
def test_the_mean_explains_exactly_no_variance_of_any_data(target):
    assume((target - target.mean(0)).square().sum() > 0)
    assert clvq.variance_explained(target.mean(0).expand_as(target), target) == 0
    assert clvq.variance_explained(target, target) == 1


def test_variance_explained_is_scikit_learns_variance_weighted_r2():
    target = torch.randn(200, 7) * torch.tensor([0.1, 1, 2, 3, 5, 8, 100]) + 50
    for predicted in (target + torch.randn(200, 7), target.roll(1, 0), 0.5 * target, torch.zeros(200, 7)):
        expected = r2_score(target.double(), predicted.double(), multioutput="variance_weighted")
        assert clvq.variance_explained(predicted, target) == pytest.approx(expected, rel=1e-9)


@pytest.fixture(scope="module")
def trained(tiny_acts, tiny_config):
    return clvq.train(tiny_acts, tiny_config.replace(epochs=2), LAYERS)


def test_no_figure_but_the_batch_perplexity_depends_on_the_batches(tiny_acts, tiny_config, trained):
    model, sentences = trained[0], torch.arange(60)
    whole, *others = (clvq.evaluate(model, tiny_acts, sentences, tiny_config.replace(batch_sentences=n)) for n in (60, 1, 7))
    for other in others:
        for name in whole.keys() - {"batch_perplexity"}:
            assert other[name] == pytest.approx(whole[name], rel=1e-6, abs=1e-7), name
        assert other["batch_perplexity"] < whole["batch_perplexity"] - 0.5
    assert whole["batch_perplexity"] == whole["perplexity"]
    each = [clvq.evaluate(model, tiny_acts, batch, tiny_config)["perplexity"] for batch in sentences.split(7)]
    assert others[1]["batch_perplexity"] == pytest.approx(np.mean(each))


def test_evaluation_gives_the_variance_explained_and_the_perplexity_of_all_positions_at_once(tiny_acts, tiny_config, trained):
    model, sentences = trained[0], torch.arange(5, 40)
    (x, y), lengths = next(tiny_acts.stream([sentences], LAYERS, torch.device("cpu")))
    with torch.no_grad():
        out = model(x, lengths)
        loss, mse = model.loss(out, y)
    codes = out.quantized.codes
    expected = {
        "loss": loss.item(), "mse": mse.item(), "codes_used": len(codes.unique()),
        "variance_explained": clvq.variance_explained(model.reconstruct(out), y),
        "perplexity": clvq.perplexity(codes.bincount()), "utilisation": clvq.perplexity(codes.bincount()) / 12,
    }  # fmt: skip
    found = clvq.evaluate(model, tiny_acts, sentences, tiny_config)
    assert {name: found[name] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("batch_sentences", [1, 7, 60])
def test_a_model_that_predicts_the_mean_explains_no_variance_whatever_the_batches(tiny_acts, tiny_config, trained, batch_sentences):
    model = clvq.CLVQVAE(32, 32, 0, 1, "synthetic", trained[0].settings)
    model.load_state_dict(trained[0].state_dict())
    torch.nn.init.zeros_(model.decoder.out.weight)
    torch.nn.init.zeros_(model.decoder.out.bias)
    model.target_mean.copy_(tiny_acts.states[1].double().mean(0))
    config = tiny_config.replace(batch_sentences=batch_sentences)
    assert abs(clvq.evaluate(model, tiny_acts, torch.arange(60), config)["variance_explained"]) < 1e-6


@pytest.mark.parametrize("training", [True, False])
def test_evaluation_leaves_the_model_as_it_was(tiny_acts, tiny_config, trained, training):
    model = trained[0].train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    clvq.evaluate(model, tiny_acts, torch.arange(60), tiny_config)
    assert model.training == training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.eval()


@given(k=st.integers(1, 500), each=st.integers(1, 1000))
def test_perplexity_is_the_number_of_codes_that_are_used_equally(k, each):
    counts = torch.zeros(600, dtype=torch.long)
    counts[:k] = each
    assert clvq.perplexity(counts) == pytest.approx(k)


@given(counts=st.lists(st.integers(0, 10**6), min_size=1, max_size=50))
def test_perplexity_lies_between_one_and_the_number_of_codes_used(counts):
    assume(sum(counts))
    used = sum(n > 0 for n in counts)
    assert 1 - 1e-9 <= clvq.perplexity(torch.tensor(counts)) <= used * (1 + 1e-9)


def test_the_history_has_both_perplexities_under_names_of_their_own_and_a_row_for_the_start(trained):
    history = trained[1]
    assert history["epoch"].tolist() == [0, 1, 2]
    measured = {"train_loss", "train_mse", "alpha", "learning_rate", "seconds"} | {
        f"validation_{name}" for name in ("loss", "mse", "variance_explained", "perplexity", "batch_perplexity",
                                          "utilisation", "codes_used")}  # fmt: skip
    assert measured <= set(history.columns)
    assert history.loc[0, "alpha"] == pytest.approx(0.275, abs=5e-4)
    np.testing.assert_allclose(history["validation_utilisation"], history["validation_perplexity"] / 12)


# --- what a run depends on ----------------------------------------------------------------------------------------


def test_training_depends_on_the_seed_alone_and_the_global_state_stays(tiny_acts, tiny_config):
    config = tiny_config.replace(epochs=2)
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, _ = clvq.train(tiny_acts, config, LAYERS)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    again, _ = clvq.train(tiny_acts, config, LAYERS)
    other, _ = clvq.train(tiny_acts, config.replace(seed=7), LAYERS)
    assert same_weights(first, again) and not same_weights(first, other)


def test_the_targets_statistics_are_of_the_training_sentences_alone(tiny_acts, tiny_config):
    held = held_out(tiny_acts, tiny_config)
    rows = torch.from_numpy(~tiny_acts.tokens["sentence"].isin(held.tolist()).to_numpy())
    model, _ = clvq.train(tiny_acts, tiny_config.replace(epochs=1), LAYERS)
    y = tiny_acts.states[1][rows].double()
    torch.testing.assert_close(model.target_mean, y.mean(0).float())
    torch.testing.assert_close(model.target_scale, y.std(0, unbiased=False).float())
    plain, _ = clvq.train(tiny_acts, tiny_config.replace(epochs=1, standardize_targets=False), LAYERS)
    assert (plain.target_mean == 0).all() and (plain.target_scale == 1).all()


def test_the_centre_is_the_mean_encoding_of_the_states_that_the_model_was_trained_on(tiny_acts, tiny_config, tmp_path):
    model, _ = clvq.train(tiny_acts, tiny_config.replace(epochs=2, train_share=0.5), LAYERS)
    rows = tiny_acts.rows(clvq.split_sentences(len(tiny_acts.lengths), tiny_config.replace(train_share=0.5))[0])
    assert tiny_acts.tokens["is_summary"].to_numpy()[rows].any()
    with torch.no_grad():
        expected = model.encoder(tiny_acts.states[0][rows].float()).double().mean(0).float()
    torch.testing.assert_close(model.centre, expected)
    assert (expected - tiny_acts.states[0][rows].float().mean(0)).norm() > 0.05 * expected.norm()  # states live elsewhere
    model.save_pretrained(tmp_path)
    assert torch.equal(clvq.CLVQVAE.from_pretrained(tmp_path).centre, model.centre)


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", [{}, dict(replace_dead=0.5, memory="shuffled", start="random", precision="bfloat16")])
def test_training_on_a_gpu_finds_the_known_concepts_and_goes_on_from_a_checkpoint(synthetic, tiny_config, tmp_path, chosen):
    acts, config = synthetic(sentences=400), tiny_config.replace(epochs=10, **chosen)
    clvq.train(acts, config.replace(epochs=5), LAYERS, tmp_path)
    model, history = clvq.train(acts, config, LAYERS, tmp_path)
    assert model.device.type == "cuda" and history["epoch"].max() == 10
    codes = model.assign(acts.states[0], generator=seed()) if chosen else model.assign(acts.states[0])
    assert nmi(acts.tokens["concept"], codes) > (0.7 if chosen else 0.95)
    assert {tensor.device.type for tensor in (codes, model.vectors, model.centre)} == {"cpu"}
    clvq.references(model, acts, config)
