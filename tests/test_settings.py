"""A setting is declared once, in a script's Config, and found wherever settings are read, named, told or checked."""

import json
import random
import re
import shlex
from dataclasses import asdict, dataclass, replace
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils
from utils import setting

import pytest
from conftest import CONFIGS, ROOT, assert_refused, random_config, read_events, read_files
from tensorboard.plugins.hparams import plugin_data_pb2

BOTH = pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist], ids=["cnn", "rnn"])
SHARED = "--pixels --optimizer --lr --momentum --batch-size --seed"
SHARED += " --epochs --data --data-dir --runs-dir --device --report --fresh"


@dataclass(frozen=True)
class DroppingConfig(rnn_mnist.Config):
    """What rnn_mnist.Config would be with one more line."""

    dropout: float = setting(0.0, minimum=0, maximum=0.9, help="share of the units that are silenced in training")


@dataclass(frozen=True)
class ScheduledConfig(cnn_cifar10.Config):
    """What cnn_cifar10.Config would be with one more line; sentences do not say its setting."""

    schedule: str = setting("constant", choices=("constant", "cosine"), words="", help="of the learning rate")


def longer_script(script, config_class):
    return SimpleNamespace(
        __name__=script.__name__, Config=config_class, train=script.train, REPORT=[utils.Reported(config_class(), 50.0)]
    )


LONGER_RNN, LONGER_CNN = longer_script(rnn_mnist, DroppingConfig), longer_script(cnn_cifar10, ScheduledConfig)


# Flags


@pytest.mark.parametrize(
    ("script", "own"),
    [
        (cnn_cifar10, "--dataset --without --precision"),
        (rnn_mnist, "--dataset --cell --hidden-size --rows-before --rows-after --keep-bias"),
        (LONGER_CNN, "--dataset --without --precision --schedule"),
        (LONGER_RNN, "--dataset --cell --hidden-size --rows-before --rows-after --keep-bias --dropout"),
    ],
)
def test_help_shows_every_flag_of_the_contract_and_its_default(call, script, own):
    status, output, error = call(script, "--help")
    flags = dict(re.findall(r"^  (--\S+)(.*?)(?=^  -|\Z)", output, re.DOTALL | re.MULTILINE))
    assert (status, error) == (0, "")
    assert {*flags} == {*own.split(), *SHARED.split()}
    assert {flag for flag, text in flags.items() if "default:" not in text} == {"--report", "--fresh"}


@pytest.mark.parametrize(
    ("script", "words"),
    [
        (cnn_cifar10, "--lr FLOAT [FLOAT ...] learning rate; default: 1e-4"),
        (cnn_cifar10, "--dataset {cifar10,mnist} [{cifar10,mnist} ...] what the network classifies; default: cifar10"),
        (rnn_mnist, "--hidden-size INT [INT ...] hidden units of each layer; default: 30"),
        (rnn_mnist, "of its state at the start; default: as torch starts it"),
        (LONGER_RNN, "--dropout FLOAT [FLOAT ...] share of the units that are silenced in training; default: 0"),
        (LONGER_CNN, "--schedule {constant,cosine} [{constant,cosine} ...] of the learning rate; default: constant"),
    ],
)
def test_a_flags_help_is_its_settings(call, script, words):
    assert words in " ".join(call(script, "--help")[1].split())


# The grid


def test_several_values_make_the_product_without_repeats(requested):
    grid = requested(LONGER_RNN, "--dropout", 0, 0.5, 0, "--lr", "1e-3", "0.001", "--seed", 1, 2)
    assert [(config.dropout, config.seed) for config in grid] == [(0, 1), (0, 2), (0.5, 1), (0.5, 2)]
    assert requested(LONGER_CNN) == [ScheduledConfig()]
    grid = requested(cnn_cifar10, "--optimizer", "sgd", "--momentum", 0.9, 0, "--pixels", "permuted", "in-place")
    assert {(config.momentum, config.pixels) for config in grid} == {
        *((0.9, "permuted"), (0.9, "in-place"), (0, "permuted"), (0, "in-place"))
    }
    assert len(grid) == 4
    assert [config.keep_bias for config in requested(rnn_mnist, "--keep-bias", 0, -1)] == [0, -1], (
        "0 is not the default"
    )


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist, LONGER_CNN], ids=["cnn", "rnn", "longer"])
def test_report_is_the_reports_list_for_each_seed(script, requested):
    assert requested(script, "--report") == [row.config for row in script.REPORT]
    seeds = requested(script, "--report", "--seed", 4, 2, 4)
    assert seeds == [replace(row.config, seed=seed) for seed in (4, 2) for row in script.REPORT]


