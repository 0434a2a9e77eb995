"""What goes wrong in practice: checks that ``test_reliability.py`` and ``tools/run_reliability.py`` run."""
