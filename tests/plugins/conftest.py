"""One interpreting process for all tests of kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.plugins.interpreted import Interpreted


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Interpreted]:
    with Interpreted() as process:
        yield process
