"""What is measured of a dictionary alone."""
