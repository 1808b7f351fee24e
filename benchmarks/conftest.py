"""Runs steps beside what people would use instead, and writes what came out as a page of the book: ``make bench``."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest
import torch

import clvq_core as clvq

PAGE = Path(__file__).resolve().parents[1] / "book" / "benchmarks.md"
PEERS = ["torch", "transformers", "vector-quantize-pytorch", "scikit-learn", "faiss-cpu", "captum", "sae-lens"]
THREADS = int(os.environ.get("BENCH_THREADS", "2"))
DEVICES = ["cpu", *["cuda"] * torch.cuda.is_available()]
WHERE = {"cpu": "", "cuda": ", on the GPU"}
TABLES: dict[str, list[dict]] = {}
torch.set_num_threads(THREADS)


@dataclass
class Measured:
    seconds: float
    """Median over the rounds."""
    mib: float
    """How far the memory of the process rose while it ran."""
    result: Any


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """How many MiB the memory of the process, and of its GPU, rises above what it needs now, the former looked at 200 times a second; in a
    list, once it is left."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        on_gpu = torch.cuda.memory_allocated()
    if platform.system() == "Linux":
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as there already
    process, found, done = psutil.Process(), [], threading.Event()

    def own() -> int:
        memory = process.memory_info()
        return memory.rss - getattr(memory, "shared", 0)  # what is mapped from disk is not the process's own

    before = peak = own()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, own())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield found
    finally:
        done.set()
        watcher.join()
        found.append((peak - before + (torch.cuda.max_memory_allocated() - on_gpu if torch.cuda.is_available() else 0)) / 2**20)


def to_the_end(function: Callable[[], Any]) -> Callable[[], Any]:
    """The function, which waits for a GPU to have done what it was told."""

    def run() -> Any:
        result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


def timed(function: Callable[[], Any], rounds: int, warm_up: int) -> Measured:
    times, function = [], to_the_end(function)
    with peak_memory() as mib:
        for _ in range(warm_up + rounds):
            began = time.perf_counter()
            result = function()
            times.append(time.perf_counter() - began)
    return Measured(statistics.median(times[warm_up:]), mib[0], result)


@pytest.fixture
def beside(benchmark):
    """``beside(step, peer, ours, theirs, goal, same)``: run both, make sure by ``same`` that they came to the same, note the ratio.

    ``same(our_result, their_result)`` fails, or says in words how equal they are. The first ``warm_up`` runs do not count.
    """

    def compare(step: str, peer: str, ours: Callable[[], Any], theirs: Callable[[], Any], goal: float | None, same: Callable[[Any, Any], str],
                rounds: int = 3, warm_up: int = 1, peer_rounds: int | None = None, peer_warm_up: int | None = None) -> Measured:
        with peak_memory() as mib:
            result = benchmark.pedantic(to_the_end(ours), rounds=rounds, warmup_rounds=warm_up)
        mine = Measured(benchmark.stats.stats.median, mib[0], result)
        other = timed(theirs, peer_rounds or rounds, warm_up if peer_warm_up is None else peer_warm_up)
        row = {"times as fast": f"{other.seconds / mine.seconds:.3g}", "goal": f"{goal:g}" if goal else "–", "step": step, "beside": peer,
               "here, s": f"{mine.seconds:.3g}", "there, s": f"{other.seconds:.3g}", "the same": same(mine.result, other.result),
               "memory here, MiB": f"{mine.mib:,.0f}", "memory there, MiB": f"{other.mib:,.0f}"}
        benchmark.extra_info.update(row)
        TABLES.setdefault("Beside others", []).append(row)
        print("\n" + ", ".join(f"{k}: {v}" for k, v in row.items()))
        return mine

    return compare


@pytest.fixture
def note():
    """``note(heading, **columns)``: a row of another table of the page."""

    def add(heading: str, **columns: str) -> None:
        TABLES.setdefault(heading, []).append(columns)
        print(f"\n{heading}: " + ", ".join(f"{k}: {v}" for k, v in columns.items()))

    return add


