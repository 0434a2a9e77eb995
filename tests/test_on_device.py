"""What runs on a host runs on a device as well, and gives the same.

Models on two devices are in `test_two_devices.py`, evaluations in the tests of the study.
What is left out: families other than Gated DeltaNet, whose forward passes are those of transformers; half precision;
the commands `push` and `export`, and `reproduce`, which runs the others.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import device
import pandas as pd
import pytest
import torch
from saes import HEAD, LAYER, random_sae
from safetensors.torch import load_file
from test_graphs import CALLS, DIFFERENTIABLE, World
from tiny_models import make_hf
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten, tree_leaves

import hookpoints
from hookpoints import HookedRecurrent
from hookpoints.model import loading
from sae_lens_writesae import HookedSAERecurrent, fit_metrics, steer
from sae_lens_writesae.sae import runner
from writesae.cli import main
from writesae.show import Prompt

TEXT = torch.randint(1, 64, (8, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def host() -> HookedRecurrent:
    return HookedRecurrent.from_hf(make_hf())


@pytest.fixture(scope="module")
def there(host: HookedRecurrent) -> Iterator[HookedRecurrent]:
    """The same model on the device."""
    with device.pretended():
        yield HookedRecurrent.from_hf(copy.deepcopy(make_hf()).to("npu"))


def same(one: pd.DataFrame, other: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(one, other, rtol=1e-4, atol=1e-5)


def test_metrics_of_tokens_on_the_host(host: HookedRecurrent, there: HookedRecurrent) -> None:
    expected, metric = (fit_metrics(model, TEXT, [(LAYER, HEAD)])[LAYER, HEAD] for model in (host, there))
    for name in ("key_root", "value_root"):
        assert_close(getattr(metric, name).cpu(), getattr(expected, name), rtol=1e-4, atol=1e-5)


PUBLIC = {name: call for name, call in {**CALLS, **DIFFERENTIABLE}.items() if "from_" not in name and name != "attach"}
"""Public calls on a model at hand."""


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, World]:
    """A model and a dictionary on the host, and the same on the device."""

    def world(place: str) -> World:
        model = HookedSAERecurrent.from_hf(make_hf().to(place))
        return World(model, random_sae(model).to(place), tmp_path_factory.mktemp(place))

    with device.pretended():
        return world("cpu"), world("npu")


def tensors(value: Any) -> list[torch.Tensor]:
    """Those of a value or of its fields, on the host."""
    plain = isinstance(value, torch.Tensor | torch.nn.Module) or not hasattr(value, "__dict__")
    found = tree_leaves(value if plain else vars(value))
    return [x.detach().cpu() for x in found if isinstance(x, torch.Tensor) and x.is_floating_point()]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_calls(worlds: tuple[World, World], name: str) -> None:
    expected = tensors(PUBLIC[name](worlds[0]))
    with device.pretended():
        found = tensors(PUBLIC[name](worlds[1]))
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        assert_close(one, other, rtol=1e-4, atol=1e-5)


def generated(model: HookedRecurrent) -> torch.Tensor:
    """Logits of each generated token [B,new,vocab]."""
    options: Any = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(TEXT[:2], max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
    return torch.stack(out.logits, 1).cpu()


@pytest.mark.parametrize("at", ["every", (3, 25), "fires"])
@pytest.mark.parametrize("toward", [5, None], ids=["token", "atom"])
def test_steered_generation(host: HookedRecurrent, there: HookedRecurrent, at: Any, toward: int | None) -> None:
    """Of one token, a device is not asked whether its write changed."""
    logits = []
    for model in (host, there):
        atom: Any = {} if toward is not None and at != "fires" else {"sae": random_sae(model), "atom": 4}
        with steer(model, LAYER, HEAD, toward=toward, strength=3, at=at, **atom):
            logits.append(generated(model))
    assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert (logits[0] - generated(host)).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["hook_write_value", f"heads.{HEAD}.hook_write"])
def test_a_copy_changes_nothing_in_generation(there: HookedRecurrent, name: str) -> None:
    plain = generated(there)
    with there.hooks(fwd_hooks=[(f"blocks.{LAYER}.mixer.{name}", lambda x, hook: x.clone())]):
        assert torch.equal(generated(there), plain)


SAE = "HOST/train/L2H1/write-seed0"
MODEL = ["--model", "embedded", "--layer", "2"]
SIZES = ["--d-sae", "16", "--training-tokens", "512"]
FEW = ["--sequences", "4", "--context-size", "48"]
ONE = ["--n-atoms", "2", "--firings-per-atom", "1"]
COMMANDS = {
    "collect": ["collect", *MODEL, "--heads", "0", "1", "--n-tokens", "512", "--dtype", "float32"],
    "train": ["train", "--collection", "HOST/collect", *SIZES, "--heads", "1"],
    "eval": ["eval", "substitution", SAE, "--collection", "HOST/collect", *FEW, *ONE, "--controls", "random", "mean"],
    "show": ["show", SAE, *FEW, "--n-atoms", "1", "--min-firings", "1"],
    "report": ["report", "HOST/eval"],
    "demo": ["demo", *MODEL[2:], "--head", "1", *SIZES, *ONE, "--train-sequences", "8", "--eval-sequences", "2"],
}
"""What follows `writesae`; `HOST` is where the commands before left what they made on the host."""


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """A scope in which the device is there, and models go to it of which nothing is said."""

    @contextmanager
    def there() -> Iterator[None]:
        with device.pretended(), monkeypatch.context() as patched:
            for module in (hookpoints, loading, runner):
                patched.setattr(module, "default_device", lambda: "npu")
            yield

    return there


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command makes on the host."""
    return tmp_path_factory.mktemp("host")


