"""Symbolic dimensions, against the arithmetic that they are written in."""

from __future__ import annotations

import pytest

from graphs.dims import size_of, symbols_of


@pytest.mark.parametrize(
    ("dim", "size", "symbols"),
    [
        (7, 7, set()),
        ("P_0 + S", 20, {"P_0", "S"}),
        ("-1*S + P_0", 8, {"P_0", "S"}),
        ("4*(((S + 5)//2)) + 1", 21, {"S"}),
    ],
)
def test_a_dimension_has_a_size_and_symbols(dim: int | str, size: int, symbols: set[str]) -> None:
    assert size_of(dim, {"S": 6, "P_0": 14}) == size
    assert symbols_of(dim) == symbols


@pytest.mark.parametrize("dim", ["", "V", "S / 2", "max(S, 2)", "S S", "1.5*S", "-" * 9_999 + "S", "S" + "+S" * 9_999])
def test_what_cannot_be_read_is_no_size(dim: str) -> None:
    with pytest.raises(KeyError):
        size_of(dim, {"S": 6})
