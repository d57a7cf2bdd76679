"""Found by every Python that has this folder on its path, Ray's workers too: `faulty://` is a file system."""

from fsspec import register_implementation

register_implementation("faulty", "faulty_files.FaultyFiles")
