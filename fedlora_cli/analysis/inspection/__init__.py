"""What is in adapters, how they differ, and what is wrong with them."""
