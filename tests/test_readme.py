"""The front page: its figures are those of the shipped results, and what it points to is there."""

import csv
import re

import pytest
from conftest import ROOT

README = (ROOT / "README.md").read_text()
COMPARISON = ROOT / "runs" / "reference" / "comparison"
CLAIMS = (COMPARISON / "claims.md").read_text()
RESULTS = list(csv.DictReader((COMPARISON / "results.csv").read_text().splitlines()))
NUMBER = r"\d[\d,]*\.?\d*(?:e-\d+)?"


def section(title):
    return README.split(f"\n## {title}\n")[1].split("\n## ")[0]


def table(text, first):
    """Return the rows of the table that begins with a text, a list of cells each."""
    lines = text[text.index(first) :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def numbers(text):
    return {float(found.replace(",", "")) for found in re.findall(NUMBER, text)}


def measured_in(text):
    """Return the figures of a text that were measured: those with a decimal place, thousands, or a unit behind them."""
    found = re.findall(rf"({NUMBER})(?= ?(?:%|points|weights|s an epoch))|(\d+\.\d+|\d+,\d{{3}})", text)
    return {float((with_unit or plain).replace(",", "").rstrip(".")) for with_unit, plain in found}


def test_every_figure_of_the_findings_stands_in_the_verdicts_or_the_results():
    shipped = numbers(CLAIMS) | {number for row in RESULTS for cell in row.values() for number in numbers(cell)}
    found = measured_in(section("What we found"))
    assert len(found) >= 16
    assert found <= shipped, f"in no table: {sorted(found - shipped)}"


def test_there_are_eight_findings():
    assert len(re.findall(r"^\d\. ", section("What we found"), re.MULTILINE)) == 8


def test_the_table_of_results_is_results_csv():
    _, _, *rows = table(README, "| setting | reported |")
    by_setting = {row["setting"]: row for row in RESULTS}
    assert len(rows) >= 18
    for setting, reported, mean, seeds, parameters, seconds in rows:
        row = by_setting[setting]
        assert mean == f"{row['mean']} ± {row['std']} %"
        assert [seeds, parameters, seconds] == [row["seeds"], f"{int(row['parameters']):,}", row["seconds_per_epoch"]]
        assert (row["reported"] and f"{row['reported']} %") + (f" ({row['remark']})" if row["remark"] else "") in (
            reported,
            f" {reported}",
        )


@pytest.mark.parametrize("part", ["The report's claims", "Beyond the report"])
def test_the_verdicts_are_those_of_claims_md(part):
    rows = table(CLAIMS[CLAIMS.index(f"# {part}") :], "| | claim |")[2:]
    shown = table(README, "| | claim |")[2:]
    assert rows
    assert all(row in shown for row in rows)


def test_pictures_and_texts_that_it_shows_are_there():
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert len(links) > 15
    missing = [link for link in links if "://" not in link and not (ROOT / link).is_file()]
    assert not missing


@pytest.mark.parametrize("folder", re.findall(r"tensorboard --logdir (runs/reference\S*)", README))
def test_tensorboard_ticks_runs_only_when_a_folder_holds_at_most_forty(folder):
    assert 1 < len(list((ROOT / folder).rglob("events.out.tfevents.*"))) <= 40


def test_it_stays_a_page():
    assert len(README.splitlines()) <= 310
