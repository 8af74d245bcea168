"""Training: the scripts as a user runs them, the run's folder, TensorBoard, repetition and interruption."""

import io
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from unittest.mock import MagicMock

import cnn_cifar10
import rnn_mnist
import utils

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CONFIGS,
    EPOCHS,
    ROOT,
    first_images,
    read_files,
    read_points,
    read_rows,
    rows_but_seconds,
    same,
    train_here,
    trained_state,
)
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

SMALL_GRU = rnn_mnist.Config(cell="gru", hidden_size=8, lr=1e-2)
SMALL_CNN = cnn_cifar10.Config(without="fc1", lr=1e-3, batch_size=32)
BOTH_SCRIPTS = pytest.mark.parametrize(
    ("script", "config"), [(rnn_mnist, SMALL_GRU), (cnn_cifar10, SMALL_CNN)], ids=["rnn", "cnn"]
)


def read_events(folder):
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    return events.Reload()


def read_snapshot(folder, epoch):
    return utils.load_tensors(folder / "snapshots" / f"epoch_{epoch:02d}.pt")


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
    assert lines[0] == "loading torch ..."
    assert "synthetic" in lines[1]
    assert sum("NOT the real set" in line for line in lines) == 2
    assert lines[-2].split() == ["tensorboard", "--logdir", str(folder.parent)]
    assert lines[-1].split()[1:] == ["visualize.py", str(folder)]


@pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
def test_run_folder_holds_what_the_contract_says(run, request):
    _, folder = request.getfixturevalue(run)
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() == {"script", "settings", "conditions"}
    assert config["script"] == folder.parent.name
    assert config["settings"]["seed"] == 0
    assert config["conditions"]["data_source"] == "synthetic"
    assert {"device", "precision", "threads", "epochs"} <= config["conditions"].keys()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["record"] == config
    assert [row["epoch"] for row in checkpoint["history"]] == list(range(1, EPOCHS + 1))
    assert [{key: str(value) for key, value in row.items()} for row in checkpoint["history"]] == read_rows(folder)
    expected = [f"epoch_{epoch:02d}.pt" for epoch in range(EPOCHS + 1)]
    assert sorted(path.name for path in folder.glob("snapshots/*")) == expected
    names = {"config.json", "metrics.csv", "checkpoint.pt", "snapshots", utils.EVENTS}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names


@pytest.mark.parametrize(("run", "network"), [("cnn_run", cnn_cifar10.LeNet5), ("rnn_run", rnn_mnist.RowReader)])
def test_snapshots_lead_from_the_start_to_the_checkpoint(run, network, request):
    _, folder = request.getfixturevalue(run)
    torch.manual_seed(0)
    untrained = network(CONFIGS[folder.parent.name]()).state_dict()
    trained = utils.read_checkpoint(folder, CONFIGS)["state"]["model"]
    convolutions = {f"layers.conv{number}.{kind}" for number in (1, 2) for kind in ("weight", "bias")}
    names = convolutions if run == "cnn_run" else set(trained)
    start, end = read_snapshot(folder, 0), read_snapshot(folder, EPOCHS)
    assert set(start) == set(end) == names
    assert all(torch.equal(start[name], untrained[name]) for name in names)
    assert all(torch.equal(end[name], trained[name]) for name in names)
    assert not any(torch.equal(start[name], end[name]) for name in names)


def test_conv1_learns_smooth_patterns_from_the_embedded_pictures(cnn_run):
    """What training adds to a kernel is alike in neighbouring pixels, as edges are; the random start is not."""
    _, folder = cnn_run
    start, end = (read_snapshot(folder, epoch)["layers.conv1.weight"] for epoch in (0, EPOCHS))

    def likeness(kernels):
        kernels = kernels - kernels.mean((2, 3), keepdim=True)
        return (kernels[..., 1:] * kernels[..., :-1]).sum() / kernels.square().sum()

    assert abs(likeness(start)) < 0.15
    assert likeness(end - start) > 0.35


def test_repeating_a_complete_run_changes_nothing(rnn_run, runs_dir, call, tiny_data):
    _, folder = rnn_run
    before = read_files(folder)
    for epochs in (EPOCHS, 1):
        status, output, _ = call(rnn_mnist, "--data", "synthetic", "--runs-dir", runs_dir, "--epochs", epochs)
        assert status == 0
        assert f"complete with {EPOCHS} epochs" in output
    assert read_files(folder) == before


