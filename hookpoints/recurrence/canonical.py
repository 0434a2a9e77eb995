"""The canonical form that every recurrent rule is brought to: its fields, their checks, and parts of it.

    S_t = (diag(alpha_t) + a_t b_t^T) S_{t-1} + k_t u_t^T          S: [B,H,K,V], key-first
    o_t = S_t^T (scale * q_t)

Without an erase each entry of the state may decay by its own factor, which then stands for diag(alpha_t):
alpha_t[k,v] = exp(log_decay_t[v] rates[k,v]) (Mamba-1, Gu & Dao, arXiv 2312.00752, eq. 4).

This module only holds the factors. `recurrence` adds what can be computed from them, by the algorithms of `reference`
and `chunked`, which take a form from here.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Self, TypeGuard, TypeVar

import torch
from torch import Tensor

Index = int | slice | Sequence[int] | Tensor | None
"""What selects rows, heads or positions; None selects all."""
Loop = Literal["closed", "open"]
"""Whether the erase reacts to an edited state ("closed", as in the model) or not ("open")."""

TIME_FIELDS = ("q", "k", "u", "log_decay", "a", "b", "beta")
"""Fields with a time axis."""

T_ = TypeVar("T_")


class ScanResult(NamedTuple):
    """Everything that one pass over the sequence gives."""

    outputs: Tensor
    """[B,T,H,V], what the layer reads."""
    final_state: Tensor
    """[B,H,K,V], the state after the last token."""


@dataclass(frozen=True, eq=False, repr=False)
class CanonicalForm:
    """Factors of one recurrent layer over one stretch of tokens.

    Floating dtypes may be mixed; the work is done, and results are returned, in float64 if any field is
    float64 and in float32 otherwise. Shapes and dtypes are checked here; values are not (`log_decay`
    is meant to be <= 0, and -inf is allowed).

    Raises:
        ValueError: a shape or pairing is wrong; the message names the field, what was expected and
        what it got.
        TypeError: a field is not a floating tensor.
    """

    q: Tensor
    """[B,T,H,K] read vector, before `scale`."""
    k: Tensor
    """[B,T,H,K] write key; [B,T,H,R,K] where a token writes R terms."""
    u: Tensor
    """[B,T,H,V] or [B,T,H,R,V] write value: token t adds k_t u_t^T, summed over its terms."""
    log_decay: Tensor | None = None
    """[B,T,H] one decay per head, or [B,T,H,K] one per key channel; natural log, <= 0. None: no decay. With `rates`,
    [B,T,H,V]."""
    a: Tensor | None = None
    """[B,T,H,K] or [B,T,H,E,K] erase, left vector. Given with `b`, or derived from `beta`."""
    b: Tensor | None = None
    """[B,T,H,K] or [B,T,H,E,K] erase, right vector: S_{t-1}^T b_t is what the rule reads back before it writes. All
    terms of a token read the state before it."""
    scale: float = 1.0
    """Factor on q at the read."""
    initial_state: Tensor | None = None
    """[B,H,K,V] state before the first token. None: zeros."""
    read_before_write: bool = False
    """True where o_t reads S_{t-1} (RWKV-6) instead of S_t."""
    beta: Tensor | None = None
    """[B,T,H] or [B,T,H,R] declares that a = -beta k, the erase of the delta rules. Optional: it allows a solve with
    half the work. With `a` left out, `a` is derived; with both given, they are trusted to agree. `replace` drops
    it when `k` or `a` change."""
    rates: Tensor | None = None
    """[H,K,V], >= 0: each entry of the state has its own decay, whose log is log_decay * rates. Held apart, the
    two are V numbers a token instead of K V. Goes without an erase."""

    def __post_init__(self) -> None:
        _check_fields(self)
        if self.beta is not None and self.a is None:
            # In the dtype of the work: rounded to half, it would differ from what the declared form computes.
            object.__setattr__(self, "a", -self.beta[..., None].to(self.dtype) * self.k)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name} {list(x.shape)}" for name, x in tensors(self))
        return f"{type(self).__name__}({fields}, {self.dtype}, {self.device})"

    @property
    def B(self) -> int:
        """Batch rows."""
        return self.k.shape[0]

    @property
    def T(self) -> int:
        """Tokens."""
        return self.k.shape[1]

    @property
    def H(self) -> int:
        """Heads (value heads: shared keys are expanded)."""
        return self.k.shape[2]

    @property
    def K(self) -> int:
        """Key side of the state."""
        return self.k.shape[-1]

    @property
    def V(self) -> int:
        """Value side of the state."""
        return self.u.shape[-1]

    @property
    def R(self) -> int:
        """Rank-1 terms in a token's write."""
        return self.k.shape[3] if self.k.ndim == 5 else 1

    @property
    def dtype(self) -> torch.dtype:
        """What the work is done in: float64 if any field is, else float32."""
        if any(x.dtype == torch.float64 for _, x in tensors(self)):
            return torch.float64
        return torch.float32

    @property
    def device(self) -> torch.device:
        """Where all fields are."""
        return self.k.device

    @property
    def decays_per_channel(self) -> bool:
        """Whether each key channel has its own decay."""
        return self.log_decay is not None and self.log_decay.ndim == 4 and self.rates is None

    def select(
        self,
        rows: Index = None,
        heads: Index = None,
        tokens: slice | None = None,
        *,
        initial_state: Tensor | None = None,
    ) -> Self:
        """Part of the batch, heads or tokens. Slices give views.

        A stretch of tokens that does not begin at 0 needs the state to begin with, [B',H',K,V] after the
        other selections: pass `initial_state`, `final_state()` of the tokens before (zeros for the response to an
        edit made there).
        """
        fields = {name: pick(pick(x, rows, 0, "rows"), heads, 2, "heads") for name, x in over_time(self)}
        state = self.initial_state
        if state is not None:
            state = pick(pick(state, rows, 0, "rows"), heads, 1, "heads")
        if tokens is not None:
            begin, _, step = tokens.indices(self.T)
            if step != 1:
                raise ValueError(f"tokens must be a slice of step 1, got {tokens}")
            if begin > 0 and initial_state is None:
                raise ValueError(f"tokens from {begin} on need initial_state=, the state before them")
            fields = {name: x[:, tokens] for name, x in fields.items()}
        state = state if initial_state is None else initial_state
        if self.rates is not None:
            fields["rates"] = pick(self.rates, heads, 0, "heads")
        return dataclasses.replace(self, **fields, initial_state=state)

    def replace(self, **fields: Tensor | float | bool | None) -> Self:
        """A copy with other fields. A new `k` or `a` ends the declaration a = -beta k (the erase stays as it
        is), unless `beta` is given again; with `beta` and no `a`, the erase is derived anew."""
        if fields.get("beta") is not None:
            fields.setdefault("a", None)
        elif "k" in fields or "a" in fields:
            fields["beta"] = None
        return dataclasses.replace(self, **fields)

    def without_erase(self) -> Self:
        """The same with decay only: what carries an edit in open loop."""
        return dataclasses.replace(self, a=None, b=None, beta=None)

    def with_write(self, k: Tensor, u: Tensor, *, loop: Loop = "closed") -> Self:
        """The linear response to a change of the writes: the same transition and reads, a zero state, and the writes
        k u^T instead (of any rank).

        Its outputs (states) are exactly what such writes add to this recurrence's. `loop="open"` drops the
        erase.
        """
        base = choice(loop, {"closed": lambda: self, "open": self.without_erase}, "loop")()
        return base.replace(k=k, u=u, initial_state=None)

    def working(self) -> Self:
        """The same with every tensor in `dtype`; the algorithms begin with it."""
        dtype = self.dtype
        other = {name: x.to(dtype) for name, x in tensors(self) if x.dtype != dtype}
        return dataclasses.replace(self, **other) if other else self

    def detached(self) -> Self:
        """The same without autograd graphs. The tensors share their storage with this one's."""
        return dataclasses.replace(self, **{name: x.detach() for name, x in tensors(self)})

    def on_host(self) -> Self:
        """The same on the host. Fields cross together, so that a GPU is waited for once."""
        fields = tensors(self)
        if self.device.type == "cpu":
            return self
        flat = torch.cat([x.flatten() for _, x in fields]).cpu()
        parts = flat.split([x.numel() for _, x in fields])
        on_host = {name: part.view(x.shape).to(x.dtype) for part, (name, x) in zip(parts, fields)}
        return dataclasses.replace(self, **on_host)

    def starting_state(self) -> Tensor:
        """`initial_state` in `dtype`; zeros [B,H,K,V] where there is none."""
        if self.initial_state is not None:
            return self.initial_state.to(self.dtype)
        return torch.zeros(self.B, self.H, self.K, self.V, dtype=self.dtype, device=self.device)


