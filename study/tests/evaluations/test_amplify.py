"""Scaled atoms: against text sampled by hand, what selection sees, and tables of known answer."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import torch
from saes import random_sae
from torch import Tensor

from hookpoints import HookedRecurrent
from sae_lens_writesae import scale_atoms
from writesae_study.evaluations.amplify import Amplify, counts_at
from writesae_study.experiment.draws import halves
from writesae_study.experiment.evaluation import Result
from writesae_study.experiment.generation import sample_continuations

SMALL: dict[str, Any] = {
    "n_tokens": 2,
    "min_count": 2,
    "min_firings": 1,
    "prompts": 3,
    "prompt_tokens": 5,
    "new_tokens": 6,
}


def run(model: HookedRecurrent, ids: Tensor, sae: Any, **changes: Any) -> Result:
    return Amplify(**SMALL | changes).run(model, sae, ids, progress=False)


def test_atoms_of_all_heads_of_a_layer_are_scaled_together(model64: HookedRecurrent, prompt_text: Tensor) -> None:
    saes = {f"H{head}": random_sae(model64, head=head) for head in (2, 0)}
    settings = {"atoms_per_token": 2, "factors": (1e3,), "headline": 1e3, "new_tokens": 12}
    result = Amplify(**SMALL | settings).run(model64, saes, prompt_text, progress=False)
    atoms = result.tables["atoms"]
    assert atoms.groupby("token", sort=False)["head"].unique().map(list).tolist() == [[2, 0]] * 2
    assert not atoms.duplicated(["head", "atom"]).any() and atoms.groupby(["token", "head"]).size().max() == 2
    assert result.info["n_edited_runs"] == 3 * (1 + 2 * 2)  # prompts; tokens, atom and random
    prompts, counts = prompt_text[halves(len(prompt_text), 0).test[:3], :5], counts_at(result, 1e3).wide
    texts, alone = {"nothing": sample_continuations(model64, prompts, 12, seed=0)}, []
    for token, team in atoms.groupby("token"):
        numbers = {f"H{head}": of_head["atom"].tolist() for head, of_head in team.groupby("head", sort=False)}
        with scale_atoms(model64, saes["H2"], numbers["H2"], 1e3):
            first = sample_continuations(model64, prompts, 12, seed=0)
            with scale_atoms(model64, saes["H0"], numbers["H0"], 1e3):
                texts[token] = sample_continuations(model64, prompts, 12, seed=0)
        alone.append(torch.equal(first, texts[token]))
    one, two = atoms["token"].unique()
    for token, other in ((one, two), (two, one)):
        rows = counts.query("token == @token")
        for condition, text in (("nothing", texts["nothing"]), ("atom", texts[token]), ("other", texts[other])):
            assert rows[condition].tolist() == (text == token).sum(1).tolist()
    assert not all(alone)  # the second head matters
    assert "2 heads" in result.claims()[0].unit and result.label == "L1, 2 heads"


LETTERS = "abcdefghijkl"


def counted(atom: float, random: float = 0.0, other: float = 0.0, n_tokens: int = 12, noise: int = 1) -> Result:
    """Mean changes of counts over 20 prompts and some tokens, in whole numbers but for `other`."""
    rng = np.random.default_rng(0)
    rows = [
        {"token": token, "text": LETTERS[token], "prompt": prompt, "sequence": prompt, "fires": 2.0}
        | {"condition": condition, "factor": 1.0 if condition == "nothing" else 4.0, "count": native + change}
        for token in range(n_tokens)
        for prompt in range(20)
        for native, wobble in [(float(rng.integers(3, 8)), float(rng.integers(-noise, noise + 1)))]
        for condition, change in (
            *(("nothing", 0.0), ("atom", atom + wobble)),
            *(("random", random), ("other", other)),
        )
    ]
    atoms = pd.DataFrame({"token": range(n_tokens), "text": list(LETTERS[:n_tokens]), "atom": range(n_tokens)})
    atoms = atoms.assign(phi=0.5, head=0)
    evaluation = Amplify(factors=(4.0,), new_tokens=64)
    return Result(evaluation, {"label": "x"}, {"atoms": atoms, "counts": pd.DataFrame(rows)})
