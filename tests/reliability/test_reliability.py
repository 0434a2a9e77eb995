"""Every check, with few rounds."""

from __future__ import annotations

import pytest

from reliability import folders, running, writing  # noqa: F401 (they have checks)
from reliability.checks import CHECKS

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def case(check):
    return pytest.param(check, id=check.name, marks=[pytest.mark.slow] * check.slow)


@pytest.mark.parametrize("check", [case(check) for check in CHECKS])
def test_the_product_holds(tmp_path, check):
    assert_holds(tmp_path, check)


def assert_holds(folder, check):
    comparisons = list(check.run(folder, check.few))
    assert comparisons and not [each for each in comparisons if not each.holds()]
