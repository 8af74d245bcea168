"""visualize.py on one run: what its figures and tables say, from which measurements, and its command line."""

import json
import os
import shutil
from types import SimpleNamespace
from unittest.mock import Mock

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from visualize import ACCENT_COLOR, AFTER_COLOR, BEFORE_COLOR, FIGURES, SavedRun, TopActivations, read_table

import matplotlib
import numpy as np
import pytest
import torch
from conftest import assert_refused, read_csv, read_files, restored_process, small, train_here, use_as_synthetic
from matplotlib.colors import to_hex

ANY_RUN = ["curves", "confusion"]
CNN = [*ANY_RUN, "filters", "activations", "layers", "deconv", "evolution", "invariance", "occlusion", "gabor"]
PLAIN_RNN = [*ANY_RUN, "gradients", "reading"]
GATED_RNN = [*PLAIN_RNN, "gates"]


@pytest.fixture(autouse=True)
def _fast_figures(monkeypatch):
    """Speed the figures up: fewer measurements, fewer pixels and no layout."""
    monkeypatch.setattr(visualize, "GABOR_STARTS", 1)
    monkeypatch.setattr(visualize, "RIDGE_IMAGES", 200)
    monkeypatch.setitem(visualize.STYLE, "savefig.dpi", 40)
    monkeypatch.setitem(visualize.STYLE, "figure.constrained_layout.use", False)
    for kind, amounts in zip(visualize.TRANSFORMATIONS, ([-3, 0, 8], [1.0, 1.5], [0, 90]), strict=True):
        monkeypatch.setitem(visualize.TRANSFORMATIONS, kind, torch.tensor(amounts))


BEFORE, AFTER, ACCENT, BLANK = map(to_hex, (BEFORE_COLOR, AFTER_COLOR, ACCENT_COLOR, "0.9"))


def color_of(artist):
    """Return the colour of a line, a patch or a collection as text, such as '#0072b2'."""
    color = artist.get_color() if hasattr(artist, "get_color") else artist.get_facecolor()
    return to_hex(color if isinstance(color, str) else np.ravel(color))


def rounded(values):
    return np.round(np.asarray(values, dtype=float), 3).tolist()


def ticks(axis):
    """Return the positions of the ticks of an axis by label."""
    labels = [label.get_text() for label in axis.get_ticklabels()]  # fewer than ticks where another axes shows them
    return dict(zip(labels, rounded(axis.get_ticklocs()), strict=False))


def image_values(image):
    """Return the different values of an image, without NaNs, in the order of their rows along the y axis."""
    array = np.ma.filled(image.get_array().astype(float), np.nan)
    _, _, bottom, top = image.get_extent()
    if (top > bottom) == (image.origin == "upper"):
        array = array[::-1]
    return list(dict.fromkeys(rounded(array[~np.isnan(array)])))


def describe(axes):
    """Return what an axes shows, a dict. lines: (colour, y) by label; texts: row by row; spans: (colour, left, right);
    bands: (colour, lowest y, highest y)."""
    bars = [bar for container in axes.containers for bar in container]
    rectangles = [patch for patch in axes.patches if hasattr(patch, "get_width")]
    spans = [rectangle for rectangle in rectangles if rectangle not in bars]
    texts = sorted(axes.texts, key=lambda text: text.get_position()[::-1])
    images = axes.images[:1]
    return {
        "title": axes.get_title(),
        "subtitle": axes.figure.get_suptitle(),
        "xlabel": axes.get_xlabel(),
        "ylabel": axes.get_ylabel(),
        "xticks": ticks(axes.xaxis),
        "yticks": ticks(axes.yaxis),
        "x": [rounded(line.get_xdata(orig=False)) for line in axes.lines],
        "lines": {line.get_label(): (color_of(line), rounded(line.get_ydata())) for line in axes.lines},
        "bands": [(color_of(band), *rounded(band.get_datalim(axes.transData).intervaly)) for band in axes.collections],
        "bars": rounded([bar.get_height() for bar in bars]),
        "spans": [(color_of(span), *rounded([span.get_x(), span.get_x() + span.get_width()])) for span in spans],
        "texts": [text.get_text() for text in texts],
        "values": [value for image in images for value in image_values(image)],
        "limits": [limit for image in images for limit in rounded(image.get_clim())],
    }


def check_legends(figure):
    """Check that the legends of a figure name each artist that has a label, with its colour."""
    entries = {}
    for legend in figure.findobj(matplotlib.legend.Legend):
        entries |= zip([text.get_text() for text in legend.texts], map(color_of, legend.legend_handles), strict=True)
    artists = {}
    for axes in figure.axes:
        handles, labels = axes.get_legend_handles_labels()
        artists |= zip(labels, map(color_of, handles), strict=True)
    assert entries == artists


