"""The comparison of all methods on the same clients."""
