"""nnsight: traces into the source of a layer's op."""
# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any

import nnsight
import torch
from nnsight import TransformersModel
from tool_probes import truth
from tool_probes.truth import LAYER, NEW_TOKENS, PROMPT, ROWS, Edit
from torch import Tensor
from transformers import DynamicCache

from hookpoints.model import loading


class Traced:
    """What the families share: `value` and `decoded` are, in a trace, what the op writes with."""

    path = ""
    value: Any
    decoded: Any

    def __init__(self, model: Any):
        tokenizer = loading.load("embedded").tokenizer
        self.model, self.config = TransformersModel(model, task="text-generation", tokenizer=tokenizer), model.config

    @property
    def layer(self):
        return self.model.get(self.path).source

    def _edited(self, tokens: Tensor, change: Edit) -> Tensor:
        with self.model.trace(tokens):
            change(self.value)
            logits = self.model.output.logits.save()
        return logits

    def delete(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, truth.delete)

    def batch(self, tokens: Tensor) -> Tensor:
        """rows of a repeated prompt, run from the first token on"""
        return self._edited(tokens.expand(ROWS, -1), truth.delete_in_rows)

    def generate(self, tokens: Tensor) -> Tensor:
        with self.model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
            truth.silence(self.value)
            for _ in tracer.iter[: NEW_TOKENS - 1]:
                truth.silence(self.decoded)
            ids = tracer.result.save()
        return ids[:, PROMPT:]

    def unedited(self, tokens: Tensor) -> Tensor:
        with self.model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
            ids = tracer.result.save()
        return ids[:, PROMPT:]

    def state_with_work(self, tokens: Tensor) -> Tensor:
        """one forward for each token"""
        cache, states = DynamicCache(config=self.config), []
        for t in range(tokens.shape[1]):
            with self.model.trace(tokens[:, t : t + 1], cache=cache):
                pass
            layer: Any = cache.layers[LAYER]
            states.append(layer.recurrent_states[0].clone())
        return torch.stack(states, 1)


class Mamba2(Traced):
    """Assignments inside the op: `hidden_states_1` is dt x, `B_0` the keys of each head."""

    path = f"backbone.layers.{LAYER}.mixer"

    @property
    def op(self):
        return self.layer.mamba2_chunk_scan_0.source.implementation_0.source

    @property
    def value(self):
        return self.op.hidden_states_1.output

    @property
    def decoded(self):
        op = self.layer.mamba2_selective_state_update_0.source.implementation_0.source
        return op.dBx_0.output[:, None]

    def write_with_work(self, tokens: Tensor) -> Tensor:
        """outer product of two values inside the op"""
        with self.model.trace(tokens):
            write = (self.op.B_0.output[..., None] * self.value[..., None, :]).save()
        return write

    def replace(self, tokens: Tensor) -> Tensor:
        with self.model.trace(tokens):
            truth.exchange(self.op.B_0.output)
            truth.exchange(self.value)
            logits = self.model.output.logits.save()
        return logits

    def state_with_work(self, tokens: Tensor) -> Tensor:
        """one forward for each token"""
        return super().state_with_work(tokens).mT

    def pattern_with_work(self, tokens: Tensor) -> Tensor:
        """the op called again with one-hot values"""
        from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

        with self.model.trace(tokens):
            inputs = nnsight.save(self.layer.mamba2_chunk_scan_0.inputs)
        (_, dt, *others), rest = inputs
        step = torch.nn.functional.softplus(dt + rest["dt_bias"])[..., None]
        one_hot = torch.eye(tokens.shape[1])[None, :, None] / step
        return mamba2_chunk_scan(one_hot, dt, *others, **{**rest, "D": None})[0].transpose(1, 2)


class Mamba(Traced):
    """`deltaB_u_0`, assigned inside the op, is the write."""

    path = f"backbone.layers.{LAYER}.mixer"

    @property
    def value(self):
        return self.layer.mamba_selective_scan_0.source.implementation_0.source.deltaB_u_0.output.transpose(1, 2)

    def write(self, tokens: Tensor) -> Tensor:
        with self.model.trace(tokens):
            write = self.value.save()
        return write[..., None]

    def delete(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, truth.delete_all_heads)

    def state_with_work(self, tokens: Tensor) -> Tensor:
        """one forward for each token"""
        return super().state_with_work(tokens)[..., None]


