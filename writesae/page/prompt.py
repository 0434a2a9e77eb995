"""The command `writesae prompt`: type a text in a browser; see what heads write and read, and which atoms fire.

The page is served by this process to this machine alone: on 127.0.0.1, to requests that name it as their host and come
from its own page, so that no other site that is open in the browser can use it (by DNS rebinding, say).
"""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import torch

from hookpoints import HookedRecurrent, Recurrence
from hookpoints.errors import HookpointsError
from sae_lens_writesae.sae.load import load_sae
from sae_lens_writesae.sae.target import HeadHook, check_hook
from writesae.experiment.head import head_writes
from writesae.page.atoms.text import TokenTexts, short, visible
from writesae.page.template import environment

MAX_TOKENS = 256
"""Longest text that is read: a page shows a number for each pair of tokens."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


def read_shares(recurrence: Recurrence) -> torch.Tensor:
    """[T,S] of one head on one sequence, S = T: the part of token t's read that comes from what token s wrote, A[t,s]
    <u_s, o_t> / |o_t|^2. A row adds up to 1, or to 0 where nothing is read. Cost T / V times that of its reads."""
    read, values = recurrence.outputs()[0, :, 0].double(), recurrence.u[0, :, 0].double()
    pattern = recurrence.attention()[0, 0].double()
    along = torch.einsum("srv,tv->tsr", values.view(len(values), -1, values.shape[-1]), read)
    return (pattern.view(along.shape) * along).sum(-1) / read.square().sum(-1, keepdim=True).clamp_min(1e-30)


def held_shares(recurrence: Recurrence) -> torch.Tensor:
    """[T,S] of one head on one sequence, S = T: the part of the state after token t that token s wrote, <P_t k_s u_s^T,
    S_t> / |S_t|^2, where P_t is what the transitions since have made of the key. A row sums to 1. Memory T K S."""
    states, values = recurrence.states()[0, :, 0].double(), recurrence.u[0, :, 0].double().flatten(0, -2)
    keys = recurrence.by_source().states()[0, :, 0].double()
    shares = torch.einsum("tks,tkv,sv->ts", keys, states, values).view(recurrence.T, recurrence.T, -1).sum(-1)
    return shares / states.square().sum((1, 2))[:, None].clamp_min(1e-30)


class PromptServer(ThreadingHTTPServer):
    """The page of a model, and if there is one of a dictionary of one of its heads. Answers on several connections, one
    of which reads at a time.

    Raises:
        ValueError: the folder holds no whole dictionary, or one of another model.
        OSError: the port is taken; before a model is loaded.
    """

    def __init__(self, model: str | None, sae: Path | None, dtype: str, port: int) -> None:
        self.sae, self.lock = None if sae is None else load_sae(sae), threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)  # a taken port ends this before a model loads
        name = model or ("embedded" if self.sae is None else str(self.sae.cfg.metadata.model_name))
        self.model = HookedRecurrent.from_pretrained(name, dtype=dtype)
        self.texts, self.hook = TokenTexts(self.model), None if self.sae is None else HeadHook.of(self.sae)
        if self.sae is not None:
            check_hook(self.model, HeadHook.of(self.sae).name, self.sae.cfg, f"the SAE in {sae}")

    @torch.no_grad()
    def read(self, text: str, layer: int, head: int) -> dict[str, object]:
        """What one head of a layer does on a text of T tokens, as JSON values.

        Returns: `tokens` [T]; `writes` [H][T], the size |k_t u_t^T| of each head's write; `shares` [T][S], S = t + 1,
        of `read_shares`, and `held` likewise of `held_shares`; `atoms` [T], active atoms with their activation,
        strongest first, None for another head than the dictionary's.

        Cost: one forward up to the layer, a second one for atoms, and T / V times the cost of the head's reads.

        Raises:
            ValueError: the text has no token, or more than `MAX_TOKENS`; the layer or the head does not exist.
        """
        tokens, atoms = self.model.to_tokens(text, prepend_bos=False, truncate=False), None
        if not 0 < tokens.shape[1] <= MAX_TOKENS:
            raise ValueError(f"text: expected 1 to {MAX_TOKENS} tokens, got {tokens.shape[1]}")
        recurrence = self.model.recurrence(tokens, layer)
        if not 0 <= head < recurrence.H:
            raise ValueError(f"head: expected 0 to {recurrence.H - 1} in layer {layer}, got {head}")
        if self.sae is not None and self.hook is not None and self.hook[1:3] == (layer, head):
            _, cache = self.model.run_with_cache(tokens, names_filter=[self.hook.name], stop_at_layer=layer + 1)
            active = self.sae.encode(cache[self.hook.name][0].to(next(self.sae.parameters()))).sort(descending=True)
            rows = zip(active.indices.tolist(), active.values.tolist())
            atoms = [[(atom, short(value)) for atom, value in zip(*row) if value] for row in rows]
        one = recurrence.select(heads=slice(head, head + 1))
        return {
            "tokens": [visible(piece) for piece in self.texts.many(tokens[0].tolist())],
            "writes": [[short(n) for n in head_writes(recurrence, h).norm().tolist()] for h in range(recurrence.H)],
            "shares": _rows(read_shares(one)),
            "held": _rows(held_shares(one)),
            "atoms": atoms,
        }


def _rows(shares: torch.Tensor) -> list[list[float]]:
    """[T][S], S = t + 1, as JSON values."""
    return [[short(share) for share in row[: t + 1].tolist()] for t, row in enumerate(shares)]


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST /read` what it asks for; everything else is refused."""

    server: PromptServer  # type: ignore[assignment]
    timeout = 60

    def do_GET(self) -> None:
        if self._is_refused("/"):
            return
        cfg, nonce = self.server.model.cfg, secrets.token_urlsafe(16)
        heads = {layer: cfg.layer(layer).H for layer in cfg.recurrent_layers}
        shown = {"model": cfg.model_name, "heads": heads, "hook": self.server.hook, "nonce": nonce, "most": MAX_TOKENS}
        self._answer(200, environment().get_template("prompt.html").render(shown), nonce)

    def do_POST(self) -> None:
        if self._is_refused("/read"):
            return
        try:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with self.server.lock:
                reading = self.server.read(str(asked["text"]), int(asked["layer"]), int(asked["head"]))
        except (ValueError, KeyError, TypeError, RecursionError, HookpointsError) as error:
            return self._answer(400, {"error": str(error)})
        self._answer(200, reading)

    def _is_refused(self, path: str) -> bool:
        """Whether the request was refused: it names another host than this server, comes from a page of another site,
        or asks for another path than `path`."""
        hosts = [f"{name}:{self.server.server_address[1]}" for name in ("127.0.0.1", "localhost")]
        origins = (None, *(f"http://{each}" for each in hosts))
        is_ours = self.headers.get("Host") in hosts and self.headers.get("Origin") in origins
        refused = not is_ours or self.path != path
        if refused:
            error = "there is nothing here" if is_ours else f"this page answers to {hosts[0]} alone"
            self._answer(404 if is_ours else 403, {"error": error})
        return refused

    def _answer(self, status: int, content: str | Mapping[str, object], nonce: str = "") -> None:
        """Send a page, or values as JSON."""
        is_page = isinstance(content, str)
        body = (content if is_page else json.dumps(content)).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "text/html; charset=utf-8" if is_page else "application/json",
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
