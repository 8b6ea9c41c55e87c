"""Reports as terminal output, HTML pages and figures."""
