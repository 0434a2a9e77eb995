"""A dictionary of pairs for the zoo's model `facts`, learned from states alone: `python tools/train_pairs.py`.

The texts serve to name atoms, after training. Two minutes on one core.
"""

from __future__ import annotations

import torch

from hookpoints import HookedRecurrent, zoo
from hookpoints.zoo.tasks import Facts
from sae_lens_writesae import label_atoms, train, training_config

NAME = "facts"
FITTED = 4000
"""Texts of four facts whose states are given."""
NAMING = 2000
"""Others that name atoms."""
STEPS = 2000
BATCH = 96
"""States of a step."""
F_KEY = 160
"""Key atoms. There are 144 keys: 36 names and 4 relations."""
F_VALUE = 96
"""Value atoms. There are 68 values."""


def texts(n: int, seed: int) -> tuple[torch.Tensor, list[dict[str, str]]]:
    """States [n,K,V] after n texts of four facts, and the facts."""
    model = HookedRecurrent.from_pretrained(NAME)
    batch = Facts().batch(n, torch.Generator().manual_seed(seed), pairs=4)
    told = batch.tokens[:, : 1 + 5 * 4].split(500)
    with torch.no_grad():
        states = torch.cat([model.recurrence(part, 0).final_state() for part in told])
    return states[:, 0], Facts().told(batch.symbols)


def main() -> None:
    """Train, name and save; hookpoints/zoo/facts/pairs."""
    torch.set_num_threads(1)
    cfg = training_config(
        HookedRecurrent.from_pretrained(NAME),
        layer=0,
        head=0,
        target="last_state",
        architecture="writesae_product",
        d_sae=F_KEY * F_VALUE,
        sae={"encoder": "pursuit", "f_key": F_KEY, "f_value": F_VALUE, "n_pairs": 7},
        seed=0,
        context_size=8,
        train_batch_size_tokens=BATCH,
        training_tokens=BATCH * STEPS,
        lr=1e-2,
    )
    sae = train(cfg, texts(FITTED, seed=1)[0])
    states, told = texts(NAMING, seed=2)
    keys = {key for facts in told for key in facts}
    values = {value for facts in told for value in facts.values()}
    label_atoms(sae, states, [[*facts, *facts.values()] for facts in told], key_words=keys, value_words=values)
    sae.save_inference_model(str(zoo.path(NAME) / "pairs"))


if __name__ == "__main__":
    main()
