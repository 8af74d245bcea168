"""The comparison of many runs: groups, tables, figures, and the claims, each settled by a test over seeds."""

import csv
import itertools
import json
import shutil
from collections import Counter
from dataclasses import asdict, fields, replace

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from visualize import DIVERGED, FAILS, HOLDS, UNDECIDED, UNTESTED, settle_beats, settle_correlated, settle_similar

import numpy as np
import pytest
from conftest import CONFIGS, EPOCHS, ROOT, assert_refused, read_files, read_points
from matplotlib.image import imread
from test_understanding import gradient_rows
from test_visualize import untold

FIVE = range(5)
CLAIMS = {claim.number: claim for claim in visualize.REPORT_CLAIMS + visualize.OUR_CLAIMS}


# Runs that were never trained


def share_of_growth(epoch):
    return 1.01 if epoch == 9 else epoch / 10


def invent_run(folder, config, accuracy, epochs=10, diverged=None, source="real"):
    """Write config.json and metrics.csv of a run whose accuracy grows evenly, but for a best epoch before the last."""
    parameters = {"rnn": 1000, "gru": 3000, "lstm": 4000}.get(getattr(config, "cell", None), 9000)
    conditions = utils.Conditions(data_source=source, parameters=parameters, epochs=10)
    path = utils.run_folder(folder, config, source)
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps(utils.Record(config, conditions, diverged).as_dict()))
    rows = [
        (epoch, 2.0 / epoch, 50.0, 1.0, accuracy * share_of_growth(epoch), parameters * epoch / 1e4)
        for epoch in range(1, epochs + 1)
    ]
    if rows:
        (path / "metrics.csv").write_text(utils.table_text(utils.METRICS, rows))
    return path


def invent_report(folder, accuracy, seeds=FIVE, others=()):
    """Write the runs of the report's settings, and of others; accuracy(config) after the last epoch."""
    configs = [*(row.config for row in visualize.REPORT), *others]
    for config in (replace(config, seed=seed) for config in configs for seed in seeds):
        invent_run(folder, config, accuracy(config))


def rnn_config(cell="rnn", hidden_size=30, **settings):
    return rnn_mnist.Config(cell=cell, hidden_size=hidden_size, **settings)


AS_MANY_WEIGHTS = [rnn_config("rnn", 55), rnn_config("rnn", 64)]


def as_reported(config):
    """Accuracies in the order of the report's claims, a little different for each seed."""
    if isinstance(config, cnn_cifar10.Config):
        base = 99 if config.dataset == "mnist" else {1e-4: 61, 1e-3: 60.5}[config.lr]
    else:
        base = {"rnn": min(60 + config.hidden_size, 96), "gru": 97.7 + config.hidden_size / 30, "lstm": 98}
        base = base[config.cell] - abs(np.log10(config.lr / 1e-3))
    return base - 10 * (config.optimizer == "sgd") + 0.01 * config.seed


def groups_in(folder):
    return visualize.group_runs(visualize.find_runs(folder))


def settings_in(folder):
    """Return (settings without seed, seeds) of each group below a folder."""
    return [(group[0].config.setting(), [run.config.seed for run in group]) for group in groups_in(folder)]


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def compare(call, folder, *names):
    """Compare the runs below a folder; the script has to end with status 0 and without a word on standard error."""
    status, output, error = call(visualize, folder, *(["--figures", *names] if names else []))
    assert (status, error) == (0, "")
    return folder / "comparison", output


# Groups


def test_a_setting_and_seed_counts_once(tmp_path):
    for folder in ("one", "two"):
        invent_report(tmp_path / folder, as_reported, seeds=(0,))
    groups = groups_in(tmp_path)
    assert len(groups) == 16
    assert all(len(group) == 1 for group in groups)


def test_groups_and_their_seeds_are_in_rising_order(tmp_path):
    """Also where a setting lacks the seeds that others have."""
    for cell, size, seed in (("rnn", 10, 0), ("rnn", 5, 3), ("gru", 7, 1), ("rnn", 10, 12), ("rnn", 20, 0)):
        invent_run(tmp_path, rnn_config(cell, size, seed=seed), 90)
    invent_run(tmp_path, rnn_config("rnn", 10, lr=0.1, seed=0), 90)
    invent_run(tmp_path, cnn_cifar10.Config(seed=4), 90)
    first, *others = settings_in(tmp_path)
    assert first == (cnn_cifar10.Config(), [4])
    by_rate = {0.1: [], 1e-3: []}
    for config, seeds in others:
        by_rate[config.lr].append((config.cell, config.hidden_size, seeds))
    assert by_rate == {
        0.1: [("rnn", 10, [0])],
        1e-3: [("gru", 7, [1]), ("rnn", 5, [3]), ("rnn", 10, [0, 12]), ("rnn", 20, [0])],
    }


def other_value(one, value):
    """Return a value that a setting may have beside the one given."""
    if one.choices:
        return next(choice for choice in one.choices if choice != value)
    if value is None:
        return 1.0
    return value + 1 if one.kind is int else (value or 1) / 2


@pytest.mark.parametrize(
    ("script", "name"), [(script, field.name) for script, cls in CONFIGS.items() for field in fields(cls)]
)
def test_runs_that_differ_in_one_setting_are_never_merged_but_for_their_seeds(tmp_path, script, name):
    needed = {"momentum": {"optimizer": "sgd"}, "keep_bias": {"cell": "lstm"}}.get(name, {})
    one = CONFIGS[script](**needed)
    (setting,) = (each for each in utils.settings_of(CONFIGS[script]) if each.name == name)
    other = replace(one, **{name: other_value(setting, getattr(one, name))})
    for config, accuracy in ((one, 60), (other, 70)):
        invent_run(tmp_path, config, accuracy)
    groups = groups_in(tmp_path)
    if name == "seed":
        assert [[run.config for run in group] for group in groups] == [[one, other]]
        return
    assert {run.config for group in groups for run in group} == {one, other}
    assert [len(group) for group in groups] == [1, 1]
    labels, _ = visualize.labels_of(groups)
    assert labels[0] != labels[1], "a reader, too, tells them apart"


def test_synthetic_and_unfinished_runs_are_groups_of_their_own(tmp_path, call):
    for seed, epochs, source in (
        (0, 10, "real"),
        (1, 12, "real"),
        (2, 4, "real"),
        (3, 3, "real"),
        (0, 10, "synthetic"),
    ):
        invent_run(tmp_path, rnn_config(seed=seed), 90, epochs, source=source)
    groups = [[(run.config.seed, run.source) for run in group] for group in groups_in(tmp_path)]
    assert sorted(groups) == [[(0, "")] + [(1, "")], [(0, ", synthetic data")], [(2, ""), (3, "")]]
    labels, common = visualize.labels_of(groups_in(tmp_path))
    assert sorted(labels) == ["", "only 3 epochs", "synthetic data"]
    (single,) = visualize.group_runs([visualize.SavedRun(invent_run(tmp_path / "1", rnn_config(), 90, epochs=1))])
    assert single.shortfall == "only 1 epoch"
    assert common == "RNN, 30 hidden units, Adam, learning rate 1e-3"
    shutil.rmtree(tmp_path / "1")
    folder, _ = compare(call, tmp_path, "results")
    means = {row["setting"]: row["mean"] for row in read_csv(folder / "results.csv")}
    setting = "RNN, 30 hidden units, Adam, learning rate 1e-3"
    assert means == {setting: "90.00", f"{setting}, only 3 epochs": "27.00"}, "each row says what tells it apart"
    (row,) = read_csv(folder / "synthetic" / "results.csv")
    assert (row["setting"], row["mean"]) == (f"{setting}, synthetic data", "90.00")


def test_several_runs_are_compared_in_one_figure(cnn_run, rnn_run, tmp_path, call, monkeypatch):
    drawn = keep_pictures(monkeypatch)
    for kind, (_, folder) in (("cnn_cifar10", cnn_run), ("rnn_mnist", rnn_run)):
        (tmp_path / kind / "run").mkdir(parents=True)
        for name in ("config.json", "metrics.csv"):
            shutil.copy(folder / name, tmp_path / kind / "run")
    (tmp_path / "reference").mkdir()
    folder, output = compare(call, tmp_path, "curves")
    assert output.splitlines()[-1] == str(folder / "curves.png")
    (figure,) = drawn
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["LeNet-5 on CIFAR-10, learning rate 1e-4", "RNN, 30 hidden units, learning rate 1e-3"]
    assert figure.get_suptitle().startswith(f"Accuracy and loss by epoch: Adam, synthetic data, only {EPOCHS} epochs\n")
    assert [len(axes.lines) for axes in figure.axes] == [2, 2]
    assert untold("curves.png", figure) == []


