"""What kind of dictionary an SAE is: which of the paper's variants, how large, what it was trained for."""

from __future__ import annotations

from typing import NamedTuple

from sae_lens import SAE

from sae_lens_writesae.choices import VARIANTS
from sae_lens_writesae.sae.architectures import training_config_class
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
    """Name in `VARIANTS`, "product", or "other". The rank says nothing about a dictionary without factors."""
    if hasattr(sae.cfg, "f_key"):
        return "product"
    # SAELens' own classes have neither field: dense encoders and flat atoms.
    encoder = getattr(sae.cfg, "encoder", "dense")
    decoder = getattr(sae.cfg, "decoder", "flat")
    is_flat = encoder == "dense" and decoder == "flat"
    fields = {"encoder": encoder, "decoder": decoder, "rank": 1 if is_flat else getattr(sae.cfg, "rank", 1)}
    return next((name for name, known in VARIANTS.items() if known == fields), "other")


def n_parameters(sae: SAE) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in sae.parameters())


def sparsity_fields(architecture: str, k: int) -> dict[str, object]:
    """`k` for an architecture that has one. Others have a penalty instead of a number of active atoms.

    Raises:
        ValueError: there is no such architecture of matrix atoms, or the paper's variants are none of its forms.
    """
    fields = training_config_class(architecture).__dataclass_fields__
    if "f_key" in fields:
        raise ValueError(
            f"architecture: expected one with an encoder and a decoder of `VARIANTS`, got {architecture!r}, whose two "
            "sides have none; train it with sae_lens_writesae.training_config and train"
        )
    return {"k": k} if "k" in fields else {}


def matched_flat(sae: SAE) -> tuple[int, dict[str, object]]:
    """d_sae and the SAE's fields for `training_config` of the flat SAE with as many parameters as `sae`.

    A flat atom has 2 K V numbers and those that every atom of the architecture has (a bias, a threshold), so that the
    two differ by no more than half of that (all of it, where one flat atom is already too many). At the paper's sizes,
    2,048 rank-1 atoms of 128 x 128 become 32 flat ones. Where the SAE has a `k` (BatchTopK is exported without), it
    stays up to half of the atoms, so that a code stays sparse.
    """
    d_in = int(sae.cfg.d_in)
    d_sae = int(sae.cfg.d_sae)
    of_each = sum(p.shape == (d_sae,) for name, p in sae.named_parameters() if name != "b_dec")
    atoms = max(1, round((n_parameters(sae) - d_in) / (2 * d_in + of_each)))
    k = getattr(sae.cfg, "k", None)
    sparsity = {} if k is None else {"k": type(k)(max(1, min(k, atoms // 2)))}
    return atoms, {"encoder": "dense", "decoder": "flat", **sparsity}
