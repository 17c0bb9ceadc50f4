"""What every program shares: flags, config files, one-line errors, whole files, the terminal."""
