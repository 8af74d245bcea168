"""Comparing made-up runs: which are compared, where the comparison goes, and what its tables and pictures say."""

import csv
import json
import os
import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import matplotlib
import numpy as np
import pytest
from conftest import CONFIGS, assert_refused, read_csv, read_files
from matplotlib.colors import to_hex

GROWTH = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.01, 1.0, 1.1, 1.2]  # by epoch; the tenth is not the best


def rnn_config(cell="rnn", hidden_size=30, **settings):
    return rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings)


CNN = cnn_cifar10.Config
RNN = partial(rnn_config, "rnn")
GRU = partial(rnn_config, "gru")
LSTM = partial(rnn_config, "lstm")


def invent_run(folder, config, accuracy, epochs=10, source="real", precision="fp32", name=None):
    """Write config.json and metrics.csv of a run; return the run's folder.

    accuracy: the test accuracy in percent after epoch 10, or a list with one for each epoch. name: the folder's name.
    """
    device = "cuda" if precision == "bf16" else "cpu"
    conditions = {"data_source": source, "device": device, "precision": precision, "parameters": 1234}
    prefix = "synthetic_" if source == "synthetic" else ""
    path = folder / config.script / (name or prefix + config.name)
    path.mkdir(parents=True)
    record = {"script": config.script, "settings": vars(config), "conditions": conditions}
    (path / "config.json").write_text(json.dumps(record))
    accuracies = accuracy if isinstance(accuracy, list) else [accuracy * share for share in GROWTH[:epochs]]
    rows = [(epoch, 2 / epoch, 50, 1, value, 3) for epoch, value in enumerate(accuracies, start=1)]
    (path / "metrics.csv").write_text(utils.format_csv(utils.METRIC_COLUMNS, rows))
    return path


def invent_seeds(folder, config, accuracies, **options):
    """Invent a run with each accuracy, with seeds 0, 1, 2 ..., but none for None; return their folders."""
    runs = [(replace(config, seed=seed), accuracy) for seed, accuracy in enumerate(accuracies) if accuracy is not None]
    return [invent_run(folder, run, accuracy, **options) for run, accuracy in runs]


def groups_in(folder):
    """Return the Groups of the runs in a folder."""
    return visualize.group_runs(visualize.find_runs(folder, Path("data")))


def compare(call, *arguments):
    """Call visualize.py, which must succeed; return the lines of its output."""
    status, output, error = call(visualize, *arguments)
    assert (status, error) == (0, "")
    return output.splitlines()


def compare_results(call, *folders):
    """Write only results.csv and results.md; return the lines of the output."""
    return compare(call, *folders, "--figures", "results")


def results_in(folder, columns=("seeds", "mean")):
    """Return columns of the results in a folder's comparison, a tuple for each row."""
    return [tuple(row[name] for name in columns) for row in read_csv(folder / "comparison" / "results.csv")]


# Which runs are compared, and where the comparison is written


@pytest.mark.parametrize(
    ("epochs", "expected", "shorter"),
    [
        ([2, 2, 2, 8, 2], 2, []),
        ([8, 2, 8], 8, [1]),
        ([3, 2, 2, 3], 3, [1, 2]),
        ([10, 4, 9, 12], 10, [2, 1]),
        ([9, 0, 1], 9, [2]),  # a run that has not finished an epoch does not count
    ],
)
def test_runs_are_compared_after_the_epoch_that_most_reached(call, tmp_path, epochs, expected, shorter):
    runs = [invent_run(tmp_path, RNN(seed=seed), 10 + seed, last) for seed, last in enumerate(epochs)]
    lines = compare_results(call, tmp_path)
    compared = [10 + seed for seed, last in enumerate(epochs) if last >= expected]
    mean = f"{np.mean(compared) * GROWTH[expected - 1]:.2f}"
    row = (str(len(compared)), mean, "94.17" if expected == 10 else "")
    assert results_in(tmp_path, ("seeds", "mean", "reported")) == [row]
    assert f"runs compared after epoch {expected}: {len(compared)}" in lines
    named = f"skipping runs that have not reached epoch {expected}: {', '.join(str(runs[seed]) for seed in shorter)}"
    assert [line for line in lines if "have not reached" in line] == ([named] if shorter else [])


