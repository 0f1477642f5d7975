"""The vocabulary of Saccade: plans, specs, ops, graph rules, errors. Imports nothing of ours."""
