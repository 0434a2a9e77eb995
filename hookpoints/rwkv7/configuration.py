"""Configuration of an RWKV-7 model, with the keys of flash-linear-attention's checkpoints."""

from __future__ import annotations

from transformers import PreTrainedConfig

_ACTIVATIONS = ("sqrelu", "relu2")
"""Names of relu(x)^2 in flash-linear-attention and in transformers."""


class RWKV7Config(PreTrainedConfig):
    """What decides the shape of an RWKV-7 model.

    Keys that only choose kernels of flash-linear-attention (``attn_mode``, ``fuse_norm``, ``fuse_cross_entropy`` ...)
    are stored when a checkpoint has them, and change nothing here.

    Raises:
        ValueError: sizes that do not fit each other, or a model of another architecture; names the values.
    """

    model_type = "rwkv7"
    keys_to_ignore_at_inference = ("cache", "past_key_values")
    number_of_conv_states = 2
    """Token shifts a layer that a cache must remember: of the attention and of the feed-forward part."""

    vocab_size: int = 32_000
    hidden_size: int = 2_048
    num_hidden_layers: int = 24
    head_dim: int | None = 64
    """Key side K of a head; or give ``num_heads``."""
    num_heads: int | None = None
    value_dim: int | list[int] | None = None
    """H * V, for all layers or for each (then all alike, since layer 0's values are mixed into all); None:
    ``hidden_size``."""
    hidden_ratio: float | None = 4
    """``intermediate_size`` over ``hidden_size``, where the former is not given."""
    intermediate_size: int | None = None
    decay_low_rank_dim: int = 64
    gate_low_rank_dim: int = 128
    a_low_rank_dim: int = 64
    v_low_rank_dim: int = 16
    hidden_act: str = "sqrelu"
    max_position_embeddings: int = 2_048
    """Length of the training sequences; the model itself sets no limit."""
    norm_first: bool = True
    """Whether the embeddings are normalized before the first block."""
    norm_bias: bool = True
    norm_eps: float = 1e-5
    head_norm_eps: float | None = None
    """Epsilon of the norm over a head's reads; None: ``head_dim * norm_eps``, flash-linear-attention's."""
    attn: dict[str, object] | None = None
    """Layers of softmax attention in flash-linear-attention's hybrids; not supported here."""
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: object) -> None:
        if self.attn is not None:
            raise ValueError("RWKV-7 with layers of softmax attention (config.attn) is not supported, only pure RWKV-7")
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"hidden_act must be relu squared ({' or '.join(_ACTIVATIONS)}), not {self.hidden_act!r}")
        asked = self.head_dim or self.num_heads
        self.head_dim = self.head_dim or self.hidden_size // (self.num_heads or 1)
        heads = self.hidden_size // self.head_dim
        value_dim = self.hidden_size if self.value_dim is None else self.value_dim
        values = [value_dim] * self.num_hidden_layers if isinstance(value_dim, int) else list(value_dim)
        keys_fit = bool(asked) and self.hidden_size == heads * self.head_dim and self.num_heads in (None, heads)
        one_size = len(values) == self.num_hidden_layers and len(set(values)) == 1
        if not keys_fit or not one_size or values[0] % heads:
            raise ValueError(
                "hidden_size must be num_heads * head_dim, and value_dim one multiple of num_heads for all layers; "
                f"got hidden_size {self.hidden_size}, num_heads {self.num_heads}, head_dim {self.head_dim}, "
                f"value_dim {value_dim}"
            )
        self.num_heads = heads
        self.value_dim = values
        if self.intermediate_size is None:
            self.intermediate_size = -(-int(self.hidden_size * (self.hidden_ratio or 4)) // 32) * 32
        super().__post_init__(**kwargs)

    @property
    def layer_types(self) -> list[str]:
        """Which cache transformers makes for each layer."""
        return ["linear_attention"] * self.num_hidden_layers
