"""The command `writesae prompt`: type a text in a browser; see what heads write and read, and which atoms fire.

The page is served by this process to this machine alone: on 127.0.0.1, to requests that name it as their host and come
from its own page, so that no other site that is open in the browser can use it (by DNS rebinding, say).
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from hookpoints import HookedRecurrent, Recurrence, read_memory
from hookpoints.errors import HookpointsError
from sae_lens_writesae.sae import WriteProductSAE
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.target import HeadHook, check_hook
from writesae.files import sae_folders
from writesae.head.writes import head_writes
from writesae.page.atoms.text import TokenTexts, short, visible
from writesae.page.template import environment

MAX_BYTES = 1_000_000
"""Longest request that is read."""
MAX_TOKENS = 256
"""Longest text that is read: a page shows a number for each pair of tokens."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def read_shares(recurrence: Recurrence) -> torch.Tensor:
    """[T,S] of one head on one sequence, S = T: the part of token t's read that comes from what token s wrote, A[t,s]
    <u_s, o_t> / |o_t|^2. A row adds up to 1, or to 0 where nothing is read. Cost T / V times that of its reads."""
    read = recurrence.outputs()[0, :, 0].double()
    values = recurrence.u[0, :, 0].double()
    pattern = recurrence.attention()[0, 0].double()
    along = torch.einsum("srv,tv->tsr", values.view(len(values), -1, values.shape[-1]), read)
    return (pattern.view(along.shape) * along).sum(-1) / read.square().sum(-1, keepdim=True).clamp_min(1e-30)


def held_shares(recurrence: Recurrence) -> torch.Tensor:
    """[T,S] of one head on one sequence, S = T: the part of the state after token t that token s wrote, <P_t k_s u_s^T,
    S_t> / |S_t|^2, where P_t is what the transitions since have made of the key. A row sums to 1. Memory T K S."""
    states = recurrence.states()[0, :, 0].double()
    values = recurrence.u[0, :, 0].double().flatten(0, -2)
    keys = recurrence.by_source().states()[0, :, 0].double()
    shares = torch.einsum("tks,tkv,sv->ts", keys, states, values).view(recurrence.T, recurrence.T, -1).sum(-1)
    return shares / states.square().sum((1, 2))[:, None].clamp_min(1e-30)


