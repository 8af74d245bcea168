"""Nothing is lost: runs that are killed, files that are damaged, settings that are forged, disks that are full.

KILLS=20 python -m pytest tests/test_trust.py -k killed     more kills than the usual three
"""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EPOCHS, ROOT, read_points, rows_but_seconds, run_command

import cnn_cifar10
import rnn_mnist
import utils
import visualize

KILLS = int(os.environ.get("KILLS", "3"))
NAME = "synthetic_mnist_gru_hidden8_adam_lr0.01_batch64_seed0"
FLAGS = "--data synthetic --cell gru --hidden-size 8 --lr 0.01 --epochs 4"

# A run that is killed


def noise_digits(images=1280):
    """A synthetic MNIST of noise; nothing here starts a thread, so that a process that made it can be forked."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(256, size=(images + 100, 28, 28), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(10, size=images + 100))
    return utils.Dataset(
        "mnist", "synthetic", utils.DIGITS, pixels[:images], labels[:images], pixels[images:], labels[images:]
    )


def train_until_killed(runs_dir, data, kill_in_write):
    """Train in a forked process; kill_in_write: the call that writes or renames in which it kills itself, or None."""
    child = os.fork()
    if child:
        return child
    calls = iter(range(10**6))

    def deadly(function):
        def call(*args):
            if next(calls) == kill_in_write:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    utils.synthetic_digits = lambda: data
    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    sys.argv = ["rnn_mnist.py", *FLAGS.split(), "--runs-dir", str(runs_dir)]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        utils.run_script(rnn_mnist.main)
    except SystemExit as ended:
        os._exit(ended.code)


def whole_files_only(folder):
    """Whether what stands under a real name is complete."""
    for name in ("config.json", "metrics.csv", "checkpoint.pt"):
        path = folder / name
        if path.exists() and name == "checkpoint.pt":
            assert zipfile.ZipFile(path).testzip() is None
        elif path.exists():
            assert path.read_text().endswith("\n")


def torture(folder, kills):
    """Train a run undisturbed, and others whose processes are killed again and again, as often as asked in all."""
    data, rng, done = noise_digits(), random.Random(0), 0
    torch.optim.SGD([torch.zeros(1)], lr=0.1)  # what the first optimizer imports, no process need import again
    status = os.waitpid(train_until_killed(folder / "undisturbed", data, None), 0)[1]
    assert status == 0
    while done < kills:
        done += train_under_fire(folder / f"killed_from_{done}", data, rng, kills - done)
    print(f"killed {done} times")


def train_under_fire(runs_dir, data, rng, kills):
    """Start a run again and again until it ends; return how often it was killed, every other time within a write."""
    done = 0
    while True:
        in_write = done % 2 == 0
        child = train_until_killed(runs_dir, data, rng.randrange(14) if in_write and done < kills else None)
        if not in_write and done < kills:
            time.sleep(rng.uniform(0.2, 2.0))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        whole_files_only(runs_dir / "rnn_mnist" / NAME)
        done += os.WIFSIGNALED(status)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return done


def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(tmp_path):
    program = f"import pathlib, test_trust; test_trust.torture(pathlib.Path({str(tmp_path)!r}), {KILLS})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100 + 10 * KILLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"killed {KILLS} times\n"
    for folder in tmp_path.glob("killed*"):
        assert_same_end(folder / "rnn_mnist" / NAME, tmp_path / "undisturbed" / "rnn_mnist" / NAME)


def assert_same_end(folder, undisturbed):
    assert rows_but_seconds(folder) == rows_but_seconds(undisturbed)
    points = read_points(folder)
    assert max(Counter((tag, step) for tag, step, _ in points).values()) == 1, "no epoch appears twice"
    assert sorted(points) == sorted(read_points(undisturbed))
    ends = [utils.load_checkpoint(each) for each in (folder, undisturbed)]
    for part in ("model", "random"):
        torch.testing.assert_close(*(end[part] for end in ends), rtol=0, atol=0)
    torch.testing.assert_close(*(end["optimizer"]["state"] for end in ends), rtol=0, atol=0)
    assert not list(folder.rglob("*.part")), "leftovers are swept up"


@pytest.fixture
def train(call, tmp_path, monkeypatch):
    """Call rnn_mnist.py on a little noise; returns (exit status, standard output, standard error)."""
    monkeypatch.setattr(utils, "synthetic_digits", noise_digits)
    return lambda *flags, runs_dir=tmp_path: call(rnn_mnist, *FLAGS.split(), "--runs-dir", runs_dir, *flags)


@pytest.mark.parametrize("full_at", [3, 8, 11])
def test_a_disk_that_fills_up_costs_nothing_that_was_finished(train, tmp_path, monkeypatch, full_at):
    calls, fsync = iter(range(10**6)), os.fsync

    def full_disk(file):
        if next(calls) == full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        status, _, error = train()
    assert status == 1
    assert error == "rnn_mnist.py: error: No space left on device; free some space and run the same command again\n"
    whole_files_only(tmp_path / "rnn_mnist" / NAME)
    assert not list(tmp_path.rglob("*.part"))
    assert train()[0] == 0
    assert train(runs_dir=tmp_path / "undisturbed")[0] == 0
    assert_same_end(tmp_path / "rnn_mnist" / NAME, tmp_path / "undisturbed" / "rnn_mnist" / NAME)


def test_a_reader_that_goes_away(tmp_path):
    command = [sys.executable, "rnn_mnist.py", *FLAGS.split(), "--epochs", "500", "--batch-size", "1000"]
    command += ["--runs-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1)
    next(line for line in process.stdout if line.startswith("  2/500"))
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert error.count("\n") == 1
    assert "the same command continues" in error
    assert len(utils.read_metrics(next((tmp_path / "rnn_mnist").iterdir()))) >= 2


def test_termination_and_a_terminal_that_goes_away_end_a_run_but_for_nohup():
    program = """
