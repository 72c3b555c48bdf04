"""The layer inside of serving engines: a folder for each, whose `register` is what the engine's entry point calls.

This room knows where engines keep experts and how they call them. It must not import an engine before the engine itself
runs, nor break one: what does not fit the installed release steps aside with one warning.
"""

from __future__ import annotations
