"""visualize.py on one run: what its figures and tables say, from which measurements, and its command line."""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from unittest.mock import Mock

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from visualize import ACCENT_COLOR, AFTER_COLOR, BEFORE_COLOR, SavedRun, read_table

import matplotlib
import numpy as np
import pytest
import torch
from conftest import assert_refused, read_files, restored_process, small, train_here, use_as_synthetic
from matplotlib.colors import to_hex

ANY_RUN = ["curves", "confusion"]
CNN = [*ANY_RUN, "filters", "activations", "layers", "deconv", "evolution", "invariance", "occlusion", "gabor"]
PLAIN_RNN = [*ANY_RUN, "gradients", "reading"]
GATED_RNN = [*PLAIN_RNN, "gates"]


@pytest.fixture(autouse=True)
def _fast_figures(monkeypatch):
    """Speed the figures up: fewer measurements and fewer pixels."""
    monkeypatch.setattr(visualize, "GABOR_STARTS", 1)
    monkeypatch.setattr(visualize, "RIDGE_IMAGES", 200)
    monkeypatch.setitem(visualize.STYLE, "savefig.dpi", 40)
    for kind, amounts in zip(visualize.TRANSFORMATIONS, ([-3, 0, 8], [1.0, 1.5], [0, 90]), strict=True):
        monkeypatch.setitem(visualize.TRANSFORMATIONS, kind, torch.tensor(amounts))


# What figures say about made-up measurements

BEFORE, AFTER, ACCENT = to_hex(BEFORE_COLOR), to_hex(AFTER_COLOR), to_hex(ACCENT_COLOR)
BLACK, BLANK = to_hex("black"), to_hex("0.9")


def stand_in(config=None, labels=(0, 1, 2), **attributes):
    """Return a SavedRun with made-up attributes. Its networks are texts; its images are filled with their numbers."""
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None].repeat(1, 12, 12)
    train = utils.Split(torch.full((1, 12, 12), 200), torch.tensor([200]))  # image 200, with the label 200
    made_up = {
        "config": config or cnn_cifar10.Config(),
        "conditions": SimpleNamespace(data_source="real"),
        "model": "trained",
        "untrained_model": Mock(return_value="untrained"),
        "model_after": {0: "untrained", 1: "epoch 1", 3: "epoch 3"}.get,
        "history": [{"test_accuracy": accuracy} for accuracy in (40, 45, 42, 41)],
        "data": utils.Dataset("", "", ("cat", "dog", "owl"), train, utils.Split(images, torch.tensor(labels))),
    }
    run = SavedRun.__new__(SavedRun)
    vars(run).update(made_up | attributes)
    return run


def color_of(artist):
    """Return the colour of a line, a patch or a collection as text, such as '#0072b2'."""
    color = artist.get_color() if hasattr(artist, "get_color") else artist.get_facecolor()
    return to_hex(color if isinstance(color, str) else np.ravel(color))


def rounded(values):
    return np.round(np.asarray(values, dtype=float), 3).tolist()


def image_values(image):
    """Return the different values of an image, without NaNs, in the order of their rows along the y axis."""
    array = np.ma.filled(image.get_array().astype(float), np.nan)
    _, _, bottom, top = image.get_extent()
    if (top > bottom) == (image.origin == "upper"):
        array = array[::-1]
    return list(dict.fromkeys(rounded(array[~np.isnan(array)])))


def tick_labels(axis):
    """Return the labels of the ticks of an axis, in the order of the ticks' positions."""
    return [label.get_text() for label in sorted(axis.get_ticklabels(), key=lambda label: sum(label.get_position()))]


def describe(axes):
    """Return what an axes shows, a dict. lines, x and legend are dicts by label; texts are sorted row by row.

    bands: (colour, lowest y, highest y) of filled bands and vertical lines; spans: (colour, left, right).
    """
    bars = [bar for container in axes.containers for bar in container]
    spans = [patch for patch in axes.patches if patch not in bars]
    bands = [(color_of(band), *rounded(band.get_datalim(axes.transData).intervaly)) for band in axes.collections]
    texts = sorted(axes.texts, key=lambda text: text.get_position()[::-1])
    handles = axes.get_legend().legend_handles if axes.get_legend() else []
    values = image_values(axes.images[0]) if axes.images else []
    return {
        "title": axes.get_title(),
        "xlabel": axes.get_xlabel(),
        "ylabel": axes.get_ylabel(),
        "xticks": tick_labels(axes.xaxis),
        "yticks": tick_labels(axes.yaxis),
        "right": tick_labels(axes.child_axes[0].yaxis) if axes.child_axes else [],
        "x": {line.get_label(): rounded(line.get_xdata(orig=False)) for line in axes.lines},
        "lines": {line.get_label(): (color_of(line), rounded(line.get_ydata())) for line in axes.lines},
        "bands": bands,
        "bars": rounded([bar.get_height() for bar in bars]),
        "spans": [(color_of(span), *rounded([span.get_x(), span.get_x() + span.get_width()])) for span in spans],
        "legend": {handle.get_label(): color_of(handle) for handle in handles},
        "texts": [text.get_text() for text in texts],
        "values": values,
        "colors": [to_hex(color) for color in axes.images[0].to_rgba(values)] if values else [],
    }