import os, signal, sys, utils
statuses = []
for number, handling in ((1, signal.SIG_IGN), (1, signal.SIG_DFL), (15, signal.SIG_DFL)):
    signal.signal(number, handling)
    try:
        utils.run_script(lambda: os.kill(os.getpid(), number))
    except SystemExit as ended:
        statuses.append(ended.code)
sys.exit(statuses != [0, 143, 143])
"""
    done = run_command("-c", program)
    assert done.returncode == 0
    assert done.stderr.count("the same command continues") == 1, "the second is no longer read"


def test_a_home_that_cannot_be_written(rnn_run, tmp_path):
    home = {**os.environ, "HOME": "/proc/none", "XDG_CACHE_HOME": "/proc/none", "TMPDIR": str(tmp_path)}
    command = [sys.executable, "visualize.py", str(rnn_run[1]), "--figures", "curves", "--output-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, env=home, timeout=100)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "curves.png").exists()


def test_a_runs_folder_that_is_read_only(train, tmp_path, monkeypatch):
    """Root may write everywhere, so the refusal is invented."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, _, error = train()
    assert status == 2
    assert f"Read-only file system: {tmp_path / 'rnn_mnist' / NAME}; name a file or folder that can be used" in error


def test_a_run_folder_that_is_a_file_or_another_experiment(train, tmp_path):
    folder = tmp_path / "rnn_mnist" / NAME
    folder.parent.mkdir()
    folder.write_text("mine")
    status, _, error = train()
    assert (status, error.count("\n")) == (2, 1)
    assert str(folder) in error
    assert folder.read_text() == "mine"
    folder.unlink()
    assert train("--epochs", "1")[0] == 0
    folder.rename(folder.with_name(NAME.replace("seed0", "seed1")))
    before = {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()}
    status, _, error = train("--seed", "1")
    assert (status, error.count("\n")) == (2, 1)
    assert "holds another experiment; --fresh starts over, or use another --runs-dir" in error
    assert {path: path.read_bytes() for path in folder.parent.rglob("*") if path.is_file()} == before


# Settings that are forged


