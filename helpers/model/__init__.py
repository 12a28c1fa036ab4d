"""A name and a scheme to a folder that loads, and the bytes it takes."""
