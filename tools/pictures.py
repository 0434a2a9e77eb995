"""Make the pictures of README and docs, and note in docs/images/sources.json what each was made from.

    python tools/pictures.py                 every picture; that of an atom needs Chromium on the PATH
    python tools/pictures.py write.png       one of them

`tests/test_docs.py` fails for a picture whose sources have changed since, and for one that this script does not make.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs" / "images"
SOURCES = IMAGES / "sources.json"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
ATTENTION = "tutorials/2_attention_and_induction.ipynb"


def saved(tutorial: str, words: str, file: Path) -> None:
    """The figure that a tutorial was saved with, of the cell that has these words."""
    cells = json.loads((ROOT / tutorial).read_text(encoding="utf-8"))["cells"]
    (outputs,) = [cell["outputs"] for cell in cells if words in "".join(cell["source"]) and "outputs" in cell]
    (png,) = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    file.write_bytes(base64.b64decode("".join(png)))


def photographed(page: Path, size: str, file: Path) -> None:
    """What a browser shows of a page."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise RuntimeError(f"{file.name}: expected a browser on the PATH, one of {', '.join(BROWSERS)}; got none")
    command = [browser, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={size}"]
    subprocess.run([*command, f"--screenshot={file}", page.as_uri()], check=True, capture_output=True)


SENTENCES = (
    "The crops were good, and no nation has reason to complain of us.",
    "Clara lives in Paris.",
    "The report of the Secretary of the Treasury will be laid before you.",
    "Our commerce has been extended to new markets.",
    "The home of Clara is Vienna.",
    "We are at peace with all nations.",
)
"""What README's first picture has read; the fifth contradicts the second."""


def front(file: Path) -> None:
    """A text with a sentence that contradicts another; phrases read back from its memory, and the answer; both once the
    sentence is cut; and whether the memory has read it."""
    import jinja2
    import torch

    from hookpoints import HookedRecurrent, Memory, MemoryReader
    from hookpoints.memory.phrases import runs
    from hookpoints.zoo import english

    model = HookedRecurrent.from_pretrained("facts-english")
    reader = MemoryReader.fit(model, context=64, longest=8)
    memory = model.memory(" ".join(SENTENCES))
    question = "Where does Clara live?"
    suspect = memory.suspects(f" {question}")[0]

    def shown(title: str, own: Memory) -> tuple[str, list[tuple[str, bool]], str, float]:
        in_text = runs(own.tokens[0].tolist(), 3)
        phrases = [(reading.text, bool(runs(reading.tokens, 3) & in_text)) for reading in reader.read_back(own, 5)]
        chances = model.logits_after(own, f" {question}")[0, -1].softmax(-1)
        return title, phrases, model.to_string(chances.argmax(keepdim=True)), float(chances.max())

    cut = memory.without(suspect.span)
    never = model.memory(" ".join(sentence for sentence in SENTENCES if sentence != suspect.text.strip()))
    cities = english.RELATIONS["home"].values
    alike = [
        suspect.text,
        *(suspect.text.replace("Vienna", city) for city in cities if city not in ("Vienna", "Paris")),
    ]
    scores = torch.stack([reader.scores(own, alike)[0] for own in (memory, cut, never)])
    places = (2 + 94 * (scores - scores.min()) / (scores.max() - scores.min())).tolist()
    before, after = " ".join(SENTENCES).split(suspect.text)
    template = jinja2.Template((ROOT / "tools" / "front.html").read_text(encoding="utf-8"))
    page = template.render(
        parts=((before, False), (suspect.text, True), (after, False)),
        memories=(shown("Its memory", memory), shown("After the cut", cut)),
        question=question,
        others=len(alike) - 1,
        scores=[(title, own, unread) for title, (own, *unread) in zip(("read", "cut", "never read"), places)],
    )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "front.html").write_text(page, encoding="utf-8")
        photographed(Path(folder) / "front.html", "640,715", file)