def numbered(numbers):
    """Return a Split. Its images are filled with the numbers; its labels are their remainders modulo 3."""
    return utils.Split(numbers[:, None, None].expand(-1, 12, 12), numbers % 3)


TEST = numbered(torch.arange(1003))
TRAIN = numbered(-1 - torch.arange(300))
EPOCHS = {"untrained": 0, "epoch 1": 1, "epoch 3": 3, "trained": 4}  # by network; the networks are texts


def stand_in(config=None, **attributes):
    """Return a SavedRun with made-up attributes."""
    attributes = {
        "config": config or cnn_cifar10.Config(),
        "conditions": SimpleNamespace(data_source="real"),
        "model": "trained",
        "untrained_model": Mock(return_value="untrained"),
        "model_after": {epoch: network for network, epoch in EPOCHS.items()}.get,
        "history": [{"test_accuracy": accuracy} for accuracy in (40, 45, 42, 41)],
        "data": utils.Dataset("", ("cat", "dog", "owl"), TRAIN, TEST),
        **attributes,
    }
    run = SavedRun.__new__(SavedRun)
    vars(run).update(attributes)
    return run


class MadeUp:
    """For each figure, a method of its name that replaces functions of visualize by made-up, different measurements.

    It returns a run, the figure's title without that of the run, what the axes show, by number, in the words of
    describe, and the beginning of the table if there is one.
    """

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def replace(self, **results):
        for name, result in results.items():
            function = result if callable(result) else Mock(return_value=result)
            self.monkeypatch.setattr(visualize, name, function)

    def replace_probe(self, accuracies):
        """Replace linear_probe_accuracy. The first feature is the image; the last one selects the accuracy."""

        def linear_probe_accuracy(features, labels, test_features, test_labels, classes):
            assert torch.equal(features[:, 0].long(), TRAIN.images[:200, 0, 0])
            assert torch.equal(test_features[:, 0].long(), TEST.images[:, 0, 0])
            assert torch.equal(labels, TRAIN.labels[:200])
            assert (test_labels is TEST.labels, classes) == (True, 3)
            assert features[0, -1] == test_features[0, -1]
            return accuracies[int(features[0, -1])]

        self.replace(linear_probe_accuracy=linear_probe_accuracy)

    def replace_top_activations(self, active):
        """Replace top_activations. active: the most active ones of 20 maps in the trained network."""

        def top_activations(model, images, layer, count):
            assert (layer, images is TEST.images) == ("conv2", True)
            values = torch.zeros(count, 20)
            values[0, active] = float(model == "trained")
            values[1:] = 2 - values[0]  # only the highest activation counts
            return TopActivations(values, f"top of {model}", count, None)

        self.replace(top_activations=top_activations)

    def curves(self, overfits=True):
        rows = [(1, 1.5, 30, 1.4, 40), (2, 1.2, 50, 1.1, 45), (3, 0.9, 60, 1.3, 46), (4, 0.8, 65, 1.6, 42)]
        title = "Test accuracy is 42.00 % after epoch 4 (training: 65.00 %); overfitting after epoch 2"
        if not overfits:
            rows[-1] = (4, 1.3, 55, 1.6, 42)  # worse on the training images, too
            title = "Test accuracy is 42.00 % after epoch 4 (training: 55.00 %)"
        names = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
        history = [dict(zip(names, row, strict=True)) for row in rows]
        x, *losses_and_accuracies = map(list, zip(*rows, strict=True))
        axes = {0: {"ylabel": "accuracy in %"}, 1: {"ylabel": "mean cross-entropy per image"}}
        for number, (train, test) in {0: losses_and_accuracies[1::2], 1: losses_and_accuracies[::2]}.items():
            axes[number]["lines"] = {"training images": (BEFORE, train), "test images": (AFTER, test)}
            axes[number] |= {"x": [x, x], "xlabel": "epoch"}
        return stand_in(history=history), title, axes

    def confusion(self):
        predicted = torch.empty(len(TEST.labels), dtype=torch.long)
        for label, counts in enumerate([(310, 20, 5), (7, 250, 77), (24, 10, 300)]):
            predicted[label::3] = torch.arange(3).repeat_interleave(torch.tensor(counts))
        run = stand_in(model=lambda images: torch.eye(3)[predicted[images[:, 0, 0]]])
        title = "Test accuracy is 85.74 %; the most frequent error is dog predicted as owl (77 images)"
        counts = {"texts": ["310", "20", "5", "7", "250", "77", "24", "10", "300"], "values": [20, 5, 7, 77, 24, 10]}
        labels = {"xlabel": "predicted class", "ylabel": "true class and its accuracy"}
        labels["xticks"] = {"cat": 0, "dog": 1, "owl": 2}
        labels["yticks"] = {"cat: 92.5 %": 0, "dog: 74.9 %": 1, "owl: 89.8 %": 2}
        return run, title, {0: counts | labels}

    def filters(self):
        untrained = torch.tensor([[[0.3, 0.0], [0.0, 0.4]], [[0.5, 0.0], [0.0, 0.0]], [[0.2, 0.0], [0.0, 0.1]]])
        trained = torch.tensor([[[-0.6, 0.0], [0.0, -0.8]], [[0.42, 0.0], [0.0, 0.56]], [[0.2, 0.0], [0.0, 0.104]]])
        self.replace(first_kernels={"untrained": untrained, "trained": trained}.get)
        title = "Training changed the median kernel of the first layer by 113 % of its initial norm"
        shown = {"limits": [-1, 1], "texts": ["0", "1", "2"]}
        before = {"title": "untrained", "values": [0.75, 0, 1, 0.5]} | shown
        after = {"title": "trained", "values": [-0.75, 0, 0.75, 1, -1, 0.52]} | shown
        return stand_in(), title, {0: before, 1: after, 2: {"ylabel": "weight (one scale per kernel)"}}

    def activations(self):
        maps = {"conv1": [[0.5, 0.5], [0.2, -1]], "conv2": [[0.7, -1], [0, 0], [0.9, 0.5]]}
        model = SimpleNamespace(outputs=lambda x: {n: torch.tensor([m] * len(x))[:, :, None] for n, m in maps.items()})
        title = "Dead feature maps (over 99 % zero on the test images): 0 of 2 in conv1 and 1 of 3 in conv2"
        axes = {0: {"title": "conv1 after ReLU: mean", "bars": [0.5, 0.1], "xlabel": "feature maps, ranked by mean"}}
        axes[1] = {"title": "conv1 after ReLU: standard deviation", "bars": [0, 0.1]}
        axes[5] = {"title": "conv2 after ReLU: zeros in %", "bars": [0, 50, 100]}
        table = "epoch,layer,feature_map,mean,std,zeros_percent\n4,conv1,0,0.5,0,0\n4,conv1,1,0.1,0.1,50\n"
        return stand_in(model=model), title, axes, table

    def layers(self):
        def layer_features(model, images):
            numbers = images[:, 0, 0]
            network = torch.full_like(numbers, EPOCHS[model])
            return {"raw": torch.stack([numbers, network], 1), "conv1": torch.stack([numbers, network + 1], 1)}

        self.replace(layer_features=layer_features)
        self.replace_probe({0: 30, 1: 44, 4: 31, 5: 52})
        lines = {"trained network": (ACCENT, [41, 41]), "linear classifiers, trained network": (AFTER, [31, 52])}
        lines["linear classifiers, untrained network"] = (BEFORE, [30, 44])
        labels = {"xlabel": "input of the linear classifier", "ylabel": "test accuracy in %"}
        labels["xticks"] = {"raw": 0, "conv1": 1}
        table = "epoch,network,layer,accuracy\n4,trained,raw,31\n4,trained,conv1,52\n4,untrained,raw,30\n"
        title = "After training, linear classifiers reach 31 % on raw, 52 % on conv1"
        return stand_in(), title, {0: {"lines": lines, **labels}}, table

    def deconv(self, is_alike=True):
        maps = [1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17, 18]

        def top_patches(model, layer, images, top, feature_maps):
            assert (model, layer, images is TEST.images, feature_maps.tolist()) == ("trained", "conv2", True, maps)
            assert (top.images, top.rows) == ("top of trained", 9)
            signs = torch.where(feature_maps < 10, 1, -1)[:, None] if is_alike else torch.tensor([1, *[-1] * 8])
            reconstructions = signs.expand(16, 9)[:, :, None, None] * torch.tensor([[3.0, 0.0], [np.nan, -1.5]])
            return reconstructions, 2.55 * feature_maps[:, None, None, None].expand(-1, 9, 2, 2)

        self.replace(top_patches=top_patches)
        self.replace_top_activations(maps)
        title = "Reconstructions of conv2 are more alike within a map (mean cosine 1.00) than between maps (-0.07)"
        shown = {"texts": [f"map {number}" for number in maps], "limits": [0, 1]}
        shown["xlabel"] = (
            "left: reconstructions (gray: zero; one scale per map); right: patches (tinted: outside the image)"
        )
        if is_alike:
            shown["values"] = [1, 0.5, 0.01, 0.02, 0.03, 0.04, 0.25, 0.06, 0.07, 0.08, 0.09]  # from left to right
            shown["values"] += [0, 0.1, 0.12, 0.13, 0.14, 0.75, 0.15, 0.16, 0.17, 0.18]
        else:
            title = "Reconstructions of conv2 are no more alike within a map (mean cosine -1.00) than between maps"
            title += " (1.00)"
        return stand_in(), title, {0: shown}

    def evolution(self):
        maps = [1, 2, 3, 5, 8, 13, 17, 19]

        def top_patches(model, layer, images, top, feature_maps):
            assert (layer, images is TEST.images, feature_maps.tolist()) == ("conv2", True, maps)
            assert (top.images, top.rows) == (f"top of {model}", 1)
            pictures = torch.zeros(len(maps), 1, 3, 3)
            pictures[:, :, 0, 0] = -1.0 if model == "untrained" else 1.0
            pictures[:, 0, 1, 1] = EPOCHS[model] / 10 + feature_maps / 1000  # the middle tells epochs and maps apart
            return 7 * pictures, None

        self.replace(top_patches=top_patches)
        self.replace_top_activations(maps)
        title = "Reconstructions of conv2 have a mean cosine to the final ones of -0.92 before training and 0.96"
        values = []
        for epoch, corner in ((0, [-1, 0]), (0.1, [1]), (0.4, [])):  # those that have not been there before
            values += corner + [epoch + number / 1000 for number in maps]
        shown = {"values": rounded(values), "ylabel": "epoch (cosine to the last)"}
        shown["xticks"] = {f"map {number}": 3 + 5 * place for place, number in enumerate(maps)}
        shown["yticks"] = {"0 (-0.92)": 3, "1 (0.96)": 8, "4 (1.00)": 13}
        return stand_in(), f"{title} after epoch 1", {0: shown}

    def invariance(self):
        accuracies = {"vertical shift in pixels": [24, 74, 50], "scale": [60, 34], "rotation in degrees": [80, 12]}

        def transform(images, kind, amount):
            assert torch.equal(images, TEST.images[:500])
            return accuracies[kind][visualize.TRANSFORMATIONS[kind].tolist().index(amount)]

        def predict(model, accuracy):
            answers = (TEST.labels[:500] + (torch.arange(500) >= 5 * accuracy)) % 3
            return {"trained": torch.eye(3)[answers]}[model]

        self.replace(transform=transform, predict=predict)
        title = "Accuracy on 500 test images falls to as little as "
        axes = {}
        for number, (kind, values) in enumerate(accuracies.items()):
            x = [[-3, 0, 8], [1, 1.5], [0, 90]][number]
            axes[number] = {"x": [x], "lines": {"_child0": (AFTER, values)}, "xlabel": kind, "ylabel": "accuracy in %"}
        return stand_in(), f"{title}24 % (vertical shift), 34 % (scale), 12 % (rotation)", axes

    def occlusion(self):
        """Image 6 is recognised as a cat. Image 4, a dog, is mistaken for an owl."""
        of_cat = torch.tensor([[[0.7, 0.2, 0.1], [0.6, 0.3, 0.1]], [[0.15, 0.5, 0.35], [0.55, 0.4, 0.05]]])
        of_dog = torch.tensor([[[0.1, 0.8, 0.1], [0.2, 0.65, 0.15]], [[0.3, 0.25, 0.45], [0.58, 0.22, 0.2]]])

        def occlude(model, image, size):
            return {("trained", 6, 8): of_cat, ("trained", 4, 8): of_dog}[model, int(image[0, 0]), size]

        self.replace(occlude=occlude, first_correct_of_each_class=torch.tensor([6, 4, 2]))
        run = stand_in(probabilities=torch.eye(3)[[0, 1, 2, 0, 2, 2, 0]])
        title = "A gray 8 x 8 square changes the answer at 25 % (cat) and 75 % (dog) of its positions"
        axes = {
            0: {"title": "cat", "values": [6], "limits": [0, 255]},
            1: {"title": "probability of cat", "values": [0.7, 0.6, 0.15, 0.55], "limits": [0, 1]},
            2: {"title": "predicted class", "values": [0, 1], "limits": [-0.5, 9.5]},
            4: {"title": "probability of dog", "values": [0.8, 0.65, 0.25, 0.22], "limits": [0, 1]},
            5: {"title": "predicted class", "values": [1, 2, 0], "limits": [-0.5, 9.5]},
            7: {"yticks": {"cat": 0, "dog": 1, "owl": 2}},
        }
        return run, title, axes

    def gabor(self):
        trained = torch.tensor([[[0.5, 0.0]], [[0.9, 0.0]], [[0.7, 0.0]]])  # kernels of 1 x 2 pixels
        untrained = torch.tensor([[[0.2, 0.0]], [[-0.1, 0.0]], [[0.3, 0.4]]])

        def fit_gabor(kernels):
            r2 = kernels[:, 0, 0].abs()
            return 0.8 * kernels, r2, 100 * r2, r2 / 2

        self.replace(first_kernels={"trained": trained, "untrained": untrained}.get, fit_gabor=fit_gabor)
        title = (
            "The median R² of Gabor fits to the first kernels is 0.70 after training and 0.20 before (below: best fits)"
        )
        shown = {"texts": ["1: R² 0.90", "2: R² 0.70", "0: R² 0.50"], "limits": [-0.9, 0.9]}
        shown["values"] = [0.9, 0, 0.7, 0.5, 0.72, 0.56, 0.4, 0.18, 0.14, 0.1]
        shown["yticks"] = {"kernel": 2.5, "fit": 5.5, "residual": 8.5}
        table = "epoch,kernels,feature_map,r2,orientation_degrees,cycles_per_pixel,cosine_to_start\n"
        table += (
            "4,trained,0,0.5,50,0.25,1\n4,trained,1,0.9,90,0.45,-1\n4,trained,2,0.7,70,0.35,0.6\n4,untrained,0,0.2,"
        )
        return stand_in(), title, {0: shown}, table

    def gradients(self):
        def gradient_norms(model, images, labels):
            assert torch.equal(images, TEST.images[:1000])
            assert torch.equal(labels, TEST.labels[:1000])
            return torch.tensor([{0: 0.05, 1: 0.6, 3: 0.7, 4: 2.6}[EPOCHS[model]], 2, 3, 4, 10])

        self.replace(gradient_norms=gradient_norms)
        title = "Before training, the loss gradient at the first row is 0.005 times that at the last row, afterwards"
        shades = ["#000000", *(to_hex(shade) for shade in matplotlib.colormaps["viridis_r"]([0, 2 / 3, 1.0]))]
        norms = [[first, 2, 3, 4, 10] for first in (0.05, 0.6, 0.7, 2.6)]
        labels = ["before training", "_child3", "_child4", "_child5"]
        lines = dict(zip(labels, zip(shades, norms, strict=True), strict=True))
        shown = {"lines": lines, "x": [[1, 2, 3, 4, 5]] * 4, "spans": [(BLANK, 0.5, 1.5), (BLANK, 4.5, 5.5)]}
        shown |= {"xlabel": "rows read", "ylabel": "norm of the loss gradient"}
        run = stand_in(rnn_mnist.Config(rows_before=1, rows_after=1))
        table = "epoch,1,2,3,4,5\n0,0.05,2,3,4,10\n1,0.6,2,3,4,10\n3,0.7,2,3,4,10\n4,2.6,"
        return run, f"{title} 0.26 times", {0: shown, 1: {"ylabel": "epoch"}}, table

    def reading(self):
        """The network recognises the first 100 images after one row, the first 331 after two, and so on."""
        model = SimpleNamespace(rows=lambda images: 10 * images[:, :1, :1] + torch.arange(8).view(4, 2))

        def probabilities_by_row(model, images):
            numbers = images[:, :1, 0]
            answers = (numbers + (numbers >= torch.tensor([100, 331, 700, 1003]))) % 3
            others = torch.arange(1, 5)[:, None] / 10 + torch.arange(3) / 100  # tells rows and classes apart
            return torch.eye(3)[answers] / 2 + others + numbers[:, :, None] / 1000

        def states_by_row(model, images):
            numbers = images[:, 0, :1]
            for row in range(1, 5):  # each state has a hidden part and a cell part, both with two layers
                yield torch.stack([numbers, 0 * numbers]), torch.stack([numbers, 0 * numbers + row])

        self.replace(probabilities_by_row=probabilities_by_row, states_by_row=states_by_row)
        self.replace_probe({1: 11.0, 2: 22.0, 3: 23.0, 4: 44.0})
        self.replace(first_correct_of_each_class=torch.tensor([5, 0, 4]))
        title = "After 2 of 4 rows, a linear classifier on the state recognises 22 %"
        title += " of the images and the network itself 33 %"
        owl, dog = [rounded(image.flatten()) for image in probabilities_by_row(model, TEST.images[[5, 4]])]
        lines = {"linear classifier on the state": (ACCENT, [11, 22, 23, 44])}
        lines["the network's own answer"] = (AFTER, [9.97, 33.001, 69.791, 100])
        lower = {"lines": lines, "xlabel": "rows read", "ylabel": "accuracy in % over\n1,003 test images"}
        axes = {
            0: {"title": "true class: owl", "ylabel": "row", "values": list(range(50, 58))},
            1: {"title": "true class: dog", "values": list(range(40, 48))},
            2: {"ylabel": "rows read", "yticks": {"1": 1, "2": 2, "4": 4}, "values": owl, "limits": [0, 1]},
            3: {"xlabel": "class", "xticks": {"0": 0, "2": 2}, "values": dog, "limits": [0, 1]},
            4: {"ylabel": "probability of the class"},
            5: lower | {"x": [[1, 2, 3, 4]] * 2, "spans": [(BLANK, 2.5, 4.5)]},
        }
        run = stand_in(rnn_mnist.Config(cell="gru", rows_after=2), model=model)
        return run, title, axes, "epoch,rows,known,answered\n4,1,11,9.97009\n4,2,22,33.001\n"

    def gates(self, cell="lstm", blank_rows=2):
        """Images 501 and 601 are shown. On average over the images, the units of a gate lie around its level."""
        names = {"gru": ["reset", "update"], "lstm": ["input", "forget", "output"]}[cell]
        levels = {(layer, gate): [20 * layer + 5 * len(gate)] * 24 for layer in (1, 2) for gate in names}
        levels[1, names[1]] = [90] * blank_rows + [20] * 7 + [50] * 13 + [70] * (4 - blank_rows)
        levels[2, names[1]] = [80] * blank_rows + [30] * 7 + [60] * 13 + [64] * (4 - blank_rows)

        def gate_activations(model, images):
            units = torch.tensor([10, -10, 0]) + (images[:, :1, :1] - 501) / 100
            return {gate: (torch.tensor(rows)[:, None] + units) / 100 for gate, rows in levels.items()}

        self.replace(gate_activations=gate_activations, first_correct_of_each_class=torch.tensor([501, *[0] * 6, 601]))
        model = SimpleNamespace(rows=lambda images: images[:, :1, :1] + torch.tensor([0.0, 0.1]).expand(24, 2))
        axes = {}
        for number, ((layer, gate), rows) in enumerate(levels.items()):
            axes[number] = {
                "title": f"{gate} gate of layer {layer} in %",
                "bands": [(AFTER, min(rows) - 8, max(rows) + 8)],
            }
            axes[number]["lines"] = {"mean of the units": (AFTER, rows)}
            axes[number]["spans"] = [(BLANK, 0.5, 2.5), (BLANK, 22.5, 24.5)] if blank_rows else []
        axes[0]["subtitle"] = "All gates, averaged over 1,003 test images (one below, its rows from left to right)"
        first = 3 * len(names)  # the number of the first axes in the lower half
        axes[first] = {"subtitle": f"The {names[1]} gate of every unit, sorted by mean, for two digits"}
        if blank_rows:
            axes[first] |= {"ylabel": "layer 1", "values": [80, 10, 40, 60, 90, 20, 50, 70, 100, 30]}
            axes[first + 1] = {"values": [81, 11, 41, 61, 91, 21, 51, 71, 101, 31]}
            axes[first + 2] = {"ylabel": "layer 2", "values": [70, 20, 50, 54, 80, 30, 60, 64, 90, 40, 74]}
            axes[first + 5] = {"xlabel": "row read", "values": [601, 601.1]}
            axes[first + 6] = {"ylabel": f"{names[1]} gate: share of the state kept in %"}
        run = stand_in(rnn_mnist.Config(cell=cell, rows_before=blank_rows, rows_after=blank_rows), model=model)
        level = levels[1, names[0]][0] / 100
        table = f"epoch,layer,gate,row,mean,low,high\n4,1,{names[0]},1,{level:g},{level - 0.08:g},{level + 0.08:g}\n"
        title = "55 % of the state in rows 8 to 20 of the digit and 76 % in the blank rows"
        if not blank_rows:
            title = "48 % of the state, 25 to 67 % depending on the row and 40 to 56 % on the unit"
        return run, f"The {names[1]} gates keep on average {title}", axes, table


