"""What every probe is held against: tiny random models, and a loop over tokens that knows nothing of any tool.

``solve`` runs a model while the op of its recurrent layers is replaced by ``walk``, a plain loop. That is done once,
with the installed transformers; the tensors travel to the environments of the tools together with the model's weights.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

sys.path.append(str(Path(__file__).parents[2] / "tests"))

from conftest import MAKERS, VOCAB, make_hf

LAYER, HEAD, TOKEN, SOURCE = 1, 1, 3, 6
"""The write that is edited; SOURCE is the token whose write takes its place."""
ROWS, PROMPT, NEW_TOKENS = 8, 12, 8
"""Edits in one batch; tokens of the prompt, of 70; tokens generated."""
FAMILIES = {"mamba2": "Mamba-2", "qwen3_5": "Gated DeltaNet", "rwkv7": "RWKV-7", "mamba": "Mamba-1"}
"""Model types. In Mamba-1 each channel is a head with a K x 1 state."""

_WIDE = {"hidden_size": 256, "num_hidden_layers": 4}
_LONG = {
    "mamba2": {**_WIDE, "num_heads": 8, "head_dim": 64, "state_size": 64},
    "qwen3_5": {**_WIDE, "linear_num_value_heads": 4, "linear_key_head_dim": 64, "linear_value_head_dim": 64},
    "rwkv7": {**_WIDE, "head_dim": 64, "value_dim": 256},
}


class Factors(NamedTuple):
    """S_t = decay_t S_{t-1} + a_t (b_t^T S_{t-1})^T + k_t u_t^T; a token reads S_t^T q_t."""

    q: Tensor
    """[B,T,H,K], with its scale."""
    k: Tensor
    u: Tensor
    """[B,T,H,V]"""
    decay: Tensor
    """[B,T,H,1] or [B,T,H,K]"""
    a: Tensor | None = None
    b: Tensor | None = None


class Walk(NamedTuple):
    """Reads [B,T,H,V] and states [B,T,H,K,V]."""

    reads: Tensor
    states: Tensor


Edit = Callable[[Tensor], object]
"""Changes a tensor in place."""


def walk(f: Factors) -> Walk:
    """The recurrence, token by token from an empty state."""
    state = torch.zeros(*f.k[:, 0].shape, f.u.shape[-1], dtype=f.u.dtype)
    reads, states = [], []
    for t in range(f.k.shape[1]):
        before = state
        state = f.decay[:, t, :, :, None] * before + f.k[:, t, :, :, None] * f.u[:, t, :, None, :]
        if f.a is not None and f.b is not None:
            state = state + f.a[:, t, :, :, None] * (f.b[:, t, :, :, None] * before).sum(-2, keepdim=True)
        reads.append((f.q[:, t, :, :, None] * state).sum(-2))
        states.append(state)
    return Walk(torch.stack(reads, 1), torch.stack(states, 1))


# -- from an op's arguments to factors, and from reads to what the op returns


def _mamba(x, dt, A, B, C, D, z, delta_bias, **_):
    dt = F.softplus(dt + delta_bias[:, None]).mT[..., None]
    queries, keys = (value.mT[:, :, None].expand(-1, -1, x.shape[1], -1) for value in (C, B))
    factors = Factors(queries, keys, dt * x.mT[..., None], (dt * A).exp())
    return factors, lambda reads: (reads[..., 0].mT + D[:, None] * x) * F.silu(z)


def _mamba2(x, dt, A, B, C, chunk_size, D, dt_bias, dt_limit, **_):
    dt = F.softplus(dt + dt_bias).clamp(*dt_limit)[..., None]
    keys, queries = (value.repeat_interleave(x.shape[2] // value.shape[2], dim=2) for value in (B, C))
    return Factors(queries, keys, dt * x, (dt * A[:, None]).exp()), lambda reads: reads + D[:, None] * x


def gated_delta(query, key, value, g, beta, **_):
    """Factors from the arguments of ``torch_chunk_gated_delta_rule``."""
    groups = value.shape[2] // key.shape[2]
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    query, key = (x.repeat_interleave(groups, dim=2) for x in (query / query.shape[-1] ** 0.5, key))
    beta, decay = beta[..., None], g.exp()[..., None]
    return Factors(query, key, beta * value, decay, -beta * decay * key, key), lambda reads: (reads, None)


def _rwkv7(r, w, k, v, a, b, **_):
    return Factors(r, k, v, w.exp(), b, a), lambda reads: (reads, None)


_OPS = {
    "mamba": ("transformers.models.mamba.modeling_mamba", "mamba_selective_scan", _mamba),
    "mamba2": ("transformers.models.mamba2.modeling_mamba2", "mamba2_chunk_scan", _mamba2),
    "qwen3_5": ("transformers.models.qwen3_5.modeling_qwen3_5", "torch_chunk_gated_delta_rule", gated_delta),
    "rwkv7": ("hookpoints.rwkv7.layers", "rwkv7_recurrence", _rwkv7),
}


@contextmanager
def _replaced(family: str, *edits: Edit) -> Iterator[list[tuple[Factors, Walk]]]:
    """While open, every layer's op is the loop, and edits change u, and k if there are two, of LAYER. Yields what each
    op call had."""
    module, name, factors_of = _OPS[family]
    home, calls = importlib.import_module(module), []
    original = getattr(home, name)

    def op(*args, **kwargs):
        factors, finish = factors_of(*args, **kwargs)
        if len(calls) == LAYER:
            factors = factors._replace(k=factors.k.clone(), u=factors.u.clone())
            for edit, factor in zip(edits, (factors.u, factors.k), strict=False):
                edit(factor)
        calls.append((factors, walk(factors)))
        return finish(calls[-1][1].reads)

    setattr(home, name, op)
    try:
        yield calls
    finally:
        setattr(home, name, original)


# -- edits in place of a factor of the write, or of the write, with axes [B,T,H,...]


def delete(x: Tensor) -> None:
    """One token's."""
    x[:, TOKEN, HEAD] = 0


