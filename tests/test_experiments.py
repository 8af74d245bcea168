"""Many experiments: grids, the reference report's list, several processes, and the table at their end."""

import gc
import json
import os
import re
import subprocess
import sys
import threading
import time
from dataclasses import replace
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils

import pytest
import torch
from conftest import CONFIGS, ROOT, assert_refused, read_rows
from filelock import FileLock

# What the flags ask for


def test_several_values_make_the_product_without_repeats(requested):
    grid = requested(rnn_mnist, "--cell", "rnn", "gru", "--lr", 0.1, 0.01, 0.1, "--seed", 0, 1, 2)
    assert len(grid) == 2 * 2 * 3
    assert {(config.cell, config.lr, config.seed) for config in grid} == {
        (cell, lr, seed) for cell in ("rnn", "gru") for lr in (0.1, 0.01) for seed in (0, 1, 2)
    }
    assert {replace(config, cell="rnn", lr=1e-3, seed=0) for config in grid} == {rnn_mnist.Config()}


def test_momentum_is_a_choice_of_sgd_alone(requested):
    grid = requested(cnn_cifar10, "--optimizer", "adam", "sgd", "--momentum", 0, 0.9)
    assert [(config.optimizer, config.momentum) for config in grid] == [("adam", 0.0), ("sgd", 0.0), ("sgd", 0.9)]


def test_the_forget_gates_bias_is_a_setting_of_the_lstm_alone(requested):
    grid = requested(rnn_mnist, "--cell", "gru", "lstm", "--keep-bias", 1, 2)
    assert [(config.cell, config.keep_bias) for config in grid] == [("gru", None), ("lstm", 1.0), ("lstm", 2.0)]


@pytest.mark.parametrize("cells", [[], ["--cell", "gru"], ["--cell", "rnn", "gru"]])
def test_a_bias_of_forget_gates_that_no_network_has_is_refused(call, cells):
    assert_refused(call(rnn_mnist, *cells, "--keep-bias", 1), "--keep-bias")


@pytest.mark.parametrize(("script", "count"), [(cnn_cifar10, 4), (rnn_mnist, 12)])
def test_report_is_the_reports_list_for_each_seed(script, count, requested):
    grid = requested(script, "--report", "--seed", 0, 1)
    assert len(grid) == 2 * count
    for row in script.REPORT:
        assert [config.seed for config in grid if config.setting() == row.config] == [0, 1]


# Working through a list


@pytest.fixture
def train(call, tmp_path, tiny_data):
    """Call rnn_mnist.py for an epoch on a tiny embedded set; returns (exit status, standard output, standard error)."""
    return lambda *flags: call(rnn_mnist, "--data", "synthetic", "--runs-dir", tmp_path, "--epochs", 1, *flags)


def finished(folder):
    return {path.parent.name: path.read_text() for path in folder.rglob("metrics.csv")}


def table_of(output):
    """Return the lines of the table at the end of a sweep as lists of texts; an empty cell has no place there."""
    lines = re.split(r"\nTest accuracy in % after epoch \d+: mean and standard deviation over seeds\n", output)[
        1
    ].splitlines()
    return [re.split("  +", line) for line in lines if re.search(" {2,}", line) and not line.startswith(" ")]


def test_report_trains_all_and_prints_a_table(train, tmp_path):
    status, output, _ = train("--report")
    assert status == 0
    runs = finished(tmp_path)
    assert len(runs) == 12
    table = table_of(output)
    assert table[0] == ["setting", "mean", "seeds", "seconds_per_epoch", "parameters"], "nothing to compare with"
    for (setting, mean, seeds, _, parameters), row in zip(table[1:], rnn_mnist.REPORT, strict=True):
        folder = tmp_path / "rnn_mnist" / f"synthetic_{row.config.name}"
        assert setting == f"{row.config.words()}, synthetic data"
        assert (mean, seeds) == (f"{float(read_rows(folder)[0]['test_accuracy']):.2f}", "1")
        assert parameters == str(utils.read_record(folder, CONFIGS).conditions.parameters)
    again = train("--report")
    assert again[1].count("complete with 1 epochs") == 12
    assert finished(tmp_path) == runs, "nothing is trained twice"