VARIANTS = [("curves", [False]), ("deconv", [False]), ("gates", ["gru", 0])]  # whose titles take another form


@pytest.mark.parametrize(("name", "options"), [*((name, []) for name in FIGURES), *VARIANTS])
def test_figures_say_what_was_measured(name, options, monkeypatch):
    made_up = MadeUp(monkeypatch)
    made_up.replace(convolution_names=["conv1", "conv2"])
    monkeypatch.setattr(SavedRun, "snapshot_epochs", (0, 1, 3))
    run, title, expected_axes, *tables = getattr(made_up, name)(*options)
    figure, *texts = visualize.draw_figure(run, name).values()
    assert figure.get_suptitle() == f"{title}\n{run.title}"
    for number, expected in expected_axes.items():
        shown = describe(figure.axes[number])
        assert {fact: shown[fact] for fact in expected} == expected, f"axes {number}"
    check_legends(figure)
    assert [text[: len(table)] for text, table in zip(texts, tables, strict=True)] == tables


@pytest.fixture(scope="module")
def runs(pictures, tiny_digits, tmp_path_factory):
    """The folder and the Dataset of a CNN that computes in bf16 and permutes the pixels, and of an LSTM, by name."""
    tiny_pictures = small(pictures, 320, 60)
    cnn = cnn_cifar10.Config(lr=1e-3, pixels="permuted", seed=3)
    rnn = rnn_mnist.Config(cell="lstm", hidden_size=8, rows_after=2, seed=3)
    folder = tmp_path_factory.mktemp("runs")
    return {
        "cnn": (train_here(cnn_cifar10, folder, tiny_pictures, cnn, precision="bf16"), tiny_pictures),
        "rnn": (train_here(rnn_mnist, folder, tiny_digits, rnn), tiny_digits),
    }


