"""Plug-ins in the real sources of engines, on a CPU: `make test-engines` fetches releases and runs this."""
