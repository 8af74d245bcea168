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
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import cnn_cifar10
import rnn_mnist
from utils import (
    EVENTS,
    REPORT_EPOCHS,
    TENSORBOARD_TAGS,
    ArgumentParser,
    InputError,
    Summary,
    epoch_seconds,
    folder_name,
    group_by_setting,
    hyperparameters,
    load_data,
    load_tensors,
    memory_writer,
    number_text,
    permuted,
    predict,
    read_checkpoint,
    read_metrics,
    read_record,
    restore,
    results_head,
    run_folder,
    run_script,
    settings_of,
    summarise,
    synthetic_notice,
    table_text,
    write_atomically,
)

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter, MaxNLocator
from PIL import Image
from torch import nn
from tqdm import tqdm

CNN, RNN = cnn_cifar10.Config.script(), rnn_mnist.Config.script()
CONFIGS = {CNN: cnn_cifar10.Config, RNN: rnn_mnist.Config}
REPORT = cnn_cifar10.REPORT + rnn_mnist.REPORT
NETWORKS = {
    CNN: lambda run: cnn_cifar10.LeNet5(run.config, run.record.conditions.precision),
    RNN: lambda run: rnn_mnist.RowReader(run.config),
}
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


load_once = cache(partial(load_data, may_download=False))


class SavedRun:
    """A run's folder, read piece by piece as the figures ask for it. Raises InputError where a piece is unusable."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.record = read_record(self.folder, CONFIGS)
        self.config, self.script = self.record.config, self.record.config.script()

    @cached_property
    def kind(self):
        """The script whose figures fit the run; None, those of any run, for a CNN trained without convolutions."""
        return None if self.script == CNN and not convolutions(self.untrained_model()) else self.script

    @property
    def title(self):
        """The run in words: network, data set, training, seed."""
        return self.config.words(without=()) + self.source

    @property
    def source(self):
        return "" if self.record.conditions.data_source == "real" else ", synthetic data"

    @cached_property
    def history(self):
        """The rows of metrics.csv, empty when no epoch was finished."""
        return read_metrics(self.folder)

    @property
    def command(self):
        """The command line that trains the run."""
        return self.config.command() + " --data synthetic" * bool(self.source)

    def check_trained(self):
        """Raises InputError when no epoch was finished."""
        if not self.history:
            raise InputError(f"{self.folder} has finished no epoch; train it with {self.command}")

    def test_accuracy(self, epoch=REPORT_EPOCHS):
        """The test accuracy in percent after an epoch, None where the run diverged before it."""
        return self.history[epoch - 1]["test_accuracy"] if len(self.history) >= epoch else None

    @property
    def has_checkpoint(self):
        return (self.folder / "checkpoint.pt").is_file()

    @cached_property
    def model(self):
        """The trained network; its weights are the last epoch's."""
        if not self.has_checkpoint:
            raise InputError(
                f"{self.folder} holds no checkpoint.pt (those of runs/reference are not shipped); train the run with "
                f"{self.command} and name its folder"
            )
        model = self.untrained_model()
        restore(read_checkpoint(self.folder, CONFIGS), {"model": model})
        return model

    def untrained_model(self):
        """The network at its initialisation, rebuilt from the run's seed."""
        torch.manual_seed(self.config.seed)
        return NETWORKS[self.script](self).eval()

    def snapshot(self, epoch):
        """A network with the weights that stood after an epoch, those that the run kept: of a CNN its convolutions'."""
        model = self.untrained_model()
        weights = load_tensors(self.folder / "snapshots" / f"epoch_{epoch:02d}.pt")
        restore({"state": {"model": model.state_dict() | weights}}, {"model": model})
        return model

    @cached_property
    def data(self):
        conditions = self.record.conditions
        data = load_once(self.config.dataset, conditions.data_source, conditions.data_dir)
        return permuted(data) if self.config.pixels == "permuted" else data

    @cached_property
    def probabilities(self):
        """Class probabilities of the test images, float32 (N, classes), computed as in training."""
        return predict(self.model, self.data.test.images).softmax(dim=1)

    @cached_property
    def exciting(self):
        """What excites the feature maps of the convolutions most, Exciting test images by layer."""
        return most_exciting(self.model, self.data.test.images)


class Table(NamedTuple):
    """A table to be written as CSV: the columns' types by name, and rows, a list of dict."""

    columns: dict
    rows: list


FIGURES, COMPARISONS = {}, {}


class Drawing(NamedTuple):
    """A registered figure. fits: the script whose runs it is of, None for any."""

    draw: object
    fits: str | None


def figure(fits=None):
    """Register draw(run), which returns a Figure, or what it makes (Figure, Table) by file name."""
    return lambda draw: FIGURES.setdefault(draw.__name__, Drawing(draw, fits)).draw


def comparison(name):
    """Register draw(groups), groups a list of lists of SavedRun; it returns what a figure does, or None."""
    return lambda draw: COMPARISONS.setdefault(name, draw)


def save(name, made, folder):
    """Write what a figure returned into a folder: pictures, tables, texts and bytes."""
    for file, content in (made if isinstance(made, dict) else {f"{name}.png": made}).items():
        if isinstance(content, Figure):
            content = picture_bytes(content)
        elif isinstance(content, Table):
            content = table_text(content.columns, [map(cell_text, row.values()) for row in content.rows])
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / file, content.encode() if isinstance(content, str) else content)
        tqdm.write(str(folder / file))


def picture_bytes(drawn):
    """Return a Figure as PNG; a palette takes a third of the bytes."""
    content = io.BytesIO()
    drawn.savefig(content, format="png")
    picture = Image.open(content).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    return content.getvalue()


def cell_text(value):
    return f"{value:.7g}" if isinstance(value, float) else value


def read_table(path, columns, is_whole):
    """Return the rows of a Table as save wrote them, empty where there is none; raises InputError if damaged.

    columns: the types by name; is_whole(rows): whether nothing is missing.
    """
    if not path.is_file():
        return []
    with suppress(LookupError, ValueError, TypeError), open(path, newline="") as file:
        rows = [{name: kind(row[name]) for name, kind in columns.items()} for row in csv.DictReader(file)]
        finite = all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        if finite and is_whole(rows):
            return rows
    raise InputError(f"{path} is damaged; delete it, or write it anew with --figures {path.stem}")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of any run
# ---------------------------------------------------------------------------------------------------------------------


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
    drawn.suptitle(f"Accuracy and loss by epoch\n{run.title}")
    return drawn


def confusion_matrix(labels, predicted, classes):
    """Return counts, int64 (classes, classes): true class by row, predicted class by column."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def write_cells(axes, values, is_dark, form):
    """Write values into the cells of a picture of them, in white where it is dark."""
    for (row, column), value in np.ndenumerate(values):
        colour = "white" if is_dark[row, column] else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", fontsize=7, color=colour)


@figure()
def confusion(run):
    """Draw the confusion matrix of the test images, the errors shaded, with the accuracy of each class."""
    classes, labels = run.data.classes, run.data.test.labels
    counts = confusion_matrix(labels, run.probabilities.argmax(1), len(classes)).numpy()
    errors = np.ma.masked_array(counts, np.eye(len(classes), dtype=bool))
    drawn = Figure(figsize=(WIDTH, 6.4))
    axes = drawn.subplots()
    shown = axes.imshow(errors, cmap=matplotlib.colormaps["Oranges"].with_extremes(bad="#d6e6f2"), vmin=0)
    write_cells(axes, counts, (errors > 0.6 * errors.max()).filled(False), "{:d}")
    positions = range(len(classes))
    axes.set_xticks(positions, classes, rotation=45 if max(map(len, classes)) > 1 else 0, ha="center")
    axes.set_yticks(positions, classes)
    axes.set(xlabel="predicted class (numbers: images)", ylabel="true class")
    right = axes.secondary_yaxis("right")
    right.set_yticks(positions, [f"{value:.1f} %" for value in 100 * counts.diagonal() / counts.sum(1)])
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


@figure()
def examples(run, rows=2):
    """Draw the first test images of each class that are classified right and wrong."""
    data, predicted = run.data, run.probabilities.argmax(1)
    classes, (height, width) = data.classes, data.test.images.shape[1:]
    images = torch.full((2 * rows, len(classes), height, width), math.nan)
    titles = np.full(images.shape[:2], "", dtype=object)
    for label in range(len(classes)):
        for first_row, is_right in ((0, True), (rows, False)):
            chosen = ((data.test.labels == label) & ((predicted == label) == is_right)).nonzero()[:rows, 0]
            for row, index in enumerate(chosen.tolist(), start=first_row):
                images[row, label] = data.test.images[index]
                titles[row, label] = f"{classes[predicted[index]]}\n{100 * run.probabilities[index].max():.0f} %"
    drawn = Figure(figsize=(WIDTH, 4.9))
    axes = drawn.subplots()
    flat = images.flatten(0, 1)
    _, tops, lefts = draw_mosaic(axes, flat, titles.flat, len(classes), gap=3, room=height // 3, vmin=0, vmax=255)
    axes.set_xticks([left + width / 2 for left in lefts], classes, fontsize=8)
    axes.set_yticks([top + height / 2 for top in tops], ["right"] * rows + ["wrong"] * rows, fontsize=8)
    axes.set(xlabel="true class; above each image the predicted one and its probability", ylabel="classified")
    drawn.suptitle(f"Test images, the first of each class that are classified right and wrong\n{run.title}")
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# A linear classifier, which tells how readable the class is inside a network (Zeiler & Fergus, Table 7)
# ---------------------------------------------------------------------------------------------------------------------

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
        weights = centred.T @ solved if is_wide else solved
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


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a convolutional network
# ---------------------------------------------------------------------------------------------------------------------


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


@figure(CNN)
def filters(run):
    """Draw the first convolution's kernels before and after training, and what it changed."""
    start, trained = first_kernels(run.untrained_model()), first_kernels(run.model)
    drawn = Figure(figsize=(WIDTH, 6.6))
    panels = drawn.subplots(1, 3)
    limit, change = max(start.abs().max(), trained.abs().max()).item(), (trained - start).abs().max().item()
    shown = {"at the start": (start, limit), "trained": (trained, limit)}
    shown["the change, on its own scale"] = trained - start, change
    for axes, (title, (kernels, limit)) in zip(panels, shown.items(), strict=True):
        numbers = [f"{number}" for number in range(len(kernels))]
        picture, *_ = draw_mosaic(axes, kernels, numbers, columns=4, gap=1, room=2, vmin=-limit, vmax=limit)
        axes.set(title=title)
        drawn.colorbar(picture, ax=axes, label="weight", orientation="horizontal", shrink=0.9, ticks=MaxNLocator(4))
    drawn.suptitle(f"The kernels of {convolutions(run.model)[0]}, after {len(run.history)} epochs\n{run.title}")
    return drawn


