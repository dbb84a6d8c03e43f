"""Reads adapters from live PEFT models, and puts them into live models."""
