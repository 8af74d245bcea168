"""The claims, each settled by a test over seeds whose p can be counted by hand, and what is shipped of them."""

import itertools
import re

import cnn_cifar10
import visualize
from visualize import FAILS, HOLDS, UNDECIDED, Row, Sample, beats, correlates, permutation_p

import numpy as np
import pytest
from conftest import ROOT
from test_comparison import compare, gradient_rows, invent_run, invent_seeds, invent_table, rnn_config

FIVE = [0.0, 0.1, 0.2, 0.3, 0.4]
SHIPPED = ROOT / "runs" / "reference" / "comparison"

# Tests whose p can be counted by hand


def test_p_is_what_going_through_all_arrangements_one_by_one_gives():
    rng = np.random.default_rng(3)
    for these, those in (rng.integers(0, 9, (2, 5)).tolist() for _ in range(20)):
        signs, differences = itertools.product((1, -1), repeat=5), np.subtract(these, those)
        flipped = [np.dot(sign, differences) >= differences.sum() for sign in signs]
        shuffled = [sum(chosen) >= sum(these) for chosen in itertools.combinations(these + those, 5)]
        expected = [sum(found) / len(found) for found in (flipped, shuffled)]
        assert [permutation_p(these, those, paired) for paired in (True, False)] == pytest.approx(expected)


@pytest.mark.parametrize("paired", [False, True])
def test_of_too_many_arrangements_random_ones_are_tested_the_same_each_time(paired, monkeypatch):
    rng = np.random.default_rng(1)
    these, those = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    exact = permutation_p(these, those, paired)
    monkeypatch.setattr(visualize, "MOST_ARRANGEMENTS", 400)
    found = []
    for _ in range(2):
        visualize.arrangements.cache_clear()
        found.append(permutation_p(these, those, paired))
    visualize.arrangements.cache_clear()
    assert found[0] == found[1] == pytest.approx(exact, abs=0.1)
    assert found[0] * 401 == pytest.approx(round(found[0] * 401)), "400 and the measured one"


def sample(values, words="A"):
    return Sample(words, dict(enumerate(values)))


TENS, ABOVE = [10, 20, 30, 40, 50], [10.1, 20.1, 30.1, 40.1, 50.1]


@pytest.mark.parametrize(
    ("these", "those", "paired", "p", "opposite", "verdict"),
    [
        ([3, 4, 5], [0, 1, 2], False, 1 / 20, 1, HOLDS),
        ([0, 1, 2], [3, 4, 5], False, 1, 1 / 20, FAILS),
        ([3, 4, 5], [0, 1, 3.5], False, 2 / 20, 19 / 20, UNDECIDED),
        ([5, 7, 8, 9, 10], [1, 2, 3, 4, 6], False, 2 / 252, 251 / 252, HOLDS),
        ([8, 9], [0, 1, 2], False, 1 / 10, 1, UNDECIDED),  # two seeds decide nothing
        ([1, 2], [1, 2], False, 5 / 6, 5 / 6, UNDECIDED),
        (ABOVE, TENS, True, 1 / 32, 1, HOLDS),
        (ABOVE, TENS, False, 105 / 252, 148 / 252, UNDECIDED),  # of the sums of five tens 104 are above 150, 44 are 150
        ([2, 4, 3], [1, 2, 6], True, 5 / 8, 5 / 8, UNDECIDED),
        ([5, 6, 7], [0, 1, 2, 99, 99], True, 1 / 8, 1, UNDECIDED),  # pairs of the seeds that both have
        ([0.1, 0.2, 0.0], [0.0, 0.0, 0.3], True, 5 / 8, 5 / 8, UNDECIDED),  # 0.1 + 0.2 counts as equal to 0.3
    ],
)
def test_one_beats_the_other_or_is_beaten_when_the_test_says_so_at_five_percent(
    these, those, paired, p, opposite, verdict
):
    row = beats(sample(these), sample(those), paired=paired)
    kept = those[: len(these)] if paired else those
    assert row.difference == pytest.approx(np.mean(these) - np.mean(kept))
    assert (row.p, row.opposite) == (pytest.approx(p), pytest.approx(opposite))
    assert row.verdict == verdict


