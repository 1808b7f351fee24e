"""Runs side by side, in this process, on workers of this machine and on a cluster; sweeps over settings, killed and gone on with."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from distributed import Client, LocalCluster
from scipy.stats import t

import clvq_app
import clvq_core as clvq

ROOT = Path(__file__).parents[1]
METHOD = ROOT / "notebooks" / "01_method.ipynb"
QUICK = dict(train_sentences=100, test_sentences=60, finetune_epochs=1, epochs=2, n_codes=20, folds=3, probe_epochs=3)
DIVERGING = dict(learning_rate=1e15, clip_norm=0.0, standardize_targets=False)
CLVQ = [sys.executable, "-c", "import sys, clvq_app; sys.exit(clvq_app.main())"]  # what the command `clvq` does
PATH = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


def waited(ready: Callable[[], object], seconds: float = 240) -> object:
    """What ``ready`` returns once it is true."""
    until = time.monotonic() + seconds
    while not (found := ready()):
        assert time.monotonic() < until, "what was waited for did not come"
        time.sleep(0.01)
    return found


def runs(n: int, **settings) -> list[clvq.Run]:
    return [clvq.Run("smoke", {**QUICK, **settings, "seed": seed}) for seed in range(n)]


def straight_config() -> clvq.Config:
    """The first of the runs that `straight` does."""
    return runs(1, epochs=4)[0].config


def done(folder: Path) -> dict[str, int]:
    """The finished runs of a sweep's folder, and when each was written."""
    return {path.stem: path.stat().st_mtime_ns for path in folder.glob("*.parquet") if path.stem != "results" and path.name[0] != "."}


def same_results(one: pd.DataFrame, other: pd.DataFrame) -> None:
    """The same runs have the same measurements, but for the time they took."""
    keys = ["run", "metric", "epoch"]
    one, other = (frame[~frame["metric"].str.contains("seconds")].set_index(keys)["value"].sort_index() for frame in (one, other))
    assert one.index.is_unique and one.index.equals(other.index)
    np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-3)


@pytest.fixture(scope="module")
def pipeline():
    """A pipeline whose language model, states and saliences are kept."""
    made = clvq.Pipeline(clvq.configure("smoke", **QUICK))
    assert len(made.trial.labels) == 60
    return made


def untrained(pipeline: clvq.Pipeline, cache: Path) -> Path:
    """Links what comes before training into another cache."""
    steps = ("classifier", "door", "states", "salience_at")
    for path in [path for step in steps for path in pipeline.cache.glob(f"{step}-*") if path.is_dir()]:
        shutil.copytree(path, cache / path.name, copy_function=os.link)
    return cache


