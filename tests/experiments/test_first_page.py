"""The numbers in the prose of the first page, in both languages, are those of the committed records."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=["README.md", "README.zh.md"])
def page(request):
    return (ROOT / request.param).read_text(encoding="utf-8")


def test_drift(page):
    rows = [
        line.split("|")
        for report in (ROOT / "results" / "keep").glob("seed[789]/report.md")
        for line in report.read_text(encoding="utf-8").split("## Training")[1].splitlines()
        if line.startswith("| CRaFT keep")
    ]
    drift = [float(row[5]) for row in rows]
    budgets = {float(row[6]) for row in rows}
    assert len(drift) == 6 and budgets == {0.03}
    low, high = re.search(r"0\.0\d+ (?:to|到) 0\.0\d+", page)[0].split(" ")[::2]
    assert float(low) == round(min(drift), 2) and float(high) == round(max(drift), 3)


def test_cost(page):
    table = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    row = next(line for line in table.splitlines() if line.startswith("| preset `keep`, instructions on a quarter"))
    measured = re.findall(r"(\d\.\d+) \((\d\.\d+)\)", row)
    seconds, products = ([float(pair[i]) for pair in measured] for i in (0, 1))
    said = re.findall(r"(?<![\d.])1\.\d+", page.split("<!-- begin memory -->")[0])
    assert said == [f"{sum(products) / len(products):.2f}", f"{min(seconds):.2g}", f"{max(seconds):.2f}"]
