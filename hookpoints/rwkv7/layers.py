"""The layers of RWKV-7 (Peng et al. 2025, arXiv 2503.14456), with flash-linear-attention's names of parameters.

A layer mixes each token with the one before it (token shift), so that a cache holds the state and the last token
that the attention part saw and the last that the feed-forward part saw. The recurrence is one function,
``rwkv7_recurrence``, which layers call by keyword: it is what hooks intercept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Cache

from hookpoints.recurrence.recurrence import Recurrence
from hookpoints.rwkv7.configuration import RWKV7Config

_SLOWEST = -math.exp(-0.5)
"""Largest log-decay per token, in size: alpha lies in (exp(-exp(-0.5)), 1) = (0.545, 1)."""
MIXED = ("x_r", "x_w", "x_k", "x_v", "x_a", "x_g")
_ATTENTION = 0
_FEED_FORWARD = 1
"""Which of a layer's token shifts is stored where in the cache."""


def rwkv7_recurrence(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """S_t = diag(exp(w_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,  o_t = S_t^T (scale r_t).

    The arguments are those of flash-linear-attention's ``chunk_rwkv7``. Chunked, in float32 (float64 for float64),
    differentiable. RWKV-7 (Peng et al. 2025, arXiv 2503.14456), eq. 17.

    Args:
        r: [B,T,H,K] receptance, which reads.
        w: [B,T,H,K] natural log of the decay.
        k: [B,T,H,K] key that is written.
        v: [B,T,H,V] value that is written.
        a: [B,T,H,K] what the erase reads back with: minus the normalized erase key.
        b: [B,T,H,K] where the erase acts: the erase key times the in-context rate.
        scale: factor on r.
        initial_state: [B,H,K,V]; None for zeros.
        output_final_state: whether to return the state after the last token.

    Returns: outputs [B,T,H,V] in the dtype of ``v``, and the state [B,H,K,V] or None.
    """
    outputs, state = Recurrence(r, k, v, log_decay=w, a=b, b=a, scale=scale, initial_state=initial_state).scan()
    return outputs.to(v.dtype), state if output_final_state else None


class FirstValues:
    """The values of layer 0, which all later layers mix into their own.

    Layer 0 leaves them here. Where it did not run, since a run starts further up, they are made from the embeddings.
    """

    def __init__(self, make: Callable[[], Tensor]):
        self._make = make
        self.values: Tensor | None = None
        """[B,T,H*V], once layer 0 ran or they were asked for."""

    def get(self) -> Tensor:
        """The values [B,T,H*V] of layer 0."""
        if self.values is None:
            self.values = self._make()
        return self.values


def shift(x: Tensor, before: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token shift of x [B,T,D] after the token ``before`` [B or 1,D]: the token before each one [B,T,D], and what the
    next token will find before it [B,D]. Padding (mask [B,T] zero) is passed over, on whichever side it is."""
    before = x.new_zeros(1, x.shape[2]) if before is None else before.to(x)
    seen = torch.cat([before[:, None].expand(x.shape[0], 1, -1), x], dim=1)
    if mask is None:
        return seen[:, :-1], seen[:, -1]
    # The index in `seen` of the last real token.
    numbers = torch.arange(1, seen.shape[1], device=x.device)
    latest = torch.where(mask != 0, numbers, 0).cummax(1).values
    latest = F.pad(latest, (1, 0))  # before the first token: what was before the pass
    last_real = seen.gather(1, latest[..., None].expand_as(seen))
    return last_real[:, :-1], last_real[:, -1]


def cached_shift(x: Tensor, cache: Cache | None, layer: int, part: int, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """``shift`` after what the cache holds; the cache is left as it is."""
    before = None
    if cache is not None and cache.has_previous_state(layer, part):
        before = cache.layers[layer].conv_states[part][..., -1]  # type: ignore[attr-defined]
    return shift(x, before, mask)


def keep_shift(x: Tensor, last: Tensor, cache: Cache, layer: int, part: int) -> None:
    """Leave what the next token will find before it in the cache; all of x where that records its past."""
    # A cache that can be cut keeps every token; any other the last one.
    records_past = getattr(cache.layers[layer], "record_past", False)
    tokens = x.mT if records_past else last[..., None]
    cache.update_conv_state(tokens, layer, state_idx=part, conv_kernel_size=1)


class LowRankMap(nn.Module):
    """x -> B act(A x) + bias, with A and B of rank R. (In the paper: a LoRA.)"""

    def __init__(self, width: int, rank: int, out: int, activation: nn.Module | None = None, bias: bool = True):
        super().__init__()
        inner = nn.Linear(width, rank, bias=False)
        outer = nn.Linear(rank, out, bias=bias)
        self.lora = nn.Sequential(inner, activation or nn.Identity(), outer)

    def forward(self, x: Tensor) -> Tensor:
        return self.lora(x)


class RWKV7Attention(nn.Module):
    """Time mixing: the part with the state."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        assert config.num_heads is not None and config.head_dim is not None and isinstance(config.value_dim, list)
        width = keys = config.hidden_size
        values = config.value_dim[layer]
        self.layer_idx = layer
        self.num_heads = config.num_heads
        self.head_dim = config.head_dim
        self.head_v_dim = values // config.num_heads
        for name in MIXED:
            self.register_parameter(name, nn.Parameter(torch.empty(1, 1, width)))
        self.k_k = nn.Parameter(torch.empty(keys))
        self.k_a = nn.Parameter(torch.empty(keys))
        self.r_k = nn.Parameter(torch.empty(self.num_heads, self.head_dim))
        self.r_proj = nn.Linear(width, keys, bias=False)
        self.k_proj = nn.Linear(width, keys, bias=False)
        self.v_proj = nn.Linear(width, values, bias=False)
        self.o_proj = nn.Linear(values, width, bias=False)
        self.w_lora = LowRankMap(width, config.decay_low_rank_dim, keys, nn.Tanh())
        if layer:
            self.v_lora = LowRankMap(width, config.v_low_rank_dim, values)
        self.a_lora = LowRankMap(width, config.a_low_rank_dim, keys)
        self.g_lora = LowRankMap(width, config.gate_low_rank_dim, values, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(self.num_heads, values, eps=config.head_norm_eps or self.head_dim * config.norm_eps)

    def first_values(self, x: Tensor, cache: Cache | None, mask: Tensor | None) -> Tensor:
        """What layer 0 gives to `FirstValues`, from its normalized input x [B,T,D]; changes no cache."""
        previous, _ = cached_shift(x, cache, self.layer_idx, _ATTENTION, mask)
        return self.v_proj(self._mixed_input(x, previous - x, "x_v"))

    def forward(
        self,
        hidden_states: Tensor,
        first: FirstValues,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """[B,T,D] to [B,T,D]. ``attention_mask`` [B,T] is zero at padding, which leaves no trace."""
        x = hidden_states
        state = None
        if cache is not None and cache.has_previous_state(self.layer_idx, _ATTENTION):
            state = cache.layers[self.layer_idx].recurrent_states[0]  # type: ignore[attr-defined]
        previous, last = cached_shift(x, cache, self.layer_idx, _ATTENTION, attention_mask)
        delta = previous - x
        xr, xw, xk, xv, xa, xg = (self._mixed_input(x, delta, name) for name in MIXED)

        r = self.r_proj(xr)
        v = self._layer_values(xv, first)
        g = self.g_lora(xg)
        decay = self.w_lora(xw)
        # In float32 at least: errors of a decay add up over the tokens that it acts on.
        w = _SLOWEST * decay.to(torch.promote_types(decay.dtype, torch.float32)).sigmoid()
        rate = self.a_lora(xa).sigmoid()
        k = self.k_proj(xk)
        # The erase has a separate key, taken before the written one is scaled by the rate.
        erase = F.normalize(self._by_head(k * self.k_k), dim=-1)
        k = k * (1 + (rate - 1) * self.k_a)
        r = self._by_head(r)
        w = self._by_head(w)
        k = self._by_head(k)
        rate = self._by_head(rate)
        v = self._by_head(v)

        # At padding nothing decays, is written or erased, so that the state passes through.
        real = 1 if attention_mask is None else attention_mask[:, :, None, None].to(k.dtype)
        outputs, state = rwkv7_recurrence(
            r=r,
            w=w * real,
            k=k * real,
            v=v,
            a=-erase,
            b=erase * rate * real,
            initial_state=state,
            output_final_state=cache is not None,
        )
        if cache is not None:
            keep_shift(x, last, cache, self.layer_idx, _ATTENTION)
            assert state is not None
            cache.update_recurrent_state(state, self.layer_idx)
        read = self.g_norm(outputs.reshape(-1, v.shape[2] * v.shape[3])).view_as(g)
        # What a token reads of itself goes around the state.
        bonus = ((r * k * self.r_k).sum(-1, keepdim=True) * v).flatten(2)
        return self.o_proj((read + bonus) * g)

    def _layer_values(self, x: Tensor, first: FirstValues) -> Tensor:
        values = self.v_proj(x)
        if self.layer_idx == 0:
            first.values = values
            return values
        return torch.lerp(values, first.get(), self.v_lora(x).sigmoid())

    def _mixed_input(self, x: Tensor, delta: Tensor, name: str) -> Tensor:
        return torch.addcmul(x, delta, getattr(self, name).to(x.dtype))

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, -1))


class RWKV7FeedForward(nn.Module):
    """Channel mixing: relu squared between two linear maps, behind its own token shift."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()
        assert config.intermediate_size is not None
        self.layer_idx = layer
        self.x_k = nn.Parameter(torch.empty(config.hidden_size))
        self.key = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.value = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, cache: Cache | None = None, attention_mask: Tensor | None = None) -> Tensor:
        """[B,T,D] to [B,T,D]."""
        previous, last = cached_shift(x, cache, self.layer_idx, _FEED_FORWARD, attention_mask)
        if cache is not None:
            keep_shift(x, last, cache, self.layer_idx, _FEED_FORWARD)
        return self.value(F.relu(self.key(torch.lerp(x, previous, self.x_k.to(x.dtype)))).square())


class RWKV7Block(nn.Module):
    """One layer: attention and feed-forward, each behind a norm, each added to the residual stream."""

    def __init__(self, config: RWKV7Config, layer: int):
        super().__init__()

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)

        if config.norm_first and layer == 0:
            self.pre_norm = norm()  # for the embeddings; applied by the model, but a checkpoint has it here
        self.attn_norm = norm()
        self.ffn_norm = norm()
        self.attn = RWKV7Attention(config, layer)
        self.ffn = RWKV7FeedForward(config, layer)

    def forward(
        self,
        hidden_states: Tensor,
        v_first: FirstValues,
        cache: Cache | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Residual stream [B,T,D] to [B,T,D]."""
        x = hidden_states
        x = x + self.attn(self.attn_norm(x), v_first, cache=cache, attention_mask=attention_mask)
        return x + self.ffn(self.ffn_norm(x), cache=cache, attention_mask=attention_mask)
