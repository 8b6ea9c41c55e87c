"""Adapters in memory, whatever format they were read from."""
