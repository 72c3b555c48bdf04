"""How fast the layer is: the clock, rows on one rank or several, the unfused layer and other contenders beside it,
tuning.

It measures what `_check` has found right. It must not print: the command line does.
"""
