"""The tests of differences of two means, the claims on made-up runs, and the shipped results."""

import itertools
import json
import math
import re
import runpy
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import cnn_cifar10
import rnn_mnist
import visualize
from runs.reference import claims
from visualize import FAILS, HOLDS, UNDECIDED, Comparison, Measurements

import numpy as np
import pytest
from conftest import ROOT, assert_refused
from test_comparison import GRU, LSTM, RNN, groups_in, invent_run, invent_seeds


def brute_force_p(first, second, margin, paired):
    """Return the p-value of "the mean of first is above that of second by more than margin" from its definition."""
    if paired:
        differences = np.subtract(first, second) - margin
        sums = [np.dot(signs, differences) for signs in itertools.product((1, -1), repeat=len(first))]
    else:
        moved = [value - margin for value in first]
        sums = [sum(chosen) for chosen in itertools.combinations([*moved, *second], len(first))]
    return np.mean([value >= sums[0] - 1e-9 for value in sums])  # the first one was measured


@pytest.mark.parametrize("paired", [False, True])
def test_p_values_and_intervals_are_those_of_all_permutations(paired):
    values = np.random.default_rng(3).integers(0, 9, (3, 2, 6)) / 10  # whose sums are rounded
    for margin, (first, second) in zip((-0.1, 0, 0.1), values.tolist(), strict=True):
        second = second if paired else second[1:]
        *p_values, (low, high) = visualize.permutation_test(first, second, margin, paired)
        expected = [brute_force_p(first, second, margin, paired), brute_force_p(second, first, -margin, paired)]
        assert p_values == pytest.approx(expected)
        for end, is_rejected in ((low + 1e-6, False), (high - 1e-6, False), (low - 1e-6, True), (high + 1e-6, True)):
            p = min(brute_force_p(first, second, end, paired), brute_force_p(second, first, -end, paired))
            assert (p <= 0.05) == is_rejected


# Pairs, and values in each of two samples: up to 200,000 permutations are exact, beyond them as many are random.
@pytest.mark.parametrize(("paired", "size", "is_exact"), [(True, 17, True), (True, 18, False), (False, 11, False)])
def test_of_too_many_permutations_the_same_random_ones_are_drawn(paired, size, is_exact):
    first, second = np.random.default_rng(1).normal([[0.4], [0]], 1, (2, size))
    found = []
    for _ in range(2):
        visualize.permutations.cache_clear()
        found.append(visualize.permutation_test(first, second, 0, paired)[0])
    visualize.permutations.cache_clear()
    expected = brute_force_p(first, second, 0, paired)
    assert found[0] == found[1] == pytest.approx(expected, abs=1e-9 if is_exact else 0.005)
    count = 2**size if is_exact else 200_001  # random ones and the measured one
    assert found[0] * count == pytest.approx(round(found[0] * count), abs=1e-6)


def test_similar_values_differ_by_less_than_a_margin():
    values = {0: 10, 1: 20, 2: 30, 3: 40, 4: 50}
    for difference, verdict in ((0.4, HOLDS), (-0.4, HOLDS), (0.6, FAILS), (-0.6, FAILS), (0.5, UNDECIDED)):
        moved = Measurements("", {seed: value + difference for seed, value in values.items()})
        result = claims.compare(moved, Measurements("", values), paired=True, above=-0.5, below=0.5)
        assert (result.verdict, result.difference) == (verdict, pytest.approx(difference))
        assert result.slack == pytest.approx(0.5 - abs(difference))


RISES = [([1] * 5, HOLDS, 1 / 32), ([1, 1, 1, 1, 2], UNDECIDED, 6 / 32), ([2, 3, 9, 11, 12], FAILS, 1 / 32)]


@pytest.mark.parametrize(("epochs", "verdict", "p"), RISES)
def test_what_most_runs_do_is_decided_by_a_sign_test(tmp_path, epochs, verdict, p):
    """Runs of nine epochs do not count, and neither does what others do after the tenth epoch."""
    for seed, epoch in enumerate(epochs):
        invent_run(tmp_path, RNN(seed=seed), [11.35] * (epoch - 1) + [90] * (13 - epoch))
    invent_run(tmp_path, RNN(seed=99), [90] * 9)
    runs = {RNN(): visualize.find_runs(tmp_path, tmp_path)}
    result = claims.count_rises(runs, [RNN()], 1, 1)
    assert (result.verdict, result.agreeing, result.total, result.p) == (verdict, epochs.count(1), 5, p)
    assert result.label.endswith("9, never, never)") == (12 in epochs)


