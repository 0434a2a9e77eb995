# The runs behind the published numbers: a job for each row of runs.toml at each of its heads. `writesae reproduce
# --published` calls Snakemake in the folder of the runs. A command passes over what is there, so that a job that was
# killed costs little; what Snakemake looks at are empty marks.
import shlex
import sys
from pathlib import Path

from writesae_study.reproduce.published import (
    RUNS, Place, collecting, command_lines, places, question, without_learning
)

STEPS = Path(workflow.snakefile).with_name("steps.sh")
shell.prefix(f"PYTHON={shlex.quote(sys.executable)}; source {shlex.quote(str(STEPS))}; ")

HEADS = {kind: [places(row["heads"]) for row in RUNS[kind]] for kind in ("run", "null")}


def marks(kind):
    return [f"marks/{at.model}/{at.layer}.{at.head}/{kind}{n}" for n, row in enumerate(HEADS[kind]) for at in row]


def place_of(wildcards):
    return Place(wildcards.model, int(wildcards.layer), int(wildcards.head))


def before(wildcards):  # rows at one head stand in the order of runs.toml: later ones leave what there is
    earlier = [n for n in range(int(wildcards.n)) if place_of(wildcards) in HEADS["run"][n]]
    here = f"marks/{wildcards.model}"
    return f"{here}/{wildcards.layer}.{wildcards.head}/run{earlier[-1]}" if earlier else f"{here}/collected"


def lines(some):
    return "; ".join(shlex.join(["writesae", *arguments]) for arguments in some)


wildcard_constraints:
    model="|".join(RUNS["collect"]),
    layer="[0-9]+",
    head="[0-9]+",
    n="[0-9]+",


rule published:
    input:
        marks("run") + marks("null"),


rule collect:
    output:
        touch("marks/{model}/collected"),
    params:
        lines=lambda at: lines([collecting(at.model)]),
    log:
        "logs/{model}-collect.txt",
    shell:
        "({params.lines}) &> {log}"


rule run:
    input:
        before,
    output:
        touch("marks/{model}/{layer}.{head}/run{n}"),
    params:
        lines=lambda at: lines(command_lines(RUNS["run"][int(at.n)], place_of(at))),
    log:
        "logs/{model}-{layer}.{head}-run{n}.txt",
    shell:
        "({params.lines}) &> {log}"


rule null:  # where nothing was learned
    output:
        touch("marks/{model}/{layer}.{head}/null{n}"),
    run:
        without_learning(place_of(wildcards), [question(kind) for kind in RUNS["null"][int(wildcards.n)]["kinds"]])
