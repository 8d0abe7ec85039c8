"""Data sets: tasks to solve and conversations to learn from."""
