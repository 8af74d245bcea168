"""The front page: what it tells to type can be typed, and what it points to is there."""

import re
import shlex

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = [line.strip().removeprefix("$ ") for line in README.splitlines() if line.startswith("    ")]
TYPED = [part for line in [*BLOCKS, *re.findall(r"`([^`\n]+)`", README)] for part in line.split(" && ")]
FOUND = [re.fullmatch(r"(python |torchrun .* )?(\S+\.py)(?: (.*))?", part) for part in dict.fromkeys(TYPED)]
COMMANDS = [(found[2], found[3] or "") for found in FOUND if found and (found[1] or found[3])]
TRAINING = {"cnn_cifar10.py": cnn_cifar10, "rnn_mnist.py": rnn_mnist}


@pytest.mark.parametrize(("script", "words"), [each for each in COMMANDS if each[0] in TRAINING])
def test_a_training_command_asks_for_experiments(requested, script, words):
    assert requested(TRAINING[script], *shlex.split(words))


@pytest.mark.parametrize(("script", "words"), [each for each in COMMANDS if each[0] == "visualize.py"])
def test_a_command_that_draws_names_figures_that_there_are(call, monkeypatch, script, words):
    def parsed(folder, data_dir):
        raise utils.InputError("its runs would be read next")

    monkeypatch.setattr(visualize, "find_runs", parsed)
    assert call(visualize, *shlex.split(words))[2] == "visualize.py: error: its runs would be read next\n"
    runs, _, names = words.partition(" --figures ")
    of_one_run = runs == "$RUN" or re.fullmatch(r"runs/\w+/[^\s*]+", runs)
    known = visualize.FIGURES if of_one_run else visualize.COMPARISONS
    assert {*names.partition(" --")[0].split()} <= known.keys()


def test_the_test_commands_line_ends_with_it():
    assert any(line.endswith("-m pytest") for line in BLOCKS)


def test_scripts_pictures_and_texts_that_it_points_to_are_there():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    scripts = {script for script, _ in COMMANDS} | {*re.findall(r"tests/\w+\.py", README)}
    assert len(links) > 5
    assert scripts >= {*TRAINING, "visualize.py"}
    assert {path for path in links | scripts if not (ROOT / path).exists()} == set()
