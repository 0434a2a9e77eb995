"""What goes wrong in practice: checks that ``test_reliability.py`` and ``scripts/reliability_page.py`` run."""