def write(file: Path) -> None:
    """A state of the model `recall` before and after one token, and the write between them."""
    import matplotlib.pyplot as plt

    from hookpoints import HookedRecurrent

    model = HookedRecurrent.from_pretrained("recall").requires_grad_(False)
    r = model.recurrence("Ada Paris Ben Rome Cleo Oslo Dan", 1).select(heads=1)
    (before, after), key, value = r.states(positions=[4, 5])[0, :, 0], r.k[0, 5, 0], r.u[0, 5, 0]
    panels = (
        ("$S_{t-1}$, the state\nwhat the head remembers", before, "decays,\npartly erased\n\n$+$\n\n\n"),
        (r"$k_t\, u_t^\top$, the write" + "\nwhat this token adds", key[:, None] * value, "$=$"),
        ("$S_t$, the next state\nwhat later tokens read", after, ""),
    )
    figure, axes = plt.subplots(1, 3, figsize=(9.4, 3.6))
    limit = float(after.abs().quantile(0.98))
    for axis, (title, matrix, sign) in zip(axes, panels):
        axis.imshow(matrix[key.argsort()][:, value.argsort()], cmap="RdBu_r", vmin=-limit, vmax=limit)
        axis.set(xticks=[], yticks=[])
        axis.set_title(title, fontsize=11)
        axis.text(1.25, 0.5, sign, transform=axis.transAxes, fontsize=11, ha="center", va="center")
    axes[0].set(xlabel="value channels", ylabel="key channels")
    figure.suptitle(
        r"update   $S_t = (\mathrm{diag}(\alpha_t) + a_t b_t^\top)\, S_{t-1} + k_t\, u_t^\top$"
        r"          read   $o_t = S_t^\top q_t$",
        y=0.09,
        fontsize=13,
    )
    figure.subplots_adjust(wspace=0.5, left=0.04, right=0.99, top=0.87, bottom=0.19)
    figure.savefig(file, dpi=110)


def atom(file: Path) -> None:
    """The top of the page that `writesae show` makes: of twelve atoms, that of the one most like the writes."""
    from hookpoints import HookedRecurrent, embedded
    from sae_lens_writesae import load_sae, text_dataset, train, training_config
    from writesae import sample_sequences
    from writesae.page.atoms import AtomPages, write_atom_pages

    model = HookedRecurrent.from_pretrained("embedded").requires_grad_(False)
    tokens = sample_sequences(model, embedded.text("test"), 128, 40)
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"d_sae": 256, "context_size": 128, "training_tokens": 50_000, "n_batches_in_buffer": 32}
        cfg = training_config(model, 4, 0, **sizes, verbose=False)
        train(cfg, (model, text_dataset(embedded.text("train")))).save_inference_model(folder)
        data = AtomPages(n_atoms=12, min_firings=30).collect(model, load_sae(folder), tokens)
        nearest = max(data.atoms, key=lambda page: page.cosine or 0.0)
        page = write_atom_pages(data, folder).with_name(f"atom-{nearest.atom}.html")
        photographed(page, "1280,900", file)


class Picture(NamedTuple):
    """How a picture is made, and of which files of the repository."""

    make: Callable[[Path], None] | partial[None]
    sources: tuple[str, ...]

    def fingerprint(self) -> str:
        """SHA-256 of the code that makes it and of its sources."""
        code = inspect.getsource(self.make.func if isinstance(self.make, partial) else self.make)
        parts = (f"{name}\n".encode() + (ROOT / name).read_bytes() for name in self.sources)
        return hashlib.sha256(b"".join([code.encode(), *parts])).hexdigest()


PICTURES = {
    "front.png": Picture(
        front,
        (
            "hookpoints/zoo/facts-english/model.safetensors",
            "hookpoints/memory/reader.py",
            "hookpoints/memory/templates.py",
            "tools/front.html",
        ),
    ),
    "write.png": Picture(write, ("hookpoints/zoo/recall/model.safetensors",)),
    "attention.png": Picture(partial(saved, ATTENTION, "one distance of one layer ablated"), (ATTENTION,)),
    "atom.png": Picture(
        atom,
        (
            "hookpoints/embedded/gdn/model.safetensors",
            *(f"writesae/page/{name}" for name in ("base.html", "style.css", "template.py")),
            *(f"writesae/page/atoms/{name}" for name in ("atom.html", "macros.html", "atoms.css")),
            *(f"writesae/page/atoms/{name}" for name in ("pages.py", "text.py", "data.py")),
        ),
    ),
}


def note(name: str) -> dict[str, str | list[str]]:
    """What sources.json says of a picture as it is now."""
    return {
        "sources": list(PICTURES[name].sources),
        "made from": PICTURES[name].fingerprint(),
        "picture": hashlib.sha256((IMAGES / name).read_bytes()).hexdigest(),
    }


def main(names: list[str]) -> None:
    """Make the pictures that are named, or all."""
    notes = json.loads(SOURCES.read_text(encoding="utf-8")) if SOURCES.exists() else {}
    for name in names or PICTURES:
        PICTURES[name].make(IMAGES / name)
        notes[name] = note(name)
    notes = {name: notes[name] for name in PICTURES if name in notes}
    SOURCES.write_text(json.dumps(notes, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
