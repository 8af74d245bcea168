"""The comparison of many runs: which are compared, after which epoch, in which words, tables and pictures."""

import errno
import json
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import numpy as np
import pytest
from conftest import CONFIGS, NOISE_NAME, assert_refused, noise_digits, read_events, read_points
from matplotlib.image import imread

# Runs that were never trained

GROWTH = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 1.01, 1.0, 1.1, 1.2]  # by epoch; the tenth is not the best


def invent_run(folder, config, accuracy, epochs=10, source="real", name=None):
    """Write config.json and metrics.csv of a run with an accuracy after epoch 10; return its folder."""
    parameters = {"rnn": 1000, "gru": 3000, "lstm": 4000}.get(getattr(config, "cell", None), 9000)
    conditions = {"data_source": source, "device": "cpu", "precision": "fp32", "threads": 1, "parameters": parameters}
    path = folder / config.script / (name or "synthetic_" * (source == "synthetic") + config.name)
    path.mkdir(parents=True)
    record = {"script": config.script, "settings": vars(config), "conditions": conditions | {"epochs": epochs}}
    (path / "config.json").write_text(json.dumps(record))
    grown = enumerate(GROWTH[:epochs], start=1)
    rows = [(epoch, 2 / epoch, 50, 1, accuracy * share, parameters * epoch / 1e4) for epoch, share in grown]
    if rows:
        (path / "metrics.csv").write_text(utils.table_text(utils.METRICS, rows))
    return path


def invent_seeds(folder, config, accuracies, **others):
    """Invent a run for each accuracy, with the seeds 0, 1, 2 ...; return their paths."""
    return [invent_run(folder, replace(config, seed=seed), each, **others) for seed, each in enumerate(accuracies)]


def invent_table(run_folder, name, rows):
    """Write the table of one of a run's figures; rows: list of dict."""
    (run_folder / "figures").mkdir(exist_ok=True)
    text = utils.table_text(rows[0], [row.values() for row in rows])
    (run_folder / "figures" / f"{name}.csv").write_text(text)


def gradient_row(norms, epoch):
    return {"epoch": epoch, **dict(enumerate(norms, start=1))}


def rnn_config(cell="rnn", hidden_size=30, **settings):
    return rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings)


def groups_in(folder):
    return visualize.group_runs(visualize.find_runs(folder, Path("data")))


def results_in(folder):
    return utils.read_table(folder / "results.csv")


def configs_in(folder):
    return [[run.config for run in group] for group in groups_in(folder)]


def compare(call, folder, *names):
    """Compare the runs below a folder; return where that is written, and what was said."""
    status, output, error = call(visualize, folder, *(["--figures", *names] if names else []))
    assert (status, error) == (0, "")
    return folder / "comparison", output.splitlines()


# Which runs are compared


def other_value(one, value):
    """Return a value that a setting may have beside the one given."""
    if one.choices:
        return next(choice for choice in one.choices if choice != value)
    if value is None:
        return 1.0
    return value + 1 if one.type is int else (value or 1) / 2


EVERY_SETTING = [
    (script, one)
    for script, config_class in CONFIGS.items()
    for one in config_class.known_settings()
    if len(one.choices) != 1 and one.name != "seed"
]


@pytest.mark.parametrize(("script", "one"), EVERY_SETTING, ids=lambda value: getattr(value, "name", value))
def test_a_setting_that_varies_makes_groups_words_and_a_picture(tmp_path, script, one):
    usual = CONFIGS[script](optimizer="sgd" if one.name == "momentum" else "adam")
    other = replace(usual, **{one.name: other_value(one, getattr(usual, one.name))})
    for name, config in enumerate((usual, other, replace(usual, seed=1), replace(other, seed=1))):
        invent_run(tmp_path, config, 60 + name, name=f"my run {name}")
    groups = groups_in(tmp_path)
    first, second = ([config, replace(config, seed=1)] for config in (usual, other))
    assert configs_in(tmp_path) in ([first, second], [second, first]), "and the seed, which makes none, in rising order"
    assert len({"", *visualize.labels_of(groups)[0]}) == 3
    name = {"rows_after": "memory"}.get(one.name, one.name)
    drawn = visualize.COMPARISONS[name](groups)
    assert "None" not in {text.get_text() for axes in drawn.axes for text in axes.get_xticklabels()}
    marks = [value for axes in drawn.axes for line in axes.lines for value in (*line.get_xdata(), *line.get_ydata())]
    shown = {round(float(value), 6) for value in marks}
    assert shown >= {60, 61, 62, 63}


