"""The table in docs/weights.md is measured."""

import re
from pathlib import Path

import pytest
from tests.weights.formats.stored import normal, squared_error

from tightfit.catalog import all_techniques, parse_one

PAGE = (Path(__file__).parents[3] / "docs" / "weights.md").read_text()
ROWS = re.findall(r"^\| `([^`]+)` \| ([0-9.]+) \| ([0-9.]+) \|", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("spec", "bits", "loses"), ROWS)
def test_the_bits_and_the_loss_of_each_format_are_those_of_the_page(spec, bits, loses):
    fmt = parse_one("weights", spec)
    assert fmt.nbytes(4096, 4096) * 8 / 4096**2 == pytest.approx(float(bits), abs=0.0005)
    weights = normal(256, 4096)
    if float(loses):
        share = (squared_error(fmt, weights) / weights.double().square().sum().item()) ** 0.5
        assert share == pytest.approx(float(loses), rel=0.01)


def test_every_format_is_on_the_page():
    for entry in all_techniques():
        if entry.seam == "weights":
            assert f"| `{entry.name}` |" in PAGE
