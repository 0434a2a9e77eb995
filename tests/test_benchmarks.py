"""docs/benchmarks.md is what the records of benchmarks say, and the runner keeps the record of one that fails."""

import itertools
import json
import re
import sys
from pathlib import Path

from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_writesae import VARIANTS
from sae_lens_writesae.sae.architectures import training_config_class
from sae_lens_writesae.sae.fast import shape_of
from writesae.choices import DictionaryName
from writesae_study.reproduce.config import ReproduceConfig

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))

import frame  # noqa: E402
import real_size  # noqa: E402
import run  # noqa: E402

TINY = """
import time

QUICK = {"n": 2}

def measure(n: int = 9):
    return {"rounds": n, "slow / fast": {"time": 0.5}}
"""


def test_the_pages_are_made_of_the_records(tmp_path):
    (tmp_path / "benchmarks").symlink_to(run.DOCS / "benchmarks")
    run.write(tmp_path)
    for page in tmp_path.glob("*.md"):
        assert page.read_text() == (run.DOCS / page.name).read_text(), page.name


def test_hours_of_the_papers_table_count_the_dictionaries_that_reproduce_trains_on_matrices():
    config = ReproduceConfig()
    size = {"d_in": 128 * 128, "d_k": 128, "d_v": 128, "d_sae": 4, "k": 2}
    ways = list[str | None]()
    for name in map(DictionaryName.parse, itertools.chain(*config.dictionaries().values())):
        fields = VARIANTS.get(name.variant, VARIANTS["FlatSAE"])
        sae = training_config_class(config.architecture)(**size, **fields, loss=name.loss)
        hook = f"blocks.1.mixer.heads.0.hook_{name.target}_vec"
        ways.append(shape_of(LanguageModelSAERunnerConfig(sae=sae, hook_name=hook, checkpoint_path=None)))
    assert (len(ways), ways.count(None)) == (real_size.trained()["all"], real_size.trained()["on_matrices"])
    table = run.section("real_size", run.records(run.DOCS / "benchmarks", ("real_size",))["real_size"])[0]
    on_matrices, on_factors = re.findall(r"\| train, .*? \| ([\d.,]+)", table)
    assert float(on_matrices) > 20 * float(on_factors)


def test_the_page_of_circuits_quotes_its_record():
    page = (run.DOCS / "circuits.md").read_text()
    deleted = json.loads((run.DOCS / "benchmarks" / "circuits.json").read_text())["found"]["models"]["embedded"][
        "deleted"
    ]
    kinds = ("embedding", "mlp", "attn", "write")
    said = "embeddings {:.2f}, MLPs {:.2f}, softmax heads {:.2f}, writes {:.2f}"
    assert said.format(*(deleted[kind]["r"] for kind in kinds)) in " ".join(page.split())


def test_a_benchmark_leaves_a_record_and_a_failed_one_the_former(tmp_path, monkeypatch, capsys):
    (tmp_path / "tiny.py").write_text(TINY)
    monkeypatch.syspath_prepend(tmp_path)
    assert run.run(("tiny",), tmp_path, quick=True) == []
    file = tmp_path / "benchmarks" / "tiny.json"
    former = json.loads(file.read_text())
    assert former["found"] == {"rounds": 2, "slow / fast": {"time": 0.5}} and former["settings"] == {"n": 2}
    page = run.page(file.parent, ("tiny",))
    assert "| slow / fast, time | – | 0.50 |" in page
    (tmp_path / "tiny.py").write_text("raise SystemExit(3)")
    assert run.run(("tiny",), tmp_path, quick=True) == ["tiny"]
    assert json.loads(file.read_text()) == former and former["date"] in capsys.readouterr().out


def test_a_goal_is_met_or_missed():
    assert [frame.Line("", 2.0, goal=goal, least=least).missed for goal in (1.0, 3.0) for least in (False, True)] == [
        *(True, False),
        *(False, True),
    ]
    assert not frame.Line("", 2.0).missed