def test_a_reference_folder_is_passed_over_unless_named(tmp_path):
    copy = invent_run(tmp_path / "reference", rnn_config(), 90)
    with pytest.raises(utils.InputError, match="holds no run"):
        visualize.find_runs(tmp_path)
    assert [run.folder for run in visualize.find_runs(tmp_path / "reference")] == [copy]


# Records of other versions


def test_a_setting_that_this_version_does_not_know_is_refused_in_one_line(tmp_path, call):
    path = invent_run(tmp_path, rnn_config(), 90) / "config.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "settings": {**record["settings"], "dropout": 0.5}}))
    for arguments in ([tmp_path], [path.parent], [path.parent, path.parent]):
        outcome = call(visualize, *arguments, "--figures", "curves")
        assert_refused(outcome, f"{path} is not of this project")
        assert_refused(outcome, "'dropout'")


@pytest.mark.parametrize(
    ("config", "missing"),
    [(rnn_config("lstm", seed=1), ("rows_after", "rows_before", "keep_bias")), (cnn_cifar10.Config(), ("without",))],
)
def test_a_setting_that_an_older_run_lacks_has_its_default(tmp_path, config, missing):
    path = invent_run(tmp_path, config, 90) / "config.json"
    record = json.loads(path.read_text())
    for name in missing:
        del record["settings"][name]
    path.write_text(json.dumps(record))
    invent_run(tmp_path, replace(config, seed=7), 90)
    assert visualize.SavedRun(path.parent).config == config
    assert settings_in(tmp_path) == [(config.setting(), [config.seed, 7])], "beside the runs that name it"


# The table


