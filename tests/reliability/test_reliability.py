"""Every check, with the product as it is and with each broken product that it must catch."""

from __future__ import annotations

import contextvars

import pytest

from reliability import folders, running, writing  # noqa: F401 (they have checks)
from reliability.checks import CHECKS
from writesae_study.dictionary.suite import _folder

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


def _case(check, *more):
    return pytest.param(check, *more, id="-".join([check.name, *more]), marks=[pytest.mark.slow] * check.slow)


@pytest.mark.parametrize("check", [_case(check) for check in CHECKS])
def test_the_product_holds(tmp_path, check):
    found = list(check.run(tmp_path, check.few))
    assert found and not [each for each in found if not each.holds()]


@pytest.mark.parametrize("check, broken", [_case(check, name) for check in CHECKS for name in check.broken])
def test_a_broken_product_is_caught(tmp_path, check, broken):
    # In a context of its own: a product that leaves layers open must not leave them to the tests that follow.
    assert contextvars.copy_context().run(check.catches, broken, tmp_path)


def test_a_label_is_no_path(tmp_path):
    assert _folder(tmp_path, "substitution", "../../a").parent == tmp_path / "substitution"
    for label in (".", ".."):
        with pytest.raises(ValueError, match="label"):
            _folder(tmp_path, "substitution", label)
