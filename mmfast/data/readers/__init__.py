"""One file for each layout of files that is read."""
