"""Studies of recurrence; see README.md."""
