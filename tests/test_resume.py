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
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from unittest.mock import Mock

import cnn_cifar10
import rnn_mnist
import utils

import pytest
import torch
from conftest import (
    NOISE_FLAGS,
    NOISE_NAME,
    ROOT,
    SMALL_CNN,
    SMALL_GRU,
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
from tensorboard.summary.writer.record_writer import RecordWriter
from torch import nn

KILLS = int(os.environ.get("KILLS", "3"))


@pytest.fixture(autouse=True)
def _new_second_for_each_session(monkeypatch):
    """TensorBoard's reader sorts the files of the sessions by their names, which begin with the second."""
    clock, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() + next(calls))


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
    return {path.name: utils.load_tensors(path) for path in folder.glob("snapshots/*.pt")}


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
    """Return what a run's training depends on or led to: metrics, weights, and the optimizer's state."""
    checkpoint = utils.load_tensors(folder / "checkpoint.pt")
    for row in checkpoint["history"]:
        del row["seconds"]
    return [checkpoint["history"], checkpoint["state"]]


def assert_same_end(folder, undisturbed):
    """Check that two runs ended with the same metrics, weights and TensorBoard data."""
    assert_whole(folder)
    assert len(read_rows(folder)) == len(read_rows(undisturbed))
    assert same(trained_state(folder), trained_state(undisturbed))
    assert same(read_snapshots(folder), read_snapshots(undisturbed))
    assert read_tensorboard(folder) == read_tensorboard(undisturbed)


@pytest.fixture
def undisturbed(tmp_path):
    """The folder of a run of three epochs like those of `train`, which nothing disturbed."""
    return train_here(rnn_mnist, tmp_path / "undisturbed", noise_digits(320), SMALL_GRU, epochs=3)


# Killed at any moment

