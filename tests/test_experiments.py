"""Many experiments: grids, the reference report's list, several processes, and the comparison with its claims."""

import csv
import json
import os
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT

import cnn_cifar10
import rnn_mnist
import utils
import visualize

# What the flags ask for


def requested(script, **flags):
    given = {"report": False, "optimizer": ["adam"], "lr": [1e-3], "momentum": [0.0], "batch_size": [64], "seed": [0]}
    given |= {"dataset": ["mnist"], "cell": ["rnn"], "hidden_size": [30], **flags}
    return utils.requested_settings(script.__name__, SimpleNamespace(**given), script.EXPERIMENTS)


def test_several_values_make_the_product_without_repeats():
    grid = requested(rnn_mnist, cell=["rnn", "gru"], lr=[0.1, 0.01, 0.1], seed=[0, 1, 2])
    assert len(grid) == 2 * 2 * 3
    assert {(row["cell"], row["lr"], row["seed"]) for row in grid} == {
        (cell, lr, seed) for cell in ("rnn", "gru") for lr in (0.1, 0.01) for seed in (0, 1, 2)
    }
    assert all(list(row) == list(utils.SETTINGS["rnn_mnist"]) for row in grid)


def test_momentum_is_a_choice_of_sgd_alone():
    grid = requested(cnn_cifar10, optimizer=["adam", "sgd"], momentum=[0.0, 0.9])
    assert [(row["optimizer"], row["momentum"]) for row in grid] == [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)]


@pytest.mark.parametrize(("script", "count"), [(cnn_cifar10, 4), (rnn_mnist, 12)])
def test_report_is_the_reports_list_for_each_seed(script, count):
    grid = requested(script, report=True, seed=[0, 1])
    assert len(grid) == 2 * count
    for experiment in script.EXPERIMENTS:
        matching = [row for row in grid if experiment.settings.items() <= row.items()]
        assert [row["seed"] for row in matching] == [0, 1]


# Working through a list


@pytest.fixture
def train(call, tmp_path, tiny_digits, monkeypatch):
    """Call rnn_mnist.py for an epoch on a tiny embedded set; returns (exit status, standard output, standard error)."""
    monkeypatch.setattr(utils, "synthetic_digits", lambda: tiny_digits)
    return lambda *flags: call(rnn_mnist, "--data", "synthetic", "--runs-dir", tmp_path, "--epochs", 1, *flags)


def finished(folder):
    return {path.parent.name: path.read_text() for path in folder.rglob("metrics.csv")}


def test_report_trains_all_and_prints_a_table(train, tmp_path):
    status, output, _ = train("--report")
    assert status == 0
    runs = finished(tmp_path)
    assert len(runs) == 12
    table = output.split("test accuracy in % after epoch 1\n")[1].splitlines()[:13]
    assert table[0].split() == ["setting", "measured"], "nothing is compared on embedded data"
    for line in table[1:]:
        name, measured = line.split()
        row = next(csv.DictReader(runs[f"{name}_seed0"].splitlines()))
        assert float(measured) == pytest.approx(float(row["test_accuracy"]), abs=0.005)
    again = train("--report")
    assert again[1].count("complete with 1 epochs") == 12
    assert finished(tmp_path) == runs, "nothing is trained twice"


def test_table_gives_mean_and_deviation_over_seeds_and_where_the_reported_figure_lies(capsys):
    def run(seed, accuracy):
        settings = {**cnn_cifar10.EXPERIMENTS[0].settings, "seed": seed}
        config = {**settings, "script": "cnn_cifar10", "data_source": "real", "epochs": 10}
        return SimpleNamespace(config=config, epoch=10, history=[{"test_accuracy": accuracy}] * 10)

    utils.print_results([run(0, 60.0), run(1, 62.0), run(2, 61.0)], 10, cnn_cifar10.EXPERIMENTS)
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.split() == ["setting", "reported", "measured", "difference", "std", "seeds", "within"]
    assert row.split() == ["cifar10_adam_lr0.0001_batch128", "61.30", "61.00", "-0.30", "1.00", "3", "yes"]
    utils.print_results([run(0, 60.0)], 10, cnn_cifar10.EXPERIMENTS)
    head, row = capsys.readouterr().out.splitlines()[-2:]
    assert head.split() == ["setting", "reported", "measured", "difference"]
    assert row.split() == ["cifar10_adam_lr0.0001_batch128", "61.30", "60.00", "-1.30"]


def test_a_run_that_diverges_is_recorded_and_the_rest_goes_on(train, tmp_path):
    flags = ("--optimizer", "sgd", "--lr", "1e38", "0.1", "--hidden-size", "4")
    for words in ("in epoch 1 at learning rate 1e+38", "diverged in epoch 1; --fresh starts over"):
        status, output, error = train(*flags)
        assert status == 0
        assert words in output + error
        rows = [line.split() for line in output.splitlines() if line.startswith("synthetic_mnist")]
        assert [row[1] for row in rows][0] == "diverged"
        assert float(rows[1][1]) > 5
    config = next(tmp_path.rglob("*lr1e+38*/config.json"))
    assert json.loads(config.read_text())["diverged"] == 1


