"""One op call of one recurrent layer: interception, hooks, edits, response."""
