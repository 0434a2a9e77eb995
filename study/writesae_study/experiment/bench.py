"""A laboratory with a reference: what is fitted to other text than the one that is tested."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
import pandas as pd
import torch
from sae_lens import SAE
from torch import Tensor

from hookpoints import HookedRecurrent, Recurrence, WriteEdit
from sae_lens_writesae.errors import NothingToMeasureError
from writesae.experiment.firings import in_one_pass
from writesae.experiment.lab import Lab, M, Readout, Trial
from writesae_study.experiment.draws import folds
from writesae_study.experiment.terms import Terms
from writesae_study.head.baselines import HeadBaselines

_NO_OPS = 32
"""Places at which the native write is written again to measure the floor."""


def trials_at(rows: pd.DataFrame, edit: Callable[[int, M, int], WriteEdit], matrices: M) -> list[Trial]:
    """An edited run for each row of a table: at its `position`, `edit` (`Lab.add` or `Lab.replace`) of its matrix."""
    records = cast(list[dict[str, object]], rows.to_dict("records"))
    trials = []
    for n, (row, position) in enumerate(zip(records, rows["position"].tolist())):
        trials.append(Trial(row, position, edit(position, matrices, n)))
    return trials


class Bench(Lab):
    """A laboratory of the study: with other text, for what is fitted to the head.

    Args:
        model, tokens, seed, rows_per_run, progress: as in `Lab`.
        saes: dictionaries by label, all of which read the same head.
        reference: other text, which nothing is tested on, for what is fitted to the head: [M,S] token ids, or the terms
            of a training text.
        one_head: all dictionaries read one head. Otherwise they read different heads of one layer, and `hook`, `sae`
            and the sites are those of the first.

    Raises:
        ValueError: a reference that holds a tested sequence, no dictionary, one that does not fit the model, or
            dictionaries of other heads than `one_head` says.
    """

    def __init__(
        self,
        model: HookedRecurrent,
        saes: Mapping[str, SAE],
        tokens: Tensor,
        *,
        reference: Tensor | Terms | None = None,
        one_head: bool = True,
        seed: int = 0,
        rows_per_run: int = 256,
        progress: bool = False,
    ):
        self.reference = Terms(model, reference) if isinstance(reference, Tensor) else reference
        if self.reference is not None:
            check_apart(self.reference.tokens, tokens)
        self._one_head = one_head
        super().__init__(model, saes, tokens, seed=seed, rows_per_run=rows_per_run, progress=progress)
        # Shared by the runs that have these terms: a fit costs seconds.
        self._baselines = {} if self.reference is None else self.reference.fitted

    def check_heads(self) -> None:
        if self._one_head:
            return super().check_heads()
        layers = {hook.layer for hook in self.hooks.values()}
        heads = {hook.cell for hook in self.hooks.values()}
        if len(layers) != 1 or len(heads) != len(self.saes):
            self.refuse_heads("of different heads of one layer")

    def recurrences(self, count: int) -> list[Recurrence]:
        """The head's recurrence on each of the first sequences, B = 1, on the host."""
        recurrences = []
        for part in in_one_pass(self.tokens[:count], self.model.cfg.device):
            batch = self.recurrence(part).on_host()
            recurrences += [batch.select(rows=slice(row, row + 1)) for row in range(batch.B)]
        return recurrences

    @torch.no_grad()
    def baselines(self, sequence: int) -> HeadBaselines:
        """What can be written at the tokens of `sequence` without a dictionary, fitted on other text: on `reference`,
        or where there is none on that half of the sequences which `sequence` is not in (`folds`). Kept.

        Baselines see all of that text, in the metric that the dictionary was trained in, and have as many drawn writes
        and codes as the dictionary has atoms. Where it saw more text, the fact `unequal` says so.

        Cost: a forward up to the layer for each sequence of that text; then as `HeadBaselines.fit`.

        Raises:
            NothingToMeasureError: there is no other text.
        """
        n_codes = int(self.sae.cfg.d_sae)
        fold = -1
        terms = self.reference
        if terms is None:
            half = folds(np.arange(len(self.tokens)), self.seed)
            fold = int(half[sequence])
            other_half = [n for n in half if half[n] != fold]
            terms = Terms(self.model, self.tokens[other_half])
        self.facts["unequal"] = terms.unequal(self.sae)
        metric = [self.sae.cfg.metadata.get(name) for name in ("metric", "metric_sequences", "metric_damping")]
        key = (self.hook.cell, self.seed, n_codes, fold, *metric)
        if key not in self._baselines:
            self.require(
                len(terms.tokens) > 0,
                "baselines are fitted on other text than they are tested on, and there is one sequence only; give "
                "more, or a reference, or leave the baselines out of controls",
            )
            writes = terms.writes(self.hook.layer, self.hook.head)
            self.require(bool((writes.norm() > 0).any()), "every write of the other text is zero; there is no baseline")
            self._baselines[key] = HeadBaselines.fit(
                writes,
                terms.contexts,
                n_codes=n_codes,
                rng=self.rng(41, max(0, fold)),
                metric=terms.metric_of(self.sae),
            )
        return self._baselines[key]

    def floor(self, readout: Readout, column: str, window: int) -> float:
        """What a no-op moves: the native write is written again through the edit path, and `column` of the readout is
        read. Measured in the model's own dtype.

        Returns: the 95th percentile of the absolute values over at most 32 places. Cost: one edited row each.
        """
        rng = self.rng(97)
        values = []
        before = self.counts["runs"]
        last = self.tokens.shape[1] - window
        for sequence in rng.permutation(len(self.tokens))[:4].tolist():
            site = self.site(sequence)
            # Not at token 0, where there is another: its state holds nothing but the write itself.
            candidates = np.arange(min(1, last), last + 1)
            positions = np.sort(rng.choice(candidates, _NO_OPS // 4)).tolist()
            trials = [Trial({}, t, self.replace(t, site.writes, t)) for t in positions]
            table = self.read(site, trials, readout, window)
            values.append(table[column].abs())
        self.counts["runs"] = before  # a reader counts conditions, not this
        return float(pd.concat(values).quantile(0.95))

    def require(self, condition: bool, message: str) -> None:
        """Raise NothingToMeasureError with `message`, and what was left out so far, unless `condition` holds."""
        if not condition:
            counts = "; ".join(f"{n} ({why})" for why, n in self.skipped.items() if n)
            if counts:
                message += f". Left out: {counts}"
            raise NothingToMeasureError(message)


def check_apart(fitted_on: Tensor, tokens: Tensor) -> None:
    """Raise ValueError where a tested sequence is in the text that something is fitted on."""
    # Of both the beginnings: a text that is cut to another length is the same text.
    length = min(tokens.shape[1], fitted_on.shape[1])
    tested = set(map(tuple, tokens[:, :length].tolist()))
    shared = sum(tuple(row) in tested for row in fitted_on[:, :length].tolist())
    if shared:
        raise ValueError(
            f"reference is other text than tokens, but {shared} of its {len(fitted_on)} sequences are tested; "
            "leave those out, or pass no reference: then each half of the sequences is the other one's"
        )
