"""Settings: from one field of a script's Config follow the flag, the grid, names, captions and config.json."""

import json
import random
import re
import shlex
from dataclasses import dataclass, replace
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from utils import setting
from visualize import SavedRun

import pytest
from conftest import assert_refused, read_files


@dataclass(frozen=True)
class DropoutConfig(rnn_mnist.Config):
    """What rnn_mnist.Config would be with one more line."""

    dropout: float = setting(0.0, minimum=0, maximum=0.9, help="share of the units that are dropped in training")


CNN = cnn_cifar10.Config
RNN = rnn_mnist.Config
REPORT = [utils.ReportedResult(DropoutConfig(), 50.0)]
LONGER_RNN = SimpleNamespace(__name__="rnn_mnist", Config=DropoutConfig, train=rnn_mnist.train, REPORT=REPORT)
each_script = pytest.mark.parametrize("script", [cnn_cifar10, rnn_mnist, LONGER_RNN], ids=["cnn", "rnn", "longer_rnn"])
each_config = pytest.mark.parametrize("config_class", [CNN, RNN, DropoutConfig])
RNN_RECORD = b'{"script": "rnn_mnist", "settings": {%s}, "conditions": {}}'


def random_config(rng, config_class, largest=None):
    """Return a valid Config at random; largest: smaller limits than the usual ones for whole numbers, by setting."""
    values = {}
    for spec in config_class.specs():
        if rng.random() < 0.3:
            values[spec.name] = spec.default
        elif spec.choices:
            values[spec.name] = rng.choice(list(spec.choices))
        elif spec.type is int:
            values[spec.name] = rng.randint(spec.minimum, (largest or {}).get(spec.name, spec.maximum))
        elif spec.name == "lr":
            values[spec.name] = 10 ** rng.uniform(-6, -2)
        else:
            values[spec.name] = rng.uniform(max(spec.minimum, -10), min(spec.maximum, 10))
    if values["optimizer"] == "adam":
        values["momentum"] = 0.0
    if values.get("cell") == "rnn":
        values["gates"] = "full"
    return config_class(**values)


def test_several_values_make_every_combination_once(requested):
    grid = requested(LONGER_RNN, "--dropout", 0, 0.5, 0, "--lr", "1e-3", "0.001", "--seed", 1, 2)
    assert [(config.dropout, config.seed) for config in grid] == [(0, 1), (0, 2), (0.5, 1), (0.5, 2)]
    grid = requested(cnn_cifar10, "--optimizer", "sgd", "--momentum", 0.9, 0, "--pixels", "permuted", "in-place")
    assert len(grid) == len({(config.momentum, config.pixels) for config in grid}) == 4
    biases = [config.keep_bias for config in requested(rnn_mnist, "--keep-bias", 0, -1)]
    assert biases == [0, -1], "0 is not the default"


@each_script
def test_report_asks_for_the_reported_experiments_for_each_seed(script, requested, call):
    assert requested(script, "--report") == [reported.config for reported in script.REPORT]
    expected = []
    for seed in (4, 2):
        expected += [replace(reported.config, seed=seed) for reported in script.REPORT]
    assert requested(script, "--report", "--seed", 4, 2, 4) == expected
    own_flag = ("--without", "fc1") if script is cnn_cifar10 else ("--keep-bias", 0)
    for flag, value in (own_flag, ("--lr", 1e-3)):
        assert_refused(call(script, "--report", flag, value), f"--report cannot be combined with {flag}")


@each_script
def test_the_command_of_a_run_asks_for_its_experiment_alone(script, requested, tmp_path, monkeypatch):
    """Also with a negative bias, which argparse takes for a flag if a space precedes it."""
    monkeypatch.setitem(visualize.CONFIGS, script.__name__, script.Config)
    rng = random.Random(4)
    configs = [script.Config(), *(random_config(rng, script.Config) for _ in range(50))]
    if script is not cnn_cifar10:
        configs.append(script.Config(cell="lstm", keep_bias=-1e-3))
    for config in configs:
        record = {"script": config.script, "settings": vars(config), "conditions": {"data_source": "synthetic"}}
        (tmp_path / "config.json").write_text(json.dumps(record))
        python, path, *flags = shlex.split(SavedRun(tmp_path).command)
        assert (python, path.rpartition("/")[2]) == ("python", f"{script.__name__}.py")
        assert flags[-1] == "--data=synthetic"
        assert requested(script, *flags) == [config]


