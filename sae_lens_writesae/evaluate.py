"""Trained SAEs from folders, tested on text: what ``writesae eval`` does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.loading import load_sae
from sae_lens_writesae.report import ReportFiles, write_report
from sae_lens_writesae.substitution import run_substitution
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_result import SubstitutionResult


class Evaluation(NamedTuple):
    """Results in the order of the SAEs, and the report on them."""

    results: list[SubstitutionResult]
    report: ReportFiles


def evaluate_saes(
    folders: Sequence[Path],
    out: Path,
    config: SubstitutionConfig,
    *,
    model: str | None = None,
    text: Path | None = None,
    sequences: int = 200,
    context_size: int = 128,
) -> Evaluation:
    """Run the substitution test on each SAE and write ``report.html`` and one table per SAE to ``out``.

    Args:
        folders: SAELens folders, all of one model.
        model: name or path; None: the one in the SAEs' metadata.
        text: a text file; None: the part of the package's held-out text that is kept for evaluation.

    Raises:
        ValueError: SAEs of different models, an SAE that does not fit the model, or too little text.
    """
    saes = [load_sae(folder) for folder in folders]
    names = {model or str(sae.cfg.metadata.model_name) for sae in saes}
    if len(names) > 1:
        raise ValueError(f"the SAEs were trained on different models ({', '.join(sorted(names))}); evaluate them apart")
    hooked = HookedRecurrent.from_pretrained(names.pop())
    tokens = spread(hooked, embedded.text("test") if text is None else text.read_text(), context_size, sequences)
    results = []
    for folder, sae in zip(folders, saes):
        check_fits(hooked, sae, folder)
        result = run_substitution(hooked, sae, tokens, _labelled(config, folder))
        result.save(out / f"{len(results)}-{_label(folder)}")
        results.append(result)
    return Evaluation(results, write_report(results, out / "report.html"))


def spread(model: HookedRecurrent, text: str, context_size: int, sequences: int) -> Tensor:
    """[N,context_size] tokens, spread evenly over a text (a text in order of time then gives all times)."""
    ids = model.to_tokens(text, prepend_bos=False, truncate=False)[0]
    n = min(sequences, len(ids) // context_size)
    if n == 0:
        raise ValueError(f"the text has {len(ids)} tokens, fewer than one sequence of {context_size}")
    starts = torch.linspace(0, len(ids) - context_size, n).long().tolist()
    return torch.stack([ids[start : start + context_size] for start in starts])


def check_fits(model: HookedRecurrent, sae: Any, where: Path | str) -> None:
    """Raise ValueError unless the SAE's hook exists on the model with the SAE's sizes; names both."""
    from hookpoints.firing import check_names
    from sae_lens_writesae.firings import HeadHook

    hook = HeadHook.of(sae)
    check_names(model, str(sae.cfg.metadata.hook_name))
    shape = model.cfg.layer(hook.layer)
    if sae.cfg.d_in != shape.K * shape.V:
        raise ValueError(
            f"the SAE in {where} reads {sae.cfg.d_in} numbers, but {sae.cfg.metadata.hook_name} of "
            f"{model.cfg.model_name} has {shape.K} x {shape.V} = {shape.K * shape.V}"
        )


def _label(folder: Path) -> str:
    return folder.parent.name if folder.name == "sae" else folder.name


def _labelled(config: SubstitutionConfig, folder: Path) -> SubstitutionConfig:
    return SubstitutionConfig(**{**config.to_dict(), "label": config.label or _label(folder)})
