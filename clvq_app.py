"""What stands around clvq_core: the command ``clvq``, the rating page, and pages to look at results in.

The core never imports this file. This file imports the core, PyTorch and everything else that takes time only where
it is needed, so that ``clvq --help`` answers at once and the process of a rater stays small.

    1 command line      2 notebooks and sweeps      3 rating page      4 card, report and explorer
"""
from __future__ import annotations

import base64
import contextlib
import hashlib
import html
import importlib.util
import io
import itertools
import json
import math
import os
import re
import secrets
import shutil
import sqlite3
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer
from typer import Argument, Option
from typer.core import TyperGroup

if TYPE_CHECKING:
    import pandas as pd

    from clvq_core import Comparison, Explanation, Pipeline

# ======================================================================================================================
# 1 Command line
# ======================================================================================================================
Scale = Literal["smoke", "laptop", "paper", "authors"]
"""The names of `clvq_core.PRESETS`, listed here so that help need not import the core."""
Pairs = Annotated[list[str] | None, Option("-p", metavar="NAME VALUE", help="Set a parameter (repeatable).")]
PAIRED = ("-p", "--where", "--resource")
"""Options that take two words, a name and a value."""


def join_pairs(words: Iterable[str]) -> list[str]:
    """The command line with each name and value as one word, NAME=VALUE, since typer's lists take one word each."""
    rest, joined = iter(words), []
    for word in rest:
        joined.append(word)
        if word in PAIRED and (pair := list(itertools.islice(rest, 2))):
            joined.append("=".join(pair))
    return joined


def read_pairs(pairs: Sequence[str] | None, texts: Iterable[str] = ()) -> dict[str, Any]:
    """Names with their values, which are read as numbers, true, false or none where they look like one, except
    ``texts``."""
    if bare := [pair for pair in pairs or () if "=" not in pair]:
        raise ValueError(f"{bare[0]!r} has no value: {', '.join(PAIRED)} take a name and a value, such as -p seed 1")
    from clvq_core import parse_value

    return {name: value if name in texts else parse_value(name, value)
            for name, _, value in (pair.partition("=") for pair in pairs or ())}


class Commands(TyperGroup):
    """The commands, each of which ends with an exit code and, if it fails, one sentence on stderr."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; turn an exception into its sentence, after the traceback with ``--debug``."""
        try:
            return super().invoke(ctx)
        except Exception as error:
            if type(error).__module__.startswith(("click", "typer")):           # help, or a wrong option
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            words, code = verdict(error)
            print(f"clvq: {words}", file=sys.stderr)
            raise typer.Exit(code) from error


def verdict(error: Exception) -> tuple[str, int]:
    """The sentence that tells the user what went wrong, and the exit code.

    Our own words and the system's stand as they are. For anything else, the sentence says which library failed.
    """
    words = next(iter(str(error).splitlines()), type(error).__name__)
    parts = Path(traceback.extract_tb(error.__traceback__)[-1].filename).parts
    raised_in = parts[parts.index("site-packages") + 1] if "site-packages" in parts else parts[-1]
    if raised_in in ("clvq_app.py", "clvq_core.py") and isinstance(error, ValueError | RuntimeError | ArithmeticError):
        return words, 2 if isinstance(error, ValueError) else 1
    if isinstance(error, OSError):
        return words, 1
    hint = "(clvq --debug COMMAND … shows the traceback)"
    return f"unexpected {type(error).__name__} in {raised_in}: {words} {hint}", 1


