"""The one place that knows PEFT: names in files, settings, scaling, rank patterns and targets."""
