"""Where results and images lie: on this machine's disks, or on what fsspec reaches."""
