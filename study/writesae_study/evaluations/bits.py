"""Codes of a head's writes at equal bits: dictionaries, quantizers and components, and what each recovers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Annotated, ClassVar, cast

import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.metric import Metric
from sae_lens_writesae.sae.rows import row_orders
from writesae.choices import AtLeast
from writesae.dictionary.estimates import Estimate
from writesae.head.upper import UpperModel
from writesae.head.writes import head_writes
from writesae.page.format import percent
from writesae_study.codes.books import Code, descend
from writesae_study.codes.equal_bits import NULL, OURS, RIVAL, HeadWrites, codes
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.evaluation import Evaluation, Result, Scope, described
from writesae_study.experiment.terms import Terms, require_equal
from writesae_study.verdict import statistics as stats
from writesae_study.verdict.finding import Against, Claim, EffectSize, Finding, Paired

WAYS = ("squared errors", "the metric", "tuned")
"""How codes are fitted; what is tuned was fitted in the metric before."""
WHITENED = "whitened"
"""The way that is measured if `Bits.whitened` asks for it."""
RIDGE = 0.03
"""Share of the mean eigenvalue that is added to second moments of writes before they are inverted."""
METRIC = 64
"""Sequences that the metric is fitted to."""
RELEVANT = 0.01
"""Difference of two typical shares from which on it matters."""


@dataclass(frozen=True, kw_only=True)
class Bits(Evaluation):
    """A write k u^T is replaced by a code: which atoms (log2 of the number of choices), and a coefficient of 8 bits for
    each. Bits are counted; coefficients are not rounded. All writes of the head are replaced at once on text that
    nothing was fitted to. The **typical share** is the median over sequences of 1 - KL / KL(deletion).

    Every code is fitted to the same writes, on squared errors and in the metric of the model's KL divergence: to all of
    `reference`, or where there is none to those of the first half of the sequences. Each gets the bias with which it is
    right on average. One dictionary and its rival are then **tuned** on the KL divergence itself, with equal steps:
    atoms, encoder and bias, with gradients through coefficients.

    * **WriteSAE TopK n** (`writesae_topk`) has an encoder and n active atoms; **WriteSAE pursuit n**
      (`writesae_matching_pursuit`) takes n atoms one after the other, each from what is left, and starts from a
      quantizer of as many codes.
    * A **residual quantizer n** takes n steps too, with a book of 256 codes for each, fitted stage by stage; n = 1 is a
      vector quantizer. A **product quantizer** codes key and value apart. Coefficients of quantizers have either sign,
      those of atoms are at least 0, as in SAELens.
    * **Components** are the first principal ones of writes, or the first singular vectors of keys and of values.
    * Nulls: atoms that nothing was fitted to, and the code of another write.

    A budget is 16 bits an atom. Dictionaries have as many atoms as it pays for: 256 at 16 bits, 361 at 32. Products and
    components stay below the budget where no size meets it.

    **Verdict**, for each budget and way to fit: the ladder of `judge` on the typical share of the dictionary, which
    is pursuit, or TopK where one atom is active. The controls are every other code and the nulls. A share of 1 point
    matters. A claim of the method takes heads as units: the ladder on its lead over the residual quantizer, against its
    leads over the others.
    """

    budgets: tuple[int, ...] = (16, 32)
    """Bits of a write: 16 for each atom with its coefficient."""
    steps: int = 2000
    """Steps of 128 writes for dictionaries."""
    tune_steps: Annotated[int, AtLeast(0)] = 100
    """Steps of four sequences on the model's KL divergence."""
    lr: float = 2e-3
    """Learning rate of these."""
    whitened: bool = False
    """Fit codes in whitened coordinates too: with writes whose keys and values have second moments of 1."""

    question: ClassVar[str] = "What is a code of a write worth at equal bits?"
    scope: ClassVar[Scope] = Scope.HEAD
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "codes": described(
            "sequence",
            budget="bits that a write may have; 0 for native and delete",
            way="how the code is fitted: " + ", ".join((*WAYS, WHITENED)),
            code="what replaces all writes; native and delete too",
            bits="bits that it needs",
            parameters="numbers that are trained",
            kl="nats a token, KL(native || replaced)",
        )
    }

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {"budgets": (all(n % 16 == 0 for n in self.budgets), "multiples of 16")}

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        _, layer, head, _ = lab.hook
        split = len(lab.tokens) // 2 if lab.reference is None else 0
        terms = lab.reference or Terms(lab.model, lab.tokens[:split])
        lab.facts["terms"] = terms.facts()
        texts = []
        for tokens in lab.tokens[split:].split(8):
            upper = UpperModel.of(lab.model, [layer], tokens)[layer]
            texts.append((upper, upper().log_softmax(-1)))
        rows = list[tuple[object, ...]]()

        def measured(code: Code, budget: int = 0, way: str = "") -> None:
            kl = torch.cat([divergence(upper, plain, head, code) for upper, plain in texts])
            parameters = sum(parameter.numel() for parameter in code.parameters)
            for sequence, nats in enumerate(kl.tolist()):
                rows.append((sequence, budget, way, code.name, code.bits, parameters, nats))

        def loss(code: Code, numbers: Tensor) -> Tensor:
            with torch.no_grad():
                upper = UpperModel.of(lab.model, [layer], terms.tokens[numbers])[layer]
                plain = upper().log_softmax(-1)
            return 100 * divergence(upper, plain, head, code).mean()

        measured(Code("native", 0.0, LowRank.dense, []))
        measured(Code("delete", 0.0, lambda native: 0 * native.dense(), []))
        squared_errors, in_metric, tuned = WAYS
        fitted_metric = terms.metric(layer, head, min(METRIC, len(terms.tokens)))
        writes = terms.writes(layer, head)
        metrics = {squared_errors: None, in_metric: fitted_metric}
        if self.whitened:
            metrics[WHITENED] = whitening(writes)
        for way, metric in metrics.items():
            for budget, code in self.codes(lab, writes, metric):
                measured(code, budget, way)
                compared = code.name in (contender(budget), f"{RIVAL} {budget // 16}")
                if way == in_metric and self.tune_steps and compared:
                    batches = row_orders(len(terms.tokens), 4, self.seed)
                    descend(code.parameters, partial(loss, code), batches, self.tune_steps, self.lr)
                    measured(code, budget, tuned)
        return {"codes": pd.DataFrame(rows, columns=list(self.columns["codes"]))}

    def codes(self, lab: Bench, writes: LowRank, metric: Metric | None) -> Iterator[tuple[int, Code]]:
        """Budget and code, for every budget."""
        most = max(self.budgets) // 16
        fitted = HeadWrites(lab.model, lab.hook[1:3], writes, metric, most=most, steps=self.steps, seed=self.seed)
        for budget in self.budgets:
            for code in codes(fitted, budget):
                yield budget, code

    # -- judging

    @property
    def ways(self) -> tuple[str, ...]:
        """How codes were fitted, in the order of the claims."""
        return (*WAYS[: 3 if self.tune_steps else 2], *((WHITENED,) if self.whitened else ()))

    def paired(self, result: Result, budget: int, way: str) -> tuple[Paired, list[str]]:
        """Sequences by code, of one budget and way to fit; and the names of codes, the dictionary first."""
        table = result.tables["codes"]
        is_bound = table["budget"] == 0  # native and delete
        of_budget = (table["budget"] == budget) & (table["way"] == way)
        ours = contender(budget)
        others = sorted({*table.loc[of_budget, "code"]} - {ours})
        return Paired.of(table[of_budget | is_bound], "kl", by="code"), [ours, *others]

    def findings(self, result: Result) -> list[Finding]:
        """The dictionary of each budget and way to fit, compared with every other code."""
        findings = []
        for way, budget in product(self.ways, self.budgets):
            kl, (ours, *others) = self.paired(result, budget, way)
            share = kl.recovered(ours)
            rivals = {name: kl.recovered(name) for name in others}
            strongest_first = sorted(rivals.items(), key=lambda rival: -rival[1].mean)
            leads = {name: kl.recovered(ours, than=name) for name in others}
            shown = {ours: share} | dict(strongest_first)
            findings.append(claimed(f"{ours} of {budget} bits ({way})", share, leads, shown, result))
        return findings

    @classmethod
    def across(cls, results: list[Result]) -> list[tuple[str, Claim]]:
        """Leads of the dictionary over the other codes, with heads as units.

        Raises:
            TermsError: results of different settings, or of other numbers of writes or sequences.
        """
        heads = [f"{result.info['model']} {result.info['hook_name']}" for result in results]
        if len(set(heads)) < 2:
            return []
        terms = []
        for result in results:
            settings = result.evaluation.to_dict() | {"seed": 0, "label": ""}  # these may differ
            size = {name: result.info[name] for name in ("n_sequences", "n_positions")}
            terms.append(settings | size)
        require_equal(terms)
        test = cast(Bits, results[0].evaluation)
        claims = []
        for way, budget in product(test.ways, test.budgets):
            tables = [test.paired(result, budget, way) for result in results]
            ours, *others = tables[0][1]
            n = sum(len(kl.wide) for kl, _ in tables)
            leads = dict[str, Estimate]()
            for name in others:
                of_heads = [kl.recovered(ours, than=name).mean for kl, _ in tables]
                lead = stats.estimate(of_heads, heads)
                leads[f"more than {name}"] = lead._replace(n=n)
            rival = f"more than {RIVAL} {budget // 16}"
            closest_first = sorted(leads.items(), key=lambda lead: (lead[0] != rival, lead[1].mean))
            shown = dict(closest_first)
            finding = claimed(f"{ours} of {budget} bits ({way}), over heads", leads[rival], leads, shown, None)
            claims.append((f"{len(set(heads))} heads", finding.row()))
        return claims


