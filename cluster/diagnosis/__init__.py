"""What `moray doctor` looks at: facts of each node, links between them, and what to do about what is wrong."""