def test_runs_on_synthetic_data_are_compared_only_among_themselves(call, tmp_path):
    invent_run(tmp_path, GRU(), 98)
    invent_seeds(tmp_path / "mine", GRU(), [60, 70], source="synthetic")
    invent_run(tmp_path / "mine", GRU(rows_after=28), 50, source="synthetic")
    assert "skipping runs on synthetic data (3); to compare them, pass only them" in compare_results(call, tmp_path)
    assert results_in(tmp_path) == [("1", "98.00")]
    assert "skipping" not in "".join(compare_results(call, tmp_path / "mine"))
    first, _ = results_in(tmp_path / "mine", ("experiment", "mean", "reported"))
    assert first == ("GRU, 30 hidden units, Adam, learning rate 1e-3, synthetic data", "65.00", "")
    drawn = draw("memory", groups_in(tmp_path / "mine"))
    assert drawn.get_suptitle().endswith("GRU, 30 hidden units, Adam, learning rate 1e-3, synthetic data")
    assert list(colors_in(drawn.legends[0])) == ["mean, and range if above 1 point"], "11.35 % is known only of MNIST"


def test_damaged_runs_and_duplicates_of_longer_runs_are_skipped(call, tmp_path):
    short, long, middle = (invent_run(tmp_path / str(last), RNN(), 5 * last, last) for last in (2, 12, 11))
    files = {"config.json": '{"script"', "metrics.csv": "epoch,train_loss\n1,"}
    damaged = invent_seeds(tmp_path, GRU(), [90, 91])
    for path, (file, content) in zip(damaged, files.items(), strict=True):
        (path / file).write_text(content)
        assert_refused(call(visualize, path), str(path))
    lines = [line for line in compare_results(call, tmp_path) if "skipping" in line]
    assert results_in(tmp_path) == [("1", "60.00")]
    assert [line.partition(": ")[0] for line in lines[:2]] == [f"skipping {path}" for path in damaged]
    assert lines[2:] == [f"skipping {path}: duplicate of {long}" for path in (middle, short)]


def test_a_folder_named_reference_is_skipped_unless_it_is_named(call, tmp_path):
    shipped = [invent_run(tmp_path / "reference", config, 80) for config in (GRU(), GRU(seed=1))]
    skipped = call(visualize, tmp_path)
    assert_refused(skipped, f"{tmp_path} holds no finished run; train one with python rnn_mnist.py, or compare ")
    assert_refused(skipped, f"the shipped runs with python visualize.py {shlex.quote(str(tmp_path / 'reference'))}")
    invent_run(tmp_path, LSTM(), 90)
    lines = compare_results(call, tmp_path)
    assert f"skipping {tmp_path / 'reference'}: name it to compare its runs" in lines
    assert results_in(tmp_path) == [("1", "90.00")]
    compare_results(call, tmp_path / "reference")
    assert results_in(tmp_path / "reference") == [("2", "80.00")]
    shutil.rmtree(tmp_path / "comparison")
    compare_results(call, *shipped)
    assert results_in(tmp_path) == [("2", "80.00")], "the shipped comparison is that of all shipped runs"


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links_to_folders_are_followed_and_loops_end(call, tmp_path):
    invent_run(tmp_path / "disk", GRU(), 98)
    (tmp_path / "runs").mkdir()
    for name, target in (("first", "disk"), ("second", "disk"), ("loop", "runs")):
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    assert compare_results(call, tmp_path / "runs")[0] == "runs compared after epoch 10: 1"


