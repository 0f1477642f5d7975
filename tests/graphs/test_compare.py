"""The one comparison: what agrees, and how a difference is worded."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphs.compare import TOLERANCES, compare, kept_overlap

ONES = np.ones((2, 3), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_table_decides(dtype):
    wanted = np.full(4, 100, dtype)
    for factor, agrees in ((0.5, True), (2.0, False)):
        got = (wanted.astype(np.float64) * (1 + factor * TOLERANCES[dtype])).astype(dtype)
        assert compare("x", got, wanted).agrees is agrees


@pytest.mark.parametrize(
    ("got", "says"),
    [
        (ONES.astype(np.float16), "float16, wanted float32"),
        (ONES[:1], r"shape is \[1, 3\], wanted \[2, 3\]"),
        (ONES * np.float32(np.nan), "it has 6 values that are NaN"),
        (ONES + np.eye(2, 3, k=1, dtype=np.float32), r"above 0.0001 \(2 instead of 1 at \[0, 1\]\)"),
    ],
)
def test_what_differs_is_named(got, says):
    found = compare("x", got, ONES)
    assert not found.agrees
    assert re.search(says, found.problem)


def test_a_reference_that_is_not_finite_agrees_with_nothing():
    assert "reference" in compare("x", ONES, ONES * np.float32(np.inf)).problem


def test_integers_are_exact_and_kept_rows_tell_their_overlap():
    wanted = np.array([[0, 2, 5, 9]])
    assert compare("kept_0", wanted, wanted).overlap == 1
    found = compare("kept_0", np.array([[0, 2, 6, 9]]), wanted)
    assert (found.agrees, found.overlap) == (False, 0.75)
    assert "1 of 4 kept rows" in found.problem
    assert compare("is_visual", wanted > 1, wanted > 2).problem == "1 of 4 values differ"


def test_empty_tensors_agree():
    assert compare("past", np.zeros((1, 0, 4), np.float32), np.zeros((1, 0, 4), np.float32)).agrees
    assert kept_overlap(np.array([]), np.array([])) == 1


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20))
def test_everything_agrees_with_itself(values):
    array = np.array(values, np.float32)
    assert compare("x", array, array).error == 0
