"""Which writes of the published reversal model hold a digit: the smallest sets whose exchange moves it.

    python scripts/reversal.py only_rwkv7.pth

The model (BlinkDL, RWKV-LM 524481d, RWKV-v8/260123_reverse_L2_only_rwkv7.pth, Apache-2.0) answers "123," with "321#".
Prints the table of docs/zoo.md, for every size of a set the best one. Minutes on one core.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, cast

import torch
import tyro
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from hookpoints import HookedRecurrent
from hookpoints.rwkv7 import from_official
from hookpoints.rwkv7.layers import RWKV7Block

_NAMES = {"e.": "emb.", "o.w": "head.w", "lno.": "ln_out."}
_NAMES |= {f"rwkv{i + 1}.": f"blocks.{i}.att." for i in (0, 1)} | {f"ffn{i + 1}.": f"blocks.{i}.ffn." for i in (0, 1)}
_NAMES |= {f"ln{i + 1}{norm}.": f"blocks.{i}.ln{n}." for i in (0, 1) for n, norm in ((1, "a"), (2, "b"))}
"""Beginnings of the names in the file -> of the official names. The file has more, of layers that are not run."""
_COMMA, _END = 10, 11
Write = tuple[int, int, int]
"""Layer, head, and tokens after the digit."""


def load(path: Path | str) -> HookedRecurrent:
    """The model of the file. Beside the official one it has biases at the output of each layer and of the model."""
    weights = torch.load(path, map_location="cpu", weights_only=True)
    names = {name: own for name in weights for own in _NAMES if name.startswith(own)}
    model = from_official({_NAMES[own] + name.removeprefix(own): weights[name] for name, own in names.items()})
    for layer, block in enumerate(model.model.layers):
        cast(RWKV7Block, block).attn.o_proj.bias = nn.Parameter(weights[f"rosa{layer + 1}.o.bias"])
    model.lm_head.bias = nn.Parameter(weights["o.bias"])
    return HookedRecurrent.from_hf(model)


def spell(digits: Tensor) -> Tensor:
    """The tokens "123,321#" [N,2T+2] of digits [N,T]."""
    ends = digits.new_tensor([[_COMMA, _END]]).expand(len(digits), 2)
    return torch.cat([digits, ends[:, :1], digits.flip(1), ends[:, 1:]], dim=1)


class Case(NamedTuple):
    """Numbers, and the same ones with one digit changed."""

    digits: Tensor
    """[N,T], no zeros."""
    changed: Tensor
    at: Tensor
    """[N] places of the changed digits, never the last: the comma's token shift reads that one past the memory."""

    @classmethod
    def draw(cls, n: int, length: int, generator: torch.Generator) -> Case:
        """n cases of numbers of ``length`` digits."""
        digits = torch.randint(1, 10, (n, length), generator=generator)
        at = torch.randint(length - 1, (n,), generator=generator)
        new = (digits[torch.arange(n), at] - 1 + torch.randint(1, 9, (n,), generator=generator)) % 9 + 1
        return cls(digits, digits.scatter(1, at[:, None], new[:, None]), at)


@torch.no_grad()
def exchange(model: HookedRecurrent, case: Case, writes: Sequence[Write]) -> tuple[float, float]:
    """Shares of changed digits that are answered, and of other digits that are right, when the model reads the numbers
    with these writes from its run on the changed ones. The answer is given as the changed number's, digit by digit."""
    rows, length = torch.arange(len(case.at)), case.digits.shape[1]
    names = [f"blocks.{layer}.mixer.hook_write" for layer in sorted({layer for layer, *_ in writes})]
    _, other = model.run_with_cache(spell(case.changed), names_filter=names)

    def replace(write: Tensor, hook: HookPoint) -> Tensor:
        write = write.clone()
        for layer, head, offset in writes:
            if layer == hook.layer():
                write[rows, case.at + offset, head] = other[str(hook.name)][rows, case.at + offset, head]
        return write

    text = torch.cat([spell(case.digits)[:, : length + 1], spell(case.changed)[:, length + 1 :]], dim=1)
    logits = model.run_with_hooks(text, fwd_hooks=[(name, replace) for name in names])
    right = (logits[:, length:-2].argmax(dim=-1) == case.changed.flip(1)).flip(1).double()
    moved = right[rows, case.at].sum()
    return moved.item() / len(rows), (right.sum() - moved).item() / (right.numel() - len(rows))


def main(path: tyro.conf.Positional[Path], n: int = 64, largest: int = 3) -> None:
    """Search the sets of writes of both layers and heads, at the digit and the two tokens after it."""
    torch.set_num_threads(1)
    model, generator = load(path), torch.Generator().manual_seed(0)
    cases = [Case.draw(n, length, generator) for length in (4, 8, 16, 32)]
    for size in range(1, largest + 1):
        found = []
        for writes in itertools.combinations(itertools.product((0, 1), (0, 1), (0, 1, 2)), size):
            found.append((*(sum(x) / len(cases) for x in zip(*(exchange(model, c, writes) for c in cases))), writes))
        for moved, kept, writes in sorted(found, key=lambda row: -min(row[:2]))[:3]:
            words = ", ".join(f"L{layer}H{head} at +{offset}" for layer, head, offset in writes)
            print(f"| {words} | {moved:.1%} | {kept:.1%} |", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
