"""`moray plan`: what a model needs of a cluster, computed from its `config.json` before anything is paid for."""
