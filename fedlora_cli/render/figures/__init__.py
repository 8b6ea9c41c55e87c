"""Figures: one file per kind, one style for all."""

import logging

# Matplotlib logs about its font cache, which does not change the figure. Errors are raised.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
