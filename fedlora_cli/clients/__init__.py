"""Client uploads: found, named, counted, read, and checked against each other."""
