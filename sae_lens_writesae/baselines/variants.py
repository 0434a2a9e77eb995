"""Which of the paper's variants a dictionary is, how many numbers it has, and a flat SAE that has as many."""

from __future__ import annotations

from typing import Any

from sae_lens_writesae.sae.base import VARIANTS


def fields(sae: Any) -> dict[str, Any]:
    """encoder, decoder and rank of an SAE; SAELens' own are dense and flat."""
    cfg = sae.cfg
    return {
        "encoder": str(getattr(cfg, "encoder", "dense")),
        "decoder": str(getattr(cfg, "decoder", "flat")),
        "rank": int(getattr(cfg, "rank", 1)),
    }


def variant(sae: Any) -> str:
    """Name in `VARIANTS`, or "other". The rank says nothing of a dictionary without factors."""
    own = fields(sae)
    if (own["encoder"], own["decoder"]) == ("dense", "flat"):
        own["rank"] = 1
    return next((name for name, known in VARIANTS.items() if known == own), "other")


def parameters(sae: Any) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in sae.parameters())


def matched_flat(sae: Any) -> dict[str, Any]:
    """Fields of a flat SAE with as many parameters as `sae`: d_sae and those of `training_config(..., sae=)`.

    A flat atom has 2 K V numbers and those that every atom of the architecture has (a bias, a threshold), so that the
    two differ by no more than half of that (all of it, where one flat atom is already too many). At the paper's sizes,
    2,048 rank-1 atoms of 128 x 128 become 32 flat ones. Where the SAE has a `k` (BatchTopK is exported without), it is
    kept up to half of the atoms, so that a code stays sparse.

    Example: `training_config(model, layer, head, d_sae=found.pop("d_sae"), sae=found)`.
    """
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    of_each = sum(p.shape == (d_sae,) for name, p in sae.named_parameters() if name != "b_dec")
    atoms = max(1, round((parameters(sae) - d_in) / (2 * d_in + of_each)))
    made: dict[str, Any] = {"d_sae": atoms, "encoder": "dense", "decoder": "flat"}
    k = getattr(sae.cfg, "k", None)
    return made if k is None else made | {"k": type(k)(max(1, min(k, atoms // 2)))}
