"""What several test files share: calling the scripts, reading a run's folder, and small data sets and runs.

The slowest tests need complete runs of the scripts. These are trained in the background while other tests run.
"""

import csv
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
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

REAL_FILES = ("cifar-10-batches-py/test_batch", "MNIST/raw/train-images-idx3-ubyte")
HAS_REAL_DATA = all((ROOT / "data" / file).exists() for file in REAL_FILES)
CONFIGS = {"cnn_cifar10": cnn_cifar10.Config, "rnn_mnist": rnn_mnist.Config}
SMALL_GRU = rnn_mnist.Config(cell="gru", hidden_size=8, lr=1e-2)
SMALL_CNN = cnn_cifar10.Config(without="fc1", lr=1e-3, batch_size=32)

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_data():
    """Return the directory of the real data sets; skip the test where they are missing."""
    if not HAS_REAL_DATA:
        pytest.skip("data/ does not hold the real CIFAR-10 and MNIST; the training scripts download them there")
    return ROOT / "data"


# Processes and fixtures in the background

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}  # copied before a test changes it
BACKGROUND = {}  # functions by the names of their fixtures
JOBS = {}  # futures by the names of their fixtures
POOL = ThreadPoolExecutor(max_workers=1)
FOLDER = TemporaryDirectory(ignore_cleanup_errors=True)


def run_command(*command, env=None, cwd=ROOT, encoding=None):
    """Run a script as a user does; return its CompletedProcess with stdout and stderr as text.

    env: variables that are added to the environment.
    """
    environment = {**ENVIRONMENT, "PYTHONWARNINGS": "default", **(env or {})}
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, env=environment, cwd=cwd, encoding=encoding, text=True, capture_output=True)


def background_fixture(function):
    """Make a session fixture of function(folder), which is called in the background if a selected test needs it.

    Tests and fixtures must name the fixture as an argument.
    """
    name = function.__name__
    BACKGROUND[name] = function

    @pytest.fixture(scope="session", name=name)
    def wait_for_result():
        return JOBS[name].result()

    return wait_for_result


def background_fixtures_of(item):
    """Return the names of the background fixtures that a test needs, directly or through other fixtures."""
    return [name for name in item.fixturenames if name in BACKGROUND]


def pytest_collection_modifyitems(items):
    """Run the tests that wait for the background last."""
    items.sort(key=lambda item: len(background_fixtures_of(item)) > 0)


def pytest_runtestloop(session):
    """Start the background fixtures of the tests that are selected."""
    if session.config.option.collectonly or session.testsfailed:
        return
    for item in session.items:
        for name in background_fixtures_of(item):
            if name not in JOBS:
                folder = Path(FOLDER.name) / name
                folder.mkdir()
                JOBS[name] = POOL.submit(BACKGROUND[name], folder)


def pytest_sessionfinish():
    """Start no further function in the background, such as after a failure with -x."""
    POOL.shutdown(wait=False, cancel_futures=True)


# Calling the scripts in this process


@contextmanager
def restored_process():
    """Forget the data that scripts read, before and after another script is called, and what it set for its process."""
    utils.load_data.cache_clear()
    thread_hook = threading.excepthook
    try:
        yield
    finally:
        utils.load_data.cache_clear()
        threading.excepthook = thread_hook
        socket.setdefaulttimeout(None)


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that calls a script with flags: (exit status, standard output, standard error)."""

    def run_main(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        if hasattr(script, "train"):
            main = partial(utils.main, script.Config, script.train, script.REPORT, "")
        else:
            main = script.main
        with restored_process(), pytest.raises(SystemExit) as ended:
            main()
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run_main


@pytest.fixture
def requested(monkeypatch):
    """Return a function that lists the experiments, list of Config, that a training script's flags ask for."""

    def parse(script, *flags):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        return utils.parse_experiments(script.Config, script.REPORT, "")[1]

    return parse


def train_here(script, runs_dir, data, config, epochs=2, precision="fp32"):
    """Train an experiment in this process, as its script does, on data, a Dataset; return the run's folder."""
    args = SimpleNamespace(runs_dir=runs_dir, data="", data_dir="", device="cpu", threads=1, fresh=False)
    args.epochs = epochs
    args.precision = precision
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "load_data", lambda *_: data)
        return utils.train_run(config, script.train, args).folder


def assert_refused(outcome, words):
    """Check that a script ended with status 2 and one line on standard error that contains words."""
    status, _, error = outcome
    assert status == 2
    assert words in error
    assert error.count("\n") == 1


