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
from conftest import CONFIGS, assert_refused, random_config, read_events, read_files
from tensorboard.plugins.hparams import plugin_data_pb2


@dataclass(frozen=True)
class DroppingConfig(rnn_mnist.Config):
    """What rnn_mnist.Config would be with one more line."""

    dropout: float = setting(0.0, minimum=0, maximum=0.9, help="share of the units that are silenced in training")


def longer_script(script, config_class):
    report = [utils.Reported(config_class(), 50.0)]
    return SimpleNamespace(__name__=script.__name__, Config=config_class, train=script.train, REPORT=report)


CNN, RNN = cnn_cifar10.Config, rnn_mnist.Config
LONGER_RNN = longer_script(rnn_mnist, DroppingConfig)
SCRIPTS = {"cnn": cnn_cifar10, "rnn": rnn_mnist, "longer rnn": LONGER_RNN}
EACH = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
SHARED = "--pixels --optimizer --lr --momentum --batch-size --seed --epochs --data --data-dir --runs-dir --device"
RECURRENT = "--dataset --cell --hidden-size --rows-before --rows-after --keep-bias"


@pytest.mark.parametrize(
    ("script", "own", "words"),
    [
        (cnn_cifar10, "--dataset --without --precision", "--lr FLOAT [FLOAT ...] learning rate; default: 1e-4"),
        (rnn_mnist, RECURRENT, "--hidden-size INT [INT ...] hidden units of each layer; default: 30"),
        (rnn_mnist, RECURRENT, "of its state at the start; default: as torch starts it"),
        (LONGER_RNN, f"--dropout {RECURRENT}", "units that are silenced in training; default: 0"),
    ],
)
def test_help_shows_every_flag_of_the_contract_and_its_default(call, script, own, words):
    status, output, error = call(script, "--help")
    flags = dict(re.findall(r"^  (--\S+)(.*?)(?=^  -|\Z)", output, re.DOTALL | re.MULTILINE))
    assert (status, error) == (0, "")
    assert {*flags} == {*own.split(), *SHARED.split(), "--report", "--fresh"}
    assert {flag for flag, text in flags.items() if "default:" not in text} == {"--report", "--fresh"}
    assert words in " ".join(output.split())


def test_several_values_make_the_product_without_repeats(requested):
    grid = requested(LONGER_RNN, "--dropout", 0, 0.5, 0, "--lr", "1e-3", "0.001", "--seed", 1, 2)
    assert [(config.dropout, config.seed) for config in grid] == [(0, 1), (0, 2), (0.5, 1), (0.5, 2)]
    grid = requested(cnn_cifar10, "--optimizer", "sgd", "--momentum", 0.9, 0, "--pixels", "permuted", "in-place")
    assert len(grid) == len({(config.momentum, config.pixels) for config in grid}) == 4
    assert [config.keep_bias for config in requested(rnn_mnist, "--keep-bias", 0, -1)] == [0, -1], (
        "0 is not the default"
    )


@EACH
def test_report_is_the_reports_list_for_each_seed(script, requested, call):
    assert requested(script, "--report") == [row.config for row in script.REPORT]
    seeds = requested(script, "--report", "--seed", 4, 2, 4)
    assert seeds == [replace(row.config, seed=seed) for seed in (4, 2) for row in script.REPORT]
    for flag, value in {"cnn": ("--optimizer", "adam"), "rnn": ("--keep-bias", 0)}[script.__name__[:3]], ("--lr", 1e-3):
        assert_refused(call(script, "--report", flag, value), f"--report: brings its own settings; leave out {flag}")


@EACH
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


@pytest.mark.parametrize(
    ("config", "name", "sentence"),
    [
        (CNN(seed=12), "adam_lr1e-4_seed12", "LeNet-5 on CIFAR-10, Adam, learning rate 1e-4"),
        (
            CNN(dataset="mnist", optimizer="sgd", lr=0.02, momentum=0.9),
            "mnist_sgd_lr0.02_momentum0.9_seed0",
            "LeNet-5 on MNIST, SGD, learning rate 0.02, momentum 0.9",
        ),
        (
            CNN(without="conv1+conv2", pixels="permuted", batch_size=64),
            "no-conv1+conv2_permuted_adam_lr1e-4_batch64_seed0",
            "LeNet-5 on CIFAR-10, without conv1+conv2, pixels permuted, Adam, learning rate 1e-4, batch 64",
        ),
        (RNN(), "rnn30_adam_lr1e-3_seed0", "RNN, 30 hidden units, Adam, learning rate 1e-3"),
        (
            RNN(cell="lstm", rows_after=28, keep_bias=0.0),
            "lstm30_after28_keep0_adam_lr1e-3_seed0",
            "LSTM, 30 hidden units, 28 blank rows after, keep bias 0, Adam, learning rate 1e-3",
        ),
        (DroppingConfig(), RNN().name, RNN().sentence()),
        (
            DroppingConfig(dropout=0.5),
            "rnn30_dropout0.5_adam_lr1e-3_seed0",
            "RNN, 30 hidden units, dropout 0.5, Adam, learning rate 1e-3",
        ),
    ],
)
def test_names_and_sentences_say_what_distinguishes_an_experiment_first_and_leave_defaults_out(config, name, sentence):
    assert (config.name, config.sentence()) == (name, sentence)
    assert ", ".join(config.words().values()) == f"{sentence}, seed {config.seed}"
    assert replace(config, seed=7).group == replace(config, seed=0)


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist])
def test_the_first_30_characters_tell_the_reports_runs_apart(script):
    names = [replace(row.config, seed=seed).name for row in script.REPORT for seed in range(10)]
    assert len({name[:30] for name in names}) == len(names)


