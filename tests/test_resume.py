"""A run goes on: after kill -9 and Ctrl-C, with more epochs, in a list whose other runs fail, beside other processes.

KILLS=20 python -m pytest tests/test_resume.py -k killed     more kills than the usual three
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
from dataclasses import replace
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
    beside,
    noise_digits,
    read_events,
    read_files,
    read_points,
    read_rows,
    rows_but_seconds,
    run_command,
    same,
    small,
    train_here,
    trained_state,
)
from filelock import FileLock
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

KILLS = int(os.environ.get("KILLS", "3"))
GRU = rnn_mnist.Config(cell="gru", hidden_size=8, lr=1e-2)
CNN = cnn_cifar10.Config(without="fc1", lr=1e-3, batch_size=32)


@pytest.fixture(autouse=True)
def _no_two_sessions_within_a_second(monkeypatch):
    """TensorBoard's reader takes the sessions' files in the order of their names, which begin with the second."""
    clock, calls = time.time, itertools.count()
    monkeypatch.setattr(time, "time", lambda: clock() + next(calls))


@pytest.fixture
def train(train_on_noise):
    return train_on_noise


def read_tensorboard(folder):
    """Return what TensorBoard's reader gives of a run: every point, image and histogram, and its settings."""
    events = read_events(folder)
    tags = events.Tags()
    images = [(tag, each.step, each.encoded_image_string) for tag in tags["images"] for each in events.Images(tag)]
    histograms = [
        (tag, each.step, each.histogram_value) for tag in tags["histograms"] for each in events.Histograms(tag)
    ]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    settings = {name: (value.string_value, value.number_value) for name, value in start.hparams.items()}
    return read_points(folder), images, histograms, settings


def read_snapshots(folder):
    return {path.name: utils.load_tensors(path) for path in folder.glob("snapshots/*")}


def assert_same_end(folder, undisturbed):
    assert rows_but_seconds(folder) == rows_but_seconds(undisturbed)
    assert same(trained_state(folder), trained_state(undisturbed))
    assert same(read_snapshots(folder), read_snapshots(undisturbed))
    assert read_tensorboard(folder) == read_tensorboard(undisturbed)
    assert not list(folder.rglob("*.part")), "leftovers are swept up"


@pytest.fixture
def assert_undisturbed(train, tmp_path):
    """Check that a run is what it would have become in so many epochs that nothing disturbed."""

    def check(folder, epochs):
        assert train("--epochs", epochs, runs_dir=tmp_path / "undisturbed")[0] == 0
        assert_same_end(folder, tmp_path / "undisturbed" / "rnn_mnist" / NOISE_NAME)

    return check


# Killed at any moment

RUNS = [  # whether a run starts over, and the changes to its files before, or within, which its sessions are killed
    (False, ["write checkpoint.pt", "open metrics.csv.part"]),
    (True, ["os.remove metrics.csv", "os.rename checkpoint.pt"]),
    (False, ["write metrics.csv", "os.rename config.json"]),
    (True, ["os.remove checkpoint.pt", "write epoch_02.pt"]),
]