def test_results_hold_a_row_for_each_setting(call, tmp_path):
    invent_report(tmp_path, as_reported, seeds=(0, 1, 2))
    folder, _ = compare(call, tmp_path)
    pictures = {f"{name}.png" for name in ("curves", "hidden_size", "learning_rate", "optimizer")}
    others = {"results.csv", "results.md", "claims.md", "tensorboard"}
    assert {path.name for path in folder.iterdir()} == {*others, *pictures}
    assert all(imread(folder / name)[..., :3].std() > 0.05 for name in pictures)
    rows = {row["setting"]: row for row in read_csv(folder / "results.csv")}
    assert len(rows) == 16
    row = rows["GRU, 30 hidden units, Adam, learning rate 1e-3"]
    assert (row["seeds"], row["mean"], row["std"], row["reported"]) == ("3", "98.71", "0.01", "98.32")
    assert (row["difference"], row["within"], row["diverged"], row["remark"]) == ("+0.39", "no", "", "")
    assert (row["seconds_per_epoch"], row["parameters"]) == ("1.6", "3000"), "the median epoch of 0.3 to 3.0 s: 1.65"
    other = rows["LeNet-5 on CIFAR-10, Adam, learning rate 1e-3"]
    assert (other["reported"], other["difference"], other["remark"]) == ("", "", "only 'similar to 1e-4'")
    lines = (folder / "results.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert cells[0] == list(rows[row["setting"]])
    assert any(line.startswith("| GRU, 30 hidden units, Adam, learning rate 1e-3 | 98.32 | 98.71 |") for line in lines)


def test_a_seed_that_diverged_is_named_and_is_no_setting_of_its_own(call, tmp_path):
    for seed in (0, 1):
        invent_run(tmp_path, rnn_config("gru", seed=seed), 98)
        invent_run(tmp_path, rnn_config("lstm", seed=seed), 97)
    invent_run(tmp_path, rnn_config("gru", seed=2), 98, epochs=3, diverged=4)
    invent_run(tmp_path, rnn_config("lstm", seed=2), 97, epochs=0, diverged=1)
    assert [seeds for _, seeds in settings_in(tmp_path)] == [[0, 1, 2]] * 2
    folder, _ = compare(call, tmp_path)
    rows = read_csv(folder / "results.csv")
    assert [(row["seeds"], row["mean"], row["diverged"]) for row in rows] == [
        ("3", "98.00", "1 of 3: seed 2"),
        ("3", "97.00", "1 of 3: seed 2"),
    ]


def test_a_seed_that_diverged_in_a_shorter_sweep_is_no_setting_of_its_own(call, tmp_path):
    for seed, epochs, diverged in ((0, 3, None), (1, 3, None), (2, 1, 2)):
        invent_run(tmp_path, rnn_config("gru", seed=seed), 90, epochs, diverged)
    assert [seeds for _, seeds in settings_in(tmp_path)] == [[0, 1, 2]]
    folder, _ = compare(call, tmp_path, "results")
    (row,) = read_csv(folder / "results.csv")
    assert (row["seeds"], row["mean"], row["diverged"]) == ("3", "27.00", "1 of 3: seed 2")


def test_runs_that_all_diverged_are_still_compared(call, tmp_path):
    for seed in (0, 1):
        invent_run(tmp_path, rnn_config(lr=10.0, seed=seed), 0, epochs=0, diverged=1)
        invent_run(tmp_path, rnn_config(lr=1.0, seed=seed), 0, epochs=0, diverged=1)
    folder, _ = compare(call, tmp_path)
    rows = read_csv(folder / "results.csv")
    assert [(row["mean"], row["diverged"]) for row in rows] == [("", "2 of 2: seed 0 1")] * 2


def test_a_listed_run_that_has_finished_no_epoch_is_refused_with_what_trains_it(call, tmp_path):
    """It has not diverged, and a comparison would say that it had."""
    finished = invent_run(tmp_path, rnn_config(seed=0), 90)
    begun = invent_run(tmp_path, rnn_config(seed=1), 90, epochs=0)
    outcome = call(visualize, finished, begun, "--output-dir", tmp_path / "out")
    assert_refused(outcome, f"{begun} has finished no epoch")
    assert_refused(outcome, "python rnn_mnist.py --seed 1")


# Figures


def keep_pictures(monkeypatch):
    """Return a list in which each Figure is kept that is written."""
    drawn, write = [], visualize.picture_bytes
    monkeypatch.setattr(visualize, "picture_bytes", lambda figure: (drawn.append(figure), write(figure))[1])
    return drawn


def heights(axes):
    """Return the heights of an axes' horizontal lines by their place."""
    lines = [segment for each in axes.collections for segment in each.get_segments()]
    return {round(segment[:, 0].mean()): segment[0, 1] for segment in lines}


def test_figures_against_a_setting_show_each_seed_their_mean_and_the_reported_figure(tmp_path):
    invent_report(tmp_path, as_reported, seeds=(0, 1, 2))
    figure = visualize.draw_against("hidden_size", groups_in(tmp_path))
    assert len(figure.axes) == 3
    panels = {axes.get_title().partition(",")[0]: axes for axes in figure.axes}
    rnn, gru = panels["RNN"], panels["GRU"]
    assert [text.get_text() for text in rnn.get_xticklabels()] == ["5", "10", "20", "30"]
    assert rnn.get_ylabel() == "test accuracy in %"
    assert heights(rnn) == pytest.approx({0: 65.01, 1: 70.01, 2: 80.01, 3: 90.01})
    dots = [line for line in rnn.lines if line.get_marker() == "."]
    assert [list(line.get_ydata()) for line in dots] == [
        pytest.approx([base, base + 0.01, base + 0.02]) for base in (65, 70, 80, 90)
    ]
    crosses = [line for line in rnn.lines if line.get_marker() == "x"]
    assert [line.get_ydata()[0] for line in crosses] == pytest.approx([47.73, 74.55, 90.75, 94.17])
    assert gru.get_ylabel() == "test error in %", "above 90 %"
    assert heights(gru) == pytest.approx({0: 100 - 97.71 - 20 / 30, 1: 100 - 98.71})
    assert untold("hidden_size.png", figure) == []


@pytest.mark.parametrize(
    ("figure", "setting", "ticks"),
    [
        ("learning_rate", "lr", ["1e-5", "1e-4", "1e-3", "0.1"]),
        ("optimizer", "optimizer", ["adam", "sgd"]),
    ],
)
def test_figures_against_other_settings_vary_them_alone(tmp_path, figure, setting, ticks):
    invent_report(tmp_path, as_reported, seeds=(0, 1))
    groups = groups_in(tmp_path)
    drawn = visualize.COMPARISONS[figure](groups)
    panels = {axes.get_title(): axes for axes in drawn.axes if axes.axison}
    assert len(panels) == 2, "the CNN's, and that of the RNN with 5 units"
    rnn = next(axes for title, axes in panels.items() if title.startswith("RNN, 5 hidden units"))
    assert [text.get_text() for text in rnn.get_xticklabels()] == ticks
    assert untold(figure, drawn) == []
    assert visualize.draw_against(setting, groups[:1]) is None


def test_curves_draw_the_mean_over_seeds_and_the_band_that_spans_them(tmp_path):
    for size, seed in ((5, 0), (5, 1), (30, 0), (30, 2)):
        invent_run(tmp_path, rnn_config("rnn", size, seed=seed), 40 + size + 2 * seed)
    figure = visualize.compare_curves(groups_in(tmp_path))
    accuracy, loss = figure.axes
    means = {line.get_label(): line for line in accuracy.lines if line.get_label()[0] != "_"}
    assert list(means) == ["5 hidden units", "30 hidden units"]
    for label, first, second in (("5 hidden units", 45, 47), ("30 hidden units", 70, 74)):
        expected = [(first + second) / 2 * share_of_growth(epoch) for epoch in range(1, 11)]
        assert list(means[label].get_ydata()) == pytest.approx(expected)
    band = accuracy.collections[0].get_paths()[0].vertices
    assert {round(y, 6) for x, y in band if x == 10} == {45, 47}
    crosses = [line for line in accuracy.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(10, 47.73), (10, 94.17)]
    assert list(loss.lines[0].get_ydata()) == pytest.approx([2 / epoch for epoch in range(1, 11)])
    assert figure.get_suptitle().startswith("Accuracy and loss by epoch: RNN, Adam, learning rate 1e-3\n")
    assert untold("curves.png", figure) == []


def test_curves_of_many_settings_have_a_panel_for_each_setting_that_varies(tmp_path):
    invent_report(tmp_path, as_reported, seeds=(0, 1))
    figure = visualize.compare_curves(groups_in(tmp_path))
    panels = {axes.get_title(): axes for axes in figure.axes if axes.axison}
    legends = {title: {text.get_text() for text in axes.get_legend().get_texts()} for title, axes in panels.items()}
    assert legends["RNN, Adam, learning rate 1e-3"] == {f"{size} hidden units" for size in (5, 10, 20, 30)}
    assert {"Adam", "SGD"} in legends.values()
    gated = panels["GRU, Adam, learning rate 1e-3"]
    assert gated.get_ylabel() == "test error in %", "above 90 %"
    lines = {line.get_label(): line.get_ydata() for line in gated.lines}
    assert lines["30 hidden units"][-1] == pytest.approx(100 - 98.705)
    assert untold("curves.png", figure) == []


@pytest.mark.parametrize(
    ("said", "own", "common"),
    [
        ([{"network": "RNN", "size": "5 units", "rate": "0.1"}], [""], "RNN, 5 units, 0.1"),
        ([{"network": "RNN", "rate": "0.1"}, {"network": "GRU", "rate": "0.1"}], ["RNN", "GRU"], "0.1"),
        ([{"network": "RNN", "bias": ""}, {"network": "RNN", "bias": "bias 1"}], ["", "bias 1"], "RNN"),
        ([{"network": "CNN"}, {"network": "CNN", "size": "5 units"}], ["", "5 units"], "CNN"),
        ([{"network": "RNN", "size": "5"}, {"network": "RNN"}], ["5", ""], "RNN"),
    ],
)
def test_what_all_share_is_said_once_and_the_rest_of_each(said, own, common):
    assert visualize.tell_apart(said) == (own, common)


def test_families_have_a_panel_each_and_what_is_left_of_the_grid_is_empty(tmp_path):
    configs = [rnn_config(cell, size) for cell in ("rnn", "gru", "lstm") for size in (20, 30)]
    groups = [visualize.Group([visualize.SavedRun(invent_run(tmp_path, config, 90))]) for config in configs]
    families, drawn = [groups[:2], groups[2:4], groups[4:]], []
    figure = visualize.draw_families(families, 2, lambda axes, family: drawn.append((axes, family)), "about")
    assert [family for _, family in drawn] == families
    assert [axes.get_title().split(",")[0] for axes, _ in drawn] == ["RNN", "GRU", "LSTM"]
    assert [axes.axison for axes in figure.axes] == [True, True, True, False]
    assert visualize.draw_families([], 2, None, "about") is None


OWN_PICTURE = [
    cnn_cifar10.Config(without="fc1"),
    rnn_config(rows_after=28),
    rnn_config("gru", rows_before=28),
    rnn_config("lstm", keep_bias=1.0),
]


def test_settings_that_have_a_picture_of_their_own_are_in_no_panel_of_the_curves(tmp_path):
    invent_report(tmp_path, as_reported, seeds=(0,))
    plain = groups_in(tmp_path)
    for config in OWN_PICTURE:
        invent_run(tmp_path, config, 50)
    groups = groups_in(tmp_path)
    assert len(groups) == len(plain) + 4
    assert [[run.config for run in group] for group in visualize.usual(groups)] == [
        [run.config for run in group] for group in plain
    ]
    panels = [visualize.compare_curves(each).axes for each in (groups, plain)]
    names = [[(axes.get_title(), len(axes.lines)) for axes in each if axes.axison] for each in panels]
    assert names[0] == names[1]


def test_the_layers_that_a_network_is_trained_without_are_ranked_by_what_the_same_seed_loses(tmp_path):
    accuracies = {"nothing": [60, 62, 64], "conv1": [55, 56, 57], "fc1": [30, 42], "conv1+conv2": [20, 20, 20]}
    for without, values in accuracies.items():
        for seed, value in enumerate(values):
            invent_run(tmp_path, cnn_cifar10.Config(without=without, seed=seed), value)
    invent_run(tmp_path, cnn_cifar10.Config(without="conv1", lr=1e-3), 50)
    (axes,) = (figure := visualize.compare_without(groups_in(tmp_path))).axes
    names = [text.get_text().split("\n") for text in axes.get_yticklabels()]
    assert names == [[name, "9,000 weights left"] for name in ("conv1+conv2", "fc1", "conv1")]
    assert [list(line.get_xdata()) for line in axes.lines] == [
        pytest.approx(values) for values in ([40, 42, 44], [30, 20], [5, 6, 7])
    ]
    assert [round(np.mean(line.get_ydata()), 6) for line in axes.lines] == [0, 1, 2]
    means = [segment[0, 0] for each in axes.collections for segment in each.get_segments()]
    assert means == pytest.approx([42, 25, 6])
    assert [text.get_text() for text in axes.texts] == ["42.0", "25.0", "6.0"]
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "what costs most stands on top"
    assert untold("without.png", figure) == []
    lacking = [group for group in groups_in(tmp_path) if group[0].config.without != "nothing"]
    assert visualize.compare_without(lacking) is None, "nothing to compare with"


def invent_memory(folder, config, accuracies, gradients=()):
    """Write runs whose gradient at the digit's last row before training is given by seed."""
    for seed, accuracy in enumerate(accuracies):
        path = invent_run(folder, replace(config, seed=seed), accuracy)
        for gradient in gradients[seed : seed + 1]:
            norms = [1.0] * (config.rows_before + 27) + [gradient] + [0.5] * config.rows_after
            cell = [0.0] * len(norms) if config.cell == "lstm" else []
            write_measured(path, "gradients", gradient_rows(norms) + gradient_rows(cell, 0, "cell"))


def test_memory_draws_each_network_against_blank_rows_and_the_gradient_that_reaches_the_digit(tmp_path):
    plain, control = rnn_config("gru"), rnn_config("gru", rows_before=28)
    invent_memory(tmp_path, plain, [97, 99])
    invent_memory(tmp_path, control, [96, 95])
    invent_memory(tmp_path, rnn_config("gru", rows_after=28), [80, 70], [1e-4, 1e-5])
    invent_memory(tmp_path, rnn_config("gru", rows_after=56), [20, 30], [1e-8, 0.0])
    for bias, accuracy in ((None, 11), (1.0, 90)):
        invent_memory(tmp_path, rnn_config("lstm", keep_bias=bias), [97])
        invent_memory(tmp_path, rnn_config("lstm", rows_after=28, keep_bias=bias), [accuracy], [1e-9])
    invent_memory(tmp_path, rnn_config("rnn"), [94, 95])
    figure = visualize.compare_memory(groups_in(tmp_path))
    left, right = figure.axes
    lines = {line.get_label(): line for line in left.lines if not line.get_label().startswith("_")}
    assert list(lines) == ["GRU", "LSTM", "LSTM, keep bias 1"], "the RNN was to remember nothing"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(lines)
    assert (list(lines["GRU"].get_xdata()), list(lines["GRU"].get_ydata())) == ([-1, 27, 55], [98, 75, 25])
    places = [list(line.get_xdata()) for line in lines.values()]
    assert places == [[-1, 27, 55], [0, 28], [1, 29]], "beside each other, that none hides another"
    assert list(left.get_xticks()) == [0, 28, 56]
    looks = {label: (line.get_linestyle(), line.get_marker()) for label, line in lines.items()}
    assert looks == {"GRU": ("-", "o"), "LSTM": ("-", "o"), "LSTM, keep bias 1": ("--", "^")}
    gru = [line for line in left.lines if line.get_color() == visualize.NETWORK_COLOURS["GRU"]]
    (hollow,) = (line for line in gru if line.get_markerfacecolor() == "none")
    assert (list(hollow.get_xdata()), list(hollow.get_ydata())) == ([27, 27], [96, 95])
    assert hollow.get_linestyle() == "None"
    marks = [(*line.get_xdata(), *line.get_ydata()) for line in gru if line.get_alpha()]
    assert marks == [(-1, 97), (-1, 99), (27, 80), (27, 70), (55, 20), (55, 30)]
    spots = [(*line.get_xdata(), *line.get_ydata()) for line in right.lines]
    assert spots == [(1e-4, 80), (1e-5, 70), (1e-8, 20), (visualize.GRADIENT_FLOOR, 30), (1e-9, 11), (1e-9, 90)]
    assert right.get_xscale() == "log"
    assert figure.get_suptitle().endswith("\n30 hidden units, Adam, learning rate 1e-3")
    assert untold("memory.png", figure) == []


def test_memory_draws_a_run_of_fewer_epochs_apart_and_keeps_the_others(tmp_path):
    for rows, accuracy in ((0, 90), (28, 80), (56, 70)):
        invent_memory(tmp_path, rnn_config(rows_after=rows), [accuracy] * 2)
    invent_run(tmp_path, rnn_config(rows_after=28, seed=2), 50, epochs=3)
    left, _ = visualize.compare_memory(groups_in(tmp_path)).axes
    (line,) = (line for line in left.lines if not line.get_label().startswith("_"))
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([0, 28, 56], [90, 80, 70])


def test_memory_needs_runs_that_read_blank_rows_after_the_digit(tmp_path):
    for config in (rnn_config(), rnn_config(rows_before=28), rnn_config("lstm", keep_bias=1.0), cnn_cifar10.Config()):
        invent_run(tmp_path, config, 90)
    assert visualize.compare_memory(groups_in(tmp_path)) is None


def write_measured(run_folder, name, rows):
    columns = visualize.MEASUREMENTS[name].columns
    visualize.save(name, {f"{name}.csv": visualize.Table(columns, rows)}, run_folder / "figures")


def test_several_runs_are_measured_and_compared(cnn_run, rnn_run, tmp_path, call, monkeypatch):
    monkeypatch.setattr(visualize, "GABOR_STARTS", 1)
    copies = [tmp_path / "cnn", tmp_path / "rnn"]
    for (_, folder), copy in zip((cnn_run, rnn_run), copies, strict=True):
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("figures", ".lock"))
    tables = [copies[0] / "figures" / "gabor.csv", copies[1] / "figures" / "gradients.csv"]
    names = "--figures", "gabor", "gradients"
    status, output, error = call(visualize, *copies, *names, "--output-dir", tmp_path)
    assert (status, error) == (0, "")
    pictures = [tmp_path / "gabor.png", tmp_path / "gradients.png"]
    written = [str(path) for pair in zip(tables, pictures, strict=True) for path in pair]
    assert output.splitlines()[-len(written) :] == written
    assert all(imread(path)[..., :3].std() > 0.05 for path in pictures)
    before = [path.read_bytes() for path in (*tables, *pictures)]
    for copy in copies:
        (copy / "checkpoint.pt").unlink()
    assert call(visualize, *copies, *names, "--output-dir", tmp_path)[0] == 0
    assert [path.read_bytes() for path in (*tables, *pictures)] == before, "the tables alone are enough"


