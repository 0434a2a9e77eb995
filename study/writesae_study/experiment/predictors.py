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

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from hookpoints import EditSession, HookedRecurrent, Recurrence
from sae_lens_writesae.atom.low_rank import LowRank

PREDICTORS = ("F0", "F1", "F2")
"""The formulas, from the coarsest to the exact derivative."""

FORMULAS = {
    "F0": "the paper's: decay only, direct path, no norms",
    "F1": "exact propagation, direct path with its local Jacobian",
    "F2": "all first-order paths: every read, every later block",
}
"""What each formula takes into account."""


class Gradient(NamedTuple):
    """Gradient of the logit of one token at one position with respect to the reads of one head."""

    position: int
    reads: Tensor
    """[position + 1, V], of every read up to `position`, through everything after the read."""
    direct: Tensor
    """[V], of the read at `position`, along the direct path."""
    naive: Tensor
    """[V], of the same read by the weights of the direct path alone: W_O^h W_U[token], in float32 at least."""


class ReadGradients:
    """Backward passes from logits of one sequence to the reads of one head.

    The forward pass runs once, from the head's layer on; its graph stays until this object goes.

    Args:
        model: the hooked model.
        session: the plain pass over the sequence; its residual stream is where the forward begins.
        layer, head: the head.
        positions: the positions whose logits are wanted.

    Cost: one forward of the blocks from `layer` on with its activations kept; then one backward for each call of `at`.
    """

    def __init__(self, model: HookedRecurrent, session: EditSession, layer: int, head: int, positions: Sequence[int]):
        self.model, self.layer, self.head = model, layer, head
        self._index = {position: i for i, position in enumerate(sorted(set(positions)))}
        stop = max(self._index) + 1  # later tokens have no part in these logits
        names = (
            f"blocks.{layer}.mixer.hook_read",
            f"blocks.{layer}.hook_mixer_out",
            f"blocks.{model.cfg.n_layers - 1}.hook_resid_post",
        )
        seen: dict[str | None, Tensor] = {}

        def keep(value: Tensor, hook: HookPoint) -> Tensor:
            # The graph begins at the reads: what is below them has no part in the gradient.
            seen[hook.name] = value.detach().requires_grad_() if hook.name == names[0] else value
            return seen[hook.name]

        with torch.enable_grad():
            self._logits = model.run_with_hooks(
                session.residual(layer)[:, :stop],
                start_at_layer=layer,
                tokens=session.tokens[:, :stop],
                logits_to_keep=torch.tensor(sorted(self._index), device=session.tokens.device),
                fwd_hooks=[(name, keep) for name in names],
            )
        self._read, self._mixed, self._last = (seen[name] for name in names)

    @torch.enable_grad()
    def at(self, position: int, token: int) -> Gradient:
        """Gradients of the logit of a token at `position`, one of those that were asked for."""
        logit = self._logits[0, self._index[position], token]
        through_all, at_last = torch.autograd.grad(logit, [self._read, self._last], retain_graph=True)
        # On the direct path, what the mixer adds to the residual stream reaches the final norm unchanged.
        (direct,) = torch.autograd.grad(self._mixed[0, position], self._read, at_last[0, position], retain_graph=True)
        out = self.model.layer_W_O(self.layer)[self.head].detach()
        column = self.model.W_U[:, token].detach()
        wide = torch.promote_types(out.dtype, torch.float32)
        naive = out.to(wide) @ column.to(out.device, wide)
        reads = through_all[0, : position + 1, self.head]
        return Gradient(position, reads, direct[0, position, self.head], naive)


def predict(recurrence: Recurrence, added: LowRank, start: int, gradients: Sequence[Gradient]) -> Tensor:
    """[G,n,3]: what the formulas, in the order of `PREDICTORS`, say of n matrices added at `start`, for each of G
    gradients.

    Args:
        recurrence: factors of the one head (B = H = 1).
        added: n matrices.
        gradients: G of them, at positions >= start.

    Cost: two passes of `Recurrence.propagate` over the n R keys, from `start` to the last position.
    """
    stop = max(gradient.position for gradient in gradients) + 1
    exact = read_weights(recurrence, added.keys, start, stop)  # [n,R,S]
    decayed = read_weights(recurrence.without_erase(), added.keys, start, stop)
    values = added.values.to(exact)
    predictions = []
    for gradient in gradients:
        last = gradient.position - start  # the read whose logit is predicted
        f0 = (decayed[:, :, last] * (values @ gradient.naive.to(exact))).sum(1)
        f1 = (exact[:, :, last] * (values @ gradient.direct.to(exact))).sum(1)
        f2 = torch.einsum("nrs,nrv,sv->n", exact[:, :, : last + 1], values, gradient.reads[start:].to(exact))
        predictions.append(torch.stack([f0, f1, f2], 1))
    return torch.stack(predictions)


def read_weights(recurrence: Recurrence, keys: Tensor, start: int, stop: int) -> Tensor:
    """How much of its value an edit at `start` with `keys` [n,R,K] adds to each read: [n,R,stop-start], exact.

    The weight at s is <p_s, scale q_s>, where p_s is the key as decay and erase have carried it to s. The recurrence is
    that of one head (B = H = 1).
    """
    until_stop = recurrence.select(tokens=slice(0, stop))
    carried = until_stop.propagate(keys.flatten(0, 1), start, 0)[0]  # [nR,S,K]
    if until_stop.read_before_write:  # the read at s sees the state after s - 1
        carried = torch.nn.functional.pad(carried[:, :-1], (0, 0, 1, 0))
    reads = until_stop.scale * until_stop.q[0, start:, 0].to(carried)
    return (carried * reads).sum(-1).unflatten(0, keys.shape[:2])
