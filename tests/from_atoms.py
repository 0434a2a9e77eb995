"""Dictionaries whose atoms are given, for tests of whole evaluations."""

from __future__ import annotations

import torch
from sae_lens.saes.sae import SAEMetadata

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig


@torch.no_grad()
def sae_of(
    hook: str,
    model: str | None,
    atoms: LowRank,
    k: int,
    *,
    read: LowRank | None = None,
    flat: bool = False,
    **cfg: object,
) -> WriteTopKSAE:
    """At each token the k atoms with the largest inner products with what the hook carries, if these are positive.

    Args:
        atoms: F matrices of rank R, as they are written at activation 1.
        read: what activations are inner products with; by default the atoms.
        flat: keep the same atoms as dense matrices (a FlatSAE).
        cfg: more fields of the config.
    """
    kinds = {"encoder": "dense", "decoder": "flat"} if flat else {"rank": atoms.rank}
    d_k, d_v, read = atoms.keys.shape[-1], atoms.values.shape[-1], atoms if read is None else read
    meta = SAEMetadata(hook_name=hook, model_name=model)
    sizes = {"d_in": d_k * d_v, "d_k": d_k, "d_sae": len(atoms), "k": k}
    sae = WriteTopKSAE(WriteTopKSAEConfig(**sizes | kinds | cfg, metadata=meta))  # pyright: ignore[reportArgumentType]
    sae = sae.to(atoms.keys.dtype)
    given = {"v": atoms.keys, "w": atoms.values, "v_enc": read.keys, "w_enc": read.values}
    if flat:
        given = {"decoder_matrix": atoms.dense().flatten(1), "encoder_matrix": read.dense().flatten(1).T}
    for name in given.keys() & dict(sae.named_parameters()).keys():  # a tied encoder has no factors of its own
        getattr(sae, name).copy_(given[name])
    return sae
