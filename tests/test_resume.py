"""Resuming: after kill -9 and Ctrl-C, with more epochs, in a list of runs, and beside other processes.

KILLS=20 python -m pytest tests/test_resume.py -k killed     kills runs 20 times instead of 3 times
"""

import errno
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace
from functools import partial

import cnn_cifar10
import rnn_mnist
import utils

import pytest
import torch
from conftest import (
    NOISE_FLAGS,
    NOISE_NAME,
    ROOT,
    assert_refused,
    background_fixture,
    noise_digits,
    read_events,
    read_files,
    read_points,
    read_rows,
    run_command,
    same,
    small,
    train_here,
    use_as_synthetic,
)
from filelock import FileLock
from torch import nn

KILLS = int(os.environ.get("KILLS", "3"))
GRU = rnn_mnist.Config(cell="gru", hidden_size=8, lr=1e-2)
CNN = cnn_cifar10.Config(without="fc1", lr=1e-3, batch_size=32)


@pytest.fixture(autouse=True)
def _new_second_for_each_session(monkeypatch):
    """TensorBoard's reader sorts the files of the sessions by their names, which begin with the second."""
    clock, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() + next(calls))


@pytest.fixture
def train(train_on_noise):
    return train_on_noise


def with_seed(folder, seed):
    return folder.with_name(NOISE_NAME.replace("seed0", f"seed{seed}"))


def read_tensorboard(folder):
    """Return what TensorBoard's reader finds in a run: points, images, histograms, and the record for HParams."""
    events = read_events(folder)
    images, histograms = [], []
    for tag in events.Tags()["images"]:
        images += [(tag, image.step, image.encoded_image_string) for image in events.Images(tag)]
    for tag in events.Tags()["histograms"]:
        histograms += [(tag, event.step, event.histogram_value) for event in events.Histograms(tag)]
    settings = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    return read_points(folder), images, histograms, settings


def read_snapshots(folder):
    return {path.name: utils.load_tensors(path) for path in folder.glob("snapshots/*")}


def assert_whole(folder):
    """Check that no file is half written, and that metrics.csv is not ahead of the checkpoint."""
    for path in folder.glob("config.json"):
        assert json.loads(path.read_text())
    for path in folder.glob("checkpoint.pt"):
        rows = read_rows(folder)
        history = utils.load_tensors(path)["history"][: len(rows)]
        assert rows == [{name: str(value) for name, value in row.items()} for row in history]
    read_snapshots(folder)


def trained_state(folder):
    """Return what a run's training depends on or led to: metrics, weights, the optimizer's state, random numbers."""
    checkpoint = utils.load_tensors(folder / "checkpoint.pt")
    for row in checkpoint["history"]:
        del row["seconds"]
    return [checkpoint["history"], checkpoint["state"], checkpoint["random"]]


def assert_same_end(folder, undisturbed):
    """Check that two runs ended with the same metrics, weights, random numbers and TensorBoard data."""
    assert_whole(folder)
    assert len(read_rows(folder)) == len(read_rows(undisturbed))
    assert same(trained_state(folder), trained_state(undisturbed))
    assert same(read_snapshots(folder), read_snapshots(undisturbed))
    assert read_tensorboard(folder) == read_tensorboard(undisturbed)
    assert not list(folder.rglob("*.part")), "no unfinished file is left"


@pytest.fixture
def assert_undisturbed(train, tmp_path):
    """Return a function that checks that a run ended as it would have if nothing had disturbed it."""

    def check(folder, epochs):
        assert train("--epochs", epochs, runs_dir=tmp_path / "undisturbed")[0] == 0
        assert_same_end(folder, tmp_path / "undisturbed" / "rnn_mnist" / NOISE_NAME)

    return check


# Killed at any moment

