"""The head of a dictionary: what an SAE is trained on, which hook it reads, and whether the two fit.

The checks and `decoder_atoms` take any SAELens autoencoder on a head, not only those of this package.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sae_lens import LanguageModelSAERunnerConfig
from sae_lens.saes.sae import SAE, SAEConfig

from hookpoints import HookedRecurrent, UnknownHookError
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.choices import Target
from sae_lens_writesae.sae.matrix import MatrixSAE

HookTarget = Literal["write", "state"]
"""What the hook of a head carries: SAEs of states and of last states read the same hook."""

RunnerConfig = LanguageModelSAERunnerConfig[Any]
"""SAELens' runner config, of any architecture."""

Dictionary = SAE[Any]
"""An SAELens autoencoder, of this package or not."""

_HOOKS: dict[Target, str] = {"write": "hook_write_vec", "state": "hook_state_vec", "last_state": "hook_state_vec"}
_HOOK_NAME = re.compile(r"blocks\.(\d+)\.mixer\.heads\.(\d+)\.hook_(write|state)_vec")


class HeadHook(NamedTuple):
    """The hook of one head that an SAE reads."""

    name: str
    layer: int
    head: int
    target: HookTarget

    @classmethod
    def parse(cls, name: str) -> HeadHook:
        """From `blocks.{l}.mixer.heads.{h}.hook_write_vec` or `hook_state_vec`; anything else raises ValueError."""
        match = _HOOK_NAME.fullmatch(name)
        if match is None:
            raise ValueError(
                "the SAE must read a head's write or state (blocks.{l}.mixer.heads.{h}.hook_write_vec or "
                f"...hook_state_vec), its hook is {name!r}"
            )
        return cls(name, int(match[1]), int(match[2]), cast(HookTarget, match[3]))

    @classmethod
    def of(cls, sae: Dictionary) -> HeadHook:
        """The hook named in the SAE's metadata."""
        return cls.parse(str(sae.cfg.metadata.hook_name))

    @property
    def cell(self) -> str:
        """The head's name in reports: L2H0."""
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class HeadTarget:
    """One head of one layer, and what of it is learned."""

    hook_name: str
    """For example `blocks.2.mixer.heads.1.hook_write_vec`; activations are [B,T,K*V], row-major, key-first."""
    d_k: int
    """K"""
    d_v: int
    """V"""
    seqpos_slice: tuple[int | None, ...]
    """The positions that SAELens trains on, in its own form."""

    @classmethod
    def of_head(cls, layer: int, head: int, d_k: int, d_v: int, target: Target) -> HeadTarget:
        """The target of a head with states [K,V]."""
        return cls(
            f"blocks.{layer}.mixer.heads.{head}.{_HOOKS[target]}",
            d_k,
            d_v,
            (-1, None) if target == "last_state" else (None,),
        )

    @property
    def sae_fields(self) -> dict[str, int]:
        """The fields of an SAE config that follow from the head."""
        return {"d_in": self.d_k * self.d_v, "d_k": self.d_k, "d_v": self.d_v}


def check_sizes(sae: SAEConfig, d_k: int, d_v: int, place: str, where: str = "the SAE config") -> None:
    """Raise ValueError unless an SAE of that config is one of matrices [d_k,d_v], as `place` has them; names `where`
    the SAE is from."""
    sizes = (getattr(sae, "d_k", d_k), getattr(sae, "d_v", d_v), sae.d_in)
    expected = (d_k, d_v, d_k * d_v)
    if sizes != expected:
        raise ValueError(f"{where}: d_k, d_v, d_in: expected {expected}, as {place}, got {sizes}")


def head_target(model: HookedRecurrent, layer: int, head: int, target: Target = "write") -> HeadTarget:
    """The hook of a head and the sizes that an SAE on it needs.

    Raises:
        UnsupportedModelError: the layer has no recurrence or is out of range; the message names those that have one.
        UnknownHookError: the head is out of range.
        ValueError: unknown target.
        TypeError: no model, but the name of one, say.
    """
    if isinstance(model, str | Path):
        raise TypeError(f"model: expected a model, got {model!r}; load it: HookedRecurrent.from_pretrained({model!r})")
    if target not in _HOOKS:
        raise ValueError(f"target: expected one of {', '.join(_HOOKS)}, got {target!r}")
    shape = model.cfg.layer(layer)
    if not 0 <= head < shape.H:
        raise UnknownHookError(f"head {head} is out of range: layer {layer} has heads 0 to {shape.H - 1}")
    return HeadTarget.of_head(layer, head, shape.K, shape.V, target)


def check_hook(model: HookedRecurrent, name: str, sae: SAEConfig, where: str = "the SAE config") -> None:
    """Raise unless the hook exists on `model` and, if it is one of a head, carries what an SAE of that config expects;
    warn (`hookpoints.errors.OtherModelWarning`) where the SAE was trained on other weights.

    Raises:
        UnknownHookError: the model has no such hook; names the nearest.
        ValueError: it has other sizes; the message has both, and `where` the SAE is from.
    """
    model.check_hook_name(name)
    if match := _HOOK_NAME.fullmatch(name):
        shape = model.cfg.layer(int(match[1]))
        check_sizes(sae, shape.K, shape.V, f"{name} of {model.cfg.model_name}", where)
    model.check_dictionary(sae.metadata)


def has_plain_activations(sae: Dictionary) -> bool:
    """Whether activations are coefficients of atoms in the units of the write."""
    return getattr(sae.cfg, "normalize_activations", "none") in (None, "none")


def check_plain_activations(sae: Dictionary) -> None:
    """Raise ValueError where activations are not coefficients of atoms in the units of the write."""
    if not has_plain_activations(sae):
        raise ValueError(
            "normalize_activations: expected 'none', so that activations are in units of the write, got "
            f"{sae.cfg.normalize_activations!r}; fold the factor (sae.fold_activation_norm_scaling_factor) and save it"
        )


def decoder_atoms(sae: Dictionary, atoms: Sequence[int] | NDArray[np.int64], key_dim: int, value_dim: int) -> LowRank:
    """Some decoder atoms in float32 as low-rank matrices, N = len(atoms).

    They are the factors of an SAE of this package. The rows of any other decoder are factored exactly, R = min(K, V);
    that costs one K x V SVD an atom.
    """
    index = torch.tensor(np.array(atoms))
    if isinstance(sae, MatrixSAE):
        return sae.atoms(index.to(sae.b_dec.device)).to(torch.float32)
    rows = sae.W_dec.detach()[index.to(sae.W_dec.device)].float()
    return LowRank.svd(rows.reshape(-1, key_dim, value_dim))
