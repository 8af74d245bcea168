"""The figures: what they show is compared with the numbers that they stand for."""

import csv
import io
import re
import sys
from contextlib import redirect_stderr, redirect_stdout
from types import SimpleNamespace

import cnn_cifar10
import utils
import visualize
from visualize import SavedRun

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EPOCHS, first_images, made_small, nothing_left_behind, read_points, read_rows, train_here
from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from test_understanding import PRECISIONS, DeepLeNet5, gradient_rows, hesitant_networks, without_map


@pytest.fixture(autouse=True, scope="module")
def _style():
    """Draw as the script does, in one thread, which small networks do not slow down; leave all as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with matplotlib.rc_context(visualize.STYLE):
        yield
    torch.set_num_threads(threads)


def draw(folder, data, output_dir, *flags):
    """Call visualize.py on a run whose data are replaced; return the run, what was made by file name, and the folder.

    The script has to end with status 0 without a word on standard error, and to name each file that it writes.
    """
    made, save, shown, told = {}, visualize.save, io.StringIO(), io.StringIO()

    def keep(name, drawn, output_dir):
        made.update(drawn if isinstance(drawn, dict) else {f"{name}.png": drawn})
        save(name, drawn, output_dir)

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(shown), redirect_stderr(told):
        patch.setattr(visualize, "load_once", lambda *_: data)
        patch.setattr(visualize, "save", keep)
        patch.setattr(sys, "argv", ["visualize.py", str(folder), "--output-dir", str(output_dir), *flags])
        with pytest.raises(SystemExit) as ended, nothing_left_behind():
            visualize.main()
    assert (ended.value.code, told.getvalue()) == (0, "")
    assert all(str(output_dir / name) in shown.getvalue().splitlines() for name in made)
    run = SavedRun(folder)
    run.data = data
    return SimpleNamespace(run=run, made=made, folder=output_dir)


def read_table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def few_features(*of, every=20, whole=visualize.layer_features):
    """Return one feature in 20 of each layer: the time that a linear classifier takes grows with their cube."""
    return {name: features[:, ::every] for name, features in whole(*of).items()}


FEWER_AMOUNTS = {kind: amounts[::2] for kind, amounts in visualize.TRANSFORMATIONS.items()}


@pytest.fixture(scope="module")
def cnn(cnn_run, tmp_path_factory):
    """All figures of a CNN run, of 100 test images, few attempts at each Gabor function, few features of each layer."""
    data = SavedRun(cnn_run[1]).data
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "GABOR_STARTS", 1)
        patch.setattr(visualize, "RIDGE_IMAGES", 300)
        patch.setattr(visualize, "TRANSFORMATIONS", FEWER_AMOUNTS)
        patch.setattr(visualize, "layer_features", few_features)
        few = data._replace(test=first_images(data.test, 100))
        return draw(cnn_run[1], few, tmp_path_factory.mktemp("cnn"))


@pytest.fixture(scope="module")
def rnn(rnn_run, tmp_path_factory):
    """All figures of a recurrent run."""
    return draw(rnn_run[1], SavedRun(rnn_run[1]).data, tmp_path_factory.mktemp("rnn"))


@pytest.fixture(scope="module")
def few_pictures():
    return made_small(utils.synthetic_pictures, 64, 40)


# What a reader is told of each axes


NAMED_BY_TICKS = ("evolution.png", "gabor.png", "without.png")  # their rows' names stand at the ticks of the y axis


def legend_texts(figure, axes):
    legends = [legend for legend in (*figure.legends, axes.get_legend()) if legend]
    return {text.get_text() for legend in legends for text in legend.get_texts()}


def in_line(figure, axes, span):
    """Return the axes of a figure that stand in the same row ('rowspan') or column ('colspan') of the same grid."""
    place = axes.get_subplotspec()
    others = [(other, other.get_subplotspec()) for other in figure.axes]
    return [
        other
        for other, spec in others
        if spec and spec.get_gridspec() is place.get_gridspec() and getattr(spec, span) == getattr(place, span)
    ]


def is_named(name, figure, axes, axis):
    """Whether an axis has a label or no ticks; a y axis may have it from another one in its row with the same ticks."""
    if axis.get_label_text() or not len(axis.get_ticklocs()):
        return True
    if axis is axes.xaxis:
        return False
    row = in_line(figure, axes, "rowspan")
    shared = any(other.get_ylabel() and [*other.get_yticks()] == [*axes.get_yticks()] for other in row)
    ticks = [text.get_text() for text in axes.get_yticklabels()]
    return shared or (name in NAMED_BY_TICKS and all(re.search("[a-z]", text) for text in ticks))


def has_unit(figure, axes, scale):
    """Whether a colour scale has a label, or its picture's column a title that says what is shown."""
    told = scale.ax.get_xlabel() or scale.ax.get_ylabel()
    return bool(told) or any(other.get_title() for other in in_line(figure, axes, "colspan"))


