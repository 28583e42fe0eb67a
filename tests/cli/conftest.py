"""What a test starts ends with it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from fix_commands import STARTED


@pytest.fixture(autouse=True)
def _nothing_goes_on() -> Iterator[None]:
    yield
    while STARTED:
        process = STARTED.pop()
        if process.poll() is None:
            process.kill()
        process.communicate()