def test_patterns_repeated_folders_and_folders_without_runs(call, tmp_path, monkeypatch):
    for config in (RNN(), GRU(), GRU(seed=1), LSTM()):
        path = invent_run(tmp_path, config, 90)
    same_path = path.parent / ".." / path.parent.name / path.name
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(path.parent)
    for folders in (["gru*", path.name], [path, missing, tmp_path / "*/gru*", same_path.with_name("lstm*?"), empty]):
        lines = compare_results(call, *folders)
        assert results_in(tmp_path) == [("2", "90.00"), ("1", "90.00")], "beside the folder of the script"
        shutil.rmtree(tmp_path / "comparison")
    assert lines[0].startswith(f"skipping {missing}: is not a folder")
    assert lines[1].startswith(f"skipping {empty}: holds no finished run; train one with")
    assert_refused(call(visualize, missing, empty), "error: none of the named folders holds a finished run")
    compare(call, path, same_path, "--figures", "curves")
    assert (path / "figures" / "curves.png").exists()


def test_a_comparison_removes_only_what_an_earlier_one_wrote(call, tmp_path):
    invent_seeds(tmp_path / "runs", GRU(), [98, 97])
    other = invent_run(tmp_path / "runs", LSTM(), 95)
    folder = tmp_path / "comparison"
    flags = (tmp_path / "runs", "--output-dir", folder)
    own_files = {folder / name for name in ("thesis.tex", "notes/1.txt", "optimizer.png", "other/figures/cell.png")}
    for path in own_files:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    lines = compare(call, *flags)
    record, cell_picture = folder / ".outputs", folder / "cell.png"
    written = {folder / name for name in ("curves.png", "results.csv", "results.md")}
    assert read_files(folder).keys() == own_files | written | {cell_picture, record}
    assert {str(path) for path in written} < {*lines}
    shutil.rmtree(other)
    compare(call, *flags, "--figures", "results")
    assert cell_picture.exists(), "only some figures were asked for"
    compare(call, *flags)
    assert read_files(folder).keys() == own_files | written | {record}
    assert record.read_text().split() == sorted(path.name for path in written)
    assert {path.read_text() for path in own_files} == {"mine"}
    assert not (tmp_path / "runs" / "comparison").exists()


def test_results_hold_mean_range_and_deviation_beside_the_report(call, tmp_path):
    invent_seeds(tmp_path, GRU(), [97, 98, 99.5])
    invent_run(tmp_path, CNN(lr=1e-3), 60, epochs=12)
    for seed, precision in enumerate(("bf16", "fp32")):
        invent_run(tmp_path, CNN(lr=1e-4, dataset="mnist", seed=seed), 98 + seed, precision=precision)
    compare_results(call, tmp_path)
    expected = """experiment,reported,mean,range,std,seeds,parameters,remark
"LeNet-5 on CIFAR-10, Adam, learning rate 1e-3",,60.00,,,1,1234,only 'similar to 1e-4'
"LeNet-5 on MNIST, Adam, learning rate 1e-4",98.50,98.50,98.00 to 99.00,0.71,2,1234,by a CNN of another design
"GRU, 30 hidden units, Adam, learning rate 1e-3",98.32,98.17,97.00 to 99.50,1.26,3,1234,
"""
    path = tmp_path / "comparison" / "results.csv"
    assert path.read_text() == expected
    head, *rows = csv.reader(expected.splitlines())
    sentence = "Test accuracy in percent after epoch 10: mean, range and standard deviation over the seeds."
    table = [f"| {' | '.join(row)} |" for row in (head, ["-"] * len(head), *rows)]
    pooled = "In 1 of 3 settings the runs differ in precision (bf16, fp32) and device (cpu, cuda)."
    text = "\n".join(["# Results", "", sentence, "", *table, "", pooled, ""])
    found = re.sub("--+", "-", path.with_suffix(".md").read_text())
    assert re.sub(" +", " ", found) == re.sub(" +", " ", text), "apart from the widths of the columns"


FIVE = [80, 81, 82, 83, 84]
HIGHER = [83, 84, 84, 84, 85]


