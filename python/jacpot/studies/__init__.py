"""The experiments behind the command line, one file each."""