@pytest.mark.parametrize("paired", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(
    ("difference", "margin", "verdict"),
    [
        (0.0, 0.5, HOLDS),
        (0.4, 1.0, HOLDS),
        (0.9, 0.5, FAILS),
        (0.5, 0.5, UNDECIDED),
        (2.0, 1.0, FAILS),
        (2.0, 5.0, HOLDS),  # five times the margin
    ],
)
def test_similar_holds_on_one_side_of_its_margin_and_fails_on_the_other(paired, sign, difference, margin, verdict):
    row = beats(sample([value + sign * difference for value in FIVE]), sample(FIVE), paired, within=margin)
    assert (row.difference, row.verdict) == (pytest.approx(sign * difference), verdict)
    assert f"similar within {margin:g} to" in row.words


def test_p_of_similar_is_the_larger_of_both_tests():
    assert beats(sample([0.4] * 5), sample([0.0] * 5), True, within=0.5).p == 1 / 32
    five = sample([10, 11, 12, 13, 14])
    assert beats(five, five, within=5.5).p == pytest.approx(1 / 252)
    assert beats(five, five, within=0.0).p == permutation_p([*five.values.values()], [*five.values.values()], False)


def test_what_was_not_measured_is_told_as_such_and_settles_nothing():
    for pair in ((sample([], "GRU"), sample([95], "RNN")), (sample([95], "RNN"), sample([], "GRU"))):
        row = beats(*pair)
        assert (row.p, row.verdict) == (None, UNDECIDED)
        assert {*row.words.split(" against ")} == {"GRU (not measured)", "RNN 95.00 % (95.00 % to 95.00 %, 1 seed)"}


def test_what_is_lost_is_the_difference_of_two_runs_of_a_seed():
    found = visualize.lost("without fc1", Sample("", {0: 60, 1: 61, 3: 63}), Sample("", {1: 40, 2: 40, 3: 40}))
    assert found == Sample("points lost without fc1", {1: 21, 3: 23})


@pytest.mark.parametrize(
    ("these", "those", "rho", "p", "verdict"),
    [
        ([1, 8, 27, 64], [1, 2, 3, 4], 1, 1 / 24, HOLDS),
        ([1, 8, 27, 64], [4, 3, 2, 1], -1, 1, FAILS),
        ([1, 8, 27, 64, 70], [1, 2, 3, 5, 4], 0.9, 5 / 120, HOLDS),  # itself, and with two neighbours exchanged
        ([1, 2, 3], [1, 2, 3], 1, 1 / 6, UNDECIDED),
        ([1, 2, 3, 4], [4, 4, 4, 4], 0, 1, UNDECIDED),
        ([10, 20, 20, 30], [1, 2, 3, 4], np.corrcoef([1, 2.5, 2.5, 4], [1, 2, 3, 4])[0, 1], 2 / 24, UNDECIDED),
        (range(15), range(15), 1, 1 / 200_001, HOLDS),
        ([1, 2], [1, 2], None, None, UNDECIDED),
    ],
)
def test_a_rank_correlation_is_tested_over_the_orders_of_the_means_of_settings(these, those, rho, p, verdict):
    """Seeds that go against it within each setting change nothing: a setting counts once."""
    pairs = [(sample([x - 0.1, x + 0.1]), sample([y + 0.1, y - 0.1])) for x, y in zip(these, those, strict=True)]
    row = correlates("size", [*pairs, (sample([]), sample([1]))])
    assert (row.difference, row.p) == (rho and pytest.approx(rho), p and pytest.approx(p))
    assert row.verdict == verdict
    assert row.words.startswith(f"size, means of {len(pairs)} settings")


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([HOLDS, HOLDS], HOLDS),
        ([UNDECIDED], UNDECIDED),
        ([HOLDS, UNDECIDED], UNDECIDED),
        ([FAILS, UNDECIDED], FAILS),
        ([HOLDS, FAILS], "holds in part (1 hold, 1 do not)"),
        ([HOLDS, FAILS, UNDECIDED, HOLDS], "holds in part (2 hold, 1 do not, 1 undecided)"),
    ],
)
def test_a_claim_of_several_parts_holds_when_all_do(verdicts, expected):
    tests = {HOLDS: (0.01, 1), FAILS: (1, 0.01), UNDECIDED: (0.3, 0.7)}
    assert visualize.verdict_of([Row("", "", 1, *tests[verdict]) for verdict in verdicts]) == expected


