"""Reports, allocations and verdicts as tables for the terminal."""
