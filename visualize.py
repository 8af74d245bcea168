"""Draw what trained networks learned, from the folders of finished runs.

    python visualize.py runs/cnn_cifar10/NAME                      every figure of a run, into its figures/ folder
    python visualize.py runs/cnn_cifar10/NAME --figures filters    only the ones named
    python visualize.py runs                                       all runs compared, into runs/comparison/

Figures of any run: curves, confusion, examples. Of a convolutional network also: filters, activations, and, after
Zeiler & Fergus (2013), arXiv:1311.2901: deconv, evolution, invariance, occlusion, contribution; and gabor. Of a
recurrent network also: gradients, reading. Of several runs: results, curves, hidden_size, learning_rate, optimizer,
gradients, claims.
"""

import copy
import csv
import io
import itertools
import math
from contextlib import suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image
from tqdm import tqdm

import cnn_cifar10
import rnn_mnist
from utils import (
    DATASET_TITLES,
    REPORT_EPOCHS,
    SETTINGS,
    ArgumentParser,
    InputError,
    autocast,
    folder_name,
    load_checkpoint,
    load_data,
    load_tensors,
    predict,
    read_config,
    read_metrics,
    reported_row,
    restore,
    run_script,
    synthetic_notice,
    write_atomically,
)

SCRIPTS = {"cnn_cifar10": cnn_cifar10, "rnn_mnist": rnn_mnist}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "savefig.dpi": 160,
    "image.interpolation": "nearest",
    "legend.frameon": False,
}
WIDTH = 8  # inches, of every figure
GRAY = matplotlib.colormaps["gray"].with_extremes(bad="#dfe8f2")  # what is no pixel of an image is tinted


load_once = cache(partial(load_data, may_download=False))


class FinishedRun:
    """A run's folder, read piece by piece as the figures ask for it. Raises InputError where a piece is unusable."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.config = read_config(self.folder)

    @property
    def is_cnn(self):
        return self.config["script"] == "cnn_cifar10"

    @property
    def title(self):
        """The run in words: network, data set, training, seed."""
        return f"{self.setting()}, seed {self.config['seed']}"

    def setting(self, without=None):
        """The run's setting in words, seed aside; without: a setting to leave out, such as 'lr'."""
        config = self.config
        network = "LeNet-5" if self.is_cnn else config["cell"].upper()
        if not self.is_cnn and without != "hidden_size":
            network += f" with {config['hidden_size']} hidden units"
        source = "" if config["data_source"] == "real" else "synthetic data in place of "
        words = {
            "optimizer": {"adam": "Adam", "sgd": "SGD"}[config["optimizer"]],
            "lr": f"learning rate {config['lr']:g}",
            "momentum": f"momentum {config['momentum']:g}" if config["momentum"] else "",
            "batch_size": f"batch {config['batch_size']}",
        }
        training = [text for name, text in words.items() if text and name != without]
        return ", ".join([f"{network} on {source}{DATASET_TITLES[config['dataset']]}", *training])

    def test_accuracy(self, epoch=REPORT_EPOCHS):
        """The test accuracy in percent after an epoch, or after the last one if that comes before."""
        return self.metrics[: int(epoch)][-1]["test_accuracy"]

    @cached_property
    def metrics(self):
        return read_metrics(self.folder)

    @cached_property
    def model(self):
        """The trained network; its weights are the last epoch's."""
        model = SCRIPTS[self.config["script"]].build_model(self.config)
        restore(load_checkpoint(self.folder), model)
        return model

    def untrained_model(self):
        """The network at its initialisation, rebuilt from the run's seed."""
        torch.manual_seed(self.config["seed"])
        return SCRIPTS[self.config["script"]].build_model(self.config)

    def snapshot(self, epoch):
        """A network with the convolution weights that stood after an epoch; its other weights are without meaning."""
        model = self.untrained_model()
        weights = load_tensors(self.folder / "snapshots" / f"epoch_{epoch:02d}.pt")
        restore({"model": model.state_dict() | weights}, model)
        return model

    @cached_property
    def data(self):
        config = self.config
        return load_once(config["dataset"], config["data_source"], config["data_dir"])

    @cached_property
    def probabilities(self):
        """Class probabilities of the test images, float32 (N, classes), computed as in training."""
        return predict(self.model, self.data.test_images, self.config["precision"]).softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of any run
# ---------------------------------------------------------------------------------------------------------------------


def draw_curves(settings):
    """Draw train accuracy, train loss and test accuracy per epoch for each label: list of FinishedRun of a setting.

    Several runs of a setting: their mean, and a band from the lowest to the highest.
    """
    several = len(settings) > 1
    figure = Figure(figsize=(WIDTH, 3 + 0.17 * len(settings) * several))
    panels = figure.subplots(1, 3)
    accuracy, loss = "accuracy in %", "cross-entropy per image in nats"
    columns = {"train_accuracy": accuracy, "train_loss": loss, "test_accuracy": accuracy}
    for (label, runs), colour in zip(settings.items(), distinct_colours(len(settings)), strict=True):
        epochs = range(1, 1 + min(len(run.metrics) for run in runs))
        for panel, column in zip(panels, columns, strict=True):
            values = np.array([[run.metrics[epoch - 1][column] for epoch in epochs] for run in runs])
            style = {"marker": ".", "markersize": 4, "linewidth": 1.2, "label": label}
            panel.plot(epochs, values.mean(0), color=colour, **style)
            panel.fill_between(epochs, values.min(0), values.max(0), color=colour, alpha=0.25, linewidth=0)
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        panel.set(title=column.replace("_", " "), xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[2].sharey(panels[0])
    if several:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", fontsize=7)
    return figure


def distinct_colours(count):
    qualitative = matplotlib.colormaps["tab10"].colors
    return qualitative[:count] if count <= 10 else matplotlib.colormaps["turbo"](np.linspace(0, 1, count))


def curves(run, output_dir):
    figure = draw_curves({run.title: [run]})
    figure.suptitle(run.title)
    save_figure(figure, output_dir / "curves.png")


def confusion_matrix(labels, predicted, classes):
    """Return counts, int64 (classes, classes): true class by row, predicted class by column."""
    return torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)


def confusion(run, output_dir):
    """Draw the confusion matrix of the test images, with the accuracy of each class and of all."""
    classes, labels = run.data.classes, run.data.test_labels
    counts = confusion_matrix(labels, run.probabilities.argmax(1), len(classes)).numpy()
    percent = 100 * counts / counts.sum(1, keepdims=True)
    figure = Figure(figsize=(WIDTH, 6.4))
    axes = figure.subplots()
    image = axes.imshow(percent, cmap="Blues", vmin=0, vmax=100)
    for row, column in np.ndindex(*counts.shape):
        colour = "white" if percent[row, column] > 55 else "black"
        axes.text(column, row, int(counts[row, column]), ha="center", va="center", color=colour, fontsize=8)
    positions = range(len(classes))
    axes.set_xticks(positions, classes, rotation=45 if max(map(len, classes)) > 1 else 0, ha="center")
    axes.set_yticks(positions, classes)
    axes.set(xlabel="predicted class (numbers: images)", ylabel="true class")
    right = axes.secondary_yaxis("right")
    right.set_yticks(positions, [f"{value:.1f} %" for value in percent.diagonal()])
    right.set_ylabel("accuracy of the class")
    right.tick_params(length=0)
    figure.colorbar(image, ax=axes, label="share of the true class in %", shrink=0.8)
    accuracy = 100 * counts.diagonal().sum() / counts.sum()
    figure.suptitle(f"Confusion matrix, {accuracy:.2f} % of {counts.sum():,} test images right\n{run.title}")
    save_figure(figure, output_dir / "confusion.png")


def tile(images, columns, gap):
    """Lay images (N, H, W) out row by row; gap: empty pixels between (rows, columns).

    Returns one image with NaN in the gaps, and where the images begin: the rows' tops and the columns' left edges.
    """
    height, width = images.shape[1:]
    tops = [row * (height + gap[0]) for row in range(math.ceil(len(images) / columns))]
    lefts = [column * (width + gap[1]) for column in range(columns)]
    mosaic = np.full((tops[-1] + height, lefts[-1] + width), np.nan)
    for image, (top, left) in zip(images, itertools.product(tops, lefts), strict=False):
        mosaic[top : top + height, left : left + width] = image
    return mosaic, tops, lefts


def draw_mosaic(axes, images, titles, columns, gap, **scale):
    """Draw images (N, H, W) in gray on one axes as tile lays them out, each below its title, pixel by pixel.

    scale: vmin and vmax. Returns matplotlib's image and where the images begin, as tile does.
    """
    mosaic, tops, lefts = tile(images, columns, gap)
    for title, (top, left) in zip(titles, itertools.product(tops, lefts), strict=False):
        axes.text(left + images.shape[2] / 2 - 0.5, top - 0.6, title, ha="center", va="bottom", fontsize=7)
    axes.set_frame_on(False)
    axes.set_anchor("N")
    return axes.imshow(mosaic, cmap=GRAY, **scale), tops, lefts


