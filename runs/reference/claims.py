"""Test the claims of the reference report, and our own, on trained runs.

    python -m runs.reference.claims             test the shipped runs
    python -m runs.reference.claims FOLDER      test the runs in FOLDER
The tables are written to claims.md in the same folder.
"""

import math
import re
from collections import Counter, namedtuple
from dataclasses import replace
from functools import partial
from pathlib import Path

import cnn_cifar10
import rnn_mnist
import utils
import visualize
from visualize import ALPHA, FAILS, HOLDS, UNDECIDED, UNMEASURED, Comparison, Measurements, SavedRun

import numpy as np

EPOCHS = 10  # accuracies are compared after this epoch
CHANCE_LEVEL = 15  # percent; a network above it has begun to learn
SHARED = {"optimizer": "adam", "momentum": 0.0, "pixels": "in-place", "seed": 0}
CNN = cnn_cifar10.Config(dataset="cifar10", without="nothing", lr=1e-4, batch_size=128, **SHARED)
ROWS = {"rows_before": 0, "rows_after": 0, "keep_bias": None, "gates": "full"}
RNN = rnn_mnist.Config(cell="rnn", hidden_size=30, lr=1e-3, batch_size=64, **ROWS, **SHARED)
GRU = replace(RNN, cell="gru")
LSTM = replace(RNN, cell="lstm")
CNN_MNIST = replace(CNN, dataset="mnist")
CNN_TUNED_SGD = replace(CNN, optimizer="sgd", lr=0.02, momentum=0.9)
RNN_5 = replace(RNN, hidden_size=5)
BEST_RNN_56 = replace(RNN, lr=1e-4, rows_after=56, keep_bias=10.0)  # the best plain RNN with 56 blank rows
GRU_56 = replace(GRU, rows_after=56, keep_bias=2.0)
LSTM_56 = replace(LSTM, rows_after=56, keep_bias=2.0)
SAME_WEIGHTS = ((GRU, 55), (LSTM, 64))  # units that give an RNN, or constant gates, as many weights

# Measuring and testing; runs is always a dict from a Config to its SavedRuns -----------------------------------------


def short_label(config, other=None):
    """Return a Config's network and those of its settings that are unusual or differ from another Config of it."""
    usual = replace(CNN, dataset=config.dataset) if config.script == CNN.script else replace(RNN, cell=config.cell)
    same_network = [other] if other and other.network == config.network else []
    label = visualize.label_configs([config, usual, *same_network])[0][0]
    return f"{config.network}, {label}" if label else config.network


def measure(runs, config, label, function, *arguments):
    """Return the Measurements of function(run, *arguments), without the runs for which it is None."""
    values = {run.config.seed: function(run, *arguments) for run in runs.get(config, [])}
    return Measurements(label, {seed: value for seed, value in values.items() if value is not None})


def accuracy(runs, config, label="", epoch=EPOCHS):
    """Return the Measurements of the test accuracy in percent after an epoch."""
    return measure(runs, config, label or short_label(config), SavedRun.test_accuracy, epoch)


def table_median(run, table, column, where):
    """Return the median of a column in the rows of a table that hold the values in where, a dict."""
    rows = visualize.read_table(run, table) if run.epoch == EPOCHS else []
    values = [float(row[column]) for row in rows if where.items() <= row.items()]
    return float(np.median(values)) if values else None


def rise_of_update_gate(run, layer, epoch):
    """Return a GRU's mean update gate in the blank rows minus that in rows 8 to 20, in points; None if at chance."""
    has_learned = run.epoch == epoch and run.test_accuracy(epoch) > CHANCE_LEVEL
    rows = visualize.read_table(run, "gates") if has_learned else []
    means = [100 * float(row["mean"]) for row in rows if row["gate"] == "update" and row["layer"] == str(layer)]
    return float(np.mean(means[28:]) - np.mean(means[7:20])) if means else None


def log_gradient(run, row, is_share=False):
    """Return log10 of the loss gradient's norm at a row before training; is_share: relative to the last row's."""
    norms = visualize.parse_gradients(visualize.read_table(run, "gradients")).get(0)
    return None if norms is None else math.log10(norms[row] / (norms[-1] if is_share else 1))