def call(name: str, made: Path, out: Path) -> None:
    more = {"demo": ["--facts", "0", "--context-size", "48"], "eval": ["--no-control-dictionaries"]}.get(name, [])
    words = [word.replace("HOST", str(made)) for word in (*COMMANDS[name], *more)]
    main([*words, "--out", str(out / "page.html" if name == "report" else out)])


def read(file: Path) -> Any:
    """What a file of a command has to be the same on the device."""
    if file.suffix == ".safetensors":
        return load_file(file)
    if file.suffix == ".parquet":
        table = pd.read_parquet(file)
        return {str(column): table[column].tolist() for column in table}
    pages = json.loads(file.read_text("utf-8"))["atoms"]
    for page in pages:
        page["effect"]["tokens"].pop("low")  # bytes that no text has, whose scores are the same but for rounding
    return pages


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_commands(name: str, made: Path, on_device: Callable[[], AbstractContextManager[Any]], tmp_path: Path) -> None:
    call(name, made, made / name)
    with on_device():
        call(name, made, tmp_path)
    if name == "demo":  # its dictionaries take the strongest of near scores, so that rounding takes another
        expected, found = (json.loads((folder / "report.json").read_text()) for folder in (made / name, tmp_path))
        assert [claim["outcome"] for claim in found["claims"]] == [claim["outcome"] for claim in expected["claims"]]
        recovered = [[each["recovered"]["mean"] for each in report["quality"]] for report in (expected, found)]
        assert recovered[1] == pytest.approx(recovered[0], abs=0.01)
        return
    files = [file for pattern in ("*.safetensors", "*.parquet", "data.json") for file in (made / name).rglob(pattern)]
    assert files
    for file in files:
        expected, found = (read(folder / file.relative_to(made / name)) for folder in (made / name, tmp_path))
        alike(found, expected, 2e-3 if name == "show" else 1e-5)  # counts of a histogram may move by one


def alike(found: Any, expected: Any, room: float) -> None:
    """Numbers are the same but for rounding, and all else is the same."""
    leaves, structure = tree_flatten(expected)
    others, of_found = tree_flatten(found)
    assert of_found == structure
    for one, other in zip(others, leaves):
        if isinstance(other, torch.Tensor):
            assert_close(one, other, rtol=1e-4, atol=room)
        elif isinstance(other, float):
            assert one == pytest.approx(other, rel=1e-3, abs=room, nan_ok=True)
        else:
            assert one == other


@pytest.mark.slow
def test_the_page_of_a_prompt(made: Path, on_device: Callable[[], AbstractContextManager[Any]]) -> None:
    def payload() -> dict[str, object]:
        with Prompt(sae=made / "train", port=0).server() as server:
            assert server.model.cfg.device.type == hookpoints.default_device()
            return server.read("The war between the States was over.", 2, 1)

    expected = payload()
    with on_device():
        alike(payload(), expected, 1e-3)
