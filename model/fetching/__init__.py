"""Brings a checkpoint to this machine, once: from Hugging Face's hub, object storage or a web server.

    sources.py     what a place to fetch from can do: say what it has, and give a file from any byte on
    hub.py         Hugging Face's hub, through huggingface_hub
    objects.py     everything that fsspec reads
    selection.py   which files of a published checkpoint are needed
    transfer.py    one file: ranges, retries, checksum, rename
    directory.py   the directory on disk: what is in it and was checked, and who is fetching
    fetch.py       all of it together

Nothing is imported here: the libraries behind it take a second, and most processes find everything in place.
"""
