"""`streamchat attach`: a front end whose engine is on a server. Imports neither torch nor the server's packages."""
