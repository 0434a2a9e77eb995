"""Write docs/families.md: what each family's memory is, and how far hookpoints is from what computes it elsewhere.

    python scripts/families.py             from the rules and the errors in docs/families.json
    python scripts/families.py --measure   runs the families of transformers again before, in 10 s on a CPU

What a family is comes from its rule. Errors of flash-linear-attention's families and of RWKV-7 stay as they are in the
file: a run of 2026-11-25 took them. `.ci/fla` compares every family with flash-linear-attention's kernels.
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
from hookpoints.rules import REFUSED, REFUSED_LAYERS, RULES, RWKV7, Rule  # noqa: E402
from hookpoints.rules.tables import FLA_GLA  # noqa: E402

DATA, PAGE = ROOT / "docs" / "families.json", ROOT / "docs" / "families.md"
Family = dict[str, Any]
"""One model type: its rule, who defines it ("source"), sizes, decay, oracles and errors."""

TEXT = """# Families

`scripts/families.py` makes this page from the rules and from `families.json`. The errors are those of tiny random
models on a CPU. Families of transformers can be measured again (`--measure`); the other errors are of a run of
2026-11-25.

```math
S_t = (\\mathrm{{diag}}(\\alpha_t) + a_t b_t^\\top)\\, S_{{t-1}} + k_t u_t^\\top,
\\qquad o_t = S_t^\\top (\\mathrm{{scale}} \\cdot q_t)
```

## What each is

{rules}
A layer's state is a key-first matrix K × V for each head; the table names the two sizes as upstream's layers do.
A token reads the state after its own write; in {before} before it. Hooks of every family: {common}.
[What each carries](hooks/index.md).

## How far from the oracles

Two rows of 70 tokens. *Op*: every op call of the model, computed by the oracle from the same arguments, in float64; the
largest difference of reads and last states over their largest value. *Logits*: the model with hookpoints' own
recurrence in place of every op (`backend="recurrence"`), compared with the same model by the oracle (the second, where
two are named), in float32; the largest difference, and the largest logit. With the default backend and no hooks
attached it is zero, bit for bit, wherever upstream has an op for the device. *Kernels*: logits by fla's own kernels,
which need a GPU, in Triton's interpreter, chunked and step by step, in stretches from a cache and padded (of SimpleGLA,
which fla has as a layer without a model, the outputs of one call). RWKV-7's chunked kernel has a larger difference
because it solves its triangular systems in float16; it differs as much from fla's own recurrent kernel. Decoding,
padding, other dtypes and edits are tested in `tests/hookpoints/model`, `tests/hookpoints/rules`,
`tests/hookpoints/rwkv7` and `tests/hookpoints/fla`.

{models}
## Refused

`UnsupportedModelError` names the reason; for a checkpoint, before its weights are read. The last rows are layers of
fla, by class, of which it has no models.

{refused}"""

RULE_HEAD = ("family", "model types", "state K × V", "rank of a token's write", "erase a bᵀ", "decay α")
RULE_HEAD += ("hooks on factors", "tested against", "largest error: op, logits")
MODEL_HEAD = ("model type", "from", "H, K, V", "oracle", "op", "logits", "largest logit", "kernels")


def rule_of(family: Family) -> Rule:
    """The rule of a model type; fla has ops of its own, of which GLA's serves HGRN2 too."""
    is_fla = family["source"] == "fla"
    hgrn2 = replace(FLA_GLA, name="HGRN2", sizes=("head_f_dim", "head_i_dim"))
    return next(rule for rule in (*RULES, hgrn2) if rule.name == family["rule"] and rule.kernel_only == is_fla)


def erase(rule: Rule) -> str:
    """a b^T in symbols."""
    if not rule.erases:
        return "its own a, b" if isinstance(rule, type(RWKV7)) else "none"
    return "−β k pᵀ" if rule.names.back else "−β k (αk)ᵀ" if rule.names.log_decay else "−β k kᵀ"


def distinct(values: Iterable[str]) -> str:
    """Each value once, in order."""
    return "; ".join(dict.fromkeys(values))


