"""Write docs/tools.md: what interpretability tools do on recurrent models, each run in its current version.

    python scripts/tools_compared.py [FOLDER]

Every tool gets an environment of its own in FOLDER (default: a temporary one; environments that are there are used
again). It borrows what is installed here, and pip puts the tool in front of that, with the release of transformers that
the tool asks for. There the probes of ``tool_probes`` run, on tiny random models and a CPU, and are held against a loop
over tokens. Five minutes, most of them pip's.
"""

from __future__ import annotations

import ast
import datetime
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
import venv
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import save_file

SCRIPTS = Path(__file__).parent
PAGE = SCRIPTS.parent / "docs" / "tools.md"
sys.path.append(str(SCRIPTS))

from tool_probes.truth import FAMILIES, solve  # noqa: E402


class Tool(NamedTuple):
    """A column of the table."""

    name: str
    module: str
    """Where its probes are."""
    distribution: str
    """What its version is read from."""
    requirements: tuple[str, ...]
    """What pip installs."""
    shown: tuple[str, ...]
    """The probes that the page shows."""
    about: str


TOOLS = (
    Tool(
        "hookpoints",
        "ours",
        "sae-lens-writesae",
        (),
        ("Hookpoints._cached", "Hookpoints.write", "Hookpoints.replace", "Hookpoints.generate"),
        "The same calls in every family; edits are values, which act in prefill, decoding and batches, from the edited "
        "token and layer on. Mamba-1 is refused, since each entry of its state decays by its own factor.",
    ),
    Tool(
        "TransformerLens 3",
        "lens",
        "transformer-lens",
        # From 5.15 on, transformers' Gated DeltaNet lacks an attribute that this version calls.
        ("transformer-lens==3.9.*", "transformers==5.14.*"),
        ("Bridge._cached", "Bridge._edited", "Mamba2.__init__", "Mamba2.write", "Mamba2.replace"),
        "The bridge replaces the forward of Mamba and Gated DeltaNet by its own. In Mamba the write is a hook, "
        "`hook_ssm_write`, if `eager_scan` is set; in Gated DeltaNet its factors are. RWKV-7 is a block whose four "
        "projections have hooks. Hooks inside these layers do not act while `generate` decodes.",
    ),
    Tool(
        "TransformerLens 4",
        "lens",
        "transformer-lens",
        ("transformer-lens==4.*", "transformers==5.17.*"),  # 5.17 is what it names as tested
        ("Bridge.delete", "GatedDelta.write_with_work", "GatedDelta.replace_with_work"),
        "As version 3 in these layers, and on more releases of transformers. SAELens cannot be used beside it.",
    ),
    Tool(
        "nnsight",
        "sight",
        "nnsight",
        ("nnsight",),
        (
            "Traced.layer",
            "GatedDelta.op",
            "GatedDelta.value",
            "Traced._edited",
            "GatedDelta.write_with_work",
            "Traced.generate",
        ),
        "`source` reaches the arguments of each op and the assignments inside it, in decoding too. What to do with "
        "them is the user's: which argument is a factor, how keys are normalised, where prefill and decoding call "
        "different ops. Names of operations are those of the release of transformers.",
    ),
    Tool(
        "pyvene",
        "vene",
        "pyvene",
        ("pyvene",),
        ("Modules.delete",),
        "Interventions on inputs and outputs of modules. The write is made inside a function, and between it and the "
        "projections lies a convolution or a token shift.",
    ),
    Tool(
        "SAELens",
        "saes",
        "sae-lens",
        ("sae-lens",),
        ("SAELens._sae",),
        "SAELens alone hooks outputs of modules. It trains on what another tool hooks; where a row has all heads of a "
        "layer, d_in is H K V instead of K V, and atoms are vectors unless `sae_lens_writesae` makes them matrices.",
    ),
    Tool(
        "mamba-lens",
        "mambalens",
        "mamba-lens",
        ("mamba-lens",),
        ("Mamba.state", "Mamba.delete"),
        "Mamba-1 alone, with a hook on the state after each token.",
    ),
)
TASKS = {
    "write": "read every token's write",
    "delete": "delete one token's write",
    "replace": "put another write in its place",
    "state": "read the state after each token",
    "pattern": "exact attention of the heads",
    "generate": "edit all writes of a head in `generate`",
    "batch": "eight edits as one batch",
    "sae": "give a head's writes to SAELens' trainer",
    "time": "time of reading all writes of a layer",
}
LETTERS = {"mamba2": "M", "qwen3_5": "G", "rwkv7": "R", "mamba": "1"}
UNEDITED = "`generate` while nothing is hooked"
WHICH = """\
* Transformers, or the residual stream and module outputs of any model: TransformerLens; by their documentation also
  nnsight, which runs models on NDIF's machines too, and pyvene, for trained interventions.
* Mamba-1: TransformerLens or mamba-lens. Mamba-2, one prompt and no generation: TransformerLens does all of it.
* A model that nothing else knows, or one edit at one place: nnsight, which reaches every place if you write the
  algebra.
* Vector SAEs on module outputs: SAELens. SAEs on writes, with matrices as atoms: `sae_lens_writesae`, which trains with
  SAELens.
* Delta rules and RWKV-7, one piece of code for several families, exact patterns, edits in generation or many at a time:
  `hookpoints`. It attaches to models that [nnsight](compatibility.md) or a [TransformerBridge](attach.md) holds."""


