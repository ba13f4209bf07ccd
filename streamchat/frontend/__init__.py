"""What every front end shares: slash commands, status, messages, mentions. Needs no torch and no screen."""
