"""What goes wrong in practice, thrown at the packages: ``scripts/reliability.py`` and the tests here call it."""
