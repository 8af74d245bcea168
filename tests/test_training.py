"""Training: the scripts as a user runs them, the run's folder, the table at the end, TensorBoard, and the loop."""

import io
import json
import re
import shlex
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, EPOCHS, read_events, read_points, read_rows, small, train_here
from PIL import Image
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import nn

NETWORKS = {"cnn_cifar10": cnn_cifar10.LeNet5, "rnn_mnist": rnn_mnist.RowReader}
SMALL_GRU = rnn_mnist.Config(cell="gru", hidden_size=8, lr=1e-2)
SMALL_CNN = cnn_cifar10.Config(without="fc1", lr=1e-3, batch_size=32)
BOTH_RUNS = pytest.mark.parametrize("run", ["cnn_run", "rnn_run"])
BOTH_SCRIPTS = pytest.mark.parametrize(
    ("script", "config"), [(rnn_mnist, SMALL_GRU), (cnn_cifar10, SMALL_CNN)], ids=["rnn", "cnn"]
)


def read_snapshot(folder, epoch):
    return utils.load_tensors(folder / "snapshots" / f"epoch_{epoch:02d}.pt")


def read_tables(output):
    """Return the table of results that a script printed, a list of dict of texts."""
    head, _, *rows = ([*map(str.strip, line.split("|")[1:-1])] for line in output.splitlines() if line[:1] == "|")
    return [dict(zip(head, row, strict=True)) for row in rows]


# The scripts as a user runs them


@BOTH_RUNS
def test_default_experiment_on_embedded_data_learns_but_not_at_once(run, request):
    done, folder = request.getfixturevalue(run)
    assert (done.returncode, done.stderr) == (0, ""), "no bar without a terminal, and no library's warnings"
    rows = read_rows(folder)
    assert len(rows) == EPOCHS[run]
    assert 10 < float(rows[0]["train_accuracy"]) < 95, (
        "of images that were judged before the step that learns from them"
    )
    assert float(rows[-1]["test_accuracy"]) > float(rows[0]["train_accuracy"]) + 5


@BOTH_RUNS
def test_screen_shows_aligned_epochs_the_data_source_and_what_to_type_next(run, request):
    done, folder = request.getfixturevalue(run)
    lines = done.stdout.splitlines()
    epochs = [line for line in lines if re.match(rf" *\d+/{EPOCHS[run]} ", line)]
    assert [line.split()[0] for line in epochs] == [f"{epoch}/{EPOCHS[run]}" for epoch in range(1, EPOCHS[run] + 1)]
    assert len({len(line) for line in epochs}) == 1
    for line, row in zip(epochs, read_rows(folder), strict=True):
        loss, train, test, seconds = (float(row[name]) for name in (*utils.METRICS[1:3], *utils.METRICS[4:]))
        assert line.split()[1:] == f"{loss:.4f} {train:.2f} % {test:.2f} % {seconds:.1f}".split()
    assert lines[0] == "loading torch ..."
    assert [number for number, line in enumerate(lines) if "NOT the real set" in line] == [1, len(lines) - 5]
    [result] = read_tables(done.stdout)
    assert result["mean"] == f"{float(read_rows(folder)[-1]['test_accuracy']):.2f}"
    assert lines[-2].split() == ["tensorboard", "--logdir", str(folder.parent)]
    assert lines[-1].split() == ["python", "visualize.py", str(folder)]


@BOTH_RUNS
def test_run_folder_holds_what_the_contract_says(run, request):
    _, folder = request.getfixturevalue(run)
    config = json.loads((folder / "config.json").read_text())
    assert config.keys() == {"script", "settings", "conditions"}
    assert CONFIGS[config["script"]](**config["settings"]) == CONFIGS[folder.parent.name]()
    conditions = config["conditions"]
    assert (conditions["data_source"], conditions["epochs"]) == ("synthetic", EPOCHS[run])
    assert conditions["parameters"] == {"cnn_run": 4_257_674, "rnn_run": 3_970}[run]
    assert conditions["versions"]["torch"] == str(torch.__version__).split("+")[0]
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["record"] == config
    assert [row["epoch"] for row in checkpoint["history"]] == list(range(1, EPOCHS[run] + 1))
    assert [{key: str(value) for key, value in row.items()} for row in checkpoint["history"]] == read_rows(folder)
    snapshots = {path.name for path in folder.glob("snapshots/*")}
    assert snapshots == {f"epoch_{epoch:02d}.pt" for epoch in range(EPOCHS[run] + 1)}
    [events] = folder.rglob("events.out.tfevents.*")  # of TensorBoard's, no sub-run
    names = {"config.json", "metrics.csv", "checkpoint.pt", "snapshots", events.name}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names


