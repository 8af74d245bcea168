"""Mistakes of users and damaged files: the right exit status, one line that helps, and nothing lost."""

import errno
import os
import pickle
import random
import shlex
import shutil
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import pytest
import torch
from conftest import NOISE_NAME, Intruder, assert_refused, noise_digits, read_files, read_rows, same, train_here

CONFIG = rnn_mnist.Config(cell="gru", hidden_size=8, lr=0.01)  # that of NOISE_NAME


# The command line


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (cnn_cifar10, "--cell gru", "error: unknown argument --cell"),
        (cnn_cifar10, "--epochs 3 4", "error: unknown argument 4"),
        (rnn_mnist, "--precision fp32", "error: unknown argument --precision"),
        (rnn_mnist, "--dataset mnist", "error: unknown argument --dataset"),
        (cnn_cifar10, "--optimizer adam Adam", "error: --optimizer must be one of adam, sgd, not Adam"),
        (cnn_cifar10, "--data none", "error: argument --data: invalid choice: 'none'"),
        (cnn_cifar10, "--lr fast", "error: argument --lr: invalid float value: 'fast'"),
        (rnn_mnist, "--seed 0x10", "error: argument --seed: invalid int value: '0x10'"),
        (cnn_cifar10, "--runs-dir", "error: argument --runs-dir: expected one argument"),
        (cnn_cifar10, "--lr 1e-3 0 1e-4", "error: --lr must be between 1e-12 and 1e12, not 0"),
        (cnn_cifar10, "--lr 1e999", "error: --lr must be between 1e-12 and 1e12, not inf"),
        (cnn_cifar10, "--epochs 0", "error: --epochs must be between 1 and 999, not 0"),
        (rnn_mnist, "--hidden-size 5 4097", "error: --hidden-size must be between 1 and 4096, not 4097"),
        (visualize, "", "error: the following arguments are required: RUN"),
    ],
)
def test_an_invalid_command_line_ends_with_status_2_and_one_line(call, script, flags, message):
    assert_refused(call(script, *shlex.split(flags)), f"{script.__name__}.py: {message}")


@pytest.mark.parametrize("flags", ["--data synthetic --runs-dir {file}", "--data real --data-dir {file}/data"])
def test_a_folder_that_cannot_be_written_is_named(train_on_noise, tmp_path, flags):
    file = tmp_path / "file"
    file.write_text("mine")
    flags = shlex.split(flags.format(file=file))
    assert_refused(train_on_noise("--runs-dir", tmp_path / "runs", *flags), f"error: {file}/")
    assert file.read_text() == "mine"


# Damaged files


def flip_bit(content, bit):
    """Return bytes with one bit changed."""
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def damage(path, kind):
    """Damage a file of tensors, or put something else in its place."""
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "flipped bit":
        path.write_bytes(flip_bit(path.read_bytes(), 4 * path.stat().st_size))
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "code in a pickle":
        path.write_bytes(pickle.dumps(Intruder(path.with_name("intruder"))))
    elif kind == "code in an archive":
        torch.save({"weights": Intruder(path.with_name("intruder"))}, path)
    elif kind == "list":
        torch.save([1, 2, 3], path)
    elif kind == "no weights":
        torch.save({"fc.bias": torch.ones(10)}, path)


@pytest.mark.parametrize(
    "kind", ["cut off", "flipped bit", "empty", "code in a pickle", "code in an archive", "list", "no weights"]
)
def test_a_damaged_file_of_tensors_is_refused_and_runs_no_code(tmp_path, kind):
    path = tmp_path / "tensors.pt"
    utils.save_tensors(path, {"weights": torch.ones(1000)})
    damage(path, kind)
    with pytest.raises(utils.InputError) as refused:
        utils.load_tensors(path, {"weights"})
    assert str(refused.value) == f"{path} is damaged or from another program; train the run again with --fresh"
    assert not (tmp_path / "intruder").exists()


