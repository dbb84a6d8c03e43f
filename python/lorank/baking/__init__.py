"""Adapters added to the weights of their base model, and checks that a model holds such updates."""
