"""Comparing made-up runs: which are compared, where the comparison goes, and what its tables and pictures say."""

import json
import math
import os
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import numpy as np
import pytest
from conftest import CONFIGS, assert_refused, read_files
from matplotlib.colors import to_hex

# Made-up runs

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
    conditions = {"data_source": source, "device": "cpu", "precision": precision, "parameters": 1234}
    prefix = "synthetic_" if source == "synthetic" else ""
    path = folder / config.script / (name or prefix + config.name)
    path.mkdir(parents=True)
    record = {"script": config.script, "settings": vars(config), "conditions": conditions}
    (path / "config.json").write_text(json.dumps(record))
    accuracies = accuracy if isinstance(accuracy, list) else [accuracy * share for share in GROWTH[:epochs]]
    rows = [(epoch, 2 / epoch, 50, 1, value, 3) for epoch, value in enumerate(accuracies, start=1)]
    if rows:
        (path / "metrics.csv").write_text(utils.format_csv(utils.METRIC_COLUMNS, rows))
    return path


def invent_seeds(folder, config, accuracies, **options):
    """Invent a run with each accuracy, with seeds 0, 1, 2 ...; return their folders."""
    runs = [(replace(config, seed=seed), accuracy) for seed, accuracy in enumerate(accuracies)]
    return [invent_run(folder, run, accuracy, **options) for run, accuracy in runs]


def invent_table(run_folder, name, rows):
    """Write the table of one of a run's figures; rows: list of dict."""
    (run_folder / "figures").mkdir(exist_ok=True)
    text = utils.format_csv(rows[0], [row.values() for row in rows])
    (run_folder / "figures" / f"{name}.csv").write_text(text)


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


def results_in(folder):
    """Return the number of seeds and the mean of each row in a folder's comparison."""
    return [(row["seeds"], row["mean"]) for row in utils.read_csv(folder / "comparison" / "results.csv")]


# Which runs are compared


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
    mean = np.mean(compared) * GROWTH[expected - 1]
    assert results_in(tmp_path) == [(f"{len(compared)}", f"{mean:.2f}")]
    assert [group.reported for group in groups_in(tmp_path)] == [94.17 if expected == 10 else None]
    assert f"runs compared after epoch {expected}: {len(compared)}" in lines
    named = [line.partition(": ") for line in lines if "have not reached" in line]
    paths = ", ".join(str(runs[seed]) for seed in shorter)
    assert named == [(f"skipping runs that have not reached epoch {expected}", ": ", paths)] * bool(shorter)


def test_of_duplicate_runs_the_longest_counts_and_others_are_named(call, tmp_path):
    short, long, middle = (invent_run(tmp_path / str(last), RNN(), 5 * last, last) for last in (2, 12, 11))
    invent_run(tmp_path, RNN(), 50, source="synthetic")
    lines = compare_results(call, tmp_path)
    assert results_in(tmp_path) == [("1", "60.00")]
    (row,) = utils.read_csv(tmp_path / "comparison" / "synthetic" / "results.csv")
    assert (row["mean"], row["reported"]) == ("50.00", "")
    expected = [f"skipping {path}: duplicate of {long}" for path in (middle, short)]
    assert [line for line in lines if "duplicate of" in line] == expected


UNREADABLE = [("config.json", "a folder"), ("metrics.csv", "epoch,train_loss\n1,"), ("checkpoint.pt", "PK\3\4")]


@pytest.mark.parametrize(("file", "content"), UNREADABLE)
def test_an_unreadable_run_is_skipped_and_an_error_when_named(call, tmp_path, file, content):
    invent_run(tmp_path, GRU(), 98)
    path = invent_run(tmp_path, RNN(), 90)
    (path / file).unlink(missing_ok=True)
    if content == "a folder":
        (path / file).mkdir()
    else:
        (path / file).write_text(content)
    lines = compare_results(call, tmp_path)
    assert results_in(tmp_path) == [("1", "98.00")]
    assert [line.partition(": ")[0] for line in lines if "skipping" in line] == [f"skipping {path}"]
    assert_refused(call(visualize, path), str(path))


