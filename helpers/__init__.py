"""The helpers behind the notebooks, in eight rooms; each imports only those below it.

tools > compare > serve, measure > engine > model > faults > base

Importing this package imports neither torch nor vLLM: they come with the first engine.
"""