# Twice 0.02 is 4 / 5 of 0.05, and takes the smaller ones with it. Without doubling, all of the second list count.
P_VALUES = [([0.005, 0.02, 0.015, 0.9, 0.018], 4), ([0.005, 0.02, 0.03], 1), ([0.03, 0.9, 0.9], 0)]


@pytest.mark.parametrize(("p_values", "kept"), P_VALUES)
def test_p_is_doubled_and_corrected_for_the_number_of_tests(monkeypatch, p_values, kept):
    parts = [(str(number), Comparison("", HOLDS, p=p)) for number, p in enumerate(p_values)]
    monkeypatch.setattr(claims, "CLAIMS", {"1": claims.Claim("", "", lambda runs: parts)})
    limit = max([p for p in p_values if p < 0.9][:kept], default=0)
    assert f" {kept} with a one-sided p up to {limit:.4f} remain decided" in claims.format_claims({})


def test_the_first_tables_show_verdicts_and_the_weakest_parts(monkeypatch):
    part = Comparison("", HOLDS, 1.5, "+1.5 points", "0 to 2", p=0.1, slack=1)
    undecided, failing = replace(part, verdict=UNDECIDED), replace(part, verdict=FAILS, interval_text="")
    verdicts = {1: [undecided, failing], 2: [replace(part, slack=2), part], 3: [part, undecided, part], 4: [undecided]}
    for number, found in verdicts.items():
        parts = list(zip(("A", "B", "C"), found, strict=False))
        monkeypatch.setitem(claims.CLAIMS, number, claims.Claim("New", "True.", lambda runs, parts=parts: parts))
    monkeypatch.setattr(claims, "OUTCOMES", {"3 huh": "it is {} apart", "4 h": "it does"})
    lines = claims.format_claims({}).splitlines()
    assert "4 claims (✓ holds: 1, ◐ holds in part: 1, ? undecided: 1, ✗ does not hold: 1)" in lines
    assert [line.partition(" True. | ")[2] for line in lines if line.startswith("| [")] == [
        "**✓ holds**<br><sub>B: +1.5 points (0 to 2)</sub> |",
        "**◐ holds in 2 of 3 parts**: it is 1.5 apart<br><sub>B: +1.5 points (0 to 2)</sub> |",
        "**? undecided**<br><sub>A: +1.5 points (0 to 2)</sub> |",
        "**✗ does not hold**<br><sub>B: +1.5 points</sub> |",
    ]


class AskedRuns(dict):
    """No runs; asked is the list of the settings that some claims look for."""

    def __init__(self, claims_by_number):
        self.asked = []
        for claim in claims_by_number.values():
            names = [name for name, _ in claim.test(self)]
            assert len(set(names)) == len(names), "two parts of a claim have the same name"

    def get(self, config, default):
        self.asked.append(config)
        return default


def test_claims_name_every_setting_of_the_shipped_runs_so_that_no_default_matters(monkeypatch):
    saved = [json.loads(path.read_text()) for path in Path(claims.__file__).parent.rglob("config.json")]
    shipped = {name for config in saved for name in config["settings"]}
    for script in (cnn_cifar10, rnn_mnist):
        defaults = ["no default" if field.name in shipped else field.default for field in fields(script.Config)]
        monkeypatch.setattr(script.Config.__init__, "__defaults__", tuple(defaults))
    monkeypatch.setattr(rnn_mnist, "CELLS", {"mut1": None, **rnn_mnist.CELLS})
    without_defaults = runpy.run_path(claims.__file__)["CLAIMS"]
    assert AskedRuns(without_defaults).asked == AskedRuns(claims.CLAIMS).asked


def runs_in(folder):
    """Return the runs in a folder by their settings, as claims take them."""
    return {group.config: group.runs for group in groups_in(folder)}


