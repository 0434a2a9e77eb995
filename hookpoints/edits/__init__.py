"""Edits of writes as values, and sessions that run many of them."""
