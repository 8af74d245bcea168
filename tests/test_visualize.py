"""visualize.py on one run: what its figures and tables show, which figures a run has, and what a user can get wrong."""

import json
import os
import re
import shlex
import shutil
import sys
from dataclasses import asdict
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from visualize import SavedRun

import matplotlib
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CONFIGS, assert_refused, nothing_left_behind, read_files, small, train_here
from matplotlib.image import imread
from matplotlib.text import Text

ANY = ("curves", "confusion")
CONVOLUTIONAL = (*ANY, "filters", "activations", "layers", "deconv", "evolution", "invariance", "occlusion", "gabor")
RECURRENT = (*ANY, "gradients", "reading")
LSTM = rnn_mnist.Config(cell="lstm", hidden_size=12, lr=1e-2)


@pytest.fixture(autouse=True, scope="module")
def _style():
    """Draw as the script does, what makes figures slow less often, and in one thread; leave all as it was."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with matplotlib.rc_context(visualize.STYLE), pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "GABOR_STARTS", 1)
        patch.setattr(visualize, "RIDGE_IMAGES", 200)
        patch.setitem(visualize.STYLE, "savefig.dpi", 40)
        for kind, amounts in zip(visualize.TRANSFORMATIONS, ([-3, 0, 8], [1.0, 1.5], [0, 90]), strict=True):
            patch.setitem(visualize.TRANSFORMATIONS, kind, torch.tensor(amounts))
        yield
    torch.set_num_threads(threads)


def draw(folder, data, output_dir, *flags):
    """Call visualize.py on a run with other data; return the run, what was made by file name, and the folder of it."""
    made, save, before = {}, visualize.save, read_files(folder)

    def keep(name, figures, output_dir):
        made.update(figures if isinstance(figures, dict) else {f"{name}.png": figures})
        save(name, figures, output_dir)

    with pytest.MonkeyPatch.context() as patch, nothing_left_behind():
        patch.setattr(utils, "embedded_patterns", lambda size: data[3:])
        patch.setattr(visualize, "save", keep)
        patch.setattr(sys, "argv", ["visualize.py", str(folder), "--output-dir", str(output_dir), *flags])
        with pytest.raises(SystemExit, match="^0$"):
            visualize.main()
    assert read_files(folder) == before
    run = SavedRun(folder)
    run.data = data
    return SimpleNamespace(run=run, made=made, folder=output_dir)


@pytest.fixture(scope="module")
def cnn(pictures, tmp_path_factory):
    """All figures of a CNN run; the square hides parts of one image alone."""
    data, folder, first = small(pictures, 320, 60), tmp_path_factory.mktemp("cnn"), visualize.first_right_of_each_class
    run = train_here(cnn_cifar10, folder / "runs", data, cnn_cifar10.Config(lr=1e-3), epochs=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize, "first_right_of_each_class", lambda run: first(run)[:1])
        return draw(run, data, folder / "figures")


@pytest.fixture(scope="module")
def rnn(tiny_digits, tmp_path_factory):
    """All figures of a recurrent run."""
    folder = tmp_path_factory.mktemp("rnn")
    run = train_here(rnn_mnist, folder / "runs", tiny_digits, LSTM, epochs=2)
    return draw(run, tiny_digits, folder / "figures")


@pytest.fixture
def copied(rnn, tmp_path, monkeypatch):
    monkeypatch.setattr(visualize, "picture_bytes", lambda drawn: b"")  # which takes longest
    return shutil.copytree(rnn.run.folder, tmp_path / "runs" / "copied")


def untold(figure):
    """Return the axes whose lines lack the name of an axis or, where there are several, a legend, also beside them."""
    drawn = []
    for axes in (axes for axes in figure.axes if axes.lines):
        columns, rows = (axes.get_shared_x_axes().get_siblings(axes), axes.get_shared_y_axes().get_siblings(axes))
        has_legend = any(each.get_legend() for each in rows) or len({line.get_color() for line in axes.lines}) < 2
        is_named = any(each.get_xlabel() for each in columns) and any(each.get_ylabel() for each in rows)
        drawn += [] if has_legend and is_named else [axes]
    return drawn


def texts(parts):
    return [part.get_text() for part in parts]


@pytest.mark.parametrize(
    ("kind", "title", "names"),
    [
        ("cnn", "LeNet-5 on CIFAR-10, Adam, learning rate 1e-3, seed 0, synthetic data", CONVOLUTIONAL),
        ("rnn", "LSTM, 12 hidden units, Adam, learning rate 0.01, seed 0, synthetic data", RECURRENT),
    ],
)
def test_every_fitting_figure_is_drawn_and_saved(request, kind, title, names):
    drawn = request.getfixturevalue(kind)
    pictures = {f"{name}.png".replace("deconv", "deconv_conv2") for name in names}
    tables = {"cnn": {"layers.csv", "gabor.csv"}, "rnn": {"gradients.csv", "reading.csv"}}[kind]
    assert {path.name for path in drawn.folder.iterdir()} == drawn.made.keys() == pictures | tables
    for name in pictures:
        picture = imread(drawn.folder / name)
        assert (picture.shape[1], picture[..., :3].std() > 0.05) == (8 * 40, True), "not blank"
        assert drawn.made[name].get_suptitle().endswith(f"\n{title}")
        assert untold(drawn.made[name]) == [], name


def test_curves_draw_the_metrics(rnn):
    for axes, name in zip(rnn.made["curves.png"].axes, ("accuracy", "loss"), strict=True):
        for line, part in zip(axes.lines, ("train", "test"), strict=True):
            assert line.get_label() == f"{part} images"
            expected = [(row["epoch"], row[f"{part}_{name}"]) for row in utils.read_history(rnn.run.folder)]
            assert [*zip(*line.get_data(), strict=True)] == expected


@pytest.mark.parametrize("kind", ["cnn", "rnn"])
def test_confusion_counts_the_test_images(request, kind):
    drawn = request.getfixturevalue(kind)
    run, (images, labels) = drawn.run, drawn.run.data.test
    probabilities = utils.predict(run.model, images).softmax(1)
    predicted, last = probabilities.argmax(1), run.history[-1]["test_accuracy"]
    assert f", {last:.2f} % of {len(labels)} test images right" in drawn.made["confusion.png"].get_suptitle()
    counts = [int(text) for text in texts(drawn.made["confusion.png"].axes[0].texts)]
    assert counts == [int(((labels == true) & (predicted == found)).sum()) for true in range(10) for found in range(10)]


def test_activations_draw_the_mean_where_they_say_mean(cnn):
    images, panels = cnn.run.data.test.images, iter(cnn.made["activations.png"].axes)
    for values in visualize.activation_statistics(cnn.run.model, images).values():
        across, by_map, at_zero = next(panels), next(panels), next(panels)
        mean, std, zeros, by_image = (values[name] for name in ("mean", "std", "zeros", "image_mean"))
        assert [*across.lines[0].get_xdata()] == [by_image.mean()] * 2
        assert sum(bar.get_height() for bar in across.patches[:50]) == len(images), "each image counts once"
        named = [f"mean {by_image.mean():.3f}", f"± std {by_image.std():.3f}"]
        assert texts(across.get_legend().get_texts()) == named
        (bars,), (lines,), order = by_map.containers, by_map.collections, mean.argsort()[::-1]
        assert (bars.get_label(), [bar.get_height() for bar in bars]) == ("mean", mean[order].tolist())
        ends = [segment[:, 1].tolist() for segment in lines.get_segments()]
        assert (lines.get_label(), ends) == ("+ std", np.stack([mean, mean + std], 1)[order].tolist())
        assert [bar.get_height() for bar in at_zero.patches] == zeros[order].tolist()


def test_layers_draw_and_list_the_accuracy_of_each_linear_classifier_trained_and_untrained(cnn):
    """On the first training images: 200 of them here."""
    (train, test), rows = cnn.run.data[3:], utils.read_table(cnn.folder / "layers.csv")
    models = {"trained": cnn.run.model, "untrained": cnn.run.untrained_model()}
    own, *lines = cnn.made["layers.png"].axes[0].lines
    assert (own.get_label(), {*own.get_ydata()}) == ("the network's own answer", {cnn.run.history[-1]["test_accuracy"]})
    for (state, model), line in zip(models.items(), lines, strict=True):
        fitted, tested = (visualize.layer_features(model, images) for images in (train.images[:200], test.images))
        expected = {
            layer: pytest.approx(visualize.readable(fitted[layer], train.labels[:200], tested[layer], test.labels, 10))
            for layer in ("pixels", "pool1", "pool2", "fc1")
        }
        assert line.get_label() == f"{state} network"
        assert dict(zip(*line.get_data(), strict=True)) == expected
        assert {row["layer"]: float(row["accuracy"]) for row in rows if row["network"] == state} == expected


def test_deconv_draws_the_maps_that_look_inside_beside_their_patches(cnn):
    run, (axes,), images = cnn.run, cnn.made["deconv_conv2.png"].axes, cnn.run.data.test.images
    exciting = visualize.most_exciting(run.model, images)["conv2"]
    maps = visualize.inside_first(run.model, "conv2", exciting, 32, 16)
    assert texts(axes.texts) == [f"map {number}" for number in maps]
    reconstructions, patches = visualize.exciting_patches(run.model, "conv2", images, exciting, maps[:1])
    size, block = 14, 3 * (14 + 1) + 1
    top, left, mosaic = 4 + block // 6 + 1, 4 + 1, np.ma.filled(axes.images[0].get_array(), np.nan)
    shown = mosaic[top : top + size, left + block : left + block + size]
    np.testing.assert_array_equal(shown, patches[0, 0] / 255)
    expected = 0.5 + 0.5 * (reconstructions[0, 0] / np.nanquantile(reconstructions.abs(), 0.995)).clamp(-1, 1)
    np.testing.assert_allclose(mosaic[top : top + size, left : left + size], expected, atol=1e-5)


def test_evolution_names_epochs_maps_and_activations(cnn):
    """Of maps that deconv draws, a column each; of the weights that stood after each epoch, a row each."""
    run, drawn = cnn.run, texts(cnn.made["deconv_conv2.png"].axes[0].texts)
    models = run.untrained_model(), run.snapshot(1), run.model
    peaks = [visualize.activations_of(model, run.data.test.images)["conv2"].amax((0, 2, 3)) for model in models]
    (axes,) = cnn.made["evolution.png"].axes
    maps = texts(axes.get_xticklabels())
    assert len({*maps} & {*drawn}) == 8
    assert texts(axes.get_yticklabels()) == ["0", "1", "2"]
    chosen = [int(name.removeprefix("map ")) for name in maps]
    assert texts(axes.texts) == [f"{peak[number]:.2g}" for peak in peaks for number in chosen]


def test_occlusion_draws_what_the_square_does_to_an_image_that_is_classified_right(cnn):
    run, panels, (images, labels) = cnn.run, cnn.made["occlusion.png"].axes, cnn.run.data.test
    of_class = (labels == 0).nonzero()[:, 0]
    number = next((each for each in of_class if run.probabilities[each].argmax() == 0), of_class[0])
    probability, predicted, activity, feature_map = visualize.occlude(run.model, images[number][None], 0, 8)
    assert (panels[0].get_ylabel(), panels[1].get_xlabel()) == ("pattern 0", f"conv2, map {feature_map}")
    hidden = images[number].float()
    hidden[12:20, 12:20] = 127.5
    reconstruction = visualize.deconvolve(run.model, images[number][None], "conv2", torch.tensor([feature_map]))[0, 0]
    heads = "image, with the square", "reconstruction", "the map's activity", "p(true class)", "most probable class"
    shown = hidden, reconstruction, activity, probability, predicted
    for axes, head, expected in zip(panels, heads, shown, strict=False):
        assert axes.get_title() == head
        np.testing.assert_allclose(axes.images[0].get_array(), expected, rtol=1e-5, atol=1e-6)
    assert texts(panels[4].get_legend().get_texts()) == [f"pattern {label}" for label in predicted.unique()]


def test_gabor_draws_the_best_fits_and_lists_all_with_how_far_the_kernels_moved(cnn):
    trained, start = (visualize.first_kernels(model) for model in (cnn.run.model, cnn.run.untrained_model()))
    fits, rows = visualize.gabor_fits(trained, start), utils.read_table(cnn.folder / "gabor.csv")
    assert ",".join(rows[0]) == "kernels,feature_map,r2,orientation_degrees,cycles_per_pixel,cosine_to_start"
    assert [(row["kernels"], row["feature_map"]) for row in rows] == [
        (name, f"{n}") for name in fits for n in range(32)
    ]
    cosines = [F.cosine_similarity(kernels.flatten(1), start.flatten(1)) for kernels, _ in fits.values()]
    expected = [torch.stack([*fit[1:], cosine], 1) for (_, fit), cosine in zip(fits.values(), cosines, strict=True)]
    found = [[float(value) for value in [*row.values()][2:]] for row in rows]
    np.testing.assert_allclose(found, torch.cat(expected), rtol=1e-3, atol=1e-5)
    (mosaic, shares), fit = cnn.made["gabor.png"].axes, fits["trained"][1]
    best = sorted(range(32), key=lambda n: -fit.r2[n])[:8]
    titles = [f"{n}: {fit.r2[n]:.2f}\n{fit.orientation[n]:.0f}°, {fit.frequency[n]:.2f}" for n in best]
    assert texts(mosaic.texts) == titles
    shown = [mosaic.images[0].get_array()[3 + 8 * row : 8 + 8 * row, 1:6] for row in range(3)]
    kernel, fitted = trained[best[0]], fit.fitted[best[0]]
    np.testing.assert_allclose(shown, torch.stack([kernel, fitted, kernel - fitted]), rtol=1e-3, atol=1e-4)
    for line, (name, (_, each)) in zip(shares.lines, fits.items(), strict=True):
        np.testing.assert_allclose(line.get_xdata()[1:], each.r2.sort().values, rtol=1e-5)
        assert line.get_label() == f"{name}: median {np.median(each.r2):.2f}"


def test_gradients_list_and_draw_the_norms_after_every_epoch(rnn):
    run, (axes,) = rnn.run, rnn.made["gradients.png"].axes
    models = run.untrained_model(), run.snapshot(1), run.model
    norms = [visualize.gradient_norms(model, *run.data.test).tolist() for model in models]
    expected = [
        {"epoch": f"{epoch}", **{f"{step}": f"{norm:.7g}" for step, norm in enumerate(values, start=1)}}
        for epoch, values in enumerate(norms)
    ]
    assert utils.read_table(rnn.folder / "gradients.csv") == expected
    assert [line.get_ydata().tolist() for line in axes.lines] == norms
    assert texts(axes.get_legend().get_texts()) == ["untrained", "after epoch 2"]


def test_reading_draws_the_answers_and_what_the_state_knows_row_by_row(rnn):
    run, panels, (images, labels) = rnn.run, rnn.made["reading.png"].axes, rnn.run.data.test
    probabilities, (known, answered) = visualize.probabilities_by_row(run.model, images), panels[-1].lines
    right = (probabilities.argmax(2) == labels[:, None]).double().mean(0)
    assert [*answered.get_xdata()] == [*known.get_xdata()] == [*range(1, 29)]
    assert [*answered.get_ydata()] == pytest.approx((100 * right).tolist())
    expected = visualize.readable_by_row(run.model, *small(run.data, 200, 200)[3:], 10)
    assert [*known.get_ydata()] == pytest.approx(expected)
    table = [[float(cell) for cell in row.values()] for row in utils.read_table(rnn.folder / "reading.csv")]
    np.testing.assert_allclose(table, list(zip(range(1, 29), expected, 100 * right, strict=True)))
    of_class = (labels == 0).nonzero()[:, 0]
    number = next((each for each in of_class if probabilities[each, -1].argmax() == 0), of_class[0])
    picture, heat = panels[0], panels[5]
    assert picture.get_title() == "a pattern 0"
    np.testing.assert_allclose(picture.images[0].get_array() * 0.3081 + 0.1307, images[number] / 255, atol=1e-5)
    np.testing.assert_allclose(heat.images[0].get_array(), probabilities[number], atol=1e-6)


# Which figures a run has, and of which epoch


def invent(folder, config, **conditions):
    """Write a run that was never trained, without a checkpoint."""
    conditions = {"data_source": "real", "precision": "fp32", **conditions}
    folder.mkdir()
    record = {"script": config.script, "settings": asdict(config), "conditions": conditions}
    (folder / "config.json").write_text(json.dumps(record))
    (folder / "metrics.csv").write_text(utils.table_text(utils.METRICS, [(1, 2.0, 30.0, 1.0, 50.0, 9.0)]))
    return folder


@pytest.mark.parametrize(
    ("script", "settings", "names", "asked"),
    [
        ("cnn_cifar10", {}, CONVOLUTIONAL, "reading"),
        ("cnn_cifar10", {"without": "fc1"}, CONVOLUTIONAL, "gradients"),
        ("cnn_cifar10", {"without": "conv1"}, ANY, "filters"),
        ("cnn_cifar10", {"without": "conv1+conv2"}, ANY, "gabor"),
        ("rnn_mnist", {"cell": "gru"}, RECURRENT, "claims"),
    ],
)
def test_a_run_has_the_figures_that_fit_its_network(call, tmp_path, script, settings, names, asked):
    folder = invent(tmp_path / "run", CONFIGS[script](**settings))
    outcome = call(visualize, folder, "--figures", "curves", asked)
    assert_refused(outcome, f"{folder} has no figure {asked}; it has {', '.join(names)}\n")
    assert not (folder / "figures").exists(), "told before the first figure"


@pytest.mark.parametrize(("damaged", "epochs"), [("metrics.csv", "012"), ("snapshots/epoch_01.pt", "02")])
def test_gradients_are_of_the_checkpoint_and_of_the_snapshots_that_there_are(rnn, copied, tmp_path, damaged, epochs):
    """Also after a kill between the checkpoint and metrics.csv, which then lacks the last epoch."""
    lines = (copied / "metrics.csv").read_text().splitlines(keepends=True)
    (copied / damaged).unlink()
    (copied / "metrics.csv").write_text("".join(lines[:-1]))
    made = draw(copied, rnn.run.data, tmp_path / "figures", "--figures", "curves", "gradients").made
    header, *rows = rnn.made["gradients.csv"].splitlines(keepends=True)
    assert made["gradients.csv"] == header + "".join(row for row in rows if row[0] in epochs)
    assert texts(made["gradients.png"].axes[0].get_legend().get_texts()) == ["untrained", "after epoch 2"]
    assert [*made["curves.png"].axes[0].lines[0].get_xdata()] == [1, 2]


def test_figures_are_of_the_checkpoint_after_a_kill_before_it(rnn, copied, tmp_path):
    """Of a run of one epoch which has the second one's snapshot."""
    folder = train_here(rnn_mnist, tmp_path / "runs", rnn.run.data, LSTM, epochs=1)
    shutil.copy(copied / "snapshots" / "epoch_02.pt", folder / "snapshots")
    made = draw(folder, rnn.run.data, tmp_path / "figures").made
    rows = rnn.made["gradients.csv"].splitlines()
    assert made.pop("gradients.csv").splitlines() == [row for row in rows if row[0] != "2"]
    assert made.pop("reading.csv")
    shown = texts(text for figure in made.values() for text in figure.findobj(Text))
    assert "after epoch 1" in shown


