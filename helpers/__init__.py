"""The helpers behind the notebooks: one room a module, read in this order.

parameters -> hardware -> schemes -> models -> engine -> measure -> records -> show

Importing this package imports neither torch nor vLLM: they come with the first engine.
"""