@pytest.mark.parametrize(
    ("script", "flags", "own"),
    [
        (cnn_cifar10, "--optimizer sgd", "--optimizer"),
        (rnn_mnist, "--keep-bias 0", "--keep-bias"),
        (LONGER_RNN, "--seed 1 --dropout 0.1", "--dropout"),
    ],
)
def test_report_brings_its_own_settings(call, script, flags, own):
    assert_refused(
        call(script, "--report", *flags.split()), f"argument --report: brings its own settings; leave out {own}"
    )


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist, LONGER_RNN, LONGER_CNN])
def test_the_command_that_trains_an_experiment_asks_for_it_alone(script, monkeypatch):
    """Also with a negative bias, which argparse takes for a flag where a space stands before it."""
    rng = random.Random(4)
    configs = [script.Config(), *(random_config(rng, script.Config) for _ in range(50))]
    configs += [script.Config(cell="lstm", keep_bias=-1e-3)] if "rnn" in script.__name__ else []
    for config in configs:
        python, name, *flags = shlex.split(config.command("--data", "synthetic"))
        monkeypatch.setattr("sys.argv", [name, *flags])
        args, asked = utils.parse_experiments(script.Config, [], utils.experiment_parser(script.Config, ""))
        assert (python, name.rpartition("/")[2], args.data) == ("python", f"{script.__name__}.py", "synthetic")
        assert asked == [config]


# Names and words


CNN, RNN = cnn_cifar10.Config, rnn_mnist.Config
TOLD = [
    (CNN(), "adam_lr1e-4_seed0", "LeNet-5 on CIFAR-10, Adam, learning rate 1e-4"),
    (CNN(dataset="mnist", seed=12), "mnist_adam_lr1e-4_seed12", "LeNet-5 on MNIST, Adam, learning rate 1e-4"),
    (
        CNN(optimizer="sgd", lr=0.02, momentum=0.9),
        "sgd_lr0.02_momentum0.9_seed0",
        "LeNet-5 on CIFAR-10, SGD, learning rate 0.02, momentum 0.9",
    ),
    (
        CNN(without="conv1+conv2", pixels="permuted", batch_size=64),
        "no-conv1+conv2_permuted_adam_lr1e-4_batch64_seed0",
        "LeNet-5 on CIFAR-10, without conv1+conv2, pixels permuted, Adam, learning rate 1e-4, batch 64",
    ),
    (RNN(), "rnn30_adam_lr1e-3_seed0", "RNN, 30 hidden units, Adam, learning rate 1e-3"),
    (
        RNN(cell="lstm", rows_after=28, keep_bias=-1.5),
        "lstm30_after28_keep-1.5_adam_lr1e-3_seed0",
        "LSTM, 30 hidden units, 28 blank rows after, keep bias -1.5, Adam, learning rate 1e-3",
    ),
    (
        RNN(cell="gru", hidden_size=5, rows_before=3, keep_bias=0.0),
        "gru5_before3_keep0_adam_lr1e-3_seed0",
        "GRU, 5 hidden units, 3 blank rows before, keep bias 0, Adam, learning rate 1e-3",
    ),
    (
        DroppingConfig(dropout=0.5),
        "rnn30_dropout0.5_adam_lr1e-3_seed0",
        "RNN, 30 hidden units, dropout 0.5, Adam, learning rate 1e-3",
    ),
    (DroppingConfig(), RNN().name, RNN().sentence()),
    (ScheduledConfig(schedule="cosine"), "schedulecosine_adam_lr1e-4_seed0", CNN().sentence()),
]