@pytest.fixture
def fresh_cache(pipeline, tmp_path_factory, monkeypatch):
    """A cache that has language model, states and saliences, but no training: each test does its own."""
    cache = untrained(pipeline, tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("CLVQ_CACHE", str(cache))
    return cache


@pytest.fixture(scope="module")
def straight(pipeline, tmp_path_factory):
    """Six runs in this process: their folder and their results."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, clvq.run_sweep(runs(6, epochs=4), folder, workers=0)


# --- side by side -----------------------------------------------------------------------------------------------------


def test_in_this_process_every_call_gives_its_result_or_its_exception():
    def root(number: float) -> float:
        if number == 13:
            raise OSError("unlucky")
        return math.sqrt(number)

    found = dict(clvq.run_parallel(root, [(4,), (-1,), (13,), (9,)], workers=0))
    assert found[0] == 2 and found[3] == 3
    assert type(found[1]) is ValueError and type(found[2]) is OSError and str(found[2]) == "unlucky"


@pytest.mark.parametrize(
    ("error", "retries", "tries"), [(OSError, 0, 1), (OSError, 1, 2), (OSError, 3, 4), (ValueError, 3, 1), (FloatingPointError, 3, 1)]
)
def test_what_another_try_may_mend_is_tried_again_and_nothing_else(error, retries, tries):
    tried = []

    def fail(name: str) -> None:
        tried.append(name)
        raise error(name)

    found = dict(clvq.run_parallel(fail, [("a",), ("b",)], workers=0, retries=retries))
    assert tried == ["a"] * tries + ["b"] * tries
    assert {i: str(value) for i, value in found.items()} == {0: "a", 1: "b"} and type(found[0]) is error


def test_a_call_that_fails_once_gives_its_result_once():
    tried = []

    def shy(name: str) -> str:
        tried.append(name)
        if tried.count(name) == 1:
            raise OSError(name)
        return name

    assert list(clvq.run_parallel(shy, [("a",), ("b",)], workers=0)) == [(0, "a"), (1, "b")]


def test_workers_of_this_machine_give_the_same_results_and_exceptions_and_are_started_once(tmp_path):
    (tmp_path / "file").write_text("x")
    calls = [(tmp_path / "file",), (tmp_path / "none",), (tmp_path / "file",), (tmp_path,), (tmp_path / "file",)]
    here, there = (dict(clvq.run_parallel(clvq.hash_file, calls, workers)) for workers in (0, 2))
    assert here.keys() == there.keys() == set(range(5))
    assert here[0] == there[0] == there[2] == there[4] == clvq.hash_file(tmp_path / "file")
    assert all(type(here[i]) is type(there[i]) and str(here[i]) == str(there[i]) for i in (1, 3))
    workers = {child.pid for child in psutil.Process().children(recursive=True) if is_worker(child)}
    list(clvq.run_parallel(clvq.hash_file, calls, 2))
    assert workers == {child.pid for child in psutil.Process().children(recursive=True) if is_worker(child)} != set()


def is_worker(process: psutil.Process) -> bool:
    try:
        return "popen_loky" in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.fixture
def worker_settings(monkeypatch):
    """Puts back what `worker_call` sets."""
    monkeypatch.setenv("CLVQ_WORKERS", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def test_a_worker_with_another_version_of_the_module_refuses_the_call(worker_settings):
    versions = clvq.step_versions()
    assert clvq.worker_call(3, clvq.parse_value, ("seed", "1"), 0, None, {}, versions) == (3, 1)
    i, error = clvq.worker_call(3, clvq.parse_value, ("seed", "1"), 0, None, {}, versions | {"vqvae": -1})
    assert i == 3 and type(error) is RuntimeError and "another version" in str(error)


def test_a_worker_has_its_own_threads_no_workers_of_its_own_and_keeps_quiet(worker_settings, capsys):
    versions, variables = clvq.step_versions(), {"CLVQ_WORKERS": "0"}
    assert clvq.worker_call(0, clvq.default_workers, (), 0, 2, variables, versions) == (0, 0)
    assert torch.get_num_threads() == 2
    _, error = clvq.worker_call(0, clvq.configure, ("huge",), 0, None, variables, versions)
    assert type(error) is ValueError and "'huge'" in str(error)
    assert type(clvq.worker_call(0, clvq.hash_file, (Path("nowhere"),), 1, None, variables, versions)[1]) is FileNotFoundError
    assert capsys.readouterr().err == ""


def die_once(mark: Path, name: str) -> str:
    if name == "mortal" and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return name


def test_a_worker_of_this_machine_that_is_killed_loses_no_call(tmp_path):
    names = ["a", "mortal", "b", "c"]
    results = dict(clvq.run_parallel(die_once, [(tmp_path / "mark", name) for name in names], workers=2))
    assert (tmp_path / "mark").exists() and [results[i] for i in range(4)] == names


def test_workers_of_this_machine_need_no_dask_and_listen_on_no_port():
    """What listens can be told to run code by any user of the machine."""
    program = """
import sys
sys.modules["distributed"] = sys.modules["dask"] = None                                      # as where neither is installed
import psutil, pathlib
import clvq_core as clvq
calls = [(pathlib.Path(clvq.__file__),)] * 4
for _, result in clvq.run_parallel(clvq.hash_file, calls, workers=2):
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    print(result, [c.laddr for p in processes for c in p.net_connections() if c.status == psutil.CONN_LISTEN])
try:
    list(clvq.run_parallel(clvq.hash_file, calls, scheduler="tcp://127.0.0.1:1"))
except ValueError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": PATH}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=240)
    *lines, refused = done.stdout.splitlines()
    assert lines == [f"{clvq.hash_file(ROOT / 'clvq_core.py')} []"] * 4, done.stderr
    assert refused == "a scheduler needs the package distributed: pip install distributed"


def test_the_number_of_workers_minds_the_environment_cores_memory_and_gpu(monkeypatch):
    monkeypatch.setenv("CLVQ_WORKERS", "3")
    assert clvq.default_workers() == 3
    monkeypatch.delenv("CLVQ_WORKERS")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for cores, gib, workers in ((1, 64, 0), (2, 12.7, 2), (2, 7.9, 2), (2, 5, 0), (16, 64, 8), (16, 20, 5)):
        monkeypatch.setattr(clvq, "cores", lambda n=cores: n)
        monkeypatch.setattr(psutil, "virtual_memory", lambda size=gib: SimpleNamespace(total=int(size * 2**30)))
        assert clvq.default_workers() == workers
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert clvq.default_workers() == 0


# --- clusters ---------------------------------------------------------------------------------------------------------


def test_a_sweep_over_a_given_scheduler_gives_the_results_of_one_in_this_process(straight, fresh_cache, tmp_path):
    with LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster:
        found = clvq.run_sweep(runs(2, epochs=4), tmp_path / "sweep", scheduler=cluster.scheduler_address, threads=1)
    assert len(list(fresh_cache.glob("training_summary-*/result.parquet"))) == 2
    same_results(found, straight[1][straight[1]["run"].isin(found["run"])])


@pytest.fixture(scope="module")
def cluster(pipeline, tmp_path_factory):
    """A scheduler and two workers, each a process of its own, reached over TCP: its address, the workers by name, and the folder of
    their caches. `gpu` has a GPU to give; the cache of each has its name, and no training."""
    folder = tmp_path_factory.mktemp("cluster")

    def start(command: str, *arguments: str, **environment: str) -> subprocess.Popen:
        process = subprocess.Popen([sys.executable, "-m", f"distributed.cli.{command}", *arguments],
                                   env={**os.environ, "PYTHONPATH": PATH, "OMP_NUM_THREADS": "1", **environment},
                                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
        stack.callback(process.wait)
        stack.callback(process.kill)
        return process

    with ExitStack() as stack:
        file = folder / "scheduler.json"
        start("dask_scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file))
        address = json.loads(waited(lambda: file.exists() and file.read_text()))["address"]
        assert address.startswith("tcp://")
        workers = {
            name: start("dask_worker", address, "--name", name, "--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0",
                        "--local-directory", str(folder), *offer, CLVQ_CACHE=str(untrained(pipeline, folder / name)))
            for name, offer in {"gpu": ["--resources", "GPU=1"], "plain": []}.items()
        }  # fmt: skip
        with Client(address, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=240)
        yield address, workers, folder


def test_a_run_that_needs_a_gpu_goes_only_to_a_worker_that_has_one(cluster, tmp_path):
    address, _, caches = cluster

    def places(**resources) -> set[str]:
        return {place.name for _, place in clvq.run_parallel(clvq.cache_folder, [()] * 12, scheduler=address, resources=resources)}

    assert places(GPU=1) == {"gpu"}
    assert places() == {"gpu", "plain"}
    found = clvq.run_sweep(runs(3, epochs=3), tmp_path / "sweep", scheduler=address, threads=1, resources={"GPU": 1})
    assert found["run"].nunique() == len(done(tmp_path / "sweep")) == 3
    assert {name: len(list((caches / name).glob("training_summary-*/*.parquet"))) for name in ("gpu", "plain")} == {"gpu": 3, "plain": 0}


def test_the_module_called_as_a_command_reaches_a_cluster(cluster, tmp_path):
    path, folder = write_sweep(tmp_path / "grid.yaml", grid={"seed": [0, 1]}, epochs=1), tmp_path / "sweep"
    command = [sys.executable, "-m", "clvq_app", "sweep", str(path), "-o", str(folder), "--scheduler", cluster[0]]
    process = subprocess.run(command, env={**os.environ, "PYTHONPATH": PATH}, capture_output=True, text=True, timeout=240)
    assert process.returncode == 0, process.stderr[-2000:]
    assert len(done(folder)) == 2


def test_a_worker_that_is_killed_in_the_middle_loses_no_run(cluster, straight, tmp_path):
    address, workers, _ = cluster
    folder, killed = tmp_path / "sweep", []

    def kill() -> None:
        with Client(address, set_as_default=False) as client:
            waited(lambda: done(folder))
            names = {place: worker["id"] for place, worker in client.scheduler_info()["workers"].items()}
            busy = [names[place] for place, calls in client.processing().items() if calls]
            killed.append((busy[-1], len(done(folder))))
            workers[busy[-1]].send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    found = clvq.run_sweep(runs(6, epochs=4), folder, scheduler=address, threads=1)
    killer.join()
    (name, finished) = killed[0]
    assert workers[name].wait(60) == -signal.SIGKILL and 1 <= finished < 6
    assert [worker.poll() is None for worker in workers.values()].count(True) == 1
    assert len(done(folder)) == found["run"].nunique() == 6
    assert not list(folder.glob("*.error.txt")) and not list(folder.glob(".*"))
    same_results(found, straight[1])
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "results.parquet"), found)


# --- killed sweeps ----------------------------------------------------------------------------------------------------


def write_sweep(path: Path, grid: dict | None = None, runs: list | None = None, **settings) -> Path:
    sweep = {"scale": "smoke", "settings": {**QUICK, **settings}, "grid": grid, "runs": runs}
    path.write_text(json.dumps({name: value for name, value in sweep.items() if value}))  # JSON is YAML
    return path


def kill_in_the_middle(folder: Path, *arguments: str) -> list[psutil.Process]:
    """Start a sweep and kill it once a run is finished; the processes it had started."""
    process = subprocess.Popen([*CLVQ, "sweep", *arguments, "-o", str(folder)], env={**os.environ, "PYTHONPATH": PATH},
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        waited(lambda: done(folder) or process.poll() is not None)
        children = psutil.Process(process.pid).children(recursive=True)
        assert process.poll() is None, "the sweep ended before it could be killed"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return children


def test_a_killed_sweep_goes_on_where_it_was(straight, fresh_cache, tmp_path):
    path, folder = write_sweep(tmp_path / "grid.yaml", grid={"seed": [0, 1, 2, 3]}, epochs=4), tmp_path / "sweep"
    kill_in_the_middle(folder, str(path), "--workers", "0")
    before = done(folder)
    assert 1 <= len(before) < 4
    assert clvq_app.main(["sweep", str(path), "-o", str(folder), "--workers", "0"]) == 0
    after = done(folder)
    assert len(after) == 4 and {name: after[name] for name in before} == before
    same_results(pd.read_parquet(folder / "results.parquet"), straight[1][straight[1]["seed"] < 4])


def test_workers_end_with_the_sweep_that_is_killed(fresh_cache, tmp_path):
    path = write_sweep(tmp_path / "grid.yaml", grid={"seed": list(range(8))}, epochs=4)
    children = kill_in_the_middle(tmp_path / "sweep", str(path), "--workers", "2")
    try:
        assert len(children) >= 2
        left = psutil.wait_procs(children, timeout=120)[1]
        assert not left
    finally:
        for child in filter(psutil.Process.is_running, children):
            child.kill()


# --- runs that fail ---------------------------------------------------------------------------------------------------


def test_a_failed_run_is_reported_with_its_error_while_the_others_finish(fresh_cache, tmp_path, capsys):
    path, folder = write_sweep(tmp_path / "grid.yaml", runs=[DIVERGING, {}]), tmp_path / "sweep"
    bad, good = clvq_app.read_sweep(path)
    command = ["sweep", str(path), "-o", str(folder), "--workers", "0"]
    assert clvq_app.main(command) == 1
    shown = capsys.readouterr().err.strip().splitlines()[-1]
    assert shown.startswith("clvq: 1 of 2 runs failed") and "FloatingPointError" in shown and "1000000000000000.0" in shown
    error = folder / f"{bad.name}.error.txt"
    assert str(error) in shown and "FloatingPointError" in error.read_text() and "Traceback" in error.read_text()
    assert list(done(folder)) == [good.name]
    before, first = done(folder), error.stat().st_mtime_ns
    assert clvq_app.main(command) == 1
    assert error.stat().st_mtime_ns > first and done(folder) == before
    capsys.readouterr()
    assert clvq_app.main([*command, "--dry-run"]) == 0
    states = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert "failed" in states[bad.name] and "done" in states[good.name]


def test_a_run_that_failed_is_done_by_a_later_call_and_its_error_goes(fresh_cache, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("CLVQ_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(RuntimeError, match=r"1 of 1 runs failed.*NotADirectoryError"):
        clvq.run_sweep(runs(1), tmp_path / "sweep", workers=0)
    assert len(list((tmp_path / "sweep").glob("*.error.txt"))) == 1 and not done(tmp_path / "sweep")
    monkeypatch.setenv("CLVQ_CACHE", str(fresh_cache))
    assert clvq.run_sweep(runs(1), tmp_path / "sweep", workers=0)["run"].nunique() == 1
    assert not list((tmp_path / "sweep").glob("*.error.txt")) and len(done(tmp_path / "sweep")) == 1


# --- files of sweeps, and names of runs -------------------------------------------------------------------------------


def test_a_sweep_is_every_combination_of_its_grid_with_each_of_its_runs(tmp_path):
    grid = {"seed": [1, 2, 3], "top_k": 2, "temperature": [0.5, 1]}
    path = write_sweep(tmp_path / "a.yaml", grid, [{"n_codes": 9}, {"top_k": 4}])
    found = clvq_app.read_sweep(path)
    assert len(found) == 12 and len({run.name for run in found}) == 12
    settings = [tuple(run.settings[name] for name in ("n_codes", "seed", "top_k", "temperature")) for run in found]
    assert set(settings) == {(9, s, 2, x) for s in (1, 2, 3) for x in (0.5, 1)} | {(20, s, 4, x) for s in (1, 2, 3) for x in (0.5, 1)}
    assert all(type(run) is clvq.Run and run.scale == "smoke" and run.config.train_sentences == 100 for run in found)
    (path := tmp_path / "b.yaml").write_text("scale: smoke  # all else is left out\n")
    assert clvq_app.read_sweep(path) == [clvq.Run("smoke", {})]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ["{path}"]),
        ("- seed\n", ["{path}", "scale, notebook, settings, grid, runs"]),
        ("scale: [smoke\n", ["{path}", "cannot be read"]),
        ("scale: smok\xe9\n", ["{path}", "cannot be read"]),
        ("scale: huge\n", ["scale", "'huge'", "smoke, laptop"]),
        ("scale: [smoke]\n", ["scale"]),
        ("scale: smoke\ngrids: {seed: [1]}\n", ["{path}", "'grids'", "scale, notebook, settings, grid, runs"]),
        ("scale: smoke\ngrid: {sed: [1]}\n", ["'sed'", "did you mean seed"]),
        ("scale: smoke\ngrid: {n_codes: [many]}\n", ["n_codes", "'many'"]),
        ("scale: smoke\nruns: [{n_codes: 100000}]\n", ["n_codes=100000", "states"]),
        ("scale: smoke\nsettings: {dataset: nowhere.csv}\n", ["nowhere.csv"]),
        ("scale: smoke\nnotebook: nowhere.ipynb\n", ["nowhere.ipynb"]),
        ("scale: smoke\ngrid: [1, 2]\n", ["grid"]),
        ("scale: smoke\ngrid: {seed: []}\n", ["seed"]),
        ("scale: smoke\ngrid: {scale: [smoke, laptop]}\n", ["scale"]),
        ("scale: smoke\nruns: {seed: 1}\n", ["runs"]),
        ("scale: smoke\nruns: [seed]\n", ["runs"]),
        ("scale: smoke\nsettings: [1]\n", ["settings"]),
    ],
)
def test_a_file_that_cannot_be_a_sweep_is_refused_in_one_sentence(refused, tmp_path, text, parts):
    path = tmp_path / "grid.yaml"
    path.write_bytes(text.encode("latin-1"))
    with refused(*(part.format(path=path) for part in parts)):
        clvq_app.read_sweep(path)


def test_a_file_that_is_not_there_is_refused(refused, tmp_path):
    with refused(str(tmp_path / "none.yaml"), "cannot be read"):
        clvq_app.read_sweep(tmp_path / "none.yaml")


def test_equal_runs_have_one_name_and_every_setting_another():
    one = clvq.Run("smoke", QUICK)
    assert clvq.Run("smoke", dict(reversed(QUICK.items()))).name == one.name
    assert clvq.Run("smoke", {**QUICK, "temperature": 1.0, "top_k": None}).name == one.name  # the scale's own
    changed = [dict(seed=1), dict(temperature=2.0), dict(train_sentences=99), dict(folds=4), dict(dataset="news"), dict(memory="none")]
    names = [clvq.Run("smoke", {**QUICK, **settings}).name for settings in changed] + [clvq.Run("laptop", QUICK).name]
    assert len({one.name, *names}) == 8
    settings = {"seed": 1, "epochs": 2}, {"epochs": 2, "seed": 1}, {"seed": 1}
    of_notebook = [clvq_app.NotebookRun("smoke", own, str(METHOD)).name for own in settings]
    assert of_notebook[0] == of_notebook[1] != of_notebook[2]


def test_a_run_has_another_name_for_other_text(tmp_path):
    names = []
    for end in ("", "!"):
        path = tmp_path / f"{len(end)}" / "reviews.csv"
        path.parent.mkdir()
        pd.DataFrame({"text": [f"sentence number {i}{end}" for i in range(40)], "label": [i % 2 for i in range(40)]}).to_csv(path)
        names.append(clvq.Run("smoke", {"dataset": str(path)}).name)
    assert names[0] != names[1]


def test_runs_with_equal_settings_are_done_once(straight, tmp_path):
    path = write_sweep(tmp_path / "grid.yaml", grid={"seed": [0, 0]}, runs=[{}, {"temperature": 1}], epochs=4)
    found = clvq.run_sweep(clvq_app.read_sweep(path), tmp_path / "sweep", workers=0)
    assert len(done(tmp_path / "sweep")) == found["run"].nunique() == 1
    same_results(found, straight[1][straight[1]["seed"] == 0])


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def temperatures(straight, tmp_path_factory):
    """A file of two temperatures and two seeds, and the folder where it was swept."""
    folder = tmp_path_factory.mktemp("temperatures")
    path = write_sweep(folder / "grid.yaml", grid={"temperature": [0.5, 1], "seed": [0, 1]}, epochs=1)
    clvq.run_sweep(clvq_app.read_sweep(path), folder / "sweep", workers=0)
    return path, folder / "sweep"


def test_results_have_a_row_a_measurement_with_all_settings(straight):
    results = straight[1]
    assert results["run"].nunique() == 6 and set(results["seed"]) == set(range(6))
    assert set(results["scale"]) == {"smoke"} and set(results["n_codes"]) == {20} and {"memory", "learning_rate"} <= set(results)
    assert results.groupby("run")["metric"].agg(set).map(lambda names: {"perplexity", "accuracy nothing", "effective_k"} <= names).all()
    pd.testing.assert_frame_equal(pd.read_parquet(straight[0] / "results.parquet"), results)


def test_a_dry_run_prints_runs_and_what_is_done_and_does_nothing(temperatures, tmp_path, capsys):
    path, folder = temperatures
    more = write_sweep(tmp_path / "more.yaml", grid={"temperature": [0.5, 1, 2], "seed": [0, 1]}, epochs=1)
    before = {file.name for file in folder.iterdir()}
    assert clvq_app.main(["sweep", str(more), "-o", str(folder), "--dry-run"]) == 0
    shown = capsys.readouterr().out
    for run in clvq_app.read_sweep(more):
        line = next(line for line in shown.splitlines() if run.name in line)
        assert ("to do" in line) == (run.settings["temperature"] == 2) != ("done" in line)
    assert "6 runs, 4 of them done" in shown
    assert {file.name for file in folder.iterdir()} == before
    assert clvq_app.main(["sweep", str(path), "-o", str(tmp_path / "new"), "--dry-run"]) == 0
    assert "4 runs, 0 of them done" in capsys.readouterr().out and not (tmp_path / "new").exists()


def test_results_are_printed_as_means_over_seeds(temperatures, capsys):
    results = pd.read_parquet(temperatures[1] / "results.parquet")
    assert clvq_app.main(["results", str(temperatures[1]), "--metric", "perplexity", "--metric", "effective_k"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["temperature", "perplexity", "effective_k", "seeds"] and len(lines) == 3
    for line in lines[1:]:
        own = results[(results["temperature"] == float(line[0])) & results["epoch"].isna()]
        mean = own.groupby("metric")["value"].mean()
        assert [float(x) for x in line[1:3]] == pytest.approx([mean["perplexity"], mean["effective_k"]], rel=1e-3) and line[3] == "2"


@pytest.mark.parametrize(
    ("name", "value", "left"),
    [("temperature", "0.5", 2), ("temperature", "1", 2), ("seed", "1", 2), ("finetune", "true", 4), ("scale", "smoke", 4)],
)
def test_results_are_filtered_and_exported(temperatures, tmp_path, capsys, name, value, left):
    assert clvq_app.main(["results", str(temperatures[1]), "--where", name, value, "--csv", str(tmp_path / "all.csv")]) == 0
    found, results = pd.read_csv(tmp_path / "all.csv"), pd.read_parquet(temperatures[1] / "results.parquet")
    assert found["run"].nunique() == left and set(found[name]) == {clvq.parse_value(name, value)}
    own = results[results["run"].isin(found["run"])]
    assert len(own) == len(found) and found["value"].tolist() == pytest.approx(own["value"].tolist())
    assert f"{len(own):,} measurements of {left} runs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["results", "{sweep}", "--where", "temperature", "7"], "no result has these values"),
        (["results", "{sweep}", "--where", "warmth", "1"], "no column 'warmth'"),
        (["results", "{sweep}", "--metric", "perplexities"], "no metric 'perplexities'"),
        (["results", "{sweep}/none"], "no folder of a sweep"),
        (["sweep", "{sweep}/none.yaml"], "cannot be read"),
        (["sweep", "{grid}", "--resource", "GPU", "many"], "many"),
    ],
)
def test_what_the_commands_cannot_serve_is_said_in_one_line_with_exit_code_2(temperatures, capsys, arguments, part):
    assert clvq_app.main([text.format(grid=temperatures[0], sweep=temperatures[1]) for text in arguments]) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and error.startswith("clvq: ") and part in error


@pytest.mark.slow
@pytest.mark.notebooks
def test_a_sweep_over_a_notebook_has_the_numbers_it_hands_on_and_the_notebook(pipeline, tmp_path, capsys):
    corpus = pipeline.corpus.assign(label=[pipeline.label_names[label] for label in pipeline.corpus["label"]])
    corpus.to_csv(tmp_path / "reviews.csv")
    own = {"dataset": str(tmp_path / "reviews.csv"), "model": str(pipeline.model_folder), "finetune": False, "epochs": 2}
    path = tmp_path / "grid.yaml"
    path.write_text(json.dumps({"scale": "smoke", "notebook": str(METHOD), "settings": own, "grid": {"n_codes": [12]}}))
    assert clvq_app.main(["sweep", str(path), "-o", str(tmp_path / "sweep"), "--workers", "0"]) == 0
    results = pd.read_parquet(tmp_path / "sweep" / "results.parquet")
    assert results["epoch"].isna().all() and set(results["n_codes"]) == {12}
    (run,) = clvq_app.read_sweep(path)
    value, here = results[results["run"] == run.name].set_index("metric")["value"], clvq.Pipeline(run.config)
    assert (value["n_codes"], value["n_train"], value["n_test"]) == (12, 100, 60)
    assert value["perplexity"] == pytest.approx(here.history.sort_values("validation_loss")["validation_perplexity"].iloc[0])
    assert value["accuracy"] == pytest.approx(here.accuracy)
    notebook = json.loads((tmp_path / "sweep" / f"{run.name}.ipynb").read_text("utf8"))
    assert notebook["metadata"]["clvq"]["parameters"] == run.settings
    assert "codes_used" in capsys.readouterr().out


# --- means over seeds, and studies ------------------------------------------------------------------------------------


def test_means_over_seeds_have_students_interval():
    values = {("b", None): [1.0, 4.0, 2.5], ("a", None): [3.0, 3.5], ("a", 7.0): [5.0]}
    rows = [
        dict(run=f"{kind}{share}{i}", kind=kind, share=share, seed=i, metric=metric, epoch=math.nan, value=sign * value)
        for (kind, share), own in values.items()
        for i, value in enumerate(own)
        for metric, sign in (("loss", 1), ("gain", -1))
    ]
    rows += [{**row, "epoch": 1.0, "value": 1e6} for row in rows] + [{**row, "metric": "other"} for row in rows]
    found = clvq.seed_means(pd.DataFrame(rows), ["kind", "share"], ["gain", "loss", "missing"])
    assert found["kind"].tolist() == ["b", "a", "a"] and found["seeds"].tolist() == [3, 2, 1]
    assert found["share"].isna().tolist() == [True, True, False] and "missing" not in found and "other" not in found
    for (_, row), own in zip(found.iterrows(), values.values(), strict=True):
        assert row["loss"] == pytest.approx(np.mean(own)) and row["gain"] == pytest.approx(-np.mean(own))
        if len(own) == 1:
            assert math.isnan(row["loss_low"]) and math.isnan(row["loss_high"])
            continue
        low, high = t.interval(0.95, len(own) - 1, np.mean(own), np.std(own, ddof=1) / math.sqrt(len(own)))
        assert (row["loss_low"], row["loss_high"]) == pytest.approx((low, high))
        assert (row["gain_low"], row["gain_high"]) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("scale", "sizes"), [("smoke", [9, 3, 5, 7, 5, 6, 10, 4]), ("laptop", [10, 3, 5, 7, 5, 7, 10, 4])])
