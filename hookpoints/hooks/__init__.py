"""The hook: the table of hook points, the points themselves, and the guard against silent hooks."""
