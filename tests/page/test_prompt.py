"""The prompt page: its numbers and acts, compared with calls of the library; and what it refuses."""

from __future__ import annotations

import http.client
import json
import re
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from saes import make_sae

from hookpoints import HookedRecurrent, Memory, zoo
from hookpoints.errors import InputError
from page.conftest import serving
from page.planted_atoms import HEAD, HOOK, LAYER
from writesae.flags import Prompt
from writesae.page.prompt import MAX_BYTES, PromptServer
from writesae.page.remembered import default_prompt
from writesae.page.session import MAX_TOKENS


def ask(server: PromptServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    sent = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if body is None else json.dumps(body), sent)
    answer = connection.getresponse()
    content = answer.read().decode()
    assert answer.getheader("Content-Security-Policy", "").startswith("default-src 'none'")
    connection.close()
    return answer.status, json.loads(content) if answer.getheader("Content-Type") == "application/json" else content


TEXT = "The war between the States was over."
READ: dict[str, Any] = {"text": TEXT, "question": "The"}


def test_atoms_are_those_that_the_first_dictionary_of_a_head_has(embedded: HookedRecurrent, tmp_path: Path) -> None:
    for n, hook in enumerate((HOOK, HOOK, HOOK.replace(f"heads.{HEAD}", "heads.0"))):
        sae = make_sae(embedded, d_sae=6, hook=hook, seed=n)
        sae.save_model(tmp_path / str(n))
    with serving(Prompt(sae=tmp_path, port=0)) as server:
        status, shown = ask(server, "POST", "/atoms", READ)
    assert status == 200 and shown.keys() == {f"L{LAYER}H{HEAD}", f"L{LAYER}H0"}
    first: Any = SAE.load_from_disk(tmp_path / "0")
    _, cache = embedded.run_with_cache(f"{TEXT} The", names_filter=[HOOK])
    active = first.encode(cache[HOOK][0]).detach()
    expected = [pytest.approx({f"atom {i}": float(x) for i, x in enumerate(row) if x > 0}, rel=1e-3) for row in active]
    assert active.any() and [dict(row) for row in shown[f"L{LAYER}H{HEAD}"]] == expected


def likeliest(model: HookedRecurrent, memory: Memory, question: str) -> list[tuple[str, Any]]:
    """The five likeliest next tokens, as the page shows them."""
    top = model.logits_after(memory, question)[0, -1].softmax(-1).topk(5)
    texts = [str(model.to_string([token])).replace(" ", "·") for token in top.indices.tolist()]
    return [(text, pytest.approx(float(chance), rel=1e-3)) for text, chance in zip(texts, top.values)]


def likeliest_shown(answers: Any, number: int) -> list[tuple[str, float]]:
    return [tuple(row) for row in answers["answers"][number]["likeliest"]]


def test_phrases_are_cut_and_replaced_as_the_library_does(speaker: PromptServer) -> None:
    text, question = default_prompt("facts-english-rwkv7")
    asked = {"text": text, "question": question, "spans": []}
    model = speaker.session.model
    memory = model.memory(text)
    status, answered = ask(speaker, "POST", "/memory", asked)
    assert status == 200 and answered["kl"] == 0 and answered["answers"][0] == answered["answers"][1]
    assert (
        likeliest_shown(answered, 0) == likeliest(model, memory, f" {question}")
        and answered["answers"][0]["said"] == "Vienna."
    )
    # Five sentences: the one whose city is the answer overwrote another one. The model's own first token is in none.
    spans = [tuple(row[:2]) for row in answered["sentences"]]
    assert spans[0][0] == answered["first"] == 1 and [row[4] for row in answered["sentences"]] == [""] * 3 + [
        "overwrote",
        "",
    ]
    told, suspect = spans[1], spans[3]
    for changes, changed in (
        ([[*suspect, None]], memory.without(suspect)),
        ([[*told, None], [*suspect, None]], memory.without(suspect).without(told)),
        (
            [[*told, None], [*suspect, "The home of Clara is Rome."]],
            memory.told(" The home of Clara is Rome.", instead_of=slice(*suspect)).without(told),
        ),
    ):
        answered = ask(speaker, "POST", "/memory", asked | {"spans": changes})[1]
        assert likeliest_shown(answered, 1) == likeliest(model, changed, f" {question}")
        assert ask(speaker, "POST", "/memory", asked)[1]["kl"] == 0  # of another page
    answer = model.to_tokens(f" {question} Vienna.", prepend_bos=False)
    p, q = (model.logits_after(each, answer)[0, -3:-1].double().log_softmax(-1) for each in (memory, changed))
    assert answered["kl"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-3)


def test_of_equal_sentences_the_marked_one_is_replaced(speaker: PromptServer) -> None:
    prompt = speaker.session.prompted("Ben lives in Rome. It was a year of peace. Ben lives in Rome.", "Where is Ben?")
    last = max(suspect.span for suspect in prompt.memory.suspects(prompt.question))
    changed = prompt.changed([(*last, "Ben lives in Oslo.")])
    assert torch.equal(changed.tokens[:, : last[0]], prompt.memory.tokens[:, : last[0]])


