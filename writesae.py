"""The console script `writesae`, also `python -m writesae`.

It lies beside the package because `import sae_lens_writesae` loads torch, SAELens and every evaluation, which takes
seconds; while this module is loaded, the package leaves that to the commands.
"""

import io
import runpy
import sys
from pathlib import Path

# By its path: importing it would load hookpoints, and with it torch.
runpy.run_path(str(Path(__file__).with_name("hookpoints") / "_waiting.py"))


def main() -> None:
    """Run a command of `sae_lens_writesae.cli`."""
    from sae_lens_writesae.cli import main

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without the character gets a question mark, not an error
    main()


if __name__ == "__main__":
    import writesae  # under its own name, by which the package knows it

    writesae.main()