def test_real_mnist_is_learned(real_data, tmp_path, call):
    flags = "--epochs", 1, "--data", "real", "--data-dir", real_data, "--runs-dir", tmp_path
    status, output, error = call(rnn_mnist, *flags)
    assert (status, error) == (0, "")
    folder = tmp_path / "rnn_mnist" / "rnn30_adam_lr1e-3_seed0"
    assert 60 < float(read_rows(folder)[0]["test_accuracy"]) < 90
    assert "synthetic" not in output


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


def test_tensorboard_shows_the_kernels_of_each_epoch_as_a_sheet_in_gray(cnn_run):
    """Kernel k stands in row k // 8 and column k % 8, ten pixels a weight, on one scale with zero in its middle."""
    _, folder = cnn_run
    images = read_events(folder).Images("conv1/filters")
    assert [image.step for image in images] == list(range(EPOCHS + 1))
    for image in images:
        picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        sheet = picture[5::10, 5::10]  # the middle of each weight
        assert picture.shape == (10 * (4 * 6 + 1), 10 * (8 * 6 + 1), 3)
        assert (picture == sheet.repeat(10, 0).repeat(10, 1)).all()
        kernels = read_snapshot(folder, image.step)["layers.conv1.weight"][:, 0].numpy()
        gray = 255 * (kernels / np.abs(kernels).max() + 1) / 2
        for number, kernel in enumerate(gray):
            top, left = 1 + 6 * (number // 8), 1 + 6 * (number % 8)
            shown = sheet[top : top + 5, left : left + 5]
            assert np.abs(shown - kernel[..., None]).max() <= 1
        assert (sheet[::6] == 255).all(), "white between the kernels"
        assert (sheet[:, ::6] == 255).all(), "white between the kernels"


def test_tensorboard_holds_histograms_of_the_first_100_test_images(cnn_run, pictures):
    _, folder = cnn_run
    events, images = read_events(folder), pictures.test.images[:100]
    precision = utils.read_record(folder, CONFIGS).conditions.precision
    model = cnn_cifar10.LeNet5(cnn_cifar10.Config(), precision)
    for epoch in range(EPOCHS + 1):
        model.load_state_dict(read_snapshot(folder, epoch), strict=False)
        with torch.no_grad():
            outputs = model.outputs(images)
        for layer, count in (("conv1", 100 * 32 * 32 * 32), ("conv2", 100 * 64 * 16 * 16)):
            shown = events.Histograms(f"{layer}/activations")
            assert [entry.step for entry in shown] == list(range(EPOCHS + 1))
            histogram, maps = shown[epoch].histogram_value, outputs[layer].relu().double()
            assert (histogram.num, histogram.min) == (count, 0)
            assert histogram.max == pytest.approx(maps.max().item(), rel=1e-2)
            assert histogram.sum == pytest.approx(maps.sum().item(), rel=1e-4)
            assert histogram.sum_squares == pytest.approx(maps.square().sum().item(), rel=1e-4)


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


# The training loop


def plain_loop(model, optimizer, split, order, batch_size):
    """Train as the scripts say they do; return the loss and the accuracy in percent, judged before each step."""
    losses, hits = [], 0
    for batch in order.split(batch_size):
        images, labels = split.images[batch], split.labels[batch]
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        losses += [loss.item()] * len(batch)
        hits += (logits.argmax(1) == labels).sum().item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.mean(losses), 100 * hits / len(order)


def plain_optimizer(model, config):
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    return torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)