@pytest.mark.parametrize(
    ("epochs", "after", "left_out"),
    [
        ([10, 12, 11], 10, []),
        ([10, 4, 9, 12], 10, [1, 2]),
        ([3, 3, 2], 3, [2]),
        ([1], 1, []),
        ([9, 0, 1], 9, [2]),  # what has finished none is no run yet
    ],
)
def test_all_are_compared_after_one_epoch_and_those_that_lack_it_are_named_in_one_line(
    call, tmp_path, epochs, after, left_out
):
    paths = [invent_run(tmp_path, rnn_config(seed=n), 10 * (n + 1), epochs=each) for n, each in enumerate(epochs)]
    folder, said = compare(call, tmp_path, "results")
    kept = [10 * (n + 1) * GROWTH[after - 1] for n, each in enumerate(epochs) if each >= after]
    (row,) = results_in(folder)
    expected = str(len(kept)), f"{np.mean(kept):.2f}", "94.17" * (after == 10)
    assert (row["seeds"], row["mean"], row["reported"]) == expected
    assert f"after epoch {after} over seeds" in (folder / "results.md").read_text()
    named = [line.split(": ") for line in said if "left out" in line]
    assert [{*rest.split(", ")} for _, rest in named] == [{str(paths[n]) for n in left_out}] * bool(left_out)
    assert {head for head, _ in named} <= {f"compared after epoch {after}; left out, of fewer epochs"}


def test_of_two_runs_of_an_experiment_the_one_with_most_epochs_counts_and_the_others_are_named(call, tmp_path):
    short, long, middle = (
        invent_run(tmp_path / name, rnn_config(), accuracy, epochs)
        for name, accuracy, epochs in (("a", 10, 2), ("b", 70, 12), ("c", 30, 11))
    )
    invent_run(tmp_path / "d", rnn_config(), 50, source="synthetic")
    folder, said = compare(call, tmp_path, "results")
    assert [(row["seeds"], row["mean"]) for row in results_in(folder)] == [("1", "70.00")]
    assert [(row["mean"], row["reported"]) for row in results_in(folder / "synthetic")] == [("50.00", "")]
    named = [line.split(":")[0] for line in said if str(long) in line]
    assert named == [f"{middle} is left out", f"{short} is left out"]


def record_of(**others):
    return json.dumps({"script": "rnn_mnist", "settings": {}, "conditions": {"data_source": "real"}} | others)


UNREADABLE = [
    ("config.json", record_of(settings={"dropout": 0.5})),  # a setting that this version lacks, then a value
    ("config.json", record_of(settings={"cell": "transformer"})),
    ("config.json", record_of(script="train_gpt")),
    ("config.json", '{"model_type": "bert", "vocab_size": 30522}'),
    ("config.json", '{"script": "rnn_m'),
    ("config.json", "\xff\xfe\0"),
    ("config.json", None),  # a folder
    ("metrics.csv", "epoch,train_loss\n1,"),
    ("metrics.csv", None),
    ("checkpoint.pt", "PK\3\4"),
]


@pytest.mark.parametrize(("file", "content"), UNREADABLE)
def test_what_cannot_be_read_is_passed_over_in_a_collection_and_an_error_when_it_is_named(
    call, tmp_path, file, content
):
    invent_run(tmp_path, rnn_config("gru"), 98)
    path = invent_run(tmp_path, rnn_config(), 90)
    (path / file).unlink(missing_ok=True)
    (path / file).mkdir() if content is None else (path / file).write_text(content, encoding="latin1")
    folder, said = compare(call, tmp_path, "results")
    assert [row["mean"] for row in results_in(folder)] == ["98.00"]
    (named,) = (line for line in said if "left out" in line)
    assert named.startswith(f"{path} is left out: ")
    assert_refused(call(visualize, path), str(path))


