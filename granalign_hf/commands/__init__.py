"""The commands of `granalign`, a module each: `add_parser` describes one on the command line, `run` is what it does."""