def examples(run, output_dir, rows=2):
    """Draw test images of each class with the predicted class: the first ones right, then the first ones wrong."""
    data, predicted = run.data, run.probabilities.argmax(1)
    images = np.full((2 * rows, len(data.classes), *data.test_images.shape[1:]), np.nan)
    titles = np.full(images.shape[:2], "", dtype=object)
    for label in range(len(data.classes)):
        for first_row, is_right in ((0, True), (rows, False)):
            chosen = ((data.test_labels == label) & ((predicted == label) == is_right)).nonzero()[:rows, 0]
            for row, index in enumerate(chosen.tolist(), start=first_row):
                images[row, label] = data.test_images[index]
                probability = 100 * run.probabilities[index].max()
                titles[row, label] = f"{data.classes[predicted[index]]}\n{probability:.0f} %"
    figure = Figure(figsize=(WIDTH, 4.7))
    axes = figure.subplots()
    gap = (images.shape[2] * 5 // 12, images.shape[3] // 8)
    flat = images.reshape(-1, *images.shape[2:])
    _, tops, lefts = draw_mosaic(axes, flat, titles.flat, len(data.classes), gap, vmin=0, vmax=255)
    axes.set_xticks([left + images.shape[3] / 2 for left in lefts], data.classes, fontsize=8)
    axes.set_yticks([top + images.shape[2] / 2 for top in tops], ["right"] * rows + ["wrong"] * rows, fontsize=8)
    axes.tick_params(length=0)
    axes.set(xlabel="true class; above each image the predicted one and its probability", ylabel="classified")
    figure.suptitle(f"Test images, the first of each class that are classified right and wrong\n{run.title}")
    save_figure(figure, output_dir / "examples.png")


# ---------------------------------------------------------------------------------------------------------------------
# Figures of a convolutional network
# ---------------------------------------------------------------------------------------------------------------------


def filters(run, output_dir):
    """Draw conv1's 32 kernels as a 4 x 8 grid in gray, all on one scale symmetric about zero."""
    kernels = run.model.conv1.weight.detach()[:, 0].numpy()
    limit = np.abs(kernels).max()
    figure = Figure(figsize=(WIDTH, 4.2))
    axes = figure.subplots()
    titles = [f"map {number}" for number in range(len(kernels))]
    image, tops, lefts = draw_mosaic(axes, kernels, titles, columns=8, gap=(1, 1), vmin=-limit, vmax=limit)
    axes.set_xticks([left + pixel for left in lefts for pixel in (0, 4)], ["0", "4"] * len(lefts), fontsize=7)
    axes.set_yticks([top + pixel for top in tops for pixel in (0, 4)], ["0", "4"] * len(tops), fontsize=7)
    axes.set(xlabel="kernel column in pixels", ylabel="kernel row in pixels")
    figure.colorbar(image, ax=axes, label="weight", shrink=0.9)
    figure.suptitle(f"The kernels of conv1 after {len(run.metrics)} epochs\n{run.title}")
    save_figure(figure, output_dir / "filters.png")


@torch.inference_mode()
def activation_statistics(model, images, batch_size=250):
    """Return statistics of both convolution layers' activations after ReLU over uint8 images (N, H, W).

    For each layer a dict of float64 arrays: image_mean (N,), each image's mean over maps and positions; and by feature
    map mean (C,) and std (C,) over images and positions, std_across_images (C,) of the images' means over positions,
    zeros (C,) in percent.
    """
    collected = {}
    for batch in images.split(batch_size):
        for layer, maps in model.activations(model.prepare(batch)).items():
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


def activations(run, output_dir):
    """Draw activation_statistics of the test images, and write them as activations.csv."""
    statistics = activation_statistics(run.model, run.data.test_images)
    figure = Figure(figsize=(WIDTH, 5.2))
    for row, (layer, values) in zip(figure.subplots(2, 3), statistics.items(), strict=True):
        maps = np.arange(len(values["mean"]))
        mean, std = values["image_mean"].mean(), values["image_mean"].std()
        row[0].hist(values["image_mean"], bins=50, color="0.6")
        row[0].axvline(mean, color="black", linewidth=1, label=f"mean {mean:.3f}")
        row[0].axvspan(mean - std, mean + std, color="tab:blue", alpha=0.2, label=f"± std {std:.3f}")
        row[0].set(title=f"{layer}: across images", xlabel="mean activation of an image", ylabel="images")
        row[0].legend(fontsize=7)
        row[1].bar(maps, values["mean"], color="0.6", label="mean")
        row[1].vlines(
            maps, values["mean"], values["mean"] + values["std"], color="tab:blue", linewidth=1, label="+ std"
        )
        row[1].set(title=f"{layer}: per feature map", xlabel="feature map", ylabel="activation after ReLU")
        row[1].set_ylim(0, 1.35 * (values["mean"] + values["std"]).max())
        row[1].legend(fontsize=7)
        row[2].bar(maps, values["zeros"], color="0.6")
        row[2].axhline(
            values["zeros"].mean(), color="tab:blue", linewidth=1, label=f"all: {values['zeros'].mean():.1f} %"
        )
        row[2].set(
            title=f"{layer}: zeros after ReLU", xlabel="feature map", ylabel="share of zeros in %", ylim=(0, 100)
        )
        row[2].legend(fontsize=7)
    figure.suptitle(f"Activations over {len(run.data.test_images):,} test images\n{run.title}")
    save_figure(figure, output_dir / "activations.png")
    save_activations_table(statistics, output_dir / "activations.csv")


def save_activations_table(statistics, path):
    """Write a row for each feature map and one for each whole layer ('all'); zeros in percent."""
    table = []
    for layer, values in statistics.items():
        mean, spread = values["mean"], values["std"]
        overall = np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)
        rows = [("all", mean.mean(), overall, values["image_mean"].std(), values["zeros"].mean())]
        rows += zip(range(len(mean)), mean, spread, values["std_across_images"], values["zeros"], strict=True)
        table += [[layer, name, *(f"{value:.6f}" for value in numbers)] for name, *numbers in rows]
    columns = ("layer", "feature_map", "mean", "std", "std_across_images", "zeros_percent")
    write_table(table, columns, path)


# ---------------------------------------------------------------------------------------------------------------------
# The deconvolutional network of Zeiler & Fergus (2013), arXiv:1311.2901, section 2.1
# ---------------------------------------------------------------------------------------------------------------------

LAYERS = ("conv1", "pool1", "conv2", "pool2")
CONVOLUTIONS = ("conv1", "conv2")
POOL = 2  # height, width and stride of a pooling window


def maps_and_switches(model, inputs):
    """Return the rectified maps (N, C, H, W) of each of LAYERS, and each pooling's switches: where its maxima stood.

    inputs: float32 (N, 1, H, W). ReLU comes before pooling here, as in the paper, whatever order training uses.
    """
    maps, switches = model.activations(inputs), {}
    for number in (1, 2):
        pool = f"pool{number}"
        maps[pool], switches[pool] = F.max_pool2d(maps[f"conv{number}"], POOL, return_indices=True)
    return maps, switches


def project_back(model, layer, maps, switches):
    """Project activations (N, C, H, W) of one of LAYERS back to pixels, float32 (N, 1, H, W), as in section 2.1.

    Layer by layer: unpool with the switches, rectify, filter with the transposed kernels; no biases anywhere, and
    the pixels are not rectified.
    """
    for name in reversed(LAYERS[: LAYERS.index(layer) + 1]):
        if name in switches:
            maps = F.max_unpool2d(maps, switches[name], POOL)
        else:
            convolution = getattr(model, name)
            maps = F.conv_transpose2d(F.relu(maps), convolution.weight, padding=convolution.padding)
    return maps


def strongest_alone(maps, feature_maps):
    """Return maps (N, C, H, W) with one value kept an image: the strongest of its map in feature_maps, int64 (N,)."""
    images, kept = torch.arange(len(maps)), torch.zeros(maps.shape)
    strengths, positions = maps[images, feature_maps].flatten(1).max(1)
    kept.flatten(2)[images, feature_maps, positions] = strengths
    return kept


@torch.inference_mode()
def deconvolve(model, inputs, layer, feature_maps):
    """Show what excites a feature map most: project its strongest activation back to pixels (section 2.1).

    inputs: float32 (N, 1, H, W); layer: one of LAYERS; feature_maps: int64 (N,), one an image.
    Returns float32 (N, 1, H, W).
    """
    maps, switches = maps_and_switches(model, inputs)
    return project_back(model, layer, strongest_alone(maps[layer], feature_maps), switches)


