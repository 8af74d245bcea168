"""Training: the scripts as a user runs them, the run's folder, the table of results, TensorBoard, and the loop."""

import io
import json
import re

import cnn_cifar10
import rnn_mnist
import utils
from visualize import SavedRun

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import (
    CONFIGS,
    HAS_REAL_DATA,
    ROOT,
    SMALL_CNN,
    SMALL_GRU,
    background_fixture,
    read_events,
    read_points,
    read_rows,
    run_command,
    small,
    train_here,
    use_as_synthetic,
)
from PIL import Image
from tensorboard.plugins.hparams import plugin_data_pb2

NETWORKS = {"cnn_cifar10": cnn_cifar10.LeNet5, "rnn_mnist": rnn_mnist.RowReader}
both_scripts = pytest.mark.parametrize(
    ("script", "config"), [(rnn_mnist, SMALL_GRU), (cnn_cifar10, SMALL_CNN)], ids=["rnn", "cnn"]
)


def read_snapshot(folder, epoch):
    return utils.load_tensors(folder / "snapshots" / f"epoch_{epoch:02d}.pt")


def read_table(output):
    """Return the Markdown table that a script printed, list of dict of str."""
    lines = [line for line in output.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


@background_fixture
def default_runs(folder):
    """Each script with its defaults on synthetic data: (number of epochs, CompletedProcess, folder of the run)."""
    runs = {}
    for script, name, epochs in (
        ("cnn_cifar10", "synthetic_adam_lr1e-3_seed0", 1),
        ("rnn_mnist", "synthetic_rnn30_adam_lr1e-3_seed0", 2),
    ):
        done = run_command(f"{script}.py", "--data", "synthetic", "--epochs", epochs, "--runs-dir", folder)
        runs[script] = epochs, done, folder / script / name
    return runs


@pytest.fixture(params=["cnn_cifar10", "rnn_mnist"])
def default_run(request, default_runs):
    return default_runs[request.param]


@pytest.fixture
def cnn_folder(default_runs):
    return default_runs["cnn_cifar10"][-1]


def test_screen_shows_epochs_data_source_result_and_next_commands(default_run):
    epochs, done, folder = default_run
    assert (done.returncode, done.stderr) == (0, ""), "no progress bar, no warnings"
    rows = read_rows(folder)
    lines = done.stdout.splitlines()
    progress = [line for line in lines if re.match(rf" *\d+/{epochs} ", line)]
    assert len({len(line) for line in progress}) == 1, "the columns are aligned"
    for number, (line, row) in enumerate(zip(progress, rows, strict=True), start=1):
        loss, train, test, seconds = [float(row[name]) for name in utils.METRIC_COLUMNS if name != "test_loss"][1:]
        assert line.split()[:-1] == f"{number}/{epochs} {loss:.4f} {train:.2f} % {test:.2f} % {seconds:.1f}".split()
    notices = [number for number, line in enumerate(lines) if line == utils.SYNTHETIC_NOTICE]
    assert notices == [0, len(lines) - 5], "at the start and at the end"
    [result] = read_table(done.stdout)
    assert result["mean"] == f"{float(rows[-1]['test_accuracy']):.2f}"
    assert lines[-2].split() == ["tensorboard", "--logdir", str(folder.parent)]
    assert lines[-1].split() == ["python", "visualize.py", str(folder)]


def test_run_folder_holds_what_the_readme_says(default_run):
    epochs, _, folder = default_run
    record = json.loads((folder / "config.json").read_text())
    assert record.keys() == {"script", "settings", "conditions"}
    assert CONFIGS[record["script"]](**record["settings"]) == CONFIGS[folder.parent.name]()
    conditions = record["conditions"]
    assert (conditions["data_source"], conditions["epochs"]) == ("synthetic", epochs)
    assert conditions["parameters"] == {"cnn_cifar10": 4_257_674, "rnn_mnist": 3_970}[record["script"]]
    assert conditions["versions"]["torch"] == torch.__version__
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert checkpoint["record"] == record
    assert [row["epoch"] for row in checkpoint["history"]] == list(range(1, epochs + 1))
    for row, shown in zip(checkpoint["history"], read_rows(folder), strict=True):
        assert shown == {name: str(value) for name, value in row.items()}
    snapshots = {path.name for path in folder.glob("snapshots/*")}
    assert snapshots == {f"epoch_{epoch:02d}.pt" for epoch in range(epochs + 1)}
    [events] = folder.rglob("events.out.tfevents.*")
    names = {"config.json", "metrics.csv", "checkpoint.pt", "snapshots", events.name}
    assert {path.name for path in folder.iterdir()} - {".lock"} == names


def test_snapshots_lead_from_the_initial_weights_to_the_checkpoint(default_run):
    epochs, _, folder = default_run
    config = SavedRun(folder).config
    torch.manual_seed(0)
    initial = NETWORKS[config.script](config).state_dict()
    trained = utils.load_tensors(folder / "checkpoint.pt")["state"]["model"]
    first, last = read_snapshot(folder, 0), read_snapshot(folder, epochs)
    names = [name for name in trained if config.script == "rnn_mnist" or name.startswith("layers.conv")]
    assert list(first) == list(last) == names
    for name in names:
        assert torch.equal(first[name], initial[name])
        assert torch.equal(last[name], trained[name])
        assert not torch.equal(first[name], last[name])


@background_fixture
def real_run(folder):
    """The default recurrent network after an epoch of MNIST, if that is there: (CompletedProcess, runs folder)."""
    if not HAS_REAL_DATA:
        return None, folder
    flags = ("--epochs", 1, "--data", "real", "--data-dir", ROOT / "data", "--runs-dir", folder)
    return run_command("rnn_mnist.py", *flags), folder


@pytest.mark.usefixtures("real_data")
def test_training_on_real_mnist_repeats_the_shipped_run(real_run):
    done, runs_dir = real_run
    assert (done.returncode, done.stderr) == (0, "")
    assert "synthetic" not in done.stdout
    [row] = read_rows(runs_dir / "rnn_mnist/rnn30_adam_lr1e-3_seed0")
    shipped = read_rows(ROOT / "runs/reference/rnn_mnist/rnn30_adam_lr1e-3_seed0")[0]
    assert float(row["train_loss"]) == pytest.approx(float(shipped["train_loss"]), abs=0.02), "but for rounding"
    assert float(row["test_accuracy"]) == pytest.approx(float(shipped["test_accuracy"]), abs=3)


def test_report_trains_its_list_once_and_prints_a_table(call, digits, tmp_path, monkeypatch):
    """The table is that of the report's last epoch, even if the runs are longer."""
    use_as_synthetic(monkeypatch, small(digits, 100, 100))
    monkeypatch.setattr(utils, "REPORT_EPOCHS", 2)
    monkeypatch.setattr(rnn_mnist, "REPORT", rnn_mnist.REPORT[::4])
    flags = ["--report", "--data", "synthetic", "--device", "cpu", "--epochs", 3, "--seed", 0, 1]
    for complete in (0, 6):
        status, output, _ = call(rnn_mnist, *flags, "--runs-dir", tmp_path)
        assert status == 0
        assert output.count("complete after epoch 3") == complete
        assert output.count("parameters, cpu") == 6 - complete
        assert "\nTest accuracy in % after epoch 2\n" in output
        for row, reported in zip(read_table(output), rnn_mnist.REPORT, strict=True):
            names = [f"synthetic_{reported.config.name[:-1]}{seed}" for seed in (0, 1)]
            accuracies = [float(read_rows(tmp_path / "rnn_mnist" / name)[1]["test_accuracy"]) for name in names]
            assert row["experiment"] == f"{reported.config.caption}, synthetic data"
            assert (row["mean"], row["seeds"]) == (f"{np.mean(accuracies):.2f}", "2")
            assert "reported" not in row, "synthetic data are not compared with the report"
        assert output.splitlines()[-1].split() == ["python", "visualize.py", str(tmp_path)]


def test_tensorboard_holds_the_metrics_of_each_epoch_and_the_graph(default_run):
    _, _, folder = default_run
    expected = []
    for tag in ("Accuracy/Test", "Accuracy/Train", "Loss/Test", "Loss/Train"):
        quantity, split = tag.lower().split("/")
        for epoch, row in enumerate(read_rows(folder), start=1):
            expected.append((tag, epoch, float(np.float32(row[f"{split}_{quantity}"]))))
    assert [point for point in read_points(folder) if not point[0].startswith("Zeros_percent/")] == expected
    assert read_events(folder).Tags()["graph"]


def test_tensorboard_lists_every_setting_also_those_that_are_0(tiny_digits, tmp_path):
    config = rnn_mnist.Config("permuted", cell="lstm", hidden_size=4, rows_after=2, keep_bias=1.5, gates="input")
    conditions = {"data_source": "synthetic", "device": "cpu", "precision": "fp32", "threads": 1}
    folder = train_here(rnn_mnist, tmp_path, tiny_digits, config, epochs=1)
    content = read_events(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    values = {name: value.string_value or value.number_value for name, value in shown.items()}
    assert values == {**vars(config), **conditions}


def test_tensorboard_holds_the_last_states_of_the_first_100_test_images(tiny_digits, tmp_path):
    folder = train_here(rnn_mnist, tmp_path, tiny_digits, rnn_mnist.Config(cell="lstm", rows_after=2), epochs=2)
    model = SavedRun(folder).model
    outputs, _ = model.recurrent(model.rows(tiny_digits.test.images[:100]))
    events = read_events(folder).Histograms("state/after_last_row")
    assert [event.step for event in events] == [1, 2]
    shown = events[1].histogram_value
    states = outputs[:, -1].detach().double()
    assert (shown.num, shown.sum) == (states.numel(), pytest.approx(states.sum().item(), rel=1e-4))


def test_tensorboard_shows_the_kernels_of_each_epoch_in_gray(cnn_folder):
    """Kernel k is in row k // 8 and column k % 8, ten pixels a weight; zero is the middle of the scale."""
    images = read_events(cnn_folder).Images("conv1/filters")
    assert [image.step for image in images] == [0, 1]
    for image in images:
        picture = np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))
        weights = picture[5::10, 5::10, 0]  # the middle of each weight
        kernels = read_snapshot(cnn_folder, image.step)["layers.conv1.weight"][:, 0].numpy()
        gray = 255 * (kernels / np.abs(kernels).max((1, 2), keepdims=True) + 1) / 2
        for number, kernel in enumerate(gray):
            top, left = 1 + 6 * (number // 8), 1 + 6 * (number % 8)
            assert np.abs(weights[top : top + 5, left : left + 5] - kernel).max() <= 1


def test_tensorboard_holds_activations_of_the_first_100_test_images(cnn_folder, pictures):
    events = read_events(cnn_folder)
    run = SavedRun(cnn_folder)
    model = cnn_cifar10.LeNet5(run.config, run.conditions.precision)
    model.load_state_dict(read_snapshot(cnn_folder, 1), strict=False)
    with torch.no_grad():
        outputs = model.outputs(pictures.test.images[:100])
    for layer in ("conv1", "conv2"):
        untrained, trained = events.Histograms(f"{layer}/positive_activations")
        assert (untrained.step, trained.step) == (0, 1)
        histogram = trained.histogram_value
        activations = outputs[layer].relu().double()
        assert histogram.num == (activations > 0).sum()
        zeros = [point.value for point in events.Scalars(f"Zeros_percent/{layer}")]
        assert (len(zeros), zeros[1]) == (2, pytest.approx(100 * (activations == 0).double().mean().item()))
        assert histogram.max == pytest.approx(activations.max().item(), rel=1e-2)
        assert histogram.sum == pytest.approx(activations.sum().item(), rel=1e-4)


def train_plainly(config, train, test, epochs):
    """Train as the scripts promise, in a loop that shares nothing with them; return the network and its metrics."""
    torch.manual_seed(config.seed)
    model = NETWORKS[config.script](config)
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    history = []
    for epoch in range(1, epochs + 1):
        losses, correct = [], 0
        order = torch.Generator().manual_seed(1000 * config.seed + epoch)
        for batch in torch.randperm(len(train.images), generator=order).split(config.batch_size):
            logits = model(train.images[batch])
            loss = F.cross_entropy(logits, train.labels[batch])
            losses += [loss.item()] * len(batch)
            correct += (logits.argmax(1) == train.labels[batch]).sum().item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = model(test.images).detach()
        test_loss = F.cross_entropy(logits, test.labels).item()
        test_accuracy = 100 * (logits.argmax(1) == test.labels).double().mean().item()
        history.append([epoch, np.mean(losses), 100 * correct / len(losses), test_loss, test_accuracy])
    return model, history


def permuted(split):
    """Return a Split whose images have their pixels in the random order that all experiments use."""
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
def test_training_equals_a_plain_loop_bit_for_bit(script, settings, call, pictures, digits, tmp_path, monkeypatch):
    settings = settings | {"batch_size": 16, "seed": 3}
    config = script.Config(**settings)
    data = small(pictures if config.dataset == "cifar10" else digits, 76, 100)  # the fifth batch is smaller
    use_as_synthetic(monkeypatch, data)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    flags += ["--data", "synthetic", "--device", "cpu", "--epochs", 2, "--runs-dir", tmp_path]
    if script is cnn_cifar10:
        flags += ["--precision", "fp32"]
    assert call(script, *flags)[0] == 0
    train, test = data.train, data.test
    if config.pixels == "permuted":
        train, test = permuted(train), permuted(test)
    model, history = train_plainly(config, train, test, epochs=2)  # on as many threads as the run
    checkpoint = utils.load_tensors(tmp_path / script.__name__ / f"synthetic_{config.name}" / "checkpoint.pt")
    weights = checkpoint["state"]["model"]
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    for row, expected in zip(checkpoint["history"], history, strict=True):
        assert list(row.values())[:-1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("cell", ["gru", "lstm"])
@pytest.mark.parametrize("gates", ["input", "constant"])
@pytest.mark.parametrize("optimizer", [{"lr": 1e-2}, {"optimizer": "sgd", "lr": 0.5, "momentum": 0.9}])
def test_restricted_gates_stay_blind_and_all_else_is_trained(cell, gates, optimizer, tiny_digits, tmp_path):
    config = rnn_mnist.Config(cell=cell, gates=gates, hidden_size=8, **optimizer)
    for epochs in (1, 2):  # the second one is trained after resuming
        folder = train_here(rnn_mnist, tmp_path, tiny_digits, config, epochs)
        trained_weights = 0
        for name, initial in read_snapshot(folder, 0).items():
            weights = read_snapshot(folder, epochs)[name]
            is_blind = initial == 0  # only what the gates must not see starts at exactly zero
            assert (weights[is_blind] == 0).all(), name
            assert (weights != initial)[~is_blind].all(), name
            trained_weights += int((~is_blind).sum())
        assert SavedRun(folder).conditions.parameters == trained_weights


def test_evaluation_counts_all_test_images():
    """More than fit into one batch of predictions; those after the first 1,000 are classified wrongly."""

    def model(images):
        brightness = images.flatten(1).float().mean(1) / 255
        return torch.stack([1 - brightness, brightness], dim=1)

    images = torch.zeros(1500, 4, 4, dtype=torch.uint8)
    images[1000:] = 255
    score = utils.evaluate(model, utils.Split(images, torch.zeros(1500, dtype=torch.int64)))
    assert score.accuracy == pytest.approx(100 * 1000 / 1500)
    assert score.loss == pytest.approx(np.log(1 + np.e) - 1000 / 1500)  # -log of softmax, whose numerator is e or 1


@both_scripts
def test_seconds_are_of_training_and_time_left_is_of_all(script, config, tiny_data, tmp_path, monkeypatch, capsys):
    """The clock stands still except for a second that each step takes, and an hour for anything else."""
    now = 0.0

    def slow_down(owner, name, seconds):
        function = getattr(owner, name)

        def slow_function(*args):
            nonlocal now
            now += seconds
            return function(*args)

        monkeypatch.setattr(owner, name, slow_function)

    monkeypatch.setattr(utils.time, "perf_counter", lambda: now)
    slow_down(torch.Tensor, "backward", 1)
    slow_down(script, "evaluate", 3600)
    slow_down(utils, "save_tensors", 3600)
    data = small(tiny_data[script], 3 * config.batch_size - 1, 100)
    folder = train_here(script, tmp_path, data, config, epochs=2)
    assert [float(row["seconds"]) for row in read_rows(folder)] == [3, 3]
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()[-2:]] == ["3:00:03", "00:00"]


@pytest.mark.usefixtures("tiny_data")
@pytest.mark.parametrize(("hidden_size", "threads"), [(64, 1), (65, 3)])
def test_small_recurrent_networks_use_one_thread(hidden_size, threads, call, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "available_threads", lambda: 3)
    flags = ("--hidden-size", hidden_size, "--data", "synthetic", "--epochs", 1, "--runs-dir", tmp_path)
    assert call(rnn_mnist, *flags)[0] == 0
    assert torch.get_num_threads() == threads
    [folder] = (tmp_path / "rnn_mnist").iterdir()
    assert SavedRun(folder).conditions.threads == threads
