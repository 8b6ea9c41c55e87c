"""Low-rank algebra: updates as factors, their sums, spectra and sizes."""
