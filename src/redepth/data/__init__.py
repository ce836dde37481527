"""Text and tasks for healing and evaluation."""