def as_claimed(config):
    """Return an accuracy in percent with which most claims about accuracies hold."""
    accuracy = -10 if config.optimizer == "sgd" else 0
    if config.script == "cnn_cifar10":
        accuracy += {"cifar10": 61, "mnist": 99}[config.dataset] - {"nothing": 0, "fc1": 5}.get(config.without, 2)
        return accuracy + {1e-4: 0, 1e-3: -0.5, 0.02: 15}[config.lr] - (0.5 if config.pixels == "permuted" else 0)
    size = config.hidden_size
    accuracy += {"rnn": 96 - 30 / size, "gru": 97.7 + size / 30, "lstm": 97.8 + size / 100}[config.cell]
    accuracy -= abs(math.log10(config.lr / 1e-3)) + {"full": 0, "input": 0.5, "constant": 2}[config.gates]
    if config.pixels == "permuted":
        accuracy -= {"rnn": 1, "gru": 2, "lstm": 3}[config.cell]
    if config.rows_after and (config.cell == "rnn" or config.gates == "constant"):
        accuracy -= {"rnn": 40, "gru": 10, "lstm": 12}[config.cell]
        accuracy += {"rnn": 0, "gru": 1, "lstm": -1}[config.cell] if config.keep_bias == 4 else 0
    return accuracy


# The verdicts on the parts of each claim if the accuracies are as claimed, and if they are the opposite (h: holds,
# d: does not hold, u: undecided, n: not measured).
VERDICTS = """1 hh dd / 2 hh dh / 3 hhh ddd / 4a hhhhh ddddd / 4b h h / 6 hhhhhh dddddd / 8 hhhh dddh / 10b hhhh dddd
/ 1b hhd ddh / 11 uuhhh uuhhh / 12 hhhh dddd / 17 nhhhh ndddd / 18 hhhhhhhhh ddddddddd
/ 21 hhhhhhhhhhhh dddddddddddd / P1 hhhhhhhh ddhdddhd / P2 hh hh / P3 hhhh dhdh / P4 hhhh dddd"""


@pytest.mark.parametrize("is_opposite", [False, True])
def test_verdicts_follow_from_the_accuracies(tmp_path, is_opposite):
    for config in dict.fromkeys(AskedRuns(claims.CLAIMS).asked):
        accuracy = 100 - as_claimed(config) if is_opposite else as_claimed(config)
        invent_seeds(tmp_path, config, [accuracy + 0.01 * seed for seed in range(5)])
    runs = runs_in(tmp_path)
    for line in VERDICTS.split("/"):
        number, *expected = line.split()
        found = "".join(part.verdict[0] for _, part in claims.CLAIMS[number].test(runs))
        assert (number, found) == (number, expected[is_opposite])
    assert {part.verdict for _, part in claims.more_epochs(runs)} == {HOLDS}
    if not is_opposite:  # of the constant gates with B = 2 and 4, the better one counts
        labels = " ".join(part.label for _, part in claims.constant_gates_between(runs))
        assert "B = 4, constant gates, Adam, learning rate 1e-3: 87.72 %" in labels
        assert "B = 2, constant gates, Adam, learning rate 1e-3: 84.12 %" in labels


CLAIMS_SCRIPT = SimpleNamespace(__name__="claims", main=claims.main)


def test_claims_of_other_runs_are_written_beside_them(call, tmp_path):
    invent_seeds(tmp_path, LSTM(), [98, 99], source="synthetic")
    invent_run(tmp_path, GRU(), 98, epochs=9)
    assert_refused(call(CLAIMS_SCRIPT, tmp_path), "no claim can be tested with these runs; see runs/reference/")
    assert not (tmp_path / "claims.md").exists()
    invent_seeds(tmp_path, RNN(5), [48, 49, 50, 51, 52], epochs=11)
    invent_seeds(tmp_path, RNN(5, optimizer="sgd"), [15, 15, 15, 15, 16], precision="bf16")
    invent_run(tmp_path, RNN(5, optimizer="sgd", seed=5), 15)
    assert call(CLAIMS_SCRIPT, tmp_path)[::2] == (0, "")
    text = re.sub(" +", " ", (tmp_path / "claims.md").read_text(encoding="utf-8"))
    assert "| **◐ holds in only 1 of 2 parts**<br><sub>RNN, Adam minus SGD: +34.80 points (+33.00 to" in text
    assert re.findall("^### (.*?)\\.", text, re.MULTILINE) == ["1", "5"], "the runs of other claims are missing"
    assert "\nSettings whose runs differ in precision or device: RNN, 5 hidden units, SGD, learning rate 1e-3." in text


def test_what_is_shipped_follows_from_the_shipped_runs():
    folder = ROOT / "runs" / "reference"
    groups = groups_in(folder)
    assert sum(len(group.runs) for group in groups) == len(list(folder.rglob("config.json")))
    texts = {f"comparison/{name}": text for name, text in visualize.results(groups).items()}
    texts["claims.md"] = claims.format_claims(runs_in(folder))
    assert [name for name, text in texts.items() if text != (folder / name).read_text(encoding="utf-8")] == []
