"""Commands that the study adds to `writesae`. Loads no torch."""

from writesae.cli import Command

COMMANDS = {
    "eval": Command(
        "Evaluate trained dictionaries: one evaluation by name, or all.",
        "writesae_study.evaluate:run_eval",
    ),
    "report": Command(
        "Write one page from saved results.",
        "writesae_study.evaluate:Report.run",
        "writesae_study.evaluate:Report",
    ),
    "reproduce": Command(
        "The paper's whole table for a model: train, evaluate and report, as a workflow.",
        "writesae_study.reproduce.command:run_reproduce",
    ),
}
