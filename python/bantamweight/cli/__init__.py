"""The command line: `arguments.py` declares every option, one file a subcommand does the work."""