@pytest.mark.parametrize(
    ("script", "network", "settings"),
    [
        (rnn_mnist, rnn_mnist.RowReader, {"lr": 1e-2}),
        (rnn_mnist, rnn_mnist.RowReader, {"cell": "lstm", "optimizer": "sgd", "lr": 0.5, "momentum": 0.9}),
        (cnn_cifar10, cnn_cifar10.LeNet5, {"lr": 1e-3}),
        (cnn_cifar10, cnn_cifar10.LeNet5, {"dataset": "mnist", "without": "fc1", "optimizer": "sgd", "lr": 0.1}),
    ],
    ids=["rnn-adam", "lstm-momentum", "cnn-adam", "cnn-sgd"],
)
def test_ten_steps_are_those_of_a_plain_loop(script, network, settings, tiny_data, tiny_digits, tmp_path):
    config = script.Config(**settings, batch_size=16, seed=3)
    data = tiny_digits if config.dataset == "mnist" else tiny_data[script]
    data = data._replace(train=first_images(data.train, 156))  # the tenth batch is smaller
    folder = train_here(script, tmp_path, data, config, epochs=1)
    torch.manual_seed(3)
    model = network(config)
    order = utils.shuffled(156, seed=3, epoch=1)
    loss, accuracy = plain_loop(model, plain_optimizer(model, config), data.train, order, 16)
    checkpoint = utils.read_checkpoint(folder, CONFIGS)
    assert same(checkpoint["state"]["model"], model.state_dict())
    assert checkpoint["history"][0]["train_loss"] == pytest.approx(loss, rel=1e-6)
    assert checkpoint["history"][0]["train_accuracy"] == pytest.approx(accuracy)
    logits = model(data.test.images)
    assert checkpoint["history"][0]["test_loss"] == pytest.approx(F.cross_entropy(logits, data.test.labels).item())
    hits = (logits.argmax(1) == data.test.labels).double()
    assert checkpoint["history"][0]["test_accuracy"] == pytest.approx(100 * hits.mean().item())


def test_training_measures_each_image_once_with_the_loss_per_image(tiny_digits, tmp_path):
    """With a learning rate of almost zero, training measures what evaluation does, an uneven last batch included."""
    split = first_images(tiny_digits.train, 150)
    config = rnn_mnist.Config(hidden_size=5, optimizer="sgd", lr=1e-30)
    row = read_rows(train_here(rnn_mnist, tmp_path, tiny_digits._replace(train=split, test=split), config, 1))[0]
    for name in ("loss", "accuracy"):
        assert float(row[f"train_{name}"]) == pytest.approx(float(row[f"test_{name}"]), rel=1e-5)


