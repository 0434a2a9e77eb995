r"""Three formulas for the change of a logit by an atom that is added to a write; none has a fitted number.

A matrix E = sum_r x_r y_r^T is added to the write of head h at token t. The change of the logit of token `tok` at
position t' >= t, to first order in E:

* F0, the paper's: sum_r <gate x_r, scale q_t'> <y_r, W_O^h W_U[tok]>, where the gate is the product of the decays
  alpha_{t+1} .. alpha_t' (one number per head, or one per key channel, then inside the inner product). The erase, the
  head's norm and gate, the final norm, and all reads but the last are ignored.
* F1: sum_r <p_r, scale q_t'> <d logit / d o_t' along the direct path, y_r>, where p_r is x_r carried exactly by decay
  and erase (`Recurrence.propagate`) and the direct path leads from the read through what the mixer does after it
  (head norm, gate, output projection), past every later block and MLP, to the final norm and the unembedding; each
  enters with its Jacobian on the native run.
* F2: sum_r sum_{s=t..t'} <p_r(s), scale q_s> <d logit / d o_s, y_r>, over all reads from t to t' and through all later
  blocks: the exact derivative, so what is left is of second order in E.

The q, k, u and decays of a layer do not depend on its own state, which makes the change of the reads o_s exact.
Source of F0: WriteSAE (arXiv 2605.12770), its closed form of the logit change.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_lens_writesae.atom.low_rank import LowRank

PREDICTORS = ("F0", "F1", "F2")

DEFINITIONS = {
    "F0": "the paper's: decay only, direct path, no norms",
    "F1": "exact propagation, direct path with its local Jacobian",
    "F2": "all first-order paths: every read, every later block",
}


class Gradient(NamedTuple):
    """d (direction . logits at `position`) / d reads of one head."""

    position: int
    reads: Tensor
    """[position + 1, V], through everything after the read."""
    direct: Tensor
    """[V], of the read at `position`, along the direct path."""


class Predictions(NamedTuple):
    """What the formulas say of n added matrices: [n] each."""

    F0: Tensor
    F1: Tensor
    F2: Tensor


class ReadGradients:
    """Backward passes from logits of one sequence to the reads of one head.

    The forward pass runs once, from the head's layer on; its graph is kept until this object goes.

    Args:
        session: an `EditSession`; its residual stream is where the pass begins.
        positions: the positions whose logits are wanted.

    Cost: one forward of the blocks from `layer` on with its activations kept; then per call of `at` one backward.
    """

    def __init__(self, model: Any, session: Any, layer: int, head: int, positions: list[int]):
        self.head = head
        self._where = {position: i for i, position in enumerate(sorted(set(positions)))}
        stop = max(self._where) + 1
        seen: dict[str, Tensor] = {}

        def keep(value: Tensor, hook: Any) -> None:
            seen[str(hook.name)] = value

        def cut(value: Tensor, hook: Any) -> Tensor:
            seen[str(hook.name)] = value.detach().requires_grad_()
            return seen[str(hook.name)]

        read, mixed = f"blocks.{layer}.mixer.hook_read", f"blocks.{layer}.hook_mixer_out"
        last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
        with torch.enable_grad():
            logits = model.run_with_hooks(
                session.residual(layer)[:, :stop],
                start_at_layer=layer,
                tokens=session.tokens[:, :stop],
                logits_to_keep=torch.tensor(sorted(self._where), device=session.tokens.device),
                fwd_hooks=[(read, cut), (mixed, keep), (last, keep)],
            )
        self._read, self._mixed, self._last, self._logits = seen[read], seen[mixed], seen[last], logits

    @torch.enable_grad()
    def at(self, position: int, direction: Tensor) -> Gradient:
        """Gradients of `direction` [vocab] . logits at `position`."""
        wanted = self._logits[0, self._where[position]]
        ends = [self._read, self._last]
        whole, final = torch.autograd.grad(wanted, ends, direction.to(wanted), retain_graph=True)
        # What the mixer adds reaches the final norm unchanged.
        mixed = self._mixed[0, position]
        (direct,) = torch.autograd.grad(mixed, self._read, final[0, position], retain_graph=True)
        return Gradient(position, whole[0, : position + 1, self.head], direct[0, position, self.head])


def predict(recurrence: Any, added: LowRank, start: int, gradients: list[Gradient], naive: Tensor) -> list[Predictions]:
    """The three formulas for n matrices added at `start`, for each of several gradients at positions >= start.

    Args:
        recurrence: factors of the one head (B = H = 1).
        added: n matrices, keys [n,R,K], values [n,R,V].
        gradients: G of them.
        naive: [G,V], W_O^h W_U d for the direction d of each gradient: F0's value side.
    """
    stop = max(gradient.position for gradient in gradients) + 1
    exact = read_weights(recurrence, added.keys, start, stop)  # [n,R,S]
    decayed = read_weights(recurrence.without_erase(), added.keys, start, stop)
    values = added.values.to(exact)
    found = []
    for gradient, direction in zip(gradients, naive, strict=True):
        here = gradient.position - start
        reads = gradient.reads[start:].to(exact)  # [S',V]
        found.append(
            Predictions(
                F0=(decayed[:, :, here] * (values @ direction.to(exact))).sum(1),
                F1=(exact[:, :, here] * (values @ gradient.direct.to(exact))).sum(1),
                F2=torch.einsum("nrs,nrv,sv->n", exact[:, :, : here + 1], values, reads),
            )
        )
    return found


def read_weights(recurrence: Any, keys: Tensor, start: int, stop: int) -> Tensor:
    """<p_s, scale q_s> for s = start..stop-1: how much of its value an edit with `keys` [n,R,K] at `start` adds to each
    read, [n,R,stop-start]. Of a head alone (B = H = 1); exact."""
    part = recurrence.select(tokens=slice(0, stop))
    carried = part.propagate(keys.flatten(0, 1), start, 0)[0]  # [nR,S,K]
    reads = part.scale * part.q[0, start:, 0].to(carried)
    if part.read_before_write:  # the read at s sees the state after s - 1
        weights = torch.cat([torch.zeros_like(carried[:, :1, 0]), (carried[:, :-1] * reads[1:]).sum(-1)], 1)
    else:
        weights = (carried * reads).sum(-1)
    return weights.unflatten(0, keys.shape[:2])
