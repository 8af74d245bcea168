"""visualize.py: what a user can get wrong ends with the right status and one helpful line, and costs nothing."""

import json
import pickle
import re
import shlex
import shutil
from dataclasses import replace

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from visualize import SavedRun

import pytest
import torch
from conftest import CONFIGS, FORGED, Intruder, assert_refused, read_files, run_command


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("", "required: RUN"),
        ("--figures", "expected at least one argument"),
        ("''", "'' is not the name of a folder"),
        ("one two", "one is not a folder"),
        ("nowhere", "nowhere is not a folder"),
        ("nowhere --figures heatmap", "'heatmap'"),
        ("nowhere --output-dir ''", "'' is not the name of a folder"),
        ("nowhere --ouput-dir there", "unrecognized arguments: --ouput-dir there; did you mean --output-dir?"),
        ("nowhere --seed 3", "unrecognized arguments: --seed 3"),
    ],
)
def test_an_unusable_command_line_ends_with_status_2_and_one_line(call, flags, words):
    assert_refused(call(visualize, *shlex.split(flags)), words)


def test_help_shows_every_flag_and_every_figure():
    done = run_command("visualize.py", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert {*re.findall(r"^  (--[a-z-]+)", done.stdout, re.MULTILINE)} == {"--figures", "--output-dir"}
    assert done.stdout.count("default: ") == 2
    single, several = done.stdout.split("Figures of a run:\n")[1].split("Of several runs:\n")
    figures = {name: drawing.draw for name, drawing in visualize.FIGURES.items()}
    for text, drawings in ((single, figures), (several, visualize.COMPARISONS)):
        lines = dict(re.findall(r"^    (\w+) +([A-Z].*)$", text, re.MULTILINE))
        assert lines == {name: draw.__doc__.splitlines()[0] for name, draw in drawings.items()}


def test_a_figure_that_the_network_does_not_have(call, copied_run):
    words = "is a run of rnn_mnist.py and has no figure filters; it has curves, confusion, examples, gradients, reading"
    assert_refused(call(visualize, copied_run, "--figures", "filters"), words)
    assert_refused(call(visualize, copied_run, "--figures", "claims"), "the figure claims compares several runs")
    assert_refused(call(visualize, copied_run.parents[1], "--figures", "confusion"), "takes a single run")


def test_a_folder_without_runs(call, tmp_path):
    assert_refused(call(visualize, tmp_path), "holds no run")


# Runs without what a figure needs


@pytest.mark.parametrize(
    ("script", "changes", "command"),
    [
        ("rnn_mnist", {"cell": "gru", "seed": 3}, "python rnn_mnist.py --cell gru --seed 3"),
        ("rnn_mnist", {}, "python rnn_mnist.py"),
        (
            "rnn_mnist",
            {"cell": "lstm", "hidden_size": 20, "rows_after": 28, "keep_bias": 1.0, "lr": 1e-5},
            "python rnn_mnist.py --cell lstm --hidden-size 20 --rows-after 28 --keep-bias 1 --lr 1e-5",
        ),
        (
            "cnn_cifar10",
            {"dataset": "mnist", "optimizer": "sgd", "lr": 0.02, "momentum": 0.9, "batch_size": 64},
            "python cnn_cifar10.py --dataset mnist --optimizer sgd --lr 0.02 --momentum 0.9 --batch-size 64",
        ),
    ],
)
def test_a_run_without_its_checkpoint_names_the_command_that_trains_it(
    call, tmp_path, rnn_run, script, changes, command
):
    config = CONFIGS[script](**changes)
    (tmp_path / "config.json").write_text(json.dumps(utils.Record(config, utils.Conditions()).as_dict()))
    shutil.copy(rnn_run[1] / "metrics.csv", tmp_path)
    outcome = call(visualize, tmp_path)
    assert_refused(outcome, f"{tmp_path} holds no checkpoint.pt (those of runs/reference are not shipped)")
    assert_refused(outcome, f"train the run with {command} and name its folder")
    assert not (tmp_path / "figures").exists(), "told before the first figure"
    flags = shlex.split(command)[2:]
    parser = utils.experiment_parser(type(config), "")
    typed = {name: values[0] for name, values in vars(parser.parse_args(flags)).items() if isinstance(values, list)}
    assert type(config)(**typed) == config, "the script reads the command as that run"
    assert call(visualize, tmp_path, "--figures", "curves")[0] == 0


def test_the_command_that_trains_a_run_on_embedded_data_says_so(call, copied_run):
    """Without --data synthetic it would train another run, in another folder."""
    (copied_run / "checkpoint.pt").unlink()
    assert_refused(call(visualize, copied_run), "train the run with python rnn_mnist.py --data synthetic and name")


def test_a_run_that_has_finished_no_epoch_names_the_command_that_trains_it(call, copied_run):
    for name in ("metrics.csv", "checkpoint.pt"):
        (copied_run / name).unlink()
    assert_refused(
        call(visualize, copied_run), f"{copied_run} has finished no epoch; train it with python rnn_mnist.py"
    )


def test_a_damaged_snapshot_is_named(call, copied_run, tmp_path):
    path = copied_run / "snapshots" / "epoch_01.pt"
    path.write_bytes(path.read_bytes()[:-100])
    outcome = call(visualize, copied_run, "--figures", "gradients", "--output-dir", tmp_path)
    assert_refused(outcome, f"{path} is damaged or not of this project")


def test_visualize_downloads_nothing(call, copied_run, tmp_path):
    record, elsewhere = json.loads((copied_run / "config.json").read_text()), tmp_path / "elsewhere"
    record["conditions"] |= {"data_source": "real", "data_dir": str(elsewhere)}
    (copied_run / "config.json").write_text(json.dumps(record))
    outcome = call(visualize, copied_run, "--figures", "confusion")
    assert_refused(outcome, f"MNIST is not in {elsewhere}; a training script downloads it there")
    assert not elsewhere.exists()


# Runs that are damaged


def test_a_truncated_checkpoint_is_refused_and_left_alone(call, copied_run):
    path = copied_run / "checkpoint.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    before = read_files(copied_run)
    assert_refused(call(visualize, copied_run), "checkpoint.pt is damaged or not of this project")
    assert read_files(copied_run) == before


def test_a_foreign_checkpoint_is_refused_and_its_code_is_not_run(call, copied_run, tmp_path):
    path = copied_run / "checkpoint.pt"
    path.write_bytes(pickle.dumps(Intruder(tmp_path / "intruder")))
    assert_refused(call(visualize, copied_run), "is damaged or not of this project")
    for content in ({"model": Intruder(tmp_path / "intruder")}, [1, 2, 3]):
        torch.save(content, path)
        assert_refused(call(visualize, copied_run), "is damaged or not of this project")
    assert not (tmp_path / "intruder").exists()


def test_a_checkpoint_of_another_network_is_refused(call, copied_run):
    checkpoint = torch.load(copied_run / "checkpoint.pt", weights_only=True)
    checkpoint["state"]["model"] = rnn_mnist.RowReader(rnn_mnist.Config(cell="gru", hidden_size=12)).state_dict()
    torch.save(checkpoint, copied_run / "checkpoint.pt")
    assert_refused(call(visualize, copied_run), "do not fit its settings")


@pytest.mark.parametrize("name", ["config.json", "metrics.csv"])
@pytest.mark.parametrize("content", ["", "not what it was", '{"script": 3}', "epoch,train_loss\n1,2\n"])
def test_damaged_run_files_are_named(call, copied_run, name, content):
    (copied_run / name).write_text(content)
    for arguments in ([copied_run], [copied_run.parents[1]]):
        assert_refused(call(visualize, *arguments), str(copied_run / name))


@pytest.mark.parametrize("row", ["1,nan,1,1,1,1", "2,1,1,1,1,1", "1,1,1,1,1"])
def test_metrics_that_no_run_can_have_are_refused(call, copied_run, row):
    (copied_run / "metrics.csv").write_text(",".join(utils.METRICS) + f"\n{row}\n")
    assert_refused(call(visualize, copied_run, "--figures", "curves"), "metrics.csv is empty or damaged")


GRADIENTS = [",".join(visualize.GRADIENTS), *(f"{epoch},hidden,{step},1" for epoch in (0, 2) for step in range(1, 29))]
CELL = [f"{epoch},cell,{step},0" for epoch in (0, 2) for step in range(1, 29)]
GABOR = [",".join(visualize.GABOR), *(f"{kernels},0,0.5,90,0.2,1" for kernels in visualize.KERNELS)]


@pytest.mark.parametrize(
    ("kind", "lines"),
    [
        ("gradients", GRADIENTS[:1]),
        ("gradients", GRADIENTS[:-1]),
        ("gradients", [*GRADIENTS[:5], *GRADIENTS[6:]]),
        ("gradients", [*GRADIENTS[:-1], "2,hidden,28,0"]),
        ("gradients", [*GRADIENTS[:-1], "2,hidden,28,inf"]),
        ("gradients", [*GRADIENTS[:-1], "2,hidden,28,few"]),
        ("gradients", [*GRADIENTS, "2,cell,28,1"]),
        ("gradients", ["step", "1"]),
        ("gradients", ["step,state,untrained,trained", *(f"{step},hidden,1,1" for step in range(1, 29))]),
        ("gabor", GABOR[:2]),
        ("gabor", [*GABOR[:-1], "untrained,0,nan,90,0.2,1"]),
        ("gabor", [line.rpartition(",")[0] for line in GABOR]),
    ],
)
def test_damaged_tables_are_named(call, tmp_path, kind, lines, rnn_run):
    table = two_runs(tmp_path, kind, rnn_run[1]) / "figures" / f"{kind}.csv"
    table.write_text("\n".join([*lines, ""]))
    words = f"{table} is damaged; delete it, or write it anew with --figures {kind}"
    assert_refused(call(visualize, tmp_path, "--figures", kind), words)


@pytest.mark.parametrize(
    ("kind", "lines"), [("gradients", GRADIENTS), ("gradients", GRADIENTS + CELL), ("gabor", GABOR)]
)
def test_whole_tables_are_read(call, tmp_path, kind, lines, rnn_run):
    """The tables that are damaged above are these but for a place."""
    folder = two_runs(tmp_path, kind, rnn_run[1])
    (folder / "figures" / f"{kind}.csv").write_text("\n".join([*lines, ""]))
    assert len(visualize.read_measured(SavedRun(folder), kind)) == len(lines) - 1
    assert call(visualize, tmp_path, "--figures", kind)[0] == 0


def two_runs(folder, kind, trained):
    """Write two runs of the script that has a table, without checkpoints; return the folder of the first."""
    config = rnn_mnist.Config() if kind == "gradients" else cnn_cifar10.Config()
    for seed in (0, 1):
        (folder / str(seed) / "figures").mkdir(parents=True)
        record = utils.Record(replace(config, seed=seed), utils.Conditions(data_source="synthetic"))
        (folder / str(seed) / "config.json").write_text(json.dumps(record.as_dict()))
        shutil.copy(trained / "metrics.csv", folder / str(seed))
    return folder / "0"


@pytest.mark.parametrize(("part", "name", "value"), FORGED)
def test_settings_that_no_run_can_have_are_refused(call, copied_run, part, name, value):
    record = json.loads((copied_run / "config.json").read_text())
    (record if part is None else record[part])[name] = value
    (copied_run / "config.json").write_text(json.dumps(record))
    for arguments in ([copied_run], [copied_run.parents[1]]):
        assert_refused(call(visualize, *arguments), f"{copied_run / 'config.json'} is not of this project")


# Interrupted, or with nowhere to write


@pytest.mark.parametrize(
    ("signal", "status", "word"), [(KeyboardInterrupt, 130, "interrupted"), (utils.Terminated, 143, "terminated")]
)
def test_a_drawing_that_is_interrupted_says_which_figures_are_kept(
    call, rnn_run, tmp_path, monkeypatch, signal, status, word
):
    def stop(run):
        """Never end."""
        raise signal

    monkeypatch.setitem(visualize.FIGURES, "confusion", visualize.Drawing(stop, None))
    ended, _, error = call(visualize, rnn_run[1], "--output-dir", tmp_path)
    assert ended == status
    assert error == (
        f"visualize.py: {word}; the figures that are drawn are kept, and the same command draws them all\n"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]


def test_a_home_that_cannot_be_written(rnn_run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "MPLCONFIGDIR"):
        monkeypatch.setenv(name, str(tmp_path / "file" / "none"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    done = run_command("visualize.py", rnn_run[1], "--figures", "curves", "--output-dir", tmp_path)
    assert done.returncode == 0
    assert "Traceback" not in done.stderr
    assert (tmp_path / "curves.png").exists()


def test_an_output_folder_that_cannot_be_made(call, copied_run, tmp_path):
    (tmp_path / "file").write_text("mine")
    outcome = call(visualize, copied_run, "--figures", "curves", "--output-dir", tmp_path / "file")
    assert_refused(outcome, str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"
