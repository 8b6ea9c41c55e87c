"""Protection from untrusted clients: distances between updates, and rules that limit clients."""
