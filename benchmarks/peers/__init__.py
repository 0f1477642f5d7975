"""``python -m benchmarks.peers``: Saccade beside what a user would pick instead, in one interleaved run."""
