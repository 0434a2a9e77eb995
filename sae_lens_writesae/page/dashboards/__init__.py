"""Dashboards: one static page per atom, and an index that sorts and filters.

>>> data = atom_dashboards(model, sae, tokens)          # everything the pages show, JSON-able
>>> write_dashboards(data, "dashboards")                # index.html, atom-17.html ..., data.json
"""

from sae_lens_writesae.page.dashboards.collect import atom_dashboards
from sae_lens_writesae.page.dashboards.config import DashboardConfig
from sae_lens_writesae.page.dashboards.data import AtomPage, Dashboard
from sae_lens_writesae.page.dashboards.pages import DashboardFiles, write_dashboards

__all__ = ["AtomPage", "Dashboard", "DashboardConfig", "DashboardFiles", "atom_dashboards", "write_dashboards"]