# Whether runs are started over with --fresh, and the changes to files before which, or within which, they are killed.
KILL_PLANS = [
    (False, ["write checkpoint.pt", "open metrics.csv."]),
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
            assert os.WIFSIGNALED(status) or is_refused or (status == 0 and not isinstance(moment, str)), moment
            moments = [moment, *moments] if is_refused else moments
            has_planned = bool(moments) and isinstance(moments[0], str)
            flags = ["--fresh"] if is_refused or (is_fresh and has_planned) else []


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


def test_ctrl_c_while_torch_is_loaded_is_answered_in_one_line(tmp_path):
    (tmp_path / "filelock.py").write_text("raise KeyboardInterrupt")  # loaded after torch
    done = run_command("rnn_mnist.py", env={"PYTHONPATH": str(tmp_path)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# Interrupted at moments that a kill would seldom meet


class DroppingReader(rnn_mnist.RowReader):
    """A network with dropout, whose training depends on random numbers."""

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


SGD = {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}


@pytest.mark.parametrize(
    ("script", "config", "network"),
    [
        (rnn_mnist, replace(SMALL_GRU, **SGD), rnn_mnist.RowReader),
        (rnn_mnist, SMALL_GRU, DroppingReader),
        (cnn_cifar10, SMALL_CNN, None),
        (cnn_cifar10, replace(SMALL_CNN, **SGD), None),
    ],
    ids=["rnn_sgd", "rnn_adam_dropout", "cnn_adam", "cnn_sgd"],
)
def test_a_run_interrupted_in_its_second_epoch_continues_exactly(
    script, config, network, tiny_data, tmp_path, monkeypatch
):
    data = small(tiny_data[script], 96, 100)
    monkeypatch.setattr(rnn_mnist, "RowReader", network)
    undisturbed = train_here(script, tmp_path / "undisturbed", data, config, 3)
    with monkeypatch.context() as patch:
        fail_at_call(patch, utils, "save_tensors", 5)  # the second checkpoint
        with pytest.raises(KeyboardInterrupt):
            train_here(script, tmp_path / "interrupted", data, config, 3)
    assert_whole(tmp_path / "interrupted" / undisturbed.relative_to(tmp_path / "undisturbed"))
    torch.rand(17)  # the process may draw other random numbers in between
    assert_same_end(train_here(script, tmp_path / "interrupted", data, config, 3), undisturbed)
    assert not list(tmp_path.rglob("*.part")), "no unfinished file is left"


def test_two_writers_of_a_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    """The second one, in another thread, begins and ends while the first one waits for the disk."""
    path = tmp_path / "metrics.csv"

    def write_meanwhile(_):
        monkeypatch.setattr(os, "fsync", lambda _: None)
        with ThreadPoolExecutor() as pool:
            pool.submit(utils.write_atomically, path, b"second").result()

    monkeypatch.setattr(os, "fsync", write_meanwhile)
    utils.write_atomically(path, b"first")
    assert read_files(tmp_path) == {path: b"first"}


def test_a_file_that_others_hold_is_replaced_at_the_third_try(tmp_path, monkeypatch):
    """As a virus scanner on Windows holds it; the second time, three tries are too few."""
    path = tmp_path / "metrics.csv"
    held = PermissionError(errno.EACCES, "Permission denied")
    monkeypatch.setattr(os, "replace", Mock(side_effect=[held, held, None, held, held, held]))
    monkeypatch.setattr(time, "sleep", lambda _: None)
    utils.write_atomically(path, b"new")
    with pytest.raises(OSError, match="denied") as failed:
        utils.write_atomically(path, b"new")
    assert utils.describe_error(failed.value) == (2, f"error: {path}: Permission denied")
    assert not list(tmp_path.iterdir()), "no unfinished file is left"


# Complete, extended, started over


def test_a_complete_run_is_left_as_it_is_and_needs_no_lock(train, finished_run):
    """A folder in place of the lock stands for a run that may only be read, since root may write everything."""
    (finished_run / ".lock").unlink(missing_ok=True)
    (finished_run / ".lock").mkdir()
    before = read_files(finished_run)
    status, output, error = train("--epochs", 1)
    assert (status, error) == (0, "")
    assert f"{finished_run}: complete after epoch 1; a larger --epochs extends it" in output
    assert read_files(finished_run) == before


def test_a_complete_run_gets_a_missing_config_and_missing_metrics(train, finished_run):
    """As after a kill just before the last epoch is added to metrics.csv."""
    before = read_files(finished_run)
    (finished_run / "config.json").unlink()
    (finished_run / "metrics.csv").write_text("epoch,test_accuracy\n")
    assert train("--epochs", 1)[0] == 0
    assert read_files(finished_run) == before


def test_metrics_ahead_of_the_checkpoint_are_refused(train, finished_run):
    path = finished_run / "metrics.csv"
    path.write_text(path.read_text() + "2,1,1,1,1,1\n")
    assert_refused(train("--epochs", 2), f"{path} has more epochs than checkpoint.pt; delete it to continue")
    path.unlink()
    assert train("--epochs", 2)[0] == 0


def test_an_extended_run_equals_one_of_as_many_epochs(train, finished_run, undisturbed):
    status, output, _ = train("--epochs", 3)
    assert status == 0
    assert f"{finished_run}: 1,434 parameters, cpu, fp32, continuing after epoch 1\n" in output
    assert (finished_run / "config.json").read_text() == (undisturbed / "config.json").read_text()
    assert_same_end(finished_run, undisturbed)
    assert train("--epochs", 2)[1].count("complete after epoch 3") == 1, "a smaller --epochs changes nothing"


def test_fresh_deletes_what_was_trained_and_no_other_file(train, finished_run, monkeypatch, undisturbed):
    [events] = finished_run.glob("events.*")
    events.rename(finished_run / "events.out.tfevents.0.reference")
    mine = [finished_run / name for name in ("notes.txt", "figures/curves.png", "snapshots/best.pt")]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine")
    with monkeypatch.context() as patch:
        fail_at_call(patch, rnn_mnist, "evaluate", 1)
        status, _, error = train("--epochs", 3, "--fresh")
    assert status == 130
    assert error.endswith(": interrupted; finished work is kept; the same command, without --fresh, continues\n")
    assert read_rows(finished_run) == [], "no epoch from before is left"
    assert train("--epochs", 3)[0] == 0
    for path in mine:
        assert path.read_text() == "mine"
        path.unlink()
    (finished_run / "figures").rmdir()
    assert_same_end(finished_run, undisturbed)
    names = {path.name for path in finished_run.iterdir()}
    events = {name for name in names if "events" in name}
    assert len(events) == 1, "the interrupted session finished no epoch"
    assert names - events == {path.name for path in undisturbed.iterdir() if "events" not in path.name}


# Settings and conditions that differ from those of the checkpoint


@dataclass(frozen=True)
class SmallerBatches(rnn_mnist.Config):
    """What rnn_mnist.Config would be with another default."""

    batch_size: int = 32


@pytest.mark.parametrize("epochs", [1, 2], ids=["complete", "extended"])
def test_a_run_with_other_settings_is_refused_with_both_values(epochs, train, finished_run, monkeypatch):
    """A changed default is not part of the folder's name."""
    before = read_files(finished_run)
    monkeypatch.setattr(rnn_mnist, "Config", SmallerBatches)
    way_out = "start over with --fresh, or use another --runs-dir"
    message = f"{finished_run} was trained with --batch-size 64, not 32; {way_out}"
    assert_refused(train("--epochs", epochs), message)
    assert read_files(finished_run) == before


@pytest.mark.parametrize(
    ("first_cpu", "first", "other_cpu", "other"),
    [
        ("avx512_bf16", "bf16", "avx512", "fp32"),
        ("amx_bf16", "bf16", "avx2", "fp32"),
        ("avx2", "fp32", "amx_bf16", "bf16"),
    ],
)
def test_precision_and_threads_are_chosen_once(first_cpu, first, other_cpu, other, call, tmp_path, monkeypatch):
    """Automatic precision is bf16 where the processor computes in it."""
    use_as_synthetic(monkeypatch, noise_digits(8))
    settings = f"--dataset mnist --without fc1 --batch-size 8 --data synthetic --device cpu --runs-dir {tmp_path}"

    def train(cpu, threads, *flags):
        monkeypatch.setattr(utils, "available_threads", lambda: threads)
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {cpu: True}, raising=False)
        return call(cnn_cifar10, *settings.split(), *flags)

    assert train(first_cpu, 2, "--epochs", 1)[0] == 0
    [folder] = (tmp_path / "cnn_cifar10").iterdir()
    outcome = train(other_cpu, 1, "--epochs", 2, "--precision", other)
    assert_refused(outcome, f"{folder} was trained with --precision {first}, not {other}; leave it out, or ")
    assert train(other_cpu, 1, "--epochs", 2)[0] == 0
    assert torch.get_num_threads() == 2
    conditions = json.loads((folder / "config.json").read_text())["conditions"]
    assert (conditions["precision"], conditions["threads"], len(read_rows(folder))) == (first, 2, 2)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_another_or_an_unavailable_device_is_refused(device, train, finished_run):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    outcome = train("--epochs", 2, "--device", device)
    assert_refused(outcome, f"{finished_run} was trained with --device cpu, not {device}; leave it out, or ")
    checkpoint = utils.load_tensors(finished_run / "checkpoint.pt")
    checkpoint["record"]["conditions"]["device"] = device
    utils.save_tensors(finished_run / "checkpoint.pt", checkpoint)
    outcome = train("--epochs", 2, "--device", "auto")
    assert_refused(outcome, f"{finished_run}: the device {device} is not available; start over with --fresh")
    assert "--device cpu" not in outcome[2], "that would be refused"
    assert train("--epochs", 1, "--device", "auto")[0] == 0, "a complete run needs no device"


# Lists of runs, and several processes


class InfiniteLoss(utils.Metrics):
    def update(self, loss, logits, labels):
        super().update(loss * torch.inf, logits, labels)


def test_divergence_ends_with_status_1_and_keeps_finished_epochs(train, finished_run, monkeypatch, undisturbed):
    before = read_files(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(rnn_mnist, "Metrics", InfiniteLoss)
        status, _, error = train("--epochs", 3, "--seed", 0, 1)
    assert status == 1
    reported, _, summary = error.splitlines()
    advice = "in epoch 2 at learning rate 0.01; finished epochs are kept; try a smaller --lr"
    assert reported == f"error: {finished_run}: the loss became inf {advice}"
    assert summary == "rnn_mnist.py: error: 2 of 2 runs could not be trained, for the reasons given above"
    for name in ("checkpoint.pt", "metrics.csv"):
        assert (finished_run / name).read_bytes() == before[finished_run / name]
    assert train("--epochs", 3)[0] == 0
    assert_same_end(finished_run, undisturbed)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("", "mine", ""),
        ("metrics.csv", "epoch\n1\n", " holds metrics.csv but no checkpoint.pt"),
        ("checkpoint.pt", "PK, then something else", "/checkpoint.pt is damaged"),
        (".lock/notes.txt", "mine", "/.lock: "),
    ],
    ids=["a-file", "no-checkpoint", "damaged-checkpoint", "no-lock"],
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
    assert progress == ["1 of 3 runs done", "2 of 3 runs done", "3 of 3 runs done"]
    assert "Test accuracy in % after epoch 1" in output
    assert path.read_text() == content
    assert [len(read_rows(with_seed(folder, seed))) for seed in (1, 2)] == [1, 1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    assert train(*flags) == (0, "", ""), "torchrun ends all processes if one fails; the first one reports failures"


def test_a_full_disk_ends_a_list_and_the_same_command_finishes_it(train, tmp_path, monkeypatch):
    flags = ("--epochs", 1, "--seed", 0, 1, 2)
    folders = [with_seed(tmp_path / "rnn_mnist" / NOISE_NAME, seed) for seed in (0, 1, 2)]
    with monkeypatch.context() as patch:
        fail_at_call(patch, os, "fsync", 12, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))  # seven a run
        status, _, error = train(*flags)
    assert status == 1
    reason = "No space left on device; free some space and run the same command again"
    assert error == f"rnn_mnist.py: error: {folders[1] / 'checkpoint.pt'}: {reason}\n"
    assert [len(read_rows(folder)) for folder in folders] == [1, 0, 0]
    assert not folders[2].exists()
    assert train(*flags)[0] == 0
    assert [len(read_rows(folder)) for folder in folders] == [1, 1, 1]


def test_a_full_disk_in_tensorboards_thread_gives_one_line(train, monkeypatch):
    error = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(RecordWriter, "write", Mock(side_effect=error))
    monkeypatch.setattr(threading, "excepthook", threading.__excepthook__)  # in place of pytest's
    status, _, lines = train("--epochs", 1)
    advice = "free some space and run the same command again"
    assert (status, lines) == (1, f"rnn_mnist.py: error: No space left on device; {advice}\n")


def test_a_run_that_another_process_trains_is_waited_for_last(train, tmp_path, monkeypatch):
    locked = tmp_path / "rnn_mnist" / NOISE_NAME
    other = with_seed(locked, 1)
    locked.mkdir(parents=True)
    lock = FileLock(locked / ".lock")
    lock.acquire()
    evaluate = rnn_mnist.evaluate

    def evaluate_and_release(*args):
        lock.release()
        return evaluate(*args)

    monkeypatch.setattr(rnn_mnist, "evaluate", evaluate_and_release)
    status, output, _ = train("--epochs", 1, "--seed", 0, 1)
    assert status == 0
    assert output.index(f"{other}: ") < output.index(f"{locked}: ")
    assert [len(read_rows(folder)) for folder in (locked, other)] == [1, 1]


SHARED_LIST = """
import sys
sys.path[:0] = {paths}
import rnn_mnist, test_resume, utils
utils.main(rnn_mnist.Config, test_resume.train_or_diverge, [], "")
"""


def train_or_diverge(config, run, data):
    """Train an experiment; with three hidden units its loss becomes infinite."""
    rnn_mnist.Metrics = InfiniteLoss if config.hidden_size == 3 else utils.Metrics
    rnn_mnist.train(config, run, data)


@background_fixture
def shared_list(folder):
    """The CompletedProcess of torchrun with two processes and a list of four runs, and the folder of these runs."""
    program = folder / "shared_list.py"
    program.write_text(SHARED_LIST.format(paths=[str(ROOT), str(ROOT / "tests")]))
    command = f"-m torch.distributed.run --nproc-per-node=2 {program} --data synthetic --epochs 1 --batch-size 500"
    done = run_command(*command.split(), "--hidden-size", 2, 3, 4, 5, "--runs-dir", folder)
    return done, folder / "rnn_mnist"


def test_torchrun_shares_a_list_and_reports_a_divergence_once(shared_list):
    done, runs_dir = shared_list
    assert done.returncode == 1, done.stderr
    assert done.stdout.count("Test accuracy in % after epoch 1") == 1
    assert done.stderr.count("the loss became inf in epoch 1") == 1
    assert done.stderr.count(": error: 1 of 4 runs could not be trained") == 1
    folders = list(runs_dir.iterdir())
    assert sorted(len(read_rows(folder)) for folder in folders) == [0, 1, 1, 1]
    for folder in folders:
        assert len(list(folder.glob("events*"))) == 1, "trained once"
