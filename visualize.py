"""Draw what trained networks learned, from the folders of finished runs.

    python visualize.py runs/cnn_cifar10/NAME                      every figure of a run, into its figures/ folder
    python visualize.py runs/cnn_cifar10/NAME --figures filters    only the ones named
    python visualize.py runs                                       all runs compared, into runs/comparison/

Figures of any run: curves, confusion, examples; of a convolutional network also: filters, activations.
"""

import csv
import io
import math
from functools import cached_property, partial
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
    REPORT_EPOCHS,
    ArgumentParser,
    InputError,
    load_checkpoint,
    load_data,
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
# Several runs compared, by setting
# ---------------------------------------------------------------------------------------------------------------------


def group_by_setting(runs):
    """Return the runs of each setting, a list by the setting in words, one run for each seed, all in rising order.

    Runs of fewer epochs than the reference report's are a setting of their own.
    """
    settings = {}
    for run in sorted(runs, key=lambda run: [run.config[name] for name in ("script", *run.config["defining"])]):
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


def comparison(name, these, other, those, verdict=beats):
    """Return (what was measured in words, the verdict) for two lists of figures in percent, one a seed."""
    relation = "against" if verdict is beats else "similar to"
    return f"{name} {span(these)} {relation} {other} {span(those)}", verdict(these, those)


def span(figures, unit="%", form=".2f"):
    if not figures:
        return "(not run)"
    low, mean, high = (format(value, form) for value in (min(figures), np.mean(figures), max(figures)))
    return f"{mean} {unit} ({low} to {high}, {len(figures)} seeds)" if len(figures) > 1 else f"{mean} {unit} (one seed)"


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
        yield comparison(f"{cell.upper()} with {large} hidden units", more, f"{small}", fewer)
    yield comparison("GRU with 30", m.rnn("gru", 30), "20, marginally better", m.rnn("gru", 20), similar)
    yield comparison("LSTM with 30", m.rnn("lstm", 30), "20", m.rnn("lstm", 20), similar)


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
    for name, unit, form, measure in (
        ("parameters", "parameters", ",.0f", lambda run: run.config["parameters"]),
        ("time", "s an epoch", ".1f", lambda run: np.median([row["seconds"] for row in run.metrics])),
    ):
        more, less = [measure(run) for run in lstm], [measure(run) for run in gru]
        verdict = beats(more, less)
        surprise = "; on this processor the GRU is the slower one" if name == "time" and verdict == FAILS else ""
        yield f"{name}: LSTM {span(more, unit, form)} against GRU {span(less, unit, form)}{surprise}", verdict


def claim_cnn_wins(m):
    cnn = m.cnn("mnist")
    for cell in ("rnn", "gru", "lstm"):
        yield comparison("LeNet-5", cnn, f"{cell.upper()} 30", m.rnn(cell))
    yield comparison("GRU 30", m.rnn("gru"), "LeNet-5", cnn, similar)


CLAIMS = {
    "Adam beats SGD on both tasks.": claim_optimizer,
    "On the CNN a learning rate of 1e-4 is the best, and 1e-3 is similar.": claim_cnn_rate,
    "For the RNN 1e-3 is the best rate among 1e-1, 1e-3, 1e-4 and 1e-5.": claim_rnn_rate,
    "More hidden nodes give more accuracy, the GRU marginally; in the LSTM 20 and 30 are similar.": claim_hidden_size,
    "More epochs give more accuracy.": claim_epochs,
    "GRU and LSTM beat the plain RNN.": claim_gates,
    "The LSTM costs more than the GRU.": claim_cost,
    "On MNIST the CNN beats all three, the GRU nearly its equal.": claim_cnn_wins,
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

FIGURES = {function.__name__: function for function in (curves, confusion, examples, filters, activations)}
CNN_FIGURES = {"filters", "activations"}
COMPARISONS = {
    "results": results,
    "curves": compare_curves,
    **{title: partial(compare_against, title) for title in COMPARED_SETTINGS},
    "claims": claims,
}


def save_figure(figure, path):
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())
    print(path)


def save_text(text, path):
    write_atomically(path, text.encode())
    print(path)


def write_table(rows, columns, path):
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([columns, *rows])
    save_text(table.getvalue(), path)


def visualize_run(run, names, output_dir):
    """Draw a run's figures, by default all that its kind of network has."""
    for name in names or []:
        if name not in FIGURES:
            raise InputError(f"the figure {name} compares several runs; name more of them, or a folder of runs")
        if name in CNN_FIGURES and not run.is_cnn:
            raise InputError(f"the figure {name} needs a run of cnn_cifar10.py, and {run.folder} is not one")
    if run.config["data_source"] == "synthetic":
        print(synthetic_notice(run.config["dataset"]))
    chosen = names or [name for name in FIGURES if run.is_cnn or name not in CNN_FIGURES]
    if set(chosen) != {"curves"}:
        run.model  # noqa: B018, an unusable checkpoint is told before the first figure
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(chosen):
        FIGURES[name](run, output_dir)


def compare_runs(runs, names, output_dir):
    """Compare several runs by their settings, by default in every way."""
    unfit = [name for name in names or [] if name not in COMPARISONS]
    if unfit:
        raise InputError(f"the figure {unfit[0]} takes a single run; several are compared by {', '.join(COMPARISONS)}")
    settings = group_by_setting(runs)
    output_dir.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(names or COMPARISONS):
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
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, or a folder of runs")
    parser.add_argument(
        "--figures", nargs="+", choices=tuple(FIGURES | COMPARISONS), metavar="NAME", help="default: all that fit"
    )
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