class GatedDelta(Traced):
    """Arguments of the op."""

    path = f"model.layers.{LAYER}.linear_attn"

    @property
    def op(self):
        return self.layer.torch_chunk_gated_delta_rule_0

    @property
    def value(self):
        return self.op.inputs[0][2]

    @property
    def decoded(self):
        return self.layer.torch_recurrent_gated_delta_rule_0.inputs[0][2]

    def write_with_work(self, tokens: Tensor) -> Tensor:
        """normalise the op's keys, multiply its values by beta"""
        with self.model.trace(tokens):
            (_, k, v), rest = self.op.inputs
            k = k / (k.square().sum(-1, keepdim=True) + 1e-6).sqrt()
            k = k.repeat_interleave(v.shape[2] // k.shape[2], dim=2)
            write = (k[..., None] * (rest["beta"][..., None] * v)[..., None, :]).save()
        return write

    def replace_with_work(self, tokens: Tensor) -> Tensor:
        """a recurrence of your own, whose reads replace the op's"""
        with self.model.trace(tokens):
            (q, k, v), rest = self.op.inputs
            f, _ = truth.gated_delta(q, k, v, **rest)
            f = f._replace(k=f.k.clone())  # the erase reads with these keys, too
            truth.exchange(f.k)
            truth.exchange(f.u)
            reads, states = truth.walk(f)
            self.op.output = (reads, states[:, -1])
            logits = self.model.output.logits.save()
        return logits

    def pattern_with_work(self, tokens: Tensor) -> Tensor:
        """the op called again with one-hot values"""
        from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

        with self.model.trace(tokens):
            inputs = nnsight.save(self.op.inputs)
        (q, k, _), rest = inputs
        one_hot = torch.eye(tokens.shape[1])[None, :, None] / rest["beta"][..., None]
        return torch_chunk_gated_delta_rule(q, k, one_hot, **rest)[0].transpose(1, 2)


class RWKV7(Traced):
    """Arguments of the op; key, value and erase are arguments of their own."""

    path = f"model.layers.{LAYER}.attn"

    @property
    def op(self):
        return self.layer.rwkv7_recurrence_0

    def _copied(self, *names: str) -> list[Tensor]:
        """Copies in the place of arguments: the layer uses its own again, for the bonus."""
        arguments = self.op.inputs[1]
        copies = {name: arguments[name].clone() for name in names}
        self.op.inputs = ((), {**arguments, **copies})
        return list(copies.values())

    @property
    def value(self):
        return self._copied("v")[0]

    def write_with_work(self, tokens: Tensor) -> Tensor:
        """outer product of two arguments of the op"""
        with self.model.trace(tokens):
            _, op = self.op.inputs
            write = (op["k"][..., None] * op["v"][..., None, :]).save()
        return write

    def replace(self, tokens: Tensor) -> Tensor:
        with self.model.trace(tokens):
            for factor in self._copied("k", "v"):
                truth.exchange(factor)
            logits = self.model.output.logits.save()
        return logits

    def generate(self, tokens: Tensor) -> Tensor:
        with self.model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False) as tracer:
            for _ in tracer.iter[:NEW_TOKENS]:
                truth.silence(self.value)
            ids = tracer.result.save()
        return ids[:, PROMPT:]

    def pattern_with_work(self, tokens: Tensor) -> Tensor:
        """the op called again with one-hot values"""
        from hookpoints.rwkv7.layers import rwkv7_recurrence

        with self.model.trace(tokens):
            arguments = self.op.inputs[1].save()
        one_hot = torch.eye(tokens.shape[1])[None, :, None].expand(1, -1, arguments["v"].shape[2], -1)
        return rwkv7_recurrence(**{**arguments, "v": one_hot}).outputs.transpose(1, 2)


PROBES = {"mamba": Mamba, "mamba2": Mamba2, "qwen3_5": GatedDelta, "rwkv7": RWKV7}