def test_every_setting_of_the_studies_can_run_and_is_there_once(scale, sizes):
    studies = clvq.studies(clvq.configure(scale, **clvq.STUDY[scale]))
    assert [len(study) for study in studies.values()] == sizes
    for study in studies.values():
        configs = [clvq.configure(scale, **clvq.STUDY[scale], **settings) for settings in study]
        assert len({config.to_json() for config in configs}) == len(configs)
        for config in configs:
            clvq.Pipeline(config).check()


def test_the_studies_have_the_values_of_the_papers_tables():
    studies = clvq.studies(clvq.configure("paper"))
    names = {"adaptive": "adaptive (limited)", "complete": "adaptive (complete)"}
    tables = {
        2: ("sampling", lambda config: f"{config.temperature:g}/{config.top_k}"),
        3: ("start", lambda config: config.start),
        7: ("codes", lambda config: str(config.n_codes)),
        8: ("alpha", lambda config: names.get(config.alpha, f"fixed {config.fixed_alpha}")),
        9: ("commitment", lambda config: f"{config.commitment:g}"),
        10: ("faithfulness", lambda config: f"{config.top_k}/{config.temperature:g}"),
    }
    for table, (study, name) in tables.items():
        found = {name(clvq.configure("paper", **settings)) for settings in studies[study]}
        hotter = {"30/5", "300/5"} if table == 2 else set()
        assert found == set(clvq.published(table=table)["value"]) | hotter, table