def test_gradients_of_several_seeds_are_drawn_as_their_geometric_mean_and_nothing_as_nothing(tmp_path):
    for size, seed, first in ((5, 0, 1e-2), (5, 1, 1e-6), (10, 0, 1e-2), (10, 1, 0.0)):
        folder = invent_run(tmp_path, rnn_config("rnn", size, seed=seed), 90)
        norms = [first] * 27 + [1.0]
        write_measured(folder, "gradients", gradient_rows([1e-3] * 28) + gradient_rows(norms, epoch=10))
    figure = visualize.compare_gradients(groups_in(tmp_path))
    axes, reach = (
        next(axes for axes in figure.axes if axes.get_title() == name) for name in ("RNN", "at the first row")
    )
    trained = {line.get_label(): line for line in axes.lines if line.get_linestyle() == "-"}
    assert list(trained) == ["5 hidden units", "10 hidden units"]
    assert list(trained["5 hidden units"].get_ydata()) == pytest.approx([1e-4] * 27 + [1])
    assert list(trained["10 hidden units"].get_ydata()) == [visualize.GRADIENT_FLOOR] * 27 + [1]
    gone = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "v" and len(line.get_xdata())]
    assert gone == [list(range(1, 28))]
    untrained = [line for line in axes.lines if line.get_linestyle() == ":"]
    assert [list(line.get_ydata()) for line in untrained] == [pytest.approx([1e-3] * 28)] * 2
    assert list(reach.lines[0].get_xdata()) == [0, 10]
    assert list(reach.lines[0].get_ydata()) == pytest.approx([1, 1e-4]), "of the first setting"
    assert untold("gradients.png", figure) == []


def test_the_cells_gradients_at_the_first_row_are_those_of_the_setting_that_they_share(tmp_path):
    """Of an LSTM those of the stronger state; exact zeros are drawn at the bottom."""
    shares = {("rnn", "adam", 1e-3): 1e-3, ("rnn", "adam", 1e-4): 0.0, ("rnn", "sgd", 1e-3): 1e-5}
    for (cell, optimizer, lr), share in (shares | {("lstm", "adam", 1e-3): 1e-6}).items():
        folder = invent_run(tmp_path, rnn_config(cell, optimizer=optimizer, lr=lr), 90)
        rows = gradient_rows([1e-2] * 27 + [1.0]) + gradient_rows([share] * 27 + [1.0], epoch=10)
        if cell == "lstm":
            rows += gradient_rows([1e-1] * 27 + [0.0], 0, "cell") + gradient_rows([1e-2] * 27 + [0.0], 10, "cell")
        write_measured(folder, "gradients", rows)
    *panels, reach = visualize.compare_gradients(groups_in(tmp_path)).axes
    assert [axes.get_title() for axes in panels] == ["LSTM", "RNN"]
    shown = {line.get_label(): list(line.get_ydata()) for line in reach.lines}
    assert shown == {"LSTM": pytest.approx([1e-1, 1e-2]), "RNN": pytest.approx([1e-2, 1e-3])}
    trained = [line for line in panels[1].lines if line.get_linestyle() == "-"]
    assert [line.get_ydata()[0] for line in trained] == pytest.approx([1e-3, visualize.GRADIENT_FLOOR])
    assert [line.get_alpha() for line in trained] == [1, 0.5]
    assert panels[0].get_ylim() == panels[1].get_ylim(), "what vanished lies inside of every panel"
    assert panels[0].get_ylim()[0] < visualize.GRADIENT_FLOOR


