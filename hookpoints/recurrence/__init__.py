"""The write: the canonical recurrence, its step-by-step reference and its chunked fast path."""