def untold(name, figure):
    """Return what a figure's reader misses: names of axes, legends of lines, labels of colour scales; a list of str."""
    missed = [] if figure.get_suptitle() else [f"{name} has no title"]
    for number, axes in enumerate(figure.axes):
        if not axes.axison or axes.get_label() == "<colorbar>":
            continue
        for direction, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if not is_named(name, figure, axes, axis):
                missed.append(f"{name}, axes {number}: no {direction} label")
        told, labels = legend_texts(figure, axes), {*axes.get_legend_handles_labels()[1]}
        lines = [line for line in axes.lines if line.get_linestyle() != "None" and len(line.get_xdata())]
        if labels - told or len({to_hex(line.get_color()) for line in lines}) > max(1, len(told)):
            missed.append(f"{name}, axes {number}: no legend for {len(lines)} lines, {sorted(labels)}")
        scales = [picture.colorbar for picture in axes.images if picture.colorbar]
        missed += [f"{name}, axes {number}: no unit" for scale in scales if not has_unit(figure, axes, scale)]
    return missed


def check_pictures(drawn):
    """Check that each picture of a run tells its reader all, and is written in full width and not blank."""
    pictures = {name: figure for name, figure in drawn.made.items() if isinstance(figure, Figure)}
    assert {f"{path.stem}.png" for path in drawn.folder.glob("*.png")} == pictures.keys()
    for name, figure in pictures.items():
        assert untold(name, figure) == []
        assert figure.get_suptitle().endswith(drawn.run.title)
        picture = imread(drawn.folder / name)
        assert picture.shape[1] == 1280, "8 inches at 160 dots an inch"
        assert picture[..., :3].std() > 0.05, "not blank"


@pytest.mark.parametrize(
    ("draw_one", "spoil"),
    [
        ("curves", lambda figure: figure.axes[1].get_legend().remove()),
        ("curves", lambda figure: figure.axes[0].set_xlabel("")),
        ("curves", lambda figure: figure.axes[1].set_ylabel("")),
        ("curves", lambda figure: figure.axes[0].legend(["one"])),
        ("curves", lambda figure: figure.suptitle("")),
        ("confusion", lambda figure: figure.axes[0].set_xlabel("")),
        ("confusion", lambda figure: figure.axes[0].set_ylabel("")),
        ("confusion", lambda figure: figure.axes[0].images[0].colorbar.set_label("")),
        ("examples", lambda figure: figure.axes[0].set_xlabel("")),
        ("examples", lambda figure: figure.axes[0].set_ylabel("")),
        ("reading", lambda figure: figure.axes[0].set_ylabel("")),
        ("reading", lambda figure: figure.axes[-1].set_ylabel("")),
    ],
)
def test_a_missing_label_or_legend_is_found(rnn, draw_one, spoil):
    figure = visualize.FIGURES[draw_one].draw(rnn.run)
    assert untold(draw_one, figure) == []
    spoil(figure)
    assert untold(draw_one, figure)


def test_every_figure_of_a_cnn_run_is_written_with_title_labels_and_legends(cnn):
    names = (
        "curves confusion examples filters activations layers deconv_conv2 evolution invariance occlusion contribution "
        "gabor"
    )
    tables = {"activations.csv", "layers.csv", "gabor.csv"}
    assert cnn.made.keys() == {*(f"{name}.png" for name in names.split()), *tables}
    assert cnn.run.title == "LeNet-5 on CIFAR-10, Adam, learning rate 1e-4, seed 0, synthetic data"
    check_pictures(cnn)


def test_every_figure_of_a_recurrent_run_is_written_with_title_labels_and_legends(rnn):
    names = "curves confusion examples gradients reading"
    assert rnn.made.keys() == {*(f"{name}.png" for name in names.split()), "gradients.csv"}
    assert rnn.run.title == "RNN, 30 hidden units, Adam, learning rate 1e-3, seed 0, synthetic data"
    check_pictures(rnn)


# Any run


def test_curves_draw_the_metrics(rnn):
    panels = rnn.made["curves.png"].axes
    for axes, (name, label) in zip(panels, (("accuracy", "accuracy in %"), ("loss", "cross-entropy")), strict=True):
        lines = {line.get_label(): line for line in axes.lines}
        assert list(lines) == ["train images", "test images"]
        for part in ("train", "test"):
            values = [float(row[f"{part}_{name}"]) for row in read_rows(rnn.run.folder)]
            assert list(lines[f"{part} images"].get_ydata()) == values
            assert list(lines[f"{part} images"].get_xdata()) == list(range(1, EPOCHS + 1))
        assert axes.get_ylabel().startswith(label)