# --- the pipeline -----------------------------------------------------------------------------------------------------


def test_a_pipeline_knows_what_is_cached_and_asking_computes_nothing(fresh_cache):
    made = clvq.Pipeline(clvq.configure("smoke", **QUICK))
    assert made.is_cached("classifier") and made.states_call("train").path.exists()
    before = set(fresh_cache.iterdir())
    assert not made.is_cached("training_summary") and not made.is_cached("vqvae", *made.layers)
    assert set(fresh_cache.iterdir()) == before
    assert made.folder("vqvae", *made.layers).is_dir()
    again = clvq.Pipeline(made.config)
    assert again.is_cached("vqvae", *again.layers) and not again.is_cached("training_summary")
    assert len(again.training_summary) > 50 and clvq.Pipeline(made.config).is_cached("training_summary")
    assert not made.changed(seed=1).is_cached("training_summary")


def test_what_is_precomputed_is_cached_with_all_it_reads_from_and_failures_wait(fresh_cache, monkeypatch):
    monkeypatch.setenv("CLVQ_WORKERS", "0")
    good, bad = (clvq.Pipeline(clvq.configure("smoke", **QUICK | settings)) for settings in ({}, DIVERGING))
    clvq.precompute([(bad, "training_summary"), (good, "training_summary"), (good, "vqvae", *good.layers)])
    assert good.is_cached("training_summary") and not bad.is_cached("training_summary")
    with pytest.raises(FloatingPointError):
        _ = bad.training_summary
    before = {path: path.stat().st_mtime_ns for path in fresh_cache.iterdir()}
    clvq.precompute([(good, "training_summary")])
    assert {path: path.stat().st_mtime_ns for path in fresh_cache.iterdir()} == before


