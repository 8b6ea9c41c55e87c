"""The results of the commands as data, from which tables, pages and `--json` are made."""