def test_a_changed_bit_is_found_or_changes_no_value(tmp_path):
    """Tries bits anywhere, and all bits in what the archive's directory says about a tensor."""
    rng = random.Random(0)
    path = tmp_path / "tensors.pt"
    tensors = {"weights": torch.arange(900.0), "history": [{"epoch": 1, "loss": 0.5}]}
    utils.save_tensors(path, tensors)
    content = path.read_bytes()
    refused = 0
    entry = content.rindex(b"/data/0")
    bits = [rng.randrange(8 * len(content)) for _ in range(500)]
    for bit in (*bits, *range(8 * (entry - 53), 8 * (entry + 7))):
        path.write_bytes(flip_bit(content, bit))
        try:
            assert same(utils.load_tensors(path), tensors), f"bit {bit % 8} of byte {bit // 8}"
        except utils.InputError:
            refused += 1
    assert refused > 500


@pytest.fixture(scope="session")
def two_epochs(tmp_path_factory):
    """The folder of a run that was trained on noise for two epochs."""
    return train_here(rnn_mnist, tmp_path_factory.mktemp("two_epochs"), noise_digits(320), CONFIG)


@pytest.fixture
def folder(two_epochs, tmp_path):
    """A copy of two_epochs that a test may change."""
    return Path(shutil.copytree(two_epochs, tmp_path / "rnn_mnist" / NOISE_NAME))


@pytest.fixture
def use(call, train_on_noise, folder):
    """Return a function that continues the run in folder, or draws its figures: (exit status, output, error)."""

    def use_for(purpose):
        if purpose == "training":
            return train_on_noise("--epochs", 3, runs_dir=folder.parents[1])
        return call(visualize, folder)

    return use_for


@pytest.mark.parametrize("purpose", ["training", "figures"])
@pytest.mark.parametrize("kind", ["flipped bit", "cut off", "other network"])
def test_a_damaged_checkpoint_is_named_and_nothing_is_changed(use, folder, purpose, kind):
    path = folder / "checkpoint.pt"
    if kind == "other network":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state"]["model"] = rnn_mnist.RowReader(rnn_mnist.Config(cell="gru", hidden_size=12)).state_dict()
        torch.save(checkpoint, path)
        message = f"error: {path}: the weights do not fit the settings; train the run again with --fresh"
    else:
        damage(path, kind)
        message = f"error: {path} is damaged or from another program; train the run again with --fresh"
    before = read_files(folder)
    assert_refused(use(purpose), message)
    assert read_files(folder) == before


def test_damaged_metrics_without_a_checkpoint_are_named(use, folder):
    (folder / "checkpoint.pt").unlink()
    (folder / "metrics.csv").write_text(",".join(utils.METRIC_COLUMNS) + "\n1,2\n")
    assert_refused(use("figures"), f"error: {folder / 'metrics.csv'} is damaged")


@pytest.mark.parametrize("file", ["config.json", "metrics.csv"])
@pytest.mark.parametrize("content", ["", '{"script": 3}', "epoch,train_loss\n1,2\n", "x" * 200_000])
def test_what_follows_from_the_checkpoint_is_repaired(use, folder, two_epochs, file, content):
    (folder / file).write_text(content)
    status, _, error = use("training")
    assert (status, error) == (0, "")
    assert read_rows(folder)[:2] == read_rows(two_epochs)
    config, conditions = utils.read_config(folder, visualize.CONFIGS)
    assert (config, conditions.epochs) == (CONFIG, 3)


# Lack of space and memory


def test_a_full_disk_is_named_by_the_path_and_keeps_the_old_file(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "checkpoint.pt"
    path.write_text("old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left on device") as failed:
        utils.write_atomically(path, b"new")
    reason = "No space left on device; free some space and run the same command again"
    assert utils.describe_error(failed.value) == (1, f"error: {path}: {reason}")
    assert path.read_text() == "old"


def allocate_tensor(*_, **__):
    return torch.empty(2**60, dtype=torch.uint8)


def allocate_bytes(*_, **__):
    return bytearray(2**60)


@pytest.mark.parametrize("allocate", [allocate_tensor, allocate_bytes])
@pytest.mark.parametrize(("owner", "name"), [(rnn_mnist.RowReader, "rows"), (torch, "load")])
def test_too_little_memory_is_said_in_one_line_and_is_no_damage(use, monkeypatch, owner, name, allocate):
    monkeypatch.setattr(owner, name, allocate)
    status, _, error = use("training")
    assert (status, error.count("\n")) == (1, 1)
    assert "error: not enough memory; close other programs, or use a smaller network or --batch-size" in error
