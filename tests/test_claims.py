"""The claims, each settled by a test over seeds whose p can be counted by hand, and what is shipped of them."""

import itertools
import math
import re

import cnn_cifar10
import visualize
from visualize import FAILS, HOLDS, UNDECIDED, UNMEASURED, Row, Sample, beats, counted

import numpy as np
import pytest
from conftest import ROOT
from test_comparison import compare, invent_blank_rows, invent_seeds, invent_table, rnn_config

FIVE = [0.0, 0.1, 0.2, 0.3, 0.4]
SHIPPED = ROOT / "runs" / "reference" / "comparison"

# Tests whose p can be counted by hand


def p_value(these, those, paired, by=0.0):
    return visualize.p_values(visualize.thresholds(these, those, paired), by)[0]


@pytest.mark.parametrize("by", [0, 1, -2])
def test_p_is_what_going_through_all_arrangements_one_by_one_gives(by):
    rng = np.random.default_rng(3)
    for these, those in (rng.integers(0, 9, (2, 5)).tolist() for _ in range(20)):
        moved, signs = [each - by for each in these], itertools.product((1, -1), repeat=5)
        differences = np.subtract(moved, those)
        flipped = [np.dot(sign, differences) >= differences.sum() for sign in signs]
        shuffled = [sum(chosen) >= sum(moved) for chosen in itertools.combinations(moved + those, 5)]
        expected = [sum(found) / len(found) for found in (flipped, shuffled)]
        assert [p_value(these, those, paired, by) for paired in (True, False)] == pytest.approx(expected)


@pytest.mark.parametrize("paired", [False, True])
def test_the_interval_ends_where_one_of_the_two_tests_begins_to_reject(paired):
    """A difference just inside is rejected by neither, one just outside by one; five pairs end at their extremes."""
    rng = np.random.default_rng(2)
    for these, those in rng.normal(0, 1, (20, 2, 6)):
        found = visualize.thresholds(these, those, paired)
        low, high = visualize.interval(found)
        for end, outside, rejecting in ((low, -1e-6, 0), (high, 1e-6, 1)):
            assert min(visualize.p_values(found, end - outside)) > 0.05
            assert visualize.p_values(found, end + outside)[rejecting] <= 0.05
    assert visualize.interval(visualize.thresholds([3, 5, 4, 9, 7], [1, 1, 1, 1, 1], True)) == (2, 8)
    assert visualize.interval(visualize.thresholds([3, 5, 4, 9], [1] * 4, True)) == (-math.inf, math.inf)


@pytest.mark.parametrize("paired", [False, True])
def test_of_too_many_arrangements_random_ones_are_tested_the_same_each_time(paired, monkeypatch):
    rng = np.random.default_rng(1)
    these, those = rng.normal(0.4, 1, 9), rng.normal(0, 1, 9)
    exact = p_value(these, those, paired)
    monkeypatch.setattr(visualize, "MOST_ARRANGEMENTS", 400)
    found = []
    for _ in range(2):
        visualize.arrangements.cache_clear()
        found.append(p_value(these, those, paired))
    visualize.arrangements.cache_clear()
    assert found[0] == found[1] == pytest.approx(exact, abs=0.1)
    assert found[0] * 401 == pytest.approx(round(found[0] * 401)), "400 and the measured one"


@pytest.mark.parametrize(
    ("p_values", "kept"),
    [
        ([0.01, 0.02, 0.03, 0.04, 0.05], 5),  # the largest is below 5 / 5 of 0.05, and takes all others with it
        ([0.03, 0.9, 0.011, 0.02], 3),  # 0.03 is below 3 / 4 of 0.05
        ([0.045, 0.9, 0.011, 0.02], 2),
        ([0.04, 0.9, 0.9], 0),
        ([], 0),
    ],
)
def test_verdicts_that_survive_are_counted_as_benjamini_and_hochberg_do(p_values, kept):
    assert visualize.surviving(p_values) == kept


@pytest.mark.parametrize(
    ("so", "of", "p", "verdict"),
    [(5, 5, 1 / 32, HOLDS), (0, 5, 1 / 32, FAILS), (4, 5, 6 / 32, UNDECIDED), (7, 8, 9 / 256, HOLDS)],
)
def test_runs_are_counted_by_the_sign_test(so, of, p, verdict):
    row = counted("so", [True] * so + [False] * (of - so))
    assert (row.p, row.verdict, row.agreeing) == (pytest.approx(p), verdict, f"{so} of {of} runs")
    assert counted("so", []).verdict == UNMEASURED


def sample(values, words="A"):
    return Sample(words, dict(enumerate(values)))


TENS, ABOVE = [10, 20, 30, 40, 50], [10.1, 20.1, 30.1, 40.1, 50.1]


