"""All methods on the same clients."""
