"""What a user can get wrong ends with the right status and one helpful line, and costs nothing."""

import os
import pickle
import shlex
import shutil

import pytest
import torch
from conftest import run_command

import cnn_cifar10
import rnn_mnist
import utils
import visualize


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (cnn_cifar10, "--cell gru", "unrecognized arguments: --cell gru"),
        (cnn_cifar10, "--epoch 3", "unrecognized arguments: --epoch"),
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
        (cnn_cifar10, "--momentum 0.9", "needs --optimizer sgd"),
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
        (visualize, "", "required: RUN"),
        (visualize, "--figures", "expected at least one argument"),
        (visualize, "''", "'' is not the name of a folder"),
        (visualize, "one two", "one is not a folder"),
        (visualize, "nowhere", "nowhere is not a folder"),
        (visualize, "nowhere --figures heatmap", "'heatmap'"),
    ],
)
def test_an_unusable_command_line_ends_with_status_2_and_one_line(call, script, flags, words):
    status, _, error = call(script, *shlex.split(flags))
    assert status == 2
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(call, tmp_path, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    status, _, error = call(rnn_mnist, "--device", device, "--data", "synthetic", "--runs-dir", tmp_path)
    assert status == 2
    assert f"the device {device} is not there; use --device cpu" in error


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
def copied_run(rnn_run, tmp_path):
    folder = tmp_path / "rnn_mnist" / rnn_run[1].name
    shutil.copytree(rnn_run[1], folder)
    return folder


def retrain(call, folder):
    return call(rnn_mnist, "--data", "synthetic", "--runs-dir", folder.parents[1], "--epochs", 11)


def assert_refused(outcome, words):
    status, _, error = outcome
    assert status == 2
    assert words in error
    assert error.count("\n") == 1


def test_a_run_folder_without_checkpoint(call, copied_run):
    (copied_run / "checkpoint.pt").unlink()
    assert_refused(call(visualize, copied_run), "holds no checkpoint.pt; train the run first")
    assert call(visualize, copied_run, "--figures", "curves")[0] == 0


def test_a_truncated_checkpoint_is_refused_and_left_alone(call, copied_run):
    path = copied_run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = {file: file.read_bytes() for file in copied_run.iterdir() if file.is_file()}
    for outcome in (call(visualize, copied_run), retrain(call, copied_run)):
        assert_refused(outcome, "checkpoint.pt is damaged or not of this project")
    assert {file: file.read_bytes() for file in copied_run.iterdir() if file.is_file()} == before


class Intruder:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_a_foreign_checkpoint_is_refused_and_its_code_is_not_run(call, copied_run, tmp_path):
    path = copied_run / "checkpoint.pt"
    path.write_bytes(pickle.dumps(Intruder(tmp_path / "intruder")))
    assert_refused(call(visualize, copied_run), "is damaged or not of this project")
    torch.save({"model": Intruder(tmp_path / "intruder")}, path)
    assert_refused(call(visualize, copied_run), "is damaged or not of this project")
    torch.save([1, 2, 3], path)
    assert_refused(call(visualize, copied_run), "is damaged or not of this project")
    assert not (tmp_path / "intruder").exists()


def test_a_checkpoint_of_another_network_is_refused(call, copied_run):
    checkpoint = torch.load(copied_run / "checkpoint.pt", weights_only=True)
    checkpoint["model"] = rnn_mnist.RowReader("gru", 12).state_dict()
    torch.save(checkpoint, copied_run / "checkpoint.pt")
    assert_refused(call(visualize, copied_run), "do not fit its settings")
    assert_refused(retrain(call, copied_run), "do not fit its settings")


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
@pytest.mark.parametrize("content", ["", "not what it was", '{"script": 3}', "epoch,train_loss\n1,2\n"])
def test_damaged_run_files_are_named(call, copied_run, name, content):
    (copied_run / name).write_text(content)
    assert_refused(call(visualize, copied_run), str(copied_run / name))


@pytest.mark.parametrize("row", ["1,nan,1,1,1,1", "2,1,1,1,1,1", "1,1,1,1,1"])
def test_metrics_that_no_run_can_have_are_refused(call, copied_run, row):
    (copied_run / "metrics.csv").write_text(",".join(utils.METRICS) + f"\n{row}\n")
    assert_refused(call(visualize, copied_run, "--figures", "curves"), "metrics.csv is missing, empty or damaged")


GRADIENTS = ["step,state,untrained,trained", *(f"{step},hidden,1,1" for step in range(1, 29))]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("gradients", GRADIENTS[:1]),
        ("gradients", GRADIENTS[:-1]),
        ("gradients", [*GRADIENTS[:-1], "28,hidden,0,0"]),
        ("gradients", [*GRADIENTS[:-1], "28,hidden,inf,1"]),
        ("gradients", [*GRADIENTS, "28,cell,1,1"]),
        ("gradients", ["step", "1"]),
        ("gabor", ["kernels,feature_map,r2,orientation_degrees,cycles_per_pixel", "trained,0,0.5,90,0.2"]),
    ],
)
def test_damaged_tables_are_named(call, tmp_path, request, kind, lines):
    _, folder = request.getfixturevalue("rnn_run" if kind == "gradients" else "cnn_run")
    for name in ("one", "two"):
        (tmp_path / name / "figures").mkdir(parents=True)
        for file in ("config.json", "metrics.csv"):
            shutil.copy(folder / file, tmp_path / name / file)
    table = tmp_path / "one" / "figures" / f"{kind}.csv"
    table.write_text("\n".join([*lines, ""]))
    words = f"{table} is damaged; delete it, or write it anew with --figures {kind}"
    assert_refused(call(visualize, tmp_path, "--figures", kind), words)


def test_a_figure_that_the_network_does_not_have(call, copied_run):
    assert_refused(
        call(visualize, copied_run, "--figures", "filters"), "is a run of rnn_mnist.py and has no figure filters"
    )
    assert_refused(call(visualize, copied_run.parents[1], "--figures", "confusion"), "takes a single run")


def test_a_folder_without_runs(call, tmp_path):
    assert_refused(call(visualize, tmp_path), "holds no run")


@pytest.mark.parametrize("script", ["cnn_cifar10.py", "rnn_mnist.py", "visualize.py"])
def test_help_shows_every_flag_with_its_default(script):
    done = run_command(script, "--help")
    assert done.returncode == 0
    assert done.stderr == ""
    flags = [line for line in done.stdout.splitlines() if line.startswith("  --")]
    assert len(flags) >= (2 if script == "visualize.py" else 12)