@pytest.mark.parametrize(
    ("changed", "first", "second", "test", "p", "verdict"),
    [
        ({"lr": 0.01}, FIVE, HIGHER, "paired by seed: difference +2.00 points", 2 / 32, "learning rate 0.01 is better"),
        ({"cell": "gru"}, FIVE, HIGHER, "5 seeds): difference +2.00 points", 18 / 252, "GRU is better"),
        ({"cell": "gru"}, FIVE, [81, 82, 82, 85, 86], "higher in 4 of 5 seeds", 108 / 252, "undecided, because the "),
        ({"lr": 0.01}, HIGHER, FIVE + [99] * 5, "+2.00 points", 2 / 32, "1e-3 is better"),  # of the seeds in both
        ({"lr": 0.01}, FIVE, [None] * 3 + HIGHER, "5 seeds): difference +2.00", 18 / 252, "0.01 is better"),  # no pairs
        ({"cell": "gru"}, FIVE * 4, [90], "+8.00 points; ", None, "one seed cannot decide; add --seed 0 1 2 3 4."),
        ({"lr": 0.01}, [80, 81], [90, 91], "in 2 of 2", None, "two seeds cannot decide; add --seed 0 1 2 3 4."),
    ],
)
def test_of_two_settings_the_better_one_is_named(call, tmp_path, changed, first, second, test, p, verdict):
    """p is that of one direction, doubled; few seeds have neither p nor an interval."""
    invent_seeds(tmp_path, RNN(), first)
    invent_seeds(tmp_path, replace(RNN(), **changed), second, precision="bf16")
    (line,) = [line for line in compare_results(call, tmp_path) if " against " in line]
    assert [words for words in (test, verdict) if words not in line] == []
    assert ("p = " in line, "90 % interval" in line) == (p is not None, p is not None)
    assert p is None or f"p = {p:.4f} (two-sided permutation test)" in line
    assert line.endswith(" The runs differ in precision (bf16, fp32) and device (cpu, cuda).")
    assert (tmp_path / "comparison" / "results.md").read_text().endswith(f"\n\n{line}\n")


def test_accuracies_on_different_data_sets_are_not_compared(call, tmp_path):
    invent_seeds(tmp_path, CNN(), FIVE)
    invent_seeds(tmp_path, RNN(), HIGHER)
    assert [line for line in compare_results(call, tmp_path) if " against " in line] == []


def draw(name, groups):
    """Return the Figure of a comparison, whose titles must lie within it."""
    with matplotlib.rc_context(visualize.STYLE):
        (drawn,) = visualize.COMPARISONS[name](groups).values()
        drawn.draw_without_rendering()
    for text in (drawn._suptitle, *(axes.title for axes in drawn.axes)):
        assert 0 <= text.get_window_extent().x0 < text.get_window_extent().x1 <= drawn.bbox.x1
    return drawn


def titles_of(drawn):
    """Return the titles of the panels, each as one line."""
    return [" ".join(axes.get_title().split()) for axes in drawn.axes]


def ticks_of(axes):
    """Return the labels of the x axis, each as one line."""
    return [" ".join(text.get_text().split()) for text in axes.get_xticklabels()]


def drawn_points(axes, marker):
    """Return the y values and the colour of each group of points with this marker, by their mean x."""
    shown = [line for line in axes.lines if line.get_marker() == marker and len(line.get_ydata())]
    return {round(np.mean(line.get_xdata()), 6): (list(line.get_ydata()), to_hex(line.get_color())) for line in shown}


def colors_in(legend):
    """Return the colours in a legend by their labels."""
    pairs = zip(legend.texts, legend.legend_handles, strict=True)
    return {text.get_text(): to_hex(line.get_color()) for text, line in pairs}


def other_value(spec, value):
    """Return a value that a setting may have beside the given one."""
    if spec.choices:
        return list(spec.choices)[-1]
    if value is None:
        return 1.0
    return value + 1 if spec.type is int else (value or 1) / 2


def weights_start_equal(first, second):
    """Return whether two runs have the same weights before training, apart from those that are zero in one of them."""
    pairs = zip(first.untrained_model().parameters(), second.untrained_model().parameters(), strict=False)
    return all(one.shape == other.shape and ((one == other) | (one * other == 0)).all() for one, other in pairs)


PAIRED_SETTINGS = {"optimizer", "lr", "momentum", "pixels", "gates", "rows_before", "rows_after"}
EVERY_SETTING = [(script, spec) for script in CONFIGS for spec in CONFIGS[script].specs() if spec.name != "seed"]


