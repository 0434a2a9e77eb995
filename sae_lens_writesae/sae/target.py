"""What an SAE is trained on: the writes of a head, its states, or only the last state of each sequence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from hookpoints import HookedRecurrent, UnknownHookError, UnsupportedModelError

Target = Literal["write", "state", "last_state"]
"""``write``: the matrix added at each token (aligned with what the substitution test exchanges; the default).
``state``: the state after each token (the paper's text). ``last_state``: the state at the end of each sequence (what
the paper's code does)."""

_HOOKS: dict[Target, str] = {"write": "hook_write_vec", "state": "hook_state_vec", "last_state": "hook_state_vec"}


@dataclass(frozen=True)
class HeadTarget:
    """One head of one layer, and what of it is learned."""

    hook_name: str
    """For example ``blocks.2.mixer.heads.1.hook_write_vec``; activations are [B,T,K*V], row-major, key-first."""
    d_k: int
    d_v: int
    seqpos_slice: tuple[int | None, ...]
    """Positions that are kept, in SAELens' form."""

    @property
    def d_in(self) -> int:
        return self.d_k * self.d_v

    @property
    def sae_fields(self) -> dict[str, int]:
        """The fields of an SAE config that follow from the head."""
        return {"d_in": self.d_in, "d_k": self.d_k, "d_v": self.d_v}


def head_target(model: HookedRecurrent, layer: int, head: int, target: Target = "write") -> HeadTarget:
    """The hook of a head and the sizes that an SAE on it needs.

    Raises:
        UnsupportedModelError: the layer has no recurrence; names those that have.
        UnknownHookError: the head is out of range.
        ValueError: unknown target.
    """
    if target not in _HOOKS:
        raise ValueError(f"target must be one of {', '.join(_HOOKS)}, found {target!r}")
    if not 0 <= layer < model.cfg.n_layers:
        raise UnsupportedModelError(
            f"layer {layer} is out of range: {model.cfg.model_name} has layers 0 to {model.cfg.n_layers - 1}, "
            f"of which {model.cfg.recurrent_layers} are recurrent"
        )
    shape = model.cfg.layer(layer)
    if not 0 <= head < shape.H:
        raise UnknownHookError(f"head {head} is out of range: layer {layer} has heads 0 to {shape.H - 1}")
    last: tuple[int | None, ...] = (-1, None) if target == "last_state" else (None,)
    return HeadTarget(f"blocks.{layer}.mixer.heads.{head}.{_HOOKS[target]}", shape.K, shape.V, last)


def check_hook(model: HookedRecurrent, cfg: Any) -> None:
    """Raise unless a runner config's hook exists on ``model`` and carries what its SAE expects; names both sizes."""
    name: str = cfg.hook_name
    if name not in model.hook_dict and name not in model.mod_dict:
        from hookpoints.hooks.guard import check_names

        check_names(model, name)
    parts = name.split(".")
    if len(parts) == 6 and parts[3] == "heads":
        shape = model.cfg.layer(int(parts[1]))
        found = (getattr(cfg.sae, "d_k", shape.K), getattr(cfg.sae, "d_v", shape.V))
        if found != (shape.K, shape.V) or cfg.sae.d_in != shape.K * shape.V:
            raise ValueError(
                f"{name} carries {shape.K} x {shape.V} matrices (d_in {shape.K * shape.V}), but the SAE config has "
                f"d_k {found[0]}, d_v {found[1]}, d_in {cfg.sae.d_in}"
            )