def compare(first, second, paired=False, above=0, below=math.inf, unit="%"):
    """Test whether the difference of the means, first minus second, lies between above and below."""
    lower = visualize.compare(first, second, above, unit, paired)
    upper = visualize.compare(second, first, -below, unit, paired)
    if (above, below) != (0, math.inf):
        claimed = f"{above:g} to {below:g}".replace(" to inf", " or more").replace("-inf to ", "at most ")
        lower = replace(lower, label=f"{lower.label}; claimed difference: {claimed}")
    if lower.verdict == UNMEASURED:
        return lower
    verdicts = (lower.verdict, upper.verdict)
    verdict = FAILS if FAILS in verdicts else UNDECIDED if UNDECIDED in verdicts else HOLDS
    agreeing = lower.agreeing + upper.agreeing - lower.total
    return replace(lower, verdict=verdict, agreeing=agreeing, p=max(lower.p, upper.p))


def compare_accuracy(runs, first, second, above=0, below=math.inf):
    """Test the accuracies of two settings; runs of one seed are pairs if weights and order of images start the same."""
    second_label = visualize.label_configs([first, second])[0][1] if first.network == second.network else ""
    values = accuracy(runs, first, short_label(first, second)), accuracy(runs, second, second_label)
    return compare(*values, visualize.starts_equal(first, second), above, below)


def compare_to_number(measurements, number, above=0, below=math.inf, unit="%"):
    """Test by sign flips whether the mean of Measurements minus a number lies between above and below."""
    numbers = Measurements("", dict.fromkeys(measurements.values, number))
    result = compare(measurements, numbers, True, above, below, unit)
    claimed = f"claimed: {'above' if below == math.inf else 'below'} {number} {unit}"
    return replace(result, label=f"{measurements.summary(unit)}; {claimed}")


def count_rises(runs, configs, label, earliest, latest, last=EPOCHS):
    """Sign test: do most runs of at least `last` epochs first exceed chance between two epochs?"""
    counted = [run for config in configs for run in runs.get(config, []) if run.epoch >= last]
    epochs = []
    for run in counted:
        above_chance = [row["epoch"] for row in run.history[:last] if row["test_accuracy"] > CHANCE_LEVEL]
        epochs.append(min(above_chance, default=math.inf))
    if not epochs:
        return Comparison(label, UNMEASURED)
    total = len(epochs)
    count = sum(earliest <= epoch <= latest for epoch in epochs)
    p = sum(math.comb(total, more) for more in range(count, total + 1)) / 2**total
    opposite_p = sum(math.comb(total, fewer) for fewer in range(count + 1)) / 2**total
    verdict = HOLDS if p <= ALPHA else FAILS if opposite_p <= ALPHA else UNDECIDED
    found = ", ".join(f"{epoch:g}" for epoch in epochs).replace("inf", "never")
    label += f" in {count} of {total} runs (first epoch: {found})"
    return Comparison(label, verdict, agreeing=count, total=total, p=min(p, opposite_p))


def benjamini_hochberg(p_values):
    """Return the largest p-value that stays significant if the false discovery rate is at most ALPHA (1995), or 0."""
    ordered = np.sort(p_values)
    passing = ordered[ordered <= ALPHA * np.arange(1, len(ordered) + 1) / len(ordered)]
    return passing[-1] if len(passing) else 0


# The claims, a function each. All settings are written out, so that no default changes a verdict ---------------------

Claim = namedtuple("Claim", "kind sentence test")  # test(runs): yields a Comparison for each part
CLAIMS = {}  # by number


def register(kind, number, sentence):
    """Return a decorator that registers the test of a claim."""

    def decorate(test):
        CLAIMS[number] = Claim(kind, sentence, test)
        return test

    return decorate


report_claim = partial(register, "The report's claims")
question = partial(register, "Our further questions")
prediction = partial(register, "Predictions made before the runs")


