"""A setting is declared once, in a script's Config, and found wherever settings are read, shown or checked."""

import json
import random
import re
from dataclasses import asdict, dataclass, fields, replace
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils
from utils import setting

import pytest
from conftest import CONFIGS, assert_refused, random_config, read_files
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2


@dataclass(frozen=True)
class DroppingConfig(rnn_mnist.Config):
    """What rnn_mnist.Config would be with one more line."""

    __module__ = rnn_mnist.__name__

    dropout: float = setting(0.0, minimum=0, below=1, help="share of the units that are silenced in training")


@dataclass(frozen=True)
class ScheduledConfig(cnn_cifar10.Config):
    """What cnn_cifar10.Config would be with one more line; sentences do not say its setting."""

    __module__ = cnn_cifar10.__name__

    schedule: str = setting("constant", choices=("constant", "cosine"), words="", help="of the learning rate")


def longer_script(script, config_class):
    report = [row._replace(config=config_class(**asdict(row.config))) for row in script.REPORT]
    return SimpleNamespace(__name__=script.__name__, Config=config_class, train=script.train, REPORT=report)


LONGER_RNN = longer_script(rnn_mnist, DroppingConfig)
LONGER_CNN = longer_script(cnn_cifar10, ScheduledConfig)
LONGER = [(LONGER_RNN, {"dropout": 0.5}), (LONGER_CNN, {"schedule": "cosine"})]
ONE_SETTING_MORE = pytest.mark.parametrize(("script", "change"), LONGER, ids=["rnn", "cnn"])

# One setting more


@pytest.mark.parametrize(
    ("script", "flag", "text"),
    [
        (LONGER_RNN, "--dropout FLOAT", "share of the units that are silenced in training; default: 0"),
        (LONGER_CNN, "--schedule {constant,cosine}", "of the learning rate; default: constant"),
    ],
)
def test_a_new_setting_has_a_flag_with_its_help_and_default(call, script, flag, text):
    status, output, _ = call(script, "--help")
    assert status == 0
    values = re.escape(flag.split()[1])
    assert re.search(rf"^  {flag.split()[0]} {values} \[{values} \.\.\.\] {re.escape(text)}", squeezed(output), re.M)


def squeezed(text):
    """Return text with what belongs to a flag on one line."""
    return re.sub(r"\n? {3,}", " ", text)


@pytest.mark.parametrize(
    ("script", "flags", "words"),
    [
        (LONGER_RNN, ("--dropout", "1"), "argument --dropout: '1' is not a number from 0 to below 1"),
        (LONGER_RNN, ("--dropout", "0.1", "half"), "argument --dropout: 'half' is not a number from 0 to below 1"),
        (LONGER_RNN, ("--dropuot", "0.1"), "did you mean --dropout?"),
        (LONGER_RNN, ("--report", "--dropout", "0.1"), "leave out --dropout"),
        (LONGER_CNN, ("--schedule", "linear"), "argument --schedule: 'linear' is not one of constant, cosine"),
    ],
)
def test_a_new_settings_flag_is_checked(call, script, flags, words):
    assert_refused(call(script, *flags), words)


def test_a_new_setting_is_in_the_grid(requested):
    grid = requested(LONGER_RNN, "--dropout", 0, 0.5, 0, "--seed", 1, 2)
    assert [(config.dropout, config.seed) for config in grid] == [(0, 1), (0, 2), (0.5, 1), (0.5, 2)]
    assert [config.schedule for config in requested(LONGER_CNN)] == ["constant"]
    assert requested(LONGER_RNN, "--report") == [row.config for row in LONGER_RNN.REPORT]


@ONE_SETTING_MORE
def test_a_new_setting_renames_no_run_and_is_in_the_name_of_those_that_differ(script, change):
    own = CONFIGS[script.__name__]
    for row in script.REPORT:
        known = {field.name: getattr(row.config, field.name) for field in fields(own)}
        assert row.config.name == own(**known).name
    [(name, value)] = change.items()
    assert script.Config().name == own().name
    assert script.Config(**change).name.replace(f"{name}{value}_", "") == own().name != script.Config(**change).name