@torch.inference_mode()
def activation_statistics(model, images, batch_size=250):
    """Return statistics of each convolution's activations after ReLU over images (N, H, W).

    For each layer a dict of float64 arrays: image_mean (N,), each image's mean over maps and positions; and by feature
    map mean (C,) and std (C,) over images and positions, std_across_images (C,) of the images' means over positions,
    zeros (C,) in percent.
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
            "std_across_images": mean.std(0),
            "zeros": 100 * zeros.mean(0),
        }
    return statistics


@figure(CNN)
def activations(run):
    """Draw the statistics of the activations over the test images, with a table."""
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
        row[2].axhline(values["zeros"].mean(), color=AFTER, linewidth=1, label=f"all: {values['zeros'].mean():.1f} %")
        row[2].set(title=f"{layer}: zeros", xlabel="feature maps, ranked by mean", ylabel="zeros in %", ylim=(0, 100))
        for axes in row:
            axes.legend(fontsize=7)
    drawn.suptitle(f"Activations after ReLU over {len(run.data.test.images):,} test images\n{run.title}")
    return {"activations.png": drawn, "activations.csv": activations_table(statistics)}


def activations_table(statistics):
    """Return a row for each feature map and one for each whole layer ('all'); zeros in percent."""
    columns = {"layer": str, "feature_map": str, "mean": float, "std": float, "std_across_images": float}
    columns["zeros_percent"] = float
    rows = []
    for layer, values in statistics.items():
        mean, spread = values["mean"], values["std"]
        overall = np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)
        rows.append((layer, "all", mean.mean(), overall, values["image_mean"].std(), values["zeros"].mean()))
        by_map = zip(mean, spread, values["std_across_images"], values["zeros"], strict=True)
        rows += [(layer, str(number), *numbers) for number, numbers in enumerate(by_map)]
    return Table(columns, [dict(zip(columns, row, strict=True)) for row in rows])


LAYERS = {"network": str, "layer": str, "accuracy": float}
LAYER_STATES = ("trained", "untrained")


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


def measure_layers(run):
    """Return how readable the class is, in percent of the test images, from each layer, trained and not, a Table."""
    rows, train, test = [], run.data.train, run.data.test
    for state, model in zip(LAYER_STATES, (run.model, run.untrained_model()), strict=True):
        fitted, tested = (layer_features(model, images) for images in (train.images[:RIDGE_IMAGES], test.images))
        for layer, features in fitted.items():
            labels = train.labels[: len(features)]
            accuracy = readable(features, labels, tested[layer], test.labels, len(run.data.classes))
            rows.append({"network": state, "layer": layer, "accuracy": accuracy})
    return Table(LAYERS, rows)


@figure(CNN)
def layers(run):
    """Draw, as in Table 7, how readable the class is for a linear classifier, layer by layer, trained and untrained."""
    table = measure_layers(run)
    drawn = Figure(figsize=(WIDTH, 3.6))
    axes = drawn.subplots()
    axes.axhline(run.history[-1]["test_accuracy"], color=OTHER, linestyle="--", label="the network's own answer")
    for state, colour, away in zip(LAYER_STATES, (AFTER, BEFORE), (7, -14), strict=True):
        line = [(row["layer"], row["accuracy"]) for row in table.rows if row["network"] == state]
        axes.plot(*zip(*line, strict=True), "o-", color=colour, label=f"{state} network")
        look = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        look["bbox"] = {"color": "white", "pad": 0.5}
        for name, value in line:
            axes.annotate(f"{value:.1f}", (name, value), (0, away), **look)
    axes.set(xlabel="what the linear classifier is given", ylabel="accuracy in %", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    about = f"a ridge classifier on {RIDGE_IMAGES:,} training images, over {len(run.data.test.labels):,} test images"
    drawn.suptitle(f"Where the class becomes readable: {about}\n{run.title}")
    return {"layers.png": drawn, "layers.csv": table}


# ---------------------------------------------------------------------------------------------------------------------
# The deconvolutional network of Zeiler & Fergus (2013), arXiv:1311.2901, section 2.1
# ---------------------------------------------------------------------------------------------------------------------


def layers_up_to(model, layer):
    """Return the network's layers by name, from the first to the one called layer."""
    layers = dict(model.layers.named_children())
    return dict(itertools.islice(layers.items(), list(layers).index(layer) + 1))


def find_switches(model, outputs):
    """Return where each pooling's maxima stood, by its name, and the size that it pooled.

    outputs: those of the layers by name and, of a network that pools first, the 'images' (N, 1, H, W) themselves.

    ReLU comes before pooling here, as in the paper, whatever order training uses.
    """
    switches, before = {}, "images"
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
    outputs = {"images": images.unsqueeze(1), **model.outputs(images)}
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
    corners = ((size + offset + stride * torch.stack([rows, columns], dim=1)).tolist(), padded)
    return torch.stack(
        [image[top : top + size, left : left + size] for (top, left), image in zip(*corners, strict=True)]
    )


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

    blocks, gray = [], 0.5 + 0.5 * scaled(reconstructions, quantile=0.995)
    for pair in zip(gray, patches / 255, strict=True):
        blocks.append(
            torch.cat([make_grid(each[:, None], nrow=3, padding=1, pad_value=math.nan)[0] for each in pair], 1)
        )
    blocks = torch.stack(blocks)
    height, width = blocks.shape[1:]
    room, rows = height // 6, math.ceil(len(blocks) / columns)
    drawn = Figure(figsize=(WIDTH, rows / columns * WIDTH * (height + room + 4) / (width + 4) + 0.9))
    axes = drawn.subplots()
    draw_mosaic(axes, blocks, titles, columns, gap=4, room=room, vmin=0, vmax=1)
    axes.set_xlabel("left: reconstructions, black to white about zero, a scale a map; right: the patches themselves")
    return drawn


def maps_inside(run, count):
    """Return the maps of inside_first by layer, without the first convolution's, whose reconstructions are its kernels.

    Of a network with a single convolution those of that one.
    """
    layers, size = list(run.exciting)[1:] or list(run.exciting), run.data.test.images.shape[1]
    return {layer: inside_first(run.model, layer, run.exciting[layer], size, count) for layer in layers}


@figure(CNN)
def deconv(run, count=16):
    """Draw, as in Fig. 2, what excites feature maps most: reconstructions beside patches of the images."""
    images, made = run.data.test.images, {}
    for layer, maps in maps_inside(run, count).items():
        pairs = exciting_patches(run.model, layer, images, run.exciting[layer], maps)
        drawn = draw_pairs(*pairs, [f"map {number}" for number in maps])
        drawn.suptitle(f"What excites {len(maps)} feature maps of {layer} most: nine test images each\n{run.title}")
        made[f"deconv_{layer}.png"] = drawn
    return made


EVOLUTION_EPOCHS = (0, 1, 2, 5, 10)


def evolving_patches(models, images, maps):
    """Return each model's strongest reconstruction of some feature maps: the best image is sought anew for each model.

    images: (N, H, W); maps: int64 (M,) by layer. Returns by layer the reconstructions, float32 (M, models, size, size)
    cut to the receptive field, and the strengths, float32 (M, models).
    """
    found = {layer: [] for layer in maps}
    for model in models:
        exciting = most_exciting(model, images, count=1)
        for layer, chosen in maps.items():
            reconstructions, _ = exciting_patches(model, layer, images, exciting[layer], chosen)
            found[layer].append((reconstructions[:, 0], exciting[layer].strengths[0, chosen]))
    return {layer: [torch.stack(parts, 1) for parts in zip(*pairs, strict=True)] for layer, pairs in found.items()}


@figure(CNN)
def evolution(run, count=16):
    """Draw, as in Fig. 4, the strongest reconstruction of some feature maps as training goes on."""
    images, epochs = run.data.test.images, [epoch for epoch in EVOLUTION_EPOCHS if epoch <= len(run.history)]
    maps = maps_inside(run, count)
    evolved = evolving_patches([run.snapshot(epoch) for epoch in epochs], images, maps)
    drawn = Figure(figsize=(WIDTH, 6.9 * len(maps)))
    panels = drawn.subplots(len(maps), 2, squeeze=False)
    for row, (layer, (pictures, strengths)) in zip(panels, evolved.items(), strict=True):
        size, half = pictures.shape[-1], math.ceil(len(pictures) / 2)
        for axes, part in zip(row, (slice(half), slice(half, None)), strict=True):
            titles = [f"{strength:.2g}" for strength in strengths[part].flatten()]
            flat, room = scaled(pictures[part].flatten(0, 1)), math.ceil(size / 5)
            _, tops, lefts = draw_mosaic(axes, flat, titles, len(epochs), math.ceil(size / 8), room, vmin=-1, vmax=1)
            axes.set_xticks([left + size / 2 - 0.5 for left in lefts], epochs)
            axes.set_yticks([top + size / 2 - 0.5 for top in tops], [f"map {number}" for number in maps[layer][part]])
            axes.set(xlabel="after epoch (0: untrained)", title=f"{layer}; above each: the activation")
    drawn.suptitle(f"Strongest reconstructions as training goes on, each on its own scale about zero\n{run.title}")
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# Invariance, occlusion and silenced maps, after Zeiler & Fergus (2013), and Gabor functions
# ---------------------------------------------------------------------------------------------------------------------

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


@figure(CNN)
def invariance(run, count=500):
    """Draw, as in Fig. 5, what shifting, scaling and turning images does to features and accuracy."""
    images, labels = (tensor[:count] for tensor in run.data.test)
    drawn = Figure(figsize=(WIDTH, 6.6))
    grid = drawn.subplots(3, 4, width_ratios=(1.1, 1, 1, 1))
    for row, (kind, amounts) in zip(grid, TRANSFORMATIONS.items(), strict=True):
        shown = amounts[torch.linspace(0, len(amounts) - 1, 9).long()].tolist()
        pictures = torch.cat([transform(images[:1], kind, amount) for amount in shown])
        room = pictures.shape[1] // 4
        draw_mosaic(row[0], pictures, [f"{amount:g}" for amount in shown], 3, 4, room=room, vmin=0, vmax=255)
        row[0].set(xlabel=kind)
        *distances, right = sensitivity(run.model, images, labels, kind)
        for axes, name, values in zip(
            row[1:], ("first layer moves by", "last layer moves by"), distances, strict=False
        ):
            low, middle, high = values.quantile(torch.tensor([0.1, 0.5, 0.9]), dim=1)
            axes.fill_between(amounts, low, high, color=AFTER, alpha=0.2, linewidth=0)
            axes.plot(amounts, middle, color=AFTER)
            axes.set_ylabel(name)
        row[3].plot(amounts, 100 * right.mean(1), color=OTHER)
        row[3].set(ylabel="accuracy in %", ylim=(0, 100))
        for axes in row[1:]:
            axes.set(xlabel=kind)
            axes.grid(alpha=0.3)
    top = max(axes.get_ylim()[1] for axes in grid[:, 1:3].flat)
    for axes in grid[:, 1:3].flat:
        axes.set_ylim(0, top)
    about = "distances relative to the norm of the features, median and middle 80 %"
    drawn.suptitle(f"{len(images)} test images transformed: {about}\n{run.title}")
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


