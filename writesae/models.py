"""`writesae models`: what can be looked into. `writesae hooks`: every hook of a model, with its shape."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping

import pandas as pd
import torch

from hookpoints import HOOKS, HookedRecurrent, HookpointsError, cached, cost, embedded, model_types, zoo
from sae_lens_writesae.files import size_text
from writesae.flags import Hooks, Models


def list_models(flags: Models) -> str:
    """The list, or the costs, as lines.

    Raises:
        UnknownModelError, UnsupportedModelError, InputError: no such model, one whose cost cannot be counted, or no
            tokens.
    """
    if flags.cost is not None:
        return cost_table(flags.cost, flags.tokens, flags.dtype)
    lines = []
    for name in (*embedded.names(), *zoo.names(), *cached()):
        try:
            told = summary(HookedRecurrent.from_pretrained(name, device="meta"))
        except (HookpointsError, OSError, ValueError) as error:
            told = f"cannot be hooked: {error}"
        lines.append(f"{name:24}  {told}")
    lines += ["", "Any checkpoint of these model types can be named, as OWNER/NAME on the hub or as a folder:"]
    return "\n".join([*lines, *(f"  {rule:20}  {', '.join(types)}" for rule, types in model_types().items())])


def cost_table(name: str, tokens: int, dtype: str) -> str:
    """What hooks of a model hold, of one sequence."""
    costs = cost(name, tokens=tokens, dtype=getattr(torch, dtype))
    held = {
        "a cached run without names_filter (no matrices, no patterns)": costs.cached,
        "all recurrent states, of any number of tokens": costs.state,
        "model.memory": costs.memory,
    }
    lines = [f"{name}: weights {size_text(costs.weights)} in {dtype}. One sequence of {tokens} tokens holds:"]
    lines += [f"  {size_text(size):>9}  {what}" for what, size in held.items() if size is not None]
    rows = {
        hook.name: (hook.n, f"{hook.bytes / tokens:,.0f}", size_text(hook.bytes), size_text(hook.n * hook.bytes))
        for hook in costs.hooks
    }
    columns = ["hooks", "bytes a token", "one hook", "all"]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=columns)
    return "\n".join([*lines, "", table.to_string()])


def list_hooks(flags: Hooks) -> str:
    """The table, as lines: the layers that are alike together, or one layer with its hooks spelt out.

    Raises:
        UnknownModelError, UnsupportedModelError: no such model, one that cannot be hooked, or no such layer.
    """
    model = HookedRecurrent.from_pretrained(flags.model, device="meta")
    blocks: dict[tuple[str, ...], list[int]] = {}
    for layer in range(model.cfg.n_layers) if flags.layer is None else [flags.layer]:
        blocks.setdefault(tuple(block_lines(model, layer)), []).append(layer)
    table = [f"{model.cfg.model_name}: {summary(model)}"]
    for lines, layers in blocks.items():
        table.append(f"\n{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}")
        table += lines if flags.layer is None else [line.replace("{l}", str(flags.layer)) for line in lines]
    return "\n".join(table)


def block_lines(model: HookedRecurrent, layer: int) -> Iterator[str]:
    """Name, shape and meaning of each hook that a layer has, and of those of the whole model."""
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
