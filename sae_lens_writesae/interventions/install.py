"""Install a token: add writes toward it at the last tokens of a prompt; does it appear in the greedy continuation?

Source: WriteSAE (arXiv 2605.12770), the three-position install. The paper's rates are exact thirds of 300, that is, 100
units were counted three times; here the unit is an independent pair of a prompt and a target.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from hookpoints import WriteEdit
from sae_lens_writesae import statistics as stats
from sae_lens_writesae.evaluation import Claim, Evaluation, Figure, describe
from sae_lens_writesae.firings import HeadHook
from sae_lens_writesae.head_memory import HeadWrites, head_writes
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import (
    Estimate,
    check_at_least,
    checked_hook,
    column_table,
    estimate,
    token_text,
)
from sae_lens_writesae.interventions.generation import greedy_rows
from sae_lens_writesae.interventions.targets import Directions, Drawn, Stratum, draw_target, random_unit
from sae_lens_writesae.steering import Target, token_id

STRATA = (Stratum("frequent", 2, 10), Stratum("100-1000", 100, 1000), Stratum("rare", 1001, None))
SEMANTIC = "semantic"


@dataclass(frozen=True)
class InstallConfig:
    """What is installed, where, and how often."""

    pairs: int = 20
    """Prompt x target pairs in each stratum. Prompts are distinct windows of the sequences."""
    prompt_tokens: int = 24
    """Length of a prompt."""
    n_positions: int = 3
    """Consecutive positions that are written at: the last of the prompt."""
    sizes: tuple[float, ...] = (1.5, 3.0, 6.0)
    """m: norm of what is added, in norms of the native write at the same position."""
    headline: float = 3.0
    """The m of the claim; one of `sizes`."""
    new_tokens: int = 20
    """Greedy tokens in which the target is looked for."""
    semantic: tuple[Target, ...] = ()
    """Tokens or strings (each one token) that mean something to you: a stratum of their own. Empty: skipped."""
    rows_per_run: int = 128
    """Continuations at once."""
    seed: int = 0
    """Of prompts, targets and random directions."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        check_at_least(self, {"pairs": 2, "prompt_tokens": 2, "n_positions": 1, "new_tokens": 1, "rows_per_run": 1})
        object.__setattr__(self, "sizes", tuple(float(m) for m in self.sizes))
        object.__setattr__(self, "semantic", tuple(self.semantic))
        if self.headline not in self.sizes:
            raise ValueError(f"headline must be one of sizes {self.sizes}, found {self.headline}")
        if any(m <= 0 for m in self.sizes):
            raise ValueError(f"sizes are norms and positive, found {self.sizes}")
        if self.n_positions > self.prompt_tokens:
            raise ValueError(f"n_positions ({self.n_positions}) is above prompt_tokens ({self.prompt_tokens})")
        if len(self.semantic) == 1:
            raise ValueError("semantic needs at least two tokens: the other ones are the wrong targets")


