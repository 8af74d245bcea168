"""Training: the scripts as a user runs them, the run's folder, TensorBoard, repetition and interruption."""

import json
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest
import torch
from conftest import EPOCHS, ROOT, read_rows, rows_but_seconds, run_command
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch.utils._python_dispatch import TorchDispatchMode

import cnn_cifar10
import rnn_mnist
import utils


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


# The scripts as a user runs them


@pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
def test_default_experiment_on_embedded_data_learns_but_not_at_once(run, request):
    done, folder = request.getfixturevalue(run)
    assert done.returncode == 0, done.stderr
    accuracies = [float(row["test_accuracy"]) for row in read_rows(folder)]
    assert len(accuracies) == EPOCHS
    assert accuracies[0] < 95
    assert accuracies[-1] > 50


@pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
def test_screen_shows_aligned_epochs_the_data_source_and_what_to_type_next(run, request):
    done, folder = request.getfixturevalue(run)
    assert done.stderr == "", "no bar without a terminal, and no library's warnings"
    lines = done.stdout.splitlines()
    epochs = [line for line in lines if re.match(rf" *\d+/{EPOCHS} ", line)]
    assert len(epochs) == EPOCHS
    assert len({len(line) for line in epochs}) == 1
    last, row = epochs[-1].split(), read_rows(folder)[-1]
    shown = {"train_loss": last[1], "train_accuracy": last[2], "test_accuracy": last[4]}
    for name, text in shown.items():
        assert float(text) == pytest.approx(float(row[name]), abs=0.005)
    assert "synthetic" in lines[0]
    assert sum("NOT the real set" in line for line in lines) == 2
    assert lines[-2].split()[:2] == ["tensorboard", "--logdir"]
    assert lines[-1].split()[1:] == ["visualize.py", str(folder)]


@pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
def test_run_folder_holds_what_the_contract_says(run, request):
    _, folder = request.getfixturevalue(run)
    config = json.loads((folder / "config.json").read_text())
    assert config["data_source"] == "synthetic"
    assert config["seed"] == 0
    assert {"device", "precision", "threads", "epochs"} <= config.keys()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert [row["epoch"] for row in checkpoint["history"]] == list(range(1, EPOCHS + 1))
    assert [{key: str(value) for key, value in row.items()} for row in checkpoint["history"]] == read_rows(folder)
    expected = [f"epoch_{epoch:02d}.pt" for epoch in range(EPOCHS + 1)]
    assert sorted(path.name for path in folder.glob("snapshots/*")) == expected
    assert not list(folder.glob("*.part"))


def test_snapshots_lead_from_the_start_to_the_checkpoint(cnn_run):
    _, folder = cnn_run
    torch.manual_seed(0)
    start = torch.load(folder / "snapshots" / "epoch_00.pt", weights_only=True)
    assert set(start) == {"conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"}
    assert all(torch.equal(tensor, cnn_cifar10.LeNet5().state_dict()[name]) for name, tensor in [*start.items()][:1])
    end = torch.load(folder / "snapshots" / f"epoch_{EPOCHS:02d}.pt", weights_only=True)
    model = utils.load_checkpoint(folder)["model"]
    assert all(torch.equal(tensor, model[name]) for name, tensor in end.items())
    assert not torch.equal(start["conv1.weight"], end["conv1.weight"])


def test_conv1_learns_smooth_patterns_from_the_embedded_pictures(cnn_run):
    """What training adds to a kernel is alike in neighbouring pixels, as edges are; the random start is not."""
    _, folder = cnn_run
    start, end = (
        torch.load(folder / "snapshots" / f"epoch_{epoch:02d}.pt", weights_only=True)["conv1.weight"]
        for epoch in (0, EPOCHS)
    )

    def likeness(kernels):
        kernels = kernels - kernels.mean((2, 3), keepdim=True)
        return (kernels[..., 1:] * kernels[..., :-1]).sum() / kernels.square().sum()

    assert abs(likeness(start)) < 0.15
    assert likeness(end - start) > 0.35