class Occlusion(NamedTuple):
    """What a square centred on each pixel does, each (H, W).

    probability: float32, of the true class; predicted: int64, the most probable class; activity: float32, the sum of
    feature_map, the one of the last convolution with the highest peak without the square.
    """

    probability: torch.Tensor
    predicted: torch.Tensor
    activity: torch.Tensor
    feature_map: int


@torch.inference_mode()
def occlude(model, image, label, size):
    """Slide a gray square over an image (1, H, W) and return the Occlusion (section 4.2)."""
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
    return Occlusion(*(values.view(shape) for values in found), int(feature_map))


@figure(CNN)
def occlusion(run, size=8, count=5):
    """Draw, as in Fig. 7, what hiding each part of an image from the network does."""
    chosen, layer = first_right_of_each_class(run)[:count].tolist(), convolutions(run.model)[-1]
    classes, colours = run.data.classes, matplotlib.colormaps["tab10"]
    drawn = Figure(figsize=(WIDTH, 1.34 * len(chosen) + 0.9))
    for row, number in zip(drawn.subplots(len(chosen), 5, squeeze=False), chosen, strict=True):
        image, label = run.data.test.images[number][None], int(run.data.test.labels[number])
        found = occlude(run.model, image, label, size)
        reconstruction = deconvolve(run.model, image, layer, torch.tensor([found.feature_map]))[0, 0]
        limit = reconstruction.abs().max().item() or 1
        row[0].imshow(occluded(image, size)[image.numel() // 2 + image.shape[2] // 2], cmap="gray", vmin=0, vmax=255)
        row[1].imshow(reconstruction, cmap="gray", vmin=-limit, vmax=limit)
        maps = [row[2].imshow(found.activity, cmap="viridis")]
        maps.append(row[3].imshow(found.probability, cmap="viridis", vmin=0, vmax=1))
        row[4].imshow(found.predicted, cmap=colours, vmin=-0.5, vmax=9.5)
        for axes, picture in zip(row[2:4], maps, strict=True):
            drawn.colorbar(picture, ax=axes, fraction=0.046).ax.tick_params(labelsize=6)
        named = found.predicted.unique().tolist()
        handles = [matplotlib.patches.Patch(color=colours(name), label=classes[name]) for name in named]
        row[4].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6, handlelength=1)
        row[0].set_ylabel(classes[label])
        row[1].set_xlabel(f"{layer}, map {found.feature_map}", fontsize=7, labelpad=1)
        heads = "image, with the square", "reconstruction", "the map's activity", "p(true class)", "most probable class"
        for axes, head in zip(row, heads, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_title(head if number == chosen[0] else "", fontsize=8)
    drawn.suptitle(f"A gray {size} x {size} square hides each part of the image in turn\n{run.title}")
    return drawn


@torch.inference_mode()
def predict_without_maps(model, images, layer, batch_size=500):
    """Return the predicted classes, int64 (C, N), when one feature map of a convolution after the other is silenced.

    images: (N, H, W), 0 to 255. A map that is silenced is zero everywhere.
    """
    rest, collected = model.layers[len(layers_up_to(model, layer)) :], []
    for batch in images.split(batch_size):
        maps, predicted = model.outputs(batch)[layer], []
        for number in range(maps.shape[1]):
            silenced = maps.clone()
            silenced[:, number] = 0
            *_, logits = model.pass_through(rest, silenced).values()
            predicted.append(logits.argmax(1))
        collected.append(torch.stack(predicted))
    return torch.cat(collected, dim=1)


def class_accuracies(predicted, labels, classes):
    """Return the accuracy of each class and, last, of all images in percent, float64 (..., classes + 1).

    predicted: int64 (..., N); labels: int64 (N,).
    """
    right = (predicted == labels).double()
    groups = [labels == label for label in range(classes)] + [labels >= 0]
    return 100 * torch.stack([right[..., group].mean(-1) for group in groups], dim=-1)


@figure(CNN)
def contribution(run, strongest=10, count=2000):
    """Draw the accuracy lost when a feature map is silenced, ranked, and by class for the strongest maps."""
    (images, labels), names = (tensor[:count] for tensor in run.data.test), run.data.classes
    intact = class_accuracies(run.probabilities[:count].argmax(1), labels, len(names))
    lost = {}
    for layer in convolutions(run.model):
        predicted = predict_without_maps(run.model, images, layer)
        lost[layer] = intact - class_accuracies(predicted, labels, len(names))
    drawn = Figure(figsize=(WIDTH, 4 + 1.7 * len(lost)))
    top, bottom = drawn.subfigures(2, 1, height_ratios=(len(lost), 1.7))
    panels = top.subplots(len(lost), squeeze=False, sharey=True)[:, 0]
    for axes, (layer, losses) in zip(panels, lost.items(), strict=True):
        axes.bar(range(len(losses)), losses[:, -1].sort(descending=True).values, color="0.6")
        axes.set(title=f"one feature map of {layer}", xlabel="feature maps, ranked", ylabel="points lost")
        axes.margins(x=0.01)
    draw_class_losses(bottom.subplots(), lost, names, strongest)
    about = f"accuracy lost when one is silenced, over the first {len(images):,} test images"
    drawn.suptitle(f"What feature maps are worth: {about}\n{run.title}")
    return drawn


def draw_class_losses(axes, lost, classes, strongest):
    """Draw what silencing costs each class, for the feature maps that cost most: a row each, strongest on top."""
    every = [(float(row[-1]), f"{layer}, map {n}", row) for layer, rows in lost.items() for n, row in enumerate(rows)]
    chosen = sorted(every, key=lambda entry: entry[0], reverse=True)[:strongest]
    values = np.stack([row.numpy() for _, _, row in chosen])
    limit = np.abs(values).max()
    shown = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    write_cells(axes, values, abs(values) > 0.6 * limit, "{:.1f}")
    axes.axvline(len(classes) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(classes) + 1), [*classes, "all"], fontsize=7)
    axes.set_yticks(range(len(chosen)), [name for _, name, _ in chosen])
    axes.set(title=f"the {len(chosen)} strongest feature maps by class", xlabel="true class", ylabel="silenced")
    axes.figure.colorbar(shown, ax=axes, label="accuracy lost in points")


GABOR_STARTS = 24  # for each kernel; the best fit counts
KERNELS = ("trained", "shuffled", "untrained")
GABOR = {
    "kernels": str,
    "feature_map": int,
    "r2": float,
    "orientation_degrees": float,
    "cycles_per_pixel": float,
    "cosine_to_start": float,
}


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


def gabor_fits(trained, untrained, seed=0):
    """Return kernels, float32 (K, size, size), and their GaborFit, by name of KERNELS.

    The null model of the trained kernels: the same kernels with their pixels shuffled.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.stack([kernel[torch.randperm(len(kernel), generator=generator)] for kernel in trained.flatten(1)])
    kernels = [trained, shuffled.view_as(trained), untrained]
    together = fit_gabor(torch.cat(kernels))
    fits = itertools.starmap(GaborFit, zip(*(values.split(len(trained)) for values in together), strict=True))
    return dict(zip(KERNELS, zip(kernels, fits, strict=True), strict=True))


def fit_run(run):
    """Return the gabor_fits of the run's first convolution."""
    return gabor_fits(first_kernels(run.model), first_kernels(run.untrained_model()), run.config.seed)


def gabor_table(fits):
    """Return gabor_fits as a Table."""
    start, rows = fits["untrained"][0].flatten(1), []
    for name, (kernels, fit) in fits.items():
        cosines = F.cosine_similarity(kernels.flatten(1), start)
        for number, values in enumerate(zip(*fit[1:], cosines, strict=True)):
            rows.append(dict(zip(GABOR, (name, number, *map(float, values)), strict=True)))
    return Table(GABOR, rows)


@figure(CNN)
def gabor(run, best=8):
    """Draw the kernels that Gabor functions fit best, the fits and the residuals, and R² of all."""
    fits = fit_run(run)
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
    for (name, (_, each)), colour in zip(fits.items(), (AFTER, OTHER, BEFORE), strict=True):
        axes.ecdf(each.r2, color=colour, label=f"{name}: median {np.median(each.r2):.2f}")
    axes.set(xlabel="R² of the Gabor fit", ylabel="share of kernels")
    axes.legend()
    axes.grid(alpha=0.3)
    layer = convolutions(run.model)[0]
    drawn.suptitle(
        f"Gabor functions fitted to the {len(kernels)} kernels of {layer}: the best fits, and all\n{run.title}"
    )
    return {"gabor.png": drawn, "gabor.csv": gabor_table(fits)}


# ---------------------------------------------------------------------------------------------------------------------
# Inside the recurrent networks
# ---------------------------------------------------------------------------------------------------------------------


GRADIENTS = {"epoch": int, "state": str, "step": int, "norm": float}


def states_by_row(model, images):
    """Yield the state after each row of images (N, H, W): hidden and, of an LSTM, cell, each (layers, N, units)."""
    state = None
    for row in model.rows(images).split(1, dim=1):
        _, state = model.recurrent(row, state)
        yield state if isinstance(state, tuple) else (state,)


def gradient_norms(model, images, labels):
    """Return how strongly the loss depends on the top layer's state after each step: 'hidden', for an LSTM also 'cell'.

    images: (N, H, W), 0 to 255; labels: int64 (N,). Each float32 (steps,): the Euclidean norm of the gradient of an
    image's loss with respect to the state that the next step reads (after the last one: the output), averaged over
    images. The rows are fed one at a time, so that every state stands in the graph.
    """
    states = list(states_by_row(model, images))
    losses = F.cross_entropy(model.fc(states[-1][0][-1]), labels, reduction="none")
    gradients = torch.autograd.grad(losses.sum(), list(itertools.chain(*states)), materialize_grads=True)
    norms = torch.stack([gradient[-1].norm(dim=1).mean() for gradient in gradients]).view(len(states), -1)
    return dict(zip(("hidden", "cell"), norms.T, strict=False))


def measure_gradients(run, images=1000):
    """Return the gradient_norms of the first test images after every epoch of which the weights were kept, a Table."""
    rows, last = [], len(run.history)
    kept = [epoch for epoch in range(1, last) if (run.folder / "snapshots" / f"epoch_{epoch:02d}.pt").is_file()]
    models = {0: run.untrained_model(), **{epoch: run.snapshot(epoch) for epoch in kept}, last: run.model}
    for epoch, model in models.items():
        norms = gradient_norms(model, *(tensor[:images] for tensor in run.data.test))
        for state, values in norms.items():
            rows += [(epoch, state, step, value) for step, value in enumerate(values.tolist(), start=1)]
    return Table(GRADIENTS, [dict(zip(GRADIENTS, row, strict=True)) for row in rows])


def is_whole_gradients(rows):
    """Whether rows of GRADIENTS hold the same steps, from 1 on, of each epoch and state, and the output's gradient."""
    lines = [list(line) for _, line in itertools.groupby(rows, key=lambda row: (row["epoch"], row["state"]))]
    steps = [[row["step"] for row in line] for line in lines]
    outputs = [line[-1]["norm"] for line in lines if line[0]["state"] == "hidden"]
    return bool(lines) and all(each == list(range(1, len(steps[0]) + 1)) for each in steps) and min(outputs) > 0


def gradient_line(rows, epoch, state=None):
    """Return the norms over the steps, float64 (steps,), of a state after an epoch (-1: the last one measured).

    state: 'hidden' or 'cell'; None: at each step the stronger one.
    """
    epoch = max(row["epoch"] for row in rows) if epoch == -1 else epoch
    chosen = [row for row in rows if row["epoch"] == epoch and state in (None, row["state"])]
    norms = np.zeros(max((row["step"] for row in chosen), default=0))
    for row in chosen:
        norms[row["step"] - 1] = max(norms[row["step"] - 1], row["norm"])
    return norms


def reach_by_epoch(rows):
    """Return the epochs, and the share of the last step's gradient that reaches the first, of the stronger state."""
    epochs = sorted({row["epoch"] for row in rows})
    lines = [gradient_line(rows, epoch) for epoch in epochs]
    return epochs, [norms[0] / norms[-1] for norms in lines]


GRADIENT_FLOOR = 1e-16  # the bottom of the axis, where gradients that are zero are drawn


def draw_gradient_line(axes, norms, **style):
    """Draw norms over the steps on a log axis, those that vanished altogether as triangles at its bottom."""
    steps, norms = np.arange(1, len(norms) + 1), np.asarray(norms)
    gone = norms < GRADIENT_FLOOR
    axes.plot(steps, np.maximum(norms, GRADIENT_FLOOR), **style)
    axes.plot(steps[gone], np.full(gone.sum(), GRADIENT_FLOOR), "v", color=style["color"], markersize=4)
    axes.set(xlabel="step: rows read", yscale="log")
    if gone.any():
        axes.set_ylim(bottom=GRADIENT_FLOOR / 2)
    axes.grid(alpha=0.3)


@figure(RNN)
def gradients(run):
    """Draw how far back the loss reaches into the top layer's state, and by epoch."""
    table = measure_gradients(run)
    states = list(dict.fromkeys(row["state"] for row in table.rows))
    drawn = Figure(figsize=(WIDTH, 3.4))
    *panels, last = drawn.subplots(1, len(states) + 1)
    for axes, state in zip(panels, states, strict=True):
        lines = ((0, "untrained", BEFORE), (-1, f"after {len(run.history)} epochs", AFTER))
        for epoch, label, colour in lines:
            norms = gradient_line(table.rows, epoch, state)
            if state == "cell":
                norms = norms[:-1]  # the last cell state is read by nothing
            draw_gradient_line(axes, norms, color=colour, label=label)
        axes.set(title=f"{state} state", ylabel="norm of the loss gradient")
        axes.legend()
    epochs, shares = reach_by_epoch(table.rows)
    last.semilogy(epochs, np.maximum(shares, GRADIENT_FLOOR), marker=".", color=AFTER)
    last.set(title="share that reaches the first row", xlabel="epoch", ylabel="first step's norm / last step's")
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    last.grid(alpha=0.3)
    drawn.suptitle(f"How far back the loss reaches (triangles: nothing is left)\n{run.title}")
    return {"gradients.png": drawn, "gradients.csv": table}


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


@figure(RNN)
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
    drawn.suptitle(f"What the network answers as it reads, row after row\n{run.title}")
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# Several runs compared, by setting
# ---------------------------------------------------------------------------------------------------------------------


class Group(list):
    """The SavedRuns of one setting, a run for each seed."""

    @cached_property
    def config(self):
        """The setting, without its seed."""
        return self[0].config.setting()

    @cached_property
    def epochs(self):
        """The epoch after which the runs are compared: the report's last or, before that, the last that all have."""
        finished = [len(run.history) for run in self if run.history and not run.record.diverged]
        return min([REPORT_EPOCHS, *finished])

    @property
    def shortfall(self):
        """Words such as 'only 3 epochs' where that is before the report's last, else none."""
        return "" if self.epochs == REPORT_EPOCHS else f"only {self.epochs} epoch{'s' * (self.epochs > 1)}"

    @cached_property
    def summary(self):
        """The Summary of the runs after that epoch."""
        return summarise(self, self.epochs, REPORT)

    @cached_property
    def finished(self):
        """The runs that have that epoch; those that diverged before it have not."""
        return [run for run in self if len(run.history) >= self.epochs]

    @property
    def accuracies(self):
        """The test accuracies in percent of the finished runs after that epoch."""
        return self.summary.accuracies


def group_runs(runs):
    """Return the Groups of runs in the rising order of their settings.

    Runs of fewer epochs than the reference report's are groups of their own. One that diverged belongs to those of its
    setting that have all epochs, where there are any.
    """

    def in_order(run):  # settings_of has the seed last
        values = [getattr(run.config, one.name) for one in settings_of(type(run.config))]
        return run.script, [(value is not None, value) for value in values]

    def setting(run):
        return run.script, run.config.setting(), run.source

    unique = {(run.config, run.source): run for run in sorted(runs, key=in_order)}.values()
    whole = {setting(run) for run in unique if len(run.history) >= REPORT_EPOCHS}
    ended, unfinished = [], []
    for run in unique:
        belongs = len(run.history) >= REPORT_EPOCHS or (run.record.diverged and setting(run) in whole)
        (ended if belongs else unfinished).append(run)
    return [Group(found) for found in group_by_setting(ended) + group_by_setting(unfinished)]


def tell_apart(said):
    """Return what tells each from the others, and what all share, in words; said: a dict of words for each."""
    first = said[0] if said else {}
    common = {name: text for name, text in first.items() if all(words.get(name) == text for words in said)}
    own = [", ".join(text for name, text in words.items() if text and name not in common) for words in said]
    return own, ", ".join(filter(None, common.values()))


def labels_of(groups):
    """Return what tells each group from the others in words, and the words that all have in common."""
    said = [{**group.config.said(), "source": group[0].source.strip(", ")} for group in groups]
    for words, group in zip(said, groups, strict=True):
        diverged = group.summary.diverged
        words["epochs"] = group.shortfall
        words["diverged"] = f"{len(diverged)} of {len(group)} diverged" if diverged else ""
    return tell_apart(said)


def families_of(groups, name):
    """Return lists of at least two groups that differ in the setting called name alone, in its rising order."""
    families = {}
    for group in groups:
        settings = asdict(group.config) | {"script": group[0].script, "epochs": group.epochs}
        if name in settings:
            del settings[name]
            families.setdefault(tuple(settings.items()), []).append(group)
    return [family for family in families.values() if len(family) > 1]


OWN_PICTURE = ("rows_before", "rows_after", "keep_bias", "pixels", "without")  # settings that have a comparison of their own


def usual(groups):
    """Return the groups in which the settings of OWN_PICTURE have their defaults."""
    is_default = lambda config, name: getattr(config, name, None) == getattr(type(config), name, None)  # noqa: E731
    return [group for group in groups if all(is_default(group.config, name) for name in OWN_PICTURE)]


def colour_of(group):
    """Return the colour of a group's network."""
    return NETWORK_COLOURS.get(group.config.network.partition(" ")[0], OTHER)


def colours_of(groups):
    """Return a colour for each group: its network's where networks differ, else shades from dark to light."""
    if len(set(map(colour_of, groups))) == len(groups):
        return [colour_of(group) for group in groups]
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.85, len(groups)))