@report_claim("1", "Adam beats SGD on both tasks, at the report's learning rates.")
def adam_beats_sgd(runs):
    for config in (CNN, RNN_5):
        yield compare_accuracy(runs, config, replace(config, optimizer="sgd"))


@report_claim("2", "For the CNN a learning rate of 1e-4 is the best, and 1e-3 is similar (within 1 point).")
def best_rate_of_cnn(runs):
    yield compare_accuracy(runs, CNN, replace(CNN, lr=1e-3))
    yield compare_accuracy(runs, CNN, replace(CNN, lr=1e-3), above=-1, below=1)


@report_claim("3", "For the RNN with 5 units 1e-3 is the best learning rate of 1e-1, 1e-3, 1e-4 and 1e-5.")
def best_rate_of_rnn(runs):
    for lr in (1e-1, 1e-4, 1e-5):
        yield compare_accuracy(runs, RNN_5, replace(RNN_5, lr=lr))


@report_claim("4a", "More hidden units give a higher accuracy, with every cell.")
def more_units(runs):
    for config, more, fewer in ((RNN, 10, 5), (RNN, 20, 10), (RNN, 30, 20), (GRU, 30, 20), (LSTM, 30, 20)):
        yield compare_accuracy(runs, replace(config, hidden_size=more), replace(config, hidden_size=fewer))


@report_claim("4b", "LSTMs with 20 and with 30 units are nearly identical (within 0.5 points).")
def sizes_of_lstm(runs):
    yield compare_accuracy(runs, LSTM, replace(LSTM, hidden_size=20), above=-0.5, below=0.5)


@report_claim("5", "More epochs give a higher accuracy: ten give more than one and than five.")
def more_epochs(runs):
    settings = [CNN, replace(CNN, optimizer="sgd"), replace(CNN, lr=1e-3), CNN_MNIST, replace(RNN_5, optimizer="sgd")]
    settings += [replace(RNN_5, lr=lr) for lr in (1e-1, 1e-3, 1e-4, 1e-5)]
    sizes = ((RNN, 10), (RNN, 20), (RNN, 30), (GRU, 20), (GRU, 30), (LSTM, 20), (LSTM, 30))
    settings += [replace(config, hidden_size=size) for config, size in sizes]
    for config in settings:
        late = accuracy(runs, config, f"{short_label(config)}, epoch {EPOCHS}")
        for epoch in (1, 5):
            yield compare(late, accuracy(runs, config, f"epoch {epoch}", epoch), paired=True)


@report_claim("6", "GRU and LSTM beat plain RNNs with the same number of units and of weights.")
def gated_cells_win(runs):
    for config, same_weights in SAME_WEIGHTS:
        for size, plain_size in ((20, 20), (30, 30), (30, same_weights)):
            yield compare_accuracy(runs, replace(config, hidden_size=size), replace(RNN, hidden_size=plain_size))


@report_claim("8", "On MNIST the CNN beats RNN, GRU and LSTM, and the GRU comes within 0.5 points of it.")
def cnn_beats_cells(runs):
    for config in (RNN, GRU, LSTM):
        yield compare_accuracy(runs, CNN_MNIST, config)
    yield compare_accuracy(runs, GRU, CNN_MNIST, above=-0.5, below=0.5)


@report_claim("9", "Training makes the CNN's first kernels resemble Gabor functions (R² rises by over 0.1).")
def kernels_resemble_gabor_functions(runs):
    for config in (CNN, replace(CNN, lr=1e-3), CNN_TUNED_SGD):
        label = f"median R² of Gabor fits, {short_label(config)}, trained"
        trained = measure(runs, config, label, table_median, "gabor", "r2", {"kernels": "trained"})
        untrained = measure(runs, config, "untrained", table_median, "gabor", "r2", {"kernels": "untrained"})
        yield compare(trained, untrained, paired=True, above=0.1, unit="")


