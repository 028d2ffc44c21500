"""The controller's web page. NiceGUI serves all scripts, styles and fonts itself: it works without internet.

    site            the pages' addresses
    open_pages      bringing the open ones up to date, together, and forgetting those that were left
    live            what there is to show at one moment, made once for all of them
    frame           what is common to all pages
    panel, tables   parts that are sent only what changed; their looks are the Vue components in assets/
    overview, attention, instances, instance, traffic, compatibility, explain, operations
                    one page, or one part of it, each

The page reads the registry directly; it calls the same functions as the HTTP API and never the API itself.
"""

from kvmesh.controller.ui.site import mount

__all__ = ["mount"]
