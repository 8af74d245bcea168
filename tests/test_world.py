"""Other people's machines: folders, environments, streams and file systems. They change no result."""

import errno
import os
import shlex
import sys
from pathlib import Path

import rnn_mnist
import utils
import visualize

import pytest
from conftest import NOISE_NAME, ROOT, assert_refused, background_fixture, read_rows, run_command, run_process
from test_data import write_official_sets

SMALL = "--data synthetic --hidden-size 5 --epochs 1 --batch-size 1000"
SMALL_NAME = "synthetic_rnn5_adam_lr1e-3_batch1000_seed0"

needs_links = pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and a POSIX shell")


# Folders


def test_folders_may_begin_with_a_tilde_and_data_may_be_moved(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # the home directory on Windows
    monkeypatch.chdir(tmp_path)
    write_official_sets(tmp_path / "sets", monkeypatch)
    flags = "--data real --hidden-size 5 --device cpu --runs-dir=~/mine"
    assert call(rnn_mnist, *flags.split(), "--epochs", 1, "--data-dir=~/sets")[0] == 0
    folder = tmp_path / "mine" / "rnn_mnist" / "rnn5_adam_lr1e-3_seed0"
    assert str(tmp_path) not in (folder / "config.json").read_text()

    (tmp_path / "sets").rename(tmp_path / "moved")
    assert call(rnn_mnist, *flags.split(), "--epochs", 2, "--data-dir", "~/moved")[0] == 0
    assert len(read_rows(folder)) == 2
    flags = "~/mine/rnn_mnist/rnn5_adam_lr1e-3_seed0 --figures confusion --output-dir ~/drawn --data-dir"
    status, _, error = call(visualize, *flags.split(), "~/sets")
    assert (status, f"{tmp_path / 'sets'}" in error) == (2, True)
    assert call(visualize, *flags.split(), "~/moved")[0] == 0
    assert (tmp_path / "drawn" / "confusion.png").exists()
    assert not (tmp_path / "~").exists()


@background_fixture
def linked_suite(folder):
    """The suite called through a link with a space in its name, under a profiler: (CompletedProcess, folder)."""
    (folder / "the suite").symlink_to(ROOT)
    flags = (*SMALL.split(), "--runs-dir", "my runs")
    return run_command("-m", "cProfile", "the suite/rnn_mnist.py", *flags, cwd=folder), folder


@needs_links
def test_printed_commands_can_be_pasted_where_the_script_was_called(linked_suite):
    done, folder = linked_suite
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    tensorboard, figures = lines[lines.index("Next:") + 1 :][:2]
    assert shlex.split(tensorboard) == ["tensorboard", "--logdir", "my runs/rnn_mnist"]
    assert shlex.split(figures) == ["python", "the suite/visualize.py", f"my runs/rnn_mnist/{SMALL_NAME}"]
    assert len(read_rows(folder / "my runs" / "rnn_mnist" / SMALL_NAME)) == 1


@needs_links
def test_a_script_that_is_a_link_names_scripts_that_exist(tmp_path, monkeypatch):
    (tmp_path / "train.py").symlink_to(ROOT / "rnn_mnist.py")
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "train.py")])
    assert Path(shlex.split(utils.shell_command("python", "visualize.py", "runs"))[1]).exists()


@needs_links
def test_a_link_to_a_missing_folder_is_named_as_such(call, tmp_path):
    for name, mode in (("data", "real"), ("runs", "synthetic")):
        (tmp_path / name).symlink_to(tmp_path / "drive" / name)
        outcome = call(rnn_mnist, "--data", mode, f"--{name}-dir", tmp_path / name, "--epochs", 1)
        assert_refused(outcome, f"{tmp_path / name}: is a link to {tmp_path / 'drive' / name}, which does not exist")


# Environments

IMPORT_AND_LOOK = """
import logging, os, socket, sys, warnings
from pathlib import Path
import filelock, matplotlib.figure, matplotlib.ticker, numpy, PIL.Image, torch, tqdm

def process_state():
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
        "hooks": (sys.excepthook, warnings.showwarning),
        "streams": (sys.stdout, sys.stdout.errors, sys.stderr, sys.stderr.errors),
        "matplotlib": dict(matplotlib.rcParams),
        "torch": (torch.get_num_threads(), torch.get_rng_state().tolist(), torch.is_grad_enabled()),
        "sockets": socket.getdefaulttimeout(),
    }

before = process_state()
import cnn_cifar10, rnn_mnist, utils, visualize
run = visualize.SavedRun(Path(sys.argv[1]))
visualize.curves(run)
visualize.confusion(run)
after = process_state()
print("changed:", [name for name in before if after[name] != before[name]])
"""


def test_importing_and_looking_at_a_run_change_nothing_else(finished_run):
    done = run_command("-c", IMPORT_AND_LOOK, finished_run)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [utils.synthetic_notice("mnist"), "changed: []"]


def test_a_users_matplotlib_settings_change_no_picture(tmp_path, finished_run, call):
    """Also settings that matplotlib does not know, such as a backend of an older version."""
    assert call(visualize, finished_run, "--figures", "curves")[0] == 0
    settings = "savefig.dpi: 20\nlines.linewidth: 9\naxes.facecolor: red\nbackend: nowhere\nfont.colour: red\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    flags = (finished_run, "--figures", "curves", "--output-dir", "drawn")
    done = run_command("-W", "error", ROOT / "visualize.py", *flags, cwd=tmp_path, env={"MPLBACKEND": "Qt4Agg"})
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "drawn" / "curves.png").read_bytes() == (finished_run / "figures" / "curves.png").read_bytes()


