"""The command line: arguments in, files and a few lines out. Nothing imports it."""
