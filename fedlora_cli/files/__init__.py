"""Bytes on disk, distrusted on the way in and atomic on the way out. Knows no adapters."""