@dataclass
class MadeUp:
    """Made-up measurements, all of which are different, for each figure in a method of its name.

    A method replaces functions of visualize. It returns a run, the figure's title without that of the run, what the
    axes show, by number, in the words of describe, and the beginning of the table.
    """

    monkeypatch: pytest.MonkeyPatch

    def replace(self, **results):
        for name, result in results.items():
            function = result if callable(result) else Mock(return_value=result)
            self.monkeypatch.setattr(visualize, name, function)

    def curves(self):
        columns = ("train_loss", "train_accuracy", "test_loss", "test_accuracy")
        rows = [(1.5, 30, 1.1, 40), (1.2, 50, 1.3, 45), (0.9, 60, 1.4, 42)]
        run = stand_in(history=[dict(zip(columns, row, strict=True)) for row in rows])
        title = "Test accuracy is 42.00 % after epoch 3 (training: 60.00 %); test loss was lowest after epoch 1"
        accuracies = {"training images": (BEFORE, [30, 50, 60]), "test images": (AFTER, [40, 45, 42])}
        losses = {"training images": (BEFORE, [1.5, 1.2, 0.9]), "test images": (AFTER, [1.1, 1.3, 1.4])}
        axes = {0: {"xlabel": "epoch", "ylabel": "accuracy in %", "lines": accuracies}}
        axes[1] = {"xlabel": "epoch", "ylabel": "mean cross-entropy per image", "lines": losses}
        return run, title, axes

    def confusion(self):
        predicted = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 2])
        run = stand_in(labels=[0, 0, 0, 0, 1, 1, 1, 1, 1, 2, 2], probabilities=torch.eye(3)[predicted])
        title = "Test accuracy is 54.55 %; the most frequent error is dog predicted as owl (3 images)"
        counts = {"texts": ["3", "1", "0", "0", "2", "3", "1", "0", "1"], "values": [1, 0, 3]}
        ticks = {"yticks": ["cat", "dog", "owl"], "right": ["75.0 %", "40.0 %", "50.0 %"]}
        return run, title, {0: {"xlabel": "predicted class", "ylabel": "true class", **counts, **ticks}}

    def filters(self):
        untrained = torch.tensor([[[0.4, -0.1], [0.0, 0.0]], [[0.3, 0.2], [0.1, 0.0]], [[0.0, 0.0], [0.0, 0.25]]])
        trained = torch.tensor([[[-0.7, 0.6], [0.0, 0.0]], [[0.6, 0.5], [0.1, 0.0]], [[0.0, 0.0], [0.0, 0.8]]])
        self.replace(first_kernels={"untrained": untrained, "trained": trained}.get)
        title = "1 of 3 kernels of conv1 changed by epoch 4 (cosine similarity to the start below 0.9)"
        before = {"title": "untrained, gray scale from -0.40 to 0.40", "values": [0.4, -0.1, 0.3, 0.2, 0, 0.1, 0.25]}
        after = {"title": "trained, gray scale from -0.80 to 0.80", "values": [-0.7, 0.6, 0.5, 0, 0.1, 0.8]}
        return stand_in(), title, {0: before, 1: after}

    def activations(self):
        names = ("image_mean", "mean", "std", "zeros")
        conv1 = [np.array(values) for values in ([0.2, 0.4], [0.1, 0.5], [0.03, 0.2], [60, 20])]
        conv2 = [np.array(values) for values in ([1, 2], [0.7, 0, 0.9], [0.1, 0, 0.4], [50, 100, 75])]
        statistics = {"conv1": dict(zip(names, conv1, strict=True)), "conv2": dict(zip(names, conv2, strict=True))}
        self.replace(activation_statistics=statistics)
        title = "ReLU sets 40 % of conv1's and 75 % of conv2's activations to zero; 1 of 5 feature maps are always zero"
        axes = {
            0: {"title": "conv1: images", "legend": {"mean 0.300": BLACK, "mean ± standard deviation 0.100": AFTER}},
            1: {"bars": [0.5, 0.1], "bands": [(AFTER, 0.1, 0.7)], "xlabel": "feature maps, ranked by mean"},
            2: {"bars": [20, 60], "lines": {"mean 40 %": (AFTER, [40, 40])}, "ylabel": "zeros in %"},
            3: {"spans": [(AFTER, 1, 2)], "xlabel": "mean activation of an image", "ylabel": "test images"},
            5: {"bars": [75, 50, 100], "lines": {"mean 75 %": (AFTER, [75, 75])}, "title": "conv2: zeros"},
        }
        return stand_in(), title, axes

    def layers(self):
        def layer_features(model, images):
            return {layer: [f"{model} {layer}", int(images.max())] for layer in ("pixels", "fc1")}

        def linear_probe_accuracy(features, labels, test_features, test_labels, classes):
            assert [features[1], labels.tolist()] == [200, [200]]  # the training image
            assert [*test_features, test_labels.tolist(), classes] == [features[0], 2, [0, 1, 2], 3]
            return {"trained pixels": 31, "trained fc1": 52, "untrained pixels": 30, "untrained fc1": 44}[features[0]]

        self.replace(layer_features=layer_features, linear_probe_accuracy=linear_probe_accuracy)
        title = "After training, linear probes reach 31 % on pixels, 52 % on fc1"
        lines = {"trained network": (ACCENT, [41, 41]), "linear probes, trained network": (AFTER, [31, 52])}
        lines["linear probes, untrained network"] = (BEFORE, [30, 44])
        texts = {"ylabel": "test accuracy in %", "xticks": ["pixels", "fc1"], "texts": ["30.0", "44.0", "31.0", "52.0"]}
        table = "epoch,network,layer,accuracy\n4,trained,pixels,31\n4,trained,fc1,52\n4,untrained,pixels,30\n"
        return stand_in(), title, {0: {"lines": lines, "xlabel": "input of the linear probe", **texts}}, table

    def deconv(self):
        reconstructions = torch.tensor([3.0, -3.0]).view(2, 1, 1, 1).expand(-1, 9, 2, 2)
        patches = torch.tensor([51.0, 102.0]).view(2, 1, 1, 1).expand(-1, 9, 2, 2)
        self.replace(selected_maps={"conv2": torch.tensor([4, 7])}, top_patches=(reconstructions, patches))
        title = "Reconstructions of conv2 are more alike within a map (mean cosine 1.00) than between maps (-1.00)"
        pairs = {"texts": ["map 4", "map 7"], "values": [1, 0.2, 0, 0.4]}
        return stand_in(top_activations={"conv2": None}), title, {0: pairs}

    def evolution(self):
        def top_activations(model, images, count):
            return {"conv2": f"top of {model}"}

        def reconstructions_by_epoch(models, layer, images, tops, maps):
            assert tops == [f"top of {model}" for model in models]
            epochs = torch.tensor([{"untrained": 0, "epoch 1": 1, "trained": 4}[model] for model in models])
            pictures = torch.zeros(len(maps), len(models), 2, 2)
            pictures[:, :, 0, 0] = torch.where(epochs > 0, 1.0, -1.0)
            pictures[:, :, 0, 1] = epochs / 10 + maps[:, None] / 100  # tells them apart
            return pictures, epochs + 10 * maps[:, None]

        self.replace(top_activations=top_activations, reconstructions_by_epoch=reconstructions_by_epoch)
        self.replace(selected_maps={"conv2": torch.tensor([3, 7])})
        end = "conv2 resemble the final ones (mean cosine 0.96; before training -0.89)"
        values = [-1, 0.03, 0.07, 0, 1, 0.13, 0.17, 0.43, 0.47]
        ticks = {"xticks": ["map 3", "map 7"], "yticks": ["0 (-0.89)", "1 (0.96)", "4 (1.00)"]}
        axes = {0: {"values": values, "texts": ["30", "70", "31", "71", "34", "74"], **ticks}}
        return stand_in(top_activations={"conv2": "top of trained"}), f"After epoch 1, reconstructions of {end}", axes

    def invariance(self):
        def sensitivity(model, images, labels, kind):
            assert [images[:, 0, 0].tolist(), labels.tolist()] == [[0, 1, 2, 3], [0, 1, 2, 0]]  # the test images
            number = list(visualize.TRANSFORMATIONS).index(kind)
            first = torch.tensor([0.1, 0.2, 0.3])[:, None] * torch.tensor([0.9, 1.0, 1.0, 1.1]) + number
            is_correct = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]])
            return torch.stack([first, 2 * first, is_correct])[:, : len(visualize.TRANSFORMATIONS[kind])]

        self.replace(sensitivity=sensitivity)
        title = "Accuracy is 75 % on 4 test images and 50 % when they are shifted down by 8 pixels"
        distance = "relative distance of the features\n(line: median; band: middle 80 %)"
        lines = {"first layer": (ACCENT, [0.1, 0.2, 0.3]), "last hidden layer": (AFTER, [0.2, 0.4, 0.6])}
        axes = {
            0: {"lines": lines, "bands": [(ACCENT, 0.093, 0.321), (AFTER, 0.186, 0.642)], "ylabel": distance},
            3: {"lines": {"_child0": (BLACK, [25, 75, 50])}, "ylabel": "accuracy in %"},
            4: {"lines": {"_child0": (BLACK, [25, 75])}, "xlabel": "scale"},
        }
        return stand_in(labels=[0, 1, 2, 0]), title, axes

    def occlusion(self):
        def occlude(model, image, label, size):
            number = int(image[0, 0, 0])
            assert [label, size] == [{4: 1, 2: 2}[number], 8]
            predicted = {4: torch.tensor([[1, 1], [1, 0]]), 2: torch.tensor([[0, 0], [1, 2]])}
            probability = torch.tensor([[0.1, 0.2], [0.3, 0.4]])
            return probability, predicted[number], probability + number, number + 1

        def deconvolve(model, image, layer, maps):
            return torch.tensor([[[[10.0, 20.0], [30.0, 40.0]]]]) + maps

        self.replace(most_vulnerable=torch.tensor([4, 2]), occlude=occlude, deconvolve=deconvolve)
        title = "A gray 8 x 8 square changes the answer at 25 % (dog) and 50 % (owl) of its positions"
        cat, dog, owl = [to_hex(color) for color in matplotlib.colormaps["tab10"].colors[:3]]
        axes = {
            0: {"title": "image with the square", "ylabel": "dog", "values": [4, 127.5]},
            1: {"title": "reconstruction", "xlabel": "conv2, map 5", "values": [15, 25, 35, 45]},
            2: {"title": "sum of the map", "values": [4.1, 4.2, 4.3, 4.4]},
            3: {"title": "p(true class)", "values": [0.1, 0.2, 0.3, 0.4]},
            4: {"title": "predicted class", "values": [1, 0], "colors": [dog, cat], "legend": {"cat": cat, "dog": dog}},
            5: {"ylabel": "owl", "values": [2, 127.5]},
            9: {"values": [0, 1, 2], "legend": {"cat": cat, "dog": dog, "owl": owl}},
        }
        probabilities = torch.eye(3)[torch.tensor([1, 1, 0, 1, 1])]  # image 2, an owl, is mistaken for a cat
        return stand_in(labels=[0, 1, 2, 0, 1], probabilities=probabilities), title, axes

    def gabor(self):
        def fit_gabor(kernels):
            r2 = kernels.abs().flatten()  # the kernels have one pixel
            return visualize.GaborFit(0.8 * kernels, r2, 100 * r2, r2 / 2)

        trained = torch.tensor([0.5, 0.9, 0.7]).view(3, 1, 1)
        untrained = torch.tensor([0.2, -0.1, 0.4]).view(3, 1, 1)
        self.replace(first_kernels={"trained": trained, "untrained": untrained}.get, fit_gabor=fit_gabor)
        title = "Gabor functions fit the kernels of conv1 with a median R² of 0.70 after training and 0.20 before"
        texts = ["1: 0.90\n90°, 0.45", "2: 0.70\n70°, 0.35", "0: 0.50\n50°, 0.25"]
        values = [0.9, 0.7, 0.5, 0.72, 0.56, 0.4, 0.18, 0.14, 0.1]
        shares = [0, 0.333, 0.667, 1]
        lines = {"trained: median 0.70": (AFTER, shares), "untrained: median 0.20": (BEFORE, shares)}
        x = {"trained: median 0.70": [0.5, 0.5, 0.7, 0.9], "untrained: median 0.20": [0.1, 0.1, 0.2, 0.4]}
        axes = {0: {"yticks": ["kernel", "fit", "residual"], "texts": texts, "values": values}}
        axes[1] = {"xlabel": "R² of the Gabor fit", "ylabel": "share of kernels", "lines": lines, "x": x}
        table = "epoch,kernels,feature_map,r2,orientation_degrees,cycles_per_pixel,cosine_to_start\n"
        table += "4,trained,0,0.5,50,0.25,1\n4,trained,1,0.9,90,0.45,-1\n4,trained,2,0.7,70,0.35,1\n4,untrained,0,0.2,"
        return stand_in(), title, axes, table

    def gradients(self):
        def gradient_norms(model, images, labels):
            assert [images[:, 0, 0].tolist(), labels.tolist()] == [[0, 1, 2], [0, 1, 2]]  # the test images
            first_norms = {"untrained": 0.05, "epoch 1": 0.6, "epoch 3": 0.7, "trained": 2.6}
            return torch.tensor([first_norms[model], 2, 3, 4, 10])

        self.replace(gradient_norms=gradient_norms)
        title = "The loss gradient at the first row is 26 % of that at the last row (before training: 0.5 %)"
        shades = [to_hex(shade) for shade in visualize.shades(3)]
        lines = {"untrained": (BEFORE, [0.05, 2, 3, 4, 10]), "epoch 1": (shades[0], [0.6, 2, 3, 4, 10])}
        lines |= {"epoch 3": (shades[1], [0.7, 2, 3, 4, 10]), "epoch 4": (shades[2], [2.6, 2, 3, 4, 10])}
        spans = [(BLANK, 0.5, 1.5), (BLANK, 4.5, 5.5)]
        axes = {0: {"xlabel": "rows read", "ylabel": "norm of the loss gradient", "lines": lines, "spans": spans}}
        run = stand_in(rnn_mnist.Config(rows_before=1, rows_after=1))
        return run, title, axes, "epoch,1,2,3,4,5\n0,0.05,2,3,4,10\n1,0.6,2,3,4,10\n3,0.7,2,3,4,10\n4,2.6,"

    def reading(self):
        """Image 0 is recognised from row 2 on, image 1 from row 3 on, and image 2 after row 4, the last one."""
        image0 = [[0.1, 0.5, 0.4], [0.6, 0.3, 0.11], [0.7, 0.2, 0.12], [0.8, 0.15, 0.05]]
        image1 = [[0.51, 0.41, 0.08], [0.52, 0.31, 0.17], [0.25, 0.61, 0.14], [0.22, 0.71, 0.07]]
        image2 = [[0.53, 0.42, 0.05], [0.33, 0.54, 0.13], [0.34, 0.55, 0.11], [0.21, 0.19, 0.6]]
        probabilities = torch.tensor([image0, image1, image2])

        def probabilities_by_row(model, images):
            return probabilities[images[:, 0, 0].long()]

        def probe_states(model, train, test, classes):
            assert [train.labels.tolist(), test.labels.tolist(), classes] == [[200], [0, 1, 2], 3]
            return [11.0, 22.0, 23.0, 44.0]

        self.replace(probabilities_by_row=probabilities_by_row, probe_states=probe_states)
        self.replace(first_correct_of_each_class=torch.tensor([2, 0, 1]))
        title = "After 2 of 4 rows, a linear classifier on the state recognises 22 % of the images and the network 33 %"
        known, answered = (ACCENT, [11, 22, 23, 44]), (AFTER, [0, 33.333, 66.667, 100])
        lines = {"linear classifier on the state": known, "the network's own answer": answered}
        labels = {"xlabel": "rows read", "ylabel": "accuracy in % over\n3 test images"}
        axes = {
            0: {"title": "true class: owl", "ylabel": "row", "yticks": ["1", "2", "4"], "values": list(range(8))},
            1: {"title": "true class: dog", "values": list(range(8, 16))},
            2: {"ylabel": "rows read", "yticks": ["1", "2", "4"], "values": rounded(probabilities[2].flatten())},
            3: {"xlabel": "class", "xticks": ["0", "1", "2"], "values": rounded(probabilities[1].flatten())},
            -1: {"lines": lines, "spans": [(BLANK, 2.5, 4.5)], **labels},
        }
        model = SimpleNamespace(rows=Mock(return_value=torch.arange(16).view(2, 4, 2)))
        run = stand_in(rnn_mnist.Config(cell="gru", rows_after=2), model=model)
        return run, title, axes, "epoch,rows,known,answered\n4,1,11,0\n4,2,22,33.33333\n"

    def gates(self):
        """24 rows, the last 4 of which are blank. The units of a gate lie around its level, here in percent."""
        levels = {(1, "input"): [10] * 24, (1, "forget"): [20] * 7 + [50] * 13 + [90] * 4, (1, "output"): [25] * 24}
        levels |= {(2, "input"): [35] * 24, (2, "forget"): [30] * 7 + [60] * 13 + [80] * 4, (2, "output"): [40] * 24}

        def gate_activations(model, images):
            units = torch.tensor([10, -10, 0]) + images[:, :1, :1] - 1.0  # on average over the images -10, 0 and 10
            return {gate: (torch.tensor(rows)[:, None] + units) / 100 for gate, rows in levels.items()}

        self.replace(gate_activations=gate_activations, first_correct_of_each_class=torch.tensor([1] + [0] * 6 + [2]))
        end = "in rows 8 to 20 of the digit and 85 % in the blank rows after it"
        means = {gate: {"mean of the units": (AFTER, rows)} for gate, rows in levels.items()}
        spans = [(BLANK, 20.5, 24.5)]
        axes = {
            0: {"title": "input gate in %\n(share of the candidate written)", "lines": means[1, "input"]},
            1: {"title": "forget gate in %\n(share of the cell state kept)", "lines": means[1, "forget"]},
            2: {"title": "output gate in %\n(share of the cell state shown)", "bands": [(AFTER, 17, 33)]},
            3: {"lines": means[2, "input"], "ylabel": "layer 2", "spans": spans},
            4: {"lines": means[2, "forget"], "bands": [(AFTER, 22, 88)], "spans": spans},
            9: {"ylabel": "layer 1", "values": [10, 40, 80, 20, 50, 90, 30, 60, 100]},
            10: {"values": [11, 41, 81, 21, 51, 91, 31, 61, 101]},
            11: {"ylabel": "layer 2", "values": [20, 50, 70, 30, 60, 80, 40, 90]},
        }
        model = SimpleNamespace(rows=Mock(return_value=torch.zeros(2, 24, 2)))
        run = stand_in(rnn_mnist.Config(cell="lstm", rows_after=4), model=model)
        table = "epoch,layer,gate,row,mean,low,high\n4,1,input,1,0.1,0.02,0.18\n"
        return run, f"The forget gate keeps 55 % of the state {end}", axes, table


