"""What a rule is: a translation between the arguments of an upstream op and the canonical recurrence.

Most of a rule is a table. `Rule.names` says which argument of the op is which factor of the canonical form, and `Rule`
does the rest, since upstream's ops agree on what they do to their arguments and on the names of the flags that say so:

    flag of a call                   what the op does                                              factors
    use_qk_l2norm_in_kernel          x / |x|                                                       q, k, back
    use_beta_sigmoid_in_kernel       sigmoid(beta)                                                 beta
    allow_neg_eigval                 2 beta                                                        beta
    use_gate_in_kernel               -exp(A_log) softplus(g + dt_bias), or with a lower bound      log_decay
                                     lower_bound * sigmoid(exp(A_log) (g + dt_bias))
    state_v_first                    states are [B,H,V,K]                                          initial_state

To add a rule, see `hookpoints.rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hookpoints.recurrence.canonical import CanonicalForm

Arguments = Mapping[str, Any]
"""Arguments of an op call by name: tensors, flags, numbers, and whatever else upstream's layers hand over."""
Op = Callable[..., Any]
"""An upstream op, called by keyword. What it returns depends on the op; `Rule.read_result` knows."""

CONVOLUTIONS = ("causal_conv1d_fn", "causal_conv1d_update")
"""Ops of the short convolutions of transformers' layers."""
_TIED = frozenset({"q", "k", "back"})
"""Factors that are fed to an op together: one flag normalizes all of them, one number of heads groups them."""
_TURNED_OFF: Mapping[str, Mapping[str, object]] = {
    **{field: {"use_qk_l2norm_in_kernel": False} for field in _TIED},
    "beta": {"use_beta_sigmoid_in_kernel": False, "allow_neg_eigval": False},
    # safe_gate and lower_bound promise a range that an edited decay may leave.
    "log_decay": {"use_gate_in_kernel": False, "safe_gate": False}
    | dict.fromkeys(("A_log", "dt_bias", "lower_bound", "g_gamma")),
}
"""What an op would do to an argument, turned off where the factor itself is fed."""


@dataclass(frozen=True, eq=False)
class OpFactors:
    """The quantities of one op call, as its rule uses them: normalized, grouped heads expanded, key-first.

    A field that a rule lacks is None, and so has no hook.
    """

    q: Tensor
    """[B,T,H,K] read vector, unscaled."""
    k: Tensor
    """[B,T,H,K] key; [B,T,H,R,K] where a token takes R steps, and likewise below."""
    v: Tensor
    """[B,T,H,V] or [B,T,H,R,V] value."""
    beta: Tensor | None = None
    """[B,T,H] or [B,T,H,R] write strength; [B,T,H,V] one for each value channel (Mamba-1, Gated DeltaNet-2)."""
    log_decay: Tensor | None = None
    """[B,T,H] or [B,T,H,K] natural log-decay, <= 0; [B,T,H,V] in Mamba-1 and HGRN, where entries have rates."""
    back: Tensor | None = None
    """[B,T,H,K] key with which the erase reads the state, where it is neither k nor made of k, or what makes it of k
    (Gated DeltaNet-2's gate). Its hook is that of the canonical b."""
    initial_state: Tensor | None = None
    """[B,H,K,V] or None for zeros."""

    NAMES = ("q", "k", "v", "beta", "log_decay")

    def over_time(self, change: Callable[[Tensor], Tensor]) -> OpFactors:
        """With ``change`` made to all factors that have a time axis."""
        factors = {name: x for name in (*self.NAMES, "back") if (x := getattr(self, name)) is not None}
        return replace(self, **{name: change(x) for name, x in factors.items()})


class OpResult(NamedTuple):
    """Outputs of an op in canonical layout."""

    outputs: Tensor
    """[B,T,H,V] reads, in the op's own dtype."""
    final_state: Tensor | None
    """[B,H,K,V], or None where the caller did not ask for it."""


class Names(NamedTuple):
    """The name map of a rule: which argument of its ops holds which factor. None where the rule has no such factor."""

    q: str | None
    k: str | None
    v: str
    beta: str | None = None
    log_decay: str | None = None
    back: str | None = None

    def fields(self) -> frozenset[str]:
        """Factors that the rule has."""
        return frozenset(field for field, argument in self._asdict().items() if argument is not None)


