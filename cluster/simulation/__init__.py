"""`moray simulate`: a discrete-event simulation of a cluster, driven by the functions that drive a real one."""
