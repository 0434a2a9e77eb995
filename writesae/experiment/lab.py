"""The laboratory: one head, its dictionaries and a text, and the only place that runs edited passes of a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import pandas as pd
import torch
from numpy.typing import ArrayLike
from sae_lens import SAE
from torch import Tensor

from hookpoints import EditSession, HookedRecurrent, Recurrence, WriteEdit
from hookpoints.files import versions
from sae_lens_writesae.atom.low_rank import LowRank
from sae_lens_writesae.sae.target import HeadHook, check_hook, check_plain_activations, decoder_atoms
from writesae.experiment.firings import Firings, bar, collect_firings
from writesae.files import Json
from writesae.head.writes import head_writes, joined

T = TypeVar("T")
M = TypeVar("M", bound=LowRank | None)

_LOGIT_FLOATS = 128_000_000
"""Float32 logits of one batch: 512 MB."""


class Trial(NamedTuple):
    """One edited run, which becomes one row of a table."""

    row: dict[str, object]
    """What the table says of this run besides the readout."""
    position: int
    """First edited token; the readout begins there."""
    edits: WriteEdit | Sequence[WriteEdit]
    """What is edited; an empty list runs the plain model by the same arithmetic."""


class EditedRows(NamedTuple):
    """Logits of some trials of one sequence, as a readout is given them."""

    trials: Sequence[Trial]
    native: Tensor
    """[T,vocab] logits of the plain pass over the whole sequence."""
    logits: Tensor
    """[n,S,vocab] logits of the edited runs, tokens `start` .. `start + S - 1`."""
    start: int
    """First token that was run: before it, edited and plain run agree."""
    width: int
    """Tokens of the window of each trial, from its own position on."""
    plain: Tensor | None
    """[S,vocab] logits of a run without edits in the same batch, where it was asked for."""

    @property
    def positions(self) -> Tensor:
        """[n,W] tokens of each trial's window, on the host."""
        first = torch.tensor([trial.position for trial in self.trials])
        return first[:, None] + torch.arange(self.width)

    def windows(self, run: Tensor) -> Tensor:
        """[n,W,...] of values [n,S,...] of the edited runs, at the tokens of each trial's own window."""
        columns = (self.positions - self.start).to(run.device)
        rows = torch.arange(len(columns), device=run.device)[:, None]
        return run[rows, columns]

    @property
    def window(self) -> Tensor:
        """[n,W,vocab] logits of each trial's own window."""
        return self.windows(self.logits)

    @property
    def native_window(self) -> Tensor:
        """[n,W,vocab] logits of the plain pass at the same tokens."""
        return self.native[self.positions]


Readout: TypeAlias = Callable[[EditedRows], Mapping[str, ArrayLike]]
"""Turns a batch of edited runs into columns of a table, one value per trial; `experiment.readout` has the common
ones."""


class Site(NamedTuple):
    """One sequence of the text, with the plain pass over it and the units that are tested there."""

    sequence: int
    rows: pd.DataFrame
    """The units (firings, positions ...) of this sequence."""
    session: EditSession
    recurrence: Recurrence
    """Of the evaluated head alone: B = H = 1."""
    writes: LowRank
    """The T native writes of the head."""

    def at(self, positions: Sequence[int]) -> LowRank:
        """The native writes at some positions."""
        return self.writes.rows(list(positions))

    def state_after(self, positions: Sequence[int]) -> Tensor:
        """[N,K,V] states of the head after the write at each position. Cost: the states at the distinct positions."""
        distinct, which = np.unique(np.asarray(positions), return_inverse=True)
        states = self.recurrence.states(positions=distinct.tolist())[0, :, 0]
        return states[torch.tensor(which)]

    def state_before(self, positions: Sequence[int]) -> Tensor:
        """The same before the write: S_t - W_t, decay and erase of token t included. A control must not contain the
        answer: where a head forgets, the top direction of the state after the write is the write itself."""
        after = self.state_after(positions)
        return after - self.at(positions).dense().to(after)

    def on_host(self) -> Site:
        """With factors and writes on the host, where what is made of a few matrices launches nothing."""
        recurrence = self.recurrence.on_host()
        return self._replace(recurrence=recurrence, writes=head_writes(recurrence, 0))


