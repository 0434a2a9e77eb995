"""The command `writesae prompt`: type a text in a browser; see what heads write and read, and which atoms fire.

The page is served by this process to this machine alone: on 127.0.0.1, to requests that name it as their host and come
from its own page, so that no other site that is open in the browser can use it (by DNS rebinding, say).
"""

from __future__ import annotations

import json
import secrets
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

import torch

from hookpoints import Graph, Recurrence, attribute, read_memory
from hookpoints.errors import HookpointsError, PredictionWarning
from sae_lens_writesae.sae import WriteProductSAE
from sae_lens_writesae.sae.load import load_sae, model_of
from sae_lens_writesae.sae.target import HeadHook, check_hook
from writesae.files import sae_folders
from writesae.flags import Prompt
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
    channels = recurrence.by_channel()  # Mamba-1 has a pattern for each
    read = recurrence.outputs()[0].double().view(channels.T, channels.H, -1)
    values = channels.u[0].double().view(channels.T, channels.H, -1, channels.V)
    along = torch.einsum("shrv,thv->htsr", values, read)
    shares = (channels.attention()[0].double().view(along.shape) * along).sum((0, 3))
    return shares / read.square().sum((1, 2))[:, None].clamp_min(1e-30)


def held_shares(recurrence: Recurrence) -> torch.Tensor:
    """[T,S] of one head on one sequence, S = T: the part of the state after token t that token s wrote, <P_t k_s u_s^T,
    S_t> / |S_t|^2, where P_t is what the transitions since have made of the key. A row sums to 1. Memory K S (in
    Mamba-1 K S V) for each of a few tokens."""
    channels = recurrence.by_channel()
    values = channels.u[0].double().view(channels.T, channels.H, -1, channels.V).transpose(1, 2).flatten(0, 1)
    rows = list[torch.Tensor]()
    for keys, states in zip(channels.by_source().state_blocks(), channels.state_blocks(), strict=True):
        state = states[0].double()
        shares = torch.einsum("thks,thkv,shv->ts", keys[0].double(), state, values)
        rows.append(shares / state.square().sum((1, 2, 3))[:, None].clamp_min(1e-30))
    return torch.cat(rows).view(channels.T, channels.T, -1).sum(-1)


def run_prompt(flags: Prompt) -> None:
    """Serve until interrupted. Raises what `PromptServer` raises."""
    with PromptServer(flags) as server, suppress(KeyboardInterrupt):
        print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends", flush=True)
        server.serve_forever()


