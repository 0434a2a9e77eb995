"""Probes: how well few features predict the labels of data sets, by the protocol of sae-probes 0.4.2.

Reading of prompts, selection of features and logistic regression are the package's own functions. `measure` needs it,
with xgboost and zstandard; it is no dependency of the study, so that this file is not part of `writesae.use`.
"""

from __future__ import annotations

import contextlib
import io

import numpy as np
import torch
from torch import Tensor

from writesae.use.features import ONE, Features, HeadTerms

QUICK = {
    "models": ("embedded",),
    "sequences": 12,
    "n_atoms": 16,
    "rows": 512,
    "every": 60,
    "n_train": 64,
    "n_test": 32,
    "longest": 16,
}
NULL = f"{ONE}, permuted labels"
RESIDUAL, WRITE = DENSE = ("residual stream", "write")
"""What is also probed with all its numbers."""


def activations(terms: HeadTerms, codes: dict[str, Features], texts: list[str], longest: int) -> dict[str, Tensor]:
    """Features [N,F] of the last tokens of prompts."""
    from sae_probes.generate_model_activations import _process_activations

    layer, head = terms.place
    key, value, residual = (
        f"blocks.{layer}.{hook}" for hook in ("mixer.hook_write_key", "mixer.hook_write_value", "hook_resid_post")
    )
    with contextlib.redirect_stderr(io.StringIO()):
        cache = _process_activations(terms.model, texts, 32, longest, [key, value, residual], None, "cpu")
    k, u = cache[key][:, head], cache[value][:, head]
    of_codes = {label: features.encode(k, u) for label, features in codes.items()}
    return of_codes | {NULL: of_codes[ONE], RESIDUAL: cache[residual], WRITE: torch.cat([k, u], 1)}


def auc(x: Tensor, train: Tensor, test: Tensor, ks: tuple[int, ...], dense: bool) -> dict[str, float]:
    """Test AUC of k selected features [N,F] each, and of all, standardized; training rows come first."""
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_training import find_best_reg

    seen = x[: len(train)]
    order = get_sorted_indices(seen, train, mean_act_normalization)
    selected = {str(k): x[:, order[:k]] for k in ks}
    if dense:
        selected["all"] = (x - seen.mean(0)) / seen.std(0).clamp_min(1e-6)
    scores = {}
    for k, columns in selected.items():
        fit = find_best_reg(
            X_train=columns[: len(train)].numpy(),
            X_test=columns[len(train) :].numpy(),
            y_train=train.numpy(),
            y_test=test.numpy(),
            seed=42,
        )
        scores[k] = round(fit.metrics.test_auc, 4)
    return scores


def measure(
    models: tuple[str, ...] = ("embedded",),
    sequences: int = 320,
    n_atoms: int = 256,
    rows: int = 128_000,
    every: int = 6,
    n_train: int = 256,
    n_test: int = 128,
    longest: int = 64,
    ks: tuple[int, ...] = (1, 4, 16),
) -> dict[str, object]:
    """AUC of every set of features and data set."""
    import sae_probes
    from sae_probes.utils_data import get_train_test_indices, get_yvals, read_numbered_dataset_df

    names = sorted(sae_probes.DATASETS)
    mixed = torch.randperm(n_train, generator=torch.Generator().manual_seed(0))
    heads: dict[str, dict[str, object]] = {}
    for name in models:
        terms = HeadTerms(name, sequences, n_atoms, rows)
        codes = terms.features() | {"PCA": terms.components(max(ks))}
        of_codes: dict[str, dict[str, list[float]]] = {}
        for data_set in names[::every]:
            labels = get_yvals(data_set)
            prompts = read_numbered_dataset_df(data_set)["prompt"].tolist()
            of_train, of_test = get_train_test_indices(labels, n_train, n_test)
            texts = [prompts[i] for i in np.concatenate([of_train, of_test])]
            train, test = torch.tensor(labels[of_train]), torch.tensor(labels[of_test])
            for label, x in activations(terms, codes, texts, longest).items():
                scores = auc(x, train[mixed] if label == NULL else train, test, ks, label in DENSE)
                for k, score in scores.items():
                    of_codes.setdefault(label, {}).setdefault(k, []).append(score)
        heads[name] = terms.describe() | {"codes": of_codes}
    return {
        "every": every,
        "n_train": n_train,
        "n_test": n_test,
        "longest": longest,
        "components": max(ks),
        "version": sae_probes.__version__,
        "all": len(names),
        "data sets": names[::every],
        "heads": heads,
    }
