"""What kind of dictionary an SAE is: which of the paper's variants, and what it was trained for."""

from __future__ import annotations

from typing import NamedTuple

from sae_lens import SAE

from sae_lens_writesae.choices import VARIANTS
from sae_lens_writesae.sae.target import HeadHook


class Objective(NamedTuple):
    """What a dictionary was trained for."""

    target: str
    """write, state or last_state."""
    loss: str
    """mse, reads or write."""


def objective(sae: SAE) -> Objective:
    """Target and loss of a trained SAE, from its metadata."""
    metadata = sae.cfg.metadata
    target = HeadHook.of(sae).target
    # SAELens' own field: a slice from -1 on takes the last token of each sequence.
    last = target == "state" and tuple(metadata.get("seqpos_slice") or ())[:1] == (-1,)
    return Objective("last_state" if last else target, metadata.get("loss") or "mse")


def variant(sae: SAE) -> str:
    """Name in `VARIANTS`, or "other". The rank says nothing about a dictionary without factors."""
    # SAELens' own classes have neither field: dense encoders and flat atoms.
    encoder = getattr(sae.cfg, "encoder", "dense")
    decoder = getattr(sae.cfg, "decoder", "flat")
    is_flat = encoder == "dense" and decoder == "flat"
    fields = {"encoder": encoder, "decoder": decoder, "rank": 1 if is_flat else getattr(sae.cfg, "rank", 1)}
    return next((name for name, known in VARIANTS.items() if known == fields), "other")