def test_a_reference_folder_is_passed_over_unless_named(tmp_path):
    invent_run(tmp_path / "mine" / "reference", rnn_config("gru"), 90)
    invent_run(tmp_path / "mine", rnn_config("lstm"), 90)
    assert configs_in(tmp_path / "mine") == [[rnn_config("lstm")]]
    assert configs_in(tmp_path / "mine" / "reference") == [[rnn_config("gru")]]


# Words and colours


CNN, LSTM, SGD = cnn_cifar10.Config, partial(rnn_config, "lstm"), partial(rnn_config, optimizer="sgd")
LABELS = [
    (LSTM(), LSTM(keep_bias=1.0), "keep bias as torch starts it / keep bias 1"),
    (CNN(), CNN(without="fc1"), "without nothing / without fc1"),
    (SGD(), SGD(momentum=0.9), "momentum 0 / momentum 0.9"),
    (SGD(), LSTM(hidden_size=5), "RNN, 30 hidden units, SGD / LSTM, 5 hidden units, Adam"),
    (CNN(dataset="mnist", lr=1e-3), LSTM(), "LeNet-5 on MNIST / LSTM, 30 hidden units"),
]


@pytest.mark.parametrize(("one", "other", "labels"), LABELS)
def test_what_all_share_is_said_once_and_of_each_what_differs_usual_values_too(tmp_path, one, other, labels):
    groups = [group for config in (one, other) for group in groups_in(invent_run(tmp_path, config, 90))]
    own, common = visualize.labels_of(groups)
    assert " / ".join(own) == labels
    assert common == ", ".join(words for words in one.sentence().split(", ") if words not in own[0].split(", "))


def test_each_network_has_a_colour_in_all_figures_also_one_that_had_none(tmp_path, monkeypatch):
    monkeypatch.setattr(rnn_mnist.Config, "network", property(lambda self: {"rnn": "RNN"}.get(self.cell, "MUT1 cell")))
    for cell, size in (("lstm", 30), ("rnn", 30), ("rnn", 5)):
        invent_run(tmp_path, rnn_config(cell, size), 90)
    small, rnn, mut = groups_in(tmp_path)
    colour = visualize.colour_of(mut)
    assert colour not in {"#E69F00", "#0072B2", "#009E73", "#CC79A7"}

    def colours_in(name, groups):
        axes = visualize.COMPARISONS[name](groups).axes[0]
        return [line.get_color() for line in axes.lines if line.get_marker() == "."]

    assert colours_in("curves", [rnn, mut]) == ["#E69F00", colour]
    assert colours_in("cell", [mut, rnn]) == [colour, "#E69F00"]
    assert len({*map(tuple, colours_in("curves", [mut, small, rnn]))}) == 3, "shades: a network has two settings"


# The table


