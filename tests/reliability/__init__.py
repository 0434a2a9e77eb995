"""What goes wrong in practice: checks that ``test_reliability.py`` and ``tools/reliability.py`` run."""
