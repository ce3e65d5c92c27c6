"""Files that are complete on disk or absent, checksums, and reading files that cannot be trusted."""
