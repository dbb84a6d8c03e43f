"""Modules of models: their kinds, shapes, names and ties, from the models' code or from names alone."""