def test_a_folder_named_reference_is_skipped_unless_it_is_named(call, tmp_path):
    invent_run(tmp_path / "reference", GRU(), 80)
    skipped = call(visualize, tmp_path)
    assert_refused(skipped, f"{tmp_path} holds no finished run; train one with python rnn_mnist.py, or compare ")
    assert_refused(skipped, f"the shipped runs with python visualize.py {shlex.quote(str(tmp_path / 'reference'))}")
    renamed = invent_run(tmp_path, LSTM(), 90, name=LSTM(lr=0.01).name)
    lines = compare_results(call, tmp_path)
    assert f"skipping {tmp_path / 'reference'}: name it to compare its runs" in lines
    assert f"{renamed}: the folder's name differs from its config.json: {LSTM().name}" in lines
    assert results_in(tmp_path) == [("1", "90.00")]
    compare_results(call, tmp_path / "reference")
    assert results_in(tmp_path / "reference") == [("1", "80.00")]


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links")
def test_links_to_folders_are_followed_and_loops_end(call, tmp_path):
    invent_run(tmp_path / "disk", GRU(), 98)
    (tmp_path / "runs").mkdir()
    for name, target in (("first", "disk"), ("second", "disk"), ("loop", "runs")):
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    assert compare_results(call, tmp_path / "runs")[0] == "runs compared after epoch 10: 1"
    assert results_in(tmp_path / "runs") == [("1", "98.00")]
    assert len(visualize.find_runs(tmp_path / "runs", tmp_path)) == 1


def test_a_run_that_is_named_twice_counts_once(call, tmp_path):
    path = invent_run(tmp_path, GRU(), 98)
    compare(call, path, path.parent / ".." / path.parent.name / path.name, "--figures", "curves")
    assert (path / "figures" / "curves.png").exists()
    assert compare_results(call, tmp_path, path)[0] == "runs compared after epoch 10: 1"


def test_among_named_folders_one_without_a_run_is_skipped(call, tmp_path):
    paths = invent_seeds(tmp_path, GRU(), [97, 98])
    empty, missing = tmp_path / "rnn_mnist" / "empty", tmp_path / "missing"
    empty.mkdir()
    lines = compare_results(call, missing, *paths, empty)
    assert lines[0].startswith(f"skipping {missing}: is not a folder")
    assert lines[1].startswith(f"skipping {empty}: holds no finished run; train one with")
    assert results_in(tmp_path) == [("2", "97.50")]
    assert_refused(call(visualize, missing, empty), "error: none of the named folders holds a finished run")


def test_patterns_that_the_shell_leaves_alone_are_expanded(call, tmp_path):
    for config in (RNN(), GRU(), GRU(seed=1), LSTM()):
        invent_run(tmp_path, config, 90)
    compare_results(call, tmp_path / "*" / "gru*", tmp_path / "rnn_mnist" / "lstm30_adam_lr1e-3_seed?")
    assert results_in(tmp_path) == [("2", "90.00"), ("1", "90.00")]


# Where the comparison is written, and what it deletes


def test_a_comparison_removes_only_what_an_earlier_one_wrote(call, tmp_path):
    invent_seeds(tmp_path, GRU(), [98, 97])
    others = [invent_run(tmp_path, LSTM(), 95), invent_run(tmp_path, GRU(), 95, source="synthetic")]
    folder = tmp_path / "comparison"

    def files():
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.suffix}

    lines = compare(call, tmp_path)
    written = {"cell.png", "curves.png", "results.csv", "results.md"}
    assert files() == written | {f"synthetic/{name}" for name in written - {"cell.png"}}
    assert {str(folder / name) for name in files()} < {*lines}
    own_files = {"thesis.tex", "notes/1.txt", "optimizer.png", "other/figures/cell.png", "synthetic/thesis.png"}
    for name in own_files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("mine")
    for path in others:
        shutil.rmtree(path)
    compare_results(call, tmp_path)
    assert "cell.png" in files(), "only some figures were asked for"
    compare(call, tmp_path)
    assert files() == own_files | written - {"cell.png"}
    assert {(folder / name).read_text() for name in own_files} == {"mine"}


