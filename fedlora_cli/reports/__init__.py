"""The results of the commands, as data: what tables, pages and `--json` are made from."""
