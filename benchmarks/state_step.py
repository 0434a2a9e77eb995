"""What a training step on states costs: in chunks (`sae.chunks`), against SAELens' trainer on rows [N,K*V].

Both sides read factors, make what they train on, and make one step of Adam; they take turns, and a ratio is the median
over rounds of CPU time. SAELens' side is spared its mixing buffer.
"""

import sys
import time
from collections.abc import Callable
from statistics import median
from types import SimpleNamespace
from typing import Any

from frame import Line, main

SIZES = ((64, 32, 512, 8), (64, 64, 1024, 16), (128, 128, 2048, 32))
"""K, V, F, k."""
TITLE = "State dictionaries"
QUICK = {"rounds": 1}


def measure(batch: int = 128, rounds: int = 5) -> dict[str, Any]:
    """Milliseconds of both, and how many times the chunks are faster, for one decay a head and one a key channel."""
    found: dict[str, Any] = {}
    for K, V, F, k in SIZES:
        for channels in (False, True):
            ways = steps(K, V, F, k, batch, channels)
            times: dict[str, list[float]] = {name: [] for name in ways}
            for n in range(rounds + 1):
                for name, way in ways.items():
                    start = time.process_time()
                    way()
                    times[name] += [1e3 * (time.process_time() - start)] * (n > 0)
            ratio = median(a / b for a, b in zip(times["rows"], times["chunks"]))
            name = f"{K}x{V}, F {F}, k {k}, N {batch}, a decay per {'channel' if channels else 'head'}"
            found[name] = {way: median(own) for way, own in times.items()} | {"ratio": ratio}
    return found


def steps(
    K: int, V: int, F: int, k: int, batch: int, channels: bool, device: str = "cpu", **runner: Any
) -> dict[str, Callable[[], object]]:
    """One step of each side, on the states of a gated delta rule with random factors, which are on the host."""
    import torch
    from sae_lens import LanguageModelSAERunnerConfig, LoggingConfig, SAETrainer

    from hookpoints import Recurrence
    from sae_lens_writesae.sae import WriteTopKTrainingSAEConfig
    from sae_lens_writesae.sae.chunks import StateStack
    from sae_lens_writesae.sae.rows import new_sae, row_orders
    from sae_lens_writesae.sae.runner import head_rows

    g, S, T = torch.Generator().manual_seed(0), 64, 128
    key = torch.nn.functional.normalize(torch.randn(S, T, 1, K, generator=g), dim=-1)
    u, beta = torch.randn(S, T, 1, V, generator=g), torch.rand(S, T, 1, generator=g)
    log_decay = -0.05 * torch.rand(S, T, 1, *[K] * channels, generator=g)

    def recurrence(layer: int, head: int, chosen: Any) -> Recurrence:
        x, log = key[chosen], log_decay[chosen]
        b = x * (log if channels else log[..., None]).exp()
        return Recurrence(q=x, k=x, u=u[chosen], log_decay=log, b=b, beta=beta[chosen])

    collection: Any = SimpleNamespace(context_size=T, n_sequences=S, recurrence=recurrence, sha256="none")
    cfg = LanguageModelSAERunnerConfig(
        sae=WriteTopKTrainingSAEConfig(d_in=K * V, d_k=K, d_sae=F, k=k),
        training_tokens=10**6,
        train_batch_size_tokens=batch,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        device=device,
        **runner,
    )
    cfg.hook_name = "blocks.0.mixer.heads.0.hook_state_vec"
    trainer = SAETrainer(cfg.to_sae_trainer_config(), new_sae(cfg), iter(()))
    sequences, at = torch.arange(max(1, batch // T)), -(-batch // max(1, batch // T))

    def on_rows() -> None:
        states = head_rows(recurrence(0, 0, sequences), "state", "mse", slice(T - at, T))
        trainer.step(states.flatten(0, 1)[:batch].to(device))
        trainer.n_training_steps += 1

    stack: Any = StateStack(cfg, collection)
    order = row_orders(len(stack.writes[0]), batch // stack.together, seed=0)
    return {"rows": on_rows, "chunks": lambda: stack.take([stack.rows(0, next(order))])}


def lines(found: dict[str, Any]) -> list[Line]:
    """Ratios."""
    what = "in chunks, times as fast as SAELens' trainer on rows"
    return [Line(f"{name}: {what}", row["ratio"], " ×") for name, row in found.items()]


if __name__ == "__main__":
    main(sys.modules[__name__])
