"""The console script `writesae`, also `python -m writesae`."""

import io
import os
import sys

import hookpoints  # settles how threads wait, before torch loads  # noqa: F401


def main() -> None:
    """Run a command of `writesae.cli`."""
    try:
        from writesae.cli import main
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"error: writesae needs {error.name}: in the clone of the repository, pip install -e hookpoints -e ."
        ) from error

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without the character gets a question mark, not an error
    try:
        try:
            main()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # of `| head`, which has read enough; Python would flush again as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None


if __name__ == "__main__":
    main()
