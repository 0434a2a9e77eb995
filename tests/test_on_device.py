"""What runs on a host runs on a device as well, and on two of them, and gives the same.

Evaluations are in the tests of the study.
What is left out: families other than Gated DeltaNet, whose forward passes are those of transformers; half precision;
the commands `push`, `export` and `demo`, and `reproduce`, which runs the others.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import accelerate
import device
import pandas as pd
import pytest
import torch
from device import PLACE
from remembering import drawn_ids
from saes import HEAD, LAYER, random_sae
from safetensors.torch import load_file
from test_graphs import CALLS, DIFFERENTIABLE, World, tensors
from tiny_models import make_hf
from torch import Tensor, nn
from torch.testing import assert_close
from torch.utils._pytree import tree_flatten

import hookpoints
from hookpoints import Graph, HookedRecurrent
from hookpoints.circuit.task import Task
from hookpoints.errors import InputError
from hookpoints.model import loading
from sae_lens_writesae import HookedSAERecurrent, steer
from sae_lens_writesae.sae import runner
from writesae.cli import main
from writesae.flags import Prompt
from writesae.page.prompt import PromptServer

TEXT = drawn_ids(8, 24, seed=3)


def dispatched(model: Any) -> nn.Module:
    """With the blocks after the first on the device, by a ``device_map`` of two devices. Without ``main_device`` all
    would run on the other one."""
    blocks = {f"model.layers.{number}": f"{PLACE}:0" for number in range(1, len(model.model.layers))}
    others = [name for name, child in model.named_modules() if next(child.parameters(recurse=False), None) is not None]
    host = {name: "cpu" for name in others if not any(name.startswith(f"{block}.") for block in blocks)}
    main: Any = "cpu"  # which accelerate compares as a string
    places: Any = host | {"model.rotary_emb": "cpu"} | blocks
    return accelerate.dispatch_model(model, places, main_device=main)


PLACES: dict[str, Callable[[Any], Any]] = {
    "device": lambda model: model.to(PLACE),
    "dispatched": dispatched,
}
"""Where a model can lie."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A model with attention in the last layer, and a dictionary of one head, on the host."""
    model = HookedSAERecurrent.from_hf(make_hf())
    return World(model, random_sae(model), tmp_path_factory.mktemp("home"))


@pytest.fixture(scope="module", params=PLACES)
def away(request: pytest.FixtureRequest, home: World) -> Iterator[World]:
    """The same elsewhere. The head of the dictionary lies on the device."""
    with device.there():
        model = HookedSAERecurrent.from_hf(PLACES[request.param](make_hf()))
        yield World(model, random_sae(home.model).to(PLACE), home.folder)


@pytest.fixture(scope="module")
def host(home: World) -> HookedRecurrent:
    return home.model


@pytest.fixture(scope="module")
def there(host: HookedRecurrent) -> Iterator[HookedRecurrent]:
    """The same model on the device."""
    with device.there():
        yield HookedRecurrent.from_hf(PLACES["device"](make_hf()))


PUBLIC = {name: call for name, call in {**CALLS, **DIFFERENTIABLE}.items() if "from_" not in name and name != "attach"}
"""Public calls on a model at hand."""
LONG = ("train", "head_effects", "dictionary_quality")
"""Not made on models that lie on two devices."""


def numbers(value: Any) -> list[Tensor]:
    """Those inside of a value, on the host; of graphs those that a user sees. Rows of a table are told by what they are
    about: rounding orders effects that are nearly alike, and chooses among sources that give nothing."""
    if isinstance(value, Task):
        return [x for part in (value.effects, *(case.graph for case in value.cases)) for x in numbers(part)]
    if isinstance(value, Graph):
        return numbers(value.nodes) + numbers(value.edges.dropna(subset="measured"))
    if isinstance(value, pd.DataFrame):
        value = value.sort_values([str(name) for name in value.select_dtypes(exclude="float")])
        value = torch.tensor(value.select_dtypes("number").fillna(0).to_numpy(float))
    parts = tensors(value.state_dict() if isinstance(value, nn.Module) else value, set())
    return [x.detach().cpu() for x in parts if x.is_floating_point()]


@pytest.fixture(scope="module")
def at_home(home: World) -> Callable[[str], list[Tensor]]:
    """What a call gives on the host, made once."""
    return functools.cache(lambda name: numbers(PUBLIC[name](home)))


@pytest.mark.parametrize("name", PUBLIC)
def test_public_calls(at_home: Callable[[str], list[Tensor]], away: World, name: str) -> None:
    if len({parameter.device for parameter in away.model.parameters()}) == 1 or name not in LONG:
        close(numbers(PUBLIC[name](away)), at_home(name))


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert_close(got, expected, rtol=1e-3, atol=3e-5)