def test_confusion_matrix_counts_true_by_row():
    labels, predicted = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 1, 1, 0, 2])
    assert visualize.confusion_matrix(labels, predicted, 3).tolist() == [[1, 1, 0], [0, 1, 0], [1, 0, 1]]


def test_confusion_and_examples_agree_with_the_runs_test_accuracy(rnn):
    run, confusion = rnn.run, rnn.made["confusion.png"]
    last = float(read_rows(run.folder)[-1]["test_accuracy"])
    assert f", {last:.2f} % of 2,000 test images right" in confusion.get_suptitle()
    cells = [int(text.get_text()) for text in confusion.axes[0].texts]
    assert sum(cells) == 2000
    assert 100 * sum(cells[::11]) / 2000 == pytest.approx(last)
    predicted, labels = run.probabilities.argmax(1), run.data.test.labels
    axes = rnn.made["examples.png"].axes[0]
    titles = [text.get_text() for text in axes.texts]
    assert len(titles) == 40
    assert all(titles[digit].startswith(f"{digit}\n") for digit in range(10)), "the first row is right"
    assert not any(titles[20 + digit].startswith(f"{digit}\n") for digit in range(10)), "the third row is wrong"
    first = ((labels == 0) & (predicted == 0)).nonzero()[0, 0]
    assert titles[0] == f"0\n{100 * run.probabilities[first].max():.0f} %"
    mosaic, room = axes.images[0].get_array(), 3 + 28 // 3
    assert np.array_equal(mosaic[room : room + 28, 3:31], run.data.test.images[first])
    wrong = ((labels == 1) & (predicted != 1)).nonzero()[0, 0]
    top, left = 2 * (room + 28) + room, 31 + 3
    assert np.array_equal(mosaic[top : top + 28, left : left + 28], run.data.test.images[wrong])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_every_place_shows_the_accuracy_of_the_arithmetic_that_the_run_was_trained_in(
    tmp_path, few_pictures, call, monkeypatch, precision
):
    monkeypatch.setattr(visualize, "picture_bytes", lambda figure: b"")
    config = cnn_cifar10.Config(lr=1e-3)
    folder = train_here(cnn_cifar10, tmp_path / "runs", few_pictures, config, epochs=1, precision=precision)
    drawn = draw(folder, few_pictures, tmp_path, "--figures", "confusion")
    (row,) = read_rows(folder)
    accuracy, loss = float(row["test_accuracy"]), float(row["test_loss"])
    assert f" {accuracy:.2f} % of 40 test images" in drawn.made["confusion.png"].get_suptitle()
    assert call(visualize, folder, folder, "--figures", "results", "--output-dir", tmp_path)[0] == 0
    assert read_table(tmp_path / "results.csv")[0]["mean"] == f"{accuracy:.2f}"
    # Of 40 images both arithmetics may find as many; the loss tells them apart.
    images, run = few_pictures.test.images, drawn.run
    assert utils.evaluate(run.model, few_pictures.test) == pytest.approx((loss, accuracy), abs=1e-12)
    assert torch.equal(run.probabilities, utils.predict(run.model, images).softmax(1))
    other = cnn_cifar10.LeNet5(config, {"fp32": "bf16", "bf16": "fp32"}[precision])
    other.load_state_dict(run.model.state_dict())
    assert abs(utils.evaluate(other, few_pictures.test).loss - loss) > 1e-7


def test_every_place_shows_the_same_figures_of_a_recurrent_run(rnn_run, rnn, tmp_path, call):
    done, folder = rnn_run
    last = {name: float(value) for name, value in read_rows(folder)[-1].items()}
    points = {(tag, step): value for tag, step, value in read_points(folder)}
    for tag, name in utils.TENSORBOARD_TAGS.items():
        assert points[tag, EPOCHS] == float(np.float32(last[name]))
    assert f"test accuracy {last['test_accuracy']:.2f} % after epoch {EPOCHS}" in done.stdout
    assert call(visualize, folder, folder, "--figures", "results", "--output-dir", tmp_path)[0] == 0
    (row,) = read_table(tmp_path / "results.csv")
    assert (row["mean"], row["seeds"]) == (f"{last['test_accuracy']:.2f}", "1")
    torch.set_num_threads(rnn.run.record.conditions.threads)
    again = utils.evaluate(rnn.run.model, rnn.run.data.test)
    assert again == pytest.approx((last["test_loss"], last["test_accuracy"]), abs=1e-12)


# A convolutional network


def ink_at(axes, path, column, row):
    """The gray value, 0 to 1, that the saved PNG shows at an image's data coordinates."""
    figure, picture = axes.figure, imread(path)
    x, y = axes.transData.transform((column, row)) * 160 / figure.dpi  # figure pixels to saved pixels
    return picture[picture.shape[0] - 1 - int(y), int(x), :3].mean()


