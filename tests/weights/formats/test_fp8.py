"""The number of exponent bits follows a matrix's outliers ("FP8 Quantization: The Power of the Exponent")."""

import pytest
import torch
from tests.weights.formats.stored import blocks_of, encoded, normal, squared_error

from tightfit.errors import UsageError
from tightfit.weights.formats import FP8, Int8

EXPONENTS = (2, 3, 4, 5)


def outliers(factor, rows=32, cols=1024):
    """Normal, but for one number in each row that has ``factor`` times the largest magnitude to expect, about 3."""
    weights = normal(rows, cols)
    weights[:, 100] = weights[:, 100].sign() * 3 * factor
    return weights


def test_the_heavier_the_outliers_the_more_exponent_bits():
    assert [encoded(FP8(), outliers(factor))[0].item() for factor in (1, 30, 300)] == [2, 3, 4]


@pytest.mark.parametrize("group", [0, 64])
@pytest.mark.parametrize("factor", [1, 30, 300])
def test_the_number_of_exponent_bits_is_that_of_the_smallest_error(factor, group):
    weights = outliers(factor)
    errors = {exponent: squared_error(FP8(exponent, group), weights) for exponent in EXPONENTS}
    assert encoded(FP8(0, group), weights)[0].item() == min(errors, key=errors.get)
    assert squared_error(FP8(0, group), weights) == min(errors.values())


def test_with_outliers_fp8_loses_less_than_int8_in_as_many_bits():
    assert FP8().nbytes(32, 1024) - 64 == Int8(group=0).nbytes(32, 1024)
    weights = outliers(30)
    assert squared_error(FP8(), weights) < squared_error(Int8(group=0), weights) / 20
    # "FP8 versus INT8" finds them alike without outliers; e2m5, which it does not consider for hardware, is better.
    assert squared_error(Int8(group=0), outliers(1)) < 2 * squared_error(FP8(), outliers(1))
    assert squared_error(Int8(group=0), outliers(1)) < squared_error(FP8(4), outliers(1))


@pytest.mark.parametrize("exponent", EXPONENTS)
def test_a_number_that_is_given_is_taken_without_reading(exponent):
    data = torch.full((FP8(exponent).nbytes(16, 32),), 255, dtype=torch.uint8)

    def blocks():
        raise AssertionError("read")

    FP8(exponent).begin(data, (16, 32), blocks)
    assert data[:64].tolist() == [exponent] + [0] * 63


def test_all_rows_count_for_the_choice():
    weights = torch.cat([normal(32, 1024), outliers(30)])
    data = torch.empty(FP8().nbytes(64, 1024), dtype=torch.uint8)
    FP8().begin(data, (64, 1024), blocks_of(weights))
    assert data[0] > 2


@pytest.mark.parametrize("exponent", [1, 6, -1])
def test_other_numbers_of_bits_are_refused(exponent):
    with pytest.raises(UsageError, match="bits of exponent"):
        FP8(exponent)