@pytest.mark.parametrize(("script", "spec"), EVERY_SETTING, ids=lambda value: getattr(value, "name", value))
def test_each_setting_that_varies_makes_groups_pairs_and_a_picture(tmp_path, script, spec):
    """Runs of one seed are pairs if it is known that their weights, and the order of images, start equal."""
    needed = {"momentum": {"optimizer": "sgd"}, "gates": {"cell": "gru"}, "keep_bias": {"rows_after": 28}}
    usual = CONFIGS[script](**needed.get(spec.name, {}))
    other = replace(usual, **{spec.name: other_value(spec, getattr(usual, spec.name))})
    for number, config in enumerate((usual, other, replace(usual, seed=1), replace(other, seed=1))):
        invent_run(tmp_path, config, 60 + number, name=f"my run {number}")
    groups = groups_in(tmp_path)
    assert {group.config: group.accuracies for group in groups} == {usual: [60, 62], other: [61, 63]}
    assert len({"", *visualize.label_configs([usual, other])[0]}) == 3
    assert visualize.starts_equal(usual, other) == (spec.name in PAIRED_SETTINGS)
    assert spec.name not in PAIRED_SETTINGS or weights_start_equal(*(group.runs[0] for group in groups))
    assert not visualize.starts_equal(usual, replace(usual, seed=1))

    in_memory = spec.name in ("rows_after", "keep_bias")
    has_picture = not in_memory and spec.name not in ("dataset", "rows_before")
    assert (spec.name in visualize.COMPARISONS, "seed" in visualize.COMPARISONS) == (has_picture, False)
    if in_memory:
        (axes,) = draw("memory", groups).axes
        assert {text.get_text() for text in axes.texts} == {"61.00 %\n60 to 62", "62.00 %\n61 to 63"}
    if has_picture:
        (axes,) = draw(spec.name, groups).axes
        shown = groups[::-1] if spec.name == "gates" else groups  # from gates that see nothing to full ones
        numbers = [utils.format_number(getattr(group.config, spec.name)) for group in shown]
        labels = [label.partition(" 6")[0] for label in ticks_of(axes)]  # without the mean, which is 61 or 62
        assert labels == (visualize.label_configs([group.config for group in shown])[0] if spec.choices else numbers)
        assert [values for values, _ in drawn_points(axes, ".").values()] == [group.accuracies for group in shown]


def test_the_picture_of_a_setting_shows_seeds_means_and_the_best(tmp_path):
    sizes = ((RNN(5), 12), (RNN(10), 70), (RNN(20), 90), (RNN(30), 89), (GRU(20), 84), (GRU(40), 94))
    for config, accuracy in sizes:
        invent_seeds(tmp_path, config, [accuracy - 1, accuracy, accuracy + 4])
    for config, accuracy in ((LSTM(20), 97.5), (LSTM(30), 97)):
        invent_run(tmp_path, config, accuracy)
    for config in (RNN(lr=0.01), RNN(5, pixels="permuted"), RNN(30, pixels="permuted")):
        invent_run(tmp_path, config, 20)  # has no other size, or is shown only by its own picture
    drawn = draw("hidden_size", groups_in(tmp_path))
    assert drawn.get_suptitle().endswith(
        " after epoch 10 by units of each layer (--hidden-size), all else equal, on different scales"
    )
    assert titles_of(drawn) == [
        "RNN, Adam, learning rate 1e-3 best: 20, 1.00 points better than 30 (may be noise) and 78.00 better than 5",
        "GRU, Adam, learning rate 1e-3 best: 40, 10.00 points better than 20",
        "LSTM, Adam, learning rate 1e-3 best: 20, 0.50 points better than 30 (may be noise)",
    ]
    rnn = drawn.axes[0]
    assert [len(axes.texts) for axes in drawn.axes] == [1, 0, 0], "only an RNN guesses"
    assert len({axes.get_ylim() for axes in drawn.axes}) == 3, "the LSTMs would fill too little of one scale"
    assert ticks_of(rnn) == ["5 13.00 (-78.00)", "10 71.00 (-20.00)", "20 91.00 (best)", "30 90.00 (-1.00)"]
    points = [(x, values) for x, (values, _) in drawn_points(rnn, ".").items()]
    assert points == [(0, [11, 12, 16]), (1, [69, 70, 74]), (2, [89, 90, 94]), (3, [88, 89, 93])]
    means = np.array([lines.get_segments()[0].mean(0) for lines in rnn.collections])
    assert means == pytest.approx(np.array([[0, 13], [1, 71], [2, 91], [3, 90]]))
    for axes, color in zip(drawn.axes, ("#e69f00", "#0072b2", "#009e73"), strict=True):
        colors = [color_of_dots for _, color_of_dots in drawn_points(axes, ".").values()]
        assert {*colors, *(to_hex(lines.get_color()[0]) for lines in axes.collections)} == {color}
    assert list(colors_in(drawn.legends[0])) == ["one seed", "mean (below, with its difference from the best)"]