def test_results_hold_mean_range_and_deviation_of_each_setting_beside_the_report(call, tmp_path):
    invent_seeds(tmp_path, rnn_config("gru"), [97, 98, 99.5])
    invent_seeds(tmp_path, cnn_cifar10.Config(lr=1e-3), [60], epochs=12)
    invent_seeds(tmp_path, cnn_cifar10.Config(dataset="mnist"), [98, 99])
    folder, _ = compare(call, tmp_path, "results")
    rows = {row.pop("experiment"): row for row in results_in(folder)}
    names = "reported", "mean", "range", "std", "seeds", "seconds_per_epoch", "parameters", "remark"
    # Of 97, 98, 99.5: deviations -1.17, -0.17, 1.33, squares 3.17, over 2. Of 0.3 to 3.0 s the median is 1.65.
    expected = {
        "LeNet-5 on CIFAR-10, Adam, learning rate 1e-3": ",60.00,,,1,5.8,9000,only 'similar to 1e-4'",
        "LeNet-5 on MNIST, Adam, learning rate 1e-4": (
            "98.50,98.50,98.00 to 99.00,0.71,2,5.0,9000,by a CNN of another design"
        ),
        "GRU, 30 hidden units, Adam, learning rate 1e-3": "98.32,98.17,97.00 to 99.50,1.26,3,1.6,3000,",
    }
    assert rows == {words: dict(zip(names, row.split(","), strict=True)) for words, row in expected.items()}
    assert [group.reported for group in groups_in(tmp_path)] == [None, None, 98.32], "crosses where it is comparable"
    lines = (folder / "results.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["experiment", *names]
    assert cells[2:] == [[words, *row.values()] for words, row in rows.items()]


# Pictures


def test_pictures_of_a_setting_show_each_seed_their_mean_and_the_reported_figure(tmp_path):
    for size, base in ((5, 65), (10, 70), (20, 80), (30, 90.5)):
        invent_seeds(tmp_path, rnn_config("rnn", size), [base - 1, base, base + 2.5])
    invent_seeds(tmp_path, rnn_config("gru", 20), [98])
    invent_seeds(tmp_path, rnn_config("gru", 40), [99])
    invent_seeds(tmp_path, rnn_config("rnn", 30, lr=1e-2), [20])  # differs in more than the size from all but one
    rnn, gru = visualize.COMPARISONS["hidden_size"](groups_in(tmp_path)).axes  # in the order of --cell's choices
    assert [axes.get_title() for axes in (rnn, gru)] == [f"{cell}, Adam, learning rate 1e-3" for cell in ("RNN", "GRU")]
    assert [text.get_text() for text in rnn.get_xticklabels()] == ["5", "10", "20", "30"]
    assert rnn.get_xlabel() == "--hidden-size\nhighest mean: 30, 91.0 %"
    means = [segment[0, 1] for each in rnn.collections for segment in each.get_segments()]
    assert means == pytest.approx([65.5, 70.5, 80.5, 91])
    dots = [line for line in rnn.lines if line.get_marker() == "."]
    assert [list(line.get_ydata()) for line in dots] == [[b - 1, b, b + 2.5] for b in (65, 70, 80, 90.5)]
    assert [np.mean(line.get_xdata()) for line in dots] == pytest.approx([0, 1, 2, 3])
    crosses = [(*line.get_xdata(), *line.get_ydata()) for line in rnn.lines if line.get_marker() == "x"]
    assert crosses == [(0, 47.73), (1, 74.55), (2, 90.75), (3, 94.17)]
    assert (rnn.get_ylabel(), rnn.get_ylim()) == ("test accuracy in %", gru.get_ylim())
    high = [group for group in groups_in(tmp_path) if group.config.cell == "gru"]
    (gru,) = visualize.COMPARISONS["hidden_size"](high).axes
    assert gru.get_ylabel() == "test error in % (log)", "where all of the picture crowd at the top"
    marks = [(line.get_marker(), *line.get_xdata(), *line.get_ydata()) for line in gru.lines]
    assert marks == [(".", 0, 2), ("x", 0, pytest.approx(2.4)), (".", 1, 1)], "a single seed's dot stands on its tick"
    assert visualize.COMPARISONS["optimizer"](groups_in(tmp_path)) is None, "nothing varies it"


def test_curves_draw_the_mean_over_seeds_the_band_that_spans_them_and_crosses(tmp_path):
    invent_seeds(tmp_path, rnn_config("rnn", 5), [45, 46, 50], epochs=12)
    invent_seeds(tmp_path, rnn_config("rnn", 30), [70, 76])
    accuracy, loss = visualize.compare_curves(groups_in(tmp_path)).axes
    lines = {line.get_label(): line for line in accuracy.lines if line.get_marker() == "."}
    assert list(lines) == ["5 hidden units", "30 hidden units"]
    for line, mean in zip(lines.values(), (47, 73), strict=True):
        assert list(line.get_xdata()) == list(range(1, 11)), "up to the epoch of the comparison"
        assert list(line.get_ydata()) == pytest.approx([mean * share for share in GROWTH[:10]])
    band = accuracy.collections[0].get_paths()[0].vertices
    assert {round(y, 6) for x, y in band if x == 10} == {45, 50}
    crosses = [(*line.get_xdata(), *line.get_ydata()) for line in accuracy.lines if line.get_marker() == "x"]
    assert crosses == [(10, 47.73), (10, 94.17)]
    assert list(loss.lines[0].get_ydata()) == pytest.approx([2 / epoch for epoch in range(1, 11)])


def test_gradients_are_drawn_after_the_epoch_of_the_comparison_for_cells_that_differ_in_nothing_else(tmp_path):
    """Geometric means over seeds; what vanished counts as the floor."""
    drawn, others = [rnn_config("rnn"), rnn_config("lstm")], [rnn_config("gru", 7), rnn_config("rnn", 7, lr=0.1)]
    for config, kept in zip(drawn + others, ([1e-2, 1e-6], [1e-8, 0.0], [0.5], [0.5]), strict=True):
        for path, share in zip(invent_seeds(tmp_path, config, [90] * len(kept), epochs=12), kept, strict=True):
            first = {0: 1e-3, 10: share, 12: 0.9}  # the first step's norm by epoch
            invent_table(path, "gradients", [gradient_row([norm, 1.0], epoch) for epoch, norm in first.items()])
    panels, vanished = visualize.compare_gradients(groups_in(tmp_path)).axes, (1e-8 * visualize.GRADIENT_FLOOR) ** 0.5
    assert [axes.get_title() for axes in panels] == ["RNN", "LSTM"]
    first = [{line.get_linestyle(): line.get_ydata()[0] for line in axes.lines} for axes in panels]
    assert first == [pytest.approx({":": 1e-3, "-": 1e-4}), pytest.approx({":": 1e-3, "-": vanished})]


def invent_blank_rows(folder, config, grown, norms):
    """Invent a run with blank rows: its accuracy after each epoch, and the gradient at the digit, also before them."""
    path = invent_run(folder, config, 0, epochs=len(grown))
    rows = utils.read_table(path / "metrics.csv")
    rows = [row | {"test_accuracy": value} for row, value in zip(rows, grown, strict=True)]
    (path / "metrics.csv").write_text(utils.table_text(utils.METRICS, [row.values() for row in rows]))
    lines = [gradient_row([5.0, norm, *[7.0] * config.rows_after], epoch) for epoch, norm in enumerate(norms)]
    invent_table(path, "gradients", lines)


def test_opening_draws_the_gradient_at_the_digit_by_epoch_a_line_a_run(tmp_path):
    """Of runs that never leave chance dotted; else with a dot where they leave it, which extended runs may do late."""
    stuck, late = [11.35] * 10, [11.35] * 11 + [97.0]
    invent_blank_rows(tmp_path, rnn_config("gru", rows_after=3), stuck, [1e-3, *[1e-20] * 10])
    held = rnn_config("gru", rows_after=2, keep_bias=2.0)
    invent_blank_rows(tmp_path, held, [90.0] * 10, [1e-2, *[0.5] * 10])
    creeping = [1e-6 * 2**epoch for epoch in range(13)]
    invent_blank_rows(tmp_path, rnn_config("rnn", rows_after=3, lr=1e-4), late, creeping)
    invent_run(tmp_path, rnn_config("lstm", rows_after=3), 50)  # whose gradients were not measured
    drawn = visualize.compare_opening(groups_in(tmp_path))
    panels = {axes.get_title(): axes.lines for axes in drawn.axes if axes.axison}
    assert list(panels) == ["RNN, as torch starts it", "GRU, as torch starts it", "GRU, B = 2"]
    assert "2 of 3 runs leave chance,\n1 at 0.02 or more" in drawn.get_suptitle()
    lines = {title: (line, [*map(float, line.get_ydata())]) for title, (line,) in panels.items()}
    shown = dict(zip([text.get_text() for text in drawn.legends[0].texts], drawn.legends[0].get_lines(), strict=True))
    leaves, stays, held = (lines[title] for title in panels)
    assert [line.get_linestyle() for line, _ in (stays, leaves, held)] == [":", "-", "-"]
    assert stays[1] == [1e-3, *[visualize.GRADIENT_FLOOR] * 10]
    assert held[1] == [1e-2, *[0.5] * 10]
    dots = [[epoch for epoch, is_dot in enumerate(line.get_markevery()) if is_dot] for line, _ in lines.values()]
    assert dots == [[12], [], [1]]
    for (line, _), rate in ((leaves, "1e-4"), (held, "1e-3")):
        assert tuple(line.get_color()) == tuple(shown[f"learning rate {rate}"].get_color())


def test_memory_draws_a_panel_a_network_and_a_line_a_start_at_the_best_rate(tmp_path):
    for after, accuracies in ((0, [98, 99]), (14, [60, 70]), (56, [11.35])):
        invent_seeds(tmp_path, rnn_config("gru", rows_after=after), accuracies)
    invent_seeds(tmp_path, rnn_config("gru", rows_before=14), [96, 97])
    invent_seeds(tmp_path, rnn_config("gru", rows_after=56, keep_bias=1.0), [90])
    for other in ({"hidden_size": 20}, {"lr": 1e-2, "rows_after": 14}, {"cell": "rnn"}):  # no blank rows, a worse rate
        invent_seeds(tmp_path, replace(rnn_config("gru"), **other), [50])
    (axes,) = visualize.compare_memory(groups_in(tmp_path)).axes
    means = [[*map(float, line.get_ydata())] for line in axes.lines if line.get_marker() == "None"]
    assert means == [[98.5, 65, 11.35], [90], [11.35, 11.35]], "the last one always answers 1"
    dots = [
        (str(line.get_markerfacecolor()) == "none", [*line.get_ydata()])
        for line in axes.lines
        if line.get_marker() == "o"
    ]
    assert dots == [(False, [98, 99]), (False, [60, 70]), (False, [11.35]), (True, [96, 97]), (False, [90])]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"lr": 1e-2},
            ", pairs: +2.00 points (interval +1.00 to +3.00), so in 5 of 5 seeds, p 0.0312. The first is ahead: holds",
        ),
        (
            {"cell": "gru"},
            ": +2.00 points (interval +0.50 to +3.50), so in 5 of 5 seeds, p 0.0357. The first is ahead: holds",
        ),
    ],
)
def test_of_two_settings_the_difference_its_interval_and_its_p_are_told(call, tmp_path, settings, words):
    """The one of the higher mean first; those are pairs whose weights start alike."""
    invent_seeds(tmp_path, rnn_config(), [80, 81, 82, 83, 84])
    invent_seeds(tmp_path, replace(rnn_config(), **settings), [83, 84, 84, 84, 85])
    folder, said = compare(call, tmp_path, "results")
    (line,) = [line for line in said if " against " in line]
    assert words in line
    assert line.startswith(("GRU 84.00 %", "learning rate 0.01 84.00 %"))
    assert (folder / "results.md").read_text().endswith(f"\n\n{line}\n")


