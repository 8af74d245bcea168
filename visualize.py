"""Draw what trained networks have learned, from the folders of their runs.

    python visualize.py runs/cnn_cifar10/NAME                      draw all figures of a run into its figures/
    python visualize.py runs/cnn_cifar10/NAME --figures filters    draw only the named figures
    python visualize.py runs                                       compare all runs, in runs/comparison/

The figures of convolutional networks follow Zeiler & Fergus (2013), arXiv:1311.2901, "the paper" below.
"""

# In this file images are uint8 (N, H, W), gray values from 0 to 255; labels are int64 (N,); feature maps are float32
# (N, C, H, W); accuracies are in percent; a run is a SavedRun. Figures, sections and tables are those of the paper.

import csv
import glob
import io
import itertools
import json
import logging
import math
import os
import sys
import textwrap
from collections import namedtuple
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils
from utils import METRIC_COLUMNS, REPORT_EPOCHS, InputError, format_number, predict, print_line

if __name__ == "__main__":  # a user's matplotlib settings are meant for other figures, and may be out of date
    os.environ["MPLBACKEND"] = "agg"
    logging.disable(logging.WARNING)

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import nn

CONFIGS = {script.Config.script: script.Config for script in (cnn_cifar10, rnn_mnist)}
REPORT = cnn_cifar10.REPORT + rnn_mnist.REPORT
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "savefig.dpi": 160,
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
        path = folder / "config.json"
        try:
            record = json.loads(path.read_bytes())
            self.config = utils.restore_config(CONFIGS[record["script"]], record["settings"])
            self.conditions = SimpleNamespace(**record["conditions"])
        except (InputError, ValueError, LookupError, TypeError) as error:
            raise InputError(f"{path} does not fit this version of the project ({str(error)[:100]})") from None

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
        flags = [f"{spec.flag}={format_number(value)}" for spec, value in self.config.items() if value != spec.default]
        if self.source_suffix:
            flags.append("--data=synthetic")
        return utils.shell_command("python", f"{self.config.script}.py", *flags)

    @cached_property
    def history(self):
        """The metrics of each finished epoch, list of dict: from metrics.csv or, if it is damaged, the checkpoint."""
        path = self.folder / "metrics.csv"
        try:
            rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
            return [{name: float(row[name]) for name in METRIC_COLUMNS} for row in rows]
        except FileNotFoundError:
            return []
        except (LookupError, ValueError, TypeError, csv.Error):
            if checkpoint := utils.read_checkpoint(self.folder):
                return checkpoint["history"]
            raise InputError(f"{path} is damaged, and there is no checkpoint.pt") from None

    @property
    def epoch(self):
        """The last finished epoch."""
        return len(self.history)

    def test_accuracy(self, epoch=REPORT_EPOCHS):
        """Return the test accuracy after an epoch, or None if the run is shorter."""
        return self.history[epoch - 1]["test_accuracy"] if epoch <= self.epoch else None

    @cached_property
    def model(self):
        """The trained network. Loading it replaces the history, so that both come from the same checkpoint."""
        checkpoint = utils.read_checkpoint(self.folder)
        if checkpoint is None:
            reason = "holds no checkpoint.pt (the networks of runs/reference are not shipped)"
            raise InputError(f"{self.folder} {reason}; train the run with {self.command} and pass its folder")
        model = self.untrained_model()
        utils.load_state(self.folder / "checkpoint.pt", checkpoint["state"], {"model": model})
        self.history = checkpoint["history"]
        return model

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
        """Return the network after an epoch, from its snapshot (a CNN's has only convolutions) or, for 0, the seed."""
        model = self.untrained_model()
        if epoch > 0:
            path = self._snapshot_path(epoch)
            weights = model.state_dict() | utils.load_tensors(path)
            utils.load_state(path, {"model": weights}, {"model": model})
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
        return utils.load_data(self.config.dataset, self.conditions.data_source, self.data_dir, self.config.pixels)

    @cached_property
    def probabilities(self):
        """The class probabilities of the test images, float32 (N, classes), in the precision of training."""
        return predict(self.model, self.data.test.images).softmax(dim=1)


def is_recurrent(run):
    """Return whether the run's network is recurrent."""
    return isinstance(run.config, rnn_mnist.Config)


def has_convolutions(run):
    """Return whether the run's network is a CNN that was trained with all its convolutions."""
    return not is_recurrent(run) and "conv" not in run.config.without


# Files of figures and tables ------------------------------------------------------------------------------------------


def save_outputs(outputs, folder):
    """Write outputs, a dict of Figures and texts by file name, into a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, output in outputs.items():
        content = io.BytesIO()
        if isinstance(output, Figure):
            output.savefig(content, format="png")
        else:
            content.write(output.encode())
        utils.write_atomically(folder / name, content.getvalue())
        print_line(folder / name)


def format_table(rows):
    """Return rows, a list of dict, as CSV text; floats have seven significant digits."""
    formatted = []
    for row in rows:
        formatted.append([f"{cell:.7g}" if isinstance(cell, float) else cell for cell in row.values()])
    return utils.format_csv(rows[0].keys(), formatted)


def parse_table(text):
    """Return the rows of a table, list of dict of str; [] if the text is damaged or cut off."""
    rows = list(csv.DictReader(io.StringIO(text)))
    for row in rows:
        has_all_cells = None not in row and None not in row.values()  # DictReader marks both faults with None
        if not (has_all_cells and row.get("epoch", "").isdecimal()):
            return []
    return rows if text.endswith("\n") else []


@cache
def read_table(run, name):
    """Return the rows of a run's table figures/NAME.csv, list of dict of str; [] if it has none.

    A table that is missing, damaged or not from the last epoch is measured again if there is a checkpoint.
    """
    path = run.folder / "figures" / f"{name}.csv"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    rows = parse_table(text)
    if rows and max(int(row["epoch"]) for row in rows) == run.epoch:
        return rows
    if not (run.folder / "checkpoint.pt").exists():
        if path.exists():
            print_line(f"skipping {path}: damaged or not from epoch {run.epoch}, with no checkpoint.pt")
        return []
    try:
        _ = run.model  # loads the history of the same checkpoint
        text = format_table(FIGURES[name].measure(run))
    except (InputError, OSError) as error:
        print_line(f"could not compute {name} for {run.folder}: {error}")
        return []
    with suppress(OSError):  # in a folder that cannot be written, measure it again the next time
        save_outputs({path.name: text}, path.parent)
    return parse_table(text)


# Figures of any run ---------------------------------------------------------------------------------------------------


def curves(run):
    """Draw accuracy and loss by epoch. The title says "overfitting" if the test loss ends 10 % above its minimum."""
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
    last = run.history[-1]
    title = f"Test accuracy is {last['test_accuracy']:.2f} % after epoch {run.epoch}"
    title += f" (training: {last['train_accuracy']:.2f} %)"
    best = min(run.history, key=lambda row: row["test_loss"])
    if last["test_loss"] > 1.1 * best["test_loss"] and last["train_loss"] < best["train_loss"]:
        title += f"; overfitting after epoch {best['epoch']:.0f}"
    return titled(fig, title, run)


def confusion(run):
    """Draw the confusion matrix of the test images, with the accuracy of each class."""
    classes = run.data.classes
    counts = np.zeros((len(classes), len(classes)), dtype=int)
    np.add.at(counts, (run.data.test.labels.numpy(), run.probabilities.argmax(1).numpy()), 1)
    errors = np.ma.masked_array(counts, np.eye(len(classes), dtype=bool))
    accuracies = 100 * counts.diagonal() / counts.sum(1).clip(1)
    fig = Figure(figsize=(FIGURE_WIDTH, 5))
    axes = fig.subplots()
    colors = matplotlib.colormaps["Oranges"].with_extremes(bad="#d6e6f2")  # tints the diagonal
    axes.imshow(errors, cmap=colors, vmin=0, vmax=1.5 * errors.max(), aspect="auto")  # dark colours would hide numbers
    for (row, column), count in np.ndenumerate(counts):
        axes.text(column, row, count, ha="center", va="center")
    axes.set_xticks(range(len(classes)), classes, fontsize=8)
    names = [f"{name}: {accuracy:.1f} %" for name, accuracy in zip(classes, accuracies, strict=True)]
    axes.set_yticks(range(len(classes)), names)
    axes.set(xlabel="predicted class", ylabel="true class and its accuracy")

    title = f"Test accuracy is {100 * counts.diagonal().sum() / counts.sum():.2f} %"
    if errors.any():
        true, predicted = np.unravel_index(errors.argmax(), errors.shape)
        error = f"{classes[true]} predicted as {classes[predicted]}"
        title += f"; the most frequent error is {error} ({errors.max()} images)"
    return titled(fig, title, run)


def titled(fig, title, run):
    """Return a Figure after setting its title: the result, and below it the settings of the run."""
    fig.suptitle(f"{title}\n{run.title}", wrap=True)
    return fig


def draw_mosaic(axes, images, titles, columns, gap, room=0, vmin=None, vmax=None):
    """Draw images, float (N, H, W), in gray on one axes, row by row, with a title above each.

    columns: images per row; gap: empty pixels around each image; room: more of them above it, for the title.
    NaNs and empty pixels are tinted. Returns matplotlib's image, and the first pixel of each row and column of images.
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
    axes.set(xticks=[], yticks=[], anchor="N", frame_on=False)
    axes.tick_params(length=0)
    return axes.imshow(mosaic, cmap=GRAY_COLORMAP, vmin=vmin, vmax=vmax), tops, lefts


# Linear probes: linear classifiers on the features of a network (Table 7) ---------------------------------------------

RIDGE_PENALTIES = (0.01, 0.1, 1.0)
RIDGE_IMAGES = 5000  # number of training images that a probe is given


