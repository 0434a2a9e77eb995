"""Each rule of the plug-in against its op, written token by token in float64; and hookpoints with the plug-in there."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from hookpoints_rare import COMBA, GATED_DELTA_2, HGRN, RETNET, SIMPLE_GLA
from ops import (
    B,
    Case,
    H,
    K,
    T,
    V,
    assert_canonical_form_is_the_op,
    assert_each_factor_can_be_fed,
    token_by_token,
    unit,
)
from recurrences import drawn
from torch import Tensor

FOLDER = Path(__file__).parent


def comba(q, k, p, v, g, beta, initial_state, output_final_state, use_qk_l2norm_in_kernel):
    """What p reads back is taken off before the decay acts on the state; one key head serves H / 2 value heads."""
    if use_qk_l2norm_in_kernel:
        q, k, p = map(unit, (q, k, p))
    q, k, p = (x.repeat_interleave(H // x.shape[2], 2) for x in (q, k, p))

    def step(t: int, S: Tensor) -> tuple[Tensor, Tensor]:
        value = beta[:, t, :, None] * (v[:, t] - torch.einsum("bhkv,bhk->bhv", S, p[:, t]))
        S = g[:, t].exp()[..., None, None] * S + torch.einsum("bhk,bhv->bhkv", k[:, t], value)
        return S, torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5

    return token_by_token(initial_state, T, step)


def gated_delta_2(q, k, v, g, b, w, initial_state, output_final_state, use_qk_l2norm_in_kernel):
    """The decay, then the erase by the gated key, then the write of the gated value."""
    if use_qk_l2norm_in_kernel:
        q, k = unit(q), unit(k)

    def step(t: int, S: Tensor) -> tuple[Tensor, Tensor]:
        S = g[:, t].exp()[..., None] * S
        value = w[:, t] * v[:, t] - torch.einsum("bhkv,bhk->bhv", S, b[:, t] * k[:, t])
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], value)
        return S, torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5

    return token_by_token(initial_state, T, step)


def simple_gla(q, k, v, initial_state, output_final_state, g=None, g_gamma=None):
    """One decay for each token and head, for each head, or none."""
    decay = torch.zeros(B, T, H) if g is None and g_gamma is None else (g_gamma if g is None else g).expand(B, T, H)

    def step(t: int, S: Tensor) -> tuple[Tensor, Tensor]:
        S = decay[:, t, :, None, None].exp() * S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        return S, torch.einsum("bhkv,bhk->bhv", S, q[:, t]) * K**-0.5

    return token_by_token(initial_state, T, step)


def retention(q, k, v, initial_state, output_final_state):
    """Head h decays by 1 - 2^(-5-h)."""
    gamma = torch.tensor([1 - 2.0 ** (-5 - head) for head in range(H)], dtype=torch.float64)
    return simple_gla(q, k, v, initial_state, output_final_state, g_gamma=gamma.log())


def hgrn(x, g, initial_state, output_final_state):
    """A vector, each channel of which decays by itself."""

    def step(t: int, s: Tensor) -> tuple[Tensor, Tensor]:
        s = g[:, t].exp() * s + x[:, t]
        return s, s

    return token_by_token(initial_state, T, step)


def call(*heads: int, **arguments: object) -> dict[str, object]:
    """Arguments that all of fla's matrix ops have; ``heads`` of keys, where they are fewer."""
    q, k, p = (drawn(i, B, T, *(heads or (H,)), K) for i in range(3))
    shared = {"q": q, "k": k, "v": drawn(3, B, T, H, V), "initial_state": drawn(4, B, H, K, V)}
    return {**shared, "p": p, "output_final_state": True, "use_qk_l2norm_in_kernel": True, **arguments}


def gates(seed: int, *shape: int) -> Tensor:
    """Log-decays."""
    return -drawn(seed, B, T, *shape).abs()


def gated_delta_2_call() -> dict[str, object]:
    return call(g=gates(5, H, K), b=2 * drawn(6, B, T, H, K).sigmoid(), w=drawn(7, B, T, H, V).sigmoid())


def hgrn_call() -> dict[str, object]:
    return {"x": drawn(0, B, T, V), "g": gates(1, V), "initial_state": drawn(2, B, V), "output_final_state": True}


CASES = {
    "comba": Case(COMBA, comba, lambda: call(2, g=gates(5, H), beta=drawn(6, B, T, H).sigmoid())),
    "gated_deltanet2": Case(GATED_DELTA_2, gated_delta_2, gated_delta_2_call),
    "simple_gla": Case(SIMPLE_GLA, simple_gla, lambda: call(g=gates(5, H))),
    "simple_gla by head": Case(SIMPLE_GLA, simple_gla, lambda: call(g_gamma=-drawn(5, H).abs())),
    "simple_gla without decay": Case(SIMPLE_GLA, simple_gla, call),
    "retnet": Case(RETNET, retention, call),
    "hgrn": Case(HGRN, hgrn, hgrn_call, sizes=(1, 1, V)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_the_rule_is_its_op(case: Case):
    assert_canonical_form_is_the_op(case)
    assert_each_factor_can_be_fed(case)


def test_installed_it_lifts_what_hookpoints_refuses(tmp_path: Path):
    """In an interpreter that imports the plug-in first, which must not wait for the rules that wait for it."""
    points = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["entry-points"]["hookpoints.rules"]
    info = tmp_path / "hookpoints_rare-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: hookpoints-rare\nVersion: 0.1.0\n")
    entries = [f"{name} = {target}" for name, target in points.items()]
    (info / "entry_points.txt").write_text("\n".join(["[hookpoints.rules]", *entries]))
    code = (
        "import hookpoints_rare\nfrom hookpoints.rules.known import *\nprint(*(r.name for r in RULES[-5:]), *REFUSED)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(FOLDER), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {rule.name for rule in (COMBA, GATED_DELTA_2, HGRN, RETNET, SIMPLE_GLA)} <= {*done.stdout.split(" ")} | {
        "Gated DeltaNet-2"
    }
    assert not points.keys() & {*done.stdout.split()}