@pytest.fixture
def folder(runs, tmp_path, monkeypatch):
    """The folder of a copy of the LSTM that a test may change. Figures are saved without pixels, to save time."""
    folder, data = runs["rnn"]
    monkeypatch.setattr(visualize.Figure, "savefig", Mock())
    use_as_synthetic(monkeypatch, data)
    return shutil.copytree(folder, tmp_path / folder.name)


def test_a_saved_run_computes_with_its_own_seed_precision_and_pixels(runs, monkeypatch):
    """It does not change the state of torch's random number generator."""
    folder, data = runs["cnn"]
    use_as_synthetic(monkeypatch, data)
    torch.manual_seed(7)
    generator_state = torch.get_rng_state()
    run = SavedRun(folder)
    with restored_process():
        images = utils.load_data("cifar10", "synthetic", None, "permuted").test.images
        assert torch.equal(run.data.test.images, images)
    assert torch.equal(run.probabilities, utils.predict(run.model, images).softmax(1))
    for model, epoch in ((run.untrained_model(), 0), (run.model_after(0), 0), (run.model_after(1), 1), (run.model, 2)):
        weights = torch.load(run.folder / "snapshots" / f"epoch_{epoch:02d}.pt")["layers.conv1.weight"]
        assert torch.equal(visualize.first_kernels(model), weights[:, 0])
        assert model.precision == "bf16"
    assert torch.equal(torch.get_rng_state(), generator_state)


