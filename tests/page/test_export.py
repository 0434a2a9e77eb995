"""Atoms as other tools read them, checked against schemas written from the source of these tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planted_atoms import HOOK, SMALL, held_out, planted_sae
from safetensors.numpy import load_file
from torch import Tensor

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from sae_lens_writesae.sae import WriteTopKSAE
from writesae.experiment.lab import Lab
from writesae.page.atoms import collect
from writesae.page.atoms.export import neuronpedia_batch, write_delphi
from writesae.page.atoms.measure import Facts
from writesae.show import Export

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
    # `CacheConfig` of eai-delphi 0.1.3, delphi/config.py, and the name that `LatentCache.save_config` adds
    "cache": dict.fromkeys(("batch_size", "cache_ctx_len", "n_tokens", "n_splits"), int)
    | dict.fromkeys(("dataset_repo", "dataset_split", "dataset_name", "dataset_column", "model_name"), str),
}


def fits(value: dict[str, Any], schema: str) -> dict[str, Any]:
    """The value, which must have the fields of a schema and no others."""
    assert value.keys() == SCHEMAS[schema].keys()
    assert all(isinstance(value[name], kind) for name, kind in SCHEMAS[schema].items())
    return value


@pytest.fixture(scope="module")
def tokens(embedded: HookedRecurrent) -> Tensor:
    return held_out(embedded)


@pytest.fixture(scope="module")
def planted(embedded: HookedRecurrent, tokens: Tensor) -> WriteTopKSAE:
    return planted_sae(embedded, tokens)


def test_neuronpedia_gets_the_numbers_of_the_pages(
    embedded: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor
) -> None:
    data = SMALL.collect(embedded, planted, tokens, progress=False)
    facts = Facts(SMALL, embedded, planted, tokens, progress=False)
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
    assert not {"writes", "traces", "direct"} & vars(facts).keys()  # what no dashboard shows


def test_what_no_other_tool_shows_is_not_measured(
    planted: WriteTopKSAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Quality needs a pass of the model for every sequence and replacement; cosines and memory cost, too."""
    for name in ("qualities", "_page"):
        monkeypatch.setattr(collect, name, lambda *_: pytest.fail("was measured"))
    planted.save_model(tmp_path / "sae")
    (text := tmp_path / "text.txt").write_text(shipped.text("test")[:3000])
    for to, file in (("neuronpedia", "batch-0.json"), ("delphi", HOOK)):
        export = Export(sae=tmp_path / "sae", to=to, text=text, context_size=48, splits=2, out=tmp_path / to)
        assert export.run(SMALL, progress=False) == tmp_path / to / file


def test_delphi_gets_every_firing_at_its_place(
    embedded: HookedRecurrent, planted: WriteTopKSAE, tokens: Tensor, tmp_path: Path
) -> None:
    """As `TensorBuffer.load` of eai-delphi 0.1.3 (delphi/latents/loader.py) reads it: atoms count from the first of the
    file's name; every entry of the folder is a hook with a config."""
    lab = Lab(embedded, {"": planted}, tokens)
    folder = write_delphi(lab, tmp_path / "cache", n_splits=4, dataset="speeches")
    assert [entry.name for entry in folder.parent.iterdir()] == [HOOK]
    config = fits(json.loads((folder / "config.json").read_text()), "cache")
    assert (config["cache_ctx_len"], config["n_tokens"], config["n_splits"]) == (tokens.shape[1], tokens.numel(), 4)
    found, next_atom = torch.zeros(*tokens.shape, int(planted.cfg.d_sae)), 0
    for file in sorted(folder.glob("*.safetensors"), key=lambda file: int(file.stem.split("_")[0])):
        first, last = map(int, file.stem.split("_"))
        split = load_file(file)
        assert first == next_atom and set(split) == {"locations", "activations", "tokens"}
        assert split["locations"].dtype == np.uint16 and split["activations"].dtype == np.float16
        np.testing.assert_array_equal(split["tokens"], tokens.numpy())
        sequence, position, atom = split["locations"].astype(np.int64).T
        assert len(atom) == 0 or atom.max() <= last - first
        found[sequence, position, atom + first] = torch.from_numpy(split["activations"].astype(np.float32))
        next_atom = last + 1
    _, cache = embedded.run_with_cache(tokens, names_filter=[HOOK])
    expected = planted.encode(cache[HOOK]).detach()
    assert next_atom == planted.cfg.d_sae and (expected > 0).sum() > 0
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="splits"):
        write_delphi(lab, tmp_path / "many", n_splits=7)
