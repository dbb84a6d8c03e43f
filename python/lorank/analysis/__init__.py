"""The analysis of a model: from its matrices to a report."""
