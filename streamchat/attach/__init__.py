"""A front end's engine on a server: `streamchat attach`. Imports neither torch nor what the server needs."""
