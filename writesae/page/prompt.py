"""The command `writesae prompt`: a page that reads a text, changes what the model remembers of it, and asks why.

The page is served by this process to this machine alone: on 127.0.0.1, to requests that name it as their host and come
from its own page, so that no other site that is open in the browser can use it (by DNS rebinding, say). `session` has
the answers.
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

from hookpoints import MemoryReader
from hookpoints.errors import HookpointsError, InputError, PredictionWarning
from sae_lens_writesae.sae.load import load_sae, model_of
from sae_lens_writesae.sae.target import HeadHook, check_hook
from writesae.files import sae_folders
from writesae.flags import Prompt
from writesae.page.remembered import default_prompt
from writesae.page.session import ANSWERS, MAX_TOKENS, Session
from writesae.page.template import environment

MAX_BYTES = 1_000_000
"""Longest request that is read."""
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'nonce-{nonce}'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)


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
        InputError: the port is taken; before a model is loaded.
    """

    def __init__(self, flags: Prompt) -> None:
        saes = [] if flags.sae is None else [load_sae(each) for each in sae_folders(flags.sae)]
        self.lock = threading.Lock()
        try:
            super().__init__(("127.0.0.1", flags.port), _Handler)  # before a model loads
        except OSError as error:
            raise InputError(
                f"port: expected one that is free, got {flags.port} ({error.strerror}); name another --port, or --port "
                "0 for any that is free"
            ) from error
        try:
            name = flags.model if flags.model or saes else "embedded"
            model = model_of(saes, name, dtype=flags.dtype, other_model=flags.other_model)
            for each in saes:
                check_hook(model, HeadHook.of(each).name, each.cfg, f"the SAE in {flags.sae}")
            reader = None if flags.reader is None else MemoryReader.load(flags.reader, model)
            self.session = Session(model, saes, reader)
        except BaseException:
            self.server_close()
            raise


_REFUSED = (AttributeError, HookpointsError, KeyError, OverflowError, RecursionError, TypeError, ValueError)
"""What a request of a stranger may raise."""


class _Handler(BaseHTTPRequestHandler):
    """`GET /` is the page, `POST` to one of `ANSWERS` what it asks for; everything else is refused."""

    server: PromptServer  # type: ignore[assignment]
    timeout = 60

    def page(self, nonce: str) -> str:
        session = self.server.session
        hooks = [HeadHook.of(sae) for sae in session.saes.values()]
        text, question = default_prompt(session.model.cfg.model_name)
        shown = {"model": session.model.cfg.model_name, "hooks": hooks, "text": text, "question": question}
        return environment().get_template("prompt.html").render(shown, nonce=nonce, most=MAX_TOKENS)

    def reading(self, _: str) -> str:
        length = int(self.headers["Content-Length"])
        if not 0 <= length <= MAX_BYTES:
            raise ValueError(f"request: expected 0 to {MAX_BYTES} bytes, got {length}; send a shorter text")
        body = self.rfile.read(length)
        # Numbers are shown that say how far predictions hold.
        with self.server.lock, warnings.catch_warnings(action="ignore", category=PredictionWarning):
            return json.dumps(self.server.session.answer(self.path, json.loads(body)))

    def answer(self, paths: tuple[str, ...], content: Callable[[_Handler, str], str]) -> None:
        """Send what `content` makes of a nonce. A request is refused if it names another host than this server, comes
        from a page of another site, or asks for another path than one of `paths`."""
        hosts = [f"{name}:{self.server.server_address[1]}" for name in ("127.0.0.1", "localhost")]
        # Another site that is open in the browser has its own name as Host (by DNS rebinding), or as Origin.
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
    do_POST = partialmethod(answer, tuple(ANSWERS), reading)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: texts are private."""
