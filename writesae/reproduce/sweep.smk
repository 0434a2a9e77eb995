# One dictionary at every point of a grid, each evaluated, and one report. The model runs once.
#
#     snakemake --snakefile "$(python -c 'import writesae; print(writesae.__path__[0])')/reproduce/sweep.smk" --cores 2 \
#         --configfile grid.yaml
#
# where grid.yaml has model: embedded, layer: 2, head: 1, and any of k: [1, 4, 32], d_sae: [256, 1024], architecture,
# seed, lr, training_tokens: 256000, evaluations: [substitution, partition].
import shlex
import sys

shell.prefix("writesae() {{ %s -m writesae \"$@\"; }}; " % shlex.quote(sys.executable))  # this one, on any node

LAYER, HEAD = int(config["layer"]), int(config["head"])
GRID = {"architecture": ["writesae_topk"], "k": [1], "d_sae": [1024], "seed": [0], "lr": [3e-3]}
GRID = {name: config.get(name, values) for name, values in GRID.items()}
POINT = "-".join(f"{name}={{{name}}}" for name in GRID)
SAE = f"{POINT}/L{LAYER}H{HEAD}/write-seed{{seed}}/sae"
TOKENS = int(config.get("training_tokens", 256_000))


rule report:
    input:
        expand(f"{POINT}/evaluated", **GRID),
    output:
        "report/report.html",
    params:
        folders=expand(f"{POINT}/results", **GRID),
    shell:
        "writesae report {params.folders} --out {output}"


rule collect:
    output:
        touch("collected"),
    shell:
        "writesae collect --model {config[model]} --layers {LAYER} --heads {HEAD} --n-tokens {TOKENS} --out collection"


rule train:
    input:
        "collected",
    output:
        touch(f"{POINT}/trained"),
    params:
        point=POINT,
    shell:
        "writesae train --no-summary --collection collection --architecture {wildcards.architecture} --k {wildcards.k}"
        " --d-sae {wildcards.d_sae} --seeds {wildcards.seed} --lr {wildcards.lr} --training-tokens {TOKENS}"
        " --out {params.point}"


rule evaluate:
    input:
        f"{POINT}/trained",
    output:
        touch(f"{POINT}/evaluated"),
    params:
        point=POINT,
        sae=SAE,
        kinds=config.get("evaluations", ["substitution"]),
    shell:
        "writesae eval all {params.sae} --model {config[model]} --kinds {params.kinds} --resume"
        " --out {params.point}/results"
