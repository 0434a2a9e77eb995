"""Known truth for every evaluation: worlds in which a claim must hold, and worlds in which it must not."""