def set_log(axes):
    """Give an axes a log scale upwards, with plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))


class Scale(NamedTuple):
    """How accuracies in percent are drawn: as they are or, where all crowd at the top, as errors on a log axis."""

    is_error: bool

    @classmethod
    def fitting(cls, means):
        return cls(min(means, default=0) > 90)

    def values(self, accuracies):
        return abs(100 * self.is_error - np.asarray(accuracies))

    def label(self, axes, text):
        """Label an axes with text, in which the word accuracy stands for what is drawn."""
        axes.set_ylabel(text.replace("accuracy", "error in %" if self.is_error else "accuracy in %"))
        if self.is_error:
            set_log(axes)


def draw_epochs(axes, groups, column="test_accuracy"):
    """Draw a column of metrics.csv by epoch for each group: the mean over seeds in a band that spans them.

    Crosses: what the reference report gives.
    """
    groups = [group for group in groups if group.finished]
    lines = [[[row[column] for row in run.history[: group.epochs]] for run in group.finished] for group in groups]
    scale = Scale.fitting(np.mean(values, 0)[-1] if "accuracy" in column else 0 for values in lines)
    looks = zip(groups, labels_of(groups)[0], colours_of(groups), map(scale.values, lines), strict=True)
    for group, label, colour, values in looks:
        epochs = range(1, group.epochs + 1)
        axes.plot(epochs, values.mean(0), color=colour, marker=".", markersize=4, label=label)
        axes.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
        reported = group.summary.reported.comparable
        if column == "test_accuracy" and reported:
            axes.plot(REPORT_EPOCHS, scale.values(reported), "x", color=colour, markersize=7, markeredgewidth=2)
    axes.set_xlabel("epoch")
    scale.label(axes, column.replace("_", " "))
    if "loss" in column:
        set_log(axes)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3, which="both")


def draw_families(families, columns, draw, about):
    """Return a Figure with a panel for each family of groups, drawn by draw(axes, family); None for no family."""
    if not families:
        return None
    columns = min(columns, len(families))
    rows = math.ceil(len(families) / columns)
    drawn = Figure(figsize=(WIDTH, 2.8 * rows + 0.5))
    panels = drawn.subplots(rows, columns, squeeze=False).flat
    for family, axes in zip(families, panels, strict=False):
        draw(axes, family)
        axes.set_title(labels_of(family)[1])
    for axes in panels:  # what is left of the last row
        axes.set_axis_off()
    drawn.suptitle(about)
    return drawn


@comparison("curves")
def compare_curves(groups, most=6):
    """Draw test accuracy by epoch: up to six settings beside each other, of more a panel for each question."""
    about = "mean over seeds, the band spans them; crosses: the reference report"
    if len(groups) <= most:
        drawn = Figure(figsize=(WIDTH, 3.8))
        for axes, column in zip(drawn.subplots(1, 2), ("test_accuracy", "train_loss"), strict=True):
            draw_epochs(axes, groups, column)
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
        common = labels_of(groups)[1]
        drawn.suptitle(f"Accuracy and loss by epoch{': ' * bool(common)}{common}\n{about}")
        return drawn

    def draw(axes, family):
        draw_epochs(axes, family)
        low, high = axes.get_ylim()
        axes.set_ylim(low * (low / high) ** 0.2 if axes.get_yscale() == "log" else low - (high - low) / 5, high)
        axes.legend(fontsize=7, loc="lower left", ncols=2)

    names = dict.fromkeys(name for group in groups for name in asdict(group.config) if name != "seed")
    families = [family for name in names for family in families_of(usual(groups), name)]
    legible = [family[start : start + most] for family in families for start in range(0, len(family), most)]
    return draw_families(legible, 2, draw, f"Each panel varies one setting: {about}")


def draw_seeds(axes, groups, name):
    """Draw the accuracy of every seed for each group, which differ in the setting called name."""
    scale = Scale.fitting(np.mean(group.accuracies or [0]) for group in groups)
    for place, group in enumerate(groups):
        values, reported = scale.values(group.accuracies), group.summary.reported.comparable
        colour = colour_of(group)
        axes.plot(place + np.linspace(-0.15, 0.15, len(values)), values, ".", color=colour)
        if len(values):
            axes.hlines(values.mean(), place - 0.3, place + 0.3, color=colour)
        if reported:
            axes.plot(place, scale.values(reported), "kx")
    axes.set_xticks(range(len(groups)), [number_text(getattr(group.config, name)) for group in groups])
    axes.set_xlabel(name.replace("_", " ").replace("lr", "learning rate"))
    scale.label(axes, "test accuracy")
    axes.margins(x=0.2)
    axes.grid(axis="y", alpha=0.3, which="both")


def draw_against(name, groups):
    """Draw the accuracy of every seed against the setting called name, a panel for each choice of the others."""
    about = "A dot a seed, a line their mean, a cross the reference report's figure"
    return draw_families(families_of(groups, name), 3, partial(draw_seeds, name=name), about)


@comparison("hidden_size")
def against_hidden_size(groups):
    """Draw the accuracy of every seed against the hidden size."""
    return draw_against("hidden_size", groups)


@comparison("learning_rate")
def against_learning_rate(groups):
    """Draw the accuracy of every seed against the learning rate."""
    return draw_against("lr", groups)


@comparison("optimizer")
def against_optimizer(groups):
    """Draw the accuracy of every seed against the optimizer."""
    return draw_against("optimizer", groups)


def draw_lost(axes, family):
    """Draw the accuracy that each layer is worth: what the same seed loses without it, ranked, a dot a seed."""
    whole = next(group for group in family if group.config.without == "nothing")
    before, lost = {run.config.seed: run.test_accuracy(whole.epochs) for run in whole.finished}, {}
    for group in (group for group in family if group is not whole):
        pairs = [run for run in group.finished if run.config.seed in before]
        name = f"{group.config.without}\n{group[0].record.conditions.parameters:,} weights left"
        if len(pairs) < len(group):
            name += f"\n{len(group) - len(pairs)} of {len(group)} seeds have no pair"
        lost[name] = [before[run.config.seed] - run.test_accuracy(group.epochs) for run in pairs]
    ranked = sorted(((np.mean(points), name) for name, points in lost.items() if points), reverse=True)
    for place, (mean, name) in enumerate(ranked):
        axes.plot(lost[name], place + np.linspace(-0.12, 0.12, len(lost[name])), "o", color=AFTER, markersize=4)
        axes.vlines(mean, place - 0.3, place + 0.3, color=OTHER)
        axes.annotate(f"{mean:.1f}", (mean, place - 0.32), ha="center", va="bottom", color=OTHER, fontsize=8)
    axes.set_yticks(range(len(ranked)), [name for _, name in ranked])
    axes.set(xlabel="points of test accuracy lost", ylim=(len(ranked) - 0.4, -0.7))
    axes.set_xlim(min(0, axes.get_xlim()[0]), max(0, axes.get_xlim()[1]))
    axes.grid(axis="x", alpha=0.3)


@comparison("without")
def compare_without(groups):
    """Draw, as in Table 3, what each layer is worth: the accuracy lost when the network is trained without it."""
    families = families_of(groups, "without")
    families = [family for family in families if any(group.config.without == "nothing" for group in family)]
    return draw_families(families, 2, draw_lost, "What the network loses when it is trained without a layer")


def gradient_at_digit(run):
    """Return the norm of the loss gradient that reaches the digit's last row before training, of the stronger state.

    None where it was not measured.
    """
    norms = gradient_line(read_measured(run, "gradients"), 0)
    return norms[-1 - run.config.rows_after] if len(norms) > run.config.rows_after else None


def draw_memory(left, right, family, controls, look, label, shift):
    """Draw what one kind of network remembers, every seed: against the blank rows, and against gradient_at_digit.

    controls: the Groups that read the blank rows before the digit, hollow; shift: in rows, so that kinds that remember
    alike stand beside each other.
    """
    held = [group for group in family if group.finished]
    means = [(group.config.rows_after + shift, np.mean(group.accuracies)) for group in held]
    left.plot(*zip(*means, strict=True), **look, label=label)
    dots = look | {"linestyle": "none"}
    marks = [mark for group in held for mark in zip(group.finished, group.accuracies, strict=True)]
    for run, accuracy in marks:
        gradient = gradient_at_digit(run)
        left.plot(run.config.rows_after + shift, accuracy, **dots, alpha=0.5)
        if gradient is not None:
            right.plot(max(gradient, GRADIENT_FLOOR), accuracy, **dots, alpha=0.7)
    for group in controls:
        spots = [group.config.rows_before + shift] * len(group.accuracies)
        left.plot(spots, group.accuracies, **dots, markerfacecolor="none")


@comparison("memory")
def compare_memory(groups):
    """Draw accuracy against the blank rows read after the digit, and against the gradient that reaches it at first."""
    families = [family for family in families_of(groups, "rows_after") if not family[0].config.rows_before]
    families = [family for family in families if any(group.finished for group in family)]
    if not families:
        return None
    kinds = [replace(family[0].config, rows_after=0) for family in families]
    names, common = tell_apart([kind.said() for kind in kinds])
    drawn = Figure(figsize=(WIDTH, 4.4))
    left, right = drawn.subplots(1, 2, sharey=True)
    networks = [kind.network for kind in kinds]
    controls = {(first.config, first.epochs): others for first, *others in families_of(groups, "rows_before")}
    for number, (kind, name, family) in enumerate(zip(kinds, names, families, strict=True)):
        marker, line = (("o", "-"), ("^", "--"), ("s", ":"))[networks[:number].count(kind.network) % 3]
        look = {"color": NETWORK_COLOURS[kind.network], "marker": marker, "markersize": 5, "linestyle": line}
        shift, control = number - (len(kinds) - 1) / 2, controls.get((kind, family[0].epochs), [])
        draw_memory(left, right, family, control, look, name or kind.network, shift)
    left.set(xlabel="blank rows read after the digit\n(hollow: before it)", ylabel="test accuracy in %", ylim=(0, 102))
    left.set_xticks(sorted({group.config.rows_after for family in families for group in family}))
    right.set(xlabel="norm of the loss gradient that reaches\nthe digit before training", xscale="log")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    drawn.legend(loc="outside lower center", ncols=5)
    drawn.suptitle(f"How long a network can hold what it read: a mark a seed, lines their means\n{common}")
    return drawn


@comparison("results")
def results(groups):
    """Write results.csv and results.md: the Summary of each setting after the report's epochs."""
    rows = []
    for group in groups:
        setting = ", ".join(filter(None, (group.summary.setting, group.shortfall)))
        rows.append(group.summary._replace(setting=setting).row())
    alignment = ["---"] + ["---:"] * (len(Summary.COLUMNS) - 1)
    lines = [f"| {' | '.join(row)} |" for row in (Summary.COLUMNS, alignment, *rows)]
    head = f"# Results\n\n{results_head(REPORT_EPOCHS)}.\n\n"
    table = Table(dict.fromkeys(Summary.COLUMNS, str), [dict(zip(Summary.COLUMNS, row, strict=True)) for row in rows])
    return {"results.csv": table, "results.md": head + "\n".join(lines) + "\n"}