def environment(folder: Path, requirements: tuple[str, ...]) -> Path:
    """The interpreter of an environment that borrows all that is installed here and has ``requirements`` in front."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
        # addsitedir reads the lender's .pth files as well, and so finds packages installed in place.
        lender = sysconfig.get_path("purelib")
        (packages / "borrowed.pth").write_text(f"import site; site.addsitedir({lender!r})\n")
        if requirements:
            subprocess.run([python, "-m", "pip", "install", "-q", "--no-warn-conflicts", *requirements], check=True)
    return python


def run(python: Path, tool: Tool, work: Path) -> dict[str, Any]:
    """Answers of a tool's probes by family and task, and the versions that gave them."""
    answers = work / "answers.json"
    path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent)])
    settings = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [python, "-m", "tool_probes", tool.module, str(work), str(answers)]
    subprocess.run(command, check=True, env=settings, stderr=subprocess.DEVNULL)
    ask = f"from importlib.metadata import version as v; print(v('{tool.distribution}'), v('transformers'))"
    versions = subprocess.run([python, "-c", ask], check=True, env=settings, capture_output=True, text=True)
    return {"answers": json.loads(answers.read_text()), "versions": versions.stdout.split()}


def cell(answer: dict[str, Any] | None) -> str:
    """One answer in a table."""
    if answer is None:
        return "–"
    if "forwards" in answer:
        return f"{answer['forwards']:.1f} ({answer['ms']:.0f} ms)"
    if answer["grade"] == "no":
        return "no"
    return f"**{answer['grade']}** " + (f"{answer['error']:.0e}".replace("e-0", "e-") if answer["error"] else "exact")


def missed(answer: dict[str, Any]) -> str:
    """What went wrong."""
    note = answer["note"] if len(answer["note"]) < 120 else answer["note"][:118] + " ..."
    return "; ".join(filter(None, [f"off by {answer['error']:.2g}" if "error" in answer else "", note]))


def remark(answer: dict[str, Any]) -> str:
    """One answer in words; empty where there is nothing to say."""
    if answer["grade"] == "no":
        return f"*no*: {missed(answer)}"
    plainly = f" (without it {missed(answer['plainly'])})" if answer.get("plainly") else ""
    return f"*{answer['grade']}*: {answer['note']}{plainly}" if answer.get("note") else ""


def remarks(answers: dict[str, Any], than: dict[str, Any] | None = None) -> list[str]:
    """A line for each remark, with the tasks that it is on; only tasks of another grade ``than`` those, if given."""
    tasks: dict[str, list[str]] = {}
    for task, what in {**TASKS, "unedited": UNEDITED}.items():
        for family, name in FAMILIES.items():
            answer = answers.get(family, {}).get(task)
            before = than[family].get(task) if than else None
            if answer and remark(answer) and (than is None or (before and before["grade"] != answer["grade"])):
                tasks.setdefault(remark(answer), []).append(f"{what}, {name}")
    return [f"* {'; '.join(names)}: {said}" for said, names in tasks.items()]


def rows() -> list[tuple[str, str]]:
    """Task and family of each row."""
    return [
        (task, family)
        for task in TASKS
        for family in FAMILIES
        if family != "mamba" or task in ("write", "delete", "state")
    ]


