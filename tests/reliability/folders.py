"""Damaged folders, and folders from strangers: code, pickles, links, and files that claim much."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import torch
from remembering import drawn_ids
from saes import make_sae
from safetensors.torch import load_file
from sealing import damages, reseal
from tiny_models import make_hf

from hookpoints import HookedRecurrent, embedded
from reliability.checks import REFUSED, Comparison, check, outcome
from reliability.runs import fresh
from sae_lens_writesae.sae.collecting import collect
from sae_lens_writesae.sae.factors import Collection
from sae_lens_writesae.sae.load import load_sae

Contents = dict[str, object]
TEXT = "The state of the Union — 12 years, naïve"


def make_model(folder: Path, model_type: str = "qwen3_5") -> None:
    make_hf(model_type).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(embedded.path() / name, folder)
    reseal(folder)


def read_model(folder: Path) -> Contents:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = HookedRecurrent.from_pretrained(str(folder), device="cpu")
    with torch.no_grad():
        return {"logits": model(torch.arange(1, 33)[None]), "text": model.tokenizer and model.to_str_tokens(TEXT)}


def make_dictionary(folder: Path) -> None:
    make_sae(fresh()).save_model(folder)


def read_dictionary(folder: Path) -> Contents:
    return {"cfg": vars(sae := load_sae(folder))["cfg"].to_dict(), **sae.state_dict()}


def make_collection(folder: Path) -> None:
    rows = drawn_ids(22, 32, seed=3)
    collect(fresh(), rows, [0, 1], None, folder, batch_size=2, shard_bytes=100_000)


def read_collection(folder: Path) -> Contents:
    collection = Collection.open(folder)
    heads = [(layer, head) for layer, numbers in collection.heads.items() for head in numbers]
    sides = {(each, n): side[:] for each in heads for n, side in enumerate(collection.factors(*each))}
    return {"tokens": collection.tokens, **{str(place): side for place, side in sides.items()}}


class Kind(NamedTuple):
    """What is saved in a folder."""

    make: Callable[[Path], None]
    read: Callable[[Path], Contents]


KINDS = {
    "model": Kind(make_model, read_model),
    "dictionary": Kind(make_dictionary, read_dictionary),
    "collection": Kind(make_collection, read_collection),
}


def damaged(name: str, kind: Kind) -> Callable[[Path, int], Iterator[Comparison]]:
    """What a check runs: a folder of that name with one bit flipped, cut short, with two files swapped, or with an
    entry of its seal dropped or renamed. It is refused by name, or what is read is the same."""

    def run(work: Path, rounds: int) -> Iterator[Comparison]:
        make, read = kind
        folder = work / name
        make(folder)
        undamaged, names = read(folder), sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
        for what in damages(folder, names, rounds):
            got = outcome(read, folder)
            yield Comparison(what, REFUSED if got == REFUSED else undamaged, got)
        yield Comparison("not damaged any more", undamaged, outcome(read, folder))

    run.__name__ = f"damaged_{name}"
    return run


for _name, _kind in KINDS.items():
    check(few=60, many=220)(damaged(_name, _kind))


def _asked(work: Path, act: Callable[..., object], *args: object) -> str:
    """What came of a folder that brings code along: "loaded", refused, or that the code was run or asked about."""
    asked: list[str] = []

    def ask(prompt: str = "") -> str:
        asked.append(prompt)
        return "y"

    with patch("builtins.input", ask), contextlib.redirect_stdout(io.StringIO()):
        got = outcome(act, *args)
    if asked or (work / "mark").exists():
        return "code was run, or asked about"
    return got if isinstance(got, str) else "loaded"


def _rewrite(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    reseal(file.parent)


@check()
def code(work: Path, rounds: int) -> Iterator[Comparison]:
    """`auto_map` of a model, or of a tokenizer, names a module in the folder, and transformers has no such class. The
    model is refused by name, or loaded without the tokenizer; nothing is run and nobody is asked."""
    evil = f"from pathlib import Path\nPath({str(work / 'mark')!r}).touch()\nclass Evil: pass\n"
    maps = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    fields = {
        "config.json": {"model_type": "evil", "architectures": ["Evil"], "auto_map": maps},
        "tokenizer_config.json": {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
    }
    for file, expected in (("config.json", REFUSED), ("tokenizer_config.json", "loaded")):
        make_model(folder := work / file, "bamba")  # for which transformers has no tokenizer
        (folder / "evil.py").write_text(evil)
        _rewrite(folder / file, **fields[file])
        yield Comparison(file, expected, _asked(work, read_model, folder))


@check()
def pickles(work: Path, rounds: int) -> Iterator[Comparison]:
    """The weights of a model are a pickle. It is refused by name."""
    make_model(folder := work / "model")
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    reseal(folder)
    yield Comparison("weights", REFUSED, _asked(work, read_model, folder))


@check()
def claims(work: Path, rounds: int) -> Iterator[Comparison]:
    """An index names weights outside of its folder. It is refused by what it claims, before it is believed."""
    make_model(folder := work / "index")
    weights = (folder / "model.safetensors").rename(work / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(weights), "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    reseal(folder)
    yield Comparison("index", REFUSED, outcome(read_model, folder, says="outside"))