@pytest.mark.parametrize(
    ("processes", "variable", "parent", "threads", "cores", "quota", "expected"),
    [
        ("", None, None, 6, 6, "max 100000", 6),
        ("", None, None, 6, 6, "50000 100000", 1),
        ("", "5", None, 5, 6, "200000 100000", 5),
        ("2", "1", b"HOME=/root\0", 1, 1, "max 100000", 1),
        ("2", "1", b"HOME=/root\0", 1, 8, "max 100000", 4),
        ("2", "1", b"HOME=/root\0", 1, 8, "400000 100000", 2),
        ("2", "1", b"HOME=/root\0OMP_NUM_THREADS=1\0", 1, 8, "400000 100000", 1),
        ("2", "3", b"HOME=/root\0OMP_NUM_THREADS=3\0", 3, 8, "400000 100000", 3),
        ("2", "3", None, 3, 8, "400000 100000", 3),
        ("2", "1", None, 1, 8, "no such file", 4),
    ],
)
def test_threads_are_those_asked_for_or_a_share_of_the_cores(
    monkeypatch, processes, variable, parent, threads, cores, quota, expected
):
    """variable: OMP_NUM_THREADS; parent: the environment that torchrun was started with, None: it cannot be read."""

    def read_environment(path):
        if parent is None:
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return parent

    monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(utils.torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
    monkeypatch.setattr(Path, "read_bytes", read_environment)
    monkeypatch.setattr(Path, "read_text", lambda *_: quota)  # the limit of the container
    assert utils.available_threads() == expected


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"])
def test_a_variable_that_is_no_number_is_refused_in_one_line(train_on_noise, monkeypatch, tmp_path, name):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv(name, "two")
    outcome = train_on_noise("--epochs", 1, "--seed", 0, 1)
    assert_refused(outcome, f"error: the environment variable {name} must be a number, not 'two'; unset it")
    assert not list(tmp_path.iterdir())


def test_a_rank_without_a_world_size_changes_nothing(train_on_noise, monkeypatch, tmp_path):
    """One of the two runs fails: it cannot be locked, since there is a folder in place of the lock."""
    (tmp_path / "rnn_mnist" / NOISE_NAME.replace("seed0", "seed1") / ".lock").mkdir(parents=True)
    flags = ("--epochs", 1, "--seed", 0, 1)
    status, output, error = train_on_noise(*flags)
    monkeypatch.setenv("RANK", "3")
    outcome = train_on_noise(*flags, "--fresh")
    assert (outcome[0], outcome[2]) == (status, error)
    assert status == 2
    results = output[output.index("Test accuracy in %") :]
    assert outcome[1].endswith(results)


# Streams

REDIRECTIONS = {"closed": ">&- 2>&- <&-", "full": ">/dev/full"}


@background_fixture
def broken_streams(folder):
    """Training with closed streams, and into a full one: ({name: CompletedProcess}, folder)."""
    done = {}
    for name, redirection in REDIRECTIONS.items():
        command = shlex.join([sys.executable, str(ROOT / "rnn_mnist.py"), *SMALL.split(), "--runs-dir", name])
        done[name] = run_process(["bash", "-c", f"{command} {redirection}"], cwd=folder)
    return done, folder


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", REDIRECTIONS)
def test_streams_that_are_closed_or_full_end_no_training(broken_streams, name):
    done, folder = broken_streams
    assert (done[name].returncode, done[name].stderr) == (0, "")
    assert len(read_rows(folder / name / "rnn_mnist" / SMALL_NAME)) == 1


@background_fixture
def other_encoding(folder):
    """Training on a screen that cannot show the folder's name, with variables of torchrun that are empty."""
    variables = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://nowhere.backend_inline"}
    variables |= {"LOCAL_WORLD_SIZE": "", "WORLD_SIZE": "", "RANK": ""}
    flags = (*SMALL.split(), "--seed", 0, 1, "--runs-dir", folder / "wyniki_łódź")
    return run_command("-W", "error", "rnn_mnist.py", *flags, env=variables, encoding="cp1252")


def test_names_that_the_screen_cannot_show_are_escaped(other_encoding):
    assert (other_encoding.returncode, other_encoding.stderr) == (0, "")
    assert r"wyniki_\u0142" in other_encoding.stdout


# File systems


def test_a_complete_run_needs_no_lock_and_others_are_trained(train_on_noise, finished_run):
    """A folder in place of the lock stands for a run that may only be read, since root may write everything."""
    runs_dir = finished_run.parents[1]
    (finished_run / ".lock").unlink(missing_ok=True)
    (finished_run / ".lock").mkdir()
    locked = finished_run.with_name(NOISE_NAME.replace("seed0", "seed1"))
    (locked / ".lock").mkdir(parents=True)
    status, output, error = train_on_noise("--epochs", 1, "--seed", 0, 1, 2, runs_dir=runs_dir)
    assert status == 2
    assert f"{finished_run}: complete after epoch 1" in output
    first, second = error.splitlines()
    assert first.startswith(f"error: {locked / '.lock'}: ")
    assert second == "rnn_mnist.py: error: 1 of 3 runs could not be trained, for the reasons given above"
    assert len(read_rows(finished_run.with_name(NOISE_NAME.replace("seed0", "seed2")))) == 1


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL])
def test_without_locks_training_warns_once_and_goes_on(train_on_noise, monkeypatch, tmp_path, number):
    class NoLock:
        def __init__(self, path):
            self.path = path

        def acquire(self, timeout):
            raise OSError(number, os.strerror(number), str(self.path))

    monkeypatch.setattr(utils, "FileLock", NoLock)
    status, output, error = train_on_noise("--epochs", 1, "--seed", 0, 1)
    assert (status, error) == (0, "")
    assert output.count("this file system has no locks") == 1
    assert len(read_rows(tmp_path / "rnn_mnist" / NOISE_NAME)) == 1
