"""Allocation of ranks to modules: the signals of methods, budgets, and the result that PEFT loads."""
