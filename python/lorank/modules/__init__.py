"""Modules of models: their kinds, shapes, names and ties, as the models' own code describes them."""
