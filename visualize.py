"""Draw what trained networks learned, from the folders of finished runs.

    python visualize.py runs/cnn_cifar10/NAME                      every figure of a run, into its figures/ folder
    python visualize.py runs/cnn_cifar10/NAME --figures filters    only the ones named
    python visualize.py runs                                       all runs compared, into runs/comparison/

The methods are those of Zeiler & Fergus (2013), arXiv:1311.2901, where a section or a figure of it is named.
"""

import csv
import io
import itertools
import math
import shutil
import textwrap
from contextlib import suppress
from dataclasses import replace
from functools import cache, cached_property, partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import cnn_cifar10
import rnn_mnist
import utils
from utils import REPORT_EPOCHS, InputError, number_text, predict, tell

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image
from torch import nn
from tqdm import tqdm

CONFIGS = {script.Config.script: script.Config for script in (cnn_cifar10, rnn_mnist)}
REPORT = cnn_cifar10.REPORT + rnn_mnist.REPORT
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "savefig.dpi": 160,
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.constrained_layout.use": True,
}
WIDTH = 8  # inches, of every figure
GRAY = matplotlib.colormaps["gray"].with_extremes(bad="#dfe8f2")  # what is no pixel of an image is tinted
# Okabe and Ito's colours, which the colour-blind tell apart; these four stay with their networks in every figure.
NETWORK_COLOURS = {"RNN": "#E69F00", "GRU": "#0072B2", "LSTM": "#009E73", "LeNet-5": "#CC79A7"}
BEFORE, AFTER, OTHER = "#999999", "#0072B2", "#D55E00"  # untrained or training images, trained or test images, beside


class SavedRun:
    """A run's folder, read piece by piece as the figures ask for it. Raises InputError where a piece is unusable."""

    def __init__(self, folder, data_dir=Path("data")):
        self.folder, self.data_dir = folder, data_dir
        self.config, self.conditions = utils.read_config(folder, CONFIGS)

    @property
    def title(self):
        """The run in words: network, data set, training, seed."""
        return ", ".join(self.config.words().values()) + self.source

    @property
    def source(self):
        return "" if self.conditions.data_source == "real" else ", synthetic data"

    @property
    def command(self):
        """The command line that trains the run."""
        return self.config.command(*["--data", "synthetic"] * bool(self.source))

    @cached_property
    def history(self):
        """What each finished epoch measured, list of dict; empty when none was finished."""
        return utils.read_history(self.folder)

    def test_accuracy(self, epoch=REPORT_EPOCHS):
        """The test accuracy in percent after an epoch, None where the run is shorter."""
        return self.history[epoch - 1]["test_accuracy"] if len(self.history) >= epoch else None

    @cached_property
    def model(self):
        """The trained network; its weights are the last epoch's."""
        checkpoint, model = utils.read_checkpoint(self.folder), self.untrained_model()
        if checkpoint is None:
            words = f"{self.folder} holds no checkpoint.pt (those of runs/reference are not shipped)"
            raise InputError(f"{words}; train the run with {self.command} and name its folder")
        utils.restore(self.folder / "checkpoint.pt", checkpoint["state"], {"model": model})
        return model

    def untrained_model(self):
        """The network at its initialisation, rebuilt from the run's seed."""
        torch.manual_seed(self.config.seed)
        if is_recurrent(self):
            return rnn_mnist.RowReader(self.config).eval()
        return cnn_cifar10.LeNet5(self.config, self.conditions.precision).eval()

    def snapshot(self, epoch):
        """A network with the weights that stood after an epoch, those that the run kept: of a CNN its convolutions'."""
        model, path = self.untrained_model(), self.folder / "snapshots" / f"epoch_{epoch:02d}.pt"
        utils.restore(path, {"model": model.state_dict() | utils.load_tensors(path)}, {"model": model})
        return model

    @cached_property
    def data(self):
        config, source = self.config, self.conditions.data_source
        return utils.load_data(config.dataset, source, self.data_dir, config.pixels, may_download=False)

    @cached_property
    def probabilities(self):
        """Class probabilities of the test images, float32 (N, classes), computed as in training."""
        return predict(self.model, self.data.test.images).softmax(dim=1)

    @cached_property
    def exciting(self):
        """What excites the feature maps of the convolutions most, Exciting test images by layer."""
        return most_exciting(self.model, self.data.test.images)


def is_recurrent(run):
    return isinstance(run.config, rnn_mnist.Config)


def has_convolutions(run):
    return not is_recurrent(run) and len(convolutions(run.untrained_model())) == 2


FIGURES, COMPARISONS = {}, {}


def figure(fits=lambda run: True):
    """Register draw(run), which returns a Figure, or Figures and tables by file name; fits(run): whether it has it."""
    return lambda draw: FIGURES.setdefault(draw.__name__, (draw, fits))[0]


def comparison(name):
    """Register draw(groups), groups a list of Group; it returns what a figure does, or None."""
    return lambda draw: COMPARISONS.setdefault(name, draw)


def save(name, made, folder):
    """Write what a figure returned into a folder: pictures, texts and bytes."""
    for file, content in (made if isinstance(made, dict) else {f"{name}.png": made}).items():
        if isinstance(content, Figure):
            content = picture_bytes(content)
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        utils.write_atomically(folder / file, content.encode() if isinstance(content, str) else content)
        tell(folder / file)


def picture_bytes(drawn):
    """Return a Figure as PNG; a palette takes a third of the bytes."""
    content = io.BytesIO()
    drawn.savefig(content, format="png")
    picture = Image.open(content).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    return content.getvalue()


def csv_text(columns, rows):
    """Return a table as CSV, its numbers with seven digits."""
    texts = [[f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row] for row in rows]
    return utils.table_text(columns, texts)


@cache
def measured(run, name):
    """Return the table of one of a run's figures, list of dict of texts, empty where there is none.

    The figure is drawn anew where the checkpoint is newer, and kept where the run's folder can be written.
    """
    (draw, fits), folder = FIGURES[name], run.folder / "figures"
    table, checkpoint = folder / f"{name}.csv", run.folder / "checkpoint.pt"
    is_new = table.exists() and not (checkpoint.exists() and checkpoint.stat().st_mtime > table.stat().st_mtime)
    if is_new or not checkpoint.exists() or not fits(run):
        return utils.read_table(table)
    try:
        made = draw(run)
    except InputError as error:
        tell(f"{name} is not measured of {run.folder}: {error}")
        return utils.read_table(table)
    with suppress(OSError):  # what cannot be kept is measured again the next time
        save(name, made, folder)
    return list(csv.DictReader(io.StringIO(made[f"{name}.csv"])))


# Figures of any run --------------------------------------------------------------------------------------------------


@figure()
def curves(run):
    """Draw accuracy and loss by epoch, the test images' beside the training images'."""
    drawn = Figure(figsize=(WIDTH, 3.2))
    epochs = range(1, len(run.history) + 1)
    names = {"accuracy": "accuracy in %", "loss": "cross-entropy per image in nats"}
    for axes, (name, label) in zip(drawn.subplots(1, 2), names.items(), strict=True):
        for part, colour in (("train", BEFORE), ("test", AFTER)):
            values = [row[f"{part}_{name}"] for row in run.history]
            axes.plot(epochs, values, marker=".", color=colour, label=f"{part} images")
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    about = "After epoch {epoch}, {test_accuracy:.2f} % of test and {train_accuracy:.2f} % of training images are right"
    drawn.suptitle(f"{about.format(**run.history[-1])}\n{run.title}")
    return drawn


@figure()
def confusion(run):
    """Draw the confusion matrix of the test images, the errors shaded, with the accuracy of each class."""
    answers, labels, classes = run.probabilities.argmax(1), run.data.test.labels, run.data.classes
    pairs = labels * len(classes) + answers
    counts = torch.bincount(pairs, minlength=len(classes) ** 2).view(len(classes), -1).numpy()
    errors = np.ma.masked_array(counts, np.eye(len(classes), dtype=bool))
    drawn = Figure(figsize=(WIDTH, 6.4))
    axes = drawn.subplots()
    shown = axes.imshow(errors, cmap=matplotlib.colormaps["Oranges"].with_extremes(bad="#d6e6f2"), vmin=0)
    is_dark = (errors > 0.6 * errors.max()).filled(False)
    for (row, column), count in np.ndenumerate(counts):
        colour = "white" if is_dark[row, column] else "black"
        axes.text(column, row, count, ha="center", va="center", fontsize=7, color=colour)
    positions = range(len(classes))
    axes.set_xticks(positions, classes, rotation=45 if max(map(len, classes)) > 1 else 0, ha="center")
    axes.set_yticks(positions, classes)
    axes.set(xlabel="predicted class (numbers: images)", ylabel="true class")
    right = axes.secondary_yaxis("right")
    right.set_yticks(positions, [f"{value:.1f} %" for value in 100 * counts.diagonal() / counts.sum(1).clip(1)])
    right.set_ylabel("accuracy of the class", labelpad=8)
    right.tick_params(length=0)
    drawn.colorbar(shown, ax=axes, label="images classified wrong", shrink=0.8)
    accuracy = 100 * counts.diagonal().sum() / counts.sum()
    drawn.suptitle(f"Confusion matrix, {accuracy:.2f} % of {counts.sum():,} test images right\n{run.title}")
    return drawn


def draw_mosaic(axes, images, titles, columns, gap, room=0, **scale):
    """Draw images, float (N, H, W), in gray on one axes, row by row, each below its title, pixel by pixel.

    gap: empty pixels about each image; room: more of them above it, for the title; NaN is no pixel; scale: vmin and
    vmax. Returns matplotlib's image and where the images begin: the rows' tops and the columns' left edges.
    """
    from torchvision.utils import make_grid

    height, width = images.shape[1:]
    roomy = F.pad(images.float(), (0, 0, room, 0), value=math.nan)
    mosaic = make_grid(roomy[:, None], nrow=columns, padding=gap, pad_value=math.nan)[0]
    tops = range(gap + room, mosaic.shape[0], height + room + gap)
    lefts = range(gap, mosaic.shape[1], width + gap)
    for title, (top, left) in zip(titles, itertools.product(tops, lefts), strict=False):
        axes.text(left + width / 2 - 0.5, top - 0.6, title, ha="center", va="bottom", fontsize=7)
    axes.set_frame_on(False)
    axes.set_anchor("N")
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    return axes.imshow(mosaic, cmap=GRAY, **scale), tops, lefts


# A linear classifier, which tells how readable the class is inside a network (Zeiler & Fergus, Table 7) --------------

RIDGE_STRENGTHS = (0.01, 0.1, 1.0)
RIDGE_IMAGES = 5000  # training images, the first


def ridge_classifiers(features, labels, classes, strengths):
    """Return a linear classifier for each strength, in closed form: ridge regression on the classes as 0 and 1.

    features: float32 (N, D); labels: int64 (N,); strengths: of the penalty on the squared weights, in multiples of the
    features' mean sum of squared deviations. Each is (weights, bias), float32 (D, classes) and (classes,); the bias
    bears no penalty.
    """
    centre, targets = features.mean(0), F.one_hot(labels, classes).float()
    centred, answers = features - centre, targets - targets.mean(0)
    is_wide = features.shape[1] > len(features)  # then the smaller system is the one between images, its dual
    products = centred @ centred.T if is_wide else centred.T @ centred
    responses = answers if is_wide else centred.T @ answers
    found, deviation = [], products.trace() / features.shape[1]
    for strength in strengths:
        penalty = strength * deviation + 1e-6  # features that are the same for all images have no deviation
        factor = torch.linalg.cholesky(products + penalty * torch.eye(len(products)))
        solved = torch.cholesky_solve(responses, factor)
        weights = (solved.T @ centred).T if is_wide else solved  # along the rows: faster than centred.T @ solved
        found.append((weights, targets.mean(0) - centre @ weights))
    return found


def readable(features, labels, test_features, test_labels, classes):
    """Return the accuracy in percent on test features of a ridge classifier that was fitted to features (N, D).

    The strength is the one of RIDGE_STRENGTHS that is best on the last fifth of the features, which are not fitted.
    """
    fitted = len(features) * 4 // 5
    found = ridge_classifiers(features[:fitted], labels[:fitted], classes, RIDGE_STRENGTHS)

    def right(classifier, features, labels):
        weights, bias = classifier
        return 100 * ((features @ weights + bias).argmax(1) == labels).double().mean().item()

    best = max(found, key=lambda classifier: right(classifier, features[fitted:], labels[fitted:]))
    return right(best, test_features, test_labels)


# Figures of a convolutional network ----------------------------------------------------------------------------------


def convolutions(model):
    """Return the names of the network's convolutions, the first one first."""
    return [name for name, layer in model.layers.named_children() if isinstance(layer, nn.Conv2d)]


def first_kernels(model):
    """Return the kernels of the first convolution, float32 (maps, height, width)."""
    return getattr(model.layers, convolutions(model)[0]).weight.detach()[:, 0].float()


