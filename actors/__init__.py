"""Plain classes that make up a running cluster: links, ExpertHost, Router, scheduler, the front. Nothing here imports ray."""
