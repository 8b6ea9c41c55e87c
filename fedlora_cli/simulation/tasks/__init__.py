"""Tasks: the embedded digits, and families of tasks with the user's model and data."""
