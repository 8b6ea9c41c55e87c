"""Rank collapse as files show it: spectra, similarity, trend, verdict."""