@dataclass(frozen=True, eq=False)
class Rule:
    """One update rule: which ops compute it, and how their arguments map to the canonical form.

    The attributes are the rule's table. The defaults of the methods are right for a rule of the form

        S_t = diag(alpha_t) S_{t-1} + beta_t k_t v_t^T                                     (additive)
        S_t = (I - beta_t k_t k_t^T) diag(alpha_t) S_{t-1} + beta_t k_t v_t^T              (``erases``)

    with o_t = S_t^T (scale q_t); without beta or alpha where the rule has none.
    """

    name: str
    """Name of the rule, as papers call it."""
    ops: tuple[str, ...]
    """Names of the upstream functions that compute it; a mixer that calls the first is of this rule."""
    names: Names
    """Factor -> argument of the ops."""
    sizes: tuple[str, str] = ("head_k_dim", "head_v_dim")
    """What the mixer calls K and V."""
    erases: bool = False
    """Whether a token takes off what its key reads back before it writes (the delta rules)."""
    own_erase: bool = False
    """Whether a token erases along its own a and b, which ``form`` adds (RWKV-7)."""
    read_before_write: bool = False
    """Whether a token reads the state before its own write."""
    default_scale: float | None = None
    """Factor on q at the read where the call has no ``scale``; None for K^-1/2."""
    rank: int = 1
    """R, the number of steps that a token takes and so the rank of its write. Factors have an axis for them where
    there are several."""
    kernel_only: bool = False
    """Whether the op is a GPU kernel without a torch form; then hookpoints' own kernel computes calls on a CPU."""
    rounded: frozenset[str] = frozenset()
    """Factors that the op takes only in the dtype of the op's arguments; the others are fed in the working dtype."""
    torch_only: frozenset[str] = frozenset()
    """Factors that only the torch op can be fed apart from the others; fast kernels tie them together."""
    refuses_float32: frozenset[str] = frozenset()
    """Fast ops that take no float32; hookpoints' own kernel computes those calls."""
    output_like: Literal["q", "v"] = "v"
    """Which argument has the dtype in which the torch op returns its outputs."""
    not_fed: frozenset[str] = frozenset()
    """Factors that no op takes apart from the others; hookpoints' own kernel computes calls in which one changed."""
    starts_from_zero: bool = False
    """Whether its op for several tokens takes no state, and so begins with zeros whatever the cache holds. Then the
    call is given the cache's state (``initial_state``), and hookpoints' own kernel computes it."""
    overwrites: bool = False
    """Whether an op writes over the state that it is given, which autograd may have saved."""
    companions: tuple[str, ...] = ()
    """Other fast ops of the same layers (convolutions) that only need to stay on the right device."""
    fused: tuple[str, ...] = ()
    """Ops that would compute a whole layer in one kernel, past the recurrent op; a hooked mixer declines them."""
    norm_linear: tuple[str, ...] = ()
    """Ops that compute a layer's last norm and its output projection in one kernel, past ``hook_z`` between them."""

    @property
    def factor_names(self) -> tuple[str, ...]:
        """Fields of OpFactors that the rule has and that have a hook, in order of execution."""
        return tuple(name for name in OpFactors.NAMES if name in self.names.fields())

    @property
    def hook_factors(self) -> tuple[str, ...]:
        """What of the rule has a hook: its factors, and "a" and "b" of the canonical form where it erases."""
        return (*self.factor_names, *(("a", "b") if self.erases or self.own_erase else ()))

    def head_shape(self, mixer: nn.Module) -> tuple[int, int, int]:
        """(H, K, V) of a mixer module. H counts value heads where keys are shared by groups of them."""
        heads = getattr(mixer, "num_v_heads", None) or getattr(mixer, "num_heads")  # noqa: B009 (its type is int here)
        return heads, getattr(mixer, self.sizes[0]), getattr(mixer, self.sizes[1])

    def for_mixer(self, mixer: nn.Module) -> Rule:
        """The rule as this mixer uses it: itself, unless the mixer has a size that its op calls do not tell."""
        return self

    def runs(self, op: Op, arguments: Arguments) -> bool:
        """Whether upstream's op can compute this call where its tensors are; else hookpoints' own kernel does."""
        v = arguments[self.names.v]
        runs_here = not self.kernel_only or v.device.type != "cpu"
        tensors = (x for x in arguments.values() if isinstance(x, Tensor))
        overwrites = self.overwrites and is_update(arguments) and torch.is_grad_enabled()
        lost = overwrites and any(x.requires_grad for x in tensors)
        forgets = self.starts_from_zero and arguments.get("initial_state") is not None
        return (
            runs_here
            and not lost
            and not forgets
            and not (v.dtype == torch.float32 and op.__name__ in self.refuses_float32)
        )

    # -- from arguments to the canonical form

    def factors(self, arguments: Arguments) -> OpFactors:
        """The canonical factors of an op call."""
        dtype = compute_dtype(arguments[self.names.v])
        fields: dict[str, Any] = {field: self.read(field, arguments, dtype) for field in self.names.fields()}
        return OpFactors(**fields, initial_state=initial_state(arguments, dtype))

    def read(self, field: str, arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
        """One factor [B,T,H,...] of a call, after what the op does to the argument; None where the call has none."""
        x = arguments[self.argument(field, arguments)]
        v = arguments[self.names.v]
        if field == "beta" and x is None:
            x = torch.ones_like(v[..., 0], dtype=dtype)
        if x is None:
            return None
        x = x.to(dtype)
        if field in _TIED:
            x = l2_normalise(x) if arguments.get("use_qk_l2norm_in_kernel") else x
            return expand_groups(x, v.shape[2])
        if field == "beta":
            x = x.sigmoid() if arguments.get("use_beta_sigmoid_in_kernel") else x
            return 2 * x if arguments.get("allow_neg_eigval") else x
        if field == "log_decay" and arguments.get("use_gate_in_kernel"):
            return gate(x, arguments)
        return x

    def form(self, factors: OpFactors, arguments: Arguments) -> CanonicalForm:
        """The canonical form of an op call."""
        beta = factors.beta
        scale = arguments.get("scale")
        default = factors.k.shape[-1] ** -0.5 if self.default_scale is None else self.default_scale
        return CanonicalForm(
            q=factors.q,
            k=self.write_key(factors),
            u=factors.v if beta is None else _with_axes_of(beta, factors.v) * factors.v,
            log_decay=factors.log_decay,
            beta=beta if self.erases else None,  # declares the erase to be -beta k
            b=self.erase_key(factors) if self.erases else None,
            scale=default if scale is None else float(scale),
            initial_state=factors.initial_state,
            read_before_write=self.read_before_write,
            rates=self.rates(factors, arguments),
        )

    def rates(self, factors: OpFactors, arguments: Arguments) -> Tensor | None:
        """[H,K,V], where each entry of the state has its own decay."""
        return None

    def write_key(self, factors: OpFactors) -> Tensor:
        """The key under which the write is stored, like ``factors.k``."""
        return factors.k

    def erase_key(self, factors: OpFactors) -> Tensor:
        """What the erase reads S_{t-1} with, like ``factors.k``. The delta rules erase after the decay: alpha k."""
        k = factors.k
        decay = factors.log_decay
        if decay is None:
            return k
        return _with_axes_of(decay.exp(), k) * k

    # -- the way back

    def argument(self, field: str, arguments: Arguments) -> str:
        """Name of the argument that holds a factor in this call."""
        return getattr(self.names, field)

    def arguments(self, arguments: Arguments, factors: OpFactors, changed: Set[str]) -> Arguments:
        """Arguments with which the op returns reads of the state, and takes the factors named in ``changed``
        instead. What a layer lets its op add on top (a skip, a gate) is left to ``write_result``."""
        fed = dict(arguments)
        for field in changed | (_TIED & self.names.fields() if changed & _TIED else frozenset()):
            fed[self.argument(field, arguments)] = self.feed(field, getattr(factors, field), arguments)
            fed |= {flag: off for flag, off in _TURNED_OFF.get(field, {}).items() if flag in arguments}
        return fed

    def feed(self, field: str, x: Tensor, arguments: Arguments) -> Tensor:
        """One factor as the op takes it, with what it would have done to it turned off."""
        if field not in self.rounded:
            return x
        # Kernels take q, k and v in one dtype.
        same = self.names.v if field in _TIED else self.argument(field, arguments)
        return x.to(arguments[same].dtype)

    # -- results

    def output_dtype(self, arguments: Arguments) -> torch.dtype:
        """The dtype in which the torch op returns its outputs."""
        return arguments[getattr(self.names, self.output_like)].dtype

    def wants_state(self, arguments: Arguments) -> bool:
        """Whether the caller asked for the final state."""
        return bool(arguments.get("output_final_state"))

    def value_first(self, arguments: Arguments) -> bool:
        """Whether the op takes and returns states [B,H,V,K]."""
        return bool(arguments.get("state_v_first"))

    def read_result(self, native: object, arguments: Arguments) -> OpResult:
        """Canonical view of what the op returned for ``arguments``."""
        outputs, state = cast("tuple[Tensor, Tensor | None]", native)
        return OpResult(outputs, key_first(state, arguments))

    def write_result(self, result: OpResult, arguments: Arguments) -> object:
        """What the layer, which gave ``arguments``, expects back from the op, holding ``result``."""
        return result.outputs, key_first(result.final_state, arguments)  # the same transposition leads back


_NAMES_OF_FLA = Names("q", "k", "v", beta="beta", log_decay="g")


@dataclass(frozen=True, eq=False)
class FlaRule(Rule):
    """A rule of flash-linear-attention's ops: Triton kernels, which take [B,T,H,K] and [B,T,H,V]."""

    names: Names = _NAMES_OF_FLA
    kernel_only: bool = True
    rounded: frozenset[str] = frozenset({"q", "k", "v", "back"})


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """float64 stays; everything else is computed in float32, as the upstream ops do."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def is_update(arguments: Arguments) -> bool:
    """Whether a call of Mamba's ops is an update by one token, without a time axis."""
    return "state" in arguments


def _with_axes_of(x: Tensor, like: Tensor) -> Tensor:
    """x with axes of size 1 behind it, as many as `like` has more."""
    return x[(..., *[None] * (like.ndim - x.ndim))]


def l2_normalise(x: Tensor) -> Tensor:
    """x over its norm on the last axis, with upstream's epsilon of 1e-6 inside the root."""
    return x * torch.rsqrt((x * x).sum(dim=-1, keepdim=True) + 1e-6)


def expand_groups(tensor: Tensor, heads: int) -> Tensor:
    """Grouped value attention: [B,T,Hk,...] -> [B,T,heads,...], one key head serving consecutive value heads. A view
    where all heads share one."""
    if tensor.shape[2] == 1:
        return tensor.expand(-1, -1, heads, *[-1] * (tensor.ndim - 3))
    if tensor.shape[2] == heads:
        return tensor
    return tensor.repeat_interleave(heads // tensor.shape[2], dim=2)


def gate(g: Tensor, arguments: Arguments) -> Tensor:
    """Log-decay that a kernel makes of g, [B,T,H] with one A_log and bias per head, or [B,T,H,K] with one A_log per
    head and one bias per channel."""
    a_log = arguments.get("A_log")
    bias = arguments.get("dt_bias")
    bound = arguments.get("lower_bound")
    if bias is not None:
        g = g + bias.reshape(g.shape[2:]).to(g.dtype)
    if a_log is None:
        assert bound is not None, "a gate without a lower bound has A_log"
        return bound * g.sigmoid()
    rate = a_log.to(g.dtype).exp()  # positive, so that the decay below is at most 1
    if g.ndim == 4:
        rate = rate.reshape(-1, 1)
    if bound is not None:
        return bound * (rate * g).sigmoid()
    return -rate * F.softplus(g)


def key_first(state: Tensor | None, arguments: Arguments) -> Tensor | None:
    """[B,H,K,V] from a state in the layout of a call; its own inverse."""
    if state is not None and arguments.get("state_v_first"):
        return state.mT.contiguous()
    return state


def initial_state(arguments: Arguments, dtype: torch.dtype) -> Tensor | None:
    """[B,H,K,V] state that a call begins with, or None for zeros."""
    state = key_first(arguments.get("initial_state"), arguments)
    return None if state is None else state.to(dtype)