def start_training(runs_dir, data, session, moment, *flags):
    """Train in a forked process, return its id; moment: of RUNS, at which it kills itself, or any other."""
    child = os.fork()
    if child:
        return child
    clock = time.time

    def look(event, args):  # called by Python before all that it does to a file, but for writing
        if args and f"{event} {os.path.basename(str(args[0]))}".startswith(str(moment)):
            os.kill(os.getpid(), signal.SIGKILL)

    class File(io.FileIO):
        def write(self, content):
            super().write(content[: len(content) // 2])
            look("write", [self.name])
            return super().write(content[len(content) // 2 :])

    sys.addaudithook(look)
    utils.open = lambda path, mode="r", **options: (File if mode == "wb" else io.open)(path, mode, **options)
    time.time = lambda: clock() + 2 * session
    utils.embedded_patterns = lambda size: data[3:]
    sys.argv = ["rnn_mnist.py", *NOISE_FLAGS.split(), "--runs-dir", str(runs_dir), *flags]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        utils.main(rnn_mnist.Config, rnn_mnist.train, rnn_mnist.REPORT, "")
    except SystemExit as ended:
        os._exit(ended.code)
    os._exit(99)


def assert_whole(folder):
    """Whether what stands under a real name is complete, and no record ahead of the checkpoint."""
    assert all(json.loads(path.read_text()) for path in folder.glob("config.json"))
    for path in folder.glob("checkpoint.pt"):
        history, rows = utils.load_tensors(path)["history"], read_rows(folder)
        assert rows == [{name: str(value) for name, value in row.items()} for row in history[: len(rows)]]
    read_snapshots(folder)


def torture(folder, kills):
    """Train a run undisturbed, and others that are killed as often as asked in all, in a change or at any moment."""
    from torch.utils.tensorboard import SummaryWriter  # noqa: F401, so that no child need import it

    torch.optim.Adam([torch.zeros(1)], fused=True)  # what the first optimizer imports
    data, rng, sessions, done = noise_digits(640), random.Random(0), itertools.count(), 0
    assert os.waitpid(start_training(folder / "undisturbed", data, next(sessions), None), 0)[1] == 0
    for number, (is_fresh, changes) in enumerate(itertools.cycle(RUNS)):
        if done == kills:
            break
        runs_dir, flags, status = folder / f"killed_{number}", ["--fresh"] * is_fresh, None
        if is_fresh:
            shutil.copytree(folder / "undisturbed", runs_dir)
        moments = [*changes, rng.uniform(0, 1), rng.uniform(0, 1)][: kills - done]
        while status != 0:
            moment = moments.pop(0) if moments else None
            child = start_training(runs_dir, data, next(sessions), moment, *flags)
            if isinstance(moment, float):
                time.sleep(moment)
                os.kill(child, signal.SIGKILL)
            status = os.waitpid(child, 0)[1]
            assert_whole(runs_dir / "rnn_mnist" / NOISE_NAME)
            done += os.WIFSIGNALED(status)
            is_refused = is_fresh and os.WIFEXITED(status) and os.WEXITSTATUS(status) == 2
            assert status == 0 or os.WIFSIGNALED(status) or is_refused
            flags = ["--fresh"] * is_refused  # where it was killed before all was deleted that needs a checkpoint


@beside
def tortured(folder):
    program = f"import pathlib, test_resume; test_resume.torture(pathlib.Path({str(folder)!r}), {KILLS})"
    return run_command("-c", program, env={"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}), folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(tortured):
    done, folder = tortured
    assert done.returncode == 0, done.stderr
    killed = [*folder.glob("killed_*")]
    assert killed
    for each in killed:
        assert_same_end(each / "rnn_mnist" / NOISE_NAME, folder / "undisturbed" / "rnn_mnist" / NOISE_NAME)


@pytest.mark.skipif(os.name != "posix", reason="needs signals between processes")
def test_ctrl_c_is_told_in_one_line_while_torch_is_loaded_too(tmp_path):
    command = [sys.executable, "rnn_mnist.py", *NOISE_FLAGS.split(), "--runs-dir", str(tmp_path)]
    hear = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # also where this process ignores it, as under nohup
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1, preexec_fn=hear)
    assert process.stdout.readline() == "loading torch ...\n"
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode in (130, -signal.SIGINT)  # a shell calls both 130
    assert error.count("\n") == 1
    assert "interrupted" in error


# Interrupted within a process: what a kill leaves behind, at moments that it would seldom meet


class DroppingReader(rnn_mnist.RowReader):
    def __init__(self, config):
        super().__init__(config)
        self.fc = nn.Sequential(nn.Dropout(0.5), self.fc)


def fail_at(patch, owner, name, number, error=KeyboardInterrupt):
    """Let a function fail when it is called for the number-th time."""
    function, calls = getattr(owner, name), itertools.count(1)

    def call(*args):
        if next(calls) == number:
            raise error
        return function(*args)

    patch.setattr(owner, name, call)


@pytest.mark.parametrize(
    ("script", "changes", "network", "moment"),
    [
        (rnn_mnist, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, rnn_mnist.RowReader, (rnn_mnist, "evaluate", 2)),
        (rnn_mnist, {}, DroppingReader, (utils, "save_tensors", 5)),
        (cnn_cifar10, {}, None, (utils, "save_tensors", 5)),
        (cnn_cifar10, {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}, None, (utils.Run, "write_metrics", 2)),
    ],
)
def test_a_run_interrupted_in_its_second_epoch_continues_as_if_it_had_not_been(
    script, changes, network, moment, tiny_data, tmp_path, monkeypatch
):
    config, data = replace(GRU if script is rnn_mnist else CNN, **changes), small(tiny_data[script], 96, 100)
    monkeypatch.setattr(rnn_mnist, "RowReader", network)
    undisturbed = train_here(script, tmp_path / "undisturbed", data, config, 3)
    with monkeypatch.context() as patch:
        fail_at(patch, *moment)
        with pytest.raises(KeyboardInterrupt):
            train_here(script, tmp_path / "interrupted", data, config, 3)
    assert_whole(tmp_path / "interrupted" / undisturbed.relative_to(tmp_path / "undisturbed"))
    torch.rand(17)  # whatever else this process draws
    assert_same_end(train_here(script, tmp_path / "interrupted", data, config, 3), undisturbed)


@pytest.mark.parametrize("then", [2, 3], ids=["repeated", "extended"])
def test_a_kill_between_checkpoint_and_metrics_costs_nothing(train, tmp_path, monkeypatch, assert_undisturbed, then):
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    with monkeypatch.context() as patch:
        fail_at(patch, utils.Run, "write_metrics", 2)
        assert train("--epochs", 2)[0] == 130
    assert [len(read_rows(folder)), len(utils.read_history(folder))] == [1, 2]
    seconds = [row["seconds"] for row in utils.read_history(folder)]
    status, output, _ = train("--epochs", then)
    assert status == 0
    assert ("complete after epoch 2" in output) == (then == 2)
    assert [float(row["seconds"]) for row in read_rows(folder)[:2]] == seconds, "nothing was trained again"
    assert_undisturbed(folder, then)


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


@pytest.mark.parametrize("share", [0, 0.5, 0.97], ids=["lost", "half", "shortened"])
def test_repeating_a_command_adds_nothing_where_events_are_lost(train, finished_run, share):
    runs_dir = finished_run.parents[1]
    [events] = finished_run.glob("events.*")
    if share:
        os.truncate(events, int(share * events.stat().st_size))
    else:
        events.unlink()
    before = read_files(finished_run)
    for _ in range(2):
        assert train("--epochs", 1, runs_dir=runs_dir)[0] == 0
        assert read_files(finished_run) == before
    assert train("--epochs", 2, runs_dir=runs_dir)[0] == 0
    steps = [step for tag, step, _ in read_points(finished_run) if tag == "Loss/Test"]
    assert steps in ([2], [1, 2]), "what is lost does not come back, what comes is there once"


def test_a_run_extended_by_an_epoch_is_one_that_was_asked_for_it_at_once(train, tmp_path, assert_undisturbed):
    for epochs in (2, 3):
        status, output, _ = train("--epochs", epochs)
        assert status == 0
    assert f"{NOISE_NAME}: 1,434 parameters, cpu, fp32, continuing after epoch 2\n" in output
    assert_undisturbed(tmp_path / "rnn_mnist" / NOISE_NAME, 3)
    folder, whole = (each / "rnn_mnist" / NOISE_NAME for each in (tmp_path, tmp_path / "undisturbed"))
    assert (folder / "config.json").read_text() == (whole / "config.json").read_text()
    settings = read_tensorboard(folder)[-1]
    assert settings["hidden_size"] == ("", 8)
    assert "epochs" not in settings, "TensorBoard would show those of the first session for ever"


def test_fresh_deletes_all_and_ctrl_c_promises_no_more_than_is_kept(
    train, finished_run, monkeypatch, assert_undisturbed
):
    runs_dir = finished_run.parents[1]
    assert train("--epochs", 3, runs_dir=runs_dir)[0] == 0
    for number, path in enumerate(finished_run.glob("events.*")):
        path.rename(finished_run / f"events.out.tfevents.{number}.reference")
    (finished_run / "figures").mkdir()
    (finished_run / "figures" / "curves.png").write_text("a picture")
    for finished in (0, 1):
        with monkeypatch.context() as patch:
            fail_at(patch, rnn_mnist, "evaluate", finished + 1)
            status, _, error = train("--epochs", 3, "--fresh", runs_dir=runs_dir)
        assert status == 130
        assert error.endswith(": interrupted; what this command finished is kept, and without --fresh it continues\n")
        assert len(read_rows(finished_run)) == finished, "of the three that were there, none"
    assert "continuing after epoch 1" in train("--epochs", 3, runs_dir=runs_dir)[1]
    assert_undisturbed(finished_run, 3)
    [begun, continued] = finished_run.glob("events.*")
    names = {begun.name, continued.name, "config.json", "metrics.csv", "checkpoint.pt", "snapshots"}
    assert {path.name for path in finished_run.iterdir()} - {".lock"} == names


# Typed flags


@pytest.mark.parametrize(("begun", "other"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_precision_and_threads_of_the_start_are_used_again_and_another_typed_precision_is_refused(
    begun, other, call, tmp_path, monkeypatch
):
    config, data = replace(CNN, dataset="mnist", batch_size=8), noise_digits(8)
    monkeypatch.setattr(utils, "embedded_patterns", lambda _: data[3:])
    folder = tmp_path / "cnn_cifar10" / f"synthetic_{config.name}"

    def train(threads, native, *flags):
        monkeypatch.setattr(utils, "share_of_cores", lambda: threads)
        monkeypatch.setattr(utils, "multiplies_bf16", lambda device: native == "bf16")
        settings = "--dataset=mnist --without=fc1 --lr=1e-3 --batch-size=8 --data=synthetic --runs-dir"
        return call(cnn_cifar10, *settings.split(), tmp_path, *flags)

    assert train(2, begun, "--epochs", 1)[0] == 0
    words = f"{folder} was begun with --precision {begun}, not {other}; leave it out"
    for epochs in (1, 2):
        assert_refused(train(1, other, "--epochs", epochs, "--precision", other), words)
    assert len(read_rows(folder)) == 1
    assert train(1, other, "--epochs", 2)[0] == 0
    assert torch.get_num_threads() == 2
    conditions = json.loads((folder / "config.json").read_text())["conditions"]
    assert (conditions["precision"], conditions["threads"], len(read_rows(folder))) == (begun, 2, 2)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_typed_device_that_is_not_the_runs_is_refused_and_one_that_is_not_there_too(train, finished_run, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    runs_dir = finished_run.parents[1]
    for epochs in (1, 2):
        outcome = train("--epochs", epochs, "--device", device, runs_dir=runs_dir)
        assert_refused(outcome, f"{finished_run} was begun with --device cpu, not {device}; leave it out")
    checkpoint = utils.load_tensors(finished_run / "checkpoint.pt")
    checkpoint["record"]["conditions"]["device"] = device
    utils.save_tensors(finished_run / "checkpoint.pt", checkpoint)
    outcome = train("--epochs", 2, "--device", "cpu", runs_dir=runs_dir)
    assert_refused(outcome, f"{finished_run} was begun with --device {device}, not cpu")
    outcome = train("--epochs", 2, "--device", "auto", runs_dir=runs_dir)
    assert_refused(outcome, f"{finished_run}: the device {device} is not there; ")
    assert "start over with --fresh" in outcome[2]
    assert "use --device cpu, or" not in outcome[2], "which is refused"


# A loss that is no longer finite


class InfiniteLoss(utils.Metrics):
    def add(self, loss, logits, labels):
        super().add(loss * torch.inf, logits, labels)


def test_divergence_keeps_the_last_finite_epoch_to_go_on(train, finished_run, monkeypatch, assert_undisturbed):
    before = read_files(finished_run)
    with monkeypatch.context() as patch:
        patch.setattr(rnn_mnist, "Metrics", InfiniteLoss)
        status, _, error = train("--epochs", 3, runs_dir=finished_run.parents[1])
    assert status == 1
    words = "in epoch 2 at learning rate 0.01; what it finished is kept; try a smaller --lr"
    assert error == f"rnn_mnist.py: error: {finished_run}: the loss became inf {words}\n"
    for path in (finished_run / "checkpoint.pt", finished_run / "metrics.csv"):
        assert path.read_bytes() == before[path]
    assert train("--epochs", 3, runs_dir=finished_run.parents[1])[0] == 0
    assert_undisturbed(finished_run, 3)


# Lists


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("", "mine", ""),
        ("metrics.csv", "epoch\n1\n", " holds metrics.csv but no checkpoint.pt"),
        ("checkpoint.pt", "PK, not what it was", "/checkpoint.pt is damaged"),
    ],
    ids=["a-file", "no-checkpoint", "damaged-checkpoint"],
)
def test_a_run_that_fails_is_told_and_counted_and_the_rest_goes_on(train, tmp_path, monkeypatch, name, content, words):
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    (folder if name else folder.parent).mkdir(parents=True)
    (folder / name).write_text(content)
    command = ("--epochs", 1, "--seed", 1, 0, 2)
    status, output, error = train(*command)
    assert status == 2
    told, end = error.splitlines()
    assert told.startswith(f"error: {folder}{words}")
    assert end == "rnn_mnist.py: error: 1 of 3 runs could not be trained, for the reasons given above"
    progress = [line for line in output.splitlines() if " of 3 runs" in line]
    assert progress == ["1 of 3 runs, 0 min", "2 of 3 runs, 0 min", "3 of 3 runs, 0 min"]
    assert "Test accuracy in % after epoch 1" in output
    assert (folder / name).read_text() == content
    others = [folder.with_name(NOISE_NAME.replace("seed0", f"seed{seed}")) for seed in (1, 2)]
    assert [len(read_rows(other)) for other in others] == [1, 1]
    monkeypatch.setattr(utils, "PROCESSES", 2)
    monkeypatch.setattr(utils, "IS_FIRST", False)
    status, output, error = train(*command)
    assert (status, output) == (0, ""), "a process that fails ends the others; the first one tells the end"
    assert error.startswith(told)


def test_a_run_that_diverges_makes_a_list_end_with_status_1_after_all_others(call, tiny_data, tmp_path):
    """Also beside one that fails for another reason."""
    flags = ["--data", "synthetic", "--optimizer", "sgd", "--without", "fc1", "--epochs", 1, "--lr", 1e12, 1e-2]
    good, bad = (tmp_path / "cnn_cifar10" / f"synthetic_no-fc1_sgd_lr{lr}_seed0" for lr in ("0.01", "1e+12"))
    for failed in (1, 2):
        status, output, error = call(cnn_cifar10, *flags, "--runs-dir", tmp_path)
        assert status == 1
        assert f"error: {bad}: the loss became nan in epoch 1 at learning rate 1e+12; " in error
        assert error.endswith(f"error: {failed} of 2 runs could not be trained, for the reasons given above\n")
        assert ("Test accuracy in % after epoch 1" in output) == (failed == 1)
        assert len(read_rows(good)) == 1
        (good / "checkpoint.pt").unlink(missing_ok=True)


def test_a_full_disk_ends_a_list_and_the_same_command_finishes_it(train, tmp_path, monkeypatch):
    command = ("--epochs", 1, "--seed", 0, 1, 2)
    folders = [tmp_path / "rnn_mnist" / NOISE_NAME.replace("seed0", f"seed{seed}") for seed in (0, 1, 2)]
    with monkeypatch.context() as patch:
        fail_at(patch, utils, "save_tensors", 6, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        status, _, error = train(*command)
    assert status == 1
    assert error == "rnn_mnist.py: error: No space left on device; free some space and run the same command again\n"
    assert [len(read_rows(folder)) for folder in folders] == [1, 0, 0]
    assert not folders[2].exists()
    assert train(*command)[0] == 0
    assert [len(read_rows(folder)) for folder in folders] == [1, 1, 1]


def test_a_run_that_another_process_trains_is_waited_for_after_all_others(train, tmp_path):
    locked, other = (tmp_path / "rnn_mnist" / NOISE_NAME.replace("seed0", f"seed{seed}") for seed in (0, 1))
    locked.mkdir(parents=True)
    is_held, seen = threading.Event(), []

    def another_process():
        with FileLock(locked / ".lock"):
            is_held.set()
            deadline = time.monotonic() + 120
            while not read_rows(other) and time.monotonic() < deadline:
                time.sleep(0.05)
            seen.extend([len(read_rows(other)), (locked / "config.json").exists()])

    waiting = threading.Thread(target=another_process)
    waiting.start()
    is_held.wait()
    status, output, _ = train("--epochs", 1, "--seed", 0, 1)
    waiting.join()
    assert status == 0
    assert seen == [1, False]
    assert len(read_rows(locked)) == 1
    assert output.index(f"{other}: ") < output.index(f"{locked}: ")


@beside
def shared(folder):
    flags = "--nproc-per-node=2 rnn_mnist.py --data synthetic --epochs 1 --hidden-size 2 3 4 5 --batch-size 500"
    return run_command("-m", "torch.distributed.run", *flags.split(), "--runs-dir", folder), folder


def test_torchrun_shares_a_list_among_its_processes(shared):
    done, runs_dir = shared
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test accuracy in % after epoch 1") == 1
    folders = list((runs_dir / "rnn_mnist").iterdir())
    assert len(folders) == 4
    for folder in folders:
        [row] = read_rows(folder)
        assert done.stdout.count(f"{folder}: {float(row['test_accuracy']):.2f} % after epoch 1\n") == 1
        assert len(list(folder.glob("events*"))) == 1, "trained once"
