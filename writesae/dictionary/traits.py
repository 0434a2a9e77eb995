"""How large a dictionary is, and the flat one of the same size."""

from __future__ import annotations

from sae_lens import SAE

from sae_lens_writesae.sae.architectures import training_config_class


def n_parameters(sae: SAE) -> int:
    """Numbers that are trained."""
    return sum(p.numel() for p in sae.parameters())


def sparsity_fields(architecture: str, k: int) -> dict[str, object]:
    """`k` for an architecture that has one. Others have a penalty instead of a number of active atoms.

    Raises:
        ValueError: there is no such architecture of matrix atoms.
    """
    fields = training_config_class(architecture).__dataclass_fields__
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
