"""An adapter by which TransformerLens' bridge runs recurrent models that it does not know, with this package's hooks.

TransformerLens (3.4 and later) finds it by the entry points `transformer_lens.architectures` of pyproject.toml. It
prefers its own adapters, so only classes without one are named there; for the others there is `attach(bridge)`.
"""

from __future__ import annotations

from typing import cast

from torch import nn
from transformer_lens.model_bridge.architecture_adapter import ArchitectureAdapter
from transformer_lens.model_bridge.generalized_components import EmbeddingBridge, OpaqueBlockBridge, UnembeddingBridge
from transformer_lens.model_bridge.generalized_components.base import GeneralizedComponent
from transformers import PreTrainedModel

from hookpoints.model.attach import Attached, attach


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


class _Block(OpaqueBlockBridge):
    """A block, with its mixer's hook points if it has any."""

    def set_original_component(self, original_component: nn.Module) -> None:
        super().set_original_component(original_component)
        if (mixer := getattr(original_component.__dict__["hook_points"], "mixer", None)) is not None:
            self.mixer = mixer
