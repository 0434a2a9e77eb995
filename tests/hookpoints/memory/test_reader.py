"""Readers of memories: scores by their definition, phrases that were read, cut and found again, files, bad input."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from remembering import drawn_ids
from tiny_models import KeepFloat64, hooked_in_float64
from torch.testing import assert_close

from hookpoints import HookedRecurrent, MemoryReader, embedded
from hookpoints.errors import InputError, ReaderWarning
from hookpoints.memory import templates
from hookpoints.memory.phrases import Phrases
from hookpoints.memory.reader import _written_states
from hookpoints.memory.sealing import load_sealed, save_sealed
from hookpoints.memory.templates import (
    RIDGE,
    AgeAccuracy,
    Fitted,
    LayerFit,
    Pursuit,
    Whitening,
    _accuracy_by_age,
    _equal_error_score,
    _logistic_fit,
    _Moments,
    _Plan,
    area_under_curve,
    running_tokens,
    states_at,
)
from hookpoints.zoo import english

T = 64


@pytest.fixture(scope="module")
def reader() -> MemoryReader:
    model = HookedRecurrent.from_pretrained("embedded")
    tokens = running_tokens(model, embedded.text("train"))
    return MemoryReader.fit(model, tokens[: 120 * 72], context=T, longest=8)


@pytest.fixture(scope="module")
def texts(reader: MemoryReader) -> torch.Tensor:
    """[24,T+40], that no fit has seen."""
    tokens = running_tokens(reader.model, embedded.text("test"))
    return torch.stack([tokens[900 * n :][: T + 40] for n in range(24)])


def test_whitened_states_have_moments_of_one():
    """Up to the ridge: states A^(1/2) X B^(1/2) of white X have their moments taken away."""
    drawn = torch.Generator().manual_seed(0)
    sides = [torch.randn(2, n, n, generator=drawn) for n in (5, 3)]
    states = 7 + sides[0] @ torch.randn(4000, 2, 5, 3, generator=drawn) @ sides[1]
    moments = _Moments()
    for part in states.split(1000):
        moments.add({0: part[:, None]})
    white = moments.whitenings()[0]
    x = states - states.mean(0)
    for root, second in ((white.keys, (x @ x.mT).mean(0)), (white.values, (x.mT @ x).mean(0))):
        sizes = torch.linalg.eigvalsh(second)
        expected = sizes / (sizes + RIDGE * sizes.mean(-1, keepdim=True))
        assert_close(torch.linalg.eigvalsh(root @ second @ root), expected, rtol=1e-3, atol=1e-3)
    assert_close(white.mean, states.mean(0), rtol=0, atol=1e-4)


def test_a_score_is_the_weighted_cosine_of_whitened_states(reader, texts):
    model, fitted = reader.model, reader.fitted
    memory = model.memory(texts[:2, :T])
    phrases = [texts[0, 5:9].tolist(), texts[1, 9:15].tolist()]
    expected = torch.tensor([[fitted.bias(4), fitted.bias(6)]] * 2, dtype=torch.float64)
    for n, phrase in enumerate(phrases):
        alone = model.memory(torch.tensor([[*fitted.lead, *phrase]]))
        for row in range(2):
            for layer, fit in fitted.layers.items():
                for place, head in enumerate(fit.heads.tolist()):
                    sides = []
                    for white, state in (
                        (fit.of_states, memory.state(layer)[row]),
                        (fit.of_templates, alone.state(layer)[0]),
                    ):
                        mean, keys, values = (x[place].double() for x in white)
                        sides.append((keys @ (state[head].double() - mean) @ values).flatten())
                    cosine = torch.dot(*sides) / (sides[0].norm() * sides[1].norm())
                    expected[row, n] += float(fit.weights[place]) * cosine
    assert_close(reader.scores(memory, phrases).double(), expected, rtol=0, atol=1e-4)


def test_of_large_states_fewer_phrases_are_read_at_once(reader, texts, monkeypatch):
    """What is held is bounded in numbers, not in phrases; what is found is the same."""
    model = reader.model
    memory = model.memory(texts[:1, :T])
    phrases = [texts[n % 24, 8 * (n // 24) :][:8].tolist() for n in range(60)]
    calls = {
        "scores": lambda: reader.scores(memory, phrases)[0],
        "pick": lambda: [each.tokens for each in reader.pick(memory, phrases, 3)],
        "search": lambda: [each.tokens for each in reader.search(memory, texts[:4].flatten(), 2, length=8)],
        "read_back": lambda: [each.tokens for each in reader.read_back(memory, 2, length=2, beam=2)],
    }
    expected = {name: call() for name, call in calls.items()}
    sizes = sum(layer.H * layer.K * layer.V for layer in model.cfg.layers.values())
    monkeypatch.setattr(templates, "HELD", 16 * sizes)
    passes: list[torch.Size] = []
    handle = model.attachment.layout.embed.register_forward_hook(lambda _, given, __: passes.append(given[0].shape))
    found = {name: call() for name, call in calls.items()}
    MemoryReader.fit(model, texts.flatten()[: 40 * 12], context=8, longest=2)
    handle.remove()
    assert_close(found.pop("scores"), expected.pop("scores"), rtol=0, atol=1e-4)
    assert found == expected
    assert max(rows for rows, _ in passes) <= 16
    assert max(length for _, length in passes) <= 16 + 2 * 8


def test_a_pursuit_leaves_what_no_template_explains():
    """It takes parts of a sum away, however alike they are and however much of each a head still has."""
    drawn = torch.Generator().manual_seed(0)
    templates = [torch.randn(3, heads, size, generator=drawn) for heads, size in ((2, 20), (1, 30))]
    for x in templates:
        x[1] = 0.9 * x[0] + 0.3 * x[1]
    kept = [torch.rand(2, x.shape[1], 1, generator=drawn) for x in templates]
    rest = [torch.randn(x[:1].shape, generator=drawn) for x in templates]
    target = [(c * x[:2]).sum(0, keepdim=True) + y for c, x, y in zip(kept, templates, rest)]
    nothing = Whitening(*(torch.zeros(0) for _ in Whitening._fields))
    heads = [torch.arange(x.shape[1]) for x in templates]
    fits = {n: LayerFit(each, torch.ones(len(each)), nothing, nothing) for n, each in enumerate(heads)}
    pursuit = Pursuit(Fitted(fits, (), (), 4, 16, ()), target)
    for place in (0, 1):
        pursuit.take([x[place : place + 1] for x in templates])
    for own, x, left in zip(target, templates, pursuit.left):
        for head in range(x.shape[1]):
            taken = x[:2, head].double()
            state = own[0, head].double()
            expected = state - state @ torch.linalg.pinv(taken) @ taken
            assert_close(left[0, head].double(), expected, rtol=0, atol=1e-3)


def test_facts_are_picked_from_all_that_could_be_told():
    """Ranking by score finds fewer: a told name or value makes other sentences with it score high, too."""
    model = HookedRecurrent.from_pretrained("facts-english")
    texts = english.draw(16, facts=6, questions=0, seed=5, split="train")
    reader = MemoryReader.fit(model, torch.tensor([text.tokens for text in texts]), longest=12, context=96)
    (text,) = english.draw(1, facts=8, questions=0, seed=3, fillers=0.3)
    told = {" " + fact.sentence for fact in text.facts}
    possible = {
        " " + fact.sentence.replace(fact.name, name).replace(fact.value, value)
        for fact in text.facts
        for name in {other.name for other in text.facts}
        for value in (*english.RELATIONS[fact.relation].values[::4], fact.value)
    }
    candidates = sorted(possible)
    memory = model.memory(torch.tensor([text.tokens[: text.facts[-1].stop]]))
    picked = {reading.text for reading in reader.pick(memory, candidates, 8)}
    ranked = {candidates[place] for place in reader.scores(memory, candidates)[0].topk(8).indices.tolist()}
    assert len(picked & told) > len(ranked & told)
    assert len(picked & told) >= 7


def test_a_score_of_zero_has_as_many_errors_of_both_kinds_at_each_length(reader):
    """On text of the fit's kind that no fit has seen, over memories as long as those of the fit."""
    tokens = running_tokens(reader.model, embedded.text("test"))
    texts = torch.stack([tokens[300 * n :][: T + 8] for n in range(100)])
    drawn = Random(0)
    for length in (2, 4, 8):
        missed, wrong = 0, 0
        for stop in (T // 4, T // 2, 3 * T // 4, T):
            memory = reader.model.memory(texts[:, :stop])
            start = drawn.randrange(stop - 8)
            phrases = [texts[:, first : first + length].tolist() for first in (start, stop)]
            read, unread = (reader.scores(memory, each).diagonal() for each in phrases)
            missed += int((read < 0).sum())
            wrong += int((unread > 0).sum())
        assert abs(missed - wrong) < 60 and missed + wrong < 300, (length, missed, wrong)  # of 400 each
    assert reader.fitted.bias(6) == pytest.approx((reader.fitted.bias(4) + reader.fitted.bias(8)) / 2)
    assert reader.fitted.bias(1) == reader.fitted.biases[0]


def test_an_age_counts_the_tokens_read_after_a_phrase(reader, texts):
    """A phrase that was drawn ended so many tokens before its checkpoint."""
    model, lead = reader.model, (3,)
    (sample,) = _Plan(model, lead, 32, [2, 4], torch.Generator().manual_seed(0)).samples(texts[:1, :36])
    for row, age in enumerate(sample.ages.tolist()):
        end = 32 // len(sample.ages) * (row + 1) - age
        own = states_at(model, torch.tensor([[*lead, *texts[0, end - 4 : end].tolist()]]), [4])
        for layer, x in own.items():
            assert_close(sample.read[layer][row, 1], x[0, 0], rtol=0, atol=1e-4)


def test_accuracy_is_of_ages_above_the_entry_before():
    rows = _accuracy_by_age(torch.tensor([1.0, 1, -1, -1]), torch.zeros(3), torch.tensor([0, 16, 17, 32]), 32)
    assert rows == (AgeAccuracy(16, 1.0, 2), AgeAccuracy(32, 0.0, 2))


def test_weights_have_a_prior_of_variance_one():
    """Where the gradient of the likelihood is the weight itself."""
    ones = torch.ones(50, 1)
    (weight,) = _logistic_fit(ones, -ones)
    assert float(weight) == pytest.approx(float(100 * torch.sigmoid(-weight)), rel=1e-3)


def test_weights_are_of_longer_phrases_and_accuracy_of_text_that_took_no_part(reader, monkeypatch):
    parts = list[torch.Tensor]()
    rows = list[int]()
    cosines = templates._head_cosines
    monkeypatch.setattr(
        templates, "_head_cosines", lambda plan, sides, part: (parts.append(part), cosines(plan, sides, part))[1]
    )
    fit = templates._logistic_fit
    monkeypatch.setattr(templates, "_logistic_fit", lambda read, unread: (rows.append(len(read)), fit(read, unread))[1])
    tokens = running_tokens(reader.model, embedded.text("test"))[: 40 * 36]
    MemoryReader.fit(reader.model, tokens, context=32, longest=4)
    weighed, tested = parts
    assert len(weighed) + len(tested) == 20 and not any((row == tested).all(1).any() for row in weighed)
    assert rows == [12 * templates.CHECKPOINTS * sum(n >= min(templates.WEIGHED_FROM, 4) for n in (2, 4))]


def test_equal_errors_are_those_of_both_sides():
    read, unread = torch.tensor([0.0, 3, 2, 4]), torch.tensor([-2.0, 2.5, 1, -1])
    assert 1 < _equal_error_score(read, unread) < 2.5  # one below, and one above
    assert 0 < _equal_error_score(read + 9, unread) - 2.5 < 6.5  # none


def test_a_memory_longer_than_the_fit_and_a_weak_reader_are_said(reader, texts):
    with pytest.warns(ReaderWarning, match="expected at most 72 tokens, as the reader was fitted to, got 73"):
        reader.scores(reader.model.memory(texts[:1, :73]), [[1, 2]])
    weak = replace(reader, fitted=reader.fitted._replace(horizon=(AgeAccuracy(16, 0.6, 9), AgeAccuracy(32, 0.9, 9))))
    with pytest.warns(ReaderWarning, match=r"weak: of the last 16 tokens .* AUC of 0\.60"):
        weak.holds(reader.model.memory(texts[:1, :T]), [[1, 2]])


def test_read_phrases_are_told_from_unread_ones_and_not_from_another_texts(reader, texts):
    memory = reader.model.memory(texts[:, :T])
    read, unread = (reader.scores(memory, x.tolist()).diagonal() for x in (texts[:, 40:48], texts[:, T + 6 : T + 14]))
    others = reader.scores(memory, texts[:, 40:48].roll(1, 0).tolist()).diagonal()
    assert area_under_curve(read, unread) > 0.9
    assert area_under_curve(others, unread) < 0.7
    assert reader.horizon[0].auc > 0.9


def test_a_cut_phrase_reads_as_one_that_was_never_read(reader, texts):
    def scores(tokens, change):
        return torch.tensor([float(reader.scores(change(reader.model.memory(x[None])), [x[40:48]])) for x in tokens])

    read, cut = (scores(texts[:8, :T], change) for change in (lambda m: m, lambda m: m.without((40, 48))))
    never = torch.cat([texts[:8, :40], texts[:8, 48:T]], 1)
    unread = [float(reader.scores(reader.model.memory(x[None]), [y[40:48]])) for x, y in zip(never, texts)]
    assert_close(cut, torch.tensor(unread), rtol=0, atol=1e-3)
    assert read.mean() > cut.mean() + 1


def test_p_counts_the_decoys_that_score_as_high(reader, texts):
    memory = reader.model.memory(texts[:1, :T])
    decoys = texts[8:, :12].tolist()
    (found,) = reader.holds(memory, [texts[0, 40:46].tolist()], decoys=decoys)
    scores = reader.scores(memory, [decoy[:6] for decoy in decoys])[0]
    assert found.p == (1 + int((scores >= found.score).sum())) / 17
    (found,) = reader.holds(memory, [found.tokens], decoys=[[*found.tokens, *decoys[0]]])
    assert found.p == 1  # a decoy's first tokens count
    assert str(reader.holds(memory, [" the war"])[0].p) == "nan"


def test_a_corpus_is_searched_for_what_was_read(reader, texts):
    corpus = torch.cat([texts[4:8].flatten(), texts[0, 30:60], texts[8:12].flatten()])
    found = reader.search(reader.model.memory(texts[:1, :T]), corpus, 3)
    own = {tuple(texts[0, n : n + 8].tolist()) for n in range(30, 53)}
    assert found[0].tokens in own and found[0].score >= found[1].score
    other = reader.search(reader.model.memory(texts[12:13, :T]), corpus, 3, length=8)
    assert other[0].score < found[0].score


def test_phrases_are_read_back_from_the_memory_alone(reader, texts):
    def runs(tokens):
        return set(zip(tokens, tokens[1:], tokens[2:]))

    (first, *_) = reader.read_back(reader.model.memory(texts[3:4, :T]), 1, length=4, beam=24)
    assert runs(first.tokens) & runs(texts[3, :T].tolist())
    assert not runs(first.tokens) & runs(texts[4, :T].tolist())


@pytest.mark.parametrize("name", ["qwen3_5", "rwkv7", "zamba2", "mamba2"])
def test_longer_phrases_are_whole_passes(name):
    """A step from the parents' caches leaves the states of a pass over lead and phrase."""
    with KeepFloat64():
        model = hooked_in_float64(name)
        lead = drawn_ids(1, 2)
        rows, tokens = torch.tensor([0, 0, 0]), torch.tensor([5, 9, 11])
        phrases = Phrases.start(model, lead).then(rows, tokens).then(torch.tensor([2, 0]), torch.tensor([3, 4]))
        assert phrases.tokens.tolist() == [[11, 3], [5, 4]]
        whole = model.memory(torch.cat([lead.expand(2, -1), phrases.tokens], 1))
        for layer, state in phrases.states(whole.forms).items():
            assert_close(state, whole.state(layer).float(), rtol=0, atol=1e-5)
        logits = model(whole.tokens)[:, -1].log_softmax(-1)
        assert_close(phrases.log_probs, logits.float(), rtol=0, atol=1e-4)


def test_what_phrases_write_is_the_state_from_zero():
    with KeepFloat64():
        model = hooked_in_float64("qwen3_5")
        layer = model.cfg.recurrent_layers[0]
        r = model.recurrence(drawn_ids(1, 9), layer)
        states = _written_states(r, 2, 3)
        assert len(states) == 5
        for n, state in enumerate(states):
            part = r.select(tokens=slice(2 + n, 5 + n), initial_state=torch.zeros_like(r.starting_state()))
            assert_close(state, part.final_state()[0].float())


def test_a_reader_is_saved_and_loaded(reader, texts, tmp_path):
    path = tmp_path / "reader.safetensors"
    reader.save(path)
    loaded = MemoryReader.load(path, reader.model)
    memory = reader.model.memory(texts[:2, :T])
    phrases = texts[:, 3:8].tolist()
    assert_close(loaded.scores(memory, phrases), reader.scores(memory, phrases), rtol=0, atol=0)
    assert loaded.fitted[1:] == reader.fitted[1:]
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    (tmp_path / "damaged").write_bytes(content)
    with pytest.raises(InputError, match="SHA-256"):
        MemoryReader.load(tmp_path / "damaged", reader.model)
    with pytest.raises(InputError, match="another model"):
        MemoryReader.load(path, HookedRecurrent.from_pretrained("facts"))


def put(name, value):
    """A change of one setting."""
    return lambda named, said: said.update({name: value})


def filled(value, name="2/of_states/mean"):
    """A change of one number of a tensor."""
    return lambda named, said: named[name].view(-1)[3:4].fill_(value)


def turned(change, name="2/weights"):
    """A change of a whole tensor."""
    return lambda named, said: named.update({name: change(named[name])})


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda named, said: named.pop("2/weights"), "2/weights: expected .*got None"),
        (lambda named, said: named.update(more=torch.zeros(2)), "more: expected None"),
        (turned(lambda x: x[:, 1:].clone(), "2/of_states/mean"), "2/of_states/mean: expected .torch.float32"),
        (turned(lambda x: x.to(torch.complex64)), "2/weights: expected .torch.float32.*torch.complex64"),
        (filled(float("nan")), "2/of_states/mean: expected finite numbers"),
        (filled(float("inf"), "3/of_templates/keys"), "3/of_templates/keys: expected finite numbers"),
        (lambda named, said: said.pop("lead"), "'lead'"),
        (put("lead", []), "input must be text or token ids"),
        (put("lead", [10**9]), "token id 1000000000 is outside"),
        (put("longest", 10**9), "longest: expected 2 to 16, got 1000000000"),
        (put("context", 10**9), "context: expected 1 to 128, got 1000000000"),
        (put("longest", float("inf")), "cannot convert float infinity"),
        (put("biases", [0.0, 1.0, float("nan")]), "bias: expected .* got nan"),
        (put("biases", [0.0, 1.0]), "biases: expected 3 to 3, got 2"),
        (put("horizon", []), ".*out of range"),
        (put("horizon", [[16, 1.5, 9], [32, 0.9, 9]]), "AUC: expected 0 to 1, got 1.5"),
    ],
)
def test_a_sealed_file_has_what_a_reader_of_the_model_has(reader, tmp_path, change, match):
    """Anyone can seal a file."""
    path = tmp_path / "reader"
    reader.save(path)
    named, said = load_sealed(path, "reader", {})
    change(named, said)
    save_sealed(path, named, said)
    with pytest.raises(InputError, match=rf"/reader: (expected the settings of a reader, got others \()?{match}"):
        MemoryReader.load(path, reader.model)