@BOTH_RUNS
def test_snapshots_lead_from_the_seeds_start_to_the_checkpoint(run, request):
    _, folder = request.getfixturevalue(run)
    config, conditions = utils.read_config(folder, CONFIGS)
    torch.manual_seed(0)
    model = NETWORKS[config.script](config, *[conditions.precision] * (run == "cnn_run"))
    convolutions = {f"layers.conv{number}.{part}" for number in (1, 2) for part in ("weight", "bias")}
    start, end = read_snapshot(folder, 0), read_snapshot(folder, EPOCHS[run])
    assert start.keys() == end.keys() == (convolutions if run == "cnn_run" else model.state_dict().keys())
    assert all(torch.equal(start[name], model.state_dict()[name]) for name in start)
    model.load_state_dict(utils.load_tensors(folder / "checkpoint.pt")["state"]["model"])
    assert all(torch.equal(end[name], model.state_dict()[name]) for name in end)
    assert not any(torch.equal(start[name], end[name]) for name in start)


def test_real_mnist_is_learned_as_the_shipped_run_learned_it(real_data, real_run):
    done, folder = real_run
    assert (done.returncode, done.stderr, "synthetic" in done.stdout) == (0, "", False)
    name = "rnn_mnist/rnn30_adam_lr1e-3_seed0"
    folders = folder / name, real_data.with_name("runs") / "reference" / name
    row, shipped = (read_rows(folder)[0] for folder in folders)
    assert float(row["train_loss"]) == pytest.approx(float(shipped["train_loss"]), abs=0.02), "or other roundings'"
    assert float(row["test_accuracy"]) == pytest.approx(float(shipped["test_accuracy"]), abs=3)


# The report's list, and the table at the end


def test_the_reports_experiments_are_carried_over():
    rows = cnn_cifar10.REPORT + rnn_mnist.REPORT
    known = [61.3, 11.33, 98.5, 10.09, 47.73, 16.1, 15.13, 74.55, 90.75, 94.17, 97.6, 98.32, 97.86, 97.84]
    assert [row.accuracy for row in rows if row.accuracy] == known
    assert len(rows) == 16
    assert all(row.accuracy or row.remark for row in rows)


def test_report_trains_its_list_and_ends_with_the_table_of_its_epoch(call, digits, tmp_path, monkeypatch):
    """Also for runs that went on; and what is complete is not trained again."""
    monkeypatch.setattr(utils, "embedded_patterns", lambda size: small(digits, 100, 100)[3:])
    monkeypatch.setattr(utils, "REPORT_EPOCHS", 2)
    monkeypatch.setattr(rnn_mnist, "REPORT", rnn_mnist.REPORT[::4])
    outputs, flags = [], ["--report", "--data", "synthetic", "--device", "cpu", "--epochs", 3, "--seed", 0, 1]
    for _ in ("trained", "complete"):
        status, output, _ = call(rnn_mnist, *flags, "--runs-dir", tmp_path)
        outputs.append(output)
        assert status == 0
        assert "\nTest accuracy in % after epoch 2\n" in output
        for row, known in zip(read_tables(output), rnn_mnist.REPORT, strict=True):
            assert row["experiment"] == f"{known.config.sentence()}, synthetic data"
            names = [f"synthetic_{known.config.name[:-1]}{seed}" for seed in (0, 1)]
            accuracies = [float(read_rows(tmp_path / "rnn_mnist" / name)[1]["test_accuracy"]) for name in names]
            assert (row["mean"], row["seeds"]) == (f"{np.mean(accuracies):.2f}", "2")
            assert row["range"] == f"{min(accuracies):.2f} to {max(accuracies):.2f}"
            assert row["std"] == f"{np.std(accuracies, ddof=1):.2f}"
            assert "reported" not in row, "embedded data are not compared with the report's"
    assert [output.count("complete after epoch 3") for output in outputs] == [0, 6]
    assert [output.count("parameters, cpu") for output in outputs] == [6, 0]
    assert outputs[0].splitlines()[-1].split() == ["python", "visualize.py", str(tmp_path)]


