"""From evidence to ranks: signals, budgets, and the allocation that PEFT loads."""
