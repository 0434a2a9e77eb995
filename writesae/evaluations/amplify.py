"""Amplify and suppress atoms while the model writes: does the token change that the atom is aligned with?

Source: WriteSAE (arXiv 2605.12770), newline amplification, whose released code pairs token labels with the states at
the ends of sequences; here a label belongs to the token at which an atom fires (or the next one), and atoms are chosen
on text that no prompt is taken from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.steering import Target, scale_atoms, token_id
from writesae.experiment.evaluation import Evaluation, Result, Scope
from writesae.experiment.firings import collect_firings, halves
from writesae.experiment.generation import Sampled, sample_continuations
from writesae.experiment.lab import Lab
from writesae.experiment.selectivity import Places, alignment, places_of
from writesae.experiment.tokens import special_tokens, token_text
from writesae.verdict import figures
from writesae.verdict import statistics as stats
from writesae.verdict.finding import Figure, Finding, Paired
from writesae.verdict.format import signed
from writesae.verdict.judge import one_is_enough
from writesae.verdict.statistics import Estimate

CONTROLS = {
    "random": "random directions of the same norm at the same firings",
    "other": "the atoms of the other tokens",
}
"""Controls by the condition's name in the table, as a reader should see them."""

RELEVANT = 0.1
"""Change of the count, as a share of the unedited count, from which on it matters, and margin by which a control may be
weaker and still count as equal. The paper's change is a third of its count."""

Team = dict[str, list[int]]
"""The atoms of one token, by the label of their dictionary."""

GREW = "prompts after which a scaled continuation grew past the dtype, all their conditions"
"""Reason under which `info["n_skipped"]` counts prompts."""


class Condition(NamedTuple):
    """Whose atom is scaled, and how."""

    name: Literal["nothing", "atom", "random"]
    factor: float = 1.0
    token: int | None = None
    """The token whose atom is scaled; None: nothing is."""