@pytest.mark.parametrize(
    ("these", "those", "paired", "p", "verdict", "agreeing"),
    [
        ([3, 4, 5], [0, 1, 2], False, 1 / 20, HOLDS, "3 of 3"),
        ([0, 1, 2], [3, 4, 5], False, 1 / 20, FAILS, "0 of 3"),
        ([3, 4, 5], [0, 1, 3.5], False, 2 / 20, UNDECIDED, "3 of 3"),
        ([5, 7, 8, 9, 10], [1, 2, 3, 4, 6], False, 2 / 252, HOLDS, "5 of 5"),
        ([8, 9], [0, 1, 2], False, 1 / 10, UNDECIDED, "2 of 2"),  # two seeds decide nothing
        ([1, 2], [1, 2], False, 5 / 6, UNDECIDED, "0 of 2"),
        (ABOVE, TENS, True, 1 / 32, HOLDS, "5 of 5"),
        (ABOVE, TENS, False, 105 / 252, UNDECIDED, "5 of 5"),  # of the sums of five tens 104 are above 150, 44 are 150
        ([2, 4, 3], [1, 2, 6], True, 5 / 8, UNDECIDED, "2 of 3"),
        ([5, 6, 7], [0, 1, 2, 99, 99], True, 1 / 8, UNDECIDED, "3 of 3"),  # pairs of the seeds that both have
        ([0.1, 0.2, 0.0], [0.0, 0.0, 0.3], True, 5 / 8, UNDECIDED, "2 of 3"),  # 0.1 + 0.2 counts as equal to 0.3
    ],
)
def test_one_beats_the_other_or_is_beaten_when_the_test_says_so_at_five_percent(
    these, those, paired, p, verdict, agreeing
):
    row = beats(sample(these), sample(those, "B"), paired=paired)
    kept = those[: len(these)] if paired else those
    assert float(row.difference.split()[0]) == pytest.approx(np.mean(these) - np.mean(kept), abs=0.006)
    assert (row.p, row.verdict, row.agreeing) == (pytest.approx(p), verdict, agreeing)


def test_a_sample_is_above_a_number_or_another_by_more_than_one_as_the_interval_says():
    kernels, start = sample([0.61, 0.62, 0.63, 0.64, 0.65], "trained"), sample([0.5] * 5, "untrained")
    row = beats(kernels, start, paired=True, form="{:.3f}", by=0.1)
    words = "trained 0.630 (0.610 to 0.650, 5 seeds) against untrained 0.500 (0.500 to 0.500, 5 seeds), pairs, by more"
    assert row == Row(f"{words} than 0.100", HOLDS, "+0.130", "+0.110 to +0.150", "5 of 5", 1 / 32)
    assert beats(kernels, start, paired=True, by=0.11).verdict == UNDECIDED
    assert beats(kernels, start, paired=True, by=0.2).verdict == FAILS
    assert beats(sample([0.4] * 5), sample([0.0] * 5, "B"), True, within=0.5).p == 1 / 32, "the larger of both tests'"
    accuracies = sample([97, 98, 98, 98, 99], "GRU")
    row = beats(accuracies, by=96.5)
    words = "GRU 98.00 % (97.00 % to 99.00 %, 5 seeds) above 96.50 %"
    assert row == Row(words, HOLDS, "+1.50 points", "+0.50 to +2.50", "5 of 5", 1 / 32)
    assert [beats(accuracies, by=number).verdict for number in (98, 99.5)] == [UNDECIDED, FAILS]


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
    row = beats(sample([value + sign * difference for value in FIVE]), sample(FIVE, "B"), paired, within=margin)
    assert float(row.difference.split()[0]) == pytest.approx(sign * difference)
    assert (row.verdict, f"similar within {margin:g} to" in row.words) == (verdict, True)


def test_what_was_not_measured_is_told_as_such_and_settles_nothing():
    for pair in ((sample([], "GRU"), sample([95], "RNN")), (sample([95], "RNN"), sample([], "GRU"))):
        row = beats(*pair)
        assert (row.p, row.verdict) == (None, UNMEASURED)
        assert {*row.words.split(" against ")} == {"GRU (not measured)", "RNN 95.00 % (95.00 % to 95.00 %, 1 seed)"}


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([HOLDS], HOLDS),
        ([HOLDS, HOLDS], "holds (all 2 parts)"),
        ([HOLDS, UNDECIDED], "1 hold, 1 undecided"),
        ([FAILS, UNDECIDED, HOLDS, HOLDS, UNMEASURED], "2 hold, 1 do not, 1 undecided, 1 not measured"),
    ],
)
def test_a_claim_of_several_parts_tells_all_of_them(verdicts, expected):
    assert visualize.verdict_of([Row("", verdict) for verdict in verdicts]) == expected


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
        base = {"rnn": min(60 + config.hidden_size, 96), "gru": 97.7 + config.hidden_size / 30}
        base["lstm"] = 97.8 + config.hidden_size / 100
        base = base[config.cell] - abs(np.log10(config.lr / 1e-3))
    return base - 10 * (config.optimizer == "sgd")


