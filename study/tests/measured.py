"""Small results of evaluations, measured once for all tests, as `measured.toml` says: on the embedded model, with
dictionaries without training, the same on every run, whose atoms are native writes of held-out text."""

from __future__ import annotations

import tomllib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from saes import sae_of
from torch import Tensor
from torch.nn.functional import normalize

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import WriteTopKSAE
from writesae_study.evaluations import EVALUATIONS
from writesae_study.experiment.evaluation import Result

FILE: dict[str, Any] = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
PLACE = (2, 2)
"""Layer and head. Writes there last (half-life of 5 tokens), later layers can read them, and deleting one moves the
logits far more than float32 rounding does."""
ATOMS_FROM = 16
"""Sequence of the held-out text from which on atoms are drawn; evaluations use the sequences before it."""


@cache
def load_model() -> HookedRecurrent:
    return HookedRecurrent.from_pretrained("embedded")


@cache
def sequences(length: int = 48) -> Tensor:
    """[N,length] tokens: the held-out text from its beginning, cut into sequences without gaps."""
    ids = load_model().to_tokens(embedded.text("test")[:12_000], prepend_bos=False, truncate=False)[0]
    n = len(ids) // length
    return ids[: n * length].view(n, length)


@torch.no_grad()
def make_dictionary(*, seed: int = 0, rank: int = 1, encoder: str = "bilinear", flat: bool = False) -> WriteTopKSAE:
    """A `writesae_topk` SAE of 48 atoms, 4 of them at a token.

    Atom f is the sum of `rank` native writes, drawn with `seed`, of Frobenius norm 1. The encoder equals the decoder,
    and the biases are zero.
    """
    (layer, head), d_sae = PLACE, 48
    writes = load_model().recurrence(sequences()[ATOMS_FROM : ATOMS_FROM + 8], layer)
    keys, values = writes.k[:, :, head].flatten(0, 1), writes.u[:, :, head].flatten(0, 1)
    drawn = np.random.default_rng(seed).choice(len(keys), d_sae * rank, replace=False)
    v, w = (normalize(side[torch.from_numpy(drawn)].view(d_sae, rank, -1), dim=-1) for side in (keys, values))
    atoms = LowRank(v, w / (v.mT @ w).flatten(1).norm(dim=1)[:, None, None])
    more = {} if flat else {"encoder": encoder}
    return sae_of(f"blocks.{layer}.mixer.heads.{head}.hook_write_vec", "embedded", atoms, 4, flat=flat, **more)


@cache
def result_of(kind: str, *, on_device: bool = False) -> Result:
    """On the host or on the pretended device."""
    case = FILE["cases"][kind]
    recipes = case.get("dictionaries", {"sae": "write"})
    saes = {label: make_dictionary(**FILE["recipes"][recipe]) for label, recipe in recipes.items()}
    n, length = case.get("shape", (8, 48))
    evaluation, tokens = EVALUATIONS[kind].from_dict(case["settings"]), sequences(length)[:n]
    if not on_device:
        return evaluation.run(load_model(), saes, tokens, progress=False)
    import device  # which an old torch does not have

    with device.pretended():
        model = HookedRecurrent.from_pretrained("embedded", device="npu", self_check=False)
        there = {label: sae.to("npu") for label, sae in saes.items()}
        return evaluation.run(model, there, tokens, progress=False)
