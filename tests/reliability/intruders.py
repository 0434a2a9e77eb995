"""Folders from strangers that try to run code, to write or read outside of themselves, or to fill the memory."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from sealing import reseal

from hookpoints import HookedRecurrent, embedded
from hookpoints.files import CHECKSUMS
from reliability.disks import checkpoints, collection, evaluation
from reliability.interrupts import fresh
from sae_lens_writesae.evaluations import load_result
from sae_lens_writesae.page.report import find_results, write_report
from sae_lens_writesae.sae.collection import INDEX, Collection, Contents
from sae_lens_writesae.sae.load import load_sae

Attack = Callable[[Path, Path], object]
"""Called with a folder that it may work in and the path of a file that must not come to be."""


class _Evil:
    """A pickle that makes a file when it is read."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.mark,)


def _model(work: Path) -> Path:
    shutil.rmtree(work / "model", ignore_errors=True)
    return shutil.copytree(embedded.path(), work / "model")


def _rewrite(file: Path, **fields: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
    _reseal(file.parent)


def _reseal(folder: Path) -> None:
    """A stranger's seal is of what the stranger wrote."""
    if (folder / CHECKSUMS).exists():
        reseal(folder)


def code_of_a_model(work: Path, mark: Path) -> None:
    """auto_map of the model names a module beside it."""
    folder = _model(work)
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: pass\n")
    _rewrite(folder / "config.json", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    HookedRecurrent.from_pretrained(str(folder))


def code_of_a_tokenizer(work: Path, mark: Path) -> None:
    """auto_map of the tokenizer names a module beside it, and there is no other tokenizer."""
    folder = _model(work)
    (folder / "evil.py").write_text(f"from pathlib import Path\nPath({str(mark)!r}).touch()\nclass Evil: pass\n")
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    _rewrite(folder / "tokenizer_config.json", **auto)
    HookedRecurrent.from_pretrained(str(folder))


def pickled_weights(work: Path, mark: Path) -> None:
    """pytorch_model.bin in the place of the safetensors file."""
    folder = _model(work)
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(mark)))
    HookedRecurrent.from_pretrained(str(folder))


def weights_outside(work: Path, mark: Path) -> None:
    """The index of the weights names a file of another folder."""
    folder = _model(work)
    names = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", work / "outside.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../outside.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    HookedRecurrent.from_pretrained(str(folder))
    mark.touch()  # it was read


def pickled_dictionary(work: Path, mark: Path) -> None:
    """A pickle under the name of the dictionary's weights."""
    checkpoints(fresh(), work)
    (work / "sae" / "sae_weights.safetensors").write_bytes(pickle.dumps(_Evil(mark)))
    _reseal(work / "sae")
    load_sae(work / "sae")


def pickled_checkpoint(work: Path, mark: Path) -> None:
    """A pickle as the state of the trainer in a checkpoint that a run resumes."""
    from sae_lens_writesae.sae.checkpoint import TRAINER_STATE_FILENAME, check_checkpoint
    from sae_lens_writesae.sae.runner import training_config

    model = fresh()
    checkpoints(model, work)
    folder = sorted(work.glob(f"run/*/*/{TRAINER_STATE_FILENAME}"))[0].parent
    torch.save({"n": _Evil(mark)}, folder / TRAINER_STATE_FILENAME)
    _reseal(folder)
    sizes = {"training_tokens": 640, "train_batch_size_tokens": 64, "context_size": 32, "n_batches_in_buffer": 4}
    sizes |= {"store_batch_size_prompts": 4, "lr_warm_up_steps": 2, "n_checkpoints": 3}
    how = {"checkpoint_path": str(work / "run"), "is_dataset_tokenized": True, "verbose": False}
    cfg = training_config(model, 1, 2, architecture="writesae_topk", d_sae=24, sae={"k": 4}, **sizes, **how)
    check_checkpoint(folder, cfg)


def _results(work: Path) -> Path:
    evaluation(fresh(), work)
    tables = sorted((work / "results").rglob("*.parquet"))
    return next(file.parent for file in tables if (file.parent / "info.json").exists())


def table_outside(work: Path, mark: Path) -> None:
    """A saved result names a table ``../../mark``, and the report writes tables by their names."""
    folder = _results(work)
    outside = f"../../{mark.stem}"
    pd.DataFrame({"a": [1]}).to_parquet(folder / "table.parquet")
    head = json.loads((folder / "info.json").read_text())
    _rewrite(folder / "info.json", tables=[*head["tables"], outside])
    write_report(find_results([work / "results"]), work / "page" / "report.html")


