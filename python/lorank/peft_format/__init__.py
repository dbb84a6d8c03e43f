"""The one place that knows PEFT: its settings, its scaling, and how it matches names to ranks."""