# TensorBoard


@BOTH_RUNS
def test_tensorboard_holds_one_point_per_epoch_equal_to_the_metrics_and_the_settings_in_the_run_itself(run, request):
    _, folder = request.getfixturevalue(run)
    tags = {"Accuracy/Test": "test_accuracy", "Accuracy/Train": "train_accuracy"}
    tags |= {"Loss/Test": "test_loss", "Loss/Train": "train_loss"}
    rows, events = list(enumerate(read_rows(folder), start=1)), read_events(folder)
    expected = [(tag, epoch, float(np.float32(row[name]))) for tag, name in tags.items() for epoch, row in rows]
    assert read_points(folder) == expected
    assert events.Tags()["graph"]
    content = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["lr"].number_value == (1e-4 if run == "cnn_run" else 1e-3)
    assert [settings[name].string_value for name in ("optimizer", "data_source")] == ["adam", "synthetic"]


def test_tensorboard_shows_the_kernels_of_each_epoch_as_a_sheet_in_gray(cnn_run):
    """Kernel k stands in row k // 8 and column k % 8, ten pixels a weight, on one scale with zero in its middle."""
    _, folder = cnn_run
    images = read_events(folder).Images("conv1/filters")
    assert [image.step for image in images] == [0, 1]
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
        assert sheet[::6].min() == sheet[:, ::6].min() == 255, "white between the kernels"


def test_tensorboard_holds_histograms_of_the_first_100_test_images(cnn_run, pictures):
    _, folder = cnn_run
    events, images = read_events(folder), pictures.test.images[:100]
    config, conditions = utils.read_config(folder, CONFIGS)
    model = cnn_cifar10.LeNet5(config, conditions.precision)
    for epoch in (0, 1):
        model.load_state_dict(read_snapshot(folder, epoch), strict=False)
        with torch.no_grad():
            outputs = model.outputs(images)
        for layer in ("conv1", "conv2"):
            shown, maps = events.Histograms(f"{layer}/activations")[epoch], outputs[layer].relu().double()
            histogram = shown.histogram_value
            assert (shown.step, histogram.num, histogram.min) == (epoch, maps.numel(), 0)
            assert histogram.max == pytest.approx(maps.max().item(), rel=1e-2)
            assert histogram.sum == pytest.approx(maps.sum().item(), rel=1e-4)


# The training loop


def train_plainly(config, train, test, epochs):
    """Train as the scripts say they do, in a loop that shares nothing with them; return the network and its metrics."""
    torch.manual_seed(config.seed)
    model, history = NETWORKS[config.script](config), []
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    for epoch in range(1, epochs + 1):
        losses, hits = [], 0
        order = torch.Generator().manual_seed(1000 * config.seed + epoch)
        for batch in torch.randperm(len(train.images), generator=order).split(config.batch_size):
            logits = model(train.images[batch])
            loss = F.cross_entropy(logits, train.labels[batch])
            losses += [loss.item()] * len(batch)
            hits += (logits.argmax(1) == train.labels[batch]).sum().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = model(test.images).detach()
        test_hits = (logits.argmax(1) == test.labels).sum().item()
        scores = [np.mean(losses), 100 * hits / len(losses), F.cross_entropy(logits, test.labels).item()]
        history.append([epoch, *scores, 100 * test_hits / len(logits)])
    return model, history


def permuted(split):
    """Put the same pixel of each image into each place, in the one order that all experiments use."""
    order = torch.randperm(split.images[0].numel(), generator=torch.Generator().manual_seed(0))
    return split._replace(images=split.images.flatten(1)[:, order].view_as(split.images))