def test_a_new_setting_is_in_the_sentence_unless_it_says_that_it_is_not():
    assert DroppingConfig(dropout=0.5).words() == rnn_mnist.Config().words().replace(", Adam", ", dropout 0.5, Adam")
    assert DroppingConfig().words() == rnn_mnist.Config().words()
    assert ScheduledConfig(schedule="cosine").words() == cnn_cifar10.Config().words()


@ONE_SETTING_MORE
def test_runs_that_differ_in_a_new_setting_alone_are_not_grouped_together(script, change):
    configs = [script.Config(seed=seed, **each) for seed in (0, 1) for each in ({}, change)]
    runs = [SimpleNamespace(config=each, record=utils.Record(each, utils.Conditions())) for each in configs]
    groups = [[(run.config.setting(), run.config.seed) for run in group] for group in utils.group_by_setting(runs)]
    assert groups == [[(script.Config(**each), seed) for seed in (0, 1)] for each in ({}, change)]


@ONE_SETTING_MORE
def test_a_record_is_checked_for_a_new_setting_and_an_older_one_has_its_default(script, change, tmp_path):
    configs, path = {script.__name__: script.Config}, tmp_path / "config.json"
    record = utils.Record(script.Config(seed=3, **change), utils.Conditions()).as_dict()
    path.write_text(json.dumps(record))
    assert utils.read_record(tmp_path, configs).config == script.Config(seed=3, **change)
    for wrong in (2.0, "linear", None, ["cosine"]):
        path.write_text(json.dumps({**record, "settings": {**record["settings"], next(iter(change)): wrong}}))
        with pytest.raises(utils.InputError, match=rf"config.json is not of this project \({next(iter(change))} is "):
            utils.read_record(tmp_path, configs)
    older = utils.Record(CONFIGS[script.__name__](seed=3), utils.Conditions()).as_dict()
    assert next(iter(change)) not in older["settings"]
    path.write_text(json.dumps(older))
    assert utils.read_record(tmp_path, configs).config == script.Config(seed=3)


def hyperparameters_of(folder):
    content = EventAccumulator(str(folder)).Reload().summary_metadata["_hparams_/session_start_info"]
    shown = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in shown.items()}


@pytest.mark.parametrize(
    ("script", "change", "flags"),
    [(*LONGER[0], ("--hidden-size", 8)), (*LONGER[1], ("--without", "fc1"))],
    ids=["rnn", "cnn"],
)
def test_a_new_setting_trains_nothing_again_and_is_written_down(script, change, flags, call, tiny_data, tmp_path):
    own = {"rnn_mnist": rnn_mnist, "cnn_cifar10": cnn_cifar10}[script.__name__]
    flags = (*flags, "--data", "synthetic", "--epochs", 1, "--runs-dir", tmp_path)
    assert call(own, *flags)[0] == 0
    older = next((tmp_path / script.__name__).iterdir())
    before = read_files(older)
    [(name, value)] = change.items()
    status, output, error = call(script, *flags, f"--{name}", getattr(script.Config(), name), value)
    assert (status, error) == (0, "")
    assert f"{older}: complete with 1 epochs" in output
    assert read_files(older) == before
    newer = next(path for path in older.parent.iterdir() if path != older)
    configs = {script.__name__: script.Config}
    assert utils.read_record(newer, configs).config == replace(utils.read_record(older, configs).config, **change)
    assert utils.read_checkpoint(newer, configs)["record"] == utils.read_record(newer, configs)
    assert hyperparameters_of(newer)[name] == value
    table = output.split("\nTest accuracy in % after epoch 1: ")[1].split("\nNOTE")[0].splitlines()
    assert len(table) == 1 + 3


# Names


