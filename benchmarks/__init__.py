"""Measurements, each beside its peer and with its conditions; run as modules from the tree, not shipped."""
