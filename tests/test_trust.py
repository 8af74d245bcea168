"""Nothing is lost: runs that are killed, files that are damaged, settings that are forged, disks that are full.

KILLS=20 python -m pytest tests/test_trust.py -k killed     more kills than the usual three
"""

import errno
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils

import numpy as np
import pytest
import torch
from conftest import (
    CONFIGS,
    EPOCHS,
    FORGED,
    NOISE_FLAGS,
    NOISE_NAME,
    ROOT,
    assert_refused,
    noise_digits,
    random_config,
    read_files,
    read_points,
    read_rows,
    rows_but_seconds,
    run_command,
    same,
    train_here,
    trained_state,
)

KILLS = int(os.environ.get("KILLS", "3"))

# A run that is killed


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
    sys.argv = ["rnn_mnist.py", *NOISE_FLAGS.split(), "--runs-dir", str(runs_dir)]
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        utils.main(rnn_mnist.Config, rnn_mnist.train, rnn_mnist.REPORT)
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
        child = train_until_killed(runs_dir, data, rng.randrange(16) if in_write and done < kills else None)
        if not in_write and done < kills:
            time.sleep(rng.uniform(0.2, 2.0))
            with suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        whole_files_only(runs_dir / "rnn_mnist" / NOISE_NAME)
        done += os.WIFSIGNALED(status)
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            return done


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that fork")
def test_a_run_killed_at_any_moment_ends_like_one_never_interrupted(tmp_path):
    program = f"import pathlib, test_trust; test_trust.torture(pathlib.Path({str(tmp_path)!r}), {KILLS})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100 + 10 * KILLS)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"killed {KILLS} times"
    for folder in tmp_path.glob("killed*"):
        assert_same_end(folder / "rnn_mnist" / NOISE_NAME, tmp_path / "undisturbed" / "rnn_mnist" / NOISE_NAME)


def assert_same_end(folder, undisturbed):
    assert rows_but_seconds(folder) == rows_but_seconds(undisturbed)
    points = read_points(folder)
    assert max(Counter((tag, step) for tag, step, _ in points).values()) == 1, "no epoch appears twice"
    assert sorted(points) == sorted(read_points(undisturbed))
    assert same(trained_state(folder), trained_state(undisturbed))
    assert not list(folder.rglob("*.part")), "leftovers are swept up"


@pytest.fixture
def train(train_on_noise):
    return train_on_noise


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
    whole_files_only(tmp_path / "rnn_mnist" / NOISE_NAME)
    assert not list(tmp_path.rglob("*.part"))
    assert train()[0] == 0
    assert train(runs_dir=tmp_path / "undisturbed")[0] == 0
    assert_same_end(tmp_path / "rnn_mnist" / NOISE_NAME, tmp_path / "undisturbed" / "rnn_mnist" / NOISE_NAME)


def test_a_reader_that_goes_away(tmp_path):
    command = [sys.executable, "rnn_mnist.py", *NOISE_FLAGS.split(), "--epochs", "500", "--batch-size", "1000"]
    command += ["--runs-dir", str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, text=True, stdout=-1, stderr=-1)
    next(line for line in process.stdout if line.startswith("  2/500"))
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(timeout=60) == 143
    assert error.count("\n") == 1
    assert "the same command continues" in error
    assert len(utils.read_metrics(next((tmp_path / "rnn_mnist").iterdir()))) >= 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs the signal of a terminal that goes away")
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


