"""Training and serving, end to end: see README.md beside this file."""
