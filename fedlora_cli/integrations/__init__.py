"""Frameworks in which federations run; each module imports its framework, and nothing else does."""
