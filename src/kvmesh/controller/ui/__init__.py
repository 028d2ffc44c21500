"""The controller's web page. NiceGUI serves all scripts, styles and fonts itself: it works without internet.

One module per section (`tiles`, `warnings`, `instances`, `fetches`), each a class that builds its elements and has an
`update(moment)`; `frame` holds what is common to all pages; `overview` puts the first page together.
"""

from kvmesh.controller.ui.overview import mount

__all__ = ["mount"]
