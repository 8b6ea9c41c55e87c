"""Workflows that read: what adapters hold, what will become of them, what is wrong with them."""
