import itertools
import logging
import os
import shutil
import subprocess
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import cnn_cifar10  # noqa: E402
import rnn_mnist  # noqa: E402
import utils  # noqa: E402

EPOCHS = {"cnn_run": 1, "rnn_run": 2}  # of the runs that many tests look at
REAL_FILES = ("cifar-10-batches-py/test_batch", "MNIST/raw/train-images-idx3-ubyte")
HAS_REAL_DATA = all((ROOT / "data" / file).exists() for file in REAL_FILES)
CONFIGS = {"cnn_cifar10": cnn_cifar10.Config, "rnn_mnist": rnn_mnist.Config}


@pytest.fixture(scope="session")
def real_data():
    if not HAS_REAL_DATA:
        pytest.skip("data/ does not hold the real CIFAR-10 and MNIST; the training scripts download them there")
    return ROOT / "data"


# Calling the scripts

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # before a test changes it; a thread each for two that run at once
torch.set_num_threads(1)
BESIDE, POOL, FOLDER = {}, ThreadPoolExecutor(1), TemporaryDirectory()


def beside(function):
    """Make a session fixture of what function(folder) returns: it starts scripts, beside the tests that come before."""
    BESIDE[function.__name__] = function
    return pytest.fixture(scope="session", name=function.__name__)(lambda: started(function.__name__).result())


@cache
def started(name):
    folder = Path(FOLDER.name) / name
    folder.mkdir()
    return POOL.submit(BESIDE[name], folder)


def pytest_collection_modifyitems(config, items):
    awaited = {i: BESIDE.keys() & {*i.fixturenames, i.name.endswith("_run]") and "default_runs"} for i in items}
    items.sort(key=lambda item: bool(awaited[item]))
    for name in itertools.chain(*map(awaited.get, items)) if not config.option.collectonly else ():
        started(name)


def pytest_sessionfinish():
    POOL.shutdown(wait=False, cancel_futures=True)


def run_command(*command, **options):
    """Run a script as a user does; return its CompletedProcess with stdout and stderr as text."""
    arguments = [sys.executable, *map(str, command)]
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": "default", **options.pop("env", {})}
    options = {"capture_output": True, "cwd": ROOT, **options}
    return subprocess.run(arguments, text=True, check=False, env=environment, **options)