def label_outside(work: Path, mark: Path) -> None:
    """A saved result carries a label that is a path."""
    folder = _results(work)
    head = json.loads((folder / "info.json").read_text())
    _rewrite(folder / "info.json", info=head["info"] | {"label": f"../../{mark.name}", "model": f"/../{mark.name}"})
    before = set(work.rglob("*"))
    write_report(find_results([work / "results"]), work / "page" / "report.html")
    if any(not file.is_relative_to(work / "page") for file in set(work.rglob("*")) - before):
        mark.touch()


def large_table(work: Path, mark: Path) -> None:
    """A table of a few kilobytes that unpacks to eight gigabytes."""
    folder = _results(work)
    file = sorted(folder.glob("*.parquet"))[0]
    names = pq.read_schema(file).names
    rows = pa.table({name: pa.nulls(10**7) for name in names})
    with pq.ParquetWriter(file, rows.schema) as writer:
        for _ in range(100 // len(names) + 1):
            writer.write_table(rows)
    _reseal(folder)
    load_result(folder)
    mark.touch()  # it was read


def _large(file: Path) -> None:
    """Two gigabytes of zeros that take no room on the disk. Without a seal, which would be compared first."""
    (file.parent / CHECKSUMS).unlink(missing_ok=True)
    with file.open("r+b") as opened:
        opened.truncate(2 * 10**9)


def large_config(work: Path, mark: Path) -> None:
    """config.json of a model has two gigabytes."""
    _large(_model(work) / "config.json")
    HookedRecurrent.from_pretrained(str(work / "model"))


def large_model(work: Path, mark: Path) -> None:
    """config.json of a model asks for a vocabulary of a trillion tokens."""
    _rewrite(_model(work) / "config.json", vocab_size=10**12)
    HookedRecurrent.from_pretrained(str(work / "model"))


def large_tokenizer(work: Path, mark: Path) -> None:
    """tokenizer.json of a model has two gigabytes."""
    _large(_model(work) / "tokenizer.json")
    HookedRecurrent.from_pretrained(str(work / "model"))


def large_dictionary(work: Path, mark: Path) -> None:
    """cfg.json of a dictionary has two gigabytes."""
    checkpoints(fresh(), work)
    _large(work / "sae" / "cfg.json")
    load_sae(work / "sae")


def large_index(work: Path, mark: Path) -> None:
    """index.json of a collection has two gigabytes."""
    collection(fresh(), work)
    _large(work / "writes" / INDEX)
    Collection.open(work / "writes")


def large_result(work: Path, mark: Path) -> None:
    """info.json of a result has two gigabytes."""
    folder = _results(work)
    _large(folder / "info.json")
    load_result(folder)


def large_claims(work: Path, mark: Path) -> None:
    """index.json of a collection claims sequences of a billion tokens, and a shard says that this is right."""
    collection(fresh(), work)
    folder = work / "writes"
    index = json.loads((folder / INDEX).read_text())
    index["contents"]["context_size"] = 10**9
    contents, file = Contents.from_dict(index["contents"]), folder / index["shards"][0]["file"]
    save_file(load_file(file), file, metadata=contents.metadata(0))
    index["shards"][0]["bytes"] = file.stat().st_size
    (folder / INDEX).write_text(json.dumps(index))
    Collection.open(folder)


ATTACKS: list[Attack] = [
    code_of_a_model,
    code_of_a_tokenizer,
    pickled_weights,
    weights_outside,
    pickled_dictionary,
    pickled_checkpoint,
    table_outside,
    label_outside,
    large_table,
    large_model,
    large_config,
    large_tokenizer,
    large_dictionary,
    large_index,
    large_result,
    large_claims,
]


def throw(attack: Attack, work: Path) -> str:
    """What an attack led to: "no effect", "refused by name", or what went wrong."""
    work.mkdir(parents=True, exist_ok=True)
    mark = work.parent / f"mark-of-{attack.__name__}.parquet"
    asked = io.StringIO()

    def ask(*prompt: object) -> str:
        asked.write(str(prompt))
        return "y"

    with warnings.catch_warnings(), patch("builtins.input", ask), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            attack(work, mark)
            outcome = "no effect"
        except (ValueError, OSError) as error:
            outcome = "refused by name" if str(work) in str(error) else f"refused without a name: {error}"
    if mark.exists() or asked.getvalue():
        return f"it worked: {asked.getvalue()}"
    return outcome
