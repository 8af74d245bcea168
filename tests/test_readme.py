"""The texts: their commands can be typed, their code runs, and their defaults and numbers are the right ones."""

import re
import shlex

import cnn_cifar10
import rnn_mnist
import utils
import visualize

import pytest
from conftest import ROOT, read_csv

PATHS = ("README.md", "runs/reference/README.md", "runs/reference/predictions.md")
TEXTS = {path: (ROOT / path).read_text(encoding="utf-8") for path in PATHS}
README = TEXTS["README.md"]
SCRIPTS = {"cnn_cifar10.py": cnn_cifar10, "rnn_mnist.py": rnn_mnist}
# Numbers in the texts that are neither in results.csv nor in claims.md, and where they are from
OTHER_NUMBERS = {"98.5 %": "the share of LeNet-5's weights in fc1, 4,195,328 of 4,257,674"}


def code_blocks(text):
    """Return the code blocks of a Markdown text, indented or fenced, without the indentation."""
    indented = re.findall(r"(?<=\n\n)(?:    .*\n)+", text)
    fenced = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [re.sub("^    ", "", block, flags=re.MULTILINE) for block in indented] + fenced


def commands(text):
    """Return (path of the script, flags) of each command in the code of a text."""
    found = []
    for code in [*code_blocks(text), *re.findall(r"`([^`\n]+)`", text)]:
        for command in re.split(r"\n| && ", code):
            match = re.fullmatch(r"(\$ )?(python |torchrun .* )?(\S+\.py)( .*?)?( +# .*)?", command)
            if match and (match[2] or match[4]):
                found.append((match[3], (match[4] or "").strip()))
    return found


COMMANDS = list(dict.fromkeys(command for text in TEXTS.values() for command in commands(text)))


@pytest.mark.parametrize(("script", "flags"), [command for command in COMMANDS if command[0] in SCRIPTS])
def test_training_commands_ask_for_experiments(requested, script, flags):
    assert requested(SCRIPTS[script], *shlex.split(flags))


@pytest.mark.parametrize(("script", "flags"), [command for command in COMMANDS if command[0] == "visualize.py"])
def test_drawing_commands_can_be_typed(call, monkeypatch, script, flags):
    def stop(folders, data_dir):
        raise utils.InputError("runs would be read next")

    monkeypatch.setattr(visualize, "find_all_runs", stop)
    assert call(visualize, *shlex.split(flags))[2] == "visualize.py: error: runs would be read next\n"


def test_files_and_logs_that_the_readme_names_exist():
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link}
    scripts = {script for script, _ in COMMANDS}
    modules = {f"{name.replace('.', '/')}.py" for name in re.findall(r"python -m (runs[.\w]+)", README)}
    logs = set(re.findall(r"`(runs/reference/(?:cnn_cifar10|rnn_mnist))`", README))
    missing = [path for path in links | scripts | modules | logs if not (ROOT / path).exists()]
    assert missing == []
    assert scripts >= {*SCRIPTS, "visualize.py"}
    assert "-m pytest" in README
    assert len(logs) == 2
    for log in logs:
        assert 0 < len(list((ROOT / log).rglob("events.out.tfevents.*"))) <= 40, "TensorBoard selects at most 40 runs"


def test_the_table_of_flags_gives_every_flag_with_its_default(call):
    documented, actual = {}, {}
    for flags, cell in re.findall(r"^\| *(`--.*?)\|(.*?)\|", README, re.MULTILINE):
        defaults = re.sub(r" \((CNN|RNN)\)", "", cell).strip().split(", ")  # such as 128 (CNN), 64 (RNN)
        documented |= dict.fromkeys(re.findall(r"--[a-z-]+", flags), {*defaults} - {""})
    for script in SCRIPTS.values():
        _, flags, _ = call(script, "--help")
        for flag, text in re.findall(r"^  (--[a-z-]+)(.*?)(?=^  -|\Z)", flags, re.DOTALL | re.MULTILINE):
            default = re.search(r"\(default: (.*)\)", " ".join(text.split()))
            actual.setdefault(flag, set()).update(default.groups() if default else ())
    assert documented == actual


@pytest.mark.parametrize("code", [code for code in code_blocks(README) if re.search(r"^[\w: ]+ = ", code, re.M)])
def test_python_code_in_the_readme_runs(finished_run, digits, code):
    code = re.sub(r"runs/rnn_mnist/[\w.-]+", finished_run.as_posix(), code)
    exec(code, {"setting": utils.setting, "images": digits.test.images[:2]})


def rounds_to(exact, rounded):
    """Return whether a number, of which exact is the text with two decimals, rounds to the text of another."""
    decimals = len(rounded.partition(".")[2])
    return abs(float(exact) - float(rounded)) <= 0.5 * 10**-decimals + 0.005 + 1e-9


@pytest.mark.parametrize("path", PATHS[:2])
def test_numbers_are_those_of_the_results_and_claims(path):
    """Means in percent must be in results.csv or claims.md; differences in points, and their intervals, in claims.md.

    Only numbers with decimals are checked. Signs are not: a difference of -6.47 may be written as 6.5 points.
    """
    claims = " ".join((ROOT / "runs/reference/claims.md").read_text(encoding="utf-8").split())
    means = [row["mean"] for row in read_csv(ROOT / "runs/reference/comparison/results.csv")]
    means += re.findall(r"(\d+\.\d+) % \(", claims)
    interval = r"[+-]?(\d+\.\d+) to [+-]?(\d+\.\d+)"
    tested = re.findall(rf"(\d+\.\d+) points (?:\| |\(){interval}", claims)
    known = {"%": means, "points": [difference for difference, _, _ in tested]}
    text = " ".join(TEXTS[path].split())
    wrong = []
    for number, unit in re.findall(r"(\d+\.\d+) (%|points)", text):
        if not any(rounds_to(exact, number) for exact in known[unit]):
            wrong.append(f"{number} {unit}")
    for difference, low, high in re.findall(rf"(\d+\.\d+) points \({interval}\)", text):
        rounded = [difference, *sorted([low, high], key=float)]
        exact = [[first, *sorted(bounds, key=float)] for first, *bounds in tested]
        if not any(all(map(rounds_to, numbers, rounded)) for numbers in exact):
            wrong.append(f"{difference} points ({low} to {high})")
    assert set(wrong) <= OTHER_NUMBERS.keys()
