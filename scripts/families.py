"""Write docs/families.md: what each family's memory is, and how far hookpoints is from what computes it elsewhere.

    python scripts/families.py             from the rules and the errors in docs/families.json
    python scripts/families.py --measure   runs the families of transformers again before, in 10 s on a CPU

What a family is comes from its rule. Errors of flash-linear-attention's families and of RWKV-7 stay as they are in the
file (runs of 2026-11-25 and 2026-11-28). `.ci/fla` compares every family with flash-linear-attention's kernels.
"""
# pyright: reportMissingImports=false

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "scripts"), str(ROOT / "tests")]

from tables import table  # noqa: E402

from hookpoints import HookedRecurrent  # noqa: E402
from hookpoints.hooks.table import rows  # noqa: E402
from hookpoints.rules import REFUSED, REFUSED_LAYERS, RULES, Rule  # noqa: E402
from hookpoints.rules.tables import FLA_GLA  # noqa: E402

DATA, PAGE = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"
Family = dict[str, Any]
"""One model type: its rule, who defines it ("source"), sizes, decay, oracles and errors."""

TEXT = """# Families

`scripts/families.py` makes this page from the rules and from `families.json`. The errors are those of tiny random
models on a CPU. Families of transformers can be measured again (`--measure`); the other errors are of runs of
2026-11-25 and, of Gated DeltaNet-2, 2026-11-28.

```math
S_t = (\\mathrm{{diag}}(\\alpha_t) + a_t b_t^\\top)\\, S_{{t-1}} + k_t u_t^\\top,
\\qquad o_t = S_t^\\top (\\mathrm{{scale}} \\cdot q_t)
```

In Mamba-1 each entry of the state has a decay of its own, an elementwise product in place of diag(α) S.

## What each is

{rules}
A layer's state is a key-first matrix K × V for each head; the table names the two sizes as upstream's layers do.
A token reads the state after its own write; in {before} before it. Hooks of every family: {common}; {entries}
has no `hook_pattern`, since the decay of each entry of its state makes the weights of a token differ between value
channels. [What each carries](hooks/index.md).

## How far from the oracles

Two rows of 70 tokens. *Op*: every op call of the model, computed by the oracle from the same arguments, in float64; the
largest difference of reads and last states over their largest value. *Logits*: the model with hookpoints' own
recurrence in place of every op (`backend="recurrence"`), compared with the same model by the oracle (the second, where
two are named), in float32; the largest difference, and the largest logit. With the default backend and no hooks
attached it is zero, bit for bit, wherever upstream has an op for the device. *Kernels*: logits by fla's own kernels,
which need a GPU, in Triton's interpreter, chunked and step by step, in stretches from a cache and padded (of SimpleGLA,
which fla has as a layer without a model, the outputs of one call; of Gated DeltaNet-2, another such layer, a KDA model
with it). RWKV-7's chunked kernel has a larger difference
because it solves its triangular systems in float16; it differs as much from fla's own recurrent kernel. Decoding,
padding, other dtypes and edits are tested in `tests/hookpoints/model`, `tests/hookpoints/rules`,
`tests/hookpoints/rwkv7` and `tests/hookpoints/fla`.

{models}
## Refused

`UnsupportedModelError` names the reason; for a checkpoint, before its weights are read. The last rows are layers of
fla, by class, of which it has no models.

{refused}"""


def rule_of(family: Family) -> Rule:
    """The rule of a model type; fla has ops of its own, of which GLA's serves HGRN2 too."""
    rules = (*RULES, replace(FLA_GLA, name="HGRN2", sizes=("head_f_dim", "head_i_dim")))
    return next(x for x in rules if x.name == family["rule"] and x.kernel_only == (family["source"] == "fla"))


def erase(rule: Rule) -> str:
    """a b^T in symbols."""
    if not rule.erases:
        return "none" if not rule.own_erase else "−k (b∘αk)ᵀ" if rule.names.back else "its own a, b"
    return "−β k pᵀ" if rule.names.back else "−β k (αk)ᵀ" if rule.names.log_decay else "−β k kᵀ"


def distinct(values: Iterable[str]) -> str:
    """Each value once, in order."""
    return "; ".join(dict.fromkeys(values))