def test_a_list_says_how_many_runs_are_done_by_whomever_and_how_long_the_rest_takes(train):
    def told(*sizes):
        return [line for line in train("--hidden-size", *sizes)[1].splitlines() if "runs done" in line]

    left = ", about 1 min left"
    assert told(2, 3, 4) == [
        "0 of 3 runs done",
        f"1 of 3 runs done{left}",
        f"2 of 3 runs done{left}",
        "3 of 3 runs done",
    ]
    assert told(5, 2, 3, 4) == ["3 of 4 runs done", "4 of 4 runs done"]
    assert told(2, 3) == ["2 of 2 runs done"]


def test_the_time_that_is_left_follows_from_the_runs_so_far(capsys, monkeypatch):
    monkeypatch.setattr(utils.time, "monotonic", lambda: 1360.0)
    utils.tell_progress(done=5, total=20, before=2, start=1000.0)
    assert capsys.readouterr().out == "5 of 20 runs done, about 30 min left\n", "two minutes a run, fifteen left"


def test_a_sweep_of_several_seeds_ends_with_the_commands_that_show_their_means(train, tmp_path):
    folder = tmp_path / "comparison" / "tensorboard" / "rnn_mnist"
    means = f"  tensorboard --logdir {folder}  (after it: the means over seeds)"
    assert train("--hidden-size", 2, "--seed", 0, 1)[1].splitlines()[-2:] == [
        f"  python visualize.py {tmp_path}",
        means,
    ]
    assert "means over seeds" not in train("--hidden-size", 2, 3)[1]


def invented_run(config, accuracies, seed=0, source="real"):
    """What a run looks like to the table: accuracies in percent after its epochs."""
    record = utils.Record(replace(config, seed=seed), utils.Conditions(data_source=source, parameters=1234))
    history = [{"test_accuracy": accuracy, "seconds": 2.0} for accuracy in accuracies]
    return SimpleNamespace(record=record, config=record.config, history=history, epoch=len(history))


BEST_CNN, OTHER_CNN = (row.config for row in (cnn_cifar10.REPORT[0], cnn_cifar10.REPORT[2]))
WITH_REPORT = ["setting", "reported", "mean", "difference"]


def printed_table(capsys, runs, epoch=10):
    utils.print_results(runs, epoch, cnn_cifar10.REPORT)
    return table_of(capsys.readouterr().out)


@pytest.mark.parametrize(("best", "within"), [(62.0, "yes"), (61.2, "no")])
def test_table_gives_mean_and_deviation_over_seeds_and_where_the_reported_figure_lies(capsys, best, within):
    accuracies = (60.0, best, 61.0)
    runs = [invented_run(BEST_CNN, [accuracy] * 10, seed) for seed, accuracy in enumerate(accuracies)]
    head, row = printed_table(capsys, runs)
    assert head == [*WITH_REPORT, "std", "seeds", "within", "seconds_per_epoch", "parameters"]
    mean = sum(accuracies) / 3
    std = (sum((accuracy - mean) ** 2 for accuracy in accuracies) / 2) ** 0.5
    figures = ["61.30", f"{mean:.2f}", f"{mean - 61.3:+.2f}", f"{std:.2f}", "3", within]
    assert row == ["LeNet-5 on CIFAR-10, Adam, learning rate 1e-4", *figures, "2.0", "1234"]


def test_runs_on_embedded_data_have_a_table_of_their_own(capsys):
    config = rnn_mnist.Config()
    runs = [invented_run(config, [90.0] * 10), invented_run(config, [50.0] * 10, source="synthetic")]
    utils.print_results(runs, 10, rnn_mnist.REPORT)
    tables = capsys.readouterr().out.split("Test accuracy in %")[1:]
    assert [table.count("90.00") for table in tables] == [1, 0]
    assert [table.count("50.00") for table in tables] == [0, 1]


