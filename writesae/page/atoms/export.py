"""Atoms in the formats of Neuronpedia and delphi.

Neuronpedia imports the batches that SAEDashboard writes (`NeuronpediaDashboardBatch` of SAEDashboard 0.8.0). delphi
reads a cache of activations (`LatentDataset` of eai-delphi 0.1.3): in a folder named after the hook, tensors for each
split of the atoms, and a config.json.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file

from sae_lens_writesae.files import atomic_text, atomic_write
from writesae.experiment.lab import Lab
from writesae.files import Json
from writesae.page.atoms import parts
from writesae.page.atoms.data import Bars, Context
from writesae.page.atoms.measure import Facts


@torch.inference_mode(False)
@torch.no_grad()
def neuronpedia_batch(facts: Facts, dataset: str = "") -> dict[str, Json]:
    """The atoms of `facts` as SAEDashboard's `NeuronpediaDashboardBatch`; only what it holds is measured.

    Logits are those of `AtomPage.effect`, or along the direct path where it was not measured. Lists about neurons of
    the residual stream are empty, and so is `vector`: an atom is a matrix in the state of a head.
    """
    info = facts.lab.describe()
    return {
        "model_id": info["model"],
        "layer": info["layer"],
        "sae_set": f"writesae-{info['target']}-{info['d_sae']}",
        "sae_id_suffix": f"h{info['head']}",
        "features": [_feature(facts, column, dataset) for column in range(len(facts.number))],
    }


def _feature(facts: Facts, column: int, dataset: str) -> dict[str, Json]:
    neurons = ("neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1")
    correlated = [f"correlated_{of}_{what}" for of in ("neurons", "features") for what in ("indices", "l1", "pearson")]
    rows = facts.rows(column).assign(cosine=np.nan)
    change, activations = facts.change(column), rows["activation"].to_numpy(float)
    ends, density = parts.vocabulary(facts, change), parts.bars(activations, low=0.0)
    logits = parts.bars(change[: facts.texts.size])
    top = [_activation(context, -1, float(activations.max()), -1) for context in parts.top(facts, rows)]
    bands = [
        _activation(context, band.low, band.high, band.share_high - band.share_low)
        for band in parts.bands(facts, rows)
        for context in band.contexts
    ]
    return {
        "feature_index": int(facts.number[column]),
        **{name: [] for name in (*neurons, *correlated, "decoder_weights_dist", "vector")},
        "neg_str": [token.text for token in ends.low],
        "neg_values": [token.value for token in ends.low],
        "pos_str": [token.text for token in ends.high],
        "pos_values": [token.value for token in ends.high],
        "frac_nonzero": len(rows) / facts.ids.size,
        "freq_hist_data_bar_values": _centers(density),
        "freq_hist_data_bar_heights": [round(share * len(rows)) for share in density.values],
        "logits_hist_data_bar_heights": logits.values,
        "logits_hist_data_bar_values": _centers(logits),
        "n_prompts_total": facts.ids.shape[0],
        "n_tokens_in_prompt": facts.ids.shape[1],
        "dataset": dataset,
        "activations": [*top, *bands],
    }


def _activation(context: Context, low: float, high: float, share: float) -> dict[str, Json]:
    """SAEDashboard marks the strongest ones by a `bin_min` and a `bin_contains` of -1."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": context.tokens,
        "values": context.values,
        "qualifying_token_index": context.at,
    }


def _centers(bars: Bars) -> list[float]:
    return [round((a + b) / 2, 5) for a, b in itertools.pairwise(bars.edges)]


def write_delphi(lab: Lab, folder: Path, *, n_splits: int = 5, dataset: str = "") -> Path:
    """Write all firings of a laboratory's dictionary as delphi's cache; returns its folder, `folder` / hook.

    `LatentDataset(folder, ...)` reads it, where `folder` has nothing else in it. Activations are float16, as delphi's
    own.

    Raises:
        ValueError: there are fewer atoms than splits.
    """
    firings, tokens = lab.firings(), lab.tokens
    if not 0 < n_splits <= firings.n_atoms:
        raise ValueError(f"splits must be between 1 and the number of atoms, {firings.n_atoms}; found {n_splits}")
    kept = firings.frame(firings.activation > 1e-5)  # delphi keeps no activation below
    target, bounds = folder / lab.hook.name, np.linspace(0, firings.n_atoms, n_splits + 1).astype(int).tolist()
    for first, following in itertools.pairwise(bounds):
        rows = kept[kept["atom"].between(first, following - 1)]
        places = np.stack([rows["sequence"], rows["position"], rows["atom"] - first], 1)
        small = max(following - first, *tokens.shape) < 2**16
        tensors = {
            "locations": places.astype(np.uint16 if small else np.uint32),
            "activations": rows["activation"].to_numpy(np.float16),
            "tokens": tokens.cpu().numpy(),
        }
        atomic_write(target / f"{first}_{following - 1}.safetensors", lambda file, t=tensors: save_file(t, file))
    config = {
        "dataset_repo": dataset,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 1,
        "cache_ctx_len": tokens.shape[1],
        "n_tokens": tokens.numel(),
        "n_splits": n_splits,
        "model_name": str(lab.model.cfg.model_name),
    }
    atomic_text(target / "config.json", json.dumps(config, indent=1))
    return target
