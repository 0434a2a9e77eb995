"""The protocol as a workflow: what it covers, what is refused beforehand, who owns a run, and what a kill leaves."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch
import transformers
from tiny_models import _GDN

from hookpoints import HookedRecurrent
from hookpoints import embedded as shipped
from writesae.cli import parse
from writesae.flags import Collect, Train
from writesae_study.evaluate import EvalAll
from writesae_study.evaluations import EVALUATIONS
from writesae_study.reproduce.command import Reproduce, for_model, own_run, profile_folder
from writesae_study.reproduce.config import SMALL, ReproduceConfig
from writesae_study.reproduce.published import (
    RUNS,
    Place,
    collecting,
    command_lines,
    places,
    question,
    shuffled_model,
    without_learning,
)
from writesae_study.reproduce.texts import write_texts

TINY = replace(
    SMALL,
    **{"model": "embedded", "layers": (2,), "heads": (0,), "seeds": (0,), "losses": (), "variants": ()},
    **{"evaluations": ("multistep", "sign"), "d_sae": 32, "k": 4, "training_tokens": 2048, "dashboards": 0},
    **{"eval_sequences": 6, "n_atoms": 3, "firings_per_atom": 2, "set": ("sign.n_positions=4",)},
)


# ------------------------------------------------------------------------------------------------ what a run covers


def test_layers_and_heads_follow_the_model():
    published = transformers.Qwen3_5TextConfig(**{**_GDN, "num_hidden_layers": 24, "linear_num_value_heads": 16})
    models = (
        HookedRecurrent.from_pretrained("embedded"),
        HookedRecurrent.from_hf(transformers.Qwen3_5ForCausalLM(published)),
    )
    small, paper = map(for_model, (replace(SMALL, model="embedded"), ReproduceConfig()), models)
    assert (small.layers, small.heads, paper.layers, paper.heads) == ((2,), (1,), (1, 9, 17), (4,))


def test_the_default_head_is_one_that_all_layers_have():
    model = HookedRecurrent.from_pretrained("embedded")
    model.cfg.layers[2] = replace(model.cfg.layer(2), H=64)
    assert for_model(ReproduceConfig(model="embedded"), model).heads == (1,)


def test_documents_kept_for_evaluation_are_not_trained_on(tmp_path, embedded):
    words = shipped.text("train").split()
    documents = [" ".join(words[n * 60 : n * 60 + 60]) for n in range(80)]
    (tmp_path / "all.jsonl").write_text("\n".join(json.dumps({"text": document}) for document in documents))
    write_texts(replace(TINY, dataset=str(tmp_path), training_tokens=512), tmp_path / "run", embedded)
    held_out = (tmp_path / "run" / "held-out.txt").read_text().split("\n\n")
    lines = (tmp_path / "run" / "train" / "train.jsonl").read_text().splitlines()
    trained_on = [json.loads(line)["text"] for line in lines]
    assert held_out and trained_on and held_out + trained_on == documents[: len(held_out) + len(trained_on)]


# ------------------------------------------------------------------------------------------------ who owns a run

OWNER = """
import os, sys, writesae
from pathlib import Path
from writesae_study.reproduce.command import own_run
own_run(Path(sys.argv[1]))
os.execv(sys.executable, [sys.executable, "-c", "print('mine', flush=True); import time; time.sleep(600)"])
"""


def test_a_living_owner_is_told_from_a_dead_one(tmp_path):
    """The owner becomes another program, as it becomes Snakemake, and is killed."""
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert owner.stdout is not None and owner.stdout.readline() == b"mine\n"
        with pytest.raises(ValueError, match=str(tmp_path)):
            own_run(tmp_path)
    finally:
        owner.kill()
        owner.communicate()
    own_run(tmp_path)


def test_a_run_of_other_weights_or_text_is_refused(tmp_path):
    TINY.keep_in(tmp_path)
    (tmp_path / "inputs.json").write_text('{"weights": "of another model", "text": null}')
    with pytest.raises(ValueError, match="expected a run of these weights and this text"):
        Reproduce(config=TINY, out=tmp_path).run()
    assert not (tmp_path / ".owner").exists()


# ------------------------------------------------------------------------------------------------ the workflow


def snakemake(folder: Path, *arguments: str, file: str = "Snakefile") -> str:
    where = ["--snakefile", str(profile_folder("laptop").parents[1] / file), "--directory", str(folder)]
    command = [sys.executable, "-m", "snakemake", *where, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def planned(output: str) -> dict[str, int]:
    """How often a dry run would do each step."""
    return {line[0]: int(line[1]) for line in map(str.split, output.splitlines()) if line[1:] and line[1].isdigit()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "profile", ["gpus", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("laptop", "gpu", "slurm"))]
)
def test_a_dry_run_of_every_profile_plans_every_step_once(tmp_path, profile):
    replace(TINY, layers=(1, 2), heads=(0, 3), evaluations=("sign", "amplify"), dashboards=2).keep_in(tmp_path)
    output = snakemake(tmp_path, "--profile", str(profile_folder(profile)), "--dry-run")
    steps = {"collect": 1, "train": 8, "evaluate": 8, "compare": 4, "together": 2, "show": 4, "report": 1}.items()
    assert planned(output).items() >= steps
    assert output.count("writesae train --collection collection --layers 2 --heads 3") == 2 * 1
    assert f"share {8 if profile == 'gpus' else 1} collect --model embedded" in output
    assert sorted(each.name for each in tmp_path.iterdir() if each.name != ".snakemake") == ["config.json"]


@pytest.mark.slow
def test_a_dry_run_of_the_published_runs_plans_every_result(tmp_path):
    output = snakemake(tmp_path, "--profile", str(profile_folder("laptop")), "--dry-run", file="published.smk")
    assert sum(planned(output).values()) > 10


PATIENCE = 1200
"""Seconds after which a run hangs: some times what it takes while seven other programs run."""
ARGUMENTS = [
    *("reproduce", "--model", "embedded", "--small", "--layers", "2", "--heads", "0", "--seeds", "0", "--losses"),
    *("--variants", "--dashboards", "0", "--evaluations", "multistep", "sign", "--set", "sign.n_positions=4"),
    *("--training-tokens", "8192", "--eval-sequences", "6", "--n-atoms", "3"),
]


def start(out: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", "writesae", *ARGUMENTS, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.nightly
def test_killed_again_and_again_a_run_ends_as_one_that_was_not(tmp_path):
    """SIGKILL of the process that was typed, while its steps go on; what was finished is not touched again."""
    out, kept = tmp_path / "run", {}
    for moment in ("L2H0/*/sae", "L2H0/*/multistep/*/info.json"):
        process = start(out)
        deadline = time.monotonic() + PATIENCE
        while not list(out.glob(moment)):
            assert time.monotonic() < deadline and process.poll() is None, process.communicate()[0].decode()
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert list((out / ".snakemake" / "locks").iterdir())  # stale
        kept |= {path: path.stat().st_mtime_ns for path in out.glob("L2H0/*/sae/sae_weights.safetensors")}
    process = start(out)
    try:
        output = process.communicate(timeout=PATIENCE)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 0, output
    assert kept and all(path.stat().st_mtime_ns == before for path, before in kept.items())
    claims = json.loads((out / "report/report.json").read_text())["claims"]
    assert {claim["label"] for claim in claims} == {"L2H0 write-trained", "L2H0 state-trained", "L2H0"}
    assert not list(out.rglob("checkpoints"))
    assert "Nothing to be done" in snakemake(out, "--profile", str(profile_folder("laptop")), "--dry-run")


# ------------------------------------------------------------------------------------------------ published numbers

ROOT = Path(__file__).parents[2]


COMMANDS = {"collect": Collect, "train": Train, "eval": EvalAll, "reproduce": Reproduce}


def test_rows_are_commands_and_the_published_results_are_theirs():
    lines = [collecting(model) for model in RUNS["collect"]]
    for run in RUNS["run"]:
        lines += [words for place in places(run["heads"]) for words in command_lines(run, place)]
    asked = set()
    for row in RUNS["null"]:
        for place in places(row["heads"]):
            asked |= {
                (null, place.model, place.cell, question(kind)) for null in RUNS["nulls"] for kind in row["kinds"]
            }
    for name, *arguments in lines:
        command = parse(COMMANDS[name], name, arguments[name == "eval" :])
        if isinstance(command, EvalAll):
            asked |= {(*command.subjects.out.parts[1:], test) for test in command.evaluations()}
    saved = set()
    packed = pd.read_parquet(ROOT / "study/docs/results/results.parquet")
    for recipe, kind, settings, about in packed[["recipe", "kind", "settings", "info"]].to_numpy().tolist():
        info = json.loads(about)
        test = EVALUATIONS[kind].from_dict(json.loads(settings) | {"label": ""})
        saved.add((recipe, info["model"], f"L{info['layer']}H{info['head']}", test))
    assert saved <= asked
    assert {name for name, *_ in asked - saved} <= RUNS["nulls"].keys()  # of which the pages show those that are there


def test_every_published_table_names_its_row():
    named_files = [sorted(ROOT.glob(pattern)) for pattern in RUNS["tables"]]
    assert all(named_files)
    places = (ROOT / "docs", ROOT / "study/docs")
    data = [file for place in places for suffix in ("json", "parquet") for file in place.rglob(f"*.{suffix}")]
    assert sorted(file for files in named_files for file in files) == sorted(data)
    for command in RUNS["tables"].values():
        program, name, *arguments = command.split()
        if program == "python":
            assert (ROOT / name).is_file()
        else:
            parse(COMMANDS[name], command, arguments)


def test_a_shuffled_model_has_the_same_numbers_elsewhere():
    ours = shuffled_model("recall").W_U.flatten()
    theirs = HookedRecurrent.from_pretrained("recall").W_U.flatten()
    assert torch.equal(ours.sort().values, theirs.sort().values) and not torch.equal(ours, theirs)
    assert torch.equal(ours, shuffled_model("recall").W_U.flatten())


def test_published_runs_have_their_own_settings(tmp_path):
    with pytest.raises(ValueError, match="expected no other flag"):
        Reproduce(published=True, small=True, out=tmp_path / "run").run()
    assert not (tmp_path / "run").exists()


@pytest.mark.nightly
def test_results_where_nothing_was_learned_are_made_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(RUNS["sizes"], "d-sae", 64)
    seen = []
    for _ in range(2):
        without_learning(Place("embedded", 2, 0), [EVALUATIONS["sign"].from_dict({"n_positions": 4})])
        seen.append({file: file.stat().st_mtime_ns for file in tmp_path.rglob("info.json")})
    assert {file.relative_to(tmp_path / "runs").parts[0] for file in seen[0]} == RUNS["nulls"].keys()
    assert seen[0] == seen[1]
