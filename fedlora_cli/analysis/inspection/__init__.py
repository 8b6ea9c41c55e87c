"""The contents of adapters, their differences, and their faults."""
