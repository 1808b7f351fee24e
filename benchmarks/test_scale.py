"""What more states, more memory than there is, another precision and a process from nothing cost."""

import json
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import THREADS, peak_memory

import clvq_core as clvq

FIGURE = Path(__file__).resolve().parents[1] / "book" / "static" / "scale.svg"
WIDTH = 384


def make_states(folder: Path, sentences: int, width: int = WIDTH) -> clvq.Activations:
    """Two layers of made states on disk, in ragged sentences; the second is a turned first with noise, about 64 directions."""
    draw = np.random.default_rng(0)
    lengths = np.clip(np.round(draw.lognormal(1.55, 0.66, sentences)), 1, 61).astype(int)
    n, centres, turn = int(lengths.sum()), draw.standard_normal((64, width), np.float32), draw.standard_normal((width, width), np.float32) / width**0.5
    files = [np.lib.format.open_memmap(folder / f"layer_{layer}.npy", "w+", np.float16, (n, width)) for layer in (1, 2)]
    for first in range(0, n, 16384):
        last = min(n, first + 16384)
        x = centres[draw.integers(64, size=last - first)] + 0.5 * draw.standard_normal((last - first, width), np.float32)
        files[0][first:last], files[1][first:last] = x, x @ turn
    sentence = np.repeat(np.arange(sentences), lengths)
    position = np.arange(n) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    pd.DataFrame({"sentence": sentence, "position": position, "word": "w", "is_summary": position == 0}).to_parquet(folder / "tokens.parquet")
    source = {"model": "made", "n_layers": 2, "layers": [1, 2], "width": width, "sentences": sentences}
    (folder / "source.json").write_text(json.dumps(source))
    return clvq.Activations.load(folder)


SETTINGS = clvq.configure("laptop", epochs=1, batch_sentences=128, n_codes=64, decoder_layers=1, feedforward=256, read_together=64)
"""Little to compute for each state, so that reading them counts."""


def epoch(folder: Path) -> dict[str, float]:
    """One epoch on the states of a folder: seconds of the start and of the epoch, and the variance explained."""
    acts = clvq.Activations.load(folder)
    began = time.perf_counter()
    _, history = clvq.train(acts, SETTINGS, (1, 2))
    return {"states": len(acts.tokens), "all": time.perf_counter() - began, "epoch": float(history["seconds"].iloc[-1]),
            "explained": float(history["validation_variance_explained"].iloc[-1])}