def test_runs_of_two_settings_are_pairs_where_they_have_a_seed_in_common(tmp_path):
    invent_run(tmp_path, rnn_config(lr=1e-3, seed=0), 80)
    invent_run(tmp_path, rnn_config(lr=1e-2, seed=1), 81)
    assert "pairs" not in visualize.which_is_ahead(groups_in(tmp_path))
    invent_run(tmp_path, rnn_config(lr=1e-3, seed=1), 80)
    assert "pairs" in visualize.which_is_ahead(groups_in(tmp_path))


# What is written, and where


def test_a_comparison_draws_all_and_what_an_earlier_one_left_goes_first(call, tmp_path):
    invent_seeds(tmp_path, rnn_config("gru"), [98, 97])
    invent_seeds(tmp_path, rnn_config("gru", 20), [98, 97])
    old = tmp_path / "comparison" / "tensorboard" / "gone.png"
    old.parent.mkdir(parents=True)
    for path in (old, tmp_path / "comparison" / "optimizer.png", tmp_path / "notes.txt"):
        path.write_text("old")
    folder, said = compare(call, tmp_path)
    pictures = {"curves.png", "hidden_size.png"}
    assert {path.name for path in folder.iterdir()} > pictures | {"claims.md", "results.csv", "tensorboard"}
    assert all(imread(folder / name)[..., :3].std() > 0.05 for name in pictures)
    assert {str(path) for path in folder.rglob("*") if path.is_file()} <= {*said}, "each is told"
    assert [path.exists() for path in (old, folder / "optimizer.png", tmp_path / "notes.txt")] == [False, False, True]
    compare(call, tmp_path, "results")
    assert (folder / "curves.png").exists(), "what was not asked for stays"


