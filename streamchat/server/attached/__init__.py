"""Front ends of other processes on the server's sessions: `streamchat attach`."""
