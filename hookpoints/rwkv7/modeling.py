"""The RWKV-7 language model: embeddings, layers, norm, head, cache and generation through transformers.

It loads checkpoints of flash-linear-attention's format and of that format's first version, which holds the six token
shifts of a layer as one tensor ``attn.x_x`` [6,D] (RWKV/RWKV7-Goose-World3-1.5B-HF). transformers loads parameters by
their names alone, so these are taken apart before it sees them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from hookpoints.fla.checkpoints import first_format, weight_files
from hookpoints.rwkv7 import official
from hookpoints.rwkv7.configuration import RWKV7Config
from hookpoints.rwkv7.layers import MIXED, FirstValues, RWKV7Attention, RWKV7Block, RWKV7FeedForward

_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"
"""What this version of transformers calls the cache of an output (it changed between 5.15 and 5.24)."""
_WHERE = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Arguments of ``from_pretrained`` that say where a checkpoint is."""


class RWKV7PreTrainedModel(PreTrainedModel):
    """What both models share: configuration, initial weights, loading and saving."""

    config_class = RWKV7Config
    config: RWKV7Config
    base_model_prefix = "model"
    _no_split_modules = ["RWKV7Block"]  # noqa: RUF012 (transformers' own way)
    _is_stateful = True

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """transformers' own, for both versions of flash-linear-attention's format."""
        source = pretrained_model_name_or_path
        where = {name: kwargs[name] for name in _WHERE if kwargs.get(name) is not None}
        known = source is None or kwargs.get("state_dict") is not None
        if not known and (old := first_format(weight_files(str(source), **where))) is not None:
            if kwargs.get("config") is None:
                kwargs["config"] = RWKV7Config.from_pretrained(str(source), revision=kwargs.get("revision") or "main")
            kwargs["state_dict"] = old
            source = None
        return super().from_pretrained(source, *args, **kwargs)  # type: ignore[arg-type]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Token shifts and decays begin as in the official training code: the first channels of the first heads shift
        little and decay slowly, the last ones much and fast. The other weights are transformers' own."""
        super()._init_weights(module)
        width = self.config.hidden_size
        if isinstance(module, RWKV7FeedForward):
            init.copy_(module.x_k, 1 - torch.arange(width) / width)
        elif isinstance(module, RWKV7Attention):
            for name in MIXED:
                init.copy_(getattr(module, name), (1 - torch.arange(width) / width).view(1, 1, -1))
            for weight, value in ((module.k_k, 0.7), (module.k_a, 1.0), (module.r_k, 0.0)):
                init.constant_(weight, value)
            inside = torch.linspace(-1, 1, module.head_dim).repeat(module.num_heads)
            init.copy_(
                cast(Tensor, module.w_lora.lora[2].bias), torch.linspace(-5.5, 0.5, width) + 2.5 * inside * inside.abs()
            )


class RWKV7Model(RWKV7PreTrainedModel):
    """The layers, from token ids to the normalized residual stream."""

    _input_embed_layer = "embeddings"

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(RWKV7Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.norm_eps, bias=config.norm_bias)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        past_key_values: Cache | None = None,
        **_: object,
    ) -> BaseModelOutputWithPast:
        """Run the layers.

        Args:
            input_ids: [B,T]; or give ``inputs_embeds`` [B,T,D].
            attention_mask: [B,T], or longer where a cache holds the beginning; zero at padding, which is passed over.
            cache: what came before; updated in place.
            use_cache: return a cache; default True, in training False.
            output_hidden_states: return the residual stream at every block.
            past_key_values: another name of ``cache``.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = past_key_values if cache is None else cache
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        x = self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = _zeros_at_padding(attention_mask, x)
        bottom = cast(RWKV7Block, self.layers[0])  # or what wraps one, as TransformerLens' bridge does
        x = embedded = bottom.pre_norm(x) if self.config.norm_first else x
        first = FirstValues(lambda: bottom.attn.first_values(bottom.attn_norm(embedded), cache, mask))
        seen = []
        for block in self.layers:
            seen.append(x)
            x = block(x, first, cache=cache, attention_mask=mask)
        x = self.norm(x)
        hidden = (*seen, x) if output_hidden_states or self.config.output_hidden_states else None
        returned: Any = cache if use_cache else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=hidden, **{_CACHE: returned})


class RWKV7ForCausalLM(RWKV7PreTrainedModel, GenerationMixin):
    """RWKV-7 with a language-modeling head. Loads checkpoints of flash-linear-attention's ``RWKV7ForCausalLM``.

    >>> from hookpoints.rwkv7 import RWKV7Config, RWKV7ForCausalLM
    >>> config = RWKV7Config(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=8)
    >>> RWKV7ForCausalLM(config)(torch.tensor([[1, 2, 3]])).logits.shape
    torch.Size([1, 3, 64])
    """

    _tied_weights_keys = {"lm_head.weight": "model.embeddings.weight"}  # noqa: RUF012 (transformers' own way)

    def __init__(self, config: RWKV7Config):
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        past_key_values: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and with ``labels`` [B,T] (shifted inside) their loss. ``logits_to_keep``: only the
        last so many positions, or those of a tensor of indices; 0 for all. The others are `RWKV7Model.forward`'s."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            cache=cache,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            past_key_values=past_key_values,
        )
        at = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, at])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        cached: Any = {_CACHE: out.get(_CACHE)}
        return CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=out.hidden_states, **cached)


def from_pth(path: str | Path, dtype: torch.dtype | None = torch.float32) -> RWKV7ForCausalLM:
    """Load an official RWKV-7 checkpoint. No code from the file is run, and it is read tensor by tensor.

    Errors and cost are those of `from_official`, and errors those of `official.stored_tensors`.
    """
    return from_official(official.stored_tensors(path, mmap=True), str(path), dtype)


def from_official(
    weights: Mapping[str, Tensor], name: str = "weights", dtype: torch.dtype | None = torch.float32
) -> RWKV7ForCausalLM:
    """The model of tensors under the names and in the orientation of the official training code (RWKV-LM, RWKV-v7).

    The shapes give the configuration. Without ``blocks.0.ln0`` the embeddings are not normalized. Token 0 ends a text,
    as in both official vocabularies. Each tensor is copied once, into ``dtype`` (None: its own).

    Args:
        weights: official name -> tensor; axes of size 1 do not count.
        name: what errors call it.

    Raises:
        UnsupportedModelError: tensors are missing, unknown or of another shape (names them); no weight was copied.
    """
    with torch.device("meta"):
        model = RWKV7ForCausalLM(official.configuration(weights, name))
    renamed = official.own_weights(dict(model.named_parameters()), weights, name, dtype)
    model.load_state_dict(renamed, assign=True)
    return model.eval()


def _zeros_at_padding(mask: Tensor | Mapping[str, Tensor] | None, x: Tensor) -> Tensor | None:
    """Zeros of a mask where x [B,T,D] has padding, or None where it has none. Some versions of transformers' generate
    make one mask for each type of layer."""
    mask = mask.get("linear_attention") if isinstance(mask, Mapping) else mask
    if mask is None:
        return None
    B, T = x.shape[:2]
    if mask.ndim != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(f"attention_mask must be [B,T] for an input of {[B, T]}, got {list(mask.shape)}")
    mask = mask[:, -T:]
    return None if bool((mask != 0).all()) else mask