def test_filters_show_the_weights_in_gray_on_symmetric_scales(cnn):
    panels = cnn.made["filters.png"].axes[:3]
    trained = utils.load_tensors(cnn.run.folder / "checkpoint.pt")["state"]["model"]["layers.conv1.weight"][:, 0]
    start = utils.load_tensors(cnn.run.folder / "snapshots" / "epoch_00.pt")["layers.conv1.weight"][:, 0]
    limit = max(trained.abs().max(), start.abs().max()).item()
    limits = [limit, limit, (trained - start).abs().max().item()]
    assert [axes.get_title() for axes in panels] == ["at the start", "trained", "the change, on its own scale"]
    for axes, kernels, limit in zip(panels, (start, trained, trained - start), limits, strict=True):
        assert axes.images[0].get_clim() == pytest.approx((-limit, limit))
        assert [text.get_text() for text in axes.texts] == [str(number) for number in range(32)]
        for number, kernel in enumerate(kernels):
            top, left = number // 4 * 8 + 3, number % 4 * 6 + 1
            assert np.array_equal(axes.images[0].get_array()[top : top + 5, left : left + 5], kernel.numpy())
            if number % 9 == 0:
                row, column = number % 5, number % 3
                expected = colormaps["gray"](float(0.5 + kernel[row, column] / (2 * limit)))[0]
                shown = ink_at(axes, cnn.folder / "filters.png", left + column, top + row)
                assert shown == pytest.approx(expected, abs=0.02)


def test_activation_statistics_agree_with_the_definition():
    torch.manual_seed(0)
    model, images = cnn_cifar10.LeNet5(cnn_cifar10.Config()), torch.randint(256, (30, 32, 32), dtype=torch.uint8)
    statistics = visualize.activation_statistics(model, images, batch_size=7)
    with torch.no_grad():
        maps = F.relu(model.outputs(images)["conv2"]).double()
    expected = {
        "image_mean": maps.mean((1, 2, 3)),
        "mean": maps.mean((0, 2, 3)),
        "std": maps.std((0, 2, 3), correction=0),
        "std_across_images": maps.mean((2, 3)).std(0, correction=0),
        "zeros": 100 * (maps == 0).double().mean((0, 2, 3)),
    }
    for name, value in expected.items():
        np.testing.assert_allclose(statistics["conv2"][name], value, rtol=1e-4, err_msg=name)


def test_activations_table_has_a_row_for_each_map_and_layer(cnn):
    rows = read_table(cnn.folder / "activations.csv")
    assert [row["feature_map"] for row in rows if row["layer"] == "conv1"] == ["all", *map(str, range(32))]
    assert len(rows) == 33 + 65
    with torch.no_grad():
        maps = F.relu(cnn.run.model.outputs(cnn.run.data.test.images)["conv1"]).double()
    assert float(rows[0]["mean"]) == pytest.approx(maps.mean().item(), abs=1e-5)
    assert float(rows[0]["std"]) == pytest.approx(maps.std().item(), abs=1e-4)
    assert float(rows[0]["zeros_percent"]) == pytest.approx(100 * (maps == 0).double().mean().item(), abs=1e-3)
    assert float(rows[8]["mean"]) == pytest.approx(maps[:, 7].mean().item(), abs=1e-5)
    assert float(rows[8]["std"]) == pytest.approx(maps[:, 7].std().item(), abs=1e-4)


def test_activations_draw_the_mean_where_they_say_mean(cnn):
    statistics = visualize.activation_statistics(cnn.run.model, cnn.run.data.test.images)
    panels = iter(cnn.made["activations.png"].axes)
    for values in statistics.values():
        across, by_map, zeros = next(panels), next(panels), next(panels)
        order = values["mean"].argsort()[::-1]
        mean, std = values["image_mean"].mean(), values["image_mean"].std()
        assert list(across.lines[0].get_xdata()) == pytest.approx([mean, mean])
        assert sum(bar.get_height() for bar in across.patches[:50]) == 100, "each image counts once"
        assert across.get_legend_handles_labels()[1] == [f"mean {mean:.3f}", f"± std {std:.3f}"]
        (bars,), (lines,) = by_map.containers, by_map.collections
        assert (bars.get_label(), lines.get_label()) == ("mean", "+ std")
        assert [bar.get_height() for bar in bars] == pytest.approx(values["mean"][order])
        ends = np.array([segment[:, 1] for segment in lines.get_segments()])
        np.testing.assert_allclose(ends[:, 0], values["mean"][order])
        np.testing.assert_allclose(ends[:, 1], (values["mean"] + values["std"])[order])
        assert [bar.get_height() for bar in zeros.patches] == pytest.approx(values["zeros"][order])
        assert list(zeros.lines[0].get_ydata()) == pytest.approx([values["zeros"].mean()] * 2)


