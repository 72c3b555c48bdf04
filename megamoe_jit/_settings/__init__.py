"""What the user has set: the table of ``MEGAMOE_JIT_*`` variables, what environment and file say, and `Settings`, both
of them typed and read once.

It must not know what any setting is for: it imports nothing of the package but errors and text.
"""
