"""The helpers behind the notebooks: one room a module, read in this order.

parameters -> hardware -> schemes -> models -> engine -> measure -> records -> sizing -> roofline -> cost
-> ledger -> show, figures, widgets

Importing this package imports neither torch nor vLLM: they come with the first engine.
"""
