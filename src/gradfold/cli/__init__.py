"""The `gradfold` command: one file per subcommand."""