@report_claim("10a", "Before training the gradient reaches further back in gated cells than in the plain RNN.")
def gradients_reach_further(runs):
    for config in (GRU, LSTM):
        label = f"log10 of the share of the gradient at the first row, {config.network}"
        gated = measure(runs, config, label, log_gradient, 0, True)
        yield compare(gated, measure(runs, RNN, "RNN", log_gradient, 0, True), unit="decades")


@report_claim("10b", "Gated cells remember for longer: they beat the plain RNN with 28 and 56 blank rows.")
def gated_cells_remember(runs):
    for rows in (28, 56):
        for config in (GRU, LSTM):
            yield compare_accuracy(runs, replace(config, rows_after=rows), replace(RNN, rows_after=rows))


@question("1b", "SGD with a rate tuned on test accuracy beats Adam at the report's rates and, for the CNN, at 1e-3.")
def tuned_sgd_beats_adam(runs):
    yield compare_accuracy(runs, CNN_TUNED_SGD, CNN)
    yield compare_accuracy(runs, CNN_TUNED_SGD, replace(CNN, lr=1e-3))
    yield compare_accuracy(runs, replace(RNN, optimizer="sgd", lr=0.01), RNN)


@question("11", "B decides whether an LSTM learns with blank rows; without them it changes less than 1 point.")
def initial_bias_decides(runs):
    yield compare_accuracy(runs, replace(LSTM, rows_after=28, keep_bias=1.0), replace(LSTM, rows_after=28))
    yield compare_accuracy(runs, LSTM_56, replace(LSTM_56, keep_bias=1.0))
    for bias, other in ((1.0, None), (2.0, None), (2.0, 1.0)):
        yield compare_accuracy(runs, replace(LSTM, keep_bias=bias), replace(LSTM, keep_bias=other), above=-1, below=1)


@question("12", "The CNN loses more without fc1 (98.5 % of its weights) than without conv1 or conv2.")
def fc1_matters_most(runs):
    for lr in (1e-4, 1e-3):
        for layer in ("conv1", "conv2"):
            yield compare_accuracy(runs, replace(CNN, lr=lr, without=layer), replace(CNN, lr=lr, without="fc1"))


def probe_accuracy(runs, layer, network="trained"):
    """Return the Measurements of a linear probe on a layer of the CNN."""
    where = {"layer": layer, "network": network}
    return measure(runs, CNN, f"{layer} ({network} network)", table_median, "layers", "accuracy", where)


@question("13", "A linear classifier is more accurate on each later layer, and on trained than on untrained layers.")
def layers_become_readable(runs):
    for later, earlier in (("pool1", "pixels"), ("pool2", "pool1"), ("fc1", "pool2")):
        yield compare(probe_accuracy(runs, later), probe_accuracy(runs, earlier), paired=True)
    for layer in ("pool1", "pool2", "fc1"):
        yield compare(probe_accuracy(runs, layer), probe_accuracy(runs, layer, "untrained"), paired=True)


@question("16", "With blank rows and PyTorch's initialisation, most runs exceed chance within 30 epochs.")
def most_runs_rise_above_chance(runs):
    for config, rows in ((GRU, 56), (LSTM, 28), (LSTM, 56), (RNN, 28), (RNN, 56)):
        rates = (1e-4, 1e-3, 3e-3) if config is RNN else (1e-3, 3e-3, 1e-2)
        label = (
            f"{config.network}, {rows} blank rows, learning rates {rates[0]} to {rates[2]}: above chance in 30 epochs"
        )
        yield count_rises(runs, [replace(config, lr=lr, rows_after=rows) for lr in rates], label, 1, 30, last=30)


@question("17", "Without blank rows the GRU stays ahead after 50 epochs, and ahead of RNNs with other rates or B.")
def gru_stays_ahead(runs):
    yield compare(accuracy(runs, GRU, "GRU, epoch 50", 50), accuracy(runs, RNN, "RNN", 50))
    for lr, bias in ((3e-4, None), (3e-3, None), (1e-3, 3.0), (1e-3, 10.0)):
        yield compare_accuracy(runs, GRU, replace(RNN, lr=lr, keep_bias=bias))


