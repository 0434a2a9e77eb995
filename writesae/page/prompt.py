"""The command `writesae prompt`: a page that reads a text, changes what the model remembers of it, and asks why.

The page is served by this process to this machine alone: on 127.0.0.1, to requests that name it as their host and come
from its own page, so that no other site that is open in the browser can use it (by DNS rebinding, say).
"""

from __future__ import annotations

import json
import secrets
import threading
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partialmethod
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast

import torch

from hookpoints import Graph, MemoryReader, Recurrence, attribute, embedded
from hookpoints.errors import HookpointsError, InputError, PredictionWarning
from sae_lens_writesae.sae.load import load_sae, model_of
from sae_lens_writesae.sae.target import HeadHook, check_hook
from writesae.files import sae_folders
from writesae.flags import Prompt
from writesae.page.atoms.text import TokenTexts, short, visible
from writesae.page.remembered import Change, PromptText, default_prompt, unknown_words
from writesae.page.template import environment

MAX_BYTES = 1_000_000
"""Longest request that is read."""
MAX_TOKENS = 256
"""Longest text that is read: a page shows a number for each pair of tokens."""
FITTED = 60_000
"""Characters of text to which a reader is fitted."""
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


def run_prompt(flags: Prompt) -> None:
    """Serve until interrupted. Raises what `PromptServer` raises."""
    with PromptServer(flags) as server, suppress(KeyboardInterrupt):
        print(f"open http://127.0.0.1:{server.server_port} in a browser; Ctrl-C ends", flush=True)
        server.serve_forever()


class PromptServer(ThreadingHTTPServer):
    """The page of a model, and of dictionaries of its heads if a folder has some: the first of each head, by the names
    of their folders. Answers on several connections, one of which reads at a time.

    Raises:
        ValueError: the folder holds no whole dictionary, or one of another model; the reader belongs to another model.
        OSError: the port is taken; before a model is loaded.
    """

    request_queue_size = 128
    """Connections that wait to be accepted; more are reset."""

    def __init__(self, flags: Prompt) -> None:
        found = [] if flags.sae is None else [load_sae(each) for each in reversed(sae_folders(flags.sae))]
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
            self._reader = None if flags.reader is None else MemoryReader.load(flags.reader, self.model)
        except BaseException:
            self.server_close()
            raise
        self.texts = TokenTexts(self.model)

    def reader(self) -> MemoryReader:
        """The one that was given, or else one that is fitted now to text that ships with the package.

        Raises:
            InputError: the model has no tokens for that text.
        """
        if self._reader is None:
            text = embedded.text("train")[:FITTED]
            if unknown_words(self.model, text[:100]):
                raise InputError("reader: expected a model that reads English, or --reader FILE, got neither")
            self._reader = MemoryReader.fit(self.model, text, context=64, longest=8)
        return self._reader

    @torch.no_grad()
    def prompted(self, text: str, question: str) -> PromptText:
        """A text and a question, read: each of some tokens, and both of at most `MAX_TOKENS`.

        Raises:
            ValueError: there are no tokens, or more.
        """
        tokens = self.model.to_tokens(text, truncate=False)
        asked = self.model.to_tokens(f" {question.strip()}", prepend_bos=False, truncate=False)
        total = tokens.shape[1] + asked.shape[1]
        if not text.strip() or not question.strip() or total > MAX_TOKENS:
            raise ValueError(f"text, question: expected words of each, at most {MAX_TOKENS} tokens in all, got {total}")
        return PromptText(self.model, self.texts, self.model.memory(tokens), asked)

    def remember(self, prompt: PromptText, changes: Sequence[Change]) -> dict[str, object]:
        """What a memory says before and after changes, as JSON values.

        Returns: `tokens` [T] of text and question, `stop`, the number of those of the text, and `first`, the first that
        is none of the model's own; `sentences`; `answers` and `kl` of `PromptText.answers`.
        """
        return {
            "tokens": [visible(piece) for piece in self.texts.many(prompt.tokens[0].tolist())],
            "first": prompt.first,
            "stop": prompt.memory.T,
            "sentences": prompt.sentences(),
            **prompt.answers(prompt.changed(changes)),
        }

    def read(self, prompt: PromptText, layer: int, head: int) -> dict[str, object]:
        """What one head of a layer does on a text of T tokens, as JSON values.

        Returns: `shares` [T][S], S = t + 1, of `read_shares`; `atoms` [T], active atoms with their activation,
        largest first; None for a head without a dictionary.

        Cost: one forward up to the layer, a second one for atoms, and T / V times the cost of the head's reads.

        Raises:
            ValueError: the layer or the head does not exist.
        """
        tokens = prompt.tokens
        atoms = None
        recurrence = self.model.recurrence(tokens, layer)
        if not 0 <= head < recurrence.H:
            raise ValueError(f"head: expected 0 to {recurrence.H - 1} in layer {layer}, got {head}")
        sae = self.saes.get(f"L{layer}H{head}")
        if sae is not None:
            hook = HeadHook.of(sae).name
            _, cache = self.model.run_with_cache(tokens, names_filter=[hook], stop_at_layer=layer + 1)
            active = sae.encode(cache[hook][0].to(next(sae.parameters())))
            order = active.argsort(descending=True)
            rows = zip(order.tolist(), active.gather(1, order).tolist())
            atoms = [[(f"atom {atom}", short(value)) for atom, value in zip(*row) if value] for row in rows]
        shares = read_shares(recurrence.select(heads=slice(head, head + 1))).tolist()
        rows = [[*map(short, row[: t + 1])] for t, row in enumerate(shares)]
        return {"shares": rows, "atoms": atoms}

    def explain(self, prompt: PromptText, target: str, against: str, width: int) -> dict[str, object]:
        """Why the model says a token after a question: the picture of an attribution graph.

        Args:
            target, against: the token, and that whose logit is taken off; empty for the most likely one, and the mean.
            width: of the picture, in pixels.

        Returns: `svg`; `said`, how far predictions hold; `target`.

        Raises:
            ValueError: a target is not one token.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PredictionWarning)  # the numbers are shown
            wanted = [target] if target else None
            # All nodes of a text of sixty tokens take five times as long as the likely ones.
            graph = attribute(prompt.tokens, self.model, wanted, against or None, 50, saes=list(self.saes.values()))
            said = str(graph.check()) if prompt.tokens.shape[1] > 1 else ""
        self.graph = graph
        picture = graph.draw(width=min(max(width, 320), 1200))
        return {"svg": picture, "said": said, "target": graph.metadata["title"]}

    def explained(self) -> Graph:
        """The graph of the text that was explained last.

        Raises:
            ValueError: there is none.
        """
        if self.graph is None:
            raise ValueError("no text was explained yet: ask why first")
        return self.graph

    def made_of(self, node: str) -> dict[str, list[tuple[str, float, bool]]]:
        """What made a node of the text that was explained last: for each port the largest sources, with their effect
        and whether it was measured. The query of a write is that of the last token.

        Raises:
            ValueError: no text was explained, or there is no such node.
        """
        graph = self.explained()
        named = graph.nodes[graph.nodes.node_id == node]
        if not len(named):
            raise ValueError(f"node: expected one of the picture, got {node!r}")
        row = named.iloc[0]
        table = graph.edges[graph.edges.target == node]
        if row.feature_type in ("write", "attn", "mlp"):
            last = len(cast("list[str]", graph.metadata["tokens"])) - 1
            table = graph.why(node, read=last if row.feature_type == "write" else None)
        ports: dict[str, list[tuple[str, float, bool]]] = {}
        for edge in table.to_dict("records"):
            is_measured = edge["measured"] == edge["measured"]
            effect = short(edge["measured"] if is_measured else edge["predicted"])
            ports.setdefault(edge["port"], []).append((edge["source"], effect, is_measured))
        return {port: edges[:8] for port, edges in ports.items()}

    def answer_with(self, nodes: list[str], is_kept: bool) -> dict[str, object]:
        """The answer of a run with some nodes alone, or of one without them.

        Raises:
            InputError: what `Graph.keep` and `Graph.without` raise.
        """
        graph = self.explained()
        answer = graph.keep(nodes) if is_kept else graph.without(nodes)
        return {**answer._asdict(), "whole": graph.metadata["metric"]}


_REFUSED = (AttributeError, HookpointsError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""What a request of a stranger may raise."""
_REQUESTS = ("/unknown", "/memory", "/reader", "/head", "/explain", "/node", "/set")
"""What the page may ask for."""