@pytest.mark.parametrize("name", visualize.FIGURES)
def test_figures_say_what_was_measured(name, monkeypatch):
    monkeypatch.setattr(visualize, "convolution_names", Mock(return_value=["conv1", "conv2"]))
    monkeypatch.setattr(SavedRun, "snapshot_epochs", (0, 1, 3))
    run, title, expected_axes, *tables = getattr(MadeUp(monkeypatch), name)()
    outputs = visualize.FIGURES[name].draw(run)
    figure, *texts = outputs.values() if isinstance(outputs, dict) else [outputs]
    assert figure.get_suptitle() == f"{title}\n{run.title}"
    for number, expected in expected_axes.items():
        shown = describe(figure.axes[number])
        assert {fact: shown[fact] for fact in expected} == expected, f"axes {number}"
    assert figure.findobj(matplotlib.legend.Legend) or all(len(axes.lines) < 2 for axes in figure.axes)
    assert [text[: len(table)] for text, table in zip(texts, tables, strict=True)] == tables


# What is measured


@pytest.mark.parametrize("test_labels", [[0, 0, 0, 0], [0, 1, 1, 1]])
def test_ridge_penalty_is_chosen_on_held_out_training_images(monkeypatch, test_labels):
    """With the low penalty, a probe follows the feature; with the high one, it always answers 0."""
    monkeypatch.setattr(visualize, "RIDGE_PENALTIES", (1e-3, 1e6))
    labels = torch.cat([torch.arange(80) % 5 > 2, torch.arange(20) % 2 > 0]).long()
    features = 2.0 * labels[:, None] - 1
    if any(test_labels):
        labels[80:] = 0  # held-out images, which then prefer the high penalty
    test_features = torch.tensor([[-1.0], [1.0], [1.0], [1.0]])  # the other penalty answers all of them correctly
    assert visualize.linear_probe_accuracy(features, labels, test_features, torch.tensor(test_labels), 2) == 25