@question("18", "Permuting the pixels costs all networks accuracy, gated RNNs most, and the CNN stays ahead.")
def permuting_costs_accuracy(runs):
    for config in (CNN_MNIST, RNN, GRU, LSTM):
        yield compare_accuracy(runs, config, replace(config, pixels="permuted"))
    for config in (RNN, GRU, LSTM):
        yield compare_accuracy(runs, replace(CNN_MNIST, pixels="permuted"), replace(config, pixels="permuted"))
    losses = []
    for config in (RNN, GRU, LSTM):
        before, after = accuracy(runs, config).values, accuracy(runs, replace(config, pixels="permuted")).values
        lost = {seed: before[seed] - after[seed] for seed in before if seed in after}
        losses.append(Measurements(f"{config.network} loses", lost))
    for loss in losses[1:]:
        yield compare(loss, losses[0], unit="points")


@question("19", "A larger gradient is not enough: RNNs with B = 10 have one, yet GRUs with B = 1 win.")
def gradient_is_not_enough(runs):
    gru = replace(GRU_56, keep_bias=1.0)
    plain = measure(runs, BEST_RNN_56, f"log10 of the gradient, {short_label(BEST_RNN_56)}", log_gradient, 27)
    yield compare(plain, measure(runs, gru, short_label(gru), log_gradient, 27), unit="decades")
    yield compare_accuracy(runs, gru, BEST_RNN_56)


@question("20", "With 56 blank rows RNNs (B = 10) forget the digit; GRUs and LSTMs (B = 2) do not.")
def plain_rnns_forget(runs):
    comparisons = [(BEST_RNN_56, 14, 28), (BEST_RNN_56, 28, 84), (GRU_56, 28, 14), (GRU_56, 84, 28)]
    for config, better, worse in [*comparisons, (LSTM_56, 28, 14), (LSTM_56, 84, 28)]:
        label = f"recognised from the state, {short_label(config)}, after row {better}"
        first = measure(runs, config, label, table_median, "reading", "known", {"rows": str(better)})
        second = measure(runs, config, f"row {worse}", table_median, "reading", "known", {"rows": str(worse)})
        yield compare(first, second, paired=True)


def best_constant_gates(runs, config):
    """Return the setting with constant gates and B = 2 or B = 4, whichever has the higher mean accuracy."""
    smaller, larger = (replace(config, gates="constant", keep_bias=bias) for bias in (2.0, 4.0))
    result = compare_accuracy(runs, larger, smaller)
    return larger if result.difference is not None and result.difference > 0 else smaller


@question(
    "21",
    "Constant gates beat plain RNNs, input-only gates beat these, and full gates beat all, also with 56 blank rows.",
)
def each_step_gains(runs):
    for plain, cells in ((RNN, (GRU, LSTM)), (BEST_RNN_56, (GRU_56, LSTM_56))):
        for full in cells:
            constant = replace(full, gates="constant") if plain is RNN else best_constant_gates(runs, full)
            input_only = replace(full, gates="input")
            for better, worse in ((constant, plain), (input_only, constant), (full, input_only)):
                yield compare_accuracy(runs, better, worse)


@prediction("15a", "GRUs with B = 1 or 2 end above 97 % with 56 blank rows; B = 2 is above chance after one epoch.")
def grus_learn(runs):
    for bias in (1.0, 2.0):
        yield compare_to_number(accuracy(runs, replace(GRU_56, keep_bias=bias)), 97)
    yield count_rises(runs, [GRU_56], f"{short_label(GRU_56)}: above chance after the first epoch", 1, 1)


@prediction("15b", "A plain RNN with B = 3 is above chance by epoch 2 and ends above 85 % with 56 blank rows.")
def plain_rnn_with_3_learns(runs):
    for lr in (1e-3, 1e-4):
        config = replace(RNN, lr=lr, rows_after=56, keep_bias=3.0)
        yield count_rises(runs, [config], f"{short_label(config)}: above chance by epoch 2", 1, 2)
        yield compare_to_number(accuracy(runs, config), 85)


