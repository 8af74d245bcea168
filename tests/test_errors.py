"""What a user can get wrong ends with the right status and one helpful line, and costs nothing."""

import os
import pickle
import random
import shlex
import shutil
from functools import partial
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import pytest
import torch
from conftest import NOISE_NAME, Intruder, assert_refused, noise_digits, read_files, read_rows, same, train_here

CHECKPOINT, CONFIG, METRICS, SNAPSHOT = "checkpoint.pt", "config.json", "metrics.csv", "snapshots/epoch_01.pt"


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (cnn_cifar10, "--cell gru", "unrecognized arguments: --cell gru"),
        (cnn_cifar10, "--epoch 3", "unrecognized arguments: --epoch 3"),
        (cnn_cifar10, "--dataset x", "error: --dataset x is not one of cifar10, mnist"),
        (cnn_cifar10, "--optimizer adam Adam", "error: --optimizer Adam is not one of adam, sgd"),
        (cnn_cifar10, "--data none", "argument --data: invalid choice: 'none'"),
        (cnn_cifar10, "--device tpu", "argument --device: invalid choice: 'tpu'"),
        (cnn_cifar10, "--lr fast", "argument --lr: invalid float value: 'fast'"),
        (cnn_cifar10, "--lr 1e-3 0 1e-4", "error: --lr 0.0 is not from 1e-12"),
        (cnn_cifar10, "--lr 1e999", "error: --lr inf is not from"),
        (cnn_cifar10, "--epochs 0", "error: --epochs 0 is not from 1 to 999"),
        (cnn_cifar10, "--epochs 3 4", "unrecognized arguments: 4"),
        (cnn_cifar10, "--optimizer sgd adam --momentum 0.9", "error: --momentum 0.9 needs --optimizer sgd"),
        (cnn_cifar10, "--runs-dir", "argument --runs-dir: expected one argument"),
        (rnn_mnist, "--precision fp32", "unrecognized arguments: --precision fp32"),
        (rnn_mnist, "--dataset cifar10", "error: --dataset cifar10 is not one of mnist"),
        (rnn_mnist, "--hidden-size 5 4097", "error: --hidden-size 4097 is not from 1 to 4096"),
        (rnn_mnist, "--seed 0x10", "argument --seed: invalid int value: '0x10'"),
        (visualize, "", "the following arguments are required: RUN"),
        (visualize, "runs --figures pie", "argument --figures: invalid choice: 'pie'"),
        (visualize, "no/such/folder", "no/such/folder"),
    ],
)
def test_an_unusable_command_line_ends_with_status_2_and_one_line(call, script, flags, words):
    assert_refused(call(script, *shlex.split(flags)), words)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory):
    """A run of two epochs on a little noise."""
    config = rnn_mnist.Config(cell="gru", hidden_size=8, lr=0.01)
    return train_here(rnn_mnist, tmp_path_factory.mktemp("whole"), noise_digits(320), config)


@pytest.fixture
def run(whole_run, tmp_path):
    return Path(shutil.copytree(whole_run, tmp_path / "rnn_mnist" / NOISE_NAME))


@pytest.fixture
def read(call, train_on_noise, run):
    """Continue a run, or draw a figure of it, what is named; returns (exit status, output, error)."""
    training = partial(train_on_noise, "--epochs", 3, runs_dir=run.parents[1])
    return lambda reader: training() if reader == "training" else call(visualize, run, "--figures", reader)


def flipped(content, bit):
    """Return bytes with one bit changed."""
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def with_weights_of_another(path):
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state"]["model"] = rnn_mnist.RowReader(rnn_mnist.Config(cell="gru", hidden_size=12)).state_dict()
    return checkpoint


