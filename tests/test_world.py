"""What other people's machines bring along: folders, environments, streams, file systems. It changes no result."""

import errno
import gzip
import hashlib
import io
import os
import shlex
import subprocess
import sys
from pathlib import Path

import rnn_mnist
import utils
import visualize

import numpy as np
import pytest
from conftest import ENVIRONMENT, NOISE_NAME, ROOT, assert_refused, beside, read_rows, run_command
from test_data import small_idx

SMALL = "--data synthetic --hidden-size 5 --epochs 1 --batch-size 1000"
SMALL_NAME = "synthetic_rnn5_adam_lr1e-3_batch1000_seed0"


def run_shell(line, folder, **environment):
    """Run a line of bash in a folder; return its CompletedProcess."""
    environment = {**ENVIRONMENT, **environment}
    return subprocess.run(
        ["bash", "-c", line], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


@pytest.fixture
def small_mnist(monkeypatch, tmp_path):
    """A data set of 40 images in MNIST's format, known by its checksums in MNIST's place; returns its files' bytes."""
    contents = dict(zip(utils.DATASETS["mnist"].files, small_idx(np.random.default_rng(0))[0], strict=True))
    files = {name: hashlib.md5(content).hexdigest() for name, content in contents.items()}
    monkeypatch.setitem(utils.DATASETS, "mnist", utils.DATASETS["mnist"]._replace(files=files))
    utils.load_data.cache_clear()
    return contents


def lay(contents, folder, place="{}", pack=bytes):
    for name, content in contents.items():
        path = folder / place.format(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pack(content))


# Folders


def test_folders_begin_with_a_tilde_wherever_one_is_typed(call, small_mnist, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    lay(small_mnist, tmp_path / "sets", "MNIST/raw/{}")
    flags = "--data real --data-dir=~/sets --runs-dir=~/mine --hidden-size 5 --epochs 1 --device cpu"
    assert call(rnn_mnist, *flags.split())[0] == 0
    folder = tmp_path / "mine/rnn_mnist/rnn5_adam_lr1e-3_seed0"
    assert len(read_rows(folder)) == 1
    shown = "~/mine/rnn_mnist/rnn5_adam_lr1e-3_seed0 --figures confusion --output-dir ~/shown --data-dir ~/sets"
    status, _, error = call(visualize, *shown.split())
    assert (status, error) == (0, "")
    assert (tmp_path / "shown/confusion.png").exists()
    assert not (tmp_path / "~").exists()


@beside
def profiled(folder):
    (folder / "the suite").symlink_to(ROOT)
    return run_command(
        "-m", "cProfile", "the suite/rnn_mnist.py", *SMALL.split(), "--runs-dir", "my runs", cwd=folder
    ), folder


def test_printed_commands_can_be_typed_from_where_the_script_was_called_also_under_a_profiler(profiled):
    done, folder = profiled
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    board, figures = lines[lines.index("Next:") + 1 :][:2]
    assert shlex.split(board) == ["tensorboard", "--logdir", "my runs/rnn_mnist"]
    assert shlex.split(figures) == ["python", "the suite/visualize.py", f"my runs/rnn_mnist/{SMALL_NAME}"]
    assert len(read_rows(folder / "my runs/rnn_mnist" / SMALL_NAME)) == 1


@pytest.mark.parametrize(
    ("place", "pack"),
    [
        ("MNIST/raw/{}", bytes),
        ("{}", bytes),
        ("MNIST/{}", bytes),
        ("MNIST/raw/{0}/{0}", bytes),
        ("archive/deep/MNIST/raw/{}", bytes),
        ("MNIST/raw/{}.gz", gzip.compress),
    ],
)
@pytest.mark.parametrize("dotted", [False, True])
def test_files_that_lie_elsewhere_in_the_data_folder_are_taken(small_mnist, tmp_path, place, pack, dotted):
    contents = {name.replace("-idx", ".idx") if dotted else name: each for name, each in small_mnist.items()}
    lay(contents, tmp_path, place, pack)
    data = utils.load_data("mnist", "real", tmp_path, may_download=False)
    assert data.train.images.numpy().tobytes() == small_mnist["train-images-idx3-ubyte"][16:]
    assert bytes(data.test.labels.tolist()) == small_mnist["t10k-labels-idx1-ubyte"][8:]


def test_a_file_of_the_right_name_and_other_bytes_is_not_taken_and_what_lies_there_is_told(small_mnist, tmp_path):
    lay({name: each[::-1] for name, each in small_mnist.items()}, tmp_path, "MNIST/raw/{}.gz", gzip.compress)
    (tmp_path / "MNIST/raw/train-labels-idx1-ubyte.gz").write_bytes(b"cut off")
    with pytest.raises(utils.InputError) as refused:
        utils.load_data("mnist", "real", tmp_path, may_download=False)
    missing = tmp_path / "MNIST/raw/train-images-idx3-ubyte"
    assert f"{missing} is missing, {missing.parent} holds t10k-images-idx3-ubyte.gz" in str(refused.value)


def test_a_link_to_what_is_not_there_is_called_that(call, tmp_path):
    for name in ("data", "runs"):
        (tmp_path / name).symlink_to(tmp_path / f"drive/{name}")
        flags = ["--data", "real" if name == "data" else "synthetic", f"--{name}-dir", tmp_path / name, "--epochs", 1]
        words = f"{tmp_path / name}: is a link to {tmp_path / 'drive' / name}, which is not there"
        assert_refused(call(rnn_mnist, *flags), words)


def test_where_data_lay_when_a_run_was_trained_is_no_property_of_it(call, small_mnist, tmp_path):
    lay(small_mnist, tmp_path / "old", "MNIST/raw/{}")
    flags = ["--data", "real", "--hidden-size", 5, "--epochs", 1, "--device", "cpu", "--runs-dir", tmp_path]
    assert call(rnn_mnist, *flags, "--data-dir", tmp_path / "old")[0] == 0
    (tmp_path / "old").rename(tmp_path / "new")
    folder = tmp_path / "rnn_mnist/rnn5_adam_lr1e-3_seed0"
    assert str(tmp_path) not in (folder / "config.json").read_text()
    status, _, error = call(visualize, folder, "--figures", "confusion", "--data-dir", tmp_path / "old")
    assert (status, "--data-dir says where else" in error) == (2, True)
    assert call(visualize, folder, "--figures", "confusion", "--data-dir", tmp_path / "new")[0] == 0
    assert call(rnn_mnist, *flags[:-4], "--epochs", 2, *flags[-2:], "--data-dir", tmp_path / "new")[0] == 0
    assert len(read_rows(folder)) == 2


# Environments


def test_a_users_matplotlib_reaches_neither_training_nor_pictures(tmp_path, finished_run, call):
    """A notebook's backend, a matplotlibrc in the folder and one in the environment."""
    assert call(visualize, finished_run, "--figures", "curves")[0] == 0
    expected = (finished_run / "figures/curves.png").read_bytes()
    (tmp_path / "matplotlibrc").write_text("savefig.dpi: 20\nlines.linewidth: 9\n")
    (tmp_path / "other").write_text("backend: nowhere\naxes.facecolor: red\n")
    hostile = {"MPLBACKEND": "module://nowhere.backend_inline", "MATPLOTLIBRC": str(tmp_path / "other")}
    command = f"{sys.executable} -W error {ROOT}"
    done = run_shell(f"{command}/visualize.py {finished_run} --figures curves --output-dir drawn", tmp_path, **hostile)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "drawn/curves.png").read_bytes() == expected


@pytest.mark.parametrize(
    ("variables", "threads", "usable", "quota", "expected"),
    [
        ({}, 6, 6, "max 100000", 6),
        ({}, 6, 6, "50000 100000", 1),
        ({"OMP_NUM_THREADS": "5"}, 5, 6, "200000 100000", 5),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 1, 1, "max 100000", 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 1, 8, "max 100000", 4),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}, 1, 8, "400000 100000", 2),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "3"}, 3, 8, "400000 100000", 3),
        ({"LOCAL_WORLD_SIZE": "", "OMP_NUM_THREADS": "3"}, 3, 8, "no such file", 3),
    ],
)
def test_threads_are_of_the_cores_that_the_process_may_use(monkeypatch, variables, threads, usable, quota, expected):
    for name in ("LOCAL_WORLD_SIZE", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(utils.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(usable), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda *_: quota)
    assert utils.share_of_cores() == expected


# Streams


STREAMS = {"none": ">&- 2>&- <&-", "full": ">/dev/full"}


@beside
def broken_streams(folder):
    command = f"set -o pipefail; {sys.executable} {ROOT}/rnn_mnist.py {SMALL} --runs-dir"
    return {name: run_shell(f"{command} {name} {each}", folder) for name, each in STREAMS.items()}, folder


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", STREAMS)
def test_a_standard_stream_that_is_not_there_or_fails_ends_no_work(broken_streams, name):
    done, folder = broken_streams
    assert (done[name].returncode, done[name].stderr) == (0, "")
    assert len(read_rows(folder / name / "rnn_mnist" / SMALL_NAME)) == 1


@pytest.mark.parametrize("number", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_a_line_that_nobody_can_read_ends_no_work(number):
    class Broken(io.StringIO):
        def write(self, text):
            raise OSError(number, os.strerror(number))

    utils.tell("a line", Broken())


@beside
def hostile(folder):
    flags = (*SMALL.split(), "--seed", 0, 1, "--runs-dir", folder / "wyniki_łódź")
    variables = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://nowhere.backend_inline"}
    variables |= dict.fromkeys(("LOCAL_WORLD_SIZE", "WORLD_SIZE", "RANK"), "")
    return run_command("-W", "error", "rnn_mnist.py", *flags, env=variables, encoding="cp1252")


def test_names_that_the_screen_cannot_show_are_shown_otherwise_and_empty_variables_are_none(hostile):
    assert (hostile.returncode, hostile.stderr) == (0, "")
    assert r"wyniki_\u0142" in hostile.stdout


# File systems


def test_what_is_complete_needs_no_lock_and_one_that_cannot_be_locked_ends_no_list(call, train_on_noise, finished_run):
    """A folder in the lock's place stands for runs that may only be read, for root may write all."""
    runs_dir = finished_run.parents[1]
    (finished_run / ".lock").unlink(missing_ok=True)
    (finished_run / ".lock").mkdir()
    other = finished_run.with_name(NOISE_NAME.replace("seed0", "seed1"))
    (other / ".lock").mkdir(parents=True)
    status, output, error = train_on_noise("--epochs", 1, "--seed", 0, 1, 2, runs_dir=runs_dir)
    assert status == 2
    assert f"{finished_run}: complete after epoch 1" in output
    assert error.splitlines()[0].startswith(f"error: {other / '.lock'}: ")
    assert error.splitlines()[1:] == [
        "rnn_mnist.py: error: 1 of 3 runs could not be trained, for the reasons given above"
    ]
    assert len(read_rows(finished_run.with_name(NOISE_NAME.replace("seed0", "seed2")))) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_is_told_once_and_trained_on(train_on_noise, monkeypatch, tmp_path, number):
    class NoLock:
        def __init__(self, path):
            self.path = path

        def acquire(self, timeout):
            raise OSError(number, os.strerror(number), str(self.path))

    monkeypatch.setattr(utils, "FileLock", NoLock)
    utils.say_once.cache_clear()
    status, output, error = train_on_noise("--epochs", 1, "--seed", 0, 1)
    assert (status, error) == (0, "")
    assert output.count("has no locks") == 1
    assert len(read_rows(tmp_path / "rnn_mnist" / NOISE_NAME)) == 1