# Whether runs are started over with --fresh, and the changes to files before which, or within which, they are killed.
KILL_PLANS = [
    (False, ["write checkpoint.pt", "open metrics.csv.part"]),
    (True, ["os.remove metrics.csv", "os.rename checkpoint.pt"]),
    (False, ["write metrics.csv", "os.rename config.json"]),
    (True, ["os.remove checkpoint.pt", "write epoch_02.pt"]),
]


def start_training(runs_dir, data, session, moment, *flags):
    """Train in a forked process, which kills itself at a moment of KILL_PLANS (None: never); return its id."""
    child = os.fork()
    if child:
        return child
    clock = time.time

    def kill_at_moment(event, args):
        """Python calls this before whatever it does to a file, except for writing."""
        if args and f"{event} {os.path.basename(str(args[0]))}".startswith(str(moment)):
            os.kill(os.getpid(), signal.SIGKILL)

    class KillingFile(io.FileIO):
        def write(self, content):
            half = len(content) // 2
            super().write(content[:half])
            kill_at_moment("write", [self.name])
            return super().write(content[half:])

    def open_file(path, mode="r", **options):
        return KillingFile(path, mode) if mode == "wb" else open(path, mode, **options)

    sys.addaudithook(kill_at_moment)
    utils.open = open_file
    time.time = lambda: clock() + 2 * session
    utils.synthetic_splits = lambda size: [data.train, data.test]
    sys.argv = ["rnn_mnist.py", *NOISE_FLAGS.split(), "--runs-dir", str(runs_dir), *flags]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        utils.main(rnn_mnist.Config, rnn_mnist.train, rnn_mnist.REPORT, "")
    except SystemExit as ended:
        os._exit(ended.code)
    os._exit(99)


def kill_runs(folder, kills):
    """Train one run undisturbed, and others whose processes are killed a number of times in total."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401, so that no child has to import it

    torch.optim.Adam([torch.zeros(1)], fused=True)  # likewise, what the first optimizer imports
    data = noise_digits(640)
    rng = random.Random(0)
    sessions = itertools.count()
    killed = 0
    assert os.waitpid(start_training(folder / "undisturbed", data, next(sessions), None), 0)[1] == 0
    for number, (is_fresh, changes) in enumerate(itertools.cycle(KILL_PLANS)):
        if killed == kills:
            break
        runs_dir = folder / f"killed_{number}"
        if is_fresh:
            shutil.copytree(folder / "undisturbed", runs_dir)
        flags = ["--fresh"] if is_fresh else []
        moments = [*changes, rng.uniform(0, 1), rng.uniform(0, 1)][: kills - killed]
        status = None
        while status != 0:
            moment = moments.pop(0) if moments else None
            child = start_training(runs_dir, data, next(sessions), moment, *flags)
            if isinstance(moment, float):
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert_whole(runs_dir / "rnn_mnist" / NOISE_NAME)
            killed += os.WIFSIGNALED(status)
            # A kill while --fresh deletes may leave metrics.csv without a checkpoint, which only --fresh accepts.
            is_refused = is_fresh and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
            assert status == 0 or os.WIFSIGNALED(status) or is_refused
            flags = ["--fresh"] if is_refused else []


@background_fixture
def killed_runs(folder):
    """The CompletedProcess of kill_runs, in a process of its own that can fork, and its folder."""
    program = f"import pathlib, test_resume; test_resume.kill_runs(pathlib.Path({str(folder)!r}), {KILLS})"
    return run_command("-c", program, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}), folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_run_killed_at_any_moment_ends_like_an_undisturbed_one(killed_runs):
    done, folder = killed_runs
    assert done.returncode == 0, done.stderr
    runs_dirs = list(folder.glob("killed_*"))
    assert runs_dirs
    for runs_dir in runs_dirs:
        assert_same_end(runs_dir / "rnn_mnist" / NOISE_NAME, folder / "undisturbed" / "rnn_mnist" / NOISE_NAME)


@pytest.mark.skipif(os.name != "posix", reason="needs signals between processes")
def test_ctrl_c_while_torch_is_loaded_is_answered_in_one_line(tmp_path):
    command = [sys.executable, "rnn_mnist.py", *NOISE_FLAGS.split(), "--runs-dir", str(tmp_path)]
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also if this process ignores it, as under nohup
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1, preexec_fn=listen)
    assert process.stdout.readline() == "loading torch ...\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)  # a shell shows 130 for both
    assert error.count("\n") == 1
    assert "interrupted" in error


# Interrupted at moments that a kill would seldom meet


class DroppingReader(rnn_mnist.RowReader):
    """A network with dropout, whose training depends on the state of the random number generator."""

    def __init__(self, config):
        super().__init__(config)
        self.fc = nn.Sequential(nn.Dropout(0.5), self.fc)


def fail_at_call(monkeypatch, owner, name, number, error=KeyboardInterrupt):
    """Let a function raise an error when it is called for the number-th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args):
        if next(calls) == number:
            raise error
        return function(*args)

    monkeypatch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("script", "changes", "network", "moment"),
    [
        (rnn_mnist, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, rnn_mnist.RowReader, (rnn_mnist, "evaluate", 2)),
        (rnn_mnist, {}, DroppingReader, (utils, "save_tensors", 5)),
        (cnn_cifar10, {}, None, (utils, "save_tensors", 5)),
        (cnn_cifar10, {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}, None, (utils.Run, "_write_metrics", 2)),
    ],
)
def test_a_run_interrupted_in_its_second_epoch_continues_exactly(
    script, changes, network, moment, tiny_data, tmp_path, monkeypatch
):
    config = replace(GRU if script is rnn_mnist else CNN, **changes)
    data = small(tiny_data[script], 96, 100)
    monkeypatch.setattr(rnn_mnist, "RowReader", network)
    undisturbed = train_here(script, tmp_path / "undisturbed", data, config, 3)
    with monkeypatch.context() as patch:
        fail_at_call(patch, *moment)
        with pytest.raises(KeyboardInterrupt):
            train_here(script, tmp_path / "interrupted", data, config, 3)
    assert_whole(tmp_path / "interrupted" / undisturbed.relative_to(tmp_path / "undisturbed"))
    torch.rand(17)  # the process may draw other random numbers in between
    assert_same_end(train_here(script, tmp_path / "interrupted", data, config, 3), undisturbed)