def test_without_a_head_that_says_read_nothing_is_read_back(reader, texts):
    layers = {n: fit._replace(weights=-fit.weights.abs()) for n, fit in reader.fitted.layers.items()}
    without = MemoryReader(reader.model, reader.fitted._replace(layers=layers))
    with pytest.raises(InputError, match="heads whose weight is above 0"):
        without.read_back(reader.model.memory(texts[:1, :T]))


def other_memory():
    return HookedRecurrent.from_pretrained("facts").memory(torch.tensor([[1, 2, 3]]))


@pytest.mark.parametrize(
    "ask, match",
    [
        (lambda reader, memory: reader.scores(memory, []), "at least one"),
        (lambda reader, memory: reader.scores(memory, " the war"), "a list of phrases"),
        (lambda reader, memory: reader.scores(memory, [[1] * 9]), "1 to 8 tokens.*got 9; split the phrase"),
        (lambda reader, memory: reader.holds(memory, [[1, 2]], row=1), "row: expected 0 to 0"),
        (lambda reader, memory: reader.holds(memory, [[1, 2]], decoys=[[3]]), "decoys"),
        (lambda reader, memory: reader.search(memory, "a", length=5), "length"),
        (lambda reader, memory: reader.read_back(memory, length=9), "length, beam"),
        (lambda reader, memory: reader.read_back(memory, 10, beam=5), "n = 10"),
        (lambda reader, memory: reader.pick(memory, ["a"], 0), "n: expected"),
        (lambda reader, memory: MemoryReader.fit(reader.model, "A short text."), "at least 5760 tokens"),
        (lambda reader, memory: MemoryReader.fit(reader.model, "", longest=1), "longest, context"),
        (lambda reader, memory: MemoryReader.fit(reader.model, "", lead=""), "lead: expected text or token ids"),
        (lambda reader, memory: reader.scores(memory, [[10**6]]), "1000000"),
        (lambda reader, memory: reader.scores(other_memory(), [[1]]), "the reader's model"),
    ],
)
def test_bad_input_is_refused(reader, texts, ask, match):
    with pytest.raises(InputError, match=match):
        ask(reader, reader.model.memory(texts[:1, :30]))