def contender(budget: int) -> str:
    """The dictionary that a budget is claimed for."""
    return f"{OURS} pursuit {budget // 16}" if budget > 16 else f"{OURS} TopK 1"


def claimed(
    what: str, effect: Estimate, leads: Mapping[str, Estimate], shown: Mapping[str, Estimate], result: Result | None
) -> Finding:
    """That a code recovers more than others; `result`: of one head."""
    size: EffectSize | None = None
    if result is not None:
        size = Paired.of(result.tables["codes"], "kl", by="code").size_of("delete")
    return Finding(
        claim=f"{what} recovers more than other codes",
        effect=effect,
        null=f"{NULL}: untrained atoms",
        what="the typical share" if result else "the lead over the residual quantizer",
        against={name: Against(lead) for name, lead in leads.items()},
        relevant=RELEVANT,
        typical=size["typical"] if size else None,
        floor=size["floor"] if size else 0.0,
        shown=shown,
        write=percent,
        axis="of KL recovered" if result else f"of KL ahead of the {RIVAL}",
        least=-0.5,
        of="sequences" if result else "sequences of {} heads",
    )


def whitening(writes: LowRank) -> Metric:
    """The metric in which writes W have second moments E[W W^T] and E[W^T W] near the identity."""
    k, u = (side.double() for side in (writes.keys, writes.values))
    inverses: list[Tensor] = []
    for side, other in ((k, u), (u, k)):
        moments = torch.einsum("nri,nrs,nsj->ij", side, other @ other.mT, side) / len(side)
        ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments)).to(moments)
        inverses.append(torch.linalg.inv(moments + ridge))
    whole = Metric.of(*inverses, scale=1.0, damping=RIDGE, n_sequences=0)
    # As large on average as the writes are, as a metric's are.
    size = float(writes.norm().square().mean() / whole.move(writes).norm().square().mean())
    return Metric.of(*(side * size**0.5 for side in inverses), scale=1.0, damping=RIDGE, n_sequences=0)


def divergence(upper: UpperModel, plain: Tensor, head: int, code: Code) -> Tensor:
    """[B] KL(native || all writes of a head replaced), mean over tokens, differentiable. `plain`: log p of the native
    model, [B T,vocab]."""
    native = head_writes(upper.recurrence, head)
    edited = upper(head, "write", code.written(native)).log_softmax(-1)
    return (plain.exp() * (plain - edited)).sum(-1).view(upper.tokens.shape).mean(1)