class Lab:
    """Some dictionaries of one head, and a text; what pages and measures of dictionaries work with.

    Args:
        model: the hooked model.
        saes: dictionaries by label, all of which read the same head.
        tokens: [N,T] token ids.
        seed: seed of every draw.
        rows_per_run: largest number of edited rows in one pass.
        progress: show progress bars.

    Raises:
        ValueError: no dictionary, one that does not fit the model, or dictionaries of several heads.
    """

    def __init__(
        self,
        model: HookedRecurrent,
        saes: Mapping[str, SAE],
        tokens: Tensor,
        *,
        seed: int = 0,
        rows_per_run: int = 256,
        progress: bool = False,
    ):
        self.model = model
        self.saes = dict(saes)
        self.tokens = tokens
        self.seed = seed
        self.rows_per_run = rows_per_run
        self.progress = progress
        self.hooks = {label: HeadHook.of(sae) for label, sae in self.saes.items()}
        """The hook that each dictionary reads, by label."""
        for label, sae in self.saes.items():
            check_hook(model, self.hooks[label].name, sae.cfg, label or "the SAE given")
        self.check_heads()
        self.skipped: Counter[str] = Counter()
        """Units that could not be measured, by reason."""
        self.facts: dict[str, Json] = {}
        """What a reader of the tables must know besides the settings."""
        self.counts: Counter[str] = Counter()
        """`runs`: edited runs so far, without those that measured a floor."""
        self._firings: dict[str, Firings] = {}

    def check_heads(self) -> None:
        """Raise ValueError unless all dictionaries read one head."""
        if len({hook.cell for hook in self.hooks.values()}) != 1:
            self.refuse_heads("of one head")

    def refuse_heads(self, expected: str) -> None:
        """Raise ValueError, which lists the heads that the dictionaries read."""
        listed = "; ".join(f"{label}: {hook.name}" for label, hook in self.hooks.items())
        raise ValueError(f"expected dictionaries {expected}, got {listed or 'none'}")

    # -- the head and its dictionaries

    @property
    def sae(self) -> SAE:
        """The dictionary; the first one where there are several."""
        return next(iter(self.saes.values()))

    @property
    def hook(self) -> HeadHook:
        """The hook that `sae` reads: layer, head, and whether it holds writes or states."""
        return next(iter(self.hooks.values()))

    @cached_property
    def key_value(self) -> tuple[int, int]:
        """K and V of the head."""
        shape = self.model.cfg.layer(self.hook.layer)
        return shape.K, shape.V

    def firings(self, label: str | None = None) -> Firings:
        """Where the atoms of a dictionary fire on the text; kept. Cost: a forward per sequence up to the layer.

        Raises:
            ValueError: the dictionary normalizes its input, so that activations are not in units of the write.
        """
        sae = self.sae if label is None else self.saes[label]
        label = next(iter(self.hooks)) if label is None else label
        if label not in self._firings:
            layer = self.hooks[label].layer
            check_plain_activations(sae)
            self._firings[label] = collect_firings(self.model, sae, layer, self.tokens, progress=self.progress)
        return self._firings[label]

    def atoms(self, numbers: ArrayLike, label: str | None = None) -> LowRank:
        """Atoms of a dictionary as its decoder has them, on the model's device, in float32."""
        sae = self.sae if label is None else self.saes[label]
        return decoder_atoms(sae, np.asarray(numbers), *self.key_value).to(self.model.cfg.device)

    def rng(self, *stream: int) -> np.random.Generator:
        """A separate generator for each purpose, so that no draw depends on another."""
        return np.random.default_rng([self.seed, *stream])

    # -- the text

    def sites(self, units: pd.DataFrame, name: str) -> Iterator[Site]:
        """The sequences that `units` (with a column `sequence`) name, one plain pass each, in order."""
        groups = [(int(cast(int, key)), rows) for key, rows in units.groupby("sequence")]
        # A generator: a site holds the cache of a whole pass, and one at a time is enough.
        return (self.site(sequence, rows) for sequence, rows in self.bar(groups, name))

    def site(self, sequence: int, rows: pd.DataFrame | None = None, span: slice = slice(None)) -> Site:
        """One sequence, or the tokens `span` of it as a separate text.

        Cost: one plain forward, whose cache edited runs branch off from.
        """
        session = self.model.edit_session(self.tokens[[sequence], span])
        recurrence = self._of_head(session.recurrence(self.hook.layer))
        units = pd.DataFrame() if rows is None else rows
        return Site(sequence, units, session, recurrence, head_writes(recurrence, 0))

    def _of_head(self, recurrence: Recurrence) -> Recurrence:
        """The evaluated head of a layer's recurrence, H = 1."""
        return recurrence.select(heads=slice(self.hook.head, self.hook.head + 1))

    def native_writes(self, sequences: Sequence[int]) -> LowRank:
        """Native writes of some sequences of the text, one after the other. Cost: a forward each up to the layer."""
        return joined([head_writes(self.recurrence(n), 0) for n in self.bar(sequences, "writes")])

    def recurrence(self, sequence: int | slice) -> Recurrence:
        """The head's recurrence on one sequence of the text, or on some. Cost: a forward up to the layer."""
        tokens = self.tokens[sequence].view(-1, self.tokens.shape[1])
        return self._of_head(self.model.recurrence(tokens, self.hook.layer))

    # -- edits

    def add(self, position: int, added: LowRank, row: int = 0) -> WriteEdit:
        """An edit that adds matrix `row` of `added` to the head's write."""
        return WriteEdit(self.hook.layer, self.hook.head, position, added.keys[row], added.values[row])

    def replace(self, position: int, written: LowRank | None, row: int = 0) -> WriteEdit:
        """An edit that writes matrix `row` of `written` instead of the head's write; None: nothing is written."""
        place = (self.hook.layer, self.hook.head, position)
        if written is None:
            return WriteEdit(*place, mode="delete")
        return WriteEdit(*place, written.keys[row], written.values[row], mode="replace")

    @torch.no_grad()
    def read(
        self, site: Site, trials: Sequence[Trial], readout: Readout, window: int | None, *, plain: bool = False
    ) -> pd.DataFrame:
        """Run the trials of one sequence and read each of them: one row per trial, in their order.

        Args:
            readout: is called batch by batch, right after the batch ran.
            window: tokens that are run from each trial's position on; None: to the end of the sequence.
            plain: run a row without edits in each batch, so that both sides of a difference come from one arithmetic.

        Cost: rows of `window` tokens, from the edited layer up. Trials go in batches of near positions.
        """
        parts: list[pd.DataFrame] = []
        length, vocabulary = site.session.logits.shape[1:]
        positions = [trial.position for trial in trials]
        room = _LOGIT_FLOATS // vocabulary
        for batch in site.session.batches(positions, length, self.rows_per_run, window=window, room=room):
            last = trials[batch[-1]].position  # batches are in the order of positions
            stop = length if window is None else last + window
            edits = [trials[n].edits for n in batch]
            if plain:
                edits.append([])
            run = site.session.run(edits, stop=stop, batch_size=len(edits), apart=False)
            rows = EditedRows(
                trials=[trials[n] for n in batch],
                native=site.session.logits[0],
                logits=run.logits[: len(batch)],
                start=run.start,
                width=stop - last,
                plain=run.logits[-1] if plain else None,
            )
            columns = {}
            for name, values in readout(rows).items():
                column = np.asarray(values)
                columns[name] = column if column.ndim == 1 else list(column)  # an array a row
            parts.append(pd.DataFrame(columns, index=batch))
            self.counts["runs"] += len(batch)
        # The index of a part is the number of its trial, so that rows come back in the order of the trials.
        return pd.DataFrame([trial.row for trial in trials]).join(pd.concat(parts))

    # -- bookkeeping

    def bar(self, items: Sequence[T], name: str) -> Iterator[T]:
        """`items`, with a progress bar where it was asked for."""
        return iter(bar(items, name, self.progress))

    def describe(self, label: str = "") -> dict[str, Json]:
        """The part of a result's `info` that all evaluations share."""
        shape = self.model.cfg.layer(self.hook.layer)
        hook = self.hook
        default = hook.cell if len(self.saes) > 1 else f"{hook.cell} {hook.target}-trained"
        if len({head_hook.head for head_hook in self.hooks.values()}) > 1:
            default = f"L{hook.layer}, {len(self.hooks)} heads"
        return {
            "label": label or default,
            "model": str(self.model.cfg.model_name),
            "versions": versions(),
            "model_type": str(self.model.cfg.model_type),
            "dtype": str(self.model.cfg.dtype).removeprefix("torch."),
            "rule": str(shape.rule),
            "layer": hook.layer,
            "head": hook.head,
            "K": shape.K,
            "V": shape.V,
            "hook_name": hook.name,
            "target": hook.target,
            "saes": [name for name in self.saes if name],
            "architecture": self.sae.cfg.architecture(),
            "d_sae": int(self.sae.cfg.d_sae),
            "n_sequences": len(self.tokens),
            "n_positions": self.tokens.shape[1],
            **self.facts,
            "n_skipped": dict(self.skipped),
            "n_edited_runs": self.counts["runs"],
        }