def test_runs_in_a_folder_called_comparison_are_compared_and_kept(call, tmp_path):
    invent_seeds(tmp_path / "comparison", GRU(), [98, 97])
    before = read_files(tmp_path)
    for folder in (tmp_path, tmp_path / "comparison", tmp_path):
        compare(call, folder)
        assert results_in(folder) == [("2", "97.50")]
    assert before.items() <= read_files(tmp_path).items()


def test_named_runs_are_compared_in_the_folder_that_holds_them(call, tmp_path, monkeypatch):
    first, second = invent_seeds(tmp_path / "runs", GRU(), [98, 97])
    for folder, names in ((tmp_path, (first, second)), (first.parent, (first.name, second.name))):
        monkeypatch.chdir(folder)
        compare_results(call, *names)
        assert results_in(tmp_path / "runs") == [("2", "97.50")]
        shutil.rmtree(tmp_path / "runs" / "comparison")
    assert not list(tmp_path.rglob("results.csv"))


# Tables of results


def test_results_hold_mean_range_and_deviation_beside_the_report(call, tmp_path):
    invent_seeds(tmp_path, GRU(), [97, 98, 99.5])
    invent_run(tmp_path, CNN(lr=1e-3), 60, epochs=12)
    for seed, precision in enumerate(("bf16", "fp32")):
        invent_run(tmp_path, CNN(dataset="mnist", seed=seed), 98 + seed, precision=precision)
    compare_results(call, tmp_path)
    expected = """experiment,reported,mean,range,std,seeds,parameters,remark
"LeNet-5 on CIFAR-10, Adam, learning rate 1e-3",,60.00,,,1,1234,only 'similar to 1e-4'
"LeNet-5 on MNIST, Adam, learning rate 1e-4",98.50,98.50,98.00 to 99.00,0.71,2,1234,by a CNN of another design
"GRU, 30 hidden units, Adam, learning rate 1e-3",98.32,98.17,97.00 to 99.50,1.26,3,1234,
"""
    assert (tmp_path / "comparison" / "results.csv").read_text() == expected
    text = (tmp_path / "comparison" / "results.md").read_text()
    assert "| GRU, 30 hidden units, Adam, learning rate 1e-3 | 98.32    | 98.17 | 97.00 to 99.50 | 1.26 | 3 " in text
    assert text.endswith("In 1 of 3 settings the runs differ in precision (bf16, fp32).\n")
    assert [group.reported for group in groups_in(tmp_path)] == [None, None, 98.32], "only what is comparable"


FIVE = [80, 81, 82, 83, 84]
HIGHER = [83, 84, 84, 84, 85]


