"""Mamba-2: the model called `embedded-mamba2`."""

from embedded_family import TRAINING_CHUNK, Family, Transition, call_original
from torch import Tensor, nn
from transformers import Mamba2Config, Mamba2ForCausalLM, PreTrainedModel
from transformers.models.mamba2 import modeling_mamba2


def build(vocabulary: int, end_of_text: int) -> PreTrainedModel:
    """Mamba-2 of about the same size: the mixer is the whole layer, so there are more layers."""
    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=192,
        num_hidden_layers=8,
        num_heads=8,
        head_dim=48,
        state_size=64,
        n_groups=1,
        expand=2,
        conv_kernel=4,
        chunk_size=TRAINING_CHUNK,
        time_step_min=1e-3,
        time_step_max=3e-2,
        initializer_range=0.02,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    return Mamba2ForCausalLM(config)


def read(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    dt_bias: Tensor,
    dt_limit: tuple[float, float],
    **_: object,
) -> Transition:
    """Mamba-2: alpha = exp(dt A), no erase; the key of a write is B, shared by the heads of a group."""
    dt = nn.functional.softplus(dt.float() + dt_bias.float()).clamp(*dt_limit)
    key = B.float().repeat_interleave(hidden_states.shape[2] // B.shape[2], dim=2)
    return Transition(key=key, alpha=(dt * A.float()).exp()[..., None], write=dt, a=None, b=None)


MAMBA2 = Family(
    title="Mamba-2",
    model_class=Mamba2ForCausalLM,
    build=build,
    gates=("A_log", "dt_bias"),
    write_name="dt",
    architecture=(
        "Eight Mamba-2 layers of 8 heads, state K = 64 shared by all heads of a layer, V = 48. The library is\n"
        "`transformers` alone (`Mamba2ForCausalLM`)."
    ),
    recurrence_formula="alpha p",
    module=modeling_mamba2,
    op="mamba2_chunk_scan",
    read=read,
    train=call_original,
)