def test_layers_draw_the_accuracy_of_each_linear_classifier_beside_the_networks_own(cnn):
    rows, (axes,) = read_table(cnn.folder / "layers.csv"), cnn.made["layers.png"].axes
    own, *lines = axes.lines
    last = float(read_rows(cnn.run.folder)[-1]["test_accuracy"])
    assert (own.get_label(), *own.get_ydata()) == ("the network's own answer", last, last)
    assert [line.get_label() for line in lines] == ["trained network", "untrained network"]
    for line, state in zip(lines, ("trained", "untrained"), strict=True):
        assert list(line.get_xdata()) == ["pixels", "pool1", "pool2", "fc1"]
        accuracies = [float(row["accuracy"]) for row in rows if row["network"] == state]
        assert list(line.get_ydata()) == pytest.approx(accuracies)
    said = [text.get_text() for text in axes.texts]
    assert said == [f"{value:.1f}" for line in lines for value in line.get_ydata()]


def test_deconv_draws_the_maps_that_look_inside_beside_their_patches(cnn):
    run, (axes,) = cnn.run, cnn.made["deconv_conv2.png"].axes
    images = run.data.test.images
    exciting = visualize.most_exciting(run.model, images)["conv2"]
    maps = visualize.inside_first(run.model, "conv2", exciting, 32, 16)
    assert [text.get_text() for text in axes.texts] == [f"map {number}" for number in maps]
    assert "left: reconstructions" in axes.get_xlabel()
    assert "right: the patches" in axes.get_xlabel()
    reconstructions, patches = visualize.exciting_patches(run.model, "conv2", images, exciting, maps[:1])
    size, block = 14, 3 * (14 + 1) + 1
    top, left = 4 + block // 6 + 1, 4 + 1
    mosaic = axes.images[0].get_array()
    shown = mosaic[top : top + size, left + block : left + block + size]
    np.testing.assert_array_equal(shown.filled(np.nan), patches[0, 0] / 255)
    shown = np.ma.filled(mosaic[top : top + size, left : left + size], np.nan)
    expected = 0.5 + 0.5 * visualize.scaled(reconstructions, quantile=0.995)[0, 0]
    np.testing.assert_allclose(shown, expected, atol=1e-6)


def test_evolution_names_epochs_maps_and_activations(cnn):
    """Of the maps that deconv draws, half of them in each panel."""
    run, panels = cnn.run, cnn.made["evolution.png"].axes
    models, images = [run.snapshot(epoch) for epoch in range(EPOCHS + 1)], run.data.test.images
    peaks = [visualize.activations_of(model, images)["conv2"].amax((0, 2, 3)) for model in models]
    drawn = [text.get_text() for text in cnn.made["deconv_conv2.png"].axes[0].texts]
    for axes, maps in zip(panels, (drawn[:8], drawn[8:]), strict=True):
        assert axes.get_title() == "conv2; above each: the activation"
        assert [text.get_text() for text in axes.get_xticklabels()] == [str(epoch) for epoch in range(EPOCHS + 1)]
        chosen = [int(text.get_text().removeprefix("map ")) for text in axes.get_yticklabels()]
        assert maps == [f"map {number}" for number in chosen]
        shown = [text.get_text() for text in axes.texts]
        assert [f"{peak[number]:.2g}" for number in chosen for peak in peaks] == shown


def test_invariance_draws_distances_and_accuracy_of_transformed_images(cnn):
    run = cnn.run
    grid = np.reshape(visualize.invariance(run, count=6).axes, (3, 4))
    images, labels = first_images(run.data.test, 6)
    for row, (kind, amounts) in zip(grid, visualize.TRANSFORMATIONS.items(), strict=True):
        assert {axes.get_xlabel() for axes in row} == {kind}
        first, last, right = visualize.sensitivity(run.model, images, labels, kind)
        for axes, values in ((row[1], first), (row[2], last)):
            (line,) = axes.lines
            assert list(line.get_xdata()) == amounts.tolist()
            assert list(line.get_ydata()) == pytest.approx(values.quantile(0.5, dim=1).tolist())
            band = axes.collections[0].get_paths()[0].vertices[:, 1]
            low, high = (values.quantile(share, dim=1) for share in (0.1, 0.9))
            assert (band.min(), band.max()) == pytest.approx((low.min().item(), high.max().item()), abs=1e-6)
        assert list(row[3].lines[0].get_ydata()) == pytest.approx((100 * right.mean(1)).tolist())
    assert {row[3].get_ylabel() for row in grid} == {"accuracy in %"}