class PromptServer(ThreadingHTTPServer):
    """The page of a model, and of dictionaries of its heads if a folder has some: the first of each head, by the names
    of their folders. Answers on several connections, one of which reads at a time.

    Raises:
        ValueError: the folder holds no whole dictionary, or one of another model.
        OSError: the port is taken; before a model is loaded.
    """

    request_queue_size = 128
    """Connections that wait to be accepted; more are reset."""

    def __init__(self, flags: Prompt) -> None:
        found = [] if flags.sae is None else [load_sae(folder) for folder in reversed(sae_folders(flags.sae))]
        self.saes = {HeadHook.of(each).cell: each for each in found}
        self.lock = threading.Lock()
        self.graph: Graph | None = None
        """Of the text that was explained last."""
        super().__init__(("127.0.0.1", flags.port), _Handler)  # a taken port ends this before a model loads
        try:
            name = flags.model if flags.model or found else "embedded"
            self.model = model_of(found, name, dtype=flags.dtype, other_model=flags.other_model)
            for each in found:
                check_hook(self.model, HeadHook.of(each).name, each.cfg, f"the SAE in {flags.sae}")
        except BaseException:
            self.server_close()
            raise
        self.texts = TokenTexts(self.model)

    @torch.no_grad()
    def _short_tokens(self, text: str) -> torch.Tensor:
        """[1,T] of a text that has some tokens, and at most `MAX_TOKENS`."""
        tokens = self.model.to_tokens(text, prepend_bos=False, truncate=False)
        if not 0 < tokens.shape[1] <= MAX_TOKENS:
            raise ValueError(f"text: expected 1 to {MAX_TOKENS} tokens, got {tokens.shape[1]}")
        return tokens

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
        tokens = self._short_tokens(text)
        atoms = None
        recurrence = self.model.recurrence(tokens, layer)
        if not 0 <= head < recurrence.H:
            raise ValueError(f"head: expected 0 to {recurrence.H - 1} in layer {layer}, got {head}")
        if (sae := self.saes.get(f"L{layer}H{head}")) is not None:
            hook = HeadHook.of(sae).name
            _, cache = self.model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=layer + 1)
            active = sae.encode(cache[hook][0].to(next(sae.parameters())))
            order = active.abs().argsort(descending=True)  # those of pairs have signs
            rows = zip(order.tolist(), active.gather(1, order).tolist())
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

    def explain(self, text: str, target: str, against: str, width: int) -> dict[str, object]:
        """Why the model says a token after a text: the picture of an attribution graph.

        Args:
            target, against: the token, and that whose logit is taken off; empty for the most likely one, and the mean.
            width: of the picture, in pixels.

        Returns: `svg`; `said`, how far predictions hold; `target`.

        Raises:
            ValueError: the text has no token or more than `MAX_TOKENS`, or a target is not one token.
        """
        tokens = self._short_tokens(text)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PredictionWarning)  # the numbers are shown
            wanted = [target] if target else None
            graph = attribute(tokens, self.model, wanted, against or None, saes=list(self.saes.values()))
            said = str(graph.check()) if tokens.shape[1] > 1 else ""
        self.graph = graph
        picture = graph.draw(width=min(max(width, 320), 1200))
        return {"svg": picture, "said": said, "target": graph.metadata["title"]}

    def made_of(self, layer: int, head: int, position: int) -> dict[str, list[list[object]]]:
        """What made a write of the text that was explained last, and the query of its last token: for each port the
        largest sources, with their effect and whether it was measured.

        Raises:
            ValueError: no text was explained, or there is no such write.
        """
        if self.graph is None:
            raise ValueError("no text was explained yet: ask why first")
        last = len(cast("list[str]", self.graph.metadata["tokens"])) - 1
        table = self.graph.why(layer, head, read=last, source=position)
        ports: dict[str, list[list[object]]] = {}
        for row in table[table.source != "bias"].to_dict("records"):
            is_measured = row["measured"] == row["measured"]
            effect = short(row["measured"] if is_measured else row["predicted"])
            ports.setdefault(row["port"], []).append([row["source"], effect, is_measured])
        return {port: rows[:8] for port, rows in ports.items()}


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST /read`, `/explain` and `/write` what it asks for; everything else is refused."""

    server: PromptServer  # type: ignore[assignment]
    timeout = 60

    def page(self, nonce: str) -> str:
        cfg = self.server.model.cfg
        hooks = [HeadHook.of(sae) for sae in reversed(self.server.saes.values())]
        shown = {"model": cfg.model_name, "heads": {layer: cfg.layer(layer).H for layer in cfg.recurrent_layers}}
        return environment().get_template("prompt.html").render(shown, hooks=hooks, nonce=nonce, most=MAX_TOKENS)

    def reading(self, _: str) -> str:
        length = int(self.headers["Content-Length"])
        if not 0 <= length <= MAX_BYTES:
            raise ValueError(f"request: expected 0 to {MAX_BYTES} bytes, got {length}; send a shorter text")
        asked = json.loads(self.rfile.read(length))
        server = self.server
        with server.lock:
            if self.path == "/explain":
                text, target, against = (str(asked[name]) for name in ("text", "target", "against"))
                return json.dumps(server.explain(text, target, against, int(asked["width"])))
            if self.path == "/write":
                layer, head, position = (int(asked[name]) for name in ("layer", "head", "position"))
                return json.dumps(server.made_of(layer, head, position))
            return json.dumps(server.read(str(asked["text"]), int(asked["layer"]), int(asked["head"])))

    def answer(self, paths: tuple[str, ...], content: Callable[[_Handler, str], str]) -> None:
        """Send what `content` makes of a nonce. A request is refused if it names another host than this server, comes
        from a page of another site, or asks for another path than one of `paths`."""
        hosts = [f"{name}:{self.server.server_address[1]}" for name in ("127.0.0.1", "localhost")]
        is_ours = self.headers.get("Host") in hosts
        is_ours &= self.headers.get("Origin") in {None, *map("http://{}".format, hosts)}
        nonce = secrets.token_urlsafe(16)
        status = 403 if not is_ours else 404 if self.path not in paths else 200
        refusal = f"expected {paths[0]} of {hosts[0]}, got {self.path} of {self.headers.get('Host')}"
        try:
            body = content(self, nonce) if status == 200 else json.dumps({"error": refusal})
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError, HookpointsError) as error:
            status = 400
            body = json.dumps({"error": str(error)})
        is_page = (status, self.path) == (200, "/")
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

    do_GET = partialmethod(answer, ("/",), page)
    do_POST = partialmethod(answer, ("/read", "/explain", "/write"), reading)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: texts are private."""
