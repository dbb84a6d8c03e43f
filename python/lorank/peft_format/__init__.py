"""PEFT's conventions: names in files, settings, scaling, rank patterns and targets."""