def delete_all_heads(x: Tensor) -> None:
    """One token's."""
    x[:, TOKEN] = 0


def exchange(x: Tensor) -> None:
    """At TOKEN that of SOURCE."""
    x[:, TOKEN, HEAD] = x[:, SOURCE, HEAD]


def silence(x: Tensor) -> None:
    """Every token's."""
    x[:, :, HEAD] = 0


def delete_in_rows(x: Tensor) -> None:
    """Another token's in each row."""
    for row in range(ROWS):
        x[row, TOKEN + row, HEAD] = 0


# -- models and solutions


def make_model(family: str) -> nn.Module:
    """A tiny random model whose writes change its logits."""
    if (
        family == "mamba2"
    ):  # one group, as checkpoints have: with more, older releases of transformers compute otherwise
        return make_hf(family, n_groups=1)
    if family != "mamba":
        return make_hf(family)
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 3}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, pad_token_id=0, eos_token_id=None)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("dt_proj.bias"):
                parameter.copy_(torch.linspace(-4, 0, parameter.numel()))
            elif name.endswith(("_proj.weight", "conv1d.weight")):
                parameter.mul_(4.0)
    return model


def make_long(family: str) -> nn.Module:
    """A larger one, of four layers with 64 x 64 states, to take time with."""
    return MAKERS[family](**_LONG[family]).eval()


@torch.no_grad()
def solve(family: str) -> dict[str, Tensor]:
    """The tensors that probes are held against, under the names of the tasks, and the weights of the model."""
    model = make_model(family)
    tokens = torch.randint(1, VOCAB, (1, 70), generator=torch.Generator().manual_seed(1))

    def logits(tokens: Tensor, *edits: Edit) -> Tensor:
        with _replaced(family, *edits):
            return model(tokens, use_cache=False).logits

    def continuation(*edits: Edit) -> Tensor:
        ids = tokens[:, :PROMPT]
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, logits(ids, *edits)[:, -1:].argmax(-1)], dim=1)
        return ids[:, PROMPT:]

    with _replaced(family) as calls:
        plain = model(tokens, use_cache=False).logits
    factors, walked = calls[LAYER]
    truth = {f"weights.{name}": value.clone() for name, value in model.state_dict().items()}
    truth |= {"tokens": tokens, "plain": plain, "state": walked.states}
    truth["write"] = factors.k[..., None] * factors.u[..., None, :]
    if family == "mamba":
        return truth | {"delete": logits(tokens, delete_all_heads)}
    one_hot = torch.eye(tokens.shape[1])[None, :, None].expand(1, -1, factors.k.shape[2], -1)
    return truth | {
        "pattern": walk(factors._replace(u=one_hot)).reads.transpose(1, 2),
        "delete": logits(tokens, delete),
        "replace": logits(tokens, exchange, exchange),
        "batch": logits(tokens.expand(ROWS, -1), delete_in_rows),
        "generate": continuation(silence),
        "unedited": continuation(),
        "sae": truth["write"][:, :, HEAD].flatten(2),
    }
