"""The standard numbers of a dictionary: exact ones reach 1, silent ones 0, SAELens' evaluator agrees."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, ActivationsStore
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.training.activation_scaler import ActivationScaler
from saes import HEAD, HOOK, LAYER, STATE, muted, random_sae
from saes import exact_sae as exact
from torch import Tensor

from hookpoints import HookedRecurrent, WriteEdit
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.sae.runner import training_config
from sae_lens_writesae.sae.target import HeadHook
from writesae.dictionary.quality import DictionaryQuality, dictionary_quality, head_effects, qualities
from writesae.experiment.lab import Lab
from writesae.head.writes import half_lives
from writesae.training import quiet

pytestmark = pytest.mark.usefixtures("no_grad")


def finite(quality: DictionaryQuality) -> dict[str, Any]:
    """As JSON, which holds no NaN."""
    return json.loads(json.dumps(quality.to_dict(), allow_nan=False))


def test_an_exact_dictionary_gives_everything_back(model: HookedRecurrent, short_text: Tensor) -> None:
    measured = qualities(Lab(model, {"write": exact(HOOK), "state": exact(STATE)}, short_text))
    for target, quality in measured.items():
        assert quality.target == target and quality.n_tokens == short_text.numel()
        assert quality.explained == pytest.approx(1, abs=1e-6) and quality.recovered is not None
        assert quality.recovered.mean == pytest.approx(1, abs=1e-4) and quality.recovered.n_clusters == 6
        assert quality.coverage == 1 and quality.l0 > 1 and quality.floor < 1e-9 < quality.deleted.mean
    # Zero states are the writes deleted.
    assert measured["write"].deleted.mean == pytest.approx(measured["state"].deleted.mean, rel=1e-4)


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_explained_variance_is_around_the_mean_of_all_tokens(
    model: HookedRecurrent, short_text: Tensor, hook: str
) -> None:
    """1 - sum |X - X^|^2 / sum |X - mean|^2 by hand."""
    sae = random_sae(model, target=HeadHook.parse(hook).target)
    x = model.run_with_cache(short_text, names_filter=hook)[1][hook].double()
    lost, spread = ((x - mean).square().sum((1, 2)) for mean in (sae(x.float()), x.mean((0, 1))))
    assert spread.sum() < 0.99 * x.square().sum()
    assert dictionary_quality(model, sae, short_text).explained == pytest.approx(float(1 - lost.sum() / spread.sum()))


def test_the_dictionary_of_planted_writes_has_their_cosine(
    model64: HookedRecurrent, planted: SAE, equal_rows: Tensor
) -> None:
    oracle = dictionary_quality(model64, planted, equal_rows)
    assert oracle.explained == pytest.approx(1, abs=1e-4) and oracle.cosine == pytest.approx(1, abs=1e-4)
    assert oracle.l0 == oracle.alive == oracle.coverage == 1
    assert oracle.recovered is not None and oracle.recovered.low > 0.99


@pytest.mark.parametrize("hook", [HOOK, STATE])
def test_recovered_kl_is_that_of_saelens(model: HookedRecurrent, short_text: Tensor, hook: str) -> None:
    sae = random_sae(model, target=HeadHook.parse(hook).target)
    sizes: dict[str, Any] = {"d_sae": 4, "sae": {"k": 1}, "train_batch_size_tokens": 24, "n_batches_in_buffer": 4}
    target = HeadHook.parse(hook).target
    cfg = training_config(
        model, LAYER, HEAD, target=target, context_size=24, is_dataset_tokenized=True, verbose=False, **sizes
    )
    config = EvalConfig(batch_size_prompts=1, n_eval_reconstruction_batches=1, compute_kl=True)
    theirs: list[dict[str, float]] = []
    with quiet():
        for row in short_text.tolist():
            store = ActivationsStore.from_config(model, cfg, override_dataset=Dataset.from_dict({"tokens": [row]}))
            metrics, _ = run_evals(sae, store, model, ActivationScaler(), config, exclude_special_tokens=False)
            theirs.append(metrics["model_behavior_preservation"])
    ours = dictionary_quality(model, sae, short_text)
    ablated, shares = ([each[name] for each in theirs] for name in ("kl_div_with_ablation", "kl_div_score"))
    assert ours.deleted.mean == pytest.approx(np.mean(ablated), rel=1e-3)
    assert ours.recovered is not None and ours.recovered.mean == pytest.approx(np.median(shares), abs=1e-3)


def test_dead_atoms_equal_atoms_and_one_sequence_give_no_nan(model: HookedRecurrent, short_text: Tensor) -> None:
    dead, equal = random_sae(model), random_sae(model)
    dead.b_enc.fill_(-1e6)
    for name in ("v", "w", "v_enc", "w_enc"):
        getattr(equal, name).copy_(getattr(equal, name)[:1].expand_as(getattr(equal, name)))
    measured = qualities(Lab(model, {"dead": dead, "equal": equal}, short_text))
    assert finite(measured["dead"]) | {"l0": 0, "alive": 0, "coverage": 0, "cosine": None} == finite(measured["dead"])
    recovered = measured["dead"].recovered
    assert recovered is not None and recovered.mean == pytest.approx(0, abs=1e-6)  # it writes nothing, as deletion does
    finite(measured["equal"])
    one = finite(dictionary_quality(model, equal, short_text[:1]))
    assert one["deleted"]["low"] is None and one["recovered"]["high"] is None


def test_a_head_that_writes_nothing_has_nothing_to_recover(model: HookedRecurrent, short_text: Tensor) -> None:
    with muted(model, 24):
        quality = dictionary_quality(model, random_sae(model), short_text)
    assert finite(quality) | {"explained": None, "recovered": None, "cosine": None} == finite(quality)
    assert quality.deleted.mean == 0


def test_what_gives_no_coefficients_is_named(model: HookedRecurrent, short_text: Tensor) -> None:
    scaled, broken = random_sae(model), random_sae(model)
    scaled.cfg.normalize_activations = "expected_average_only_in"
    with pytest.raises(ValueError, match="expected_average_only_in"):
        dictionary_quality(model, scaled, short_text)
    broken.encode = lambda x: torch.full((len(x), 12), torch.nan)
    with pytest.raises(NothingToMeasureError):
        dictionary_quality(model, broken, short_text)
    assert list(qualities(Lab(model, {"a": scaled, "b": broken, "c": random_sae(model)}, short_text))) == ["c"]


def test_what_a_heads_writes_do_is_the_kl_of_deleting_them(model: HookedRecurrent, short_text: Tensor) -> None:
    table = head_effects(model, short_text[:2])
    places = [(layer, head) for layer in model.cfg.recurrent_layers for head in range(model.cfg.layer(layer).H)]
    assert sorted(zip(table["layer"], table["head"])) == places and table["nats"].is_monotonic_decreasing
    kl = []
    for sequence in short_text[:2, None]:
        session = model.edit_session(sequence)
        edited = session.run([[WriteEdit(LAYER, HEAD, t, mode="delete") for t in range(24)]]).logits[0]
        p, q = (logits.double().log_softmax(-1) for logits in (session.logits[0], edited))
        kl.append((p.exp() * (p - q)).sum(-1).mean())
    nats = table.set_index(["layer", "head"])["nats"]
    assert nats[LAYER, HEAD] == pytest.approx(float(torch.stack(kl).mean()), rel=1e-4)


def test_half_lives_follow_the_key_of_each_write(model: HookedRecurrent, short_text: Tensor) -> None:
    """Of the writes that have 12 tokens after them."""
    recurrence = model.recurrence(short_text[:1], LAYER).select(heads=slice(0, 1))
    keys = [recurrence.propagate(recurrence.k[0, t], t, 0)[0, 0, :13] for t in range(12)]
    sizes = torch.stack(keys).norm(dim=-1)  # [writes,tokens]
    not_yet_half = (sizes >= sizes[:, :1] / 2).long().cumprod(1)
    assert half_lives(recurrence)[:, 0].tolist() == not_yet_half.sum(1).clamp_max(12).tolist()