@dataclass(frozen=True, kw_only=True)
class Amplify(Evaluation):
    """On the selection half of the sequences, a token's atom is the one whose firing has the largest correlation (phi)
    with the token being there (`aligned="current"`) or coming next. In continuations of prompts from the other half,
    every write at which the atom fires gets (factor - 1) a_i A_i, in the prompt too. Counted is the token among the new
    tokens, minus the same count without scaling. All continuations have the same length and random numbers.

    In the paper's form the `atoms_per_token` best aligned atoms are scaled in **every** head of the layer at once: give
    one dictionary for each head, of which the first chooses the tokens. One atom of one head is far weaker.

    **Controls:** `random`, a Gaussian direction of the atom's norm in its place, at the same firings and activations;
    `other`, the count of the same token while the atoms of the other tokens are scaled (their mean).

    **Verdict** of claim 18, at the headline factor, with prompts and tokens both resampled: the ladder of `judge` on
    the mean change of the count (chance 0), in the direction that it has, against both controls. Either direction
    counts, because the paper's newline feature, amplified, made fewer newlines. A change matters from a tenth of the
    unedited count on. It is below the floor where no count changes. The second claim counts the tokens whose change
    differs from nothing and from both controls by itself (Holm-adjusted sign-flip tests by prompt).
    """

    tokens: tuple[Target, ...] = ()
    """Tokens (ids or strings, at least two) whose atoms are scaled. Empty: `n_tokens`, those with the best aligned."""
    n_tokens: int = 5
    """How many tokens, where none are named. A verdict needs 5."""
    aligned: Literal["current", "next"] = "current"
    """An atom belongs to the token at which it fires, or to the token that comes next."""
    atoms_per_token: int = 1
    """Atoms of a token in each dictionary: those that are aligned best (the paper's 10)."""
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

    kind: ClassVar[str] = "amplify"
    question: ClassVar[str] = "Does scaling an atom change how often its token is written?"
    answers: ClassVar[tuple[int, ...]] = (18,)
    scope: ClassVar[Scope] = Scope.LAYER
    least: ClassVar[dict[str, int]] = {"n_tokens": 2, "min_count": 2, "prompts": 2}
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "token": "token that is counted",
            "text": "the token as text",
            "atom": "atom that is aligned with the token",
            "count": "places of the token in the selection half",
            "phi": "correlation of firing and token on the selection half",
            "phi_test": "the same on the test half",
            "precision": "share of the atom's firings that are at the token, on the test half",
            "recall": "share of the token's places at which the atom fires, on the test half",
            "head": "head of the atom's dictionary",
        },
        "counts": {
            "token": "token that is counted",
            "text": "the token as text",
            "prompt": "number of the prompt",
            "sequence": "row of the evaluation tokens that the prompt begins",
            "condition": "what is scaled: nothing, atom, random, other",
            "factor": "factor of the atom's component; 1 for nothing",
            "count": "times that the token is among the new tokens",
            "fires": "new tokens of the unedited continuation at which the atom fires",
        },
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.tokens) == 1:
            raise ValueError("tokens needs at least two tokens, because the atoms of the others are a control; found 1")
        if self.headline not in self.factors:
            raise ValueError(f"headline must be one of factors {self.factors}, found {self.headline}")
        if 1.0 in self.factors:
            raise ValueError(f"a factor of 1 changes nothing and is what the others are compared with: {self.factors}")

    @property
    def shortest(self) -> int:
        return self.prompt_tokens

    # -- measuring

    def measure(self, lab: Lab) -> dict[str, pd.DataFrame]:
        split = halves(len(lab.tokens), self.seed)
        asked = [token_id(lab.model, token) for token in self.tokens]
        select, test = (
            {label: places_of(lab.firings(label), lab.tokens, side, self.aligned) for label in lab.saes}
            for side in split
        )
        atoms = self.choose_atoms(lab, next(iter(select.values())), asked)
        teams = self.choose_teams(select, atoms)
        sequences = split.test[: self.prompts]
        prompts = lab.tokens[sequences, : self.prompt_tokens]
        conditions = [Condition("nothing")]
        for factor in self.factors:
            for token in atoms:
                conditions += [Condition("atom", factor, token), Condition("random", factor, token)]
        counts: dict[Condition, NDArray[np.int64]] = {}
        fires = np.zeros((len(prompts), len(atoms)))
        finite = np.ones(len(prompts), dtype=bool)
        for condition in lab.bar(conditions, self.kind):
            new = self._continuations(lab, prompts, condition, teams)
            counts[condition] = (new.tokens[..., None] == torch.tensor(list(atoms))).sum(1).numpy()
            finite &= new.finite.numpy()
            if condition.token is None:
                fires = _fires(lab, prompts, new.tokens, list(atoms.values()))
        lab.count_edited_runs(len(conditions) * len(prompts))
        lab.require(
            finite.sum() >= 2,
            f"after {(~finite).sum()} of {len(finite)} prompts what the scaled atoms write feeds back and grows past "
            f"{str(lab.model.cfg.dtype).removeprefix('torch.')}; scale less (factors: {self.factors})",
        )
        if not finite.all():
            lab.skipped[GREW] += int((~finite).sum())
        lab.facts["split"] = (
            "half of the sequences, at random, for the choice of atoms; prompts begin sequences of the other half"
        )
        table = self._counts(counts, list(atoms), fires)
        table = table.loc[finite[table["prompt"]]].reset_index(drop=True)
        table = table.assign(
            sequence=sequences[table["prompt"]], text=[token_text(lab.model, token) for token in table["token"]]
        )
        return {"atoms": _fits(lab, teams, select, test), "counts": table}

    def choose_atoms(self, lab: Lab, places: Places, asked: Sequence[int]) -> dict[int, int]:
        """The atom of each token: of those asked for, in order, or of the tokens whose atoms are aligned best. No atom
        is chosen twice.

        Raises:
            ValueError: a token asked for has no atom.
            NothingToMeasureError: fewer than two tokens have one.
        """
        tokens, counts = np.unique(places.labels, return_counts=True)
        frequent = set(tokens[counts >= self.min_count].tolist())
        frequent -= set() if asked else special_tokens(lab.model)
        alignments = {token: alignment(places, token) for token in (asked or sorted(frequent))}
        phi = {token: np.where(a.both >= self.min_firings, a.phi, -1.0) for token, a in alignments.items()}
        atoms: dict[int, int] = {}
        for token in asked or sorted(phi, key=lambda token: -phi[token].max()):
            free = phi[token].copy()
            if asked:
                free[list(atoms.values())] = -1.0
            atom = int(free.argmax())
            if token in frequent and free[atom] > 0 and atom not in atoms.values():
                atoms[token] = atom
            elif asked:
                raise ValueError(
                    f"token {token_text(lab.model, token)!r} occurs {alignments[token].present} times in the selection "
                    f"half (needed: {self.min_count}) and no atom left for it fires there {self.min_firings} times "
                    f"(most: {int(alignments[token].both.max())}); give more sequences, or lower min_count and "
                    "min_firings"
                )
            if len(atoms) == (len(asked) or self.n_tokens):
                break
        lab.require(
            len(atoms) >= 2,
            f"{len(frequent)} tokens occur {self.min_count} times in the selection half, and {len(atoms)} of them have "
            f"an atom that fires at them {self.min_firings} times; two are needed. Give more sequences, or lower "
            "min_count and min_firings",
        )
        return atoms

    def choose_teams(self, places: Mapping[str, Places], atoms: Mapping[int, int]) -> dict[int, Team]:
        """The atoms of each token in each dictionary, the best aligned first; in the first dictionary they begin with
        the one that was chosen. None belongs to two tokens."""
        taken = {label: set[int]() for label in places}
        taken[next(iter(places))].update(atoms.values())
        teams: dict[int, Team] = {}
        for token, atom in atoms.items():
            teams[token] = {}
            for n, (label, of_head) in enumerate(places.items()):
                fit = alignment(of_head, token)
                able = [i for i in np.argsort(-fit.phi).tolist() if fit.both[i] >= self.min_firings and fit.phi[i] > 0]
                team = [atom] if n == 0 else []
                team += [i for i in able if i not in taken[label]][: self.atoms_per_token - len(team)]
                taken[label].update(team)
                teams[token][label] = team
        return teams

    def _continuations(self, lab: Lab, prompts: Tensor, condition: Condition, teams: Mapping[int, Team]) -> Sampled:
        """Continuations of every prompt under one condition."""
        with ExitStack() as scopes:
            team = {} if condition.token is None else teams[condition.token]
            for n, (label, atoms) in enumerate(team.items()):
                like = None
                if condition.name == "random":
                    decoder = lab.atoms(atoms, label)
                    seed = self.seed + (condition.token or 0) + 1_000_003 * n
                    like = decoder.random_like(torch.Generator().manual_seed(seed)).with_norm(decoder.norm())
                scopes.enter_context(scale_atoms(lab.model, lab.saes[label], atoms, condition.factor, like=like))
            return sample_continuations(lab.model, prompts, self.new_tokens, self.seed, batch_size=self.rows_per_run)

    def _counts(
        self, counts: dict[Condition, NDArray[np.int64]], tokens: list[int], fires: NDArray[np.float64]
    ) -> pd.DataFrame:
        """Counts of every token under every condition that is about it, from counts [P,tokens] by condition."""
        parts = []
        for column, token in enumerate(tokens):
            of_token = {("nothing", 1.0): counts[Condition("nothing")][:, column]}
            for factor in self.factors:
                of_token["atom", factor] = counts[Condition("atom", factor, token)][:, column]
                of_token["random", factor] = counts[Condition("random", factor, token)][:, column]
                others = [counts[Condition("atom", factor, t)][:, column] for t in tokens if t != token]
                of_token["other", factor] = np.mean(others, axis=0)
            for (name, factor), count in of_token.items():
                described = {"token": token, "condition": name, "factor": factor, "fires": fires[:, column]}
                parts.append(pd.DataFrame({"prompt": np.arange(len(count)), "count": count.astype(float), **described}))
        return pd.concat(parts, ignore_index=True)

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 18 over all tokens, and how many tokens show it by themselves."""
        atoms, tokens = result.tables["atoms"], tokens_of(result)
        counts = {factor: counts_at(result, factor) for factor in self.factors}
        change = {factor: each.mean("atom", "nothing") for factor, each in counts.items()}
        at, effect, factor = counts[self.headline], change[self.headline], self.headline
        others = "".join(f"; at factor {f:g} {each}" for f, each in change.items() if f != factor)
        fires = result.tables["counts"].query("condition == 'nothing'")["fires"].mean()
        scaled = f"{len(atoms) / len(tokens):.3g} atoms of {atoms['head'].nunique()} heads a token"
        pooled = Finding(
            number=18,
            claim="amplifying an atom moves its token in generation",
            effect=effect,
            what="the change of the count",
            against=at.beaten("atom", CONTROLS),
            typical=float((at["atom"] - at["nothing"]).abs().mean()),
            less=effect.mean < 0,
            relevant=RELEVANT * float(at["nothing"].mean()),
            shown={f"atom, x {factor:g}": effect}
            | {shown: at.mean(name, "nothing") for name, shown in CONTROLS.items()},
            write=signed,
            axis="change of the count",
            measured=f"{at['nothing'].mean():.2f} to {at['atom'].mean():.2f} times in {self.new_tokens} tokens at "
            f"factor {factor:g}{others}; the atom fires at {fires:.1f} of them",
            of=f"prompt x token pairs ({len(tokens)} tokens, {scaled})",
        )
        p_values = token_p_values(at)
        moved = tokens[[p_values[str(token)] < 0.05 for token in tokens["token"]]]
        each = [f"{text!r} {token_change(at, token)}" for token, text in zip(moved["token"], moved["text"])]
        holds = "At least one token changes more than under every control."
        fails = "No token changes more than under every control by itself."
        single = Finding(
            claim="single atoms move their token in generation",
            ruled=one_is_enough(len(each), effect, holds, fails),
            measured=": ".join(
                filter(None, [f"{len(each)} of {len(tokens)} tokens (Holm-adjusted p < 0.05)", ", ".join(each)])
            ),
            controls="sign flips by prompt against nothing and both controls; the largest p counts",
            n=len(tokens),
            of="tokens with an atom each",
        )
        return [pooled, single]

    def panels(self, result: Result) -> list[Figure]:
        """Changes of counts token by token."""
        tokens, at = tokens_of(result), counts_at(result, self.headline)
        rows = [
            figures.Row(f"{text!r}", *token_change(at, token)[:3], "atom")
            for token, text in zip(tokens["token"], tokens["text"])
        ]
        title = f"Changes by token, {self.kind}: {result.label}"
        svg = figures.intervals(rows, f"change of the count in {self.new_tokens} tokens", title, write=signed)
        return [Figure(f"Token by token, x {self.headline:g}", svg, "95% intervals over prompts.")]

    def notes(self, result: Result) -> list[str]:
        """Which atoms were chosen, and how well they fit on the other half."""
        where = "is there" if self.aligned == "current" else "comes next"
        fits = ", ".join(
            f"{row['text']!r} atom {row['atom']} ({row['phi']:.2f}, {row['phi_test']:.2f})"
            for row in result.tables["atoms"].to_dict("records")
        )
        return [f"Correlation of firing with the token that {where}, on the selection and the test half: {fits}."]


def counts_at(result: Result, factor: float) -> Paired:
    """Counts by token and prompt under each condition, at one factor."""
    table = result.tables["counts"]
    rows = table[(table["factor"] == factor) | (table["condition"] == "nothing")]
    return Paired.of(rows, "count", "token", "prompt", clusters=("sequence", "token"), seed=result.evaluation.seed)


def token_change(counts: Paired, token: int) -> Estimate:
    """Mean change of the count of one token over prompts."""
    return replace(counts, wide=counts.wide[counts["token"] == token]).mean("atom", "nothing")


def token_p_values(counts: Paired) -> dict[str, float]:
    """For each token, the largest p of sign-flip tests by prompt against nothing and each control, Holm-adjusted."""
    largest = {}
    for token, rows in counts.wide.groupby("token"):
        tests = [stats.sign_flip_test(rows["atom"], rows[n], rows["sequence"]) for n in ("nothing", *CONTROLS)]
        largest[str(token)] = max(test.p_value for test in tests)
    return stats.holm(largest)


def _fires(lab: Lab, prompts: Tensor, new: Tensor, atoms: list[int]) -> NDArray[np.float64]:
    """[P,atoms] new tokens of the unedited continuations at which each atom fires."""
    firings = collect_firings(lab.model, lab.sae, lab.hook.layer, torch.cat([prompts.cpu(), new], 1))
    late = firings.position >= prompts.shape[1]
    each = [np.bincount(firings.sequence[late & (firings.atom == i)], minlength=len(new)) for i in atoms]
    return np.stack(each, 1).astype(float)


def tokens_of(result: Result) -> pd.DataFrame:
    """One row for each token, with its first atom."""
    return result.tables["atoms"].drop_duplicates("token")


def _fits(
    lab: Lab, teams: Mapping[int, Team], select: Mapping[str, Places], test: Mapping[str, Places]
) -> pd.DataFrame:
    """How well the atoms of each token fit, on both halves."""
    rows = []
    for token, team in teams.items():
        for label, atoms in team.items():
            chosen, tested = alignment(select[label], token), alignment(test[label], token)
            for atom in atoms:
                rows.append(
                    {
                        "token": token,
                        "text": token_text(lab.model, token),
                        "atom": atom,
                        "count": chosen.present,
                        "phi": chosen.phi[atom],
                        "phi_test": tested.phi[atom],
                        "precision": tested.both[atom] / max(tested.fired[atom], 1),
                        "recall": tested.both[atom] / max(tested.present, 1),
                        "head": lab.hooks[label].head,
                    }
                )
    return pd.DataFrame(rows)