def is_dense(x: object) -> TypeGuard[Tensor]:
    """Whether `x` is a tensor of real numbers that are at hand: not sparse, nested, quantized, complex or "meta"."""
    return isinstance(x, Tensor) and not (
        x.layout != torch.strided or x.is_nested or x.is_quantized or x.is_meta or x.is_complex()
    )


def resolve_index(index: Index, size: int, what: str) -> list[int]:
    """The positions that an int, slice, sequence or integer tensor selects on an axis of `size`; IndexError
    beyond it."""
    if index is None or isinstance(index, slice):
        return list(range(size))[index or slice(None)]
    if isinstance(index, Tensor):
        index = index.reshape(-1).tolist()
    positions = [index] if isinstance(index, int) else [int(i) for i in index]
    for i in positions:
        if not -size <= i < size:
            raise IndexError(f"{what} {i} is out of range for {size}")
    return [i % size for i in positions]


def pick(x: Tensor, index: Index, dim: int, what: str) -> Tensor:
    """Select along `dim`, which stays even for one; a view for a slice or one index."""
    if index is None:
        return x
    if isinstance(index, slice):
        return x[(slice(None),) * dim + (index,)]
    positions = resolve_index(index, x.shape[dim], what)
    if len(positions) == 1:
        return x.narrow(dim, positions[0], 1)  # a view, where index_select copies
    return x.index_select(dim, torch.tensor(positions, dtype=torch.long, device=x.device))