def test_occlusion_draws_what_the_square_does(cnn):
    run, panels = cnn.run, cnn.made["occlusion.png"].axes
    classes, right = run.data.classes, run.probabilities.argmax(1) == run.data.test.labels
    number = (right & (run.data.test.labels == 0)).nonzero()[0, 0]
    image = run.data.test.images[number][None]
    found = visualize.occlude(run.model, image, 0, 8)
    assert panels[0].get_ylabel() == classes[0]
    assert (panels[0].images[0].get_array() == 127.5).sum() == 64
    assert panels[1].get_xlabel() == f"conv2, map {found.feature_map}"
    for axes, expected in zip(panels[2:5], (found.activity, found.probability, found.predicted), strict=True):
        torch.testing.assert_close(torch.tensor(axes.images[0].get_array().data), expected)
    heads = "image, with the square", "reconstruction", "the map's activity", "p(true class)", "most probable class"
    assert tuple(axes.get_title() for axes in panels[:5]) == heads
    named = [text.get_text() for text in panels[4].get_legend().get_texts()]
    assert named == [classes[label] for label in sorted({*found.predicted.flatten().tolist()})]


def test_contribution_lists_the_strongest_maps_of_all_layers_by_class(cnn):
    first, second, heat, _ = cnn.made["contribution.png"].axes
    bars, run = {}, cnn.run
    (images, labels), intact = run.data.test, (run.probabilities.argmax(1) == run.data.test.labels).sum().item()
    for axes, layer in ((first, "conv1"), (second, "conv2")):
        predicted = visualize.predict_without_maps(run.model, images, layer)
        bars |= {f"{layer}, map {n}": intact - (each == labels).sum().item() for n, each in enumerate(predicted)}
        heights = [bar.get_height() for bar in axes.patches]
        assert heights == sorted((lost for name, lost in bars.items() if layer in name), reverse=True)
        strongest = max((lost, name) for name, lost in bars.items() if layer in name)[1]
        number = int(strongest.split()[-1])
        assert heights[0] == intact - (without_map(run.model, layer, images, number) == labels).sum().item() > 0
        assert axes.get_title() == f"one feature map of {layer}"
    rows = [label.get_text() for label in heat.get_yticklabels()]
    assert [label.get_text() for label in heat.get_xticklabels()] == [*run.data.classes, "all"]
    lost = heat.images[0].get_array()
    assert lost.shape == (10, 11)
    assert [bars[row] for row in rows] == pytest.approx(lost[:, -1].tolist())
    assert [bars[row] for row in rows] == pytest.approx(sorted(bars.values(), reverse=True)[:10])
    shares = torch.bincount(labels).double() / 100
    assert (torch.tensor(lost[:, :-1].data) @ shares).tolist() == pytest.approx(lost[:, -1].tolist())
    assert [text.get_text() for text in heat.texts] == [f"{value:.1f}" for value in lost.flat]


@PRECISIONS
def test_contribution_compares_answers_of_one_arithmetic(few_pictures, precision, other):
    """A map that is silent anyway is worth nothing."""
    model, otherwise = hesitant_networks(precision, other)
    probabilities = utils.predict(model, few_pictures.test.images).softmax(1)
    answers = [utils.predict(each, few_pictures.test.images).argmax(1) for each in (model, otherwise)]
    assert not torch.equal(*answers)
    run = SimpleNamespace(model=model, data=few_pictures, probabilities=probabilities, title="")
    heat = visualize.contribution(run, strongest=96).axes[2]
    names, lost = [text.get_text() for text in heat.get_yticklabels()], heat.images[0].get_array()[:, -1]
    assert sorted(names)[:32] == sorted(f"conv1, map {number}" for number in range(32))
    assert lost[names.index("conv1, map 5")] == 0


def test_gabor_draws_the_best_fits_and_the_r2_of_all(cnn):
    rows = read_table(cnn.folder / "gabor.csv")
    trained = sorted((row for row in rows if row["kernels"] == "trained"), key=lambda row: -float(row["r2"]))
    mosaic, shares = cnn.made["gabor.png"].axes
    fields = ("feature_map", "r2", "orientation_degrees", "cycles_per_pixel")
    best = [[float(row[name]) for name in fields] for row in trained[:8]]
    titles = [text.get_text() for text in mosaic.texts]
    assert titles == [f"{number:.0f}: {r2:.2f}\n{angle:.0f}°, {waves:.2f}" for number, r2, angle, waves in best]
    assert mosaic.get_xlabel() == "above each: map, R², orientation, cycles a pixel"
    assert [label.get_text() for label in mosaic.get_yticklabels()] == ["kernel", "fit", "residual"]
    kernel, fit, residual = (mosaic.images[0].get_array()[3 + 8 * row : 8 + 8 * row, 1:6] for row in range(3))
    number = int(trained[0]["feature_map"])
    np.testing.assert_array_equal(kernel, visualize.first_kernels(cnn.run.model)[number])
    np.testing.assert_allclose(residual, kernel - fit, atol=1e-6)
    for line, name in zip(shares.lines, ("trained", "shuffled", "untrained"), strict=True):
        values = sorted(float(row["r2"]) for row in rows if row["kernels"] == name)
        assert line.get_xdata()[1:].tolist() == pytest.approx(values, rel=1e-5)
        assert line.get_label() == f"{name}: median {np.median(values):.2f}"


