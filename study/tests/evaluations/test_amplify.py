"""Scaled atoms: against text sampled by hand, what selection sees, and tables of known answer."""

from __future__ import annotations

import itertools
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


def test_atoms_of_all_heads_of_a_layer_are_scaled_together(model64: HookedRecurrent, prompt_text: Tensor) -> None:
    """Counts are those of text that is sampled while the atoms of both heads are scaled by hand."""
    saes = {f"H{head}": random_sae(model64, head=head) for head in (2, 0)}
    sizes: dict[str, Any] = {"n_tokens": 2, "min_count": 2, "min_firings": 1, "prompts": 3, "prompt_tokens": 5}
    evaluation = Amplify(**sizes, atoms_per_token=2, factors=(1e3,), headline=1e3, new_tokens=12)
    result = evaluation.run(model64, saes, prompt_text, progress=False)
    atoms, counts = result.tables["atoms"], counts_at(result, 1e3).wide.set_index("token")
    assert not atoms.duplicated(["head", "atom"]).any() and atoms.groupby(["token", "head"]).size().max() == 2
    assert result.info["n_edited_runs"] == 3 * (1 + 2 * 2)  # prompts; tokens, atom and random
    prompts, texts, alone = prompt_text[halves(len(prompt_text), 0).test[:3], :5], {}, []
    for token, team in atoms.groupby("token"):
        of_two, of_zero = (team.loc[team["head"] == head, "atom"].tolist() for head in (2, 0))
        with scale_atoms(model64, saes["H2"], of_two, 1e3):
            alone.append(sample_continuations(model64, prompts, 12, seed=0))
            with scale_atoms(model64, saes["H0"], of_zero, 1e3):
                texts[token] = sample_continuations(model64, prompts, 12, seed=0)
    for token, other in itertools.permutations(texts):
        for condition, text in (("atom", texts[token]), ("other", texts[other])):
            assert counts.loc[token, condition].tolist() == (text == token).sum(1).tolist()
    assert not all(map(torch.equal, alone, texts.values()))  # the second head matters
    assert "2 heads" in result.claims()[0].unit and result.label == "L1, 2 heads"


LETTERS = list("abcdefghijkl")


def counted(atom: float, random: float = 0.0, other: float = 0.0, n_tokens: int = 12) -> Result:
    """Mean changes of counts over 20 prompts and some tokens, in whole numbers but for `other`."""
    rng = np.random.default_rng(0)
    places = pd.MultiIndex.from_product([range(n_tokens), range(20)], names=["token", "prompt"]).to_frame(index=False)
    places = places.assign(sequence=places["prompt"], fires=2.0)
    native = rng.integers(3, 8, len(places)).astype(float)
    of_atom = native + atom + rng.integers(-1, 2, len(places))
    made = {"nothing": native, "atom": of_atom, "random": native + random, "other": native + other}
    counts = pd.concat([places.assign(condition=name, factor=4.0, count=count) for name, count in made.items()])
    atoms = pd.DataFrame({"token": range(n_tokens), "text": LETTERS[:n_tokens], "atom": range(n_tokens)})
    tables = {"atoms": atoms.assign(phi=0.5, head=0), "counts": counts}
    return Result(Amplify(factors=(4.0,), new_tokens=64), {"label": "x"}, tables)
