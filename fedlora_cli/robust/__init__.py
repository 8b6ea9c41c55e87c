"""Clients that are not trusted: distances between updates, and the rules that limit them."""