def test_scores_are_those_of_the_reader(speaker: PromptServer) -> None:
    """Of the memory as it was read, of the one without the phrase, and of one that never read it."""
    text, question = default_prompt("facts-english")
    memory = speaker.session.model.memory(text)
    span = memory.suspects(f" {question}")[0].span
    asked = {"text": text, "question": question, "spans": [[*span, None]], "phrases": [span], "back": False}
    status, shown = ask(speaker, "POST", "/reader", asked)
    phrase = memory.tokens[0, slice(*span)].tolist()[-8:]  # the longest that was fitted
    never = speaker.session.model.memory(torch.cat([memory.tokens[:, : span[0]], memory.tokens[:, span[1] :]], 1))
    scores = [float(speaker.session.reader().scores(each, [phrase])) for each in (memory, memory.without(span), never)]
    assert status == 200 and shown["scores"] == [[pytest.approx(score, rel=1e-3) for score in scores]]


def test_why_a_token_is_drawn_and_nodes_are_taken_apart(server: PromptServer) -> None:
    asked = {"text": "The Secretary of the Treasury and the", "question": "Secretary of the", "target": " Treasury"}
    asked |= {"against": "", "width": 390}
    status, why = ask(server, "POST", "/explain", asked)
    assert ask(server, "POST", "/explain", asked | {"text": "The Navy and the"})[0] == 200  # of another page
    assert status == 200 and why["svg"].startswith("<svg") and "writes measured" in why["said"]
    write, mlp = (
        re.findall(form, why["svg"])[0] for form in (r'data-node="(L\d+H\d+@\d+)"', r'data-node="(MLP[^"]+)"')
    )
    status, ports = ask(server, "POST", "/node", asked | {"node": write})
    assert status == 200 and {"value", "key", "query", "gate"} == ports.keys()
    assert all(len(row) == 3 for rows in ports.values() for row in rows)
    assert ask(server, "POST", "/node", asked | {"node": mlp})[1].keys() == {"input"}
    for path, wrong in (
        ("/explain", asked | {"target": "two tokens of"}),
        ("/explain", asked | {"text": ""}),
        ("/node", asked | {"node": "L9H9@9"}),
    ):
        status, refusal = ask(server, "POST", path, wrong)
        assert status == 400 and "expected" in refusal["error"]


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "headers"),
    [
        (200, "POST", "/atoms", READ, {"Origin": "http://localhost:PORT"}),
        (200, "GET", "/", None, {"Host": "localhost:PORT"}),
        (403, "GET", "/", None, {"Host": "evil.example"}),
        (403, "POST", "/atoms", READ, {"Host": "evil.example:PORT"}),
        (403, "POST", "/atoms", READ, {"Origin": "http://evil.example"}),
        (403, "POST", "/atoms", READ, {"Origin": "null"}),
        (404, "GET", "/../prompt.py", None, {}),
        (400, "POST", "/atoms", {"text": "war"}, {}),
        (400, "POST", "/atoms", ["war"], {}),
        (400, "POST", "/memory", READ | {"spans": [[1, 2, 3]]}, {}),
        (400, "POST", "/memory", READ | {"spans": [[5, 99, None]]}, {}),
        (400, "POST", "/explain", READ | {"target": "", "against": "", "width": float("inf")}, {}),
        (400, "POST", "/atoms", READ | {"text": "war " * (MAX_TOKENS + 1)}, {}),
    ],
)
def test_other_sites_and_other_requests_are_refused(
    server: PromptServer, status: int, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    host, port = server.server_address[:2]
    here = {name: value.replace("PORT", str(port)) for name, value in headers.items()}
    answered, content = ask(server, method, path, body, **here)
    assert (host, answered) == ("127.0.0.1", status) and (status == 200 or content["error"])


@pytest.mark.parametrize("length", ["-1", str(MAX_BYTES + 1)])
def test_the_length_that_a_request_claims_is_no_order(server: PromptServer, length: str) -> None:
    """It is refused at once: nothing is reserved for it, and nobody waits for the rest."""
    host = f"127.0.0.1:{server.server_port}"
    with socket.create_connection(("127.0.0.1", server.server_port), timeout=10) as connection:
        connection.sendall(f"POST /atoms HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n{{".encode())
        answer = connection.makefile("rb").read().decode()
    assert " 400 " in answer.splitlines()[0] and f"got {length}" in answer


def test_bad_input_ends_before_a_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedRecurrent, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="none"):
        PromptServer(Prompt(sae=folder / "none"))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        with pytest.raises(InputError, match=f"^port: expected one that is free, got {port} .*--port 0 for any"):
            PromptServer(Prompt(sae=folder, port=port))


@pytest.mark.parametrize("name", zoo.names())
def test_each_model_of_the_zoo_begins_with_a_text_of_its_own(name: str) -> None:
    model = HookedRecurrent.from_pretrained(name)
    text, question = default_prompt(model.cfg.model_name)
    assert (text, question) != default_prompt("another")
    assert model.to_tokens(f"{text} {question}").shape[1] > 2  # a word that it does not know would raise
