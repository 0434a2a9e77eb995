"""hookpoints, and SAELens' store on its hooks."""

from __future__ import annotations

import torch
from tool_probes.truth import FAMILIES, HEAD, LAYER, NEW_TOKENS, PROMPT, ROWS, SOURCE, TOKEN
from torch import Tensor, nn

from hookpoints import HookedRecurrent, WriteEdit


class Hookpoints:
    """The same calls in every family."""

    mixer = f"blocks.{LAYER}.mixer."

    def __init__(self, model: nn.Module):
        self.model = HookedRecurrent.from_hf(model)

    def _cached(self, tokens: Tensor, name: str) -> Tensor:
        return self.model.run_with_cache(tokens, names_filter=self.mixer + name)[1][self.mixer + name]

    def write(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_write")

    def state(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_state")

    def pattern(self, tokens: Tensor) -> Tensor:
        return self._cached(tokens, "hook_pattern")

    def _edited(self, tokens: Tensor, edits: list[WriteEdit]) -> Tensor:
        before = self.model(tokens)[:, :TOKEN].expand(len(edits), -1, -1)  # an edited run begins at its first edit
        return torch.cat([before, self.model.run_with_edits(tokens, edits).logits], dim=1)

    def delete(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, [WriteEdit(LAYER, HEAD, TOKEN, mode="delete")])

    def replace(self, tokens: Tensor) -> Tensor:
        r = self.model.recurrence(tokens, layer=LAYER)
        edit = WriteEdit(LAYER, HEAD, TOKEN, r.k[0, SOURCE, HEAD], r.u[0, SOURCE, HEAD], mode="replace")
        return self._edited(tokens, [edit])

    def batch(self, tokens: Tensor) -> Tensor:
        return self._edited(tokens, [WriteEdit(LAYER, HEAD, TOKEN + row, mode="delete") for row in range(ROWS)])

    def generate(self, tokens: Tensor) -> Tensor:
        with self.model.hooks([(f"{self.mixer}heads.{HEAD}.hook_write", lambda write, hook: 0 * write)]):
            ids = self.model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False)
        return ids[:, PROMPT:]

    def unedited(self, tokens: Tensor) -> Tensor:
        return self.model.generate(tokens[:, :PROMPT], max_new_tokens=NEW_TOKENS, do_sample=False)[:, PROMPT:]

    def sae(self, tokens: Tensor) -> Tensor:
        from tool_probes.saes import stored

        layer = self.model.cfg.layer(LAYER)
        return stored(self.model, f"{self.mixer}heads.{HEAD}.hook_write_vec", layer.K * layer.V, tokens)


PROBES = dict.fromkeys(FAMILIES, Hookpoints)
