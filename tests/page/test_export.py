"""Atoms as Neuronpedia reads them, with the fields that SAEDashboard writes."""

from __future__ import annotations

import json

from torch import Tensor

from hookpoints import HookedRecurrent
from page.planted_atoms import SMALL
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.page.atoms import AtomPagesData
from writesae.page.atoms.export import neuronpedia_batch
from writesae.page.atoms.measure import AtomFacts

# Of SAEDashboard 0.8.0, sae_dashboard/neuronpedia/neuronpedia_dashboard.py: the fields of `to_dict` of a batch, of a
# feature, and of an activation without direct feature attribution.
BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
# fmt: off
FEATURE = {
    "feature_index", "n_prompts_total", "n_tokens_in_prompt", "frac_nonzero", "dataset",
    "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson", "neg_str",
    "neg_values", "pos_str", "pos_values", "freq_hist_data_bar_values", "freq_hist_data_bar_heights",
    "logits_hist_data_bar_heights", "logits_hist_data_bar_values", "decoder_weights_dist", "activations",
    "vector",
}
# fmt: on
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


def test_neuronpedia_gets_the_numbers_of_the_pages(
    model: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, data: AtomPagesData
) -> None:
    facts = AtomFacts(SMALL, model, planted, tokens)
    batch = json.loads(json.dumps(neuronpedia_batch(facts, "speeches"), allow_nan=False))
    assert batch.keys() == BATCH
    assert batch["model_id"] == data.info["model"] and batch["layer"] == data.info["layer"]
    for page, feature in zip(data.atoms, batch["features"], strict=True):
        assert feature.keys() == FEATURE
        assert (feature["feature_index"], feature["frac_nonzero"]) == (page.atom, page.rate)
        assert sum(feature["freq_hist_data_bar_heights"]) == page.n_firings
        assert page.effect is not None and feature["pos_str"] == [t.text for t in page.effect.tokens.high]
        shown = feature["activations"]
        assert all(each.keys() == ACTIVATION for each in shown)
        peaks = [each["values"][each["qualifying_token_index"]] for each in shown]
        top = [peak for each, peak in zip(shown, peaks) if each["bin_contains"] == -1]
        assert top == [c.values[c.at] for c in page.top]
        bands = [(each, peak) for each, peak in zip(shown, peaks) if each["bin_contains"] > 0]
        assert len(bands) == page.n_firings  # all of them, with these settings
        assert all(each["bin_min"] <= peak <= each["bin_max"] for each, peak in bands)
    assert not {"writes", "half_lives", "direct"} & vars(facts).keys()  # what no dashboard shows
