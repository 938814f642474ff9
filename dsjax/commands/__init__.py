"""The commands: what each takes, and the call that it becomes. Nothing heavy is imported before a command runs."""
