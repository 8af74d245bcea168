"""Draw what trained networks have learned, from the folders of their runs.

    python visualize.py runs/cnn_cifar10/NAME                      draw all figures of a run into its figures/
    python visualize.py runs/cnn_cifar10/NAME --figures filters    draw only the named figures
    python visualize.py runs                                       compare all runs, in runs/comparison/

The figures of convolutional networks follow Zeiler & Fergus (2013), arXiv:1311.2901, "the paper" below.
"""

import csv
import glob
import io
import itertools
import logging
import math
import os
import sys
import textwrap
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import cnn_cifar10
import rnn_mnist
import utils
from utils import REPORT_EPOCHS, InputError, format_number, predict, print_line

if __name__ == "__main__":  # a user's matplotlib settings are meant for other figures, and may be out of date
    os.environ["MPLBACKEND"] = "agg"
    logging.disable(logging.WARNING)

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
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
FIGURE_WIDTH = 8  # inches
GRAY_COLORMAP = matplotlib.colormaps["gray"].with_extremes(bad="#dfe8f2")  # tints NaNs: pixels outside images

# The colours of Okabe and Ito, which colour-blind readers can tell apart. Each network keeps its own.
NETWORK_COLORS = {"RNN": "#E69F00", "GRU": "#0072B2", "LSTM": "#009E73", "LeNet-5": "#CC79A7"}
BEFORE_COLOR = "#999999"  # the untrained network, or the training images
AFTER_COLOR = "#0072B2"  # the trained network, or the test images
ACCENT_COLOR = "#D55E00"  # what is compared with these two


class SavedRun:
    """The folder of a run. Its files are read when they are needed; an unusable one raises InputError.

    config: the settings, a Config; conditions: device, precision, data source and others, a namespace.
    """

    def __init__(self, folder, data_dir=Path("data")):
        self.folder = folder
        self.data_dir = data_dir
        self.config, self.conditions = utils.read_config(folder, CONFIGS)

    @property
    def title(self):
        """The settings of the run in words, with the seed."""
        return ", ".join(self.config.captions().values()) + self.source_suffix

    @property
    def source_suffix(self):
        """The end of a caption: ", synthetic data", or empty for real data."""
        return "" if self.conditions.data_source == "real" else ", synthetic data"

    @property
    def command(self):
        """The command line that trains the run."""
        if self.source_suffix:
            return self.config.command("--data", "synthetic")
        return self.config.command()

    @cached_property
    def history(self):
        """The metrics of each finished epoch, list of dict."""
        return utils.read_history(self.folder)

    @property
    def epoch(self):
        """The last finished epoch."""
        return len(self.history)

    def test_accuracy(self, epoch=REPORT_EPOCHS):
        """Return the test accuracy in percent after an epoch, or None if the run is shorter."""
        return self.history[epoch - 1]["test_accuracy"] if epoch <= self.epoch else None

    @cached_property
    def model(self):
        """The trained network. Loading it also replaces the history with that of the checkpoint."""
        checkpoint = utils.read_checkpoint(self.folder)
        if checkpoint is None:
            reason = "holds no checkpoint.pt (the networks of runs/reference are not shipped)"
            advice = f"train the run with {self.command} and pass its folder"
            raise InputError(f"{self.folder} {reason}; {advice}")
        model = self.untrained_model()
        utils.load_state(self.folder / "checkpoint.pt", checkpoint["state"], {"model": model})
        self.history = checkpoint["history"]
        return model

    def load(self):
        """Load weights and history from one checkpoint, so that a figure shows both of the same epoch."""
        _ = self.model

    def untrained_model(self):
        """Return the network before training, rebuilt from the seed. The global random state is left unchanged."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.config.seed)  # torch.manual_seed would seed GPUs, too
            if is_recurrent(self):
                model = rnn_mnist.RowReader(self.config)
            else:
                model = cnn_cifar10.LeNet5(self.config, self.conditions.precision)
        return model.eval()

    def model_after(self, epoch):
        """Return the network as it was after an epoch. Epoch 0 is rebuilt from the seed; others need a snapshot.

        A CNN's snapshot holds only its convolutions; its other layers stay untrained. Raises InputError if a
        snapshot is missing or damaged.
        """
        model = self.untrained_model()
        if epoch > 0:
            path = self._snapshot_path(epoch)
            try:
                weights = model.state_dict() | utils.load_tensors(path)
                utils.load_state(path, {"model": weights}, {"model": model})
            except InputError:
                reason = "is missing, damaged or from other settings"
                raise InputError(f"{path} {reason}; delete it, and the figures leave out epoch {epoch}") from None
        return model

    @property
    def snapshot_epochs(self):
        """The finished epochs whose snapshot exists, list of int."""
        return [epoch for epoch in range(self.epoch + 1) if self._snapshot_path(epoch).exists()]

    def _snapshot_path(self, epoch):
        return self.folder / "snapshots" / f"epoch_{epoch:02d}.pt"

    @cached_property
    def data(self):
        """The Dataset on which the run was trained."""
        source = self.conditions.data_source
        pixels = self.config.pixels
        return utils.load_data(self.config.dataset, source, self.data_dir, pixels, may_download=False)

    @cached_property
    def probabilities(self):
        """The class probabilities of the test images, float32 (N, classes), in the precision of training."""
        return predict(self.model, self.data.test.images).softmax(dim=1)

    @cached_property
    def top_activations(self):
        """The test images that activate each feature map most: TopActivations by convolution."""
        return top_activations(self.model, self.data.test.images, count=9)


def any_run(run):
    """Return True for every run."""
    return True


def is_recurrent(run):
    """Return whether the run's network is recurrent."""
    return isinstance(run.config, rnn_mnist.Config)


def has_gates(run):
    """Return whether the run's network is recurrent and has gates."""
    return is_recurrent(run) and bool(rnn_mnist.GATE_BLOCKS[run.config.cell])


def has_convolutions(run):
    """Return whether the run's network is a CNN that was trained with all its convolutions."""
    return not is_recurrent(run) and "conv" not in run.config.without


# Figures and tables by name ---------------------------------------------------------------------------------


class FigureSpec(NamedTuple):
    """A figure of one run: draw(run), fits(run) -> bool, and whether draw needs the run's checkpoint."""

    draw: object
    fits: object
    needs_checkpoint: bool


FIGURES = {}  # FigureSpec by name
COMPARISONS = {}  # draw(groups) by name; groups: list of Group
TABLES = {}  # measure(run) -> (columns, rows), by the name of the figure that shows the table


def register(registry, name, entry):
    """Add an entry to a registry and return it. Raises ValueError if the name is taken."""
    if name in registry:
        raise ValueError(f"{name} is registered twice")
    registry[name] = entry
    return entry


def figure(fits=any_run, needs_checkpoint=True):
    """Return a decorator that registers draw(run) under its name; it returns what save_outputs takes."""

    def register_figure(draw):
        register(FIGURES, draw.__name__, FigureSpec(draw, fits, needs_checkpoint))
        return draw

    return register_figure


def comparison(name):
    """Return a decorator that registers draw(groups); it returns what save_outputs takes, or None."""
    return partial(register, COMPARISONS, name)


def table(name):
    """Return a decorator that registers measure(run); it returns columns, the first one epoch, and rows."""
    return partial(register, TABLES, name)


OUTPUTS_FILE = ".outputs"  # lists the files of a folder that this script wrote


def save_outputs(name, outputs, folder):
    """Write a Figure, or a dict of Figures and texts by file name, into a folder; return the file names."""
    if isinstance(outputs, Figure):
        outputs = {f"{name}.png": outputs}
    folder.mkdir(parents=True, exist_ok=True)
    for file_name, output in outputs.items():
        content = encode_png(output) if isinstance(output, Figure) else output.encode()
        utils.write_atomically(folder / file_name, content)
        print_line(folder / file_name)
    list_outputs(folder, listed_outputs(folder) | outputs.keys())
    return list(outputs)


def listed_outputs(folder):
    """Return the names of the files in a folder that this script wrote, set of str."""
    path = folder / OUTPUTS_FILE
    return set(path.read_text(encoding="utf-8").splitlines()) if path.exists() else set()


def list_outputs(folder, names):
    """Write down which files in a folder this script wrote."""
    utils.write_atomically(folder / OUTPUTS_FILE, "".join(f"{name}\n" for name in sorted(names)).encode())


def remove_outputs(folder, keep=()):
    """Delete the files in a folder that this script wrote, except those named in keep."""
    for name in listed_outputs(folder) - set(keep):
        (folder / name).unlink(missing_ok=True)
    if keep:
        list_outputs(folder, keep)
    else:
        (folder / OUTPUTS_FILE).unlink(missing_ok=True)


def encode_png(figure):
    """Return a Figure as PNG, bytes. A palette of 256 colours makes it a third as large."""
    rendered = io.BytesIO()
    figure.savefig(rendered, format="png")
    image = Image.open(rendered).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    compressed = io.BytesIO()
    image.save(compressed, format="png", optimize=True)
    return compressed.getvalue()


def format_table(columns, rows):
    """Return a table as CSV text, floats with seven significant digits."""
    formatted = []
    for row in rows:
        formatted.append([f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row])
    return utils.format_csv(columns, formatted)


def parse_table(path):
    """Return the rows of a table, list of dict of str; [] if the file is missing, damaged or cut off."""
    try:
        text = path.read_text(encoding="utf-8")
        rows = list(csv.DictReader(io.StringIO(text)))
    except (OSError, ValueError, csv.Error):
        return []
    for row in rows:
        has_all_cells = None not in row and None not in row.values()  # DictReader marks both faults with None
        if not (has_all_cells and row.get("epoch", "").isdecimal()):
            return []
    return rows if text.endswith("\n") else []


@cache
def read_table(run, name):
    """Return the table of one of a run's figures, list of dict of str, from figures/NAME.csv.

    If the file is missing, damaged or not from the run's last epoch, measure the table again, and write the
    file where possible. Without a checkpoint return []; an unusable file is then named.
    """
    path = run.folder / "figures" / f"{name}.csv"
    rows = parse_table(path)
    if rows and max(int(row["epoch"]) for row in rows) == run.epoch:
        return rows
    if not FIGURES[name].fits(run):
        return []
    if not (run.folder / "checkpoint.pt").exists():
        if path.exists():
            print_line(f"skipping {path}: damaged or not from epoch {run.epoch}, with no checkpoint.pt")
        return []

    try:
        run.load()
        columns, rows = TABLES[name](run)
    except (InputError, OSError) as error:
        print_line(f"could not compute {name} for {run.folder}: {error}")
        return []
    text = format_table(columns, rows)
    with suppress(OSError):  # in a folder that cannot be written, measure it again the next time
        save_outputs(name, {path.name: text}, path.parent)
    return list(csv.DictReader(io.StringIO(text)))


# Figures of any run -----------------------------------------------------------------------------------------


def curves_title(history):
    """Return the title of curves. It names the epoch of the lowest test loss if both metrics are worse now.

    history: the metrics of each epoch, list of dict.
    """
    last = history[-1]
    title = f"Test accuracy is {last['test_accuracy']:.2f} % after epoch {len(history)}"
    title += f" (training: {last['train_accuracy']:.2f} %)"

    losses = [row["test_loss"] for row in history]
    accuracies = [row["test_accuracy"] for row in history]
    if min(losses) < losses[-1] and max(accuracies) > accuracies[-1]:
        title += f"; test loss was lowest after epoch {losses.index(min(losses)) + 1}"
    return title


@figure(needs_checkpoint=False)
def curves(run):
    """Draw accuracy and loss on the training and test images by epoch."""
    fig = Figure(figsize=(FIGURE_WIDTH, 3.2))
    metrics = (("accuracy", "accuracy in %"), ("loss", "mean cross-entropy per image"))
    splits = (("train", "training images", BEFORE_COLOR), ("test", "test images", AFTER_COLOR))
    for axes, (metric, label) in zip(fig.subplots(1, 2), metrics, strict=True):
        for split, images, color in splits:
            values = [row[f"{split}_{metric}"] for row in run.history]
            axes.plot(range(1, run.epoch + 1), values, marker=".", color=color, label=images)
        axes.set(xlabel="epoch", ylabel=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
        axes.legend()
    fig.suptitle(f"{curves_title(run.history)}\n{run.title}")
    return fig


def confusion_matrix(labels, predicted, classes):
    """Return the number of images by true class (row) and predicted class, int64 (classes, classes).

    labels, predicted: int64 (N,); classes: the number of classes.
    """
    pairs = labels * classes + predicted
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes).numpy()


def confusion_title(counts, classes):
    """Return the title of confusion: the accuracy and the most frequent error. classes: their names."""
    errors = counts.copy()
    np.fill_diagonal(errors, 0)
    title = f"Test accuracy is {100 * counts.diagonal().sum() / counts.sum():.2f} %"
    if errors.any():
        true, predicted = np.unravel_index(errors.argmax(), errors.shape)
        error = f"{classes[true]} predicted as {classes[predicted]} ({errors.max()} images)"
        title += f"; the most frequent error is {error}"
    return title


@figure()
def confusion(run):
    """Draw the confusion matrix of the test images, with the accuracy of each class."""
    classes = run.data.classes
    counts = confusion_matrix(run.data.test.labels, run.probabilities.argmax(1), len(classes))
    errors = np.ma.masked_array(counts, np.eye(len(classes), dtype=bool))
    is_dark = (errors > 0.6 * errors.max()).filled(False)
    accuracies = 100 * counts.diagonal() / counts.sum(1).clip(1)

    fig = Figure(figsize=(FIGURE_WIDTH, 6.4))
    axes = fig.subplots()
    image = axes.imshow(errors, cmap=matplotlib.colormaps["Oranges"].with_extremes(bad="#d6e6f2"), vmin=0)
    for (row, column), count in np.ndenumerate(counts):
        color = "white" if is_dark[row, column] else "black"
        axes.text(column, row, count, ha="center", va="center", fontsize=7, color=color)
    positions = range(len(classes))
    rotation = 45 if max(len(name) for name in classes) > 1 else 0
    axes.set_xticks(positions, classes, rotation=rotation, ha="center")
    axes.set_yticks(positions, classes)
    axes.set(xlabel="predicted class", ylabel="true class")
    right = axes.secondary_yaxis("right")
    right.set_yticks(positions, [f"{accuracy:.1f} %" for accuracy in accuracies])
    right.set_ylabel("accuracy of the class", labelpad=8)
    right.tick_params(length=0)
    fig.colorbar(image, ax=axes, label="number of misclassified images", shrink=0.8)
    fig.suptitle(f"{confusion_title(counts, classes)}\n{run.title}")
    return fig