class Install(Evaluation):
    """Whether installed tokens appear in 20 greedy tokens.

    Definition: at each of the last n prompt positions t the head also writes m |W_t| k_t w_T^T / |k_t|, with
    w_T = normalise(W_O^h^T W_U[T]). A hit: T is among the new tokens. Strata by the rank of T at the end of the prompt.

    Controls, on the same prompt: nothing written; a random value side of equal norm (does T appear?); a wrong target
    (does another token of the same stratum appear when T is installed?).

    Verdict of claim 10, in the stratum 100-1000 at the headline m (intervals: bootstrap over prompts' sequences):
    1. "fails": the interval of hits(installed) - hits(nothing) does not lie above 0.
    2. "explained": hits(installed) - hits(random), or - hits(wrong target), does not lie above 0.
    3. "holds" otherwise; the sentence says whether the rate comes near the paper's 100 %.
    """

    kind: ClassVar[str] = "install"
    title: ClassVar[str] = "Do installed writes put a token into the continuation?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "continuations": {
            "pair": "index of the prompt x target pair",
            "sequence": "sequence of the prompt",
            "stratum": "of the target",
            "token": "target T",
            "text": "T as text",
            "rank": "native rank of T at the end of the prompt, from 1",
            "wrong": "the wrong target: another token of the stratum, not installed",
            "condition": "nothing, target, random",
            "m": "norm of what is added in norms of the native write; 0 for nothing",
            "hit": "T is in the continuation",
            "wrong_hit": "the wrong target is",
            "first": "index of the first T among the new tokens, or -1",
            "log_prob_change": "of T at the first new token, nats; 0 for nothing",
        }
    }

    def _difference(self, stratum: str, m: float, against: str) -> Estimate:
        """hits(installed) - hits(against), paired by prompt and target."""
        table: Any = self.tables["continuations"]
        own = table[table["stratum"] == stratum].set_index("pair")
        installed = own[(own["condition"] == "target") & (own["m"] == m)]
        if against == "wrong":
            other = installed["wrong_hit"]
        else:
            rows = (own["condition"] == against) & (own["m"] == (0 if against == "nothing" else m))
            other = own[rows]["hit"].loc[installed.index]
        return estimate(installed["hit"].astype(float) - other.astype(float), installed["sequence"])

    def rate(self, stratum: str, condition: str, m: float) -> stats.Rate:
        """Share of hits, with intervals."""
        table: Any = self.tables["continuations"]
        own = table[(table["stratum"] == stratum) & (table["condition"] == condition) & (table["m"] == m)]
        return stats.success_rate(own["hit"], own["sequence"])

    @property
    def strata(self) -> list[str]:
        """Those with at least one pair."""
        return list(dict.fromkeys(self.tables["continuations"]["stratum"]))

    def claims(self) -> list[Claim]:
        """Claim 10 in the paper's stratum, then the other strata."""
        m = self.info["config"]["headline"]
        return [self._claim(s, m, 10 if s == "100-1000" else None) for s in sorted(self.strata, key=_paper_first)]

    def _claim(self, stratum: str, m: float, number: int | None) -> Claim:
        rate, nothing, random = (self.rate(stratum, c, x) for c, x in (("target", m), ("nothing", 0), ("random", m)))
        gains = {against: self._difference(stratum, m, against) for against in ("nothing", "random", "wrong")}
        same = [against for against in ("random", "wrong") if not gains[against].low > 0]
        if not gains["nothing"].low > 0:
            outcome, why = "fails", "Installing does not make the target appear more often than nothing does."
        elif same:
            names = {"random": "a random direction of the same norm", "wrong": "a token that was not installed"}
            outcome, why = "explained", f"It does no better than {' and '.join(names[s] for s in same)}."
        else:
            near = "as in the paper" if rate.rate > 0.9 else "far from the paper's 100 %"
            outcome, why = "holds", f"The target appears more often than under every control; the rate is {near}."
        table: Any = self.tables["continuations"]
        own = table[(table["stratum"] == stratum) & (table["condition"] == "target") & (table["m"] == m)]
        moved = estimate(own["log_prob_change"], own["sequence"])
        return Claim(
            number,
            f"installed writes put a token of stratum {stratum} into the continuation",
            f"{nothing.rate:.0%} to {rate.rate:.0%} [{rate.wilson.low:.0%}, {rate.wilson.high:.0%}] at m = {m:g}; "
            f"log-probability of the first token {moved} nats",
            rate.n,
            "prompt x target pairs",
            f"random direction {random.rate:.0%}, wrong target {own['wrong_hit'].mean():.0%}; "
            f"installed - nothing {gains['nothing']}",
            outcome,
            why,
        )

    def figures(self) -> list[Figure]:
        """Hits by size, one figure a stratum."""
        made = []
        sizes = self.info["config"]["sizes"]
        table: Any = self.tables["continuations"]
        for stratum in self.strata:
            rates = {c: [self.rate(stratum, c, m) for m in sizes] for c in ("target", "random")}
            own = table[(table["stratum"] == stratum) & (table["condition"] == "target")]
            wrong = own.groupby("m")["wrong_hit"].mean().loc[sizes]
            band = ([r.wilson.low for r in rates["target"]], [r.wilson.high for r in rates["target"]])
            nothing = self.rate(stratum, "nothing", 0).rate
            lines = [
                plots.Line("nothing", sizes, [nothing] * len(sizes), "muted"),
                plots.Line("random direction", sizes, [r.rate for r in rates["random"]], "soft"),
                plots.Line("wrong target", sizes, list(wrong), "rival"),
                plots.Line("installed", sizes, [r.rate for r in rates["target"]], "atom", band),
            ]
            title = f"Hits by size, stratum {stratum}, install: {self.label}"
            svg = plots.curve_figure(
                lines, "norm of what is written, in native writes", title, log_x=True, percent=True
            )
            made.append(Figure(f"Targets of initial rank: {stratum}", svg, "Continuations with the target in them."))
        return made

    def notes(self) -> list[str]:
        """What the paper did otherwise."""
        skipped = [] if SEMANTIC in self.strata else ["No semantic stratum: no tokens were given for it."]
        unit = "A pair of a prompt and a target is counted once; the paper's rates are exact thirds of 300."
        return [unit, *skipped, *super().notes()]


