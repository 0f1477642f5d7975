"""README's and docs' tables are those of the committed results."""

from __future__ import annotations

import pytest

from benchmarks.peers import table


def test_the_page_is_that_of_the_results() -> None:
    if not any(table.result(f"peers-{shape}") for shape in table.SHAPES):
        pytest.fail("no results of benchmarks.peers are committed")
    assert table.PAGE.read_text("utf-8") == table.page(), "run: python -m benchmarks.peers.table"


def test_readme_shows_them() -> None:
    readme = (table.ROOT / "README.md").read_text("utf-8")
    assert table.BEGIN in readme
    assert readme == table.readme_with(table.block()), "run: python -m benchmarks.peers.table"
