"""The paper's whole table for one model, as a Snakemake workflow: collect once, train, evaluate, report.

`Snakefile` is the protocol, one `writesae` command a rule. `config` says what a run covers,
`command` is what people type: it checks and becomes Snakemake. `profiles` are for a laptop, one
GPU, and SLURM. None is for several GPUs of one machine.

`runs.toml` has the runs behind the published numbers; `published.smk` is their workflow, `published` what its rules do.
"""