def test_each_step_is_precomputed_once_and_after_what_it_reads_from(pipeline, tmp_path, monkeypatch):
    order = []

    def compute(config, cache, step, *arguments):
        order.append((config.seed, step))
        clvq.Pipeline(config, cache).call(step, *arguments).path.mkdir(parents=True)

    monkeypatch.setattr(clvq, "compute", compute)
    monkeypatch.setenv("CLVQ_WORKERS", "0")
    fresh = clvq.Pipeline(pipeline.config.replace(seeds=2), tmp_path)
    clvq.precompute([(run, "faithfulness") for run in fresh.over_seeds])
    steps = [step for _, step in order]
    assert steps[0] == "classifier" and set(steps[-2:]) == {"faithfulness"}
    times = {"classifier": 1, "states": 2, "salience_at": 1, "initial_codebook": 4, "vqvae": 6, "faithfulness": 2}
    assert {name: steps.count(name) for name in times} == times
    assert steps.index("states") < steps.index("initial_codebook") < steps.index("vqvae") < steps.index("faithfulness")


def test_seeds_computed_by_workers_are_those_computed_here(straight, fresh_cache, monkeypatch):
    monkeypatch.setenv("CLVQ_WORKERS", "2")
    made = clvq.Pipeline(clvq.configure("smoke", **{**QUICK, "epochs": 4}, seed=0, seeds=2))
    found = made.of_seeds("training_summary")
    expected = [pd.read_parquet(straight[0] / f"{run.name}.parquet") for run in runs(2, epochs=4)]
    assert len(found) == len(expected[0]) + len(expected[1])
    parts = found.iloc[: len(expected[0])], found.iloc[len(expected[0]) :]
    for part, own in zip(parts, expected, strict=True):
        same_results(part.assign(run="a"), own.assign(run="a"))
    assert made.is_cached("training_summary") and made.over_seeds[1].is_cached("training_summary")


