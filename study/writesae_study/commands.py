"""Commands that the study adds to `writesae`. Loads no torch."""

COMMANDS = {
    "eval": (
        "Evaluate trained dictionaries: one evaluation by name, or all.",
        "writesae_study.evaluate:run_eval",
    ),
    "report": (
        "Write one page from saved results.",
        "writesae_study.evaluate:Report",
    ),
    "reproduce": (
        "The paper's whole table for a model: train, evaluate and report, as a workflow.",
        "writesae_study.reproduce.command:Reproduce",
    ),
    "zoo": (
        "Measure what dictionaries find in models whose mechanism is known.",
        "writesae_study.zoo:Zoo",
    ),
}
