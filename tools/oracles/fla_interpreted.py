"""Run fla's own Triton kernels on a CPU, in Triton's interpreter, and save what they give. With HOOKPOINTS_DEVICE=cuda
they run compiled, on a GPU (`.ci/gpu`), where nothing is made up for but the refusals of float32.

    python tools/oracles/fla_interpreted.py FOLDER [family ...]

For an environment of its own, with torch, transformers, fla and triton; ``test_fla_kernels.py`` compares hookpoints
with what is saved, in an environment without triton. Writes one safetensors file per family: its weights, and after
each pass the logits and the recurrent state of every layer. Takes about a minute of CPU time, on as many cores as there
are.

The kernels are fla's, unchanged. Around them three things of the GPU are missing, and made up for here: nothing is
autotuned (the first configuration is taken), loop counters in kernels are given the ``to`` that compiled ones have, and
two ops' refusals of float32, which are about the GPU's shared memory, are left out.
"""

from __future__ import annotations

import builtins
import inspect
import os
import sys
import textwrap
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from fla_families import FAMILIES, SCHEDULES, make, passes
from safetensors.torch import save_file

DEVICE = os.environ.get("HOOKPOINTS_DEVICE", "cpu")
SETTINGS = {"TRITON_INTERPRET": "1", "FLA_USE_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
"""Read by triton, fla and transformers when they are imported."""


def take_the_first_configuration() -> None:
    """Choosing among several means timing them on a GPU."""
    from triton.runtime.autotuner import Autotuner

    original = Autotuner.__init__

    def init(self: Autotuner, fn: Any, arg_names: Any, configs: Any, *args: Any, **kwargs: Any) -> None:
        original(self, fn, arg_names, list(configs)[:1], *args, **kwargs)

    Autotuner.__init__ = init


class Counter(int):
    """A loop counter of an interpreted kernel: an int that has a dtype as little as it needs to."""

    def to(self, _dtype: Any, **_: Any) -> Counter:
        return self


def _closed(name: str) -> Callable[[Counter, Any], Any]:
    plain = getattr(int, name)

    def operator(self: Counter, other: Any) -> Any:
        result = plain(self, other)
        return result if result is NotImplemented else Counter(result)

    return operator


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "floordiv", "rfloordiv", "mod", "rmod"):
    setattr(Counter, f"__{_name}__", _closed(f"__{_name}__"))


def counters(*bounds: Any) -> Iterator[Counter]:
    """``range`` for interpreted kernels."""
    return (Counter(i) for i in builtins.range(*map(int, bounds)))


def allow_float32(module: Any, name: str) -> None:
    """Compile a function of fla again without its assertions, and put it wherever fla refers to it."""
    original = getattr(module, name)
    source = textwrap.dedent(inspect.getsource(inspect.unwrap(original)))
    made: dict[str, Any] = {}
    exec(compile(source, module.__file__, "exec", optimize=1), module.__dict__, made)
    for other in [m for label, m in sys.modules.items() if label.startswith("fla.")]:
        for label, value in list(vars(other).items()):
            if value is original:
                setattr(other, label, made[name])


def prepare() -> None:
    """Make this process one in which fla runs on a CPU, or in float32 on a GPU."""
    if DEVICE == "cpu":
        os.environ.update(SETTINGS)
        take_the_first_configuration()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    import fla.models  # noqa: F401
    from fla.ops.delta_rule import chunk as delta_rule
    from fla.ops.gated_delta_product import chunk as delta_product

    for label, module in list(sys.modules.items()):
        if DEVICE == "cpu" and label.startswith("fla.") and hasattr(module, "triton"):
            module.__dict__["range"] = counters
    allow_float32(delta_rule, "chunk_delta_rule")
    allow_float32(delta_product, "chunk_gated_delta_product")


@torch.no_grad()
def run_model(model_type: str) -> dict[str, torch.Tensor]:
    """Weights, and by schedule and pass the logits and every layer's state."""
    import fla.models

    model = make(fla.models, model_type).to(DEVICE)
    saved = {f"weight.{name}": x for name, x in model.state_dict().items()}
    for schedule in SCHEDULES:
        cache = None
        for i, (tokens, mask) in enumerate(passes(schedule)):
            mask = None if mask is None else mask.to(DEVICE)
            out = model(tokens.to(DEVICE), attention_mask=mask, use_cache=True, past_key_values=cache)
            cache = out.past_key_values
            saved[f"{schedule}.{i}.logits"] = out.logits
            for layer in range(model.config.num_hidden_layers):
                saved[f"{schedule}.{i}.state.{layer}"] = cache[layer]["recurrent_state"].clone()
    return saved


def run(family: str, folder: Path) -> str:
    """Write one family's file, in a process that is prepared; says how long that took."""
    wall, cpu = time.time(), time.process_time()
    tensors = run_model(family)
    save_file({label: x.cpu().clone().contiguous() for label, x in tensors.items()}, folder / f"{family}.safetensors")
    return f"{family}: {time.time() - wall:.0f} s ({time.process_time() - cpu:.0f} s of CPU)"


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), initializer=prepare) as pool:
        families = sys.argv[2:] or [*FAMILIES]
        for done in as_completed([pool.submit(run, family, folder) for family in families]):
            print(done.result(), flush=True)


if __name__ == "__main__":
    main()
