"""The pages are what their records say, every measurement runs, and what has learned nothing scores at chance."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "scripts"))

import use_page

from sae_lens_writesae import steer, train_on_writes, training_config
from writesae.demo import Demo
from writesae.dictionary.quality import LASTING
from writesae.use import detection, steering
from writesae.use.features import HeadTerms, features_of
from writesae.use.memory import LATER, PAIRS, compressed, cut_facts, tokens_read, ways_to_cut


def test_the_pages_are_made_of_the_records(tmp_path):
    (tmp_path / "use").symlink_to(use_page.DOCS / "use")
    pages = use_page.write(tmp_path)
    assert [page.name for page in pages] == ["use.md", "memory_surgery.md"]
    for page in pages:
        assert page.read_text() == (use_page.DOCS / page.name).read_text(), page.name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", use_page.NAMES)
def test_each_measurement_runs_from_end_to_end(name, tmp_path):
    if name == "probes":
        pytest.importorskip("sae_probes")
    use_page.run(name, tmp_path, quick=True)
    text = use_page.write(tmp_path)[-1].read_text()
    assert "## A fact that is cut" in text if name == "memory" else f"## {name.title()}\n\n**Small sizes**" in text


def test_the_head_is_the_one_that_the_demo_takes():
    assert Demo().memory == LASTING


def test_codes_have_the_sizes_of_their_names_and_that_of_a_dictionary_is_its_own():
    terms = HeadTerms("embedded", 4, 16, 1024)
    writes, metric = terms.native, terms.in_metric
    sides = writes.keys[:, 0], writes.values[:, 0]
    for label, features in terms.features().items():
        active = (features.encode(*sides) != 0).sum(1).max()
        assert features.values.shape == (16, 32) and 0 < active <= (1 if "(1 active)" in label else 4), label
    fields = {"metric": "gauss_newton", "d_sae": 16, "training_tokens": 1024, "sae": {"k": 4}}
    sae = train_on_writes(training_config(terms.model, *terms.place, **fields), *sides, metric=metric)
    found, rows = features_of(sae.eval(), 4).encode(*sides), writes.dense().flatten(1)
    torch.testing.assert_close(found, sae.encode(rows), atol=1e-5, rtol=1e-5)


def test_explanations_find_what_tokens_decide_and_nothing_in_random_firings():
    tokens, new = torch.randint(0, 9, (2, 64, 64), generator=torch.Generator().manual_seed(0))
    noise = torch.rand(2, 64 * 64, generator=torch.Generator().manual_seed(1)) < 0.1
    seen, fires = (torch.stack([x.flatten() == 3, at], 1).float() for x, at in zip((tokens, new), noise))
    found = detection.scores(*detection.predicted(tokens, seen, new, 9), fires)["balanced accuracy"]
    assert found[0] == 1 and abs(found[1] - 0.5) < 0.03


def test_scores_of_predictions_by_hand():
    """Two atoms: 3 of 4 predictions are hits of 5 firings, and 1 of 2 of 2. Means of 0.4 are passed five times."""
    fires = torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0, 0, 0]]).T.float()
    rates = torch.tensor([[9, 8, 7, 0, 0, 6, 5, 0, 0, 0], [0, 9, 8, 0, 0, 0, 0, 0, 0, 0]]).T / 10
    found = detection.scores(rates, torch.tensor([0.4, 0.4]), fires)
    assert found["F1"] == pytest.approx([2 * 3 / (4 + 5), 2 * 1 / (2 + 2)], abs=1e-3)
    assert found["balanced accuracy"] == pytest.approx([(3 / 5 + 3 / 5) / 2, (1 / 2 + 7 / 8) / 2], abs=1e-3)


def test_ways_to_cut_read_the_share_of_the_later_tokens_that_their_names_say():
    for m in LATER:
        shares = {"without": 0, "reread 4": 4 / m, "reread m/4": 0.25, "reread m/8, and the last m/8": 0.25}
        assert tokens_read(m) == shares | {"reread m (exact)": 1} and tokens_read(m).keys() == ways_to_cut(m).keys()


@torch.no_grad()
def test_the_side_effect_of_steering_is_the_divergence_of_the_other_tokens(embedded):
    tokens, steered = torch.arange(1, 25)[None], steer(embedded, 4, 0, toward=7, strength=2)
    with steered:
        logits = embedded(tokens)
    others = [x.index_fill(-1, torch.tensor(7), -100.0).log_softmax(-1) for x in (embedded(tokens), logits)]
    kl = float((others[0].exp() * (others[0] - others[1])).sum(-1).mean())
    found = steering.effects((tokens, embedded(tokens).log_softmax(-1)), 7, steered)
    assert found[1] == pytest.approx(kl, rel=1e-3) and found[1] > 1e-3 and found[0] > 0


@torch.no_grad()
def test_the_strength_of_steering_is_the_one_with_the_side_effect_that_is_asked_for(embedded):
    tokens = torch.arange(1, 25)[None]
    text = tokens, embedded(tokens).log_softmax(-1)

    def way(n, strength):
        return steer(embedded, 4, 0, toward=7, strength=strength)

    nats = steering.effects(text, 7, way(0, 2.0))[1]
    assert steering.strength_for(way, 0, 7, text, nats, (1.0, 2.0, 4.0)) == pytest.approx(2)
    between = steering.strength_for(way, 0, 7, text, nats, (1.5, 3.0))
    assert steering.effects(text, 7, way(0, between))[1] == pytest.approx(nats, rel=0.05)


@torch.no_grad()
def test_states_of_full_rank_lose_nothing_and_mixed_ones_go_over_to_the_other(embedded):
    found = compressed(embedded, 2)
    assert found["rank 32"]["kl"] < 1e-6 < found["rank 1"]["kl"] < found["empty"]["kl"]
    kept, away = ([found[f"t {t}"][name] for t in (0.25, 0.5, 0.75, 1.0)] for name in ("kl to the other", "kl"))
    assert kept == sorted(kept, reverse=True) and away == sorted(away)


@torch.no_grad()
def test_a_fact_that_is_cut_is_forgotten_and_no_other():
    found = cut_facts("recall", 4)
    asked = 4 * (PAIRS - 3)  # not the first pair, nor the last two
    assert set(found["not cut"].values()) == {(asked, asked)}
    forgotten, *kept = found["the default"].values()
    assert forgotten[0] < 0.2 * asked and all(right > 0.95 * asked for right, _ in kept)
    assert found["never read"]["the cut pair"][0] < 0.2 * asked
