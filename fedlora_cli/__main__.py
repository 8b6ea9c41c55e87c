"""`python -m fedlora_cli` is the command `fedlora`."""

from __future__ import annotations

from fedlora_cli.cli import main

if __name__ == "__main__":
    main()