def gabor_rows(**medians):
    """Return a table of three kernels of each kind, whose R² have the given median."""
    return [
        dict(zip(visualize.GABOR, (kernels, number, r2, 0.0, 0.1, 1.0), strict=True))
        for kernels, median in medians.items()
        for number, r2 in enumerate((median - 0.1, median, median + 0.05))
    ]


def test_gabor_draws_the_median_of_each_seed_beside_both_null_models(tmp_path):
    for lr, seed, r2 in ((1e-4, 0, 0.6), (1e-4, 1, 0.7), (1e-3, 0, 0.8)):
        rows = gabor_rows(trained=r2, shuffled=0.5, untrained=0.4)
        write_measured(invent_run(tmp_path, cnn_cifar10.Config(lr=lr, seed=seed), 60), "gabor", rows)
    figure = visualize.compare_gabor(groups_in(tmp_path))
    (axes,) = figure.axes
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["learning rate 1e-4", "learning rate 1e-3"]
    shown = {round(line.get_ydata()[0], 1): list(line.get_xdata()) for line in axes.lines if len(line.get_xdata())}
    expected = {-0.2: [0.6, 0.7], 0.8: [0.8], 0.0: [0.5, 0.5], 1.0: [0.5], 0.2: [0.4, 0.4], 1.2: [0.4]}
    assert shown == {row: pytest.approx(values) for row, values in expected.items()}
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["trained", "shuffled", "untrained"]
    assert untold("gabor.png", figure) == []


def test_tensorboard_shows_the_mean_over_the_seeds_of_a_setting_and_no_setting_of_one(call, tmp_path):
    for seed, accuracy in ((0, 80), (1, 90), (4, 100)):
        invent_run(tmp_path, rnn_config("gru", seed=seed), accuracy)
    for seed in range(5):
        ended = {"epochs": 2, "diverged": 3} if seed == 4 else {"epochs": 3}
        invent_run(tmp_path, rnn_config("gru", seed=seed + 5), 90, **ended)
        invent_run(tmp_path, rnn_config(seed=seed), 90, **ended)
    invent_run(tmp_path, rnn_config("lstm", seed=0), 95)
    folder, output = compare(call, tmp_path, "tensorboard")
    found = {path.name: path for path in (folder / "tensorboard" / "rnn_mnist").iterdir()}
    apart = {"gru30_adam_lr1e-3_4seeds_3epochs", "rnn30_adam_lr1e-3_4seeds_1diverged_3epochs"}
    path = found["gru30_adam_lr1e-3_3seeds_1diverged"]
    assert found.keys() == {path.name, *apart}, "each is told from the others"
    points = {(tag, step): value for tag, step, value in read_points(path)}
    assert len(points) == 4 * 10
    for epoch in range(1, 11):
        assert points["Accuracy/Test", epoch] == pytest.approx(90 * share_of_growth(epoch))
        assert points["Loss/Train", epoch] == pytest.approx(2 / epoch)


# Tests whose p can be counted by hand


@pytest.mark.parametrize(
    ("these", "those", "paired", "expected"),
    [
        ([6, 7, 8, 9, 10], [1, 2, 3, 4, 5], False, 1 / 252),
        ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10], False, 1),
        ([1, 2, 3, 4, 6], [5, 7, 8, 9, 10], False, 251 / 252),
        ([5, 7, 8, 9, 10], [1, 2, 3, 4, 6], False, 2 / 252),
        ([2, 3], [1], False, 1 / 3),
        ([3, 4, 5], [0, 1, 2], False, 1 / 20),
        ([8, 9], [0, 1, 2], False, 1 / 10),
        ([4, 4, 4], [4, 4, 4], False, 1),
        ([1, 2], [1, 2], False, 5 / 6),
        ([5, 5, 5, 5, 5], [4, 4, 4, 4, 4], True, 1 / 32),
        ([4, 4, 4, 4, 4], [5, 5, 5, 5, 5], True, 1),
        ([11, 22, 33], [10, 20, 30], True, 1 / 8),
        ([2, 4, 3], [1, 2, 6], True, 5 / 8),
        ([1, 2, 3], [1, 2, 3], True, 1),
        ([1, -1], [0, 0], True, 3 / 4),
    ],
)
def test_p_is_the_share_of_arrangements_whose_difference_is_at_least_the_measured_one(these, those, paired, expected):
    assert visualize.permutation_p(these, those, paired) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("these", "those", "paired", "expected"),
    [([0.1, 0.2, 0.0], [0.0, 0.0, 0.3], True, 5 / 8), ([0.1 + 0.2], [0.3], False, 1), ([0.3], [0.1 + 0.2], False, 1)],
)
def test_p_does_not_hang_on_the_last_digit_of_a_sum(these, those, paired, expected):
    """Sums that are equal on paper, as 0.1 + 0.2 and 0.3 are, count as equal."""
    assert visualize.permutation_p(these, those, paired) == expected


def test_pairs_decide_what_shuffling_does_not():
    these, those = [10.1, 20.1, 30.1, 40.1, 50.1], [10, 20, 30, 40, 50]
    assert settle_beats(these, those, paired=True) == (pytest.approx(0.1), 1 / 32, HOLDS)
    assert settle_beats(these, those, paired=False).verdict == UNDECIDED


@pytest.mark.parametrize(
    ("these", "those", "expected"),
    [
        ([3, 4, 5], [0, 1, 2], HOLDS),
        ([0, 1, 2], [3, 4, 5], FAILS),
        ([0, 1, 4], [2, 3, 5], UNDECIDED),
        ([3, 4, 5], [0, 1, 3.5], UNDECIDED),
        ([8, 9], [0, 1, 2], UNDECIDED),
    ],
)
def test_one_beats_the_other_or_is_beaten_when_the_test_says_so_at_five_percent(these, those, expected):
    found = settle_beats(these, those, paired=False)
    assert (found.difference, found.verdict) == (pytest.approx(np.mean(these) - np.mean(those)), expected)


SPREAD = [0.0, 0.1, 0.2, 0.3, 0.4]


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("difference", "margin", "expected"),
    [
        (0.0, 0.5, HOLDS),
        (0.4, 1.0, HOLDS),
        (0.9, 0.5, FAILS),
        (2.0, 1.0, FAILS),
        (0.5, 0.5, UNDECIDED),
        (2.0, 5.0, HOLDS),
    ],
)
def test_similar_holds_on_one_side_of_its_margin_and_fails_on_the_other(paired, sign, difference, margin, expected):
    """The fourth and the last differ in the margin alone, which is five times as large."""
    these = [value + sign * difference for value in SPREAD]
    found = settle_similar(these, SPREAD, paired, margin)
    assert (found.difference, found.verdict) == (pytest.approx(sign * difference), expected)
    assert (found.p <= 0.05) == (found.verdict == HOLDS)


def test_p_of_similar_is_the_larger_of_both_tests():
    these, those = [0.4, 0.4, 0.4, 0.4, 0.4], [0.0] * 5
    assert settle_similar(these, those, True, 0.5) == (pytest.approx(0.4), 1 / 32, HOLDS)
    five = [10, 11, 12, 13, 14]
    assert settle_similar(five, five, False, 5.5) == (0, pytest.approx(1 / 252), HOLDS)
    assert settle_similar(five, five, False, 0.0).p == visualize.permutation_p(five, five, False)


def test_seeds_that_overlap_do_not_settle_similarity():
    assert settle_similar([1.0, 3.0, 2.0], [2.5, 1.5, 2.0], False, 1.0).verdict == UNDECIDED


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([10, 20, 20, 30], [1, 2.5, 2.5, 4]),
        ([3, 1, 2], [3, 1, 2]),
        ([5, 5, 5], [2, 2, 2]),
        ([1, 0, 1, 1], [3, 1, 3, 3]),
    ],
)
def test_equal_values_share_the_mean_of_their_ranks(values, expected):
    assert visualize.ranks(values).tolist() == expected


