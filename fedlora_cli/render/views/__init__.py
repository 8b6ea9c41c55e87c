"""Reports to views: one file per command."""
