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
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from sae_lens_writesae.conditions import (
    CONTROLS,
    Factors,
    conditions,
    cosine,
    norm,
    random_directions,
    state_direction,
)
from sae_lens_writesae.firings import (
    Firings,
    HeadHook,
    atom_factors,
    collect_firings,
    sample_firings,
    silent_positions,
)
from sae_lens_writesae.head_memory import HeadProfile, HeadWrites, head_profile, head_writes
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_edits import edits_of, measure
from sae_lens_writesae.substitution_result import METRICS, SubstitutionInfo, SubstitutionResult


class _Test(NamedTuple):
    """What stays the same over all sequences."""

    model: Any
    sae: Any
    hook: HeadHook
    config: SubstitutionConfig
    alive: NDArray[np.int64]
    profile: HeadProfile


class _Sample(NamedTuple):
    """Which firings are tested, and out of how many atoms."""

    table: pd.DataFrame  # firing, sequence, position, atom, written_atom, activation, to_end; ordered by place
    alive: NDArray[np.int64]
    n_testable: int
    alive_tokens: int


@torch.no_grad()
def run_substitution(
    model: Any, sae: Any, tokens: Tensor, config: SubstitutionConfig | None = None, progress: bool = True
) -> SubstitutionResult:
    """Run the test for one SAE on evaluation sequences that neither model nor SAE was trained on.

    Args:
        model: a `HookedRecurrent`.
        sae: reads `blocks.{l}.mixer.heads.{h}.hook_write_vec` or `hook_state_vec` of the model (in its
        metadata). tokens: [N,T] token ids, all sequences of one length, without padding. config: what to
        sample, write and measure.

    Cost: N forwards up to the SAE's layer to find firings; per tested firing 2 + 6 * scales edited rows, each
    from t on and from the edited layer up.

    Raises:
        ValueError: the sequences are shorter than the horizon, no atom can be tested, or a hand-picked atom
        is unknown.
    """
    begin = time.perf_counter()
    config = config or SubstitutionConfig()
    if tokens.ndim != 2 or tokens.shape[1] < config.first_position + config.horizon + 1:
        need = config.first_position + config.horizon + 1
        raise ValueError(
            f"tokens must be [N,T] with T >= {need} (horizon {config.horizon}), found {list(tokens.shape)}"
        )
    hook = HeadHook.of(sae)
    sample = draw(collect_firings(model, sae, tokens, progress=progress), config)
    reference = (
        head_writes(model.recurrence(tokens[i : i + 1], hook.layer), hook.head, config.write)
        for i in range(min(config.mean_write_sequences, len(tokens)))
    )
    profile = head_profile(reference, config.mean_write_energy)
    test = _Test(model, sae, hook, config, sample.alive, profile)
    frames = []
    groups = list(sample.table.groupby("sequence"))
    for sequence, part in tqdm(groups, desc="substitution", disable=not progress):
        frames.append(_run_sequence(test, tokens[int(sequence) : int(sequence) + 1], part))  # pyright: ignore[reportArgumentType]
    frame = pd.concat(frames, ignore_index=True)
    return SubstitutionResult(frame, _describe(test, tokens, sample, time.perf_counter() - begin))


def draw(firings: Firings, config: SubstitutionConfig) -> _Sample:
    """Alive atoms, a uniform draw of those that can be tested, and their firings."""
    rng = np.random.default_rng(config.seed)
    last = firings.n_positions - 1 - config.horizon
    alive_tokens = min(config.alive_tokens, firings.n_sequences * firings.n_positions)
    alive = firings.alive(alive_tokens, config.min_firings)
    inside = (firings.position >= config.first_position) & (firings.position <= last)
    testable = np.intersect1d(alive, firings.atom[inside])
    if len(testable) == 0:
        raise ValueError(
            f"no atom can be tested: {len(alive)} of {firings.n_atoms} fire on {alive_tokens} tokens, none of them "
            f"at positions {config.first_position}..{last}"
        )
    chosen = testable if config.atoms is None else _hand_picked(config.atoms, firings, testable)
    if config.atoms is None and config.n_atoms is not None:
        chosen = np.sort(rng.choice(testable, min(config.n_atoms, len(testable)), replace=False))
    bounds = {"first": config.first_position, "last": last}
    table = sample_firings(firings, chosen, config.firings_per_atom, **bounds, rng=rng)
    if config.positions == "silent":
        table = silent_positions(table, firings, **bounds, rng=rng)
    table["written_atom"] = table["atom"]
    if config.atom_choice == "argmax":
        strongest = firings.strongest(table).dropna()
        table = table.loc[strongest.index]
        table = table.assign(written_atom=strongest["atom"].astype(int), activation=strongest["activation"])
    table = table.reset_index(drop=True).rename_axis("firing").reset_index()
    n_last = len(table) if config.last_position_firings is None else config.last_position_firings
    table["to_end"] = rng.permutation(len(table)) < n_last
    return _Sample(table, alive, len(testable), alive_tokens)


def _hand_picked(atoms: tuple[int, ...], firings: Firings, testable: NDArray[np.int64]) -> NDArray[np.int64]:
    missing = [i for i in atoms if i not in testable]
    if missing:
        raise ValueError(
            f"atoms {missing} cannot be tested: the SAE has {firings.n_atoms} atoms, and these are not alive or fire "
            "only outside of the tested positions"
        )
    return np.array(atoms)