def test_table_leaves_out_what_no_setting_has(capsys):
    head, *rows = printed_table(capsys, [invented_run(config, [60.0] * 10) for config in (BEST_CNN, OTHER_CNN)])
    assert head == [*WITH_REPORT, "seeds", "seconds_per_epoch", "parameters", "remark"]
    assert rows[0][1:4] == ["61.30", "60.00", "-1.30"]
    assert rows[1][1:] == ["60.00", "1", "2.0", "1234", "only 'similar to 1e-4'"]


@pytest.mark.parametrize(
    ("source", "epochs", "words"),
    [
        ("real", 10, " (the reference report: 61.3 %)"),
        ("synthetic", 10, ""),
        ("real", 9, ""),
    ],
)
def test_a_single_run_is_compared_with_the_report_in_a_sentence(capsys, source, epochs, words):
    utils.print_results([invented_run(BEST_CNN, [60.0] * epochs, source=source)], epochs, cnn_cifar10.REPORT)
    assert capsys.readouterr().out == f"test accuracy 60.00 % after epoch {epochs}{words}\n"


def test_table_names_seeds_that_diverged_beside_what_the_others_reached(capsys):
    """Seed 1 never finished an epoch, and seed 4 diverged on its way."""
    histories = ([50.0] * 10, [], [52.0] * 10, [54.0] * 10, [90.0] * 3)
    runs = [invented_run(BEST_CNN, history, seed) for seed, history in enumerate(histories)]
    head, row = printed_table(capsys, runs)
    shown = dict(zip(head, row, strict=True))
    assert (shown["mean"], shown["std"]) == ("52.00", "2.00")
    assert (shown["seeds"], shown["diverged"]) == ("5", "2 of 5: seed 1 4")
    head, *rows = printed_table(capsys, [runs[1], invented_run(OTHER_CNN, [60.0] * 10)])
    assert head[-4:] == ["diverged", "seconds_per_epoch", "parameters", "remark"]
    assert rows[0][1:] == ["61.30", "1", "1 of 1: seed 1", "1234"], "no mean of nothing"
    utils.print_results([runs[0], runs[1]], 10, cnn_cifar10.REPORT)
    assert "1 of 2: seed 1" in capsys.readouterr().out


@pytest.mark.parametrize(("epoch", "mean"), [(3, "40.00"), (2, "60.00"), (4, "30.00")])
def test_table_takes_the_epoch_that_was_asked_for_and_not_the_best(capsys, epoch, mean):
    runs = [invented_run(BEST_CNN, [50.0, 60.0, 40.0, 30.0], seed) for seed in (0, 1)]
    head, row = printed_table(capsys, runs, epoch)
    assert dict(zip(head, row, strict=True))["mean"] == mean


def test_the_reports_table_is_that_of_its_epoch_also_for_runs_that_went_on(train, tmp_path, monkeypatch):
    monkeypatch.setattr(utils, "REPORT_EPOCHS", 2)
    monkeypatch.setattr(rnn_mnist, "REPORT", rnn_mnist.REPORT[:2])
    output = train("--report", "--epochs", 3)[1]
    assert "\nTest accuracy in % after epoch 2: " in output
    for row, line in zip(rnn_mnist.REPORT, table_of(output)[1:], strict=True):
        rows = read_rows(tmp_path / "rnn_mnist" / f"synthetic_{row.config.name}")
        assert len(rows) == 3
        assert line[1] == f"{float(rows[1]['test_accuracy']):.2f}"


def test_a_run_that_diverges_is_recorded_and_the_rest_goes_on(train, tmp_path):
    flags = ("--optimizer", "sgd", "--lr", "1e38", "0.1", "--hidden-size", "4")
    for words in ("in epoch 1 at learning rate 1e+38", "diverged in epoch 1; --fresh starts over"):
        status, output, error = train(*flags)
        assert status == 0
        assert words in output + error
        head, *rows = table_of(output)
        assert head == ["setting", "mean", "seeds", "diverged", "seconds_per_epoch", "parameters"]
        assert rows[0][1:3] == ["1", "1 of 1: seed 0"]
        assert float(rows[1][1]) > 5
    config = next(tmp_path.rglob("*lr1e+38*/config.json"))
    assert json.loads(config.read_text())["diverged"] == 1