def choice(key: str, choices: Mapping[str, T_], what: str) -> T_:
    """`choices[key]`; ValueError that lists the choices otherwise."""
    if key not in choices:
        raise ValueError(f"{what} must be one of {', '.join(map(repr, choices))}, got {key!r}")
    return choices[key]


def tensors(r: CanonicalForm) -> list[tuple[str, Tensor]]:
    """The tensor fields that are given, with their names."""
    return [(n, x) for n in (*TIME_FIELDS, "initial_state", "rates") if (x := getattr(r, n)) is not None]


def over_time(r: CanonicalForm) -> list[tuple[str, Tensor]]:
    """The given fields that have a time axis, with their names."""
    return [(n, x) for n in TIME_FIELDS if (x := getattr(r, n)) is not None]


def terms(x: Tensor) -> list[Tensor]:
    """The rank-1 terms of keys or values [B,T,H,(R,)K]."""
    return [x] if x.ndim == 4 else list(x.unbind(3))


def carried_keys(k: Tensor, beta: Tensor) -> Tensor:
    """The keys of a token's R delta steps as its last step leaves them, [B,T,H,R,K].

    In Gated DeltaProduct (Siems et al., arXiv 2502.10297) a token takes the steps
    S <- (I - beta_r k_r k_r^T) S + beta_r k_r v_r^T one after the other. What step r writes is moved by the steps after
    it, so that the token as a whole is

        S_t = (I - sum_r k~_r (beta_r k_r)^T) S_{t-1} + sum_r k~_r (beta_r v_r)^T,
        k~_r = (I - beta_R k_R k_R^T) ... (I - beta_{r+1} k_{r+1} k_{r+1}^T) k_r :

    a write of rank R, an erase of rank R along the write's own keys, and both read the state before the token.

    Args:
        k: [B,T,H,R,K] keys in the order of the steps.
        beta: [B,T,H,R].

    Cost O(R^2 K) per token and head.
    """
    # Every step moves the keys of those before it, and adds its own.
    carried: list[Tensor] = []
    for key, strength in zip(k.unbind(3), beta.unbind(3)):
        carried = [*(x - (strength * (x * key).sum(-1))[..., None] * key for x in carried), key]
    return torch.stack(carried, dim=3)


def _check_fields(r: CanonicalForm) -> None:
    """Check types, shapes and pairing of the fields; see `CanonicalForm` for what is raised."""
    for name, x in tensors(r):
        if not isinstance(x, Tensor) or not x.is_floating_point():
            raise TypeError(f"{name} must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    for name, side in (("k", "K"), ("u", "V")):
        if getattr(r, name).ndim not in (4, 5):
            raise ValueError(f"{name} must be [B,T,H,{side}] or [B,T,H,R,{side}], got {list(getattr(r, name).shape)}")
    # Each axis has the size that k and u give it.
    sizes = {"B": r.B, "T": r.T, "H": r.H, "K": r.K, "V": r.V, "R": r.R}
    write = "BTHR" if r.k.ndim == 5 else "BTH"
    erase = "BTH"
    if r.b is not None and r.b.ndim == 5:
        erase = "BTHE"
        sizes["E"] = r.b.shape[3]
    axes = {"k": write + "K", "u": write + "V", "a": erase + "K", "b": erase + "K", "beta": write}
    axes |= {"q": "BTHK", "initial_state": "BHKV", "rates": "HKV"}
    axes["log_decay"] = "BTHV" if r.rates is not None else "BTHK" if r.decays_per_channel else "BTH"
    for name, x in tensors(r):
        want = axes[name]
        if list(x.shape) != [sizes[c] for c in want]:
            spelt = "[" + ",".join(f"{c}={sizes[c]}" for c in want) + "]"
            raise ValueError(f"{name} must be {spelt} as k {list(r.k.shape)} says, got {list(x.shape)}")
    # What is declared fits together: an erase has two sides, and rates multiply a decay.
    erases = r.a is not None or r.beta is not None
    if erases != (r.b is not None):
        got = ", ".join(name for name in ("a", "b", "beta") if getattr(r, name) is not None)
        raise ValueError(f"an erase needs b together with a (or beta), got only {got}")
    if r.beta is not None and r.b is not None and r.b.shape != r.k.shape:
        raise ValueError(
            "beta says that each term of the write erases along its own key, got "
            f"k {list(r.k.shape)}, b {list(r.b.shape)}"
        )
    if r.rates is not None and (r.b is not None or r.log_decay is None):
        got = "an erase" if r.b is not None else "no log_decay"
        raise ValueError(f"rates need a log_decay [B,T,H,V] that they multiply, and no erase; got {got}")
