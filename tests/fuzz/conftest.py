"""Fuzzers are started by hand: they need atheris, and never end by themselves."""

collect_ignore = ["headers.py", "configs.py", "tally.py"]
