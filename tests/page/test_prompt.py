"""The prompt page: its numbers, and what it refuses."""

from __future__ import annotations

import http.client
import json
import re
import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from recurrences import FORMS, entrywise, random_recurrence
from sae_lens import SAE
from sae_lens.saes.sae import SAEMetadata

from hookpoints import HookedRecurrent, read_memory
from page.planted_atoms import HEAD, HOOK, LAYER, empty_sae
from sae_lens_writesae.sae import WriteProductSAE, WriteProductSAEConfig
from writesae.flags import Prompt
from writesae.page.prompt import MAX_BYTES, MAX_TOKENS, PromptServer, held_shares, read_shares


def ask(server: PromptServer, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=60)
    given = {"Content-Type": "application/json"} | {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, None if body is None else json.dumps(body), given)
    answer = connection.getresponse()
    content = answer.read().decode()
    assert answer.getheader("Content-Security-Policy", "").startswith("default-src 'none'")
    connection.close()
    return answer.status, json.loads(content) if answer.getheader("Content-Type") == "application/json" else content


@pytest.mark.parametrize("form", [*FORMS, "a decay for each entry"])
def test_a_share_is_what_the_read_has_of_one_write(form: str) -> None:
    """Compared with the response to the writes of one token alone; what a memory holds likewise."""
    r = random_recurrence(form if form in FORMS else "gdn", T=9, H=1, dtype=torch.float64, initial_state=True)
    r = (r if form in FORMS else entrywise(r)).replace(initial_state=None)
    shares, read = read_shares(r), r.outputs()[0, :, 0]
    held, states = held_shares(r), r.states()[0, :, 0]
    for s in range(r.T):
        alone = torch.zeros_like(r.u)
        alone[:, s] = r.u[:, s]
        response = r.with_write(r.k, alone)
        part = (response.outputs()[0, :, 0] * read).sum(-1) / read.square().sum(-1).clamp_min(1e-30)
        torch.testing.assert_close(shares[:, s], part, rtol=0, atol=1e-10)
        part = (response.states()[0, :, 0] * states).sum((1, 2)) / states.square().sum((1, 2))
        torch.testing.assert_close(held[:, s], part, rtol=0, atol=1e-10)
    reads = slice(int(r.read_before_write), None)  # such a rule reads nothing at its first token
    torch.testing.assert_close(shares[reads].sum(-1), torch.ones(r.T, dtype=torch.float64)[reads], rtol=0, atol=1e-10)


def test_a_text_is_read(embedded: HookedRecurrent, server: PromptServer, folder: Path) -> None:
    text = "The war between the States was over."
    status, reading = ask(server, "POST", "/read", {"text": text, "layer": LAYER, "head": HEAD})
    tokens = embedded.to_tokens(text, prepend_bos=False)
    assert status == 200 and "".join(reading["tokens"]) == text.replace(" ", "·")
    writes = embedded.recurrence(tokens, LAYER).write()[0].norm(dim=(-2, -1)).T
    torch.testing.assert_close(torch.tensor(reading["writes"]), writes.detach(), rtol=1e-3, atol=1e-6)
    for shares in (reading["shares"], reading["held"]):
        assert [len(row) for row in shares] == list(range(1, tokens.shape[1] + 1))
        assert all(sum(row) == pytest.approx(1, abs=2e-3) for row in shares)
    sae: Any = SAE.load_from_disk(folder)
    _, cache = embedded.run_with_cache(tokens, names_filter=[sae.cfg.metadata.hook_name])
    active = sae.encode(cache[sae.cfg.metadata.hook_name][0]).detach()
    expected = [pytest.approx({i: float(x) for i, x in enumerate(row) if x > 0}, rel=1e-3) for row in active]
    assert [dict(shown) for shown in reading["atoms"]] == expected
    other = ask(server, "POST", "/read", {"text": text, "layer": LAYER, "head": HEAD - 1})[1]
    assert other["atoms"] is None and other["shares"] != reading["shares"]


@torch.no_grad()
def test_facts_are_those_of_the_state_at_each_token(embedded: HookedRecurrent, tmp_path: Path) -> None:
    """By a dictionary of the first singular vectors of these states."""
    text = "The war between the States was over."
    states = embedded.recurrence(embedded.to_tokens(text, prepend_bos=False), LAYER).states()[0, :, HEAD]
    shape = embedded.cfg.layer(LAYER)
    hook = f"blocks.{LAYER}.mixer.heads.{HEAD}.hook_state_vec"
    metadata = SAEMetadata(hook_name=hook, model_name="embedded")
    sizes: dict[str, Any] = {"d_in": shape.K * shape.V, "d_k": shape.K, "d_sae": 64, "encoder": "pursuit"}
    sae = WriteProductSAE(WriteProductSAEConfig(**sizes, metadata=metadata))
    left, _, right = torch.linalg.svd(states[-8:])
    sae.key_atoms.copy_(left[..., 0])
    sae.value_atoms.copy_(right[:, 0])
    words = {"words": [f"<b>{atom}" for atom in range(8)], "correlations": [1.0] * 8, "sizes": [1e-3] * 8}
    sae.cfg.metadata.labels = {"keys": words, "values": words}
    sae.save_model(tmp_path / "sae")
    with PromptServer(Prompt(sae=tmp_path / "sae", port=0)) as server:
        reading: Any = server.read(text, LAYER, HEAD)
        other: Any = server.read(text, LAYER, HEAD - 1)
        picture = str(server.explain(text, "", "", 390)["svg"])
        assert server.graph is not None and (server.graph.edges.port == "part").any() and "<b>" not in picture
    for fired in reading["atoms"]:
        strengths = [abs(value) for _, value in fired]
        assert strengths == sorted(strengths, reverse=True)
    assert any(value < 0 for _, value in reading["atoms"][-1])
    wanted = [[f"{fact.key} → {fact.value}" for fact in facts] for facts in read_memory(states, sae)]
    assert [[name for name, _ in shown] for shown in reading["facts"]] == wanted and any(wanted)
    assert other["facts"] is None