def _run_sequence(test: _Test, tokens: Tensor, part: pd.DataFrame) -> pd.DataFrame:
    """All conditions of the firings of one sequence."""
    session = test.model.edit_session(tokens)
    writes = head_writes(session.recurrence(test.hook.layer), test.hook.head, test.config.write)
    position = torch.tensor(part["position"].to_numpy())
    native = writes.native.rows(position)
    atom = _factors_of(test, part["written_atom"].to_numpy(), native)
    activation = torch.tensor(part["activation"].to_numpy()).to(native.values)
    made = conditions(native, atom, activation, _controls(test, writes, part, atom), test.config.scales)
    positions, to_end = position.tolist(), part["to_end"].tolist()
    edits = [edits_of(test.hook, test.config, condition, native, positions) for condition in made]
    kl = measure(session, edits, positions, to_end, test.config)
    described = part.drop(columns="to_end").assign(cosine=_array(cosine(atom, native)), write_norm=_array(norm(native)))
    table = pd.concat([described] * len(made), ignore_index=True)
    table["condition"] = np.repeat([condition.name for condition in made], len(part))
    table["scale"] = np.repeat([condition.scale for condition in made], len(part))
    zero = np.zeros(len(part), np.float32)
    table["norm"] = np.concatenate([_array(norm(c.written)) if c.written is not None else zero for c in made])
    return table.assign(**dict(zip(METRICS, kl.reshape(-1, len(METRICS)).T)))


def _controls(test: _Test, writes: HeadWrites, part: pd.DataFrame, atom: Factors) -> dict[str, Factors]:
    """Directions of the controls that were asked for. Each control of each sequence draws from a seed of its
    own, so
    that batching, order and the presence of other controls change nothing."""
    sequence, position = int(part["sequence"].iloc[0]), part["position"].to_numpy()

    def rng(control: str) -> np.random.Generator:
        return np.random.default_rng([test.config.seed, sequence, CONTROLS.index(control)])

    def random() -> Factors:
        return random_directions(atom, torch.Generator().manual_seed(int(rng("random").integers(2**62))))

    def shuffled() -> Factors:
        taken = part[["atom", "written_atom"]].to_numpy()
        return _factors_of(test, _others(rng("shuffled"), test.alive, taken, "a second alive atom"), atom)

    def elsewhere() -> Factors:
        written = np.flatnonzero(_array(norm(writes.native)))
        chosen = _others(rng("elsewhere"), written, position[:, None], "a write at another position")
        return writes.native.rows(torch.tensor(chosen))

    def state() -> Factors:
        distinct, which = np.unique(position, return_inverse=True)  # several firings may share a position
        states = writes.recurrence.states(positions=distinct.tolist())[0, :, 0]
        return state_direction(states).rows(torch.tensor(which))

    def mean() -> Factors:
        return test.profile.mean_write.expand(len(part))

    made = {"random": random, "shuffled": shuffled, "elsewhere": elsewhere, "state": state, "mean": mean}
    return {name: made[name]() for name in test.config.controls}


def _others(
    rng: np.random.Generator, among: NDArray[np.int64], taken: NDArray[np.int64], needed: str
) -> NDArray[np.int64]:
    """For each row of `taken` [n,m], a uniform draw of `among` that is not in the row."""
    rest = [np.setdiff1d(among, row) for row in taken]
    if any(len(choices) == 0 for choices in rest):
        raise ValueError(
            f"a control needs {needed}, and there is none; leave 'shuffled' or 'elsewhere' out of controls"
        )
    return np.array([rng.choice(choices) for choices in rest])


def _factors_of(test: _Test, atoms: NDArray[np.int64], like: Factors) -> Factors:
    found = atom_factors(test.sae, atoms, like.keys.shape[-1], like.values.shape[-1])
    return Factors(found.keys.to(like.keys), found.values.to(like.values))


def _array(x: Tensor) -> NDArray[np.float32]:
    return x.cpu().numpy()


def _describe(test: _Test, tokens: Tensor, sample: _Sample, seconds: float) -> SubstitutionInfo:
    """What a reader must know of the test."""
    layer = test.model.cfg.layer(test.hook.layer)
    return SubstitutionInfo(
        config=test.config,
        hook_name=test.hook.name,
        layer=test.hook.layer,
        head=test.hook.head,
        target=test.hook.target,
        rule=str(layer.rule),
        K=layer.K,
        V=layer.V,
        dtype=str(test.model.cfg.dtype).removeprefix("torch."),
        model=str(getattr(test.model.cfg, "model_name", "")),
        architecture=_architecture(test.sae),
        d_sae=int(test.sae.cfg.d_sae),
        n_alive=len(sample.alive),
        alive_tokens=sample.alive_tokens,
        n_testable=sample.n_testable,
        n_sequences=len(tokens),
        n_positions=tokens.shape[1],
        half_life=test.profile.half_life,
        half_life_limit=test.profile.half_life_limit,
        mean_write_rank=test.profile.mean_write.keys.shape[1],
        seconds=seconds,
    )


def _architecture(sae: Any) -> str:
    name = getattr(sae.cfg, "architecture", None)
    return str(name() if callable(name) else name or type(sae).__name__)
