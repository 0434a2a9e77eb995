"""One edit in words: the probabilities are those of the edited model, the sentence marks where."""

from __future__ import annotations

import pytest
import torch

from hookpoints import HookedRecurrent, WriteEdit
from hookpoints import embedded as shipped
from sae_lens_writesae.sae.rows import new_sae
from sae_lens_writesae.sae.runner import training_config
from writesae.experiment.lab import Lab, Trial
from writesae.experiment.readout import WORDS, changed_words
from writesae.experiment.tokens import sample_sequences


@torch.no_grad()
def test_words_are_those_that_the_edit_changes_most(embedded: HookedRecurrent) -> None:
    tokens = sample_sequences(embedded, shipped.text("test"), 48, 2)
    cfg = training_config(embedded, 4, 0, d_sae=8, context_size=48)
    lab = Lab(embedded, {"": new_sae(cfg)}, tokens)
    site, position = lab.site(1), 20
    trials = [Trial({"condition": "delete"}, position, lab.replace(position, None))]
    trials.append(Trial({"condition": "same"}, position, lab.replace(position, site.writes, position)))
    table = changed_words(lab, site, trials, 17)
    offset = int(table["read_at"].iloc[0])
    edited = embedded.run_with_edits(tokens[[1]], [WriteEdit(4, 0, position, mode="delete")])
    native, deleted = (
        x.float().softmax(-1) for x in (site.session.logits[0, position + offset], edited.logits[0, offset])
    )
    wide = table.pivot_table(index="word", columns="condition", values="probability", sort=False)
    top = (deleted - native).abs().topk(WORDS)
    assert (wide["delete"] - wide["native"]).abs().to_numpy() == pytest.approx(top.values.numpy(), abs=1e-6)
    assert wide["same"].to_numpy() == pytest.approx(wide["native"].to_numpy(), abs=1e-6)
    assert [str(word) for word in wide.index] == [embedded.to_string(int(word)) for word in top.indices]
    text = str(table["text"].iloc[0])
    assert f"[{embedded.to_string(int(tokens[1, position]))}]" in text and "|" in text
