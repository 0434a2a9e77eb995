"""Which kind of dictionary an SAE is: which of the paper's variants, how large, what it was trained for."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

from sae_lens import SAE
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY

from hookpoints.errors import nearest
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
    slice_ = tuple(metadata.get("seqpos_slice") or ())
    name = "last_state" if target == "state" and slice_[:1] == (-1,) else target
    return Objective(name, metadata.get("loss") or "mse")


def variant(sae: SAE) -> str:
    """Name in `VARIANTS`, "product", or "other". The rank says nothing about a dictionary without factors."""
    if hasattr(sae.cfg, "f_key"):
        return "product"
    encoder, decoder = str(getattr(sae.cfg, "encoder", "dense")), str(getattr(sae.cfg, "decoder", "flat"))
    rank = 1 if (encoder, decoder) == ("dense", "flat") else int(getattr(sae.cfg, "rank", 1))
    fields = {"encoder": encoder, "decoder": decoder, "rank": rank}
    return next((name for name, known in VARIANTS.items() if known == fields), "other")


def n_parameters(sae: SAE) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in sae.parameters())


def sparsity_fields(architecture: str, k: int) -> dict[str, object]:
    """`k` for an architecture that has one. Others have a penalty in the place of a number of active atoms.

    Raises:
        ValueError: there is no such architecture.
    """
    if architecture not in SAE_TRAINING_CLASS_REGISTRY:
        known = [name for name in SAE_TRAINING_CLASS_REGISTRY if name.startswith("writesae")]
        near = nearest(architecture, known)
        raise ValueError(f"there is no architecture {architecture!r}{near}; those of matrices are {', '.join(known)}")
    config_class = SAE_TRAINING_CLASS_REGISTRY[architecture][1]
    return {"k": k} if "k" in {field.name for field in fields(config_class)} else {}


class FlatSize(NamedTuple):
    """A flat SAE as large as another dictionary: arguments of `training_config(..., d_sae=, sae=)`."""

    d_sae: int
    fields: dict[str, object]


def matched_flat(sae: SAE) -> FlatSize:
    """The flat SAE with as many parameters as `sae`.

    A flat atom has 2 K V numbers and those that every atom of the architecture has (a bias, a threshold), so that the
    two differ by no more than half of that (all of it, where one flat atom is already too many). At the paper's sizes,
    2,048 rank-1 atoms of 128 x 128 become 32 flat ones. Where the SAE has a `k` (BatchTopK is exported without), it is
    kept up to half of the atoms, so that a code stays sparse.
    """
    d_in, d_sae = int(sae.cfg.d_in), int(sae.cfg.d_sae)
    of_each = sum(p.shape == (d_sae,) for name, p in sae.named_parameters() if name != "b_dec")
    atoms = max(1, round((n_parameters(sae) - d_in) / (2 * d_in + of_each)))
    fields: dict[str, object] = {"encoder": "dense", "decoder": "flat"}
    k = getattr(sae.cfg, "k", None)
    if k is not None:
        fields["k"] = type(k)(max(1, min(k, atoms // 2)))
    return FlatSize(atoms, fields)