def test_occlusion_takes_the_images_whose_answer_changes_most(monkeypatch):
    unchanged = {5: 9, 1: 2, 8: 5}  # positions of the square, by number of the image
    answers = torch.arange(9) % 3

    def predict(model, occluded):
        number = int(occluded.min())
        is_changed = torch.arange(len(occluded)) >= unchanged[number]
        return torch.eye(4)[answers[number] + is_changed.long()]

    monkeypatch.setattr(visualize, "predict", predict)
    monkeypatch.setattr(visualize, "first_correct_of_each_class", Mock(return_value=torch.tensor([5, 1, 8])))
    run = stand_in(labels=range(9), probabilities=torch.eye(3)[answers])
    assert visualize.most_vulnerable(run, size=4, count=2).tolist() == [1, 8]


@pytest.fixture(scope="module")
def cnn(pictures, tmp_path_factory):
    """The folder of a CNN that computes in bf16 and permutes the pixels, and its Dataset, not yet permuted."""
    data = small(pictures, 320, 60)
    config = cnn_cifar10.Config(lr=1e-3, pixels="permuted", seed=3)
    return train_here(cnn_cifar10, tmp_path_factory.mktemp("cnn"), data, config, precision="bf16"), data


@pytest.fixture(scope="module")
def rnn(tiny_digits, tmp_path_factory):
    """The folder of an LSTM, and its Dataset."""
    config = rnn_mnist.Config(cell="lstm", hidden_size=8, rows_after=2, seed=3)
    return train_here(rnn_mnist, tmp_path_factory.mktemp("rnn"), tiny_digits, config), tiny_digits


