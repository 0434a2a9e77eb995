"""Files that are whole or absent: written aside, then renamed."""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path


def write_aside(target: Path, write: Callable[[Path], object]) -> Path:
    """Call `write` with a file beside `target`, then rename it; after an exception nothing is left."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    os.close(handle)
    aside = Path(name)
    try:
        write(aside)
        aside.chmod(0o644)
        os.replace(aside, target)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
    return target
