"""Codes of writes at equal bits on twelve heads, those of the page of results: `python scripts/equal_bits.py FOLDER`.

FOLDER/runs/bits and FOLDER/runs/bits-64 get the results; what exists stays. Two to three hours of one core. Codes
are fitted to 320 sequences of 128 tokens, and replace all writes of a head on 64 others.
"""

from __future__ import annotations

import sys
from itertools import product
from pathlib import Path

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae import training_config
from sae_lens_writesae.sae.rows import new_sae
from writesae import sample_sequences
from writesae.evaluations.bits import Bits
from writesae.experiment.terms import Terms

HEADS = {
    "embedded": ((4, 2), (4, 3), (1, 3), (2, 3)),
    "embedded-mamba2": ((6, 1), (7, 0), (3, 3), (6, 2)),
    "embedded-rwkv7": ((1, 5), (3, 4), (2, 0), (2, 3)),
}
"""Layers and heads."""
RUNS = (("bits", (16, 32), 0, 4), ("bits-64", (64,), 0, 4), ("bits", (16, 32), 1, 2), ("bits", (16, 32), 2, 2))
"""Folders, budgets, seeds, and how many heads of each model."""


def main(folder: Path) -> None:
    """Run what is not there."""
    for (recipe, budgets, seed, n), name in product(RUNS, HEADS):
        for layer, head in HEADS[name][:n]:
            place = folder / "runs" / recipe / name / f"L{layer}H{head}" / "bits" / f"{name}-L{layer}H{head}-seed{seed}"
            if not place.exists():
                model = HookedRecurrent.from_pretrained(name).requires_grad_(False)
                fitted, measured = (
                    sample_sequences(model, embedded.text(part), 128, count)
                    for part, count in (("train", 320), ("test", 64))
                )
                # Only to name the head: the evaluation trains its own dictionaries.
                cfg = training_config(model, layer, head, d_sae=8, training_tokens=128, context_size=8, verbose=False)
                test = Bits(budgets=budgets, steps=1500, seed=seed, label=f"{name} L{layer}H{head}, seed {seed}")
                test.run(model, new_sae(cfg), measured, reference=Terms(model, fitted)).save(place)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
