"""Hooked models: loading, attaching, running."""
