"""`writesae models`: what can be looked into. `writesae hooks`: every hook of a model, with its shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import tyro

from writesae.choices import Dtype

if TYPE_CHECKING:
    from hookpoints import HookedRecurrent


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the models on this machine, those that ship with the package first, and the model types that can be hooked.
    No weights are read, and nothing is asked of the hub. With --cost: the bytes that hooks of one model hold."""

    cost: str | None = None
    """Instead of the list, what hooks, states and memories of this model hold: a name on the hub, a folder, or one that
    ships with the package. Its configuration is read, and no weights."""
    tokens: int = 1024
    """With --cost: length of the sequence."""
    dtype: Dtype = "float32"
    """With --cost: of the weights."""

    def run(self) -> str:
        """The list, or the costs, as lines.

        Raises:
            UnknownModelError, UnsupportedModelError, InputError: no such model, one whose cost cannot be counted, or no
                tokens.
        """
        if self.cost is not None:
            return "\n".join(cost_lines(self.cost, self.tokens, self.dtype))
        from hookpoints import HookedRecurrent, HookpointsError, cached, embedded, model_types, zoo

        lines = []
        for name in (*embedded.names(), *zoo.names(), *cached()):
            try:
                told = summary(HookedRecurrent.from_pretrained(name, device="meta"))
            except (HookpointsError, OSError, ValueError) as error:
                told = f"cannot be hooked: {error}"
            lines.append(f"{name:24}  {told}")
        return "\n".join(
            [
                *lines,
                "",
                "Any checkpoint of these model types can be named, as OWNER/NAME on the hub or as a folder:",
                *(f"  {rule:20}  {', '.join(types)}" for rule, types in model_types().items()),
            ]
        )


def cost_lines(name: str, tokens: int, dtype: str) -> Iterator[str]:
    """What hooks of a model hold, of one sequence."""
    import torch

    from hookpoints import cost
    from sae_lens_writesae.files import size_text

    found = cost(name, tokens=tokens, dtype=getattr(torch, dtype))
    yield f"{name}: weights {size_text(found.weights)} in {dtype}. One sequence of {tokens} tokens holds:"
    yield f"  {size_text(found.cached):>9}  a cached run without names_filter (no matrices, no patterns)"
    yield f"  {size_text(found.state):>9}  all recurrent states, of any number of tokens"
    if found.memory is not None:
        yield f"  {size_text(found.memory):>9}  model.memory"
    yield ""
    yield f"{'hook':42}  {'hooks':>5}  {'bytes a token':>13}  {'one hook':>9}  {'all':>9}"
    for hook in found.hooks:
        sizes = f"{hook.bytes / tokens:13,.0f}  {size_text(hook.bytes):>9}  {size_text(hook.n * hook.bytes):>9}"
        yield f"{hook.name:42}  {hook.n:5}  {sizes}"


@dataclass(frozen=True, kw_only=True)
class Hooks:
    """List the hooks of a model in order of execution, with the shape of each activation. B: sequences, T: tokens. No
    weights are read."""

    model: tyro.conf.Positional[str]
    """Model on the hub, a folder, or one that ships with the package."""
    layer: int | None = None
    """Only this layer, with its hooks spelt out; by default all layers, those that are alike together."""

    def run(self) -> str:
        """The table, as lines.

        Raises:
            UnknownModelError, UnsupportedModelError: no such model, one that cannot be hooked, or no such layer.
        """
        from hookpoints import HookedRecurrent

        model = HookedRecurrent.from_pretrained(self.model, device="meta")
        return "\n".join([f"{model.cfg.model_name}: {summary(model)}", *self._lines(model)])

    def _lines(self, model: HookedRecurrent) -> Iterator[str]:
        blocks: dict[tuple[str, ...], list[int]] = {}
        for layer in range(model.cfg.n_layers) if self.layer is None else [self.layer]:
            blocks.setdefault(tuple(block_lines(model, layer)), []).append(layer)
        for lines, layers in blocks.items():
            yield f"\n{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
            yield from lines if self.layer is None else (line.replace("{l}", str(self.layer)) for line in lines)


def block_lines(model: HookedRecurrent, layer: int) -> Iterator[str]:
    """Name, shape and meaning of each hook that a layer has, and of those of the whole model."""
    from hookpoints import HOOKS

    shape = model.cfg.layers.get(layer)
    n_attention = model.cfg.attention_heads(layer)
    of_mixer = {"H": shape.H, "K": shape.K, "V": shape.V, "R": shape.R} if shape else {}
    of_attention = dict(zip("HV", model.layer_W_O(layer, "attn").shape)) if n_attention else {}
    for row in HOOKS:
        if row.full_name(layer, 0) in model.hook_dict:
            sizes = {"D": model.cfg.d_model} | (of_attention if row.scope == "attn" else of_mixer)
            axes = shape_text(row.axes_of(shape.R if shape else 1), sizes)
            yield f"  {row.full_name():42}  {axes:22}  {row.meaning}"


def shape_text(axes: str, sizes: Mapping[str, int]) -> str:
    """Axes of the hook table, with sizes for letters where they are known: `[B, T, 4, 64]`."""

    def size(axis: str) -> str:
        return str(math.prod(sizes.get(letter, 0) for letter in axis.strip("()")) or axis)

    forms = [re.findall(r"\([A-Z]+\)|[A-Z]", form) for form in axes.split(" or ")]
    return " or ".join(f"[{', '.join(map(size, form))}]" for form in forms)


def summary(model: HookedRecurrent) -> str:
    """Rule, layers, heads and sizes in one line."""
    cfg = model.cfg
    kinds = set()
    for layer in cfg.layers.values():
        rank = f", rank {layer.R}" if layer.R > 1 else ""
        heads = "1 head" if layer.H == 1 else f"{layer.H} heads"
        kinds.add(f"{layer.rule}, {heads} of {layer.K} x {layer.V}{rank}")
    return f"{'; '.join(sorted(kinds))}; recurrent layers {', '.join(map(str, cfg.recurrent_layers))} of {cfg.n_layers}"
