"""The substitution test: exchange one write of one head for an atom, or for a control, and see what the model
says.

At a firing (sequence, position t, atom i) the conditions of `conditions.py` differ only in what is written at
t. The edit enters the state at t and is read from t on, in closed loop: later erases react to it. The effect
is the KL divergence of next-token predictions from the native model's, at t, t + 1, on average over t..t+16,
and at the last token, in both directions. Source: WriteSAE (arXiv 2605.12770), section 4; the paper's atoms
win where KL(atom) < KL(delete).

An SAE trained on states is tested the same way: its firings are found on states, and its atoms replace the
**write**.
"""

import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor

from sae_lens_writesae.conditions import (
    CONTROLS,
    Condition,
    Factors,
    conditions,
    cosine,
    norm,
    random_directions,
    state_direction,
)
from sae_lens_writesae.errors import NothingToMeasureError
from sae_lens_writesae.firings import Firings, HeadHook, atom_factors, collect_firings
from sae_lens_writesae.head_memory import HeadProfile, HeadWrites, head_profile, head_writes
from sae_lens_writesae.progress import bar
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_draw import Sample, draw
from sae_lens_writesae.substitution_edits import edits_of, measure
from sae_lens_writesae.substitution_result import METRICS, SubstitutionInfo, SubstitutionResult
from sae_lens_writesae.writing import write_aside


class Setup(NamedTuple):
    """What stays the same over all sequences of a test."""

    model: Any
    sae: Any
    tokens: Tensor  # [N,T]
    hook: HeadHook
    config: SubstitutionConfig
    firings: Firings
    sample: Sample
    profile: HeadProfile


class SequenceTest(NamedTuple):
    """All conditions at the firings of one sequence."""

    session: Any
    writes: HeadWrites
    native: Factors  # N = firings
    atom: Factors  # as the decoder has it, at activation 1
    made: list[Condition]
    firings: pd.DataFrame

    @property
    def positions(self) -> list[int]:
        """Token t of each firing."""
        return self.firings["position"].tolist()


@torch.no_grad()
def run_substitution(
    model: Any,
    sae: Any,
    tokens: Tensor,
    config: SubstitutionConfig | None = None,
    progress: bool = True,
    *,
    parts: Path | None = None,
) -> SubstitutionResult:
    """Run the test for one SAE on evaluation sequences that neither model nor SAE was trained on.

    Args:
        model: a `HookedRecurrent`.
        sae: reads `blocks.{l}.mixer.heads.{h}.hook_write_vec` or `hook_state_vec` of the model, by its metadata.
        tokens: [N,T] token ids, all sequences of one length, without padding.
        config: what to sample, write and measure.
        progress: show progress bars.
        parts: a folder in which the rows of each sequence are kept as soon as they are measured. A later call with the
            same arguments reads them instead of measuring them again; the result is the same.

    Cost: N forwards up to the SAE's layer to find firings; per tested firing 2 + 7 * scales edited rows, each from
    t on for horizon + 1 tokens (some to the end, see `last_position_firings`), from the edited layer up.

    Raises:
        ValueError: the sequences are shorter than the horizon, no atom can be tested, or a hand-picked atom cannot.
    """
    begin = time.perf_counter()
    setup = prepare(model, sae, tokens, config or SubstitutionConfig(), progress=progress)
    frames = _kept(parts) if parts is not None else {}
    for test in sequence_tests(setup, progress, skip=frames.keys()):
        frame, sequence = _measured(setup, test), int(test.firings["sequence"].iloc[0])
        frames[sequence] = frame
        if parts is not None:
            write_aside(parts / f"{sequence}.parquet", lambda file, frame=frame: frame.to_parquet(file, index=False))
    whole = pd.concat([frames[sequence] for sequence in sorted(frames)], ignore_index=True)
    return SubstitutionResult(whole, _describe(setup, time.perf_counter() - begin))


def _kept(parts: Path) -> dict[int, pd.DataFrame]:
    """What an earlier call measured, by sequence."""
    parts.mkdir(parents=True, exist_ok=True)
    return {int(file.stem): pd.read_parquet(file) for file in parts.glob("[0-9]*.parquet")}


def prepare(model: Any, sae: Any, tokens: Tensor, config: SubstitutionConfig, *, progress: bool = False) -> Setup:
    """Find and draw the firings, and profile the head. The same arguments give the same firings and controls."""
    shortest = config.first_position + config.horizon + 1
    if tokens.ndim != 2 or tokens.shape[1] < shortest:
        found = list(tokens.shape)
        raise ValueError(f"tokens must be [N,T] with T >= {shortest} (horizon {config.horizon}), found {found}")
    hook = HeadHook.of(sae)
    firings = collect_firings(model, sae, tokens, progress=progress)
    sample = draw(firings, config)
    writes = (
        head_writes(model.recurrence(tokens[i : i + 1], hook.layer), hook.head, config.write)
        for i in range(min(config.mean_write_sequences, len(tokens)))
    )
    return Setup(model, sae, tokens, hook, config, firings, sample, head_profile(writes, config.mean_write_energy))


def sequence_tests(setup: Setup, progress: bool = False, skip: Container[int] = ()) -> Iterator[SequenceTest]:
    """The conditions of each sequence that has firings, one sequence at a time. Cost: one forward each."""
    table: Any = setup.sample.table
    groups = [(name, part) for name, part in table.groupby("sequence") if name not in skip]
    for _, part in bar(groups, "substitution", progress):
        sequence = int(part["sequence"].iloc[0])
        session = setup.model.edit_session(setup.tokens[sequence : sequence + 1])
        writes = head_writes(session.recurrence(setup.hook.layer), setup.hook.head, setup.config.write)
        native = writes.native.rows(part["position"].tolist())
        atom = _factors_of(setup, part["written_atom"].to_numpy(), native)
        activation = torch.tensor(part["activation"].to_numpy()).to(native.values)
        made = conditions(native, atom, activation, _controls(setup, writes, part, atom), setup.config.scales)
        yield SequenceTest(session, writes, native, atom, made, part)