def full_table(results: dict[str, dict[str, Any]]) -> str:
    """All tasks and families."""
    lines = ["| | " + " | ".join(tool.name for tool in TOOLS) + " |", "|" + "---|" * (len(TOOLS) + 1)]
    for task, family in rows():
        cells = [cell(results[tool.name]["answers"].get(family, {}).get(task)) for tool in TOOLS]
        lines.append(f"| {TASKS[task]}: {FAMILIES[family]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def short_cell(task: str, answers: dict[str, Any]) -> str:
    """The families in which a tool does a task; those in brackets cost work."""
    names = []
    for family, letter in LETTERS.items():
        grade = (answers.get(family, {}).get(task) or {"grade": "no"})["grade"]
        if grade != "no":
            names.append(f"({letter})" if grade == "with work" else letter)
    return " ".join(names) or "–"


def short_table(results: dict[str, dict[str, Any]]) -> str:
    """Tasks alone, and the tools that do any of them."""
    columns: dict[str, list[str]] = {}
    for tool in TOOLS:
        cells = [short_cell(task, results[tool.name]["answers"]) for task in list(TASKS)[:-1]]
        if set(cells) != {"–"}:
            columns[tool.name] = cells
    lines = ["| | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 1)]
    lines += [f"| {' | '.join(row)} |" for row in zip(list(TASKS.values())[:-1], *columns.values(), strict=True)]
    return "\n".join(lines)


def source(tool: Tool) -> str:
    """The probes that the page shows."""
    text = (SCRIPTS / "tool_probes" / f"{tool.module}.py").read_text()
    found = {}
    for probes in ast.parse(text).body:
        if isinstance(probes, ast.ClassDef):
            for node in probes.body:
                if isinstance(node, ast.FunctionDef):
                    first = min(part.lineno for part in (node, *node.decorator_list))
                    lines = text.splitlines()[first - 1 : node.end_lineno]
                    found[f"{probes.name}.{node.name}"] = textwrap.dedent("\n".join(lines))
    return "\n\n\n".join(found[name] for name in tool.shown)


def section(tool: Tool, result: dict[str, Any], newest: dict[str, Any] | None) -> str:
    """What the page says of one tool."""
    version, transformers = result["versions"]
    lines = [f"## {tool.name}", "", f"Version {version}, transformers {transformers}. {tool.about}", ""]
    lines += [*remarks(result["answers"]), ""]
    if newest and (other := remarks(newest["answers"], than=result["answers"])):
        lines += [f"With transformers {newest['versions'][1]}:", "", *other, ""]
    return "\n".join([*lines, f"```py\n{source(tool)}\n```", ""])


def main(folder: Path) -> None:
    """Run every tool and write the page."""
    for family in FAMILIES:
        save_file({name: x.contiguous() for name, x in solve(family).items()}, folder / f"{family}.safetensors")
    results: dict[str, dict[str, Any]] = {}
    newest: dict[str, dict[str, Any]] = {}
    for tool in TOOLS:
        results[tool.name] = run(environment(folder / tool.name.replace(" ", "-"), tool.requirements), tool, folder)
        print(tool.name, *results[tool.name]["versions"], flush=True)
        if len(tool.requirements) > 1:  # transformers held back
            python = environment(folder / f"{tool.name.replace(' ', '-')}-newest", tool.requirements[:1])
            newest[tool.name] = run(python, tool, folder)
    sections = "\n".join(section(tool, results[tool.name], newest.get(tool.name)) for tool in TOOLS)
    PAGE.write_text(f"""# Other tools

What tools do on recurrent models, found by `python scripts/tools_compared.py` on {datetime.date.today()}: each tool in
its current version, on tiny random models and a CPU. The families in which a tool does a task are M Mamba-2, G Gated
DeltaNet, R RWKV-7 and 1 Mamba-1; in brackets are those in which it gives access and the rest is work. Tools that reach
outputs of modules alone do none of it: pyvene, and SAELens by itself.

{short_table(results)}

## When to use which

{WHICH}

## Every run

**Yes**: the result is that of a loop over tokens which knows no tool, but for the error beside it: the largest one,
relative to the largest value, or for edits to what the edit changes in the logits. **With work**: the tool gives
access, and the rest is the user's; below is what. *No*: below is what was raised, or how far off the nearest thing is.
An edit that does nothing is off by 1; of generated tokens it is the share that differs. A dash: nothing to run, since
the tool has no such part or fails before at what the task needs. With any tool, a copy of a layer can compute all again
from a hook on the layer's input; that does not count. Times are in forwards of the model in the same environment,
for four layers, states of 64 x 64 and 512 tokens; milliseconds are those of a shared machine, and older releases of
transformers take several times as long for a forward of Mamba-2. RWKV-7 is `hookpoints.rwkv7`, in the layout of
flash-linear-attention, whose own needs a GPU.

{full_table(results)}

The probes, of which parts follow, are in `scripts/tool_probes`. There, `truth.delete(x)` is `x[:, TOKEN, HEAD] = 0`,
`exchange` is `x[:, TOKEN, HEAD] = x[:, SOURCE, HEAD]`, and `silence` is `x[:, :, HEAD] = 0`.

{sections}""")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        Path(sys.argv[1]).mkdir(parents=True, exist_ok=True)
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