@pytest.mark.parametrize(("config", "name", "sentence"), TOLD, ids=[name for _, name, _ in TOLD])
def test_names_and_sentences_say_what_distinguishes_an_experiment_first_and_leave_defaults_out(config, name, sentence):
    assert (config.name, config.sentence()) == (name, sentence)
    assert ", ".join(config.words().values()) == f"{sentence}, seed {config.seed}"
    assert (replace(config, seed=7).group, replace(config, seed=7).sentence()) == (config.group, sentence)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("keep_bias", None, "keep bias as torch starts it"),
        ("momentum", 0.0, "momentum 0"),
        ("pixels", "in-place", "pixels in-place"),
        ("rows_after", 0, "0 blank rows after"),
        ("optimizer", "sgd", "SGD"),
        ("dataset", "mnist", "on MNIST"),
    ],
)
def test_a_default_has_words_too(name, value, words):
    assert {one.name: one for one in RNN.known_settings()}[name].in_words(value) == words


@BOTH
def test_the_first_30_characters_tell_the_reports_runs_apart(script):
    names = [replace(row.config, seed=seed).name for row in script.REPORT for seed in range(10)]
    assert len({name[:30] for name in names}) == len(names)


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist, LONGER_RNN, LONGER_CNN])
def test_a_name_is_that_of_one_experiment_alone(script):
    """Also where capital and small letters are one, and as the name of a folder anywhere."""
    rng, known = random.Random(0), {}
    few = dict.fromkeys(("hidden_size", "batch_size", "rows_before", "rows_after", "seed"), 12)
    for number in range(2000):
        config = random_config(rng, script.Config, few if number % 2 else None)
        assert known.setdefault(config.name.lower(), config) == config
        assert re.fullmatch(r"[a-zA-Z0-9_.+-]{1,200}", config.name)
    assert len(known) > 1000


def test_a_number_in_a_name_stands_for_one_value():
    rng = random.Random(0)
    for value in (0.0, 0.1, 9999.5, 1e4, -0.25, 5e-324, *(10 ** rng.uniform(-300, 300) for _ in range(2000))):
        assert float(utils.number_text(value)) == value
    texts = [utils.number_text(value) for value in (1e-3, 1e-4, 0.02, 0.5, 1.0, 128, -2.0, 1e12, 1.25e-5)]
    assert texts == ["1e-3", "1e-4", "0.02", "0.5", "1", "128", "-2", "1e+12", "1.25e-5"]


# What a setting may be


@pytest.mark.parametrize(
    ("config_class", "settings", "flag"),
    [
        (CNN, {"lr": 0.0}, "--lr 0"),
        (CNN, {"lr": float("nan")}, "--lr nan"),
        (CNN, {"momentum": 0.9}, "--momentum 0.9 needs --optimizer sgd"),
        (CNN, {"optimizer": "sgd", "momentum": 1.01}, "--momentum 1.01"),
        (CNN, {"optimizer": "Adam"}, "--optimizer Adam is not one of adam, sgd"),
        (CNN, {"batch_size": 0}, "--batch-size 0"),
        (CNN, {"without": "fc2"}, "--without fc2 is not one of nothing, conv1, "),
        (RNN, {"seed": -1}, "--seed -1"),
        (RNN, {"dataset": "cifar10"}, "--dataset cifar10 is not one of mnist"),
        (RNN, {"hidden_size": 4097}, "--hidden-size 4097 is not from 1 to 4096"),
        (RNN, {"rows_after": -1}, "--rows-after -1 is not from 0 to 1000"),
        (RNN, {"keep_bias": float("inf")}, "--keep-bias inf"),
        (DroppingConfig, {"dropout": 1.0}, "--dropout 1"),
        (ScheduledConfig, {"schedule": "linear"}, "--schedule linear is not one of constant, cosine"),
    ],
)
def test_no_experiment_can_have_a_setting_that_it_must_not_have(config_class, settings, flag):
    with pytest.raises(utils.InputError, match=f"^{re.escape(flag)}"):
        config_class(**settings)


@pytest.mark.parametrize("config_class", [CNN, RNN, DroppingConfig, ScheduledConfig])
def test_a_setting_may_be_all_that_its_declaration_allows(config_class):
    for one in config_class.known_settings():
        needed = {"optimizer": "sgd"} if one.name == "momentum" else {}
        for value in one.choices or (one.minimum, one.maximum):
            assert getattr(config_class(**{one.name: value}, **needed), one.name) == value


# config.json