# Networks of another shape


@pytest.fixture
def draw_trained(few_pictures, tmp_path, monkeypatch):
    """Train a CNN for an epoch on 64 pictures and draw figures of it, those named or all.

    What makes figures slow is done less often here, and the pictures are not written.
    """

    def work(config, *names):
        monkeypatch.setattr(visualize, "TRANSFORMATIONS", FEWER_AMOUNTS)
        monkeypatch.setattr(visualize, "first_right_of_each_class", lambda run: torch.tensor([3]))
        monkeypatch.setattr(visualize, "GABOR_STARTS", 1)
        monkeypatch.setattr(visualize, "layer_features", few_features)
        monkeypatch.setattr(visualize, "picture_bytes", lambda figure: b"")
        folder = train_here(cnn_cifar10, tmp_path / "runs", few_pictures, config, epochs=1)
        made = draw(folder, few_pictures, tmp_path, *(["--figures", *names] if names else [])).made
        for name, figure in made.items():
            assert not isinstance(figure, Figure) or untold(name, figure) == []
        return made

    return work


def test_the_figures_of_a_network_with_three_convolutions_look_into_all_of_them(draw_trained, monkeypatch):
    monkeypatch.setattr(cnn_cifar10, "LeNet5", DeepLeNet5)
    names = "filters activations deconv evolution occlusion contribution invariance"
    made = draw_trained(cnn_cifar10.Config(), *names.split())
    assert {"deconv_conv2.png", "deconv_conv3.png"} == {name for name in made if name.startswith("deconv")}
    titles = [axes.get_title().split(";")[0] for axes in made["evolution.png"].axes]
    assert titles == ["conv2", "conv2", "conv3", "conv3"]
    assert [axes.get_title() for axes in made["activations.png"].axes[::3]] == [
        f"conv{number}: across images" for number in (1, 2, 3)
    ]
    assert {row["layer"] for row in made["activations.csv"].rows} == {"conv1", "conv2", "conv3"}
    bars = [len(axes.patches) for axes in made["contribution.png"].axes[:3]]
    assert bars == [32, 64, 24]
    assert made["occlusion.png"].axes[1].get_xlabel().startswith("conv3, map ")


@pytest.mark.parametrize("without", ["conv1", "conv2", "fc1"])
def test_a_network_without_a_layer_has_every_figure_of_what_is_left(draw_trained, without):
    made = draw_trained(cnn_cifar10.Config(without=without))
    pictures = "curves confusion examples filters activations layers evolution invariance occlusion contribution gabor"
    expected = {*pictures.split(), "deconv_conv1" if without == "conv2" else "deconv_conv2"}
    assert {name.removesuffix(".png") for name in made if name.endswith(".png")} == expected
    left = "conv2" if without == "conv1" else "conv1"
    assert made["occlusion.png"].axes[1].get_xlabel().startswith("conv2" if without != "conv2" else "conv1")
    assert made["contribution.png"].axes[0].get_title() == f"one feature map of {left}"
    layers = ["pixels", "pool1", "pool2", *(["fc1"] if without != "fc1" else [])]
    assert [row["layer"] for row in made["layers.csv"].rows] == 2 * layers


def test_a_network_without_convolutions_has_the_figures_that_need_none(draw_trained, tmp_path):
    config = cnn_cifar10.Config(without="conv1+conv2")
    made = draw_trained(config)
    assert made.keys() >= {"curves.png", "confusion.png", "examples.png"}
    assert visualize.compare_gabor(visualize.group_runs(visualize.find_runs(tmp_path / "runs"))) is None


# Inside the recurrent networks


def test_the_gradients_table_holds_every_epoch_of_which_a_snapshot_exists(rnn, copied_run):
    rows = read_table(rnn.folder / "gradients.csv")
    expected = [(epoch, "hidden", step) for epoch in range(EPOCHS + 1) for step in range(1, 29)]
    assert [(int(row["epoch"]), row["state"], int(row["step"])) for row in rows] == expected
    assert float(rows[0]["norm"]) < 1e-4 * float(rows[27]["norm"]), "vanishing at initialisation"
    models = rnn.run.untrained_model(), rnn.run.snapshot(1), rnn.run.model
    for epoch, model in enumerate(models):
        norms = visualize.gradient_norms(model, *first_images(rnn.run.data.test, 1000))["hidden"]
        shown = [float(row["norm"]) for row in rows[28 * epoch : 28 * epoch + 28]]
        assert shown == pytest.approx(norms.tolist(), rel=1e-5)
    (copied_run / "snapshots" / "epoch_01.pt").unlink()
    left = visualize.measure_gradients(SavedRun(copied_run), images=20).rows
    assert {row["epoch"] for row in left} == {0, EPOCHS}


