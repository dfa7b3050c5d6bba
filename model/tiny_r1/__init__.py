"""The embedded model: its files, and in `training` the code that makes them."""
