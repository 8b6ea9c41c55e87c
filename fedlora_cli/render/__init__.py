"""Report dataclasses, and what becomes of them: terminal, JSON, model card."""
