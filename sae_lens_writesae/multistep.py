"""How one substitution spreads over the next tokens: through the state of its own head, and through the model."""

from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from sae_lens_writesae.conditions import Condition, Factors, norm, scaled
from sae_lens_writesae.substitution import SequenceTest, Setup, prepare, sequence_tests
from sae_lens_writesae.substitution_config import SubstitutionConfig
from sae_lens_writesae.substitution_edits import edits_of


@torch.no_grad()
def multistep_divergence(
    model: Any,
    sae: Any,
    tokens: Tensor,
    config: SubstitutionConfig | None = None,
    *,
    n_steps: int = 10,
    progress: bool = True,
) -> pd.DataFrame:
    """Follow each condition for `n_steps` tokens after t. The same config gives the firings of `run_substitution`.

    Returns: one row per firing, condition, scale and step s = 0..n_steps, with

    * `state_gap`: Frobenius norm of the change of the edited head's state after token t + s, over the norm of the
      native state there. Exact: the change obeys the same linear recurrence. (States of later layers change too; they
      are not in it.)
    * `residual_cosine`: cosine of the edited and the native residual stream after the last block at t + s.

    Cost: one edited row per firing and condition, n_steps + 1 tokens long.
    """
    config = config or SubstitutionConfig()
    if not 1 <= n_steps <= config.horizon:
        raise ValueError(f"n_steps must be at least 1 and at most the horizon of {config.horizon}, found {n_steps}")
    setup = prepare(model, sae, tokens, config, progress=progress)
    return pd.concat([_followed(setup, test, n_steps) for test in sequence_tests(setup, progress)], ignore_index=True)


def _followed(setup: Setup, test: SequenceTest, n_steps: int) -> pd.DataFrame:
    """All firings of one sequence."""
    name = f"blocks.{setup.model.cfg.n_layers - 1}.hook_resid_post"
    _, cache = setup.model.run_with_cache(test.session.tokens, names_filter=[name])
    edits = [edits_of(setup.hook, setup.config, condition, test.native, test.positions) for condition in test.made]
    frames = []
    for n, t in enumerate(test.positions):
        stop = t + n_steps + 1
        residual = _edited_residuals(setup.model, test.session, name, [per_firing[n] for per_firing in edits], stop)
        cosines = torch.cosine_similarity(residual, cache[name][:, t:stop], dim=-1)  # [C,S]
        gaps = _state_gaps(test, n, t, stop)
        firing = test.firings.iloc[n][["firing", "sequence", "position", "atom"]]
        for c, condition in enumerate(test.made):
            names = firing.to_dict() | {"condition": condition.name, "scale": condition.scale}
            steps = {"step": np.arange(n_steps + 1), "state_gap": gaps[c], "residual_cosine": cosines[c].cpu().numpy()}
            frames.append(pd.DataFrame(names | steps))
    return pd.concat(frames, ignore_index=True)


def _edited_residuals(model: Any, session: Any, name: str, edits: list[Any], stop: int) -> Tensor:
    """[C,S,D] residual stream at `name` of each edited run, from the edit to `stop`."""
    seen: list[Tensor] = []
    with model.hooks(fwd_hooks=[(name, lambda value, hook: seen.append(value))]):
        session.run(edits, stop=stop, batch_size=len(edits))
    return seen[-1]  # earlier ones are of the prefix


def _state_gaps(test: SequenceTest, n: int, t: int, stop: int) -> np.ndarray:
    """[C,S] relative change of the head's state under each condition of firing n."""
    changes = [_change(condition, test.native, n) for condition in test.made]
    recurrence = test.writes.recurrence.select(tokens=slice(0, stop))
    keys = recurrence.propagate(torch.cat([change.keys[0] for change in changes]), t, 0)[0]  # [R,S,K]
    native = torch.linalg.matrix_norm(recurrence.states(positions=list(range(t, stop)))[0, :, 0])  # [S]
    gaps = []
    for change in changes:
        own, keys = keys.split([change.keys.shape[1], len(keys) - change.keys.shape[1]])
        gaps.append(norm(Factors(own.transpose(0, 1), change.values.expand(stop - t, -1, -1))) / native)
    return torch.stack(gaps).cpu().numpy()


def _change(condition: Condition, native: Factors, n: int) -> Factors:
    """What a condition adds to the native write of firing n (a single matrix)."""
    gone = scaled(native.rows([n]), -torch.ones_like(native.values[:1, 0, 0]))
    if condition.written is None:
        return gone
    written = condition.written.rows([n])
    return Factors(torch.cat([written.keys, gone.keys], 1), torch.cat([written.values, gone.values], 1))