class PromptServer(ThreadingHTTPServer):
    """The page of a model, and of dictionaries of its heads if a folder has some: the first of each head, by the names
    of their folders. Answers on several connections, one of which reads at a time.

    Raises:
        ValueError: the folder holds no whole dictionary, or one of another model.
        OSError: the port is taken; before a model is loaded.
    """

    def __init__(self, model: str | None, sae: Path | None, dtype: str, port: int) -> None:
        found = [] if sae is None else [load_sae(folder) for folder in reversed(sae_folders(sae))]
        self.saes = {HeadHook.of(each).cell: each for each in found}
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)  # a taken port ends this before a model loads
        name = model or next((str(each.cfg.metadata.model_name) for each in found), "embedded")
        self.model = HookedRecurrent.from_pretrained(name, dtype=dtype)
        self.texts = TokenTexts(self.model)
        for each in found:
            check_hook(self.model, HeadHook.of(each).name, each.cfg, f"the SAE in {sae}")

    @torch.no_grad()
    def read(self, text: str, layer: int, head: int) -> dict[str, object]:
        """What one head of a layer does on a text of T tokens, as JSON values.

        Returns: `tokens` [T]; `writes` [H][T], the size |k_t u_t^T| of each head's write; `shares` [T][S], S = t + 1,
        of `read_shares`, and `held` likewise of `held_shares`; `atoms` [T], active atoms with their activation,
        strongest first, None for a head without a dictionary; `facts` [T], pairs of the state, strongest first, None
        for a head without a dictionary of pairs of states.

        Cost: one forward up to the layer, a second one for atoms, and T / V times the cost of the head's reads.

        Raises:
            ValueError: the text has no token, or more than `MAX_TOKENS`; the layer or the head does not exist.
        """
        tokens = self.model.to_tokens(text, prepend_bos=False, truncate=False)
        atoms = None
        if not 0 < tokens.shape[1] <= MAX_TOKENS:
            raise ValueError(f"text: expected 1 to {MAX_TOKENS} tokens, got {tokens.shape[1]}")
        recurrence = self.model.recurrence(tokens, layer)
        if not 0 <= head < recurrence.H:
            raise ValueError(f"head: expected 0 to {recurrence.H - 1} in layer {layer}, got {head}")
        if (sae := self.saes.get(f"L{layer}H{head}")) is not None:
            hook = HeadHook.of(sae).name
            _, cache = self.model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=layer + 1)
            active = sae.encode(cache[hook][0].to(next(sae.parameters()))).sort(descending=True)
            rows = zip(active.indices.tolist(), active.values.tolist())
            atoms = [[(atom, short(value)) for atom, value in zip(*row) if value] for row in rows]
        facts = None
        if isinstance(sae, WriteProductSAE) and HeadHook.of(sae).target == "state":
            states = recurrence.states()[0, :, head].float()
            facts = [
                [(f"{fact.key} → {fact.value}", short(fact.coefficient)) for fact in held]
                for held in read_memory(states, sae)
            ]
        one = recurrence.select(heads=slice(head, head + 1))
        found = {"shares": read_shares(one), "held": held_shares(one)}
        return {
            "tokens": [visible(piece) for piece in self.texts.many(tokens[0].tolist())],
            "writes": [[short(n) for n in head_writes(recurrence, h).norm().tolist()] for h in range(recurrence.H)],
            **{
                name: [[*map(short, row[: t + 1])] for t, row in enumerate(each.tolist())]
                for name, each in found.items()
            },
            "atoms": atoms,
            "facts": facts,
        }


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST /read` what it asks for; everything else is refused."""

    server: PromptServer  # type: ignore[assignment]
    timeout = 60

    def _page(self, nonce: str) -> str:
        cfg = self.server.model.cfg
        hooks = [HeadHook.of(sae) for sae in reversed(self.server.saes.values())]
        shown = {"model": cfg.model_name, "heads": {layer: cfg.layer(layer).H for layer in cfg.recurrent_layers}}
        return environment().get_template("prompt.html").render(shown, hooks=hooks, nonce=nonce, most=MAX_TOKENS)

    def _reading(self, _: str) -> str:
        length = int(self.headers["Content-Length"])
        if not 0 <= length <= MAX_BYTES:
            raise ValueError(f"request: expected 0 to {MAX_BYTES} bytes, got {length}; send a shorter text")
        asked = json.loads(self.rfile.read(length))
        with self.server.lock:
            return json.dumps(self.server.read(str(asked["text"]), int(asked["layer"]), int(asked["head"])))

    def _answer(self, path: str, content: Callable[[_Handler, str], str]) -> None:
        """Send what `content` makes of a nonce. A request is refused if it names another host than this server, comes
        from a page of another site, or asks for another path than `path`."""
        hosts = [f"{name}:{self.server.server_address[1]}" for name in ("127.0.0.1", "localhost")]
        is_ours = self.headers.get("Host") in hosts
        is_ours &= self.headers.get("Origin") in {None, *map("http://{}".format, hosts)}
        nonce = secrets.token_urlsafe(16)
        status = 403 if not is_ours else 404 if self.path != path else 200
        refusal = f"expected {path} of {hosts[0]}, got {self.path} of {self.headers.get('Host')}"
        try:
            body = content(self, nonce) if status == 200 else json.dumps({"error": refusal})
        except (ValueError, KeyError, TypeError, RecursionError, HookpointsError) as error:
            status = 400
            body = json.dumps({"error": str(error)})
        is_page = (status, path) == (200, "/")
        headers = {
            "Content-Type": "text/html; charset=utf-8" if is_page else "application/json",
            "Content-Length": str(len(body.encode())),
            "Content-Security-Policy": _POLICY.format(nonce=nonce),
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # a page that was left
            self.end_headers()
            self.wfile.write(body.encode())

    do_GET = partialmethod(_answer, "/", _page)
    do_POST = partialmethod(_answer, "/read", _reading)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: texts are private."""
