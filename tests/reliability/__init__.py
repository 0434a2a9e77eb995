"""What goes wrong in practice, thrown at the packages: ``scripts/reliability_page.py`` and the tests here call it."""
