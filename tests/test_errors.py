"""What a user can get wrong ends with the right status and one helpful line, and costs nothing."""

import os
import pickle
import random
import shlex
import shutil
import zipfile

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import pytest
import torch
from conftest import NOISE_NAME, Intruder, assert_refused, noise_digits, read_files, read_rows, same, train_here

FULL = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
CHECKPOINT, CONFIG, METRICS, SNAPSHOT = "checkpoint.pt", "config.json", "metrics.csv", "snapshots/epoch_01.pt"


# Command lines


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (cnn_cifar10, "--cell gru", "unrecognized arguments: --cell gru"),
        (cnn_cifar10, "--epoch 3", "unrecognized arguments: --epoch 3"),
        (cnn_cifar10, "surplus", "unrecognized arguments: surplus"),
        (cnn_cifar10, "--dataset x", "error: --dataset x is not one of cifar10, mnist"),
        (cnn_cifar10, "--optimizer adam Adam", "error: --optimizer Adam is not one of adam, sgd"),
        (cnn_cifar10, "--data none", "argument --data: invalid choice: 'none'"),
        (cnn_cifar10, "--precision fp64", "argument --precision: invalid choice: 'fp64'"),
        (cnn_cifar10, "--device tpu", "argument --device: invalid choice: 'tpu'"),
        (cnn_cifar10, "--lr", "argument --lr: expected at least one argument"),
        (cnn_cifar10, "--lr fast", "argument --lr: invalid float value: 'fast'"),
        (cnn_cifar10, "--lr 1e-3 0 1e-4", "error: --lr 0.0 is not from 1e-12"),
        (cnn_cifar10, "--lr nan", "error: --lr nan is not from"),
        (cnn_cifar10, "--lr 1e999", "error: --lr inf is not from"),
        (cnn_cifar10, "--epochs 0", "error: --epochs 0 is not from 1 to 999"),
        (cnn_cifar10, "--epochs 1.5", "argument --epochs: invalid int value: '1.5'"),
        (cnn_cifar10, "--epochs 3 4", "unrecognized arguments: 4"),
        (cnn_cifar10, "--momentum 0.9 0", "error: --momentum 0.9 needs --optimizer sgd"),
        (cnn_cifar10, "--optimizer sgd adam --momentum 0.9", "error: --momentum 0.9 needs --optimizer sgd"),
        (cnn_cifar10, "--runs-dir", "argument --runs-dir: expected one argument"),
        (rnn_mnist, "--precision fp32", "unrecognized arguments: --precision fp32"),
        (rnn_mnist, "--dataset cifar10", "error: --dataset cifar10 is not one of mnist"),
        (rnn_mnist, "--cell ''", "error: --cell  is not one of rnn, gru, lstm"),
        (rnn_mnist, "--hidden-size 5 4097", "error: --hidden-size 4097 is not from 1 to 4096"),
        (rnn_mnist, "--batch-size 60001", "error: --batch-size 60001 is not from 1 to 60000"),
        (rnn_mnist, "--seed 0x10", "argument --seed: invalid int value: '0x10'"),
        (rnn_mnist, "--keep-bias 101", "error: --keep-bias 101.0 is not from -100 to 100"),
        (visualize, "", "the following arguments are required: RUN"),
        (visualize, "runs --figures pie", "argument --figures: invalid choice: 'pie'"),
        (visualize, "no/such/folder", "no/such/folder"),
    ],
)
def test_an_unusable_command_line_ends_with_status_2_and_one_line(call, script, flags, words):
    assert_refused(call(script, *shlex.split(flags)), words)