def test_runs_that_lie_where_a_comparison_goes_are_not_deleted(call, tmp_path):
    path = invent_run(tmp_path / "comparison", rnn_config("gru"), 98)
    compare(call, tmp_path)
    assert (path / "metrics.csv").exists()


def test_in_a_folder_that_was_typed_files_of_the_users_stay(call, tmp_path):
    path = invent_run(tmp_path, rnn_config("gru"), 98)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.png").write_text("mine")
    assert call(visualize, path.parent, "--output-dir", tmp_path / "mine")[0] == 0
    assert {each.name for each in (tmp_path / "mine").iterdir()} > {"thesis.png", "curves.png", "results.csv"}


def test_tensorboard_shows_the_mean_over_the_seeds_of_each_setting_of_several(call, tmp_path):
    """A run for each setting, whatever the folders of its runs are called."""
    for size in (20, 30):
        for seed, accuracy in enumerate((80, 82, 96)):
            invent_run(tmp_path, rnn_config("gru", size, seed=seed), accuracy + size, 11, name=f"{size} {seed}")
    invent_run(tmp_path, rnn_config("lstm"), 95)
    folder, _ = compare(call, tmp_path, "tensorboard")
    found = {path.name: path for path in (folder / "tensorboard" / "rnn_mnist" / "GRU").iterdir()}
    assert found.keys() == {f"gru{size}_adam_lr1e-3_3seeds" for size in (20, 30)}
    for size, path in zip((20, 30), sorted(found.values()), strict=True):
        points = {(tag, step): pytest.approx(value) for tag, step, value in read_points(path)}
        expected = {"Accuracy/Test": [(86 + size) * share for share in GROWTH], "Accuracy/Train": [50] * 10}
        expected |= {"Loss/Train": [2 / epoch for epoch in range(1, 11)], "Loss/Test": [1] * 10}
        assert {(tag, n): value for tag, each in expected.items() for n, value in enumerate(each[:10], 1)} == points
        assert "_hparams_/session_start_info" in read_events(path).summary_metadata