class Exciting(NamedTuple):
    """The images that excite each feature map of a layer most, strongest first, each (count, C).

    strengths: float32 activations; images: int64 numbers; positions: int64, row * width + column in the map.
    """

    strengths: torch.Tensor
    images: torch.Tensor
    positions: torch.Tensor


@torch.inference_mode()
def most_exciting(model, images, count=9, batch_size=250):
    """Return for both convolution layers the Exciting ones of uint8 images (N, H, W), found in one pass over them."""
    collected = {}
    for batch in images.split(batch_size):
        for layer, maps in model.activations(model.prepare(batch)).items():
            strongest = F.max_pool2d(maps, maps.shape[2:], return_indices=True)
            collected.setdefault(layer, []).append([values.flatten(1) for values in strongest])
    found = {}
    for layer, batches in collected.items():
        strengths, positions = (torch.cat(parts) for parts in zip(*batches, strict=True))  # each (N, C)
        strengths, numbers = strengths.topk(count, dim=0)
        found[layer] = Exciting(strengths, numbers, positions.gather(0, numbers))
    return found


def receptive_field(model, layer):
    """Return (size, stride, offset) in pixels: unit i of the layer sees the pixels from offset + stride * i on."""
    size, stride, offset = 1, 1, 0
    for name in LAYERS[: LAYERS.index(layer) + 1]:
        if hasattr(model, name):
            convolution = getattr(model, name)
            kernel, step, padding = convolution.kernel_size[0], convolution.stride[0], convolution.padding[0]
        else:
            kernel, step, padding = POOL, POOL, 0
        offset -= padding * stride
        size += (kernel - 1) * stride
        stride *= step
    return size, stride, offset