# What runs settle


def settled_in(folder):
    """Return the verdict of each claim in claims.md by its number, which its table and its own section agree on."""
    text = (folder / "claims.md").read_text()
    table = re.findall(r"^\| (\d+\w?) \| [^|]* \| ([^|]*) \|", text, re.MULTILINE)
    sections = re.findall(r"^## (\d+\w?)\. .*?^\*\*Verdict: (.*?)\.\*\*$", text, re.MULTILINE | re.DOTALL)
    assert table == sections
    return dict(table)


def as_reported(config):
    """Accuracies in the order of the report's claims."""
    if isinstance(config, cnn_cifar10.Config):
        base = 99 if config.dataset == "mnist" else {1e-4: 61, 1e-3: 60.5}[config.lr]
    else:
        base = {"rnn": min(60 + config.hidden_size, 96), "gru": 97.7 + config.hidden_size / 30, "lstm": 98}
        base = base[config.cell] - abs(np.log10(config.lr / 1e-3))
    return base - 10 * (config.optimizer == "sgd")


PARTLY = "holds in part (1 hold, {} do not)"
OPPOSITE = {"1": FAILS, "2": PARTLY.format(1), "3": FAILS, "4": PARTLY.format(4), "5": HOLDS, "6": FAILS}
OPPOSITE |= {"7a": HOLDS, "7b": HOLDS, "8": PARTLY.format(3)}


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [(as_reported, dict.fromkeys(OPPOSITE, HOLDS)), (lambda config: 100 - as_reported(config), OPPOSITE)],
    ids=["as reported", "the opposite"],
)
def test_the_reports_claims_follow_from_the_runs_of_its_settings(call, tmp_path, accuracy, expected):
    for config in (*(row.config for row in visualize.REPORT), rnn_config("rnn", 55), rnn_config("rnn", 64)):
        invent_seeds(tmp_path, config, [accuracy(config) + 0.01 * seed for seed in range(5)])
    folder, _ = compare(call, tmp_path, "claims")
    assert settled_in(folder) == expected
    words = "1b, 9, 10a, 10b, 11, 12, 13; the shipped verdicts stand in runs/reference/comparison/claims.md"
    assert f"\nNot tested with these runs: {words}.\n" in (folder / "claims.md").read_text()


@pytest.mark.parametrize(
    ("configs", "options", "tested"),
    [
        ([rnn_config("rnn", 5), rnn_config("rnn", 5, optimizer="sgd")], {}, {"1", "5"}),
        ([rnn_config("rnn", 5), rnn_config("rnn", 5, lr=1e-4)], {}, {"3", "5"}),
        ([rnn_config("gru"), rnn_config("lstm")], {}, {"5", "7a", "7b"}),
        ([rnn_config("gru"), rnn_config("lstm")], {"epochs": 12}, {"5", "7a", "7b"}),
        ([rnn_config("gru"), rnn_config("lstm")], {"epochs": 9}, None),
        ([rnn_config("gru"), rnn_config("lstm")], {"source": "synthetic"}, None),
        ([rnn_config("gru", 7), rnn_config("gru", 8)], {}, None),
    ],
)
def test_the_claims_that_the_runs_can_test_are_tested_and_the_shipped_verdicts_named(
    call, tmp_path, configs, options, tested
):
    for config in configs:
        invent_seeds(tmp_path, config, [90, 91, 92], **options)
    folder, said = compare(call, tmp_path, "claims")
    if tested:
        assert settled_in(folder).keys() == tested
    else:
        assert not list(folder.rglob("claims.md"))
        assert f"these runs can test no claim; the shipped verdicts stand in {visualize.SHIPPED}" in said