@pytest.mark.parametrize(
    ("changed", "first", "second", "test", "p", "verdict"),
    [
        ({"lr": 0.01}, FIVE, HIGHER, "paired by seed: difference +2.00 points", 2 / 32, "learning rate 0.01 is better"),
        ({"cell": "gru"}, FIVE, HIGHER, "5 seeds): difference +2.00 points", 18 / 252, "GRU is better"),
        ({"cell": "gru"}, FIVE, [81, 82, 82, 85, 86], "higher in 4 of 5 seeds", 108 / 252, "undecided, because the "),
        ({"lr": 0.01}, HIGHER, FIVE + [99] * 5, "+2.00 points", 2 / 32, "1e-3 is better"),  # of the seeds in both
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
    assert line.endswith(" The runs differ in precision (bf16, fp32).")
    assert (tmp_path / "comparison" / "results.md").read_text().endswith(f"\n\n{line}\n")


# Pictures


def drawn_points(axes, marker):
    """Return the y values of each line or group of dots with this marker, list of lists."""
    return [list(line.get_ydata()) for line in axes.lines if line.get_marker() == marker and len(line.get_ydata())]


def legend_handles(drawn):
    """Return the lines and bands in the legend of a Figure by their labels."""
    (legend,) = drawn.legends
    return dict(zip([text.get_text() for text in legend.texts], legend.legend_handles, strict=True))


def other_value(spec, value):
    """Return a value that a setting may have beside the given one."""
    if spec.choices:
        return next(choice for choice in spec.choices if choice != value)
    if value is None:
        return 1.0
    return value + 1 if spec.type is int else (value or 1) / 2


EVERY_SETTING = [(script, spec) for script in CONFIGS for spec in CONFIGS[script].specs() if spec.name != "seed"]


@pytest.mark.parametrize(("script", "spec"), EVERY_SETTING, ids=lambda value: getattr(value, "name", value))
def test_each_setting_that_varies_makes_groups_and_a_picture(tmp_path, script, spec):
    """Blank rows and B are shown by memory, and results on different data sets cannot be compared."""
    needed = {"momentum": {"optimizer": "sgd"}, "gates": {"cell": "gru"}, "keep_bias": {"rows_after": 28}}
    usual = CONFIGS[script](**needed.get(spec.name, {}))
    other = replace(usual, **{spec.name: other_value(spec, getattr(usual, spec.name))})
    for number, config in enumerate((usual, other, replace(usual, seed=1), replace(other, seed=1))):
        invent_run(tmp_path, config, 60 + number, name=f"my run {number}")
    groups = groups_in(tmp_path)
    assert {group.config: group.accuracies for group in groups} == {usual: [60, 62], other: [61, 63]}
    assert len({"", *visualize.label_groups(groups)[0]}) == 3

    in_memory = spec.name in ("rows_before", "rows_after", "keep_bias")
    has_picture = not in_memory and spec.name != "dataset"
    assert (spec.name in visualize.COMPARISONS, "seed" in visualize.COMPARISONS) == (has_picture, False)
    if in_memory:
        (axes,) = visualize.compare_memory(groups).axes
        assert sorted(drawn_points(axes, "o")) == [[60, 62], [61, 63]]
    if has_picture:
        (axes,) = visualize.COMPARISONS[spec.name](groups).axes
        assert sorted(drawn_points(axes, ".")) == [[60, 62], [61, 63]]
        labels = [text.get_text() for text in axes.get_xticklabels()]
        assert labels == [utils.format_number(getattr(group.config, spec.name)) for group in groups]


def test_the_picture_of_a_setting_shows_seeds_means_and_the_report(tmp_path):
    for size, accuracy in ((5, 65), (10, 70), (20, 80), (30, 90)):
        invent_seeds(tmp_path, RNN(size), [accuracy - 1, accuracy, accuracy + 4])
    invent_seeds(tmp_path, GRU(20), [98])
    invent_seeds(tmp_path, GRU(40), [99])
    invent_run(tmp_path, RNN(lr=0.01), 20)  # differs from all but one in more than the size
    drawn = visualize.COMPARISONS["hidden_size"](groups_in(tmp_path))
    rnn, gru = drawn.axes
    assert drawn.get_suptitle() == "--hidden-size changes the test accuracy after epoch 10 by up to 25.0 points"
    titles = [" ".join(axes.get_title().split("\n")) for axes in drawn.axes]
    assert titles[0] == "RNN, Adam, learning rate 1e-3 best: 30 hidden units (91.00 %, 10.00 points ahead)"
    assert titles[1] == "GRU, Adam, learning rate 1e-3 best: 40 hidden units (99.00 %, 1.00 points ahead)"
    assert [text.get_text() for text in rnn.get_xticklabels()] == ["5", "10", "20", "30"]
    assert drawn_points(rnn, ".") == [[64, 65, 69], [69, 70, 74], [79, 80, 84], [89, 90, 94]]
    assert [lines.get_segments()[0][0, 1] for lines in rnn.collections] == pytest.approx([66, 71, 81, 91])
    assert drawn_points(rnn, "x") == [[47.73], [74.55], [90.75], [94.17]]
    assert [np.mean(line.get_xdata()) for line in rnn.lines if len(line.get_xdata())] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [to_hex(axes.lines[0].get_color()) for axes in drawn.axes] == ["#e69f00", "#0072b2"]
    assert {*legend_handles(drawn)} == {"one seed", "mean of the seeds", "reference report"}
    high = [group for group in groups_in(tmp_path) if group.config.cell == "gru"]
    (gru,) = visualize.COMPARISONS["hidden_size"](high).axes
    assert gru.get_ylabel() == "test error in % (log scale)"
    assert (drawn_points(gru, "."), drawn_points(gru, "x")) == ([[2], [1]], [[pytest.approx(2.4)]])


def test_curves_show_the_mean_and_range_of_the_seeds_and_the_report(tmp_path):
    invent_seeds(tmp_path, RNN(5), [45, 46, 50], epochs=12)
    invent_seeds(tmp_path, RNN(30), [70, 76])
    drawn = visualize.compare_curves(groups_in(tmp_path))
    accuracy, loss = drawn.axes
    best = "best: 30 hidden units (73.00 %, 26.00 points ahead)"
    assert drawn.get_suptitle() == f"Test accuracy after epoch 10, {best}\nRNN, Adam, learning rate 1e-3"
    assert drawn_points(accuracy, ".") == [pytest.approx(mean * np.array(GROWTH[:10])) for mean in (47, 73)]
    assert drawn_points(accuracy, "x") == [[47.73], [94.17]]
    assert {round(y, 6) for x, y in accuracy.collections[0].get_paths()[0].vertices if x == 10} == {45, 50}
    assert drawn_points(loss, ".")[0] == pytest.approx(2 / np.arange(1, 11))
    legend = legend_handles(drawn)
    colors = [to_hex(line.get_color()) for line in accuracy.lines if line.get_marker() == "."]
    assert colors[:2] == [to_hex(legend[f"{size} hidden units"].get_color()) for size in (5, 30)]


def test_curves_of_many_settings_show_each_once_six_in_a_panel(tmp_path):
    """The setting with most values makes the lines: the size of the RNNs, and the learning rate of the CNNs."""
    expected = {11 + size: f"{size} hidden units" for size in range(1, 9)}
    expected |= {30: "", 31: "", 40: "learning rate 0.5", 41: "learning rate 0.25"}
    configs = [*(RNN(size) for size in range(1, 9)), GRU(lr=0.01), LSTM(lr=0.02), CNN(lr=0.5), CNN(lr=0.25)]
    for accuracy, config in zip(expected, configs, strict=True):
        invent_run(tmp_path, config, accuracy)
    drawn = visualize.compare_curves(groups_in(tmp_path))
    found = []
    for axes in drawn.axes:
        lines = [line for line in axes.lines if line.get_marker() == "."]
        assert len({to_hex(line.get_color()) for line in lines}) == len(lines) <= 6
        found += [(round(line.get_ydata()[9]), line.get_label()) for line in lines]
    labels = [(accuracy, "" if label.startswith("_") else label) for accuracy, label in found]
    assert sorted(labels) == sorted(expected.items())
    assert "LSTM, 30 hidden units, Adam, learning rate 0.02\n31.00 %" in [axes.get_title() for axes in drawn.axes]


@pytest.mark.parametrize("source", ["real", "synthetic"])
def test_if_panels_are_too_many_the_output_says_what_to_name(call, tmp_path, source):
    for number in range(1, 26):
        invent_run(tmp_path, RNN(number, lr=number / 1000), 50, source=source)
    lines = compare(call, tmp_path)
    assert not (tmp_path / "comparison" / "curves.png").exists()
    (line,) = [line for line in lines if line.startswith("curves: ")]
    words, _, example = line.partition("; pass fewer runs, such as ")
    assert words == "curves: 25 settings need more than 24 panels"
    compare_results(call, *shlex.split(example))
    assert len(results_in(tmp_path)) == 11


def test_gradients_are_compared_before_and_after_training(tmp_path):
    """The means over the seeds are geometric, and zeros are raised to a floor."""
    first_norms = {RNN(): [1e-2, 1e-6], LSTM(): [1e-8, 0.0], GRU(7): [0.5], RNN(7, lr=0.1): [0.5]}
    for config, norms in first_norms.items():  # the last two differ in more than the cell
        for path, norm in zip(invent_seeds(tmp_path, config, [90] * len(norms), epochs=12), norms, strict=True):
            first = {0: 2e-3, 10: norm, 12: 0.9}
            invent_table(path, "gradients", [{"epoch": epoch, "1": first[epoch], "2": 1.0} for epoch in first])
    drawn = visualize.compare_gradients(groups_in(tmp_path))
    assert [axes.get_title() for axes in drawn.axes] == [
        "RNN: 0.01 % reaches the first row\n(before training: 0.2 %)",
        "LSTM: less than 0.01 % reaches the first row\n(before training: 0.2 %)",
    ]
    styles = {label: line.get_linestyle() for label, line in legend_handles(drawn).items()}
    expected = ((1e-4, "#e69f00"), (math.sqrt(1e-8 * visualize.GRADIENT_FLOOR), "#009e73"))
    for axes, (after, color) in zip(drawn.axes, expected, strict=True):
        lines = {line.get_linestyle(): line for line in axes.lines if len(line.get_xdata())}
        assert lines[styles["before training"]].get_ydata()[0] == pytest.approx(2e-3)
        assert lines[styles["after epoch 10"]].get_ydata()[0] == pytest.approx(after)
        assert {to_hex(line.get_color()) for line in lines.values()} == {color}


def test_memory_shows_networks_by_blank_rows_and_initial_bias(tmp_path):
    """The colour of a line depends on B alone, also in a panel that has fewer lines."""
    for rows, accuracies in ((0, [98, 99]), (14, [60, 70]), (56, [20])):
        invent_seeds(tmp_path, GRU(rows_after=rows), accuracies)
    invent_seeds(tmp_path, GRU(rows_before=14), [96, 97])
    for config, accuracy in ((GRU(keep_bias=1.0), 90), (LSTM(keep_bias=1.0), 80), (LSTM(keep_bias=3.0), 70)):
        invent_seeds(tmp_path, replace(config, rows_after=56), [accuracy, accuracy + 1])
    invent_run(tmp_path, GRU(20), 50)  # never trained with blank rows
    drawn = visualize.compare_memory(groups_in(tmp_path))
    titles = [axes.get_title() for axes in drawn.axes]
    assert titles == ["GRU\nbest at 56 rows: 90.5 % (B = 1)", "LSTM\nbest at 56 rows: 80.5 % (B = 1)"]
    colors = {label: to_hex(line.get_color()) for label, line in legend_handles(drawn).items()}
    unset = colors["PyTorch's initialisation"]
    one = colors["B = 1: each step keeps 73 % of the state at first"]
    three = colors["B = 3: each step keeps 95 % of the state at first"]
    found = []
    for axes in drawn.axes:
        means = [line for line in axes.lines if line.get_marker() == "None" and line.get_linestyle() == "-"]
        found.append([(to_hex(line.get_color()), list(line.get_ydata())) for line in means if len(line.get_ydata())])
    assert len({unset, one, three}) == 3
    assert found == [[(unset, [98.5, 65, 20]), (one, [90.5])], [(one, [80.5]), (three, [70.5])]]
    gru = drawn.axes[0]
    dots = [line for line in gru.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert [list(line.get_ydata()) for line in dots if str(line.get_markerfacecolor()) == "none"] == [[96, 97]]
    blank_rows = {line.get_ydata()[0]: 14 * round(line.get_xdata()[0] / 14) for line in dots}
    assert blank_rows == {98: 0, 60: 14, 96: 14, 20: 56, 90: 56}
    assert [line.get_ydata()[0] for line in gru.lines if line.get_linestyle() == ":"] == [visualize.MAJORITY_ACCURACY]
