"""What dictionaries and memories are good for: detection, steering, and operations on memories.

Each module has `measure(...)`, which gives the numbers of a page as JSON has them, and `QUICK`, settings with which it
runs in a minute. `scripts/use_page.py` runs them and writes docs/use.md and docs/memory_surgery.md.
"""