# Command line


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "required: RUN"),
        ("runs --figures", "expected at least one argument"),
        ("runs --figures heatmap", "'heatmap'"),
        ("runs --ouput-dir there", "unrecognized arguments: --ouput-dir there"),
        ("nowhere", "{here}/nowhere is not a folder; name a run's folder, or a folder of runs"),
        ("empty", "{here}/empty holds no run that has finished an epoch"),
        ("file", "{here}/file is not a folder"),
        ("runs/copied --figures curves --output-dir file", "file"),
    ],
)
def test_an_unusable_command_line_is_told_in_one_line(call, copied, monkeypatch, flags, words):
    here = copied.parents[1]
    monkeypatch.chdir(here)
    (here / "file").write_text("mine")
    (here / "empty").mkdir()
    before = read_files(here)
    assert_refused(call(visualize, *shlex.split(flags)), words.format(here=here))
    assert read_files(here) == before


@pytest.mark.parametrize(
    ("script", "settings", "source"),
    [
        ("rnn_mnist", {"cell": "gru", "seed": 3}, "real"),
        ("rnn_mnist", {}, "synthetic"),
        ("cnn_cifar10", {"dataset": "mnist", "optimizer": "sgd", "lr": 0.02, "momentum": 0.9}, "synthetic"),
    ],
)
def test_a_run_without_what_a_figure_needs_names_the_command_that_trains_it(
    call, requested, tmp_path, script, settings, source
):
    config = CONFIGS[script](**settings)
    folder = invent(tmp_path / "run", config, data_source=source)
    assert call(visualize, folder, "--figures", "curves")[0] == 0
    outcome = call(visualize, folder, "--figures", "confusion")
    assert_refused(outcome, f"{folder} holds no checkpoint.pt")
    (folder / "metrics.csv").unlink()
    unfinished = call(visualize, folder)
    assert_refused(unfinished, f"{folder} has finished no epoch; train it with python {script}.py")
    for _, _, error in (outcome, unfinished):
        command = re.search(r"with python (.*?)(?: and name its folder)?\n", error)[1]
        assert ("--data synthetic" in command) == (source == "synthetic")
        assert requested(*[sys.modules[script], *shlex.split(command)[1:]]) == [config]


def test_data_are_sought_where_data_dir_says_and_never_downloaded(call, real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = rnn_mnist.Config(hidden_size=4, pixels="permuted")
    data = small(utils.load_data("mnist", "real", real_data, "permuted"), 320, 10_000)
    folder = train_here(rnn_mnist, tmp_path / "runs", data, config, epochs=1)
    assert torch.equal(SavedRun(folder, real_data).data.test.images, data.test.images)
    for flags, sought in (((), "data"), (("--data-dir", "elsewhere"), "elsewhere")):
        outcome = call(visualize, folder, "--figures", "confusion", *flags)
        assert_refused(outcome, f"MNIST: {sought}/MNIST/raw/train-images-idx3-ubyte is missing")
        assert not (tmp_path / sought).exists()
    assert call(visualize, folder, "--figures", "confusion", "--data-dir", real_data)[0] == 0
    assert os.listdir(folder / "figures") == ["confusion.png"]