def test_what_is_measured_is_the_history_and_what_evaluation_and_protocol_give(pipeline):
    measured, history, model = pipeline.training_summary, pipeline.history, pipeline.clvqvae
    curves = measured.dropna(subset="epoch")
    table = curves.pivot(index="epoch", columns="metric", values="value").sort_index()
    expected = history.set_index("epoch").astype(float)
    pd.testing.assert_frame_equal(table[expected.columns], expected, check_index_type=False, check_names=False)
    end = measured[measured["epoch"].isna()].set_index("metric")["value"]
    assert end.index.is_unique
    acts, source = pipeline.activations("train"), pipeline.layers[0]
    held = clvq.split_sentences(len(acts.lengths), pipeline.config)[1]
    for name, value in clvq.evaluate(model, acts, held, pipeline.config).items():
        assert end[name] == pytest.approx(value, rel=1e-3), name
    best = history["validation_loss"].idxmin()
    assert (end["best_epoch"], end["epochs"]) == (history.loc[best, "epoch"], history["epoch"].max())
    assert end["training_seconds"] == pytest.approx(history["seconds"].sum())
    for found in (clvq.sampling(model, acts.states[source][acts.rows(held)]), clvq.references(model, acts, pipeline.config)):
        assert {name: end[name] for name in found} == pytest.approx(found)
    summary = clvq.summarise(clvq.faithfulness([model], pipeline.trial), pipeline.config)
    summary = summary[summary["way"] != "subtraction"]
    assert len(summary) == end.index.str.startswith("accuracy ").sum() > 10
    for row in summary.to_dict("records"):
        name = "nothing" if row["removed"] == "nothing" else f"{row['removed']} {row['way']}"
        assert [end[f"{value} {name}"] for value in ("accuracy", "accuracy_sd_folds", "flipped")] == pytest.approx(
            [row["accuracy"], row["accuracy_sd_folds"], row["flipped"]], nan_ok=True), name  # fmt: skip