@EACH
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
    texts = [utils.number_text(value) for value in (1e-3, 0.02, 0.5, 1.0, 128, -2.0, 1.25e-5)]
    assert texts == ["1e-3", "0.02", "0.5", "1", "128", "-2", "1.25e-5"]


@pytest.mark.parametrize("config_class", [CNN, RNN, DroppingConfig])
def test_a_setting_may_be_what_its_declaration_allows_and_nothing_else(config_class):
    for one in config_class.known_settings():
        needed, ends = {"optimizer": "sgd"} if one.name == "momentum" else {}, (one.minimum, one.maximum)
        for value in one.choices or ends:
            assert getattr(config_class(**{one.name: value}, **needed), one.name) == value
        step = 1 if one.type is int else 1e-13
        for value in ["else"] if one.choices else [ends[0] - step, ends[1] * 1.1 + step, float("nan")]:
            with pytest.raises(utils.InputError, match=rf"^{one.flag} \S+ is not "):
                config_class(**{one.name: value}, **needed)
    with pytest.raises(utils.InputError, match=r"^--momentum 0.9 needs --optimizer sgd"):
        config_class(momentum=0.9)


def write_config(folder, config, but=()):
    """Write a config.json as a run does, but for some settings."""
    settings = {name: value for name, value in asdict(config).items() if name not in but}
    values = {"script": config.script, "settings": settings, "conditions": {"epochs": 3, "device": "cpu"}}
    (folder / "config.json").write_text(json.dumps(values))


@EACH
def test_a_config_that_is_written_is_read_back(script, tmp_path):
    rng = random.Random(1)
    for config in [script.Config(), *(random_config(rng, script.Config) for _ in range(20))]:
        write_config(tmp_path, config)
        read = utils.read_config(tmp_path, {script.__name__: script.Config})
        assert read == (config, SimpleNamespace(epochs=3, device="cpu"))


def test_a_run_that_is_older_than_a_setting_has_its_default(tmp_path):
    write_config(tmp_path, RNN(cell="gru", seed=3))
    assert utils.read_config(tmp_path, {"rnn_mnist": DroppingConfig})[0] == DroppingConfig(cell="gru", seed=3)
    write_config(tmp_path, CNN(seed=3), but=("dataset", "pixels"))
    assert utils.read_config(tmp_path, CONFIGS)[0] == CNN(seed=3)


RNN_WITH = '{"script": "rnn_mnist", "settings": {%s}, "conditions": {}}'


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        (b"", "is not of this version of the project"),
        (b"\xff\xfe{", "is not of this version of the project"),
        (b'{"hidden_size": 768}', r"is not of this version of the project \('script'\)"),
        (b'{"script": "gan", "settings": {}, "conditions": {}}', r"is not of this version of the project \('gan'\)"),
        (RNN_WITH.encode() % b'"dropout": 0.5', "is not of this version of the project .*'dropout'"),
        (RNN_WITH.encode() % b'"cell": "elman"', "--cell elman is not one of rnn"),
        (RNN_WITH.encode() % b'"lr": "fast"', "is not of this version of the project"),
    ],
)
def test_a_config_of_another_project_or_version_is_named(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(utils.InputError, match=f"^{tmp_path / 'config.json'}.*{words}"):
        utils.read_config(tmp_path, CONFIGS)


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
    newer = older.with_name("synthetic_rnn8_dropout0.5_adam_lr1e-3_seed0")
    assert utils.read_config(newer, {"rnn_mnist": DroppingConfig})[0] == DroppingConfig(hidden_size=8, dropout=0.5)
    content = read_events(newer).summary_metadata["_hparams_/session_start_info"].plugin_data.content
    shown = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert shown["dropout"].number_value == 0.5
    words = ["RNN, 8 hidden units, Adam, learning rate", "RNN, 8 hidden units, dropout 0.5, Adam, learning rate"]
    assert re.findall(r"^\| (RNN.*?) 1e-3, synthetic data ", output, re.M) == words