def test_the_picture_of_gates_shows_the_plain_rnn_beside_them(tmp_path):
    for config, accuracy in ((GRU(), 98), (GRU(gates="constant"), 96), (RNN(), 93.5), (RNN(lr=0.01), 20)):
        invent_run(tmp_path / "usual", config, accuracy)
        invent_run(tmp_path / "opposite", config, 100 - accuracy)
    drawn = draw("gates", groups_in(tmp_path / "opposite"))
    assert " best: plain RNN, 2.50 points better than constant gates (may be noise)" in titles_of(drawn)[0]
    drawn = draw("gates", groups_in(tmp_path / "usual"))
    assert drawn.get_suptitle().endswith(" by what the gates of a GRU or LSTM see (--gates), all else equal")
    lead = "2.00 points better than constant gates (may be noise) and 4.50 better than plain RNN (may be noise)"
    assert titles_of(drawn) == [f"GRU, 30 hidden units, Adam, learning rate 1e-3 best: full gates, {lead}"]
    (axes,) = drawn.axes
    assert ticks_of(axes) == ["plain RNN 93.50 (-4.50)", "constant gates 96.00 (-2.00)", "full gates 98.00 (best)"]
    assert drawn_points(axes, ".") == {0: ([93.5], "#e69f00"), 1: ([96], "#0072b2"), 2: ([98], "#0072b2")}


def test_curves_show_each_setting_once_six_in_a_panel(tmp_path):
    """The setting with most values makes the lines: the size of the RNNs, and the learning rate of the CNNs."""
    expected_means = [[55, 52], [12, 13, 30, 15, 16, 17], [19, 18], [40], [31]]  # by panel
    cnn = CNN(optimizer="sgd", lr=0.25, momentum=0.9, batch_size=32)
    configs = [cnn, replace(cnn, lr=0.5), *map(RNN, range(1, 9)), GRU(lr=0.01, gates="input"), LSTM(lr=0.02)]
    for config, mean in zip(configs, sum(expected_means, []), strict=True):
        invent_seeds(tmp_path, config, [mean - 2, mean - 1, mean + 3], epochs=12)
    groups = groups_in(tmp_path)
    drawn = draw("curves", groups)
    assert drawn.get_suptitle() == "Test accuracy in % by epoch, and the best of each panel after epoch 10"
    assert len({axes.get_ylim() for axes in drawn.axes}) == 1
    best = "best: learning rate 0.25, 3.00 points better than learning rate 0.5 (may be noise)"
    rnn = "RNN, Adam, learning rate 1e-3"
    assert titles_of(drawn) == [
        f"LeNet-5 on CIFAR-10, SGD, momentum 0.9, batch 32 {best}",
        f"{rnn} best: 3 hidden units, 13.00 points better than 6 hidden units and 18.00 better than 1 hidden units",
        f"{rnn} best: 7 hidden units, 1.00 points better than 8 hidden units (may be noise)",
        "GRU, 30 hidden units, input-only gates, Adam, learning rate 0.01 mean: 40.00 %",
        "LSTM, 30 hidden units, Adam, learning rate 0.02 mean: 31.00 %",
    ]
    legends = [colors_in(axes.get_legend()) for axes in drawn.axes[:3]]
    labels = ["learning rate 0.25", "learning rate 0.5", *(f"{size} hidden units" for size in range(1, 9))]
    assert [label for legend in legends for label in legend] == labels
    assert drawn.legends == [], "a colour means something else in each panel"
    for axes, means in zip(drawn.axes, expected_means, strict=True):
        colors = [to_hex(line.get_color()) for line in axes.lines]
        assert len({*colors}) == len(means)
        assert len(means) == 1 or list(colors_in(axes.get_legend()).values()) == colors
        for line, band, mean in zip(axes.lines, axes.collections, means, strict=True):
            assert line.get_xydata() == pytest.approx(np.array([*enumerate(mean * np.array(GROWTH[:10]), start=1)]))
            assert to_hex(band.get_facecolor()[0]) == to_hex(line.get_color())
            assert {round(y, 6) for x, y in band.get_paths()[0].vertices if x == 10} == {mean - 2, mean + 3}