@pytest.fixture
def folder(rnn, tmp_path, monkeypatch):
    """The folder of a copy of the LSTM that a test may change. Figures are saved without pixels, to save time."""
    monkeypatch.setattr(visualize, "encode_png", Mock(return_value=b""))
    use_as_synthetic(monkeypatch, rnn[1])
    return shutil.copytree(rnn[0], tmp_path / rnn[0].name)


def test_a_saved_run_computes_with_its_own_seed_precision_and_pixels(cnn, monkeypatch):
    """It does not change the state of torch's random number generator."""
    use_as_synthetic(monkeypatch, cnn[1])
    torch.manual_seed(7)
    generator_state = torch.get_rng_state()
    run = SavedRun(cnn[0])
    with restored_process():
        images = utils.load_data("cifar10", "synthetic", None, "permuted").test.images
        assert torch.equal(run.probabilities, utils.predict(run.model, images).softmax(1))
    for model, epoch in ((run.untrained_model(), 0), (run.model_after(0), 0), (run.model_after(1), 1), (run.model, 2)):
        weights = torch.load(run.folder / "snapshots" / f"epoch_{epoch:02d}.pt")["layers.conv1.weight"]
        assert torch.equal(visualize.first_kernels(model), weights[:, 0])
    assert torch.equal(torch.get_rng_state(), generator_state)
    run.model.precision = "fp32"
    assert not torch.equal(run.probabilities, utils.predict(run.model, images).softmax(1))