def machine() -> str:
    """What this ran on, in words."""
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")] \
        if Path("/proc/cpuinfo").exists() else []
    memory = psutil.virtual_memory().total / 2**30
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU was at hand, so nothing here was measured on one"
    return f"{names[0] if names else platform.processor()}, {THREADS} threads, {memory:.0f} GiB of memory; {gpu}"


RATES: dict[str, float] = {}
"""FLOP a second of training and of reading a language model, and how much of the machine's limit the former is."""


def plan(tokens: float = 1e8) -> list[dict]:
    """What 100 million tokens would take, from what was measured: the rates of reading and of training, and the sizes of models."""
    rows = []
    for name, read, width, codes, layers in (("all-MiniLM-L6", 10.6e6, 384, 400, 2), ("RoBERTa-base", 85e6, 768, 400, 6),
                                             ("LLaMA-2-7b", 6.5e9, 4096, 16384, 6)):
        weights = 2 * width**2 + layers * (8 * width**2 + 2 * width * 2048)
        reading, training = tokens * 2 * read, tokens * (6 * weights + 2 * codes * width)
        gpus = 8 * 4e14 * RATES["share"] * 60
        figures = {"reading the model, PFLOP": reading / 1e15, "an epoch, PFLOP": training / 1e15, "here: reading, days": reading / RATES["reading"] / 86400,
                   "an epoch, days": training / RATES["training"] / 86400, "8 accelerators: reading, min": reading / gpus,
                   "an epoch, min": training / gpus, "an epoch's states at 2 GB/s, min": tokens * width * 4 / 2e9 / 60}
        rows.append({"model": name, "width": f"{width:,}", "codes": f"{codes:,}", "decoder layers": str(layers),
                     "two layers on disk, GB": f"{tokens * width * 4 / 1e9:,.0f}",
                     **{name: f"{figure:,.0f}" if figure >= 10 else f"{figure:.2g}" for name, figure in figures.items()}})
    return rows


NOTES = {
    "Beside others": "Both in one run, on the same data, after warming up; seconds are the median of the repeats, of which long steps have one; memory is how far that of "
                     "the process rose, with its GPU's if it runs there. “the same” says what was compared before the times were, and how equal it was.",
    "A training step": "At the shape of the paper's ERASER data. The limit is what a product of two bfloat16 matrices of the decoder's "
                       "shapes reaches on the same machine in the same minute. Epochs are calculated from the step.",
    "Cost by size": "States of width 384, made for this, in sentences like the paper's; the settings of laptop scale, but for 64 codes and a decoder of one small layer, so that reading counts; one epoch. Memory is the process's own, without what is mapped from disk.",
    "More than memory": "A process that may not have more memory of its own than the limit trains on states that are more; they are "
                        "mapped from disk. The first row's process also runs the other benchmarks, the second's nothing else.",
    "Many codes": "One step of the quantiser on 4,096 states of LLaMA-2-7b's width.",
    "Precision": "The same training in bfloat16 and in float32, over seeds.",
    "A plan for 100 million tokens": "Calculated, not measured: the rates of extraction and of the training step above, and for accelerators of "
                                     "400 TFLOP/s each the step's share of their limit. States of two layers lie on disk in half precision and are "
                                     "read once an epoch, in stretches of sentences (`read_together`).",
    "From the command line": "Each in a process of its own, the last but for its first text.",
}


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Write the page, if all of it was measured."""
    if {"training", "reading"} <= set(RATES):
        TABLES["A plan for 100 million tokens"] = plan()
    if exitstatus or session.config.option.keyword or session.config.option.collectonly or not set(NOTES) <= set(TABLES):
        return
    versions = ", ".join(f"{name} {version(name)}" for name in PEERS)
    lines = ["# Benchmarks", "", f"Written by `make bench` on {date.today()}: {machine()}. Commit {clvq.environment()['commit']}; {versions}.", ""]
    for heading, said in NOTES.items():
        table = pd.DataFrame(TABLES[heading]).to_markdown(index=False, disable_numparse=True)
        lines += [f"## {heading}", "", said, "", table, ""]
        lines += ["```{image} static/scale.svg\n:alt: Seconds, memory and disk by number of states, on logarithmic axes\n```", ""] * (heading == "Cost by size")
    PAGE.write_text("\n".join(lines), "utf8")
    print(f"\nwritten: {PAGE}")
