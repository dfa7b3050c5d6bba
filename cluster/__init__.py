"""Placement, controller, spawning, supervision and the command line: the only room that imports ray."""
