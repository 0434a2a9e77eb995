"""Each of the README's Python blocks runs by itself, and prints what the comments beside it say."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
END = "-- end of block"
PYTHON = os.environ.get("README_PYTHON", sys.executable)


def blocks() -> dict[str, str]:
    """The Python block of each section, by heading."""
    sections = re.split(r"^## ", README.read_text(), flags=re.MULTILINE)
    code = {each.partition("\n")[0]: re.findall(r"^```python\n(.*?)^```", each, re.M | re.S) for each in sections}
    return {heading: "\n".join(codes) for heading, codes in code.items() if codes}


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"(?<![\w.])\d+(?:\.\d+)?\b", text)]


def assert_comments_hold(code: str, printed: str) -> None:
    """Numbers and quoted words of a comment that stands beside a print, or in the line below it, are printed."""
    comments = " ".join(re.findall(r"^ *(?:print\(.*|)\)(?:\s+# |\n# )(.*)$", code, flags=re.MULTILINE))
    assert set(numbers(comments)) <= set(numbers(printed))
    assert all(words in printed for words in re.findall(r'"(.+?)"', comments))


@pytest.mark.slow
def test_blocks_print_what_their_comments_say_and_change_what_the_model_does(tmp_path):
    """All run in one fresh process, none with a name of another. `README_PYTHON` names its interpreter: .ci/run gives
    that of an environment that has the wheel alone."""
    (tmp_path / "readme.py").write_text(
        "\n".join(f"print({END!r})\nexec({code!r}, {{}})" for code in blocks().values())
    )
    done = subprocess.run([PYTHON, "readme.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    printed = dict(zip(blocks(), done.stdout.split(END + "\n")[1:], strict=True))
    for heading, code in blocks().items():
        assert printed[heading].strip()
        assert_comments_hold(code, printed[heading])
    native, deleted = numbers(printed["Hook and edit a write"])[-2:]
    assert native - deleted > 0.1
    first = printed["# hookpoints and sae_lens_writesae"].splitlines()
    assert [line.split()[-1] for line in first[-3:-1]] == ["Vienna", "Paris"]
    assert "' The home of Clara is Vienna.' is gone: every layer equals" in first[-1]
    assert "overwrote an earlier sentence: True" in first[-4]
