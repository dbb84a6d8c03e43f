"""Long runs of the public functions and commands under bad conditions: ``python -m tests.soak``."""
