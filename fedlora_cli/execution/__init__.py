"""Work on many modules: threads, processes and clusters."""