@pytest.mark.parametrize(
    ("config", "name", "caption"),
    [
        (CNN(seed=12), "adam_lr1e-3_seed12", "LeNet-5 on CIFAR-10, Adam, learning rate 1e-3"),
        (CNN(without="fc1"), "no-fc1_adam_lr1e-3_seed0", "LeNet-5 on CIFAR-10, without fc1, Adam, learning rate 1e-3"),
        (
            CNN(dataset="mnist", pixels="permuted", optimizer="sgd", lr=1.25e-5, momentum=0.9, batch_size=64),
            "mnist_permuted_sgd_lr1.25e-5_momentum0.9_batch64_seed0",
            "LeNet-5 on MNIST, pixels permuted, SGD, learning rate 1.25e-5, momentum 0.9, batch 64",
        ),
        (RNN(), "rnn30_adam_lr1e-3_seed0", "RNN, 30 hidden units, Adam, learning rate 1e-3"),
        (
            RNN(cell="lstm", rows_after=28, keep_bias=0.0, gates="constant"),
            "lstm30_after28_keep0_gates-constant_adam_lr1e-3_seed0",
            "LSTM, 30 hidden units, 28 blank rows after, B = 0, constant gates, Adam, learning rate 1e-3",
        ),
        (DropoutConfig(), RNN().name, RNN().caption),
        (
            DropoutConfig(dropout=0.5),
            "rnn30_dropout0.5_adam_lr1e-3_seed0",
            RNN().caption.replace("A", "dropout 0.5, A"),
        ),
    ],
)
def test_names_and_captions_begin_with_what_distinguishes_a_run(config, name, caption):
    assert (config.name, config.caption) == (name, caption)
    assert ", ".join(config.captions().values()) == f"{caption}, seed {config.seed}"


@each_config
def test_no_two_experiments_have_the_same_name(config_class):
    """Names also differ where file systems ignore case, and they are valid names of folders everywhere."""
    rng = random.Random(0)
    largest = dict.fromkeys(("hidden_size", "batch_size", "rows_before", "rows_after", "seed"), 12)
    configs = {}
    for number in range(2000):
        config = random_config(rng, config_class, largest if number % 2 else None)
        assert configs.setdefault(config.name.lower(), config) == config
        assert re.fullmatch(r"[a-zA-Z0-9_.+-]{1,250}", config.name)
    assert len(configs) > 1000


@each_config
def test_a_setting_has_only_values_that_its_declaration_allows(config_class):
    needed = {"momentum": {"optimizer": "sgd"}, "gates": {"cell": "gru"}}
    for spec in config_class.specs():
        others = needed.get(spec.name, {})
        for value in spec.choices or (spec.minimum, spec.maximum):
            assert getattr(config_class(**{spec.name: value}, **others), spec.name) == value
        if spec.choices:
            refused = ["else"]
        else:
            step = 1 if spec.type is int else 1e-13
            refused = [spec.minimum - step, 1.1 * spec.maximum + step, float("nan")]
        for value in refused:
            with pytest.raises(utils.InputError, match=rf"^{spec.flag} must be (one of|between) .*, not "):
                config_class(**{spec.name: value}, **others)


def test_older_runs_have_the_defaults_of_newer_settings(tmp_path):
    """A setting that has become a fixed attribute, such as dataset, is accepted with the same value."""
    (tmp_path / "config.json").write_bytes(RNN_RECORD % b'"cell": "gru", "seed": 3, "dataset": "mnist"')
    assert SavedRun(tmp_path).config == RNN(cell="gru", seed=3)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff\xfe{", "does not fit this version of the project"),
        (b'{"script": "gan", "settings": {}, "conditions": {}}', "does not fit this version of the project .*'gan'"),
        (RNN_RECORD % b'"dropout": 0.5', "does not fit this version of the project .*'dropout'"),
        (RNN_RECORD % b'"dataset": "cifar10"', "does not fit this version of the project .*'dataset'"),
        (RNN_RECORD % b'"cell": "elman"', "--cell must be one of rnn, gru, lstm, not elman"),
        (RNN_RECORD % b'"lr": "fast"', "does not fit this version of the project"),
    ],
)
def test_a_foreign_config_json_is_refused_and_named(tmp_path, content, reason):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(utils.InputError, match=f"^{path}.*{reason}"):
        SavedRun(tmp_path)


@pytest.mark.usefixtures("tiny_data")
def test_a_new_setting_trains_no_older_run_again(call, tmp_path, monkeypatch):
    flags = ("--hidden-size", 8, "--data", "synthetic", "--epochs", 1, "--runs-dir", tmp_path)
    assert call(rnn_mnist, *flags)[0] == 0
    [older] = (tmp_path / "rnn_mnist").iterdir()
    before = read_files(older)
    status, output, error = call(LONGER_RNN, *flags, "--dropout", 0, 0.5)
    assert (status, error) == (0, "")
    assert f"{older}: complete after epoch 1" in output
    assert read_files(older) == before
    newer = older.with_name("synthetic_rnn8_dropout0.5_adam_lr1e-3_seed0")
    expected = DropoutConfig(hidden_size=8, dropout=0.5)
    monkeypatch.setitem(visualize.CONFIGS, "rnn_mnist", DropoutConfig)
    assert SavedRun(newer).config == expected
    captions = re.findall(r"^\| (RNN.*?), synthetic data ", output, re.MULTILINE)
    assert captions == [DropoutConfig(hidden_size=8).caption, expected.caption]