def test_a_runs_folder_that_is_read_only(train, tmp_path, monkeypatch):
    """Root may write everywhere, so the refusal is invented."""

    def refuse(path, *_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    status, _, error = train()
    assert status == 2
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    assert f"Read-only file system: {folder}; name a file or folder that can be used" in error


def test_a_run_folder_that_is_a_file_or_another_experiment(train, tmp_path):
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    folder.parent.mkdir()
    folder.write_text("mine")
    assert_refused(train(), str(folder))
    assert folder.read_text() == "mine"
    folder.unlink()
    assert train("--epochs", "1")[0] == 0
    folder.rename(folder.with_name(NOISE_NAME.replace("seed0", "seed1")))
    before = read_files(folder.parent)
    assert_refused(train("--seed", "1"), "holds another experiment; --fresh starts over, or use another --runs-dir")
    assert read_files(folder.parent) == before


# The checkpoint is the only truth


@pytest.fixture
def _stopped_clock(monkeypatch):
    """Let every epoch take no time, so that the bytes of metrics.csv can be compared."""
    monkeypatch.setattr(utils.time, "perf_counter", lambda: 0.0)


def fail(*_, **__):
    raise KeyboardInterrupt


def publish_half(run, events):
    """Stop while TensorBoard's file is written."""
    with open(run.folder / utils.EVENTS, "ab") as file:
        file.write(events["written"].numpy().tobytes()[:100])
    raise KeyboardInterrupt


def publish_but_metrics(run, events, publish=utils.Run._publish):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "table_text", fail)
        publish(run, events)


@pytest.mark.parametrize("interrupted", [fail, publish_half, publish_but_metrics])
@pytest.mark.parametrize("epochs", [1, 2])
@pytest.mark.usefixtures("_stopped_clock")
def test_what_follows_from_a_checkpoint_is_brought_up_to_it(train, tmp_path, monkeypatch, epochs, interrupted):
    """The last epoch asked for is in the checkpoint when the run is killed; then it is complete, or extended."""
    folder, undisturbed = (each / "rnn_mnist" / NOISE_NAME for each in (tmp_path, tmp_path / "undisturbed"))
    if epochs > 1:
        assert train("--epochs", epochs - 1)[0] == 0
    with monkeypatch.context() as patch:
        publish = iter([utils.Run._publish] * (epochs > 1) + [interrupted])  # on opening, then after the last epoch
        patch.setattr(utils.Run, "_publish", lambda run, events: next(publish)(run, events))
        assert train("--epochs", epochs)[0] == 130
    assert len(utils.read_checkpoint(folder, CONFIGS)["history"]) == epochs
    assert len(utils.read_metrics(folder)) == epochs - 1, "not yet"
    for until in (epochs, epochs + 1):
        status, output, _ = train("--epochs", until)
        assert status == 0
        assert f"complete with {epochs} epochs" in output or until > epochs
        assert train("--epochs", until, runs_dir=tmp_path / "undisturbed")[0] == 0
        assert (folder / "metrics.csv").read_bytes() == (undisturbed / "metrics.csv").read_bytes()
        assert read_points(folder) == read_points(undisturbed)


def test_metrics_and_events_are_never_ahead_of_the_checkpoint(train, tmp_path, monkeypatch):
    folder, looks = tmp_path / "rnn_mnist" / NOISE_NAME, Counter()

    def looking(function):
        def call(*args):
            function(*args)
            path = folder / "checkpoint.pt"
            epoch = len(utils.read_checkpoint(folder, CONFIGS)["history"]) if path.exists() else 0
            shown = len(utils.read_metrics(folder)), max((step for _, step, _ in read_points(folder)), default=0)
            assert max(shown) <= epoch
            looks[epoch, shown] += 1

        return call

    monkeypatch.setattr(os, "replace", looking(os.replace))
    monkeypatch.setattr(os, "fsync", looking(os.fsync))
    assert train("--epochs", 2)[0] == 0
    assert {(0, (0, 0)), (1, (0, 0)), (1, (0, 1)), (1, (1, 1)), (2, (1, 1)), (2, (2, 2))} <= looks.keys()


@pytest.mark.parametrize("damage", ["missing", "ahead", "behind", "torn"])
@pytest.mark.usefixtures("_stopped_clock")
def test_a_complete_runs_records_are_written_anew_from_its_checkpoint(train, tmp_path, damage):
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    assert train("--epochs", 2)[0] == 0
    before, points = read_files(folder), read_points(folder)
    metrics, events = folder / "metrics.csv", folder / utils.EVENTS
    if damage == "missing":
        metrics.unlink()
    elif damage == "ahead":
        metrics.write_text(metrics.read_text() + "3,1,1,1,1,0\n")
        events.write_bytes(events.read_bytes() + events.read_bytes()[-200:])
    elif damage == "behind":
        metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:2]))
        events.write_bytes(events.read_bytes()[: utils.read_checkpoint(folder, CONFIGS)["events"]["before"]])
    else:
        events.write_bytes(events.read_bytes()[:-50])
    assert "complete with 2 epochs" in train("--epochs", 2)[1]
    assert read_files(folder) == before
    assert read_points(folder) == points


