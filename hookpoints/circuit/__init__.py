"""Why did the model say this? Which writes made a logit, and what made those writes.

``norms`` holds norms fixed or splits off their scale; ``nodes`` predicts what deleting a write does; ``stream`` takes
the residual stream apart; ``measure`` runs the model without a node; ``ports`` says what the key, value and query of a
write are made of, by runs of one block; ``tracing`` follows one text with these, and ``atoms`` takes its writes and
states apart; ``attribute`` puts this together; ``graph`` is the result, ``tables`` are its rows, and ``draw`` is its
picture. ``task`` averages graphs of texts of one form.
"""