def ridge_classifiers(features, labels, classes, penalties):
    """Fit linear classifiers to features (N, D) by ridge regression on one-hot labels, one for each penalty.

    A penalty is on the squared weights but not the bias, in multiples of the features' mean sum of squared deviations.
    Returns a list of (weights, bias), float32 (D, classes) and (classes,).
    """
    targets = F.one_hot(labels, classes).float()
    feature_mean = features.mean(0)
    target_mean = targets.mean(0)
    centered = features - feature_mean
    is_dual = features.shape[1] > len(features)  # then the system of the images is the smaller one
    if is_dual:
        products = centered @ centered.T
        right_side = targets - target_mean
    else:
        products = centered.T @ centered
        right_side = centered.T @ (targets - target_mean)
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
    """Return the accuracy of a linear classifier (weights, bias) on features (N, D)."""
    weights, bias = classifier
    predicted = (features @ weights + bias).argmax(1)
    return 100 * (predicted == labels).double().mean().item()


def linear_probe_accuracy(features, labels, test_features, test_labels, classes):
    """Return the test accuracy of a ridge classifier on features (N, D). A fifth of them selects the penalty."""
    fitted = len(features) * 4 // 5
    classifiers = ridge_classifiers(features[:fitted], labels[:fitted], classes, RIDGE_PENALTIES)
    accuracies = [classifier_accuracy(each, features[fitted:], labels[fitted:]) for each in classifiers]
    best = classifiers[accuracies.index(max(accuracies))]
    return classifier_accuracy(best, test_features, test_labels)


# Figures of a convolutional network -----------------------------------------------------------------------------------


def convolution_names(model):
    """Return the names of the network's convolutions in order."""
    return [name for name, layer in model.layers.named_children() if isinstance(layer, nn.Conv2d)]


def first_kernels(model):
    """Return the kernels of the first convolution, float32 (maps, height, width)."""
    return getattr(model.layers, convolution_names(model)[0]).weight.detach()[:, 0].float()


def filters(run):
    """Draw the kernels of the first convolution before and after training."""
    kernels = {"untrained": first_kernels(run.untrained_model()), "trained": first_kernels(run.model)}
    fig = Figure(figsize=(FIGURE_WIDTH, 3.6))
    axes_pair = fig.subplots(2, 1)
    for axes, (state, weights) in zip(axes_pair, kernels.items(), strict=True):
        scaled = weights / weights.abs().amax((1, 2), keepdim=True).clamp(min=1e-12)
        image, _, _ = draw_mosaic(axes, scaled, range(len(weights)), columns=16, gap=1, room=2, vmin=-1, vmax=1)
        axes.set_title(state)
    fig.colorbar(image, ax=axes_pair, label="weight (one scale per kernel)", ticks=[-1, 0, 1], shrink=0.6)
    norms = kernels["untrained"].flatten(1).norm(dim=1)
    changes = 100 * (kernels["trained"] - kernels["untrained"]).flatten(1).norm(dim=1) / norms
    title = f"Training changed the median kernel of the first layer by {changes.median():.0f} % of its initial norm"
    return titled(fig, title, run)


@torch.inference_mode()
def measure_activations(run, batch_size=250):
    """Return the rows of activations.csv: statistics of each feature map after ReLU over the test images."""
    images = run.data.test.images
    totals = {}  # sums of the images' means, float64 (3, maps), by layer
    for batch in images.split(batch_size):
        outputs = run.model.outputs(batch)
        for layer in convolution_names(run.model):
            maps = F.relu(outputs[layer].float())
            means = [values.mean((2, 3)) for values in (maps, maps.square(), (maps == 0).float())]
            totals[layer] = totals.get(layer, 0) + torch.stack(means).double().sum(1)
    rows = []
    for layer, total in totals.items():
        for number, (mean, square, zeros) in enumerate((total / len(images)).T.tolist()):
            statistics = {"mean": mean, "std": math.sqrt(max(0, square - mean**2)), "zeros_percent": 100 * zeros}
            rows.append({"epoch": run.epoch, "layer": layer, "feature_map": number, **statistics})
    return rows


def activations(run, rows):
    """Draw mean, standard deviation and share of zeros of each feature map over the test images."""
    labels = {"mean": "mean", "std": "standard deviation", "zeros_percent": "zeros in %"}
    layers = list(dict.fromkeys(row["layer"] for row in rows))
    fig = Figure(figsize=(FIGURE_WIDTH, 2.4 * len(layers)))
    dead = []
    for layer, panels in zip(layers, fig.subplots(len(layers), 3, squeeze=False), strict=True):
        maps = sorted([row for row in rows if row["layer"] == layer], key=itemgetter("mean"), reverse=True)
        for axes, (name, label) in zip(panels, labels.items(), strict=True):
            axes.bar(range(len(maps)), [row[name] for row in maps], color=AFTER_COLOR)
            axes.set(title=f"{layer} after ReLU: {label}", xlabel="feature maps, ranked by mean")
        dead.append(f"{sum(row['zeros_percent'] > 99 for row in maps)} of {len(maps)} in {layer}")
    return titled(fig, f"Dead feature maps (over 99 % zero on the test images): {' and '.join(dead)}", run)


@torch.inference_mode()
def layer_features(model, images, batch_size=500):
    """Return the pixels, and the output of each ReLU under the name of the layer before it, float32 (N, D) by name."""
    collected = {"pixels": [images.flatten(1).float() / 255]}
    for batch in images.split(batch_size):
        previous = None
        for name, output in model.outputs(batch).items():
            if isinstance(getattr(model.layers, name), nn.ReLU):
                collected.setdefault(previous, []).append(output.float().flatten(1))
            previous = name
    return {name: torch.cat(batches) for name, batches in collected.items()}


def measure_layers(run):
    """Return the rows of layers.csv: the accuracy of a linear classifier on each layer of two networks."""
    test = run.data.test
    train_images = run.data.train.images[:RIDGE_IMAGES]
    train_labels = run.data.train.labels[:RIDGE_IMAGES]
    classes = len(run.data.classes)
    rows = []
    for network, model in (("trained", run.model), ("untrained", run.untrained_model())):
        test_features = layer_features(model, test.images)
        for layer, features in layer_features(model, train_images).items():
            accuracy = linear_probe_accuracy(features, train_labels, test_features[layer], test.labels, classes)
            rows.append({"epoch": run.epoch, "network": network, "layer": layer, "accuracy": accuracy})
    return rows


def layers(run, rows):
    """Draw the accuracy of a linear classifier on each layer, before and after training (Table 7)."""
    fig = Figure(figsize=(FIGURE_WIDTH, 3.6))
    axes = fig.subplots()
    axes.axhline(run.test_accuracy(run.epoch), color=ACCENT_COLOR, linestyle="--", label="trained network")
    for network, color in (("trained", AFTER_COLOR), ("untrained", BEFORE_COLOR)):
        names = [row["layer"] for row in rows if row["network"] == network]
        accuracies = [row["accuracy"] for row in rows if row["network"] == network]
        axes.plot(names, accuracies, "o-", color=color, label=f"linear classifiers, {network} network")
    axes.set(xlabel="input of the linear classifier", ylabel="test accuracy in %", ylim=(0, 100))
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower right")
    reached = [f"{row['accuracy']:.0f} % on {row['layer']}" for row in rows if row["network"] == "trained"]
    return titled(fig, f"After training, linear classifiers reach {', '.join(reached)}", run)


# The deconvolutional network of Zeiler & Fergus (2013), section 2.1 ---------------------------------------------------


def project_back(model, outputs, layer, maps):
    """Project activations (N, C, H, W) of a layer back to pixels, float32 (N, 1, H, W), as in the paper.

    outputs: the output of each layer by name, from model.outputs. maps: zero except for the activations to explain.
    Going backwards, each pooling is undone with its switches (the positions of the maxima), and each convolution by
    ReLU and the transposed convolution. No biases are added, and the resulting pixels are not rectified.
    """
    names = list(outputs)
    for place in reversed(range(names.index(layer) + 1)):
        module = model.layers[place]
        if isinstance(module, nn.MaxPool2d):
            rectified = F.relu(outputs[names[place - 1]].float())  # before pooling, as in the paper
            _, switches = F.max_pool2d(rectified, module.kernel_size, module.stride, return_indices=True)
            size = rectified.shape[2:]
            maps = F.max_unpool2d(maps, switches, module.kernel_size, module.stride, output_size=size)
        elif isinstance(module, nn.Conv2d):
            maps = F.conv_transpose2d(F.relu(maps), module.weight, stride=module.stride, padding=module.padding)
    return maps


@torch.inference_mode()
def deconvolve(model, images, layer, feature_maps):
    """Project the strongest activation of map feature_maps[n] in image n back to pixels, float32 (N, 1, H, W)."""
    outputs = model.outputs(images)
    maps = F.relu(outputs[layer].float())
    numbers = torch.arange(len(images))
    values, positions = maps[numbers, feature_maps].flatten(1).max(1)
    strongest = torch.zeros(maps.shape)
    strongest.flatten(2)[numbers, feature_maps, positions] = values
    return project_back(model, outputs, layer, strongest)


# What activates each feature map of a layer most, the strongest first, all (count, C): the activations, float32, the
# numbers of the images, and the position of the activation in the feature map, int64.
TopActivations = namedtuple("TopActivations", "values images rows columns")


