"""Small dictionaries for one head of the model of conftest, for tests of evaluations that compare or sort atoms."""

from __future__ import annotations

from typing import Any

import torch
from sae_lens.saes.sae import SAEMetadata

from sae_lens_writesae.sae import WriteTopKSAE, WriteTopKSAEConfig

LAYER, HEAD, K, V = 1, 2, 8, 6
HOOK = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_write_vec"
STATE = HOOK.replace("write", "state")


def make_sae(model: Any, decoder: str = "rank", rank: int = 1, d_sae: int = 30, hook: str = HOOK) -> Any:
    torch.manual_seed(0)
    shape = {"d_in": K * V, "d_k": K, "d_sae": d_sae, "k": 3, "rank": rank, "decoder": decoder}
    meta = SAEMetadata(hook_name=hook, model_name=model.cfg.model_name)
    return WriteTopKSAE(WriteTopKSAEConfig(**shape, metadata=meta))


def planted(model: Any, tokens: Any) -> Any:
    """Atoms are native writes of the first sequence, encoder = decoder: each fires at its own write at the latest."""
    sae = make_sae(model)
    write = model.recurrence(tokens[:1], LAYER)
    at = torch.linspace(1, tokens.shape[1] - 1, 30).long()
    sae.v.data = write.k[0, at, HEAD][:, None].clone()
    sae.w.data = torch.nn.functional.normalize(write.u[0, at, HEAD], dim=-1)[:, None].clone()
    sae.v_enc.data, sae.w_enc.data = sae.v.data.clone(), sae.w.data.clone()
    return sae


def exact_sae(hook: str = HOOK, model_name: str = "", k: int = K, v: int = V, **metadata: Any) -> Any:
    """Atoms +e_i and -e_i of every entry: reproduces any matrix."""
    d_in = k * v
    shape = {"d_in": d_in, "d_k": k, "d_sae": 2 * d_in, "k": d_in, "encoder": "dense", "decoder": "flat"}
    sae = WriteTopKSAE(
        WriteTopKSAEConfig(**shape, metadata=SAEMetadata(hook_name=hook, model_name=model_name, **metadata))
    )
    basis = torch.cat([torch.eye(d_in), -torch.eye(d_in)])
    sae.decoder_matrix.data, sae.encoder_matrix.data = basis, basis.T.contiguous()
    return sae