DAMAGE = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "flipped": lambda path: path.write_bytes(flipped(path.read_bytes(), 4 * path.stat().st_size)),
    "empty": lambda path: path.write_bytes(b""),
    "pickle": lambda path: path.write_bytes(pickle.dumps(Intruder(path.with_name("intruder")))),
    "archive": lambda path: torch.save({"state": Intruder(path.with_name("intruder"))}, path),
    "list": lambda path: torch.save([1, 2, 3], path),
    "weights alone": lambda path: torch.save({"fc.bias": torch.ones(10)}, path),
    "other network": lambda path: torch.save(with_weights_of_another(path), path),
    "other project": lambda path: path.write_text('{"model_type": "bert"}'),
    "cut line": lambda path: path.write_text(",".join(utils.METRICS) + "\n1,2\n"),
}
DAMAGED, FOREIGN = "{} is damaged or not of this project", "{} is not of this version of the project"
UNFIT = "{}: the weights do not fit its settings"
ANYWHERE = ("cut off", "flipped", "empty", "pickle", "archive")


@pytest.mark.parametrize(
    ("reader", "file", "damage", "words"),
    [
        *(("training", CHECKPOINT, damage, DAMAGED) for damage in (*ANYWHERE, "list", "weights alone")),
        *(("curves", CHECKPOINT, damage, DAMAGED) for damage in (*ANYWHERE, "list", "weights alone")),
        *(("gradients", SNAPSHOT, damage, DAMAGED) for damage in ANYWHERE),
        *((reader, CHECKPOINT, "other network", UNFIT) for reader in ("training", "confusion")),
        *(("curves", CONFIG, damage, FOREIGN) for damage in ("empty", "cut off", "cut line", "other project")),
        ("training", METRICS, "cut line", "holds metrics.csv but no checkpoint.pt to continue from"),
        ("curves", METRICS, "cut line", "{} is damaged"),
    ],
)
def test_a_damaged_file_is_named_its_code_is_not_run_and_nothing_is_changed(read, run, reader, file, damage, words):
    if file == METRICS:  # which counts where no checkpoint is kept
        (run / CHECKPOINT).unlink()
    DAMAGE[damage](run / file)
    before, outcome = read_files(run), read(reader)
    assert_refused(outcome, words.format(run / file))
    assert str(run) in outcome[2]
    assert read_files(run) == before
    assert not list(run.rglob("intruder"))


@pytest.mark.parametrize("file", [CONFIG, METRICS])
@pytest.mark.parametrize("content", ["", "not what it was", '{"script": 3}', "epoch,train_loss\n1,2\n", "x" * 200_000])
def test_what_follows_from_the_checkpoint_is_written_anew_where_it_is_damaged(read, run, whole_run, file, content):
    (run / file).write_text(content)
    assert read("training")[::2] == (0, "")
    assert read_rows(run)[:2] == read_rows(whole_run)
    config, conditions = utils.read_config(run, visualize.CONFIGS)
    assert (config, conditions.epochs) == (rnn_mnist.Config(cell="gru", hidden_size=8, lr=0.01), 3)


def test_a_bit_that_changed_is_found_or_changes_nothing(tmp_path):
    """Many bits anywhere, and all of what the archive's directory says of a tensor: some bits of it say nothing."""
    path, rng = tmp_path / "tensors.pt", random.Random(0)
    tensors = {"weights": torch.arange(900.0), "history": [{"epoch": 1, "loss": 0.5}]}
    utils.save_tensors(path, tensors)
    content, refused = path.read_bytes(), 0
    name = 8 * content.rindex(b"/data/0")
    for bit in (*(rng.randrange(8 * len(content)) for _ in range(500)), *range(name - 8 * 53, name + 8 * 7)):
        path.write_bytes(flipped(content, bit))
        try:
            assert same(utils.load_tensors(path), tensors), f"bit {bit % 8} of byte {bit // 8}"
        except utils.InputError:
            refused += 1
    assert refused > 500


@pytest.mark.parametrize("flags", ["--data synthetic --runs-dir {file}", "--data real --data-dir {file}/data"])
def test_a_folder_that_cannot_be_written_is_named(train_on_noise, tmp_path, flags):
    (tmp_path / "file").write_text("mine")
    flags = shlex.split(flags.format(file=tmp_path / "file"))
    assert_refused(train_on_noise("--runs-dir", tmp_path / "runs", *flags), f"{tmp_path / 'file'}")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
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