@prediction("15c", "With 28 blank rows an LSTM with B = 0.5 stays at chance; with 56, B = 1.5 learns, but late.")
def lstm_needs_more(runs):
    stuck = replace(LSTM, rows_after=28, keep_bias=0.5)
    late = replace(LSTM_56, keep_bias=1.5)
    yield count_rises(runs, [stuck], f"{short_label(stuck)}: above chance in no epoch", math.inf, math.inf)
    yield compare_to_number(accuracy(runs, late), 97)
    yield count_rises(runs, [late], f"{short_label(late)}: above chance after the first epoch", 2, EPOCHS)


@prediction(
    "P1", "On ordinary MNIST constant gates end at least 1.5 points below full gates and at most 2.5 above the RNN."
)
def constant_gates_lose_the_lead(runs):
    for config, same_weights in SAME_WEIGHTS:
        constant = replace(config, gates="constant")
        yield compare_accuracy(runs, config, constant, above=1.5)
        yield compare_accuracy(runs, constant, RNN, above=-math.inf, below=2.5)
        yield compare_accuracy(runs, config, replace(constant, hidden_size=same_weights))


@prediction("P2", "On ordinary MNIST, cells with input-only gates finish less than 1 point below full gates.")
def input_gates_lose_little(runs):
    for config in (GRU, LSTM):
        yield compare_accuracy(runs, config, replace(config, gates="input"), above=-math.inf, below=1)


@prediction("P3", "With 56 blank rows, constant gates finish above the best plain RNN and below 92 %.")
def constant_gates_between(runs):
    for config in (GRU_56, LSTM_56):
        constant = best_constant_gates(runs, config)
        yield compare_accuracy(runs, constant, BEST_RNN_56)
        yield compare_to_number(accuracy(runs, constant), 92, above=-math.inf, below=0)


@prediction("P4", "With 56 blank rows, input-only gates finish above 93 % and below full gates.")
def input_gates_between(runs):
    for config in (GRU_56, LSTM_56):
        restricted = replace(config, gates="input")
        yield compare_to_number(accuracy(runs, restricted), 93)
        yield compare_accuracy(runs, config, restricted)


@prediction("P5", "A GRU's update gates keep more in the 56 blank rows than in rows 8 to 20 of the digit.")
def update_gates_keep_more(runs):
    for config, epoch in ((GRU_56, EPOCHS), (replace(GRU, lr=3e-3, rows_after=56), 30)):
        for layer in (1, 2):
            label = f"update gate of layer {layer}, blank rows minus rows 8 to 20, {short_label(config)}, epoch {epoch}"
            yield compare_to_number(measure(runs, config, label, rise_of_update_gate, layer, epoch), 0, unit="points")


# claims.md -----------------------------------------------------------------------------------------------------------

VERDICTS = (FAILS, UNDECIDED, HOLDS, UNMEASURED)
IN_PART = "holds in part"
INTRO = """# The claims

`python -m runs.reference.claims` writes this page. [README.md](README.md#is-the-report-right) says in words where each
claim of the report holds.

- Each claim is tested in parts. A part *holds* if the 90 % interval of a difference lies in the claimed range (above 0,
  unless stated otherwise), *does not hold* if it lies outside, and is *undecided* otherwise. If only some parts hold,
  the claim *holds in part*.
- The tables show the weakest part of each claim: one that does not hold, otherwise an undecided one, otherwise the one
  with the smallest difference. "A: x against B: y" gives means over the seeds; the difference is x - y."""
DETAILS = """## All parts of the claims

Where no setting is named, LeNet-5 learns with Adam at 1e-4, and recurrent networks have 30 units and PyTorch's
initialisation and learn with Adam at 1e-3. B is the initial bias of the gates. A decade is a factor of ten.

Values are given with their range and the number of seeds. "Seen in" counts the seeds, or runs, for which the sentence
is true; p is the smaller of two one-sided p-values: for the claim and for its opposite. There is no claim 7 or 14."""


def size_if_it_holds(part):
    """Return the size of a part's difference if the part holds, otherwise 0."""
    if part.verdict != HOLDS:
        return 0
    return math.inf if part.difference is None else abs(part.difference)