@pytest.mark.parametrize("source", ["real", "synthetic"])
def test_if_panels_are_too_many_the_output_says_what_to_name(call, tmp_path, source):
    for number in range(1, 26):
        invent_run(tmp_path / "my runs", RNN(number, lr=number / 1000), 50, source=source)
    lines = compare(call, tmp_path / "my runs")
    assert not list(tmp_path.rglob("curves.png"))
    (line,) = [line for line in lines if line.startswith("curves: ")]
    words, _, example = line.partition("; pass fewer runs, such as ")
    assert words == "curves: more than 24 panels are needed"
    compare_results(call, *shlex.split(example))
    assert len(results_in(tmp_path / "my runs")) == 11


def test_memory_shows_networks_by_blank_rows_and_initial_bias(tmp_path):
    """A row of a panel is a value of B, a column a number of blank rows; the colour follows from the mean."""
    for rows, accuracies in ((0, [98, 99]), (14, [60, 70]), (56, [20])):
        invent_seeds(tmp_path, GRU(rows_after=rows), accuracies)
    for cell, bias, accuracy in (("gru", 1, 90), ("gru", 3, 93), ("rnn", 1, 80), ("rnn", 3, 70)):
        invent_seeds(tmp_path, rnn_config(cell, rows_after=56, keep_bias=float(bias)), [accuracy, accuracy + 2])
    for config in (GRU(rows_before=14), GRU(20), GRU(rows_after=56, gates="input"), GRU(lr=0.01, rows_after=56)):
        invent_run(tmp_path, config, 97)  # not shown
    drawn = draw("memory", groups_in(tmp_path))
    assert drawn.get_suptitle().startswith("Test accuracy in % after epoch 10 by blank rows and initial bias B (--keep")
    result = "best: B = 3, 3.00 points better than B = 1 (may be noise) and 74.00 better than PyTorch's (may be noise)"
    assert titles_of(drawn)[0] == f"GRU; with 56 blank rows {result}"
    assert list(colors_in(drawn.legends[0])) == ["mean, and range if above 1 point", '11.35 %: always "1"']
    meanings = ("share of the state kept at first", "recurrent weights: % of identity")
    assert [axes.get_ylabel() for axes in drawn.axes] == [f"B ({meaning})" for meaning in meanings]
    biases = ["PyTorch's initialisation", "B = 1 (73 %)", "B = 3 (95 %)"]
    cells = "98.50 %, 65.00 % 60 to 70, 20.00 %, not run, not run, 91.00 % 90 to 92, not run, not run, 94.00 % 93 to 95"
    expected = [
        ("0 14 56", biases, cells.split(", "), [[98.5, 65, 20], [None, None, 91], [None, None, 94]]),
        ("56", biases[1:], ["81.00 % 80 to 82", "71.00 % 70 to 72"], [[81], [71]]),
    ]
    for axes, (columns, rows, cells, means) in zip(drawn.axes, expected, strict=True):
        assert " ".join(ticks_of(axes)) == columns
        assert [" ".join(text.get_text().split()) for text in axes.get_yticklabels()] == rows
        texts = sorted(axes.texts, key=lambda text: text.get_position()[::-1])
        assert [" ".join(text.get_text().split()) for text in texts] == cells
        assert axes.images[0].get_array().tolist() == means
