"""The routes of ARCHITECTURE.md pass through few files of this project. Each is traced, call by call."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
from sae_lens.saes.sae import TrainStepInput
from saes import HEAD, LAYER

from hookpoints import HookedRecurrent, attribute
from sae_lens_writesae import LowRank, train, training_config
from sae_lens_writesae.sae.rows import new_sae

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(
    f"{ROOT / package}/" for package in ("hookpoints", "sae_lens_writesae", "writesae", "study/writesae_study")
)


def files_of(call: Callable[[], object]) -> list[str]:
    """Files of the packages, functions of which a call runs."""
    files = set[str]()

    def see(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGES):
            files.add(str(Path(frame.f_code.co_filename).relative_to(ROOT)))

    before = sys.getprofile()
    sys.setprofile(see)
    try:
        call()
    finally:
        sys.setprofile(before)
    return sorted(files)


def assert_route(call: Callable[[], object], most: int, *landmarks: str) -> None:
    """A call passes through the files that its route names, and through at most so many."""
    files = files_of(call)
    assert {*landmarks} <= {*files}, files
    assert len(files) <= most, f"expected at most {most} files, got {len(files)}: {files}"


@torch.no_grad()
def test_a_token_batch_reaches_its_hook_by_eighteen_files(model: HookedRecurrent) -> None:
    name = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write"
    model.run_with_cache(torch.arange(1, 9)[None], names_filter=name)  # the first cache of all makes their class
    assert_route(
        lambda: model.run_with_cache(torch.arange(1, 9)[None], names_filter=name),
        18,
        "hookpoints/model/hooked.py",
        "hookpoints/hooks/guard.py",
        "hookpoints/layer/call.py",
        "hookpoints/layer/intercept.py",
    )


def test_a_training_step_by_three(model: HookedRecurrent) -> None:
    sae = new_sae(training_config(model, layer=LAYER, head=HEAD, d_sae=8, context_size=8))
    rows = torch.randn(16, sae.cfg.d_in)
    step = TrainStepInput(rows, {}, None, 0, False)
    assert_route(
        lambda: sae.training_forward_pass(step).loss.backward(),
        3,
        "sae_lens_writesae/sae/training.py",
        "sae_lens_writesae/sae/matrix.py",
    )


def test_training_on_writes_by_eleven(model: HookedRecurrent) -> None:
    sizes = {"d_sae": 8, "context_size": 8, "training_tokens": 64, "train_batch_size_tokens": 32}
    cfg = training_config(model, layer=LAYER, head=HEAD, **sizes, verbose=False)
    writes = LowRank(torch.randn(64, 1, cfg.sae.d_k), torch.randn(64, 1, cfg.sae.d_v))
    assert_route(
        lambda: train(cfg, writes),
        11,
        "sae_lens_writesae/sae/runner.py",
        "sae_lens_writesae/sae/fast.py",
        "sae_lens_writesae/sae/fused.py",
        "sae_lens_writesae/sae/rows.py",
    )


def test_an_attribution_by_forty_one(embedded: HookedRecurrent) -> None:
    assert_route(
        lambda: attribute("The report of the Secretary of the", embedded, [" Treasury"], against=" Navy", measure=3),
        41,
        "hookpoints/circuit/attribute.py",
        "hookpoints/circuit/tracing.py",
        "hookpoints/edits/session.py",
    )


@torch.no_grad()
def test_a_sentence_is_replaced_by_twenty_five() -> None:
    memory = HookedRecurrent.from_pretrained("facts").memory("Ben lives in Rome .")
    assert_route(
        lambda: memory.told("Ben lives in Oslo .", instead_of="Ben lives in Rome ."),
        25,
        "hookpoints/memory/memory.py",
    )
