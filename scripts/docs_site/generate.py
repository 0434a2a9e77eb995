"""Run by mkdocs-gen-files while the site is built: writes the generated pages and the navigation.

Pages of hooks, evaluations and errors follow the code: a new one needs a text in ``texts/`` and nothing here. The
build fails, naming the file to write, where one is missing.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "WANDB_MODE": "offline"}

import mkdocs_gen_files  # noqa: E402

from docs_site import error_pages, evaluation_pages, hook_pages, navigation, notebooks  # noqa: E402


def main() -> None:
    """Write every generated page."""
    for name in ("sae_lens", "transformers", "transformer_lens"):
        logging.getLogger(name).setLevel(logging.ERROR)
    tutorials = notebooks.notebooks()
    pages = hook_pages.pages() | error_pages.pages() | evaluation_pages.pages()
    pages |= {f"tutorials/{tutorial.name}.md": tutorial.markdown for tutorial in tutorials}
    pages["tutorials/index.md"] = navigation.tutorials_index(tutorials)
    pages["SUMMARY.md"] = navigation.summary(tutorials)
    for path, text in pages.items():
        with mkdocs_gen_files.open(path, "w") as file:
            file.write(text)
    for tutorial in tutorials:
        for path, data in tutorial.images.items():
            with mkdocs_gen_files.open(f"tutorials/{path}", "wb") as file:
                file.write(data)


main()