def test_the_first_process_waits_for_a_run_that_another_trains_and_the_others_do_not(train, tmp_path, monkeypatch):
    assert train("--hidden-size", "3")[0] == 0
    folder = next((tmp_path / "rnn_mnist").iterdir())
    run = utils.Run(folder, utils.read_config(folder))
    monkeypatch.setenv("RANK", "1")
    status, output, _ = train("--hidden-size", "3", "4")
    assert status == 0
    assert "test accuracy in %" not in output, "the first process prints the table"
    assert len(finished(tmp_path)) == 2
    monkeypatch.setenv("RANK", "0")
    threading.Timer(1.5, run.__exit__).start()
    start = time.monotonic()
    status, output, _ = train("--hidden-size", "3", "4")
    assert status == 0
    assert time.monotonic() - start > 1
    assert output.count("waiting for what other processes train, 1 of 2 runs") == 1
    assert "test accuracy in % after epoch 1" in output


def test_torchrun_shares_the_list_among_its_processes(tmp_path):
    flags = "--nproc-per-node=2 rnn_mnist.py --data synthetic --epochs 1 --hidden-size 2 3 4 5 --batch-size 500"
    command = [sys.executable, "-m", "torch.distributed.run", *flags.split(), "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("test accuracy in % after epoch 1") == 1
    folders = list((tmp_path / "rnn_mnist").iterdir())
    assert len(folders) == 4
    for folder in folders:
        assert len((folder / "metrics.csv").read_text().splitlines()) == 2
        assert len(list(folder.glob("events*"))) == 1, "trained once"
        assert json.loads((folder / "config.json").read_text())["threads"] == 1


def test_processes_share_the_cores_and_small_recurrent_networks_need_one(monkeypatch):
    args = SimpleNamespace(device="cpu", precision="fp32", epochs=1, data_dir="data", threads=7)
    settings = {"dataset": "mnist", "optimizer": "adam"}
    threads = [
        utils.resolve_config("any", args, settings | more, "real")["threads"]
        for more in ({"hidden_size": 30}, {"hidden_size": 512}, {})
    ]
    assert threads == [1, 7, 7]
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert utils.share_of_cores() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    assert utils.share_of_cores() == torch.get_num_threads()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--report", "--lr", "0.1"), "brings its own settings; leave out --lr"),
        (("--report", "--hidden-size", "7"), "leave out --hidden-size"),
    ],
)
def test_report_brings_its_own_settings(train, flags, words):
    status, _, error = train(*flags)
    assert status == 2
    assert words in error


