"""The spread of a substitution over the next tokens, against states and residual streams of full forwards."""

from typing import Any

import numpy as np
import pytest
import torch
from test_substitution import HEAD, LAYER, SMALL, make_sae, model, tokens  # noqa: F401  (fixtures)
from torch import Tensor

from sae_lens_writesae.multistep import multistep_divergence
from sae_lens_writesae.substitution_config import SubstitutionConfig

CONFIG = SubstitutionConfig(**SMALL.to_dict() | {"controls": ("mean",), "scales": ("matched",), "n_atoms": 2})


@pytest.fixture(scope="module")
def steps(model: Any, tokens: Tensor) -> Any:  # noqa: F811
    return multistep_divergence(model, make_sae(model), tokens, CONFIG, n_steps=4, progress=False)


def test_deletion_follows_the_model(model: Any, tokens: Tensor, steps: Any) -> None:  # noqa: F811
    """States and residual stream of a full forward in which hook_write gives 0 at t."""
    one = steps[(steps["condition"] == "delete") & (steps["firing"] == 1)]
    t, sequence = int(one["position"].iloc[0]), tokens[int(one["sequence"].iloc[0])][None]
    head = f"blocks.{LAYER}.mixer.heads.{HEAD}."
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"

    def silence(writes: Tensor, hook: Any) -> Tensor:
        writes = writes.clone()
        writes[0, t] = 0
        return writes

    with torch.no_grad():
        _, native = model.run_with_cache(sequence, names_filter=[head + "hook_state", last])
        with model.hooks(fwd_hooks=[(head + "hook_write", silence)]):
            _, edited = model.run_with_cache(sequence, names_filter=[last])
        # the state itself, by the rule: S_t = (diag(alpha) + a b^T) S_{t-1} + k u^T without the write at t
        r = model.recurrence(sequence, LAYER).select(heads=slice(HEAD, HEAD + 1))
        u = r.u.clone()
        u[0, t] = 0
        states = r.replace(u=u).states()[0, :, 0]
    stretch = slice(t, t + 5)
    native_states = native[head + "hook_state"][0, stretch]
    gap = torch.linalg.matrix_norm(states[stretch] - native_states) / torch.linalg.matrix_norm(native_states)
    np.testing.assert_allclose(one["state_gap"], gap, rtol=1e-8)
    cosine = torch.cosine_similarity(native[last][0, stretch], edited[last][0, stretch], dim=-1)
    np.testing.assert_allclose(one["residual_cosine"], cosine, rtol=1e-9)
    assert (one["residual_cosine"] < 1 - 1e-12).any()


def test_a_no_op_changes_nothing_and_every_condition_is_followed(steps: Any) -> None:
    noop = steps[steps["condition"] == "native"]
    assert noop["state_gap"].max() < 1e-12 and noop["residual_cosine"].min() > 1 - 1e-12
    assert steps["step"].max() == 4 and set(steps["condition"]) == {"native", "delete", "atom", "mean"}
    assert (steps.groupby(["firing", "condition", "scale"]).size() == 5).all()
    assert steps.loc[steps["condition"] == "delete", "state_gap"].gt(0).all()


def test_steps_stay_within_the_horizon(model: Any, tokens: Tensor) -> None:  # noqa: F811
    with pytest.raises(ValueError, match="at most the horizon of 5"):
        multistep_divergence(model, make_sae(model), tokens, CONFIG, n_steps=6)
