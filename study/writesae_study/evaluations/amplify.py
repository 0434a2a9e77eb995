"""Amplify and suppress atoms while the model writes: does the token change that the atom is aligned with?

Source: WriteSAE (arXiv 2605.12770), newline amplification, whose released code pairs token labels with the states at
the ends of sequences; here a label belongs to the token at which an atom fires, and atoms are chosen on text that no
prompt is taken from.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
import pandas as pd
import torch
from annotated_types import Ge
from pydantic import PositiveInt
from torch import Tensor

from sae_lens_writesae.steering import scale_atoms
from writesae.experiment.firings import Integers, collect_firings
from writesae.experiment.tokens import token_text
from writesae_study.dictionary.selectivity import alignment
from writesae_study.experiment.bench import Bench
from writesae_study.experiment.draws import halves
from writesae_study.experiment.evaluation import Evaluation, Result, Scope
from writesae_study.experiment.generation import sample_continuations
from writesae_study.experiment.targets import special_tokens
from writesae_study.verdict.finding import Finding, Paired, with_interval
from writesae_study.verdict.notation import signed

CONTROL_NAMES = {
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


@dataclass(frozen=True, kw_only=True)
class Amplify(Evaluation):
    """On the selection half of the sequences, a token's atom is the one whose firing has the largest correlation (phi)
    with the token being there. In continuations of prompts from the other half, every write at which the atom fires
    gets (factor - 1) a_i A_i, in the prompt too. Counted is the token among the new
    tokens, minus the same count without scaling. All continuations have the same length and random numbers.

    In the paper's form the `atoms_per_token` best aligned atoms are scaled in **every** head of the layer at once: give
    one dictionary for each head, of which the first chooses the tokens. One atom of one head is far weaker.

    **Controls:** `random`, a Gaussian direction of the atom's norm in its place, at the same firings and activations;
    `other`, the count of the same token while the atoms of the other tokens are scaled (their mean).

    **Verdict** of claim 18, at the headline factor, with prompts and tokens both resampled: the ladder of `judge` on
    the mean change of the count (chance 0), in the direction that it has, against both controls. Either direction
    counts, because the paper's newline feature, amplified, made fewer newlines. A change matters from a tenth of the
    unedited count on. It is below the floor where no count changes.
    """

    n_tokens: Annotated[int, Ge(2)] = 5
    """Tokens whose atoms are scaled: those with the best aligned. A verdict needs 5."""
    atoms_per_token: PositiveInt = 1
    """Atoms of a token in each dictionary: those that are aligned best (the paper's 10)."""
    min_count: Annotated[int, Ge(2)] = 20
    """Times that a token must occur in the selection half."""
    min_firings: PositiveInt = 10
    """Firings at the token, in the selection half, that its atom needs."""
    factors: tuple[float, ...] = (0.0, 4.0)
    """What the atom's component of each write is multiplied by: 0 suppresses, above 1 amplifies."""
    headline: float = 4.0
    """The factor of the claim; one of `factors`."""
    prompts: Annotated[int, Ge(2)] = 40
    """Prompts: the beginnings of sequences of the test half; fewer where there are fewer."""
    prompt_tokens: PositiveInt = 24
    """Length of a prompt."""
    new_tokens: PositiveInt = 40
    """Tokens sampled at temperature 1, with the same random numbers under every condition."""

    scope: ClassVar[Scope] = Scope.LAYER
    columns: ClassVar[dict[str, dict[str, str]]] = {
        "atoms": {
            "token": "token that is counted",
            "text": "the token as text",
            "atom": "atom that is aligned with the token",
            "phi": "correlation of firing and token on the selection half",
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

    def rules(self) -> dict[str, tuple[bool, str]]:
        return {
            "headline": (self.headline in self.factors, f"one of factors {self.factors}"),
            "factors": (1.0 not in self.factors, "other than 1, which changes nothing and is compared with"),
        }

    # -- measuring

    def measure(self, lab: Bench) -> dict[str, pd.DataFrame]:
        split = halves(len(lab.tokens), self.seed)
        teams = self.choose_teams(lab, split.select)
        sequences = split.test[: self.prompts]
        prompts = lab.tokens[sequences, : self.prompt_tokens]
        counts, fires = self._token_counts(lab, prompts, teams)
        # Firings were collected with the first dictionary, and its best atom stands for the token.
        lead = {token: next(iter(team.values()))[0] for token, team in teams.items()}
        lead_fires = []
        for prompt, token in zip(counts["prompt"], counts["token"]):
            lead_fires.append(float(fires.get((prompt, lead[token]), 0)))
        texts = [token_text(lab.model, token) for token in counts["token"]]
        counts = counts.assign(sequence=sequences[counts["prompt"]], text=texts, fires=lead_fires)
        return {"atoms": _team_table(lab, teams, split.select), "counts": counts}

    def _token_counts(self, lab: Bench, prompts: Tensor, teams: Mapping[int, Team]) -> tuple[pd.DataFrame, pd.Series]:
        """Counts by token, prompt and condition; and new tokens of the unedited continuations at which an atom fires,
        by prompt and atom."""
        # Every condition continues all prompts, with the same random numbers.
        conditions = [("nothing", 1.0, -1)]
        for factor, token in itertools.product(self.factors, teams):
            conditions += [("atom", factor, token), ("random", factor, token)]
        frames = []
        fires = pd.Series(dtype=float)
        finite = np.ones(len(prompts), dtype=bool)
        for name, factor, scaled in lab.bar(conditions, self.kind):
            team = teams.get(scaled, {})
            new = self._scaled_continuations(lab, prompts, name, factor, team, scaled)
            finite &= (new >= 0).all(1).numpy()  # a row is -1 where its logits were not finite
            by_token = {token: (new == token).sum(1).numpy() for token in teams}
            counts = pd.DataFrame(by_token).rename_axis("prompt").reset_index()
            frame = counts.melt("prompt", var_name="token", value_name="count")
            frames.append(frame.assign(condition=name, factor=factor, scaled=scaled))
            # Where atoms fire in unedited text says how much there is to scale.
            if name == "nothing":
                text = torch.cat([prompts.cpu(), new.clamp_min(0)], 1)
                firings = collect_firings(lab.model, lab.sae, lab.hook.layer, text)
                at_new_tokens = firings.frame(firings.position >= self.prompt_tokens)
                fires = at_new_tokens.groupby(["sequence", "atom"]).size()
        lab.counts["runs"] += len(conditions) * len(prompts)
        # A prompt that one condition lost is left out of all, so that conditions stay paired.
        n_grown = int((~finite).sum())
        dtype = str(lab.model.cfg.dtype).removeprefix("torch.")
        lab.require(
            finite.sum() >= 2,
            f"after {n_grown} of {len(finite)} prompts what the scaled atoms write feeds back and grows past "
            f"{dtype}; scale less (factors: {self.factors})",
        )
        lab.skipped[GREW] += n_grown
        table = _with_other(pd.concat(frames))
        return table[finite[table["prompt"]]], fires

    def choose_teams(self, lab: Bench, sequences: Integers) -> dict[int, Team]:
        """The atoms of each token in each dictionary, the best aligned first, of the tokens whose atoms in the first
        dictionary are aligned best. No atom belongs to two tokens.

        Raises:
            NothingToMeasureError: fewer than two tokens have one.
        """
        ids, counts = np.unique(lab.tokens[sequences].cpu().numpy(), return_counts=True)
        frequent = sorted({*ids[counts >= self.min_count].tolist()} - special_tokens(lab.model))
        able = {}
        # [N,F] for each dictionary: how well each atom fires where each frequent token is.
        for label in lab.saes:
            fit = alignment(lab.firings(label), lab.tokens, sequences, frequent)
            able[label] = np.where(fit.both >= self.min_firings, fit.phi, 0.0)  # [N,F]
        first = next(iter(able.values())).copy()
        teams: dict[int, Team] = {}
        # Tokens take their atoms in the order of their best alignment in the first dictionary.
        for n in np.argsort(-first.max(1), kind="stable").tolist():
            team: Team = {}
            for label, phi in able.items():
                best = np.argsort(-phi[n], kind="stable")[: self.atoms_per_token]
                team[label] = [atom for atom in best.tolist() if phi[n, atom] > 0]
            lead = next(iter(team.values()))[:1]
            # A token whose best atom another token has already gets none.
            if lead and lead[0] == first[n].argmax():
                teams[frequent[n]] = team
                for label, atoms in team.items():
                    able[label][:, atoms] = 0.0  # no atom belongs to two tokens
            if len(teams) == self.n_tokens:
                break
        lab.require(
            len(teams) >= 2,
            f"{len(frequent)} tokens occur {self.min_count} times in the selection half, and {len(teams)} of them have "
            f"an atom that fires at them {self.min_firings} times; two are needed. Give more sequences, or lower "
            "min_count and min_firings",
        )
        return teams

    def _scaled_continuations(
        self, lab: Bench, prompts: Tensor, name: str, factor: float, team: Mapping[str, list[int]], token: int
    ) -> Tensor:
        """Continuations of every prompt while the atoms of a token, or random directions for them, are scaled."""
        with ExitStack() as scopes:
            for n, (label, atoms) in enumerate(team.items()):
                like = None
                if name == "random":
                    decoder = lab.atoms(atoms, label)
                    # A separate seed for each token and dictionary, so that directions of two heads are independent.
                    noise = torch.Generator().manual_seed(self.seed + token + 1_000_003 * n)
                    like = decoder.random_like(noise).with_norm(decoder.norm())
                scopes.enter_context(scale_atoms(lab.model, lab.saes[label], atoms, factor, like=like))
            return sample_continuations(lab.model, prompts, self.new_tokens, self.seed, batch_size=self.rows_per_run)

    # -- judging

    def findings(self, result: Result) -> list[Finding]:
        """Claim 18, over all tokens."""
        atoms = result.tables["atoms"]
        table = result.tables["counts"]
        counts = {factor: counts_at(result, factor) for factor in self.factors}
        change = {factor: paired.mean("atom", "nothing") for factor, paired in counts.items()}
        at_headline = counts[self.headline]
        effect = change.pop(self.headline)
        headline = f"{self.headline:g}"
        at_factors = "".join(f"; at factor {each:g} {with_interval(mean, signed)}" for each, mean in change.items())
        fires = table.query("condition == 'nothing'")["fires"].mean()
        n_tokens = atoms["token"].nunique()
        scaled = f"{len(atoms) / n_tokens:.3g} atoms of {atoms['head'].nunique()} heads a token"
        controls = {shown: at_headline.mean(name, "nothing") for name, shown in CONTROL_NAMES.items()}
        native = at_headline["nothing"]
        amplified = at_headline["atom"]
        moves = f"{native.mean():.2f} to {amplified.mean():.2f}"
        moved = Finding(
            number=18,
            claim="amplifying an atom moves its token in generation",
            effect=effect,
            what="the change of the count",
            null=CONTROL_NAMES["random"],
            against=at_headline.beaten("atom", CONTROL_NAMES),
            typical=float((amplified - native).abs().mean()),
            less=effect.mean < 0,  # in the direction that it has: the paper's feature made fewer newlines
            relevant=RELEVANT * float(native.mean()),
            shown={f"atom, x {headline}": effect} | controls,
            write=signed,
            axis="change of the count",
            measured=f"{moves} times in {self.new_tokens} tokens at factor {headline}{at_factors}; the atom fires at "
            f"{fires:.1f} of them",
            of=f"prompt x token pairs ({n_tokens} tokens, {scaled})",
        )
        return [moved]


def _with_other(counts: pd.DataFrame) -> pd.DataFrame:
    """Counts of tokens whose atoms are scaled, or where nothing is, and the control `other`: the mean count of a token
    while the atoms of another one are scaled."""
    nothing = counts["scaled"] == -1
    same = counts["scaled"] == counts["token"]
    aimed = counts[nothing | same]
    foreign = counts[(counts["condition"] == "atom") & ~same]
    means = foreign.groupby(["prompt", "token", "factor"], as_index=False)["count"].mean()
    other = means.assign(condition="other")
    return pd.concat([aimed.astype({"count": float}), other]).astype({"token": int})


def _team_table(lab: Bench, teams: Mapping[int, Team], sequences: Integers) -> pd.DataFrame:
    """The table `atoms`: the atoms of each token, and how well each is aligned with it on some sequences."""
    rows = []
    for label in lab.saes:
        phi = alignment(lab.firings(label), lab.tokens, sequences, list(teams)).phi
        for n, (token, team) in enumerate(teams.items()):
            for atom in team[label]:
                rows.append((token, token_text(lab.model, token), atom, phi[n, atom], lab.hooks[label].head))
    table = pd.DataFrame(rows, columns=["token", "text", "atom", "phi", "head"])
    return table.sort_values("token", kind="stable")


def counts_at(result: Result, factor: float) -> Paired:
    """Counts by token and prompt under each condition, at one factor."""
    table = result.tables["counts"]
    rows = table[(table["factor"] == factor) | (table["condition"] == "nothing")]
    return Paired.of(rows, "count", "token", "prompt", clusters=("sequence", "token"), seed=result.evaluation.seed)
