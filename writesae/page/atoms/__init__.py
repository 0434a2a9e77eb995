"""One static page per atom, and an index that sorts and filters.

>>> data = AtomPages(n_atoms=20).collect(model, sae, tokens)  # everything that the pages show, as plain data
>>> write_atom_pages(data, "atoms")                           # index.html, atom-17.html ..., data.json
"""

from writesae.page.atoms.collect import AtomPages
from writesae.page.atoms.data import AtomPage, AtomPagesData
from writesae.page.atoms.pages import write_atom_pages

__all__ = ["AtomPage", "AtomPages", "AtomPagesData", "write_atom_pages"]
