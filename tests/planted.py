"""Made-up matrices, sums of few known ones or noisy writes, and SAELens' trainer on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens import SAETrainer
from sae_lens.config import SAETrainerConfig
from saes import untrained_sae
from torch import Tensor
from torch.nn.functional import normalize

K, V, N_ATOMS, BATCH = 10, 8, 12, 256
PENALTIES: dict[str, dict[str, Any]] = {
    "writesae_standard": {"l1_coefficient": 0.1},
    "writesae_gated": {"l1_coefficient": 0.1},
    "writesae_jumprelu": {"l0_coefficient": 0.02, "jumprelu_init_threshold": 0.3},
}


class Planted(Iterator[Tensor]):
    """Batches of sums of about two rank-1 matrices out of 12, with noise and a constant matrix underneath."""

    def __init__(self, mean: float = 0.0, seed: int = 0) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        v, w = normalize(self.draw(N_ATOMS, K), dim=1), normalize(self.draw(N_ATOMS, V), dim=1)
        self.atoms = (v[:, :, None] * w[:, None, :]).flatten(1)
        self.mean = mean * self.draw(K * V)

    def draw(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def __next__(self) -> Tensor:
        on = torch.rand(BATCH, N_ATOMS, generator=self.generator) < 2 / N_ATOMS
        codes = on * (1 + torch.rand(BATCH, N_ATOMS, generator=self.generator))
        return codes @ self.atoms + self.mean + 0.01 * self.draw(BATCH, K * V)


class SmallWrites(Planted):
    """Small writes near six directions with much noise, so that the steps of the optimizer are large for b_dec."""

    def __next__(self) -> Tensor:
        common, which = torch.Generator().manual_seed(1), torch.randint(6, (BATCH,), generator=self.generator)
        v, w = (torch.randn(6, n, generator=common)[which] + 0.5 + self.draw(BATCH, n) for n in (K, V))
        return 0.003 * (v[:, :, None] * w[:, None]).flatten(1)


def untrained(name: str = "writesae_topk", **fields: Any) -> Any:
    """A dictionary for such matrices, with more atoms than they have."""
    sizes = {"k": 2, "d_in": K * V, "d_sae": 32, "d_k": K, "d_v": V}
    return untrained_sae(name, **sizes | PENALTIES.get(name, {}) | fields)


def trained(name: str, data: Iterator[Tensor], steps: int = 200, lr: float = 5e-3, **fields: Any) -> Any:
    """The same, trained by SAELens' trainer."""
    cfg = SAETrainerConfig(
        total_training_samples=BATCH * steps,
        train_batch_size_samples=BATCH,
        lr=lr,
        lr_end=lr / 10,
        lr_scheduler_name="cosineannealing",
        lr_warm_up_steps=10,
        dead_feature_window=50,
    )
    sae = untrained(name, **fields)
    SAETrainer(cfg, sae, data).fit()
    return sae


def recovery(sae: Any, data: Planted) -> float:
    """Mean over planted atoms of the best cosine."""
    return (data.atoms @ normalize(sae.atoms().dense().flatten(1), dim=1).T).amax(1).mean().item()
