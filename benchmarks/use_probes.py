"""Probes: how well few features predict the labels of data sets, by the protocol of sae-probes 0.4.2.

Reading of prompts, selection of features and logistic regression are the package's own functions.
"""

from __future__ import annotations

import contextlib
import io
from typing import Any

import numpy as np
import torch
import use
from torch import Tensor

QUICK = {
    **{"models": ("embedded",), "sequences": 12, "n_atoms": 16, "rows": 512},
    **{"every": 60, "n_train": 64, "n_test": 32, "longest": 16},
}
NULL = "WriteSAE (1 active), permuted labels"
DENSE = ("residual stream", "write")
"""What is also probed with all its numbers."""
INTRODUCTION = """Of the {all} binary data sets of `sae-probes` {version}, one in {every} is used, in the order of their
names: {n} data sets, with {n_train} training and {n_test} test prompts each, both classes equally frequent. A prompt
keeps its last {longest} tokens. The features are those of its last token: codes of the head's write, {components}
principal components of the writes in the metric (more numbers than a code has), the residual stream at the layer's
output, and the numbers of the write's key and value. A probe selects the k features with the largest difference of
class means and fits a logistic regression; the last column uses all features. The score is the area under the ROC curve
(AUC) on test prompts; chance is 0.5. Values are means over data sets, with 95% intervals over data sets. Permuted
labels are those of the training prompts: a null."""


def features(terms: use.Terms, codes: dict[str, use.Code], texts: list[str], longest: int) -> dict[str, Tensor]:
    """Features [N,F] of the last tokens of prompts."""
    from sae_probes.generate_model_activations import _process_activations

    hooks = ("mixer.hook_write_key", "mixer.hook_write_value", "hook_resid_post")
    layer, head = terms.place
    names = [f"blocks.{layer}.{hook}" for hook in hooks]
    with contextlib.redirect_stderr(io.StringIO()):
        found = _process_activations(terms.model, texts, 32, longest, names, None, "cpu")
    k, u = (found[name][:, head] for name in names[:2])
    own = {label: code.encode(k, u) for label, code in codes.items()}
    return own | {NULL: own["WriteSAE (1 active)"], DENSE[0]: found[names[2]], DENSE[1]: torch.cat([k, u], 1)}


def auc(x: Tensor, train: Tensor, test: Tensor, ks: tuple[int, ...], dense: bool) -> dict[str, float]:
    """Test AUC of k selected features [N,F] each, and of all, standardized; training rows come first."""
    from sae_probes.run_sae_evals import get_sorted_indices, mean_act_normalization
    from sae_probes.utils_training import find_best_reg

    seen, order = x[: len(train)], get_sorted_indices(x[: len(train)], train, mean_act_normalization)
    sides = {str(k): x[:, order[:k]] for k in ks}
    if dense:
        sides["all"] = (x - seen.mean(0)) / seen.std(0).clamp_min(1e-6)
    split = ({"X_train": s[: len(train)].numpy(), "X_test": s[len(train) :].numpy()} for s in sides.values())
    fits = (find_best_reg(**each, y_train=train.numpy(), y_test=test.numpy(), seed=42) for each in split)
    return {k: round(fit.metrics.test_auc, 4) for k, fit in zip(sides, fits)}


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
) -> dict[str, Any]:
    """AUC of every code and data set."""
    import sae_probes
    from sae_probes.utils_data import get_train_test_indices, get_yvals, read_numbered_dataset_df

    names, settings = sorted(sae_probes.DATASETS), {"every": every, "n_train": n_train, "n_test": n_test}
    settings |= {"longest": longest, "components": max(ks), "version": sae_probes.__version__, "all": len(names)}
    found: dict[str, Any] = settings | {"data sets": names[::every], "heads": {}}
    mixed = torch.randperm(n_train, generator=torch.Generator().manual_seed(0))
    for name in models:
        terms = use.Terms(name, sequences, n_atoms, rows)
        codes, rates = terms.codes() | {"PCA": terms.pca(max(ks))}, dict[str, dict[str, list[float]]]()
        for data in names[::every]:
            chosen = get_train_test_indices(get_yvals(data), n_train, n_test)
            prompts = read_numbered_dataset_df(data)["prompt"].tolist()
            train, test = (torch.tensor(get_yvals(data)[each]) for each in chosen)
            x = features(terms, codes, [prompts[i] for i in np.concatenate(chosen)], longest)
            for label, each in x.items():
                for k, value in auc(each, train[mixed] if label == NULL else train, test, ks, label in DENSE).items():
                    rates.setdefault(label, {}).setdefault(k, []).append(value)
        found["heads"][name] = terms.describe() | {"codes": rates}
    return found


def text(found: dict[str, Any]) -> list[str]:
    """The section of the page."""
    heads = found["heads"]
    codes = {
        label: {k: np.mean([head["codes"][label][k] for head in heads.values()], 0) for k in rates}
        for label, rates in next(iter(heads.values()))["codes"].items()
    }
    ks = list(codes[DENSE[0]])
    cells = ([label, *(use.told(use.over(of[k])) if k in of else "" for k in ks)] for label, of in codes.items())
    pairs = [*use.PAIRS, *((ours, theirs) for ours in use.RIVALS for theirs in ("PCA", DENSE[0]))]
    gains = {(x, y): {f"k = {k}": use.over(codes[x][k] - codes[y][k]) for k in ks[:-1]} for x, y in pairs}
    headings = (use.HEADING.format(name=name, **head) for name, head in heads.items())
    columns = ("features", *(f"k = {k}" for k in ks[:-1]), ks[-1])
    about = INTRODUCTION.format(**found, n=len(found["data sets"]))
    return [about, *headings, use.table(columns, cells), use.differences(gains)]
