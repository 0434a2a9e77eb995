"""Settings and result of scaled atoms in generation (`amplify`)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from sae_lens_writesae.evaluation import Claim, Evaluation, Figure
from sae_lens_writesae.interventions import plots
from sae_lens_writesae.interventions.common import Estimate, check_at_least, estimate, estimate_over_atoms
from sae_lens_writesae.steering import Target
from sae_lens_writesae.verdict import statistics as stats
from sae_lens_writesae.verdict.judge import NO_DATA, too_little

CONTROLS = ("random", "other")
_NAMES = {
    "random": "random directions of the same norm at the same firings",
    "other": "the atoms of the other tokens",
}


@dataclass(frozen=True)
class AmplifyConfig:
    """Which atoms are scaled, by how much, and in which continuations."""

    tokens: tuple[Target, ...] = ()
    """Tokens (ids or strings, at least two) whose atoms are scaled. Empty: `n_tokens`, those with the best aligned."""
    n_tokens: int = 5
    """How many tokens, where none are named."""
    aligned: Literal["current", "next"] = "current"
    """An atom belongs to the token at which it fires, or to the token that comes next."""
    min_count: int = 20
    """Times that a token must occur in the selection half."""
    min_firings: int = 10
    """Firings at the token, in the selection half, that its atom needs."""
    factors: tuple[float, ...] = (0.0, 4.0)
    """What the atom's component of each write is multiplied by: 0 suppresses, above 1 amplifies."""
    headline: float = 4.0
    """The factor of the claim; one of `factors`."""
    prompts: int = 40
    """Prompts: the beginnings of sequences of the test half; fewer where there are fewer."""
    prompt_tokens: int = 24
    """Length of a prompt."""
    new_tokens: int = 40
    """Tokens sampled at temperature 1, with the same random numbers under every condition."""
    rows_per_run: int = 128
    """Continuations at once. Changes which random numbers a prompt gets."""
    seed: int = 0
    """Of the split, the sampling and the random directions."""
    label: str = ""
    """Name in reports."""

    def __post_init__(self) -> None:
        least: dict[str, float] = {
            "n_tokens": 2,
            "min_count": 2,
            "min_firings": 1,
            "prompts": 2,
            "prompt_tokens": 1,
            "new_tokens": 1,
        }
        check_at_least(self, least | {"rows_per_run": 1})
        object.__setattr__(self, "tokens", tuple(self.tokens))
        object.__setattr__(self, "factors", tuple(float(f) for f in self.factors))
        if len(self.tokens) == 1:
            raise ValueError("tokens needs at least two tokens: the atoms of the other ones are the control")
        if self.aligned not in ("current", "next"):
            raise ValueError(f"aligned must be 'current' or 'next', found {self.aligned!r}")
        if self.headline not in self.factors:
            raise ValueError(f"headline must be one of factors {self.factors}, found {self.headline}")
        if 1.0 in self.factors:
            raise ValueError(f"a factor of 1 changes nothing and is what the others are compared with: {self.factors}")