# Records without their checkpoint, and starting over


def visible_names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} - {".lock"}


@pytest.fixture
def stripped_run(train, tmp_path):
    """A run's records as they are published: without checkpoint, and with a figure and events of another time."""
    assert train("--epochs", 3)[0] == 0
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    (folder / "checkpoint.pt").unlink()
    (folder / utils.EVENTS).rename(folder / "events.out.tfevents.1.reference")
    (folder / "figures").mkdir()
    (folder / "figures" / "curves.png").write_text("a picture")
    return folder


def test_records_without_their_checkpoint_are_refused_and_left_as_they_are(train, stripped_run):
    before = read_files(stripped_run)
    way_out = "start over with --fresh, or use another --runs-dir"
    assert_refused(train("--epochs", 1), f"{stripped_run} holds a run's records without its checkpoint.pt, so that it")
    assert_refused(train("--epochs", 5), way_out)
    assert read_files(stripped_run) == before
    for name in ("config.json", "events.out.tfevents.1.reference"):
        (stripped_run / name).unlink()
    assert_refused(train("--epochs", 1), way_out)


def test_a_run_that_is_refused_does_not_keep_a_grid_from_the_rest(train, stripped_run, monkeypatch):
    before = read_files(stripped_run)
    status, output, error = train("--epochs", 1, "--seed", 1, 0, 2)
    assert status == 2
    assert f"error: {stripped_run} holds a run's records without its checkpoint.pt" in error
    assert error.endswith("error: 1 of 3 runs could not be trained, for the reasons given above\n")
    assert error.count("\n") == 2
    assert "Test accuracy in % after epoch 1" in output
    assert read_files(stripped_run) == before
    for seed in (1, 2):
        assert len(read_rows(stripped_run.with_name(NOISE_NAME.replace("seed0", f"seed{seed}")))) == 1
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert train("--epochs", 1, "--seed", 1, 0, 2)[0] == 0, "a process that fails ends the others; the first one tells"


def test_a_grid_of_which_nothing_could_be_trained_says_so(train, stripped_run):
    status, _, error = train("--lr", 0.01, 1e38, "--optimizer", "sgd", "--epochs", 1)
    assert status == 0
    next(stripped_run.parent.glob("*sgd_lr0.01*/checkpoint.pt")).unlink()
    status, output, error = train("--lr", 0.01, 1e38, "--optimizer", "sgd", "--epochs", 1)
    assert status == 2
    assert error.endswith("error: 1 of 2 runs could not be trained, for the reasons given above\n")
    assert "diverged in epoch 1" in output


def test_fresh_starts_over_and_leaves_nothing_of_the_old_run_behind(train, stripped_run, tmp_path):
    assert train("--epochs", 1, "--fresh")[0] == 0
    assert train("--epochs", 1, runs_dir=tmp_path / "new")[0] == 0
    new = tmp_path / "new" / "rnn_mnist" / NOISE_NAME
    assert visible_names(stripped_run) == visible_names(new)
    assert_same_end(stripped_run, new)
    assert {step for _, step, _ in read_points(stripped_run)} == {1}