# Files, and the command line


@pytest.mark.parametrize(
    ("network", "names", "tables"),
    [("cnn", CNN, ["layers", "gabor"]), ("rnn", GATED_RNN, ["gradients", "reading", "gates"])],
)
def test_every_fitting_figure_is_saved_with_its_table(call, request, monkeypatch, tmp_path, network, names, tables):
    folder, data = request.getfixturevalue(network)
    use_as_synthetic(monkeypatch, data)
    files = read_files(folder)
    status, output, _ = call(visualize, folder, "--output-dir", tmp_path)
    assert (status, read_files(folder)) == (0, files)
    pictures = [f"{name}.png".replace("deconv", "deconv_conv2") for name in names]
    written = {*pictures, *(f"{name}.csv" for name in tables)}
    assert set(os.listdir(tmp_path)) == {".outputs", *written}
    assert {str(tmp_path / name) for name in written} <= set(output.splitlines())
    for name in pictures:
        picture = matplotlib.image.imread(tmp_path / name)[..., :3]
        assert [picture.shape[1], picture.std() > 0.05] == [8 * 40, True], "8 inches wide and not blank"
    for name in tables:
        columns, rows = visualize.TABLES[name](SavedRun(folder))
        assert (tmp_path / f"{name}.csv").read_text() == visualize.format_table(columns, rows)


