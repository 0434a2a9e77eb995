"""A run of the whole table: its steps, what a kill leaves, several processes, and what it says beforehand."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from hookpoints import HookedRecurrent, embedded
from sae_lens_writesae.cli import main
from sae_lens_writesae.evaluations import load_result
from sae_lens_writesae.reproduce import workspace
from sae_lens_writesae.reproduce.command import Place, Reproduce, run_tasks
from sae_lens_writesae.reproduce.config import SMALL, ReproduceConfig
from sae_lens_writesae.reproduce.estimate import DiskTooSmallError, Estimate, Pieces, estimate
from sae_lens_writesae.reproduce.tasks import dictionaries, make_tasks
from sae_lens_writesae.reproduce.workspace import Workspace, whole_checkpoints

TINY = {
    "model": "embedded",
    "layers": (2,),
    "heads": (0,),
    "seeds": (0,),
    "losses": (),
    "variants": (),
    "evaluations": ("multistep",),
    "d_sae": 32,
    "k": 4,
    "training_tokens": 2048,
    "train_batch_size_tokens": 256,
    "context_size": 64,
    "eval_sequences": 6,
    "n_atoms": 3,
    "firings_per_atom": 2,
    "dashboards": 0,
}


def test_every_step_follows_what_it_needs_and_the_report_is_last():
    chosen = ("substitution", "multistep", "sign")
    config = ReproduceConfig(layers=(1, 9), heads=(4, 5), evaluations=chosen, dashboards=0)
    tasks = make_tasks(config)
    keys = [task.key for task in tasks]
    assert len(set(keys)) == len(keys) and keys[-1] == "report"
    assert all(keys.index(need) < keys.index(task.key) for task in tasks for need in task.needs)
    evaluations = [task for task in tasks if task.kind in chosen]
    assert all(task.needs and all(need.endswith("/sae") for need in task.needs) for task in evaluations)
    # Per head: two targets, two losses, two more seeds, seven variants of two seeds each; each evaluation of the two
    # plain ones, or of the head.
    counts = {"sae": 4 * 20, "substitution": 8, "multistep": 8, "sign": 4, "report": 1}
    assert Counter(task.kind for task in tasks) == counts
    assert set(tasks[-1].needs) == set(keys[:-1])


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"layers": ()}, "layers"),
        ({"seeds": (1, 1)}, "seeds"),
        ({"losses": ("mse",)}, "mse"),
        ({"variants": ("Wrong",)}, "Wrong"),
        ({"k": 0}, "k must"),
    ],
)
def test_a_wrong_setting_is_said(changes, word):
    with pytest.raises(ValueError, match=word):
        ReproduceConfig(**changes)


def test_an_unknown_evaluation_is_said():
    with pytest.raises(ValueError, match="wrong"):
        make_tasks(ReproduceConfig(evaluations=("wrong",)))


def test_a_folder_of_another_run_is_not_touched(tmp_path):
    ReproduceConfig(**TINY).keep_in(tmp_path)
    before = (tmp_path / "config.json").read_bytes()
    ReproduceConfig(**TINY).keep_in(tmp_path)
    with pytest.raises(ValueError, match="d_sae"):
        ReproduceConfig(**TINY | {"d_sae": 64}).keep_in(tmp_path)
    assert (tmp_path / "config.json").read_bytes() == before
    assert ReproduceConfig(**json.loads(before)) == ReproduceConfig(**TINY)


class Interrupted(Workspace):
    """Stops where the first evaluation would begin."""

    def evaluate(self, name, key, dictionaries):
        raise KeyboardInterrupt


def test_a_run_goes_on_where_it_stopped(tmp_path, caplog):
    config = ReproduceConfig(**TINY | {"targets": ("write",)})
    done: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run_tasks(config, tmp_path, workspace=Interrupted(config, tmp_path), say=done.append)
    weights = tmp_path / "L2H0/write-seed0/sae/sae_weights.safetensors"
    trained = weights.stat().st_mtime_ns
    assert run_tasks(config, tmp_path, say=done.append) == ["L2H0/write-seed0/multistep", "report"]
    assert weights.stat().st_mtime_ns == trained
    assert run_tasks(config, tmp_path) == []
    assert not [record for record in caplog.records if record.name == "sae_lens"]  # "... not be reproducible"
    claims = json.loads((tmp_path / "report/report.json").read_text())["claims"]
    assert {claim["label"] for claim in claims} == {"L2H0 write-trained"}
    assert (tmp_path / "report/tables/multistep-steps.parquet").exists()


def test_what_cannot_be_measured_is_said_in_the_report_and_not_tried_again(tmp_path: Path) -> None:
    """Here no atom fires as often as is asked: there is no partition."""
    settings = {"partition": {"min_firings": 10**6}}
    config = ReproduceConfig(**TINY | {"targets": ("write",), "evaluations": ("partition",), "settings": settings})
    cell = "L2H0/write-seed0"
    run_tasks(config, tmp_path, say=lambda line: None)
    reason = load_result(tmp_path / cell / "partition").skipped
    assert reason is not None and "min_firings" in reason
    page, numbers = ((tmp_path / "report" / f"report.{kind}").read_text() for kind in ("html", "json"))
    answers = [(row["number"], row["outcome"], row["sentence"]) for row in json.loads(numbers)["claims"]]
    assert answers == [(n, "not tested", reason) for n in (4, 6, 26, 27)] and "partition of L2H0" in page
    assert run_tasks(config, tmp_path, say=lambda line: None) == []


def test_another_model_and_dataset_by_their_folders(tmp_path):
    """Documents are numbered: those kept for evaluation come first, and none of them is trained on."""
    folder = tmp_path / "texts"
    folder.mkdir()
    words = embedded.text("train").split()
    documents = [f"{n} " + " ".join(words[n * 60 : n * 60 + 60]) for n in range(80)]
    lines = [json.dumps({"text": document}) for document in documents]
    (folder / "train.jsonl").write_text("\n".join(lines))
    changes = {"model": str(embedded.path("embedded")), "dataset": str(folder), "targets": ("write",)}
    config = ReproduceConfig(**TINY | changes | {"eval_sequences": 4, "training_tokens": 512})
    work = Workspace(config, tmp_path / "run")
    work.check()
    trained_on = [int(text.split()[0]) for text in work.dataset["text"]]
    evaluated = "".join(work.model.tokenizer.batch_decode(work.tokens))
    assert work.tokens.shape == (4, 64) and documents[0][:40] in evaluated
    assert trained_on == list(range(trained_on[0], trained_on[0] + len(trained_on))) and len(trained_on) > 4
    assert not any(documents[n][:40] in evaluated for n in trained_on)
    assert run_tasks(config, tmp_path / "run", workspace=work)[-1] == "report"
    with pytest.raises(ValueError, match="dataset"):
        Workspace(ReproduceConfig(**TINY | {"model": changes["model"]}), tmp_path).check()


def test_a_checkpoint_that_a_kill_cut_short_is_passed_over(tmp_path):
    for samples, text in (("256", "{}"), ("1024", "{}"), ("2048", '{"cut'), ("4096", None)):
        folder = tmp_path / "run" / samples
        folder.mkdir(parents=True)
        if text is not None:
            (folder / "runner_cfg.json").write_text(text)
    aside = tmp_path / "run" / ".writing-abc" / "8192"
    aside.mkdir(parents=True)
    (aside / "runner_cfg.json").write_text("{}")
    assert [path.name for path in whole_checkpoints(tmp_path)] == ["256", "1024"]


def test_training_goes_on_from_the_newest_checkpoint(tmp_path, monkeypatch):
    config = ReproduceConfig(**TINY)
    dictionary = next(dictionaries(config))
    for samples in ("256", "1024"):
        folder = tmp_path / dictionary.key / "checkpoints" / "run" / samples
        folder.mkdir(parents=True)
        (folder / "runner_cfg.json").write_text("{}")

    def stop(cfg, **_):
        raise InterruptedError(cfg.resume_from_checkpoint)

    monkeypatch.setattr(workspace, "_FrugalRunner", stop)
    with pytest.raises(InterruptedError, match="1024"):
        Workspace(config, tmp_path).train(dictionary)


@pytest.mark.slow
def test_the_seed_decides_a_dictionary_and_a_stop_does_not_change_it(tmp_path, monkeypatch):
    config = ReproduceConfig(**TINY | {"seeds": (0, 1), "training_tokens": 8192})
    first, second = (next(d for d in dictionaries(config) if d.seed == seed) for seed in (0, 1))

    def trained(name, dictionary):
        Workspace(config, tmp_path / name).train(dictionary)
        return (tmp_path / name / dictionary.key / "sae/sae_weights.safetensors").read_bytes()

    whole = trained("one", first)
    assert trained("two", second) != whole
    saves, save = iter(range(99)), workspace._FrugalRunner.save_whole_checkpoint

    def stopping(runner, *arguments, **named):
        save(runner, *arguments, **named)
        if next(saves) == 8:
            raise InterruptedError

    monkeypatch.setattr(workspace._FrugalRunner, "save_whole_checkpoint", stopping)
    with pytest.raises(InterruptedError):
        trained("three", first)
    assert len(whole_checkpoints(tmp_path / "three")) == 2
    assert trained("three", first) == whole
    assert next(saves) > 9  # it went on with its checkpoints


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_training_that_is_killed_again_and_again_ends_with_the_same_dictionary(tmp_path):
    config = ReproduceConfig(**TINY | {"training_tokens": 16384})
    dictionary = next(dictionaries(config))
    result = f"{dictionary.key}/sae/sae_weights.safetensors"
    work = Workspace(config, tmp_path / "whole")
    begin = time.monotonic()
    work.train(dictionary)
    length = time.monotonic() - begin
    draw, kills, folder = random.Random(0), 0, tmp_path / "killed"
    while kills < 20:
        process = os.fork()
        if process == 0:
            try:
                work.folder = folder
                work.train(dictionary)
            finally:
                os._exit(0)
        time.sleep(draw.uniform(0, length))
        os.kill(process, signal.SIGKILL)
        if os.WIFSIGNALED(os.waitpid(process, 0)[1]):
            kills += 1
        else:
            assert (folder / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()
            folder = tmp_path / f"killed{kills}"
    Workspace(config, folder).train(dictionary)
    assert (folder / result).read_bytes() == (tmp_path / "whole" / result).read_bytes()


def test_an_estimate_counts_what_is_left_and_refuses_a_full_disk(tmp_path):
    config = ReproduceConfig(**TINY)
    model = HookedRecurrent.from_pretrained("embedded")
    whole = estimate(config, tmp_path, model)
    (tmp_path / "L2H0/write-seed0/sae").mkdir(parents=True)
    rest = estimate(config, tmp_path, model, whole.pieces)
    assert whole.tasks["sae"] == 2 and rest.tasks["sae"] == 1
    weights = 4 * (32 * (2 * (64 + 32) + 1) + 64 * 32)
    assert whole.disk - rest.disk == weights
    assert whole.seconds > rest.seconds > 0
    assert whole.memory > sum(p.numel() * p.element_size() for p in model.hf_model.parameters())
    whole.check()
    small = Estimate(Pieces(1, 1, 1), whole.tasks, 1, 1, disk=2e9, free=1e9)
    with pytest.raises(DiskTooSmallError, match="GB"):
        small.check()


def test_processes_know_their_place(monkeypatch):
    assert Place.from_environment() == Place(0, 1, 0)
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    assert Place.from_environment() == Place(3, 4, 1)


def test_the_command_line_is_the_config():
    words = ["--layers", "1", "9", "17", "--heads", "4", "--small", "--d-sae", "64"]
    small = Reproduce.from_arguments(words)
    assert small.config.layers == (1, 9, 17) and small.config.heads == (4,)
    assert small.config.d_sae == 64 and small.config.training_tokens == SMALL.training_tokens  # a flag wins
    assert Reproduce.from_arguments([]).config == ReproduceConfig()


def test_what_cannot_run_is_said_before_anything_is_written(tmp_path, capsys):
    out = tmp_path / "run"

    def reproduce(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["reproduce", "--model", "embedded", "--out", str(out), *arguments])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert "layer 0" in reproduce("--layers", "0", "--heads", "0")
    assert "heads 0 to 3" in reproduce("--layers", "2", "--heads", "9")
    assert "wrong" in reproduce("--layers", "2", "--heads", "0", "--evaluations", "wrong")
    assert not out.exists()


ARGUMENTS = [
    *("--model", "embedded", "--layers", "2", "--heads", "0", "1", "--targets", "write", "--seeds", "0"),
    *("--variants", "TiedSAE", "--evaluations", "multistep", "--small", "--dashboards", "0"),
    *("--training-tokens", "20000", "--n-atoms", "4", "--eval-sequences", "8"),
]


def start(out: Path, rank: int = 0, world: int = 1) -> subprocess.Popen[bytes]:
    places = {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"}
    code = "from sae_lens_writesae.cli import main; main()"
    command = [sys.executable, "-c", code, "reproduce", *ARGUMENTS, "--out", str(out)]
    return subprocess.Popen(command, env=os.environ | places, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


@pytest.mark.slow
def test_killed_then_shared_by_two_processes(tmp_path):
    """SIGKILL in the second training; two processes then do the rest between them, nothing twice."""
    process = start(tmp_path)
    deadline = time.monotonic() + 240
    while not list(tmp_path.glob("L2H*/*/checkpoints/*/*/runner_cfg.json")) or not list(tmp_path.glob("L2H0/*/sae")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("L2H*/*/sae/sae_weights.safetensors")}
    both = [start(tmp_path, rank, 2) for rank in range(2)]
    said = [process.communicate(timeout=400)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    did = re.findall(r"^(\S+)  \d+ s$", "".join(said), flags=re.MULTILINE)
    assert len(set(did)) == len(did) and "report" in did
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    for head in (0, 1):
        assert (tmp_path / f"L2H{head}/write-seed0/multistep/info.json").exists()
        assert (tmp_path / f"L2H{head}/write-TiedSAE-seed0/sae/cfg.json").exists()
    assert not list(tmp_path.rglob("checkpoints"))
    assert "L2H1" in (tmp_path / "report/report.html").read_text()