@pytest.mark.parametrize(
    ("script", "settings"),
    [
        (rnn_mnist, {"lr": 1e-2}),
        (rnn_mnist, {"cell": "lstm", "optimizer": "sgd", "lr": 0.5, "momentum": 0.9}),
        (rnn_mnist, {"cell": "gru", "pixels": "permuted", "lr": 1e-2}),
        (cnn_cifar10, {"lr": 1e-3}),
        (cnn_cifar10, {"dataset": "mnist", "without": "fc1", "optimizer": "sgd", "lr": 0.1, "pixels": "permuted"}),
    ],
)
def test_epochs_are_a_plain_loops_bit_for_bit(script, settings, call, pictures, digits, tmp_path, monkeypatch):
    config = script.Config(**settings, batch_size=16, seed=3)
    data = small(pictures if config.dataset == "cifar10" else digits, 76, 100)  # the fifth batch is smaller
    monkeypatch.setattr(utils, "embedded_patterns", lambda _: data[3:])
    flags = ["--data", "synthetic", "--device", "cpu", "--epochs", 2, "--runs-dir", tmp_path]
    flags += ["--precision", "fp32"] * (script is cnn_cifar10)
    assert call(script, *shlex.split(config.command(*flags))[2:])[0] == 0
    train, test = map(permuted if config.pixels == "permuted" else nn.Identity(), data[3:])
    model, history = train_plainly(config, train, test, epochs=2)  # on as many threads as the run
    checkpoint = utils.load_tensors(tmp_path / script.__name__ / f"synthetic_{config.name}" / "checkpoint.pt")
    weights = checkpoint["state"]["model"]
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for row, expected in zip(checkpoint["history"], history, strict=True):
        assert list(row.values())[:-1] == pytest.approx(expected, rel=1e-6)


@BOTH_SCRIPTS
def test_seconds_are_those_of_training_alone(script, config, tiny_data, tmp_path, monkeypatch):
    """The clock stands still but for a second that each step takes, and an hour for what is not training."""
    now = [0.0]

    def slow(owner, name, seconds):
        function = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args: (now.append(now[-1] + seconds), function(*args))[1])

    monkeypatch.setattr(utils.time, "perf_counter", lambda: now[-1])
    slow(torch.Tensor, "backward", 1)
    slow(script, "evaluate", 3600)
    slow(utils, "save_tensors", 3600)
    data = small(tiny_data[script], 3 * config.batch_size - 1, 100)
    folder = train_here(script, tmp_path, data, config, epochs=2)
    assert [float(row["seconds"]) for row in read_rows(folder)] == [3, 3]


@BOTH_SCRIPTS
def test_a_step_is_taken_in_train_mode_and_all_else_is_looked_at_in_eval_mode(script, config, tiny_data, tmp_path):
    modes = set()  # whether gradients are computed, and whether the network is in train mode

    def look(module, _):
        if isinstance(module, (nn.Conv2d, nn.RNNBase)) and not torch.jit.is_tracing():
            modes.add((torch.is_grad_enabled(), module.training))

    with nn.modules.module.register_module_forward_pre_hook(look):
        train_here(script, tmp_path, small(tiny_data[script], 64, 100), config, epochs=2)
    assert modes == {(True, True), (False, False)}


@pytest.mark.parametrize(
    ("capabilities", "precision"),
    [({"avx512_bf16": True}, "bf16"), ({"amx_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32"), (None, "fp32")],
)
def test_automatic_precision_is_bf16_where_it_is_native_and_the_network_can_use_it(
    capabilities, precision, monkeypatch
):
    functions = {"get_capabilities": lambda: capabilities} if capabilities else {}  # older releases of torch lack it
    monkeypatch.setattr(torch, "cpu", SimpleNamespace(**functions))
    args = SimpleNamespace(device="cpu", precision="auto", epochs=1, threads=7)
    assert utils.new_conditions(cnn_cifar10.Config(), args, "real").precision == precision
    assert utils.new_conditions(rnn_mnist.Config(), args, "real").precision == "fp32"
    args.precision = "fp32"
    assert utils.new_conditions(cnn_cifar10.Config(), args, "real").precision == "fp32"
