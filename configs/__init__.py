"""Typed deployment settings and the exception tree: the bottom room, it imports nothing of ours."""