class _Pair(NamedTuple):
    """One prompt and its target."""

    sequence: int
    prompt: Tensor  # [P]
    stratum: str
    drawn: Drawn
    writes: HeadWrites
    logits: Tensor  # [vocab], native, after the prompt


@torch.no_grad()
def run_install(
    model: Any, sae: Any, tokens: Tensor, config: InstallConfig | None = None, progress: bool = True
) -> Install:
    """Install tokens through the head that `sae` reads (its atoms are not used) on prompts from `tokens` [N,T].

    Cost: for each pair one forward of the prompt and 1 + 2 * sizes continuations of `new_tokens`.

    Raises:
        ValueError: an SAE of another model, sequences too short, a semantic target of several tokens, too few prompts.
    """
    begin, config = time.perf_counter(), config or InstallConfig()
    hook = checked_hook(model, sae, tokens, config.prompt_tokens)
    pairs, omitted = _pairs(model, hook, tokens, config)
    directions = Directions(model, hook.layer, hook.head)
    rows, prompts, edits = [], [], []
    for n, pair in enumerate(pairs):
        rng = np.random.default_rng([config.seed, 3, n])
        target, noise = directions(pair.drawn.token), random_unit(directions(pair.drawn.token), rng)
        made: list[tuple[str, float, Sequence[WriteEdit]]] = [("nothing", 0.0, [])]
        for m in config.sizes:
            for name, value in (("target", target), ("random", noise)):
                made.append((name, m, install_edits(hook, pair.writes, value, m, config.n_positions)))
        described = {"pair": n, "sequence": pair.sequence, "stratum": pair.stratum, "token": pair.drawn.token}
        described |= {"text": token_text(model, pair.drawn.token), "rank": pair.drawn.rank, "wrong": pair.drawn.wrong}
        changes = _first_token(model, pair, [row for *_, row in made[1:]])
        for (name, m, row), change in zip(made, [0.0, *changes]):
            rows.append(described | {"condition": name, "m": m, "log_prob_change": change})
            prompts.append(pair.prompt)
            edits.append(row)
    found = greedy_rows(
        model, torch.stack(prompts), edits, config.new_tokens, batch_size=config.rows_per_run, progress=progress
    )
    for row, continuation in zip(rows, found):
        row["hit"], row["wrong_hit"] = row["token"] in continuation, row["wrong"] in continuation
        row["first"] = continuation.index(row["token"]) if row["hit"] else -1
    table = column_table(rows, Install.COLUMNS["continuations"])
    seconds = time.perf_counter() - begin
    settings = {"config": asdict(config), "omitted": omitted, "continuations_per_second": len(rows) / seconds}
    return Install(
        describe(model, sae, label=config.label, seed=config.seed, seconds=seconds, **settings),
        {"continuations": table},
    )