@contextmanager
def nothing_left_behind():
    """Restore what a script sets for its whole process: logging, warnings, and the data that it read."""
    level = logging.root.manager.disable
    utils.load_data.cache_clear()
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logging.disable(level)
        utils.load_data.cache_clear()


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script as its command line would; returns (exit status, standard output, standard error)."""

    def run_main(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        is_training = hasattr(script, "train")
        main = partial(utils.main, script.Config, script.train, script.REPORT, "") if is_training else script.main
        with nothing_left_behind(), pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run_main


@pytest.fixture
def requested(monkeypatch):
    """Return the experiments, a list of Config, that a script's command line asks for."""

    def parse(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        return utils.parse_experiments(script.Config, script.REPORT, utils.experiment_parser(script.Config, ""))[1]

    return parse


def train_here(script, runs_dir, data, config, epochs=2, precision="fp32"):
    """Train an experiment in this process as its script does, on data, a Dataset; return the run's folder."""
    args = SimpleNamespace(
        device="cpu",
        precision=precision,
        epochs=epochs,
        data="",
        data_dir="",
        threads=1,
        fresh=False,
        runs_dir=runs_dir,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_data", lambda *_: data)
        return utils.train_one(config, script.train, args).folder


class Intruder:
    """Code in a pickle: makes a folder when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


# Looking into a run's folder


def read_rows(folder):
    """Return the rows of metrics.csv as they stand there."""
    return utils.read_table(folder / "metrics.csv")


def but_seconds(rows):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def rows_but_seconds(folder):
    return but_seconds(read_rows(folder))


def read_events(folder):
    """Return what TensorBoard's reader makes of a run's folder."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def read_points(folder):
    """Return (tag, step, value) of every scalar that TensorBoard's reader gives."""
    events = read_events(folder)
    return [(tag, each.step, each.value) for tag in sorted(events.Tags()["scalars"]) for each in events.Scalars(tag)]


def read_files(folder):
    """Return the bytes of every file below a folder but the lock, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def trained_state(folder):
    """Return all that a run's training depends on or led to: metrics but seconds, weights, moments, random numbers."""
    checkpoint = utils.load_tensors(folder / "checkpoint.pt")
    return [but_seconds(checkpoint["history"]), checkpoint["state"], checkpoint["random"]]


def same(one, other):
    """Whether two nested structures of tensors and plain values are equal to the last bit."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def assert_refused(outcome, words):
    status, _, error = outcome
    assert status == 2
    assert words in error
    assert error.count("\n") == 1


# Runs and data


@beside
def default_runs(folder):
    """The default experiments on embedded data: of each script (completed process, folder)."""
    flags, made = ("--data", "synthetic", "--runs-dir", folder), {}
    for run, path in (
        ("cnn_run", "cnn_cifar10/synthetic_adam_lr1e-4"),
        ("rnn_run", "rnn_mnist/synthetic_rnn30_adam_lr1e-3"),
    ):
        script = f"{path.partition('/')[0]}.py"
        made[run] = run_command(script, *flags, "--epochs", EPOCHS[run]), folder / f"{path}_seed0"
    return made


@beside
def real_run(folder):
    flags = "--epochs", 1, "--data", "real", "--data-dir", ROOT / "data", "--runs-dir", folder
    return run_command("rnn_mnist.py", *flags) if HAS_REAL_DATA else None, folder


@pytest.fixture(scope="session")
def cnn_run(default_runs):
    return default_runs["cnn_run"]


@pytest.fixture(scope="session")
def rnn_run(default_runs):
    return default_runs["rnn_run"]


@pytest.fixture(scope="session")
def digits():
    """The whole embedded set in place of MNIST."""
    return utils.load_data("mnist", "synthetic", None)


@pytest.fixture(scope="session")
def pictures():
    """The whole embedded set in place of CIFAR-10."""
    return utils.load_data("cifar10", "synthetic", None)


def first_images(split, count):
    return utils.Split(*(tensor[:count] for tensor in split))


def small(data, train, test):
    """Return a Dataset of fewer images."""
    return data._replace(train=first_images(data.train, train), test=first_images(data.test, test))


@pytest.fixture(scope="session")
def tiny_digits(digits):
    """A synthetic MNIST small enough to train on in a moment."""
    return small(digits, 640, 200)


@pytest.fixture(scope="session")
def tiny_pictures(pictures):
    """A synthetic CIFAR-10 small enough to train on in a moment."""
    return small(pictures, 320, 100)


@pytest.fixture
def tiny_data(tiny_digits, tiny_pictures, monkeypatch):
    """Let the embedded sets be small; returns them by script."""
    sets = {28: tiny_digits, 32: tiny_pictures}
    monkeypatch.setattr(utils, "embedded_patterns", lambda size: sets[size][3:])
    return {rnn_mnist: tiny_digits, cnn_cifar10: tiny_pictures}


def noise_digits(images=1280):
    """A synthetic MNIST of noise; nothing here starts a thread, so that a process that made it can be forked."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(256, size=(images + 100, 28, 28), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(10, size=images + 100))
    splits = (utils.Split(pixels[part], labels[part]) for part in (slice(images), slice(images, None)))
    return utils.Dataset("mnist", "synthetic", utils.EMBEDDED_CLASSES, *splits)


NOISE_NAME = "synthetic_gru8_adam_lr0.01_seed0"
NOISE_FLAGS = "--data synthetic --device cpu --cell gru --hidden-size 8 --lr 0.01 --epochs 4"


@pytest.fixture
def train_on_noise(call, tmp_path, monkeypatch):
    """Call rnn_mnist.py on a little noise; returns (exit status, standard output, standard error)."""
    monkeypatch.setattr(utils, "embedded_patterns", lambda size: noise_digits(320)[3:])
    return lambda *flags, runs_dir=tmp_path: call(rnn_mnist, *NOISE_FLAGS.split(), "--runs-dir", runs_dir, *flags)


@pytest.fixture(scope="session")
def noise_run(tmp_path_factory):
    """A run of one epoch on the same little noise."""
    config = rnn_mnist.Config(cell="gru", hidden_size=8, lr=0.01)
    return train_here(rnn_mnist, tmp_path_factory.mktemp("noise"), noise_digits(320), config, epochs=1)


@pytest.fixture
def finished_run(noise_run, tmp_path):
    folder = tmp_path / "finished" / "rnn_mnist" / NOISE_NAME
    shutil.copytree(noise_run, folder)
    return folder


def random_config(rng, config_class, most=None):
    """Return a valid Config at random; most: the largest whole number by setting, where it is to be small."""

    def value(one):
        if rng.random() < 0.3:
            return one.default
        if one.choices:
            return rng.choice(list(one.choices))
        if one.type is int:
            return rng.randint(one.minimum, (most or {}).get(one.name, one.maximum))
        return (
            10 ** rng.uniform(-6, -2) if one.name == "lr" else rng.uniform(max(one.minimum, -10), min(one.maximum, 10))
        )

    chosen = {one.name: value(one) for one in config_class.known_settings()}
    if chosen["optimizer"] == "adam":
        chosen["momentum"] = 0.0
    return config_class(**chosen)


@pytest.fixture(autouse=True)
def _same_threads():
    """Keep the number of threads that a test's run may set from reaching the next test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
