"""Every evaluation has a page, and examples that run."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from examples import fresh_start, printed

from writesae_study import EVALUATIONS

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)\n```$)?", flags=re.MULTILINE | re.DOTALL)
"""A Python block, and what it prints, where that stands below it."""
DICTIONARIES = ("my-sae", "seed-0", "seed-1", "write", "state", "bilinear", "flat")
"""Folders of the SAEs in the examples of evaluations."""


def test_every_evaluation_has_a_page() -> None:
    assert sorted(path.stem for path in (DOCS / "evaluations").glob("*.md") if path.stem != "index") == sorted(
        EVALUATIONS
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny SAEs in the folders that the evaluations' examples name."""
    from hookpoints import HookedRecurrent, embedded
    from sae_lens_writesae import text_dataset, train, training_config
    from writesae.training import quiet

    folder = tmp_path_factory.mktemp("saes")
    model, dataset = HookedRecurrent.from_pretrained("embedded"), text_dataset(embedded.text("train"))
    wanted: dict[str, dict] = {"my-sae": {}, "state": {"target": "state"}, "seed-1": {"seed": 1}}
    wanted["flat"] = {"sae": {"k": 8, "decoder": "flat"}}
    for label, changes in wanted.items():
        cfg = training_config(
            model,
            layer=2,
            head=1,
            d_sae=64,
            training_tokens=16_384,
            context_size=128,
            lr=2e-3,
            store_batch_size_prompts=8,
            n_batches_in_buffer=16,
            train_batch_size_tokens=512,
            verbose=False,
            **{"target": "write", "sae": {"k": 8}, "seed": 0} | changes,
        )
        with quiet():  # SAELens warns that so short a text is read more than once
            train(cfg, (model, dataset)).save_inference_model(str(folder / label))
    for label in {*DICTIONARIES} - wanted.keys():
        shutil.copytree(folder / "my-sae", folder / label)
    return folder


@pytest.mark.nightly
@pytest.mark.parametrize("name", EVALUATIONS)
def test_examples_of_evaluations_run(name: str, trained: Path) -> None:
    """They answer no claim that the class does not name."""
    code = "".join(code for code, _ in BLOCK.findall((DOCS / "evaluations" / f"{name}.md").read_text()))
    code += "assert {claim.number for claim in result.claims()} <= {None, *result.evaluation.answers}\n"
    with fresh_start(trained):
        out = printed(code, f"{name}.md")
    assert len(out.splitlines()) >= 1 and all(" | " in line for line in out.splitlines())