# Damaged files


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A run of two epochs on a little noise."""
    config = rnn_mnist.Config(cell="gru", hidden_size=8, lr=0.01)
    return train_here(rnn_mnist, tmp_path_factory.mktemp("whole"), noise_digits(320), config)


@pytest.fixture
def run(whole_run, tmp_path):
    folder = tmp_path / "rnn_mnist" / NOISE_NAME
    shutil.copytree(whole_run, folder)
    return folder


@pytest.fixture
def read(call, train_on_noise, run):
    """Read a run by continuing it, or by drawing a figure of it; returns (exit status, output, error)."""

    def read_by(reader):
        if reader == "training":
            return train_on_noise("--epochs", 3, runs_dir=run.parents[1])
        return call(visualize, run, "--figures", reader)

    return read_by


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def write(text):
    return lambda path: path.write_text(text)


def save(make):
    return lambda path: torch.save(make(path), path)


def other_network(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state"]["model"] = rnn_mnist.RowReader(rnn_mnist.Config(cell="gru", hidden_size=12)).state_dict()
    return checkpoint


def intrude(path):
    path.write_bytes(pickle.dumps(Intruder(path.with_name("intruder"))))


def no_checkpoint(path):
    (path.parent / CHECKPOINT).unlink()
    write("epoch,train_loss,train_accuracy,test_loss,test_accuracy,seconds\n1,2\n")(path)


DAMAGED = "{file} is damaged or not of this project; train the run again with --fresh"
FOREIGN = "{file} is not of this version of the project ("


@pytest.mark.parametrize(
    ("reader", "file", "damage", "words"),
    [
        *((reader, CHECKPOINT, cut, DAMAGED) for reader in ("training", "curves")),
        *((reader, CHECKPOINT, flip, DAMAGED) for reader in ("training", "curves")),
        *((reader, CHECKPOINT, write(""), DAMAGED) for reader in ("training", "curves")),
        *((reader, CHECKPOINT, intrude, DAMAGED) for reader in ("training", "curves")),
        *(
            (reader, CHECKPOINT, save(lambda path: {"model": Intruder(path.with_name("intruder"))}), DAMAGED)
            for reader in ("training", "curves")
        ),
        *((reader, CHECKPOINT, save(lambda path: [1, 2, 3]), DAMAGED) for reader in ("training", "curves")),
        *((reader, CHECKPOINT, save(lambda path: {"state": {}}), DAMAGED) for reader in ("training", "curves")),
        *(
            (reader, CHECKPOINT, save(other_network), "{file}: the weights do not fit")
            for reader in ("training", "confusion")
        ),
        ("gradients", SNAPSHOT, cut, DAMAGED),
        ("gradients", SNAPSHOT, flip, DAMAGED),
        ("gradients", SNAPSHOT, intrude, DAMAGED),
        ("curves", CONFIG, write(""), FOREIGN),
        ("curves", CONFIG, write('{"model_type": "bert"}'), FOREIGN),
        ("curves", METRICS, no_checkpoint, "{file} is damaged"),
    ],
)
def test_a_damaged_file_is_named_its_code_is_not_run_and_nothing_is_changed(read, run, reader, file, damage, words):
    damage(run / file)
    before = read_files(run)
    assert_refused(read(reader), words.format(file=run / file))
    assert read_files(run) == before
    assert not list(run.rglob("intruder"))


@pytest.mark.parametrize("file", [CONFIG, METRICS])
@pytest.mark.parametrize("content", ["", "not what it was", '{"script": 3}', "epoch,train_loss\n1,2\n", "x" * 200_000])
def test_what_follows_from_the_checkpoint_is_written_anew_in_place_of_damaged_files(
    read, run, whole_run, file, content
):
    (run / file).write_text(content)
    assert read("training")[::2] == (0, "")
    assert read_rows(run)[:2] == read_rows(whole_run)
    config, conditions = utils.read_config(run, visualize.CONFIGS)
    assert (config, conditions.epochs) == (utils.read_config(whole_run, visualize.CONFIGS)[0], 3)


def test_a_bit_that_changed_is_found_or_changes_nothing(tmp_path):
    """Many bits anywhere, and each of the archive's directory, of which some say nothing and some where tensors lie."""
    path, rng = tmp_path / "tensors.pt", random.Random(0)
    tensors = {"weights": torch.arange(500.0), "history": [{"epoch": 1, "loss": 0.5}], "bias": torch.ones(3)}
    utils.save_tensors(path, tensors)
    content = path.read_bytes()
    directory, end = 8 * zipfile.ZipFile(path).start_dir, 8 * len(content)
    refused, anywhere = 0, [rng.randrange(directory) for _ in range(1000)]
    for bit in (*anywhere, *range(directory, end)):
        changed = bytearray(content)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            assert same(utils.load_tensors(path), tensors), f"bit {bit % 8} of byte {bit // 8}"
        except utils.InputError:
            refused += 1
    assert refused > 1000


# Folders, devices, disks, memory


@pytest.mark.parametrize("flags", ["--data synthetic --runs-dir {file}", "--data real --data-dir {file}/data"])
def test_a_folder_that_cannot_be_written_is_named(train_on_noise, tmp_path, flags):
    (tmp_path / "file").write_text("mine")
    flags = shlex.split(flags.format(file=tmp_path / "file"))
    assert_refused(train_on_noise("--runs-dir", tmp_path / "runs", *flags), f"{tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there_is_named(train_on_noise, device):
    if getattr(torch, device).is_available():
        pytest.skip(f"this machine has {device}")
    assert_refused(train_on_noise("--device", device), f"the device {device} is not there; use --device cpu")


@FULL
def test_a_full_disk_ends_with_status_1_and_keeps_what_was_finished(read, run):
    (run / "checkpoint.pt.part").symlink_to("/dev/full")
    before = (run / CHECKPOINT).read_bytes()
    status, _, error = read("training")
    assert (status, error.count("\n")) == (1, 1)
    assert "No space left on device; free some space and run the same command again" in error
    assert str(run) in error
    assert (run / CHECKPOINT).read_bytes() == before


@pytest.mark.parametrize("lack", [lambda *_: torch.empty(2**60, dtype=torch.uint8), lambda *_: bytearray(2**60)])
@pytest.mark.parametrize(("owner", "name"), [(rnn_mnist.RowReader, "rows"), (torch, "load")])
def test_too_little_memory_is_told_in_one_line_and_is_no_damage(read, monkeypatch, owner, name, lack):
    monkeypatch.setattr(owner, name, lambda *_, **__: lack())
    status, _, error = read("training")
    assert (status, error.count("\n")) == (1, 1)
    assert "error: too little memory; end other programs, or take a smaller network or --batch-size" in error