@pytest.mark.parametrize("deletions", range(1, 6))
def test_a_fresh_start_that_is_killed_leaves_no_run_that_counts_as_complete(train, tmp_path, monkeypatch, deletions):
    assert train("--epochs", 2)[0] == 0
    done, unlink, rmtree = [], Path.unlink, shutil.rmtree

    def kill_after(delete):
        def call(*args, **kwargs):
            if len(done) == deletions:
                raise KeyboardInterrupt
            done.append(args)
            delete(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", kill_after(unlink))
        patch.setattr(shutil, "rmtree", kill_after(rmtree))
        assert train("--epochs", 2, "--fresh")[0] == 130
    assert len(done) == deletions
    status, output, _ = train("--epochs", 2)
    assert "complete" not in output
    if status:
        assert status == 2
        assert train("--epochs", 2, "--fresh")[0] == 0
    assert train("--epochs", 2, runs_dir=tmp_path / "new")[0] == 0
    folders = [each / "rnn_mnist" / NOISE_NAME for each in (tmp_path, tmp_path / "new")]
    assert visible_names(folders[0]) == visible_names(folders[1])
    assert_same_end(*folders)


# Typed flags


def test_a_typed_device_that_is_not_the_runs_is_refused(train, finished_run):
    runs_dir = finished_run.parents[1]
    words = f"{finished_run} was begun with --device cpu, not cuda; leave the flag out to continue it"
    for epochs in (1, 2):
        assert_refused(train("--epochs", epochs, "--device", "cuda", runs_dir=runs_dir), words)
    assert len(read_rows(finished_run)) == 1
    assert train("--epochs", 2, "--device", "cpu", runs_dir=runs_dir)[0] == 0
    assert train("--epochs", 3, "--device", "auto", runs_dir=runs_dir)[0] == 0
    assert len(read_rows(finished_run)) == 3


@pytest.mark.parametrize(("recorded", "other"), [("bf16", "fp32"), ("fp32", "bf16")])
def test_a_typed_precision_that_is_not_the_runs_is_refused_and_auto_takes_what_it_is(
    recorded, other, call, tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(utils, "multiplies_bf16", lambda device: other == "bf16")
    config = cnn_cifar10.Config(without="fc1", batch_size=100)
    folder = train_here(cnn_cifar10, tmp_path, tiny_data[cnn_cifar10], config, epochs=1, precision=recorded)
    flags = ("--without", "fc1", "--batch-size", 100, "--data", "synthetic", "--runs-dir", tmp_path)
    words = f"{folder} was begun with --precision {recorded}, not {other}; leave the flag out to continue it"
    for epochs in (1, 2):
        assert_refused(call(cnn_cifar10, *flags, "--epochs", epochs, "--precision", other), words)
    assert len(read_rows(folder)) == 1
    assert call(cnn_cifar10, *flags, "--epochs", 2)[0] == 0
    assert utils.read_record(folder, CONFIGS).conditions.precision == recorded
    assert len(read_rows(folder)) == 2


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_run_begun_on_a_device_that_is_not_there_says_so(train, finished_run, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    checkpoint["record"]["conditions"]["device"] = device
    torch.save(checkpoint, finished_run / "checkpoint.pt")
    outcome = train("--epochs", 2, "--device", "auto", runs_dir=finished_run.parents[1])
    words = f"{finished_run} was begun on the device {device}, which is not there; continue it where there is one"
    assert_refused(outcome, words)
    assert "or start over with --fresh" in outcome[2]
    outcome = train("--epochs", 2, "--device", "cpu", runs_dir=finished_run.parents[1])
    assert_refused(outcome, f"was begun with --device {device}, not cpu")


# Bytes that change


def flipped(content, rng):
    """Return content with one bit changed."""
    bit = rng.randrange(8 * len(content))
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


@pytest.mark.parametrize(("name", "flips"), [("checkpoint.pt", 1000), ("snapshots/epoch_01.pt", 200)])
def test_a_changed_bit_is_found_or_changes_nothing(finished_run, tmp_path, name, flips):
    """Most of a file is weights, which a flip within would change; some bits of a zip say nothing."""
    content, expected, rng = (
        (finished_run / name).read_bytes(),
        utils.load_tensors(finished_run / name),
        random.Random(0),
    )
    path, refused = tmp_path / "flipped.pt", 0
    for _ in range(flips):
        path.write_bytes(flipped(content, rng))
        try:
            loaded = utils.load_tensors(path)
        except utils.InputError:
            refused += 1
        else:
            assert same(loaded, expected)
    assert refused > 0.8 * flips


OUT_OF_MEMORY = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to"


@pytest.mark.parametrize("error", [RuntimeError(OUT_OF_MEMORY), MemoryError()])
def test_too_little_memory_to_read_a_checkpoint_is_not_damage(train, finished_run, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(torch, "load", fail)
    status, _, message = train("--epochs", 2, runs_dir=finished_run.parents[1])
    assert status == 1
    assert "error: too little memory" in message
    assert "damaged" not in message
    assert message.count("\n") == 1


@pytest.mark.parametrize("error", [RuntimeError(OUT_OF_MEMORY), torch.cuda.OutOfMemoryError("CUDA out of memory")])
def test_too_little_memory_to_train_is_told_in_one_line(train, monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(rnn_mnist.RowReader, "rows", fail)
    status, _, message = train()
    assert status == 1
    assert "error: too little memory" in message
    assert message.count("\n") == 1


# Settings that are forged


@pytest.mark.parametrize(("part", "name", "value"), FORGED)
def test_settings_that_no_run_can_have_are_refused(finished_run, train, part, name, value):
    record = json.loads((finished_run / "config.json").read_text())
    (record if part is None else record[part])[name] = value
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    torch.save({**checkpoint, "record": record}, finished_run / "checkpoint.pt")
    assert_refused(train(runs_dir=finished_run.parents[1]), "checkpoint.pt is not of this project")
    (finished_run / "config.json").write_text(json.dumps(record))
    with pytest.raises(utils.InputError, match=r"config.json is not of this project"):
        utils.read_record(finished_run, CONFIGS)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        (None, {"history": None}),
        (None, {"history": []}),
        (None, {"history": [{"epoch": 1}]}),
        (None, {"history": [{**dict.fromkeys(utils.METRICS, 1.0), "epoch": 2}]}),
        (None, {"history": [{**dict.fromkeys(utils.METRICS, math.nan), "epoch": 1}]}),
        (None, {"history": [{**dict.fromkeys(utils.METRICS, 10**400), "epoch": 1}]}),
        (None, {"events": ["a"]}),
        (None, {"events": {"before": "b", "written": torch.zeros(3, dtype=torch.uint8)}}),
        (None, {"events": {"before": -1, "written": torch.zeros(3, dtype=torch.uint8)}}),
        (None, {"events": {"before": 0.5, "written": torch.zeros(3, dtype=torch.uint8)}}),
        (None, {"events": {"before": 0, "written": torch.zeros(3)}}),
        (None, {"random": torch.zeros(3)}),
        (None, {"random": {"cpu": torch.zeros(3)}}),
        (None, {"state": {}}),
        ("state", {"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}}),
        ("state", {"optimizer": None}),
        ("state", {"model": {}}),
    ],
)
def test_a_checkpoint_that_is_inconsistent_is_refused(finished_run, train, part, change):
    checkpoint = torch.load(finished_run / "checkpoint.pt", weights_only=True)
    (checkpoint if part is None else checkpoint[part]).update(change)
    torch.save(checkpoint, finished_run / "checkpoint.pt")
    before = read_files(finished_run)
    assert_refused(train(runs_dir=finished_run.parents[1]), "run its training again with --fresh")
    assert read_files(finished_run) == before
    assert train("--fresh", "--epochs", "1", runs_dir=finished_run.parents[1])[0] == 0


def test_moments_of_another_shape_are_refused_before_a_step_uses_them(finished_run):
    checkpoint = utils.read_checkpoint(finished_run, CONFIGS)
    checkpoint["state"]["optimizer"]["state"][0]["exp_avg"] = torch.zeros(3)
    config = checkpoint["record"].config
    model = rnn_mnist.RowReader(config)
    parts = {"model": model, "optimizer": utils.make_optimizer(model, config)}
    with pytest.raises(utils.InputError, match="do not fit its settings"):
        utils.restore(checkpoint, parts)


# Honest numbers


def test_every_place_shows_the_same_figure(rnn_run, digits):
    done, folder = rnn_run
    last = utils.read_metrics(folder)[-1]
    points = {(tag, step): value for tag, step, value in read_points(folder)}
    for tag, name in utils.TENSORBOARD_TAGS.items():
        assert points[tag, EPOCHS] == float(np.float32(last[name]))
    assert f"test accuracy {last['test_accuracy']:.2f} % after epoch {EPOCHS}" in done.stdout
    checkpoint = utils.read_checkpoint(folder, CONFIGS)
    assert checkpoint["history"][-1] == last
    model = rnn_mnist.RowReader(checkpoint["record"].config)
    utils.restore(checkpoint, {"model": model})
    torch.set_num_threads(checkpoint["record"].conditions.threads)
    again = utils.evaluate(model, digits.test)
    assert again == pytest.approx((last["test_loss"], last["test_accuracy"]), abs=1e-12)


def test_config_says_what_the_numbers_depend_on(rnn_run):
    conditions = utils.read_record(rnn_run[1], CONFIGS).conditions
    assert conditions.versions.keys() == {"python", "torch", "torchvision"}
    assert conditions.versions["torch"] == str(torch.__version__)
    assert conditions.versions["python"] == sys.version.split()[0]
    assert (conditions.data_source, conditions.precision, conditions.threads) == ("synthetic", "fp32", 1)
    assert conditions.parameters == 3_970
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (conditions.commit or "").removesuffix("-dirty") == git.stdout.strip()


# Properties, over seeded random cases

SMALL = {"batch_size": 200, "hidden_size": 64, "rows_before": 3, "rows_after": 3}


@pytest.mark.parametrize("case", range(8))
def test_any_configuration_trains_a_step_and_reloads_to_identical_outputs(case, tmp_path, monkeypatch, call):
    script = (rnn_mnist, cnn_cifar10)[case % 2]
    config = random_config(random.Random(case), script.Config, SMALL)
    data = noise_digits(config.batch_size)
    bigger = [utils.Split(split.images.repeat(1, 2, 2)[:, :32, :32], split.labels) for split in data[3:]]
    pictures = data._replace(name="cifar10", train=bigger[0], test=bigger[1])
    monkeypatch.setattr(utils, "synthetic_digits", lambda: data)
    monkeypatch.setattr(utils, "synthetic_pictures", lambda: pictures)
    kept = []
    monkeypatch.setattr(script, "evaluate", lambda model, _: (kept.append(model), utils.Score(1.0, 10.0))[1])
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in asdict(config).items() if value is not None]
    flags += ["--data", "synthetic", "--device", "cpu", "--epochs", 1, "--runs-dir", tmp_path]
    status, _, error = call(script, *flags)
    assert (status, error) == (0, "")
    checkpoint = utils.read_checkpoint(utils.run_folder(tmp_path, config, "synthetic"), CONFIGS)
    assert checkpoint["record"].config == config
    network = rnn_mnist.RowReader if script is rnn_mnist else cnn_cifar10.LeNet5
    precision = (checkpoint["record"].conditions.precision,) if script is cnn_cifar10 else ()
    model = network(config, *precision)
    utils.restore(checkpoint, {"model": model})
    images = (pictures if config.dataset == "cifar10" else data).test.images
    assert torch.equal(utils.predict(kept[0], images), utils.predict(model, images))


@pytest.mark.parametrize("case", range(20))
def test_any_grid_is_the_product_of_its_values_without_repeats(case, requested):
    rng = random.Random(case)
    values = {
        "lr": [rng.choice([0.1, 0.01, 1e-3]) for _ in range(rng.randint(1, 4))],
        "seed": [rng.randrange(4) for _ in range(rng.randint(1, 4))],
        "batch_size": [rng.choice([32, 64]) for _ in range(rng.randint(1, 3))],
        "hidden_size": [rng.randint(1, 5) for _ in range(rng.randint(1, 4))],
        "cell": [rng.choice(["rnn", "gru"]) for _ in range(rng.randint(1, 3))],
    }
    words = [word for name, each in values.items() for word in (f"--{name.replace('_', '-')}", *each)]
    grid = requested(rnn_mnist, *words)
    assert len(grid) == math.prod(len(set(each)) for each in values.values())
    assert len({config.name for config in grid}) == len(grid)
    assert all(getattr(config, name) in values[name] for config in grid for name in values)