def write_config(folder, config, **changes):
    """Write a config.json as a run does; changes: to its settings, None: without it."""
    settings = {name: value for name, value in (asdict(config) | changes).items() if value != "left out"}
    text = json.dumps({"script": config.script, "settings": settings, "conditions": {"epochs": 3, "device": "cpu"}})
    (folder / "config.json").write_text(text)


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist, LONGER_RNN, LONGER_CNN])
def test_a_config_that_is_written_is_read_back(script, tmp_path):
    rng = random.Random(1)
    for config in [script.Config(), *(random_config(rng, script.Config) for _ in range(20))]:
        write_config(tmp_path, config)
        read, conditions = utils.read_config(tmp_path, {script.__name__: script.Config})
        assert (read, conditions) == (config, SimpleNamespace(epochs=3, device="cpu"))


def test_a_run_that_is_older_than_a_setting_has_its_default(tmp_path):
    write_config(tmp_path, RNN(cell="gru", seed=3))
    assert utils.read_config(tmp_path, {"rnn_mnist": DroppingConfig})[0] == DroppingConfig(cell="gru", seed=3)
    write_config(tmp_path, CNN(seed=3), dataset="left out", pixels="left out")
    assert utils.read_config(tmp_path, CONFIGS)[0] == CNN(seed=3)


@pytest.mark.parametrize("script", [cnn_cifar10.Config.script, rnn_mnist.Config.script])
def test_a_shipped_run_lies_in_the_folder_of_its_settings(script):
    folders = [path.parent for path in (ROOT / "runs" / "reference" / script).glob("*/config.json")]
    read = [utils.read_config(folder, CONFIGS) for folder in folders]
    assert [config.name for config, _ in read] == [folder.name for folder in folders]
    assert {conditions.data_source for _, conditions in read} == {"real"}
    assert len(folders) >= 45


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        ("", "is not of this version of the project"),
        ("epoch,train_loss\n1,2\n", "is not of this version of the project"),
        ("\udcff\udcfe{", "is not of this version of the project"),
        ("[1, 2]", "is not of this version of the project"),
        ('{"hidden_size": 768, "vocab_size": 30522}', r"is not of this version of the project \('script'\)"),
        ('{"script": "gan", "settings": {}, "conditions": {}}', r"is not of this version of the project \('gan'\)"),
        ('{"script": "rnn_mnist", "settings": {"dropout": 0.5}, "conditions": {}}', "'dropout'"),
        ('{"script": "rnn_mnist", "settings": {"cell": "elman"}, "conditions": {}}', "--cell elman is not one of rnn"),
        ('{"script": "rnn_mnist", "settings": {"lr": "fast"}, "conditions": {}}', "is not of this version"),
        ('{"script": "rnn_mnist", "settings": {}}', r"\('conditions'\)"),
    ],
)
def test_a_config_of_another_project_or_version_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(utils.InputError, match=words) as refused:
        utils.read_config(tmp_path, CONFIGS)
    assert str(refused.value).startswith(str(tmp_path / "config.json"))


# One setting more, from the flag to TensorBoard


def hyperparameters_of(folder):
    content = read_events(folder).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}


@pytest.mark.usefixtures("tiny_data")
def test_a_new_setting_trains_nothing_again_and_is_written_down(call, tmp_path):
    flags = "--hidden-size", 8, "--data", "synthetic", "--epochs", 1, "--runs-dir", tmp_path
    assert call(rnn_mnist, *flags)[0] == 0
    [older] = (tmp_path / "rnn_mnist").iterdir()
    before = read_files(older)
    status, output, error = call(LONGER_RNN, *flags, "--dropout", 0, 0.5)
    assert (status, error) == (0, "")
    assert f"{older}: complete after epoch 1" in output
    assert read_files(older) == before
    [newer] = (path for path in older.parent.iterdir() if path != older)
    assert newer.name == "synthetic_rnn8_dropout0.5_adam_lr1e-3_seed0"
    assert utils.read_config(newer, {"rnn_mnist": DroppingConfig})[0] == DroppingConfig(hidden_size=8, dropout=0.5)
    assert hyperparameters_of(newer)["dropout"] == 0.5
    table = output.split("\nTest accuracy in % after epoch 1\n")[1].split("\n\n")[0]
    assert [line.split(" | ")[0] for line in table.splitlines()[2:4]] == [
        "| RNN, 8 hidden units, Adam, learning rate 1e-3, synthetic data             ",
        "| RNN, 8 hidden units, dropout 0.5, Adam, learning rate 1e-3, synthetic data",
    ]