def cut_patches(model, layer, images, positions):
    """Cut the receptive field of a unit out of each image (N, H, W): float32 (N, size, size), NaN outside the image.

    positions: int64 (N,), the units, row * width + column in a map of the layer.
    """
    size, stride, offset = receptive_field(model, layer)
    padded = F.pad(images.float(), (size,) * 4, value=math.nan)
    width = images.shape[2] // stride
    corners = [(size + offset + stride * int(p // width), size + offset + stride * int(p % width)) for p in positions]
    pairs = zip(padded, corners, strict=True)
    return torch.stack([image[top : top + size, left : left + size] for image, (top, left) in pairs])


def exciting_patches(model, layer, images, exciting, feature_maps):
    """Return the reconstructions from the images that excite some feature maps most, and these images' patches.

    feature_maps: int64 (M,). Both float32 (M, count, size, size), cut to the units' receptive fields.
    """
    chosen = [values[:, feature_maps].T.flatten() for values in (exciting.images, exciting.positions)]
    images, positions = images[chosen[0]], chosen[1]
    repeated = feature_maps.repeat_interleave(len(exciting.images))
    reconstructions = deconvolve(model, model.prepare(images), layer, repeated).squeeze(1)
    patches = [cut_patches(model, layer, pictures, positions) for pictures in (reconstructions, images)]
    return [cut.unflatten(0, (len(feature_maps), -1)) for cut in patches]


def scaled(images):
    """Divide each of the images (..., H, W) by its largest absolute value, NaN aside: black is -1, white 1."""
    return images / images.nan_to_num().abs().amax((-2, -1), keepdim=True).clamp(min=1e-12)


def draw_pairs(reconstructions, patches, titles, columns=4):
    """Draw each feature map's reconstructions, on a scale of their own, beside the patches, both (M, 9, size, size)."""
    blocks, gray = [], scaled(reconstructions.flatten(1, 2)).view_as(reconstructions)
    for pair in zip(0.5 + 0.5 * gray, patches / 255, strict=True):
        left, right = (tile(pictures.numpy(), columns=3, gap=(1, 1))[0] for pictures in pair)
        blocks.append(np.hstack([left, np.full((len(left), 2), np.nan), right]))
    height, width = blocks[0].shape
    gap = (max(5, height // 5), max(3, width // 20))
    inches = len(blocks) / columns * (height + gap[0]) * WIDTH / (columns * (width + gap[1]))
    figure = Figure(figsize=(WIDTH, inches + 0.9))
    axes = figure.subplots()
    draw_mosaic(axes, np.stack(blocks), titles, columns, gap, vmin=0, vmax=1)
    axes.set(xticks=[], yticks=[])
    scales = "left: reconstructions, black to white from -m to m, m the map's largest value; right: patches, 0 to 255"
    axes.set_xlabel(scales, fontsize=8)
    return figure


def deconv(run, output_dir, maps_a_figure=32):
    """Draw, as in Fig. 2, each feature map's nine most exciting test images: reconstructions beside patches."""
    images = run.data.test_images
    for layer, exciting in most_exciting(run.model, images).items():
        for maps in torch.arange(exciting.images.shape[1]).split(maps_a_figure):
            pairs = exciting_patches(run.model, layer, images, exciting, maps)
            figure = draw_pairs(*pairs, [f"{layer}, map {number}" for number in maps])
            figure.suptitle(f"What excites the feature maps of {layer} most, nine test images each\n{run.title}")
            save_figure(figure, output_dir / f"deconv_{layer}_{maps[0]}-{maps[-1]}.png")


EVOLUTION_EPOCHS = (0, 1, 2, 5, 10)


def evolving_patches(models, images, maps):
    """Return each model's strongest reconstruction of some feature maps: the best image is sought anew for each model.

    images: uint8 (N, H, W); maps: int64 (M,) by layer. Returns by layer the reconstructions, float32
    (M, models, size, size) cut to the receptive field, and the strengths, float32 (M, models).
    """
    found = {layer: [] for layer in maps}
    for model in models:
        for layer, exciting in most_exciting(model, images, count=1).items():
            reconstructions, _ = exciting_patches(model, layer, images, exciting, maps[layer])
            found[layer].append((reconstructions[:, 0], exciting.strengths[0, maps[layer]]))
    return {layer: [torch.stack(parts, 1) for parts in zip(*pairs, strict=True)] for layer, pairs in found.items()}


def evolution(run, output_dir, count=8):
    """Draw, as in Fig. 4, the strongest reconstruction of some feature maps of each layer after several epochs."""
    epochs = [epoch for epoch in EVOLUTION_EPOCHS if epoch <= len(run.metrics)]
    channels = {layer: getattr(run.model, layer).out_channels for layer in CONVOLUTIONS}
    maps = {layer: torch.linspace(0, last - 1, count).long() for layer, last in channels.items()}
    evolved = evolving_patches([run.snapshot(epoch) for epoch in epochs], run.data.test_images, maps)
    figure = Figure(figsize=(WIDTH, 6.9))
    for axes, (layer, (pictures, strengths)) in zip(figure.subplots(1, 2), evolved.items(), strict=True):
        pictures, size = scaled(pictures.flatten(0, 1)), pictures.shape[-1]
        titles = [f"{strength:.2g}" for strength in strengths.flatten()]
        gap = (math.ceil(size / 4), math.ceil(size / 7))
        _, tops, lefts = draw_mosaic(axes, pictures.numpy(), titles, len(epochs), gap, vmin=-1, vmax=1)
        axes.set_xticks([left + size / 2 - 0.5 for left in lefts], epochs)
        axes.set_yticks([top + size / 2 - 0.5 for top in tops], [f"map {number}" for number in maps[layer]])
        axes.tick_params(length=0)
        axes.set(xlabel="after epoch (0: untrained)", ylabel="feature map")
        axes.set_title(f"{layer}; above each: the activation", pad=14)
    figure.suptitle(f"Strongest reconstructions as training goes on, each on its own scale about zero\n{run.title}")
    save_figure(figure, output_dir / "evolution.png")


# ---------------------------------------------------------------------------------------------------------------------
# Invariance, occlusion and ablation, after Zeiler & Fergus (2013), and Gabor functions
# ---------------------------------------------------------------------------------------------------------------------

# The amounts of Fig. 5: pixels downwards, times as large, degrees counterclockwise.
TRANSFORMATIONS = {
    "vertical shift in pixels": torch.arange(-8.0, 9.0),
    "scale": torch.linspace(1, 1.8, 17),
    "rotation in degrees": torch.arange(0.0, 361.0, 15.0),
}


def transform(inputs, kind, amount):
    """Return inputs (N, 1, H, W) shifted, scaled or turned about their centre; black comes in from outside.

    kind: one of TRANSFORMATIONS; amount: in its unit.
    """
    shift, scale, angle = 0.0, 1.0, 0.0
    if kind == "scale":
        scale = float(amount)
    elif kind == "rotation in degrees":
        angle = math.radians(amount)
    else:
        shift = -2 * float(amount) / inputs.shape[2]
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    affine = torch.tensor([[cos, -sin, 0], [sin, cos, shift]]).expand(len(inputs), 2, 3)
    return F.grid_sample(inputs, F.affine_grid(affine, inputs.shape, align_corners=False), align_corners=False)


@torch.inference_mode()
def sensitivity(model, inputs, labels, kind):
    """Return how transformed images differ for the network from the untransformed ones (section 4.1).

    inputs: float32 (N, 1, H, W); labels: int64 (N,). Returns three float32 (amounts, N): the Euclidean distances of the
    first layer's features (pool1) and of the last hidden layer's (fc1), and the true class's probability.
    """

    def features(inputs):
        maps, _ = maps_and_switches(model, inputs)
        hidden = model.hidden(maps["pool2"])
        return maps["pool1"].flatten(1), hidden, model.fc2(hidden).softmax(1)

    original, rows = features(inputs), []
    for amount in TRANSFORMATIONS[kind]:
        *layers, probabilities = features(transform(inputs, kind, amount))
        distances = [(moved - still).norm(dim=1) for moved, still in zip(layers, original[:2], strict=True)]
        rows.append(torch.stack([*distances, probabilities.gather(1, labels[:, None])[:, 0]]))
    return torch.stack(rows, dim=1)


def first_right_of_each_class(run):
    """Return the number of the first test image of each class that is classified right, if none the first, int64."""
    right, labels = run.probabilities.argmax(1) == run.data.test_labels, run.data.test_labels
    members = [(labels == label).nonzero()[:, 0] for label in range(len(run.data.classes))]
    return torch.stack([numbers[right[numbers].int().argmax()] for numbers in members])


def invariance(run, output_dir):
    """Draw, as in Fig. 5, what shifting, scaling and turning an image of each class does to the network's features."""
    chosen = first_right_of_each_class(run)
    inputs, labels = run.model.prepare(run.data.test_images[chosen]), run.data.test_labels[chosen]
    figure = Figure(figsize=(WIDTH, 7))
    grid = figure.subplots(3, 4, width_ratios=(1.1, 1, 1, 1))
    for row, (kind, amounts) in zip(grid, TRANSFORMATIONS.items(), strict=True):
        shown = amounts[torch.linspace(0, len(amounts) - 1, 9).long()].tolist()
        pictures = torch.cat([transform(inputs[:1], kind, amount)[:, 0] for amount in shown]).numpy()
        gap = (pictures.shape[1] // 3, pictures.shape[2] // 8)
        draw_mosaic(row[0], pictures, [f"{amount:g}" for amount in shown], 3, gap, vmin=0, vmax=1)
        row[0].set(xticks=[], yticks=[], xlabel=kind)
        names = ("distance in pool1", "distance in fc1", "p(true class)")
        for axes, name, values in zip(row[1:], names, sensitivity(run.model, inputs, labels, kind), strict=True):
            for label, line in zip(labels, values.T, strict=True):
                colour = distinct_colours(10)[label]
                axes.plot(amounts, line, linewidth=0.9, color=colour, label=run.data.classes[label])
            axes.plot(amounts, values.mean(1), color="black", linewidth=2, label="mean")
            axes.set(xlabel=kind, ylabel=name)
            axes.set_ylim(bottom=0)
            axes.grid(alpha=0.3)
    figure.legend(*grid[0, 1].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    figure.suptitle(f"Transformed images: distance of their features from the untransformed ones\n{run.title}")
    save_figure(figure, output_dir / "invariance.png")


def occluded(inputs, size):
    """Return an image (1, 1, H, W) with a gray square of size x size pixels centred on each pixel, (H * W, 1, H, W)."""
    height, width = inputs.shape[2:]
    away = [torch.arange(n)[None] - torch.arange(n)[:, None] + size // 2 for n in (height, width)]  # centre, pixel
    rows, columns = ((distance >= 0) & (distance < size) for distance in away)
    hidden = rows[:, None, :, None] & columns[None, :, None, :]
    return torch.where(hidden.view(-1, 1, height, width), 0.5, inputs)


class Occlusion(NamedTuple):
    """What a square centred on each pixel does, each (H, W).

    probability: float32, of the true class; predicted: int64, the most probable class; activity: float32, the sum of
    feature_map, the one of conv2 that is the most active without the square.
    """

    probability: torch.Tensor
    predicted: torch.Tensor
    activity: torch.Tensor
    feature_map: int


@torch.inference_mode()
def occlude(model, inputs, label, size):
    """Slide a gray square over an image (1, 1, H, W) and return the Occlusion (section 4.2)."""
    feature_map = model.activations(inputs)["conv2"].sum((0, 2, 3)).argmax()
    probabilities, activity = [], []
    for batch in occluded(inputs, size).split(256):
        maps, _ = maps_and_switches(model, batch)
        probabilities.append(model.fc2(model.hidden(maps["pool2"])).softmax(1))
        activity.append(maps["conv2"][:, feature_map].sum((1, 2)))
    probabilities, shape = torch.cat(probabilities), inputs.shape[2:]
    found = probabilities[:, label], probabilities.argmax(1), torch.cat(activity)
    return Occlusion(*(values.view(shape) for values in found), int(feature_map))


def occlusion(run, output_dir, size=8, count=5):
    """Draw, as in Fig. 7, what hiding each part of an image from the network does, for images of five classes."""
    chosen = first_right_of_each_class(run)[:count].tolist()
    classes, colours = run.data.classes, matplotlib.colors.ListedColormap(distinct_colours(10))
    figure = Figure(figsize=(WIDTH, 1.34 * len(chosen) + 0.9))
    for row, number in zip(figure.subplots(len(chosen), 5, squeeze=False), chosen, strict=True):
        image, label = run.data.test_images[number], int(run.data.test_labels[number])
        inputs = run.model.prepare(image[None])
        found = occlude(run.model, inputs, label, size)
        reconstruction = deconvolve(run.model, inputs, "conv2", torch.tensor([found.feature_map]))[0, 0]
        limit = reconstruction.abs().max().item() or 1
        row[0].imshow(occluded(inputs, size)[image.numel() // 2 + image.shape[1] // 2, 0], cmap="gray", vmin=0, vmax=1)
        row[1].imshow(reconstruction, cmap="gray", vmin=-limit, vmax=limit)
        maps = [row[2].imshow(found.activity, cmap="viridis")]
        maps.append(row[3].imshow(found.probability, cmap="viridis", vmin=0, vmax=1))
        row[4].imshow(found.predicted, cmap=colours, vmin=-0.5, vmax=9.5)
        for axes, picture in zip(row[2:4], maps, strict=True):
            figure.colorbar(picture, ax=axes, fraction=0.046).ax.tick_params(labelsize=6)
        named = found.predicted.unique().tolist()
        handles = [matplotlib.patches.Patch(color=colours(name), label=classes[name]) for name in named]
        row[4].legend(handles=handles, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=6, handlelength=1)
        row[0].set_ylabel(classes[label])
        heads = "image, with the square", "reconstruction", "the map's activity", "p(true class)", "most probable class"
        for axes, head in zip(row, heads, strict=True):
            axes.set(xticks=[], yticks=[])
            axes.set_title(head if number == chosen[0] else "", fontsize=8)
        row[1].set_xlabel(f"conv2, map {found.feature_map}", fontsize=7, labelpad=1)
    figure.suptitle(f"A gray {size} x {size} square hides each part of the image in turn\n{run.title}")
    save_figure(figure, output_dir / "occlusion.png")


@torch.inference_mode()
def predict_without_maps(model, images, precision, batch_size=100):
    """Return the predicted classes when one feature map after the other is silenced, set to zero everywhere.

    images: uint8 (N, H, W); precision: of fc1, 'bf16' or 'fp32'. Returns int64 (32, N) for conv1, (64, N) for conv2 and
    (N,) for None, nothing silenced. What a map adds to the next layer's sums is taken off them.
    """
    collected = {"conv1": [], "conv2": [], None: []}
    kernels = model.conv2.weight
    weights = model.fc1.weight.unflatten(1, (-1, len(kernels))).permute(2, 1, 0).contiguous()  # map, position, unit
    for batch in images.split(batch_size):
        maps, _ = maps_and_switches(model, model.prepare(batch))
        sums = model.conv2(maps["pool1"])
        added = (F.conv2d(maps["pool1"][:, [k]], kernels[:, [k]], padding=2) for k in range(kernels.shape[1]))
        pooled = torch.cat([F.relu(F.max_pool2d(sums - each, POOL)) for each in added])
        with autocast("cpu", precision):
            predicted = model.fc2(model.hidden(pooled)).argmax(1)
        collected["conv1"].append(predicted.unflatten(0, (kernels.shape[1], -1)))
        added = maps["pool2"].flatten(2).movedim(1, 0) @ weights  # map, image, unit
        sums = added.sum(0) + model.fc1.bias
        collected["conv2"].append(model.fc2(F.relu(sums - added)).argmax(2))
        collected[None].append(model.fc2(F.relu(sums)).argmax(1))
    return {layer: torch.cat(pieces, dim=-1) for layer, pieces in collected.items()}


@torch.inference_mode()
def predict_without_layer(model, images, precision, layer):
    """Return the predicted classes, int64 (N,), when a whole layer ('conv1', 'conv2' or 'fc1') puts out zeros only."""
    silenced = copy.deepcopy(model)
    for parameter in getattr(silenced, layer).parameters():
        parameter.zero_()
    return predict(silenced, images, precision).argmax(1)


def class_accuracies(predicted, labels, classes):
    """Return the accuracy of each class and, last, of all images in percent, float64 (..., classes + 1).

    predicted: int64 (..., N); labels: int64 (N,).
    """
    right = (predicted == labels).double()
    groups = [labels == label for label in range(classes)] + [labels >= 0]
    return 100 * torch.stack([right[..., group].mean(-1) for group in groups], dim=-1)


def contribution(run, output_dir, strongest=10):
    """Draw the test accuracy lost when a layer or a feature map is silenced, and by class for the strongest maps.

    Table 3 asks the question by training anew without a layer, this figure by silencing what was trained.
    """
    images, labels, names = run.data.test_images, run.data.test_labels, run.data.classes
    precision = run.config["precision"]
    maps = predict_without_maps(run.model, images, precision)
    intact = class_accuracies(maps.pop(None), labels, len(names))
    lost = {layer: intact - class_accuracies(each, labels, len(names)) for layer, each in maps.items()}
    figure = Figure(figsize=(WIDTH, 8.4))
    top, middle, bottom = figure.subfigures(3, 1, height_ratios=(1, 1, 1.7))
    whole, first = top.subplots(1, 2, width_ratios=(1, 3))
    layers = ("conv1", "conv2", "fc1")
    without = torch.stack([predict_without_layer(run.model, images, precision, layer) for layer in layers])
    bars = whole.bar(layers, (intact - class_accuracies(without, labels, len(names)))[:, -1], color="0.6")
    whole.bar_label(bars, fmt="%.1f", fontsize=7)
    whole.set(title="a whole layer", ylabel="points lost")
    whole.margins(y=0.15)
    for axes, (layer, losses) in zip((first, middle.subplots()), lost.items(), strict=True):
        order = losses[:, -1].argsort(descending=True)
        axes.bar(range(len(order)), losses[order, -1], color="tab:blue" if layer == "conv1" else "tab:orange")
        axes.set_xticks(range(len(order)), order.tolist(), fontsize=6)
        axes.set(title=f"one feature map of {layer}", xlabel="feature map, ranked", ylabel="points lost")
        axes.margins(x=0.01)
    draw_class_losses(bottom.subplots(), lost, names, strongest)
    figure.suptitle(
        f"What layers and feature maps are worth: test accuracy lost when they are silenced, of {intact[-1]:.2f} %\n"
        f"{run.title}"
    )
    save_figure(figure, output_dir / "contribution.png")


def draw_class_losses(axes, lost, classes, strongest):
    """Draw what silencing costs each class, for the feature maps that cost most: a row each, strongest on top."""
    every = [(float(row[-1]), f"{layer}, map {n}", row) for layer, rows in lost.items() for n, row in enumerate(rows)]
    chosen = sorted(every, key=lambda entry: entry[0], reverse=True)[:strongest]
    values = np.stack([row.numpy() for _, _, row in chosen])
    limit = np.abs(values).max()
    image = axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
    for row, column in np.ndindex(*values.shape):
        colour = "white" if abs(values[row, column]) > 0.6 * limit else "black"
        axes.text(column, row, f"{values[row, column]:.1f}", ha="center", va="center", fontsize=7, color=colour)
    axes.axvline(len(classes) - 0.5, color="black", linewidth=1)
    axes.set_xticks(range(len(classes) + 1), [*classes, "all"], fontsize=7)
    axes.set_yticks(range(len(chosen)), [name for _, name, _ in chosen])
    axes.set(title=f"the {len(chosen)} strongest feature maps by class", xlabel="true class", ylabel="silenced")
    axes.figure.colorbar(image, ax=axes, label="accuracy lost in points")


GABOR_STARTS = 24  # for each kernel; the best fit counts
KERNELS = ("trained", "untrained", "noise")
GABOR = {"kernels": str, "feature_map": int, "r2": float, "orientation_degrees": float, "cycles_per_pixel": float}


class GaborFit(NamedTuple):
    """Gabor functions fitted to kernels: fitted, float32 (K, size, size), and for each kernel, float32 (K,):

    r2: the share of its variance that the fit explains; orientation: of the wave, in degrees from 0 to 180
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
    """Return the GaborFit of trained kernels, float32 (K, size, size), of untrained ones and of noise of equal norm."""
    noise = torch.randn(trained.shape, generator=torch.Generator().manual_seed(seed))
    noise *= trained.norm(dim=(1, 2), keepdim=True) / noise.norm(dim=(1, 2), keepdim=True)
    together = fit_gabor(torch.cat([trained, untrained, noise]))
    parts = zip(*(values.split(len(trained)) for values in together), strict=True)
    return dict(zip(KERNELS, itertools.starmap(GaborFit, parts), strict=True))


def measure_gabor(run, output_dir):
    """Return the gabor_fits of conv1's kernels, and write them as gabor.csv."""
    kernels, start = (model.conv1.weight.detach()[:, 0] for model in (run.model, run.untrained_model()))
    fits = gabor_fits(kernels, start, run.config["seed"])
    rows = [
        (name, number, *(f"{value:.6f}" for value in values))
        for name, fit in fits.items()
        for number, values in enumerate(zip(*(column.tolist() for column in fit[1:]), strict=True))
    ]
    output_dir.mkdir(exist_ok=True)
    write_table(rows, GABOR, output_dir / "gabor.csv")
    return fits


def read_gabor(folder):
    """Return the gabor.csv that measure_gabor wrote into a folder, as read_table does."""
    return read_table(folder / "gabor.csv", GABOR, lambda rows: {row["kernels"] for row in rows} == set(KERNELS))


def gabor(run, output_dir):
    """Draw each kernel of conv1, the Gabor function closest to it and what is left, and R² beside both null models."""
    fits, kernels = measure_gabor(run, output_dir), run.model.conv1.weight.detach()[:, 0]
    fit, limit = fits["trained"], kernels.abs().max().item()
    strips = torch.stack([kernels, fit.fitted, kernels - fit.fitted], dim=1)
    strips = np.stack([tile(strip.numpy(), columns=3, gap=(1, 1))[0] for strip in strips])
    numbers = zip(fit.r2.tolist(), fit.orientation.tolist(), fit.frequency.tolist(), strict=True)
    titles = [f"{n}: {r2:.2f}, {angle:.0f}°, {cycles:.2f}" for n, (r2, angle, cycles) in enumerate(numbers)]
    figure = Figure(figsize=(WIDTH, 5))
    axes, ranges = figure.subplots(1, 2, width_ratios=(3, 1))
    draw_mosaic(axes, strips, titles, 4, (3, 3), vmin=-limit, vmax=limit)
    axes.set(xticks=[], yticks=[], xlabel="kernel, fit, residual; above: number: R², orientation, cycles a pixel")
    ranges.boxplot([each.r2 for each in fits.values()], tick_labels=list(fits), widths=0.6)
    for position, each in enumerate(fits.values(), start=1):
        ranges.plot(np.linspace(position - 0.2, position + 0.2, len(each.r2)), each.r2, ".", markersize=4, alpha=0.6)
    ranges.set(title=f"R² of {len(kernels)} kernels each", xlabel="kernels", ylabel="share of variance explained")
    ranges.set_ylim(top=1)
    ranges.grid(axis="y", alpha=0.3)
    figure.suptitle(f"Gabor functions fitted to the kernels of conv1\n{run.title}")
    save_figure(figure, output_dir / "gabor.png")


# ---------------------------------------------------------------------------------------------------------------------
# Inside the recurrent networks
# ---------------------------------------------------------------------------------------------------------------------


GRADIENTS = {"step": int, "state": str, "untrained": float, "trained": float}


def gradient_norms(model, inputs, labels):
    """Return how strongly the loss depends on the top layer's state after each step: 'hidden', for an LSTM also 'cell'.

    inputs: float32 (N, steps, pixels); labels: int64 (N,). Each float32 (steps,): the Euclidean norm of the gradient of
    an image's loss with respect to the state that the next step reads (after the last one: the output), averaged over
    images. The rows are fed one at a time, so that every state stands in the graph.
    """
    state, states = None, []
    for row in inputs.split(1, dim=1):
        _, state = model.recurrent(row, state)
        states.append(state if isinstance(state, tuple) else (state,))
    losses = F.cross_entropy(model.fc(states[-1][0][-1]), labels, reduction="none")
    norms = {}
    for name, each in zip(("hidden", "cell"), zip(*states, strict=True), strict=False):
        gradients = torch.autograd.grad(losses.sum(), each, retain_graph=True, materialize_grads=True)
        norms[name] = torch.stack([gradient[-1].norm(dim=1).mean() for gradient in gradients])
    return norms


def measure_gradients(run, output_dir, images=1000):
    """Write the gradient_norms of the first test images, untrained and trained, as gradients.csv."""
    inputs, labels = run.model.prepare(run.data.test_images[:images]), run.data.test_labels[:images]
    untrained, trained = (gradient_norms(model, inputs, labels) for model in (run.untrained_model(), run.model))
    rows = [
        (step, state, f"{before:.6e}", f"{after:.6e}")
        for state in trained
        for step, (before, after) in enumerate(zip(untrained[state], trained[state], strict=True), start=1)
    ]
    output_dir.mkdir(exist_ok=True)
    write_table(rows, GRADIENTS, output_dir / "gradients.csv")


def read_gradients(folder):
    """Return the gradients.csv that measure_gradients wrote into a folder, as read_table does."""

    def is_whole(rows):
        hidden, cell = ([(step, state) for step in range(1, 29)] for state in ("hidden", "cell"))
        places = [(row["step"], row["state"]) for row in rows]
        return places in (hidden, hidden + cell) and min(rows[27]["untrained"], rows[27]["trained"]) > 0

    return read_table(folder / "gradients.csv", GRADIENTS, is_whole)


def draw_gradients(settings):
    """Draw the gradient norms of gradients.csv over the steps, by label: list of such tables, one a seed.

    Several seeds: their geometric mean and, where that stays legible, a band that spans them.
    """
    figure = Figure(figsize=(WIDTH, 4.6 + 0.17 * len(settings)))
    axes = figure.subplots()
    kinds = (("hidden", "trained"), ("hidden", "untrained"), ("cell", "trained"), ("cell", "untrained"))
    styles = dict(zip(kinds, ("-", "--", "-.", ":"), strict=True))
    for (label, tables), colour in zip(settings.items(), distinct_colours(len(settings)), strict=True):
        for (state, when), style in styles.items():
            lines = [[row[when] for row in table if row["state"] == state] for table in tables]
            norms = np.array(list(filter(None, lines)))
            if len(norms):
                norms[norms <= 0] = np.nan  # the last cell state is read by nothing
                steps = np.arange(1, norms.shape[1] + 1)
                axes.plot(steps, np.exp(np.log(norms).mean(0)), style, color=colour, linewidth=1.4)
                if len(settings) <= 3:
                    axes.fill_between(steps, norms.min(0), norms.max(0), color=colour, alpha=0.15, linewidth=0)
        axes.plot([], [], color=colour, label=label)
    for (state, when), style in styles.items():
        axes.plot([], [], style, color="black", label=f"{state} state, {when}")
    axes.set(xlabel="step: rows read", ylabel="norm of the loss gradient, mean over images", yscale="log")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7, ncols=1 if len(settings) > 3 else 2)
    return figure


def gradients(run, output_dir):
    measure_gradients(run, output_dir)
    figure = draw_gradients({run.title: [read_gradients(output_dir)]})
    figure.suptitle(f"How far back the loss reaches into the top layer's state\n{run.title}")
    save_figure(figure, output_dir / "gradients.png")


@torch.inference_mode()
def probabilities_by_row(model, inputs):
    """Return the class probabilities after each row that is read, float32 (N, steps, classes).

    inputs: float32 (N, steps, pixels). What the last layer makes of the top layer's output after that row.
    """
    outputs, _ = model.recurrent(inputs)
    return model.fc(outputs).softmax(-1)


def reading(run, output_dir, count=5):
    """Draw digits above their class probabilities as row after row is read, and the test accuracy by rows read."""
    images, labels = run.data.test_images, run.data.test_labels
    probabilities = torch.cat([probabilities_by_row(run.model, run.model.prepare(part)) for part in images.split(1000)])
    accuracies = 100 * (probabilities.argmax(2) == labels[:, None]).double().mean(0)
    chosen = first_right_of_each_class(run)[::2][:count].tolist()
    figure = Figure(figsize=(WIDTH, 6.4))
    top, bottom = figure.subfigures(2, 1, height_ratios=(2, 1))
    for number, (picture, heat) in zip(chosen, top.subplots(2, len(chosen), height_ratios=(1, 1.4)).T, strict=True):
        steps = (28.5, 0.5)
        picture.imshow(images[number], cmap="gray", vmin=0, vmax=255, extent=(0.5, 28.5, *steps))
        picture.set(xticks=[], yticks=[1, 14, 28], title=f"a {run.data.classes[labels[number]]}")
        extent = (-0.5, 9.5, *steps)
        shown = heat.imshow(probabilities[number], cmap="viridis", vmin=0, vmax=1, extent=extent, aspect="auto")
        heat.set(xticks=range(10), yticks=[1, 14, 28], xlabel="class")
        heat.tick_params(axis="x", labelsize=7)
        if number == chosen[0]:
            picture.set_ylabel("row")
            heat.set_ylabel("rows read")
    top.colorbar(shown, ax=top.axes, label="probability of the class", shrink=0.6)
    axes = bottom.subplots()
    axes.plot(range(1, len(accuracies) + 1), accuracies, marker=".", color="tab:blue")
    axes.set(xlabel="rows read", ylabel=f"accuracy in % over\n{len(labels):,} test images", ylim=(0, 100))
    axes.grid(alpha=0.3)
    figure.suptitle(f"What the network answers as it reads, row after row\n{run.title}")
    save_figure(figure, output_dir / "reading.png")


# ---------------------------------------------------------------------------------------------------------------------
# Several runs compared, by setting
# ---------------------------------------------------------------------------------------------------------------------


def group_by_setting(runs):
    """Return the runs of each setting, a list by the setting in words, one run for each seed, all in rising order.

    Runs of fewer epochs than the reference report's are a setting of their own.
    """

    def in_order(run):
        script = run.config["script"]
        return script, *(run.config[name] for name in SETTINGS[script])

    settings = {}
    for run in sorted(runs, key=in_order):
        epochs = len(run.metrics)
        label = run.setting() + (f", only {epochs} epochs" if epochs < REPORT_EPOCHS else "")
        settings.setdefault(label, {}).setdefault(run.config["seed"], run)
    return {label: list(seeds.values()) for label, seeds in settings.items()}


def reported_by(run):
    """Return the reference report's Experiment for a run's setting, None where it has none."""
    epochs = min(len(run.metrics), REPORT_EPOCHS)
    return reported_row({**run.config, "epochs": epochs}, SCRIPTS[run.config["script"]].EXPERIMENTS)


RESULTS = ("setting", "seeds", "mean", "std", "reported", "remark", "seconds_per_epoch", "parameters")


def results(settings, output_dir):
    """Write results.csv and results.md: test accuracy in percent after the report's epochs, a row for each setting."""
    rows = []
    for label, runs in settings.items():
        accuracies = [run.test_accuracy() for run in runs]
        experiment = reported_by(runs[0])
        reported = f"{experiment.reported:.2f}" if experiment and experiment.reported else ""
        spread = f"{np.std(accuracies, ddof=1):.3f}" if len(runs) > 1 else ""
        seconds = np.median([row["seconds"] for run in runs for row in run.metrics])
        figures = (f"{np.mean(accuracies):.3f}", spread, reported, experiment.remark if experiment else "")
        rows.append((label, len(runs), *figures, f"{seconds:.1f}", runs[0].config["parameters"]))
    write_table(rows, RESULTS, output_dir / "results.csv")
    alignment = ("---", "---:", "---:", "---:", "---:", "---", "---:", "---:")
    lines = [f"| {' | '.join(map(str, row))} |" for row in (RESULTS, alignment, *rows)]
    head = f"# Results\n\nTest accuracy in % after epoch {REPORT_EPOCHS}: mean and standard deviation over seeds.\n\n"
    save_text(head + "\n".join(lines) + "\n", output_dir / "results.md")


def compare_curves(settings, output_dir):
    figure = draw_curves(settings)
    seeds = max(len(runs) for runs in settings.values())
    band = f"; mean of up to {seeds} seeds, the band spans them" if seeds > 1 else ""
    figure.suptitle(f"Accuracy and loss by epoch{band}")
    save_figure(figure, output_dir / "curves.png")


COMPARED_SETTINGS = {"hidden_size": "hidden_size", "learning_rate": "lr", "optimizer": "optimizer"}


def draw_against(title, settings):
    """Draw test accuracy against a setting, one of COMPARED_SETTINGS, a line for each choice of the other settings.

    Returns None where no two runs differ in that setting alone.
    """
    name, families = COMPARED_SETTINGS[title], {}
    for runs in settings.values():
        values = families.setdefault(runs[0].setting(without=name), {})
        if len(runs[0].metrics) >= REPORT_EPOCHS and name in runs[0].config:
            values[runs[0].config[name]] = runs
    families = {label: dict(sorted(values.items())) for label, values in families.items() if len(values) > 1}
    if not families:
        return None
    figure = Figure(figsize=(WIDTH, 3.4 + 0.17 * len(families)))
    axes = figure.subplots()
    for (label, values), colour in zip(families.items(), distinct_colours(len(families)), strict=True):
        accuracies = [[run.test_accuracy() for run in runs] for runs in values.values()]
        mean = np.array([np.mean(each) for each in accuracies])
        reach = [mean - [min(each) for each in accuracies], [max(each) for each in accuracies] - mean]
        axes.errorbar(list(values), mean, reach, marker=".", capsize=3, linewidth=1.2, color=colour, label=label)
        rows = {value: reported_by(runs[0]) for value, runs in values.items()}
        reported = {value: row.reported for value, row in rows.items() if row and row.reported}
        axes.plot(list(reported), list(reported.values()), "x", color=colour)
    axes.plot([], [], "kx", label="the reference report's figure")
    if name == "lr":
        axes.set_xscale("log")
    elif name == "optimizer":
        axes.margins(x=0.3)
    else:
        axes.set_xticks(sorted({value for values in families.values() for value in values}))
    words = title.replace("_", " ")
    axes.set(xlabel=words, ylabel=f"test accuracy in % after epoch {REPORT_EPOCHS}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=7)
    figure.suptitle(f"Test accuracy by {words}; mean over seeds, the bars span them")
    return figure


def compare_against(title, settings, output_dir):
    figure = draw_against(title, settings)
    if figure:
        save_figure(figure, output_dir / f"{title}.png")


def measured_tables(settings, measure, read, fits):
    """Return the tables of the runs of each setting that have one, measured anew where that is possible.

    measure(run, folder) writes the table; read(folder) returns it; fits(run): whether it is for this kind of network.
    """
    tables = {}
    for label, runs in settings.items():
        for run in filter(fits, runs):
            if (run.folder / "checkpoint.pt").exists():
                measure(run, run.folder / "figures")
        found = [read(run.folder / "figures") for run in filter(fits, runs)]
        if any(found):
            tables[label] = [table for table in found if table]
    return tables


def compare_gradients(settings, output_dir):
    """Draw the gradient norms of all recurrent runs, measured anew where there is a checkpoint, else as written."""
    tables = measured_tables(settings, measure_gradients, read_gradients, lambda run: not run.is_cnn)
    if tables:
        figure = draw_gradients(tables)
        figure.suptitle("How far back the loss reaches into the top layer's state")
        save_figure(figure, output_dir / "gradients.png")


def compare_gabor(settings, output_dir):
    """Draw each convolutional run's median R² of Gabor functions beside those of both null models."""
    tables = measured_tables(settings, measure_gabor, read_gabor, lambda run: run.is_cnn)
    if not tables:
        return
    figure = Figure(figsize=(WIDTH, 1.4 + 0.45 * len(tables)))
    axes = figure.subplots()
    for shift, (kernels, colour) in enumerate(zip(KERNELS, distinct_colours(len(KERNELS)), strict=True)):
        for row, table in enumerate(tables.values()):
            medians = median_r2(table, kernels)
            axes.plot(medians, [row + 0.2 * (shift - 1)] * len(medians), "o", color=colour, alpha=0.6, markersize=5)
        axes.plot([], [], "o", color=colour, label=kernels)
    axes.set_yticks(range(len(tables)), tables, fontsize=7)
    axes.set(xlabel="median R² of the Gabor fits, a dot a seed")
    axes.invert_yaxis()
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=len(KERNELS), fontsize=8)
    figure.suptitle("Do conv1's kernels resemble Gabor functions?")
    save_figure(figure, output_dir / "gabor.png")


def median_r2(tables, kernels):
    """Return the median R² of some kernels (one of KERNELS) in each table of GABOR."""
    return [np.median([row["r2"] for row in table if row["kernels"] == kernels]) for table in tables]


# ---------------------------------------------------------------------------------------------------------------------
# The reference report's claims
# ---------------------------------------------------------------------------------------------------------------------

HOLDS, FAILS, UNDECIDED = "holds", "does not hold", "undecided"
ENOUGH_SEEDS = 3


def beats(these, those):
    """Return the verdict on 'these figures are above those', one figure a seed."""
    if min(len(these), len(those)) < ENOUGH_SEEDS:
        return UNDECIDED
    return HOLDS if min(these) > max(those) else FAILS if max(these) < min(those) else UNDECIDED


def similar(these, those, tolerance=1.0):
    """Return the verdict on 'the means of these figures and those differ by at most one point'."""
    if min(len(these), len(those)) < ENOUGH_SEEDS:
        return UNDECIDED
    return HOLDS if abs(np.mean(these) - np.mean(those)) <= tolerance else FAILS


def all_of(verdicts):
    """Return the verdict on a claim of several parts."""
    return FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS


class Measured:
    """What the runs on real data say about the report's settings: figures by seed, looked up by setting."""

    def __init__(self, settings):
        self.settings = [
            runs
            for runs in settings.values()
            if runs[0].config["data_source"] == "real" and len(runs[0].metrics) >= REPORT_EPOCHS
        ]

    def runs(self, **wanted):
        """The runs of the one setting of the report that is as wanted; empty where nothing was run."""
        for runs in self.settings:
            if reported_by(runs[0]) and all(runs[0].config.get(name) == value for name, value in wanted.items()):
                return runs
        return []

    def accuracy(self, **wanted):
        return [run.test_accuracy() for run in self.runs(**wanted)]

    def cnn(self, dataset="cifar10", lr=1e-4, optimizer="adam"):
        return self.accuracy(script="cnn_cifar10", dataset=dataset, lr=lr, optimizer=optimizer)

    def rnn(self, cell="rnn", hidden_size=30, lr=1e-3, optimizer="adam"):
        return self.accuracy(script="rnn_mnist", cell=cell, hidden_size=hidden_size, lr=lr, optimizer=optimizer)


def comparison(name, these, other, those, verdict=beats, form=".2f %"):
    """Return (what was measured in words, the verdict) for two lists of figures, one a seed; form: digits and unit."""
    relation = "against" if verdict is beats else "similar to"
    return f"{name} {span(these, form)} {relation} {other} {span(those, form)}", verdict(these, those)


def span(figures, form):
    if not figures:
        return "(not measured)"
    digits, _, unit = form.partition(" ")
    low, mean, high = (format(value, digits) for value in (min(figures), np.mean(figures), max(figures)))
    seeds = f"{low} to {high}, {len(figures)} seeds" if len(figures) > 1 else "one seed"
    return f"{mean}{' ' * bool(unit)}{unit} ({seeds})"


def claim_optimizer(m):
    yield comparison("LeNet-5 with Adam", m.cnn(), "SGD", m.cnn(optimizer="sgd"))
    yield comparison("RNN 5 with Adam", m.rnn(hidden_size=5), "SGD", m.rnn(hidden_size=5, optimizer="sgd"))


def claim_cnn_rate(m):
    yield comparison("learning rate 1e-4", m.cnn(), "1e-3", m.cnn(lr=1e-3))
    yield comparison("1e-4", m.cnn(), "1e-3", m.cnn(lr=1e-3), similar)


def claim_rnn_rate(m):
    for rate in (1e-1, 1e-4, 1e-5):
        yield comparison("learning rate 1e-3", m.rnn(hidden_size=5), f"{rate:g}", m.rnn(hidden_size=5, lr=rate))


def claim_hidden_size(m):
    for cell, small, large in (("rnn", 5, 10), ("rnn", 10, 20), ("rnn", 20, 30), ("gru", 20, 30)):
        more, fewer = m.rnn(cell, large), m.rnn(cell, small)
        yield comparison(f"{cell.upper()} {large}", more, f"{cell.upper()} {small}", fewer)
    yield comparison("marginally: GRU 30", m.rnn("gru", 30), "GRU 20", m.rnn("gru", 20), similar)
    yield comparison("LSTM 30", m.rnn("lstm", 30), "LSTM 20", m.rnn("lstm", 20), similar)


def claim_epochs(m):
    for runs in m.settings:
        if reported_by(runs[0]):
            late, early = ([run.test_accuracy(epoch) for run in runs] for epoch in (REPORT_EPOCHS, 1))
            yield comparison(f"{runs[0].setting()}: epoch {REPORT_EPOCHS}", late, "epoch 1", early)


def claim_gates(m):
    for cell in ("gru", "lstm"):
        for size in (20, 30):
            yield comparison(f"{cell.upper()} {size}", m.rnn(cell, size), f"RNN {size}", m.rnn("rnn", size))


def claim_cost(m):
    lstm, gru = (m.runs(script="rnn_mnist", cell=cell, hidden_size=30) for cell in ("lstm", "gru"))
    for name, form, measure in (
        ("parameters", ",.0f parameters", lambda run: run.config["parameters"]),
        ("time", ".1f s an epoch", lambda run: np.median([row["seconds"] for row in run.metrics])),
    ):
        more, less = [measure(run) for run in lstm], [measure(run) for run in gru]
        verdict = beats(more, less)
        surprise = "; on this processor the GRU is the slower one" if name == "time" and verdict == FAILS else ""
        yield f"{name}: LSTM {span(more, form)} against GRU {span(less, form)}{surprise}", verdict


def claim_cnn_wins(m):
    cnn = m.cnn("mnist")
    for cell in ("rnn", "gru", "lstm"):
        yield comparison("LeNet-5", cnn, f"{cell.upper()} 30", m.rnn(cell))
    yield comparison("GRU 30", m.rnn("gru"), "LeNet-5", cnn, similar)


def claim_gabor(m):
    runs = m.runs(script="cnn_cifar10", dataset="cifar10", lr=1e-4, optimizer="adam")
    tables = [table for run in runs if (table := read_gabor(run.folder / "figures"))]
    trained, *nulls = (median_r2(tables, kernels) for kernels in KERNELS)
    for name, null in zip(KERNELS[1:], nulls, strict=True):
        yield comparison("median R² of the trained kernels", trained, name, null, form=".3f")


def claim_gradients(m):
    def reaches(cell, when):
        runs = m.runs(script="rnn_mnist", cell=cell, hidden_size=30)
        tables = [read_gradients(run.folder / "figures") for run in runs]
        return [reach(table, when) for table in tables if table]

    for when in ("untrained", "trained"):
        for cell in ("gru", "lstm"):
            words = f"{when} {cell.upper()}: the share of the last step's gradient norm left at the first"
            yield comparison(words, reaches(cell, when), f"{when} RNN", reaches("rnn", when), form=".2g")


def reach(table, when):
    """Return the gradient norm at the first step, of an LSTM's two states the larger, over the last hidden state's."""
    last = max(row["step"] for row in table)
    first = max(row[when] for row in table if row["step"] == 1)
    return first / next(row[when] for row in table if row["step"] == last and row["state"] == "hidden")


CLAIMS = {
    "Adam beats SGD on both tasks.": claim_optimizer,
    "On the CNN a learning rate of 1e-4 is the best, and 1e-3 is similar.": claim_cnn_rate,
    "For the RNN 1e-3 is the best rate among 1e-1, 1e-3, 1e-4 and 1e-5.": claim_rnn_rate,
    "More hidden nodes give more accuracy, the GRU marginally; in the LSTM 20 and 30 are similar.": claim_hidden_size,
    "More epochs give more accuracy.": claim_epochs,
    "GRU and LSTM beat the plain RNN.": claim_gates,
    "The LSTM costs more than the GRU.": claim_cost,
    "On MNIST the CNN beats all three, the GRU nearly its equal.": claim_cnn_wins,
    "The CNN's first kernels resemble Gabor filters, better than untrained ones and noise do.": claim_gabor,
    "Gradients reach further back in the gated cells.": claim_gradients,
}


def claims(settings, output_dir):
    """Write claims.md: each claim of the report, what was measured, and the verdict that follows from it."""
    measured = Measured(settings)
    text = [
        "# The claims of the reference report",
        f"Test accuracy after epoch {REPORT_EPOCHS} on the real data: mean (lowest to highest seed). The rule: one "
        "beats the other when its every seed is above the other's every seed, and does not when it is the other way "
        "round; else it is undecided. Similar: the means lie within one point. Fewer than three seeds decide nothing. "
        "A claim of several parts holds when all hold, and does not when one does not.",
    ]
    for number, (claim, measurements) in enumerate(CLAIMS.items(), start=1):
        parts = list(measurements(measured))
        verdict = all_of([verdict for _, verdict in parts]) if parts else UNDECIDED
        text += [f"## {number}. {claim}", "\n".join(f"- {words}: {part}" for words, part in parts)]
        text += [f"**Verdict: {verdict}.**"]
    save_text("\n\n".join(text) + "\n", output_dir / "claims.md")


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

ANY = (curves, confusion, examples)
CNN = (filters, activations, deconv, evolution, invariance, occlusion, contribution, gabor)
RNN = (gradients, reading)
FIGURES = {function.__name__: function for function in (*ANY, *CNN, *RNN)}
COMPARISONS = {
    "results": results,
    "curves": compare_curves,
    **{title: partial(compare_against, title) for title in COMPARED_SETTINGS},
    "gabor": compare_gabor,
    "gradients": compare_gradients,
    "claims": claims,
}


def save_figure(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png")
    # A palette takes a third of the bytes.
    picture = Image.open(content).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
    content = io.BytesIO()
    picture.save(content, format="png", optimize=True)
    write_atomically(path, content.getvalue())
    tqdm.write(str(path))


def save_text(text, path):
    write_atomically(path, text.encode())
    tqdm.write(str(path))


def read_table(path, columns, is_whole):
    """Return a table that write_table wrote as a list of dict, empty where there is none; raises InputError if damaged.

    columns: the type by name; is_whole(rows): whether nothing is missing.
    """
    if not path.is_file():
        return []
    with suppress(KeyError, ValueError, TypeError), open(path, newline="") as file:
        rows = [{name: kind(row[name]) for name, kind in columns.items()} for row in csv.DictReader(file)]
        finite = all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))
        if finite and is_whole(rows):
            return rows
    raise InputError(f"{path} is damaged; delete it, or write it anew with --figures {path.stem}")


def write_table(rows, columns, path):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    save_text(table.getvalue(), path)


def visualize_run(run, names, output_dir):
    """Draw a run's figures, by default all that its kind of network has."""
    kind, script = (CNN, "cnn_cifar10.py") if run.is_cnn else (RNN, "rnn_mnist.py")
    fitting = [function.__name__ for function in ANY + kind]
    for name in names or []:
        if name not in FIGURES:
            raise InputError(f"the figure {name} compares several runs; name more of them, or a folder of runs")
        if name not in fitting:
            raise InputError(f"{run.folder} is a run of {script} and has no figure {name}; it has {', '.join(fitting)}")
    if run.config["data_source"] == "synthetic":
        print(synthetic_notice(run.config["dataset"]))
    chosen = dict.fromkeys(names or fitting)
    if chosen.keys() != {"curves"}:
        run.model  # noqa: B018, an unusable checkpoint is told before the first figure
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in tqdm(chosen, unit="figure", leave=False, disable=None):
        FIGURES[name](run, output_dir)


def compare_runs(runs, names, output_dir):
    """Compare several runs by their settings, by default in every way."""
    unfit = [name for name in names or [] if name not in COMPARISONS]
    if unfit:
        raise InputError(f"the figure {unfit[0]} takes a single run; several are compared by {', '.join(COMPARISONS)}")
    settings = group_by_setting(runs)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in tqdm(dict.fromkeys(names or COMPARISONS), unit="figure", leave=False, disable=None):
        COMPARISONS[name](settings, output_dir)


def find_runs(folder):
    """Return the runs below folder that have finished an epoch, sorted; folders named reference are passed over."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; name a run's folder, such as runs/cnn_cifar10/NAME, or runs")
    inside = (path.parent for path in sorted(folder.rglob("metrics.csv")))
    runs = [FinishedRun(path) for path in inside if "reference" not in path.relative_to(folder).parts]
    if not runs:
        raise InputError(f"{folder} holds no run with a config.json and metrics.csv; train one first")
    return runs


def main():
    matplotlib.rcParams.update(STYLE, **{"figure.constrained_layout.use": True})
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", type=folder_name, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument(
        "--figures", nargs="+", choices=tuple(FIGURES | COMPARISONS), metavar="NAME", help="default: all that fit"
    )
    parser.add_argument("--output-dir", type=folder_name, help="default: RUN/figures; of several, FOLDER/comparison")
    args = parser.parse_args()
    first, *others = folders = [Path(name) for name in args.runs]
    if not others and (first / "config.json").exists():
        visualize_run(FinishedRun(first), args.figures, Path(args.output_dir or first / "figures"))
        return
    runs = []
    for folder in folders:
        runs += [FinishedRun(folder)] if (folder / "config.json").exists() else find_runs(folder)
    comparison = (Path("runs") if others else first) / "comparison"
    compare_runs(runs, args.figures, Path(args.output_dir or comparison))


if __name__ == "__main__":
    run_script(main)