@pytest.fixture
def finished_run(train, tmp_path):
    assert train("--epochs", "1", runs_dir=tmp_path / "finished")[0] == 0
    return next((tmp_path / "finished" / "rnn_mnist").iterdir())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("script", "../../somewhere"),
        ("dataset", "../../etc"),
        ("cell", "transformer"),
        ("cell", ["rnn"]),
        ("hidden_size", 10**12),
        ("hidden_size", "4"),
        ("hidden_size", 4.5),
        ("optimizer", "rm -rf"),
        ("lr", -1.0),
        ("lr", math.inf),
        ("lr", math.nan),
        ("momentum", 1.0),
        ("batch_size", 0),
        ("seed", True),
        ("epochs", 10**9),
        ("data_source", "imaginary"),
        ("data_dir", 3),
        ("device", "tpu"),
        ("precision", "fp8"),
        ("threads", 10**6),
        ("parameters", None),
        ("dataset", "cifar10"),
        ("script", ["rnn_mnist"]),
    ],
)
def test_settings_that_no_run_can_have_are_refused(finished_run, tmp_path, train, call, name, value):
    folder = tmp_path / "rnn_mnist" / finished_run.name
    folder.mkdir(parents=True)
    config = {**utils.read_config(finished_run), name: value}
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    (folder / "metrics.csv").write_bytes((finished_run / "metrics.csv").read_bytes())
    (folder / "config.json").write_text(json.dumps(config))
    torch.save({**checkpoint, "config": config}, folder / "checkpoint.pt")
    for status, _, error in (call(visualize, folder), train()):
        assert status == 2
        assert "is not of this project" in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"history": None},
        {"history": [{"epoch": 1}]},
        {"history": [{**dict.fromkeys(utils.METRICS, 1.0), "epoch": 2}]},
        {"events": ["a"]},
        {"history": [{**dict.fromkeys(utils.METRICS, math.nan), "epoch": 1}]},
        {"events": {"a": "b"}},
        {"events": {"a": -1}},
        {"random": torch.zeros(3)},
        {"optimizer": {"state": {0: {"step": torch.tensor(1.0), "exp_avg": torch.zeros(3)}}, "param_groups": []}},
        {"optimizer": None},
        {"model": {}},
    ],
)
def test_a_checkpoint_that_is_inconsistent_is_refused(finished_run, tmp_path, train, change):
    folder = tmp_path / "rnn_mnist" / finished_run.name
    folder.mkdir(parents=True)
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, **change}, folder / "checkpoint.pt")
    status, _, error = train()
    assert status == 2
    assert "run its training again with --fresh" in error
    assert error.count("\n") == 1
    assert train("--fresh", "--epochs", "1")[0] == 0


def test_visualize_downloads_nothing(finished_run, tmp_path, call):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.csv", "checkpoint.pt"):
        (folder / name).write_bytes((finished_run / name).read_bytes())
    elsewhere = tmp_path / "elsewhere"
    config = {**utils.read_config(finished_run), "data_source": "real", "data_dir": str(elsewhere)}
    (folder / "config.json").write_text(json.dumps(config))
    status, _, error = call(visualize, folder, "--figures", "confusion")
    assert status == 2
    assert f"MNIST is not in {elsewhere}" in error
    assert not elsewhere.exists()


# Honest numbers


def test_every_place_shows_the_same_figure(rnn_run, tmp_path, call):
    done, folder = rnn_run
    run = visualize.FinishedRun(folder)
    last = run.metrics[-1]
    points = {(tag, step): value for tag, step, value in read_points(folder)}
    for tag, name in utils.TENSORBOARD_TAGS.items():
        assert points[tag, EPOCHS] == float(np.float32(last[name]))
    assert f"test accuracy {last['test_accuracy']:.2f} % after epoch {EPOCHS}" in done.stdout
    assert call(visualize, folder, folder, "--figures", "results", "--output-dir", tmp_path)[0] == 0
    row = visualize.read_table(tmp_path / "results.csv", {"mean": float, "setting": str, "seeds": int}, bool)[0]
    assert row["mean"] == pytest.approx(last["test_accuracy"], abs=1e-9)
    torch.set_num_threads(run.config["threads"])
    data = run.data
    again = utils.evaluate(run.model, data.test_images, data.test_labels, run.config["precision"])
    assert again == pytest.approx((last["test_loss"], last["test_accuracy"]), abs=1e-12)


