"""Branch and bound: the search that turns bounds into verdicts."""
