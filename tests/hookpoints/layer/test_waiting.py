"""How threads wait, and how many of them small work takes on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from hookpoints import scopes
from hookpoints.scopes import threads_for

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
NUMBERS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")


def set_when_torch_loads(code: str, **given: str) -> dict[str, str]:
    """The variables about threads at the moment a fresh process that runs ``code`` begins to load torch."""
    ask = f"""
import os, sys
class Stop:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print({{each: os.environ[each] for each in {(*WAITING, *NUMBERS)} if each in os.environ}})
            os._exit(sys.stdout.flush() or 0)
sys.meta_path.insert(0, Stop())
{code}
raise SystemExit("torch was not loaded")
"""
    environment = {name: value for name, value in os.environ.items() if name not in (*WAITING, *NUMBERS)} | given
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    return eval(done.stdout)


SLEEP = {"OMP_WAIT_POLICY": "PASSIVE"}


@pytest.mark.parametrize(
    ("code", "given", "expected"),
    [
        ("import hookpoints.rwkv7", {}, SLEEP),
        ("from writesae.__main__ import main; sys.argv = ['writesae', 'hooks', 'embedded']; main()", {}, SLEEP),
        ("import hookpoints.recurrence", {"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
        ("import hookpoints.recurrence", {"OMP_NUM_THREADS": "3"}, {**SLEEP, "OMP_NUM_THREADS": "3"}),
    ],
)
def test_threads_sleep_while_they_wait_unless_the_user_chose(code: str, given: dict, expected: dict) -> None:
    assert set_when_torch_loads(code, **given) == expected


@pytest.fixture
def two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where the user has chosen nothing."""
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_small_work_has_one_thread_until_its_scope_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    with threads_for(scopes.SMALL_WORK):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    with pytest.raises(KeyError), threads_for(1):
        raise KeyError
    assert torch.get_num_threads() == 2
    with threads_for(2 * scopes.SMALL_WORK):
        assert torch.get_num_threads() == 2
    for name in NUMBERS:
        monkeypatch.setenv(name, "2")
        with threads_for(1):
            assert torch.get_num_threads() == 2
        monkeypatch.delenv(name)
    torch.set_num_threads(1)
    with threads_for(2 * scopes.SMALL_WORK):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 1