def test_names_show_what_distinguishes_runs_first():
    assert rnn_mnist.Config(cell="gru").name == "gru30_adam_lr1e-3_seed0"
    assert cnn_cifar10.Config().name == "adam_lr1e-4_seed0"
    assert cnn_cifar10.Config(dataset="mnist").name == "mnist_adam_lr1e-4_seed0"
    assert cnn_cifar10.Config(optimizer="sgd", lr=0.02, momentum=0.9).name == "sgd_lr0.02_momentum0.9_seed0"
    assert rnn_mnist.Config(batch_size=128, seed=12).name == "rnn30_adam_lr1e-3_batch128_seed12"
    folder = utils.run_folder("runs", rnn_mnist.Config(), "synthetic")
    assert folder.parts == ("runs", "rnn_mnist", "synthetic_rnn30_adam_lr1e-3_seed0")
    assert utils.run_folder("runs", rnn_mnist.Config(), "real").name == "rnn30_adam_lr1e-3_seed0"


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist])
def test_names_of_the_reports_runs_are_short(script):
    assert max(len(replace(row.config, seed=seed).name) for row in script.REPORT for seed in range(10)) <= 32


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist, LONGER_RNN, LONGER_CNN])
def test_a_name_is_that_of_one_experiment_alone(script):
    """Also where capital and small letters are one, and as the name of a folder anywhere."""
    rng, known = random.Random(0), {}
    for _ in range(3000):
        config = random_config(rng, script.Config, {} if rng.random() < 0.5 else {"hidden_size": 12, "batch_size": 12})
        assert known.setdefault(config.name.lower(), config) == config
        assert re.fullmatch(r"[a-zA-Z0-9_.+-]{1,200}", config.name)
    assert len(known) > 1000


def test_a_number_in_a_name_stands_for_one_value():
    rng = random.Random(0)
    for value in [0.0, 1.0, 0.1, 1e-3, 1e-4, 9999.5, 1e4, 5e-324, *(10 ** rng.uniform(-300, 300) for _ in range(2000))]:
        assert float(utils.number_text(value)) == value
    assert [utils.number_text(value) for value in (1e-3, 0.02, 128, 0.5, 1e-4)] == [
        "1e-3",
        "0.02",
        "128",
        "0.5",
        "1e-4",
    ]


# What a setting may be


@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 0.0},
        {"lr": 1},
        {"momentum": 0.9},
        {"optimizer": "sgd", "momentum": 1.0},
        {"batch_size": 0},
        {"batch_size": 64.0},
        {"seed": -1},
        {"seed": True},
        {"optimizer": "Adam"},
    ],
)
@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist])
def test_no_experiment_can_have_a_setting_that_the_command_line_would_refuse(script, settings):
    with pytest.raises(ValueError, match=f"^{list(settings)[-1]} is "):
        script.Config(**settings)


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist])
def test_every_setting_has_help_and_a_default_that_it_may_have(script):
    for one in utils.settings_of(script.Config):
        assert one.help
        one.check(one.default)
        assert one.flag in (flag for action in parser_actions(script) for flag in action.option_strings)


@pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist])
def test_the_command_that_trains_an_experiment_asks_for_it_alone(script, monkeypatch):
    """Also with a negative bias, which argparse takes for a flag where a space stands before it."""
    rng = random.Random(4)
    configs = [random_config(rng, script.Config) for _ in range(50)]
    configs += [rnn_mnist.Config(cell="lstm", keep_bias=-1e-3)] if script is rnn_mnist else []
    for config in configs:
        name, *flags = config.command().removeprefix("python ").split()
        monkeypatch.setattr("sys.argv", [name, *flags])
        parser = utils.experiment_parser(script.Config, "")
        assert (name, utils.parse_experiments(script.Config, [], parser)[1]) == (f"{script.__name__}.py", [config])


def parser_actions(script):
    return utils.experiment_parser(script.Config, "")._actions
