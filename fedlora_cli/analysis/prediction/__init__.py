"""Rank collapse predicted from ranks and sample counts."""
