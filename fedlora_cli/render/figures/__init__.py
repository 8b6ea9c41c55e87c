"""What people would rather look at: one file per kind of figure, one look for all of them."""

import logging

# Where it keeps its fonts, and that it may not: the figure is the same. Errors are raised.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
