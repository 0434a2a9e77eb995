"""A stranger's distribution adds a family: a module with a rule, and an entry point that names it."""

from __future__ import annotations

import importlib
from pathlib import Path
from textwrap import dedent

import pytest
import torch
from torch.testing import assert_close

from hookpoints import HookedRecurrent, UnsupportedModelError
from hookpoints.model import layout
from hookpoints.rules.known import GROUP, RULES, installed_rules

MODULE = '''
import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from hookpoints.rules import Names, Rule

FADING = Rule("Fading", ("fade",), Names("q", "k", "v", log_decay="g"), sizes=("width", "width"), output_like="v")


def fade(q, k, v, g, initial_state=None, output_final_state=False):
    """Linear attention with one decay for each head, token by token."""
    state = q.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1]) if initial_state is None else initial_state
    reads = []
    for t in range(q.shape[1]):
        state = g[:, t].exp()[..., None, None] * state + k[:, t, ..., None] * v[:, t, :, None]
        reads.append((q[:, t, :, None] @ state)[..., 0, :] * q.shape[-1] ** -0.5)
    return torch.stack(reads, 1), state if output_final_state else None


class Mixer(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.num_heads, self.width = 2, size // 2
        self.qkv_proj, self.g_proj, self.o_proj = nn.Linear(size, 3 * size), nn.Linear(size, 2), nn.Linear(size, size)

    def forward(self, hidden_states, cache=None, attention_mask=None):
        q, k, v = self.qkv_proj(hidden_states).unflatten(-1, (3, 2, -1)).unbind(2)
        reads, _ = fade(q=q, k=k, v=v, g=-nn.functional.softplus(self.g_proj(hidden_states)))
        return self.o_proj(reads.flatten(2))


class Block(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(size), Mixer(size)

    def forward(self, hidden_states, cache=None, attention_mask=None):
        return hidden_states + self.mixer(self.norm(hidden_states), cache=cache, attention_mask=attention_mask)


class FadingConfig(PreTrainedConfig):
    model_type = "fading"
    vocab_size: int = 32
    hidden_size: int = 12
    num_hidden_layers: int = 2


class FadingForCausalLM(PreTrainedModel):
    config_class = FadingConfig

    def __init__(self, config):
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.norm, self.lm_head = nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, config.vocab_size)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, input_ids=None, attention_mask=None, cache=None, inputs_embeds=None, **kwargs):
        from transformers.modeling_outputs import CausalLMOutput

        hidden = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        for block in self.layers:
            hidden = block(hidden)
        return CausalLMOutput(logits=self.lm_head(self.norm(hidden)))
'''


@torch.no_grad()
def test_a_strangers_rule_is_hooked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the entry point the model is refused, and the error names the group of entry points."""
    (tmp_path / "fading.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    fading = importlib.import_module("fading")
    torch.manual_seed(0)
    hf = fading.FadingForCausalLM(fading.FadingConfig(vocab_size=32, hidden_size=12, num_hidden_layers=2)).eval()
    with pytest.raises(UnsupportedModelError, match=rf"an entry point of the group '{GROUP}' adds a rule"):
        HookedRecurrent.from_hf(hf)

    info = tmp_path / "fading-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: fading\nVersion: 1\n")
    (info / "entry_points.txt").write_text(
        dedent(f"""
        [{GROUP}]
        fading = fading:FADING
    """)
    )
    assert installed_rules()["fading"] is fading.FADING
    monkeypatch.setattr(layout, "RULES", (*RULES, *installed_rules().values()))  # as a new interpreter has them
    tokens = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(0))
    native = hf(tokens).logits
    model = HookedRecurrent.from_hf(hf, self_check=False)  # which decodes, and this model has no cache
    assert model.cfg.layer(1).rule == "Fading" and torch.equal(model(tokens), native)

    # Where values are zero nothing is written, so that reads are zero.
    def forget(values: torch.Tensor, hook: object) -> torch.Tensor:
        return torch.zeros_like(values)

    silent = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_v", forget)])
    expected = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.mixer.hook_read", forget)])
    assert_close(silent, expected)
    assert (silent - native).abs().max() > 1e-5