def test_a_second_entry_of_one_name_is_refused():
    for decorator in (visualize.figure(), visualize.comparison("memory"), visualize.table("gates")):
        with pytest.raises(ValueError, match="is registered twice"):
            decorator(SimpleNamespace(__name__="curves"))


@pytest.mark.parametrize(
    ("config", "names", "missing"),
    [
        (cnn_cifar10.Config(without="fc1"), CNN, "reading"),
        (cnn_cifar10.Config(without="conv1"), ANY_RUN, "filters"),
        (cnn_cifar10.Config(without="conv1+conv2"), ANY_RUN, "gabor"),
        (rnn_mnist.Config(cell="gru", gates="constant"), GATED_RNN, "results"),
        (rnn_mnist.Config(cell="rnn"), PLAIN_RNN, "gates"),
    ],
)
def test_what_a_run_lacks_is_refused_before_anything_is_drawn(call, tmp_path, config, names, missing):
    """A run may lack a figure, which does not fit its settings, or the checkpoint, which curves does not need."""
    record = {"script": config.script, "settings": asdict(config), "conditions": {"data_source": "real"}}
    (tmp_path / "config.json").write_text(json.dumps(record))
    (tmp_path / "metrics.csv").write_text(utils.format_csv(utils.METRIC_COLUMNS, [(1, 2.0, 30.0, 1.0, 50.0, 9.0)]))
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "curves.png").write_text("shipped")
    files = read_files(tmp_path)
    outcome = call(visualize, tmp_path, "--figures", "curves", missing)
    assert_refused(outcome, f"{tmp_path} has no figure {missing}; it has {', '.join(names)}\n")
    assert_refused(call(visualize, tmp_path, "--figures", "curves", "heatmap"), "invalid choice: 'heatmap'")
    assert_refused(call(visualize, tmp_path), f"train the run with {config.command()} and pass its folder\n")
    assert read_files(tmp_path) == files
    assert call(visualize, tmp_path, "--figures", "curves")[0] == 0
    assert matplotlib.image.imread(tmp_path / "figures" / "curves.png").any()