@comparison("tensorboard")
def tensorboard_means(groups):
    """Write a TensorBoard run for each setting with several seeds: the scalars' means over them, and its HParams."""
    made = {}
    for group in (group for group in groups if len(group.finished) > 1):
        writer = memory_writer(Path("."), is_new=True)
        seeds, diverged = len(group.finished), len(group.summary.diverged)
        _, start, end = hyperparameters(group.finished[0].record, seed=None, seeds=seeds)
        writer.file_writer.add_summary(start)
        for number in range(group.epochs):
            for tag, column in TENSORBOARD_TAGS.items():
                writer.add_scalar(tag, np.mean([run.history[number][column] for run in group.finished]), number + 1)
        writer.file_writer.add_summary(end)
        name = run_folder("", group.config, group[0].record.conditions.data_source).name.removesuffix("_seed0")
        name += f"_{seeds}seeds" + f"_{diverged}diverged" * bool(diverged)
        name += f"_{group.epochs}epochs" * bool(group.shortfall)
        made[f"tensorboard/{group[0].script}/{name}/{EVENTS}"] = writer.take()
    return made or None


class Measurement(NamedTuple):
    """A Table that belongs to a run: the script whose runs have it, how it is measured, and when it is whole."""

    script: str
    measure: object
    columns: dict
    is_whole: object