def fresh_probes(trial: clvq.Trial, layer: int) -> clvq.Probes:
    return clvq.train_probes(trial.summaries(layer)[None], trial.labels, trial.folds, trial.config)


def test_probes_that_are_kept_are_those_that_are_trained(fresh_cache):
    made = clvq.Pipeline(clvq.configure("smoke", **QUICK))
    expected = {layer: fresh_probes(made.trial, layer) for layer in made.layers}
    for trial in (made.trial, clvq.Pipeline(made.config).trial):
        for layer in made.layers:
            assert all(torch.equal(*pair) for pair in zip(trial.probes(layer), expected[layer], strict=True))
        assert len(list(fresh_cache.glob("probe_weights-*/result.safetensors"))) == 2
    other = made.changed(probe_epochs=1).trial.probes(made.layers[0])
    assert not torch.equal(other[0], expected[made.layers[0]][0])


def test_probes_of_states_in_another_precision_are_others(pipeline):
    precision = "bfloat16"
    trial, layer = pipeline.changed(inference_precision=precision).trial, pipeline.layers[0]
    assert not torch.equal(trial.summaries(layer), pipeline.trial.summaries(layer))
    pipeline.trial.probes(layer)
    assert all(torch.equal(*pair) for pair in zip(trial.probes(layer), fresh_probes(trial, layer), strict=True))