@BOTH_SCRIPTS
def test_seconds_are_those_of_training_alone(script, config, tiny_data, tmp_path, monkeypatch):
    """The clock stands still but for a second that each step takes, and an hour for what is not training."""
    now, make_optimizer = [0.0], script.make_optimizer

    def let_pass(seconds, result=None):
        now[0] += seconds
        return result

    def timed_optimizer(*args):
        optimizer = make_optimizer(*args)
        optimizer.register_step_post_hook(lambda *_: let_pass(1))
        return optimizer

    monkeypatch.setattr(utils.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(script, "make_optimizer", timed_optimizer)
    monkeypatch.setattr(script, "evaluate", lambda *_: let_pass(3600, utils.Score(1.0, 10.0)))
    monkeypatch.setattr(utils, "save_tensors", lambda *args, save=utils.save_tensors: let_pass(3600, save(*args)))
    data = tiny_data[script]
    data = data._replace(train=first_images(data.train, 3 * config.batch_size - 1))
    folder = train_here(script, tmp_path, data, config, epochs=2)
    assert [float(row["seconds"]) for row in read_rows(folder)] == [3, 3]


@pytest.fixture
def modes():
    """Whether gradients are computed and whether the network is in train mode, of every pass that is not traced."""
    seen = set()

    def look(module, _):
        if isinstance(module, (nn.Conv2d, nn.RNNBase)) and not torch.jit.is_tracing():
            seen.add((torch.is_grad_enabled(), module.training))

    hook = nn.modules.module.register_module_forward_pre_hook(look)
    yield seen
    hook.remove()


@BOTH_SCRIPTS
def test_a_step_is_taken_in_train_mode_and_all_else_is_looked_at_in_eval_mode(
    script, config, tiny_data, tmp_path, modes
):
    data = tiny_data[script]
    train_here(script, tmp_path, data._replace(train=first_images(data.train, 64)), config, epochs=2)
    assert modes == {(True, True), (False, False)}


class ReadBacks(TorchDispatchMode):
    """Counts the operations for which the processor has to wait until a GPU is through."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += any(name in str(function) for name in ("_local_scalar_dense", "nonzero", "masked_select"))
        return function(*args, **kwargs or {})


@pytest.mark.parametrize(
    ("script", "config", "precision"), [(cnn_cifar10, SMALL_CNN, "bf16"), (rnn_mnist, SMALL_GRU, "fp32")]
)
def test_a_training_step_reads_no_value_back(script, config, precision, tiny_data, tmp_path, monkeypatch):
    """In place of a GPU: how often an epoch would wait for one does not grow with its steps."""
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_graph", lambda *_: None)
    data, size, counts = tiny_data[script], config.batch_size, []
    for steps in (1, 5):
        few = data._replace(train=first_images(data.train, steps * size))
        with ReadBacks() as read_backs:
            train_here(script, tmp_path / str(steps), few, config, epochs=1, precision=precision)
        counts.append(read_backs.count)
    assert counts[0] == counts[1] > 0


def test_bf16_predictions_stay_close_to_fp32():
    images, logits = torch.randint(256, (64, 32, 32), dtype=torch.uint8), {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        logits[precision] = utils.predict(cnn_cifar10.LeNet5(cnn_cifar10.Config(), precision), images)
    assert logits["bf16"].dtype == torch.float32
    assert 0 < (logits["fp32"] - logits["bf16"]).abs().max() < 0.01


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32"), (None, "fp32")],
)
def test_automatic_precision_is_bf16_where_it_is_native_and_the_network_can_use_it(
    capabilities, precision, monkeypatch
):
    if capabilities is None:  # an older release of torch
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    args = SimpleNamespace(device="cpu", precision="auto", epochs=1, data_dir="data", threads=1)
    assert utils.new_conditions(cnn_cifar10.Config(), args, "real").precision == precision
    args.precision = "fp32"
    assert utils.new_conditions(cnn_cifar10.Config(), args, "real").precision == "fp32"
    del args.precision
    assert utils.new_conditions(rnn_mnist.Config(), args, "real").precision == "fp32"


# The same seed gives the same numbers


def test_tensorboard_does_not_change_the_numbers(tiny_digits, tmp_path, monkeypatch):
    with_it = trained_state(train_here(rnn_mnist, tmp_path / "on", tiny_digits, SMALL_GRU))
    writer = MagicMock()
    writer.take.return_value = b"nothing"
    monkeypatch.setattr(utils, "memory_writer", lambda *_, **__: writer)
    assert same(with_it, trained_state(train_here(rnn_mnist, tmp_path / "off", tiny_digits, SMALL_GRU)))
    assert writer.add_scalar.called
    other_seed = train_here(rnn_mnist, tmp_path / "on", tiny_digits, replace(SMALL_GRU, seed=1))
    assert trained_state(other_seed)[0] != with_it[0]


def test_bar_on_a_terminal_does_not_change_the_numbers(rnn_run, tmp_path):
    pty, termios = pytest.importorskip("pty"), pytest.importorskip("termios")
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


def test_every_epoch_has_its_own_order(tiny_digits, tmp_path, monkeypatch):
    orders, shuffled = [], utils.shuffled
    monkeypatch.setattr(utils, "shuffled", lambda *args: (orders.append(args), shuffled(*args))[1])
    train_here(rnn_mnist, tmp_path, tiny_digits, replace(SMALL_GRU, seed=5), epochs=3)
    assert orders == [(640, 5, 1), (640, 5, 2), (640, 5, 3)]


# Interruption, continuation, divergence


@contextmanager
def ctrl_c_is_heard():
    """Start processes that Ctrl-C interrupts, also where this one ignores it, as behind nohup."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(os.name != "posix", reason="needs signals between processes")
def test_an_interrupted_run_continues_to_the_same_end(rnn_run, call, tmp_path, digits, monkeypatch):
    flags = ["--data", "synthetic", "--runs-dir", str(tmp_path), "--epochs", str(EPOCHS)]
    with ctrl_c_is_heard():
        process = subprocess.Popen([sys.executable, "rnn_mnist.py", *flags], cwd=ROOT, text=True, stdout=-1, stderr=-1)
    next(line for line in process.stdout if line.startswith(f"  1/{EPOCHS}"))
    process.send_signal(signal.SIGINT)
    _, message = process.communicate(timeout=60)
    assert process.returncode == 130
    assert message.count("\n") == 1
    assert "the same command continues" in message
    monkeypatch.setattr(utils, "synthetic_digits", lambda: digits)
    assert call(rnn_mnist, *flags)[0] == 0
    _, undisturbed = rnn_run
    folder = tmp_path / "rnn_mnist" / undisturbed.name
    assert rows_but_seconds(folder) == rows_but_seconds(undisturbed)
    assert read_points(folder) == read_points(undisturbed)


class DroppingReader(rnn_mnist.RowReader):
    def __init__(self, config):
        super().__init__(config)
        self.fc = nn.Sequential(nn.Dropout(0.5), self.fc)


class DroppingLeNet5(cnn_cifar10.LeNet5):
    def __init__(self, config, precision):
        super().__init__(config, precision)
        self.layers.fc2 = nn.Sequential(nn.Dropout(0.5), self.layers.fc2)


@pytest.mark.parametrize(
    ("script", "changes", "precision", "network"),
    [
        (rnn_mnist, {"optimizer": "sgd", "lr": 0.1, "momentum": 0.9}, "fp32", None),
        (rnn_mnist, {}, "fp32", DroppingReader),
        (cnn_cifar10, {"optimizer": "sgd", "lr": 0.01, "momentum": 0.9}, "fp32", DroppingLeNet5),
        (cnn_cifar10, {}, "bf16", None),
    ],
    ids=["rnn-momentum", "rnn-dropout", "cnn-momentum-dropout", "cnn-bf16"],
)
def test_a_run_interrupted_within_an_epoch_continues_as_if_it_had_not_been(
    script, changes, precision, network, tiny_data, tmp_path, monkeypatch
):
    config = replace(SMALL_GRU if script is rnn_mnist else SMALL_CNN, **changes)
    data = tiny_data[script]
    data = data._replace(train=first_images(data.train, 96))
    if network:
        monkeypatch.setattr(script, network.__base__.__name__, network)
    undisturbed = train_here(script, tmp_path / "undisturbed", data, config, 3, precision)
    evaluate, epochs = script.evaluate, iter((1, 2))

    def interrupt_in_epoch_2(*args):
        if next(epochs) == 2:
            raise KeyboardInterrupt
        return evaluate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(script, "evaluate", interrupt_in_epoch_2)
        with pytest.raises(KeyboardInterrupt):
            train_here(script, tmp_path / "interrupted", data, config, 3, precision)
    torch.rand(17)  # whatever else this process draws
    continued = train_here(script, tmp_path / "interrupted", data, config, 3, precision)
    assert same(trained_state(continued), trained_state(undisturbed))
    assert read_points(continued) == read_points(undisturbed)


def test_dropout_acts_in_training_and_not_in_evaluation(tiny_digits, tmp_path, monkeypatch):
    """With a learning rate of almost zero, training measures the network with dropout, evaluation the one without."""
    config = replace(SMALL_GRU, optimizer="sgd", lr=1e-30)
    plain = read_rows(train_here(rnn_mnist, tmp_path / "plain", tiny_digits, config, epochs=1))[0]
    monkeypatch.setattr(rnn_mnist, "RowReader", DroppingReader)
    dropping = read_rows(train_here(rnn_mnist, tmp_path / "dropping", tiny_digits, config, epochs=1))[0]
    assert dropping["test_loss"] == plain["test_loss"]
    assert dropping["train_loss"] != plain["train_loss"]


def test_more_epochs_extend_a_run_and_fresh_starts_over(tiny_digits, tmp_path, call, tiny_data):
    train_here(rnn_mnist, tmp_path / "short", tiny_digits, SMALL_GRU, epochs=1)
    extended = train_here(rnn_mnist, tmp_path / "short", tiny_digits, SMALL_GRU, epochs=3)
    whole = train_here(rnn_mnist, tmp_path / "long", tiny_digits, SMALL_GRU, epochs=3)
    assert same(trained_state(extended), trained_state(whole))
    flags = ("--cell", "gru", "--hidden-size", 8, "--lr", 1e-2, "--data", "synthetic", "--runs-dir", tmp_path / "long")
    assert call(rnn_mnist, *flags, "--epochs", 1, "--fresh")[0] == 0
    assert rows_but_seconds(whole) == rows_but_seconds(extended)[:1]


def test_sgd_and_its_momentum_reach_the_weights(tiny_digits, tmp_path):
    plain = replace(SMALL_GRU, optimizer="sgd", lr=0.1)
    losses = [
        trained_state(train_here(rnn_mnist, tmp_path, tiny_digits, config))[0][-1]["train_loss"]
        for config in (plain, replace(plain, momentum=0.9))
    ]
    assert losses[1] < losses[0]


class InfiniteLoss(utils.Metrics):
    def add(self, loss, logits, labels):
        super().add(loss * math.inf, logits, labels)


@pytest.mark.parametrize(
    ("module", "name", "replacement", "loss"),
    [
        (utils, "predict", lambda model, images: torch.full((len(images), 10), math.nan), "nan"),
        (rnn_mnist, "Metrics", InfiniteLoss, "inf"),
    ],
)
def test_divergence_keeps_the_last_good_checkpoint(tiny_digits, tmp_path, monkeypatch, module, name, replacement, loss):
    folder = train_here(rnn_mnist, tmp_path, tiny_digits, SMALL_GRU, epochs=1)
    before = (folder / "checkpoint.pt").read_bytes()
    monkeypatch.setattr(module, name, replacement)
    with pytest.raises(utils.TrainingError, match=f"became {loss} in epoch 2 .*epoch 1 is kept.*smaller --lr"):
        train_here(rnn_mnist, tmp_path, tiny_digits, SMALL_GRU, epochs=3)
    assert (folder / "checkpoint.pt").read_bytes() == before
    assert utils.read_record(folder, CONFIGS).diverged == 2
    assert len(read_rows(folder)) == 1


@pytest.mark.usefixtures("tiny_data")
def test_divergence_ends_the_script_with_status_1(call, tmp_path):
    flags = ("--dataset", "mnist", "--data", "synthetic", "--optimizer", "sgd", "--lr", "1e20", "--runs-dir", tmp_path)
    status, _, error = call(cnn_cifar10, *flags)
    assert status == 1
    assert error.count("\n") == 1
    assert "the loss became nan in epoch 1" in error


@pytest.mark.usefixtures("tiny_data")
def test_a_loss_far_above_that_of_guessing_is_said_at_the_end_of_the_epoch(call, tmp_path):
    flags = ("--data", "synthetic", "--epochs", 2, "--runs-dir", tmp_path, "--optimizer", "sgd", "--lr")
    for lr, is_said in ((1e3, True), (1e-3, False)):
        status, output, error = call(rnn_mnist, *flags, lr)
        assert (status, error) == (0, "")
        epochs = [line for line in output.splitlines() if re.match(r" *\d/2 ", line)]
        assert [line.endswith("  loss far above guessing") for line in epochs] == [is_said] * 2
        assert [float(line.split()[1]) > 1000 for line in epochs] == [is_said] * 2


@pytest.mark.usefixtures("tiny_data")
def test_a_run_in_training_is_locked(call, tmp_path):
    flags = ("--data", "synthetic", "--runs-dir", tmp_path, "--epochs", 1)
    assert call(rnn_mnist, *flags)[0] == 0
    folder = next((tmp_path / "rnn_mnist").iterdir())
    with utils.locked(folder):
        status, _, error = call(rnn_mnist, *flags)
    assert status == 2
    assert "is being trained by another process" in error


def test_the_reports_experiments_are_carried_over():
    rows = cnn_cifar10.REPORT + rnn_mnist.REPORT
    known = [61.3, 11.33, 98.5, 10.09, 47.73, 16.1, 15.13, 74.55, 90.75, 94.17, 97.6, 98.32, 97.86, 97.84]
    assert [row.accuracy for row in rows if row.accuracy] == known
    assert len(rows) == 16
    assert all(row.accuracy or row.remark for row in rows)


@pytest.mark.parametrize(
    ("changes", "source", "epoch", "reported"),
    [
        ({"seed": 3}, "real", 10, 61.3),
        ({}, "synthetic", 10, None),
        ({}, "real", 9, None),
        ({"lr": 0.01}, "real", 10, None),
        ({"batch_size": 64}, "real", 10, None),
    ],
)
def test_only_runs_of_the_same_settings_data_and_epoch_are_compared_with_the_report(changes, source, epoch, reported):
    record = utils.Record(replace(cnn_cifar10.Config(), **changes), utils.Conditions(data_source=source))
    run = SimpleNamespace(record=record, config=record.config, history=[{"test_accuracy": 60.0, "seconds": 1.0}] * 10)
    assert utils.summarise([run], epoch, cnn_cifar10.REPORT).reported.accuracy == reported
