"""Contracts that plugins, built in or of third parties, inherit as their tests; needs pytest."""