def test_gradients_draw_the_first_and_the_last_epoch_of_the_table(rnn):
    rows, (axes, reach) = rnn.made["gradients.csv"].rows, rnn.made["gradients.png"].axes
    lines = {line.get_label(): line for line in axes.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["untrained", f"after {EPOCHS} epochs"]
    for line, epoch in zip(lines.values(), (0, EPOCHS), strict=True):
        assert list(line.get_ydata()) == [row["norm"] for row in rows if row["epoch"] == epoch]
    norms = [[row["norm"] for row in rows if row["epoch"] == epoch] for epoch in range(EPOCHS + 1)]
    assert list(reach.lines[0].get_xdata()) == list(range(EPOCHS + 1))
    assert list(reach.lines[0].get_ydata()) == pytest.approx([each[0] / each[-1] for each in norms])


def test_a_gradient_that_vanished_altogether_stands_at_the_bottom_of_the_axis():
    axes = Figure().subplots()
    visualize.draw_gradient_line(axes, [0.0, 1e-30, 1e-3, 1.0], color="#123456", label="all")
    line, gone = axes.lines
    assert list(line.get_xdata()) == [1, 2, 3, 4], "none is dropped"
    bottom = visualize.GRADIENT_FLOOR
    assert list(line.get_ydata()) == [bottom, bottom, 1e-3, 1.0]
    assert (gone.get_marker(), gone.get_linestyle(), gone.get_color()) == ("v", "None", "#123456")
    assert (list(gone.get_xdata()), list(gone.get_ydata())) == ([1, 2], [bottom, bottom])
    assert axes.get_yscale() == "log"
    assert axes.get_ylim()[0] == bottom / 2, "the triangles are seen whole"


def test_gradients_draw_the_cell_state_by_itself_without_its_last_step(rnn, monkeypatch):
    """Nothing reads the LSTM's last cell state: that its gradient is zero says nothing."""
    hidden, cell = [1e-3] * 27 + [1.0], [0.0] * 3 + [1e-2] * 24 + [0.0]
    rows = [row for epoch in (0, EPOCHS) for row in gradient_rows(hidden, epoch) + gradient_rows(cell, epoch, "cell")]
    monkeypatch.setattr(visualize, "measure_gradients", lambda run: visualize.Table(visualize.GRADIENTS, rows))
    first, second, reach = visualize.gradients(rnn.run)["gradients.png"].axes
    assert [axes.get_title() for axes in (first, second)] == ["hidden state", "cell state"]
    assert list(first.lines[0].get_ydata()) == hidden
    assert list(second.lines[0].get_ydata()) == [visualize.GRADIENT_FLOOR] * 3 + [1e-2] * 24
    assert list(second.lines[1].get_xdata()) == [1, 2, 3]
    assert list(reach.lines[0].get_ydata()) == pytest.approx([1e-3, 1e-3])


def test_reading_draws_the_answers_row_by_row(rnn):
    run, panels = rnn.run, rnn.made["reading.png"].axes
    known, line = panels[-1].lines
    last = float(read_rows(run.folder)[-1]["test_accuracy"])
    assert list(line.get_xdata()) == list(range(1, 29))
    assert line.get_ydata()[-1] == pytest.approx(last)
    probabilities = visualize.probabilities_by_row(run.model, run.data.test.images)
    assert line.get_ydata()[9] == pytest.approx(
        100 * (probabilities[:, 9].argmax(1) == run.data.test.labels).double().mean().item()
    )
    assert list(known.get_xdata()) == list(range(1, 29))
    with torch.no_grad():
        features = [run.model.recurrent(run.model.rows(split.images[:, :10]))[1] for split in run.data[3:]]
    fitted, tested = (each.transpose(0, 1).flatten(1) for each in features)
    expected = visualize.readable(fitted, run.data.train.labels, tested, run.data.test.labels, 10)
    assert known.get_ydata()[9] == pytest.approx(expected, abs=0.5)
    number = ((run.probabilities.argmax(1) == 0) & (run.data.test.labels == 0)).nonzero()[0, 0]
    (picture, heat), shown = panels[0:6:5], run.data.test.images[number].float()
    assert picture.get_title() == "a 0"
    np.testing.assert_allclose(picture.images[0].get_array() * 0.3081 + 0.1307, shown / 255, atol=1e-5)
    np.testing.assert_allclose(heat.images[0].get_array(), probabilities[number], atol=1e-6)