def overview(kind, results):
    """Return a table of the claims of a kind, with their verdicts and weakest parts."""
    rows = [("", "claim", "verdict: parts that hold", "weakest part", "difference (90 % interval)"), ("---",) * 5]
    numbers = {HOLDS: [], IN_PART: [], UNDECIDED: [], FAILS: []}
    for number, parts in results.items():
        if CLAIMS[number].kind == kind:
            verdicts = [part.verdict for part in parts]
            weakest = min(parts, key=lambda part: (VERDICTS.index(part.verdict), size_if_it_holds(part)))
            verdict = IN_PART if HOLDS in verdicts and len(set(verdicts)) > 1 else weakest.verdict
            numbers[verdict].append(number)
            counted = f"{verdict}: {verdicts.count(HOLDS)} of {len(parts)}"
            label = re.sub(r" \([^()]*(seeds?|epoch:.*)\)|, paired by seed", "", weakest.label)
            interval = f" ({weakest.interval_text})" if weakest.interval_text else ""
            rows.append((number, CLAIMS[number].sentence, counted, label, weakest.difference_text + interval))
    lists = [f"{verdict}: {', '.join(found)}" for verdict, found in numbers.items() if found]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)  # not aligned: some cells are long
    return f"**{kind}** ({'; '.join(lists)})\n\n{table}"


def details(number, parts):
    """Return the table of a claim's parts, below its sentence."""
    rows = []
    for part in parts:
        seen_in = "" if part.total is None else f"{part.agreeing} of {part.total}"
        p = "" if part.p is None else "< 0.0001" if part.p < 1e-4 else f"{part.p:.4f}"
        rows.append((part.label, part.difference_text, part.interval_text, seen_in, p, part.verdict))
    columns = ("part", "difference", "90 % interval", "seen in", "p", "verdict")
    return f"## {number}. {CLAIMS[number].sentence}\n\n{utils.markdown_table(columns, rows)}"


def format_claims(runs):
    """Return the text of claims.md. Raises InputError if these runs test no claim."""
    results = {number: list(claim.test(runs)) for number, claim in CLAIMS.items()}
    results = {number: parts for number, parts in results.items() if {part.verdict for part in parts} != {UNMEASURED}}
    if not results:
        raise utils.InputError("no claim can be tested with these runs; see runs/reference/claims.md")
    tested = [part for parts in results.values() for part in parts if part.verdict != UNMEASURED]
    limit = benjamini_hochberg([min(1, 2 * part.p) for part in tested]) / 2  # doubled: p is one-sided
    counts = Counter(part.verdict for part in tested)
    summary = f"Of {len(tested)} parts {counts[HOLDS]} hold, {counts[FAILS]} do not, {counts[UNDECIDED]} are undecided."
    kept = sum(part.p <= limit for part in tested)
    summary += f" After a correction for so many tests, {kept} with a one-sided p up to {limit:.4f} remain decided."
    tables = [overview(kind, results) for kind in dict.fromkeys(CLAIMS[number].kind for number in results)]
    sections = [details(number, parts) for number, parts in results.items()]
    pooled = [config.caption for config, group in runs.items() if visualize.pooled_conditions(group)]
    pooling = f"Settings whose runs differ in precision or device: {'; '.join(pooled) or 'none'}."
    return "\n\n".join([INTRO, *tables, DETAILS, summary, pooling, *sections]) + "\n"


@utils.exit_with_status()
def main():
    """Write claims.md into the folder that the command line names."""
    parser = utils.Parser(__doc__)
    parser.add_argument("folder", nargs="?", type=utils.parse_folder, default=Path(__file__).parent, metavar="FOLDER")
    args = parser.parse_args()
    real_runs = [run for run in visualize.find_runs(args.folder, Path("data")) if not run.source_suffix]
    groups = visualize.group_runs(real_runs) if real_runs else []
    visualize.save_outputs({"claims.md": format_claims({group.config: group.runs for group in groups})}, args.folder)


if __name__ == "__main__":
    main()