def holds_all(column, values):
    """Return a function that says whether a Table's rows hold all of some values in a column."""
    return lambda rows: set(values) <= {row[column] for row in rows}


MEASUREMENTS = {
    "gradients": Measurement(RNN, measure_gradients, GRADIENTS, is_whole_gradients),
    "gabor": Measurement(CNN, lambda run: gabor_table(fit_run(run)), GABOR, holds_all("kernels", KERNELS)),
    "layers": Measurement(CNN, measure_layers, LAYERS, holds_all("network", LAYER_STATES)),
}


@cache
def read_measured(run, name):
    """Return the rows of a run's own table, one of MEASUREMENTS, empty where it was not measured.

    It is measured and written into the run's figures/ where there is a checkpoint, and read from there otherwise.
    """
    of = MEASUREMENTS[name]
    if run.kind == of.script and run.has_checkpoint:
        save(name, {f"{name}.csv": of.measure(run)}, run.folder / "figures")
    return read_table(run.folder / "figures" / f"{name}.csv", of.columns, of.is_whole)


def measured_groups(groups, name):
    """Return the groups that have a table, one of MEASUREMENTS, with their runs' tables: (group, list of rows)."""
    found = [(group, [rows for run in group if (rows := read_measured(run, name))]) for group in groups]
    return [(group, tables) for group, tables in found if tables]


@comparison("gradients")
def compare_gradients(groups, most=2):
    """Draw how far back the loss reaches into the state, a panel a cell, and what reaches the first row by epoch.

    First of a panel's settings is the one that the cells share, where there is one.
    """
    measured = measured_groups(usual(groups) or groups, "gradients")
    if not measured:
        return None
    shared = ([[]] + families_of([group for group, _ in measured], "cell"))[-1]
    measured.sort(key=lambda found: not any(found[0] is group for group in shared))
    networks = {}
    for group, tables in measured:
        networks.setdefault(group.config.network, []).append((group, tables))
    drawn = Figure(figsize=(WIDTH, 4.2))
    *panels, last = drawn.subplots(1, len(networks) + 1)
    for axes, (network, found) in zip(panels, sorted(networks.items()), strict=True):
        colour, names = NETWORK_COLOURS[network], labels_of([group for group, _ in found[:most]])[0]
        if axes is not panels[0]:
            axes.sharey(panels[0])
        for number, ((_, tables), name) in enumerate(zip(found, names, strict=False)):
            strength = 1 - number / most
            for epoch, style in ((0, ":"), (-1, "-")):
                norms = geometric_mean([gradient_line(rows, epoch) for rows in tables])
                label = name if style == "-" and name else None
                draw_gradient_line(axes, norms, linestyle=style, color=colour, alpha=strength, label=label)
        shares = [dict(zip(*reach_by_epoch(rows), strict=True)) for rows in found[0][1]]
        epochs = sorted(set.intersection(*map(set, shares)))
        reach = geometric_mean([[share[epoch] for epoch in epochs] for share in shares])
        last.semilogy(epochs, np.maximum(reach, GRADIENT_FLOOR), marker=".", color=colour, label=network)
        axes.set_title(network)
    panels[0].set_ylabel("norm of the loss gradient")
    last.set(title="at the first row", xlabel="epoch", ylabel="share of the last step's norm")
    last.xaxis.set_major_locator(MaxNLocator(integer=True))
    last.grid(alpha=0.3)
    last.legend(fontsize=7)
    named = [line for axes in panels for line in axes.get_legend_handles_labels()[0]]
    if named:
        drawn.legend(handles=named, loc="outside lower center", ncols=2)
    about = "geometric mean over seeds; dotted: untrained, solid: trained, triangles: nothing is left"
    drawn.suptitle(f"How far back the loss reaches into the state (LSTM: the stronger of its two)\n{about}")
    return drawn


def geometric_mean(values):
    """Return the geometric mean over the first axis, zero where one is zero."""
    with np.errstate(divide="ignore"):
        return np.exp(np.log(np.array(values)).mean(0))


@comparison("gabor")
def compare_gabor(groups):
    """Draw each run's median R² of the Gabor fits, beside those of both null models."""
    measured = measured_groups(usual(groups) or groups, "gabor")
    if not measured:
        return None
    drawn = Figure(figsize=(WIDTH, 1.4 + 0.5 * len(measured)))
    axes = drawn.subplots()
    for shift, (kernels, colour) in enumerate(zip(KERNELS, (AFTER, OTHER, BEFORE), strict=True)):
        for row, (_, tables) in enumerate(measured):
            medians = [np.median([each["r2"] for each in rows if each["kernels"] == kernels]) for rows in tables]
            axes.plot(medians, [row + 0.2 * (shift - 1)] * len(medians), "o", color=colour, alpha=0.7, markersize=5)
        axes.plot([], [], "o", color=colour, label=kernels)
    names, common = labels_of([group for group, _ in measured])
    axes.set_yticks(range(len(measured)), names, fontsize=7)
    axes.set(xlabel="median R² of the Gabor fits, a dot a seed")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    drawn.legend(loc="outside lower center", ncols=len(KERNELS))
    drawn.suptitle(f"Do the first kernels resemble Gabor functions?\n{common}")
    return drawn


# ---------------------------------------------------------------------------------------------------------------------
# The reference report's claims, each settled by a test over seeds
# ---------------------------------------------------------------------------------------------------------------------

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
LEVEL = 0.05
MOST_ARRANGEMENTS = 200_000  # where there are more, as many random ones are tested


@cache
def arrangements(count, chosen=None):
    """Return the arrangements of a permutation test as weights, a row each, the measured one first.

    Of count pairs their signs; with chosen, of count figures 1 for those chosen, else 0, the first ones being measured.
    """
    random = np.random.default_rng(0)
    if chosen is None:
        if 2**count <= MOST_ARRANGEMENTS:
            return np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        return np.vstack([np.ones(count), random.choice((1.0, -1.0), (MOST_ARRANGEMENTS, count))])
    if math.comb(count, chosen) <= MOST_ARRANGEMENTS:
        places = np.array(list(itertools.combinations(range(count), chosen)))
        return (places[:, :, None] == np.arange(count)).any(1).astype(float)
    measured = np.repeat([1.0, 0.0], [chosen, count - chosen])
    return np.vstack([measured, random.permuted(np.tile(measured, (MOST_ARRANGEMENTS, 1)), axis=1)])


def permutation_p(these, those, paired):
    """Return the one-sided p-value of 'the mean of these is above the mean of those', by the permutation test.

    these, those: figures, one a seed; paired: signs are flipped within the pairs, else all figures are shuffled. p is
    the share of the arrangements whose difference of means is at least the one that was measured.
    """
    these, those = np.asarray(these, dtype=float), np.asarray(those, dtype=float)
    if paired:
        sums = arrangements(len(these)) @ (these - those)
    else:
        sums = arrangements(len(these) + len(those), len(these)) @ np.concatenate([these, those])
    return float((sums >= sums[0] - 1e-9 * max(1, abs(sums[0]))).mean())


class Settled(NamedTuple):
    """What a test found. difference: of the means, or the rank correlation; without p: nothing was tested."""

    difference: float | None
    p: float | None
    verdict: str


UNTESTED, DIVERGED = Settled(None, None, UNDECIDED), Settled(None, None, f"{UNDECIDED}: a seed diverged")


def verdict_on(p, opposite):
    return HOLDS if p <= LEVEL else FAILS if opposite <= LEVEL else UNDECIDED


def settle_beats(these, those, paired):
    """Return the Settled 'the mean of these is above the mean of those'."""
    p, opposite = permutation_p(these, those, paired), permutation_p(those, these, paired)
    return Settled(float(np.mean(these) - np.mean(those)), p, verdict_on(p, opposite))


def settle_similar(these, those, paired, margin):
    """Return the Settled 'the means of these and those differ by less than margin', by both one-sided tests."""
    these, those = np.asarray(these), np.asarray(those)
    below, above = these + margin, these - margin
    p = max(permutation_p(below, those, paired), permutation_p(those, above, paired))
    opposite = min(permutation_p(those, below, paired), permutation_p(above, those, paired))
    return Settled(float(these.mean() - those.mean()), p, verdict_on(p, opposite))


def ranks(values):
    """Return the rank of each value, those that are equal sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]


def settle_correlated(these, those, most=8):
    """Return the Settled 'what these rank high those rank high': Spearman's correlation is above zero.

    p is the share of the orders of those that correlate at least as well; of more than most figures, of random orders.
    """
    x, y = (ranks(values) - (len(values) + 1) / 2 for values in (these, those))
    if len(y) <= most:
        orders = np.array(list(itertools.permutations(y)))
    else:
        shuffled = np.random.default_rng(0).permuted(np.tile(y, (MOST_ARRANGEMENTS, 1)), axis=1)
        orders = np.concatenate([y[None], shuffled])
    found = orders @ x / (math.sqrt((x @ x) * (y @ y)) or 1.0)
    p, opposite = ((sign * found >= sign * found[0] - 1e-9).mean() for sign in (1, -1))
    return Settled(float(found[0]), float(p), verdict_on(p, opposite))


def parameters(run):
    return float(run.record.conditions.parameters)


def log_gradient_at_digit(run):
    gradient = gradient_at_digit(run)
    return None if gradient is None else math.log10(max(gradient, GRADIENT_FLOOR))


def in_table(name, column, **where):
    """Return a function of a run: the median of a column of its own table, one of MEASUREMENTS, in the rows where.

    None where it was not measured, or after more epochs than the report's.
    """

    def median(run):
        rows = read_measured(run, name) if len(run.history) == REPORT_EPOCHS else []
        values = [row[column] for row in rows if where.items() <= row.items()]
        return float(np.median(values)) if values else None

    return median


def gradient_kept(state, epoch, first=5, last=25):
    """Return a function of a run: the factor that a step back leaves of a state's gradient norm, between two steps."""

    def factor(run):
        norms = gradient_line(read_measured(run, "gradients"), epoch, state)
        if len(norms) < last:
            return None
        return (norms[first - 1] / norms[last - 1]) ** (1 / (last - first)) if norms[last - 1] else 0.0

    return factor