def activations_of(model, images):
    """Return each convolution's activations after ReLU, by name, float32 (N, C, H, W); images: (N, H, W), 0 to 255."""
    outputs = model.outputs(images)
    return {name: F.relu(outputs[name].float()) for name in convolutions(model)}


@figure(has_convolutions)
def filters(run):
    """Draw the first convolution's kernels before and after training, on one scale."""
    start, trained = first_kernels(run.untrained_model()), first_kernels(run.model)
    drawn, limit = Figure(figsize=(WIDTH, 3.6)), max(start.abs().max(), trained.abs().max()).item()
    panels = drawn.subplots(2, 1)
    numbers = [f"{number}" for number in range(len(start))]
    for axes, (title, kernels) in zip(panels, {"at the start": start, "trained": trained}.items(), strict=True):
        picture, *_ = draw_mosaic(axes, kernels, numbers, columns=16, gap=1, room=2, vmin=-limit, vmax=limit)
        axes.set(title=title)
    drawn.colorbar(picture, ax=panels, label="weight", shrink=0.5)
    changed = int((F.cosine_similarity(start.flatten(1), trained.flatten(1)) < 0.9).sum())
    about = f"{changed} of {len(start)} kernels have changed by epoch {len(run.history)}"
    drawn.suptitle(f"{about} (cosine to their start below 0.9): {convolutions(run.model)[0]}\n{run.title}")
    return drawn


@torch.inference_mode()
def activation_statistics(model, images, batch_size=250):
    """Return statistics of each convolution's activations after ReLU over images (N, H, W).

    For each layer a dict of float64 arrays: image_mean (N,), each image's mean over maps and positions; and by feature
    map mean (C,) and std (C,) over images and positions, zeros (C,) in percent.
    """
    collected = {}
    for batch in images.split(batch_size):
        for layer, maps in activations_of(model, batch).items():
            pieces = [maps.mean((2, 3)), maps.square().mean((2, 3)), (maps == 0).float().mean((2, 3))]
            collected.setdefault(layer, []).append(torch.stack(pieces).double())
    statistics = {}
    for layer, pieces in collected.items():
        mean, square, zeros = torch.cat(pieces, dim=1).numpy()  # each (N, C)
        statistics[layer] = {
            "image_mean": mean.mean(1),
            "mean": mean.mean(0),
            "std": np.sqrt(square.mean(0) - mean.mean(0) ** 2),
            "zeros": 100 * zeros.mean(0),
        }
    return statistics


@figure(has_convolutions)
def activations(run):
    """Draw the statistics of the activations over the test images."""
    statistics = activation_statistics(run.model, run.data.test.images)
    drawn = Figure(figsize=(WIDTH, 2.6 * len(statistics)))
    for row, (layer, values) in zip(drawn.subplots(len(statistics), 3, squeeze=False), statistics.items(), strict=True):
        mean, std = values["image_mean"].mean(), values["image_mean"].std()
        row[0].hist(values["image_mean"], bins=50, color="0.6")
        row[0].axvline(mean, color="black", linewidth=1, label=f"mean {mean:.3f}")
        row[0].axvspan(mean - std, mean + std, color=AFTER, alpha=0.2, label=f"± std {std:.3f}")
        row[0].set(title=f"{layer}: across images", xlabel="mean activation of an image", ylabel="images")
        order = values["mean"].argsort()[::-1]
        ranks, means, tops = range(len(order)), values["mean"][order], (values["mean"] + values["std"])[order]
        row[1].bar(ranks, means, color="0.6", label="mean")
        row[1].vlines(ranks, means, tops, color=AFTER, linewidth=1, label="+ std")
        row[1].set(title=f"{layer}: by feature map", xlabel="feature maps, ranked by mean", ylabel="activation")
        row[2].bar(ranks, values["zeros"][order], color="0.6")
        row[2].axhline(values["zeros"].mean(), color=AFTER, linewidth=1)
        row[2].set(title=f"{layer}: zeros", xlabel="feature maps, ranked by mean", ylabel="zeros in %", ylim=(0, 100))
        for axes in row[:2]:
            axes.legend(fontsize=7)
    zeros = " and ".join(f"{values['zeros'].mean():.0f} % of {layer}'s" for layer, values in statistics.items())
    drawn.suptitle(f"{zeros} activations after ReLU are zero ({len(run.data.test.images):,} test images)\n{run.title}")
    return drawn


@torch.inference_mode()
def layer_features(model, images, batch_size=500):
    """Return the pixels of images (N, H, W) and each rectified layer by the name of what it rectifies, (N, D) each."""
    collected = {"pixels": [images.flatten(1).float() / 255]}
    for batch in images.split(batch_size):
        before = None
        for name, output in model.outputs(batch).items():
            if isinstance(getattr(model.layers, name), nn.ReLU):
                collected.setdefault(before, []).append(output.float().flatten(1))
            before = name
    return {name: torch.cat(parts) for name, parts in collected.items()}


def readable_layers(run):
    """Return how readable the class is from each layer, in percent of the test images, by layer, trained and not."""
    found, train, test = {}, run.data.train, run.data.test
    for state, model in {"trained": run.model, "untrained": run.untrained_model()}.items():
        fitted, tested = (layer_features(model, images) for images in (train.images[:RIDGE_IMAGES], test.images))
        labels = train.labels[:RIDGE_IMAGES], test.labels
        pairs = {layer: (features, labels[0], tested[layer], labels[1]) for layer, features in fitted.items()}
        found[state] = {layer: readable(*pair, len(run.data.classes)) for layer, pair in pairs.items()}
    return found


