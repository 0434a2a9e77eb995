"""The one form that every recurrent rule is brought to, and what can be computed from it.

    S_t = (diag(alpha_t) + a_t b_t^T) S_{t-1} + k_t u_t^T          S: [B,H,K,V], key-first
    o_t = S_t^T (scale * q_t)

A token may write several rank-1 terms, sum_r k_tr u_tr^T, and erase along several, sum_e a_te b_te^T (Gated
DeltaProduct, whose token is R delta steps: see `hookpoints.product`). The factors then have an axis for the
terms, [B,T,H,R,K]; everything per token (outputs, states, writes, positions) stays per token.

`Recurrence` holds the factors of one layer; outputs, states, corrected values, the response to an edit and
rank-1 probes of the state follow from them. Each comes twice: `hookpoints.reference` walks token by token and
is the oracle, `hookpoints.chunked` is the fast path and the default.

Alphabet: B batch, T time, H head, K key side, V value side, R rank of a token's write, E rank of its erase (E = R in
all rules so far), F feature, N vector. Sources: gated delta rule,
Yang et al. 2024 (arXiv 2412.06464), eq. 10; per-channel decay, Kimi Linear (arXiv 2510.26692), eq. 1;
additive rules, GLA (arXiv 2312.06635), eq. 3.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from hookpoints.recurrence.checks import Index, check, choice, over_time, pick, resolve_index, resolve_one, tensors

Method = Literal["chunked", "reference"]
Loop = Literal["closed", "open"]
WriteKind = Literal["additive", "corrected"]


class ScanResult(NamedTuple):
    """Everything one pass over the sequence gives."""

    outputs: Tensor
    """[B,T,H,V], what the layer reads."""
    final_state: Tensor
    """[B,H,K,V], the state after the last token."""


class Split(NamedTuple):
    """A recurrence cut in two along time."""

    left: Recurrence
    """The tokens before the cut."""
    right: Callable[[Tensor], Recurrence]
    """Takes the state [B,H,K,V] to start from (`left.final_state()` for an exact continuation), gives the
    rest."""


@dataclass(frozen=True, eq=False, repr=False)
class Recurrence:
    """Factors of one recurrent layer over one stretch of tokens.

    Floating dtypes may be mixed; the work is done, and results are returned, in float64 if any field is
    float64 and in float32 otherwise. Shapes, devices and dtypes are checked here; values are not (`log_decay`
    is meant to be <= 0, and -inf is allowed). All methods are differentiable in every field.

    Raises:
        ValueError: a shape, device or pairing is wrong; the message names the field, what was expected and
        what was found.
        TypeError: a field is not a floating tensor.
    """

    q: Tensor
    """[B,T,H,K] read vector, before `scale`."""
    k: Tensor
    """[B,T,H,K] write key; [B,T,H,R,K] where a token writes R terms."""
    u: Tensor
    """[B,T,H,V] or [B,T,H,R,V] write value: token t adds k_t u_t^T, summed over its terms."""
    log_decay: Tensor | None = None
    """[B,T,H] one decay per head, or [B,T,H,K] one per key channel; natural log, <= 0. None: no decay."""
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

    def __post_init__(self) -> None:
        check(self)
        if self.beta is not None and self.a is None:
            object.__setattr__(self, "a", -self.beta[..., None] * self.k)

    def __repr__(self) -> str:
        decay = "no decay" if self.log_decay is None else f"log_decay {list(self.log_decay.shape)}"
        erase = "no erase" if self.b is None else "erase along any a" if self.beta is None else "erase along k"
        sizes = ", ".join(f"{name}={getattr(self, name)}" for name in ("BTHKV" if self.R == 1 else "BTHRKV"))
        return f"Recurrence({sizes}, {decay}, {erase}, {self.dtype}, {self.device})"

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
        return torch.float64 if any(x.dtype == torch.float64 for _, x in tensors(self)) else torch.float32

    @property
    def device(self) -> torch.device:
        """Where all fields live."""
        return self.k.device

    def scan(self, *, method: Method = "chunked", chunk_size: int | None = None) -> ScanResult:
        """Outputs and final state in one pass. `chunk_size` (tokens, default by form) only trades speed, for
        tests and tuning."""
        return _run(self, method, "scan", self, **_sized(method, chunk_size))

    def outputs(self, *, method: Method = "chunked", chunk_size: int | None = None) -> Tensor:
        """What the layer reads, o_t = S_t^T (scale q_t): [B,T,H,V]. Cost O(K V) per token and head."""
        return self.scan(method=method, chunk_size=chunk_size).outputs

    def final_state(self, *, method: Method = "chunked", chunk_size: int | None = None) -> Tensor:
        """State after the last token, [B,H,K,V]."""
        return self.scan(method=method, chunk_size=chunk_size).final_state

    def states(
        self,
        heads: Index = None,
        positions: Index = None,
        *,
        out: Tensor | None = None,
        method: Method = "chunked",
        chunk_size: int | None = None,
    ) -> Tensor:
        """States after the write, [B,T',H',K,V], for the chosen heads and positions (None: all; an int keeps
        its axis).

        Memory is the result's, K V numbers per token and head (64 KB in float32 at K = V = 128); most of the
        time goes into touching it first, which a reused `out` (contiguous, in `dtype`, no gradients) saves.
        A probe v^T S_t w costs far less by `project`, and a read by `outputs`.
        """
        chosen = self.select(heads=heads)
        at = resolve_index(positions, self.T, "positions")
        shape = (self.B, len(at), chosen.H, self.K, self.V)
        if out is not None and (out.shape != shape or out.dtype != self.dtype or not out.is_contiguous()):
            found = f"{out.dtype} {list(out.shape)}"
            raise ValueError(f"out must be contiguous {self.dtype} {list(shape)}, found {found}")
        if out is not None and torch.is_grad_enabled() and any(x.requires_grad for _, x in tensors(chosen)):
            raise ValueError("out cannot be given where gradients are recorded; use torch.no_grad()")
        return _run(self, method, "states", chosen, at, out, **_sized(method, chunk_size))

    def corrected_values(self, *, method: Method = "chunked", chunk_size: int | None = None) -> Tensor:
        """Corrected values u~, like `u`: S_t = diag(alpha_t) S_{t-1} + k_t u~_t^T, so that decay alone links
        the states.

        Without an erase u~ is `u`. Raises ValueError where the erase is not along the write key (RWKV-7),
        since then no single value makes up for it.
        """
        if self.b is None:
            return self.u.to(self.dtype)
        return _run(self, method, "corrected_values", self.tied(), **_sized(method, chunk_size))

    def write(self, heads: Index = None, positions: Index = None, kind: WriteKind = "additive") -> Tensor:
        """Dense writes [B,T',H',K,V]: k_t u_t^T ("additive", what the token adds) or k_t u~_t^T ("corrected",
        what it changes besides decay). Memory is the result's; the factors `k`, `u` and `corrected_values()`
        say the same in K + V numbers."""
        at = torch.tensor(resolve_index(positions, self.T, "positions"), device=self.device)
        chosen = self.select(heads=heads)
        value = choice(kind, {"additive": lambda: chosen.u, "corrected": chosen.corrected_values}, "kind")()
        key = chosen.k.to(self.dtype).index_select(1, at)
        value = value.to(self.dtype).index_select(1, at)
        return key.mT @ value if key.ndim == 5 else key[..., :, None] * value[..., None, :]

    def propagate(
        self, x: Tensor, start: int, head: int, *, loop: Loop = "closed", method: Method = "chunked"
    ) -> Tensor:
        """Key side of an edit as later reads see it: p_start = x, p_t = (diag(alpha_t) + a_t b_t^T) p_{t-1}.

        Adding x y^T to the state at `start` adds exactly <p_t, scale q_t> y to o_t for every t >= start (t >
        start, with p_{t-1}, under `read_before_write`).

        Args:
            x: [N,K], the same vectors for every batch row, or [B,N,K].
            start: token after whose write the edit is added.
            head: head of the edit; no other head responds.
            loop: "closed" lets the erase react to the edited state, as the model would; "open" keeps decay
                only.

        Returns: [B,N,T-start,K].
        """
        head, start = resolve_one(head, self.H, "head"), resolve_one(start, self.T, "start")
        if x.ndim not in (2, 3) or x.shape[-1] != self.K or (x.ndim == 3 and x.shape[0] != self.B):
            raise ValueError(f"x must be [N,K={self.K}] or [B={self.B},N,K={self.K}], found {list(x.shape)}")
        chosen = self.select(heads=head).replace(initial_state=None)
        chosen = choice(loop, {"closed": lambda: chosen, "open": chosen.without_erase}, "loop")()
        return _run(self, method, "propagate", chosen, x.to(chosen.dtype).expand(self.B, -1, -1), start)

    def project(
        self, v: Tensor, w: Tensor, head: int, *, feature_block: int | None = None, method: Method = "chunked"
    ) -> Tensor:
        """Rank-1 probes of the state after each write, v_f^T S_t w_f: [B,T,F], without building a state.

        Cost O(F (K + V)) per token. Features are taken `feature_block` at a time, which bounds the memory
        beside the result.

        Args:
            v: [F,K] key side of the probes.
            w: [F,V] value side.
            head: the head whose state is probed.
        """
        head = resolve_one(head, self.H, "head")
        if v.ndim != 2 or w.ndim != 2 or v.shape[1] != self.K or w.shape[1] != self.V or len(v) != len(w):
            found = f"v {list(v.shape)}, w {list(w.shape)}"
            raise ValueError(f"project needs v [F,K={self.K}] and w [F,V={self.V}] with one F, found {found}")
        if feature_block is not None and feature_block < 1:
            raise ValueError(f"feature_block must be at least 1, found {feature_block}")
        chosen = self.select(heads=head)
        v, w = v.to(chosen.dtype), w.to(chosen.dtype)
        return _run(self, method, "project", chosen, v, w, feature_block)

    def select(
        self,
        rows: Index = None,
        heads: Index = None,
        tokens: slice | None = None,
        *,
        initial_state: Tensor | None = None,
    ) -> Recurrence:
        """Part of the batch, heads or tokens. Slices give views.

        A stretch of tokens that does not begin at 0 needs the state to begin with, [B',H',K,V] after the
        other choices: pass `initial_state` (zeros for the response to an edit made there), or use `split`.
        """
        fields = {name: pick(pick(x, rows, 0, "rows"), heads, 2, "heads") for name, x in over_time(self)}
        state = self.initial_state
        if state is not None:
            state = pick(pick(state, rows, 0, "rows"), heads, 1, "heads")
        if tokens is not None:
            begin, _, step = tokens.indices(self.T)
            if step != 1:
                raise ValueError(f"tokens must be a slice of step 1, found {tokens}")
            if begin > 0 and initial_state is None:
                raise ValueError(f"tokens from {begin} on need initial_state=, the state before them; see split")
            fields = {name: x[:, tokens] for name, x in fields.items()}
        state = state if initial_state is None else initial_state
        return dataclasses.replace(self, **fields, initial_state=state)

    def replace(self, **fields: Any) -> Recurrence:
        """A copy with other fields. A new `k` or `a` ends the declaration a = -beta k (the erase stays as it
        is), unless `beta` is given again; with `beta` and no `a`, the erase is derived anew."""
        if fields.get("beta") is not None:
            fields.setdefault("a", None)
        elif "k" in fields or "a" in fields:
            fields["beta"] = None
        return dataclasses.replace(self, **fields)

    def without_erase(self) -> Recurrence:
        """Decay only: what carries the corrected values, and an edit in open loop."""
        return dataclasses.replace(self, a=None, b=None, beta=None)

    def with_write(self, k: Tensor, u: Tensor, *, loop: Loop = "closed") -> Recurrence:
        """The linear response to a change of the writes: the same transition and reads, a zero state, writes
        k u^T instead (of any rank).

        Its outputs (states) are exactly what such writes add to this recurrence's. `loop="open"` drops the
        erase.
        """
        base = choice(loop, {"closed": lambda: self, "open": self.without_erase}, "loop")()
        return base.replace(k=k, u=u, initial_state=None)

    def tied(self) -> Recurrence:
        """The same recurrence with `beta` declared, for an erase that lies along the write key.

        Raises ValueError if it does not: at some token |a - c k| > 1e-5 |a| for the best c (more
        for half precision, by its rounding).
        """
        if self.a is None or self.beta is not None:
            return self
        if self.a.ndim != self.k.ndim or self.a.shape[3] != self.k.shape[3]:
            raise ValueError(
                "corrected values exist only where each term of the write has its own erase: the write k has the "
                f"shape {list(self.k.shape)}, the erase a {list(self.a.shape)}"
            )
        a, k = self.a.to(self.dtype), self.k.to(self.dtype)
        along = (a * k).sum(-1) / (k * k).sum(-1).clamp_min(torch.finfo(self.dtype).tiny)
        tolerance = max(1e-5, 4 * torch.finfo(self.a.dtype).eps)
        off = (a - along[..., None] * k).norm(dim=-1) > tolerance * a.norm(dim=-1)
        if bool(off.any()):
            row, token, head = off.nonzero()[0].tolist()[:3]
            raise ValueError(
                "corrected values exist only where the erase a is along the write key k (a = -beta k); it is not "
                f"at row {row}, token {token}, head {head}. Use the additive write, or states()."
            )
        return dataclasses.replace(self, beta=-along)

    def split(self, t: int) -> Split:
        """Cut before token t (0 < t < T). Handing `left.final_state()` to `right` equals one pass."""
        if not 0 < t < self.T:
            raise ValueError(f"split needs 0 < t < T={self.T}, found {t}")
        rest = slice(t, None)
        return Split(self.select(tokens=slice(0, t)), lambda state: self.select(tokens=rest, initial_state=state))

    @staticmethod
    def cat(parts: Iterable[Recurrence]) -> Recurrence:
        """Join along time; the first part's state begins, later ones are ignored. Raises ValueError if the
        forms differ."""
        parts = list(parts)
        if not parts:
            raise ValueError("cat needs at least one recurrence")
        forms = [({n: list(x.shape[2:]) for n, x in over_time(p)}, p.scale, p.read_before_write) for p in parts]
        if any(form != forms[0] for form in forms):
            raise ValueError(f"cat needs parts of one form (fields, scale, read_before_write), found {forms}")
        joined = {name: torch.cat([getattr(p, name) for p in parts], dim=1) for name in forms[0][0]}
        return dataclasses.replace(parts[0], **joined)

    def working(self) -> Recurrence:
        """The same with every tensor in `dtype`; engines begin with it."""
        dtype = self.dtype
        other = {name: x.to(dtype) for name, x in tensors(self) if x.dtype != dtype}
        return dataclasses.replace(self, **other) if other else self

    def zero_state(self) -> Tensor:
        """`initial_state` in `dtype`, zeros [B,H,K,V] where there is none."""
        if self.initial_state is not None:
            return self.initial_state.to(self.dtype)
        return torch.zeros(self.B, self.H, self.K, self.V, dtype=self.dtype, device=self.device)


def _run(r: Recurrence, method: str, name: str, *args: Any, **sizes: int) -> Any:
    """Call one engine's function, with autocast off: it would lower the products to half precision."""
    from hookpoints.recurrence import chunked, reference

    engine = choice(method, {"chunked": chunked, "reference": reference}, "method")
    with torch.autocast(r.device.type, enabled=False):
        return getattr(engine, name)(*args, **sizes)


def _sized(method: str, chunk_size: int | None) -> dict[str, int]:
    if chunk_size is None or method != "chunked":
        return {}
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, found {chunk_size}")
    return {"chunk_size": chunk_size}