EPOCHS: dict[Path, dict[str, float]] = {}
"""What `epoch` found, by folder."""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Folders of states by number of sentences."""
    folders = {sentences: tmp_path_factory.mktemp("states") for sentences in (1_700, 17_000, 170_000)}
    for sentences, folder in folders.items():
        make_states(folder, sentences)
    return folders


def test_cost_is_linear_in_states(note, made):
    rows = []
    for folder in made.values():
        disk = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
        with peak_memory() as mib:
            found = EPOCHS[folder] = epoch(folder)
        rows.append({"states": found["states"], "start": found["all"] - found["epoch"], "an epoch": found["epoch"], "memory": mib[0], "disk": disk})
        note("Cost by size", states=f"{found['states']:,}", **{"start, s": f"{found['all'] - found['epoch']:.1f}", "an epoch, s": f"{found['epoch']:.1f}",
             "an epoch, µs a state": f"{found['epoch'] / found['states'] * 1e6:.0f}", "memory, MiB": f"{mib[0]:,.0f}", "disk, MiB": f"{disk:,.0f}"})
    table = pd.DataFrame(rows).set_index("states")
    draw_scale(table)
    slope = np.polyfit(np.log(table.index), np.log(table["an epoch"]), 1)[0]
    assert 0.8 < slope < 1.15, slope  # 1: linear


def draw_scale(table: pd.DataFrame) -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(10, 3), layout="constrained")
    for ax, columns, label in zip(axes, (["start", "an epoch"], ["memory"], ["disk"]), ("seconds", "memory, MiB", "disk, MiB"), strict=True):
        for column, colour in zip(columns, clvq.PALETTE, strict=False):
            ax.loglog(table.index, table[column], marker="o", color=colour, label=column)
        linear = table[columns[-1]].iloc[-1] * table.index / table.index[-1]
        ax.loglog(table.index, linear, color="grey", linestyle=":", label="linear")
        ax.set(xlabel="states", ylabel=label)
        ax.legend()
    FIGURE.parent.mkdir(exist_ok=True)
    with plt.rc_context({"svg.fonttype": "none"}):
        figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


LIMITED = """
import json, resource, sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads({threads})
from pathlib import Path
from test_scale import epoch
resource.setrlimit(resource.RLIMIT_DATA, ({limit}, {limit}))
print("@@" + json.dumps(epoch(Path({folder!r}))))
"""


def in_its_own_process(folder: Path, limit: int) -> dict[str, float]:
    """`epoch` where the process may have so many bytes of memory of its own."""
    code = LIMITED.format(paths=[str(Path(__file__).parent), str(Path(clvq.__file__).parent)], threads=THREADS, limit=limit, folder=str(folder))
    environment = {**os.environ, "ARROW_DEFAULT_MEMORY_POOL": "system"}  # its own reserves 1 GiB, which would count
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(re.search("@@(.*)", done.stdout)[1])


def test_states_that_are_more_than_memory_are_trained_on_as_fast(note, made):
    folder = made[170_000]
    store = sum(path.stat().st_size for path in folder.glob("*.npy"))
    limit = int(0.8 * store)
    rows = {"none": EPOCHS.get(folder) or epoch(folder), f"{limit / 2**30:.1f} GiB": in_its_own_process(folder, limit)}
    for name, found in rows.items():
        note("More than memory", limit=name, **{"states on disk, GiB": f"{store / 2**30:.1f}", "an epoch, s": f"{found['epoch']:.0f}",
             "states a second": f"{found['states'] / found['epoch']:,.0f}", "variance explained": f"{found['explained']:.4f}"})
    free, bound = rows.values()
    assert abs(free["explained"] - bound["explained"]) < 1e-3


def test_precision_changes_no_result_beyond_the_seed(note):
    found = {}
    for precision in ("float32", "bfloat16"):
        for seed in (1, 2, 3):
            pipeline = clvq.Pipeline(clvq.configure("smoke", precision=precision, seed=seed, epochs=4))
            history = clvq.train(pipeline.activations("train"), pipeline.config, pipeline.layers)[1]
            found[precision, seed] = history.iloc[-1]
    for measure in ("validation_variance_explained", "validation_perplexity"):
        values = {precision: [float(found[precision, seed][measure]) for seed in (1, 2, 3)] for precision in ("float32", "bfloat16")}
        means = {precision: statistics.mean(v) for precision, v in values.items()}
        spread = statistics.stdev(values["float32"])
        note("Precision", measure=measure.replace("validation_", "").replace("_", " "), **{"float32, mean of 3 seeds": f"{means['float32']:.4f}", "bfloat16": f"{means['bfloat16']:.4f}",
             "apart": f"{abs(means['float32'] - means['bfloat16']):.4f}", "standard deviation over seeds": f"{spread:.4f}"})
        assert abs(means["float32"] - means["bfloat16"]) < 2 * spread


@pytest.mark.parametrize(("what", "command", "goal"), [
    ("import clvq_core", [sys.executable, "-c", "import clvq_core"], 1),
    ("import torch, for comparison", [sys.executable, "-c", "import torch"], None),
    ("clvq explain, warm", [sys.executable, "-m", "clvq_core", "explain", "a gripping, moving film", "--scale", "smoke"], 5),
    ("import of torch and a model of transformers, for comparison", [sys.executable, "-c", "import torch, transformers.models.bert.modeling_bert"], None),
])
def test_from_the_command_line(note, what, command, goal):
    times = []
    environment = {**os.environ, "OMP_NUM_THREADS": str(THREADS)}
    for _ in range(2):
        began = time.perf_counter()
        subprocess.run(command, check=True, capture_output=True, env=environment)
        times.append(time.perf_counter() - began)
    note("From the command line", what=what, **{"seconds": f"{times[1]:.2f}", "goal": f"< {goal}" if goal else "–"})


def test_another_text_in_the_same_process(note):
    pipeline = clvq.Pipeline(clvq.configure("smoke")).check()
    pipeline.explain("a gripping, moving film")
    began = time.perf_counter()
    pipeline.explain("a dull, overlong film")
    note("From the command line", what="Pipeline.explain, another text in the same process", seconds=f"{time.perf_counter() - began:.2f}", goal="–")