def rule_row(name: str, families: list[Family]) -> list[object]:
    """What a rule's families have in common."""
    rules, rank = [rule_of(family) for family in families], max(family["rank"] for family in families)
    oracles = [family[part] for part in ("op_oracle", "logits_oracle") for family in families]
    return [
        name,
        ", ".join(f"`{f['model_type']}`" + " (fla)" * (f["source"] == "fla") for f in families),
        distinct(f"`{rule.sizes[0]} × {rule.sizes[1]}`" for rule in rules),
        rank if rank == 1 else f"R, its steps ({rank} as run)",
        distinct(map(erase, rules)),
        distinct(family["decay"] for family in families),
        ", ".join(f"`{row.name}`" for row in rows("mixer") if row.factor in rules[0].hook_factors),
        distinct([*oracles, *["fla's kernels"] * any(family["kernels_error"] for family in families)]),
        ", ".join(f"{max(family[part] for family in families):.0e}" for part in ("op_error", "logits_error")),
    ]


def model_row(f: Family) -> list[object]:
    """Errors of a model type."""
    return [
        f"`{f['model_type']}`",
        f["source"],
        f["sizes"],
        distinct((f["op_oracle"], f["logits_oracle"])),
        f"{f['op_error']:.1e}",
        f"{f['logits_error']:.1e}",
        f"{f['largest_logit']:.1f}",
        f"{f['kernels_error']:.1e}" if f["kernels_error"] else "",
    ]


def page(families: list[Family]) -> str:
    """The page."""
    by_rule, by_reason = defaultdict(list), defaultdict(list)
    for family in families:
        by_rule[family["rule"]].append(family)
    for name, reason in (*sorted(REFUSED.items()), *sorted(REFUSED_LAYERS.items())):
        by_reason[reason].append(f"`{name}`")
    common = [row.name for row in rows("mixer") if row.factor is None] + [f"heads.{{h}}.{x.name}" for x in rows("head")]
    return TEXT.format(
        rules=table(
            (
                "family",
                "model types",
                "state K × V",
                "rank of a token's write",
                "erase a bᵀ",
                "decay α",
                "hooks on factors",
                "tested against",
                "largest error: op, logits",
            ),
            (rule_row(name, members) for name, members in by_rule.items()),
        ),
        before=" and ".join(dict.fromkeys(rule.name for rule in RULES if rule.read_before_write)),
        entries=" and ".join(rule.name for rule in RULES if rule.decays_entries),
        common=", ".join(f"`{name}`" for name in common),
        models=table(
            ("model type", "from", "H, K, V", "oracle", "op", "logits", "largest logit", "kernels"),
            map(model_row, families),
        ),
        refused=table(("model types, layers", "reason"), ((", ".join(n), reason) for reason, n in by_reason.items())),
    )


@torch.no_grad()
def measured(model_type: str) -> Family:
    """A family of transformers, run: each op call beside its canonical form, and logits beside the model's own."""
    from conftest import VOCAB, KeepFloat64, make_hf

    tokens = torch.randint(1, VOCAB, (2, 70), generator=torch.Generator().manual_seed(1))
    native, exact = make_hf(model_type), make_hf(model_type).double()
    native.set_experts_implementation("eager")  # torch's grouped product knows no float64
    exact.set_experts_implementation("eager")
    logits = native(tokens).logits
    with KeepFloat64():
        model = HookedRecurrent.from_hf(exact, self_check=False)
        with model.recording() as record:
            model(tokens)
        pairs = [(recorded.recurrence.scan().outputs, recorded.native.outputs) for recorded in record.values()]
    first = model.cfg.recurrent_layers[0]
    rule, r = model.attachment.mixers[first].rule, record[first].recurrence
    by_kernel = HookedRecurrent.from_hf(native, backend="recurrence")(tokens)
    return {
        "model_type": model_type,
        "source": "transformers",
        "rule": rule.name,
        "rank": rule.rank,
        "decay": f"one per {'entry' if r.rates is not None else 'key channel' if r.decays_per_channel else 'head'}",
        "sizes": f"{r.H}, {r.K}, {r.V}",
        "op_oracle": "transformers' torch op",
        "op_error": max(float((ours - op).abs().max() / op.abs().max()) for ours, op in pairs),
        "logits_oracle": "transformers' torch op",
        "logits_error": float((by_kernel - logits).abs().max()),
        "largest_logit": float(logits.abs().max()),
        "kernels_error": None,
    }


def main(arguments: list[str]) -> None:
    """Measure where that is asked for, and write the page."""
    families = json.loads(DATA.read_text(encoding="utf-8"))
    if "--measure" in arguments:
        from conftest import MAKERS

        found = [measured(name) for name in MAKERS if name != "rwkv7"]
        found += [family for family in families if family["source"] != "transformers"]
        families = sorted(found, key=lambda family: (family["source"] == "fla", family["model_type"]))
        DATA.write_text(json.dumps(families, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(families), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
