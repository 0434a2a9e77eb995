"""The experiment: an evaluation is an object, a laboratory runs it."""
