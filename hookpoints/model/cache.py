"""TransformerLens' ActivationCache over models whose blocks differ: recurrence, attention, MLP, or several of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.utilities.components_utils import get_act_name
from transformer_lens.utilities.slice import Slice, SliceInput

from hookpoints.errors import HookpointsError, nearest
from hookpoints.hooks.guard import canonical
from hookpoints.model.norm import Norm

if TYPE_CHECKING:
    from hookpoints.model.layout import ModelLayout, Part

Labelled = tuple[Tensor, list[str]]
Key = str | tuple[str | int | None, ...]


class RecurrentCache(ActivationCache):
    """TransformerLens' cache: its names, methods and labels, on every family.

    * ``cache["z", 2]``, ``cache["read", -1]``, ``cache["heads.1.write_vec", 2]`` find the mixer's hooks. Of a block
      with attention, "q", "k", "v", "pattern" and "z" are that of its attention, where it was cached.
    * What no hook holds is computed: "scale" (of the final norm; with a layer, of "ln1" or "ln2"), "resid_mid", and
      "result" after ``compute_head_results``.
    * Norms are not folded into weights. ``apply_ln_to_stack`` does what the norm does at its scale on this run, gain
      included, so that parts times ``W_U`` add up to the logits (less the norm's bias, which RWKV models have).

    Decompositions need the hooks that they add up: those of ``run_with_cache`` without a filter, of a whole pass.
    """

    def __getitem__(self, key: Key) -> Tensor:
        if key in self.cache_dict:
            return self.cache_dict[key]
        # TransformerLens' short forms, ("result", 2) or ("q", -1, "attn"), and its older names.
        name, *place = (key,) if isinstance(key, str) else key
        if place and isinstance(place[0], int) and place[0] < 0:
            place[0] += self.model.cfg.n_layers
        full = get_act_name(cast(str, name), *cast(tuple[int, str], place))
        full = canonical(canonical(full, self.cache_dict), self.cache_dict.keys() | self.model.hook_dict.keys())
        if full in self.cache_dict:
            return self.cache_dict[full]
        # What follows from the residual stream is computed when it is asked for.
        parts = full.split(".")
        if full == "ln_final.hook_scale":
            return self._norm_at(self.model.cfg.n_layers)[1]
        if parts[0] == "blocks" and parts[-1] == "hook_resid_mid":
            return self._mid_stream(int(parts[1]))
        if parts[0] == "blocks" and parts[2:] in (["ln1", "hook_scale"], ["ln2", "hook_scale"]):
            return self._norm_at(int(parts[1]), parts[2] == "ln2")[1]
        why = (
            "was not kept: name it in names_filter"
            if full in self.model.hook_dict
            else "is no hook of this model (cache.compute_head_results() makes 'result'; to patch over layers, pass an "
            "index_df of those that have it)"
        )
        raise KeyError(f"{full} {why}; {len(self.cache_dict)} activations are cached{nearest(full, self.cache_dict)}")

    def apply_slice_to_batch_dim(self, batch_slice: Slice | SliceInput) -> RecurrentCache:
        """The cache with its batch axis sliced."""
        cut = super().apply_slice_to_batch_dim(batch_slice)
        return type(self)(cut.cache_dict, self.model, cut.has_batch_dim)

    def decompose_resid(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        mode: Literal["all", "mlp", "attn"] = "all",
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        incl_embeds: bool = True,
        return_labels: bool = False,
    ) -> Tensor | Labelled:
        """[parts,B,T,D], what adds up to the stream that enters ``layer``: "embed", and of each block "0_attn_out" (its
        recurrence, or attention), "0_mlp_out"; where both stand side by side, its recurrence as "0_mixer_out".

        Arguments are TransformerLens'. A block without an MLP has no part for it.
        """
        layer = self._layer_index(layer)
        parts = {"embed": self._entering_stream()} if incl_embeds else {}
        for at in range(layer + mlp_input):
            if mode != "mlp":
                parts |= {label: out for _, label, out, _ in self._mixer_outputs([at])}
            if mode != "attn" and at < layer and self._model_layout.blocks[at].mlps:
                parts[f"{at}_mlp_out"] = self._mlp_out(at)
        return self._stacked_parts(parts, layer, mlp_input, apply_ln, pos_slice, return_labels)

    def apply_ln_to_stack(
        self,
        residual_stack: Tensor,
        layer: int | None = None,
        mlp_input: bool = False,
        pos_slice: Slice | SliceInput = None,
        batch_slice: Slice | SliceInput = None,
        has_batch_dim: bool = True,
        recompute_ln: bool = False,
    ) -> Tensor:
        """What the norm before ``layer`` (None: the final one) makes of each part [...,D] of its input: centered where
        it is a LayerNorm, divided by its scale on this run, times its gain. Arguments are TransformerLens'.

        Raises:
            HookpointsError: the block has no norm there.
        """
        layer = self._layer_index(layer)
        batch = _slice_of(batch_slice)
        if recompute_ln and layer == self.model.cfg.n_layers:
            return super().apply_ln_to_stack(
                residual_stack, layer, mlp_input, pos_slice, batch_slice, has_batch_dim, recompute_ln
            )
        norm, scale = self._norm_at(layer, mlp_input)
        scale = _slice_of(pos_slice).apply(scale, dim=-2)
        scale = batch.apply(scale) if self.has_batch_dim else scale
        return norm.frozen(batch.apply(residual_stack, dim=1) if has_batch_dim else residual_stack, scale)

    def compute_head_results(self) -> None:
        """Put ``hook_result`` [B,T,H,D] of every layer into the cache: what each head adds to the residual stream.

        B*T*H*D numbers a layer. A norm behind the projection (OLMo's attention) is applied at its scale.
        """
        for layer, _, _, part in self._mixer_outputs(range(self.model.cfg.n_layers)):
            if part is not None:
                self._head_results(layer, part)

    def stack_head_results(
        self,
        layer: int | None = -1,
        return_labels: bool = False,
        incl_remainder: bool = False,
        pos_slice: Slice | SliceInput = None,
        apply_ln: bool = False,
    ) -> Tensor | Labelled:
        """[heads,B,T,D], what each head below ``layer`` adds to the residual stream, recurrent or attention. Labels are
        "L0H3"; attention heads of hybrids are "L0A3". Arguments are TransformerLens'."""
        layer = self._layer_index(layer)
        parts = {}
        for at, _, _, part in self._mixer_outputs(range(layer)):
            if part is not None:
                parts |= zip(
                    self._hooked_weights.head_labels(at, part), self._head_results(at, part).unbind(-2), strict=True
                )
        if incl_remainder:
            parts["remainder"] = (self["resid_post", layer - 1] if layer else self._entering_stream()) - sum(
                parts.values()
            )
        return self._stacked_parts(parts, layer, False, apply_ln, pos_slice, return_labels)

    def get_full_resid_decomposition(
        self,
        layer: int | None = None,
        mlp_input: bool = False,
        expand_neurons: bool = False,
        apply_ln: bool = False,
        pos_slice: Slice | SliceInput = None,
        return_labels: bool = False,
        project_output_onto: Tensor | None = None,
    ) -> Tensor | Labelled:
        """[parts,B,T,D]: every head, every MLP, "embed", and "bias", what mixers add besides their heads' results (zero
        but for rounding where projections have no bias). Attention whose heads are unknown is one part.

        Args:
            expand_neurons: must be False; in TransformerLens it is True by default.
            project_output_onto: [D] or [D,N], by which each part is multiplied.
        """
        if expand_neurons:
            raise HookpointsError("expand_neurons: no hook holds the neurons of an MLP; mlp_out is its whole output")
        layer = self._layer_index(layer)
        heads, labels = cast(Labelled, self.stack_head_results(layer + mlp_input, return_labels=True))
        parts = dict(zip(labels, heads, strict=True))
        bias = torch.zeros_like(self._entering_stream())
        for at, label, out, part in self._mixer_outputs(range(layer + mlp_input)):
            if part is None:
                parts[label] = out
            else:
                bias = bias + (out - self._head_results(at, part).sum(-2))
        rest, rest_labels = cast(Labelled, self.decompose_resid(layer, mode="mlp", return_labels=True))
        parts |= zip(rest_labels, rest, strict=True)
        parts |= {"embed": parts.pop("embed"), "bias": bias}  # after the MLPs, as in TransformerLens
        return self._stacked_parts(parts, layer, mlp_input, apply_ln, pos_slice, return_labels, project_output_onto)

    # -- parts

    @property
    def _model_layout(self) -> ModelLayout:
        if hasattr(self.model, "bridge"):
            raise HookpointsError("parts of the stream are for bridge.run_with_cache: attached, MLPs have no hook here")
        return cast("ModelLayout", self.model.attachment.layout)

    @property
    def _hooked_weights(self) -> Any:
        """The model, whose ``Weights`` know its heads; typed so, they would import the class that makes this cache."""
        return self.model

    def _layer_index(self, layer: int | None) -> int:
        if layer is None or layer == -1:
            return self.model.cfg.n_layers
        return layer

    def _stacked_parts(
        self,
        parts: Mapping[str, Tensor],
        layer: int,
        mlp_input: bool,
        apply_ln: bool,
        pos_slice: Slice | SliceInput,
        return_labels: bool,
        onto: Tensor | None = None,
    ) -> Tensor | Labelled:
        """Parts by label as one tensor, as the arguments ask for it."""
        cut = _slice_of(pos_slice)
        alike = list(parts.values()) or [self._entering_stream()]  # no parts: an empty stack of the right shape
        stack = torch.stack([cut.apply(part, dim=-2) for part in alike])[: len(parts)]
        if apply_ln:
            stack = self.apply_ln_to_stack(stack, layer, mlp_input, pos_slice, has_batch_dim=self.has_batch_dim)
        if onto is not None:
            stack = stack @ onto
        return (stack, list(parts)) if return_labels else stack

    def _entering_stream(self, layer: int = 0) -> Tensor:
        """What a block adds to; of the first one with the norm that it puts on the embeddings."""
        entering = self["resid_pre", layer]
        module = self._model_layout.embedding_norm
        if layer or module is None:
            return entering
        norm = Norm.of(module)
        return norm.frozen(entering, norm.scale(entering)) + norm.bias

    def _mixer_outputs(self, layers: Iterable[int]) -> Iterator[tuple[int, str, Tensor, Part | None]]:
        """What the token mixers of blocks add: layer, label ("1_attn_out", as in TransformerLens; "1_mixer_out" for a
        recurrence and attention), output, and whose heads these are (None for attention of unknown heads)."""
        for layer in layers:
            block = self._model_layout.blocks[layer]
            if block.mixer_out is not None and block.attn_out is not block.mixer_out:
                yield layer, f"{layer}_mixer_out", self["mixer_out", layer], "mixer"
            if block.attn_out is not None:
                known: Part | None = None if block.attn_heads is None else "attn"
                part: Part | None = "mixer" if block.attn_out is block.mixer_out else known
                yield layer, f"{layer}_attn_out", self["attn_out", layer], part

    def _mid_stream(self, layer: int) -> Tensor:
        return self._entering_stream(layer) + sum(out for _, _, out, _ in self._mixer_outputs([layer]))

    def _mlp_out(self, layer: int) -> Tensor:
        several = self._model_layout.blocks[layer].mlp_out is None  # which have no hook
        if several:
            return self["resid_post", layer] - self._mid_stream(layer)
        return self["mlp_out", layer]

    def _head_results(self, layer: int, part: Part) -> Tensor:
        key = f"blocks.{layer}.{part}.hook_result"
        if key not in self.cache_dict:
            heads = self._hooked_weights.head_outputs(layer, part)
            z = self[f"blocks.{layer}.{part}.hook_z"]
            results = torch.einsum("...hv,hvd->...hd", z, self._hooked_weights.layer_W_O(layer, part))
            if heads.norm is not None:
                norm = Norm.of(heads.norm)
                bias = getattr(heads.projection, "bias", None)
                total = results.sum(-2) if bias is None else results.sum(-2) + bias
                results = norm.frozen(results, norm.scale(total).unsqueeze(-2)) * heads.added.scale
            self.cache_dict[key] = results
        return self.cache_dict[key]

    def _norm_at(self, layer: int, mlp: bool = False) -> tuple[Norm, Tensor]:
        """A norm, and its scale [B,T,1] on the run."""
        is_final = layer == self.model.cfg.n_layers
        module = self._model_layout.final_norm if is_final else self._model_layout.blocks[layer].norm(mlp=mlp)
        if module is None:
            raise HookpointsError(
                f"block {layer} has no norm before its {'MLP' if mlp else 'mixer'}; the final norm is "
                "that of layer=None"
            )
        norm = Norm.of(module)
        if is_final:
            entering = self["resid_post", layer - 1]
        else:
            entering = self._mid_stream(layer) if mlp else self._entering_stream(layer)
        return norm, norm.scale(entering)


def _slice_of(where: Slice | SliceInput) -> Slice:
    return where if isinstance(where, Slice) else Slice(where)
