"""What can be told about a machine, a kernel or a call without making one: `doctor`, `explain`, `inspect`, `env`.

It must not print, nor change anything that it looks at.
"""
