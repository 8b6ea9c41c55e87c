"""Aggregation of a cohort by a method: the plan, the clients' weights, and the sum of a module."""
