"""Gated DeltaNet: the model called `embedded` (transformers' Qwen3.5)."""

import math

import torch
from embedded_family import TRAINING_CHUNK, Family, Op, Transition
from torch import Tensor, nn
from transformers import PreTrainedModel, Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5 import modeling_qwen3_5


def build(vocabulary: int, end_of_text: int) -> PreTrainedModel:
    """Qwen3.5: attention first, then linear layers with grouped value heads and K != V.

    Attention first or last made no difference to perplexity after 1 M tokens (42.6 and 42.5), but to memory: 7 and 5 of
    the 16 heads kept half of a write for 16 tokens. Even so, after 16 M tokens the heads of the first linear layer
    forget within two: decays stay slow there, but similar keys erase each other.
    """
    config = Qwen3_5TextConfig(
        vocab_size=vocabulary,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=5,
        layer_types=["full_attention"] + ["linear_attention"] * 4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=48,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=64,
        linear_value_head_dim=32,
        linear_conv_kernel_dim=4,
        max_position_embeddings=4_096,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    model = Qwen3_5ForCausalLM(config)
    for layer in model.modules():
        if isinstance(layer, modeling_qwen3_5.Qwen3_5GatedDeltaNet):
            initialise_gates(layer)
    return model


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


@torch.no_grad()
def initialise_gates(layer: nn.Module) -> None:
    """Decay rates dt * A as in the papers, spread over the heads; the library's own default forgets at once.

    dt is log-spaced in [1e-3, 2e-2] over the heads (slowest first, so that value heads of one key head are
    alike); A is uniform in [1, 8].
    """
    heads = layer.num_v_heads
    dt = torch.logspace(math.log10(1e-3), math.log10(2e-2), heads)
    layer.dt_bias.copy_(inverse_softplus(dt))
    layer.A_log.copy_(torch.empty(heads).uniform_(1, 8).log())
    layer.in_proj_a.weight.zero_()


def fast_recurrence(
    _: Op, query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **__: object
) -> tuple[Tensor, None]:
    """The library's chunked operation with the same result, 1.7 times as fast to train here.

    The library indexes chunk i of a tensor inside its loop, and the gradient of every such index fills a
    tensor of full size; `unbind` does not. Shapes as in the original; T must be a whole number of chunks.
    """
    batch, _time, heads, width = value.shape
    dtype, group = query.dtype, heads // key.shape[2]
    query, key = (modeling_qwen3_5.l2norm(x.float()).repeat_interleave(group, dim=2) for x in (query, key))
    query = query * query.shape[-1] ** -0.5

    def chunks(x: Tensor) -> Tensor:  # [B, T, H, ...] -> [B, H, chunk, TRAINING_CHUNK, ...]
        return x.float().transpose(1, 2).unflatten(2, (-1, TRAINING_CHUNK))

    query, key, value, beta = chunks(query), chunks(key), chunks(value), chunks(beta)[..., None]
    log_decay = chunks(g).cumsum(-1)
    future = torch.ones(TRAINING_CHUNK, TRAINING_CHUNK, dtype=torch.bool).triu(1)
    between = (log_decay[..., :, None] - log_decay[..., None, :]).masked_fill(future, -torch.inf).exp()
    decay = log_decay.exp()[..., None]
    attention = (query @ key.mT) * between
    system = (beta * key @ key.mT) * between
    right = torch.cat([beta * value, beta * decay * key], dim=-1)
    # One triangular solve gives corrected values and the keys with which they depend on the state before the
    # chunk.
    values, readers = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True).split(
        [width, key.shape[-1]], dim=-1
    )
    query = query * decay
    key = (key * (log_decay[..., -1:] - log_decay).exp()[..., None]).mT
    state, outputs = value.new_zeros(batch, heads, key.shape[-2], width), []
    parts = (x.unbind(2) for x in (query, key, values, readers, attention, decay[..., -1:, :]))
    for q, k, v, reader, scores, last in zip(*parts, strict=True):
        v = v - reader @ state
        outputs.append(q @ state + scores @ v)
        state = last * state + k @ v
    return torch.stack(outputs, dim=2).flatten(2, 3).transpose(1, 2).to(dtype), None


def read(query: Tensor, key: Tensor, value: Tensor, *, g: Tensor, beta: Tensor, **_: object) -> Transition:
    """Gated DeltaNet: alpha = exp(g), a = -beta k, b = alpha k; k l2-normalised, repeated over value heads."""
    key = key.float().repeat_interleave(value.shape[2] // key.shape[2], dim=2)
    key = modeling_qwen3_5.l2norm(key)
    alpha, beta = g.float().exp()[..., None], beta.float()
    return Transition(key=key, alpha=alpha, write=beta, a=-beta[..., None] * key, b=alpha * key)


GDN = Family(
    title="Gated DeltaNet",
    model_class=Qwen3_5ForCausalLM,
    build=build,
    gates=("A_log", "dt_bias", "in_proj_a.weight"),
    write_name="beta",
    architecture=(
        "Layer 0 is full attention, layers 1-4 are Gated DeltaNet: 2 key heads of width K = 64 serve 4 value\n"
        "heads of width V = 32. The library is `transformers` alone (`Qwen3_5ForCausalLM`)."
    ),
    recurrence_formula="alpha (p - beta k <k, p>)",
    module=modeling_qwen3_5,
    op="torch_chunk_gated_delta_rule",
    read=read,
    train=fast_recurrence,
)
