"""Runtimes behind one protocol, and what this machine has for them."""