def invent_insides(folder, epochs=10):
    """Invent runs with tables of Gabor fits, of readable layers and of gradients.

    Before training only the LSTM's cell state reaches further back than the RNN's, after it all gated states do.
    """
    layers = {"pixels": (30, 30), "pool1": (40, 41), "pool2": (50, 45), "fc1": (60, 44)}  # trained, untrained
    kept = {"rnn": [(0, "hidden", 0.5), (10, "hidden", 0.5)], "gru": [(0, "hidden", 0.4), (10, "hidden", 0.9)]}
    kept["lstm"] = [*kept["gru"], (0, "cell", 0.8), (10, "cell", 0.9)]
    for seed, lr in itertools.product(range(5), (1e-4, 1e-3)):
        path = invent_run(folder, cnn_cifar10.Config(seed=seed, lr=lr), 60, epochs)
        kernels = {"trained": (0.7, 0.81, 0.9), "shuffled": (0.4, 0.5, 0.95), "untrained": (0.6, 0.9, 0.9)}
        rows = [{"kernels": name, "r2": r2, "cosine_to_start": 1} for name, values in kernels.items() for r2 in values]
        invent_table(path, "gabor", rows)
        rows = [
            {"network": state, "layer": layer, "accuracy": value + 0.1 * seed}
            for layer, values in layers.items()
            for state, value in zip(("trained", "untrained"), values, strict=True)
        ]
        invent_table(path, "layers", rows)
    for (cell, factors), seed in itertools.product(kept.items(), range(5)):
        rows = [gradient_rows([each ** (28 - step) for step in range(1, 29)], *where) for *where, each in factors]
        rows.append(gradient_rows([1.0] * 28, epoch=12))  # which is not compared
        path = invent_run(folder, rnn_config(cell, seed=seed), 90, epochs)
        invent_table(path, "gradients", sum(rows, []))


@pytest.mark.parametrize(
    ("epochs", "last_alone"), [(10, {"9": HOLDS, "13": "holds in part (5 hold, 1 do not)"}), (12, {})]
)
def test_tables_settle_claims_about_the_insides_after_the_epoch_of_the_comparison(call, tmp_path, epochs, last_alone):
    """Those of gradients hold every epoch, those of kernels and layers the last one alone."""
    invent_insides(tmp_path, epochs)
    folder, _ = compare(call, tmp_path, "claims")
    found = settled_in(folder)
    insides = {number: found[number] for number in ("9", "10a", "13") if number in found}
    assert insides == last_alone | {"10a": "holds in part (4 hold, 2 do not)"}
    medians = "0.810 (0.810 to 0.810, 5 seeds) against with their pixels shuffled 0.500 (0.500 to 0.500, 5 seeds)"
    assert (medians in (folder / "claims.md").read_text()) == bool(last_alone)


# What is shipped


@pytest.fixture(scope="session")
def made_of_the_shipped_runs(tmp_path_factory):
    """The results and claims that this code makes of the tracked runs."""
    folder = tmp_path_factory.mktemp("comparison")
    groups = visualize.group_runs(visualize.find_runs(SHIPPED.parent, ROOT / "data"))
    assert sum(map(len, groups)) == len([*SHIPPED.parent.rglob("config.json")]) > 250, "none is left out"
    for name in ("results", "claims"):
        visualize.save(name, visualize.COMPARISONS[name](groups), folder)
    return folder


@pytest.mark.parametrize("name", ["claims.md", "results.csv", "results.md"])
def test_what_is_shipped_is_what_the_code_makes_of_the_shipped_runs(made_of_the_shipped_runs, name):
    assert (made_of_the_shipped_runs / name).read_bytes() == (SHIPPED / name).read_bytes()
