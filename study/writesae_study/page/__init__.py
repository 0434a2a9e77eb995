"""Pages: reports and atom pages."""
