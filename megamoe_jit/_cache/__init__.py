"""Compiled kernels on disk: keys, entries that are whole or absent, what goes when there are too many, and the locks by
which processes of one machine compile each kernel once.

It must not know how kernels are made or launched: to it an entry is a few verified files under a key.
"""