def test_several_processes_cannot_start_over_together(train, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    status, _, error = train("--fresh")
    assert status == 2
    assert "--fresh" in error


# The comparison


def invent_runs(folder, accuracy, seeds=(0, 1, 2)):
    """Write config.json and metrics.csv of the report's experiments; accuracy(settings, seed) after the last epoch."""
    for script in (cnn_cifar10, rnn_mnist):
        for experiment in script.EXPERIMENTS:
            for seed in seeds:
                settings = {**experiment.settings, "seed": seed}
                config = {"script": script.__name__, **settings, "epochs": 10}
                config |= {"data_source": "real", "data_dir": "data", "parameters": len(str(settings.get("cell")))}
                config |= {"device": "cpu", "precision": "fp32", "threads": 2}
                path = utils.run_folder(folder, config)
                path.mkdir(parents=True)
                (path / "config.json").write_text(json.dumps(config))
                last = accuracy(settings, seed)
                rows = [f"{epoch},1.0,50.0,1.0,{last * epoch / 10},{epoch}" for epoch in range(1, 11)]
                (path / "metrics.csv").write_text("\n".join([",".join(utils.METRICS), *rows, ""]))


def as_reported(settings, seed):
    """Accuracies in the order of the report's claims, a little different for each seed."""
    if "cell" not in settings:
        base = 99 if settings["dataset"] == "mnist" else {1e-4: 61, 1e-3: 60.5}[settings["lr"]]
    else:
        base = {"rnn": 60 + settings["hidden_size"], "gru": 97.5 + settings["hidden_size"] / 30, "lstm": 98}
        base = base[settings["cell"]] - abs(np.log10(settings["lr"] / 1e-3))
    return base - 10 * (settings["optimizer"] == "sgd") + 0.01 * seed


def test_results_hold_a_row_for_each_setting(call, tmp_path):
    invent_runs(tmp_path, as_reported)
    status, output, error = call(visualize, tmp_path)
    assert (status, error) == (0, "")
    names = {
        "results.csv",
        "results.md",
        "curves.png",
        "hidden_size.png",
        "learning_rate.png",
        "optimizer.png",
        "claims.md",
    }
    assert {path.name for path in (tmp_path / "comparison").iterdir()} == names
    with open(tmp_path / "comparison" / "results.csv", newline="") as file:
        rows = {row["setting"]: row for row in csv.DictReader(file)}
    assert len(rows) == 16
    row = rows["GRU with 30 hidden units on MNIST, Adam, learning rate 0.001, batch 64"]
    assert (row["seeds"], row["mean"], row["std"], row["reported"]) == ("3", "98.510", "0.010", "98.32")
    assert float(row["seconds_per_epoch"]) == 5.5


def test_a_setting_and_seed_counts_once(tmp_path):
    for folder in ("one", "two"):
        invent_runs(tmp_path / folder, as_reported, seeds=(0,))
    settings = visualize.group_by_setting(visualize.find_runs(tmp_path))
    assert len(settings) == 16
    assert all(len(runs) == 1 for runs in settings.values())


def verdicts(folder):
    text = (folder / "comparison" / "claims.md").read_text()
    return [line.removeprefix("**Verdict: ").removesuffix(".**") for line in text.splitlines() if "Verdict" in line]


def test_claims_follow_from_the_runs(call, tmp_path):
    invent_runs(tmp_path / "a", as_reported)
    call(visualize, tmp_path / "a", "--figures", "claims")
    assert verdicts(tmp_path / "a") == ["holds"] * 6 + ["undecided", "holds"] + ["undecided"] * 2, (
        "equal costs, no figures/"
    )
    invent_runs(tmp_path / "b", lambda settings, seed: 100 - as_reported(settings, seed))
    call(visualize, tmp_path / "b", "--figures", "claims")
    assert verdicts(tmp_path / "b")[:4] == ["does not hold"] * 4
    invent_runs(tmp_path / "c", as_reported, seeds=(0, 1))
    call(visualize, tmp_path / "c", "--figures", "claims")
    assert verdicts(tmp_path / "c") == ["undecided"] * 10, "two seeds decide nothing"


def test_claims_about_the_insides_follow_from_the_tables_in_the_runs_figures(tmp_path):
    invent_runs(tmp_path, as_reported)
    reach = {"rnn": 1e-3, "gru": 1e-2, "lstm": 1e-2}
    for run in visualize.find_runs(tmp_path):
        (run.folder / "figures").mkdir()
        if run.is_cnn:
            r2 = {"trained": 0.8, "untrained": 0.5, "noise": 0.5}
            rows = [(name, 0, value + 0.01 * run.config["seed"], 0, 0) for name, value in r2.items()]
            visualize.write_table(rows, visualize.GABOR, run.folder / "figures" / "gabor.csv")
        else:
            # before training, the LSTM's cell state alone reaches back
            cell = run.config["cell"]
            rows = [(step, "hidden", 1, 1) for step in range(1, 29)]
            rows[0] = (1, "hidden", 1e-9 if cell == "lstm" else reach[cell], 1)
            rows += [(step, "cell", reach["lstm"], 1) for step in range(1, 29)] * (cell == "lstm")
            visualize.write_table(rows, visualize.GRADIENTS, run.folder / "figures" / "gradients.csv")
    (tmp_path / "comparison").mkdir()
    visualize.claims(visualize.group_by_setting(visualize.find_runs(tmp_path)), tmp_path / "comparison")
    assert verdicts(tmp_path)[8:] == ["holds", "undecided"], "trained networks all reach equally far here"
    text = (tmp_path / "comparison" / "claims.md").read_text()
    assert (
        "left at the first 0.01 (0.01 to 0.01, 3 seeds) against untrained RNN 0.001 (0.001 to 0.001, 3 seeds): holds"
        in text
    )


@pytest.mark.parametrize(
    ("these", "those", "expected"),
    [
        ([3, 4, 5], [0, 1, 2], "holds"),
        ([0, 1, 2], [3, 4, 5], "does not hold"),
        ([0, 1, 4], [2, 3, 5], "undecided"),
        ([3, 4, 5], [0, 1, 3], "undecided"),
        ([8, 9], [0, 1, 2], "undecided"),
        ([], [], "undecided"),
    ],
)
def test_one_beats_the_other_when_its_every_seed_does(these, those, expected):
    assert visualize.beats(these, those) == expected


def test_figures_against_a_setting_show_the_means(tmp_path):
    invent_runs(tmp_path, as_reported)
    settings = visualize.group_by_setting(visualize.find_runs(tmp_path))
    axes = visualize.draw_against("hidden_size", settings).axes[0]
    lines = {container.get_label(): container.lines[0] for container in axes.containers}
    rnn = lines["RNN on MNIST, Adam, learning rate 0.001, batch 64"]
    assert list(rnn.get_xdata()) == [5, 10, 20, 30]
    assert list(rnn.get_ydata()) == pytest.approx([65.01, 70.01, 80.01, 90.01])
    assert len(lines) == 3
    assert visualize.draw_against("learning_rate", dict(list(settings.items())[:1])) is None
