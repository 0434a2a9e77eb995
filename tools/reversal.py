"""Which writes of the published reversal model hold a digit: the smallest sets whose exchange moves it.

    python tools/reversal.py only_rwkv7.pth

The model (BlinkDL, RWKV-LM 524481d, RWKV-v8/260123_reverse_L2_only_rwkv7.pth, Apache-2.0) answers "123," with "321#".
Prints the table of docs/zoo.md, for every size of a set the best one. Minutes on one core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
import tyro
from torch import Tensor, nn
from torch.nn.functional import pad

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints.rwkv7 import from_official
from hookpoints.rwkv7.layers import RWKV7Block

_NAMES = {
    **{"e.": "emb.", "o.w": "head.w", "lno.": "ln_out."},
    **{f"rwkv{i + 1}.": f"blocks.{i}.att." for i in (0, 1)},
    **{f"ffn{i + 1}.": f"blocks.{i}.ffn." for i in (0, 1)},
    **{f"ln{i + 1}{norm}.": f"blocks.{i}.ln{n}." for i in (0, 1) for n, norm in ((1, "a"), (2, "b"))},
}
"""Beginnings of the names in the file -> of the official names. The file has more, of layers that are not run."""
_COMMA, _END = 10, 11
Write = tuple[int, int, int]
"""Layer, head, and tokens after the digit."""


def load(path: Path | str) -> HookedRecurrent:
    """The model of the file. The official one lacks biases at the output of each layer and of the model."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    named = {_NAMES[a] + name.removeprefix(a): x for name, x in weights.items() for a in _NAMES if name.startswith(a)}
    model = from_official(named)
    for layer, block in enumerate(model.model.layers):
        cast(RWKV7Block, block).attn.o_proj.bias = nn.Parameter(weights[f"rosa{layer + 1}.o.bias"])
    model.lm_head.bias = nn.Parameter(weights["o.bias"])
    return HookedRecurrent.from_hf(model)


def spell(digits: Tensor) -> Tensor:
    """The tokens "123,321#" [N,2T+2] of digits [N,T]."""
    return torch.cat([pad(digits, (0, 1), value=_COMMA), pad(digits.flip(1), (0, 1), value=_END)], dim=1)


def draw(n: int, length: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers [N,T] without zeros, the same with one digit changed, and its place [N]; never the last, which the
    comma's token shift reads past the memory."""
    digits, at = (
        torch.randint(1, 10, (n, length), generator=generator),
        torch.randint(length - 1, (n,), generator=generator),
    )
    new = (digits[torch.arange(n), at] - 1 + torch.randint(1, 9, (n,), generator=generator)) % 9 + 1
    return digits, digits.scatter(1, at[:, None], new[:, None]), at


@torch.no_grad()
def exchange(
    model: HookedRecurrent, digits: Tensor, changed: Tensor, at: Tensor, writes: Sequence[Write]
) -> tuple[float, float]:
    """Shares of changed digits that are answered, and of other digits that are right, when the model reads the numbers
    with these writes from its run on the changed ones. The answer is given as the changed number's, digit by digit."""
    other = {layer: model.recurrence(spell(changed), layer) for layer in {layer for layer, *_ in writes}}
    edits = [
        [WriteEdit(i, h, t + o, other[i].k[row, t + o, h], other[i].u[row, t + o, h], "replace") for i, h, o in writes]
        for row, t in enumerate(at.tolist())
    ]
    length = digits.shape[1]
    with model.edits(edit_rows=edits):
        logits = model(torch.cat([spell(digits)[:, : length + 1], spell(changed)[:, length + 1 :]], dim=1))
    right = (logits[:, length:-2].argmax(dim=-1) == changed.flip(1)).flip(1).double()
    moved = right.gather(1, at[:, None]).sum()
    return moved.item() / len(at), (right.sum() - moved).item() / (right.numel() - len(at))


def main(path: tyro.conf.Positional[Path], n: int = 64, largest: int = 3) -> None:
    """Search the sets of writes of both layers and heads, at the digit and the two tokens after it."""
    torch.set_num_threads(1)
    model, generator = load(path), torch.Generator().manual_seed(0)
    cases = [draw(n, length, generator) for length in (4, 8, 16, 32)]
    for size in range(1, largest + 1):
        found = (
            (*(sum(x) / len(cases) for x in zip(*(exchange(model, *c, writes) for c in cases))), writes)
            for writes in itertools.combinations(itertools.product((0, 1), (0, 1), (0, 1, 2)), size)
        )
        for moved, kept, writes in sorted(found, key=lambda row: -min(row[:2]))[:3]:
            print(
                "|", *(f"L{layer}H{head} +{offset}" for layer, head, offset in writes), f"| {moved:.1%} | {kept:.1%} |"
            )


if __name__ == "__main__":
    tyro.cli(main)