def install_edits(hook: HeadHook, writes: HeadWrites, value: Tensor, size: float, n_positions: int) -> list[WriteEdit]:
    """Add size |W_t| k_t value^T / |k_t| at the last `n_positions` of the prompt whose native writes are `writes`."""
    keys, values = writes.native.keys[:, 0], writes.native.values[:, 0]
    made = []
    for t in range(len(keys) - n_positions, len(keys)):
        norm = keys[t].norm() * values[t].norm()
        unit = torch.nn.functional.normalize(keys[t], dim=0)
        made.append(WriteEdit(hook.layer, hook.head, t, unit, size * norm * value.to(values)))
    return made


def _pairs(model: Any, hook: HeadHook, tokens: Tensor, config: InstallConfig) -> tuple[list[_Pair], dict[str, int]]:
    """`config.pairs` pairs of each stratum, every one with a prompt of its own, prompts dealt over sequences."""
    rng = np.random.default_rng([config.seed, 2])
    strata: list[tuple[Stratum, list[int] | None]] = [(s, None) for s in STRATA]
    if config.semantic:
        strata.append((Stratum(SEMANTIC, 1, None), [token_id(model, t) for t in config.semantic]))
    per_sequence = tokens.shape[1] // config.prompt_tokens
    windows = [
        (n, w * config.prompt_tokens) for w in rng.permutation(per_sequence) for n in rng.permutation(len(tokens))
    ]
    needed = config.pairs * len(strata)
    if len(windows) < needed:
        raise ValueError(
            f"{len(strata)} strata x {config.pairs} pairs need {needed} prompts of {config.prompt_tokens} tokens, the "
            f"text gives {len(windows)}; give more sequences, or lower pairs"
        )
    pairs: list[_Pair] = []
    omitted = {"pairs whose stratum is not in the vocabulary": 0}
    for place, (sequence, start) in enumerate(windows[:needed]):
        stratum, among = strata[place % len(strata)]
        prompt = tokens[sequence, start : start + config.prompt_tokens]
        session = model.edit_session(prompt[None])
        drawn = draw_target(model, session.logits[0, -1], stratum, rng, among)
        if drawn is None:
            omitted["pairs whose stratum is not in the vocabulary"] += 1
            continue
        writes = head_writes(session.recurrence(hook.layer), hook.head, "additive")
        pairs.append(_Pair(int(sequence), prompt, stratum.name, drawn, writes, session.logits[0, -1]))
    spread = pd.Series({n: pair.stratum for n, pair in enumerate(pairs)}, dtype=object)
    lone = [s for s, own in spread.groupby(spread) if len({pairs[n].sequence for n in own.index}) < 2]
    omitted["pairs of a stratum with prompts of one sequence only"] = int(spread.isin(lone).sum())
    pairs = [pair for pair in pairs if pair.stratum not in lone]
    if not pairs:
        raise ValueError(
            f"no stratum has tokens and two sequences: vocabulary {model.W_U.shape[1]}, {len(tokens)} sequences"
        )
    return pairs, omitted


def _first_token(model: Any, pair: _Pair, rows: list[Sequence[WriteEdit]]) -> list[float]:
    """Change of the target's log-probability at the first new token under each row of edits, nats."""
    run = model.run_with_edits(pair.prompt[None], rows)
    native = pair.logits.float().log_softmax(-1)[pair.drawn.token]
    return (run.logits[:, -1].float().log_softmax(-1)[:, pair.drawn.token] - native).tolist()


def _paper_first(stratum: str) -> int:
    return 0 if stratum == "100-1000" else 1
