"""Other people's machines: folders, environments, streams and file systems. They change no result."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import rnn_mnist
import utils
import visualize

import pytest
from conftest import ENVIRONMENT, ROOT, assert_refused, background_fixture, read_rows, run_command
from test_data import set_server_port, write_official_sets

SMALL = "--data synthetic --hidden-size 5 --epochs 1 --batch-size 1000"
SMALL_NAME = "synthetic_rnn5_adam_lr1e-3_batch1000_seed0"

needs_links = pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and a POSIX shell")


# Folders


def test_folders_may_begin_with_a_tilde_and_data_may_be_moved(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))  # the home directory on Windows
    monkeypatch.chdir(tmp_path)
    write_official_sets(tmp_path / "sets", monkeypatch)
    set_server_port(9, monkeypatch)  # where nothing answers
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
def test_a_link_to_a_missing_folder_is_named_as_such(call, tmp_path):
    for name, mode in (("data", "real"), ("runs", "synthetic")):
        (tmp_path / name).symlink_to(tmp_path / "drive" / name)
        outcome = call(rnn_mnist, "--data", mode, f"--{name}-dir", tmp_path / name, "--epochs", 1)
        assert_refused(outcome, f"{tmp_path / name}: is a link to {tmp_path / 'drive' / name}, which does not exist")


# Environments

IMPORT_AND_LOOK = """
import logging, os, sys, warnings
from pathlib import Path
import filelock, matplotlib.figure, matplotlib.ticker, numpy, PIL.Image, torch, tqdm

def process_state():
    return {
        "environment": dict(os.environ),
        "warnings": list(warnings.filters),
        "logging": (logging.root.manager.disable, logging.root.level, list(logging.root.handlers)),
        "matplotlib": dict(matplotlib.rcParams),
        "torch": (torch.get_num_threads(), torch.is_grad_enabled()),
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
    assert done.stdout.splitlines() == [utils.SYNTHETIC_NOTICE, "changed: []"]


def test_a_users_matplotlib_settings_change_no_picture(tmp_path, finished_run, call):
    assert call(visualize, finished_run, "--figures", "curves")[0] == 0
    settings = "savefig.dpi: 20\nlines.linewidth: 9\naxes.facecolor: red\nbackend: nowhere\nfont.colour: red\n"
    (tmp_path / "matplotlibrc").write_text(settings)
    flags = (finished_run, "--figures", "curves", "--output-dir", "drawn")
    done = run_command("-W", "error", ROOT / "visualize.py", *flags, cwd=tmp_path, env={"MPLBACKEND": "Qt4Agg"})
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "drawn" / "curves.png").read_bytes() == (finished_run / "figures" / "curves.png").read_bytes()


@pytest.mark.parametrize(
    ("omp_num_threads", "container_limit", "expected"),
    [("", "max 100000", 6), ("", "150000 100000", 2), ("5", "200000 100000", 5)],
)
def test_threads_are_those_asked_for_or_those_of_the_container(monkeypatch, omp_num_threads, container_limit, expected):
    monkeypatch.setenv("OMP_NUM_THREADS", omp_num_threads)
    monkeypatch.setattr(utils.torch, "get_num_threads", lambda: int(omp_num_threads or 6))
    monkeypatch.setattr(Path, "read_text", lambda _: container_limit)
    assert utils.available_threads() == expected


@pytest.mark.parametrize(("rank", "size"), [("0", "two"), ("one", "2")])
def test_a_variable_that_is_no_number_is_refused_in_one_line(train, monkeypatch, tmp_path, rank, size):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", size)
    outcome = train("--epochs", 1, "--seed", 0, 1)
    assert_refused(outcome, f"error: RANK={rank} and WORLD_SIZE={size} must be numbers; unset these environment var")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", ["", "1"])
def test_a_rank_that_was_left_over_changes_no_output(train, monkeypatch, size):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", size)
    status, output, error = train("--epochs", 1)
    assert (status, error) == (0, "")
    assert "Test accuracy in % after epoch 1" in output


# Streams

REDIRECTIONS = {"closed": ">&- 2>&- <&-", "full": ">/dev/full"}


@background_fixture
def broken_streams(folder):
    """Training with closed streams, and into a full one: ({name: CompletedProcess}, folder)."""
    done = {}
    for name, redirection in REDIRECTIONS.items():
        command = shlex.join([sys.executable, str(ROOT / "rnn_mnist.py"), *SMALL.split(), "--runs-dir", name])
        shell = ["bash", "-c", f"{command} {redirection}"]
        done[name] = subprocess.run(shell, cwd=folder, env=ENVIRONMENT, text=True, capture_output=True)
    return done, folder


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@pytest.mark.parametrize("name", REDIRECTIONS)
def test_streams_that_are_closed_or_full_end_no_training(broken_streams, name):
    done, folder = broken_streams
    assert (done[name].returncode, done[name].stderr) == (0, "")
    assert len(read_rows(folder / name / "rnn_mnist" / SMALL_NAME)) == 1


@background_fixture
def other_encoding(folder):
    """Training on a screen that cannot show the folder's name."""
    variables = {"PYTHONIOENCODING": "cp1252", "MPLBACKEND": "module://nowhere.backend_inline"}
    flags = (*SMALL.split(), "--seed", 0, 1, "--runs-dir", folder / "wyniki_łódź")
    return run_command("-W", "error", "rnn_mnist.py", *flags, env=variables, encoding="cp1252")


def test_a_screen_that_cannot_show_a_name_ends_no_training(other_encoding):
    assert (other_encoding.returncode, other_encoding.stderr) == (0, "")
    assert r"wyniki_\u0142" in other_encoding.stdout
    assert "Test accuracy in % after epoch 1" in other_encoding.stdout
