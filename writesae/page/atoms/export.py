"""Atoms in the format of Neuronpedia, which imports the batches that SAEDashboard writes
(`NeuronpediaDashboardBatch` of SAEDashboard 0.8.0)."""

from __future__ import annotations

import itertools

import numpy as np
import torch

from writesae.experiment.firings import bar
from writesae.files import Json
from writesae.page.atoms import parts
from writesae.page.atoms.data import Bars, Context
from writesae.page.atoms.measure import AtomFacts


@torch.inference_mode(False)
@torch.no_grad()
def neuronpedia_batch(facts: AtomFacts, dataset: str = "") -> dict[str, Json]:
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
        "features": [_atom_feature(facts, column, dataset) for column in bar(range(len(facts.number)), "atoms")],
    }


def _atom_feature(facts: AtomFacts, column: int, dataset: str) -> dict[str, Json]:
    # Lists about neurons, which no atom has.
    empty = ["decoder_weights_dist", "vector"]
    empty += [f"neuron_alignment_{what}" for what in ("indices", "values", "l1")]
    for of in ("neurons", "features"):
        empty += [f"correlated_{of}_{what}" for what in ("indices", "l1", "pearson")]
    rows = facts.rows(column).assign(cosine=np.nan)
    change = facts.change(column)
    activations = rows["activation"].to_numpy(float)
    ends = parts.vocabulary(facts, change)
    density = parts.bars(activations, low=0.0)
    logits = parts.bars(change[: facts.texts.size])
    strongest = float(activations.max())
    contexts = [_activation_record(context, -1, strongest, -1) for context in parts.top(facts, rows)]
    for band in parts.bands(facts, rows):
        share = band.share_high - band.share_low
        contexts += [_activation_record(context, band.low, band.high, share) for context in band.contexts]
    return {
        "feature_index": int(facts.number[column]),
        **{name: [] for name in empty},
        "neg_str": [token.text for token in ends.low],
        "neg_values": [token.value for token in ends.low],
        "pos_str": [token.text for token in ends.high],
        "pos_values": [token.value for token in ends.high],
        "frac_nonzero": len(rows) / facts.ids.size,
        "freq_hist_data_bar_values": _bin_centers(density),
        "freq_hist_data_bar_heights": [round(share * len(rows)) for share in density.values],
        "logits_hist_data_bar_heights": logits.values,
        "logits_hist_data_bar_values": _bin_centers(logits),
        "n_prompts_total": facts.ids.shape[0],
        "n_tokens_in_prompt": facts.ids.shape[1],
        "dataset": dataset,
        "activations": contexts,
    }


def _activation_record(context: Context, low: float, high: float, share: float) -> dict[str, Json]:
    """SAEDashboard marks the strongest ones by a `bin_min` and a `bin_contains` of -1."""
    return {
        "bin_min": low,
        "bin_max": high,
        "bin_contains": share,
        "tokens": context.tokens,
        "values": context.values,
        "qualifying_token_index": context.at,
    }


def _bin_centers(bars: Bars) -> list[float]:
    return [round((a + b) / 2, 5) for a, b in itertools.pairwise(bars.edges)]