class Amplify(Evaluation):
    """How often a token appears in sampled text while the atom that is aligned with it is scaled.

    Definition: on the selection half of the sequences, a token's atom is the one whose firing has the largest
    correlation (phi) with the token being there (`aligned="current"`) or coming next. In continuations of prompts from
    the other half, every write at which the atom fires gets (factor - 1) a_i A_i, in the prompt too; counted is the
    token among the new tokens, minus the same without it. All continuations have the same length and random numbers.

    Controls: `random`, a Gaussian direction of the atom's norm in its place, at the same firings and activations;
    `other`, the count of the same token while the atoms of the other tokens are scaled (their mean).

    Verdict of claim 18, at the headline factor, over prompts and tokens (both resampled):
    1. "below the floor": no count changes.
    2. "inconclusive" with too little data (`verdict.judge`); else "fails":
       the interval of the change contains 0. (The paper's newline feature, amplified, made fewer newlines, so
       either direction counts.)
    3. "confounded": for some control, the interval of change - control's change contains 0.
    4. "holds" otherwise.
    """

    kind: ClassVar[str] = "amplify"
    title: ClassVar[str] = "Does scaling an atom change how often its token is written?"
    COLUMNS: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "token": "whose atom it is",
            "text": "the token as text",
            "atom": "index in the dictionary",
            "count": "times that the token occurs in the selection half",
            "phi": "correlation of firing and token, selection half",
            "phi_test": "the same on the test half",
            "precision": "share of the atom's firings that are at the token, test half",
            "recall": "share of the token's places at which the atom fires, test half",
        },
        "counts": {
            "token": "that is counted",
            "text": "the token as text",
            "prompt": "index of the prompt",
            "sequence": "test sequence of the prompt",
            "condition": "nothing, atom, random, other",
            "factor": "of the atom's component; 1 for nothing",
            "count": "times that the token is among the new tokens",
            "fires": "of the new tokens of the unedited continuation, those at which the atom fires",
        },
    }

    def counts(self, condition: str, factor: float = 1.0) -> Any:
        """Counts of one condition: index (token, prompt), columns count, sequence."""
        table: Any = self.tables["counts"]
        own = table[(table["condition"] == condition) & (table["factor"] == factor)]
        return own.set_index(["token", "prompt"]).sort_index()

    def change(self, condition: str, factor: float, minus: str = "nothing", token: int | None = None) -> Estimate:
        """Mean change of the count against nothing, or against another condition at the same factor; of one token, or
        of all (prompts and tokens resampled)."""
        own, other = self.counts(condition, factor), self.counts(minus, 1.0 if minus == "nothing" else factor)
        own = own.assign(gap=own["count"] - other["count"]).reset_index()
        if token is not None:
            own = own[own["token"] == token]
        return estimate_over_atoms(own["gap"], own["sequence"], own["token"])

    def mean(self, condition: str, factor: float = 1.0) -> Estimate:
        """Mean count, by prompt."""
        own = self.counts(condition, factor)
        return estimate(own["count"], own["sequence"])

    def claims(self) -> list[Claim]:
        """Claim 18 over all tokens, and how many tokens show it by themselves."""
        config = self.info["config"]
        factor, length = config["headline"], config["new_tokens"]
        effect = self.change("atom", factor)
        versus = {c: self.change("atom", factor, c) for c in CONTROLS}
        alike = [c for c in CONTROLS if _has_zero(versus[c])]
        counts: Any = self.counts("atom", factor)["count"] - self.counts("nothing")["count"]
        if not (counts != 0).any():
            outcome, why = "below the floor", "No continuation has its token more or less often."
        elif too_little(effect.n, effect.n_clusters, effect.low, effect.high):
            outcome, why = "inconclusive", NO_DATA
        elif _has_zero(effect):
            outcome, why = "fails", "Amplifying the atoms does not change how often their tokens are written."
        elif alike:
            outcome, why = "confounded", f"So do {' and '.join(_NAMES[c] for c in alike)}."
        else:
            word = "more" if effect.mean > 0 else "less"
            outcome, why = "holds", f"The tokens are written {word} often, unlike under every control."
        rest = [f for f in config["factors"] if f != factor]
        others = "".join(f"; at factor {f:g} {self.change('atom', f)}" for f in rest)
        fires = self.counts("nothing")["fires"].mean()
        first = Claim(
            18,
            "amplifying an atom moves its token in generation",
            f"{self.mean('nothing').mean:.2f} to {self.mean('atom', factor).mean:.2f} times in {length} tokens at "
            f"factor {factor:g} (change {effect}){others}; the atom fires at {fires:.1f} of them",
            len(counts),
            f"prompt x token pairs ({self.tables['atoms']['token'].nunique()} tokens)",
            "; ".join(f"{_NAMES[c]} {self.change(c, factor)}" for c in CONTROLS),
            outcome,
            why,
        )
        return [first, self._single_tokens(factor)]

    def p_values(self, factor: float) -> dict[str, float]:
        """Of each token: the largest p of sign-flip tests by prompt against nothing and the controls, Holm-adjusted."""
        found = {}
        atom, tokens = self.counts("atom", factor), list(self.tables["atoms"]["token"])
        for token in tokens:
            own = atom.loc[token]
            rivals = [self.counts("nothing").loc[token], *(self.counts(c, factor).loc[token] for c in CONTROLS)]
            tests = [stats.sign_flip_test(own["count"], rival["count"], own["sequence"]) for rival in rivals]
            found[str(token)] = max(test.p_value for test in tests)
        return stats.holm(found)

    def _single_tokens(self, factor: float) -> Claim:
        atoms: Any = self.tables["atoms"]
        p_values = self.p_values(factor)
        n_prompts = int(self.tables["counts"]["prompt"].nunique())
        few = too_little(n_prompts, n_prompts)
        moved = atoms[[p_values[str(token)] < 0.05 for token in atoms["token"]]]
        named = ", ".join(f"{row.text!r} {self.change('atom', factor, token=row.token)}" for row in moved.itertuples())
        return Claim(
            None,
            "single atoms move their token in generation",
            f"{len(moved)} of {len(atoms)} tokens (Holm-adjusted p < 0.05){': ' if named else ''}{named}",
            len(atoms),
            "tokens with an atom each",
            "sign flips by prompt against nothing and both controls; the largest p counts",
            "holds" if len(moved) else "inconclusive" if few else "fails",
            "At least one token changes more than under every control."
            if len(moved)
            else NO_DATA
            if few
            else "No token does by itself.",
        )

    def figures(self) -> list[Figure]:
        """Changes of counts over all tokens, and token by token."""
        config = self.info["config"]
        rows = []
        for factor in config["factors"]:
            for condition, colour in (("atom", "atom"), ("random", "rival"), ("other", "soft")):
                change = self.change(condition, factor)
                rows.append(plots.Row(f"{condition}, x {factor:g}", *change[:3], colour))
        label = f"change of the count in {config['new_tokens']} tokens"
        name = f"{self.kind}: {self.label}"
        pooled = plots.interval_figure(rows, label, f"Changes of counts, {name}")
        atoms: Any = self.tables["atoms"]
        rows = [
            plots.Row(f"{row.text!r}", *self.change("atom", config["headline"], token=row.token)[:3], "atom")
            for row in atoms.itertuples()
        ]
        single = plots.interval_figure(rows, label, f"Changes by token, {name}")
        return [
            Figure("Scaled atoms, and controls", pooled, "All tokens, 95 % intervals over prompts and tokens."),
            Figure(f"Token by token, x {config['headline']:g}", single, "95 % intervals over prompts."),
        ]

    def notes(self) -> list[str]:
        """How atoms were found, and how well they fit on the other half."""
        atoms: Any = self.tables["atoms"]
        where = "is there" if self.info["config"]["aligned"] == "current" else "comes next"
        fits = ", ".join(f"{r.text!r} atom {r.atom} ({r.phi:.2f}, {r.phi_test:.2f})" for r in atoms.itertuples())
        return [
            f"Correlation of firing with the token that {where}, on the selection and the test half: {fits}.",
            *super().notes(),
        ]


def _has_zero(found: Estimate) -> bool:
    return found.low <= 0 <= found.high
