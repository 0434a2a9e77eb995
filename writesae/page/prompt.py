"""The command `writesae prompt`: type a text in a browser; see what heads write and read, and which atoms fire.

The page is served by this process to this machine alone: on 127.0.0.1, to requests that name it as their host and come
from its own page, so that no other site that is open in the browser can use it (by DNS rebinding, say).
"""

from __future__ import annotations

import json
import secrets
import threading
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, TypedDict

import torch
from sae_lens import SAE

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.errors import HookpointsError
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.target import HeadHook, check_fits
from writesae.experiment.head import head_writes
from writesae.page.atoms.text import TokenTexts, short, visible
from writesae.page.template import environment

MAX_TOKENS = 256
"""Longest text that is read: a page shows a number for each pair of tokens."""
_MAX_BYTES = 100_000
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


class Reading(TypedDict):
    """What one head of a layer does on a text of T tokens."""

    tokens: list[str]
    writes: list[list[float]]
    """[H][T] size |k_t u_t^T| of each head's write."""
    shares: list[list[float]]
    """[T][S], S = t + 1: the part of token t's read that comes from what token s wrote, A[t,s] <u_s, o_t> / |o_t|^2. A
    row adds up to 1, or to 0 where nothing is read."""
    atoms: list[list[tuple[int, float]]] | None
    """[T] active atoms with their activation, strongest first; None for another head than the dictionary's."""


def read_shares(recurrence: Recurrence) -> torch.Tensor:
    """[T,S] `Reading.shares` of one head on one sequence, S = T. Cost T / V times that of its reads."""
    read, values = recurrence.outputs()[0, :, 0].double(), recurrence.u[0, :, 0].double()
    pattern = recurrence.attention()[0, 0].double()
    along = torch.einsum("srv,tv->tsr", values.view(len(values), -1, values.shape[-1]), read)
    return (pattern.view(along.shape) * along).sum(-1) / read.square().sum(-1, keepdim=True).clamp_min(1e-30)


@dataclass(frozen=True)
class PromptReader:
    """A model, and if there is one a dictionary of one of its heads."""

    model: HookedRecurrent
    texts: TokenTexts
    sae: SAE | None = None

    @torch.no_grad()
    def read(self, text: str, layer: int, head: int) -> Reading:
        """One forward up to the layer, a second one for atoms, and T / V times the cost of the head's reads.

        Raises:
            ValueError: the text has no token, or more than `MAX_TOKENS`; the layer or the head does not exist.
        """
        tokens = self.model.to_tokens(text, prepend_bos=False, truncate=False)
        if not 0 < tokens.shape[1] <= MAX_TOKENS:
            raise ValueError(f"the text has {tokens.shape[1]} tokens; it takes 1 to {MAX_TOKENS}")
        recurrence = self.model.recurrence(tokens, layer)
        if not 0 <= head < recurrence.H:
            raise ValueError(f"head {head} is out of range: layer {layer} has heads 0 to {recurrence.H - 1}")
        sizes = [head_writes(recurrence, h).norm() for h in range(recurrence.H)]
        shares = read_shares(recurrence.select(heads=slice(head, head + 1)))
        return {
            "tokens": [visible(piece) for piece in self.texts.many(tokens[0].tolist())],
            "writes": [[short(size) for size in row.tolist()] for row in sizes],
            "shares": [[short(share) for share in row[: t + 1].tolist()] for t, row in enumerate(shares)],
            "atoms": self._atoms(tokens, layer, head),
        }

    def _atoms(self, tokens: torch.Tensor, layer: int, head: int) -> list[list[tuple[int, float]]] | None:
        if self.sae is None or (hook := HeadHook.of(self.sae))[1:3] != (layer, head):
            return None
        _, cache = self.model.run_with_cache(tokens, names_filter=[hook.name], stop_at_layer=layer + 1)
        ordered = self.sae.encode(cache[hook.name][0].to(next(self.sae.parameters()))).sort(descending=True)
        rows = zip(ordered.indices.tolist(), ordered.values.tolist())
        return [[(atom, short(value)) for atom, value in zip(*row) if value] for row in rows]


