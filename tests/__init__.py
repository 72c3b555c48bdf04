"""Tests, their scenario table and their oracles."""
