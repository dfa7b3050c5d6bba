"""`moray bench`: measures a server, ours or any other that speaks OpenAI's API, over HTTP alone."""