class PromptServer(ThreadingHTTPServer):
    """Answers on several connections, one of which reads at a time."""

    reader: PromptReader

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST /read` what it asks for; everything else is refused."""

    server: PromptServer  # type: ignore[assignment]
    timeout = 60

    def do_GET(self) -> None:
        if self._is_ours() and self._is_at("/"):
            reader, nonce = self.server.reader, secrets.token_urlsafe(16)
            cfg, hook = reader.model.cfg, None if reader.sae is None else HeadHook.of(reader.sae)
            heads = {layer: cfg.layer(layer).H for layer in cfg.recurrent_layers}
            shown = {"model": cfg.model_name, "heads": heads, "hook": hook, "nonce": nonce, "most": MAX_TOKENS}
            page = environment().get_template("prompt.html").render(shown)
            self._answer(200, "text/html; charset=utf-8", page, nonce)

    def do_POST(self) -> None:
        if not (self._is_ours() and self._is_at("/read")):
            return
        length = self.headers.get("Content-Length", "")
        if self.headers.get_content_type() != "application/json":
            return self._refuse(415, "send application/json")  # which a page of another site cannot without asking
        if not length.isdecimal() or int(length) > _MAX_BYTES:
            return self._refuse(413, f"send at most {_MAX_BYTES:,} bytes, with their number")
        try:
            asked = json.loads(self.rfile.read(int(length)))
            text, layer, head = str(asked["text"]), int(asked["layer"]), int(asked["head"])
            with self.server.lock:
                reading = self.server.reader.read(text, layer, head)
        except (ValueError, KeyError, TypeError, RecursionError, HookpointsError) as error:
            return self._refuse(400, str(error))
        self._answer(200, "application/json", json.dumps(reading))

    def _is_ours(self) -> bool:
        """Whether the request names this server as its host, and comes from no other page; refuses it if not."""
        port = self.server.server_address[1]
        hosts = (f"127.0.0.1:{port}", f"localhost:{port}")
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        ours = host in hosts and (origin is None or origin in [f"http://{each}" for each in hosts])
        if not ours:
            self._refuse(403, f"this page answers to {hosts[0]} alone")
        return ours

    def _is_at(self, path: str) -> bool:
        if self.path != path:
            self._refuse(404, "there is nothing here")
        return self.path == path

    def _refuse(self, status: int, error: str) -> None:
        self._answer(status, "application/json", json.dumps({"error": error}))

    def _answer(self, status: int, kind: str, content: str, nonce: str = "") -> None:
        body = content.encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": kind,
            "Content-Length": str(len(body)),
            "Content-Security-Policy": _POLICY.format(nonce=nonce),
            "X-Content-Type-Options": "nosniff",
            "Cache-Control": "no-store",
            "Referrer-Policy": "no-referrer",
        }.items():
            self.send_header(name, value)
        with suppress(ConnectionError):  # a page that was left
            self.end_headers()
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: texts are nobody else's business."""


def prompt_server(model: str | None, sae: Path | None, dtype: str, port: int) -> PromptServer:
    """A server of the page, bound to its port.

    Raises:
        ValueError: the folder holds no whole dictionary, or one of another model.
        OSError: the port is taken.
    """
    dictionary = None if sae is None else load_sae(sae)
    server = PromptServer(("127.0.0.1", port), _Handler)  # a taken port ends this before a model loads
    try:
        name = model or ("embedded" if dictionary is None else str(dictionary.cfg.metadata.model_name))
        hooked = HookedRecurrent.from_pretrained(name, dtype=dtype)
        if dictionary is not None:
            check_fits(hooked, dictionary, sae or "")
        server.reader = PromptReader(hooked, TokenTexts(hooked), dictionary)
    except BaseException:
        server.server_close()
        raise
    return server
