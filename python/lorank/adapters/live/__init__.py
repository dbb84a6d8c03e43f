"""Adapters in live PEFT models: reading them, and putting them in."""
