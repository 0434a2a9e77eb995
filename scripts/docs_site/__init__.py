"""Pages of the documentation that are made from the code: one per hook, per evaluation and per error."""