class Side(NamedTuple):
    """One side of a comparison: a setting, and a function of its runs that measures it.

    less: a setting whose measure, of the run of the same seed, is subtracted.
    """

    config: object
    measure: object = SavedRun.test_accuracy
    words: str = ""
    less: object = None

    def figures(self, runs):
        """Return what was measured by seed, None where a run has no figure; runs: by setting."""

        def measured(config):
            found = runs.get(config, [])
            return {run.config.seed: None if has_diverged(run) else self.measure(run) for run in found}

        values = measured(self.config)
        if self.less is None:
            return values
        less = measured(self.less)
        return {seed: None if None in (value, less.get(seed)) else value - less[seed] for seed, value in values.items()}

    def told(self, used, figures, form):
        """Return the side in words with the mean, the lowest and the highest of the figures used."""
        name, lost = self.words or self.config.words(), [seed for seed, value in figures.items() if value is None]
        missing = f", {len(lost)} of {len(figures)} without a figure: seed {' '.join(map(str, lost))}" if lost else ""
        if not used:
            return f"{name} (not measured{missing})"
        mean, low, high = (form.format(value) for value in (np.mean(used), min(used), max(used)))
        return f"{name} {mean} ({low} to {high}, {len(used)} seed{'s' * (len(used) > 1)}{missing})"


def has_diverged(run):
    return run.test_accuracy() is None


def settle(test, figures, runs, configs):
    """Return what a test makes of two lists of figures, if there are any and none of the settings' runs diverged."""
    if any(has_diverged(run) for config in configs for run in runs.get(config, [])):
        return DIVERGED
    return test(*figures) if figures and all(figures) else UNTESTED


class Row(NamedTuple):
    """A part of a claim settled, in words. form: how its figures are written."""

    words: str
    settled: Settled
    form: str

    def cells(self):
        """Return the cells of a table: the words, difference, p, verdict."""
        difference, p, verdict = self.settled
        if p is None:
            return self.words, "", "", verdict
        text = self.form.format(difference).replace(" %", " points")
        is_negative = text.startswith("-") and float(text.split()[0].replace(",", ""))
        return self.words, text if is_negative else "+" + text.lstrip("-"), p_text(p), verdict


def p_text(p):
    return "< 0.0001" if p < 1e-4 else f"{p:.4f}"


class Part(NamedTuple):
    """A part of a claim: this Side beats that one or, where within is a margin, is similar to it.

    paired: whether the runs of a seed are pairs; form: how a figure is written.
    """

    this: Side
    that: Side
    paired: bool = False
    within: float | None = None
    form: str = "{:.2f} %"

    def settle(self, runs):
        """Return the Row; runs: a list by setting."""
        figures = [side.figures(runs) for side in self[:2]]
        shared = sorted(figures[0].keys() & figures[1])
        known = [seed for seed in shared if None not in (figures[0][seed], figures[1][seed])]
        used = [
            [each[seed] for seed in known] if self.paired else [value for value in each.values() if value is not None]
            for each in figures
        ]
        said = [side.told(*told, self.form) for side, *told in zip(self[:2], used, figures, strict=True)]
        relation = "against" if self.within is None else f"similar within {self.within:g} to"
        words = f"{said[0]} {relation} {said[1]}{', pairs' * self.paired}"
        test = settle_beats if self.within is None else partial(settle_similar, margin=self.within)
        configs = [config for side in self[:2] for config in (side.config, side.less)]
        settled = settle(partial(test, paired=self.paired), used, runs, configs)
        return Row(words, settled, self.form)


class Correlation(NamedTuple):
    """A part of a claim: settings of which a measure is high have a high accuracy; a setting counts by its means."""

    configs: list
    measure: object
    words: str

    def settle(self, runs):
        """Return the Row; runs: a list by setting. Settings without a figure are left out; two decide nothing."""

        def mean(config, measure):
            values = [value for value in Side(config, measure).figures(runs).values() if value is not None]
            return np.mean(values) if values else None

        pairs = [(mean(config, self.measure), mean(config, SavedRun.test_accuracy)) for config in self.configs]
        pairs = [pair for pair in pairs if None not in pair]
        words = f"{self.words}, means of {len(pairs)} settings: rank correlation with test accuracy"
        figures = [*zip(*pairs, strict=True)] if len(pairs) > 2 else []
        return Row(words, settle(settle_correlated, figures, runs, self.configs), "{:.2f}")


class Claim(NamedTuple):
    """A sentence, and the parts that have to hold for it; beside: parts that tell more and decide nothing."""

    number: str
    sentence: str
    parts: list
    beside: list = []


def cnn(measure=SavedRun.test_accuracy, words="", **settings):
    return Side(cnn_cifar10.Config(**settings), measure, words)


def rnn(cell="rnn", hidden_size=30, measure=SavedRun.test_accuracy, words="", **settings):
    return Side(rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings), measure, words)


def pair(this, that, **more):
    return Part(this, that, paired=True, **more)


def more_epochs():
    """Return the parts of 'more epochs give more': each setting of the report after its last epoch and after others."""
    parts = []
    for config, epoch in itertools.product((row.config for row in REPORT), (1, 5)):
        late = Side(config, words=f"{config.words()}: epoch {REPORT_EPOCHS}")
        parts.append(pair(late, Side(config, partial(SavedRun.test_accuracy, epoch=epoch), f"epoch {epoch}")))
    return parts


def gradients_reach():
    """Return the parts of 'gradients reach further back': each state of the gated cells against the RNN's."""
    parts = []
    for epoch, when in ((0, "untrained"), (REPORT_EPOCHS, "trained")):
        plain = rnn(measure=gradient_kept("hidden", epoch), words=f"RNN, {when}")
        for cell, state in (("gru", "hidden"), ("lstm", "hidden"), ("lstm", "cell")):
            words = f"{cell.upper()}, {state} state, {when}: kept a step back, steps 25 to 5"
            parts.append(Part(rnn(cell, 30, gradient_kept(state, epoch), words), plain, form="{:.3f}"))
    return parts


def lost_by(words, this, that):
    """Return the Side of the accuracy that one Side's setting loses in the other's."""
    return Side(this.config, words=f"points lost {words}", less=that.config)


def lost_without(layers):
    return lost_by(f"without {layers}", cnn(), cnn(without=layers))


def lost_to_memory(cell):
    before, after = rnn(cell, rows_before=28), rnn(cell, rows_after=28)
    return lost_by(f"by the {cell.upper()}, 28 blank rows after the digit instead of before it", before, after)


def gradient_foretells(cell, biases=(None,)):
    """Return the part 'the more gradient reaches the digit before training, the more is learned', within a cell."""
    settings = itertools.product(biases, (0, 14, 28, 56))
    configs = [rnn(cell, rows_after=rows, keep_bias=bias).config for bias, rows in settings]
    return Correlation(configs, log_gradient_at_digit, f"{cell.upper()}: log of the gradient that reaches the digit")


def lstm_bias(bias, rows=0):
    return rnn("lstm", keep_bias=bias, rows_after=rows)


def read_from(layer, state="trained"):
    words = "the pixels" if layer == "pixels" else f"{layer} of the {state} network"
    measure = in_table("layers", "accuracy", layer=layer, network=state)
    return cnn(measure, f"a linear classifier on {words}")


def gabor_of(column, words, kernels="trained", **settings):
    return cnn(in_table("gabor", column, kernels=kernels), words, **settings)


def like_gabor(words, **settings):
    """Return the Part 'Gabor functions fit the trained kernels better than these with their pixels shuffled'."""
    trained = gabor_of("r2", f"median R² of the kernels trained {words}", **settings)
    return pair(trained, gabor_of("r2", "with their pixels shuffled", "shuffled", **settings), form="{:.3f}")


REPORT_CLAIMS = [
    Claim(
        "1",
        "Adam beats SGD on both tasks, at the report's rate.",
        [pair(cnn(), cnn(optimizer="sgd")), pair(rnn("rnn", 5), rnn("rnn", 5, optimizer="sgd"))],
    ),
    Claim(
        "1b",
        "SGD at a rate of its own beats the report's Adam on both tasks.",
        [pair(cnn(optimizer="sgd", lr=0.02, momentum=0.9), cnn()), pair(rnn(optimizer="sgd", lr=0.01), rnn())],
        [pair(cnn(optimizer="sgd", lr=0.02, momentum=0.9), cnn(lr=1e-3))],
    ),
    Claim(
        "2",
        "On the CNN a learning rate of 1e-4 is the best, and 1e-3 is similar within 1 point.",
        [pair(cnn(), cnn(lr=1e-3)), pair(cnn(), cnn(lr=1e-3), within=1.0)],
    ),
    Claim(
        "3",
        "For the RNN with 5 units 1e-3 is the best rate among 1e-1, 1e-3, 1e-4 and 1e-5.",
        [pair(rnn("rnn", 5), rnn("rnn", 5, lr=lr)) for lr in (1e-1, 1e-4, 1e-5)],
    ),
    Claim(
        "4",
        "More hidden units give more accuracy; in the LSTM 20 and 30 are similar within 0.5 points.",
        [
            *[Part(rnn("rnn", more), rnn("rnn", less)) for less, more in ((5, 10), (10, 20), (20, 30))],
            Part(rnn("gru", 30), rnn("gru", 20)),
            Part(rnn("lstm", 30), rnn("lstm", 20), within=0.5),
        ],
    ),
    Claim("5", "More epochs give more accuracy.", more_epochs()),
    Claim(
        "6",
        "GRU and LSTM beat the RNN, with as many units and with as many weights.",
        [
            *[Part(rnn(cell, size), rnn("rnn", size)) for cell in ("gru", "lstm") for size in (20, 30)],
            Part(rnn("gru", 30), rnn("rnn", 55)),
            Part(rnn("lstm", 30), rnn("rnn", 64)),
        ],
    ),
    Claim(
        "7a",
        "The LSTM has more weights than the GRU.",
        [Part(rnn("lstm", measure=parameters), rnn("gru", measure=parameters), form="{:,.0f} weights")],
    ),
    Claim(
        "7b",
        "The LSTM takes more time than the GRU, on this processor with this library.",
        [Part(rnn("lstm", measure=epoch_seconds), rnn("gru", measure=epoch_seconds), form="{:.1f} s an epoch")],
    ),
    Claim(
        "8",
        "On MNIST the CNN beats all three, and the GRU is nearly its equal (within 0.5 points).",
        [
            *[Part(cnn(dataset="mnist"), rnn(cell)) for cell in ("rnn", "gru", "lstm")],
            Part(rnn("gru"), cnn(dataset="mnist"), within=0.5),
        ],
    ),
    Claim(
        "9",
        "The CNN's first kernels resemble Gabor functions, better than the same kernels with their pixels shuffled.",
        [like_gabor(f"at {number_text(lr)}", lr=lr) for lr in (1e-4, 1e-3)],
        [
            like_gabor("by SGD at 0.02", optimizer="sgd", lr=0.02, momentum=0.9),
            pair(
                gabor_of("cosine_to_start", "median cosine of the trained kernels to their start, at 1e-4"),
                gabor_of("cosine_to_start", "at 1e-3", lr=1e-3),
                form="{:.3f}",
            ),
        ],
    ),
    Claim("10a", "Gradients reach further back in the gated cells.", gradients_reach()),
    Claim(
        "10b",
        "The gated cells remember for longer: 28 blank rows after the digit cost the RNN more than the GRU.",
        [Part(lost_to_memory("rnn"), lost_to_memory("gru"), form="{:.2f} points")],
        [Part(lost_to_memory("lstm"), lost_to_memory("rnn"), form="{:.2f} points")],
    ),
]
OUR_CLAIMS = [
    Claim(
        "11",
        "How far an LSTM learns to remember is set by the bias that its forget gates start with.",
        [
            Part(lstm_bias(1.0, 28), lstm_bias(None, 28)),
            Part(lstm_bias(2.0, 56), lstm_bias(1.0, 56)),
            *[
                Part(lstm_bias(this), lstm_bias(that), within=1.0)
                for this, that in ((1.0, None), (2.0, None), (2.0, 1.0))
            ],
            gradient_foretells("lstm", (None, 1.0, 2.0)),
        ],
        [gradient_foretells("rnn"), gradient_foretells("gru")],
    ),
    Claim(
        "12",
        "fc1, which holds 98.5 % of the weights, is worth the most: without it the network loses more than without "
        "either convolution.",
        [Part(lost_without("fc1"), lost_without(layer), form="{:.2f} points") for layer in ("conv1", "conv2")],
        [Part(lost_without("conv1+conv2"), lost_without("fc1"), form="{:.2f} points")],
    ),
    Claim(
        "13",
        "From layer to layer the class becomes more readable for a linear classifier, and training makes it so.",
        [
            *[
                pair(read_from(after), read_from(before))
                for before, after in itertools.pairwise(("pixels", "pool1", "pool2", "fc1"))
            ],
            *[pair(read_from(layer), read_from(layer, "untrained")) for layer in ("pool1", "pool2", "fc1")],
        ],
    ),
]