def test_config_says_what_the_numbers_depend_on(rnn_run):
    config = utils.read_config(rnn_run[1])
    assert config["versions"].keys() == {"python", "torch", "torchvision"}
    assert config["versions"]["torch"] == str(torch.__version__)
    assert config["versions"]["python"] == sys.version.split()[0]
    assert config.keys() >= {"data_source", "precision", "device", "threads", "commit"}
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (config["commit"] or "").removesuffix("-dirty") == git.stdout.strip()


# Properties, over seeded random cases


def random_settings(rng, script):
    settings = {"dataset": "mnist", "optimizer": rng.choice(["adam", "sgd"]), "lr": 10 ** rng.uniform(-6, -2)}
    settings["momentum"] = rng.choice([0.0, 0.9]) if settings["optimizer"] == "sgd" else 0.0
    settings |= {"batch_size": rng.randint(1, 200), "seed": rng.randrange(2**31)}
    if script is rnn_mnist:
        return settings | {"cell": rng.choice(["rnn", "gru", "lstm"]), "hidden_size": rng.randint(1, 64)}
    return settings | {"dataset": rng.choice(["cifar10", "mnist"])}


@pytest.mark.parametrize("case", range(8))
def test_any_configuration_trains_a_step_and_reloads_to_identical_outputs(case, tmp_path, monkeypatch, call):
    rng = random.Random(case)
    script = (rnn_mnist, cnn_cifar10)[case % 2]
    settings = random_settings(rng, script)
    data = noise_digits(settings["batch_size"])
    pictures = data._replace(name="cifar10", train_images=data.train_images.repeat(1, 2, 2)[:, :32, :32])
    pictures = pictures._replace(test_images=data.test_images.repeat(1, 2, 2)[:, :32, :32])
    monkeypatch.setattr(utils, "synthetic_digits", lambda: data)
    monkeypatch.setattr(utils, "synthetic_pictures", lambda: pictures)
    kept = []
    monkeypatch.setattr(utils, "evaluate", lambda model, *_: (kept.append(model), (1.0, 10.0))[1])
    names = [name for name in utils.SETTINGS[script.__name__] if script is cnn_cifar10 or name != "dataset"]
    flags = [f"--{name.replace('_', '-')}={settings[name]}" for name in names]
    status, _, error = call(script, "--data", "synthetic", "--epochs", 1, "--runs-dir", tmp_path, *flags)
    assert (status, error) == (0, "")
    run = visualize.FinishedRun(next((tmp_path / script.__name__).iterdir()))
    assert {name: run.config[name] for name in settings} == settings
    images = (pictures if settings["dataset"] == "cifar10" else data).test_images
    outputs = [utils.predict(model, images, run.config["precision"]) for model in (kept[0], run.model)]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


@pytest.mark.parametrize("case", range(20))
def test_any_grid_is_the_product_of_its_values_without_repeats(case):
    rng = random.Random(case)
    values = {"optimizer": ["adam"], "momentum": [0.0], "dataset": ["mnist"]}
    values["lr"] = [rng.choice([0.1, 0.01, 1e-3]) for _ in range(rng.randint(1, 4))]
    values["seed"] = [rng.randrange(4) for _ in range(rng.randint(1, 4))]
    values["batch_size"] = [rng.choice([32, 64]) for _ in range(rng.randint(1, 3))]
    values["hidden_size"] = [rng.randint(1, 5) for _ in range(rng.randint(1, 4))]
    values["cell"] = [rng.choice(["rnn", "gru"]) for _ in range(rng.randint(1, 3))]
    grid = utils.requested_settings("rnn_mnist", SimpleNamespace(report=False, **values), [])
    assert len(grid) == math.prod(len(set(each)) for each in values.values())
    assert len({json.dumps(row) for row in grid}) == len(grid)
    assert all(row[name] in values[name] for row in grid for name in values)