def test_a_figure_that_cannot_be_drawn_does_not_stop_the_others(call, folder):
    """The figure gates needs data that are missing in --data-dir. A user's file in figures/ stays."""
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"synthetic"', '"real"'))
    (folder / "figures").mkdir()
    (folder / "figures" / "notes.txt").write_text("a user's file")
    status, _, error = call(visualize, folder, "--figures", "gates", "curves", "--data-dir", folder / "data")
    first_line, last_line = error.splitlines()
    missing = folder / "data" / "MNIST" / "raw" / "train-images-idx3-ubyte"
    assert first_line.startswith(f"could not draw gates of {folder}: MNIST: {missing} is missing; ")
    assert last_line == "visualize.py: error: 1 of 2 figures could not be drawn, for the reasons given above"
    assert status == 2
    assert set(os.listdir(folder / "figures")) == {".outputs", "curves.png", "notes.txt"}
    assert not (folder / "data").exists()


def test_missing_snapshots_cost_no_figure(call, folder):
    """Figures show the epochs of the checkpoint, also if a kill left metrics.csv behind it or snapshots ahead of it."""
    shutil.copy(folder / "snapshots" / "epoch_02.pt", folder / "snapshots" / "epoch_03.pt")
    for epoch in range(3):
        (folder / "snapshots" / f"epoch_{epoch:02d}.pt").unlink()
    lines = (folder / "metrics.csv").read_text().splitlines(keepends=True)
    (folder / "metrics.csv").write_text("".join(lines[:-1]))
    assert SavedRun(folder).epoch == 2
    assert call(visualize, folder)[0] == 0
    assert [row["epoch"] for row in utils.read_csv(folder / "figures" / "gradients.csv")] == ["0", "2"]


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
    measured = Mock(return_value=(("epoch", "rows", "known", "answered"), [(2, 1, 0.5, 0.25)]))
    monkeypatch.setitem(visualize.TABLES, "reading", measured)
    expected = [{"epoch": "2", "rows": "1", "known": "0.5", "answered": "0.25"}]
    path = folder / "figures" / "reading.csv"
    assert read_table(SavedRun(folder), "reading") == expected, "there is no table"
    path.write_text(TABLE)
    os.utime(path, (0, 0))
    assert [row["known"] for row in read_table(SavedRun(folder), "reading")] == ["11", "13"]
    path.write_text(DAMAGED_TABLES[damage])
    assert read_table(SavedRun(folder), "reading") == expected
    assert utils.read_csv(path) == expected
    path.write_text(DAMAGED_TABLES[damage])
    (folder / "checkpoint.pt").unlink()
    assert read_table(SavedRun(folder), "reading") == []
    assert capsys.readouterr().out.endswith(f"\nskipping {path}: damaged or not from epoch 2, with no checkpoint.pt\n")
