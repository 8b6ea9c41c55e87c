"""Rank collapse measured from adapter files: spectra, similarity, trend, verdict."""
