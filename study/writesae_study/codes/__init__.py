"""What can replace writes: codes of few numbers, components, baselines."""