def _page_answer(server: PromptServer, path: str, body: bytes) -> object:
    """What the page gets for the JSON that it sends."""
    asked = json.loads(body)
    match path:
        case "/node":
            return server.made_of(str(asked["node"]))
        case "/set":
            return server.answer_with([*map(str, asked["nodes"])], bool(asked["kept"]))
        case "/unknown":
            return unknown_words(server.model, f"{asked['text']} {asked['question']}")
    prompt = server.prompted(str(asked["text"]), str(asked["question"]))
    match path:
        case "/head":
            return server.read(prompt, int(asked["layer"]), int(asked["head"]))
        case "/explain":
            return server.explain(prompt, str(asked["target"]), str(asked["against"]), int(asked["width"]))
    if path == "/memory":
        return server.remember(prompt, asked["spans"])
    reader = server.reader()
    memory = prompt.changed(asked["spans"])
    back = prompt.read_back(reader, memory) if asked["back"] else None
    scores = prompt.scores(reader, memory, asked["phrases"])
    return {"scores": scores, "back": back, "longest": reader.fitted.longest}


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST` to `_REQUESTS` what it asks for; everything else is refused."""

    server: PromptServer  # type: ignore[assignment]
    timeout = 60

    def page(self, nonce: str) -> str:
        cfg = self.server.model.cfg
        hooks = [HeadHook.of(sae) for sae in reversed(self.server.saes.values())]
        text, question = default_prompt(cfg.model_name)
        shown = {"model": cfg.model_name, "heads": {layer: cfg.layer(layer).H for layer in cfg.recurrent_layers}}
        shown |= {"hooks": hooks, "text": text, "question": question}
        return environment().get_template("prompt.html").render(shown, nonce=nonce, most=MAX_TOKENS)

    def reading(self, _: str) -> str:
        length = int(self.headers["Content-Length"])
        if not 0 <= length <= MAX_BYTES:
            raise ValueError(f"request: expected 0 to {MAX_BYTES} bytes, got {length}; send a shorter text")
        body = self.rfile.read(length)
        with self.server.lock:
            return json.dumps(_page_answer(self.server, self.path, body))

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
        except _REFUSED as error:
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
    do_POST = partialmethod(answer, _REQUESTS, reading)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: texts are private."""
