"""The computed matrices, the folds, and what the config refuses."""

import inspect
import re
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from saes import untrained_sae

from sae_lens_writesae import sae as S
from sae_lens_writesae.sae.target import HeadHook, decoder_atoms

K, V, D_IN, F = 5, 6, 30, 12


# ---------------------------------------------------------------------------------------- views and atoms


def test_hook_names() -> None:
    hook = HeadHook.parse("blocks.12.mixer.heads.3.hook_state_vec")
    assert hook[1:] == (12, 3, "state") and hook.cell == "L12H3"
    for other in ("blocks.1.hook_resid_pre", "blocks.1.mixer.heads.2.hook_write", f"x{hook.name}"):
        with pytest.raises(ValueError, match="hook_write_vec"):
            HeadHook.parse(other)


def test_atoms_of_another_package_are_those_of_its_decoder() -> None:
    v, w = torch.randn(6, 2, 3), torch.randn(6, 2, 5)
    flat = decoder_atoms(cast(Any, SimpleNamespace(W_dec=(v.mT @ w).flatten(1))), np.array([4, 1]), 3, 5)
    torch.testing.assert_close(flat.dense(), (v.mT @ w)[[4, 1]])


# ---------------------------------------------------------------------------------------- folds


def test_whitening_is_refused() -> None:
    eye = torch.eye(D_IN, dtype=torch.float64)
    with pytest.raises(NotImplementedError, match="expected_average"):
        untrained_sae("writesae_topk", d_in=D_IN, d_sae=F, d_k=K).fold_activation_whitening(eye[0], eye, eye)


WRITES_TO_WEIGHTS = re.compile(r"(?<!scaled_)W_(enc|dec)(\.data|\s*=[^=])|state_dict\[.W_(enc|dec)|_fold_norm_topk")


@pytest.mark.parametrize("sae_class", [pair[0] for pair in [*S.INFERENCE.values(), *S.TRAINING.values()]])
def test_no_method_of_saelens_that_writes_to_weights_is_left(sae_class: type) -> None:
    n_writers = 0
    for position, base in enumerate(sae_class.__mro__):
        if not base.__module__.startswith("sae_lens."):
            continue
        for name, method in vars(base).items():
            if inspect.isfunction(method) and WRITES_TO_WEIGHTS.search(inspect.getsource(method)):
                n_writers += 1
                ours = [c for c in sae_class.__mro__[:position] if c.__module__.startswith("sae_lens_writesae")]
                shadows = [vars(c)[name] for c in ours if name in vars(c)]
                if (base.__name__, name) == ("TrainingSAE", "initialize_weights"):
                    continue  # it scales copies, of atoms that have their norm already
                assert shadows, f"{base.__name__}.{name} writes through a view and nothing of ours comes before it"
                # The last of ours before it must not pass the call on, unless it takes the result back.
                passed = f"super().{name}" in inspect.getsource(shadows[-1])
                assert passed == (name == "process_state_dict_for_saving_inference")
    assert n_writers >= 4, "SAELens has changed: look for how it writes to its weights now"


# ---------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"decoder_init_norm": 0.0}, "decoder_init_norm=0.0"),
        ({"loss_weight": 1.5}, "loss_weight=1.5"),
        ({"k": 13}, "k=13"),
        ({"rescale_acts_by_decoder_norm": False}, "unit_norm_every=100"),
        ({"decoder_init": "bad", "b_dec_rows": None}, "decoder_init='bad'"),  # the first one is named
        ({"d_k": 4}, "d_in=30"),
        ({"d_k": 0, "d_v": 0}, "d_k=0"),
        ({"rank": 6}, "rank=6"),
        ({"encoder": "linear"}, "encoder='linear'"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations='layer_norm'"),
        ({"reshape_activations": "hook_z"}, "reshape_activations='hook_z'"),
    ],
)
def test_configs_refuse_what_matrix_atoms_cannot_be(fields: dict, message: str) -> None:
    shape = {"d_in": D_IN, "d_sae": F, "d_k": K, "d_v": V}
    name, got = message.split("=")
    with pytest.raises(ValueError, match=f"^{name}: expected .*, got {got}$"):
        S.WriteTopKTrainingSAEConfig(**(shape | {"k": 4} | fields))


def test_one_width_of_a_matrix_is_enough() -> None:
    for sides in ({"d_k": K}, {"d_v": V}):
        cfg = S.WriteTopKTrainingSAEConfig(d_in=D_IN, d_sae=F, k=4, **sides)
        assert (cfg.d_k, cfg.d_v) == (K, V)