# Complete, extended, started over


def test_a_complete_run_is_left_as_it_is(train, finished_run):
    runs_dir = finished_run.parents[1]
    assert train("--epochs", 3, runs_dir=runs_dir)[0] == 0
    before = read_files(finished_run)
    for epochs in (3, 1):
        status, output, error = train("--epochs", epochs, runs_dir=runs_dir)
        assert (status, error) == (0, "")
        assert f"{finished_run}: complete after epoch 3; a larger --epochs extends it" in output
    assert read_files(finished_run) == before


def test_a_complete_run_gets_a_missing_config_and_missing_metrics(train, finished_run):
    """metrics.csv lacks a row if a run is killed just before it is written."""
    before = read_files(finished_run)
    (finished_run / "config.json").unlink()
    for content in (None, "epoch,test_accuracy\n"):
        (finished_run / "metrics.csv").unlink()
        if content:
            (finished_run / "metrics.csv").write_text(content)
        assert train("--epochs", 1, runs_dir=finished_run.parents[1])[0] == 0
        assert read_files(finished_run) == before


def test_an_extended_run_equals_one_of_as_many_epochs(train, tmp_path, assert_undisturbed):
    for epochs in (2, 3):
        status, output, _ = train("--epochs", epochs)
        assert status == 0
    assert f"{NOISE_NAME}: 1,434 parameters, cpu, fp32, continuing after epoch 2\n" in output
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    assert_undisturbed(folder, 3)
    config = tmp_path / "undisturbed" / "rnn_mnist" / NOISE_NAME / "config.json"
    assert (folder / "config.json").read_text() == config.read_text()