def test_the_cost_of_a_training_is_known_before_it(pipeline):
    acts, cost = pipeline.activations("train"), pipeline.cost
    fitted = clvq.split_sentences(len(acts.lengths), pipeline.config)[0]
    assert cost["states"] == pytest.approx(len(acts.rows(fitted)), rel=0.01)  # the tokenizer may lose words
    assert cost["disk_mib"] == pytest.approx(len(acts.tokens) * 7 * 384 * 2 / 2**20, rel=0.01)  # layers, width, bytes
    half, twice = pipeline.changed(train_share=0.5), pipeline.changed(epochs=4)
    assert half.cost["gflop"] == pytest.approx(cost["gflop"] / 2, rel=0.15) and twice.cost["gflop"] == pytest.approx(2 * cost["gflop"])


def test_a_file_that_changed_is_hashed_and_read_again(tmp_path):
    path = tmp_path / "reviews.csv"

    def write(word: str) -> str:
        pd.DataFrame({"text": [f"{word} number {i}" for i in range(40)], "label": [i % 2 for i in range(40)]}).to_csv(path)
        return clvq.hash_file(path)

    config = clvq.configure("smoke", dataset=str(path))
    one, before = write("sentence"), clvq.Pipeline(config).corpus["text"]
    time.sleep(0.02)
    other, after = write("question"), clvq.Pipeline(config).corpus["text"]
    assert one != other
    assert before.str.startswith("sentence").all() and after.str.startswith("question").all()