@pytest.fixture
def untold_run(noise_run, tmp_path, monkeypatch):
    """The folder of a trained run of which nothing was measured yet, beside the data that it was trained on."""
    monkeypatch.setattr(utils, "embedded_patterns", lambda size: noise_digits(320)[3:])
    utils.load_data.cache_clear()
    shutil.copytree(noise_run, tmp_path / NOISE_NAME, ignore=shutil.ignore_patterns("figures", ".lock"))
    yield tmp_path / NOISE_NAME
    utils.load_data.cache_clear()


def test_what_was_not_measured_is_measured_kept_and_made_anew_of_newer_weights(untold_run):
    def measure():
        return visualize.measured(visualize.SavedRun(untold_run), "gradients")

    table, rows = untold_run / "figures" / "gradients.csv", measure()
    assert [row["epoch"] for row in rows] == ["0", "1"]
    assert utils.read_table(table) == rows
    invent_table(untold_run, "gradients", rows[:1])
    assert measure() == rows[:1], "the table is enough"
    os.utime(untold_run / "checkpoint.pt", (time.time() + 60,) * 2)
    assert measure() == rows


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_what_is_measured_of_a_run_whose_folder_cannot_be_written_counts_all_the_same(untold_run, monkeypatch, number):
    def refuse(path, content):
        raise OSError(number, "no", str(path))

    monkeypatch.setattr(utils, "write_atomically", refuse)
    assert len(visualize.measured(visualize.SavedRun(untold_run), "gradients")) == 2
    assert not list(untold_run.glob("figures/*"))
