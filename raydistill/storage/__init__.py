"""Reads and writes results and images: on this machine's disks, or anywhere that fsspec reaches."""