ALL, PARTLY = "{} (all {} parts)".format, "{} hold, {} do not".format
AS_REPORTED = {"1": ALL(HOLDS, 2), "2": ALL(HOLDS, 2), "3": ALL(HOLDS, 3), "4a": ALL(HOLDS, 5), "4b": HOLDS}
AS_REPORTED |= {"5": ALL(HOLDS, 32), "6": ALL(HOLDS, 6), "7a": HOLDS, "7b": HOLDS, "8": ALL(HOLDS, 4)}
OPPOSITE = {"1": ALL(FAILS, 2), "2": PARTLY(1, 1), "3": ALL(FAILS, 3), "4a": ALL(FAILS, 5), "6": ALL(FAILS, 6)}
OPPOSITE = AS_REPORTED | OPPOSITE | {"8": PARTLY(1, 3)}


@pytest.mark.parametrize(
    ("accuracy", "expected"),
    [(as_reported, AS_REPORTED), (lambda config: 100 - as_reported(config), OPPOSITE)],
    ids=["as reported", "the opposite"],
)
def test_the_reports_claims_follow_from_the_runs_of_its_settings(call, tmp_path, accuracy, expected):
    for config in (*(row.config for row in visualize.REPORT), rnn_config("rnn", 55), rnn_config("rnn", 64)):
        invent_seeds(tmp_path, config, [accuracy(config) + 0.01 * seed for seed in range(5)])
    folder, _ = compare(call, tmp_path, "claims")
    assert settled_in(folder) == expected
    untested = "9, 10a, 10b, 1b, 11, 12, 13, 14, 15a, 15b, 15c, 15d, 16, 17, 18a, 18b, 18c, 19, 20"
    words = f"\nNot tested with these runs: {untested}; the shipped verdicts stand in {visualize.SHIPPED}.\n"
    assert words in (folder / "claims.md").read_text()


@pytest.mark.parametrize(
    ("configs", "options", "tested"),
    [
        ([rnn_config("rnn", 5), rnn_config("rnn", 5, optimizer="sgd")], {}, {"1", "5"}),
        ([rnn_config("gru"), rnn_config("lstm")], {"epochs": 12}, {"5", "7a", "7b"}),
        ([rnn_config("gru"), rnn_config("lstm")], {"epochs": 9}, None),
        ([rnn_config("gru"), rnn_config("lstm")], {"source": "synthetic"}, None),
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


def test_escapes_are_counted_up_to_the_epoch_of_the_comparison_at_the_usual_rate(call, tmp_path):
    shut, late, after = [11.35] * 10, [11.35] * 3 + [90] * 7, [11.35] * 10 + [90] * 2
    falling, opened = [0.5**epoch for epoch in range(13)], [1e-4] * 4 + [0.3] * 7
    for seed, (grown, norms) in enumerate(((shut, falling[:11]), (late, opened), (after, falling))):
        invent_blank_rows(tmp_path, rnn_config("lstm", rows_after=2, seed=seed), grown, norms)
    invent_blank_rows(tmp_path, rnn_config("gru", rows_after=2, keep_bias=1.0), late, [0.3] * 11)
    invent_blank_rows(tmp_path, rnn_config("gru", rows_after=2, lr=1e-2), shut, [0.3] * 11)
    invent_blank_rows(tmp_path, rnn_config("gru", 8, rows_after=2), shut, [0.3] * 11)
    invent_blank_rows(tmp_path, rnn_config("rnn", rows_after=28), late, [1e-6] * 3 + [1e-5] * 8)
    invent_blank_rows(tmp_path, rnn_config("rnn", rows_after=28, seed=1), shut, falling[:11])
    invent_blank_rows(tmp_path, rnn_config("rnn", rows_after=28, keep_bias=3.0), shut, falling[:11])
    folder, _ = compare(call, tmp_path, "claims")
    section = (folder / "claims.md").read_text().partition("## 14. ")[2].partition("\n## ")[0]
    assert re.findall(r"(\d of \d) runs", section) == ["2 of 2", "1 of 2", "2 of 2", "0 of 1"]


def test_what_the_state_knows_is_compared_after_half_of_the_digit_all_of_it_and_the_blank_rows(call, tmp_path):
    for cell, bias, lr, known in (("rnn", 10.0, 1e-4, (70, 63, 56)), ("gru", 2.0, 1e-3, (84, 97, 98))):
        config = rnn_config(cell, rows_after=56, keep_bias=bias, lr=lr)
        for path in invent_seeds(tmp_path, config, [90] * 5):
            rows = zip((14, 28, 84), known, strict=True)
            invent_table(path, "reading", [{"rows": number, "known": value} for number, value in rows])
    compare(call, tmp_path, "claims")
    assert settled_in(tmp_path / "comparison")["20"] == "4 hold, 2 not measured"


def test_what_permuting_takes_is_compared_seed_by_seed(call, tmp_path):
    for cell, lost in (("rnn", 1), ("gru", 3)):
        for pixels, values in (("in-place", [90, 96, 93]), ("permuted", [90 - lost, 96 - lost])):
            invent_seeds(tmp_path, rnn_config(cell, pixels=pixels), values)
    folder, _ = compare(call, tmp_path, "claims")
    assert "| +2.00 points | -∞ to +∞ | 2 of 2 |" in (folder / "claims.md").read_text().partition("## 18c. ")[2]
    assert settled_in(folder)["18c"] == "1 undecided, 1 not measured"


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