def rule_row(name: str, families: list[Family]) -> list[object]:
    """What a rule's families have in common."""
    rules, rank = [rule_of(family) for family in families], max(family["rank"] for family in families)
    oracles = [family[part] for family in families for part in ("op_oracle", "logits_oracle")]
    oracles += ["fla's kernels"] * any(family["kernels_error"] for family in families)
    return [
        name,
        ", ".join(f"`{f['model_type']}`" + " (fla)" * (f["source"] == "fla") for f in families),
        distinct(f"`{rule.sizes[0]} × {rule.sizes[1]}`" for rule in rules),
        rank if rank == 1 else f"R, its steps ({rank} as run)",
        distinct(map(erase, rules)),
        distinct(family["decay"] for family in families),
        ", ".join(f"`{row.name}`" for row in rows("mixer") if row.factor in rules[0].factor_names),
        distinct(oracles),
        ", ".join(f"{max(family[part] for family in families):.0e}" for part in ("op_error", "logits_error")),
    ]


def model_row(f: Family) -> list[object]:
    """Errors of a model type."""
    errors = [f"{f['op_error']:.1e}", f"{f['logits_error']:.1e}", f"{f['largest_logit']:.1f}"]
    kernels = f"{f['kernels_error']:.1e}" if f["kernels_error"] else ""
    oracles = distinct((f["op_oracle"], f["logits_oracle"]))
    return [f"`{f['model_type']}`", f["source"], f["sizes"], oracles, *errors, kernels]


def page(families: list[Family]) -> str:
    """The page."""
    by_rule, by_reason = defaultdict(list), defaultdict(list)
    for family in families:
        by_rule[family["rule"]].append(family)
    for name, reason in (*sorted(REFUSED.items()), *sorted(REFUSED_LAYERS.items())):
        by_reason[reason].append(f"`{name}`")
    common = [row.name for row in rows("mixer") if row.factor is None]
    common += [f"heads.{{h}}.{row.name}" for row in rows("head")]
    return TEXT.format(
        rules=table(RULE_HEAD, (rule_row(name, members) for name, members in by_rule.items())),
        before=" and ".join(dict.fromkeys(rule.name for rule in RULES if rule.read_before_write)),
        common=", ".join(f"`{name}`" for name in common),
        models=table(MODEL_HEAD, map(model_row, families)),
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
    logits, op_error = native(tokens).logits, 0.0
    with KeepFloat64():
        model = HookedRecurrent.from_hf(exact, self_check=False)
        with model.recording() as record:
            model(tokens)
        for recurrence, (outputs, _) in record.values():
            op_error = max(op_error, float((recurrence.scan().outputs - outputs).abs().max() / outputs.abs().max()))
    first = model.cfg.recurrent_layers[0]
    rule, r = model.attachment.mixers[first].rule, record[first].recurrence
    error = HookedRecurrent.from_hf(native, backend="recurrence")(tokens) - logits
    return {
        "model_type": model_type,
        "source": "transformers",
        "rule": rule.name,
        "rank": rule.rank,
        "decay": "one per key channel" if r.decays_per_channel else "one per head",
        "sizes": f"{r.H}, {r.K}, {r.V}",
        "op_oracle": "transformers' torch op",
        "op_error": op_error,
        "logits_oracle": "transformers' torch op",
        "logits_error": float(error.abs().max()),
        "largest_logit": float(logits.abs().max()),
        "kernels_error": None,
    }


def main(arguments: list[str]) -> None:
    """Measure where that is asked for, and write the page."""
    families = json.loads(DATA.read_text(encoding="utf-8"))
    if "--measure" in arguments:
        from conftest import MAKERS

        kept = [family for family in families if family["source"] != "transformers"]
        families = sorted(
            kept + [measured(name) for name in MAKERS if name != "rwkv7"],
            key=lambda family: (family["source"] == "fla", family["model_type"]),
        )
        DATA.write_text(json.dumps(families, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(families), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
