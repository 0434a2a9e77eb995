"""TransformerLens' bridge, versions 3 and 4."""

from __future__ import annotations

from typing import Any

import torch
from tool_probes import truth
from tool_probes.truth import HEAD, LAYER, NEW_TOKENS, PROMPT, ROWS, SOURCE, TOKEN, Edit
from torch import Tensor
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module


class Bridge:
    """What the families share. `at` names the hook that is edited."""

    layer, at = "", ""

    def __init__(self, model: Any):
        self.bridge: Any = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)

    def _cached(self, tokens: Tensor, *names: str) -> list[Tensor]:
        names = tuple(self.layer + name for name in names)
        cache = self.bridge.run_with_cache(tokens, names_filter=list(names), use_cache=False)[1]
        return [cache[name] for name in names]

    def _hooks(self, change: Edit, *names: str):
        def hook(value: Tensor, hook: object) -> None:
            change(value)

        return [(self.layer + name, hook) for name in names or [self.at]]

    def _edited(self, tokens: Tensor, change: Edit, *names: str) -> Tensor:
        return self.bridge.run_with_hooks(tokens, fwd_hooks=self._hooks(change, *names), use_cache=False)

    def delete(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, truth.delete)

    def state(self, tokens: Tensor) -> Tensor:
        return self.bridge.run_with_cache(tokens, use_cache=False)[1].compute_ssm_state(layer=LAYER)

    def pattern(self, tokens: Tensor) -> Tensor:
        return self.bridge.run_with_cache(tokens, use_cache=False)[1].compute_ssm_effective_attention(layer=LAYER)

    def unedited(self, tokens: Tensor) -> Tensor:
        options = {"do_sample": False, "stop_at_eos": False, "verbose": False, "return_type": "tokens"}
        return self.bridge.generate(tokens[:, :PROMPT], NEW_TOKENS, **options)[:, PROMPT:]


class Hooked(Bridge):
    """Layers with a hook on the write or its value."""

    def batch(self, tokens: Tensor) -> Tensor:
        """rows of a repeated prompt, run from the first token on"""
        return self._edited(tokens.expand(ROWS, -1), truth.delete_in_rows)

    def generate(self, tokens: Tensor) -> Tensor:
        with self.bridge.hooks(fwd_hooks=self._hooks(truth.silence)):
            return self.unedited(tokens)

    def generate_with_work(self, tokens: Tensor) -> Tensor:
        """a loop of your own, in which all tokens run again for each new one"""
        ids = tokens[:, :PROMPT]
        for _ in range(NEW_TOKENS):
            ids = torch.cat([ids, self._edited(ids, truth.silence)[:, -1:].argmax(-1)], dim=1)
        return ids[:, PROMPT:]


class Mamba2(Hooked):
    """`eager_scan` replaces the layer's forward with a loop over tokens, in which the write is a hook [B,T,H,V,K]."""

    layer, at = f"blocks.{LAYER}.mixer.", "hook_ssm_write"

    def __init__(self, model: Any):
        super().__init__(model)
        for block in self.bridge.blocks:
            block.mixer.eager_scan = True

    def write(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_ssm_write")[0].mT

    def state(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_ssm_state")[0].mT

    def replace(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, truth.exchange)

    def sae_with_work(self, tokens: Tensor) -> Tensor:
        """one row of all heads"""
        from tool_probes.saes import stored

        shape = self._cached(tokens, "hook_ssm_write")[0].shape[2:]
        rows = stored(self.bridge, self.layer + "hook_ssm_write", shape.numel(), tokens, use_cache=False)
        return rows.unflatten(-1, shape)[:, :, HEAD].mT.flatten(2)


class Mamba(Mamba2):
    """As Mamba-2, with axes [B,channels,T,N]."""

    def write(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_ssm_write")[0].transpose(1, 2)[..., None]

    def state(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_ssm_state")[0].transpose(1, 2)[..., None]

    def delete(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, lambda write: truth.delete_all_heads(write.transpose(1, 2)))


class GatedDelta(Hooked):
    """The bridge has a forward of its own, with hooks on the arguments of the op."""

    layer, at = f"blocks.{LAYER}.linear_attn.", "hook_v"

    def write_with_work(self, tokens: Tensor) -> Tensor:
        """normalise `hook_k`, multiply `hook_v` by `hook_beta`"""
        k, v, beta = self._cached(tokens, "hook_k", "hook_v", "hook_beta")
        k = (k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(v.shape[2] // k.shape[2], dim=2)
        return k[..., None] * (beta[..., None] * v)[..., None, :]

    def pattern(self, tokens: Tensor) -> Tensor:
        """`compute_ssm_effective_attention`, a heuristic by its own words"""
        return super().pattern(tokens)

    def pattern_with_work(self, tokens: Tensor) -> Tensor:
        """the op called again with one-hot values"""
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        q, k, g, beta = self._cached(tokens, "hook_q", "hook_k", "hook_log_decay", "hook_beta")
        q, k = (x.repeat_interleave(beta.shape[2] // k.shape[2], dim=2) for x in (q, k))
        one_hot = torch.eye(tokens.shape[1])[None, :, None] / beta[..., None]
        options = {"g": g, "beta": beta, "use_qk_l2norm_in_kernel": True}
        return torch_chunk_gated_delta_rule(q, k, one_hot, **options)[0].transpose(1, 2)

    def replace(self, tokens: Tensor) -> Tensor:
        """`hook_k` feeds the erase too, and serves two heads"""

        def exchange(factor: Tensor) -> None:  # [B,T,2,K] or [B,T,4,...]
            head = HEAD * factor.shape[2] // 4
            factor[:, TOKEN, head] = factor[:, SOURCE, head]

        return self._edited(tokens, exchange, "hook_k", "hook_v", "hook_beta")

    def replace_with_work(self, tokens: Tensor) -> Tensor:
        """a recurrence of your own, whose reads replace `hook_recurrence_out`"""
        f, _ = truth.gated_delta(*self._cached(tokens, "hook_q", "hook_k", "hook_v", "hook_log_decay", "hook_beta"))
        f = f._replace(k=f.k.clone())  # the erase reads with these keys, too
        truth.exchange(f.k)
        truth.exchange(f.u)
        return self._edited(tokens, lambda reads: reads.copy_(truth.walk(f).reads), "hook_recurrence_out")

    def sae(self, tokens: Tensor) -> Tensor:
        """`hook_ssm_write` is `hook_beta` here"""
        from tool_probes.saes import stored

        return stored(self.bridge, self.layer + "hook_ssm_write", 48, tokens, use_cache=False)


class RWKV7(Bridge):
    """The layer is opaque but for its four projections; the probes take the nearest."""

    layer, at = f"blocks.{LAYER}.attn.", "v_proj.hook_out"

    def write(self, tokens: Tensor) -> Tensor:
        """nearest: `k_proj.hook_out` and `v_proj.hook_out`"""
        k, v = (x.unflatten(-1, (4, -1)) for x in self._cached(tokens, "k_proj.hook_out", "v_proj.hook_out"))
        return k[..., None] * v[..., None, :]

    def delete(self, tokens: Tensor) -> Tensor:
        """nearest: `v_proj.hook_out`"""
        return self._edited(tokens, lambda v: truth.delete(v.unflatten(-1, (4, -1))))


PROBES = {"mamba": Mamba, "mamba2": Mamba2, "qwen3_5": GatedDelta, "rwkv7": RWKV7}
