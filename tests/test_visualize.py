"""The figures: what they show is compared with the numbers that they stand for."""

import csv

import numpy as np
import pytest
import torch
from conftest import EPOCHS
from matplotlib import colormaps
from matplotlib.image import imread

import cnn_cifar10
import utils
import visualize


@pytest.fixture
def figures(monkeypatch):
    """The Figure objects that are drawn, by file name, beside the files themselves."""
    drawn, save = {}, visualize.save_figure

    def keep(figure, path):
        drawn[path.name] = figure
        save(figure, path)

    monkeypatch.setattr(visualize, "save_figure", keep)
    return drawn


def ink_at(axes, path, column, row):
    """The gray value, 0 to 1, that the saved PNG shows at an image's data coordinates."""
    figure, picture = axes.figure, imread(path)
    x, y = axes.transData.transform((column, row)) * 160 / figure.dpi  # figure pixels to saved pixels
    return picture[picture.shape[0] - 1 - int(y), int(x), :3].mean()


def test_every_figure_of_a_cnn_run_is_written_with_title_labels_and_legends(
    cnn_run, tmp_path, call, figures, monkeypatch
):
    _, folder = cnn_run
    data = visualize.FinishedRun(folder).data
    few = data._replace(test_images=data.test_images[:200], test_labels=data.test_labels[:200])
    monkeypatch.setattr(visualize, "load_once", lambda *_: few)
    status, output, error = call(visualize, folder, "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    names = {"curves", "confusion", "examples", "filters", "activations", "evolution", "invariance", "occlusion"}
    names |= {"contribution", "gabor", "deconv_conv1_0-31", "deconv_conv2_0-31", "deconv_conv2_32-63"}
    assert {path.stem for path in tmp_path.glob("*.png")} == names
    assert all(str(tmp_path / f"{name}.png") in output for name in names)
    for name, figure in figures.items():
        assert "LeNet-5 on synthetic data" in figure._suptitle.get_text()
        labelled = figure.get_supxlabel() or all(axes.get_xlabel() for axes in figure.axes if axes.lines)
        assert labelled, name
        picture = imread(tmp_path / name)
        assert picture.shape[1] == 1280, "8 inches at 160 dots an inch"
        assert picture[..., :3].std() > 0.05, "not blank"


def test_filters_show_the_weights_in_gray_on_one_symmetric_scale(cnn_run, tmp_path, figures):
    run = visualize.FinishedRun(cnn_run[1])
    visualize.filters(run, tmp_path)
    axes = figures["filters.png"].axes[0]
    kernels = utils.load_checkpoint(run.folder)["model"]["conv1.weight"][:, 0]
    limit = kernels.abs().max().item()
    assert axes.images[0].get_clim() == pytest.approx((-limit, limit))
    assert [text.get_text() for text in axes.texts] == [f"map {number}" for number in range(32)]
    for number, kernel in enumerate(kernels):
        top, left = number // 8 * 6, number % 8 * 6
        assert np.array_equal(axes.images[0].get_array()[top : top + 5, left : left + 5], kernel.numpy())
        for row, column in ((0, 0), (2, 3), (4, 4)):
            expected = colormaps["gray"](float(0.5 + kernel[row, column] / (2 * limit)))[0]
            shown = ink_at(axes, tmp_path / "filters.png", left + column, top + row)
            assert shown == pytest.approx(expected, abs=0.02)


def test_activation_statistics_agree_with_the_definition():
    torch.manual_seed(0)
    model, images = cnn_cifar10.LeNet5(), torch.randint(256, (30, 32, 32), dtype=torch.uint8)
    statistics = visualize.activation_statistics(model, images, batch_size=7)
    with torch.no_grad():
        maps = model.activations(model.prepare(images))["conv2"].double()
    expected = {
        "image_mean": maps.mean((1, 2, 3)),
        "mean": maps.mean((0, 2, 3)),
        "std": maps.std((0, 2, 3), correction=0),
        "std_across_images": maps.mean((2, 3)).std(0, correction=0),
        "zeros": 100 * (maps == 0).double().mean((0, 2, 3)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(statistics["conv2"][name], value, rtol=1e-4, err_msg=name)


def test_activations_table_has_a_row_for_each_map_and_layer(cnn_run, tmp_path):
    run = visualize.FinishedRun(cnn_run[1])
    visualize.activations(run, tmp_path)
    with open(tmp_path / "activations.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["feature_map"] for row in rows if row["layer"] == "conv1"] == ["all", *map(str, range(32))]
    assert len(rows) == 33 + 65
    with torch.no_grad():
        maps = run.model.activations(run.model.prepare(run.data.test_images))["conv1"]
    assert float(rows[0]["mean"]) == pytest.approx(maps.mean().item(), abs=1e-5)
    assert float(rows[0]["std"]) == pytest.approx(maps.std().item(), abs=1e-4)
    assert float(rows[0]["zeros_percent"]) == pytest.approx(100 * (maps == 0).float().mean().item(), abs=1e-3)


def test_curves_draw_the_metrics(rnn_run, tmp_path, figures):
    run = visualize.FinishedRun(rnn_run[1])
    visualize.curves(run, tmp_path)
    panels = figures["curves.png"].axes
    for axes, column in zip(panels, ("train_accuracy", "train_loss", "test_accuracy"), strict=True):
        assert list(axes.lines[0].get_ydata()) == [row[column] for row in run.metrics]
        assert list(axes.lines[0].get_xdata()) == list(range(1, EPOCHS + 1))
        assert axes.get_title() == column.replace("_", " ")
        assert axes.get_ylabel()


def test_confusion_matrix_counts_true_by_row():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 2])
    assert visualize.confusion_matrix(labels, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_confusion_and_examples_agree_with_the_runs_test_accuracy(rnn_run, tmp_path, figures):
    run = visualize.FinishedRun(rnn_run[1])
    visualize.confusion(run, tmp_path)
    visualize.examples(run, tmp_path)
    assert f"{run.metrics[-1]['test_accuracy']:.2f} %" in figures["confusion.png"]._suptitle.get_text()
    cells = [int(text.get_text()) for text in figures["confusion.png"].axes[0].texts]
    assert sum(cells) == 2000
    assert 100 * sum(cells[::11]) / 2000 == pytest.approx(run.metrics[-1]["test_accuracy"])
    predicted = run.probabilities.argmax(1)
    axes = figures["examples.png"].axes[0]
    titles = [text.get_text() for text in axes.texts]
    assert len(titles) == 40
    assert all(titles[digit].startswith(f"{digit}\n") for digit in range(10)), "the first row is right"
    assert not any(titles[20 + digit].startswith(f"{digit}\n") for digit in range(10)), "the third row is wrong"
    first = (run.data.test_labels == 0).logical_and(predicted == 0).nonzero()[0, 0]
    shown = axes.images[0].get_array()[:28, :28]
    assert np.array_equal(shown, run.data.test_images[first])


def test_several_runs_are_compared_in_one_figure(cnn_run, rnn_run, runs_dir, call, figures):
    (runs_dir / "reference").mkdir(exist_ok=True)
    status, output, _ = call(visualize, runs_dir, "--figures", "curves")
    assert status == 0
    assert output.strip() == str(runs_dir / "comparison" / "curves.png")
    figure = figures["curves.png"]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == [
        f"LeNet-5 on synthetic data in place of CIFAR-10, Adam, learning rate 0.0001, batch 128, only {EPOCHS} epochs",
        "RNN with 30 hidden units on synthetic data in place of MNIST, Adam, learning rate 0.001, batch 64, "
        f"only {EPOCHS} epochs",
    ]
    assert [len(axes.lines) for axes in figure.axes] == [2, 2, 2]


def test_a_reference_folder_is_passed_over_unless_named(rnn_run, tmp_path):
    copy = tmp_path / "reference" / "rnn_mnist" / "run"
    copy.mkdir(parents=True)
    for name in ("config.json", "metrics.csv"):
        (copy / name).write_bytes((rnn_run[1] / name).read_bytes())
    with pytest.raises(utils.InputError, match="holds no run"):
        visualize.find_runs(tmp_path)
    assert [run.folder for run in visualize.find_runs(tmp_path / "reference")] == [copy]
