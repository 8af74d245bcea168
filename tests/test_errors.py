"""Mistakes of users and damaged files: the right exit status, one line that helps, and nothing lost."""

import os
import pickle
import random
import shlex
from functools import partial

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import pytest
import torch
from conftest import SMALL_GRU, assert_refused, read_files, read_rows, same

# The command line


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (rnn_mnist, "--precision fp32", "unrecognized arguments: --precision fp32; see --help"),
        (cnn_cifar10, "--epoch=3", "unrecognized arguments: --epoch=3; see --help"),
        (cnn_cifar10, "--data none", "argument --data: invalid choice: 'none'"),
        (cnn_cifar10, "--lr fast", "argument --lr: invalid float value: 'fast'"),
        (cnn_cifar10, "--lr 1e-3 0 1e-4", "--lr must be between 1e-12 and 1e12, not 0"),
        (cnn_cifar10, "--epochs 0", "--epochs must be between 1 and 999, not 0"),
        (cnn_cifar10, "--runs-dir=", "argument --runs-dir: the name of the folder is empty"),
        (rnn_mnist, "--cell gru LSTM", "--cell must be one of rnn, gru, lstm, not LSTM"),
        (rnn_mnist, "--gates input", "--gates input needs --cell gru or lstm; a plain RNN has no gates"),
        (rnn_mnist, "--momentum 0.9", "--momentum 0.9 needs --optimizer sgd"),
        (visualize, "", "the following arguments are required: RUN"),
    ],
)
def test_an_invalid_command_line_is_refused_with_a_hint(script, flags, message, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(call(script, *flags.split()), f"{script.__name__}.py: error: {message}")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("flags", ["--data synthetic --runs-dir {file}", "--data real --data-dir {file}/data"])
def test_a_folder_that_cannot_be_written_is_named(train, tmp_path, flags):
    file = tmp_path / "file"
    file.write_text("mine")
    outcome = train("--runs-dir", tmp_path / "runs", *shlex.split(flags.format(file=file)))
    assert_refused(outcome, f"error: {file}/")
    assert file.read_text() == "mine"


# Damaged files


def flip_bit(content, bit):
    """Return bytes with one bit changed."""
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


class Intruder:
    """Code in a pickle: it makes a directory when it is loaded."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def damage(path, kind):
    """Damage a checkpoint, or put something else in its place."""
    if kind == "cut off":
        path.write_bytes(path.read_bytes()[:-100])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Intruder(path.with_name("intruder"))))
    elif kind == "archive":
        torch.save({"state": Intruder(path.with_name("intruder"))}, path)
    elif kind == "list":
        torch.save([1, 2, 3], path)
    elif kind == "no state":
        torch.save({"fc.bias": torch.ones(10)}, path)
    elif kind == "other network":
        checkpoint = torch.load(path, weights_only=True)
        checkpoint["state"]["model"] = rnn_mnist.RowReader(rnn_mnist.Config(cell="gru", hidden_size=12)).state_dict()
        torch.save(checkpoint, path)


@pytest.mark.parametrize("script", [rnn_mnist, visualize])
@pytest.mark.parametrize("kind", ["cut off", "pickle", "archive", "list", "no state", "other network"])
def test_a_damaged_checkpoint_is_named_and_runs_no_code(script, kind, call, train, finished_run):
    path = finished_run / "checkpoint.pt"
    damage(path, kind)
    before = read_files(finished_run)
    outcome = train("--epochs", 2) if script is rnn_mnist else call(script, finished_run)
    assert_refused(outcome, f"error: {path} is damaged or from other settings; {utils.START_OVER}\n")
    assert read_files(finished_run) == before
    assert not (finished_run / "intruder").exists()


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


@pytest.mark.parametrize("file", ["config.json", "metrics.csv"])
@pytest.mark.parametrize("content", ["", '{"script": 3}', "epoch,train_loss\n1,2\n", "x" * 200_000])
def test_what_follows_from_the_checkpoint_is_repaired(train, finished_run, file, content):
    rows = read_rows(finished_run)
    (finished_run / file).write_text(content)
    status, _, error = train("--epochs", 2)
    assert (status, error) == (0, "")
    assert read_rows(finished_run)[:1] == rows
    run = visualize.SavedRun(finished_run)
    assert (run.config, run.conditions.epochs) == (SMALL_GRU, 2)


@pytest.mark.usefixtures("finished_run")
@pytest.mark.parametrize("allocate", [partial(torch.empty, dtype=torch.uint8), bytearray], ids=["tensor", "bytes"])
@pytest.mark.parametrize(("owner", "name"), [(rnn_mnist.RowReader, "rows"), (torch, "load")])
def test_too_little_memory_is_said_in_one_line_and_is_no_damage(train, monkeypatch, owner, name, allocate):
    monkeypatch.setattr(owner, name, lambda *_, **__: allocate(2**60))
    status, _, error = train("--epochs", 2)
    assert (status, error.count("\n")) == (1, 1)
    assert "error: not enough memory; close other programs, or use a smaller network or --batch-size" in error