def test_what_lies_on_the_other_device_is_refused(away: World) -> None:
    """SAELens attaches such a dictionary, and its first pass fails in the middle of the layer."""
    model, memory = away.model, away.model.memory(TEXT[:1])
    with pytest.raises(InputError, match=rf"layer 2: expected .*{PLACE}.* got .*cpu"):
        memory.with_states({2: memory.state(2).cpu()})
    with pytest.raises(
        ValueError, match=rf"expected one on {PLACE}:0, as blocks\.1\..*, got one on cpu; move it: sae\.to"
    ):
        model.run_with_saes(TEXT, saes=[random_sae(model).cpu()])
    assert not model.acts_to_saes


def generated(model: HookedRecurrent) -> torch.Tensor:
    """Logits of each generated token [B,new,vocab]."""
    options: Any = {"return_dict_in_generate": True, "output_logits": True}
    out = model.generate(TEXT[:2], max_new_tokens=4, do_sample=False, pad_token_id=0, **options)
    return torch.stack(out.logits, 1).cpu()


@pytest.mark.parametrize(("at", "toward"), [("every", 5), ("fires", None)])
def test_steered_generation(host: HookedRecurrent, there: HookedRecurrent, at: Any, toward: int | None) -> None:
    """Of one token, a device is not asked whether its write changed."""
    logits = []
    for model in (host, there):
        atom: Any = {} if toward is not None else {"sae": random_sae(model), "atom": 4}
        with steer(model, LAYER, HEAD, toward=toward, strength=3, at=at, **atom):
            logits.append(generated(model))
    assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-5)
    assert (logits[0] - generated(host)).abs().max() > 1e-4


SAE = "HOST/train/L2H1/write-seed0"
MODEL = ["--model", "embedded", "--layer", "2"]
SIZES = ["--d-sae", "16", "--training-tokens", "512"]
FEW = ["--sequences", "4", "--context-size", "48"]
COMMANDS = {
    "collect": ["collect", *MODEL, "--heads", "0", "1", "--n-tokens", "512", "--dtype", "float32"],
    "train": ["train", "--collection", "HOST/collect", *SIZES, "--heads", "1"],
    "show": ["show", SAE, *FEW, "--n-atoms", "1", "--min-firings", "1"],
}
"""What follows `writesae`; `HOST` is the folder of what is made on the host."""


@pytest.fixture
def on_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[Any]]:
    """A scope in which the device is there, and models go to it of which nothing is said."""

    @contextmanager
    def there() -> Iterator[None]:
        with device.there(), monkeypatch.context() as patched:
            for module in (hookpoints, loading, runner):
                patched.setattr(module, "default_device", lambda: PLACE)
            yield

    return there


def call(name: str, made: Path, out: Path) -> None:
    main([*(word.replace("HOST", str(made)) for word in COMMANDS[name]), "--out", str(out)])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What each command makes on the host, of what those before it made."""
    place = tmp_path_factory.mktemp("host")
    for name in COMMANDS:
        call(name, place, place / name)
    return place


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
    with on_device():
        call(name, made, tmp_path)
    files = [file for pattern in ("*.safetensors", "*.parquet", "data.json") for file in (made / name).rglob(pattern)]
    assert files
    for file in files:
        expected, got = (read(folder / file.relative_to(made / name)) for folder in (made / name, tmp_path))
        alike(got, expected, 2e-3 if name == "show" else 1e-5)  # counts of a histogram may move by one


def alike(got: Any, expected: Any, room: float) -> None:
    """Numbers are the same but for rounding, and all else is the same."""
    leaves, structure = tree_flatten(expected)
    got_leaves, got_structure = tree_flatten(got)
    assert got_structure == structure
    for value, leaf in zip(got_leaves, leaves):
        if isinstance(leaf, torch.Tensor):
            assert_close(value, leaf, rtol=1e-4, atol=room)
        elif isinstance(leaf, float):
            assert value == pytest.approx(leaf, rel=1e-3, abs=room, nan_ok=True)
        else:
            assert value == leaf


@pytest.mark.slow
def test_the_page_of_a_prompt(made: Path, on_device: Callable[[], AbstractContextManager[Any]]) -> None:
    def payload() -> object:
        with PromptServer(Prompt(sae=made / "train", port=0)) as server:
            session = server.session
            assert session.model.cfg.device.type == hookpoints.default_device()
            return session.atoms({"text": "The war between the States was over.", "question": "The"})

    expected = payload()
    with on_device():
        alike(payload(), expected, 1e-3)