def draw_mosaic(axes, images, titles, columns, gap, room=0, vmin=None, vmax=None):
    """Draw images, float (N, H, W), in gray on one axes, row by row, with a title above each.

    columns: images per row; gap: empty pixels around each image; room: more of them above it, for the title;
    vmin, vmax: the values of black and white. NaNs and empty pixels are tinted. Returns matplotlib's image,
    and the first pixel of each row and of each column of images.
    """
    from torchvision.utils import make_grid

    height, width = images.shape[1:]
    padded = F.pad(images.float(), (0, 0, room, 0), value=math.nan)
    mosaic = make_grid(padded[:, None], nrow=columns, padding=gap, pad_value=math.nan)[0]
    tops = range(gap + room, mosaic.shape[0], height + room + gap)
    lefts = range(gap, mosaic.shape[1], width + gap)
    for number, title in enumerate(titles):
        x = lefts[number % columns] + width / 2 - 0.5
        y = tops[number // columns] - 0.6
        axes.text(x, y, title, ha="center", va="bottom", fontsize=7)
    axes.set_frame_on(False)
    axes.set_anchor("N")
    axes.set(xticks=[], yticks=[])
    axes.tick_params(length=0)
    return axes.imshow(mosaic, cmap=GRAY_COLORMAP, vmin=vmin, vmax=vmax), tops, lefts


# Linear probes: linear classifiers on the features of a network (the paper, Table 7) ------------------------

RIDGE_PENALTIES = (0.01, 0.1, 1.0)
RIDGE_IMAGES = 5000  # number of training images that a probe is given


def ridge_classifiers(features, labels, classes, penalties):
    """Fit a linear classifier for each penalty by ridge regression on one-hot labels, in closed form.

    features: float32 (N, D); labels: int64 (N,); classes: the number of classes; penalties: on the squared
    weights but not the bias, in multiples of the features' mean sum of squared deviations. Returns a list of
    (weights, bias), float32 (D, classes) and (classes,).
    """
    targets = F.one_hot(labels, classes).float()
    feature_mean = features.mean(0)
    target_mean = targets.mean(0)
    centered = features - feature_mean
    centered_targets = targets - target_mean

    is_dual = features.shape[1] > len(features)  # then the system of the images is the smaller one
    if is_dual:
        products = centered @ centered.T
        right_side = centered_targets
    else:
        products = centered.T @ centered
        right_side = centered.T @ centered_targets
    scale = products.trace() / features.shape[1]

    classifiers = []
    for penalty in penalties:
        ridge = penalty * scale + 1e-6  # the scale is 0 if the features are the same for all images
        factor = torch.linalg.cholesky(products + ridge * torch.eye(len(products)))
        solution = torch.cholesky_solve(right_side, factor)
        weights = (solution.T @ centered).T if is_dual else solution  # faster than centered.T @ solution
        classifiers.append((weights, target_mean - feature_mean @ weights))
    return classifiers


def classifier_accuracy(classifier, features, labels):
    """Return the accuracy in percent of a linear classifier (weights, bias) on features (N, D)."""
    weights, bias = classifier
    predicted = (features @ weights + bias).argmax(1)
    return 100 * (predicted == labels).double().mean().item()


def linear_probe_accuracy(features, labels, test_features, test_labels, classes):
    """Return the accuracy in percent on the test features of a ridge classifier fitted to features (N, D).

    It is fitted to the first four fifths of the features; the last fifth selects the penalty.
    """
    fitted = len(features) * 4 // 5
    classifiers = ridge_classifiers(features[:fitted], labels[:fitted], classes, RIDGE_PENALTIES)
    accuracies = [classifier_accuracy(each, features[fitted:], labels[fitted:]) for each in classifiers]
    best = classifiers[accuracies.index(max(accuracies))]
    return classifier_accuracy(best, test_features, test_labels)


# Figures of a convolutional network -------------------------------------------------------------------------


def convolution_names(model):
    """Return the names of the network's convolutions in order."""
    return [name for name, layer in model.layers.named_children() if isinstance(layer, nn.Conv2d)]


def first_kernels(model):
    """Return the kernels of the first convolution, float32 (maps, height, width)."""
    first = convolution_names(model)[0]
    return getattr(model.layers, first).weight.detach()[:, 0].float()


def rectified_activations(model, images):
    """Return the output of each convolution after ReLU, float32 (N, C, H, W) by name.

    images: (N, H, W), gray values from 0 to 255.
    """
    outputs = model.outputs(images)
    return {name: F.relu(outputs[name].float()) for name in convolution_names(model)}


CHANGED_BELOW = 0.9  # a kernel has changed if its cosine similarity to the untrained one is lower


def filters_title(changed, kernels, layer, epoch):
    """Return the title of filters. changed, kernels: the number of kernels that changed, and of all."""
    change = f"{changed} of {kernels} kernels of {layer} changed by epoch {epoch}"
    return f"{change} (cosine similarity to the start below {CHANGED_BELOW})"


@figure(has_convolutions)
def filters(run):
    """Draw the kernels of the first convolution before and after training."""
    trained = first_kernels(run.model)
    untrained = first_kernels(run.untrained_model())
    similarities = F.cosine_similarity(untrained.flatten(1), trained.flatten(1))
    changed = int((similarities < CHANGED_BELOW).sum())

    fig = Figure(figsize=(FIGURE_WIDTH, 3.6))
    states = (("untrained", untrained), ("trained", trained))
    for axes, (state, kernels) in zip(fig.subplots(2, 1), states, strict=True):
        limit = kernels.abs().max().item()
        numbers = [str(number) for number in range(len(kernels))]
        image, _, _ = draw_mosaic(axes, kernels, numbers, columns=16, gap=1, room=2, vmin=-limit, vmax=limit)
        axes.set_title(f"{state}, gray scale from -{limit:.2f} to {limit:.2f}")
        fig.colorbar(image, ax=axes, label="weight")
    layer = convolution_names(run.model)[0]
    fig.suptitle(f"{filters_title(changed, len(trained), layer, run.epoch)}\n{run.title}")
    return fig


@torch.inference_mode()
def activation_statistics(model, images, batch_size=250):
    """Return statistics of the rectified_activations of images (N, H, W), a dict of float64 arrays by layer.

    image_mean (N,): mean over feature maps and positions; mean (C,) and std (C,): over images and positions;
    zeros (C,): percentage of the activations that are zero.
    """
    collected = {}
    for batch in images.split(batch_size):
        for layer, maps in rectified_activations(model, batch).items():
            means = [values.mean((2, 3)) for values in (maps, maps.square(), (maps == 0).float())]
            collected.setdefault(layer, []).append(torch.stack(means).double())

    statistics = {}
    for layer, batches in collected.items():
        mean, square, zeros = torch.cat(batches, dim=1).numpy()  # each (N, C)
        statistics[layer] = {
            "image_mean": mean.mean(1),
            "mean": mean.mean(0),
            "std": np.sqrt(square.mean(0) - mean.mean(0) ** 2),
            "zeros": 100 * zeros.mean(0),
        }
    return statistics


def activations_title(statistics):
    """Return the title of activations, from the activation_statistics."""
    shares = [f"{values['zeros'].mean():.0f} % of {layer}'s" for layer, values in statistics.items()]
    zeros = np.concatenate([values["zeros"] for values in statistics.values()])
    silent = f"{(zeros == 100).sum()} of {len(zeros)} feature maps are always zero"
    return f"ReLU sets {' and '.join(shares)} activations to zero; {silent}"


@figure(has_convolutions)
def activations(run):
    """Draw statistics of the activations of each convolution over the test images."""
    statistics = activation_statistics(run.model, run.data.test.images)
    fig = Figure(figsize=(FIGURE_WIDTH, 2.6 * len(statistics)))
    grid = fig.subplots(len(statistics), 3, squeeze=False)
    for (left, middle, right), (layer, values) in zip(grid, statistics.items(), strict=True):
        mean = values["image_mean"].mean()
        std = values["image_mean"].std()
        label = f"mean ± standard deviation {std:.3f}"
        left.hist(values["image_mean"], bins=50, color="0.6")
        left.axvline(mean, color="black", linewidth=1, label=f"mean {mean:.3f}")
        left.axvspan(mean - std, mean + std, color=AFTER_COLOR, alpha=0.2, label=label)
        left.set(title=f"{layer}: images", xlabel="mean activation of an image", ylabel="test images")

        order = values["mean"].argsort()[::-1]
        ranks = range(len(order))
        means = values["mean"][order]
        tops = means + values["std"][order]
        middle.bar(ranks, means, color="0.6", label="mean")
        middle.vlines(ranks, means, tops, color=AFTER_COLOR, linewidth=1, label="mean + standard deviation")
        middle.set(title=f"{layer}: feature maps", xlabel="feature maps, ranked by mean", ylabel="activation")

        zeros = values["zeros"]
        right.bar(ranks, zeros[order], color="0.6")
        right.axhline(zeros.mean(), color=AFTER_COLOR, linewidth=1, label=f"mean {zeros.mean():.0f} %")
        right.set(title=f"{layer}: zeros", xlabel="feature maps, ranked by mean", ylabel="zeros in %")
        right.set_ylim(0, 100)
        for axes in (left, middle, right):
            axes.legend(fontsize=7, frameon=True)
    fig.suptitle(f"{activations_title(statistics)}\n{run.title}")
    return fig


@torch.inference_mode()
def layer_features(model, images, batch_size=500):
    """Return the inputs of linear probes, float32 (N, D) by name: the pixels, and each layer after its ReLU.

    images: (N, H, W), gray values from 0 to 255. The names are those of the layers that a ReLU follows.
    """
    collected = {"pixels": [images.flatten(1).float() / 255]}
    for batch in images.split(batch_size):
        previous = None
        for name, output in model.outputs(batch).items():
            if isinstance(getattr(model.layers, name), nn.ReLU):
                collected.setdefault(previous, []).append(output.float().flatten(1))
            previous = name
    return {name: torch.cat(batches) for name, batches in collected.items()}


@table("layers")
def probe_layers(run):
    """Return columns and rows of a table: the accuracy in percent of a linear probe on each layer."""
    networks = {"trained": run.model, "untrained": run.untrained_model()}
    train = run.data.train
    test = run.data.test
    classes = len(run.data.classes)
    labels = train.labels[:RIDGE_IMAGES]

    rows = []
    for network, model in networks.items():
        features = layer_features(model, train.images[:RIDGE_IMAGES])
        test_features = layer_features(model, test.images)
        for layer in features:
            tested = test_features[layer]
            accuracy = linear_probe_accuracy(features[layer], labels, tested, test.labels, classes)
            rows.append((run.epoch, network, layer, accuracy))
    return ("epoch", "network", "layer", "accuracy"), rows


def layers_title(accuracies):
    """Return the title of layers. accuracies: percent by layer, of the trained network."""
    reached = [f"{accuracy:.0f} % on {layer}" for layer, accuracy in accuracies.items()]
    return f"After training, linear probes reach {', '.join(reached)}"


@figure(has_convolutions)
def layers(run):
    """Draw the accuracy of a linear probe on each layer, before and after training (the paper, Table 7)."""
    columns, rows = probe_layers(run)
    accuracies = {"trained": {}, "untrained": {}}
    for _, network, layer, accuracy in rows:
        accuracies[network][layer] = accuracy

    fig = Figure(figsize=(FIGURE_WIDTH, 3.6))
    axes = fig.subplots()
    axes.axhline(run.test_accuracy(run.epoch), color=ACCENT_COLOR, linestyle="--", label="trained network")
    for network, color, offset in (("trained", AFTER_COLOR, 7), ("untrained", BEFORE_COLOR, -14)):
        names = list(accuracies[network])
        values = list(accuracies[network].values())
        axes.plot(names, values, "o-", color=color, label=f"linear probes, {network} network")
        for name, value in zip(names, values, strict=True):
            axes.annotate(f"{value:.1f}", (name, value), (0, offset), textcoords="offset points", ha="center")
    axes.set(xlabel="input of the linear probe", ylabel="test accuracy in %", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    fig.suptitle(f"{layers_title(accuracies['trained'])}\n{run.title}")
    return {"layers.png": fig, "layers.csv": format_table(columns, rows)}


# The deconvolutional network of Zeiler & Fergus (2013), arXiv:1311.2901, section 2.1 -----------------------


def layers_up_to(model, layer):
    """Return the network's layers by name, in forward order, up to and including the one named `layer`."""
    names = [name for name, _ in model.layers.named_children()]
    return dict(model.layers[: names.index(layer) + 1].named_children())


def find_switches(model, outputs):
    """Return the switches of each max pooling by its name: the positions of the maxima, and the input's size.

    outputs: the output of each layer by name, from model.outputs. The positions are int64 (N, C, H, W).
    As in the paper, the maps are rectified before they are pooled, even if the network pools first.
    """
    switches = {}
    previous = None
    for name, module in model.layers.named_children():
        if isinstance(module, nn.MaxPool2d):
            rectified = F.relu(outputs[previous].float())
            _, positions = F.max_pool2d(rectified, module.kernel_size, module.stride, return_indices=True)
            switches[name] = (positions, rectified.shape[2:])
        previous = name
    return switches


def project_back(model, layer, maps, switches):
    """Project activations (N, C, H, W) of a layer back to pixels, float32 (N, 1, H, W), as in section 2.1.

    maps: zero except for the activations to explain. switches: from find_switches.
    Going backwards, each pooling is undone with its switches, and each convolution by ReLU and the transposed
    convolution. No biases are added, and the resulting pixels are not rectified.
    """
    for name, module in reversed(layers_up_to(model, layer).items()):
        if isinstance(module, nn.MaxPool2d):
            positions, size = switches[name]
            maps = F.max_unpool2d(maps, positions, module.kernel_size, module.stride, output_size=size)
        elif isinstance(module, nn.Conv2d):
            rectified = F.relu(maps)
            maps = F.conv_transpose2d(rectified, module.weight, stride=module.stride, padding=module.padding)
    return maps


@torch.inference_mode()
def deconvolve(model, images, layer, feature_maps):
    """Reconstruct the pattern that activates a feature map in each image (section 2.1).

    The strongest activation of the map is projected back to pixels. images: (N, H, W), gray values 0 to 255.
    layer: name of a convolution or a pooling. feature_maps: the number of the map for each image, int64 (N,).
    Returns float32 (N, 1, H, W).
    """
    outputs = model.outputs(images)
    maps = F.relu(outputs[layer].float())
    numbers = torch.arange(len(maps))
    values, positions = maps[numbers, feature_maps].flatten(1).max(1)
    strongest = torch.zeros(maps.shape)
    strongest.flatten(2)[numbers, feature_maps, positions] = values
    return project_back(model, layer, strongest, find_switches(model, outputs))


class TopActivations(NamedTuple):
    """The images that activate each feature map of a layer most, the strongest first.

    All fields are (count, C). values: the activations, float32. images: the numbers of the images, int64.
    rows, columns: the positions of the activations in the feature map, int64.
    """

    values: torch.Tensor
    images: torch.Tensor
    rows: torch.Tensor
    columns: torch.Tensor


@torch.inference_mode()
def top_activations(model, images, count=9, batch_size=250):
    """Return the TopActivations of each convolution, by its name. Each image counts once per feature map.

    images: (N, H, W), gray values 0 to 255. count: the number of images for each feature map.
    """
    maxima_by_layer = {}
    positions_by_layer = {}
    width_by_layer = {}
    for batch in images.split(batch_size):
        for layer, maps in rectified_activations(model, batch).items():
            maxima, positions = F.max_pool2d(maps, maps.shape[2:], return_indices=True)
            maxima_by_layer.setdefault(layer, []).append(maxima.flatten(1))
            positions_by_layer.setdefault(layer, []).append(positions.flatten(1))
            width_by_layer[layer] = maps.shape[3]

    result = {}
    for layer, width in width_by_layer.items():
        values, numbers = torch.cat(maxima_by_layer[layer]).topk(count, dim=0)
        positions = torch.cat(positions_by_layer[layer]).gather(0, numbers)
        result[layer] = TopActivations(values, numbers, positions // width, positions % width)
    return result


def receptive_field(model, layer):
    """Return the receptive field of a layer's units, along each axis, as (size, stride, offset) in pixels.

    Unit i sees `size` pixels, and the first of them is offset + stride * i.
    """
    size, stride, offset = 1, 1, 0
    for module in layers_up_to(model, layer).values():
        if isinstance(module, nn.Conv2d):
            kernel, step, padding = module.kernel_size[0], module.stride[0], module.padding[0]
        elif isinstance(module, nn.MaxPool2d):
            kernel, step, padding = module.kernel_size, module.stride, module.padding
        else:
            continue
        offset -= padding * stride
        size += (kernel - 1) * stride
        stride *= step
    return size, stride, offset


def cut_patches(model, layer, images, rows, columns):
    """Cut the receptive field of one unit out of each image (N, H, W).

    rows, columns: the position of the unit in a feature map of the layer, int64 (N,).
    Returns float32 (N, size, size), with NaN beyond the edges of the image.
    """
    size, stride, offset = receptive_field(model, layer)
    padded = F.pad(images.float(), (size, size, size, size), value=math.nan)
    tops = (size + offset + stride * rows).tolist()
    lefts = (size + offset + stride * columns).tolist()
    patches = []
    for image, top, left in zip(padded, tops, lefts, strict=True):
        patches.append(image[top : top + size, left : left + size])
    return torch.stack(patches)


def top_patches(model, layer, images, top, feature_maps):
    """Return what activates some feature maps most: (reconstructions, image patches).

    images: (N, H, W), gray values 0 to 255. top: the layer's TopActivations. feature_maps: int64 (M,).
    Both results are float32 (M, count, size, size), cut by cut_patches.
    """
    count = len(top.images)
    chosen = images[top.images[:, feature_maps].T.flatten()]
    rows = top.rows[:, feature_maps].T.flatten()
    columns = top.columns[:, feature_maps].T.flatten()

    projections = deconvolve(model, chosen, layer, feature_maps.repeat_interleave(count)).squeeze(1)
    reconstructions = cut_patches(model, layer, projections, rows, columns)
    patches = cut_patches(model, layer, chosen, rows, columns)
    return reconstructions.unflatten(0, (-1, count)), patches.unflatten(0, (-1, count))


def scale_symmetric(images, quantile=1.0):
    """Divide each of the images (M, ...) by a quantile of its absolute values and clamp it to [-1, 1].

    NaNs are ignored and kept.
    """
    flat = images.flatten(1)
    limits = flat.abs().nanquantile(quantile, dim=1, keepdim=True).clamp(min=1e-12)
    return (flat / limits).clamp(-1, 1).view(images.shape)


def select_inner_maps(model, layer, top, image_size, count):
    """Return the `count` feature maps whose top patches lie within the image most often, int64, ascending.

    Equal maps are ranked by their strongest activation. top: the layer's TopActivations.
    image_size: height and width in pixels.
    """
    size, stride, offset = receptive_field(model, layer)
    corners = offset + stride * torch.stack([top.rows, top.columns])  # the first pixels of the patches
    is_inside = ((corners >= 0) & (corners + size <= image_size)).all(0)
    relative_strength = top.values[0] / top.values[0].max()  # at most 1: decides between equal counts
    ranking = is_inside.sum(0) + relative_strength
    return ranking.topk(min(count, len(ranking))).indices.sort().values


def selected_maps(run, count):
    """Return the result of select_inner_maps for each convolution but the first, by layer.

    The first convolution is left out because its reconstructions are its kernels.
    """
    image_size = run.data.test.images.shape[1]
    maps = {}
    for layer in convolution_names(run.model)[1:]:
        maps[layer] = select_inner_maps(run.model, layer, run.top_activations[layer], image_size, count)
    return maps


def draw_pairs(reconstructions, patches, titles, columns=4):
    """Return a Figure with the reconstructions of each feature map beside the image patches.

    reconstructions, patches: float32 (M, 9, size, size), from top_patches. titles: one per feature map.
    """
    from torchvision.utils import make_grid

    brightness = 0.5 + 0.5 * scale_symmetric(reconstructions, quantile=0.995)
    blocks = []
    for map_reconstructions, map_patches in zip(brightness, patches / 255, strict=True):
        left = make_grid(map_reconstructions[:, None], nrow=3, padding=1, pad_value=math.nan)[0]
        right = make_grid(map_patches[:, None], nrow=3, padding=1, pad_value=math.nan)[0]
        blocks.append(torch.cat([left, right], dim=1))

    height, width = blocks[0].shape
    room = height // 6
    rows = math.ceil(len(blocks) / columns)
    mosaic_height = rows / columns * FIGURE_WIDTH * (height + room + 4) / (width + 4)
    fig = Figure(figsize=(FIGURE_WIDTH, mosaic_height + 0.7))
    axes = fig.subplots()
    draw_mosaic(axes, torch.stack(blocks), titles, columns, gap=4, room=room, vmin=0, vmax=1)
    axes.set_xlabel("left: reconstructions (gray: zero; one scale per map); right: patches (tinted: outside)")
    return fig


def pattern_similarity(reconstructions):
    """Return two mean cosines, (within, between), of the reconstructions (M, count, size, size) of M maps.

    within: between the strongest reconstruction of a map, which is its first, and the others of that map.
    between: between the strongest reconstructions of different maps.
    """
    vectors = reconstructions.nan_to_num().flatten(2)
    within = F.cosine_similarity(vectors[:, 1:], vectors[:, :1], dim=2).mean()
    cosines = F.cosine_similarity(vectors[None, :, 0], vectors[:, None, 0], dim=2)
    between = cosines[~torch.eye(len(cosines), dtype=torch.bool)].mean()
    return within.item(), between.item()


def deconv_title(layer, within, between):
    """Return the title of deconv, from the results of pattern_similarity."""
    verdict = "more alike" if within > between else "no more alike"
    numbers = f"within a map (mean cosine {within:.2f}) than between maps ({between:.2f})"
    return f"Reconstructions of {layer} are {verdict} {numbers}"


@figure(fits=has_convolutions)
def deconv(run, count=16):
    """Draw what activates feature maps most: reconstructions beside patches of the test images (Fig. 2)."""
    figures = {}
    for layer, maps in selected_maps(run, count).items():
        top = run.top_activations[layer]
        reconstructions, patches = top_patches(run.model, layer, run.data.test.images, top, maps)
        within, between = pattern_similarity(reconstructions)
        fig = draw_pairs(reconstructions, patches, [f"map {number}" for number in maps])
        fig.suptitle(f"{deconv_title(layer, within, between)}\n{run.title}")
        figures[f"deconv_{layer}.png"] = fig
    return figures


def reconstructions_by_epoch(models, layer, images, tops, feature_maps):
    """Return the strongest reconstruction of each feature map after each epoch, and the activation behind it.

    models, tops: the network and the layer's TopActivations after each epoch. images: (N, H, W), gray values.
    feature_maps: int64 (M,). Returns float32 (M, epochs, size, size), cut by cut_patches, and (M, epochs).
    """
    reconstructions = []
    values = []
    for model, top in zip(models, tops, strict=True):
        pictures, _ = top_patches(model, layer, images, top, feature_maps)
        reconstructions.append(pictures[:, 0])
        values.append(top.values[0, feature_maps])
    return torch.stack(reconstructions, dim=1), torch.stack(values, dim=1)


RESEMBLANCE = 0.7  # the mean cosine from which reconstructions are said to resemble each other


def evolution_title(layer, epochs, cosines):
    """Return the title of evolution: after which epoch the reconstructions resemble the final ones.

    epochs: from 0 (untrained) to the last one. cosines: the mean cosine to the final ones for each epoch.
    """
    similar = [place for place, cosine in enumerate(cosines[:-1]) if cosine >= RESEMBLANCE]
    place = similar[0] if similar else len(epochs) - 2
    time = f"After epoch {epochs[place]}" if place else "Before training"
    verdict = "resemble" if similar else "differ from"
    numbers = f"mean cosine {cosines[place]:.2f}"
    if place:
        numbers += f"; before training {cosines[0]:.2f}"
    return f"{time}, reconstructions of {layer} {verdict} the final ones ({numbers})"


@figure(fits=has_convolutions)
def evolution(run, count=8, wanted_epochs=(0, 1, 2, 5)):
    """Draw how the strongest reconstruction of some feature maps develops during training (Fig. 4).

    The wanted epochs whose weights were not saved are left out.
    """
    images = run.data.test.images
    maps_by_layer = selected_maps(run, count)
    available = {0, *run.snapshot_epochs}
    epochs = [epoch for epoch in wanted_epochs if epoch in available and epoch < run.epoch]
    models = [run.model_after(epoch) for epoch in epochs]
    top_by_epoch = [top_activations(model, images, count=1) for model in models]
    epochs.append(run.epoch)
    models.append(run.model)
    top_by_epoch.append(run.top_activations)

    fig = Figure(figsize=(FIGURE_WIDTH, 1.15 * len(epochs) * len(maps_by_layer) + 1))
    panels = fig.subplots(len(maps_by_layer), squeeze=False).flat
    titles = []
    for axes, (layer, maps) in zip(panels, maps_by_layer.items(), strict=True):
        tops = [top[layer] for top in top_by_epoch]
        reconstructions, values = reconstructions_by_epoch(models, layer, images, tops, maps)
        vectors = reconstructions.nan_to_num().flatten(2)
        cosines = F.cosine_similarity(vectors, vectors[:, -1:], dim=2).mean(0).tolist()
        titles.append(evolution_title(layer, epochs, cosines))

        size = reconstructions.shape[-1]
        gap = math.ceil(size / 8)
        room = math.ceil(size / 5)
        pictures = scale_symmetric(reconstructions.transpose(0, 1).flatten(0, 1))  # epoch by epoch
        labels = [f"{value:.2g}" for value in values.T.flatten()]
        _, rows, columns = draw_mosaic(axes, pictures, labels, len(maps), gap, room, vmin=-1, vmax=1)
        axes.set_xticks([left + size / 2 - 0.5 for left in columns], [f"map {number}" for number in maps])
        names = [f"{epoch} ({cosine:.2f})" for epoch, cosine in zip(epochs, cosines, strict=True)]
        axes.set_yticks([top + size / 2 - 0.5 for top in rows], names)
        axes.set_xlabel("feature map (number above each reconstruction: its activation)")
        axes.set_ylabel("epoch (in brackets: mean cosine to the last row)")
    fig.suptitle("\n".join([*titles, run.title]))
    return fig


# Invariance and occlusion, after Zeiler & Fergus (2013), and Gabor functions -------------------------------

# The amounts of Fig. 5. Positive shifts move the image down, and positive angles turn it counterclockwise.
TRANSFORMATIONS = {
    "vertical shift in pixels": torch.arange(-8, 9),
    "scale": torch.linspace(1, 1.8, 17),
    "rotation in degrees": torch.arange(0, 361, 15),
}


def transform(images, kind, amount):
    """Shift, scale or rotate images (N, H, W) about their centre; return float32 (N, H, W).

    kind: a key of TRANSFORMATIONS. amount: in the unit that `kind` names. Uncovered areas repeat the edges.
    """
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import affine

    angle, shift, scale = 0.0, 0, 1.0
    if kind == "scale":
        scale = float(amount)
    elif kind == "rotation in degrees":
        angle = -float(amount)  # torchvision turns clockwise
    else:
        shift = int(amount)
    margin = images.shape[-1] // 2
    padded = F.pad(images[:, None].float(), (margin, margin, margin, margin), mode="replicate")
    moved = affine(padded, angle, [0, shift], scale, [0.0], interpolation=InterpolationMode.BILINEAR)
    return moved[:, 0, margin:-margin, margin:-margin]


@torch.inference_mode()
def sensitivity(model, images, labels, kind):
    """Return how much the network's features and answers change when images are transformed (section 4.1).

    images: (N, H, W), gray values 0 to 255. labels: int64 (N,). kind: a key of TRANSFORMATIONS.
    Returns float32 (3, amounts, N): the distance to the features of the original image, divided by their
    norm, for the first and for the last rectified layer; and 1 for a correct answer, 0 for a wrong one.
    """
    rectified = [name for name, module in model.layers.named_children() if isinstance(module, nn.ReLU)]
    original = model.outputs(images)
    results = []
    for amount in TRANSFORMATIONS[kind]:
        outputs = model.outputs(transform(images, kind, amount))
        measurements = []
        for name in (rectified[0], rectified[-1]):
            before = original[name].float().flatten(1)
            after = outputs[name].float().flatten(1)
            measurements.append((after - before).norm(dim=1) / before.norm(dim=1))
        answers = list(outputs.values())[-1].argmax(1)
        measurements.append((answers == labels).float())
        results.append(torch.stack(measurements))
    return torch.stack(results, dim=1)


def invariance_title(image_count, original_accuracy, shift, shifted_accuracy):
    """Return the title of invariance. The accuracies are in percent, the shift is in pixels downwards."""
    message = f"Accuracy is {original_accuracy:.0f} % on {image_count:,} test images"
    return f"{message} and {shifted_accuracy:.0f} % when they are shifted down by {shift} pixels"


@figure(fits=has_convolutions)
def invariance(run, count=500):
    """Draw how features and accuracy change when test images are shifted, scaled or rotated (Fig. 5)."""
    images = run.data.test.images[:count]
    labels = run.data.test.labels[:count]
    quantiles = torch.tensor([0.1, 0.5, 0.9])

    fig = Figure(figsize=(FIGURE_WIDTH, 5.2))
    grid = fig.subplots(2, 3, sharey="row", sharex="col")
    accuracies = {}
    for (upper, lower), (kind, amounts) in zip(grid.T, TRANSFORMATIONS.items(), strict=True):
        first, last, is_correct = sensitivity(run.model, images, labels, kind)
        for label, distances, color in (("first", first, ACCENT_COLOR), ("last hidden", last, AFTER_COLOR)):
            low, median, high = distances.quantile(quantiles, dim=1)
            upper.fill_between(amounts, low, high, color=color, alpha=0.2, linewidth=0)
            upper.plot(amounts, median, color=color, label=f"{label} layer")
        accuracies[kind] = (100 * is_correct.mean(1)).tolist()
        lower.plot(amounts, accuracies[kind], color="black")
        lower.set(xlabel=kind, ylim=(0, 100))
        for axes in (upper, lower):
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("relative distance of the features\n(line: median; band: middle 80 %)")
    grid[0, 0].legend()
    grid[1, 0].set_ylabel("accuracy in %")

    shifts = TRANSFORMATIONS["vertical shift in pixels"].tolist()
    by_shift = accuracies["vertical shift in pixels"]
    title = invariance_title(len(images), by_shift[shifts.index(0)], shifts[-1], by_shift[-1])
    fig.suptitle(f"{title}\n{run.title}")
    return fig


def occlude_everywhere(image, size):
    """Return one copy of an image per pixel, float32 (H * W, H, W), with a gray square centred on that pixel.

    image: (1, H, W), gray values 0 to 255. size: side of the square in pixels.
    """
    height, width = image.shape[1:]
    copies = image.float().repeat(height * width, 1, 1)
    for copy, (row, column) in zip(copies, itertools.product(range(height), range(width)), strict=True):
        top = row - size // 2
        left = column - size // 2
        copy[max(0, top) : top + size, max(0, left) : left + size] = 127.5
    return copies


@torch.inference_mode()
def occlude(model, image, label, size):
    """Slide a gray square over an image (1, H, W), centred on each pixel in turn (section 4.2).

    Returns (probability, predicted, map_sum, feature_map). The first three are (H, W), one value per
    position: the probability of class `label`, the predicted class and the sum of one rectified feature map.
    feature_map is its number: the map of the last convolution that has the highest peak without the square.
    """
    layer = convolution_names(model)[-1]
    feature_map = int(model.outputs(image)[layer].amax((0, 2, 3)).argmax())
    probabilities = []
    sums = []
    for batch in occlude_everywhere(image, size).split(256):
        outputs = model.outputs(batch)
        logits = list(outputs.values())[-1]
        probabilities.append(logits.float().softmax(1))
        sums.append(F.relu(outputs[layer][:, feature_map].float()).sum((1, 2)))
    probabilities = torch.cat(probabilities).unflatten(0, image.shape[1:])
    map_sum = torch.cat(sums).view(image.shape[1:])
    return probabilities[..., label], probabilities.argmax(-1), map_sum, feature_map


def first_correct_of_each_class(run):
    """Return the number of one test image of each class, int64 (classes,).

    It is the first image that is classified correctly or, if there is none, the first image.
    """
    labels = run.data.test.labels
    is_correct = run.probabilities.argmax(1) == labels
    chosen = []
    for label in range(len(run.data.classes)):
        members = (labels == label).nonzero()[:, 0]
        chosen.append(members[is_correct[members].int().argmax()])
    return torch.stack(chosen)


def most_vulnerable(run, size, count):
    """Return the indices of the images of first_correct_of_each_class whose answer a gray square changes most often.

    To save time, only every seventh position of the square is tried. The numbers are int64 (count,).
    """
    candidates = first_correct_of_each_class(run)
    unchanged = []
    for number in candidates:
        occluded = occlude_everywhere(run.data.test.images[number][None], size)[::7]
        answers = predict(run.model, occluded).argmax(1)
        unchanged.append((answers == run.probabilities[number].argmax()).sum())
    return candidates[torch.stack(unchanged).argsort()[:count]]


def occlusion_title(size, classes, changed):
    """Return the title of occlusion. changed: percent of the positions, one value for each of `classes`."""
    shares = [f"{share:.0f} % ({name})" for name, share in zip(classes, changed, strict=True)]
    return f"A gray {size} x {size} square changes the answer at {' and '.join(shares)} of its positions"


@figure(fits=has_convolutions)
def occlusion(run, size=8, count=2):
    """Draw what hiding each part of an image does, for the images whose answer changes most (Fig. 7)."""
    layer = convolution_names(run.model)[-1]
    colors = matplotlib.colormaps["tab10"]
    numbers = most_vulnerable(run, size, count).tolist()
    fig = Figure(figsize=(FIGURE_WIDTH, 2.2 * len(numbers) + 0.6))
    grid = fig.subplots(len(numbers), 5, squeeze=False)
    headings = "image with the square", "reconstruction", "sum of the map", "p(true class)", "predicted class"
    for axes, heading in zip(grid[0], headings, strict=True):
        axes.set_title(heading, fontsize=8)

    classes = []
    changed = []
    for row, number in zip(grid, numbers, strict=True):
        image = run.data.test.images[number][None]
        label = int(run.data.test.labels[number])
        probability, predicted, map_sum, feature_map = occlude(run.model, image, label, size)
        classes.append(run.data.classes[label])
        changed.append(100 * (predicted != run.probabilities[number].argmax()).float().mean().item())

        reconstruction = deconvolve(run.model, image, layer, torch.tensor([feature_map]))[0, 0]
        limit = reconstruction.abs().max().item() or 1
        height, width = image.shape[1:]
        center = height // 2 * width + width // 2
        row[0].imshow(occlude_everywhere(image, size)[center], cmap="gray", vmin=0, vmax=255)
        row[0].set_ylabel(run.data.classes[label])
        row[1].imshow(reconstruction, cmap="gray", vmin=-limit, vmax=limit)
        row[1].set_xlabel(f"{layer}, map {feature_map}", fontsize=7, labelpad=1)
        for picture in (row[2].imshow(map_sum), row[3].imshow(probability, vmin=0, vmax=1)):
            bar = fig.colorbar(picture, orientation="horizontal", fraction=0.06)
            bar.ax.tick_params(labelsize=6)
        row[4].imshow(predicted, cmap=colors, vmin=-0.5, vmax=9.5)
        handles = []
        for answer in predicted.unique().tolist():
            handles.append(matplotlib.patches.Patch(color=colors(answer), label=run.data.classes[answer]))
        row[4].legend(handles=handles, loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=6, ncols=2)
        for axes in row:
            axes.set(xticks=[], yticks=[], anchor="N")
    fig.suptitle(f"{occlusion_title(size, classes, changed)}\n{run.title}")
    return fig


GABOR_STARTS = 24  # random starting points of the fit to each kernel; the best fit is kept
GABOR_COLUMNS = ("epoch", "kernels", "feature_map", "r2", "orientation_degrees", "cycles_per_pixel", "cosine_to_start")


class GaborFit(NamedTuple):
    """Gabor functions fitted to K kernels.

    fitted: the values of the functions, float32 (K, size, size). The other fields are float32 (K,).
    r2: 1 - squared error / sum of squared deviations from the kernel's mean.
    orientation: direction of the wave in degrees from 0 to 180, counterclockwise from the horizontal.
    frequency: in cycles per pixel.
    """

    fitted: torch.Tensor
    r2: torch.Tensor
    orientation: torch.Tensor
    frequency: torch.Tensor


def gabor_parameters(free, size):
    """Map unbounded numbers (6, ...) to (centre x, centre y, width s, width t, frequency, angle), each (...).

    The centre stays on the kernel, the widths between 0.5 and `size` pixels, and the frequency below 0.5
    cycles per pixel. The angle is in radians.
    """
    x, y, s, t, frequency = free[:5].sigmoid()
    center_x = (x - 0.5) * (size - 1)
    center_y = (y - 0.5) * (size - 1)
    width_s = 0.5 + (size - 0.5) * s
    width_t = 0.5 + (size - 0.5) * t
    return center_x, center_y, width_s, width_t, 0.5 * frequency, free[5]


def gabor_waves(size, center_x, center_y, width_s, width_t, frequency, angle):
    """Return the even and the odd Gabor function, each (..., size * size), for parameters (..., 1).

    They are exp(-u^2 / 2s^2 - v^2 / 2t^2) times cos(2 pi frequency u) or sin(2 pi frequency u). u and v are
    the distances of a pixel from the centre along the wave and across it, in pixels, with y pointing upwards.
    """
    steps = torch.arange(size) - (size - 1) / 2
    x = steps.repeat(size) - center_x
    y = -steps.repeat_interleave(size) - center_y
    u = x * angle.cos() + y * angle.sin()
    v = y * angle.cos() - x * angle.sin()
    envelope = torch.exp(-((u / width_s) ** 2 + (v / width_t) ** 2) / 2)
    phase = 2 * math.pi * frequency * u
    return envelope * phase.cos(), envelope * phase.sin()


def best_linear_combination(targets, even, odd, ridge=1e-6):
    """Return the a * even + b * odd that is closest to the targets, by least squares; all are (..., pixels).

    The normal equations are solved by Cramer's rule; `ridge` keeps them solvable.
    """

    def inner_product(first, second):
        return (first * second).sum(-1, keepdim=True)

    even_even = inner_product(even, even) + ridge
    odd_odd = inner_product(odd, odd) + ridge
    even_odd = inner_product(even, odd)
    even_target = inner_product(even, targets)
    odd_target = inner_product(odd, targets)
    numerator_a = odd_odd * even_target - even_odd * odd_target
    numerator_b = even_even * odd_target - even_odd * even_target
    return (numerator_a * even + numerator_b * odd) / (even_even * odd_odd - even_odd**2)


def fit_gabor(kernels, steps=300, seed=0):
    """Return the GaborFit of kernels, float32 (K, size, size): the best least-squares fit to each of them.

    Adam optimises the six gabor_parameters from GABOR_STARTS random starting points.
    Amplitude and phase follow from best_linear_combination.
    """
    size = kernels.shape[1]
    targets = kernels.flatten(1)[:, None]  # (K, 1, pixels); the fitted functions are (K, starts, pixels)
    generator = torch.Generator().manual_seed(seed)
    free = (1.5 * torch.randn(6, len(kernels), GABOR_STARTS, 1, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([free], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    for _ in range(steps):
        fitted = best_linear_combination(targets, *gabor_waves(size, *gabor_parameters(free, size)))
        errors = (fitted - targets).square().sum(-1)
        optimizer.zero_grad()
        errors.sum().backward()
        optimizer.step()
        schedule.step()

    free = free.detach()
    *_, frequency, angle = gabor_parameters(free, size)
    fitted = best_linear_combination(targets, *gabor_waves(size, *gabor_parameters(free, size)))
    errors = (fitted - targets).square().sum(-1)
    numbers = torch.arange(len(kernels))
    best = errors.argmin(1)
    variation = (targets - targets.mean(-1, keepdim=True)).square().sum(-1)[:, 0]
    r2 = 1 - errors[numbers, best] / variation
    orientation = torch.rad2deg(angle[numbers, best, 0]) % 180
    return GaborFit(fitted[numbers, best].view_as(kernels), r2, orientation, frequency[numbers, best, 0])


def fit_gabor_pair(trained, untrained):
    """Fit Gabor functions to trained and untrained kernels, float32 (K, size, size) each, at the same time.

    Returns {"trained": (kernels, GaborFit), "untrained": (kernels, GaborFit)}.
    """
    both = fit_gabor(torch.cat([trained, untrained]))
    count = len(trained)
    trained_fit = GaborFit(*[values[:count] for values in both])
    untrained_fit = GaborFit(*[values[count:] for values in both])
    return {"trained": (trained, trained_fit), "untrained": (untrained, untrained_fit)}


def gabor_rows(fits, epoch):
    """Return the rows of gabor.csv in the order of GABOR_COLUMNS, from the result of fit_gabor_pair."""
    untrained_kernels, _ = fits["untrained"]
    rows = []
    for name, (kernels, fit) in fits.items():
        cosines = F.cosine_similarity(kernels.flatten(1), untrained_kernels.flatten(1))
        for number in range(len(kernels)):
            values = (fit.r2[number], fit.orientation[number], fit.frequency[number], cosines[number])
            rows.append((epoch, name, number, *(value.item() for value in values)))
    return rows


@table("gabor")
def measure_gabor(run):
    """Return the columns and rows of gabor.csv: the fit to each kernel of the first convolution."""
    fits = fit_gabor_pair(first_kernels(run.model), first_kernels(run.untrained_model()))
    return GABOR_COLUMNS, gabor_rows(fits, run.epoch)


def gabor_title(layer, trained_median, untrained_median):
    """Return the title of gabor, from the median R² after and before training."""
    medians = f"a median R² of {trained_median:.2f} after training and {untrained_median:.2f} before"
    return f"Gabor functions fit the kernels of {layer} with {medians}"


@figure(fits=has_convolutions)
def gabor(run, count=8):
    """Draw the kernels that Gabor functions fit best, with fits and residuals, and the R² of all kernels."""
    fits = fit_gabor_pair(first_kernels(run.model), first_kernels(run.untrained_model()))
    kernels, fit = fits["trained"]
    best = fit.r2.topk(min(count, len(kernels))).indices
    limit = kernels.abs().max().item()

    fig = Figure(figsize=(FIGURE_WIDTH, 5.4))
    upper, lower = fig.subfigures(2, 1, height_ratios=(1.5, 1))
    axes = upper.subplots()
    strips = torch.stack([kernels[best], fit.fitted[best], (kernels - fit.fitted)[best]]).flatten(0, 1)
    labels = []
    for number in best:
        wave = f"{fit.orientation[number]:.0f}°, {fit.frequency[number]:.2f}"
        labels.append(f"{number}: {fit.r2[number]:.2f}\n{wave}")
    _, tops, _ = draw_mosaic(axes, strips, labels, columns=len(best), gap=1, room=2, vmin=-limit, vmax=limit)
    axes.set_yticks([top + kernels.shape[1] / 2 for top in tops], ["kernel", "fit", "residual"])
    axes.set(xlabel="above each kernel: number, R², orientation and cycles per pixel")

    axes = lower.subplots()
    medians = {}
    for name, color in (("trained", AFTER_COLOR), ("untrained", BEFORE_COLOR)):
        _, shown_fit = fits[name]
        medians[name] = np.median(shown_fit.r2)
        axes.ecdf(shown_fit.r2, color=color, label=f"{name}: median {medians[name]:.2f}")
    axes.set(xlabel="R² of the Gabor fit", ylabel="share of kernels")
    axes.legend()
    axes.grid(alpha=0.3)

    title = gabor_title(convolution_names(run.model)[0], medians["trained"], medians["untrained"])
    fig.suptitle(f"{title}\n{run.title}")
    return {"gabor.png": fig, "gabor.csv": format_table(GABOR_COLUMNS, gabor_rows(fits, run.epoch))}


# Inside the recurrent networks ------------------------------------------------------------------------------


def states_by_row(model, images):
    """Yield the state of both layers after each row of images (N, H, W) with gray values 0 to 255.

    A state is a tuple of tensors (layers, N, units): the hidden state and, for an LSTM, the cell state.
    Blank rows count as rows.
    """
    state = None
    for row in model.rows(images).split(1, dim=1):
        _, state = model.recurrent(row, state)
        yield state if isinstance(state, tuple) else (state,)


def gradient_norms(model, images, labels):
    """Return how strongly the loss depends on the state after each row, float32 (steps,).

    For each image and row this is the Euclidean norm of the gradient of the image's loss with respect to
    everything that the next step receives: the hidden states of both layers and, for an LSTM, their cell
    states. After the last row only the output of the second layer matters. The norms are averaged over the
    images.

    images: (N, H, W), gray values 0 to 255. labels: int64 (N,).
    """
    states = list(states_by_row(model, images))  # row by row, so that every state is part of the graph
    last_hidden = states[-1][0]
    losses = F.cross_entropy(model.fc(last_hidden[-1]), labels, reduction="none")

    tensors = list(itertools.chain.from_iterable(states))
    state_gradients = torch.autograd.grad(losses.sum(), tensors, materialize_grads=True)

    squares = torch.stack([gradient.square().sum((0, 2)) for gradient in state_gradients])
    squares = squares.view(len(states), -1, len(images)).sum(1)  # adds those of hidden and cell state
    return squares.sqrt().mean(1)


def gradients_by_epoch(run, count=1000):
    """Return rows (epoch, norm after row 1, norm after row 2, ...).

    The norms are the gradient_norms of the first count test images: of the untrained network (epoch 0), after
    the epochs whose weights were saved, and of the checkpoint.
    """
    models = {0: run.model_after(0)}
    for epoch in run.snapshot_epochs:
        if 0 < epoch < run.epoch:
            models[epoch] = run.model_after(epoch)
    models[run.epoch] = run.model

    images = run.data.test.images[:count]
    labels = run.data.test.labels[:count]
    return [(epoch, *gradient_norms(model, images, labels).tolist()) for epoch, model in models.items()]


@table("gradients")
def measure_gradients(run):
    """Return the columns and rows of gradients.csv: one line per epoch, one column per row that is read."""
    rows = gradients_by_epoch(run)
    return ("epoch", *range(1, len(rows[0]))), rows


GRADIENT_FLOOR = 1e-16  # smaller norms are raised to it, because a logarithmic axis has no zero


def parse_gradients(rows):
    """Return a dict from epoch to the gradient norms, at least GRADIENT_FLOOR, float64 (steps,).

    rows: (epoch, norm after row 1, norm after row 2, ...), as numbers or as text.
    """
    norms_by_epoch = {}
    for epoch, *norms in rows:
        norms_by_epoch[int(epoch)] = np.array(norms, dtype=float).clip(min=GRADIENT_FLOOR)
    return norms_by_epoch


def gradient_reach(norms):
    """Return the gradient norm after the first row divided by the norm after the last row."""
    return norms[0] / norms[-1]


def format_percent(share):
    """Return a share in percent with at least two significant digits, or 'less than 0.01 %'."""
    percent = 100 * share
    if percent < 0.01:
        return "less than 0.01 %"
    return f"{percent:,.0f} %" if percent >= 10 else f"{percent:.2g} %"


def gradients_title(trained_reach, untrained_reach):
    """Return the title of gradients, from the gradient_reach after and before training."""
    before = f"before training: {format_percent(untrained_reach)}"
    after = f"{format_percent(trained_reach)} of that at the last row"
    return f"The loss gradient at the first row is {after} ({before})"


def shade_blank_rows(axes, config, steps):
    """Shade the blank rows on an axes whose x axis is the number of rows read, from 1 to steps."""
    label = "blank rows"
    for start, end in [(0, config.rows_before), (steps - config.rows_after, steps)]:
        if start < end:
            axes.axvspan(start + 0.5, end + 0.5, color="0.9", zorder=0, label=label)
            label = None  # one entry in the legend is enough
    axes.set_xlim(0.5, steps + 0.5)


@figure(fits=is_recurrent)
def gradients(run):
    """Draw the norm of the loss gradient with respect to the state after each row, one line per epoch."""
    columns, rows = measure_gradients(run)
    norms_by_epoch = parse_gradients(rows)
    steps = len(columns) - 1

    drawn = Figure(figsize=(FIGURE_WIDTH, 3.4))
    axes = drawn.subplots()
    shade_blank_rows(axes, run.config, steps)
    colors = [BEFORE_COLOR, *shades(len(rows) - 1)]
    for (epoch, norms), color in zip(norms_by_epoch.items(), colors, strict=True):
        label = f"epoch {epoch}" if epoch else "untrained"
        axes.semilogy(range(1, steps + 1), norms, color=color, label=label)
    axes.set(xlabel="rows read", ylabel="norm of the loss gradient")
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), ncols=math.ceil(len(rows) / 12))

    title = gradients_title(gradient_reach(norms_by_epoch[run.epoch]), gradient_reach(norms_by_epoch[0]))
    drawn.suptitle(f"{title}\n{run.title}")
    return {"gradients.png": drawn, "gradients.csv": format_table(columns, rows)}


@torch.inference_mode()
def probabilities_by_row(model, images, batch_size=1000):
    """Return the class probabilities after each row of images (N, H, W), float32 (N, steps, classes).

    They are what the network would answer if that row were the last one.
    """
    probabilities = []
    for batch in images.split(batch_size):
        outputs, _ = model.recurrent(model.rows(batch))
        probabilities.append(model.fc(outputs).softmax(-1))
    return torch.cat(probabilities)


def state_features(state):
    """Return a state of states_by_row as one vector per image, float32 (N, features)."""
    return torch.cat([part.movedim(0, 1).flatten(1) for part in state], dim=1)


@torch.inference_mode()
def probe_states(model, train, test, classes):
    """Return the accuracy of a linear classifier on the state after each row, in percent, list of float.

    A classifier is fitted to the state of both layers for the images of train and evaluated on those of test
    (both are Splits). classes: number of classes.
    """
    accuracies = []
    train_states = states_by_row(model, train.images)
    test_states = states_by_row(model, test.images)
    for train_state, test_state in zip(train_states, test_states, strict=True):
        fitted = state_features(train_state)
        tested = state_features(test_state)
        accuracies.append(linear_probe_accuracy(fitted, train.labels, tested, test.labels, classes))
    return accuracies


@table("reading")
def measure_reading(run):
    """Return the columns and rows of reading.csv: one line for each number of rows read.

    Two accuracies on the test images, in percent: known, that of a linear classifier on the state, and
    answered, that of the network itself.
    """
    train = run.data.train
    test = run.data.test
    probe_train = utils.Split(train.images[:RIDGE_IMAGES], train.labels[:RIDGE_IMAGES])
    known = probe_states(run.model, probe_train, test, len(run.data.classes))

    answers = probabilities_by_row(run.model, test.images).argmax(2)
    answered = 100 * (answers == test.labels[:, None]).double().mean(0)

    rows = [(run.epoch, step + 1, known[step], answered[step].item()) for step in range(len(known))]
    return ("epoch", "rows", "known", "answered"), rows


def reading_title(read, steps, known, answered):
    """Return the title of reading. known, answered: accuracies in percent after `read` of `steps` rows."""
    classifier = f"a linear classifier on the state recognises {known:.0f} % of the images"
    return f"After {read} of {steps} rows, {classifier} and the network {answered:.0f} %"


@figure(fits=is_recurrent)
def reading(run, count=5):
    """Draw the network's answers row by row for some digits, and the accuracies of reading.csv.

    count: number of digits.
    """
    columns, rows = measure_reading(run)
    _, rows_read, known, answered = zip(*rows, strict=True)
    steps = len(rows)

    test = run.data.test
    chosen = first_correct_of_each_class(run)[::2][:count]
    inputs = run.model.rows(test.images[chosen])
    probabilities = probabilities_by_row(run.model, test.images[chosen])
    classes = probabilities.shape[2]

    drawn = Figure(figsize=(FIGURE_WIDTH, 6.4))
    top, bottom = drawn.subfigures(2, 1, height_ratios=(2, 1))
    panels = top.subplots(2, len(chosen), height_ratios=(1, 1.4), squeeze=False)
    ticks = [1, steps // 2, steps]
    for number, label in enumerate(test.labels[chosen]):
        picture, heat = panels[:, number]
        picture.imshow(inputs[number], cmap="gray", extent=(0.5, inputs.shape[2] + 0.5, steps + 0.5, 0.5))
        picture.set(xticks=[], yticks=ticks, title=f"true class: {run.data.classes[label]}")
        extent = (-0.5, classes - 0.5, steps + 0.5, 0.5)
        shown = heat.imshow(probabilities[number], vmin=0, vmax=1, extent=extent, aspect="auto")
        heat.set(xticks=range(classes), yticks=ticks, xlabel="class")
        heat.tick_params(axis="x", labelsize=7)
    panels[0, 0].set_ylabel("row")
    panels[1, 0].set_ylabel("rows read")
    top.colorbar(shown, ax=panels, label="probability of the class", shrink=0.6)

    axes = bottom.subplots()
    shade_blank_rows(axes, run.config, steps)
    axes.plot(rows_read, known, ".-", color=ACCENT_COLOR, label="linear classifier on the state")
    axes.plot(rows_read, answered, ".-", color=AFTER_COLOR, label="the network's own answer")
    axes.set(xlabel="rows read", ylabel=f"accuracy in % over\n{len(test.labels):,} test images")
    axes.set(ylim=(0, 100), yticks=range(0, 101, 25))
    axes.grid(alpha=0.3)
    bottom.legend(loc="outside lower center", ncols=3)

    half = steps // 2
    title = reading_title(half, steps, known[half - 1], answered[half - 1])
    drawn.suptitle(f"{title}\n{run.title}")
    return {"reading.png": drawn, "reading.csv": format_table(columns, rows)}


KEEPING_GATES = {"gru": "update", "lstm": "forget"}  # the gate that keeps the state
GATE_ROLES = {
    "reset": "share of the state shown to the candidate",
    "update": "share of the state kept",
    "input": "share of the candidate written",
    "forget": "share of the cell state kept",
    "output": "share of the cell state shown",
}


@torch.inference_mode()
def gate_activations(model, images):
    """Return the gates of a GRU or LSTM at every row of images (N, H, W) with gray values 0 to 255.

    The result is a dict from (layer, gate) to values. Layers are 1 and 2, gates are named as in
    rnn_mnist.GATE_BLOCKS, and values are float32 (N, steps, units) from 0 (shut) to 1 (open). A gate is
    computed from its block of the weights, the layer's input at that row and the layer's hidden state before
    that row; both come from the network itself.
    """
    recurrent = model.recurrent
    weights = recurrent.state_dict()
    blocks = rnn_mnist.GATE_BLOCKS[recurrent.mode.lower()]  # PyTorch calls the modes "GRU" and "LSTM"
    hidden = torch.stack([state[0] for state in states_by_row(model, images)], dim=2)  # (2, N, steps, units)
    previous = F.pad(hidden[:, :, :-1], (0, 0, 1, 0))  # zeros before the first row

    activations_by_gate = {}
    inputs = model.rows(images)
    for layer in range(recurrent.num_layers):
        from_input = F.linear(inputs, weights[f"weight_ih_l{layer}"], weights[f"bias_ih_l{layer}"])
        from_state = F.linear(previous[layer], weights[f"weight_hh_l{layer}"], weights[f"bias_hh_l{layer}"])
        sums_by_block = (from_input + from_state).split(recurrent.hidden_size, dim=2)
        for gate, block in blocks.items():
            activations_by_gate[layer + 1, gate] = sums_by_block[block].sigmoid()
        inputs = hidden[layer]
    return activations_by_gate


@table("gates")
def measure_gates(run, batch_size=1000):
    """Return the columns and rows of gates.csv: one line for each layer, gate and row read (also blank rows).

    The gate of each unit is averaged over the test images. mean, low and high are the mean, the 10 % quantile
    and the 90 % quantile over the units, all from 0 to 1.
    """
    images = run.data.test.images
    sums = {}  # (steps, units) by layer and gate; the values of all images would take several gigabytes
    for batch in images.split(batch_size):
        for key, values in gate_activations(run.model, batch).items():
            sums[key] = sums.get(key, 0) + values.double().sum(0)

    rows = []
    for (layer, gate), total in sums.items():
        units = total / len(images)
        low, high = units.quantile(torch.tensor([0.1, 0.9]).double(), dim=1)
        statistics = torch.stack([units.mean(1), low, high], dim=1)
        for row, numbers in enumerate(statistics.tolist(), start=1):
            rows.append((run.epoch, layer, gate, row, *numbers))
    return ("epoch", "layer", "gate", "row", "mean", "low", "high"), rows


def parse_gates(rows):
    """Return a dict from (layer, gate) to mean, low and high, in percent, float64 (3, steps).

    rows: the rows of gates.csv, as numbers or as text.
    """
    values_by_gate = {}
    for _, layer, gate, _, *values in rows:
        values_by_gate.setdefault((int(layer), gate), []).append(values)
    return {key: 100 * np.array(values, dtype=float).T for key, values in values_by_gate.items()}


def gates_title(gate, kept, low, high, config):
    """Return the title of gates: how much of the state a gate keeps.

    kept, low, high: values of parse_gates, averaged over the layers, in percent (steps,). With blank rows,
    the middle of the digit (its rows 8 to 20) is compared with the blank rows after the digit, or with those
    before it if none come after it. Without, the title says how much rows and units differ.
    """
    is_still = kept.max() - kept.min() < 0.5
    if is_still or not (config.rows_before or config.rows_after):
        where = "In every row" if is_still else "Depending on the row"
        amount = f"{kept.mean():.0f} %" if is_still else f"{kept.min():.0f} to {kept.max():.0f} %"
        units = f"80 % of the units: {low.mean():.0f} to {high.mean():.0f} %"
        return f"{where}, the {gate} gate keeps {amount} of the state ({units})"

    middle = kept[config.rows_before + 7 : config.rows_before + 20].mean()
    if config.rows_after:
        blank = f"{kept[-config.rows_after :].mean():.0f} % in the blank rows after it"
    else:
        blank = f"{kept[: config.rows_before].mean():.0f} % in the blank rows before it"
    return f"The {gate} gate keeps {middle:.0f} % of the state in rows 8 to 20 of the digit and {blank}"


def gate_panels(subfigure, inputs):
    """Create axes (2, N), a row for each layer, above N images that lie along the x axis as they are read.

    inputs: float (N, steps, width), the rows that the network reads.
    """
    panels = subfigure.subplots(3, len(inputs), sharex=True, squeeze=False, height_ratios=(1, 1, 0.4))
    for axes, rows in zip(panels[2], inputs, strict=True):
        steps, width = rows.shape
        axes.imshow(rows.T, cmap="gray", origin="lower", extent=(0.5, steps + 0.5, 0, width), aspect="auto")
        axes.set(yticks=[], xlabel="row read")
    panels[0, 0].set_ylabel("layer 1")
    panels[1, 0].set_ylabel("layer 2")
    return panels[:2]


@figure(fits=has_gates)
def gates(run, classes=(0, 7)):
    """Draw how far the gates open at every row, on average over the test images and for two digits.

    classes: the classes of the two digits.
    """
    columns, rows = measure_gates(run)
    values_by_gate = parse_gates(rows)
    names = list(rnn_mnist.GATE_BLOCKS[run.config.cell])
    keeping_gate = KEEPING_GATES[run.config.cell]

    test = run.data.test
    images = test.images[first_correct_of_each_class(run)[list(classes)]]
    activations_by_gate = gate_activations(run.model, images)
    inputs = run.model.rows(images)
    steps = inputs.shape[1]

    drawn = Figure(figsize=(FIGURE_WIDTH, 8))
    top, bottom = drawn.subfigures(2, 1)
    mean_panels = gate_panels(top, inputs[:1].expand(len(names), -1, -1))
    for (layer, gate), (mean, low, high) in values_by_gate.items():
        axes = mean_panels[layer - 1, names.index(gate)]
        shade_blank_rows(axes, run.config, steps)
        x = range(1, steps + 1)
        axes.fill_between(x, low, high, color=AFTER_COLOR, alpha=0.25, lw=0, label="middle 80 % of the units")
        axes.plot(x, mean, color=AFTER_COLOR, label="mean of the units")
        axes.set(ylim=(0, 100), yticks=[0, 50, 100])
        axes.grid(alpha=0.3)
    for axes, gate in zip(mean_panels[0], names, strict=True):
        axes.set_title(f"{gate} gate in %\n({GATE_ROLES[gate]})")
    test_images = f"{len(test.labels):,} test images (one is shown below)"
    top.suptitle(f"All gates, averaged over {test_images}", fontsize=9)
    top.legend(*mean_panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    unit_panels = gate_panels(bottom, inputs)
    for layer in (1, 2):
        values = 100 * activations_by_gate[layer, keeping_gate]
        values = values[:, :, values.mean((0, 1)).argsort()]
        extent = (0.5, steps + 0.5, 0.5, values.shape[2] + 0.5)
        for axes, of_image in zip(unit_panels[layer - 1], values, strict=True):
            shown = axes.imshow(of_image.T, vmin=0, vmax=100, origin="lower", extent=extent, aspect="auto")
            axes.set(yticks=[])
    bottom.suptitle(f"The {keeping_gate} gate of every unit, sorted by mean, for two digits", fontsize=9)
    bottom.colorbar(shown, ax=unit_panels, label=f"{keeping_gate} gate in %\n({GATE_ROLES[keeping_gate]})")

    kept, low, high = (values_by_gate[1, keeping_gate] + values_by_gate[2, keeping_gate]) / 2
    title = gates_title(keeping_gate, kept, low, high, run.config)
    drawn.suptitle(f"{title}\n{run.title}")
    return {"gates.png": drawn, "gates.csv": format_table(columns, rows)}


# Comparing runs: grouping and labels ----------------------------------------------------------------------------------

# Runs that change one of these settings are left out of the figures of all other settings.
UNUSUAL_SETTINGS = {"rows_before", "rows_after", "keep_bias", "gates", "pixels", "without"}


@dataclass
class Group:
    """The runs of one setting, one for each seed.

    config: their Config, with seed 0. epoch: the epoch after which runs are compared.
    """

    runs: list
    config: utils.Config
    epoch: int

    @property
    def accuracies(self):
        """The test accuracies in percent, in the order of the runs."""
        return [run.test_accuracy(self.epoch) for run in self.runs]

    @property
    def mean(self):
        """The mean test accuracy in percent."""
        return float(np.mean(self.accuracies))

    @property
    def reported(self):
        """The test accuracy in percent in the reference report, None where it gives none that is comparable."""
        reported = utils.find_reported(self.runs[0], self.epoch, REPORT)
        return None if reported.remark else reported.accuracy

    @property
    def source_suffix(self):
        return self.runs[0].source_suffix


def setting_order(config):
    """Return the sort key of a Config: by script, then by each setting. Choices keep the order of their list."""
    key = [config.script]
    for spec, value in config.items():
        rank = list(spec.choices).index(value) if spec.choices else value
        key.append((value is not None, rank))  # None comes first
    return key


def group_runs(runs):
    """Return the Groups of runs, in the order of their settings, all compared after the same epoch.

    This is the most common last epoch, at most REPORT_EPOCHS; ties go to the later one. Shorter runs, and all but the
    longest run of an experiment, are skipped with a message.
    """
    experiments = {}
    for run in sorted(runs, key=lambda run: run.epoch, reverse=True):
        longest = experiments.setdefault((run.config, run.source_suffix), run)
        if longest is not run:
            print_line(f"skipping {run.folder}: duplicate of {longest.folder}")

    last_epochs = [min(run.epoch, REPORT_EPOCHS) for run in experiments.values()]
    epoch = max(set(last_epochs), key=lambda last: (last_epochs.count(last), last))
    shorter = [str(run.folder) for run in experiments.values() if run.epoch < epoch]
    compared = [run for run in experiments.values() if run.epoch >= epoch]
    compared.sort(key=lambda run: setting_order(run.config))
    print_line(f"runs compared after epoch {epoch}: {len(compared)}")
    if shorter:
        print_line(f"skipping runs that have not reached epoch {epoch}: {', '.join(shorter)}")
    return [Group(same, same[0].config.without_seed, epoch) for same in utils.group_by_setting(compared)]


def label_configs(configs):
    """Return what distinguishes each Config from the others, list of str, and what all have in common, str.

    A setting that differs is named even where it has its default. The seed is never named.
    """
    captions_of_all = []
    shown = {}
    for config in configs:
        captions = {"network": config.network}
        captions.update((spec.name, spec.label(value)) for spec, value in config.items() if spec.name != "seed")
        captions_of_all.append(captions)
        shown.update(config.captions())

    differing = set()
    for captions in captions_of_all:
        differing.update(name for name in shown if captions.get(name) != captions_of_all[0].get(name))

    labels = []
    for captions in captions_of_all:
        labels.append(", ".join(caption for name, caption in captions.items() if name in differing and caption))
    common = [caption for name, caption in configs[0].captions().items() if name not in {*differing, "seed"}]
    return labels, ", ".join(common)


def label_groups(groups):
    """Return label_configs of groups; what they have in common also says whether their data are synthetic."""
    labels, common = label_configs([group.config for group in groups])
    return labels, (common + groups[0].source_suffix).removeprefix(", ")


def families_of(groups, name, least=2):
    """Return lists of groups that differ only in the setting called name; least: the length of the shortest list."""
    families = {}
    for group in groups:
        others = [(spec.name, value) for spec, value in group.config.items() if spec.name != name]
        if hasattr(group.config, name):
            families.setdefault((group.config.script, *others), []).append(group)
    return [family for family in families.values() if len(family) >= least]


def usual_groups(groups, name=""):
    """Return the groups in which UNUSUAL_SETTINGS other than name have their defaults, or all groups if none has."""
    usual = []
    for group in groups:
        changed = {spec.name for spec, value in group.config.items() if value != spec.default}
        if not changed & UNUSUAL_SETTINGS - {name}:
            usual.append(group)
    return usual or groups


def best_setting(groups):
    """Return in words which group has the highest mean accuracy, and how far it is ahead of the second."""
    if len(groups) == 1:
        return f"{groups[0].mean:.2f} %"
    labels, _ = label_groups(groups)
    ranking = sorted(zip([group.mean for group in groups], labels, strict=True), reverse=True)
    (best, label), (second, _), *_ = ranking
    return f"best: {label} ({best:.2f} %, {best - second:.2f} points ahead)"


# Pictures of several settings -----------------------------------------------------------------------------------------

MAX_PANELS = 24
MAX_LINES = 6  # in a panel


def color_of(group):
    """Return the colour of a group's network, black for one without a colour of its own."""
    return NETWORK_COLORS.get(group.config.network.partition(" ")[0], "black")


def shades(count):
    """Return a number of colours, from dark to light."""
    return matplotlib.colormaps["viridis"](np.linspace(0, 0.85, count))


def accuracy_scale(axes, groups, column="test_accuracy"):
    """Prepare the y axis for test_accuracy or train_loss, and return the function that turns values into those to draw.

    Where the mean accuracies of all groups are above 90 %, errors are drawn on a logarithmic axis.
    """

    def error(accuracies):
        return np.maximum(100 - np.asarray(accuracies), 1e-3)  # a logarithmic axis has no zero

    is_loss = column == "train_loss"
    if not is_loss and min(group.mean for group in groups) <= 90:
        axes.set_ylabel("test accuracy in %")
        axes.grid(alpha=0.3)
        return np.asarray
    axes.set_ylabel("training loss (log scale)" if is_loss else "test error in % (log scale)")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axes.grid(alpha=0.3, which="both")
    return np.asarray if is_loss else error


def draw_epochs(axes, groups, all_groups, column="test_accuracy", own_legend=True):
    """Draw test_accuracy or train_loss by epoch: for each group a line, the mean of the seeds, and a band, their range.

    A cross marks the accuracy in the reference report. all_groups: the groups of all panels. own_legend: whether a
    legend below the panel explains its lines.
    """
    scale = accuracy_scale(axes, all_groups, column)
    labels, _ = label_groups(groups)
    colors = [color_of(group) for group in groups]
    if len(set(colors)) < len(colors):
        colors = shades(len(groups))

    lines = []
    for group, label, color in zip(groups, labels, colors, strict=True):
        epochs = range(1, group.epoch + 1)
        values = scale([[run.history[epoch - 1][column] for epoch in epochs] for run in group.runs])
        lines += axes.plot(epochs, values.mean(0), color=color, marker=".", markersize=4, label=label)
        if len(group.runs) > 1:
            axes.fill_between(epochs, values.min(0), values.max(0), color=color, alpha=0.2, linewidth=0)
        if group.reported is not None and column == "test_accuracy":
            axes.plot(REPORT_EPOCHS, scale(group.reported), "x", color=color, markersize=7, markeredgewidth=2)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if own_legend and len(groups) > 1:
        axes.legend(handles=lines, fontsize=7, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.2))

    if any(len(group.runs) > 1 for group in groups):
        axes.plot([], [], color="0.4", label="mean of the seeds")
        axes.fill_between([], [], color="0.4", alpha=0.2, label="range of the seeds")
    if any(group.reported is not None for group in groups):
        axes.plot([], [], "x", color="0.4", label="reference report")


def add_legend(drawn):
    """Add a legend below a Figure for all labels except those that the legend of a panel explains."""
    handles = {}
    for axes in drawn.axes:
        legend = axes.get_legend()
        explained = {text.get_text() for text in legend.get_texts()} if legend else set()
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            if label not in explained:
                handles.setdefault(label, handle)
    if handles:
        columns = 4 if sum(map(len, handles)) < 100 else 2
        drawn.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)


def draw_panels(name, panels, draw, title, columns=3, sharey=False):
    """Return a Figure with one panel for each (panel title, groups), drawn by draw(axes, groups), and a legend.

    Returns None if there is no panel. If there are more than MAX_PANELS, it prints which runs to name instead, and
    returns None. name: the name of the picture.
    """
    all_groups = list(itertools.chain.from_iterable(groups for _, groups in panels))
    if len(panels) > MAX_PANELS:
        folder = all_groups[0].runs[0].folder
        prefix = "synthetic_" if folder.name.startswith("synthetic_") else ""
        example = folder.with_name(prefix + folder.name.removeprefix(prefix).partition("_")[0] + "*")
        needed = f"{len(all_groups)} settings need more than {MAX_PANELS} panels"
        print_line(f"{name}: {needed}; pass fewer runs, such as {example}")
    if not 0 < len(panels) <= MAX_PANELS:
        return None

    rows = math.ceil(len(panels) / columns)
    columns = math.ceil(len(panels) / rows)  # the last row is as full as possible
    drawn = Figure(figsize=(FIGURE_WIDTH, 3 * rows + 0.8))
    all_axes = drawn.subplots(rows, columns, sharey=sharey, squeeze=False)
    for axes, (panel_title, groups) in zip(all_axes.flat, panels, strict=False):
        axes.grid(alpha=0.3)
        draw(axes, groups)
        lines = [textwrap.fill(line, 100 // columns, break_on_hyphens=False) for line in panel_title.splitlines()]
        axes.set_title("\n".join(lines))
        if sharey and axes not in all_axes[:, 0]:
            axes.set_ylabel("")
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    add_legend(drawn)
    drawn.suptitle(title)
    return drawn


def draw_families(name, families, draw, title, columns=3, sharey=False):
    """Return draw_panels with one panel for each family of groups, drawn by draw(axes, family, all groups).

    The title of a panel says what its groups have in common and which of them is best.
    """
    all_groups = list(itertools.chain.from_iterable(families))
    panels = [(f"{label_groups(family)[1]}\n{best_setting(family)}", family) for family in families]
    return draw_panels(name, panels, partial(draw, all_groups=all_groups), title, columns, sharey)


def split_into_lines(groups):
    """Return lists of at most MAX_LINES groups, every group in one of them.

    The groups of a list differ only in one setting: of each script the one that has the most values.
    """
    panels = []
    for script, config_class in CONFIGS.items():
        members = [group for group in groups if group.config.script == script]
        values = {}
        for spec in config_class.specs():
            values[spec.name] = {getattr(group.config, spec.name) for group in members}
        most_varied = max(values, key=lambda name: len(values[name]))
        for family in families_of(members, most_varied, least=1):
            panels += [family[start : start + MAX_LINES] for start in range(0, len(family), MAX_LINES)]
    return panels


@comparison("curves")
def compare_curves(groups):
    """Draw test accuracy by epoch; for up to six settings also the training loss."""
    epoch = groups[0].epoch
    if epoch == 1:  # each line would be a point; the other figures show more
        return None
    if len(groups) > MAX_LINES:
        title = f"Test accuracy by epoch, and the best setting after epoch {epoch}"
        return draw_families("curves", split_into_lines(groups), draw_epochs, title, columns=2)

    drawn = Figure(figsize=(FIGURE_WIDTH, 4.2))
    for axes, column in zip(drawn.subplots(1, 2), ("test_accuracy", "train_loss"), strict=True):
        draw_epochs(axes, groups, groups, column, own_legend=False)
    add_legend(drawn)
    title = "Accuracy and loss by epoch"
    if len({group.config.dataset for group in groups}) == 1:
        title = f"Test accuracy after epoch {epoch}, {best_setting(groups)}"
    title = textwrap.fill(title, 100, break_on_hyphens=False)
    drawn.suptitle(f"{title}\n{label_groups(groups)[1]}")
    return drawn


def draw_seeds(axes, groups, all_groups, name):
    """Draw the accuracy of every seed and the mean for groups that differ in the setting called name."""
    scale = accuracy_scale(axes, all_groups)
    for position, group in enumerate(groups):
        count = len(group.runs)
        spread = 0.15 if count > 1 else 0
        values = scale(group.accuracies)
        axes.plot(position + np.linspace(-spread, spread, count), values, ".", color=color_of(group))
        axes.plot([], [], ".", color="0.4", label="one seed")
        if count > 1:
            axes.hlines(values.mean(), position - 0.3, position + 0.3, color=color_of(group))
            axes.plot([], [], color="0.4", label="mean of the seeds")
        if group.reported is not None:
            axes.plot(position, scale(group.reported), "kx", label="reference report")
    labels = [format_number(getattr(group.config, name)) for group in groups]
    stride = math.ceil(len(groups) / 30)  # more labels would overlap
    axes.set_xticks(range(0, len(groups), stride), labels[::stride], rotation=90 if len(groups) > 8 else 0)
    axes.set_xlabel(f"--{name.replace('_', '-')}")
    axes.margins(x=0.08)
    axes.grid(visible=False, axis="x")


def compare_setting(groups, name):
    """Return a Figure with the accuracy of every seed against one setting, a panel for each choice of the others."""
    families = families_of(usual_groups(groups, name), name)
    if not families:
        return None
    lowest = [min(group.mean for group in family) for family in families]
    highest = [max(group.mean for group in family) for family in families]
    largest = max(np.subtract(highest, lowest))
    flag = f"--{name.replace('_', '-')}"
    title = f"{flag} changes the test accuracy after epoch {groups[0].epoch} by up to {largest:.1f} points"
    sharey = max(highest) - min(lowest) < 20  # from 10 to 95 %, a difference of one point is invisible
    return draw_families(name, families, partial(draw_seeds, name=name), title, sharey=sharey)


def register_settings():
    """Register compare_setting for every setting whose values are comparable and that compare_memory does not show."""
    names = {}
    for config_class in CONFIGS.values():
        names.update((spec.name, spec.flag) for spec in config_class.specs())
    for name, flag in names.items():
        if name not in ("seed", "dataset", "rows_before", "rows_after", "keep_bias"):
            draw = partial(compare_setting, name=name)
            draw.__doc__ = f"Draw test accuracy against {flag}."
            comparison(name)(draw)


register_settings()


# Pictures of recurrent networks: blank rows and gradients -------------------------------------------------------------

MAJORITY_ACCURACY = 11.35  # percent of MNIST's test images show a 1, the most frequent digit
CHANCE_LEVEL = 15  # percent; a network above it has begun to learn


def first_epoch_above_chance(run, last=None):
    """Return the first epoch, up to last, with a test accuracy above CHANCE_LEVEL, infinity if there is none."""
    for row in run.history[:last]:
        if row["test_accuracy"] > CHANCE_LEVEL:
            return row["epoch"]
    return math.inf


@cache
def gradients_of(run):
    """Return parse_gradients of a run's table, empty where the gradients were not measured."""
    return parse_gradients(row.values() for row in read_table(run, "gradients"))


def initialization_label(keep_bias):
    """Return in words how a value of --keep-bias initialises a network."""
    if keep_bias is None:
        return "PyTorch's initialisation"
    share = 100 / (1 + math.exp(-keep_bias))
    return f"B = {format_number(keep_bias)}: each step keeps {share:.0f} % of the state at first"


def blank_rows(group):
    """Return how many blank rows the runs of a group read, before and after the digit."""
    return group.config.rows_before + group.config.rows_after


def memory_panels(groups):
    """Return the groups of each recurrent network, by its Config without blank rows and --keep-bias.

    Networks that were never trained with blank rows are left out.
    """
    panels = {}
    for group in groups:
        if is_recurrent(group.runs[0]):
            network = replace(group.config, rows_before=0, rows_after=0, keep_bias=None)
            panels.setdefault(network, []).append(group)
    chosen = {}
    for network in sorted(panels, key=setting_order):
        if any(blank_rows(group) for group in panels[network]):
            chosen[network] = panels[network]
    return chosen


def draw_memory(axes, groups, all_groups):
    """Draw a panel of compare_memory. all_groups: the groups of all panels, which have the same colours and x axis."""
    all_rows = sorted({blank_rows(group) for group in all_groups})
    biases = sorted({group.config.keep_bias for group in all_groups}, key=lambda bias: (bias is not None, bias))
    own_biases = {group.config.keep_bias for group in groups}
    step = 0.025 * all_rows[-1]  # between the dots of two initialisations
    half_width = step * (len(own_biases) + 1) / 2
    for rows in all_rows:  # the dots in a band belong to the same number of rows
        axes.axvspan(rows - half_width, rows + half_width, color="0.94", zorder=0)

    position = -step * (len(own_biases) - 1) / 2  # relative to the number of rows
    for bias, shade in zip(biases, shades(len(biases)), strict=True):
        color = ACCENT_COLOR if bias is None else shade
        axes.plot([], [], color=color, label=initialization_label(bias))
        members = [group for group in groups if group.config.keep_bias == bias]
        after = [group for group in members if not group.config.rows_before]
        axes.plot([group.config.rows_after + position for group in after], [group.mean for group in after], color=color)
        for group in members:
            fill = "none" if group.config.rows_before else color
            dots = {"marker": "o", "linestyle": "none", "markersize": 5, "markerfacecolor": fill, "alpha": 0.7}
            axes.plot([blank_rows(group) + position] * len(group.runs), group.accuracies, color=color, **dots)
        position += step if members else 0

    axes.plot([], [], "o", color="0.4", label="one seed, blank rows after the digit (line: mean)")
    if any(group.config.rows_before for group in groups):
        axes.plot([], [], "o", color="0.4", markerfacecolor="none", label="one seed, blank rows before the digit")
    if groups[0].config.dataset == "mnist" and not groups[0].source_suffix:
        axes.axhline(
            MAJORITY_ACCURACY, color="black", linewidth=0.8, linestyle=":", label='accuracy of always answering "1"'
        )
    axes.set_xticks(all_rows)
    axes.set(xlabel="blank rows", ylabel="test accuracy in %", ylim=(0, 102))


@comparison("memory")
def compare_memory(groups):
    """Draw test accuracy against the number of blank rows, a panel for each recurrent network and learning rate."""
    networks = memory_panels(groups)
    if not networks:
        return None
    labels, common = label_configs(list(networks))
    panels = []
    for label, members in zip(labels, networks.values(), strict=True):
        best = max(members, key=lambda group: (blank_rows(group), group.mean))
        start = initialization_label(best.config.keep_bias).partition(":")[0]
        panels.append((f"{label or common}\nbest at {blank_rows(best)} rows: {best.mean:.1f} % ({start})", members))

    draw = partial(draw_memory, all_groups=list(itertools.chain.from_iterable(networks.values())))
    title = f"Test accuracy after epoch {groups[0].epoch} with blank rows before or after the digit"
    title += f"\n{common}{groups[0].source_suffix}"
    return draw_panels("memory", panels, draw, title, sharey=True)


def mean_gradient(group, epoch):
    """Return the gradient norm after each row, the geometric mean over a group's runs, float64 (steps,)."""
    return np.exp(np.mean([np.log(gradients_of(run)[epoch]) for run in group.runs], axis=0))


def draw_gradients(axes, groups):
    """Draw a panel of compare_gradients, with its only group."""
    (group,) = groups
    for epoch, style, label in ((0, ":", "before training"), (group.epoch, "-", f"after epoch {group.epoch}")):
        norms = mean_gradient(group, epoch)
        axes.semilogy(range(1, len(norms) + 1), norms, linestyle=style, color=color_of(group))
        axes.plot([], [], linestyle=style, color="black", label=label)
    axes.set(xlabel="rows read", ylabel="norm of the loss gradient")


@comparison("gradients")
def compare_gradients(groups):
    """Draw the loss gradient after each row before and after training, a panel for each recurrent network.

    Where settings differ only in their cells, these are drawn, otherwise the first setting of each network.
    """
    epoch = groups[0].epoch
    measured = []
    for group in usual_groups([group for group in groups if is_recurrent(group.runs[0])]):
        runs = [run for run in group.runs if gradients_of(run).keys() >= {0, epoch}]
        if runs:
            measured.append(replace(group, runs=runs))
    if not measured:
        return None

    families = families_of(measured, "cell")
    chosen = {}
    for group in max(families, key=len) if families else measured:
        chosen.setdefault(group.config.network, group)
    panels = []
    for network, group in chosen.items():
        before = format_percent(gradient_reach(mean_gradient(group, 0)))
        after = format_percent(gradient_reach(mean_gradient(group, epoch)))
        panels.append((f"{network}: {after} reaches the first row\n(before training: {before})", [group]))
    _, common = label_groups(list(chosen.values()))
    title = f"How much of the loss gradient reaches the first row (geometric mean of the seeds)\n{common}"
    return draw_panels("gradients", panels, draw_gradients, title, sharey=True)


# Statistics: the permutation test of the difference of two means ------------------------------------------------------

ALPHA = 0.05  # the level of a one-sided test; two of them give the interval of 90 %
MAX_PERMUTATIONS = 200_000  # where there are more, as many random ones are drawn
HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"


@cache
def permutations(count, chosen=None):
    """Return the permutations of a test as weights, float64 (permutations, count); the first is the measured one.

    Without chosen: a sign, 1 or -1, for each of `count` pairs. With chosen: 1 for the `chosen` of `count` values that
    are in the first sample, 0 for the others.
    """
    random = np.random.default_rng(0)
    if chosen is None:
        if 2**count <= MAX_PERMUTATIONS:
            return np.array(list(itertools.product((1.0, -1.0), repeat=count)))
        return np.vstack([np.ones(count), random.choice((1.0, -1.0), (MAX_PERMUTATIONS, count))])
    if math.comb(count, chosen) <= MAX_PERMUTATIONS:
        members = np.array(list(itertools.combinations(range(count), chosen)))
        return (members[:, :, None] == np.arange(count)).any(1).astype(float)
    measured = np.repeat([1.0, 0.0], [chosen, count - chosen])
    return np.vstack([measured, random.permuted(np.tile(measured, (MAX_PERMUTATIONS, 1)), axis=1)])


def critical_differences(first, second, paired):
    """Return the critical difference of each permutation, float64 (permutations,).

    To test "the means differ by more than d", d is subtracted from the first values. The p-value is the share of the
    permutations in which the means then differ at least as much as in the measured values: those whose critical
    difference is not above d. For the measured values it is NaN, because they always count.

    first, second: one value for each seed. paired: flip the signs of pairs instead of shuffling all values.
    """
    first = np.asarray(first, dtype=float)
    second = np.asarray(second, dtype=float)
    if paired:
        weights = permutations(len(first))
        values = first - second
        is_first = np.ones(len(first))
    else:
        weights = permutations(len(first) + len(second), len(first))
        values = np.concatenate([first, second])
        is_first = np.repeat([1.0, 0.0], [len(first), len(second)])
    change = weights[0] - weights
    with np.errstate(invalid="ignore"):  # 0 / 0 for the measured values
        return (change @ values / (change @ is_first)).round(9)


def p_values(critical, difference):
    """Return the one-sided p-values of "the means differ by more" and "by less" than a difference.

    critical: what critical_differences returns.
    """
    return float((~(critical > difference)).mean()), float((~(critical < difference)).mean())


def confidence_interval(critical):
    """Return the lowest and the highest difference of means that no one-sided test at ALPHA rejects.

    They are infinite if there are too few permutations to reject any. critical: what critical_differences returns.
    """
    rejected = int(ALPHA * len(critical) + 1e-9)
    lowest = np.sort(np.nan_to_num(critical, nan=-math.inf))[rejected]
    highest = np.sort(np.nan_to_num(critical, nan=math.inf))[-1 - rejected]
    return float(lowest), float(highest)


def decimals_of(unit):
    """Return the number of decimals with which values are written: two, without a unit three."""
    return 2 if unit else 3


def format_signed(value, decimals=2):
    """Return a difference as text with its sign; one that is rounded to zero has none."""
    text = f"{abs(value):.{decimals}f}"
    if float(text) == 0:
        return text
    return f"-{text}" if value < 0 else f"+{text}"


@dataclass(frozen=True)
class Measurements:
    """What was measured of one setting. values: a dict with one value for each seed."""

    label: str
    values: dict

    def summary(self, unit="%"):
        """Return the label with mean, range and number of the values."""
        if not self.values:
            return f"{self.label} (not measured)"
        values = list(self.values.values())
        decimals = decimals_of(unit)
        mean = f"{np.mean(values):.{decimals}f} {unit}".strip()
        if len(values) == 1:
            return f"{self.label} {mean} (one seed)"
        value_range = f"{min(values):.{decimals}f} to {max(values):.{decimals}f}"
        return f"{self.label} {mean} ({value_range}, {len(values)} seeds)"


@dataclass(frozen=True)
class Comparison:
    """The result of a test; None stands for what was not measured.

    difference: of the means. interval: its 90 % interval (low, high), None if there are too few seeds for one.
    agreeing: in how many of the total seeds that both settings have the tested sentence is true. p: one-sided, of the
    sentence or of its opposite, whichever is smaller. unit: that of the values.
    """

    label: str
    verdict: str
    difference: float | None = None
    interval: tuple | None = None
    agreeing: int | None = None
    total: int | None = None
    p: float | None = None
    unit: str = "%"

    @property
    def difference_text(self):
        """The difference with its sign and unit, such as '+1.23 points', empty if there is none."""
        if self.difference is None:
            return ""
        unit = "points" if self.unit == "%" else self.unit
        return f"{format_signed(self.difference, decimals_of(unit))} {unit}".strip()

    @property
    def interval_text(self):
        """The interval, such as '+0.98 to +1.50', empty if there is none."""
        if self.interval is None:
            return ""
        low, high = (format_signed(end, decimals_of(self.unit)) for end in self.interval)
        return f"{low} to {high}"


def _compare(first, second, margin, unit, paired):
    """Return the Comparison that compare and compare_paired describe."""
    label = f"{first.summary(unit)} against {second.summary(unit)}"
    if paired:
        label += ", paired by seed"
    if margin:
        label += f", by more than {margin:g} {'points' if unit == '%' else unit}".rstrip()
    shared = [seed for seed in first.values if seed in second.values]
    first_values = np.array([first.values[seed] for seed in (shared if paired else first.values)])
    second_values = np.array([second.values[seed] for seed in (shared if paired else second.values)])
    if not len(first_values) or not len(second_values):
        return Comparison(label, UNMEASURED, unit=unit)

    critical = critical_differences(first_values, second_values, paired)
    low, high = confidence_interval(critical)
    verdict = UNDECIDED
    if low > margin:
        verdict = HOLDS
    elif high < margin:
        verdict = FAILS
    return Comparison(
        label,
        verdict,
        difference=float(first_values.mean() - second_values.mean()),
        interval=(low, high) if math.isfinite(low) else None,
        agreeing=sum(bool(first.values[seed] - second.values[seed] > margin) for seed in shared),
        total=len(shared),
        p=min(p_values(critical, margin)),
        unit=unit,
    )


def compare(first, second, margin=0.0, unit="%"):
    """Test whether the mean of the first Measurements is above that of the second by more than a margin.

    Returns a Comparison, which HOLDS if the interval lies above the margin and FAILS if it lies below.
    """
    return _compare(first, second, margin, unit, paired=False)


def compare_paired(first, second, margin=0.0, unit="%"):
    """Return what compare does, where runs of the same seed are pairs; seeds that only one setting has do not count."""
    return _compare(first, second, margin, unit, paired=True)


# Two settings, and the table of results -------------------------------------------------------------------------------


def starts_equal(first, second):
    """Return whether two runs begin with the same weights and see the same images in the same order.

    Weights that one of the networks holds at zero, as restricted gates do, are not compared.
    """
    for name in ("seed", "batch_size", "dataset"):
        if getattr(first.config, name) != getattr(second.config, name):
            return False
    first_weights, second_weights = (run.untrained_model().state_dict() for run in (first, second))
    if first_weights.keys() != second_weights.keys():
        return False
    for name, weights in first_weights.items():
        other_weights = second_weights[name]
        if weights.shape != other_weights.shape:
            return False
        is_compared = (weights != 0) & (other_weights != 0)
        if not torch.equal(weights[is_compared], other_weights[is_compared]):
            return False
    return True


def pooled_conditions(runs):
    """Return in words how runs differ in precision and device, such as 'precision (bf16, fp32)', '' if not at all."""
    differing = []
    for name in ("precision", "device"):
        values = sorted({getattr(run.conditions, name) for run in runs})
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(values)})")
    return " and ".join(differing)


def compare_two_settings(groups):
    """Return in words which of two groups has the higher mean, and whether its lead may be chance.

    Runs of the same seed are pairs if they start equal. p is doubled, because the direction is chosen from the data.
    """
    paired = any(starts_equal(*runs) for runs in itertools.product(groups[0].runs, groups[1].runs))
    shared_seeds = {run.config.seed for run in groups[0].runs} & {run.config.seed for run in groups[1].runs}
    measurements = []
    for group, label in zip(groups, label_groups(groups)[0], strict=True):
        runs = [run for run in group.runs if run.config.seed in shared_seeds or not paired]
        values = {run.config.seed: run.test_accuracy(group.epoch) for run in runs}
        measurements.append(Measurements(label, values))
    measurements.sort(key=lambda measured: np.mean(list(measured.values.values())), reverse=True)
    first, second = measurements

    result = compare_paired(first, second) if paired else compare(first, second)
    seeds = result.total if paired else min(len(first.values), len(second.values))

    facts = [f"difference {result.difference_text}"]
    if result.total > 1:
        facts.append(f"higher in {result.agreeing} of {result.total} seeds")
    if seeds == 1 or result.interval is None:
        count = ("one seed", "two seeds", "three seeds", "four seeds")[seeds - 1]
        verdict = f"{count} cannot decide; add --seed 0 1 2 3 4"
    else:
        p = min(1.0, 2 * result.p)
        facts.append(f"p = {p:.4f} (two-sided permutation test)")
        facts.append(f"90 % interval {result.interval_text}")
        is_decided = result.verdict == HOLDS
        verdict = f"{first.label} is better" if is_decided else "undecided, because the interval contains 0"
    text = f"{result.label}: {', '.join(facts)}; {verdict}."
    pooled = pooled_conditions(groups[0].runs + groups[1].runs)
    return f"{text} The runs differ in {pooled}." if pooled else text


@comparison("results")
def results(groups):
    """Write results.csv and results.md: the accuracy of each setting and, for two settings, which is better."""
    rows = [utils.result_row(group.runs, group.epoch, REPORT) for group in groups]
    head = f"Test accuracy in percent after epoch {groups[0].epoch}: mean, range and standard deviation over the seeds."
    texts = ["# Results", head, utils.markdown_table(utils.RESULT_COLUMNS, rows)]
    pooling = [group for group in groups if pooled_conditions(group.runs)]
    if pooling:
        runs = list(itertools.chain.from_iterable(group.runs for group in pooling))
        texts.append(f"In {len(pooling)} of {len(groups)} settings the runs differ in {pooled_conditions(runs)}.")
    if len(groups) == 2:
        texts.append(compare_two_settings(groups))
        print_line(texts[-1])
    return {"results.csv": format_table(utils.RESULT_COLUMNS, rows), "results.md": "\n\n".join(texts) + "\n"}


# Command line ---------------------------------------------------------------------------------------------------------


def skip(folder, error):
    """Print that a folder is skipped, and why."""
    _, message = utils.describe_error(error)
    reason = message.removeprefix("error: ").removeprefix(f"{folder} ")
    print_line(f"skipping {folder}: {reason}")


def open_run(folder, data_dir):
    """Return the SavedRun in a folder. Raises InputError if it cannot be read or has not finished an epoch."""
    run = SavedRun(folder, data_dir)
    if run.epoch == 0:
        raise InputError(f"{folder} has not finished an epoch; train it with {run.command}")
    if folder.name not in (run.config.name, f"synthetic_{run.config.name}"):
        print_line(f"{folder}: the folder's name differs from its config.json: {run.config.name}")
    return run


def find_runs(folder, data_dir):
    """Return the SavedRuns in a folder: its own run or, if it has none, the runs below it. Links are followed.

    Runs below it that cannot be used, and folders named reference, are skipped with a message. Raises InputError if no
    run is left.
    """
    training = utils.shell_command("python", "rnn_mnist.py")
    if (folder / "config.json").exists():
        return [open_run(folder, data_dir)]
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; train a run with {training}")

    runs = []
    references = []
    visited = set()
    walk = os.walk(folder, onerror=lambda error: skip(error.filename, error), followlinks=True)
    for parent, subfolders, files in walk:
        real_path = os.path.realpath(parent)
        if real_path in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(real_path)
        if "reference" in subfolders:
            subfolders.remove("reference")
            references.append(Path(parent, "reference"))
        if "config.json" in files + subfolders:
            try:
                runs.append(open_run(Path(parent), data_dir))
            except (InputError, OSError) as error:
                skip(parent, error)
        subfolders.sort()
    if runs:
        for reference in references:
            print_line(f"skipping {reference}: name it to compare its runs")
        return runs

    message = f"{folder} holds no finished run; train one with {training}"
    if references:
        command = utils.shell_command("python", "visualize.py", references[0])
        message += f", or compare the shipped runs with {command}"
    raise InputError(message)


def find_all_runs(folders, data_dir):
    """Return the SavedRuns in several folders, each once. A folder without runs is skipped with a message.

    Raises InputError if no run is left.
    """
    runs = {}
    for folder in folders:
        try:
            for run in find_runs(folder, data_dir):
                runs.setdefault(run.folder.resolve(), run)
        except (InputError, OSError) as error:
            if len(folders) == 1:
                raise
            skip(folder, error)
    if not runs:
        raise InputError("none of the named folders holds a finished run")
    return list(runs.values())


def draw_all(figures, names, subject, label, folder):
    """Draw figures into a folder; one that cannot be drawn is reported, and the others are drawn.

    figures: functions of a subject by name. names: those to draw, None for all. label: what the subject is called.
    Returns the names of the files that were written, and an exit status for each figure, 0 if it was drawn.
    """
    for name in names or []:
        if name not in figures:
            raise InputError(f"{label} has no figure {name}; it has {', '.join(figures)}")

    written = []
    statuses = []
    bar = tqdm(dict.fromkeys(names or figures), unit="figure", leave=False, disable=None)
    for name in bar:
        bar.set_description(name)
        status = 0
        try:
            outputs = figures[name](subject)
            if outputs is not None:
                written += save_outputs(name, outputs, folder)
            elif names:
                raise InputError("there is nothing to draw")
        except utils.FAILURES as error:
            status, message = utils.describe_error(error)
            print_line(f"could not draw {name} of {label}: {message.removeprefix('error: ')}", sys.stderr)
        statuses.append(status)
    return written, statuses


def draw_run(run, names, output_dir):
    """Draw the figures of one run; names: those to draw, None for all. Returns the statuses of draw_all.

    Raises InputError before it draws anything if a figure needs the checkpoint and there is none.
    """
    fitting = {name: spec for name, spec in FIGURES.items() if spec.fits(run)}
    if any(spec.needs_checkpoint for name, spec in fitting.items() if not names or name in names):
        run.load()
    figures = {name: spec.draw for name, spec in fitting.items()}
    _, statuses = draw_all(figures, names, run, run.folder, output_dir)
    return statuses


def draw_comparison(runs, names, output_dir):
    """Draw the comparison of runs; names: the figures to draw, None for all. Returns the statuses of draw_all.

    Runs on synthetic data beside runs on real data are compared in a subfolder. When all figures are drawn, files that
    an earlier comparison wrote and this one does not are removed.
    """
    all_statuses = []
    suffixes = sorted({run.source_suffix for run in runs})  # that of real data is empty
    for suffix in suffixes:
        groups = group_runs([run for run in runs if run.source_suffix == suffix])
        folder = output_dir / "synthetic" if suffix and len(suffixes) > 1 else output_dir
        written, statuses = draw_all(COMPARISONS, names, groups, "the comparison", folder)
        all_statuses += statuses
        if not names and not any(statuses):
            remove_outputs(folder, keep=written)
    if not names and len(suffixes) == 1:
        remove_outputs(output_dir / "synthetic")
    return all_statuses


def comparison_folder(folders, runs):
    """Return where the comparison of folders goes: FOLDER/comparison, or beside the first run if there are several."""
    parent = folders[0]
    if len(folders) > 1:
        parent = Path(os.path.abspath(runs[0].folder)).parent
        if parent.name == runs[0].config.script:
            parent = parent.parent
    return parent / "comparison"


def parse_command_line():
    """Return the parsed command line, with each of its folders once. Its help lists all figures."""
    draw_functions = {name: spec.draw for name, spec in FIGURES.items()}
    lines = [__doc__ or ""]
    for head, functions in (("Figures of one run:", draw_functions), ("\nFigures of several runs:", COMPARISONS)):
        lines += [head, *[f"    {name:14} {(draw.__doc__ or ' ').splitlines()[0]}" for name, draw in functions.items()]]
    parser = utils.Parser("\n".join(lines))
    flag = parser.add_argument
    flag("folders", nargs="+", type=utils.parse_folder, metavar="RUN", help="folder of a run, or of several runs")
    flag("--figures", nargs="+", choices=tuple(draw_functions | COMPARISONS), metavar="NAME", help="default: all")
    output_help = "directory of the figures (default: RUN/figures, for several runs FOLDER/comparison)"
    flag("--output-dir", type=utils.parse_folder, help=output_help)
    flag("--data-dir", type=utils.parse_folder, default="data", help="directory of the data sets (default: data)")
    args = parser.parse_args()

    unique = {}
    for path in args.folders:
        is_pattern = not path.exists() and any(mark in str(path) for mark in "*?")  # Windows shells leave these alone
        matches = [Path(match) for match in sorted(glob.glob(str(path)))] if is_pattern else []
        for folder in matches or [path]:
            unique.setdefault(folder.resolve(), folder)
    args.folders = list(unique.values())
    return args


def run():
    """Draw what the command line asks for. Raises InputError or TrainingError if a figure could not be drawn."""
    args = parse_command_line()
    runs = find_all_runs(args.folders, args.data_dir)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        if args.folders == [runs[0].folder]:
            statuses = draw_run(runs[0], args.figures, args.output_dir or runs[0].folder / "figures")
        else:
            output_dir = args.output_dir or comparison_folder(args.folders, runs)
            statuses = draw_comparison(runs, args.figures, output_dir)
    if any(statuses):
        failures = len(statuses) - statuses.count(0)
        message = f"{failures} of {len(statuses)} figures could not be drawn, for the reasons given above"
        raise utils.TrainingError(message) if 1 in statuses else InputError(message)


def main():
    utils.run_main(run, on_interrupt="finished figures are kept; the same command draws all figures")


if __name__ == "__main__":
    main()