def test_a_sweep_keeps_the_networks_of_its_runs_no_longer_than_needed(train, monkeypatch):
    def numbers():
        gc.collect()
        return sum(each.numel() for each in gc.get_objects() if issubclass(type(each), torch.Tensor))

    kept = []
    monkeypatch.setattr(utils, "print_results", lambda *_: kept.append(numbers()))
    flags = ("--cell", "lstm", "--hidden-size", 64, "--batch-size", 640, "--seed", 0, 1, 2)
    before, network = numbers(), 4 * 64 * (28 + 3 * 64)
    for _ in ("trained", "complete"):
        assert train(*flags)[0] == 0
    assert max(kept) < before + network, "of three runs, with two moments for each weight"


def test_the_first_process_waits_for_a_run_that_another_trains_and_the_others_do_not(train, tmp_path, monkeypatch):
    assert train("--hidden-size", "3")[0] == 0
    folder = next((tmp_path / "rnn_mnist").iterdir())
    lock = FileLock(folder / ".lock", thread_local=False)
    lock.acquire()
    monkeypatch.setenv("RANK", "1")
    status, output, _ = train("--hidden-size", "3", "4")
    assert status == 0
    assert "Test accuracy in %" not in output, "the first process prints the table"
    assert len(finished(tmp_path)) == 2
    monkeypatch.setenv("RANK", "0")
    threading.Timer(1.5, lock.release).start()
    start = time.monotonic()
    status, output, _ = train("--hidden-size", "3", "4")
    assert status == 0
    assert time.monotonic() - start > 1
    assert output.count("waiting for what other processes train, 1 of 2 runs") == 1
    assert "Test accuracy in % after epoch 1" in output


def test_the_commit_is_asked_for_once_in_a_sweep(train, monkeypatch):
    commands, run = [], subprocess.run
    monkeypatch.setattr(
        subprocess, "run", lambda command, **options: (commands.append(command), run(command, **options))[1]
    )
    utils.git_commit.cache_clear()
    assert train("--hidden-size", 2, 3, 4)[0] == 0
    assert [command[0] for command in commands] == ["git"]


def test_torchrun_shares_the_list_among_its_processes(tmp_path):
    flags = "--nproc-per-node=2 rnn_mnist.py --data synthetic --epochs 1 --hidden-size 2 3 4 5 --batch-size 500"
    command = [sys.executable, "-m", "torch.distributed.run", *flags.split(), "--runs-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Test accuracy in % after epoch 1") == 1
    folders = list((tmp_path / "rnn_mnist").iterdir())
    assert len(folders) == 4
    for folder in folders:
        assert len((folder / "metrics.csv").read_text().splitlines()) == 2
        assert len(list(folder.glob("events*"))) == 1, "trained once"
        assert utils.read_record(folder, CONFIGS).conditions.threads == 1


def test_processes_share_the_cores_and_small_recurrent_networks_need_one(monkeypatch):
    args = SimpleNamespace(device="cpu", precision="fp32", epochs=1, data_dir="data", threads=7)
    configs = rnn_mnist.Config(hidden_size=30), rnn_mnist.Config(hidden_size=512), cnn_cifar10.Config()
    assert [utils.new_conditions(config, args, "real").threads for config in configs] == [1, 7, 7]
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


# What to open next


@pytest.mark.parametrize(("others", "opens_all"), [(0, True), (39, True), (40, False)])
def test_the_command_for_tensorboard_opens_no_more_runs_than_it_ticks(train, tmp_path, others, opens_all):
    folder = tmp_path / "rnn_mnist" / f"synthetic_{rnn_mnist.Config(hidden_size=4).name}"
    for number in range(others):
        other = folder.with_name(f"run{number}")
        other.mkdir(parents=True)
        (other / "events.out.tfevents.run").touch()
    for _ in ("trained", "complete"):
        lines = train("--hidden-size", 4)[1].splitlines()
        assert f"  tensorboard --logdir {folder.parent if opens_all else folder}" in lines
