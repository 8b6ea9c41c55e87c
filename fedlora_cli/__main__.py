"""`python -m fedlora_cli` is the command `fedlora`."""

from __future__ import annotations

from fedlora_cli.files.interrupts import leaving_at_once


def main() -> None:
    """The console script. All of it is loaded here: an interrupt meanwhile is no traceback."""
    with leaving_at_once():
        from fedlora_cli.cli import main as command

        command()


if __name__ == "__main__":
    main()
