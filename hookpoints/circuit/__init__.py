"""Why did the model say this? Which writes made a logit, and what made those writes.

``norms`` holds norms fixed in a gradient; ``nodes`` predicts what deleting a node does; ``stream`` is what a pass
leaves; ``measure`` runs the model without nodes; ``ports`` are the key, value, query and gate of a node, and ``paths``
says what other nodes give to them directly; ``tracing`` follows one text with these, and ``atoms`` takes its writes and
states apart; ``attribute`` puts this together; ``graph`` is the result, ``tables`` are its rows, and ``draw`` is its
picture. ``task`` averages graphs of texts of one form.
"""