def test_fresh_deletes_what_was_trained_and_no_other_file(train, finished_run, monkeypatch, assert_undisturbed):
    runs_dir = finished_run.parents[1]
    assert train("--epochs", 3, runs_dir=runs_dir)[0] == 0
    written = {path.name for path in finished_run.iterdir()} - {".lock"}
    for number, path in enumerate(finished_run.glob("events.*")):
        path.rename(finished_run / f"events.out.tfevents.{number}.reference")
    mine = [finished_run / name for name in ("notes.txt", "figures/curves.png", "snapshots/best.pt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    for finished in (0, 1):
        with monkeypatch.context() as patch:
            fail_at_call(patch, rnn_mnist, "evaluate", finished + 1)
            status, _, error = train("--epochs", 3, "--fresh", runs_dir=runs_dir)
        assert status == 130
        assert error.endswith(": interrupted; finished epochs are kept; the same command, without --fresh, continues\n")
        assert len(read_rows(finished_run)) == finished, "no epoch from before is left"
    assert "continuing after epoch 1" in train("--epochs", 3, runs_dir=runs_dir)[1]
    for path in mine:
        assert path.read_text() == "mine"
        path.unlink()
    (finished_run / "figures").rmdir()
    assert_undisturbed(finished_run, 3)
    events = {path.name for path in finished_run.glob("events.*")}
    assert len(events) == 2, "of the interrupted session and of the last one"
    names = {path.name for path in finished_run.iterdir()} - {".lock"}
    assert names == {name for name in written if "events" not in name} | events


def test_the_history_is_read_without_the_weights(finished_run):
    path = finished_run / "checkpoint.pt"
    checkpoint = utils.load_tensors(path)
    content = bytearray(path.read_bytes())
    content[content.index(checkpoint["state"]["model"]["fc.weight"].numpy().tobytes())] ^= 1
    path.write_bytes(content)
    assert utils.read_history(finished_run) == checkpoint["history"]
    with pytest.raises(utils.InputError, match=f"^{path} is damaged"):
        utils.load_tensors(path)


# Settings and conditions that differ from those of the checkpoint


@dataclass(frozen=True)
class SmallerBatches(rnn_mnist.Config):
    """What rnn_mnist.Config would be with another default."""

    batch_size: int = 32


@pytest.mark.parametrize("epochs", [1, 2], ids=["complete", "extended"])
def test_a_run_with_other_settings_is_refused_with_both_values(epochs, train, finished_run, monkeypatch):
    """As if its folder had been renamed to that of another run, or a default had been changed."""
    renamed = finished_run.with_name(NOISE_NAME.replace("gru8", "gru9"))
    shutil.copytree(finished_run, renamed)
    before = read_files(finished_run.parent)
    flags = ("--epochs", epochs)
    way_out = "use another --runs-dir, or start over with --fresh"
    outcome = train(*flags, "--hidden-size", 9, runs_dir=finished_run.parents[1])
    assert_refused(outcome, f"{renamed} was trained with --hidden-size 8, not 9; {way_out}")
    monkeypatch.setattr(rnn_mnist, "Config", SmallerBatches)
    outcome = train(*flags, runs_dir=finished_run.parents[1])
    assert_refused(outcome, f"{finished_run} was trained with --batch-size 64, not 32; {way_out}")
    assert read_files(finished_run.parent) == before


@pytest.mark.parametrize(("first", "other"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_precision_and_threads_are_chosen_once(first, other, call, tmp_path, monkeypatch):
    config = replace(CNN, dataset="mnist", batch_size=8)
    use_as_synthetic(monkeypatch, noise_digits(8))
    folder = tmp_path / "cnn_cifar10" / f"synthetic_{config.name}"

    def train(threads, native_precision, *flags):
        monkeypatch.setattr(utils, "available_threads", lambda: threads)
        monkeypatch.setattr(utils, "has_native_bf16", lambda device: native_precision == "bf16")
        settings = "--dataset=mnist --without=fc1 --lr=1e-3 --batch-size=8 --data=synthetic --runs-dir"
        return call(cnn_cifar10, *settings.split(), tmp_path, *flags)

    assert train(2, first, "--epochs", 1)[0] == 0
    for epochs in (1, 2):
        outcome = train(1, other, "--epochs", epochs, "--precision", other)
        assert_refused(outcome, f"{folder} was trained with --precision {first}, not {other}; leave it out, or ")
    assert len(read_rows(folder)) == 1
    assert train(1, other, "--epochs", 2)[0] == 0
    assert torch.get_num_threads() == 2
    conditions = json.loads((folder / "config.json").read_text())["conditions"]
    assert (conditions["precision"], conditions["threads"], len(read_rows(folder))) == (first, 2, 2)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_another_or_an_unavailable_device_is_refused(device, train, finished_run):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    runs_dir = finished_run.parents[1]
    for epochs in (1, 2):
        outcome = train("--epochs", epochs, "--device", device, runs_dir=runs_dir)
        assert_refused(outcome, f"{finished_run} was trained with --device cpu, not {device}; leave it out, or ")
    checkpoint = utils.load_tensors(finished_run / "checkpoint.pt")
    checkpoint["record"]["conditions"]["device"] = device
    utils.save_tensors(finished_run / "checkpoint.pt", checkpoint)
    outcome = train("--epochs", 2, "--device", "cpu", runs_dir=runs_dir)
    assert_refused(outcome, f"{finished_run} was trained with --device {device}, not cpu")
    outcome = train("--epochs", 2, "--device", "auto", runs_dir=runs_dir)
    assert_refused(outcome, f"{finished_run}: the device {device} is not available; start over with --fresh")
    assert "--device cpu" not in outcome[2], "that would be refused"
    assert train("--epochs", 1, "--device", "auto", runs_dir=runs_dir)[0] == 0, "a complete run needs no device"


# A loss that is not finite


class InfiniteLoss(utils.Metrics):
    def update(self, loss, logits, labels):
        super().update(loss * torch.inf, logits, labels)


def test_divergence_keeps_the_last_finite_epoch(train, finished_run, monkeypatch, assert_undisturbed):
    before = read_files(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(rnn_mnist, "Metrics", InfiniteLoss)
        status, _, error = train("--epochs", 3, runs_dir=finished_run.parents[1])
    assert status == 1
    advice = "in epoch 2 at learning rate 0.01; finished epochs are kept; try a smaller --lr"
    assert error == f"rnn_mnist.py: error: {finished_run}: the loss became inf {advice}\n"
    for name in ("checkpoint.pt", "metrics.csv"):
        assert (finished_run / name).read_bytes() == before[finished_run / name]
    assert train("--epochs", 3, runs_dir=finished_run.parents[1])[0] == 0
    assert_undisturbed(finished_run, 3)


# Lists of runs, and several processes


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("", "mine", ""),
        ("metrics.csv", "epoch\n1\n", " holds metrics.csv but no checkpoint.pt"),
        ("checkpoint.pt", "PK, then something else", "/checkpoint.pt is damaged"),
    ],
    ids=["a-file", "no-checkpoint", "damaged-checkpoint"],
)
def test_a_run_that_fails_is_reported_and_the_others_are_trained(name, content, reason, train, tmp_path, monkeypatch):
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    path = folder / name if name else folder
    path.parent.mkdir(parents=True)
    path.write_text(content)
    flags = ("--epochs", 1, "--seed", 1, 0, 2)
    status, output, error = train(*flags)
    assert status == 2
    reported, summary = error.splitlines()
    assert reported.startswith(f"error: {folder}{reason}")
    assert summary == "rnn_mnist.py: error: 1 of 3 runs could not be trained, for the reasons given above"
    progress = [line for line in output.splitlines() if " of 3 runs" in line]
    assert progress == ["1 of 3 runs, 0 min", "2 of 3 runs, 0 min", "3 of 3 runs, 0 min"]
    assert "Test accuracy in % after epoch 1" in output
    assert path.read_text() == content
    assert [len(read_rows(with_seed(folder, seed))) for seed in (1, 2)] == [1, 1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    status, output, error = train(*flags)
    assert (status, output) == (0, ""), "torchrun ends all processes if one fails; the first one prints the summary"
    assert error.startswith(reported)


def test_divergence_of_one_run_ends_a_list_with_status_1(call, tiny_data, tmp_path):
    flags = ["--data", "synthetic", "--optimizer", "sgd", "--without", "fc1", "--epochs", 1, "--lr", 1e12, 1e-2]
    good = tmp_path / "cnn_cifar10" / "synthetic_no-fc1_sgd_lr0.01_seed0"
    bad = tmp_path / "cnn_cifar10" / "synthetic_no-fc1_sgd_lr1e+12_seed0"
    status, output, error = call(cnn_cifar10, *flags, "--runs-dir", tmp_path)
    assert status == 1
    assert f"error: {bad}: the loss became nan in epoch 1 at learning rate 1e+12; " in error
    assert error.endswith("error: 1 of 2 runs could not be trained, for the reasons given above\n")
    assert "Test accuracy in % after epoch 1" in output
    assert len(read_rows(good)) == 1


def test_a_full_disk_ends_a_list_and_the_same_command_finishes_it(train, tmp_path, monkeypatch):
    flags = ("--epochs", 1, "--seed", 0, 1, 2)
    folders = [with_seed(tmp_path / "rnn_mnist" / NOISE_NAME, seed) for seed in (0, 1, 2)]
    with monkeypatch.context() as patch:
        fail_at_call(patch, utils, "save_tensors", 6, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        status, _, error = train(*flags)
    assert status == 1
    assert error == "rnn_mnist.py: error: No space left on device; free some space and run the same command again\n"
    assert [len(read_rows(folder)) for folder in folders] == [1, 0, 0]
    assert not folders[2].exists()
    assert train(*flags)[0] == 0
    assert [len(read_rows(folder)) for folder in folders] == [1, 1, 1]


def test_a_run_that_another_process_trains_is_waited_for_last(train, tmp_path):
    locked = tmp_path / "rnn_mnist" / NOISE_NAME
    other = with_seed(locked, 1)
    locked.mkdir(parents=True)
    is_held, seen = threading.Event(), []

    def hold_lock():
        with FileLock(locked / ".lock"):
            is_held.set()
            deadline = time.monotonic() + 120
            while not read_rows(other) and time.monotonic() < deadline:
                time.sleep(0.05)
            seen.extend([len(read_rows(other)), (locked / "config.json").exists()])

    holder = threading.Thread(target=hold_lock)
    holder.start()
    is_held.wait()
    status, output, _ = train("--epochs", 1, "--seed", 0, 1)
    holder.join()
    assert status == 0
    assert seen == [1, False]
    assert len(read_rows(locked)) == 1
    assert output.index(f"{other}: ") < output.index(f"{locked}: ")


@background_fixture
def shared_list(folder):
    """The CompletedProcess of torchrun with two processes and a list of four runs, and the runs' directory."""
    flags = "--nproc-per-node=2 rnn_mnist.py --data synthetic --epochs 1 --hidden-size 2 3 4 5 --batch-size 500"
    return run_command("-m", "torch.distributed.run", *flags.split(), "--runs-dir", folder), folder


def test_torchrun_shares_a_list_among_its_processes(shared_list):
    done, runs_dir = shared_list
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test accuracy in % after epoch 1") == 1
    folders = list((runs_dir / "rnn_mnist").iterdir())
    assert len(folders) == 4
    for folder in folders:
        [row] = read_rows(folder)
        assert done.stdout.count(f"{folder}: {float(row['test_accuracy']):.2f} % after epoch 1\n") == 1
        assert len(list(folder.glob("events*"))) == 1, "trained once"