def verdict_of(verdicts):
    """Return the verdict on a claim of several parts."""
    if HOLDS in verdicts and FAILS in verdicts:
        kinds = {HOLDS: "hold", FAILS: "do not", UNDECIDED: "undecided"}
        counts = [f"{verdicts.count(each)} {word}" for each, word in kinds.items() if each in verdicts]
        return f"holds in part ({', '.join(counts)})"
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS


RULE = (
    f"Test accuracy after epoch {REPORT_EPOCHS} on the real data: mean (lowest to highest seed). A beats B when the "
    "one-sided permutation test of the difference of their means says so at "
    f"{100 * LEVEL:.0f} %: signs flipped within pairs, where the runs of a seed share their initial weights and their "
    "order of images, else all figures shuffled, in every way or, where there are more, in "
    f"{MOST_ARRANGEMENTS:,} random ones. A and B are similar within m when both one-sided tests against a difference "
    "of m say so. Rank correlations are Spearman's, of the means of settings, tested by shuffling the settings. A "
    "claim does not hold when the test of the opposite succeeds, and holds in part when some of its parts hold and "
    "others do not. No verdict is drawn where a seed diverged; seeds without a figure are named."
)
SHIPPED = "runs/reference/comparison/claims.md"


class Verdict(NamedTuple):
    """A Claim settled. rows, beside: a Row for each of its Parts, and for those that decide nothing."""

    claim: Claim
    verdict: str
    rows: list
    beside: list

    @property
    def tested(self):
        return [row for row in self.rows if row.settled.p is not None]

    def overview(self):
        """Return the claim's row in a table; of many parts the range of differences and the largest p."""
        differences, p_values = ([row.cells()[column] for row in self.tested] for column in (1, 2))
        if len(self.tested) > 4:
            order = sorted(self.tested, key=lambda row: row.settled.difference)
            order = [row for row in order if row.form == self.tested[0].form]  # of one unit
            worst = p_text(max(row.settled.p for row in self.tested))
            differences = [f"{order[0].cells()[1]} to {order[-1].cells()[1]}"]
            p_values = [worst if worst.startswith("<") else f"up to {worst}"]
        cells = self.claim.number, self.claim.sentence, self.verdict, ", ".join(differences), ", ".join(p_values)
        return f"| {' | '.join(cells)} |"

    def details(self):
        """Return the claim's own section."""
        lines = ["| part | difference | p | verdict |", "|---|---:|---:|---|"]
        lines += [f"| {' | '.join(row.cells())} |" for row in self.rows]
        beside = [row.cells() for row in self.beside if row.settled.p is not None]
        lines += [
            f"| beside it: {words} | {difference} | {p} | ({verdict}) |" for words, difference, p, verdict in beside
        ]
        table = "\n".join(lines)
        return f"## {self.claim.number}. {self.claim.sentence}\n\n{table}\n\n**Verdict: {self.verdict}.**"


def judge(claim, settings):
    """Return the Verdict on a Claim; settings: the runs, a list by setting."""
    rows, beside = ([part.settle(settings) for part in parts] for parts in (claim.parts, claim.beside))
    verdicts = [UNDECIDED if row.settled is DIVERGED else row.settled.verdict for row in rows]
    return Verdict(claim, verdict_of(verdicts), rows, beside)


@comparison("claims")
def claims(groups):
    """Write claims.md: each claim that these runs can test, what was measured, difference, p, and the verdict."""
    settings = {group.config: group for group in groups if not group[0].source and group.epochs == REPORT_EPOCHS}
    text, untested, details = ["# The claims", RULE], [], []
    for head, listed in (("The report's claims", REPORT_CLAIMS), ("Beyond the report", OUR_CLAIMS)):
        verdicts = [judge(claim, settings) for claim in listed]
        tested = [verdict for verdict in verdicts if any(row.settled is not UNTESTED for row in verdict.rows)]
        untested += [verdict.claim.number for verdict in verdicts if verdict not in tested]
        if tested:
            rows = ["| | claim | verdict | differences | p |", "|---:|---|---|---:|---:|"]
            text += [f"# {head}", "\n".join(rows + [verdict.overview() for verdict in tested])]
            details += [verdict.details() for verdict in tested]
    if untested:
        text.append(f"Not tested with these runs: {', '.join(untested)}; the shipped verdicts stand in {SHIPPED}.")
    if not details:
        tqdm.write(f"these runs can test no claim; the shipped verdicts stand in {SHIPPED}")
        return None
    return {"claims.md": "\n\n".join(text + details) + "\n"}


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------


def first_lines(drawings):
    """Return a line of help for each figure, from its docstring."""
    return "\n".join(f"    {name:14} {draw.__doc__.splitlines()[0]}" for name, draw in drawings.items())


def visualize_run(run, names, output_dir):
    """Draw a run's figures, by default all that its kind of network has."""
    fitting = [name for name, drawing in FIGURES.items() if drawing.fits in (None, run.kind)]
    for name in names or []:
        if name not in FIGURES:
            raise InputError(f"the figure {name} compares several runs; name more of them, or a folder of runs")
        if name not in fitting:
            raise InputError(
                f"{run.folder} is a run of {run.script}.py and has no figure {name}; it has {', '.join(fitting)}"
            )
    run.check_trained()
    if run.source:
        print(synthetic_notice(run.config.dataset))
    chosen = dict.fromkeys(names or fitting)
    if chosen.keys() != {"curves"}:
        run.model  # noqa: B018, an unusable checkpoint is told before the first figure
    for name in tqdm(chosen, unit="figure", leave=False, disable=None):
        save(name, FIGURES[name].draw(run), output_dir)


def compare_runs(runs, names, output_dir):
    """Compare several runs by their settings, by default in every way; those on real and on embedded data apart."""
    unfit = [name for name in names or [] if name not in COMPARISONS]
    if unfit:
        raise InputError(f"the figure {unfit[0]} takes a single run; several are compared by {', '.join(COMPARISONS)}")
    for run in runs:
        if not run.record.diverged:
            run.check_trained()
    sources = sorted({run.source for run in runs})  # first the real ones, which have none
    for source in sources:
        folder = output_dir / "synthetic" if source and len(sources) > 1 else output_dir
        if source:
            print(f"runs on synthetic data, comparable with no others: {folder}")
        groups = group_runs([run for run in runs if run.source == source])
        for name in tqdm(dict.fromkeys(names or COMPARISONS), unit="figure", leave=False, disable=None):
            made = COMPARISONS[name](groups)
            if made is not None:
                save(name, made, folder)


def find_runs(folder):
    """Return the runs below folder that have something to show, sorted; folders named reference are passed over."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a run's folder, such as runs/cnn_cifar10/NAME, or runs")
    inside = (path.parent for path in sorted(folder.rglob("config.json")))
    runs = [SavedRun(path) for path in inside if "reference" not in path.relative_to(folder).parts]
    ended = [run for run in runs if run.history or run.record.diverged]
    if not ended:
        raise InputError(f"{folder} holds no run with a config.json and metrics.csv; train one first")
    return ended


def work():
    matplotlib.rcParams.update(STYLE)
    single = first_lines({name: drawing.draw for name, drawing in FIGURES.items()})
    parser = ArgumentParser(f"{__doc__}\nFigures of a run:\n{single}\n\nOf several runs:\n{first_lines(COMPARISONS)}\n")
    parser.add_argument("runs", nargs="+", type=folder_name, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument(
        "--figures", nargs="+", choices=tuple(FIGURES | COMPARISONS), metavar="NAME", help="default: all that fit"
    )
    parser.add_argument("--output-dir", type=folder_name, help="default: RUN/figures; of several, FOLDER/comparison")
    args = parser.parse_args()
    first, *others = folders = [Path(name) for name in args.runs]
    if not others and (first / "config.json").exists():
        visualize_run(SavedRun(first), args.figures, Path(args.output_dir or first / "figures"))
        return
    runs = []
    for folder in folders:
        runs += [SavedRun(folder)] if (folder / "config.json").exists() else find_runs(folder)
    compare_runs(runs, args.figures, Path(args.output_dir or (Path("runs") if others else first) / "comparison"))


def main():
    run_script(work, kept="the figures that are drawn are kept, and the same command draws them all")


if __name__ == "__main__":
    main()