@torch.inference_mode()
def top_activations(model, images, layer, count, batch_size=250):
    """Return the TopActivations of a layer. Each image counts once per feature map."""
    maxima = []
    positions = []
    for batch in images.split(batch_size):
        maps = F.relu(model.outputs(batch)[layer].float())
        batch_maxima, batch_positions = maps.flatten(2).max(2)
        maxima.append(batch_maxima)
        positions.append(batch_positions)
    values, numbers = torch.cat(maxima).topk(count, dim=0)
    top_positions = torch.cat(positions).gather(0, numbers)
    width = maps.shape[3]
    return TopActivations(values, numbers, top_positions // width, top_positions % width)


def receptive_field(model, layer):
    """Return the receptive field of a layer's units, along each axis, as (size, stride, offset) in pixels.

    Unit i sees `size` pixels, and the first of them is offset + stride * i.
    """
    size, stride, offset = 1, 1, 0
    for name, module in model.layers.named_children():
        if isinstance(module, nn.Conv2d):
            offset -= module.padding[0] * stride
            size += (module.kernel_size[0] - 1) * stride
            stride *= module.stride[0]
        elif isinstance(module, nn.MaxPool2d):
            size += (module.kernel_size - 1) * stride
            stride *= module.stride
        if name == layer:
            break
    return size, stride, offset


def cut_patches(model, layer, images, rows, columns):
    """Cut the receptive field of the unit at rows[n], columns[n] out of image n, float32 (N, size, size), or NaN."""
    size, stride, offset = receptive_field(model, layer)
    padded = F.pad(images.float(), (size, size, size, size), value=math.nan)
    patches = []
    for image, row, column in zip(padded, rows.tolist(), columns.tolist(), strict=True):
        top = size + offset + stride * row
        left = size + offset + stride * column
        patches.append(image[top : top + size, left : left + size])
    return torch.stack(patches)


def top_patches(model, layer, images, top, feature_maps):
    """Return what activates M feature maps most: reconstructions and image patches, each (M, count, size, size)."""
    count = len(top.images)
    _, numbers, rows, columns = [field[:, feature_maps].T.flatten() for field in top]  # map by map
    chosen = images[numbers]
    projections = deconvolve(model, chosen, layer, feature_maps.repeat_interleave(count)).squeeze(1)
    reconstructions = cut_patches(model, layer, projections, rows, columns)
    patches = cut_patches(model, layer, chosen, rows, columns)
    return reconstructions.unflatten(0, (-1, count)), patches.unflatten(0, (-1, count))


def pattern_similarity(reconstructions):
    """Return the mean cosine of reconstructions (M, count, size, size) to the first of their map, and between maps."""
    vectors = reconstructions.nan_to_num().flatten(2)
    within = F.cosine_similarity(vectors[:, 1:], vectors[:, :1], dim=2).mean()
    cosines = F.cosine_similarity(vectors[None, :, 0], vectors[:, None, 0], dim=2)
    between = cosines[~torch.eye(len(cosines), dtype=torch.bool)].mean()
    return within.item(), between.item()


def deconv(run):
    """Draw what activates maps of the last convolution most: reconstructions beside image patches (Fig. 2)."""
    from torchvision.utils import make_grid

    images = run.data.test.images
    layer = convolution_names(run.model)[-1]
    top = top_activations(run.model, images, layer, count=9)
    maps = top.values[0].topk(16).indices.sort().values  # the most active ones
    reconstructions, patches = top_patches(run.model, layer, images, top, maps)
    limits = reconstructions.abs().flatten(1).nanquantile(0.995, dim=1).clamp(min=1e-12)
    brightness = 0.5 + 0.5 * reconstructions / limits[:, None, None, None]
    blocks = []
    for left, right in zip(brightness, patches / 255, strict=True):
        halves = [make_grid(half[:, None], nrow=3, padding=1, pad_value=math.nan)[0] for half in (left, right)]
        blocks.append(torch.cat(halves, dim=1))
    fig = Figure(figsize=(FIGURE_WIDTH, 5.45))
    axes = fig.subplots()
    titles = [f"map {number}" for number in maps]
    draw_mosaic(axes, torch.stack(blocks), titles, columns=4, gap=4, room=7, vmin=0, vmax=1)
    axes.set_xlabel("left: reconstructions (gray: zero; one scale per map); right: patches (tinted: outside the image)")
    within, between = pattern_similarity(reconstructions)
    verdict = "more alike" if within > between else "no more alike"
    numbers = f"within a map (mean cosine {within:.2f}) than between maps ({between:.2f})"
    return titled(fig, f"Reconstructions of {layer} are {verdict} {numbers}", run)


def evolution(run):
    """Draw how the strongest reconstruction of some feature maps develops during training (Fig. 4)."""
    images = run.data.test.images
    layer = convolution_names(run.model)[-1]
    epochs = [epoch for epoch in (0, 1, 2, 5) if epoch in {0, *run.snapshot_epochs} and epoch < run.epoch]
    models = [run.model_after(epoch) for epoch in epochs] + [run.model]
    epochs.append(run.epoch)
    tops = [top_activations(model, images, layer, count=1) for model in models]
    maps = tops[-1].values[0].topk(8).indices.sort().values  # the most active ones of the trained network
    strongest = []
    for model, top in zip(models, tops, strict=True):
        strongest.append(top_patches(model, layer, images, top, maps)[0][:, 0])
    reconstructions = torch.stack(strongest)
    vectors = reconstructions.nan_to_num().flatten(2)
    cosines = F.cosine_similarity(vectors, vectors[-1:], dim=2).mean(1).tolist()
    fig = Figure(figsize=(FIGURE_WIDTH, 0.9 * len(epochs) + 0.9))
    axes = fig.subplots()
    limits = vectors.abs().amax(2).clamp(min=1e-12)
    pictures = (reconstructions / limits[:, :, None, None]).flatten(0, 1)  # epoch by epoch
    _, tops, lefts = draw_mosaic(axes, pictures, [], columns=len(maps), gap=2, vmin=-1, vmax=1)
    center = reconstructions.shape[-1] / 2 - 0.5
    axes.set_xticks([left + center for left in lefts], [f"map {number}" for number in maps])
    names = [f"{epoch} ({cosine:.2f})" for epoch, cosine in zip(epochs, cosines, strict=True)]
    axes.set_yticks([top + center for top in tops], names)
    axes.set_ylabel("epoch (cosine to the last)")
    numbers = f"{cosines[0]:.2f} before training and {cosines[1]:.2f} after epoch {epochs[1]}"
    return titled(fig, f"Reconstructions of {layer} have a mean cosine to the final ones of {numbers}", run)


# Invariance and occlusion, after Zeiler & Fergus (2013), and Gabor functions ------------------------------------------

# The amounts of Fig. 5. Positive shifts move the image down, and positive angles turn it counterclockwise.
TRANSFORMATIONS = {
    "vertical shift in pixels": torch.arange(-8, 9),
    "scale": torch.linspace(1, 1.8, 17),
    "rotation in degrees": torch.arange(0, 361, 15),
}


def transform(images, kind, amount):
    """Return images after one of the TRANSFORMATIONS, float32 (N, H, W). Uncovered areas repeat the edges."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import affine

    shift = int(amount) if kind == "vertical shift in pixels" else 0
    scale = float(amount) if kind == "scale" else 1.0
    angle = -float(amount) if kind == "rotation in degrees" else 0.0  # torchvision turns clockwise
    margin = images.shape[-1] // 2
    padded = F.pad(images[:, None].float(), (margin, margin, margin, margin), mode="replicate")
    moved = affine(padded, angle, [0, shift], scale, [0.0], interpolation=InterpolationMode.BILINEAR)
    return moved[:, 0, margin:-margin, margin:-margin]


def invariance(run, count=500):
    """Draw how the accuracy changes when test images are shifted, scaled or rotated (Fig. 5)."""
    images = run.data.test.images[:count]
    fig = Figure(figsize=(FIGURE_WIDTH, 2.8))
    messages = []
    for axes, (kind, amounts) in zip(fig.subplots(1, 3, sharey=True), TRANSFORMATIONS.items(), strict=True):
        accuracies = []
        for amount in amounts:
            answers = predict(run.model, transform(images, kind, amount)).argmax(1)
            accuracies.append(100 * (answers == run.data.test.labels[:count]).double().mean().item())
        axes.plot(amounts, accuracies, color=AFTER_COLOR)
        axes.set(xlabel=kind, ylabel="accuracy in %", ylim=(0, 100))
        axes.grid(alpha=0.3)
        messages.append(f"{min(accuracies):.0f} % ({kind.partition(' in ')[0]})")
    return titled(fig, f"Accuracy on {len(images):,} test images falls to as little as {', '.join(messages)}", run)


@torch.inference_mode()
def occlude(model, image, size):
    """Return the class probabilities, (H, W, classes), with a gray square centred on each pixel of an image (H, W)."""
    height, width = image.shape
    probabilities = []
    for row in range(height):
        copies = image.float().repeat(width, 1, 1)
        for column in range(width):
            top = row - size // 2
            left = column - size // 2
            copies[column, max(0, top) : top + size, max(0, left) : left + size] = 127.5
        probabilities.append(model(copies).softmax(1))
    return torch.stack(probabilities)


def first_correct_of_each_class(run):
    """Return the number of each class's first correctly classified test image, or of its first, int64 (classes,)."""
    labels = run.data.test.labels
    is_correct = run.probabilities.argmax(1) == labels
    is_member = F.one_hot(labels, len(run.data.classes))
    ranks = is_member * (1 + is_correct.long()[:, None])  # 2: correct, 1: wrong, 0: of another class
    return ranks.argmax(0)  # the first of equal ranks


def occlusion(run, size=8, count=2):
    """Draw what hiding each part of an image does, for one image of each of the first classes (Fig. 7)."""
    classes = run.data.classes
    fig = Figure(figsize=(FIGURE_WIDTH, 2.4 * count + 0.6))
    grid = fig.subplots(count, 3, squeeze=False)
    shares = []
    for label, number in enumerate(first_correct_of_each_class(run)[:count]):
        name = classes[label]
        image = run.data.test.images[number]
        probabilities = occlude(run.model, image, size)
        predicted = probabilities.argmax(2)
        shares.append(f"{100 * (predicted != run.probabilities[number].argmax()).float().mean():.0f} % ({name})")
        left, middle, right = grid[label]
        left.imshow(image, cmap="gray", vmin=0, vmax=255)
        left.set_title(name)
        fig.colorbar(middle.imshow(probabilities[:, :, label], vmin=0, vmax=1), ax=middle)
        middle.set_title(f"probability of {name}")
        bar = fig.colorbar(right.imshow(predicted, cmap="tab10", vmin=-0.5, vmax=9.5), ax=right)
        bar.set_ticks(range(len(classes)), labels=classes)
        right.set(title="predicted class", xlabel="centre of the square", ylabel="centre of the square")
    title = f"A gray {size} x {size} square changes the answer at {' and '.join(shares)} of its positions"
    return titled(fig, title, run)


GABOR_STARTS = 24  # random starting points of the fit to each kernel; the best fit is kept


def closest_gabor_functions(targets, parameters):
    """Return the Gabor functions closest to the targets, (..., size * size), with their frequency and angle, (..., 1).

    A Gabor function is exp(-u^2 / 2s^2 - v^2 / 2t^2) (a cos(2 pi frequency u) + b sin(2 pi frequency u)). u and v are
    the distances of a pixel from the centre, along the wave and across it. parameters, (6, ..., 1), are mapped to
    the centre, s, t, the frequency and the angle; a and b follow by least squares.
    """
    size = math.isqrt(targets.shape[-1])
    center_x, center_y = (parameters[:2].sigmoid() - 0.5) * (size - 1)
    s, t = 0.5 + (size - 0.5) * parameters[2:4].sigmoid()
    frequency = 0.5 * parameters[4].sigmoid()
    angle = parameters[5]
    steps = torch.arange(size) - (size - 1) / 2
    right = steps.repeat(size) - center_x
    up = -steps.repeat_interleave(size) - center_y
    u = right * angle.cos() + up * angle.sin()
    v = up * angle.cos() - right * angle.sin()
    envelope = torch.exp(-((u / s) ** 2 + (v / t) ** 2) / 2)
    phase = 2 * math.pi * frequency * u
    waves = envelope[..., None] * torch.stack([phase.cos(), phase.sin()], dim=-1)  # those of a and b
    products = waves.mT @ waves + 1e-6 * torch.eye(2)  # keeps the normal equations solvable
    fitted = (waves @ torch.linalg.solve(products, waves.mT @ targets[..., None])).squeeze(-1)
    return fitted, frequency, angle


def fit_gabor(kernels, steps=300):
    """Return the Gabor functions that fit kernels (K, size, size) best, with their R², orientation and frequency (K,).

    Orientation: of the wave, 0 to 180 degrees counterclockwise from the horizontal. Frequency: in cycles per pixel.
    """
    targets = kernels.flatten(1)[:, None]  # (K, 1, pixels); the fitted functions are (K, starts, pixels)
    generator = torch.Generator().manual_seed(0)
    parameters = (1.5 * torch.randn(6, len(kernels), GABOR_STARTS, 1, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([parameters], lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.05, steps)
    for _ in range(steps):
        fitted, _, _ = closest_gabor_functions(targets, parameters)
        optimizer.zero_grad()
        (fitted - targets).square().sum().backward()
        optimizer.step()
        schedule.step()
    fitted, frequency, angle = closest_gabor_functions(targets, parameters.detach())
    errors = (fitted - targets).square().sum(-1)
    numbers = torch.arange(len(kernels))
    best = errors.argmin(1)
    variation = (targets - targets.mean(-1, keepdim=True)).square().sum(-1)[:, 0]
    r2 = 1 - errors[numbers, best] / variation
    orientation = torch.rad2deg(angle[numbers, best, 0]) % 180
    return fitted[numbers, best].view_as(kernels), r2, orientation, frequency[numbers, best, 0]


@cache
def fit_first_kernels(run):
    """Return the first kernels of the trained network, then of the untrained one, and the results of fit_gabor."""
    kernels = torch.cat([first_kernels(run.model), first_kernels(run.untrained_model())])
    return kernels, *fit_gabor(kernels)


def measure_gabor(run):
    """Return the rows of gabor.csv: the Gabor fit to each kernel, and its cosine similarity to the untrained kernel."""
    kernels, _, r2, orientation, frequency = fit_first_kernels(run)
    count = len(kernels) // 2
    cosines = F.cosine_similarity(kernels.flatten(1), kernels[count:].flatten(1).repeat(2, 1))
    rows = []
    for number in range(len(kernels)):
        network = "trained" if number < count else "untrained"
        row = {"epoch": run.epoch, "kernels": network, "feature_map": number % count, "r2": r2[number].item()}
        row["orientation_degrees"] = orientation[number].item()
        row["cycles_per_pixel"] = frequency[number].item()
        row["cosine_to_start"] = cosines[number].item()
        rows.append(row)
    return rows


def gabor(run, rows, count=8):
    """Draw the kernels that Gabor functions fit best, with fits and residuals."""
    kernels, fitted, *_ = fit_first_kernels(run)
    trained, untrained = torch.tensor([row["r2"] for row in rows]).chunk(2)
    best = trained.topk(min(count, len(trained))).indices
    limit = kernels[best].abs().max().item()
    fig = Figure(figsize=(FIGURE_WIDTH, 3.8))
    axes = fig.subplots()
    strips = torch.cat([kernels[best], fitted[best], (kernels - fitted)[best]])
    labels = [f"{number}: R² {trained[number]:.2f}" for number in best]
    _, tops, _ = draw_mosaic(axes, strips, labels, columns=len(best), gap=1, room=1, vmin=-limit, vmax=limit)
    axes.set_yticks([top + kernels.shape[1] / 2 for top in tops], ["kernel", "fit", "residual"])
    medians = f"{np.median(trained):.2f} after training and {np.median(untrained):.2f} before"
    return titled(fig, f"The median R² of Gabor fits to the first kernels is {medians} (below: best fits)", run)


# Inside the recurrent networks ----------------------------------------------------------------------------------------


def states_by_row(model, images):
    """Yield the state after each row, a tuple of tensors (layers, N, units): hidden and, for an LSTM, cell state."""
    state = None
    for row in model.rows(images).split(1, dim=1):
        _, state = model.recurrent(row, state)
        yield state if isinstance(state, tuple) else (state,)


def gradient_norms(model, images, labels):
    """Return the norm of the loss gradient with respect to the state after each row, float32 (steps,).

    It is the Euclidean norm over everything that the next step receives (the hidden states of both layers and, for an
    LSTM, their cell states), averaged over the images. After the last row only the second layer's output matters.
    """
    states = list(states_by_row(model, images))  # row by row, so that every state is part of the graph
    last_hidden = states[-1][0]
    losses = F.cross_entropy(model.fc(last_hidden[-1]), labels, reduction="none")
    tensors = list(itertools.chain.from_iterable(states))
    state_gradients = torch.autograd.grad(losses.sum(), tensors, materialize_grads=True)
    squares = torch.stack([gradient.square().sum((0, 2)) for gradient in state_gradients])
    squares = squares.view(len(states), -1, len(images)).sum(1)  # adds those of hidden and cell state
    return squares.sqrt().mean(1)


def measure_gradients(run):
    """Return the gradient_norms of 1,000 test images before training (epoch 0) and after each epoch that was saved."""
    test = run.data.test
    rows = []
    for epoch in sorted({0, *run.snapshot_epochs, run.epoch}):
        model = run.model if epoch == run.epoch else run.model_after(epoch)
        norms = gradient_norms(model, test.images[:1000], test.labels[:1000]).tolist()
        rows.append({"epoch": epoch} | {str(step): norm for step, norm in enumerate(norms, start=1)})
    return rows


def parse_gradients(rows):
    """Return the gradient norms, float64 (steps,), by epoch. rows: those of gradients.csv, as numbers or as text."""
    norms_by_epoch = {}
    for row in rows:
        epoch, *norms = row.values()
        norms_by_epoch[int(epoch)] = np.array(norms, dtype=float).clip(min=1e-16)  # a logarithmic axis has no zero
    return norms_by_epoch


def shade_blank_rows(axes, config, steps):
    """Shade the blank rows on an axes whose x axis is the number of rows read, from 1 to steps."""
    for start, end in [(0, config.rows_before), (steps - config.rows_after, steps)]:
        if start < end:
            label = None if axes.patches else "blank rows"  # one entry in the legend is enough
            axes.axvspan(start + 0.5, end + 0.5, color="0.9", zorder=0, label=label)
    axes.set_xlim(0.5, steps + 0.5)


def gradients(run, rows):
    """Draw the norm of the loss gradient with respect to the state after each row, one line per epoch."""
    norms_by_epoch = parse_gradients(rows)
    steps = len(norms_by_epoch[0])
    fig = Figure(figsize=(FIGURE_WIDTH, 3.4))
    axes = fig.subplots()
    shade_blank_rows(axes, run.config, steps)
    colors = matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(1, max(2, run.epoch)), "viridis_r")
    for epoch, norms in norms_by_epoch.items():
        color = colors.to_rgba(epoch) if epoch else "black"
        axes.semilogy(range(1, steps + 1), norms, color=color, label=None if epoch else "before training")
    fig.colorbar(colors, ax=axes, label="epoch")
    axes.set(xlabel="rows read", ylabel="norm of the loss gradient")
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    untrained, trained = [norms[0] / norms[-1] for norms in (norms_by_epoch[0], norms_by_epoch[run.epoch])]
    title = f"Before training, the loss gradient at the first row is {untrained:.2g} times that at the last row"
    return titled(fig, f"{title}, afterwards {trained:.2g} times", run)


@torch.inference_mode()
def probabilities_by_row(model, images, batch_size=1000):
    """Return the class probabilities if reading stopped after each row of images, float32 (N, steps, classes)."""
    probabilities = []
    for batch in images.split(batch_size):
        outputs, _ = model.recurrent(model.rows(batch))
        probabilities.append(model.fc(outputs).softmax(-1))
    return torch.cat(probabilities)


@torch.inference_mode()
def measure_reading(run):
    """Return the test accuracy of a linear classifier on the state (known) and of the network (answered) by row."""
    train = run.data.train
    test = run.data.test
    answers = probabilities_by_row(run.model, test.images).argmax(2)
    answered = 100 * (answers == test.labels[:, None]).double().mean(0)
    train_states = states_by_row(run.model, train.images[:RIDGE_IMAGES])
    test_states = states_by_row(run.model, test.images)
    rows = []
    for train_state, test_state in zip(train_states, test_states, strict=True):
        features = torch.cat(train_state).transpose(0, 1).flatten(1)  # all state of an image in one row
        test_features = torch.cat(test_state).transpose(0, 1).flatten(1)
        labels = train.labels[:RIDGE_IMAGES]
        known = linear_probe_accuracy(features, labels, test_features, test.labels, len(run.data.classes))
        rows.append({"epoch": run.epoch, "rows": len(rows) + 1, "known": known, "answered": answered[len(rows)].item()})
    return rows


def reading(run, rows):
    """Draw the network's answers row by row for some digits, and the accuracies of reading.csv."""
    steps = len(rows)
    test = run.data.test
    chosen = first_correct_of_each_class(run)[::2]
    inputs = run.model.rows(test.images[chosen])
    probabilities = probabilities_by_row(run.model, test.images[chosen])
    classes = probabilities.shape[2]
    fig = Figure(figsize=(FIGURE_WIDTH, 6.4))
    top, bottom = fig.subfigures(2, 1, height_ratios=(2, 1))
    panels = top.subplots(2, len(chosen), height_ratios=(1, 1.4))
    ticks = [1, steps // 2, steps]
    for number, label in enumerate(test.labels[chosen]):
        picture, heat = panels[:, number]
        picture.imshow(inputs[number], cmap="gray", extent=(0.5, inputs.shape[2] + 0.5, steps + 0.5, 0.5))
        picture.set(xticks=[], yticks=ticks, title=f"true class: {run.data.classes[label]}")
        extent = (-0.5, classes - 0.5, steps + 0.5, 0.5)
        shown = heat.imshow(probabilities[number], vmin=0, vmax=1, extent=extent, aspect="auto")
        heat.set(xticks=range(0, classes, 2), yticks=ticks, xlabel="class")
    panels[0, 0].set_ylabel("row")
    panels[1, 0].set_ylabel("rows read")
    top.colorbar(shown, ax=panels, label="probability of the class", shrink=0.6)
    axes = bottom.subplots()
    shade_blank_rows(axes, run.config, steps)
    x = range(1, steps + 1)
    known = [row["known"] for row in rows]
    answered = [row["answered"] for row in rows]
    axes.plot(x, known, ".-", color=ACCENT_COLOR, label="linear classifier on the state")
    axes.plot(x, answered, ".-", color=AFTER_COLOR, label="the network's own answer")
    axes.set(xlabel="rows read", ylabel=f"accuracy in % over\n{len(test.labels):,} test images", ylim=(0, 100))
    axes.grid(alpha=0.3)
    bottom.legend(loc="outside lower center", ncols=3)
    half = rows[steps // 2 - 1]
    title = f"After {half['rows']} of {steps} rows, a linear classifier on the state recognises {half['known']:.0f} %"
    return titled(fig, f"{title} of the images and the network itself {half['answered']:.0f} %", run)


@torch.inference_mode()
def gate_activations(model, images):
    """Return a dict from (layer, gate) to the gate at every row, from 0 (shut) to 1 (open), float32 (N, steps, units).

    layer is 1 or 2, gate a name of rnn_mnist.GATE_BLOCKS. A gate is computed from its block of the weights, the layer's
    input at that row and the layer's hidden state before that row.
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


def measure_gates(run, batch_size=1000):
    """Return for each gate and row, averaged over the images: mean, 10 % and 90 % quantile over the units."""
    images = run.data.test.images
    sums = {}  # (steps, units) by layer and gate; the values of all images would take several gigabytes
    for batch in images.split(batch_size):
        for key, values in gate_activations(run.model, batch).items():
            sums[key] = sums.get(key, 0) + values.double().sum(0)
    rows = []
    for (layer, gate), total in sums.items():
        for row, units in enumerate(total / len(images), start=1):
            low, high = units.quantile(torch.tensor([0.1, 0.9]).double()).tolist()
            statistics = {"mean": units.mean().item(), "low": low, "high": high}
            rows.append({"epoch": run.epoch, "layer": layer, "gate": gate, "row": row, **statistics})
    return rows


def gate_panels(subfigure, inputs):
    """Create axes (2, N), a row for each layer, above N images (steps, width) that lie along the x axis."""
    panels = subfigure.subplots(3, len(inputs), sharex=True, height_ratios=(1, 1, 0.4))
    for axes, rows in zip(panels[2], inputs, strict=True):
        steps, width = rows.shape
        axes.imshow(rows.T, cmap="gray", origin="lower", extent=(0.5, steps + 0.5, 0, width), aspect="auto")
        axes.set(yticks=[], xlabel="row read")
    return panels[:2]


def gates(run, rows):
    """Draw how far the gates open at every row, on average over the test images and for two digits."""
    names = list(rnn_mnist.GATE_BLOCKS[run.config.cell])
    keeping_gate = "update" if run.config.cell == "gru" else "forget"
    images = run.data.test.images[first_correct_of_each_class(run)[[0, 7]]]
    inputs = run.model.rows(images)
    steps = inputs.shape[1]
    percents = 100 * np.array([[row["mean"], row["low"], row["high"]] for row in rows])
    percents = percents.reshape(2, len(names), steps, 3)  # the rows are sorted by layer, gate and row
    fig = Figure(figsize=(FIGURE_WIDTH, 8))
    top, bottom = fig.subfigures(2, 1)
    mean_panels = gate_panels(top, [inputs[0]] * len(names))
    for (layer, gate), axes in np.ndenumerate(mean_panels):
        shade_blank_rows(axes, run.config, steps)
        mean, low, high = percents[layer, gate].T
        x = range(1, steps + 1)
        axes.fill_between(x, low, high, color=AFTER_COLOR, alpha=0.25, lw=0, label="middle 80 % of the units")
        axes.plot(x, mean, color=AFTER_COLOR, label="mean of the units")
        axes.set(ylim=(0, 100), yticks=[0, 50, 100], title=f"{names[gate]} gate of layer {layer + 1} in %")
        axes.grid(alpha=0.3)
    images_shown = f"{len(run.data.test.labels):,} test images (one below, its rows from left to right)"
    top.suptitle(f"All gates, averaged over {images_shown}", fontsize=9)
    top.legend(*mean_panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3)

    unit_panels = gate_panels(bottom, inputs)
    activations_by_gate = gate_activations(run.model, images)
    for layer, panels in enumerate(unit_panels, start=1):
        values = 100 * activations_by_gate[layer, keeping_gate]
        values = values[:, :, values.mean((0, 1)).argsort()]
        extent = (0.5, steps + 0.5, 0.5, values.shape[2] + 0.5)
        for axes, of_image in zip(panels, values, strict=True):
            shown = axes.imshow(of_image.T, vmin=0, vmax=100, origin="lower", extent=extent, aspect="auto")
            axes.set(yticks=[], ylabel=f"layer {layer}")
    bottom.suptitle(f"The {keeping_gate} gate of every unit, sorted by mean, for two digits", fontsize=9)
    bottom.colorbar(shown, ax=unit_panels, label=f"{keeping_gate} gate: share of the state kept in %")

    kept, low, high = percents[:, names.index(keeping_gate)].mean(0).T  # of every row
    middle = kept[run.config.rows_before :][7:20].mean()
    blank = np.delete(kept, range(run.config.rows_before, steps - run.config.rows_after))
    title = f"{kept.mean():.0f} % of the state, {kept.min():.0f} to {kept.max():.0f} % depending on the row"
    title += f" and {low.mean():.0f} to {high.mean():.0f} % on the unit"
    if blank.size:
        title = f"{middle:.0f} % of the state in rows 8 to 20 of the digit and {blank.mean():.0f} % in the blank rows"
    return titled(fig, f"The {keeping_gate} gates keep on average {title}", run)


# Statistics: the permutation test of the difference of two means ------------------------------------------------------

ALPHA = 0.05  # the level of a one-sided test; two of them give the 90 % interval
MAX_PERMUTATIONS = 200_000  # where there are more, as many random ones are drawn
HOLDS, FAILS, UNDECIDED, UNMEASURED = "holds", "does not hold", "undecided", "not measured"


@cache
def permutations(count, chosen=None):
    """Return what each permutation exchanges, float64 (permutations, count). The first permutation exchanges nothing.

    Without chosen, 1 marks each of `count` pairs whose two values are exchanged. With chosen, the first `chosen` of
    `count` values are the first sample; 1 marks the values that leave it and -1 those that enter it.
    """
    random = np.random.default_rng(0)
    if chosen is None:
        if 2**count <= MAX_PERMUTATIONS:
            return np.array(list(itertools.product((0.0, 1.0), repeat=count)))
        return np.vstack([np.zeros(count), random.choice((0.0, 1.0), (MAX_PERMUTATIONS, count))])
    measured = np.repeat([1.0, 0.0], [chosen, count - chosen])  # 1 for the values of the first sample
    if math.comb(count, chosen) <= MAX_PERMUTATIONS:
        members = np.array(list(itertools.combinations(range(count), chosen)))
        samples = (members[:, :, None] == np.arange(count)).any(axis=1)
    else:
        samples = np.vstack([measured, random.permuted(np.tile(measured, (MAX_PERMUTATIONS, 1)), axis=1)])
    return measured - samples


def permutation_test(first, second, margin, paired):
    """Test whether the means of two lists of numbers, first minus second, differ by more than a margin, or by less.

    Returns both one-sided p-values and the 90 % interval (low, high), which is None if there are too few numbers.
    paired: exchange numbers only within a pair, which flips the sign of their difference.
    """
    if paired:
        values = np.subtract(first, second)
        exchanged = permutations(len(first))
    else:
        values = np.concatenate([first, second])
        exchanged = permutations(len(values), len(first))
    # If d is subtracted from the first numbers, the means of a permutation differ at least as much as the measured ones
    # exactly where d is not below the difference between the means of the exchanged numbers, its critical difference.
    with np.errstate(invalid="ignore"):  # NaN where no numbers are exchanged, which counts for every d
        critical = (exchanged @ values / (exchanged > 0).sum(axis=1)).round(9)
    ordered = np.sort(critical[~np.isnan(critical)])
    rejected = int(ALPHA * len(critical) + 1e-9) - (len(critical) - len(ordered))
    interval = (ordered[rejected], ordered[-1 - rejected]) if rejected >= 0 else None
    return np.mean(~(critical > margin)), np.mean(~(critical < margin)), interval


def format_value(value, unit, sign=""):
    """Return a number with two decimals, or three if it has no unit. sign: "+" marks positive numbers, too."""
    return f"{value:{sign}z.{2 if unit else 3}f}"  # z: no -0.00


@dataclass(frozen=True)
class Measurements:
    """What was measured of one setting. values: a dict with one value for each seed."""

    label: str
    values: dict

    def summary(self, unit="%"):
        """Return the label with mean, range and number of the values."""
        values = list(self.values.values())
        if not values:
            return f"{self.label}: not measured"
        mean = f"{format_value(np.mean(values), unit)} {unit}".strip()
        spread = f"{format_value(min(values), unit)} to {format_value(max(values), unit)}, {len(values)} seeds"
        return f"{self.label}: {mean} ({spread if len(values) > 1 else 'one seed'})"


@dataclass(frozen=True)
class Comparison:
    """The result of a test; None stands for what was not measured."""

    label: str
    verdict: str
    difference: float | None = None  # of the means
    difference_text: str = ""  # with its sign and unit
    interval_text: str = ""  # the 90 % interval; empty if there are too few seeds for one
    agreeing: int | None = None  # for how many seeds the tested sentence is true,
    total: int | None = None  # of those that both settings have
    p: float | None = None  # one-sided, of the tested sentence or of its opposite, whichever is smaller
    slack: float = 0.0  # by how much the difference is inside the tested range


def compare(first, second, margin=0.0, unit="%", paired=False):
    """Test whether the mean of the first Measurements is above that of the second by more than a margin.

    Returns a Comparison, which HOLDS if the 90 % interval lies above the margin and FAILS if it lies below.
    paired: the values of a seed are a pair; seeds that only one setting has do not count.
    """
    shared = [seed for seed in first.values if seed in second.values]
    if paired:
        first = replace(first, values={seed: first.values[seed] for seed in shared})
        second = replace(second, values={seed: second.values[seed] for seed in shared})
    label = f"{first.summary(unit)} against {second.summary(unit)}{', paired by seed' if paired else ''}"
    if not first.values or not second.values:
        return Comparison(label, UNMEASURED)
    first_values = list(first.values.values())
    second_values = list(second.values.values())
    p_above, p_below, interval = permutation_test(first_values, second_values, margin, paired)
    verdict = HOLDS if p_above <= ALPHA else FAILS if p_below <= ALPHA else UNDECIDED
    difference = np.mean(first_values) - np.mean(second_values)
    difference_text = f"{format_value(difference, unit, '+')} {'points' if unit == '%' else unit}".strip()
    interval_text = " to ".join(format_value(end, unit, "+") for end in interval or ())
    agreeing = sum(first.values[seed] - second.values[seed] > margin for seed in shared)
    p = min(p_above, p_below)
    return Comparison(label, verdict, difference, difference_text, interval_text, agreeing, len(shared), p)


# Comparing runs: groups and labels ------------------------------------------------------------------------------------

# Groups that change one of these settings are left out of the pictures of all other settings, unless all groups do.
UNUSUAL_SETTINGS = {"rows_before", "rows_after", "keep_bias", "gates", "pixels", "without"}


@dataclass
class Group:
    """Runs that differ only in their seeds, and the epoch after which they are compared. config has seed 0."""

    runs: list
    config: utils.Config
    epoch: int

    @property
    def accuracies(self):
        """The test accuracies, in the order of the runs."""
        return [run.test_accuracy(self.epoch) for run in self.runs]

    @property
    def mean(self):
        """The mean test accuracy."""
        return float(np.mean(self.accuracies))


def setting_order(config):
    """Return the sort key of a Config: by script, then by each setting; choices in the order of their list."""
    key = [config.script]
    for spec, value in config.items():
        rank = list(spec.choices).index(value) if spec.choices else value
        key.append((value is not None, rank))  # None comes first
    return key


def group_runs(runs):
    """Return the Groups of runs in setting_order, compared after the last epoch that most share."""
    experiments = {}
    for run in sorted(runs, key=lambda run: run.epoch, reverse=True):
        longest = experiments.setdefault(run.config, run)
        if longest is not run:
            print_line(f"skipping {run.folder}: duplicate of {longest.folder}")
    last_epochs = [min(run.epoch, REPORT_EPOCHS) for run in experiments.values()]
    epoch = max(set(last_epochs), key=lambda last: (last_epochs.count(last), last))  # of two, the later
    shorter = [str(run.folder) for run in experiments.values() if run.epoch < epoch]
    compared = [run for run in experiments.values() if run.epoch >= epoch]
    compared.sort(key=lambda run: setting_order(run.config))
    print_line(f"runs compared after epoch {epoch}: {len(compared)}")
    if shorter:
        print_line(f"skipping runs that have not reached epoch {epoch}: {', '.join(shorter)}")
    return [Group(same, replace(same[0].config, seed=0), epoch) for same in utils.group_by_setting(compared)]


def label_configs(configs):
    """Return what distinguishes each Config from the others, list of str, and what all share. Seeds are never named."""
    first = configs[0].captions()
    differing = set()
    for config in configs:
        differing.update(name for name, _ in first.items() ^ config.captions().items())
    labels = []
    for config in configs:
        captions = {"network": config.network} | {spec.name: spec.label(value) for spec, value in config.items()}
        named = [caption for name, caption in captions.items() if name in differing - {"seed"} and caption]
        labels.append(", ".join(named))
    return labels, ", ".join(caption for name, caption in first.items() if name not in differing | {"seed"})


def families_of(groups, name):
    """Return the groups in lists whose members differ only in the setting called name."""
    families = {}
    for group in groups:
        others = [value for spec, value in group.config.items() if spec.name != name]
        families.setdefault((group.config.script, *others), []).append(group)
    return list(families.values())


def usual_groups(groups, name):
    """Return the groups in which UNUSUAL_SETTINGS other than name have their defaults, or all groups if none has."""
    usual = []
    for group in groups:
        if all(value == spec.default for spec, value in group.config.items() if spec.name in UNUSUAL_SETTINGS - {name}):
            usual.append(group)
    return usual or groups


def starts_equal(first, second):
    """Return whether two Configs give the same initial weights, except those held at zero, and order of the images."""
    differing = {spec.name for spec, value in first.items() if getattr(second, spec.name, None) != value}
    keep_start = {"optimizer", "lr", "momentum", "pixels", "gates", "rows_before", "rows_after"}
    return first.script == second.script and differing <= keep_start


def compare_groups(first, second, labels=("", "")):
    """Test whether the accuracy of the first Group is above that of the second. With one seed, nothing is decided."""
    measurements = []
    for group, label in zip((first, second), labels, strict=True):
        seeds = [run.config.seed for run in group.runs]
        measurements.append(Measurements(label, dict(zip(seeds, group.accuracies, strict=True))))
    fewest = min(len(first.runs), len(second.runs))
    has_pairs = len(measurements[0].values.keys() & measurements[1].values.keys()) == fewest  # one has all of the other
    result = compare(*measurements, paired=starts_equal(first.config, second.config) and has_pairs)
    return replace(result, verdict=UNDECIDED, interval_text="") if fewest == 1 else result


def describe_best(groups, labels):
    """Return in words which group has the highest mean, and its lead over the second and over the last in points."""
    if len(groups) == 1:
        return f"mean: {groups[0].mean:.2f} %"
    ranking = sorted(zip(groups, labels, strict=True), key=lambda pair: pair[0].mean)
    ranking.reverse()
    best, best_label = ranking[0]
    others = [("{:.2f} points better than {}", *ranking[1])]
    if len(ranking) > 2:
        others.append(("and {:.2f} better than {}", *ranking[-1]))
    texts = [f"best: {best_label},"]
    for template, group, label in others:
        doubt = "" if compare_groups(best, group).verdict == HOLDS else " (may be noise)"
        texts.append(template.format(best.mean - group.mean, label) + doubt)
    return " ".join(text.replace(" ", "\xa0") for text in texts)  # lines are broken between the texts


# Pictures of several settings -----------------------------------------------------------------------------------------

MAX_PANELS = 24
MAX_LINES = 6  # in a panel
MAJORITY_ACCURACY = 11.35  # percent of MNIST's test images show a 1, the most frequent digit
LINE_COLORS = ("black", "#56B4E9", "#D55E00", "#CC79A7", "#0072B2", "#E69F00", "#009E73")  # of Okabe and Ito


def share_limits(all_axes):
    """Give axes the same limits of y, unless one would use less than 30 % of its height. Return whether it was done."""
    limits = np.array([axes.get_ylim() for axes in all_axes])
    low, high = limits[:, 0].min(), limits[:, 1].max()
    if np.ptp(limits, axis=1).min() < 0.3 * (high - low):
        return False
    for axes in all_axes:
        axes.set_ylim(low - 0.03 * (high - low), high + 0.03 * (high - low))
    return True


def draw_panels(name, groups, panels, title):
    """Draw a panel for each (title, draw(axes)), and return the outputs. If there are too many, say what to name."""
    if len(panels) > MAX_PANELS:
        pattern = f"*{groups[0].config.name.partition('_')[0]}*"  # such as *rnn30*
        example = utils.shell_command(groups[0].runs[0].folder.with_name(pattern))
        print_line(f"{name}: more than {MAX_PANELS} panels are needed; pass fewer runs, such as {example}")
        return None
    columns = min(2, len(panels))
    rows = math.ceil(len(panels) / columns)
    drawn = Figure(figsize=(FIGURE_WIDTH, 2.8 * rows + 0.8))
    for number, (panel_title, draw) in enumerate(panels, start=1):
        axes = drawn.add_subplot(rows, columns, number)
        axes.grid(alpha=0.3, axis="y")
        draw(axes)
        lines = [textwrap.fill(line, 120 // columns, break_on_hyphens=False) for line in panel_title.splitlines()]
        axes.set_title("\n".join(lines), fontsize=7.5)
    if not drawn.axes[0].images and not share_limits(drawn.axes):
        title += ", on different scales"
    if not any(axes.get_legend() for axes in drawn.axes):  # where panels have their own, colours differ between them
        drawn.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    drawn.suptitle(title + groups[0].runs[0].source_suffix, wrap=True)
    return {f"{name}.png": drawn}


def draw_epochs(axes, groups):
    """Draw test accuracy by epoch for up to MAX_LINES groups: the mean of the seeds, and their range."""
    labels, _ = label_configs([group.config for group in groups])
    for group, label, color in zip(groups, labels, LINE_COLORS, strict=False):
        epochs = range(1, group.epoch + 1)
        accuracies = np.array([[run.test_accuracy(epoch) for epoch in epochs] for run in group.runs])
        axes.plot(epochs, accuracies.mean(0), ".-", color=color, markersize=4, label=label)
        axes.fill_between(epochs, accuracies.min(0), accuracies.max(0), color=color, alpha=0.2, linewidth=0)
    axes.set(xlabel="epoch", ylabel="test accuracy in %\n(mean and range of the seeds)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if len(groups) > 1:
        axes.legend(loc="best")


def compare_curves(groups):
    """Draw test accuracy by epoch, a line for each value of the setting that varies most, and panels for the others."""
    panels = []
    for script, config_class in CONFIGS.items():
        members = [group for group in groups if group.config.script == script]
        names = [spec.name for spec in config_class.specs()]
        most_varied = max(names, key=lambda name: len({getattr(group.config, name) for group in members}))
        for family in families_of(members, most_varied):
            for start in range(0, len(family), MAX_LINES):
                shown = family[start : start + MAX_LINES]
                labels, common = label_configs([group.config for group in shown])
                panels.append((f"{common}\n{describe_best(shown, labels)}", partial(draw_epochs, groups=shown)))
    title = f"Test accuracy in % by epoch, and the best of each panel after epoch {groups[0].epoch}"
    return draw_panels("curves", groups, panels, title)


def value_label(config, spec):
    """Return how pictures write a setting's value: a choice in words, or a number. Among gates, an RNN has none."""
    if spec.name == "gates" and config.cell == "rnn":
        return "plain RNN"
    value = getattr(config, spec.name)
    return (spec.label(value) or config.network) if spec.choices else format_number(value)  # captions name no cell


def draw_seeds(axes, groups, spec):
    """Draw the accuracy of every seed, and the mean, of groups that differ in one setting; spec: its SettingSpec."""
    best = max(group.mean for group in groups)
    labels = []
    for position, group in enumerate(groups):
        color = NETWORK_COLORS[group.config.network.split()[0]]
        offsets = np.linspace(-0.2, 0.2, len(group.runs) + 2)[1:-1]
        axes.plot(position + offsets, group.accuracies, ".", color=color)
        axes.hlines(group.mean, position - 0.3, position + 0.3, color=color)
        label = value_label(group.config, spec)
        if len(groups) <= 8:
            difference = "best" if group.mean == best else f"{group.mean - best:.2f}"
            label = textwrap.fill(label, 56 // len(groups), break_long_words=False)
            label += f"\n{group.mean:.2f}\n({difference})"
        labels.append(label)
    axes.plot([], [], ".", color="0.4", label="one seed")
    below = " (below, with its difference from the best)" if len(groups) <= 8 else ""
    axes.plot([], [], color="0.4", label=f"mean{below}")
    axes.set_xticks(range(len(groups)), labels, rotation=90 if len(groups) > 8 else 0, fontsize=7.5)
    axes.set(xlabel=spec.flag, ylabel="test accuracy in %")
    low, high = axes.get_ylim()
    if min(group.mean for group in groups) < 20:
        axes.axhline(10, color="0.4", linestyle=":")
        low = min(low, 10 - 0.12 * (high - low))  # leaves room for the text
        axes.text((len(groups) - 1) / 2, low, "random guessing (10 %)", fontsize=7, ha="center", va="bottom")
    axes.set_ylim(min(low, high - 1), min(high, 100.5))  # a smaller range would make small differences look large


def compare_setting(groups, spec):
    """Draw the accuracy of every seed against this setting, a panel for each choice of the others."""
    families = [family for family in families_of(usual_groups(groups, spec.name), spec.name) if len(family) > 1]
    if not families:
        return None
    panels = []
    for family in families:
        _, common = label_configs([group.config for group in family])
        if spec.name == "gates":  # the plain RNN, which has no gates, is shown beside them
            plain_rnn = replace(family[0].config, cell="rnn", gates="full")
            family = [group for group in groups if group.config == plain_rnn] + family[::-1]
        labels = [value_label(group.config, spec) for group in family]
        panels.append((f"{common}\n{describe_best(family, labels)}", partial(draw_seeds, groups=family, spec=spec)))
    meaning = spec.help.partition(":")[0].partition(";")[0]  # without explanations
    title = f"Test accuracy in % after epoch {groups[0].epoch} by {meaning} ({spec.flag}), all else equal"
    return draw_panels(spec.name, groups, panels, title)


def draw_memory(axes, groups):
    """Draw accuracies as a table: a column for each number of blank rows, a row for each initial bias."""
    biases = sorted({group.config.keep_bias for group in groups}, key=lambda bias: (bias is not None, bias))
    all_rows = sorted({group.config.rows_after for group in groups})
    means = np.full((len(biases), len(all_rows)), math.nan)
    texts = np.full(means.shape, "not run", dtype=object)
    for group in groups:
        cell = biases.index(group.config.keep_bias), all_rows.index(group.config.rows_after)
        means[cell] = group.mean
        texts[cell] = f"{group.mean:.2f} %"
        if max(group.accuracies) - min(group.accuracies) > 1:
            texts[cell] += f"\n{min(group.accuracies):.0f} to {max(group.accuracies):.0f}"
    colors = matplotlib.colormaps["Blues"].with_extremes(bad="0.9")
    axes.imshow(means, cmap=colors, vmin=0, vmax=150, aspect="auto")  # dark colours would hide numbers
    for (row, column), text in np.ndenumerate(texts):
        axes.text(column, row, text, ha="center", va="center", fontsize=8)
    chosen = [bias for bias in biases if bias is not None]
    labels = [f"B = {format_number(bias)}\n({100 / (1 + math.exp(-bias)):.0f} %)" for bias in chosen]
    if None in biases:
        labels.insert(0, "PyTorch's\ninitialisation")
    axes.set_yticks(range(len(biases)), labels, fontsize=8)
    is_plain = groups[0].config.cell == "rnn"
    meaning = "recurrent weights: % of identity" if is_plain else "share of the state kept at first"
    axes.set_ylabel(f"B ({meaning})", fontsize=8)
    axes.set(xticks=range(len(all_rows)), xticklabels=all_rows, xlabel="blank rows after the digit")
    axes.plot([], [], " ", label="mean, and range if above 1 point")
    if not groups[0].runs[0].source_suffix:
        axes.plot([], [], " ", label=f'{MAJORITY_ACCURACY} %: always "1"')
    axes.grid(visible=False)


def compare_memory(groups):
    """Draw test accuracy by number of blank rows and initial bias, a panel for each recurrent network."""
    members = {}  # groups by network: their Config without blank rows and without B
    for group in groups:
        if is_recurrent(group.runs[0]) and group.config.gates == "full" and not group.config.rows_before:
            network = replace(group.config, rows_after=0, keep_bias=None)
            members.setdefault(network, []).append(group)
    tried = {}  # the values of B with blank rows, by network
    for network in sorted(members, key=lambda config: (config.cell == "rnn", setting_order(config))):  # RNNs come last
        tried[network] = {group.config.keep_bias for group in members[network] if group.config.rows_after}
    networks = [network for network in tried if len(tried[network]) > 1]  # one B says little beside several
    networks = networks or [network for network in tried if tried[network]]
    if not networks:
        return None
    labels, common = label_configs(networks)
    panels = []
    for label, network in zip(labels, networks, strict=True):
        rows = max(group.config.rows_after for group in members[network])
        longest = [group for group in members[network] if group.config.rows_after == rows]
        biases = [group.config.captions().get("keep_bias", "PyTorch's") for group in longest]
        panel_title = f"{label or common}; with {rows} blank rows\n{describe_best(longest, biases)}"
        panels.append((panel_title, partial(draw_memory, groups=members[network])))
    title = f"Test accuracy in % after epoch {groups[0].epoch} by blank rows and initial bias B (--keep-bias)\n{common}"
    return draw_panels("memory", groups, panels, title)


def pooled_conditions(runs):
    """Return in words how runs differ in precision and device, such as 'precision (bf16, fp32)', '' if not at all."""
    differing = []
    for name in ("precision", "device"):
        values = sorted({getattr(run.conditions, name) for run in runs})
        if len(values) > 1:
            differing.append(f"{name} ({', '.join(values)})")
    return " and ".join(differing)


def compare_two_settings(groups):
    """Return in words which of two groups has the higher mean, and whether its lead may be chance."""
    labels, _ = label_configs([group.config for group in groups])
    result = compare_groups(*groups, labels)
    if result.difference < 0:
        labels.reverse()
        result = compare_groups(*groups[::-1], labels)
    facts = [f"difference {result.difference_text}"]
    if result.total > 1:
        facts.append(f"higher in {result.agreeing} of {result.total} seeds")
    seeds = min(len(group.runs) for group in groups)
    if not result.interval_text:
        count = ("one seed", "two seeds", "three seeds", "four seeds")[seeds - 1]
        verdict = f"{count} cannot decide; add --seed 0 1 2 3 4"
    else:
        p = min(1.0, 2 * result.p)  # doubled, because the direction was chosen from the data
        facts += [f"p = {p:.4f} (two-sided permutation test)", f"90 % interval {result.interval_text}"]
        verdict = "undecided, because the interval contains 0"
        if result.verdict == HOLDS:
            verdict = f"{labels[0]} is better, because the interval lies above 0"
    text = f"{result.label}: {', '.join(facts)}; {verdict}."
    pooled = pooled_conditions(groups[0].runs + groups[1].runs)
    return f"{text} The runs differ in {pooled}." if pooled else text


def results(groups):
    """Write results.csv and results.md: the accuracy of each setting and, for two settings, which is better."""
    rows = [utils.result_row(group.runs, group.epoch, REPORT) for group in groups]
    head = f"Test accuracy in percent after epoch {groups[0].epoch}: mean, range and standard deviation over the seeds."
    texts = ["# Results", head, utils.markdown_table(utils.RESULT_COLUMNS, rows)]
    pooling = [group for group in groups if pooled_conditions(group.runs)]
    if pooling:
        conditions = pooled_conditions([run for group in pooling for run in group.runs])
        texts.append(f"In {len(pooling)} of {len(groups)} settings the runs differ in {conditions}.")
    if len(groups) == 2 and groups[0].config.dataset == groups[1].config.dataset:
        texts.append(compare_two_settings(groups))
        print_line(texts[-1])
    return {"results.csv": utils.format_csv(utils.RESULT_COLUMNS, rows), "results.md": "\n\n".join(texts) + "\n"}


# The figures by name --------------------------------------------------------------------------------------------------

# A figure of one run. draw(run), or draw(run, rows) with the rows of its table, returns a Figure. fits(run): whether a
# run has it. measure(run): the rows of its table, list of dict whose first column is the epoch, if it has a table.
FigureSpec = namedtuple("FigureSpec", "draw fits measure", defaults=(None,))

FIGURES = {
    "curves": FigureSpec(curves, fits=lambda run: True),
    "confusion": FigureSpec(confusion, fits=lambda run: True),
    "filters": FigureSpec(filters, has_convolutions),
    "activations": FigureSpec(activations, has_convolutions, measure_activations),
    "layers": FigureSpec(layers, has_convolutions, measure_layers),
    "deconv": FigureSpec(deconv, has_convolutions),
    "evolution": FigureSpec(evolution, has_convolutions),
    "invariance": FigureSpec(invariance, has_convolutions),
    "occlusion": FigureSpec(occlusion, has_convolutions),
    "gabor": FigureSpec(gabor, has_convolutions, measure_gabor),
    "gradients": FigureSpec(gradients, is_recurrent, measure_gradients),
    "reading": FigureSpec(reading, is_recurrent, measure_reading),
    "gates": FigureSpec(gates, lambda run: is_recurrent(run) and run.config.cell != "rnn", measure_gates),
}
SETTINGS = [spec for config_class in CONFIGS.values() for spec in config_class.specs()]
NOT_COMPARED = {"seed", "dataset", "rows_before", "rows_after", "keep_bias"}  # not comparable, or shown by memory
COMPARISONS = {spec.name: partial(compare_setting, spec=spec) for spec in SETTINGS if spec.name not in NOT_COMPARED}
COMPARISONS |= {"results": results, "curves": compare_curves, "memory": compare_memory}


# Command line ---------------------------------------------------------------------------------------------------------


def skip(error, folder=None):
    """Print that a folder is skipped, and why; folder: None for the file that the error names."""
    reason = getattr(error, "strerror", None) or str(error).removeprefix(f"{folder} ")
    print_line(f"skipping {folder or error.filename}: {reason}")


def open_run(folder, data_dir):
    """Return the SavedRun in a folder. Raises InputError if it cannot be read or has not finished an epoch."""
    run = SavedRun(folder, data_dir)
    if run.epoch == 0:
        raise InputError(f"{folder} has not finished an epoch; train it first")
    return run


def find_runs(folder, data_dir):
    """Return the SavedRuns in a folder: its own run or, if it has none, the runs below it. Links are followed.

    Runs that cannot be used and folders named reference are skipped with a message. InputError: no run is left.
    """
    if (folder / "config.json").exists():
        return [open_run(folder, data_dir)]
    script = next((script for script in CONFIGS if script in folder.parts), "rnn_mnist")
    training = utils.shell_command("python", f"{script}.py")
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; train a run with {training}")
    runs = []
    references = []
    visited = set()
    for parent, subfolders, files in os.walk(folder, onerror=skip, followlinks=True):
        if os.path.realpath(parent) in visited:  # a link that leads back
            subfolders.clear()
            continue
        visited.add(os.path.realpath(parent))
        if "reference" in subfolders:
            subfolders.remove("reference")
            references.append(Path(parent, "reference"))
        if "config.json" in files:
            try:
                runs.append(open_run(Path(parent), data_dir))
            except (InputError, OSError) as error:
                skip(error, parent)
        subfolders.sort()
    if runs:
        for reference in references:
            print_line(f"skipping {reference}: name it to compare its runs")
        return runs
    message = f"{folder} holds no finished run; train one with {training}"
    if references:
        message += f", or compare the shipped runs with {utils.shell_command('python', 'visualize.py', references[0])}"
    raise InputError(message)


def find_all_runs(folders, data_dir):
    """Return the SavedRuns in several folders, each once. Of several folders, one without runs is skipped."""
    runs = {}
    for folder in folders:
        try:
            runs |= {os.path.realpath(run.folder): run for run in find_runs(folder, data_dir)}
        except (InputError, OSError) as error:
            if len(folders) == 1:
                raise
            skip(error, folder)
    if not runs:
        raise InputError("none of the named folders holds a finished run")
    return list(runs.values())


def draw_all(figures, names, label, folder):
    """Draw figures into a folder. One that cannot be drawn is reported, and the others are drawn.

    figures: functions that return outputs or None, by name. names: those to draw, None for all. label: of what.
    Returns the names of the files that were written, and an exit status for each figure, 0 if it was drawn.
    """
    for name in names or []:
        if name not in figures:
            raise InputError(f"{label} has no figure {name}; it has {', '.join(figures)}")
    written = set()
    statuses = []
    for name in dict.fromkeys(names or figures):
        statuses.append(0)
        try:
            outputs = figures[name]()
            if outputs:
                save_outputs(outputs, folder)
                written |= outputs.keys()
            elif names:
                raise InputError("there is nothing to draw")
        except utils.FAILURES as error:
            statuses[-1], message = utils.describe_error(error)
            print_line(f"could not draw {name} of {label}: {message.removeprefix('error: ')}", sys.stderr)
    return written, statuses


def draw_figure(run, name):
    """Return the outputs of a figure of one run: its Figure and, if it has one, its table, by file name."""
    spec = FIGURES[name]
    if spec.measure is None:
        return {f"{name}.png": spec.draw(run)}
    rows = spec.measure(run)
    return {f"{name}.png": spec.draw(run, rows), f"{name}.csv": format_table(rows)}


def draw_run(run, names, output_dir):
    """Draw the figures of one run; names: those to draw, None for all. Returns the statuses of draw_all."""
    if set(names or ()) != {"curves"}:  # all others need the checkpoint
        _ = run.model  # loads the history of the same checkpoint
    figures = {name: partial(draw_figure, run, name) for name, spec in FIGURES.items() if spec.fits(run)}
    return draw_all(figures, names, run.folder, output_dir)[1]


def draw_comparison(runs, names, output_dir):
    """Draw the comparison of runs; names: the figures to draw, None for all. Returns the statuses of draw_all.

    When all are drawn, files that an earlier comparison wrote and this one does not are removed.
    """
    real_runs = [run for run in runs if not run.source_suffix]
    if real_runs and len(real_runs) < len(runs):
        print_line(f"skipping runs on synthetic data ({len(runs) - len(real_runs)}); to compare them, pass only them")
    groups = group_runs(real_runs or runs)
    figures = {name: partial(draw, groups) for name, draw in COMPARISONS.items()}
    written, statuses = draw_all(figures, names, "the comparison", output_dir)
    record = output_dir / ".outputs"  # the names of the files that comparisons wrote
    earlier = set(record.read_text(encoding="utf-8").splitlines()) if record.exists() else set()
    if names or any(statuses):
        written |= earlier
    for name in sorted(earlier - written):
        print_line(f"removing {output_dir / name}, which an earlier comparison wrote")
        (output_dir / name).unlink(missing_ok=True)
    if written:
        utils.write_atomically(record, "".join(f"{name}\n" for name in sorted(written)).encode())
    return statuses


def comparison_folder(folders, runs):
    """Return where the comparison of folders goes: FOLDER/comparison or, of several, the runs folder of the first."""
    if len(folders) == 1:
        return folders[0] / "comparison"
    parent = Path(os.path.abspath(runs[0].folder)).parent
    for name in (runs[0].config.script, "reference"):  # reference/comparison is that of all shipped runs
        if parent.name == name:
            parent = parent.parent
    return parent / "comparison"


def parse_command_line():
    """Return the parsed command line, with each of its folders once. Its help lists all figures."""
    draw_functions = {name: spec.draw for name, spec in FIGURES.items()}
    lines = [__doc__ or ""]
    for head, functions in (("Figures of one run:", draw_functions), ("\nFigures of several runs:", COMPARISONS)):
        lines.append(head)
        for name, draw in functions.items():
            doc = getattr(draw, "func", draw).__doc__ or " "  # func: of a partial function
            lines.append(f"    {name:14} {doc.splitlines()[0]}")
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
        matches = [] if path.exists() else sorted(glob.glob(str(path)))  # Windows shells leave patterns alone
        for folder in map(Path, matches or [path]):
            unique.setdefault(os.path.realpath(folder), folder)
    args.folders = list(unique.values())
    return args


@utils.exit_with_status()
def main():
    """Draw what the command line asks for. Raises InputError or TrainingError if a figure could not be drawn."""
    args = parse_command_line()
    runs = find_all_runs(args.folders, args.data_dir)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        if args.folders == [runs[0].folder]:
            statuses = draw_run(runs[0], args.figures, args.output_dir or runs[0].folder / "figures")
        else:
            statuses = draw_comparison(runs, args.figures, args.output_dir or comparison_folder(args.folders, runs))
    if any(statuses):
        failures = len(statuses) - statuses.count(0)
        message = f"{failures} of {len(statuses)} figures could not be drawn, for the reasons given above"
        raise utils.TrainingError(message) if 1 in statuses else InputError(message)


if __name__ == "__main__":
    main()
