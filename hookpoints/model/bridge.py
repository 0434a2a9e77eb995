"""An adapter by which TransformerLens' bridge runs recurrent models that it does not know, with this package's hooks.

TransformerLens (3.4 and later) finds it by the entry points `transformer_lens.architectures` of pyproject.toml. It
prefers its own adapters, so only classes without one are named there; for the others there is `attach(bridge)`, and
`as_bridge`, which makes a bridge with this adapter of any hooked model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

from torch import Tensor, nn
from transformer_lens.config import TransformerBridgeConfig
from transformer_lens.factories.architecture_adapter_factory import ArchitectureAdapterFactory
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, OpaqueBlockBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
from transformers import PreTrainedModel

from hookpoints.errors import UnsupportedModelError
from hookpoints.model.attach import Attached, attach
from hookpoints.model.weights import logit_scale

if TYPE_CHECKING:
    from hookpoints.model.recurrent import HookedRecurrent

_ARCHITECTURE = "HookedRecurrent"
"""What TransformerLens calls a model that is run by the adapter below, whatever its class."""


class RecurrentAdapter(ArchitectureAdapter):
    """Every class of transformers that `attach` takes and whose blocks form one chain. The bridge has the hooks of
    recurrent mixers under their names here (`blocks.1.mixer.hook_write`), and the ends of embedding, blocks and norm.

    `bridge.adapter.hooked` is the attachment, for `edits` and `recurrence`. Raises what `attach` raises.
    """

    hooked: Attached
    applicable_phases: list[int] = []  # noqa: RUF012 (TransformerLens' own way)
    supports_kv_cache = False  # generation reads the whole text at each token: exact for every class

    def prepare_model(self, hf_model: PreTrainedModel) -> None:
        """Put hook points on the model, and name its parts for the bridge."""
        super().prepare_model(hf_model)
        self.hooked = attach(hf_model)
        layout = self.hooked.attachment.layout
        names = {module: name for name, module in hf_model.named_modules()}
        for block, hooks in zip(layout.blocks, cast(nn.ModuleList, self.hooked.blocks)):
            block.block.__dict__["hook_points"] = hooks  # past nn.Module, which would register a part of the model
        self.weight_processing_conversions = {}
        self.component_mapping = {
            "embed": EmbeddingBridge(name=names[layout.embed]),
            "blocks": _Block(name=names[layout.blocks[0].block].rpartition(".")[0]),
            "ln_final": GeneralizedComponent(name=names[layout.final_norm], config=self.cfg),
            "unembed": UnembeddingBridge(name=names[hf_model.get_output_embeddings()]),
        }

    def apply_output_logits_transform(self, logits: Tensor) -> Tensor:
        """The model's own multiplier of the logits (Granite's, Falcon-H1's), for lenses."""
        return logits * logit_scale(self.hooked.hf_model)


ArchitectureAdapterFactory.register_adapter(_ARCHITECTURE, RecurrentAdapter)


def as_bridge(model: HookedRecurrent) -> TransformerBridge:
    """A ``TransformerBridge`` of TransformerLens over the same weights, for its tools that take nothing else.

        >>> from hookpoints import HookedRecurrent, as_bridge
        >>> from transformer_lens.tools.analysis import JacobianLens
        >>> model = HookedRecurrent.from_pretrained("embedded")
        >>> lens = JacobianLens.fit(as_bridge(model), ["The people of the ..."], corpus="mine")

    Its modules are copies that share every parameter, so the model stays as it is. The model's hooks and edits do not
    act in it; those of `bridge.adapter.hooked` do. Cost: a self-check, and no copy of a weight.

    Raises:
        UnsupportedModelError: the model has several residual streams side by side.
    """
    cfg = model.cfg
    if not model.attachment.layout.is_chain:
        raise UnsupportedModelError(
            f"as_bridge: expected blocks along one residual stream [B,T,D], got {cfg.model_name}, which has several"
        )
    # The copy of the modules has the same weights: deepcopy takes these as copied already.
    weights: dict[int, object] = {id(x): x for x in (*model.hf_model.parameters(), *model.hf_model.buffers())}
    theirs = TransformerBridgeConfig(
        d_model=cfg.d_model,
        d_head=cfg.d_head,
        n_layers=cfg.n_layers,
        n_ctx=cfg.n_ctx,
        n_heads=cfg.n_heads,
        d_vocab=cfg.d_vocab,
        architecture=_ARCHITECTURE,
        model_name=cfg.model_name,
    )
    return build_bridge_from_module(
        copy.deepcopy(model.hf_model, weights),
        _ARCHITECTURE,
        tl_config=theirs,
        tokenizer=copy.deepcopy(model.tokenizer),
    )


class _Block(OpaqueBlockBridge):
    """A block, with its mixer's hook points if it has any."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        if (mixer := getattr(original_component.__dict__["hook_points"], "mixer", None)) is not None:
            # Past TransformerLens, which would set what the block calls so (Mamba's).
            self._modules["mixer"] = mixer