def test_repeating_a_complete_run_changes_nothing(rnn_run, runs_dir, call):
    _, folder = rnn_run
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    for epochs in (EPOCHS, 1):
        status, output, _ = call(rnn_mnist, "--data", "synthetic", "--runs-dir", runs_dir, "--epochs", epochs)
        assert status == 0
        assert f"complete with {EPOCHS} epochs" in output
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def test_real_mnist_is_learned(real_data, tmp_path):
    done = run_command("rnn_mnist.py", "--epochs", 1, "--data", "real", "--data-dir", real_data, "--runs-dir", tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "rnn_mnist" / "mnist_rnn_hidden30_adam_lr0.001_batch64_seed0"
    assert 60 < float(read_rows(folder)[0]["test_accuracy"]) < 90
    assert "synthetic" not in done.stdout


# TensorBoard


@pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
def test_tensorboard_holds_one_point_per_epoch_equal_to_the_metrics(run, request):
    _, folder = request.getfixturevalue(run)
    events, rows = read_events(folder), read_rows(folder)
    assert set(events.Tags()["scalars"]) == {"Loss/Train", "Accuracy/Train", "Loss/Test", "Accuracy/Test"}
    for tag, column in utils.TENSORBOARD_TAGS.items():
        points = events.Scalars(tag)
        assert [point.step for point in points] == list(range(1, EPOCHS + 1))
        assert [point.value for point in points] == pytest.approx([float(row[column]) for row in rows], rel=1e-6)
    assert events.Tags()["graph"]


def test_tensorboard_holds_filters_and_histograms_of_every_epoch(cnn_run):
    _, folder = cnn_run
    events = read_events(folder)
    images = events.Images("conv1/filters")
    assert [image.step for image in images] == list(range(EPOCHS + 1))
    assert (images[0].width, images[0].height) == (480, 240)
    assert images[0].encoded_image_string != images[-1].encoded_image_string
    for layer, values in (("conv1", 100 * 32 * 32 * 32), ("conv2", 100 * 64 * 16 * 16)):
        histograms = events.Histograms(f"{layer}/activations")
        assert [entry.step for entry in histograms] == list(range(EPOCHS + 1))
        assert histograms[-1].histogram_value.num == values
        assert histograms[-1].histogram_value.min == 0


@pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
def test_hyperparameters_stand_in_the_run_itself(run, request):
    _, folder = request.getfixturevalue(run)
    assert not [path for path in folder.rglob("events.out.tfevents.*") if path.parent != folder], "no sub-runs"
    content = read_events(folder).summary_metadata
    start = content["_hparams_/session_start_info"].plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(start).session_start_info.hparams
    assert settings["lr"].number_value == (1e-4 if run == "cnn_run" else 1e-3)
    assert settings["optimizer"].string_value == "adam"
    assert settings["data_source"].string_value == "synthetic"
    assert "_hparams_/session_end_info" in content


# The same seed gives the same numbers


def train_tiny(folder, data, epochs=2, **changes):
    """Train a small GRU in this process; return its metrics but seconds, and its weights."""
    args = SimpleNamespace(device="cpu", precision="fp32", epochs=epochs, data_dir="data", threads=2)
    settings = {"dataset": "mnist", "cell": "gru", "hidden_size": 8, "optimizer": "adam", "lr": 1e-2, "momentum": 0.0}
    settings.update({"batch_size": 64, "seed": 0, **changes})
    config = utils.resolve_config("rnn_mnist", args, settings, data.source)
    torch.manual_seed(config["seed"])
    model = rnn_mnist.build_model(config)
    config["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    with utils.Run(folder, config) as run:
        utils.train(run, model, data, lambda *_: None)
    history = [{name: value for name, value in row.items() if name != "seconds"} for row in run.history]
    return history, model.state_dict()


def assert_equal_weights(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_tensorboard_does_not_change_the_numbers(tiny_digits, tmp_path, monkeypatch):
    with_it = train_tiny(tmp_path / "on", tiny_digits)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", MagicMock())
    without_it = train_tiny(tmp_path / "off", tiny_digits)
    assert with_it[0] == without_it[0]
    assert_equal_weights(with_it[1], without_it[1])
    assert train_tiny(tmp_path / "other", tiny_digits, seed=1)[0] != with_it[0]


def test_bar_on_a_terminal_does_not_change_the_numbers(rnn_run, tmp_path):
    command = [sys.executable, "rnn_mnist.py", "--data", "synthetic", "--runs-dir", str(tmp_path), "--epochs", "1"]
    screen, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=terminal)
    shown = b""
    while process.poll() is None:
        if select.select([screen], [], [], 0.1)[0]:
            shown += os.read(screen, 1000)
    os.close(terminal)
    os.close(screen)
    assert process.returncode == 0
    assert b"batch/s" in shown
    _, folder = rnn_run
    assert rows_but_seconds(tmp_path / "rnn_mnist" / folder.name) == rows_but_seconds(folder)[:1]


def test_shuffling_depends_on_seed_and_epoch_alone():
    first = utils.shuffled(1000, seed=3, epoch=1)
    assert first.sort().values.tolist() == list(range(1000))
    assert torch.equal(first, utils.shuffled(1000, seed=3, epoch=1))
    assert not torch.equal(first, utils.shuffled(1000, seed=3, epoch=2))
    assert not torch.equal(first, utils.shuffled(1000, seed=4, epoch=1))


def test_sgd_and_its_momentum_reach_the_weights(tiny_digits, tmp_path):
    plain = train_tiny(tmp_path / "a", tiny_digits, optimizer="sgd", lr=0.1)
    pushed = train_tiny(tmp_path / "b", tiny_digits, optimizer="sgd", lr=0.1, momentum=0.9)
    assert pushed[0][-1]["train_loss"] < plain[0][-1]["train_loss"]


def test_train_epoch_measures_each_image_once_with_the_loss_per_image(tiny_digits):
    """With a learning rate of zero, training measures what evaluation does, an uneven last batch included."""
    model = rnn_mnist.RowReader("rnn", 5)
    images, labels = tiny_digits.train_images[:150], tiny_digits.train_labels[:150]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    measured = utils.train_epoch(model, optimizer, images, labels, torch.randperm(150), 64, "fp32")
    assert measured == pytest.approx(utils.evaluate(model, images, labels, "fp32"), rel=1e-5)


class ReadBacks(TorchDispatchMode):
    """Counts the operations for which the processor has to wait until a GPU is through."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "masked_select"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("kind", ["lenet5", "rnn"])
def test_a_training_step_reads_no_value_back(tiny_digits, kind):
    """In place of a GPU: how often an epoch would wait for one does not grow with its steps."""
    model = cnn_cifar10.LeNet5(28) if kind == "lenet5" else rnn_mnist.RowReader("rnn", 5)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    counts = []
    for images in (64, 320):
        with ReadBacks() as read_backs:
            data = (tiny_digits.train_images, tiny_digits.train_labels, torch.arange(images))
            utils.train_epoch(model, optimizer, *data, 64, "bf16" if kind == "lenet5" else "fp32")
        counts.append(read_backs.count)
    assert counts[0] == counts[1] > 0


def test_bf16_predictions_stay_close_to_fp32():
    torch.manual_seed(0)
    model, images = cnn_cifar10.LeNet5(), torch.randint(256, (64, 32, 32), dtype=torch.uint8)
    fp32, bf16 = (utils.predict(model, images, precision) for precision in ("fp32", "bf16"))
    assert bf16.dtype == torch.float32
    assert 0 < (fp32 - bf16).abs().max() < 0.01


# Interruption, continuation, divergence


def test_an_interrupted_run_continues_to_the_same_end(rnn_run, call, tmp_path):
    flags = ["--data", "synthetic", "--runs-dir", str(tmp_path), "--epochs", str(EPOCHS)]
    process = subprocess.Popen([sys.executable, "rnn_mnist.py", *flags], cwd=ROOT, text=True, stdout=-1, stderr=-1)
    next(line for line in process.stdout if line.startswith(f"  1/{EPOCHS}"))
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.count("\n") == 1
    assert "the same command continues" in message
    assert call(rnn_mnist, *flags)[0] == 0
    _, undisturbed = rnn_run
    folder = tmp_path / "rnn_mnist" / undisturbed.name
    assert rows_but_seconds(folder) == rows_but_seconds(undisturbed)
    events, expected = read_events(folder), read_events(undisturbed)
    for tag in utils.TENSORBOARD_TAGS:
        points, first_points = ([(p.step, p.value) for p in each.Scalars(tag)] for each in (events, expected))
        assert points == first_points


def test_more_epochs_extend_a_run_and_fresh_starts_over(tiny_digits, tmp_path):
    train_tiny(tmp_path / "short", tiny_digits, epochs=1)
    extended = train_tiny(tmp_path / "short", tiny_digits, epochs=3)
    whole = train_tiny(tmp_path / "long", tiny_digits, epochs=3)
    assert extended[0] == whole[0]
    assert_equal_weights(extended[1], whole[1])
    run = utils.Run(tmp_path / "long", utils.read_config(tmp_path / "long"), fresh=True)
    assert run.epoch == 0


@pytest.mark.parametrize(("measure", "loss"), [("evaluate", math.nan), ("train_epoch", math.inf)])
def test_divergence_keeps_the_last_good_checkpoint(tiny_digits, tmp_path, monkeypatch, measure, loss):
    train_tiny(tmp_path / "run", tiny_digits, epochs=1)
    before = (tmp_path / "run" / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(utils, measure, lambda *_: (loss, 10.0))
    with pytest.raises(utils.TrainingError, match=f"became {loss} in epoch 2.*epoch 1 is kept.*smaller --lr"):
        train_tiny(tmp_path / "run", tiny_digits, epochs=3)
    assert (tmp_path / "run" / "checkpoint.pt").read_bytes() == before


def test_divergence_ends_the_script_with_status_1(call, tiny_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "synthetic_digits", lambda: tiny_digits)
    flags = ("--dataset", "mnist", "--data", "synthetic", "--optimizer", "sgd", "--lr", "1e20", "--runs-dir", tmp_path)
    status, _, error = call(cnn_cifar10, *flags)
    assert status == 1
    assert error.count("\n") == 1
    assert "the loss became nan in epoch 1" in error


def test_a_run_in_training_is_locked(call, tiny_digits, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "synthetic_digits", lambda: tiny_digits)
    flags = ("--data", "synthetic", "--runs-dir", tmp_path, "--epochs", 1)
    assert call(rnn_mnist, *flags)[0] == 0
    folder = next((tmp_path / "rnn_mnist").iterdir())
    with utils.Run(folder, utils.read_config(folder)):
        status, _, error = call(rnn_mnist, *flags)
    assert status == 2
    assert "is being trained by another process" in error


def test_the_reports_experiments_are_carried_over():
    reported = [experiment.reported for experiment in cnn_cifar10.EXPERIMENTS + rnn_mnist.EXPERIMENTS]
    known = [61.3, 11.33, 98.5, 10.09, 47.73, 16.1, 15.13, 74.55, 90.75, 94.17, 97.6, 98.32, 97.86, 97.84]
    assert [figure for figure in reported if figure] == known
    assert len(reported) == 16
    settings = {"dataset": "cifar10", "optimizer": "adam", "lr": 1e-4, "momentum": 0.0, "batch_size": 128, "seed": 3}
    config = {**settings, "data_source": "real", "epochs": 10}
    assert utils.reported_accuracy(config, cnn_cifar10.EXPERIMENTS) == 61.3
    assert utils.reported_accuracy({**config, "data_source": "synthetic"}, cnn_cifar10.EXPERIMENTS) is None
    assert utils.reported_accuracy({**config, "lr": 0.01}, cnn_cifar10.EXPERIMENTS) is None
