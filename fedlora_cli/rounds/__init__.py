"""Workflows that write: one round of a federation as files."""