app = typer.Typer(cls=Commands, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False,
                  no_args_is_help=True, context_settings={"help_option_names": ["-h", "--help"]})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command ``clvq``. Exit code 0 done, 1 a run failed, 2 the request cannot be served."""
    try:
        app(join_pairs(sys.argv[1:] if arguments is None else arguments), prog_name="clvq")
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def show_version(wanted: bool) -> None:
    """Print the version and stop."""
    if wanted:
        from clvq_core import __version__

        print(__version__)
        raise typer.Exit()


@app.callback()
def common(
    debug: Annotated[bool, Option("--debug", envvar="CLVQ_DEBUG", help="Show the traceback of an error.")] = False,
    version: Annotated[bool, Option(callback=show_version, is_eager=True, help="Show the version.")] = False,
) -> None:
    """Discrete concepts between two layers of a language model."""


@app.command()
def run(
    notebooks: list[Path],
    scale: Annotated[Scale | None, Option(help="Size of everything (default: $CLVQ_SCALE, else smoke).")] = None,
    parameters: Pairs = None,
    output: Annotated[Path, Option("-o", "--output", help="Folder, or one notebook's .ipynb file.")] = Path("runs"),
    timeout: Annotated[int, Option(help="Seconds that a cell may take.")] = 7200,
) -> None:
    """Run notebooks with papermill, after checking their parameters.

    \b
    examples:
      clvq run notebooks/02_faithfulness.ipynb --scale smoke -p dataset news
      clvq run notebooks/*.ipynb --scale laptop --output runs/seed1 -p seed 1
      clvq run notebooks/01_method.ipynb -p dataset reviews.csv -p text_column body -p label_column stars
    """
    read_pairs(parameters)                                                      # before any file is looked at
    texts = {name for path in notebooks for name, kind in parameters_of(path).items() if kind == "str"}
    values = read_pairs(parameters, texts)
    if len(notebooks) > 1 and output.suffix == ".ipynb":
        raise ValueError("--output must be a folder when several notebooks are run")
    for path in notebooks:                                                      # all of them before the first long run
        check_parameters(path, scale, values)
    for path in notebooks:
        target, began = output if output.suffix == ".ipynb" else output / path.name, time.perf_counter()
        run_notebook(path, target, scale, values, timeout)
        print(f"{path} -> {target} ({time.perf_counter() - began:.0f} s)")


@app.command()
def sweep(
    grid: Annotated[Path, Argument(metavar="GRID.yaml")],
    dry_run: Annotated[bool, Option("--dry-run", help="Print the runs, their cost, and which are done.")] = False,
    output: Annotated[Path | None, Option("-o", "--output", help="Folder (default: sweeps/NAME of the file).")] = None,
    workers: Annotated[int | None, Option(help="Processes (default: one per core); 0 for none but this one.")] = None,
    scheduler: Annotated[str, Option(metavar="ADDRESS", help="A dask scheduler to use instead of --workers.")] = "",
    threads: Annotated[int | None, Option(help="Threads of each run (default: its share, or the worker's).")] = None,
    resources: Annotated[list[str] | None, Option("--resource", metavar="NAME AMOUNT",
                                                  help="What a run needs from a worker, such as GPU 1.")] = None,
    retries: Annotated[int, Option(help="How often a failed run is tried again at once.")] = 1,
) -> None:
    """Train, or run a notebook, with many settings.

    Does all runs of a YAML file that are not done yet, and those that failed once more.

    \b
    a file:
      scale: laptop
      settings: {dataset: movies, epochs: 5}      # of all runs
      grid: {temperature: [0.5, 1, 2], seed: [42, 43, 44]}
      runs: [{start: spherical}, {start: random}] # each with the whole grid; optional
      # notebook: notebooks/02_faithfulness.ipynb   instead of trainings

    \b
    examples:
      clvq sweep grid.yaml --dry-run
      clvq sweep grid.yaml --workers 4
      clvq sweep grid.yaml --scheduler tcp://host:8786 --resource GPU 1
    """
    import clvq_core as core

    runs = {run.name: run for run in read_sweep(grid)}
    folder = output or Path("sweeps") / grid.stem
    if dry_run:
        return print_plan(runs, folder, core.default_workers() if workers is None else workers)
    amounts = read_pairs(resources)
    if wrong := [amount for amount in amounts.values() if not isinstance(amount, int | float)]:
        raise ValueError(f"--resource takes a name and an amount, such as GPU 1, not {wrong[0]!r}")
    print_results(core.run_sweep(list(runs.values()), folder, workers, scheduler, threads, amounts, retries))
    print(f"all {len(runs)} runs: {folder / 'results.parquet'}")


def print_plan(runs: dict[str, Any], folder: Path, workers: int) -> None:
    """A row for each run of a sweep, with its state and what it costs, and the time that is left."""
    import pandas as pd

    seconds, rows = seconds_per_gflop(runs, folder), []
    for name, run in runs.items():
        failed = (folder / f"{name}.error.txt").exists()
        state = "done" if (folder / f"{name}.parquet").exists() else "failed" if failed else "to do"
        expected = run.cost.get("gflop", math.nan) * seconds
        rows.append({"run": name, **run.settings, "state": state, **run.cost, "seconds": expected})
    table, at_once = pd.DataFrame(rows), max(1, workers)
    left = table[table["state"] != "done"]
    print(table.to_string(index=False, float_format="{:.4g}".format, na_rep="-"))
    print(f"{len(table)} runs, {len(table) - len(left)} of them done; training the others takes about "
          f"{left['seconds'].sum() / at_once / 60:,.1f} min with {at_once} at a time, plus states and fine-tuning")


def seconds_per_gflop(runs: dict[str, Any], folder: Path) -> float:
    """How long a training takes for its arithmetic: as in the finished runs; without any, by `training_speed`."""
    import pandas as pd

    import clvq_core as core

    if (folder / "sweep.json").exists() and len(results := core.sweep_results(folder)):
        taken = results[results["metric"] == "training_seconds"].set_index("run")["value"]
        cost = {name: run.cost.get("gflop", math.nan) for name, run in runs.items() if name in taken}
        return float((taken / pd.Series(cost)).median())
    return 1e9 / core.training_speed()


MAIN_METRICS = ("variance_explained", "perplexity", "codes_used", "effective_k", "accuracy nothing",
                "accuracy concept projection", "accuracy random code projection")


def print_results(results: pd.DataFrame, metrics: Sequence[str] = ()) -> None:
    """A row for each combination of what the runs vary, except the seed: the mean of each metric over seeds."""
    from clvq_core import seed_means

    fixed = {"run", "metric", "epoch", "value", "seed"}
    varied = [str(name) for name in results if name not in fixed and results[name].astype(str).nunique() > 1]
    measured = list(dict.fromkeys(results["metric"]))
    if unknown := [name for name in metrics if name not in measured]:
        raise ValueError(f"there is no metric {unknown[0]!r}; there are {', '.join(measured)}")
    chosen = list(metrics) or [name for name in MAIN_METRICS if name in measured] or measured
    table = seed_means(results, varied or ["scale"], chosen)
    means = table[[name for name in table if not str(name).endswith(("_low", "_high"))]]
    print(means.to_string(index=False, float_format="{:,.4g}".format))


@app.command("results")
def show_results(
    sweep: Annotated[Path, Argument(help="The sweep's folder.")],
    where: Annotated[list[str] | None, Option(metavar="NAME VALUE", help="Only runs with this setting.")] = None,
    metric: Annotated[list[str] | None, Option(help="Show this metric (repeatable).")] = None,
    csv: Annotated[Path | None, Option(help="Write all measurements to this file instead.")] = None,
) -> None:
    """Print, filter or export the results of a sweep.

    \b
    examples:
      clvq results sweeps/grid
      clvq results sweeps/grid --where temperature 0.5 --metric perplexity --metric "accuracy concept projection"
      clvq results sweeps/grid --csv all.csv
    """
    from clvq_core import sweep_results, write_whole

    if not (sweep / "sweep.json").exists():
        raise ValueError(f"{sweep} is no folder of a sweep: name the one that 'clvq sweep' wrote, such as sweeps/grid")
    results = sweep_results(sweep)
    if results.empty:
        raise ValueError(f"no run of {sweep} is finished")
    for name, value in read_pairs(where).items():
        if name not in results:
            raise ValueError(f"the results have no column {name!r}; they have {', '.join(map(str, results))}")
        results = results[results[name].isna() if value is None else results[name] == value]
    if results.empty:
        raise ValueError("no result has these values")
    if csv is None:
        return print_results(results, metric or ())
    csv.parent.mkdir(parents=True, exist_ok=True)
    write_whole(csv, lambda partial: results.to_csv(partial, index=False))
    print(f"{len(results):,} measurements of {results['run'].nunique()} runs: {csv}")


@app.command()
def explain(
    text: Annotated[str, Argument(help="The text, in quotes.")],
    model: Annotated[str | None, Option(help="minilm, smollm2, a folder, or an id on the Hub.")] = None,
    data: Annotated[str | None, Option(help="What it was, or will be, trained on: movies, news, a file, …")] = None,
    scale: Annotated[Scale, Option(help="Size of everything.")] = "laptop",
    top: Annotated[int, Option(help="How many concepts.")] = 5,
    pair: Annotated[str | None, Option(metavar="TEXT", help="The second text, where the data has two.")] = None,
    versus: Annotated[str | None, Option(metavar="TEXT", help="Another text to compare it with.")] = None,
    steer: Annotated[int | None, Option(metavar="CONCEPT", help="Push this concept into the text by doses.")] = None,
    page: Annotated[Path | None, Option("--html", metavar="FILE", help="Also write a page.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON instead.")] = False,
    parameters: Pairs = None,
) -> None:
    """Show the concepts behind a model's answer to a text.

    Prints the text's class, the words that decided it, their concepts, and what changes without them. The first call
    trains what it needs; later ones take seconds. With --versus: which words of two texts have other concepts, and what
    the answer does when one concept alone is exchanged. With --steer: what the answer does over the dose of a concept.

    \b
    examples:
      clvq explain "a dull, overlong film"
      clvq explain "a dull, overlong film" --scale smoke --html card.html
      clvq explain "Shares fell" --model path/to/model -p finetune false --data news.csv -p label_column section
      clvq explain "a dull, overlong film" --versus "a moving film" --json
      clvq explain "a dull, overlong film" --steer 17
      clvq explain "a dull, overlong film" -p codebook predictive
      clvq explain "A man sleeps." --pair "He wakes." --data pairs.csv -p text_column premise -p pair_column claim
    """
    from clvq_core import PAIR, Pipeline, configure

    settings = {**read_pairs(parameters), **({"model": model} if model else {}), **({"dataset": data} if data else {})}
    if (pair is None) == bool(settings.get("pair_column")):
        raise ValueError("--pair gives the second text where pair_column names that of the data: one needs the other")
    if pair is not None:
        text, versus = f"{text}{PAIR}{pair}", versus and f"{versus}{PAIR}{pair}"
    pipeline = Pipeline(configure(scale, **settings)).check()
    found: Any = pipeline.explain(text, top) if versus is None else pipeline.compare(text, versus)
    doses = None if steer is None else pipeline.steer(text, steer)
    if as_json:
        print(json.dumps(as_record(pipeline, scale, found, doses), ensure_ascii=False, indent=1))
    else:
        print(found)
        if steer is not None and doses is not None:
            print(f"\nDoses of {pipeline.concept_names[steer]} (1: as far as the concept lies from the mean):")
            print(doses.to_string(index=False, float_format="{:.3f}".format))
    if page:
        write_card(found, page, provenance_html(pipeline, scale))
        print(f"\ncard: {page}", file=sys.stderr if as_json else None)


def as_record(pipeline: Pipeline, scale: str, found: Any, doses: pd.DataFrame | None) -> dict[str, Any]:
    """What `explain` found as JSON holds it: text, chances, words, random_change, examples, and where asked for other
    (the same of the other text), exchanges and doses; then names (of concepts) and provenance."""
    from clvq_core import Comparison

    compared = isinstance(found, Comparison)
    record = (found.text if compared else found).to_dict()
    if compared:
        record |= {"other": found.other.to_dict(), "exchanges": json.loads(found.exchanges.to_json(orient="records"))}
    if doses is not None:
        record["doses"] = json.loads(doses.to_json(orient="records"))
    parts = [record, *([record["other"]] if compared else [])]
    used = sorted({word["concept"] for part in parts for word in part["words"]})
    names = {str(concept): pipeline.concept_names[concept] for concept in used}
    return {**record, "names": names, "provenance": facts_of(pipeline, scale)}


def facts_of(pipeline: Pipeline, scale: str = "") -> dict[str, Any]:
    """Where results come from: scale, model, data, layers, seeds, versions, date, and limits."""
    from clvq_core import environment, hash_text

    config, corpus = pipeline.config, pipeline.corpus
    return {
        "scale": scale or "as configured", "model": config.model, "model_hash": hash_text(pipeline.base_model[0])[:12],
        "fine_tuned": config.finetune, "accuracy": round(pipeline.accuracy, 4), "data": config.dataset,
        "data_hash": corpus.attrs["hash"][:12], "classes": pipeline.label_names,
        "training_texts": len(pipeline.train), "evaluation_texts": len(pipeline.test),
        "rows_dropped": corpus.attrs["dropped"], "notes": corpus.attrs["notes"],
        "layers": list(pipeline.layers), "codes": config.n_codes, "seed": config.seed, "data_seed": config.data_seed,
        **environment(),
        "limits": "Concepts are those of one training; other seeds give others. Removal and exchange are interventions "
                  "on states and say nothing of what people would call a reason."}


def provenance_html(pipeline: Pipeline, scale: str = "") -> str:
    """`facts_of` as a table at the end of a page."""
    return render("<h2>Where this comes from</h2><table>{% for name, value in facts.items() %}"
                  "<tr><th>{{ name | replace('_', ' ') }}</th><td>{{ value }}</td></tr>{% endfor %}</table>",
                  facts={name: ", ".join(map(str, value)) if isinstance(value, list) else value
                         for name, value in facts_of(pipeline, scale).items()})


class Finding(NamedTuple):
    """What `clvq doctor` says of one thing."""

    mark: str
    """``ok``, ``note`` or ``PROBLEM``."""
    about: str
    text: str


def examine(pipeline: Pipeline) -> Iterator[Finding]:
    """What will work and what will not, one thing after another, in seconds; nothing long is computed."""
    import torch

    import clvq_core as core

    config, speed = pipeline.config, core.training_speed()

    def look(about: str, find: Callable[[], str]) -> Iterator[Finding]:
        """What is found, or the sentence of the error."""
        try:
            yield Finding("ok", about, find())
        except Exception as error:
            yield Finding("PROBLEM", about, verdict(error)[0])

    def data() -> str:
        sizes, names = corpus["split"].value_counts(), corpus.attrs["label_names"]
        counts = ", ".join(f"{corpus['label'].eq(i).sum():,} of {name}" for i, name in enumerate(names))
        return f"{sizes['train']:,} texts to train on, {sizes['test']:,} to evaluate; {counts}"

    def model() -> str:
        sizes = pipeline.sizes
        return f"{pipeline.model_config.model_type}, {sizes.num_hidden_layers} layers of width {sizes.hidden_size}"

    def classes() -> str:
        head = pipeline.model_config.id2label if core.has_head(pipeline.model_config) else {}
        if pipeline.prompt:
            return f"asked by a prompt, answers {', '.join(pipeline.prompt[1])} for {', '.join(pipeline.label_names)}"
        if config.finetune:
            own = f"; its own head knows {', '.join(map(str, head.values()))} (finetune false uses it)" if head else ""
            return f"a new head for {', '.join(pipeline.label_names)} will be trained{own}"
        return f"its own head's {', '.join(map(str, head.values()))} stand for {', '.join(pipeline.label_names)}"

    def door() -> str:
        pipeline.folder("door", *pipeline.layers)
        return (f"alone and together, cut and put back at layers {pipeline.layers[0]} and {pipeline.layers[1]}, texts "
                "get the model's own answers")

    def reads() -> str:
        lost, longest = core.align_words(lm, encoded).attrs["lost"], int(encoded.offsets.diff().max())
        share = lost / max(1, sum(map(len, encoded.words)))
        return (f"of {len(sample):,} texts, the longest has {longest} sub-words of {min(lm.limit, config.max_tokens)}; "
                f"{share:.1%} of words are cut or dropped by the tokenizer")

    def cost() -> str:
        tokens = len(encoded.ids) / len(sample)
        per_text = 2 * lm.block_weights * tokens / speed / 60
        n_train, n_test = len(pipeline.train), len(pipeline.test)
        minutes = {"fine-tuning": 3 * n_train * config.finetune_epochs * per_text * config.finetune,
                   "states": (n_train + n_test) * per_text, "salience": 3 * n_test * config.salience_steps * per_text,
                   "training": pipeline.cost["gflop"] * 1e9 / speed / 60}
        parts = ", ".join(f"{name} {time:.1f}" for name, time in minutes.items() if time)
        return (f"about {sum(minutes.values()):.1f} minutes on this machine ({parts}), at least "
                f"{pipeline.cost['memory_mib'] + 4 * lm.block_weights / 2**20:,.0f} MiB of memory, "
                f"{pipeline.cost['disk_mib']:,.0f} MiB on disk")

    yield (read := next(look("data", lambda: str(core.load_corpus(config.subset(core.CorpusSettings)).attrs["name"]))))
    if read.mark == "ok":
        corpus = core.load_corpus(config.subset(core.CorpusSettings))
        yield from look("rows", data)
        dropped = [f"{count:,} rows dropped as {reason}" for reason, count in corpus.attrs["dropped"].items() if count]
        for note in dict.fromkeys([*corpus.attrs["notes"], *dropped]):
            yield Finding("note", "rows", note)
    yield (known := next(look("model", model)))
    if read.mark != "ok" or known.mark != "ok":
        return
    yield from look("layers", lambda: "{} to {}".format(*pipeline.layers))
    yield (matched := next(look("classes", classes)))
    if matched.mark != "ok":
        return
    yield (tried := next(look("door", door)))
    if tried.mark == "ok":
        lm, sample = pipeline.load_classifier(config.finetune), pipeline.train["text"].head(500).tolist()
        encoded = core.encode(lm, sample, config)
        size = sum(map(torch.Tensor.numel, lm.model.parameters()))
        where = {"first": "the first position", "last": "the last position", "mean": "the mean of all positions"}
        yield Finding("ok", "summary", f"its head reads {where[lm.summary]}; {size / 1e6:,.1f} million weights")
        yield from look("words", reads)
        yield from look("cost", cost)
        yield from look("sizes", lambda: f"{config.n_codes} codes, {config.folds} folds" if pipeline.check() else "")


@app.command()
def doctor(
    model: Annotated[str, Argument(help="minilm, smollm2, a folder, or an id on the Hub.")],
    data: Annotated[str, Argument(help="movies, news, a file, …")] = "movies",
    scale: Annotated[Scale, Option(help="Size of everything.")] = "laptop",
    as_json: Annotated[bool, Option("--json", help="Print JSON instead.")] = False,
    parameters: Pairs = None,
) -> None:
    """Say in seconds what will work with a model and data, and what will not.

    A line for each thing: ok, note (what was guessed or dropped) or PROBLEM (what to change). Exit code 0 if all will
    work, 2 if not.

    \b
    examples:
      clvq doctor minilm movies
      clvq doctor path/to/model reviews.csv -p finetune false -p text_column body -p label_column stars
    """
    from clvq_core import Pipeline, configure

    findings = []
    with contextlib.redirect_stderr(io.StringIO()):
        pipeline = Pipeline(configure(scale, **{**read_pairs(parameters), "model": model, "dataset": data}))
        for finding in examine(pipeline):
            findings.append(finding)
            if not as_json:
                print(f"{finding.mark:8} {finding.about:8} {finding.text}", flush=True)
    if as_json:
        print(json.dumps([finding._asdict() for finding in findings], ensure_ascii=False, indent=1))
    if any(finding.mark == "PROBLEM" for finding in findings):
        raise typer.Exit(2)


@app.command("report")
def show_report(
    output: Annotated[Path, Argument(help="File to write: .html, .parquet or .csv.")],
    model: Annotated[str | None, Option(help="minilm, smollm2, a folder, or an id on the Hub.")] = None,
    data: Annotated[str | None, Option(help="What it was, or will be, trained on: movies, news, a file, …")] = None,
    scale: Annotated[Scale, Option(help="Size of everything.")] = "laptop",
    parameters: Pairs = None,
) -> None:
    """Write all concepts that a model uses on its evaluation texts, those first that its answers rely on most.

    The columns of the Parquet and CSV files are described on the book's page "Results as files".

    \b
    examples:
      clvq report report.html --model path/to/model -p finetune false --data reviews.csv
      clvq report concepts.parquet --data news
    """
    from clvq_core import Pipeline, configure, write_whole

    if output.suffix not in (".html", ".parquet", ".csv"):
        raise ValueError(f"{str(output)!r} must end in .html, .parquet or .csv")
    settings = {**read_pairs(parameters), **({"model": model} if model else {}), **({"dataset": data} if data else {})}
    pipeline = Pipeline(configure(scale, **settings)).check()
    if output.suffix == ".html":
        write_report(pipeline, output)
    else:
        table = pipeline.report.assign(name=lambda rows: rows["concept"].map(pipeline.concept_names))
        output.parent.mkdir(parents=True, exist_ok=True)
        write = table.to_parquet if output.suffix == ".parquet" else table.to_csv
        write_whole(output, lambda partial: write(partial, index=False))
    print(f"{len(pipeline.report)} concepts: {output}")


@app.command()
def score(
    mine: Annotated[list[str] | None, Argument(metavar="[METHOD]...", help="Your concepts: a file of vectors, or "
                                               "module:function.")] = None,
    model: Annotated[str | None, Option(help="minilm, smollm2, a folder, or an id on the Hub.")] = None,
    data: Annotated[str | None, Option(help="What it was, or will be, trained on: movies, news, a file, …")] = None,
    scale: Annotated[Scale, Option(help="Size of everything.")] = "laptop",
    beside: Annotated[str, Option(help="Methods to compare with, between commas; all: every one, which takes longer.")]
    = "k-means,random states",
    asked: Annotated[int, Option(min=10, help="How many sentences the model itself is asked.")] = 200,
    output: Annotated[Path | None, Option(help="Also write all numbers: .parquet or .csv.")] = None,
    parameters: Pairs = None,
) -> None:
    """Score concept methods: how many of the model's own answers change without their concepts, beside random ones that
    take out as much, and what the paper's probe loses.

    Your own go in as a file of vectors of the source layer, a row per concept (.npy, .safetensors, .parquet or .csv; a
    state has the nearest one), or as a Python function that takes a clvq_core.Pipeline and gives a list of objects with
    the attributes of clvq_core.Concepts.

    \b
    examples:
      clvq score
      clvq score centroids.npy --data reviews.csv
      clvq score my_methods:build --beside all --output card.parquet
      clvq score --beside "k-means,Ward clusters" --scale smoke -p seeds 2
    """
    from clvq_core import Pipeline, configure, score_table, write_whole

    if output and output.suffix not in (".parquet", ".csv"):
        raise ValueError(f"{str(output)!r} must end in .parquet or .csv")
    settings = {**read_pairs(parameters), **({"model": model} if model else {}), **({"dataset": data} if data else {})}
    makers = [read_method(text) for text in mine or ()]
    pipeline = Pipeline(configure(scale, **settings)).check()
    only = [] if beside == "all" else [name.strip() for name in beside.split(",")]
    card = pipeline.scorecard(asked, lambda run: [method for make in makers for method in make(run)], only)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        write = card.to_parquet if output.suffix == ".parquet" else card.to_csv
        write_whole(output, lambda partial: write(partial, index=False))
    print(score_table(card).to_string(index=False))
    seeds, source, target = len(pipeline.over_seeds), *pipeline.layers
    print(f"\n{name_of(pipeline)}, layers {source} to {target}, {seeds} seed{'s' * (seeds > 1)}. In brackets: 95 % "
          "intervals. Answers changed: by the model itself, when the concept of the most salient word is taken out of "
          "every position, around the mean. What the numbers mean: the book's page \"Metrics\".")


def read_method(text: str) -> Callable[[Pipeline], Sequence[Any]]:
    """What makes concept methods of a pipeline: "module:function", or a file of vectors. ValueError for anything else,
    and when made, for vectors of another width than the model's."""
    import importlib

    path, (module, _, name) = Path(text), text.partition(":")
    if path.suffix in (".npy", ".safetensors", ".parquet", ".csv"):
        vectors = read_vectors(path)

        def make(pipeline: Pipeline) -> Sequence[Any]:
            from clvq_core import Concepts

            if vectors.shape[1] != (width := pipeline.sizes.hidden_size):
                raise ValueError(f"{path} has vectors of width {vectors.shape[1]}, and the model's states have {width}")
            states = pipeline.activations("train").states[pipeline.layers[0]]
            return [Concepts(path.stem, pipeline.layers[0], vectors, centre=states.float().mean(0))]

        return make
    if not (module.replace(".", "").isidentifier() and name.isidentifier()):
        raise ValueError(f"{text!r} is neither a file of vectors (.npy, .safetensors, .parquet, .csv) nor "
                         "module:function")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"there is no function {name!r} in a module {module!r} here: {error}") from None
    finally:
        sys.path.pop(0)


def read_vectors(path: Path) -> Any:
    """The vectors (K, D) of a file, in float32. ValueError if it holds something else."""
    import numpy as np
    import pandas as pd
    import torch
    from safetensors.torch import load_file

    from clvq_core import explain_failure

    with explain_failure(f"{path} holds no table of vectors, a row per concept", Exception):
        if path.suffix == ".npy":
            vectors = torch.from_numpy(np.load(path, allow_pickle=False))
        elif path.suffix == ".safetensors":
            tensors = load_file(path)
            vectors = tensors["vectors"] if "vectors" in tensors else next(iter(tensors.values()))
        else:
            frame = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, header=None)
            vectors = torch.from_numpy(frame.to_numpy(float))
        vectors = vectors.float()
    if vectors.ndim != 2 or len(vectors) < 2 or not vectors.isfinite().all():
        raise ValueError(f"{path} must hold at least two vectors of finite numbers, a row each, and has shape "
                         f"{tuple(vectors.shape)}")
    return vectors


@app.command()
def annotate(
    study: Annotated[Path, Argument(help="Folder of the study.")],
    methods: Annotated[list[str] | None, Option("--method", help="Repeatable: CLVQ-VAE, Ward clusters, …")] = None,
    sentences: Annotated[int, Option(help="How many sentences; the paper has 19.")] = 19,
    scale: Annotated[Scale, Option(help="Size of everything.")] = "laptop",
    make_only: Annotated[bool, Option("--make-only", help="Make the study but serve nothing.")] = False,
    port: Annotated[int, Option(help="Port of the page.")] = 8866,
    ip: Annotated[str, Option(help="Address to serve at; localhost is this machine alone.")] = "localhost",
    most_raters: Annotated[int, Option(min=1, help="How many raters the study takes.")] = 200,
    most_visitors: Annotated[int, Option(min=1, help="How many can have the page open at a time, 80 MiB each.")] = 20,
    parameters: Pairs = None,
) -> None:
    """Let people say what concepts mean.

    Serves a study's rating page. A study that does not exist yet is made first, of sentences that the model gets right
    and wrong in equal parts, with the concepts of two or more methods (default: CLVQ-VAE and Ward clusters).

    \b
    examples:
      clvq annotate study --scale laptop --sentences 19
      clvq annotate study --method CLVQ-VAE --method k-means -p dataset news --make-only
      clvq annotate study --ip 0.0.0.0 --port 8080
    """
    if not make_only:
        check_can_serve(port, ip)                                               # before the study's long work
    if not (study / "study.json").exists():
        from clvq_core import Pipeline, configure, make_study

        pipeline = Pipeline(configure(scale, **read_pairs(parameters))).check()
        make_study(pipeline, study, methods or ["CLVQ-VAE", "Ward clusters"], sentences, pipeline.config.seed)
    if not (study / "clouds" / "practice.png").exists():
        from clvq_core import draw_clouds

        draw_clouds(study)
    store = AnswerStore(study, most_raters)
    print(f"{study}: {len(store.items)} items, answers of {store.count_raters()} raters in answers.sqlite; "
          "key.parquet says what is what, so keep it from raters")
    if not make_only:
        print(f"raters go to http://{ip}:{port}/ ; Ctrl+C stops", flush=True)
        serve(study, port, ip, most_raters, most_visitors)


@app.command()
def info() -> None:
    """Show the cache, versions and device."""
    cache = cache_folder()
    steps, size = step_folders(cache), size_of(cache) / 2**20
    print(f"cache          {cache}: {len(steps)} steps, {size:,.0f} MiB", flush=True)
    from clvq_core import environment  # takes seconds, so it comes last

    for name, value in environment().items():
        print(f"{name:14} {value}")


@app.command()
def clean(
    older_than: Annotated[float, Option(metavar="DAYS", help="Only steps that were made this long ago.")] = 0,
    dry_run: Annotated[bool, Option("--dry-run", help="Say what would be removed.")] = False,
) -> None:
    """Remove cached steps.

    Only folders that bear the record which this project writes are removed, whatever else the cache's folder holds.

    \b
    examples:
      clvq clean --dry-run
      clvq clean --older-than 30
    """
    cache, newest = cache_folder(), time.time() - 86400 * older_than
    steps = [step for step in step_folders(cache) if step.stat().st_mtime <= newest and not is_being_made(step)]
    size = sum(map(size_of, steps))
    for step in [] if dry_run else steps:
        shutil.rmtree(step)
        lock_of(step).unlink(missing_ok=True)
    count = f"{len(steps)} cached step{'' if len(steps) == 1 else 's'}"
    print(f"{'would remove' if dry_run else 'removed'} {count}, {size / 2**20:,.0f} MiB, from {cache}")


def cache_folder() -> Path:
    """Where steps are kept: the same as `clvq_core.cache_folder`."""
    return Path(os.environ.get("CLVQ_CACHE") or Path.home() / ".cache" / "clvq").expanduser()


def step_folders(cache: Path) -> list[Path]:
    """The folders directly in the cache that bear a step's record (finished) or marker (not finished)."""
    folders = [path for path in (sorted(cache.iterdir()) if cache.is_dir() else []) if not path.is_symlink()]
    return [folder for folder in folders if (folder / ".clvq-step").is_file() or has_record(folder)]


def has_record(folder: Path) -> bool:
    """Whether a folder has the record that this project writes into a finished step."""
    try:
        record = json.loads((folder / "environment.json").read_text("utf8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and all(isinstance(record.get(name), str) for name in ("clvq", "step"))


def lock_of(step: Path) -> Path:
    """The file that is locked while the step is made."""
    return step.with_name(step.name.removesuffix(".partial") + ".lock")


def is_being_made(step: Path) -> bool:
    """Whether a process is making this step right now."""
    from filelock import FileLock, Timeout

    try:
        with FileLock(lock_of(step), timeout=0) if lock_of(step).exists() else contextlib.nullcontext():
            return False
    except Timeout:
        return True


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# ======================================================================================================================
# 2 Notebooks, and sweeps from a file
# ======================================================================================================================
def notebook_key(path: Path) -> str:
    """Hash of a notebook's code cells and of the steps' versions: what its outputs depend on, settings aside. A version
    counts once it was raised: a new step changes nothing for notebooks whose code stays as it was."""
    import clvq_core as core

    cells = [cell for cell in json.loads(path.read_text("utf8"))["cells"]
             if cell["cell_type"] == "code" and "injected-parameters" not in cell["metadata"].get("tags", [])]
    raised = {name: version for name, version in core.step_versions().items() if version > 1}
    return core.hash_text(["".join(cell["source"]) for cell in cells], raised)


def parameters_of(path: Path) -> dict[str, str]:
    """A notebook's parameters and their types, such as "str" or "None" where it says none. ValueError without one."""
    import papermill

    if path.suffix != ".ipynb" or not path.is_file():
        raise ValueError(f"there is no notebook {str(path)!r}")
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        content = json.loads(path.read_text("utf8"))
        content["metadata"] = content.get("metadata", {}) | PYTHON
        copy.write_text(json.dumps(content), "utf8")
        return {name: about["inferred_type_name"] for name, about in papermill.inspect_notebook(str(copy)).items()}


PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
"""The kernel that notebooks run with, whatever they name: this environment's."""


def check_parameters(path: Path, scale: str | None, parameters: Mapping[str, Any]) -> None:
    """ValueError in one sentence if a notebook cannot run like this: parameter, value, data, model or layer that does
    not exist."""
    import clvq_core as core

    known = parameters_of(path)
    if unknown := [name for name in parameters if name not in known]:
        raise ValueError(f"notebook {path.name} has no parameter {unknown[0]!r}; it has {', '.join(known)}")
    settings = {name: value for name, value in parameters.items() if name in core.Config.model_fields}
    scale = parameters.get("scale", scale or os.environ.get("CLVQ_SCALE", "smoke"))
    core.Pipeline(core.configure(scale, **settings)).check()                # what others do is the notebook's affair


def tidy(notebook: Any, record: Mapping[str, Any]) -> Any:
    """An executed notebook without progress bars, timings and paths of the machine, and with a record of how it was
    run."""
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
                 timeout: int = 7200) -> Path:
    """Run a notebook by papermill and write it whole to ``output``, which may be the notebook itself if no parameter is
    set.

    Parameters are checked first. A kernel that does not start (ports clash when many start at once) is tried once more.
    ``timeout`` is in seconds per cell. A failed run is kept beside the output as ``….failed.ipynb``.
    """
    import nbformat
    import papermill

    import clvq_core as core

    parameters = dict(parameters or {})
    check_parameters(path, scale, parameters)
    if output.resolve() == path.resolve() and parameters:
        raise ValueError("a notebook that is run in place takes no parameters: name another output")
    output.parent.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("CLVQ_SCALE")
    used = parameters.get("scale") or scale or before or "smoke"
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "out.ipynb"
        try:
            os.environ["CLVQ_SCALE"] = scale or before or "smoke"                           # the kernel inherits it
            for last in (False, True):
                try:
                    papermill.execute_notebook(str(path), str(result), parameters, stderr_file=sys.stderr,
                                               progress_bar=False, execution_timeout=timeout, start_timeout=120,
                                               kernel_name="python3", language="python")
                    break
                except (RuntimeError, TimeoutError) as error:
                    ran = result.exists() and any(c.get("execution_count") for c in nbformat.read(result, 4).cells)
                    if ran or last:
                        raise RuntimeError(f"the kernel of {path.name} did not start or died: {error}") from error
        except papermill.PapermillExecutionError as error:
            failed = output.with_suffix(".failed.ipynb")
            shutil.move(result, failed)
            raise RuntimeError(f"{path.name} failed: {error.ename}: {error.evalue} (see {failed})") from error
        finally:
            os.environ.pop("CLVQ_SCALE") if before is None else os.environ.update(CLVQ_SCALE=before)
        record = {"scale": used, "parameters": parameters, "key": notebook_key(path),
                  "commit": core.environment()["commit"]}
        notebook = tidy(nbformat.read(result, 4), record)
    core.write_whole(output, lambda partial: nbformat.write(notebook, partial))
    return output


class NotebookRun(NamedTuple):
    """One run of a sweep over a notebook, as `clvq_core.Run` is of one over trainings. It measures the numbers that the
    notebook hands on."""

    scale: str
    settings: dict[str, Any]
    """Parameters of the notebook."""
    notebook: str
    """Its path."""

    @property
    def config(self) -> Any:
        """The settings among the parameters, in full."""
        import clvq_core as core

        settings = {name: value for name, value in self.settings.items() if name in core.Config.model_fields}
        return core.configure(self.scale, **settings)

    @property
    def columns(self) -> dict[str, Any]:
        """What its rows of a sweep's results say of it."""
        return {**self.config.model_dump(), **self.settings, "scale": self.scale}

    @property
    def name(self) -> str:
        """Hash of everything the run depends on."""
        import clvq_core as core

        pipeline = core.Pipeline(self.config)
        return core.hash_text(notebook_key(Path(self.notebook)), pipeline.config, self.settings,
                              pipeline.corpus.attrs["hash"], pipeline.base_model)[:16]

    @property
    def cost(self) -> dict[str, float]:
        """Unknown."""
        return {}

    def check(self) -> None:
        """ValueError in one sentence if it cannot run."""
        check_parameters(Path(self.notebook), self.scale, self.settings)

    def measure(self) -> pd.DataFrame:
        """A row per number: metric, epoch (missing), value; the executed notebook is in ``attrs``. A notebook that
        fails stays in the cache folder."""
        import nbformat
        import pandas as pd

        import clvq_core as core

        output = core.cache_folder() / "notebooks" / f"{self.name}.ipynb"
        path = run_notebook(Path(self.notebook), output, self.scale, self.settings)
        text = path.read_text("utf8")
        path.unlink()
        values: dict[str, float] = {}
        for output in (o for cell in nbformat.reads(text, 4).cells if cell.cell_type == "code" for o in cell.outputs):
            glued = output.get("data", {}).items() if "scrapbook" in output.get("metadata", {}) else ()
            for kind, content in glued:
                if kind.endswith("text/plain") and isinstance(number := core.parse_value("", content), int | float):
                    values[output.metadata["scrapbook"]["name"]] = float(number)
        rows = pd.DataFrame({"metric": list(values), "epoch": math.nan, "value": list(values.values())})
        rows.attrs["notebook"] = text
        return rows


SWEEP_KEYS = ("scale", "notebook", "settings", "grid", "runs")


def read_sweep(path: Path) -> list[Any]:
    """The runs of a YAML file: ``scale``, ``notebook`` (none: trainings), ``settings`` of all runs, ``grid`` (every
    combination of these values) and ``runs`` (a list of settings, each combined with the grid). ValueError in one
    sentence for what cannot run."""
    import yaml

    import clvq_core as core

    def parsed(name: str, value: Any) -> Any:
        return core.parse_value(name, value) if isinstance(value, str) else value           # YAML reads 1e-3 as text

    def mapping(part: Any, what: str) -> dict[str, Any]:
        if not isinstance(part, dict) or not all(isinstance(name, str) for name in part):
            raise ValueError(f"{path}: {what} must be names with values, not {part!r}")
        return {name: parsed(name, value) for name, value in part.items()}

    try:
        content = yaml.safe_load(path.read_text("utf8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from error
    sweep = mapping(content, f"a sweep's keys ({', '.join(SWEEP_KEYS)})")
    if unknown := [key for key in sweep if key not in SWEEP_KEYS]:
        raise ValueError(f"{path} has an unknown key {unknown[0]!r}; it may have {', '.join(SWEEP_KEYS)}")
    scale, notebook, parts = sweep.get("scale", "laptop"), sweep.get("notebook", ""), sweep.get("runs", [{}])
    grid = {name: [parsed(name, value) for value in (values if isinstance(values, list) else [values])]
            for name, values in mapping(sweep.get("grid", {}), "grid").items()}
    if not isinstance(scale, str) or not isinstance(notebook, str) or "scale" in grid:
        raise ValueError(f"{path}: scale and notebook must each be one text, the same for all runs")
    if empty := [name for name, values in grid.items() if not values]:
        raise ValueError(f"{path}: grid has no values of {empty[0]}")
    if not isinstance(parts, list) or not parts:
        raise ValueError(f"{path}: runs must be a list of settings, not {parts!r}")
    common = mapping(sweep.get("settings", {}), "settings")
    settings = [{**common, **dict(zip(grid, values, strict=True)), **mapping(part, "each of the runs")}
                for part in parts for values in itertools.product(*grid.values())]
    runs = [NotebookRun(scale, part, notebook) if notebook else core.Run(scale, part) for part in settings]
    for run in runs:
        run.check()
    return runs


# ======================================================================================================================
# 3 Rating page
# ======================================================================================================================
TABLES = """
CREATE TABLE IF NOT EXISTS raters (number INTEGER PRIMARY KEY, token TEXT UNIQUE NOT NULL, joined TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS answers (rater INTEGER NOT NULL REFERENCES raters, item TEXT NOT NULL, label TEXT NOT NULL,
    confidence INTEGER NOT NULL CHECK (confidence BETWEEN 1 AND 10), at TEXT NOT NULL, PRIMARY KEY (rater, item));
"""
OCCUPIED = """
SELECT count(*) FROM raters
WHERE number IN (SELECT rater FROM answers) OR joined > datetime('now', '-1 hour')
"""
"""Raters who have answered something, and those who may be about to."""


class AnswerStore:
    """The raters' side of a study: its items, and their answers in a database that several processes can write to.

    Each answer is on disk when `save` returns. A rater is a random token, and reads and writes only their own answers.
    `clvq_core.make_study` makes the folder, and `clvq_core.study_answers` reads the answers.
    """

    def __init__(self, folder: Path, most_raters: int = 200) -> None:
        if not (folder / "study.json").exists() or not (folder / "clouds" / "practice.png").exists():
            raise ValueError(f"{folder} is no study: it has no study.json, or no clouds (clvq annotate makes both)")
        study = json.loads(content := (folder / "study.json").read_text("utf8"))
        self.name = f"clvq-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
        self.folder, self.most_raters = folder, most_raters
        self.classes, self.seed, self.practice = study["classes"], study["seed"], study["practice"]
        self.items = {item["id"]: item for item in study["items"]}
        with self.database() as database:
            database.execute("PRAGMA journal_mode=WAL")
            database.executescript(TABLES)

    @contextlib.contextmanager
    def database(self) -> Iterator[sqlite3.Connection]:
        """A connection whose changes are all written at the end, or none of them after an error."""
        connection = sqlite3.connect(self.folder / "answers.sqlite", timeout=30)
        try:
            with connection:
                connection.execute("PRAGMA foreign_keys=ON")
                connection.execute("PRAGMA synchronous=FULL")
                yield connection
        finally:
            connection.close()

    def join(self) -> str:
        """A new rater's token. ValueError if the study has all the raters it takes."""
        token = secrets.token_urlsafe(16)
        with self.database() as database:
            database.execute("BEGIN IMMEDIATE")                                 # two cannot take the last place
            if database.execute(OCCUPIED).fetchone()[0] >= self.most_raters:
                raise ValueError("this study has all the raters it needs")
            database.execute("INSERT INTO raters (token, joined) VALUES (?, datetime('now'))", (token,))
        return token

    def count_raters(self) -> int:
        """How many raters have answered something."""
        with self.database() as database:
            return database.execute("SELECT count(DISTINCT rater) FROM answers").fetchone()[0]

    def number(self, token: str) -> int:
        """Which rater this is, from 1. ValueError for a token that nobody has."""
        with self.database() as database:
            row = database.execute("SELECT number FROM raters WHERE token = ?", (token,)).fetchone()
        if row is None:
            raise ValueError("this link belongs to no rater of this study")
        return row[0]

    def order(self, token: str) -> list[str]:
        """The items in the rater's own order: each sentence once, then again with another method's concept, and so on.
        Which method comes first for a sentence alternates from rater to rater."""
        import numpy as np

        number, groups = self.number(token), dict[int, list[str]]()
        for item in self.items.values():
            groups.setdefault(item["group"], []).append(item["id"])
        shuffled = np.random.default_rng([self.seed, number]).permutation(sorted(groups))
        rounds = max(map(len, groups.values()))
        return [groups[group][(number + group + turn) % rounds] for turn in range(rounds) for group in shuffled]

    def save(self, token: str, item: str, label: str, confidence: int) -> None:
        """Keep a rater's answer to an item, in place of an earlier one."""
        if item not in self.items or label not in self.classes:
            raise ValueError("there is no such item or class")
        answer = (self.number(token), item, label, int(confidence))
        with self.database() as database:
            database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?, ?, ?, datetime('now'))", answer)

    def answers_of(self, token: str) -> dict[str, tuple[str, int]]:
        """The rater's answers so far: label and confidence by item."""
        query = "SELECT item, label, confidence FROM answers WHERE rater = ?"
        with self.database() as database:
            rows = database.execute(query, (self.number(token),)).fetchall()
        return {item: (label, confidence) for item, label, confidence in rows}

    def cloud(self, item: str) -> str:
        """An item's word cloud, or the practice cloud, as HTML; its text, for those who do not see it, is the words."""
        words = self.items[item]["words"] if item else self.practice
        spoken = html.escape(", ".join(f"{word} {count}" for word, count in words.items()) or "no words")
        image = base64.b64encode((self.folder / "clouds" / f"{item or 'practice'}.png").read_bytes()).decode()
        return ('<img style="width: 100%; max-width: 40rem" '
                f'alt="Word cloud: {spoken}" src="data:image/png;base64,{image}">')


DARK_CSS = """<style>@media (prefers-color-scheme: dark) {
    :root, body { --jp-layout-color0: #121212; --jp-layout-color1: #121212; --jp-layout-color2: #2b2b2b;
        --jp-layout-color3: #505050; --jp-ui-font-color1: #e0e0e0; --jp-content-font-color1: #e0e0e0;
        --jp-content-link-color: #8ab4f8; --jp-widgets-color: #e0e0e0; --jp-widgets-label-color: #e0e0e0; }
    body { background: #121212; color: #e0e0e0; }
}</style>"""
"""Dark colours for JupyterLab's widgets."""
WELCOME = """<h1>What do these words tell you?</h1>
<p>You will see {count} word clouds, one after another. The larger a word, the more often it occurs. Each cloud belongs
to a text that you will not see. Choose the class that you think a computer gave this text, and say how confident you
are, from 1 (just guessing) to 10 (certain). There are no right or wrong answers: simply go by the words.</p>
<p>You can stop at any time. To continue later, open this page again in the same browser, or keep its address.</p>"""
CONSENT = "I am taking part voluntarily; my answers are stored without my name."
FULL = "<h1>Thank you for your interest</h1><p>This study already has all the raters it needs.</p>"
THANKS = "<h1>Thank you</h1><p>All your answers have been saved. You can close this page now.</p>"
BUSY = "Many people are taking part right now. Please try again in a few minutes."


class RatingPage:
    """One rater's page, made of widgets: consent, instructions, a practice cloud, the items one by one, thanks.

    It knows only clouds and the names of the classes. An answer is saved as soon as it has a label and a confidence.
    The page's address and a cookie hold the rater's token, so that whoever comes back goes on where they stopped.
    """

    def __init__(self, folder: Path, query: str = "", cookies: str = "", most_raters: int = 200) -> None:
        from urllib.parse import parse_qs

        import ipywidgets as widgets

        self.store, self.widgets = AnswerStore(folder, most_raters), widgets
        self.token, self.order, self.place = "", list[str](), -1
        self.script, self.page = widgets.Output(), widgets.VBox()
        self.box = widgets.VBox([widgets.HTML(DARK_CSS), self.page, self.script],
                                layout=widgets.Layout(max_width="44rem", margin="0 auto"))
        known = parse_qs(query).get("rater", []) + re.findall(rf"\b{self.store.name}=([\w-]+)", cookies)
        for token in known:
            with contextlib.suppress(ValueError):                               # mistyped, or of another study
                return self.enter(token)
        self.show_welcome()

    def enter(self, token: str, practice: bool = False) -> None:
        """Show a rater the first item without an answer, or the practice. ValueError for a token that nobody has."""
        self.order, answered = self.store.order(token), self.store.answers_of(token)
        first = next((place for place, item in enumerate(self.order) if item not in answered), len(self.order))
        self.token, self.place = token, -1 if practice else first
        self.remember()
        self.show_item()

    def remember(self) -> None:
        """Put the rater's token into the page's address and a cookie of the browser."""
        code = (f'history.replaceState(null, "", "?rater={self.token}");'
                f'document.cookie = "{self.store.name}={self.token}; path=/; max-age=31536000; samesite=lax"')
        self.script.outputs = ({"output_type": "display_data", "metadata": {},
                                "data": {"application/javascript": code, "text/plain": ""}},)

    def button(self, text: str, act: Callable[[], None], style: str = "primary", **options: Any) -> Any:
        """A button that does one thing."""
        button = self.widgets.Button(description=text, button_style=style, **options)
        button.on_click(lambda _: act())
        return button

    def show_welcome(self) -> None:
        """Consent and instructions."""
        agree = self.widgets.Checkbox(description=CONSENT, indent=False, layout={"width": "auto"})
        begin = self.button("Begin", self.begin, disabled=True)
        agree.observe(lambda change: setattr(begin, "disabled", not change["new"]), "value")
        text = self.widgets.HTML(WELCOME.format(count=len(self.store.items)))
        self.page.children = [text, agree, begin]

    def begin(self) -> None:
        """Make a new rater, once however often the button is pressed, and show the practice cloud."""
        if self.token:
            return
        try:
            self.enter(self.store.join(), practice=True)
        except ValueError:
            self.page.children = [self.widgets.HTML(FULL)]

    def show_item(self) -> None:
        """One cloud and its two questions, or the end."""
        widgets, practice = self.widgets, self.place < 0
        if self.place >= len(self.order):
            back = self.button("Back", lambda: self.move(-1), style="")
            self.page.children = [widgets.HTML(THANKS), back]
            return
        item = "" if practice else self.order[self.place]
        classes = ["food", "weather"] if practice else self.store.classes
        label, confidence = ("", 0) if practice else self.store.answers_of(self.token).get(item, ("", 0))
        labels = widgets.ToggleButtons(options=classes, value=label or None, description="Class",
                                       style={"button_width": "8rem"})
        degrees = widgets.ToggleButtons(
            options=[(str(degree), degree) for degree in range(1, 11)], value=confidence or None,
            description="How confident are you, from 1 (just guessing) to 10 (certain)?",
            style={"button_width": "2.7rem", "description_width": "initial"})
        notice, back = widgets.HTML(), self.button("Back", lambda: self.move(-1), style="", disabled=self.place < 1)
        forward = self.button("Next", lambda: self.move(1), disabled=not label)

        def save(_: Any) -> None:
            if labels.value is None or degrees.value is None:
                return
            try:
                if not practice:
                    self.store.save(self.token, item, labels.value, degrees.value)
                notice.value, forward.disabled = "That is all there is to it." if practice else "Saved.", False
            except sqlite3.OperationalError:
                notice.value = "This answer could not be saved. Please choose it again."

        labels.observe(save, "value")
        degrees.observe(save, "value")
        position = "Practice: this one does not count" if practice else f"{self.place + 1} of {len(self.order)}"
        progress = widgets.IntProgress(max(0, self.place), 0, len(self.order), layout={"width": "100%"})
        address = f'<p><small>To continue later: <a href="?rater={self.token}">the address of your page</a></small></p>'
        self.page.children = [
            widgets.HTML(f"<p role='status'>{position}</p>"), progress, widgets.HTML(self.store.cloud(item)),
            labels, degrees, widgets.HBox([back, forward, notice]), widgets.HTML(address)]

    def move(self, by: int) -> None:
        """Show another item."""
        self.place += by
        self.show_item()


RATING_CELL = """import os, pathlib, clvq_app
clvq_app.RatingPage(pathlib.Path({folder!r}), os.environ.get("QUERY_STRING", ""), os.environ.get("HTTP_COOKIE", ""),
                    {most_raters}).box"""
IDLE_SECONDS = 1800
"""A visitor's process ends after this time without a click; the page's address goes on where it was."""


def check_can_serve(port: int, ip: str) -> None:
    """ValueError if the rating page cannot be served there."""
    if importlib.util.find_spec("voila") is None:
        raise ValueError("the rating page needs voila: pip install voila ipywidgets")
    from tornado.netutil import bind_sockets

    try:
        for listening in bind_sockets(port, ip):
            listening.close()
    except OSError as error:
        problem = f"port {port} at {ip} cannot be used ({error.strerror or error})"
        raise ValueError(f"{problem}: choose another with --port or --ip") from error


def serve(folder: Path, port: int, ip: str, most_raters: int, most_visitors: int) -> None:
    """Serve a study's `RatingPage` with Voila until Ctrl+C. Each visitor has a process, in which they can run no code.
    RuntimeError if the server fails."""
    import nbformat
    from traitlets.config import Config
    from voila.app import Voila

    settings = Config()
    settings.Voila.update(ip=ip, port=port, port_retries=0, open_browser=False)
    settings.VoilaConfiguration.update(
        strip_sources=True, show_tracebacks=False, http_header_envs=["Cookie"],
        multi_kernel_manager_class=limited_kernels(most_visitors))
    settings.MappingKernelManager.update(cull_idle_timeout=IDLE_SECONDS, cull_interval=60, cull_connected=True)
    cell = nbformat.v4.new_code_cell(RATING_CELL.format(folder=str(folder.resolve()), most_raters=most_raters))
    here = str(Path(__file__).resolve().parent)                                 # visitors' processes import this file
    os.environ["PYTHONPATH"] = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    with tempfile.TemporaryDirectory() as place:
        page = Path(place) / "rate.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[cell]), page)
        try:
            Voila.launch_instance([str(page)], config=settings)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"the rating page's server stopped with exit code {end.code}") from end


def limited_kernels(most: int) -> type:
    """A kernel manager for Voila that runs at most so many kernels and turns other visitors away kindly."""
    from uuid import uuid4

    from jupyter_server.services.kernels.kernelmanager import AsyncMappingKernelManager
    from tornado.web import HTTPError

    class LimitedKernels(AsyncMappingKernelManager):
        starting = frozenset[str]()

        async def start_kernel(self, **options: Any) -> str:                    # type: ignore[override]
            if len(self.starting | set(self.list_kernel_ids())) >= most:
                raise HTTPError(503, reason=BUSY)
            kernel = str(uuid4())
            self.starting |= {kernel}
            try:
                return await super().start_kernel(kernel_id=kernel, **options)
            finally:
                self.starting -= {kernel}

    return LimitedKernels


# ======================================================================================================================
# 4 Card, report and explorer
# ======================================================================================================================
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; display: block; overflow-x: auto }
th, td { padding: .3rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid #8884 }
</style></head><body>
<h1>{{ title }}</h1>
{{ body | safe }}
</body></html>
"""
REPORT = """<p>{{ about }}</p>
<table><thead><tr>{% for name in table.columns %}<th>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in table.itertuples(index=False) %}<tr>{% for value in row %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table>"""
EXPLORER = """<p>{{ about }}</p><script>{{ plotly | safe }}</script>{{ map | safe }}
<section id="concept" aria-live="polite">
<p>Choose a point on the map or a row of the table (Enter opens it).</p>
</section>{{ library | safe }}{{ grid | safe }}
<script type="application/json" id="details">{{ details | tojson }}</script><script>{{ script | safe }}</script>"""
OPEN_CONCEPT = """
const details = JSON.parse(document.getElementById("details").textContent), panel = document.getElementById("concept");
const make = (tag, content) => Object.assign(document.createElement(tag), {textContent: content});
const add = (parent, tag, content) => parent.appendChild(make(tag, content));
function show(name) {
    const concept = details[name];
    if (!concept) return;
    panel.replaceChildren();
    add(panel, "h2", "Concept #" + name);
    for (const [title, value] of Object.entries(concept.facts)) {
        const line = add(panel, "p", "");
        add(line, "strong", title + ": ");
        line.append(value);
    }
    const list = add(panel, "ul", "");
    for (const sentence of concept.examples) add(list, "li", sentence);
    const neighbours = add(panel, "p", "Nearest codes: ");
    for (const other of concept.near) {
        add(neighbours, "button", "#" + other).addEventListener("click", () => show(other));
        neighbours.append(" ");
    }
    location.replace("#concept-" + name);
    panel.scrollIntoView({block: "nearest"});
}
document.getElementById("map").on("plotly_click", event => show(event.points[0].customdata[0]));
function openRow(event) {
    const row = event.target.closest("tbody tr");
    if (row) show(row.cells[0].textContent);
}
const table = document.getElementById("concepts");
table.addEventListener("click", openRow);
table.addEventListener("keydown", event => { if (event.key === "Enter") openRow(event); });
const letTabReachRows = () => table.querySelectorAll("tbody tr").forEach(row => row.tabIndex = 0);
new MutationObserver(letTabReachRows).observe(table, {childList: true, subtree: true});
if (location.hash.startsWith("#concept-")) show(location.hash.slice(9));
const root = document.documentElement, prefersDark = matchMedia("(prefers-color-scheme: dark)");
function followTheme() {
    root.classList.toggle("dark", root.dataset.theme ? root.dataset.theme === "dark" : prefersDark.matches);
}
new MutationObserver(followTheme).observe(root, {attributeFilter: ["data-theme"]});
followTheme();
"""


def render(template: str, **values: Any) -> str:
    """The template with these values, in which nothing is markup unless the template says so."""
    from jinja2 import Environment, StrictUndefined

    return Environment(autoescape=True, undefined=StrictUndefined).from_string(template).render(values)


def write_page(path: Path, title: str, body: str) -> Path:
    """A page in one file that needs no other. ``body`` is HTML."""
    from clvq_core import write_whole

    path.parent.mkdir(parents=True, exist_ok=True)
    page = render(PAGE, title=title, body=body)
    write_whole(path, lambda partial: partial.write_text(page, "utf8"))
    return path


def write_card(found: Explanation | Comparison, path: Path, provenance: str = "") -> Path:
    """What `clvq_core.Pipeline.explain` or `compare` found, as a page that may end in its ``provenance``."""
    return write_page(path, str(getattr(found.text, "text", found.text))[:80], found._repr_html_() + provenance)


def name_of(pipeline: Pipeline) -> str:
    """What a page's concepts belong to: a model and a data set."""
    return f"{Path(pipeline.config.model).name} on {pipeline.corpus.attrs['name']}"


def write_report(pipeline: Pipeline, path: Path, most: int = 100) -> Path:
    """The first ``most`` concepts of `clvq_core.Pipeline.report` as a page."""
    import pandas as pd

    from clvq_core import of_class

    top, (source, target) = pipeline.report.head(most), pipeline.layers
    bounds = zip(top["effect"], top["effect_low"], top["effect_high"], strict=True)
    effects = [f"{mean:+.4f}" + ("" if math.isnan(low) else f" ({low:+.4f} to {high:+.4f})")
               for mean, low, high in bounds]
    table = pd.DataFrame({
        "concept": top["concept"].map(pipeline.concept_names), "words": top["words"], "sentences": top["sentences"],
        "effect (95 % interval)": effects, "class": of_class(top["label"], top["purity"]),
        "answers changed": top["flipped"].map("{:.1%}".format),
        "stability": top["stability"].map("{:.2f}".format).replace("nan", "–"),
        "training text": top["examples"].map(" | ".join)})
    about = (f"Layers {source} to {target}. The classifier is right on {pipeline.accuracy:.3f} of "
             f"{len(pipeline.test):,} sentences. Effect: how the probability of the model's own answer changes when "
             "the concept is removed, around the mean, from each position of the sentences that have it, compared with "
             "removing random concepts from the same sentences. Class: the class of most of the concept's states. "
             "Stability: how closely the concept comes back with other seeds (1: exactly).")
    body = render(REPORT, about=about, table=table) + provenance_html(pipeline)
    return write_page(path, f"Concepts of {name_of(pipeline)}", body)


def write_explorer(pipeline: Pipeline, path: Path) -> Path:
    """All concepts of `clvq_core.Pipeline.explorer_table` as a page to look around in."""
    table, (source, target) = pipeline.explorer_table, pipeline.layers
    about = f"{len(table)} concepts of {name_of(pipeline)}, layers {source} to {target}."
    return write_page(path, "Concept explorer", explorer_html(table, about) + provenance_html(pipeline))


def explorer_html(table: pd.DataFrame, about: str) -> str:
    """HTML that needs no other file: a map of the codebook, and a table of concepts to search, sort, filter and open.

    ``table`` as `clvq_core.Pipeline.explorer_table`, one row per concept; ``about`` says whose concepts they are. The
    map is plotly's, the table itables' (DataTables).
    """
    import itables
    import plotly.offline
    from itables.javascript import generate_init_offline_itables_html

    columns = ["concept", "words", "class", "purity", "states", "effect", "flipped", "stability"]
    grid = table[columns].assign(words=table["words"].map(first_words))
    texts: Any = {"searchBuilder": {"title": {"0": "Filters", "_": "Filters (%d)"}, "add": "Add a filter"},
                  "lengthMenu": "_MENU_ per page"}
    grid_html = itables.to_html_datatable(
        grid.astype(object).where(grid.notna(), ""), table_id="concepts", connected=False, showIndex=False, maxBytes=0,
        layout={"top1": "searchBuilder"}, classes="display compact", language=texts)
    figure = codebook_figure(table)
    return render(
        EXPLORER, about=about, plotly=plotly.offline.get_plotlyjs(), grid=grid_html, details=concept_details(table),
        map=figure.to_html(full_html=False, include_plotlyjs=False, div_id="map", config={"displayModeBar": False}),
        library=generate_init_offline_itables_html(itables.options.dt_bundle), script=OPEN_CONCEPT)


def first_words(words: str) -> str:
    """The five most frequent words of a concept."""
    return ", ".join(words.split(", ")[:5])


def codebook_figure(table: pd.DataFrame) -> Any:
    """The map: a point per concept, its size by states and its colour by class. Plotly reads markup: it is escaped."""
    import plotly.express as px

    from clvq_core import PALETTE

    points = table.assign(size=table["states"] ** 0.5, words=table["words"].map(first_words).map(html.escape),
                          **{"class": table["class"].map(html.escape)})
    figure = px.scatter(
        points, x="x", y="y", color="class", size="size", size_max=18, hover_name="words", custom_data=["concept"],
        hover_data={"x": False, "y": False, "size": False, "effect": True, "states": True}, opacity=0.7,
        template="none", color_discrete_sequence=PALETTE, render_mode="svg")    # WebGL is not everywhere
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    return figure.update_layout(
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", margin=dict(l=0, r=0, t=0, b=0), height=480,
        font_color="#7f7f7f", legend=dict(orientation="h"))


def concept_details(table: pd.DataFrame) -> dict[str, dict[str, Any]]:
    """What the explorer shows of each concept that is opened: facts, examples, and the numbers of near concepts."""
    details = {}
    for row in table.to_dict("records"):
        effect, stability = "not in the evaluation sentences", "–"
        if not math.isnan(row["effect"]):
            effect = (f"{row['effect']:+.4f} ({row['effect_low']:+.4f} to {row['effect_high']:+.4f}), "
                      f"other answer in {row['flipped']:.1%}")
        if not math.isnan(row["stability"]):
            stability = f"{row['stability']:.2f}" + (" (unstable)" if row["stability"] < 0.5 else "")
        label = f"{row['class']} ({row['purity']:.0%} of {row['states']:,})"
        facts = {"Words": row["words"], "Class of most states": label, "Effect on the model's answer": effect,
                 "Comes back with other seeds": stability}
        near = list(map(int, row["near"]))
        details[str(row["concept"])] = {"facts": facts, "examples": list(row["examples"]), "near": near}
    return details


if __name__ == "__main__":
    sys.exit(main())
