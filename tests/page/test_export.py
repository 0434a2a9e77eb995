"""Atoms as Neuronpedia reads them, checked against schemas written from its source and SAEDashboard's."""

from __future__ import annotations

import json
from typing import Any

from torch import Tensor

from hookpoints import HookedRecurrent
from page.planted_atoms import SMALL
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.page.atoms import AtomPagesData
from writesae.page.atoms.export import neuronpedia_batch
from writesae.page.atoms.measure import AtomFacts

_INTS = ("feature_index", "n_prompts_total", "n_tokens_in_prompt")
_LISTS = (
    "neuron_alignment_indices neuron_alignment_values neuron_alignment_l1 correlated_neurons_indices "
    "correlated_neurons_l1 correlated_neurons_pearson correlated_features_indices correlated_features_l1 "
    "correlated_features_pearson neg_str neg_values pos_str pos_values freq_hist_data_bar_values "
    "freq_hist_data_bar_heights logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist "
    "activations vector"
)
SCHEMAS: dict[str, dict[str, Any]] = {
    # `NeuronpediaDashboardBatch.to_dict`, SAEDashboard 0.8.0, sae_dashboard/neuronpedia/neuronpedia_dashboard.py
    "batch": {"model_id": str, "layer": int, "sae_set": str, "sae_id_suffix": str, "features": list},
    # `NeuronpediaDashboardFeature.to_dict`, of the same file
    "feature": dict.fromkeys(_LISTS.split(), list)
    | dict.fromkeys(_INTS, int)
    | {"frac_nonzero": float, "dataset": str},
    # `NeuronpediaDashboardActivation.to_dict`; fields of direct feature attribution left out
    "activation": dict.fromkeys(("bin_min", "bin_max", "bin_contains"), (int, float))
    | {"tokens": list, "values": list, "qualifying_token_index": int},
}


def fits(value: dict[str, Any], schema: str) -> dict[str, Any]:
    """The value, which must have the fields of a schema and no others."""
    assert value.keys() == SCHEMAS[schema].keys()
    assert all(isinstance(value[name], kind) for name, kind in SCHEMAS[schema].items())
    return value


def test_neuronpedia_gets_the_numbers_of_the_pages(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, data: AtomPagesData
) -> None:
    facts = AtomFacts(SMALL, model, planted, tokens, progress=False)
    batch = fits(json.loads(json.dumps(neuronpedia_batch(facts, "speeches"), allow_nan=False)), "batch")
    assert batch["model_id"] == data.info["model"] and batch["layer"] == data.info["layer"]
    for page, feature in zip(data.atoms, batch["features"], strict=True):
        fits(feature, "feature")
        assert (feature["feature_index"], feature["frac_nonzero"]) == (page.atom, page.rate)
        assert sum(feature["freq_hist_data_bar_heights"]) == page.n_firings
        assert page.effect is not None and feature["pos_str"] == [t.text for t in page.effect.tokens.high]
        shown = [fits(each, "activation") for each in feature["activations"]]
        peaks = [each["values"][each["qualifying_token_index"]] for each in shown]
        top = [peak for each, peak in zip(shown, peaks) if each["bin_contains"] == -1]
        assert top == [c.values[c.at] for c in page.top]
        bands = [(each, peak) for each, peak in zip(shown, peaks) if each["bin_contains"] > 0]
        assert len(bands) == page.n_firings  # all of them, with these settings
        assert all(each["bin_min"] <= peak <= each["bin_max"] for each, peak in bands)
    assert not {"writes", "half_lives", "direct"} & vars(facts).keys()  # what no dashboard shows