@pytest.mark.parametrize(
    ("these", "those", "expected"),
    [
        ([1, 8, 27, 64], [1, 2, 3, 4], (1, 1 / 24, HOLDS)),
        ([1, 8, 27, 64], [4, 3, 2, 1], (-1, 1, FAILS)),
        ([1, 8, 27, 64, 70], [1, 2, 3, 5, 4], (0.9, 5 / 120, HOLDS)),
        ([1, 2, 3], [1, 2, 3], (1, 1 / 6, UNDECIDED)),
        ([1, 2, 3, 4], [4, 4, 4, 4], (0, 1, UNDECIDED)),
        (range(15), range(15), (1, 1 / 200_001, HOLDS)),
    ],
)
def test_p_of_a_rank_correlation_is_the_share_of_orders_that_correlate_as_well(these, those, expected):
    """0.9 of five: the order itself, and the four of which two neighbours are exchanged."""
    assert settle_correlated(these, those) == (pytest.approx(expected[0]), pytest.approx(expected[1]), expected[2])


def test_a_rank_correlation_is_spearmans_and_that_of_random_orders_close_to_that_of_all():
    these, those = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0], [2.0, 7.0, 1.0, 8.0, 8.5, 20.0]
    rho = np.corrcoef([3, 1.5, 4, 1.5, 5, 6], [2, 3, 1, 4, 5, 6])[0, 1]
    every, random = settle_correlated(these, those), settle_correlated(these, those, most=5)
    assert (every.difference, every.verdict) == (pytest.approx(rho), UNDECIDED)
    assert random.difference == pytest.approx(rho)
    assert random.p == pytest.approx(every.p, abs=0.005)
    assert random == settle_correlated(these, those, most=5), "the orders are the same each time"


@pytest.mark.parametrize("paired", [False, True])
def test_of_too_many_arrangements_random_ones_are_tested(paired, monkeypatch):
    rng = np.random.default_rng(1)
    these, those = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    exact = visualize.permutation_p(these, those, paired)
    monkeypatch.setattr(visualize, "MOST_ARRANGEMENTS", 400)
    visualize.arrangements.cache_clear()
    weights = visualize.arrangements(9) if paired else visualize.arrangements(18, 9)
    random = visualize.permutation_p(these, those, paired)
    visualize.arrangements.cache_clear()
    assert len(weights) == 401, "and the measured one"
    assert random != exact
    assert random == pytest.approx(exact, abs=0.1)


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([HOLDS], HOLDS),
        ([HOLDS, HOLDS], HOLDS),
        ([FAILS], FAILS),
        ([UNDECIDED], UNDECIDED),
        ([HOLDS, UNDECIDED], UNDECIDED),
        ([FAILS, UNDECIDED], FAILS),
        ([HOLDS, FAILS], "holds in part (1 hold, 1 do not)"),
        ([HOLDS, FAILS, UNDECIDED, HOLDS], "holds in part (2 hold, 1 do not, 1 undecided)"),
    ],
)
def test_a_claim_of_several_parts_holds_when_all_do(verdicts, expected):
    assert visualize.verdict_of(verdicts) == expected


# A part of a claim


def runs_of(config, accuracies):
    """Return runs of a setting with these accuracies by seed, None for one that diverged, without their folders."""
    runs = []
    for seed, value in enumerate(accuracies):
        run = object.__new__(visualize.SavedRun)
        run.config, run.history = replace(config, seed=seed), [] if value is None else [{"test_accuracy": value}] * 10
        runs.append(run)
    return runs


def settled(part, accuracies):
    """Settle a part on accuracies by seed for each setting; return its words and what was found."""
    row = part.settle({config: runs_of(config, values) for config, values in accuracies.items()})
    return row.words, row.settled


def compared(part, these, those):
    """Settle a part on accuracies by seed of both sides."""
    return settled(part, {part.this.config: these, part.that.config: those})


BEATS = visualize.Part(visualize.rnn("gru", 30), visualize.rnn("rnn", 30))


def test_a_part_is_told_with_its_figures_difference_p_and_verdict():
    words, found = compared(BEATS, [98.2, 98.4, 98.6], [94, 95, 96])
    assert words == (
        "GRU, 30 hidden units, Adam, learning rate 1e-3 98.40 % (98.20 % to 98.60 %, 3 seeds) against "
        "RNN, 30 hidden units, Adam, learning rate 1e-3 95.00 % (94.00 % to 96.00 %, 3 seeds)"
    )
    assert found == (pytest.approx(3.4), pytest.approx(1 / 20), HOLDS)
    assert compared(BEATS, [94, 95, 96], [98.2, 98.4, 98.6])[1] == (pytest.approx(-3.4), 1, FAILS)


def test_pairs_are_made_of_the_seeds_that_both_sides_have():
    words, found = compared(BEATS._replace(paired=True), [5, 6, 7], [0, 1, 2, 99, 99])
    assert found == (5, 1 / 8, UNDECIDED)
    assert words.endswith("3 seeds), pairs")


def test_pairs_are_made_of_the_seeds_of_which_both_sides_were_measured():
    figures = {"gru": [None, 5, 6, 7, 8], "rnn": [1, None, 2, 3, 40]}
    sides = [side._replace(measure=lambda run: figures[run.config.cell][run.config.seed]) for side in BEATS[:2]]
    _, found = compared(visualize.Part(*sides, paired=True), [90] * 5, [90] * 5)
    assert found == (pytest.approx((6 + 7 + 8 - 2 - 3 - 40) / 3), 5 / 8, UNDECIDED), "4, 4 and -32"


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize(("these", "those"), [([9, 9, 9, None, 9], [1] * 5), ([9] * 5, [1, 1, 1, None, 1])])
def test_no_verdict_is_drawn_where_a_seed_diverged(paired, these, those):
    assert compared(BEATS._replace(paired=paired), [9] * 5, [1] * 5)[1].verdict == HOLDS
    words, found = compared(BEATS._replace(paired=paired), these, those)
    assert found == DIVERGED
    assert "4 seeds, 1 of 5 without a figure: seed 3" in words


def test_a_seed_that_diverged_is_named_also_where_it_has_no_pair():
    words, found = compared(BEATS._replace(paired=True), [9, 9, 9, 9, 9, None], [1] * 5)
    assert found == DIVERGED
    assert "without a figure: seed 5" in words


def test_what_was_not_measured_at_all_is_told_as_such():
    words, found = compared(BEATS, [], [1, 2, 3])
    assert found == UNTESTED
    assert words.startswith("GRU, 30 hidden units, Adam, learning rate 1e-3 (not measured) against RNN")


@pytest.mark.parametrize(("number", "margin"), [("2", 1.0), ("4", 0.5), ("8", 0.5)])
def test_similar_means_within_the_margin_that_the_claim_states(number, margin):
    (part,) = (part for part in CLAIMS[number].parts if part.within is not None)
    assert f"within {margin:g} point" in CLAIMS[number].sentence
    for difference, verdict in ((0.8 * margin, HOLDS), (margin, UNDECIDED), (1.2 * margin, FAILS)):
        for sign in (1, -1):
            these = [97 + value / 10 + sign * difference for value in SPREAD]
            words, found = compared(part, these, [97 + value / 10 for value in SPREAD])
            assert (sign * difference, found.verdict) == (sign * difference, verdict)
            assert f"similar within {margin:g} to" in words


MEMORY = {
    rnn_config("rnn", rows_before=28): [90, 92, 94, 96, 98],
    rnn_config("rnn", rows_after=28): [10, 10, 10, 10, 10],
    rnn_config("gru", rows_before=28): [97, 97, 97, 97, 97],
    rnn_config("gru", rows_after=28): [96, 95, 94, 93, 92],
}
LAYERS_LOST = {
    cnn_cifar10.Config(): [60, 61, 62, 63, 64],
    cnn_cifar10.Config(without="fc1"): [40, 40, 40, 40, 40],
    cnn_cifar10.Config(without="conv1"): [50, 51, 52, 53, 54],
    cnn_cifar10.Config(without="conv2"): [61, 62, 63, 64, 65],
}


@pytest.mark.parametrize(
    ("number", "place", "accuracies", "difference", "words"),
    [
        ("10b", 0, MEMORY, 84 - 3, "instead of before it 84.00 points (80.00 points to 88.00 points, 5 seeds) against"),
        ("12", 0, LAYERS_LOST, 22 - 10, "points lost without fc1 22.00 points (20.00 points to 24.00 points, 5 seeds)"),
        ("12", 1, LAYERS_LOST, 22 + 1, "without conv2 -1.00 points (-1.00 points to -1.00 points, 5 seeds)"),
    ],
)
def test_what_is_lost_is_the_difference_of_two_runs_of_a_seed(number, place, accuracies, difference, words):
    part = CLAIMS[number].parts[place]
    told, found = settled(part, accuracies)
    assert found == (pytest.approx(difference), pytest.approx(1 / 252), HOLDS)
    assert words in told