def _measured(setup: Setup, test: SequenceTest) -> pd.DataFrame:
    """The rows of one sequence, in the columns of `substitution_result.COLUMNS`."""
    part, made, n = test.firings, test.made, len(test.firings)
    edits = [edits_of(setup.hook, setup.config, condition, test.native, test.positions) for condition in made]
    kl = measure(test.session, edits, test.positions, part["to_end"].tolist(), setup.config)
    described = part.drop(columns="to_end").assign(
        cosine=_array(cosine(test.atom, test.native)), write_norm=_array(norm(test.native))
    )
    table = pd.concat([described] * len(made), ignore_index=True)
    table["condition"] = np.repeat([condition.name for condition in made], n)
    table["scale"] = np.repeat([condition.scale for condition in made], n)
    zero = np.zeros(n, np.float32)
    table["norm"] = np.concatenate([_array(norm(c.written)) if c.written is not None else zero for c in made])
    return table.assign(**dict(zip(METRICS, kl.reshape(-1, len(METRICS)).T)))


def _controls(setup: Setup, writes: HeadWrites, part: pd.DataFrame, atom: Factors) -> dict[str, Factors]:
    """Directions of the controls that were asked for. Each control of each sequence draws from a seed of its own, so
    that batching, order and the presence of other controls change nothing."""
    sequence, position = int(part["sequence"].iloc[0]), part["position"].to_numpy()

    def rng(control: str) -> np.random.Generator:
        return np.random.default_rng([setup.config.seed, sequence, CONTROLS.index(control)])

    def states() -> tuple[Tensor, Tensor]:
        """States [M,K,V] after the M distinct positions, and which of them each firing has."""
        distinct, which = np.unique(position, return_inverse=True)  # several firings may share a position
        return writes.recurrence.states(positions=distinct.tolist())[0, :, 0], torch.tensor(which)

    def random() -> Factors:
        return random_directions(atom, torch.Generator().manual_seed(int(rng("random").integers(2**62))))

    def shuffled() -> Factors:
        active = [setup.firings.active(sequence, t) for t in position]
        taken = [np.append(atoms, own) for atoms, own in zip(active, part["written_atom"])]
        return _factors_of(
            setup, _others(rng("shuffled"), setup.sample.alive, taken, "an alive atom that does not fire there"), atom
        )

    def elsewhere() -> Factors:
        written = np.flatnonzero(_array(norm(writes.native)))
        chosen = _others(rng("elsewhere"), written, position[:, None], "a write at another position")
        return writes.native.rows(torch.tensor(chosen))

    def state() -> Factors:
        after, which = states()
        return state_direction(after[which] - writes.native.rows(position.tolist()).dense())

    def state_after() -> Factors:
        after, which = states()
        return state_direction(after).rows(which)

    def mean() -> Factors:
        return setup.profile.mean_write.expand(len(part))

    made = {"random": random, "shuffled": shuffled, "elsewhere": elsewhere, "mean": mean}
    made |= {"state": state, "state_after": state_after}
    return {name: made[name]() for name in setup.config.controls}


def _others(
    rng: np.random.Generator, among: NDArray[np.int64], taken: Iterable[NDArray[np.int64]], needed: str
) -> NDArray[np.int64]:
    """For each of the n arrays in `taken`, a uniform draw of `among` that is not in it."""
    rest = [np.setdiff1d(among, row) for row in taken]
    if any(len(choices) == 0 for choices in rest):
        raise NothingToMeasureError(
            f"a control needs {needed}, and there is none; leave 'shuffled' or 'elsewhere' out of controls"
        )
    return np.array([rng.choice(choices) for choices in rest])


def _factors_of(setup: Setup, atoms: NDArray[np.int64], like: Factors) -> Factors:
    found = atom_factors(setup.sae, atoms, like.keys.shape[-1], like.values.shape[-1])
    return Factors(found.keys.to(like.keys), found.values.to(like.values))


def _array(x: Tensor) -> NDArray[np.float32]:
    return x.cpu().numpy()


def _describe(setup: Setup, seconds: float) -> SubstitutionInfo:
    """What a reader must know of the test."""
    layer = setup.model.cfg.layer(setup.hook.layer)
    return SubstitutionInfo(
        config=setup.config,
        hook_name=setup.hook.name,
        layer=setup.hook.layer,
        head=setup.hook.head,
        target=setup.hook.target,
        rule=str(layer.rule),
        K=layer.K,
        V=layer.V,
        dtype=str(setup.model.cfg.dtype).removeprefix("torch."),
        model=str(setup.model.cfg.model_name),
        architecture=_architecture(setup.sae),
        d_sae=int(setup.sae.cfg.d_sae),
        n_alive=len(setup.sample.alive),
        alive_tokens=setup.sample.alive_tokens,
        n_testable=setup.sample.n_testable,
        n_sequences=len(setup.tokens),
        n_positions=setup.tokens.shape[1],
        half_life=setup.profile.half_life,
        half_life_limit=setup.profile.half_life_limit,
        mean_write_rank=setup.profile.mean_write.keys.shape[1],
        seconds=seconds,
    )


def _architecture(sae: Any) -> str:
    name = getattr(sae.cfg, "architecture", None)
    return str(name() if callable(name) else name or type(sae).__name__)
