"""What benchmarks say of the study: hours of the paper's table, and what a substitution launches on a GPU."""

from __future__ import annotations

import itertools
import re
import sys
from pathlib import Path

import device
import pytest
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_writesae import VARIANTS
from sae_lens_writesae.sae.architectures import training_config_class
from writesae.choices import DictionaryName
from writesae.training import common_shape
from writesae_study.reproduce.config import ReproduceConfig

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import launches
import real_size
import run


def test_hours_of_the_papers_table_count_the_dictionaries_that_reproduce_trains_on_matrices():
    config = ReproduceConfig()
    size = {"d_in": 128 * 128, "d_k": 128, "d_v": 128, "d_sae": 4, "k": 2}
    ways = list[str | None]()
    for name in map(DictionaryName.parse, itertools.chain(*config.dictionaries().values())):
        fields = VARIANTS.get(name.variant, VARIANTS["FlatSAE"])
        sae = training_config_class(config.architecture)(**size, **fields, loss=name.loss)
        hook = f"blocks.1.mixer.heads.0.hook_{name.target}_vec"
        ways.append(common_shape(LanguageModelSAERunnerConfig(sae=sae, hook_name=hook, checkpoint_path=None)))
    assert (len(ways), ways.count(None)) == (real_size.trained()["all"], real_size.trained()["on_matrices"])
    table = run.section("real_size", run.records(run.DOCS / "benchmarks", ("real_size",))["real_size"])[0]
    on_matrices, on_factors = re.findall(r"\| train, .*? \| ([\d.,]+)", table)
    assert float(on_matrices) > 20 * float(on_factors)


@pytest.mark.nightly
def test_a_substitution_stays_below_its_ceilings() -> None:
    with device.pretended() as seen:
        costs = launches.of_substitution(seen)
    assert costs["launch"] <= 60_000 and costs["sync"] <= 200
