"""What people would rather look at: one file per kind of figure, one look for all of them."""