@figure(has_convolutions)
def layers(run):
    """Draw, as in Table 7, how readable the class is for a linear classifier, layer by layer, trained and untrained."""
    found = readable_layers(run)
    drawn = Figure(figsize=(WIDTH, 3.6))
    axes = drawn.subplots()
    axes.axhline(run.history[-1]["test_accuracy"], color=OTHER, linestyle="--", label="the network's own answer")
    for (state, line), colour, away in zip(found.items(), (AFTER, BEFORE), (7, -14), strict=True):
        axes.plot(*zip(*line.items(), strict=True), "o-", color=colour, label=f"{state} network")
        look = {"textcoords": "offset points", "ha": "center", "fontsize": 8, "bbox": {"color": "white", "pad": 0.5}}
        for name, value in line.items():
            axes.annotate(f"{value:.1f}", (name, value), (0, away), **look)
    axes.set(xlabel="what the linear classifier is given", ylabel="accuracy in %", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    accuracies = ", ".join(f"{layer} {value:.0f} %" for layer, value in found["trained"].items())
    drawn.suptitle(f"A ridge classifier (of {RIDGE_IMAGES:,} images) reads from {accuracies}\n{run.title}")
    rows = [(state, layer, value) for state, line in found.items() for layer, value in line.items()]
    return {"layers.png": drawn, "layers.csv": csv_text(("network", "layer", "accuracy"), rows)}


# The deconvolutional network of Zeiler & Fergus (2013), arXiv:1311.2901, section 2.1 ---------------------------------


def layers_up_to(model, layer):
    """Return the network's layers by name, from the first to the one called layer."""
    layers = dict(model.layers.named_children())
    return dict(itertools.islice(layers.items(), list(layers).index(layer) + 1))


def find_switches(model, outputs):
    """Return where each pooling's maxima stood, by its name, and the size that it pooled; outputs: by layer.

    ReLU comes before pooling here, as in the paper, whatever order training uses.
    """
    switches, before = {}, None
    for name, layer in model.layers.named_children():
        if isinstance(layer, nn.MaxPool2d):
            rectified = F.relu(outputs[before].float())
            _, places = F.max_pool2d(rectified, layer.kernel_size, layer.stride, return_indices=True)
            switches[name] = places, rectified.shape[2:]
        before = name
    return switches


def project_back(model, layer, maps, switches):
    """Project activations (N, C, H, W) of a layer back to pixels, float32 (N, 1, H, W), as in section 2.1.

    From layer to layer: unpool with the switches, rectify, filter with the transposed kernels; no biases anywhere, and
    the pixels are not rectified.
    """
    for name, each in reversed(layers_up_to(model, layer).items()):
        if isinstance(each, nn.MaxPool2d):
            places, size = switches[name]
            maps = F.max_unpool2d(maps, places, each.kernel_size, each.stride, output_size=size)
        elif isinstance(each, nn.Conv2d):
            maps = F.conv_transpose2d(F.relu(maps), each.weight, stride=each.stride, padding=each.padding)
    return maps


def strongest_alone(maps, feature_maps):
    """Return maps (N, C, H, W) with one value kept an image: the strongest of its map in feature_maps, int64 (N,)."""
    images, kept = torch.arange(len(maps)), torch.zeros(maps.shape)
    strengths, positions = maps[images, feature_maps].flatten(1).max(1)
    kept.flatten(2)[images, feature_maps, positions] = strengths
    return kept


@torch.inference_mode()
def deconvolve(model, images, layer, feature_maps):
    """Show what excites a feature map most: project its strongest activation back to pixels (section 2.1).

    images: (N, H, W), 0 to 255; layer: a convolution or a pooling; feature_maps: int64 (N,), one an image.
    Returns float32 (N, 1, H, W).
    """
    outputs = model.outputs(images)
    alone = strongest_alone(F.relu(outputs[layer].float()), feature_maps)
    return project_back(model, layer, alone, find_switches(model, outputs))


class Exciting(NamedTuple):
    """The images that excite each feature map of a layer most, strongest first, each (count, C).

    strengths: float32 activations; images: int64 numbers; rows, columns: int64, the activation's place in the map.
    """

    strengths: torch.Tensor
    images: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


@torch.inference_mode()
def most_exciting(model, images, count=9, batch_size=250):
    """Return the Exciting images for each convolution, by name, found in one pass over images (N, H, W)."""
    collected, widths = {}, {}
    for batch in images.split(batch_size):
        for layer, maps in activations_of(model, batch).items():
            strongest = F.max_pool2d(maps, maps.shape[2:], return_indices=True)
            collected.setdefault(layer, []).append([values.flatten(1) for values in strongest])
            widths[layer] = maps.shape[3]
    found = {}
    for layer, batches in collected.items():
        strengths, positions = (torch.cat(parts) for parts in zip(*batches, strict=True))  # each (N, C)
        strengths, numbers = strengths.topk(count, dim=0)
        positions, width = positions.gather(0, numbers), widths[layer]
        found[layer] = Exciting(strengths, numbers, positions // width, positions % width)
    return found


def receptive_field(model, layer):
    """Return (size, stride, offset) in pixels: unit i of the layer sees the pixels from offset + stride * i on."""
    size, stride, offset = 1, 1, 0
    for each in layers_up_to(model, layer).values():
        if isinstance(each, nn.Conv2d):
            kernel, step, padding = each.kernel_size[0], each.stride[0], each.padding[0]
        elif isinstance(each, nn.MaxPool2d):
            kernel, step, padding = each.kernel_size, each.stride, each.padding
        else:
            continue
        offset -= padding * stride
        size += (kernel - 1) * stride
        stride *= step
    return size, stride, offset


def cut_patches(model, layer, images, rows, columns):
    """Cut the receptive field of a unit out of each image (N, H, W): float32 (N, size, size), NaN outside the image.

    rows, columns: int64 (N,), the units' places in a map of the layer.
    """
    size, stride, offset = receptive_field(model, layer)
    padded = F.pad(images.float(), (size,) * 4, value=math.nan)
    corners = (size + offset + stride * torch.stack([rows, columns], dim=1)).tolist()
    cut = [image[y : y + size, x : x + size] for (y, x), image in zip(corners, padded, strict=True)]
    return torch.stack(cut)


def exciting_patches(model, layer, images, exciting, feature_maps):
    """Return the reconstructions from the images that excite some feature maps most, and these images' patches.

    feature_maps: int64 (M,). Both float32 (M, count, size, size), cut to the units' receptive fields.
    """
    numbers, rows, columns = (values[:, feature_maps].T.flatten() for values in exciting[1:])
    repeated = feature_maps.repeat_interleave(len(exciting.images))
    reconstructions = deconvolve(model, images[numbers], layer, repeated).squeeze(1)
    patches = [cut_patches(model, layer, pictures, rows, columns) for pictures in (reconstructions, images[numbers])]
    return [cut.unflatten(0, (len(feature_maps), -1)) for cut in patches]


def scaled(images, quantile=1.0):
    """Divide images (M, ...) by a quantile of their absolute values, NaN aside: black is -1, white 1."""
    limits = images.abs().flatten(1).nanquantile(quantile, dim=1).clamp(min=1e-12)
    return (images / limits.view(-1, *[1] * (images.dim() - 1))).clamp(-1, 1)


def inside_first(model, layer, exciting, image_size, count):
    """Return the count feature maps, int64 in rising order, whose exciting patches lie inside the image most often.

    Of maps that are equal in that, the strongest.
    """
    size, stride, offset = receptive_field(model, layer)
    starts = torch.stack([offset + stride * places for places in (exciting.rows, exciting.columns)])
    inside = ((starts >= 0) & (starts + size <= image_size)).all(0).sum(0)  # (C,)
    strength = exciting.strengths[0] / exciting.strengths[0].max()
    return (inside + strength).topk(min(count, len(inside))).indices.sort().values


def draw_pairs(reconstructions, patches, titles, columns=4):
    """Draw each feature map's reconstructions, on a scale of their own, beside the patches, both (M, 9, size, size)."""
    from torchvision.utils import make_grid

    gray, sheet = 0.5 + 0.5 * scaled(reconstructions, quantile=0.995), {"nrow": 3, "padding": 1, "pad_value": math.nan}
    pairs = zip(gray, patches / 255, strict=True)
    blocks = torch.stack([torch.cat([make_grid(each[:, None], **sheet)[0] for each in pair], 1) for pair in pairs])
    height, width = blocks.shape[1:]
    room, rows = height // 6, math.ceil(len(blocks) / columns)
    drawn = Figure(figsize=(WIDTH, rows / columns * WIDTH * (height + room + 4) / (width + 4) + 0.6))
    axes = drawn.subplots()
    draw_mosaic(axes, blocks, titles, columns, gap=4, room=room, vmin=0, vmax=1)
    axes.set_title("left: reconstructions, zero gray, each map scaled alone; right: patches, tinted outside the image")
    return drawn


def maps_inside(run, count):
    """Return the maps of inside_first by layer, without the first one's, whose reconstructions are its kernels."""
    layers, size = list(run.exciting)[1:], run.data.test.images.shape[1]
    return {layer: inside_first(run.model, layer, run.exciting[layer], size, count) for layer in layers}


@figure(has_convolutions)
def deconv(run, count=16):
    """Draw, as in Fig. 2, what excites feature maps most: reconstructions beside patches of the images."""
    images, made = run.data.test.images, {}
    for layer, maps in maps_inside(run, count).items():
        reconstructions, patches = exciting_patches(run.model, layer, images, run.exciting[layer], maps)
        drawn = draw_pairs(reconstructions, patches, [f"map {number}" for number in maps])
        values = reconstructions.nan_to_num().flatten(2)
        alike = F.cosine_similarity(values[:, 1:], values[:, :1], dim=2).mean()
        about = f"What excites {len(maps)} maps of {layer} most (reconstructions within a map: cosine {alike:.2f})"
        drawn.suptitle(f"{about}\n{run.title}")
        made[f"deconv_{layer}.png"] = drawn
    return made


def evolving_patches(models, strongest, images, maps):
    """Return each model's strongest reconstruction of some feature maps, of the image that excites it most.

    strongest: most_exciting of each model; images: (N, H, W); maps: int64 (M,) by layer. Returns by layer the
    reconstructions, float32 (M, models, size, size) cut to the receptive field, and the strengths, (M, models).
    """
    found = {layer: [] for layer in maps}
    for model, exciting in zip(models, strongest, strict=True):
        for layer, chosen in maps.items():
            reconstructions, _ = exciting_patches(model, layer, images, exciting[layer], chosen)
            found[layer].append((reconstructions[:, 0], exciting[layer].strengths[0, chosen]))
    return {layer: [torch.stack(parts, 1) for parts in zip(*pairs, strict=True)] for layer, pairs in found.items()}


@figure(has_convolutions)
def evolution(run, count=8, epochs=(0, 1, 2, 5)):
    """Draw, as in Fig. 4, the strongest reconstruction of some feature maps as training goes on."""
    images, last = run.data.test.images, len(run.history)
    epochs = [*(epoch for epoch in epochs if epoch < last), last]
    maps = maps_inside(run, count)
    models = [*map(run.snapshot, epochs[:-1]), run.model]
    strongest = [*(most_exciting(model, images, count=1) for model in models[:-1]), run.exciting]
    evolved = evolving_patches(models, strongest, images, maps)
    drawn = Figure(figsize=(WIDTH, 1.15 * len(epochs) * len(maps) + 1))
    panels = drawn.subplots(len(maps), squeeze=False).flat
    for axes, (layer, (pictures, strengths)) in zip(panels, evolved.items(), strict=True):
        titles, size = [f"{strength:.2g}" for strength in strengths.T.flatten()], pictures.shape[-1]
        flat, room = scaled(pictures.transpose(0, 1).flatten(0, 1)), math.ceil(size / 5)
        _, tops, lefts = draw_mosaic(axes, flat, titles, len(pictures), math.ceil(size / 8), room, vmin=-1, vmax=1)
        axes.set_xticks([left + size / 2 - 0.5 for left in lefts], [f"map {number}" for number in maps[layer]])
        axes.set_yticks([top + size / 2 - 0.5 for top in tops], epochs)
        values = pictures.nan_to_num().flatten(2)
        grown = ", ".join(f"{cosine:.2f}" for cosine in F.cosine_similarity(values, values[:, -1:], dim=2).mean(0))
        axes.set(ylabel="after epoch (0: untrained)", title=f"{layer}, mean cosine to the last row: {grown}")
    drawn.suptitle(f"Strongest reconstructions by epoch, each on its own scale, its activation above\n{run.title}")
    return drawn


# Invariance and occlusion, after Zeiler & Fergus (2013), and Gabor functions -----------------------------------------

# The amounts of Fig. 5: pixels downwards, times as large, degrees counterclockwise.
TRANSFORMATIONS = {
    "vertical shift in pixels": torch.arange(-8, 9),
    "scale": torch.linspace(1, 1.8, 17),
    "rotation in degrees": torch.arange(0, 361, 15),
}


def transform(images, kind, amount):
    """Return images (N, H, W) shifted, scaled or turned about their centre; what comes in repeats the edge.

    kind: one of TRANSFORMATIONS; amount: in its unit.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import affine

    room = images.shape[-1] // 2
    padded = F.pad(images[:, None].float(), (room,) * 4, mode="replicate")
    chosen = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0]}
    if kind == "scale":
        chosen["scale"] = float(amount)
    elif kind == "rotation in degrees":
        chosen["angle"] = -float(amount)
    else:
        chosen["translate"] = [0, int(amount)]
    return affine(padded, interpolation=InterpolationMode.BILINEAR, **chosen)[:, 0, room:-room, room:-room]


@torch.inference_mode()
def sensitivity(model, images, labels, kind):
    """Return how transformed images differ for the network from the untransformed ones (section 4.1).

    images: (N, H, W); labels: int64 (N,). Returns three float32 (amounts, N): the Euclidean distances of the first
    rectified layer's features and of the last one's, relative to the norm of the untransformed image's, and 1 where the
    class is found, else 0.
    """
    rectified = [name for name, layer in model.layers.named_children() if isinstance(layer, nn.ReLU)]

    def features(images):
        outputs = model.outputs(images)
        *_, logits = outputs.values()
        return [outputs[name].float().flatten(1) for name in (rectified[0], rectified[-1])], logits

    original, rows = features(images)[0], []
    for amount in TRANSFORMATIONS[kind]:
        moved, logits = features(transform(images, kind, amount))
        pairs = zip(moved, original, strict=True)
        distances = [(after - before).norm(dim=1) / before.norm(dim=1) for after, before in pairs]
        rows.append(torch.stack([*distances, (logits.argmax(1) == labels).float()]))
    return torch.stack(rows, dim=1)


@figure(has_convolutions)
def invariance(run, count=500):
    """Draw, as in Fig. 5, what shifting, scaling and turning images does to features and accuracy."""
    images, labels = (tensor[:count] for tensor in run.data.test)
    drawn = Figure(figsize=(WIDTH, 5.2))
    grid = drawn.subplots(2, 3, sharey="row", sharex="col")
    for (top, bottom), (kind, amounts) in zip(grid.T, TRANSFORMATIONS.items(), strict=True):
        *distances, right = sensitivity(run.model, images, labels, kind)
        for values, name, colour in zip(distances, ("first", "last hidden"), (OTHER, AFTER), strict=True):
            low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)
            top.fill_between(amounts, low, high, color=colour, alpha=0.2, linewidth=0)
            top.plot(amounts, middle, color=colour, label=f"{name} layer")
        bottom.plot(amounts, 100 * right.mean(1), color="black")
        bottom.set(xlabel=kind, ylim=(0, 100))
        for axes in (top, bottom):
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("distance / norm of the features\n(median, middle 80 %)")
    grid[0, 0].legend()
    grid[1, 0].set_ylabel("accuracy in %")
    away, found = grid[1, 0].lines[0].get_data()
    about = f"Of {len(images)} test images {found[away == 0][0]:.0f} % are classified right, {away[-1]} pixels lower"
    drawn.suptitle(f"{about} {found[-1]:.0f} %\n{run.title}")
    return drawn


def first_right_of_each_class(run):
    """Return the number of the first test image of each class that is classified right, if none the first, int64."""
    labels = run.data.test.labels
    right = run.probabilities.argmax(1) == labels
    members = [(labels == label).nonzero()[:, 0] for label in range(len(run.data.classes))]
    return torch.stack([numbers[right[numbers].int().argmax()] for numbers in members])


def occluded(image, size):
    """Return an image (1, H, W), 0 to 255, with a gray square of that size centred on each pixel, (H * W, H, W)."""
    height, width = image.shape[1:]
    away = [torch.arange(n)[None] - torch.arange(n)[:, None] + size // 2 for n in (height, width)]  # centre, pixel
    rows, columns = ((distance >= 0) & (distance < size) for distance in away)
    hidden = rows[:, None, :, None] & columns[None, :, None, :]
    return torch.where(hidden.view(-1, height, width), 127.5, image.float())


@torch.inference_mode()
def occlude(model, image, label, size):
    """Slide a gray square over an image (1, H, W), its centre on each pixel in turn (section 4.2).

    Returns the probability of the true class, the most probable class, int64, a feature map's sum, each (H, W), and the
    map's number: the one of the last convolution with the highest peak without the square.
    """
    layer = convolutions(model)[-1]
    feature_map = model.outputs(image)[layer].amax((0, 2, 3)).argmax()
    probabilities, activity = [], []
    for batch in occluded(image, size).split(256):
        outputs = model.outputs(batch)
        *_, logits = outputs.values()
        probabilities.append(logits.float().softmax(1))
        activity.append(F.relu(outputs[layer][:, feature_map].float()).sum((1, 2)))
    probabilities, shape = torch.cat(probabilities), image.shape[1:]
    found = probabilities[:, label], probabilities.argmax(1), torch.cat(activity)
    return *(values.view(shape) for values in found), int(feature_map)


def most_vulnerable(run, size, count):
    """Return the numbers of those of first_right_of_each_class whose class a square hides most often, int64."""
    chosen, classes = first_right_of_each_class(run), run.data.test.labels
    hidden = [occluded(run.data.test.images[number][None], size)[::7] for number in chosen]
    right = [(predict(run.model, each).argmax(1) == classes[n]).sum() for each, n in zip(hidden, chosen, strict=True)]
    return chosen[torch.stack(right).argsort()[:count]]


@figure(has_convolutions)
def occlusion(run, size=8, count=2):
    """Draw, as in Fig. 7, what hiding each part of an image does, of the images that it changes most."""
    chosen, layer = most_vulnerable(run, size, count).tolist(), convolutions(run.model)[-1]
    classes, colours = run.data.classes, matplotlib.colormaps["tab10"]
    drawn, changed = Figure(figsize=(WIDTH, 2.2 * len(chosen) + 0.6)), []
    for row, number in zip(drawn.subplots(len(chosen), 5, squeeze=False), chosen, strict=True):
        image, label = run.data.test.images[number][None], int(run.data.test.labels[number])
        probability, predicted, activity, feature_map = occlude(run.model, image, label, size)
        reconstruction = deconvolve(run.model, image, layer, torch.tensor([feature_map]))[0, 0]
        limit = reconstruction.abs().max().item() or 1
        row[0].imshow(occluded(image, size)[image.numel() // 2 + image.shape[2] // 2], cmap="gray", vmin=0, vmax=255)
        row[1].imshow(reconstruction, cmap="gray", vmin=-limit, vmax=limit)
        changed.append(f"{100 * (predicted != label).float().mean():.0f} % ({classes[label]})")
        for picture in (row[2].imshow(activity), row[3].imshow(probability, vmin=0, vmax=1)):
            drawn.colorbar(picture, orientation="horizontal", fraction=0.06).ax.tick_params(labelsize=6)
        row[4].imshow(predicted, cmap=colours, vmin=-0.5, vmax=9.5)
        named = predicted.unique().tolist()
        handles = [matplotlib.patches.Patch(color=colours(name), label=classes[name]) for name in named]
        row[4].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=6, ncols=2)
        row[0].set_ylabel(classes[label])
        row[1].set_xlabel(f"{layer}, map {feature_map}", fontsize=7, labelpad=1)
        heads = "image, with the square", "reconstruction", "the map's activity", "p(true class)", "most probable class"
        for axes, head in zip(row, heads, strict=True):
            axes.set(xticks=[], yticks=[], anchor="N")
            axes.set_title(head if number == chosen[0] else "", fontsize=8)
    drawn.suptitle(f"A gray {size} x {size} square changes the answer at {', '.join(changed)} of places\n{run.title}")
    return drawn


GABOR_STARTS = 24  # for each kernel; the best fit counts
GABOR = ("kernels", "feature_map", "r2", "orientation_degrees", "cycles_per_pixel", "cosine_to_start")


class GaborFit(NamedTuple):
    """Gabor functions fitted to kernels: fitted, float32 (K, size, size), and for each kernel, float32 (K,):

    r2: 1 - squared error / squared deviation from the kernel's mean; orientation: of the wave, in degrees from 0 to 180
    counterclockwise from the horizontal; frequency: in cycles a pixel.
    """

    fitted: torch.Tensor
    r2: torch.Tensor
    orientation: torch.Tensor
    frequency: torch.Tensor


def gabor_parameters(free, size):
    """Turn free numbers (6, ...) into centre x and y, widths s and t, frequency and angle, each within its bounds.

    The centre stays on the kernel, the widths between half a pixel and size, the frequency below half a cycle a pixel.
    """
    x, y, s, t, frequency = free[:5].sigmoid()
    centre, widths = [(share - 0.5) * (size - 1) for share in (x, y)], [0.5 + (size - 0.5) * share for share in (s, t)]
    return *centre, *widths, 0.5 * frequency, free[5]


def gabor_waves(size, centre_x, centre_y, s, t, frequency, angle):
    """Return exp(-u^2 / 2s^2 - v^2 / 2t^2) times cos and sin of 2 pi frequency u, each (..., size * size).

    u, v: the pixel's distance from the centre along and across the wave, in pixels, y upwards.
    """
    steps = torch.arange(size) - (size - 1) / 2
    x, y = steps.repeat(size) - centre_x, -steps.repeat_interleave(size) - centre_y
    u, v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    envelope, phase = torch.exp(-((u / s) ** 2 + (v / t) ** 2) / 2), 2 * math.pi * frequency * u
    return envelope * phase.cos(), envelope * phase.sin()


def closest_sum(targets, even, odd, ridge=1e-6):
    """Return the a * even + b * odd that is closest to the targets, all (..., pixels), by linear least squares."""
    dot = lambda p, q: (p * q).sum(-1, keepdim=True)  # noqa: E731
    ee, oo, eo = dot(even, even) + ridge, dot(odd, odd) + ridge, dot(even, odd)
    et, ot = dot(even, targets), dot(odd, targets)
    return ((oo * et - eo * ot) * even + (ee * ot - eo * et) * odd) / (ee * oo - eo**2)


def fit_gabor(kernels, steps=300, seed=0):
    """Fit a 2-D Gabor function to each kernel, float32 (K, size, size), by least squares; return the GaborFit.

    Adam moves the six parameters of gabor_parameters from GABOR_STARTS starts; amplitude and phase follow linearly.
    """
    size, targets = kernels.shape[1], kernels.flatten(1)[:, None]
    generator = torch.Generator().manual_seed(seed)
    free = (1.5 * torch.randn(6, len(kernels), GABOR_STARTS, 1, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    for _ in range(steps):
        fitted = closest_sum(targets, *gabor_waves(size, *gabor_parameters(free, size)))
        errors = (fitted - targets).square().sum(-1)
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        fitted = closest_sum(targets, *gabor_waves(size, *gabor_parameters(free, size)))
        errors = (fitted - targets).square().sum(-1)
        every, best = torch.arange(len(kernels)), errors.argmin(1)
        variation = (targets - targets.mean(-1, keepdim=True)).square().sum(-1)[:, 0]
        frequency, angle = (values[every, best, 0] for values in gabor_parameters(free, size)[4:])
    r2 = 1 - errors[every, best] / variation
    return GaborFit(fitted[every, best].view_as(kernels), r2, torch.rad2deg(angle) % 180, frequency)


def gabor_fits(trained, untrained):
    """Return kernels, float32 (K, size, size), and their GaborFit, by name: trained and untrained."""
    together = fit_gabor(torch.cat([trained, untrained]))
    fits = itertools.starmap(GaborFit, zip(*(values.split(len(trained)) for values in together), strict=True))
    return dict(zip(("trained", "untrained"), zip((trained, untrained), fits, strict=True), strict=True))


@figure(has_convolutions)
def gabor(run, best=8):
    """Draw the kernels that Gabor functions fit best, the fits and the residuals, and R² of all."""
    fits = gabor_fits(first_kernels(run.model), first_kernels(run.untrained_model()))
    kernels, fit = fits["trained"]
    chosen, limit = fit.r2.topk(min(best, len(kernels))).indices, kernels.abs().max().item()
    strips = torch.stack([kernels[chosen], fit.fitted[chosen], (kernels - fit.fitted)[chosen]]).flatten(0, 1)
    titles = [f"{n}: {fit.r2[n]:.2f}\n{fit.orientation[n]:.0f}°, {fit.frequency[n]:.2f}" for n in chosen]
    drawn = Figure(figsize=(WIDTH, 5.4))
    top, bottom = drawn.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = top.subplots()
    _, tops, _ = draw_mosaic(axes, strips, titles, len(chosen), 1, room=2, vmin=-limit, vmax=limit)
    axes.set_yticks([top + kernels.shape[1] / 2 for top in tops], ["kernel", "fit", "residual"])
    axes.set(xlabel="above each: map, R², orientation, cycles a pixel")
    axes = bottom.subplots()
    for (name, (_, each)), colour in zip(fits.items(), (AFTER, BEFORE), strict=True):
        axes.ecdf(each.r2, color=colour, label=f"{name}: median {np.median(each.r2):.2f}")
    axes.set(xlabel="R² of the Gabor fit", ylabel="share of kernels")
    axes.legend()
    axes.grid(alpha=0.3)
    medians = "{:.2f}, those of untrained ones {:.2f}".format(*(np.median(each.r2) for _, each in fits.values()))
    drawn.suptitle(f"Gabor fits to the kernels of {convolutions(run.model)[0]}: median R² {medians}\n{run.title}")
    start, rows = fits["untrained"][0].flatten(1), []
    for name, (each, fit) in fits.items():
        cosines = F.cosine_similarity(each.flatten(1), start)
        rows += [(name, n, *map(float, row)) for n, row in enumerate(zip(*fit[1:], cosines, strict=True))]
    return {"gabor.png": drawn, "gabor.csv": csv_text(GABOR, rows)}


# Inside the recurrent networks ---------------------------------------------------------------------------------------


def states_by_row(model, images):
    """Yield the state after each row of images (N, H, W): hidden and, of an LSTM, cell, each (layers, N, units)."""
    state = None
    for row in model.rows(images).split(1, dim=1):
        _, state = model.recurrent(row, state)
        yield state if isinstance(state, tuple) else (state,)


def gradient_norms(model, images, labels):
    """Return how strongly the loss depends on the state after each step, float32 (steps,).

    images: (N, H, W), 0 to 255; labels: int64 (N,). It is the Euclidean norm of the gradient of an image's loss with
    respect to all that the next step reads, of both layers and of an LSTM hidden and cell state (after the last step:
    the output), averaged over images. The rows are fed one at a time, so that every state stands in the graph.
    """
    states = list(states_by_row(model, images))
    losses = F.cross_entropy(model.fc(states[-1][0][-1]), labels, reduction="none")
    gradients = torch.autograd.grad(losses.sum(), list(itertools.chain(*states)), materialize_grads=True)
    squares = torch.stack([gradient.square().sum((0, 2)) for gradient in gradients])
    return squares.view(len(states), -1, len(images)).sum(1).sqrt().mean(1)


def gradients_by_epoch(run, images=1000):
    """Return rows (epoch, norms step by step): the gradient_norms of the first test images.

    Of the untrained network, epoch 0, and after every epoch of which the weights were kept.
    """
    last, test = len(run.history), [tensor[:images] for tensor in run.data.test]
    kept = [epoch for epoch in range(1, last) if (run.folder / "snapshots" / f"epoch_{epoch:02d}.pt").exists()]
    models = {0: run.untrained_model(), **{epoch: run.snapshot(epoch) for epoch in kept}, last: run.model}
    return [(epoch, *gradient_norms(model, *test).tolist()) for epoch, model in models.items()]


GRADIENT_FLOOR = 1e-16


def gradient_lines(rows):
    """Return the norms of at least GRADIENT_FLOOR, float64 (steps,), by epoch; rows: (epoch, norms step by step)."""
    return {int(epoch): np.array(norms, dtype=float).clip(min=GRADIENT_FLOOR) for epoch, *norms in rows}


def reach(norms):
    """Return the share of the last step's gradient that reaches the first."""
    return norms[0] / norms[-1]


@figure(is_recurrent)
def gradients(run):
    """Draw how far back the loss reaches into the state, a line an epoch."""
    rows, last = gradients_by_epoch(run), len(run.history)
    lines = gradient_lines(rows)
    drawn = Figure(figsize=(WIDTH, 3.4))
    axes, named = drawn.subplots(), {0: "untrained", last: f"after epoch {last}"}
    for (epoch, norms), colour in zip(lines.items(), shades(len(lines)), strict=True):
        axes.semilogy(range(1, len(norms) + 1), norms, color=colour, label=named.get(epoch))
    axes.set(xlabel="step: rows read", ylabel="norm of the loss gradient")
    axes.grid(alpha=0.3)
    axes.legend(title="a line an epoch")
    about = f"Of the loss gradient {100 * reach(lines[last]):.2g} % reaches the first row"
    drawn.suptitle(f"{about}, {100 * reach(lines[0]):.2g} % before training\n{run.title}")
    return {"gradients.png": drawn, "gradients.csv": csv_text(("epoch", *range(1, len(rows[0]))), rows)}


@torch.inference_mode()
def probabilities_by_row(model, images, batch_size=1000):
    """Return the class probabilities after each row that is read of images (N, H, W), float32 (N, steps, classes).

    They are what the last layer makes of the top layer's output after that row.
    """
    outputs = (model.recurrent(model.rows(batch))[0] for batch in images.split(batch_size))
    return torch.cat([model.fc(each).softmax(-1) for each in outputs])


@torch.inference_mode()
def readable_by_row(model, train, test, classes):
    """Return how readable the class is from all that the network carries on after each row, in percent, list of float.

    train, test: the Splits to which the linear classifier is fitted and on which it is judged.
    """
    both = (states_by_row(model, split.images) for split in (train, test))
    pairs = (
        [torch.cat([part.movedim(0, 1).flatten(1) for part in state], dim=1) for state in states]
        for states in zip(*both, strict=True)
    )
    return [readable(fitted, train.labels, tested, test.labels, classes) for fitted, tested in pairs]


@figure(is_recurrent)
def reading(run, count=5):
    """Draw what the network answers as it reads, row after row, and what its state knows."""
    images, labels = run.data.test
    probabilities = probabilities_by_row(run.model, images)
    answered = 100 * (probabilities.argmax(2) == labels[:, None]).double().mean(0)
    train = run.data.train._make(tensor[:RIDGE_IMAGES] for tensor in run.data.train)
    known = readable_by_row(run.model, train, run.data.test, len(run.data.classes))
    chosen, rows = first_right_of_each_class(run)[::2][:count].tolist(), len(answered)
    drawn = Figure(figsize=(WIDTH, 6.4))
    top, bottom = drawn.subfigures(2, 1, height_ratios=(2, 1))
    for number, (picture, heat) in zip(chosen, top.subplots(2, len(chosen), height_ratios=(1, 1.4)).T, strict=True):
        steps, ticks = (rows + 0.5, 0.5), [1, rows // 2, rows]
        shown = run.model.rows(images[number][None])[0]
        picture.imshow(shown, cmap="gray", extent=(0.5, shown.shape[1] + 0.5, *steps))
        picture.set(xticks=[], yticks=ticks, title=f"a {run.data.classes[labels[number]]}")
        extent = (-0.5, probabilities.shape[2] - 0.5, *steps)
        shown = heat.imshow(probabilities[number], cmap="viridis", vmin=0, vmax=1, extent=extent, aspect="auto")
        heat.set(xticks=range(probabilities.shape[2]), yticks=ticks, xlabel="class")
        heat.tick_params(axis="x", labelsize=7)
        if number == chosen[0]:
            picture.set_ylabel("row")
            heat.set_ylabel("rows read")
    top.colorbar(shown, ax=top.axes, label="probability of the class", shrink=0.6)
    axes = bottom.subplots()
    says = {"what its state knows (a linear classifier on it)": known, "what the network answers": answered}
    for (name, values), colour in zip(says.items(), (OTHER, AFTER), strict=True):
        axes.plot(range(1, rows + 1), values, marker=".", color=colour, label=name)
    axes.set(xlabel="rows read", ylabel=f"accuracy in % over\n{len(labels):,} test images", ylim=(0, 100))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    half = rows // 2
    about = f"its state suffices for {known[half - 1]:.0f} % of the images, its answer for {answered[half - 1]:.0f} %"
    drawn.suptitle(f"After {half} of {rows} rows {about}\n{run.title}")
    table = csv_text(("rows", "known", "answered"), zip(range(1, rows + 1), known, answered.tolist(), strict=True))
    return {"reading.png": drawn, "reading.csv": table}


# Several runs compared, by setting -----------------------------------------------------------------------------------

UNUSUAL = {"rows_before", "rows_after", "keep_bias", "pixels", "without"}  # settings, of which a picture shows one


class Group(list):
    """The SavedRuns of one setting, a run for each seed, and the epoch after which they are compared.

    accuracies: after it, of test images in percent; reported: the reference report's, None where none is comparable.
    """

    def __init__(self, runs, epoch):
        super().__init__(runs)
        self.config, self.epoch, known = self[0].config.group, epoch, utils.find_reported(self[0], epoch, REPORT)
        self.accuracies = [run.test_accuracy(epoch) for run in self]
        self.reported = None if known.remark else known.accuracy


def group_runs(runs):
    """Return the Groups of runs in the rising order of their settings; those that are left out are named.

    All are compared after the reference report's epoch or, before it, the last that one of them has.
    """

    def in_order(run):  # choices as they are listed; the seed comes last
        values = [list(one.choices).index(value) if one.choices else value for one, value in run.config.settings()]
        return run.config.script, [(value is not None, value) for value in values]

    experiments, epoch = {}, min(REPORT_EPOCHS, max(len(run.history) for run in runs))
    for run in sorted(runs, key=lambda run: -len(run.history)):
        counted = experiments.setdefault((run.config, run.source), run)
        if counted is not run:
            tell(f"{run.folder} is left out: {counted.folder} is the same experiment, and of no fewer epochs")
    short = [run for run in experiments.values() if len(run.history) < epoch]
    if short:
        tell(f"compared after epoch {epoch}; left out, of fewer epochs: {', '.join(str(run.folder) for run in short)}")
    compared = sorted((run for run in experiments.values() if run not in short), key=in_order)
    return [Group(found, epoch) for found in utils.grouped(compared)]


def tell_apart(configs):
    """Return in words what tells each Config from the others, usual values too, and what all have in common."""
    said, every = [config.words() for config in configs], []
    for config in configs:
        words = {one.name: one.in_words(value) for one, value in config.settings() if one.name != "seed"}
        every.append({"network": config.network, **words})
    names = dict.fromkeys(name for words in said for name in words)
    differing = [name for name in names if len({words.get(name) for words in every}) > 1]
    own = [", ".join(text for name, text in words.items() if name in differing and text) for words in every]
    return own, ", ".join(words for name, words in said[0].items() if name not in (*differing, "seed"))


def labels_of(groups):
    """Return tell_apart of groups; what they have in common names embedded data, too."""
    own, common = tell_apart([group.config for group in groups])
    return own, (common + groups[0][0].source).removeprefix(", ")


def families_of(groups, name):
    """Return lists of at least two groups that differ in the setting called name alone, in its rising order."""
    families = {}
    for group in groups:
        rest = [(one.name, value) for one, value in group.config.settings() if one.name != name]
        if len(rest) < len(group.config.settings()):
            families.setdefault((group.config.script, *rest), []).append(group)
    return [family for family in families.values() if len(family) > 1]


def usual(groups, name=""):
    """Return the groups in which the settings of UNUSUAL but name have their defaults, or all where none has."""
    special = [{one.name for one, value in group.config.settings() if value != one.default} for group in groups]
    found = [group for group, names in zip(groups, special, strict=True) if not names & UNUSUAL - {name}]
    return found or groups


def colour_of(group):
    """Return the colour of a group's network; one without a colour of its own is black."""
    return NETWORK_COLOURS.get(group.config.network.partition(" ")[0], "black")


def shades(count):
    """Return as many colours, from dark to light."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))


def scale_of(axes, groups, label):
    """Label an axes of a picture of groups, and return what turns a metric's values into what is drawn on it.

    Losses on a log axis; accuracies in percent or, where the means of all groups are high, errors on a log axis.
    """
    is_loss, are_high = "loss" in label, min(np.mean(group.accuracies) for group in groups) > 90
    axes.set_ylabel(label.replace("accuracy", "error in % (log)" if are_high else "accuracy in %"))
    if is_loss or are_high:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(alpha=0.3, which="both")
    return np.asarray if is_loss or not are_high else lambda accuracies: np.maximum(100 - np.asarray(accuracies), 1e-3)


def draw_epochs(axes, groups, everything, column="test_accuracy"):
    """Draw a column of metrics.csv by epoch for each group: the mean over seeds in a band that spans them.

    Crosses: what the reference report gives; everything: all groups of the picture.
    """
    lines = [[[row[column] for row in run.history[: group.epoch]] for run in group] for group in groups]
    drawn_as = scale_of(axes, everything, column.replace("_", " "))
    own = list(map(colour_of, groups))  # the networks' colours, where these differ
    colours = own if len(set(own)) == len(own) else shades(len(own))
    for group, label, colour, values in zip(groups, labels_of(groups)[0], colours, map(drawn_as, lines), strict=True):
        epochs = range(1, group.epoch + 1)
        axes.plot(epochs, values.mean(0), color=colour, marker=".", markersize=4, label=label)
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        if column == "test_accuracy" and group.reported:
            axes.plot(REPORT_EPOCHS, drawn_as(group.reported), "x", color=colour, markersize=7, markeredgewidth=2)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def draw_panels(panels, draw, about, columns=3, handles=(), sharey=False):
    """Return a Figure with a panel for each (title, content), drawn by draw(axes, content), and a legend of handles."""
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(WIDTH, 2.8 * rows + 0.5 + 0.08 * len(handles)))
    places = drawn.subplots(rows, columns, sharey=sharey, squeeze=False).flat
    for (title, content), axes in zip(panels, places, strict=False):
        axes.grid(alpha=0.3)
        draw(axes, content)
        axes.set_title(title)
        if sharey and not axes.get_subplotspec().is_first_col():
            axes.set_ylabel("")
    for axes in places:  # what is left of the last row
        axes.set_axis_off()
    if handles:
        drawn.legend(handles=handles, loc="outside lower center", ncols=3)
    drawn.suptitle(about)
    return drawn


def draw_families(families, columns, draw, about, sharey=False):
    """Return draw_panels of families of groups, drawn by draw(axes, family, all groups); None for no family."""
    everything, panels = list(itertools.chain(*families)), []
    columns = math.ceil(len(families) / max(1, math.ceil(len(families) / columns)))  # of rows as long as each other
    for family in families:
        whole = labels_of(family)[1].replace(" ", "_").replace(",_", ", ")  # lines end at commas
        panels.append((textwrap.fill(whole, 90 // columns).replace("_", " "), family))
    draw = partial(draw, everything=everything)
    return draw_panels(panels, draw, about, columns, sharey=sharey) if panels else None


@comparison("curves")
def compare_curves(groups, most=6):
    """Draw test accuracy by epoch: up to six settings beside each other, of more a panel for each question."""
    about = "mean over seeds, the band spans them; crosses: the reference report"
    if groups[0].epoch == 1:  # a point says less than the other pictures
        return None
    if len(groups) <= most:
        drawn = Figure(figsize=(WIDTH, 3.8))
        for axes, column in zip(drawn.subplots(1, 2), ("test_accuracy", "train_loss"), strict=True):
            draw_epochs(axes, groups, groups, column)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        common = labels_of(groups)[1]
        drawn.suptitle(f"Accuracy and loss by epoch{': ' * bool(common)}{common}\n{about}")
        return drawn

    def draw(axes, family, everything):
        draw_epochs(axes, family, everything)
        axes.margins(y=0.2)
        axes.legend(fontsize=7, loc="lower right", ncols=2)

    names = dict.fromkeys(name for group in groups for name in vars(group.config))
    families = [family for name in names for family in families_of(usual(groups), name)]
    legible = [family[start : start + most] for family in families for start in range(0, len(family), most)]
    return draw_families(legible, 2, draw, f"Each panel varies one setting: {about}")


def draw_seeds(axes, groups, everything, name):
    """Draw the accuracy of every seed for each group, which differ in the setting called name."""
    drawn_as = scale_of(axes, everything, "test accuracy")
    for place, group in enumerate(groups):
        values, colour = drawn_as(group.accuracies), colour_of(group)
        spread = 0.15 * (len(values) > 1)
        axes.plot(place + np.linspace(-spread, spread, len(values)), values, ".", color=colour)
        axes.hlines(values.mean(), place - 0.3, place + 0.3, color=colour)
        if group.reported:
            axes.plot(place, drawn_as(group.reported), "kx")
    values = [(one, value) for group in groups for one, value in group.config.settings() if one.name == name]
    ticks = [textwrap.fill(one.unset, 10) if value is None else number_text(value) for one, value in values]
    axes.set_xticks(range(len(groups)), ticks)
    highest, tick = max(zip((np.mean(group.accuracies) for group in groups), ticks, strict=True))
    axes.set_xlabel(f"--{name.replace('_', '-')}\nhighest mean: {' '.join(tick.split())}, {highest:.1f} %")
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="x")


for name in {one.name: None for config_class in CONFIGS.values() for one in config_class.known_settings()}:
    if name not in ("rows_after", "seed"):

        @comparison(name)
        def compare_setting(groups, name=name):
            """Draw the accuracy of every seed against this setting, a panel for each choice of the others."""
            about = "A dot a seed, a line their mean, a cross the reference report's figure"
            families, draw = families_of(usual(groups, name), name), partial(draw_seeds, name=name)
            return draw_families(families, 3, draw, about, sharey=True)


@cache
def gradients_of(run):
    """Return the gradient_lines of a run, by epoch, empty where they were not measured."""
    return gradient_lines(row.values() for row in measured(run, "gradients") if "state" not in row)  # older tables


ALWAYS_ONE = 11.35  # percent of MNIST's test images show a 1, the most frequent digit
CHANCE = 15  # percent; above it a network has learned something
OPEN = 0.02  # the gradient's norm at the digit in networks that hold it


def escape_epoch(run, last=None):
    """Return the epoch, up to the last, in which the test accuracy rises above CHANCE, infinite where it never does."""
    return next((row["epoch"] for row in run.history[:last] if row["test_accuracy"] > CHANCE), math.inf)


def digit_gradient(run):
    """Return the norm of the loss gradient that reaches the digit's last row, by epoch."""
    return {epoch: norms[-1 - run.config.rows_after] for epoch, norms in gradients_of(run).items()}


def starts_of(runs):
    """Return how the gates of recurrent runs start, torch's start first: lines of a legend by keep_bias."""
    biases = sorted({run.config.keep_bias for run in runs}, key=lambda bias: (bias is not None, bias))
    lines = {}
    for bias, shade in zip(biases, shades(len(biases)), strict=True):
        words = "" if bias is None else f"B = {number_text(bias)}: sigmoid(B) = {100 / (1 + math.exp(-bias)):.3g} %"
        lines[bias] = Line2D([], [], color=shade if words else OTHER, label=words or "torch's start")
    return lines


@comparison("memory")
def compare_memory(groups):
    """Draw accuracy against the blank rows read before or after the digit, a panel a network, a line a start.

    Of several learning rates the one of the best mean counts.
    """

    def network_of(config):
        return replace(config, rows_before=0, rows_after=0, keep_bias=None)

    def titled(label, lines):
        last = max(sum(lines.values(), []), key=lambda group: (group.config.rows_after, np.mean(group.accuracies)))
        return f"{label}\nbest start through {last.config.rows_after} rows: {np.mean(last.accuracies):.1f} %"

    best, panels = {}, {}
    for group in (group for group in groups if is_recurrent(group[0])):
        place = replace(group.config, lr=1.0)
        best[place] = max(best.get(place, group), group, key=lambda group: np.mean(group.accuracies))
    asked = {network_of(config) for config in best if config.rows_before or config.rows_after}
    chosen = {config: group for config, group in best.items() if network_of(config) in asked}
    for config, group in chosen.items():
        panels.setdefault(network_of(config), {}).setdefault(config.keep_bias, []).append(group)
    if not panels:
        return None
    common = tell_apart([network_of(group.config) for group in chosen.values()])[1]
    panels = [(titled(*panel), panel[1]) for panel in zip(tell_apart(panels)[0], panels.values(), strict=True)]
    starts = starts_of([group[0] for group in chosen.values()])

    def draw(axes, lines):
        axes.grid(axis="x", linewidth=20, color="0.93", alpha=1)  # bands: dots beside each other belong to one tick
        for number, (bias, line) in enumerate(lines.items()):
            colour, shift = starts[bias].get_color(), 1.5 * (number - (len(lines) - 1) / 2)
            after = [group for group in line if not group.config.rows_before]
            means = [(group.config.rows_after + shift, np.mean(group.accuracies)) for group in after]
            axes.plot(*zip(*means, strict=True), color=colour)
            for group in line:
                size, fill = (7, "none") if group.config.rows_before else (4, colour)
                places = [group.config.rows_before + group.config.rows_after + shift] * len(group)
                axes.plot(places, group.accuracies, "o", color=colour, markersize=size, markerfacecolor=fill, alpha=0.7)
        if group.config.dataset == "mnist" and not group[0].source:
            axes.axhline(ALWAYS_ONE, color="black", linewidth=0.8, linestyle=":")
            where = axes.get_yaxis_transform()
            axes.text(0.5, ALWAYS_ONE - 1, "always answers 1", fontsize=7, va="top", ha="center", transform=where)
        axes.set_xticks(sorted({group.config.rows_after for group in sum(lines.values(), [])}))
        axes.set(xlabel="blank rows after the digit", ylabel="test accuracy in %", ylim=(0, 102))

    hollow = Line2D([], [], color="black", marker="o", ls="none", mfc="none", label="blank rows before the digit")
    about = f"Accuracy after epoch {groups[0].epoch} by the blank rows after the digit, at the best rate tried\n"
    about += f"{common}: a dot a seed, a line their mean"
    return draw_panels(panels, draw, about, handles=[*starts.values(), hollow], sharey=True)


@comparison("opening")
def compare_opening(groups):
    """Draw the loss gradient that reaches the digit by epoch, a line a run, torch's start first."""
    later = itertools.chain(*(group for group in groups if is_recurrent(group[0]) and group.config.rows_after))
    panels, drawn = {}, list(filter(gradients_of, later))
    for run in drawn:
        panels.setdefault((run.config.keep_bias is not None, run.config.network), []).append(run)
    if not panels:
        return None
    rates = sorted({run.config.lr for run in drawn})
    colours = dict(zip(rates, shades(len(rates)), strict=True))

    def draw(axes, runs):
        for run in runs:
            left, norms = escape_epoch(run), digit_gradient(run)
            look = {"color": colours[run.config.lr], "linestyle": ":" if math.isinf(left) else "-", "linewidth": 0.8}
            axes.plot(norms.keys(), norms.values(), marker=".", markevery=[epoch == left for epoch in norms], **look)
        axes.set(xlabel="epoch", ylabel="norm of the loss gradient", yscale="log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))

    handles = [Line2D([], [], color=colours[rate], label=f"learning rate {number_text(rate)}") for rate in rates]
    styles = (("-", ".", f"above {CHANCE} % from the dot on"), (":", "", f"never above {CHANCE} %"))
    handles += [Line2D([], [], color="black", linestyle=line, marker=dot, label=label) for line, dot, label in styles]
    large = [digit_gradient(run).get(escape_epoch(run), 0) >= OPEN for run in drawn if escape_epoch(run) < math.inf]
    rows = ", ".join(map(str, sorted({run.config.rows_after for run in drawn})))
    about = f"Loss gradient at the digit, through {rows} blank rows: {len(large)} of {len(drawn)} runs leave chance,\n"
    about += f"{sum(large)} at {OPEN} or more then; the more rows, the lower it starts; drawn from {GRADIENT_FLOOR} up"
    shown = []
    for (is_open, network), runs in sorted(panels.items(), key=lambda panel: panel[0][0]):
        biases = ", ".join(map(number_text, sorted({run.config.keep_bias for run in runs if is_open})))
        shown.append((f"{network}, B = {biases}" if is_open else f"{network}, as torch starts it", runs))
    return draw_panels(shown, draw, about, len({network for _, network in panels}), handles, sharey=True)


@comparison("gradients")
def compare_gradients(groups):
    """Draw how far back the loss reaches before training and after it, a panel a network.

    Where networks differ in nothing but their cells, these are drawn, else the first setting of each.
    """
    with_tables = [
        Group(found, group.epoch)
        for group in usual(groups)
        if (found := [run for run in group if {0, group.epoch} <= gradients_of(run).keys()])
    ]
    families = families_of(with_tables, "cell")
    chosen = {group.config.network: group for group in reversed(max(families, key=len) if families else with_tables)}
    if not chosen:
        return None

    def draw(axes, group):
        for epoch, style in ((0, ":"), (group.epoch, "-")):
            means = np.exp(np.mean([np.log(gradients_of(run)[epoch]) for run in group], axis=0))
            axes.semilogy(range(1, len(means) + 1), means, linestyle=style, color=colour_of(group))
        axes.set(xlabel="step: rows read", ylabel="norm of the loss gradient")

    styles = ((":", "before training"), ("-", f"after epoch {groups[0].epoch}"))
    handles = [Line2D([], [], color="black", linestyle=style, label=label) for style, label in styles]
    about = f"How far back the loss reaches into the state: geometric mean of seeds\n{labels_of([*chosen.values()])[1]}"
    return draw_panels([*reversed(chosen.items())], draw, about, handles=handles, sharey=True)


@comparison("results")
def results(groups):
    """Write results.csv and results.md: what each setting reached, beside the report; of two, whether one is ahead."""
    rows = [utils.result(group, group.epoch, REPORT) for group in groups]
    head = f"Test accuracy in % after epoch {groups[0].epoch} over seeds; seconds as they were, on busy machines, too."
    texts = ["# Results", head, utils.markdown(utils.RESULTS, rows)]
    if len(groups) == 2:
        texts.append(which_is_ahead(groups))
        tell(texts[-1])
    return {"results.csv": csv_text(utils.RESULTS, rows), "results.md": "\n\n".join(texts) + "\n"}


def start_alike(one, other):
    """Return whether two runs begin with the same weights and see the same images in the same order."""
    orders = [(run.config.seed, run.config.batch_size, run.config.dataset) for run in (one, other)]
    if orders[0] != orders[1]:
        return False
    starts = [run.untrained_model().state_dict() for run in (one, other)]
    return starts[0].keys() == starts[1].keys() and all(map(torch.equal, *(start.values() for start in starts)))


def which_is_ahead(groups):
    """Return in words what the test of the claims says of two groups; runs that start alike are pairs."""
    groups = sorted(groups, key=lambda group: -np.mean(group.accuracies))
    first, second = (
        Sample(name, {run.config.seed: run.test_accuracy(group.epoch) for run in group})
        for name, group in zip(labels_of(groups)[0], groups, strict=True)
    )
    are_paired = any(itertools.starmap(start_alike, itertools.product(*groups)))
    words, difference, ends, agreeing, p, verdict = beats(first, second, paired=are_paired).cells
    about = f"{words}: {difference} (interval {ends}), so in {agreeing} seeds, p {p}. The first is ahead: {verdict}"
    return f"{about} (the first was seen to be so before the test: of equal settings one in ten passes it)."


@comparison("tensorboard")
def tensorboard_means(groups):
    """Write a TensorBoard run of means and HParams for each setting with several seeds, by network: it ticks forty."""
    from torch.utils.tensorboard import SummaryWriter

    made = {}
    for group in (group for group in groups if len(group) > 1):
        with TemporaryDirectory() as folder:
            with SummaryWriter(folder) as writer:
                start = utils.hyperparameters(group.config, group[0].conditions, seed=None, seeds=len(group))
                writer.file_writer.add_summary(start)
                for number, (tag, column) in itertools.product(range(group.epoch), utils.TENSORBOARD_TAGS.items()):
                    writer.add_scalar(tag, np.mean([run.history[number][column] for run in group]), number + 1)
            name = "synthetic_" * bool(group[0].source) + group.config.name.removesuffix("_seed0")
            place = f"{group.config.script}/{group.config.network.partition(' ')[0]}/{name}_{len(group)}seeds"
            (events,) = Path(folder).iterdir()
            made[f"tensorboard/{place}/events.out.tfevents.run"] = events.read_bytes()
    return made


# The reference report's claims, each settled by a test over seeds ----------------------------------------------------

HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"
LEVEL = 0.05
MOST_ARRANGEMENTS = 200_000  # where there are more, as many random ones are tested
RULE = (
    f"Test accuracy after epoch {REPORT_EPOCHS} on the real data, unless said: mean (lowest to highest seed). One test "
    "set, one learning rate for most settings: the seeds tell how far another start and order of images would change a "
    "figure, not how far other data would.\n\n"
    "The test is the permutation test of the difference of two means: signs flipped within pairs, where the runs of a "
    "seed share their initial weights and their order of images, else all figures shuffled, in every way or, where "
    f"there are more, in {MOST_ARRANGEMENTS:,} random ones; 'above a number' flips the signs of the differences from "
    f"it. The interval (of {100 - 200 * LEVEL:.0f} %) holds the differences that neither one-sided test at "
    f"{100 * LEVEL:.0f} % rejects. 'A against B' holds where it lies above "
    "0 (or what the part says), and does not hold where it lies below; 'similar within m' holds where it lies between "
    "-m and m, and does not hold where it lies beyond one of them; else a part is undecided. p is the claim's or its "
    "opposite's, the smaller one. Runs are counted by the sign test, though those of one seed start alike; what has no "
    "spread is arithmetic. A part 'beside it' decides nothing."
)
SHIPPED = "runs/reference/comparison/claims.md"


@cache
def arrangements(count, chosen=None):
    """Return the arrangements of a permutation test as weights, a row each, the measured one first.

    Of count pairs their signs; with chosen, of count values 1 for those chosen, else 0, the first ones being measured.
    """
    random = np.random.default_rng(0)
    if chosen is None:
        if 2**count <= MOST_ARRANGEMENTS:
            return np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        return np.vstack([np.ones(count), random.choice((1.0, -1.0), (MOST_ARRANGEMENTS, count))])
    if math.comb(count, chosen) <= MOST_ARRANGEMENTS:
        places = np.array(list(itertools.combinations(range(count), chosen)))
        return (places[:, :, None] == np.arange(count)).any(1).astype(float)
    first = np.repeat([1.0, 0.0], [chosen, count - chosen])
    return np.vstack([first, random.permuted(np.tile(first, (MOST_ARRANGEMENTS, 1)), axis=1)])


def thresholds(these, those, paired):
    """Return for each arrangement of a permutation test the difference of means from which on it overtakes, float64.

    these, those: values, one a seed; paired: signs are flipped within the pairs, else all values are shuffled. The test
    of 'these are above those by more than a difference' takes it off these beforehand, and asks how many arrangements
    part the means as far as the measured one, whose own threshold is NaN, for it always counts.
    """
    these, those = np.asarray(these, dtype=float), np.asarray(those, dtype=float)
    if paired:
        weights, values, belongs = arrangements(len(these)), these - those, np.ones(len(these))
    else:
        weights, values = arrangements(len(these) + len(those), len(these)), np.concatenate([these, those])
        belongs = np.repeat([1.0, 0.0], [len(these), len(those)])
    moved = weights[0] - weights
    with np.errstate(invalid="ignore"):
        return (moved @ values / (moved @ belongs)).round(9)


def p_values(found, difference):
    """Return the one-sided p-values of 'the means differ by more' and 'by less' than this, from the thresholds."""
    return float((~(found > difference)).mean()), float((~(found < difference)).mean())


def interval(found):
    """Return the lowest and the highest difference that neither test at LEVEL rejects, from the thresholds."""
    rejected = int(LEVEL * len(found) + 1e-9)
    lowest, highest = (np.sort(np.nan_to_num(found, nan=end)) for end in (-math.inf, math.inf))
    return float(lowest[rejected]), float(highest[-1 - rejected])


def surviving(p_values):
    """Return how many of the p-values the correction of Benjamini & Hochberg (1995) keeps at LEVEL."""
    ordered = np.sort(p_values)
    kept = ordered <= LEVEL * np.arange(1, len(ordered) + 1) / len(ordered)
    return int(kept.nonzero()[0].max(initial=-1)) + 1


class Sample(NamedTuple):
    """What was measured of the runs of a setting: a value by seed, and in words what it is."""

    words: str
    values: dict


class Row(NamedTuple):
    """A part of a claim: what was compared, the verdict, and what stands beside it, as texts; p where it was tested."""

    words: str
    verdict: str
    difference: str = ""
    interval: str = ""
    agreeing: str = ""  # in how many of the seeds, or of the runs, it is so
    p: float | None = None

    @property
    def cells(self):
        p = "" if self.p is None else "< 0.0001" if self.p < 1e-4 else f"{self.p:.4f}"
        return self.words, self.difference, self.interval, self.agreeing, p, self.verdict


def beats(this, that=None, paired=False, form="{:.2f} %", by=0.0, within=None):
    """Return the Row 'the mean of this Sample is above that one's', or 'they differ by less', within a margin.

    by: by how much it is to be above, or, without that, above which number; form: how the values are written.
    """
    least, most, extra = by, math.inf, ", pairs" * paired + f", by more than {form.format(by)}" * bool(by)
    relation = "against"
    if that is None:
        that, paired, least = Sample("", dict.fromkeys(this.values, by)), True, 0.0
        relation, extra = f"above {form.format(by)}", ""
    if within is not None:
        least, most, relation = -within, within, f"similar within {within:g} to"
    shared = [seed for seed in this.values if seed in that.values]
    these, those = (
        np.array([sample.values[seed] for seed in (shared if paired else sample.values)]) for sample in (this, that)
    )
    words = f"{sample_words(this.words, these, form)} {relation}"
    words += f" {sample_words(that.words, those, form)}" * bool(that.words) + extra
    if not len(these) or not len(those):
        return Row(words, UNMEASURED)
    found = thresholds(these, those, paired)
    (above, beneath), (beyond, below), (low, high) = p_values(found, least), p_values(found, most), interval(found)
    verdict = HOLDS if least < low and high < most else FAILS if high < least or low > most else UNDECIDED
    p = min(max(above, below), beneath, beyond)
    so = sum(least < this.values[seed] - that.values[seed] < most for seed in shared)
    difference = written(form.replace(" %", " points"), these.mean() - those.mean())
    ends = " to ".join(written(form.partition(" ")[0], end) for end in (low, high))
    return Row(words, verdict, difference, ends, f"{so} of {len(shared)}", p)


pair = partial(beats, paired=True)


def written(form, value):
    """Return a difference as text, with its sign; one that is rounded to zero has none."""
    text = form.format(abs(value)).replace("inf", "∞")
    return ("-" if value < 0 else "+") * any(character in "123456789∞" for character in text) + text


def sample_words(words, values, form):
    """Return a sample in words, with the mean, the lowest and the highest of its values."""
    if not len(values):
        return f"{words} (not measured)"
    mean, low, high = (form.format(value) for value in (values.mean(), values.min(), values.max()))
    return f"{words} {mean} ({low} to {high}, {len(values)} seed{'s' * (len(values) > 1)})"


def counted(words, found):
    """Return the Row 'of most runs it is so'; found: a bool for each run. p is that of the sign test."""
    count, so = len(found), sum(found)
    if not count:
        return Row(words, UNMEASURED)
    p, opposite = (sum(math.comb(count, k) for k in range(least, count + 1)) / 2**count for least in (so, count - so))
    verdict = HOLDS if p <= LEVEL else FAILS if opposite <= LEVEL else UNDECIDED
    return Row(words, verdict, agreeing=f"{so} of {count} runs", p=min(p, opposite))


def arithmetic(words, this, that):
    """Return the Row 'this Sample is above that one' of numbers that have no spread."""
    if not this.values or not that.values:
        return Row(words, UNMEASURED)
    (more,), (less,) = ({*sample.values.values()} for sample in (this, that))
    text = f"{this.words}: {more:,} {words} against {less:,} of the {that.words}"
    return Row(text, HOLDS if more > less else FAILS, f"{more - less:+,}")


def from_table(run, name, column, **where):
    """Return the median of a column in the rows where of one of a run's tables; None of other than REPORT_EPOCHS."""
    rows = measured(run, name) if len(run.history) == REPORT_EPOCHS else []
    values = [float(row[column]) for row in rows if where.items() <= row.items()]
    return float(np.median(values)) if values else None


def log_reach(run, epoch):
    """Return the power of ten of the share that reaches a run's first row after an epoch, None where not measured."""
    norms = gradients_of(run).get(epoch)
    return None if norms is None else math.log10(reach(norms))


def products_a_step(run):
    """Return the multiply-adds of a step of a recurrent run's layers: one for each weight of their matrices."""
    return sum(each.numel() for each in run.untrained_model().recurrent.parameters() if each.ndim == 2)


def sample_of(groups, config, measure=SavedRun.test_accuracy, words=""):
    """Return the Sample of the runs of a setting; measure(run): a number, None where it cannot be had."""
    values = {run.config.seed: measure(run) for run in groups.get(config, [])}
    return Sample(words or config.sentence(), {seed: each for seed, each in values.items() if each is not None})


def samplers(groups):
    """Return cnn and rnn, which take settings, and measure and words as sample_of does, and return the Sample."""

    def cnn(measure=SavedRun.test_accuracy, words="", **settings):
        return sample_of(groups, cnn_cifar10.Config(**settings), measure, words)

    def rnn(cell="rnn", hidden_size=30, measure=SavedRun.test_accuracy, words="", **settings):
        return sample_of(groups, rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings), measure, words)

    return cnn, rnn


def escapes(groups, cell):
    """Return (keep_bias, escape_epoch, digit_gradient) of a cell's runs with blank rows after the digit, usual rate."""
    found = []
    for config, group in groups.items():
        if is_recurrent(group[0]) and replace(config, rows_after=0, keep_bias=None) == rnn_mnist.Config(cell=cell):
            runs = [run for run in group if config.rows_after and {0, REPORT_EPOCHS} <= gradients_of(run).keys()]
            found += [(config.keep_bias, escape_epoch(run, REPORT_EPOCHS), digit_gradient(run)) for run in runs]
    return found


OWN_RATE = {"optimizer": "sgd", "lr": 0.02, "momentum": 0.9}


def report_claims(groups):
    """Yield the report's claims: number, sentence, the Rows that decide it and, for some, those that stand beside."""
    cnn, rnn = samplers(groups)
    rows = [pair(cnn(), cnn(optimizer="sgd")), pair(rnn("rnn", 5), rnn("rnn", 5, optimizer="sgd"))]
    yield "1", "Adam beats SGD on both tasks, at the report's rate.", rows
    rows = [pair(cnn(), cnn(lr=1e-3)), pair(cnn(), cnn(lr=1e-3), within=1.0)]
    yield "2", "On the CNN a learning rate of 1e-4 is the best, and 1e-3 is similar within 1 point.", rows
    rows = [pair(rnn("rnn", 5), rnn("rnn", 5, lr=lr)) for lr in (1e-1, 1e-4, 1e-5)]
    yield "3", "For the RNN with 5 units 1e-3 is the best rate among 1e-1, 1e-3, 1e-4 and 1e-5.", rows
    rows = [beats(rnn("rnn", more), rnn("rnn", less)) for less, more in ((5, 10), (10, 20), (20, 30))]
    rows += [beats(rnn(cell, 30), rnn(cell, 20)) for cell in ("gru", "lstm")]
    yield "4a", "More hidden units give more accuracy, in every cell.", rows
    rows = [beats(rnn("lstm", 30), rnn("lstm", 20), within=0.5)]
    yield "4b", "The LSTMs with 20 and with 30 units are nearly identical (within 0.5 points).", rows
    rows = []
    for config, epoch in itertools.product((row.config for row in REPORT), (1, 5)):
        early = sample_of(groups, config, partial(SavedRun.test_accuracy, epoch=epoch), f"epoch {epoch}")
        rows.append(pair(sample_of(groups, config, words=f"{config.sentence()}: epoch {REPORT_EPOCHS}"), early))
    yield "5", "More epochs give more accuracy.", rows
    rows = [beats(rnn(cell, size), rnn("rnn", size)) for cell in ("gru", "lstm") for size in (20, 30)]
    rows += [beats(rnn("gru"), rnn("rnn", 55)), beats(rnn("lstm"), rnn("rnn", 64))]
    yield "6", "GRU and LSTM beat the RNN, with as many units and with as many weights.", rows
    weights = [rnn(cell, measure=lambda run: run.conditions.parameters) for cell in ("lstm", "gru")]
    yield "7a", "The LSTM has more weights than the GRU.", [arithmetic("weights", *weights)]
    products = [rnn(cell, measure=products_a_step) for cell in ("lstm", "gru")]
    sentence = "The LSTM computes more than the GRU, four gates to three (README: 4.6 against 10.1 seconds an epoch)."
    yield "7b", sentence, [arithmetic("multiply-adds a step", *products)]
    rows = [beats(cnn(dataset="mnist"), rnn(cell)) for cell in ("rnn", "gru", "lstm")]
    rows.append(beats(rnn("gru"), cnn(dataset="mnist"), within=0.5))
    yield "8", "On MNIST the CNN beats all three, and the GRU is nearly its equal (within 0.5 points).", rows
    rows = []
    for words, settings in (("at 1e-4", {"lr": 1e-4}), ("at 1e-3", {"lr": 1e-3}), ("by SGD at 0.02", OWN_RATE)):
        fits = partial(from_table, name="gabor", column="r2")
        trained = cnn(partial(fits, kernels="trained"), f"median R² of the kernels trained {words}", **settings)
        untrained = cnn(partial(fits, kernels="untrained"), "as they started", **settings)
        rows.append(pair(trained, untrained, form="{:.3f}", by=0.1))
    yield "9", "The CNN's first kernels come to resemble Gabor functions: these fit them better by 0.1 of R².", rows
    by_epoch = []
    for epoch, when in ((0, "before training"), (REPORT_EPOCHS, "after it")):
        measure = partial(log_reach, epoch=epoch)
        reached = {cell: rnn(cell, 30, measure, f"{cell.upper()}, {when}") for cell in rnn_mnist.CELLS}
        by_epoch.append([beats(reached[cell], reached["rnn"], form="{:.2f}") for cell in ("gru", "lstm")])
    sentence = "Before training gradients reach further back in gated cells (powers of ten that reach the first row)."
    yield "10a", sentence, *by_epoch
    gaps = itertools.product((28, 56), ("gru", "lstm"))
    rows = [beats(rnn(cell, rows_after=after), rnn("rnn", rows_after=after)) for after, cell in gaps]
    yield "10b", "The gated cells remember for longer: through 28 and 56 blank rows after the digit.", rows


def our_claims(groups):
    """Yield the claims that go beyond the report, as report_claims does."""
    cnn, rnn = samplers(groups)
    own, adam = cnn(**OWN_RATE), rnn()
    rows = [pair(own, cnn()), pair(own, cnn(lr=1e-3)), pair(rnn(optimizer="sgd", lr=0.01), adam)]
    beside = [pair(rnn(optimizer="sgd", lr=lr, momentum=0.9), adam) for lr in (0.03, 0.1)]
    sentence = (
        "SGD at rates that were sought for it (by test accuracy, one network each, which favours it) beats Adam: at "
        "the report's rate and, of the CNN, at 1e-3, the better of the two tried."
    )
    yield "1b", sentence, rows, beside
    rows = [beats(rnn("lstm", keep_bias=1.0, rows_after=28), rnn("lstm", rows_after=28))]
    rows.append(beats(rnn("lstm", keep_bias=2.0, rows_after=56), rnn("lstm", keep_bias=1.0, rows_after=56)))
    for this, that in ((1.0, None), (2.0, None), (2.0, 1.0)):
        rows.append(beats(rnn("lstm", keep_bias=this), rnn("lstm", keep_bias=that), within=1.0))
    sentence = (
        "Whether an LSTM learns within ten epochs what stands before 28 or 56 blank rows is set by the bias of its "
        "forget gates at the start, which without such rows changes less than 1 point."
    )
    yield "11", sentence, rows
    lesions = itertools.product((1e-4, 1e-3), ("conv1", "conv2"))
    rows = [beats(cnn(without=layer, lr=lr), cnn(without="fc1", lr=lr)) for lr, layer in lesions]
    sentence = (
        "fc1, which holds 98.5 % of the weights, is worth the most: without it the network ends below those without "
        "conv1 (where conv2 reads a smaller picture) and without conv2, at 1e-4, where all still climb, and at 1e-3."
    )
    yield "12", sentence, rows

    def read_from(layer, state="trained"):
        words = "the pixels" if layer == "pixels" else f"{layer} of the {state} network"
        measure = partial(from_table, name="layers", column="accuracy", layer=layer, network=state)
        return cnn(measure, f"a linear classifier on {words}")

    layers = ("pixels", "pool1", "pool2", "fc1")
    rows = [pair(read_from(after), read_from(before)) for before, after in itertools.pairwise(layers)]
    rows += [pair(read_from(layer), read_from(layer, "untrained")) for layer in layers[1:]]
    beside = [pair(read_from("pool1", "untrained"), read_from("pixels"))]
    sentence = (
        "From layer to layer the class becomes more readable for a linear classifier, and training makes it so (though "
        f"of {rows[0].difference} that the first layer adds to the pixels {beside[0].difference} are there untrained)."
    )
    yield "13", sentence, rows, beside

    gated, plain = escapes(groups, "gru") + escapes(groups, "lstm"), escapes(groups, "rnn")
    shut = [norms[REPORT_EPOCHS] < norms[0] for _, left, norms in gated if math.isinf(left)]
    crept = [norms[min(left - 1, REPORT_EPOCHS)] > norms[0] for bias, left, norms in plain if bias is None and left > 1]
    leapt = [[norms[left] >= OPEN for _, left, norms in runs if left in norms] for runs in (gated, plain)]
    rows = [
        counted("GRUs and LSTMs that stay at chance: it is less after training than before", shut),
        counted("plain RNNs as torch starts them, in the last epoch at chance: it is more than before training", crept),
        counted(f"GRUs and LSTMs, in the epoch in which they leave chance: it is {OPEN} or more", leapt[0]),
        counted("plain RNNs, likewise", leapt[1]),
    ]
    sentence = (
        "At chance the loss gradient at the digit falls in gated networks, grows in plain RNNs of torch's start; where "
        f"chance is left, it leaps (ten epochs at 1e-3, blank rows; asked after seeing the runs, which gave {OPEN})."
    )
    yield "14", sentence, rows

    def leaves(words, is_so, cell, after=56, rates=(1e-3,), last=REPORT_EPOCHS, **settings):
        def measure(run):
            return escape_epoch(run, last) if len(run.history) >= last else None

        told, so = "", []
        for lr in rates:
            epochs = rnn(cell, 30, measure, rows_after=after, lr=lr, **settings).values.values()
            told += f"; at {number_text(lr)}: {', '.join(map('{:g}'.format, epochs))}" * bool(epochs)
            so += map(is_so, epochs)
        return counted(f"{cell.upper()}, {after} rows: leaves chance {words}{told.replace('inf', 'never')}", so)

    def at_digit(cell, bias, lr, epoch):
        def measure(run):
            norm = digit_gradient(run).get(epoch)
            return norm and math.log10(norm)

        words = f"{cell.upper()}, B = {bias:g}, gradient at the digit after epoch {epoch} (power of ten)"
        return rnn(cell, 30, measure, words, rows_after=56, keep_bias=bias, lr=lr)

    rows = [beats(rnn("gru", keep_bias=2.0, rows_after=56), by=97)]
    rows.append(leaves("in the first epoch", lambda epoch: epoch == 1, "gru", keep_bias=2.0))
    yield "15a", "Foretold: the GRU with B = 2 learns 56 rows (at least 97 %), out of chance in the first epoch.", rows
    rows = [beats(rnn("gru", keep_bias=1.0, rows_after=56), by=97)]
    beside = [leaves("in no epoch", math.isinf, "lstm", keep_bias=1.0)]
    beside.append(beats(at_digit("lstm", 1.0, 1e-3, 0), at_digit("gru", 1.0, 1e-3, 0), form="{:.2f}"))
    sentence = "Foretold: the GRU with B = 1 learns them, too, though the LSTM with B = 1 and more gradient does not."
    yield "15b", sentence, rows, beside
    parts = {3.0: [], 10.0: []}
    for bias, lr in itertools.product(parts, (1e-3, 1e-4)):
        early = leaves(f"by epoch 2, B = {bias:g}", lambda epoch: epoch <= 2, "rnn", rates=(lr,), keep_bias=bias)
        parts[bias] += [early, beats(rnn("rnn", rows_after=56, keep_bias=bias, lr=lr), by=85)]
    sentence = "Foretold: the RNN with B = 3 leaves chance by epoch 2 and ends above 85 % at 56 rows."
    yield "15c", sentence, *parts.values()
    rows = [leaves("in no epoch", math.isinf, "lstm", 28, keep_bias=0.5)]
    rows.append(beats(rnn("lstm", keep_bias=1.5, rows_after=56), by=97))
    rows.append(leaves("after the first epoch", lambda epoch: 1 < epoch < math.inf, "lstm", keep_bias=1.5))
    yield "15d", "Foretold: the LSTM with B = 0.5 fails at 28 rows, and with B = 1.5 learns 56 rows, late.", rows

    adam, slower = (1e-3, 3e-3, 1e-2), (1e-4, 1e-3, 3e-3)
    networks = (("gru", 56, adam), ("lstm", 28, adam), ("lstm", 56, adam), ("rnn", 28, slower), ("rnn", 56, slower))
    rows = [leaves("within 30 epochs", math.isfinite, *network, last=30) for network in networks]
    yield "16", "As torch starts them, most runs leave chance within 30 epochs, three rates taken together.", rows

    measure = partial(SavedRun.test_accuracy, epoch=50)
    late = {cell: rnn(cell, 30, measure, f"{cell.upper()}, epoch 50") for cell in ("rnn", "gru")}
    others = ({"lr": 3e-4}, {"lr": 3e-3}, {"keep_bias": 3.0}, {"keep_bias": 10.0})
    rows = [beats(late["gru"], late["rnn"]), *(beats(rnn("gru"), rnn(**settings)) for settings in others)]
    yield "17", "Without blank rows the GRU stays ahead of the RNN: to epoch 50, of other rates, of open starts.", rows

    in_place, permuted = (
        [cnn(dataset="mnist", pixels=pixels), *(rnn(cell, pixels=pixels) for cell in rnn_mnist.CELLS)]
        for pixels in ("in-place", "permuted")
    )
    rows = list(map(pair, in_place, permuted))
    yield "18a", "In images whose pixels are permuted every network finds less.", rows
    rows = [beats(permuted[0], sample) for sample in permuted[1:]]
    yield "18b", "The CNN stays ahead of RNN, GRU and LSTM in permuted images, where no pixel has neighbours.", rows
    losses = []
    for here, there in zip(in_place[1:], permuted[1:], strict=True):
        lost = {seed: value - there.values[seed] for seed, value in here.values.items() if seed in there.values}
        losses.append(Sample(f"what permuting takes from {here.words}", lost))
    rows = [beats(lost, losses[0], form="{:.2f} points") for lost in losses[1:]]
    yield "18c", "Permuting takes more from GRU and LSTM than from the RNN (asked after seeing the runs).", rows

    plain, gated = ("rnn", 10.0, 1e-4), [(cell, 2.0, 1e-3) for cell in ("gru", "lstm")]
    rows = [beats(at_digit(*plain, 0), at_digit("gru", 1.0, 1e-3, 0), form="{:.2f}")]
    rows.append(beats(rnn("gru", keep_bias=1.0, rows_after=56), rnn("rnn", keep_bias=10.0, lr=1e-4, rows_after=56)))
    sentence = (
        "More gradient at the digit is not enough: with 56 rows plain RNNs (B = 10) start with more than GRUs (B = 1) "
        "and end below (asked after seeing the runs)."
    )
    yield "19", sentence, rows

    def known(cell, bias, lr, read):
        measure = partial(from_table, name="reading", column="known", rows=f"{read}")
        settings = {"rows_after": 56, "keep_bias": bias, "lr": lr}
        return rnn(cell, 30, measure, f"{cell.upper()}, B = {bias:g}, its state after {read} rows", **settings)

    rows = [pair(known(*plain, 14), known(*plain, 28)), pair(known(*plain, 28), known(*plain, 84))]
    for each in gated:
        rows += [pair(known(*each, 28), known(*each, 14)), pair(known(*each, 84), known(*each, 28))]
    sentence = (
        "With 56 blank rows the state of open plain RNNs tells a linear classifier less after 28 rows than after 14, "
        "and less still after 84; that of gated cells more each time (after ten epochs; asked after seeing the runs)."
    )
    yield "20", sentence, rows


def verdict_of(rows):
    """Return the verdict on a claim, whose parts are rows: of several how many hold, do not, and are undecided."""
    verdicts = [row.verdict for row in rows]
    if len({*verdicts}) == 1:
        return verdicts[0] + f" (all {len(rows)} parts)" * (len(rows) > 1)
    words = {HOLDS: "hold", FAILS: "do not", UNDECIDED: UNDECIDED, UNMEASURED: UNMEASURED}
    return ", ".join(f"{verdicts.count(each)} {word}" for each, word in words.items() if each in verdicts)


def overview(number, sentence, rows, beside=(), most=6):
    """Return a claim's row in a table; the differences of more than most parts stand in its own section alone."""
    tested = [row for row in rows if row.verdict != UNMEASURED]
    told = [f"{row.difference} ({row.interval}), {row.agreeing}".strip(" (),") for row in tested]
    return f"| {number} | {sentence} | {verdict_of(rows)} | {'; '.join(told) if len(told) <= most else 'see below'} |"


def details(number, sentence, rows, beside=()):
    """Return a claim's own section."""
    cells = [row.cells for row in rows] + [(f"beside it: {row.cells[0]}", *row.cells[1:4], "", "") for row in beside]
    lines = ["| part | difference | interval | so in | p | verdict |", "|---|---:|---:|---:|---:|---|"]
    table = "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in cells)])
    return f"## {number}. {sentence}\n\n{table}\n\n**Verdict: {verdict_of(rows)}.**"


@comparison("claims")
def claims(groups):
    """Write claims.md: each claim that these runs can test, what was measured, the difference, and the verdict."""
    known = {group.config: group for group in groups if not group[0].source and group.epoch == REPORT_EPOCHS}
    text, untested, sections, rows = ["# The claims", RULE], [], [], []
    for head, claims_of in (("The report's claims", report_claims), ("Beyond the report", our_claims)):
        listed = list(claims_of(known))
        tested = [claim for claim in listed if any(row.verdict != UNMEASURED for row in claim[2])]
        untested += [claim[0] for claim in listed if claim not in tested]
        if tested:
            table = ["| | claim | verdict | difference (interval), so in |", "|---:|---|---|---|"]
            text += [f"# {head}", "\n".join(table + [overview(*claim) for claim in tested])]
            sections += [details(*claim) for claim in tested]
            rows += [row for claim in tested for row in claim[2] if row.p is not None]
    if not sections:
        tell(f"these runs can test no claim; the shipped verdicts stand in {SHIPPED}")
        return None
    decided = sum(row.verdict != UNDECIDED for row in rows)
    kept = surviving([min(1, 2 * row.p) for row in rows])  # each part was tested in both directions
    text.append(
        f"Of {len(rows)} tested parts, which share runs, {decided} are decided; {kept} of these verdicts survive the "
        f"correction of Benjamini & Hochberg at {100 * LEVEL:.0f} % over all, p being doubled for the two directions."
    )
    if untested:
        text.append(f"Not tested with these runs: {', '.join(untested)}; the shipped verdicts stand in {SHIPPED}.")
    return {"claims.md": "\n\n".join(text + sections) + "\n"}


# Command line --------------------------------------------------------------------------------------------------------


def draw_all(figures, names, subject, words, folder):
    """Draw figures, functions of a subject by name, into a folder: those in names or all; words: what it is."""
    for name in names or []:
        if name not in figures:
            raise InputError(f"{words} has no figure {name}; it has {', '.join(figures)}")
    bar = tqdm(dict.fromkeys(names or figures), unit="figure", leave=False, disable=None)
    for name in bar:
        bar.set_description(name)
        made = figures[name](subject)
        if made is not None:
            save(name, made, folder)
        elif names:
            tell(f"{name}: there is nothing to draw")


def find_runs(folder, data_dir):
    """Return the run that folder is, or the runs below it that finished an epoch; what cannot be read there is named.

    Folders named reference are passed over.
    """
    if (folder / "config.json").exists():
        run = SavedRun(folder, data_dir)
        if not run.history:
            raise InputError(f"{folder} has finished no epoch; train it with {run.command}")
        return [run]
    runs = []
    for path in sorted(folder.rglob("config.json")):
        if "reference" not in path.relative_to(folder).parts:
            try:
                run = SavedRun(path.parent, data_dir)
                runs += [run] if run.history else []
            except (InputError, OSError) as error:
                tell(f"{path.parent} is left out: {error}")
    if not runs:
        words = "holds no run that has finished an epoch" if folder.is_dir() else "is not a folder"
        raise InputError(f"{folder.absolute()} {words}; name a run's folder, or a folder of runs")
    return runs


def work():
    matplotlib.rcdefaults()
    matplotlib.rcParams.update(STYLE)
    drawings = {name: draw for name, (draw, _) in FIGURES.items()}
    lines = [__doc__ or ""]
    for head, drawn in (("Figures of a run:", drawings), ("\nOf several runs:", COMPARISONS)):
        lines += [head, *(f"    {name:14} {(draw.__doc__ or ' ').splitlines()[0]}" for name, draw in drawn.items())]
    parser = utils.make_parser("\n".join(lines))
    flag = parser.add_argument
    flag("runs", nargs="+", type=utils.folder_name, metavar="RUN", help="a run's folder, or a folder of runs")
    flag("--figures", nargs="+", choices=tuple(drawings | COMPARISONS), metavar="NAME", help="default: all that fit")
    flag("--output-dir", type=utils.folder_name, help="default: RUN/figures; of several, FOLDER/comparison")
    flag("--data-dir", type=utils.folder_name, default="data", help="where the real sets lie; default: data")
    args = parser.parse_args()
    first, runs = args.runs[0], [run for folder in args.runs for run in find_runs(folder, args.data_dir)]
    if len(args.runs) == 1 and runs[0].folder == first:
        fitting = {name: draw for name, (draw, fits) in FIGURES.items() if fits(runs[0])}
        draw_all(fitting, args.figures, runs[0], first, args.output_dir or first / "figures")
        return
    output_dir = args.output_dir or (first if len(args.runs) == 1 else Path("runs")) / "comparison"
    if not args.figures and not args.output_dir and not any(output_dir in run.folder.parents for run in runs):
        shutil.rmtree(output_dir, ignore_errors=True)  # what an earlier comparison left
    sources = sorted({run.source for run in runs})  # real data first, whose words are none
    for source in sources:
        groups = group_runs([run for run in runs if run.source == source])
        folder = output_dir / "synthetic" if source and len(sources) > 1 else output_dir
        draw_all(COMPARISONS, args.figures, groups, "the comparison", folder)


def main():
    utils.run_script(work, kept="the figures that are drawn are kept, and the same command draws them all")


if __name__ == "__main__":
    main()
