"""What a training step of pairs by pursuit costs, against `writesae_topk`: SAELens' own trainer on the same 96 states.

Both take turns; a ratio is the median over rounds of CPU time.
"""

import sys
from typing import Any

from frame import Line, main, timed

TITLE = "Pairs by pursuit"
QUICK = {"rounds": 2}
PURSUIT = "64 + 64 atoms, 4 pairs"


def measure(rows: int = 96, size: int = 32, rounds: int = 30) -> dict[str, dict[str, float]]:
    """Milliseconds and ratio to the first of each way. TopK has as many atoms as both sides, and as there are pairs."""
    import torch
    from sae_lens import SAETrainer
    from sae_lens.config import SAETrainerConfig

    from sae_lens_writesae.sae import TRAINING

    shape: dict[str, Any] = {"d_in": size**2, "d_k": size, "resample_every": 0}
    pairs = {"d_sae": 64 * 64, "encoder": "pursuit", "n_pairs": 4}
    subjects = {
        "128 atoms, k 4": ("writesae_topk", {"d_sae": 128, "k": 4}),
        "4,096 atoms, k 4": ("writesae_topk", {"d_sae": 4096, "k": 4}),
        PURSUIT: ("writesae_product", pairs),
    }
    x = torch.randn(rows, size**2, generator=torch.Generator().manual_seed(0))
    ways = {}
    for name, (architecture, fields) in subjects.items():
        sae_class, config_class = TRAINING[architecture]
        sae: Any = sae_class(config_class(**shape, **fields))
        cfg = SAETrainerConfig(total_training_samples=10**9, train_batch_size_samples=rows, lr_end=3e-5)
        trainer = SAETrainer(cfg, sae, iter(()))
        ways[name] = lambda trainer=trainer: trainer.step(x)
    return timed(ways, rounds)


def lines(found: dict[str, dict[str, float]]) -> list[Line]:
    ratio = found[PURSUIT]["ratio"]
    return [
        Line("a step of 96 states of 32 x 32: pursuit over 64 + 64 atoms, against TopK of 128 atoms", ratio, "x", 2),
        Line("the same against TopK of 4,096 atoms", ratio / found["4,096 atoms, k 4"]["ratio"], "x"),
    ]


if __name__ == "__main__":
    main(sys.modules[__name__])
