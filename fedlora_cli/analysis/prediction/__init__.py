"""Rank collapse as ranks and sample counts foretell it."""
