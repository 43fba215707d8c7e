"""What `vmae-fast` does: one file a command, each with ``run(args) -> exit status``."""