# Reading a run's folder


def read_csv(path):
    """Return the rows of a CSV file, list of dict of str; none where there is no such file."""
    return list(csv.DictReader(path.read_text(encoding="utf-8").splitlines())) if path.exists() else []


def read_rows(folder):
    """Return the rows of metrics.csv, list of dict of str."""
    return read_csv(folder / "metrics.csv")


def read_events(folder):
    """Return what TensorBoard's reader loads from a run's folder."""
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()


def read_points(folder):
    """Return (tag, step, value) of every scalar that TensorBoard's reader finds, sorted by tag."""
    events = read_events(folder)
    points = []
    for tag in sorted(events.Tags()["scalars"]):
        points += [(tag, point.step, point.value) for point in events.Scalars(tag)]
    return points


def read_files(folder):
    """Return the content of every file below a folder, by path, without the lock."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def same(first, second):
    """Return whether two nested structures of tensors and plain values are equal to the last bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second


# Data sets


@pytest.fixture(scope="session")
def digits():
    """The whole synthetic data set in place of MNIST."""
    return utils.load_data("mnist", "synthetic", None)


@pytest.fixture(scope="session")
def pictures():
    """The whole synthetic data set in place of CIFAR-10."""
    return utils.load_data("cifar10", "synthetic", None)


def small(data, train, test):
    """Return a Dataset with only the first images of each split; train, test: their numbers."""
    train_split = utils.Split(data.train.images[:train], data.train.labels[:train])
    test_split = utils.Split(data.test.images[:test], data.test.labels[:test])
    return data._replace(train=train_split, test=test_split)


@pytest.fixture(scope="session")
def tiny_digits(digits):
    """A synthetic MNIST that is small enough to train on in a moment."""
    return small(digits, 640, 200)


def use_as_synthetic(monkeypatch, data):
    """Let the scripts read data, a Dataset, in place of the synthetic data set."""
    monkeypatch.setattr(utils, "synthetic_splits", lambda size: [data.train, data.test])


@pytest.fixture
def tiny_data(tiny_digits, pictures, monkeypatch):
    """Make the synthetic data sets small; the value is a dict of them by script."""
    tiny_pictures = small(pictures, 320, 100)
    splits = {28: [tiny_digits.train, tiny_digits.test], 32: [tiny_pictures.train, tiny_pictures.test]}
    monkeypatch.setattr(utils, "synthetic_splits", splits.get)
    return {rnn_mnist: tiny_digits, cnn_cifar10: tiny_pictures}


def noise_digits(images=1280):
    """Return a synthetic MNIST of noise, without starting threads: the process can be forked afterwards."""
    rng = np.random.default_rng(0)
    pixels = torch.from_numpy(rng.integers(256, size=(images + 100, 28, 28), dtype=np.uint8))
    labels = torch.from_numpy(rng.integers(10, size=images + 100))
    train = utils.Split(pixels[:images], labels[:images])
    test = utils.Split(pixels[images:], labels[images:])
    return utils.Dataset("synthetic", utils.SYNTHETIC_CLASSES, train, test)


# Runs

NOISE_NAME = "synthetic_gru8_adam_lr0.01_seed0"
NOISE_FLAGS = "--data synthetic --device cpu --cell gru --hidden-size 8 --lr 0.01 --epochs 4"


@pytest.fixture
def train(call, tmp_path, monkeypatch):
    """Return a function that trains SMALL_GRU on noise: (exit status, standard output, standard error)."""
    use_as_synthetic(monkeypatch, noise_digits(320))

    def run_rnn_mnist(*flags, runs_dir=tmp_path):
        return call(rnn_mnist, *NOISE_FLAGS.split(), "--runs-dir", runs_dir, *flags)

    return run_rnn_mnist


@pytest.fixture(scope="session")
def noise_run(tmp_path_factory):
    """The folder of a run that was trained for one epoch on the same noise."""
    return train_here(rnn_mnist, tmp_path_factory.mktemp("noise"), noise_digits(320), SMALL_GRU, epochs=1)


@pytest.fixture
def finished_run(noise_run, tmp_path):
    """A copy of noise_run that a test may change and that `train` continues."""
    return Path(shutil.copytree(noise_run, tmp_path / "rnn_mnist" / NOISE_NAME))


@pytest.fixture(autouse=True)
def _restored_threads():
    """Restore the number of threads after each test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
