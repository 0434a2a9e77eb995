"""Dictionaries without training, the same on every run: their atoms are native writes of held-out text."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from sae_lens.saes.sae import SAEMetadata
from torch import Tensor

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig

from .cases import HEADS, Case

ATOMS_FROM = 16
"""Sequence of the held-out text from which on atoms are drawn; evaluations use the sequences before it."""


@cache
def load_model(name: str) -> HookedRecurrent:
    """An embedded model; one object for all cases."""
    return HookedRecurrent.from_pretrained(name)


@cache
def sequences(name: str, length: int) -> Tensor:
    """[N,length] tokens: the held-out text from its beginning, cut into sequences without gaps."""
    ids = load_model(name).to_tokens(embedded.text("test")[:12_000], prepend_bos=False, truncate=False)[0]
    n = len(ids) // length
    return ids[: n * length].view(n, length)


def tokens_of(case: Case) -> Tensor:
    """[N,T] tokens that the case is evaluated on."""
    n, length = case.shape
    if n > ATOMS_FROM:
        raise ValueError(f"{case.name} asks for {n} sequences, but atoms are drawn from sequence {ATOMS_FROM} on")
    return sequences(case.model, length)[:n]


@torch.no_grad()
def make_dictionary(
    model_name: str,
    *,
    seed: int = 0,
    target: str = "write",
    rank: int = 1,
    encoder: str = "bilinear",
    decoder: str = "rank",
    norms: tuple[float, float] = (1.0, 1.0),
    bias: float = 0.0,
    d_sae: int = 48,
    k: int = 4,
    length: int = 48,
) -> WriteTopKSAE:
    """A `writesae_topk` SAE on the head that `HEADS` names.

    Atom f is the sum of `rank` native writes (of 2 for a flat decoder, which has no rank), drawn with `seed`, rescaled
    to a Frobenius norm that goes linearly from norms[0] to norms[1] over the atoms. The encoder equals the decoder,
    `b_enc` is zero, and `b_dec` is `bias` times the mean of the atoms.
    """
    model, (layer, head) = load_model(model_name), HEADS[model_name]
    terms = 2 if decoder == "flat" else rank
    writes = model.recurrence(sequences(model_name, length)[ATOMS_FROM : ATOMS_FROM + 8], layer)
    keys, values = writes.k[:, :, head].flatten(0, 1), writes.u[:, :, head].flatten(0, 1)
    drawn = np.random.default_rng(seed).choice(len(keys), d_sae * terms, replace=False)
    v, w = (side[torch.from_numpy(drawn)].view(d_sae, terms, -1) for side in (keys, values))
    v, w = (torch.nn.functional.normalize(side, dim=-1) for side in (v, w))
    size = torch.linspace(*norms, d_sae) / (v.mT @ w).flatten(1).norm(dim=1)
    w = w * size[:, None, None]
    atoms = (v.mT @ w).flatten(1)
    sae = WriteTopKSAE(
        WriteTopKSAEConfig(
            d_in=atoms.shape[1],
            d_sae=d_sae,
            k=k,
            d_k=v.shape[-1],
            rank=rank,
            encoder=encoder,  # pyright: ignore[reportArgumentType]
            decoder=decoder,  # pyright: ignore[reportArgumentType]
            metadata=SAEMetadata(
                hook_name=f"blocks.{layer}.mixer.heads.{head}.hook_{target}_vec", model_name=model_name
            ),
        )
    )
    if decoder == "flat":
        sae.decoder_matrix.copy_(atoms)
    else:
        sae.v.copy_(v)
        sae.w.copy_(w)
    if encoder == "dense":
        sae.encoder_matrix.copy_(atoms.T)
    elif encoder == "bilinear":
        sae.v_enc.copy_(v)
        sae.w_enc.copy_(w)
    sae.b_dec.copy_(bias * atoms.mean(0))
    return sae
