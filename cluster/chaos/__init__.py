"""A fault harness that can be pointed at any running cluster: `moray chaos`. What it does is told in `run`."""
