"""Why did the model say this? Which writes made a logit, and what made those writes.

``norms`` holds norms fixed or splits them into scale and direction, ``nodes`` predicts what deleting a write does,
``measure`` deletes, ``ports`` and ``edges`` say what made a write, ``graph`` is the result and ``draw`` its picture.
"""