def test_why_a_token_is_drawn_and_a_write_is_taken_apart(server: PromptServer) -> None:
    asked = {"text": "The Secretary of the Treasury and the Secretary of the", "against": "", "width": 390}
    assert ask(server, "POST", "/write", {"layer": 4, "head": 0, "position": 3})[0] == 400  # nothing was explained
    status, why = ask(server, "POST", "/explain", asked | {"target": " Treasury"})
    assert status == 200 and why["svg"].startswith("<svg") and "writes measured" in why["said"]
    name = re.search(r'data-node="L(\d+)H(\d+)@(\d+)"', why["svg"])
    assert name is not None
    place = dict(zip(("layer", "head", "position"), map(int, name.groups())))
    status, ports = ask(server, "POST", "/write", place)
    assert status == 200 and {"value", "key", "query", "gate"} == ports.keys()
    assert all(len(row) == 3 for rows in ports.values() for row in rows)
    for wrong in ({"target": "two tokens of"}, {"target": " Treasury", "text": ""}):
        status, said = ask(server, "POST", "/explain", asked | wrong)
        assert status == 400 and "expected" in said["error"]


def test_the_page_opens_at_the_head_of_the_first_dictionary(embedded: HookedRecurrent, tmp_path: Path) -> None:
    sae = empty_sae(embedded)
    for name, hook in (("a", HOOK), ("b", HOOK.replace(f"heads.{HEAD}", "heads.0"))):
        sae.cfg.metadata.hook_name = hook
        sae.save_model(tmp_path / name)
    with PromptServer(Prompt(sae=tmp_path, port=0)) as server:
        threading.Thread(target=server.handle_request).start()
        _, page = ask(server, "GET", "/")
    assert f'data-first="{HEAD}"' in page


READ: dict[str, Any] = {"text": "war", "layer": LAYER, "head": 0}


@pytest.mark.parametrize(
    ("status", "method", "path", "body", "headers"),
    [
        (200, "POST", "/read", READ, {"Origin": "http://localhost:PORT"}),
        (200, "GET", "/", None, {"Host": "localhost:PORT"}),
        (403, "GET", "/", None, {"Host": "evil.example"}),
        (403, "POST", "/read", READ, {"Host": "evil.example:PORT"}),
        (403, "POST", "/read", READ, {"Origin": "http://evil.example"}),
        (403, "POST", "/read", READ, {"Origin": "null"}),
        (404, "GET", "/../prompt.py", None, {}),
        (404, "POST", "/", READ, {}),
        (400, "POST", "/read", {"text": "war"}, {}),
        (400, "POST", "/read", ["war"], {}),
        (400, "POST", "/read", READ | {"layer": 99}, {}),
        (400, "POST", "/read", READ | {"head": 99}, {}),
        (400, "POST", "/read", READ | {"head": float("inf")}, {}),
        (400, "POST", "/read", READ | {"text": ""}, {}),
        (400, "POST", "/read", READ | {"text": "war " * (MAX_TOKENS + 1)}, {}),
    ],
)
def test_other_sites_and_other_requests_are_refused(
    server: PromptServer, status: int, method: str, path: str, body: Any, headers: dict[str, str]
) -> None:
    host, port = server.server_address[:2]
    given = {name: value.replace("PORT", str(port)) for name, value in headers.items()}
    found, said = ask(server, method, path, body, **given)
    assert (host, found) == ("127.0.0.1", status) and (status == 200 or said["error"])


@pytest.mark.parametrize("length", ["99999999999", "-1", str(MAX_BYTES + 1)])
def test_the_length_that_a_request_claims_is_no_order(server: PromptServer, length: str) -> None:
    """It is refused at once: nothing is reserved for it, and nobody waits for the rest."""
    with socket.create_connection(("127.0.0.1", server.server_address[1]), timeout=10) as connection:
        host = f"127.0.0.1:{server.server_address[1]}"
        connection.sendall(f"POST /read HTTP/1.1\r\nHost: {host}\r\nContent-Length: {length}\r\n\r\n{{".encode())
        said = connection.makefile("rb").read().decode()
    assert " 400 " in said.splitlines()[0] and f"got {length}" in said


def test_connections_that_come_at_once_wait_to_be_accepted(folder: Path) -> None:
    """More than five, which is Python's default: those beyond are reset."""
    with ExitStack() as opened:
        busy = opened.enter_context(PromptServer(Prompt(sae=folder, port=0)))  # accepts none yet
        place = busy.server_address[:2]
        waiting = [opened.enter_context(socket.create_connection(place, timeout=2)) for _ in range(60)]
        assert all(each.getpeername()[1] == place[1] for each in waiting)


def test_bad_input_ends_before_a_model_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HookedRecurrent, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    with pytest.raises(ValueError, match="none"):
        PromptServer(Prompt(sae=folder / "none"))
    with socket.create_server(("127.0.0.1", 0)) as busy, pytest.raises(OSError):
        PromptServer(Prompt(sae=folder, port=busy.getsockname()[1]))