def test_a_seed_without_the_run_that_is_subtracted_is_named_and_the_others_count():
    part = CLAIMS["10b"].parts[0]
    words, found = settled(part, MEMORY | {rnn_config("rnn", rows_after=28): [10] * 4})
    assert found == (pytest.approx(83 - 3), pytest.approx(1 / 126), HOLDS)
    assert "(80.00 points to 86.00 points, 4 seeds, 1 of 5 without a figure: seed 4) against" in words
    words, found = settled(part, MEMORY | {rnn_config("rnn", rows_after=28): []})
    assert found == UNTESTED
    assert "(not measured, 5 of 5 without a figure: seed 0 1 2 3 4) against" in words


def test_no_verdict_is_drawn_where_a_run_that_is_subtracted_diverged():
    diverged = {rnn_config("gru", rows_after=28): [96, 95, None, 93, 92]}
    words, found = settled(CLAIMS["10b"].parts[0], MEMORY | diverged)
    assert found == DIVERGED
    assert "4 seeds, 1 of 5 without a figure: seed 2)" in words


def test_a_correlation_is_that_of_the_means_of_settings():
    """Seeds that go against it within each setting change nothing: a setting counts once."""
    figures = {(size, seed): 10 * size + seed for size in (1, 2, 3, 4) for seed in FIVE}
    configs = [rnn_config("rnn", size) for size in (3, 1, 4, 2)]
    part = visualize.Correlation(configs, lambda run: figures[run.config.hidden_size, run.config.seed], "size and seed")
    falling = {config: [config.hidden_size - seed / 10 for seed in FIVE] for config in configs}
    words, found = settled(part, falling)
    assert found == (pytest.approx(1), pytest.approx(1 / 24), HOLDS)
    assert words == "size and seed, means of 4 settings: rank correlation with test accuracy"
    words, found = settled(part, {config: values for config, values in falling.items() if config.hidden_size > 1})
    assert found == (pytest.approx(1), pytest.approx(1 / 6), UNDECIDED)
    assert words.startswith("size and seed, means of 3 settings")
    assert settled(part, falling | {configs[0]: [3, None]})[1] == DIVERGED
    few = {config: values for config, values in falling.items() if config.hidden_size > 2}
    for runs in (few, {}):
        assert settled(part, runs)[1] == UNTESTED


# The claims


def verdicts(folder):
    """Return the verdict of each claim in claims.md by its number, as its table and as its own part give it."""
    lines = (folder / "claims.md").read_text().splitlines()
    cells = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    table = {row[0]: row[2] for row in cells if row[0] in CLAIMS}
    numbers = [line.split()[1].strip(".") for line in lines if line.startswith("## ")]
    found = [line.removeprefix("**Verdict: ").removesuffix(".**") for line in lines if line.startswith("**Verdict")]
    parts = dict(zip(numbers, found, strict=True))
    assert table == parts
    return parts


def section(folder, number):
    """Return the part of claims.md that is about one claim."""
    text = (folder / "claims.md").read_text()
    return text.split(f"\n## {number}. ")[1].split("\n## ")[0]


def overview(folder, number):
    """Return a claim's row in the table of claims.md: claim, verdict, differences, p."""
    (line,) = (line for line in (folder / "claims.md").read_text().splitlines() if line.startswith(f"| {number} | "))
    return line.strip("| ").split(" | ")[1:]


ACCURACY_CLAIMS = ("1", "2", "3", "4", "5", "6", "8")


def test_claims_follow_from_the_runs(call, tmp_path):
    invent_report(tmp_path, as_reported, others=AS_MANY_WEIGHTS)
    folder, _ = compare(call, tmp_path, "claims")
    found = verdicts(folder)
    assert list(found) == ["1", "2", "3", "4", "5", "6", "7a", "7b", "8"]
    assert {number: found[number] for number in ACCURACY_CLAIMS} == dict.fromkeys(ACCURACY_CLAIMS, HOLDS)
    assert (found["7a"], found["7b"]) == (HOLDS, HOLDS), "4,000 weights and 2.2 s against 3,000 and 1.65 s"
    untested = "Not tested with these runs: 1b, 9, 10a, 10b, 11, 12, 13; the shipped verdicts stand in"
    assert f"\n{untested} {visualize.SHIPPED}.\n" in (folder / "claims.md").read_text()
    assert (ROOT / visualize.SHIPPED).is_file()
    assert (
        "| LeNet-5 on CIFAR-10, Adam, learning rate 1e-4 61.02 % (61.00 % to 61.04 %, 5 seeds) against "
        "LeNet-5 on CIFAR-10, SGD, learning rate 1e-4 51.02 % (51.00 % to 51.04 %, 5 seeds), pairs | +10.00 points | "
        "0.0312 | holds |"
    ) in section(folder, "1")
    assert "| +0.33 points | 0.0040 | holds |" in section(folder, "4"), "GRU 30 against 20"
    assert "similar within 0.5 to" in section(folder, "4")
    assert "| +1,000 weights | 0.0040 | holds |" in section(folder, "7a")


def test_claims_fail_where_the_runs_say_the_opposite(call, tmp_path):
    invent_report(tmp_path, lambda config: 100 - as_reported(config), others=AS_MANY_WEIGHTS)
    folder, _ = compare(call, tmp_path, "claims")
    found = verdicts(folder)
    assert (found["1"], found["3"], found["6"]) == (FAILS,) * 3
    similar_still = "holds in part (1 hold, 1 do not)", "holds in part (1 hold, 4 do not)"
    assert (found["2"], found["4"]) == similar_still
    assert found["5"] == HOLDS


def test_two_seeds_decide_nothing(call, tmp_path):
    invent_report(tmp_path, as_reported, seeds=(0, 1), others=AS_MANY_WEIGHTS)
    folder, _ = compare(call, tmp_path, "claims")
    assert set(verdicts(folder).values()) == {UNDECIDED}


@pytest.mark.parametrize("other", [{"epochs": 9}, {"source": "synthetic"}])
def test_where_no_claim_can_be_tested_none_is_written_and_the_shipped_verdicts_are_named(call, tmp_path, other):
    for cell, seed in itertools.product(("gru", "lstm"), FIVE):
        invent_run(tmp_path, rnn_config(cell, seed=seed), 90, **other)
    folder, output = compare(call, tmp_path, "claims", "results")
    assert {path.name for path in folder.iterdir()} == {"results.csv", "results.md"}
    assert f"these runs can test no claim; the shipped verdicts stand in {visualize.SHIPPED}" in output


def test_a_claim_is_undecided_and_names_the_seed_when_one_of_its_seeds_diverged(call, tmp_path):
    invent_report(tmp_path, as_reported, seeds=(0, 1, 2), others=AS_MANY_WEIGHTS)
    folder, _ = compare(call, tmp_path, "claims")
    before = verdicts(folder)
    assert [before[number] for number in ("4", "6", "7a", "7b")] == [HOLDS] * 4
    # A seed of the GRU that was begun anew and diverged in its first epoch, and one of the LSTM later.
    gru, lstm = (utils.run_folder(tmp_path, rnn_config(cell, seed=2), "real") for cell in ("gru", "lstm"))
    for path, epochs in ((gru, 0), (lstm, 3)):
        shutil.rmtree(path)
        cell = path.name[: -len("30_adam_lr1e-3_seed2")]
        assert invent_run(tmp_path, rnn_config(cell, seed=2), 98, epochs, diverged=epochs + 1) == path
    folder, _ = compare(call, tmp_path, "claims", "results")
    after = verdicts(folder)
    assert [after[number] for number in ("4", "6", "7b", "8")] == [UNDECIDED] * 4
    assert after["3"] == before["3"], "the others stand"
    for number, cells in (("4", ("GRU", "LSTM")), ("6", ("GRU", "LSTM")), ("7b", ("GRU",)), ("8", ("GRU", "LSTM"))):
        for cell in cells:
            told = section(folder, number).split(f"{cell}, 30 hidden units, Adam, learning rate 1e-3")[1]
            assert "2 seeds, 1 of 3 without a figure: seed 2)" in told.split(")")[0] + ")"
    rows = {row["setting"]: row["diverged"] for row in read_csv(folder / "results.csv")}
    assert Counter(rows.values()) == {"": 16, "1 of 3: seed 2": 2}
    assert rows["GRU, 30 hidden units, Adam, learning rate 1e-3"] == "1 of 3: seed 2"


