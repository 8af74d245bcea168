"""What a user can get wrong ends with the right status and one helpful line, and costs nothing."""

import logging
import os
import pickle
import re
import shlex
import signal
import warnings

import cnn_cifar10
import rnn_mnist
import utils

import pytest
import torch
from conftest import CONFIGS, Intruder, assert_refused, read_files, run_command


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (cnn_cifar10, "--cell gru", "unrecognized arguments: --cell gru"),
        (cnn_cifar10, "--epoch 3", "unrecognized arguments: --epoch 3; did you mean --epochs?"),
        (rnn_mnist, "--seeds 0 1", "unrecognized arguments: --seeds 0 1; did you mean --seed?"),
        (rnn_mnist, "--hiden-size=5", "unrecognized arguments: --hiden-size=5; did you mean --hidden-size?"),
        (rnn_mnist, "--precision fp32", "unrecognized arguments: --precision fp32"),
        (cnn_cifar10, "--optimizer adagrad", "'adagrad'"),
        (cnn_cifar10, "--dataset imagenet", "'imagenet'"),
        (cnn_cifar10, "--data none", "'none'"),
        (cnn_cifar10, "--precision fp64", "'fp64'"),
        (cnn_cifar10, "--device tpu", "'tpu'"),
        (cnn_cifar10, "--lr 0", "'0' is not a number above 0"),
        (cnn_cifar10, "--lr -1", "'-1' is not a number above 0"),
        (cnn_cifar10, "--lr nan", "'nan' is not a number above 0"),
        (cnn_cifar10, "--lr inf", "'inf' is not a number above 0"),
        (cnn_cifar10, "--lr fast", "'fast' is not a number above 0"),
        (cnn_cifar10, "--lr", "expected at least one argument"),
        (cnn_cifar10, "--epochs 0", "'0' is not a whole number from 1"),
        (cnn_cifar10, "--epochs 1.5", "'1.5' is not a whole number from 1"),
        (cnn_cifar10, "--batch-size -8", "'-8' is not a whole number from 1"),
        (cnn_cifar10, "--seed -1", "'-1' is not a whole number from 0"),
        (cnn_cifar10, "--optimizer sgd --momentum 1", "'1' is not a number from 0 to below 1"),
        (cnn_cifar10, "--momentum 0.9", "argument --momentum: 0.9 needs --optimizer sgd"),
        (cnn_cifar10, "--momentum 0.9 0", "argument --momentum: 0.9 needs --optimizer sgd"),
        (rnn_mnist, "--cell transformer", "'transformer'"),
        (rnn_mnist, "--hidden-size 0", "'0' is not a whole number from 1"),
        (rnn_mnist, "--hidden-size 1000000000", "'1000000000' is not a whole number from 1"),
        (rnn_mnist, "--dataset mnist", "unrecognized arguments: --dataset"),
        (cnn_cifar10, "--lr ''", "'' is not a number above 0"),
        (cnn_cifar10, "--lr 1e999", "'1e999' is not a number above 0"),
        (cnn_cifar10, "--lr 1e-3 -1 1e-4", "'-1' is not a number above 0"),
        (cnn_cifar10, "--epochs 1000", "'1000' is not a whole number from 1 to 999"),
        (cnn_cifar10, "--epochs 3 4", "unrecognized arguments: 4"),
        (cnn_cifar10, "--batch-size 60001", "'60001' is not a whole number from 1 to 60000"),
        (cnn_cifar10, "--batch-size 64 0", "'0' is not a whole number from 1"),
        (cnn_cifar10, "--seed 2147483648", "'2147483648' is not a whole number from 0"),
        (cnn_cifar10, "--seed 0x10", "'0x10' is not a whole number from 0"),
        (cnn_cifar10, "--optimizer adam Adam", "'Adam'"),
        (cnn_cifar10, "--optimizer sgd --momentum -0.1", "'-0.1' is not a number from 0 to below 1"),
        (cnn_cifar10, "--optimizer sgd --momentum nan", "'nan' is not a number from 0 to below 1"),
        (cnn_cifar10, "--report --optimizer sgd", "brings its own settings; leave out --optimizer"),
        (cnn_cifar10, "--runs-dir", "expected one argument"),
        (cnn_cifar10, "--runs-dir ''", "'' is not the name of a folder"),
        (rnn_mnist, "--data-dir ''", "'' is not the name of a folder"),
        (cnn_cifar10, "surplus", "unrecognized arguments: surplus"),
        (rnn_mnist, "--cell ''", "''"),
        (rnn_mnist, "--cell rnn elman", "'elman'"),
        (rnn_mnist, "--hidden-size 5 4097", "'4097' is not a whole number from 1 to 4096"),
        (rnn_mnist, "--hidden-size ten", "'ten' is not a whole number from 1"),
    ],
)
def test_an_unusable_command_line_ends_with_status_2_and_one_line(call, script, flags, words):
    status, _, error = call(script, *shlex.split(flags))
    assert status == 2
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda", "mps"])
@pytest.mark.usefixtures("tiny_data")
def test_a_device_that_is_not_there(call, tmp_path, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    status, _, error = call(rnn_mnist, "--device", device, "--data", "synthetic", "--runs-dir", tmp_path)
    assert status == 2
    assert f"the device {device} is not there; use --device cpu" in error


@pytest.mark.usefixtures("tiny_data")
def test_folders_that_cannot_be_written(call, tmp_path):
    (tmp_path / "file").write_text("mine")
    status, _, error = call(rnn_mnist, "--data", "synthetic", "--runs-dir", tmp_path / "file")
    assert status == 2
    assert str(tmp_path / "file") in error
    assert error.count("\n") == 1
    status, _, error = call(rnn_mnist, "--data", "real", "--data-dir", tmp_path / "file", "--runs-dir", tmp_path)
    assert status == 2
    assert str(tmp_path / "file") in error
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_ends_with_status_1():
    done = run_command(
        "-c", "import utils; utils.run_script(lambda: open('/dev/full', 'w', buffering=1).write('x\\n'))"
    )
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert "free some space" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.fixture
def retrain(call, copied_run, tiny_data):
    """Ask for more epochs of a finished run than it has; returns (exit status, standard output, standard error)."""
    return lambda: call(rnn_mnist, "--data", "synthetic", "--runs-dir", copied_run.parents[1], "--epochs", 3)


def test_a_truncated_checkpoint_is_refused_and_left_alone(retrain, copied_run):
    path = copied_run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = read_files(copied_run)
    assert_refused(retrain(), "checkpoint.pt is damaged or not of this project")
    assert read_files(copied_run) == before


def test_a_foreign_checkpoint_is_refused_and_its_code_is_not_run(retrain, copied_run, tmp_path):
    path = copied_run / "checkpoint.pt"
    path.write_bytes(pickle.dumps(Intruder(tmp_path / "intruder")))
    assert_refused(retrain(), "is damaged or not of this project")
    for content in ({"model": Intruder(tmp_path / "intruder")}, [1, 2, 3], {"state": 3}):
        torch.save(content, path)
        assert_refused(retrain(), "is damaged or not of this project")
    assert not (tmp_path / "intruder").exists()


def test_a_checkpoint_of_another_network_is_refused(retrain, copied_run):
    checkpoint = torch.load(copied_run / "checkpoint.pt", weights_only=True)
    checkpoint["state"]["model"] = rnn_mnist.RowReader(rnn_mnist.Config(cell="gru", hidden_size=12)).state_dict()
    torch.save(checkpoint, copied_run / "checkpoint.pt")
    assert_refused(retrain(), "do not fit its settings")


@pytest.mark.parametrize(("name", "read"), [("config.json", utils.read_record), ("metrics.csv", utils.read_metrics)])
@pytest.mark.parametrize("content", ["", "not what it was", '{"script": 3}', "epoch,train_loss\n1,2\n", "x" * 200_000])
def test_damaged_run_files_are_named_and_written_anew_from_the_checkpoint(retrain, copied_run, name, read, content):
    path, configs = copied_run / name, (CONFIGS,) if name == "config.json" else ()
    before = read(copied_run, *configs)
    path.write_text(content)
    with pytest.raises(utils.InputError) as refused:
        read(copied_run, *configs)
    assert str(path) in str(refused.value)
    assert retrain()[0] == 0
    after = read(copied_run, *configs)
    assert after[:2] == before if name == "metrics.csv" else after.config == before.config


@pytest.mark.parametrize("row", ["1,nan,1,1,1,1", "2,1,1,1,1,1", "1,1,1,1,1"])
def test_metrics_that_no_run_can_have_are_refused(tmp_path, row):
    (tmp_path / "metrics.csv").write_text(",".join(utils.METRICS) + f"\n{row}\n")
    with pytest.raises(utils.InputError, match=r"metrics.csv is empty or damaged"):
        utils.read_metrics(tmp_path)


@pytest.mark.parametrize("script", ["cnn_cifar10.py", "rnn_mnist.py"])
def test_help_shows_every_flag_with_its_default(script):
    done = run_command(script, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    flags = dict(re.findall(r"^  --(\S+)(.*?)(?=^  -|\Z)", done.stdout, re.DOTALL | re.MULTILINE))
    assert len(flags) >= 14
    assert {name for name, text in flags.items() if "default:" not in text} == {"report", "fresh"}


def test_calling_a_script_in_a_test_leaves_nothing_behind(call):
    def state():
        numbers = [getattr(signal, name, None) for name in ("SIGINT", "SIGTERM", "SIGHUP")]
        handlers = [signal.getsignal(number) for number in numbers if number]
        return handlers, logging.root.manager.disable, list(warnings.filters)

    before = state()
    assert call(rnn_mnist, "--lr", "0")[0] == 2
    assert state() == before
