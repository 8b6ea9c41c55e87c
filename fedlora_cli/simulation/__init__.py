"""Whole federations with real training, through the same files and functions as the commands."""
