"""Draw what trained networks learned, from the folders of finished runs.

    python visualize.py runs/cnn_cifar10/NAME                      every figure of a run, into its figures/ folder
    python visualize.py runs/cnn_cifar10/NAME --figures filters    only the ones named
    python visualize.py runs                                       all runs compared, into runs/comparison/

Figures of any run: curves, confusion, examples; of a convolutional network also: filters, activations.
"""

import csv
import io
import math
from functools import cached_property
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

import cnn_cifar10
import rnn_mnist
from utils import (
    DATASET_TITLES,
    ArgumentParser,
    InputError,
    load_checkpoint,
    load_data,
    predict,
    read_config,
    read_metrics,
    restore,
    run_script,
    synthetic_notice,
    write_atomically,
)

BUILDERS = {"cnn_cifar10": cnn_cifar10.build_model, "rnn_mnist": rnn_mnist.build_model}
STYLE = {
    "font.size": 9,
    "axes.titlesize": 9,
    "figure.titlesize": 10,
    "savefig.dpi": 160,
    "legend.frameon": False,
}
WIDTH = 8  # inches, of every figure


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
        """The run in words: network, data set, training."""
        config = self.config
        network = "LeNet-5" if self.is_cnn else f"{config['cell'].upper()} with {config['hidden_size']} hidden units"
        source = "" if config["data_source"] == "real" else "synthetic data in place of "
        training = [config["optimizer"].upper().replace("ADAM", "Adam"), f"learning rate {config['lr']:g}"]
        training += [f"momentum {config['momentum']:g}"] if config["momentum"] else []
        training += [f"batch {config['batch_size']}", f"seed {config['seed']}"]
        return f"{network} on {source}{DATASET_TITLES[config['dataset']]}, {', '.join(training)}"

    @cached_property
    def metrics(self):
        return read_metrics(self.folder)

    @cached_property
    def model(self):
        """The trained network; its weights are the last epoch's."""
        model = BUILDERS[self.config["script"]](self.config)
        restore(load_checkpoint(self.folder), model)
        return model

    @cached_property
    def data(self):
        config = self.config
        return load_data(config["dataset"], config["data_source"], config["data_dir"])

    @cached_property
    def probabilities(self):
        """Class probabilities of the test images, float32 (N, classes), computed as in training."""
        return predict(self.model, self.data.test_images, self.config["precision"]).softmax(dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# Figures of any run
# ---------------------------------------------------------------------------------------------------------------------


def draw_curves(runs):
    """Draw train accuracy, train loss and test accuracy per epoch, one line for each FinishedRun."""
    several = len(runs) > 1
    figure = Figure(figsize=(WIDTH, 3 + 0.17 * len(runs) * several))
    panels = figure.subplots(1, 3)
    accuracy, loss = "accuracy in %", "cross-entropy per image in nats"
    columns = {"train_accuracy": accuracy, "train_loss": loss, "test_accuracy": accuracy}
    colours = matplotlib.colormaps["tab10"].colors
    if len(runs) > len(colours):
        colours = matplotlib.colormaps["turbo"](np.linspace(0, 1, len(runs)))
    for run, colour in zip(runs, colours, strict=False):
        epochs = [row["epoch"] for row in run.metrics]
        for panel, column in zip(panels, columns, strict=True):
            values = [row[column] for row in run.metrics]
            panel.plot(epochs, values, marker=".", markersize=4, linewidth=1.2, color=colour, label=run.title)
    for panel, (column, label) in zip(panels, columns.items(), strict=True):
        panel.set(title=column.replace("_", " "), xlabel="epoch", ylabel=label)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.grid(alpha=0.3)
    panels[2].sharey(panels[0])
    if several:
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", fontsize=7)
    return figure


def curves(run, output_dir):
    figure = draw_curves([run])
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


def draw_mosaic(axes, images, titles, columns, gap, **scale):
    """Draw images (N, H, W) in gray on one axes, each below its title, pixel by pixel.

    gap: empty pixels between (rows, columns); scale: vmin and vmax. Returns matplotlib's image and where the images
    begin, in pixels: the rows' tops and the columns' left edges.
    """
    height, width = images.shape[1:]
    tops = [row * (height + gap[0]) for row in range(math.ceil(len(images) / columns))]
    lefts = [column * (width + gap[1]) for column in range(columns)]
    mosaic = np.full((tops[-1] + height, lefts[-1] + width), np.nan)
    for number, (image, title) in enumerate(zip(images, titles, strict=True)):
        top, left = tops[number // columns], lefts[number % columns]
        mosaic[top : top + height, left : left + width] = image
        axes.text(left + width / 2 - 0.5, top - 0.6, title, ha="center", va="bottom", fontsize=7)
    axes.set_frame_on(False)
    return axes.imshow(mosaic, cmap="gray", interpolation="nearest", **scale), tops, lefts


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
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["layer", "feature_map", "mean", "std", "std_across_images", "zeros_percent"])
    for layer, values in statistics.items():
        mean, spread = values["mean"], values["std"]
        overall = np.sqrt((spread**2 + mean**2).mean() - mean.mean() ** 2)
        rows = [("all", mean.mean(), overall, values["image_mean"].std(), values["zeros"].mean())]
        rows += zip(range(len(mean)), mean, spread, values["std_across_images"], values["zeros"], strict=True)
        writer.writerows([layer, name, *(f"{value:.6f}" for value in numbers)] for name, *numbers in rows)
    write_atomically(path, table.getvalue().encode())


# ---------------------------------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------------------------------

FIGURES = {function.__name__: function for function in (curves, confusion, examples, filters, activations)}
CNN_FIGURES = {"filters", "activations"}


def save_figure(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    print(path)


def visualize_run(run, names, output_dir):
    """Draw a run's figures, by default all that its kind of network has."""
    unfit = CNN_FIGURES.intersection(names or []) if not run.is_cnn else set()
    if unfit:
        raise InputError(f"the figure {min(unfit)} needs a run of cnn_cifar10.py, and {run.folder} is not one")
    if run.config["data_source"] == "synthetic":
        print(synthetic_notice(run.config["dataset"]))
    chosen = names or [name for name in FIGURES if run.is_cnn or name not in CNN_FIGURES]
    if set(chosen) != {"curves"}:
        run.model  # noqa: B018, an unusable checkpoint is told before the first figure
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(chosen):
        FIGURES[name](run, output_dir)


def compare_runs(runs, names, output_dir):
    """Draw several runs' curves in one figure."""
    unfit = [name for name in names or [] if name != "curves"]
    if unfit:
        raise InputError(f"the figure {unfit[0]} takes a single run; several runs are compared by curves")
    figure = draw_curves(runs)
    figure.suptitle(f"Accuracy and loss of {len(runs)} runs")
    output_dir.mkdir(parents=True, exist_ok=True)
    save_figure(figure, output_dir / "curves.png")


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
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument("--figures", nargs="+", choices=tuple(FIGURES), metavar="NAME", help="default: all that fit")
    parser.add_argument("--output-dir", type=Path, help="default: RUN/figures, or FOLDER/comparison for several runs")
    args = parser.parse_args()
    first = args.runs[0]
    if len(args.runs) == 1 and (first / "config.json").exists():
        visualize_run(FinishedRun(first), args.figures, args.output_dir or first / "figures")
        return
    runs = []
    for folder in args.runs:
        runs += [FinishedRun(folder)] if (folder / "config.json").exists() else find_runs(folder)
    comparison = (first if len(args.runs) == 1 else Path("runs")) / "comparison"
    compare_runs(runs, args.figures, args.output_dir or comparison)


if __name__ == "__main__":
    run_script(main)