@pytest.mark.parametrize(("network", "names"), [("cnn", CNN), ("rnn", GATED_RNN)])
def test_each_figure_of_a_run_is_saved_with_its_table_or_refused(call, runs, monkeypatch, tmp_path, network, names):
    folder, data = runs[network]
    use_as_synthetic(monkeypatch, data)
    files = read_files(folder)
    status, output, error = call(visualize, folder, "--output-dir", tmp_path)
    assert (status, error, read_files(folder)) == (0, "", files)
    tables = [name for name in names if FIGURES[name].measure]
    written = {*(f"{name}.png" for name in names), *(f"{name}.csv" for name in tables)}
    assert set(os.listdir(tmp_path)) == written
    assert {str(tmp_path / name) for name in written} <= set(output.splitlines())
    for name in names:
        picture = matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3]
        assert [picture.shape[1], picture.std() > 0.05] == [8 * 40, True], "8 inches wide and not blank"
    for name in tables:
        assert visualize.parse_table((tmp_path / f"{name}.csv").read_text())[-1]["epoch"] == "2"
    outcome = call(visualize, folder, "--figures", "curves", "results", "--output-dir", tmp_path / "none")
    assert_refused(outcome, f"{folder} has no figure results; it has {', '.join(names)}\n")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("config", "names"),
    [
        (cnn_cifar10.Config(without="fc1"), CNN),
        (cnn_cifar10.Config(without="conv1"), ANY_RUN),
        (rnn_mnist.Config(cell="gru", gates="constant"), GATED_RNN),
        (rnn_mnist.Config(cell="rnn"), PLAIN_RNN),
    ],
)
def test_a_run_has_the_figures_that_fit_and_without_checkpoint_only_curves(call, tmp_path, config, names):
    record = {"script": config.script, "settings": vars(config), "conditions": {"data_source": "real"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "metrics.csv").write_text(utils.format_csv(utils.METRIC_COLUMNS, [(1, 2.0, 30.0, 1.0, 50.0, 9.0)]))
    files = read_files(tmp_path)
    assert [name for name in FIGURES if FIGURES[name].fits(SavedRun(tmp_path))] == names
    assert_refused(call(visualize, tmp_path), f"train the run with {SavedRun(tmp_path).command} and pass its folder\n")
    assert read_files(tmp_path) == files
    assert call(visualize, tmp_path, "--figures", "curves")[0] == 0
    assert matplotlib.image.imread(tmp_path / "figures" / "curves.png").any()


def test_a_missing_snapshot_costs_an_epoch_and_a_damaged_one_a_figure(call, folder):
    """A figure that cannot be drawn is reported, and the others are drawn. A user's file in figures/ stays."""
    path = folder / "snapshots" / "epoch_01.pt"
    path.unlink()
    assert call(visualize, folder, "--figures", "gradients")[0] == 0
    assert [row["epoch"] for row in read_csv(folder / "figures" / "gradients.csv")] == ["0", "2"]
    (folder / "figures" / "gradients.png").rename(folder / "figures" / "notes.png")
    path.write_text("damaged")
    status, _, error = call(visualize, folder)
    first_line, last_line = error.splitlines()
    assert first_line.startswith(f"could not draw gradients of {folder}: {path} is damaged")
    assert "1 of 5 figures could not be drawn, for the reasons given above" in last_line
    assert status == 2
    assert {file.stem for file in (folder / "figures").glob("*.png")} == {"notes", *GATED_RNN} - {"gradients"}


def test_all_that_figures_show_comes_from_one_reading_of_the_checkpoint(folder, monkeypatch):
    """Training may replace the checkpoint after the run was found, and again after its network was loaded."""
    path = folder / "checkpoint.pt"
    last = utils.read_checkpoint(folder)
    run = visualize.open_run(folder, None)
    state = {"model": utils.load_tensors(folder / "snapshots" / "epoch_01.pt")}
    utils.save_tensors(path, last | {"history": last["history"][:1], "state": state})
    predict = utils.predict

    def predict_while_training(model, images):
        utils.save_tensors(path, last)
        return predict(model, images)

    monkeypatch.setattr(visualize, "predict", predict_while_training)
    assert visualize.draw_run(run, None, folder / "figures") == [0] * len(GATED_RNN)
    (folder / "metrics.csv").write_text("epoch;train_loss\n1;2\n")  # as a spreadsheet may save it
    assert SavedRun(folder).history == last["history"]
    assert run.test_accuracy(run.epoch) == utils.evaluate(run.model, run.data.test).accuracy
    epochs = [read_csv(folder / "figures" / f"{name}.csv")[-1]["epoch"] for name in GATED_RNN[2:]]
    assert [run.epoch, *epochs] == [1, "1", "1", "1"]


TABLE = "epoch,rows,known,answered\n1,1,11,12\n2,2,13,14\n"
DAMAGED_TABLES = {
    "another epoch": TABLE.replace("\n2", "\n1"),
    "cut off": TABLE[:-1],
    "a missing cell": TABLE.replace(",14", ""),
    "semicolons": TABLE.replace(",", ";"),
    "older, without epochs": "rows,known,answered\n1,11,12\n2,13,14\n",
}


@pytest.mark.parametrize("damage", DAMAGED_TABLES)
def test_tables_are_read_or_else_measured_again_or_else_named(folder, monkeypatch, capsys, damage):
    """A table is read if its last epoch is that of the run, whatever the times of the files."""
    measured = Mock(return_value=[{"epoch": 2, "rows": 1, "known": 0.5, "answered": 0.25}])
    monkeypatch.setitem(FIGURES, "reading", FIGURES["reading"]._replace(measure=measured))
    expected = [{"epoch": "2", "rows": "1", "known": "0.5", "answered": "0.25"}]
    path = folder / "figures" / "reading.csv"
    assert read_table(SavedRun(folder), "reading") == expected, "there is no table"
    path.write_text(TABLE)
    os.utime(path, (0, 0))
    assert [row["known"] for row in read_table(SavedRun(folder), "reading")] == ["11", "13"]
    path.write_text(DAMAGED_TABLES[damage])
    assert read_table(SavedRun(folder), "reading") == expected
    assert read_csv(path) == expected
    path.write_text(DAMAGED_TABLES[damage])
    (folder / "checkpoint.pt").unlink()
    assert read_table(SavedRun(folder), "reading") == []
    assert capsys.readouterr().out.endswith(f"\nskipping {path}: damaged or not from epoch 2, with no checkpoint.pt\n")
