"""Adapters in memory, independent of the format of their files."""