def test_claims_about_the_insides_follow_from_the_tables_in_the_runs_figures(call, tmp_path):
    """Before training only the LSTM's cell state reaches further back than the RNN; after it all gated states do."""
    invent_report(tmp_path, as_reported, seeds=(0, 1, 2, 3, 4))
    for run in visualize.find_runs(tmp_path):
        if run.script == "cnn_cifar10":
            rows = gabor_rows(trained=0.8 + 0.01 * run.config.seed, shuffled=0.5, untrained=0.6)
            write_measured(run.folder, "gabor", rows)
            continue
        kept = {("hidden", 0): 0.5, ("cell", 0): 0.5, ("hidden", 10): 0.5, ("cell", 10): 0.9}
        if run.config.cell != "rnn":
            kept |= {("hidden", 10): 0.9, ("hidden", 0): 0.4, ("cell", 0): 0.8}
        states = ("hidden", "cell") if run.config.cell == "lstm" else ("hidden",)
        rows = [
            row
            for epoch in (0, 10)
            for state in states
            for row in gradient_rows([kept[state, epoch] ** (28 - step) for step in range(1, 29)], epoch, state)
        ]
        write_measured(run.folder, "gradients", rows)
    folder, _ = compare(call, tmp_path, "claims")
    found = verdicts(folder)
    assert found["9"] == HOLDS
    assert "shuffled 0.500 (0.500 to 0.500, 5 seeds), pairs | +0.320 | 0.0312 | holds |" in section(folder, "9")
    assert found["10a"] == "holds in part (4 hold, 2 do not)"
    told = section(folder, "10a")
    assert (
        "| LSTM, cell state, untrained: kept a step back, steps 25 to 5 0.800 (0.800 to 0.800, 5 seeds) against RNN, "
        "untrained 0.500 (0.500 to 0.500, 5 seeds) | +0.300 | 0.0040 | holds |"
    ) in told
    assert "GRU, hidden state, untrained: kept a step back, steps 25 to 5 0.400" in told
    assert told.count("| does not hold |") == 2


def held_for(config):
    """Return how well an LSTM of these settings remembers: a gate's bias of one makes up for 28 blank rows."""
    return (config.keep_bias or 0) - {0: 0, 14: 0, 28: 1, 56: 2}[config.rows_after]


def test_how_far_an_lstm_remembers_is_settled_by_its_gates_bias_and_the_gradient_beside_other_networks(call, tmp_path):
    for bias, rows in itertools.product((None, 1.0, 2.0), (0, 14, 28, 56)):
        config = rnn_config("lstm", keep_bias=bias, rows_after=rows)
        held = held_for(config)
        accuracies = [(98 if rows == 0 else 50 + 10 * held) + 0.01 * seed for seed in FIVE]
        reaches = 0 if rows == 0 else 3 * held - 9
        invent_memory(tmp_path, config, accuracies, [10 ** (reaches + 0.1 * seed) for seed in FIVE])
    for rows in (0, 14, 28, 56):
        gradients = [10 ** (rows / 10 - 8 - 0.1 * seed) for seed in FIVE]
        invent_memory(tmp_path, rnn_config(rows_after=rows), [100 - rows + 0.1 * seed for seed in FIVE], gradients)
    folder, _ = compare(call, tmp_path, "claims")
    assert verdicts(folder)["11"] == HOLDS, "what stands beside it decides nothing"
    assert overview(folder, "11")[1:] == [HOLDS, "+0.00 points to +10.00 points", "up to 0.0040"]
    told = section(folder, "11")
    gradient = "LSTM: log of the gradient that reaches the digit, means of 12 settings"
    assert f"| {gradient}: rank correlation with test accuracy | +1.00 | < 0.0001 | holds |" in told
    assert "similar within 1 to" in told
    (beside,) = (line for line in told.splitlines() if line.startswith("| beside it: "))
    assert beside.startswith("| beside it: RNN: log of the gradient")
    assert beside.endswith(" | -1.00 | 1.0000 | (does not hold) |")


READABLE = {
    ("pixels", "trained"): 30,
    ("pool1", "trained"): 40,
    ("pool2", "trained"): 50,
    ("fc1", "trained"): 60,
    ("pixels", "untrained"): 30,
    ("pool1", "untrained"): 41,
    ("pool2", "untrained"): 45,
    ("fc1", "untrained"): 44,
}


def readable_rows(more=0.0):
    return [{"network": state, "layer": layer, "accuracy": value + more} for (layer, state), value in READABLE.items()]


def test_what_layers_are_worth_and_what_is_readable_from_them_follow_from_runs_and_tables(call, tmp_path):
    for config, accuracies in LAYERS_LOST.items():
        for seed, value in enumerate(accuracies):
            path = invent_run(tmp_path, replace(config, seed=seed), value)
            if config.without == "nothing":
                write_measured(path, "layers", readable_rows(0.1 * seed))
    folder, _ = compare(call, tmp_path, "claims")
    assert verdicts(folder) == {"5": UNDECIDED, "12": HOLDS, "13": "holds in part (5 hold, 1 do not)"}
    assert overview(folder, "12")[2:] == ["+12.00 points, +23.00 points", "0.0040, 0.0040"]
    assert "beside it" not in section(folder, "12"), "the network without both was not trained"
    assert overview(folder, "13")[2:] == ["-1.00 points to +16.00 points", "up to 1.0000"]
    told = section(folder, "13").splitlines()
    assert (
        "| a linear classifier on pool1 of the trained network 40.20 % (40.00 % to 40.40 %, 5 seeds) against a linear "
        "classifier on the pixels 30.20 % (30.00 % to 30.40 %, 5 seeds), pairs | +10.00 points | 0.0312 | holds |"
    ) in told
    assert sum(line.endswith("| -1.00 points | 1.0000 | does not hold |") for line in told) == 1
    untested = "1, 1b, 2, 3, 4, 6, 7a, 7b, 8, 9, 10a, 10b, 11"
    assert f"Not tested with these runs: {untested}; the shipped" in (folder / "claims.md").read_text()


def test_a_table_of_readable_layers_that_lacks_a_network_is_named(call, tmp_path):
    path = invent_run(tmp_path, cnn_cifar10.Config(), 60)
    write_measured(path, "layers", [row for row in readable_rows() if row["network"] == "trained"])
    outcome = call(visualize, tmp_path, "--figures", "claims")
    assert_refused(outcome, f"{path / 'figures' / 'layers.csv'} is damaged; delete it, or write it anew with --figures")


# The runs that are tracked


def test_the_reference_runs_are_read_and_settle_the_claims_twice_alike(tmp_path, call):
    reference, made = ROOT / "runs" / "reference", []
    before = read_files(reference)
    for folder in (tmp_path / "one", tmp_path / "two"):
        outcome = call(visualize, reference, "--figures", "results", "claims", "--output-dir", folder)
        assert (outcome[0], outcome[2]) == (0, "")
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert made[0] == made[1]
    assert made[0].keys() == {"results.csv", "results.md", "claims.md"}
    assert read_files(reference) == before, "nothing is written beside them"
    rows = read_csv(tmp_path / "one" / "results.csv")
    assert sum(int(row["seeds"]) for row in rows) == len(list(reference.rglob("config.json")))
    reported = {row.config.words(): row for row in visualize.REPORT}
    assert {row["setting"] for row in rows} >= reported.keys()
    for words, report in reported.items():
        folders = [path.parent for path in reference.rglob("config.json") if is_of(path, report.config)]
        accuracies = [utils.read_metrics(folder)[9]["test_accuracy"] for folder in folders]
        (row,) = (row for row in rows if row["setting"] == words)
        assert (row["mean"], row["seeds"]) == (f"{np.mean(accuracies):.2f}", str(len(folders)))
        assert len(folders) >= 5
    assert {verdicts(tmp_path / "one")[number] for number in ("1", "7a")} == {HOLDS}


def is_of(path, config):
    return asdict(utils.read_record(path.parent, CONFIGS).config) | {"seed": 0} == asdict(config)
