import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import utils  # noqa: E402

EPOCHS = 2  # of the runs that many tests look at
REAL_FILES = ("cifar-10-batches-py/test_batch", "MNIST/raw/train-images-idx3-ubyte")


@pytest.fixture(scope="session")
def real_data():
    """The folder of the real data sets."""
    if not all((ROOT / "data" / file).exists() for file in REAL_FILES):
        pytest.skip("data/ does not hold the real CIFAR-10 and MNIST; the training scripts download them there")
    return ROOT / "data"


def run_command(*command, **options):
    """Run a script as a user does; return its CompletedProcess with stdout and stderr as text."""
    arguments = [sys.executable, *map(str, command)]
    options = {"capture_output": True, "timeout": 170, **options}
    return subprocess.run(arguments, cwd=ROOT, text=True, env={**os.environ, "PYTHONWARNINGS": "default"}, **options)


def read_rows(folder):
    """Return the rows of metrics.csv as they stand there."""
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def rows_but_seconds(folder):
    return [{name: value for name, value in row.items() if name != "seconds"} for row in read_rows(folder)]


def read_points(folder):
    """Return (tag, step, value) of every scalar in TensorBoard's files, as written: nothing is purged."""
    files = sorted(folder.glob("events.out.tfevents.*"))
    events = (event for path in files for event in LegacyEventFileLoader(str(path)).Load())
    values = ((event.step, value) for event in events for value in event.summary.value)
    return [(value.tag, step, value.simple_value) for step, value in values if value.tag in utils.TENSORBOARD_TAGS]


@pytest.fixture(scope="session")
def runs_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="session")
def cnn_run(runs_dir):
    """The default CNN experiment on embedded data: (completed process, run folder)."""
    done = run_command("cnn_cifar10.py", "--data", "synthetic", "--epochs", EPOCHS, "--runs-dir", runs_dir)
    return done, runs_dir / "cnn_cifar10" / "synthetic_cifar10_adam_lr0.0001_batch128_seed0"


@pytest.fixture(scope="session")
def rnn_run(runs_dir):
    """The default RNN experiment on embedded data: (completed process, run folder)."""
    done = run_command("rnn_mnist.py", "--data", "synthetic", "--epochs", EPOCHS, "--runs-dir", runs_dir)
    return done, runs_dir / "rnn_mnist" / "synthetic_mnist_rnn_hidden30_adam_lr0.001_batch64_seed0"


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main as its command line would; returns (exit status, standard output, standard error)."""

    def run_main(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            utils.run_script(script.main)
        output = capsys.readouterr()
        return ended.value.code, output.out, output.err

    return run_main


@pytest.fixture(scope="session")
def tiny_digits():
    """A synthetic MNIST small enough to train on in a moment."""
    whole = utils.synthetic_digits()
    pieces = {"train_images": 640, "train_labels": 640, "test_images": 200, "test_labels": 200}
    return whole._replace(**{field: getattr(whole, field)[:count] for field, count in pieces.items()})


@pytest.fixture(autouse=True)
def _same_threads():
    """Keep the number of threads that a test's run may set from reaching the next test."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
